//! The rules of a LUKS1 header: what is refused and why, and what QEMU refuses beside it.
//!
//! | what | refused here | cryptsetup 2.6 | QEMU 10 |
//! |---|---|---|---|
//! | text without NUL: cipher, mode, hash | yes | cut short | refused |
//! | text without NUL: UUID | yes | cut short | accepted |
//! | text that is not printable ASCII | yes | accepted | accepted |
//! | cipher, mode or hash empty | yes | hash refused, the others fail to open | refused |
//! | unknown hash | no: whoever derives the key names it | refused | refused |
//! | hash in capitals | no | accepted | refused |
//! | key of 0 bytes | yes | refused | refused |
//! | key of more than 512 bytes | yes | accepted | no cipher takes it |
//! | 0 iterations: digest, keyslot in use | yes | accepted, fails to open | refused |
//! | state neither constant | yes; repair corrects it | keyslot ignored | refused |
//! | stripes not 4000, in any keyslot | yes | refused | refused |
//! | material before sector 2 | yes | refused | refused |
//! | material before sector 8 | no: the specification's own example begins at 2 | accepted | refused |
//! | material of two keyslots overlaps, in use or not | yes | refused | refused, sizes rounded up to 4096 bytes |
//! | material reaches into the payload | yes, unless detached | refused, unless detached | refused, sizes rounded up |
//! | material beyond 64 MiB | yes: no writer has put it there | if the device ends before | accepted |
//! | unused keyslot with iterations or a salt | no: old tools leave them | accepted | accepted |
//!
//! The columns of the others were asked of the programs themselves; `tests/tests/luks1_format.rs` asks again.

use crate::error::{Error, ErrorKind, Result};
use crate::format::af::STRIPES;
use crate::format::luks1::fields::{NAME_BYTES, UUID_BYTES};
use crate::format::luks1::layout::{QEMU_ALIGN_SECTORS, material_sectors};
use crate::format::luks1::{HEADER_BYTES, Header, KEY_BYTES_MAX};

/// The first sector material may begin at: the header takes two.
const MATERIAL_SECTOR_MIN: u32 = 2;
/// Where material ends at the latest, sectors: 64 MiB. The largest layout (keys of [`KEY_BYTES_MAX`]) ends at 32008, and
/// whoever takes memory for a header's backup takes no more than this.
const MATERIAL_END_MAX: u64 = 128 * 1024;

const _: () = assert!(MATERIAL_SECTOR_MIN as usize * 512 >= HEADER_BYTES);

fn invalid(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Invalid, what).at("LUKS1 header")
}

fn invalid_keyslot(index: usize, what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Invalid, what).at(format!("LUKS1 header, keyslot {index}"))
}

impl Header {
    /// Is it one that may be written, and read again? [`Header::parse`] asks; so should whoever fills in a [`Header::layout`].
    ///
    /// # Errors
    /// `Invalid`, naming the first thing wrong: text too long for its field or not printable ASCII, an empty cipher, mode or
    /// hash; a key of no length or of more than [`KEY_BYTES_MAX`]; no iterations; a number of stripes other than 4000;
    /// material inside the header, inside other material, inside the payload, or beyond 64 MiB.
    pub fn check(&self) -> Result<()> {
        self.check_texts()?;
        if self.key_bytes == 0 || self.key_bytes > KEY_BYTES_MAX {
            return Err(invalid(format!(
                "volume key of {} bytes: it must be 1 to {KEY_BYTES_MAX}",
                self.key_bytes
            )));
        }
        if self.digest_iterations == 0 {
            return Err(invalid("digest of no iterations"));
        }
        for (index, keyslot) in self.keyslots.iter().enumerate() {
            if keyslot.active && keyslot.iterations == 0 {
                return Err(invalid_keyslot(index, "in use with no iterations"));
            }
            if keyslot.stripes != STRIPES {
                let what = format!("{} stripes: it must be {STRIPES}", keyslot.stripes);
                return Err(invalid_keyslot(index, what));
            }
        }
        self.check_material()
    }

    fn check_texts(&self) -> Result<()> {
        let texts = [
            ("cipher name", &self.cipher_name, NAME_BYTES),
            ("cipher mode", &self.cipher_mode, NAME_BYTES),
            ("hash", &self.hash, NAME_BYTES),
            ("UUID", &self.uuid, UUID_BYTES),
        ];
        for (name, text, field_bytes) in texts {
            if text.is_empty() && name != "UUID" {
                return Err(invalid(format!("{name} is empty")));
            }
            if text.len() >= field_bytes {
                return Err(invalid(format!("{name} is longer than {} bytes", field_bytes - 1)));
            }
            if !text.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
                return Err(invalid(format!("{name} is not printable ASCII")));
            }
        }
        Ok(())
    }

    fn check_material(&self) -> Result<()> {
        let sectors = u64::from(material_sectors(self.key_bytes));
        let extents = self.material(sectors);
        for &(index, start, end) in &extents {
            if start < u64::from(MATERIAL_SECTOR_MIN) {
                let what = format!("material at sector {start}: the header takes {MATERIAL_SECTOR_MIN}");
                return Err(invalid_keyslot(index, what));
            }
            let payload = u64::from(self.payload_sector);
            if payload != 0 && end > payload {
                let what = format!("material in sectors {start}..{end} reaches into the data at {payload}");
                return Err(invalid_keyslot(index, what));
            }
            if end > MATERIAL_END_MAX {
                let what = format!("material in sectors {start}..{end}: none lies beyond {MATERIAL_END_MAX}");
                return Err(invalid_keyslot(index, what));
            }
        }
        if let Some((one, other)) = first_overlap(&extents) {
            let what = format!("material overlaps that of keyslot {}", one.min(other));
            return Err(invalid_keyslot(one.max(other), what));
        }
        Ok(())
    }

    /// Keyslots with their material of `sectors` sectors each, in the order of the material.
    fn material(&self, sectors: u64) -> Vec<(usize, u64, u64)> {
        let extent = |(index, start): (usize, u64)| (index, start, start + sectors);
        let starts = self.keyslots.iter().map(|keyslot| u64::from(keyslot.material_sector)).enumerate();
        let mut extents: Vec<_> = starts.map(extent).collect();
        extents.sort_unstable_by_key(|&(index, start, _)| (start, index));
        extents
    }

    /// Why QEMU's LUKS driver would refuse this valid header, whatever its cipher; `None`: its rules are met, as those of
    /// [`Header::layout`] with a lower-case hash are.
    #[must_use]
    pub fn qemu_objection(&self) -> Option<String> {
        if self.hash.bytes().any(|byte| byte.is_ascii_uppercase()) {
            return Some(format!("hash {} in capitals", self.hash));
        }
        let rounded = material_sectors(self.key_bytes).next_multiple_of(QEMU_ALIGN_SECTORS);
        let extents = self.material(u64::from(rounded));
        let payload = u64::from(self.payload_sector);
        for &(index, start, end) in &extents {
            if start < u64::from(QEMU_ALIGN_SECTORS) {
                return Some(format!(
                    "material of keyslot {index} begins before sector {QEMU_ALIGN_SECTORS}"
                ));
            }
            if payload != 0 && end > payload {
                let what = format!("material of keyslot {index}, rounded up to 4096 bytes, reaches the data");
                return Some(what);
            }
        }
        let (one, other) = first_overlap(&extents)?;
        Some(format!("material of keyslots {one} and {other}, rounded up to 4096 bytes, overlaps"))
    }
}

/// The first two neighbours, in order of their material, of which one begins before the other ends.
fn first_overlap(extents: &[(usize, u64, u64)]) -> Option<(usize, usize)> {
    extents.windows(2).find_map(|pair| match pair {
        &[(one, _, end), (other, start, _)] if start < end => Some((one, other)),
        _ => None,
    })
}
