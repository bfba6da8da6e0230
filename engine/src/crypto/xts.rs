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

use super::schedule::{ROUND_KEYS, RoundKey, Schedule};
use super::tweak::Counter;
use crate::units::DataUnit;

/// Vectors in flight.
pub(super) const FLIGHT: usize = 8;
/// Data units of the fused loop are multiples of this: strides of the widest vectors.
pub(super) const FUSED_UNIT_BYTES: u32 = 512;
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
    /// Every block times x^(8·BYTES), BYTES from 1 to 3, then ⊕ c.
    unsafe fn times_bytes_xor<const BYTES: usize>(self, c: Self) -> Self;
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

/// T of two groups of data units, the one being worked on and the one after it; and the counters of the next to come.
#[repr(align(64))]
struct Tweaks([u128; 2 * TWEAKS_MAX], [u128; TWEAKS_MAX]);

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

/// Where the U of the next stride come from. They are computed between the rounds of the present stride, one vector a
/// round, so that their latency hides behind the AES instructions.
trait Next<V: Vector> {
    /// Vector `J` of the next stride, given the present stride and the vectors of the next one before `J`.
    unsafe fn vector<const J: usize>(&self, now: &[V; FLIGHT], next: &[V; FLIGHT]) -> V;
}

/// The next stride of the same data unit.
struct Advance<V> {
    step: V,
}

impl<V: Vector> Next<V> for Advance<V> {
    #[inline(always)]
    unsafe fn vector<const J: usize>(&self, now: &[V; FLIGHT], _next: &[V; FLIGHT]) -> V {
        // SAFETY: the caller vouches for the CPU.
        unsafe { now[J].advance_xor(self.step) }
    }
}

/// The first stride of another data unit: exponents below 8 by shifts of bits, the others by shifts of bytes from those.
struct Expand<V> {
    t: V,
    k_last: V,
    byte_steps: [V; 3],
}

impl<V: Vector> Next<V> for Expand<V> {
    #[inline(always)]
    unsafe fn vector<const J: usize>(&self, _now: &[V; FLIGHT], next: &[V; FLIGHT]) -> V {
        // SAFETY: the caller vouches for the CPU.
        unsafe {
            if J * V::LANES < 8 {
                self.t.times_small_xor::<J>(self.k_last)
            } else {
                // Each from a small one, not from the one before: no chain.
                let small = next[J % (8 / V::LANES)];
                match J * V::LANES / 8 {
                    1 => small.times_bytes_xor::<1>(self.byte_steps[0]),
                    2 => small.times_bytes_xor::<2>(self.byte_steps[1]),
                    _ => small.times_bytes_xor::<3>(self.byte_steps[2]),
                }
            }
        }
    }
}

/// One key and one direction, and the constants that follow from the key.
struct Side<'a, V, const K: usize> {
    keys: &'a [RoundKey; K],
    tweak_keys: &'a [RoundKey; K],
    counter: &'a Counter,
    k_last: V,
    /// k_first ⊕ k_last.
    whitening: V,
    /// k_last ⊕ x^(8·L)·k_last.
    step: V,
    /// k_last ⊕ x^8·k_last, and the same for x^16 and x^24.
    byte_steps: [V; 3],
}

impl<'a, V: Vector, const K: usize> Side<'a, V, K> {
    #[inline(always)]
    unsafe fn new(keys: &'a [RoundKey; ROUND_KEYS], schedule: &'a Schedule, counter: &'a Counter) -> Self {
        let keys: &[RoundKey; K] = keys.first_chunk().expect("K is at most ROUND_KEYS");
        let tweak_keys = schedule.tweak.first_chunk().expect("K is at most ROUND_KEYS");
        // SAFETY: the caller vouches for the CPU.
        unsafe {
            let k_last = key::<V>(keys, K - 1);
            Self {
                keys,
                tweak_keys,
                counter,
                k_last,
                whitening: key::<V>(keys, 0).xor(k_last),
                step: k_last.advance_xor(k_last),
                byte_steps: [
                    k_last.times_bytes_xor::<1>(k_last),
                    k_last.times_bytes_xor::<2>(k_last),
                    k_last.times_bytes_xor::<3>(k_last),
                ],
            }
        }
    }

    /// T of the group of units that starts at unit `at` of the run, into its half of `out`.
    #[inline(always)]
    unsafe fn encrypt_tweaks(&self, run: &Run, at: usize, out: &mut Tweaks) {
        let group = FLIGHT * V::LANES;
        if at == 0 {
            self.count(run, 0, out);
        }
        let half = &mut out.0[at % (2 * group)..][..group];
        let counts = out.1.as_ptr().cast::<u8>();
        let base = half.as_mut_ptr().cast::<u8>();
        let first = at;
        let at = |j: usize| base.wrapping_add(j * 16 * V::LANES);
        // SAFETY: a half holds FLIGHT * LANES blocks; the caller vouches for the CPU.
        unsafe {
            let whitening = key::<V>(self.tweak_keys, 0);
            let mut x = [whitening; FLIGHT];
            in_flight!(|J| x[J] = V::load(counts.add(J * 16 * V::LANES)).xor(whitening));
            for round in 1..K - 1 {
                let round_key = key::<V>(self.tweak_keys, round);
                in_flight!(|J| x[J] = x[J].round::<true>(round_key));
                V::in_step(&mut x);
            }
            let round_key = key::<V>(self.tweak_keys, K - 1);
            in_flight!(|J| x[J].last_round::<true>(round_key).store(at(J)));
        }
        if first + group < run.units {
            self.count(run, first + group, out);
        }
    }

    /// Counters of the group that starts at unit `at`. Written a group before they are read: a wide load of bytes just
    /// written by narrow stores would have to wait for all of them to reach the cache.
    #[inline(always)]
    fn count(&self, run: &Run, at: usize, out: &mut Tweaks) {
        for (i, count) in out.1.iter_mut().take(FLIGHT * V::LANES).enumerate() {
            let unit = DataUnit(run.first.0.wrapping_add((at + i) as u64));
            *count = u128::from(self.counter.at(unit));
        }
    }

    /// How to get at the first stride of the unit whose T is at `t`.
    #[inline(always)]
    unsafe fn expand(&self, t: &u128) -> Expand<V> {
        // SAFETY: a block is 16 bytes; the caller vouches for the CPU.
        let t = unsafe { V::splat((&raw const *t).cast()) };
        Expand { t, k_last: self.k_last, byte_steps: self.byte_steps }
    }

    /// How to get at the next stride of the same unit.
    #[inline(always)]
    fn advance(&self) -> Advance<V> {
        Advance { step: self.step }
    }

    /// The middle rounds, with the next stride's U computed between them.
    #[inline(always)]
    unsafe fn rounds<const FORWARD: bool>(
        &self,
        x: &mut [V; FLIGHT],
        u: &[V; FLIGHT],
        next: &impl Next<V>,
    ) -> [V; FLIGHT] {
        // SAFETY: the caller vouches for the CPU.
        unsafe {
            let mut v = *u;
            in_flight!(|R| {
                let round_key = key::<V>(self.keys, R + 1);
                in_flight!(|J| x[J] = x[J].round::<FORWARD>(round_key));
                v[R] = next.vector::<R>(u, &v);
                V::in_step(x);
            });
            for round in FLIGHT + 1..K - 1 {
                let round_key = key::<V>(self.keys, round);
                in_flight!(|J| x[J] = x[J].round::<FORWARD>(round_key));
                V::in_step(x);
            }
            v
        }
    }

    /// One stride in place. Returns the U of the next one.
    #[inline(always)]
    unsafe fn stride<const FORWARD: bool>(
        &self,
        u: &[V; FLIGHT],
        next: &impl Next<V>,
        data: *mut u8,
    ) -> [V; FLIGHT] {
        let at = |j: usize| data.wrapping_add(j * 16 * V::LANES);
        // SAFETY: the caller vouches for a stride of bytes at `data` and for the CPU.
        unsafe {
            let mut x = *u;
            in_flight!(|J| x[J] = V::load(at(J)).xor3(x[J], self.whitening));
            let v = self.rounds::<FORWARD>(&mut x, u, next);
            in_flight!(|J| x[J].last_round::<FORWARD>(u[J]).store(at(J)));
            v
        }
    }
}

/// The U of a unit's first stride when there is no stride before it.
#[inline(always)]
unsafe fn first_stride<V: Vector>(next: &Expand<V>) -> [V; FLIGHT] {
    let mut u = [next.k_last; FLIGHT];
    // SAFETY: the caller vouches for the CPU.
    unsafe { in_flight!(|J| u[J] = next.vector::<J>(&u, &u)) };
    u
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
    if run.units == 0 {
        return;
    }
    let keys = if FORWARD { &schedule.encrypt } else { &schedule.decrypt };
    let stride_bytes = FLIGHT * 16 * V::LANES;
    let group = FLIGHT * V::LANES;
    let left = run.unit_bytes % stride_bytes;
    let whole = run.unit_bytes - left;
    let mut tweaks = Tweaks([0; 2 * TWEAKS_MAX], [0; TWEAKS_MAX]);
    // SAFETY: all offsets below stay within `units * unit_bytes`; the caller vouches for the run and the CPU.
    unsafe {
        let side = Side::<V, K>::new(keys, schedule, counter);
        side.encrypt_tweaks(&run, 0, &mut tweaks);
        let mut u = first_stride(&side.expand(&tweaks.0[0]));
        for unit in 0..run.units {
            if unit % group == 0 && unit + group < run.units {
                side.encrypt_tweaks(&run, unit + group, &mut tweaks);
            }
            // Behind the last unit there is an old T, expanded and never used.
            let next_unit = side.expand(&tweaks.0[(unit + 1) % (2 * group)]);
            let data = run.data.add(unit * run.unit_bytes);
            let mut done = 0;
            while done + stride_bytes < whole + left.min(1) {
                u = side.stride::<FORWARD>(&u, &side.advance(), data.add(done));
                done += stride_bytes;
            }
            if left == 0 {
                u = side.stride::<FORWARD>(&u, &next_unit, data.add(done));
            } else {
                let mut scratch = Scratch([0; TWEAKS_MAX * 16]);
                data.add(done).copy_to_nonoverlapping(scratch.0.as_mut_ptr(), left);
                u = side.stride::<FORWARD>(&u, &next_unit, scratch.0.as_mut_ptr());
                scratch.0.as_ptr().copy_to_nonoverlapping(data.add(done), left);
            }
        }
    }
}

/// Decrypt with the old schedule and encrypt with the new one, in one pass over memory.
///
/// The new key follows the old one by one stride: while one stride is decrypted, the one before it, still in the first level
/// cache, is encrypted. Why not both in registers: the chain of a block would be 28 rounds long, and no reordering window
/// reaches the next stride over it; measured, that lost a tenth of the rate, and the loads and stores saved are free.
///
/// # Safety
/// As [`crypt`]. `run.first` is the index of the first unit on both sides; `run.unit_bytes` is a multiple of
/// [`FUSED_UNIT_BYTES`].
#[inline(always)]
pub(super) unsafe fn recrypt<V: Vector, const OLD: usize, const NEW: usize>(
    old: (&Schedule, &Counter),
    new: (&Schedule, &Counter),
    run: Run,
) {
    if run.units == 0 {
        return;
    }
    let stride_bytes = FLIGHT * 16 * V::LANES;
    assert!(run.unit_bytes.is_multiple_of(stride_bytes), "the fused loop has no tail");
    let group = FLIGHT * V::LANES;
    let (mut old_tweaks, mut new_tweaks) =
        (Tweaks([0; 2 * TWEAKS_MAX], [0; TWEAKS_MAX]), Tweaks([0; 2 * TWEAKS_MAX], [0; TWEAKS_MAX]));
    // SAFETY: all offsets below stay within `units * unit_bytes`; the caller vouches for the run and the CPU.
    unsafe {
        let (old_side, new_side) = (
            Side::<V, OLD>::new(&old.0.decrypt, old.0, old.1),
            Side::<V, NEW>::new(&new.0.encrypt, new.0, new.1),
        );
        old_side.encrypt_tweaks(&run, 0, &mut old_tweaks);
        new_side.encrypt_tweaks(&run, 0, &mut new_tweaks);
        let mut u = first_stride(&old_side.expand(&old_tweaks.0[0]));
        let mut w = first_stride(&new_side.expand(&new_tweaks.0[0]));
        // The stride that is decrypted and not yet encrypted; none before the first.
        let mut behind = run.data;
        for unit in 0..run.units {
            if unit % group == 0 && unit + group < run.units {
                old_side.encrypt_tweaks(&run, unit + group, &mut old_tweaks);
                new_side.encrypt_tweaks(&run, unit + group, &mut new_tweaks);
            }
            let next_old_unit = old_side.expand(&old_tweaks.0[(unit + 1) % (2 * group)]);
            let this_new_unit = new_side.expand(&new_tweaks.0[unit % (2 * group)]);
            let data = run.data.add(unit * run.unit_bytes);
            let mut done = 0;
            while done < run.unit_bytes {
                let here = data.add(done);
                done += stride_bytes;
                u = if done == run.unit_bytes {
                    old_side.stride::<false>(&u, &next_old_unit, here)
                } else {
                    old_side.stride::<false>(&u, &old_side.advance(), here)
                };
                if done != stride_bytes {
                    w = new_side.stride::<true>(&w, &new_side.advance(), behind);
                } else if unit != 0 {
                    w = new_side.stride::<true>(&w, &this_new_unit, behind);
                }
                behind = here;
            }
        }
        new_side.stride::<true>(&w, &new_side.advance(), behind);
    }
}
