//! Re-encryption of volumes in place: how it begins, is opened again, keeps its progress, is recovered and ends.
//!
//! | file | its one purpose |
//! |---|---|
//! | `mod` | a re-encryption under way, opened |
//! | `ledger` | where its progress is kept: the order of what must be durable before what |
//! | `luks` | the ledger in a LUKS2 header |
//! | `sidecar` | the ledger in a journal file beside a volume without a header |
//! | `begin` | a new one: keyslots for the new key, the first header |
//! | `open` | one under way: both keys, the protection digest |
//! | `decide` | the table of what is done when |
//! | `recover` | an interrupted step made whole |
//! | `shift` | making room for a header in front of plain data |
//!
//! Data moves through the workers (`job::reencrypt`), except for the one step of a recovery.

pub mod begin;
pub mod decide;
pub mod ledger;
pub mod luks;
pub mod open;
pub mod recover;
pub mod shift;
pub mod sidecar;

use crate::crypto::Secret;
use crate::format::luks2::reencrypt::{Direction, Mode, Moved, Resilience};
use crate::volume::AreaCipher;
use crate::volume::reencrypt::ledger::Ledger;

/// One side of the data, ready to be built into ciphers.
#[derive(Debug)]
pub struct Side {
    /// Where plaintext byte 0 lies on the data device.
    pub offset: u64,
    /// How it is encrypted, and its key; `None`: plain.
    pub cipher: Option<(AreaCipher, Secret)>,
}

/// A re-encryption under way, opened: keys proven, metadata proven, and nothing interrupted ([`recover`] has been here).
pub struct Opened {
    /// What the data becomes.
    pub mode: Mode,
    /// From where.
    pub direction: Direction,
    /// How steps are protected.
    pub resilience: Resilience,
    /// As it was.
    pub old: Side,
    /// As it will be.
    pub new: Side,
    /// The first bytes of the old side lie elsewhere.
    pub moved: Option<Moved>,
    /// Bytes of plaintext.
    pub total: u64,
    /// Between old and new, see [`crate::format::luks2::reencrypt`].
    pub boundary: u64,
    /// Bytes of a step that had been interrupted and was recovered.
    pub recovered_bytes: u64,
    /// Keyslots (numbers before) that were carried to the new key, and those that go with the old one; for the report.
    pub carried: Vec<u32>,
    /// See `carried`.
    pub dropped: Vec<u32>,
    /// Worth telling the user.
    pub notes: Vec<String>,
    /// The same, but true only as long as it is under way.
    pub notes_until_done: Vec<String>,
    /// Where progress is kept.
    pub ledger: Box<dyn Ledger>,
}
