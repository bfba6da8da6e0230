//! Seeded data of any size, its ciphertext by the oracle, and the digests of both.
//!
//! The bytes at an offset follow from seed and offset alone, so nothing has to be kept or read again to know what a
//! result must be. The ciphertext comes from the `aes` and `xts-mode` crates directly and not from the engine: a fault
//! of the engine cannot hide in its own reference.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use aes::Aes256;
use aes::cipher::{Array, KeyInit};
use rustix::fs::OFlags;
use sha2::{Digest, Sha256};
use xts_mode::{Xts128, get_tweak_default};

/// Bytes moved per system call, as everywhere in these benches.
pub const BLOCK: usize = 1 << 20;
/// The largest data unit of a volume, bytes.
pub const DATA_UNIT: usize = 4096;
/// Bytes of an AES-256-XTS volume key, both halves.
pub const KEY_BYTES: usize = 64;

/// The generator's seed; fixed, so that a digest printed on one machine can be compared with another's.
const SEED: u64 = 0x6372_7970_7464_2131;

/// The seeded bytes of a source: random to any compressor, equal in every run.
#[derive(Debug, Clone, Copy, Default)]
pub struct Pattern;

impl Pattern {
    /// Fill `buf` with the bytes from `offset` (a multiple of 8, as is the length).
    pub fn fill(self, offset: u64, buf: &mut [u8]) {
        assert!(offset.is_multiple_of(8) && buf.len().is_multiple_of(8), "pattern is made of 8-byte words");
        // SplitMix64 (Steele, Lea, Flood 2014) as a counter: word i is the mix of seed + i times the golden gamma.
        const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;
        let mut state = SEED.wrapping_add((offset / 8).wrapping_mul(GAMMA));
        for word in buf.chunks_exact_mut(8) {
            state = state.wrapping_add(GAMMA);
            let mut mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            word.copy_from_slice(&(mixed ^ (mixed >> 31)).to_le_bytes());
        }
    }
}

/// The volume key of the benches: as public as the data it protects, and different in its halves.
#[must_use]
pub fn bench_key() -> [u8; KEY_BYTES] {
    let mut key = [0; KEY_BYTES];
    // Far beyond any source, so that the key is not part of the plaintext.
    Pattern.fill(1 << 60, &mut key);
    key
}

/// Encrypts as `cryptctl encrypt --format raw --key-size 512 --sector-size UNIT` must: aes-xts-plain64, tweaks counted
/// in 512-byte sectors.
pub struct Oracle {
    cipher: Xts128<Aes256>,
    unit: usize,
}

impl Oracle {
    /// With the key of [`bench_key`] and data units of so many bytes.
    #[must_use]
    pub fn new(unit: usize) -> Self {
        let key = bench_key();
        let half =
            |bytes: &[u8]| Aes256::new(&Array::try_from(bytes).expect("half of 64 bytes is an AES-256 key"));
        Self { cipher: Xts128::new(half(&key[..32]), half(&key[32..])), unit }
    }

    /// Encrypt whole data units in place; the first starts at byte `offset` of the volume.
    pub fn encrypt(&self, offset: u64, buf: &mut [u8]) {
        let step = (self.unit / 512) as u128;
        let first = u128::from(offset) / self.unit as u128;
        self.cipher.encrypt_area(buf, self.unit, first, |unit| get_tweak_default(unit * step));
    }
}

/// What a source's bytes are to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// The pattern.
    Plain,
    /// The pattern encrypted by the oracle in data units of so many bytes.
    Cipher(usize),
    /// The first [`REPEAT`] bytes of the pattern over and over: what a producer can write without making it anew.
    LoopedPlain,
    /// That, encrypted by the oracle.
    LoopedCipher(usize),
}

/// Different bytes in a looped content, a multiple of [`BLOCK`].
pub const REPEAT: usize = 8 << 20;

/// Page-aligned room inside a `Vec`, because `O_DIRECT` wants its memory aligned.
struct Aligned {
    bytes: Vec<u8>,
    start: usize,
}

impl Aligned {
    fn new() -> Self {
        let bytes = vec![0; BLOCK + DATA_UNIT];
        let start = bytes.as_ptr().align_offset(DATA_UNIT);
        Self { bytes, start }
    }

    fn block(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + BLOCK]
    }
}

/// Walk over `size` bytes of `content` in blocks.
fn each_block(content: Content, size: u64, mut visit: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
    let oracle = match content {
        Content::Cipher(unit) | Content::LoopedCipher(unit) => Some(Oracle::new(unit)),
        _ => None,
    };
    let mut room = Aligned::new();
    let mut offset = 0;
    while offset < size {
        let length = usize::try_from(size - offset).map_or(BLOCK, |left| left.min(BLOCK));
        let block = &mut room.block()[..length];
        let looped = matches!(content, Content::LoopedPlain | Content::LoopedCipher(_));
        Pattern.fill(if looped { offset % REPEAT as u64 } else { offset }, block);
        if let Some(oracle) = &oracle {
            oracle.encrypt(offset, block);
        }
        visit(block)?;
        offset += length as u64;
    }
    Ok(())
}

/// SHA-256 of `size` bytes of `content`, hexadecimal.
///
/// # Errors
/// None in practice: nothing is read or written.
pub fn digest_of(content: Content, size: u64) -> io::Result<String> {
    let mut hash = Sha256::new();
    each_block(content, size, |block| {
        hash.update(block);
        Ok(())
    })?;
    Ok(hex(&hash.finalize()))
}

/// Write `size` bytes of `content` to a new file past the page cache, durably; returns their digest.
///
/// # Errors
/// As the file system has them.
pub fn write_file(path: &Path, content: Content, size: u64) -> io::Result<String> {
    let mut file = open(path, OpenOptions::new().write(true).create(true).truncate(true))?;
    let mut hash = Sha256::new();
    each_block(content, size, |block| {
        hash.update(block);
        file.write_all(block)
    })?;
    file.sync_all()?;
    Ok(hex(&hash.finalize()))
}

/// SHA-256 of a file from `offset` (whole MiB) on, hexadecimal, read past the page cache so that the next measurement finds
/// it as the last did.
///
/// # Errors
/// As the file system has them.
pub fn digest_file(path: &Path, offset: u64) -> io::Result<String> {
    let mut file = open(path, OpenOptions::new().read(true))?;
    file.seek(SeekFrom::Start(offset))?;
    digest_stream(&mut file).map(|(_, digest)| digest)
}

/// Read a stream to its end: bytes and SHA-256.
///
/// # Errors
/// As reading has them.
pub fn digest_stream(stream: &mut impl Read) -> io::Result<(u64, String)> {
    let mut hash = Sha256::new();
    let mut room = Aligned::new();
    let mut total = 0;
    loop {
        let length = stream.read(room.block())?;
        if length == 0 {
            return Ok((total, hex(&hash.finalize())));
        }
        hash.update(&room.block()[..length]);
        total += length as u64;
    }
}

/// With `O_DIRECT` where the file system has it.
fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    let direct = i32::try_from(OFlags::DIRECT.bits()).expect("open flags fit an int");
    match options.clone().custom_flags(direct).open(path) {
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => options.open(path),
        other => other,
    }
}

/// Lower-case hexadecimal.
fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a string succeeds");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pattern_depends_on_the_offset_alone() {
        let (mut whole, mut part) = ([0; 64], [0; 16]);
        Pattern.fill(0, &mut whole);
        Pattern.fill(40, &mut part);
        assert_eq!(whole[40..56], part);
        assert_ne!(whole[..16], whole[16..32]);
    }

    #[test]
    fn a_data_unit_does_not_depend_on_its_neighbours() {
        let mut two = vec![7; 2 * DATA_UNIT];
        let mut second = vec![7; DATA_UNIT];
        Oracle::new(DATA_UNIT).encrypt(0, &mut two);
        Oracle::new(DATA_UNIT).encrypt(DATA_UNIT as u64, &mut second);
        assert_eq!(two[DATA_UNIT..], second);
        assert_ne!(two[..DATA_UNIT], second);
    }

    #[test]
    fn the_oracle_agrees_with_openssl() {
        let mut units = vec![0; 2 * DATA_UNIT];
        Pattern.fill(5 * DATA_UNIT as u64, &mut units);
        Oracle::new(DATA_UNIT).encrypt(5 * DATA_UNIT as u64, &mut units);
        // Worked out with Python's `cryptography` (OpenSSL's AES-256-XTS) from the same key, bytes and tweaks 40 and 48.
        let known = "3102988df423b6b5712484bb37f51c9eff4535ae5c3679577afd3be304a88fce";
        assert_eq!(hex(&Sha256::digest(&units)), known);
    }

    #[test]
    fn a_looped_source_repeats_and_its_ciphertext_does_not() {
        let repeat = REPEAT as u64;
        let halves = |content| {
            let mut blocks = Vec::new();
            each_block(content, 2 * repeat, |block| {
                blocks.push(Sha256::digest(block));
                Ok(())
            })
            .expect("walks");
            (blocks[0], blocks[REPEAT / BLOCK])
        };
        let (first, second) = halves(Content::LoopedPlain);
        assert_eq!(first, second);
        let (first, second) = halves(Content::LoopedCipher(DATA_UNIT));
        assert_ne!(first, second);
    }

    #[test]
    fn what_is_written_is_what_is_read() {
        let path = std::env::temp_dir().join(format!("source-{}", std::process::id()));
        let size = BLOCK as u64 + 8192;
        let written = write_file(&path, Content::Cipher(DATA_UNIT), size).expect("writes");
        let read = digest_file(&path, 0).expect("reads");
        std::fs::remove_file(&path).expect("removes");
        assert_eq!(written, read);
        assert_eq!(written, digest_of(Content::Cipher(DATA_UNIT), size).expect("hashes"));
        assert_ne!(written, digest_of(Content::Plain, size).expect("hashes"));
    }
}
