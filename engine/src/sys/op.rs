//! What a ring is asked to do, as values that own the memory the kernel will touch.

use std::ops::Range;

use crate::sys::buffer::Buf;

/// Offset that means "the file's current position".
pub const CURRENT_POSITION: u64 = u64::MAX;

/// A read or write of part of a buffer. The buffer belongs to the ring until the completion.
#[derive(Debug)]
pub struct Transfer {
    /// Write, else read.
    pub write: bool,
    /// Index in the ring's table of files.
    pub file: u32,
    /// Byte offset, or [`CURRENT_POSITION`].
    pub offset: u64,
    /// The memory.
    pub buf: Buf,
    /// The part of it.
    pub span: Range<u32>,
}

/// One submission.
#[derive(Debug)]
pub enum Submission {
    /// Move bytes.
    Transfer(Transfer),
    /// `fdatasync`.
    Sync {
        /// Index in the ring's table of files.
        file: u32,
    },
    /// Make a hole, without changing the file's size.
    Punch {
        /// Index in the ring's table of files.
        file: u32,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Wait until the file can be read, else written.
    Poll {
        /// Index in the ring's table of files.
        file: u32,
        /// Readable, else writable.
        read: bool,
    },
}

impl Submission {
    /// The file concerned.
    #[must_use]
    pub fn file(&self) -> u32 {
        match self {
            Self::Transfer(transfer) => transfer.file,
            Self::Sync { file } | Self::Punch { file, .. } | Self::Poll { file, .. } => *file,
        }
    }
}
