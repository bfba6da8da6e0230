//! A new header with its first keyslot, in memory, and the order in which it is written.

use proto::luks::New;

use crate::backend::blocking::Blocking;
use crate::crypto::Secret;
use crate::error::Result;
use crate::volume::{DataArea, Header};

/// A header that exists in memory only.
pub struct NewHeader {
    /// What will be on disk.
    pub header: Header,
    /// The one data area: its offset on the data device (0 with a detached header unless asked for otherwise).
    pub data: DataArea,
    /// The volume key.
    pub key: Secret,
    /// The keyslot made.
    pub keyslot: u32,
    /// Bytes of the header device that belong to the header: what is overwritten from byte 0.
    pub header_bytes: u64,
    /// Worth telling the user.
    pub warnings: Vec<String>,
}

/// What is known about where it will be written.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// The header goes into a file or device of its own.
    pub detached: bool,
    /// Bytes of the device that takes the header, if it cannot grow.
    pub header_capacity: Option<u64>,
    /// Bytes of the device that takes the data, if it cannot grow.
    pub data_capacity: Option<u64>,
    /// Block size of the data device: the data unit's default is the larger of 4096 and nothing (LUKS1: 512); a device whose size
    /// is not a multiple of 4096 gets 512.
    pub align: u32,
}

/// Check the wish without making anything: sizes, names, cipher, where the data will begin. Cheap: no key derivation.
///
/// # Errors
/// `Invalid`, `Unsupported`, `NoSpace`: one clear sentence.
pub fn plan(new: &New, place: &Place) -> Result<DataArea> {
    unimplemented!("{new:?} {place:?}")
}

/// Make the header: random volume key (or the one given), calibrated KDF, digest, first keyslot. Takes seconds.
///
/// # Errors
/// As [`plan`]; `Invalid`: a volume key of the wrong length or with equal halves.
pub fn make(new: &New, place: &Place, passphrase: &Secret, volume_key: Option<Secret>) -> Result<NewHeader> {
    unimplemented!("{new:?} {place:?} {} {}", passphrase.len(), volume_key.is_some())
}

impl NewHeader {
    /// Make whatever header was on the device unusable, durably: before its data is overwritten, so that a job that dies leaves
    /// no old header in front of new data.
    ///
    /// # Errors
    /// Of the device.
    pub fn clear(&self, device: &mut Blocking) -> Result<()> {
        unimplemented!("{}", device.name())
    }

    /// Write it, durably, in the order that leaves no half header: 1. keyslots area and material, 2. flush, 3. header (LUKS2:
    /// primary, flush, secondary), 4. flush.
    ///
    /// # Errors
    /// Of the device.
    pub fn write(&self, device: &mut Blocking) -> Result<()> {
        unimplemented!("{}", device.name())
    }

    /// All bytes from 0 to the start of the data, for a sink that is written in order: calls `put` with consecutive pieces.
    ///
    /// # Errors
    /// Of `put`.
    pub fn stream(&self, put: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        unimplemented!("{}", put(&[]).is_ok())
    }
}
