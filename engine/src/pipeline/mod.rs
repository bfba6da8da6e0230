//! The workers: pinned threads that carry transfers, each with its own queue and buffers.
//!
//! | file | its one purpose |
//! |---|---|
//! | `transfer` | what workers are told about a job, and what they report back |
//! | `segment` | the encrypted side: ciphers, and where bytes lie |
//! | `plan` | which extents, in which order, and when |
//! | `worker` | the loop; `claim`, `moves`, `rewrite`: who goes next, a chunk on its way, a chunk that is held |
//! | `slot` | one chunk in flight |
//! | `crypt` | what is done to a chunk that is here |
//! | `rewrite` | a transfer in place: chunks held back behind barriers |
//! | `hashing` | the hashes of `crypto` as a rewrite asks for them |
//! | `carrier` | driving a transfer step by step |
//! | `service` | foreign requests beside the transfers |
//! | `view` | a volume as random I/O sees it, also while it is re-encrypted |
//! | `marks` | how far a transfer has come without a gap |
//! | `holes`, `zeros` | not reading holes, not writing zeros |
//!
//! Default layout *sharded*: every worker carries every transfer, and they claim chunks of its plan by one atomic. A
//! transfer with an ordered end (a pipe) is carried by a single worker: order costs nothing when nothing is handed over,
//! and one core crypts faster than any pipe moves.

pub mod carrier;
pub mod crypt;
pub mod hashing;
pub mod holes;
pub mod marks;
pub mod plan;
pub mod rewrite;
pub mod segment;
pub mod service;
pub mod slot;
pub mod transfer;
pub mod view;
pub mod worker;
pub mod zeros;

#[cfg(test)]
mod tests;

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, bounded, unbounded};
use proto::WorkerStatus;

pub use crate::backend::QueueChoice;
use crate::backend::blocking::Blocking;
use crate::backend::{Wake, open_queue};
use crate::error::{Error, ErrorKind};
use crate::pipeline::carrier::Carried;
use crate::pipeline::rewrite::News;
use crate::pipeline::service::Service;
use crate::pipeline::transfer::{Transfer, Work};
use crate::pipeline::worker::{Command, Worker};
use crate::sys::affinity;
use crate::sys::buffer::{Arena, Buf};
use crate::telemetry::record::StageRecord;

/// How long a snapshot of statistics waits for a busy worker.
const SNAPSHOT_WAIT: Duration = Duration::from_millis(500);

/// How many workers, and the memory each owns.
#[derive(Debug, Clone)]
pub struct PipelineConfig {
    /// CPUs to pin one worker to each; must lie in the allowed set. Never empty.
    pub cpus: Vec<u32>,
    /// Pin the workers?
    pub pin: bool,
    /// The queue.
    pub queue: QueueChoice,
    /// Bytes of one buffer, the largest chunk: a power of two, 64 KiB..=16 MiB.
    pub buffer_bytes: u32,
    /// Buffers of one worker, 4..=256.
    pub buffers_per_worker: u32,
}

/// A running set of workers. Dropping it lets them finish what they carry, and joins them.
pub struct Pipeline {
    workers: Vec<Handle>,
    queue: QueueChoice,
    buffer_bytes: u32,
    /// Where the next transfer begins that is not for all workers.
    next: AtomicUsize,
}

struct Handle {
    commands: Sender<Command>,
    wake: Arc<dyn Wake>,
    status: WorkerStatus,
    /// Ordered transfers given to it.
    ordered: Mutex<Vec<Weak<Transfer>>>,
    thread: Option<JoinHandle<()>>,
}

impl Handle {
    fn send(&self, command: Command) {
        // A worker leaves only after `Exit`, and aborts the process if its queue breaks.
        let _ = self.commands.send(command);
        self.wake.wake();
    }
}

impl Pipeline {
    /// Start the workers.
    ///
    /// # Errors
    /// No memory, no io_uring although it was demanded, or a CPU that may not be used.
    pub fn start(config: &PipelineConfig) -> Result<Self, Error> {
        let mut workers = Vec::with_capacity(config.cpus.len());
        for (index, &cpu) in config.cpus.iter().enumerate() {
            workers.push(start_worker(index, cpu, config)?);
        }
        if workers.is_empty() {
            return Err(Error::new(ErrorKind::Invalid, "a pipeline needs a worker"));
        }
        Ok(Self {
            workers,
            queue: config.queue,
            buffer_bytes: config.buffer_bytes,
            next: AtomicUsize::new(0),
        })
    }

    /// The workers as they are.
    #[must_use]
    pub fn status(&self) -> Vec<WorkerStatus> {
        self.workers.iter().map(|worker| worker.status.clone()).collect()
    }

    /// How many workers there are.
    #[must_use]
    pub fn workers(&self) -> usize {
        self.workers.len()
    }

    /// Bytes of one buffer: the largest chunk.
    #[must_use]
    pub fn buffer_bytes(&self) -> u32 {
        self.buffer_bytes
    }

    /// A file read, written and flushed in order, over the disks that the workers' queues see: simulated ones where theirs are.
    ///
    /// # Errors
    /// As [`Blocking::open`].
    pub fn blocking(&self, file: Arc<OwnedFd>, name: &str, align: u32) -> Result<Blocking, Error> {
        match self.queue {
            #[cfg(feature = "sim")]
            QueueChoice::Simulated(_) => Blocking::open_on(self.queue, file, name, align),
            _ => Blocking::open(file, name, align),
        }
    }

    /// Carry a transfer, on at most `workers_max` workers. Its end comes on [`Transfer::ended`]. One that rewrites a device is
    /// carried step by step instead: [`Pipeline::carry`].
    pub fn run(&self, transfer: &Arc<Transfer>, workers_max: usize) {
        assert!(transfer.work != Work::Recrypt, "a rewrite brings its own buffers");
        let count = if transfer.is_ordered() { 1 } else { workers_max.clamp(1, self.workers.len()) };
        self.start_on(transfer, count, Vec::new());
    }

    /// Carry a transfer that rewrites a device in place, on at most `workers_max` workers, each with `buffers` buffers of the
    /// transfer's own: so many chunks are held at once, and a hotzone must not have more than all workers together, or it
    /// never arrives. Its [`Transfer::set_rewrite`] has been said, with the other end of `news`; its end comes as
    /// [`carrier::Turn::Ended`].
    ///
    /// # Errors
    /// No memory: nothing has begun.
    pub fn carry(
        &self,
        transfer: &Arc<Transfer>,
        news: Receiver<News>,
        workers_max: usize,
        buffers: u32,
    ) -> Result<Carried<'_>, Error> {
        let count = workers_max.clamp(1, self.workers.len());
        let own = (0..count).map(|_| carrier::own_buffers(transfer, buffers));
        let own = own.collect::<Result<Vec<_>, Error>>()?;
        self.start_on(transfer, count, own);
        Ok(Carried::new(self, transfer.clone(), news))
    }

    fn start_on(&self, transfer: &Arc<Transfer>, count: usize, mut buffers: Vec<Vec<Buf>>) {
        transfer.begin(u32::try_from(count).expect("workers are few"));
        let first = if transfer.is_ordered() {
            self.least_ordered()
        } else {
            // A transfer that is not for all workers starts where the last one did not.
            self.next.fetch_add(count, Ordering::Relaxed)
        };
        for offset in 0..count {
            let worker = &self.workers[(first + offset) % self.workers.len()];
            if transfer.is_ordered() {
                // Kept alive by the transfer itself: gone when it is.
                lock(&worker.ordered).push(Arc::downgrade(transfer));
            }
            worker.send(Command::Start(transfer.clone(), buffers.pop().unwrap_or_default()));
        }
    }

    /// The worker that carries the fewest ordered transfers: they may stall, and should not stall together.
    fn least_ordered(&self) -> usize {
        let load = |worker: &Handle| {
            let mut ordered = lock(&worker.ordered);
            ordered.retain(|transfer| transfer.strong_count() > 0);
            ordered.len()
        };
        (0..self.workers.len()).min_by_key(|&at| load(&self.workers[at])).unwrap_or(0)
    }

    /// Let a service live on a worker, beside its transfers. One per worker: a later one replaces it when it is idle.
    pub fn install(&self, worker: usize, service: Box<dyn Service>) {
        self.workers[worker].send(Command::Install(service));
    }

    /// Interrupts the wait of one worker: how other threads tell its service that there is news.
    #[must_use]
    pub fn waker(&self, worker: usize) -> Arc<dyn Wake> {
        self.workers[worker].wake.clone()
    }

    /// Make workers look again at gates and plans.
    pub fn wake(&self) {
        for worker in &self.workers {
            worker.wake.wake();
        }
    }

    /// Stage statistics of a running transfer so far, and its system calls: of the workers that have left it, and of
    /// those that answer in time.
    #[must_use]
    pub fn snapshot(&self, transfer: &Arc<Transfer>) -> (StageRecord, u64) {
        // First those that have left: one that leaves from here on may be missed, but none is counted twice.
        let (mut record, mut syscalls) = transfer.final_record();
        let (reply, answers) = unbounded();
        for worker in &self.workers {
            worker.send(Command::Snapshot(transfer.clone(), reply.clone()));
        }
        drop(reply);
        while let Ok((part, calls)) = answers.recv_timeout(SNAPSHOT_WAIT) {
            record.merge(&part);
            syscalls += calls;
        }
        (record, syscalls)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        for worker in &self.workers {
            worker.send(Command::Exit);
        }
        for worker in &mut self.workers {
            if let Some(thread) = worker.thread.take() {
                // A worker that panicked has aborted the process in release builds.
                let _ = thread.join();
            }
        }
    }
}

fn start_worker(index: usize, cpu: u32, config: &PipelineConfig) -> Result<Handle, Error> {
    let (commands, inbox) = unbounded();
    let (ready, started) = bounded(1);
    let config = config.clone();
    let body = move || {
        // Everything is made on the worker's own thread: its memory is local to its core, and a ring has one issuer.
        let made = (|| {
            if config.pin {
                affinity::pin(cpu)?;
            }
            let mut arena = Arena::new(config.buffers_per_worker, config.buffer_bytes)?;
            let opened =
                open_queue(config.queue, &arena, 2 * config.buffers_per_worker + service::OPERATIONS)?;
            let facts = opened.facts();
            let memory = arena.facts();
            let status = WorkerStatus {
                cpu: config.pin.then_some(cpu),
                queue: facts.name.to_owned(),
                queue_fallback_reason: facts.fallback_reason,
                buffers: memory.count,
                buffer_bytes: memory.buffer_bytes,
                buffers_registered: facts.buffers_registered,
                buffers_locked: memory.locked,
                pages: memory.pages.name().to_owned(),
            };
            let wake = opened.waker();
            Ok((Worker::new(index, opened, arena.take_all(), config.buffers_per_worker, inbox), wake, status))
        })();
        match made {
            Ok((worker, wake, status)) => {
                // The starter waits for this.
                let _ = ready.send(Ok((wake, status)));
                if let Err(error) = worker.run() {
                    // What is in flight can no longer be accounted for, and the kernel may own our buffers.
                    tracing::error!("worker {index}: {}", error.chain());
                    std::process::abort();
                }
            }
            Err(error) => {
                let _ = ready.send(Err(error));
            }
        }
    };
    let thread = std::thread::Builder::new()
        .name(format!("worker{index}"))
        .spawn(body)
        .map_err(|cause| Error::io("cannot start a worker thread", cause))?;
    let (wake, status) = started
        .recv()
        .map_err(|cause| Error::new(ErrorKind::Internal, "a worker died while starting").because(cause))??;
    Ok(Handle { commands, wake, status, ordered: Mutex::default(), thread: Some(thread) })
}
