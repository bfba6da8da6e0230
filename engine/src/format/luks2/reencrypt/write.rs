//! To metadata: the states a re-encryption goes through, exactly as cryptsetup writes them, so that it can go on from each.

use super::{Checksum, Direction, Mode, Moved, Process, Resilience};
use crate::error::Result;
use crate::format::luks2::Header;
use crate::format::luks2::metadata::{Digest, Metadata, Segment};
use crate::units::Extent;

/// What is to begin.
#[derive(Debug, Clone)]
pub struct Begin {
    /// What the data becomes.
    pub mode: Mode,
    /// From where.
    pub direction: Direction,
    /// How it is protected.
    pub resilience: Resilience,
    /// The data as it shall be: `dynamic`, without flags.
    pub target: Segment,
    /// The digest of the new volume key, in the metadata already, with its keyslots; none when decrypting.
    pub new_digest: Option<u32>,
    /// Datashift: where the first bytes were moved.
    pub moved: Option<Moved>,
}

/// Add what makes it a re-encryption: keyslot with the largest free area, backup segments, requirement. The protection digest
/// is still to be added ([`protect`]), for it needs the keys.
///
/// # Errors
/// `NoSpace`: no keyslot number, no area. `Conflict`: one is under way. `Unsupported`: integrity, more than one data segment.
pub fn begin(header: &mut Header, begin: &Begin) -> Result<Process> {
    let _ = (header, begin);
    unimplemented!()
}

/// Add the protection digest, made of [`super::digest::message`].
///
/// # Errors
/// `NoSpace`: no digest number is free.
pub fn protect(metadata: &mut Metadata, process: &mut Process, digest: Digest) -> Result<()> {
    let _ = (metadata, process, digest);
    unimplemented!()
}

/// To *crash*: this hotzone is being rewritten.
///
/// # Errors
/// `Internal`: a hotzone that does not follow the boundary.
pub fn hot(metadata: &mut Metadata, process: &Process, hot: Extent, total: u64) -> Result<()> {
    let _ = (metadata, process, hot, total);
    unimplemented!()
}

/// To *clean*: everything up to this boundary is new.
///
/// # Errors
/// `Internal`: a boundary that is none.
pub fn clean(metadata: &mut Metadata, process: &Process, boundary: u64, total: u64) -> Result<()> {
    let _ = (metadata, process, boundary, total);
    unimplemented!()
}

/// To *none*: one segment as it shall be, and nothing of the old key or the process: keyslots of the old digest, which are
/// returned with their areas to be overwritten, digests, requirement, backup segments. Keyslots carried to the new key keep
/// their own numbers.
///
/// # Errors
/// `Internal`.
pub fn finish(metadata: &mut Metadata, process: &Process) -> Result<Vec<u32>> {
    let _ = (metadata, process);
    unimplemented!()
}

impl Checksum {
    /// Bytes of checksums for so many bytes of data.
    #[must_use]
    pub fn bytes_for(&self, data: u64) -> u64 {
        data.div_ceil(self.block_bytes.into()) * self.hash.bytes() as u64
    }
}
