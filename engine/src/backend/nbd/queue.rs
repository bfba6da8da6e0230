//! A queue over a queue: operations on remote volumes become requests, all others go through.
//!
//! The queue below carries files, and says when a socket can move ([`What::Ready`]); bytes are moved here, by calls that never
//! wait, from and to the callers' buffers, of which the kernel therefore keeps none. Sending takes one system call for all that was pushed on a
//! connection, receiving one for what has arrived. Why not receive through the queue below: a buffer lent to the kernel until a
//! server answers could not be given back when an operation is cancelled, and headers would each take a turn of their own.
//!
//! Each remote port uses one of its volume's connections: the one that the fewest queues use.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use slab::Slab;

use crate::backend::nbd::connection::{Connection, Watch};
use crate::backend::nbd::session::Owner;
use crate::backend::nbd::{Lease, find};
use crate::backend::{Done, Op, Port, Queue, QueueFacts, Refused, Wake, What, check_span};
use crate::error::{Error, ErrorKind, Result};

/// Ports from here on are remote.
const REMOTE: u32 = 1 << 31;
/// Remote ports of one queue.
const REMOTES_MAX: usize = 128;
/// Operations that the queue below must hold beyond those of the caller: two waits per remote port, and as many that come to their end.
pub const EXTRA_DEPTH: u32 = 4 * 128;
/// Tokens from here on are our own; callers use none of them.
const TOKENS: u64 = !0xffff;
/// How long a request that was sent is waited for when the caller wants to be rid of it.
const CANCEL_WAIT: Duration = Duration::from_secs(5);

/// Completions on their way to a queue. Whoever reads a connection puts them here.
pub struct Inbox {
    done: Mutex<Vec<(u32, Done)>>,
    /// Something about a connection has changed: look at all of them.
    nudged: AtomicBool,
    below: Arc<dyn Wake>,
}

impl Inbox {
    /// Of somebody whose wait ends by `below`.
    #[must_use]
    pub fn new(below: Arc<dyn Wake>) -> Arc<Self> {
        Arc::new(Self { done: Mutex::default(), nudged: AtomicBool::new(false), below })
    }

    /// A completion for this port.
    pub fn put(&self, port: u32, done: Done) {
        self.done.lock().unwrap_or_else(PoisonError::into_inner).push((port, done));
    }

    /// Take what is there.
    pub fn drain(&self, mut take: impl FnMut(u32, Done)) {
        for (port, done) in self.done.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            take(port, done);
        }
    }

    /// There is something in it.
    pub fn wake(&self) {
        self.below.wake();
    }

    /// A connection is not what it was.
    pub fn nudge(&self) {
        self.nudged.store(true, Ordering::Release);
        self.below.wake();
    }
}

/// What interrupts a wait: the wait below ends for our own reasons too, so a wake is remembered here.
struct Bell {
    woken: AtomicBool,
    below: Arc<dyn Wake>,
}

impl Wake for Bell {
    fn wake(&self) {
        self.woken.store(true, Ordering::Release);
        self.below.wake();
    }
}

/// A socket in the queue below.
struct Watched {
    generation: u64,
    port: Port,
    reading: bool,
    writing: bool,
}

struct Remote {
    connection: Arc<Connection>,
    /// Operations that have not been reaped.
    in_flight: u32,
    /// Something was pushed, or the connection changed.
    stirred: bool,
    watched: Option<Watched>,
    /// Cancelled: when to stop waiting for the server.
    give_up: Option<Instant>,
    /// When the server has not answered for too long, as far as is known.
    stalls: Option<Instant>,
    /// Keeps the volume open. Declared in this order: the descriptor goes first.
    _file: Arc<OwnedFd>,
    _lease: Lease,
}

/// See the module.
pub struct RemoteQueue {
    inner: Box<dyn Queue>,
    depth: u32,
    inbox: Arc<Inbox>,
    bell: Arc<Bell>,
    remotes: Slab<Remote>,
    /// Sockets that are not needed any more, and have a wait in flight.
    retiring: Vec<Watched>,
    finished: Vec<Done>,
    /// Reused.
    raw: Vec<Done>,
    /// Our own operations in the queue below.
    own: u32,
    /// Operations on remote ports that have not been reaped.
    remote: u32,
    syscalls: u64,
}

impl RemoteQueue {
    /// Over `inner`, which must hold [`EXTRA_DEPTH`] operations beyond `depth`.
    #[must_use]
    pub fn new(inner: Box<dyn Queue>, depth: u32) -> Self {
        let below = inner.waker();
        Self {
            inbox: Inbox::new(Arc::clone(&below)),
            bell: Arc::new(Bell { woken: AtomicBool::new(false), below }),
            inner,
            depth,
            remotes: Slab::new(),
            retiring: Vec::new(),
            finished: Vec::new(),
            raw: Vec::new(),
            own: 0,
            remote: 0,
            syscalls: 0,
        }
    }

    /// Send what was pushed, where something was.
    fn stir(&mut self) {
        for at in 0..self.remotes.capacity() {
            if self.remotes.get(at).is_some_and(|remote| remote.stirred) {
                self.pump(at, false);
            }
        }
    }

    /// Move what can be moved on a connection, and wait for the rest.
    fn pump(&mut self, at: usize, receive: bool) {
        let Some(remote) = self.remotes.get_mut(at) else { return };
        remote.stirred = false;
        self.syscalls += 1 + u64::from(receive);
        let watch = remote.connection.pump(&self.inbox, receive);
        self.watch(at, watch);
    }

    fn watch(&mut self, at: usize, watch: Watch) {
        let remote = &mut self.remotes[at];
        remote.stalls = watch.stalls.filter(|_| remote.in_flight > 0);
        let current = watch.socket.as_ref().map(|(generation, _)| *generation);
        if let Some(watched) = remote.watched.take_if(|watched| Some(watched.generation) != current) {
            self.retire(watched);
        }
        let remote = &mut self.remotes[at];
        if let Some((generation, socket)) = watch.socket
            && remote.watched.is_none()
        {
            match self.inner.attach(socket) {
                Ok(port) => {
                    remote.watched = Some(Watched { generation, port, reading: false, writing: false })
                }
                // Nothing can be waited for, so nothing may be left waiting.
                Err(error) => {
                    tracing::error!("{}", error.chain());
                    let port = u32::try_from(at).expect("few") | REMOTE;
                    remote.connection.cancel(&self.inbox, port, true);
                    return;
                }
            }
        }
        let Some(watched) = &mut remote.watched else { return };
        // What others left unsent on a shared connection is ours to send, even when nothing of ours is in flight: nobody else may be waiting.
        for (read, armed, wanted) in
            [(true, &mut watched.reading, remote.in_flight > 0), (false, &mut watched.writing, watch.write)]
        {
            if wanted && !*armed {
                let token = token(watched.port, read);
                let op = Op { token, port: watched.port, what: What::Ready { read } };
                self.inner.push(op).map_err(|(why, _)| why).expect("there is room for two waits per port");
                *armed = true;
                self.own += 1;
            }
        }
    }

    fn retire(&mut self, watched: Watched) {
        if watched.reading || watched.writing {
            self.inner.cancel(watched.port);
            self.retiring.push(watched);
        } else {
            self.inner.detach(watched.port);
        }
    }

    /// Take what has come to its end below; act on what is ours.
    fn gather(&mut self) {
        let mut raw = std::mem::take(&mut self.raw);
        self.inner.reap(&mut raw);
        for done in raw.drain(..) {
            if done.token < TOKENS {
                self.finished.push(done);
            } else {
                self.own -= 1;
                self.came(done.token);
            }
        }
        self.raw = raw;
        if self.inbox.nudged.swap(false, Ordering::AcqRel) {
            for (_, remote) in &mut self.remotes {
                remote.stirred = true;
            }
            self.stir();
        }
        let (remotes, finished) = (&mut self.remotes, &mut self.finished);
        let mut ended = 0;
        self.inbox.drain(|port, done| {
            let remote = remotes.get_mut((port & !REMOTE) as usize).expect("attached while in flight");
            remote.in_flight -= 1;
            // What is pushed from here on was not cancelled.
            remote.give_up.take_if(|_| remote.in_flight == 0);
            ended += 1;
            finished.push(done);
        });
        self.remote -= ended;
    }

    /// A socket can move.
    fn came(&mut self, token: u64) {
        let (port, read) = (Port(u32::try_from((token & !TOKENS) >> 1).expect("15 bits")), token & 1 == 0);
        let clear = |watched: &mut Watched| {
            *(if read { &mut watched.reading } else { &mut watched.writing }) = false;
            watched.reading || watched.writing
        };
        if let Some(at) = self.retiring.iter().position(|watched| watched.port == port) {
            if !clear(&mut self.retiring[at]) {
                self.retiring.swap_remove(at);
                self.inner.detach(port);
            }
            return;
        }
        let found = self.remotes.iter_mut().find_map(|(at, remote)| {
            let watched = remote.watched.as_mut().filter(|watched| watched.port == port)?;
            clear(watched);
            Some(at)
        });
        self.pump(found.expect("a watched socket is a remote's, or retiring"), true);
    }

    /// Servers that do not answer what was cancelled.
    fn give_up(&mut self) {
        let now = Instant::now();
        for (at, remote) in &mut self.remotes {
            if remote.give_up.is_some_and(|until| now >= until) {
                remote.give_up = None;
                remote.stirred = true;
                let port = u32::try_from(at).expect("few") | REMOTE;
                remote.connection.cancel(&self.inbox, port, true);
            }
        }
        self.stir();
    }

    /// Servers that do not answer: the connection finds out when it is looked at.
    fn stalled(&mut self) {
        let now = Instant::now();
        for at in 0..self.remotes.capacity() {
            if self.remotes.get(at).is_some_and(|remote| remote.stalls.is_some_and(|until| now >= until)) {
                self.pump(at, true);
            }
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        self.remotes.iter().flat_map(|(_, remote)| [remote.give_up, remote.stalls]).flatten().min()
    }

    fn remote_of(&mut self, port: Port) -> Option<&mut Remote> {
        self.remotes.get_mut((port.0 & !REMOTE) as usize)
    }
}

fn token(port: Port, read: bool) -> u64 {
    TOKENS | u64::from(port.0) << 1 | u64::from(!read)
}

impl Queue for RemoteQueue {
    fn attach(&mut self, file: Arc<OwnedFd>) -> Result<Port> {
        let Some(volume) = find(&file) else { return self.inner.attach(file) };
        if self.remotes.len() >= REMOTES_MAX {
            let what = format!("more than {REMOTES_MAX} remote volumes on one queue");
            return Err(Error::new(ErrorKind::Limit, what));
        }
        let connection = volume.take_connection();
        let at = self.remotes.insert(Remote {
            connection,
            in_flight: 0,
            stirred: false,
            watched: None,
            give_up: None,
            stalls: None,
            _file: file,
            _lease: Lease::of(volume),
        });
        Ok(Port(u32::try_from(at).expect("few") | REMOTE))
    }

    fn detach(&mut self, port: Port) {
        if port.0 & REMOTE == 0 {
            return self.inner.detach(port);
        }
        let mut remote = self.remotes.remove((port.0 & !REMOTE) as usize);
        assert_eq!(remote.in_flight, 0, "operations in flight on the port to detach");
        remote.connection.let_go();
        if let Some(watched) = remote.watched.take() {
            self.retire(watched);
        }
    }

    fn push(&mut self, op: Op) -> std::result::Result<(), (Refused, Op)> {
        assert!(op.token < TOKENS, "a token that is the queue's own");
        if self.in_flight() >= self.depth {
            return Err((Refused::Full, op));
        }
        if op.port.0 & REMOTE == 0 {
            return self.inner.push(op);
        }
        let inbox = Arc::clone(&self.inbox);
        let Some(remote) = self.remote_of(op.port) else { return Err((Refused::UnknownPort, op)) };
        if let What::Read { buf, span, .. } | What::Write { buf, span, .. } | What::Receive { buf, span } =
            &op.what
        {
            check_span(buf, span);
        }
        remote.in_flight += 1;
        remote.stirred = true;
        remote.connection.submit(Owner { inbox, port: op.port.0, token: op.token }, op.what);
        self.remote += 1;
        Ok(())
    }

    fn kick(&mut self) -> Result<()> {
        if self.remote > 0 {
            self.stir();
        }
        self.inner.kick()
    }

    fn wait(&mut self, deadline: Option<Instant>) -> Result<()> {
        if self.remotes.is_empty() && self.retiring.is_empty() && self.finished.is_empty() {
            self.bell.woken.store(false, Ordering::Release);
            return self.inner.wait(deadline);
        }
        self.stir();
        self.gather();
        while !self.bell.woken.swap(false, Ordering::AcqRel) && self.finished.is_empty() {
            let until = deadline.into_iter().chain(self.next_deadline()).min();
            self.inner.wait(until)?;
            self.gather();
            self.give_up();
            self.stalled();
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                break;
            }
        }
        // What was pushed meanwhile must not wait for the caller's next turn.
        self.inner.kick()
    }

    fn reap(&mut self, done: &mut Vec<Done>) {
        if self.remotes.is_empty() && self.retiring.is_empty() {
            done.append(&mut self.finished);
            return self.inner.reap(done);
        }
        self.gather();
        done.append(&mut self.finished);
    }

    fn cancel(&mut self, port: Port) {
        if port.0 & REMOTE == 0 {
            return self.inner.cancel(port);
        }
        let inbox = Arc::clone(&self.inbox);
        let Some(remote) = self.remote_of(port) else { return };
        if remote.in_flight > 0 {
            remote.connection.cancel(&inbox, port.0, false);
            remote.stirred = true;
            remote.give_up = Some(Instant::now() + CANCEL_WAIT);
        }
    }

    fn in_flight(&self) -> u32 {
        // What is in `finished` of remote ports is not counted among them any more.
        let finished = u32::try_from(self.finished.len()).expect("at most the depth");
        self.inner.in_flight() - self.own + self.remote + finished
    }

    fn waker(&self) -> Arc<dyn Wake> {
        Arc::clone(&self.bell) as Arc<dyn Wake>
    }

    fn syscalls(&self) -> u64 {
        self.inner.syscalls() + self.syscalls
    }

    fn facts(&self) -> QueueFacts {
        self.inner.facts()
    }
}

impl Drop for RemoteQueue {
    /// Buffers come back here and not in the middle of a request: the server's answers are waited for, but not for ever.
    fn drop(&mut self) {
        let ports: Vec<usize> = self.remotes.iter().map(|(at, _)| at).collect();
        for &at in &ports {
            self.cancel(Port(u32::try_from(at).expect("few") | REMOTE));
        }
        let last = Instant::now() + 2 * CANCEL_WAIT;
        while self.remote > 0 && Instant::now() < last && self.wait(Some(last)).is_ok() {
            self.gather();
            self.finished.clear();
        }
        for at in ports {
            if self.remotes[at].in_flight == 0 {
                self.detach(Port(u32::try_from(at).expect("few") | REMOTE));
            }
        }
    }
}
