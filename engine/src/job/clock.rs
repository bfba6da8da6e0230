//! A job's time: how long it ran, how fast it is now, how long it will take.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How far back "now" reaches when a rate is told.
const WINDOW: Duration = Duration::from_secs(4);

/// Counts only the time a job runs: not while queued or paused.
#[derive(Debug, Default)]
pub struct Clock {
    before: Duration,
    since: Option<Instant>,
    /// Moments and the bytes done by then, oldest first, within the window.
    samples: VecDeque<(Instant, u64)>,
}

impl Clock {
    /// Start or go on. No effect while running.
    pub fn start(&mut self, now: Instant) {
        if self.since.is_none() {
            self.since = Some(now);
            self.samples.clear();
        }
    }

    /// Stop counting. No effect while stopped.
    pub fn stop(&mut self, now: Instant) {
        if let Some(since) = self.since.take() {
            self.before += now.saturating_duration_since(since);
        }
    }

    /// What ran so far was something else: begin anew. Returns how long that was.
    pub fn restart(&mut self, now: Instant) -> Duration {
        let elapsed = self.elapsed(now);
        self.before = Duration::ZERO;
        self.since = self.since.map(|_| now);
        self.samples.clear();
        elapsed
    }

    /// What was sampled so far counts something else.
    pub fn forget_samples(&mut self) {
        self.samples.clear();
    }

    /// Time spent running.
    #[must_use]
    pub fn elapsed(&self, now: Instant) -> Duration {
        self.before + self.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }

    /// Note how many bytes are done.
    pub fn sample(&mut self, now: Instant, done_bytes: u64) {
        self.samples.push_back((now, done_bytes));
        while self.samples.len() > 2
            && self.samples.front().is_some_and(|(then, _)| now.saturating_duration_since(*then) > WINDOW)
        {
            self.samples.pop_front();
        }
    }

    /// Bytes per second over the last few seconds; over all the running time when that is shorter or over.
    #[must_use]
    pub fn rate(&self, now: Instant, done_bytes: u64) -> f64 {
        if self.since.is_some()
            && let Some((then, before)) = self.samples.front()
        {
            let seconds = now.saturating_duration_since(*then).as_secs_f64();
            if seconds > 0.2 {
                return per_second(done_bytes.saturating_sub(*before), seconds);
            }
        }
        per_second(done_bytes, self.elapsed(now).as_secs_f64())
    }
}

/// A rate for people; 0 for no time at all.
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "a rate for people")]
pub fn per_second(bytes: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { bytes as f64 / seconds } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_do_not_count() {
        let start = Instant::now();
        let second = Duration::from_secs(1);
        let mut clock = Clock::default();
        clock.start(start);
        clock.stop(start + second);
        clock.start(start + 5 * second);
        assert_eq!(clock.elapsed(start + 7 * second), 3 * second);
    }

    #[test]
    fn the_rate_looks_at_the_last_seconds() {
        let start = Instant::now();
        let second = Duration::from_secs(1);
        let mut clock = Clock::default();
        clock.start(start);
        for at in 0..20_u32 {
            clock.sample(start + at * second, u64::from(at.min(10)) * 100);
        }
        assert!(clock.rate(start + 19 * second, 1000) < 1.0, "nothing moved for nine seconds");
    }
}
