//! XTS over vectors of AES blocks, whatever their width: the one loop the instruction-set kernels share.
//!
//! A *stride* is eight vectors in flight: 8·L blocks for vectors of L blocks. Eight independent streams cover the latency of
//! the AES instruction on every CPU it exists on. Per data unit: expand the encrypted tweak T into the tweaks of the first
//! stride, then advance every vector by x^(8·L) from stride to stride, independently of the others. A tail shorter than a
//! stride goes through a scratch stride.
//!
//! What is carried is not T but U = T ⊕ k_last. The first whitening is then one three-way xor of data, U and
//! (k_first ⊕ k_last), the last round takes U itself as its key and so whitens for free, and the step is
//! U' = x^n·U ⊕ C with C = k_last ⊕ x^n·k_last.
//!
//! Refuses: ciphertext stealing (data units are whole blocks) and partial units.
#![allow(unsafe_code)] // calls into the instruction-set vectors, pointers into the caller's buffer

use super::schedule::{RoundKey, Schedule};
use super::tweak::Counter;
use crate::units::DataUnit;

/// Vectors in flight.
pub(super) const FLIGHT: usize = 8;
/// Tweaks of the widest stride.
const TWEAKS_MAX: usize = FLIGHT * 4;

/// A register of AES blocks.
///
/// # Safety
/// Every method needs the CPU features of the implementing module; the pointers need `16 * LANES` valid bytes, of any
/// alignment. All are `#[inline(always)]` into a function that enables those features.
pub(super) trait Vector: Copy {
    /// Blocks in a vector.
    const LANES: usize;
    /// Read.
    unsafe fn load(from: *const u8) -> Self;
    /// Write.
    unsafe fn store(self, to: *mut u8);
    /// a ⊕ b.
    unsafe fn xor(self, b: Self) -> Self;
    /// a ⊕ b ⊕ c.
    unsafe fn xor3(self, b: Self, c: Self) -> Self;
    /// One round of encryption (`FORWARD`) or decryption.
    unsafe fn round<const FORWARD: bool>(self, key: Self) -> Self;
    /// The last round.
    unsafe fn last_round<const FORWARD: bool>(self, key: Self) -> Self;
    /// Every block times x^(8·LANES) in GF(2^128), then ⊕ c: shifted up by `LANES` bytes; the bytes shifted out, multiplied by
    /// x^7 + x^2 + x + 1, come back at the bottom.
    unsafe fn advance_xor(self, c: Self) -> Self;
    /// Every block times x^8, then ⊕ c.
    unsafe fn times_x8_xor(self, c: Self) -> Self;
    /// One block, in every lane.
    unsafe fn splat(from: *const u8) -> Self;
    /// Lane l times x^(J·LANES + l), then ⊕ c; for exponents below 8.
    unsafe fn times_small_xor<const J: usize>(self, c: Self) -> Self;
    /// Nothing, for every vector in flight at once: a fence for the compiler's instruction scheduler. Without it LLVM,
    /// to save registers, runs two vectors through all rounds before the next two, and the latency of the AES instruction
    /// shows.
    unsafe fn in_step(x: &mut [Self; FLIGHT]);
}

/// `$body` for every vector in flight, unrolled, so that arrays indexed by `$j` live in registers.
macro_rules! in_flight {
    (|$j:ident| $body:expr) => {{
        {
            const $j: usize = 0;
            $body;
        }
        {
            const $j: usize = 1;
            $body;
        }
        {
            const $j: usize = 2;
            $body;
        }
        {
            const $j: usize = 3;
            $body;
        }
        {
            const $j: usize = 4;
            $body;
        }
        {
            const $j: usize = 5;
            $body;
        }
        {
            const $j: usize = 6;
            $body;
        }
        {
            const $j: usize = 7;
            $body;
        }
    }};
}

#[repr(align(64))]
struct Tweaks([u128; TWEAKS_MAX]);

#[repr(align(64))]
struct Scratch([u8; TWEAKS_MAX * 16]);

/// Bytes of a run of whole data units, as the kernels take it.
#[derive(Clone, Copy)]
pub(super) struct Run {
    /// The first byte.
    pub(super) data: *mut u8,
    /// How many units.
    pub(super) units: usize,
    /// Bytes of each, a multiple of 16.
    pub(super) unit_bytes: usize,
    /// Index of the first.
    pub(super) first: DataUnit,
}

#[inline(always)]
unsafe fn key<V: Vector>(keys: &[RoundKey], round: usize) -> V {
    // SAFETY: a round key has the bytes of the widest vector.
    unsafe { V::load(keys[round].as_ptr()) }
}

/// T of up to 8·L units from `first` on.
#[inline(always)]
unsafe fn encrypt_tweaks<V: Vector, const K: usize>(
    keys: &[RoundKey; K],
    counter: &Counter,
    first: u64,
    units: usize,
    out: &mut Tweaks,
) {
    for (at, tweak) in out.0.iter_mut().take(units).enumerate() {
        *tweak = u128::from(counter.at(DataUnit(first.wrapping_add(at as u64))));
    }
    // SAFETY: `out` holds `TWEAKS_MAX >= FLIGHT * LANES` blocks; the caller vouches for the CPU.
    unsafe {
        let base = out.0.as_mut_ptr().cast::<u8>();
        let at = |j: usize| base.wrapping_add(j * 16 * V::LANES);
        let whitening = key::<V>(keys, 0);
        let mut x = [whitening; FLIGHT];
        in_flight!(|J| x[J] = V::load(at(J)).xor(whitening));
        for round in 1..K - 1 {
            let round_key = key::<V>(keys, round);
            in_flight!(|J| x[J] = x[J].round::<true>(round_key));
            V::in_step(&mut x);
        }
        let round_key = key::<V>(keys, K - 1);
        in_flight!(|J| x[J].last_round::<true>(round_key).store(at(J)));
    }
}

/// The U of a unit's first stride, from its T: exponents below 8 by shifts of bits, the others by shifts of a byte from those.
#[inline(always)]
unsafe fn expand<V: Vector>(t: &u128, k_last: V, x8_step: V) -> [V; FLIGHT] {
    // SAFETY: a block is 16 bytes; the caller vouches for the CPU.
    unsafe {
        let t = V::splat((&raw const *t).cast());
        let mut u = [k_last; FLIGHT];
        in_flight!(|J| {
            u[J] = if J * V::LANES < 8 {
                t.times_small_xor::<J>(k_last)
            } else {
                u[J - 8 / V::LANES].times_x8_xor(x8_step)
            }
        });
        u
    }
}

/// One stride in place.
#[inline(always)]
unsafe fn stride<V: Vector, const K: usize, const FORWARD: bool>(
    keys: &[RoundKey; K],
    whitening: V,
    u: &[V; FLIGHT],
    data: *mut u8,
) {
    let at = |j: usize| data.wrapping_add(j * 16 * V::LANES);
    // SAFETY: the caller vouches for a stride of bytes at `data` and for the CPU.
    unsafe {
        let mut x = *u;
        in_flight!(|J| x[J] = V::load(at(J)).xor3(x[J], whitening));
        for round in 1..K - 1 {
            let round_key = key::<V>(keys, round);
            in_flight!(|J| x[J] = x[J].round::<FORWARD>(round_key));
            V::in_step(&mut x);
        }
        in_flight!(|J| x[J].last_round::<FORWARD>(u[J]).store(at(J)));
    }
}

/// Encrypt (`FORWARD`) or decrypt a run in place. `K` is the number of round keys, 11 or 15.
///
/// # Safety
/// `run` must be valid for writes and exclusive to the caller; the CPU must have the features of `V`.
#[inline(always)]
pub(super) unsafe fn crypt<V: Vector, const K: usize, const FORWARD: bool>(
    schedule: &Schedule,
    counter: &Counter,
    run: Run,
) {
    let keys: &[RoundKey; K] = if FORWARD { &schedule.encrypt } else { &schedule.decrypt }
        .first_chunk()
        .expect("K is at most ROUND_KEYS");
    let tweak_keys: &[RoundKey; K] = schedule.tweak.first_chunk().expect("K is at most ROUND_KEYS");
    let stride_bytes = FLIGHT * 16 * V::LANES;
    let group = FLIGHT * V::LANES;
    let mut tweaks = Tweaks([0; TWEAKS_MAX]);
    // SAFETY: all offsets below stay within `units * unit_bytes`; the caller vouches for the run and the CPU.
    unsafe {
        let k_last = key::<V>(keys, K - 1);
        let whitening = key::<V>(keys, 0).xor(k_last);
        let step = k_last.advance_xor(k_last);
        let x8_step = k_last.times_x8_xor(k_last);
        for unit in 0..run.units {
            if unit % group == 0 {
                let count = group.min(run.units - unit);
                encrypt_tweaks::<V, K>(
                    tweak_keys,
                    counter,
                    run.first.0.wrapping_add(unit as u64),
                    count,
                    &mut tweaks,
                );
            }
            let mut u = expand(&tweaks.0[unit % group], k_last, x8_step);
            let data = run.data.add(unit * run.unit_bytes);
            let mut done = 0;
            while done + stride_bytes <= run.unit_bytes {
                stride::<V, K, FORWARD>(keys, whitening, &u, data.add(done));
                in_flight!(|J| u[J] = u[J].advance_xor(step));
                done += stride_bytes;
            }
            let left = run.unit_bytes - done;
            if left != 0 {
                let mut scratch = Scratch([0; TWEAKS_MAX * 16]);
                data.add(done).copy_to_nonoverlapping(scratch.0.as_mut_ptr(), left);
                stride::<V, K, FORWARD>(keys, whitening, &u, scratch.0.as_mut_ptr());
                scratch.0.as_ptr().copy_to_nonoverlapping(data.add(done), left);
            }
        }
    }
}

/// Decrypt with the old schedule and encrypt with the new one, in registers, in one pass.
///
/// # Safety
/// As [`crypt`]. `run.first` is the index of the first unit on both sides.
#[inline(always)]
pub(super) unsafe fn recrypt<V: Vector, const OLD: usize, const NEW: usize>(
    old: (&Schedule, &Counter),
    new: (&Schedule, &Counter),
    run: Run,
) {
    let old_keys: &[RoundKey; OLD] = old.0.decrypt.first_chunk().expect("OLD is at most ROUND_KEYS");
    let new_keys: &[RoundKey; NEW] = new.0.encrypt.first_chunk().expect("NEW is at most ROUND_KEYS");
    let old_tweak_keys: &[RoundKey; OLD] = old.0.tweak.first_chunk().expect("OLD is at most ROUND_KEYS");
    let new_tweak_keys: &[RoundKey; NEW] = new.0.tweak.first_chunk().expect("NEW is at most ROUND_KEYS");
    let stride_bytes = FLIGHT * 16 * V::LANES;
    let group = FLIGHT * V::LANES;
    let mut old_tweaks = Tweaks([0; TWEAKS_MAX]);
    let mut new_tweaks = Tweaks([0; TWEAKS_MAX]);
    // SAFETY: all offsets below stay within `units * unit_bytes`; the caller vouches for the run and the CPU.
    unsafe {
        let old_last = key::<V>(old_keys, OLD - 1);
        let new_last = key::<V>(new_keys, NEW - 1);
        let old_whitening = key::<V>(old_keys, 0).xor(old_last);
        let new_whitening = key::<V>(new_keys, 0).xor(new_last);
        let old_step = old_last.advance_xor(old_last);
        let new_step = new_last.advance_xor(new_last);
        let old_x8_step = old_last.times_x8_xor(old_last);
        let new_x8_step = new_last.times_x8_xor(new_last);
        for unit in 0..run.units {
            if unit % group == 0 {
                let first = run.first.0.wrapping_add(unit as u64);
                let count = group.min(run.units - unit);
                encrypt_tweaks::<V, OLD>(old_tweak_keys, old.1, first, count, &mut old_tweaks);
                encrypt_tweaks::<V, NEW>(new_tweak_keys, new.1, first, count, &mut new_tweaks);
            }
            let mut u = expand(&old_tweaks.0[unit % group], old_last, old_x8_step);
            let mut w = expand(&new_tweaks.0[unit % group], new_last, new_x8_step);
            let data = run.data.add(unit * run.unit_bytes);
            let mut done = 0;
            while done + stride_bytes <= run.unit_bytes {
                stride2::<V, OLD, NEW>(
                    old_keys,
                    new_keys,
                    old_whitening,
                    new_whitening,
                    &u,
                    &w,
                    data.add(done),
                );
                in_flight!(|J| u[J] = u[J].advance_xor(old_step));
                in_flight!(|J| w[J] = w[J].advance_xor(new_step));
                done += stride_bytes;
            }
            let left = run.unit_bytes - done;
            if left != 0 {
                let mut scratch = Scratch([0; TWEAKS_MAX * 16]);
                let inside = scratch.0.as_mut_ptr();
                data.add(done).copy_to_nonoverlapping(inside, left);
                stride2::<V, OLD, NEW>(old_keys, new_keys, old_whitening, new_whitening, &u, &w, inside);
                scratch.0.as_ptr().copy_to_nonoverlapping(data.add(done), left);
            }
        }
    }
}

/// One stride out of the old key and into the new one.
#[inline(always)]
unsafe fn stride2<V: Vector, const OLD: usize, const NEW: usize>(
    old_keys: &[RoundKey; OLD],
    new_keys: &[RoundKey; NEW],
    old_whitening: V,
    new_whitening: V,
    u: &[V; FLIGHT],
    w: &[V; FLIGHT],
    data: *mut u8,
) {
    let at = |j: usize| data.wrapping_add(j * 16 * V::LANES);
    // SAFETY: the caller vouches for a stride of bytes at `data` and for the CPU.
    unsafe {
        let mut x = *u;
        in_flight!(|J| x[J] = V::load(at(J)).xor3(x[J], old_whitening));
        for round in 1..OLD - 1 {
            let round_key = key::<V>(old_keys, round);
            in_flight!(|J| x[J] = x[J].round::<false>(round_key));
            V::in_step(&mut x);
        }
        in_flight!(|J| x[J] = x[J].last_round::<false>(u[J]).xor3(w[J], new_whitening));
        for round in 1..NEW - 1 {
            let round_key = key::<V>(new_keys, round);
            in_flight!(|J| x[J] = x[J].round::<true>(round_key));
            V::in_step(&mut x);
        }
        in_flight!(|J| x[J].last_round::<true>(w[J]).store(at(J)));
    }
}
