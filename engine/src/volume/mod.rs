//! LUKS volumes: opening, making and managing them. Where formats (which do no I/O), key derivation, randomness and devices meet.
//!
//! | file | its one purpose |
//! |---|---|
//! | `mod` | a header of either version as it was read, and its data areas |
//! | `unlock` | from a passphrase to the volume key |
//! | `area` | keyslot material: wrap and unwrap a volume key |
//! | `capture` | the header of a volume that arrives in order |
//! | `create` | a new header with its first keyslot, in memory, and the order in which it is written |
//! | `store` | write orders of header changes |
//! | `keyslots` | add, remove, change, convert, erase |
//! | `backup` | header backup and restore |
//! | `repair` | damaged headers |
//! | `tokens` | tokens, and ours: where a key lives and when it must be rotated |
//! | `summary` | a header described |
//! | `doctor` | a volume explained |
//! | `manage` | a request of the wire carried out |
//! | `random` | random bytes |

pub mod area;
pub mod backup;
pub mod capture;
pub mod create;
pub mod doctor;
pub mod keyslots;
pub mod manage;
pub mod random;
pub mod repair;
pub mod store;
pub mod summary;
pub mod tokens;
pub mod unlock;

use crate::backend::blocking::Blocking;
use crate::crypto::spec::CipherSpec;
use crate::error::Result;
use crate::format::{luks1, luks2};

/// A header as it was read.
#[derive(Debug, Clone, PartialEq)]
pub enum Header {
    /// Version 1.
    Luks1(Box<luks1::Header>),
    /// Version 2, with the state of its two copies.
    Luks2(Box<luks2::Loaded>),
}

/// A data area, ready for the pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DataArea {
    /// First byte on the device.
    pub offset: u64,
    /// Bytes; `None`: to the end of the device.
    pub size: Option<u64>,
    /// How it is encrypted; `None`: it is not (`linear`).
    pub cipher: Option<AreaCipher>,
}

/// How a data area is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AreaCipher {
    /// Which cipher.
    pub spec: CipherSpec,
    /// Data unit, bytes.
    pub unit_bytes: u32,
    /// Counter of the first data unit, 512-byte sectors.
    pub offset_sectors: u64,
}

impl Header {
    /// Read the header of a device.
    ///
    /// # Errors
    /// `Unsupported`: no LUKS header here. `Invalid`: a damaged one.
    pub fn load(device: &mut Blocking) -> Result<Self> {
        unimplemented!("{}", device.name())
    }

    /// The data areas in the order of the plaintext.
    ///
    /// # Errors
    /// `Unsupported`: requirements or segment types this build does not know, an unknown cipher (named), integrity.
    pub fn data_areas(&self) -> Result<Vec<DataArea>> {
        unimplemented!()
    }

    /// The volume's UUID.
    #[must_use]
    pub fn uuid(&self) -> &str {
        match self {
            Self::Luks1(header) => &header.uuid,
            Self::Luks2(loaded) => &loaded.header.uuid,
        }
    }
}
