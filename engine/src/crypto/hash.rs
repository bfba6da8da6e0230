//! The hashes of LUKS headers: digests, AF splitter, PBKDF2.

use crate::error::Result;

/// A hash function, by its name in LUKS headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Hash {
    /// FIPS 180-4. Only because old LUKS1 headers use it; as a KDF's PRF it is not weak.
    Sha1,
    /// FIPS 180-4.
    Sha224,
    /// FIPS 180-4; the default everywhere.
    Sha256,
    /// FIPS 180-4.
    Sha384,
    /// FIPS 180-4.
    Sha512,
}

/// Longest output of any of them, bytes.
pub const HASH_BYTES_MAX: usize = 64;

impl Hash {
    /// By its name on disk, in any case.
    ///
    /// # Errors
    /// `Unsupported`, naming the hash.
    pub fn from_name(name: &str) -> Result<Self> {
        unimplemented!("{name}")
    }

    /// Its name on disk.
    #[must_use]
    pub fn name(self) -> &'static str {
        unimplemented!()
    }

    /// Length of its output, bytes.
    #[must_use]
    pub fn bytes(self) -> usize {
        unimplemented!()
    }

    /// The hash of all `parts` in order, written to the first [`Hash::bytes`] bytes of `out`. Leaves no copy of its input behind.
    ///
    /// # Panics
    /// If `out` is too short.
    pub fn digest(self, parts: &[&[u8]], out: &mut [u8]) {
        unimplemented!("{} {}", parts.len(), out.len())
    }
}
