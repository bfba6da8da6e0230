//! The checkpoint of a copy: how far it has come, and what it is a copy of. Without I/O.
//!
//! The file has a description, written once, and two slots that are written in turn:
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 512 | slot of odd sequence numbers |
//! | 4096 | 512 | slot of even sequence numbers, in another block of any device |
//! | 8192 | at most 16 MiB | description |
//!
//! A slot; numbers are little-endian:
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `CRYPTDCP` |
//! | 8 | 4 | version: 1 |
//! | 12 | 4 | bytes of the description |
//! | 16 | 8 | sequence number, from 1 |
//! | 24 | 8 | watermark: every byte of plaintext before it is durable in the sink |
//! | 32 | 32 | SHA-256 of the description |
//! | 64 | 416 | zeros |
//! | 480 | 32 | SHA-256 of bytes 0..480 |
//!
//! The slot that is whole, fits the description and has the higher number counts: one that was torn by a power cut leaves the
//! other. The description:
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 16 | salt |
//! | 16 | 32 | HMAC-SHA256 under K of `key`: is the volume key the same? |
//! | 48 | 32 | HMAC-SHA256 under K, chained over samples of the source: is what it holds the same? |
//! | 80 | 4 | bytes of the text |
//! | 84 | 4 | bytes of the header, 0: none |
//! | 88 | | text: lines `name=value` in a fixed order, of everything that shapes the sink's bytes and of what the source and the sink are |
//! | | | header of a new LUKS volume, as `volume::keep` has it |
//!
//! K is HMAC-SHA256 under the volume key of `cryptd checkpoint 1` and the salt: nothing in the file says anything about the
//! volume key or the plaintext to who does not have the key. The header is as secret as the one in front of a LUKS volume:
//! who has it can try passphrases.

use crate::crypto::hash::Hash;
use crate::error::{Error, ErrorKind, Result};

/// What a slot begins with.
const MAGIC: [u8; 8] = proto::CHECKPOINT_MAGIC;
const _: () = assert!(matches!(&MAGIC, b"CRYPTDCP"));
const VERSION: u32 = 1;
/// Bytes of a slot.
pub const SLOT_BYTES: usize = 512;
/// Where the two slots lie, by sequence number modulo 2.
const SLOT_OFFSETS: [u64; 2] = [4096, 0];
/// Where the description lies.
pub const DESCRIPTION_OFFSET: u64 = 8192;
/// Longest description, bytes: a LUKS2 header of the largest size is half of it.
pub const DESCRIPTION_BYTES_MAX: u32 = 16 << 20;
/// Where the slot's own digest lies.
const SUM_OFFSET: usize = 480;
/// What of a description has a fixed length.
const FIXED_BYTES: usize = 88;
/// Of SHA-256 and of HMAC-SHA256.
pub const DIGEST_BYTES: usize = 32;

const _: () = assert!(SUM_OFFSET + DIGEST_BYTES == SLOT_BYTES);
const _: () = assert!(SLOT_OFFSETS[0] + SLOT_BYTES as u64 <= DESCRIPTION_OFFSET);
const _: () = assert!(16 + 2 * DIGEST_BYTES + 8 == FIXED_BYTES);

/// How far a copy has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// Which of many; the highest counts.
    pub sequence: u64,
    /// Bytes of plaintext before this are durable.
    pub watermark: u64,
    /// Bytes of the description it belongs to.
    pub description_bytes: u32,
    /// Its SHA-256.
    pub description_digest: [u8; DIGEST_BYTES],
}

/// What a copy is a copy of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// Makes the keyed values those of this copy only.
    pub salt: [u8; 16],
    /// Of the volume key.
    pub key_check: [u8; DIGEST_BYTES],
    /// Of the source.
    pub source_sample: [u8; DIGEST_BYTES],
    /// Lines `name=value`.
    pub text: String,
    /// Header of a new LUKS volume; empty: none.
    pub header: Vec<u8>,
}

/// SHA-256.
#[must_use]
pub fn digest(bytes: &[u8]) -> [u8; DIGEST_BYTES] {
    let mut sum = [0; DIGEST_BYTES];
    Hash::Sha256.digest(&[bytes], &mut sum);
    sum
}

/// Where both slots lie.
#[must_use]
pub fn slot_offsets() -> [u64; 2] {
    SLOT_OFFSETS
}

fn number<const BYTES: usize>(bytes: &[u8], at: usize) -> [u8; BYTES] {
    bytes[at..at + BYTES].try_into().expect("so many bytes")
}

impl Slot {
    /// Where the slot of this sequence number lies: never where the one before it does.
    #[must_use]
    pub fn offset(&self) -> u64 {
        SLOT_OFFSETS[usize::from(self.sequence % 2 == 1)]
    }

    /// As on disk.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; SLOT_BYTES] {
        let mut bytes = [0; SLOT_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.description_bytes.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.watermark.to_le_bytes());
        bytes[32..64].copy_from_slice(&self.description_digest);
        let sum = digest(&bytes[..SUM_OFFSET]);
        bytes[SUM_OFFSET..].copy_from_slice(&sum);
        bytes
    }

    /// What these bytes say; `Ok(None)`: nothing, as a torn or an unwritten slot.
    ///
    /// # Errors
    /// `Unsupported`: a whole slot of another version.
    pub fn parse(bytes: &[u8; SLOT_BYTES]) -> Result<Option<Self>> {
        if bytes[..8] != MAGIC || bytes[SUM_OFFSET..] != digest(&bytes[..SUM_OFFSET]) {
            return Ok(None);
        }
        let version = u32::from_le_bytes(number(bytes, 8));
        if version != VERSION {
            let what = format!("the checkpoint is of version {version}, this build knows {VERSION}");
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        let slot = Self {
            description_bytes: u32::from_le_bytes(number(bytes, 12)),
            sequence: u64::from_le_bytes(number(bytes, 16)),
            watermark: u64::from_le_bytes(number(bytes, 24)),
            description_digest: number(bytes, 32),
        };
        Ok((slot.description_bytes <= DESCRIPTION_BYTES_MAX).then_some(slot))
    }
}

impl Description {
    /// As on disk.
    ///
    /// # Errors
    /// `Limit`: longer than [`DESCRIPTION_BYTES_MAX`].
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let all = FIXED_BYTES + self.text.len() + self.header.len();
        if u32::try_from(all).map_or(true, |all| all > DESCRIPTION_BYTES_MAX) {
            let what = format!("a checkpoint would need a description of {all} bytes");
            return Err(Error::new(ErrorKind::Limit, what));
        }
        let length = |bytes: usize| u32::try_from(bytes).expect("less than all").to_le_bytes();
        let mut bytes = Vec::with_capacity(all);
        bytes.extend_from_slice(&self.salt);
        bytes.extend_from_slice(&self.key_check);
        bytes.extend_from_slice(&self.source_sample);
        bytes.extend_from_slice(&length(self.text.len()));
        bytes.extend_from_slice(&length(self.header.len()));
        bytes.extend_from_slice(self.text.as_bytes());
        bytes.extend_from_slice(&self.header);
        Ok(bytes)
    }

    /// What these bytes say. Their digest was compared with a slot's before.
    ///
    /// # Errors
    /// `Invalid`: the lengths do not add up, or the text is none.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let bad = || Error::new(ErrorKind::Invalid, "the checkpoint's description makes no sense");
        let rest = bytes.get(FIXED_BYTES..).ok_or_else(bad)?;
        let length = |at: usize| u32::from_le_bytes(number(bytes, at)) as usize;
        let (text_bytes, header_bytes) = (length(80), length(84));
        if text_bytes.checked_add(header_bytes) != Some(rest.len()) {
            return Err(bad());
        }
        let (text, header) = rest.split_at(text_bytes);
        let text = std::str::from_utf8(text).map_err(|_| bad())?;
        Ok(Self {
            salt: number(bytes, 0),
            key_check: number(bytes, 16),
            source_sample: number(bytes, 48),
            text: text.to_owned(),
            header: header.to_vec(),
        })
    }
}

/// The first line in which two texts differ: its name, what it says in the one and what in the other.
#[must_use]
pub fn first_difference<'a>(one: &'a str, two: &'a str) -> Option<(&'a str, &'a str, &'a str)> {
    let (mut ones, mut twos) = (one.lines(), two.lines());
    loop {
        let (line, other) = (ones.next(), twos.next());
        if line == other {
            line?;
            continue;
        }
        let split = |line: Option<&'a str>| line.and_then(|line| line.split_once('=')).unwrap_or_default();
        let ((name, said), (other_name, says)) = (split(line), split(other));
        return Some((if name.is_empty() { other_name } else { name }, said, says));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(sequence: u64) -> Slot {
        Slot { sequence, watermark: 7 << 40, description_bytes: 99, description_digest: [5; 32] }
    }

    fn description() -> Description {
        Description {
            salt: [1; 16],
            key_check: [2; 32],
            source_sample: [3; 32],
            text: "work=encrypt\ntotal=5\n".to_owned(),
            header: vec![9; 1000],
        }
    }

    #[test]
    fn a_slot_is_read_as_it_was_written_and_never_lies_over_the_one_before() {
        for sequence in 1..5 {
            let slot = slot(sequence);
            assert_eq!(Slot::parse(&slot.to_bytes()).expect("this version"), Some(slot));
            let next = Slot { sequence: sequence + 1, ..slot };
            assert_ne!(slot.offset(), next.offset());
        }
        assert_eq!((slot(1).offset(), slot(2).offset()), (0, 4096));
    }

    #[test]
    fn a_slot_with_any_bit_changed_says_nothing() {
        let good = slot(3).to_bytes();
        for at in 0..SLOT_BYTES {
            let mut bytes = good;
            bytes[at] ^= 0x10;
            assert_eq!(Slot::parse(&bytes).expect("nothing"), None, "byte {at}");
        }
        assert_eq!(Slot::parse(&[0; SLOT_BYTES]).expect("nothing"), None);
    }

    #[test]
    fn a_whole_slot_of_another_version_is_named_and_one_too_large_is_none() {
        let mut bytes = slot(1).to_bytes();
        bytes[8] = 2;
        let sum = digest(&bytes[..SUM_OFFSET]);
        bytes[SUM_OFFSET..].copy_from_slice(&sum);
        let error = Slot::parse(&bytes).expect_err("another version");
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        let large = Slot { description_bytes: DESCRIPTION_BYTES_MAX + 1, ..slot(1) };
        assert_eq!(Slot::parse(&large.to_bytes()).expect("nothing"), None);
    }

    #[test]
    fn a_description_is_read_as_it_was_written_and_never_panics() {
        let bytes = description().to_bytes().expect("small");
        assert_eq!(Description::parse(&bytes).expect("whole"), description());
        for len in 0..bytes.len() {
            assert_eq!(Description::parse(&bytes[..len]).expect_err("cut").kind(), ErrorKind::Invalid);
        }
        for at in 80..FIXED_BYTES {
            let mut bytes = bytes.clone();
            bytes[at] ^= 0xff;
            assert!(Description::parse(&bytes).is_err(), "byte {at}");
        }
        let huge = Description { header: vec![0; DESCRIPTION_BYTES_MAX as usize], ..description() };
        assert_eq!(huge.to_bytes().expect_err("too long").kind(), ErrorKind::Limit);
    }

    #[test]
    fn texts_are_told_apart_by_their_first_different_line() {
        assert_eq!(first_difference("a=1\nb=2\n", "a=1\nb=2\n"), None);
        assert_eq!(first_difference("a=1\nb=2\n", "a=1\nb=3\n"), Some(("b", "2", "3")));
        assert_eq!(first_difference("a=1\n", "a=1\nb=3\n"), Some(("b", "", "3")));
        assert_eq!(first_difference("a=1\nb=3\n", "a=1\n"), Some(("b", "3", "")));
    }
}
