//! The limit: what fio reaches when it reads one file and writes another at the same time.
//!
//! Reader and writer move the same number of bytes, start together, and know nothing of each other: no byte read has to
//! be written, nothing is encrypted, nothing is ordered, and the writer's blocks are the same few buffers over again. The
//! copy's rate is the size divided by the *slower* side's time, by fio's own clocks: its start-up, its end and the final
//! fsync are not counted. So a program that really copies can come near this figure but has nothing to spare.

use std::fs;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::run::{self, Cost};

/// How fio moves the bytes.
#[derive(Debug, Clone, Copy)]
pub struct Copy {
    /// `io_uring` or `psync`.
    pub engine: &'static str,
    /// Operations in flight per thread.
    pub depth: u32,
    /// Threads that read, and as many that write; each has its own part of the file.
    pub threads_each: u32,
    /// Reserve the sink's blocks first, as ours does; off the clock, because fio lays files out before it starts it.
    pub preallocate: bool,
}

/// Run the copy. `sink` is created anew: allocating it is part of a copy.
///
/// # Errors
/// fio is missing, failed, or said something unexpected.
pub fn copy(how: Copy, source: &Path, sink: &Path, size: u64) -> io::Result<Cost> {
    let part = size / u64::from(how.threads_each);
    let report = sink.with_extension("fio.json");
    let mut fio = Command::new("fio");
    fio.args(["--output-format=json", "--thread", "--group_reporting=0", "--direct=1", "--bs=1M"])
        .args(["--randrepeat=1", "--norandommap"])
        .arg(if how.preallocate { "--fallocate=native" } else { "--fallocate=none" })
        .arg(format!("--output={}", report.display()))
        .arg(format!("--ioengine={}", how.engine))
        .arg(format!("--iodepth={}", how.depth))
        .arg(format!("--numjobs={}", how.threads_each))
        .arg(format!("--size={part}"))
        .arg(format!("--offset_increment={part}"));
    if how.engine == "io_uring" {
        fio.args(["--registerfiles=1", "--fixedbufs=1"]);
    }
    for (name, direction, path) in [("reader", "read", source), ("writer", "write", sink)] {
        fio.arg(format!("--name={name}"))
            .arg(format!("--rw={direction}"))
            // fio takes a colon for the end of a file name.
            .arg(format!("--filename={}", path.display().to_string().replace(':', "\\:")));
    }
    fio.stdin(Stdio::null()).stdout(Stdio::null());
    let cost = run::pipeline(&mut [fio])?;
    let text = fs::read_to_string(&report)?;
    fs::remove_file(&report)?;
    Ok(Cost { wall: slowest(&text, size)?.as_secs_f64(), ..cost })
}

/// How fio moves the bytes of a file in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InPlace {
    /// One job per file, its reads and writes mixed by fio's dice (`rw=rw`).
    Mixed,
    /// A job that reads and one that writes, at the same time.
    Apart,
}

/// Bytes of the place that a journal's bytes go to, over and over: what a LUKS2 header of 16 MiB has for it.
const JOURNAL_BYTES: u64 = 15 << 20;

/// The limit of a re-encryption: all `size` bytes of `file` are read once and written once, past the page cache, in no relation to
/// each other. `journal`: as many bytes are written there besides. Nothing is flushed, and fio's start and end are not counted.
///
/// # Errors
/// As [`copy`].
pub fn rewrite(how: InPlace, depth: u32, file: &Path, journal: Option<&Path>, size: u64) -> io::Result<Cost> {
    let report = file.with_extension("fio.json");
    let mut fio = Command::new("fio");
    fio.args(["--output-format=json", "--thread", "--group_reporting=0", "--direct=1", "--bs=1M"])
        .args(["--randrepeat=1", "--norandommap", "--fallocate=none", "--overwrite=0"])
        .args(["--ioengine=io_uring", "--registerfiles=1", "--fixedbufs=1"])
        .arg(format!("--iodepth={depth}"))
        .arg(format!("--output={}", report.display()));
    let mut job = |name: &str, direction: &str, path: &Path, size: u64, bytes: u64| {
        fio.arg(format!("--name={name}"))
            .arg(format!("--rw={direction}"))
            .arg(format!("--size={size}"))
            .arg(format!("--io_size={bytes}"))
            .arg(format!("--filename={}", path.display().to_string().replace(':', "\\:")));
    };
    match how {
        InPlace::Mixed => job("both", "rw", file, size, 2 * size),
        InPlace::Apart => {
            job("reader", "read", file, size, size);
            job("writer", "write", file, size, size);
        }
    }
    if let Some(journal) = journal {
        job("journal", "write", journal, JOURNAL_BYTES, size);
    }
    fio.stdin(Stdio::null()).stdout(Stdio::null());
    let cost = run::pipeline(&mut [fio])?;
    let text = fs::read_to_string(&report)?;
    fs::remove_file(&report)?;
    let writes = if journal.is_some() { 2 * size } else { size };
    // fio's dice give each direction its half to within a few percent.
    let slack = if how == InPlace::Mixed { size / 16 + (4 << 20) } else { 0 };
    Ok(Cost { wall: slowest_of(&text, size, writes, slack)?.as_secs_f64(), ..cost })
}

/// The longest run time among the jobs of a report, after checking that each direction moved `size` bytes.
fn slowest(report: &str, size: u64) -> io::Result<Duration> {
    slowest_of(report, size, size, 0)
}

/// The same with other bytes for each direction, of which `slack` may be missing or too many as long as the sum is right.
fn slowest_of(report: &str, reads: u64, writes: u64, slack: u64) -> io::Result<Duration> {
    let wrong = |what: &str| io::Error::other(format!("fio's report {what}"));
    // fio may print notes before the report.
    let json = report.find('{').map(|at| &report[at..]).ok_or_else(|| wrong("has no JSON"))?;
    let report: Value = serde_json::from_str(json).map_err(|error| wrong(&error.to_string()))?;
    let jobs = report["jobs"].as_array().ok_or_else(|| wrong("names no jobs"))?;
    let mut moved = 0;
    for (direction, wanted) in [("read", reads), ("write", writes)] {
        let bytes: u64 = jobs.iter().filter_map(|job| job[direction]["io_bytes"].as_u64()).sum();
        if bytes.abs_diff(wanted) > slack {
            return Err(wrong(&format!("says {bytes} bytes of {wanted} for {direction}")));
        }
        moved += bytes;
    }
    if moved != reads + writes {
        return Err(wrong(&format!("says {moved} bytes of {} in all", reads + writes)));
    }
    // Of a job that does both, each direction's run time is the whole job's.
    let times = jobs.iter().flat_map(|job| [&job["read"]["runtime"], &job["write"]["runtime"]]);
    let slowest = times.filter_map(Value::as_u64).max().filter(|&millis| millis > 0);
    slowest.map(Duration::from_millis).ok_or_else(|| wrong("has no run time"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = r#"fio: a note
        {"jobs":[{"read":{"io_bytes":10,"runtime":30},"write":{"io_bytes":0,"runtime":0}},
                 {"read":{"io_bytes":0,"runtime":0},"write":{"io_bytes":10,"runtime":50}}]}"#;

    #[test]
    fn the_slower_side_counts() {
        assert_eq!(slowest(REPORT, 10).expect("reads"), Duration::from_millis(50));
    }

    #[test]
    fn a_report_of_fewer_bytes_is_refused() {
        let error = slowest(REPORT, 11).expect_err("10 of 11 bytes");
        assert!(error.to_string().contains("10 bytes of 11"), "{error}");
        assert!(slowest("no report", 1).is_err());
    }
}
