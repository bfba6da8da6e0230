//! The service on one worker: its connections, buffers and operations.
//!
//! ```text
//! turn:      news ▶ pieces that waited for their extent ▶ each connection something happened to: parse, issue, receive, send ▶ flushes
//! complete:  what an operation came to; marks its connection, to be looked after in the next turn
//! ```
//! Nothing is sent or parsed while completions are collected: the replies of a whole batch go out in one send per connection, and all
//! that a turn starts reaches the kernel in one system call, the one that waits.
//!
//! System calls for a 4 KiB read: at depth 1 three (receive and read are one batch, read and send, send); at depth 32 a fraction of
//! one.
//!
//! Nothing is allocated for a request: slabs and lists keep what they once grew to, and all are bounded by the buffers and by
//! [`OPEN_MAX`](crate::export::nbd::connection::OPEN_MAX).
//!
//! | file | its one purpose |
//! |---|---|
//! | `server` | connections come and go; completions find their place |
//! | `intake` | from received bytes to requests |
//! | `moves` | a piece between its extent, the device and the cipher |
//! | `replies` | from finished pieces to sent bytes; flushes |
//! | `sealed` | TLS between these and the socket |

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crossbeam::channel::Receiver;
use rustix::net::{AddressFamily, Shutdown, sockopt};
use slab::Slab;

use crate::backend::{Done, Op, Port, Queue, Wake, What};
use crate::crypto::burn_stack;
use crate::error::{Error, Result};
use crate::export::exported::{Course, Exported};
use crate::export::nbd::Negotiated;
use crate::export::nbd::connection::{Connection, Ending, Intake};
use crate::export::nbd::hub::{Admission, News, Shared};
use crate::export::nbd::pace::{Pace, STALL};
use crate::export::nbd::pool::{Class, Pool};
use crate::export::nbd::sealed::Sealed;
use crate::export::nbd::served::Served;
use crate::export::nbd::slot::{Asked, Piece, Step, Work};
use crate::limits;
use crate::pipeline::service::{Service, TOKEN_BIT};
use crate::sys::buffer::Buf;

/// Whose an operation is; above the key in its token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Whose {
    /// A connection's receive.
    Receive,
    /// A connection's send.
    Send,
    /// A connection's receive into a piece.
    Payload,
    /// A piece's, on the device.
    Piece,
    /// An export's flush.
    Flush,
}

const WHOSE_SHIFT: u32 = 56;

/// See the module.
pub struct Server {
    pub(super) connections: Slab<Connection>,
    pub(super) asked: Slab<Asked>,
    pub(super) pieces: Slab<Piece>,
    pub(super) served: Slab<Served>,
    pub(super) pool: Pool,
    /// Connections something happened to.
    dirty: Vec<usize>,
    inbox: Receiver<News>,
    pub(super) waker: Arc<dyn Wake>,
    shared: Arc<Shared>,
    leaving: bool,
    /// Clients that were turned away since that was logged.
    refused: u32,
    refused_logged: Option<Instant>,
    /// When to look for sends that wait behind a buffer that could be larger.
    pub(super) room_due: Option<Instant>,
    /// Something was crypted since the stack was last burnt.
    pub(super) crypted: bool,
    /// When the present turn, or completion, began.
    pub(super) now: Instant,
}

/// Hand an operation to the queue.
pub(super) fn push(queue: &mut dyn Queue, whose: Whose, key: usize, port: Port, what: What) {
    let token = TOKEN_BIT | u64::from(whose as u8) << WHOSE_SHIFT | key as u64;
    let pushed = queue.push(Op { token, port, what });
    pushed.expect("connections, buffers and exports are fewer than a service's operations");
}

impl Server {
    /// Without connections. `waker` ends the wait of its worker.
    #[must_use]
    pub fn new(pool: Pool, inbox: Receiver<News>, waker: Arc<dyn Wake>, shared: Arc<Shared>) -> Self {
        Self {
            connections: Slab::new(),
            asked: Slab::new(),
            pieces: Slab::new(),
            served: Slab::new(),
            pool,
            dirty: Vec::new(),
            inbox,
            waker,
            shared,
            leaving: false,
            refused: 0,
            refused_logged: None,
            room_due: None,
            crypted: false,
            now: Instant::now(),
        }
    }

    /// Look after a connection in this turn, or the next.
    pub(super) fn mark(&mut self, key: usize) {
        let connection = &mut self.connections[key];
        if !connection.dirty {
            connection.dirty = true;
            self.dirty.push(key);
        }
    }

    fn connect(&mut self, negotiated: Negotiated, admission: Admission, queue: &mut dyn Queue) {
        let Negotiated { socket, export, seat, style, allocation, early, tls } = negotiated;
        // What fails here is for want of memory or places: the client sees a closed connection.
        let socket = Arc::new(socket);
        let port = match queue.attach(socket.clone()) {
            Ok(port) => port,
            Err(error) => return self.turned_away(&error),
        };
        let [received, gather, spare, own] = match self.pool.take_wires() {
            Ok(wires) => wires,
            Err(error) => {
                queue.detach(port);
                return self.turned_away(&error);
            }
        };
        let sealed = match tls.map(|tls| self.pool.take_wires().map(|[staging]| Sealed::new(tls, staging))) {
            None => None,
            Some(Ok(sealed)) => Some(Box::new(sealed)),
            Some(Err(error)) => {
                queue.detach(port);
                self.pool.give_back_wires([received, gather, spare, own]);
                return self.turned_away(&error);
            }
        };
        let served = match self.serve(&export, queue) {
            Ok(served) => served,
            Err(error) => {
                queue.detach(port);
                self.pool.give_back_wires([received, gather, spare, own]);
                if let Some(sealed) = sealed {
                    self.pool.give_back_wires([sealed.close(&socket)]);
                }
                return self.turned_away(&error);
            }
        };
        self.served[served].connections += 1;
        let pace = (sockopt::socket_domain(&socket) == Ok(AddressFamily::UNIX)).then(Pace::new);
        let key = self.connections.insert(Connection {
            admission,
            _seat: seat,
            served,
            socket,
            port,
            style,
            allocation,
            early,
            sealed,
            received: Some(received),
            unread: 0..0,
            intake: Intake::Request,
            receiving: false,
            gather: Some(gather),
            gathered: 0,
            spare: Some(spare),
            ready: VecDeque::with_capacity(64),
            sending: None,
            send_began: self.now,
            sending_since: None,
            stream: None,
            stream_ready: false,
            own: Some(own),
            small: 0,
            large: 0,
            unsent_small: 0,
            unsent_large: 0,
            own_long: false,
            reading: 0,
            pace,
            open: 0,
            asked: 0,
            pieces: 0,
            unissued: VecDeque::with_capacity(16),
            long: VecDeque::with_capacity(16),
            long_pieces: 0,
            draining: false,
            ending: Ending::No,
            dirty: false,
        });
        self.steer(key, queue);
        self.mark(key);
    }

    /// A client that could not be served. Logged by number, or clients could fill the log.
    fn turned_away(&mut self, error: &Error) {
        self.refused += 1;
        let lately = |at| self.now.saturating_duration_since(at) < limits::REFUSED_LOG_TIME;
        if !self.refused_logged.is_some_and(lately) {
            let refused = self.refused;
            tracing::warn!(refused, "a client of an export could not be served: {}", error.chain());
            self.refused_logged = Some(self.now);
            self.refused = 0;
        }
    }

    /// The export, with its device on the queue.
    fn serve(&mut self, export: &Arc<Exported>, queue: &mut dyn Queue) -> Result<usize> {
        let known = self.served.iter().find(|(_, served)| Arc::ptr_eq(&served.export, export));
        if let Some((key, _)) = known {
            return Ok(key);
        }
        let port = queue.attach(export.device.file().clone())?;
        export.view.watch(self.waker.clone());
        Ok(self.served.insert(Served::new(export.clone(), port, queue.syscalls())))
    }

    fn take_news(&mut self, queue: &mut dyn Queue) {
        while let Ok(news) = self.inbox.try_recv() {
            match news {
                News::Connection(..) if self.leaving => {}
                News::Connection(negotiated, admission) => self.connect(*negotiated, admission, queue),
                News::Stats(id, reply) => {
                    let served = self.served.iter().find(|(_, served)| served.export.id == id);
                    if let Some((_, served)) = served {
                        // The asker may have given up waiting.
                        let _ =
                            reply.send((served.record.clone(), queue.syscalls() - served.syscalls_before));
                    }
                }
            }
        }
        if self.shared.look.load(Ordering::Relaxed) && self.shared.look.swap(false, Ordering::AcqRel) {
            let keys: Vec<usize> = self.connections.iter().map(|(key, _)| key).collect();
            for key in keys {
                self.steer(key, queue);
                self.mark(key);
            }
        }
    }

    /// Follow the course of its export.
    fn steer(&mut self, key: usize, queue: &mut dyn Queue) {
        let connection = &mut self.connections[key];
        match connection.admission.export.course() {
            Course::Serving => {}
            Course::Draining => {
                connection.draining = true;
                // A payload that is on its way is waited for; `take_in` comes back to this behind it.
                if connection.intake == Intake::Request {
                    Self::stop_receiving(connection);
                }
            }
            Course::Dropping => self.hang_up(key, queue),
        }
    }

    /// What the client sends from now on is not received; what has arrived is, and then the end.
    pub(super) fn stop_receiving(connection: &Connection) {
        // It may be closed already.
        let _ = rustix::net::shutdown(&connection.socket, Shutdown::Read);
    }

    /// Send and take nothing more; forget what is not in flight.
    pub(super) fn hang_up(&mut self, key: usize, queue: &mut dyn Queue) {
        let connection = &mut self.connections[key];
        if connection.ending == Ending::Hard {
            return;
        }
        connection.ending = Ending::Hard;
        connection.ready.clear();
        connection.unissued.clear();
        connection.long.clear();
        connection.gathered = 0;
        // Its piece is forgotten below, or comes back to `sent`.
        connection.stream = None;
        connection.stream_ready = false;
        if connection.receiving || connection.sending.is_some() {
            // A client that neither reads nor writes would keep them for ever.
            queue.cancel(connection.port);
        }
        let served = connection.served;
        let mine = |piece: &Piece| piece.connection == key;
        let pieces = &self.pieces;
        self.served[served].waiting.retain(|&piece| !mine(&pieces[piece]));
        let asked = &self.asked;
        self.served[served].flush_next.retain(|&(_, one)| asked[one].connection != key);
        let idle = |piece: &Piece| mine(piece) && !piece.in_flight;
        while let Some((piece, _)) = self.pieces.iter().find(|(_, piece)| idle(piece)) {
            self.forget(piece);
        }
        // Those without pieces: their payload had not begun, or they waited for a flush.
        let flushing = &self.served[served].flush_running;
        let rest = self
            .asked
            .iter()
            .filter(|(one, asked)| asked.connection == key && asked.pieces == 0 && !flushing.contains(one));
        let rest: Vec<usize> = rest.map(|(one, _)| one).collect();
        for one in rest {
            self.drop_asked(one);
        }
        self.mark(key);
    }

    /// A request is answered, or nobody waits for the answer.
    pub(super) fn drop_asked(&mut self, key: usize) {
        let asked = self.asked.remove(key);
        self.connections[asked.connection].asked -= 1;
    }

    /// A piece of a connection that is being hung up.
    pub(super) fn forget(&mut self, key: usize) {
        let piece = &self.pieces[key];
        let (asked, counted) = (piece.asked, piece.is_counted());
        self.release(key);
        if counted {
            self.asked[asked].pieces -= 1;
            if self.asked[asked].pieces == 0 {
                self.drop_asked(asked);
            }
        }
    }

    /// A buffer for a piece of `want` bytes: as large as makes sense and is free.
    pub(super) fn take_buffer(&mut self, key: usize, want: u64, work: Work) -> Option<(Buf, Class)> {
        let connection = &mut self.connections[key];
        let is_long = matches!(work, Work::Zero | Work::Discard);
        let payload_waits = matches!(connection.intake, Intake::Payload { piece: None, .. });
        // Who does not read gets no more to be read. It goes on when something was sent.
        let is_full = connection.unsent_small >= Pool::share(Class::Small)
            || connection.unsent_large >= Pool::share(Class::Large);
        if work == Work::Read && is_full {
            return None;
        }
        let order = if want <= Class::Small.bytes().into() {
            [Class::Small, Class::Own, Class::Own]
        } else {
            [Class::Large, Class::Own, Class::Small]
        };
        for class in order {
            // Zeros over a whole volume and a payload take turns.
            if class == Class::Own && is_long && payload_waits && connection.own_long {
                continue;
            }
            let holds = match class {
                Class::Small => &mut connection.small,
                Class::Large => &mut connection.large,
                Class::Own => match connection.own.take() {
                    Some(buf) => {
                        connection.own_long = is_long;
                        return Some((buf, Class::Own));
                    }
                    None => continue,
                },
            };
            if let Some(buf) = self.pool.take(class, *holds) {
                *holds += 1;
                return Some((buf, class));
            }
        }
        None
    }

    /// A piece is over: its extent and its buffer are free.
    pub(super) fn release(&mut self, key: usize) {
        let mut piece = self.pieces.remove(key);
        let connection = &mut self.connections[piece.connection];
        if let Some(grant) = piece.grant.take() {
            self.served[connection.served].export.view.done(grant);
        }
        let buf = piece.buf.take().expect("a piece in flight is not released");
        if piece.step == Step::Send
            && let Some(unsent) = connection.unsent(piece.class)
        {
            *unsent -= 1;
        }
        match piece.class {
            Class::Own => connection.own = Some(buf),
            Class::Small => {
                connection.small -= 1;
                self.pool.give_back(Class::Small, buf);
            }
            Class::Large => {
                connection.large -= 1;
                self.pool.give_back(Class::Large, buf);
            }
        }
        connection.pieces -= 1;
        match piece.work {
            Work::Zero | Work::Discard => connection.long_pieces -= 1,
            Work::Read => connection.reading -= piece.asks.end - piece.asks.start,
            Work::Write => {}
        }
        self.mark(piece.connection);
    }

    /// Do for a connection whatever can be done now.
    fn look_after(&mut self, key: usize, queue: &mut dyn Queue) {
        self.connections[key].dirty = false;
        if self.connections[key].ending != Ending::Hard {
            self.issue_reads(key, queue);
            self.issue_long(key, queue);
            self.take_in(key, queue);
        }
        // What was taken in may have been the end of it, and then nothing of it is left that could be sent.
        if self.connections[key].ending != Ending::Hard {
            self.send(key, queue);
        }
        let connection = &mut self.connections[key];
        if connection.sending.is_none() {
            connection.sending_since = None;
        }
        if connection.is_gone() {
            self.disconnect(key, queue);
        }
    }

    /// Give room to clients that do not read for now. Returns when to look again.
    fn give_room(&mut self) -> Option<Instant> {
        if self.room_due.is_none_or(|due| due > self.now) {
            return self.room_due;
        }
        self.room_due = None;
        for (_, connection) in &mut self.connections {
            let Some(since) = connection.held_back_since() else { continue };
            let end = since + STALL;
            if end <= self.now {
                connection.give_room();
            } else {
                self.room_due = Some(self.room_due.map_or(end, |due| due.min(end)));
            }
        }
        self.room_due
    }

    /// Disconnect clients that keep buffers waiting while they are short. Returns when to look again.
    fn end_stalled(&mut self, queue: &mut dyn Queue) -> Option<Instant> {
        if !self.pool.is_short() {
            return None;
        }
        loop {
            let connections = &self.connections;
            let alive = |key: &usize| connections[*key].ending != Ending::Hard;
            let pieces = self.pieces.iter().filter(|(_, piece)| alive(&piece.connection));
            let kept = pieces.filter_map(|(_, piece)| {
                let sending_since = connections[piece.connection].sending_since;
                Some((piece.kept_since(sending_since)?, piece.connection))
            });
            let (since, key) = kept.min()?;
            let end = since + limits::CLIENT_STALLED;
            if end > self.now {
                return Some(end);
            }
            let export = self.connections[key].admission.export.id;
            tracing::warn!(
                "export {export}: a client that neither reads nor sends what it said is disconnected: others need the buffers"
            );
            self.hang_up(key, queue);
        }
    }

    fn disconnect(&mut self, key: usize, queue: &mut dyn Queue) {
        let mut connection = self.connections.remove(key);
        // A later connection may get the key.
        self.dirty.retain(|&dirty| dirty != key);
        queue.detach(connection.port);
        let wires =
            [&mut connection.received, &mut connection.gather, &mut connection.spare, &mut connection.own];
        self.pool.give_back_wires(wires.map(|wire| wire.take().expect("nothing is in flight")));
        if let Some(sealed) = connection.sealed.take() {
            self.pool.give_back_wires([sealed.close(&connection.socket)]);
        }
        let served = &mut self.served[connection.served];
        served.connections -= 1;
        if served.connections == 0 {
            let served = self.served.remove(connection.served);
            assert!(!served.flushing, "whoever waits for a flush is connected");
            queue.detach(served.port);
            served.export.keep(&served.record, queue.syscalls() - served.syscalls_before);
        }
        // Last of all its place is given back: whoever waits for the export to be quiet finds nothing left here.
        drop(connection);
    }

    fn leave_all(&mut self, queue: &mut dyn Queue) {
        let keys: Vec<usize> = self.connections.iter().map(|(key, _)| key).collect();
        for key in keys {
            self.hang_up(key, queue);
            self.mark(key);
        }
    }
}

impl Service for Server {
    fn turn(&mut self, queue: &mut dyn Queue) -> Option<Instant> {
        self.now = Instant::now();
        self.take_news(queue);
        self.retry_all(queue);
        let next = loop {
            while let Some(key) = self.dirty.pop() {
                self.look_after(key, queue);
            }
            // Flushes that are refused at once are answered now: nothing would begin another turn.
            self.flush_all(queue);
            let next = self.end_stalled(queue);
            if self.dirty.is_empty() {
                break next;
            }
        };
        if std::mem::take(&mut self.crypted) {
            // Once a batch: no frame keeps a round key while the worker sleeps.
            burn_stack();
        }
        next.into_iter().chain(self.give_room()).min()
    }

    fn complete(&mut self, done: Done, queue: &mut dyn Queue) {
        self.now = Instant::now();
        let key = usize::try_from(done.token & 0xffff_ffff).expect("32 bits fit");
        let whose = (done.token & !TOKEN_BIT) >> WHOSE_SHIFT;
        if whose == Whose::Piece as u64 {
            self.moved(key, done, queue);
        } else if whose == Whose::Receive as u64 {
            self.received(key, done, queue);
        } else if whose == Whose::Send as u64 {
            self.sent(key, done, queue);
        } else if whose == Whose::Payload as u64 {
            self.payload_received(key, done, queue);
        } else {
            self.flushed(key, done);
        }
    }

    fn is_idle(&self) -> bool {
        self.connections.is_empty() && (self.leaving || self.inbox.is_empty())
    }

    fn leave(&mut self, queue: &mut dyn Queue) {
        self.leaving = true;
        self.leave_all(queue);
    }
}
