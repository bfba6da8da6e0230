//! The listening socket: where it may be, who may have it, and how it goes.
//!
//! One daemon per socket path. A lock file beside the socket (`flock`, never deleted, released by the kernel with its holder)
//! decides start races; whoever holds it owns the path, so whatever is found there is stale and replaced. The socket is
//! made under another name and renamed when it already listens: a client that finds it can always connect. It leaves the
//! same way: renamed first, then the queue of unaccepted connections is looked at once more, so that nobody who found the
//! door open is left standing in it.
//!
//! A socket passed by systemd is used as it is: no lock, no checks, never removed.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::fs::{FileType, FlockOperation, Gid, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::config::SocketConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::limits;

/// The right to serve a path: the lock is held, the directory is trusted, nothing listens yet.
#[derive(Debug)]
pub struct Reserved {
    config: SocketConfig,
    lock: OwnedFd,
}

/// A listening socket.
#[derive(Debug)]
pub struct Listener {
    fd: OwnedFd,
    bound: Option<Bound>,
}

/// A socket we made, and the lock that lets us remove it.
#[derive(Debug)]
struct Bound {
    path: PathBuf,
    _lock: OwnedFd,
}

/// Take the lock of a socket's path. `None`: another daemon serves it already, which is as good.
///
/// # Errors
/// The directory cannot be trusted or used; or the lock's holder neither serves nor leaves.
pub fn reserve(config: &SocketConfig, uid: u32) -> Result<Option<Reserved>> {
    let dir = config.path.parent().expect("an absolute path with a file name");
    if config.private_dir {
        make_private(dir, uid)?;
    } else {
        check_shared(dir, uid)?;
    }
    let lock_path = beside(&config.path, ".lock");
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let lock = rustix::fs::open(&lock_path, flags, Mode::RUSR | Mode::WUSR)
        .map_err(|error| Error::io("cannot open lock file", error).at(lock_path.display()))?;
    let deadline = Instant::now() + limits::START_RACE_TIME;
    loop {
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(Some(Reserved { config: config.clone(), lock })),
            Err(Errno::WOULDBLOCK) => {}
            Err(error) => return Err(Error::io("cannot lock", error).at(lock_path.display())),
        }
        // The holder is serving, about to serve, or about to leave: only the first ends the race.
        if connect(&config.path).is_ok() {
            return Ok(None);
        }
        if Instant::now() >= deadline {
            return Err(Error::new(ErrorKind::Conflict, "another cryptd holds the lock but does not answer")
                .at(lock_path.display()));
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

impl Reserved {
    /// Make the socket and listen. From here on clients get in.
    ///
    /// # Errors
    /// Something that is not a socket is in the way, or the system refuses.
    pub fn listen(self) -> Result<Listener> {
        let path = &self.config.path;
        let failed = |what: &'static str| {
            let at = path.display().to_string();
            move |error: Errno| Error::io(what, error).at(at)
        };
        match rustix::fs::lstat(path) {
            Ok(stat) if FileType::from_raw_mode(stat.st_mode) != FileType::Socket => {
                return Err(Error::new(ErrorKind::Conflict, "something that is not a socket is in the way")
                    .at(path.display()));
            }
            Ok(_) => tracing::info!(path = %path.display(), "replacing a stale socket"),
            Err(Errno::NOENT) => {}
            Err(error) => return Err(failed("cannot inspect socket")(error)),
        }
        let new = beside(path, ".new");
        remove(&new).map_err(failed("cannot remove an unfinished socket"))?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(failed("cannot make a socket"))?;
        let address = SocketAddrUnix::new(&new).map_err(failed("socket path too long"))?;
        rustix::net::bind(&fd, &address).map_err(failed("cannot bind"))?;
        let finish = || -> Result<(), Errno> {
            if let Some(group) = self.config.group {
                rustix::fs::chown(&new, None, Some(Gid::from_raw(group)))?;
            }
            rustix::fs::chmod(&new, Mode::from_raw_mode(self.config.mode))?;
            rustix::net::listen(&fd, limits::BACKLOG)?;
            rustix::fs::rename(&new, path)
        };
        if let Err(error) = finish() {
            let _ = remove(&new);
            return Err(failed("cannot publish the socket")(error));
        }
        Ok(Listener { fd, bound: Some(Bound { path: self.config.path, _lock: self.lock }) })
    }
}

impl Listener {
    /// The socket systemd passed, if it passed one to this process.
    ///
    /// # Errors
    /// It passed more than one, or something that is not a listening Unix stream socket.
    pub fn passed() -> Result<Option<Self>> {
        let mut passed = listenfd::ListenFd::from_env();
        match passed.len() {
            0 => return Ok(None),
            1 => {}
            count => {
                return Err(Error::new(
                    ErrorKind::Invalid,
                    format!("{count} sockets passed by systemd, expected one"),
                ));
            }
        }
        let listener = passed
            .take_unix_listener(0)
            .map_err(|error| Error::io("socket passed by systemd is of the wrong kind", error))?
            .ok_or_else(|| Error::new(ErrorKind::Invalid, "socket passed by systemd is missing"))?;
        listener
            .set_nonblocking(true)
            .map_err(|error| Error::io("cannot use the socket passed by systemd", error))?;
        Ok(Some(Self { fd: listener.into(), bound: None }))
    }

    /// The path, if we made it.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.bound.as_ref().map(|bound| bound.path.as_path())
    }

    /// The next connection, nonblocking; `None` when nobody waits.
    ///
    /// # Errors
    /// Out of descriptors or memory.
    pub fn accept(&self) -> Result<Option<OwnedFd>, Errno> {
        loop {
            match rustix::net::accept_with(&self.fd, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                Ok(fd) => return Ok(Some(fd)),
                Err(Errno::AGAIN) => return Ok(None),
                // It left again before we looked.
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Leave. `Some`: a client was waiting; it must be served, the socket is back in its place.
    pub fn leave(&mut self) -> Option<OwnedFd> {
        // Passed by systemd: whoever waits in it is the next activation's.
        let bound = self.bound.as_ref()?;
        let leaving = beside(&bound.path, ".leaving");
        // 1. Nobody new finds the socket.
        let renamed = rustix::fs::rename(&bound.path, &leaving).is_ok();
        // 2. Whoever found it before is in the queue now, for connect() puts them there at once.
        if let Ok(Some(waiting)) = self.accept() {
            if renamed && rustix::fs::rename(&leaving, &bound.path).is_ok() {
                return Some(waiting);
            }
            tracing::error!(path = %bound.path.display(), "the socket is gone; leaving");
        }
        // 3. Still under the lock: the next daemon starts with a clean directory.
        let _ = remove(&leaving);
        self.bound = None;
        None
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(bound) = &self.bound {
            let _ = remove(&bound.path);
        }
    }
}

fn connect(path: &Path) -> Result<(), Errno> {
    let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    rustix::net::connect(&fd, &SocketAddrUnix::new(path)?)
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn remove(path: &Path) -> Result<(), Errno> {
    match rustix::fs::unlink(path) {
        Err(Errno::NOENT) => Ok(()),
        other => other,
    }
}

fn untrusted(dir: &Path, why: impl Into<String>) -> Error {
    Error::new(ErrorKind::Denied, why).at(dir.display())
}

/// Made if absent; ours alone, or refused. Anybody could have made it before us in `/tmp`.
fn make_private(dir: &Path, uid: u32) -> Result<()> {
    match rustix::fs::mkdir(dir, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(Error::io("cannot make socket directory", error).at(dir.display())),
    }
    let stat = inspect(dir)?;
    if stat.st_uid != uid {
        return Err(untrusted(dir, format!("socket directory belongs to user {}, not {uid}", stat.st_uid)));
    }
    if stat.st_mode & 0o077 != 0 {
        let mode = stat.st_mode & 0o7777;
        return Err(untrusted(dir, format!("socket directory has mode {mode:04o}, expected 0700")));
    }
    Ok(())
}

/// A named path's directory may be open to others, but nobody else may replace what is in it.
fn check_shared(dir: &Path, uid: u32) -> Result<()> {
    let stat = inspect(dir)?;
    if stat.st_uid != uid && stat.st_uid != 0 {
        return Err(untrusted(dir, format!("socket directory belongs to user {}", stat.st_uid)));
    }
    let sticky = stat.st_mode & 0o1000 != 0;
    if stat.st_mode & 0o022 != 0 && !sticky {
        let mode = stat.st_mode & 0o7777;
        return Err(untrusted(
            dir,
            format!("socket directory has mode {mode:04o}: others may replace the socket"),
        ));
    }
    Ok(())
}

fn inspect(dir: &Path) -> Result<rustix::fs::Stat> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = match rustix::fs::open(dir, flags, Mode::empty()) {
        Ok(fd) => fd,
        Err(Errno::LOOP | Errno::NOTDIR) => {
            return Err(untrusted(dir, "socket directory is a symbolic link or no directory"));
        }
        Err(error) => return Err(Error::io("cannot use socket directory", error).at(dir.display())),
    };
    rustix::fs::fstat(&fd)
        .map_err(|error| Error::io("cannot inspect socket directory", error).at(dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("cryptd-listener-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        rustix::fs::mkdir(&dir, Mode::RWXU).expect("scratch directory");
        dir
    }

    fn config(dir: &Path) -> SocketConfig {
        SocketConfig { path: dir.join("s"), private_dir: false, mode: 0o600, group: None }
    }

    fn uid() -> u32 {
        rustix::process::geteuid().as_raw()
    }

    #[test]
    fn whoever_waits_when_the_daemon_leaves_is_served() {
        let dir = scratch("leave");
        let mut listener =
            reserve(&config(&dir), uid()).expect("trusted").expect("free").listen().expect("listens");
        connect(&dir.join("s")).expect("queued");
        assert!(listener.leave().is_some());
        connect(&dir.join("s")).expect("the socket is back");
        assert!(listener.leave().is_some());
        assert!(listener.leave().is_none());
        assert_eq!(connect(&dir.join("s")), Err(Errno::NOENT));
        std::fs::remove_dir_all(dir).expect("removed");
    }

    #[test]
    fn a_private_directory_must_be_private_and_real() {
        let dir = scratch("private");
        assert!(make_private(&dir, uid()).is_ok());
        assert!(make_private(&dir, uid() + 1).is_err());
        std::os::unix::fs::symlink(&dir, dir.join("link")).expect("link");
        assert!(make_private(&dir.join("link"), uid()).is_err());
        std::fs::write(dir.join("file"), "").expect("file");
        assert!(make_private(&dir.join("file"), uid()).is_err());
        rustix::fs::chmod(&dir, Mode::from_raw_mode(0o710)).expect("chmod");
        assert!(make_private(&dir, uid()).is_err());
        std::fs::remove_dir_all(dir).expect("removed");
    }

    #[test]
    fn a_shared_directory_must_not_let_others_replace_the_socket() {
        let dir = scratch("shared");
        for (mode, trusted) in [(0o700, true), (0o755, true), (0o1777, true), (0o777, false), (0o770, false)]
        {
            rustix::fs::chmod(&dir, Mode::from_raw_mode(mode)).expect("chmod");
            assert_eq!(check_shared(&dir, uid()).is_ok(), trusted, "{mode:o}");
        }
        std::fs::remove_dir_all(dir).expect("removed");
    }

    #[test]
    fn what_is_not_a_socket_is_never_replaced() {
        let dir = scratch("file");
        std::fs::write(dir.join("s"), "precious").expect("file");
        let refused = reserve(&config(&dir), uid()).expect("trusted").expect("free").listen();
        assert!(refused.expect_err("in the way").chain().contains("not a socket"));
        assert_eq!(std::fs::read(dir.join("s")).expect("kept"), b"precious");
        std::fs::remove_dir_all(dir).expect("removed");
    }
}
