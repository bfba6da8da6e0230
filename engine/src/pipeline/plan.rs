//! Which extents a transfer covers, in which order they may be claimed, and when.
//!
//! A [`Plan`] hands out chunks in ascending order by one atomic add, to any number of workers. It ends where the volume
//! ends, or where a stream turned out to end. A barrier ([`Plan::open_until`]) keeps chunks beyond it unclaimed until
//! whoever set it knows that everything before is durable: crash safety lives here, not in the worker loop.
//!
//! A plan may go backward ([`Plan::backward`]): then the chunks come from the volume's end. Barriers, where a plan starts and where it
//! ends are said in *order*: bytes from where the plan would begin, whichever way it goes. A transfer that rewrites its own
//! source knows two more barriers: what may be put into the journal ([`Plan::journal`]) and what may be overwritten
//! ([`Plan::write_until`]).
//!
//! A plan may cover some extents of a volume and not others ([`Plan::only`]): what lies between is passed over, and no chunk
//! reaches into it. Where it ends and where it stands is said as of the whole volume.
//!
//! A [`Gate`] holds what a user may change while the transfer runs: pause, stop, and the rate limit.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::pipeline::transfer::UNIT_BYTES_MAX;
use crate::units::Extent;

/// The extents of one transfer.
#[derive(Debug)]
pub struct Plan {
    chunk_bytes: u64,
    /// The volume's size, if the plan goes backward from there.
    mirror: Option<u64>,
    /// What it covers, ascending and apart; absent: everything.
    only: Option<Box<[Extent]>>,
    next: AtomicU64,
    /// One past the last byte there is; `u64::MAX` while a stream's end is unknown.
    end: AtomicU64,
    /// One past the last byte that may be claimed now.
    open: AtomicU64,
    /// Where `open` stood before: no chunk crosses it.
    opened: AtomicU64,
    /// What may be claimed is claimed whatever the gate says of pause and rate.
    urgent: AtomicBool,
    /// One past the last byte that may be overwritten now.
    write: AtomicU64,
    /// The hotzone whose old bytes belong in the journal now.
    journal: Mutex<Option<Extent>>,
    /// Plaintext offsets where segments meet, ascending: no chunk crosses one. Most plans have none.
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
            mirror: None,
            only: None,
            next: AtomicU64::new(0),
            end: AtomicU64::new(total.unwrap_or(u64::MAX)),
            open: AtomicU64::new(u64::MAX),
            opened: AtomicU64::new(u64::MAX),
            urgent: AtomicBool::new(false),
            write: AtomicU64::new(u64::MAX),
            journal: Mutex::new(None),
            seams: OnceLock::new(),
        }
    }

    /// All of `0..total`, its last chunk first.
    #[must_use]
    pub fn backward(total: u64, chunk_bytes: u32) -> Self {
        Self { mirror: Some(total), ..Self::new(Some(total), chunk_bytes) }
    }

    /// These extents of `0..total`, which ascend and are apart, and nothing else.
    ///
    /// # Panics
    /// If they overlap, touch or reach beyond `total`.
    #[must_use]
    pub fn only(extents: Vec<Extent>, total: u64, chunk_bytes: u32) -> Self {
        assert!(
            extents.windows(2).all(|pair| pair[0].end() < pair[1].start()),
            "extents ascend, and are apart"
        );
        assert!(extents.last().is_none_or(|last| last.end() <= total), "extents lie in the volume");
        Self { only: Some(extents.into()), ..Self::new(Some(total), chunk_bytes) }
    }

    /// Bytes it covers, if it knows its end.
    #[must_use]
    pub fn covered_bytes(&self) -> Option<u64> {
        match &self.only {
            Some(extents) => Some(extents.iter().map(|extent| extent.len()).sum()),
            None => self.end(),
        }
    }

    /// Where the next covered byte at or behind `start` is, and where its extent ends. All in order.
    fn run_from(&self, start: u64) -> Option<(u64, u64)> {
        let Some(extents) = &self.only else { return Some((start, u64::MAX)) };
        let at = extents.partition_point(|extent| extent.end() <= start);
        extents.get(at).map(|extent| (extent.start().max(start), extent.end()))
    }

    /// What comes before `order` is done already. To be said before workers begin.
    pub fn start_at(&self, order: u64) {
        self.next.store(order, Ordering::Release);
    }

    /// No chunk crosses one of these plaintext offsets, which ascend. To be said once, before the first claim.
    ///
    /// # Panics
    /// If it was said before.
    pub fn cut_at(&self, seams: Vec<u64>) {
        assert!(self.seams.set(seams).is_ok(), "a plan is cut once");
    }

    /// The first seam behind `start`, all in order.
    fn seam_after(&self, start: u64) -> u64 {
        let seams = self.seams.get().map_or(&[][..], Vec::as_slice);
        match self.mirror {
            None => seams.iter().copied().find(|seam| *seam > start).unwrap_or(u64::MAX),
            Some(total) => {
                let before = seams.iter().rev().copied().find(|seam| *seam < total.saturating_sub(start));
                before.map_or(u64::MAX, |seam| total - seam)
            }
        }
    }

    /// The plaintext of a run of order.
    fn extent(&self, start: u64, stop: u64) -> Extent {
        let (start, stop) = match self.mirror {
            None => (start, stop),
            Some(total) => (total - stop, total - start),
        };
        Extent::new(start, stop).expect("a run has bytes")
    }

    /// Where a chunk stands in the plan: the order of its first byte claimed, and one past its last.
    #[must_use]
    pub fn order_of(&self, extent: Extent) -> (u64, u64) {
        match self.mirror {
            None => (extent.start(), extent.end()),
            Some(total) => (total - extent.end(), total - extent.start()),
        }
    }

    /// Where a run of at most `bytes` from `start` should end, all in order: not behind the plan's end, and at a multiple of
    /// the largest data unit although the plan began, or the volume ends, elsewhere. Hotzones and chunks are cut so.
    #[must_use]
    pub fn cut(&self, start: u64, bytes: u64) -> u64 {
        self.cut_before(self.end.load(Ordering::Acquire), start, bytes)
    }

    fn cut_before(&self, end: u64, start: u64, bytes: u64) -> u64 {
        let stop = start.saturating_add(bytes);
        if stop >= end {
            return end;
        }
        let unit = u64::from(UNIT_BYTES_MAX);
        let beyond = self.mirror.map_or(stop % unit, |total| (unit - (total - stop) % unit) % unit);
        if beyond < bytes { stop - beyond } else { stop }
    }

    /// Bytes of one chunk; only the last of the plan may be shorter.
    #[must_use]
    pub fn chunk_bytes(&self) -> u64 {
        self.chunk_bytes
    }

    /// Where the next chunk would begin: everything before was claimed.
    #[must_use]
    pub fn next(&self) -> u64 {
        self.next.load(Ordering::Acquire)
    }

    /// Claim the next chunk.
    pub fn claim(&self) -> Claim {
        // A compare-and-swap and not an add, so that a refused claim leaves no gap behind a barrier or an end.
        let mut next = self.next.load(Ordering::Relaxed);
        loop {
            let end = self.end.load(Ordering::Acquire);
            let (start, until) = self.run_from(next).unwrap_or((end, end));
            if start >= end {
                // What is left is not covered: done with, for who asks how far this has come.
                match self.next.compare_exchange_weak(
                    next,
                    next.max(end),
                    Ordering::AcqRel,
                    Ordering::Relaxed,
                ) {
                    Ok(_) => return Claim::Exhausted,
                    Err(moved) => next = moved,
                }
                continue;
            }
            let open = self.open.load(Ordering::Acquire);
            if start >= open {
                return Claim::Blocked;
            }
            let whole = self.cut_before(end, start, self.chunk_bytes);
            let mut stop = whole.min(open).min(until).min(self.seam_after(start));
            // After `open`: who sees a barrier that has moved sees where it stood.
            let opened = self.opened.load(Ordering::Acquire);
            if start < opened {
                stop = stop.min(opened);
            }
            match self.next.compare_exchange_weak(next, stop, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return Claim::Extent(self.extent(start, stop)),
                Err(moved) => next = moved,
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

    /// Move the barrier: nothing at or beyond `order` is handed out until it moves again. No chunk crosses the place where it
    /// stood before, nor those before that if everything up to them had been claimed.
    pub fn open_until(&self, order: u64) {
        let opened = self.open.load(Ordering::Relaxed);
        if opened != order {
            self.opened.store(opened, Ordering::Release);
            self.open.store(order, Ordering::Release);
        }
    }

    /// From now on what the barrier lets pass is claimed without delay: others wait for it. Whoever moves the barrier keeps to pause and rate. To
    /// be said before workers begin.
    pub fn be_urgent(&self) {
        self.urgent.store(true, Ordering::Release);
    }

    /// See [`Plan::be_urgent`].
    #[must_use]
    pub fn is_urgent(&self) -> bool {
        self.urgent.load(Ordering::Acquire)
    }

    /// Move the write barrier of a transfer that rewrites its source: chunks that end at or before `order` may be overwritten.
    /// Open to the end unless it is moved.
    pub fn write_until(&self, order: u64) {
        self.write.store(order, Ordering::Release);
    }

    /// May this chunk be overwritten?
    #[must_use]
    pub fn may_write(&self, extent: Extent) -> bool {
        self.order_of(extent).1 <= self.write.load(Ordering::Acquire)
    }

    /// The old bytes of this hotzone (an extent of plaintext, whichever way the plan goes) may be written to the journal; those
    /// of another no longer. Chunks do not cross its ends.
    pub fn journal(&self, hot: Extent) {
        *self.journalled() = Some(hot);
    }

    /// Where in the journal this chunk belongs, counted from the area's beginning; `None`: nowhere yet.
    #[must_use]
    pub fn journal_place(&self, extent: Extent) -> Option<u64> {
        let hot = (*self.journalled())?;
        (hot.start() <= extent.start() && extent.end() <= hot.end()).then(|| extent.start() - hot.start())
    }

    /// Locked for a few loads, and only by transfers with a journal.
    fn journalled(&self) -> MutexGuard<'_, Option<Extent>> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
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

    fn extents(list: &[(u64, u64)]) -> Vec<Extent> {
        list.iter().map(|&(start, end)| Extent::new(start, end).expect("not empty")).collect()
    }

    #[test]
    fn what_a_plan_does_not_cover_is_passed_over() {
        let plan = Plan::only(extents(&[(4, 6), (10, 20), (30, 31)]), 40, 4);
        assert_eq!(plan.covered_bytes(), Some(13));
        assert_eq!(all(&plan), [(4, 6), (10, 14), (14, 18), (18, 20), (30, 31)]);
        assert_eq!((plan.next(), plan.end()), (40, Some(40)), "all of it is done with");
        assert!(plan.is_exhausted());
        assert_eq!(plan.claim(), Claim::Exhausted);
    }

    #[test]
    fn a_plan_that_covers_nothing_is_over_at_once() {
        let plan = Plan::only(Vec::new(), 40, 4);
        assert_eq!((plan.claim(), plan.covered_bytes()), (Claim::Exhausted, Some(0)));
        assert!(plan.is_exhausted());
    }

    #[test]
    fn seams_barriers_and_ends_hold_within_what_is_covered() {
        let plan = Plan::only(extents(&[(4, 12), (20, 28)]), 40, 16);
        plan.cut_at(vec![8, 16]);
        plan.open_until(22);
        assert_eq!(all(&plan), [(4, 8), (8, 12), (20, 22)]);
        assert_eq!(plan.claim(), Claim::Blocked);
        plan.end_at(25);
        plan.open_until(u64::MAX);
        assert_eq!(all(&plan), [(22, 25)]);
        assert_eq!(plan.claim(), Claim::Exhausted);
    }

    #[test]
    fn chunks_of_a_few_extents_end_on_data_units() {
        let plan = Plan::only(extents(&[(4096, 20480), (40960, 50000)]), 1 << 20, 8192);
        assert_eq!(all(&plan), [(4096, 12288), (12288, 20480), (40960, 49152), (49152, 50000)]);
    }

    #[test]
    #[should_panic(expected = "apart")]
    fn extents_that_touch_are_a_mistake() {
        let _ = Plan::only(extents(&[(0, 4), (4, 8)]), 10, 4);
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

    /// All there is to claim now, in order.
    fn all(plan: &Plan) -> Vec<(u64, u64)> {
        let claims = std::iter::from_fn(|| match plan.claim() {
            Claim::Extent(extent) => Some((extent.start(), extent.end())),
            _ => None,
        });
        claims.collect()
    }

    const K: u64 = 1024;

    #[test]
    fn a_backward_plan_comes_from_the_end_and_is_cut_at_whole_blocks() {
        let plan = Plan::backward(21 * K, 8192);
        assert_eq!(all(&plan), [(16 * K, 21 * K), (8 * K, 16 * K), (0, 8 * K)]);
        assert_eq!(plan.claim(), Claim::Exhausted);
        let plan = Plan::backward(24 * K, 8192);
        plan.cut_at(vec![12 * K]);
        plan.start_at(4 * K);
        assert_eq!(all(&plan), [(12 * K, 20 * K), (4 * K, 12 * K), (0, 4 * K)]);
    }

    #[test]
    fn a_plan_begins_where_it_is_told_to() {
        let plan = Plan::new(Some(24 * K), 8192);
        plan.start_at(5 * K);
        assert_eq!(all(&plan), [(5 * K, 12 * K), (12 * K, 20 * K), (20 * K, 24 * K)]);
        let plan = Plan::new(Some(24 * K), 8192);
        plan.start_at(24 * K);
        assert!(plan.is_exhausted());
    }

    #[test]
    fn no_chunk_crosses_the_place_where_a_barrier_stood() {
        for backward in [false, true] {
            let plan = if backward { Plan::backward(64 * K, 8192) } else { Plan::new(Some(64 * K), 8192) };
            plan.open_until(12 * K);
            assert!(matches!(plan.claim(), Claim::Extent(_)));
            // Moved while the rest of the first hotzone is still to be claimed; twice to the same place is once.
            plan.open_until(20 * K);
            plan.open_until(20 * K);
            let orders: Vec<_> = std::iter::from_fn(|| match plan.claim() {
                Claim::Extent(extent) => Some(plan.order_of(extent)),
                _ => None,
            })
            .collect();
            assert_eq!(orders, [(8 * K, 12 * K), (12 * K, 20 * K)], "{backward}");
        }
    }

    #[test]
    fn what_may_be_written_and_where_the_journal_takes_it() {
        let at = |start, end| Extent::new(start, end).expect("not empty");
        let plan = Plan::backward(64 * K, 8192);
        assert!(plan.may_write(at(0, 8 * K)), "without a barrier everything may");
        plan.write_until(16 * K);
        assert!(plan.may_write(at(48 * K, 56 * K)) && !plan.may_write(at(40 * K, 48 * K)));
        assert_eq!(plan.journal_place(at(48 * K, 56 * K)), None);
        plan.journal(at(40 * K, 64 * K));
        assert_eq!(plan.journal_place(at(48 * K, 56 * K)), Some(8 * K), "as it lies, not as it is claimed");
        assert_eq!(plan.journal_place(at(32 * K, 48 * K)), None);
    }

    #[test]
    fn hotzones_are_cut_like_chunks() {
        let plan = Plan::new(Some(100 * K), 8192);
        assert_eq!((plan.cut(0, 30 * K), plan.cut(512, 30 * K)), (28 * K, 28 * K));
        assert_eq!((plan.cut(90 * K, 30 * K), plan.cut(3 * K, 512)), (100 * K, 3 * K + 512));
        let plan = Plan::backward(100 * K + 512, 8192);
        assert_eq!(plan.cut(0, 30 * K), 28 * K + 512);
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
