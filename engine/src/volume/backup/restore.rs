//! A backup put back.
//!
//! # Write order
//! The header to come and the one to go are the old and the new; a place is an extent of the keyslots area that one of them uses
//! for a keyslot in use. A place that holds already what the new header wants there needs no write.
//!
//! 1. Material of the new header: into its own place where the old header does not use any byte of that; otherwise into an
//!    interim place, which neither header uses (LUKS2: any gap of the keyslots area; LUKS1: the place of a keyslot that is
//!    free in both). 2. Flush.
//! 3. The new header; if there are interim places, with these in it. LUKS2: copy by copy with a flush after each, first the copy
//!    that was not good, if one was not; the interim header counts higher than both. LUKS1: sector by sector with a flush after
//!    each, in an order of [`store::luks1_order`].
//! 4. If there are interim places: their material into its own places, flush, and the new header as it is in the backup, likewise.
//! 5. What the new header does not use, from the backup, which overwrites material that only the old header used. Flush.
//!
//! Before 3 the volume opens with all passphrases of the old header, after 3 with all of the new one. Within 3 a LUKS2 volume
//! opens with one set or the other, and whichever copy wins, its material is whole, because nothing has been written over a place
//! of either. A backup whose counter (seqid) is lower than the volume's loses to the old copy until both copies are written; that is
//! the old set, whole.
//!
//! LUKS1 has no second copy, but two sectors, and keyslots 6 and 7 in the second. When only one of the headers uses these, or
//! both alike, there is an order in which the volume opens with one set or the other between the sectors too: second sector
//! first if the old header does not use what changes there, else last. When both use them, there is none; then those of the
//! new header wait in interim places 0 to 5, so that the interim header does not use them.
//!
//! This order needs something to be careful with and room to be careful in. Without (no readable header, another version or
//! another size of the LUKS2 metadata, no room for interim places, a keyslot of unknown type in the way) the only order left is: 1. the
//! keyslots area, 2. flush, 3. the header, LUKS2: secondary copy, flush, primary copy, 4. flush. A power cut in it can leave a volume
//! that nothing opens until the same restore is done again. So it is done only when the caller says that what is there may be
//! lost (`allow_other`).

use proto::luks::Done;

use super::{PIECE, header_bytes};
use crate::backend::blocking::Blocking;
use crate::error::{Error, ErrorKind, Result};
use crate::format::luks1;
use crate::format::luks2::metadata::{Keyslot, SegmentKind};
use crate::format::luks2::{Copy, Health, Loaded};
use crate::volume::keyslots::{GiveUp, check_requirements, stop};
use crate::volume::{Header, random, store};

/// The longest a backup may be beyond what its header says: a page of any machine that may have rounded it up.
const SLACK: u64 = 64 << 10;
/// Interim places begin at multiples of this.
const AREA_STEP: u64 = 4096;

/// A backup file, opened.
pub struct Backup<'a> {
    /// The file.
    pub file: &'a mut Blocking,
    /// Its size, bytes.
    pub file_bytes: u64,
}

/// Put a backup back (see the module head for the order). `capacity`: bytes of the header device, if it cannot grow.
///
/// # Errors
/// `Damaged`: the backup is damaged or of the wrong length. `Unsupported`: it is of a volume in re-encryption, or has other
/// requirements. `Conflict`: it differs from what is on the volume in a way that decides over the data, or cannot be put back without
/// risk, and `allow_other` is not set. `NoSpace`: the device is too small. Else of the devices.
pub fn restore(
    device: &mut Blocking,
    capacity: Option<u64>,
    mut backup: Backup<'_>,
    allow_other: bool,
    give_up: GiveUp<'_>,
) -> Result<Done> {
    let new = backup.check()?;
    let needed = header_bytes(&new);
    if capacity.is_some_and(|capacity| capacity < needed) {
        let what = format!("too small for the header: {needed} bytes are needed");
        return Err(Error::new(ErrorKind::NoSpace, what).at(device.name()));
    }
    let old = match Header::load(device) {
        Ok(header) => Some(header),
        Err(error) if matches!(error.kind(), ErrorKind::Damaged | ErrorKind::Unsupported) => None,
        Err(error) => return Err(error),
    };
    let differences = match &old {
        Some(old) => {
            let mut found = differences(old, &new);
            if is_in_re_encryption(old) {
                found.insert(
                    0,
                    "a re-encryption of it is under way, and all data that is under the new volume key already is \
                     lost with its header"
                        .to_owned(),
                );
            }
            found
        }
        None => vec!["it has no readable header".to_owned()],
    };
    if !differences.is_empty() && !allow_other {
        let what = format!("the backup may not belong to this volume: {}", differences.join("; "));
        return Err(Error::new(ErrorKind::Conflict, what).at(device.name()).hint(
            "what is on it will be readable only if the backup belongs to it; say that it may be another's to \
             restore it all the same",
        ));
    }
    let plan = match &old {
        Some(old) => plan(device, backup.file, old, &new)?,
        None => None,
    };
    stop(give_up)?;
    let mut warnings: Vec<String> = differences;
    match (plan, &old) {
        (Some(plan), Some(old)) => put_back(device, &mut backup, old, &new, &plan)?,
        _ if allow_other => put_over(device, &mut backup, &new)?,
        _ => {
            let what = "there is no room to put the keyslots back without first destroying those in use";
            return Err(Error::new(ErrorKind::Conflict, what).at(device.name()).hint(
                "remove keyslots; or say that what is there may be lost: if the power goes then, the same \
                 restore must be done again",
            ));
        }
    }
    check_result(device, &new)?;
    warnings.push("the passphrases are those of the backup again, removed ones too".to_owned());
    Ok(Done { uuid: new.uuid().to_owned(), warnings, ..Done::default() })
}

/// Is a re-encryption under way? Its keyslot keeps the progress.
fn is_in_re_encryption(header: &Header) -> bool {
    let Header::Luks2(loaded) = header else { return false };
    let metadata = &loaded.header.metadata;
    metadata.keyslots.values().any(|slot| matches!(slot, Keyslot::Reencrypt { .. }))
}

fn check_result(device: &mut Blocking, new: &Header) -> Result<()> {
    let same = match (Header::load(device)?, new) {
        (Header::Luks1(now), Header::Luks1(new)) => now == *new,
        (Header::Luks2(now), Header::Luks2(new)) => {
            now.header.metadata == new.header.metadata && now.header.uuid == new.header.uuid
        }
        _ => false,
    };
    if same {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Io, "what was written is not what is read back").at(device.name()))
}

impl Backup<'_> {
    /// Everything that can be known about it before anything is written.
    fn check(&mut self) -> Result<Header> {
        let name = self.file.name().to_owned();
        let header = Header::load(self.file).map_err(|error| {
            if error.kind() == ErrorKind::Unsupported {
                Error::new(ErrorKind::Damaged, "not a LUKS header backup").at(&name).because(error)
            } else {
                error
            }
        })?;
        if let Header::Luks2(loaded) = &header {
            check_requirements(&loaded.header.metadata, &name)?;
            let progress = |slot: &Keyslot| matches!(slot, Keyslot::Reencrypt { .. });
            if loaded.header.metadata.keyslots.values().any(progress) {
                let what = "the backup is of a volume in re-encryption: it describes a state that has passed";
                return Err(Error::new(ErrorKind::Unsupported, what).at(&name));
            }
        }
        let needed = header_bytes(&header);
        if self.file_bytes < needed {
            let what = format!("the backup is cut off: {} bytes of {needed}", self.file_bytes);
            return Err(Error::new(ErrorKind::Damaged, what).at(&name));
        }
        if self.file_bytes > needed.saturating_add(SLACK) {
            let what =
                format!("not a header backup: {} bytes where its header says {needed}", self.file_bytes);
            return Err(Error::new(ErrorKind::Damaged, what).at(&name));
        }
        Ok(header)
    }

    /// Copy an extent to the same place, or to `to`.
    fn copy(&mut self, device: &mut Blocking, from: u64, bytes: u64, to: u64) -> Result<()> {
        let mut piece = vec![0; PIECE];
        let mut done = 0;
        while done < bytes {
            let length = usize::try_from(bytes - done).unwrap_or(usize::MAX).min(PIECE);
            self.file.read(from + done, &mut piece[..length])?;
            device.write(to + done, &piece[..length])?;
            done += length as u64;
        }
        Ok(())
    }

    /// The bytes of a copy: as in the backup if it is good there, else made from the good one.
    fn luks2_copy(&mut self, loaded: &Loaded, copy: Copy) -> Result<Vec<u8>> {
        let (index, header) = match copy {
            Copy::Primary => (0, &loaded.header),
            Copy::Secondary => (1, &loaded.header),
        };
        if loaded.health[index] != Health::Good {
            let mut header = header.clone();
            random::fill(&mut header.salts[index])?;
            return header.to_bytes(copy);
        }
        let mut bytes = vec![0; usize::try_from(header.copy_bytes).unwrap_or(0)];
        self.file.read(header.offset(copy), &mut bytes)?;
        Ok(bytes)
    }
}

/// What differs and decides over the data, a clause each.
fn differences(old: &Header, new: &Header) -> Vec<String> {
    let mut found = Vec::new();
    let mut compare = |what: &str, old: String, new: String| {
        if old != new {
            found.push(format!("its {what} is {old}, that of the backup {new}"));
        }
    };
    compare("UUID", old.uuid().to_owned(), new.uuid().to_owned());
    let (was, becomes) = (Facts::of(old), Facts::of(new));
    compare("version", was.version.to_owned(), becomes.version.to_owned());
    compare("data offset", was.offset, becomes.offset);
    compare("cipher", was.cipher, becomes.cipher);
    compare("data unit", was.unit, becomes.unit);
    // A volume without keyslots, an erased one, does not tell its key size; then the digest speaks for the key.
    if let (Some(was), Some(becomes)) = (was.key_bits, becomes.key_bits) {
        compare("key size", was.to_string(), becomes.to_string());
    }
    compare("size of the metadata", was.metadata, becomes.metadata);
    if found.is_empty() && was.digest != becomes.digest {
        found.push("it has another volume key, as after a re-encryption".to_owned());
    }
    if let Header::Luks2(loaded) = old
        && !loaded.header.metadata.unmet_requirements().is_empty()
    {
        let unmet = loaded.header.metadata.unmet_requirements().join(", ");
        found.push(format!("its header has requirements ({unmet}), of which the backup knows nothing"));
    }
    found
}

/// What must be alike in two headers of one volume.
struct Facts {
    version: &'static str,
    offset: String,
    cipher: String,
    unit: String,
    key_bits: Option<u32>,
    metadata: String,
    digest: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Facts {
    fn of(header: &Header) -> Self {
        match header {
            Header::Luks1(header) => Self {
                version: "LUKS1",
                offset: (u64::from(header.payload_sector) * 512).to_string(),
                cipher: header.cipher(),
                unit: "512".to_owned(),
                key_bits: Some(header.key_bytes * 8),
                metadata: luks1::HEADER_BYTES.to_string(),
                digest: vec![(header.digest_salt.to_vec(), header.digest.to_vec())],
            },
            Header::Luks2(loaded) => Self::of_luks2(loaded),
        }
    }

    fn of_luks2(loaded: &Loaded) -> Self {
        let metadata = &loaded.header.metadata;
        let join = |each: Vec<String>| each.join("+");
        let segments = || metadata.data_segments().map(|(_, segment)| segment);
        let crypt = |segment: &SegmentKind| match segment {
            SegmentKind::Crypt { encryption, sector_size, .. } => {
                (encryption.clone(), sector_size.to_string())
            }
            SegmentKind::Linear => ("linear".to_owned(), "512".to_owned()),
            SegmentKind::Unknown(kind) => (kind.clone(), "unknown".to_owned()),
        };
        let digests: Vec<_> =
            metadata.data_segments().filter_map(|(id, _)| metadata.digest_of_segment(id)).collect();
        let key_bits = digests.first().and_then(|(_, digest)| {
            digest.keyslots.iter().find_map(|id| match metadata.keyslots.get(id) {
                Some(Keyslot::Luks2(slot)) => Some(slot.key_size * 8),
                _ => None,
            })
        });
        Self {
            version: "LUKS2",
            offset: join(segments().map(|segment| segment.offset.to_string()).collect()),
            cipher: join(segments().map(|segment| crypt(&segment.kind).0).collect()),
            unit: join(segments().map(|segment| crypt(&segment.kind).1).collect()),
            key_bits,
            metadata: format!("{}+{}", loaded.header.copy_bytes, metadata.config.keyslots_size),
            digest: digests.iter().map(|(_, digest)| (digest.salt.clone(), digest.digest.clone())).collect(),
        }
    }
}

/// An extent of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    offset: u64,
    bytes: u64,
}

impl Place {
    fn end(self) -> u64 {
        self.offset.saturating_add(self.bytes)
    }

    fn meets(self, other: Self) -> bool {
        self.offset < other.end() && other.offset < self.end()
    }
}

/// Material of a keyslot in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Material {
    keyslot: u32,
    place: Place,
    /// Could lie elsewhere: we know how its keyslot says where.
    can_move: bool,
}

/// Material that must be written, and where to first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Move {
    material: Material,
    /// LUKS1: the keyslot whose place it is; LUKS2: the same keyslot.
    interim: Option<(u32, Place)>,
}

fn materials(header: &Header) -> Vec<Material> {
    match header {
        Header::Luks1(header) => (0..)
            .zip(&header.keyslots)
            .filter(|(_, slot)| slot.active)
            .map(|(keyslot, slot)| Material { keyslot, place: luks1_place(header, slot), can_move: true })
            .collect(),
        Header::Luks2(loaded) => loaded
            .header
            .metadata
            .keyslots
            .iter()
            .filter_map(|(&keyslot, slot)| {
                let (area, can_move) = match slot {
                    Keyslot::Luks2(slot) => (Some(slot.area), true),
                    Keyslot::Reencrypt { area, .. } => (Some(*area), false),
                    Keyslot::Unknown { area, .. } => (*area, false),
                };
                let place = area.map(|area| Place { offset: area.offset, bytes: area.size })?;
                Some(Material { keyslot, place, can_move })
            })
            .collect(),
    }
}

fn luks1_place(header: &luks1::Header, slot: &luks1::Keyslot) -> Place {
    Place { offset: slot.material_offset(), bytes: header.material_bytes() }
}

/// What to write before the header, and where; `None`: there is no careful way.
fn plan(device: &mut Blocking, file: &mut Blocking, old: &Header, new: &Header) -> Result<Option<Vec<Move>>> {
    let alike = match (old, new) {
        (Header::Luks1(_), Header::Luks1(_)) => true,
        (Header::Luks2(old), Header::Luks2(new)) => {
            old.header.copy_bytes == new.header.copy_bytes
                && old.header.metadata.config.keyslots_size == new.header.metadata.config.keyslots_size
        }
        _ => false,
    };
    if !alike {
        return Ok(None);
    }
    let mut written = Vec::new();
    for material in materials(new) {
        if !is_there(device, file, material.place)? {
            written.push(material);
        }
    }
    let (Header::Luks1(old_header), Header::Luks1(new_header)) = (old, new) else {
        return Ok(arrange(old, new, &written, Ways::Any));
    };
    let is_safe = |moves: &Vec<Move>| {
        let interim = luks1_interim(new_header, moves);
        store::luks1_order(old_header, &interim).is_some()
            && store::luks1_order(&interim, new_header).is_some()
    };
    if let Some(moves) = arrange(old, new, &written, Ways::Any).filter(is_safe) {
        return Ok(Some(moves));
    }
    // Those of the second sector that change wait in the first, also where the material is there already.
    for material in materials(new) {
        let id = material.keyslot as usize;
        let changes =
            is_in_second_sector(material.keyslot) && old_header.keyslots[id] != new_header.keyslots[id];
        if changes && !written.contains(&material) {
            written.push(material);
        }
    }
    Ok(arrange(old, new, &written, Ways::FirstSector).filter(is_safe))
}

/// Of LUKS1 keyslots: a part of the record or all of it.
fn is_in_second_sector(keyslot: u32) -> bool {
    keyslot >= 6
}

/// Is the same on the device and in the backup?
fn is_there(device: &mut Blocking, file: &mut Blocking, place: Place) -> Result<bool> {
    let bytes = usize::try_from(place.bytes).unwrap_or(usize::MAX);
    let (mut ours, mut theirs) = (vec![0; PIECE.min(bytes)], vec![0; PIECE.min(bytes)]);
    let mut done = 0;
    while done < bytes {
        let length = PIECE.min(bytes - done);
        let at = place.offset + done as u64;
        file.read(at, &mut theirs[..length])?;
        // A device that ends before does not hold it.
        match device.read(at, &mut ours[..length]) {
            Err(error) if error.kind() == ErrorKind::Invalid => return Ok(false),
            other => other?,
        }
        if ours[..length] != theirs[..length] {
            return Ok(false);
        }
        done += length;
    }
    Ok(true)
}

/// Which interim places will do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ways {
    /// Any, for the material that needs one.
    Any,
    /// LUKS1: those of keyslots in the first sector, also for all material of keyslots in the second.
    FirstSector,
}

/// Find interim places for the material whose own place the old header uses.
fn arrange(old: &Header, new: &Header, written: &[Material], ways: Ways) -> Option<Vec<Move>> {
    let old_places: Vec<Place> = materials(old).iter().map(|material| material.place).collect();
    let mut taken: Vec<Place> = materials(new).iter().map(|material| material.place).collect();
    taken.extend(&old_places);
    let mut moves = Vec::new();
    for &material in written {
        let blocked = old_places.iter().any(|place| place.meets(material.place))
            || (ways == Ways::FirstSector && is_in_second_sector(material.keyslot));
        let interim = if blocked {
            let found = if material.can_move { find_interim(new, material, &taken, ways) } else { None };
            let (keyslot, place) = found?;
            taken.push(place);
            Some((keyslot, place))
        } else {
            None
        };
        moves.push(Move { material, interim });
    }
    Some(moves)
}

fn find_interim(new: &Header, material: Material, taken: &[Place], ways: Ways) -> Option<(u32, Place)> {
    match new {
        Header::Luks1(header) => (0..)
            .zip(&header.keyslots)
            .filter(|(keyslot, slot)| !slot.active && (ways == Ways::Any || !is_in_second_sector(*keyslot)))
            .map(|(keyslot, slot)| (keyslot, luks1_place(header, slot)))
            .find(|(_, place)| !taken.iter().any(|other| other.meets(*place))),
        Header::Luks2(loaded) => {
            let end = loaded.header.backup_bytes();
            let mut place = Place { offset: loaded.header.keyslots_offset(), bytes: material.place.bytes };
            while place.end() <= end {
                match taken.iter().find(|other| other.meets(place)) {
                    None => return Some((material.keyslot, place)),
                    Some(other) => place.offset = other.end().next_multiple_of(AREA_STEP),
                }
            }
            None
        }
    }
}

/// The careful order; the numbers are those of the module head.
fn put_back(
    device: &mut Blocking,
    backup: &mut Backup<'_>,
    old: &Header,
    new: &Header,
    moves: &[Move],
) -> Result<()> {
    // 1. and 2.
    for Move { material, interim } in moves {
        let to = interim.map_or(material.place, |(_, place)| place);
        backup.copy(device, material.place.offset, material.place.bytes, to.offset)?;
    }
    device.flush()?;
    // 3.
    let mut health = match old {
        Header::Luks2(loaded) => loaded.health.clone(),
        Header::Luks1(_) => [Health::Good, Health::Good],
    };
    let mut now = None;
    if moves.iter().any(|step| step.interim.is_some()) {
        now = write_interim(device, old, new, moves, &health)?;
        health = [Health::Good, Health::Good];
        // 4.
        for Move { material, .. } in moves.iter().filter(|step| step.interim.is_some()) {
            backup.copy(device, material.place.offset, material.place.bytes, material.place.offset)?;
        }
        device.flush()?;
    }
    match (old, new) {
        (Header::Luks1(old), Header::Luks1(new)) => step_luks1(device, now.as_ref().unwrap_or(old), new)?,
        _ => write_header(device, backup, new, &health)?,
    }
    // 5.
    copy_rest(device, backup, new)
}

/// One LUKS1 header over another, in an order that keeps one set of keyslots whole.
fn step_luks1(device: &mut Blocking, from: &luks1::Header, to: &luks1::Header) -> Result<()> {
    let first = store::luks1_order(from, to)
        .ok_or_else(|| Error::new(ErrorKind::Internal, "no careful order of sectors").at(device.name()))?;
    store::replace_luks1_from(device, to, first)
}

/// The new header with its moved keyslots where they wait.
fn luks1_interim(new: &luks1::Header, moves: &[Move]) -> luks1::Header {
    let mut header = new.clone();
    for step in moves {
        let Some((to, _)) = step.interim else { continue };
        let (from, to) = (step.material.keyslot as usize, to as usize);
        let material_sector = header.keyslots[to].material_sector;
        header.keyslots[to] = luks1::Keyslot { material_sector, ..new.keyslots[from] };
        header.keyslots[from].active = false;
    }
    header
}

/// The new header with the interim places in it; LUKS1: what it is.
fn write_interim(
    device: &mut Blocking,
    old: &Header,
    new: &Header,
    moves: &[Move],
    health: &[Health; 2],
) -> Result<Option<luks1::Header>> {
    let interims = moves.iter().filter_map(|step| Some((step.material.keyslot, step.interim?)));
    match (old, new) {
        (Header::Luks1(old), Header::Luks1(new)) => {
            let interim = luks1_interim(new, moves);
            step_luks1(device, old, &interim)?;
            Ok(Some(interim))
        }
        (Header::Luks2(old), Header::Luks2(new)) => {
            let mut header = new.header.clone();
            for (keyslot, (_, place)) in interims {
                if let Some(Keyslot::Luks2(slot)) = header.metadata.keyslots.get_mut(&keyslot) {
                    slot.area.offset = place.offset;
                }
            }
            let highest = old.header.seqid.max(new.header.seqid);
            header.seqid = highest.checked_add(1).ok_or_else(|| {
                Error::new(ErrorKind::Invalid, "the header's write counter is at its end").at(device.name())
            })?;
            let copies = [header.to_bytes(Copy::Primary)?, header.to_bytes(Copy::Secondary)?];
            store::put_luks2(device, &new.header, &copies, health)?;
            Ok(None)
        }
        _ => Err(Error::new(ErrorKind::Internal, "an interim header over another version")),
    }
}

/// The new header as it is in the backup.
fn write_header(
    device: &mut Blocking,
    backup: &mut Backup<'_>,
    new: &Header,
    health: &[Health; 2],
) -> Result<()> {
    match new {
        Header::Luks1(header) => store::replace_luks1(device, header),
        Header::Luks2(loaded) => {
            let copies =
                [backup.luks2_copy(loaded, Copy::Primary)?, backup.luks2_copy(loaded, Copy::Secondary)?];
            store::put_luks2(device, &loaded.header, &copies, health)
        }
    }
}

/// What lies behind the header and is no material in use.
fn copy_rest(device: &mut Blocking, backup: &mut Backup<'_>, new: &Header) -> Result<()> {
    let mut used: Vec<Place> = materials(new).iter().map(|material| material.place).collect();
    used.sort_by_key(|place| place.offset);
    let mut at = behind_header(new);
    // What a LUKS1 backup holds beyond is rounding: on the device data may lie there.
    let end = header_bytes(new);
    for place in used.into_iter().chain([Place { offset: end, bytes: 0 }]) {
        backup.copy(device, at, place.offset.saturating_sub(at), at)?;
        at = at.max(place.end());
    }
    device.flush()
}

fn behind_header(header: &Header) -> u64 {
    match header {
        Header::Luks1(_) => luks1::HEADER_BYTES as u64,
        Header::Luks2(loaded) => loaded.header.keyslots_offset(),
    }
}

/// The order without care: see the module head.
fn put_over(device: &mut Blocking, backup: &mut Backup<'_>, new: &Header) -> Result<()> {
    // 1. and 2.
    let from = behind_header(new);
    let end = header_bytes(new);
    backup.copy(device, from, end - from, from)?;
    device.flush()?;
    // 3. and 4.: the secondary copy first, so that a primary one is found only when all of it is there.
    let primary_last = [Health::Good, Health::Damaged(String::new())];
    write_header(device, backup, new, &primary_last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(active: &[usize]) -> Header {
        let mut header = luks1::Header::layout(64, 4096).expect("a layout");
        for &id in active {
            header.keyslots[id].active = true;
        }
        Header::Luks1(Box::new(header))
    }

    fn interims(old: &[usize], new: &[usize]) -> Option<Vec<(u32, Option<u32>)>> {
        let (old, new) = (header(old), header(new));
        let moves = arrange(&old, &new, &materials(&new), Ways::Any)?;
        Some(moves.iter().map(|step| (step.material.keyslot, step.interim.map(|(to, _)| to))).collect())
    }

    #[test]
    fn material_waits_in_a_place_that_neither_header_uses() {
        assert_eq!(interims(&[1], &[0]), Some(vec![(0, None)]));
        assert_eq!(interims(&[0], &[0]), Some(vec![(0, Some(1))]));
        assert_eq!(interims(&[0, 1, 2], &[0, 3]), Some(vec![(0, Some(4)), (3, None)]));
        assert_eq!(interims(&[0, 1, 2, 3], &[0, 1, 2, 3]).map(|moves| moves.len()), Some(4));
        assert_eq!(interims(&[0, 1, 2, 3, 4], &[0, 1, 2, 3, 4]), None);
    }
}
