//! A directory for one run of a bench: private, large enough, and gone at its end.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// A directory that goes with its owner.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// A new one in `parent`, named after the bench and its process, if there is `room` for so many bytes.
    ///
    /// # Errors
    /// There is not, or it cannot be made.
    pub fn new(parent: &Path, bench: &str, room: u64) -> io::Result<Self> {
        let stat = rustix::fs::statvfs(parent)?;
        let free = stat.f_bavail * stat.f_frsize;
        if free < room {
            let (need, free) = (room >> 20, free >> 20);
            let what = format!("{} has {free} MiB free of {need} MiB needed", parent.display());
            return Err(io::Error::other(what));
        }
        let path = std::path::absolute(parent)?.join(format!("{bench}-{}", std::process::id()));
        // Private, because keys and sockets live in it too.
        fs::DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self(path))
    }

    /// The directory itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// A place in it.
    #[must_use]
    pub fn at(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("{} stays behind: {error}", self.0.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_with_its_owner_and_is_not_made_without_room() {
        let parent = std::env::temp_dir();
        let scratch = Scratch::new(&parent, "scratch-test", 1).expect("room for a byte");
        fs::write(scratch.at("file"), "x").expect("writes");
        let path = scratch.path().to_owned();
        drop(scratch);
        assert!(!path.exists());
        let error = Scratch::new(&parent, "scratch-test", 1 << 60).expect_err("no room for that");
        assert!(error.to_string().contains("MiB needed"), "{error}");
        assert!(!path.exists());
    }
}
