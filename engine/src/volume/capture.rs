//! The header of a volume that arrives in order: taken off the stream into memory, where it can be read by offset.
//!
//! Exactly the bytes in front of the data are consumed, and at most header and keyslots (bounded by the format: 136 MiB) are
//! kept, in a memory file: they are as public as the volume itself.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use crate::backend::blocking::Blocking;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{luks1, luks2};
use crate::volume::Header;

/// A header taken off a stream.
pub struct Captured {
    /// It, to be read by offset.
    pub device: Blocking,
    /// What it says.
    pub header: Header,
    /// Bytes taken off the stream so far.
    pub bytes: u64,
}

/// Two copies and a keyslots area of the largest sizes LUKS2 has; LUKS1 stays below.
pub(super) const HEADER_BYTES_MAX: u64 = 2 * *luks2::COPY_BYTES.end() + (128 << 20);

/// Bytes read at a time, and first.
const PIECE: usize = 64 << 10;
const FIRST: usize = 4096;

/// Take the header off a stream. `take(buf)` fills `buf` and returns how many bytes there were, fewer only at the end.
///
/// # Errors
/// `Unsupported`: not a LUKS volume; `Damaged`: a damaged one, or it ends early; whatever `take` says.
pub fn capture(name: &str, take: &mut dyn FnMut(&mut [u8]) -> Result<usize>) -> Result<Captured> {
    let file = memfd_create("header", MemfdFlags::CLOEXEC)
        .map_err(|errno| Error::io("cannot hold the header", errno).at(name))?;
    // As long as any header: where the volume ends cannot be known, and unwritten bytes cost nothing.
    ftruncate(&file, HEADER_BYTES_MAX)
        .map_err(|errno| Error::io("cannot hold the header", errno).at(name))?;
    let file: Arc<OwnedFd> = Arc::new(file);
    let mut kept = Kept { device: Blocking::open(file, name, 1)?, bytes: 0 };
    let mut first = vec![0; FIRST];
    kept.take(&mut first, take).map_err(|error| {
        let is_luks = first.starts_with(b"LUKS\xBA\xBE");
        if error.kind() == ErrorKind::Damaged && !is_luks {
            error.with_kind(ErrorKind::Unsupported)
        } else {
            error
        }
    })?;
    let wanted = if luks1::Header::is_here(&first) {
        luks1::Header::parse(&first).map_err(|error| error.as_damage().at(name))?.backup_bytes()
    } else if luks2::is_here(&first) {
        let copy_bytes = u64::from_be_bytes(first[8..16].try_into().expect("eight bytes"));
        if !luks2::COPY_BYTES.contains(&copy_bytes) || !copy_bytes.is_power_of_two() {
            // Its secondary could be anywhere, and a stream cannot be searched.
            let what = "the primary LUKS2 header is damaged";
            return Err(Error::new(ErrorKind::Damaged, what)
                .at(name)
                .hint("pass the volume as a file or device: its secondary header can be used then"));
        }
        kept.take_until(2 * copy_bytes, take)?;
        let loaded = luks2::load(&mut |offset, into| kept.device.read(offset, into))
            .map_err(|error| error.as_damage().at(name))?;
        loaded.header.backup_bytes()
    } else {
        // Says what it is not, in the words for files.
        FIRST as u64
    };
    kept.take_until(wanted, take)?;
    let header = Header::load(&mut kept.device)?;
    Ok(Captured { device: kept.device, header, bytes: kept.bytes })
}

struct Kept {
    device: Blocking,
    bytes: u64,
}

impl Kept {
    fn take(&mut self, piece: &mut [u8], take: &mut dyn FnMut(&mut [u8]) -> Result<usize>) -> Result<()> {
        let got = take(piece)?;
        self.device.write(self.bytes, &piece[..got])?;
        self.bytes += got as u64;
        if got < piece.len() {
            let what = format!("not a LUKS volume: it ends after {} bytes, inside the header", self.bytes);
            return Err(Error::new(ErrorKind::Damaged, what).at(self.device.name()));
        }
        Ok(())
    }

    fn take_until(&mut self, end: u64, take: &mut dyn FnMut(&mut [u8]) -> Result<usize>) -> Result<()> {
        let mut piece = vec![0; PIECE];
        while self.bytes < end {
            let len = usize::try_from(end - self.bytes).unwrap_or(PIECE).min(PIECE);
            self.take(&mut piece[..len], take)?;
        }
        Ok(())
    }
}

/// Take and forget what lies between the header and the data.
///
/// # Errors
/// `Damaged`: the stream ends before; whatever `take` says.
pub fn skip(name: &str, mut bytes: u64, take: &mut dyn FnMut(&mut [u8]) -> Result<usize>) -> Result<()> {
    let mut piece = vec![0; PIECE];
    while bytes > 0 {
        let len = usize::try_from(bytes).unwrap_or(PIECE).min(PIECE);
        let got = take(&mut piece[..len])?;
        if got < len {
            return Err(Error::new(ErrorKind::Damaged, "the volume ends before its data").at(name));
        }
        bytes -= got as u64;
    }
    Ok(())
}
