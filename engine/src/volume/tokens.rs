//! Tokens of LUKS2 headers: how to unlock a keyslot, written in the header itself.
//!
//! Any token may be added whose type is not reserved: `luks2-…` belongs to the format, of which only `luks2-keyring` (exactly
//! `type`, `keyslots`, `key_description`) is known. Unknown fields are kept as they are.
//!
//! # Our own: `cryptctl-key`
//! Where the passphrase of its keyslots lives, and when it must be replaced by another. It holds a reference and never a
//! secret; fields that are not in this table are refused, so that none can slip in.
//!
//! | field | type | rule |
//! |---|---|---|
//! | `type` | string | `cryptctl-key` |
//! | `keyslots` | array of strings | the keyslots that passphrase opens; at least one when it is added |
//! | `version` | number | 1 |
//! | `ref` | string | `PROVIDER:REST`, such as `barbican:0f3c…`; provider: `a` to `z`, digits, `-`, `+`, first a letter; 3 to 1024 bytes of printable ASCII in all; not `fd:`, `prompt:`, `pass:` or `env:`, which mean nothing to anybody else or would hold the secret |
//! | `created` | string | when the passphrase was first put there: seconds since 1970-01-01 00:00 UTC, decimal digits, no leading zero |
//! | `rotated` | string, optional | when it was last replaced, likewise; not before `created` |
//! | `rotate_by` | string, optional | when it must be replaced at the latest, likewise; after `created` and `rotated` |
//!
//! Times are strings because the format writes every 64-bit number as one. cryptsetup keeps tokens of types it does not know
//! untouched, but for `keyslots`, from which a destroyed keyslot vanishes; the token then remains with an empty list.

use proto::luks::Done;
use serde_json::{Map, Value};

use crate::backend::blocking::Blocking;
use crate::error::{Error, ErrorKind, Result};
use crate::format::luks2::Loaded;
use crate::format::luks2::json::{DEPTH_MAX, depth, has_float};
use crate::format::luks2::metadata::{Metadata, Token};
use crate::format::luks2::validate::OBJECTS_MAX;
use crate::volume::keyslots::load_to_change;
use crate::volume::{Header, store};

/// Type of our own token.
pub const KEY_TOKEN: &str = "cryptctl-key";
/// Version of our own token.
const KEY_TOKEN_VERSION: u64 = 1;
/// Longest `ref`, bytes.
const REF_BYTES_MAX: usize = 1024;
/// Values inside one another: what the metadata may have, less the two objects a token lies in.
const TOKEN_DEPTH_MAX: usize = DEPTH_MAX - 2;
/// Providers that name nothing another program or another day could use, or that hold the secret itself.
const REFUSED_PROVIDERS: [&str; 4] = ["fd", "prompt", "pass", "env"];

/// What a `cryptctl-key` token says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyToken {
    /// Where the passphrase lives: `PROVIDER:REST`.
    pub reference: String,
    /// Seconds since 1970 (UTC): when it was first put there.
    pub created: u64,
    /// Likewise: when it was last replaced.
    pub rotated: Option<u64>,
    /// Likewise: when it must be replaced at the latest.
    pub rotate_by: Option<u64>,
}

impl KeyToken {
    /// Read and judge one: every field but `type` and `keyslots`.
    ///
    /// # Errors
    /// `Invalid`, naming the field and the rule.
    pub fn parse(fields: &Map<String, Value>) -> Result<Self> {
        let known = ["version", "ref", "created", "rotated", "rotate_by"];
        if let Some(unknown) = fields.keys().find(|name| !known.contains(&name.as_str())) {
            return Err(wrong(format!("a {KEY_TOKEN} token has no field {unknown:?}")));
        }
        if fields.get("version").and_then(Value::as_u64) != Some(KEY_TOKEN_VERSION) {
            return Err(wrong(format!("the `version` of a {KEY_TOKEN} token must be {KEY_TOKEN_VERSION}")));
        }
        let reference = fields.get("ref").and_then(Value::as_str).unwrap_or_default();
        check_reference(reference)?;
        let created =
            time(fields, "created")?.ok_or_else(|| wrong(format!("a {KEY_TOKEN} token needs `created`")))?;
        let (rotated, rotate_by) = (time(fields, "rotated")?, time(fields, "rotate_by")?);
        if rotated.is_some_and(|rotated| rotated < created) {
            return Err(wrong("`rotated` is before `created`"));
        }
        if rotate_by.is_some_and(|rotate_by| rotate_by <= rotated.unwrap_or(created)) {
            return Err(wrong("`rotate_by` must be after `created` and `rotated`"));
        }
        Ok(Self { reference: reference.to_owned(), created, rotated, rotate_by })
    }
}

/// Add a token, or replace one.
///
/// # Errors
/// `Unsupported`: LUKS1 has no tokens. `Invalid`: the token breaks a rule, which is named. `Conflict`: the number is taken, or all
/// are. `NoSpace`: it does not fit the JSON area. Else of the device.
pub fn add(device: &mut Blocking, token: &Value, id: Option<u32>, replace: bool) -> Result<Done> {
    let mut loaded = load(device)?;
    let metadata = &mut loaded.header.metadata;
    let token = check(token, metadata)?;
    let taken = |id: &u32| metadata.tokens.contains_key(id);
    let id = match id {
        Some(id) if id >= OBJECTS_MAX => {
            return Err(wrong(format!("there is no token {id}: they are numbered 0 to {}", OBJECTS_MAX - 1)));
        }
        Some(id) if taken(&id) && !replace => {
            let error =
                Error::new(ErrorKind::Conflict, format!("token {id} exists already")).at(device.name());
            return Err(error.hint("say that it may be replaced, or leave the number out"));
        }
        Some(id) => id,
        None => (0..OBJECTS_MAX).find(|id| !taken(id)).ok_or_else(|| {
            Error::new(ErrorKind::Conflict, format!("all {OBJECTS_MAX} tokens are in use")).at(device.name())
        })?,
    };
    metadata.tokens.insert(id, token);
    finish(device, loaded, id)
}

/// Remove a token. Its keyslots stay.
///
/// # Errors
/// `Unsupported`: LUKS1 has no tokens. `NotFound`. Else of the device.
pub fn remove(device: &mut Blocking, id: u32) -> Result<Done> {
    let mut loaded = load(device)?;
    if loaded.header.metadata.tokens.remove(&id).is_none() {
        return Err(Error::new(ErrorKind::NotFound, format!("there is no token {id}")).at(device.name()));
    }
    finish(device, loaded, id)
}

/// All tokens as on disk, by number.
///
/// # Errors
/// Of the device, and of [`Header::load`].
pub fn list(device: &mut Blocking) -> Result<Map<String, Value>> {
    match Header::load(device)? {
        Header::Luks1(_) => Ok(Map::new()),
        Header::Luks2(loaded) => match loaded.header.metadata.to_json().get_mut("tokens").map(Value::take) {
            Some(Value::Object(tokens)) => Ok(tokens),
            _ => Ok(Map::new()),
        },
    }
}

fn load(device: &mut Blocking) -> Result<Loaded> {
    match load_to_change(device)? {
        Header::Luks2(loaded) => Ok(*loaded),
        Header::Luks1(_) => {
            let error = Error::new(ErrorKind::Unsupported, "LUKS1 headers have no tokens").at(device.name());
            Err(error.hint("`cryptsetup convert --type luks2` makes a LUKS2 volume of it"))
        }
    }
}

fn finish(device: &mut Blocking, mut loaded: Loaded, id: u32) -> Result<Done> {
    loaded.header.check()?;
    store::write_luks2(device, &mut loaded)?;
    Ok(Done { token: Some(id), uuid: loaded.header.uuid.clone(), ..Done::default() })
}

/// Every rule about a token that comes from outside.
fn check(token: &Value, metadata: &Metadata) -> Result<Token> {
    let Value::Object(object) = token else { return Err(wrong("a token is a JSON object")) };
    if depth(token) > TOKEN_DEPTH_MAX {
        return Err(wrong(format!("a token has at most {TOKEN_DEPTH_MAX} values inside one another")));
    }
    if has_float(token) {
        return Err(wrong(
            "a number in the token is no 64-bit integer, and others are not kept as they are written",
        )
        .hint("write it as text"));
    }
    let kind = object.get("type").and_then(Value::as_str).filter(|kind| !kind.is_empty());
    let kind = kind.ok_or_else(|| wrong("a token needs a `type`, a string"))?;
    let keyslots = keyslots_of(object)?;
    if let Some(missing) = keyslots.iter().find(|id| !metadata.keyslots.contains_key(id)) {
        return Err(wrong(format!("the token names keyslot {missing}, which is not in use")));
    }
    let mut extra = object.clone();
    extra.remove("type");
    extra.remove("keyslots");
    match kind {
        KEY_TOKEN => {
            KeyToken::parse(&extra)?;
            if keyslots.is_empty() {
                return Err(wrong(format!("a {KEY_TOKEN} token names the keyslots its passphrase opens")));
            }
        }
        "luks2-keyring" => {
            let description = extra.get("key_description").and_then(Value::as_str);
            if extra.len() != 1 || description.is_none_or(str::is_empty) {
                return Err(wrong(
                    "a luks2-keyring token has `type`, `keyslots` and `key_description`, a string, and nothing else",
                ));
            }
        }
        _ if kind.starts_with("luks2-") => {
            let what = format!("token types that begin with `luks2-` belong to the format: {kind:?}");
            return Err(wrong(what));
        }
        _ => {}
    }
    Ok(Token { kind: kind.to_owned(), keyslots, extra })
}

fn keyslots_of(object: &Map<String, Value>) -> Result<Vec<u32>> {
    let rule = || wrong("a token needs `keyslots`, an array of strings of decimal numbers, each once");
    let list = object.get("keyslots").and_then(Value::as_array).ok_or_else(rule)?;
    let mut ids = Vec::with_capacity(list.len());
    for item in list {
        let text = item.as_str().ok_or_else(rule)?;
        let id: u32 = text.parse().map_err(|_| rule())?;
        if id.to_string() != text || ids.contains(&id) {
            return Err(rule());
        }
        ids.push(id);
    }
    Ok(ids)
}

fn check_reference(reference: &str) -> Result<()> {
    let rule =
        || wrong(format!("the `ref` of a {KEY_TOKEN} token must be PROVIDER:REST, such as barbican:ID"));
    let (provider, rest) = reference.split_once(':').ok_or_else(rule)?;
    let letters = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-+".contains(&byte);
    let named = provider.bytes().next().is_some_and(|first| first.is_ascii_lowercase());
    let printable = rest.bytes().all(|byte| byte.is_ascii_graphic());
    if !named
        || !provider.bytes().all(letters)
        || rest.is_empty()
        || !printable
        || reference.len() > REF_BYTES_MAX
    {
        return Err(rule());
    }
    if REFUSED_PROVIDERS.contains(&provider) {
        return Err(wrong(format!("a {KEY_TOKEN} token cannot refer to `{provider}:`"))
            .hint("name a place where the passphrase will still be: a key manager, or a file"));
    }
    Ok(())
}

fn time(fields: &Map<String, Value>, name: &str) -> Result<Option<u64>> {
    let Some(value) = fields.get(name) else { return Ok(None) };
    let text = value.as_str().unwrap_or_default();
    let seconds = text.parse::<u64>().ok().filter(|seconds| seconds.to_string() == text);
    seconds
        .map(Some)
        .ok_or_else(|| wrong(format!("`{name}` must be seconds since 1970 as a string of decimal digits")))
}

fn wrong(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Invalid, what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn key_token(change: impl FnOnce(&mut Map<String, Value>)) -> Result<KeyToken> {
        let mut fields = json!({
            "version": 1,
            "ref": "barbican:0f3c",
            "created": "1700000000",
            "rotated": "1700000001",
            "rotate_by": "1800000000",
        });
        change(fields.as_object_mut().expect("an object"));
        KeyToken::parse(fields.as_object().expect("an object"))
    }

    #[test]
    fn a_key_token_says_where_and_until_when() {
        let token = key_token(|_| ()).expect("good");
        assert_eq!(token.reference, "barbican:0f3c");
        assert_eq!(
            (token.created, token.rotated, token.rotate_by),
            (1_700_000_000, Some(1_700_000_001), Some(1_800_000_000))
        );
        let least = key_token(|fields| fields.retain(|name, _| !name.starts_with("rotat"))).expect("good");
        assert_eq!((least.rotated, least.rotate_by), (None, None));
    }

    #[test]
    fn every_broken_rule_of_a_key_token_is_refused() {
        let set = |name: &'static str, value: Value| {
            key_token(move |fields| {
                fields.insert(name.to_owned(), value);
            })
            .expect_err(name)
            .chain()
        };
        assert!(set("secret", json!("hunter2")).contains("has no field \"secret\""));
        assert!(set("version", json!(2)).contains("`version`"));
        for reference in
            ["", "barbican", ":x", "barbican:", "Barbican:x", "1x:y", "a b:c", "a:b c", "a:\u{e9}"]
        {
            assert!(set("ref", json!(reference)).contains("PROVIDER:REST"), "{reference}");
        }
        assert!(set("ref", json!(format!("file:{}", "x".repeat(1020)))).contains("PROVIDER:REST"));
        assert!(set("ref", json!("fd:3")).contains("cannot refer to"));
        for time in
            [json!(1), json!("01"), json!("-1"), json!(""), json!("1e9"), json!("99999999999999999999")]
        {
            assert!(set("created", time).contains("seconds since 1970"));
        }
        assert!(set("rotated", json!("1699999999")).contains("before `created`"));
        assert!(set("rotate_by", json!("1700000001")).contains("must be after"));
        let missing = key_token(|fields| drop(fields.remove("created"))).expect_err("refused");
        assert!(missing.chain().contains("needs `created`"));
    }
}
