//! SHA-256 of many units at once, one in each lane of a vector, whatever its width: the loop that AVX-512 and AVX2 share.
//!
//! A vector holds the same word of every unit, so rounds need no exchange between lanes and every instruction does useful work
//! for all of them. What it costs is the transposition of the message on its way in. Per 64 bytes of every lane, in vector
//! instructions (AVX-512; rotations are one instruction, any three-way logic is one): 64 rounds of 17, 48 steps of the message
//! schedule of 11, and 80 shuffles, some 1,700 in all; at four a cycle 425 cycles. The rounds of one vector are a chain of results of two
//! cycles each, and yet a second vector beside it brought nothing (Zen 5): schedule and transposition fill the gaps.
#![allow(unsafe_code)] // calls into the instruction-set vectors, pointers into the caller's units

use super::{Digest, K, Units};

/// Most lanes of a vector.
pub(super) const LANES_MAX: usize = 16;

/// A word of each of several units.
///
/// # Safety
/// Every method needs the CPU features of the implementing module. All are `#[inline(always)]` into a function that enables
/// those features.
pub(super) trait Lanes: Copy {
    /// Words in a vector.
    const LANES: usize;
    /// The word in every lane.
    unsafe fn splat(word: u32) -> Self;
    /// The first `LANES` words.
    unsafe fn of_words(words: &[u32; LANES_MAX]) -> Self;
    /// To the first `LANES` words.
    unsafe fn words(self, to: &mut [u32; LANES_MAX]);
    /// 64 bytes of every lane's unit as sixteen vectors of big-endian words. Each pointer of the first `LANES` has 64 readable
    /// bytes, of any alignment.
    unsafe fn message(from: &[*const u8; LANES_MAX]) -> [Self; 16];
    /// a + b.
    unsafe fn add(self, b: Self) -> Self;
    /// Σ0 of FIPS 180-4, section 4.1.2: rotations by 2, 13, 22.
    unsafe fn sum0(self) -> Self;
    /// Σ1: rotations by 6, 11, 25.
    unsafe fn sum1(self) -> Self;
    /// σ0: rotations by 7 and 18, shift by 3.
    unsafe fn sigma0(self) -> Self;
    /// σ1: rotations by 17 and 19, shift by 10.
    unsafe fn sigma1(self) -> Self;
    /// Ch: bits of `f` where `self` is set, of `g` elsewhere.
    unsafe fn choose(self, f: Self, g: Self) -> Self;
    /// Maj.
    unsafe fn majority(self, b: Self, c: Self) -> Self;
}

/// One round; the names of the working variables are turned by the caller, not their contents.
macro_rules! round {
    ($a:ident $b:ident $c:ident $d:ident $e:ident $f:ident $g:ident $h:ident, $k:expr, $w:expr) => {
        // What does not wait for the round before comes first.
        let known = $h.add(V::splat($k)).add($w).add($e.choose($f, $g)).add($e.sum1());
        $d = $d.add(known);
        $h = known.add($a.sum0().add($a.majority($b, $c)));
    };
}

/// Sixteen rounds; behind each one `$next!(word)` makes the word of sixteen rounds later.
macro_rules! sixteen {
    ($k:expr, $w:ident, [$a:ident $b:ident $c:ident $d:ident $e:ident $f:ident $g:ident $h:ident], $next:ident) => {
        round!($a $b $c $d $e $f $g $h, $k[0], $w[0]);
        $next!(0);
        round!($h $a $b $c $d $e $f $g, $k[1], $w[1]);
        $next!(1);
        round!($g $h $a $b $c $d $e $f, $k[2], $w[2]);
        $next!(2);
        round!($f $g $h $a $b $c $d $e, $k[3], $w[3]);
        $next!(3);
        round!($e $f $g $h $a $b $c $d, $k[4], $w[4]);
        $next!(4);
        round!($d $e $f $g $h $a $b $c, $k[5], $w[5]);
        $next!(5);
        round!($c $d $e $f $g $h $a $b, $k[6], $w[6]);
        $next!(6);
        round!($b $c $d $e $f $g $h $a, $k[7], $w[7]);
        $next!(7);
        round!($a $b $c $d $e $f $g $h, $k[8], $w[8]);
        $next!(8);
        round!($h $a $b $c $d $e $f $g, $k[9], $w[9]);
        $next!(9);
        round!($g $h $a $b $c $d $e $f, $k[10], $w[10]);
        $next!(10);
        round!($f $g $h $a $b $c $d $e, $k[11], $w[11]);
        $next!(11);
        round!($e $f $g $h $a $b $c $d, $k[12], $w[12]);
        $next!(12);
        round!($d $e $f $g $h $a $b $c, $k[13], $w[13]);
        $next!(13);
        round!($c $d $e $f $g $h $a $b, $k[14], $w[14]);
        $next!(14);
        round!($b $c $d $e $f $g $h $a, $k[15], $w[15]);
        $next!(15);
    };
}

/// The compression function of FIPS 180-4, section 6.2.2, on every lane.
#[inline(always)]
unsafe fn compress<V: Lanes>(state: &mut [V; 8], mut w: [V; 16]) {
    let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = *state;
    // SAFETY: the caller vouches for the CPU.
    unsafe {
        macro_rules! schedule {
            ($at:literal) => {
                w[$at] = w[$at]
                    .add(w[($at + 1) % 16].sigma0())
                    .add(w[($at + 9) % 16])
                    .add(w[($at + 14) % 16].sigma1());
            };
        }
        macro_rules! done {
            ($at:literal) => {};
        }
        for k in &K[..3] {
            sixteen!(k, w, [a b c d e f g h], schedule);
        }
        let k = &K[3];
        sixteen!(k, w, [a b c d e f g h], done);
        for (state, worked) in state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
            *state = state.add(worked);
        }
    }
}

/// Digests of the units from `first`, as many as `out` holds and at most one a lane. Lanes left over hash the last unit again.
///
/// # Safety
/// The CPU has the features of `V`, and this is inlined into a function that enables them.
#[inline(always)]
pub(super) unsafe fn digest<V: Lanes>(units: &Units<'_>, first: usize, out: &mut [Digest]) {
    assert!(!out.is_empty() && out.len() <= V::LANES, "one unit a lane");
    assert!(first + out.len() <= units.count(), "as many units as digests");
    let last = first + out.len() - 1;
    let mut from = [units.bytes.as_ptr(); LANES_MAX];
    for (lane, from) in from[..V::LANES].iter_mut().enumerate() {
        *from = units.unit((first + lane).min(last)).as_ptr();
    }
    // SAFETY: the caller vouches for the CPU. Each pointer walks from the start of a unit to its end in steps of 64 bytes, which
    // a unit is a multiple of.
    unsafe {
        let mut state = [V::splat(0); 8];
        for (state, word) in state.iter_mut().zip(units.initial) {
            *state = V::splat(word);
        }
        for _ in 0..units.unit_bytes / 64 {
            let message = V::message(&from);
            for from in &mut from[..V::LANES] {
                *from = from.wrapping_add(64);
            }
            compress(&mut state, message);
        }
        let mut message = [V::splat(0); 16];
        let (mut upper, mut lower) = ([0; LANES_MAX], [0; LANES_MAX]);
        for (lane, (upper, lower)) in upper.iter_mut().zip(&mut lower).enumerate() {
            [*upper, *lower] = units.number((first + lane).min(last));
        }
        (message[0], message[1]) = (V::of_words(&upper), V::of_words(&lower));
        for (message, word) in message[2..].iter_mut().zip(units.tail) {
            *message = V::splat(word);
        }
        compress(&mut state, message);
        for (at, state) in state.into_iter().enumerate() {
            let mut words = [0; LANES_MAX];
            state.words(&mut words);
            for (out, word) in out.iter_mut().zip(words) {
                out[4 * at..4 * at + 4].copy_from_slice(&word.to_be_bytes());
            }
        }
    }
}
