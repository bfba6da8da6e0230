//! The bytes of a header cut into fields, without judgement: what parsing and repair both start from.

use crate::error::{Error, ErrorKind, Result};
use crate::format::luks1::{HEADER_BYTES, Header, KEYSLOTS, Keyslot};

pub(super) const MAGIC: [u8; 6] = *b"LUKS\xba\xbe";
pub(super) const VERSION: u16 = 1;
/// States of a keyslot.
pub(super) const ACTIVE: u32 = 0x00ac_71f3;
pub(super) const INACTIVE: u32 = 0x0000_dead;

/// Bytes of the fields for names, their NUL included.
pub(super) const NAME_BYTES: usize = 32;
/// Bytes of the field for the UUID, its NUL included.
pub(super) const UUID_BYTES: usize = 40;
const KEYSLOT_BYTES: usize = 48;

// Where fields begin: each where the one before it ends. The table at the head of `luks1` is the specification's.
const VERSION_AT: usize = MAGIC.len();
const CIPHER_NAME_AT: usize = VERSION_AT + size_of::<u16>();
const CIPHER_MODE_AT: usize = CIPHER_NAME_AT + NAME_BYTES;
const HASH_AT: usize = CIPHER_MODE_AT + NAME_BYTES;
const PAYLOAD_AT: usize = HASH_AT + NAME_BYTES;
const KEY_BYTES_AT: usize = PAYLOAD_AT + size_of::<u32>();
const DIGEST_AT: usize = KEY_BYTES_AT + size_of::<u32>();
const DIGEST_SALT_AT: usize = DIGEST_AT + 20;
const DIGEST_ITERATIONS_AT: usize = DIGEST_SALT_AT + 32;
const UUID_AT: usize = DIGEST_ITERATIONS_AT + size_of::<u32>();
const KEYSLOTS_AT: usize = UUID_AT + UUID_BYTES;
// Within a keyslot.
const STATE_AT: usize = 0;
const ITERATIONS_AT: usize = STATE_AT + size_of::<u32>();
const SALT_AT: usize = ITERATIONS_AT + size_of::<u32>();
const MATERIAL_AT: usize = SALT_AT + 32;
const STRIPES_AT: usize = MATERIAL_AT + size_of::<u32>();

const _: () = assert!(CIPHER_NAME_AT == 8 && CIPHER_MODE_AT == 40 && HASH_AT == 72 && PAYLOAD_AT == 104);
const _: () = assert!(KEY_BYTES_AT == 108 && DIGEST_AT == 112 && DIGEST_SALT_AT == 132);
const _: () = assert!(DIGEST_ITERATIONS_AT == 164 && UUID_AT == 168 && KEYSLOTS_AT == 208);
const _: () = assert!(SALT_AT == 8 && MATERIAL_AT == 40 && STRIPES_AT + size_of::<u32>() == KEYSLOT_BYTES);
const _: () = assert!(KEYSLOTS_AT + KEYSLOTS * KEYSLOT_BYTES == HEADER_BYTES);

/// A header whose magic and version are right. Numbers are whatever was there.
#[derive(Debug, Clone)]
pub(super) struct Fields {
    pub(super) cipher_name: [u8; NAME_BYTES],
    pub(super) cipher_mode: [u8; NAME_BYTES],
    pub(super) hash: [u8; NAME_BYTES],
    pub(super) payload_sector: u32,
    pub(super) key_bytes: u32,
    pub(super) digest: [u8; 20],
    pub(super) digest_salt: [u8; 32],
    pub(super) digest_iterations: u32,
    pub(super) uuid: [u8; UUID_BYTES],
    pub(super) keyslots: [KeyslotFields; KEYSLOTS],
}

#[derive(Debug, Clone, Copy)]
pub(super) struct KeyslotFields {
    pub(super) state: u32,
    pub(super) iterations: u32,
    pub(super) salt: [u8; 32],
    pub(super) material_sector: u32,
    pub(super) stripes: u32,
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    std::array::from_fn(|index| bytes[at + index])
}

fn number(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(array(bytes, at))
}

impl Fields {
    /// Cut the first [`HEADER_BYTES`] bytes of a device.
    ///
    /// # Errors
    /// `Invalid`: fewer bytes, another magic, another version.
    pub(super) fn read(bytes: &[u8]) -> Result<Self> {
        let invalid = |what: String| Error::new(ErrorKind::Invalid, what).at("LUKS1 header");
        let Some(bytes) = bytes.get(..HEADER_BYTES) else {
            return Err(invalid(format!("{} bytes: a header has {HEADER_BYTES}", bytes.len())));
        };
        if !bytes.starts_with(&MAGIC) {
            return Err(invalid("no LUKS magic".to_owned()));
        }
        let version = u16::from_be_bytes(array(bytes, VERSION_AT));
        if version != VERSION {
            return Err(invalid(format!("version {version}: only {VERSION} is LUKS1")));
        }
        let keyslot = |index: usize| {
            let bytes = &bytes[KEYSLOTS_AT + index * KEYSLOT_BYTES..][..KEYSLOT_BYTES];
            KeyslotFields {
                state: number(bytes, STATE_AT),
                iterations: number(bytes, ITERATIONS_AT),
                salt: array(bytes, SALT_AT),
                material_sector: number(bytes, MATERIAL_AT),
                stripes: number(bytes, STRIPES_AT),
            }
        };
        Ok(Self {
            cipher_name: array(bytes, CIPHER_NAME_AT),
            cipher_mode: array(bytes, CIPHER_MODE_AT),
            hash: array(bytes, HASH_AT),
            payload_sector: number(bytes, PAYLOAD_AT),
            key_bytes: number(bytes, KEY_BYTES_AT),
            digest: array(bytes, DIGEST_AT),
            digest_salt: array(bytes, DIGEST_SALT_AT),
            digest_iterations: number(bytes, DIGEST_ITERATIONS_AT),
            uuid: array(bytes, UUID_AT),
            keyslots: std::array::from_fn(keyslot),
        })
    }

    /// The fields of a header.
    ///
    /// # Panics
    /// If a string is longer than its field.
    pub(super) fn of(header: &Header) -> Self {
        Self {
            cipher_name: field(&header.cipher_name),
            cipher_mode: field(&header.cipher_mode),
            hash: field(&header.hash),
            payload_sector: header.payload_sector,
            key_bytes: header.key_bytes,
            digest: header.digest,
            digest_salt: header.digest_salt,
            digest_iterations: header.digest_iterations,
            uuid: field(&header.uuid),
            keyslots: header.keyslots.map(|keyslot| KeyslotFields {
                state: if keyslot.active { ACTIVE } else { INACTIVE },
                iterations: keyslot.iterations,
                salt: keyslot.salt,
                material_sector: keyslot.material_sector,
                stripes: keyslot.stripes,
            }),
        }
    }

    /// The header they make, its strings and states looked at, its numbers not.
    ///
    /// # Errors
    /// `Invalid`: see [`Header::parse`].
    pub(super) fn to_header(&self) -> Result<Header> {
        let mut keyslots = [Keyslot::UNUSED; KEYSLOTS];
        for (index, (keyslot, fields)) in keyslots.iter_mut().zip(&self.keyslots).enumerate() {
            let active = match fields.state {
                ACTIVE => true,
                INACTIVE => false,
                other => {
                    let what = format!("state {other:#010x} is neither {ACTIVE:#010x} nor {INACTIVE:#010x}");
                    return Err(Error::new(ErrorKind::Invalid, what)
                        .at(format!("LUKS1 header, keyslot {index}"))
                        .hint(
                            "a repair of the header judges by the rest of the keyslot whether it is in use",
                        ));
                }
            };
            *keyslot = Keyslot {
                active,
                iterations: fields.iterations,
                salt: fields.salt,
                material_sector: fields.material_sector,
                stripes: fields.stripes,
            };
        }
        Ok(Header {
            cipher_name: text("cipher name", &self.cipher_name)?,
            cipher_mode: text("cipher mode", &self.cipher_mode)?,
            hash: text("hash", &self.hash)?,
            payload_sector: self.payload_sector,
            key_bytes: self.key_bytes,
            digest: self.digest,
            digest_salt: self.digest_salt,
            digest_iterations: self.digest_iterations,
            uuid: text("UUID", &self.uuid)?,
            keyslots,
        })
    }

    pub(super) fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &MAGIC);
        put(VERSION_AT, &VERSION.to_be_bytes());
        put(CIPHER_NAME_AT, &self.cipher_name);
        put(CIPHER_MODE_AT, &self.cipher_mode);
        put(HASH_AT, &self.hash);
        put(PAYLOAD_AT, &self.payload_sector.to_be_bytes());
        put(KEY_BYTES_AT, &self.key_bytes.to_be_bytes());
        put(DIGEST_AT, &self.digest);
        put(DIGEST_SALT_AT, &self.digest_salt);
        put(DIGEST_ITERATIONS_AT, &self.digest_iterations.to_be_bytes());
        put(UUID_AT, &self.uuid);
        for (index, keyslot) in self.keyslots.iter().enumerate() {
            let at = KEYSLOTS_AT + index * KEYSLOT_BYTES;
            put(at + STATE_AT, &keyslot.state.to_be_bytes());
            put(at + ITERATIONS_AT, &keyslot.iterations.to_be_bytes());
            put(at + SALT_AT, &keyslot.salt);
            put(at + MATERIAL_AT, &keyslot.material_sector.to_be_bytes());
            put(at + STRIPES_AT, &keyslot.stripes.to_be_bytes());
        }
        bytes
    }
}

/// A string as a field: NULs to the end.
pub(super) fn field<const N: usize>(text: &str) -> [u8; N] {
    assert!(text.len() < N, "a string longer than its field in a LUKS1 header");
    std::array::from_fn(|index| text.as_bytes().get(index).copied().unwrap_or(0))
}

/// A field as a string. Whether it may be empty is for `validate`.
fn text(name: &str, field: &[u8]) -> Result<String> {
    let invalid = |what: &str| Error::new(ErrorKind::Invalid, format!("{name} {what}")).at("LUKS1 header");
    let end = field.iter().position(|&byte| byte == 0).ok_or_else(|| invalid("has no NUL at its end"))?;
    if !field[..end].iter().all(|byte| (b' '..=b'~').contains(byte)) {
        return Err(invalid("is not printable ASCII"));
    }
    Ok(field[..end].iter().copied().map(char::from).collect())
}
