//! A chunk on its way: read, crypt, write.

use std::time::Instant;

use proto::Stage;

use super::Worker;
use crate::backend::{Done, Op, Port, Position, Refused, What};
use crate::error::{Error, ErrorKind};
use crate::pipeline::crypt::transform;
use crate::pipeline::slot::{Side, State};
use crate::pipeline::transfer::{End, Transfer};
use crate::units::Extent;

impl Worker {
    /// Start one side's read.
    pub(super) fn read(&mut self, key: usize, side: Side) {
        let slot = &mut self.slots[key];
        let active = self.active[slot.active].as_mut().expect("a slot's transfer is active");
        let transfer = active.transfer.clone();
        let (end, port, buf, wanted) = match side {
            Side::Source => (&transfer.source, active.source, slot.take_buf(), slot.source_len),
            Side::Sink => {
                let unit = transfer.segments().at(slot.extent.start()).unit_bytes;
                let whole = slot.source_len.next_multiple_of(unit);
                (&transfer.sink, active.sink, slot.take_other(), whole)
            }
        };
        let (position, span) = if end.stream {
            active.reading[side as usize] = true;
            (Position::Stream, 0..wanted)
        } else {
            // Direct reads ask for whole blocks; at the end of a file fewer bytes come back.
            (Position::At(transfer.place(side, slot.extent.start())), 0..wanted.next_multiple_of(end.align))
        };
        self.push(key, side, port, What::Read { position, buf, span });
    }

    pub(super) fn push(&mut self, key: usize, side: Side, port: Port, what: What) {
        let token = (key as u64) << 1 | u64::from(side == Side::Sink);
        if let Err((refused, _)) = self.queue.push(Op { token, port, what }) {
            // A slot has at most one operation per buffer in flight, and those with buffers of their own are counted.
            match refused {
                Refused::Full => panic!("the queue is smaller than the worker's slots"),
                Refused::UnknownPort => panic!("an active transfer's port is not attached"),
            }
        }
    }

    pub(super) fn complete(&mut self, done: Done, reaped: Instant) {
        let key = usize::try_from(done.token >> 1).expect("a slab key");
        let side = if done.token & 1 == 1 { Side::Sink } else { Side::Source };
        let slot = &self.slots[key];
        let at = slot.active;
        let write = !matches!(slot.state, State::Reading { .. });
        self.own_landed(at, write);
        let slot = &mut self.slots[key];
        let active = self.active[at].as_mut().expect("a slot's transfer is active");
        let transfer = active.transfer.clone();
        let counters = &transfer.counters[self.index];
        match &slot.state {
            State::Reading { .. } => {
                active.reading[side as usize] = false;
                let end = match side {
                    Side::Source => {
                        slot.buf = done.buf;
                        &transfer.source
                    }
                    Side::Sink => {
                        slot.other = done.buf;
                        &transfer.sink
                    }
                };
                let bytes = done.result.unwrap_or_else(|cause| {
                    transfer.fail_read(Error::io("read failed", cause).at(place(
                        &transfer,
                        side,
                        end,
                        slot.extent,
                    )));
                    slot.doomed = true;
                    0
                });
                let lap = reaped.saturating_duration_since(slot.since);
                active.record.record(counters, Stage::Read, lap, bytes.into());
                self.arrived(key, side, bytes, reaped);
            }
            State::Writing { span, .. } => {
                slot.buf = done.buf;
                active.writing = false;
                match done.result {
                    Err(cause) => {
                        transfer.fail(write_error(&transfer, cause, slot.extent));
                        self.release(key);
                    }
                    Ok(bytes) => {
                        assert_eq!(bytes, span.end - span.start, "a write is whole when it comes back");
                        active.record.record(counters, Stage::Write, slot.lap(reaped), bytes.into());
                        self.write(key);
                    }
                }
            }
            State::Journalling { .. } => {
                slot.buf = done.buf;
                self.journalled(key, done.result, reaped);
            }
            other => panic!("a completion for a slot in state {other:?}"),
        }
    }

    /// One side of a chunk is here, `bytes` long; when both are, it is crypted.
    pub(super) fn arrived(&mut self, key: usize, side: Side, bytes: u32, when: Instant) {
        let slot = &mut self.slots[key];
        let active = self.active[slot.active].as_mut().expect("a slot's transfer is active");
        let transfer = &active.transfer;
        match side {
            Side::Source if bytes < slot.source_len && !slot.doomed => {
                let ends_at = slot.extent.start() + u64::from(bytes);
                if transfer.source.stream {
                    transfer.plan.end_at(ends_at);
                    active.exhausted = true;
                    slot.source_len = bytes;
                } else {
                    let was = transfer.plan.end().unwrap_or(u64::MAX);
                    let what =
                        format!("source shrank while it was read: it ends at byte {ends_at}, it had {was}");
                    transfer.fail_read(Error::new(ErrorKind::Io, what).at(&transfer.source.name));
                    slot.doomed = true;
                }
            }
            Side::Source => {}
            Side::Sink => slot.sink_len = bytes,
        }
        slot.arrived(side);
        if slot.state != State::Ready {
            return;
        }
        let verify_rest = transfer.is_verify() && slot.sink_len > 0;
        if slot.doomed || transfer.gate.is_stopped() || (slot.source_len == 0 && !verify_rest) {
            self.release(key);
        } else {
            slot.since = when;
            if active.own.is_some() {
                self.rewrite(key);
            } else {
                self.crypt(key);
            }
        }
    }

    /// Encrypt, decrypt or compare in place, and go on to the write.
    fn crypt(&mut self, key: usize) {
        let slot = &mut self.slots[key];
        let active = self.active[slot.active].as_mut().expect("a slot's transfer is active");
        let transfer = active.transfer.clone();
        let counters = &transfer.counters[self.index];
        active.record.record(counters, Stage::Queue, slot.lap(Instant::now()), slot.source_len.into());
        let runs = match transform(&transfer, counters, &mut active.holes, slot) {
            Ok(runs) => runs,
            Err(error) => {
                transfer.fail(error);
                self.release(key);
                return;
            }
        };
        let lap = slot.lap(Instant::now());
        active.record.record(counters, Stage::Crypt, lap, slot.source_len.into());
        match runs {
            None => self.finish(key),
            Some(runs) if transfer.sink.stream => {
                if active.sink_turn == slot.extent.start() && !active.writing {
                    slot.state = State::Writing { span: 0..0, rest: runs };
                    self.write(key);
                } else {
                    slot.state = State::Turn { runs };
                }
            }
            Some(runs) => {
                slot.state = State::Writing { span: 0..0, rest: runs };
                self.write(key);
            }
        }
    }

    /// Write the next run, or be finished.
    pub(super) fn write(&mut self, key: usize) {
        let slot = &mut self.slots[key];
        let active = self.active[slot.active].as_mut().expect("a slot's transfer is active");
        let State::Writing { span, rest } = &mut slot.state else {
            panic!("a slot in state {:?} has nothing to write", slot.state);
        };
        let Some(next) = rest.pop() else {
            self.finish(key);
            return;
        };
        if active.transfer.gate.is_stopped() {
            self.release(key);
            return;
        }
        *span = next.clone();
        let position = if active.transfer.sink.stream {
            active.writing = true;
            Position::Stream
        } else {
            let start = active.transfer.place(Side::Sink, slot.extent.start());
            Position::At(start + u64::from(next.start))
        };
        let buf = slot.take_buf();
        let port = active.sink;
        self.push(key, Side::Sink, port, What::Write { position, buf, span: next });
    }

    /// The chunk is where it belongs.
    pub(super) fn finish(&mut self, key: usize) {
        let slot = &self.slots[key];
        let at = slot.active;
        let active = self.active[at].as_mut().expect("a slot's transfer is active");
        active.transfer.counters[self.index].add_done(slot.source_len.into());
        active.sink_turn = slot.extent.end();
        active.mark_finished(self.index, slot.extent.start());
        let ordered = active.transfer.sink.stream;
        if active.own.is_some() {
            self.written(key);
            return;
        }
        self.release(key);
        if ordered {
            self.next_turn(at);
        }
    }

    /// An ordered sink is free: the chunk whose turn it is may be waiting.
    fn next_turn(&mut self, at: usize) {
        let active = self.active[at].as_mut().expect("a slot's transfer is active");
        let turn = active.sink_turn;
        let waiting = self.slots.iter_mut().find_map(|(key, slot)| match slot.state {
            State::Turn { runs } if slot.active == at && slot.extent.start() == turn => {
                Some((key, runs, slot))
            }
            _ => None,
        });
        let Some((key, runs, slot)) = waiting else { return };
        let counters = &active.transfer.counters[self.index];
        active.record.record(counters, Stage::Queue, slot.lap(Instant::now()), slot.source_len.into());
        slot.state = State::Writing { span: 0..0, rest: runs };
        self.write(key);
    }
}

/// A chunk by the place it has on one side.
fn place(transfer: &Transfer, side: Side, end: &End, extent: Extent) -> String {
    let start = transfer.place(side, extent.start());
    match Extent::new(start, start + extent.len()) {
        Some(extent) => format!("{} {extent}", end.name),
        None => end.name.clone(),
    }
}

fn write_error(transfer: &Transfer, cause: std::io::Error, extent: Extent) -> Error {
    let sink = &transfer.sink;
    match cause.raw_os_error() {
        Some(libc::EPIPE) => {
            Error::new(ErrorKind::Io, "write failed: the reader has closed the pipe").at(&sink.name)
        }
        _ => Error::io("write failed", cause).at(place(transfer, Side::Sink, sink, extent)),
    }
}
