//! A keyslot made in memory and written, and one destroyed: the halves that every change is made of, in the orders of the
//! module above.

use proto::luks::{KdfKind, KdfWish};

use super::{GiveUp, stop};
use crate::backend::blocking::Blocking;
use crate::crypto::Secret;
use crate::crypto::hash::Hash;
use crate::crypto::kdf::Kdf;
use crate::crypto::spec::CipherSpec;
use crate::error::{Error, ErrorKind, Result};
use crate::format::luks2::Loaded;
use crate::format::luks2::metadata::{Keyslot, Luks2Keyslot};
use crate::format::{af, luks1};
use crate::volume::area::Wrapping;
use crate::volume::{Header, random, store};

/// Cipher of the areas of new LUKS2 keyslots, as cryptsetup's default, and its key.
const AREA_CIPHER: &str = "aes-xts-plain64";
const AREA_KEY_BYTES: u32 = 64;
/// Salt of a new keyslot, bytes.
const SALT_BYTES: usize = 32;

/// A keyslot to be made.
pub(super) struct Addition<'a> {
    /// Its number.
    pub place: u32,
    /// The digest that checks its key.
    pub digest: u32,
    /// Its priority.
    pub priority: u32,
    /// What its KDF shall cost.
    pub wish: &'a KdfWish,
    /// Asked between slow steps.
    pub give_up: GiveUp<'a>,
}

impl Addition<'_> {
    /// All that takes time, and no write. `name`: of the device.
    pub(super) fn make(&self, name: &str, header: &Header, key: &Secret, new: &Secret) -> Result<Made> {
        stop(self.give_up)?;
        match header {
            Header::Luks1(header) => self.to_luks1(name, header, key, new),
            Header::Luks2(loaded) => self.to_luks2(loaded, key, new),
        }
    }

    fn to_luks1(&self, name: &str, header: &luks1::Header, key: &Secret, new: &Secret) -> Result<Made> {
        let hash = Hash::from_name(&header.hash)?;
        check_luks1_wish(self.wish, hash)?;
        let cipher = CipherSpec::parse(&header.cipher())?;
        if !cipher.is_for_new() {
            // In LUKS1 the cipher of the data is that of the keyslots too.
            let what = format!("no new keyslots are made with {}, which is only read", cipher.name());
            return Err(Error::new(ErrorKind::Unsupported, what).at(name));
        }
        let kdf = Kdf::calibrate(self.wish, KdfKind::Pbkdf2, hash, key.len(), self.give_up)?;
        let Kdf::Pbkdf2 { iterations, .. } = kdf else {
            return Err(Error::new(ErrorKind::Internal, "LUKS1 has no KDF but pbkdf2"));
        };
        stop(self.give_up)?;
        let mut salt = [0; SALT_BYTES];
        random::fill(&mut salt)?;
        let wrapping = Wrapping { kdf, salt: &salt, cipher, area_key_bytes: key.len(), af_hash: hash };
        let material = wrapping.wrap_unless(new, key, self.give_up)?;
        let mut after = header.clone();
        let slot = &mut after.keyslots[self.place as usize];
        *slot = luks1::Keyslot { active: true, iterations, salt, stripes: af::STRIPES, ..*slot };
        stop(self.give_up)?;
        Ok(Made { offset: slot.material_offset(), material, after: Header::Luks1(Box::new(after)) })
    }

    fn to_luks2(&self, loaded: &Loaded, key: &Secret, new: &Secret) -> Result<Made> {
        let key_size = u32::try_from(key.len()).unwrap_or(u32::MAX);
        let area = loaded.header.free_keyslot_area(key_size)?;
        let hash = Hash::from_name(&loaded.header.metadata.digests[&self.digest].hash)?;
        let kdf = Kdf::calibrate(self.wish, KdfKind::Argon2id, hash, AREA_KEY_BYTES as usize, self.give_up)?;
        stop(self.give_up)?;
        let mut salt = [0; SALT_BYTES];
        random::fill(&mut salt)?;
        let cipher = (AREA_CIPHER, AREA_KEY_BYTES);
        let keyslot = Luks2Keyslot {
            priority: self.priority,
            ..Luks2Keyslot::new(key_size, area, cipher, hash.name(), kdf, salt)
        };
        let mut next = loaded.clone();
        next.header.metadata.add_keyslot(self.place, keyslot, self.digest)?;
        // A header that would not fit is refused before anything is written, and before the seconds of the KDF.
        next.header.check()?;
        let wrapping = Wrapping {
            kdf,
            salt: &salt,
            cipher: CipherSpec::parse(AREA_CIPHER)?,
            area_key_bytes: AREA_KEY_BYTES as usize,
            af_hash: hash,
        };
        let material = wrapping.wrap_unless(new, key, self.give_up)?;
        stop(self.give_up)?;
        Ok(Made { offset: area.offset, material, after: Header::Luks2(Box::new(next)) })
    }
}

/// A keyslot in memory.
pub(super) struct Made {
    /// Where its material goes.
    offset: u64,
    material: Vec<u8>,
    /// The header with it.
    after: Header,
}

impl Made {
    /// Material, flush, header, over `header`, which is what is on disk afterwards. Under the exclusive lock.
    pub(super) fn write(self, device: &mut Blocking, header: &mut Header) -> Result<()> {
        // 1. and 2.
        store::write_material(device, header, self.offset, &self.material)?;
        // 3.
        *header = store::write_behind_material(device, header, self.after)?;
        Ok(())
    }
}

fn check_luks1_wish(wish: &KdfWish, hash: Hash) -> Result<()> {
    if wish.kind.is_some_and(|kind| kind != KdfKind::Pbkdf2) {
        return Err(Error::new(ErrorKind::Invalid, "LUKS1 has no KDF but pbkdf2"));
    }
    match &wish.hash {
        Some(name) if Hash::from_name(name)? != hash => {
            let what = format!("the hash of this LUKS1 volume is {}, for every keyslot", hash.name());
            Err(Error::new(ErrorKind::Invalid, what))
        }
        _ => Ok(()),
    }
}

/// Out of use, with nothing left in it but its place.
pub(super) fn clear_luks1(keyslot: &mut luks1::Keyslot) {
    *keyslot = luks1::Keyslot { active: false, iterations: 0, salt: [0; SALT_BYTES], ..*keyslot };
}

/// Overwrite the material, flush, take the keyslot out of the header. Under the exclusive lock. `successor`: a keyslot that
/// takes its number in LUKS2.
pub(super) fn destroy(
    device: &mut Blocking,
    header: &mut Header,
    id: u32,
    successor: Option<u32>,
) -> Result<()> {
    let (offset, bytes, after) = match &*header {
        Header::Luks1(before) => {
            let mut after = before.clone();
            let slot = &mut after.keyslots[id as usize];
            clear_luks1(slot);
            (slot.material_offset(), before.material_bytes(), Header::Luks1(after))
        }
        Header::Luks2(loaded) => {
            let mut next = loaded.clone();
            let metadata = &mut next.header.metadata;
            let Some(Keyslot::Luks2(Luks2Keyslot { area, .. })) = metadata.keyslots.get(&id) else {
                return Err(Error::new(ErrorKind::Internal, format!("keyslot {id} vanished")));
            };
            let area = *area;
            match successor.and_then(|successor| Some((successor, metadata.keyslots.remove(&successor)?))) {
                Some((successor, keyslot)) => {
                    metadata.keyslots.insert(id, keyslot);
                    for digest in metadata.digests.values_mut() {
                        digest.keyslots.retain(|bound| *bound != successor);
                    }
                }
                None => drop(metadata.remove_keyslot(id)),
            }
            next.header.check()?;
            (area.offset, area.size, Header::Luks2(next))
        }
    };
    // 1. and 2.
    store::destroy_material(device, header, offset, bytes)?;
    // 3.
    *header = store::write_behind_material(device, header, after)?;
    Ok(())
}
