//! One transfer: what the workers need to know about a job, and what they report back.
//!
//! A job builds a [`Transfer`], hands it to the [`super::Pipeline`], and waits for its end. Workers share it read-only,
//! except for the atomics of its plan and gate, and for the slow-path report behind a lock that is taken once per worker,
//! at the end, or on a failure.

use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crossbeam::channel::{Receiver, Sender, bounded};

use crate::backend::device::Device;
use crate::error::Error;
use crate::pipeline::marks::Marks;
use crate::pipeline::plan::{Gate, Plan};
use crate::pipeline::rewrite::Rewrite;
use crate::pipeline::segment::Segments;
use crate::pipeline::slot::Side;
use crate::telemetry::record::{Counters, StageRecord, Totals};

/// Largest data unit of a volume, bytes: chunks are multiples of it, so that every data unit divides them.
pub const UNIT_BYTES_MAX: u32 = 4096;

/// What happens to a chunk between its read and its write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Plaintext in, ciphertext out.
    Encrypt,
    /// Ciphertext in, plaintext out.
    Decrypt,
    /// Plaintext on the source side, ciphertext on the sink side; compare, write nothing.
    Verify,
    /// Ciphertext in, other ciphertext out, in place: both sides are the same file. See [`crate::pipeline::rewrite`].
    Recrypt,
}

impl Work {
    /// Which side holds ciphertext; of a re-encryption, where both do, the side that is new.
    #[must_use]
    pub fn encrypted_side(self) -> Side {
        match self {
            Self::Decrypt => Side::Source,
            Self::Encrypt | Self::Verify | Self::Recrypt => Side::Sink,
        }
    }
}

/// One side of a transfer.
pub struct End {
    /// The open file.
    pub file: Arc<OwnedFd>,
    /// What the user calls it; for messages.
    pub name: String,
    /// Moved in order at the file's own position, not by offset.
    pub stream: bool,
    /// Offsets and lengths are multiples of this, bytes: the device's alignment for direct I/O, 1 when buffered.
    pub align: u32,
    /// Where to ask for holes; absent where there can be none.
    pub holes: Option<Arc<Device>>,
}

/// How zero plaintext and the end of the sink are treated.
#[derive(Debug, Clone, Copy, Default)]
pub struct SinkRules {
    /// The sink was created empty and will have its final length: what is not written reads as zeros.
    pub skip_zeros: bool,
    /// Bytes the sink can hold, if it cannot grow.
    pub capacity: Option<u64>,
}

/// What a job says about its transfer when it builds one.
pub struct TransferSpec {
    /// What to do with each chunk.
    pub work: Work,
    /// Where chunks come from.
    pub source: End,
    /// Where chunks go; for `Verify`, what they are compared with.
    pub sink: End,
    /// See [`SinkRules`].
    pub rules: SinkRules,
    /// A source ending inside a data unit is filled up with zeros.
    pub pad: bool,
    /// Holes of the encrypted side are holes of the plaintext.
    pub keep_holes: bool,
    /// Most chunks in flight on one worker. Of a re-encryption, whose chunks are held back in between: most reads, and most
    /// writes.
    pub depth: u32,
    /// The extents.
    pub plan: Plan,
}

/// One job's data path: its [`TransferSpec`], and what changes while it is carried.
pub struct Transfer {
    spec: TransferSpec,
    /// What may change while it runs.
    pub gate: Gate,
    /// Live counters, one per worker of the pipeline.
    pub counters: Box<[Counters]>,
    segments: OnceLock<Segments>,
    rewrite: OnceLock<Rewrite>,
    marks: OnceLock<Marks>,
    /// Where it began: what lies before was done by an earlier transfer.
    began_at: AtomicU64,
    report: Mutex<Report>,
    difference: AtomicU64,
    latch: Arc<Latch>,
    /// Receives one message when the last worker has left.
    pub ended: Receiver<()>,
}

/// Counts the workers that still carry a transfer. Outlives their hold on the transfer itself.
pub(super) struct Latch {
    parts: AtomicU32,
    finished: Sender<()>,
}

impl Latch {
    /// One worker has nothing of the transfer any more.
    pub(super) fn leave(&self) {
        if self.parts.fetch_sub(1, Ordering::AcqRel) == 1 {
            // Bounded by one message; the receiver may be gone when the daemon is leaving.
            let _ = self.finished.try_send(());
        }
    }
}

#[derive(Default)]
struct Report {
    failure: Option<Error>,
    record: Option<StageRecord>,
    padded_bytes: u64,
    syscalls: u64,
}

impl Deref for Transfer {
    type Target = TransferSpec;

    fn deref(&self) -> &TransferSpec {
        &self.spec
    }
}

impl Transfer {
    /// A transfer for a pipeline of `workers` workers.
    #[must_use]
    pub fn new(spec: TransferSpec, workers: usize) -> Arc<Self> {
        assert!(spec.depth > 0, "a transfer needs a chunk in flight");
        assert!(spec.plan.chunk_bytes().is_multiple_of(UNIT_BYTES_MAX.into()), "data units divide a chunk");
        assert!(spec.plan.chunk_bytes().is_multiple_of(spec.source.align.into()));
        assert!(spec.plan.chunk_bytes().is_multiple_of(spec.sink.align.into()));
        let (finished, ended) = bounded(1);
        Arc::new(Self {
            spec,
            gate: Gate::default(),
            counters: (0..workers).map(|_| Counters::default()).collect(),
            segments: OnceLock::new(),
            rewrite: OnceLock::new(),
            marks: OnceLock::new(),
            began_at: AtomicU64::new(0),
            report: Mutex::default(),
            difference: AtomicU64::new(u64::MAX),
            latch: Arc::new(Latch { parts: AtomicU32::new(0), finished }),
            ended,
        })
    }

    /// One of its ends is moved in order, so one worker carries all of it.
    #[must_use]
    pub fn is_ordered(&self) -> bool {
        self.source.stream || self.sink.stream
    }

    /// It compares and writes nothing.
    #[must_use]
    pub fn is_verify(&self) -> bool {
        self.work == Work::Verify
    }

    /// The encrypted side is known now: to be said once, before workers begin.
    ///
    /// # Panics
    /// If it was said before.
    pub fn set_segments(&self, segments: Segments) {
        assert!(self.segments.set(segments).is_ok(), "a transfer's segments are set once");
    }

    /// The encrypted side.
    ///
    /// # Panics
    /// Before [`Transfer::set_segments`].
    #[must_use]
    pub fn segments(&self) -> &Segments {
        self.segments.get().expect("segments are set before workers begin")
    }

    /// How a re-encryption goes: to be said once, before workers begin.
    ///
    /// # Panics
    /// If it was said before, or of a transfer that does something else.
    pub fn set_rewrite(&self, rewrite: Rewrite) {
        assert!(self.work == Work::Recrypt, "only a re-encryption rewrites");
        assert!(self.rewrite.set(rewrite).is_ok(), "a transfer's rewrite is set once");
    }

    /// How a re-encryption goes.
    ///
    /// # Panics
    /// Before [`Transfer::set_rewrite`].
    #[must_use]
    pub fn rewrite(&self) -> &Rewrite {
        self.rewrite.get().expect("a rewrite is set before workers begin")
    }

    /// Keep account of how far it has come without a gap. To be said before workers begin, if anybody asks.
    pub fn keep_marks(&self) {
        let _ = self.marks.set(Marks::new(self.counters.len()));
    }

    /// The account, if it is kept.
    #[must_use]
    pub fn marks(&self) -> Option<&Marks> {
        self.marks.get()
    }

    /// Begin at this byte of plaintext: what lies before is in the sink. Before workers begin.
    pub fn start_at(&self, offset: u64) {
        self.plan.start_at(offset);
        self.began_at.store(offset, Ordering::Release);
    }

    /// Where it began.
    #[must_use]
    pub fn began_at(&self) -> u64 {
        self.began_at.load(Ordering::Acquire)
    }

    /// Where plaintext byte `at` lies on one side.
    #[must_use]
    pub fn place(&self, side: Side, at: u64) -> u64 {
        if self.work == Work::Recrypt {
            let rewrite = self.rewrite();
            return if side == Side::Source { rewrite.old.place(at) } else { rewrite.new.place(at) };
        }
        if side == self.work.encrypted_side() { self.segments().place(at) } else { at }
    }

    fn report(&self) -> std::sync::MutexGuard<'_, Report> {
        self.report.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first failure wins and shuts the gate; later ones are its echoes. Workers see it at their next turn: wake them.
    ///
    /// Once a worker has seen it, as once it has seen [`Gate::stop`], it starts no further write. What a re-encryption holds is let go
    /// of unwritten; writes in flight still come back and are reported. What of that is durable, and what the device says of it
    /// next time, is the business of who moves the barriers.
    pub fn fail(&self, error: Error) {
        self.report().failure.get_or_insert(error);
        self.gate.stop();
    }

    /// A read failed, or gave less than there was. As [`Transfer::fail`], but of a re-encryption the gate stays as it is: what may be
    /// overwritten by now must be, and whoever moves the barriers shuts the gate when that is done.
    pub fn fail_read(&self, error: Error) {
        if self.work == Work::Recrypt {
            self.report().failure.get_or_insert(error);
        } else {
            self.fail(error);
        }
    }

    /// Has something failed?
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.report().failure.is_some()
    }

    /// Plaintext differs at `offset`. The lowest offset reported stands; chunks before it are still compared.
    pub fn differs_at(&self, offset: u64) {
        self.difference.fetch_min(offset, Ordering::AcqRel);
        self.plan.end_at(offset);
    }

    /// The first difference found.
    #[must_use]
    pub fn first_difference(&self) -> Option<u64> {
        let offset = self.difference.load(Ordering::Acquire);
        (offset != u64::MAX).then_some(offset)
    }

    /// Zero bytes were appended to the source.
    pub fn padded(&self, bytes: u64) {
        self.report().padded_bytes += bytes;
    }

    /// `parts` workers are about to take part.
    pub(super) fn begin(&self, parts: u32) {
        self.latch.parts.store(parts, Ordering::Release);
    }

    /// What a worker that is about to leave has recorded.
    pub(super) fn keep(&self, record: &StageRecord, syscalls: u64) {
        let mut report = self.report();
        report.syscalls += syscalls;
        match &mut report.record {
            Some(sum) => sum.merge(record),
            none => *none = Some(record.clone()),
        }
    }

    /// To be left when the transfer has been let go of.
    pub(super) fn latch(&self) -> Arc<Latch> {
        self.latch.clone()
    }

    /// Take the failure, once the transfer has ended.
    #[must_use]
    pub fn take_failure(&self) -> Option<Error> {
        self.report().failure.take()
    }

    /// Zero bytes appended by `pad`.
    #[must_use]
    pub fn padded_bytes(&self) -> u64 {
        self.report().padded_bytes
    }

    /// Stage statistics of the workers that have left, and their system calls.
    #[must_use]
    pub fn final_record(&self) -> (StageRecord, u64) {
        let report = self.report();
        (report.record.clone().unwrap_or_default(), report.syscalls)
    }

    /// What has been done so far, over all workers.
    #[must_use]
    pub fn totals(&self) -> Totals {
        let mut totals = Totals::default();
        for counters in &self.counters {
            counters.add_to(&mut totals);
        }
        totals
    }
}
