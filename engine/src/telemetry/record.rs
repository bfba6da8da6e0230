//! Counters and latency histograms of one transfer on one worker.
//!
//! A worker owns its [`StageRecord`] and hands out copies; what others may watch while it runs are the
//! single-writer atomics of [`Counters`]. Nothing here is shared between two writers, so nothing here costs a
//! contended cache line on the fast path.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use hdrhistogram::Histogram;
use proto::{Stage, StageStats};

/// Smallest latency told apart, nanoseconds.
const LATENCY_NS_MIN: u64 = 100;
/// Largest latency recorded as itself; above it counts as this: one hour, nanoseconds.
const LATENCY_NS_MAX: u64 = 3_600_000_000_000;
/// Decimal digits a histogram keeps: values are right within 1 %.
const DIGITS: u8 = 2;

/// What others may read while a worker runs. One worker writes each instance.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Counters {
    done_bytes: AtomicU64,
    hole_bytes: AtomicU64,
    sparse_bytes: AtomicU64,
    stage_ns: [AtomicU64; Stage::ALL.len()],
}

/// A sum of [`Counters`] at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Bytes of source processed to the end.
    pub done_bytes: u64,
    /// Bytes of source that were holes and cost no read.
    pub hole_bytes: u64,
    /// Bytes of sink left as holes.
    pub sparse_bytes: u64,
    /// Chunk time per stage, nanoseconds.
    pub stage_ns: [u64; Stage::ALL.len()],
}

fn add(counter: &AtomicU64, amount: u64) {
    // Single writer: a plain load and store, no locked instruction.
    counter.store(counter.load(Relaxed).wrapping_add(amount), Relaxed);
}

impl Counters {
    /// A chunk is finished.
    pub fn add_done(&self, bytes: u64) {
        add(&self.done_bytes, bytes);
    }

    /// Source bytes were a hole.
    pub fn add_hole(&self, bytes: u64) {
        add(&self.hole_bytes, bytes);
    }

    /// Sink bytes were left a hole.
    pub fn add_sparse(&self, bytes: u64) {
        add(&self.sparse_bytes, bytes);
    }

    /// Add this instance to a sum.
    pub fn add_to(&self, totals: &mut Totals) {
        totals.done_bytes += self.done_bytes.load(Relaxed);
        totals.hole_bytes += self.hole_bytes.load(Relaxed);
        totals.sparse_bytes += self.sparse_bytes.load(Relaxed);
        for (sum, stage) in totals.stage_ns.iter_mut().zip(&self.stage_ns) {
            *sum += stage.load(Relaxed);
        }
    }
}

impl Totals {
    /// The stage that limits the rate: `crypt` if it kept the cores busy most of `core_seconds` (running time times
    /// workers), else the one where chunks spend most of their time. A busy core lets completed reads and writes wait, so
    /// their times alone would name the device.
    #[must_use]
    pub fn bottleneck(&self, core_seconds: f64) -> Option<Stage> {
        bottleneck(&self.stage_ns, core_seconds)
    }
}

/// Share of the cores' time from which on crypt is what limits.
const CRYPT_BOUND: f64 = 0.7;

#[expect(clippy::cast_precision_loss, reason = "a share for people")]
fn bottleneck(stage_ns: &[u64; Stage::ALL.len()], core_seconds: f64) -> Option<Stage> {
    let crypt_seconds = stage_ns[index(Stage::Crypt)] as f64 / 1e9;
    if core_seconds > 0.0 && crypt_seconds / core_seconds > CRYPT_BOUND {
        return Some(Stage::Crypt);
    }
    let (at, &ns) = stage_ns.iter().enumerate().max_by_key(|(_, ns)| **ns)?;
    (ns > 0).then(|| Stage::ALL[at])
}

/// Latency histograms of the five stages.
#[derive(Debug, Clone)]
pub struct StageRecord {
    histograms: [Histogram<u64>; Stage::ALL.len()],
    bytes: [u64; Stage::ALL.len()],
    ns: [u64; Stage::ALL.len()],
}

fn index(stage: Stage) -> usize {
    match stage {
        Stage::Read => 0,
        Stage::Queue => 1,
        Stage::Crypt => 2,
        Stage::Write => 3,
        Stage::Flush => 4,
    }
}

impl Default for StageRecord {
    fn default() -> Self {
        let empty = || {
            Histogram::new_with_bounds(LATENCY_NS_MIN, LATENCY_NS_MAX, DIGITS)
                .expect("the bounds are constants in range")
        };
        Self { histograms: std::array::from_fn(|_| empty()), bytes: [0; 5], ns: [0; 5] }
    }
}

impl StageRecord {
    /// A chunk of `bytes` spent `time` in `stage`.
    pub fn record(&mut self, counters: &Counters, stage: Stage, time: Duration, bytes: u64) {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(LATENCY_NS_MAX);
        let at = index(stage);
        self.histograms[at].saturating_record(ns.max(1));
        self.bytes[at] += bytes;
        self.ns[at] += ns;
        add(&counters.stage_ns[at], ns);
    }

    /// Add another worker's record.
    pub fn merge(&mut self, other: &Self) {
        for at in 0..Stage::ALL.len() {
            self.histograms[at].add(&other.histograms[at]).expect("all histograms have the same bounds");
            self.bytes[at] += other.bytes[at];
            self.ns[at] += other.ns[at];
        }
    }

    /// See [`Totals::bottleneck`].
    #[must_use]
    pub fn bottleneck(&self, core_seconds: f64) -> Option<Stage> {
        bottleneck(&self.ns, core_seconds)
    }

    /// The stages that were passed, as the wire shows them.
    #[must_use]
    pub fn to_stats(&self) -> Vec<StageStats> {
        let all: u64 = self.ns.iter().sum();
        Stage::ALL
            .iter()
            .map(|&stage| (stage, index(stage)))
            .filter(|&(_, at)| !self.histograms[at].is_empty())
            .map(|(stage, at)| {
                let histogram = &self.histograms[at];
                StageStats {
                    stage,
                    count: histogram.len(),
                    bytes: self.bytes[at],
                    share: ratio(self.ns[at], all),
                    min_ns: histogram.min(),
                    p50_ns: histogram.value_at_quantile(0.5),
                    p90_ns: histogram.value_at_quantile(0.9),
                    p99_ns: histogram.value_at_quantile(0.99),
                    p999_ns: histogram.value_at_quantile(0.999),
                    max_ns: histogram.max(),
                }
            })
            .collect()
    }
}

/// `part / whole` as a float; 0 when there is no whole. Both stay far below 2^53 in practice; beyond, the ratio is rounded.
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "a ratio for people")]
pub fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bottleneck_is_the_stage_with_most_time() {
        let counters = Counters::default();
        let mut record = StageRecord::default();
        record.record(&counters, Stage::Read, Duration::from_micros(10), 4096);
        record.record(&counters, Stage::Write, Duration::from_micros(30), 4096);
        let mut totals = Totals::default();
        assert_eq!(totals.bottleneck(1.0), None);
        counters.add_to(&mut totals);
        assert_eq!(totals.bottleneck(1.0), Some(Stage::Write));
    }

    #[test]
    fn busy_cores_name_crypt_whatever_waits_for_them() {
        let counters = Counters::default();
        let mut record = StageRecord::default();
        record.record(&counters, Stage::Read, Duration::from_millis(40), 4096);
        record.record(&counters, Stage::Crypt, Duration::from_millis(10), 4096);
        assert_eq!(record.bottleneck(0.012), Some(Stage::Crypt));
        assert_eq!(record.bottleneck(0.040), Some(Stage::Read));
    }

    #[test]
    fn merged_records_count_both_sides() {
        let counters = Counters::default();
        let mut one = StageRecord::default();
        let mut two = StageRecord::default();
        one.record(&counters, Stage::Crypt, Duration::from_micros(50), 100);
        two.record(&counters, Stage::Crypt, Duration::from_micros(150), 200);
        one.merge(&two);
        let stats = one.to_stats();
        assert_eq!(stats.len(), 1);
        assert_eq!((stats[0].count, stats[0].bytes), (2, 300));
        assert!((stats[0].share - 1.0).abs() < 1e-9);
        assert!(stats[0].max_ns >= 148_000 && stats[0].max_ns <= 152_000, "{}", stats[0].max_ns);
    }
}
