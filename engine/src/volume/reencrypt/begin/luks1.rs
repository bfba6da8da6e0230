//! A LUKS1 header becomes a LUKS2 one: the same UUID, volume key, passphrases and data; only LUKS2 has a place for the progress of a re-encryption.
//!
//! Keyslot material is the same in both versions, so it stays where it is and no passphrase is needed. Only keyslot 0 must move: its
//! material begins at byte 4096, and the two copies of a LUKS2 header take the first 32 KiB. It changes places with one that is not
//! in use (LUKS1 has a field for the place of each).
//!
//! # Write order
//! | | written | and then, flushed |
//! |---|---|---|
//! | 1 | keyslot 0's material, to the place of an unused one | as before |
//! | 2 | sector 0 of the LUKS1 header: the two change places | LUKS1 still; its bytes up to 32 KiB are free |
//! | 3 | the second copy of the LUKS2 header, at byte 16384 | LUKS1 still |
//! | 4 | sector 0 of the first copy | LUKS2, by its second copy: the first fails its checksum |
//! | 5 | the rest of the first copy | LUKS2 |
//!
//! What is left of keyslot 0's material in its first place is overwritten next: the places of keyslots not in use are in a note of the new
//! header ([`luks::NOTE`]).
//!
//! Sector 0, written whole or not at all, is what decides; so at every instant it is a whole volume of one version or the other. Cut off before 4,
//! the next attempt does the same again; cut off after it, there is a LUKS2 volume whose damaged copy the next header write heals.

use super::super::luks;
use super::super::shift::SECTOR;
use crate::backend::blocking::Blocking;
use crate::error::{Error, ErrorKind, Result};
use crate::format::luks1;
use crate::format::luks2::edit::{COPY_BYTES_DEFAULT, keyslot_area_bytes};
use crate::format::luks2::metadata::{Area, Digest, KdfText, Keyslot, Luks2Keyslot, Segment};
use crate::format::luks2::validate::AREA_ALIGN;
use crate::format::luks2::{Copy, Header as Luks2Header, Health, Loaded};
use crate::volume::create::random_salt;
use crate::volume::{Header, LUKS1_UNIT_BYTES, store};

/// Both copies: what must be free of material.
const COPIES_BYTES: u64 = 2 * COPY_BYTES_DEFAULT;
/// Header and keyslots area of a detached one, bytes; a LUKS1 header takes 2 MiB at most.
const DETACHED_BYTES: u64 = 4 << 20;
/// Keyslots whose record lies in sector 0 as a whole.
const IN_SECTOR_0: usize = 6;

/// The unused keyslot with which one changes places whose material is in the way; `None`: none is.
fn exchange(header: &luks1::Header) -> Result<Option<(usize, usize)>> {
    let in_the_way = |slot: &luks1::Keyslot| slot.active && slot.material_offset() < COPIES_BYTES;
    let mut found = (0..).zip(&header.keyslots).filter(|(_, slot)| in_the_way(slot));
    let Some((from, _)) = found.next() else { return Ok(None) };
    let to = (0..IN_SECTOR_0).find(|id| {
        let slot = &header.keyslots[*id];
        !slot.active && slot.material_offset() >= COPIES_BYTES
    });
    match to {
        Some(to) if found.next().is_none() && from < IN_SECTOR_0 => Ok(Some((from, to))),
        _ => Err(no_room("no keyslot of 0 to 5 is free, and one must move out of the way of the new header")),
    }
}

fn no_room(why: &str) -> Error {
    Error::new(
        ErrorKind::NoSpace,
        format!("the LUKS1 header cannot become a LUKS2 one, which a re-encryption needs: {why}"),
    )
    .hint("remove a keyslot; or make a new volume and copy the data")
}

/// The LUKS2 header in memory. `moved`: with keyslot 0 in its new place, as it will be written; without, where its material still is.
///
/// # Errors
/// `NoSpace`, `Unsupported`: it cannot be, and why.
pub fn converted(header: &luks1::Header, moved: bool) -> Result<Loaded> {
    let mut header = header.clone();
    if let Some((from, to)) = exchange(&header)?.filter(|_| moved) {
        swap(&mut header, from, to);
    }
    let payload = u64::from(header.payload_sector) * 512;
    let end = if payload == 0 { DETACHED_BYTES } else { payload - payload % AREA_ALIGN };
    let area_bytes = keyslot_area_bytes(header.key_bytes);
    let keyslots_bytes = end.saturating_sub(COPIES_BYTES);
    let segment = Segment::crypt(payload, None, &header.cipher(), LUKS1_UNIT_BYTES);
    let salts = [random_salt()?, random_salt()?];
    let mut made = Luks2Header::new(COPY_BYTES_DEFAULT, keyslots_bytes, segment, header.uuid.clone(), salts)
        .map_err(|error| no_room("its data begins too early").because(error))?;
    let hash = &header.hash;
    let salt = header.digest_salt.to_vec();
    let digest = Digest::pbkdf2(hash, header.digest_iterations, salt, header.digest.to_vec());
    let digest = made.metadata.add_digest(digest, &[], &[0])?;
    for (id, slot) in (0..).zip(&header.keyslots).filter(|(_, slot)| slot.active) {
        let area = Area { offset: slot.material_offset(), size: area_bytes };
        if !area.offset.is_multiple_of(AREA_ALIGN) {
            return Err(no_room("its keyslots lie at places that LUKS2 does not have"));
        }
        let keyslot = Luks2Keyslot {
            key_size: header.key_bytes,
            priority: 1,
            area,
            area_encryption: header.cipher(),
            area_key_size: header.key_bytes,
            af_stripes: slot.stripes,
            af_hash: hash.clone(),
            kdf: KdfText::Pbkdf2 { hash: hash.clone(), iterations: slot.iterations },
            salt: slot.salt.to_vec(),
            extra: serde_json::Map::new(),
        };
        made.metadata.keyslots.insert(id, Keyslot::Luks2(keyslot));
        made.metadata.digests.entry(digest).and_modify(|digest| digest.keyslots.push(id));
    }
    let mut loaded = Loaded { header: made, health: [Health::Good, Health::Good] };
    if moved {
        loaded.header.check().map_err(|error| no_room("its layout is none of LUKS2").because(error))?;
        luks::note(&mut loaded, &unused(&header));
    }
    Ok(loaded)
}

/// Places of keyslots not in use, behind the copies of the new header. The first one's may hold what another has moved away from, in this
/// conversion or in one that was cut off.
fn unused(header: &luks1::Header) -> Vec<Area> {
    let places = header.keyslots.iter().filter(|slot| !slot.active).map(|slot| {
        let end = slot.material_offset() + header.material_bytes();
        let offset = slot.material_offset().max(COPIES_BYTES);
        Area { offset, size: end.saturating_sub(offset) }
    });
    places.filter(|area| area.size > 0).collect()
}

fn swap(header: &mut luks1::Header, one: usize, other: usize) {
    let places = [header.keyslots[one].material_sector, header.keyslots[other].material_sector];
    header.keyslots[one].material_sector = places[1];
    header.keyslots[other].material_sector = places[0];
}

/// Make it one, in the order of the module's head.
///
/// # Errors
/// As [`converted`]: nothing was written. `Conflict`: another program changed the header. Else of the device.
pub fn convert(device: &mut Blocking, before: &luks1::Header) -> Result<Loaded> {
    let loaded = converted(before, true)?;
    let copies = [loaded.header.to_bytes(Copy::Primary)?, loaded.header.to_bytes(Copy::Secondary)?];
    let _held = store::lock_device(device, true)?;
    store::unchanged(device, &Header::Luks1(Box::new(before.clone())))?;
    if let Some((from, to)) = exchange(before)? {
        let mut after = before.clone();
        swap(&mut after, from, to);
        // 1.
        let mut material = vec![0; usize::try_from(before.material_bytes()).unwrap_or(usize::MAX)];
        device.read(before.keyslots[from].material_offset(), &mut material)?;
        device.write(before.keyslots[to].material_offset(), &material)?;
        device.flush()?;
        // 2.
        store::write_luks1(device, before, &after)?;
    }
    // 3.
    device.write(loaded.header.offset(Copy::Secondary), &copies[1])?;
    device.flush()?;
    // 4. and 5.
    for part in [0..SECTOR, SECTOR..copies[0].len()] {
        device.write(part.start as u64, &copies[0][part])?;
        device.flush()?;
    }
    Ok(loaded)
}
