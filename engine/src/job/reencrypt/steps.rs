//! The loop over hotzones: which barrier moves when.
//!
//! The numbers at the code are those of [`crate::volume::reencrypt::ledger`]. While a hotzone is written, flushed and committed, the
//! workers read and hash what follows it, as far as their buffers reach.
//!
//! A hotzone is closed when it has its size, or when nothing more can arrive: all buffers are full, the job is paused or
//! throttled, the data ends. So nothing waits for what cannot come, whatever the buffers; and a pause ends, like a
//! cancellation, at rest: what was begun is finished, committed and durable, and nothing is begun.
//!
//! Without protection (mode `none`) there is one step over all that is left, and nothing is held back but for this: a
//! chunk is overwritten only when all before it have been read, so that a place that cannot be read leaves a clean boundary.
//!
//! Of a volume that clients read and write meanwhile ([`Traffic`]) no more is read ahead than is frozen, and that is one hotzone beside the
//! one that is written, or none while they are given their share. The numbered rules are those of [`crate::pipeline::view`]; pause and rate
//! are kept to before anything is frozen, so that nobody waits for a paused job.
//!
//! No thread, no clock and no descriptor here: the simulation drives this very code on one thread.

use std::time::Duration;

use crate::backend::blocking::Blocking;
use crate::crypto::proof;
use crate::crypto::sha256::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::job::reencrypt::course::Course;
use crate::job::reencrypt::hotzone::{Arrivals, Hotzone};
use crate::pipeline::carrier::{Carrier, Turn};
use crate::pipeline::plan::Admission;
use crate::pipeline::rewrite::News;
use crate::pipeline::view::View;
use crate::volume::reencrypt::ledger::{Ledger, Protection};

/// How long to wait for news before it is taken for granted that none can come. Too short makes short hotzones, too long a slow
/// pause; neither is unsafe.
const PATIENCE: Duration = Duration::from_millis(250);
/// How often a rate limit is looked at before more is frozen.
const RATE_POLL: Duration = Duration::from_millis(10);

/// What is asked of the loop while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// Go on.
    Go,
    /// Stop where it is safe.
    Stop,
}

/// How it ended.
#[derive(Debug)]
pub struct Ended {
    /// Between old and new, durably; in [`State::Crash`] before the step that was not finished.
    pub boundary: u64,
    /// In what state the volume is left.
    pub state: State,
    /// Behind the step that was not finished there is no other.
    pub was_last: bool,
    /// Why it did not go on to the end.
    pub failure: Option<Error>,
    /// Sum of the contributions of all plaintext read, if that was asked for: of all data only when it was finished.
    pub proof: Digest,
}

/// The state a volume is left in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// All data is new, and nothing of the re-encryption is left.
    Finished,
    /// At rest between two steps.
    Clean,
    /// In a step: it is recovered when the re-encryption is resumed.
    Crash,
}

/// How much of the time a re-encryption takes while clients use the volume.
pub trait Pace {
    /// The first bytes of a step are about to be frozen, and nothing else is under way.
    fn begun(&mut self);

    /// A step is committed.
    fn committed(&mut self);

    /// For how long nothing is to be frozen.
    fn rest(&mut self) -> Duration;

    /// May the next step be read while one is written?
    fn may_read_ahead(&mut self) -> bool;
}

/// Clients that use the volume meanwhile. Its re-encryption has begun in their view.
pub struct Traffic<'a> {
    /// Who may touch what. [`View::begin`] was told of this re-encryption.
    pub view: &'a View,
    /// How much of the time is theirs.
    pub pace: &'a mut dyn Pace,
    /// Fails when what they wrote may be lost although it can be read.
    pub sound: &'a dyn Fn() -> Result<()>,
}

/// Let workers claim nothing of a course before it is frozen. To be said before they get it.
pub fn hold_back(course: &Course) {
    let plan = &course.transfer.plan;
    plan.be_urgent();
    plan.open_until(course.from);
}

/// What drives it, and what is driven.
pub struct Steps<'a> {
    /// What the workers carry.
    pub course: &'a Course,
    /// They.
    pub carrier: &'a mut dyn Carrier,
    /// Where progress is kept.
    pub ledger: &'a mut dyn Ledger,
    /// The data device, to be flushed.
    pub data: &'a mut Blocking,
    /// Asked at each turn.
    pub wish: &'a mut dyn FnMut() -> Wish,
    /// Told when the volume is at rest and nothing more arrives: of a paused job, that it is paused.
    pub at_rest: &'a mut dyn FnMut(),
    /// Clients of the volume; [`hold_back`] was called.
    pub traffic: Option<Traffic<'a>>,
}

/// The step there is.
enum Step {
    /// None: at rest.
    Rest,
    /// Its old bytes are on their way to the journal; so many are not there yet.
    Journalling(Hotzone, u64),
    /// The header says that it is being overwritten, and it will be when clients have read what they are reading.
    Begun(Hotzone),
    /// It is being overwritten; of what may be, so many bytes are not there yet.
    Writing(Hotzone, u64),
}

/// Go from the boundary to the end, or to where it has to stop. The transfer has been handed to the carrier; when this returns,
/// the workers have left it.
pub fn run(steps: Steps<'_>) -> Ended {
    let Steps { course, carrier, ledger, data, wish, at_rest, traffic } = steps;
    let protection = ledger.protection();
    let unprotected = matches!(protection, Protection::None) && ledger.hotzone_max().is_none();
    let mut this = Loop {
        course,
        carrier,
        ledger,
        data,
        wish,
        at_rest,
        arrivals: Arrivals::new(course.track, course.transfer.plan.chunk_bytes(), course.from),
        committed: course.from,
        journalled: matches!(protection, Protection::Journal { .. }),
        step: Step::Rest,
        ahead: traffic.map(|traffic| Ahead {
            traffic,
            asked: course.from,
            frozen: course.from,
            durable: course.from,
            wait: PATIENCE,
        }),
        idle: false,
        ended: false,
        proof: proof::NOTHING,
    };
    assert!(
        !unprotected || this.ahead.is_none(),
        "clients do not stand by while all of a volume is rewritten"
    );
    let failure = if unprotected { this.unprotected() } else { this.protected() };
    this.dismiss();
    let state = match &this.step {
        _ if this.committed == course.track.total() => State::Finished,
        Step::Rest | Step::Journalling(..) => State::Clean,
        Step::Begun(_) | Step::Writing(..) => State::Crash,
    };
    if let Some(ahead) = &this.ahead {
        // 7. of the view, or 6.
        ahead.traffic.view.stop(match &this.step {
            Step::Begun(hot) | Step::Writing(hot, _) if state == State::Crash => Some(hot.until),
            _ => None,
        });
    }
    // The workers' failure is the cause; what the loop met is its consequence.
    let failure = course.transfer.take_failure().or(failure.err());
    let was_last = match &this.step {
        Step::Begun(hot) | Step::Writing(hot, _) => hot.until == course.track.total(),
        Step::Rest | Step::Journalling(..) => false,
    };
    let boundary = course.track.boundary_at(this.committed);
    Ended { boundary, state, was_last, failure, proof: this.proof }
}

struct Loop<'a> {
    course: &'a Course,
    carrier: &'a mut dyn Carrier,
    ledger: &'a mut dyn Ledger,
    data: &'a mut Blocking,
    wish: &'a mut dyn FnMut() -> Wish,
    at_rest: &'a mut dyn FnMut(),
    arrivals: Arrivals,
    /// Everything up to this order is committed.
    committed: u64,
    journalled: bool,
    step: Step,
    ahead: Option<Ahead<'a>>,
    /// Nothing has come within [`PATIENCE`].
    idle: bool,
    /// The workers have left.
    ended: bool,
    proof: Digest,
}

/// What is read ahead of a volume that clients use. All in order.
struct Ahead<'a> {
    traffic: Traffic<'a>,
    /// To be frozen up to here.
    asked: u64,
    /// No client writes before this.
    frozen: u64,
    /// What clients wrote before this is durable.
    durable: u64,
    /// How long there is nothing to do but wait for news.
    wait: Duration,
}

impl Loop<'_> {
    fn is_over(&self) -> bool {
        self.committed == self.course.track.total()
    }

    /// Nothing more is to be begun. A read that failed is no reason: what lies before it can still be done.
    fn is_to_stop(&mut self) -> bool {
        (self.wish)() == Wish::Stop || self.course.transfer.gate.is_stopped() || self.is_stuck()
    }

    /// A read has failed, and nothing more arrives that could be done.
    fn is_stuck(&self) -> bool {
        (self.idle || self.ended)
            && self.course.transfer.has_failed()
            && self.arrivals.reach() == self.arrivals.next()
    }

    /// Hotzone after hotzone.
    fn protected(&mut self) -> Result<()> {
        while !self.is_over() {
            self.freeze();
            match std::mem::replace(&mut self.step, Step::Rest) {
                Step::Journalling(hot, 0) => self.begin(hot)?,
                Step::Begun(hot) => self.overwrite(hot)?,
                Step::Writing(hot, 0) => self.commit(hot)?,
                Step::Rest if self.is_to_stop() => return Ok(()),
                Step::Rest => match self.arrivals.close(self.course.hotzone_bytes, self.idle) {
                    Some(hot) => self.protect(hot)?,
                    None => self.wait_at_rest()?,
                },
                step => {
                    self.step = step;
                    self.turn()?;
                }
            }
        }
        Ok(())
    }

    /// Freeze what is to be read next, as far as it is time for that, and let it be read when clients have left it.
    fn freeze(&mut self) {
        let Some(ahead) = &mut self.ahead else { return };
        let (plan, gate) = (&self.course.transfer.plan, &self.course.transfer.gate);
        ahead.wait = PATIENCE;
        if ahead.asked == ahead.frozen {
            let alone = ahead.frozen == self.committed;
            // Beside the hotzone that is written, one.
            let most = if ahead.traffic.pace.may_read_ahead() { 2 * self.course.hotzone_bytes } else { 0 };
            let next = plan.cut(ahead.frozen, self.course.hotzone_bytes);
            if ahead.frozen >= self.course.track.total() || !(alone || next - self.committed <= most) {
                return;
            }
            let wait = match gate.admit() {
                Admission::Open => ahead.traffic.pace.rest(),
                Admission::NotBefore(_) => RATE_POLL,
                Admission::Paused | Admission::Stopped => PATIENCE,
            };
            if !wait.is_zero() {
                if alone {
                    ahead.wait = wait.min(PATIENCE);
                }
                return;
            }
            if alone {
                ahead.traffic.pace.begun();
            }
            ahead.asked = next;
        }
        // 1. of the view.
        if ahead.traffic.view.freeze(ahead.asked) {
            ahead.frozen = ahead.asked;
            plan.open_until(ahead.frozen);
            self.carrier.wake();
        }
    }

    /// 1. All of the hotzone has been read, and hashed. The step before is committed: there is one at a time.
    fn protect(&mut self, hot: Hotzone) -> Result<()> {
        if self.journalled {
            // 2. By the workers.
            self.course.transfer.plan.journal(hot.extent);
            self.carrier.wake();
            let left = hot.extent.len();
            self.step = Step::Journalling(hot, left);
            return Ok(());
        }
        // 2.
        self.ledger.save(hot.extent, &hot.checksums)?;
        self.begin(hot)
    }

    fn begin(&mut self, hot: Hotzone) -> Result<()> {
        let extent = hot.extent;
        // 2. of the view.
        if self.ahead.as_ref().is_some_and(|ahead| ahead.durable < hot.until) {
            self.flush()?;
        }
        // Of a write-back that failed somebody else may have been told, before our file was opened.
        if let Some(ahead) = &self.ahead {
            (ahead.traffic.sound)()?;
        }
        // The header may say so from here on, whether this fails or not.
        self.step = Step::Begun(hot);
        // 3.
        let begun = self.ledger.begin(extent);
        if begun.as_ref().is_err_and(|error| error.kind() == ErrorKind::Conflict) {
            // Nothing of it was written: at rest as before, and clients lose nothing by it.
            self.step = Step::Rest;
        }
        begun
    }

    fn overwrite(&mut self, hot: Hotzone) -> Result<()> {
        // 3. of the view.
        if let Some(ahead) = &self.ahead
            && !ahead.traffic.view.exclude(hot.until)
        {
            self.step = Step::Begun(hot);
            return self.turn();
        }
        let (until, left) = (hot.until, hot.extent.len());
        self.step = Step::Writing(hot, left);
        // 4. By the workers.
        self.course.transfer.plan.write_until(until);
        self.carrier.wake();
        Ok(())
    }

    /// Make durable what has been written: by clients too, before what is frozen now.
    fn flush(&mut self) -> Result<()> {
        let frozen = self.ahead.as_ref().map(|ahead| ahead.frozen);
        self.data.flush()?;
        if let (Some(ahead), Some(frozen)) = (&mut self.ahead, frozen) {
            ahead.durable = frozen;
        }
        Ok(())
    }

    fn commit(&mut self, hot: Hotzone) -> Result<()> {
        let (extent, until) = (hot.extent, hot.until);
        // It is at rest again when the header says so, and not before.
        self.step = Step::Writing(hot, 0);
        // 4. of the view.
        if let Some(ahead) = &self.ahead {
            ahead.traffic.view.renew();
        }
        // 5.
        self.flush()?;
        // 6.
        while let Err(error) = self.ledger.commit(extent) {
            // Who holds the header's lock lets go of it in the end, and until then clients wait; without it what they wait for is lost.
            if self.ahead.is_none() || !self.ledger.is_locked_out() || (self.wish)() == Wish::Stop {
                return Err(error);
            }
            tracing::warn!(
                "a step waits for the lock of its header, and clients for that: {}",
                error.chain()
            );
        }
        self.step = Step::Rest;
        self.committed = until;
        // 5. of the view.
        if let Some(ahead) = &mut self.ahead {
            ahead.traffic.view.pass(until);
            ahead.traffic.pace.committed();
        }
        Ok(())
    }

    /// One step to the end, or to a stop; after a pause another one.
    fn unprotected(&mut self) -> Result<()> {
        let mut stopping = false;
        while !self.is_over() {
            stopping |= self.is_to_stop();
            let before = self.arrivals.next();
            let read = if stopping { None } else { self.arrivals.take_all() };
            match (std::mem::replace(&mut self.step, Step::Rest), read) {
                (step, Some(read)) => self.release(step, before, read.until)?,
                (Step::Rest, None) if stopping => return Ok(()),
                // Paused, or without a thing to do for as long: as good a moment as any to be at rest.
                (Step::Writing(hot, 0), None) if stopping || self.idle || before == hot.until => {
                    let extent = self.course.track.extent(self.committed, before);
                    let extent = extent.expect("something was released");
                    self.commit(Hotzone { extent, until: before, checksums: Vec::new() })?;
                }
                (Step::Rest, None) => self.wait_at_rest()?,
                (step, None) => {
                    self.step = step;
                    self.turn()?;
                }
            }
        }
        Ok(())
    }

    /// The volume is at rest; if nothing has come for a while, say so.
    fn wait_at_rest(&mut self) -> Result<()> {
        if self.idle {
            (self.at_rest)();
        }
        self.turn()
    }

    /// Everything before `until` has been read: it may be overwritten.
    fn release(&mut self, step: Step, before: u64, until: u64) -> Result<()> {
        let (hot, left) = match step {
            Step::Writing(hot, left) => (hot, left),
            Step::Rest | Step::Journalling(..) | Step::Begun(_) => {
                let total = self.course.track.total();
                let extent = self.course.track.extent(self.committed, total).expect("something is left");
                self.step = Step::Writing(Hotzone { extent, until: total, checksums: Vec::new() }, 0);
                // 3.
                self.ledger.begin(extent)?;
                (Hotzone { extent, until: total, checksums: Vec::new() }, 0)
            }
        };
        self.step = Step::Writing(hot, left + (until - before));
        // 4. By the workers.
        self.course.transfer.plan.write_until(until);
        self.carrier.wake();
        Ok(())
    }

    /// Wait for something, and take note of it.
    fn turn(&mut self) -> Result<()> {
        if self.ended {
            // A write failed: what is held is gone, and the step cannot be finished from here.
            return Err(Error::new(ErrorKind::Internal, "the workers have left before the end"));
        }
        let wait = self.ahead.as_ref().map_or(PATIENCE, |ahead| ahead.wait);
        let turn = self.carrier.next(wait);
        self.idle = matches!(turn, Turn::Idle);
        if self.idle && self.course.transfer.gate.is_stopped() {
            // A worker with nothing in flight has no other way to learn of another's failure.
            self.carrier.wake();
        }
        self.ended = matches!(turn, Turn::Ended);
        let Turn::News(news) = turn else { return Ok(()) };
        match (news, &mut self.step) {
            (News::Arrived { extent, checksums, proof }, _) => {
                self.arrivals.add(extent, checksums);
                self.count(proof);
            }
            (News::Quiet, _) => {}
            (News::Journalled { extent }, Step::Journalling(_, left)) => *left -= extent.len(),
            (News::Written { extent, proof }, Step::Writing(_, left)) => {
                *left -= extent.len();
                self.count(proof);
            }
            (News::Journalled { extent } | News::Written { extent, .. }, _) => {
                let what = format!("{extent} moved behind a barrier that is closed");
                return Err(Error::new(ErrorKind::Internal, what));
            }
        }
        Ok(())
    }

    fn count(&mut self, contribution: Option<Digest>) {
        if let Some(contribution) = contribution {
            proof::add(&mut self.proof, &contribution);
        }
    }

    /// Let the workers leave.
    fn dismiss(&mut self) {
        self.course.transfer.gate.stop();
        while !self.ended {
            self.carrier.wake();
            self.ended = matches!(self.carrier.next(PATIENCE), Turn::Ended);
        }
    }
}
