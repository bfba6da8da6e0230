//! TLS of a client's connection: who is trusted, who we are, and bytes through rustls without waiting.
//!
//! TLS 1.3, which every server with TLS of the last years speaks. The server's certificate must be for the name that was asked
//! for, from an authority that is trusted; there is no way to go without.

use std::io::{ErrorKind as Io, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore};

use crate::error::{Error, ErrorKind, Result};

/// Where systems keep the authorities they trust.
const SYSTEM_AUTHORITIES: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];
/// Plaintext kept for a socket that takes no more.
const BUFFERED_BYTES: usize = 256 << 10;
/// Ciphertext taken in one go that brings no plaintext: tickets for sessions, of which a server may send as many as it likes.
const BARREN_BYTES: usize = 64 << 10;

/// What the descriptors of [`proto::remote::Tls`] held.
pub struct Credentials {
    /// The name the server's certificate must be for.
    pub server_name: String,
    /// PEM of the authorities trusted; `None`: those of the system.
    pub authorities: Option<Vec<u8>>,
    /// PEM of our certificates and of their key.
    pub identity: Option<(Vec<u8>, crate::crypto::Secret)>,
}

/// How connections to a server are made private. Cheap to clone.
#[derive(Clone)]
pub struct Means {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

impl std::fmt::Debug for Means {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Means({:?})", self.name)
    }
}

impl Means {
    /// From what the caller passed.
    ///
    /// # Errors
    /// `Invalid`: no certificates or key can be read from it, or the name is none.
    pub fn of(credentials: &Credentials) -> Result<Self> {
        let invalid = |what: &str| Error::new(ErrorKind::Invalid, what);
        let system;
        let pem = match &credentials.authorities {
            Some(pem) => pem,
            None => {
                system = SYSTEM_AUTHORITIES.iter().find_map(|path| std::fs::read(path).ok());
                let what = "this system has no list of authorities, and none were given";
                system.as_ref().ok_or_else(|| invalid(what))?
            }
        };
        let mut roots = RootCertStore::empty();
        let authorities: Vec<_> =
            CertificateDer::pem_slice_iter(pem).filter_map(std::result::Result::ok).collect();
        if roots.add_parsable_certificates(authorities).0 == 0 {
            return Err(invalid("there is no certificate among the authorities"));
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|cause| Error::new(ErrorKind::Internal, "no TLS").because(cause))?
            .with_root_certificates(roots);
        let config = match &credentials.identity {
            None => builder.with_no_client_auth(),
            Some((chain, key)) => {
                let chain: Vec<_> = CertificateDer::pem_slice_iter(chain)
                    .collect::<std::result::Result<_, _>>()
                    .map_err(|_| invalid("the client's certificates cannot be read"))?;
                // Nothing of the key in the message.
                let key = PrivateKeyDer::from_pem_slice(key.as_bytes())
                    .map_err(|_| invalid("the client's private key cannot be read"))?;
                builder
                    .with_client_auth_cert(chain, key)
                    .map_err(|cause| invalid("the client's certificate and key do not fit").because(cause))?
            }
        };
        let name = ServerName::try_from(credentials.server_name.clone())
            .map_err(|cause| invalid("no name of a server").because(cause))?;
        Ok(Self { config: Arc::new(config), name })
    }
}

/// A connection under TLS.
pub struct Private {
    socket: Arc<OwnedFd>,
    tls: Box<ClientConnection>,
}

/// The socket as rustls wants it.
struct Raw<'a>(&'a OwnedFd);

impl Read for Raw<'_> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        loop {
            match rustix::net::recv(self.0, &mut *into, RecvFlags::DONTWAIT) {
                Err(Errno::INTR) => {}
                other => return other.map(|(count, _)| count).map_err(Into::into),
            }
        }
    }
}

impl Write for Raw<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        loop {
            match rustix::net::send(self.0, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Err(Errno::INTR) => {}
                other => return other.map_err(Into::into),
            }
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Private {
    /// Over a socket on which the server expects TLS from here on. The handshake goes along with the first bytes.
    ///
    /// # Errors
    /// The configuration does not work out.
    pub fn new(socket: Arc<OwnedFd>, means: &Means) -> Result<Self> {
        let mut tls = ClientConnection::new(Arc::clone(&means.config), means.name.clone())
            .map_err(|cause| Error::new(ErrorKind::Invalid, "TLS cannot begin").because(cause))?;
        tls.set_buffer_limit(Some(BUFFERED_BYTES));
        Ok(Self { socket, tls: Box::new(tls) })
    }

    /// For polls.
    pub fn socket(&self) -> &Arc<OwnedFd> {
        &self.socket
    }

    /// As [`super::transport::Transport::send`].
    pub fn send(&mut self, slices: &[IoSlice<'_>]) -> std::io::Result<Option<usize>> {
        let count = self.tls.writer().write_vectored(slices)?;
        let drained = self.drain()?;
        Ok((count > 0 || drained).then_some(count))
    }

    /// Give the socket what it takes. `false`: there is more.
    fn drain(&mut self) -> std::io::Result<bool> {
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut Raw(&self.socket)) {
                Err(error) if error.kind() == Io::WouldBlock => return Ok(false),
                other => other.map(drop)?,
            }
        }
        Ok(true)
    }

    /// As [`super::transport::Transport::receive`]. `None` is also what comes of much that is no plaintext: whoever waits for some looks at
    /// the time then.
    pub fn receive(&mut self, slices: &mut [IoSliceMut<'_>], more: bool) -> std::io::Result<Option<usize>> {
        let mut total = 0;
        let mut barren = 0;
        for slice in slices {
            let mut filled = 0;
            while filled < slice.len() {
                match self.tls.reader().read(&mut slice[filled..]) {
                    Ok(0) => return Ok(Some(total)),
                    Ok(count) => {
                        filled += count;
                        total += count;
                        barren = 0;
                    }
                    Err(error) if error.kind() == Io::WouldBlock => {
                        match if more && barren < BARREN_BYTES { self.more() } else { Ok(0) } {
                            // What has arrived counts; the rest is told next time.
                            Ok(0) => return Ok((total > 0).then_some(total)),
                            Ok(count) => barren += count,
                            Err(_) if total > 0 => return Ok(Some(total)),
                            Err(error) => return Err(error),
                        }
                    }
                    Err(_) if total > 0 => return Ok(Some(total)),
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(Some(total))
    }

    /// Take what the socket has, of which this many bytes come; 0: nothing now.
    fn more(&mut self) -> std::io::Result<usize> {
        let count = match self.tls.read_tls(&mut Raw(&self.socket)) {
            Err(error) if error.kind() == Io::WouldBlock => return Ok(0),
            other => other?,
        };
        let processed = self.tls.process_new_packets();
        // An answer of the handshake, or an alert that says what is wrong.
        self.drain()?;
        processed.map_err(|cause| std::io::Error::new(Io::InvalidData, cause))?;
        // The end of the connection is for the reader to tell.
        Ok(count.max(1))
    }

    /// More to give to the socket.
    pub fn has_unsent(&self) -> bool {
        self.tls.wants_write()
    }

    /// Say that it is over.
    pub fn close(&mut self) {
        self.tls.send_close_notify();
        let _ = self.drain();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use rcgen::CertifiedKey;
    use rustls::{ServerConfig, ServerConnection};

    use super::*;

    /// Bytes in front of a record.
    const RECORD_HEADER: usize = 5;
    /// Bytes of a ticket as rustls makes them: head, lifetime, age, nonce, identity, no extensions.
    const TICKET: usize = 4 + 4 + 4 + (1 + 32) + (2 + 32) + 2;

    #[test]
    fn tickets_without_end_do_not_keep_who_reads() {
        let CertifiedKey { cert, signing_key } =
            rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).expect("a certificate");
        let credentials = Credentials {
            server_name: "localhost".to_owned(),
            authorities: Some(cert.pem().into_bytes()),
            identity: None,
        };
        let key = PrivateKeyDer::try_from(signing_key.serialize_der()).expect("a key");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(vec![cert.der().clone()], key)
            .expect("a server");
        config.send_tls13_tickets = 20_000;
        // Whole tickets in each record: of pieces, rustls gathers only so many.
        config.max_fragment_size = Some(RECORD_HEADER + 8 * TICKET);
        let mut server = ServerConnection::new(Arc::new(config)).expect("a server");
        server.set_buffer_limit(None);
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        let theirs = OwnedFd::from(theirs);
        let means = Means::of(&credentials).expect("means");
        let mut client = Private::new(Arc::new(ours.into()), &means).expect("a client");
        let mut byte = [0];
        let _ = client.send(&[]).expect("hello");
        while server.is_handshaking() {
            server.read_tls(&mut Raw(&theirs)).expect("heard");
            server.process_new_packets().expect("understood");
            while server.wants_write() && server.write_tls(&mut Raw(&theirs)).is_ok() {}
            if server.is_handshaking() {
                let received = client.receive(&mut [IoSliceMut::new(&mut byte)], true);
                assert_eq!(received.expect("heard"), None);
            }
        }
        let waiting = || rustix::io::ioctl_fionread(&**client.socket()).expect("bytes");
        let before = waiting();
        assert!(before > (BARREN_BYTES + BARREN_BYTES / 2) as u64, "{before} bytes of tickets");
        let received = client.receive(&mut [IoSliceMut::new(&mut byte)], true);
        assert_eq!(received.expect("nothing yet"), None);
        let after = rustix::io::ioctl_fionread(&**client.socket()).expect("bytes");
        assert!(after > 0 && after < before, "{after} of {before} bytes are left");
        // What is behind them is found all the same.
        server.writer().write_all(b"!").expect("accepted");
        loop {
            while server.wants_write() && server.write_tls(&mut Raw(&theirs)).is_ok() {}
            if client.receive(&mut [IoSliceMut::new(&mut byte)], true).expect("heard").is_some() {
                break;
            }
        }
        assert_eq!(byte, *b"!");
    }
}
