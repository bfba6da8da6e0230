//! The CPU's SHA instructions, on several units in turn: the latency of one unit's rounds hides behind the others'.
//!
//! `sha256rnds2` does two rounds; on Zen it takes four cycles and a new one can begin every two, so that one unit alone keeps the
//! hardware half idle (32 of them and 64 bytes make 0.5 bytes a cycle, two units 1.0). Four fill the gaps that the message schedule
//! leaves, although they do not fit the registers: a tenth more than two on Zen 5.
#![allow(unsafe_code)] // intrinsics

use std::arch::x86_64::*;

use super::{Digest, K, Units};

/// The state of a unit as the instructions want it: words A B E F and C D G H, from the top.
type State = [__m128i; 2];

#[inline]
#[target_feature(enable = "sha,sse4.1,ssse3")]
fn pack(words: [u32; 8]) -> State {
    let [a, b, c, d, e, f, g, h] = words.map(u32::cast_signed);
    [_mm_set_epi32(a, b, e, f), _mm_set_epi32(c, d, g, h)]
}

#[inline]
#[target_feature(enable = "sha,sse4.1,ssse3")]
fn unpack([abef, cdgh]: State, out: &mut Digest) {
    let words = [
        _mm_extract_epi32::<3>(abef),
        _mm_extract_epi32::<2>(abef),
        _mm_extract_epi32::<3>(cdgh),
        _mm_extract_epi32::<2>(cdgh),
        _mm_extract_epi32::<1>(abef),
        _mm_extract_epi32::<0>(abef),
        _mm_extract_epi32::<1>(cdgh),
        _mm_extract_epi32::<0>(cdgh),
    ];
    for (out, word) in out.chunks_exact_mut(4).zip(words) {
        out.copy_from_slice(&word.to_be_bytes());
    }
}

/// The compression function on N units at once.
#[inline]
#[target_feature(enable = "sha,sse4.1,ssse3")]
fn compress<const N: usize>(states: &mut [State; N], mut w: [[__m128i; 4]; N]) {
    let before = *states;
    for (turn, k) in K.iter().enumerate() {
        for four in 0..4 {
            // SAFETY: four of the sixteen constants are 16 bytes.
            let k = unsafe { _mm_loadu_si128(k[4 * four..4 * four + 4].as_ptr().cast()) };
            for stream in 0..N {
                let [abef, cdgh] = &mut states[stream];
                let w = &mut w[stream];
                let now = w[four];
                let sum = _mm_add_epi32(now, k);
                *cdgh = _mm_sha256rnds2_epu32(*cdgh, *abef, sum);
                *abef = _mm_sha256rnds2_epu32(*abef, *cdgh, _mm_shuffle_epi32::<0x0e>(sum));
                if turn < 3 {
                    // The four words of sixteen rounds later take the place of these.
                    let (one, two, three) = (w[(four + 1) % 4], w[(four + 2) % 4], w[(four + 3) % 4]);
                    let partly = _mm_sha256msg1_epu32(now, one);
                    let seven = _mm_alignr_epi8::<4>(three, two);
                    w[four] = _mm_sha256msg2_epu32(_mm_add_epi32(partly, seven), three);
                }
            }
        }
    }
    for (state, before) in states.iter_mut().zip(before) {
        state[0] = _mm_add_epi32(state[0], before[0]);
        state[1] = _mm_add_epi32(state[1], before[1]);
    }
}

/// Digests of N units from `first`.
#[inline]
#[target_feature(enable = "sha,sse4.1,ssse3")]
fn several<const N: usize>(units: &Units<'_>, first: usize, out: &mut [Digest]) {
    let swap = _mm_set_epi32(0x0c0d_0e0f, 0x0809_0a0b, 0x0405_0607, 0x0001_0203);
    let mut states = [pack(units.initial); N];
    let mut from = [&[][..]; N];
    for (at, from) in from.iter_mut().enumerate() {
        *from = units.unit(first + at);
    }
    for block in 0..units.unit_bytes / 64 {
        let mut w = [[_mm_setzero_si128(); 4]; N];
        for (w, from) in w.iter_mut().zip(from) {
            let from = &from[64 * block..64 * block + 64];
            for (w, from) in w.iter_mut().zip(from.chunks_exact(16)) {
                // SAFETY: the chunk has 16 bytes.
                let read = unsafe { _mm_loadu_si128(from.as_ptr().cast()) };
                *w = _mm_shuffle_epi8(read, swap);
            }
        }
        compress(&mut states, w);
    }
    let mut w = [[_mm_setzero_si128(); 4]; N];
    for (at, w) in w.iter_mut().enumerate() {
        let [upper, lower] = units.number(first + at);
        let mut words = [0; 16];
        words[..2].copy_from_slice(&[upper, lower]);
        words[2..].copy_from_slice(&units.tail);
        for (w, words) in w.iter_mut().zip(words.chunks_exact(4)) {
            // SAFETY: four words are 16 bytes.
            *w = unsafe { _mm_loadu_si128(words.as_ptr().cast()) };
        }
    }
    compress(&mut states, w);
    for (state, out) in states.into_iter().zip(out) {
        unpack(state, out);
    }
}

/// Digests of all units.
///
/// # Safety
/// The CPU has the SHA instructions and SSE 4.1.
#[target_feature(enable = "sha,sse4.1,ssse3")]
pub(super) unsafe fn digests(units: &Units<'_>, out: &mut [Digest]) {
    let mut first = 0;
    for out in out.chunks_mut(4) {
        match out.len() {
            4 => several::<4>(units, first, out),
            3 => {
                several::<2>(units, first, &mut out[..2]);
                several::<1>(units, first + 2, &mut out[2..]);
            }
            2 => several::<2>(units, first, out),
            _ => several::<1>(units, first, out),
        }
        first += out.len();
    }
}
