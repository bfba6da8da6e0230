//! SHA-256 of many units of one size: the blocks of a hotzone, whose hashes tell old from new after a crash, and the plaintext of a
//! proof. Hashing is what such a re-encryption costs, so units are hashed side by side: a single stream leaves most of a CPU idle,
//! for every round waits for the one before.
//!
//! | kernel | units side by side | bytes a cycle, expected | measured: Zen 5 at some 2.7 GHz, 4096-byte units |
//! |---|---|---|---|
//! | `avx512` | 16 lanes | 2.4: 1,700 instructions for 1,024 bytes, four a cycle | 2.1 (5.8 GB/s) |
//! | `shani` | 4 streams | 1.0: a `sha256rnds2` every other cycle | 1.1 (3.0 GB/s) |
//! | `avx2` | 8 lanes | 0.5: 3,600 instructions for 512 bytes, three to four a cycle | 0.65 (1.8 GB/s) |
//! | `portable` | the `sha2` crate, one after the other | 0.5 with SHA instructions, else 0.15 | 0.7 (1.9 GB/s) |
//!
//! The ladder is in this order. On CPUs with both, AVX-512 goes before the SHA instructions: even where 512-bit registers have only
//! two ports (Intel) or are worked on in halves (Zen 4) it is some 850 cycles for 1,024 bytes, 1.2 a cycle, and nothing makes
//! `sha256rnds2` faster than 1.0 on any of them. Few units do not fill its lanes; they go by the SHA instructions.
//!
//! | file | its one purpose |
//! |---|---|
//! | `mod` | the ladder: detection, self-test, what is hashed |
//! | `lanes` | one unit a lane, whatever the width; `avx512` and `avx2` are its vectors |
//! | `shani` | the SHA instructions on several units in turn |
//!
//! What this module refuses to do: units of different lengths, and lengths that are not whole 64-byte blocks.
#![allow(unsafe_code)] // calls the instruction-set kernels

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod lanes;
#[cfg(target_arch = "x86_64")]
mod shani;

use std::sync::OnceLock;

use proto::ErrorKind;

use super::hash::Hash;
use super::select::hex;
use crate::error::{Error, Result};

/// A SHA-256 digest.
pub type Digest = [u8; 32];

/// FIPS 180-4, section 4.2.2: the first 32 bits of the fractional parts of the cube roots of the first 64 primes.
const K: [[u32; 16]; 4] = [
    [
        0x428a_2f98,
        0x7137_4491,
        0xb5c0_fbcf,
        0xe9b5_dba5,
        0x3956_c25b,
        0x59f1_11f1,
        0x923f_82a4,
        0xab1c_5ed5,
        0xd807_aa98,
        0x1283_5b01,
        0x2431_85be,
        0x550c_7dc3,
        0x72be_5d74,
        0x80de_b1fe,
        0x9bdc_06a7,
        0xc19b_f174,
    ],
    [
        0xe49b_69c1,
        0xefbe_4786,
        0x0fc1_9dc6,
        0x240c_a1cc,
        0x2de9_2c6f,
        0x4a74_84aa,
        0x5cb0_a9dc,
        0x76f9_88da,
        0x983e_5152,
        0xa831_c66d,
        0xb003_27c8,
        0xbf59_7fc7,
        0xc6e0_0bf3,
        0xd5a7_9147,
        0x06ca_6351,
        0x1429_2967,
    ],
    [
        0x27b7_0a85,
        0x2e1b_2138,
        0x4d2c_6dfc,
        0x5338_0d13,
        0x650a_7354,
        0x766a_0abb,
        0x81c2_c92e,
        0x9272_2c85,
        0xa2bf_e8a1,
        0xa81a_664b,
        0xc24b_8b70,
        0xc76c_51a3,
        0xd192_e819,
        0xd699_0624,
        0xf40e_3585,
        0x106a_a070,
    ],
    [
        0x19a4_c116,
        0x1e37_6c08,
        0x2748_774c,
        0x34b0_bcb5,
        0x391c_0cb3,
        0x4ed8_aa4a,
        0x5b9c_ca4f,
        0x682e_6ff3,
        0x748f_82ee,
        0x78a5_636f,
        0x84c8_7814,
        0x8cc7_0208,
        0x90be_fffa,
        0xa450_6ceb,
        0xbef9_a3f7,
        0xc671_78f2,
    ],
];

/// Section 5.3.3.
const INITIAL: [u32; 8] =
    [0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19];

/// What is hashed: for each unit a message of an optional whole-block prefix, the unit, and an optional number.
struct Units<'a> {
    /// The prefix hashed, or the initial value.
    initial: [u32; 8],
    /// Whole units.
    bytes: &'a [u8],
    /// A multiple of 64.
    unit_bytes: usize,
    /// What precedes each unit; for the portable kernel.
    prefix: &'a [u8],
    /// Number of the first unit and the step from one to the next, if numbers are hashed.
    numbers: Option<(u64, u64)>,
    /// Words 2 to 15 of the last block of each unit's message.
    tail: [u32; 14],
}

impl<'a> Units<'a> {
    fn new(bytes: &'a [u8], unit_bytes: usize, prefix: &'a [u8], numbers: Option<(u64, u64)>) -> Self {
        assert!(unit_bytes > 0 && unit_bytes.is_multiple_of(64), "units are whole blocks of the hash");
        assert!(bytes.len().is_multiple_of(unit_bytes), "whole units are hashed");
        assert!(prefix.len().is_multiple_of(64), "a prefix is whole blocks of the hash");
        let message_bytes = prefix.len() + unit_bytes + if numbers.is_some() { 8 } else { 0 };
        let bits = message_bytes as u64 * 8;
        let mut tail = [0; 14];
        if numbers.is_some() {
            tail[0] = 0x8000_0000;
        }
        [tail[12], tail[13]] = halves(bits);
        Self { initial: after(prefix), bytes, unit_bytes, prefix, numbers, tail }
    }

    fn count(&self) -> usize {
        self.bytes.len() / self.unit_bytes
    }

    fn unit(&self, at: usize) -> &'a [u8] {
        &self.bytes[at * self.unit_bytes..(at + 1) * self.unit_bytes]
    }

    /// The first two words of the last block of this unit's message: its number, or the beginning of the padding.
    fn number(&self, at: usize) -> [u32; 2] {
        self.numbers.map_or([0x8000_0000, 0], |(first, step)| halves(first.wrapping_add(at as u64 * step)))
    }
}

#[expect(clippy::cast_possible_truncation, reason = "cut in two")]
fn halves(number: u64) -> [u32; 2] {
    [(number >> 32) as u32, number as u32]
}

/// The state behind a prefix of whole blocks.
fn after(prefix: &[u8]) -> [u32; 8] {
    let mut state = INITIAL;
    let (blocks, rest) = prefix.as_chunks::<64>();
    assert!(rest.is_empty(), "whole blocks");
    for block in blocks {
        sha2::block_api::compress256(&mut state, std::slice::from_ref(block));
    }
    state
}

/// The ladder, fastest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HashKernel {
    /// Sixteen units in lanes of 512-bit registers.
    Avx512,
    /// The SHA instructions, four units in turn.
    ShaNi,
    /// Eight units in lanes of 256-bit registers.
    Avx2,
    /// The `sha2` crate; any CPU. The oracle.
    Portable,
}

/// Fewer units than this are left to the SHA instructions where lanes would be mostly idle: a vector of sixteen lanes takes as
/// long for one unit as for all, about as long as those take for eight.
const FEW: usize = 8;

impl HashKernel {
    /// Fastest first.
    pub const ALL: [Self; 4] = [Self::Avx512, Self::ShaNi, Self::Avx2, Self::Portable];

    fn index(self) -> usize {
        match self {
            Self::Avx512 => 0,
            Self::ShaNi => 1,
            Self::Avx2 => 2,
            Self::Portable => 3,
        }
    }

    /// Its name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Avx512 => "avx512",
            Self::ShaNi => "shani",
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        }
    }

    /// Can this CPU run it?
    #[must_use]
    #[cfg(target_arch = "x86_64")]
    pub fn is_available(self) -> bool {
        match self {
            Self::Avx512 => {
                std::arch::is_x86_feature_detected!("avx512f")
                    && std::arch::is_x86_feature_detected!("avx512bw")
            }
            Self::ShaNi => {
                std::arch::is_x86_feature_detected!("sha")
                    && std::arch::is_x86_feature_detected!("sse4.1")
                    && std::arch::is_x86_feature_detected!("ssse3")
            }
            Self::Avx2 => std::arch::is_x86_feature_detected!("avx2"),
            Self::Portable => true,
        }
    }

    /// Can this CPU run it?
    #[must_use]
    #[cfg(not(target_arch = "x86_64"))]
    pub fn is_available(self) -> bool {
        self == Self::Portable
    }

    /// The highest available rung that passes its self-test. Looked for once per process; a rung that fails is logged, and the
    /// last one, which needs nothing of the CPU, is taken as it is: whoever gets here has opened a header by it.
    #[must_use]
    pub fn best() -> Self {
        static BEST: OnceLock<HashKernel> = OnceLock::new();
        *BEST.get_or_init(|| {
            let right = |kernel: &Self| {
                kernel.is_available()
                    && kernel
                        .self_test()
                        .inspect_err(|error| tracing::error!("hash kernel left out: {}", error.chain()))
                        .is_ok()
            };
            Self::ALL.into_iter().find(right).unwrap_or(Self::Portable)
        })
    }

    /// Known-answer test and comparison with the oracle, run once per process and remembered.
    ///
    /// # Errors
    /// `Unsupported` if this CPU cannot run the kernel, `Internal` if it gets a wrong answer.
    pub fn self_test(self) -> Result<()> {
        static PASSED: [OnceLock<bool>; 4] = [const { OnceLock::new() }; 4];
        if !self.is_available() {
            let what = format!("this CPU cannot run the hash kernel {}", self.name());
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        if *PASSED[self.index()].get_or_init(|| known_answers(self) && equals_oracle(self)) {
            Ok(())
        } else {
            Err(Error::new(ErrorKind::Internal, format!("self-test failed: hash kernel {}", self.name())))
        }
    }

    /// Of an available kernel.
    fn digests(self, units: &Units<'_>, out: &mut [Digest]) {
        assert!(self.is_available(), "only kernels of this CPU are used");
        assert_eq!(units.count(), out.len(), "a digest for each unit");
        match self {
            // SAFETY: the kernel is available, so the CPU has the features it needs.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { avx512::digests(units, out) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::ShaNi => unsafe { shani::digests(units, out) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { avx2::digests(units, out) },
            _ => portable(units, out),
        }
    }
}

/// The oracle.
fn portable(units: &Units<'_>, out: &mut [Digest]) {
    use sha2::Digest as _;
    for (at, out) in out.iter_mut().enumerate() {
        let mut state = sha2::Sha256::new_with_prefix(units.prefix);
        state.update(units.unit(at));
        if let Some((first, step)) = units.numbers {
            state.update(first.wrapping_add(at as u64 * step).to_be_bytes());
        }
        *out = state.finalize().into();
    }
}

/// The rung for this many units.
fn kernel_for(units: usize) -> HashKernel {
    let best = HashKernel::best();
    let few = best == HashKernel::Avx512 && units < FEW && HashKernel::ShaNi.self_test().is_ok();
    if few { HashKernel::ShaNi } else { best }
}

/// Hashes of the blocks of `bytes`, packed in their order into `out`: side by side for SHA-256, one after the other for others. What
/// follows the last whole block is not hashed: the ledger refuses a step whose hashes are too few.
///
/// # Panics
/// If blocks have no bytes, or `out` is not [`Hash::bytes`] for each whole one.
pub fn checksums(hash: Hash, block_bytes: usize, bytes: &[u8], out: &mut [u8]) {
    let bytes = &bytes[..bytes.len() - bytes.len() % block_bytes];
    assert_eq!(out.len(), bytes.len() / block_bytes * hash.bytes(), "room for a hash of each block");
    if hash == Hash::Sha256 && block_bytes.is_multiple_of(64) {
        let (digests, _) = out.as_chunks_mut();
        checksums_by(kernel_for(digests.len()), block_bytes, bytes, digests);
        return;
    }
    for (block, out) in bytes.chunks_exact(block_bytes).zip(out.chunks_exact_mut(hash.bytes())) {
        hash.digest(&[block], out);
    }
}

/// SHA-256 of each block, on the given kernel: for tests and benches.
///
/// # Panics
/// If this CPU does not have the kernel; if blocks are not multiples of 64 bytes, `bytes` is not whole blocks or `out` has not as
/// many.
pub fn checksums_by(kernel: HashKernel, block_bytes: usize, bytes: &[u8], out: &mut [Digest]) {
    kernel.digests(&Units::new(bytes, block_bytes, &[], None), out);
}

/// SHA-256 of `prefix`, the unit and the big-endian number of its first byte, for each unit; `first` is the number of byte 0.
pub(super) fn numbered(
    kernel: Option<HashKernel>,
    prefix: &[u8; 64],
    first: u64,
    unit_bytes: usize,
    bytes: &[u8],
    out: &mut [Digest],
) {
    let kernel = kernel.unwrap_or_else(|| kernel_for(out.len()));
    kernel.digests(&Units::new(bytes, unit_bytes, prefix, Some((first, unit_bytes as u64))), out);
}

/// A message of one block and its digest, from NIST's Cryptographic Algorithm Validation Program (SHA256ShortMsg, Len = 512).
const ANSWER: ([u8; 64], Digest) = (
    hex("5a86b737eaea8ee976a0a24da63e7ed7eefad18a101c1211e2b3650c5187c2a8\
         a650547208251f6d4237e661c7bf4c77f335390394c37fa1a9f9be836ac28509"),
    hex("42e61e174fbb3897d6dd6cef3dd2802fe67b331953b06114a65c772859dfc1aa"),
);

/// The published answer, in every lane.
fn known_answers(kernel: HashKernel) -> bool {
    let mut out = [[0; 32]; 33];
    kernel.digests(&Units::new(ANSWER.0.repeat(33).as_slice(), 64, &[], None), &mut out);
    out.iter().all(|digest| *digest == ANSWER.1)
}

/// Every loop of a kernel against the oracle: full and idle lanes, with and without prefix and number.
fn equals_oracle(kernel: HashKernel) -> bool {
    // Multiplicative hashing (Knuth) fills units with bytes that are all different enough.
    let bytes: Vec<u8> =
        (0..37 * 192_u32).map(|at| at.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    [1, 2, 3, 15, 37].into_iter().all(|count| {
        let bytes = &bytes[..count * 192];
        [
            Units::new(bytes, 192, &[], None),
            Units::new(bytes, 192, &[7; 64], Some((u64::from(u32::MAX) - 700, 192))),
        ]
        .iter()
        .all(|units| {
            let (mut expected, mut got) = (vec![[0; 32]; count], vec![[0; 32]; count]);
            portable(units, &mut expected);
            kernel.digests(units, &mut got);
            got == expected
        })
    })
}

#[cfg(test)]
mod tests;
