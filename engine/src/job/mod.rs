//! Jobs: a user's intent with a number, its state, its end.
//!
//! | file | its one purpose |
//! |---|---|
//! | `mod` | the registry: numbers, places, who waits |
//! | `prepare` | from a request to a checked transfer |
//! | `state` | one job as others see it |
//! | `run` | one job from start to end |
//! | `encrypted` | the encrypted side: its header, and how the key is had |
//! | `geometry` | where a volume's data lies, and what follows for sizes |
//! | `marked` | copies of what a bitmap marks |
//! | `reencrypt` | re-encryption in place |
//! | `commit` | how a new file becomes visible, or vanishes |
//! | `checkpoint` | a copy that can be gone on with after a crash |
//! | `bench` | measuring instead of moving |
//! | `rehearse` | the pipeline beside its limit, for `bench` |
//! | `clock` | running time, rate |

pub mod bench;
pub mod checkpoint;
pub mod clock;
pub mod commit;
pub mod encrypted;
pub mod geometry;
mod marked;
pub mod prepare;
pub mod reencrypt;
pub mod rehearse;
pub mod run;
pub mod state;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use proto::{Action, JobId, JobInfo, JobState, Stats, Submit};

use crate::backend::nbd;
use crate::crypto::Kernel;
use crate::error::{Error, ErrorKind, Result};
use crate::job::clock::per_second;
use crate::job::prepare::{Means, Prepared, prepare};
use crate::job::state::{Job, JobSpec};
use crate::pipeline::Pipeline;
use crate::pipeline::transfer::Transfer;
use crate::telemetry::record::StageRecord;

/// Whose job it is: the credentials of the socket's peer, read once at accept. Filesystem changes for a job (rename,
/// unlink) are made with these rights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Supplementary groups (`SO_PEERGROUPS`).
    pub groups: Vec<u32>,
}

/// Bounds and choices for all jobs.
#[derive(Debug, Clone)]
pub struct JobConfig {
    /// The kernel every cipher is built with.
    pub kernel: Kernel,
    /// Jobs that run at once; more wait as `queued`.
    pub running_max: u32,
    /// Jobs queued or running that one user may have.
    pub per_user_max: u32,
    /// Finished jobs remembered for `list` and `show`.
    pub remembered_max: u32,
}

/// What a job's thread will do.
enum Load {
    Transfer(Box<Prepared>),
    Bench(proto::Bench),
    Reencrypt(Box<reencrypt::request::Prepared>),
}

impl Load {
    /// It will not be carried: what was made for it goes.
    fn discard(&self) {
        match self {
            Self::Transfer(prepared) => run::discard(prepared),
            Self::Reencrypt(prepared) => reencrypt::discard(prepared),
            Self::Bench(_) => {}
        }
    }
}

/// A request that was checked.
struct Accepted {
    load: Load,
    /// A bench and a re-encryption have none yet.
    transfer: Option<Arc<Transfer>>,
    /// Workers that will carry it.
    workers: usize,
    total_bytes: Option<u64>,
    warnings: Vec<String>,
}

/// All jobs of this daemon. Every method is quick and may be called from the control thread: the work is done elsewhere.
pub struct Registry {
    config: JobConfig,
    pipeline: Arc<Pipeline>,
    notify: Arc<dyn Fn(JobId) + Send + Sync>,
    table: Mutex<Table>,
}

/// Finished jobs whose histograms are kept. At some 150 KiB each, these are what a daemon that never ends remembers in full.
const RECORDS_MAX: usize = 32;

#[derive(Default)]
struct Table {
    last: JobId,
    jobs: BTreeMap<JobId, Arc<Job>>,
    waiting: VecDeque<(Arc<Job>, Load)>,
    running: BTreeMap<JobId, Arc<Job>>,
    /// In the order they ended, the oldest end first.
    finished: VecDeque<JobId>,
}

impl Table {
    fn check_room(&self, owner: &Owner, per_user_max: u32) -> Result<()> {
        let mine =
            self.jobs.values().filter(|job| job.owner.uid == owner.uid && !job.state().is_final()).count();
        if mine >= per_user_max as usize {
            let what = format!("{mine} jobs are queued or running, and a user may have {per_user_max}");
            return Err(Error::new(ErrorKind::Limit, what).hint("wait for one to end, or cancel it"));
        }
        Ok(())
    }

    /// Jobs that have a place. A paused one has given its place up; resumed, it may be one too many for a while.
    fn placed(&self) -> impl Iterator<Item = &Arc<Job>> {
        self.running.values().filter(|job| job.state() != JobState::Paused)
    }

    /// Who goes next, if there is a place: the oldest waiting job of the user with the fewest running. No user has more than
    /// three quarters of the places, so nobody can keep everybody else waiting; and one bench at a time, or they measure
    /// each other.
    fn next(&mut self, running_max: u32) -> Option<(Arc<Job>, Load)> {
        if self.placed().count() >= running_max as usize {
            return None;
        }
        // Paused ones count here: they hold no place, but descriptors, threads and buffers.
        let mut of_user: HashMap<u32, u32> = HashMap::new();
        for job in self.running.values() {
            *of_user.entry(job.owner.uid).or_default() += 1;
        }
        let user_max = running_max - running_max / 4;
        let benching = self.running.values().any(|job| job.action == Action::Bench);
        let mine = |job: &Job| of_user.get(&job.owner.uid).copied().unwrap_or(0);
        let (at, _) = self
            .waiting
            .iter()
            .enumerate()
            .filter(|(_, (job, _))| mine(job) < user_max && !(benching && job.action == Action::Bench))
            .min_by_key(|(_, (job, _))| mine(job))?;
        let next = self.waiting.remove(at)?;
        self.running.insert(next.0.id, next.0.clone());
        Some(next)
    }

    /// Forget the oldest finished jobs beyond what is remembered, and the histograms of all but the last few.
    fn forget(&mut self, remembered_max: u32) {
        while self.finished.len() > remembered_max as usize
            && let Some(id) = self.finished.pop_front()
        {
            self.jobs.remove(&id);
        }
        let old = self.finished.len().checked_sub(RECORDS_MAX + 1);
        if let Some(job) = old.and_then(|old| self.jobs.get(&self.finished[old])) {
            job.forget_record();
        }
    }
}

impl Registry {
    /// `notify` is called from other threads whenever a job's state changed (not on progress).
    pub fn start(
        config: JobConfig,
        pipeline: Arc<Pipeline>,
        notify: Box<dyn Fn(JobId) + Send + Sync>,
    ) -> Arc<Self> {
        Arc::new(Self { config, pipeline, notify: Arc::from(notify), table: Mutex::default() })
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pipeline jobs run on.
    #[must_use]
    pub fn pipeline(&self) -> &Pipeline {
        &self.pipeline
    }

    /// Check a request (descriptors of the right kind, sizes, key) and start or queue it. Returns warnings with the number.
    ///
    /// # Errors
    /// Anything wrong with the request, before anything was written.
    pub fn submit(
        self: &Arc<Self>,
        owner: &Owner,
        submit: Submit,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(JobId, Vec<String>)> {
        // Before any work is done for it.
        self.table().check_room(owner, self.config.per_user_max)?;
        let action = submit.action;
        let detached = submit.detach;
        let rate = submit.bytes_per_second;
        let name = |name: Option<&str>| name.unwrap_or_default().to_owned();
        let volume = submit.reencrypt.as_ref().map(|request| request.volume.name.as_str());
        let source = name(submit.source.as_ref().map(|source| source.name.as_str()).or(volume));
        let sink = name(submit.sink.as_ref().map(|sink| sink.name.as_str()));
        let Accepted { load, transfer, workers, total_bytes, warnings } =
            self.check(owner, submit, descriptors)?;
        let id = {
            let mut table = self.table();
            // Again, under the lock that adds it: several may have got this far together.
            table.check_room(owner, self.config.per_user_max)?;
            table.last += 1;
            let id = table.last;
            let notify = self.notify.clone();
            let job = Job::new(JobSpec {
                id,
                owner: owner.clone(),
                action,
                detached,
                source,
                sink,
                transfer,
                workers: u32::try_from(workers).unwrap_or(u32::MAX),
                total_bytes,
                changed: Box::new(move |id| notify(id)),
            });
            if action == Action::Reencrypt {
                // Its transfer is made later, and told then.
                job.throttle(rate)?;
            }
            table.jobs.insert(id, job.clone());
            table.waiting.push_back((job, load));
            id
        };
        self.start_waiting();
        Ok((id, warnings))
    }

    /// Check a request and prepare what it asks for.
    fn check(&self, owner: &Owner, submit: Submit, descriptors: Vec<OwnedFd>) -> Result<Accepted> {
        let means = Means {
            kernel: self.config.kernel,
            buffer_bytes: self.pipeline.buffer_bytes(),
            workers: self.pipeline.workers(),
        };
        match submit.action {
            Action::Bench => {
                let bench = bench::check(submit, &descriptors)?;
                Ok(Accepted {
                    load: Load::Bench(bench),
                    transfer: None,
                    workers: 1,
                    total_bytes: None,
                    warnings: Vec::new(),
                })
            }
            Action::Reencrypt => {
                let prepared = reencrypt::request::prepare(means, owner, submit, descriptors)?;
                let workers = prepared.workers_max;
                let load = Load::Reencrypt(Box::new(prepared));
                Ok(Accepted { load, transfer: None, workers, total_bytes: None, warnings: Vec::new() })
            }
            Action::Encrypt | Action::Decrypt | Action::Verify => {
                let mut prepared = prepare(means, owner, submit, descriptors)?;
                let warnings = std::mem::take(&mut prepared.warnings);
                let transfer = prepared.transfer.clone();
                let total_bytes = transfer.plan.covered_bytes();
                let workers = if transfer.is_ordered() { 1 } else { prepared.workers_max };
                let load = Load::Transfer(Box::new(prepared));
                Ok(Accepted { load, transfer: Some(transfer), workers, total_bytes, warnings })
            }
        }
    }

    /// Start waiting jobs while there are places.
    fn start_waiting(self: &Arc<Self>) {
        loop {
            let next = self.table().next(self.config.running_max);
            let Some((job, load)) = next else { return };
            self.start_thread(job, load);
        }
    }

    /// Carry a job to its end on a thread of its own.
    fn start_thread(self: &Arc<Self>, job: Arc<Job>, load: Load) {
        // Shared, so that it is not lost with a thread that cannot be had.
        let load = Arc::new(Mutex::new(Some(load)));
        let registry = self.clone();
        let carried = (job.clone(), load.clone());
        let body = move || {
            let (job, load) = carried;
            let load = load.lock().unwrap_or_else(PoisonError::into_inner).take();
            let ended = load.map_or_else(|| Ok(run::Ending::default()), |load| registry.carry(&job, load));
            registry.ended(&job, ended);
        };
        if let Err(cause) = std::thread::Builder::new().name(format!("job{}", job.id)).spawn(body) {
            if let Some(load) = load.lock().unwrap_or_else(PoisonError::into_inner).take() {
                load.discard();
            }
            self.ended(&job, Err(Error::io("cannot start the job's thread", cause)));
        }
    }

    fn carry(self: &Arc<Self>, job: &Job, load: Load) -> Result<run::Ending> {
        if let Err(cancelled) = job.check_cancelled() {
            load.discard();
            return Err(cancelled);
        }
        job.begin();
        if job.state() == JobState::Paused {
            // Paused while it waited: the place it was given is free again.
            self.start_waiting();
        }
        match load {
            Load::Transfer(mut prepared) => run::run(job, &self.pipeline, &mut prepared),
            Load::Reencrypt(prepared) => {
                reencrypt::run(job, &self.pipeline, *prepared, &|| self.start_waiting())
            }
            Load::Bench(bench) => {
                bench::run(job, &bench, &self.pipeline, self.config.kernel).map(|()| run::Ending::default())
            }
        }
    }

    fn ended(self: &Arc<Self>, job: &Job, ended: Result<run::Ending>) {
        job.end(ended);
        // With the job's transfer its descriptors went.
        nbd::close_unused();
        {
            let mut table = self.table();
            table.running.remove(&job.id);
            table.finished.push_back(job.id);
        }
        // Its end was announced before it stopped to count as active; whoever waits for that looks again.
        (self.notify)(job.id);
        self.table().forget(self.config.remembered_max);
        self.start_waiting();
    }

    /// All jobs, oldest first.
    #[must_use]
    pub fn list(&self) -> Vec<JobInfo> {
        let jobs: Vec<Arc<Job>> = self.table().jobs.values().cloned().collect();
        jobs.iter().map(|job| job.info()).collect()
    }

    fn job(&self, job: JobId) -> Result<Arc<Job>> {
        let found = self.table().jobs.get(&job).cloned();
        found.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("no job {job}")))
    }

    /// One job, or `None`.
    #[must_use]
    pub fn show(&self, job: JobId) -> Option<JobInfo> {
        self.job(job).ok().map(|job| job.info())
    }

    /// See `proto::Call::Pause`.
    ///
    /// # Errors
    /// `NotFound`, or `Conflict` when final.
    pub fn pause(self: &Arc<Self>, job: JobId) -> Result<JobInfo> {
        let info = self.change(job, |job| job.set_paused(true))?;
        // Its place is free, but for a re-encryption's: that one gives it up when it is at rest.
        self.start_waiting();
        Ok(info)
    }

    /// See `proto::Call::Resume`.
    ///
    /// # Errors
    /// `NotFound`, or `Conflict` when final.
    pub fn resume(&self, job: JobId) -> Result<JobInfo> {
        self.change(job, |job| job.set_paused(false))
    }

    /// Ask for the end of a job; it is final a little later.
    ///
    /// # Errors
    /// `NotFound`, or `Conflict` when final already.
    pub fn cancel(self: &Arc<Self>, job: JobId) -> Result<JobInfo> {
        let info = self.change(job, Job::cancel)?;
        self.end_waiting(job);
        Ok(info)
    }

    /// A job cancelled before it had a place needs none to end: its thread only gives back what it held.
    fn end_waiting(self: &Arc<Self>, id: JobId) {
        let waiting = {
            let mut table = self.table();
            let at = table.waiting.iter().position(|(job, _)| job.id == id);
            at.and_then(|at| table.waiting.remove(at))
        };
        if let Some((job, load)) = waiting {
            self.start_thread(job, load);
        }
    }

    /// See `proto::Call::Throttle`.
    ///
    /// # Errors
    /// `NotFound`, `Conflict` when final, or `Invalid` for a rate of zero.
    pub fn throttle(&self, job: JobId, bytes_per_second: Option<u64>) -> Result<JobInfo> {
        self.change(job, |job| job.throttle(bytes_per_second))
    }

    fn change(&self, job: JobId, act: impl FnOnce(&Job) -> Result<()>) -> Result<JobInfo> {
        let job = self.job(job)?;
        act(&job)?;
        self.pipeline.wake();
        Ok(job.info())
    }

    /// Statistics of one job, or of several merged.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn stats(&self, jobs: &[JobId]) -> Result<Stats> {
        let mut record = StageRecord::default();
        let mut stats = Stats {
            job: if let [one] = jobs { Some(*one) } else { None },
            bytes: 0,
            bytes_per_second: 0.0,
            stages: Vec::new(),
            bottleneck: None,
            syscalls: 0,
        };
        let (mut seconds, mut core_seconds) = (0.0, 0.0);
        for &id in jobs {
            let job = match self.job(id) {
                // One of many may have been forgotten since they were listed.
                Err(_) if jobs.len() > 1 => continue,
                found => found?,
            };
            let (mut part, mut syscalls) = job.record();
            // While it runs, the workers have it; `run` moves it over when they have left.
            if syscalls == 0
                && matches!(job.state(), JobState::Running | JobState::Paused)
                && let Some(transfer) = job.transfer()
            {
                let (live, calls) = self.pipeline.snapshot(&transfer);
                part.merge(&live);
                syscalls += calls;
            }
            record.merge(&part);
            stats.syscalls += syscalls;
            let (ran, cores, bytes) = job.work_done();
            seconds += ran;
            core_seconds += cores;
            stats.bytes += bytes;
        }
        stats.stages = record.to_stats();
        stats.bytes_per_second = per_second(stats.bytes, seconds);
        stats.bottleneck = record.bottleneck(core_seconds);
        Ok(stats)
    }

    /// Jobs not yet final.
    #[must_use]
    pub fn active(&self) -> u32 {
        // A job counts until its end has been announced, not only until it has ended.
        let table = self.table();
        u32::try_from(table.jobs.len() - table.finished.len()).unwrap_or(u32::MAX)
    }
}
