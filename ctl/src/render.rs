//! Answers as people read them: aligned tables, one summary line; and where output goes.
//!
//! Pure functions from wire objects to text, so that what a user sees is tested without a daemon.

use std::io::{self, IsTerminal, Write};

use proto::{Action, BenchRow, JobInfo, JobState, StageStats, Stats, Status};

use crate::amount;
use crate::progress::{describe, percent};
use crate::reencrypt::render as reencrypt;
use crate::report::{Error, Result, printable};

/// Where results go. A reader that has gone is no error: `cryptctl job list | head` ends in peace. Any other failure to write
/// is kept for [`Output::end`]: a dump that is not there must not look like one that is empty.
///
/// Standard output that was closed before we began cannot be told from /dev/null, which Rust opens in its place.
pub struct Output {
    to_stderr: bool,
    failed: Option<io::Error>,
}

impl Output {
    /// Standard output, or standard error when standard output carries a volume.
    pub fn new(to_stderr: bool) -> Self {
        Self { to_stderr, failed: None }
    }

    /// Colour is for terminals, and only where it is wanted (no-color.org).
    pub fn colour(&self) -> bool {
        let terminal = if self.to_stderr { io::stderr().is_terminal() } else { io::stdout().is_terminal() };
        terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
    }

    /// One line.
    pub fn line(&mut self, text: &str) {
        self.text(&format!("{text}\n"));
    }

    /// Text with its newlines.
    pub fn text(&mut self, text: &str) {
        if self.failed.is_some() {
            return;
        }
        let result = if self.to_stderr {
            io::stderr().write_all(text.as_bytes())
        } else {
            let mut stdout = io::stdout().lock();
            stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush())
        };
        self.failed = result.err();
    }

    /// Its reader has gone. Any other failure to write is not a wish to end.
    pub fn is_unread(&self) -> bool {
        self.failed.as_ref().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    }

    /// Everything is written, or nobody is left to read it.
    ///
    /// # Errors
    /// `Io` or `NoSpace`: some of it could not be.
    pub fn end(self) -> Result<()> {
        let place = if self.to_stderr { "standard error" } else { "standard output" };
        match self.failed {
            Some(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                Err(Error::io("cannot write", place, error))
            }
            _ => Ok(()),
        }
    }
}

/// Where a column's cells stand.
#[derive(Clone, Copy)]
pub enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// Columns as wide as their widest cell, two spaces apart, no trailing spaces.
pub fn table(heads: &[(&str, Align)], rows: &[Vec<String>], colour: bool) -> String {
    let width = |text: &str| text.chars().count();
    let widths: Vec<usize> = (0..heads.len())
        .map(|at| rows.iter().map(|row| width(&row[at])).chain([width(heads[at].0)]).max().unwrap_or(0))
        .collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut text = String::new();
        for (at, cell) in cells.enumerate() {
            let gap = " ".repeat(widths[at] - width(cell));
            let between = if at == 0 { "" } else { "  " };
            match heads[at].1 {
                Align::Left => text.push_str(&format!("{between}{cell}{gap}")),
                Align::Right => text.push_str(&format!("{between}{gap}{cell}")),
            }
        }
        text.trim_end().to_owned()
    };
    let head = line(&mut heads.iter().map(|head| head.0));
    let mut text = if colour { format!("\x1b[1m{head}\x1b[0m\n") } else { head + "\n" };
    for row in rows {
        text.push_str(&line(&mut row.iter().map(String::as_str)));
        text.push('\n');
    }
    text
}

/// Lines of `name: value`, values in one column.
pub fn pairs(rows: &[(&str, String)]) -> String {
    let widest = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    rows.iter().map(|(name, value)| format!("{name:widest$}  {value}\n")).collect()
}

/// An action's name, as typed.
fn action(action: Action) -> &'static str {
    match action {
        Action::Encrypt => "encrypt",
        Action::Decrypt => "decrypt",
        Action::Verify => "verify",
        Action::Bench => "bench",
        Action::Reencrypt => "reencrypt",
    }
}

fn state(state: JobState) -> &'static str {
    match state {
        JobState::Queued => "queued",
        JobState::Running => "running",
        JobState::Paused => "paused",
        JobState::Flushing => "flushing",
        JobState::Done => "done",
        JobState::Failed => "failed",
        JobState::Cancelled => "cancelled",
    }
}

/// `job list`
pub fn jobs(jobs: &[JobInfo], colour: bool) -> String {
    let heads = [
        ("ID", Align::Right),
        ("ACTION", Align::Left),
        ("STATE", Align::Left),
        ("DONE", Align::Right),
        ("BYTES", Align::Right),
        ("RATE", Align::Right),
        ("LEFT", Align::Right),
        ("SRC", Align::Left),
        ("DST", Align::Left),
    ];
    let rows: Vec<_> = jobs
        .iter()
        .map(|job| {
            let running = job.state == JobState::Running;
            vec![
                job.job.to_string(),
                action(job.action).to_owned(),
                state(job.state).to_owned(),
                percent(&job.progress).map_or_else(|| "-".to_owned(), |percent| format!("{percent}%")),
                amount::bytes(job.progress.done_bytes),
                if running { amount::rate(job.progress.bytes_per_second) } else { "-".to_owned() },
                job.progress.eta_seconds.filter(|_| running).map_or_else(|| "-".to_owned(), amount::seconds),
                printable(&job.source),
                if job.sink.is_empty() { "-".to_owned() } else { printable(&job.sink) },
            ]
        })
        .collect();
    table(&heads, &rows, colour)
}

/// `job show`, and the answer to `pause`, `resume`, `cancel`, `throttle`
pub fn job(job: &JobInfo) -> String {
    let mut rows = vec![
        ("job", job.job.to_string()),
        ("action", action(job.action).to_owned()),
        ("state", state(job.state).to_owned()),
        ("owner", format!("uid {}{}", job.uid, if job.detached { ", detached" } else { "" })),
    ];
    if job.action == Action::Reencrypt {
        rows.push(("volume", printable(&job.source)));
    } else {
        rows.extend([("source", printable(&job.source)), ("sink", printable(&job.sink))]);
    }
    rows.push(("progress", describe(&job.progress, job.state)));
    rows.push(("running for", amount::seconds(job.progress.elapsed_seconds)));
    if job.progress.unlock_seconds > 0.0 {
        rows.push(("passphrase", amount::seconds(job.progress.unlock_seconds)));
    }
    if let Some(limit) = job.progress.throttle_bytes_per_second {
        rows.push(("limit", amount::rate(amount::real(limit))));
    }
    if job.progress.hole_bytes > 0 {
        rows.push(("source holes", amount::bytes(job.progress.hole_bytes)));
    }
    if job.progress.sparse_bytes > 0 {
        rows.push(("sink holes", amount::bytes(job.progress.sparse_bytes)));
    }
    if let Some(outcome) = &job.outcome {
        rows.push(("took", amount::seconds(outcome.seconds)));
        if outcome.padded_bytes > 0 {
            rows.push(("padding", amount::bytes(outcome.padded_bytes)));
        }
        if let Some(offset) = outcome.first_difference {
            rows.push(("first difference", format!("byte {offset}")));
        }
        if let Some(report) = &outcome.reencrypt {
            rows.extend(reencrypt::rows(report));
        }
        if let Some(failure) = &outcome.failure {
            rows.push(("reason", printable(&failure.message)));
        }
    }
    pairs(&rows)
}

/// One line at the end of a job that is done: `encrypted 4.00 GiB in 2.1 s, 1.90 GiB/s, 0.152 cpu s/GiB`.
pub fn summary(job: &JobInfo) -> String {
    let verb = match job.action {
        Action::Encrypt => "encrypted",
        Action::Decrypt => "decrypted",
        Action::Verify => "equal:",
        Action::Bench => "measured",
        Action::Reencrypt => "re-encrypted",
    };
    let report = job.outcome.as_ref().and_then(|outcome| outcome.reencrypt.as_ref());
    if let Some(report) = report.filter(|report| reencrypt::is_rehearsal(report)) {
        return reencrypt::rehearsed(report);
    }
    let verb = report.map_or(verb, |report| reencrypt::verb(report));
    let resumed = job.progress.resumed_bytes;
    let bytes = job.progress.done_bytes.saturating_sub(resumed);
    let mut text = format!("{verb} {}", amount::bytes(bytes));
    if resumed > 0 {
        text.push_str(&format!(" after {} that were done before,", amount::bytes(resumed)));
    }
    if let Some(outcome) = &job.outcome {
        text.push_str(&format!(" in {}", amount::seconds(outcome.seconds)));
        let unlock = job.progress.unlock_seconds;
        if unlock >= 0.05 {
            // Of a raw volume there is none.
            let what =
                if job.action == Action::Reencrypt { "before the first step" } else { "for the passphrase" };
            text.push_str(&format!(" ({} of it {what})", amount::seconds(unlock)));
        }
        let moving = outcome.seconds - unlock;
        if moving > 0.0 {
            text.push_str(&format!(", {}", amount::rate(amount::real(bytes) / moving)));
        }
        let cpu = outcome.cpu_seconds.0 + outcome.cpu_seconds.1;
        // Below 64 MiB the clock's grain is larger than the answer. The time of the key derivation, which is not in the rate, cannot be told
        // apart in this one: said only where it does not matter.
        if bytes >= 64 << 20 && cpu > 0.0 && unlock <= outcome.seconds / 50.0 {
            text.push_str(&format!(", {:.3} cpu s/GiB", cpu * f64::from(1 << 30) / amount::real(bytes)));
        }
        if job.progress.hole_bytes > 0 {
            text.push_str(&format!(", {} of source holes", amount::bytes(job.progress.hole_bytes)));
        }
        if job.progress.sparse_bytes > 0 {
            text.push_str(&format!(", {} left as holes", amount::bytes(job.progress.sparse_bytes)));
        }
        if outcome.padded_bytes > 0 {
            text.push_str(&format!(", padded with {} zero bytes", outcome.padded_bytes));
        }
    }
    text
}

/// `stats`
pub fn stats(stats: &Stats, colour: bool) -> String {
    let whose = stats.job.map_or_else(|| "all jobs".to_owned(), |job| format!("job {job}"));
    let mut text = format!(
        "{whose}: {} at {}, {} system calls{}\n",
        amount::bytes(stats.bytes),
        amount::rate(stats.bytes_per_second),
        stats.syscalls,
        stats.bottleneck.map(|stage| format!(", bottleneck {}", stage.name())).unwrap_or_default()
    );
    if !stats.stages.is_empty() {
        text.push_str(&stages(&stats.stages, colour));
    }
    text
}

/// Where the time goes, stage by stage.
pub fn stages(stages: &[StageStats], colour: bool) -> String {
    let heads = ["STAGE", "COUNT", "BYTES", "SHARE", "P50", "P90", "P99", "P99.9", "MAX"];
    let heads: Vec<_> = heads
        .iter()
        .enumerate()
        .map(|(at, head)| (*head, if at == 0 { Align::Left } else { Align::Right }))
        .collect();
    let rows: Vec<_> = stages
        .iter()
        .map(|stage| {
            vec![
                stage.stage.name().to_owned(),
                stage.count.to_string(),
                amount::bytes(stage.bytes),
                format!("{:.1}%", stage.share * 100.0),
                amount::latency(stage.p50_ns),
                amount::latency(stage.p90_ns),
                amount::latency(stage.p99_ns),
                amount::latency(stage.p999_ns),
                amount::latency(stage.max_ns),
            ]
        })
        .collect();
    table(&heads, &rows, colour)
}

/// `bench`
pub fn bench(rows: &[BenchRow], colour: bool) -> String {
    let heads = [
        ("KERNEL", Align::Left),
        ("OPERATION", Align::Left),
        ("AES", Align::Right),
        ("UNIT", Align::Right),
        ("MEDIAN", Align::Right),
        ("LOWEST", Align::Right),
        ("HIGHEST", Align::Right),
        ("LIMIT", Align::Right),
        ("OF LIMIT", Align::Right),
    ];
    let rows: Vec<_> = rows
        .iter()
        .map(|row| {
            let limit = row.limit_bytes_per_second.filter(|limit| *limit > 0.0);
            vec![
                printable(&row.kernel),
                printable(&row.operation),
                row.key_bits.to_string(),
                row.data_unit.to_string(),
                amount::rate(row.bytes_per_second),
                amount::rate(row.spread.0),
                amount::rate(row.spread.1),
                limit.map_or_else(|| "-".to_owned(), amount::rate),
                limit.map_or_else(|| "-".to_owned(), |limit| format!("{:.2}", row.bytes_per_second / limit)),
            ]
        })
        .collect();
    table(&heads, &rows, colour)
}

/// `daemon status`
pub fn status(status: &Status, colour: bool) -> String {
    let hello = &status.hello;
    let mut rows = vec![
        ("cryptd", format!("{}, protocol {}", printable(&hello.version), hello.protocol)),
        (
            "process",
            format!("{}, uid {}, up {}", hello.pid, hello.uid, amount::seconds(status.uptime_seconds)),
        ),
    ];
    if let Some(socket) = &status.socket {
        rows.push(("socket", printable(socket)));
    }
    rows.push((
        "idle exit",
        status.idle_exit_seconds.map_or_else(|| "never".to_owned(), |seconds| format!("after {seconds} s")),
    ));
    let forced = if status.kernel_forced { " (forced by the configuration)" } else { "" };
    rows.push(("kernel", format!("{}{forced}", printable(&status.kernel))));
    rows.push(("active jobs", status.active_jobs.to_string()));
    rows.push(("exports", status.active_exports.to_string()));
    rows.push((
        "memory",
        format!(
            "{} resident, {} at most",
            amount::bytes(status.rss_bytes),
            amount::bytes(status.rss_peak_bytes)
        ),
    ));
    let limit = status
        .memlock_limit_bytes
        .map_or_else(|| "no limit".to_owned(), |limit| format!("limit {} (ulimit -l)", amount::bytes(limit)));
    let short = status
        .memlock_needed_bytes
        .map(|needed| format!(", {} would lock everything", amount::bytes(needed)))
        .unwrap_or_default();
    let keys = if status.keys_locked { "keys locked" } else { "KEYS NOT LOCKED" };
    rows.push(("locked memory", format!("{keys}, {limit}{short}")));
    rows.push(("cpu", format!("{:.2} s user, {:.2} s system", status.cpu_seconds.0, status.cpu_seconds.1)));
    let mut text = pairs(&rows);
    let heads = [
        ("WORKER", Align::Right),
        ("CPU", Align::Right),
        ("QUEUE", Align::Left),
        ("BUFFERS", Align::Right),
        ("OF", Align::Right),
        ("REGISTERED", Align::Right),
        ("LOCKED", Align::Right),
        ("PAGES", Align::Left),
    ];
    let workers: Vec<_> = status
        .workers
        .iter()
        .enumerate()
        .map(|(at, worker)| {
            vec![
                at.to_string(),
                worker.cpu.map_or_else(|| "-".to_owned(), |cpu| cpu.to_string()),
                printable(&worker.queue),
                worker.buffers.to_string(),
                amount::bytes(worker.buffer_bytes.into()),
                worker.buffers_registered.to_string(),
                worker.buffers_locked.to_string(),
                printable(&worker.pages),
            ]
        })
        .collect();
    if !workers.is_empty() {
        text.push('\n');
        text.push_str(&table(&heads, &workers, colour));
    }
    // The same reason on every worker is told once.
    let reasons: std::collections::BTreeSet<_> =
        status.workers.iter().filter_map(|worker| worker.queue_fallback_reason.as_ref()).collect();
    for reason in reasons {
        text.push_str(&format!("not io_uring: {}\n", printable(reason)));
    }
    text
}

#[cfg(test)]
mod tests;
