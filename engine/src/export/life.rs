//! One export as its owner sees it: its state, its counters, its end.
//!
//! ```text
//! Opening ──▶ Serving ──▶ Draining ──▶ Stopped
//!    └───────────────────────────────────▲        the key does not fit, or nobody waits for it any more
//! ```
//! Each has a thread of its own, its keeper, that sleeps until the export is told to end and then ends it: so an end needs nothing that
//! could be missing just then. What was served is let go of with [`State::Stopped`], the key with it; the counters stay.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use proto::Failure;
use proto::export::{Commands, ExportId, Info, Request, State, Stats};

use crate::error::{Error, ErrorKind, Result};
use crate::export::exported::Exported;
use crate::format::nbd::request::Command;
use crate::job::Owner;
use crate::volume::held::Held;

/// How often who waits for an end looks whether it still has to.
const WAIT_POLL: Duration = Duration::from_millis(100);

/// How an export is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    /// What was asked for is answered.
    Drained,
    /// At once.
    Dropped,
}

/// One export.
pub struct Life {
    /// Its number.
    pub id: ExportId,
    /// Whose it is.
    pub owner: Owner,
    /// Where clients come in.
    pub address: String,
    /// What clients call it.
    pub name: String,
    volume: String,
    read_only: bool,
    tls: bool,
    began: Instant,
    inner: Mutex<Inner>,
    changed: Condvar,
}

struct Inner {
    state: State,
    end: Option<End>,
    served: Option<Served>,
    /// What is left of it when it is over.
    kept: Option<Kept>,
    failure: Option<Failure>,
}

/// What is served.
struct Served {
    exported: Arc<Exported>,
    held: Held,
}

#[derive(Clone)]
struct Kept {
    bytes: u64,
    connections_total: u64,
    errors: u64,
    commands: Vec<Commands>,
    seconds: f64,
    stats: Option<Box<Stats>>,
}

impl Life {
    /// One that is being opened, behind the socket at `address`, which has `tls` or not.
    #[must_use]
    pub fn new(id: ExportId, owner: &Owner, (address, tls): (&str, bool), request: &Request) -> Arc<Self> {
        Arc::new(Self {
            id,
            owner: owner.clone(),
            address: address.to_owned(),
            name: request.name.clone(),
            volume: request.file.name.clone(),
            read_only: request.read_only,
            tls,
            began: Instant::now(),
            inner: Mutex::new(Inner {
                state: State::Opening,
                end: None,
                served: None,
                kept: None,
                failure: None,
            }),
            changed: Condvar::new(),
        })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it is doing.
    #[must_use]
    pub fn state(&self) -> State {
        self.inner().state
    }

    /// Is it to end, or over?
    #[must_use]
    pub fn is_ending(&self) -> bool {
        let inner = self.inner();
        inner.end.is_some() || inner.state == State::Stopped
    }

    /// What is served, while it is.
    #[must_use]
    pub fn exported(&self) -> Option<Arc<Exported>> {
        self.inner().served.as_ref().map(|served| served.exported.clone())
    }

    /// It is open.
    ///
    /// # Errors
    /// `Cancelled`: its end was asked for meanwhile.
    pub fn serve(&self, exported: Arc<Exported>, held: Held) -> Result<()> {
        let mut inner = self.inner();
        if inner.end.is_some() {
            drop(inner);
            return Err(Error::new(ErrorKind::Cancelled, "the export was stopped while it was opened"));
        }
        inner.served = Some(Served { exported, held });
        inner.state = State::Serving;
        Ok(())
    }

    /// It could not be opened, or served.
    pub fn refused(&self, failure: Failure) {
        let (held, _exported) = {
            let mut inner = self.inner();
            inner.state = State::Stopped;
            inner.failure = Some(failure);
            inner.served.take().map(|served| (served.held, served.exported)).unzip()
        };
        // Closing what the client passed may take its time.
        drop(held);
        self.changed.notify_all();
    }

    /// Ask for its end; one that drains already may still be dropped. Returns at once.
    pub fn end(&self, end: End) {
        {
            let mut inner = self.inner();
            inner.end = inner.end.max(Some(end));
        }
        self.changed.notify_all();
    }

    /// The keeper sleeps until its end is asked for.
    #[must_use]
    pub fn wait_for_end(&self) -> End {
        let mut inner = self.inner();
        loop {
            if let Some(end) = inner.end {
                inner.state = State::Draining;
                return end;
            }
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// How it is to end, after `wait` at most, or as soon as that changes.
    #[must_use]
    pub fn end_within(&self, wait: Duration, known: End) -> End {
        let inner = self.inner();
        let same = |inner: &mut Inner| inner.end.is_none_or(|end| end <= known);
        let waited = self.changed.wait_timeout_while(inner, wait, same);
        let (inner, _) = waited.unwrap_or_else(PoisonError::into_inner);
        inner.end.unwrap_or(known)
    }

    /// Nothing is in flight any more: let go of everything, and keep what is to be remembered.
    pub fn over(&self, stats: Option<Stats>, failure: Option<Error>) {
        if let Some(error) = &failure {
            tracing::warn!("export {}: {}", self.id, error.chain());
        }
        let served = {
            let mut inner = self.inner();
            let served = inner.served.take();
            inner.kept = served.as_ref().map(|served| self.keep(&served.exported, stats.map(Box::new)));
            inner.failure = failure.map(|error| error.to_failure());
            served
        };
        // The volume is free before anybody is told so.
        drop(served);
        let mut inner = self.inner();
        inner.state = State::Stopped;
        if let Some(stats) = inner.kept.as_mut().and_then(|kept| kept.stats.as_mut()) {
            stats.info.state = State::Stopped;
            stats.info.connections = 0;
        }
        drop(inner);
        self.changed.notify_all();
    }

    fn keep(&self, exported: &Exported, stats: Option<Box<Stats>>) -> Kept {
        Kept {
            bytes: exported.view.total(),
            connections_total: exported.counters.connections_total.load(Ordering::Relaxed),
            errors: exported.counters.errors.load(Ordering::Relaxed),
            commands: commands(exported),
            seconds: self.began.elapsed().as_secs_f64(),
            stats,
        }
    }

    /// Wait until it is over, or `gone` says that nobody waits any more.
    pub fn wait_until_over(&self, gone: &dyn Fn() -> bool) {
        let mut inner = self.inner();
        while inner.state != State::Stopped && !gone() {
            let waited = self.changed.wait_timeout(inner, WAIT_POLL);
            (inner, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// What was measured, if it is over.
    #[must_use]
    pub fn kept_stats(&self) -> Option<Stats> {
        self.inner().kept.as_ref().and_then(|kept| kept.stats.as_deref().cloned())
    }

    /// As the wire shows it.
    #[must_use]
    pub fn info(&self) -> Info {
        let inner = self.inner();
        let mut info = Info {
            export: self.id,
            uid: self.owner.uid,
            state: inner.state,
            volume: self.volume.clone(),
            address: self.address.clone(),
            name: self.name.clone(),
            bytes: 0,
            read_only: self.read_only,
            tls: self.tls,
            connections: 0,
            connections_total: 0,
            job: None,
            seconds: self.began.elapsed().as_secs_f64(),
            commands: Vec::new(),
            errors: 0,
            failure: inner.failure.clone(),
        };
        if let Some(Served { exported, .. }) = &inner.served {
            info.bytes = exported.view.total();
            info.connections = exported.connections();
            info.connections_total = exported.counters.connections_total.load(Ordering::Relaxed);
            info.errors = exported.counters.errors.load(Ordering::Relaxed);
            info.commands = commands(exported);
        } else if let Some(kept) = &inner.kept {
            info.bytes = kept.bytes;
            info.connections_total = kept.connections_total;
            info.errors = kept.errors;
            info.commands.clone_from(&kept.commands);
            info.seconds = kept.seconds;
        }
        info
    }
}

/// What was asked for, by command; what never was is left out.
fn commands(exported: &Exported) -> Vec<Commands> {
    const NAMED: [(Command, &str); 7] = [
        (Command::Read, "read"),
        (Command::Write, "write"),
        (Command::Flush, "flush"),
        (Command::Trim, "trim"),
        (Command::WriteZeroes, "write_zeroes"),
        (Command::BlockStatus, "block_status"),
        (Command::Cache, "cache"),
    ];
    let counted = |(command, name): (Command, &str)| {
        let (count, bytes) = &exported.counters.commands[usize::from(command.number())];
        let (count, bytes) = (count.load(Ordering::Relaxed), bytes.load(Ordering::Relaxed));
        (count > 0).then(|| Commands { command: name.to_owned(), count, bytes })
    };
    NAMED.into_iter().filter_map(counted).collect()
}
