//! A piece between its extent, the device and the cipher.
//!
//! The order that keeps neighbours and a re-encryption safe:
//! 1. a payload is here, whole, before its extent is asked for: no client can hold an extent;
//! 2. leave to touch the extent ([`View::admit`](crate::pipeline::view::View::admit)) before its first byte is read or written; what
//!    is changed in part is read, changed and written under one leave;
//! 3. the cipher of the leave, and no other;
//! 4. the extent is given back when the device has answered (and the bytes are decrypted), before the client has.

use crate::backend::{Done, Position, Queue, What};
use crate::export::nbd::answer::Failure;
use crate::export::nbd::connection::Ending;
use crate::export::nbd::server::{Server, Whose, push};
use crate::export::nbd::slot::{Step, Work};
use crate::format::nbd::errors;
use crate::pipeline::view::{Access, Refusal};
use crate::units::Extent;
use proto::Stage;
use std::time::Instant;

/// What was written before may be lost, see [`crate::export::exported::Durability`].
pub(super) const LOST: Failure =
    Failure { errno: errors::EIO, text: "an earlier flush failed: what was written may be lost", at: None };

/// A re-encryption has failed over it.
const UNRECOVERED: Failure =
    Failure { errno: errors::EIO, text: "a re-encryption failed here: resume it to recover", at: None };

impl Server {
    /// A piece has all it needs of the client.
    pub(super) fn start(&mut self, key: usize, queue: &mut dyn Queue) {
        let piece = &mut self.pieces[key];
        piece.step = Step::Grant;
        piece.since = self.now;
        let served = &self.served[self.connections[piece.connection].served];
        if piece.work != Work::Read && served.export.durability.is_lost() {
            self.fail_piece(key, LOST, queue);
            return;
        }
        self.go_on(key, queue);
    }

    /// Pieces that waited for their extent ask again.
    pub(super) fn retry_all(&mut self, queue: &mut dyn Queue) {
        let mut at = 0;
        while let Some(key) = self.served.iter().map(|(key, _)| key).find(|&key| key >= at) {
            at = key + 1;
            for _ in 0..self.served[key].waiting.len() {
                // Only failing pieces of others can shorten the list meanwhile.
                let Some(piece) = self.served[key].waiting.pop_front() else { break };
                self.go_on(piece, queue);
            }
        }
    }

    /// The next part of a piece: up to where its leave, or the segment, ends.
    fn go_on(&mut self, key: usize, queue: &mut dyn Queue) {
        let piece = &mut self.pieces[key];
        let served = &mut self.served[self.connections[piece.connection].served];
        let start = piece.position;
        let Some(extent) = Extent::new(start, piece.blocks.end) else {
            self.piece_done(key);
            return;
        };
        let grant = match piece.grant.take() {
            Some(grant) => grant,
            None => {
                let access = if piece.work == Work::Read { Access::Read } else { Access::Write };
                let grant = match served.export.view.admit(access, extent) {
                    Ok(grant) => grant,
                    Err(Refusal::Wait) => {
                        piece.step = Step::Grant;
                        served.waiting.push_back(key);
                        return;
                    }
                    Err(Refusal::Lost) => {
                        let at = Some(start.max(piece.asks.start));
                        self.fail_piece(key, Failure { at, ..UNRECOVERED }, queue);
                        return;
                    }
                };
                let waited = self.now.saturating_duration_since(piece.since);
                let granted = grant.extent.end().min(extent.end()) - start;
                served.record.record(&served.counters, Stage::Queue, waited, granted);
                grant
            }
        };
        piece.until = grant.extent.end().min(extent.end()).min(grant.segments.until(start));
        let segment = grant.segments.at(start);
        let offset = segment.place(start);
        let position = Position::At(offset);
        let span = piece.span();
        let whole = piece.covers();
        piece.since = self.now;
        piece.in_flight = true;
        let what = match piece.work {
            Work::Discard => What::Discard { offset, len: piece.until - start },
            Work::Write | Work::Zero if whole => {
                piece.step = Step::Write;
                piece.overlay();
                let bytes = span.start as usize..span.end as usize;
                let mut buf = piece.buf.take().expect("not lent");
                let begun = Instant::now();
                segment.encrypt(start, &mut buf[bytes]);
                self.crypted = true;
                piece.since = Instant::now();
                let spent = piece.since.saturating_duration_since(begun);
                served.record.record(&served.counters, Stage::Crypt, spent, piece.until - start);
                What::Write { position, buf, span }
            }
            work => {
                piece.step = if work == Work::Read { Step::Read } else { Step::Edge };
                What::Read { position, buf: piece.buf.take().expect("not lent"), span }
            }
        };
        if piece.work == Work::Discard {
            piece.step = Step::Write;
        }
        piece.grant = Some(grant);
        push(queue, Whose::Piece, key, served.port, what);
    }

    /// The device has answered.
    pub(super) fn moved(&mut self, key: usize, done: Done, queue: &mut dyn Queue) {
        let piece = &mut self.pieces[key];
        piece.in_flight = false;
        if let Some(buf) = done.buf {
            piece.buf = Some(buf);
        }
        let connection = &self.connections[piece.connection];
        let served = &mut self.served[connection.served];
        let (start, until) = (piece.position, piece.until);
        let stage = if piece.step == Step::Write { Stage::Write } else { Stage::Read };
        let spent = self.now.saturating_duration_since(piece.since);
        // What is discarded is not moved.
        let bytes = if piece.work == Work::Discard { 0 } else { until - start };
        served.record.record(&served.counters, stage, spent, bytes);
        // A client that has gone: a write that has reached the device has, the rest is not begun.
        let gone = connection.ending == Ending::Hard;
        let failure = match done.result {
            Ok(count) if stage == Stage::Read && u64::from(count) != until - start => {
                let at = start.max(piece.asks.start);
                Some(Failure { errno: errors::EIO, text: "the device has ended early", at: Some(at) })
            }
            Ok(_) => None,
            // Discarding is a hint, and not every device can: then the bytes stay. A device that fails is another thing.
            Err(error)
                if piece.work == Work::Discard
                    && matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL)) =>
            {
                None
            }
            Err(error) => {
                let at = start.max(piece.asks.start);
                Some(Failure { errno: errno_of(&error), text: text_of(&error), at: Some(at) })
            }
        };
        if gone {
            let connection = piece.connection;
            self.forget(key);
            self.mark(connection);
            return;
        }
        if let Some(failure) = failure {
            self.fail_piece(key, failure, queue);
            return;
        }
        let grant = piece.grant.take().expect("leave to touch what is under way");
        if piece.step == Step::Read || piece.step == Step::Edge {
            let segment = grant.segments.at(start);
            let span = piece.span();
            let bytes = span.start as usize..span.end as usize;
            let begun = Instant::now();
            segment.decrypt(start, &mut piece.buf.as_mut().expect("just came back")[bytes.clone()]);
            self.crypted = true;
            if piece.step == Step::Edge {
                piece.overlay();
                let mut buf = piece.buf.take().expect("just came back");
                segment.encrypt(start, &mut buf[bytes]);
                let position = Position::At(segment.place(start));
                piece.step = Step::Write;
                piece.in_flight = true;
                piece.grant = Some(grant);
                piece.since = Instant::now();
                let spent = piece.since.saturating_duration_since(begun);
                served.record.record(&served.counters, Stage::Crypt, spent, until - start);
                push(queue, Whose::Piece, key, served.port, What::Write { position, buf, span });
                return;
            }
            let spent = begun.elapsed();
            served.record.record(&served.counters, Stage::Crypt, spent, until - start);
        }
        piece.position = until;
        if until < grant.extent.end().min(piece.blocks.end) {
            piece.grant = Some(grant);
        } else {
            served.export.view.done(grant);
            piece.since = self.now;
        }
        self.go_on(key, queue);
    }

    /// All of a piece is done.
    fn piece_done(&mut self, key: usize) {
        let piece = &self.pieces[key];
        if piece.work == Work::Read {
            self.data_ready(key);
            return;
        }
        let asked = piece.asked;
        self.release(key);
        self.asked[asked].pieces -= 1;
        self.settle(asked);
    }

    /// A piece could not be done.
    fn fail_piece(&mut self, key: usize, failure: Failure, queue: &mut dyn Queue) {
        let piece = &self.pieces[key];
        let (asked, connection, in_order) = (piece.asked, piece.connection, piece.in_order);
        if in_order && self.asked[asked].streamed > 0 {
            // Its first part is sent, and said that all would follow.
            self.admission_error(connection);
            self.hang_up(connection, queue);
            return;
        }
        self.release(key);
        self.asked[asked].pieces -= 1;
        self.fail(asked, failure);
        self.settle(asked);
    }
}

/// What a client is told of an error of the device.
fn errno_of(error: &std::io::Error) -> u32 {
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => errors::ENOSPC,
        Some(libc::EPERM | libc::EACCES | libc::EROFS | libc::EBADF) => errors::EPERM,
        Some(libc::ENOMEM) => errors::ENOMEM,
        _ => errors::EIO,
    }
}

fn text_of(error: &std::io::Error) -> &'static str {
    match errno_of(error) {
        errors::ENOSPC => "no space left on the device",
        errors::EPERM => "the device may not be written",
        errors::ENOMEM => "no memory for the device's operation",
        _ => "the device failed",
    }
}
