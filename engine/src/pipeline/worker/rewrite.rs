//! Chunks that are rewritten in place: held in buffers of the transfer's own, in order, until the barriers let them pass.
//!
//! What is in flight of such a transfer is bounded by its depth, and that of all of them by what the queue holds beyond the
//! operations of the worker's own buffers: half of it is for reads and half for writes, so that neither waits for the other.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Instant;

use proto::Stage;

use super::{Attempt, Worker};
use crate::backend::{Port, Position, What};
use crate::error::{Error, Result};
use crate::pipeline::plan::{Admission, Claim};
use crate::pipeline::rewrite::News;
use crate::pipeline::slot::{Fill, Hold, Side, Slot, State};
use crate::pipeline::zeros::Runs;
use crate::sys::buffer::Buf;

/// Chunks that wait for the same barrier: where they stand in the plan, and their key; the first in the plan comes first.
type Waiting = BinaryHeap<Reverse<(u64, usize)>>;

/// What one worker has of a transfer that rewrites a device in place.
pub(super) struct Own {
    /// Buffers of this transfer alone. Wiped and unmapped with the last of them.
    free: Vec<Buf>,
    pub(super) journal: Option<Port>,
    to_journal: Waiting,
    to_write: Waiting,
    /// In flight.
    reads: u32,
    writes: u32,
}

impl Own {
    pub(super) fn new(free: Vec<Buf>, journal: Option<Port>) -> Self {
        assert!(!free.is_empty(), "a rewrite brings its own buffers");
        let waiting = || Waiting::with_capacity(free.len());
        let (to_journal, to_write) = (waiting(), waiting());
        Self { free, journal, to_journal, to_write, reads: 0, writes: 0 }
    }

    pub(super) fn give_back(&mut self, buf: Option<Buf>) {
        self.free.extend(buf);
    }

    /// Nobody waits any more: who did is being released.
    pub(super) fn forget_waiting(&mut self) {
        self.to_journal.clear();
        self.to_write.clear();
    }
}

impl Worker {
    /// Reads, or writes, that all rewrites together may have in flight.
    fn own_limit(&self) -> u32 {
        (self.spare / 2).max(1)
    }

    /// And one of them.
    fn own_share(&self) -> u32 {
        let rewrites = self.active.iter().flatten().filter(|active| active.own.is_some()).count().max(1);
        (self.own_limit() / u32::try_from(rewrites).unwrap_or(u32::MAX)).max(1)
    }

    /// As [`Worker::claim`], for a transfer with buffers of its own.
    pub(super) fn claim_rewrite(&mut self, at: usize) -> Attempt {
        let (limit, share) = (self.own_limit(), self.own_share());
        let Some(active) = &mut self.active[at] else { return Attempt::Idle };
        let own = active.own.as_mut().expect("a rewrite has buffers");
        let transfer = &active.transfer;
        if own.free.is_empty() || own.reads >= share.min(transfer.depth) || self.own_reads >= limit {
            return Attempt::Idle;
        }
        let urgent = transfer.plan.is_urgent();
        match transfer.gate.admit() {
            Admission::Open => {}
            Admission::NotBefore(_) | Admission::Paused if urgent => {}
            Admission::NotBefore(when) => return Attempt::Later(when),
            Admission::Paused | Admission::Stopped => return Attempt::Idle,
        }
        let extent = match transfer.plan.claim() {
            Claim::Extent(extent) => extent,
            Claim::Blocked => return Attempt::Idle,
            Claim::Exhausted => {
                active.exhausted = true;
                return Attempt::Idle;
            }
        };
        transfer.gate.charge(extent.len());
        active.slots += 1;
        own.reads += 1;
        self.own_reads += 1;
        let key = self.slots.insert(Slot {
            active: at,
            extent,
            source_len: u32::try_from(extent.len()).expect("a chunk fits a buffer"),
            sink_len: 0,
            doomed: false,
            fill: Fill::Read,
            state: State::Reading { source: false, sink: true },
            since: Instant::now(),
            proof: None,
            buf: own.free.pop(),
            other: None,
        });
        self.read(key, Side::Source);
        Attempt::Started
    }

    /// An operation of a rewrite has come back.
    pub(super) fn own_landed(&mut self, at: usize, write: bool) {
        let own = self.active[at].as_mut().and_then(|active| active.own.as_mut());
        let Some(own) = own else { return };
        let (one, all) = if write {
            (&mut own.writes, &mut self.own_writes)
        } else {
            (&mut own.reads, &mut self.own_reads)
        };
        *one -= 1;
        *all -= 1;
    }

    /// The old bytes are here.
    pub(super) fn rewrite(&mut self, key: usize) {
        let slot = &mut self.slots[key];
        let active = self.active[slot.active].as_mut().expect("a slot's transfer is active");
        let transfer = active.transfer.clone();
        let counters = &transfer.counters[self.index];
        let bytes = slot.source_len;
        active.record.record(counters, Stage::Queue, slot.lap(Instant::now()), bytes.into());
        let rewrite = transfer.rewrite();
        let buf = slot.buf.as_mut().expect("nothing is in flight");
        let chunk = &mut buf[..bytes as usize];
        let checksums = rewrite.checksums.as_ref().map(|hash| hash.checksums(chunk)).unwrap_or_default();
        let journal = rewrite.journal.is_some() && !rewrite.read_only;
        let proof = if journal { None } else { rewrite.crypt(slot.extent, chunk) };
        active.record.record(counters, Stage::Crypt, slot.lap(Instant::now()), bytes.into());
        let extent = slot.extent;
        if rewrite.read_only {
            counters.add_done(bytes.into());
            self.release(key);
            rewrite.tell(News::Arrived { extent, checksums, proof });
            return;
        }
        let at = slot.active;
        self.hold(key, if journal { Hold::Journal } else { Hold::Write });
        rewrite.tell(News::Arrived { extent, checksums, proof });
        // The barrier may be open already.
        while self.pass(at) {}
    }

    fn hold(&mut self, key: usize, hold: Hold) {
        let slot = &mut self.slots[key];
        let active = self.active[slot.active].as_mut().expect("a slot's transfer is active");
        let own = active.own.as_mut().expect("a rewrite has buffers");
        slot.state = State::Held(hold);
        let waiting = match hold {
            Hold::Journal => &mut own.to_journal,
            Hold::Write => &mut own.to_write,
        };
        waiting.push(Reverse((active.transfer.plan.order_of(slot.extent).0, key)));
    }

    /// Let chunks pass whose barriers have moved; each transfer has its turn to be first.
    pub(super) fn pass_all(&mut self) -> Result<()> {
        let count = self.active.len();
        for offset in 0..count {
            let at = (self.turn + offset) % count;
            while self.pass(at) {
                let journal = self.active[at].as_ref().and_then(|active| active.own.as_ref()?.journal);
                if journal.is_some() {
                    // With a journal the chunk has just been crypted: the device works while the next one is.
                    self.queue.kick()?;
                }
            }
        }
        Ok(())
    }

    /// Let the first chunk that waits pass its barrier, if that and the depth allow it.
    fn pass(&mut self, at: usize) -> bool {
        let (limit, share) = (self.own_limit(), self.own_share());
        let Some(active) = &mut self.active[at] else { return false };
        let Some(own) = &mut active.own else { return false };
        let transfer = &active.transfer;
        if own.writes >= share.min(transfer.depth) || self.own_writes >= limit || transfer.gate.is_stopped() {
            return false;
        }
        if let Some(&Reverse((_, key))) = own.to_write.peek()
            && transfer.plan.may_write(self.slots[key].extent)
        {
            own.to_write.pop();
            self.overwrite(key);
            return true;
        }
        if let Some(&Reverse((_, key))) = own.to_journal.peek()
            && let Some(place) = transfer.plan.journal_place(self.slots[key].extent)
        {
            own.to_journal.pop();
            self.write_journal(key, place);
            return true;
        }
        false
    }

    /// What protects the chunk is durable: new bytes over old ones.
    fn overwrite(&mut self, key: usize) {
        let slot = &mut self.slots[key];
        let active = self.active[slot.active].as_mut().expect("a slot's transfer is active");
        let transfer = active.transfer.clone();
        let rewrite = transfer.rewrite();
        // What it waited for was no work of anybody's here.
        slot.since = Instant::now();
        if rewrite.journal.is_some() {
            let buf = slot.buf.as_mut().expect("nothing is in flight");
            slot.proof = rewrite.crypt(slot.extent, &mut buf[..slot.source_len as usize]);
            let counters = &transfer.counters[self.index];
            let lap = slot.lap(Instant::now());
            active.record.record(counters, Stage::Crypt, lap, slot.source_len.into());
        }
        let mut rest = Runs::whole(slot.source_len);
        let span = rest.pop().expect("a chunk has bytes");
        slot.state = State::Writing { span: span.clone(), rest };
        let position = Position::At(rewrite.new.place(slot.extent.start()));
        let buf = slot.take_buf();
        let port = active.sink;
        self.count_write(key);
        self.push(key, Side::Sink, port, What::Write { position, buf, span });
    }

    /// The area is free: old bytes into the journal.
    fn write_journal(&mut self, key: usize, place: u64) {
        let slot = &mut self.slots[key];
        let active = self.active[slot.active].as_mut().expect("a slot's transfer is active");
        let transfer = active.transfer.clone();
        let journal = transfer.rewrite().journal.as_ref().expect("only a chunk for the journal waits for it");
        let port = active.own.as_ref().and_then(|own| own.journal).expect("the journal is attached");
        slot.since = Instant::now();
        let len = slot.source_len;
        let span = 0..len.next_multiple_of(journal.align);
        let mut buf = slot.take_buf();
        buf[len as usize..span.end as usize].fill(0);
        slot.state = State::Journalling { span: span.clone() };
        self.count_write(key);
        let position = Position::At(journal.offset + place);
        self.push(key, Side::Sink, port, What::Write { position, buf, span });
    }

    /// The chunk is new.
    pub(super) fn written(&mut self, key: usize) {
        let Slot { active: at, extent, proof, .. } = self.slots[key];
        let active = self.active[at].as_ref().expect("a slot's transfer is active");
        let transfer = active.transfer.clone();
        self.release(key);
        transfer.rewrite().tell(News::Written { extent, proof });
    }

    fn count_write(&mut self, key: usize) {
        let at = self.slots[key].active;
        let active = self.active[at].as_mut().expect("a slot's transfer is active");
        active.own.as_mut().expect("a rewrite has buffers").writes += 1;
        self.own_writes += 1;
    }

    /// The journal has the old bytes, or could not take them.
    pub(super) fn journalled(&mut self, key: usize, result: std::io::Result<u32>, reaped: Instant) {
        let slot = &mut self.slots[key];
        let State::Journalling { span } = slot.state.clone() else {
            panic!("a slot in state {:?} is not on its way to the journal", slot.state);
        };
        let active = self.active[slot.active].as_mut().expect("a slot's transfer is active");
        let transfer = active.transfer.clone();
        let rewrite = transfer.rewrite();
        match result {
            Err(cause) => {
                let name = rewrite.journal.as_ref().map_or("", |journal| &journal.name);
                transfer.fail(Error::io("cannot write the journal", cause).at(name));
                self.release(key);
            }
            Ok(bytes) => {
                assert_eq!(bytes, span.end - span.start, "a write is whole when it comes back");
                let counters = &transfer.counters[self.index];
                active.record.record(counters, Stage::Write, slot.lap(reaped), bytes.into());
                let extent = slot.extent;
                self.hold(key, Hold::Write);
                rewrite.tell(News::Journalled { extent });
            }
        }
    }
}
