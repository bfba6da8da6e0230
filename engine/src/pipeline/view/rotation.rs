//! The side of a [`View`] that a re-encryption moves. The numbers are those of the rules in the module's head.
//!
//! Nothing here waits: who drives a re-encryption asks again when it is told that something has left, so it can be stopped at any
//! moment, and the simulation drives it on one thread.

use std::sync::Arc;

use super::{Access, Held, Ruling, View, Way};
use crate::error::{Error, ErrorKind, Result};
use crate::pipeline::segment::Segments;
use crate::units::Extent;

/// Who drives a re-encryption is told so that requests it waited for have left.
pub type Quiet = Arc<dyn Fn() + Send + Sync>;

/// A re-encryption that is under way, at rest or running.
pub(super) struct Rotation {
    pub(super) new: Arc<Segments>,
    way: Way,
    /// All in order, and no less than the one before.
    passed: u64,
    hot: u64,
    frozen: u64,
    /// The hotzone has been written.
    renewed: bool,
    /// A step has failed: what it was is not known.
    lost: bool,
    /// Told when what was waited for has left; while it runs.
    quiet: Option<Quiet>,
    /// Requests between boundary and old are being waited for.
    awaited: bool,
}

impl Rotation {
    fn at_rest(new: Arc<Segments>, way: Way, passed: u64) -> Self {
        Self {
            new,
            way,
            passed,
            hot: passed,
            frozen: passed,
            renewed: false,
            lost: false,
            quiet: None,
            awaited: false,
        }
    }

    /// The plaintext between two orders.
    fn extent(&self, total: u64, from: u64, to: u64) -> Option<Extent> {
        match self.way {
            Way::Forward => Extent::new(from, to),
            Way::Backward => Extent::new(total - to, total - from),
        }
    }

    /// What may be done from this byte on, and up to where the same may be done.
    pub(super) fn ruling(&self, total: u64, access: Access, at: u64, old: &Arc<Segments>) -> Ruling {
        let readable = access == Access::Read;
        // 4. and 5.
        let new = if readable && self.renewed { self.hot } else { self.passed };
        // 3. and 1.
        let barred = if readable { self.hot } else { self.frozen };
        let within = |from: u64, to: u64| {
            self.extent(total, from, to).filter(|zone| zone.start() <= at && at < zone.end())
        };
        if let Some(zone) = within(0, new) {
            return Ruling::Open(zone.end(), self.new.clone());
        }
        if let Some(zone) = within(barred, total) {
            return Ruling::Open(zone.end(), old.clone());
        }
        // 6.
        if self.lost && within(self.passed, self.hot).is_some() { Ruling::Lost } else { Ruling::Barred }
    }

    /// An extent was given back: who is to be told.
    pub(super) fn left(&mut self, total: u64, held: &Held) -> Option<Quiet> {
        let barred = self.extent(total, self.passed, self.frozen)?;
        let tell = self.awaited && held.extent.overlaps(barred);
        self.awaited &= !tell;
        if tell { self.quiet.clone() } else { None }
    }
}

impl View {
    /// A volume of `total` bytes of plaintext in the middle of a re-encryption that is at rest: so many bytes, in order, are new.
    ///
    /// # Panics
    /// If there are more than all.
    #[must_use]
    pub fn mixed(old: Segments, new: Segments, way: Way, passed: u64, total: u64) -> Arc<Self> {
        assert!(passed <= total, "a boundary is inside its volume");
        if passed == total {
            return Self::with(new, None, total);
        }
        if passed == 0 {
            return Self::with(old, None, total);
        }
        let rotation = Rotation::at_rest(Arc::new(new), way, passed);
        Self::with(old, Some(rotation), total)
    }

    /// A re-encryption begins, or goes on, from here: so many bytes, in order, are new. What was lost has been recovered. `quiet` is called
    /// when what [`View::freeze`] or [`View::exclude`] wait for has left; it must not block.
    ///
    /// # Errors
    /// `Conflict`: another one runs; or this one is not of this volume as it is served: other ciphers, or another boundary.
    pub fn begin(&self, old: &Segments, new: Segments, way: Way, passed: u64, quiet: Quiet) -> Result<()> {
        let refuse = |what: &str| {
            Err(Error::new(ErrorKind::Conflict, what)
                .hint("stop its export, and resume the re-encryption without it"))
        };
        let mut inner = self.inner();
        if !inner.old.is_like(old, self.total) {
            return refuse("the volume is served under another key than it is re-encrypted from");
        }
        let mut rotation = match inner.rotation.take() {
            None if passed == 0 => Rotation::at_rest(Arc::new(new), way, 0),
            None => return refuse("the volume is served as if nothing of it were re-encrypted"),
            Some(running) if running.quiet.is_some() => {
                inner.rotation = Some(running);
                return refuse("the volume is being re-encrypted");
            }
            Some(resting) => {
                let here = passed == resting.passed || (resting.lost && passed == resting.hot);
                if resting.way != way || !here || !resting.new.is_like(&new, self.total) {
                    inner.rotation = Some(resting);
                    return refuse("the volume is served as if another part of it were re-encrypted");
                }
                Rotation::at_rest(resting.new, way, passed)
            }
        };
        rotation.quiet = Some(quiet);
        inner.rotation = Some(rotation);
        drop(inner);
        self.moved();
        Ok(())
    }

    /// Is it served as nothing but old, so that a re-encryption may begin? To be asked before anything is written for that.
    ///
    /// # Errors
    /// `Conflict`: another one runs, or what became of one is not known here.
    pub fn check_whole(&self) -> Result<()> {
        match &self.inner().rotation {
            None => Ok(()),
            Some(running) if running.quiet.is_some() => {
                Err(Error::new(ErrorKind::Conflict, "the volume is being re-encrypted"))
            }
            Some(_) => {
                let what = "the volume is served as if it were in the middle of a re-encryption, of which its header says nothing";
                Err(Error::new(ErrorKind::Conflict, what)
                    .hint("stop its export, and see what its header says (cryptctl luks dump)"))
            }
        }
    }

    /// Rule 1: foreign writes keep out of what lies before this order, from now on. True: none is in flight there. Else ask again, when
    /// told so.
    ///
    /// # Panics
    /// If no re-encryption runs.
    #[must_use]
    pub fn freeze(&self, until: u64) -> bool {
        self.bar(|rotation| {
            rotation.frozen = rotation.frozen.max(until);
            (rotation.hot, rotation.frozen, Access::Write)
        })
    }

    /// Rule 3: foreign reads keep out of the hotzone, which ends at this order, from now on. True: none is in flight there. Else ask again, when
    /// told so.
    ///
    /// # Panics
    /// If no re-encryption runs, or the hotzone is not frozen.
    #[must_use]
    pub fn exclude(&self, until: u64) -> bool {
        self.bar(|rotation| {
            assert!(until <= rotation.frozen, "what is excluded was frozen");
            rotation.hot = until;
            (rotation.passed, rotation.hot, Access::Read)
        })
    }

    /// Put up a bar. True: requests of this kind have left.
    fn bar(&self, put: impl FnOnce(&mut Rotation) -> (u64, u64, Access)) -> bool {
        let mut inner = self.inner();
        let rotation = inner.rotation.as_mut().expect("a re-encryption runs");
        let (from, to, access) = put(rotation);
        let Some(zone) = rotation.extent(self.total, from, to) else { return true };
        let busy = inner.held.iter().any(|(_, held)| held.access == access && held.extent.overlaps(zone));
        inner.rotation.as_mut().expect("a re-encryption runs").awaited |= busy;
        !busy
    }

    /// Rule 4: all of the hotzone has been written: reads of it go on.
    ///
    /// # Panics
    /// If no re-encryption runs.
    pub fn renew(&self) {
        self.inner().rotation.as_mut().expect("a re-encryption runs").renewed = true;
        self.moved();
    }

    /// Rule 5: the hotzone is new, and the header says so durably. Behind the last one the re-encryption is over.
    ///
    /// # Panics
    /// If no re-encryption runs, or that was not the hotzone.
    pub fn pass(&self, until: u64) {
        let mut inner = self.inner();
        let rotation = inner.rotation.as_mut().expect("a re-encryption runs");
        assert!(rotation.hot == until, "what has passed was the hotzone");
        rotation.passed = until;
        rotation.renewed = false;
        if until == self.total {
            inner.become_new();
        }
        drop(inner);
        self.moved();
    }

    /// Rules 6 and 7: the re-encryption stops, and nobody reads or writes for it any more. `hot`: at rest, nothing; else the order behind the step that
    /// was not finished. No effect where none runs.
    pub fn stop(&self, hot: Option<u64>) {
        let mut inner = self.inner();
        let Some(rotation) = inner.rotation.as_mut().filter(|rotation| rotation.quiet.is_some()) else {
            return;
        };
        let resting = Rotation::at_rest(rotation.new.clone(), rotation.way, rotation.passed);
        *rotation = match hot {
            None => resting,
            Some(hot) => {
                let hot = hot.max(rotation.passed);
                Rotation { hot, frozen: hot, lost: true, ..resting }
            }
        };
        // Where nothing was done, it is as if it had never begun: the next one may be another.
        if rotation.passed == 0 && !rotation.lost {
            inner.rotation = None;
        }
        drop(inner);
        self.moved();
    }

    /// All of the volume is new, and the header says so, as somebody found out who looked: a last step that failed had succeeded after all.
    pub fn finish(&self) {
        self.inner().become_new();
        self.moved();
    }

    /// The order up to which it is new, while a re-encryption is under way.
    #[must_use]
    pub fn passed(&self) -> Option<u64> {
        self.inner().rotation.as_ref().map(|rotation| rotation.passed)
    }

    /// Those wait no longer that a re-encryption kept waiting.
    fn moved(&self) {
        if std::mem::take(&mut self.inner().barred) {
            self.wake();
        }
    }
}

impl super::Inner {
    fn become_new(&mut self) {
        if let Some(rotation) = self.rotation.take() {
            self.old = rotation.new;
        }
    }
}
