//! A new header with its first keyslot, in memory, and the order in which it is written.
//!
//! Everything that can fail for a bad wish or for want of memory happens before a byte of the device is touched: [`make`]
//! needs no device. What is written covers everything from byte 0 to the data: both copies or the one header, keyslots, and
//! zeros over whatever else was there; keyslots areas not in use are random, so that nobody sees how many are.

use std::ops::Range;
use std::time::Duration;

use crate::backend::blocking::Blocking;
use crate::crypto::kdf::{Kdf, digest_iterations};
use crate::crypto::{Secret, bytes_equal};
use crate::error::{Error, ErrorKind, Result};
use crate::format::luks2::binary::BINARY_BYTES;
use crate::format::luks2::edit::keyslot_area_bytes;
use crate::format::luks2::metadata::{Digest, Keyslot, Luks2Keyslot, Segment};
use crate::format::luks2::{Copy, Health, Loaded};
use crate::format::{luks1, luks2};
use crate::volume::area::Wrapping;
use crate::volume::plan::Plan;
use crate::volume::{DataArea, Header, random, secondary_offsets, store};
use proto::luks::{New, Version};

/// What checking a volume key shall take, as in cryptsetup.
pub(super) const DIGEST_TIME: Duration = Duration::from_millis(125);
/// Its iterations where the wish forbids measuring, as in cryptsetup.
pub(super) const DIGEST_ITERATIONS_MIN: u32 = 1000;
/// Zeros at a time in [`NewHeader::stream`].
const PIECE: usize = 1 << 20;

/// A header that exists in memory only.
#[derive(Debug)]
pub struct NewHeader {
    /// What will be on disk.
    pub header: Header,
    /// The one data area: its offset on the data device (0 with a detached header unless asked for otherwise).
    pub data: DataArea,
    /// The volume key.
    pub key: Secret,
    /// The keyslot made.
    pub keyslot: u32,
    /// Bytes of the header device that belong to the header: what is overwritten from byte 0.
    pub header_bytes: u64,
    /// Worth telling the user.
    pub warnings: Vec<String>,
    /// First byte of the keyslot's material, and the material.
    material: (u64, Vec<u8>),
    /// All bytes up to the data or the end of a detached header.
    stream_bytes: u64,
}

/// What is known about where it will be written.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// The header goes into a file or device of its own.
    pub detached: bool,
    /// Bytes of the device or file that takes the header, if it is not to grow.
    pub header_capacity: Option<u64>,
    /// Bytes of the device or file that takes the data, if it is not to grow.
    pub data_capacity: Option<u64>,
    /// Block size of the data device. The data unit's default is 4096 (LUKS1: 512) whatever it is; a device whose size is not a
    /// multiple of 4096 gets 512.
    pub align: u32,
}

/// A wish that can be fulfilled.
#[derive(Debug, Clone)]
pub struct Planned {
    /// Where the data will be.
    pub data: DataArea,
    /// Worth telling the user.
    pub warnings: Vec<String>,
}

/// Check the wish without making anything: sizes, names, cipher, where the data will begin. Cheap: no key derivation.
///
/// # Errors
/// `Invalid`, `Unsupported`, `NoSpace`: one clear sentence.
pub fn plan(new: &New, place: &Place) -> Result<Planned> {
    let plan = Plan::new(new, place)?;
    Kdf::check_wish(&new.kdf, plan.kdf, plan.hash)?;
    Ok(Planned { data: plan.data, warnings: plan.warnings })
}

/// Make a LUKS header at the start of `device`, or what is left of one, unusable, durably; other content stays. For a device
/// that gets new data, but whose new header is elsewhere.
///
/// # Errors
/// Of the device.
pub fn clear_old(device: &mut Blocking) -> Result<()> {
    let mut first = [0; BINARY_BYTES];
    match device.read(0, &mut first) {
        Ok(()) if luks1::Header::is_here(&first) || luks2::is_here(&first) => {
            store::zero_fill(device, 0, BINARY_BYTES as u64)?;
        }
        Ok(()) => {}
        // Too short for a header.
        Err(error) if error.kind() == ErrorKind::Invalid => return Ok(()),
        Err(error) => return Err(error),
    }
    for offset in secondary_offsets(device)? {
        store::zero_fill(device, offset, BINARY_BYTES as u64)?;
    }
    device.flush()
}

/// Make the header: random volume key (or the one given), calibrated KDF, digest, first keyslot. Takes seconds.
///
/// # Errors
/// As [`plan`]; `Invalid`: a volume key of the wrong length or with equal halves, a KDF out of bounds.
pub fn make(new: &New, place: &Place, passphrase: &Secret, volume_key: Option<Secret>) -> Result<NewHeader> {
    make_unless(new, place, passphrase, volume_key, &|| false)
}

/// [`make`], asking `give_up` while a derivation waits for another ([`Kdf::derive_unless`]).
///
/// # Errors
/// As [`make`]; `Cancelled`.
pub fn make_unless(
    new: &New,
    place: &Place,
    passphrase: &Secret,
    volume_key: Option<Secret>,
    give_up: &dyn Fn() -> bool,
) -> Result<NewHeader> {
    let plan = Plan::new(new, place)?;
    let key = match volume_key {
        Some(key) => key,
        None => random_key(plan.key_bytes)?,
    };
    check_key(&key, plan.key_bytes)?;
    let kdf = Kdf::calibrate(&new.kdf, plan.kdf, plan.hash, plan.key_bytes as usize, give_up)?;
    let iterations = match new.kdf.iterations {
        Some(_) => DIGEST_ITERATIONS_MIN,
        None => digest_iterations(plan.hash, DIGEST_TIME),
    };
    let made = Made { plan: &plan, kdf, passphrase, key: &key, iterations, give_up };
    let (header, material) = match plan.version {
        Version::Luks1 => made.luks1()?,
        Version::Luks2 => made.luks2(new)?,
    };
    Ok(NewHeader {
        header,
        data: plan.data,
        keyslot: plan.keyslot,
        header_bytes: plan.header_bytes,
        stream_bytes: if place.detached { plan.header_bytes } else { plan.data.offset },
        warnings: plan.warnings,
        key,
        material,
    })
}

pub(super) fn random_key(bytes: u32) -> Result<Secret> {
    let mut key = Secret::zeroed(bytes as usize)?;
    random::fill(key.as_mut_bytes())?;
    Ok(key)
}

/// New volumes are XTS: with equal halves the tweak is encrypted under the key of the data, and the mode loses its proof.
pub(super) fn check_key(key: &Secret, key_bytes: u32) -> Result<()> {
    if key.len() != key_bytes as usize {
        return Err(Error::new(
            ErrorKind::Invalid,
            format!("the volume key given is not {key_bytes} bytes long"),
        ));
    }
    let (data, tweak) = key.as_bytes().split_at(key.len() / 2);
    if bytes_equal(data, tweak) {
        return Err(Error::new(ErrorKind::Invalid, "the two halves of the volume key are equal"));
    }
    Ok(())
}

/// A random UUID (RFC 9562, version 4) in canonical form.
pub(super) fn random_uuid() -> Result<String> {
    let mut bytes = [0; 16];
    random::fill(&mut bytes)?;
    bytes[6] = bytes[6] & 0x0F | 0x40;
    bytes[8] = bytes[8] & 0x3F | 0x80;
    let digits = format!("{:032x}", u128::from_be_bytes(bytes));
    Ok([&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]].join("-"))
}

pub(super) fn random_salt<const BYTES: usize>() -> Result<[u8; BYTES]> {
    let mut salt = [0; BYTES];
    random::fill(&mut salt)?;
    Ok(salt)
}

/// What both versions are made of.
struct Made<'a> {
    plan: &'a Plan,
    kdf: Kdf,
    passphrase: &'a Secret,
    key: &'a Secret,
    /// Of the digest.
    iterations: u32,
    give_up: &'a dyn Fn() -> bool,
}

type WithMaterial = (Header, (u64, Vec<u8>));

impl Made<'_> {
    fn digest(&self, salt: &[u8], bytes: usize) -> Result<Vec<u8>> {
        let mut digest = vec![0; bytes];
        let kdf = Kdf::Pbkdf2 { hash: self.plan.hash, iterations: self.iterations };
        kdf.derive(self.key.as_bytes(), salt, &mut digest)?;
        Ok(digest)
    }

    fn wrap(&self, salt: &[u8]) -> Result<Vec<u8>> {
        // Cipher and key length of the keyslot are those of the data, as in both versions of cryptsetup's headers.
        let wrapping = Wrapping {
            kdf: self.kdf,
            salt,
            cipher: self.plan.spec,
            area_key_bytes: self.plan.key_bytes as usize,
            af_hash: self.plan.hash,
        };
        wrapping.wrap_unless(self.passphrase, self.key, self.give_up)
    }

    fn uuid(&self) -> Result<String> {
        self.plan.uuid.clone().map_or_else(random_uuid, Ok)
    }

    fn luks1(&self) -> Result<WithMaterial> {
        let plan = self.plan;
        let payload_sector = u32::try_from(plan.data.offset / 512).expect("the plan has checked it");
        let mut header = luks1::Header::layout(plan.key_bytes, payload_sector)?;
        let (name, mode) = plan.spec.name().split_once('-').expect("dm-crypt's names have a mode");
        header.cipher_name = name.to_owned();
        header.cipher_mode = mode.to_owned();
        header.hash = plan.hash.name().to_owned();
        header.uuid = self.uuid()?;
        header.digest_salt = random_salt()?;
        header.digest_iterations = self.iterations;
        let digest = self.digest(&header.digest_salt, header.digest.len())?;
        header.digest.copy_from_slice(&digest);
        let Kdf::Pbkdf2 { iterations, .. } = self.kdf else {
            return Err(Error::new(ErrorKind::Invalid, "a LUKS1 keyslot knows pbkdf2 only"));
        };
        let keyslot = &mut header.keyslots[plan.keyslot as usize];
        keyslot.active = true;
        keyslot.iterations = iterations;
        keyslot.salt = random_salt()?;
        let material = (keyslot.material_offset(), self.wrap(&keyslot.salt)?);
        Ok((Header::Luks1(Box::new(header)), material))
    }

    fn luks2(&self, new: &New) -> Result<WithMaterial> {
        let plan = self.plan;
        let (hash, cipher) = (plan.hash.name(), plan.spec.name());
        let unit_bytes = plan.data.cipher.expect("new volumes are encrypted").unit_bytes;
        let segment = Segment::crypt(plan.data.offset, None, cipher, unit_bytes);
        let salts = [random_salt()?, random_salt()?];
        let mut header =
            luks2::Header::new(plan.copy_bytes, plan.keyslots_bytes, segment, self.uuid()?, salts)?;
        header.label = new.label.clone().unwrap_or_default();
        header.subsystem = new.subsystem.clone().unwrap_or_default();

        let area = header.free_keyslot_area(plan.key_bytes)?;
        let salt = random_salt()?;
        let keyslot = Luks2Keyslot::new(plan.key_bytes, area, (cipher, plan.key_bytes), hash, self.kdf, salt);
        header.metadata.keyslots.insert(plan.keyslot, Keyslot::Luks2(keyslot));

        let digest_salt: [u8; 32] = random_salt()?;
        let digest = self.digest(&digest_salt, plan.hash.bytes())?;
        let mut digest = Digest::pbkdf2(hash, self.iterations, digest_salt.into(), digest);
        digest.keyslots.push(plan.keyslot);
        digest.segments.push(0);
        header.metadata.digests.insert(0, digest);
        // A header that cannot be written is found out here, not after the device was touched.
        header.check()?;
        let material = (area.offset, self.wrap(&salt)?);
        Ok((Header::Luks2(Box::new(Loaded { header, health: [Health::Good, Health::Good] })), material))
    }
}

/// A stretch of the header device.
enum Content<'a> {
    Zeros,
    Random,
    Bytes(&'a [u8]),
}

impl NewHeader {
    /// One that was made before, and kept ([`crate::volume::keep`]).
    #[must_use]
    pub(super) fn again(
        header: Header,
        data: DataArea,
        (keyslot, key): (u32, Secret),
        header_bytes: u64,
        material: (u64, Vec<u8>),
    ) -> Self {
        Self {
            header,
            data,
            key,
            keyslot,
            header_bytes,
            warnings: Vec::new(),
            material,
            stream_bytes: header_bytes,
        }
    }

    /// First byte of the keyslot's material, and the material.
    #[must_use]
    pub(super) fn material(&self) -> (u64, &[u8]) {
        (self.material.0, &self.material.1)
    }

    /// Make whatever header was on the device unusable, durably: before its data is overwritten, so that a job that dies leaves
    /// no old header in front of new data. Second copies of LUKS2 headers are looked for where the new data will be, too.
    ///
    /// # Errors
    /// Of the device.
    pub fn clear(&self, device: &mut Blocking) -> Result<()> {
        store::zero_fill(device, 0, self.header_bytes)?;
        for offset in secondary_offsets(device)? {
            store::zero_fill(device, offset, BINARY_BYTES as u64)?;
        }
        device.flush()
    }

    /// Write it, durably, in the order that leaves no half header: 1. keyslots area and material, 2. flush, 3. header (LUKS2:
    /// primary, flush, secondary; LUKS1: second sector, flush, first), 4. flush.
    ///
    /// # Errors
    /// Of the device.
    pub fn write(&self, device: &mut Blocking) -> Result<()> {
        self.write_in(device, [Copy::Primary, Copy::Secondary])
    }

    /// As [`NewHeader::write`], the second copy of a LUKS2 header first: until it is durable the first sector is as it was.
    ///
    /// # Errors
    /// Of the device.
    pub fn write_primary_last(&self, device: &mut Blocking) -> Result<()> {
        self.write_in(device, [Copy::Secondary, Copy::Primary])
    }

    fn write_in(&self, device: &mut Blocking, order: [Copy; 2]) -> Result<()> {
        for (range, content) in self.behind_the_header(self.header_bytes) {
            let bytes = range.end - range.start;
            match content {
                Content::Zeros => store::zero_fill(device, range.start, bytes)?,
                Content::Random => store::random_fill(device, range.start, bytes)?,
                Content::Bytes(bytes) => device.write(range.start, bytes)?,
            }
        }
        device.flush()?;
        match &self.header {
            Header::Luks1(header) => store::replace_luks1(device, header),
            Header::Luks2(loaded) => {
                for copy in order {
                    device.write(loaded.header.offset(copy), &loaded.header.to_bytes(copy)?)?;
                    device.flush()?;
                }
                Ok(())
            }
        }
    }

    /// All bytes from 0 to the start of the data (detached: to the end of the header), for a sink that is written in order: calls
    /// `put` with consecutive pieces.
    ///
    /// # Errors
    /// Of `put`.
    pub fn stream(&self, put: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        match &self.header {
            Header::Luks1(header) => put(&header.to_bytes())?,
            Header::Luks2(loaded) => {
                put(&loaded.header.to_bytes(Copy::Primary)?)?;
                put(&loaded.header.to_bytes(Copy::Secondary)?)?;
            }
        }
        let mut noise = random::Noise::new()?;
        let zeros = vec![0; PIECE];
        for (range, content) in self.behind_the_header(self.stream_bytes) {
            let mut left = range.end - range.start;
            while left > 0 {
                let piece = match content {
                    Content::Bytes(bytes) => bytes,
                    Content::Random => noise.next(left),
                    Content::Zeros => &zeros[..usize::try_from(left).unwrap_or(PIECE).min(PIECE)],
                };
                put(piece)?;
                left -= piece.len() as u64;
            }
        }
        Ok(())
    }

    /// What lies between the header itself and `end`: without a gap, in order.
    fn behind_the_header(&self, end: u64) -> Vec<(Range<u64>, Content<'_>)> {
        let (start, areas): (u64, Vec<Range<u64>>) = match &self.header {
            Header::Luks1(header) => {
                let each = keyslot_area_bytes(header.key_bytes);
                let areas = header.keyslots.iter().map(|keyslot| {
                    let offset = keyslot.material_offset();
                    offset..offset + each
                });
                (luks1::HEADER_BYTES as u64, areas.collect())
            }
            Header::Luks2(loaded) => {
                let start = loaded.header.keyslots_offset();
                let area = start..loaded.header.backup_bytes();
                (start, std::iter::once(area).collect())
            }
        };
        let (offset, material) = &self.material;
        let material_end = offset + material.len() as u64;
        let mut parts = Vec::new();
        let mut at = start;
        for area in areas {
            parts.push((at..area.start, Content::Zeros));
            if area.contains(offset) {
                parts.push((area.start..*offset, Content::Random));
                parts.push((*offset..material_end, Content::Bytes(material)));
                parts.push((material_end..area.end, Content::Random));
            } else {
                parts.push((area.clone(), Content::Random));
            }
            at = area.end;
        }
        parts.push((at..end.max(at), Content::Zeros));
        parts.retain(|(range, _)| range.start < range.end);
        parts
    }
}
