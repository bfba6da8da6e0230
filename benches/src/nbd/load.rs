//! Clients: fio's nbd engine, and nbdcopy for whole volumes.
//!
//! Both are built on libnbd and share the machine's cores with the server, so what is measured is the pair of them; the server's own CPU
//! time is in a column beside it.

use std::fs;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::run;

/// What is done to a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Read.
    Read,
    /// Write.
    Write,
    /// Both, by fio's dice.
    Mixed,
}

/// What fio asks of a server.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Anywhere, or one after the other.
    pub random: bool,
    /// Which.
    pub direction: Direction,
    /// Bytes of a request.
    pub block_bytes: u32,
    /// Requests in flight per connection.
    pub depth: u32,
    /// Connections, each with a thread of fio's.
    pub connections: u32,
}

impl Load {
    /// fio's word for it.
    fn pattern(&self) -> &'static str {
        match (self.random, self.direction) {
            (true, Direction::Read) => "randread",
            (true, Direction::Write) => "randwrite",
            (true, Direction::Mixed) => "randrw",
            (false, Direction::Read) => "read",
            (false, Direction::Write) => "write",
            (false, Direction::Mixed) => "rw",
        }
    }
}

/// What came of it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Told {
    /// Requests that were answered; 0: not known.
    pub ios: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Seconds, by the client's clock.
    pub seconds: f64,
    /// Microseconds within which 50, 99 and 99.9 of a hundred requests were answered, of the slower direction.
    pub percentiles: Option<[f64; 3]>,
    /// CPU seconds of the client.
    pub cpu: f64,
}

/// Let fio ask for `seconds` seconds, anywhere in the first `size` bytes. `report` is where it writes, and is removed.
///
/// # Errors
/// fio failed, was answered with an error, or said something unexpected.
pub fn fio(load: Load, uri: &str, size: u64, seconds: f64, report: &Path) -> io::Result<Told> {
    let mut fio = Command::new("fio");
    fio.args(["--output-format=json", "--thread", "--group_reporting", "--name=load"])
        .args(["--ioengine=nbd", "--randrepeat=1", "--norandommap", "--time_based"])
        .arg(format!("--output={}", report.display()))
        .arg(format!("--uri={uri}"))
        .arg(format!("--rw={}", load.pattern()))
        .arg(format!("--bs={}", load.block_bytes))
        .arg(format!("--iodepth={}", load.depth))
        .arg(format!("--numjobs={}", load.connections))
        .arg(format!("--size={size}"))
        .arg(format!("--runtime={}ms", (seconds * 1000.0).round()))
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    let cost = run::pipeline(&mut [fio])?;
    let text = fs::read_to_string(report)?;
    fs::remove_file(report)?;
    Ok(Told { cpu: cost.cpu.total(), ..told(&text, load.direction)? })
}

/// What a report says of one job, or of several together.
fn told(report: &str, direction: Direction) -> io::Result<Told> {
    let wrong = |what: &str| io::Error::other(format!("fio's report {what}"));
    // fio prints notes before the report.
    let json = report.find('{').map(|at| &report[at..]).ok_or_else(|| wrong("has no JSON"))?;
    let report: Value = serde_json::from_str(json).map_err(|error| wrong(&error.to_string()))?;
    let [job] = report["jobs"].as_array().map(Vec::as_slice).unwrap_or_default() else {
        return Err(wrong("is not of one group of jobs"));
    };
    if job["error"].as_u64() != Some(0) {
        return Err(wrong(&format!("says error {}", job["error"])));
    }
    let directions: &[&str] = match direction {
        Direction::Read => &["read"],
        Direction::Write => &["write"],
        Direction::Mixed => &["read", "write"],
    };
    let mut sum = Told { percentiles: Some([0.0; 3]), ..Told::default() };
    for direction in directions {
        let part = &job[*direction];
        let number = |name: &str| part[name].as_u64().ok_or_else(|| wrong(&format!("has no {name}")));
        sum.ios += number("total_ios")?;
        sum.bytes += number("io_bytes")?;
        sum.seconds = sum.seconds.max(number("runtime")? as f64 / 1000.0);
        let ranks = &part["clat_ns"]["percentile"];
        for (rank, slowest) in
            ["50.000000", "99.000000", "99.900000"].iter().zip(sum.percentiles.iter_mut().flatten())
        {
            let nanos = ranks[*rank].as_u64().ok_or_else(|| wrong("has no percentiles"))?;
            *slowest = slowest.max(nanos as f64 / 1000.0);
        }
    }
    if sum.ios == 0 || sum.seconds <= 0.0 {
        return Err(wrong("knows of no request that was answered"));
    }
    Ok(sum)
}

/// `nbdcopy` of a whole volume of `size` bytes; from its start to its end. Writing ends with a flush.
///
/// # Errors
/// It failed.
pub fn copy(from: &str, to: &str, size: u64) -> io::Result<Told> {
    let mut command = Command::new("nbdcopy");
    command.arg("--flush").arg(from).arg(to).stdin(Stdio::null()).stdout(Stdio::null());
    let cost = run::pipeline(&mut [command])?;
    Ok(Told { ios: 0, bytes: size, seconds: cost.wall, percentiles: None, cpu: cost.cpu.total() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = r#"fio: connected to NBD server
        {"jobs":[{"error":0,
          "read":{"io_bytes":8192,"total_ios":2,"runtime":500,
            "clat_ns":{"percentile":{"50.000000":1000,"99.000000":3000,"99.900000":4000}}},
          "write":{"io_bytes":4096,"total_ios":1,"runtime":400,
            "clat_ns":{"percentile":{"50.000000":2000,"99.000000":2500,"99.900000":5000}}}}]}"#;

    #[test]
    fn the_slower_direction_gives_the_percentiles_and_both_the_sum() {
        let told = told(REPORT, Direction::Mixed).expect("reads");
        assert_eq!((told.ios, told.bytes, told.percentiles), (3, 12288, Some([2.0, 3.0, 5.0])));
        assert!((told.seconds - 0.5).abs() < 1e-9);
    }

    #[test]
    fn a_report_of_errors_or_of_nothing_is_refused() {
        let error = told(&REPORT.replace("\"error\":0", "\"error\":5"), Direction::Read).expect_err("EIO");
        assert!(error.to_string().contains("error 5"), "{error}");
        let error =
            told(&REPORT.replace("\"total_ios\":2", "\"total_ios\":0"), Direction::Read).expect_err("none");
        assert!(error.to_string().contains("no request"), "{error}");
        assert!(told("no report", Direction::Read).is_err());
    }
}
