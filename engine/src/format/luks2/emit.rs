//! From structures to JSON: fields in the order they were read in, new ones where cryptsetup has them.

use serde_json::{Map, Value, json};

use crate::crypto::kdf::Argon2Kind;
use crate::format::luks2::fields::to_base64;
use crate::format::luks2::metadata::{
    Area, Config, Digest, KdfText, Keyslot, Luks2Keyslot, Metadata, Segment, SegmentKind, Token,
};

/// The on-disk JSON.
pub fn metadata(metadata: &Metadata) -> Value {
    let was = metadata.as_read.object();
    let mut top = Map::new();
    top.insert("keyslots".into(), numbered(&metadata.keyslots, child(was, "keyslots"), keyslot));
    top.insert(
        "tokens".into(),
        numbered(&metadata.tokens, child(was, "tokens"), |token, _| self::token(token)),
    );
    top.insert("segments".into(), numbered(&metadata.segments, child(was, "segments"), segment));
    // A digest of nothing checks nothing: it goes with its last keyslot and segment.
    let digests = metadata.digests.iter().filter(|(_, digest)| !digest.is_unused());
    top.insert("digests".into(), numbered(digests, None, |digest, _| self::digest(digest)));
    top.insert("config".into(), config(&metadata.config, child(was, "config")).into());
    merge(&mut top, &metadata.extra);
    arrange(&mut top, was);
    Value::Object(top)
}

fn child<'a>(object: &'a Map<String, Value>, key: &str) -> Option<&'a Map<String, Value>> {
    object.get(key).and_then(Value::as_object)
}

/// `one` is told what the object of that number was when it was read.
fn numbered<'a, T: 'a>(
    objects: impl IntoIterator<Item = (&'a u32, &'a T)>,
    was: Option<&Map<String, Value>>,
    one: impl Fn(&T, Option<&Map<String, Value>>) -> Map<String, Value>,
) -> Value {
    let pair = |(id, object): (&u32, &T)| {
        let id = id.to_string();
        let was = was.and_then(|was| child(was, &id));
        let object = Value::Object(one(object, was));
        (id, object)
    };
    objects.into_iter().map(pair).collect()
}

/// The fields of a `json!` object.
fn fields(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(object) => object,
        other => unreachable!("an object was built, not {other}"),
    }
}

/// A field that says nothing (an empty list, a default) is written only if it was there and said the same.
fn insert_if_said(
    fields: &mut Map<String, Value>,
    was: Option<&Map<String, Value>>,
    key: &str,
    value: Value,
    says_nothing: bool,
) {
    if !says_nothing || was.and_then(|was| was.get(key)) == Some(&value) {
        fields.insert(key.to_owned(), value);
    }
}

/// Adds fields we do not know; where both are objects, theirs go into ours.
fn merge(ours: &mut Map<String, Value>, extra: &Map<String, Value>) {
    for (key, value) in extra {
        match (ours.get_mut(key), value) {
            (Some(Value::Object(ours)), Value::Object(theirs)) => merge(ours, theirs),
            (Some(_), _) => {}
            (None, _) => drop(ours.insert(key.clone(), value.clone())),
        }
    }
}

/// Puts fields into the order they were read in, new ones last.
fn arrange(fields: &mut Map<String, Value>, was: &Map<String, Value>) {
    let mut arranged = Map::with_capacity(fields.len());
    for (key, was) in was {
        if let Some(mut value) = fields.get_mut(key).map(Value::take) {
            if let (Value::Object(value), Value::Object(was)) = (&mut value, was) {
                arrange(value, was);
            }
            arranged.insert(key.clone(), value);
        }
    }
    for (key, value) in fields.iter_mut() {
        if !was.contains_key(key) {
            arranged.insert(key.clone(), value.take());
        }
    }
    *fields = arranged;
}

fn text(number: u64) -> Value {
    Value::String(number.to_string())
}

fn references(numbers: &[u32]) -> Value {
    numbers.iter().map(|number| Value::String(number.to_string())).collect()
}

/// The area of an object kept as a whole, in case it was moved.
fn with_area(object: &Map<String, Value>, area: Area) -> Map<String, Value> {
    let mut object = object.clone();
    if let Some(Value::Object(fields)) = object.get_mut("area") {
        fields.insert("offset".into(), text(area.offset));
        fields.insert("size".into(), text(area.size));
    }
    object
}

fn keyslot(keyslot: &Keyslot, was: Option<&Map<String, Value>>) -> Map<String, Value> {
    match keyslot {
        Keyslot::Luks2(keyslot) => luks2_keyslot(keyslot, was),
        Keyslot::Reencrypt { area, object } => with_area(object, *area),
        Keyslot::Unknown { area: Some(area), object, .. } => with_area(object, *area),
        Keyslot::Unknown { area: None, object, .. } => object.clone(),
    }
}

fn luks2_keyslot(keyslot: &Luks2Keyslot, was: Option<&Map<String, Value>>) -> Map<String, Value> {
    let kdf = match &keyslot.kdf {
        KdfText::Pbkdf2 { hash, iterations } => json!({
            "type": "pbkdf2",
            "hash": hash,
            "iterations": iterations,
            "salt": to_base64(&keyslot.salt),
        }),
        KdfText::Argon2 { kind, time, memory_kib, lanes } => json!({
            "type": match kind { Argon2Kind::Argon2i => "argon2i", Argon2Kind::Argon2id => "argon2id" },
            "time": time,
            "memory": memory_kib,
            "cpus": lanes,
            "salt": to_base64(&keyslot.salt),
        }),
    };
    let mut object = fields(json!({
        "type": "luks2",
        "key_size": keyslot.key_size,
        "af": { "type": "luks1", "stripes": keyslot.af_stripes, "hash": keyslot.af_hash },
        "area": {
            "type": "raw",
            "offset": text(keyslot.area.offset),
            "size": text(keyslot.area.size),
            "encryption": keyslot.area_encryption,
            "key_size": keyslot.area_key_size,
        },
        "kdf": kdf,
    }));
    insert_if_said(&mut object, was, "priority", keyslot.priority.into(), keyslot.priority == 1);
    merge(&mut object, &keyslot.extra);
    object
}

fn token(token: &Token) -> Map<String, Value> {
    let mut object = fields(json!({ "type": token.kind, "keyslots": references(&token.keyslots) }));
    merge(&mut object, &token.extra);
    object
}

fn segment(segment: &Segment, was: Option<&Map<String, Value>>) -> Map<String, Value> {
    let kind = match &segment.kind {
        SegmentKind::Crypt { .. } => "crypt",
        SegmentKind::Linear => "linear",
        SegmentKind::Unknown(kind) => kind,
    };
    let mut object = fields(json!({
        "type": kind,
        "offset": text(segment.offset),
        "size": segment.size.map_or_else(|| Value::String("dynamic".into()), text),
    }));
    if let SegmentKind::Crypt { encryption, sector_size, iv_tweak, integrity } = &segment.kind {
        object.insert("iv_tweak".into(), text(*iv_tweak));
        object.insert("encryption".into(), encryption.as_str().into());
        object.insert("sector_size".into(), (*sector_size).into());
        if let Some(integrity) = integrity {
            object.insert("integrity".into(), integrity.clone());
        }
    }
    insert_if_said(&mut object, was, "flags", segment.flags.as_slice().into(), segment.flags.is_empty());
    merge(&mut object, &segment.extra);
    object
}

fn digest(digest: &Digest) -> Map<String, Value> {
    let mut object = fields(json!({
        "type": digest.kind,
        "keyslots": references(&digest.keyslots),
        "segments": references(&digest.segments),
    }));
    if digest.kind == "pbkdf2" {
        object.insert("hash".into(), digest.hash.as_str().into());
        object.insert("iterations".into(), digest.iterations.into());
        object.insert("salt".into(), to_base64(&digest.salt));
        object.insert("digest".into(), to_base64(&digest.digest));
    }
    merge(&mut object, &digest.extra);
    object
}

fn config(config: &Config, was: Option<&Map<String, Value>>) -> Map<String, Value> {
    let mut object = fields(json!({
        "json_size": text(config.json_size),
        "keyslots_size": text(config.keyslots_size),
    }));
    insert_if_said(&mut object, was, "flags", config.flags.as_slice().into(), config.flags.is_empty());
    let was_requirements = was.and_then(|was| child(was, "requirements"));
    let mut requirements = Map::new();
    let mandatory = config.requirements.as_slice().into();
    insert_if_said(
        &mut requirements,
        was_requirements,
        "mandatory",
        mandatory,
        config.requirements.is_empty(),
    );
    let says_nothing = requirements.is_empty();
    insert_if_said(&mut object, was, "requirements", requirements.into(), says_nothing);
    merge(&mut object, &config.extra);
    object
}
