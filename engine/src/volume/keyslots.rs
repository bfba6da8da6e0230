//! Keyslots added, removed, changed, converted, and all of them destroyed.
//!
//! Every function reads the header itself, proves that the secret opens the volume before it writes, asks `give_up` between slow
//! steps and never after the first write. A header with a requirement this build does not honour, a re-encryption in progress
//! above all, is not changed; nor is one whose first copy something else was put over.
//!
//! # Locks
//! Nobody waits for a key derivation of ours: the header is locked while it is read, each keyslot's area while that is read
//! (shared), and everything from the first write to the last (exclusive). What was derived is for the header that was read, so
//! under the last lock it is read again: one that another program changed meanwhile refuses the operation (`Conflict`) before
//! anything is written. (Erase derives nothing: its caller holds the lock throughout.)
//!
//! # Write orders
//! Add: 1. material into a free area, 2. flush, 3. header with the keyslot (LUKS2: both copies, each flushed). A crash before 3
//! leaves material that no header refers to, which the next keyslot overwrites; the volume opens as before.
//!
//! Remove: 1. overwrite the material, 2. flush, 3. header without the keyslot. A crash before 3 leaves a dead keyslot: in the
//! header, but opened by nothing. It is removed by its number, for which its own passphrase is not asked.
//!
//! Change and convert: add (1, 2, 3), then 4. overwrite the old material, 5. flush, 6. header without the old keyslot. At every
//! instant the old passphrase opens or the new one does, between 3 and 4 both. In a LUKS2 header step 6 also gives the new
//! keyslot the number of the old one, with the area it has: tokens and users that know the number keep it. LUKS1 ties a number
//! to a place, so the number changes there, and the answer says so. With no free keyslot, or no room for another area, it is
//! refused: writing in place would for a while leave neither passphrase. (Unless the new passphrase opens a keyslot already, as a
//! change interrupted after 3 leaves it: then 4 to 6 are what is left to do.)
//!
//! Erase: 1. overwrite all material (LUKS2: the whole keyslots area, and with it whatever earlier operations left behind),
//! 2. flush, 3. header without keyslots.
//!
//! What overwriting cannot promise: a device that remaps sectors, a filesystem that copies on write, snapshots and header
//! backups may all keep old material, and old material opens with the old passphrase.

mod change;

use std::collections::BTreeSet;

use proto::luks::{Done, KdfWish};

use crate::backend::blocking::Blocking;
use crate::crypto::Secret;
use crate::error::{Error, ErrorKind, Result};
use crate::format::luks2::Health;
use crate::format::luks2::metadata::{Keyslot, Metadata, SegmentKind};
use crate::format::luks2::validate::OBJECTS_MAX;
use crate::volume::unlock::{self, Unlocked, WRONG_KEY};
use crate::volume::{Header, MAGIC, store};
use change::{Addition, clear_luks1, destroy};

/// Keyslot numbers of LUKS1 headers end here.
const LUKS1_KEYSLOTS: u32 = 8;
/// `priority` of an ordinary keyslot.
const PRIORITY_NORMAL: u32 = 1;

/// A secret that opens a volume.
pub enum Proof {
    /// A passphrase of a keyslot.
    Passphrase(Secret),
    /// The volume key itself.
    VolumeKey(Secret),
}

/// Asked between slow steps: has the caller gone away?
pub type GiveUp<'a> = &'a dyn Fn() -> bool;

/// Does the secret open the volume?
///
/// # Errors
/// Of [`unlock::with_passphrase`] and [`unlock::with_volume_key`].
pub fn open_test(
    device: &mut Blocking,
    proof: Proof,
    only: Option<u32>,
    give_up: GiveUp<'_>,
) -> Result<Done> {
    let held = store::lock_device(device, false)?;
    let header = Header::load(device)?;
    drop(held);
    if only.is_some() && matches!(proof, Proof::VolumeKey(_)) {
        return Err(Error::new(ErrorKind::Invalid, "a volume key opens no keyslot: name none"));
    }
    let opened = open(device, &header, proof, only, give_up)?;
    Ok(Done { keyslot: opened.keyslot, uuid: header.uuid().to_owned(), ..Done::default() })
}

/// Another passphrase for the key of the data, in keyslot `keyslot` or the first free one.
///
/// # Errors
/// `WrongKey`; `Conflict`: the keyslot is in use, or all are; `NoSpace`: no room for its material; `Unsupported`: the header must
/// not be changed; else of the KDF and the device.
pub fn add(
    device: &mut Blocking,
    proof: Proof,
    new: &Secret,
    keyslot: Option<u32>,
    wish: &KdfWish,
    give_up: GiveUp<'_>,
) -> Result<Done> {
    let mut header = look(device)?;
    // What needs no secret is found out before the seconds an unlock takes.
    let place = free_place(&header, keyslot, device.name())?;
    let opened = open(device, &header, proof, None, give_up)?;
    let digest = match &header {
        Header::Luks1(_) => 0,
        Header::Luks2(loaded) => data_digest(&loaded.header.metadata, device.name())?,
    };
    let addition = Addition { place, digest, priority: PRIORITY_NORMAL, wish, give_up };
    let made = addition.make(device.name(), &header, &opened.key, new)?;
    let _held = store::lock_device(device, true)?;
    made.write(device, &mut header)?;
    Ok(Done { keyslot: Some(place), uuid: header.uuid().to_owned(), ..Done::default() })
}

/// Destroy a keyslot: `keyslot`, or the one that `passphrase` opens. With both, the passphrase must open another keyslot of the
/// data, which stays.
///
/// # Errors
/// `Invalid`: neither is given. `NotFound`: the keyslot is not in use. `Conflict`: it is the last that opens the data, and
/// `allow_last` is not set. `WrongKey`. Else of the device.
pub fn remove(
    device: &mut Blocking,
    passphrase: Option<&Secret>,
    keyslot: Option<u32>,
    allow_last: bool,
    give_up: GiveUp<'_>,
) -> Result<Done> {
    let mut header = look(device)?;
    let target = match (keyslot, passphrase) {
        (Some(id), _) => id,
        (None, Some(secret)) => opened_by(device, &header, secret, None, give_up)?.0,
        (None, None) => {
            let what = "nothing says which keyslot to remove: give its number or its passphrase";
            return Err(Error::new(ErrorKind::Invalid, what));
        }
    };
    check_known(&header, target, device.name())?;
    let others = others(&header, target);
    if is_bound(&header, target) && others.is_empty() && !allow_last {
        let what = format!("keyslot {target} is the last one that opens the data");
        return Err(Error::new(ErrorKind::Conflict, what).at(device.name()).hint(
            "without it nobody can open the volume who has neither the volume key nor a header backup; add \
             another passphrase first, or say that the last one may go (--last-key-destroy-data)",
        ));
    }
    let mut warnings = Vec::new();
    if keyslot.is_some() {
        match passphrase {
            // With no other keyslot left to prove, knowing the last one is the proof.
            Some(secret) if others.is_empty() => {
                opened_by(device, &header, secret, Some(target), give_up)?;
            }
            Some(secret) => {
                opens_one_of(device, &header, secret, &others, give_up)?;
            }
            None => {}
        }
    }
    if !others.is_empty() && (keyslot.is_none() || passphrase.is_none()) {
        warnings
            .push(format!("that a passphrase of keyslot {} is still known was not checked", list(&others)));
    } else if others.is_empty() && is_bound(&header, target) {
        warnings.push("no keyslot opens the data any more".to_owned());
    }
    stop(give_up)?;
    let _held = store::lock_device(device, true)?;
    destroy(device, &mut header, target, None)?;
    Ok(Done { keyslot: Some(target), uuid: header.uuid().to_owned(), warnings, ..Done::default() })
}

/// Replace the passphrase of `keyslot`, or of the one that `old` opens.
///
/// # Errors
/// As [`add`], for want of room for a second keyslot too; `NotFound`: `keyslot` is not in use. An error after the first half
/// names both keyslots.
pub fn change(
    device: &mut Blocking,
    old: &Secret,
    new: &Secret,
    keyslot: Option<u32>,
    wish: &KdfWish,
    give_up: GiveUp<'_>,
) -> Result<Done> {
    let mut header = look(device)?;
    if let Some(id) = keyslot {
        check_known(&header, id, device.name())?;
    }
    let (replaced, key) = opened_by(device, &header, old, keyslot, give_up)?;
    let place = match free_place(&header, None, device.name()) {
        Ok(place) => place,
        Err(full) => return finish_change(device, header, replaced, new, full, give_up),
    };
    let (digest, priority) = match &header {
        Header::Luks1(_) => (0, PRIORITY_NORMAL),
        Header::Luks2(loaded) => {
            let metadata = &loaded.header.metadata;
            let digest = metadata.digest_of_keyslot(replaced).map(|(id, _)| id);
            let digest = digest.ok_or_else(|| {
                Error::new(ErrorKind::Invalid, format!("keyslot {replaced} has no digest")).at(device.name())
            })?;
            let priority = match &metadata.keyslots[&replaced] {
                Keyslot::Luks2(keyslot) => keyslot.priority,
                _ => PRIORITY_NORMAL,
            };
            (digest, priority)
        }
    };
    let addition = Addition { place, digest, priority, wish, give_up };
    let made = addition.make(device.name(), &header, &key, new)?;
    let _held = store::lock_device(device, true)?;
    made.write(device, &mut header)?;
    destroy(device, &mut header, replaced, Some(place))
        .map_err(|error| half_changed(error, place, replaced, device.name()))?;
    let (keyslot, warnings) = match &header {
        Header::Luks2(_) => (replaced, Vec::new()),
        Header::Luks1(_) => (
            place,
            vec![format!(
                "the passphrase moved from keyslot {replaced} to keyslot {place}: LUKS1 has no other way"
            )],
        ),
    };
    Ok(Done { keyslot: Some(keyslot), uuid: header.uuid().to_owned(), warnings, ..Done::default() })
}

/// The new keyslot is there and the old one did not go.
fn half_changed(error: Error, place: u32, replaced: u32, name: &str) -> Error {
    let what = format!(
        "the new passphrase opens keyslot {place}, but keyslot {replaced} with the old one could not be removed"
    );
    Error::new(error.kind(), what)
        .at(name)
        .hint(
            "until it is gone both passphrases may open the volume: remove the keyslot by the old passphrase or, if that \
             opens nothing any more, the one that no passphrase opens by its number",
        )
        .because(error)
}

/// No keyslot is free. If the new passphrase opens another keyslot already, as a change interrupted between its two halves
/// leaves it, only the second half is to be done.
fn finish_change(
    device: &mut Blocking,
    mut header: Header,
    replaced: u32,
    new: &Secret,
    full: Error,
    give_up: GiveUp<'_>,
) -> Result<Done> {
    let other = match unlock::with_passphrase(device, &header, new, None, give_up) {
        Ok(Unlocked { keyslot: Some(other), .. }) if other != replaced => other,
        Err(error) if error.kind() == ErrorKind::Cancelled => return Err(error),
        _ => {
            return Err(full.hint(
                "the new keyslot is made before the old one is destroyed, and there is no room for both; remove \
                 a keyslot first, or, if a change was interrupted, repeat it with the same new passphrase",
            ));
        }
    };
    stop(give_up)?;
    let _held = store::lock_device(device, true)?;
    destroy(device, &mut header, replaced, None)?;
    let warnings = vec![format!(
        "the new passphrase opened keyslot {other} already, as after an interrupted change; keyslot {replaced} \
         was removed"
    )];
    Ok(Done { keyslot: Some(other), uuid: header.uuid().to_owned(), warnings, ..Done::default() })
}

/// The same passphrase under another KDF or cost: [`change`] to itself.
///
/// # Errors
/// As [`change`].
pub fn convert(
    device: &mut Blocking,
    passphrase: &Secret,
    keyslot: Option<u32>,
    wish: &KdfWish,
    give_up: GiveUp<'_>,
) -> Result<Done> {
    change(device, passphrase, passphrase, keyslot, wish, give_up)
}

/// Destroy every keyslot. The caller holds the lock.
///
/// # Errors
/// `Conflict`: not `confirmed`. Else of the device.
pub fn erase(device: &mut Blocking, confirmed: bool) -> Result<Done> {
    if !confirmed {
        return Err(Error::new(ErrorKind::Conflict, "destroying every keyslot was not confirmed")
            .at(device.name())
            .hint("without a header backup nothing opens the volume again"));
    }
    let header = load_to_change(device)?;
    store::unchanged(device, &header)?;
    let after = match &header {
        Header::Luks1(before) => {
            let mut after = before.clone();
            // 1. and 2.
            for keyslot in &mut after.keyslots {
                store::random_fill(device, keyslot.material_offset(), before.material_bytes())?;
                clear_luks1(keyslot);
            }
            device.flush()?;
            Header::Luks1(after)
        }
        Header::Luks2(loaded) => {
            let mut next = loaded.clone();
            let ids: Vec<u32> = next.header.metadata.keyslots.keys().copied().collect();
            for id in ids {
                next.header.metadata.remove_keyslot(id);
            }
            next.header.check()?;
            // 1. and 2.
            let bytes = next.header.metadata.config.keyslots_size;
            store::destroy_material(device, &header, next.header.keyslots_offset(), bytes)?;
            Header::Luks2(next)
        }
    };
    // 3.
    let header = store::write_behind_material(device, &header, after)?;
    let warnings = vec!["nothing but a header backup opens the volume any more".to_owned()];
    Ok(Done { uuid: header.uuid().to_owned(), warnings, ..Done::default() })
}

/// Read the header and see that it may be changed. The caller holds a lock.
///
/// # Errors
/// Of [`Header::load`]; `Unsupported`: it has requirements, which are named; `Conflict`: only its second copy is left, and
/// something else is where the first was.
pub(super) fn load_to_change(device: &mut Blocking) -> Result<Header> {
    let header = Header::load(device)?;
    if let Header::Luks2(loaded) = &header {
        check_requirements(&loaded.header.metadata, device.name())?;
        if loaded.health[0] != Health::Good {
            refuse_overwritten(device)?;
        }
    }
    Ok(header)
}

/// A first copy that is damaged is made anew by every change; but what begins otherwise may be somebody's filesystem or
/// partition table on a disk that was reused, and the second copy a leftover.
pub(super) fn refuse_overwritten(device: &mut Blocking) -> Result<()> {
    let mut magic = [0; MAGIC.len()];
    match device.read(0, &mut magic) {
        Ok(()) if magic != MAGIC => {
            Err(Error::new(ErrorKind::Conflict, "something else begins where the header's first copy was")
                .at(device.name())
                .hint("look at it with `blkid`; if this is still the volume, repair its header first"))
        }
        Ok(()) => Ok(()),
        // A sector that cannot be read is damage, which writing may heal.
        Err(error) if error.kind() == ErrorKind::Io => Ok(()),
        Err(error) => Err(error),
    }
}

/// [`load_to_change`] for what derives keys next.
fn look(device: &mut Blocking) -> Result<Header> {
    let _held = store::lock_device(device, false)?;
    load_to_change(device)
}

/// # Errors
/// `Unsupported`: the header must not be changed by a program that does not know its requirements.
pub(super) fn check_requirements(metadata: &Metadata, name: &str) -> Result<()> {
    let unmet = metadata.unmet_requirements();
    if unmet.is_empty() {
        return Ok(());
    }
    let reencryption = unmet.iter().any(|requirement| requirement.contains("reencrypt"));
    let what = format!("the header has requirements and must not be changed ({})", unmet.join(", "));
    let error = Error::new(ErrorKind::Unsupported, what).at(name);
    Err(if reencryption {
        error.hint("finish the re-encryption first: cryptctl reencrypt --resume-only")
    } else {
        error
    })
}

fn open(
    device: &mut Blocking,
    header: &Header,
    proof: Proof,
    only: Option<u32>,
    give_up: GiveUp<'_>,
) -> Result<Unlocked> {
    match proof {
        Proof::Passphrase(secret) => unlock::with_passphrase(device, header, &secret, only, give_up),
        Proof::VolumeKey(key) => unlock::with_volume_key(header, key),
    }
}

/// The keyslot a passphrase opens, and the key in it; the one named, whether or not its key is that of the data.
fn opened_by(
    device: &mut Blocking,
    header: &Header,
    secret: &Secret,
    only: Option<u32>,
    give_up: GiveUp<'_>,
) -> Result<(u32, Secret)> {
    let opened = match only {
        Some(id) => unlock::keyslot_unless(device, header, id, secret, give_up)?,
        None => unlock::with_passphrase(device, header, secret, None, give_up)?,
    };
    let keyslot =
        opened.keyslot.ok_or_else(|| Error::new(ErrorKind::Internal, "a passphrase opened no keyslot"))?;
    Ok((keyslot, opened.key))
}

/// Does the passphrase open one of these? Each is named, so that those to be ignored otherwise count too.
fn opens_one_of(
    device: &mut Blocking,
    header: &Header,
    secret: &Secret,
    keyslots: &[u32],
    give_up: GiveUp<'_>,
) -> Result<u32> {
    for &id in keyslots {
        stop(give_up)?;
        match opened_by(device, header, secret, Some(id), give_up) {
            Ok(_) => return Ok(id),
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::WrongKey | ErrorKind::Unsupported | ErrorKind::Limit
                ) => {}
            Err(error) => return Err(error),
        }
    }
    // One phrase, as everywhere: no place in it.
    Err(Error::new(ErrorKind::WrongKey, WRONG_KEY)
        .hint("with a keyslot named, the passphrase must be of another one that stays"))
}

pub(super) fn stop(give_up: GiveUp<'_>) -> Result<()> {
    if give_up() { Err(Error::new(ErrorKind::Cancelled, "cancelled; nothing was written")) } else { Ok(()) }
}

pub(super) fn list(ids: &[u32]) -> String {
    ids.iter().map(u32::to_string).collect::<Vec<_>>().join(" or ")
}

/// Keyslots whose key opens data.
pub(super) fn bound(header: &Header) -> Vec<u32> {
    match header {
        Header::Luks1(header) => {
            (0..).zip(&header.keyslots).filter(|(_, slot)| slot.active).map(|(id, _)| id).collect()
        }
        Header::Luks2(loaded) => {
            let metadata = &loaded.header.metadata;
            let wrapped = metadata.keyslots.iter().filter(|(_, slot)| matches!(slot, Keyslot::Luks2(_)));
            wrapped.map(|(id, _)| *id).filter(|id| !data_opened(metadata, *id).is_empty()).collect()
        }
    }
}

/// Keyslots other than `id` whose key opens all data that the key of `id` opens (of one that opens none: all that open some).
fn others(header: &Header, id: u32) -> Vec<u32> {
    let mut found = bound(header);
    found.retain(|other| *other != id);
    if let Header::Luks2(loaded) = header {
        let metadata = &loaded.header.metadata;
        let opened = data_opened(metadata, id);
        found.retain(|other| opened.is_subset(&data_opened(metadata, *other)));
    }
    found
}

/// The data segments whose key a keyslot holds.
fn data_opened(metadata: &Metadata, keyslot: u32) -> BTreeSet<u32> {
    let digests = metadata.digests.values().filter(|digest| digest.keyslots.contains(&keyslot));
    let segments: Vec<u32> = digests.flat_map(|digest| &digest.segments).copied().collect();
    metadata.data_segments().map(|(id, _)| id).filter(|id| segments.contains(id)).collect()
}

fn is_bound(header: &Header, id: u32) -> bool {
    bound(header).contains(&id)
}

/// The keyslot is in use and of a type we make.
fn check_known(header: &Header, id: u32, name: &str) -> Result<()> {
    let missing = || Err(Error::new(ErrorKind::NotFound, format!("keyslot {id} is not in use")).at(name));
    let kind = match header {
        Header::Luks1(header) => {
            let slot = usize::try_from(id).ok().and_then(|id| header.keyslots.get(id));
            return if slot.is_some_and(|slot| slot.active) { Ok(()) } else { missing() };
        }
        Header::Luks2(loaded) => match loaded.header.metadata.keyslots.get(&id) {
            None => return missing(),
            Some(Keyslot::Luks2(_)) => return Ok(()),
            Some(Keyslot::Reencrypt { .. }) => "reencrypt",
            Some(Keyslot::Unknown { kind, .. }) => kind,
        },
    };
    let what = format!("keyslot {id} is of type {kind:?}, which is not a passphrase's");
    Err(Error::new(ErrorKind::Unsupported, what).at(name))
}

/// A number for a new keyslot, and room for its material.
fn free_place(header: &Header, wanted: Option<u32>, name: &str) -> Result<u32> {
    let (count, used): (u32, Vec<u32>) = match header {
        Header::Luks1(_) => (LUKS1_KEYSLOTS, bound(header)),
        Header::Luks2(loaded) => (OBJECTS_MAX, loaded.header.metadata.keyslots.keys().copied().collect()),
    };
    match wanted {
        Some(id) if id >= count => {
            let what = format!("there is no keyslot {id}: they are numbered 0 to {}", count - 1);
            Err(Error::new(ErrorKind::Invalid, what).at(name))
        }
        Some(id) if used.contains(&id) => {
            Err(Error::new(ErrorKind::Conflict, format!("keyslot {id} is in use")).at(name))
        }
        Some(id) => Ok(id),
        None => (0..count).find(|id| !used.contains(id)).ok_or_else(|| {
            Error::new(ErrorKind::Conflict, format!("all {count} keyslots are in use")).at(name)
        }),
    }
}

/// The digest of the key that encrypts the data.
fn data_digest(metadata: &Metadata, name: &str) -> Result<u32> {
    let mut crypt =
        metadata.data_segments().filter(|(_, segment)| matches!(segment.kind, SegmentKind::Crypt { .. }));
    crypt
        .find_map(|(id, _)| metadata.digest_of_segment(id))
        .map(|(id, _)| id)
        .ok_or_else(|| Error::new(ErrorKind::Invalid, "no digest names the key of the data").at(name))
}
