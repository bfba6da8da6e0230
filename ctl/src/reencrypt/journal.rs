//! The journal of a raw volume's re-encryption: the file that knows how far it is, found or made.
//!
//! Created for its owner alone, never through a symbolic link, and locked as long as anybody writes it. One that was
//! created for a job that never wrote to it is removed again.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use proto::ErrorKind;
use rustix::fs::{FlockOperation, MemfdFlags, Mode, OFlags, flock, memfd_create, openat, statfs};
use rustix::io::Errno;

use crate::endpoint::{self, End};
use crate::partial::Partial;
use crate::report::{Error, Result};

/// Where it is, or will be. Nothing is created yet.
pub struct Journal {
    path: PathBuf,
    name: String,
    exists: bool,
}

/// The journal, open and locked.
pub enum Open {
    /// It was there.
    Found(OwnedFd),
    /// It was not.
    Created(Partial),
}

/// Filesystems whose files do not outlast a power cut (`statfs`, linux/magic.h): tmpfs, ramfs.
const IN_MEMORY: [u64; 2] = [0x0102_1994, 0x8584_58f6];

/// Find out what FILE is. `must_exist`: there is something to go on with. Also a warning.
pub fn inspect(path: &Path, volume: &End, must_exist: bool) -> Result<(Journal, Option<String>)> {
    let name = path.display().to_string();
    let usage = |what: &str| Error::usage(format!("--journal: {name} {what}"));
    if endpoint::is_dash(path) {
        return Err(usage("must be a file"));
    }
    let exists = match std::fs::symlink_metadata(path) {
        Ok(found) if found.is_symlink() => {
            return Err(usage("is a symbolic link, which is not followed").hint("name the file itself"));
        }
        Ok(found) if !found.is_file() => return Err(usage("must be a file")),
        Ok(found) if volume.is(&found) => return Err(usage("is VOLUME itself")),
        Ok(_) => true,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && !must_exist => false,
        Err(error) => {
            let error = Error::io("cannot open the journal", &name, error);
            return Err(error.hint("without its journal nobody knows which bytes are under which key"));
        }
    };
    let (directory, _) = endpoint::split(path)?;
    let filesystem = statfs(&directory)
        .map_err(|errno| Error::io("cannot open the directory", directory.display(), errno))?;
    let kind = u64::from_ne_bytes(filesystem.f_type.to_ne_bytes());
    let warning = IN_MEMORY.contains(&kind).then(|| {
        format!("{name} is kept in memory: after a power cut nobody knows which bytes are under which key")
    });
    Ok((Journal { path: path.to_owned(), name, exists }, warning))
}

impl Journal {
    /// As typed.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Open it, or make it.
    pub fn open(self) -> Result<Open> {
        let shown = self.path.display();
        let (directory, file) = endpoint::split(&self.path)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir_fd = rustix::fs::open(&directory, flags, Mode::empty())
            .map_err(|errno| Error::io("cannot open the directory", directory.display(), errno))?;
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NOCTTY | OFlags::CLOEXEC;
        let private = Mode::RUSR | Mode::WUSR;
        match openat(&dir_fd, &*file, flags | OFlags::CREATE | OFlags::EXCL, private) {
            Ok(fd) => {
                let partial = Partial::in_place(fd, dir_fd, file, self.path.clone());
                if let Err(error) =
                    lock(&partial.fd, &self.name).and_then(|()| settle(&partial.dir_fd, &self.name))
                {
                    partial.remove();
                    return Err(error);
                }
                Ok(Open::Created(partial))
            }
            Err(Errno::EXIST) => {
                let fd = openat(&dir_fd, &*file, flags, Mode::empty())
                    .map_err(|errno| Error::io("cannot open the journal", shown, errno))?;
                lock(&fd, &self.name)?;
                // Who made it may not have come to this.
                settle(&dir_fd, &self.name)?;
                Ok(Open::Found(fd))
            }
            Err(errno) => Err(Error::io("cannot create the journal", shown, errno)),
        }
    }

    /// For a dry run, which leaves no file behind: what there is, or an empty one in memory.
    pub fn open_for_show(self) -> Result<OwnedFd> {
        if !self.exists {
            return in_memory();
        }
        match self.open()? {
            Open::Found(fd) => Ok(fd),
            Open::Created(partial) => {
                // It went between two of our steps.
                partial.remove();
                Ok(partial.fd)
            }
        }
    }
}

/// An empty file without a name, for a dry run.
pub fn in_memory() -> Result<OwnedFd> {
    memfd_create("dry-run", MemfdFlags::CLOEXEC).map_err(|errno| Error::io("cannot rehearse", "memfd", errno))
}

/// Its name must outlast a power cut before the first byte of the volume changes.
fn settle(directory: &OwnedFd, name: &str) -> Result<()> {
    match rustix::fs::fsync(directory) {
        // A file system whose directories cannot be synchronized.
        Ok(()) | Err(Errno::INVAL) => Ok(()),
        Err(errno) => Err(Error::io("cannot make the name of the journal durable", name, errno)),
    }
}

fn lock(fd: &OwnedFd, name: &str) -> Result<()> {
    match flock(fd, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => Err(Error::new(
            ErrorKind::Conflict,
            format!("{name} is the journal of a re-encryption that is under way"),
        )
        .hint("`cryptctl job list` shows it if it is yours")),
        Err(errno) => Err(Error::io("cannot lock the journal", name, errno)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn volume(dir: &Path) -> End {
        std::fs::write(dir.join("vol"), "x").expect("write");
        endpoint::open_volume(&dir.join("vol"), "VOLUME", endpoint::Access::Replace).expect("opens")
    }

    fn refused(path: &Path, volume: &End, must_exist: bool) -> Error {
        inspect(path, volume, must_exist).err().expect("refused")
    }

    #[test]
    fn a_new_journal_is_its_owners_and_under_way_only_once() {
        let dir = tempfile::tempdir().expect("dir");
        let volume = volume(dir.path());
        let path = dir.path().join("j");
        let journal = || inspect(&path, &volume, false).expect("fine").0;
        let Ok(Open::Created(first)) = journal().open() else { panic!("not created") };
        let mode = std::fs::metadata(&path).expect("exists").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let error = journal().open().err().expect("in use");
        assert_eq!(error.failure.kind, ErrorKind::Conflict);
        drop(first);
        assert!(matches!(journal().open(), Ok(Open::Found(_))));
    }

    #[test]
    fn nothing_is_created_by_looking_nor_for_a_dry_run() {
        let dir = tempfile::tempdir().expect("dir");
        let volume = volume(dir.path());
        let path = dir.path().join("j");
        let (journal, _) = inspect(&path, &volume, false).expect("fine");
        assert!(!path.exists());
        let _fd = journal.open_for_show().expect("in memory");
        assert!(!path.exists());
    }

    #[test]
    fn links_devices_and_the_volume_are_no_journal() {
        let dir = tempfile::tempdir().expect("dir");
        let volume = volume(dir.path());
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("nowhere", &link).expect("symlink");
        for path in [&link, &dir.path().join("vol"), dir.path(), Path::new("/dev/null"), Path::new("-")] {
            assert_eq!(refused(path, &volume, false).failure.kind, ErrorKind::Invalid, "{}", path.display());
        }
        let error = refused(&dir.path().join("none"), &volume, true);
        assert_eq!(error.failure.kind, ErrorKind::NotFound);
        assert!(!dir.path().join("nowhere").exists());
    }
}
