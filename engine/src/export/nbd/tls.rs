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

/// Most bytes in a row that say nothing to us: a handshake with its certificates, or one record and some changes of keys. Who sends
/// more keeps a thread busy for nothing.
const SILENT_MAX: usize = 256 << 10;

/// One connection's TLS. What it holds is bounded by rustls: a record that has come in part, or the messages of a handshake (64 KiB).
pub struct TlsStream {
    connection: ServerConnection,
    /// Bytes since the last that said something.
    silent: usize,
}

impl TlsStream {
    /// Wait for a client's first message.
    ///
    /// # Errors
    /// `Internal`: the settings are of no use.
    pub fn accept(config: Arc<ServerConfig>) -> Result<Self> {
        let connection = ServerConnection::new(config)
            .map_err(|cause| Error::new(ErrorKind::Internal, "cannot begin TLS").because(cause))?;
        Ok(Self { connection, silent: 0 })
    }

    /// Take bytes from the socket, all of them: what they say is appended to `plain` (never more than they are), and what TLS itself
    /// has to answer to `out`.
    ///
    /// # Errors
    /// The handshake failed, somebody meddled, or the client sends what nobody can use: send `out`, then close.
    pub fn feed(&mut self, wire: &[u8], plain: &mut Vec<u8>, out: &mut Vec<u8>) -> Result<(), rustls::Error> {
        let result = self.open(wire, plain);
        self.flush(out);
        result
    }

    fn open(&mut self, mut wire: &[u8], plain: &mut Vec<u8>) -> Result<(), rustls::Error> {
        while !wire.is_empty() {
            // Nothing fails in memory but what the client says: a message of the handshake longer than rustls holds.
            let read = self.connection.read_tls(&mut wire);
            let read = read.map_err(|cause| rustls::Error::General(cause.to_string()))?;
            // Nothing is read behind the end.
            if read == 0 {
                break;
            }
            let state = self.connection.process_new_packets()?;
            // The plaintext is taken out before more is read, so there is always room for it.
            let (from, bytes) = (plain.len(), state.plaintext_bytes_to_read());
            plain.resize(from + bytes, 0);
            self.connection.reader().read_exact(&mut plain[from..]).expect("it said that there is as much");
            self.silent = if bytes > 0 { 0 } else { self.silent + read };
            if self.silent > SILENT_MAX {
                return Err(rustls::Error::General("too many records that say nothing".to_owned()));
            }
        }
        Ok(())
    }

    /// Append the records that say `plain` to `out`. Not before the handshake is over.
    pub fn seal(&mut self, plain: &[u8], out: &mut Vec<u8>) {
        debug_assert!(!self.connection.is_handshaking(), "nothing is said before it is known to whom");
        let mut plain = plain;
        while !plain.is_empty() {
            // As much as rustls holds at a time; then it is taken out.
            let taken = self.connection.writer().write(plain).expect("writing to memory");
            plain = &plain[taken..];
            self.flush(out);
        }
    }

    /// Append the end of what we have to say to `out`.
    pub fn close(&mut self, out: &mut Vec<u8>) {
        self.connection.send_close_notify();
        self.flush(out);
    }

    /// The handshake is not over.
    #[must_use]
    pub fn is_handshaking(&self) -> bool {
        self.connection.is_handshaking()
    }

    fn flush(&mut self, out: &mut Vec<u8>) {
        while self.connection.wants_write() {
            self.connection.write_tls(out).expect("writing to memory");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::{ClientConfig, ClientConnection};

    /// A server, and a client that shows it the certificate it knows.
    fn pair() -> (TlsStream, ClientConnection) {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
        let (pem, key) = (made.cert.pem(), made.signing_key.serialize_pem());
        let config =
            server_config(pem.as_bytes(), key.as_bytes(), pem.as_bytes()).expect("they belong together");
        let chain = certificates(pem.as_bytes(), "its own").expect("PEM");
        let mut roots = RootCertStore::empty();
        roots.add(chain[0].clone()).expect("a certificate");
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("PEM");
        let client = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("known")
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .expect("they belong together");
        let name = "localhost".try_into().expect("a name");
        let client = ClientConnection::new(Arc::new(client), name).expect("client");
        (TlsStream::accept(config).expect("server"), client)
    }

    /// One turn of each; `false`: the client has nothing to say.
    fn turn(server: &mut TlsStream, client: &mut ClientConnection) -> bool {
        let (mut wire, mut plain, mut out) = (Vec::new(), Vec::new(), Vec::new());
        while client.wants_write() {
            client.write_tls(&mut wire).expect("memory");
        }
        server.feed(&wire, &mut plain, &mut out).expect("a client that keeps the rules");
        let mut out = out.as_slice();
        while !out.is_empty() {
            client.read_tls(&mut out).expect("memory");
            client.process_new_packets().expect("a server that keeps the rules");
        }
        !wire.is_empty()
    }

    /// Records of a handshake's message that would be as long as any may be, and is never there as a whole.
    fn endless() -> Vec<u8> {
        let mut message = vec![1, 0, 0xff, 0xff];
        message.resize(4 + 0xffff, 0);
        message
            .chunks(16 << 10)
            .flat_map(|part| {
                let length = u16::try_from(part.len()).expect("one record").to_be_bytes();
                [&[22, 3, 1], &length[..], part].concat()
            })
            .collect()
    }

    #[test]
    fn a_message_longer_than_can_be_held_is_the_clients_fault_at_any_time() {
        for turns in [0, 1, 100] {
            let (mut server, mut client) = pair();
            for _ in 0..turns {
                turn(&mut server, &mut client);
            }
            assert_eq!(server.is_handshaking(), turns < 100, "{turns} turns");
            let (mut plain, mut out) = (Vec::new(), Vec::new());
            let error = server.feed(&endless(), &mut plain, &mut out).expect_err("refused");
            if turns == 0 {
                assert_eq!(error, rustls::Error::General("message buffer full".to_owned()));
            }
            assert!(plain.is_empty());
        }
    }

    #[test]
    fn a_client_that_never_says_anything_is_not_listened_to_for_ever() {
        let (mut server, mut client) = pair();
        while turn(&mut server, &mut client) {}
        let mut ask = |client: &mut ClientConnection, said: &[u8]| {
            client.refresh_traffic_keys().expect("after the handshake");
            let (mut wire, mut plain, mut out) = (Vec::new(), Vec::new(), Vec::new());
            client.writer().write_all(said).expect("memory");
            while client.wants_write() {
                client.write_tls(&mut wire).expect("memory");
            }
            let result = server.feed(&wire, &mut plain, &mut out).map(|()| plain.len());
            (result, wire.len())
        };
        let mut sent = 0;
        // With something to say between them, keys may change as often as the client likes.
        while sent <= 2 * SILENT_MAX {
            let (heard, bytes) = ask(&mut client, b"x");
            assert_eq!(heard, Ok(1));
            sent += bytes;
        }
        let mut silent = 0;
        while {
            let (heard, bytes) = ask(&mut client, b"");
            silent += bytes;
            heard.is_ok()
        } {
            assert!(silent <= SILENT_MAX, "listened to {silent} bytes");
        }
    }
}
