//! Amounts as people type and read them: bytes, rates, durations.
//!
//! One rule for suffixes, in both directions: a bare letter and the `…iB` form are powers of 1024 (as in dd, fio and
//! qemu), the `…B` form is powers of 1000. What is printed always carries the `i`, so it can be typed back.

use std::time::Duration;

const LETTERS: &str = "kmgtpe";

/// A number of bytes: `4096`, `64k`, `1M`, `1MiB`, `1MB`, `1.5G`.
///
/// # Errors
/// A sentence for the user.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let lower = text.trim().to_ascii_lowercase();
    let split = lower.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(lower.len());
    let (number, suffix) = lower.split_at(split);
    let scale = scale(suffix).ok_or_else(|| {
        format!("unknown unit '{suffix}': use k, M, G, T (1024 steps) or kB, MB, GB, TB (1000 steps)")
    })?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || fraction.contains('.') || (number.contains('.') && fraction.is_empty()) {
        return Err(format!("'{text}' is not a size: expected a number such as 4096, 64k or 1.5GiB"));
    }
    let too_large = || format!("'{text}' is too large");
    let whole: u128 = whole.parse().map_err(|_| too_large())?;
    let mut bytes = whole.checked_mul(scale).ok_or_else(too_large)?;
    if !fraction.is_empty() {
        // Nine digits are exact for every unit that has a fraction worth typing, and cannot overflow.
        let digits = &fraction[..fraction.len().min(9)];
        let parts: u128 = digits.parse().map_err(|_| too_large())?;
        let base = 10u128.pow(u32::try_from(digits.len()).expect("at most nine digits"));
        bytes = bytes.checked_add(parts * scale / base).ok_or_else(too_large)?;
    }
    u64::try_from(bytes).map_err(|_| too_large())
}

/// Bytes per second: a size, with an optional `/s`. Zero is refused: a job is stopped by `pause`.
///
/// # Errors
/// A sentence for the user.
pub fn parse_rate(text: &str) -> Result<u64, String> {
    let lower = text.trim().to_ascii_lowercase();
    match parse_bytes(lower.strip_suffix("/s").unwrap_or(&lower))? {
        0 => Err("a rate of zero would never end: use `cryptctl job pause`".to_owned()),
        rate => Ok(rate),
    }
}

fn scale(suffix: &str) -> Option<u128> {
    let letter = match suffix {
        "" | "b" => return Some(1),
        _ => suffix.chars().next()?,
    };
    let power = u32::try_from(LETTERS.find(letter)?).expect("six letters") + 1;
    match &suffix[letter.len_utf8()..] {
        "" | "i" | "ib" => Some(1024u128.pow(power)),
        "b" => Some(1000u128.pow(power)),
        _ => None,
    }
}

/// `1.50 GiB`; whole numbers below 1 KiB: `512 B`.
pub fn bytes(value: u64) -> String {
    if value < 1024 { format!("{value} B") } else { scaled(real(value)) }
}

/// `1.50 GiB/s`.
pub fn rate(bytes_per_second: f64) -> String {
    if bytes_per_second.is_finite() && bytes_per_second > 0.0 {
        format!("{}/s", scaled(bytes_per_second))
    } else {
        "0 B/s".to_owned()
    }
}

fn scaled(value: f64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = value;
    let mut unit = 0;
    // 1023.995 would print as 1024.00, so the step is taken just before.
    while value >= 1023.995 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = if unit == 0 { 0 } else { 2 };
    format!("{value:.digits$} {}", UNITS[unit])
}

/// `7.3 s`, `2m 05s`, `3h 07m`, `2d 04h`.
pub fn seconds(value: f64) -> String {
    let Ok(duration) = Duration::try_from_secs_f64(value) else { return "?".to_owned() };
    let whole = duration.as_secs();
    match whole {
        0..60 => format!("{value:.1} s"),
        60..3600 => format!("{}m {:02}s", whole / 60, whole % 60),
        3600..86_400 => format!("{}h {:02}m", whole / 3600, whole / 60 % 60),
        _ => format!("{}d {:02}h", whole / 86_400, whole / 3600 % 24),
    }
}

/// A latency: `850 ns`, `12.4 µs`, `3.10 ms`, `1.20 s`.
pub fn latency(ns: u64) -> String {
    let value = real(ns);
    match ns {
        0..1_000 => format!("{ns} ns"),
        1_000..1_000_000 => format!("{:.1} µs", value / 1e3),
        1_000_000..1_000_000_000 => format!("{:.2} ms", value / 1e6),
        _ => format!("{:.2} s", value / 1e9),
    }
}

/// For display and ratios only: exact up to 2^53, rounded beyond.
#[expect(clippy::cast_precision_loss, reason = "display only")]
pub fn real(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse_in_both_systems() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("512b", 512),
            ("64k", 65_536),
            ("64K", 65_536),
            ("64Ki", 65_536),
            ("1M", 1 << 20),
            ("1MiB", 1 << 20),
            ("1MB", 1_000_000),
            ("1.5G", 3 << 29),
            ("0.5k", 512),
            ("15EiB", 15 << 60),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn nonsense_sizes_are_refused() {
        for text in
            ["", "k", "-1", "1X", "1MiBs", "1..5G", "1.G", ".5G", "16E", "99999999999999999999", "1 M B", "é"]
        {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_rate_may_say_per_second_but_not_zero() {
        assert_eq!(parse_rate("200M"), Ok(200 << 20));
        assert_eq!(parse_rate("1GiB/s"), Ok(1 << 30));
        assert!(parse_rate("0").is_err());
        assert!(parse_rate("0.0000000001k").is_err());
    }

    #[test]
    fn amounts_read_well_at_the_edges_of_units() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1024), "1.00 KiB");
        assert_eq!(bytes((1 << 20) - 1), "1.00 MiB");
        assert_eq!(bytes(u64::MAX), "16.00 EiB");
        assert_eq!(rate(f64::NAN), "0 B/s");
        assert_eq!(rate(1.5 * 1024.0 * 1024.0), "1.50 MiB/s");
        assert_eq!(seconds(59.94), "59.9 s");
        assert_eq!(seconds(125.0), "2m 05s");
        assert_eq!(seconds(11_220.0), "3h 07m");
        assert_eq!(seconds(187_200.0), "2d 04h");
        assert_eq!(seconds(f64::INFINITY), "?");
        assert_eq!(latency(999), "999 ns");
        assert_eq!(latency(12_400), "12.4 µs");
        assert_eq!(latency(1_200_000_000), "1.20 s");
    }
}
