//! The control thread: one epoll loop that serves every client, and nothing of the data path.
//!
//! ```text
//! listener ─▶ connection ─ line ─▶ line::parse ─▶ dispatch (rights, checks) ─▶ registry
//!                 ▲                                      │ submit, stats: a helper thread
//!                 └────── replies, events ◀── wake ◀─────┴──── registry's notify(job)
//! ```
//!
//! Invariants:
//! 1. nothing here blocks: sockets are nonblocking, what may block (`Registry::submit` looks at devices, `Registry::stats`
//!    waits for workers) runs on [`helpers`], and what clients made is closed by the [`closer`]; a connection's next line
//!    waits for its helper, so replies keep their order and one client holds one helper;
//! 2. every buffer and count is bounded by [`limits`]; a client that reaches a bound harms only itself and its own user;
//! 3. progress events are sent only into an empty buffer, so a slow reader misses some; state changes and the end never;
//! 4. a job submitted without `detach` is cancelled when its connection ends, however it ends, and an export begun so is stopped;
//! 5. the loop leaves only when no job and no export is active: idle (nobody connected for the set time), or told to.

pub mod closer;
pub mod connection;
pub mod debts;
pub mod dispatch;
mod exports;
pub mod helpers;
pub mod line;
pub mod listener;
pub mod mailbox;
pub mod policy;

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use proto::{Body, ErrorKind, Event, JobId, Reply, Submit};
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;

use self::closer::Closer;
use self::connection::{Connection, Received, Watch};
use self::debts::Debts;
use self::dispatch::{Action, Service, Told};
use self::helpers::{Helpers, Task};
use self::listener::Listener;
use self::mailbox::{Finished, Outcome};
pub use self::mailbox::{Mailbox, Notice};
use self::policy::Peer;
use crate::error::{Error, Result};
use crate::export::life::End;
use crate::job::Owner;
use crate::limits;
use crate::sys::process;

const LISTENER: u64 = u64::MAX;
const WAKER: u64 = u64::MAX - 1;
const SIGNALS: u64 = u64::MAX - 2;

/// Said to a user whose descriptors hang in `close`.
const BEHIND: &str = "too many descriptors of this user are still being closed";

/// Choices of the loop.
#[derive(Debug, Clone)]
pub struct ControlConfig {
    /// User the daemon runs as.
    pub uid: u32,
    /// Leave after this long without connections and jobs.
    pub idle_exit: Option<Duration>,
    /// Disconnect a client that reads nothing for this long.
    pub client_stall: Duration,
    /// Connections at one time.
    pub connections_max: usize,
}

/// The loop and all it serves.
pub struct Control {
    config: ControlConfig,
    service: Service,
    listener: Listener,
    signals: UnixStream,
    mailbox: Arc<Mailbox>,
    epoll: OwnedFd,
    connections: HashMap<u64, Connection>,
    per_user: HashMap<u32, usize>,
    next: u64,
    helpers: Helpers,
    closer: Closer,
    debts: Debts,
    told: Told,
    /// Told to leave: no new jobs.
    leaving: bool,
    /// Told to leave now: jobs that appear are cancelled.
    cancelling: bool,
    /// Leaving: no longer than this for helpers that hang.
    patience: Option<Instant>,
    idle_since: Option<Instant>,
    accept_again: Option<Instant>,
    /// Leaving, with nothing left to do but to be read: until then.
    linger: Option<Instant>,
    /// No later than the earliest deadline of any connection.
    alarm: Option<Instant>,
    scratch: Box<[u8]>,
}

impl Control {
    /// `signals` delivers one byte for every request to leave that comes as a signal; nonblocking.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn new(
        config: ControlConfig,
        service: Service,
        listener: Listener,
        signals: UnixStream,
        mailbox: Arc<Mailbox>,
    ) -> Result<Self> {
        let failed = |error| Error::io("cannot set up epoll", error);
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(failed)?;
        epoll::add(&epoll, &listener, EventData::new_u64(LISTENER), EventFlags::IN).map_err(failed)?;
        epoll::add(&epoll, &mailbox.wake, EventData::new_u64(WAKER), EventFlags::IN).map_err(failed)?;
        epoll::add(&epoll, &signals, EventData::new_u64(SIGNALS), EventFlags::IN).map_err(failed)?;
        Ok(Self {
            config,
            service,
            listener,
            signals,
            mailbox,
            epoll,
            connections: HashMap::new(),
            per_user: HashMap::new(),
            next: 0,
            helpers: Helpers::default(),
            closer: Closer::default(),
            debts: Debts::default(),
            told: Told::default(),
            leaving: false,
            cancelling: false,
            patience: None,
            idle_since: None,
            accept_again: None,
            linger: None,
            alarm: None,
            scratch: vec![0; proto::MAX_LINE].into_boxed_slice(),
        })
    }

    /// Serve until told to leave or idle for long enough.
    ///
    /// # Errors
    /// epoll itself failed.
    pub fn run(mut self) -> Result<()> {
        let mut events = Vec::with_capacity(256);
        loop {
            let now = Instant::now();
            if self.may_leave(now) && self.leave(now) {
                return Ok(());
            }
            let timeout = self.timeout(now);
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(Error::io("epoll failed", error)),
            }
            let now = Instant::now();
            for event in &events {
                match event.data.u64() {
                    LISTENER => self.accept(now),
                    WAKER => self.read_news(now),
                    SIGNALS => self.read_signals(now),
                    key => self.serve(key, event.flags, now),
                }
            }
            self.keep_time(now);
        }
    }

    // ---- time

    fn timeout(&self, now: Instant) -> Option<Timespec> {
        let idle = self.idle_since.zip(self.config.idle_exit).map(|(since, time)| since + time);
        let first =
            [idle, self.accept_again, self.linger, self.alarm, self.patience].into_iter().flatten().min()?;
        // Rounded up: waking a moment early would only go round once more.
        let wait = first.saturating_duration_since(now) + Duration::from_millis(1);
        Timespec::try_from(wait).ok()
    }

    fn keep_time(&mut self, now: Instant) {
        if self.accept_again.is_some_and(|at| now >= at) {
            self.accept_again = None;
            self.watch_listener(EventFlags::IN);
        }
        // It is up: whether to leave is looked at next.
        self.patience = self.patience.filter(|at| now < *at);
        if self.alarm.is_none_or(|at| now < at) {
            return;
        }
        self.alarm = None;
        let keys: Vec<u64> = self.connections.keys().copied().collect();
        for key in keys {
            let Some(connection) = self.connections.get_mut(&key) else { continue };
            if connection.stalls(now, self.config.client_stall) {
                tracing::info!(uid = connection.peer.owner.uid, "a client stopped reading: disconnected");
                self.close(key);
                continue;
            }
            if connection.dawdles(now) {
                let why = format!("request line not finished within {} s", limits::LINE_TIME.as_secs());
                connection.refuse(line::failure(ErrorKind::Limit, why));
            }
            self.tell(key, None, now);
            self.settle(key, now);
        }
    }

    fn has_patience(&self) -> bool {
        !self.leaving || self.patience.is_some()
    }

    // ---- arrivals and departures

    fn accept(&mut self, now: Instant) {
        for _ in 0..limits::ACCEPTS_PER_TURN {
            match self.listener.accept() {
                Ok(Some(stream)) => self.admit(stream, now),
                Ok(None) => return,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept connections; trying again soon");
                    self.watch_listener(EventFlags::empty());
                    self.accept_again = Some(now + limits::ACCEPT_PAUSE);
                    return;
                }
            }
        }
    }

    fn watch_listener(&self, flags: EventFlags) {
        epoll::modify(&self.epoll, &self.listener, EventData::new_u64(LISTENER), flags)
            .expect("the listener is in the set as long as the loop runs");
    }

    fn admit(&mut self, stream: OwnedFd, now: Instant) {
        let owner = match process::peer(&stream) {
            Ok(peer) => Owner { uid: peer.uid, gid: peer.gid, groups: peer.groups },
            Err(error) => {
                tracing::warn!(error = error.chain(), "a connection without credentials: refused");
                return self.closer.close(u32::MAX, [stream]);
            }
        };
        let uid = owner.uid;
        let of_user = self.per_user.get(&uid).copied().unwrap_or(0);
        let mut connection = Connection::new(stream, Peer::new(owner, self.config.uid));
        let refusal = if self.closer.is_behind(uid) {
            Some(BEHIND)
        } else if self.connections.len() >= self.config.connections_max
            || of_user >= limits::CONNECTIONS_PER_USER_MAX.min(self.config.connections_max)
        {
            Some("too many connections")
        } else {
            None
        };
        if let Some(why) = refusal {
            connection.refuse(line::failure(ErrorKind::Limit, why));
            connection.flush(now);
            return self.closer.close(uid, connection.surrender());
        }
        let key = self.next;
        self.next += 1;
        if epoll::add(&self.epoll, &connection.stream, EventData::new_u64(key), EventFlags::IN).is_err() {
            return self.closer.close(uid, connection.surrender());
        }
        *self.per_user.entry(uid).or_default() += 1;
        self.connections.insert(key, connection);
        self.idle_since = None;
    }

    fn close(&mut self, key: u64) {
        let Some(connection) = self.connections.remove(&key) else { return };
        let _ = epoll::delete(&self.epoll, &connection.stream);
        connection.gone.store(true, Ordering::Release);
        let uid = connection.peer.owner.uid;
        if let Some(count) = self.per_user.get_mut(&uid) {
            *count -= 1;
            if *count == 0 {
                self.per_user.remove(&uid);
            }
        }
        self.debts.set(uid, key, 0);
        for task in self.helpers.withdraw(|task| task.connection == key && task.attached) {
            self.closer.close(uid, task.descriptors);
        }
        for job in &connection.attached {
            self.cancel(*job);
        }
        for export in &connection.exports {
            self.stop_export(*export, End::Drained);
        }
        self.closer.close(uid, connection.surrender());
    }

    /// Its end was requested; that it has ended already is as good.
    fn cancel(&self, job: JobId) {
        if let Err(error) = self.service.registry.cancel(job)
            && !matches!(error.kind(), ErrorKind::Conflict | ErrorKind::NotFound)
        {
            tracing::error!(job, error = error.chain(), "cannot cancel");
        }
    }

    // ---- one client

    fn serve(&mut self, key: u64, flags: EventFlags, now: Instant) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        if flags.intersects(EventFlags::HUP | EventFlags::ERR) && !connection.listens() {
            // Gone, and nothing of it would be read: epoll would report this for ever.
            return self.close(key);
        }
        for _ in 0..limits::LINES_PER_TURN {
            let Some(connection) = self.connections.get_mut(&key) else { return };
            if !connection.listens() {
                break;
            }
            if self.closer.is_behind(connection.peer.owner.uid) {
                connection.refuse(line::failure(ErrorKind::Limit, BEHIND));
                break;
            }
            match connection.receive(&mut self.scratch, now) {
                Received::Line(line, descriptors) => self.request(key, &line, descriptors, now),
                Received::Nothing => break,
                Received::End => connection.hang_up(),
                Received::Broken(failure) => connection.refuse(failure),
            }
        }
        self.settle(key, now);
    }

    fn request(&mut self, key: u64, line: &[u8], descriptors: Vec<OwnedFd>, now: Instant) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        let uid = connection.peer.owner.uid;
        let request = match line::parse(line) {
            Ok(request) => request,
            Err((id, failure)) => {
                self.closer.close(uid, descriptors);
                return connection.say(id, Body::Error(failure));
            }
        };
        let id = request.id;
        let action = match self.service.act(&connection.peer, request.call, descriptors.len()) {
            Ok(Action::Submit(submit)) => return self.submit(key, id, submit, descriptors),
            Ok(Action::Luks(request)) => return self.luks(key, id, request, descriptors),
            Ok(Action::Export(request)) => return self.export(key, id, request, descriptors),
            action => action,
        };
        self.closer.close(uid, descriptors);
        match action {
            Ok(Action::Submit(_) | Action::Luks(_) | Action::Export(_)) => {
                unreachable!("it has its descriptors")
            }
            Ok(Action::ExportStats(export)) => self.export_stats(key, id, export),
            Ok(Action::ExportStop(export, end)) => self.export_stop(key, id, export, end),
            Ok(Action::Reply(reply)) => connection.say(id, Body::Ok(reply)),
            Ok(Action::Watch(job, interval)) => {
                if connection.watches.len() >= limits::WATCHES_MAX {
                    let why = format!("more than {} watches on one connection", limits::WATCHES_MAX);
                    return connection.say(id, Body::Error(line::failure(ErrorKind::Limit, why)));
                }
                let (number, state) = (job.job, job.state);
                connection.say(id, Body::Ok(Reply::Job(job.clone())));
                if state.is_final() {
                    connection.say(id, Body::Event(Event::Finished(job)));
                } else {
                    let due = now + interval;
                    // What changed since the look is in the mailbox, which only this thread empties.
                    connection.watches.push(Watch { id, job: number, state, interval, due });
                }
            }
            Ok(Action::Stats { asked, jobs }) => {
                let registry = self.service.registry.clone();
                let work = move |_| Outcome::Answer(dispatch::stats(&registry, asked, jobs));
                self.help(key, id, true, Vec::new(), work);
            }
            Ok(Action::Shutdown(cancel)) => {
                let (jobs, exports) = (self.service.registry.active(), self.service.exports.active());
                connection.say(id, Body::Ok(Reply::ShuttingDown { jobs, exports }));
                self.shut_down(cancel, now);
            }
            Err(error) => connection.say(id, Body::Error(error.to_failure())),
        }
    }

    /// Send what can be sent, adjust what epoll watches, or close.
    fn settle(&mut self, key: u64, now: Instant) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        let uid = connection.peer.owner.uid;
        let alive = connection.flush(now);
        self.closer.close(uid, connection.unwanted());
        if !alive || (connection.closing && connection.unsent() == 0) {
            return self.close(key);
        }
        let wanted = connection.wanted();
        if wanted != connection.interest {
            connection.interest = wanted;
            epoll::modify(&self.epoll, &connection.stream, EventData::new_u64(key), wanted)
                .expect("a connection is in the set until it is closed");
        }
        let deadline = connection.deadline(self.config.client_stall);
        self.alarm = [self.alarm, deadline].into_iter().flatten().min();
        self.debts.set(uid, key, connection.held());
        while let Some(debtor) = self.debts.too_much(uid) {
            tracing::info!(uid, "too many replies left unread: the connection with most is disconnected");
            self.close(debtor);
        }
    }

    // ---- jobs

    fn submit(&mut self, key: u64, id: u64, submit: Box<Submit>, descriptors: Vec<OwnedFd>) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        let registry = &self.service.registry;
        if connection.attached.len() >= limits::ATTACHED_MAX {
            connection.attached.retain(|job| registry.show(*job).is_some_and(|job| !job.state.is_final()));
        }
        let refusal = if self.leaving {
            Some(line::failure(ErrorKind::ShuttingDown, "the daemon is leaving"))
        } else if connection.attached.len() >= limits::ATTACHED_MAX {
            let why = format!("more than {} jobs on one connection", limits::ATTACHED_MAX);
            Some(line::failure(ErrorKind::Limit, why))
        } else {
            None
        };
        if let Some(failure) = refusal {
            connection.say(id, Body::Error(failure));
            let uid = connection.peer.owner.uid;
            return self.closer.close(uid, descriptors);
        }
        let (owner, registry) = (connection.peer.owner.clone(), registry.clone());
        let detach = submit.detach;
        let work = move |descriptors| {
            let result = registry.submit(&owner, *submit, descriptors);
            Outcome::Submitted { detach, result }
        };
        self.help(key, id, !detach, descriptors, work);
    }

    /// A header operation. The client's going away ends it unless it has begun to write.
    fn luks(&mut self, key: u64, id: u64, request: Box<proto::luks::Request>, descriptors: Vec<OwnedFd>) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        let owner = connection.peer.owner.clone();
        if self.leaving {
            connection.say(id, Body::Error(line::failure(ErrorKind::ShuttingDown, "the daemon is leaving")));
            return self.closer.close(owner.uid, descriptors);
        }
        let gone = connection.gone.clone();
        let work = move |descriptors| Outcome::Answer(dispatch::luks(&owner, *request, descriptors, &gone));
        self.help(key, id, true, descriptors, work);
    }

    /// Have `work` done by a helper; the connection's next line waits for its outcome.
    fn help(
        &mut self,
        key: u64,
        id: u64,
        attached: bool,
        descriptors: Vec<OwnedFd>,
        work: impl FnOnce(Vec<OwnedFd>) -> Outcome + Send + 'static,
    ) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        connection.busy = true;
        let uid = connection.peer.owner.uid;
        let mailbox = self.mailbox.clone();
        let work = Box::new(move |descriptors| {
            let outcome = work(descriptors);
            mailbox.post(|news| news.finished.push(Finished { uid, connection: key, id, outcome }));
        });
        self.helpers.add(Task { uid, connection: key, id, attached, descriptors, work });
        self.start_helpers();
    }

    fn start_helpers(&mut self) {
        for (task, error) in self.helpers.start() {
            self.give_up(task, Error::io("cannot start a thread", error));
        }
    }

    fn give_up(&mut self, task: Task, error: Error) {
        self.closer.close(task.uid, task.descriptors);
        if let Some(connection) = self.connections.get_mut(&task.connection) {
            connection.busy = false;
            connection.say(task.id, Body::Error(error.to_failure()));
            // Sent when time is kept next: at once.
            self.alarm = Some(Instant::now());
        }
    }

    fn read_news(&mut self, now: Instant) {
        let news = self.mailbox.take();
        for Finished { uid, connection: key, id, outcome } in news.finished {
            self.helpers.finished(uid);
            let job = match &outcome {
                Outcome::Submitted { detach, result: Ok((job, _)) } => Some((*job, *detach)),
                _ => None,
            };
            self.exported(key, &outcome);
            let Some(connection) = self.connections.get_mut(&key) else {
                // Nobody is there to hear of it: a detached one goes on, unless everything is being ended.
                if let Some((job, detached)) = job
                    && (!detached || self.cancelling)
                {
                    self.cancel(job);
                }
                continue;
            };
            connection.busy = false;
            if let Some((job, false)) = job {
                connection.attached.insert(job);
            }
            let body = match outcome {
                Outcome::Submitted { result: Ok((job, mut warnings)), .. } => {
                    warnings.extend(self.told.news(&self.service.about.workers));
                    Body::Ok(Reply::Submitted { job, warnings })
                }
                Outcome::Exported { result: Ok((export, mut warnings)), .. } => {
                    warnings.extend(self.told.news(&self.service.about.workers));
                    Body::Ok(Reply::Exported { export, warnings })
                }
                Outcome::Answer(Ok(reply)) => Body::Ok(reply),
                Outcome::Submitted { result: Err(error), .. }
                | Outcome::Exported { result: Err(error), .. }
                | Outcome::Answer(Err(error)) => Body::Error(error.to_failure()),
            };
            connection.say(id, body);
            if let (Some((job, _)), true) = (job, self.cancelling) {
                self.cancel(job);
            }
            self.settle(key, now);
        }
        self.start_helpers();
        if !news.jobs.is_empty() {
            self.tell_all(Some(&news.jobs), now);
        }
    }

    fn tell_all(&mut self, jobs: Option<&BTreeMap<JobId, Notice>>, now: Instant) {
        let watching: Vec<u64> = self
            .connections
            .iter()
            .filter(|(_, connection)| !connection.watches.is_empty())
            .map(|(key, _)| *key)
            .collect();
        for key in watching {
            self.tell(key, jobs, now);
            self.settle(key, now);
        }
    }

    /// Events for one connection: of `jobs`, whose state changed; or with `None` of every watch that is due.
    fn tell(&mut self, key: u64, jobs: Option<&BTreeMap<JobId, Notice>>, now: Instant) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        let mut watches = std::mem::take(&mut connection.watches);
        watches.retain_mut(|watch| {
            let due = now >= watch.due;
            if jobs.map_or(!due, |jobs| !jobs.contains_key(&watch.job)) {
                return true;
            }
            let notice = jobs.and_then(|jobs| jobs.get(&watch.job));
            let job = match notice {
                Some(Notice::Ended(job)) => Some((**job).clone()),
                _ => self.service.registry.show(watch.job),
            };
            let Some(job) = job else {
                if matches!(notice, Some(Notice::Forgotten)) {
                    let why = format!("job {} is no longer remembered", watch.job);
                    connection.say(watch.id, Body::Error(line::failure(ErrorKind::NotFound, why)));
                    return false;
                }
                // It has just ended, and the notice of that is in the mailbox.
                watch.due = now + watch.interval;
                return true;
            };
            if job.state != watch.state {
                watch.state = job.state;
                let event = Event::State { job: watch.job, state: job.state };
                connection.say(watch.id, Body::Event(event));
            }
            if job.state.is_final() {
                connection.say(watch.id, Body::Event(Event::Finished(Box::new(job))));
                return false;
            }
            if due {
                watch.due = now + watch.interval;
                let moves = matches!(job.state, proto::JobState::Running | proto::JobState::Flushing);
                if moves && connection.unsent() == 0 {
                    let event = Event::Progress { job: watch.job, progress: job.progress };
                    connection.say(watch.id, Body::Event(event));
                }
            }
            true
        });
        connection.watches = watches;
    }

    // ---- the end

    fn read_signals(&mut self, now: Instant) {
        let mut bytes = [0; 16];
        while let Ok(count) = rustix::io::read(&self.signals, &mut bytes) {
            for _ in 0..count {
                // The first asks to leave when the work is done, the second to leave.
                self.shut_down(self.leaving, now);
            }
            if count == 0 {
                return;
            }
        }
    }

    fn shut_down(&mut self, cancel: bool, now: Instant) {
        let (jobs, exports) = (self.service.registry.active(), self.service.exports.active());
        if !self.leaving {
            tracing::info!(jobs, exports, "leaving: nothing new, waiting for active jobs, draining exports");
            self.leaving = true;
            self.patience = Some(now + limits::HELPER_PATIENCE);
            for task in self.helpers.withdraw(|_| true) {
                self.give_up(task, Error::new(ErrorKind::ShuttingDown, "the daemon is leaving"));
            }
        }
        // An export has no end of its own to wait for.
        self.service.exports.end_all(if cancel { End::Dropped } else { End::Drained });
        if cancel {
            self.cancelling = true;
            tracing::info!(jobs, "cancelling active jobs");
            for job in self.service.registry.list() {
                if !job.state.is_final() {
                    self.cancel(job.job);
                }
            }
        }
    }

    /// Is there a job or an export that is not over?
    fn is_active(&self) -> bool {
        self.service.registry.active() > 0 || self.service.exports.active() > 0
    }

    fn may_leave(&mut self, now: Instant) -> bool {
        let helped = (self.helpers.any_waiting() || self.helpers.running() > 0) && self.has_patience();
        let working = self.is_active() || helped;
        if working {
            self.idle_since = None;
            self.linger = None;
            return false;
        }
        if self.leaving {
            return true;
        }
        if !self.connections.is_empty() {
            self.idle_since = None;
            return false;
        }
        let since = *self.idle_since.get_or_insert(now);
        self.config.idle_exit.is_some_and(|time| now.duration_since(since) >= time)
    }

    /// `false`: a client came at the last moment and stays, or has not yet read how its job ended.
    fn leave(&mut self, now: Instant) -> bool {
        // The end of a job may be visible before its notice has been read.
        self.read_news(now);
        if self.is_active() {
            // A submission came through at the last moment.
            return false;
        }
        // Nor may it be lost because its reader is slow.
        let linger = *self.linger.get_or_insert(now + limits::LINGER);
        if now < linger && self.connections.values().any(|connection| connection.unsent() > 0) {
            return false;
        }
        while let Some(stream) = self.listener.leave() {
            if !self.leaving {
                self.admit(stream, now);
                self.linger = None;
                return false;
            }
            self.closer.close(u32::MAX, [stream]);
        }
        let abandoned = self.helpers.running();
        if abandoned > 0 {
            tracing::warn!(abandoned, "requests hang, and are left behind");
        }
        // What their sockets hold may block when it is closed.
        let keys: Vec<u64> = self.connections.keys().copied().collect();
        for key in keys {
            self.close(key);
        }
        tracing::info!(reason = if self.leaving { "told to" } else { "idle" }, "left");
        true
    }
}
