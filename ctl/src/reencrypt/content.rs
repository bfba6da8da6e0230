//! What the data area holds before it is rewritten: whether it is what was said, and whether a filesystem fits into what is left.
//!
//! Ciphertext looks like noise: whatever has a signature is no ciphertext, and to "decrypt" it would destroy it.

use std::fs::File;
use std::os::unix::fs::FileExt;

use proto::reencrypt::Mode;
use rustix::fs::SeekFrom;

use crate::endpoint::End;
use crate::reencrypt::args::Reencrypt;
use crate::reencrypt::request::Head;
use crate::report::{Error, Result};
use crate::signature;

/// Data that is to be ciphertext without a header of its own, of a raw volume or under a detached header, has no signature.
///
/// # Errors
/// `Invalid`: it has one. `Unsupported`: it cannot be told.
pub fn refuse_signature(volume: &End, of: &str) -> Result<()> {
    if volume.remote().is_some() {
        return Err(unseen(volume).hint(format!(
            "--found-data-may-be-destroyed says that it is the ciphertext of {of}; --resume-only goes on with what was begun"
        )));
    }
    let file = open(volume)?;
    let found = signature::probe(&file, &volume.name).map_err(|error| {
        error.hint("install blkid (package util-linux), or use --found-data-may-be-destroyed if you are sure")
    })?;
    match found {
        None => Ok(()),
        Some(found) => Err(Error::usage(format!(
            "{} holds {found}: it is not the ciphertext of {of}, and would be destroyed",
            volume.name
        ))
        .hint(
            "`lsblk -f` and `blkid -p` tell more; --resume-only goes on with what was begun; --found-data-may-be-destroyed rewrites it \
             all the same",
        )),
    }
}

/// Data on a server is not looked at from here, and what is rewritten as ciphertext and is none, is lost.
fn unseen(volume: &End) -> Error {
    Error::usage(format!(
        "what {} holds is not looked at, as the data of a file or device would be",
        volume.name
    ))
}

/// Does the header say that it is under way, or that its data is plain already? Then the data may look like anything. A LUKS2 header says
/// both in its JSON, in words that are nowhere else in it.
///
/// # Errors
/// It cannot be read.
pub fn is_under_way(header: &End) -> Result<bool> {
    /// The largest copy of a LUKS2 header (LUKS2 on-disk format, 2.1).
    const MOST: u64 = 4 << 20;
    let file = open(header)?;
    let failed = |error| Error::io("cannot read", &header.name, error);
    let mut bytes = vec![0; usize::try_from(MOST).expect("a few MiB")];
    let mut filled = 0;
    while filled < bytes.len() {
        match file.read_at(&mut bytes[filled..], u64::try_from(filled).expect("a few MiB")) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(error)),
        }
    }
    bytes.truncate(filled);
    let Some(size) = field(&bytes, 8).map(u64::from_be_bytes).filter(|size| *size <= MOST) else {
        return Ok(false);
    };
    bytes.truncate(usize::try_from(size).expect("a few MiB"));
    let has = |word: &[u8]| bytes.windows(word.len()).any(|part| part == word);
    Ok(has(b"\"online-reencrypt") || has(b"\"linear\""))
}

/// `--reduce-device-size`: a filesystem that reaches into the bytes that are given up was not shrunk.
///
/// # Errors
/// `Invalid`: it does, or there is less than that.
pub fn refuse_unshrunk(volume: &End, reduction: u64) -> Result<()> {
    if volume.remote().is_some() {
        return Err(unseen(volume).hint(format!(
            "--filesystem-may-lose-its-end says that its last {reduction} bytes are free, or what is in them is given up"
        )));
    }
    let file = open(volume)?;
    let bytes = size(volume)?;
    let left = bytes.saturating_sub(reduction);
    match filesystem(&file) {
        Some((kind, needed)) if needed > left => Err(Error::usage(format!(
            "{} holds a filesystem ({kind}) of {needed} bytes, and {left} are left without the last {reduction}: it was not shrunk",
            volume.name
        ))
        .hint(format!(
            "shrink it to {left} bytes or fewer (xfs cannot be); --filesystem-may-lose-its-end encrypts it all the same, and what is \
             in its last {reduction} bytes is lost"
        ))),
        _ => Ok(()),
    }
}

/// Plain data is a whole number of the smallest data units. No other size of them fits what is not.
///
/// # Errors
/// `Invalid`: it is not.
fn refuse_odd(volume: &End) -> Result<()> {
    let (name, bytes) = (&volume.name, size(volume)?);
    if bytes.is_multiple_of(512) {
        return Ok(());
    }
    Err(Error::usage(format!("the {bytes} bytes of {name} are no whole number of 512-byte sectors"))
        .hint("append zeros up to the next one first: `truncate -s %512 FILE`"))
}

fn size(volume: &End) -> Result<u64> {
    rustix::fs::seek(open(volume)?, SeekFrom::End(0))
        .map_err(|errno| Error::io("cannot inspect", &volume.name, errno))
}

/// All of it that can be wrong with what is typed. `header`: a detached one that is there. `begun`: it is gone on with. Data that a server
/// has is not looked at: it takes the flag that says what it is.
///
/// # Errors
/// As the others here.
pub fn check(
    args: &Reencrypt,
    volume: &End,
    header: Option<(&End, &Head)>,
    mode: Mode,
    begun: bool,
) -> Result<()> {
    if begun {
        return Ok(());
    }
    if mode == Mode::Encrypt && volume.remote().is_none() {
        refuse_odd(volume)?;
    }
    if let (Mode::Encrypt, Some(reduction)) = (mode, args.becoming.reduce_device_size) {
        return if args.becoming.filesystem_may_lose_its_end {
            Ok(())
        } else {
            refuse_unshrunk(volume, reduction)
        };
    }
    if mode == Mode::Encrypt || args.safety.found_data_may_be_destroyed {
        return Ok(());
    }
    match header {
        Some((_, Head { is_under_way: Some(true), .. })) => Ok(()),
        Some((header, Head { is_under_way: None, .. })) if is_under_way(header)? => Ok(()),
        Some((header, _)) => refuse_signature(volume, &format!("the volume whose header is {}", header.name)),
        None if args.volume_args.journal.is_some() => refuse_signature(volume, "a raw volume"),
        None => Ok(()),
    }
}

/// Name and size, bytes, of a filesystem whose superblock tells it.
///
/// Fields: ext2 to 4, kernel documentation "ext4 data structures", the super block; xfs, "XFS filesystem structure", `xfs_dsb`;
/// btrfs, "On-disk format", the superblock and its device item.
fn filesystem(file: &File) -> Option<(&'static str, u64)> {
    let read = |at: u64, bytes: usize| {
        let mut block = vec![0; bytes];
        file.read_exact_at(&mut block, at).ok().map(|()| block)
    };
    let ext = read(1024, 1024)?;
    if ext[0x38..0x3a] == [0x53, 0xef] {
        let low = u64::from(u32::from_le_bytes(field(&ext, 0x4)?));
        let wide = u32::from_le_bytes(field(&ext, 0x60)?) & 0x80 != 0;
        let high = if wide { u64::from(u32::from_le_bytes(field(&ext, 0x150)?)) } else { 0 };
        let block = 1024_u64.checked_shl(u32::from_le_bytes(field(&ext, 0x18)?))?;
        return Some(("ext2, ext3 or ext4", (high << 32 | low).saturating_mul(block)));
    }
    let xfs = read(0, 16)?;
    if xfs.starts_with(b"XFSB") {
        let block = u64::from(u32::from_be_bytes(field(&xfs, 4)?));
        return Some(("xfs", u64::from_be_bytes(field(&xfs, 8)?).saturating_mul(block)));
    }
    let btrfs = read(64 << 10, 4096)?;
    if btrfs[0x40..].starts_with(b"_BHRfS_M") {
        // Of this device, not of all the filesystem has.
        return Some(("btrfs", u64::from_le_bytes(field(&btrfs, 0xc9 + 8)?)));
    }
    None
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

fn open(end: &End) -> Result<File> {
    end.file()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: u64, parts: &[(u64, &[u8])]) -> File {
        let file = tempfile::tempfile().expect("file");
        file.set_len(bytes).expect("size");
        parts.iter().for_each(|(at, part)| file.write_all_at(part, *at).expect("write"));
        file
    }

    #[test]
    fn superblocks_tell_how_large_a_filesystem_is() {
        let ext = [(1024 + 0x38, &[0x53, 0xef][..]), (1024 + 4, &[0, 1]), (1024 + 0x18, &[2])];
        assert_eq!(filesystem(&file(1 << 20, &ext)), Some(("ext2, ext3 or ext4", 256 * 4096)));
        let wide = [&ext[..], &[(1024 + 0x60, &[0x80][..]), (1024 + 0x150, &[1])]].concat();
        assert_eq!(filesystem(&file(1 << 20, &wide)).map(|found| found.1), Some(((1 << 32) + 256) * 4096));
        let xfs = [(0, &b"XFSB\0\0\x10\0\0\0\0\0\0\0\x02\0"[..])];
        assert_eq!(filesystem(&file(1 << 20, &xfs)), Some(("xfs", 512 * 4096)));
        let btrfs = [((64 << 10) + 0x40, &b"_BHRfS_M"[..]), ((64 << 10) + 0xc9 + 8, &[0, 0, 0, 8])];
        assert_eq!(filesystem(&file(1 << 20, &btrfs)), Some(("btrfs", 8 << 24)));
        assert_eq!(filesystem(&file(1 << 20, &[])), None);
        assert_eq!(filesystem(&file(100, &[])), None);
    }
}
