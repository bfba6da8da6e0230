//! `DST.partial`: where a new file grows until it is whole.
//!
//! The rules: it is created beside its final place, locked (`flock`) for as long as anybody writes it, renamed by the
//! daemon when durable, and removed on failure by the daemon or, if that has gone, by us. We remove nothing but the file
//! we created: the name must still mean the same inode. The lock belongs to the open file description, which the
//! daemon shares once it has the descriptor, so a detached job keeps it.
//!
//! A checkpoint is made, locked and found again in the same way, under the name it keeps.

use std::fs::Metadata;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use proto::ErrorKind;
use rustix::fs::{
    AtFlags, FileType, FlockOperation, Gid, Mode, OFlags, Uid, fchmod, fchown, flock, fstat, openat, statat,
    unlinkat,
};
use rustix::io::Errno;

use crate::endpoint::split;
use crate::report::{Error, Result};

/// A checkpoint may hold a header with a wrapped volume key.
const CHECKPOINT_MODE: u32 = 0o600;

/// Where a file will be, with what it replaces. Nothing exists of it yet.
pub struct Place {
    path: PathBuf,
    typed: String,
    dir_fd: OwnedFd,
    name: String,
    /// Its name until it is whole; of a checkpoint, the same.
    partial: String,
    /// It is there, and to be gone on with.
    again: bool,
    /// Mode and owner of the file it replaces.
    old: Option<(u32, u32, u32)>,
    force: bool,
    mode: u32,
}

/// A created, locked, empty `.partial`.
pub struct Partial {
    /// The file, open for reading and writing.
    pub fd: OwnedFd,
    /// Its directory.
    pub dir_fd: OwnedFd,
    /// Its name now.
    pub partial: String,
    /// Its name when done.
    pub name: String,
    /// An existing `name` may go whatever it holds. Otherwise only if it is still empty when we are done.
    pub replace: bool,
    /// We made it, so we may remove it.
    is_ours: bool,
    shown: PathBuf,
}

impl Place {
    /// `path` has no symbolic link in its last component; `typed` is what the user calls it. `old`: the file it replaces.
    /// `mode`: a new file's, before the umask.
    pub fn new(path: &Path, typed: &str, old: Option<&Metadata>, force: bool, mode: u32) -> Result<Self> {
        let (directory, name) = split(path)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir_fd = rustix::fs::open(&directory, flags, Mode::empty())
            .map_err(|errno| Error::io("cannot open the directory", directory.display(), errno))?;
        let old = old.map(|metadata| (metadata.mode() & 0o777, metadata.uid(), metadata.gid()));
        let partial = format!("{name}.partial");
        let (path, typed) = (path.to_owned(), typed.to_owned());
        Ok(Self { path, typed, dir_fd, name, partial, again: false, old, force, mode })
    }

    /// A checkpoint at `path`.
    pub fn checkpoint(path: &Path, force: bool) -> Result<Self> {
        let place = Self::new(path, &path.display().to_string(), None, force, CHECKPOINT_MODE)?;
        Ok(Self { partial: place.name.clone(), ..place })
    }

    /// Where the checkpoint of the file that grows here is, unless told otherwise.
    pub fn checkpoint_path(&self) -> PathBuf {
        self.path.with_file_name(checkpoint_of(&self.partial))
    }

    /// The file that is there already is to be gone on with. `force`: what it replaces may go whatever it holds.
    pub fn again(self, force: bool) -> Result<Self> {
        match statat(&self.dir_fd, &*self.partial, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(Self { again: true, force, ..self }),
            Err(Errno::NOENT) => {
                let shown = self.shown();
                let error = Error::new(
                    ErrorKind::NotFound,
                    format!("nothing to resume: there is no {}", shown.display()),
                );
                let is_whole = self.partial != self.name
                    && statat(&self.dir_fd, &*self.name, AtFlags::SYMLINK_NOFOLLOW).is_ok();
                Err(if is_whole {
                    error.hint(format!("{} is in its place: the copy may have ended", self.typed))
                } else {
                    error.hint("begin it without --resume")
                })
            }
            Err(errno) => Err(Error::io("cannot open", self.shown().display(), errno)),
        }
    }

    fn shown(&self) -> PathBuf {
        self.path.with_file_name(&self.partial)
    }

    fn is_checkpoint(&self) -> bool {
        self.partial == self.name
    }

    /// Do both mean the same directory entry?
    pub fn is(&self, other: &Self) -> bool {
        let entry = |place: &Self| fstat(&place.dir_fd).map(|dir| (dir.st_dev, dir.st_ino));
        self.name == other.name && entry(self).is_ok_and(|one| entry(other) == Ok(one))
    }

    /// Its name as typed, for messages.
    pub fn typed(&self) -> &str {
        &self.typed
    }

    /// Create and lock the `.partial`, or lock the one that is to be gone on with.
    pub fn create(self) -> Result<Partial> {
        let (partial, shown) = (self.partial.clone(), self.shown());
        if self.again {
            let fd = self.open_leftover(&partial, &shown)?;
            let fd = fd.ok_or_else(|| Error::io("cannot open", shown.display(), Errno::NOENT))?;
            lock(&fd, &shown)?;
            let Self { dir_fd, name, force: replace, .. } = self;
            return Ok(Partial { fd, dir_fd, partial, name, replace, is_ours: false, shown });
        }
        let failed = |errno: Errno| Error::io("cannot create", shown.display(), errno);
        // Somebody else may take the name between two of our steps; each round starts again from what is there now.
        for _ in 0..8 {
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            match openat(&self.dir_fd, &*partial, flags, Mode::from_raw_mode(self.mode)) {
                Ok(fd) => {
                    let created = Created { dir_fd: &self.dir_fd, name: &partial, fd: &fd, kept: false };
                    lock(&fd, &shown)?;
                    if !names(&self.dir_fd, &partial, &fd).map_err(failed)? {
                        continue;
                    }
                    self.inherit(&fd).map_err(failed)?;
                    created.keep();
                    let Self { dir_fd, name, force: replace, .. } = self;
                    return Ok(Partial { fd, dir_fd, partial, name, replace, is_ours: true, shown });
                }
                Err(Errno::EXIST) => self.clear_leftover(&partial, &shown)?,
                Err(errno) => return Err(failed(errno)),
            }
        }
        Err(Error::new(ErrorKind::Conflict, format!("{}: somebody keeps creating it", shown.display())))
    }

    /// The regular file of this name, if there is one.
    fn open_leftover(&self, name: &str, shown: &Path) -> Result<Option<OwnedFd>> {
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = match openat(&self.dir_fd, name, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(Error::io("cannot open", shown.display(), errno)),
        };
        let kind = fstat(&fd).map_err(|errno| Error::io("cannot open", shown.display(), errno))?;
        if FileType::from_raw_mode(kind.st_mode) != FileType::RegularFile {
            return Err(Error::new(ErrorKind::Conflict, format!("{} is in the way", shown.display())));
        }
        Ok(Some(fd))
    }

    /// Remove what an interrupted job left behind, if told to and nobody writes it.
    fn clear_leftover(&self, partial: &str, shown: &Path) -> Result<()> {
        let Some(fd) = self.open_leftover(partial, shown)? else { return Ok(()) };
        lock(&fd, shown)?;
        // Its name is the user's: it may be anything.
        if self.is_checkpoint() && !holds_checkpoint(&fd) {
            let what = format!("{} is there, and is no checkpoint", shown.display());
            return Err(Error::new(ErrorKind::Conflict, what).hint("name another file"));
        }
        if !self.force {
            let resumable = self.is_checkpoint()
                || statat(&self.dir_fd, checkpoint_of(partial), AtFlags::SYMLINK_NOFOLLOW).is_ok();
            let error = Error::new(
                ErrorKind::Conflict,
                format!("{} was left behind by an interrupted job", shown.display()),
            );
            return Err(if resumable {
                error.hint("--resume goes on with it, --force begins anew")
            } else {
                error.hint("remove it, or use --force")
            });
        }
        if !self.is_checkpoint() {
            self.clear_checkpoint(&checkpoint_of(partial));
        }
        // Unlinked and created anew rather than truncated: it may have other names, and another owner.
        match names(&self.dir_fd, partial, &fd) {
            Ok(true) => unlinkat(&self.dir_fd, partial, AtFlags::empty())
                .map_err(|errno| Error::io("cannot remove", shown.display(), errno)),
            Ok(false) => Ok(()),
            Err(errno) => Err(Error::io("cannot open", shown.display(), errno)),
        }
    }

    /// A checkpoint of what goes is of nothing any more. One that is used, or none at all, is left alone.
    fn clear_checkpoint(&self, name: &str) {
        let shown = self.path.with_file_name(name);
        if let Ok(Some(fd)) = self.open_leftover(name, &shown)
            && lock(&fd, &shown).is_ok()
            && holds_checkpoint(&fd)
        {
            remove(&self.dir_fd, name, &fd);
        }
    }

    /// A file that replaces another has its mode, and its owner as far as we may give it.
    fn inherit(&self, fd: impl AsFd) -> Result<(), Errno> {
        let Some((mode, uid, gid)) = self.old else { return Ok(()) };
        // Only root can give files away; for others the new file is their own, as after cp.
        let _ = fchown(&fd, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
        fchmod(&fd, Mode::from_raw_mode(mode))
    }
}

/// A file just created, removed again if what follows fails.
struct Created<'a> {
    dir_fd: &'a OwnedFd,
    name: &'a str,
    fd: &'a OwnedFd,
    kept: bool,
}

impl Created<'_> {
    fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Created<'_> {
    fn drop(&mut self) {
        if !self.kept {
            remove(self.dir_fd, self.name, self.fd);
        }
    }
}

impl Partial {
    /// A file that was just created under its own name, and is locked.
    pub fn in_place(fd: OwnedFd, dir_fd: OwnedFd, name: String, shown: PathBuf) -> Self {
        Self { fd, dir_fd, partial: name.clone(), name, replace: false, shown, is_ours: true }
    }

    /// Did the file take its final name?
    pub fn is_in_place(&self) -> bool {
        names(&self.dir_fd, &self.name, &self.fd).unwrap_or(false)
    }

    /// Is the file still there under its partial name?
    pub fn is_there(&self) -> bool {
        names(&self.dir_fd, &self.partial, &self.fd).unwrap_or(false)
    }

    /// Remove the file if it is still there and we made it. Says whether it was.
    pub fn remove(&self) -> bool {
        self.is_ours && remove(&self.dir_fd, &self.partial, &self.fd)
    }

    /// Was nothing written to it yet?
    pub fn is_empty(&self) -> bool {
        fstat(&self.fd).is_ok_and(|found| found.st_size == 0)
    }

    /// Its path now, for messages.
    pub fn shown(&self) -> &Path {
        &self.shown
    }
}

/// The name of the checkpoint of a partial file.
fn checkpoint_of(partial: &str) -> String {
    format!("{partial}.checkpoint")
}

/// Is this a checkpoint, or one that was about to be written?
fn holds_checkpoint(fd: &OwnedFd) -> bool {
    let begins = |offset| {
        let mut first = [0; proto::CHECKPOINT_MAGIC.len()];
        match rustix::io::pread(fd, &mut first, offset) {
            Ok(count) => count < first.len() || first == proto::CHECKPOINT_MAGIC || first == [0; 8],
            Err(_) => false,
        }
    };
    begins(0) && begins(4096)
}

fn lock(fd: &OwnedFd, shown: &Path) -> Result<()> {
    match flock(fd, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => {
            Err(Error::new(ErrorKind::Conflict, format!("another job is writing {}", shown.display()))
                .hint("`cryptctl job list` shows it if it is yours"))
        }
        Err(errno) => Err(Error::io("cannot lock", shown.display(), errno)),
    }
}

/// Remove `name` if it means the file behind `fd`. Says whether it did.
fn remove(dir_fd: &OwnedFd, name: &str, fd: &OwnedFd) -> bool {
    names(dir_fd, name, fd).unwrap_or(false) && unlinkat(dir_fd, name, AtFlags::empty()).is_ok()
}

/// Does `name` mean the file behind `fd`?
fn names(dir_fd: &OwnedFd, name: &str, fd: &OwnedFd) -> Result<bool, Errno> {
    let ours = fstat(fd)?;
    match statat(dir_fd, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(there) => Ok((there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)),
        Err(Errno::NOENT) => Ok(false),
        Err(errno) => Err(errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    fn place(path: &Path, force: bool, mode: u32) -> Place {
        let old = fs::metadata(path).ok();
        Place::new(path, "out", old.as_ref(), force, mode).expect("place")
    }

    fn refused(result: Result<Partial>) -> Error {
        match result {
            Ok(_) => panic!("accepted"),
            Err(error) => error,
        }
    }

    #[test]
    fn a_new_file_grows_beside_its_place_with_the_mode_asked_for() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("out");
        let partial = place(&path, false, 0o600).create().expect("create");
        let mode = fs::metadata(dir.path().join("out.partial")).expect("exists").mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(!path.exists() && !partial.replace && !partial.is_in_place());
        fs::rename(dir.path().join("out.partial"), &path).expect("rename");
        assert!(partial.is_in_place());
        assert!(!partial.remove(), "what has its final name is not removed");
        assert!(path.exists());
    }

    #[test]
    fn a_replaced_file_passes_on_its_mode() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("out");
        fs::write(&path, "old").expect("write");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).expect("chmod");
        let partial = place(&path, true, 0o666).create().expect("create");
        assert_eq!(fs::metadata(partial.shown()).expect("exists").mode() & 0o777, 0o640);
        assert!(partial.replace);
        assert_eq!(fs::read_to_string(&path).expect("read"), "old");
    }

    #[test]
    fn an_empty_file_is_replaced_only_while_it_is_empty() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("out");
        fs::write(&path, "").expect("write");
        let partial = place(&path, false, 0o666).create().expect("create");
        assert!(!partial.replace, "the daemon looks again before it replaces");
    }

    #[test]
    fn what_was_created_in_vain_is_removed_and_only_that() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("new");
        let file = OwnedFd::from(fs::File::create(&path).expect("create"));
        let dir_fd = OwnedFd::from(fs::File::open(dir.path()).expect("open"));
        let created = || Created { dir_fd: &dir_fd, name: "new", fd: &file, kept: false };
        created().keep();
        assert!(path.exists());
        fs::rename(&path, dir.path().join("moved")).expect("rename");
        fs::write(&path, "somebody else's").expect("write");
        drop(created());
        assert!(path.exists());
        fs::rename(dir.path().join("moved"), &path).expect("rename");
        drop(created());
        assert!(!path.exists());
    }

    #[test]
    fn a_partial_being_written_is_a_conflict_even_with_force() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("out");
        let first = place(&path, false, 0o666).create().expect("create");
        for force in [false, true] {
            let error = refused(place(&path, force, 0o666).create());
            assert!(error.to_string().contains("another job is writing"), "{error}");
            assert_eq!(error.failure.kind, ErrorKind::Conflict);
        }
        assert!(first.remove());
    }

    #[test]
    fn a_leftover_is_refused_and_with_force_replaced_not_reused() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("out");
        let (left, other) = (dir.path().join("out.partial"), dir.path().join("other"));
        fs::write(&left, "half").expect("write");
        fs::hard_link(&left, &other).expect("link");
        let error = refused(place(&path, false, 0o666).create());
        assert!(error.to_string().contains("left behind by an interrupted job"), "{error}");
        let partial = place(&path, true, 0o600).create().expect("create");
        assert_eq!(fs::metadata(&left).expect("exists").len(), 0);
        assert_eq!(fs::read_to_string(&other).expect("read"), "half");
        assert!(partial.remove());
        assert!(!left.exists());
    }

    #[test]
    fn only_our_own_file_is_removed() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("out");
        let partial = place(&path, false, 0o666).create().expect("create");
        fs::remove_file(partial.shown()).expect("remove");
        fs::write(partial.shown(), "somebody else's").expect("write");
        assert!(!partial.remove());
        assert!(partial.shown().exists());
    }

    #[test]
    fn a_link_or_a_directory_in_the_way_is_not_followed() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("out");
        let target = dir.path().join("target");
        fs::write(&target, "precious").expect("write");
        std::os::unix::fs::symlink(&target, dir.path().join("out.partial")).expect("symlink");
        assert!(place(&path, true, 0o666).create().is_err());
        assert_eq!(fs::read_to_string(&target).expect("read"), "precious");
        fs::remove_file(dir.path().join("out.partial")).expect("remove");
        fs::create_dir(dir.path().join("out.partial")).expect("mkdir");
        assert!(place(&path, true, 0o666).create().is_err());
    }
}
