//! The loop: one worker, one core, one queue, its own buffers.
//!
//! Each turn: take commands, claim chunks while there are free buffers, hand everything to the queue in one call and
//! sleep until something completes, then act on what has completed. A chunk stays on the core that claimed it:
//! read → crypt in place → write. No locks, no allocation and no log on this path; what fails ends up in the
//! transfer's report.
//!
//! What the worker refuses to know: formats, keys, jobs, and why a plan has a barrier.

use std::sync::Arc;
use std::time::Instant;

use crossbeam::channel::{Receiver, Sender};
use proto::Stage;
use slab::Slab;

use crate::backend::{Done, Op, Port, Position, Queue, Refused, What};
use crate::error::{Error, ErrorKind};
use crate::pipeline::crypt::transform;
use crate::pipeline::holes::HoleCache;
use crate::pipeline::marks::Unfinished;
use crate::pipeline::plan::{Admission, Claim};
use crate::pipeline::slot::{Fill, Side, Slot, State};
use crate::pipeline::transfer::{End, Transfer};
use crate::sys::buffer::Buf;
use crate::telemetry::record::StageRecord;
use crate::units::Extent;

/// Buffers of a worker that ordered transfers leave alone. A pipe may stall for ever with what it holds; files never do, so
/// with these they always get on.
const ORDERED_RESERVE: usize = 2;

/// Most chunks an ordered transfer holds on its worker: it moves one at a time, the others are being read or wait.
const ORDERED_SLOTS_MAX: usize = 4;

/// Claims that needed no I/O (holes) before the worker looks at commands and completions again.
const CLAIMS_PER_TURN: u32 = 4096;

/// From the control side to a worker.
pub enum Command {
    /// Take part in a transfer.
    Start(Arc<Transfer>),
    /// Send a copy of the stage record of a transfer, and its system calls, if it is active here.
    Snapshot(Arc<Transfer>, Sender<(StageRecord, u64)>),
    /// Leave when idle.
    Exit,
}

/// One worker's state. Lives on its own thread.
pub struct Worker {
    index: usize,
    queue: Box<dyn Queue>,
    free: Vec<Buf>,
    buffers: usize,
    /// Buffers that ordered transfers hold.
    ordered_buffers: usize,
    slots: Slab<Slot>,
    active: Vec<Option<Active>>,
    /// Whose turn it is to claim first.
    turn: usize,
    done: Vec<Done>,
    commands: Receiver<Command>,
    exiting: bool,
}

/// A transfer as this worker carries it.
struct Active {
    transfer: Arc<Transfer>,
    source: Port,
    sink: Port,
    record: StageRecord,
    holes: HoleCache,
    /// For the transfer's marks, if it keeps them.
    unfinished: Unfinished,
    slots: u32,
    syscalls_before: u64,
    /// The plan has nothing more.
    exhausted: bool,
    /// The gate was stopped, and what was in flight on streams was cancelled.
    cancelled: bool,
    /// A read is in flight on an ordered source / an ordered verified side.
    reading: [bool; 2],
    /// A write is in flight on an ordered sink.
    writing: bool,
    /// Start of the chunk whose turn it is on an ordered sink.
    sink_turn: u64,
}

impl Active {
    /// Claim a chunk, and keep account of it if anybody asks for that.
    fn claim_chunk(&mut self, worker: usize) -> Claim {
        let Some(marks) = self.transfer.marks() else { return self.transfer.plan.claim() };
        self.unfinished.before_claim(marks, worker, &self.transfer.plan);
        let claim = self.transfer.plan.claim();
        let start = if let Claim::Extent(extent) = &claim { Some(extent.start()) } else { None };
        self.unfinished.claimed(marks, worker, start);
        claim
    }

    fn mark_finished(&mut self, worker: usize, start: u64) {
        if let Some(marks) = self.transfer.marks() {
            self.unfinished.finished(marks, worker, start);
        }
    }
}

/// What one attempt to claim came to.
enum Attempt {
    /// A chunk is under way (or was a hole and is done).
    Started,
    /// Not now.
    Idle,
    /// Not before this moment.
    Later(Instant),
}

impl Worker {
    /// A worker with its queue and buffers. The queue must hold two operations per buffer.
    #[must_use]
    pub fn new(index: usize, queue: Box<dyn Queue>, free: Vec<Buf>, commands: Receiver<Command>) -> Self {
        let buffers = free.len();
        Self {
            index,
            queue,
            free,
            buffers,
            ordered_buffers: 0,
            slots: Slab::with_capacity(buffers),
            active: Vec::new(),
            turn: 0,
            done: Vec::with_capacity(2 * buffers),
            commands,
            exiting: false,
        }
    }

    /// Run until told to exit and idle.
    ///
    /// # Errors
    /// The queue broke: nothing in flight can be accounted for, so the process cannot go on.
    pub fn run(mut self) -> Result<(), Error> {
        while self.turn()? {}
        Ok(())
    }

    /// One turn of the loop. `false` when it is time to leave.
    fn turn(&mut self) -> Result<bool, Error> {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Start(transfer) => self.start(transfer),
                Command::Snapshot(transfer, reply) => self.snapshot(&transfer, &reply),
                Command::Exit => self.exiting = true,
            }
        }
        let deadline = self.claim_all();
        self.retire();
        if self.exiting && self.active.iter().all(Option::is_none) {
            return Ok(false);
        }
        self.queue.wait(deadline)?;
        // First everything is collected, then acted upon: an action may push, never reap.
        let mut done = std::mem::take(&mut self.done);
        self.queue.reap(&mut done);
        let reaped = Instant::now();
        for done in done.drain(..) {
            self.complete(done, reaped);
            // One system call hands over what this chunk started: the device works while the next chunk is crypted.
            self.queue.kick()?;
        }
        self.done = done;
        Ok(true)
    }

    fn start(&mut self, transfer: Arc<Transfer>) {
        let ports = self.attach(&transfer);
        let (source, sink) = match ports {
            Ok(ports) => ports,
            Err(error) => {
                transfer.fail(error);
                let latch = transfer.latch();
                drop(transfer);
                latch.leave();
                return;
            }
        };
        let active = Active {
            transfer,
            source,
            sink,
            record: StageRecord::default(),
            holes: HoleCache::default(),
            unfinished: Unfinished::with_capacity(self.buffers),
            slots: 0,
            syscalls_before: self.queue.syscalls(),
            exhausted: false,
            cancelled: false,
            reading: [false; 2],
            writing: false,
            sink_turn: 0,
        };
        match self.active.iter_mut().find(|place| place.is_none()) {
            Some(place) => *place = Some(active),
            None => self.active.push(Some(active)),
        }
    }

    fn attach(&mut self, transfer: &Transfer) -> Result<(Port, Port), Error> {
        let source = self.queue.attach(transfer.source.file.clone())?;
        match self.queue.attach(transfer.sink.file.clone()) {
            Ok(sink) => Ok((source, sink)),
            Err(error) => {
                self.queue.detach(source);
                Err(error)
            }
        }
    }

    fn snapshot(&self, transfer: &Arc<Transfer>, reply: &Sender<(StageRecord, u64)>) {
        let active = self.active.iter().flatten().find(|active| Arc::ptr_eq(&active.transfer, transfer));
        if let Some(active) = active {
            // The asker may have given up waiting.
            let _ = reply.send((active.record.clone(), self.queue.syscalls() - active.syscalls_before));
        }
    }

    /// Let transfers claim in turn, one chunk each, until no buffer is free or nobody wants one. Returns when to look
    /// again at the latest.
    fn claim_all(&mut self) -> Option<Instant> {
        let mut deadline: Option<Instant> = None;
        let count = self.active.len();
        // Paused ones that hold nothing need no share.
        let wants = |active: &&Active| active.slots > 0 || active.transfer.gate.admit() != Admission::Paused;
        let running = self.active.iter().flatten().filter(wants).count().max(1);
        // A quarter of the buffers stays for newcomers, which need not wait for chunks in flight.
        let share = (self.buffers / running).clamp(1, (self.buffers * 3 / 4).max(1));
        let mut idle = 0;
        let mut claims = 0;
        while idle < count {
            let at = self.turn % count;
            self.turn = (at + 1) % count;
            match self.claim(at, share) {
                Attempt::Started => {
                    idle = 0;
                    claims += 1;
                    if claims >= CLAIMS_PER_TURN {
                        return Some(Instant::now());
                    }
                }
                Attempt::Idle => idle += 1,
                Attempt::Later(when) => {
                    idle += 1;
                    deadline = Some(deadline.map_or(when, |earlier| earlier.min(when)));
                }
            }
        }
        deadline
    }

    fn claim(&mut self, at: usize, share: usize) -> Attempt {
        let Some(active) = &mut self.active[at] else { return Attempt::Idle };
        let transfer = active.transfer.clone();
        if active.exhausted || transfer.plan.is_exhausted() {
            // Also without a free buffer: others may hold them for ever, and this transfer can leave.
            active.exhausted = true;
            return Attempt::Idle;
        }
        let verify = transfer.is_verify();
        let needed = if verify { 2 } else { 1 };
        let ordered = transfer.is_ordered();
        let slots_max =
            if ordered { (self.buffers / 8).clamp(1, ORDERED_SLOTS_MAX) } else { (share / needed).max(1) };
        let ordered_max = self.buffers - ORDERED_RESERVE.min(self.buffers - needed);
        if self.free.len() < needed
            || (ordered && self.ordered_buffers + needed > ordered_max)
            || active.slots >= transfer.depth
            || active.slots as usize >= slots_max
            || (transfer.source.stream && active.reading[Side::Source as usize])
            || (verify && transfer.sink.stream && active.reading[Side::Sink as usize])
        {
            return Attempt::Idle;
        }
        match transfer.gate.admit() {
            Admission::Open => {}
            Admission::NotBefore(when) => return Attempt::Later(when),
            Admission::Paused | Admission::Stopped => return Attempt::Idle,
        }
        let extent = match active.claim_chunk(self.index) {
            Claim::Extent(extent) => extent,
            Claim::Blocked => return Attempt::Idle,
            Claim::Exhausted => {
                active.exhausted = true;
                return Attempt::Idle;
            }
        };
        transfer.gate.charge(extent.len());
        let fill = active.holes.fill_of(&transfer, extent);
        let counters = &transfer.counters[self.index];
        if fill != Fill::Read {
            counters.add_hole(extent.len());
        }
        if fill == Fill::Kept && (verify || transfer.rules.skip_zeros) {
            // Zero plaintext that a hole holds already (or that is compared with one): nothing moves.
            counters.add_sparse(if verify { 0 } else { extent.len() });
            counters.add_done(extent.len());
            active.mark_finished(self.index, extent.start());
            return Attempt::Started;
        }
        active.slots += 1;
        if ordered {
            self.ordered_buffers += needed;
        }
        let key = self.slots.insert(Slot {
            active: at,
            extent,
            source_len: u32::try_from(extent.len()).expect("a chunk fits a buffer"),
            sink_len: 0,
            doomed: false,
            fill,
            state: State::Reading { source: false, sink: !verify },
            since: Instant::now(),
            buf: self.free.pop(),
            other: if verify { self.free.pop() } else { None },
        });
        if verify {
            self.read(key, Side::Sink);
        }
        if fill == Fill::Read {
            self.read(key, Side::Source);
        } else {
            let slot = &mut self.slots[key];
            let len = slot.source_len as usize;
            slot.buf.as_mut().expect("nothing is in flight")[..len].fill(0);
            self.arrived(key, Side::Source, slot_len(extent), Instant::now());
        }
        Attempt::Started
    }

    /// Start one side's read.
    fn read(&mut self, key: usize, side: Side) {
        let slot = &mut self.slots[key];
        let active = self.active[slot.active].as_mut().expect("a slot's transfer is active");
        let transfer = active.transfer.clone();
        let (end, port, buf, wanted) = match side {
            Side::Source => (&transfer.source, active.source, slot.take_buf(), slot.source_len),
            Side::Sink => {
                let unit = transfer.segments().at(slot.extent.start()).unit_bytes;
                let whole = slot.source_len.next_multiple_of(unit);
                (&transfer.sink, active.sink, slot.take_other(), whole)
            }
        };
        let (position, span) = if end.stream {
            active.reading[side as usize] = true;
            (Position::Stream, 0..wanted)
        } else {
            // Direct reads ask for whole blocks; at the end of a file fewer bytes come back.
            (Position::At(transfer.place(side, slot.extent.start())), 0..wanted.next_multiple_of(end.align))
        };
        self.push(key, side, port, What::Read { position, buf, span });
    }

    fn push(&mut self, key: usize, side: Side, port: Port, what: What) {
        let token = (key as u64) << 1 | u64::from(side == Side::Sink);
        if let Err((refused, _)) = self.queue.push(Op { token, port, what }) {
            // The queue holds two operations per buffer, and a slot has at most one per buffer in flight.
            match refused {
                Refused::Full => panic!("the queue is smaller than the worker's slots"),
                Refused::UnknownPort => panic!("an active transfer's port is not attached"),
            }
        }
    }

    fn complete(&mut self, done: Done, reaped: Instant) {
        let key = usize::try_from(done.token >> 1).expect("a slab key");
        let side = if done.token & 1 == 1 { Side::Sink } else { Side::Source };
        let slot = &mut self.slots[key];
        let active = self.active[slot.active].as_mut().expect("a slot's transfer is active");
        let transfer = active.transfer.clone();
        let counters = &transfer.counters[self.index];
        match &slot.state {
            State::Reading { .. } => {
                active.reading[side as usize] = false;
                let end = match side {
                    Side::Source => {
                        slot.buf = done.buf;
                        &transfer.source
                    }
                    Side::Sink => {
                        slot.other = done.buf;
                        &transfer.sink
                    }
                };
                let bytes = done.result.unwrap_or_else(|cause| {
                    transfer.fail(Error::io("read failed", cause).at(place(
                        &transfer,
                        side,
                        end,
                        slot.extent,
                    )));
                    slot.doomed = true;
                    0
                });
                let lap = reaped.saturating_duration_since(slot.since);
                active.record.record(counters, Stage::Read, lap, bytes.into());
                self.arrived(key, side, bytes, reaped);
            }
            State::Writing { span, .. } => {
                slot.buf = done.buf;
                active.writing = false;
                match done.result {
                    Err(cause) => {
                        transfer.fail(write_error(&transfer, cause, slot.extent));
                        self.release(key);
                    }
                    Ok(bytes) => {
                        assert_eq!(bytes, span.end - span.start, "a write is whole when it comes back");
                        active.record.record(counters, Stage::Write, slot.lap(reaped), bytes.into());
                        self.write(key);
                    }
                }
            }
            other => panic!("a completion for a slot in state {other:?}"),
        }
    }

    /// One side of a chunk is here, `bytes` long; when both are, it is crypted.
    fn arrived(&mut self, key: usize, side: Side, bytes: u32, when: Instant) {
        let slot = &mut self.slots[key];
        let active = self.active[slot.active].as_mut().expect("a slot's transfer is active");
        let transfer = &active.transfer;
        match side {
            Side::Source if bytes < slot.source_len && !slot.doomed => {
                let ends_at = slot.extent.start() + u64::from(bytes);
                if transfer.source.stream {
                    transfer.plan.end_at(ends_at);
                    active.exhausted = true;
                    slot.source_len = bytes;
                } else {
                    let was = transfer.plan.end().unwrap_or(u64::MAX);
                    let what =
                        format!("source shrank while it was read: it ends at byte {ends_at}, it had {was}");
                    transfer.fail(Error::new(ErrorKind::Io, what).at(&transfer.source.name));
                    slot.doomed = true;
                }
            }
            Side::Source => {}
            Side::Sink => slot.sink_len = bytes,
        }
        slot.arrived(side);
        if slot.state != State::Ready {
            return;
        }
        let verify_rest = transfer.is_verify() && slot.sink_len > 0;
        if slot.doomed || transfer.gate.is_stopped() || (slot.source_len == 0 && !verify_rest) {
            self.release(key);
        } else {
            slot.since = when;
            self.crypt(key);
        }
    }

    /// Encrypt, decrypt or compare in place, and go on to the write.
    fn crypt(&mut self, key: usize) {
        let slot = &mut self.slots[key];
        let active = self.active[slot.active].as_mut().expect("a slot's transfer is active");
        let transfer = active.transfer.clone();
        let counters = &transfer.counters[self.index];
        active.record.record(counters, Stage::Queue, slot.lap(Instant::now()), slot.source_len.into());
        let runs = match transform(&transfer, counters, &mut active.holes, slot) {
            Ok(runs) => runs,
            Err(error) => {
                transfer.fail(error);
                self.release(key);
                return;
            }
        };
        let lap = slot.lap(Instant::now());
        active.record.record(counters, Stage::Crypt, lap, slot.source_len.into());
        match runs {
            None => self.finish(key),
            Some(runs) if transfer.sink.stream => {
                if active.sink_turn == slot.extent.start() && !active.writing {
                    slot.state = State::Writing { span: 0..0, rest: runs };
                    self.write(key);
                } else {
                    slot.state = State::Turn { runs };
                }
            }
            Some(runs) => {
                slot.state = State::Writing { span: 0..0, rest: runs };
                self.write(key);
            }
        }
    }

    /// Write the next run, or be finished.
    fn write(&mut self, key: usize) {
        let slot = &mut self.slots[key];
        let active = self.active[slot.active].as_mut().expect("a slot's transfer is active");
        let State::Writing { span, rest } = &mut slot.state else {
            panic!("a slot in state {:?} has nothing to write", slot.state);
        };
        let Some(next) = rest.pop() else {
            self.finish(key);
            return;
        };
        if active.transfer.gate.is_stopped() {
            self.release(key);
            return;
        }
        *span = next.clone();
        let position = if active.transfer.sink.stream {
            active.writing = true;
            Position::Stream
        } else {
            let start = active.transfer.place(Side::Sink, slot.extent.start());
            Position::At(start + u64::from(next.start))
        };
        let buf = slot.take_buf();
        let port = active.sink;
        self.push(key, Side::Sink, port, What::Write { position, buf, span: next });
    }

    /// The chunk is where it belongs.
    fn finish(&mut self, key: usize) {
        let slot = &self.slots[key];
        let at = slot.active;
        let active = self.active[at].as_mut().expect("a slot's transfer is active");
        active.transfer.counters[self.index].add_done(slot.source_len.into());
        active.sink_turn = slot.extent.end();
        active.mark_finished(self.index, slot.extent.start());
        let ordered = active.transfer.sink.stream;
        self.release(key);
        if ordered {
            self.next_turn(at);
        }
    }

    /// An ordered sink is free: the chunk whose turn it is may be waiting.
    fn next_turn(&mut self, at: usize) {
        let active = self.active[at].as_mut().expect("a slot's transfer is active");
        let turn = active.sink_turn;
        let waiting = self.slots.iter_mut().find_map(|(key, slot)| match slot.state {
            State::Turn { runs } if slot.active == at && slot.extent.start() == turn => {
                Some((key, runs, slot))
            }
            _ => None,
        });
        let Some((key, runs, slot)) = waiting else { return };
        let counters = &active.transfer.counters[self.index];
        active.record.record(counters, Stage::Queue, slot.lap(Instant::now()), slot.source_len.into());
        slot.state = State::Writing { span: 0..0, rest: runs };
        self.write(key);
    }

    fn release(&mut self, key: usize) {
        let mut slot = self.slots.remove(key);
        let buffers = usize::from(slot.buf.is_some()) + usize::from(slot.other.is_some());
        self.free.extend(slot.buf.take());
        self.free.extend(slot.other.take());
        let active = self.active[slot.active].as_mut().expect("a slot's transfer is active");
        active.slots -= 1;
        if active.transfer.is_ordered() {
            self.ordered_buffers -= buffers;
        }
    }

    /// Let go of transfers that have nothing left here.
    fn retire(&mut self) {
        for at in 0..self.active.len() {
            let Some(active) = &mut self.active[at] else { continue };
            let stopped = active.transfer.gate.is_stopped();
            if stopped {
                if !active.cancelled {
                    active.cancelled = true;
                    // A transfer on a stalled pipe would otherwise never come back.
                    self.queue.cancel(active.source);
                    self.queue.cancel(active.sink);
                }
                self.release_waiting(at);
            }
            let Some(active) = &self.active[at] else { continue };
            if active.slots == 0 && (stopped || active.exhausted) {
                let active = self.active[at].take().expect("just seen");
                self.queue.detach(active.source);
                self.queue.detach(active.sink);
                active.transfer.keep(&active.record, self.queue.syscalls() - active.syscalls_before);
                // The end is told when nothing here holds the transfer's files and key any more.
                let latch = active.transfer.latch();
                drop(active);
                latch.leave();
            }
        }
    }

    /// Chunks waiting for their turn have nothing in flight that would bring them back.
    fn release_waiting(&mut self, at: usize) {
        let waiting = |slot: &Slot| slot.active == at && matches!(slot.state, State::Turn { .. });
        while let Some(key) = self.slots.iter().find(|(_, slot)| waiting(slot)).map(|(key, _)| key) {
            self.release(key);
        }
    }
}

fn slot_len(extent: Extent) -> u32 {
    u32::try_from(extent.len()).expect("a chunk fits a buffer")
}

/// A chunk by the place it has on one side.
fn place(transfer: &Transfer, side: Side, end: &End, extent: Extent) -> String {
    let start = transfer.place(side, extent.start());
    match Extent::new(start, start + extent.len()) {
        Some(extent) => format!("{} {extent}", end.name),
        None => end.name.clone(),
    }
}

fn write_error(transfer: &Transfer, cause: std::io::Error, extent: Extent) -> Error {
    let sink = &transfer.sink;
    match cause.raw_os_error() {
        Some(libc::EPIPE) => {
            Error::new(ErrorKind::Io, "write failed: the reader has closed the pipe").at(&sink.name)
        }
        _ => Error::io("write failed", cause).at(place(transfer, Side::Sink, sink, extent)),
    }
}
