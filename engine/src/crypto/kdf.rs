//! From a passphrase to a key: PBKDF2 and Argon2, with bounds checked before memory is taken and memory wiped after use.
//!
//! What this module refuses to do: choose salts, and compare what comes out. Whether a passphrase was right is for a digest to say.

use std::time::Duration;

use proto::ErrorKind;
use proto::luks::KdfWish;

use crate::crypto::hash::Hash;
use crate::crypto::{argon, burn_stack, calibrate};
use crate::error::{Error, Result};

/// Fewest iterations of a new PBKDF2 keyslot or digest (RFC 8018, and what cryptsetup refuses to go below).
pub const PBKDF2_ITERATIONS_MIN: u32 = 1000;
/// Fewest passes of a new Argon2 keyslot, as cryptsetup.
pub const ARGON2_TIME_MIN: u32 = 4;
/// Least memory of Argon2, KiB: two blocks in each quarter of four lanes.
pub const ARGON2_MEMORY_KIB_MIN: u32 = 32;
/// Most memory of Argon2, KiB.
pub const ARGON2_MEMORY_KIB_MAX: u32 = 4 << 20;
/// Most lanes of Argon2.
pub const ARGON2_LANES_MAX: u32 = 4;
/// Longest derivation that is begun, by estimate. None can be interrupted, and every other memory-hard one waits for it: this is
/// many times what anybody waits for a passphrase, and far below the weeks a hostile header can ask for within the bounds of the
/// format.
pub const DERIVATION_MAX: Duration = Duration::from_secs(120);

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
        let refused = |what: String| Err(Error::new(ErrorKind::Invalid, what));
        match *self {
            Self::Pbkdf2 { iterations: 0, .. } => refused("pbkdf2 has at least 1 iteration, not 0".into()),
            Self::Pbkdf2 { .. } => Ok(()),
            Self::Argon2 { time: 0, .. } => refused("argon2 has a time cost of at least 1, not 0".into()),
            Self::Argon2 { memory_kib, .. }
                if !(ARGON2_MEMORY_KIB_MIN..=ARGON2_MEMORY_KIB_MAX).contains(&memory_kib) =>
            {
                refused(format!(
                    "argon2 has {ARGON2_MEMORY_KIB_MIN} to {ARGON2_MEMORY_KIB_MAX} KiB of memory, not {memory_kib}"
                ))
            }
            Self::Argon2 { lanes, .. } if !(1..=ARGON2_LANES_MAX).contains(&lanes) => {
                refused(format!("argon2 has 1 to {ARGON2_LANES_MAX} lanes, not {lanes}"))
            }
            Self::Argon2 { .. } => Ok(()),
        }
    }

    /// Can one derivation be paid here in [`DERIVATION_MAX`]? Measures what is not plainly cheap. Memory is judged when it is taken.
    ///
    /// # Errors
    /// As [`Kdf::check`]; `Limit`.
    pub fn payable(&self, key_bytes: usize) -> Result<()> {
        self.check()?;
        calibrate::payable(self, || self.estimate(key_bytes))
    }

    /// [`Kdf::derive_unless`] for those whom nobody can cancel.
    ///
    /// # Errors
    /// As [`Kdf::derive_unless`], but for `Cancelled`.
    pub fn derive(&self, passphrase: &[u8], salt: &[u8], out: &mut [u8]) -> Result<()> {
        self.derive_unless(passphrase, salt, out, &|| false)
    }

    /// Fill `out` with key bytes. Blocks for as long as the cost demands: nothing interrupts a derivation that runs. One
    /// memory-hard derivation runs at a time in a process; others wait, and while they do `give_up` is asked several times a
    /// second.
    ///
    /// # Errors
    /// As [`Kdf::check`]; `Invalid` also for an argon2 salt shorter than 8 bytes or an output shorter than 4, which RFC 9106 does
    /// not have; `Limit` when the memory cannot be had; `Cancelled`: given up before it began.
    pub fn derive_unless(
        &self,
        passphrase: &[u8],
        salt: &[u8],
        out: &mut [u8],
        give_up: &dyn Fn() -> bool,
    ) -> Result<()> {
        self.check()?;
        match *self {
            Self::Pbkdf2 { hash, iterations } => pbkdf2(hash, iterations, passphrase, salt, out),
            Self::Argon2 { kind, time, memory_kib, lanes } => {
                let cost = argon::Cost { kind, time, memory_kib, lanes };
                argon::derive(cost, passphrase, salt, out, give_up)?;
            }
        }
        Ok(())
    }

    /// A cost for a new keyslot that meets the wish on this machine, measured now: for `iter_time_ms`, default 2000; memory at
    /// most half of what machine and cgroup have, and what of it is free; lanes at most the CPUs this process may use. `hash`: of pbkdf2 unless the wish
    /// names one. `kind` absent: `default`. Measurements of argon2 wait for derivations that run, and while they do `give_up` is
    /// asked.
    ///
    /// # Errors
    /// `Invalid`: a wish outside the bounds; `Unsupported`: an unknown hash; `Limit`: a wish that is not [`Kdf::payable`] here, or
    /// less memory than 64 MiB (or than wished, if that is less);
    /// `Cancelled`.
    pub fn calibrate(
        wish: &KdfWish,
        default: proto::luks::KdfKind,
        hash: Hash,
        key_bytes: usize,
        give_up: &dyn Fn() -> bool,
    ) -> Result<Self> {
        calibrate::calibrate(wish, default, hash, key_bytes, give_up)
    }

    /// Would [`Kdf::calibrate`] accept this wish? Measures nothing, so what it would take is not judged.
    ///
    /// # Errors
    /// As [`Kdf::calibrate`].
    pub fn check_wish(wish: &KdfWish, default: proto::luks::KdfKind, hash: Hash) -> Result<()> {
        calibrate::check_wish(wish, default, hash)
    }

    /// What one derivation is expected to take here, from a short measurement (tens of milliseconds).
    ///
    /// # Errors
    /// `Limit`: it is not known, for there is no memory or no thread to measure with.
    pub fn estimate(&self, key_bytes: usize) -> Result<Duration> {
        calibrate::estimate(self, key_bytes)
    }
}

/// PBKDF2 iterations of a volume-key digest: what takes about `target` here, at least 1000.
#[must_use]
pub fn digest_iterations(hash: Hash, target: Duration) -> u32 {
    calibrate::pbkdf2_iterations(hash, hash.bytes(), target)
}

/// PBKDF2-HMAC; the pads of the passphrase are hashed once.
pub(super) fn pbkdf2(hash: Hash, iterations: u32, passphrase: &[u8], salt: &[u8], out: &mut [u8]) {
    // A function each, not inlined: their frames hold states of HMAC and must lie where `burn_stack` reaches.
    let run: fn(&[u8], &[u8], u32, &mut [u8]) = match hash {
        Hash::Sha1 => pbkdf2::pbkdf2_hmac::<sha1::Sha1>,
        Hash::Sha224 => pbkdf2::pbkdf2_hmac::<sha2::Sha224>,
        Hash::Sha256 => pbkdf2::pbkdf2_hmac::<sha2::Sha256>,
        Hash::Sha384 => pbkdf2::pbkdf2_hmac::<sha2::Sha384>,
        Hash::Sha512 => pbkdf2::pbkdf2_hmac::<sha2::Sha512>,
    };
    run(passphrase, salt, iterations, out);
    burn_stack();
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: Kdf = Kdf::Argon2 { kind: Argon2Kind::Argon2id, time: 1, memory_kib: 32, lanes: 1 };

    fn argon2(time: u32, memory_kib: u32, lanes: u32) -> Kdf {
        Kdf::Argon2 { kind: Argon2Kind::Argon2id, time, memory_kib, lanes }
    }

    #[test]
    fn costs_are_checked_at_both_sides_of_each_bound() {
        let pbkdf2 = |iterations| Kdf::Pbkdf2 { hash: Hash::Sha256, iterations };
        let allowed = [
            pbkdf2(1),
            pbkdf2(u32::MAX),
            argon2(1, 32, 1),
            argon2(u32::MAX, 32, 1),
            argon2(1, 4_194_304, 1),
            argon2(1, 32, 4),
        ];
        for kdf in allowed {
            kdf.check().expect("within the bounds");
        }
        let refused = [
            (pbkdf2(0), "iteration"),
            (argon2(0, 32, 1), "time"),
            (argon2(1, 31, 1), "31"),
            (argon2(1, 0, 1), "memory"),
            (argon2(1, 4_194_305, 1), "4194305"),
            (argon2(1, u32::MAX, 1), "memory"),
            (argon2(1, 32, 0), "lanes"),
            (argon2(1, 32, 5), "lanes"),
            (argon2(1, 32, u32::MAX), "lanes"),
        ];
        for (kdf, word) in refused {
            let error = kdf.check().expect_err("outside");
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.chain().contains(word), "{}", error.chain());
            let mut out = [7; 32];
            assert_eq!(
                kdf.derive(b"x", &[0; 32], &mut out).expect_err("checks too").kind(),
                ErrorKind::Invalid
            );
            assert_eq!(out, [7; 32], "nothing is written");
        }
    }

    #[test]
    fn argon2_takes_salts_from_8_bytes_and_makes_keys_from_4() {
        let mut out = [0; 64];
        for bytes in 0..=9 {
            let done = SMALL.derive(b"x", &[1; 32][..bytes], &mut out);
            assert_eq!(done.is_ok(), bytes >= 8, "salt of {bytes}");
            let done = SMALL.derive(b"x", &[1; 32], &mut out[..bytes]);
            assert_eq!(done.is_ok(), bytes >= 4, "key of {bytes}");
        }
        assert_eq!(SMALL.derive(b"x", b"short", &mut out).expect_err("short").kind(), ErrorKind::Invalid);
    }

    #[test]
    fn pbkdf2_takes_any_salt_and_any_length() {
        let kdf = Kdf::Pbkdf2 { hash: Hash::Sha512, iterations: 1 };
        kdf.derive(b"", b"", &mut []).expect("nothing from nothing");
        let (mut long, mut short) = ([0; 200], [0; 65]);
        kdf.derive(b"x", b"y", &mut long).expect("derives");
        kdf.derive(b"x", b"y", &mut short).expect("derives");
        assert_eq!(long[..65], short, "a shorter key is the head of a longer one");
    }

    #[test]
    fn derivations_that_wait_for_each_other_all_come_out_right() {
        let key = |at: u8| {
            let mut out = [0; 32];
            argon2(2, 1024, 1 + u32::from(at) % 4).derive(&[at], &[at; 16], &mut out).expect("derives");
            out
        };
        let alone: Vec<_> = (0..8).map(key).collect();
        let together: Vec<_> = std::thread::scope(|scope| {
            let running: Vec<_> = (0..8).map(|at| scope.spawn(move || key(at))).collect();
            running.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });
        assert_eq!(alone, together);
    }
}
