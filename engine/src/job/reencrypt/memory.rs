//! What the buffers of all re-encryptions together may take.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::limits;

static TAKEN: AtomicU64 = AtomicU64::new(0);

/// A share of [`limits::REWRITE_MEMORY`], given back when dropped.
#[derive(Debug)]
pub struct Memory(u64);

impl Memory {
    /// Three quarters of what is left, so that the next one gets some too; never less than the least that is of use.
    #[must_use]
    pub fn take() -> Self {
        let share = |taken: u64| {
            let left = limits::REWRITE_MEMORY.saturating_sub(taken);
            (left - left / 4).max(limits::REWRITE_MEMORY_MIN)
        };
        let before =
            TAKEN.fetch_update(Ordering::AcqRel, Ordering::Acquire, |taken| Some(taken + share(taken)));
        Self(share(before.unwrap_or_else(|taken| taken)))
    }

    /// Bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        TAKEN.fetch_sub(self.0, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_takes_everything_and_nobody_gets_nothing() {
        let shares: Vec<Memory> = (0..8).map(|_| Memory::take()).collect();
        assert_eq!(shares[0].bytes(), limits::REWRITE_MEMORY / 4 * 3);
        assert!(shares.windows(2).all(|pair| pair[0].bytes() >= pair[1].bytes()));
        assert_eq!(shares[7].bytes(), limits::REWRITE_MEMORY_MIN);
        drop(shares);
        assert_eq!(Memory::take().bytes(), limits::REWRITE_MEMORY / 4 * 3, "all of it came back");
    }
}
