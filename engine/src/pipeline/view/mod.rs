//! A volume as random I/O sees it: which cipher is where, and who may touch what just now.
//!
//! Foreign requests ask for their extent before they touch the device and give it back when the device has answered:
//!
//! | | beside a read | beside a write |
//! |---|---|---|
//! | read | yes | yes, if its cipher allows: either may come first, as on any disk |
//! | write | yes | not where they share a data unit |
//!
//! Why a read beside a write is safe: it may find a part of it, and the rest of what it finds is the same bytes as before, also where the
//! write is of a whole data unit for the sake of a few bytes of it. Where a cipher chains the blocks of a data unit (CBC) it is not: half of a
//! write makes other bytes of the unit come out wrong, which nobody wrote. There reads and writes that overlap keep away from each other, and
//! no read overtakes a write that waits.
//!
//! A re-encryption that runs meanwhile moves through the volume in *order* (see [`crate::pipeline::plan`]):
//!
//! ```text
//! order 0 ─── new ───▶ passed ─── hotzone: excluded ───▶ hot ─── read ahead: frozen ───▶ frozen ─── old ───▶ total
//! ```
//! What is safe when, for hotzones protected by checksums or by a journal (no others move while clients are served). `rotation` has
//! the calls, `job::reencrypt::steps` makes them; the steps of a hotzone are those of the ledger.
//!
//! 1. *Frozen* before the first read ahead: its old bytes are being read, or have been, and are what will be written. A foreign write
//!    would be undone. No new one is admitted, and those in flight are waited for. Reads go on: what is there stays old.
//! 2. *Durable* before the header says that the hotzone is being rewritten: whatever foreign writes have left in it is flushed first. What
//!    protects it (checksums above all) is of these bytes: if a power cut took one of them back, its block would have another hash
//!    than the stored one, and a recovery would take it for new. So between the freezing and [`begin`] there is a flush of the data.
//! 3. *Excluded* before the first byte is overwritten: reads in flight, which would decrypt new bytes with the old key, are waited for,
//!    and no new ones admitted. Not sooner than the header says so: until then reads are no harm.
//! 4. *Renewed* when the last byte is written: reads go on, under the new cipher. Whatever becomes of the step from here on, every byte of it
//!    comes out as the same plaintext: a recovery changes no plaintext.
//! 5. *Passed* when the header says durably that it is new: writes go on, under the new cipher. Not sooner: a recovery would write the
//!    journal's bytes over them, or take a block that a write has left for an old one.
//! 6. *Lost* when the step failed: what it had begun is refused, reads and writes, until somebody has recovered it. What the header says
//!    is not known then, nor what is old and what is new.
//! 7. *Thawed* when the re-encryption stops at rest: what was only frozen is old, and free.
//!
//! Everything else is open to everybody at any time: behind the boundary a step under way neither reads nor writes, and ahead of what
//! is frozen nothing has been read. A client's flush may come at any time: it makes durable what was written, and never says of anything
//! that it is new.
//!
//! Fairness: freezing and excluding take effect at once, for new requests; then those in flight are waited for. So a stream of
//! requests cannot keep a re-encryption waiting, and what is refused waits for one step at most.
//!
//! Why one lock around all of it, on the fast path: it is held for some tens of nanoseconds, twice per request of at least a
//! system call, and workers meet on it only when they serve the same volume.
//!
//! [`begin`]: crate::volume::reencrypt::ledger::Ledger::begin

mod rotation;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::backend::Wake;
use crate::pipeline::segment::Segments;
use crate::units::Extent;
use rotation::Rotation;

/// What a request does to its extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Bytes are read.
    Read,
    /// Bytes are changed.
    Write,
}

/// Leave to touch an extent, under these ciphers. Give it back with [`View::done`] as soon as the device has answered, whatever
/// it said; never keep it while a client is waited for: a re-encryption waits for it, and others for that.
#[must_use = "an extent that is not given back stays locked"]
pub struct Grant {
    /// What may be touched: of the extent asked for all, or the first part; ask again for the rest. Widened to whole data units, so it may
    /// begin before what was asked for, and end behind it.
    pub extent: Extent,
    /// How it is encrypted and where it lies: all of the extent is in one segment.
    pub segments: Arc<Segments>,
    key: usize,
}

/// Why an extent is not granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Not now: the caller's worker is woken when to ask again.
    Wait,
    /// A step of a re-encryption over its beginning has failed, and it is not known what of it is old and what is new: an I/O error, until the
    /// re-encryption is resumed, which recovers it. Nobody is woken then.
    Lost,
}

/// Which way a re-encryption goes through the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// From byte 0.
    Forward,
    /// From the end.
    Backward,
}

#[derive(Debug)]
struct Held {
    extent: Extent,
    access: Access,
}

struct Inner {
    /// Of a re-encryption under way: what it goes from.
    old: Arc<Segments>,
    rotation: Option<Rotation>,
    held: slab::Slab<Held>,
    /// Somebody waits for an extent that a request holds.
    waiting: bool,
    /// What a write waits for that reads must not overtake: one that is held is in its way.
    wanted: Option<Extent>,
    /// Somebody waits for a re-encryption to move on.
    barred: bool,
    /// Requests admitted so far.
    admitted: u64,
}

/// What may be done with the beginning of an extent.
enum Ruling {
    /// Up to this byte, under these ciphers.
    Open(u64, Arc<Segments>),
    /// Not until the re-encryption has moved on.
    Barred,
    /// Not until it was recovered.
    Lost,
}

/// See the module.
pub struct View {
    total: u64,
    inner: Mutex<Inner>,
    /// Workers with requests that may wait.
    wakers: Mutex<Vec<Arc<dyn Wake>>>,
}

impl View {
    /// A volume of `total` bytes of plaintext, at rest.
    #[must_use]
    pub fn new(segments: Segments, total: u64) -> Arc<Self> {
        Self::with(segments, None, total)
    }

    fn with(segments: Segments, rotation: Option<Rotation>, total: u64) -> Arc<Self> {
        let inner = Inner {
            old: Arc::new(segments),
            rotation,
            held: slab::Slab::new(),
            waiting: false,
            wanted: None,
            barred: false,
            admitted: 0,
        };
        Arc::new(Self { total, inner: Mutex::new(inner), wakers: Mutex::default() })
    }

    /// Bytes of plaintext.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The largest data unit in force, bytes. It grows when a re-encryption to a larger one begins.
    #[must_use]
    pub fn unit_bytes(&self) -> u32 {
        let inner = self.inner();
        let old = inner.old.unit_bytes();
        inner.rotation.as_ref().map_or(old, |rotation| rotation.new.unit_bytes().max(old))
    }

    /// Requests admitted so far.
    #[must_use]
    pub fn admitted(&self) -> u64 {
        self.inner().admitted
    }

    /// A worker that asks for extents: it is woken when one it was refused may be free.
    /// One that watches already is not noted twice: workers let go of a volume and come back.
    pub fn watch(&self, waker: Arc<dyn Wake>) {
        let mut wakers = self.wakers.lock().unwrap_or_else(PoisonError::into_inner);
        if !wakers.iter().any(|other| Arc::ptr_eq(other, &waker)) {
            wakers.push(waker);
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ask for an extent, any bytes of the volume; what is granted is whole data units, see [`Grant`]. Who must read and write in larger
    /// pieces than data units (a device's blocks) asks for these, or two writes would share one.
    ///
    /// # Errors
    /// See [`Refusal`].
    ///
    /// # Panics
    /// If the extent ends beyond the volume.
    pub fn admit(&self, access: Access, extent: Extent) -> Result<Grant, Refusal> {
        assert!(extent.end() <= self.total, "a request is inside its volume");
        let mut inner = self.inner();
        let (until, segments) = match inner.ruling(self.total, access, extent.start()) {
            Ruling::Open(until, segments) => (until, segments),
            Ruling::Barred => {
                inner.barred = true;
                return Err(Refusal::Wait);
            }
            Ruling::Lost => return Err(Refusal::Lost),
        };
        let extent = segments.widen(extent, until).expect("boundaries lie between data units");
        let chained = !segments.is_separable();
        let excluded = |other: Access| match (access, other) {
            (Access::Write, Access::Write) => true,
            (Access::Read, Access::Read) => false,
            _ => chained,
        };
        let overtakes = access == Access::Read && inner.wanted.is_some_and(|wanted| wanted.overlaps(extent));
        if overtakes
            || inner.held.iter().any(|(_, held)| excluded(held.access) && held.extent.overlaps(extent))
        {
            inner.waiting = true;
            if chained && access == Access::Write {
                inner.wanted.get_or_insert(extent);
            }
            return Err(Refusal::Wait);
        }
        inner.admitted += 1;
        let key = inner.held.insert(Held { extent, access });
        Ok(Grant { extent, segments, key })
    }

    /// Give an extent back.
    pub fn done(&self, grant: Grant) {
        let (woken, quiet) = {
            let mut inner = self.inner();
            let held = inner.held.remove(grant.key);
            let inner = &mut *inner;
            // Who is first to ask now has it: the write, unless it has gone. Behind another write all ask again, or writes in a row to
            // parts of what is wanted would keep reads from the rest of it.
            let still = |wanted: &Extent| inner.held.iter().any(|(_, held)| held.extent.overlaps(*wanted));
            inner.wanted = inner.wanted.filter(|wanted| held.access == Access::Read && still(wanted));
            let quiet = inner.rotation.as_mut().and_then(|rotation| rotation.left(self.total, &held));
            (std::mem::take(&mut inner.waiting), quiet)
        };
        if let Some(quiet) = quiet {
            quiet();
        }
        if woken {
            self.wake();
        }
    }

    fn wake(&self) {
        self.wakers.lock().unwrap_or_else(PoisonError::into_inner).iter().for_each(|waker| waker.wake());
    }
}

impl Inner {
    /// What may be done from this byte on.
    fn ruling(&self, total: u64, access: Access, at: u64) -> Ruling {
        match &self.rotation {
            None => Ruling::Open(total, self.old.clone()),
            Some(rotation) => rotation.ruling(total, access, at, &self.old),
        }
    }
}
