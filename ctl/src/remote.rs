//! Connections to NBD servers, made with the caller's rights.
//!
//! Nothing is said on them: haggling is the daemon's. So a server is only known to listen when this is done, not to have the export.
//! They are made last, when every question has been asked: a server may give a client that says nothing a few seconds only.

use std::fs::File;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use proto::ErrorKind;
use proto::remote::Address as Led;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use crate::report::{Error, Result};
use crate::uri::{Address, Tls, Uri};

/// Most connections to one server: a worker each, and more gain nothing on the machines that this was measured on.
pub const CONNECTIONS: usize = 4;
/// How long a server may take to accept the first of them.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long it may take to accept another, without which it works as well.
const PATIENCE_MORE: Duration = Duration::from_secs(1);
/// How often a full queue of connections is tried again.
const TRY_EVERY: Duration = Duration::from_millis(50);
/// Longest file with certificates or a key, bytes.
const PEM_MAX: u64 = 1 << 20;

/// A volume that a server has, and what the daemon is to know of it.
#[derive(Debug, Clone)]
pub struct Remote {
    /// Where it is.
    pub uri: Uri,
    /// See [`proto::remote::Remote::reconnect_ms`].
    pub reconnect_ms: Option<u32>,
    /// See [`proto::remote::Remote::bitmap`].
    pub bitmap: Option<String>,
    /// See [`proto::remote::Remote::update`].
    pub update: bool,
    /// See [`proto::remote::Remote::blank_bytes`].
    pub blank_bytes: Option<u64>,
}

/// Connections to one server, and what goes with them.
pub struct Connected {
    /// The connections: one, or some.
    pub connections: Vec<OwnedFd>,
    /// Where they lead, if that can be said in words.
    pub address: Option<Led>,
    /// Certificates of authorities.
    pub authorities: Option<OwnedFd>,
    /// The client's certificate and key.
    pub identity: Option<(OwnedFd, OwnedFd)>,
}

impl Remote {
    /// As typed, with nothing else said.
    pub fn new(uri: Uri) -> Self {
        Self { uri, reconnect_ms: None, bitmap: None, update: false, blank_bytes: None }
    }

    /// What tells one volume from another, as far as words can: two names of one host are two.
    pub fn identity(&self) -> String {
        let export = &self.uri.export;
        match &self.uri.address {
            Address::Unix(path) => {
                let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.clone());
                format!("{}/{export}", path.display())
            }
            Address::Tcp { host, port } => format!("{}:{port}/{export}", host.to_ascii_lowercase()),
        }
    }

    /// Connect so often, or once if the server takes no more. `name`: for messages.
    ///
    /// # Errors
    /// Nobody listens, or not in time; a certificate cannot be read.
    pub fn connect(&self, name: &str, most: usize) -> Result<Connected> {
        let (authorities, identity) = match &self.uri.tls {
            Some(tls) => certificates(tls, name)?,
            None => (None, None),
        };
        let (connections, address) = match &self.uri.address {
            Address::Unix(path) => on_unix(path, name, most)?,
            Address::Tcp { host, port } => on_tcp(host, *port, name, most)?,
        };
        Ok(Connected { connections, address, authorities, identity })
    }
}

/// The first, and others as long as they can be had.
fn several(
    most: usize,
    mut one: impl FnMut(Instant) -> std::io::Result<OwnedFd>,
) -> std::io::Result<Vec<OwnedFd>> {
    let mut connections = vec![one(Instant::now() + PATIENCE)?];
    while connections.len() < most {
        match one(Instant::now() + PATIENCE_MORE) {
            Ok(connection) => connections.push(connection),
            // It works with fewer.
            Err(_) => break,
        }
    }
    Ok(connections)
}

fn on_unix(path: &Path, name: &str, most: usize) -> Result<(Vec<OwnedFd>, Option<Led>)> {
    let failed = |error: std::io::Error| {
        let hint = match error.kind() {
            std::io::ErrorKind::NotFound => format!("no server has made {}", path.display()),
            std::io::ErrorKind::ConnectionRefused => {
                format!("nobody listens on {} any more: start the server again", path.display())
            }
            std::io::ErrorKind::TimedOut => {
                "it has as many clients as it takes; `qemu-nbd --shared=N` takes more".to_owned()
            }
            _ => format!("`ls -l {}` shows what it is, and whose", path.display()),
        };
        Error::io("cannot connect", name, error).hint(hint)
    };
    let address = SocketAddrUnix::new(path).map_err(|errno| failed(errno.into()))?;
    let connections = several(most, |deadline| {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        loop {
            match connect(&socket, &address) {
                Ok(()) => break,
                // Its queue of connections is full.
                Err(Errno::AGAIN) if Instant::now() < deadline => std::thread::sleep(TRY_EVERY),
                Err(Errno::AGAIN) => return Err(Errno::TIMEDOUT.into()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        rustix::io::ioctl_fionbio(&socket, false)?;
        Ok(socket)
    });
    let absolute = std::path::absolute(path).ok();
    let address = absolute.and_then(|path| path.to_str().map(|path| Led::Unix(path.to_owned())));
    Ok((connections.map_err(failed)?, address))
}

fn on_tcp(host: &str, port: u16, name: &str, most: usize) -> Result<(Vec<OwnedFd>, Option<Led>)> {
    let addresses: Vec<SocketAddr> = (host, port)
        .to_socket_addrs()
        .map_err(|error| {
            let what = format!("{name}: the host {host} is not found: {error}");
            Error::new(ErrorKind::NotFound, what).hint(format!("`getent hosts {host}` asks the same"))
        })?
        .collect();
    let mut last = None;
    for address in addresses {
        let connections = several(most, |deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            let stream = TcpStream::connect_timeout(&address, left)?;
            // Requests are small, and wait for no others.
            stream.set_nodelay(true)?;
            Ok(stream.into())
        });
        match connections {
            Ok(connections) => return Ok((connections, Some(Led::Tcp(address.to_string())))),
            Err(error) => last = Some((address, error)),
        }
    }
    Err(match last {
        Some((address, error)) => {
            let hint = if error.kind() == std::io::ErrorKind::ConnectionRefused {
                format!("nobody listens on port {port} there")
            } else {
                format!("is {address} its address, and may it be reached from here?")
            };
            Error::io("cannot connect", name, error).hint(hint)
        }
        None => Error::new(ErrorKind::NotFound, format!("{name}: the host {host} has no address")),
    })
}

/// What a client shows, and its key.
type Identity = (OwnedFd, OwnedFd);

/// The files of a directory as libnbd, nbdkit and QEMU name them.
fn certificates(tls: &Tls, name: &str) -> Result<(Option<OwnedFd>, Option<Identity>)> {
    let Some(directory) = &tls.certificates else { return Ok((None, None)) };
    let file = |called: &str| -> Result<Option<OwnedFd>> {
        let path: PathBuf = directory.join(called);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("cannot open", path.display(), error)),
        };
        let found = file.metadata().map_err(|error| Error::io("cannot inspect", path.display(), error))?;
        if !found.is_file() || found.len() > PEM_MAX {
            let what = format!("{} is no file of certificates or a key", path.display());
            return Err(Error::usage(what));
        }
        Ok(Some(file.into()))
    };
    let shown = directory.display();
    if file("ca-crl.pem")?.is_some() {
        let what = format!("{name}: {shown}/ca-crl.pem takes certificates back, which is not supported");
        return Err(Error::new(ErrorKind::Unsupported, what).hint("use a directory without one"));
    }
    let Some(authorities) = file("ca-cert.pem")? else {
        let what = format!("{name}: there is no ca-cert.pem in {shown}");
        return Err(Error::new(ErrorKind::NotFound, what)
            .hint("without tls-certificates the authorities that the system trusts are asked"));
    };
    let identity = match (file("client-cert.pem")?, file("client-key.pem")?) {
        (Some(certificate), Some(key)) => Some((certificate, key)),
        (None, None) => None,
        (Some(_), None) => return Err(alone(name, directory, "client-cert.pem", "client-key.pem")),
        (None, Some(_)) => return Err(alone(name, directory, "client-key.pem", "client-cert.pem")),
    };
    Ok((Some(authorities), identity))
}

fn alone(name: &str, directory: &Path, there: &str, missing: &str) -> Error {
    let what = format!("{name}: {} has a {there} and no {missing}", directory.display());
    Error::new(ErrorKind::NotFound, what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::os::unix::net::UnixListener;

    fn remote(text: &str) -> Remote {
        let uri = crate::uri::parse(Path::new(text)).expect("a URI");
        Remote::new(uri.unwrap_or_else(|error| panic!("{error}")))
    }

    fn refused(text: &str) -> Error {
        remote(text).connect(text, 1).err().unwrap_or_else(|| panic!("{text}: connected"))
    }

    #[test]
    fn several_connections_lead_to_one_server() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("sock");
        let listener = UnixListener::bind(&path).expect("bind");
        let text = format!("nbd+unix:///x?socket={}", path.display());
        let connected = remote(&text).connect(&text, 3).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(connected.connections.len(), 3);
        assert_eq!(connected.address, Some(Led::Unix(path.to_str().expect("UTF-8").to_owned())));
        for _ in 0..3 {
            assert!(listener.accept().is_ok());
        }
        let flags = rustix::fs::fcntl_getfl(&connected.connections[0]).expect("flags");
        assert!(!flags.contains(rustix::fs::OFlags::NONBLOCK), "as any descriptor");

        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let port = listener.local_addr().expect("bound").port();
        let text = format!("nbd://127.0.0.1:{port}");
        let connected = remote(&text).connect(&text, 2).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(connected.connections.len(), 2);
        assert_eq!(connected.address, Some(Led::Tcp(format!("127.0.0.1:{port}"))));
        assert!(listener.accept().is_ok());
    }

    #[test]
    fn where_nobody_listens_it_is_said() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("sock");
        let text = format!("nbd+unix:///x?socket={}", path.display());
        let error = refused(&text);
        assert_eq!(error.failure.kind, ErrorKind::NotFound, "{error}");
        assert!(error.to_string().contains("no server has made"), "{error}");
        drop(UnixListener::bind(&path).expect("bind"));
        assert!(refused(&text).to_string().contains("nobody listens"), "left over");
        std::fs::remove_file(&path).expect("remove");
        std::fs::write(&path, "").expect("write");
        assert!(refused(&text).to_string().contains("cannot connect"), "a file");
        let long = format!("nbd+unix:///x?socket=/{}", "x".repeat(200));
        assert!(refused(&long).to_string().contains("cannot connect"));

        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let port = listener.local_addr().expect("bound").port();
        drop(listener);
        let error = refused(&format!("nbd://127.0.0.1:{port}"));
        assert!(error.to_string().contains("nobody listens on port"), "{error}");
        let error = refused("nbd://no.such.host.invalid/x");
        assert_eq!(error.failure.kind, ErrorKind::NotFound, "{error}");
    }

    #[test]
    fn one_volume_is_known_under_two_names() {
        let dir = tempfile::tempdir().expect("dir");
        let (path, link) = (dir.path().join("sock"), dir.path().join("link"));
        let _listener = UnixListener::bind(&path).expect("bind");
        std::os::unix::fs::symlink(&path, &link).expect("link");
        let at = |path: &Path, name: &str| {
            remote(&format!("nbd+unix:///{name}?socket={}", path.display())).identity()
        };
        assert_eq!(at(&path, "a"), at(&link, "a"));
        assert_ne!(at(&path, "a"), at(&path, "b"));
        assert_eq!(remote("nbd://H/a").identity(), remote("nbd://h:10809/a").identity());
    }

    #[test]
    fn certificates_are_found_by_their_usual_names() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("sock");
        let _listener = UnixListener::bind(&path).expect("bind");
        let text =
            format!("nbds+unix:///x?socket={}&tls-certificates={}", path.display(), dir.path().display());
        let write = |name: &str| std::fs::write(dir.path().join(name), "pem").expect("write");
        assert!(refused(&text).to_string().contains("no ca-cert.pem"));
        write("ca-cert.pem");
        let connected = remote(&text).connect(&text, 1).unwrap_or_else(|error| panic!("{error}"));
        assert!(connected.authorities.is_some() && connected.identity.is_none());
        write("client-cert.pem");
        assert!(refused(&text).to_string().contains("no client-key.pem"));
        write("client-key.pem");
        let connected = remote(&text).connect(&text, 1).unwrap_or_else(|error| panic!("{error}"));
        assert!(connected.identity.is_some());
        std::fs::remove_file(dir.path().join("client-cert.pem")).expect("remove");
        assert!(refused(&text).to_string().contains("no client-cert.pem"));
        write("ca-crl.pem");
        assert_eq!(refused(&text).failure.kind, ErrorKind::Unsupported);
    }
}
