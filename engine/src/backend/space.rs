//! Room on a device, before and after data moves: what is free, what is reserved.

use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock, fstat, fstatvfs, ftruncate};
use rustix::io::Errno;

use crate::backend::device::{Device, Nature, Region};
use crate::error::{Error, ErrorKind, Result};
use crate::format::nbd::BASE_ALLOCATION;

impl Device {
    /// Can it have holes that are worth asking for? Not where a file has as many blocks as bytes, nor where the question
    /// goes to another program or machine: a worker asks, and must not wait for either.
    ///
    /// Of what an NBD server has and is only read, holes are what [`Device::learn_holes`] has learned by then.
    #[must_use]
    pub fn may_have_holes(&self) -> bool {
        if let Some(volume) = self.remote() {
            return !self.is_written() && volume.facts().context(BASE_ALLOCATION).is_some();
        }
        if self.nature() != Nature::File || self.is_stream() || self.is_remote() {
            return false;
        }
        let blocks = fstat(self.file()).map_or(0, |stat| u64::try_from(stat.st_blocks).unwrap_or(0));
        self.size().is_some_and(|size| blocks.saturating_mul(512) < size)
    }

    /// Ask an NBD server for the zeros of what is only read, before a worker wants to know: [`Device::region_at`] never waits for one.
    /// When its job begins, since what was zeros when it was submitted may have been written to while it waited. Blocks, until
    /// `give_up` says so.
    ///
    /// # Errors
    /// What is a hole may be taken for data: as [`crate::backend::nbd::Volume::learn_zeros`] has it.
    pub fn learn_holes(&self, give_up: &dyn Fn() -> bool) -> Result<()> {
        match self.remote().filter(|_| !self.is_written()) {
            Some(volume) => volume.learn_zeros(give_up).map_err(|error| error.at(self.name())),
            None => Ok(()),
        }
    }

    /// Bytes in it now, whatever [`Device::size`] was.
    ///
    /// # Errors
    /// It cannot be examined.
    pub fn current_len(&self) -> Result<u64> {
        if let Some(volume) = self.remote() {
            return Ok(volume.facts().size);
        }
        let stat = fstat(self.file()).map_err(|errno| Error::io("cannot examine", errno).at(self.name()))?;
        Ok(u64::try_from(stat.st_size).unwrap_or(0))
    }

    /// Bytes of blocks that a file has already.
    #[must_use]
    pub fn held_bytes(&self) -> u64 {
        let blocks = fstat(self.file()).map_or(0, |stat| u64::try_from(stat.st_blocks).unwrap_or(0));
        blocks.saturating_mul(512)
    }

    /// Bytes its filesystem has free for this user. `None`: it does not say; one without a limit (tmpfs with `size=0`) counts
    /// no blocks at all.
    #[must_use]
    pub fn free_bytes(&self) -> Option<u64> {
        if self.remote().is_some() {
            return None;
        }
        let stat = fstatvfs(self.file()).ok().filter(|stat| stat.f_blocks > 0)?;
        stat.f_bavail.checked_mul(stat.f_frsize)
    }

    /// Make a regular file exactly this long; new bytes are a hole. [`Device::size`] stays what it was when opened.
    ///
    /// # Errors
    /// Not a file, no room, or a limit of the filesystem.
    pub fn set_len(&self, bytes: u64) -> Result<()> {
        if self.remote().is_some() {
            let what = format!("cannot set the length to {bytes} bytes: an NBD server exports it");
            return Err(Error::new(ErrorKind::Unsupported, what).at(self.name()));
        }
        ftruncate(self.file(), bytes).map_err(|errno| {
            Error::io(format!("cannot set the length to {bytes} bytes"), errno).at(self.name())
        })
    }

    /// Keep other jobs from writing to this file: an exclusive `flock` on the description, which the sender may hold already.
    ///
    /// # Errors
    /// `Conflict`: somebody else holds it.
    pub fn lock(&self) -> Result<()> {
        self.lock_as("another job is writing to the sink")
    }

    /// [`Device::lock`], in words for what is locked.
    ///
    /// # Errors
    /// `Conflict`, in these words.
    pub fn lock_as(&self, held: &str) -> Result<()> {
        match flock(self.file(), FlockOperation::NonBlockingLockExclusive) {
            // Filesystems without locks keep nobody out, and did not before.
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NOLCK) => Ok(()),
            Err(Errno::WOULDBLOCK) => Err(Error::new(ErrorKind::Conflict, held).at(self.name())),
            Err(errno) => Err(Error::io("cannot lock", errno).at(self.name())),
        }
    }

    /// Reserve blocks for `0..bytes`, so that a full filesystem says so now. Filesystems that cannot are left alone.
    ///
    /// # Errors
    /// No room.
    pub fn reserve(&self, bytes: u64) -> Result<()> {
        if self.remote().is_some() {
            return Ok(());
        }
        loop {
            match fallocate(self.file(), FallocateFlags::empty(), 0, bytes) {
                Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => {
                    return Err(Error::io(format!("cannot reserve {bytes} bytes"), errno).at(self.name()));
                }
            }
        }
    }
}

impl Region {
    /// One past its last byte.
    #[must_use]
    pub fn until(self) -> u64 {
        match self {
            Self::Data { until } | Self::Hole { until } => until,
        }
    }
}
