//! Every way a power cut can end something: run it, cut at each write and flush, tear what was not durable, and judge what is left.
//!
//! The first run is not cut: it must succeed, and tells how many events there are. Every other run starts from a fresh copy of
//! the same disks. A case that fails names itself, and `SIM_SEED=… SIM_CUT=…` runs that one alone.

use std::collections::HashSet;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::iter::{IndexedParallelIterator, IntoParallelRefIterator, ParallelIterator};

use super::image::Image;
use super::random::mix;
use super::record::Remains;
use super::{Cut, DiskOptions, Options, Phase, World};
use crate::error::Result;

/// One ending.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Case {
    /// Of the world.
    pub seed: u64,
    /// When the power went; `None`: after the end of it all.
    pub cut: Option<Cut>,
    /// Which of the tears.
    pub tear: u64,
    /// What was cut returned success all the same: what it promised must hold.
    pub completed: bool,
}

impl Case {
    /// What [`World::restart`] is given: the manner is the tear's, the dice are the case's own.
    fn restart_seed(&self) -> u64 {
        let (event, phase) = self.cut.map_or((u64::MAX, Phase::After), |cut| (cut.event, cut.phase));
        mix(self.seed ^ mix(event ^ ((phase as u64) << 60) ^ (self.tear << 32))) & !7 | (self.tear & 7)
    }
}

impl fmt::Display for Case {
    /// As `SIM_CUT` takes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.cut {
            None => write!(f, "end:{}", self.tear),
            Some(Cut { event, phase }) => {
                let phase = match phase {
                    Phase::Before => "before",
                    Phase::Middle => "middle",
                    Phase::After => "after",
                };
                write!(f, "{event}:{phase}:{}", self.tear)
            }
        }
    }
}

/// Where and how `SIM_CUT` says to cut.
fn parse(text: &str) -> Option<(Option<Cut>, u64)> {
    let (cut, tear) = text.rsplit_once(':')?;
    let tear = tear.parse().ok()?;
    if cut == "end" {
        return Some((None, tear));
    }
    let (event, phase) = cut.split_once(':')?;
    let phase = match phase {
        "before" => Phase::Before,
        "middle" => Phase::Middle,
        "after" => Phase::After,
        _ => return None,
    };
    Some((Some(Cut { event: event.parse().ok()?, phase }), tear))
}

/// A case that ended as it may not.
#[derive(Debug)]
pub struct Violation {
    /// Of the exploration.
    pub name: String,
    /// Which case.
    pub case: Case,
    /// What is wrong.
    pub message: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, case, message } = self;
        write!(f, "{name}: {message}; SIM_SEED={} SIM_CUT={case} runs this case alone", case.seed)
    }
}

impl std::error::Error for Violation {}

/// What was tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Summary {
    /// Writes and flushes of the run that was not cut.
    pub events: u64,
    /// Endings looked at.
    pub cases: u64,
    /// Endings judged: of those of one cut that left the same bytes only the first is.
    pub judged: u64,
    /// Of these, endings whose promise had been made.
    pub completed: u64,
}

/// What to explore.
#[derive(Debug, Clone)]
pub struct Explore {
    /// For messages.
    pub name: String,
    /// Of every world; `SIM_SEED` in the environment wins.
    pub seed: u64,
    /// Endings for each cut; 8 show every manner of [`World::restart`].
    pub tears: u64,
    /// At most so many cut points, evenly spread, for long runs.
    pub cuts_max: u64,
    /// Of every world.
    pub options: Options,
    /// What the disks hold at first.
    pub disks: Vec<(Image, DiskOptions)>,
}

/// Says which case it was if something in it panics.
struct Guard<'a>(&'a str, Case);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}: SIM_SEED={} SIM_CUT={} runs this case alone", self.0, self.1.seed, self.1);
        }
    }
}

impl Explore {
    /// One disk, every cut point, eight endings each.
    #[must_use]
    pub fn new(name: &str, seed: u64, image: Image) -> Self {
        Self {
            name: name.to_owned(),
            seed,
            tears: 8,
            cuts_max: u64::MAX,
            options: Options::default(),
            disks: vec![(image, DiskOptions::default())],
        }
    }

    /// Run `act` without a cut, then with a cut at every event; after each, `judge` gets the disks as they are found when the
    /// power comes back, once for each tear. `act` lets go of its queues before it returns.
    ///
    /// # Errors
    /// The first case that `judge` objects to.
    ///
    /// # Panics
    /// `act` fails without a cut; no memory for a disk; `SIM_SEED` or `SIM_CUT` are not what a failing case printed.
    pub fn run(
        &self,
        act: impl Fn(&World) -> Result<()>,
        judge: impl Fn(&World, &Case) -> Result<(), String>,
    ) -> Result<Summary, Violation> {
        let (seed, only) = self.asked();
        let mut summary = Summary::default();

        let world = self.world(seed);
        let uncut = Case { seed, cut: None, tear: 0, completed: true };
        let guard = Guard(&self.name, uncut);
        if let Err(error) = act(&world) {
            panic!("{}: fails without a cut: {}", self.name, error.chain());
        }
        drop(guard);
        summary.events = world.events();
        if only.is_none_or(|(cut, _)| cut.is_none()) {
            self.endings(&world.remains(), uncut, only, &judge, &mut summary)?;
        }
        drop(world);

        let cuts: Vec<Cut> = match only {
            Some((cut, _)) => cut.into_iter().collect(),
            None => self.cuts(summary.events),
        };
        for cut in cuts {
            let world = self.world(seed);
            world.cut_at(cut);
            let guard = Guard(&self.name, Case { seed, cut: Some(cut), tear: 0, completed: false });
            let completed = act(&world).is_ok();
            drop(guard);
            let case = Case { seed, cut: Some(cut), tear: 0, completed };
            self.endings(&world.remains(), case, only, &judge, &mut summary)?;
        }
        Ok(summary)
    }

    /// As [`Explore::run`], with the same cases and the same answers for an `act` that does the same each time (one queue on one thread,
    /// say), but `act` runs once: what each cut would leave is taken from that run, and judged on all cores. An `act` that
    /// returns success although a disk failed it is not found out here: only a cut behind its last request counts as
    /// completed.
    ///
    /// # Errors
    /// The first case that `judge` objects to.
    ///
    /// # Panics
    /// As [`Explore::run`].
    pub fn recorded(
        &self,
        act: impl FnOnce(&World) -> Result<()>,
        judge: impl Fn(&World, &Case) -> Result<(), String> + Sync,
    ) -> Result<Summary, Violation> {
        let (seed, only) = self.asked();
        let world = self.world(seed);
        world.start_recording();
        let uncut = Case { seed, cut: None, tear: 0, completed: true };
        let guard = Guard(&self.name, uncut);
        if let Err(error) = act(&world) {
            panic!("{}: fails without a cut: {}", self.name, error.chain());
        }
        drop(guard);
        let record = world.stop_recording();
        let events = world.events();
        let end = world.remains();
        drop(world);

        let mut cuts: Vec<Option<Cut>> = match only {
            Some((cut, _)) => vec![cut],
            None => self.cuts(events).into_iter().map(Some).collect(),
        };
        if only.is_none() {
            cuts.insert(0, None);
        }
        let failed = AtomicUsize::new(usize::MAX);
        let judged = |(index, cut): (usize, &Option<Cut>)| {
            let mut summary = Summary::default();
            if index > failed.load(Ordering::Relaxed) {
                return Ok(summary);
            }
            let (remains, completed) = match *cut {
                None => (end.clone(), true),
                Some(cut) => {
                    let remains = record.at(cut).expect("SIM_CUT is of a failed case");
                    (remains, record.completes(cut))
                }
            };
            let case = Case { seed, cut: *cut, tear: 0, completed };
            let verdict = self.endings(&remains, case, only, &judge, &mut summary);
            if verdict.is_err() {
                failed.fetch_min(index, Ordering::Relaxed);
            }
            verdict.map(|()| summary)
        };
        // One at a time per core: how long a case takes differs.
        let verdicts: Vec<_> = cuts.par_iter().enumerate().with_max_len(1).map(judged).collect();
        let mut summary = Summary { events, ..Summary::default() };
        for verdict in verdicts {
            let part = verdict?;
            summary.cases += part.cases;
            summary.judged += part.judged;
            summary.completed += part.completed;
        }
        Ok(summary)
    }

    /// The seed, and the only case to look at, if the environment says so.
    fn asked(&self) -> (u64, Option<(Option<Cut>, u64)>) {
        let seed = match std::env::var("SIM_SEED") {
            Ok(text) => text.parse().expect("SIM_SEED is a number"),
            Err(_) => self.seed,
        };
        let only =
            std::env::var("SIM_CUT").ok().map(|text| parse(&text).expect("SIM_CUT is of a failed case"));
        (seed, only)
    }

    fn world(&self, seed: u64) -> World {
        let world = World::with(seed, self.options);
        for (image, options) in &self.disks {
            world.add(image.clone(), *options).expect("memory for a simulated disk");
        }
        world
    }

    /// Before the first event, then in the middle of each and after each: before the others is after their predecessors.
    fn cuts(&self, events: u64) -> Vec<Cut> {
        let chosen = events.min(self.cuts_max);
        let start = if chosen < events { mix(self.seed) % (events / chosen) } else { 0 };
        let spread = |index: u64| u128::from(index) * u128::from(events) / u128::from(chosen);
        let at = |index| 1 + start + u64::try_from(spread(index)).expect("no more than the events");
        let first = (events > 0).then_some(Cut { event: 1, phase: Phase::Before });
        let others = (0..chosen).map(at).filter(|&event| event <= events);
        let phases = [Phase::Middle, Phase::After];
        first.into_iter().chain(others.flat_map(|event| phases.map(|phase| Cut { event, phase }))).collect()
    }

    fn endings(
        &self,
        remains: &Remains,
        case: Case,
        only: Option<(Option<Cut>, u64)>,
        judge: &impl Fn(&World, &Case) -> Result<(), String>,
        summary: &mut Summary,
    ) -> Result<(), Violation> {
        let tears = match only {
            Some((_, tear)) => tear..tear + 1,
            None => 0..self.tears,
        };
        let mut judged = HashSet::new();
        for tear in tears {
            let case = Case { tear, ..case };
            summary.cases += 1;
            summary.completed += u64::from(case.completed);
            let survivors = remains.survivors(case.restart_seed());
            if !judged.insert(remains.changes(&survivors)) {
                continue;
            }
            summary.judged += 1;
            let found =
                remains.power_on(case.restart_seed(), survivors).expect("memory for a simulated disk");
            let guard = Guard(&self.name, case);
            let verdict = judge(&found, &case);
            drop(guard);
            verdict.map_err(|message| Violation { name: self.name.clone(), case, message })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_case_is_read_as_it_is_printed() {
        for (cut, tear) in [
            (None, 7),
            (Some(Cut { event: 1, phase: Phase::Before }), 0),
            (Some(Cut { event: 312, phase: Phase::Middle }), 3),
            (Some(Cut { event: 9, phase: Phase::After }), 12),
        ] {
            let case = Case { seed: 1, cut, tear, completed: false };
            assert_eq!(parse(&case.to_string()), Some((cut, tear)));
        }
        for text in ["", "end", "3:middle", "x:after:1", "3:during:1"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn long_runs_are_cut_in_evenly_spread_places() {
        let explore = Explore { cuts_max: 10, ..Explore::new("x", 5, Image::zeros(0)) };
        let cuts = explore.cuts(1000);
        assert_eq!(cuts.len(), 21);
        assert!(cuts.iter().all(|cut| (1..=1000).contains(&cut.event)));
        assert!(cuts.windows(2).all(|pair| pair[1].event - pair[0].event <= 100));
        assert_eq!(explore.cuts(3).len(), 7);
        assert_eq!(explore.cuts(0), []);
    }
}
