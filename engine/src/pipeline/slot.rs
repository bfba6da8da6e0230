//! One chunk in flight: its extent, its buffers, and where it stands.
//!
//! ```text
//!            ┌─────────── hole: nothing to read ───────────┐
//! claimed ─▶ Reading(one side, or both to verify) ─▶ Ready ─▶ (crypt) ─▶ Turn ─▶ Writing(runs) ─▶ released
//!                                                                         └ ordered sinks wait for their turn
//!
//! A chunk that is rewritten in place waits behind barriers:
//!
//! claimed ─▶ Reading ─▶ Ready ─▶ (crypt) ─────────────────────────────────▶ Held(write) ─▶ Writing ─▶ released
//!                             ╲▶ Held(journal) ─▶ Journalling ─▶ Held(write) ─▶ (crypt) ─▶ Writing ─▶ released
//! ```
//! The buffers are in the slot when nothing is in flight, and travel with the operation when something is.

use std::time::Instant;

use crate::backend::Span;
use crate::pipeline::zeros::Runs;
use crate::sys::buffer::Buf;
use crate::units::Extent;

/// Which side of a transfer an operation belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The source: the volume being read.
    Source,
    /// The sink: written, or (when verifying) read.
    Sink,
}

/// Where a slot stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Reads are in flight, or must wait for their turn on an ordered side.
    Reading {
        /// The source side has arrived (or needed no read).
        source: bool,
        /// The sink side has arrived (or is not read at all).
        sink: bool,
    },
    /// Everything is here; waits for the core.
    Ready,
    /// Crypted; waits for its turn on an ordered sink.
    Turn {
        /// What it will write.
        runs: Runs,
    },
    /// Waits for a barrier; its key lies in the heap of its transfer.
    Held(Hold),
    /// Its old bytes are on their way to the journal.
    Journalling {
        /// What is being written.
        span: Span,
    },
    /// A write is in flight.
    Writing {
        /// What is being written.
        span: Span,
        /// What is left after it.
        rest: Runs,
    },
}

/// What a chunk that is rewritten in place waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    /// That its old bytes may be put into the journal.
    Journal,
    /// That it may be overwritten.
    Write,
}

/// How a chunk's source bytes come to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// By reading.
    Read,
    /// The source is a hole here: zeros, to be crypted like any others.
    Hole,
    /// The encrypted side is a hole here and the user says that it was never written: zero plaintext, no crypt.
    Kept,
}

/// One chunk in flight.
#[derive(Debug)]
pub struct Slot {
    /// Index of its transfer in the worker's table.
    pub active: usize,
    /// The extent claimed. A stream's may turn out shorter.
    pub extent: Extent,
    /// Bytes of source in it; less than the extent only at a stream's end.
    pub source_len: u32,
    /// Bytes the sink side gave, when verifying.
    pub sink_len: u32,
    /// One of its operations failed; released when the other has come back.
    pub doomed: bool,
    /// How its source bytes come to be.
    pub fill: Fill,
    /// Where it stands.
    pub state: State,
    /// When it got there.
    pub since: Instant,
    /// Its contribution to a digest of plaintext, until that is told.
    pub proof: Option<[u8; 32]>,
    /// The source side's bytes, crypted in place.
    pub buf: Option<Buf>,
    /// The sink side's bytes, when verifying.
    pub other: Option<Buf>,
}

impl Slot {
    /// Time since the last mark; sets a new one.
    pub fn lap(&mut self, now: Instant) -> std::time::Duration {
        let lap = now.saturating_duration_since(self.since);
        self.since = now;
        lap
    }

    /// One side's read has arrived.
    ///
    /// # Panics
    /// If no read was expected: the queue returned an operation twice.
    pub fn arrived(&mut self, side: Side) {
        let (source, sink) = match (&self.state, side) {
            (State::Reading { source: false, sink }, Side::Source) => (true, *sink),
            (State::Reading { source, sink: false }, Side::Sink) => (*source, true),
            (state, side) => panic!("a read of the {side:?} side arrived at a slot in state {state:?}"),
        };
        self.state = if source && sink { State::Ready } else { State::Reading { source, sink } };
    }

    /// Take the source side's buffer for an operation.
    ///
    /// # Panics
    /// If it is in flight already.
    pub fn take_buf(&mut self) -> Buf {
        self.buf.take().expect("the buffer is in the slot while nothing is in flight")
    }

    /// Take the sink side's buffer for an operation.
    ///
    /// # Panics
    /// If it is in flight already.
    pub fn take_other(&mut self) -> Buf {
        self.other.take().expect("a verifying slot has a second buffer while nothing is in flight")
    }
}
