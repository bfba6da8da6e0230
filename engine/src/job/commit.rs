//! How a new sink file becomes visible, and how it vanishes when the job does not succeed.
//!
//! The file exists under its `.partial` name from the start and takes its own name only when it is whole and durable, so
//! no crash at any instant leaves a half file that looks whole. Names are resolved against the caller's
//! directory descriptor, with the caller's rights (the daemon's are never lent), and only after checking
//! that the partial name still means the file that was written.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{
    Access, AtFlags, FileType, OFlags, RenameFlags, accessat, fcntl_getfl, fstat, fsync, renameat_with,
    statat, unlinkat,
};
use rustix::io::Errno;

use crate::error::{Error, ErrorKind, Result};
use crate::job::Owner;
use crate::sys::fsuid::as_user;

/// A sink file's two names, in one directory.
pub struct Names {
    directory: OwnedFd,
    partial: String,
    name: String,
    replace: bool,
    keep_partial: bool,
    owner: Owner,
}

impl fmt::Debug for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {}", self.partial, self.name)
    }
}

fn check_name(name: &str) -> Result<()> {
    let bad = name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']);
    if bad { Err(Error::new(ErrorKind::Invalid, "not a file name").at(format!("{name:?}"))) } else { Ok(()) }
}

impl Names {
    /// Check the request: real names, a directory, and `file` is what `partial` names in it.
    ///
    /// # Errors
    /// `Invalid` for bad names or descriptors, `Conflict` if the partial name means another file or the name is taken.
    pub fn new(directory: OwnedFd, commit: &proto::Commit, file: impl AsFd, owner: &Owner) -> Result<Self> {
        let names = Self::to_undo(directory, commit, owner)?;
        check_name(&names.name)?;
        if names.partial == names.name {
            return Err(Error::new(ErrorKind::Invalid, "the partial name and the final name are the same"));
        }
        names.check_directory()?;
        names.check_same(&file)?;
        names.check_free()?;
        Ok(names)
    }

    /// Only to [`Self::undo`], also where the names could not be committed.
    ///
    /// # Errors
    /// `Invalid` for a bad partial name.
    pub fn to_undo(directory: OwnedFd, commit: &proto::Commit, owner: &Owner) -> Result<Self> {
        check_name(&commit.partial)?;
        Ok(Self {
            directory,
            partial: commit.partial.clone(),
            name: commit.name.clone(),
            replace: commit.replace,
            keep_partial: commit.keep_partial,
            owner: owner.clone(),
        })
    }

    /// One name that is there, only to [`Self::undo`] or to [`Self::sync`].
    ///
    /// # Errors
    /// `Invalid` for a bad name.
    pub fn of_one(directory: OwnedFd, name: &str, owner: &Owner) -> Result<Self> {
        check_name(name)?;
        Ok(Self {
            directory,
            partial: name.to_owned(),
            name: name.to_owned(),
            replace: false,
            keep_partial: false,
            owner: owner.clone(),
        })
    }

    /// Make the directory's names durable.
    ///
    /// # Errors
    /// The flush failed.
    pub fn sync(&self) -> Result<()> {
        self.with_rights("cannot make the sink's name durable", || match fsync(&self.directory) {
            // Some filesystems have no directories to flush.
            Err(Errno::INVAL | Errno::ROFS) => Ok(()),
            other => Ok(other?),
        })
    }

    fn with_rights<T: Send>(&self, what: &str, act: impl FnOnce() -> std::io::Result<T> + Send) -> Result<T> {
        as_user(self.owner.uid, self.owner.gid, &self.owner.groups, act)?
            .map_err(|cause| Error::io(what, cause).at(&self.name))
    }

    /// A directory in which the owner may make and remove names: found out now, not after the last byte.
    fn check_directory(&self) -> Result<()> {
        let failed = |errno: Errno| Error::io("cannot examine the sink's directory", errno).at(&self.name);
        let stat = fstat(&self.directory).map_err(failed)?;
        let flags = fcntl_getfl(&self.directory).map_err(failed)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory || flags.contains(OFlags::PATH) {
            let what = "the sink's directory must be a directory opened for reading";
            return Err(Error::new(ErrorKind::Invalid, what).at(&self.name));
        }
        self.with_rights("cannot write to the sink's directory", || {
            Ok(accessat(&self.directory, ".", Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS)?)
        })
    }

    /// The final name is free, or means an empty file (made by `mktemp`, say), or may be replaced whatever it means.
    fn check_free(&self) -> Result<()> {
        if self.replace {
            return Ok(());
        }
        let taken = self.with_rights("cannot look up the sink", || {
            match statat(&self.directory, &*self.name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => {
                    Ok(FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || stat.st_size != 0)
                }
                Err(Errno::NOENT) => Ok(false),
                Err(errno) => Err(errno.into()),
            }
        })?;
        if taken {
            let error = Error::new(ErrorKind::Conflict, "the sink exists and is not empty").at(&self.name);
            return Err(error.hint("--force replaces it"));
        }
        Ok(())
    }

    fn check_same(&self, file: impl AsFd) -> Result<()> {
        let open = fstat(file).map_err(|cause| Error::io("cannot look at the sink", cause))?;
        let named = self.with_rights("cannot look up the partial sink", || {
            Ok(statat(&self.directory, &*self.partial, AtFlags::SYMLINK_NOFOLLOW)?)
        })?;
        if (open.st_dev, open.st_ino) == (named.st_dev, named.st_ino) {
            Ok(())
        } else {
            Err(Error::new(ErrorKind::Conflict, "the partial name means another file").at(&self.partial))
        }
    }

    /// Give the file its name, durably. The caller has made its content durable before:
    ///
    /// 1. all data is written (the transfer has ended);
    /// 2. the file has its final length;
    /// 3. `fsync(file)`: data and inode are durable under the partial name;
    /// 4. here: rename. A crash before this leaves a whole `.partial`, after it either name;
    /// 5. here: `fsync(directory)`: the name is durable, and only now the job is done.
    ///
    /// # Errors
    /// The rename or the flush failed; the file still has its partial name unless the flush was what failed.
    pub fn commit(&self, file: impl AsFd) -> Result<()> {
        self.check_same(file)?;
        let rename =
            |flags| renameat_with(&self.directory, &*self.partial, &self.directory, &*self.name, flags);
        let taken = !self.replace
            && self.with_rights("cannot give the sink its name", || {
                match rename(RenameFlags::NOREPLACE) {
                    Ok(()) => Ok(false),
                    // EINVAL: a filesystem without the flag (FUSE, NFS).
                    Err(Errno::EXIST | Errno::INVAL) => Ok(true),
                    Err(errno) => Err(errno.into()),
                }
            })?;
        if self.replace || taken {
            // The name may have been taken, or filled, since the job began.
            self.check_free()?;
            self.with_rights("cannot give the sink its name", || Ok(rename(RenameFlags::empty())?))?;
        }
        self.sync()
    }

    /// Remove the partial file, unless it was to be kept. Returns what is left behind, if anything.
    pub fn undo(&self, file: impl AsFd) -> Option<String> {
        if self.keep_partial {
            return Some(self.partial.clone());
        }
        let removed = self.check_same(file).and_then(|()| {
            self.with_rights("cannot remove the partial sink", || {
                Ok(unlinkat(&self.directory, &*self.partial, AtFlags::empty())?)
            })
        });
        match removed {
            Ok(()) => None,
            Err(error) => {
                tracing::warn!("{}", error.chain());
                Some(self.partial.clone())
            }
        }
    }
}
