//! From JSON to structures: types of fields, and which fields an object of each type has.

use serde_json::{Map, Value};

use crate::crypto::kdf::Argon2Kind;
use crate::error::Result;
use crate::format::luks2::fields::Fields;
use crate::format::luks2::metadata::{
    Area, AsRead, Config, Digest, KdfText, Keyslot, Luks2Keyslot, Metadata, Segment, SegmentKind, Token,
};
use crate::format::luks2::validate::{DIGESTS_MAX, OBJECTS_MAX};

/// Structures of a header; no rule between objects is looked at here.
///
/// # Errors
/// `Invalid`, naming object and field.
pub fn metadata(object: &Map<String, Value>) -> Result<Metadata> {
    let top = Fields::top(object);
    let section = |name: &str| top.child(name);
    let keyslots = section("keyslots")?.numbered("keyslot", OBJECTS_MAX)?;
    let tokens = section("tokens")?.numbered("token", OBJECTS_MAX)?;
    let segments = section("segments")?.numbered("segment", OBJECTS_MAX)?;
    let digests = section("digests")?.numbered("digest", DIGESTS_MAX)?;
    Ok(Metadata {
        keyslots: keyslots.iter().map(|(id, fields)| Ok((*id, keyslot(fields)?))).collect::<Result<_>>()?,
        tokens: tokens.iter().map(|(id, fields)| Ok((*id, token(fields)?))).collect::<Result<_>>()?,
        segments: segments.iter().map(|(id, fields)| Ok((*id, segment(fields)?))).collect::<Result<_>>()?,
        digests: digests.iter().map(|(id, fields)| Ok((*id, digest(fields)?))).collect::<Result<_>>()?,
        config: config(&section("config")?)?,
        extra: top.others(&["keyslots", "tokens", "segments", "digests", "config"]),
        as_read: AsRead::default(),
    })
}

fn area(keyslot: &Fields<'_>) -> Result<(Area, String)> {
    let area = keyslot.child("area")?;
    Ok((Area { offset: area.u64("offset")?, size: area.u64("size")? }, area.text("type")?.to_owned()))
}

fn keyslot(fields: &Fields<'_>) -> Result<Keyslot> {
    let kind = fields.text("type")?;
    let key_size = fields.u32("key_size")?;
    let (area, area_kind) = area(fields)?;
    match kind {
        "luks2" if area_kind != "raw" => Err(fields.wrong("area type is not raw")),
        "luks2" => luks2_keyslot(fields, key_size, area).map(Keyslot::Luks2),
        "reencrypt" => {
            reencrypt_keyslot(fields, key_size, &area_kind)?;
            Ok(Keyslot::Reencrypt { area, object: fields.object().clone() })
        }
        _ => {
            Ok(Keyslot::Unknown { kind: kind.to_owned(), area: Some(area), object: fields.object().clone() })
        }
    }
}

fn luks2_keyslot(fields: &Fields<'_>, key_size: u32, area: Area) -> Result<Luks2Keyslot> {
    let area_fields = fields.child("area")?;
    let af = fields.child("af")?;
    if af.text("type")? != "luks1" {
        return Err(fields.wrong("af type is not luks1"));
    }
    let kdf_fields = fields.child("kdf")?;
    let priority = if fields.has("priority") { fields.u32("priority")? } else { 1 };
    if priority > 2 {
        return Err(fields.wrong_field("priority", "not 0, 1 or 2"));
    }
    let mut extra = fields.others(&["type", "key_size", "priority", "af", "area", "kdf"]);
    // Unknown fields of these two lie under their names, so that they need no place of their own.
    for (name, object, known) in [
        ("af", &af, &["type", "stripes", "hash"][..]),
        ("area", &area_fields, &["type", "offset", "size", "encryption", "key_size"][..]),
    ] {
        let others = object.others(known);
        if !others.is_empty() {
            extra.insert(name.to_owned(), Value::Object(others));
        }
    }
    Ok(Luks2Keyslot {
        key_size,
        priority,
        area,
        area_encryption: area_fields.text("encryption")?.to_owned(),
        area_key_size: area_fields.u32("key_size")?,
        af_stripes: af.u32("stripes")?,
        af_hash: af.text("hash")?.to_owned(),
        kdf: kdf(&kdf_fields)?,
        salt: kdf_fields.base64("salt")?,
        extra,
    })
}

/// The fields of both kinds of KDF. cryptsetup 2.0 left those of the old kind behind when it changed a keyslot's kind; later
/// ones drop them on reading, and so do we. Any other field is refused: no program writes one.
const KDF_FIELDS: [&str; 7] = ["type", "salt", "hash", "iterations", "time", "memory", "cpus"];

fn kdf(fields: &Fields<'_>) -> Result<KdfText> {
    if let Some((key, _)) = fields.others(&KDF_FIELDS).iter().next() {
        return Err(fields.wrong_field(&super::json::excerpt(key), "unknown field"));
    }
    let argon2 = |kind| {
        Ok(KdfText::Argon2 {
            kind,
            time: fields.u32("time")?,
            memory_kib: fields.u32("memory")?,
            lanes: fields.u32("cpus")?,
        })
    };
    match fields.text("type")? {
        "pbkdf2" => Ok(KdfText::Pbkdf2 {
            hash: fields.text("hash")?.to_owned(),
            iterations: fields.u32("iterations")?,
        }),
        "argon2i" => argon2(Argon2Kind::Argon2i),
        "argon2id" => argon2(Argon2Kind::Argon2id),
        other => Err(fields.wrong_field("type", format!("unknown: {}", super::json::excerpt(other)))),
    }
}

/// The rules for a keyslot that holds the progress of a re-encryption.
fn reencrypt_keyslot(fields: &Fields<'_>, key_size: u32, area_kind: &str) -> Result<()> {
    if key_size != 1 {
        return Err(fields.wrong_field("key_size", "not 1"));
    }
    if !["reencrypt", "encrypt", "decrypt"].contains(&fields.text("mode")?) {
        return Err(fields.wrong_field("mode", "not reencrypt, encrypt or decrypt"));
    }
    if !["forward", "backward"].contains(&fields.text("direction")?) {
        return Err(fields.wrong_field("direction", "not forward or backward"));
    }
    let area = fields.child("area")?;
    let (checksum, shift) = match area_kind {
        "none" | "journal" => (false, false),
        "checksum" => (true, false),
        "datashift" | "datashift-journal" => (false, true),
        "datashift-checksum" => (true, true),
        other => return Err(area.wrong_field("type", format!("unknown: {}", super::json::excerpt(other)))),
    };
    if checksum {
        area.text("hash")?;
        let sector_size = area.u32("sector_size")?;
        if sector_size < 512 || !sector_size.is_power_of_two() {
            return Err(area.wrong_field("sector_size", "not a power of two of at least 512"));
        }
    }
    if shift {
        let shift_size = area.u64("shift_size")?;
        if shift_size == 0 || shift_size % 512 != 0 {
            return Err(area.wrong_field("shift_size", "not a multiple of 512 bytes"));
        }
    }
    Ok(())
}

fn token(fields: &Fields<'_>) -> Result<Token> {
    Ok(Token {
        kind: fields.text("type")?.to_owned(),
        keyslots: fields.references("keyslots")?,
        extra: fields.others(&["type", "keyslots"]),
    })
}

fn segment(fields: &Fields<'_>) -> Result<Segment> {
    const COMMON: [&str; 4] = ["type", "offset", "size", "flags"];
    const CRYPT: [&str; 8] =
        ["type", "offset", "size", "flags", "iv_tweak", "encryption", "sector_size", "integrity"];
    let size = if fields.text("size")? == "dynamic" { None } else { Some(fields.u64("size")?) };
    let (kind, known) = match fields.text("type")? {
        "crypt" => (crypt(fields)?, &CRYPT[..]),
        "linear" => (SegmentKind::Linear, &COMMON[..]),
        other => {
            if other.starts_with("hw-opal") {
                opal(fields, size, other)?;
            }
            (SegmentKind::Unknown(other.to_owned()), &COMMON[..])
        }
    };
    let offset = fields.u64("offset")?;
    Ok(Segment { kind, offset, size, flags: fields.texts("flags")?, extra: fields.others(known) })
}

fn crypt(fields: &Fields<'_>) -> Result<SegmentKind> {
    let integrity = if fields.has("integrity") {
        let integrity = fields.child("integrity")?;
        for key in ["type", "journal_encryption", "journal_integrity"] {
            integrity.text(key)?;
        }
        Some(Value::Object(integrity.object().clone()))
    } else {
        None
    };
    Ok(SegmentKind::Crypt {
        encryption: fields.text("encryption")?.to_owned(),
        sector_size: fields.u32("sector_size")?,
        iv_tweak: fields.u64("iv_tweak")?,
        integrity,
    })
}

/// A locking range of a self-encrypting drive: kept, never activated here, and still checked.
fn opal(fields: &Fields<'_>, size: Option<u64>, kind: &str) -> Result<()> {
    fields.u32("opal_segment_number")?;
    fields.u32("opal_key_size")?;
    let range = fields.u64("opal_segment_size")?;
    if size.is_none_or(|size| size > range) {
        return Err(fields.wrong_field("size", "not a size within the locking range"));
    }
    if kind == "hw-opal-crypt" {
        crypt(fields)?;
    }
    Ok(())
}

fn digest(fields: &Fields<'_>) -> Result<Digest> {
    let kind = fields.text("type")?.to_owned();
    let keyslots = fields.references("keyslots")?;
    let segments = fields.references("segments")?;
    if kind != "pbkdf2" {
        return Ok(Digest {
            kind,
            keyslots,
            segments,
            hash: String::new(),
            iterations: 0,
            salt: Vec::new(),
            digest: Vec::new(),
            extra: fields.others(&["type", "keyslots", "segments"]),
        });
    }
    let known = ["type", "keyslots", "segments", "hash", "iterations", "salt", "digest"];
    Ok(Digest {
        kind,
        keyslots,
        segments,
        hash: fields.text("hash")?.to_owned(),
        iterations: fields.u32("iterations")?,
        salt: fields.base64("salt")?,
        digest: fields.base64("digest")?,
        extra: fields.others(&known),
    })
}

fn config(fields: &Fields<'_>) -> Result<Config> {
    let mut extra = fields.others(&["json_size", "keyslots_size", "flags", "requirements"]);
    let mut requirements = Vec::new();
    if fields.has("requirements") {
        let object = fields.child("requirements")?;
        requirements = object.texts("mandatory")?;
        let others = object.others(&["mandatory"]);
        if !others.is_empty() {
            extra.insert(String::from("requirements"), Value::Object(others));
        }
    }
    Ok(Config {
        json_size: fields.u64("json_size")?,
        keyslots_size: fields.u64("keyslots_size")?,
        flags: fields.texts("flags")?,
        requirements,
        extra,
    })
}
