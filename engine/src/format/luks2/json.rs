//! JSON of a header, read with bounds: hostile text can neither exhaust the stack nor take much more memory than it is long.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::error::{Error, ErrorKind, Result};

/// Values inside one another, the innermost (a number, a text) counted too. json-c, cryptsetup's parser, stops here.
pub const DEPTH_MAX: usize = 32;
/// Values of any kind. A full header (32 keyslots, tokens and segments each) has about two thousand.
const VALUES_MAX: usize = 64 * 1024;

/// The one object that `text` is: nothing before it, nothing after it, no key twice in any object.
///
/// # Errors
/// `Invalid`, saying where in the text.
pub fn read(text: &[u8]) -> Result<Map<String, Value>> {
    let invalid = |what: &str| Error::new(ErrorKind::Invalid, what.to_owned()).at("LUKS2 metadata");
    if text.first() != Some(&b'{') {
        return Err(invalid("JSON does not begin with {"));
    }
    let mut budget = Budget { values: VALUES_MAX };
    let mut deserializer = serde_json::Deserializer::from_slice(text);
    let value = AnyValue { budget: &mut budget, depth: 0 }
        .deserialize(&mut deserializer)
        .map_err(|error| invalid("not valid JSON").because(error))?;
    if text.last() != Some(&b'}') || deserializer.end().is_err() {
        return Err(invalid("bytes after the JSON text"));
    }
    match value {
        Value::Object(object) => Ok(object),
        _ => Err(invalid("JSON is not an object")),
    }
}

/// What may still be taken.
struct Budget {
    values: usize,
}

/// Reads one value `depth` containers deep.
struct AnyValue<'a> {
    budget: &'a mut Budget,
    depth: usize,
}

impl<'de> DeserializeSeed<'de> for AnyValue<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        if self.budget.values == 0 {
            return Err(D::Error::custom(format_args!("more than {VALUES_MAX} values")));
        }
        self.budget.values -= 1;
        if self.depth == DEPTH_MAX {
            return Err(D::Error::custom(format_args!("more than {DEPTH_MAX} values inside one another")));
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for AnyValue<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("not a finite number"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Value, A::Error> {
        let depth = self.depth + 1;
        let mut values = Vec::new();
        while let Some(value) = sequence.next_element_seed(AnyValue { budget: &mut *self.budget, depth })? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let depth = self.depth + 1;
        let mut object = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            if object.contains_key(&key) {
                return Err(A::Error::custom(format_args!("duplicate key {}", excerpt(&key))));
            }
            let value = map.next_value_seed(AnyValue { budget: &mut *self.budget, depth })?;
            object.insert(key, value);
        }
        Ok(Value::Object(object))
    }
}

/// How many values a value is deep; 1: nothing is in it.
#[must_use]
pub fn depth(value: &Value) -> usize {
    let inner = match value {
        Value::Array(values) => values.iter().map(depth).max(),
        Value::Object(object) => object.values().map(depth).max(),
        _ => None,
    };
    1 + inner.unwrap_or(0)
}

/// Is there a number in it that is no integer of 64 bits? Such a number is kept as the nearest that a `f64` can be, which need
/// not be written as it was.
#[must_use]
pub fn has_float(value: &Value) -> bool {
    match value {
        Value::Number(number) => number.is_f64(),
        Value::Array(values) => values.iter().any(has_float),
        Value::Object(object) => object.values().any(has_float),
        _ => false,
    }
}

/// The numbers of a valid JSON text, as they stand in it.
pub fn numbers(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = text;
    std::iter::from_fn(move || {
        loop {
            let (first, after) = rest.split_first()?;
            match first {
                b'"' => {
                    let mut escaped = false;
                    let end = after.iter().position(|byte| {
                        let ends = *byte == b'"' && !escaped;
                        escaped = *byte == b'\\' && !escaped;
                        ends
                    });
                    rest = after.get(end? + 1..)?;
                }
                b'-' | b'0'..=b'9' => {
                    let is_part = |byte: &u8| byte.is_ascii_digit() || b"+-.eE".contains(byte);
                    let length = rest.iter().position(|byte| !is_part(byte)).unwrap_or(rest.len());
                    let (number, after) = rest.split_at(length);
                    rest = after;
                    return Some(number);
                }
                _ => rest = after,
            }
        }
    })
}

/// A text of the header as a message may show it: quoted, escaped, and never long.
#[must_use]
pub fn excerpt(text: &str) -> String {
    const SHOWN: usize = 40;
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_survives_reading_and_writing() {
        let text = br#"{"z":1,"a":[true,null,-1,"x\u0001/"],"m":{"b":{},"a":[]}}"#;
        let value = Value::Object(read(text).expect("valid"));
        assert_eq!(serde_json::to_vec(&value).expect("json"), text);
    }

    #[test]
    fn depth_is_bounded_at_32() {
        for (arrays, inner, valid) in [
            (31, "", true),
            (32, "", false),
            (30, "0", true),
            (31, "0", false),
            (30, "\"x\"", true),
            (31, "null", false),
            (100_000, "", false),
        ] {
            let text = format!("{{\"a\":{}{inner}{}}}", "[".repeat(arrays), "]".repeat(arrays));
            let read = read(text.as_bytes());
            assert_eq!(read.is_ok(), valid, "{arrays} {inner}");
            if let Ok(object) = read {
                assert!(depth(&Value::Object(object)) <= DEPTH_MAX);
            }
        }
    }

    #[test]
    fn numbers_that_would_be_written_otherwise_are_noticed() {
        for (number, kept) in [
            ("0", true),
            ("-7", true),
            ("1.5", true),
            ("18446744073709551615", true),
            ("-9223372036854775808", true),
            ("18446744073709551616", false),
            ("1.10", false),
            ("1E2", false),
            ("-0", false),
        ] {
            let text = format!(r#"{{"a 1.10 \"1.10\" \\":[1,{{"b":{number}}},"1.10"]}}"#);
            let object = read(text.as_bytes()).expect("valid");
            let written = serde_json::to_vec(&object).expect("json");
            assert_eq!(numbers(text.as_bytes()).eq(numbers(&written)), kept, "{number}");
            let float = !matches!(number, "0" | "-7" | "18446744073709551615" | "-9223372036854775808");
            assert_eq!(has_float(&Value::Object(object)), float, "{number}");
        }
    }

    #[test]
    fn the_number_of_values_is_bounded() {
        // The object and the array count as well.
        for (values, valid) in [(VALUES_MAX - 2, true), (VALUES_MAX - 1, false)] {
            let text = format!("{{\"a\":[{}0]}}", "0,".repeat(values - 1));
            assert_eq!(read(text.as_bytes()).is_ok(), valid, "{values}");
        }
    }

    #[test]
    fn what_is_not_one_object_is_refused() {
        for text in
            ["", "[]", " {}", "{} ", "{}{}", "{", "{\"a\":1,\"a\":2}", "{\"b\":{\"a\":1,\"a\":2}}", "{'a':1}"]
        {
            let error = read(text.as_bytes()).expect_err(text);
            assert_eq!(error.kind(), ErrorKind::Invalid, "{text}");
        }
    }
}
