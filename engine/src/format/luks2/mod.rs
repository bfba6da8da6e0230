//! LUKS2 headers, sans I/O.
//!
//! | file | its one purpose |
//! |---|---|
//! | `mod` | a header: two binary copies around one metadata text |
//! | `binary` | the 4096-byte binary header and its checksum |
//! | `metadata` | the JSON metadata as structures |
//! | `validate` | the rules over all of it |

pub mod binary;
pub mod metadata;
pub mod validate;

use crate::error::Result;
use crate::format::luks2::metadata::Metadata;

/// Smallest and largest size of one header copy with its JSON area, bytes; each a power of two.
pub const COPY_BYTES: std::ops::RangeInclusive<u64> = 0x4000..=0x40_0000;

/// A valid header.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    /// Bytes of one copy: binary header and JSON area.
    pub copy_bytes: u64,
    /// Counts header writes.
    pub seqid: u64,
    /// At most 47 bytes.
    pub label: String,
    /// `sha256`.
    pub checksum_alg: String,
    /// Text UUID.
    pub uuid: String,
    /// At most 47 bytes.
    pub subsystem: String,
    /// Random bytes of the two copies.
    pub salts: [[u8; 64]; 2],
    /// What the JSON says.
    pub metadata: Metadata,
}

/// One of the two copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Copy {
    /// At byte 0.
    Primary,
    /// At `copy_bytes`.
    Secondary,
}

/// How a copy was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// Valid, and as new as the other or newer.
    Good,
    /// Valid, but older than the other.
    Obsolete,
    /// Not valid: why.
    Damaged(String),
}

/// What a device holds.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// The header to use: the newer of the valid copies.
    pub header: Header,
    /// Both copies: primary, secondary.
    pub health: [Health; 2],
}

/// Do these bytes (the first of a device) begin like a LUKS2 primary header?
#[must_use]
pub fn is_here(bytes: &[u8]) -> bool {
    unimplemented!("{}", bytes.len())
}

/// Find and validate both copies. `read(offset, buf)` fills `buf` or says why not; it is asked for bounded ranges only
/// (never more than one copy at a time), and a read beyond the end counts as a damaged copy.
///
/// # Errors
/// `Invalid`: no valid copy, with what is wrong with the primary (or the secondary, if that is the only trace of LUKS2). An error of `read` that is not
/// about the end of the device is passed on.
pub fn load(read: &mut dyn FnMut(u64, &mut [u8]) -> Result<()>) -> Result<Loaded> {
    unimplemented!("{}", read(0, &mut []).is_ok())
}

impl Header {
    /// The bytes of one copy, `copy_bytes` long, with the checksum in place.
    ///
    /// # Errors
    /// `NoSpace`: the metadata does not fit the JSON area. `Invalid`: it breaks a rule (see [`validate`]).
    pub fn to_bytes(&self, copy: Copy) -> Result<Vec<u8>> {
        unimplemented!("{copy:?}")
    }

    /// Where a copy lies, bytes.
    #[must_use]
    pub fn offset(&self, copy: Copy) -> u64 {
        match copy {
            Copy::Primary => 0,
            Copy::Secondary => self.copy_bytes,
        }
    }

    /// Where the keyslots area begins, bytes.
    #[must_use]
    pub fn keyslots_offset(&self) -> u64 {
        2 * self.copy_bytes
    }

    /// Bytes of both copies and the keyslots area: what a backup holds.
    #[must_use]
    pub fn backup_bytes(&self) -> u64 {
        self.keyslots_offset() + self.metadata.config.keyslots_size
    }

    /// A free place for an area of `bytes` (rounded up to 4096): the first gap of the keyslots area.
    ///
    /// # Errors
    /// `NoSpace`.
    pub fn free_area(&self, bytes: u64) -> Result<u64> {
        unimplemented!("{bytes}")
    }
}
