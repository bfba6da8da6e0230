//! A wish for a new volume checked and made complete: sizes, places, names. No randomness, no key derivation, no I/O.
//!
//! What the wish leaves open gets what `cryptsetup luksFormat` gives it.

use proto::luks::{KdfKind, New, Version};

use crate::crypto::hash::Hash;
use crate::crypto::spec::CipherSpec;
use crate::error::{Error, ErrorKind, Result};
use crate::format::luks2::edit::{COPY_BYTES_DEFAULT, HEADER_BYTES_DEFAULT, keyslot_area_bytes};
use crate::format::luks2::validate::{AREA_ALIGN, KEYSLOTS_BYTES_MAX, OBJECTS_MAX, is_copy_bytes};
use crate::format::{luks1, luks2};
use crate::volume::create::Place;
use crate::volume::{AreaCipher, DataArea, LUKS1_UNIT_BYTES};

/// Where data may begin by default: multiples of this.
const DATA_ALIGN: u64 = 1 << 20;
/// How much in front of the data is overwritten: no header is larger, and a data offset beyond is somebody's wish for a gap.
const HEADER_BYTES_MAX: u64 = 2 * *luks2::COPY_BYTES.end() + KEYSLOTS_BYTES_MAX;
/// Longest label or subsystem, bytes.
const NAME_BYTES_MAX: usize = 47;
/// Fewer free keyslots than this are worth a warning.
const KEYSLOTS_FEW: u64 = 8;
/// Bytes after which `plain` repeats its 32-bit counter of sectors.
const PLAIN_BYTES: u64 = 1 << 41;

/// A checked wish.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Which format.
    pub version: Version,
    /// Cipher of data and keyslots.
    pub spec: CipherSpec,
    /// Volume key, bytes.
    pub key_bytes: u32,
    /// Of digest and AF splitter (LUKS1: of the KDF too).
    pub hash: Hash,
    /// The one data area.
    pub data: DataArea,
    /// LUKS2: bytes of one copy of the header.
    pub copy_bytes: u64,
    /// LUKS2: bytes of the keyslots area.
    pub keyslots_bytes: u64,
    /// Bytes of the header device that are overwritten.
    pub header_bytes: u64,
    /// The UUID asked for, in canonical form.
    pub uuid: Option<String>,
    /// The keyslot to make.
    pub keyslot: u32,
    /// The KDF's kind when the wish names none.
    pub kdf: KdfKind,
    /// Worth telling the user.
    pub warnings: Vec<String>,
}

fn invalid(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Invalid, what)
}

impl Plan {
    /// Check the wish and complete it.
    ///
    /// # Errors
    /// `Invalid`, `Unsupported`, `NoSpace`: one clear sentence.
    pub fn new(new: &New, place: &Place) -> Result<Self> {
        let spec = CipherSpec::parse(new.cipher.as_deref().unwrap_or("aes-xts-plain64"))?;
        if !spec.is_for_new() {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("cipher {} is not used for new volumes", spec.name()),
            )
            .hint("aes-xts-plain64 is the one everybody reads"));
        }
        let key_bytes = new.key_bytes.unwrap_or(64);
        spec.check_key_bytes(key_bytes as usize)?;
        let uuid = new.uuid.as_deref().map(canonical_uuid).transpose()?;
        let mut plan = match new.version {
            Version::Luks1 => Self::luks1(new, place, spec, key_bytes)?,
            Version::Luks2 => Self::luks2(new, place, spec, key_bytes)?,
        };
        plan.uuid = uuid;
        plan.check_room(new, place)?;
        plan.warn(place);
        Ok(plan)
    }

    fn luks1(new: &New, place: &Place, spec: CipherSpec, key_bytes: u32) -> Result<Self> {
        let only_luks2 = [
            (new.label.is_some(), "a label"),
            (new.subsystem.is_some(), "a subsystem"),
            (new.metadata_bytes.is_some(), "a size of its metadata"),
            (new.keyslots_bytes.is_some(), "a size of its keyslots area"),
        ];
        if let Some((_, what)) = only_luks2.iter().find(|(given, _)| *given) {
            return Err(invalid(format!("a LUKS1 header has no place for {what}")).hint("--format luks2 has"));
        }
        if new.data_unit.is_some_and(|unit| unit != LUKS1_UNIT_BYTES) {
            return Err(
                invalid("a LUKS1 volume has data units of 512 bytes").hint("--format luks2 has larger ones")
            );
        }
        if !matches!(new.kdf.kind, None | Some(KdfKind::Pbkdf2)) {
            return Err(invalid("a LUKS1 keyslot knows pbkdf2 only").hint("--format luks2 has argon2id"));
        }
        // One field of the header names the hash of everything.
        let hash = match (&new.hash, &new.kdf.hash) {
            (Some(one), Some(other)) if Hash::from_name(one)? != Hash::from_name(other)? => {
                return Err(invalid(format!(
                    "a LUKS1 header has one hash for everything, not {one} and {other}"
                )));
            }
            (Some(name), _) | (None, Some(name)) => Hash::from_name(name)?,
            (None, None) => Hash::Sha256,
        };
        let keyslot = new.keyslot.unwrap_or(0);
        if keyslot as usize >= luks1::KEYSLOTS {
            return Err(invalid(format!("keyslot {keyslot} does not exist: LUKS1 has keyslots 0 to 7")));
        }
        let detached = place.detached;
        let payload_sector = match new.data_offset {
            None if detached => 0,
            None => luks1::Header::default_payload_sector(key_bytes),
            // 0 stands for "detached" in the header itself.
            Some(0) if !detached => return Err(invalid("data offset 0 is for detached headers")),
            Some(offset) => sector_of(offset)?,
        };
        let header_end = luks1::Header::layout(key_bytes, payload_sector)?.backup_bytes();
        let offset = u64::from(payload_sector) * 512;
        let cipher =
            Some(AreaCipher { spec, unit_bytes: LUKS1_UNIT_BYTES, offset_sectors: 0, large_tweak: false });
        Ok(Self {
            version: Version::Luks1,
            spec,
            key_bytes,
            hash,
            data: DataArea { offset, size: None, cipher },
            copy_bytes: 0,
            keyslots_bytes: 0,
            header_bytes: if detached { header_end } else { offset.min(HEADER_BYTES_MAX) },
            uuid: None,
            keyslot,
            kdf: KdfKind::Pbkdf2,
            warnings: Vec::new(),
        })
    }

    fn luks2(new: &New, place: &Place, spec: CipherSpec, key_bytes: u32) -> Result<Self> {
        for (what, name) in [("label", &new.label), ("subsystem", &new.subsystem)] {
            check_name(what, name.as_deref().unwrap_or_default())?;
        }
        let hash = Hash::from_name(new.hash.as_deref().unwrap_or("sha256"))?;
        if let Some(name) = &new.kdf.hash {
            let _ = Hash::from_name(name)?;
        }
        let keyslot = new.keyslot.unwrap_or(0);
        if keyslot >= OBJECTS_MAX {
            return Err(invalid(format!("keyslot {keyslot} does not exist: LUKS2 has keyslots 0 to 31")));
        }
        let unit_bytes = match (new.data_unit, place.data_capacity) {
            (Some(unit @ (512 | 1024 | 2048 | 4096)), _) => unit,
            (Some(unit), _) => {
                return Err(invalid(format!("data unit of {unit} bytes")).hint("512, 1024, 2048 or 4096"));
            }
            (None, Some(bytes)) if bytes % 4096 != 0 => 512,
            (None, _) => 4096,
        };
        let sizes = Sizes::new(new, place, key_bytes)?;
        let cipher = Some(AreaCipher { spec, unit_bytes, offset_sectors: 0, large_tweak: false });
        let end = 2 * sizes.copy_bytes + sizes.keyslots_bytes;
        Ok(Self {
            version: Version::Luks2,
            spec,
            key_bytes,
            hash,
            data: DataArea { offset: sizes.data_offset, size: None, cipher },
            copy_bytes: sizes.copy_bytes,
            keyslots_bytes: sizes.keyslots_bytes,
            header_bytes: if place.detached { end } else { sizes.data_offset.min(HEADER_BYTES_MAX) },
            uuid: None,
            keyslot,
            kdf: KdfKind::Argon2id,
            warnings: Vec::new(),
        })
    }

    fn check_room(&self, new: &New, place: &Place) -> Result<()> {
        let small = |what: &str, needed: u64, capacity: u64| {
            Error::new(
                ErrorKind::NoSpace,
                format!("the {what} is too small: {needed} bytes needed, {capacity} there"),
            )
        };
        if let Some(capacity) = place.header_capacity.filter(|capacity| *capacity < self.header_bytes) {
            return Err(small("device for the header", self.header_bytes, capacity));
        }
        let offset = self.data.offset;
        if new.data_offset.is_some() && !offset.is_multiple_of(u64::from(place.align.max(1))) {
            return Err(invalid(format!(
                "data offset {offset} is not a multiple of the device's {} bytes",
                place.align
            )));
        }
        let unit = self.data.cipher.map_or(512, |cipher| u64::from(cipher.unit_bytes));
        match place.data_capacity {
            Some(capacity) if capacity < offset + unit => Err(small("device", offset + unit, capacity)
                .hint("a detached header (--header) takes no room from the data")),
            Some(capacity) if new.data_unit.is_some() && !(capacity - offset).is_multiple_of(unit) => Err(
                invalid(format!("the device's {capacity} bytes are no whole number of data units of {unit}"))
                    .hint("--sector-size 512 fits every device"),
            ),
            _ => Ok(()),
        }
    }

    fn warn(&mut self, place: &Place) {
        if self.version == Version::Luks2 {
            let area = keyslot_area_bytes(self.key_bytes);
            let room = self.keyslots_bytes / area;
            if room < KEYSLOTS_FEW {
                self.warnings.push(format!("the keyslots area has room for {room} keyslots only"));
            }
        }
        if self.hash == Hash::Sha1 {
            self.warnings.push("sha1 is for old programs; sha256 is the default".to_owned());
        }
        let is_short = self.spec == CipherSpec::AesXts(proto::TweakKind::Plain);
        if is_short && place.data_capacity.is_none_or(|bytes| bytes > PLAIN_BYTES) {
            self.warnings
                .push("aes-xts-plain repeats its counter after 2 TiB; aes-xts-plain64 does not".to_owned());
        }
    }
}

/// Sizes of a LUKS2 header.
struct Sizes {
    copy_bytes: u64,
    keyslots_bytes: u64,
    data_offset: u64,
}

impl Sizes {
    /// By cryptsetup's rules: a data offset decides the size of the keyslots area, whichever way; else the area is what is left of
    /// 16 MiB, or less on a small device for a detached header; else it decides the data offset. A contradiction is refused
    /// (cryptsetup shrinks the area).
    fn new(new: &New, place: &Place, key_bytes: u32) -> Result<Self> {
        let copy_bytes = new.metadata_bytes.unwrap_or(COPY_BYTES_DEFAULT);
        if !is_copy_bytes(copy_bytes) {
            return Err(invalid(format!("metadata size of {copy_bytes} bytes"))
                .hint("16, 32, 64, 128, 256 or 512 KiB, 1, 2 or 4 MiB"));
        }
        if let Some(bytes) = new.keyslots_bytes
            && (bytes % AREA_ALIGN != 0 || bytes > KEYSLOTS_BYTES_MAX)
        {
            return Err(
                invalid(format!("keyslots area of {bytes} bytes")).hint("a multiple of 4096 up to 128 MiB")
            );
        }
        if let Some(offset) = new.data_offset.filter(|offset| offset % AREA_ALIGN != 0) {
            return Err(invalid(format!("data offset {offset} is not a multiple of 4096")));
        }
        // An offset of 0 is none: with a detached header the default, and else no place for data.
        let asked = new.data_offset.filter(|offset| *offset > 0 || !place.detached);
        let copies = 2 * copy_bytes;
        let keyslots_bytes = match (new.keyslots_bytes, asked) {
            (Some(bytes), _) => bytes,
            (None, Some(offset)) => offset.saturating_sub(copies).min(KEYSLOTS_BYTES_MAX),
            (None, None) => {
                let room = place
                    .header_capacity
                    .filter(|_| place.detached)
                    .unwrap_or(HEADER_BYTES_DEFAULT)
                    .min(HEADER_BYTES_DEFAULT);
                let room = room.saturating_sub(copies);
                room - room % AREA_ALIGN
            }
        };
        let least = keyslot_area_bytes(key_bytes);
        if keyslots_bytes < least {
            let needed = copies + least;
            return Err(match (new.keyslots_bytes, asked) {
                (Some(_), _) => {
                    invalid(format!("keyslots area of {keyslots_bytes} bytes: one keyslot takes {least}"))
                }
                (None, Some(offset)) => {
                    invalid(format!("data offset {offset} leaves no room for the header: at least {needed}"))
                }
                (None, None) => Error::new(
                    ErrorKind::NoSpace,
                    format!("the device for the header is too small: at least {needed} bytes"),
                ),
            });
        }
        let end = copies + keyslots_bytes;
        let data_offset = match asked {
            // The format has one rule for attached and detached headers.
            Some(offset) if offset < end => {
                return Err(invalid(format!(
                    "data offset {offset} lies within the header, which ends at {end}"
                )));
            }
            Some(offset) => offset,
            None if place.detached => 0,
            None => end.next_multiple_of(DATA_ALIGN),
        };
        Ok(Self { copy_bytes, keyslots_bytes, data_offset })
    }
}

fn sector_of(offset: u64) -> Result<u32> {
    if !offset.is_multiple_of(512) {
        return Err(invalid(format!("data offset {offset} is not a multiple of 512")));
    }
    u32::try_from(offset / 512)
        .map_err(|_| invalid(format!("data offset {offset} is beyond what LUKS1 can say")))
}

/// Is this a label?
///
/// # Errors
/// `Invalid`: too long, or control characters.
pub fn check_name(what: &str, name: &str) -> Result<()> {
    if name.len() > NAME_BYTES_MAX {
        return Err(invalid(format!("{what} of {} bytes: at most {NAME_BYTES_MAX}", name.len())));
    }
    if name.chars().any(char::is_control) {
        return Err(invalid(format!("{what} with control characters")));
    }
    Ok(())
}

/// A UUID in canonical form: 8-4-4-4-12 hexadecimal digits in lower case.
///
/// # Errors
/// `Invalid`: it is none.
pub fn canonical_uuid(text: &str) -> Result<String> {
    let is_one = text.len() == 36
        && text.bytes().enumerate().all(|(at, byte)| match at {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => byte.is_ascii_hexdigit(),
        });
    if is_one {
        Ok(text.to_ascii_lowercase())
    } else {
        Err(invalid("not a UUID").hint("like 4f1c2d3e-5a6b-4c7d-8e9f-0a1b2c3d4e5f"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::luks::KdfWish;

    const FILE: Place = Place { detached: false, header_capacity: None, data_capacity: None, align: 1 };
    const DETACHED: Place = Place { detached: true, ..FILE };

    fn wish(version: Version) -> New {
        let text = match version {
            Version::Luks1 => r#"{"version":"luks1"}"#,
            Version::Luks2 => r#"{"version":"luks2"}"#,
        };
        serde_json::from_str(text).expect("a wish")
    }

    fn luks2(change: impl FnOnce(&mut New)) -> Result<Plan> {
        luks2_at(FILE, change)
    }

    fn luks2_at(place: Place, change: impl FnOnce(&mut New)) -> Result<Plan> {
        let mut new = wish(Version::Luks2);
        change(&mut new);
        Plan::new(&new, &place)
    }

    fn luks1(change: impl FnOnce(&mut New)) -> Result<Plan> {
        let mut new = wish(Version::Luks1);
        change(&mut new);
        Plan::new(&new, &FILE)
    }

    fn refusal(plan: Result<Plan>) -> (ErrorKind, String) {
        let error = plan.expect_err("refused");
        (error.kind(), error.chain())
    }

    #[test]
    fn defaults_are_those_of_cryptsetup() {
        let plan = luks2(|_| {}).expect("planned");
        assert_eq!((plan.data.offset, plan.copy_bytes, plan.keyslots_bytes), (16 << 20, 16384, 16_744_448));
        assert_eq!(plan.header_bytes, 16 << 20);
        let cipher = plan.data.cipher.expect("encrypted");
        assert_eq!((cipher.unit_bytes, cipher.spec.name(), plan.key_bytes), (4096, "aes-xts-plain64", 64));
        let plan = luks1(|_| {}).expect("planned");
        assert_eq!((plan.data.offset, plan.header_bytes), (2 << 20, 2 << 20));
    }

    #[test]
    fn sizes_follow_each_other_as_in_cryptsetup() {
        // Data offset, metadata, keyslots asked for; data offset and keyslots that cryptsetup 2.6.1 makes of it.
        for (offset, metadata, keyslots, offset_made, keyslots_made) in [
            (Some(290_816), None, None, 290_816, 258_048),
            (Some(1 << 20), None, None, 1 << 20, 1_015_808),
            (Some(32 << 20), None, None, 32 << 20, 33_521_664),
            (None, Some(4 << 20), None, 16 << 20, 8 << 20),
            (None, Some(64 << 10), Some(1 << 20), 2 << 20, 1 << 20),
            (None, None, Some(128 << 20), 135_266_304, 128 << 20),
            (None, None, Some(258_048), 1 << 20, 258_048),
        ] {
            let plan = luks2(|new| {
                (new.data_offset, new.metadata_bytes, new.keyslots_bytes) = (offset, metadata, keyslots);
            });
            let plan = plan.expect("planned");
            assert_eq!((plan.data.offset, plan.keyslots_bytes), (offset_made, keyslots_made));
        }
    }

    #[test]
    fn sizes_that_contradict_are_refused() {
        for (offset, metadata, keyslots, message) in [
            (Some(290_816 - 4096), None, None, "leaves no room for the header: at least 290816"),
            (Some(0), None, None, "leaves no room"),
            (Some((16 << 20) + 512), None, None, "not a multiple of 4096"),
            (None, Some(48 << 10), None, "metadata size"),
            (None, Some(8 << 20), None, "metadata size"),
            (None, None, Some((128 << 20) + 4096), "keyslots area"),
            (None, None, Some(4097), "keyslots area"),
            (None, None, Some(253_952), "one keyslot takes 258048"),
            (Some(524_288), None, Some(1 << 20), "lies within the header, which ends at 1081344"),
        ] {
            let plan = luks2(|new| {
                (new.data_offset, new.metadata_bytes, new.keyslots_bytes) = (offset, metadata, keyslots);
            });
            let (kind, text) = refusal(plan);
            assert_eq!(kind, ErrorKind::Invalid);
            assert!(text.contains(message), "{text} has no {message}");
        }
    }

    #[test]
    fn a_detached_header_leaves_the_data_at_zero_and_fits_its_device() {
        let plan = luks2_at(DETACHED, |_| {}).expect("planned");
        assert_eq!((plan.data.offset, plan.header_bytes), (0, 16 << 20));
        let plan = luks2_at(DETACHED, |new| new.data_offset = Some(0)).expect("planned");
        assert_eq!((plan.data.offset, plan.header_bytes), (0, 16 << 20));
        let small = Place { header_capacity: Some((1 << 20) + 512), ..DETACHED };
        let plan = luks2_at(small, |_| {}).expect("planned");
        assert_eq!((plan.header_bytes, plan.keyslots_bytes), (1 << 20, (1 << 20) - 32768));
        let tiny = Place { header_capacity: Some(64 << 10), ..DETACHED };
        assert_eq!(refusal(luks2_at(tiny, |_| {})).0, ErrorKind::NoSpace);
    }

    #[test]
    fn a_device_must_hold_a_data_unit_behind_the_header() {
        let of = |bytes| Place { header_capacity: Some(bytes), data_capacity: Some(bytes), ..FILE };
        assert_eq!(refusal(luks2_at(of(16 << 20), |_| {})).0, ErrorKind::NoSpace);
        assert_eq!(refusal(luks2_at(of(1 << 20), |_| {})).0, ErrorKind::NoSpace);
        let unit = |bytes| {
            let plan = luks2_at(of(bytes), |_| {}).expect("planned");
            plan.data.cipher.expect("encrypted").unit_bytes
        };
        assert_eq!(unit((16 << 20) + 4096), 4096);
        assert_eq!(unit((16 << 20) + 512), 512);
        let refused = luks2_at(of((17 << 20) + 512), |new| new.data_unit = Some(4096));
        assert_eq!(refusal(refused).0, ErrorKind::Invalid);
    }

    #[test]
    fn what_luks1_has_no_place_for_is_refused() {
        let changes: [fn(&mut New); 10] = [
            |new| new.label = Some("x".to_owned()),
            |new| new.subsystem = Some("x".to_owned()),
            |new| new.metadata_bytes = Some(16384),
            |new| new.keyslots_bytes = Some(1 << 20),
            |new| new.data_unit = Some(4096),
            |new| new.keyslot = Some(8),
            |new| new.kdf = KdfWish { kind: Some(KdfKind::Argon2id), ..KdfWish::default() },
            |new| new.data_offset = Some(0),
            |new| new.data_offset = Some(4096),
            |new| new.data_offset = Some(1 << 42),
        ];
        for change in changes {
            assert_eq!(refusal(luks1(change)).0, ErrorKind::Invalid);
        }
        let two_hashes = luks1(|new| {
            new.hash = Some("sha256".to_owned());
            new.kdf.hash = Some("sha512".to_owned());
        });
        assert_eq!(refusal(two_hashes).0, ErrorKind::Invalid);
        let plan = luks1(|new| new.kdf.hash = Some("sha512".to_owned())).expect("planned");
        assert_eq!(plan.hash, Hash::Sha512);
    }

    #[test]
    fn names_and_numbers_are_bounded() {
        assert!(luks2(|new| new.label = Some("a".repeat(47))).is_ok());
        let changes: [fn(&mut New); 8] = [
            |new| new.label = Some("a".repeat(48)),
            |new| new.label = Some("ä".repeat(24)),
            |new| new.subsystem = Some("a\nb".to_owned()),
            |new| new.keyslot = Some(32),
            |new| new.data_unit = Some(8192),
            |new| new.uuid = Some("4f1c2d3e5a6b4c7d8e9f0a1b2c3d4e5f".to_owned()),
            |new| new.uuid = Some("4f1c2d3e-5a6b-4c7d-8e9f-0a1b2c3d4e5g".to_owned()),
            |new| new.key_bytes = Some(48),
        ];
        for change in changes {
            assert_eq!(refusal(luks2(change)).0, ErrorKind::Invalid);
        }
        let plan = luks2(|new| new.uuid = Some("4F1C2D3E-5A6B-4C7D-8E9F-0A1B2C3D4E5F".to_owned()));
        assert_eq!(plan.expect("planned").uuid.as_deref(), Some("4f1c2d3e-5a6b-4c7d-8e9f-0a1b2c3d4e5f"));
    }

    #[test]
    fn unknown_and_old_ciphers_and_hashes_are_named() {
        for name in ["serpent-xts-plain64", "aes-cbc-essiv:sha256"] {
            let (kind, text) = refusal(luks2(|new| new.cipher = Some(name.to_owned())));
            assert_eq!(kind, ErrorKind::Unsupported);
            assert!(text.contains(name), "{text}");
        }
        let (kind, text) = refusal(luks2(|new| new.hash = Some("whirlpool".to_owned())));
        assert_eq!(kind, ErrorKind::Unsupported);
        assert!(text.contains("whirlpool"), "{text}");
    }
}
