//! The encrypted side of a transfer as the workers see it: which cipher, and where the bytes lie.
//!
//! A transfer counts in bytes of plaintext. The encrypted side is a row of segments without gaps in the plaintext, each with
//! its own cipher, data unit and place on the device; most volumes have one, at the offset where their header ends.
//!
//! ```text
//! plaintext        0 ........... s1 .................... s2 ....... end
//! encrypted side      | header | segment 0 | segment 1      | segment 2 |
//!                              ^ offset 0  ^ offset 1 (anywhere)
//! ```

use crate::crypto::SectorCipher;
use crate::units::{DataUnit, Extent};

/// A run of plaintext under one cipher.
pub struct Segment {
    /// Its first byte in the plaintext.
    pub start: u64,
    /// Where that byte lies on the encrypted side.
    pub offset: u64,
    /// Data unit, bytes.
    pub unit_bytes: u32,
    /// `None`: stored as it is.
    pub cipher: Option<Box<dyn SectorCipher>>,
}

impl Segment {
    /// Where plaintext byte `at` lies on the encrypted side.
    #[must_use]
    pub fn place(&self, at: u64) -> u64 {
        self.offset + (at - self.start)
    }

    fn unit(&self, at: u64) -> DataUnit {
        DataUnit((at - self.start) / u64::from(self.unit_bytes))
    }

    /// Encrypt whole data units, the first of which is at plaintext byte `at`.
    pub fn encrypt(&self, at: u64, bytes: &mut [u8]) {
        if let Some(cipher) = &self.cipher {
            cipher.encrypt(self.unit(at), bytes);
        }
    }

    /// Decrypt whole data units, the first of which is at plaintext byte `at`.
    pub fn decrypt(&self, at: u64, bytes: &mut [u8]) {
        if let Some(cipher) = &self.cipher {
            cipher.decrypt(self.unit(at), bytes);
        }
    }
}

/// All segments of a volume, in the order of the plaintext.
pub struct Segments(Vec<Segment>);

impl Segments {
    /// A volume under one cipher, whose data begins at `offset` of the encrypted side.
    #[must_use]
    pub fn one(cipher: Box<dyn SectorCipher>, unit_bytes: u32, offset: u64) -> Self {
        Self::new(vec![Segment { start: 0, offset, unit_bytes, cipher: Some(cipher) }])
    }

    /// A volume of several segments.
    ///
    /// # Panics
    /// If there is none, the first does not begin at 0, they do not ascend, or one begins inside a data unit of its predecessor.
    #[must_use]
    pub fn new(segments: Vec<Segment>) -> Self {
        assert!(segments.first().is_some_and(|first| first.start == 0), "a volume begins at byte 0");
        for pair in segments.windows(2) {
            assert!(pair[0].start < pair[1].start, "segments ascend");
            let len = pair[1].start - pair[0].start;
            assert!(len.is_multiple_of(pair[0].unit_bytes.into()), "a segment is whole data units");
        }
        Self(segments)
    }

    /// The segment of plaintext byte `at`.
    #[must_use]
    pub fn at(&self, at: u64) -> &Segment {
        match &self.0[..] {
            [one] => one,
            several => &several[several.partition_point(|segment| segment.start <= at) - 1],
        }
    }

    /// Up to where the plaintext is in the same segment as byte `at`.
    #[must_use]
    pub fn until(&self, at: u64) -> u64 {
        let next = self.0.partition_point(|segment| segment.start <= at);
        self.0.get(next).map_or(u64::MAX, |segment| segment.start)
    }

    /// Where plaintext byte `at` lies on the encrypted side.
    #[must_use]
    pub fn place(&self, at: u64) -> u64 {
        self.at(at).place(at)
    }

    /// The largest data unit, bytes.
    #[must_use]
    pub fn unit_bytes(&self) -> u32 {
        self.0.iter().map(|segment| segment.unit_bytes).max().expect("a volume has a segment")
    }

    /// Does every part of a data unit come out right whatever the rest of it is, in all segments?
    #[must_use]
    pub fn is_separable(&self) -> bool {
        self.0.iter().all(|segment| segment.cipher.as_ref().is_none_or(|cipher| cipher.is_separable()))
    }

    /// The first part of an extent, in whole data units: up to the end of the segment it begins in, and not beyond `until`. `None`: that lies
    /// in front of it.
    #[must_use]
    pub fn widen(&self, extent: Extent, until: u64) -> Option<Extent> {
        let segment = self.at(extent.start());
        let unit = u64::from(segment.unit_bytes);
        let start = extent.start() - (extent.start() - segment.start) % unit;
        let units = (extent.end() - start).div_ceil(unit);
        let seam = self.0.iter().map(|segment| segment.start).find(|seam| *seam > start);
        let end = units.checked_mul(unit).and_then(|bytes| start.checked_add(bytes)).unwrap_or(until);
        Extent::new(start, end.min(until).min(seam.unwrap_or(until)))
    }

    /// Do both have the same bytes for the same plaintext of `total` bytes, in the same places? Ciphers cannot be compared, but what they
    /// make of a block in each segment can.
    #[must_use]
    pub fn is_like(&self, other: &Self, total: u64) -> bool {
        let probe = |segment: &Segment| {
            let mut block = [0; PROBE_BYTES];
            segment.encrypt(segment.start, &mut block);
            block
        };
        let like = |one: &Segment, two: &Segment| {
            (one.start, one.offset, one.unit_bytes) == (two.start, two.offset, two.unit_bytes)
                && probe(one) == probe(two)
        };
        // Nothing lies in segments that begin behind the end.
        let of = |segments: &Self| segments.0.partition_point(|segment| segment.start < total);
        of(self) == of(other) && self.0[..of(self)].iter().zip(&other.0).all(|(one, two)| like(one, two))
    }
}

/// Whole data units of every size.
const PROBE_BYTES: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    fn linear(start: u64, offset: u64) -> Segment {
        Segment { start, offset, unit_bytes: 512, cipher: None }
    }

    #[test]
    fn a_byte_is_found_on_both_sides_of_every_boundary() {
        let segments = Segments::new(vec![linear(0, 4096), linear(1024, 9216), linear(2048, 512)]);
        for (at, place) in [(0, 4096), (1023, 5119), (1024, 9216), (2047, 10239), (2048, 512), (5000, 3464)] {
            assert_eq!(segments.place(at), place, "{at}");
        }
    }

    #[test]
    #[should_panic(expected = "whole data units")]
    fn a_segment_ends_on_a_data_unit() {
        let _ = Segments::new(vec![linear(0, 0), linear(700, 700)]);
    }

    #[test]
    #[should_panic(expected = "begins at byte 0")]
    fn the_plaintext_has_no_gap_in_front() {
        let _ = Segments::new(vec![linear(512, 0)]);
    }
}
