//! A volume as random I/O sees it: which cipher is where, and who may touch what just now.
//!
//! Foreign requests ask for their extent before they touch the device and give it back afterwards:
//!
//! | | beside a read | beside a write |
//! |---|---|---|
//! | read | yes | yes: either may come first, as on any disk |
//! | write | yes | not where they share a data unit |
//!
//! A re-encryption that runs meanwhile moves through the volume in *order* (see [`crate::pipeline::plan`]):
//!
//! ```text
//! order 0 ─── new ───▶ passed ─── hotzone: excluded ───▶ hot ─── read ahead: frozen ───▶ frozen ─── old ───▶ total
//! ```
//! 1. *frozen*: its old bytes are being read, or have been: no foreign write until the hotzone has passed;
//! 2. *excluded*: it is being overwritten: no foreign read either;
//! 3. *passed*: it is new, and the header says so durably.
//!
//! Why one lock around all of it, on the fast path: it is held for some tens of nanoseconds, twice per request of at least a
//! system call, and workers meet on it only when they serve the same volume.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::backend::Wake;
use crate::pipeline::segment::Segments;
use crate::units::Extent;

/// What a request does to its extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Bytes are read.
    Read,
    /// Bytes are changed.
    Write,
}

/// Leave to touch an extent, under these ciphers. Give it back with [`View::done`].
#[must_use = "an extent that is not given back stays locked"]
pub struct Grant {
    /// What may be touched: the extent asked for, or its first part.
    pub extent: Extent,
    /// How it is encrypted and where it lies: all of the extent is on one side of a boundary.
    pub segments: Arc<Segments>,
    key: usize,
}

/// Which way a re-encryption goes through the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// From byte 0.
    Forward,
    /// From the end.
    Backward,
}

struct Held {
    extent: Extent,
    access: Access,
}

struct Inner {
    old: Arc<Segments>,
    held: slab::Slab<Held>,
    /// Somebody waits for an extent.
    waiting: bool,
}

/// See the module.
pub struct View {
    total: u64,
    inner: Mutex<Inner>,
    /// Told whenever an extent was given back while a re-encryption waits for that.
    quiet: Condvar,
    /// Workers with requests that may wait.
    wakers: Mutex<Vec<Arc<dyn Wake>>>,
}

impl View {
    /// A volume of `total` bytes of plaintext, at rest.
    #[must_use]
    pub fn new(segments: Segments, total: u64) -> Arc<Self> {
        let inner = Inner { old: Arc::new(segments), held: slab::Slab::new(), waiting: false };
        Arc::new(Self { total, inner: Mutex::new(inner), quiet: Condvar::new(), wakers: Mutex::default() })
    }

    /// Bytes of plaintext.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// A worker that asks for extents: it is woken when one it was refused may be free.
    pub fn watch(&self, waker: Arc<dyn Wake>) {
        self.wakers.lock().unwrap_or_else(PoisonError::into_inner).push(waker);
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ask for an extent: whole data units, and of a write that changes parts of some, all of these. `None`: not now; the
    /// caller's worker is woken when to ask again.
    #[must_use]
    pub fn admit(&self, access: Access, extent: Extent) -> Option<Grant> {
        let mut inner = self.inner();
        let overlaps = |held: &Held| held.extent.start() < extent.end() && extent.start() < held.extent.end();
        if access == Access::Write
            && inner.held.iter().any(|(_, held)| held.access == Access::Write && overlaps(held))
        {
            inner.waiting = true;
            return None;
        }
        let key = inner.held.insert(Held { extent, access });
        Some(Grant { extent, segments: inner.old.clone(), key })
    }

    /// Give an extent back.
    pub fn done(&self, grant: Grant) {
        let woken = {
            let mut inner = self.inner();
            inner.held.remove(grant.key);
            std::mem::take(&mut inner.waiting)
        };
        self.quiet.notify_all();
        if woken {
            self.wakers.lock().unwrap_or_else(PoisonError::into_inner).iter().for_each(|waker| waker.wake());
        }
    }
}
