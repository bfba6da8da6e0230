//! LUKS volumes: opening, making and managing them. Where formats (which do no I/O), key derivation, randomness and devices meet.
//!
//! | file | its one purpose |
//! |---|---|
//! | `mod` | a header of either version as it was read, and its data areas |
//! | `unlock` | from a passphrase to the volume key |
//! | `area` | keyslot material: wrap and unwrap a volume key |
//! | `capture` | the header of a volume that arrives in order |
//! | `create` | a new header with its first keyslot, in memory, and the order in which it is written |
//! | `held` | who has a volume: re-encryption, export, both |
//! | `keep` | a new header kept aside while its data is written |
//! | `plan` | a wish for a new volume checked and made complete |
//! | `store` | write orders of header changes |
//! | `keyslots` | add, remove, change, convert, erase |
//! | `backup` | header backup and restore |
//! | `repair` | damaged headers |
//! | `reencrypt` | re-encryption in place: begin, open, recover, end |
//! | `random` | random bytes from the kernel |
//! | `tokens` | tokens, and ours: where a key lives and when it must be rotated |
//! | `summary` | a header described |
//! | `doctor` | a volume explained |
//! | `manage` | a request of the wire carried out |

pub mod area;
pub mod backup;
pub mod capture;
pub mod create;
pub mod device;
pub mod doctor;
pub mod held;
pub mod keep;
pub mod keyslots;
pub mod manage;
pub mod plan;
pub mod random;
pub mod reencrypt;
pub mod repair;
pub mod store;
pub mod summary;
pub mod tokens;
pub mod unlock;

use crate::backend::blocking::Blocking;
use crate::crypto::spec::CipherSpec;
use crate::crypto::{Kernel, Layout, Secret, SectorCipher, VolumeKey, cipher};
use crate::error::{Error, ErrorKind, Result};
use crate::format::luks2::metadata::{Metadata, Segment, SegmentKind};
use crate::format::{luks1, luks2};
use crate::volume::reencrypt::shift;

/// Data unit of every LUKS1 volume, bytes.
pub const LUKS1_UNIT_BYTES: u32 = 512;
/// What all LUKS headers begin with; the version follows, 2 bytes, big-endian.
const MAGIC: [u8; 6] = *b"LUKS\xBA\xBE";
/// What the second copy of a LUKS2 header begins with.
const MAGIC_SECONDARY: [u8; 6] = *b"SKUL\xBA\xBE";
/// What librbd puts in place of [`MAGIC`] in a clone whose parent has another key.
const MAGIC_CLONE: [u8; 6] = *b"RBDL\xBA\xBE";

/// A header as it was read.
#[derive(Debug, Clone, PartialEq)]
pub enum Header {
    /// Version 1.
    Luks1(Box<luks1::Header>),
    /// Version 2, with the state of its two copies.
    Luks2(Box<luks2::Loaded>),
}

/// A data area, ready for the pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DataArea {
    /// First byte on the device.
    pub offset: u64,
    /// Bytes; `None`: to the end of the device.
    pub size: Option<u64>,
    /// How it is encrypted; `None`: it is not (`linear`).
    pub cipher: Option<AreaCipher>,
}

/// How a data area is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AreaCipher {
    /// Which cipher.
    pub spec: CipherSpec,
    /// Data unit, bytes.
    pub unit_bytes: u32,
    /// Counter of the first data unit, 512-byte sectors.
    pub offset_sectors: u64,
    /// Tweaks are counted in data units (`iv_large_sectors`): volumes without a header only, LUKS has none of it.
    pub large_tweak: bool,
}

impl AreaCipher {
    /// The cipher of the data units from this byte of the area's plaintext on, a multiple of the data unit.
    ///
    /// # Errors
    /// As [`CipherSpec::build`] and [`crate::crypto::cipher`].
    pub fn build(&self, kernel: Kernel, key: &Secret, from: u64) -> Result<Box<dyn SectorCipher>> {
        let offset_sectors = self.offset_sectors + from / 512;
        match self.layout() {
            Some(layout) if layout.large => {
                let key = VolumeKey::new(key.as_bytes())?;
                cipher(kernel, &key, Layout { offset_sectors, ..layout })
            }
            _ => self.spec.build(kernel, key, self.unit_bytes, offset_sectors),
        }
    }

    /// The layout of an XTS cipher.
    #[must_use]
    pub fn layout(&self) -> Option<Layout> {
        let CipherSpec::AesXts(kind) = self.spec else { return None };
        Some(Layout {
            unit_bytes: self.unit_bytes,
            kind,
            large: self.large_tweak,
            offset_sectors: self.offset_sectors,
        })
    }
}

impl Header {
    /// Read the header of a device. A LUKS2 header of which only the second copy is left is found too.
    ///
    /// # Errors
    /// `Unsupported`: no LUKS header here, or of a kind or version this build does not know. `Damaged`: a damaged one, or one
    /// that is cut off.
    pub fn load(device: &mut Blocking) -> Result<Self> {
        let mut start = [0; luks1::HEADER_BYTES];
        // Less than the smallest header can hold no header at all.
        match device.read(0, &mut start) {
            Err(error) if error.kind() == ErrorKind::Invalid => return Err(no_luks(device)),
            other => other?,
        }
        let version = u16::from_be_bytes([start[6], start[7]]);
        let header = match (start.starts_with(&MAGIC), version) {
            (true, 1) => luks1::Header::parse(&start).map(|header| Self::Luks1(Box::new(header))),
            (true, 2) => Self::load_luks2(device),
            (true, _) => Err(Error::new(ErrorKind::Unsupported, format!("unknown LUKS version {version}"))),
            (false, _) if start.starts_with(&MAGIC_CLONE) => Err(Error::new(
                ErrorKind::Unsupported,
                "header of a librbd clone with a key of its own",
            )
            .hint(
                "the parent's data in it is under another key: open it through librbd, or flatten it first",
            )),
            (false, _) => match secondary_offsets(device)?.first() {
                Some(_) => Self::load_luks2(device),
                None if shift::is_marked(device)? => Err(no_header_yet()),
                None => return Err(no_luks(device)),
            },
        };
        // What is there of the second copy then is the torn beginning of one.
        let header = match header {
            Err(error) if error.kind() != ErrorKind::Io && shift::is_marked(device)? => {
                Err(no_header_yet().because(error))
            }
            other => other,
        };
        header.map_err(|error| named(error.as_damage(), device))
    }

    fn load_luks2(device: &mut Blocking) -> Result<Self> {
        let loaded = luks2::load(&mut |offset, into| device.read(offset, into))?;
        Ok(Self::Luks2(Box::new(loaded)))
    }

    /// The data areas in the order of the plaintext.
    ///
    /// # Errors
    /// `Unsupported`: requirements or segment types this build does not know, an unknown cipher (named), integrity. `Invalid`: a
    /// key or counter that does not fit the cipher.
    pub fn data_areas(&self) -> Result<Vec<DataArea>> {
        match self {
            Self::Luks1(header) => {
                let spec = CipherSpec::parse(&header.cipher())?;
                spec.check_key_bytes(header.key_bytes as usize)?;
                let unit_bytes = LUKS1_UNIT_BYTES;
                let cipher = Some(AreaCipher { spec, unit_bytes, offset_sectors: 0, large_tweak: false });
                Ok(vec![DataArea { offset: u64::from(header.payload_sector) * 512, size: None, cipher }])
            }
            Self::Luks2(loaded) => luks2_areas(&loaded.header.metadata),
        }
    }

    /// The volume's UUID.
    #[must_use]
    pub fn uuid(&self) -> &str {
        match self {
            Self::Luks1(header) => &header.uuid,
            Self::Luks2(loaded) => &loaded.header.uuid,
        }
    }
}

/// See [`shift`].
fn no_header_yet() -> Error {
    Error::new(ErrorKind::Unsupported, "an encryption of this device was cut off before there was a header")
        .hint("its first bytes are safe: the same `cryptctl reencrypt --encrypt` command puts them back and begins anew")
}

fn no_luks(device: &Blocking) -> Error {
    Error::new(ErrorKind::Unsupported, "not a LUKS volume")
        .at(device.name())
        .hint("a volume without a header is opened with --format raw and its cipher; a detached header is named with --header")
}

/// An error of a format does not know the device.
fn named(error: Error, device: &Blocking) -> Error {
    match error.kind() {
        ErrorKind::Damaged | ErrorKind::Unsupported => error.at(device.name()),
        _ => error,
    }
}

/// Where something that looks like the second copy of a LUKS2 header lies: there are nine places it can have.
fn secondary_offsets(device: &mut Blocking) -> Result<Vec<u64>> {
    let mut found = Vec::new();
    let mut offset = *luks2::COPY_BYTES.start();
    while offset <= *luks2::COPY_BYTES.end() {
        let mut magic = [0; MAGIC_SECONDARY.len()];
        match device.read(offset, &mut magic) {
            Ok(()) if magic == MAGIC_SECONDARY => found.push(offset),
            Ok(()) => {}
            // The end of the device: the others lie behind it.
            Err(error) if error.kind() == ErrorKind::Invalid => break,
            Err(error) => return Err(error),
        }
        offset *= 2;
    }
    Ok(found)
}

fn luks2_areas(metadata: &Metadata) -> Result<Vec<DataArea>> {
    if let Some(error) = refused_requirement(&metadata.unmet_requirements()) {
        return Err(error);
    }
    let areas: Vec<_> = metadata
        .data_segments()
        .map(|(id, segment)| luks2_area(metadata, id, segment))
        .collect::<Result<_>>()?;
    if areas.is_empty() {
        return Err(Error::new(ErrorKind::Unsupported, "the header has no data area"));
    }
    Ok(areas)
}

/// Why a volume with these requirements is left alone; `None` when there are none.
fn refused_requirement(unmet: &[&str]) -> Option<Error> {
    let all = unmet.join(", ");
    let error = |what: String| Error::new(ErrorKind::Unsupported, what);
    if unmet.is_empty() {
        None
    } else if unmet.iter().any(|name| name.starts_with("online-reencrypt") || *name == "offline-reencrypt") {
        Some(
            error(format!("re-encryption of the volume is not finished (requirement {all})"))
                .hint("finish it first: cryptctl reencrypt --resume-only, whichever program began it"),
        )
    } else if unmet.iter().any(|name| name.starts_with("opal")) {
        Some(error(format!("the volume is encrypted by its drive (requirement {all})")))
    } else {
        Some(error(format!("the volume requires what this build does not know: {all}")))
    }
}

fn luks2_area(metadata: &Metadata, id: u32, segment: &Segment) -> Result<DataArea> {
    let refuse = |what: String| Err(Error::new(ErrorKind::Unsupported, format!("segment {id}: {what}")));
    if segment.flags.iter().any(|flag| flag == "in-reencryption") {
        return refuse("in re-encryption".to_owned());
    }
    let cipher = match &segment.kind {
        SegmentKind::Linear => None,
        SegmentKind::Unknown(kind) if kind.starts_with("hw-opal") => {
            return refuse(format!("encrypted by the drive (type {kind})"));
        }
        SegmentKind::Unknown(kind) => return refuse(format!("unknown type {kind}")),
        SegmentKind::Crypt { integrity: Some(integrity), .. } => {
            let kind = integrity.get("type").and_then(serde_json::Value::as_str).unwrap_or("of unknown type");
            return refuse(format!("data integrity ({kind}) needs dm-integrity"));
        }
        SegmentKind::Crypt { encryption, sector_size, iv_tweak, integrity: None } => {
            let spec = CipherSpec::parse(encryption)?;
            if let Some(key_size) = key_bytes_of_segment(metadata, id) {
                spec.check_key_bytes(key_size as usize)?;
            }
            if !matches!(sector_size, 512 | 1024 | 2048 | 4096) {
                return refuse(format!("data units of {sector_size} bytes"));
            }
            // dm-crypt has the same rule: the counter of a data unit is that of its first sector.
            if iv_tweak % u64::from(sector_size / 512) != 0 {
                return Err(Error::new(
                    ErrorKind::Invalid,
                    format!(
                        "segment {id}: counter {iv_tweak} is not that of a data unit of {sector_size} bytes"
                    ),
                ));
            }
            Some(AreaCipher { spec, unit_bytes: *sector_size, offset_sectors: *iv_tweak, large_tweak: false })
        }
    };
    Ok(DataArea { offset: segment.offset, size: segment.size, cipher })
}

/// Length of a segment's key: only keyslots tell.
fn key_bytes_of_segment(metadata: &Metadata, segment: u32) -> Option<u32> {
    let (_, digest) = metadata.digest_of_segment(segment)?;
    digest.keyslots.iter().find_map(|id| match metadata.keyslots.get(id) {
        Some(luks2::metadata::Keyslot::Luks2(keyslot)) => Some(keyslot.key_size),
        _ => None,
    })
}
