//! Measurements inside one process: contestants that take turns, medians and ratios of pairs, and JSON rows that say on what
//! machine and from which source they were measured.
//!
//! A number alone is worth nothing here: clocks of shared machines drift by tens of percent. So everything compared runs in
//! one process, in turns, and ratios are taken turn by turn before the median is.

use std::time::Duration;

use engine::crypto::measure::{Work, median, rate};
use serde::Serialize;

use crate::facts::Facts;

/// One line of a report.
#[derive(Debug, Clone, Serialize)]
pub struct Row<'a> {
    /// Which bench: `kernel`, `stage`, `sweep`.
    pub bench: &'a str,
    /// Who was measured.
    pub subject: &'a str,
    /// Doing what.
    pub operation: &'a str,
    /// AES key bits.
    pub key_bits: u32,
    /// Data unit, bytes.
    pub data_unit: u32,
    /// Bytes of the buffer worked on.
    pub buffer_bytes: u64,
    /// Median rate.
    pub bytes_per_second: f64,
    /// Slowest and fastest turn.
    pub spread: (f64, f64),
    /// Median of the limit, if there is one.
    pub limit_bytes_per_second: Option<f64>,
    /// Median of the ratios to the limit, turn by turn.
    pub ratio_to_limit: Option<f64>,
    /// Digest of the result.
    pub digest: String,
    /// Where.
    pub machine: &'a Facts,
}

/// Somebody who takes turns.
pub struct Contestant {
    /// Who.
    pub subject: String,
    /// Doing what.
    pub operation: &'static str,
    /// The subject that is its limit, if it has one, and what part of that limit (re-encryption: half).
    pub limit: Option<(String, f64)>,
    /// One pass over the buffer.
    pub work: Work,
}

/// Rates of a contestant, one for each turn, in the order of the turns.
pub type Rates = Vec<f64>;

/// Let every contestant work on `buf` for `time`, in turns, `rounds` times.
pub fn take_turns(contestants: &mut [Contestant], buf: &mut [u8], time: Duration, rounds: u32) -> Vec<Rates> {
    let bytes = buf.len() as u64;
    let mut rates = vec![Rates::new(); contestants.len()];
    for contestant in &mut *contestants {
        (contestant.work)(buf);
    }
    for _ in 0..rounds {
        for (contestant, rates) in contestants.iter_mut().zip(&mut rates) {
            rates.push(rate(bytes, time, || (contestant.work)(std::hint::black_box(&mut *buf))));
        }
    }
    rates
}

/// Median of `a / b`, turn by turn.
///
/// # Panics
/// If either is empty.
#[must_use]
pub fn ratio(a: &[f64], b: &[f64]) -> f64 {
    median(&a.iter().zip(b).map(|(a, b)| a / b).collect::<Vec<f64>>())
}

/// Slowest and fastest.
#[must_use]
pub fn spread(rates: &[f64]) -> (f64, f64) {
    (rates.iter().copied().fold(f64::INFINITY, f64::min), rates.iter().copied().fold(0.0, f64::max))
}

/// FNV-1a, 64 bits, in hexadecimal: to see that two results are the same, nothing more.
#[must_use]
pub fn digest(bytes: &[u8]) -> String {
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_tells_buffers_apart() {
        assert_eq!(digest(b""), "cbf29ce484222325");
        assert_eq!(digest(b"a"), "af63dc4c8601ec8c");
        assert_ne!(digest(b"ab"), digest(b"ba"));
    }

    #[test]
    fn ratios_are_taken_turn_by_turn() {
        // The second turn ran at half the clock; the ratio does not see it.
        assert_eq!(ratio(&[8.0, 4.0, 8.0], &[10.0, 5.0, 10.0]).to_bits(), 0.8_f64.to_bits());
        assert_eq!(spread(&[2.0, 1.0, 3.0]), (1.0, 3.0));
    }

    #[test]
    fn everybody_takes_every_turn() {
        let contestant = |subject: &str, step: u8| Contestant {
            subject: subject.to_owned(),
            operation: "add",
            limit: None,
            work: Box::new(move |buf| buf[0] = buf[0].wrapping_add(step)),
        };
        let mut both = [contestant("one", 1), contestant("two", 2)];
        let rates = take_turns(&mut both, &mut [0; 64], Duration::from_micros(10), 3);
        assert!(rates.iter().all(|rates| rates.len() == 3 && rates.iter().all(|&rate| rate > 0.0)));
    }
}
