//! The fallback queue, for hosts that forbid io_uring: a few threads with `preadv2` and `pwritev2`, and one that waits.
//!
//! ```text
//! owner ── kick ──▶ ready tasks ──▶ pool threads ── finished ──▶ owner (wait, reap)
//!                        ▲                │ would block
//!                        └──── poller ◀───┘
//! ```
//! A pool thread never blocks on a pipe: it transfers with `RWF_NOWAIT` and hands what would block to the poller, so blocked streams
//! take no thread from other files, and cancelling one means telling the poller. The file's description may be
//! shared with other programs, so `O_NONBLOCK` is never set. Where `RWF_NOWAIT` is unknown, readiness is asked for first and
//! little enough is moved that a ready stream cannot block.
//!
//! Transfers on files and block devices cannot be interrupted; cancelling lets the present system call finish.
//!
//! Threads inherit the affinity of the thread that makes the queue: a pinned worker and its pool share one core.

use std::collections::VecDeque;
use std::io::{Error as IoError, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::fs::{FallocateFlags, FileType};
use rustix::io::{Errno, ReadWriteFlags};

use super::ports::Ports;
use super::{Done, Op, Port, Position, Queue, QueueFacts, Refused, Wake, What};
use crate::error::{Error, ErrorKind, Result};

/// `preadv2` and `pwritev2` take this for "the current position".
const CURRENT_POSITION: u64 = u64::MAX;

/// `PIPE_BUF`: a pipe that polls as writable takes this much without blocking (pipe(7)).
const PIPE_BUF: usize = 4096;

#[derive(Debug)]
struct Task {
    op: Op,
    file: Arc<OwnedFd>,
    /// A transfer may block for ever (pipe, socket, terminal).
    may_block: bool,
    moved: u32,
    cancelled: Arc<AtomicBool>,
}

enum Step {
    Finished(std::io::Result<u32>),
    /// Not before the file is readable, else writable.
    Wait,
}

#[derive(Debug, Default)]
struct Ready {
    tasks: VecDeque<Task>,
    stopping: bool,
}

#[derive(Debug, Default)]
struct Waiting {
    tasks: Vec<Task>,
    stopping: bool,
}

#[derive(Debug, Default)]
struct Finished {
    done: Vec<(Port, Done)>,
    woken: bool,
}

#[derive(Debug)]
struct Shared {
    ready: Mutex<Ready>,
    ready_changed: Condvar,
    /// Handed to the poller, not yet seen by it.
    waiting: Mutex<Waiting>,
    waiting_changed: OwnedFd,
    finished: Mutex<Finished>,
    finished_changed: Condvar,
    syscalls: AtomicU64,
}

/// A panic elsewhere leaves these simple queues whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn finish(&self, task: Task, result: std::io::Result<u32>) {
        let Op { token, port, what } = task.op;
        let buf = what.into_buf();
        // The descriptor first: whoever sees the completion may count on it being let go.
        drop(task.file);
        lock(&self.finished).done.push((port, Done { token, buf, result }));
        self.finished_changed.notify_one();
    }

    fn tell_poller(&self) {
        self.count();
        // Full at 2^64 - 1, and then it is readable, which is all that matters.
        let _ = rustix::io::write(&self.waiting_changed, &1u64.to_ne_bytes());
    }

    fn count(&self) {
        self.syscalls.fetch_add(1, Ordering::Relaxed);
    }

    fn pool_thread(&self) {
        loop {
            let mut ready = lock(&self.ready);
            let mut task = loop {
                if let Some(task) = ready.tasks.pop_front() {
                    break task;
                }
                if ready.stopping {
                    return;
                }
                ready = self.ready_changed.wait(ready).unwrap_or_else(PoisonError::into_inner);
            };
            drop(ready);
            match self.step(&mut task) {
                Step::Finished(result) => self.finish(task, result),
                Step::Wait => {
                    lock(&self.waiting).tasks.push(task);
                    self.tell_poller();
                }
            }
        }
    }

    /// Take a task as far as it goes without blocking on a stream.
    fn step(&self, task: &mut Task) -> Step {
        loop {
            if task.cancelled.load(Ordering::Acquire) {
                return Step::Finished(Err(Errno::CANCELED.into()));
            }
            let file = task.file.as_fd();
            let mut partial = false;
            let (write, remaining, result) = match &mut task.op.what {
                What::Flush => {
                    self.count();
                    match rustix::fs::fdatasync(file) {
                        Err(Errno::INTR) => continue,
                        result => return Step::Finished(result.map(|()| 0).map_err(IoError::from)),
                    }
                }
                What::Discard { offset, len } => {
                    self.count();
                    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                    match rustix::fs::fallocate(file, flags, *offset, *len) {
                        Err(Errno::INTR) => continue,
                        result => return Step::Finished(result.map(|()| 0).map_err(IoError::from)),
                    }
                }
                What::Receive { buf, span } => {
                    let bytes = &mut buf[span.start as usize..span.end as usize];
                    partial = true;
                    (false, bytes.len(), self.read(file, task.may_block, CURRENT_POSITION, bytes))
                }
                What::Ready { read } => {
                    return if self.is_ready(file, *read) { Step::Finished(Ok(0)) } else { Step::Wait };
                }
                What::Read { position, buf, span } => {
                    let bytes = &mut buf[(span.start + task.moved) as usize..span.end as usize];
                    let length = bytes.len();
                    (false, length, self.read(file, task.may_block, offset(*position, task.moved), bytes))
                }
                What::Write { position, buf, span } => {
                    let bytes = &buf[(span.start + task.moved) as usize..span.end as usize];
                    (
                        true,
                        bytes.len(),
                        self.write(file, task.may_block, offset(*position, task.moved), bytes),
                    )
                }
            };
            match result {
                Ok(0) if write && remaining > 0 => {
                    return Step::Finished(Err(std::io::ErrorKind::WriteZero.into()));
                }
                Ok(count) => {
                    task.moved += u32::try_from(count).expect("no more than was asked for");
                    if count == remaining || count == 0 || partial {
                        return Step::Finished(Ok(task.moved));
                    }
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Step::Wait,
                // As in the io_uring queue: a direct read beyond the odd end of a file.
                Err(Errno::INVAL) if is_direct_tail(task) => return Step::Finished(Ok(task.moved)),
                Err(errno) => return Step::Finished(Err(errno.into())),
            }
        }
    }

    fn read(
        &self,
        file: BorrowedFd<'_>,
        may_block: bool,
        offset: u64,
        bytes: &mut [u8],
    ) -> Result<usize, Errno> {
        self.count();
        let flags = if may_block { ReadWriteFlags::NOWAIT } else { ReadWriteFlags::empty() };
        match rustix::io::preadv2(file, &mut [IoSliceMut::new(bytes)], offset, flags) {
            // What is readable is returned at once, however much was asked for.
            Err(Errno::OPNOTSUPP) if may_block && self.is_ready(file, true) => {
                self.count();
                rustix::io::read(file, bytes)
            }
            Err(Errno::OPNOTSUPP) if may_block => Err(Errno::AGAIN),
            result => result,
        }
    }

    fn write(
        &self,
        file: BorrowedFd<'_>,
        may_block: bool,
        offset: u64,
        bytes: &[u8],
    ) -> Result<usize, Errno> {
        self.count();
        let flags = if may_block { ReadWriteFlags::NOWAIT } else { ReadWriteFlags::empty() };
        match rustix::io::pwritev2(file, &[IoSlice::new(bytes)], offset, flags) {
            Err(Errno::OPNOTSUPP) if may_block && self.is_ready(file, false) => {
                self.count();
                rustix::io::write(file, &bytes[..bytes.len().min(PIPE_BUF)])
            }
            Err(Errno::OPNOTSUPP) if may_block => Err(Errno::AGAIN),
            result => result,
        }
    }

    /// Readable (else writable), at its end, or broken: a transfer would not block now.
    fn is_ready(&self, file: BorrowedFd<'_>, read: bool) -> bool {
        self.count();
        let mut polled = [PollFd::from_borrowed_fd(file, events(read))];
        !matches!(rustix::event::poll(&mut polled, Some(&Timespec::default())), Ok(0) | Err(_))
    }

    fn poller_thread(&self) {
        let mut tasks: Vec<Task> = Vec::new();
        let mut ready: Vec<bool> = Vec::new();
        loop {
            {
                let mut waiting = lock(&self.waiting);
                tasks.append(&mut waiting.tasks);
                if waiting.stopping {
                    return;
                }
            }
            for task in tasks.extract_if(.., |task| task.cancelled.load(Ordering::Acquire)) {
                self.finish(task, Err(Errno::CANCELED.into()));
            }
            {
                let mut polled = vec![PollFd::new(&self.waiting_changed, PollFlags::IN)];
                polled
                    .extend(tasks.iter().map(|task| PollFd::new(&*task.file, events(task.op.what.reads()))));
                self.count();
                // An error leaves everything not ready: ask again, but not at once unless it was only a signal.
                match rustix::event::poll(&mut polled, None) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(_) => std::thread::sleep(std::time::Duration::from_millis(1)),
                }
                ready.clear();
                ready.extend(polled.iter().map(|polled| !polled.revents().is_empty()));
            }
            if ready[0] {
                self.count();
                let _ = rustix::io::read(&self.waiting_changed, &mut [0; 8]);
            }
            let mut is_ready = ready[1..].iter();
            for task in tasks.extract_if(.., |_| *is_ready.next().expect("one answer for each task")) {
                lock(&self.ready).tasks.push_back(task);
                self.ready_changed.notify_one();
            }
        }
    }
}

impl What {
    /// Would it wait for the file to be readable, rather than writable?
    fn reads(&self) -> bool {
        match self {
            Self::Read { .. } | Self::Receive { .. } => true,
            Self::Ready { read } => *read,
            Self::Write { .. } | Self::Flush | Self::Discard { .. } => false,
        }
    }
}

fn events(read: bool) -> PollFlags {
    if read { PollFlags::IN } else { PollFlags::OUT }
}

fn offset(position: Position, moved: u32) -> u64 {
    match position {
        Position::At(offset) => offset + u64::from(moved),
        Position::Stream => CURRENT_POSITION,
    }
}

fn is_direct_tail(task: &Task) -> bool {
    match &task.op.what {
        What::Read { position: Position::At(start), .. } => {
            task.moved > 0 && super::ends_at(task.file.as_fd(), start + u64::from(task.moved))
        }
        _ => false,
    }
}

/// Can a transfer on this file block for ever? The memory devices (major 1: null, zero, full, random) cannot.
fn may_block(file: &OwnedFd) -> bool {
    const MEMORY_MAJOR: u32 = 1;
    rustix::fs::fstat(file).is_ok_and(|stat| match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile | FileType::BlockDevice => false,
        FileType::CharacterDevice => rustix::fs::major(stat.st_rdev) != MEMORY_MAJOR,
        _ => true,
    })
}

#[derive(Debug)]
struct Attached {
    file: Arc<OwnedFd>,
    may_block: bool,
    in_flight: u32,
    /// Shared with the operations pushed since the last cancellation; replaced by the next one.
    cancelled: Arc<AtomicBool>,
}

/// See the module.
#[derive(Debug)]
pub struct ThreadsQueue {
    shared: Arc<Shared>,
    pool: Vec<JoinHandle<()>>,
    poller: Option<JoinHandle<()>>,
    ports: Ports<Attached>,
    pushed: Vec<Task>,
    in_flight: u32,
    depth: u32,
    fallback_reason: Option<String>,
}

impl ThreadsQueue {
    /// A queue of `depth` operations served by `threads` threads and a poller.
    ///
    /// # Errors
    /// `Limit`: no more threads or descriptors for this process.
    pub fn new(threads: u32, depth: u32) -> Result<Self> {
        assert!(threads > 0 && depth > 0, "a queue needs threads and room");
        let waiting_changed = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| Error::new(ErrorKind::Limit, "cannot make an eventfd").because(errno))?;
        let shared = Arc::new(Shared {
            ready: Mutex::default(),
            ready_changed: Condvar::new(),
            waiting: Mutex::default(),
            waiting_changed,
            finished: Mutex::default(),
            finished_changed: Condvar::new(),
            syscalls: AtomicU64::new(0),
        });
        // Threads already started are stopped by `drop` if a later one fails.
        let mut queue = Self {
            shared,
            pool: Vec::new(),
            poller: None,
            ports: Ports::new(),
            pushed: Vec::new(),
            in_flight: 0,
            depth,
            fallback_reason: None,
        };
        for index in 0..threads {
            queue.pool.push(queue.spawn(format!("io-{index}"), Shared::pool_thread)?);
        }
        queue.poller = Some(queue.spawn("io-poll".to_owned(), Shared::poller_thread)?);
        Ok(queue)
    }

    /// Say in the facts why this queue is used.
    #[must_use]
    pub fn because(mut self, reason: String) -> Self {
        self.fallback_reason = Some(reason);
        self
    }

    fn spawn(&self, name: String, run: fn(&Shared)) -> Result<JoinHandle<()>> {
        let shared = Arc::clone(&self.shared);
        std::thread::Builder::new()
            .name(name)
            .spawn(move || run(&shared))
            .map_err(|error| Error::new(ErrorKind::Limit, "cannot start an I/O thread").because(error))
    }
}

impl Queue for ThreadsQueue {
    fn attach(&mut self, file: Arc<OwnedFd>) -> Result<Port> {
        let port = self.ports.free()?;
        let may_block = may_block(&file);
        self.ports.attach(port, Attached { file, may_block, in_flight: 0, cancelled: Arc::default() });
        Ok(port)
    }

    fn detach(&mut self, port: Port) {
        let attached = self.ports.detach(port);
        assert_eq!(attached.in_flight, 0, "operations in flight on the port to detach");
    }

    fn push(&mut self, op: Op) -> Result<(), (Refused, Op)> {
        let Some(attached) = self.ports.get_mut(op.port) else {
            return Err((Refused::UnknownPort, op));
        };
        if self.in_flight >= self.depth {
            return Err((Refused::Full, op));
        }
        if let What::Read { buf, span, .. } | What::Write { buf, span, .. } | What::Receive { buf, span } =
            &op.what
        {
            super::check_span(buf, span);
        }
        self.in_flight += 1;
        attached.in_flight += 1;
        self.pushed.push(Task {
            op,
            file: Arc::clone(&attached.file),
            may_block: attached.may_block,
            moved: 0,
            cancelled: Arc::clone(&attached.cancelled),
        });
        Ok(())
    }

    fn kick(&mut self) -> Result<()> {
        match self.pushed.len() {
            0 => return Ok(()),
            1 => {
                lock(&self.shared.ready).tasks.extend(self.pushed.drain(..));
                self.shared.ready_changed.notify_one();
            }
            _ => {
                lock(&self.shared.ready).tasks.extend(self.pushed.drain(..));
                self.shared.ready_changed.notify_all();
            }
        }
        self.shared.count();
        Ok(())
    }

    fn wait(&mut self, deadline: Option<Instant>) -> Result<()> {
        self.kick()?;
        let mut finished = lock(&self.shared.finished);
        while finished.done.is_empty() && !finished.woken {
            self.shared.count();
            let changed = &self.shared.finished_changed;
            finished = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                None => changed.wait(finished).unwrap_or_else(PoisonError::into_inner),
                Some(left) if left.is_zero() => break,
                Some(left) => changed.wait_timeout(finished, left).unwrap_or_else(PoisonError::into_inner).0,
            };
        }
        finished.woken = false;
        Ok(())
    }

    fn reap(&mut self, done: &mut Vec<Done>) {
        for (port, one) in lock(&self.shared.finished).done.drain(..) {
            let attached = self.ports.get_mut(port).expect("a port with operations stays attached");
            attached.in_flight -= 1;
            self.in_flight -= 1;
            done.push(one);
        }
    }

    fn cancel(&mut self, port: Port) {
        if let Some(attached) = self.ports.get_mut(port) {
            attached.cancelled.store(true, Ordering::Release);
            attached.cancelled = Arc::default();
            self.shared.tell_poller();
        }
    }

    fn in_flight(&self) -> u32 {
        self.in_flight
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::clone(&self.shared) as Arc<dyn Wake>
    }

    fn syscalls(&self) -> u64 {
        self.shared.syscalls.load(Ordering::Relaxed)
    }

    fn facts(&self) -> QueueFacts {
        QueueFacts { name: "threads", buffers_registered: 0, fallback_reason: self.fallback_reason.clone() }
    }
}

impl Wake for Shared {
    fn wake(&self) {
        lock(&self.finished).woken = true;
        self.finished_changed.notify_one();
    }
}

impl Drop for ThreadsQueue {
    /// Cancel what waits, let system calls in progress finish, then end the threads.
    fn drop(&mut self) {
        for (_, attached) in self.ports.iter() {
            attached.cancelled.store(true, Ordering::Release);
        }
        lock(&self.shared.ready).stopping = true;
        self.shared.ready_changed.notify_all();
        for thread in self.pool.drain(..) {
            let _ = thread.join();
        }
        lock(&self.shared.waiting).stopping = true;
        self.shared.tell_poller();
        if let Some(thread) = self.poller.take() {
            let _ = thread.join();
        }
        // The last tasks, and the files they hold, go now and not with the last waker.
        lock(&self.shared.ready).tasks.clear();
        lock(&self.shared.waiting).tasks.clear();
    }
}
