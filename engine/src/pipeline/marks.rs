//! How far a transfer has come without a gap: chunks are finished out of order, by workers that know nothing of each other.
//!
//! Each worker publishes one number: before it every chunk that it ever claimed is finished. What has not been claimed at
//! all begins at the plan's next chunk. The watermark is the smallest of these: no lock, and nothing but a store or two per
//! chunk on the worker's own cache line.
//!
//! Why that is right although the numbers are read one after the other: a worker lowers its own to the plan's next chunk
//! *before* it claims, and the claim is an atomic exchange on that counter. Who reads the counter first and sees a claim,
//! sees what its worker published before it.

use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam::utils::CachePadded;

use crate::pipeline::plan::Plan;

/// Nothing is unfinished here.
const IDLE: u64 = u64::MAX;

/// What all workers of one transfer have published.
#[derive(Debug)]
pub struct Marks {
    workers: Box<[CachePadded<AtomicU64>]>,
}

impl Marks {
    /// For so many workers.
    #[must_use]
    pub fn new(workers: usize) -> Self {
        Self { workers: (0..workers).map(|_| CachePadded::new(AtomicU64::new(IDLE))).collect() }
    }

    /// Every byte of the plan before this was written to the sink (and has yet to be made durable).
    #[must_use]
    pub fn watermark(&self, plan: &Plan) -> u64 {
        let unclaimed = plan.next();
        let unfinished = self.workers.iter().map(|worker| worker.load(Ordering::Acquire)).min();
        unclaimed.min(unfinished.unwrap_or(IDLE))
    }
}

/// One worker's chunks that are not finished. One that failed stays: the watermark never passes it.
#[derive(Debug, Default)]
pub struct Unfinished {
    starts: Vec<u64>,
}

impl Unfinished {
    /// Room for so many chunks, so that none is made on the way.
    #[must_use]
    pub fn with_capacity(chunks: usize) -> Self {
        Self { starts: Vec::with_capacity(chunks) }
    }

    fn publish(&self, marks: &Marks, worker: usize, most: u64) {
        let lowest = self.starts.iter().copied().min().unwrap_or(IDLE);
        marks.workers[worker].store(lowest.min(most), Ordering::Release);
    }

    /// A claim is about to be tried.
    pub fn before_claim(&self, marks: &Marks, worker: usize, plan: &Plan) {
        self.publish(marks, worker, plan.next());
    }

    /// The claim was granted for a chunk from `start`, or (`None`) refused.
    pub fn claimed(&mut self, marks: &Marks, worker: usize, start: Option<u64>) {
        self.starts.extend(start);
        self.publish(marks, worker, IDLE);
    }

    /// The chunk from `start` is where it belongs.
    pub fn finished(&mut self, marks: &Marks, worker: usize, start: u64) {
        if let Some(at) = self.starts.iter().position(|other| *other == start) {
            self.starts.swap_remove(at);
        }
        self.publish(marks, worker, IDLE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::plan::Claim;

    fn claim(plan: &Plan, marks: &Marks, worker: usize, mine: &mut Unfinished) -> Option<(u64, u64)> {
        mine.before_claim(marks, worker, plan);
        let extent = match plan.claim() {
            Claim::Extent(extent) => Some((extent.start(), extent.end())),
            _ => None,
        };
        mine.claimed(marks, worker, extent.map(|(start, _)| start));
        extent
    }

    #[test]
    fn the_watermark_stays_before_the_first_chunk_that_is_not_finished() {
        let plan = Plan::new(Some(100), 10);
        let marks = Marks::new(2);
        let (mut one, mut two) = (Unfinished::default(), Unfinished::default());
        assert_eq!(marks.watermark(&plan), 0);
        for _ in 0..2 {
            let _ = claim(&plan, &marks, 0, &mut one);
            let _ = claim(&plan, &marks, 1, &mut two);
        }
        assert_eq!(marks.watermark(&plan), 0);
        two.finished(&marks, 1, 10);
        assert_eq!(marks.watermark(&plan), 0, "the chunk at 0 is open");
        one.finished(&marks, 0, 0);
        assert_eq!(marks.watermark(&plan), 20);
        two.finished(&marks, 1, 30);
        assert_eq!(marks.watermark(&plan), 20, "the chunk at 20 failed, for all we know");
        one.finished(&marks, 0, 20);
        assert_eq!(marks.watermark(&plan), 40);
    }

    #[test]
    fn a_refused_claim_holds_nothing_back_and_the_end_is_the_end() {
        let plan = Plan::new(Some(15), 10);
        let marks = Marks::new(1);
        let mut mine = Unfinished::default();
        while let Some((start, _)) = claim(&plan, &marks, 0, &mut mine) {
            mine.finished(&marks, 0, start);
        }
        assert_eq!(marks.watermark(&plan), 15);
    }

    #[test]
    fn at_every_moment_everything_before_the_watermark_is_finished() {
        use std::sync::atomic::AtomicBool;
        const CHUNKS: u64 = 200_000;
        let plan = Plan::new(Some(CHUNKS), 1);
        let marks = Marks::new(3);
        let done: Vec<AtomicBool> = (0..CHUNKS).map(|_| AtomicBool::new(false)).collect();
        std::thread::scope(|scope| {
            for worker in 0..3 {
                let (plan, marks, done) = (&plan, &marks, &done);
                scope.spawn(move || {
                    let mut mine = Unfinished::with_capacity(4);
                    let mut open = Vec::new();
                    loop {
                        let claimed = claim(plan, marks, worker, &mut mine);
                        open.extend(claimed.map(|(start, _)| start));
                        // Out of order: the newest first, and now and then all.
                        while open.len() > 3 || (claimed.is_none() && !open.is_empty()) {
                            let start = open.pop().expect("an open chunk");
                            done[usize::try_from(start).expect("small")].store(true, Ordering::Release);
                            mine.finished(marks, worker, start);
                            if start % 7 == 0 {
                                open.reverse();
                            }
                        }
                        if claimed.is_none() {
                            break;
                        }
                    }
                });
            }
            let mut seen = 0;
            while seen < CHUNKS {
                let mark = marks.watermark(&plan);
                assert!(mark >= seen, "it went back from {seen} to {mark}");
                for at in seen..mark {
                    assert!(done[usize::try_from(at).expect("small")].load(Ordering::Acquire), "{at}");
                }
                seen = mark;
            }
        });
    }
}
