//! A ledger around another one: what the outer one does not do itself, the inner one does.

use engine::error::Result;
use engine::units::Extent;
use engine::volume::reencrypt::ledger::{Ledger, Protection};

/// What is done in another way than the inner ledger does it; the rest is left to that.
pub trait Around {
    /// The ledger around which it is.
    fn inner(&self) -> &dyn Ledger;

    /// The same, to be told something.
    fn inner_mut(&mut self) -> &mut dyn Ledger;

    /// See [`Ledger::save`].
    ///
    /// # Errors
    /// As there.
    fn save(&mut self, hot: Extent, checksums: &[u8]) -> Result<()> {
        self.inner_mut().save(hot, checksums)
    }

    /// See [`Ledger::begin`].
    ///
    /// # Errors
    /// As there.
    fn begin(&mut self, hot: Extent) -> Result<()> {
        self.inner_mut().begin(hot)
    }

    /// See [`Ledger::commit`].
    ///
    /// # Errors
    /// As there.
    fn commit(&mut self, hot: Extent) -> Result<()> {
        self.inner_mut().commit(hot)
    }

    /// See [`Ledger::is_locked_out`].
    fn is_locked_out(&self) -> bool {
        self.inner().is_locked_out()
    }
}

/// The whole ledger.
pub struct Wrapped<T>(pub T);

impl<T: Around> Ledger for Wrapped<T> {
    fn protection(&self) -> Protection {
        self.0.inner().protection()
    }

    fn step_bytes(&self) -> u64 {
        self.0.inner().step_bytes()
    }

    fn hotzone_max(&self) -> Option<u64> {
        self.0.inner().hotzone_max()
    }

    fn save(&mut self, hot: Extent, checksums: &[u8]) -> Result<()> {
        self.0.save(hot, checksums)
    }

    fn begin(&mut self, hot: Extent) -> Result<()> {
        self.0.begin(hot)
    }

    fn commit(&mut self, hot: Extent) -> Result<()> {
        self.0.commit(hot)
    }

    fn is_locked_out(&self) -> bool {
        self.0.is_locked_out()
    }
}
