//! Listening sockets, bound with the caller's rights.
//!
//! A Unix socket appears with its permissions, never with wider ones for an instant. What has its name already is replaced only if it
//! is a socket on which nobody listens any more, as a daemon that was killed leaves it.
//!
//! This module refuses to listen without TLS on an address that other machines may reach.

use std::fmt;
use std::fs::File;
use std::io;
use std::net::{TcpListener, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use proto::ErrorKind;
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::report::{Error, Result};

/// Bytes of a Unix socket's path, without the zero byte at its end (unix(7)).
const PATH_MAX: usize = 107;
/// How long another one of us may take to listen in the same directory, and how often to look.
const PATIENCE: Duration = Duration::from_secs(3);
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// Connections waiting to be accepted.
const BACKLOG: i32 = 1024;

/// Where to listen, as typed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// `unix:PATH`
    Unix(PathBuf),
    /// `tcp:HOST:PORT`
    Tcp(String),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(at) => write!(f, "tcp:{at}"),
        }
    }
}

impl Address {
    /// An address as typed.
    ///
    /// # Errors
    /// A sentence for the user.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            Some(("tcp", at)) => {
                let port = at.rsplit_once(':').filter(|(host, _)| !host.is_empty());
                match port.map(|(_, port)| port.parse::<u16>()) {
                    Some(Ok(_)) => Ok(Self::Tcp(at.to_owned())),
                    _ => Err("expected tcp:HOST:PORT, such as tcp:127.0.0.1:10809".to_owned()),
                }
            }
            _ => Err("expected unix:PATH or tcp:HOST:PORT".to_owned()),
        }
    }

    /// The one way to write it: paths are absolute.
    ///
    /// # Errors
    /// `Invalid`: a path that is no Unix socket's.
    pub fn whole(&self) -> Result<Self> {
        let Self::Unix(path) = self else { return Ok(self.clone()) };
        let whole = std::path::absolute(path).map_err(|error| Error::io("cannot listen", self, error))?;
        let text = whole.to_str().ok_or_else(|| Error::usage(format!("{self} is not UTF-8")))?;
        if text.len() > PATH_MAX {
            return Err(Error::usage(format!(
                "{self}: the path of a Unix socket has at most {PATH_MAX} bytes"
            ))
            .hint("listen in a directory with a shorter name, such as $XDG_RUNTIME_DIR"));
        }
        Ok(Self::Unix(whole))
    }
}

/// A socket that listens.
pub struct Listening {
    /// It.
    pub socket: OwnedFd,
    /// Where: as typed, but for a port that the kernel chose.
    pub address: Address,
    /// The directory and name of a Unix socket.
    pub entry: Option<(OwnedFd, String)>,
    /// Its name, as long as we answer for it.
    pub name: Option<Name>,
}

/// The name of a Unix socket: removed when dropped, if it still means that socket.
pub struct Name {
    path: PathBuf,
    meant: (u64, u64),
    kept: bool,
}

impl Name {
    /// From now on it is the daemon's.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        let means = std::fs::symlink_metadata(&self.path).map(|found| (found.dev(), found.ino()));
        if !self.kept && means.is_ok_and(|means| means == self.meant) {
            // What cannot be removed is found stale, and replaced, by the next.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Listen there. `mode`: permission bits of a Unix socket.
///
/// # Errors
/// `Conflict`: somebody listens there, or the name is another's; `Invalid`: TCP that would need TLS.
pub fn listen(address: &Address, mode: u32, encrypted: bool) -> Result<Listening> {
    match address {
        Address::Unix(path) => unix(address, path, mode),
        Address::Tcp(at) => tcp(address, at, encrypted),
    }
}

fn unix(address: &Address, path: &Path, mode: u32) -> Result<Listening> {
    let failed = |what: &str, error: io::Error| Error::io(what, address, error);
    let (Some(parent), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return Err(Error::usage(format!("{address} is not a path of a socket")));
    };
    let directory = File::options()
        .read(true)
        .custom_flags(OFlags::DIRECTORY.bits().cast_signed())
        .open(parent)
        .map_err(|error| failed("cannot listen", error))?;
    // Until it listens: one that is bound and does not listen yet looks like one that nobody listens on any more.
    let _turn = turn(address, parent)?;
    make_way(address, path)?;
    let listening = |errno: rustix::io::Errno| failed("cannot listen", errno.into());
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .map_err(listening)?;
    // The kernel makes the name with the socket's own mode, less the umask.
    rustix::fs::fchmod(&socket, Mode::from_raw_mode(mode)).map_err(listening)?;
    let at = SocketAddrUnix::new(path).map_err(listening)?;
    let before = rustix::process::umask(Mode::empty());
    let bound = rustix::net::bind(&socket, &at);
    rustix::process::umask(before);
    match bound {
        Err(rustix::io::Errno::ADDRINUSE) => return Err(taken(address)),
        other => other.map_err(listening)?,
    }
    let found = std::fs::symlink_metadata(path).map_err(|error| failed("cannot listen", error))?;
    let kept = Name { path: path.to_owned(), meant: (found.dev(), found.ino()), kept: false };
    rustix::net::listen(&socket, BACKLOG).map_err(listening)?;
    Ok(Listening {
        socket,
        address: address.clone(),
        entry: Some((directory.into(), name.to_owned())),
        name: Some(kept),
    })
}

/// Others of us wait as long as this lives.
fn turn(address: &Address, parent: &Path) -> Result<File> {
    // An open file of its own: the daemon gets the other one.
    let directory = File::open(parent).map_err(|error| Error::io("cannot listen", address, error))?;
    let until = Instant::now() + PATIENCE;
    loop {
        match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) if Instant::now() < until => {
                std::thread::sleep(LOOK_EVERY);
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let what =
                    format!("cannot listen: {address}: another program has locked {}", parent.display());
                return Err(Error::new(ErrorKind::Conflict, what).hint("listen in a directory of your own"));
            }
            // A filesystem without locks has us take our chance.
            Ok(()) | Err(_) => return Ok(directory),
        }
    }
}

fn taken(address: &Address) -> Error {
    Error::new(ErrorKind::Conflict, format!("{address} is in use: another program listens there"))
        .hint("name another place; `cryptctl export list` shows the exports of yours")
}

/// Remove a socket on which nobody listens any more.
fn make_way(address: &Address, path: &Path) -> Result<()> {
    let found = match std::fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Error::io("cannot listen", address, error)),
    };
    if !found.file_type().is_socket() {
        return Err(Error::new(
            ErrorKind::Conflict,
            format!("{} exists and is not a socket", path.display()),
        )
        .hint("only a socket that nobody listens on any more is replaced"));
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(taken(address)),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path)
            .map_err(|error| Error::io("cannot replace the old socket", path.display(), error)),
        Err(error) => Err(Error::io("cannot tell whether somebody listens", address, error)),
    }
}

fn tcp(address: &Address, at: &str, encrypted: bool) -> Result<Listening> {
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::AddrInUse => taken(address),
        _ => Error::io("cannot listen", address, error),
    };
    let resolved: Vec<_> = at.to_socket_addrs().map_err(failed)?.collect();
    let reachable = |ip: &std::net::IpAddr| !ip.to_canonical().is_loopback();
    if !encrypted && let Some(open) = resolved.iter().find(|one| reachable(&one.ip())) {
        return Err(Error::usage(format!(
            "{address} is {}, which other machines may reach: --insecure is for loopback addresses only",
            open.ip()
        ))
        .hint("use TLS: --tls-cert, --tls-key and --tls-clients"));
    }
    let listener = TcpListener::bind(resolved.as_slice()).map_err(failed)?;
    let port = listener.local_addr().map_err(failed)?.port();
    let host = at.rsplit_once(':').map_or(at, |(host, _)| host);
    let address = Address::Tcp(format!("{host}:{port}"));
    Ok(Listening { socket: listener.into(), address, entry: None, name: None })
}

/// What clients are told to connect to: a URI as nbdinfo, nbdcopy and QEMU take it. `address` as in a listed export.
pub fn uri(address: &str, name: &str, encrypted: bool) -> String {
    let tls = if encrypted { "s" } else { "" };
    let name = escaped(name, b"");
    match address.split_once(':') {
        Some(("unix", path)) => format!("nbd{tls}+unix:///{name}?socket={}", escaped(path, b"/")),
        Some((_, at)) => format!("nbd{tls}://{at}/{name}"),
        None => address.to_owned(),
    }
}

/// As it stands in a URI: whatever could mean something there is written as its bytes' numbers.
fn escaped(text: &str, allowed: &[u8]) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || allowed.contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The umask is the process's: held by tests that look at modes, or bind many.
    static UMASK: std::sync::Mutex<()> = std::sync::Mutex::new(());

    fn refused(address: &Address, encrypted: bool) -> Error {
        listen(address, 0o600, encrypted).err().expect("refused")
    }

    #[test]
    fn addresses_are_understood_or_refused_with_what_is_expected() {
        assert_eq!(Address::parse("unix:/a:b"), Ok(Address::Unix("/a:b".into())));
        assert_eq!(Address::parse("tcp:[::1]:10809"), Ok(Address::Tcp("[::1]:10809".into())));
        for bad in ["", "unix:", "tcp:", "tcp:localhost", "tcp::10809", "tcp:x:70000", "/run/s", "vsock:2:1"]
        {
            assert!(Address::parse(bad).expect_err(bad).starts_with("expected "), "{bad}");
        }
        let long = Address::Unix(format!("/{}", "x".repeat(PATH_MAX)).into());
        assert!(long.whole().expect_err("too long").to_string().contains("at most 107 bytes"));
        let relative = Address::Unix("s".into()).whole().expect("made absolute");
        assert!(matches!(relative, Address::Unix(path) if path.is_absolute()));
    }

    #[test]
    fn a_socket_has_its_mode_from_the_start_and_goes_unless_it_is_kept() {
        let _umask = UMASK.lock().expect("no test has panicked with it");
        let dir = tempfile::tempdir().expect("dir");
        let address = Address::Unix(dir.path().join("s"));
        for (mode, kept) in [(0o600, false), (0o666, true)] {
            let listening = listen(&address, mode, false).unwrap_or_else(|error| panic!("{error}"));
            let found = std::fs::metadata(dir.path().join("s")).expect("bound");
            assert_eq!(found.mode() & 0o777, mode);
            UnixStream::connect(dir.path().join("s")).expect("somebody listens");
            assert!(refused(&address, false).to_string().contains("in use"));
            let (_, name) = listening.entry.expect("a place");
            assert_eq!(name, "s");
            let name = listening.name.expect("ours");
            if kept {
                name.keep();
            } else {
                drop(name);
            }
            assert_eq!(dir.path().join("s").exists(), kept);
        }
        // Nobody listens any more: it is replaced.
        let again = listen(&address, 0o600, false).unwrap_or_else(|error| panic!("{error}"));
        // And what took its place meanwhile is left alone.
        std::fs::remove_file(dir.path().join("s")).expect("removed");
        std::fs::write(dir.path().join("s"), "another's").expect("written");
        drop(again);
        assert!(dir.path().join("s").exists());
        let error = refused(&address, false);
        assert!(error.to_string().contains("exists and is not a socket"), "{error}");
        assert_eq!(error.failure.kind, ErrorKind::Conflict);
    }

    #[test]
    fn of_many_that_listen_in_one_place_one_does() {
        let _umask = UMASK.lock().expect("no test has panicked with it");
        let dir = tempfile::tempdir().expect("dir");
        let address = Address::Unix(dir.path().join("s"));
        for _ in 0..50 {
            // A socket that nobody listens on any more.
            drop(std::os::unix::net::UnixListener::bind(dir.path().join("s")).expect("free"));
            let all: Vec<_> = std::thread::scope(|scope| {
                let each = [(); 4].map(|()| scope.spawn(|| listen(&address, 0o600, false)));
                each.map(|one| one.join().expect("ran")).into_iter().collect()
            });
            assert_eq!(all.iter().filter(|one| one.is_ok()).count(), 1);
            UnixStream::connect(dir.path().join("s")).expect("it listens");
        }
    }

    #[test]
    fn a_directory_that_is_not_there_is_told() {
        let error = refused(&Address::Unix("/nonexistent/s".into()), false);
        assert!(error.to_string().contains("cannot listen: unix:/nonexistent/s: no such file"), "{error}");
    }

    #[test]
    fn without_tls_only_loopback_is_listened_on() {
        let error = refused(&Address::Tcp("0.0.0.0:0".into()), false);
        assert!(error.to_string().contains("loopback addresses only"), "{error}");
        let listening = listen(&Address::Tcp("127.0.0.1:0".into()), 0, false);
        let Address::Tcp(at) = &listening.as_ref().unwrap_or_else(|error| panic!("{error}")).address else {
            panic!("not TCP")
        };
        assert!(!at.ends_with(":0"), "the port that was chosen: {at}");
        assert!(refused(&Address::Tcp(at.clone()), false).to_string().contains("in use"));
    }

    #[test]
    fn uris_are_what_clients_take() {
        for (address, name, encrypted, expected) in [
            ("unix:/run/s", "", false, "nbd+unix:///?socket=/run/s"),
            ("unix:/a b/s?", "x/y é", false, "nbd+unix:///x%2Fy%20%C3%A9?socket=/a%20b/s%3F"),
            ("tcp:127.0.0.1:10809", "db", false, "nbd://127.0.0.1:10809/db"),
            ("tcp:[::1]:10809", "", true, "nbds://[::1]:10809/"),
        ] {
            assert_eq!(uri(address, name, encrypted), expected);
        }
    }
}
