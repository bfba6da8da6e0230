//! Making room for a header in front of plain data: the first bytes are copied to the free end of the device, the header takes their place.
//!
//! ```text
//! before   | first bytes | plain ................................ | free | free  |
//! behind   | header      | plain ................................ | free | first |
//! ```
//! # Write order
//! 1. The first bytes are copied to their other place. 2. Flush. Until here the device is the plain one it was.
//! 3. Sector 0 becomes a *marker*, which says where the first bytes are and what their hash is. A sector is written whole or not at all. 4. Flush.
//! 5. Keyslots area and the header's second copy, flush each; from here on it is a volume, read by its second copy.
//! 6. The first copy, over the marker; flush.
//!
//! A power cut between 4 and the end of 5 leaves a device that is neither: [`put_back`], which everything that begins or resumes a
//! re-encryption does first, finds the marker and no header, and makes it the plain device it was: 0. the marker once more, flush: it may have been in
//! the page cache only; 1. the first bytes but for sector 0, 2. flush, 3. sector 0, 4. flush. Cut off, it is done again. The marker and not a note elsewhere, because a note that is left over while
//! the device goes on to be used as it was would bring back what has been written over since.
//!
//! # The marker
//! Numbers are big-endian; the rest of the sector is zero.
//!
//! | offset | bytes | field | rule |
//! |---|---|---|---|
//! | 0 | 16 | magic | `cryptctl-moved` and two zeros |
//! | 16 | 8 | where the first bytes are | bytes from the start of the device |
//! | 24 | 8 | how many | bytes, at least 512 |
//! | 32 | 32 | their SHA-256 | |
//! | 64 | 32 | SHA-256 of the 64 bytes before | |

use zeroize::Zeroizing;

use crate::backend::blocking::Blocking;
use crate::crypto::bytes_equal;
use crate::error::{Error, ErrorKind, Result};
use crate::format::luks2::reencrypt::Moved;
use crate::volume::Header;
use crate::volume::create::NewHeader;

const MAGIC: [u8; 16] = *b"cryptctl-moved\0\0";
/// Bytes that are written whole or not at all.
pub(super) const SECTOR: usize = 512;
const HASH_BYTES: usize = 32;
/// Bytes of the fields that the marker's own hash covers.
const FIELDS_BYTES: usize = 64;
/// Bytes copied at a time.
const PIECE: u64 = 1 << 20;

/// What a marker says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Marker {
    moved: Moved,
    hash: [u8; HASH_BYTES],
}

impl Marker {
    fn to_bytes(self) -> [u8; SECTOR] {
        let mut sector = [0; SECTOR];
        sector[..16].copy_from_slice(&MAGIC);
        sector[16..24].copy_from_slice(&self.moved.offset.to_be_bytes());
        sector[24..32].copy_from_slice(&self.moved.bytes.to_be_bytes());
        sector[32..64].copy_from_slice(&self.hash);
        let sum = sha256(&[&sector[..FIELDS_BYTES]]);
        sector[FIELDS_BYTES..FIELDS_BYTES + HASH_BYTES].copy_from_slice(&sum);
        sector
    }

    /// `None`: it is none.
    fn parse(sector: &[u8; SECTOR]) -> Option<Self> {
        let sum = sha256(&[&sector[..FIELDS_BYTES]]);
        let is_marker = sector.starts_with(&MAGIC)
            && bytes_equal(&sum, &sector[FIELDS_BYTES..FIELDS_BYTES + HASH_BYTES])
            && sector[FIELDS_BYTES + HASH_BYTES..].iter().all(|byte| *byte == 0);
        let number = |at: usize| Some(u64::from_be_bytes(sector[at..at + 8].try_into().ok()?));
        let moved = Moved { offset: number(16)?, bytes: number(24)? };
        let hash = sector[32..64].try_into().ok()?;
        let fits = moved.bytes >= SECTOR as u64
            && moved.bytes <= moved.offset
            && moved.offset.checked_add(moved.bytes).is_some();
        (is_marker && fits).then_some(Self { moved, hash })
    }
}

fn sha256(parts: &[&[u8]]) -> [u8; HASH_BYTES] {
    let mut sum = [0; HASH_BYTES];
    crate::crypto::hash::Hash::Sha256.digest(parts, &mut sum);
    sum
}

/// Hash of hashes of pieces, so that it is made piece by piece.
struct Sum(Vec<u8>);

impl Sum {
    fn add(&mut self, piece: &[u8]) {
        self.0.extend(sha256(&[piece]));
    }

    fn end(self) -> [u8; HASH_BYTES] {
        sha256(&[&self.0])
    }
}

/// Offsets and lengths of the pieces of so many bytes.
fn pieces(bytes: u64) -> impl Iterator<Item = (u64, usize)> {
    (0..bytes)
        .step_by(1 << 20)
        .map(move |at| (at, usize::try_from((bytes - at).min(PIECE)).expect("a piece")))
}

/// Put a header in front of plain data; see the module head for the order.
///
/// # Errors
/// Of the device. Then [`put_back`] is left to do, by whoever comes next.
pub fn make_room(device: &mut Blocking, moved: Moved, header: &NewHeader) -> Result<()> {
    // 1.
    let mut bytes = Zeroizing::new(vec![0; usize::try_from(PIECE).expect("a piece")]);
    let mut sum = Sum(Vec::new());
    for (at, length) in pieces(moved.bytes) {
        let piece = &mut bytes[..length];
        device.read(at, piece)?;
        sum.add(piece);
        device.write(moved.offset + at, piece)?;
    }
    // 2.
    device.flush()?;
    // 3. and 4.
    device.write(0, &Marker { moved, hash: sum.end() }.to_bytes())?;
    device.flush()?;
    // 5. and 6.
    header.write_primary_last(device)
}

/// Does the device begin with a marker?
///
/// # Errors
/// Of the device.
pub fn is_marked(device: &mut Blocking) -> Result<bool> {
    Ok(marker(device)?.is_some())
}

fn marker(device: &mut Blocking) -> Result<Option<Marker>> {
    let mut sector = [0; SECTOR];
    match device.read(0, &mut sector) {
        Ok(()) => Ok(Marker::parse(&sector)),
        // Too short for a sector.
        Err(error) if error.kind() == ErrorKind::Invalid => Ok(None),
        Err(error) => Err(error),
    }
}

/// If the making of room was cut off before there was a header: make the device what it was. True: it was to be done.
///
/// # Errors
/// `Damaged`: the first bytes are not any more where the marker says. Else of the device.
pub fn put_back(device: &mut Blocking) -> Result<bool> {
    let Some(Marker { moved, hash }) = marker(device)? else { return Ok(false) };
    match Header::load(device) {
        // Its second copy is whole: it is a volume.
        Ok(_) => return Ok(false),
        Err(error) if matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::Damaged) => {}
        Err(error) => return Err(error),
    }
    let mut bytes = Zeroizing::new(vec![0; usize::try_from(PIECE).expect("a piece")]);
    let mut sum = Sum(Vec::new());
    for (at, length) in pieces(moved.bytes) {
        let piece = &mut bytes[..length];
        device.read(moved.offset + at, piece)?;
        sum.add(piece);
    }
    if !bytes_equal(&sum.end(), &hash) {
        let what = format!(
            "the first {} bytes of the device should lie at byte {} since an encryption was begun, and do not",
            moved.bytes, moved.offset
        );
        return Err(Error::new(ErrorKind::Damaged, what).at(device.name()).hint("nothing was written"));
    }
    // 0.
    device.write(0, &Marker { moved, hash }.to_bytes())?;
    device.flush()?;
    // 1.
    let mut first = Zeroizing::new([0; SECTOR]);
    for (at, length) in pieces(moved.bytes) {
        let piece = &mut bytes[..length];
        device.read(moved.offset + at, piece)?;
        let skipped = if at == 0 { SECTOR } else { 0 };
        if at == 0 {
            first.copy_from_slice(&piece[..SECTOR]);
        }
        device.write(at + skipped as u64, &piece[skipped..])?;
    }
    // 2.
    device.flush()?;
    // 3. and 4.
    device.write(0, &*first)?;
    device.flush()?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marker_is_read_back_and_no_byte_of_it_may_change() {
        let marker = Marker { moved: Moved { offset: 1 << 30, bytes: 16 << 20 }, hash: [7; 32] };
        let bytes = marker.to_bytes();
        assert_eq!(Marker::parse(&bytes), Some(marker));
        for at in 0..SECTOR {
            let mut other = bytes;
            other[at] ^= 1;
            assert_eq!(Marker::parse(&other), None, "byte {at}");
        }
    }

    #[test]
    fn a_marker_that_would_write_over_its_own_source_is_none() {
        for (offset, bytes) in [(1024, 2048), (u64::MAX - 511, 1024), (4096, 511), (4096, 0)] {
            let marker = Marker { moved: Moved { offset, bytes }, hash: [7; 32] };
            assert_eq!(Marker::parse(&marker.to_bytes()), None, "{bytes} at {offset}");
        }
    }
}
