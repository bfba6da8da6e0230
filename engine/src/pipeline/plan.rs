//! Which extents a transfer covers, in which order they may be claimed, and when.
//!
//! A [`Plan`] hands out chunks in ascending order by one atomic add, to any number of workers. It ends where the volume
//! ends, or where a stream turned out to end. A barrier ([`Plan::open_until`]) keeps chunks beyond it unclaimed until
//! whoever set it knows that everything before is durable: crash safety lives here, not in the worker loop.
//!
//! A [`Gate`] holds what a user may change while the transfer runs: pause, stop, and the rate limit.

use std::num::NonZeroU64;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::units::Extent;

/// The extents of one transfer.
#[derive(Debug)]
pub struct Plan {
    chunk_bytes: u64,
    next: AtomicU64,
    /// One past the last byte there is; `u64::MAX` while a stream's end is unknown.
    end: AtomicU64,
    /// One past the last byte that may be claimed now.
    open: AtomicU64,
    /// Where segments meet, ascending: no chunk crosses one. Most plans have none.
    seams: OnceLock<Vec<u64>>,
}

/// The answer to "what next?".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// This extent is the caller's alone.
    Extent(Extent),
    /// Nothing before the barrier is left; ask again after it has moved.
    Blocked,
    /// Nothing is left.
    Exhausted,
}

impl Plan {
    /// All of `0..total` (`None`: a stream, whose end will be reported by [`Plan::end_at`]), `chunk_bytes` at a time.
    #[must_use]
    pub fn new(total: Option<u64>, chunk_bytes: u32) -> Self {
        assert!(chunk_bytes > 0, "a chunk has bytes");
        Self {
            chunk_bytes: chunk_bytes.into(),
            next: AtomicU64::new(0),
            end: AtomicU64::new(total.unwrap_or(u64::MAX)),
            open: AtomicU64::new(u64::MAX),
            seams: OnceLock::new(),
        }
    }

    /// No chunk crosses one of these offsets, which ascend. To be said once, before the first claim.
    ///
    /// # Panics
    /// If it was said before.
    pub fn cut_at(&self, seams: Vec<u64>) {
        assert!(self.seams.set(seams).is_ok(), "a plan is cut once");
    }

    fn seam_after(&self, start: u64) -> u64 {
        let seams = self.seams.get().map_or(&[][..], Vec::as_slice);
        seams.iter().copied().find(|seam| *seam > start).unwrap_or(u64::MAX)
    }

    /// Bytes of one chunk; only the last of the plan may be shorter.
    #[must_use]
    pub fn chunk_bytes(&self) -> u64 {
        self.chunk_bytes
    }

    /// Begin at `order` instead of 0. Before the first claim.
    pub fn start_at(&self, order: u64) {
        self.next.store(order, Ordering::Release);
    }

    /// Where the next chunk would begin: everything before was claimed.
    #[must_use]
    pub fn next(&self) -> u64 {
        self.next.load(Ordering::Acquire)
    }

    /// Claim the next chunk.
    pub fn claim(&self) -> Claim {
        // A compare-and-swap and not an add, so that a refused claim leaves no gap behind a barrier or an end.
        let mut start = self.next.load(Ordering::Relaxed);
        loop {
            let end = self.end.load(Ordering::Acquire);
            if start >= end {
                return Claim::Exhausted;
            }
            let open = self.open.load(Ordering::Acquire);
            if start >= open {
                return Claim::Blocked;
            }
            let stop = start.saturating_add(self.chunk_bytes).min(end).min(open).min(self.seam_after(start));
            match self.next.compare_exchange_weak(start, stop, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => {
                    return Claim::Extent(Extent::new(start, stop).expect("start < end and start < open"));
                }
                Err(moved) => start = moved,
            }
        }
    }

    /// Is nothing left to claim?
    #[must_use]
    pub fn is_exhausted(&self) -> bool {
        self.next.load(Ordering::Acquire) >= self.end.load(Ordering::Acquire)
    }

    /// The plan ends at `end` after all (a stream's end, or the first difference of a verification). Only ever lowers it.
    pub fn end_at(&self, end: u64) {
        self.end.fetch_min(end, Ordering::AcqRel);
    }

    /// Where the plan ends, if that is known.
    #[must_use]
    pub fn end(&self) -> Option<u64> {
        let end = self.end.load(Ordering::Acquire);
        (end != u64::MAX).then_some(end)
    }

    /// Move the barrier: nothing at or beyond `offset` is handed out until it moves again.
    pub fn open_until(&self, offset: u64) {
        self.open.store(offset, Ordering::Release);
    }
}

const RUNNING: u8 = 0;
const PAUSED: u8 = 1;
const STOPPED: u8 = 2;

/// What may be changed from outside while workers run. Readers see a change at their next claim.
#[derive(Debug)]
pub struct Gate {
    state: AtomicU8,
    /// Bytes per second; 0 is no limit.
    rate: AtomicU64,
    /// When the next chunk may start, nanoseconds after `epoch` (the generic cell rate algorithm's arrival time).
    allowed_ns: AtomicU64,
    epoch: Instant,
}

/// May a chunk be claimed?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// Yes.
    Open,
    /// Not before this moment, because of the rate limit.
    NotBefore(Instant),
    /// Not until resumed.
    Paused,
    /// Never again.
    Stopped,
}

impl Default for Gate {
    fn default() -> Self {
        Self {
            state: AtomicU8::new(RUNNING),
            rate: AtomicU64::new(0),
            allowed_ns: AtomicU64::new(0),
            epoch: Instant::now(),
        }
    }
}

impl Gate {
    fn now_ns(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Ask before claiming.
    pub fn admit(&self) -> Admission {
        match self.state.load(Ordering::Acquire) {
            STOPPED => Admission::Stopped,
            PAUSED => Admission::Paused,
            _ if self.rate.load(Ordering::Relaxed) == 0 => Admission::Open,
            _ => {
                let allowed = self.allowed_ns.load(Ordering::Relaxed);
                if allowed <= self.now_ns() {
                    Admission::Open
                } else {
                    Admission::NotBefore(self.epoch + Duration::from_nanos(allowed))
                }
            }
        }
    }

    /// Account for a claimed chunk.
    pub fn charge(&self, bytes: u64) {
        let now = self.now_ns();
        let _ = self.allowed_ns.fetch_update(Ordering::AcqRel, Ordering::Acquire, |allowed| {
            // Looked at anew for each attempt: a debt at a rate that was just lifted must not outlive it.
            let rate = NonZeroU64::new(self.rate.load(Ordering::Acquire))?;
            let cost = u128::from(bytes) * 1_000_000_000 / u128::from(rate.get());
            Some(allowed.max(now).saturating_add(u64::try_from(cost).unwrap_or(u64::MAX)))
        });
    }

    /// Limit the rate from now on; `None` lifts the limit.
    pub fn set_rate(&self, bytes_per_second: Option<u64>) {
        self.rate.store(bytes_per_second.unwrap_or(0), Ordering::Release);
        // Debts of the old rate are forgiven, or a raised limit would take effect late.
        self.allowed_ns.store(self.now_ns(), Ordering::Release);
    }

    /// The limit in force.
    #[must_use]
    pub fn rate(&self) -> Option<u64> {
        match self.rate.load(Ordering::Relaxed) {
            0 => None,
            rate => Some(rate),
        }
    }

    /// Pause or resume; has no effect once stopped.
    pub fn set_paused(&self, paused: bool) {
        let (from, to) = if paused { (RUNNING, PAUSED) } else { (PAUSED, RUNNING) };
        let _ = self.state.compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed);
    }

    /// Is it paused?
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.state.load(Ordering::Acquire) == PAUSED
    }

    /// No more claims, ever.
    pub fn stop(&self) {
        self.state.store(STOPPED, Ordering::Release);
    }

    /// Was it stopped?
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.state.load(Ordering::Acquire) == STOPPED
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(claim: Claim) -> (u64, u64) {
        match claim {
            Claim::Extent(extent) => (extent.start(), extent.end()),
            other => panic!("no extent but {other:?}"),
        }
    }

    #[test]
    fn chunks_cover_the_volume_once_and_in_order() {
        let plan = Plan::new(Some(10), 4);
        assert_eq!(extent(plan.claim()), (0, 4));
        assert_eq!(extent(plan.claim()), (4, 8));
        assert_eq!(extent(plan.claim()), (8, 10));
        assert_eq!(plan.claim(), Claim::Exhausted);
    }

    #[test]
    fn an_empty_volume_is_exhausted_at_once() {
        assert_eq!(Plan::new(Some(0), 4).claim(), Claim::Exhausted);
    }

    #[test]
    fn a_stream_ends_where_it_is_told_to() {
        let plan = Plan::new(None, 4);
        assert_eq!(extent(plan.claim()), (0, 4));
        assert_eq!(plan.end(), None);
        plan.end_at(3);
        assert_eq!(plan.claim(), Claim::Exhausted);
        plan.end_at(9);
        assert_eq!(plan.end(), Some(3), "an end only moves down");
    }

    #[test]
    fn a_barrier_holds_until_moved_and_leaves_no_gap() {
        let plan = Plan::new(Some(12), 4);
        plan.open_until(6);
        assert_eq!(extent(plan.claim()), (0, 4));
        assert_eq!(extent(plan.claim()), (4, 6));
        assert_eq!(plan.claim(), Claim::Blocked);
        plan.open_until(u64::MAX);
        assert_eq!(extent(plan.claim()), (6, 10));
        assert_eq!(extent(plan.claim()), (10, 12));
        assert_eq!(plan.claim(), Claim::Exhausted);
    }

    #[test]
    fn no_chunk_crosses_a_seam() {
        let plan = Plan::new(Some(12), 4);
        plan.cut_at(vec![3, 8]);
        assert_eq!(extent(plan.claim()), (0, 3));
        assert_eq!(extent(plan.claim()), (3, 7));
        assert_eq!(extent(plan.claim()), (7, 8));
        assert_eq!(extent(plan.claim()), (8, 12));
        assert_eq!(plan.claim(), Claim::Exhausted);
    }

    #[test]
    fn a_plan_begins_where_it_is_told_to() {
        let plan = Plan::new(Some(10), 4);
        plan.start_at(6);
        assert_eq!(extent(plan.claim()), (6, 10));
        assert_eq!(plan.claim(), Claim::Exhausted);
    }

    #[test]
    fn concurrent_claims_never_overlap() {
        let plan = Plan::new(Some(1_000_003), 64);
        let covered: u64 = std::thread::scope(|scope| {
            let claimers: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        let mut sum = 0;
                        while let Claim::Extent(extent) = plan.claim() {
                            sum += extent.len();
                        }
                        sum
                    })
                })
                .collect();
            claimers.into_iter().map(|claimer| claimer.join().expect("claimer")).sum()
        });
        assert_eq!(covered, 1_000_003);
    }

    #[test]
    fn a_rate_limit_spaces_chunks() {
        let gate = Gate::default();
        gate.charge(1 << 40);
        assert_eq!(gate.admit(), Admission::Open, "without a limit nothing is charged");
        gate.set_rate(Some(1000));
        assert_eq!(gate.admit(), Admission::Open);
        gate.charge(1_000_000);
        assert!(matches!(gate.admit(), Admission::NotBefore(_)));
        gate.set_rate(None);
        assert_eq!(gate.admit(), Admission::Open);
    }

    #[test]
    fn a_stopped_gate_stays_stopped() {
        let gate = Gate::default();
        gate.set_paused(true);
        assert_eq!(gate.admit(), Admission::Paused);
        gate.stop();
        gate.set_paused(false);
        assert_eq!(gate.admit(), Admission::Stopped);
    }
}
