//! Where keyslot material and payload of a new header go: cryptsetup's layout, which QEMU accepts.

use crate::error::{Error, ErrorKind, Result};
use crate::format::af::{self, STRIPES};
use crate::format::luks1::{Header, KEY_BYTES_MAX, KEYSLOTS, Keyslot};

/// Material begins on multiples of 4096 bytes, and QEMU counts it in such.
pub(super) const QEMU_ALIGN_SECTORS: u32 = 8;
/// A new volume's data begins on a MiB.
const PAYLOAD_ALIGN_SECTORS: u32 = 2048;
/// More than any `key_bytes` that [`Header::layout`] takes needs: arithmetic on wild input saturates here.
const KEY_BYTES_WILD: u32 = 64 * 1024;

/// Sectors of one keyslot's material, not rounded up any further.
pub(super) fn material_sectors(key_bytes: u32) -> u32 {
    (key_bytes.min(KEY_BYTES_WILD) * STRIPES).div_ceil(512)
}

/// Sectors from one keyslot's material to the next.
fn material_step(key_bytes: u32) -> u32 {
    material_sectors(key_bytes).next_multiple_of(QEMU_ALIGN_SECTORS)
}

/// The sector behind the last keyslot's material.
fn material_end(key_bytes: u32) -> u32 {
    QEMU_ALIGN_SECTORS + material_step(key_bytes) * 8
}

const _: () = assert!(KEYSLOTS == 8 && KEY_BYTES_MAX < KEY_BYTES_WILD);
// 64 KiB * 4000 / 512 = 512,000 sectors; eight of them and a MiB are far from u32's end.
const _: () = assert!((KEY_BYTES_WILD as u64 * STRIPES as u64) < u32::MAX as u64);

impl Keyslot {
    /// One that holds nothing, and no place for it.
    pub(super) const UNUSED: Self =
        Self { active: false, iterations: 0, salt: [0; 32], material_sector: 0, stripes: STRIPES };
}

impl Header {
    /// A header without keyslots in use, with cryptsetup's material layout for `key_bytes`. `payload_sector` 0 for a detached header; strings, digest and salts are the caller's to fill in.
    ///
    /// # Errors
    /// `Invalid`: a payload inside the keyslots, or a key size that is none.
    pub fn layout(key_bytes: u32, payload_sector: u32) -> Result<Self> {
        if key_bytes == 0 || key_bytes > KEY_BYTES_MAX {
            let what = format!("volume key of {key_bytes} bytes: it must be 1 to {KEY_BYTES_MAX}");
            return Err(Error::new(ErrorKind::Invalid, what).at("LUKS1 header"));
        }
        // The whole reserved room counts, not only the material: QEMU measures so.
        let end = material_end(key_bytes);
        if payload_sector != 0 && payload_sector < end {
            let what = format!("data at sector {payload_sector}: the keyslots end at {end}");
            return Err(Error::new(ErrorKind::Invalid, what).at("LUKS1 header"));
        }
        let mut keyslots = [Keyslot::UNUSED; KEYSLOTS];
        for (keyslot, index) in keyslots.iter_mut().zip(0..) {
            keyslot.material_sector = QEMU_ALIGN_SECTORS + material_step(key_bytes) * index;
        }
        Ok(Self {
            cipher_name: String::new(),
            cipher_mode: String::new(),
            hash: String::new(),
            payload_sector,
            key_bytes,
            digest: [0; 20],
            digest_salt: [0; 32],
            digest_iterations: 0,
            uuid: String::new(),
            keyslots,
        })
    }

    /// Where the data of a new volume begins by default, sectors: keyslots rounded up to 1 MiB, as cryptsetup does.
    #[must_use]
    pub fn default_payload_sector(key_bytes: u32) -> u32 {
        material_end(key_bytes).next_multiple_of(PAYLOAD_ALIGN_SECTORS)
    }

    /// Bytes of one keyslot's material, whole sectors: `key_bytes * 4000`, rounded up to 512.
    #[must_use]
    pub fn material_bytes(&self) -> u64 {
        af::material_bytes(self.key_bytes)
    }

    /// Bytes of header and keyslot material: what a backup holds.
    ///
    /// To the end of the last material, rounded up to 4096 bytes unless the payload begins before.
    #[must_use]
    pub fn backup_bytes(&self) -> u64 {
        let starts = self.keyslots.iter().map(|keyslot| u64::from(keyslot.material_sector));
        let end = starts.max().unwrap_or(0) + u64::from(material_sectors(self.key_bytes));
        let rounded = end.next_multiple_of(u64::from(QEMU_ALIGN_SECTORS));
        let payload = if self.payload_sector == 0 { u64::MAX } else { u64::from(self.payload_sector) };
        rounded.min(payload) * 512
    }
}
