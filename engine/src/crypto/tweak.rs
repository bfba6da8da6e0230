//! How data units are numbered: the layout of a volume and the tweak counter of each unit.
//!
//! The sums are those of dm-crypt (`crypt_iv_plain64_gen`, `crypt_iv_plain_gen`, `CRYPT_IV_LARGE_SECTORS`): a 64-bit sector
//! number that wraps, little-endian in the low half of the tweak, the high half zero.

use proto::{ErrorKind, TweakKind};

use crate::error::{Error, Result};
use crate::units::{DataUnit, SECTOR_BYTES};

/// Data units and tweaks of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Bytes of a data unit: a multiple of 16 up to 1 MiB; volumes have 512, 1024, 2048 or 4096.
    pub unit_bytes: u32,
    /// The counter's width.
    pub kind: TweakKind,
    /// Count in data units (`iv_large_sectors`) instead of 512-byte sectors. Units that are no whole number of sectors are
    /// counted in units either way.
    pub large: bool,
    /// Counter of the first data unit, in 512-byte sectors whatever `large` says (dm-crypt's `iv_offset`).
    pub offset_sectors: u64,
}

/// XTS limits a data unit to 2^20 blocks (IEEE 1619, NIST SP 800-38E); far less is sensible.
const UNIT_BYTES_MAX: u32 = 1 << 20;

impl Layout {
    /// A `plain64` volume from sector 0, counted in 512-byte sectors: the default of dm-crypt and LUKS.
    #[must_use]
    pub fn plain64(unit_bytes: u32) -> Self {
        Self { unit_bytes, kind: TweakKind::Plain64, large: false, offset_sectors: 0 }
    }

    /// Is it one the kernels can work with?
    ///
    /// # Errors
    /// `Invalid`: a unit that is no multiple of 16 bytes, or an offset that is no whole number of units although tweaks are
    /// counted in units.
    pub fn check(&self) -> Result<()> {
        if self.unit_bytes == 0 || !self.unit_bytes.is_multiple_of(16) || self.unit_bytes > UNIT_BYTES_MAX {
            let what = format!(
                "a data unit has a multiple of 16 bytes up to {UNIT_BYTES_MAX}, not {}",
                self.unit_bytes
            );
            return Err(Error::new(ErrorKind::Invalid, what));
        }
        let (_, divisor) = self.steps();
        if !self.offset_sectors.is_multiple_of(divisor) {
            let what = format!(
                "tweak offset {} is not a multiple of the {divisor} sectors of a data unit",
                self.offset_sectors
            );
            return Err(Error::new(ErrorKind::Invalid, what));
        }
        Ok(())
    }

    /// Sectors per unit as the counter sees them, and what the sum is divided by.
    fn steps(&self) -> (u64, u64) {
        let unit = u64::from(self.unit_bytes);
        let sectors = if unit.is_multiple_of(SECTOR_BYTES) { (unit / SECTOR_BYTES).max(1) } else { 1 };
        (sectors, if self.large { sectors } else { 1 })
    }

    /// The counter of this layout.
    pub(super) fn counter(&self) -> Counter {
        let (step, divisor) = self.steps();
        Counter {
            offset: self.offset_sectors,
            step,
            divisor,
            shift: divisor.is_power_of_two().then(|| divisor.trailing_zeros()),
            mask: match self.kind {
                TweakKind::Plain64 => u64::MAX,
                TweakKind::Plain => u64::from(u32::MAX),
            },
        }
    }
}

/// Data-unit index to tweak counter.
#[derive(Debug, Clone, Copy)]
pub(super) struct Counter {
    offset: u64,
    step: u64,
    divisor: u64,
    /// `log2(divisor)` where it has one: no division in the steady state.
    shift: Option<u32>,
    mask: u64,
}

impl Counter {
    /// The low half of the tweak of a data unit; the high half is zero.
    #[inline(always)]
    pub(super) fn at(&self, unit: DataUnit) -> u64 {
        let sector = self.offset.wrapping_add(unit.0.wrapping_mul(self.step));
        let count = match self.shift {
            Some(shift) => sector >> shift,
            None => sector / self.divisor,
        };
        count & self.mask
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(layout: Layout, unit: u64) -> u64 {
        layout.counter().at(DataUnit(unit))
    }

    #[test]
    fn counts_in_sectors_unless_large() {
        let small = Layout { offset_sectors: 16, ..Layout::plain64(4096) };
        assert_eq!(at(small, 3), 16 + 3 * 8);
        assert_eq!(at(Layout { large: true, ..small }, 3), 2 + 3);
    }

    #[test]
    fn plain_keeps_the_low_32_bits() {
        let layout = Layout { kind: TweakKind::Plain, offset_sectors: 0xffff_ffff, ..Layout::plain64(512) };
        assert_eq!(at(layout, 0), 0xffff_ffff);
        assert_eq!(at(layout, 1), 0);
    }

    #[test]
    fn the_sector_number_wraps_before_it_is_divided() {
        let layout = Layout { offset_sectors: u64::MAX - 7, ..Layout::plain64(4096) };
        assert_eq!(at(layout, 0), u64::MAX - 7);
        assert_eq!(at(layout, 1), 0);
        let large = Layout { large: true, ..layout };
        assert_eq!(at(large, 0), u64::MAX >> 3);
        assert_eq!(at(large, 1), 0);
    }

    #[test]
    fn odd_units_are_counted_in_units() {
        for large in [false, true] {
            assert_eq!(at(Layout { large, offset_sectors: 5, ..Layout::plain64(48) }, 7), 12);
        }
        assert_eq!(at(Layout { large: true, offset_sectors: 6, ..Layout::plain64(1536) }, 7), 2 + 7);
    }

    #[test]
    fn refuses_ragged_units_and_offsets() {
        for unit in [0, 8, 17, 511, UNIT_BYTES_MAX + 16] {
            assert!(Layout::plain64(unit).check().is_err(), "{unit}");
        }
        let ragged = Layout { offset_sectors: 4, large: true, ..Layout::plain64(4096) };
        assert!(ragged.check().is_err());
        assert!(Layout { large: false, ..ragged }.check().is_ok());
    }
}
