//! Eight lanes of AVX2, for CPUs without SHA instructions.
#![allow(unsafe_code)] // intrinsics

use std::arch::x86_64::*;

use super::lanes::{self, LANES_MAX, Lanes};
use super::{Digest, Units};

/// A word of eight units.
#[derive(Clone, Copy)]
struct Eight(__m256i);

impl Eight {
    /// a ⊕ b ⊕ c.
    #[inline(always)]
    unsafe fn xor3(a: Self, b: Self, c: Self) -> Self {
        // SAFETY: as the trait demands.
        Self(unsafe { _mm256_xor_si256(_mm256_xor_si256(a.0, b.0), c.0) })
    }

    /// Rotated right by `RIGHT`; `LEFT` is the rest to 32.
    #[inline(always)]
    unsafe fn ror<const RIGHT: i32, const LEFT: i32>(self) -> Self {
        const { assert!(RIGHT + LEFT == 32) };
        // SAFETY: as the trait demands.
        Self(unsafe {
            _mm256_or_si256(_mm256_srli_epi32::<RIGHT>(self.0), _mm256_slli_epi32::<LEFT>(self.0))
        })
    }
}

/// Eight rows of eight words to eight columns.
#[inline(always)]
unsafe fn transposed(a: [__m256i; 8]) -> [__m256i; 8] {
    // SAFETY: the caller vouches for the CPU.
    unsafe {
        let mut b = a;
        for i in [0, 4] {
            let low = [_mm256_unpacklo_epi32(a[i], a[i + 1]), _mm256_unpacklo_epi32(a[i + 2], a[i + 3])];
            let high = [_mm256_unpackhi_epi32(a[i], a[i + 1]), _mm256_unpackhi_epi32(a[i + 2], a[i + 3])];
            b[i] = _mm256_unpacklo_epi64(low[0], low[1]);
            b[i + 1] = _mm256_unpackhi_epi64(low[0], low[1]);
            b[i + 2] = _mm256_unpacklo_epi64(high[0], high[1]);
            b[i + 3] = _mm256_unpackhi_epi64(high[0], high[1]);
        }
        let mut c = b;
        for j in 0..4 {
            c[j] = _mm256_permute2x128_si256::<0x20>(b[j], b[j + 4]);
            c[j + 4] = _mm256_permute2x128_si256::<0x31>(b[j], b[j + 4]);
        }
        c
    }
}

impl Lanes for Eight {
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn splat(word: u32) -> Self {
        // SAFETY: as the trait demands.
        Self(unsafe { _mm256_set1_epi32(word.cast_signed()) })
    }

    #[inline(always)]
    unsafe fn of_words(words: &[u32; LANES_MAX]) -> Self {
        // SAFETY: eight of the words are 32 bytes.
        Self(unsafe { _mm256_loadu_si256(words.as_ptr().cast()) })
    }

    #[inline(always)]
    unsafe fn words(self, to: &mut [u32; LANES_MAX]) {
        // SAFETY: eight of the words are 32 bytes.
        unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), self.0) }
    }

    #[inline(always)]
    unsafe fn message(from: &[*const u8; LANES_MAX]) -> [Self; 16] {
        // SAFETY: each pointer has 64 readable bytes; the CPU is as the trait demands.
        unsafe {
            let swap = _mm256_set_epi32(
                0x0c0d_0e0f,
                0x0809_0a0b,
                0x0405_0607,
                0x0001_0203,
                0x0c0d_0e0f,
                0x0809_0a0b,
                0x0405_0607,
                0x0001_0203,
            );
            let zero = _mm256_setzero_si256();
            let mut words = [Self(zero); 16];
            for half in [0, 1] {
                let mut rows = [zero; 8];
                for (row, from) in rows.iter_mut().zip(from) {
                    let row_of = _mm256_loadu_si256(from.wrapping_add(32 * half).cast());
                    *row = _mm256_shuffle_epi8(row_of, swap);
                }
                for (word, column) in words[8 * half..].iter_mut().zip(transposed(rows)) {
                    *word = Self(column);
                }
            }
            words
        }
    }

    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: as the trait demands.
        Self(unsafe { _mm256_add_epi32(self.0, b.0) })
    }

    #[inline(always)]
    unsafe fn sum0(self) -> Self {
        // SAFETY: as the trait demands.
        unsafe { Self::xor3(self.ror::<2, 30>(), self.ror::<13, 19>(), self.ror::<22, 10>()) }
    }

    #[inline(always)]
    unsafe fn sum1(self) -> Self {
        // SAFETY: as the trait demands.
        unsafe { Self::xor3(self.ror::<6, 26>(), self.ror::<11, 21>(), self.ror::<25, 7>()) }
    }

    #[inline(always)]
    unsafe fn sigma0(self) -> Self {
        // SAFETY: as the trait demands.
        unsafe {
            let shifted = Self(_mm256_srli_epi32::<3>(self.0));
            Self::xor3(self.ror::<7, 25>(), self.ror::<18, 14>(), shifted)
        }
    }

    #[inline(always)]
    unsafe fn sigma1(self) -> Self {
        // SAFETY: as the trait demands.
        unsafe {
            let shifted = Self(_mm256_srli_epi32::<10>(self.0));
            Self::xor3(self.ror::<17, 15>(), self.ror::<19, 13>(), shifted)
        }
    }

    #[inline(always)]
    unsafe fn choose(self, f: Self, g: Self) -> Self {
        // SAFETY: as the trait demands.
        Self(unsafe { _mm256_xor_si256(_mm256_and_si256(_mm256_xor_si256(f.0, g.0), self.0), g.0) })
    }

    #[inline(always)]
    unsafe fn majority(self, b: Self, c: Self) -> Self {
        // SAFETY: as the trait demands.
        Self(unsafe {
            let (both, either) = (_mm256_and_si256(b.0, c.0), _mm256_or_si256(b.0, c.0));
            _mm256_or_si256(_mm256_and_si256(self.0, either), both)
        })
    }
}

/// Digests of all units.
///
/// # Safety
/// The CPU has AVX2.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn digests(units: &Units<'_>, out: &mut [Digest]) {
    let mut first = 0;
    for out in out.chunks_mut(Eight::LANES) {
        // SAFETY: this function enables the features the vector needs.
        unsafe { lanes::digest::<Eight>(units, first, out) };
        first += out.len();
    }
}
