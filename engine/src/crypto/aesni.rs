//! AES-NI: one block in a register of 128 bits.
#![allow(unsafe_code)] // intrinsics

use std::arch::x86_64::*;

use super::schedule::Schedule;
use super::tweak::Counter;
use super::xts::{self, FLIGHT, Run, Vector};

/// One blocks in one register.
#[derive(Clone, Copy)]
struct Blocks(__m128i);

impl Vector for Blocks {
    const LANES: usize = 1;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self {
        // SAFETY: as the trait demands.
        Self(unsafe { _mm_loadu_si128(from.cast()) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut u8) {
        // SAFETY: as the trait demands.
        unsafe { _mm_storeu_si128(to.cast(), self.0) }
    }

    #[inline(always)]
    unsafe fn xor(self, b: Self) -> Self {
        // SAFETY: as the trait demands.
        Self(unsafe { _mm_xor_si128(self.0, b.0) })
    }

    #[inline(always)]
    unsafe fn xor3(self, b: Self, c: Self) -> Self {
        // SAFETY: as the trait demands.
        Self(unsafe { _mm_xor_si128(_mm_xor_si128(self.0, b.0), c.0) })
    }

    #[inline(always)]
    unsafe fn round<const FORWARD: bool>(self, key: Self) -> Self {
        // SAFETY: as the trait demands.
        Self(unsafe {
            if FORWARD { _mm_aesenc_si128(self.0, key.0) } else { _mm_aesdec_si128(self.0, key.0) }
        })
    }

    #[inline(always)]
    unsafe fn last_round<const FORWARD: bool>(self, key: Self) -> Self {
        // SAFETY: as the trait demands.
        Self(unsafe {
            if FORWARD { _mm_aesenclast_si128(self.0, key.0) } else { _mm_aesdeclast_si128(self.0, key.0) }
        })
    }

    #[inline(always)]
    unsafe fn advance_xor(self, c: Self) -> Self {
        // SAFETY: as the trait demands.
        unsafe {
            let up = Self(_mm_bslli_si128::<1>(self.0));
            let out = _mm_srli_epi64::<56>(self.0);
            up.xor3(Self(_mm_clmulepi64_si128::<0x01>(out, _mm_set1_epi64x(0x87))), c)
        }
    }

    #[inline(always)]
    unsafe fn times_bytes_xor<const BYTES: usize>(self, c: Self) -> Self {
        // SAFETY: as the trait demands.
        unsafe {
            let (up, out) = match BYTES {
                1 => (_mm_bslli_si128::<1>(self.0), _mm_srli_epi64::<56>(self.0)),
                2 => (_mm_bslli_si128::<2>(self.0), _mm_srli_epi64::<48>(self.0)),
                _ => (_mm_bslli_si128::<3>(self.0), _mm_srli_epi64::<40>(self.0)),
            };
            Self(up).xor3(Self(_mm_clmulepi64_si128::<0x01>(out, _mm_set1_epi64x(0x87))), c)
        }
    }

    #[inline(always)]
    unsafe fn splat(from: *const u8) -> Self {
        // SAFETY: as the trait demands.
        Self(unsafe { _mm_loadu_si128(from.cast()) })
    }

    #[inline(always)]
    unsafe fn times_small_xor<const J: usize>(self, c: Self) -> Self {
        // SAFETY: as the trait demands.
        unsafe {
            // One lane, so one shift for the whole register.
            let up = Self(_mm_sll_epi64(self.0, _mm_cvtsi64_si128((J as u64).cast_signed())));
            let out = _mm_srl_epi64(self.0, _mm_cvtsi64_si128((64 - J as u64).cast_signed()));
            let carry = Self(_mm_bslli_si128::<8>(out));
            let reduced = Self(_mm_clmulepi64_si128::<0x01>(out, _mm_set1_epi64x(0x87)));
            up.xor3(carry, reduced).xor(c)
        }
    }

    #[inline]
    #[target_feature(enable = "aes,pclmulqdq,sse2")]
    unsafe fn in_step(x: &mut [Self; FLIGHT]) {
        let [a, b, c, d, e, f, g, h] = x;
        // SAFETY: no instruction at all; the registers are read and written only in the compiler's view.
        unsafe {
            std::arch::asm!(
                "/* {0} {1} {2} {3} {4} {5} {6} {7} */",
                inout(xmm_reg) a.0,
                inout(xmm_reg) b.0,
                inout(xmm_reg) c.0,
                inout(xmm_reg) d.0,
                inout(xmm_reg) e.0,
                inout(xmm_reg) f.0,
                inout(xmm_reg) g.0,
                inout(xmm_reg) h.0,
                options(nomem, nostack, preserves_flags)
            );
        }
    }
}

/// Encrypt a run in place.
///
/// # Safety
/// As [`xts::crypt`], on a CPU with the features named here.
#[target_feature(enable = "aes,pclmulqdq,sse2")]
pub(super) unsafe fn encrypt<const K: usize>(schedule: &Schedule, counter: &Counter, run: Run) {
    // SAFETY: the caller vouches for the run, the attribute for the features.
    unsafe { xts::crypt::<Blocks, K, true>(schedule, counter, run) }
}

/// Decrypt a run in place.
///
/// # Safety
/// As [`xts::crypt`], on a CPU with the features named here.
#[target_feature(enable = "aes,pclmulqdq,sse2")]
pub(super) unsafe fn decrypt<const K: usize>(schedule: &Schedule, counter: &Counter, run: Run) {
    // SAFETY: the caller vouches for the run, the attribute for the features.
    unsafe { xts::crypt::<Blocks, K, false>(schedule, counter, run) }
}

/// Decrypt with the old key and encrypt with the new one, in place.
///
/// # Safety
/// As [`xts::recrypt`], on a CPU with the features named here.
#[target_feature(enable = "aes,pclmulqdq,sse2")]
pub(super) unsafe fn recrypt<const OLD: usize, const NEW: usize>(
    old: (&Schedule, &Counter),
    new: (&Schedule, &Counter),
    run: Run,
) {
    // SAFETY: the caller vouches for the run, the attribute for the features.
    unsafe { xts::recrypt::<Blocks, OLD, NEW>(old, new, run) }
}
