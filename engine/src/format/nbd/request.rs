//! Transmission: what a client sends.
//!
//! ```text
//! compact   0 magic u32 · 4 flags u16 · 6 type u16 · 8 cookie u64 · 16 offset u64 · 24 length u32         28 bytes
//! extended  0 magic u32 · 4 flags u16 · 6 type u16 · 8 cookie u64 · 16 offset u64 · 24 length u64         32 bytes
//! ```

use crate::format::nbd::{EXTENDED_REQUEST_MAGIC, REQUEST_MAGIC, command_flags};

/// Bytes of a compact request.
pub const COMPACT_BYTES: usize = 28;
/// Bytes of an extended request.
pub const EXTENDED_BYTES: usize = 32;

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Send bytes.
    Read,
    /// Take bytes; they follow the request.
    Write,
    /// End of the connection; no reply.
    Disconnect,
    /// Make durable what has been replied to.
    Flush,
    /// The bytes are not needed any more.
    Trim,
    /// Bring into memory.
    Cache,
    /// Make them zero.
    WriteZeroes,
    /// What is allocated.
    BlockStatus,
    /// Something else, by its number.
    Unknown(u16),
}

impl Command {
    /// By its number.
    #[must_use]
    pub fn of(number: u16) -> Self {
        match number {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Disconnect,
            3 => Self::Flush,
            4 => Self::Trim,
            5 => Self::Cache,
            6 => Self::WriteZeroes,
            7 => Self::BlockStatus,
            other => Self::Unknown(other),
        }
    }

    /// Its number.
    #[must_use]
    pub fn number(self) -> u16 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Disconnect => 2,
            Self::Flush => 3,
            Self::Trim => 4,
            Self::Cache => 5,
            Self::WriteZeroes => 6,
            Self::BlockStatus => 7,
            Self::Unknown(other) => other,
        }
    }
}

/// One request, without its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// What.
    pub command: Command,
    /// See [`command_flags`].
    pub flags: u16,
    /// The client's name for it; comes back in the reply.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

impl Request {
    /// Read one. `None`: the magic is wrong, so nothing that follows can be understood.
    ///
    /// # Panics
    /// If there are fewer bytes than [`COMPACT_BYTES`] or, extended, [`EXTENDED_BYTES`].
    #[must_use]
    pub fn parse(bytes: &[u8], extended: bool) -> Option<Self> {
        let u16_at = |at: usize| u16::from_be_bytes(bytes[at..at + 2].try_into().expect("2 bytes"));
        let u32_at = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        let u64_at = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        if u32_at(0) != if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC } {
            return None;
        }
        Some(Self {
            flags: u16_at(4),
            command: Command::of(u16_at(6)),
            cookie: u64_at(8),
            offset: u64_at(16),
            length: if extended { u64_at(24) } else { u32_at(24).into() },
        })
    }

    /// Write one; returns how many bytes it took.
    ///
    /// # Panics
    /// If `into` is shorter than that, or a compact request has a length of 4 GiB or more.
    pub fn put(&self, into: &mut [u8], extended: bool) -> usize {
        let magic = if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        into[0..4].copy_from_slice(&magic.to_be_bytes());
        into[4..6].copy_from_slice(&self.flags.to_be_bytes());
        into[6..8].copy_from_slice(&self.command.number().to_be_bytes());
        into[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        into[16..24].copy_from_slice(&self.offset.to_be_bytes());
        if extended {
            into[24..32].copy_from_slice(&self.length.to_be_bytes());
            return EXTENDED_BYTES;
        }
        let length = u32::try_from(self.length).expect("a compact request is shorter than 4 GiB");
        into[24..28].copy_from_slice(&length.to_be_bytes());
        COMPACT_BYTES
    }

    /// Bytes that follow the request on the wire: its payload. A WRITE has one whether it says so or not: with extended headers it
    /// must say so, but QEMU's client (10.0) does not, and sends the payload all the same.
    #[must_use]
    pub fn payload(&self, extended: bool) -> u64 {
        let announced = extended && self.flags & command_flags::PAYLOAD_LEN != 0;
        if announced || self.command == Command::Write { self.length } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_has_a_payload_whether_it_says_so_or_not() {
        for (command, flags, extended, payload) in [
            (Command::Write, 0, false, 9),
            (Command::Write, 0, true, 9),
            (Command::Write, command_flags::PAYLOAD_LEN, true, 9),
            (Command::BlockStatus, command_flags::PAYLOAD_LEN, true, 9),
            (Command::BlockStatus, command_flags::PAYLOAD_LEN, false, 0),
            (Command::Read, 0, true, 0),
        ] {
            let request = Request { command, flags, cookie: 0, offset: 0, length: 9 };
            assert_eq!(request.payload(extended), payload, "{request:?} {extended}");
        }
    }

    #[test]
    fn a_request_comes_back_as_it_was_written() {
        for extended in [false, true] {
            for number in 0..10 {
                let request = Request {
                    command: Command::of(number),
                    flags: 0x21,
                    cookie: u64::MAX - 7,
                    offset: 1 << 45,
                    length: 0xffff_ffff,
                };
                let mut bytes = [0; EXTENDED_BYTES];
                let len = request.put(&mut bytes, extended);
                assert_eq!(len, if extended { EXTENDED_BYTES } else { COMPACT_BYTES });
                assert_eq!(Request::parse(&bytes, extended), Some(request));
                assert_eq!(Request::parse(&bytes, !extended), None);
            }
        }
    }
}
