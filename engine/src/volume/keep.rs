//! A new header kept aside while its data is written, so that after a crash the same volume key is had by the passphrase.
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | bytes of the header device that belong to the header |
//! | 8 | 8 | first byte of the keyslot's material on it |
//! | 16 | 4 | bytes of the header |
//! | 20 | 4 | bytes of the material |
//! | 24 | | the header as on disk: LUKS1, or both copies of LUKS2 |
//! | | | the material |
//!
//! Numbers are little-endian. Nothing here is more secret than the header of the finished volume.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use crate::backend::blocking::Blocking;
use crate::crypto::{Secret, bytes_equal};
use crate::error::{Error, ErrorKind, Result};
use crate::format::luks2::Copy;
use crate::volume::create::NewHeader;
use crate::volume::unlock::{self, WRONG_KEY};
use crate::volume::{Header, capture};

/// What has a fixed length.
const FIXED_BYTES: usize = 24;

/// The bytes to be kept.
///
/// # Errors
/// The header cannot be written.
pub fn to_bytes(header: &NewHeader) -> Result<Vec<u8>> {
    let bytes = match &header.header {
        Header::Luks1(header) => header.to_bytes().to_vec(),
        Header::Luks2(loaded) => {
            [loaded.header.to_bytes(Copy::Primary)?, loaded.header.to_bytes(Copy::Secondary)?].concat()
        }
    };
    let (offset, material) = header.material();
    let length = |bytes: &[u8]| u32::try_from(bytes.len()).expect("a header is bounded").to_le_bytes();
    let mut kept = Vec::with_capacity(FIXED_BYTES + bytes.len() + material.len());
    kept.extend_from_slice(&header.header_bytes.to_le_bytes());
    kept.extend_from_slice(&offset.to_le_bytes());
    kept.extend_from_slice(&length(&bytes));
    kept.extend_from_slice(&length(material));
    kept.extend_from_slice(&bytes);
    kept.extend_from_slice(material);
    Ok(kept)
}

/// The header again, opened by its passphrase. `volume_key`: if the caller brought one, it must be the same. `name` is that of
/// where the bytes were kept.
///
/// # Errors
/// `Damaged`: the bytes are no kept header. `WrongKey`: another passphrase, or another volume key. `Cancelled`.
pub fn open(
    kept: &[u8],
    name: &str,
    passphrase: &Secret,
    volume_key: Option<&Secret>,
    give_up: &dyn Fn() -> bool,
) -> Result<NewHeader> {
    let bad = || Error::new(ErrorKind::Damaged, "the kept header is damaged").at(name);
    let long =
        |at: usize| kept.get(at..at + 8).map(|b| u64::from_le_bytes(b.try_into().expect("eight bytes")));
    let short =
        |at: usize| kept.get(at..at + 4).map(|b| u32::from_le_bytes(b.try_into().expect("four bytes")));
    let (header_bytes, offset) = (long(0).ok_or_else(bad)?, long(8).ok_or_else(bad)?);
    let (head, tail) = (short(16).ok_or_else(bad)? as usize, short(20).ok_or_else(bad)? as usize);
    let rest = kept.get(FIXED_BYTES..).filter(|rest| Some(rest.len()) == head.checked_add(tail));
    let (bytes, material) = rest.ok_or_else(bad)?.split_at(head);
    let fits = offset.checked_add(tail as u64).is_some_and(|end| end <= header_bytes);
    if !fits || head as u64 > header_bytes || header_bytes > capture::HEADER_BYTES_MAX {
        return Err(bad());
    }
    // Where a keyslot is opened it is read from a device.
    let failed = |errno| Error::io("cannot hold the header", errno).at(name);
    let file = memfd_create("header", MemfdFlags::CLOEXEC).map_err(failed)?;
    ftruncate(&file, header_bytes).map_err(failed)?;
    let file: Arc<OwnedFd> = Arc::new(file);
    let mut device = Blocking::open(file, name, 1)?;
    device.write(0, bytes)?;
    device.write(offset, material)?;
    let header = Header::load(&mut device)?;
    let areas = header.data_areas().map_err(Error::as_damage)?;
    let [data] = areas[..] else { return Err(bad()) };
    let unlocked = unlock::with_passphrase(&mut device, &header, passphrase, None, give_up)?;
    if volume_key.is_some_and(|key| !bytes_equal(key.as_bytes(), unlocked.key.as_bytes())) {
        return Err(Error::new(ErrorKind::WrongKey, WRONG_KEY));
    }
    let keyslot = unlocked.keyslot.expect("a passphrase opens a keyslot");
    Ok(NewHeader::again(header, data, (keyslot, unlocked.key), header_bytes, (offset, material.to_vec())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::create::{self, Place};
    use proto::luks::{KdfKind, KdfWish, New, Version};

    fn secret(text: &str) -> Secret {
        Secret::copy_of(text.as_bytes()).expect("memory")
    }

    fn made(version: Version) -> NewHeader {
        let kdf = KdfWish { kind: Some(KdfKind::Pbkdf2), iterations: Some(1000), ..KdfWish::default() };
        let new = New {
            version,
            cipher: None,
            key_bytes: None,
            data_unit: None,
            hash: None,
            label: None,
            subsystem: None,
            uuid: None,
            data_offset: None,
            metadata_bytes: None,
            keyslots_bytes: None,
            kdf,
            keyslot: Some(1),
            volume_key_fd: None,
            header: None,
        };
        let place = Place { detached: false, header_capacity: None, data_capacity: None, align: 512 };
        create::make(&new, &place, &secret("right"), None).expect("a header")
    }

    #[test]
    fn a_kept_header_is_the_same_header_and_opens_with_its_passphrase_only() {
        for version in [Version::Luks1, Version::Luks2] {
            let header = made(version);
            let kept = to_bytes(&header).expect("kept");
            let again = open(&kept, "kept", &secret("right"), Some(&header.key), &|| false).expect("opens");
            assert_eq!(again.header, header.header);
            assert_eq!((again.data, again.keyslot), (header.data, 1));
            assert_eq!(again.header_bytes, header.header_bytes);
            assert!(again.key == header.key && again.material() == header.material());
            let error = open(&kept, "kept", &secret("wrong"), None, &|| false).expect_err("refused");
            assert_eq!(error.kind(), ErrorKind::WrongKey);
            let other = secret("another volume key");
            let error = open(&kept, "kept", &secret("right"), Some(&other), &|| false).expect_err("refused");
            assert_eq!(error.kind(), ErrorKind::WrongKey);
        }
    }

    #[test]
    fn damaged_bytes_are_refused_without_a_panic() {
        let kept = to_bytes(&made(Version::Luks1)).expect("kept");
        let refused = |bytes: &[u8]| {
            let error = open(bytes, "kept", &secret("right"), None, &|| false).expect_err("refused");
            assert!(matches!(error.kind(), ErrorKind::Damaged | ErrorKind::Unsupported), "{error:?}");
        };
        for len in [0, 1, 15, 23, 24, 25, kept.len() - 1] {
            refused(&kept[..len]);
        }
        for at in 0..FIXED_BYTES {
            let mut bytes = kept.clone();
            bytes[at] ^= 0x80;
            // A larger header device, or material elsewhere in it, still adds up; the lengths do not.
            if at >= 16 || at % 8 == 7 {
                refused(&bytes);
            }
        }
        let mut bytes = kept.clone();
        bytes[FIXED_BYTES] ^= 1;
        refused(&bytes);
    }
}
