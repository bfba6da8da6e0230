//! AES key schedules as the instruction-set kernels want them: every round key repeated to fill 512 bits, in both
//! directions, in locked memory. FIPS 197 §5.2; decryption keys are those of the equivalent inverse cipher (§5.3.5).
//!
//! Only for CPUs with AES-NI: the substitution box is the instruction's own, so expansion reads no table and takes the same
//! time for every key.
#![allow(unsafe_code)] // AES-NI intrinsics

use std::arch::x86_64::{
    __m128i, _mm_aesenclast_si128, _mm_aesimc_si128, _mm_cvtsi128_si32, _mm_loadu_si128, _mm_set1_epi32,
    _mm_setzero_si128, _mm_storeu_si128,
};

use super::secret::{Locked, VolumeKey};
use crate::error::Result;

/// A round key, four times over: any vector width loads its own part.
pub(super) type RoundKey = [u8; 64];

/// Round keys of AES-256; AES-128 uses the first eleven.
pub(super) const ROUND_KEYS: usize = 15;

/// All an XTS kernel needs of a volume key.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Schedule {
    /// Data key, in the order encryption uses them.
    pub(super) encrypt: [RoundKey; ROUND_KEYS],
    /// Data key, in the order decryption uses them.
    pub(super) decrypt: [RoundKey; ROUND_KEYS],
    /// Tweak key; tweaks are only ever encrypted.
    pub(super) tweak: [RoundKey; ROUND_KEYS],
}

impl Schedule {
    /// Expand a volume key, in place in locked memory.
    ///
    /// # Safety
    /// The CPU must have AES-NI.
    pub(super) unsafe fn new(key: &VolumeKey) -> Result<Locked<Self>> {
        let empty = [[0; 64]; ROUND_KEYS];
        let mut schedule = Locked::new(Self { encrypt: empty, decrypt: empty, tweak: empty })?;
        // SAFETY: the caller vouches for AES-NI.
        unsafe {
            expand(key.data_half(), &mut schedule.encrypt);
            expand(key.tweak_half(), &mut schedule.tweak);
            let Self { encrypt, decrypt, .. } = &mut *schedule;
            invert(&encrypt[..rounds(key.bits()) + 1], decrypt);
        }
        Ok(schedule)
    }
}

/// Rounds of AES by key size.
pub(super) fn rounds(key_bits: u32) -> usize {
    if key_bits == 128 { 10 } else { 14 }
}

/// `SubWord` of FIPS 197: with the same word in all four columns, `ShiftRows` changes nothing, and the last round with a
/// zero key is the substitution alone.
#[target_feature(enable = "aes,sse2")]
fn substitute(word: u32) -> u32 {
    let columns = _mm_set1_epi32(word.cast_signed());
    _mm_cvtsi128_si32(_mm_aesenclast_si128(columns, _mm_setzero_si128())).cast_unsigned()
}

#[target_feature(enable = "aes,sse2")]
fn expand(key: &[u8], out: &mut [RoundKey; ROUND_KEYS]) {
    let words_in_key = key.len() / 4;
    let words = 4 * (words_in_key + 7);
    let put = |out: &mut [RoundKey; ROUND_KEYS], at: usize, word: u32| {
        for copy in 0..4 {
            let start = copy * 16 + at % 4 * 4;
            out[at / 4][start..start + 4].copy_from_slice(&word.to_le_bytes());
        }
    };
    let get = |out: &[RoundKey; ROUND_KEYS], at: usize| {
        let start = at % 4 * 4;
        u32::from_le_bytes(out[at / 4][start..start + 4].try_into().expect("four bytes"))
    };
    let mut round_constant = 1_u32;
    for at in 0..words {
        if at < words_in_key {
            put(out, at, u32::from_le_bytes(key[at * 4..at * 4 + 4].try_into().expect("four bytes")));
            continue;
        }
        let mut word = get(out, at - 1);
        if at % words_in_key == 0 {
            // RotWord moves the first byte to the end: a rotation to the right of the little-endian word.
            word = substitute(word).rotate_right(8) ^ round_constant;
            // The ten constants AES needs: powers of x, reduced once past 0x80.
            round_constant = if round_constant == 0x80 { 0x1b } else { round_constant << 1 };
        } else if words_in_key > 6 && at % words_in_key == 4 {
            word = substitute(word);
        }
        put(out, at, word ^ get(out, at - words_in_key));
    }
}

#[target_feature(enable = "aes,sse2")]
fn invert(encrypt: &[RoundKey], out: &mut [RoundKey; ROUND_KEYS]) {
    let last = encrypt.len() - 1;
    for (at, round_key) in encrypt.iter().rev().enumerate() {
        // SAFETY: both are 64 bytes long, four times 16.
        let mut column: __m128i = unsafe { _mm_loadu_si128(round_key.as_ptr().cast()) };
        if at != 0 && at != last {
            column = _mm_aesimc_si128(column);
        }
        for copy in 0..4 {
            // SAFETY: `copy * 16 + 16 <= 64`.
            unsafe { _mm_storeu_si128(out[at].as_mut_ptr().add(copy * 16).cast(), column) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).expect("hex")).collect()
    }

    /// FIPS 197 appendices A.1 and A.3: the last round key of the worked examples.
    #[test]
    fn expands_the_examples_of_fips_197() {
        if !std::arch::is_x86_feature_detected!("aes") {
            eprintln!("skipped: this CPU has no AES-NI");
            return;
        }
        let examples = [
            ("2b7e151628aed2a6abf7158809cf4f3c", 10, "d014f9a8c9ee2589e13f0cc8b6630ca6"),
            (
                "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4",
                14,
                "fe4890d1e6188d0b046df344706c631e",
            ),
        ];
        for (key, last, expected) in examples {
            let mut out = [[0; 64]; ROUND_KEYS];
            // SAFETY: AES-NI was detected above.
            unsafe { expand(&hex(key), &mut out) };
            assert_eq!(out[last][..16], hex(expected));
            assert_eq!(out[last][48..], hex(expected));
        }
    }
}
