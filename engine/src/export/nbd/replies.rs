//! From finished pieces to sent bytes; flushes.
//!
//! What a flush covers: everything replied to before it was asked for, on any connection of the export. A write is complete on the
//! device before its reply is, so one `fdatasync` begun after the request came in covers it, and serves all who have asked until it
//! begins. FUA is the same flush, after the write and before its reply.

use crate::backend::device::Region;
use crate::backend::{Done, Queue, What};
use crate::export::exported::Begin;
use crate::export::nbd::answer::{Failure, Note, data_head_bytes, put_data_head, put_status};
use crate::export::nbd::connection::{Ending, GATHER_MAX, Ready, Sending};
use crate::export::nbd::moves::LOST;
use crate::export::nbd::server::{Server, Whose, push};
use crate::export::nbd::slot::{Cut, Step};
use crate::format::nbd::reply::Style;
use crate::format::nbd::request::{Command, Request};
use crate::format::nbd::{allocation, command_flags as flag};
use crate::pipeline::view::Access;
use crate::units::Extent;
use proto::Stage;
use std::sync::atomic::Ordering;

/// Extents in one reply to BLOCK_STATUS.
const STATUS_MAX: usize = 64;
/// How often one reply asks the device where its holes are: each time is a system call, and all others of the worker wait meanwhile.
const LOOKS_MAX: usize = 16;
/// Bytes of the longest such reply.
const STATUS_BYTES: u32 = 32 + 8 + 16 * 64;

impl Server {
    /// Count a request that failed.
    pub(super) fn admission_error(&self, connection: usize) {
        self.connections[connection].admission.export.counters.errors.fetch_add(1, Ordering::Relaxed);
    }

    /// Is a request done? Then answer it.
    pub(super) fn settle(&mut self, key: usize) {
        let asked = &self.asked[key];
        if asked.pieces > 0 || asked.issued < asked.request.length {
            return;
        }
        let command = asked.request.command;
        let writes = matches!(command, Command::Write | Command::WriteZeroes | Command::Trim);
        if writes && asked.request.flags & flag::FUA != 0 && asked.failure.is_none() && !asked.durable {
            self.want_flush(key);
            return;
        }
        let (connection, request, failure) = (asked.connection, asked.request, asked.failure);
        self.drop_asked(key);
        self.mark(connection);
        // A read that succeeded has been answered with its data.
        if command == Command::Read && failure.is_none() {
            return;
        }
        if failure.is_some() {
            self.admission_error(connection);
        }
        // An error says where it was only in answers to reads: of others all may be affected.
        let failure = failure.map(|failure| match command {
            Command::Read => failure,
            _ => Failure { at: None, ..failure },
        });
        self.connections[connection].note(Note { request, failure });
    }

    /// A read piece's data is here, decrypted: put what goes in front of it, and let it be sent.
    pub(super) fn data_ready(&mut self, key: usize) {
        let piece = &mut self.pieces[key];
        let connection = &mut self.connections[piece.connection];
        let asked = &mut self.asked[piece.asked];
        piece.step = Step::Send;
        piece.since = self.now;
        if let Some(unsent) = connection.unsent(piece.class) {
            *unsent += 1;
        }
        let (from, to) = (piece.place(piece.asks.start), piece.place(piece.asks.end));
        let head = data_head_bytes(connection.style);
        piece.out = from..to;
        let mut first = true;
        let len = if piece.in_order {
            first = asked.streamed == 0;
            asked.streamed += u64::from(to - from);
            piece.last = asked.streamed == asked.request.length;
            asked.request.length
        } else {
            asked.pieces -= 1;
            piece.last = asked.pieces == 0 && asked.issued == asked.request.length && asked.failure.is_none();
            u64::from(to - from)
        };
        if first {
            let start = from as usize - head;
            piece.out.start = u32::try_from(start).expect("within the head room");
            let buf = piece.buf.as_mut().expect("not lent");
            let done = piece.last || piece.in_order;
            put_data_head(&mut buf[start..], connection.style, &asked.request, piece.asks.start, len, done);
        }
        if connection.stream == Some(key) {
            connection.stream_ready = true;
        } else {
            connection.ready.push_back(Ready::Piece(key));
        }
        let (owner, asked, in_order) = (piece.connection, piece.asked, piece.in_order);
        self.mark(owner);
        if !in_order {
            self.settle(asked);
        }
    }

    /// Send what is ready, unless something is being sent.
    pub(super) fn send(&mut self, key: usize, queue: &mut dyn Queue) {
        self.gather(key);
        let connection = &mut self.connections[key];
        if connection.sending.is_some() {
            return;
        }
        let piece = if let Some(piece) = connection.stream {
            if !std::mem::take(&mut connection.stream_ready) {
                return;
            }
            piece
        } else if connection.gathered > 0 {
            let buf = connection.gather.take().expect("gathered into");
            let bytes = std::mem::take(&mut connection.gathered);
            connection.gather = connection.spare.take();
            self.transmit(key, Sending::Gathered(bytes), Some((buf, 0..bytes)), queue);
            // There is room again.
            self.gather(key);
            return;
        } else if let Some(&Ready::Piece(piece)) = connection.ready.front() {
            connection.ready.pop_front();
            piece
        } else if connection.sealed.as_ref().is_some_and(|sealed| sealed.has_to_speak()) {
            return self.transmit(key, Sending::Records, None, queue);
        } else {
            return;
        };
        let one = &mut self.pieces[piece];
        if one.in_order {
            connection.stream = Some(piece);
        }
        one.in_flight = true;
        let lent = (one.buf.take().expect("not lent"), one.out.clone());
        self.transmit(key, Sending::Piece(piece), Some(lent), queue);
        self.gather(key);
    }

    /// Copy small replies together, in their order.
    fn gather(&mut self, key: usize) {
        loop {
            let connection = &mut self.connections[key];
            match connection.ready.front() {
                None => return,
                Some(&Ready::Note(note)) => {
                    if !connection.gather_note(&note) {
                        return;
                    }
                    connection.ready.pop_front();
                }
                Some(&Ready::Status(request)) => {
                    if connection.gather_room(STATUS_BYTES).is_none() {
                        return;
                    }
                    connection.ready.pop_front();
                    self.gather_status(key, &request);
                }
                Some(&Ready::Piece(piece)) => {
                    let one = &self.pieces[piece];
                    let out = one.out.start as usize..one.out.end as usize;
                    let bytes = one.out.end - one.out.start;
                    if one.in_order || bytes > GATHER_MAX {
                        return;
                    }
                    let Some(room) = connection.gather_room(bytes) else { return };
                    let buf = one.buf.as_ref().expect("not lent");
                    room[..bytes as usize].copy_from_slice(&buf[out]);
                    connection.gathered += bytes;
                    connection.open -= u32::from(one.last);
                    connection.ready.pop_front();
                    self.release(piece);
                }
            }
        }
    }

    /// A send came back.
    pub(super) fn sent(&mut self, key: usize, done: Done, queue: &mut dyn Queue) {
        let Some(done) = self.transmitted(key, done, queue) else { return };
        let connection = &mut self.connections[key];
        let sending = connection.sending.take().expect("this send");
        let failed = done.result.is_err();
        match sending {
            Sending::Gathered(_) => {
                let place =
                    if connection.gather.is_none() { &mut connection.gather } else { &mut connection.spare };
                *place = done.buf;
            }
            Sending::Records => {}
            Sending::Piece(piece) => {
                let one = &mut self.pieces[piece];
                one.buf = done.buf;
                one.in_flight = false;
                let (last, in_order) = (one.last, one.in_order);
                if connection.ending == Ending::Hard {
                    self.forget(piece);
                } else if failed {
                    // `hang_up` finds it.
                } else if in_order && !last {
                    self.next_part(piece, queue);
                } else {
                    connection.open -= u32::from(last);
                    if in_order {
                        connection.stream = None;
                        let asked = one.asked;
                        self.drop_asked(asked);
                    }
                    self.release(piece);
                }
            }
        }
        if failed {
            self.hang_up(key, queue);
        }
        self.mark(key);
    }

    /// The next part of an in-order read, in the same buffer.
    fn next_part(&mut self, key: usize, queue: &mut dyn Queue) {
        let piece = &mut self.pieces[key];
        let asked = &self.asked[piece.asked];
        let connection = &mut self.connections[piece.connection];
        if let Some(unsent) = connection.unsent(piece.class) {
            *unsent -= 1;
        }
        let served = &self.served[connection.served];
        let at = asked.request.offset + asked.streamed;
        let left = asked.request.length - asked.streamed;
        let total = served.export.view.total();
        let cut = Cut::reading(at, left, served.block, piece.class.bytes().into(), total);
        piece.position = cut.blocks.start;
        piece.until = cut.blocks.start;
        connection.reading += cut.asks.end - cut.asks.start;
        connection.reading -= piece.asks.end - piece.asks.start;
        piece.asks = cut.asks;
        piece.blocks = cut.blocks;
        self.start(key, queue);
    }

    /// What is allocated, as far as one reply goes. Ciphertext is data everywhere; only where holes are made on purpose they are told
    /// of, and never as zeros: what they read as is not zero.
    fn gather_status(&mut self, key: usize, request: &Request) {
        let connection = &mut self.connections[key];
        let export = &connection.admission.export;
        let mut extents = [(0_u64, 0_u32); STATUS_MAX];
        let most = if request.flags & flag::REQ_ONE != 0 { 1 } else { STATUS_MAX };
        let end = request.offset + request.length;
        let block = u64::from(export.align.max(super::served::BLOCK_MIN));
        // Where extents lie just now; while they are on the move, all is data.
        let grant = Extent::new(request.offset, end)
            .filter(|_| export.discard)
            .and_then(|extent| export.view.admit(Access::Read, extent).ok());
        let mut count = 0;
        let mut at = request.offset;
        // Structured replies tell lengths in 32 bits.
        let longest =
            if connection.style == Style::Extended { u64::MAX } else { u64::from(u32::MAX) & !(block - 1) };
        let mut looks = 0;
        while at < end && count < most && looks < LOOKS_MAX {
            let (mut until, mut flags) = (end, 0);
            if let Some(grant) = &grant
                && at < grant.extent.end()
            {
                let segment_end = grant.segments.until(at).min(grant.extent.end());
                let place = grant.segments.place(at);
                looks += 1;
                match export.device.region_at(place) {
                    Some(Region::Hole { until: hole_end }) => {
                        let hole_end = at + (hole_end - place);
                        // Of the last block of a hole a part may be data.
                        let whole = if hole_end >= end { hole_end } else { hole_end - hole_end % block };
                        if whole > at {
                            (until, flags) = (whole, allocation::HOLE);
                        } else {
                            until = hole_end.next_multiple_of(block);
                        }
                    }
                    Some(Region::Data { until: data_end }) => {
                        until = (at + (data_end - place)).next_multiple_of(block);
                    }
                    None => {}
                }
                until = until.min(segment_end);
            }
            until = until.min(end).min(at.saturating_add(longest));
            match extents[..count].last_mut() {
                Some((bytes, before)) if *before == flags && bytes.saturating_add(until - at) <= longest => {
                    *bytes += until - at;
                }
                _ => {
                    extents[count] = (until - at, flags);
                    count += 1;
                }
            }
            at = until;
        }
        if let Some(grant) = grant {
            export.view.done(grant);
        }
        let (style, context) = (connection.style, connection.allocation.expect("checked when it was asked"));
        let room = connection.gather_room(STATUS_BYTES).expect("looked at before");
        let bytes = put_status(room, style, request, context, &extents[..count]);
        connection.gathered += u32::try_from(bytes).expect("some bytes");
        connection.open -= 1;
    }

    /// A request waits for a flush that begins after now.
    pub(super) fn want_flush(&mut self, asked: usize) {
        let served = self.connections[self.asked[asked].connection].served;
        let served = &mut self.served[served];
        served.flush_next.push((served.export.durability.ticket(), asked));
    }

    /// Begin the flushes that are wanted.
    pub(super) fn flush_all(&mut self, queue: &mut dyn Queue) {
        let mut at = 0;
        while let Some(key) = self.served.iter().map(|(key, _)| key).find(|&key| key >= at) {
            at = key + 1;
            let served = &mut self.served[key];
            if served.flushing || served.flush_next.is_empty() {
                continue;
            }
            // Those that another worker's flush has covered meanwhile.
            let durable = served.export.durability.durable();
            let covered = served.flush_next.extract_if(.., |(ticket, _)| *ticket < durable);
            served.flush_running.extend(covered.map(|(_, one)| one));
            if !served.flush_running.is_empty() {
                let failure = served.export.durability.is_lost().then_some(LOST);
                self.answer_flush(key, failure);
            }
            let served = &mut self.served[key];
            if served.flush_next.is_empty() {
                continue;
            }
            match served.export.durability.begin(&self.waker) {
                Begin::Begun => {
                    served.flush_running.extend(served.flush_next.drain(..).map(|(_, one)| one));
                    served.flushing = true;
                    served.flush_since = self.now;
                    push(queue, Whose::Flush, key, served.port, What::Flush);
                }
                Begin::Busy => {}
                Begin::Lost => {
                    served.flush_running.extend(served.flush_next.drain(..).map(|(_, one)| one));
                    self.answer_flush(key, Some(LOST));
                }
            }
        }
    }

    /// A flush came back.
    pub(super) fn flushed(&mut self, key: usize, done: Done) {
        let served = &mut self.served[key];
        served.flushing = false;
        let spent = self.now.saturating_duration_since(served.flush_since);
        served.record.record(&served.counters, Stage::Flush, spent, 0);
        let failure = done.result.err().map(|error| {
            tracing::error!(
                "export {}: flush failed: what was written may be lost: {error}",
                served.export.id
            );
            LOST
        });
        // 1. Nobody is told of a flush that a failed one may have gone before: the failure is known to all workers first.
        served.export.durability.end(failure.is_none());
        // Somebody else who flushes the same open file may have been told meanwhile of a failure that this one then was not.
        let failure = failure.or(served.export.durability.is_lost().then_some(LOST));
        // 2. Then those who wait are answered.
        self.answer_flush(key, failure);
    }

    fn answer_flush(&mut self, key: usize, failure: Option<Failure>) {
        let mut asked = std::mem::take(&mut self.served[key].flush_running);
        for one in asked.drain(..) {
            let connection = self.asked[one].connection;
            self.mark(connection);
            if self.connections[connection].ending == Ending::Hard {
                self.drop_asked(one);
                continue;
            }
            self.asked[one].durable = true;
            self.asked[one].failure = failure;
            self.settle(one);
        }
        // The list keeps its room.
        self.served[key].flush_running = asked;
    }
}
