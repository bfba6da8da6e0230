//! VAES on AVX2: two blocks in a register of 256 bits.
#![allow(unsafe_code)] // intrinsics

use std::arch::x86_64::*;

use super::schedule::Schedule;
use super::tweak::Counter;
use super::xts::{self, FLIGHT, Run, Vector};

/// Two blocks in one register.
#[derive(Clone, Copy)]
struct Blocks(__m256i);

impl Vector for Blocks {
    const LANES: usize = 2;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self {
        // SAFETY: as the trait demands.
        Self(unsafe { _mm256_loadu_si256(from.cast()) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut u8) {
        // SAFETY: as the trait demands.
        unsafe { _mm256_storeu_si256(to.cast(), self.0) }
    }

    #[inline(always)]
    unsafe fn xor(self, b: Self) -> Self {
        // SAFETY: as the trait demands.
        Self(unsafe { _mm256_xor_si256(self.0, b.0) })
    }

    #[inline(always)]
    unsafe fn xor3(self, b: Self, c: Self) -> Self {
        // SAFETY: as the trait demands.
        Self(unsafe { _mm256_xor_si256(_mm256_xor_si256(self.0, b.0), c.0) })
    }

    #[inline(always)]
    unsafe fn round<const FORWARD: bool>(self, key: Self) -> Self {
        // SAFETY: as the trait demands.
        Self(unsafe {
            if FORWARD { _mm256_aesenc_epi128(self.0, key.0) } else { _mm256_aesdec_epi128(self.0, key.0) }
        })
    }

    #[inline(always)]
    unsafe fn last_round<const FORWARD: bool>(self, key: Self) -> Self {
        // SAFETY: as the trait demands.
        Self(unsafe {
            if FORWARD {
                _mm256_aesenclast_epi128(self.0, key.0)
            } else {
                _mm256_aesdeclast_epi128(self.0, key.0)
            }
        })
    }

    #[inline(always)]
    unsafe fn advance_xor(self, c: Self) -> Self {
        // SAFETY: as the trait demands.
        unsafe {
            let up = Self(_mm256_bslli_epi128::<2>(self.0));
            let out = _mm256_srli_epi64::<48>(self.0);
            up.xor3(Self(_mm256_clmulepi64_epi128::<0x01>(out, _mm256_set1_epi64x(0x87))), c)
        }
    }

    #[inline(always)]
    unsafe fn times_bytes_xor<const BYTES: usize>(self, c: Self) -> Self {
        // SAFETY: as the trait demands.
        unsafe {
            let (up, out) = match BYTES {
                1 => (_mm256_bslli_epi128::<1>(self.0), _mm256_srli_epi64::<56>(self.0)),
                2 => (_mm256_bslli_epi128::<2>(self.0), _mm256_srli_epi64::<48>(self.0)),
                _ => (_mm256_bslli_epi128::<3>(self.0), _mm256_srli_epi64::<40>(self.0)),
            };
            Self(up).xor3(Self(_mm256_clmulepi64_epi128::<0x01>(out, _mm256_set1_epi64x(0x87))), c)
        }
    }

    #[inline(always)]
    unsafe fn splat(from: *const u8) -> Self {
        // SAFETY: as the trait demands.
        Self(unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(from.cast())) })
    }

    #[inline(always)]
    unsafe fn times_small_xor<const J: usize>(self, c: Self) -> Self {
        // SAFETY: as the trait demands.
        unsafe {
            let lane = _mm256_setr_epi64x(0, 0, 1, 1);
            let up = _mm256_add_epi64(lane, _mm256_set1_epi64x((J as u64 * 2).cast_signed()));
            let down = _mm256_sub_epi64(_mm256_set1_epi64x(64), up);
            let carry = _mm256_blend_epi32::<0b0011_0011>(down, _mm256_set1_epi64x(64));
            let up = Self(_mm256_sllv_epi64(self.0, up));
            let carry = Self(_mm256_srlv_epi64(_mm256_shuffle_epi32::<0b01_00_11_10>(self.0), carry));
            let reduced = Self(_mm256_clmulepi64_epi128::<0x01>(
                _mm256_srlv_epi64(self.0, down),
                _mm256_set1_epi64x(0x87),
            ));
            up.xor3(carry, reduced).xor(c)
        }
    }

    #[inline]
    #[target_feature(enable = "aes,avx2,vaes,vpclmulqdq")]
    unsafe fn in_step(x: &mut [Self; FLIGHT]) {
        let [a, b, c, d, e, f, g, h] = x;
        // SAFETY: no instruction at all; the registers are read and written only in the compiler's view.
        unsafe {
            std::arch::asm!(
                "/* {0} {1} {2} {3} {4} {5} {6} {7} */",
                inout(ymm_reg) a.0,
                inout(ymm_reg) b.0,
                inout(ymm_reg) c.0,
                inout(ymm_reg) d.0,
                inout(ymm_reg) e.0,
                inout(ymm_reg) f.0,
                inout(ymm_reg) g.0,
                inout(ymm_reg) h.0,
                options(nomem, nostack, preserves_flags)
            );
        }
    }
}

/// Encrypt a run in place.
///
/// # Safety
/// As [`xts::crypt`], on a CPU with the features named here.
#[target_feature(enable = "aes,avx2,vaes,vpclmulqdq")]
pub(super) unsafe fn encrypt<const K: usize>(schedule: &Schedule, counter: &Counter, run: Run) {
    // SAFETY: the caller vouches for the run, the attribute for the features.
    unsafe { xts::crypt::<Blocks, K, true>(schedule, counter, run) }
}

/// Decrypt a run in place.
///
/// # Safety
/// As [`xts::crypt`], on a CPU with the features named here.
#[target_feature(enable = "aes,avx2,vaes,vpclmulqdq")]
pub(super) unsafe fn decrypt<const K: usize>(schedule: &Schedule, counter: &Counter, run: Run) {
    // SAFETY: the caller vouches for the run, the attribute for the features.
    unsafe { xts::crypt::<Blocks, K, false>(schedule, counter, run) }
}

/// Decrypt with the old key and encrypt with the new one, in place.
///
/// # Safety
/// As [`xts::recrypt`], on a CPU with the features named here.
#[target_feature(enable = "aes,avx2,vaes,vpclmulqdq")]
pub(super) unsafe fn recrypt<const OLD: usize, const NEW: usize>(
    old: (&Schedule, &Counter),
    new: (&Schedule, &Counter),
    run: Run,
) {
    // SAFETY: the caller vouches for the run, the attribute for the features.
    unsafe { xts::recrypt::<Blocks, OLD, NEW>(old, new, run) }
}
