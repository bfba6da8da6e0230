//! LUKS1 headers, sans I/O.
//!
//! | file | its one purpose |
//! |---|---|
//! | `mod` | the header as a structure, and its bytes |
//! | `fields` | the bytes cut into fields, without judgement |
//! | `validate` | the rules: what is refused, and what QEMU refuses beside it |
//! | `layout` | where material and payload of a new header go |
//! | `repair` | what is known to go wrong in old headers, corrected |
//! | `json` | the fields under their names in the specification |
//!
//! All numbers are big-endian, all positions 512-byte sectors.
//!
//! ```text
//! byte  size  field                               keyslot: byte  size  field
//!    0     6  magic: "LUKS" BA BE                             0     4  state: 00AC71F3 in use, 0000DEAD not
//!    6     2  version: 1                                      4     4  PBKDF2 iterations
//!    8    32  cipher name: aes                                8    32  PBKDF2 salt
//!   40    32  cipher mode: xts-plain64                       40     4  first sector of the material
//!   72    32  hash: sha256                                   44     4  AF stripes: 4000
//!  104     4  payload, first sector; 0: detached
//!  108     4  volume key, bytes                  sector    8  material of keyslot 0
//!  112    20  volume key digest                         520  of keyslot 1: keys of 64 bytes need 500 sectors,
//!  132    32  its salt                                       rounded up to 4096 bytes: 504
//!  164     4  its iterations                              …
//!  168    40  UUID, text                               4040  end of keyslot 7
//!  208  8*48  keyslots                                 4096  payload, on the next MiB
//! ```
//! Material: AF stripes encrypted with the header's cipher, sectors counted from 0 at its beginning (`volume::area`).
//! Source: LUKS On-Disk Format Specification 1.2.3. There is one copy and no checksum, so validation is all there is.
//!
//! What this module refuses to do: I/O, randomness, key derivation, judging whether this build knows a cipher or hash.

mod fields;
mod json;
mod layout;
mod repair;
mod validate;

use crate::error::Result;
use crate::format::luks1::fields::Fields;

/// Bytes of the header; keyslot material follows.
pub const HEADER_BYTES: usize = 592;
/// Keyslots of every header.
pub const KEYSLOTS: usize = 8;
/// Longest volume key, bytes. No cipher of dm-crypt takes more than half of it; it keeps every sum below far from overflow.
pub const KEY_BYTES_MAX: u32 = 512;

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
        bytes.starts_with(&fields::MAGIC) && bytes.get(6..8) == Some(&fields::VERSION.to_be_bytes()[..])
    }

    /// Parse and validate the first [`HEADER_BYTES`] bytes of a device. Ciphers and hashes are *not* judged here: an unknown cipher is a valid header.
    ///
    /// Text behind a string's NUL is dropped, as cryptsetup does; everything else survives [`Header::to_bytes`].
    ///
    /// # Errors
    /// `Invalid`, naming what is wrong: see [`Header::check`]; and fewer bytes than a header, another magic or version, text
    /// without a NUL at its end or with bytes that are not printable ASCII, a keyslot state that is neither constant.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let header = Fields::read(bytes)?.to_header()?;
        header.check()?;
        Ok(header)
    }

    /// The bytes on disk.
    ///
    /// # Panics
    /// If a string is longer than its field ([`Header::check`] would have said so).
    #[must_use]
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        Fields::of(self).to_bytes()
    }

    /// dm-crypt's name of the cipher: `aes-xts-plain64`.
    #[must_use]
    pub fn cipher(&self) -> String {
        format!("{}-{}", self.cipher_name, self.cipher_mode)
    }
}

impl Keyslot {
    /// Byte offset of its material.
    #[must_use]
    pub fn material_offset(&self) -> u64 {
        u64::from(self.material_sector) * 512
    }
}

#[cfg(test)]
mod tests;
