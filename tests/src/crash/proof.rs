//! Every cut of a whole re-encryption, of its recovery, and of that one's recovery.
//!
//! Which of the many endings are looked at more closely (opened with passphrases and all, gone on with to the end, cut again
//! while they are recovered) follows from the ending alone, so a case run again does the same.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use engine::backend::sim::explore::{Case, Explore, Summary, Violation};
use engine::backend::sim::image::Image;
use engine::backend::sim::{DiskOptions, Phase, World};
use engine::crypto::Secret;
use engine::crypto::spec::CipherSpec;
use engine::error::{Error, ErrorKind, Result};
use engine::format::luks2::Loaded;
use engine::format::luks2::reencrypt::{Side, State, read};
use engine::volume::AreaCipher;
use engine::volume::reencrypt::ledger::Ledger;
use engine::volume::reencrypt::recover::{self, Proven};
use engine::volume::reencrypt::{self, Opened, luks, shift};

use super::course::{self, Wrap};
use super::judge::{Judge, Standing};
use super::{HEADER, Volume};

/// How many of the endings are looked at how closely.
#[derive(Debug, Clone, Copy)]
pub struct Depth {
    /// Endings of each cut.
    pub tears: u64,
    /// At most so many events are cut.
    pub cuts_max: u64,
    /// One of so many is opened as a user does.
    pub open_every: u64,
    /// One of so many is gone on with to the end.
    pub resume_every: u64,
    /// The recovery of one of so many is cut itself; and of those, in turn, as many of theirs.
    pub nest_every: u64,
    /// Endings of each cut of a recovery.
    pub nest_tears: u64,
}

/// What was tried.
#[derive(Debug, Default)]
pub struct Totals {
    /// Writes and flushes of the runs that were not cut.
    pub events: AtomicU64,
    /// Endings of whole re-encryptions.
    pub endings: AtomicU64,
    /// Of all, how many were not the same as another one of the same cut.
    pub distinct: AtomicU64,
    /// A step had been interrupted, and was recovered.
    pub recovered: AtomicU64,
    /// Opened with passphrases.
    pub opened: AtomicU64,
    /// Gone on with to the end.
    pub resumed: AtomicU64,
    /// Endings of recoveries.
    pub nested: AtomicU64,
    /// Endings of recoveries of those.
    pub twice: AtomicU64,
}

impl Totals {
    /// Power cuts whose outcome was judged.
    #[must_use]
    pub fn cuts(&self) -> u64 {
        [&self.endings, &self.nested, &self.twice].iter().map(|one| one.load(Ordering::Relaxed)).sum()
    }

    /// Was there some of everything?
    #[must_use]
    pub fn is_thorough(&self) -> bool {
        let all = [&self.endings, &self.nested, &self.twice, &self.recovered, &self.opened, &self.resumed];
        all.iter().all(|one| one.load(Ordering::Relaxed) >= 10)
    }

    fn count(counter: &AtomicU64, by: u64) {
        counter.fetch_add(by, Ordering::Relaxed);
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        write!(
            f,
            "{} power cuts ({} outcomes not the same as another of the same cut): {} of re-encryptions at {} writes and flushes, {} of \
             recoveries, {} of those' recoveries; \
             {} steps recovered, {} opened with passphrases, {} gone on with to the end",
            self.cuts(),
            of(&self.distinct),
            of(&self.endings),
            of(&self.events),
            of(&self.nested),
            of(&self.twice),
            of(&self.recovered),
            of(&self.opened),
            of(&self.resumed),
        )
    }
}

/// What is done to a ledger in its world.
pub type WrapIn<'a> = &'a (dyn Fn(&World, Box<dyn Ledger>) -> Box<dyn Ledger> + Sync);

/// A whole re-encryption to be cut.
pub struct Proof<'a> {
    /// For messages.
    pub name: String,
    /// What it begins on.
    pub volume: &'a Volume,
    /// How closely.
    pub depth: Depth,
    /// What is done to the ledger.
    pub wrap: WrapIn<'a>,
    /// What was tried.
    pub totals: &'a Totals,
    pub(super) judge: Judge<'a>,
}

impl<'a> Proof<'a> {
    /// Of the production code as it is.
    #[must_use]
    pub fn new(name: &str, volume: &'a Volume, depth: Depth, totals: &'a Totals) -> Self {
        Self {
            name: name.to_owned(),
            volume,
            depth,
            wrap: &|_, ledger| ledger,
            totals,
            judge: Judge::new(volume),
        }
    }

    /// With another ledger.
    #[must_use]
    pub fn wrapped(self, wrap: WrapIn<'a>) -> Self {
        Self { wrap, ..self }
    }

    /// Cut it everywhere.
    ///
    /// # Errors
    /// The first ending that lost something.
    pub fn run(&self, seed: u64) -> Result<Summary, Violation> {
        let Depth { tears, cuts_max, .. } = self.depth;
        let explore = Explore {
            tears,
            cuts_max,
            disks: self.volume.disks.clone(),
            ..Explore::new(&self.name, seed, Image::default())
        };
        let summary = explore.recorded(|world| self.whole(world), |world, case| self.ending(world, case))?;
        Totals::count(&self.totals.events, summary.events);
        Totals::count(&self.totals.endings, summary.cases);
        Totals::count(&self.totals.distinct, summary.judged);
        Ok(summary)
    }

    /// From the beginning to the end.
    fn whole(&self, world: &World) -> Result<()> {
        let opened = course::begin(world, self.volume)?;
        self.learn(world, &opened).map_err(|why| Error::new(ErrorKind::Internal, why))?;
        let wrap: Wrap<'_> = &|ledger| (self.wrap)(world, ledger);
        course::finish(world, (&self.volume.shape).into(), opened, wrap)
    }

    /// The new key, if there is one.
    pub(super) fn learn(&self, world: &World, opened: &Opened) -> Result<(), String> {
        let Some((_, key)) = &opened.new.cipher else { return Ok(()) };
        let mut header = world.blocking(HEADER, "header").map_err(|error| error.chain())?;
        let loaded = Judge::load(&mut header)?;
        self.judge.learn(&loaded.header.metadata, key)
    }

    /// The disks as they are found: nothing is lost, whatever is done next.
    fn ending(&self, found: &World, case: &Case) -> Result<(), String> {
        let number = number_of(case);
        let one_of = |every: u64, salt: u64| mix(number ^ salt).is_multiple_of(every.max(1));
        let nest = one_of(self.depth.nest_every, 1) && self.is_interrupted(found)?;
        let again = nest.then(|| self.disks_of(found));
        if one_of(self.depth.open_every, 2) {
            self.open(found)?;
        } else {
            self.recover(found)?;
        }
        let standing = self.judge.look(found)?;
        if case.completed && standing != Standing::Over {
            return Err(format!("it was reported as done, but {standing:?}"));
        }
        if one_of(self.depth.resume_every, 3) {
            self.resume(found, standing)?;
        }
        if let Some(again) = again {
            self.nested(again, number, 1)?;
        }
        Ok(())
    }

    /// Was a step interrupted?
    fn is_interrupted(&self, found: &World) -> Result<bool, String> {
        let mut header = found.blocking(HEADER, "header").map_err(|error| error.chain())?;
        let loaded = match Judge::load(&mut header) {
            // Plain data, or on its way there.
            Err(_) if self.volume.old.is_none() => return Ok(false),
            loaded => loaded?,
        };
        let state = read::read(&loaded.header.metadata).map_err(|error| error.chain())?;
        Ok(matches!(state, Some((_, State::Crash { .. }))))
    }

    /// Open it as a user does.
    fn open(&self, found: &World) -> Result<(), String> {
        Totals::count(&self.totals.opened, 1);
        let opened = course::open(found, self.volume, &self.volume.shape.passphrases());
        if opened.is_err() && self.is_plain(found)? {
            return Ok(());
        }
        let opened = opened.map_err(|error| format!("cannot be opened: {}", error.chain()))?;
        if let Some(opened) = opened {
            Totals::count(&self.totals.recovered, u64::from(opened.recovered_bytes > 0));
            self.learn(found, &opened)?;
        }
        Ok(())
    }

    /// Is there no header, and is that as it may be?
    fn is_plain(&self, found: &World) -> Result<bool, String> {
        let mut header = found.blocking(HEADER, "header").map_err(|error| error.chain())?;
        Ok(self.volume.old.is_none() && Judge::load(&mut header).is_err())
    }

    /// The same with keys that are known, without the derivations that would take most of the time.
    pub(super) fn recover(&self, found: &World) -> Result<(), String> {
        let failed = |error: engine::error::Error| format!("cannot be recovered: {}", error.chain());
        if self.volume.shape.moves() {
            let mut data = found.blocking(self.volume.shape.data_disk(), "data").map_err(failed)?;
            shift::put_back(&mut data).map_err(failed)?;
        }
        if self.is_plain(found)? {
            return Ok(());
        }
        let mut header = found.blocking(HEADER, "header").map_err(failed)?;
        let mut loaded: Loaded = Judge::load(&mut header)?;
        let metadata = &loaded.header.metadata;
        let Some((process, state)) = read::read(metadata).map_err(failed)? else {
            return luks::sweep(&mut header, &mut loaded).map(drop).map_err(failed);
        };
        let known = self.judge.known(metadata);
        if known.is_none() && process.new.digest.is_some() {
            drop(header);
            return self.open(found);
        }
        let side = |side: &Side, key: Option<&Secret>| {
            let Some((cipher, key)) = side.cipher.as_ref().zip(key) else {
                return Ok(reencrypt::Side { offset: side.offset, cipher: None });
            };
            let area = AreaCipher {
                spec: CipherSpec::parse(&cipher.encryption)?,
                unit_bytes: cipher.sector_size,
                offset_sectors: cipher.iv_tweak,
                large_tweak: false,
            };
            Ok(reencrypt::Side {
                offset: side.offset,
                cipher: Some((area, Secret::copy_of(key.as_bytes())?)),
            })
        };
        let old = side(&process.old, self.volume.old.as_ref().map(|(key, _)| key)).map_err(failed)?;
        let new = side(&process.new, known.as_ref().map(|known| known.key())).map_err(failed)?;
        let total = self.volume.plain.len() as u64;
        let proven = Proven { process: &process, old: &old, new: &new, total };
        let mut data = found.blocking(self.volume.shape.data_disk(), "data").map_err(failed)?;
        let bytes = recover::recover(&mut header, &mut data, &mut loaded, state, &proven).map_err(failed)?;
        Totals::count(&self.totals.recovered, u64::from(bytes > 0));
        Ok(())
    }

    /// Go on to the end.
    pub(super) fn resume(&self, found: &World, standing: Standing) -> Result<(), String> {
        Totals::count(&self.totals.resumed, 1);
        let done = match standing {
            Standing::Before => self.whole(found),
            Standing::UnderWay(_) | Standing::Over => course::resume(found, self.volume),
        };
        done.map_err(|error| format!("cannot be gone on with: {}", error.chain()))?;
        match self.judge.look(found)? {
            Standing::Over => Ok(()),
            other => Err(format!("gone on with to the end, but {other:?}")),
        }
    }

    /// Cut the recovery of what was found. Whatever becomes of it can be recovered again.
    fn nested(&self, disks: Vec<(Image, DiskOptions)>, number: u64, level: u32) -> Result<(), String> {
        let within = Explore {
            tears: self.depth.nest_tears,
            disks,
            within: true,
            ..Explore::new(&self.name, mix(number), Image::default())
        };
        let act = |world: &World| self.recover(world).map_err(|why| Error::new(ErrorKind::Internal, why));
        let judged = within.recorded(act, |world, case| {
            self.nested_ending(world, number_of(case), level)
                .map_err(|why| format!("{why} (its recovery was cut at {case}, level {level})"))
        });
        let summary = judged.map_err(|violation| violation.message)?;
        Totals::count(if level == 1 { &self.totals.nested } else { &self.totals.twice }, summary.cases);
        Totals::count(&self.totals.distinct, summary.judged);
        Ok(())
    }

    /// As they were found.
    fn disks_of(&self, found: &World) -> Vec<(Image, DiskOptions)> {
        let options = self.volume.disks.iter().map(|(_, options)| *options);
        options.enumerate().map(|(disk, options)| (found.durable(disk), options)).collect()
    }

    fn nested_ending(&self, ending: &World, number: u64, level: u32) -> Result<(), String> {
        let deeper = level == 1
            && mix(number).is_multiple_of(self.depth.nest_every.max(1))
            && self.is_interrupted(ending)?;
        if deeper {
            self.nested(self.disks_of(ending), number, 2)?;
        }
        self.recover(ending)?;
        let standing = self.judge.look(ending)?;
        if mix(number ^ 3).is_multiple_of(self.depth.resume_every.max(1)) {
            self.resume(ending, standing)?;
        }
        Ok(())
    }
}

/// All that distinguishes an ending.
pub(super) fn number_of(case: &Case) -> u64 {
    let (event, phase) = case.cut.map_or((u64::MAX, Phase::After), |cut| (cut.event, cut.phase));
    mix(case.seed ^ mix(event ^ ((phase as u64) << 60) ^ (case.tear << 32)))
}

/// SplitMix64's last step.
pub(super) fn mix(number: u64) -> u64 {
    let z = (number ^ (number >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
