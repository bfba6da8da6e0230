//! One job as others see it: its state, its progress, its end. The thread that carries it writes, everybody reads.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use proto::reencrypt::Phase;
use proto::{Action, BenchRow, ErrorKind, JobId, JobInfo, JobState, Outcome, Progress};

use crate::error::{Error, Result};
use crate::job::Owner;
use crate::job::clock::{Clock, per_second};
use crate::pipeline::transfer::Transfer;
use crate::sys::process;
use crate::telemetry::record::{StageRecord, Totals};

/// How often a paused job looks whether it may go on.
const PAUSE_POLL: Duration = Duration::from_millis(100);

/// One job.
pub struct Job {
    /// Its number.
    pub id: JobId,
    /// Whose it is.
    pub owner: Owner,
    /// What it does.
    pub action: Action,
    /// Outlives its submitter's connection.
    pub detached: bool,
    source: String,
    sink: String,
    submitted: SystemTime,
    submitted_at: Instant,
    cancelled: AtomicBool,
    inner: Mutex<Inner>,
    changed: Box<dyn Fn(JobId) + Send + Sync>,
}

struct Inner {
    state: JobState,
    clock: Clock,
    /// Hashing its passphrase.
    unlocking: bool,
    /// How long that took.
    unlock: Duration,
    /// Bytes to move, if known.
    total_bytes: Option<u64>,
    /// Dropped at the end, and the volume key with it.
    transfer: Option<Arc<Transfer>>,
    /// What the transfer had done when it was dropped.
    totals: Totals,
    /// Of a re-encryption.
    rewriting: Rewriting,
    /// Where it began.
    began_at: u64,
    /// Of workers that have left, and of stages that no worker carries. Some 150 KiB: made when there is something in it,
    /// and forgotten long before the job is.
    record: Option<Box<StageRecord>>,
    syscalls: u64,
    outcome: Option<Outcome>,
    first_difference: Option<u64>,
    bench: Vec<BenchRow>,
    cpu_before: (f64, f64),
    /// Workers that carry it.
    cores: f64,
}

/// What only a re-encryption has: its transfers are made while it runs, and others did a part of its work before.
#[derive(Default)]
struct Rewriting {
    /// What users asked for while there was no transfer to tell.
    paused: bool,
    rate: Option<u64>,
    /// What it is at.
    phase: Option<Phase>,
    /// Bytes that were new before it began.
    done_before: u64,
    /// While it is verified: what it had come to, and of how much.
    kept: Option<(Totals, u64, Option<u64>)>,
    report: Option<Box<proto::reencrypt::Report>>,
}

/// What a job is made of.
pub struct JobSpec {
    /// See [`Job::id`].
    pub id: JobId,
    /// See [`Job::owner`].
    pub owner: Owner,
    /// See [`Job::action`].
    pub action: Action,
    /// See [`Job::detached`].
    pub detached: bool,
    /// Where from, as typed.
    pub source: String,
    /// Where to, as typed.
    pub sink: String,
    /// Its data path; a bench has none.
    pub transfer: Option<Arc<Transfer>>,
    /// Workers that will carry it.
    pub workers: u32,
    /// Bytes of source, if known.
    pub total_bytes: Option<u64>,
    /// Called after each change of state, from any thread.
    pub changed: Box<dyn Fn(JobId) + Send + Sync>,
}

impl Job {
    /// A queued job.
    #[must_use]
    pub fn new(spec: JobSpec) -> Arc<Self> {
        let JobSpec { id, owner, action, detached, source, sink, transfer, workers, total_bytes, changed } =
            spec;
        Arc::new(Self {
            id,
            owner,
            action,
            detached,
            source,
            sink,
            submitted: SystemTime::now(),
            submitted_at: Instant::now(),
            cancelled: AtomicBool::new(false),
            inner: Mutex::new(Inner {
                state: JobState::Queued,
                clock: Clock::default(),
                unlocking: false,
                unlock: Duration::ZERO,
                total_bytes,
                transfer,
                totals: Totals::default(),
                rewriting: Rewriting::default(),
                began_at: 0,
                record: None,
                syscalls: 0,
                outcome: None,
                first_difference: None,
                bench: Vec::new(),
                cpu_before: cpu_seconds(),
                cores: f64::from(workers),
            }),
            changed,
        })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The transfer while there is one.
    #[must_use]
    pub fn transfer(&self) -> Option<Arc<Transfer>> {
        self.inner().transfer.clone()
    }

    /// Where it stands.
    #[must_use]
    pub fn state(&self) -> JobState {
        self.inner().state
    }

    /// Move to another state. Final states absorb: nothing follows them.
    pub fn set_state(&self, state: JobState) {
        if self.inner().enter(state) {
            self.announce();
        }
    }

    fn announce(&self) {
        tracing::info!("job {} is {:?}", self.id, self.state());
        (self.changed)(self.id);
    }

    /// It starts running, paused if it was paused while queued.
    pub fn begin(&self) {
        {
            let mut inner = self.inner();
            let paused = inner.is_paused();
            inner.cpu_before = cpu_seconds();
            inner.enter(if paused { JobState::Paused } else { JobState::Running });
        }
        self.announce();
    }

    /// It goes about the passphrase, whose hashing is no movement of data.
    pub fn unlocking(&self) {
        self.inner().unlocking = true;
    }

    /// The passphrase is dealt with: its time and CPU are not the transfer's.
    pub fn unlocked(&self) {
        let mut inner = self.inner();
        inner.unlocking = false;
        inner.unlock = inner.clock.restart(Instant::now());
    }

    /// A re-encryption's data path, made while it runs: what users asked for meanwhile holds for it. `total` bytes in all, of which
    /// `done_before` are none of its work.
    pub fn attach(&self, transfer: Arc<Transfer>, phase: Phase, total: u64, done_before: u64) {
        let mut inner = self.inner();
        transfer.gate.set_paused(inner.rewriting.paused);
        transfer.gate.set_rate(inner.rewriting.rate);
        if phase == Phase::Verifying {
            inner.rewriting.kept = Some((inner.totals, inner.rewriting.done_before, inner.total_bytes));
        }
        inner.total_bytes = Some(total);
        inner.rewriting.phase = Some(phase);
        inner.rewriting.done_before = done_before;
        inner.totals = Totals::default();
        inner.transfer = Some(transfer);
        // Rates of another phase are none of this one's.
        inner.clock.forget_samples();
    }

    /// The transfer has ended: drop it, and keep what it came to. What was verified is no more than what was done.
    pub fn detach(&self) {
        let mut inner = self.inner();
        inner.totals = inner.transfer.take().map(|transfer| transfer.totals()).unwrap_or_default();
        inner.rewriting.phase = None;
        if let Some((totals, done_before, total_bytes)) = inner.rewriting.kept.take() {
            inner.totals = totals;
            inner.rewriting.done_before = done_before;
            inner.total_bytes = total_bytes;
        }
    }

    /// What a re-encryption has come to so far; with the outcome, however it ends.
    pub fn report(&self, report: proto::reencrypt::Report) {
        self.inner().rewriting.report = Some(Box::new(report));
    }

    /// Is it paused, or to be so when it begins?
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.inner().is_paused()
    }

    /// Come back when it may hash and write: a paused job does neither. For its own thread, where no worker carries it.
    ///
    /// # Errors
    /// `Cancelled`.
    pub fn wait_while_paused(&self) -> Result<()> {
        while self.is_paused() {
            self.check_cancelled()?;
            std::thread::sleep(PAUSE_POLL);
        }
        self.check_cancelled()
    }

    /// Pause or resume. A queued job keeps its state and starts paused.
    ///
    /// # Errors
    /// `Conflict` when it is past the point, or a bench.
    pub fn set_paused(&self, paused: bool) -> Result<()> {
        // Gate and state change under one lock, or a state could be shown that the gate does not have.
        let changed = {
            let mut inner = self.inner();
            let can = self.action == Action::Reencrypt || inner.transfer.is_some();
            match inner.state {
                JobState::Queued if can => {
                    inner.hold(paused);
                    false
                }
                JobState::Running
                    if paused && self.action == Action::Reencrypt && inner.transfer.is_some() =>
                {
                    // It is paused when its volume is at rest, and says so then ([`Job::rests`]).
                    inner.hold(true);
                    false
                }
                JobState::Running | JobState::Paused if can => {
                    inner.hold(paused);
                    inner.enter(if paused { JobState::Paused } else { JobState::Running })
                }
                JobState::Flushing if can => false,
                _ => {
                    drop(inner);
                    return Err(self.refused(if paused { "paused" } else { "resumed" }));
                }
            }
        };
        if changed {
            self.announce();
        }
        Ok(())
    }

    /// The volume of a re-encryption is at rest, durably, and nothing is under way: if that was asked for, it is paused. Is it so only
    /// since now?
    pub fn rests(&self) -> bool {
        let entered = {
            let mut inner = self.inner();
            inner.is_paused() && inner.enter(JobState::Paused)
        };
        if entered {
            self.announce();
        }
        entered
    }

    /// Limit the rate.
    ///
    /// # Errors
    /// `Invalid` for a rate of zero, `Conflict` when final, or a bench.
    pub fn throttle(&self, bytes_per_second: Option<u64>) -> Result<()> {
        if bytes_per_second == Some(0) {
            return Err(Error::new(
                ErrorKind::Invalid,
                "a rate of 0 bytes per second never ends; pause the job instead",
            ));
        }
        let mut inner = self.inner();
        let can = self.action == Action::Reencrypt && !inner.state.is_final();
        match &inner.transfer {
            Some(transfer) => transfer.gate.set_rate(bytes_per_second),
            None if can => {}
            None => {
                drop(inner);
                return Err(self.refused("throttled"));
            }
        }
        inner.rewriting.rate = bytes_per_second;
        Ok(())
    }

    /// Ask for its end. A re-encryption is not cut short by it: it looks for this itself where it is safe to stop.
    ///
    /// # Errors
    /// `Conflict` when it is final already.
    pub fn cancel(&self) -> Result<()> {
        if self.state().is_final() {
            return Err(self.refused("cancelled"));
        }
        self.cancelled.store(true, Ordering::Release);
        if self.action != Action::Reencrypt
            && let Some(transfer) = self.transfer()
        {
            transfer.fail(cancelled());
        }
        Ok(())
    }

    fn refused(&self, what: &str) -> Error {
        let state = self.state();
        let word = serde_json::to_string(&state).unwrap_or_default();
        Error::new(
            ErrorKind::Conflict,
            format!("job {} is {} and cannot be {what}", self.id, word.trim_matches('"')),
        )
    }

    /// Was its end asked for?
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    /// An error if its end was asked for.
    ///
    /// # Errors
    /// `Cancelled`.
    pub fn check_cancelled(&self) -> Result<()> {
        if self.is_cancelled() { Err(cancelled()) } else { Ok(()) }
    }

    /// Regular housekeeping while it runs.
    pub fn tick(&self, now: Instant) {
        let mut inner = self.inner();
        if let Some(done) = inner.transfer.as_ref().map(|transfer| transfer.totals().done_bytes) {
            inner.clock.sample(now, done);
        }
    }

    /// The workers have left: their statistics.
    pub fn keep_record(&self, (record, syscalls): (StageRecord, u64)) {
        let mut inner = self.inner();
        inner.record.get_or_insert_default().merge(&record);
        inner.syscalls += syscalls;
    }

    /// Statistics of a stage that no worker carries.
    pub fn add_record(&self, record: &StageRecord) {
        self.inner().record.get_or_insert_default().merge(record);
    }

    /// `verify` found this.
    pub fn found_difference(&self, offset: u64) {
        self.inner().first_difference = Some(offset);
    }

    /// `bench` measured this.
    pub fn add_bench(&self, row: BenchRow) {
        self.inner().bench.push(row);
    }

    /// It is over. Drops the transfer, and with it the last copy of the key schedule.
    pub fn end(&self, ended: Result<crate::job::run::Ending>) {
        let state = {
            let mut inner = self.inner();
            if let Some(transfer) = inner.transfer.take() {
                (inner.totals, inner.began_at) = (transfer.totals(), transfer.began_at());
            }
            let (user, system) = cpu_seconds();
            let (state, failure, padded_bytes) = match ended {
                Ok(ending) => (JobState::Done, None, ending.padded_bytes),
                Err(error) if error.kind() == ErrorKind::Cancelled => (JobState::Cancelled, Some(error), 0),
                Err(error) => (JobState::Failed, Some(error), 0),
            };
            if let Some(error) = &failure
                && state == JobState::Failed
            {
                tracing::warn!("job {}: {}", self.id, error.chain());
            }
            inner.outcome = Some(Outcome {
                seconds: self.submitted_at.elapsed().as_secs_f64(),
                failure: failure.map(|error| error.to_failure()),
                first_difference: inner.first_difference,
                bench: std::mem::take(&mut inner.bench),
                reencrypt: inner.rewriting.report.take(),
                padded_bytes,
                cpu_seconds: (user - inner.cpu_before.0, system - inner.cpu_before.1),
            });
            state
        };
        self.set_state(state);
    }

    /// Statistics so far: of workers that have left, and what was added since. The live part is the pipeline's to ask for.
    #[must_use]
    pub fn record(&self) -> (StageRecord, u64) {
        let inner = self.inner();
        (inner.record.as_deref().cloned().unwrap_or_default(), inner.syscalls)
    }

    /// Let go of its histograms; what it did and how it ended stays.
    pub fn forget_record(&self) {
        self.inner().record = None;
    }

    /// Seconds of running time, the same times its workers, and bytes done.
    #[must_use]
    pub fn work_done(&self) -> (f64, f64, u64) {
        let inner = self.inner();
        let seconds = inner.clock.elapsed(Instant::now()).as_secs_f64();
        (seconds, seconds * inner.cores, inner.current().done_bytes)
    }

    /// As the wire shows it.
    #[must_use]
    pub fn info(&self) -> JobInfo {
        let inner = self.inner();
        JobInfo {
            job: self.id,
            uid: self.owner.uid,
            action: self.action,
            source: self.source.clone(),
            sink: self.sink.clone(),
            state: inner.state,
            detached: self.detached,
            submitted_ms: self
                .submitted
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX)),
            progress: inner.progress(),
            outcome: inner.state.is_final().then(|| inner.outcome.clone()).flatten(),
        }
    }
}

impl Inner {
    /// Move to another state; `false` if there is nothing to move. Final states absorb.
    fn enter(&mut self, state: JobState) -> bool {
        if self.state.is_final() || self.state == state {
            return false;
        }
        self.state = state;
        let now = Instant::now();
        match state {
            JobState::Running | JobState::Flushing => self.clock.start(now),
            JobState::Paused | JobState::Queued | JobState::Done | JobState::Failed | JobState::Cancelled => {
                self.clock.stop(now);
            }
        }
        true
    }

    fn is_paused(&self) -> bool {
        match &self.transfer {
            Some(transfer) => transfer.gate.is_paused(),
            None => self.rewriting.paused,
        }
    }

    fn hold(&mut self, paused: bool) {
        self.rewriting.paused = paused;
        if let Some(transfer) = &self.transfer {
            transfer.gate.set_paused(paused);
        }
    }

    fn current(&self) -> Totals {
        self.transfer.as_ref().map_or(self.totals, |transfer| transfer.totals())
    }

    fn progress(&self) -> Progress {
        let now = Instant::now();
        let totals = self.current();
        let total_bytes = self.total_bytes;
        let began_at = self.transfer.as_ref().map_or(self.began_at, |transfer| transfer.began_at());
        let done_bytes = began_at + self.rewriting.done_before + totals.done_bytes;
        let elapsed = self.clock.elapsed(now).as_secs_f64();
        let rate = if self.state.is_final() {
            per_second(totals.done_bytes, elapsed)
        } else {
            self.clock.rate(now, totals.done_bytes)
        };
        let left = total_bytes.map(|total| total.saturating_sub(done_bytes));
        Progress {
            done_bytes,
            resumed_bytes: began_at,
            total_bytes,
            hole_bytes: totals.hole_bytes,
            sparse_bytes: totals.sparse_bytes,
            elapsed_seconds: if self.unlocking { 0.0 } else { elapsed },
            unlocking: self.unlocking && !self.state.is_final(),
            phase: self.rewriting.phase.filter(|_| !self.state.is_final()),
            unlock_seconds: if self.unlocking { elapsed } else { self.unlock.as_secs_f64() },
            bytes_per_second: rate,
            eta_seconds: match (self.state, left) {
                (JobState::Running, Some(left)) if rate > 0.0 => Some(seconds_for(left, rate)),
                _ => None,
            },
            bottleneck: totals.bottleneck(elapsed * self.cores),
            throttle_bytes_per_second: match &self.transfer {
                Some(transfer) => transfer.gate.rate(),
                None => self.rewriting.rate.filter(|_| !self.state.is_final()),
            },
        }
    }
}

/// CPU seconds of this process so far: user, system.
fn cpu_seconds() -> (f64, f64) {
    let usage = process::usage();
    (usage.user.as_secs_f64(), usage.system.as_secs_f64())
}

#[expect(clippy::cast_precision_loss, reason = "a time for people")]
fn seconds_for(bytes: u64, rate: f64) -> f64 {
    bytes as f64 / rate
}

fn cancelled() -> Error {
    Error::new(ErrorKind::Cancelled, "cancelled")
}
