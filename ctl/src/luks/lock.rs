//! cryptsetup's locks: so that two programs do not change one header, or re-encrypt one volume, at a time.
//!
//! The protocol, as cryptsetup has it: a file in `/run/cryptsetup`, a directory that only root enters, is locked (`flock`);
//! whoever lets go last removes it, so after locking it must be seen that the name still means the file that was locked.
//!
//! | file | of | locked |
//! |---|---|---|
//! | `L_MAJOR:MINOR` | the header on a block device | exclusively by who writes it, shared by who reads it |
//! | `LN_LUKS2-reencryption-UUID` | the re-encryption of a volume, on whatever it is | exclusively, without waiting |
//!
//! The header in a regular file needs neither: the daemon locks the file itself.
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

/// What is locked.
#[derive(Debug, Clone, Copy)]
pub enum Of<'a> {
    /// The header on the block device with number `rdev`, called `name` in messages.
    Header {
        /// As in `stat`.
        rdev: u64,
        /// As typed.
        name: &'a str,
        /// To change it; otherwise to read it, or to keep others from changing it.
        write: bool,
    },
    /// The re-encryption of the volume with this UUID, called `name` in messages.
    Reencryption {
        /// As in the header; see [`is_lockable`].
        uuid: &'a str,
        /// As typed.
        name: &'a str,
    },
}

/// Does a UUID from a header, which may hold anything, make a file name?
pub fn is_lockable(uuid: &str) -> bool {
    !uuid.is_empty()
        && uuid.len() < 40
        && uuid.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

impl Of<'_> {
    fn file(self) -> String {
        match self {
            Self::Header { rdev, .. } => format!("L_{}:{}", major(rdev), minor(rdev)),
            Self::Reencryption { uuid, .. } => format!("LN_LUKS2-reencryption-{uuid}"),
        }
    }

    fn is_exclusive(self) -> bool {
        match self {
            Self::Header { write, .. } => write,
            Self::Reencryption { .. } => true,
        }
    }

    fn busy(self, file: &str) -> Error {
        let message = match self {
            Self::Header { name, .. } => format!("the header of {name} is in use by another program"),
            Self::Reencryption { name, .. } => format!("{name} is being re-encrypted by another program"),
        };
        Error::new(ErrorKind::Conflict, message).hint(format!("`fuser -v {file}` tells by which"))
    }
}

/// Lock it. `waiting` is told once if it has to be waited for.
pub fn take(
    directory: &Path,
    of: Of<'_>,
    patience: Duration,
    waiting: &mut dyn FnMut(&str),
) -> Result<Outcome> {
    let shown = directory.display();
    let failed = |errno: Errno| Error::io("cannot lock the volume", shown.to_string(), errno);
    let dir = match open_directory(directory) {
        Ok(dir) => dir,
        Err(errno @ (Errno::ACCESS | Errno::PERM | Errno::ROFS | Errno::NOENT)) => {
            return Ok(Outcome::NotPermitted(format!("{shown}: {}", proto::errno::describe(&errno.into()))));
        }
        Err(errno) => return Err(failed(errno)),
    };
    let name = of.file();
    let how = if of.is_exclusive() {
        FlockOperation::NonBlockingLockExclusive
    } else {
        FlockOperation::NonBlockingLockShared
    };
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
                    return Err(of.busy(&format!("{shown}/{name}")));
                }
            }
            Err(Errno::WOULDBLOCK) => {
                if Instant::now() >= deadline {
                    return Err(of.busy(&format!("{shown}/{name}")));
                }
                let (Of::Header { name: volume, .. } | Of::Reencryption { name: volume, .. }) = of;
                if !std::mem::replace(&mut told, true) {
                    waiting(&format!("another program has locked the header of {volume}; waiting for it"));
                }
                std::thread::sleep(LOOK_EVERY);
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(failed(errno)),
        }
    }
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
        got(dir, Of::Header { rdev: RDEV, name: "/dev/x", write }, patience)
    }

    fn got(dir: &Path, of: Of<'_>, patience: Duration) -> Result<Lock> {
        match take(&path(dir), of, patience, &mut |_| ())? {
            Outcome::Held(lock) => Ok(lock),
            Outcome::NotPermitted(why) => panic!("{why}"),
        }
    }

    const WRITER: Of<'static> = Of::Header { rdev: RDEV, name: "/dev/x", write: true };

    #[test]
    fn a_reencryption_is_one_at_a_time_and_has_cryptsetups_name() {
        let dir = tempfile::tempdir().expect("dir");
        let uuid = "0f8fad5b-d9cb-469f-a165-70867728950e";
        let of = Of::Reencryption { uuid, name: "vol" };
        let lock = got(dir.path(), of, NO_PATIENCE).unwrap_or_else(|error| panic!("{error}"));
        let file = path(dir.path()).join(format!("LN_LUKS2-reencryption-{uuid}"));
        assert!(file.exists());
        let error = got(dir.path(), of, NO_PATIENCE).err().expect("one is under way");
        assert!(error.to_string().contains("vol is being re-encrypted by another program"), "{error}");
        // Its header is another matter.
        held(dir.path(), true, NO_PATIENCE).unwrap_or_else(|error| panic!("{error}")).release();
        lock.release();
        assert!(!file.exists());
    }

    #[test]
    fn a_uuid_from_a_disk_names_no_other_file() {
        assert!(is_lockable("0f8fad5b-d9cb-469f-a165-70867728950e"));
        for bad in ["", "../../etc/passwd", "a/b", "a\0", "0f8fad5b-d9cb-469f-a165-70867728950e-and-more"] {
            assert!(!is_lockable(bad), "{bad:?}");
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
            let got = take(&at, WRITER, patience, &mut |text| said.push(text.to_owned())).is_ok();
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
        let outcome = take(&none, WRITER, NO_PATIENCE, &mut |_| ());
        assert!(matches!(outcome, Ok(Outcome::NotPermitted(why)) if why.contains("ENOENT")));
        let file = dir.path().join("file");
        std::fs::write(&file, "").expect("write");
        assert!(take(&file, WRITER, NO_PATIENCE, &mut |_| ()).is_err(), "not a directory");
    }
}
