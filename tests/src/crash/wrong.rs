//! Orders that lose data. Each wraps the production ledger and breaks one rule of its order; a power cut must then be found that
//! loses something, or the proofs prove nothing.

use engine::backend::blocking::Blocking;
use engine::backend::sim::World;
use engine::error::{Error, ErrorKind, Result};
use engine::format::luks2::Loaded;
use engine::format::luks2::reencrypt::{Process, Resilience, read, write};
use engine::units::Extent;
use engine::volume::reencrypt::ledger::Ledger;
use engine::volume::reencrypt::luks;
use engine::volume::{Header, store};

use super::around::{Around, Wrapped};

/// Which rule is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wrong {
    /// The checksums never reach the area.
    NothingSaved,
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
        Box::new(Wrapped(Self { inner, wrong }))
    }
}

impl Around for WrongLedger {
    fn inner(&self) -> &dyn Ledger {
        &*self.inner
    }

    fn inner_mut(&mut self) -> &mut dyn Ledger {
        &mut *self.inner
    }

    fn save(&mut self, hot: Extent, checksums: &[u8]) -> Result<()> {
        match self.wrong {
            Wrong::NothingSaved => Ok(()),
            _ => self.inner.save(hot, checksums),
        }
    }

    fn begin(&mut self, hot: Extent) -> Result<()> {
        match self.wrong {
            Wrong::BegunLate => Ok(()),
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

/// What is done with the area before the header points to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Area {
    /// Written, and flushed: as it should be.
    Durable,
    /// Written, and not flushed.
    NotFlushed,
    /// Written behind the header.
    Late,
}

/// A ledger in a LUKS2 header made of the same parts as the production one, whose order in [`Ledger::begin`] can be chosen.
pub struct FreeLedger {
    header: Blocking,
    loaded: Loaded,
    process: Process,
    total: u64,
    area: Area,
    saved: Vec<u8>,
    inner: Box<dyn Ledger>,
}

impl FreeLedger {
    /// In the place of a ledger that has just been made; through a device of its own.
    ///
    /// # Errors
    /// The header is not one of a re-encryption.
    pub fn instead_of(
        inner: Box<dyn Ledger>,
        world: &World,
        total: u64,
        area: Area,
    ) -> Result<Box<dyn Ledger>> {
        let mut header = world.blocking(super::HEADER, "header")?;
        let Header::Luks2(loaded) = Header::load(&mut header)? else {
            return Err(Error::new(ErrorKind::Internal, "LUKS1"));
        };
        let Some((process, _)) = read::read(&loaded.header.metadata)? else {
            return Err(Error::new(ErrorKind::Internal, "nothing is under way"));
        };
        let saved = Vec::new();
        Ok(Box::new(Wrapped(Self { header, loaded: *loaded, process, total, area, saved, inner })))
    }
}

impl Around for FreeLedger {
    fn inner(&self) -> &dyn Ledger {
        &*self.inner
    }

    fn inner_mut(&mut self) -> &mut dyn Ledger {
        &mut *self.inner
    }

    fn save(&mut self, _: Extent, checksums: &[u8]) -> Result<()> {
        if self.area == Area::Late {
            self.saved = checksums.to_vec();
            return Ok(());
        }
        if matches!(self.process.resilience, Resilience::Checksum(_)) {
            self.header.write(self.process.area.offset, checksums)?;
        }
        Ok(())
    }

    fn begin(&mut self, hot: Extent) -> Result<()> {
        if self.area == Area::Durable {
            self.header.flush()?;
        }
        write::hot(&mut self.loaded.header.metadata, &self.process, hot, self.total)?;
        store::write_luks2(&mut self.header, &mut self.loaded)?;
        if self.area == Area::Late {
            self.header.write(self.process.area.offset, &self.saved)?;
        }
        Ok(())
    }

    fn commit(&mut self, hot: Extent) -> Result<()> {
        let boundary = self.process.boundary_after(hot);
        luks::commit(&mut self.header, &mut self.loaded, &self.process, boundary, self.total)
    }
}
