//! Haggling: the greeting, options a client sends, replies to them, and the blocks of `INFO` in them; both sides.
//!
//! ```text
//! greeting  0 GREETING_MAGIC u64 · 8 OPTION_MAGIC u64 · 16 handshake flags u16                            18 bytes; client: flags u32
//! option    0 OPTION_MAGIC u64 · 8 option u32 · 12 length u32                                             16 bytes, then data
//! reply     0 OPTION_REPLY_MAGIC u64 · 8 option u32 · 12 type u32 · 16 length u32                         20 bytes, then data
//! begin     0 size u64 · 8 transmission flags u16 [· 124 zeros]                   the answer to EXPORT_NAME, which has no header
//!
//! INFO, GO  name length u32 · name · count u16 · count × kind u16
//! …_META_…  name length u32 · name · count u32 · count × (query length u32 · query)
//! SERVER    name length u32 · name · description
//! CONTEXT   id u32 · name
//! INFO      kind u16 · block
//! ```
//!
//! Whoever reads a header decides whether the data behind it is worth having: [`OPTION_DATA_MAX`] and [`REPLY_DATA_MAX`] say what
//! nobody honest exceeds. Everything here reads from bytes that have arrived, and allocates nothing by a length in them.

use crate::format::nbd::{GREETING_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, STRING_MAX};

/// Bytes of a server's greeting.
pub const GREETING_BYTES: usize = 18;
/// Bytes of a client's answer to it.
pub const CLIENT_FLAGS_BYTES: usize = 4;
/// Bytes of an option's header.
pub const OPTION_BYTES: usize = 16;
/// Bytes of a reply's header.
pub const REPLY_BYTES: usize = 20;
/// Bytes of the answer to EXPORT_NAME, without the zeros.
pub const BEGIN_BYTES: usize = 10;
/// Zeros behind it, unless both sides said [`crate::format::nbd::handshake::NO_ZEROES`].
pub const BEGIN_ZEROS: usize = 124;
/// Longest data of an option a server takes: a name and several queries of the longest kind.
pub const OPTION_DATA_MAX: u32 = 8 * STRING_MAX;
/// Longest data of a reply a client takes: a name and a description of the longest kind, with room.
pub const REPLY_DATA_MAX: u32 = 4 * STRING_MAX;

/// Numbers of options.
pub mod number {
    /// The old way to begin transmission.
    pub const EXPORT_NAME: u32 = 1;
    /// Leave.
    pub const ABORT: u32 = 2;
    /// Names of all exports.
    pub const LIST: u32 = 3;
    /// TLS from here on.
    pub const STARTTLS: u32 = 5;
    /// Tell of an export.
    pub const INFO: u32 = 6;
    /// The same, and begin transmission.
    pub const GO: u32 = 7;
    /// Structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Which contexts there are.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Which contexts BLOCK_STATUS shall answer.
    pub const SET_META_CONTEXT: u32 = 10;
    /// 64-bit headers.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Types of replies.
pub mod answer {
    /// Done.
    pub const ACK: u32 = 1;
    /// A name, for LIST.
    pub const SERVER: u32 = 2;
    /// A block of INFO.
    pub const INFO: u32 = 3;
    /// A context.
    pub const META_CONTEXT: u32 = 4;
    /// Set in all errors.
    pub const ERROR_BIT: u32 = 1 << 31;
    /// Unknown option.
    pub const ERR_UNSUP: u32 = ERROR_BIT | 1;
    /// Not allowed here.
    pub const ERR_POLICY: u32 = ERROR_BIT | 2;
    /// Makes no sense.
    pub const ERR_INVALID: u32 = ERROR_BIT | 3;
    /// Not on this platform.
    pub const ERR_PLATFORM: u32 = ERROR_BIT | 4;
    /// TLS first.
    pub const ERR_TLS_REQD: u32 = ERROR_BIT | 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = ERROR_BIT | 6;
    /// Leaving.
    pub const ERR_SHUTDOWN: u32 = ERROR_BIT | 7;
    /// The client must ask for block sizes.
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR_BIT | 8;
    /// Too long.
    pub const ERR_TOO_BIG: u32 = ERROR_BIT | 9;
    /// Extended headers first; or: they are agreed on already.
    pub const ERR_EXT_HEADER_REQD: u32 = ERROR_BIT | 10;
}

/// Types of INFO blocks.
pub mod info {
    /// Size u64, transmission flags u16.
    pub const EXPORT: u16 = 0;
    /// Canonical name.
    pub const NAME: u16 = 1;
    /// For humans.
    pub const DESCRIPTION: u16 = 2;
    /// Minimum, preferred, maximum u32.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Bytes that are not what the protocol has in their place; the text says what they should have been.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed(pub &'static str);

impl std::fmt::Display for Malformed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Malformed {}

/// Bytes being read from the front.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, bytes: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.0.split_at_checked(bytes).ok_or(Malformed("the data ends too early"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn u16(&mut self) -> Result<u16, Malformed> {
        Ok(u16::from_be_bytes(self.take(2)?.try_into().expect("2 bytes")))
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_be_bytes(self.take(4)?.try_into().expect("4 bytes")))
    }

    fn u64(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from_be_bytes(self.take(8)?.try_into().expect("8 bytes")))
    }

    /// A string behind its length.
    fn string(&mut self) -> Result<&'a str, Malformed> {
        let bytes = self.u32()? as usize;
        text(self.take(bytes)?)
    }

    fn end(&self) -> Result<(), Malformed> {
        if self.0.is_empty() { Ok(()) } else { Err(Malformed("the data goes on behind its end")) }
    }
}

/// A string of the protocol: UTF-8 without NUL, of at most [`STRING_MAX`] bytes.
///
/// # Errors
/// It is not.
pub fn text(bytes: &[u8]) -> Result<&str, Malformed> {
    if bytes.len() > STRING_MAX as usize {
        return Err(Malformed("a string is longer than 4096 bytes"));
    }
    let text = std::str::from_utf8(bytes).map_err(|_| Malformed("a string is not UTF-8"))?;
    if text.contains('\0') { Err(Malformed("a string contains NUL")) } else { Ok(text) }
}

/// Append a string behind its length.
fn put_string(into: &mut Vec<u8>, text: &str) {
    into.extend_from_slice(&length_of(text.as_bytes()).to_be_bytes());
    into.extend_from_slice(text.as_bytes());
}

fn length_of(data: &[u8]) -> u32 {
    u32::try_from(data.len()).expect("what we send is shorter than 4 GiB")
}

// ---- greeting

/// The bytes a server begins with.
#[must_use]
pub fn greeting(flags: u16) -> [u8; GREETING_BYTES] {
    let mut bytes = [0; GREETING_BYTES];
    bytes[0..8].copy_from_slice(&GREETING_MAGIC.to_be_bytes());
    bytes[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
    bytes[16..18].copy_from_slice(&flags.to_be_bytes());
    bytes
}

/// Read a greeting; returns the handshake flags.
///
/// # Errors
/// Not a server that haggles.
pub fn parse_greeting(bytes: &[u8; GREETING_BYTES]) -> Result<u16, Malformed> {
    let mut reader = Reader(bytes);
    if reader.u64()? != GREETING_MAGIC {
        return Err(Malformed("this is no NBD server"));
    }
    if reader.u64()? != OPTION_MAGIC {
        return Err(Malformed("the server speaks the old protocol, without options"));
    }
    reader.u16()
}

// ---- options

/// The header of an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// See [`number`].
    pub option: u32,
    /// Bytes of data that follow.
    pub length: u32,
}

/// Read an option's header. `None`: the magic is wrong, so nothing that follows can be understood.
#[must_use]
pub fn parse_option(bytes: &[u8; OPTION_BYTES]) -> Option<Header> {
    let u32_at = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
    let magic = u64::from_be_bytes(bytes[0..8].try_into().expect("8 bytes"));
    (magic == OPTION_MAGIC).then(|| Header { option: u32_at(8), length: u32_at(12) })
}

/// Append an option with its data.
///
/// # Panics
/// If the data is of 4 GiB or more.
pub fn put_option(into: &mut Vec<u8>, option: u32, data: &[u8]) {
    into.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    into.extend_from_slice(&option.to_be_bytes());
    into.extend_from_slice(&length_of(data).to_be_bytes());
    into.extend_from_slice(data);
}

/// Append INFO or GO: an export, and the kinds of blocks wanted ([`info`]).
///
/// # Panics
/// If there are more than 65,535 kinds.
pub fn put_go(into: &mut Vec<u8>, option: u32, export: &str, kinds: &[u16]) {
    let mut data = Vec::with_capacity(6 + export.len() + 2 * kinds.len());
    put_string(&mut data, export);
    data.extend_from_slice(&u16::try_from(kinds.len()).expect("a handful").to_be_bytes());
    kinds.iter().for_each(|kind| data.extend_from_slice(&kind.to_be_bytes()));
    put_option(into, option, &data);
}

/// Append LIST_META_CONTEXT or SET_META_CONTEXT: an export, and which contexts.
pub fn put_contexts(into: &mut Vec<u8>, option: u32, export: &str, queries: &[&str]) {
    let mut data = Vec::with_capacity(64 + export.len());
    put_string(&mut data, export);
    data.extend_from_slice(&u32::try_from(queries.len()).expect("a handful").to_be_bytes());
    queries.iter().for_each(|query| put_string(&mut data, query));
    put_option(into, option, &data);
}

/// Data of INFO and GO.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Go<'a> {
    /// Of the export.
    pub name: &'a str,
    kinds: &'a [u8],
}

impl<'a> Go<'a> {
    /// Read it.
    ///
    /// # Errors
    /// Lengths that do not fit, or a name that is no string.
    pub fn parse(data: &'a [u8]) -> Result<Self, Malformed> {
        let mut reader = Reader(data);
        let name = reader.string()?;
        let count = usize::from(reader.u16()?);
        let kinds = reader.take(2 * count)?;
        reader.end()?;
        Ok(Self { name, kinds })
    }

    /// Was this kind of block asked for?
    #[must_use]
    pub fn wants(&self, kind: u16) -> bool {
        self.kinds.chunks_exact(2).any(|bytes| bytes == kind.to_be_bytes())
    }
}

/// Data of LIST_META_CONTEXT and SET_META_CONTEXT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Contexts<'a> {
    /// Of the export.
    pub name: &'a str,
    /// How many queries there are.
    pub count: u32,
    queries: &'a [u8],
}

impl<'a> Contexts<'a> {
    /// Read it, every query included.
    ///
    /// # Errors
    /// Lengths that do not fit, or a string that is none.
    pub fn parse(data: &'a [u8]) -> Result<Self, Malformed> {
        let mut reader = Reader(data);
        let name = reader.string()?;
        let count = reader.u32()?;
        let queries = reader.0;
        // Bounded by the data: a query takes at least the 4 bytes of its length.
        for _ in 0..count {
            reader.string()?;
        }
        reader.end()?;
        Ok(Self { name, count, queries })
    }

    /// The queries.
    pub fn queries(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        let mut reader = Reader(self.queries);
        (0..self.count).map(move |_| reader.string().expect("every query was read before"))
    }
}

// ---- replies

/// The header of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplyHeader {
    /// What is replied to.
    pub option: u32,
    /// See [`answer`].
    pub kind: u32,
    /// Bytes of data that follow.
    pub length: u32,
}

/// Read a reply's header. `None`: the magic is wrong, so nothing that follows can be understood.
#[must_use]
pub fn parse_reply(bytes: &[u8; REPLY_BYTES]) -> Option<ReplyHeader> {
    let u32_at = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
    let magic = u64::from_be_bytes(bytes[0..8].try_into().expect("8 bytes"));
    (magic == OPTION_REPLY_MAGIC).then(|| ReplyHeader {
        option: u32_at(8),
        kind: u32_at(12),
        length: u32_at(16),
    })
}

/// Append a reply with its data; that of an error is a text for humans.
pub fn put_reply(into: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    into.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    into.extend_from_slice(&option.to_be_bytes());
    into.extend_from_slice(&kind.to_be_bytes());
    into.extend_from_slice(&length_of(data).to_be_bytes());
    into.extend_from_slice(data);
}

/// Append a SERVER reply: an export, for LIST.
pub fn put_server(into: &mut Vec<u8>, name: &str, description: &str) {
    let mut data = Vec::with_capacity(4 + name.len() + description.len());
    put_string(&mut data, name);
    data.extend_from_slice(description.as_bytes());
    put_reply(into, number::LIST, answer::SERVER, &data);
}

/// Read the data of a SERVER reply: name and description.
///
/// # Errors
/// Lengths that do not fit, or strings that are none.
pub fn parse_server(data: &[u8]) -> Result<(&str, &str), Malformed> {
    let mut reader = Reader(data);
    let name = reader.string()?;
    Ok((name, text(reader.0)?))
}

/// Append a META_CONTEXT reply: a context and its number, to LIST_META_CONTEXT or SET_META_CONTEXT.
pub fn put_context(into: &mut Vec<u8>, option: u32, id: u32, name: &str) {
    let mut data = Vec::with_capacity(4 + name.len());
    data.extend_from_slice(&id.to_be_bytes());
    data.extend_from_slice(name.as_bytes());
    put_reply(into, option, answer::META_CONTEXT, &data);
}

/// Read the data of a META_CONTEXT reply: number and name.
///
/// # Errors
/// Too short, or a name that is no string.
pub fn parse_context(data: &[u8]) -> Result<(u32, &str), Malformed> {
    let mut reader = Reader(data);
    let id = reader.u32()?;
    Ok((id, text(reader.0)?))
}

/// What the text of an error reply says; nothing where it is no text.
#[must_use]
pub fn error_text(data: &[u8]) -> &str {
    text(data).unwrap_or_default()
}

/// A block of INFO.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Block<'a> {
    /// What there is.
    Export {
        /// Bytes.
        size: u64,
        /// See [`crate::format::nbd::flags`].
        flags: u16,
    },
    /// Its canonical name.
    Name(&'a str),
    /// For humans.
    Description(&'a str),
    /// Sizes of requests, bytes.
    BlockSize {
        /// All offsets and lengths are multiples of it.
        minimum: u32,
        /// What is fast.
        preferred: u32,
        /// Longest payload.
        maximum: u32,
    },
    /// Something else, by its number.
    Unknown(u16),
}

impl<'a> Block<'a> {
    /// Read the data of an INFO reply whose numbers keep to the rules.
    ///
    /// # Errors
    /// As [`Block::read`]; block sizes against the rules.
    pub fn parse(data: &'a [u8]) -> Result<Self, Malformed> {
        let block = Self::read(data)?;
        if let Self::BlockSize { minimum, preferred, maximum } = block {
            let sane = minimum.is_power_of_two()
                && minimum <= 1 << 16
                && preferred.is_power_of_two()
                && preferred >= minimum.max(512)
                && maximum >= preferred;
            if !sane {
                return Err(Malformed("the block sizes make no sense"));
            }
        }
        Ok(block)
    }

    /// Read the data of an INFO reply, whatever its numbers say: a client may be content with less than the rules ask of servers.
    ///
    /// # Errors
    /// Of a length its kind does not have; a string that is none.
    pub fn read(data: &'a [u8]) -> Result<Self, Malformed> {
        let mut reader = Reader(data);
        let block = match reader.u16()? {
            info::EXPORT => Self::Export { size: reader.u64()?, flags: reader.u16()? },
            info::NAME => return Ok(Self::Name(text(reader.0)?)),
            info::DESCRIPTION => return Ok(Self::Description(text(reader.0)?)),
            info::BLOCK_SIZE => {
                Self::BlockSize { minimum: reader.u32()?, preferred: reader.u32()?, maximum: reader.u32()? }
            }
            other => return Ok(Self::Unknown(other)),
        };
        reader.end()?;
        Ok(block)
    }

    /// Append an INFO reply to `option`: INFO or GO.
    ///
    /// # Panics
    /// For a block that is unknown.
    pub fn put(&self, into: &mut Vec<u8>, option: u32) {
        let mut data = Vec::with_capacity(16);
        match *self {
            Self::Export { size, flags } => {
                data.extend_from_slice(&info::EXPORT.to_be_bytes());
                data.extend_from_slice(&size.to_be_bytes());
                data.extend_from_slice(&flags.to_be_bytes());
            }
            Self::Name(name) => {
                data.extend_from_slice(&info::NAME.to_be_bytes());
                data.extend_from_slice(name.as_bytes());
            }
            Self::Description(description) => {
                data.extend_from_slice(&info::DESCRIPTION.to_be_bytes());
                data.extend_from_slice(description.as_bytes());
            }
            Self::BlockSize { minimum, preferred, maximum } => {
                data.extend_from_slice(&info::BLOCK_SIZE.to_be_bytes());
                [minimum, preferred, maximum]
                    .iter()
                    .for_each(|bytes| data.extend_from_slice(&bytes.to_be_bytes()));
            }
            Self::Unknown(kind) => panic!("nobody knows how to write INFO block {kind}"),
        }
        put_reply(into, option, answer::INFO, &data);
    }
}

/// Append the answer to EXPORT_NAME.
pub fn put_begin(into: &mut Vec<u8>, size: u64, flags: u16, zeros: bool) {
    into.extend_from_slice(&size.to_be_bytes());
    into.extend_from_slice(&flags.to_be_bytes());
    if zeros {
        into.extend_from_slice(&[0; BEGIN_ZEROS]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The data of the one option or reply in `bytes`.
    fn data(bytes: &[u8], header: usize) -> &[u8] {
        let length = u32::from_be_bytes(bytes[header - 4..header].try_into().expect("4 bytes"));
        assert_eq!(bytes.len() - header, length as usize);
        &bytes[header..]
    }

    #[test]
    fn headers_come_back_as_they_were_written() {
        assert_eq!(parse_greeting(&greeting(3)), Ok(3));
        assert!(parse_greeting(b"SSH-2.0-OpenSSH_9.").is_err());
        let mut old = greeting(3);
        old[8..16].copy_from_slice(&0x0000_4202_8186_1253u64.to_be_bytes());
        assert!(parse_greeting(&old).expect_err("old").0.contains("old"));

        let mut bytes = Vec::new();
        put_option(&mut bytes, number::LIST, b"abc");
        let header = parse_option(bytes[..OPTION_BYTES].try_into().expect("a header"));
        assert_eq!(header, Some(Header { option: number::LIST, length: 3 }));
        bytes[0] ^= 1;
        assert_eq!(parse_option(bytes[..OPTION_BYTES].try_into().expect("a header")), None);

        let mut bytes = Vec::new();
        put_reply(&mut bytes, number::GO, answer::ERR_UNKNOWN, b"no");
        let header = parse_reply(bytes[..REPLY_BYTES].try_into().expect("a header"));
        assert_eq!(header, Some(ReplyHeader { option: number::GO, kind: answer::ERR_UNKNOWN, length: 2 }));
        assert_eq!(error_text(data(&bytes, REPLY_BYTES)), "no");
        assert_eq!(error_text(b"\xff"), "");
    }

    #[test]
    fn options_come_back_as_they_were_written_and_are_refused_at_every_other_length() {
        let mut bytes = Vec::new();
        put_go(&mut bytes, number::GO, "näme", &[info::BLOCK_SIZE, 77]);
        let whole = data(&bytes, OPTION_BYTES).to_vec();
        let go = Go::parse(&whole).expect("whole");
        assert_eq!(go.name, "näme");
        assert!(go.wants(info::BLOCK_SIZE) && go.wants(77) && !go.wants(info::NAME));
        (0..whole.len()).for_each(|cut| assert!(Go::parse(&whole[..cut]).is_err(), "{cut}"));
        assert!(Go::parse(&[&whole[..], &[0]].concat()).is_err());

        let mut bytes = Vec::new();
        put_contexts(&mut bytes, number::SET_META_CONTEXT, "", &["base:", "", "x:y"]);
        let whole = data(&bytes, OPTION_BYTES).to_vec();
        let contexts = Contexts::parse(&whole).expect("whole");
        assert_eq!((contexts.name, contexts.count), ("", 3));
        assert_eq!(contexts.queries().collect::<Vec<_>>(), ["base:", "", "x:y"]);
        (0..whole.len()).for_each(|cut| assert!(Contexts::parse(&whole[..cut]).is_err(), "{cut}"));
        assert!(Contexts::parse(&[&whole[..], &[0]].concat()).is_err());
        let many = [&[0, 0, 0, 0][..], &u32::MAX.to_be_bytes()].concat();
        assert!(Contexts::parse(&many).is_err(), "4 billion queries in no bytes");
    }

    #[test]
    fn replies_come_back_as_they_were_written() {
        let mut bytes = Vec::new();
        put_server(&mut bytes, "one", "a disk");
        assert_eq!(parse_server(data(&bytes, REPLY_BYTES)), Ok(("one", "a disk")));
        bytes.clear();
        put_context(&mut bytes, number::SET_META_CONTEXT, 7, "base:allocation");
        assert_eq!(parse_context(data(&bytes, REPLY_BYTES)), Ok((7, "base:allocation")));
        for block in [
            Block::Export { size: 1 << 50, flags: 0x123 },
            Block::Name("one"),
            Block::Description(""),
            Block::BlockSize { minimum: 1, preferred: 4096, maximum: 32 << 20 },
        ] {
            bytes.clear();
            block.put(&mut bytes, number::GO);
            let data = data(&bytes, REPLY_BYTES);
            assert_eq!(Block::parse(data), Ok(block));
            assert!(Block::parse(&data[..1]).is_err());
        }
        assert_eq!(Block::parse(&[0xff, 0, 1, 2]), Ok(Block::Unknown(0xff00)));
        assert!(Block::parse(&[0; 11]).is_err() && Block::parse(&[0; 13]).is_err(), "EXPORT has 12 bytes");
        for (minimum, preferred, maximum) in [
            (0, 4096, 8192),
            (3, 4096, 8192),
            (1, 256, 8192),
            (4096, 512, 8192),
            (1, 4096, 4095),
            (1 << 17, 1 << 17, 1 << 18),
        ] {
            bytes.clear();
            Block::BlockSize { minimum, preferred, maximum }.put(&mut bytes, number::GO);
            assert!(Block::parse(data(&bytes, REPLY_BYTES)).is_err(), "{minimum} {preferred} {maximum}");
        }
    }

    #[test]
    fn a_string_is_utf8_without_nul_of_at_most_4096_bytes() {
        assert_eq!(text(&[b'x'; 4096]).map(str::len), Ok(4096));
        assert!(text(&[b'x'; 4097]).is_err());
        assert!(text(b"a\0b").is_err());
        assert!(text(b"\xc3").is_err());
    }
}
