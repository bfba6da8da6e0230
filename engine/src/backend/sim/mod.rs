//! A seeded simulated world of disks that lose power: production code runs on it unchanged and is cut at every write.
//!
//! ```text
//! World ─ add(image) ─▶ disk (a memory file) ─ file ─▶ Device, Blocking, jobs
//!   │                        ▲
//!   └─ queue(arena, depth) ──┘ attach finds the disk by its inode; other files go to a real queue
//! ```
//! - A completed write is visible at once and durable when a flush completes that was submitted after it had completed.
//! - At a power cut every other write, also those in flight, is lost, kept or torn, sector by sector, in any order.
//! - Completions come in a seeded order in virtual time: nothing sleeps. One seed and one thread: one history.
//! - [`World::cut_at`] takes the power away at the n-th write or flush; everything later fails with `EIO`.
//!   [`World::restart`] gives the disks as they are found afterwards. [`explore`] does both for every n.
//! - [`explore::Explore::recorded`] gives the same without a run for each cut: one run, remembered at every event.
//! - [`World::inject`] makes chosen operations fail, fall short or read another place.
//!
//! For tests only. It refuses to know of what does not pass through a queue: `fsync` and hole punching on the descriptor
//! itself are seen, but make nothing durable ([`World::settle`] does).

mod disk;
pub mod explore;
pub mod image;
mod queue;
mod random;
mod record;

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::io::Errno;

use crate::backend::blocking::Blocking;
use crate::backend::{Position, Queue, QueueChoice};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::buffer::Arena;
use crate::units::Extent;
use disk::Disk;
use image::Image;
use random::Dice;
use record::{Record, Remains};

/// The bytes of a buffer of [`World::blocking`]: small, as worlds are many.
const BLOCKING_BYTES: u32 = 128 << 10;

/// How a disk behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskOptions {
    /// What is written whole or not at all: 512 or 4096.
    pub sector_bytes: u32,
    /// Offsets and lengths must be multiples of this, else `EINVAL`, as for direct I/O; 1: anything goes.
    pub alignment: u32,
    /// Writes beyond it fail with `ENOSPC`; `None`: it grows like a file.
    pub capacity: Option<u64>,
}

impl Default for DiskOptions {
    fn default() -> Self {
        Self { sector_bytes: 512, alignment: 1, capacity: None }
    }
}

/// How a world behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// The quickest operation takes so many virtual nanoseconds.
    pub latency_min: u64,
    /// And the slowest so many.
    pub latency_max: u64,
    /// So many in a thousand transfers of the raw device move less than they were asked to.
    pub short_per_mille: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self { latency_min: 10_000, latency_max: 1_000_000, short_per_mille: 20 }
    }
}

/// When, relative to the event it comes at, the power goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// The event never reached the disk.
    Before,
    /// A write may have been done in part; a flush has promised nothing.
    Middle,
    /// The event was reported as done.
    After,
}

/// A point at which the power goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cut {
    /// Writes and flushes of the raw devices are counted from 1.
    pub event: u64,
    /// Before, in the middle of, or after it.
    pub phase: Phase,
}

/// Which operations of the raw device a fault is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum On {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Flushes.
    Flush,
}

/// Which of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// The n-th from now, counted from 1; once.
    Nth(u64),
    /// Every one that touches the extent: a bad place.
    Touching(Extent),
}

/// What happens instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// It fails with this errno. Of a failed write any sector may have been written; what a failed flush should have
    /// covered may be lost although it stays visible.
    Fail(i32),
    /// It moves so many bytes only.
    Short(u32),
    /// A read gives what lies so many bytes further on.
    Misdirect(u64),
}

/// Something that goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// On which disk.
    pub disk: usize,
    /// On which kind of operation.
    pub on: On,
    /// Which of these.
    pub when: When,
    /// What happens.
    pub effect: Effect,
}

/// Disks that share their power, and the dice. A clone is the same world.
#[derive(Debug, Clone)]
pub struct World(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    options: Options,
    dice: Dice,
    /// Virtual nanoseconds since power-on.
    clock: u64,
    events: u64,
    cut: Option<Cut>,
    is_cut: bool,
    faults: Vec<(Fault, u64)>,
    disks: Vec<Disk>,
    /// Writes handed over so far.
    handed: u64,
    record: Option<Record>,
}

/// Worlds that a whole pipeline was told to work on.
static NUMBERED: Mutex<Vec<Weak<Mutex<Inner>>>> = Mutex::new(Vec::new());

/// One transfer of the raw device.
enum Raw<'a> {
    Read(u64, &'a mut [u8]),
    Write(u64, &'a [u8]),
    /// Submitted when so many writes had completed.
    Flush(u64),
}

/// What it came to.
struct Moved {
    count: usize,
    /// Nothing follows: the end of the disk, or all of it.
    end: bool,
}

impl World {
    /// Everything in it follows from the seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self::with(seed, Options::default())
    }

    /// As [`World::new`], with other manners.
    ///
    /// # Panics
    /// If the latencies are the wrong way round.
    #[must_use]
    pub fn with(seed: u64, options: Options) -> Self {
        assert!(options.latency_min <= options.latency_max, "the quickest is not the slowest");
        Self(Arc::new(Mutex::new(Inner {
            options,
            dice: Dice::new(seed),
            clock: 0,
            events: 0,
            cut: None,
            is_cut: false,
            faults: Vec::new(),
            disks: Vec::new(),
            handed: 0,
            record: None,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another disk, durably holding `image`; its index, from 0.
    ///
    /// # Errors
    /// No memory or descriptors.
    pub fn add(&self, image: Image, options: DiskOptions) -> Result<usize> {
        let disk = Disk::new(image, options)?;
        let mut inner = self.lock();
        inner.disks.push(disk);
        Ok(inner.disks.len() - 1)
    }

    /// The disk as a file.
    ///
    /// # Panics
    /// As all methods here: if there is no such disk.
    #[must_use]
    pub fn file(&self, disk: usize) -> Arc<OwnedFd> {
        Arc::clone(&self.lock().disks[disk].file)
    }

    /// A descriptor of one's own: other flags and another position than [`World::file`].
    ///
    /// # Errors
    /// No descriptors.
    pub fn descriptor(&self, disk: usize) -> Result<OwnedFd> {
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC;
        rustix::fs::open(self.path(disk), flags, rustix::fs::Mode::empty())
            .map_err(|errno| Error::io("cannot open a simulated disk", errno))
    }

    /// A path by which this process and others can open it while the world lives. What they write is visible, and durable
    /// only when settled.
    #[must_use]
    pub fn path(&self, disk: usize) -> PathBuf {
        let mut inner = self.lock();
        inner.disks[disk].shared = true;
        let number = inner.disks[disk].file.as_raw_fd();
        PathBuf::from(format!("/proc/{}/fd/{number}", std::process::id()))
    }

    /// A queue that knows the disks of this world. Other files work too, in real time.
    #[must_use]
    pub fn queue(&self, _arena: &Arena, depth: u32) -> Box<dyn Queue> {
        Box::new(queue::SimQueue::new(self.clone(), depth))
    }

    /// As [`World::queue`]; it registers no buffers, so it asks for none.
    pub(crate) fn bare_queue(&self, depth: u32) -> Box<dyn Queue> {
        Box::new(queue::SimQueue::new(self.clone(), depth))
    }

    /// For a pipeline's configuration: its workers use this world's queues while it lives. With more than one worker the
    /// order of things is the scheduler's too, and a seed repeats itself no longer.
    ///
    /// # Panics
    /// After four billion worlds.
    #[must_use]
    pub fn choice(&self) -> QueueChoice {
        let mut numbered = NUMBERED.lock().unwrap_or_else(PoisonError::into_inner);
        numbered.push(Arc::downgrade(&self.0));
        QueueChoice::Simulated(u32::try_from(numbered.len() - 1).expect("fewer worlds"))
    }

    /// # Errors
    /// `NotFound`: the world has ended.
    pub(super) fn numbered(number: u32) -> Result<Self> {
        let numbered = NUMBERED.lock().unwrap_or_else(PoisonError::into_inner);
        let world = numbered.get(number as usize).and_then(Weak::upgrade);
        world
            .map(Self)
            .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("there is no simulated world {number}")))
    }

    /// The world one of whose disks this file is, of those a pipeline was told to work on.
    ///
    /// # Errors
    /// The file cannot be examined.
    pub(super) fn holding(file: &OwnedFd) -> Result<Option<Self>> {
        let worlds: Vec<Self> = {
            let numbered = NUMBERED.lock().unwrap_or_else(PoisonError::into_inner);
            numbered.iter().filter_map(Weak::upgrade).map(Self).collect()
        };
        for world in worlds {
            if world.find(file)?.is_some() {
                return Ok(Some(world));
            }
        }
        Ok(None)
    }

    /// As [`World::restart`], but the disks stay the same files: for what knows them by their inodes. What was not written
    /// keeps its times. Queues of before must be gone.
    ///
    /// # Errors
    /// No memory, or a disk that cannot be written.
    pub fn restart_in_place(&self, tear: u64) -> Result<()> {
        let survivors = self.remains().survivors(tear);
        let mut inner = self.lock();
        for (disk, (image, _)) in inner.disks.iter_mut().zip(survivors) {
            disk.become_again(&image)?;
        }
        (inner.cut, inner.is_cut) = (None, false);
        inner.faults.clear();
        Ok(())
    }

    /// One operation at a time on a disk, at its alignment.
    ///
    /// # Errors
    /// No memory.
    pub fn blocking(&self, disk: usize, name: &str) -> Result<Blocking> {
        let mut arena = Arena::simulated(1, BLOCKING_BYTES)?;
        let queue = self.queue(&arena, 1);
        let buf = arena.take_all().pop().expect("an arena of one buffer");
        let align = self.lock().disks[disk].options.alignment;
        Blocking::over(queue, buf, self.file(disk), name, align)
    }

    /// Writes and flushes of the raw devices so far; also those that failed.
    #[must_use]
    pub fn events(&self) -> u64 {
        self.lock().events
    }

    /// Virtual nanoseconds since power-on.
    #[must_use]
    pub fn clock(&self) -> u64 {
        self.lock().clock
    }

    /// Take the power away at this event.
    pub fn cut_at(&self, cut: Cut) {
        self.lock().cut = Some(cut);
    }

    /// Take the power away now.
    pub fn cut(&self) {
        self.lock().is_cut = true;
    }

    /// Has the power gone?
    #[must_use]
    pub fn is_cut(&self) -> bool {
        self.lock().is_cut
    }

    /// Let something go wrong.
    pub fn inject(&self, fault: Fault) {
        self.lock().faults.push((fault, 0));
    }

    /// Let nothing go wrong from now on.
    pub fn heal(&self) {
        self.lock().faults.clear();
    }

    /// What readers of the disk see.
    ///
    /// # Errors
    /// No memory.
    pub fn visible(&self, disk: usize) -> Result<Image> {
        Image::of_file(&self.file(disk))
    }

    /// What is sure to survive.
    #[must_use]
    pub fn durable(&self, disk: usize) -> Image {
        self.lock().disks[disk].durable().clone()
    }

    /// Make everything visible durable, also what came there by other means than a queue. Not an event.
    ///
    /// # Errors
    /// No memory.
    pub fn settle(&self) -> Result<()> {
        self.lock().disks.iter_mut().try_for_each(Disk::settle)
    }

    /// The disks as they are found when the power comes back, in a world of their own without faults and cuts: without a
    /// cut as if the power went now. The same `tear`, the same outcome; drop this world's queues before, or what they had
    /// in flight is lost. `tear % 8` chooses the manner: 0 all lost, 1 all kept, 2 one lost, 3 one kept, 4 all torn,
    /// else everything mixed.
    ///
    /// # Errors
    /// No memory or descriptors.
    pub fn restart(&self, tear: u64) -> Result<Self> {
        let remains = self.remains();
        remains.power_on(tear, remains.survivors(tear))
    }

    /// Remember from now on what a cut at each event would leave.
    fn start_recording(&self) {
        self.lock().record = Some(Record::default());
    }

    fn stop_recording(&self) -> Record {
        self.lock().record.take().unwrap_or_default()
    }

    /// What is there for a restart.
    fn remains(&self) -> Remains {
        let inner = self.lock();
        let disks = inner.disks.iter().map(|disk| disk.medium(std::iter::empty())).collect();
        Remains { events: inner.events, options: inner.options, disks }
    }

    /// The disk behind a descriptor.
    fn find(&self, file: &OwnedFd) -> Result<Option<usize>> {
        let stat = rustix::fs::fstat(file)
            .map_err(|errno| Error::new(ErrorKind::Io, "cannot examine a file").because(errno))?;
        Ok(self.lock().disks.iter().position(|disk| disk.is(stat.st_dev, stat.st_ino)))
    }
}

impl Inner {
    /// When an operation handed over now will come back.
    fn due(&mut self) -> u64 {
        let spread = self.options.latency_max - self.options.latency_min;
        self.clock + self.options.latency_min + self.dice.below(spread + 1)
    }

    /// A write is handed to a disk: its number, if there is power.
    fn hand_over(
        &mut self,
        disk: usize,
        through: &Arc<OwnedFd>,
        position: Position,
        bytes: &[u8],
    ) -> Option<u64> {
        if self.is_cut {
            return None;
        }
        self.handed += 1;
        if let Some(record) = &mut self.record {
            record.hand_over(self.handed, disk, through, position, bytes);
        }
        Some(self.handed)
    }

    /// One transfer of the raw device reaches its end. `handed`: which of those that were handed over while there was power.
    fn perform(
        &mut self,
        disk: usize,
        through: &OwnedFd,
        handed: Option<u64>,
        raw: Raw<'_>,
    ) -> Result<Moved, Errno> {
        if self.is_cut {
            if let Raw::Write(offset, bytes) = raw
                && let Some(handed) = handed
            {
                self.disks[disk].interrupt(handed, offset, bytes);
            }
            return Err(Errno::IO);
        }
        if matches!(raw, Raw::Read(..)) {
            if let Some(record) = &mut self.record {
                record.reads();
            }
            return self.transfer(disk, through, None, handed, raw);
        }
        let phase = self.count();
        self.is_cut = phase.is_some();
        let own = if matches!(raw, Raw::Write(..)) { handed } else { None };
        self.recorded(own, |inner| inner.transfer(disk, through, phase, handed, raw))
    }

    fn transfer(
        &mut self,
        disk: usize,
        through: &OwnedFd,
        phase: Option<Phase>,
        handed: Option<u64>,
        raw: Raw<'_>,
    ) -> Result<Moved, Errno> {
        match raw {
            _ if phase == Some(Phase::Before) => Err(Errno::IO),
            Raw::Write(offset, bytes) if phase == Some(Phase::Middle) => {
                self.disks[disk].interrupt(handed.unwrap_or(u64::MAX), offset, bytes);
                Err(Errno::IO)
            }
            Raw::Flush(_) if phase == Some(Phase::Middle) => Err(Errno::IO),
            Raw::Read(offset, into) => self.read(disk, through, offset, into),
            Raw::Write(offset, bytes) => self.write(disk, through, offset, bytes),
            Raw::Flush(before) => match self.fault(disk, On::Flush, 0, 0) {
                Some(Effect::Fail(errno)) => {
                    self.disks[disk].flush_failed(&mut self.dice, before);
                    Err(Errno::from_raw_os_error(errno))
                }
                _ => {
                    self.disks[disk].flush(before);
                    Ok(Moved { count: 0, end: true })
                }
            },
        }
    }

    /// Another event; does the power go at it?
    fn count(&mut self) -> Option<Phase> {
        self.events += 1;
        self.cut.filter(|cut| cut.event == self.events).map(|cut| cut.phase)
    }

    fn read(&mut self, disk: usize, through: &OwnedFd, offset: u64, into: &mut [u8]) -> Result<Moved, Errno> {
        let mut count = self.disks[disk].admit(false, offset, into.len())?;
        let mut from = offset;
        match self.fault(disk, On::Read, offset, count) {
            Some(Effect::Fail(errno)) => return Err(Errno::from_raw_os_error(errno)),
            Some(Effect::Short(most)) => count = count.min(most as usize),
            Some(Effect::Misdirect(by)) => from = offset.saturating_add(by),
            None => count = self.shortened(disk, count),
        }
        let got = rustix::io::pread(through, &mut into[..count], from)?;
        Ok(Moved { count: got, end: got < count || got == into.len() })
    }

    fn write(&mut self, disk: usize, through: &OwnedFd, offset: u64, bytes: &[u8]) -> Result<Moved, Errno> {
        let mut count = self.disks[disk].admit(true, offset, bytes.len())?;
        match self.fault(disk, On::Write, offset, count) {
            Some(Effect::Fail(errno)) => {
                self.disks[disk].write_some(&mut self.dice, offset, &bytes[..count])?;
                return Err(Errno::from_raw_os_error(errno));
            }
            Some(Effect::Short(most)) => count = count.min(most as usize),
            Some(Effect::Misdirect(_)) => {}
            None => count = self.shortened(disk, count),
        }
        let count = self.disks[disk].write(through, offset, &bytes[..count])?;
        Ok(Moved { count, end: count == bytes.len() })
    }

    /// A write was cancelled on its way.
    fn cancelled(&mut self, disk: usize, offset: u64, bytes: &[u8]) {
        if !self.is_cut {
            let disk = &mut self.disks[disk];
            // A failure here is the device's or this process's memory; the write is cancelled all the same.
            let _ = disk
                .admit(true, offset, bytes.len())
                .and_then(|count| disk.write_some(&mut self.dice, offset, &bytes[..count]));
        }
    }

    /// Whole sectors, at least one.
    fn shortened(&mut self, disk: usize, count: usize) -> usize {
        let sector = self.disks[disk].options.sector_bytes.max(self.disks[disk].options.alignment) as usize;
        let sectors = count / sector;
        if sectors < 2 || !self.dice.chance(self.options.short_per_mille) {
            return count;
        }
        sector * (1 + usize::try_from(self.dice.below(sectors as u64 - 1)).expect("a count"))
    }

    fn fault(&mut self, disk: usize, on: On, offset: u64, count: usize) -> Option<Effect> {
        let end = offset + count as u64;
        let mut effect = None;
        for (fault, seen) in &mut self.faults {
            if fault.disk != disk || fault.on != on {
                continue;
            }
            *seen += 1;
            let strikes = match fault.when {
                When::Nth(nth) => *seen == nth,
                When::Touching(extent) => extent.start() < end && offset < extent.end(),
            };
            if strikes {
                effect = effect.or(Some(fault.effect));
            }
        }
        effect
    }
}

#[cfg(test)]
mod tests;
