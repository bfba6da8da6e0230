//! Re-encryption by windows: decrypt a window with the old cipher, encrypt it with the new one, while it is in the first
//! level cache. For data units of different sizes on the two sides, for sizes no disk has, and for the portable kernel; the
//! others have a fused loop.

use super::{Recrypter, SectorCipher};
use crate::units::DataUnit;

/// Small enough for every first-level data cache, large enough to spread the cost of a call.
const WINDOW_BYTES: usize = 16 * 1024;

/// Two ciphers and the window they share.
pub(super) struct Windowed {
    old: (Box<dyn SectorCipher>, usize),
    new: (Box<dyn SectorCipher>, usize),
    /// A common multiple of both unit sizes.
    window: usize,
}

impl Windowed {
    /// Each side with the size of its data units.
    pub(super) fn new(old: (Box<dyn SectorCipher>, usize), new: (Box<dyn SectorCipher>, usize)) -> Self {
        let multiple = old.1 / gcd(old.1, new.1) * new.1;
        let window = multiple * (WINDOW_BYTES / multiple).max(1);
        Self { old, new, window }
    }
}

impl Recrypter for Windowed {
    fn recrypt(&self, first_byte: u64, buf: &mut [u8]) {
        let (old_unit, new_unit) = (self.old.1 as u64, self.new.1 as u64);
        let len = buf.len() as u64;
        assert!(
            first_byte.is_multiple_of(old_unit) && len.is_multiple_of(old_unit),
            "a run has whole old data units"
        );
        assert!(
            first_byte.is_multiple_of(new_unit) && len.is_multiple_of(new_unit),
            "a run has whole new data units"
        );
        let mut at = first_byte;
        for window in buf.chunks_mut(self.window) {
            self.old.0.decrypt(DataUnit(at / old_unit), window);
            self.new.0.encrypt(DataUnit(at / new_unit), window);
            at = at.wrapping_add(window.len() as u64);
        }
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::gcd;

    #[test]
    fn the_greatest_common_divisor_divides_both() {
        assert_eq!(gcd(4096, 512), 512);
        assert_eq!(gcd(48, 512), 16);
        assert_eq!(gcd(7, 7), 7);
    }
}
