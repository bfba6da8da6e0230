//! Which passphrase opens which keyslot, and the keyslots that take their places.

use proto::luks::KdfKind;

use super::Wish;
use crate::backend::blocking::Blocking;
use crate::crypto::Secret;
use crate::crypto::hash::Hash;
use crate::crypto::kdf::{Argon2Kind, Kdf};
use crate::crypto::spec::CipherSpec;
use crate::error::{Error, ErrorKind, Result};
use crate::format::luks2::metadata::{Area, Digest, Keyslot, Luks2Keyslot};
use crate::format::luks2::reencrypt::write;
use crate::format::luks2::{Header as Luks2Header, Loaded};
use crate::volume::Header;
use crate::volume::area::Wrapping;
use crate::volume::create::random_salt;
use crate::volume::keyslots::{GiveUp, stop};
use crate::volume::unlock::{self, WRONG_KEY};

/// Cipher of the areas of new keyslots where the old one's is not for new ones.
const AREA_CIPHER: (&str, u32) = ("aes-xts-plain64", 64);

/// A keyslot of the old key whose passphrase is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Covered {
    /// Its number.
    pub id: u32,
    /// Which of the passphrases.
    pub key: usize,
}

/// What the passphrases open.
#[derive(Debug)]
pub struct Found {
    /// The volume key.
    pub key: Secret,
    /// Keyslots that they open.
    pub covered: Vec<Covered>,
    /// Keyslots that they do not.
    pub uncovered: Vec<u32>,
}

/// Try every passphrase on every keyslot of `digest` that none before it opened.
///
/// # Errors
/// `WrongKey`: a passphrase opens none. `Unsupported`, `Limit`: a keyslot cannot be tried, and no passphrase opened another.
pub fn find(
    device: &mut Blocking,
    loaded: &Loaded,
    digest: u32,
    keys: &[Secret],
    give_up: GiveUp<'_>,
) -> Result<Found> {
    let metadata = &loaded.header.metadata;
    let header = Header::Luks2(Box::new(loaded.clone()));
    let bound = metadata.digests.get(&digest).map_or(&[][..], |digest| &digest.keyslots);
    let mut opened: Option<Secret> = None;
    let mut covered: Vec<Covered> = Vec::new();
    let mut impossible: Option<Error> = None;
    for (index, key) in keys.iter().enumerate() {
        for id in bound {
            if covered.iter().any(|one| one.id == *id) {
                continue;
            }
            stop(give_up)?;
            match unlock::keyslot_unless(device, &header, *id, key, give_up) {
                Ok(unlocked) => {
                    opened.get_or_insert(unlocked.key);
                    covered.push(Covered { id: *id, key: index });
                }
                Err(error) => match error.kind() {
                    ErrorKind::WrongKey => {}
                    ErrorKind::Unsupported | ErrorKind::Limit => impossible = Some(error),
                    _ => return Err(error),
                },
            }
        }
        // A second passphrase of the same words is none too many.
        let known = keys[..index].iter().any(|before| before == key);
        if !known && !covered.iter().any(|one| one.key == index) {
            return Err(impossible.unwrap_or_else(|| {
                let error = Error::new(ErrorKind::WrongKey, WRONG_KEY);
                if keys.len() == 1 {
                    error
                } else {
                    error.hint(format!("of the {} passphrases it is number {}", keys.len(), index + 1))
                }
            }));
        }
    }
    let Some(key) = opened else {
        return Err(Error::new(ErrorKind::Invalid, "no passphrase of the volume was given").at(device.name()));
    };
    covered.sort_by_key(|one| one.id);
    let uncovered = bound.iter().copied().filter(|id| !covered.iter().any(|one| one.id == *id)).collect();
    Ok(Found { key, covered, uncovered })
}

/// Keyslots would be lost, and nobody said that they may.
pub fn refuse_loss(uncovered: &[u32], name: &str) -> Error {
    let (slots, verb) =
        if uncovered.len() == 1 { ("keyslot", "its passphrase") } else { ("keyslots", "their passphrases") };
    let listed = uncovered.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
    let what = format!("{slots} {listed} would be lost: no passphrase given opens them");
    Error::new(ErrorKind::Conflict, what)
        .at(name)
        .hint(format!("give {verb} too (a --key each), or say that they may go (--drop-slots)"))
}

/// A keyslot to be made.
pub struct New<'a> {
    /// The one it takes the place of.
    pub old: u32,
    /// What opens it.
    pub passphrase: &'a Secret,
    /// It is what opened the old one.
    pub same: bool,
}

/// The key derivations of new keyslots, in the order of these: that of the old one, unless the wish has another.
///
/// # Errors
/// Of the measurement.
pub fn derivations(
    loaded: &Loaded,
    new: &[New<'_>],
    wish: &Wish<'_>,
    hash: Hash,
    give_up: GiveUp<'_>,
) -> Result<Vec<Kdf>> {
    let measured = wish
        .luks
        .kdf
        .as_ref()
        .map(|kdf| Kdf::calibrate(kdf, KdfKind::Argon2id, hash, AREA_CIPHER.1 as usize, give_up));
    if let Some(measured) = measured.transpose()? {
        return Ok(vec![measured; new.len()]);
    }
    new.iter().map(|one| old_slot(loaded, one.old)?.kdf.known()).collect()
}

/// As [`derivations`], without measuring: as long in the metadata as any.
pub fn nominal_derivations(
    loaded: &Loaded,
    new: &[New<'_>],
    wish: &Wish<'_>,
    hash: Hash,
) -> Result<Vec<Kdf>> {
    if let Some(kdf) = &wish.luks.kdf {
        Kdf::check_wish(kdf, KdfKind::Argon2id, hash)?;
        let nominal = match kdf.kind {
            Some(KdfKind::Pbkdf2) => Kdf::Pbkdf2 { hash, iterations: u32::MAX },
            _ => Kdf::Argon2 { kind: Argon2Kind::Argon2id, time: 100, memory_kib: 4 << 20, lanes: 4 },
        };
        return Ok(vec![nominal; new.len()]);
    }
    new.iter().map(|one| old_slot(loaded, one.old)?.kdf.known()).collect()
}

fn old_slot(loaded: &Loaded, id: u32) -> Result<&Luks2Keyslot> {
    match loaded.header.metadata.keyslots.get(&id) {
        Some(Keyslot::Luks2(keyslot)) => Ok(keyslot),
        _ => Err(Error::new(ErrorKind::Internal, format!("keyslot {id} vanished"))),
    }
}

/// A keyslot in the header, whose material is still to be made.
pub struct Placed {
    /// Where its material goes.
    pub area: Area,
    kdf: Kdf,
    salt: [u8; 32],
    cipher: CipherSpec,
    area_key_bytes: u32,
    hash: Hash,
}

/// Add the new key's digest and keyslots, and the keyslots to the tokens of those whose passphrase they keep. The digest's number.
///
/// # Errors
/// `NoSpace`: no number or no place is free.
pub fn place(
    loaded: &Loaded,
    header: &mut Luks2Header,
    key_bytes: u32,
    digest: Digest,
    new: &[New<'_>],
    derivations: &[Kdf],
) -> Result<(u32, Vec<Placed>)> {
    let hash = Hash::from_name(&digest.hash)?;
    let digest = header.metadata.add_digest(digest, &[], &[])?;
    let mut placed = Vec::new();
    for (one, kdf) in new.iter().zip(derivations) {
        let old = old_slot(loaded, one.old)?;
        let by_old = CipherSpec::parse(&old.area_encryption).ok().filter(|spec| spec.is_for_new());
        let (cipher, area_key_bytes) = match by_old {
            Some(spec) => (spec, old.area_key_size),
            None => (CipherSpec::parse(AREA_CIPHER.0)?, AREA_CIPHER.1),
        };
        let area = header.free_keyslot_area(key_bytes)?;
        let salt = random_salt()?;
        let keyslot = Luks2Keyslot {
            priority: old.priority,
            ..Luks2Keyslot::new(key_bytes, area, (cipher.name(), area_key_bytes), hash.name(), *kdf, salt)
        };
        let id = header.metadata.free_keyslot()?;
        header.metadata.add_keyslot(id, keyslot, digest)?;
        if one.same {
            write::carry_tokens(&mut header.metadata, one.old, id);
        }
        placed.push(Placed { area, kdf: *kdf, salt, cipher, area_key_bytes, hash });
    }
    Ok((digest, placed))
}

impl Placed {
    /// The material of `key` under `passphrase`. Takes as long as the key derivation.
    ///
    /// # Errors
    /// Of the derivation; `Cancelled`.
    pub fn material(&self, passphrase: &Secret, key: &Secret, give_up: GiveUp<'_>) -> Result<Vec<u8>> {
        stop(give_up)?;
        let wrapping = Wrapping {
            kdf: self.kdf,
            salt: &self.salt,
            cipher: self.cipher,
            area_key_bytes: self.area_key_bytes as usize,
            af_hash: self.hash,
        };
        wrapping.wrap_unless(passphrase, key, give_up)
    }
}
