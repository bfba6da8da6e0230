//! Keyslot material: a volume key split, encrypted and back.

use crate::crypto::Secret;
use crate::crypto::hash::Hash;
use crate::crypto::kdf::Kdf;
use crate::crypto::spec::CipherSpec;
use crate::error::Result;

/// How a keyslot's material is made.
#[derive(Debug, Clone, Copy)]
pub struct Wrapping<'a> {
    /// Passphrase to area key.
    pub kdf: Kdf,
    /// Its salt.
    pub salt: &'a [u8],
    /// Cipher of the area (512-byte units from counter 0).
    pub cipher: CipherSpec,
    /// Key of that cipher, bytes.
    pub area_key_bytes: usize,
    /// Hash of the AF splitter.
    pub af_hash: Hash,
}

/// Bytes of material for a key: `key_bytes * 4000`, rounded up to whole sectors.
#[must_use]
pub fn material_bytes(key_bytes: usize) -> usize {
    (key_bytes * crate::format::af::STRIPES as usize).next_multiple_of(512)
}

impl Wrapping<'_> {
    /// `key` under `passphrase`: the material to write.
    ///
    /// # Errors
    /// Of the KDF or the cipher.
    pub fn wrap(&self, passphrase: &Secret, key: &Secret) -> Result<Vec<u8>> {
        unimplemented!("{} {}", passphrase.len(), key.len())
    }

    /// The key of `key_bytes` in `material`, right or wrong: only a digest can tell. Wipes `material`.
    ///
    /// # Errors
    /// Of the KDF or the cipher.
    pub fn unwrap(&self, passphrase: &Secret, material: &mut [u8], key_bytes: usize) -> Result<Secret> {
        unimplemented!("{} {} {key_bytes}", passphrase.len(), material.len())
    }
}
