//! From a passphrase to a key: PBKDF2 and Argon2, with bounds checked before memory is taken and memory wiped after use.

use std::time::Duration;

use proto::luks::KdfWish;

use crate::crypto::hash::Hash;
use crate::error::Result;

/// Which Argon2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Argon2Kind {
    /// Data-independent memory access.
    Argon2i,
    /// The hybrid; the default.
    Argon2id,
}

/// A key derivation with its cost, as a keyslot names it (the salt lies beside it).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kdf {
    /// RFC 8018 with HMAC.
    Pbkdf2 {
        /// HMAC's hash.
        hash: Hash,
        /// At least 1000 in a new keyslot.
        iterations: u32,
    },
    /// RFC 9106, version 0x13, no secret, no associated data.
    Argon2 {
        /// Which.
        kind: Argon2Kind,
        /// Passes.
        time: u32,
        /// KiB.
        memory_kib: u32,
        /// Parallel lanes.
        lanes: u32,
    },
}

impl Kdf {
    /// Is the cost one that can be paid here? To be asked of every header before [`Kdf::derive`] takes memory.
    ///
    /// # Errors
    /// `Invalid`: outside the format's bounds (argon2: time ≥ 1, memory 32 KiB..=4 GiB, lanes 1..=4; pbkdf2: iterations ≥ 1).
    pub fn check(&self) -> Result<()> {
        unimplemented!()
    }

    /// Fill `out` with key bytes. Blocks for as long as the cost demands. One memory-hard derivation runs at a time in a process; others wait.
    ///
    /// # Errors
    /// As [`Kdf::check`]; `Limit` when the memory cannot be had.
    pub fn derive(&self, passphrase: &[u8], salt: &[u8], out: &mut [u8]) -> Result<()> {
        unimplemented!("{} {} {}", passphrase.len(), salt.len(), out.len())
    }

    /// A cost for a new keyslot that meets the wish on this machine, measured now: for `iter_time_ms`, default 2000; memory at
    /// most half of what machine and cgroup have; lanes at most the CPUs this process may use. `hash`: of pbkdf2 unless the wish names one. `kind` absent: `default`.
    ///
    /// # Errors
    /// `Invalid`: a wish outside the bounds; `Unsupported`: an unknown hash.
    pub fn calibrate(
        wish: &KdfWish,
        default: proto::luks::KdfKind,
        hash: Hash,
        key_bytes: usize,
    ) -> Result<Self> {
        unimplemented!("{wish:?} {default:?} {hash:?} {key_bytes}")
    }

    /// What one derivation is expected to take here, from a short measurement (tens of milliseconds).
    #[must_use]
    pub fn estimate(&self, key_bytes: usize) -> Duration {
        unimplemented!("{key_bytes}")
    }
}

/// PBKDF2 iterations of a volume-key digest: what takes about `target` here, at least 1000.
#[must_use]
pub fn digest_iterations(hash: Hash, target: Duration) -> u32 {
    unimplemented!("{hash:?} {target:?}")
}
