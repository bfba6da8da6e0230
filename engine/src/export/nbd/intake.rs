//! From received bytes to requests, and from requests to pieces.
//!
//! Backpressure is here: a request is taken only while the connection has fewer than [`OPEN_MAX`] and all its reads have found buffers;
//! a payload is taken when there is a buffer for it. Until then nothing more is received, and the client's own socket fills.

use crate::backend::{Done, Position, Queue, What};
use crate::export::nbd::answer::Failure;
use crate::export::nbd::check::{DRAIN_MAX, check};
use crate::export::nbd::connection::{Ending, Intake, OPEN_MAX, Ready};
use crate::export::nbd::pool::{Class, HEAD};
use crate::export::nbd::server::{Server, Whose, push};
use crate::export::nbd::slot::{Asked, Cut, Piece, Step, Work};
use crate::format::nbd::command_flags as flag;
use crate::format::nbd::reply::Style;
use crate::format::nbd::request::{Command, Request};
use crate::sys::buffer::Buf;

/// Pieces of long requests that one connection has in flight: they may take hours and shall not crowd out others.
const LONG_PIECES: u32 = 2;

/// Largest extent that is discarded at once. Whoever writes there waits for it; and it waits for them: the larger it is, the more can
/// overtake it.
const DISCARD_MAX: u64 = 4 << 20;

/// From so many missing bytes on, a payload is received where it is needed and not copied.
const DIRECT_MIN: u32 = 16 << 10;

/// What the parser needs to go on.
enum Next {
    /// Nothing.
    On,
    /// Something of this connection to be finished, or received.
    Wait,
    /// Bytes.
    Receive,
}

impl Server {
    /// Understand what was received, as far as it goes, and receive more.
    pub(super) fn take_in(&mut self, key: usize, queue: &mut dyn Queue) {
        loop {
            let connection = &self.connections[key];
            if connection.ending != Ending::No || connection.receiving {
                return;
            }
            let next = match connection.intake {
                Intake::Request => self.take_request(key, queue),
                Intake::Payload { asked, piece: None } => self.begin_payload(key, asked),
                Intake::Payload { asked, piece: Some((piece, got)) } => {
                    self.take_payload(key, asked, (piece, got), queue)
                }
                Intake::Drain { asked, left } => self.drain(key, asked, left),
            };
            match next {
                Next::On => {}
                Next::Wait => return,
                Next::Receive => {
                    let connection = &mut self.connections[key];
                    if connection.feed_early() {
                        continue;
                    }
                    connection.keep_pace();
                    if connection.draining && connection.intake == Intake::Request {
                        Self::stop_receiving(connection);
                    }
                    let room = connection.make_room();
                    assert!(
                        !room.is_empty(),
                        "a header and a payload's rest are never as long as the buffer"
                    );
                    let span = position(room.start)..position(room.end);
                    let buf = connection.received.take().expect("not lent");
                    connection.receiving = true;
                    push(queue, Whose::Receive, key, connection.port, What::Receive { buf, span });
                    return;
                }
            }
        }
    }

    /// A receive came back.
    pub(super) fn received(&mut self, key: usize, done: Done, queue: &mut dyn Queue) {
        let connection = &mut self.connections[key];
        connection.received = done.buf;
        connection.receiving = false;
        match done.result {
            Ok(count) if count > 0 => {
                let served = &mut self.served[connection.served];
                if !connection.take_received(count as usize, served) {
                    self.hang_up(key, queue);
                }
            }
            Ok(_) if connection.draining && connection.intake == Intake::Request => {
                connection.ending = connection.ending.max(Ending::Polite);
            }
            // A client that leaves without a word waits for nothing.
            _ => self.hang_up(key, queue),
        }
        self.mark(key);
    }

    fn take_request(&mut self, key: usize, queue: &mut dyn Queue) -> Next {
        let connection = &mut self.connections[key];
        if connection.open >= OPEN_MAX || !connection.unissued.is_empty() {
            return Next::Wait;
        }
        let bytes = connection.header_bytes();
        if connection.unread.len() < bytes {
            return Next::Receive;
        }
        let header = &connection.unread()[..bytes];
        let Some(request) = Request::parse(header, connection.style == Style::Extended) else {
            // Nothing that follows can be understood.
            self.hang_up(key, queue);
            return Next::Wait;
        };
        connection.unread.start += bytes;
        self.begin(key, request, queue);
        Next::On
    }

    fn begin(&mut self, key: usize, request: Request, queue: &mut dyn Queue) {
        let connection = &mut self.connections[key];
        let export = &connection.admission.export;
        let payload = request.payload(connection.style == Style::Extended);
        if payload > DRAIN_MAX {
            self.hang_up(key, queue);
            return;
        }
        if request.command == Command::Disconnect {
            connection.ending = connection.ending.max(Ending::Polite);
            return;
        }
        let failure = check(&request, connection.style, connection.allocation, export).err();
        if let Some((count, bytes)) = export.counters.commands.get(usize::from(request.command.number())) {
            count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            // Of what is refused the length says nothing.
            let asked = if failure.is_none() { request.length } else { 0 };
            bytes.fetch_add(asked, std::sync::atomic::Ordering::Relaxed);
        }
        connection.open += 1;
        if failure.is_none() && request.command == Command::BlockStatus {
            connection.ready.push_back(Ready::Status(request));
            return;
        }
        connection.asked += 1;
        let discard = export.discard;
        let asked = self.asked.insert(Asked {
            connection: key,
            request,
            issued: 0,
            pieces: 0,
            failure,
            in_order: false,
            streamed: 0,
            durable: false,
        });
        let connection = &mut self.connections[key];
        if failure.is_some() {
            if payload > 0 {
                connection.intake = Intake::Drain { asked, left: payload };
            } else {
                self.nothing_more(asked);
            }
            return;
        }
        match request.command {
            Command::Read => {
                connection.unissued.push_back(asked);
                self.issue_reads(key, queue);
            }
            Command::Write => connection.intake = Intake::Payload { asked, piece: None },
            Command::WriteZeroes => {
                connection.long.push_back(asked);
                self.issue_long(key, queue);
            }
            Command::Trim if discard => {
                connection.long.push_back(asked);
                self.issue_long(key, queue);
            }
            Command::Flush => self.want_flush(asked),
            // A hint that is not taken: without leave to discard, what is trimmed stays as it is; and reading ahead into a cache that
            // direct I/O passes by is no use.
            _ => self.nothing_more(asked),
        }
    }

    fn begin_payload(&mut self, key: usize, asked: usize) -> Next {
        let one = &self.asked[asked];
        let (at, left) = (one.request.offset + one.issued, one.request.length - one.issued);
        if one.failure.is_some() {
            self.connections[key].intake = Intake::Drain { asked, left };
            return Next::On;
        }
        let Some((buf, class)) = self.take_buffer(key, left, Work::Write) else { return Next::Wait };
        let (block, total) = self.measure(key);
        let cut = Cut::writing(at, left, block, class.bytes().into(), total);
        let piece = self.insert(key, asked, Work::Write, (buf, class), cut);
        self.connections[key].intake = Intake::Payload { asked, piece: Some((piece, 0)) };
        Next::On
    }

    fn take_payload(
        &mut self,
        key: usize,
        asked: usize,
        (piece, got): (usize, u32),
        queue: &mut dyn Queue,
    ) -> Next {
        let connection = &mut self.connections[key];
        let one = &mut self.pieces[piece];
        let want = u32::try_from(one.asks.end - one.asks.start).expect("a piece fits its buffer");
        let count = connection.unread.len().min((want - got) as usize);
        let into = (HEAD + got) as usize;
        let buf = one.buf.as_mut().expect("not lent");
        buf[into..into + count].copy_from_slice(&connection.unread()[..count]);
        connection.unread.start += count;
        let got = got + position(count);
        if got == want {
            self.payload_complete(key, asked, piece, queue);
            return Next::On;
        }
        connection.intake = Intake::Payload { asked, piece: Some((piece, got)) };
        if want - got < DIRECT_MIN || !connection.early.is_empty() || connection.sealed.is_some() {
            return Next::Receive;
        }
        let buf = one.buf.take().expect("not lent");
        one.in_flight = true;
        connection.receiving = true;
        let what = What::Read { position: Position::Stream, buf, span: HEAD + got..HEAD + want };
        push(queue, Whose::Payload, key, connection.port, what);
        Next::Wait
    }

    /// A piece's payload was received where it is needed.
    pub(super) fn payload_received(&mut self, key: usize, done: Done, queue: &mut dyn Queue) {
        let connection = &mut self.connections[key];
        connection.receiving = false;
        let Intake::Payload { asked, piece: Some((piece, got)) } = connection.intake else {
            unreachable!("a payload is received for the piece that waits for it")
        };
        let one = &mut self.pieces[piece];
        one.buf = done.buf;
        one.in_flight = false;
        let want = u32::try_from(one.asks.end - one.asks.start).expect("a piece fits its buffer") - got;
        if connection.ending == Ending::Hard {
            self.forget(piece);
        } else if done.result.is_ok_and(|count| count == want) {
            self.payload_complete(key, asked, piece, queue);
        } else {
            self.hang_up(key, queue);
        }
        self.mark(key);
    }

    fn payload_complete(&mut self, key: usize, asked: usize, piece: usize, queue: &mut dyn Queue) {
        let one = &self.asked[asked];
        self.connections[key].intake = if one.issued == one.request.length {
            Intake::Request
        } else {
            Intake::Payload { asked, piece: None }
        };
        self.start(piece, queue);
    }

    /// Throw a payload away.
    fn drain(&mut self, key: usize, asked: usize, left: u64) -> Next {
        let connection = &mut self.connections[key];
        let count = connection.unread.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        connection.unread.start += count;
        let left = left - count as u64;
        if left > 0 {
            connection.intake = Intake::Drain { asked, left };
            return Next::Receive;
        }
        connection.intake = Intake::Request;
        self.nothing_more(asked);
        Next::On
    }

    /// Make pieces of the reads that have come, while there are buffers.
    pub(super) fn issue_reads(&mut self, key: usize, queue: &mut dyn Queue) {
        while let Some(&asked) = self.connections[key].unissued.front() {
            let one = &self.asked[asked];
            let (request, issued) = (one.request, one.issued);
            let (at, left) = (request.offset + issued, request.length - issued);
            let (block, total) = self.measure(key);
            let Some((buf, class)) = self.take_buffer(key, left + at % block, Work::Read) else { return };
            let cut = Cut::reading(at, left, block, class.bytes().into(), total);
            let one_chunk = self.connections[key].style == Style::Simple || request.flags & flag::DF != 0;
            let in_order = issued == 0 && one_chunk && cut.asks.end < request.offset + request.length;
            let piece = self.insert(key, asked, Work::Read, (buf, class), cut);
            let one = &mut self.asked[asked];
            if in_order {
                one.in_order = true;
                one.issued = request.length;
                self.pieces[piece].in_order = true;
            }
            if one.issued == request.length {
                self.connections[key].unissued.pop_front();
            }
            self.start(piece, queue);
        }
    }

    /// Make pieces of zeros and of what is to be discarded, a few at a time and in turn.
    pub(super) fn issue_long(&mut self, key: usize, queue: &mut dyn Queue) {
        while self.connections[key].long_pieces < LONG_PIECES {
            let Some(asked) = self.connections[key].long.pop_front() else { return };
            let one = &self.asked[asked];
            let request = one.request;
            let (at, left) = (request.offset + one.issued, request.length - one.issued);
            let (block, total) = self.measure(key);
            let work = if request.command == Command::Trim { Work::Discard } else { Work::Zero };
            if work == Work::Discard && Cut::discarding(at, left, block, DISCARD_MAX, total).is_none() {
                self.nothing_more(asked);
                continue;
            }
            let want = if work == Work::Discard { 1 } else { left };
            let Some(buffer) = self.take_buffer(key, want, work) else {
                self.connections[key].long.push_front(asked);
                return;
            };
            let cut = match work {
                Work::Discard => {
                    Cut::discarding(at, left, block, DISCARD_MAX, total).expect("looked at above")
                }
                _ => Cut::writing(at, left, block, buffer.1.bytes().into(), total),
            };
            let piece = self.insert(key, asked, work, buffer, cut);
            self.connections[key].long_pieces += 1;
            let one = &self.asked[asked];
            if one.issued < request.length {
                self.connections[key].long.push_back(asked);
            }
            self.start(piece, queue);
        }
    }

    /// The block and the size of a connection's export.
    fn measure(&self, key: usize) -> (u64, u64) {
        let served = &self.served[self.connections[key].served];
        (served.block, served.export.view.total())
    }

    fn insert(
        &mut self,
        key: usize,
        asked: usize,
        work: Work,
        (buf, class): (Buf, Class),
        cut: Cut,
    ) -> usize {
        let one = &mut self.asked[asked];
        one.issued = cut.asks.end - one.request.offset;
        one.pieces += 1;
        let connection = &mut self.connections[key];
        connection.pieces += 1;
        if work == Work::Read {
            connection.reading += cut.asks.end - cut.asks.start;
        }
        let block = self.served[self.connections[key].served].block;
        // What is changed in part is read beside the payload.
        let base = if work == Work::Write && !cut.is_whole() {
            HEAD + u32::try_from(block).expect("small")
        } else {
            HEAD
        };
        self.pieces.insert(Piece {
            connection: key,
            asked,
            work,
            step: Step::Payload,
            buf: Some(buf),
            class,
            position: cut.blocks.start,
            until: cut.blocks.start,
            asks: cut.asks,
            blocks: cut.blocks,
            base,
            grant: None,
            out: 0..0,
            last: false,
            in_order: false,
            in_flight: false,
            since: self.now,
        })
    }

    /// A request has no pieces to come.
    fn nothing_more(&mut self, asked: usize) {
        let one = &mut self.asked[asked];
        one.issued = one.request.length;
        self.settle(asked);
    }

    /// A piece failed, and with it its request.
    pub(super) fn fail(&mut self, asked: usize, failure: Failure) {
        let one = &mut self.asked[asked];
        one.failure.get_or_insert(failure);
        if one.request.command != Command::Write {
            // A payload still has to be taken off the wire; nothing else has to go on.
            one.issued = one.request.length;
            let connection = &mut self.connections[one.connection];
            connection.unissued.retain(|&other| other != asked);
            connection.long.retain(|&other| other != asked);
        }
    }
}

fn position(at: usize) -> u32 {
    u32::try_from(at).expect("within a buffer")
}
