//! One simulated disk: what is visible, what is durable, and what lies between.
//!
//! What is visible lives in a memory file, so that everything that looks at a descriptor (size, holes, another program) sees the
//! disk. What is durable is an [`Image`]; between the two stands the write cache: the completed writes that no flush has covered.
//!
//! A write goes to the medium in whole sectors, each with what surrounded the bytes at that time. At a power cut each sector holds
//! what was durable or what any one write since put there.

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;

use super::DiskOptions;
use super::image::{Image, put};
use super::random::Dice;
use crate::error::{Error, Result};

/// Whole sectors on their way to the medium.
#[derive(Debug, Clone)]
pub(super) struct Pending {
    /// How many writes had completed before it; of one that was interrupted, how many had been handed over.
    order: u64,
    offset: u64,
    bytes: Arc<[u8]>,
}

/// What decides what is found when the power comes back.
#[derive(Debug, Clone)]
pub(super) struct Medium {
    durable: Arc<Image>,
    /// In the order of completion.
    cache: Vec<Pending>,
    /// What had been handed to the disk and not come back when the power went, in the order in which it was handed over.
    interrupted: Vec<Pending>,
    pub(super) options: DiskOptions,
}

#[derive(Debug)]
pub(super) struct Disk {
    pub(super) file: Arc<OwnedFd>,
    pub(super) options: DiskOptions,
    /// Others may have descriptors of it.
    pub(super) shared: bool,
    dev: u64,
    ino: u64,
    durable: Arc<Image>,
    /// In the order of completion.
    cache: Vec<Pending>,
    /// What had been handed to the disk and not come back when the power went.
    interrupted: Vec<Pending>,
    /// Writes completed so far.
    completed: u64,
}

thread_local! {
    /// Memory files of disks that are gone, and that nobody else has: a judged case lives some microseconds.
    static SPARE: RefCell<Vec<Arc<OwnedFd>>> = const { RefCell::new(Vec::new()) };
}

/// Memory files kept by a thread.
const SPARE_MAX: usize = 4;

impl Drop for Disk {
    fn drop(&mut self) {
        if !self.shared && Arc::strong_count(&self.file) == 1 {
            // A lock belongs to the description, and so would go to its next disk.
            let _ = rustix::fs::flock(&self.file, rustix::fs::FlockOperation::Unlock);
            SPARE.with_borrow_mut(|spare| {
                if spare.len() < SPARE_MAX {
                    spare.push(Arc::clone(&self.file));
                }
            });
        }
    }
}

impl Disk {
    pub(super) fn new(mut image: Image, options: DiskOptions) -> Result<Self> {
        image.freeze();
        let file = match SPARE.with_borrow_mut(Vec::pop) {
            Some(file) => {
                image.reuse_memfd(&file)?;
                file
            }
            None => Arc::new(image.to_memfd("simulated-disk")?),
        };
        let stat =
            rustix::fs::fstat(&file).map_err(|errno| Error::io("cannot examine a simulated disk", errno))?;
        Ok(Self {
            file,
            shared: false,
            options,
            dev: stat.st_dev,
            ino: stat.st_ino,
            durable: Arc::new(image),
            cache: Vec::new(),
            interrupted: Vec::new(),
            completed: 0,
        })
    }

    /// Is this descriptor, however it was opened, this disk?
    pub(super) fn is(&self, dev: u64, ino: u64) -> bool {
        (self.dev, self.ino) == (dev, ino)
    }

    pub(super) fn completed(&self) -> u64 {
        self.completed
    }

    pub(super) fn durable(&self) -> &Image {
        &self.durable
    }

    /// Everything visible, however it came there, is durable.
    pub(super) fn settle(&mut self) -> Result<()> {
        self.durable = Arc::new(Image::of_file(&self.file)?);
        self.cache.clear();
        Ok(())
    }

    /// What the device itself would refuse, before anything moves. Gives how many of the bytes there is room for.
    pub(super) fn admit(&self, write: bool, offset: u64, count: usize) -> Result<usize, Errno> {
        let align = u64::from(self.options.alignment.max(1));
        if !offset.is_multiple_of(align) || !(count as u64).is_multiple_of(align) {
            return Err(Errno::INVAL);
        }
        match self.options.capacity {
            Some(capacity) if write && count > 0 => match capacity.saturating_sub(offset) {
                0 => Err(Errno::NOSPC),
                room => Ok(usize::try_from(room).unwrap_or(usize::MAX).min(count)),
            },
            _ => Ok(count),
        }
    }

    /// A write completes, through a descriptor whose rights the kernel checks: visible, and in the cache.
    pub(super) fn write(&mut self, through: &OwnedFd, offset: u64, bytes: &[u8]) -> Result<usize, Errno> {
        let count = rustix::io::pwrite(through, bytes, offset)?;
        let pending = self.sectors(self.completed, offset, &bytes[..count])?;
        self.cache.push(pending);
        self.completed += 1;
        Ok(count)
    }

    /// A write that failed or was cancelled: any of its sectors may have been written.
    pub(super) fn write_some(&mut self, dice: &mut Dice, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        let pending = self.sectors(self.completed, offset, bytes)?;
        let keep = dice.below(1001);
        for (at, sector) in split(&pending, self.options.sector_bytes) {
            if dice.below(1000) < keep {
                put(&self.file, at, sector)?;
                self.cache.push(Pending { order: self.completed, offset: at, bytes: sector.into() });
            }
        }
        self.completed += 1;
        Ok(())
    }

    /// The power went while this write was on its way, the `handed`-th that had been handed over.
    pub(super) fn interrupt(&mut self, handed: u64, offset: u64, bytes: &[u8]) {
        if let Ok(pending) = self.sectors(handed, offset, bytes) {
            self.interrupted.push(pending);
        }
    }

    /// As it would be left if the power went now, with these writes on their way: how many were handed over before each, where to, and what.
    pub(super) fn medium(&self, flying: impl Iterator<Item = (u64, u64, Arc<[u8]>)>) -> Medium {
        let mut interrupted = self.interrupted.clone();
        for (handed, offset, bytes) in flying {
            let sector = u64::from(self.options.sector_bytes);
            let whole = offset.is_multiple_of(sector) && (bytes.len() as u64).is_multiple_of(sector);
            interrupted.extend(match whole {
                true => Some(Pending { order: handed, offset, bytes }),
                false => self.sectors(handed, offset, &bytes).ok(),
            });
        }
        // Whoever ran on without power may have let go of them in any order.
        interrupted.sort_by_key(|pending| pending.order);
        Medium {
            durable: self.durable.clone(),
            cache: self.cache.clone(),
            interrupted,
            options: self.options,
        }
    }

    /// A flush completes that was submitted when `before` writes had completed.
    pub(super) fn flush(&mut self, before: u64) {
        let covered = self.cache.partition_point(|pending| pending.order < before);
        let durable = Arc::make_mut(&mut self.durable);
        for pending in self.cache.drain(..covered) {
            durable.write(pending.offset, &pending.bytes);
        }
        // The size is made durable with the data, also when the file was cut or extended by other means.
        if let Ok(stat) = rustix::fs::fstat(&self.file)
            && let Ok(size) = u64::try_from(stat.st_size)
            && self.cache.is_empty()
        {
            durable.set_size(size);
        }
    }

    /// A flush fails: any of the writes it should have covered is given up, as kernels do (the pages are clean, the medium is not).
    /// They stay visible, and no later flush brings them back.
    pub(super) fn flush_failed(&mut self, dice: &mut Dice, before: u64) {
        self.cache.retain(|pending| pending.order >= before || dice.chance(500));
    }

    /// The power comes back: the medium holds `image`, and everybody sees that.
    pub(super) fn become_again(&mut self, image: &Image) -> Result<()> {
        if Image::of_file(&self.file)? != *image {
            let failed = |errno| Error::io("cannot write a simulated disk", errno);
            let mut bytes = vec![0; usize::try_from(image.size()).expect("a test's disk fits memory")];
            image.read(0, &mut bytes);
            rustix::fs::ftruncate(&self.file, 0).map_err(failed)?;
            rustix::fs::ftruncate(&self.file, image.size()).map_err(failed)?;
            put(&self.file, 0, &bytes).map_err(failed)?;
        }
        self.interrupted.clear();
        self.settle()
    }

    /// The whole sectors that an extent touches, as they are once `bytes` are in place.
    fn sectors(&self, order: u64, offset: u64, bytes: &[u8]) -> Result<Pending, Errno> {
        let sector = u64::from(self.options.sector_bytes);
        let start = offset / sector * sector;
        let end = (offset + bytes.len() as u64).next_multiple_of(sector);
        let mut whole = vec![0; usize::try_from(end - start).map_err(|_| Errno::INVAL)?];
        let mut seen = 0;
        while seen < whole.len() {
            match rustix::io::pread(&self.file, &mut whole[seen..], start + seen as u64)? {
                0 => break,
                count => seen += count,
            }
        }
        let head = usize::try_from(offset - start).map_err(|_| Errno::INVAL)?;
        whole[head..head + bytes.len()].copy_from_slice(bytes);
        whole.truncate(seen.max(head + bytes.len()));
        Ok(Pending { order, offset: start, bytes: whole.into() })
    }
}

impl Medium {
    /// A number for what an image that survived has otherwise than what was durable: see [`Image::changes`].
    pub(super) fn changes(&self, survivor: &Image) -> u64 {
        survivor.changes(&self.durable)
    }

    /// This one was not on its way after all.
    pub(super) fn recall(&mut self, handed: u64) {
        self.interrupted.retain(|pending| pending.order != handed);
    }

    /// What is found after the power has gone. `tear` below 4 in its lowest three bits asks for an extreme.
    pub(super) fn survivors(&self, tear: u64) -> Image {
        let mut dice = Dice::new(super::random::mix(tear));
        let mut image = Image::clone(&self.durable);
        let writes: Vec<&Pending> = self.cache.iter().chain(shuffled(&mut dice, &self.interrupted)).collect();
        if writes.is_empty() {
            return image;
        }
        let chosen = dice.below(writes.len() as u64);
        let keep = [100, 500, 900][usize::try_from(dice.below(3)).expect("small")];
        for (index, pending) in (0u64..).zip(writes) {
            let fate = match tear % 8 {
                0 => Fate::Lost,
                1 => Fate::Kept,
                2 if index == chosen => Fate::Lost,
                2 => Fate::Kept,
                3 if index == chosen => Fate::Kept,
                3 => Fate::Lost,
                4 => Fate::Torn,
                _ if dice.chance(333) => Fate::Torn,
                _ if dice.chance(keep) => Fate::Kept,
                _ => Fate::Lost,
            };
            for (at, sector) in split(pending, self.options.sector_bytes) {
                let survives = match fate {
                    Fate::Lost => false,
                    Fate::Kept => true,
                    Fate::Torn => dice.chance(500),
                };
                if survives {
                    image.write(at, sector);
                }
            }
        }
        image
    }
}

#[derive(Clone, Copy)]
enum Fate {
    Lost,
    Kept,
    /// Each sector by itself.
    Torn,
}

fn split(pending: &Pending, sector_bytes: u32) -> impl Iterator<Item = (u64, &[u8])> {
    let sector = u64::from(sector_bytes);
    (0u64..)
        .zip(pending.bytes.chunks(sector_bytes as usize))
        .map(move |(index, bytes)| (pending.offset + index * sector, bytes))
}

fn shuffled<'a>(dice: &mut Dice, pending: &'a [Pending]) -> Vec<&'a Pending> {
    let mut all: Vec<&Pending> = pending.iter().collect();
    for last in (1..all.len()).rev() {
        let other = usize::try_from(dice.below(last as u64 + 1)).expect("an index");
        all.swap(last, other);
    }
    all
}
