//! What is asked of a server over one connection, and what it answers: bytes out, bytes in, no I/O.
//!
//! Operations become requests (several, where one is larger than the server takes), whose replies may come in any order and in
//! pieces. Payload goes from and to the caller's buffer without a copy, but for what arrives together with a header.
//!
//! Everything that arrives is checked before it is believed: a cookie must be that of a request that was sent and not answered,
//! pieces of a reply must lie in what was asked and never overlap, and a reply ends only when all of it was covered. A server that
//! breaks a rule is not spoken to any more ([`Violation`]); no length it announces is ever allocated.

mod replies;

use std::collections::VecDeque;
use std::io::IoSlice;
use std::sync::{Arc, Mutex, PoisonError};

use slab::Slab;
use zeroize::Zeroizing;

use crate::backend::nbd::coverage::Coverage;
use crate::backend::nbd::queue::Inbox;
use crate::backend::{Done, Position, Span, What};
use crate::format::nbd::reply::Style;
use crate::format::nbd::request::{Command, EXTENDED_BYTES, Request};
use crate::format::nbd::{command_flags, errors};
use crate::sys::buffer::Buf;

/// Requests that wait for their replies on one connection; more wait here. Servers work on 16 or so at a time.
const WINDOW: usize = 64;
/// Pieces of memory handed to the kernel at once.
pub const SLICES_MAX: usize = 16;
/// What is read with a header and behind it: enough for many headers, little enough to copy.
const STAGING_BYTES: usize = 8192;
/// The longest payload that is kept together: block status of 128 Ki extents.
const COLLECTED_MAX: u64 = 8 + (16 << 17);
/// Contexts that are ever asked for.
const CONTEXTS_MAX: usize = 2;
/// Extents of one answer to a request for block status, of all contexts.
const STATUS_MAX: usize = 1 << 18;
/// Bytes of one request for zeros.
const ZEROES_MAX: u32 = 1 << 30;
/// Bits of a cookie that say which request; the others count.
const INDEX_BITS: u32 = 24;

/// A server broke a rule of the protocol: which.
#[derive(Debug)]
pub struct Violation(pub &'static str);

/// Whose an operation is.
#[derive(Clone)]
pub struct Owner {
    /// Where its completion goes.
    pub inbox: Arc<Inbox>,
    /// On which port of that queue.
    pub port: u32,
    /// The caller's name for it.
    pub token: u64,
}

impl Owner {
    fn is(&self, inbox: &Arc<Inbox>, port: u32) -> bool {
        self.port == port && Arc::ptr_eq(&self.inbox, inbox)
    }
}

/// One extent of a block status reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusExtent {
    /// Of which context.
    pub context: u32,
    /// Bytes.
    pub length: u64,
    /// Of the context.
    pub flags: u64,
}

/// Where a block status reply goes.
pub type Answer = Arc<Mutex<Vec<StatusExtent>>>;

/// What sizes requests must keep to.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Bytes of the export.
    pub size: u64,
    /// Offsets and lengths are multiples of this.
    pub block_min: u32,
    /// Bytes of one read or write; a multiple of `block_min`.
    pub payload_max: u32,
    /// How replies look.
    pub style: Style,
}

/// An operation.
struct Flight {
    owner: Owner,
    command: Command,
    /// What the caller lent, and which part of it.
    buf: Option<Buf>,
    span: Span,
    /// A read whose ends are no whole blocks: all of the blocks, and where in them the span begins.
    widened: Option<(Zeroizing<Vec<u8>>, usize)>,
    answer: Option<Answer>,
    /// Of a flush.
    mark: u64,
    /// Requests without an answer.
    left: u32,
    error: Option<std::io::Error>,
}

/// A request.
struct Part {
    /// `None`: nobody waits any more, but the server will answer.
    flight: Option<usize>,
    cookie: u64,
    command: Command,
    offset: u64,
    length: u32,
    /// Where in the flight's bytes its own begin.
    at: u32,
    header: [u8; EXTENDED_BYTES],
    header_bytes: usize,
    sent: bool,
    covered: Coverage,
    error: Option<std::io::Error>,
}

/// What the next bytes are.
#[derive(Debug, Clone, Copy)]
enum Reading {
    Header,
    /// The offset in front of a chunk of data.
    Offset {
        part: usize,
        length: u64,
        last: bool,
    },
    /// Data for bytes `at..at + left` of a part.
    Payload {
        part: usize,
        at: u32,
        left: u32,
        last: bool,
    },
    /// A short payload that is looked at as a whole.
    Whole {
        part: usize,
        kind: u16,
        left: u64,
        last: bool,
    },
}

/// Bytes that arrived and were not looked at.
struct Staging {
    bytes: Zeroizing<Box<[u8]>>,
    start: usize,
    end: usize,
}

impl Staging {
    fn ready(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    fn take(&mut self, count: usize) {
        self.start += count;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Make room behind what is there.
    fn settle(&mut self) {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
    }
}

/// An operation that has come to its end.
pub struct Finished {
    /// Whose it was.
    pub owner: Owner,
    /// What became of it.
    pub done: Done,
}

/// See the module.
pub struct Session {
    bounds: Bounds,
    flights: Slab<Flight>,
    parts: Slab<Part>,
    unsent: VecDeque<usize>,
    /// Bytes of the first of them that are sent.
    sent_of_first: usize,
    /// Requests sent that wait for replies.
    awaited: usize,
    /// Of them, and of the unsent: writes.
    writes: u64,
    serial: u64,
    staging: Staging,
    reading: Reading,
    whole: Zeroizing<Vec<u8>>,
    finished: Vec<Finished>,
    /// Writes the server said it has done, since somebody asked.
    acknowledged: u64,
    /// The largest mark of a flush that succeeded.
    flushed: u64,
    /// Replies that were complete, since somebody asked.
    pub(super) replies: u64,
}

impl Session {
    /// Nothing asked yet.
    #[must_use]
    pub fn new(bounds: Bounds) -> Self {
        Self {
            bounds,
            flights: Slab::new(),
            parts: Slab::new(),
            unsent: VecDeque::new(),
            sent_of_first: 0,
            awaited: 0,
            writes: 0,
            serial: 0,
            staging: Staging { bytes: Zeroizing::new(vec![0; STAGING_BYTES].into()), start: 0, end: 0 },
            reading: Reading::Header,
            whole: Zeroizing::default(),
            finished: Vec::new(),
            acknowledged: 0,
            flushed: 0,
            replies: 0,
        }
    }

    /// Accept an operation. It comes back by [`Session::finished`], perhaps at once. `mark` is remembered with a flush
    /// ([`Session::flushed`]).
    pub fn push(&mut self, owner: Owner, what: What, mark: u64) {
        match what {
            What::Read { position, buf, span } => self.push_read(owner, position, buf, span),
            What::Write { position, buf, span } => self.push_write(owner, position, buf, span),
            What::Flush => {
                let flight = self.flight(owner, Command::Flush, None, 0..0);
                self.flights[flight].mark = mark;
                self.part(flight, Command::Flush, 0, 0, 0);
            }
            What::Discard { offset, len } => self.push_zeroes(owner, offset, len),
            // A volume is no stream.
            What::Receive { buf, .. } => self.settle(owner, Some(buf), Err(errno(libc::ESPIPE))),
            // Nothing needs to be waited for: requests are taken at any time.
            What::Ready { .. } => self.settle(owner, None, Ok(0)),
        }
    }

    /// Ask for the status of `offset..offset + length`, which must lie in the export and keep to its blocks.
    pub fn push_status(&mut self, owner: Owner, offset: u64, length: u32, answer: Answer) {
        let flight = self.flight(owner, Command::BlockStatus, None, 0..0);
        self.flights[flight].answer = Some(answer);
        self.part(flight, Command::BlockStatus, offset, length, 0);
    }

    /// Fail an operation before anything was asked.
    pub fn refuse(&mut self, owner: Owner, what: What, error: std::io::Error) {
        let buf = match what {
            What::Read { buf, .. } | What::Write { buf, .. } | What::Receive { buf, .. } => Some(buf),
            What::Discard { .. } | What::Flush | What::Ready { .. } => None,
        };
        self.settle(owner, buf, Err(error));
    }

    fn settle(&mut self, owner: Owner, buf: Option<Buf>, result: std::io::Result<u32>) {
        let token = owner.token;
        self.finished.push(Finished { owner, done: Done { token, buf, result } });
    }

    fn flight(&mut self, owner: Owner, command: Command, buf: Option<Buf>, span: Span) -> usize {
        let (widened, answer) = (None, None);
        self.flights.insert(Flight {
            owner,
            command,
            buf,
            span,
            widened,
            answer,
            mark: 0,
            left: 0,
            error: None,
        })
    }

    fn push_read(&mut self, owner: Owner, position: Position, buf: Buf, mut span: Span) {
        let Position::At(offset) = position else {
            return self.settle(owner, Some(buf), Err(errno(libc::ESPIPE)));
        };
        let wanted = span.end - span.start;
        // Short only at the end.
        let there = u32::try_from(self.bounds.size.saturating_sub(offset)).unwrap_or(u32::MAX).min(wanted);
        if there == 0 {
            return self.settle(owner, Some(buf), Ok(0));
        }
        span.end = span.start + there;
        let block = u64::from(self.bounds.block_min);
        // The size is a whole number of blocks, so this stays inside.
        let first = offset / block * block;
        let last = (offset + u64::from(there)).next_multiple_of(block);
        let flight = self.flight(owner, Command::Read, Some(buf), span);
        if first == offset && last == offset + u64::from(there) {
            return self.parts_of(flight, Command::Read, offset, there);
        }
        let length =
            u32::try_from(last - first).unwrap_or(u32::MAX / self.bounds.block_min * self.bounds.block_min);
        let head = usize::try_from(offset - first).expect("less than a block");
        self.flights[flight].widened = Some((Zeroizing::new(vec![0; length as usize]), head));
        self.parts_of(flight, Command::Read, first, length);
    }

    fn push_write(&mut self, owner: Owner, position: Position, buf: Buf, span: Span) {
        let Position::At(offset) = position else {
            return self.settle(owner, Some(buf), Err(errno(libc::ESPIPE)));
        };
        let length = span.end - span.start;
        if length == 0 {
            return self.settle(owner, Some(buf), Ok(0));
        }
        let fits = offset.checked_add(length.into()).is_some_and(|end| end <= self.bounds.size);
        if !fits {
            return self.settle(owner, Some(buf), Err(errno(libc::ENOSPC)));
        }
        let block = self.bounds.block_min;
        if !offset.is_multiple_of(block.into()) || !length.is_multiple_of(block) {
            let what = format!("the server takes only whole blocks of {block} bytes");
            let error = std::io::Error::new(std::io::ErrorKind::InvalidInput, what);
            return self.settle(owner, Some(buf), Err(error));
        }
        let flight = self.flight(owner, Command::Write, Some(buf), span);
        self.parts_of(flight, Command::Write, offset, length);
    }

    /// Zeros without sending them; the server may give the space back.
    fn push_zeroes(&mut self, owner: Owner, offset: u64, length: u64) {
        let end = offset.checked_add(length).filter(|&end| end <= self.bounds.size);
        let block = u64::from(self.bounds.block_min);
        let Some(end) = end.filter(|end| offset.is_multiple_of(block) && end.is_multiple_of(block)) else {
            return self.settle(owner, None, Err(errno(libc::EINVAL)));
        };
        if length == 0 {
            return self.settle(owner, None, Err(errno(libc::EINVAL)));
        }
        let flight = self.flight(owner, Command::WriteZeroes, None, 0..0);
        for start in (offset..end).step_by(ZEROES_MAX as usize) {
            let count = u32::try_from((end - start).min(ZEROES_MAX.into())).expect("the smaller");
            self.part(flight, Command::WriteZeroes, start, count, 0);
        }
    }

    fn parts_of(&mut self, flight: usize, command: Command, offset: u64, length: u32) {
        let mut at = 0;
        while at < length {
            let count = (length - at).min(self.bounds.payload_max);
            self.part(flight, command, offset + u64::from(at), count, at);
            at += count;
        }
    }

    fn part(&mut self, flight: usize, command: Command, offset: u64, length: u32, at: u32) {
        let place = self.parts.vacant_entry();
        let index = u64::try_from(place.key()).expect("an index");
        assert!(index < 1 << INDEX_BITS, "queues are not so deep");
        let cookie = self.serial << INDEX_BITS | index;
        self.serial = (self.serial + 1) & (u64::MAX >> INDEX_BITS);
        let extended = self.bounds.style == Style::Extended;
        // With extended headers a payload is announced.
        let flags = if extended && command == Command::Write { command_flags::PAYLOAD_LEN } else { 0 };
        let mut header = [0; EXTENDED_BYTES];
        let request = Request { command, flags, cookie, offset, length: length.into() };
        let header_bytes = request.put(&mut header, extended);
        let key = place.key();
        place.insert(Part {
            flight: Some(flight),
            cookie,
            command,
            offset,
            length,
            at,
            header,
            header_bytes,
            sent: false,
            covered: Coverage::default(),
            error: None,
        });
        self.writes += u64::from(changes(command));
        self.flights[flight].left += 1;
        self.unsent.push_back(key);
    }

    /// Is there something that could be sent?
    #[must_use]
    pub fn wants_to_send(&self) -> bool {
        !self.unsent.is_empty() && self.awaited < WINDOW
    }

    /// Does anybody wait for a reply?
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.flights.is_empty()
    }

    /// Does the server have, or is it to get, requests that it has not answered?
    #[must_use]
    pub fn is_asked(&self) -> bool {
        !self.parts.is_empty()
    }

    /// Is a flush among them?
    #[must_use]
    pub fn asks_flush(&self) -> bool {
        self.parts.iter().any(|(_, part)| part.command == Command::Flush)
    }

    /// With extended headers?
    #[must_use]
    pub fn is_extended(&self) -> bool {
        self.bounds.style == Style::Extended
    }

    /// Writes that are not answered.
    #[must_use]
    pub fn writes(&self) -> u64 {
        self.writes
    }

    /// Writes acknowledged since this was last asked.
    pub fn take_acknowledged(&mut self) -> u64 {
        std::mem::take(&mut self.acknowledged)
    }

    /// The largest mark of a flush that succeeded.
    #[must_use]
    pub fn flushed(&self) -> u64 {
        self.flushed
    }

    /// The bytes to be sent next, in order; returns how many slices there are.
    pub fn outgoing<'a>(&'a self, slices: &mut [IoSlice<'a>; SLICES_MAX]) -> usize {
        let mut count = 0;
        let mut skip = self.sent_of_first;
        for &key in self.unsent.iter().take(WINDOW.saturating_sub(self.awaited)) {
            if count + 2 > SLICES_MAX {
                break;
            }
            let part = &self.parts[key];
            let header = &part.header[..part.header_bytes];
            for bytes in [header, self.payload(part)] {
                let skipped = skip.min(bytes.len());
                skip -= skipped;
                if skipped < bytes.len() {
                    slices[count] = IoSlice::new(&bytes[skipped..]);
                    count += 1;
                }
            }
        }
        count
    }

    fn payload(&self, part: &Part) -> &[u8] {
        let (Command::Write, Some(flight)) = (part.command, part.flight) else { return &[] };
        let flight = &self.flights[flight];
        let start = (flight.span.start + part.at) as usize;
        &flight.buf.as_ref().expect("lent until all is answered")[start..start + part.length as usize]
    }

    /// So many of these bytes are on their way.
    pub fn sent(&mut self, mut count: usize) {
        while let Some(&key) = self.unsent.front() {
            let part = &self.parts[key];
            let left = part.header_bytes + self.payload(part).len() - self.sent_of_first;
            if count < left {
                self.sent_of_first += count;
                return;
            }
            count -= left;
            self.sent_of_first = 0;
            self.parts[key].sent = true;
            self.unsent.pop_front();
            self.awaited += 1;
        }
        assert_eq!(count, 0, "more was sent than there was");
    }

    fn answered(&mut self, flight: Option<usize>, error: Option<std::io::Error>) {
        let Some(key) = flight else { return };
        let flight = &mut self.flights[key];
        flight.left -= 1;
        if flight.error.is_none() {
            flight.error = error;
        }
        if flight.left == 0 {
            if flight.command == Command::Flush && flight.error.is_none() {
                self.flushed = self.flushed.max(flight.mark);
            }
            self.conclude(key);
        }
    }

    fn conclude(&mut self, key: usize) {
        let mut flight = self.flights.remove(key);
        let span = flight.span.start as usize..flight.span.end as usize;
        let result = match flight.error.take() {
            Some(error) => Err(error),
            None => Ok(flight.span.end - flight.span.start),
        };
        if let (Some((bytes, head)), Some(buf), Ok(_)) = (&flight.widened, &mut flight.buf, &result) {
            let count = span.len();
            buf[span].copy_from_slice(&bytes[*head..*head + count]);
        }
        self.settle(flight.owner, flight.buf, result);
    }

    /// What has come to its end since this was last asked.
    pub fn finished(&mut self) -> &mut Vec<Finished> {
        &mut self.finished
    }

    /// Ask for the early end of what a port has in flight. What was not sent ends now, and so do reads, whose replies nobody waits
    /// for any more; a write or flush that was sent, be it in part, ends with its reply, unless this is `urgent`. `false`: then the
    /// server must not get the rest of a write, so the connection cannot be used any more.
    pub fn cancel(&mut self, inbox: &Arc<Inbox>, port: u32, urgent: bool) -> bool {
        let mut usable = true;
        let theirs: Vec<usize> = self
            .flights
            .iter()
            .filter(|(_, flight)| flight.owner.is(inbox, port))
            .map(|(key, _)| key)
            .collect();
        for key in theirs {
            let parts: Vec<usize> = self
                .parts
                .iter()
                .filter(|(_, part)| part.flight == Some(key))
                .map(|(part, _)| part)
                .collect();
            for at in parts {
                let begun = self.unsent.front() == Some(&at) && self.sent_of_first > 0;
                let part = &mut self.parts[at];
                if part.sent || begun {
                    if part.command != Command::Read && !urgent {
                        continue;
                    }
                    usable &= !begun || part.command != Command::Write;
                    part.flight = None;
                } else {
                    self.writes -= u64::from(changes(part.command));
                    self.parts.remove(at);
                    self.unsent.retain(|&unsent| unsent != at);
                }
                self.answered(Some(key), Some(errno(libc::ECANCELED)));
            }
        }
        usable
    }

    /// The connection is another one now: ask again for everything that was not answered, in the order it was asked.
    pub fn restart(&mut self, bounds: Bounds) {
        self.bounds.style = bounds.style;
        self.forget_stream();
        let abandoned: Vec<usize> =
            self.parts.iter().filter(|(_, part)| part.flight.is_none()).map(|(key, _)| key).collect();
        for key in abandoned {
            self.writes -= u64::from(changes(self.parts[key].command));
            self.parts.remove(key);
        }
        let mut all: Vec<usize> = self.parts.iter().map(|(key, _)| key).collect();
        all.sort_by_key(|&key| self.parts[key].cookie >> INDEX_BITS);
        let extended = bounds.style == Style::Extended;
        for &key in &all {
            let part = &mut self.parts[key];
            part.sent = false;
            part.covered = Coverage::default();
            part.error = None;
            let flags =
                if extended && part.command == Command::Write { command_flags::PAYLOAD_LEN } else { 0 };
            let request = Request {
                command: part.command,
                flags,
                cookie: part.cookie,
                offset: part.offset,
                length: part.length.into(),
            };
            part.header_bytes = request.put(&mut part.header, extended);
            if let Some(answer) = part.flight.and_then(|flight| self.flights[flight].answer.as_ref()) {
                answer.lock().unwrap_or_else(PoisonError::into_inner).clear();
            }
        }
        self.unsent = all.into();
    }

    fn forget_stream(&mut self) {
        (self.sent_of_first, self.awaited) = (0, 0);
        (self.staging.start, self.staging.end) = (0, 0);
        self.reading = Reading::Header;
    }

    /// Where the writes go that the server may have taken and did not answer.
    pub fn writes_begun(&self) -> impl Iterator<Item = (u64, u64)> {
        let first = self.unsent.front().copied().filter(|_| self.sent_of_first > 0);
        let begun = move |key: usize, part: &Part| changes(part.command) && (part.sent || first == Some(key));
        let begun = self.parts.iter().filter(move |(key, part)| begun(*key, part));
        begun.map(|(_, part)| (part.offset, part.offset + u64::from(part.length)))
    }

    /// Everything of these commands ends with this error.
    pub fn fail(&mut self, only: Option<Command>, error: impl Fn() -> std::io::Error) {
        let failing: Vec<usize> = self
            .flights
            .iter()
            .filter(|(_, flight)| only.is_none_or(|command| flight.command == command))
            .map(|(key, _)| key)
            .collect();
        for key in failing {
            for (_, part) in &mut self.parts {
                if part.flight == Some(key) {
                    part.flight = None;
                }
            }
            self.flights[key].error = Some(error());
            self.conclude(key);
        }
        if only.is_none() {
            self.parts.clear();
            self.unsent.clear();
            self.writes = 0;
            self.forget_stream();
        }
    }

    /// Everybody who waits.
    pub fn inboxes(&self) -> impl Iterator<Item = &Arc<Inbox>> {
        self.flights.iter().map(|(_, flight)| &flight.owner.inbox)
    }
}

/// The memory of bytes `at..at + count` of a request; `None`: nobody waits for it.
fn into<'a>(flights: &'a mut Slab<Flight>, part: &Part, at: u32, count: u32) -> Option<&'a mut [u8]> {
    let flight = &mut flights[part.flight?];
    let start = (part.at + at) as usize;
    let (bytes, start): (&mut [u8], usize) = match &mut flight.widened {
        Some((bytes, _)) => (bytes, start),
        None => (flight.buf.as_mut()?, flight.span.start as usize + start),
    };
    Some(&mut bytes[start..start + count as usize])
}

/// Does it change what is durable?
fn changes(command: Command) -> bool {
    matches!(command, Command::Write | Command::WriteZeroes)
}

fn errno(code: i32) -> std::io::Error {
    std::io::Error::from_raw_os_error(code)
}

/// An error as the server put it. Without words of its own, or where the number matters to others, the number says it.
fn failure(error: u32, text: &str) -> std::io::Error {
    let code = match error {
        errors::EPERM => libc::EPERM,
        errors::ENOMEM => libc::ENOMEM,
        errors::EINVAL => libc::EINVAL,
        errors::ENOSPC => libc::ENOSPC,
        errors::EOVERFLOW => libc::EOVERFLOW,
        errors::ENOTSUP => libc::EOPNOTSUPP,
        errors::ESHUTDOWN => libc::ESHUTDOWN,
        _ => libc::EIO,
    };
    let plain = errno(code);
    if text.is_empty() || code == libc::ENOSPC || code == libc::EPERM {
        return plain;
    }
    std::io::Error::new(plain.kind(), format!("{}; the server says: {text}", proto::errno::describe(&plain)))
}

/// Text of a peer, fit for a log: bounded, without control characters.
#[must_use]
pub fn printable(text: &[u8]) -> String {
    const TEXT_MAX: usize = 256;
    String::from_utf8_lossy(text).chars().take(TEXT_MAX).flat_map(char::escape_debug).collect()
}
