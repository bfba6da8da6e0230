//! From a passphrase to the volume key.
//!
//! A keyslot is tried by one path, whatever is in it: KDF, area, unwrapping, digest. An area that cannot be read counts as
//! zeros and a digest that cannot match as one that does not, so a wrong passphrase and a damaged keyslot do the same work and
//! say the same. What the *header* says may differ in the answer, for it is no secret: an unknown KDF or cipher, a cost this
//! machine cannot pay.
//!
//! Who cancels is heard between attempts and while an attempt waits for another's memory-hard derivation, within a fraction of a
//! second. A derivation that runs is not interrupted: it goes on to its end, [`crate::crypto::kdf::DERIVATION_MAX`] by estimate at the
//! most, and the thread of its job ends after it.
//!
//! Refused here: keyslots whose key is not that of all encrypted data (`unbound` ones), areas under the null cipher (which no
//! passphrase protects; [`CipherSpec::parse`] does not know it), headers whose data areas have different keys.

use crate::backend::blocking::Blocking;
use crate::crypto::hash::{HASH_BYTES_MAX, Hash};
use crate::crypto::kdf::Kdf;
use crate::crypto::spec::CipherSpec;
use crate::crypto::{Secret, bytes_equal};
use crate::error::{Error, ErrorKind, Result};
use crate::format::af::STRIPES;
use crate::format::luks2::metadata::{Digest, Keyslot, Metadata, SegmentKind};
use crate::format::{luks1, luks2};
use crate::volume::area::{Wrapping, material_bytes};
use crate::volume::{Header, store};

/// An open volume.
#[derive(Debug)]
pub struct Unlocked {
    /// The keyslot that opened; `None`: the volume key itself was given.
    pub keyslot: Option<u32>,
    /// The volume key.
    pub key: Secret,
}

/// What a wrong passphrase and a damaged keyslot both are.
pub const WRONG_KEY: &str = "wrong key or damaged data";

/// Longest key a keyslot may hold, bytes: cryptsetup's own bound is below it, and so material stays below 2.5 MB.
const KEY_BYTES_MAX: usize = 512;
/// Shortest digest that is one, bytes: that of LUKS1 headers.
const DIGEST_BYTES_MIN: usize = 20;

/// Try `secret` on the keyslots (or on `only` that one), the preferred ones first. `give_up` is asked between attempts, and
/// while one waits for the derivation of another. The caller holds no lock of the device's descriptor: each area is read
/// under one.
///
/// # Errors
/// `WrongKey`: [`WRONG_KEY`], whatever the reason; `NotFound`: the keyslot asked for is not in use or does not open the data, or
/// none does; `Unsupported`: no keyslot is of a kind this build knows (the first is named); `Limit`: a keyslot needs more
/// memory or time than there is, and no other opened; `Cancelled`.
pub fn with_passphrase(
    device: &mut Blocking,
    header: &Header,
    secret: &Secret,
    only: Option<u32>,
    give_up: &dyn Fn() -> bool,
) -> Result<Unlocked> {
    let candidates = match only {
        Some(id) => vec![named(header, id)?],
        None => candidates(header)?,
    };
    let mut wrong = false;
    let mut impossible: Option<Error> = None;
    for id in candidates {
        if give_up() {
            return Err(Error::new(ErrorKind::Cancelled, "cancelled while the keyslots were tried"));
        }
        match try_keyslot(device, header, id, secret, give_up) {
            Ok(Some(key)) => return Ok(Unlocked { keyslot: Some(id), key }),
            Ok(None) => wrong = true,
            Err(error) if matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::Limit) => {
                // The first, unless a later one says that more of this machine would do.
                if impossible.is_none() || error.kind() == ErrorKind::Limit {
                    impossible = Some(error);
                }
            }
            Err(error) => return Err(error),
        }
    }
    Err(match impossible {
        Some(error) if !wrong || error.kind() == ErrorKind::Limit => error,
        Some(error) => wrong_key().hint(format!("a keyslot was not tried: {}", error.chain())),
        None => wrong_key(),
    })
}

/// Open one keyslot, whether or not its key is that of the data: for changes of the keyslot itself.
///
/// # Errors
/// As [`with_passphrase`].
pub fn keyslot(device: &mut Blocking, header: &Header, id: u32, secret: &Secret) -> Result<Unlocked> {
    keyslot_unless(device, header, id, secret, &|| false)
}

/// [`keyslot`], asking `give_up` while the derivation waits for another.
///
/// # Errors
/// As [`keyslot`].
pub fn keyslot_unless(
    device: &mut Blocking,
    header: &Header,
    id: u32,
    secret: &Secret,
    give_up: &dyn Fn() -> bool,
) -> Result<Unlocked> {
    check_in_use(header, id)?;
    match try_keyslot(device, header, id, secret, give_up)? {
        Some(key) => Ok(Unlocked { keyslot: Some(id), key }),
        None => Err(wrong_key()),
    }
}

/// Is this the volume key? Checked against the digest of the data area.
///
/// # Errors
/// `WrongKey`; `Unsupported`: a digest this build does not know.
pub fn with_volume_key(header: &Header, key: Secret) -> Result<Unlocked> {
    let fits = match header {
        Header::Luks1(header) => {
            key.len() == header.key_bytes as usize && Check::of_luks1(header)?.is_met_by(&key)?
        }
        Header::Luks2(loaded) => {
            let metadata = &loaded.header.metadata;
            let mut fits = true;
            for segment in encrypted_segments(metadata)? {
                fits &= fits_cipher(metadata, segment, &key);
                fits &= match metadata.digest_of_segment(segment) {
                    Some((_, digest)) => Check::of_digest(digest)?.is_met_by(&key)?,
                    None => false,
                };
            }
            fits
        }
    };
    if fits { Ok(Unlocked { keyslot: None, key }) } else { Err(wrong_key()) }
}

/// Is this what the digest was made of? For what is no volume key.
///
/// # Errors
/// `Unsupported`: a digest this build does not know; `Limit`: one that would take too long.
pub fn meets(digest: &Digest, secret: &Secret) -> Result<bool> {
    Check::of_digest(digest)?.is_met_by(secret)
}

fn wrong_key() -> Error {
    Error::new(ErrorKind::WrongKey, WRONG_KEY)
}

// ---- which keyslots

/// Keyslots to try, the preferred ones first, then by number.
fn candidates(header: &Header) -> Result<Vec<u32>> {
    let mut found: Vec<(u32, u32)> = match header {
        Header::Luks1(header) => {
            (0..).zip(&header.keyslots).filter(|(_, keyslot)| keyslot.active).map(|(id, _)| (1, id)).collect()
        }
        Header::Luks2(loaded) => {
            let metadata = &loaded.header.metadata;
            let segments = encrypted_segments(metadata)?;
            metadata
                .keyslots
                .iter()
                .filter(|(id, _)| opens(metadata, **id, &segments))
                .filter_map(|(id, keyslot)| match keyslot {
                    Keyslot::Luks2(keyslot) if keyslot.priority > 0 => Some((keyslot.priority, *id)),
                    Keyslot::Unknown { .. } => Some((1, *id)),
                    _ => None,
                })
                .collect()
        }
    };
    if found.is_empty() {
        return Err(Error::new(ErrorKind::NotFound, "no keyslot opens the volume").hint(
            "keyslots with priority \"ignore\" are tried only when named; without any, the volume key or a header backup is needed",
        ));
    }
    found.sort_by_key(|(priority, id)| (std::cmp::Reverse(*priority), *id));
    Ok(found.into_iter().map(|(_, id)| id).collect())
}

/// The keyslot the user named, if it can open the data.
fn named(header: &Header, id: u32) -> Result<u32> {
    check_in_use(header, id)?;
    if let Header::Luks2(loaded) = header {
        let metadata = &loaded.header.metadata;
        if !opens(metadata, id, &encrypted_segments(metadata)?) {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("keyslot {id} does not open the data: it is not bound to it"),
            ));
        }
    }
    Ok(id)
}

fn check_in_use(header: &Header, id: u32) -> Result<()> {
    let in_use = match header {
        Header::Luks1(header) => usize::try_from(id)
            .ok()
            .and_then(|id| header.keyslots.get(id))
            .is_some_and(|keyslot| keyslot.active),
        Header::Luks2(loaded) => loaded.header.metadata.keyslots.contains_key(&id),
    };
    if in_use { Ok(()) } else { Err(Error::new(ErrorKind::NotFound, format!("keyslot {id} is not in use"))) }
}

/// The data segments that have a key.
///
/// # Errors
/// `Unsupported`: there is none, or no key is that of all.
fn encrypted_segments(metadata: &Metadata) -> Result<Vec<u32>> {
    let segments: Vec<u32> = metadata
        .data_segments()
        .filter(|(_, segment)| matches!(segment.kind, SegmentKind::Crypt { .. }))
        .map(|(id, _)| id)
        .collect();
    if segments.is_empty() {
        return Err(Error::new(ErrorKind::Unsupported, "the header has no encrypted data area"));
    }
    if !metadata.digests.values().any(|digest| covers(digest, &segments)) {
        return Err(Error::new(ErrorKind::Unsupported, "the data areas of the volume have different keys"));
    }
    Ok(segments)
}

fn covers(digest: &Digest, segments: &[u32]) -> bool {
    segments.iter().all(|segment| digest.segments.contains(segment))
}

/// Is the keyslot's key that of all these segments, by the digest that checks it?
fn opens(metadata: &Metadata, keyslot: u32, segments: &[u32]) -> bool {
    metadata.digest_of_keyslot(keyslot).is_some_and(|(_, digest)| covers(digest, segments))
}

/// Is the key as long as the segment's cipher and its keyslots want it? Lengths are in the header, so this is no oracle.
fn fits_cipher(metadata: &Metadata, segment: u32, key: &Secret) -> bool {
    let Some(segment_object) = metadata.segments.get(&segment) else { return false };
    let SegmentKind::Crypt { encryption, .. } = &segment_object.kind else { return false };
    let by_cipher = CipherSpec::parse(encryption).is_ok_and(|spec| spec.check_key_bytes(key.len()).is_ok());
    let by_keyslots = crate::volume::key_bytes_of_segment(metadata, segment);
    by_cipher && by_keyslots.is_none_or(|bytes| bytes as usize == key.len())
}

// ---- one keyslot

/// What it takes to open a keyslot.
struct Attempt<'a> {
    wrapping: Wrapping<'a>,
    key_bytes: usize,
    /// First byte of the material.
    offset: u64,
    check: Check<'a>,
}

/// The key of a keyslot, or `None` when passphrase or keyslot are not right.
fn try_keyslot(
    device: &mut Blocking,
    header: &Header,
    id: u32,
    secret: &Secret,
    give_up: &dyn Fn() -> bool,
) -> Result<Option<Secret>> {
    let attempt = match header {
        Header::Luks1(header) => Attempt::luks1(header, id),
        Header::Luks2(loaded) => Attempt::luks2(&loaded.header, id),
    };
    let opened =
        attempt.and_then(|attempt| attempt.map_or(Ok(None), |attempt| attempt.run(device, secret, give_up)));
    match opened {
        Ok(key) => Ok(key),
        Err(error) if error.kind() == ErrorKind::Unsupported => {
            Err(Error::new(ErrorKind::Unsupported, format!("keyslot {id} cannot be used")).because(error))
        }
        Err(error) if error.kind() == ErrorKind::Limit => Err(Error::new(
            ErrorKind::Limit,
            format!("keyslot {id} cannot be tried here"),
        )
        .hint("open the volume on a larger machine, and give the keyslot a cheaper key derivation there")
        .because(error)),
        // Parameters outside the bounds of the format: damage.
        Err(error) if error.kind() == ErrorKind::Invalid => Ok(None),
        Err(error) => Err(error),
    }
}

impl<'a> Attempt<'a> {
    /// `None`: a keyslot that cannot be right.
    fn luks1(header: &'a luks1::Header, id: u32) -> Result<Option<Self>> {
        let Some(keyslot) = usize::try_from(id).ok().and_then(|id| header.keyslots.get(id)) else {
            return Ok(None);
        };
        let hash = Hash::from_name(&header.hash)?;
        let key_bytes = header.key_bytes as usize;
        let cipher = CipherSpec::parse(&header.cipher())?;
        if keyslot.stripes != STRIPES || key_bytes > KEY_BYTES_MAX {
            return Ok(None);
        }
        let kdf = Kdf::Pbkdf2 { hash, iterations: keyslot.iterations };
        let wrapping =
            Wrapping { kdf, salt: &keyslot.salt, cipher, area_key_bytes: key_bytes, af_hash: hash };
        let check = Check::of_luks1(header)?;
        Ok(Some(Self { wrapping, key_bytes, offset: keyslot.material_offset(), check }))
    }

    /// `None`: a keyslot that cannot be right.
    fn luks2(header: &'a luks2::Header, id: u32) -> Result<Option<Self>> {
        let metadata = &header.metadata;
        let keyslot = match metadata.keyslots.get(&id) {
            Some(Keyslot::Luks2(keyslot)) => keyslot,
            Some(Keyslot::Reencrypt { .. }) => {
                return Err(Error::new(ErrorKind::Unsupported, "a re-encryption's keyslot holds no key"));
            }
            Some(Keyslot::Unknown { kind, .. }) => {
                return Err(Error::new(ErrorKind::Unsupported, format!("unknown keyslot type {kind}")));
            }
            None => return Ok(None),
        };
        let wrapping = Wrapping {
            kdf: keyslot.kdf.known()?,
            salt: &keyslot.salt,
            cipher: CipherSpec::parse(&keyslot.area_encryption)?,
            area_key_bytes: keyslot.area_key_size as usize,
            af_hash: Hash::from_name(&keyslot.af_hash)?,
        };
        let Some((_, digest)) = metadata.digest_of_keyslot(id) else { return Ok(None) };
        let check = Check::of_digest(digest)?;
        let key_bytes = keyslot.key_size as usize;
        let fits = (1..=KEY_BYTES_MAX).contains(&key_bytes)
            && u64::try_from(material_bytes(key_bytes)).is_ok_and(|bytes| bytes <= keyslot.area.size)
            && keyslot.af_stripes == STRIPES;
        // A key of a length the data's cipher does not take is not the data's key, whatever the digest says.
        let wanted = digest.segments.iter().filter_map(|id| metadata.segments.get(id)).all(|segment| {
            match &segment.kind {
                SegmentKind::Crypt { encryption, .. } => {
                    CipherSpec::parse(encryption).is_ok_and(|spec| spec.check_key_bytes(key_bytes).is_ok())
                }
                _ => true,
            }
        });
        if !fits || !wanted {
            return Ok(None);
        }
        Ok(Some(Self { wrapping, key_bytes, offset: keyslot.area.offset, check }))
    }

    fn run(
        &self,
        device: &mut Blocking,
        secret: &Secret,
        give_up: &dyn Fn() -> bool,
    ) -> Result<Option<Secret>> {
        self.wrapping.cipher.check_key_bytes(self.wrapping.area_key_bytes)?;
        self.wrapping.kdf.payable(self.wrapping.area_key_bytes)?;
        let mut material = vec![0; material_bytes(self.key_bytes)];
        // Locked as the header was, and no longer than this: not while keys are derived.
        let held = store::lock_device(device, false)?;
        let read = device.read(self.offset, &mut material);
        drop(held);
        if let Err(error) = read {
            tracing::debug!("keyslot material cannot be read: {}", error.chain());
            material.fill(0);
        }
        let key = self.wrapping.unwrap_unless(secret, &mut material, self.key_bytes, give_up)?;
        Ok(if self.check.is_met_by(&key)? { Some(key) } else { None })
    }
}

/// A digest to compare a key with.
struct Check<'a> {
    hash: Hash,
    iterations: u32,
    salt: &'a [u8],
    digest: &'a [u8],
}

impl<'a> Check<'a> {
    fn of_luks1(header: &'a luks1::Header) -> Result<Self> {
        let hash = Hash::from_name(&header.hash)?;
        Ok(Self {
            hash,
            iterations: header.digest_iterations,
            salt: &header.digest_salt,
            digest: &header.digest,
        })
    }

    fn of_digest(digest: &'a Digest) -> Result<Self> {
        if digest.kind != "pbkdf2" {
            return Err(Error::new(ErrorKind::Unsupported, format!("unknown digest type {}", digest.kind)));
        }
        let hash = Hash::from_name(&digest.hash)?;
        Ok(Self { hash, iterations: digest.iterations, salt: &digest.salt, digest: &digest.digest })
    }

    /// Does the key have this digest? A digest too short to mean anything, or too long to be one, is nobody's.
    fn is_met_by(&self, key: &Secret) -> Result<bool> {
        if !(DIGEST_BYTES_MIN..=HASH_BYTES_MAX).contains(&self.digest.len()) {
            return Ok(false);
        }
        let kdf = Kdf::Pbkdf2 { hash: self.hash, iterations: self.iterations };
        kdf.payable(self.digest.len())?;
        let mut made = [0; HASH_BYTES_MAX];
        let made = &mut made[..self.digest.len()];
        kdf.derive(key.as_bytes(), self.salt, made)?;
        Ok(bytes_equal(made, self.digest))
    }
}
