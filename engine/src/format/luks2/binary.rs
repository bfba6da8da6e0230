//! The 4096-byte binary header and its checksum. Big-endian; bytes that are not listed are zero when written and not looked
//! at when read (the checksum covers them).
//!
//! | offset | bytes | field | rule |
//! |---|---|---|---|
//! | 0 | 6 | magic | `LUKS` BA BE, in the secondary copy `SKUL` BA BE |
//! | 6 | 2 | version | 2 |
//! | 8 | 8 | size of a copy | with its JSON area; a power of two, 16 KiB to 4 MiB |
//! | 16 | 8 | seqid | counts header writes; the same in both copies |
//! | 24 | 48 | label | text, NUL |
//! | 72 | 32 | checksum algorithm | text, NUL |
//! | 104 | 64 | salt | random, another one in each copy |
//! | 168 | 40 | UUID | text, NUL |
//! | 208 | 48 | subsystem | text, NUL |
//! | 256 | 8 | offset of this copy | bytes |
//! | 448 | 64 | checksum | left-aligned; of the copy with this field zero |

use crate::crypto::bytes_equal;
use crate::crypto::hash::{HASH_BYTES_MAX, Hash};
use crate::error::{Error, ErrorKind, Result};
use crate::format::luks2::Copy;
use crate::format::luks2::json::excerpt;
use crate::format::luks2::validate::is_copy_bytes;

/// Bytes of the binary header; the JSON area follows.
pub const BINARY_BYTES: usize = 4096;
/// Longest label and subsystem, bytes.
pub const LABEL_BYTES_MAX: usize = LABEL.len - 1;
/// Longest UUID text, bytes.
pub const UUID_BYTES_MAX: usize = UUID.len - 1;

const MAGIC_PRIMARY: [u8; 6] = *b"LUKS\xba\xbe";
const MAGIC_SECONDARY: [u8; 6] = *b"SKUL\xba\xbe";
const VERSION: u16 = 2;

/// A field of bytes.
#[derive(Clone, Copy)]
struct Place {
    at: usize,
    len: usize,
}

impl Place {
    /// The field that follows.
    const fn then(self, len: usize) -> Self {
        Self { at: self.at + self.len, len }
    }

    fn of(self, bytes: &[u8]) -> &[u8] {
        &bytes[self.at..self.at + self.len]
    }

    fn of_mut(self, bytes: &mut [u8]) -> &mut [u8] {
        &mut bytes[self.at..self.at + self.len]
    }
}

const MAGIC: Place = Place { at: 0, len: 6 };
const VERSION_AT: Place = MAGIC.then(2);
const COPY_SIZE: Place = VERSION_AT.then(8);
const SEQID: Place = COPY_SIZE.then(8);
const LABEL: Place = SEQID.then(48);
const CHECKSUM_ALG: Place = LABEL.then(32);
const SALT: Place = CHECKSUM_ALG.then(64);
const UUID: Place = SALT.then(40);
const SUBSYSTEM: Place = UUID.then(48);
const OFFSET: Place = SUBSYSTEM.then(8);
const CHECKSUM: Place = Place { at: 448, len: 64 };

const _: () = assert!(OFFSET.at == 256 && UUID.at == 168 && HASH_BYTES_MAX <= CHECKSUM.len);

/// Fields of a binary header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binary {
    /// Bytes of one copy.
    pub copy_bytes: u64,
    /// Counts header writes.
    pub seqid: u64,
    /// Text.
    pub label: String,
    /// Text.
    pub checksum_alg: String,
    /// Random bytes of this copy.
    pub salt: [u8; 64],
    /// Text.
    pub uuid: String,
    /// Text.
    pub subsystem: String,
}

fn magic(copy: Copy) -> [u8; 6] {
    match copy {
        Copy::Primary => MAGIC_PRIMARY,
        Copy::Secondary => MAGIC_SECONDARY,
    }
}

/// Do these bytes begin with the magic of such a copy?
#[must_use]
pub fn has_magic(bytes: &[u8], copy: Copy) -> bool {
    bytes.starts_with(&magic(copy))
}

/// The version after the magic, if the bytes reach that far.
#[must_use]
pub fn version(bytes: &[u8]) -> Option<u16> {
    match bytes.get(VERSION_AT.at..VERSION_AT.at + VERSION_AT.len) {
        Some(&[high, low]) => Some(u16::from_be_bytes([high, low])),
        _ => None,
    }
}

fn invalid(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Invalid, what)
}

fn number(bytes: &[u8], place: Place) -> u64 {
    place.of(bytes).iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn text(bytes: &[u8], place: Place, name: &str) -> Result<String> {
    let field = place.of(bytes);
    let end = field
        .iter()
        .position(|byte| *byte == 0)
        .ok_or_else(|| invalid(format!("{name} does not end within its field")))?;
    match std::str::from_utf8(&field[..end]) {
        Ok(text) => Ok(text.to_owned()),
        Err(error) => Err(invalid(format!("{name} is not UTF-8")).because(error)),
    }
}

/// The size of the copy whose binary header this is, after every check that needs no more than the binary header: magic,
/// version, place, size. The checksum is the next step ([`parse`]).
///
/// # Errors
/// `Invalid`, saying what is wrong.
pub fn check(bytes: &[u8; BINARY_BYTES], copy: Copy, offset: u64) -> Result<u64> {
    if !has_magic(bytes, copy) {
        return Err(invalid("no LUKS2 magic"));
    }
    let version = version(bytes).unwrap_or_default();
    if version != VERSION {
        return Err(invalid(format!("LUKS version {version}, not 2")));
    }
    let written = number(bytes, OFFSET);
    if written != offset {
        return Err(invalid(format!("header says it lies at byte {written}, not {offset}")));
    }
    let copy_bytes = number(bytes, COPY_SIZE);
    if !is_copy_bytes(copy_bytes) {
        return Err(invalid(format!("no legal size of a header copy: {copy_bytes} bytes")));
    }
    if copy == Copy::Secondary && copy_bytes != offset {
        return Err(invalid(format!("secondary header of {copy_bytes} bytes at byte {offset}")));
    }
    Ok(copy_bytes)
}

/// The fields of a whole copy that passed [`check`], after its checksum was found right.
///
/// # Errors
/// `Invalid`: checksum or a text; `Unsupported`: the checksum's algorithm.
///
/// # Panics
/// If `bytes` is shorter than a binary header.
pub fn parse(bytes: &[u8]) -> Result<Binary> {
    let checksum_alg = text(bytes, CHECKSUM_ALG, "checksum algorithm")?;
    let hash = hash_named(&checksum_alg)?;
    let sum = checksum(hash, bytes);
    if !bytes_equal(&sum[..hash.bytes()], &CHECKSUM.of(bytes)[..hash.bytes()]) {
        return Err(invalid("checksum does not match"));
    }
    let mut salt = [0; 64];
    salt.copy_from_slice(SALT.of(bytes));
    Ok(Binary {
        copy_bytes: number(bytes, COPY_SIZE),
        seqid: number(bytes, SEQID),
        label: text(bytes, LABEL, "label")?,
        checksum_alg,
        salt,
        uuid: text(bytes, UUID, "UUID")?,
        subsystem: text(bytes, SUBSYSTEM, "subsystem")?,
    })
}

fn hash_named(name: &str) -> Result<Hash> {
    Hash::from_name(name).map_err(|error| {
        Error::new(ErrorKind::Unsupported, format!("checksum algorithm {}", excerpt(name))).because(error)
    })
}

/// Over the whole copy with the checksum's own field zero.
fn checksum(hash: Hash, bytes: &[u8]) -> [u8; HASH_BYTES_MAX] {
    let mut sum = [0; HASH_BYTES_MAX];
    let (before, after) = (&bytes[..CHECKSUM.at], &bytes[CHECKSUM.at + CHECKSUM.len..]);
    hash.digest(&[before, &[0; CHECKSUM.len], after], &mut sum);
    sum
}

/// Put the binary header in front of a copy that holds its JSON area already, checksum included.
///
/// # Errors
/// `Invalid`: a text is too long or has a NUL; `Unsupported`: the checksum's algorithm.
///
/// # Panics
/// If `bytes` is shorter than a binary header.
pub fn seal(bytes: &mut [u8], binary: &Binary, copy: Copy, offset: u64) -> Result<()> {
    let hash = hash_named(&binary.checksum_alg)?;
    bytes[..BINARY_BYTES].fill(0);
    MAGIC.of_mut(bytes).copy_from_slice(&magic(copy));
    VERSION_AT.of_mut(bytes).copy_from_slice(&VERSION.to_be_bytes());
    COPY_SIZE.of_mut(bytes).copy_from_slice(&binary.copy_bytes.to_be_bytes());
    SEQID.of_mut(bytes).copy_from_slice(&binary.seqid.to_be_bytes());
    OFFSET.of_mut(bytes).copy_from_slice(&offset.to_be_bytes());
    SALT.of_mut(bytes).copy_from_slice(&binary.salt);
    for (place, text, name) in [
        (LABEL, &binary.label, "label"),
        (CHECKSUM_ALG, &binary.checksum_alg, "checksum algorithm"),
        (UUID, &binary.uuid, "UUID"),
        (SUBSYSTEM, &binary.subsystem, "subsystem"),
    ] {
        if text.len() >= place.len || text.contains('\0') {
            return Err(invalid(format!("{name} is not a text of at most {} bytes", place.len - 1)));
        }
        place.of_mut(bytes)[..text.len()].copy_from_slice(text.as_bytes());
    }
    let sum = checksum(hash, bytes);
    CHECKSUM.of_mut(bytes)[..hash.bytes()].copy_from_slice(&sum[..hash.bytes()]);
    Ok(())
}
