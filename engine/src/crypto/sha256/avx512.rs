//! Sixteen lanes of AVX-512.
#![allow(unsafe_code)] // intrinsics

use std::arch::x86_64::*;

use super::lanes::{self, LANES_MAX, Lanes};
use super::{Digest, Units};

/// A word of sixteen units.
#[derive(Clone, Copy)]
struct Sixteen(__m512i);

impl Sixteen {
    /// a ⊕ b ⊕ c.
    #[inline(always)]
    unsafe fn xor3(a: __m512i, b: __m512i, c: __m512i) -> Self {
        // SAFETY: as the trait demands.
        Self(unsafe { _mm512_ternarylogic_epi32::<0x96>(a, b, c) })
    }
}

impl Lanes for Sixteen {
    const LANES: usize = 16;

    #[inline(always)]
    unsafe fn splat(word: u32) -> Self {
        // SAFETY: as the trait demands.
        Self(unsafe { _mm512_set1_epi32(word.cast_signed()) })
    }

    #[inline(always)]
    unsafe fn of_words(words: &[u32; LANES_MAX]) -> Self {
        // SAFETY: sixteen of the words are 64 bytes.
        Self(unsafe { _mm512_loadu_si512(words.as_ptr().cast()) })
    }

    #[inline(always)]
    unsafe fn words(self, to: &mut [u32; LANES_MAX]) {
        // SAFETY: sixteen of the words are 64 bytes.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), self.0) }
    }

    /// Each lane is read by one load of a whole cache line: units of 4096 bytes all lie in one set of the first-level cache, which
    /// has fewer ways than there are lanes, so a second visit to a line would fetch it again.
    #[inline(always)]
    unsafe fn message(from: &[*const u8; LANES_MAX]) -> [Self; 16] {
        // SAFETY: each pointer has 64 readable bytes; the CPU is as the trait demands.
        unsafe {
            let swap = _mm512_set4_epi32(0x0c0d_0e0f, 0x0809_0a0b, 0x0405_0607, 0x0001_0203);
            let zero = _mm512_setzero_si512();
            let (mut a, mut b) = ([zero; 16], [zero; 16]);
            for (a, from) in a.iter_mut().zip(from) {
                *a = _mm512_loadu_si512(from.cast());
            }
            // Words of pairs of lanes, then of four: quarter q of b[4·i + j] has word 4·q + j of lanes 4·i to 4·i + 3.
            for i in [0, 4, 8, 12] {
                let low = [_mm512_unpacklo_epi32(a[i], a[i + 1]), _mm512_unpacklo_epi32(a[i + 2], a[i + 3])];
                let high = [_mm512_unpackhi_epi32(a[i], a[i + 1]), _mm512_unpackhi_epi32(a[i + 2], a[i + 3])];
                b[i] = _mm512_unpacklo_epi64(low[0], low[1]);
                b[i + 1] = _mm512_unpackhi_epi64(low[0], low[1]);
                b[i + 2] = _mm512_unpacklo_epi64(high[0], high[1]);
                b[i + 3] = _mm512_unpackhi_epi64(high[0], high[1]);
            }
            // Quarters to their places: a transposition of four by four.
            let mut words = [Self(zero); 16];
            for j in 0..4 {
                let even = [
                    _mm512_shuffle_i32x4::<0x88>(b[j], b[j + 4]),
                    _mm512_shuffle_i32x4::<0x88>(b[j + 8], b[j + 12]),
                ];
                let odd = [
                    _mm512_shuffle_i32x4::<0xdd>(b[j], b[j + 4]),
                    _mm512_shuffle_i32x4::<0xdd>(b[j + 8], b[j + 12]),
                ];
                let swapped = |word| Self(_mm512_shuffle_epi8(word, swap));
                words[j] = swapped(_mm512_shuffle_i32x4::<0x88>(even[0], even[1]));
                words[j + 4] = swapped(_mm512_shuffle_i32x4::<0x88>(odd[0], odd[1]));
                words[j + 8] = swapped(_mm512_shuffle_i32x4::<0xdd>(even[0], even[1]));
                words[j + 12] = swapped(_mm512_shuffle_i32x4::<0xdd>(odd[0], odd[1]));
            }
            words
        }
    }

    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: as the trait demands.
        Self(unsafe { _mm512_add_epi32(self.0, b.0) })
    }

    #[inline(always)]
    unsafe fn sum0(self) -> Self {
        let x = self.0;
        // SAFETY: as the trait demands.
        unsafe { Self::xor3(_mm512_ror_epi32::<2>(x), _mm512_ror_epi32::<13>(x), _mm512_ror_epi32::<22>(x)) }
    }

    #[inline(always)]
    unsafe fn sum1(self) -> Self {
        let x = self.0;
        // SAFETY: as the trait demands.
        unsafe { Self::xor3(_mm512_ror_epi32::<6>(x), _mm512_ror_epi32::<11>(x), _mm512_ror_epi32::<25>(x)) }
    }

    #[inline(always)]
    unsafe fn sigma0(self) -> Self {
        let x = self.0;
        // SAFETY: as the trait demands.
        unsafe { Self::xor3(_mm512_ror_epi32::<7>(x), _mm512_ror_epi32::<18>(x), _mm512_srli_epi32::<3>(x)) }
    }

    #[inline(always)]
    unsafe fn sigma1(self) -> Self {
        let x = self.0;
        // SAFETY: as the trait demands.
        unsafe {
            Self::xor3(_mm512_ror_epi32::<17>(x), _mm512_ror_epi32::<19>(x), _mm512_srli_epi32::<10>(x))
        }
    }

    #[inline(always)]
    unsafe fn choose(self, f: Self, g: Self) -> Self {
        // SAFETY: as the trait demands.
        Self(unsafe { _mm512_ternarylogic_epi32::<0xca>(self.0, f.0, g.0) })
    }

    #[inline(always)]
    unsafe fn majority(self, b: Self, c: Self) -> Self {
        // SAFETY: as the trait demands.
        Self(unsafe { _mm512_ternarylogic_epi32::<0xe8>(self.0, b.0, c.0) })
    }
}

/// Digests of all units.
///
/// # Safety
/// The CPU has AVX-512 F and BW.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn digests(units: &Units<'_>, out: &mut [Digest]) {
    let mut first = 0;
    for out in out.chunks_mut(Sixteen::LANES) {
        // SAFETY: this function enables the features the vector needs.
        unsafe { lanes::digest::<Sixteen>(units, first, out) };
        first += out.len();
    }
}
