//! A re-encryption as LUKS2 metadata has it, sans I/O: which data is under which key, what is under way, and the next state.
//!
//! Offsets here are of the plaintext (`0..total`), whatever the direction: a step rewrites the *hotzone* `[a, b)`. Going forward,
//! everything before the boundary is new; going backward, everything from the boundary on is.
//!
//! ```text
//! forward    | new | hotzone | old ............ |       backward   | old ............ | hotzone | new |
//!                  ^ boundary                                                                   ^ boundary
//! ```
//! States (LUKS2 on-disk format, "Reencryption"): no requirement: *none*. Requirement and no segment flagged `in-reencryption`:
//! *clean*, at rest between two steps. One so flagged: *crash*, to be recovered first.
//!
//! | file | its one purpose |
//! |---|---|
//! | `mod` | the process and its state |
//! | `layout` | the data segments of each state |
//! | `valid` | what is valid of any, whoever wrote it |
//! | `read` | from metadata: every rule checked, forged ones refused |
//! | `write` | to metadata: begin, hot, clean, finish |
//! | `digest` | the bytes the protection digest covers |

pub mod digest;
mod layout;
pub mod read;
pub mod valid;
pub mod write;

#[cfg(test)]
mod tests;

use crate::crypto::hash::Hash;
use crate::format::luks2::metadata::Area;
use crate::units::Extent;

/// What the data becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// From one volume key to another.
    Reencrypt,
    /// From plain data.
    Encrypt,
    /// To plain data.
    Decrypt,
}

impl Mode {
    const ALL: [Self; 3] = [Self::Reencrypt, Self::Encrypt, Self::Decrypt];

    /// Its name on disk.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Reencrypt => "reencrypt",
            Self::Encrypt => "encrypt",
            Self::Decrypt => "decrypt",
        }
    }
}

/// Where the first step is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// At the beginning.
    Forward,
    /// At the end.
    Backward,
}

impl Direction {
    /// Its name on disk.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Backward => "backward",
        }
    }
}

/// How blocks are hashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checksum {
    /// Which hash.
    pub hash: Hash,
    /// Bytes of a block, a power of two from 512: what the device writes whole or not at all.
    pub block_bytes: u32,
}

/// How what a step overwrites can be had again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resilience {
    /// Not at all.
    None,
    /// Blocks are told apart by the hashes of the old ones, packed from the start of the area.
    Checksum(Checksum),
    /// The old bytes are in the area.
    Journal,
    /// They are where they were: data moves by `shift` bytes, and no step is longer.
    Datashift {
        /// Bytes.
        shift: u64,
    },
}

impl Resilience {
    /// Its name on disk.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Checksum(_) => "checksum",
            Self::Journal => "journal",
            Self::Datashift { .. } => "datashift",
        }
    }
}

/// One side of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Side {
    /// Where plaintext byte 0 lies on the data device.
    pub offset: u64,
    /// How it is encrypted; `None`: plain (`linear`).
    pub cipher: Option<SideCipher>,
    /// The digest that checks its key; none of a plain side.
    pub digest: Option<u32>,
}

/// The cipher of a side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SideCipher {
    /// dm-crypt's notation.
    pub encryption: String,
    /// Data unit, bytes.
    pub sector_size: u32,
    /// Counter of plaintext byte 0, 512-byte sectors.
    pub iv_tweak: u64,
}

/// What is settled when it begins and never changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// The `reencrypt` keyslot.
    pub keyslot: u32,
    /// What the data becomes.
    pub mode: Mode,
    /// From where.
    pub direction: Direction,
    /// How it is protected.
    pub resilience: Resilience,
    /// Its place in the keyslots area, bytes from the start of the header device.
    pub area: Area,
    /// As it was.
    pub old: Side,
    /// As it will be.
    pub new: Side,
    /// Datashift: the first bytes of the old side were moved out of the header's way: how many, and where they lie now.
    pub moved: Option<Moved>,
    /// Bytes of plaintext, where the metadata says: always when data moves. `None`: as many as the data device has behind
    /// [`Side::offset`].
    pub total: Option<u64>,
    /// The digest over all this, [`digest::message`]; absent only between [`write::begin`] and [`write::protect`].
    pub protection: Option<u32>,
}

/// See [`Process::moved`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moved {
    /// Bytes, from plaintext byte 0.
    pub bytes: u64,
    /// Where they lie on the data device.
    pub offset: u64,
}

/// Where it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// At rest. `boundary`: between old and new; `None`: nothing is done yet.
    Clean {
        /// Plaintext offset.
        boundary: Option<u64>,
    },
    /// A step was interrupted: each block of the hotzone is old or new.
    Crash {
        /// First byte.
        start: u64,
        /// One past the last byte. The step of a mode without protection reaches to the end of all that was left to do.
        end: u64,
    },
    /// All data is new; what is left is to take the metadata down.
    Finished,
}

impl State {
    /// Bytes that are new for sure, of `total`.
    #[must_use]
    pub fn done_bytes(self, process: &Process, total: u64) -> u64 {
        let boundary = match (self, process.direction) {
            (Self::Finished, _) => return total,
            (Self::Clean { boundary: None }, _) => return 0,
            (Self::Clean { boundary: Some(boundary) }, _) => boundary,
            (Self::Crash { start, .. }, Direction::Forward) => start,
            (Self::Crash { end, .. }, Direction::Backward) => end,
        };
        match process.direction {
            Direction::Forward => boundary.min(total),
            Direction::Backward => total.saturating_sub(boundary),
        }
    }
}

impl Process {
    /// The larger of both sides' data units, bytes: boundaries and the data itself are multiples of it.
    #[must_use]
    pub fn unit_bytes(&self) -> u64 {
        let unit = |side: &Side| side.cipher.as_ref().map_or(512, |cipher| u64::from(cipher.sector_size));
        unit(&self.old).max(unit(&self.new))
    }

    /// Least unit of a hotzone, bytes: both sides' data units, and blocks that are hashed.
    #[must_use]
    pub fn step_bytes(&self) -> u64 {
        let block = match self.resilience {
            Resilience::Checksum(checksum) => u64::from(checksum.block_bytes),
            _ => 512,
        };
        self.unit_bytes().max(block)
    }

    /// Most bytes of a hotzone, by its means of protection; `None`: no limit.
    #[must_use]
    pub fn hotzone_max(&self) -> Option<u64> {
        match self.resilience {
            Resilience::None => None,
            Resilience::Checksum(checksum) => {
                let hashes = self.area.size / checksum.hash.bytes() as u64;
                Some(hashes.saturating_mul(checksum.block_bytes.into()))
            }
            Resilience::Journal => Some(self.area.size),
            Resilience::Datashift { shift } => Some(shift),
        }
    }

    /// The boundary when nothing is done.
    #[must_use]
    pub fn begins_at(&self, total: u64) -> u64 {
        match self.direction {
            Direction::Forward => 0,
            Direction::Backward => total,
        }
    }

    /// The boundary when all is done.
    #[must_use]
    pub fn ends_at(&self, total: u64) -> u64 {
        match self.direction {
            Direction::Forward => total,
            Direction::Backward => 0,
        }
    }

    /// The state at rest with this boundary.
    #[must_use]
    pub fn clean_at(&self, boundary: u64, total: u64) -> State {
        if boundary == self.ends_at(total) {
            State::Finished
        } else if boundary == self.begins_at(total) {
            State::Clean { boundary: None }
        } else {
            State::Clean { boundary: Some(boundary) }
        }
    }

    /// The boundary when a hotzone is done.
    #[must_use]
    pub fn boundary_after(&self, hot: Extent) -> u64 {
        match self.direction {
            Direction::Forward => hot.end(),
            Direction::Backward => hot.start(),
        }
    }
}
