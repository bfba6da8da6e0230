//! TLS between a connection's socket and everything else of it.
//!
//! ```text
//! receive buffer ─ open ─▶ early bytes ─▶ intake          out ─▶ lent ─ seal, some records at a time ─▶ records ─▶ staging ─▶ socket
//! ```
//! Received records are opened into the connection's early bytes, which the intake takes before it receives again: at most what one
//! receive brings, and one record more. What is sent is lent as a whole and sealed piece by piece, never more than [`SEAL_BYTES`] ahead
//! of the socket; it is given back when the last of it is with the kernel. So the rest of the server does not know the difference, but
//! that payloads are copied.
//!
//! Under TLS bytes are copied twice and rustls allocates for each record; nothing of it happens on other connections.

use std::ops::Range;
use std::os::fd::OwnedFd;
use std::time::Instant;

use proto::Stage;
use rustix::net::{SendFlags, send};

use crate::backend::{Done, Position, Queue, What};
use crate::export::nbd::connection::{Connection, Ending, Sending};
use crate::export::nbd::pace::STALL;
use crate::export::nbd::served::Served;
use crate::export::nbd::server::{Server, Whose, push};
use crate::export::nbd::tls::TlsStream;
use crate::sys::buffer::Buf;

/// Bytes that are sealed at a time: three records, which fit the staging buffer with what TLS puts around them.
const SEAL_BYTES: u32 = 48 << 10;

/// TLS of one connection.
pub struct Sealed {
    stream: Box<TlsStream>,
    /// What the kernel sends from, unless it does.
    staging: Option<Buf>,
    /// Records that are not in it yet.
    records: Vec<u8>,
    /// What is being sent, and how much of it is not sealed yet.
    lent: Option<(Buf, Range<u32>)>,
    /// A record was not sent to its end: nothing makes sense behind it.
    cut: bool,
}

impl Sealed {
    /// After the handshake.
    #[must_use]
    pub fn new(stream: Box<TlsStream>, staging: Buf) -> Self {
        Self { stream, staging: Some(staging), records: Vec::new(), lent: None, cut: false }
    }

    /// Open received bytes; appended to `plain`. `false`: somebody meddled, or the client broke the rules.
    fn open(&mut self, wire: &[u8], plain: &mut Vec<u8>) -> bool {
        self.stream.feed(wire, plain, &mut self.records).is_ok()
    }

    /// TLS has something to say of its own.
    #[must_use]
    pub fn has_to_speak(&self) -> bool {
        !self.records.is_empty()
    }

    /// The next bytes for the socket, in the staging buffer. `None`: all is sent.
    fn next(&mut self) -> Option<(Buf, Range<u32>)> {
        if self.records.is_empty()
            && let Some((buf, rest)) = &mut self.lent
        {
            let end = rest.end.min(rest.start + SEAL_BYTES);
            self.stream.seal(&buf[rest.start as usize..end as usize], &mut self.records);
            rest.start = end;
        }
        if self.records.is_empty() {
            return None;
        }
        let mut staging = self.staging.take().expect("one send at a time");
        let count = self.records.len().min(staging.len());
        staging[..count].copy_from_slice(&self.records[..count]);
        self.records.drain(..count);
        Some((staging, 0..u32::try_from(count).expect("as long as a buffer")))
    }

    /// [`Sealed::next`], as a part of what encrypting takes.
    fn next_timed(&mut self, served: &mut Served) -> Option<(Buf, Range<u32>)> {
        let begun = Instant::now();
        let next = self.next();
        // The volume's own bytes are counted where they are decrypted.
        served.record.record(&served.counters, Stage::Crypt, begun.elapsed(), 0);
        next
    }

    /// Say the end, where it can be said; returns the staging buffer. What the kernel does not take at once is not worth waiting for.
    pub fn close(mut self, socket: &OwnedFd) -> Buf {
        if !self.cut {
            self.stream.close(&mut self.records);
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            let _ = send(socket, &self.records, flags);
        }
        self.staging.expect("nothing is in flight")
    }
}

impl Server {
    /// Send `span` of `buf`, which comes back in [`Server::sent`].
    pub(super) fn transmit(
        &mut self,
        key: usize,
        sending: Sending,
        buf: Option<(Buf, Range<u32>)>,
        queue: &mut dyn Queue,
    ) {
        let connection = &mut self.connections[key];
        connection.sending = Some(sending);
        connection.send_began = self.now;
        let _ = connection.sending_since.get_or_insert(self.now);
        if connection.held_back_since().is_some() {
            let _ = self.room_due.get_or_insert(self.now + STALL);
        }
        let (buf, span) = match &mut connection.sealed {
            None => buf.expect("only TLS speaks for itself"),
            Some(sealed) => {
                sealed.lent = buf;
                let next = sealed.next_timed(&mut self.served[connection.served]);
                next.expect("there is something to send")
            }
        };
        let what = What::Write { position: Position::Stream, buf, span };
        push(queue, Whose::Send, key, connection.port, what);
    }

    /// A send came back: under TLS perhaps not the last one of what is being sent. `None`: the next one is under way.
    pub(super) fn transmitted(&mut self, key: usize, mut done: Done, queue: &mut dyn Queue) -> Option<Done> {
        let connection = &mut self.connections[key];
        let hard = connection.ending == Ending::Hard;
        let Some(sealed) = &mut connection.sealed else { return Some(done) };
        sealed.staging = done.buf.take();
        if done.result.is_ok()
            && !hard
            && let Some((buf, span)) = sealed.next_timed(&mut self.served[connection.served])
        {
            let what = What::Write { position: Position::Stream, buf, span };
            push(queue, Whose::Send, key, connection.port, what);
            return None;
        }
        let lent = sealed.lent.take();
        let rest = lent.as_ref().is_some_and(|(_, rest)| !rest.is_empty());
        sealed.cut |= done.result.is_err() || rest || sealed.has_to_speak();
        done.buf = lent.map(|(buf, _)| buf);
        Some(done)
    }
}

impl Connection {
    /// So many bytes were received behind those that are not understood yet. `false`: they are not what they should be.
    pub(super) fn take_received(&mut self, count: usize, served: &mut Served) -> bool {
        let Some(sealed) = &mut self.sealed else {
            self.unread.end += count;
            return true;
        };
        let buf = self.received.as_ref().expect("not lent");
        let begun = Instant::now();
        let opened = sealed.open(&buf[self.unread.end..self.unread.end + count], &mut self.early);
        served.record.record(&served.counters, Stage::Crypt, begun.elapsed(), 0);
        opened
    }
}
