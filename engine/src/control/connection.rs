//! One client: bytes and descriptors in, lines out.
//!
//! Bounded on every side. A line grows to `proto::MAX_LINE` and no further; it must be complete in time; descriptors are
//! counted, and closed with the line that failed. Replies go to a buffer that is sent as the client reads; above a mark
//! nothing more is read from that client. Lines are taken one by one from the socket (looked at first, then consumed up
//! to their newline), so descriptors can only meet the line they came with: the kernel never joins them to later bytes.

use std::collections::BTreeSet;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use proto::export::ExportId;
use proto::{Body, ErrorKind, Failure, JobId, JobState};
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags};

use super::line;
use super::policy::Peer;
use crate::limits;

/// A `watch` in progress.
#[derive(Debug)]
pub struct Watch {
    /// Request id of its events.
    pub id: u64,
    /// The job.
    pub job: JobId,
    /// The state last told.
    pub state: JobState,
    /// Between progress events.
    pub interval: Duration,
    /// When the next is due.
    pub due: Instant,
}

/// What reading gave.
#[derive(Debug)]
pub enum Received {
    /// A complete line and its descriptors.
    Line(Vec<u8>, Vec<OwnedFd>),
    /// Not yet.
    Nothing,
    /// The client has closed its side; half a line may have been lost with it.
    End,
    /// It cannot be served further: answer this, then close.
    Broken(Failure),
}

/// One connection.
#[derive(Debug)]
pub struct Connection {
    /// The socket.
    pub stream: OwnedFd,
    /// Who it is.
    pub peer: Peer,
    /// Its watches.
    pub watches: Vec<Watch>,
    /// Jobs to cancel when it ends.
    pub attached: BTreeSet<JobId>,
    /// Exports to stop when it ends.
    pub exports: BTreeSet<ExportId>,
    /// A helper works on its request; its next line waits.
    pub busy: bool,
    /// Set when it is closed, for helpers that work on its request.
    pub gone: Arc<AtomicBool>,
    /// To be closed once its replies are sent.
    pub closing: bool,
    /// What epoll watches for.
    pub interest: EventFlags,
    input: Vec<u8>,
    descriptors: Vec<OwnedFd>,
    line_since: Option<Instant>,
    output: Vec<u8>,
    sent: usize,
    unread_since: Option<Instant>,
}

impl Connection {
    /// A fresh one.
    #[must_use]
    pub fn new(stream: OwnedFd, peer: Peer) -> Self {
        Self {
            stream,
            peer,
            watches: Vec::new(),
            attached: BTreeSet::new(),
            exports: BTreeSet::new(),
            busy: false,
            gone: Arc::default(),
            closing: false,
            interest: EventFlags::IN,
            input: Vec::new(),
            descriptors: Vec::new(),
            line_since: None,
            output: Vec::new(),
            sent: 0,
            unread_since: None,
        }
    }

    /// May its next line be read?
    #[must_use]
    pub fn listens(&self) -> bool {
        !self.closing && !self.busy && self.unsent() <= limits::UNSENT_HIGH
    }

    /// Bytes of replies the client has not taken yet.
    #[must_use]
    pub fn unsent(&self) -> usize {
        self.output.len() - self.sent
    }

    /// Bytes of memory held for them beyond what every connection may hold.
    #[must_use]
    pub fn held(&self) -> usize {
        if self.unsent() == 0 { 0 } else { self.output.capacity() }
    }

    /// Descriptors of a line that will not be finished. They are not ours to drop: see `closer`.
    pub fn unwanted(&mut self) -> Vec<OwnedFd> {
        if self.closing { std::mem::take(&mut self.descriptors) } else { Vec::new() }
    }

    /// All its descriptors, its socket among them.
    pub fn surrender(self) -> impl Iterator<Item = OwnedFd> {
        self.descriptors.into_iter().chain([self.stream])
    }

    /// Read on, at most to the end of one line. `scratch` holds at least `proto::MAX_LINE` bytes.
    pub fn receive(&mut self, scratch: &mut [u8], now: Instant) -> Received {
        loop {
            let room = proto::MAX_LINE - self.input.len();
            let look =
                rustix::net::recv(&self.stream, &mut scratch[..room], RecvFlags::PEEK | RecvFlags::DONTWAIT);
            let seen = match look {
                Ok((0, _)) => return Received::End,
                Ok((seen, _)) => seen,
                Err(Errno::AGAIN) => return Received::Nothing,
                Err(Errno::INTR) => continue,
                Err(_) => return Received::End,
            };
            let take = scratch[..seen].iter().position(|byte| *byte == b'\n').map_or(seen, |at| at + 1);
            let got = match self.consume(&mut scratch[..take]) {
                Ok(got) => got,
                Err(received) => return received,
            };
            self.input.extend_from_slice(&scratch[..got]);
            if self.input.last() == Some(&b'\n') {
                self.line_since = None;
                return Received::Line(
                    std::mem::take(&mut self.input),
                    std::mem::take(&mut self.descriptors),
                );
            }
            if self.input.len() >= proto::MAX_LINE {
                return Received::Broken(line::failure(ErrorKind::Limit, line::too_long()));
            }
            self.line_since.get_or_insert(now);
        }
    }

    fn consume(&mut self, take: &mut [u8]) -> Result<usize, Received> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(proto::MAX_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let message =
            match rustix::net::recvmsg(&self.stream, &mut [IoSliceMut::new(take)], &mut control, flags) {
                Ok(message) => message,
                Err(Errno::AGAIN | Errno::INTR) => return Err(Received::Nothing),
                Err(_) => return Err(Received::End),
            };
        let mut arrived = 0;
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = part {
                for descriptor in descriptors {
                    arrived += 1;
                    self.descriptors.push(descriptor);
                }
            }
        }
        if message.flags.contains(ReturnFlags::CTRUNC) && arrived < proto::MAX_DESCRIPTORS {
            let why = "the daemon has no room for the descriptors of this request";
            return Err(Received::Broken(line::failure(ErrorKind::Limit, why)));
        }
        if message.flags.contains(ReturnFlags::CTRUNC) || self.descriptors.len() > proto::MAX_DESCRIPTORS {
            let why = format!("more than {} descriptors with one request", proto::MAX_DESCRIPTORS);
            return Err(Received::Broken(line::failure(ErrorKind::Limit, why)));
        }
        if message.bytes == 0 {
            return Err(Received::End);
        }
        Ok(message.bytes)
    }

    /// Put a line into the outgoing buffer.
    pub fn say(&mut self, id: u64, body: Body) {
        line::encode(id, body, &mut self.output);
    }

    /// Say why, and nothing more after it. What was half received is freed, its descriptors are [`Connection::unwanted`].
    pub fn refuse(&mut self, failure: Failure) {
        self.say(0, Body::Error(failure));
        self.hang_up();
    }

    /// Close when everything is sent.
    pub fn hang_up(&mut self) {
        self.closing = true;
        self.input = Vec::new();
        self.line_since = None;
    }

    /// Send what the client will take. `false`: it is gone.
    pub fn flush(&mut self, now: Instant) -> bool {
        while self.unsent() > 0 {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::send(&self.stream, &self.output[self.sent..], flags) {
                Ok(count) => {
                    self.sent += count;
                    self.unread_since = Some(now);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.unread_since.get_or_insert(now);
                    // What is sent is not kept: the buffer stays as small as what is owed.
                    self.output.drain(..self.sent);
                    self.sent = 0;
                    if self.output.capacity() / 4 > self.output.len().max(limits::UNSENT_HIGH) {
                        self.output.shrink_to_fit();
                    }
                    return true;
                }
                Err(_) => return false,
            }
        }
        self.sent = 0;
        self.unread_since = None;
        if self.output.capacity() > limits::UNSENT_HIGH {
            self.output = Vec::new();
        } else {
            self.output.clear();
        }
        true
    }

    /// The next moment at which something is due without the client doing anything.
    #[must_use]
    pub fn deadline(&self, stall: Duration) -> Option<Instant> {
        let line = self.line_since.map(|since| since + limits::LINE_TIME);
        let unread = self.unread_since.map(|since| since + stall);
        let watch = self.watches.iter().map(|watch| watch.due).min();
        [line, unread, watch].into_iter().flatten().min()
    }

    /// Has it kept a line unfinished for too long?
    #[must_use]
    pub fn dawdles(&self, now: Instant) -> bool {
        self.line_since.is_some_and(|since| now >= since + limits::LINE_TIME)
    }

    /// Has it left everything unread for too long?
    #[must_use]
    pub fn stalls(&self, now: Instant, stall: Duration) -> bool {
        self.unread_since.is_some_and(|since| now >= since + stall)
    }

    /// What epoll should watch for now.
    #[must_use]
    pub fn wanted(&self) -> EventFlags {
        let mut flags = EventFlags::empty();
        flags.set(EventFlags::IN, self.listens());
        flags.set(EventFlags::OUT, self.unsent() > 0);
        flags
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::job::Owner;

    fn pair() -> (Connection, UnixStream) {
        let (near, far) = UnixStream::pair().expect("pair");
        near.set_nonblocking(true).expect("nonblocking");
        let owner = Owner { uid: 7, gid: 7, groups: vec![] };
        (Connection::new(near.into(), Peer::new(owner, 7)), far)
    }

    #[test]
    fn lines_are_taken_one_by_one() {
        let (mut connection, mut far) = pair();
        let (mut scratch, now) = (vec![0; proto::MAX_LINE], Instant::now());
        far.write_all(b"one\ntwo\nthr").expect("sent");
        for expected in ["one\n", "two\n"] {
            match connection.receive(&mut scratch, now) {
                Received::Line(line, _) => assert_eq!(line, expected.as_bytes()),
                other => panic!("{other:?}"),
            }
        }
        assert!(matches!(connection.receive(&mut scratch, now), Received::Nothing));
        far.write_all(b"ee\n").expect("sent");
        assert!(
            matches!(connection.receive(&mut scratch, now), Received::Line(line, _) if line == b"three\n")
        );
        drop(far);
        assert!(matches!(connection.receive(&mut scratch, now), Received::End));
    }

    #[test]
    fn a_line_begun_must_end_in_time_however_often_a_byte_comes() {
        let (mut connection, mut far) = pair();
        let (mut scratch, start) = (vec![0; proto::MAX_LINE], Instant::now());
        assert_eq!(connection.deadline(Duration::MAX / 4), None, "an idle connection is due nothing");
        for second in 0..30 {
            far.write_all(b"x").expect("sent");
            let now = start + Duration::from_secs(second);
            assert!(matches!(connection.receive(&mut scratch, now), Received::Nothing));
            assert!(!connection.dawdles(now));
        }
        assert_eq!(connection.deadline(Duration::from_secs(999)), Some(start + limits::LINE_TIME));
        assert!(connection.dawdles(start + limits::LINE_TIME));
        far.write_all(b"\n").expect("sent");
        assert!(matches!(connection.receive(&mut scratch, start), Received::Line(..)));
        assert!(!connection.dawdles(start + 2 * limits::LINE_TIME), "the next line has its own time");
    }

    #[test]
    fn a_reader_stalls_only_if_it_takes_nothing() {
        let (mut connection, mut far) = pair();
        let (start, stall) = (Instant::now(), Duration::from_secs(10));
        while connection.unsent() == 0 {
            connection.say(1, Body::Error(line::failure(ErrorKind::Internal, "x".repeat(10_000))));
            assert!(connection.flush(start));
        }
        while connection.unsent() <= limits::UNSENT_HIGH {
            assert!(connection.listens());
            connection.say(1, Body::Error(line::failure(ErrorKind::Internal, "x".repeat(10_000))));
        }
        assert!(!connection.listens(), "nothing new is asked of one who owes reading");
        assert!(!connection.stalls(start + stall / 2, stall));
        assert!(connection.stalls(start + stall, stall));
        // It reads a little: it is slow, not dead.
        far.read_exact(&mut vec![0; 100_000]).expect("data");
        assert!(connection.flush(start + stall));
        assert!(!connection.stalls(start + stall + stall / 2, stall));
        drop(far);
        connection.say(1, Body::Error(line::failure(ErrorKind::Internal, "to nobody")));
        assert!(!connection.flush(start + stall), "gone");
    }
}
