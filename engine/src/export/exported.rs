//! One export as its connections see it: what it is called, what it can do, what has been done.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use proto::export::ExportId;

use crate::backend::Wake;
use crate::backend::blocking::Turns;
use crate::backend::device::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::pipeline::view::View;
use crate::telemetry::record::StageRecord;

/// An export that is open.
pub struct Exported {
    /// Its number.
    pub id: ExportId,
    /// What clients call it.
    pub name: String,
    /// For humans.
    pub description: Option<String>,
    /// Nothing is written.
    pub read_only: bool,
    /// Space may be given back, see `proto::export::Request::discard`.
    pub discard: bool,
    /// The volume's data.
    pub device: Arc<Device>,
    /// Its alignment for direct I/O, bytes; 1: it is buffered.
    pub align: u32,
    /// Where its plaintext lies, and who may touch what.
    pub view: Arc<View>,
    /// What has been done.
    pub counters: Counters,
    /// What is durable of it.
    pub durability: Arc<Durability>,
    /// See [`Course`].
    course: AtomicU8,
    /// What workers that have let go of it recorded, and their system calls.
    kept: Mutex<(StageRecord, u64)>,
    /// Told when the last connection has gone.
    quiet: (Mutex<()>, Condvar),
}

/// Who flushes, and whether what was written can be made durable at all.
///
/// The kernel reports a failed write-back once for each open file, to whoever flushes next. Two flushes side by side could share a
/// failure such that one of them says that all is well, and so could a later one. Hence at most one is under way, whichever workers
/// ask, and none is begun after one has failed.
///
/// Flushes are numbered in the order they begin: one that begins later than a request came covers it, whichever worker makes it. So
/// a worker that never gets its turn is served by the others' flushes.
///
/// A job beside the export flushes in turn with them ([`Turns`]), by an open file of its own: one of its flushes that fails has failed for all,
/// and one that succeeds covers nobody's requests, for the export's file may have been told otherwise. It waits for one flush at most:
/// no other begins while it waits.
#[derive(Default)]
pub struct Durability {
    flushing: Mutex<Flushing>,
    /// One is over that somebody waits for in [`Turns::begin_in_turn`].
    over: Condvar,
    lost: AtomicBool,
}

/// What became of asking for a flush.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begin {
    /// It may begin; [`Durability::end`] follows.
    Begun,
    /// Another one is under way.
    Busy,
    /// There is none any more, see [`Durability::is_lost`].
    Lost,
}

#[derive(Default)]
struct Flushing {
    busy: bool,
    /// Number of the latest that has begun.
    begun: u64,
    /// Number of the latest that has succeeded.
    durable: u64,
    waiting: Vec<Arc<dyn Wake>>,
    /// So many wait in [`Turns::begin_in_turn`].
    jobs: u32,
}

impl Durability {
    /// May a flush begin? If there is another one, `waker` is woken when to ask again.
    #[must_use]
    pub fn begin(&self, waker: &Arc<dyn Wake>) -> Begin {
        let mut flushing = lock(&self.flushing);
        // Under the lock: the next flush after a failed one would succeed, and say of lost bytes that they are durable.
        if self.is_lost() {
            return Begin::Lost;
        }
        if flushing.busy || flushing.jobs > 0 {
            if !flushing.waiting.iter().any(|other| Arc::ptr_eq(other, waker)) {
                flushing.waiting.push(waker.clone());
            }
            return Begin::Busy;
        }
        flushing.busy = true;
        flushing.begun += 1;
        Begin::Begun
    }

    /// For a request that wants a flush: every flush of a higher number begins after now.
    #[must_use]
    pub fn ticket(&self) -> u64 {
        lock(&self.flushing).begun
    }

    /// Number of the latest flush that has succeeded: requests with a lower ticket need no other.
    #[must_use]
    pub fn durable(&self) -> u64 {
        lock(&self.flushing).durable
    }

    /// The flush that was begun is over.
    pub fn end(&self, is_durable: bool) {
        let mut flushing = lock(&self.flushing);
        if is_durable {
            flushing.durable = flushing.begun;
        }
        self.over(flushing, is_durable);
    }

    /// Whoever waits may go on.
    fn over(&self, mut flushing: MutexGuard<'_, Flushing>, is_durable: bool) {
        if !is_durable {
            self.lost.store(true, Ordering::Release);
        }
        flushing.busy = false;
        let waiting = std::mem::take(&mut flushing.waiting);
        drop(flushing);
        self.over.notify_all();
        waiting.iter().for_each(|waker| waker.wake());
    }

    /// May some of what was written be lost although it can be read? Then every flush and write is told so.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }
}

impl Turns for Durability {
    fn is_lost(&self) -> bool {
        Self::is_lost(self)
    }

    fn begin_in_turn(&self) -> Result<()> {
        let mut flushing = lock(&self.flushing);
        flushing.jobs += 1;
        while flushing.busy && !self.is_lost() {
            flushing = self.over.wait(flushing).unwrap_or_else(PoisonError::into_inner);
        }
        flushing.jobs -= 1;
        if !self.is_lost() {
            flushing.busy = true;
            return Ok(());
        }
        let what = "an earlier flush failed: what was written may be lost";
        Err(Error::new(ErrorKind::Io, what).hint("stop its export, and check what is on the volume"))
    }

    fn end_in_turn(&self, is_durable: bool) {
        self.over(lock(&self.flushing), is_durable);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What has been done, over all connections.
#[derive(Debug, Default)]
pub struct Counters {
    /// Connections there are.
    pub connections: AtomicU32,
    /// Connections there have been.
    pub connections_total: AtomicU64,
    /// Requests that ended in an error.
    pub errors: AtomicU64,
    /// Requests and their bytes, by the number of their command.
    pub commands: [(AtomicU64, AtomicU64); 8],
}

/// How far an export is on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Course {
    /// Requests are served.
    Serving,
    /// No new connections; those there are are answered what they have asked and then closed.
    Draining,
    /// Connections are closed as soon as nothing of theirs is in flight.
    Dropping,
}

impl Exported {
    /// An export of an opened volume.
    #[must_use]
    pub fn new(
        id: ExportId,
        request: &proto::export::Request,
        device: Arc<Device>,
        align: u32,
        view: Arc<View>,
    ) -> Arc<Self> {
        Arc::new(Self {
            id,
            name: request.name.clone(),
            description: request.description.clone(),
            read_only: request.read_only,
            discard: request.discard,
            device,
            align,
            view,
            counters: Counters::default(),
            durability: Arc::default(),
            course: AtomicU8::new(0),
            kept: Mutex::default(),
            quiet: (Mutex::default(), Condvar::new()),
        })
    }

    /// How far it is on its way.
    #[must_use]
    pub fn course(&self) -> Course {
        match self.course.load(Ordering::SeqCst) {
            0 => Course::Serving,
            1 => Course::Draining,
            _ => Course::Dropping,
        }
    }

    /// Connections there are.
    #[must_use]
    pub fn connections(&self) -> u32 {
        self.counters.connections.load(Ordering::Acquire)
    }

    /// Go on to `course`; there is no way back. Wake the workers afterwards.
    pub fn end(&self, course: Course) {
        self.course.fetch_max(course as u8, Ordering::SeqCst);
    }

    /// A connection comes.
    fn enter(&self) {
        self.counters.connections.fetch_add(1, Ordering::SeqCst);
        self.counters.connections_total.fetch_add(1, Ordering::Relaxed);
    }

    /// Nothing of a connection is left.
    fn leave(&self) {
        let _guard = lock(&self.quiet.0);
        if self.counters.connections.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.quiet.1.notify_all();
        }
    }

    /// Wait until it has no connections, and so no worker holds its device. `false`: it still has at `deadline`. No new ones come
    /// once its course is not [`Course::Serving`].
    #[must_use]
    pub fn wait_quiet(&self, deadline: Instant) -> bool {
        let mut guard = lock(&self.quiet.0);
        while self.counters.connections.load(Ordering::SeqCst) > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            guard = self.quiet.1.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// A worker lets go of it.
    pub fn keep(&self, record: &StageRecord, syscalls: u64) {
        let mut kept = lock(&self.kept);
        kept.0.merge(record);
        kept.1 += syscalls;
    }

    /// What workers that have let go of it recorded, and their system calls.
    #[must_use]
    pub fn kept(&self) -> (StageRecord, u64) {
        lock(&self.kept).clone()
    }
}

/// A connection's place in an export. It is counted as long as this exists, and by nothing else: hold it as long as the socket.
pub struct Seat(Arc<Exported>);

impl Seat {
    /// One more connection.
    #[must_use]
    pub fn take(export: Arc<Exported>) -> Self {
        export.enter();
        Self(export)
    }

    /// The export.
    #[must_use]
    pub fn export(&self) -> &Arc<Exported> {
        &self.0
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.leave();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[derive(Default)]
    struct Bell(AtomicUsize);

    impl Wake for Bell {
        fn wake(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    impl Bell {
        fn new() -> (Arc<Self>, Arc<dyn Wake>) {
            let bell = Arc::new(Self::default());
            (bell.clone(), bell)
        }
    }

    #[test]
    fn no_flush_begins_after_one_that_failed() {
        let durability = Durability::default();
        let ((_, first), (bell, second)) = (Bell::new(), Bell::new());
        assert_eq!(durability.begin(&first), Begin::Begun);
        assert_eq!(durability.begin(&second), Begin::Busy);
        durability.end(true);
        assert_eq!(bell.0.load(Ordering::SeqCst), 1);
        assert_eq!(durability.durable(), 1);
        assert_eq!(durability.begin(&second), Begin::Begun);
        assert_eq!(durability.begin(&first), Begin::Busy);
        durability.end(false);
        assert_eq!((durability.begin(&first), durability.begin(&second)), (Begin::Lost, Begin::Lost));
    }

    #[test]
    fn a_flush_covers_what_came_before_it_began_and_nothing_else() {
        let durability = Durability::default();
        let (_, waker) = Bell::new();
        let before = durability.ticket();
        assert_eq!(durability.begin(&waker), Begin::Begun);
        let beside = durability.ticket();
        assert!(before >= durability.durable(), "it has only begun");
        durability.end(true);
        assert!(before < durability.durable() && beside >= durability.durable());
        assert_eq!(durability.begin(&waker), Begin::Begun);
        durability.end(false);
        assert!(beside >= durability.durable(), "it failed");
    }

    #[test]
    fn a_job_flushes_in_turn_and_covers_nobody() {
        let durability = Durability::default();
        let (bell, waker) = Bell::new();
        assert_eq!(durability.begin(&waker), Begin::Begun);
        std::thread::scope(|scope| {
            let job = scope.spawn(|| durability.begin_in_turn());
            while lock(&durability.flushing).jobs == 0 {
                std::thread::yield_now();
            }
            assert!(!job.is_finished());
            // Who would go on flushing gives way.
            durability.end(true);
            assert_eq!(durability.begin(&waker), Begin::Busy);
            job.join().expect("ends").expect("its turn");
        });
        let (ticket, rung) = (durability.ticket(), bell.0.load(Ordering::SeqCst));
        durability.end_in_turn(true);
        assert_eq!(bell.0.load(Ordering::SeqCst), rung + 1);
        assert!(ticket >= durability.durable(), "by another open file");
        assert_eq!(durability.begin(&waker), Begin::Begun);
        durability.end(true);
        assert!(ticket < durability.durable());
        durability.begin_in_turn().expect("its turn");
        durability.end_in_turn(false);
        assert_eq!(durability.begin(&waker), Begin::Lost);
        let refused = durability.begin_in_turn().expect_err("refused");
        assert_eq!(refused.kind(), ErrorKind::Io);
        assert!(durability.is_lost());
    }

    #[test]
    fn a_worker_that_asks_while_another_ones_flush_fails_is_never_let_through() {
        for _ in 0..2000 {
            let durability = Durability::default();
            let (_, waker) = Bell::new();
            assert_eq!(durability.begin(&waker), Begin::Begun);
            std::thread::scope(|scope| {
                scope.spawn(|| durability.end(false));
                let (_, other) = Bell::new();
                let mut answer = Begin::Busy;
                while answer == Begin::Busy {
                    answer = durability.begin(&other);
                }
                assert_eq!(answer, Begin::Lost);
            });
        }
    }
}
