//! VAES on AVX-512: four blocks in a register of 512 bits.
#![allow(unsafe_code)] // intrinsics

use std::arch::x86_64::*;

use super::schedule::Schedule;
use super::tweak::Counter;
use super::xts::{self, Run, Vector};

/// Four blocks in one register.
#[derive(Clone, Copy)]
struct Blocks(__m512i);

impl Vector for Blocks {
    const LANES: usize = 4;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self {
        // SAFETY: as the trait demands.
        Self(unsafe { _mm512_loadu_si512(from.cast()) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut u8) {
        // SAFETY: as the trait demands.
        unsafe { _mm512_storeu_si512(to.cast(), self.0) }
    }

    #[inline(always)]
    unsafe fn xor(self, b: Self) -> Self {
        // SAFETY: as the trait demands.
        Self(unsafe { _mm512_xor_si512(self.0, b.0) })
    }

    #[inline(always)]
    unsafe fn xor3(self, b: Self, c: Self) -> Self {
        // SAFETY: as the trait demands.
        Self(unsafe { _mm512_ternarylogic_epi64::<0x96>(self.0, b.0, c.0) })
    }

    #[inline(always)]
    unsafe fn round<const FORWARD: bool>(self, key: Self) -> Self {
        // SAFETY: as the trait demands.
        Self(unsafe {
            if FORWARD { _mm512_aesenc_epi128(self.0, key.0) } else { _mm512_aesdec_epi128(self.0, key.0) }
        })
    }

    #[inline(always)]
    unsafe fn last_round<const FORWARD: bool>(self, key: Self) -> Self {
        // SAFETY: as the trait demands.
        Self(unsafe {
            if FORWARD {
                _mm512_aesenclast_epi128(self.0, key.0)
            } else {
                _mm512_aesdeclast_epi128(self.0, key.0)
            }
        })
    }

    #[inline(always)]
    unsafe fn advance_xor(self, c: Self) -> Self {
        // SAFETY: as the trait demands.
        unsafe {
            let shifted = Self(_mm512_bslli_epi128::<4>(self.0));
            let out = _mm512_bsrli_epi128::<{ 16 - 4 }>(self.0);
            shifted.xor3(Self(_mm512_clmulepi64_epi128::<0>(out, _mm512_set1_epi64(0x87))), c)
        }
    }
}

/// Encrypt a run in place.
///
/// # Safety
/// As [`xts::crypt`], on a CPU with the features named here.
#[target_feature(enable = "aes,avx512f,avx512bw,avx512vl,vaes,vpclmulqdq")]
pub(super) unsafe fn encrypt<const K: usize>(schedule: &Schedule, counter: &Counter, run: Run) {
    // SAFETY: the caller vouches for the run, the attribute for the features.
    unsafe { xts::crypt::<Blocks, K, true>(schedule, counter, run) }
}

/// Decrypt a run in place.
///
/// # Safety
/// As [`xts::crypt`], on a CPU with the features named here.
#[target_feature(enable = "aes,avx512f,avx512bw,avx512vl,vaes,vpclmulqdq")]
pub(super) unsafe fn decrypt<const K: usize>(schedule: &Schedule, counter: &Counter, run: Run) {
    // SAFETY: the caller vouches for the run, the attribute for the features.
    unsafe { xts::crypt::<Blocks, K, false>(schedule, counter, run) }
}

/// Decrypt with the old key and encrypt with the new one, in place.
///
/// # Safety
/// As [`xts::recrypt`], on a CPU with the features named here.
#[target_feature(enable = "aes,avx512f,avx512bw,avx512vl,vaes,vpclmulqdq")]
pub(super) unsafe fn recrypt<const OLD: usize, const NEW: usize>(
    old: (&Schedule, &Counter),
    new: (&Schedule, &Counter),
    run: Run,
) {
    // SAFETY: the caller vouches for the run, the attribute for the features.
    unsafe { xts::recrypt::<Blocks, OLD, NEW>(old, new, run) }
}
