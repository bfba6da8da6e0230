//! VAES on AVX-512: four blocks in a register of 512 bits.
#![allow(unsafe_code)] // intrinsics

use std::arch::x86_64::*;

use super::schedule::Schedule;
use super::tweak::Counter;
use super::xts::{self, FLIGHT, Run, Vector};

/// Four blocks in one register.
///
/// `BY_BYTES` says how the tweaks of the steady state are shifted. Zen 5 runs bit shifts of quadwords for nothing and pays for
/// byte shifts; Intel's cores run bit shifts on port 0, which `vaesenc` needs in every cycle, and byte shifts on port 5.
#[derive(Clone, Copy)]
struct Blocks<const BY_BYTES: bool>(__m512i);

impl<const BY_BYTES: bool> Vector for Blocks<BY_BYTES> {
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
            let up = Self(_mm512_bslli_epi128::<4>(self.0));
            let poly = _mm512_set1_epi64(0x87);
            // The four bytes shifted out: at the bottom of the lane, or of its upper half.
            let back = if BY_BYTES {
                _mm512_clmulepi64_epi128::<0x00>(_mm512_bsrli_epi128::<12>(self.0), poly)
            } else {
                _mm512_clmulepi64_epi128::<0x01>(_mm512_srli_epi64::<32>(self.0), poly)
            };
            up.xor3(Self(back), c)
        }
    }

    #[inline(always)]
    unsafe fn times_bytes_xor<const BYTES: usize>(self, c: Self) -> Self {
        // SAFETY: as the trait demands.
        unsafe {
            let (up, out) = match BYTES {
                1 => (_mm512_bslli_epi128::<1>(self.0), _mm512_srli_epi64::<56>(self.0)),
                2 => (_mm512_bslli_epi128::<2>(self.0), _mm512_srli_epi64::<48>(self.0)),
                _ => (_mm512_bslli_epi128::<3>(self.0), _mm512_srli_epi64::<40>(self.0)),
            };
            Self(up).xor3(Self(_mm512_clmulepi64_epi128::<0x01>(out, _mm512_set1_epi64(0x87))), c)
        }
    }

    #[inline(always)]
    unsafe fn splat(from: *const u8) -> Self {
        // SAFETY: as the trait demands.
        Self(unsafe { _mm512_broadcast_i32x4(_mm_loadu_si128(from.cast())) })
    }

    #[inline(always)]
    unsafe fn times_small_xor<const J: usize>(self, c: Self) -> Self {
        // SAFETY: as the trait demands.
        unsafe {
            let lane = _mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3);
            let up = _mm512_add_epi64(lane, _mm512_set1_epi64((J as u64 * 4).cast_signed()));
            let down = _mm512_sub_epi64(_mm512_set1_epi64(64), up);
            let carry = _mm512_mask_blend_epi64(0b0101_0101, down, _mm512_set1_epi64(64));
            let up = Self(_mm512_sllv_epi64(self.0, up));
            let carry = Self(_mm512_srlv_epi64(_mm512_shuffle_epi32::<0b01_00_11_10>(self.0), carry));
            let reduced = Self(_mm512_clmulepi64_epi128::<0x01>(
                _mm512_srlv_epi64(self.0, down),
                _mm512_set1_epi64(0x87),
            ));
            up.xor3(carry, reduced).xor(c)
        }
    }

    #[inline]
    #[target_feature(enable = "aes,avx512f,avx512bw,avx512vl,vaes,vpclmulqdq")]
    unsafe fn in_step(x: &mut [Self; FLIGHT]) {
        let [a, b, c, d, e, f, g, h] = x;
        // SAFETY: no instruction at all; the registers are read and written only in the compiler's view.
        unsafe {
            std::arch::asm!(
                "/* {0} {1} {2} {3} {4} {5} {6} {7} */",
                inout(zmm_reg) a.0,
                inout(zmm_reg) b.0,
                inout(zmm_reg) c.0,
                inout(zmm_reg) d.0,
                inout(zmm_reg) e.0,
                inout(zmm_reg) f.0,
                inout(zmm_reg) g.0,
                inout(zmm_reg) h.0,
                options(nomem, nostack, preserves_flags)
            );
        }
    }
}

/// Encrypt a run in place.
///
/// # Safety
/// As [`xts::crypt`], on a CPU with the features named here.
#[target_feature(enable = "aes,avx512f,avx512bw,avx512vl,vaes,vpclmulqdq")]
pub(super) unsafe fn encrypt<const K: usize, const BY_BYTES: bool>(
    schedule: &Schedule,
    counter: &Counter,
    run: Run,
) {
    // SAFETY: the caller vouches for the run, the attribute for the features.
    unsafe { xts::crypt::<Blocks<BY_BYTES>, K, true>(schedule, counter, run) }
}

/// Decrypt a run in place.
///
/// # Safety
/// As [`xts::crypt`], on a CPU with the features named here.
#[target_feature(enable = "aes,avx512f,avx512bw,avx512vl,vaes,vpclmulqdq")]
pub(super) unsafe fn decrypt<const K: usize, const BY_BYTES: bool>(
    schedule: &Schedule,
    counter: &Counter,
    run: Run,
) {
    // SAFETY: the caller vouches for the run, the attribute for the features.
    unsafe { xts::crypt::<Blocks<BY_BYTES>, K, false>(schedule, counter, run) }
}

/// Decrypt with the old key and encrypt with the new one, in place.
///
/// # Safety
/// As [`xts::recrypt`], on a CPU with the features named here.
#[target_feature(enable = "aes,avx512f,avx512bw,avx512vl,vaes,vpclmulqdq")]
pub(super) unsafe fn recrypt<const OLD: usize, const NEW: usize, const BY_BYTES: bool>(
    old: (&Schedule, &Counter),
    new: (&Schedule, &Counter),
    run: Run,
) {
    // SAFETY: the caller vouches for the run, the attribute for the features.
    unsafe { xts::recrypt::<Blocks<BY_BYTES>, OLD, NEW>(old, new, run) }
}

#[cfg(test)]
mod tests {
    use proto::TweakKind;

    use super::*;
    use crate::crypto::{Kernel, Layout, VolumeKey};
    use crate::units::DataUnit;

    #[test]
    fn both_ways_to_shift_give_the_same_bytes() {
        if !Kernel::VaesAvx512.is_available() {
            eprintln!("SKIPPED: this CPU has no VAES on AVX-512");
            return;
        }
        let key: Vec<u8> = (0..64).collect();
        let key = VolumeKey::new(&key).expect("a key");
        let layout = Layout { unit_bytes: 4096, kind: TweakKind::Plain64, large: false, offset_sectors: 0 };
        let counter = layout.counter();
        let plain: Vec<u8> = (0..8 * 4096_u32).map(|at| (at % 251).to_le_bytes()[0]).collect();
        let run =
            |data: &mut [u8]| Run { units: 8, unit_bytes: 4096, first: DataUnit(5), data: data.as_mut_ptr() };
        let (mut one, mut two) = (plain.clone(), plain.clone());
        // SAFETY: the CPU was asked above; each run is a whole buffer of its own.
        unsafe {
            let schedule = Schedule::new(&key).expect("a schedule");
            encrypt::<15, true>(&schedule, &counter, run(&mut one));
            encrypt::<15, false>(&schedule, &counter, run(&mut two));
            assert!(one == two && one != plain);
            decrypt::<15, true>(&schedule, &counter, run(&mut two));
            recrypt::<15, 15, true>((&schedule, &counter), (&schedule, &counter), run(&mut one));
        }
        assert!(two == plain, "decrypt undoes encrypt");
        // SAFETY: as above.
        unsafe {
            let schedule = Schedule::new(&key).expect("a schedule");
            decrypt::<15, false>(&schedule, &counter, run(&mut one));
        }
        assert!(one == plain, "re-encryption with the same key is the identity");
    }
}
