//! The ledger in a LUKS2 header.
//!
//! # Write orders
//! Of a step, see [`super::ledger`]. Saving: 1. the header is still ours, 2. checksums into the area. Beginning: 3. flush of the area, before
//! the header: one that is durable before its checksums would take stale ones for those of the hotzone, and old blocks for new ones;
//! 4. header *crash* (both copies, a flush each). Committing: 5. header *clean*.
//!
//! Before anything that goes on from a header that was found, see [`settle`].
//!
//! Behind the last step:
//! 1. (Only where the first bytes were moved to make room for the header.) The header says that all data is new, the re-encryption
//!    still being required; the moved bytes, plaintext, are overwritten; flush. Not after 2, for from there on they belong to the
//!    volume's data. A crash in between: the state *finished*, and a resume takes up here.
//! 2. One header that ends it: the data as it shall be, nothing of the old key, no requirement; and a note of the places that held the
//!    old key's material and the area. One write and not two, *clean* and then the end: a last *clean* state without moved bytes looks
//!    like a first one, and cryptsetup would begin anew over new data.
//! 3. These places are overwritten, flush.
//! 4. A header without the note.
//!
//! Why the material is destroyed behind the header and not before: until 2 is durable the last hotzone may be half old, and the old key
//! is needed to recover it. Why the note: after a crash between 2 and 4 nothing else would know that wrapped copies of the old key still lie
//! there. It is a token of a type of ours ([`NOTE`]), which other programs keep and do not act on; it opens nothing. Whoever opens
//! the volume to re-encrypt it next does 3 and 4, without any key ([`sweep`]). Places that have become another program's keyslot since
//! are left alone.
//!
//! The metadata lock is held around each header write only (and from 1 to 4), so that other programs can read the header in between.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::backend::blocking::Blocking;
use crate::error::{Error, ErrorKind, Result};
use crate::format::luks2::metadata::{Area, Keyslot, Metadata, Token};
use crate::format::luks2::reencrypt::{Direction, Mode, Process, Resilience, write};
use crate::format::luks2::{Copy, Health, Loaded};
use crate::units::Extent;
use crate::volume::reencrypt::ledger::{Ledger, Protection};
use crate::volume::{Header, store};

/// Type of the token that names places still to be overwritten.
pub const NOTE: &str = "cryptctl-overwrite";
/// Its field: pairs of first byte and bytes, as texts.
const NOTE_AREAS: &str = "areas";

/// Progress kept in the header of a LUKS2 volume.
pub struct LuksLedger {
    header: Blocking,
    loaded: Loaded,
    process: Process,
    total: u64,
    boundary: u64,
    /// The hotzone begun, not committed.
    hot: Option<Extent>,
    /// A write failed: what is on disk is not known any more.
    broken: bool,
    /// See [`Ledger::is_locked_out`].
    locked_out: bool,
}

impl LuksLedger {
    /// At rest at `boundary`. `loaded`: the header on disk.
    #[must_use]
    pub fn new(header: Blocking, loaded: Loaded, process: Process, total: u64, boundary: u64) -> Self {
        Self { header, loaded, process, total, boundary, hot: None, broken: false, locked_out: false }
    }

    /// A hotzone that follows the boundary and is as its protection wants it.
    fn check(&self, hot: Extent) -> Result<()> {
        let (follows, free_end) = match self.process.direction {
            Direction::Forward => (hot.start() == self.boundary, hot.end()),
            Direction::Backward => (hot.end() == self.boundary, hot.start()),
        };
        let unit = self.process.step_bytes();
        let aligned = free_end.is_multiple_of(unit);
        let short = self.process.hotzone_max().is_none_or(|most| hot.len() <= most);
        let within = hot.end() <= self.total;
        let moved = self.process.moved.map_or(0, |moved| moved.bytes);
        let whole = hot.start() >= moved || (hot.start() == 0 && hot.end() == moved);
        if follows && aligned && short && within && whole {
            return Ok(());
        }
        let what = format!(
            "a step of bytes {}..{} is none that follows {} of {}",
            hot.start(),
            hot.end(),
            self.boundary,
            self.total
        );
        Err(Error::new(ErrorKind::Internal, what).at(self.header.name()))
    }

    fn refuse_if_broken(&self) -> Result<()> {
        if !self.broken {
            return Ok(());
        }
        let what = "a write of the header failed before: what it says now is not known";
        Err(Error::new(ErrorKind::Io, what)
            .at(self.header.name())
            .hint("resume the re-encryption: that reads the header anew, and recovers the step"))
    }

    /// The metadata lock: who does not get it has touched nothing.
    fn lock(&mut self) -> Result<HeaderLock> {
        self.refuse_if_broken()?;
        let held = store::lock_device(&self.header, true);
        self.locked_out = matches!(&held, Err(error) if error.kind() == ErrorKind::Conflict);
        held
    }

    /// Whatever fails in `work` leaves the ledger refusing.
    fn guarded(&mut self, work: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        self.refuse_if_broken()?;
        let done = work(self);
        self.broken = done.is_err();
        done
    }
}

impl Ledger for LuksLedger {
    fn protection(&self) -> Protection {
        match self.process.resilience {
            Resilience::None | Resilience::Datashift { .. } => Protection::None,
            Resilience::Checksum(checksum) => Protection::Checksums(checksum),
            Resilience::Journal => Protection::Journal {
                file: self.header.file().clone(),
                name: self.header.name().to_owned(),
                offset: self.process.area.offset,
                align: self.header.align(),
            },
        }
    }

    fn step_bytes(&self) -> u64 {
        self.process.step_bytes()
    }

    fn hotzone_max(&self) -> Option<u64> {
        self.process.hotzone_max()
    }

    fn save(&mut self, hot: Extent, checksums: &[u8]) -> Result<()> {
        let Resilience::Checksum(checksum) = self.process.resilience else { return Ok(()) };
        self.check(hot)?;
        if checksums.len() as u64 != checksum.bytes_for(hot.len()) || self.hot.is_some() {
            let what = "checksums of another step than the next";
            return Err(Error::new(ErrorKind::Internal, what).at(self.header.name()));
        }
        self.guarded(|ledger| {
            // 1. A place that is another program's keyslot by now is not written to.
            let before = Header::Luks2(Box::new(ledger.loaded.clone()));
            store::unchanged(&mut ledger.header, &before)?;
            // 2.
            ledger.header.write(ledger.process.area.offset, checksums)
        })
    }

    fn begin(&mut self, hot: Extent) -> Result<()> {
        self.check(hot)?;
        // 3.
        if matches!(self.process.resilience, Resilience::Checksum(_) | Resilience::Journal) {
            self.guarded(|ledger| ledger.header.flush())?;
        }
        // 4.
        let held = self.lock()?;
        self.guarded(|ledger| {
            let mut next = ledger.loaded.clone();
            write::hot(&mut next.header.metadata, &ledger.process, hot, ledger.total)?;
            put(&mut ledger.header, &mut ledger.loaded, next, &held)
        })?;
        self.hot = Some(hot);
        Ok(())
    }

    fn commit(&mut self, hot: Extent) -> Result<()> {
        let of_the_step = self.hot.is_some_and(|begun| match self.process.resilience {
            // Stopped early: less than what was begun with.
            Resilience::None => begun.start() <= hot.start() && hot.end() <= begun.end(),
            _ => begun == hot,
        });
        if !of_the_step {
            let what = "a step is committed that was not begun";
            return Err(Error::new(ErrorKind::Internal, what).at(self.header.name()));
        }
        self.check(hot)?;
        let boundary = self.process.boundary_after(hot);
        // 5.
        let held = self.lock()?;
        self.guarded(|ledger| {
            let LuksLedger { header, loaded, process, total, .. } = ledger;
            commit_locked(header, loaded, process, (boundary, *total), &held)
        })?;
        self.boundary = boundary;
        self.hot = None;
        Ok(())
    }

    fn is_locked_out(&self) -> bool {
        self.locked_out
    }
}

/// The metadata lock of a header's file.
type HeaderLock = store::Lock<Arc<OwnedFd>>;

/// Make durable what is visible: what whoever goes on from a header does before the first write to data, area or key material.
///
/// A header that was found may be one of the page cache only: its writer was killed before the flush, or the flush failed, after which Linux
/// takes the pages for clean although the medium has the old ones. A power cut would then bring back the header of before over data,
/// or over an area, that have gone on from this one. So:
///
/// 1. The header is still the one that was found, under the lock.
/// 2. Each good copy is written with the very bytes that were read, flush each. The same bytes and no new header: which of the two copies is
///    durable cannot be known, and a new one, torn, over that one would leave none; the same bytes tear nothing.
/// 3. The data is flushed: what is read and hashed or saved next is what a power cut leaves.
///
/// # Errors
/// `Conflict`: the header on disk is not `loaded`. Else of the devices: then it can be done again.
pub fn settle(header: &mut Blocking, data: &mut Blocking, loaded: &Loaded) -> Result<()> {
    let held = store::lock_device(header, true)?;
    // 1. and 2.
    settle_header(header, loaded)?;
    drop(held);
    // 3.
    data.flush()
}

/// Steps 1 and 2 of [`settle`], under the exclusive lock.
fn settle_header(header: &mut Blocking, loaded: &Loaded) -> Result<()> {
    // 1.
    store::unchanged(header, &Header::Luks2(Box::new(loaded.clone())))?;
    // 2.
    let length = usize::try_from(loaded.header.copy_bytes).expect("a copy of a header");
    let mut bytes = vec![0; length];
    for (copy, health) in [Copy::Primary, Copy::Secondary].into_iter().zip(&loaded.health) {
        if *health == Health::Good {
            header.read(loaded.header.offset(copy), &mut bytes)?;
            header.write(loaded.header.offset(copy), &bytes)?;
            header.flush()?;
        }
    }
    Ok(())
}

/// One header write under the metadata lock.
fn put(header: &mut Blocking, loaded: &mut Loaded, mut next: Loaded, _held: &HeaderLock) -> Result<()> {
    store::write_luks2(header, &mut next)?;
    *loaded = next;
    Ok(())
}

/// Everything up to `boundary` is new and durable: say so; at the end, take the re-encryption down.
///
/// # Errors
/// `Conflict`: the header on disk is not `loaded`. Else of the device.
pub fn commit(
    header: &mut Blocking,
    loaded: &mut Loaded,
    process: &Process,
    boundary: u64,
    total: u64,
) -> Result<()> {
    let held = store::lock_device(header, true)?;
    commit_locked(header, loaded, process, (boundary, total), &held)
}

fn commit_locked(
    header: &mut Blocking,
    loaded: &mut Loaded,
    process: &Process,
    (boundary, total): (u64, u64),
    held: &HeaderLock,
) -> Result<()> {
    if boundary == process.ends_at(total) {
        return take_down_locked(header, loaded, process, total, held);
    }
    let mut next = loaded.clone();
    write::clean(&mut next.header.metadata, process, boundary, total)?;
    put(header, loaded, next, held)
}

/// All data is new and durable: end it, in the order of the module's head.
///
/// # Errors
/// As [`commit`]; once more is harmless.
pub fn take_down(header: &mut Blocking, loaded: &mut Loaded, process: &Process, total: u64) -> Result<()> {
    let held = store::lock_device(header, true)?;
    take_down_locked(header, loaded, process, total, &held)
}

fn take_down_locked(
    header: &mut Blocking,
    loaded: &mut Loaded,
    process: &Process,
    total: u64,
    held: &HeaderLock,
) -> Result<()> {
    // 1. Data was moved only out of the way of a header that lies on the same device.
    if let (Some(moved), Mode::Encrypt) = (process.moved, process.mode) {
        let mut next = loaded.clone();
        write::clean(&mut next.header.metadata, process, process.ends_at(total), total)?;
        put(header, loaded, next, held)?;
        store::random_fill(header, moved.offset, moved.bytes)?;
        header.flush()?;
    }
    // 2.
    let mut next = loaded.clone();
    let mut gone = vec![process.area];
    write::clean(&mut next.header.metadata, process, process.ends_at(total), total)?;
    gone.extend(write::finish(&mut next.header.metadata, process)?.into_iter().map(|(_, area)| area));
    let noted = note(&mut next, &gone);
    put(header, loaded, next, held)?;
    // 3. and 4.
    overwrite(header, loaded, &gone, noted)
}

/// Add the note; its number. Without room for it (32 tokens, a full header) it is done without: a crash in the next moments would then
/// leave wrapped copies of the old key, which opens nothing, where no header points.
pub(super) fn note(next: &mut Loaded, areas: &[Area]) -> Option<u32> {
    if areas.is_empty() {
        return None;
    }
    let id = next.header.metadata.free_token().ok()?;
    let areas = areas.iter().map(|area| Value::from(vec![area.offset.to_string(), area.size.to_string()]));
    let extra = Map::from_iter([(NOTE_AREAS.to_owned(), areas.collect())]);
    next.header.metadata.tokens.insert(id, Token { kind: NOTE.to_owned(), keyslots: Vec::new(), extra });
    if next.header.check().is_err() {
        next.header.metadata.tokens.remove(&id);
        return None;
    }
    Some(id)
}

/// The places of a note that are places at all.
fn noted(metadata: &Metadata) -> Option<(u32, Vec<Area>)> {
    let (id, token) = metadata.tokens.iter().find(|(_, token)| token.kind == NOTE)?;
    let pair = |value: &Value| {
        let number = |index: usize| value.get(index)?.as_str()?.parse::<u64>().ok();
        Some(Area { offset: number(0)?, size: number(1)? })
    };
    let areas = token.extra.get(NOTE_AREAS).and_then(Value::as_array);
    Some((*id, areas.map_or_else(Vec::new, |areas| areas.iter().filter_map(pair).collect())))
}

/// Is something of an old key still to be overwritten?
#[must_use]
pub fn is_unswept(metadata: &Metadata) -> bool {
    noted(metadata).is_some()
}

/// Steps 3 and 4 of the end, where a crash left them undone. True: there was something to do. Needs no key; `loaded` is
/// the header on disk before and after.
///
/// # Errors
/// `Conflict`: the header on disk is not `loaded`. Else of the device.
pub fn sweep(header: &mut Blocking, loaded: &mut Loaded) -> Result<bool> {
    let Some((id, areas)) = noted(&loaded.header.metadata) else { return Ok(false) };
    let _held = store::lock_device(header, true)?;
    // The header that needs the old key no more is durable before the key goes.
    settle_header(header, loaded)?;
    overwrite(header, loaded, &areas, Some(id))?;
    Ok(true)
}

/// Under the exclusive lock, behind a write or [`settle_header`] of `loaded`.
fn overwrite(header: &mut Blocking, loaded: &mut Loaded, areas: &[Area], note: Option<u32>) -> Result<()> {
    // 3. What the header on disk uses is not touched, nor what is not of its keyslots area: a note is anybody's to write.
    let before = Header::Luks2(Box::new(loaded.clone()));
    store::unchanged(header, &before)?;
    for area in unused(loaded, areas) {
        store::random_fill(header, area.start(), area.len())?;
    }
    header.flush()?;
    // 4.
    if let Some(id) = note {
        let mut next = loaded.clone();
        next.header.metadata.tokens.remove(&id);
        store::write_luks2(header, &mut next)?;
        *loaded = next;
    }
    Ok(())
}

/// What of these areas lies in the keyslots area and is no keyslot's.
fn unused(loaded: &Loaded, areas: &[Area]) -> Vec<Extent> {
    let used: Vec<Area> = loaded.header.metadata.keyslots.values().filter_map(Keyslot::area).collect();
    let (first, last) = (loaded.header.keyslots_offset(), loaded.header.backup_bytes());
    let mut free: Vec<Extent> = areas
        .iter()
        .filter_map(|area| Extent::new(area.offset.max(first), area.end().unwrap_or(u64::MAX).min(last)))
        .collect();
    for area in used {
        let end = area.end().unwrap_or(u64::MAX);
        free = free
            .into_iter()
            .flat_map(|one| {
                let before = Extent::new(one.start(), one.end().min(area.offset));
                let behind = Extent::new(one.start().max(end), one.end());
                [before, behind]
            })
            .flatten()
            .collect();
    }
    free
}
