//! A job's progress while somebody looks on: a bar on a terminal, a line now and then elsewhere, events for programs.
//!
//! All of it goes to standard error, except `--json` events, which are the output.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use proto::{Event, JobState, Progress};

use crate::amount;
use crate::reencrypt::render as reencrypt;
use crate::render::Output;
use crate::report::printable;

/// Between two lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);
/// What the daemon is asked for on a terminal, and elsewhere.
const BAR_INTERVAL_MS: u32 = 250;
const LINE_INTERVAL_MS: u32 = 1000;

/// Shows events of one job.
pub struct Display {
    kind: Kind,
    state: JobState,
    last: Progress,
}

enum Kind {
    Silent,
    Json,
    Bar(ProgressBar),
    Lines { next: Instant },
}

impl Display {
    /// The kind that fits where we run.
    pub fn new(json: bool, quiet: bool) -> Self {
        let kind = if json {
            Kind::Json
        } else if quiet {
            Kind::Silent
        } else if std::io::stderr().is_terminal() {
            Kind::Bar(ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr()))
        } else {
            Kind::Lines { next: Instant::now() + LINE_EVERY }
        };
        Self { kind, state: JobState::Queued, last: Progress::default() }
    }

    /// How often to ask for progress.
    pub fn interval_ms(&self) -> u32 {
        if matches!(self.kind, Kind::Bar(_)) { BAR_INTERVAL_MS } else { LINE_INTERVAL_MS }
    }

    /// Show news; `text` is the line as it came.
    pub fn event(&mut self, event: &Event, text: &str, output: &mut Output) {
        match event {
            Event::State { state, .. } => self.state = *state,
            Event::Progress { progress, .. } => self.last = progress.clone(),
            Event::Finished(_) => {}
        }
        match &mut self.kind {
            Kind::Silent => {}
            Kind::Json => output.line(text),
            Kind::Bar(bar) => {
                if let Some(total) = self.last.total_bytes {
                    bar.set_length(total);
                    bar.set_style(
                        ProgressStyle::with_template("{bar:30} {percent:>3}% {msg}")
                            .expect("a constant template"),
                    );
                } else {
                    bar.set_style(
                        ProgressStyle::with_template("{spinner} {msg}").expect("a constant template"),
                    );
                }
                bar.set_message(describe(&self.last, self.state));
                bar.set_position(self.last.done_bytes);
                bar.tick();
            }
            Kind::Lines { next } => {
                let now = Instant::now();
                if now >= *next && matches!(event, Event::Progress { .. }) {
                    *next = now + LINE_EVERY;
                    let percent =
                        percent(&self.last).map(|percent| format!("{percent}% ")).unwrap_or_default();
                    note(&format!("{percent}{}", describe(&self.last, self.state)));
                }
            }
        }
    }

    /// A sentence between progress, above the bar.
    pub fn note(&self, text: &str) {
        match &self.kind {
            Kind::Bar(bar) => bar.suspend(|| note(text)),
            _ => note(text),
        }
    }

    /// Take the bar away.
    pub fn end(self) {
        if let Kind::Bar(bar) = self.kind {
            bar.finish_and_clear();
        }
    }
}

/// A sentence on standard error. If nobody reads it, nobody misses it.
pub fn note(text: &str) {
    let _ = writeln!(std::io::stderr(), "cryptctl: {}", printable(text));
}

/// Whole per cent, rounded down: 100 means all of it.
pub fn percent(progress: &Progress) -> Option<u64> {
    let total = progress.total_bytes.filter(|total| *total > 0)?;
    u64::try_from(u128::from(progress.done_bytes.min(total)) * 100 / u128::from(total)).ok()
}

/// `1.20 GiB of 4.00 GiB, 950.00 MiB/s, 3.0 s left, waits for write`
pub fn describe(progress: &Progress, state: JobState) -> String {
    let mut text = amount::bytes(progress.done_bytes);
    if let Some(total) = progress.total_bytes {
        text.push_str(&format!(" of {}", amount::bytes(total)));
    }
    match state {
        JobState::Paused => text.push_str(", paused"),
        JobState::Queued => text.push_str(", waits for other jobs"),
        JobState::Flushing => text.push_str(", making it durable"),
        JobState::Running if progress.unlocking => text.push_str(", hashing the passphrase"),
        JobState::Running => {
            if let Some(phase) = progress.phase {
                text.push_str(&format!(", {}", reencrypt::phase(phase)));
            }
            text.push_str(&format!(", {}", amount::rate(progress.bytes_per_second)));
            if let Some(limit) = progress.throttle_bytes_per_second {
                text.push_str(&format!(" (limit {})", amount::rate(amount::real(limit))));
            }
            if let Some(eta) = progress.eta_seconds {
                text.push_str(&format!(", {} left", amount::seconds(eta)));
            }
            if let Some(stage) = progress.bottleneck {
                text.push_str(&format!(", bottleneck {}", stage.name()));
            }
        }
        JobState::Done | JobState::Failed | JobState::Cancelled => {}
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::Stage;

    fn progress() -> Progress {
        Progress {
            done_bytes: 1 << 30,
            total_bytes: Some(4 << 30),
            bytes_per_second: 1e9,
            eta_seconds: Some(3.2),
            bottleneck: Some(Stage::Write),
            ..Progress::default()
        }
    }

    #[test]
    fn progress_says_how_far_how_fast_how_long_and_why() {
        assert_eq!(
            describe(&progress(), JobState::Running),
            "1.00 GiB of 4.00 GiB, 953.67 MiB/s, 3.2 s left, bottleneck write"
        );
        assert_eq!(describe(&progress(), JobState::Paused), "1.00 GiB of 4.00 GiB, paused");
        let stream =
            Progress { total_bytes: None, throttle_bytes_per_second: Some(1 << 20), ..Progress::default() };
        assert_eq!(describe(&stream, JobState::Running), "0 B, 0 B/s (limit 1.00 MiB/s)");
    }

    #[test]
    fn hashing_is_not_shown_as_a_rate_of_nothing() {
        let hashing = Progress { done_bytes: 0, unlocking: true, unlock_seconds: 1.0, ..progress() };
        assert_eq!(describe(&hashing, JobState::Running), "0 B of 4.00 GiB, hashing the passphrase");
    }

    #[test]
    fn a_reencryption_says_what_it_is_at() {
        use proto::reencrypt::Phase;
        for (phase, words) in [
            (Phase::Recovering, "recovering an interrupted step"),
            (Phase::Rewriting, "re-encrypting"),
            (Phase::Verifying, "verifying"),
        ] {
            let text = describe(&Progress { phase: Some(phase), ..progress() }, JobState::Running);
            assert_eq!(
                text,
                format!("1.00 GiB of 4.00 GiB, {words}, 953.67 MiB/s, 3.2 s left, bottleneck write")
            );
            let paused = describe(&Progress { phase: Some(phase), ..progress() }, JobState::Paused);
            assert_eq!(paused, "1.00 GiB of 4.00 GiB, paused");
        }
    }

    #[test]
    fn a_hundred_per_cent_means_all() {
        let almost = Progress { done_bytes: (4 << 30) - 1, ..progress() };
        assert_eq!(percent(&almost), Some(99));
        assert_eq!(percent(&Progress { total_bytes: Some(0), ..progress() }), None);
        assert_eq!(percent(&Progress { total_bytes: None, ..progress() }), None);
    }
}
