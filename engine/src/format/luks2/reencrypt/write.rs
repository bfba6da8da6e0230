//! To metadata: the states a re-encryption goes through, exactly as cryptsetup writes them, so that it can go on from each.
//!
//! In memory only: each function leaves metadata that is a whole state, or is left as it was. Two may go into one header write
//! ([`clean`] and [`finish`] behind the last step, for one).

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::layout::{self, Part};
use super::read::{self, Backups};
use super::valid::{FINAL, MOVED, PREVIOUS, REQUIREMENT};
use super::{Checksum, Direction, Mode, Moved, Process, Resilience, State};
use crate::error::{Error, ErrorKind, Result};
use crate::format::luks2::Header;
use crate::format::luks2::metadata::{Area, Digest, Keyslot, Metadata, Segment, SegmentKind};
use crate::units::Extent;

/// What is to begin.
#[derive(Debug, Clone)]
pub struct Begin {
    /// What the data becomes.
    pub mode: Mode,
    /// From where.
    pub direction: Direction,
    /// How it is protected.
    pub resilience: Resilience,
    /// The data as it shall be: `dynamic`, without flags.
    pub target: Segment,
    /// The digest of the new volume key, in the metadata already, with its keyslots; none when decrypting.
    pub new_digest: Option<u32>,
    /// Datashift: where the first bytes were moved.
    pub moved: Option<Moved>,
    /// Datashift: bytes of plaintext, those moved included.
    pub total: Option<u64>,
}

/// Add what makes it a re-encryption: keyslot with the largest free area, backup segments, requirement. The protection digest
/// is still to be added ([`protect`]), for it needs the keys.
///
/// When encrypting, whatever data segment the header was made with is replaced by the plain data.
///
/// # Errors
/// `NoSpace`: no keyslot number, no area. `Conflict`: one is under way. `Unsupported`: integrity, more than one data segment, other
/// requirements, a combination of mode, direction, resilience and shift that [`read`](super::read::read) does not go on with.
/// `Invalid`: sizes and offsets that do not fit each other.
pub fn begin(header: &mut Header, begin: &Begin) -> Result<Process> {
    let at = "LUKS2 re-encryption";
    if header.metadata.is_reencrypting() {
        return Err(Error::new(ErrorKind::Conflict, "a re-encryption of this volume is under way").at(at));
    }
    if let Some(other) = header.metadata.config.requirements.first() {
        return Err(Error::new(ErrorKind::Unsupported, format!("the volume requires {other}")).at(at));
    }
    let mut metadata = header.metadata.clone();
    let data: Vec<(u32, Segment)> =
        metadata.data_segments().map(|(id, segment)| (id, segment.clone())).collect();
    let [(data_id, data)] = &data[..] else {
        return Err(Error::new(ErrorKind::Unsupported, "a volume of more than one data segment").at(at));
    };
    // 1. Segments: as it is, then what it was and will be.
    let old_digest = metadata.digest_of_segment(*data_id).map(|(id, _)| id);
    let previous = match begin.mode {
        Mode::Encrypt => {
            let offset = if begin.moved.is_some() { 0 } else { begin.target.offset };
            plain(offset, begin.total.filter(|_| begin.moved.is_some()))
        }
        Mode::Reencrypt | Mode::Decrypt => data.clone(),
    };
    let now = match (begin.mode, begin.moved) {
        (Mode::Encrypt, Some(moved)) => {
            let rest = begin.total.and_then(|total| total.checked_sub(moved.bytes)).filter(|rest| *rest > 0);
            let rest = rest.map(|rest| plain(moved.bytes, Some(rest)));
            [Some(plain(moved.offset, Some(moved.bytes))), rest].into_iter().flatten().collect()
        }
        _ => vec![previous.clone()],
    };
    let old_digest = old_digest.filter(|_| begin.mode != Mode::Encrypt);
    let crypt = |digest: Option<u32>, segment: &Segment| match segment.kind {
        SegmentKind::Crypt { .. } => digest.into_iter().collect(),
        _ => Vec::new(),
    };
    let mut parts: Vec<Part> = Vec::new();
    let moved = begin.moved.and_then(|_| now.first()).map(|segment| flagged(segment, MOVED));
    for segment in now.into_iter().chain(moved).chain([flagged(&previous, PREVIOUS)]) {
        parts.push(Part { digests: crypt(old_digest, &segment), segment });
    }
    let target = flagged(&begin.target, FINAL);
    parts.push(Part { digests: crypt(begin.new_digest, &target), segment: target });
    set_segments(&mut metadata, parts);
    // 2. The keyslot.
    let area = match begin.resilience {
        // It needs none, but a keyslot has one.
        Resilience::Datashift { .. } => header.free_keyslot_area(1)?,
        _ => header.largest_free_area()?,
    };
    let object = keyslot(begin, area);
    metadata.keyslots.insert(metadata.free_keyslot()?, Keyslot::Reencrypt { area, object });
    // 3. The requirement.
    metadata.config.requirements.push(REQUIREMENT.to_owned());
    let refused = |error: Error| {
        // Nothing of it is on a disk yet, so nothing is damaged.
        let kind = if error.kind() == ErrorKind::Damaged { ErrorKind::Invalid } else { error.kind() };
        Error::new(kind, "this re-encryption cannot begin").because(error)
    };
    let process = read::process(&metadata).map_err(refused)?;
    if read::state(&metadata, &process).map_err(refused)? != (State::Clean { boundary: None }, process.total)
    {
        return Err(Error::new(ErrorKind::Unsupported, "the data is already as it shall be").at(at));
    }
    header.metadata = metadata;
    Ok(process)
}

fn plain(offset: u64, size: Option<u64>) -> Segment {
    Segment { kind: SegmentKind::Linear, offset, size, flags: Vec::new(), extra: Map::new() }
}

fn flagged(segment: &Segment, flag: &str) -> Segment {
    let mut segment = segment.clone();
    segment.flags.push(flag.to_owned());
    segment
}

fn keyslot(begin: &Begin, area: Area) -> Map<String, Value> {
    let mut fields = Map::new();
    fields.insert("offset".into(), area.offset.to_string().into());
    fields.insert("size".into(), area.size.to_string().into());
    fields.insert("type".into(), begin.resilience.name().into());
    match begin.resilience {
        Resilience::None | Resilience::Journal => {}
        Resilience::Checksum(checksum) => {
            fields.insert("hash".into(), checksum.hash.name().into());
            fields.insert("sector_size".into(), checksum.block_bytes.into());
        }
        Resilience::Datashift { shift } => drop(fields.insert("shift_size".into(), shift.to_string().into())),
    }
    let object = json!({
        "area": fields,
        "type": "reencrypt",
        // It has no key; every keyslot has this field.
        "key_size": 1,
        "mode": begin.mode.name(),
        "direction": begin.direction.name(),
        "priority": 0,
    });
    match object {
        Value::Object(object) => object,
        other => unreachable!("an object was built, not {other}"),
    }
}

/// Add the protection digest, made of [`super::digest::message`].
///
/// # Errors
/// `NoSpace`: no digest number is free.
pub fn protect(metadata: &mut Metadata, process: &mut Process, digest: Digest) -> Result<()> {
    process.protection = Some(metadata.add_digest(digest, &[process.keyslot], &[])?);
    Ok(())
}

/// A keyslot of the new key stands in for one of the old: tokens that open the one open the other, too.
pub fn carry_tokens(metadata: &mut Metadata, old_keyslot: u32, new_keyslot: u32) {
    for token in metadata.tokens.values_mut() {
        if token.keyslots.contains(&old_keyslot) && !token.keyslots.contains(&new_keyslot) {
            token.keyslots.push(new_keyslot);
        }
    }
}

fn internal(what: String) -> Error {
    Error::new(ErrorKind::Internal, what).at("LUKS2 re-encryption")
}

/// To *crash*: this hotzone is being rewritten. `total`: bytes of plaintext.
///
/// # Errors
/// `Internal`: a hotzone that does not follow the boundary, is larger than what protects it, or is cut where data units are not.
pub fn hot(metadata: &mut Metadata, process: &Process, hot: Extent, total: u64) -> Result<()> {
    let (state, process) = at(metadata, process, total)?;
    let State::Clean { boundary } = state else {
        return Err(internal(format!("no step can begin in state {state:?}")));
    };
    let boundary = boundary.unwrap_or(process.begins_at(total));
    let follows = match process.direction {
        Direction::Forward => hot.start() == boundary && hot.end() <= total,
        Direction::Backward => hot.end() == boundary,
    };
    if !follows {
        return Err(internal(format!("a hotzone of {hot} does not follow the boundary at byte {boundary}")));
    }
    install(metadata, &process, State::Crash { start: hot.start(), end: hot.end() }, hot.end() < total)
}

/// To *clean*: everything up to this boundary is new. It lies at the end of the hotzone, or within it if its step stopped early.
/// Behind the last one, [`finish`] is to follow, in the same write.
///
/// # Errors
/// `Internal`: a boundary that is none.
pub fn clean(metadata: &mut Metadata, process: &Process, boundary: u64, total: u64) -> Result<()> {
    let (state, process) = at(metadata, process, total)?;
    let is_within = match state {
        State::Crash { start, end } => (start..=end).contains(&boundary),
        State::Clean { boundary: now } => boundary == now.unwrap_or(process.begins_at(total)),
        State::Finished => boundary == process.ends_at(total),
    };
    if !is_within {
        return Err(internal(format!("a boundary at byte {boundary} in state {state:?}")));
    }
    install(metadata, &process, process.clean_at(boundary, total), true)
}

/// To *none*: one segment as it shall be, and nothing of the old key or the process: keyslots of the old digest, which are
/// returned with their areas to be overwritten, digests, requirement, backup segments. The area of the process itself
/// ([`Process::area`]) is free, too. Keyslots carried to the new key keep their own numbers.
///
/// # Errors
/// `Internal`: data is left to do.
pub fn finish(metadata: &mut Metadata, process: &Process) -> Result<Vec<(u32, Area)>> {
    let (state, _) = read::state(metadata, process)?;
    if state != State::Finished {
        return Err(internal(format!("not all is done in state {state:?}")));
    }
    let parts = layout::parts(process, State::Finished, false);
    set_segments(metadata, parts.ok_or_else(|| internal("no segment for all of the data".to_owned()))?);
    let of_old = process
        .old
        .digest
        .filter(|digest| Some(*digest) != process.new.digest)
        .and_then(|digest| metadata.digests.get(&digest))
        .map(|digest| digest.keyslots.clone())
        .unwrap_or_default();
    let mut removed = Vec::new();
    for id in of_old {
        if let Some(area) = metadata.remove_keyslot(id).and_then(|keyslot| keyslot.area()) {
            removed.push((id, area));
        }
    }
    metadata.remove_keyslot(process.keyslot);
    metadata.digests.retain(|_, digest| !digest.is_unused());
    metadata.config.requirements.retain(|name| name != REQUIREMENT);
    Ok(removed)
}

/// Where it stands, and the process with its size as the data segments have it.
fn at(metadata: &Metadata, process: &Process, total: u64) -> Result<(State, Process)> {
    let (state, fixed) = read::state(metadata, process)?;
    if fixed.is_some_and(|fixed| fixed != total) {
        return Err(internal(format!(
            "{total} bytes of data where the header has {}",
            fixed.unwrap_or_default()
        )));
    }
    Ok((state, Process { total: fixed, ..process.clone() }))
}

/// Data segments of this state, then the backup segments as they are.
fn install(metadata: &mut Metadata, process: &Process, state: State, has_tail: bool) -> Result<()> {
    read::check_numbers(process, state).map_err(|error| error.with_kind(ErrorKind::Internal))?;
    let mut parts = layout::parts(process, state, has_tail)
        .ok_or_else(|| internal(format!("no data segments can be made for state {state:?}")))?;
    let backups = Backups::of(metadata)?;
    let sides = [
        (Some(backups.previous), &process.old),
        (Some(backups.last), &process.new),
        (backups.moved, &process.old),
    ];
    for (segment, side) in sides {
        let Some(segment) = segment else { continue };
        parts.push(Part { digests: layout::backup_digests(segment, side), segment: segment.clone() });
    }
    set_segments(metadata, parts);
    Ok(())
}

/// These segments and no other, each bound to its digests and to no other.
fn set_segments(metadata: &mut Metadata, parts: Vec<Part>) {
    for digest in metadata.digests.values_mut() {
        digest.segments.clear();
    }
    let mut segments = BTreeMap::new();
    for (id, part) in (0..).zip(parts) {
        for digest in part.digests {
            if let Some(digest) = metadata.digests.get_mut(&digest) {
                digest.segments.push(id);
            }
        }
        segments.insert(id, part.segment);
    }
    metadata.segments = segments;
}

impl Checksum {
    /// Bytes of checksums for so many bytes of data.
    #[must_use]
    pub fn bytes_for(&self, data: u64) -> u64 {
        data.div_ceil(self.block_bytes.into()) * self.hash.bytes() as u64
    }
}
