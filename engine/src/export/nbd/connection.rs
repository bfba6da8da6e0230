//! One client: what it has sent and is not yet understood, what is to be sent to it.
//!
//! ```text
//! socket ─▶ intake buffer ─ parse ─▶ requests …      … replies ─▶ ready (in order) ─┬▶ gathered: many small ones ─▶ one send
//!                    └ payloads: copied, or received into their buffer              └▶ direct: header and data as they lie
//! ```
//! One receive and one send are in flight at most. While a send is under way replies gather; small ones are copied together, so that
//! many cost one send, large ones go out from their own buffer. What cannot go out waits in `ready` and holds its place among the
//! connection's requests ([`OPEN_MAX`]): a client that does not read stalls itself.
//!
//! A connection never waits for another one's client: its own buffers suffice to get on.

use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use rustix::net::sockopt;

use crate::backend::Port;
use crate::export::exported::Seat;
use crate::export::nbd::answer::{NOTE_MAX, Note, put_note};
use crate::export::nbd::hub::Admission;
use crate::export::nbd::pace::Pace;
use crate::export::nbd::pool::{Class, WIRE_BYTES};
use crate::export::nbd::sealed::Sealed;
use crate::format::nbd::reply::Style;
use crate::format::nbd::request::{COMPACT_BYTES, EXTENDED_BYTES, Request};
use crate::sys::buffer::Buf;

/// Requests of one connection that are not answered.
pub const OPEN_MAX: u32 = 128;

/// Largest reply that is copied: beyond it a send of its own costs less.
pub const GATHER_MAX: u32 = 16 << 10;

/// What the next bytes from the client are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Intake {
    /// A request.
    Request,
    /// The payload of a write; the piece being filled, and how much of it there is.
    Payload {
        /// The request.
        asked: usize,
        /// The piece.
        piece: Option<(usize, u32)>,
    },
    /// The payload of a write that is refused.
    Drain {
        /// The request.
        asked: usize,
        /// Bytes to come.
        left: u64,
    },
}

/// How far a connection is on its way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ending {
    /// It is not.
    No,
    /// Nothing more is taken from the client; what it has asked for is answered.
    Polite,
    /// Nothing is sent any more; what is in flight comes back.
    Hard,
}

/// Something to send.
pub enum Ready {
    /// A reply without data.
    Note(Note),
    /// The reply to BLOCK_STATUS.
    Status(Request),
    /// A piece whose `out` is to be sent.
    Piece(usize),
}

/// What is being sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sending {
    /// So many bytes of gathered replies.
    Gathered(u32),
    /// A piece's own buffer.
    Piece(usize),
    /// What TLS has to say of its own.
    Records,
}

/// See the module.
pub struct Connection {
    /// Its place among the export's clients; given back when it is dropped.
    pub admission: Admission,
    /// Its place in the export, until nothing of it is left.
    pub _seat: Seat,
    /// Its export on this worker.
    pub served: usize,
    /// Its socket.
    pub socket: Arc<OwnedFd>,
    /// The same, on the queue.
    pub port: Port,
    /// How it is answered.
    pub style: Style,
    /// The number it knows `base:allocation` by.
    pub allocation: Option<u32>,
    /// What came with it; under TLS, whatever was received and opened.
    pub early: Vec<u8>,
    /// TLS between all of this and the socket.
    pub sealed: Option<Box<Sealed>>,

    /// The receive buffer, unless it is lent.
    pub received: Option<Buf>,
    /// Bytes in it that are not understood yet.
    pub unread: Range<usize>,
    /// What comes next.
    pub intake: Intake,
    /// A receive is in flight.
    pub receiving: bool,

    /// Replies gather here.
    pub gather: Option<Buf>,
    /// So many bytes.
    pub gathered: u32,
    /// The other one, unless it is being sent.
    pub spare: Option<Buf>,
    /// Replies that are in neither.
    pub ready: VecDeque<Ready>,
    /// What is in flight.
    pub sending: Option<Sending>,
    /// When the last of that began.
    pub send_began: Instant,
    /// Since when something is, one after the other: since then the client is waited for.
    pub sending_since: Option<Instant>,
    /// An in-order read has begun to be sent: nothing else is until its end.
    pub stream: Option<usize>,
    /// Its next part is ready.
    pub stream_ready: bool,

    /// Its own slot buffer, when it is free.
    pub own: Option<Buf>,
    /// Shared buffers it holds.
    pub small: usize,
    /// Large ones.
    pub large: usize,
    /// Small ones with what waits to be sent, or is being sent.
    pub unsent_small: usize,
    /// Large ones.
    pub unsent_large: usize,
    /// Its own buffer served a long request last: a payload that waits is next.
    pub own_long: bool,
    /// Bytes that pieces read for it, or hold for it until they are sent.
    pub reading: u64,
    /// How far replies may run ahead, on a socket of this machine.
    pub pace: Option<Pace>,
    /// Requests that are not answered, also those whose reply waits in `ready`.
    pub open: u32,
    /// Requests that are known by a key.
    pub asked: u32,
    /// Pieces there are.
    pub pieces: u32,
    /// Reads that pieces are still to be made of.
    pub unissued: VecDeque<usize>,
    /// Long requests (zeros, discarding), served in turn.
    pub long: VecDeque<usize>,
    /// Their pieces.
    pub long_pieces: u32,

    /// The export is being stopped: nothing is received behind the present request.
    pub draining: bool,
    /// On its way out?
    pub ending: Ending,
    /// It is on the list of those to look after.
    pub dirty: bool,
}

impl Connection {
    /// Bytes that the client waits for, as far as the socket has not taken them.
    #[must_use]
    pub fn waiting(&self) -> u64 {
        let sent = if let Some(Sending::Gathered(bytes)) = self.sending { bytes } else { 0 };
        self.reading + u64::from(self.gathered) + u64::from(sent)
    }

    /// Let the socket hold all it can: the client does not read for now.
    pub fn give_room(&mut self) {
        if let Some(size) = self.pace.as_mut().and_then(Pace::give_room) {
            let _ = sockopt::set_socket_send_buffer_size(&self.socket, size);
        }
    }

    /// A send waits behind a buffer that could be larger: since when?
    #[must_use]
    pub fn held_back_since(&self) -> Option<Instant> {
        let narrow = self.pace.as_ref().is_some_and(Pace::is_narrow);
        (narrow && self.sending.is_some() && self.ending != Ending::Hard).then_some(self.send_began)
    }

    /// Let the socket hold as much as the client's depth asks for.
    pub fn keep_pace(&mut self) {
        let waiting = self.waiting();
        if let Some(size) = self.pace.as_mut().and_then(|pace| pace.see(waiting)) {
            // Refused, it costs speed only.
            let _ = sockopt::set_socket_send_buffer_size(&self.socket, size);
        }
    }

    /// How many shared buffers of a class hold what is to be sent.
    pub fn unsent(&mut self, class: Class) -> Option<&mut usize> {
        match class {
            Class::Small => Some(&mut self.unsent_small),
            Class::Large => Some(&mut self.unsent_large),
            Class::Own => None,
        }
    }

    /// Bytes of a request's header.
    #[must_use]
    pub fn header_bytes(&self) -> usize {
        if self.style == Style::Extended { EXTENDED_BYTES } else { COMPACT_BYTES }
    }

    /// Received bytes that are not understood yet.
    #[must_use]
    pub fn unread(&self) -> &[u8] {
        let buf = self.received.as_ref().expect("parsed only when it is not lent");
        &buf[self.unread.clone()]
    }

    /// Make room behind the unread bytes; returns what may be filled.
    pub fn make_room(&mut self) -> Range<usize> {
        let buf = self.received.as_mut().expect("not lent");
        if self.unread.is_empty() {
            self.unread = 0..0;
        } else if self.unread.start > 0 {
            buf.copy_within(self.unread.clone(), 0);
            self.unread = 0..self.unread.len();
        }
        self.unread.end..buf.len()
    }

    /// Bytes that came with the connection, as far as there is room. `false`: there are none.
    pub fn feed_early(&mut self) -> bool {
        if self.early.is_empty() {
            return false;
        }
        let room = self.make_room();
        let count = room.len().min(self.early.len());
        let buf = self.received.as_mut().expect("not lent");
        buf[room.start..room.start + count].copy_from_slice(&self.early[..count]);
        self.unread.end += count;
        self.early.drain(..count);
        true
    }

    /// Room to gather `bytes` more, if there is.
    pub fn gather_room(&mut self, bytes: u32) -> Option<&mut [u8]> {
        let at = self.gathered;
        if at + bytes > WIRE_BYTES {
            return None;
        }
        self.gather.as_mut().map(|buf| &mut buf[at as usize..])
    }

    /// Answer without data: now, if nothing waits before it.
    pub fn note(&mut self, note: Note) {
        if !self.ready.is_empty() || !self.gather_note(&note) {
            self.ready.push_back(Ready::Note(note));
        }
    }

    /// `false`: there is no room.
    pub fn gather_note(&mut self, note: &Note) -> bool {
        let style = self.style;
        let Some(room) = self.gather_room(u32::try_from(NOTE_MAX).expect("some bytes")) else {
            return false;
        };
        let bytes = put_note(room, style, note);
        self.gathered += u32::try_from(bytes).expect("some bytes");
        self.open -= 1;
        true
    }

    /// Everything it asked for is answered, and the answers are with the kernel.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.open == 0 && self.gathered == 0 && self.ready.is_empty() && self.sending.is_none()
    }

    /// Nothing of it is anywhere.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        let quiet = self.ending == Ending::Hard || (self.ending == Ending::Polite && self.is_quiet());
        quiet && !self.receiving && self.sending.is_none() && self.pieces == 0 && self.asked == 0
    }
}
