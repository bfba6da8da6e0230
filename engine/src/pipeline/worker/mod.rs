//! The loop: one worker, one core, one queue, its own buffers.
//!
//! Each turn: take commands, claim chunks while there are free buffers, hand everything to the queue in one call and
//! sleep until something completes, then act on what has completed. A chunk stays on the core that claimed it:
//! read → crypt in place → write. No locks, no allocation and no log on this path; what fails ends up in the
//! transfer's report.
//!
//! What the worker refuses to know: formats, keys, jobs, and why a plan has a barrier.

mod claim;
mod moves;
mod rewrite;

use std::sync::Arc;
use std::time::Instant;

use crossbeam::channel::{Receiver, Sender};
use slab::Slab;

use crate::backend::{Done, Port, Queue};
use crate::error::Error;
use crate::pipeline::holes::HoleCache;
use crate::pipeline::marks::Unfinished;
use crate::pipeline::plan::Claim;
use crate::pipeline::service::{Service, TOKEN_BIT};
use crate::pipeline::slot::{Slot, State};
use crate::pipeline::transfer::{Transfer, Work};
use crate::sys::buffer::Buf;
use crate::telemetry::record::StageRecord;
use rewrite::Own;

/// Buffers of a worker that ordered transfers leave alone. A pipe may stall for ever with what it holds; files never do, so
/// with these they always get on.
const ORDERED_RESERVE: usize = 2;

/// Most chunks an ordered transfer holds on its worker: it moves one at a time, the others are being read or wait.
const ORDERED_SLOTS_MAX: usize = 4;

/// Claims that needed no I/O (holes) before the worker looks at commands and completions again.
const CLAIMS_PER_TURN: u32 = 4096;

/// From the control side to a worker.
pub enum Command {
    /// Take part in a transfer, which may bring buffers of its own.
    Start(Arc<Transfer>, Vec<Buf>),
    /// Send a copy of the stage record of a transfer, and its system calls, if it is active here.
    Snapshot(Arc<Transfer>, Sender<(StageRecord, u64)>),
    /// Serve foreign requests too.
    Install(Box<dyn Service>),
    /// Leave when idle.
    Exit,
}

/// One worker's state. Lives on its own thread.
pub struct Worker {
    index: usize,
    queue: Box<dyn Queue>,
    free: Vec<Buf>,
    buffers: usize,
    /// Operations the queue holds beyond one per buffer: for transfers with buffers of their own.
    spare: u32,
    /// Of these, in flight.
    own_reads: u32,
    own_writes: u32,
    /// Buffers that ordered transfers hold.
    ordered_buffers: usize,
    slots: Slab<Slot>,
    active: Vec<Option<Active>>,
    /// Whose turn it is to claim first.
    turn: usize,
    done: Vec<Done>,
    commands: Receiver<Command>,
    service: Option<Box<dyn Service>>,
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
    /// What a transfer that rewrites a device has of its own.
    own: Option<Box<Own>>,
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
    /// A worker with its queue and buffers. The queue must hold one operation per buffer, and `spare` more: two at least
    /// for transfers that bring their own buffers.
    #[must_use]
    pub fn new(
        index: usize,
        queue: Box<dyn Queue>,
        free: Vec<Buf>,
        spare: u32,
        commands: Receiver<Command>,
    ) -> Self {
        let buffers = free.len();
        Self {
            index,
            queue,
            free,
            buffers,
            spare,
            own_reads: 0,
            own_writes: 0,
            ordered_buffers: 0,
            slots: Slab::with_capacity(buffers),
            active: Vec::new(),
            turn: 0,
            done: Vec::with_capacity(2 * buffers),
            commands,
            service: None,
            exiting: false,
        }
    }

    /// Run until told to exit and idle.
    ///
    /// # Errors
    /// The queue broke: nothing in flight can be accounted for, so the process cannot go on.
    pub fn run(mut self) -> Result<(), Error> {
        while let Some(deadline) = self.start_turn()? {
            self.end_turn(deadline)?;
        }
        Ok(())
    }

    /// Operations in flight.
    #[cfg(feature = "sim")]
    pub(super) fn in_flight(&self) -> u32 {
        self.queue.in_flight()
    }

    /// The first half of a turn: commands, claims, chunks whose barriers have moved. `None` when it is time to leave, else when
    /// to look again at the latest.
    pub(super) fn start_turn(&mut self) -> Result<Option<Option<Instant>>, Error> {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Start(transfer, own) => self.start(transfer, own),
                Command::Snapshot(transfer, reply) => self.snapshot(&transfer, &reply),
                Command::Install(service) => self.service = Some(service),
                Command::Exit => {
                    self.exiting = true;
                    if let Some(service) = &mut self.service {
                        service.leave(&mut *self.queue);
                    }
                }
            }
        }
        // Foreign requests go first; bulk fills the gaps.
        let service = self.service.as_mut();
        let appointed = service.and_then(|service| service.turn(&mut *self.queue));
        let deadline = self.claim_all().into_iter().chain(appointed).min();
        self.pass_all()?;
        self.retire();
        let served = self.service.as_ref().is_none_or(|service| service.is_idle());
        if self.exiting && served && self.active.iter().all(Option::is_none) {
            return Ok(None);
        }
        Ok(Some(deadline))
    }

    /// The second half: wait for something to come back, and act on it.
    pub(super) fn end_turn(&mut self, deadline: Option<Instant>) -> Result<(), Error> {
        self.queue.wait(deadline)?;
        // First everything is collected, then acted upon: an action may push, never reap.
        let mut done = std::mem::take(&mut self.done);
        self.queue.reap(&mut done);
        let reaped = Instant::now();
        for done in done.drain(..) {
            if done.token & TOKEN_BIT != 0 {
                let service = self.service.as_mut().expect("only a service sets this bit");
                service.complete(done, &mut *self.queue);
                continue;
            }
            self.complete(done, reaped);
            // One system call hands over what this chunk started: the device works while the next chunk is crypted.
            self.queue.kick()?;
        }
        self.done = done;
        Ok(())
    }

    fn start(&mut self, transfer: Arc<Transfer>, own: Vec<Buf>) {
        let (source, sink, journal) = match self.attach(&transfer) {
            Ok(ports) => ports,
            Err(error) => {
                transfer.fail(error);
                let latch = transfer.latch();
                drop((transfer, own));
                latch.leave();
                return;
            }
        };
        let own = (transfer.work == Work::Recrypt).then(|| Box::new(Own::new(own, journal)));
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
            own,
        };
        match self.active.iter_mut().find(|place| place.is_none()) {
            Some(place) => *place = Some(active),
            None => self.active.push(Some(active)),
        }
    }

    /// The ports of source, sink, and the journal if there is one: all or none.
    fn attach(&mut self, transfer: &Transfer) -> Result<(Port, Port, Option<Port>), Error> {
        let journal = match transfer.work {
            Work::Recrypt => transfer.rewrite().journal.as_ref().map(|journal| &journal.file),
            _ => None,
        };
        let mut ports = Vec::with_capacity(3);
        for file in [&transfer.source.file, &transfer.sink.file].into_iter().chain(journal) {
            match self.queue.attach(file.clone()) {
                Ok(port) => ports.push(port),
                Err(error) => {
                    for port in ports {
                        self.queue.detach(port);
                    }
                    return Err(error);
                }
            }
        }
        Ok((ports[0], ports[1], ports.get(2).copied()))
    }

    fn snapshot(&self, transfer: &Arc<Transfer>, reply: &Sender<(StageRecord, u64)>) {
        let active = self.active.iter().flatten().find(|active| Arc::ptr_eq(&active.transfer, transfer));
        if let Some(active) = active {
            // The asker may have given up waiting.
            let _ = reply.send((active.record.clone(), self.queue.syscalls() - active.syscalls_before));
        }
    }

    fn release(&mut self, key: usize) {
        let mut slot = self.slots.remove(key);
        let buffers = usize::from(slot.buf.is_some()) + usize::from(slot.other.is_some());
        let active = self.active[slot.active].as_mut().expect("a slot's transfer is active");
        active.slots -= 1;
        if let Some(own) = &mut active.own {
            own.give_back(slot.buf.take());
            return;
        }
        self.free.extend(slot.buf.take());
        self.free.extend(slot.other.take());
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
                // What rewrites a device is cut off nowhere: its files do not stall, and a write begun is better ended.
                if !active.cancelled && active.own.is_none() {
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
                if let Some(journal) = active.own.as_ref().and_then(|own| own.journal) {
                    self.queue.detach(journal);
                }
                active.transfer.keep(&active.record, self.queue.syscalls() - active.syscalls_before);
                // The end is told when nothing here holds the transfer's files, bytes and key any more.
                let latch = active.transfer.latch();
                drop(active);
                latch.leave();
            }
        }
    }

    /// Chunks waiting for their turn or a barrier have nothing in flight that would bring them back.
    fn release_waiting(&mut self, at: usize) {
        if let Some(own) = self.active[at].as_mut().and_then(|active| active.own.as_mut()) {
            own.forget_waiting();
        }
        let waiting =
            |slot: &Slot| slot.active == at && matches!(slot.state, State::Turn { .. } | State::Held(_));
        while let Some(key) = self.slots.iter().find(|(_, slot)| waiting(slot)).map(|(key, _)| key) {
            self.release(key);
        }
    }
}
