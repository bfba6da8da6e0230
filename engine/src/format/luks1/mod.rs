//! LUKS1 headers, sans I/O.

use crate::error::Result;

/// Bytes of the header; keyslot material follows.
pub const HEADER_BYTES: usize = 592;
/// Keyslots of every header.
pub const KEYSLOTS: usize = 8;

/// A header as on disk; strings without their NULs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// `aes`.
    pub cipher_name: String,
    /// `xts-plain64`.
    pub cipher_mode: String,
    /// Of KDF, digest and AF splitter: `sha256`.
    pub hash: String,
    /// First data sector (512 bytes); 0: the header is detached.
    pub payload_sector: u32,
    /// Volume key, bytes.
    pub key_bytes: u32,
    /// PBKDF2 of the volume key.
    pub digest: [u8; 20],
    /// Its salt.
    pub digest_salt: [u8; 32],
    /// Its iterations.
    pub digest_iterations: u32,
    /// Text UUID.
    pub uuid: String,
    /// All eight.
    pub keyslots: [Keyslot; KEYSLOTS],
}

/// A keyslot as on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keyslot {
    /// In use.
    pub active: bool,
    /// PBKDF2 iterations.
    pub iterations: u32,
    /// PBKDF2 salt.
    pub salt: [u8; 32],
    /// First sector (512 bytes) of its material.
    pub material_sector: u32,
    /// AF stripes.
    pub stripes: u32,
}

impl Header {
    /// Do these bytes begin like a LUKS1 header (magic and version)?
    #[must_use]
    pub fn is_here(bytes: &[u8]) -> bool {
        unimplemented!("{}", bytes.len())
    }

    /// Parse and validate the first [`HEADER_BYTES`] bytes of a device. Ciphers and hashes are *not* judged here: an unknown cipher is a valid header.
    ///
    /// # Errors
    /// `Invalid`, naming what is wrong.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        unimplemented!("{}", bytes.len())
    }

    /// The bytes on disk.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        unimplemented!()
    }

    /// A header without keyslots in use, with cryptsetup's material layout for `key_bytes`. `payload_sector` 0 for a detached header; strings, digest and salts are the caller's to fill in.
    ///
    /// # Errors
    /// `Invalid`: a payload inside the keyslots, or a key size that is none.
    pub fn layout(key_bytes: u32, payload_sector: u32) -> Result<Self> {
        unimplemented!("{key_bytes} {payload_sector}")
    }

    /// Where the data of a new volume begins by default, sectors: keyslots rounded up to 1 MiB, as cryptsetup does.
    #[must_use]
    pub fn default_payload_sector(key_bytes: u32) -> u32 {
        unimplemented!("{key_bytes}")
    }

    /// dm-crypt's name of the cipher: `aes-xts-plain64`.
    #[must_use]
    pub fn cipher(&self) -> String {
        format!("{}-{}", self.cipher_name, self.cipher_mode)
    }

    /// Bytes of header and keyslot material: what a backup holds.
    #[must_use]
    pub fn backup_bytes(&self) -> u64 {
        unimplemented!()
    }

    /// The fields under their names in the specification, binary ones as base64: what `dump --json` shows.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        unimplemented!()
    }

    /// What `repair` can correct in a header that does not parse or deviates (cryptsetup's `_keyslot_repair`: stripes, material offsets, states that are neither constant, hash in capitals): the corrected header and one sentence per correction.
    /// No sentences: nothing to correct.
    ///
    /// # Errors
    /// `Invalid`: beyond repair.
    pub fn repaired(bytes: &[u8]) -> Result<(Self, Vec<String>)> {
        unimplemented!("{}", bytes.len())
    }
}

impl Keyslot {
    /// Byte offset of its material.
    #[must_use]
    pub fn material_offset(&self) -> u64 {
        u64::from(self.material_sector) * 512
    }
}
