//! What a run leaves at each of its events, without cutting it: everything that decides what would be found after a power cut there.
//!
//! Images and writes are shared, so that an event costs a few references for each write that is not durable.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;

use super::disk::Medium;
use super::image::Image;
use super::{Cut, DiskOptions, Inner, Moved, Options, Phase, World, random};
use crate::backend::Position;
use crate::error::Result;

/// All disks of a world after a power cut.
#[derive(Debug, Clone)]
pub(super) struct Remains {
    /// Writes and flushes so far.
    pub(super) events: u64,
    pub(super) options: Options,
    pub(super) disks: Vec<Medium>,
}

impl Remains {
    /// What each disk holds when the power comes back.
    pub(super) fn survivors(&self, tear: u64) -> Vec<(Image, DiskOptions)> {
        let disks = (0_u64..).zip(&self.disks);
        // The same manner for each disk, other dice.
        disks.map(|(index, disk)| (disk.survivors(tear.wrapping_add(index << 32)), disk.options)).collect()
    }

    /// A number for what survived: another one for something else.
    pub(super) fn changes(&self, survivors: &[(Image, DiskOptions)]) -> u64 {
        let each = self.disks.iter().zip(survivors).map(|(disk, (image, _))| disk.changes(image));
        each.fold(0, |sum, changes| random::mix(sum ^ changes))
    }

    pub(super) fn power_on(&self, tear: u64, disks: Vec<(Image, DiskOptions)>) -> Result<World> {
        let world = World::with(random::mix(tear ^ self.events), self.options);
        for (image, options) in disks {
            world.add(image, options)?;
        }
        Ok(world)
    }
}

/// A write that was handed over and has not come back.
#[derive(Debug)]
struct Flying {
    disk: usize,
    through: Arc<OwnedFd>,
    position: Position,
    bytes: Arc<[u8]>,
    moved: usize,
}

impl Flying {
    /// Where the rest of it goes, and what it is.
    fn rest(&self) -> Option<(u64, Arc<[u8]>)> {
        let offset = match self.position {
            Position::At(offset) => offset + self.moved as u64,
            Position::Stream => rustix::fs::tell(&self.through).ok()?,
        };
        let rest = if self.moved == 0 { self.bytes.clone() } else { self.bytes[self.moved..].into() };
        Some((offset, rest))
    }
}

/// One event.
#[derive(Debug)]
struct Moment {
    /// Just before it; its own write is on its way.
    before: Remains,
    /// Which of those on their way that is.
    own: Option<u64>,
    /// Just after it.
    after: Remains,
}

/// What a run leaves, event by event.
#[derive(Debug, Default)]
pub(super) struct Record {
    flying: BTreeMap<u64, Flying>,
    moments: Vec<Moment>,
    /// There was a read behind the last event: without power that would have failed.
    read_since: bool,
}

impl Record {
    /// What a cut leaves; `None`: the run had no such event.
    pub(super) fn at(&self, cut: Cut) -> Option<Remains> {
        let index = usize::try_from(cut.event.checked_sub(1)?).ok()?;
        let moment = self.moments.get(index)?;
        Some(match cut.phase {
            Phase::Before => {
                let mut remains = moment.before.clone();
                if let Some(own) = moment.own {
                    remains.disks.iter_mut().for_each(|disk| disk.recall(own));
                }
                remains
            }
            Phase::Middle => moment.before.clone(),
            Phase::After => moment.after.clone(),
        })
    }

    /// Would the run have ended well with this cut? Only if it asked nothing of a disk any more.
    pub(super) fn completes(&self, cut: Cut) -> bool {
        cut == Cut { event: self.moments.len() as u64, phase: Phase::After } && !self.read_since
    }

    pub(super) fn reads(&mut self) {
        self.read_since = true;
    }

    pub(super) fn hand_over(
        &mut self,
        handed: u64,
        disk: usize,
        through: &Arc<OwnedFd>,
        position: Position,
        bytes: &[u8],
    ) {
        let through = Arc::clone(through);
        self.flying.insert(handed, Flying { disk, through, position, bytes: bytes.into(), moved: 0 });
    }

    /// A write came back early.
    pub(super) fn recalled(&mut self, handed: u64) {
        self.flying.remove(&handed);
    }

    fn moved(&mut self, handed: u64, outcome: &Result<Moved, Errno>) {
        match outcome {
            Ok(Moved { count, end: false }) => {
                if let Some(flying) = self.flying.get_mut(&handed) {
                    flying.moved += count;
                }
            }
            _ => self.recalled(handed),
        }
    }
}

impl Inner {
    /// As everything is, with what is on its way.
    fn remains_now(&self, record: &Record) -> Remains {
        let disks = self.disks.iter().enumerate().map(|(index, disk)| {
            let here = record.flying.iter().filter(|(_, flying)| flying.disk == index);
            disk.medium(here.filter_map(|(&handed, flying)| {
                let (offset, rest) = flying.rest()?;
                Some((handed, offset, rest))
            }))
        });
        Remains { events: self.events, options: self.options, disks: disks.collect() }
    }

    /// An event, with what is before and after it.
    pub(super) fn recorded(
        &mut self,
        handed: Option<u64>,
        event: impl FnOnce(&mut Self) -> Result<Moved, Errno>,
    ) -> Result<Moved, Errno> {
        let Some(mut record) = self.record.take() else { return event(self) };
        let before = self.remains_now(&record);
        let outcome = event(self);
        if let Some(handed) = handed {
            record.moved(handed, &outcome);
        }
        let after = self.remains_now(&record);
        record.moments.push(Moment { before, own: handed, after });
        record.read_since = false;
        self.record = Some(record);
        outcome
    }
}
