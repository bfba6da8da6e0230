//! The io_uring queue: what a raw completion means.
//!
//! [`Ring`] moves operations; this module decides what a result stands for: short transfers are advanced and resubmitted,
//! `EINTR` is repeated, `EAGAIN` (a stream whose description is non-blocking) waits for readiness and is repeated, and a cancelled
//! operation is not continued. It refuses to reorder, merge or split what the caller asked.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use super::ports::Ports;
use super::{Done, Op, Port, Position, Queue, QueueFacts, Refused, Span, Wake, What};
use crate::error::Result;
use crate::sys::buffer::{Arena, Buf};
use crate::sys::op::{CURRENT_POSITION, Submission, Transfer};
use crate::sys::ring::{Completion, Ring, RingWaker};

/// What the caller of a submission needs to know again.
#[derive(Debug)]
struct Ticket {
    token: u64,
    /// Bytes moved by earlier parts of the same transfer.
    moved: u32,
    /// Whatever moves is enough.
    partial: bool,
    /// A transfer that waits for its stream to be ready.
    parked: Option<Transfer>,
}

#[derive(Debug)]
struct Attached {
    file: Arc<OwnedFd>,
    in_flight: u32,
}

/// See the module.
pub struct UringQueue {
    ring: Ring<Ticket>,
    ports: Ports<Attached>,
    finished: Vec<Done>,
    /// A wake was collected that no `wait` has reported yet.
    woken: bool,
    /// Reused, so that steady state allocates nothing.
    collected: Vec<Completion<Ticket>>,
}

impl UringQueue {
    /// A queue of `depth` operations, made by the thread that will use it. Buffers of `arena` are registered as far as
    /// `RLIMIT_MEMLOCK` allows; others work too, a little slower.
    ///
    /// # Errors
    /// `Denied` or `Unsupported` when io_uring cannot be used here.
    pub fn new(arena: &Arena, depth: u32) -> Result<Self> {
        let ring = Ring::new(&arena.reference(), depth)?;
        Ok(Self {
            ring,
            ports: Ports::new(),
            finished: Vec::with_capacity(depth as usize),
            woken: false,
            collected: Vec::with_capacity(depth as usize),
        })
    }

    fn resubmit(&mut self, submission: Submission, ticket: Ticket) {
        self.ring.push(submission, ticket).expect("the place of the completion just collected is free");
    }

    fn finish(&mut self, port: u32, token: u64, buf: Option<Buf>, result: std::io::Result<u32>) {
        self.ports.get_mut(Port(port)).expect("a port with operations stays attached").in_flight -= 1;
        self.finished.push(Done { token, buf, result });
    }

    fn settle(&mut self, completion: Completion<Ticket>) {
        let Completion { submission, data: ticket, result, cancelled } = completion;
        match submission {
            Submission::Transfer(transfer) => self.settle_transfer(transfer, ticket, result, cancelled),
            Submission::Sync { file } | Submission::Punch { file, .. } => match u32::try_from(result) {
                Ok(_) => self.finish(file, ticket.token, None, Ok(0)),
                Err(_) if result == -libc::EINTR && !cancelled => self.resubmit(submission, ticket),
                Err(_) => self.finish(file, ticket.token, None, Err(failure(result, cancelled))),
            },
            Submission::Poll { file, read } => {
                let again = result == -libc::EINTR || result == -libc::EAGAIN;
                match ticket.parked {
                    _ if again && !cancelled => self.resubmit(Submission::Poll { file, read }, ticket),
                    Some(transfer) if cancelled || result < 0 => {
                        let errno = if cancelled { -libc::ECANCELED } else { result };
                        self.finish(file, ticket.token, Some(transfer.buf), Err(failure(errno, cancelled)));
                    }
                    Some(transfer) => {
                        self.resubmit(Submission::Transfer(transfer), Ticket { parked: None, ..ticket });
                    }
                    None if result < 0 => {
                        self.finish(file, ticket.token, None, Err(failure(result, cancelled)));
                    }
                    // An error or hang-up counts as ready: the transfer that follows will say what it is.
                    None => self.finish(file, ticket.token, None, Ok(0)),
                }
            }
        }
    }

    fn settle_transfer(&mut self, mut transfer: Transfer, mut ticket: Ticket, result: i32, cancelled: bool) {
        let file = transfer.file;
        let remaining = transfer.span.end - transfer.span.start;
        match u32::try_from(result) {
            Ok(count) => {
                assert!(count <= remaining, "the kernel moved {count} of {remaining} bytes");
                ticket.moved += count;
                let (token, moved) = (ticket.token, ticket.moved);
                if count == remaining || (!transfer.write && (count == 0 || ticket.partial)) {
                    self.finish(file, token, Some(transfer.buf), Ok(moved));
                } else if count == 0 {
                    let error = std::io::Error::from(std::io::ErrorKind::WriteZero);
                    self.finish(file, token, Some(transfer.buf), Err(error));
                } else if cancelled {
                    self.finish(file, token, Some(transfer.buf), Err(failure(-libc::ECANCELED, true)));
                } else {
                    transfer.span.start += count;
                    if transfer.offset != CURRENT_POSITION {
                        transfer.offset += u64::from(count);
                    }
                    self.resubmit(Submission::Transfer(transfer), ticket);
                }
            }
            Err(_) if cancelled => {
                self.finish(file, ticket.token, Some(transfer.buf), Err(failure(result, true)));
            }
            Err(_) if result == -libc::EINTR => self.resubmit(Submission::Transfer(transfer), ticket),
            Err(_) if result == -libc::EAGAIN => {
                let read = !transfer.write;
                self.resubmit(Submission::Poll { file, read }, Ticket { parked: Some(transfer), ..ticket });
            }
            Err(_) if result == -libc::EINVAL && self.is_direct_tail(&transfer, &ticket) => {
                self.finish(file, ticket.token, Some(transfer.buf), Ok(ticket.moved));
            }
            Err(_) => self.finish(file, ticket.token, Some(transfer.buf), Err(failure(result, false))),
        }
    }

    /// A direct read that ends with a file of odd length comes back short; reading on from there is misaligned, and some
    /// filesystems refuse it rather than say "end". It is the end if the file ends there.
    fn is_direct_tail(&self, transfer: &Transfer, ticket: &Ticket) -> bool {
        let port = self.ports.get(Port(transfer.file)).expect("a port with operations stays attached");
        !transfer.write && ticket.moved > 0 && super::ends_at(port.file.as_fd(), transfer.offset)
    }

    fn collect(&mut self) {
        let mut collected = std::mem::take(&mut self.collected);
        self.woken |= self.ring.completions(&mut collected);
        for completion in collected.drain(..) {
            self.settle(completion);
        }
        self.collected = collected;
    }
}

impl Drop for UringQueue {
    /// The kernel takes a ring apart some time after it was closed; files let go here are closed now, so that the reader of
    /// a pipe sees its end when the writer's queue is gone.
    fn drop(&mut self) {
        if self.ring.drain().is_ok() {
            for (port, _) in self.ports.iter() {
                let _ = self.ring.set_file(port.0, None);
            }
        }
    }
}

/// The error of a negative result. A cancelled operation may end by a signal to the kernel's own thread.
fn failure(result: i32, cancelled: bool) -> std::io::Error {
    let errno = if cancelled && (result == -libc::EINTR || result == -libc::EAGAIN) {
        libc::ECANCELED
    } else {
        -result
    };
    std::io::Error::from_raw_os_error(errno)
}

fn transfer(write: bool, port: Port, position: Position, buf: Buf, span: Span) -> Submission {
    super::check_span(&buf, &span);
    let offset = match position {
        Position::At(offset) => offset,
        Position::Stream => CURRENT_POSITION,
    };
    Submission::Transfer(Transfer { write, file: port.0, offset, buf, span })
}

impl Queue for UringQueue {
    fn attach(&mut self, file: Arc<OwnedFd>) -> Result<Port> {
        let port = self.ports.free()?;
        self.ring.set_file(port.0, Some(file.as_fd()))?;
        self.ports.attach(port, Attached { file, in_flight: 0 });
        Ok(port)
    }

    fn detach(&mut self, port: Port) {
        let attached = self.ports.detach(port);
        assert_eq!(attached.in_flight, 0, "operations in flight on the port to detach");
        self.ring.set_file(port.0, None).expect("emptying a place of our own table");
    }

    fn push(&mut self, op: Op) -> Result<(), (Refused, Op)> {
        let Some(attached) = self.ports.get_mut(op.port) else {
            return Err((Refused::UnknownPort, op));
        };
        if self.ring.in_flight() + self.finished.len() >= self.ring.depth() {
            return Err((Refused::Full, op));
        }
        attached.in_flight += 1;
        let Op { token, port, what } = op;
        let mut partial = false;
        let submission = match what {
            What::Read { position, buf, span } => transfer(false, port, position, buf, span),
            What::Write { position, buf, span } => transfer(true, port, position, buf, span),
            What::Receive { buf, span } => {
                partial = true;
                transfer(false, port, Position::Stream, buf, span)
            }
            What::Discard { offset, len } => Submission::Punch { file: port.0, offset, len },
            What::Flush => Submission::Sync { file: port.0 },
            What::Ready { read } => Submission::Poll { file: port.0, read },
        };
        let pushed = self.ring.push(submission, Ticket { token, moved: 0, partial, parked: None });
        pushed.expect("there is room: counted above");
        Ok(())
    }

    fn kick(&mut self) -> Result<()> {
        self.ring.enter(false, None)
    }

    fn wait(&mut self, deadline: Option<Instant>) -> Result<()> {
        self.collect();
        if self.woken || !self.finished.is_empty() {
            self.woken = false;
            return self.kick();
        }
        loop {
            self.ring.enter(true, deadline)?;
            self.collect();
            let over = deadline.is_some_and(|deadline| Instant::now() >= deadline);
            if self.woken || over || !self.finished.is_empty() {
                self.woken = false;
                // What was resubmitted meanwhile must not wait for the caller's next turn.
                return if self.ring.has_unsent() { self.kick() } else { Ok(()) };
            }
        }
    }

    fn reap(&mut self, done: &mut Vec<Done>) {
        self.collect();
        done.append(&mut self.finished);
    }

    fn cancel(&mut self, port: Port) {
        self.ring.cancel_file(port.0);
    }

    fn in_flight(&self) -> u32 {
        u32::try_from(self.ring.in_flight() + self.finished.len()).expect("at most the depth")
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::new(self.ring.waker())
    }

    fn syscalls(&self) -> u64 {
        self.ring.syscalls()
    }

    fn facts(&self) -> QueueFacts {
        QueueFacts {
            name: "io_uring",
            buffers_registered: self.ring.buffers_registered(),
            fallback_reason: self.ring.plain_because().map(str::to_owned),
        }
    }
}

impl Wake for RingWaker {
    fn wake(&self) {
        RingWaker::wake(self);
    }
}
