//! Orders that lose data. Each wraps the production ledger and breaks one rule of its order; a power cut must then be found that
//! loses something, or the proofs prove nothing.

use engine::error::Result;
use engine::units::Extent;
use engine::volume::reencrypt::ledger::{Ledger, Protection};

/// Which rule is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wrong {
    /// The checksums never reach the area.
    NothingSaved,
    /// The header says that a hotzone is being rewritten before its checksums are in the area.
    BegunBeforeSaved,
    /// The header says so only when the hotzone is written.
    BegunLate,
    /// The header says that the hotzone is new as soon as it is begun.
    CommittedEarly,
}

/// The production ledger, told things at other times than they happen.
pub struct WrongLedger {
    inner: Box<dyn Ledger>,
    wrong: Wrong,
}

impl WrongLedger {
    /// Around a ledger.
    #[must_use]
    pub fn around(inner: Box<dyn Ledger>, wrong: Wrong) -> Box<dyn Ledger> {
        Box::new(Self { inner, wrong })
    }
}

impl Ledger for WrongLedger {
    fn protection(&self) -> Protection {
        self.inner.protection()
    }

    fn step_bytes(&self) -> u64 {
        self.inner.step_bytes()
    }

    fn hotzone_max(&self) -> Option<u64> {
        self.inner.hotzone_max()
    }

    fn save(&mut self, hot: Extent, checksums: &[u8]) -> Result<()> {
        match self.wrong {
            Wrong::NothingSaved => Ok(()),
            Wrong::BegunBeforeSaved => {
                self.inner.begin(hot)?;
                self.inner.save(hot, checksums)
            }
            _ => self.inner.save(hot, checksums),
        }
    }

    fn begin(&mut self, hot: Extent) -> Result<()> {
        match self.wrong {
            Wrong::BegunBeforeSaved | Wrong::BegunLate => Ok(()),
            Wrong::CommittedEarly => {
                self.inner.begin(hot)?;
                self.inner.commit(hot)
            }
            Wrong::NothingSaved => self.inner.begin(hot),
        }
    }

    fn commit(&mut self, hot: Extent) -> Result<()> {
        match self.wrong {
            Wrong::CommittedEarly => Ok(()),
            Wrong::BegunLate => {
                self.inner.begin(hot)?;
                self.inner.commit(hot)
            }
            _ => self.inner.commit(hot),
        }
    }
}
