//! One request, and one piece of one, in flight.
//!
//! ```text
//! request ─┬▶ piece: payload ▶ waits for its extent ▶ (read ▶ decrypt ▶ overlay ▶) encrypt ▶ write ─┐
//!          ├▶ piece: …                                read ▶ decrypt ▶ reply with data            ├▶ (flush ▶) reply
//!          └▶ …
//! ```
//! A piece has one buffer and at most one operation in flight. Its extent is whole blocks of the export; where the request begins or
//! ends inside one, that block is a piece of its own, which is read first when written (under one grant, so that neighbours are
//! safe).

use std::ops::Range;
use std::time::Instant;

use crate::export::nbd::answer::Failure;
use crate::export::nbd::pool::{Class, HEAD};
use crate::format::nbd::request::Request;
use crate::pipeline::view::Grant;
use crate::sys::buffer::Buf;

/// A request that has not been answered.
pub struct Asked {
    /// Whose: the connection's key.
    pub connection: usize,
    /// What.
    pub request: Request,
    /// Bytes of it that pieces have been made of, or that need none.
    pub issued: u64,
    /// Its pieces that are not done.
    pub pieces: u32,
    /// The first failure of a piece.
    pub failure: Option<Failure>,
    /// A read answered in one chunk that fits no buffer: one piece goes through it from begin to end, and nothing else is sent
    /// between its parts.
    pub in_order: bool,
    /// Bytes of an in-order read that are sent or ready to be.
    pub streamed: u64,
    /// The flush that FUA asks for has been made.
    pub durable: bool,
}

/// What a piece does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// READ.
    Read,
    /// WRITE.
    Write,
    /// WRITE_ZEROES.
    Zero,
    /// TRIM.
    Discard,
}

/// What a piece waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The client's bytes.
    Payload,
    /// Leave to touch its extent.
    Grant,
    /// The device's bytes, to be sent.
    Read,
    /// The device's bytes, to be changed in part.
    Edge,
    /// The device.
    Write,
    /// The socket.
    Send,
}

/// A piece of a request.
pub struct Piece {
    /// Whose: the connection's key.
    pub connection: usize,
    /// Of which request. Not to be looked up once the request is answered.
    pub asked: usize,
    /// What it does.
    pub work: Work,
    /// What it waits for.
    pub step: Step,
    /// Its buffer, unless it is lent to the queue.
    pub buf: Option<Buf>,
    /// Which kind of buffer.
    pub class: Class,
    /// The request's part.
    pub asks: Range<u64>,
    /// Whole blocks around it, within the volume.
    pub blocks: Range<u64>,
    /// Where in the buffer the first byte of `blocks` is.
    pub base: u32,
    /// Of `blocks`, done up to here.
    pub position: u64,
    /// Of `blocks`, under way up to here.
    pub until: u64,
    /// Leave to touch `position..`.
    pub grant: Option<Grant>,
    /// Part of the buffer to be sent: header and data.
    pub out: Range<u32>,
    /// Nothing of the request follows it.
    pub last: bool,
    /// It goes through all of an in-order read.
    pub in_order: bool,
    /// An operation of it is in flight.
    pub in_flight: bool,
    /// When its step began.
    pub since: Instant,
}

impl Piece {
    /// Where in the buffer this byte of the volume is.
    #[must_use]
    pub fn place(&self, at: u64) -> u32 {
        self.base + u32::try_from(at - self.blocks.start).expect("a piece fits its buffer")
    }

    /// The part of the buffer that is under way.
    #[must_use]
    pub fn span(&self) -> Range<u32> {
        self.place(self.position)..self.place(self.until)
    }

    /// Since when it has kept a shared buffer while it waits for its client: for all of a payload, or to take what is sent, where
    /// something has been on its way to the client without a pause since `sending_since`. Not since the client did something last: one
    /// that does a little all the time keeps it as long as one that does nothing.
    #[must_use]
    pub fn kept_since(&self, sending_since: Option<Instant>) -> Option<Instant> {
        match self.step {
            _ if self.class == Class::Own => None,
            Step::Payload => Some(self.since),
            Step::Send => sending_since.map(|since| since.max(self.since)),
            Step::Grant | Step::Read | Step::Edge | Step::Write => None,
        }
    }

    /// Is it among its request's pieces that are not done?
    #[must_use]
    pub fn is_counted(&self) -> bool {
        self.in_order || self.step != Step::Send
    }

    /// Does the request have all bytes that are under way?
    #[must_use]
    pub fn covers(&self) -> bool {
        self.asks.start <= self.position && self.until <= self.asks.end
    }

    /// Put what the request has of the bytes under way over them: payload, or zeros.
    pub fn overlay(&mut self) {
        let from = self.asks.start.max(self.position);
        let to = self.asks.end.min(self.until);
        if from >= to {
            return;
        }
        let payload = HEAD as usize + usize::try_from(from - self.asks.start).expect("within a buffer");
        let into = self.place(from) as usize..self.place(to) as usize;
        let buf = self.buf.as_mut().expect("not lent");
        match self.work {
            Work::Zero => buf[into].fill(0),
            _ if payload != into.start => buf.copy_within(payload..payload + into.len(), into.start),
            _ => {}
        }
    }
}

/// How an extent is cut into pieces: the first of them, at most `room` bytes of whole blocks.
pub struct Cut {
    /// The request's part.
    pub asks: Range<u64>,
    /// Whole blocks around it, within the volume.
    pub blocks: Range<u64>,
}

impl Cut {
    /// For reading: as much as fits, whatever its edges.
    #[must_use]
    pub fn reading(at: u64, len: u64, block: u64, room: u64, total: u64) -> Self {
        let start = at - at % block;
        let end = (at + len).min(start + room - room % block);
        Self { asks: at..end, blocks: start..end.next_multiple_of(block).min(total) }
    }

    /// For writing: a block of which only a part is asked for is alone.
    #[must_use]
    pub fn writing(at: u64, len: u64, block: u64, room: u64, total: u64) -> Self {
        let start = at - at % block;
        let after = start + block;
        let end = at + len;
        let asks = if at != start || (end < after && end != total) {
            at..end.min(after)
        } else if end == total {
            at..end.min(start + room - room % block)
        } else {
            at..(end - end % block).min(start + room - room % block)
        };
        let blocks = start..asks.end.next_multiple_of(block).min(total);
        Self { asks, blocks }
    }

    /// For discarding: whole blocks only; `None`: there are none.
    #[must_use]
    pub fn discarding(at: u64, len: u64, block: u64, room: u64, total: u64) -> Option<Self> {
        let start = at.checked_next_multiple_of(block)?;
        let end = at + len;
        let end = if end == total { end } else { end - end % block };
        let end = end.min(start.saturating_add(room));
        (start < end).then_some(Self { asks: start..end, blocks: start..end })
    }

    /// Are all its bytes asked for?
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.asks == self.blocks
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const BLOCK: u64 = 4096;
    const TOTAL: u64 = 100 * BLOCK + 512;

    fn all(cut: fn(u64, u64, u64, u64, u64) -> Cut, at: u64, len: u64, room: u64) -> Vec<Cut> {
        let mut cuts: Vec<Cut> = Vec::new();
        let mut from = at;
        while from < at + len {
            let cut = cut(from, at + len - from, BLOCK, room, TOTAL);
            assert_eq!(cut.asks.start, from);
            assert!(cut.asks.start < cut.asks.end && cut.asks.end <= at + len);
            assert!(cut.blocks.start <= cut.asks.start && cut.asks.end <= cut.blocks.end);
            assert!(cut.blocks.start.is_multiple_of(BLOCK));
            assert!(cut.blocks.end.is_multiple_of(BLOCK) || cut.blocks.end == TOTAL);
            assert!(cut.blocks.end - cut.blocks.start <= room);
            from = cut.asks.end;
            cuts.push(cut);
        }
        cuts
    }

    #[test]
    fn cuts_cover_every_request_and_only_edges_are_read_before_they_are_written() {
        for at in [0, 1, 511, 4095, 4096, 8192, 12_345, TOTAL - 512, TOTAL - 513, TOTAL - 1] {
            for len in [1, 2, 511, 512, 4095, 4096, 4097, 10_000, 65_536, 200_000] {
                let len = len.min(TOTAL - at);
                for room in [4096, 32 << 10, 60 << 10] {
                    all(Cut::reading, at, len, room);
                    for cut in all(Cut::writing, at, len, room) {
                        let blocks = cut.blocks.end - cut.blocks.start;
                        assert!(cut.is_whole() || blocks <= BLOCK, "{at} {len}: {blocks}");
                        let edge = cut.asks.start == at || cut.asks.end == at + len;
                        assert!(cut.is_whole() || edge);
                    }
                }
            }
        }
    }

    #[test]
    fn what_waits_for_its_client_keeps_a_shared_buffer_from_others() {
        let since = Instant::now();
        let piece = |step, class| Piece {
            connection: 0,
            asked: 0,
            work: Work::Write,
            step,
            buf: None,
            class,
            asks: 0..BLOCK,
            blocks: 0..BLOCK,
            base: HEAD,
            position: 0,
            until: 0,
            grant: None,
            out: 0..0,
            last: false,
            in_order: false,
            in_flight: true,
            since,
        };
        for class in [Class::Small, Class::Large] {
            let (before, after) = (since - Duration::from_secs(1), since + Duration::from_secs(1));
            for step in [Step::Payload, Step::Send] {
                assert_eq!(piece(step, class).kept_since(Some(before)), Some(since));
                assert_eq!(piece(step, Class::Own).kept_since(Some(before)), None, "nobody else wants it");
            }
            assert_eq!(
                piece(Step::Send, class).kept_since(Some(after)),
                Some(after),
                "it waited for the device"
            );
            assert_eq!(
                piece(Step::Send, class).kept_since(None),
                None,
                "nothing is sent: it waits for the device"
            );
            for step in [Step::Grant, Step::Read, Step::Edge, Step::Write] {
                assert_eq!(piece(step, class).kept_since(Some(before)), None, "the client is not to blame");
            }
        }
    }

    #[test]
    fn the_odd_last_block_of_a_volume_is_whole() {
        let cut = Cut::writing(100 * BLOCK, 512, BLOCK, 32 << 10, TOTAL);
        assert!(cut.is_whole());
        let cut = Cut::writing(99 * BLOCK, 512 + BLOCK, BLOCK, 32 << 10, TOTAL);
        assert!(cut.is_whole() && cut.asks.end == TOTAL);
    }
}
