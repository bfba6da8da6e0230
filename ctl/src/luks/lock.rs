//! cryptsetup's lock of a block device: so that two programs do not change one header at a time.
//!
//! The protocol, as cryptsetup has it: the file `/run/cryptsetup/L_MAJOR:MINOR`, in a directory that only root enters,
//! is locked (`flock`) exclusively by who writes a header and shared by who reads it; whoever lets go last removes the
//! file, so after locking it must be seen that the name still means the file that was locked. Regular files need none of
//! this: the daemon locks the file itself.
//!
//! The lock belongs to the open file description, which the daemon shares once it has the descriptor: it outlives us.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use proto::ErrorKind;
use rustix::fs::{
    AtFlags, CWD, FileType, FlockOperation, Mode, OFlags, flock, fstat, major, minor, mkdirat, openat,
    statat, unlinkat,
};
use rustix::io::Errno;

use crate::report::{Error, Result};

/// Where cryptsetup has its locks.
pub const DIRECTORY: &str = "/run/cryptsetup";
/// How long another program may take to change a header. cryptsetup derives no key under the lock; one of us holds it for its
/// whole request, derivation included, so who waits for one of us may give up too early and is told that it is in use.
pub const PATIENCE: Duration = Duration::from_secs(10);
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// A lock held.
pub struct Lock {
    dir: OwnedFd,
    name: String,
    fd: OwnedFd,
}

/// What there is to say when it was asked for.
pub enum Outcome {
    /// It is held.
    Held(Lock),
    /// This user may not have it: why.
    NotPermitted(String),
}

/// Lock the block device with number `rdev`, called `device` in messages. `waiting` is told once if it has to be waited for.
pub fn take(
    directory: &Path,
    rdev: u64,
    device: &str,
    write: bool,
    patience: Duration,
    waiting: &mut dyn FnMut(&str),
) -> Result<Outcome> {
    let shown = directory.display();
    let failed = |errno: Errno| Error::io("cannot lock the header", shown.to_string(), errno);
    let dir = match open_directory(directory) {
        Ok(dir) => dir,
        Err(errno @ (Errno::ACCESS | Errno::PERM | Errno::ROFS | Errno::NOENT)) => {
            return Ok(Outcome::NotPermitted(format!("{shown}: {}", proto::errno::describe(&errno.into()))));
        }
        Err(errno) => return Err(failed(errno)),
    };
    let name = format!("L_{}:{}", major(rdev), minor(rdev));
    let how =
        if write { FlockOperation::NonBlockingLockExclusive } else { FlockOperation::NonBlockingLockShared };
    let deadline = Instant::now() + patience;
    let mut told = false;
    loop {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = match openat(&dir, &*name, flags, Mode::RUSR | Mode::WUSR) {
            Ok(fd) => fd,
            Err(errno @ (Errno::ACCESS | Errno::PERM | Errno::ROFS)) => {
                return Ok(Outcome::NotPermitted(format!(
                    "{shown}/{name}: {}",
                    proto::errno::describe(&errno.into())
                )));
            }
            Err(errno) => return Err(failed(errno)),
        };
        match flock(&fd, how) {
            Ok(()) if still_names(&dir, &name, &fd).map_err(failed)? => {
                return Ok(Outcome::Held(Lock { dir, name, fd }));
            }
            // Its holder removed it between our two steps.
            Ok(()) => {
                if Instant::now() >= deadline {
                    return Err(busy(device, &format!("{shown}/{name}")));
                }
            }
            Err(Errno::WOULDBLOCK) => {
                if Instant::now() >= deadline {
                    return Err(busy(device, &format!("{shown}/{name}")));
                }
                if !std::mem::replace(&mut told, true) {
                    waiting(&format!("another program has locked the header of {device}; waiting for it"));
                }
                std::thread::sleep(LOOK_EVERY);
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(failed(errno)),
        }
    }
}

fn busy(device: &str, lock: &str) -> Error {
    Error::new(ErrorKind::Conflict, format!("the header of {device} is in use by another program"))
        .hint(format!("`fuser -v {lock}` tells by which"))
}

fn open_directory(directory: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match openat(CWD, directory, flags, Mode::empty()) {
        Err(Errno::NOENT) => match mkdirat(CWD, directory, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => openat(CWD, directory, flags, Mode::empty()),
            Err(errno) => Err(errno),
        },
        other => other,
    }
}

/// Does `name` still mean the file behind `fd`?
fn still_names(dir: &OwnedFd, name: &str, fd: &OwnedFd) -> Result<bool, Errno> {
    let ours = fstat(fd)?;
    match statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(there) => Ok((there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)),
        Err(Errno::NOENT) => Ok(false),
        Err(errno) => Err(errno),
    }
}

impl Lock {
    /// The locked file, for the daemon.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Let go, when the daemon is done. Whoever is the last removes the file.
    pub fn release(self) {
        let alone = flock(&self.fd, FlockOperation::NonBlockingLockExclusive).is_ok();
        let regular = fstat(&self.fd)
            .is_ok_and(|found| FileType::from_raw_mode(found.st_mode) == FileType::RegularFile);
        if alone && regular && still_names(&self.dir, &self.name, &self.fd).unwrap_or(false) {
            let _ = unlinkat(&self.dir, &*self.name, AtFlags::empty());
        }
        let _ = flock(&self.fd, FlockOperation::Unlock);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    const RDEV: u64 = 0x0803;
    const NO_PATIENCE: Duration = Duration::ZERO;

    fn path(dir: &Path) -> PathBuf {
        dir.join("locks")
    }

    fn held(dir: &Path, write: bool, patience: Duration) -> Result<Lock> {
        match take(&path(dir), RDEV, "/dev/x", write, patience, &mut |_| ())? {
            Outcome::Held(lock) => Ok(lock),
            Outcome::NotPermitted(why) => panic!("{why}"),
        }
    }

    #[test]
    fn readers_share_and_a_writer_is_alone() {
        let dir = tempfile::tempdir().expect("dir");
        let one = held(dir.path(), false, NO_PATIENCE).unwrap_or_else(|error| panic!("{error}"));
        let two = held(dir.path(), false, NO_PATIENCE).unwrap_or_else(|error| panic!("{error}"));
        let error = held(dir.path(), true, NO_PATIENCE).err().expect("readers are there");
        assert_eq!(error.failure.kind, ErrorKind::Conflict);
        assert!(error.to_string().contains("the header of /dev/x is in use by another program"), "{error}");
        one.release();
        two.release();
        let writer = held(dir.path(), true, NO_PATIENCE).unwrap_or_else(|error| panic!("{error}"));
        assert!(held(dir.path(), false, NO_PATIENCE).is_err());
        writer.release();
    }

    #[test]
    fn the_file_has_cryptsetups_name_and_the_last_one_removes_it() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().expect("dir");
        let file = path(dir.path()).join("L_8:3");
        let one = held(dir.path(), false, NO_PATIENCE).unwrap_or_else(|error| panic!("{error}"));
        let two = held(dir.path(), false, NO_PATIENCE).unwrap_or_else(|error| panic!("{error}"));
        let mode = std::fs::metadata(path(dir.path())).expect("made").permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        assert!(file.exists());
        one.release();
        assert!(file.exists(), "the other still has it");
        two.release();
        assert!(!file.exists());
    }

    #[test]
    fn who_waits_says_so_once_and_gets_it() {
        let dir = tempfile::tempdir().expect("dir");
        let first = held(dir.path(), true, NO_PATIENCE).unwrap_or_else(|error| panic!("{error}"));
        let at = path(dir.path());
        let waiter = std::thread::spawn(move || {
            let mut said = Vec::new();
            let patience = Duration::from_secs(60);
            let got =
                take(&at, RDEV, "/dev/x", true, patience, &mut |text| said.push(text.to_owned())).is_ok();
            (got, said)
        });
        std::thread::sleep(LOOK_EVERY * 4);
        first.release();
        let (got, said) = waiter.join().expect("waits");
        assert!(got);
        assert_eq!(said, ["another program has locked the header of /dev/x; waiting for it"]);
    }

    #[test]
    fn the_lock_is_the_descriptions_so_a_copy_keeps_it() {
        let dir = tempfile::tempdir().expect("dir");
        let lock = held(dir.path(), true, NO_PATIENCE).unwrap_or_else(|error| panic!("{error}"));
        let daemons = lock.as_fd().try_clone_to_owned().expect("copy");
        drop(lock);
        assert!(held(dir.path(), false, NO_PATIENCE).is_err(), "we died, the daemon works on");
        drop(daemons);
        assert!(held(dir.path(), false, NO_PATIENCE).is_ok());
    }

    #[test]
    fn a_directory_that_may_not_be_entered_is_not_an_error() {
        let dir = tempfile::tempdir().expect("dir");
        let none = dir.path().join("a").join("b");
        let outcome = take(&none, RDEV, "/dev/x", true, NO_PATIENCE, &mut |_| ());
        assert!(matches!(outcome, Ok(Outcome::NotPermitted(why)) if why.contains("ENOENT")));
        let file = dir.path().join("file");
        std::fs::write(&file, "").expect("write");
        assert!(take(&file, RDEV, "/dev/x", true, NO_PATIENCE, &mut |_| ()).is_err(), "not a directory");
    }
}
