#![allow(unsafe_code)] // Submission entries carry raw addresses; this module is what makes them sound.
//! A typed io_uring: it owns what the kernel may touch, from submission to completion.
//!
//! Invariants:
//! 1. Every accepted [`Submission`] comes back exactly once in a [`Completion`], with its buffer and the caller's data.
//! 2. A buffer in flight is owned by the ring's slab and by nobody else; dropping the ring cancels and drains first, because
//!    closing a ring does not stop what has started. If draining is impossible, the buffers are leaked, not freed.
//! 3. The completion queue cannot overflow: at most `depth` operations, `depth` cancellations and one wake are in
//!    flight, and the queue has room for all.
//! 4. After set-up the ring itself refuses everything but the few opcodes named here, on registered files only.
//!
//! It refuses to interpret results: short transfers, `EAGAIN` and meaning are the caller's ([`crate::backend`]).
//!
//! One thread makes and uses a ring (`SINGLE_ISSUER`), so [`Ring`] is not `Send`. Completions are posted when that thread
//! asks for them (`DEFER_TASKRUN`): no interrupts of the crypt stage by the kernel's own work.

use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use io_uring::register::Restriction;
use io_uring::types::{Fixed, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};
use slab::Slab;

use crate::error::{Error, ErrorKind, Result};
use crate::sys::buffer::{ArenaRef, Buf};
use crate::sys::op::{Submission, Transfer};

/// Most operations in flight on one ring.
pub const DEPTH_MAX: u32 = 4096;

/// Files that can be registered with one ring, besides its own eventfd.
pub const FILES_MAX: u32 = 256;

/// Index of the eventfd in the table of files; the caller's files follow.
const WAKE_FILE: u32 = 0;

/// `user_data` of the read that a wake completes. Slab keys stay below 2^32 with a 31-bit generation above, so neither tag
/// can be one.
const WAKE_TAG: u64 = u64::MAX;
/// `user_data` of every cancellation.
const CANCEL_TAG: u64 = u64::MAX - 1;

/// `IORING_REGISTER_FILES_UPDATE` (include/uapi/linux/io_uring.h): the only registration allowed once the ring runs.
const REGISTER_FILES_UPDATE: u8 = 6;

/// The opcodes a running ring accepts. The wake is a plain READ of the eventfd.
const OPCODES: [u8; 8] = [
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::ReadFixed::CODE,
    opcode::WriteFixed::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::PollAdd::CODE,
    opcode::AsyncCancel::CODE,
];

/// A submission that came back.
#[derive(Debug)]
pub struct Completion<T> {
    /// What was asked, with its buffer.
    pub submission: Submission,
    /// The caller's data.
    pub data: T,
    /// As the kernel gave it: a count, or a negative errno.
    pub result: i32,
    /// Its cancellation was asked for: do not submit the rest of it.
    pub cancelled: bool,
}

#[derive(Debug)]
struct InFlight<T> {
    submission: Submission,
    data: T,
    generation: u32,
    cancelled: bool,
    /// Cancelled, but the cancellation is not in the submission queue yet.
    cancel_unsent: bool,
}

/// See the module.
pub struct Ring<T> {
    // Order of fields is order of drop: the kernel's side first, then the memory it refers to.
    ring: IoUring,
    slots: Slab<InFlight<T>>,
    wake_value: Box<u64>,
    wake_fd: Arc<OwnedFd>,
    arena: ArenaRef,
    registered: u32,
    depth: usize,
    generation: u32,
    cancels_unsent: usize,
    cancels_in_flight: usize,
    wake_armed: bool,
    syscalls: u64,
    plain_because: Option<String>,
    /// One thread only.
    not_send: PhantomData<*const ()>,
}

impl<T> Ring<T> {
    /// A ring for `depth` operations in flight, made by the thread that will use it. Buffers of `arena` are registered as
    /// far as `RLIMIT_MEMLOCK` allows; transfers with the others work too.
    ///
    /// # Errors
    /// `Unsupported` or `Denied` when this host has no usable io_uring: blocked by sysctl or seccomp, or too old.
    pub fn new(arena: &ArenaRef, depth: u32) -> Result<Self> {
        assert!((1..=DEPTH_MAX).contains(&depth), "ring depth {depth} is not in 1..={DEPTH_MAX}");
        let (ring, plain_because) = build(depth)?;
        let params = ring.params();
        if !(params.is_feature_ext_arg()
            && params.is_feature_nodrop()
            && params.is_feature_rw_cur_pos()
            && params.is_feature_fast_poll())
        {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "io_uring of this kernel is too old (5.11 or later is needed)",
            ));
        }
        let wake_fd = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)
            .map_err(|errno| Error::io("cannot make an eventfd", errno))?;
        let mut files: Vec<RawFd> = vec![-1; 1 + FILES_MAX as usize];
        files[WAKE_FILE as usize] = wake_fd.as_raw_fd();
        let submitter = ring.submitter();
        submitter
            .register_files(&files)
            .map_err(|error| Error::io("cannot register files with io_uring", error))?;
        let registered = register_buffers(&submitter, arena);
        restrict_and_enable(&submitter)?;
        Ok(Self {
            ring,
            slots: Slab::with_capacity(depth as usize),
            wake_value: Box::new(0),
            wake_fd: Arc::new(wake_fd),
            arena: arena.clone(),
            registered,
            depth: depth as usize,
            generation: 0,
            cancels_unsent: 0,
            cancels_in_flight: 0,
            wake_armed: false,
            syscalls: 0,
            plain_because,
            not_send: PhantomData,
        })
    }

    /// Put a file at `index` of the table (`Some`), or empty the place (`None`). The kernel keeps its own reference.
    ///
    /// # Errors
    /// The kernel refuses the file (another io_uring, for example).
    pub fn set_file(&mut self, index: u32, file: Option<BorrowedFd<'_>>) -> Result<()> {
        assert!(index < FILES_MAX, "file {index} is beyond the table of {FILES_MAX}");
        let fd = file.map_or(-1, |file| file.as_raw_fd());
        self.syscalls += 1;
        self.ring
            .submitter()
            .register_files_update(index + 1 + WAKE_FILE, &[fd])
            .map_err(|error| Error::io("cannot register a file with io_uring", error))?;
        Ok(())
    }

    /// Queue a submission for the next [`Ring::enter`]. No system call.
    ///
    /// # Errors
    /// Everything comes back when `depth` operations are in flight.
    pub fn push(&mut self, submission: Submission, data: T) -> Result<(), (Submission, T)> {
        if self.slots.len() >= self.depth {
            return Err((submission, data));
        }
        self.generation = (self.generation + 1) & 0x7fff_ffff;
        let generation = self.generation;
        let key = self.slots.insert(InFlight {
            submission,
            data,
            generation,
            cancelled: false,
            cancel_unsent: false,
        });
        let entry = self.entry(key).user_data(user_data(key, generation));
        self.queue(&entry);
        Ok(())
    }

    /// The kernel's form of slot `key`.
    fn entry(&mut self, key: usize) -> squeue::Entry {
        let file_of = |index: u32| Fixed(index + 1 + WAKE_FILE);
        match &mut self.slots[key].submission {
            Submission::Transfer(Transfer { write, file, offset, buf, span }) => {
                let file = file_of(*file);
                let fixed = (self.arena.owns(buf) && buf.index() < self.registered)
                    .then(|| u16::try_from(buf.index()).expect("a ring registers at most 1024 buffers"));
                let length = span.end - span.start;
                let pointer = address(buf, span.start, span.end);
                match (*write, fixed) {
                    (false, None) => opcode::Read::new(file, pointer, length).offset(*offset).build(),
                    (true, None) => opcode::Write::new(file, pointer, length).offset(*offset).build(),
                    (false, Some(index)) => {
                        opcode::ReadFixed::new(file, pointer, length, index).offset(*offset).build()
                    }
                    (true, Some(index)) => {
                        opcode::WriteFixed::new(file, pointer, length, index).offset(*offset).build()
                    }
                }
            }
            Submission::Sync { file } => {
                opcode::Fsync::new(file_of(*file)).flags(io_uring::types::FsyncFlags::DATASYNC).build()
            }
            Submission::Punch { file, offset, len } => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                opcode::Fallocate::new(file_of(*file), *len).offset(*offset).mode(mode).build()
            }
            Submission::Poll { file, read } => {
                let events = if *read { libc::POLLIN } else { libc::POLLOUT };
                opcode::PollAdd::new(file_of(*file), u32::from(events.cast_unsigned())).build()
            }
        }
    }

    fn queue(&mut self, entry: &squeue::Entry) {
        // SAFETY: an entry refers to memory of a `Buf` that `self.slots` owns until its completion, or to `wake_value`,
        // which lives as long as the ring and is drained before it; `drop` drains or leaks both.
        let pushed = unsafe { self.ring.submission().push(entry) };
        pushed.expect("the submission queue has room for every operation, every cancellation and the wake");
    }

    /// Ask for the early end of everything in flight on a file. It takes effect with the next [`Ring::enter`].
    pub fn cancel_file(&mut self, file: u32) {
        self.cancel_where(|submission| submission.file() == file);
    }

    fn cancel_where(&mut self, wanted: impl Fn(&Submission) -> bool) {
        for (_, slot) in &mut self.slots {
            if !slot.cancelled && wanted(&slot.submission) {
                slot.cancelled = true;
                slot.cancel_unsent = true;
                self.cancels_unsent += 1;
            }
        }
    }

    /// Queue cancellations, never more than `depth` at a time.
    fn send_cancels(&mut self) {
        while self.cancels_unsent > 0 && self.cancels_in_flight < self.depth {
            let Some((key, slot)) = self.slots.iter_mut().find(|(_, slot)| slot.cancel_unsent) else {
                break;
            };
            slot.cancel_unsent = false;
            let target = user_data(key, slot.generation);
            self.cancels_unsent -= 1;
            self.cancels_in_flight += 1;
            // The ring demands the fixed-file flag on every entry, also where it means nothing.
            let entry = opcode::AsyncCancel::new(target).build();
            self.queue(&entry.flags(squeue::Flags::FIXED_FILE).user_data(CANCEL_TAG));
        }
    }

    fn arm_wake(&mut self) {
        if !self.wake_armed {
            self.wake_armed = true;
            let pointer = (&raw mut *self.wake_value).cast::<u8>();
            let entry = opcode::Read::new(Fixed(WAKE_FILE), pointer, 8).build().user_data(WAKE_TAG);
            self.queue(&entry);
        }
    }

    /// Hand over what is queued and, if `wait`, sleep until a completion, a wake or the deadline. One system call; none if
    /// there is nothing to hand over and nothing to wait for. An interrupting signal ends the wait early.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn enter(&mut self, wait: bool, deadline: Option<Instant>) -> Result<()> {
        self.send_cancels();
        if wait {
            self.arm_wake();
        }
        self.enter_now(wait, deadline)
    }

    fn enter_now(&mut self, wait: bool, deadline: Option<Instant>) -> Result<()> {
        {
            let submission = self.ring.submission();
            // With deferred task work, completions are posted only when asked for: the flag says that there are some.
            if !wait && submission.is_empty() && !submission.taskrun() {
                return Ok(());
            }
        }
        self.syscalls += 1;
        let result = if wait {
            let timeout =
                deadline.map(|deadline| Timespec::from(deadline.saturating_duration_since(Instant::now())));
            let mut arguments = SubmitArgs::new();
            if let Some(timeout) = &timeout {
                arguments = arguments.timespec(timeout);
            }
            self.ring.submitter().submit_with_args(1, &arguments)
        } else {
            self.ring.submit()
        };
        match result.map_err(|error| (error.raw_os_error(), error)) {
            Ok(_) | Err((Some(libc::ETIME | libc::EINTR), _)) => Ok(()),
            // The kernel is out of memory for requests just now; they stay queued.
            Err((Some(libc::EAGAIN | libc::EBUSY), _)) => {
                if wait {
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
                Ok(())
            }
            Err((_, error)) => Err(Error::io("io_uring failed", error)),
        }
    }

    /// Collect what has finished. No system call. `true` if a wake was among it.
    pub fn completions(&mut self, out: &mut Vec<Completion<T>>) -> bool {
        let mut woken = false;
        for entry in self.ring.completion() {
            match entry.user_data() {
                WAKE_TAG => {
                    self.wake_armed = false;
                    woken = true;
                }
                CANCEL_TAG => self.cancels_in_flight -= 1,
                tag => {
                    let key = usize::try_from(tag & 0xffff_ffff).expect("32 bits fit");
                    let slot = self.slots.remove(key);
                    assert_eq!(user_data(key, slot.generation), tag, "a completion for another generation");
                    if slot.cancel_unsent {
                        self.cancels_unsent -= 1;
                    }
                    out.push(Completion {
                        submission: slot.submission,
                        data: slot.data,
                        result: entry.result(),
                        cancelled: slot.cancelled,
                    });
                }
            }
        }
        woken
    }

    /// Is something queued that no `enter` has handed over yet?
    #[must_use]
    pub fn has_unsent(&mut self) -> bool {
        self.cancels_unsent > 0 || !self.ring.submission().is_empty()
    }

    /// Operations accepted and not yet collected.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.slots.len()
    }

    /// Most operations in flight.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.depth
    }

    /// Buffers registered: those of the arena with an index below this.
    #[must_use]
    pub fn buffers_registered(&self) -> u32 {
        self.registered
    }

    /// Why the kernel's cheapest mode is not in use, if it is not.
    #[must_use]
    pub fn plain_because(&self) -> Option<&str> {
        self.plain_because.as_deref()
    }

    /// System calls since set-up.
    #[must_use]
    pub fn syscalls(&self) -> u64 {
        self.syscalls
    }

    /// The handle that ends a wait.
    #[must_use]
    pub fn waker(&self) -> RingWaker {
        RingWaker(Arc::clone(&self.wake_fd))
    }

    /// Cancel everything and wait for the last completion. What is done already is thrown away.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn drain(&mut self) -> Result<()> {
        self.cancel_where(|_| true);
        let mut finished = Vec::new();
        while !self.slots.is_empty() || self.cancels_in_flight > 0 {
            self.send_cancels();
            self.enter_now(true, None)?;
            self.completions(&mut finished);
            finished.clear();
        }
        if self.wake_armed {
            self.waker().wake();
            while self.wake_armed {
                self.enter_now(true, None)?;
                self.completions(&mut finished);
            }
        }
        Ok(())
    }
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        if self.drain().is_err() {
            // The kernel may still write to them: memory that is never used again is the lesser evil.
            std::mem::forget(std::mem::take(&mut self.slots));
            std::mem::forget(std::mem::take(&mut self.wake_value));
        }
    }
}

/// Ends the wait of a ring from any thread.
#[derive(Debug, Clone)]
pub struct RingWaker(Arc<OwnedFd>);

impl RingWaker {
    /// The current or the next waiting [`Ring::enter`] returns.
    pub fn wake(&self) {
        // Blocks, or fails, only at 2^64 - 1 wakes that nobody took.
        let _ = rustix::io::write(self.0.as_fd(), &1u64.to_ne_bytes());
    }
}

fn user_data(key: usize, generation: u32) -> u64 {
    u64::from(generation) << 32 | u64::try_from(key).expect("a slab key is below the depth")
}

/// Where `buf[start..end]` lies, for the kernel to read or write.
fn address(buf: &mut Buf, start: u32, end: u32) -> *mut u8 {
    buf[start as usize..end as usize].as_mut_ptr()
}

/// A disabled ring in the best mode this kernel has, and why it is not the very best.
fn build(depth: u32) -> Result<(IoUring, Option<String>)> {
    // Operations, as many cancellations, the wake. The completion queue is made twice as long by the kernel.
    let entries = 2 * depth + 2;
    type Set = fn(&mut io_uring::Builder);
    let modes: [(&str, Set); 3] = [
        ("", |builder| {
            builder.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag().setup_submit_all();
        }),
        ("kernel before 6.1: no deferred task work", |builder| {
            builder.setup_coop_taskrun().setup_taskrun_flag().setup_submit_all();
        }),
        ("kernel before 5.19: no cooperative task work", |_| {}),
    ];
    for (because, set) in modes {
        let mut builder = IoUring::builder();
        builder.dontfork().setup_r_disabled().setup_clamp();
        set(&mut builder);
        match builder.build(entries) {
            Ok(ring) => return Ok((ring, (!because.is_empty()).then(|| because.to_owned()))),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(error) => {
                let what = match error.raw_os_error() {
                    Some(libc::EPERM | libc::EACCES) => {
                        "io_uring is forbidden here (sysctl io_uring_disabled, or seccomp)"
                    }
                    Some(libc::ENOSYS) => "this kernel has no io_uring",
                    Some(libc::ENOMEM) => "no memory for a ring (RLIMIT_MEMLOCK?)",
                    _ => "cannot set up io_uring",
                };
                return Err(Error::io(what, error));
            }
        }
    }
    Err(Error::new(ErrorKind::Unsupported, "io_uring of this kernel is too old"))
}

/// Register buffers one by one until the kernel says that it is enough. Returns how many.
fn register_buffers(submitter: &io_uring::Submitter<'_>, arena: &ArenaRef) -> u32 {
    // 1024 (UIO_MAXIOV) is all that kernels before 5.13 accept, and more than we use.
    let count = u32::try_from(arena.ranges().count()).unwrap_or(u32::MAX).min(1024);
    if submitter.register_buffers_sparse(count).is_err() {
        return 0;
    }
    for (index, (base, bytes)) in (0..count).zip(arena.ranges()) {
        let vector = libc::iovec { iov_base: base.cast(), iov_len: bytes };
        // SAFETY: the range is a buffer of the arena, whose mapping the ring keeps alive (`Ring::arena`) until after the
        // registration is gone with the ring's descriptor.
        if unsafe { submitter.register_buffers_update(index, &[vector], None) }.is_err() {
            return index;
        }
    }
    count
}

/// Lock the ring to the few things it is for, and start it.
fn restrict_and_enable(submitter: &io_uring::Submitter<'_>) -> Result<()> {
    let mut restrictions: Vec<Restriction> = OPCODES.into_iter().map(Restriction::sqe_op).collect();
    restrictions.push(Restriction::register_op(REGISTER_FILES_UPDATE));
    restrictions.push(Restriction::sqe_flags_allowed(squeue::Flags::FIXED_FILE.bits()));
    restrictions.push(Restriction::sqe_flags_required(squeue::Flags::FIXED_FILE.bits()));
    submitter
        .register_restrictions(&mut restrictions)
        .map_err(|error| Error::io("cannot restrict io_uring", error))?;
    submitter.register_enable_rings().map_err(|error| Error::io("cannot start io_uring", error))
}
