//! Sizes and positions as types, with checked conversions only.

/// Bytes of the addressing unit.
pub const SECTOR_BYTES: u64 = 512;

/// A position or count in 512-byte sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Sector(pub u64);

/// The index of a data unit, counted from the start of its segment: unit 3 of a 4096-byte segment starts at byte 12288.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct DataUnit(pub u64);

/// A half-open, non-empty run of bytes, `start..end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Extent {
    start: u64,
    end: u64,
}

impl Extent {
    /// `None` if empty or reversed.
    #[must_use]
    pub fn new(start: u64, end: u64) -> Option<Self> {
        (start < end).then_some(Self { start, end })
    }

    /// First byte.
    #[must_use]
    pub fn start(self) -> u64 {
        self.start
    }

    /// One past the last byte.
    #[must_use]
    pub fn end(self) -> u64 {
        self.end
    }

    /// Is there a byte in both?
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// Bytes in it; never zero.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "an extent is never empty")]
    pub fn len(self) -> u64 {
        self.end - self.start
    }
}

impl std::fmt::Display for Extent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.start.is_multiple_of(SECTOR_BYTES) && self.end.is_multiple_of(SECTOR_BYTES) {
            write!(f, "sectors {}..{}", self.start / SECTOR_BYTES, self.end / SECTOR_BYTES)
        } else {
            write!(f, "bytes {}..{}", self.start, self.end)
        }
    }
}

/// `value` rounded up to a multiple of `unit`; `None` on overflow.
#[must_use]
pub fn round_up(value: u64, unit: u64) -> Option<u64> {
    value.checked_next_multiple_of(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_extent_is_never_empty() {
        assert!(Extent::new(5, 5).is_none());
        assert!(Extent::new(6, 5).is_none());
        assert_eq!(Extent::new(5, 6).expect("one byte").len(), 1);
    }

    #[test]
    fn an_extent_names_its_sectors_or_else_its_bytes() {
        assert_eq!(Extent::new(1024, 2048).expect("extent").to_string(), "sectors 2..4");
        assert_eq!(Extent::new(1, 2048).expect("extent").to_string(), "bytes 1..2048");
    }
}
