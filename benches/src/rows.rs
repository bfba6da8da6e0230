//! Rows and the table made of them.
//!
//! The ratio to the limit is taken pair by pair, each run against the limit of its own round, because a machine's speed
//! drifts more between rounds than the difference that is looked for. Where a case has several limits, the fastest of
//! the round counts.

use std::fmt::Write as _;

use serde::Serialize;

use crate::facts::Facts;

/// Bytes of a GiB.
const GIB: f64 = (1_u64 << 30) as f64;
/// Bytes of a MiB.
const MIB: f64 = (1_u64 << 20) as f64;

/// What a contender is in its case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// Moves the bytes and does nothing else.
    Limit,
    /// Somebody else's encryption.
    Rival,
    /// `cryptctl` and `cryptd`.
    Ours,
}

/// One run.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Which case, e.g. `disk-encrypt`.
    pub case: &'static str,
    /// Who ran.
    pub contender: &'static str,
    /// As what.
    pub side: Side,
    /// Round, from 0.
    pub round: u32,
    /// Bytes of source.
    pub bytes: u64,
    /// Seconds.
    pub wall_seconds: f64,
    /// CPU seconds in user mode: of the daemon for ours, of all processes for others.
    pub cpu_user_seconds: f64,
    /// CPU seconds in the kernel, likewise.
    pub cpu_system_seconds: f64,
    /// CPU seconds of what runs beside the daemon: `cryptctl`, and the two ends of a pipe.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client_cpu_seconds: Option<f64>,
    /// System calls of the workers' queues.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub syscalls: Option<u64>,
    /// Peak resident set of the daemon since its start, or the largest of the other's processes, bytes.
    pub rss_peak_bytes: u64,
    /// SHA-256 of the result, checked against what it must be; absent where the result is not checked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// Was the page cache dropped before the run?
    pub cold: bool,
}

impl Row {
    /// Bytes per second.
    #[must_use]
    pub fn rate(&self) -> f64 {
        self.bytes as f64 / self.wall_seconds
    }

    /// CPU seconds per GiB, of every process that took part: what can be compared between contenders.
    #[must_use]
    pub fn cpu_per_gib(&self) -> f64 {
        self.daemon_cpu_per_gib() + self.client_cpu_seconds.unwrap_or(0.0) / (self.bytes as f64 / GIB)
    }

    /// CPU seconds per GiB of the daemon alone (of all processes for others).
    #[must_use]
    pub fn daemon_cpu_per_gib(&self) -> f64 {
        (self.cpu_user_seconds + self.cpu_system_seconds) / (self.bytes as f64 / GIB)
    }
}

/// Median and extremes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// Middle value; of an even number, the mean of the middle two.
    pub median: f64,
    /// Smallest.
    pub min: f64,
    /// Largest.
    pub max: f64,
}

impl Spread {
    /// `None` of nothing.
    #[must_use]
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (&min, &max) = (values.first()?, values.last()?);
        let (low, high) = (values[(values.len() - 1) / 2], values[values.len() / 2]);
        Some(Self { median: f64::midpoint(low, high), min, max })
    }
}

/// Rates of `contender` over the fastest limit of the same round.
#[must_use]
pub fn ratios(rows: &[Row], case: &str, contender: &str) -> Vec<f64> {
    let of_case = || rows.iter().filter(|row| row.case == case);
    let limit = |round: u32| {
        let rates = of_case().filter(|row| row.side == Side::Limit && row.round == round).map(Row::rate);
        rates.max_by(f64::total_cmp)
    };
    let own = of_case().filter(|row| row.contender == contender);
    own.filter_map(|row| limit(row.round).map(|limit| row.rate() / limit)).collect()
}

/// One JSON object per run, newline-terminated, each with the machine's facts and its ratio to the limit.
///
/// # Errors
/// None in practice: rows hold nothing JSON cannot.
pub fn json_lines(rows: &[Row], facts: &Facts) -> serde_json::Result<String> {
    #[derive(Serialize)]
    struct Line<'a> {
        #[serde(flatten)]
        row: &'a Row,
        bytes_per_second: f64,
        ratio_to_limit: Option<f64>,
        machine: &'a Facts,
    }
    let mut text = String::new();
    for row in rows {
        let same_round: Vec<Row> = rows.iter().filter(|other| other.round == row.round).cloned().collect();
        let ratio = ratios(&same_round, row.case, row.contender).first().copied();
        let line = Line { row, bytes_per_second: row.rate(), ratio_to_limit: ratio, machine: facts };
        text.push_str(&serde_json::to_string(&line)?);
        text.push('\n');
    }
    Ok(text)
}

/// Medians with their extremes, one line per case and contender, in the order of first appearance.
#[must_use]
pub fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "{:<14} {:<22} {:>8} {:>24} {:>22} {:>9} {:>7} {:>9} {:>8}  {}\n",
        "case",
        "contender",
        "wall s",
        "GiB/s (min..max)",
        "of limit (min..max)",
        "CPU s/GiB",
        "daemon",
        "calls/MiB",
        "RSS MiB",
        "result"
    );
    let mut seen = Vec::new();
    for row in rows {
        let name = (row.case, row.contender);
        if seen.contains(&name) {
            continue;
        }
        seen.push(name);
        let own: Vec<&Row> = rows.iter().filter(|other| (other.case, other.contender) == name).collect();
        let median = |value: &dyn Fn(&Row) -> f64| {
            Spread::of(own.iter().map(|row| value(row)).collect()).map_or(f64::NAN, |spread| spread.median)
        };
        let spread = |values: Vec<f64>| {
            Spread::of(values).map_or_else(
                || "-".to_owned(),
                |Spread { median, min, max }| format!("{median:.3} ({min:.3}..{max:.3})"),
            )
        };
        let calls = row.syscalls.map_or_else(
            || "-".to_owned(),
            |_| format!("{:.3}", median(&|row| row.syscalls.unwrap_or(0) as f64 / (row.bytes as f64 / MIB))),
        );
        let result = row.sha256.as_ref().map_or("-", |digest| &digest[..16]);
        writeln!(
            text,
            "{:<14} {:<22} {:>8.2} {:>24} {:>22} {:>9.3} {:>7} {:>9} {:>8.1}  {}",
            row.case,
            row.contender,
            median(&|row| row.wall_seconds),
            spread(own.iter().map(|row| row.rate() / GIB).collect()),
            spread(ratios(rows, row.case, row.contender)),
            median(&Row::cpu_per_gib),
            row.client_cpu_seconds
                .map_or_else(|| "-".to_owned(), |_| format!("{:.3}", median(&Row::daemon_cpu_per_gib))),
            calls,
            median(&|row| row.rss_peak_bytes as f64 / MIB),
            result
        )
        .expect("writing to a string succeeds");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(contender: &'static str, side: Side, round: u32, wall_seconds: f64) -> Row {
        Row {
            case: "disk",
            contender,
            side,
            round,
            bytes: 1 << 30,
            wall_seconds,
            cpu_user_seconds: 0.5,
            cpu_system_seconds: 0.25,
            client_cpu_seconds: None,
            syscalls: None,
            rss_peak_bytes: 0,
            sha256: None,
            cold: false,
        }
    }

    #[test]
    fn a_ratio_pairs_runs_of_one_round_with_its_fastest_limit() {
        let rows = [
            row("slow", Side::Limit, 0, 2.0),
            row("fast", Side::Limit, 0, 1.0),
            row("ours", Side::Ours, 0, 2.0),
            row("fast", Side::Limit, 1, 4.0),
            row("ours", Side::Ours, 1, 4.0),
        ];
        assert_eq!(ratios(&rows, "disk", "ours"), [0.5, 1.0]);
        assert!(table(&rows).contains("0.750 (0.500..1.000)"), "{}", table(&rows));
        let lines = json_lines(&rows, &Facts::collect()).expect("serializes");
        let ratio = |line: &str| {
            serde_json::from_str::<serde_json::Value>(line).expect("JSON")["ratio_to_limit"].as_f64()
        };
        assert_eq!(lines.lines().map(ratio).collect::<Vec<_>>()[2..], [Some(0.5), Some(1.0), Some(1.0)]);
    }

    #[test]
    fn a_median_of_even_count_lies_between() {
        assert_eq!(Spread::of(vec![4.0, 1.0, 2.0, 3.0]), Some(Spread { median: 2.5, min: 1.0, max: 4.0 }));
        assert_eq!(Spread::of(Vec::new()), None);
    }
}
