//! Where sectors come from and go: the data-plane seam.
//!
//! A [`Queue`] moves bytes between attached files and buffers, asynchronously, for exactly one worker. There is one
//! implementation over io_uring (`uring`), one over a thread pool for hosts that forbid io_uring (`threads`), and a
//! simulated disk for tests (`sim`); one contract suite holds them all. The control-plane side of a file or device (size,
//! alignment, holes, durability) is [`device::Device`].
//!
//! ```text
//! worker ── push(Op)… ── kick ──▶ kernel / pool ──▶ wait ── reap(Done)… ──▶ worker
//! ```
//!
//! Invariants every implementation keeps:
//! 1. every accepted [`Op`] comes back exactly once as a [`Done`], with its buffer, also when cancelled or failed;
//! 2. a transfer is finished when it comes back: short reads and writes, `EINTR` and `EAGAIN` are continued inside;
//!    a read returns fewer bytes than asked only at the end of the file, a write never; only [`What::Receive`] takes what there is;
//! 3. `push` makes no system call, `kick` at most one per batch (io_uring);
//! 4. dropping a queue first drains what is in flight, because the kernel may still write to the buffers.

pub mod blocking;
pub mod device;
pub mod nbd;
pub mod ordered;
mod ports;
#[cfg(feature = "sim")]
pub mod sim;
pub mod space;
pub mod threads;
pub mod uring;

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use crate::error::{Error, ErrorKind};
use crate::sys::buffer::{Arena, Buf};

/// A file attached to a queue; the index of its registered descriptor. Valid until detached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Port(pub u32);

/// Where in a file a transfer happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Position {
    /// At a byte offset; the file's own position is neither used nor moved.
    At(u64),
    /// At the file's current position (pipes, sockets, `-`). At most one transfer per port and direction in flight:
    /// order is the caller's business.
    Stream,
}

/// The bytes of a buffer that take part in a transfer.
pub type Span = std::ops::Range<u32>;

/// What to do.
#[derive(Debug)]
pub enum What {
    /// Fill `buf[span]`.
    Read {
        /// From where.
        position: Position,
        /// Into which buffer; it comes back in the completion.
        buf: Buf,
        /// Which part of it.
        span: Span,
    },
    /// Write out `buf[span]`.
    Write {
        /// To where.
        position: Position,
        /// From which buffer; it comes back in the completion.
        buf: Buf,
        /// Which part of it.
        span: Span,
    },
    /// Fill the beginning of `buf[span]` with what a stream has, as soon as it has any; 0 bytes: it has ended. The one transfer that
    /// may come back short.
    Receive {
        /// Into which buffer; it comes back in the completion.
        buf: Buf,
        /// Which part of it.
        span: Span,
    },
    /// Give space back (`fallocate` with `PUNCH_HOLE`): the extent reads as zeros. Files and block devices; what cannot says
    /// `EOPNOTSUPP`.
    Discard {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Make everything written through this file durable: data, and the metadata needed to read it back (`fdatasync`).
    Flush,
    /// Wait until the file is readable (`read`) or writable, without holding a buffer. For streams.
    Ready {
        /// Readable, else writable.
        read: bool,
    },
}

/// One operation. `token` is the caller's and comes back untouched.
#[derive(Debug)]
pub struct Op {
    /// The caller's name for it; the largest 65,536 numbers are the queues' own.
    pub token: u64,
    /// On which file.
    pub port: Port,
    /// What to do.
    pub what: What,
}

impl What {
    /// The buffer lent with it, if it has one.
    fn into_buf(self) -> Option<Buf> {
        match self {
            Self::Read { buf, .. } | Self::Write { buf, .. } | Self::Receive { buf, .. } => Some(buf),
            Self::Flush | Self::Discard { .. } | Self::Ready { .. } => None,
        }
    }
}

/// A finished operation.
#[derive(Debug)]
pub struct Done {
    /// From the [`Op`].
    pub token: u64,
    /// The buffer lent with the operation, if it had one.
    pub buf: Option<Buf>,
    /// Bytes transferred (0 for `Flush`, `Discard` and `Ready`), or the cause. A transfer that failed midway reports the error: how
    /// much arrived is not to be relied on. Cancelled: `ECANCELED`.
    pub result: std::io::Result<u32>,
}

/// Why an operation was not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// As many operations are in flight as the queue holds.
    Full,
    /// The port is not attached.
    UnknownPort,
}

/// Facts about a queue, for `daemon status`.
#[derive(Debug, Clone, Default)]
pub struct QueueFacts {
    /// `io_uring`, `threads`, …
    pub name: &'static str,
    /// Buffers registered with the ring: those with an index below this.
    pub buffers_registered: u32,
    /// Why this queue and not a better one.
    pub fallback_reason: Option<String>,
}

/// Interrupts a queue's `wait` from another thread. A wake before `wait` makes that `wait` return at once.
pub trait Wake: Send + Sync {
    /// Make the owner's current or next `wait` return.
    fn wake(&self);
}

/// The data plane of one worker. Never shared; not `Send` once in use is fine, so it is made on its own thread.
pub trait Queue {
    /// Take part of a file: transfers name it by the returned port. The queue keeps the descriptor open until `detach`.
    ///
    /// # Errors
    /// No free port (`Limit`), or the kernel refused the registration.
    fn attach(&mut self, file: Arc<OwnedFd>) -> Result<Port, Error>;

    /// Forget a port. Nothing may be in flight on it (asserted).
    fn detach(&mut self, port: Port);

    /// Accept an operation for the next `kick`. No system call. A refusal gives the operation back.
    ///
    /// # Errors
    /// See [`Refused`].
    fn push(&mut self, op: Op) -> Result<(), (Refused, Op)>;

    /// Hand everything pushed to the kernel: one system call for the batch, none if there is nothing new.
    ///
    /// # Errors
    /// The queue itself is broken; nothing more can be expected of it.
    fn kick(&mut self) -> Result<(), Error>;

    /// `kick`, then sleep until at least one completion, a wake, or the deadline.
    ///
    /// # Errors
    /// As `kick`.
    fn wait(&mut self, deadline: Option<Instant>) -> Result<(), Error>;

    /// Append what has finished. Never blocks.
    fn reap(&mut self, done: &mut Vec<Done>);

    /// Ask for the early end of everything in flight on a port. Each still comes back once: done, or `ECANCELED`.
    fn cancel(&mut self, port: Port);

    /// Operations accepted and not yet reaped.
    fn in_flight(&self) -> u32;

    /// A handle that interrupts `wait`.
    fn waker(&self) -> Arc<dyn Wake>;

    /// System calls made so far.
    fn syscalls(&self) -> u64;

    /// What this queue is.
    fn facts(&self) -> QueueFacts;
}

/// Does a regular file end at (or before) `offset`?
fn ends_at(file: BorrowedFd<'_>, offset: u64) -> bool {
    rustix::fs::fstat(file).is_ok_and(|stat| {
        rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file()
            && u64::try_from(stat.st_size).is_ok_and(|size| offset >= size)
    })
}

/// The assertion of every queue at its door: the kernel must stay inside the buffer.
fn check_span(buf: &Buf, span: &Span) {
    let bytes = buf.len();
    assert!(
        span.start <= span.end && span.end as usize <= bytes,
        "span {span:?} is not in a buffer of {bytes} bytes"
    );
}

/// Which queue a worker uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum QueueChoice {
    /// io_uring, else threads; the reason is in [`QueueFacts::fallback_reason`].
    #[default]
    Auto,
    /// io_uring or fail.
    IoUring,
    /// The thread pool.
    Threads,
    /// The simulated disks of a world, by its number ([`sim::World::choice`]).
    #[cfg(feature = "sim")]
    Simulated(u32),
}

/// Threads of a fallback queue: enough to keep an SSD busy, few enough for a core.
const FALLBACK_THREADS_MAX: u32 = 16;

/// The queue of one worker, made on the worker's own thread: `depth` operations in flight, buffers of `arena`. Volumes that an
/// NBD server exports are attached like files.
///
/// # Errors
/// io_uring was demanded and cannot be used, or no threads can be started.
pub fn open_queue(choice: QueueChoice, arena: &Arena, depth: u32) -> Result<Box<dyn Queue>, Error> {
    let below = depth + nbd::queue::EXTRA_DEPTH;
    let threads = || threads::ThreadsQueue::new(depth.min(FALLBACK_THREADS_MAX), below);
    let inner: Box<dyn Queue> = match choice {
        QueueChoice::Threads => Box::new(threads()?),
        QueueChoice::IoUring => Box::new(uring::UringQueue::new(arena, below)?),
        // Simulated disks are no servers.
        #[cfg(feature = "sim")]
        QueueChoice::Simulated(number) => return Ok(sim::World::numbered(number)?.queue(arena, depth)),
        QueueChoice::Auto => match uring::UringQueue::new(arena, below) {
            Ok(queue) => Box::new(queue),
            // Whatever is wrong with io_uring here, threads may still work; if they do not either, both causes count.
            Err(no_ring) => match threads() {
                Ok(queue) => Box::new(queue.because(no_ring.chain())),
                Err(error) => {
                    return Err(
                        Error::new(ErrorKind::Limit, format!("no I/O queue ({no_ring})")).because(error)
                    );
                }
            },
        },
    };
    Ok(Box::new(nbd::queue::RemoteQueue::new(inner, depth)))
}
