//! Transmission: what a server sends.
//!
//! ```text
//! simple    0 magic u32 · 4 error u32 · 8 cookie u64                                                      16 bytes, then data
//! chunk     0 magic u32 · 4 flags u16 · 6 type u16 · 8 cookie u64 · 16 length u32                         20 bytes, then payload
//! extended  0 magic u32 · 4 flags u16 · 6 type u16 · 8 cookie u64 · 16 offset u64 · 24 length u64         32 bytes, then payload
//! ```

use crate::format::nbd::{CHUNK_MAGIC, EXTENDED_CHUNK_MAGIC, SIMPLE_REPLY_MAGIC};

/// Bytes of a simple reply.
pub const SIMPLE_BYTES: usize = 16;
/// Bytes of a structured reply chunk's header.
pub const CHUNK_BYTES: usize = 20;
/// Bytes of an extended reply chunk's header.
pub const EXTENDED_CHUNK_BYTES: usize = 32;
/// Flag of the last chunk of a reply.
pub const FLAG_DONE: u16 = 1;

/// Types of chunks.
pub mod kind {
    /// Nothing more.
    pub const NONE: u16 = 0;
    /// 8 bytes of offset, then data.
    pub const OFFSET_DATA: u16 = 1;
    /// 8 bytes of offset, 4 of length: zeros.
    pub const OFFSET_HOLE: u16 = 2;
    /// 4 bytes of context id, then pairs of u32: length, flags.
    pub const BLOCK_STATUS: u16 = 5;
    /// 4 bytes of context id, 4 of count, then pairs of u64: length, flags.
    pub const BLOCK_STATUS_EXTENDED: u16 = 6;
    /// 4 bytes of error, 2 of length, text.
    pub const ERROR: u16 = (1 << 15) | 1;
    /// As `ERROR`, then 8 bytes of offset.
    pub const ERROR_OFFSET: u16 = (1 << 15) | 2;
    /// Set in the types of errors.
    pub const ERROR_BIT: u16 = 1 << 15;
}

/// How replies look, as haggled out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Style {
    /// Simple replies only.
    #[default]
    Simple,
    /// Structured replies.
    Structured,
    /// Extended headers, both ways.
    Extended,
}

/// A header as a client reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Header {
    /// A simple reply; data follows a READ that succeeded.
    Simple {
        /// 0, or see [`crate::format::nbd::errors`].
        error: u32,
        /// Of the request.
        cookie: u64,
    },
    /// A chunk.
    Chunk {
        /// See [`FLAG_DONE`].
        flags: u16,
        /// See [`kind`].
        kind: u16,
        /// Of the request.
        cookie: u64,
        /// Of the request; 0 unless extended.
        offset: u64,
        /// Bytes of payload that follow.
        length: u64,
    },
}

/// Write a simple reply.
///
/// # Panics
/// If `into` is shorter than [`SIMPLE_BYTES`].
pub fn put_simple(into: &mut [u8], error: u32, cookie: u64) -> usize {
    into[0..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    into[4..8].copy_from_slice(&error.to_be_bytes());
    into[8..16].copy_from_slice(&cookie.to_be_bytes());
    SIMPLE_BYTES
}

/// Write a chunk's header, structured or extended (`offset` is the request's); returns its bytes.
///
/// # Panics
/// If `into` is too short, or a structured chunk is of 4 GiB or more.
pub fn put_chunk(
    into: &mut [u8],
    extended: bool,
    flags: u16,
    kind: u16,
    cookie: u64,
    offset: u64,
    length: u64,
) -> usize {
    let magic = if extended { EXTENDED_CHUNK_MAGIC } else { CHUNK_MAGIC };
    into[0..4].copy_from_slice(&magic.to_be_bytes());
    into[4..6].copy_from_slice(&flags.to_be_bytes());
    into[6..8].copy_from_slice(&kind.to_be_bytes());
    into[8..16].copy_from_slice(&cookie.to_be_bytes());
    if extended {
        into[16..24].copy_from_slice(&offset.to_be_bytes());
        into[24..32].copy_from_slice(&length.to_be_bytes());
        return EXTENDED_CHUNK_BYTES;
    }
    let length = u32::try_from(length).expect("a structured chunk is shorter than 4 GiB");
    into[16..20].copy_from_slice(&length.to_be_bytes());
    CHUNK_BYTES
}

/// Bytes of the header that begins with these four; `None`: no header does.
#[must_use]
pub fn header_bytes(magic: [u8; 4]) -> Option<usize> {
    match u32::from_be_bytes(magic) {
        SIMPLE_REPLY_MAGIC => Some(SIMPLE_BYTES),
        CHUNK_MAGIC => Some(CHUNK_BYTES),
        EXTENDED_CHUNK_MAGIC => Some(EXTENDED_CHUNK_BYTES),
        _ => None,
    }
}

/// Read a header, as long as [`header_bytes`] says.
///
/// # Panics
/// If `bytes` is not.
#[must_use]
pub fn parse(bytes: &[u8]) -> Header {
    let u16_at = |at: usize| u16::from_be_bytes(bytes[at..at + 2].try_into().expect("2 bytes"));
    let u32_at = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
    let u64_at = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    let cookie = u64_at(8);
    match u32_at(0) {
        SIMPLE_REPLY_MAGIC => Header::Simple { error: u32_at(4), cookie },
        CHUNK_MAGIC => {
            Header::Chunk { flags: u16_at(4), kind: u16_at(6), cookie, offset: 0, length: u32_at(16).into() }
        }
        EXTENDED_CHUNK_MAGIC => Header::Chunk {
            flags: u16_at(4),
            kind: u16_at(6),
            cookie,
            offset: u64_at(16),
            length: u64_at(24),
        },
        other => panic!("{other:#x} is no magic of a reply"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_come_back_as_they_were_written() {
        let mut bytes = [0; EXTENDED_CHUNK_BYTES];
        let len = put_simple(&mut bytes, 5, 99);
        assert_eq!(header_bytes(bytes[..4].try_into().expect("4")), Some(len));
        assert_eq!(parse(&bytes[..len]), Header::Simple { error: 5, cookie: 99 });
        for extended in [false, true] {
            let len = put_chunk(&mut bytes, extended, FLAG_DONE, kind::OFFSET_DATA, 7, 4096, 1 << 20);
            assert_eq!(header_bytes(bytes[..4].try_into().expect("4")), Some(len));
            let offset = if extended { 4096 } else { 0 };
            let expected =
                Header::Chunk { flags: 1, kind: kind::OFFSET_DATA, cookie: 7, offset, length: 1 << 20 };
            assert_eq!(parse(&bytes[..len]), expected);
        }
        assert_eq!(header_bytes(*b"HTTP"), None);
    }
}
