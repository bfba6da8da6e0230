//! TLS of an export's connections, without I/O: a server's settings from PEM, and records to bytes and back.
//!
//! TLS 1.3 alone, and every client shows a certificate of an authority that the owner of the socket named: there is no export for
//! whoever happens to know the address. No session is resumed, so a certificate that is refused is refused at once, and nothing is
//! kept for clients that left.
//!
//! What it refuses: pre-shared keys, which the NBD protocol leaves to the implementation and rustls does not have.
//!
//! The private key is in locked memory ([`crate::crypto::Secret`]) as PEM, and its decoded form is zeroed here as soon as ring has made
//! its own of it. That one, what the PEM decoder needed on the way, and the keys of sessions are in ordinary memory of libraries that
//! do not zero it; the process takes part in no core dump and no tracing.

use std::io::{Read, Write};
use std::sync::Arc;

use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{RootCertStore, ServerConfig, ServerConnection};
use zeroize::Zeroizing;

use crate::error::{Error, ErrorKind, Result};

/// A server's settings, from PEM: its certificate and those between it and an authority, its private key, and the authorities of
/// clients.
///
/// # Errors
/// `Invalid`: one of them is not what it should be, or they do not belong together.
pub fn server_config(certificate: &[u8], key: &[u8], clients: &[u8]) -> Result<Arc<ServerConfig>> {
    let provider = Arc::new(ring::default_provider());
    let chain = certificates(certificate, "the server's certificate")?;
    let key = private_key(key)?;
    let certified = CertifiedKey::new(chain, key);
    certified
        .keys_match()
        .map_err(|cause| invalid("the server's certificate is not of its private key").because(cause))?;
    let mut config = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|cause| Error::new(ErrorKind::Internal, "cannot set up TLS").because(cause))?
        .with_client_cert_verifier(verifier(clients, provider)?)
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
    // Nothing to come back to: see the module.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(Arc::new(config))
}

fn invalid(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Invalid, what)
}

/// All certificates of a PEM text, which has one at least.
fn certificates(pem: &[u8], whose: &str) -> Result<Vec<CertificateDer<'static>>> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let found = found.map_err(|cause| invalid(format!("{whose} cannot be read as PEM")).because(cause))?;
    if found.is_empty() {
        return Err(invalid(format!("{whose} is missing: there is no certificate in the PEM text")));
    }
    Ok(found)
}

fn private_key(pem: &[u8]) -> Result<Arc<dyn rustls::sign::SigningKey>> {
    let key = PrivateKeyDer::from_pem_slice(pem).map(Zeroizing::new).map_err(|cause| {
        invalid("the server's private key cannot be read as PEM")
            .because(cause)
            .hint("it must be there unencrypted, in PKCS#8, PKCS#1 or SEC1: -----BEGIN … PRIVATE KEY-----")
    })?;
    ring::sign::any_supported_type(&key).map_err(|cause| {
        invalid("the server's private key is of no use")
            .because(cause)
            .hint("known are RSA of 2048 bits or more, ECDSA on P-256 and P-384, and Ed25519")
    })
}

fn verifier(
    authorities: &[u8],
    provider: Arc<CryptoProvider>,
) -> Result<Arc<dyn rustls::server::danger::ClientCertVerifier>> {
    let whose = "the authority of clients";
    let mut roots = RootCertStore::empty();
    for authority in certificates(authorities, whose)? {
        roots.add(authority).map_err(|cause| invalid(format!("{whose} is no certificate")).because(cause))?;
    }
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
        .build()
        .map_err(|cause| invalid(format!("{whose} cannot be used")).because(cause))
}

/// One connection's TLS. What it holds is bounded by rustls: a record that has come in part, or the messages of a handshake (64 KiB).
pub struct TlsStream(ServerConnection);

impl TlsStream {
    /// Wait for a client's first message.
    ///
    /// # Errors
    /// `Internal`: the settings are of no use.
    pub fn accept(config: Arc<ServerConfig>) -> Result<Self> {
        let connection = ServerConnection::new(config)
            .map_err(|cause| Error::new(ErrorKind::Internal, "cannot begin TLS").because(cause))?;
        Ok(Self(connection))
    }

    /// Take bytes from the socket, all of them: what they say is appended to `plain` (never more than they are), and what TLS itself
    /// has to answer to `out`.
    ///
    /// # Errors
    /// The handshake failed, or somebody meddled: send `out`, then close.
    pub fn feed(&mut self, wire: &[u8], plain: &mut Vec<u8>, out: &mut Vec<u8>) -> Result<(), rustls::Error> {
        let mut wire = wire;
        let mut result = Ok(());
        while !wire.is_empty() {
            // The plaintext is taken out below before more is read, so there is always room. Nothing is read behind the end.
            let read = self.0.read_tls(&mut wire).expect("reading from memory, with room for it");
            if read == 0 {
                break;
            }
            match self.0.process_new_packets() {
                Ok(state) => {
                    let (from, bytes) = (plain.len(), state.plaintext_bytes_to_read());
                    plain.resize(from + bytes, 0);
                    self.0.reader().read_exact(&mut plain[from..]).expect("it said that there is as much");
                }
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        self.flush(out);
        result
    }

    /// Append the records that say `plain` to `out`. Not before the handshake is over.
    pub fn seal(&mut self, plain: &[u8], out: &mut Vec<u8>) {
        debug_assert!(!self.0.is_handshaking(), "nothing is said before it is known to whom");
        let mut plain = plain;
        while !plain.is_empty() {
            // As much as rustls holds at a time; then it is taken out.
            let taken = self.0.writer().write(plain).expect("writing to memory");
            plain = &plain[taken..];
            self.flush(out);
        }
    }

    /// Append the end of what we have to say to `out`.
    pub fn close(&mut self, out: &mut Vec<u8>) {
        self.0.send_close_notify();
        self.flush(out);
    }

    /// The handshake is not over.
    #[must_use]
    pub fn is_handshaking(&self) -> bool {
        self.0.is_handshaking()
    }

    fn flush(&mut self, out: &mut Vec<u8>) {
        while self.0.wants_write() {
            self.0.write_tls(out).expect("writing to memory");
        }
    }
}
