//! Where the progress of a re-encryption is kept, and the order in which a step becomes durable.
//!
//! A step rewrites a hotzone. Whoever drives it keeps this order; a power cut between any two of these, or within one, loses
//! nothing:
//!
//! 1. the old bytes of the hotzone have been read; their checksums are in memory, or for a journal the bytes themselves;
//! 2. [`Ledger::save`]: checksums are in the area; or the workers have written the old bytes there ([`Protection::Journal`]). Not
//!    before the step before is committed: its own protection is overwritten here;
//! 3. [`Ledger::begin`]: first a flush of the area, for a header that is durable before it would call new what is old; then the
//!    header says *crash*, durably;
//! 4. the hotzone is written;
//! 5. the data is flushed;
//! 6. [`Ledger::commit`]: the header says *clean*, durably; behind the last hotzone it says that all is over, in the same write, for a
//!    last *clean* state looks like a first one.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::error::Result;
use crate::format::luks2::reencrypt::Checksum;
use crate::units::Extent;

/// What a step needs of the workers.
#[derive(Debug, Clone)]
pub enum Protection {
    /// Nothing: one hotzone to the end, or data that moves.
    None,
    /// The hashes of the old blocks, for [`Ledger::save`].
    Checksums(Checksum),
    /// The old bytes, written to the area: byte `a` of the hotzone at `offset`.
    Journal {
        /// The file with the area.
        file: Arc<OwnedFd>,
        /// What users call it.
        name: String,
        /// Where the area begins.
        offset: u64,
        /// Offsets and lengths are multiples of this, bytes; 1: buffered.
        align: u32,
    },
}

/// Where the progress of a re-encryption is kept. The data itself is flushed by the driver.
pub trait Ledger {
    /// What a step needs of the workers.
    fn protection(&self) -> Protection;

    /// Hotzones are multiples of this, bytes, but for one that ends where the data does.
    fn step_bytes(&self) -> u64;

    /// Most bytes of a hotzone; `None`: the whole rest is one.
    fn hotzone_max(&self) -> Option<u64>;

    /// Put the checksums of a hotzone, packed in its order, into the area. Not durable yet. No effect without checksums.
    ///
    /// # Errors
    /// Of the device.
    fn save(&mut self, hot: Extent, checksums: &[u8]) -> Result<()>;

    /// Make the area durable, then say that this hotzone is being rewritten, durably.
    ///
    /// # Errors
    /// `Conflict`: another program has locked the header or changed it; nothing of it was written, and the step has not begun. Else of
    /// the device: what the header says is not known.
    fn begin(&mut self, hot: Extent) -> Result<()>;

    /// The hotzone, or (without protection, when stopped early) the part of it that was begun with, is new and durable: say so, durably. Behind
    /// the last one the re-encryption is over, and what belonged to the old key is gone.
    ///
    /// # Errors
    /// `Conflict`: another program has locked the header or changed it, see [`Ledger::is_locked_out`]. Else of the device.
    fn commit(&mut self, hot: Extent) -> Result<()>;

    /// Did the call before fail only because another program has locked the header? Then nothing was written, and it may be made again.
    fn is_locked_out(&self) -> bool {
        false
    }
}
