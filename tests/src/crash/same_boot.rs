//! A re-encryption that is cut off while the power stays on: what was written and not flushed, or flushed in vain, stays visible.
//!
//! 1. A write or a flush fails, each once in its turn, and the work ends there. (A process that is killed leaves no more than that:
//!    what its kernel still has is lost only when the power goes.)
//! 2. It is resumed in the same world, from what is visible there; the power goes at an event of that.
//! 3. The disks are found again, it is resumed to the end, and all data compared.

use engine::backend::sim::image::Image;
use engine::backend::sim::{Cut, DiskOptions, Effect, Fault, On, Phase, When, World};

use super::judge::{Judge, Standing};
use super::{HEADER, Volume, course};

/// What `EIO` is.
const EIO: i32 = 5;

/// What was tried.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tried {
    /// Operations that failed.
    pub aborts: u64,
    /// Power cuts during what was resumed.
    pub cuts: u64,
}

/// What is tried of one volume.
#[derive(Clone, Copy)]
pub struct Trial<'a> {
    /// Which.
    pub volume: &'a Volume,
    /// Everything follows from it.
    pub seed: u64,
    /// The power goes at every so many-th event.
    pub stride: u64,
    /// In how many manners a cut is found again.
    pub tears: u64,
}

impl Trial<'_> {
    /// Every failure of a kind of operation on a disk, one by one.
    ///
    /// # Errors
    /// What is lost, in words.
    ///
    /// # Panics
    /// If it cannot be begun.
    pub fn run(&self, disk: usize, on: On) -> Result<Tried, String> {
        let judge = Judge::new(self.volume);
        let disks = self.begun(&judge);
        let mut tried = Tried::default();
        for nth in 1.. {
            let abort = Fault { disk, on, when: When::Nth(nth), effect: Effect::Fail(EIO) };
            let Some(world) = self.aborted(&disks, abort) else { break };
            tried.aborts += 1;
            let before = world.events();
            let whole = course::resume(&world, self.volume);
            whole.map_err(|error| format!("{on:?} {nth} failed, not gone on with: {}", error.chain()))?;
            let events = world.events() - before;
            self.judged(&judge, &world.restart(0).expect("memory")).map_err(|why| {
                format!("{on:?} {nth} of disk {disk} failed, and it was gone on with to the end: {why}")
            })?;
            for event in
                (1 + nth % self.stride..=events).step_by(usize::try_from(self.stride).expect("small"))
            {
                for tear in 0..self.tears {
                    let world = self.aborted(&disks, abort).expect("as just before");
                    let phase = if tear % 2 == 0 { Phase::After } else { Phase::Middle };
                    world.cut_at(Cut { event: before + event, phase });
                    let _ = course::resume(&world, self.volume);
                    let later = world.restart(self.tear(event, tear)).expect("memory");
                    let ended = course::resume(&later, self.volume).map_err(|error| error.chain());
                    tried.cuts += 1;
                    ended.and_then(|()| self.judged(&judge, &later)).map_err(|why| {
                        format!(
                            "{on:?} {nth} of disk {disk} failed, and the power went at event {event} of {events} of \
                             what was resumed ({phase:?}, tear {}): {why}",
                            self.tear(event, tear)
                        )
                    })?;
                }
            }
        }
        Ok(tried)
    }

    /// In which of the manners.
    fn tear(&self, event: u64, tear: u64) -> u64 {
        (self.seed ^ event).wrapping_mul(7).wrapping_add(tear * 3) % 64
    }

    /// Begun, durably.
    fn begun(&self, judge: &Judge<'_>) -> Vec<(Image, DiskOptions)> {
        let world = self.volume.world(self.seed);
        let opened = course::begin(&world, self.volume).expect("begun");
        world.settle().expect("memory");
        let mut header = world.blocking(HEADER, "header").expect("a device");
        let loaded = Judge::load(&mut header).expect("a header");
        if let Some((_, key)) = &opened.new.cipher {
            judge.learn(&loaded.header.metadata, key).expect("the new key");
        }
        let options = self.volume.disks.iter().map(|(_, options)| *options);
        options.enumerate().map(|(disk, options)| (world.durable(disk), options)).collect()
    }

    /// A world where it was gone on with until this failed; `None`: so many operations there are not.
    fn aborted(&self, disks: &[(Image, DiskOptions)], abort: Fault) -> Option<World> {
        let world = World::new(self.seed);
        for (image, options) in disks {
            world.add(image.clone(), *options).expect("memory for a disk");
        }
        world.inject(abort);
        let ended = course::resume(&world, self.volume);
        world.heal();
        ended.is_err().then_some(world)
    }

    fn judged(&self, judge: &Judge<'_>, world: &World) -> Result<(), String> {
        match judge.look(world)? {
            Standing::Over => Ok(()),
            other => Err(format!("not over, but {other:?}")),
        }
    }
}
