//! The queue over simulated disks: the contract of [`Queue`], in virtual time.
//!
//! Operations on a disk of the world come back in the order of their seeded latencies, which has nothing to do with the order they
//! were pushed in. Files that are no disks of the world (pipes, sockets, real files) go to a real queue, made when the
//! first is attached. Nothing sleeps while something simulated is in flight.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::{Raw, World};
use crate::backend::ports::Ports;
use crate::backend::threads::ThreadsQueue;
use crate::backend::{Done, Op, Port, Position, Queue, QueueFacts, Refused, Wake, What, check_span};
use crate::error::Result;

/// Threads for files that are not simulated.
const THREADS: u32 = 1;

/// What completes within so many virtual nanoseconds of the first completion is collected with it.
const BATCH_NANOSECONDS: u64 = 50_000;

#[derive(Debug)]
struct Attached {
    file: Arc<OwnedFd>,
    home: Home,
    in_flight: u32,
}

#[derive(Debug, Clone, Copy)]
enum Home {
    Disk(usize),
    /// Its port on the real queue.
    Real(Port),
}

/// An operation on a disk.
#[derive(Debug)]
struct Flight {
    op: Op,
    moved: u32,
    /// When it comes back, in virtual nanoseconds.
    due: u64,
    /// Distinguishes what is due at the same time.
    number: u64,
    /// Writes the disk had completed when this was handed over.
    before: u64,
    /// A write that was handed over while there was power: the how-manieth.
    handed: Option<u64>,
}

#[derive(Default)]
struct Alarm {
    woken: bool,
    real: Option<Arc<dyn Wake>>,
}

#[derive(Default)]
struct Bell {
    alarm: Mutex<Alarm>,
    rung: Condvar,
}

impl Bell {
    fn lock(&self) -> MutexGuard<'_, Alarm> {
        self.alarm.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wake for Bell {
    fn wake(&self) {
        let mut alarm = self.lock();
        match &alarm.real {
            Some(real) => real.wake(),
            None => {
                alarm.woken = true;
                self.rung.notify_one();
            }
        }
    }
}

/// See the module.
pub(super) struct SimQueue {
    world: World,
    depth: u32,
    ports: Ports<Attached>,
    pushed: Vec<Flight>,
    flying: Vec<Flight>,
    finished: Vec<(Port, Done)>,
    in_flight: u32,
    numbers: u64,
    kicks: u64,
    bell: Arc<Bell>,
    real: Option<ThreadsQueue>,
}

impl SimQueue {
    pub(super) fn new(world: World, depth: u32) -> Self {
        Self {
            world,
            depth,
            ports: Ports::new(),
            pushed: Vec::new(),
            flying: Vec::new(),
            finished: Vec::new(),
            in_flight: 0,
            numbers: 0,
            kicks: 0,
            bell: Arc::default(),
            real: None,
        }
    }

    /// The real queue, which then does the waiting.
    fn real(&mut self) -> Result<&mut ThreadsQueue> {
        if self.real.is_none() {
            let queue = ThreadsQueue::new(THREADS, self.depth)?;
            let mut alarm = self.bell.lock();
            let waker = queue.waker();
            if std::mem::take(&mut alarm.woken) {
                waker.wake();
            }
            alarm.real = Some(waker);
            drop(alarm);
            self.real = Some(queue);
        }
        Ok(self.real.as_mut().expect("made above"))
    }

    fn finish(&mut self, flight: Flight, result: std::io::Result<u32>) {
        let Op { token, port, what } = flight.op;
        let buf = what.into_buf();
        self.finished.push((port, Done { token, buf, result }));
    }

    /// Let virtual time pass until something comes back, and collect what comes back soon after.
    fn pass_time(&mut self) {
        let mut until = u64::MAX;
        while let Some(index) = self.next_due() {
            if self.flying[index].due > until {
                break;
            }
            let mut flight = self.flying.swap_remove(index);
            let due = flight.due;
            match self.advance(&mut flight) {
                Some(result) => self.finish(flight, result),
                None => self.flying.push(flight),
            }
            if until == u64::MAX && !self.finished.is_empty() {
                until = due + BATCH_NANOSECONDS;
            }
        }
    }

    fn next_due(&self) -> Option<usize> {
        (0..self.flying.len()).min_by_key(|&index| (self.flying[index].due, self.flying[index].number))
    }

    /// One transfer of the raw device for an operation; `None`: the rest takes another.
    fn advance(&mut self, flight: &mut Flight) -> Option<std::io::Result<u32>> {
        let attached = self.ports.get(flight.op.port).expect("attached while in flight");
        let Home::Disk(disk) = attached.home else { unreachable!("only operations on disks fly") };
        let file = &attached.file;
        let mut world = self.world.lock();
        world.clock = world.clock.max(flight.due);
        let moved = flight.moved;
        let mut partial = false;
        let (position, outcome) = match &mut flight.op.what {
            What::Ready { .. } => return Some(Ok(0)),
            // A simulated disk is one without holes, as some devices are.
            What::Discard { .. } => return Some(Err(Errno::OPNOTSUPP.into())),
            What::Flush => {
                let outcome = world.perform(disk, file, flight.handed, Raw::Flush(flight.before));
                return Some(outcome.map(|_| 0).map_err(std::io::Error::from));
            }
            What::Read { position, buf, span } => {
                let offset = match place(*position, moved, file) {
                    Ok(offset) => offset,
                    Err(errno) => return Some(Err(errno.into())),
                };
                let into = &mut buf[(span.start + moved) as usize..span.end as usize];
                (*position, world.perform(disk, file, flight.handed, Raw::Read(offset, into)))
            }
            What::Receive { buf, span } => {
                let offset = match place(Position::Stream, moved, file) {
                    Ok(offset) => offset,
                    Err(errno) => return Some(Err(errno.into())),
                };
                let into = &mut buf[span.start as usize..span.end as usize];
                partial = true;
                (Position::Stream, world.perform(disk, file, flight.handed, Raw::Read(offset, into)))
            }
            What::Write { position, buf, span } => {
                let offset = match place(*position, moved, file) {
                    Ok(offset) => offset,
                    Err(errno) => return Some(Err(errno.into())),
                };
                let bytes = &buf[(span.start + moved) as usize..span.end as usize];
                (*position, world.perform(disk, file, flight.handed, Raw::Write(offset, bytes)))
            }
        };
        let step = match outcome {
            Ok(step) => step,
            Err(errno) => return Some(Err(errno.into())),
        };
        let count = u32::try_from(step.count).expect("no more than was asked for");
        if position == Position::Stream
            && let Err(errno) = rustix::fs::seek(file, SeekFrom::Current(i64::from(count)))
        {
            return Some(Err(errno.into()));
        }
        flight.moved += count;
        if step.end || partial {
            return Some(Ok(flight.moved));
        }
        flight.due = world.due();
        None
    }
}

/// Where the rest of a transfer goes.
fn place(position: Position, moved: u32, file: &OwnedFd) -> Result<u64, Errno> {
    match position {
        Position::At(offset) => Ok(offset + u64::from(moved)),
        Position::Stream => rustix::fs::tell(file),
    }
}

impl Queue for SimQueue {
    fn attach(&mut self, file: Arc<OwnedFd>) -> Result<Port> {
        let port = self.ports.free()?;
        let home = match self.world.find(&file)? {
            Some(disk) => Home::Disk(disk),
            None => Home::Real(self.real()?.attach(Arc::clone(&file))?),
        };
        self.ports.attach(port, Attached { file, home, in_flight: 0 });
        Ok(port)
    }

    fn detach(&mut self, port: Port) {
        let attached = self.ports.detach(port);
        assert_eq!(attached.in_flight, 0, "operations in flight on the port to detach");
        if let (Home::Real(port), Some(real)) = (attached.home, &mut self.real) {
            real.detach(port);
        }
    }

    fn push(&mut self, mut op: Op) -> Result<(), (Refused, Op)> {
        let in_flight = self.in_flight();
        let Some(attached) = self.ports.get_mut(op.port) else {
            return Err((Refused::UnknownPort, op));
        };
        if in_flight >= self.depth {
            return Err((Refused::Full, op));
        }
        let port = op.port;
        match (attached.home, &mut self.real) {
            (Home::Real(there), Some(real)) => {
                op.port = there;
                real.push(op).map_err(|(why, op)| (why, Op { port, ..op }))
            }
            _ => {
                if let What::Read { buf, span, .. }
                | What::Write { buf, span, .. }
                | What::Receive { buf, span } = &op.what
                {
                    check_span(buf, span);
                }
                attached.in_flight += 1;
                self.in_flight += 1;
                let number = self.numbers;
                self.numbers += 1;
                self.pushed.push(Flight { op, moved: 0, due: 0, number, before: 0, handed: None });
                Ok(())
            }
        }
    }

    fn kick(&mut self) -> Result<()> {
        if !self.pushed.is_empty() {
            self.kicks += 1;
            let mut world = self.world.lock();
            for mut flight in self.pushed.drain(..) {
                let attached = self.ports.get(flight.op.port).expect("attached");
                if let Home::Disk(disk) = attached.home {
                    flight.before = world.disks[disk].completed();
                }
                flight.due = world.due();
                if let (Home::Disk(disk), What::Write { position, buf, span }) =
                    (attached.home, &flight.op.what)
                {
                    let bytes = &buf[span.start as usize..span.end as usize];
                    flight.handed = world.hand_over(disk, &attached.file, *position, bytes);
                }
                self.flying.push(flight);
            }
        }
        self.real.as_mut().map_or(Ok(()), ThreadsQueue::kick)
    }

    fn wait(&mut self, deadline: Option<Instant>) -> Result<()> {
        self.kick()?;
        if self.finished.is_empty() && !self.flying.is_empty() {
            self.pass_time();
        }
        let simulated = !self.finished.is_empty();
        if let Some(real) = &mut self.real {
            // With something at hand this only uses up a wake.
            return real.wait(if simulated { Some(Instant::now()) } else { deadline });
        }
        let mut alarm = self.bell.lock();
        while !alarm.woken && !simulated {
            let rung = &self.bell.rung;
            alarm = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                None => rung.wait(alarm).unwrap_or_else(PoisonError::into_inner),
                Some(left) if left.is_zero() => break,
                Some(left) => rung.wait_timeout(alarm, left).unwrap_or_else(PoisonError::into_inner).0,
            };
        }
        alarm.woken = false;
        Ok(())
    }

    fn reap(&mut self, done: &mut Vec<Done>) {
        for (port, one) in self.finished.drain(..) {
            let attached = self.ports.get_mut(port).expect("attached while in flight");
            attached.in_flight -= 1;
            self.in_flight -= 1;
            done.push(one);
        }
        if let Some(real) = &mut self.real {
            real.reap(done);
        }
    }

    fn cancel(&mut self, port: Port) {
        let disk = match self.ports.get(port) {
            Some(Attached { home: Home::Disk(disk), .. }) => *disk,
            Some(Attached { home: Home::Real(there), .. }) => {
                if let Some(real) = &mut self.real {
                    real.cancel(*there);
                }
                return;
            }
            None => return,
        };
        let pushed = self.pushed.extract_if(.., |flight| flight.op.port == port);
        let mut cancelled: Vec<Flight> = pushed.collect();
        let mut world = self.world.lock();
        // Some are beyond recall and finish in their own time.
        let recalled = self.flying.extract_if(.., |flight| flight.op.port == port && world.dice.chance(500));
        let recalled: Vec<Flight> = recalled.collect();
        for flight in &recalled {
            if let (Some(record), Some(handed)) = (&mut world.record, flight.handed) {
                record.recalled(handed);
            }
            if let What::Write { position: Position::At(offset), buf, span } = &flight.op.what {
                let bytes = &buf[(span.start + flight.moved) as usize..span.end as usize];
                world.cancelled(disk, offset + u64::from(flight.moved), bytes);
            }
        }
        drop(world);
        cancelled.extend(recalled);
        for flight in cancelled {
            self.finish(flight, Err(Errno::CANCELED.into()));
        }
    }

    fn in_flight(&self) -> u32 {
        self.in_flight + self.real.as_ref().map_or(0, ThreadsQueue::in_flight)
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::clone(&self.bell) as Arc<dyn Wake>
    }

    fn syscalls(&self) -> u64 {
        self.kicks + self.real.as_ref().map_or(0, ThreadsQueue::syscalls)
    }

    fn facts(&self) -> QueueFacts {
        QueueFacts { name: "simulated", buffers_registered: 0, fallback_reason: None }
    }
}

impl Drop for SimQueue {
    /// What the disks were handed is done, or interrupted if there is no power.
    fn drop(&mut self) {
        while !self.flying.is_empty() {
            self.pass_time();
        }
    }
}
