//! Rows of servers, and the table made of them.
//!
//! Ratios are taken round by round, against each rival's run of the same round, because a machine's speed drifts more between rounds than
//! the difference that is looked for.

use std::fmt::Write as _;

use serde::Serialize;

use crate::facts::Facts;
use crate::nbd::load::Told;
use crate::rows::{Side, Spread};
use crate::run::Cpu;

/// Bytes of a GiB.
const GIB: f64 = (1_u64 << 30) as f64;
/// Bytes of a MiB.
const MIB: f64 = (1_u64 << 20) as f64;

/// What a rate counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Requests per second.
    Iops,
    /// MiB per second.
    Mibps,
}

/// One run.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Where the files are: `disk` (past the page cache) or `cache`.
    pub medium: &'static str,
    /// Which case, e.g. `rand-read`.
    pub case: &'static str,
    /// Who served.
    pub server: &'static str,
    /// As what: a server of plain data is a limit.
    pub side: Side,
    /// Round, from 0.
    pub round: u32,
    /// Requests answered; 0: the client does not say.
    pub ios: u64,
    /// Bytes of data.
    pub bytes: u64,
    /// Seconds.
    pub seconds: f64,
    /// What its rate counts.
    pub unit: Unit,
    /// Microseconds within which 50, 99 and 99.9 of a hundred requests were answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub percentiles_us: Option<[f64; 3]>,
    /// CPU seconds of the server, all threads, in user mode.
    pub cpu_user_seconds: f64,
    /// The same in the kernel.
    pub cpu_system_seconds: f64,
    /// CPU seconds of the client.
    pub client_cpu_seconds: f64,
    /// Peak resident set of the server, bytes.
    pub rss_peak_bytes: u64,
    /// What was re-encrypted meanwhile.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rotated_bytes_per_second: Option<f64>,
}

impl Row {
    /// What was asked of `server`, what came of it, and what it cost the server.
    #[must_use]
    pub fn new(
        (medium, case, unit): (&'static str, &'static str, Unit),
        (server, side): (&'static str, Side),
        round: u32,
        told: Told,
        (cpu, rss_peak_bytes): (Cpu, u64),
    ) -> Self {
        Self {
            medium,
            case,
            server,
            side,
            round,
            ios: told.ios,
            bytes: told.bytes,
            seconds: told.seconds,
            unit,
            percentiles_us: told.percentiles,
            cpu_user_seconds: cpu.user,
            cpu_system_seconds: cpu.system,
            client_cpu_seconds: told.cpu,
            rss_peak_bytes,
            rotated_bytes_per_second: None,
        }
    }

    /// Requests or MiB per second.
    #[must_use]
    pub fn rate(&self) -> f64 {
        match self.unit {
            Unit::Iops => self.ios as f64 / self.seconds,
            Unit::Mibps => self.bytes as f64 / MIB / self.seconds,
        }
    }

    /// CPU seconds of the server per GiB of data.
    #[must_use]
    pub fn cpu_per_gib(&self) -> f64 {
        (self.cpu_user_seconds + self.cpu_system_seconds) / (self.bytes as f64 / GIB)
    }

    /// CPU seconds of the server per 1,000 requests, where they are counted.
    #[must_use]
    pub fn cpu_per_thousand(&self) -> Option<f64> {
        let seconds = self.cpu_user_seconds + self.cpu_system_seconds;
        (self.ios > 0).then(|| seconds / (self.ios as f64 / 1000.0))
    }

    fn is_of(&self, other: &Self) -> bool {
        (self.medium, self.case, self.server) == (other.medium, other.case, other.server)
    }
}

/// Rates of a row's server over those of `rival` in the same case, round by round.
#[must_use]
pub fn ratios(rows: &[Row], of: &Row, rival: &str) -> Vec<f64> {
    let own = rows.iter().filter(|row| row.is_of(of));
    own.filter_map(|row| {
        let same = |other: &&Row| {
            (other.medium, other.case, other.round) == (row.medium, row.case, row.round)
                && other.server == rival
        };
        rows.iter().find(same).map(|rival| row.rate() / rival.rate())
    })
    .collect()
}

/// One JSON object per run, newline-terminated, with the machine's facts and its ratios to `rivals` in its round.
///
/// # Errors
/// None in practice: rows hold nothing JSON cannot.
pub fn json_lines(rows: &[Row], rivals: &[&str], facts: &Facts) -> serde_json::Result<String> {
    #[derive(Serialize)]
    struct Line<'a> {
        #[serde(flatten)]
        row: &'a Row,
        rate: f64,
        server_cpu_seconds_per_gib: f64,
        server_cpu_seconds_per_1000_ios: Option<f64>,
        ratios: serde_json::Map<String, serde_json::Value>,
        machine: &'a Facts,
    }
    let mut text = String::new();
    for row in rows {
        let mut same_round = rows.to_vec();
        same_round.retain(|other| other.round == row.round);
        let ratio = |rival: &&str| {
            let ratio = ratios(&same_round, row, rival).first().copied();
            ratio.map(|ratio| ((*rival).to_owned(), ratio.into()))
        };
        let line = Line {
            row,
            rate: row.rate(),
            server_cpu_seconds_per_gib: row.cpu_per_gib(),
            server_cpu_seconds_per_1000_ios: row.cpu_per_thousand(),
            ratios: rivals.iter().filter_map(ratio).collect(),
            machine: facts,
        };
        text.push_str(&serde_json::to_string(&line)?);
        text.push('\n');
    }
    Ok(text)
}

/// Medians with their extremes, one line per case and server, in the order of first appearance, beside each of `rivals`.
#[must_use]
pub fn table(rows: &[Row], rivals: &[&str]) -> String {
    let mut text = format!("{:<6} {:<13} {:<20} {:>30}", "medium", "case", "server", "rate (min..max)");
    for rival in rivals {
        write!(text, " {:>20}", format!("x {rival}")).expect(WRITES);
    }
    let columns = ["p50 us", "p99 us", "CPU s/GiB", "CPU s/k I/O", "client", "RSS MiB", "rotated"];
    for column in columns {
        write!(text, " {column:>11}").expect(WRITES);
    }
    text.push('\n');
    let mut seen: Vec<&Row> = Vec::new();
    for row in rows {
        if seen.iter().any(|other| other.is_of(row)) {
            continue;
        }
        seen.push(row);
        let own = || rows.iter().filter(|other| other.is_of(row));
        let median = |value: &dyn Fn(&Row) -> Option<f64>, digits: usize| {
            Spread::of(own().filter_map(value).collect())
                .map_or_else(|| "-".to_owned(), |spread| format!("{:.digits$}", spread.median))
        };
        let rate = Spread::of(own().map(Row::rate).collect()).map_or_else(String::new, |spread| {
            let unit = if row.unit == Unit::Iops { "IOPS" } else { "MiB/s" };
            format!("{:.0} {unit} ({:.0}..{:.0})", spread.median, spread.min, spread.max)
        });
        write!(text, "{:<6} {:<13} {:<20} {rate:>30}", row.medium, row.case, row.server).expect(WRITES);
        for rival in rivals {
            let ratio = Spread::of(ratios(rows, row, rival)).filter(|_| *rival != row.server);
            let ratio = ratio.map_or_else(
                || "-".to_owned(),
                |Spread { median, min, max }| format!("{median:.2} ({min:.2}..{max:.2})"),
            );
            write!(text, " {ratio:>20}").expect(WRITES);
        }
        let percentile = |at: usize| median(&|row| row.percentiles_us.map(|all| all[at]), 0);
        let cells = [
            percentile(0),
            percentile(1),
            median(&|row| Some(row.cpu_per_gib()), 2),
            median(&Row::cpu_per_thousand, 4),
            median(&|row| Some(row.client_cpu_seconds / (row.bytes as f64 / GIB)), 2),
            median(&|row| Some(row.rss_peak_bytes as f64 / MIB), 1),
            median(&|row| row.rotated_bytes_per_second.map(|rate| rate / MIB), 0),
        ];
        for cell in cells {
            write!(text, " {cell:>11}").expect(WRITES);
        }
        text.push('\n');
    }
    text
}

const WRITES: &str = "writing to a string succeeds";

#[cfg(test)]
mod tests {
    use super::*;

    fn row(server: &'static str, round: u32, ios: u64) -> Row {
        let told =
            Told { ios, bytes: ios * 4096, seconds: 2.0, percentiles: Some([1.0, 2.0, 3.0]), cpu: 0.5 };
        let cpu = Cpu { user: 0.25, system: 0.75 };
        Row::new(("disk", "rand-read", Unit::Iops), (server, Side::Rival), round, told, (cpu, 1 << 20))
    }

    #[test]
    fn ratios_pair_runs_of_one_round() {
        let rows = [row("rival", 0, 1000), row("ours", 0, 2000), row("rival", 1, 4000), row("ours", 1, 4000)];
        assert_eq!(ratios(&rows, &rows[1], "rival"), [2.0, 1.0]);
        let table = table(&rows, &["rival"]);
        assert!(table.contains("1500 IOPS (1000..2000)"), "{table}");
        assert!(table.contains("1.50 (1.00..2.00)"), "{table}");
        let lines = json_lines(&rows, &["rival"], &Facts::collect()).expect("serializes");
        let line: serde_json::Value =
            serde_json::from_str(lines.lines().nth(1).expect("four")).expect("JSON");
        assert_eq!(line["ratios"]["rival"], 2.0);
        assert_eq!(line["server_cpu_seconds_per_1000_ios"], 0.5);
    }

    #[test]
    fn what_is_not_counted_is_not_divided_by() {
        let copied = Row { ios: 0, unit: Unit::Mibps, bytes: 1 << 30, ..row("ours", 0, 1) };
        assert_eq!(copied.cpu_per_thousand(), None);
        assert!((copied.rate() - 512.0).abs() < 1e-9 && (copied.cpu_per_gib() - 1.0).abs() < 1e-9);
    }
}
