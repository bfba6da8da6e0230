//! Who claims the next chunk, and with which buffers.

use std::time::Instant;

use super::{Active, Attempt, CLAIMS_PER_TURN, ORDERED_RESERVE, ORDERED_SLOTS_MAX, Worker};
use crate::pipeline::plan::{Admission, Claim};
use crate::pipeline::slot::{Fill, Side, Slot, State};

impl Worker {
    /// Let transfers claim in turn, one chunk each, until no buffer is free or nobody wants one. Returns when to look
    /// again at the latest.
    pub(super) fn claim_all(&mut self) -> Option<Instant> {
        let mut deadline: Option<Instant> = None;
        let count = self.active.len();
        // Paused ones that hold nothing need no share.
        let wants = |active: &&Active| {
            // Nor those with buffers of their own.
            active.own.is_none() && (active.slots > 0 || active.transfer.gate.admit() != Admission::Paused)
        };
        let running = self.active.iter().flatten().filter(wants).count().max(1);
        // A quarter of the buffers stays for newcomers, which need not wait for chunks in flight.
        let share = (self.buffers / running).clamp(1, (self.buffers * 3 / 4).max(1));
        let mut idle = 0;
        let mut claims = 0;
        while idle < count {
            let at = self.turn % count;
            self.turn = (at + 1) % count;
            match self.claim(at, share) {
                Attempt::Started => {
                    idle = 0;
                    claims += 1;
                    if claims >= CLAIMS_PER_TURN {
                        return Some(Instant::now());
                    }
                }
                Attempt::Idle => idle += 1,
                Attempt::Later(when) => {
                    idle += 1;
                    deadline = Some(deadline.map_or(when, |earlier| earlier.min(when)));
                }
            }
        }
        deadline
    }

    fn claim(&mut self, at: usize, share: usize) -> Attempt {
        let Some(active) = &mut self.active[at] else { return Attempt::Idle };
        let rewrites = active.own.is_some();
        let transfer = active.transfer.clone();
        if active.exhausted || transfer.plan.is_exhausted() {
            // Also without a free buffer: others may hold them for ever, and this transfer can leave.
            active.exhausted = true;
            return Attempt::Idle;
        }
        if rewrites {
            return self.claim_rewrite(at);
        }
        let verify = transfer.is_verify();
        let needed = if verify { 2 } else { 1 };
        let ordered = transfer.is_ordered();
        let slots_max =
            if ordered { (self.buffers / 8).clamp(1, ORDERED_SLOTS_MAX) } else { (share / needed).max(1) };
        let ordered_max = self.buffers - ORDERED_RESERVE.min(self.buffers - needed);
        if self.free.len() < needed
            || (ordered && self.ordered_buffers + needed > ordered_max)
            || active.slots >= transfer.depth
            || active.slots as usize >= slots_max
            || (transfer.source.stream && active.reading[Side::Source as usize])
            || (verify && transfer.sink.stream && active.reading[Side::Sink as usize])
        {
            return Attempt::Idle;
        }
        match transfer.gate.admit() {
            Admission::Open => {}
            Admission::NotBefore(when) => return Attempt::Later(when),
            Admission::Paused | Admission::Stopped => return Attempt::Idle,
        }
        let extent = match active.claim_chunk(self.index) {
            Claim::Extent(extent) => extent,
            Claim::Blocked => return Attempt::Idle,
            Claim::Exhausted => {
                active.exhausted = true;
                return Attempt::Idle;
            }
        };
        transfer.gate.charge(extent.len());
        let fill = active.holes.fill_of(&transfer, extent);
        let counters = &transfer.counters[self.index];
        if fill != Fill::Read {
            counters.add_hole(extent.len());
        }
        if fill == Fill::Kept && (verify || transfer.rules.skip_zeros) {
            // Zero plaintext that a hole holds already (or that is compared with one): nothing moves.
            counters.add_sparse(if verify { 0 } else { extent.len() });
            counters.add_done(extent.len());
            active.mark_finished(self.index, extent.start());
            return Attempt::Started;
        }
        active.slots += 1;
        if ordered {
            self.ordered_buffers += needed;
        }
        let key = self.slots.insert(Slot {
            active: at,
            extent,
            source_len: u32::try_from(extent.len()).expect("a chunk fits a buffer"),
            sink_len: 0,
            doomed: false,
            fill,
            state: State::Reading { source: false, sink: !verify },
            since: Instant::now(),
            proof: None,
            buf: self.free.pop(),
            other: if verify { self.free.pop() } else { None },
        });
        if verify {
            self.read(key, Side::Sink);
        }
        if fill == Fill::Read {
            self.read(key, Side::Source);
        } else {
            let slot = &mut self.slots[key];
            let len = slot.source_len;
            slot.buf.as_mut().expect("nothing is in flight")[..len as usize].fill(0);
            self.arrived(key, Side::Source, len, Instant::now());
        }
        Attempt::Started
    }
}
