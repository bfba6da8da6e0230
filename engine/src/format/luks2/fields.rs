//! Fields of the metadata's objects by their types on disk: what is missing or of another type is named in the error.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value};

use crate::error::{Error, ErrorKind, Result};
use crate::format::luks2::json::excerpt;

/// An object of the metadata and where it is.
pub struct Fields<'a> {
    at: String,
    object: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// `at`: `keyslot 3`.
    pub fn of(at: String, value: &'a Value) -> Result<Self> {
        match value {
            Value::Object(object) => Ok(Self { at, object }),
            _ => Err(invalid("not an object", &at)),
        }
    }

    /// The same of an object that was kept as one.
    pub fn of_object(at: String, object: &'a Map<String, Value>) -> Self {
        Self { at, object }
    }

    /// The same for the top level.
    pub fn top(object: &'a Map<String, Value>) -> Self {
        Self { at: String::from("metadata"), object }
    }

    /// All of it.
    pub fn object(&self) -> &'a Map<String, Value> {
        self.object
    }

    /// Is there such a field?
    pub fn has(&self, key: &str) -> bool {
        self.object.contains_key(key)
    }

    /// An error about this object.
    pub fn wrong(&self, what: impl Into<String>) -> Error {
        invalid(what, &self.at)
    }

    /// An error about a field.
    pub fn wrong_field(&self, key: &str, what: impl Into<String>) -> Error {
        invalid(what, &format!("{} {key}", self.at))
    }

    fn field(&self, key: &str) -> Result<&'a Value> {
        self.object.get(key).ok_or_else(|| self.wrong(format!("field {key} is missing")))
    }

    /// An object in it.
    pub fn child(&self, key: &str) -> Result<Fields<'a>> {
        Fields::of(format!("{} {key}", self.at), self.field(key)?)
    }

    /// An array.
    pub fn array(&self, key: &str) -> Result<&'a [Value]> {
        match self.field(key)? {
            Value::Array(values) => Ok(values),
            _ => Err(self.wrong_field(key, "not an array")),
        }
    }

    /// A text that is not empty and has no NUL.
    pub fn text(&self, key: &str) -> Result<&'a str> {
        match self.field(key)? {
            Value::String(text) if text.is_empty() => Err(self.wrong_field(key, "empty text")),
            Value::String(text) if text.contains('\0') => Err(self.wrong_field(key, "text with a NUL")),
            Value::String(text) => Ok(text),
            _ => Err(self.wrong_field(key, "not a text")),
        }
    }

    /// A 64-bit number: a text of decimal digits, as JSON numbers do not hold so many bits everywhere.
    pub fn u64(&self, key: &str) -> Result<u64> {
        let text = self.text(key)?;
        decimal(text).ok_or_else(|| {
            self.wrong_field(key, format!("not a 64-bit number in decimal digits: {}", excerpt(text)))
        })
    }

    /// A 32-bit number: a JSON number.
    pub fn u32(&self, key: &str) -> Result<u32> {
        let value = self.field(key)?;
        value
            .as_u64()
            .and_then(|number| u32::try_from(number).ok())
            .ok_or_else(|| self.wrong_field(key, "not a 32-bit number"))
    }

    /// Bytes in base64.
    pub fn base64(&self, key: &str) -> Result<Vec<u8>> {
        let text = self.text(key)?;
        STANDARD.decode(text).map_err(|error| self.wrong_field(key, "not base64").because(error))
    }

    /// Texts, if the field is there.
    pub fn texts(&self, key: &str) -> Result<Vec<String>> {
        if !self.has(key) {
            return Ok(Vec::new());
        }
        let text = |value: &Value| match value {
            Value::String(text) => Ok(text.clone()),
            _ => Err(self.wrong_field(key, "an element is not a text")),
        };
        self.array(key)?.iter().map(text).collect()
    }

    /// Numbers of other objects: texts of decimal digits.
    pub fn references(&self, key: &str) -> Result<Vec<u32>> {
        let number = |value: &Value| match value {
            Value::String(text) => {
                decimal(text).and_then(|number| u32::try_from(number).ok()).ok_or_else(|| {
                    self.wrong_field(key, format!("not the number of an object: {}", excerpt(text)))
                })
            }
            _ => Err(self.wrong_field(key, "an element is not a text")),
        };
        self.array(key)?.iter().map(number).collect()
    }

    /// All fields but these.
    pub fn others(&self, known: &[&str]) -> Map<String, Value> {
        self.object
            .iter()
            .filter(|(key, _)| !known.contains(&key.as_str()))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect()
    }

    /// The objects of this one by number, each below `limit`. `what`: `keyslot`.
    pub fn numbered(&self, what: &'static str, limit: u32) -> Result<Vec<(u32, Fields<'a>)>> {
        let one = |(key, value): (&String, &'a Value)| {
            let number = decimal(key)
                .and_then(|number| u32::try_from(number).ok())
                .filter(|number| *number < limit)
                .ok_or_else(|| {
                    self.wrong(format!("not a {what} number 0..={}: {}", limit - 1, excerpt(key)))
                })?;
            Ok((number, Fields::of(format!("{what} {number}"), value)?))
        };
        self.object.iter().map(one).collect()
    }
}

/// `Invalid`, at an object of the metadata.
pub fn invalid(what: impl Into<String>, at: &str) -> Error {
    Error::new(ErrorKind::Invalid, what).at(format_args!("LUKS2 {at}"))
}

/// Decimal digits as they are written: no sign, no space, no leading zero.
fn decimal(text: &str) -> Option<u64> {
    let canonical = text.bytes().all(|byte| byte.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    if canonical { text.parse().ok() } else { None }
}

/// Bytes as on disk.
pub fn to_base64(bytes: &[u8]) -> Value {
    Value::String(STANDARD.encode(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sixty_four_bits_are_plain_digits() {
        for (text, number) in [
            ("0", Some(0)),
            ("18446744073709551615", Some(u64::MAX)),
            ("18446744073709551616", None),
            ("", None),
            ("00", None),
            ("01", None),
            ("+1", None),
            ("-1", None),
            (" 1", None),
            ("1 ", None),
            ("0x10", None),
            ("1e3", None),
            ("\u{661}", None),
        ] {
            assert_eq!(decimal(text), number, "{text:?}");
        }
    }
}
