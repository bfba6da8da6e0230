//! LUKS2 headers, sans I/O.
//!
//! | file | its one purpose |
//! |---|---|
//! | `mod` | a header: two binary copies around one metadata text |
//! | `binary` | the 4096-byte binary header and its checksum |
//! | `json` | reading JSON with bounds |
//! | `fields` | fields of its objects by their types on disk |
//! | `metadata` | the JSON metadata as structures |
//! | `parse` | from JSON to structures |
//! | `emit` | from structures to JSON |
//! | `validate` | the rules over all of it |
//! | `load` | which of the two copies is to be believed |
//! | `reencrypt` | a re-encryption as the metadata has it |
//! | `edit` | new headers, free places, objects removed with what refers to them |

pub mod binary;
pub mod edit;
mod emit;
mod fields;
pub mod json;
mod load;
pub mod metadata;
mod parse;
pub mod reencrypt;
pub mod validate;

use crate::error::{Error, ErrorKind, Result};
use crate::format::luks2::binary::{BINARY_BYTES, Binary};
use crate::format::luks2::metadata::{Area, Metadata};
use crate::format::luks2::validate::AREA_ALIGN;

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
    binary::has_magic(bytes, Copy::Primary) && binary::version(bytes) == Some(2)
}

/// Find and validate both copies. `read(offset, buf)` fills `buf` or says why not; it is asked for bounded ranges only
/// (never more than one copy at a time), and a read beyond the end counts as a damaged copy.
///
/// # Errors
/// `Invalid`: no valid copy, with what is wrong with the primary (or the secondary, if that is the only trace of LUKS2). An error of `read` that is not
/// about the end of the device is passed on.
pub fn load(read: &mut dyn FnMut(u64, &mut [u8]) -> Result<()>) -> Result<Loaded> {
    load::load(read)
}

impl Header {
    /// The bytes of one copy, `copy_bytes` long, with the checksum in place.
    ///
    /// # Errors
    /// `NoSpace`: the metadata does not fit the JSON area. `Invalid`: it breaks a rule (see [`validate`]), or its text could not be read
    /// again. `Unsupported`: it was read with numbers that would be written otherwise.
    pub fn to_bytes(&self, copy: Copy) -> Result<Vec<u8>> {
        validate::validate(&self.metadata)?;
        if self.metadata.config.json_size.checked_add(BINARY_BYTES as u64) != Some(self.copy_bytes) {
            return Err(fields::invalid("not that of the binary header", "config json_size"));
        }
        self.metadata.check_numbers()?;
        let text = self.metadata.to_json().to_string();
        let room = self.metadata.config.json_size;
        // A NUL ends the text.
        if text.len() as u64 >= room {
            return Err(validate::too_long(text.len(), room - 1));
        }
        // A header nobody can read is a volume lost: what is written must be readable by our own rules, nesting and size included.
        Metadata::parse(text.as_bytes())
            .map_err(|error| Error::new(error.kind(), "the header would not be readable").because(error))?;
        let mut bytes = vec![0; usize::try_from(self.copy_bytes).expect("4 MiB at most: validated")];
        bytes[BINARY_BYTES..BINARY_BYTES + text.len()].copy_from_slice(text.as_bytes());
        let binary = Binary {
            copy_bytes: self.copy_bytes,
            seqid: self.seqid,
            label: self.label.clone(),
            checksum_alg: self.checksum_alg.clone(),
            salt: self.salts[usize::from(copy == Copy::Secondary)],
            uuid: self.uuid.clone(),
            subsystem: self.subsystem.clone(),
        };
        binary::seal(&mut bytes, &binary, copy, self.offset(copy))?;
        Ok(bytes)
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
        let no_room = || {
            Error::new(ErrorKind::NoSpace, format!("no gap of {bytes} bytes in the keyslots area"))
                .hint("remove a keyslot")
        };
        let size = bytes.max(1).checked_next_multiple_of(AREA_ALIGN).ok_or_else(no_room)?;
        let mut offset = self.keyslots_offset();
        for area in self.taken_areas() {
            if offset.checked_add(size).is_some_and(|end| end <= area.offset) {
                break;
            }
            offset = offset
                .max(area.end().unwrap_or(u64::MAX))
                .checked_next_multiple_of(AREA_ALIGN)
                .ok_or_else(no_room)?;
        }
        match offset.checked_add(size) {
            Some(end) if end <= self.backup_bytes() => Ok(offset),
            _ => Err(no_room()),
        }
    }

    /// The largest gap of the keyslots area, the first of equals.
    ///
    /// # Errors
    /// `NoSpace`: there is none.
    pub fn largest_free_area(&self) -> Result<Area> {
        let end = self.backup_bytes();
        let mut largest = Area { offset: 0, size: 0 };
        let mut from = self.keyslots_offset();
        for area in self.taken_areas().into_iter().chain([Area { offset: end, size: 0 }]) {
            let size = area.offset.min(end).saturating_sub(from) / AREA_ALIGN * AREA_ALIGN;
            if size > largest.size {
                largest = Area { offset: from, size };
            }
            from =
                from.max(area.end().and_then(|end| end.checked_next_multiple_of(AREA_ALIGN)).unwrap_or(end));
        }
        if largest.size == 0 {
            return Err(Error::new(ErrorKind::NoSpace, "the keyslots area is full").hint("remove a keyslot"));
        }
        Ok(largest)
    }

    /// Areas of all keyslots by offset.
    fn taken_areas(&self) -> Vec<Area> {
        let mut taken: Vec<Area> =
            self.metadata.keyslots.values().filter_map(metadata::Keyslot::area).collect();
        taken.sort_by_key(|area| area.offset);
        taken
    }
}
