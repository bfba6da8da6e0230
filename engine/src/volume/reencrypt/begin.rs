//! A new re-encryption: keyslots for the new key, the first header.

use crate::backend::blocking::Blocking;
use crate::crypto::Secret;
use crate::error::Result;
use crate::format::luks2::reencrypt::Mode;
use crate::volume::keyslots::GiveUp;
use crate::volume::reencrypt::Opened;

/// What is wanted, as far as the volume itself is concerned; the rest is in the wire's types.
pub struct Wish<'a> {
    /// What the data becomes.
    pub mode: Mode,
    /// How; see the wire.
    pub luks: &'a proto::reencrypt::Luks,
    /// How steps shall be protected; `None`: the best there is.
    pub resilience: Option<proto::reencrypt::Resilience>,
    /// Bytes of the data device.
    pub data_bytes: u64,
    /// Its logical block, bytes: what it writes whole or not at all.
    pub block_bytes: u32,
}

/// What would be done: everything that can be known without writing. For a dry run, and the first step of [`begin`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    /// Bytes of plaintext.
    pub total: u64,
    /// As on disk.
    pub resilience: String,
    /// Most bytes of a hotzone by its protection; `None`: no limit.
    pub hotzone_max: Option<u64>,
    /// Ciphers in words: before, after.
    pub ciphers: [Option<String>; 2],
    /// Keyslots carried to the new key.
    pub carried: Vec<u32>,
    /// Keyslots that go.
    pub dropped: Vec<u32>,
    /// Worth telling.
    pub notes: Vec<String>,
}

/// Check everything and say what [`begin`] would do. Tries the passphrases.
///
/// # Errors
/// `WrongKey`; `Conflict`: keyslots would be lost and nobody said that they may, named; one is under way. `Unsupported`,
/// `NoSpace`, `Invalid`: why it cannot be.
pub fn plan(
    header: &mut Blocking,
    wish: &Wish<'_>,
    keys: &[Secret],
    new_key: Option<&Secret>,
    give_up: GiveUp<'_>,
) -> Result<Planned> {
    let _ = (header, wish, keys, new_key, give_up);
    unimplemented!()
}

/// Begin it: the header says so, durably, and no data has been touched. `data`: the data device, for `encrypt` with a shift; the same
/// file as `header` when the header is attached.
///
/// # Errors
/// As [`plan`], and of the devices.
pub fn begin(
    header: Blocking,
    data: &mut Blocking,
    wish: &Wish<'_>,
    keys: &[Secret],
    new_key: Option<&Secret>,
    give_up: GiveUp<'_>,
) -> Result<Opened> {
    let _ = (header, data, wish, keys, new_key, give_up);
    unimplemented!()
}
