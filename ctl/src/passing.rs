//! Descriptors on their way to the daemon, and the new files that must not be left behind if it never gets them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use proto::Commit;

use crate::endpoint::{End, Handle, Sink};
use crate::partial::{Partial, Place};
use crate::remote::{CONNECTIONS, Remote};
use crate::report::{Error, Result};
use crate::secret::Secret;

/// What a request carries, in the order of its indices. Dropped before [`Passing::finish`], it removes what it created.
#[derive(Default)]
pub struct Passing {
    descriptors: Vec<OwnedFd>,
    partials: Vec<PartialFile>,
    remotes: Vec<proto::remote::Remote>,
    /// There is a checkpoint: what was done stays, to be gone on with.
    is_resumable: bool,
}

/// A sink's place in a request.
pub struct Passed {
    /// Descriptor index.
    pub fd: u32,
    /// As typed.
    pub name: String,
    /// Written in order.
    pub stream: bool,
    /// For a new file.
    pub commit: Option<Commit>,
}

/// A new file, for as long as this command answers for it.
pub struct PartialFile {
    file: Partial,
    fate: Fate,
}

/// What becomes of a new file when its job ends without success.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// It goes.
    Removed,
    /// It stays.
    Kept,
    /// It stays, and the same command goes on by it.
    Checkpoint,
    /// It goes, unless it is in place: there it is durable, and needed to go on. The header of a volume being encrypted.
    Header,
    /// It goes if nothing was ever written to it, however the job ends: a journal.
    RemovedIfEmpty,
}

impl Passing {
    /// The index of one more descriptor.
    pub fn fd(&mut self, fd: OwnedFd) -> u32 {
        self.descriptors.push(fd);
        u32::try_from(self.descriptors.len() - 1).expect("a few")
    }

    /// The index of a secret's pipe.
    pub fn secret(&mut self, secret: Secret) -> Result<u32> {
        Ok(self.fd(secret.into_fd()?))
    }

    /// An open file, or a volume that is connected to now.
    pub fn file(&mut self, end: End) -> Result<proto::luks::File> {
        Ok(proto::luks::File { fd: self.end(end.handle, &end.name)?, name: end.name })
    }

    /// The index of one end. `name`: for messages.
    pub fn end(&mut self, handle: Handle, name: &str) -> Result<u32> {
        match handle {
            Handle::File(fd) => Ok(self.fd(fd)),
            Handle::Remote(remote) => self.remote(&remote, name),
        }
    }

    /// Connect to a volume. What is said of it goes into the request by [`Passing::remotes`].
    pub fn remote(&mut self, remote: &Remote, name: &str) -> Result<u32> {
        let connections = std::thread::available_parallelism().map_or(CONNECTIONS, usize::from);
        let connected = remote.connect(name, connections.min(CONNECTIONS))?;
        let mut fds = connected.connections.into_iter().map(|fd| self.fd(fd)).collect::<Vec<_>>().into_iter();
        let fd = fds.next().expect("one connection at least");
        let tls = remote.uri.tls.as_ref().map(|tls| proto::remote::Tls {
            server_name: tls.server_name.clone(),
            authorities_fd: connected.authorities.map(|file| self.fd(file)),
            identity_fds: connected.identity.map(|(certificate, key)| (self.fd(certificate), self.fd(key))),
        });
        self.remotes.push(proto::remote::Remote {
            fd,
            more: fds.collect(),
            export: remote.uri.export.clone(),
            tls,
            address: connected.address,
            reconnect_ms: remote.reconnect_ms,
            bitmap: remote.bitmap.clone(),
            update: remote.update,
            blank_bytes: remote.blank_bytes,
        });
        Ok(fd)
    }

    /// Which of the descriptors so far are connections.
    pub fn remotes(&mut self) -> Vec<proto::remote::Remote> {
        std::mem::take(&mut self.remotes)
    }

    /// Where something is written; a new file is created now. `keep`: it stays behind when the job fails.
    pub fn sink(&mut self, sink: Sink, keep: bool) -> Result<Passed> {
        let place = match sink {
            Sink::Open(End { handle, stream, name, .. }) => {
                return Ok(Passed { fd: self.end(handle, &name)?, name, stream, commit: None });
            }
            Sink::New(place) => place,
        };
        let name = place.typed().to_owned();
        let fate = if keep || self.is_resumable { Fate::Kept } else { Fate::Removed };
        let created = PartialFile { file: place.create()?, fate };
        let file = &created.file;
        let (fd, dir_fd) = share(file)?;
        let fd = self.fd(fd);
        let commit = Commit {
            dir_fd: self.fd(dir_fd),
            partial: file.partial.clone(),
            name: file.name.clone(),
            replace: file.replace,
            keep_partial: keep,
        };
        self.partials.push(created);
        Ok(Passed { fd, name, stream: false, commit: Some(commit) })
    }

    /// A journal that was just created under its own name.
    pub fn journal(&mut self, file: Partial) -> Result<u32> {
        let copy = file.fd.try_clone();
        self.partials.push(PartialFile { file, fate: Fate::RemovedIfEmpty });
        let copy = copy.map_err(|error| Error::io("cannot pass the descriptor", "journal", error))?;
        Ok(self.fd(copy))
    }

    /// A checkpoint, made now or found again. Before the files it is of, which are kept for its sake.
    pub fn checkpoint(&mut self, place: Place) -> Result<proto::Checkpoint> {
        let name = place.typed().to_owned();
        let file = place.create()?;
        let (fd, dir_fd) = share(&file)?;
        let entry = proto::Entry { dir_fd: self.fd(dir_fd), name: file.name.clone() };
        self.is_resumable = true;
        self.partials.push(PartialFile { file, fate: Fate::Checkpoint });
        Ok(proto::Checkpoint { fd: self.fd(fd), name, entry: Some(entry), resume: false, interval_ms: None })
    }

    /// A new header or backup.
    pub fn new_file(&mut self, sink: Sink, keep: bool) -> Result<proto::luks::NewFile> {
        let Passed { fd, name, commit, .. } = self.sink(sink, keep)?;
        Ok(proto::luks::NewFile { fd, name, commit })
    }

    /// A new header in a file of its own, which appears durably when the re-encryption it is of begins.
    pub fn new_header(&mut self, sink: Sink) -> Result<proto::luks::NewFile> {
        let before = self.partials.len();
        let new = self.new_file(sink, false)?;
        self.partials[before..].iter_mut().for_each(|partial| partial.fate = Fate::Header);
        Ok(new)
    }

    /// The descriptors, and the new files: from here on somebody else answers for them.
    pub fn finish(mut self) -> (Vec<OwnedFd>, Vec<PartialFile>) {
        (std::mem::take(&mut self.descriptors), std::mem::take(&mut self.partials))
    }
}

/// Descriptors of a file and its directory to be sent.
fn share(file: &Partial) -> Result<(OwnedFd, OwnedFd)> {
    let share = |fd: BorrowedFd<'_>| {
        fd.try_clone_to_owned().map_err(|error| {
            file.remove();
            Error::io("cannot pass the descriptor", file.shown().display(), error)
        })
    };
    Ok((share(file.fd.as_fd())?, share(file.dir_fd.as_fd())?))
}

impl Drop for Passing {
    fn drop(&mut self) {
        for partial in &self.partials {
            partial.refused();
        }
    }
}

impl PartialFile {
    /// The request was refused: what we created is empty and goes.
    pub fn refused(&self) {
        if self.fate != Fate::RemovedIfEmpty || self.file.is_empty() {
            self.file.remove();
        }
    }

    /// The daemon is done with it, one way or another: what was never needed goes.
    pub fn ended(&self) {
        if self.fate == Fate::RemovedIfEmpty && self.file.is_empty() {
            self.file.remove();
        }
    }

    /// Where the file is if nobody has removed or renamed it.
    pub fn shown(&self) -> String {
        self.file.shown().display().to_string()
    }

    /// It ended without success, or its daemon went away: nothing half may look whole. Says what became of the file.
    pub fn abandon(&self) -> Option<String> {
        if self.fate == Fate::RemovedIfEmpty {
            // Who knows whether it is being written this very moment.
            None
        } else if self.fate == Fate::Header && self.file.is_in_place() {
            Some(format!("{} is the volume's header now, and needed to go on", self.file.name))
        } else if self.fate == Fate::Checkpoint {
            self.file.is_there().then(|| "the same command with --resume goes on".to_owned())
        } else if self.file.is_in_place() {
            Some(format!(
                "{} was whole and in place already, but that may not outlast a power cut",
                self.file.name
            ))
        } else if self.fate == Fate::Kept {
            self.file.is_there().then(|| format!("{} was kept", self.file.shown().display()))
        } else {
            self.file.remove().then(|| format!("{} was removed", self.file.shown().display()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_created_for_a_request_that_is_never_sent_is_removed() {
        let dir = tempfile::tempdir().expect("dir");
        let mut passing = Passing::default();
        let place = Place::new(&dir.path().join("a"), "a", None, false, 0o600).expect("place");
        let passed = passing.sink(Sink::New(place), true).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!((passed.fd, passed.commit.map(|commit| commit.dir_fd)), (0, Some(1)));
        assert!(dir.path().join("a.partial").exists());
        std::fs::write(dir.path().join("b.partial"), "somebody's").expect("write");
        let place = Place::new(&dir.path().join("b"), "b", None, false, 0o600).expect("place");
        assert!(passing.sink(Sink::New(place), false).is_err());
        drop(passing);
        assert!(!dir.path().join("a.partial").exists(), "the first goes with the second's failure");
        assert!(dir.path().join("b.partial").exists());
    }

    #[test]
    fn what_was_handed_over_stays() {
        let dir = tempfile::tempdir().expect("dir");
        let mut passing = Passing::default();
        let place = Place::new(&dir.path().join("a"), "a", None, false, 0o600).expect("place");
        assert!(passing.sink(Sink::New(place), false).is_ok());
        let (descriptors, partials) = passing.finish();
        assert_eq!((descriptors.len(), partials.len()), (2, 1));
        assert!(dir.path().join("a.partial").exists());
        assert!(partials[0].abandon().is_some_and(|what| what.ends_with("was removed")));
    }
}
