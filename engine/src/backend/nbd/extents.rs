//! Block status of a whole volume: which bytes are zeros, which a bitmap marks.
//!
//! It is asked for on a thread that may wait, a GiB at a time, and kept as extents, of which there are at most [`EXTENTS_MAX`]: beyond
//! that, those that are close to each other are joined with what lies between them, farther and farther apart. So more may be read or
//! copied than must be, never less. Who must know every hole is told when there were too many ([`Volume::learn_zeros`]).
//!
//! What the server says of zeros is what was so when it was asked. A volume that somebody writes to while it is read has no content of
//! one moment anyway; whoever needs that exports a snapshot.

use std::sync::{Arc, PoisonError};
use std::thread::Thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::backend::device::{Device, Region};
use crate::backend::nbd::Volume;
use crate::backend::nbd::queue::Inbox;
use crate::backend::nbd::session::{Answer, Owner, StatusExtent};
use crate::backend::{Done, Wake};
use crate::error::{Error, ErrorKind, Result};
use crate::format::nbd::{BASE_ALLOCATION, DIRTY_BITMAP, allocation};
use crate::units::Extent;

/// Bytes asked for at a time.
const STEP: u64 = 1 << 30;
/// Extents kept: 4 MiB of them.
pub const EXTENTS_MAX: usize = 1 << 18;
/// Replies for one volume: more say that the server does not get on.
const REPLIES_MAX: u32 = 1 << 22;
/// How long one reply may take.
const REPLY_WAIT: Duration = Duration::from_secs(60);
/// How often to look whether a connection that broke is there again.
const POLL: Duration = Duration::from_millis(100);
/// The flag of a dirty extent.
const DIRTY: u64 = 1;

/// What a source's bitmap marks, ascending and apart. Blocks, until `give_up` says so: not for workers.
///
/// # Errors
/// `Unsupported`: the server has no such bitmap, or tells of none. `Io`: as it says. `Cancelled`: given up.
pub fn marked(source: &Device, give_up: &dyn Fn() -> bool) -> Result<Vec<Extent>> {
    let no_remote = || Error::new(ErrorKind::Invalid, "only an NBD server has bitmaps").at(source.name());
    let volume = source.remote().ok_or_else(no_remote)?;
    let context = volume
        .shared
        .wish
        .context
        .as_deref()
        .ok_or_else(|| Error::new(ErrorKind::Invalid, "no bitmap was named").at(source.name()))?;
    let Some(id) = volume.facts().context(context) else {
        let what = format!("the NBD server has no “{}”", super::session::printable(context.as_bytes()));
        return Err(Error::new(ErrorKind::Unsupported, what)
            .at(source.name())
            .hint("`nbdinfo --map=NAME` shows what a server has; qemu-nbd offers a bitmap by -B NAME"));
    };
    let dirty = |flags| if context.starts_with(DIRTY_BITMAP) { flags & DIRTY != 0 } else { flags != 0 };
    let kept = collect(volume, id, dirty, give_up).map_err(|error| error.at(source.name()))?;
    Ok(kept.extents)
}

impl Volume {
    /// Ask which bytes are zeros, if that was not learned yet. Blocks, until `give_up` says so: not for workers.
    ///
    /// # Errors
    /// All bytes are data then, as far as is known. `Unsupported`: the server does not say; `Io`: it does not answer as it should;
    /// `Cancelled`: given up. `Limit`: some zeros are taken for data, since they are in more places than are remembered.
    pub fn learn_zeros(&self, give_up: &dyn Fn() -> bool) -> Result<()> {
        if self.data.get().is_none() {
            let id = self.facts().context(BASE_ALLOCATION).ok_or_else(silent_of_holes)?;
            // A hole alone says nothing of what it reads as.
            let is_data = |flags| flags & u64::from(allocation::ZERO) == 0;
            let kept = collect(self, id, is_data, give_up)?;
            // Who learned it at the same time has learned the same.
            let _ = self.data.set(kept);
        }
        if self.data.get().is_some_and(|kept| kept.gap > 0) {
            let what = format!("it has zeros between more than {EXTENTS_MAX} extents of data");
            return Err(Error::new(ErrorKind::Limit, what));
        }
        Ok(())
    }

    /// What lies at `offset`, as far as it was learned. Never waits.
    #[must_use]
    pub fn region_at(&self, offset: u64) -> Region {
        let size = self.facts().size;
        let Some(Kept { extents: data, .. }) = self.data.get() else { return Region::Data { until: size } };
        match data.get(data.partition_point(|extent| extent.end() <= offset)) {
            None => Region::Hole { until: size },
            Some(extent) if extent.start() > offset => Region::Hole { until: extent.start() },
            Some(extent) => Region::Data { until: extent.end() },
        }
    }
}

/// A server that has no block status.
#[must_use]
pub fn silent_of_holes() -> Error {
    Error::new(ErrorKind::Unsupported, "the NBD server does not say what of it is holes")
}

/// The extents of a volume whose flags in a context are `wanted`.
fn collect(
    volume: &Volume,
    context: u32,
    wanted: impl Fn(u64) -> bool,
    give_up: &dyn Fn() -> bool,
) -> Result<Kept> {
    let (size, block) = (volume.facts().size, u64::from(volume.facts().block_min.max(1)));
    let mut kept = Kept { extents: Vec::new(), gap: 0, most: EXTENTS_MAX };
    let mut asker = Asker::of(volume);
    let mut offset = 0;
    let mut replies = 0;
    while offset < size {
        replies += 1;
        let length = (size - offset).min(STEP);
        let before = offset;
        for extent in asker.ask(offset, u32::try_from(length).expect("a GiB at most"), give_up)? {
            // The last may go beyond what was asked; what lies there is asked for.
            let end = offset.saturating_add(extent.length).min(before + length);
            if extent.context == context && offset < end {
                if wanted(extent.flags) {
                    kept.add(offset, end);
                }
                offset = end;
            }
        }
        // A server may tell of part of a block, and is never asked of one: it is wanted whole.
        let past = offset % block;
        if past > 0 && offset < size {
            let told = kept.extents.last().map_or(0, |extent| extent.end());
            let whole = (offset - past + block).min(size);
            kept.add(told.max(offset - past), whole);
            offset = whole;
        }
        if offset == before || replies > REPLIES_MAX {
            return Err(Error::new(ErrorKind::Io, "the NBD server's block status does not get on"));
        }
    }
    Ok(kept)
}

/// Extents, ascending, of which there are not too many.
pub(super) struct Kept {
    extents: Vec<Extent>,
    /// Those that are no farther apart are joined, and what lies between them is not told from them any more.
    gap: u64,
    most: usize,
}

impl Kept {
    fn add(&mut self, start: u64, end: u64) {
        match self.extents.last_mut() {
            Some(last) if start - last.end() <= self.gap => {
                *last = Extent::new(last.start(), end).expect("it grows");
            }
            _ => self.extents.push(Extent::new(start, end).expect("it has bytes")),
        }
        while self.extents.len() > self.most {
            self.gap = (self.gap * 2).max(4096);
            let gap = self.gap;
            self.extents.dedup_by(|next, last| {
                let joined = next.start() - last.end() <= gap;
                if joined {
                    *last = Extent::new(last.start(), next.end()).expect("both have bytes");
                }
                joined
            });
        }
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(&self) {
        self.0.unpark();
    }
}

/// Asks one thing after the other, on a connection that workers may use at the same time.
struct Asker {
    connection: Arc<super::Connection>,
    inbox: Arc<Inbox>,
}

impl Asker {
    fn of(volume: &Volume) -> Self {
        let inbox = Inbox::new(Arc::new(Unpark(std::thread::current())));
        Self { connection: volume.take_connection(), inbox }
    }

    fn ask(&mut self, offset: u64, length: u32, give_up: &dyn Fn() -> bool) -> Result<Vec<StatusExtent>> {
        let answer = Answer::default();
        let owner = Owner { inbox: Arc::clone(&self.inbox), port: 0, token: 0 };
        self.connection.submit_status(owner, offset, length, Arc::clone(&answer));
        let done = self.wait(give_up)?;
        done.result.map_err(|cause| Error::io("asking for block status failed", cause))?;
        Ok(std::mem::take(&mut *answer.lock().unwrap_or_else(PoisonError::into_inner)))
    }

    fn wait(&mut self, give_up: &dyn Fn() -> bool) -> Result<Done> {
        let deadline = Instant::now() + REPLY_WAIT;
        loop {
            let watch = self.connection.pump(&self.inbox, true);
            let mut ended = None;
            self.inbox.drain(|_, done| ended = Some(done));
            if let Some(done) = ended {
                return Ok(done);
            }
            let given_up = give_up();
            if given_up || Instant::now() >= deadline {
                self.connection.cancel(&self.inbox, 0, true);
                self.inbox.drain(|_, _| ());
                return Err(if given_up {
                    Error::new(ErrorKind::Cancelled, "asking for block status was given up")
                } else {
                    Error::new(ErrorKind::Io, "the NBD server does not answer")
                });
            }
            match watch.socket {
                // Another queue may take our reply off the connection, so not for long.
                Some((_, socket)) => {
                    let wanted = if watch.write { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
                    let wait = Timespec::try_from(POLL).expect("short");
                    let _ = poll(&mut [PollFd::new(&socket, wanted)], Some(&wait));
                }
                None => std::thread::park_timeout(POLL),
            }
        }
    }
}

impl Drop for Asker {
    fn drop(&mut self) {
        self.connection.let_go();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_many_extents_are_joined_and_none_is_lost() {
        let mut kept = Kept { extents: Vec::new(), gap: 0, most: 100 };
        for at in 0..100_000_u64 {
            let start = at * 100_000;
            kept.add(start, start + 10);
            assert!(kept.extents.len() <= 100);
        }
        assert!(kept.extents.windows(2).all(|pair| pair[0].end() < pair[1].start()));
        for at in 0..100_000_u64 {
            let start = at * 100_000;
            let covered =
                kept.extents.iter().any(|extent| extent.start() <= start && start + 10 <= extent.end());
            assert!(covered, "{start}");
        }
        let mut kept = Kept { extents: Vec::new(), gap: 0, most: 100 };
        kept.add(0, 10);
        kept.add(10, 20);
        kept.add(30, 40);
        let as_pairs: Vec<_> = kept.extents.iter().map(|extent| (extent.start(), extent.end())).collect();
        assert_eq!(as_pairs, [(0, 20), (30, 40)]);
    }
}
