//! What a bench under `cargo bench` is told: how large its buffer is, and how long and how often everybody works on it.

use std::time::Duration;

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// Bytes of the buffer worked on, whole pages.
    pub buffer_bytes: usize,
    /// How long a turn takes, milliseconds.
    pub millis: u64,
    /// Turns of each contestant.
    pub rounds: u32,
    /// JSON rows instead of a table.
    pub json: bool,
}

/// Proves that the bench works, not that anything is fast.
const SMALL: Plan = Plan { buffer_bytes: 64 << 10, millis: 1, rounds: 3, json: false };
/// Measures.
const FULL: Plan = Plan { buffer_bytes: 1 << 20, millis: 20, rounds: 11, json: false };

impl Plan {
    /// From this program's arguments; ends it with status 2 and a word on what is wrong with them. `rows`: the bench has `--json`.
    #[must_use]
    pub fn typed(bench: &str, rows: bool) -> Self {
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        Self::parse(&arguments, rows).unwrap_or_else(|problem| {
            eprintln!("{bench}: {problem}");
            std::process::exit(2)
        })
    }

    /// How long a turn takes.
    #[must_use]
    pub fn time(&self) -> Duration {
        Duration::from_millis(self.millis)
    }

    fn parse(arguments: &[String], rows: bool) -> Result<Self, String> {
        // `cargo bench` says so; `cargo test` runs the same program without a word.
        let mut plan = if arguments.iter().any(|argument| argument == "--bench") { FULL } else { SMALL };
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            let mut number = || {
                let value = arguments.next().and_then(|value| value.parse::<u32>().ok());
                value.ok_or_else(|| format!("{argument} takes a number"))
            };
            match argument.as_str() {
                "--small" => plan = Self { json: plan.json, ..SMALL },
                "--buffer" => plan.buffer_bytes = number()? as usize / 4096 * 4096,
                "--millis" => plan.millis = u64::from(number()?),
                "--rounds" => plan.rounds = number()?,
                "--json" if rows => plan.json = true,
                // What `cargo bench` and `cargo test` say to every harness.
                "--bench" | "--show-output" | "--nocapture" => {}
                other => return Err(format!("unknown argument {other}")),
            }
        }
        if plan.buffer_bytes == 0 || plan.rounds == 0 {
            return Err("a buffer has at least 4096 bytes, a run at least one round".to_owned());
        }
        Ok(plan)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &str, rows: bool) -> Result<Plan, String> {
        let words: Vec<String> = words.split_whitespace().map(str::to_owned).collect();
        Plan::parse(&words, rows)
    }

    #[test]
    fn cargo_bench_measures_and_cargo_test_only_runs() {
        assert_eq!(parse("--bench", false), Ok(FULL));
        assert_eq!(parse("--nocapture", false), Ok(SMALL));
        assert_eq!(parse("--json --bench --small", true), Ok(Plan { json: true, ..SMALL }));
        let asked = Plan { buffer_bytes: 8192, millis: 7, rounds: 2, json: false };
        assert_eq!(parse("--buffer 9000 --millis 7 --rounds 2", false), Ok(asked));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for words in ["--json", "--rounds", "--rounds x", "--rounds 0", "--buffer 4095", "--wide"] {
            assert!(parse(words, false).is_err(), "{words}");
        }
    }
}
