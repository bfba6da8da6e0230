//! Finding zero plaintext, so that a decrypted file has holes where the volume is empty.
//!
//! A chunk is looked at in granules of at least [`GRANULE_MIN`]; a granule of zeros is left out of the write. Smaller
//! granules would find more zeros and cut large writes into many small ones; 64 KiB keeps a write worth its system call.

use crate::backend::Span;

/// Smallest run of zeros that becomes a hole, bytes.
pub const GRANULE_MIN: u32 = 64 * 1024;

/// The parts of a chunk still to be written: a set of granules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Runs {
    /// Bit `i`: granule `i` is to be written.
    mask: u64,
    granule: u32,
    len: u32,
}

impl Runs {
    /// All of `0..len`, in one run.
    #[must_use]
    pub fn whole(len: u32) -> Self {
        Self { mask: 1, granule: len.max(1), len }
    }

    /// The granules of `bytes` that are not all zeros. `bytes` is a chunk, less than 4 GiB.
    #[must_use]
    pub fn nonzero(bytes: &[u8]) -> Self {
        let len = u32::try_from(bytes.len()).expect("a chunk fits a buffer");
        // At most 64 granules, so that the set is one word.
        let granule = GRANULE_MIN.max(len.div_ceil(64).next_multiple_of(GRANULE_MIN));
        let mask = bytes
            .chunks(granule as usize)
            .enumerate()
            .fold(0_u64, |mask, (index, granule)| mask | (u64::from(!is_zero(granule)) << index));
        Self { mask, granule, len }
    }

    /// Take the first run of neighbouring granules.
    pub fn pop(&mut self) -> Option<Span> {
        if self.mask == 0 {
            return None;
        }
        let first = self.mask.trailing_zeros();
        let count = (self.mask >> first).trailing_ones();
        let ones = u64::MAX >> (64 - count);
        self.mask &= !(ones << first);
        let start = first * self.granule;
        let end = (u64::from(first + count) * u64::from(self.granule)).min(self.len.into());
        Some(start..u32::try_from(end).expect("bounded by len"))
    }

    /// Bytes in the set.
    #[must_use]
    pub fn bytes(mut self) -> u64 {
        let mut sum = 0;
        while let Some(span) = self.pop() {
            sum += u64::from(span.end - span.start);
        }
        sum
    }
}

/// Is every byte zero? Stops at the first 512-byte line that is not, so data costs one line, and zeros cost a pass at the
/// speed of a load per register: the fold over words is compiled to vector ORs.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    let (lines, rest) = bytes.as_chunks::<512>();
    lines.iter().all(|line| {
        let (words, _) = line.as_chunks::<8>();
        words.iter().fold(0, |sum, word| sum | u64::from_ne_bytes(*word)) == 0
    }) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(bytes: &[u8]) -> Vec<Span> {
        let mut runs = Runs::nonzero(bytes);
        std::iter::from_fn(move || runs.pop()).collect()
    }

    #[test]
    fn zeros_are_zeros_and_one_bit_is_not() {
        for len in [0, 1, 7, 511, 512, 513, 4096 + 3] {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes));
            for at in 0..len {
                bytes[at] = 0x80;
                assert!(!is_zero(&bytes), "byte {at} of {len}");
                bytes[at] = 0;
            }
        }
    }

    #[test]
    fn only_runs_with_data_are_written() {
        let granule = GRANULE_MIN as usize;
        let mut bytes = vec![0; 16 * granule];
        assert_eq!(runs(&bytes), []);
        bytes[3 * granule + 5] = 1;
        bytes[4 * granule] = 1;
        bytes[16 * granule - 1] = 1;
        let g = GRANULE_MIN;
        assert_eq!(runs(&bytes), [3 * g..5 * g, 15 * g..16 * g]);
    }

    #[test]
    fn a_short_tail_is_a_granule_of_its_own() {
        let mut bytes = vec![0; GRANULE_MIN as usize + 512];
        bytes[GRANULE_MIN as usize] = 1;
        assert_eq!(runs(&bytes), vec![GRANULE_MIN..GRANULE_MIN + 512; 1]);
        assert_eq!(Runs::nonzero(&bytes).bytes(), 512);
    }

    #[test]
    fn a_large_chunk_still_fits_one_word() {
        let bytes = vec![1; 16 * 1024 * 1024 + 512];
        assert_eq!(runs(&bytes), vec![0..16 * 1024 * 1024 + 512; 1]);
    }

    #[test]
    fn a_whole_chunk_is_one_run() {
        let mut runs = Runs::whole(1536);
        assert_eq!(runs.pop(), Some(0..1536));
        assert_eq!(runs.pop(), None);
    }
}
