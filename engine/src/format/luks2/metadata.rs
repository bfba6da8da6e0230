//! The JSON metadata as structures. What is unknown to us (objects, fields, their order) is kept and written back.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

use crate::crypto::hash::Hash;
use crate::crypto::kdf::Kdf;
use crate::error::{Error, ErrorKind, Result};
use crate::format::luks2::{emit, json, parse, validate};

/// The five top-level objects, and unknown others.
#[derive(Debug, Clone, PartialEq)]
pub struct Metadata {
    /// By number, 0..=31.
    pub keyslots: BTreeMap<u32, Keyslot>,
    /// By number, 0..=31: as on disk.
    pub tokens: BTreeMap<u32, Token>,
    /// By number, 0..=31.
    pub segments: BTreeMap<u32, Segment>,
    /// By number, 0..=7.
    pub digests: BTreeMap<u32, Digest>,
    /// Sizes, flags, requirements.
    pub config: Config,
    /// Top-level objects we do not know.
    pub extra: Map<String, Value>,
    /// The order of fields on disk. A new header has none: `AsRead::default()`.
    pub as_read: AsRead,
}

/// The JSON a [`Metadata`] was read from. It decides nothing but the order in which fields are written back, and whether a
/// field that says nothing (an empty list) is; so all of them are equal.
///
/// A number that is no 64-bit integer may be written otherwise than it stood there (`1.10`, `1E2`, 30 digits), and so be changed in an
/// object that is not ours: where such numbers are is remembered, and a header that still holds one is not written.
#[derive(Debug, Clone, Default)]
pub struct AsRead {
    object: Map<String, Value>,
    /// Tokens with such a number.
    inexact_tokens: BTreeSet<u32>,
    /// There is one anywhere else.
    inexact: bool,
}

impl AsRead {
    /// `object`: what was read from `text`.
    fn new(text: &[u8], object: Map<String, Value>) -> Self {
        // Objects keep their order, so the numbers stand in the same order in both.
        let mut stood = json::numbers(text);
        let mut is_exact = |part: &Value| {
            let written = part.to_string();
            // All are compared, so that the next part begins with its own.
            json::numbers(written.as_bytes()).fold(true, |same, number| (stood.next() == Some(number)) & same)
        };
        let mut inexact_tokens = BTreeSet::new();
        let mut inexact = false;
        for (name, part) in &object {
            match part {
                Value::Object(tokens) if name == "tokens" => {
                    for (id, token) in tokens {
                        if !is_exact(token) {
                            inexact_tokens.extend(id.parse::<u32>());
                        }
                    }
                }
                _ => inexact |= !is_exact(part),
            }
        }
        Self { object, inexact_tokens, inexact }
    }

    pub(super) fn object(&self) -> &Map<String, Value> {
        &self.object
    }
}

impl PartialEq for AsRead {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

/// A keyslot of any type.
#[derive(Debug, Clone, PartialEq)]
pub enum Keyslot {
    /// `luks2`: a wrapped volume key.
    Luks2(Luks2Keyslot),
    /// `reencrypt`: progress of a re-encryption; fields as on disk, area parsed.
    Reencrypt {
        /// Bytes from the start of the device.
        area: Area,
        /// The object as on disk.
        object: Map<String, Value>,
    },
    /// Any other type, with its area if it has one that can be read as such.
    Unknown {
        /// Its type.
        kind: String,
        /// Its area, to keep others out of it.
        area: Option<Area>,
        /// The object as on disk.
        object: Map<String, Value>,
    },
}

impl Keyslot {
    /// Where its area lies.
    #[must_use]
    pub fn area(&self) -> Option<Area> {
        match self {
            Self::Luks2(keyslot) => Some(keyslot.area),
            Self::Reencrypt { area, .. } => Some(*area),
            Self::Unknown { area, .. } => *area,
        }
    }

    /// Its type.
    #[must_use]
    pub fn kind(&self) -> &str {
        match self {
            Self::Luks2(_) => "luks2",
            Self::Reencrypt { .. } => "reencrypt",
            Self::Unknown { kind, .. } => kind,
        }
    }
}

/// An extent of the keyslots area.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Area {
    /// Bytes from the start of the device.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}

impl Area {
    /// First byte after it; `None`: there is no such number.
    #[must_use]
    pub fn end(self) -> Option<u64> {
        self.offset.checked_add(self.size)
    }

    /// Do they share a byte?
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        let before = |one: Self, other: Self| one.end().is_some_and(|end| end <= other.offset);
        !before(self, other) && !before(other, self)
    }
}

/// A wrapped volume key.
#[derive(Debug, Clone, PartialEq)]
pub struct Luks2Keyslot {
    /// Stored key, bytes.
    pub key_size: u32,
    /// 0 ignore, 1 normal, 2 prefer.
    pub priority: u32,
    /// Where its material lies.
    pub area: Area,
    /// Cipher of the area, dm-crypt's notation.
    pub area_encryption: String,
    /// Key of that cipher, bytes: the output of the KDF.
    pub area_key_size: u32,
    /// Stripes of the AF splitter (4000).
    pub af_stripes: u32,
    /// Hash of the AF splitter.
    pub af_hash: String,
    /// The KDF as on disk.
    pub kdf: KdfText,
    /// Its salt.
    pub salt: Vec<u8>,
    /// Fields we do not know; those of the objects `af` and `area` under these names.
    pub extra: Map<String, Value>,
}

/// A KDF as a header names it. [`KdfText::known`] tells whether we have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KdfText {
    /// `pbkdf2`.
    Pbkdf2 {
        /// Hash by name.
        hash: String,
        /// Iterations.
        iterations: u32,
    },
    /// `argon2i`, `argon2id`.
    Argon2 {
        /// Which.
        kind: crate::crypto::kdf::Argon2Kind,
        /// Passes.
        time: u32,
        /// KiB.
        memory_kib: u32,
        /// Lanes.
        lanes: u32,
    },
}

impl KdfText {
    /// The derivation it names.
    ///
    /// # Errors
    /// `Unsupported`: an unknown hash.
    pub fn known(&self) -> Result<Kdf> {
        Ok(match self {
            Self::Pbkdf2 { hash, iterations } => {
                Kdf::Pbkdf2 { hash: Hash::from_name(hash)?, iterations: *iterations }
            }
            Self::Argon2 { kind, time, memory_kib, lanes } => {
                Kdf::Argon2 { kind: *kind, time: *time, memory_kib: *memory_kib, lanes: *lanes }
            }
        })
    }
}

impl From<Kdf> for KdfText {
    fn from(kdf: Kdf) -> Self {
        match kdf {
            Kdf::Pbkdf2 { hash, iterations } => Self::Pbkdf2 { hash: hash.name().to_owned(), iterations },
            Kdf::Argon2 { kind, time, memory_kib, lanes } => Self::Argon2 { kind, time, memory_kib, lanes },
        }
    }
}

/// A token: `type`, `keyslots`, and whatever its type adds.
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    /// Its type.
    pub kind: String,
    /// Keyslots it unlocks.
    pub keyslots: Vec<u32>,
    /// All other fields.
    pub extra: Map<String, Value>,
}

/// A data area.
#[derive(Debug, Clone, PartialEq)]
pub struct Segment {
    /// Its type and what comes with it.
    pub kind: SegmentKind,
    /// First byte on the device.
    pub offset: u64,
    /// Bytes; `None`: `dynamic`, to the end of the device.
    pub size: Option<u64>,
    /// `in-reencryption`, `backup-…`, unknown ones.
    pub flags: Vec<String>,
    /// Fields we do not know.
    pub extra: Map<String, Value>,
}

/// Types of data areas.
#[derive(Debug, Clone, PartialEq)]
pub enum SegmentKind {
    /// `crypt`.
    Crypt {
        /// dm-crypt's notation.
        encryption: String,
        /// Data unit, bytes.
        sector_size: u32,
        /// Counter of the first data unit, 512-byte sectors.
        iv_tweak: u64,
        /// `integrity` object, if there is one.
        integrity: Option<Value>,
    },
    /// `linear`: plain data.
    Linear,
    /// Any other type.
    Unknown(String),
}

impl Segment {
    /// A `backup-*` segment: a note about another time, no data area of now.
    #[must_use]
    pub fn is_backup(&self) -> bool {
        self.flags.iter().any(|flag| flag.starts_with("backup-"))
    }
}

/// A check of a volume key.
#[derive(Debug, Clone, PartialEq)]
pub struct Digest {
    /// `pbkdf2`; others are kept and verify nothing.
    pub kind: String,
    /// Keyslots whose key it checks.
    pub keyslots: Vec<u32>,
    /// Segments that key encrypts.
    pub segments: Vec<u32>,
    /// Hash by name.
    pub hash: String,
    /// PBKDF2 iterations.
    pub iterations: u32,
    /// PBKDF2 salt.
    pub salt: Vec<u8>,
    /// PBKDF2 output.
    pub digest: Vec<u8>,
    /// Fields we do not know.
    pub extra: Map<String, Value>,
}

/// Sizes, flags, requirements.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Bytes of the JSON area.
    pub json_size: u64,
    /// Bytes of the keyslots area.
    pub keyslots_size: u64,
    /// Activation flags.
    pub flags: Vec<String>,
    /// What a program must know to touch the volume.
    pub requirements: Vec<String>,
    /// Fields we do not know; those of the object `requirements` under this name.
    pub extra: Map<String, Value>,
}

impl Digest {
    /// Neither a keyslot nor a segment is bound to it: it will not be written.
    #[must_use]
    pub fn is_unused(&self) -> bool {
        self.keyslots.is_empty() && self.segments.is_empty()
    }
}

impl Metadata {
    /// From the text of a JSON area (without its NULs).
    ///
    /// # Errors
    /// `Invalid`, naming the object and the rule.
    pub fn parse(text: &[u8]) -> Result<Self> {
        let object = json::read(text)?;
        let mut metadata = parse::metadata(&object)?;
        validate::validate(&metadata)?;
        metadata.as_read = AsRead::new(text, object);
        Ok(metadata)
    }

    /// Would a number be written otherwise than it was read?
    pub(super) fn check_numbers(&self) -> Result<()> {
        let refused = |hint: Option<String>| {
            let what = "the metadata holds numbers this version cannot keep as they are";
            let error = Error::new(ErrorKind::Unsupported, what).at("LUKS2 metadata");
            Err(match hint {
                Some(hint) => error.hint(hint),
                None => error,
            })
        };
        if self.as_read.inexact {
            return refused(None);
        }
        // One that was replaced is one of ours, without such numbers.
        let still =
            |id: &&u32| self.tokens.get(id).is_some_and(|token| token.extra.values().any(json::has_float));
        match self.as_read.inexact_tokens.iter().find(still) {
            Some(id) => refused(Some(format!("they are in token {id}"))),
            None => Ok(()),
        }
    }

    /// The on-disk JSON.
    #[must_use]
    pub fn to_json(&self) -> Value {
        emit::metadata(self)
    }

    /// The data areas of now, in order of their numbers: all but `backup-*`.
    pub fn data_segments(&self) -> impl Iterator<Item = (u32, &Segment)> {
        self.segments.iter().filter(|(_, segment)| !segment.is_backup()).map(|(id, segment)| (*id, segment))
    }

    /// The digest that checks a segment's key. (A segment in re-encryption has two: the lowest number.)
    #[must_use]
    pub fn digest_of_segment(&self, segment: u32) -> Option<(u32, &Digest)> {
        self.digests
            .iter()
            .find(|(_, digest)| digest.segments.contains(&segment))
            .map(|(id, digest)| (*id, digest))
    }

    /// The digest that checks a keyslot's key.
    #[must_use]
    pub fn digest_of_keyslot(&self, keyslot: u32) -> Option<(u32, &Digest)> {
        self.digests
            .iter()
            .find(|(_, digest)| digest.keyslots.contains(&keyslot))
            .map(|(id, digest)| (*id, digest))
    }

    /// Requirements that forbid activating or changing the volume: all. That of a re-encryption is known to
    /// [`super::reencrypt::read`] alone, and holds for everybody else until it is over.
    #[must_use]
    pub fn unmet_requirements(&self) -> Vec<&str> {
        self.config.requirements.iter().map(String::as_str).collect()
    }
}
