//! Tokens as they are typed: any JSON object, or ours, which says where a passphrase is kept and when it must be replaced.
//!
//! The fields of ours and their rules are the daemon's to define and to check; what can be wrong in what was typed is said here,
//! without repeating it: it may be the passphrase itself.

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value, json};

use crate::endpoint;
use crate::report::{Error, Result};

/// Longest text that is read: no token larger than a request line gets to the daemon. How much the header has room for, the
/// daemon says.
const MAX_TEXT: u64 = proto::MAX_LINE as u64;
/// Most values inside one another in a token, itself counted: with the two objects it stands in these are the 32 that
/// cryptsetup reads in a header. Of a header with more it knows nothing any longer.
const MAX_LEVELS: usize = 30;

/// A calendar day as `YYYY-MM-DD`: the Unix time of its beginning, UTC.
pub fn parse_date(text: &str) -> Result<u64, String> {
    let bad = || "expected a day such as 2027-03-31".to_owned();
    let parts: Vec<&str> = text.split('-').collect();
    let [year, month, day] = parts.as_slice() else { return Err(bad()) };
    let number = |part: &str, length| {
        let digits = part.len() == length && part.bytes().all(|byte| byte.is_ascii_digit());
        part.parse::<u64>().ok().filter(|_| digits).ok_or_else(bad)
    };
    let (year, month, day) = (number(year, 4)?, number(month, 2)?, number(day, 2)?);
    if year < 1970 || !(1..=12).contains(&month) || !(1..=days_of(year, month)).contains(&day) {
        return Err(format!("there is no such day as {text} to come"));
    }
    let years: u64 = (1970..year).map(|year| if is_leap(year) { 366 } else { 365 }).sum();
    let months: u64 = (1..month).map(|month| days_of(year, month)).sum();
    Ok((years + months + day - 1) * 86_400)
}

/// The day of a Unix time, UTC, as `YYYY-MM-DD`.
pub fn date_of(seconds: u64) -> String {
    let mut days = seconds / 86_400;
    let (mut year, mut month) = (1970, 1);
    // 9999 is the last year the form has room for.
    while year < 9999 && days >= 365 + u64::from(is_leap(year)) {
        days -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    while month < 12 && days >= days_of(year, month) {
        days -= days_of(year, month);
        month += 1;
    }
    format!("{year:04}-{month:02}-{:02}", days + 1)
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

fn days_of(year: u64, month: u64) -> u64 {
    match month {
        2 => 28 + u64::from(is_leap(year)),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Where a passphrase is kept: `PROVIDER:REST`.
pub fn check_ref(text: &str, option: &str) -> Result<()> {
    let letter = |byte: u8| byte.is_ascii_lowercase();
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'+');
    let provider = text.split_once(':').filter(|(_, rest)| !rest.is_empty()).map(|(provider, _)| provider);
    let fits = provider
        .is_some_and(|provider| provider.bytes().next().is_some_and(letter) && provider.bytes().all(plain));
    if !fits || text.len() > 1024 || !text.bytes().all(|byte| (0x20..0x7f).contains(&byte)) {
        return Err(Error::usage(format!(
            "{option}: expected PROVIDER:REST, such as barbican:ID or file:PATH"
        ))
        .hint("it says where the passphrase is kept, and stands readable in the header"));
    }
    if matches!(provider, Some("fd" | "prompt" | "pass" | "env")) {
        return Err(Error::usage(format!(
            "{option}: means nothing to anybody else, or would be the secret itself"
        ))
        .hint("name a place that lasts, such as barbican:ID, keyring:NAME or file:PATH"));
    }
    Ok(())
}

/// The token in `path`, or on standard input.
pub fn read(path: &Path) -> Result<Value> {
    let shown = path.display();
    let failed = |error: std::io::Error| Error::io("cannot read the token", &shown, error);
    let mut text = Vec::new();
    let from: Box<dyn Read> = if endpoint::is_dash(path) {
        Box::new(std::io::stdin().lock())
    } else {
        Box::new(File::open(path).map_err(failed)?)
    };
    from.take(MAX_TEXT + 1).read_to_end(&mut text).map_err(failed)?;
    parse(&text, &shown.to_string())
}

fn parse(text: &[u8], shown: &str) -> Result<Value> {
    let cannot = |why: String| Error::usage(format!("{shown}: {why}"));
    if u64::try_from(text.len()).map_or(true, |length| length > MAX_TEXT) {
        return Err(cannot(format!("longer than the {MAX_TEXT} bytes of a request")));
    }
    let value: Value = serde_json::from_slice(text).map_err(|error| cannot(format!("not JSON: {error}")))?;
    // What one reader takes the first of and another the last is not stored at all.
    serde_json::from_slice::<NamedOnce>(text).map_err(|error| cannot(error.to_string()))?;
    if levels(&value) > MAX_LEVELS {
        return Err(cannot(format!("more than {MAX_LEVELS} values inside one another")));
    }
    let hint = r#"such as {"type":"NAME","keyslots":["0"],…}"#;
    let Some(object) = value.as_object() else {
        return Err(cannot("not a JSON object".to_owned()).hint(hint));
    };
    if object.get("type").and_then(Value::as_str).is_none_or(str::is_empty) {
        return Err(cannot("a token needs a `type` that is text".to_owned()).hint(hint));
    }
    Ok(value)
}

/// Values inside one another, the outermost counted. The parser has bounded them.
fn levels(value: &Value) -> usize {
    let inner = match value {
        Value::Array(list) => list.iter().map(levels).max(),
        Value::Object(object) => object.values().map(levels).max(),
        _ => None,
    };
    1 + inner.unwrap_or(0)
}

/// Any JSON value in which no object has a name twice.
struct NamedOnce;

impl<'de> Deserialize<'de> for NamedOnce {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NamedOnceVisitor)
    }
}

struct NamedOnceVisitor;

impl<'de> Visitor<'de> for NamedOnceVisitor {
    type Value = NamedOnce;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, _: bool) -> Result<NamedOnce, E> {
        Ok(NamedOnce)
    }

    fn visit_i64<E>(self, _: i64) -> Result<NamedOnce, E> {
        Ok(NamedOnce)
    }

    fn visit_u64<E>(self, _: u64) -> Result<NamedOnce, E> {
        Ok(NamedOnce)
    }

    fn visit_f64<E>(self, _: f64) -> Result<NamedOnce, E> {
        Ok(NamedOnce)
    }

    fn visit_str<E>(self, _: &str) -> Result<NamedOnce, E> {
        Ok(NamedOnce)
    }

    fn visit_unit<E>(self) -> Result<NamedOnce, E> {
        Ok(NamedOnce)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<NamedOnce, A::Error> {
        while list.next_element::<NamedOnce>()?.is_some() {}
        Ok(NamedOnce)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<NamedOnce, A::Error> {
        let mut names = HashSet::new();
        while let Some((name, NamedOnce)) = object.next_entry::<String, NamedOnce>()? {
            if !names.insert(name) {
                return Err(A::Error::custom("an object has a name twice"));
            }
        }
        Ok(NamedOnce)
    }
}

/// Our own token: `key_ref` names where the passphrase of `keyslots` is kept since `now`, `rotate_by` the Unix time by
/// which it must be replaced.
pub fn ours(key_ref: &str, rotate_by: Option<u64>, keyslots: &[u32], now: u64) -> Value {
    let mut sorted = keyslots.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    let keyslots: Vec<String> = sorted.iter().map(u32::to_string).collect();
    // Times are text, as every 64-bit number of the format.
    let mut token = json!({
        "type": TYPE, "keyslots": keyslots, "version": 1, "ref": key_ref, "created": now.to_string()
    });
    if let Some(rotate_by) = rotate_by {
        token["rotate_by"] = rotate_by.to_string().into();
    }
    token
}

/// Seconds since 1970.
pub fn now() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

/// The type of our own tokens.
pub const TYPE: &str = "cryptctl-key";

/// What a token says beside its type and keyslots: ours in words, others as one line of JSON.
pub fn describe(token: &Map<String, Value>) -> String {
    let text = |name: &str| token.get(name).and_then(Value::as_str);
    if text("type") == Some(TYPE) {
        let day = |name: &str| text(name).and_then(|seconds| seconds.parse().ok()).map(date_of);
        let when =
            |name: &str, words: &str| day(name).map(|day| format!(", {words} {day}")).unwrap_or_default();
        return format!(
            "{}{}{}{}",
            text("ref").unwrap_or("-"),
            when("created", "since"),
            when("rotated", "replaced"),
            when("rotate_by", "to be replaced by")
        );
    }
    let rest: Map<String, Value> = token
        .iter()
        .filter(|(name, _)| !matches!(name.as_str(), "type" | "keyslots"))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    if rest.is_empty() { "-".to_owned() } else { Value::Object(rest).to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_days_of_the_calendar_are_days() {
        for (day, seconds) in [
            ("1970-01-01", 0),
            ("1970-12-31", 364 * 86_400),
            ("2000-02-29", 951_782_400),
            ("2027-03-31", 1_806_451_200),
            ("2100-03-01", 4_107_542_400),
            ("9999-12-31", 253_402_214_400),
        ] {
            assert_eq!(parse_date(day), Ok(seconds), "{day}");
            assert_eq!((date_of(seconds), date_of(seconds + 86_399)), (day.to_owned(), day.to_owned()));
        }
        for bad in [
            "",
            "2027",
            "2027-3-31",
            "2027-03-32",
            "2027-02-29",
            "2100-02-29",
            "2027-13-01",
            "2027-00-01",
            "2027-01-00",
            "1969-12-31",
            "27-01-01",
            "2027-01-01-",
            "2027-01-0x",
            "+027-01-01",
            "31.03.2027",
        ] {
            assert!(parse_date(bad).is_err(), "{bad}");
        }
        assert!(date_of(u64::MAX).starts_with("9999-12-"));
    }

    #[test]
    fn a_reference_names_a_place_and_is_not_repeated() {
        for good in ["barbican:0f3c", "file:/a b", "keyring:x", "s3+a-1:x"] {
            assert!(check_ref(good, "--key-ref").is_ok(), "{good}");
        }
        for bad in [
            "hunter2",
            "hunter2:",
            ":hunter2",
            "A:hunter2",
            "1a:hunter2",
            "a b:hunter2",
            "fd:3",
            "prompt",
            "pass:hunter2",
            "env:hunter2",
            "x:hunter2\u{7f}",
            "x:hunter2é",
        ] {
            let error = check_ref(bad, "--key-ref").expect_err(bad).to_string();
            assert!(!error.contains("hunter2"), "{error}");
        }
        assert!(check_ref(&format!("x:{}", "y".repeat(1023)), "--key-ref").is_err());
    }

    #[test]
    fn a_token_is_an_object_with_a_type() {
        assert!(parse(br#"{"type":"x","keyslots":["0","31"],"more":{"a":1}}"#, "t").is_ok());
        for bad in [
            "",
            "[]",
            "3",
            "{}",
            r#"{"keyslots":[]}"#,
            r#"{"type":""}"#,
            r#"{"type":3}"#,
            r#"{"type":"x"} x"#,
        ] {
            let error = parse(bad.as_bytes(), "t").expect_err(bad);
            assert_eq!(error.exit as u8, 2, "{error}");
        }
        let long = format!(r#"{{"type":"x","keyslots":[],"y":"{}"}}"#, "z".repeat(proto::MAX_LINE));
        assert!(parse(long.as_bytes(), "t").expect_err("long").to_string().contains("longer than the 65536"));
    }

    #[test]
    fn a_name_that_stands_twice_is_refused_wherever_it_stands() {
        for bad in [
            r#"{"type":"x","keyslots":[],"type":"y"}"#,
            r#"{"type":"x","a":[1,{"b":1.5e3,"c":null,"b":2}]}"#,
            r#"{"type":"x","a":{"b":{},"\u0062":-1}}"#,
        ] {
            let error = parse(bad.as_bytes(), "t").expect_err(bad);
            assert!(error.to_string().contains("t: an object has a name twice"), "{error}");
            assert_eq!(error.exit as u8, 2, "{error}");
        }
        let good = r#"{"type":"x","a":{"type":true},"b":[{"c":1},{"c":"y"},-3,1.5,null]}"#;
        assert!(parse(good.as_bytes(), "t").is_ok());
    }

    #[test]
    fn a_token_is_no_deeper_than_cryptsetup_reads() {
        let nested = |arrays: usize, inmost: &str| {
            let (open, close) = ("[".repeat(arrays), "]".repeat(arrays));
            parse(format!(r#"{{"type":"x","n":{open}{inmost}{close}}}"#).as_bytes(), "t")
        };
        // As cryptsetup 2.6 and its json-c have it: a value in the inmost array is a level too.
        for (arrays, inmost, good) in
            [(28, "1", true), (29, "", true), (29, "1", false), (30, "", false), (60, "", false)]
        {
            assert_eq!(nested(arrays, inmost).is_ok(), good, "{arrays} {inmost:?}");
        }
        let error = nested(30, "").expect_err("deep");
        assert!(error.to_string().contains("more than 30 values inside one another"), "{error}");
        assert!(nested(100_000, "").expect_err("deeper").to_string().contains("longer than"));
        assert!(nested(20_000, "").expect_err("deep").to_string().contains("not JSON"));
    }

    #[test]
    fn our_token_says_where_and_until_when() {
        let token = ours("barbican:1", Some(1_806_451_200), &[3, 0, 3], 1_000_000_000);
        assert_eq!(
            token.to_string(),
            r#"{"type":"cryptctl-key","keyslots":["0","3"],"version":1,"ref":"barbican:1","created":"1000000000","rotate_by":"1806451200"}"#
        );
        assert!(parse(token.to_string().as_bytes(), "t").is_ok());
        let words = |token: &Value| describe(token.as_object().expect("an object"));
        assert_eq!(words(&token), "barbican:1, since 2001-09-09, to be replaced by 2027-03-31");
        assert_eq!(words(&ours("file:/k", None, &[0], 0)), "file:/k, since 1970-01-01");
        assert_eq!(words(&json!({ "type": "x", "keyslots": [], "y": 1 })), r#"{"y":1}"#);
        assert_eq!(words(&json!({ "type": "x", "keyslots": [] })), "-");
    }
}
