//! One connection: the socket, what was asked over it, and what happens when it breaks.
//!
//! A connection may be shared by several queues: whoever has something to send sends, whoever is told that there is something to
//! read reads, and completions go to the inbox of the queue they belong to. As long as there are connections enough each queue has its
//! own, and the lock is nobody else's. Nothing here waits for the peer.
//!
//! ## What a break means for durability
//! A write that was not answered is asked again: nobody was told anything. A write that *was* answered and not yet flushed may
//! have been in the memory of a server that died, and is not known here any more. So once a connection breaks while there are such writes,
//! every later write and flush of the volume fails, for as long as it is open: whoever needs to know that bytes are durable learns that they
//! may not be, and goes on from what was durable before. So does every read: what was written and acknowledged would come back as it was
//! before, and nobody who reads (the client of an export) could tell. A volume that nobody wrote to is read on. Why not write everything through (FUA): each write would wait for
//! the disk, for the sake of a break that most jobs never see.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::backend::nbd::connect::{Facts, Wish};
use crate::backend::nbd::queue::Inbox;
use crate::backend::nbd::reconnect::{self, Again, Trouble};
use crate::backend::nbd::session::{Answer, Finished, Owner, SLICES_MAX, Session};
use crate::backend::nbd::transport::Transport;
use crate::backend::{Position, What};
use crate::format::nbd::flags;
use crate::format::nbd::request::{Command, Request};

/// Bytes received in one go, so that one connection does not keep a worker from its others.
const RECEIVED_AT_ONCE: usize = 4 << 20;
/// What a turn counts for that brought fewer: with TLS there may be much else in it.
const RECEIVED_LEAST: usize = 4 << 10;
/// How long a server may move no byte while something is asked of it. Whoever waits for it cannot be told that they were cancelled before.
const PATIENCE: Duration = Duration::from_secs(60);
/// The same while a flush is asked: all that was written may have to go to a slow disk.
const FLUSH_PATIENCE: Duration = Duration::from_secs(600);
/// Places of writes remembered.
const HAUNTED_MAX: usize = 4096;

/// What all connections of a volume share.
pub struct Shared {
    /// What was asked for.
    pub wish: Wish,
    /// What the server said.
    pub facts: Facts,
    /// May be written to.
    pub writable: bool,
    /// How to connect again, where that is allowed.
    pub again: Option<Again>,
    /// Writes that were acknowledged.
    acknowledged: AtomicU64,
    /// Of them, the number that is durable.
    flushed: AtomicU64,
    /// Writes asked and not answered.
    outstanding: AtomicU64,
    /// Acknowledged writes may be lost.
    doubt: AtomicBool,
    /// Where a server may write what it was asked before a connection broke: see [`reconnect`]. Starts and ends.
    haunted: Mutex<Vec<(u64, u64)>>,
    is_haunted: AtomicBool,
}

impl Shared {
    /// Of a volume just opened.
    #[must_use]
    pub fn new(wish: Wish, facts: Facts, writable: bool, again: Option<Again>) -> Self {
        let zero = || AtomicU64::new(0);
        let (acknowledged, flushed, outstanding) = (zero(), zero(), zero());
        Self {
            wish,
            facts,
            writable,
            again,
            acknowledged,
            flushed,
            outstanding,
            doubt: AtomicBool::new(false),
            haunted: Mutex::default(),
            is_haunted: AtomicBool::new(false),
        }
    }

    /// Remember where these writes go; with too many of them nothing can be written any more.
    fn haunt(&self, writes: impl Iterator<Item = (u64, u64)>) {
        let mut haunted = self.haunted.lock().unwrap_or_else(PoisonError::into_inner);
        haunted.extend(writes);
        haunted.sort_unstable();
        haunted.dedup_by(|next, last| {
            let joined = next.0 <= last.1;
            if joined {
                last.1 = last.1.max(next.1);
            }
            joined
        });
        if haunted.len() > HAUNTED_MAX {
            haunted.clear();
            haunted.push((0, u64::MAX));
        }
        self.is_haunted.store(!haunted.is_empty(), Ordering::Release);
    }

    /// Might it be undone by a write that was under way when a connection broke?
    fn haunts(&self, what: &What) -> bool {
        if !self.is_haunted.load(Ordering::Acquire) {
            return false;
        }
        let (start, length) = match what {
            What::Write { position: Position::At(offset), span, .. } => {
                (*offset, u64::from(span.end.saturating_sub(span.start)))
            }
            What::Discard { offset, len } => (*offset, *len),
            _ => return false,
        };
        let end = start.saturating_add(length);
        let haunted = self.haunted.lock().unwrap_or_else(PoisonError::into_inner);
        haunted.get(haunted.partition_point(|&(_, end)| end <= start)).is_some_and(|&(from, _)| from < end)
    }
}

enum Link {
    Up(Transport),
    /// Being connected again; what is asked waits.
    Down,
    /// For good, and why.
    Dead(String),
}

struct State {
    link: Link,
    session: Session,
    generation: u64,
    /// Writes of this connection that [`Shared::outstanding`] counts.
    counted: u64,
    /// It was connected again, and no reply has arrived since.
    trouble: Option<Trouble>,
    /// When bytes last went either way, or the first was asked.
    moved: Instant,
    /// Since when something is asked, of this server or the one before it came again.
    asked: Instant,
    /// How long it may move none while something is asked.
    patience: Duration,
}

/// See the module.
pub struct Connection {
    shared: Arc<Shared>,
    state: Mutex<State>,
    users: AtomicUsize,
}

/// What to wait for.
pub struct Watch {
    /// The socket, and which of this connection's it is; `None`: there is none now.
    pub socket: Option<(u64, Arc<OwnedFd>)>,
    /// More can be sent once it takes more.
    pub write: bool,
    /// When to look at it again even if nothing is heard.
    pub stalls: Option<Instant>,
}

impl Connection {
    /// After haggling.
    #[must_use]
    pub fn new(shared: Arc<Shared>, transport: Transport, facts: &Facts) -> Self {
        let session = Session::new(facts.bounds());
        let state = State {
            link: Link::Up(transport),
            session,
            generation: 0,
            counted: 0,
            trouble: None,
            moved: Instant::now(),
            asked: Instant::now(),
            patience: PATIENCE,
        };
        Self { shared, state: Mutex::new(state), users: AtomicUsize::new(0) }
    }

    /// Queues that use it.
    #[must_use]
    pub fn users(&self) -> &AtomicUsize {
        &self.users
    }

    /// Wait only so long for servers that do not answer.
    #[cfg(test)]
    pub fn set_patience(&self, patience: Duration) {
        self.lock().patience = patience;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Accept an operation. Nothing is sent before [`Connection::pump`]; what fails at once is in the inbox then.
    pub fn submit(&self, owner: Owner, what: What) {
        let mut state = self.lock();
        state.asks();
        let me = Arc::clone(&owner.inbox);
        let refusal = match (&state.link, &what) {
            (Link::Dead(why), _) => Some(dead(why)),
            (_, What::Write { .. } | What::Discard { .. }) if !self.shared.writable => {
                Some(std::io::Error::from_raw_os_error(libc::EBADF))
            }
            (_, What::Discard { .. }) if !self.shared.facts.has(flags::SEND_WRITE_ZEROES) => {
                Some(std::io::Error::from_raw_os_error(libc::EOPNOTSUPP))
            }
            // Writes would fail at the last flush anyway, after all that work, and reads might find what was there before them.
            (_, What::Flush | What::Read { .. } | What::Write { .. } | What::Discard { .. })
                if self.shared.doubt.load(Ordering::Acquire) =>
            {
                Some(lost())
            }
            (_, what) if self.shared.haunts(what) => Some(haunted()),
            _ => None,
        };
        match refusal {
            Some(error) => state.session.refuse(owner, what, error),
            // Who must have durability asks before (`Volume::can_flush`); others have been warned.
            None if matches!(what, What::Flush) && !self.shared.facts.has(flags::SEND_FLUSH) => {
                state.session.push(owner, What::Ready { read: false }, 0);
            }
            None => state.session.push(owner, what, self.shared.acknowledged.load(Ordering::Acquire)),
        }
        self.account(&mut state);
        deliver(&mut state, Some(&me));
    }

    /// Ask for block status; the extents are in `answer` when the operation comes back.
    pub fn submit_status(&self, owner: Owner, offset: u64, length: u32, answer: Answer) {
        let mut state = self.lock();
        state.asks();
        let me = Arc::clone(&owner.inbox);
        match &state.link {
            Link::Dead(why) => {
                let error = dead(why);
                state.session.refuse(owner, What::Flush, error);
            }
            Link::Up(_) | Link::Down => state.session.push_status(owner, offset, length, answer),
        }
        deliver(&mut state, Some(&me));
    }

    /// Send what can be sent and, if asked to, take what has arrived. Completions are in the inboxes afterwards; those who wait elsewhere
    /// are woken, `me` is not.
    pub fn pump(self: &Arc<Self>, me: &Arc<Inbox>, receive: bool) -> Watch {
        let mut state = self.lock();
        let is_late = |state: &State| state.stalls().is_some_and(|until| Instant::now() >= until);
        if let Err(broken) = state.send() {
            self.broke(&mut state, broken);
        // What seems late may be here already, and nobody has looked.
        } else if (receive || is_late(&state))
            && let Err(broken) = state.receive().and_then(|()| state.send())
        {
            self.broke(&mut state, broken);
        } else if is_late(&state) {
            self.broke(&mut state, Broken::Cut("the server does not answer".to_owned()));
        }
        self.account(&mut state);
        deliver(&mut state, Some(me));
        state.watch()
    }

    /// One queue fewer uses it. What is unsent, those send that wait for it.
    pub fn let_go(&self) {
        self.users.fetch_sub(1, Ordering::AcqRel);
        let state = self.lock();
        if state.watch().write {
            for inbox in state.session.inboxes() {
                inbox.nudge();
            }
        }
    }

    /// See [`Session::cancel`].
    pub fn cancel(self: &Arc<Self>, me: &Arc<Inbox>, port: u32, urgent: bool) {
        let mut state = self.lock();
        if !state.session.cancel(me, port, urgent) {
            self.broke(&mut state, Broken::Cut("given up in the middle of a request".to_owned()));
        }
        self.account(&mut state);
        deliver(&mut state, Some(me));
    }

    /// Tell the server that it is over, if it can be told without waiting.
    pub fn leave(&self) {
        let mut state = self.lock();
        let idle = state.session.is_idle() && !state.session.wants_to_send();
        let extended = state.session.is_extended();
        if let Link::Up(transport) = &mut state.link {
            if idle {
                let mut bytes = [0; 32];
                let request =
                    Request { command: Command::Disconnect, flags: 0, cookie: 0, offset: 0, length: 0 };
                let count = request.put(&mut bytes, extended);
                let _ = transport.send(&[IoSlice::new(&bytes[..count])]);
            }
            transport.close();
        }
    }

    /// Keep the volume's account of writes.
    fn account(&self, state: &mut State) {
        // 1. Acknowledged before the caller learns it: a flush it asks for then covers the write.
        self.shared.acknowledged.fetch_add(state.session.take_acknowledged(), Ordering::AcqRel);
        self.shared.flushed.fetch_max(state.session.flushed(), Ordering::AcqRel);
        let writes = state.session.writes();
        if writes >= state.counted {
            self.shared.outstanding.fetch_add(writes - state.counted, Ordering::AcqRel);
        } else {
            self.shared.outstanding.fetch_sub(state.counted - writes, Ordering::AcqRel);
        }
        state.counted = writes;
    }

    fn broke(self: &Arc<Self>, state: &mut State, broken: Broken) {
        let Link::Up(transport) = &mut state.link else { return };
        transport.close();
        let Shared { wish, again, .. } = &*self.shared;
        let (why, again) = match broken {
            Broken::Cut(why) => (why, again.clone()),
            // It would do so again.
            Broken::Violated(how) => (format!("the server breaks the protocol: {how}"), None),
        };
        // 1. What was acknowledged until now is counted, before it is judged.
        self.account(state);
        // 2. Writes under way on other connections may have been answered by the server that is gone now.
        let elsewhere = self.shared.outstanding.load(Ordering::Acquire) > state.counted;
        let unflushed =
            self.shared.acknowledged.load(Ordering::Acquire) > self.shared.flushed.load(Ordering::Acquire);
        // 3. Doubt comes before any request on another connection, so no flush there can be taken for one that covers them.
        if elsewhere || unflushed || self.shared.doubt.load(Ordering::Acquire) {
            self.shared.doubt.store(true, Ordering::Release);
            state.lose();
        } else {
            self.shared.haunt(state.session.writes_begun());
        }
        tracing::warn!("{}: the connection to the NBD server is lost: {why}", wish.name);
        let silence = state.session.is_asked().then(|| state.asked.elapsed());
        state.session.restart(self.shared.facts.bounds());
        state.link = Link::Down;
        let replied = std::mem::take(&mut state.session.replies) > 0;
        let trouble = state.trouble.take().filter(|_| !replied);
        let trouble = trouble.map(|trouble| trouble.after(silence.unwrap_or_default()));
        let started = again.is_some_and(|Again { address, within }| {
            let how = (address, trouble.unwrap_or_else(|| Trouble::new(within)));
            let started = reconnect::start(self, Arc::clone(&self.shared), how, why.clone());
            started.inspect_err(|error| tracing::error!("{}", error.chain())).is_ok()
        });
        if !started {
            state.session.fail(None, || dead(&why));
            state.link = Link::Dead(why);
        }
    }

    /// It was connected again: ask again for all that was not answered.
    pub fn resume(self: &Arc<Self>, transport: Transport, facts: &Facts, trouble: Trouble) {
        let mut state = self.lock();
        state.trouble = Some(trouble);
        state.moved = Instant::now();
        state.asked = state.moved;
        if self.shared.doubt.load(Ordering::Acquire) {
            // Another connection broke meanwhile.
            state.lose();
        }
        state.session.restart(facts.bounds());
        state.generation += 1;
        state.link = Link::Up(transport);
        tracing::info!("{}: connected to the NBD server again", self.shared.wish.name);
        if let Err(broken) = state.send() {
            self.broke(&mut state, broken);
        }
        self.account(&mut state);
        deliver(&mut state, None);
        for inbox in state.session.inboxes() {
            inbox.nudge();
        }
    }

    /// It cannot be connected again.
    pub fn give_up(&self, why: &str) {
        let mut state = self.lock();
        let waiting: Vec<Arc<Inbox>> = state.session.inboxes().cloned().collect();
        state.session.fail(None, || dead(why));
        state.link = Link::Dead(why.to_owned());
        self.account(&mut state);
        deliver(&mut state, None);
        for inbox in waiting {
            inbox.nudge();
        }
    }
}

/// Why a connection cannot be used any more.
enum Broken {
    /// It ended.
    Cut(String),
    /// The server broke a rule: which.
    Violated(&'static str),
}

fn dead(why: &str) -> std::io::Error {
    let what = format!("the connection to the NBD server is lost: {why}");
    std::io::Error::new(std::io::ErrorKind::ConnectionAborted, what)
}

fn haunted() -> std::io::Error {
    std::io::Error::other(
        "the connection to the NBD server broke in the middle of a write to the same place, which the server may still carry out",
    )
}

fn lost() -> std::io::Error {
    std::io::Error::other(
        "the connection to the NBD server broke, and what it had acknowledged since the last flush may be lost",
    )
}

/// Completions to those they belong to, who are woken, but for `me`.
fn deliver(state: &mut State, me: Option<&Arc<Inbox>>) {
    for Finished { owner, done } in state.session.finished().drain(..) {
        let elsewhere = me.is_none_or(|me| !Arc::ptr_eq(me, &owner.inbox));
        owner.inbox.put(owner.port, done);
        if elsewhere {
            owner.inbox.wake();
        }
    }
}

impl State {
    fn watch(&self) -> Watch {
        match &self.link {
            Link::Up(transport) => Watch {
                socket: Some((self.generation, Arc::clone(transport.socket()))),
                write: self.session.wants_to_send() || transport.has_unsent(),
                stalls: self.stalls(),
            },
            Link::Down | Link::Dead(_) => Watch { socket: None, write: false, stalls: None },
        }
    }

    /// When the server has not moved a byte for too long, while something was asked of it.
    fn stalls(&self) -> Option<Instant> {
        let waits = matches!(self.link, Link::Up(_)) && self.session.is_asked();
        let patience =
            if self.session.asks_flush() { FLUSH_PATIENCE.max(self.patience) } else { self.patience };
        waits.then(|| self.moved + patience)
    }

    /// What must not be asked of a server that may have lost writes ends here; [`Session::restart`] forgets its requests.
    fn lose(&mut self) {
        for command in [Command::Flush, Command::Read, Command::Write, Command::WriteZeroes] {
            self.session.fail(Some(command), lost);
        }
    }

    /// What is asked of a server that was asked nothing begins its time anew.
    fn asks(&mut self) {
        if !self.session.is_asked() {
            self.moved = Instant::now();
            self.asked = self.moved;
        }
    }

    fn send(&mut self) -> Result<(), Broken> {
        let Link::Up(transport) = &mut self.link else { return Ok(()) };
        while self.session.wants_to_send() || transport.has_unsent() {
            let mut slices = [IoSlice::new(&[]); SLICES_MAX];
            let count = self.session.outgoing(&mut slices);
            match transport.send(&slices[..count]) {
                Ok(Some(sent)) => {
                    self.session.sent(sent);
                    self.moved = Instant::now();
                }
                Ok(None) => break,
                Err(cause) => return Err(Broken::Cut(proto::errno::describe(&cause))),
            }
        }
        Ok(())
    }

    fn receive(&mut self) -> Result<(), Broken> {
        let Link::Up(transport) = &mut self.link else { return Ok(()) };
        let mut total = 0;
        loop {
            // What is held already, no poll of the socket announces: it must not be left.
            let more = total < RECEIVED_AT_ONCE;
            if !more && !transport.may_hold_more() {
                break;
            }
            let (direct, room) = self.session.incoming();
            let skipped = usize::from(direct.is_empty());
            let space = direct.len() + room.len();
            let mut slices = [IoSliceMut::new(direct), IoSliceMut::new(room)];
            let count = match transport.receive(&mut slices[skipped..], more) {
                Ok(None) => break,
                Ok(Some(0)) => return Err(Broken::Cut("the server has ended it".to_owned())),
                Ok(Some(count)) => count,
                Err(cause) => return Err(Broken::Cut(proto::errno::describe(&cause))),
            };
            self.moved = Instant::now();
            self.session.received(count).map_err(|violation| Broken::Violated(violation.0))?;
            // No more was there; asking again would only say so.
            if count < space && !transport.may_hold_more() {
                break;
            }
            total += count.max(RECEIVED_LEAST);
        }
        Ok(())
    }
}
