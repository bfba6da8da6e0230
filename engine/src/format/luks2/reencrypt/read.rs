//! From metadata: what is under way, every rule checked. A header whose re-encryption breaks one is refused as a whole, for
//! whoever can change metadata could otherwise have data rewritten under a key of his choice, or not at all (CVE-2021-4122).
//!
//! The state is guessed from few numbers (how many data segments, where the flagged one lies); then the data segments of
//! that state are laid out anew, and each must be what was found, with its digests.

use super::layout::{self, Part};
use super::valid::{FINAL, HOT, MOVED, PREVIOUS, REQUIREMENT, TO_THE_FRONT, UNPROVEN, is_online};
use super::{Checksum, Direction, Mode, Moved, Process, Resilience, Side, SideCipher, State};
use crate::crypto::hash::Hash;
use crate::error::{Error, ErrorKind, Result};
use crate::format::luks2::fields::{Fields, invalid};
use crate::format::luks2::metadata::{Area, Keyslot, Metadata, Segment, SegmentKind};
use crate::format::luks2::validate::AREA_ALIGN;

/// The re-encryption a header speaks of, if any.
///
/// # Errors
/// `Damaged`: metadata that no step of any re-encryption leaves behind, naming the rule. `Unsupported`: kinds this build does not
/// go on with, named, with who can.
pub fn read(metadata: &Metadata) -> Result<Option<(Process, State)>> {
    if !is_required(metadata)? {
        return Ok(None);
    }
    let mut process = process(metadata)?;
    process.protection = Some(protection(metadata, &process)?);
    let (state, total) = state(metadata, &process)?;
    process.total = total;
    Ok(Some((process, state)))
}

fn damaged(rule: impl Into<String>, at: &str) -> Error {
    invalid(rule, at).as_damage()
}

fn unsupported(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unsupported, what)
        .at("LUKS2 re-encryption")
        .hint("cryptsetup reencrypt --resume-only can finish it")
}

/// What a program must know of: of all re-encryptions, and of nothing else.
fn is_required(metadata: &Metadata) -> Result<bool> {
    let requirements = &metadata.config.requirements;
    if requirements.iter().any(|name| name == "offline-reencrypt") {
        return Err(Error::new(ErrorKind::Unsupported, "an offline re-encryption of an old cryptsetup")
            .at("LUKS2 re-encryption")
            .hint("finish it with the program and the log file it was begun with"));
    }
    let online: Vec<&str> = requirements.iter().map(String::as_str).filter(|name| is_online(name)).collect();
    let at = "config requirements";
    match online[..] {
        [] if keyslots(metadata).next().is_some() => {
            return Err(damaged("a reencrypt keyslot without the requirement", "keyslots"));
        }
        [] => return Ok(false),
        [REQUIREMENT] => {}
        // CVE-2021-4122: nothing proves that it is what was begun.
        [UNPROVEN] => {
            return Err(damaged(
                "a re-encryption of before cryptsetup 2.4.3, without a digest that proves it",
                at,
            )
            .hint("cryptsetup repair converts it, with a passphrase; then resume it"));
        }
        [TO_THE_FRONT] => {
            return Err(unsupported(
                "decryption that also moves the data to the front (online-reencrypt-v3)",
            ));
        }
        [other] => return Err(unsupported(format!("a re-encryption of a newer kind ({other})"))),
        _ => return Err(damaged("more than one online-reencrypt requirement", at)),
    }
    match requirements.iter().find(|name| *name != REQUIREMENT) {
        None => Ok(true),
        Some(other) => Err(unsupported(format!("the volume also requires {other}"))),
    }
}

fn keyslots(metadata: &Metadata) -> impl Iterator<Item = (u32, Area, Fields<'_>)> {
    metadata.keyslots.iter().filter_map(|(id, keyslot)| match keyslot {
        Keyslot::Reencrypt { area, object } => {
            Some((*id, *area, Fields::of_object(format!("keyslot {id}"), object)))
        }
        _ => None,
    })
}

/// All that is settled; neither [`Process::total`] of a dynamic size nor [`Process::protection`] yet.
pub(super) fn process(metadata: &Metadata) -> Result<Process> {
    let mut found = keyslots(metadata);
    let (Some((id, area, fields)), None) = (found.next(), found.next()) else {
        return Err(damaged("not exactly one reencrypt keyslot", "keyslots"));
    };
    let at = format!("keyslot {id}");
    let damage = Error::as_damage;
    if fields.u32("key_size").map_err(damage)? != 1 {
        return Err(damaged("key_size is not 1", &at));
    }
    let name = fields.text("mode").map_err(damage)?;
    let mode = Mode::ALL
        .into_iter()
        .find(|mode| mode.name() == name)
        .ok_or_else(|| damaged("mode is not reencrypt, encrypt or decrypt", &at))?;
    let direction = match fields.text("direction").map_err(damage)? {
        "forward" => Direction::Forward,
        "backward" => Direction::Backward,
        _ => return Err(damaged("direction is not forward or backward", &at)),
    };
    check_area(metadata, area, &at)?;
    let resilience = resilience(&fields.child("area").map_err(damage)?).map_err(damage)?;
    let backups = Backups::of(metadata)?;
    let side = |id: u32, segment: &Segment| side(metadata, id, segment);
    let process = Process {
        keyslot: id,
        mode,
        direction,
        resilience,
        area,
        old: side(backups.previous_id, backups.previous)?,
        new: side(backups.last_id, backups.last)?,
        moved: backups.moved.map(moved).transpose()?,
        total: backups.previous.size,
        protection: None,
    };
    check_sides(&process, &backups)?;
    check_backup_digests(metadata, &process, &backups)?;
    check_shift(&process)?;
    Ok(process)
}

fn check_area(metadata: &Metadata, area: Area, at: &str) -> Result<()> {
    let begin = metadata.config.json_size.saturating_add(AREA_ALIGN).saturating_mul(2);
    let end = begin.saturating_add(metadata.config.keyslots_size);
    if area.size == 0 || area.offset < begin || area.end().is_none_or(|last| last > end) {
        return Err(damaged("area is outside the keyslots area", at));
    }
    if !area.offset.is_multiple_of(AREA_ALIGN) || !area.size.is_multiple_of(AREA_ALIGN) {
        return Err(damaged("area is not at a multiple of 4096 bytes", at));
    }
    Ok(())
}

fn resilience(area: &Fields<'_>) -> Result<Resilience> {
    Ok(match area.text("type")? {
        "none" => Resilience::None,
        "journal" => Resilience::Journal,
        "checksum" => {
            let block_bytes = area.u32("sector_size")?;
            if block_bytes < 512 || !block_bytes.is_power_of_two() {
                return Err(area.wrong_field("sector_size", "not a power of two of at least 512"));
            }
            Resilience::Checksum(Checksum { hash: Hash::from_name(area.text("hash")?)?, block_bytes })
        }
        "datashift" => {
            let shift = area.u64("shift_size")?;
            if shift == 0 || !shift.is_multiple_of(512) {
                return Err(area.wrong_field("shift_size", "not a multiple of 512 bytes"));
            }
            Resilience::Datashift { shift }
        }
        kind @ ("datashift-checksum" | "datashift-journal") => {
            return Err(unsupported(format!("a re-encryption with resilience {kind}")));
        }
        _ => return Err(area.wrong_field("type", "not a known resilience")),
    })
}

/// The segments that say how it was and how it will be.
pub(super) struct Backups<'a> {
    pub previous_id: u32,
    pub previous: &'a Segment,
    pub last_id: u32,
    pub last: &'a Segment,
    pub moved_id: Option<u32>,
    pub moved: Option<&'a Segment>,
}

impl<'a> Backups<'a> {
    pub fn of(metadata: &'a Metadata) -> Result<Self> {
        const FLAGS: [&str; 3] = [PREVIOUS, FINAL, MOVED];
        let mut found: [Option<(u32, &Segment)>; 3] = [None; 3];
        for (id, segment) in metadata.segments.iter().filter(|(_, segment)| segment.is_backup()) {
            let at = format!("segment {id}");
            if segment.flags.iter().any(|flag| flag == HOT) {
                return Err(damaged("a backup segment is flagged in-reencryption", &at));
            }
            let mut flags = segment.flags.iter().filter(|flag| flag.starts_with("backup-"));
            let (Some(flag), None) = (flags.next(), flags.next()) else {
                return Err(damaged("more than one backup flag", &at));
            };
            let Some(place) = FLAGS.iter().position(|known| known == flag) else {
                return Err(unsupported(format!("segment {id} is flagged {flag}")));
            };
            if found[place].replace((*id, segment)).is_some() {
                return Err(damaged(format!("there is another {flag} segment"), &at));
            }
        }
        let missing = |flag: &str| damaged(format!("there is no {flag} segment"), "segments");
        let [previous, last, moved] = found;
        let (previous_id, previous) = previous.ok_or_else(|| missing(FLAGS[0]))?;
        let (last_id, last) = last.ok_or_else(|| missing(FLAGS[1]))?;
        Ok(Self {
            previous_id,
            previous,
            last_id,
            last,
            moved_id: moved.map(|(id, _)| id),
            moved: moved.map(|(_, segment)| segment),
        })
    }
}

/// Digests that list a segment, in order.
fn digests_of(metadata: &Metadata, segment: u32) -> Vec<u32> {
    let lists = metadata.digests.iter().filter(|(_, digest)| digest.segments.contains(&segment));
    lists.map(|(id, _)| *id).collect()
}

fn side(metadata: &Metadata, id: u32, segment: &Segment) -> Result<Side> {
    let at = format!("segment {id}");
    let cipher = match &segment.kind {
        SegmentKind::Linear => None,
        SegmentKind::Crypt { integrity: Some(_), .. } => {
            return Err(unsupported(format!("segment {id} has integrity")));
        }
        SegmentKind::Crypt { encryption, sector_size, iv_tweak, integrity: None } => Some(SideCipher {
            encryption: encryption.clone(),
            sector_size: *sector_size,
            iv_tweak: *iv_tweak,
        }),
        SegmentKind::Unknown(kind) => return Err(unsupported(format!("segment {id} is of type {kind}"))),
    };
    // Everybody counts from the start of the plaintext while it is under way.
    if cipher.as_ref().is_some_and(|cipher| cipher.iv_tweak != 0) {
        return Err(unsupported(format!("the counter of segment {id} does not begin at 0")));
    }
    let digest = match (&cipher, &digests_of(metadata, id)[..]) {
        (None, []) => None,
        (Some(_), [digest]) => Some(*digest),
        (None, _) => return Err(damaged("a digest for plain data", &at)),
        (Some(_), _) => return Err(damaged("not exactly one digest checks its key", &at)),
    };
    Ok(Side { offset: segment.offset, cipher, digest })
}

fn moved(segment: &Segment) -> Result<Moved> {
    match (&segment.kind, segment.size) {
        (SegmentKind::Linear, Some(bytes)) => Ok(Moved { bytes, offset: segment.offset }),
        (SegmentKind::Linear, None) => Err(damaged("size is dynamic", MOVED)),
        _ => Err(unsupported("encrypted data that was moved first")),
    }
}

fn check_sides(process: &Process, backups: &Backups<'_>) -> Result<()> {
    let plain = [process.old.cipher.is_none(), process.new.cipher.is_none()];
    let expected = match process.mode {
        Mode::Reencrypt => [false, false],
        Mode::Encrypt => [true, false],
        Mode::Decrypt => [false, true],
    };
    if plain != expected {
        let what = format!("mode {} with backup segments of other types", process.mode.name());
        return Err(damaged(what, "segments"));
    }
    if backups.last.size.is_some() {
        return Err(damaged("size is not dynamic", FINAL));
    }
    let unit = process.unit_bytes();
    if let Resilience::Checksum(checksum) = process.resilience
        && u64::from(checksum.block_bytes) < unit
    {
        return Err(damaged("area sector_size is less than a sector of the data", "keyslots"));
    }
    if process.total.is_some_and(|total| !total.is_multiple_of(unit)) {
        return Err(damaged("size is not a multiple of both sector sizes", PREVIOUS));
    }
    Ok(())
}

fn check_backup_digests(metadata: &Metadata, process: &Process, backups: &Backups<'_>) -> Result<()> {
    // Those of the sides were looked at when these were made of them.
    let (Some(id), Some(segment)) = (backups.moved_id, backups.moved) else { return Ok(()) };
    if digests_of(metadata, id) != layout::backup_digests(segment, &process.old) {
        return Err(damaged("other digests than those of backup-previous", &format!("segment {id}")));
    }
    Ok(())
}

/// Data that moves: of all that is thinkable, encryption from the end with the first bytes out of the header's way.
fn check_shift(process: &Process) -> Result<()> {
    let Resilience::Datashift { shift } = process.resilience else {
        if process.moved.is_some() {
            return Err(damaged("a backup-moved-segment and no datashift", "segments"));
        }
        if process.total.is_some() {
            return Err(unsupported("a volume of a fixed size"));
        }
        if process.old.offset != process.new.offset {
            return Err(damaged("offset is not that of backup-final", PREVIOUS));
        }
        return Ok(());
    };
    let mode = process.mode.name();
    let (Mode::Encrypt, Direction::Backward, Some(moved)) = (process.mode, process.direction, process.moved)
    else {
        let direction = process.direction.name();
        return Err(unsupported(format!("resilience datashift in mode {mode}, {direction}")));
    };
    let Some(total) = process.total else {
        return Err(damaged("size is dynamic", PREVIOUS));
    };
    if !shift.is_multiple_of(process.unit_bytes()) {
        return Err(damaged("area shift_size is not a multiple of both sector sizes", "keyslots"));
    }
    if process.old.offset.checked_add(shift) != Some(process.new.offset) {
        return Err(damaged("data shifts by something else than area shift_size", "segments"));
    }
    if process.old.offset != 0 {
        return Err(damaged("offset is not 0", PREVIOUS));
    }
    if moved.bytes != shift.min(total) {
        return Err(damaged("size is not what the data shifts by", MOVED));
    }
    // It is the last to be read: nothing may be written over it.
    if process.new.offset.checked_add(total).is_none_or(|end| end > moved.offset) {
        return Err(damaged("it lies where encrypted data shall be", MOVED));
    }
    if moved.offset.checked_add(moved.bytes).is_none() {
        return Err(damaged("offset and size overflow", MOVED));
    }
    Ok(())
}

fn protection(metadata: &Metadata, process: &Process) -> Result<u32> {
    let at = format!("keyslot {}", process.keyslot);
    let lists = metadata.digests.iter().filter(|(_, digest)| digest.keyslots.contains(&process.keyslot));
    let found: Vec<u32> = lists.map(|(id, _)| *id).collect();
    let [id] = found[..] else {
        let rule = if found.is_empty() { "no digest proves what was begun" } else { "more than one digest" };
        return Err(damaged(rule, &at).hint("cryptsetup repair makes it anew, with a passphrase"));
    };
    let digest = &metadata.digests[&id];
    if digest.keyslots.len() != 1 || !digest.segments.is_empty() {
        return Err(damaged(format!("digest {id} checks a key, and is no proof of what was begun"), &at));
    }
    if digest.kind != "pbkdf2" {
        return Err(unsupported(format!("digest {id} is of type {}", digest.kind)));
    }
    Ok(id)
}

/// Where it stands, by the data segments, and how many bytes of plaintext there are if these say so.
pub(super) fn state(metadata: &Metadata, process: &Process) -> Result<(State, Option<u64>)> {
    let regular: Vec<(u32, &Segment)> = metadata.data_segments().collect();
    if let Some((id, segment)) = regular.iter().find(|(_, segment)| !is_known(&segment.kind)) {
        return Err(unsupported(format!("segment {id} is of an unknown type, or has integrity"))
            .at(format_args!("LUKS2 segment {id}, offset {}", segment.offset)));
    }
    let mut hot = (0..).zip(&regular).filter(|(_, (_, segment))| is_hot(segment)).map(|(place, _)| place);
    let (hot, other) = (hot.next(), hot.next());
    if other.is_some() {
        return Err(damaged("more than one is flagged in-reencryption", "segments"));
    }
    let mut process = process.clone();
    let (state, has_tail) = match hot {
        Some(place) => (crash(&process, &regular, place)?, place + 1 < regular.len()),
        None => (clean(metadata, &process, &regular)?, true),
    };
    if process.moved.is_none() {
        process.total = fixed_total(&process, &regular, state, has_tail)?;
    }
    check_numbers(&process, state)?;
    let Some(expected) = layout::parts(&process, state, has_tail) else {
        return Err(damaged("sizes and offsets that no device has", "segments"));
    };
    match difference(metadata, &regular, &expected) {
        None => Ok((state, process.total)),
        Some((id, rule)) => Err(damaged(rule, &format!("segment {id}"))),
    }
}

fn is_known(kind: &SegmentKind) -> bool {
    matches!(kind, SegmentKind::Linear | SegmentKind::Crypt { integrity: None, .. })
}

fn is_hot(segment: &Segment) -> bool {
    segment.flags.iter().any(|flag| flag == HOT)
}

/// A size that must be there.
fn size((id, segment): (u32, &Segment)) -> Result<u64> {
    segment.size.ok_or_else(|| damaged("size is dynamic", &format!("segment {id}")))
}

fn crash(process: &Process, regular: &[(u32, &Segment)], place: usize) -> Result<State> {
    let (id, segment) = regular[place];
    let at = format!("segment {id}");
    let start = segment.offset.checked_sub(process.new.offset);
    let start = start.ok_or_else(|| damaged("offset is less than that of backup-final", &at))?;
    let end = start.checked_add(size(regular[place])?);
    Ok(State::Crash { start, end: end.ok_or_else(|| damaged("offset and size overflow", &at))? })
}

fn clean(metadata: &Metadata, process: &Process, regular: &[(u32, &Segment)]) -> Result<State> {
    let begun = State::Clean { boundary: None };
    let is = |state| {
        layout::parts(process, state, true)
            .is_some_and(|parts| difference(metadata, regular, &parts).is_none())
    };
    if is(State::Finished) {
        return Ok(State::Finished);
    }
    if process.moved.is_some() {
        let plain = regular.iter().filter(|(_, segment)| segment.kind == SegmentKind::Linear);
        let plain: Vec<u64> = plain.map(|segment| size(*segment)).collect::<Result<_>>()?;
        let boundary = plain.iter().try_fold(0_u64, |sum, size| sum.checked_add(*size));
        let boundary = boundary.ok_or_else(|| damaged("sizes overflow", "segments"))?;
        return Ok(match boundary {
            _ if plain.len() == regular.len() => begun,
            boundary => State::Clean { boundary: Some(boundary) },
        });
    }
    match regular {
        // One that is neither as it was nor as it will be is told apart by the difference to what it was.
        [_] => Ok(begun),
        [first, _] => Ok(State::Clean { boundary: Some(size(*first)?) }),
        _ => Err(damaged("more data segments than any step leaves behind", "segments")),
    }
}

/// cryptsetup was told a device size: then what lies behind the boundary has one.
fn fixed_total(
    process: &Process,
    regular: &[(u32, &Segment)],
    state: State,
    has_tail: bool,
) -> Result<Option<u64>> {
    let (Some((id, segment)), State::Clean { boundary: Some(_) } | State::Crash { .. }, true) =
        (regular.last(), state, has_tail)
    else {
        return Ok(None);
    };
    let Some(size) = segment.size else { return Ok(None) };
    // Both sides begin at one place when nothing moves.
    let total = segment.offset.checked_sub(process.new.offset).and_then(|from| from.checked_add(size));
    total
        .map(Some)
        .ok_or_else(|| damaged("offset is less than that of backup-final", &format!("segment {id}")))
}

/// Rules for the numbers of a state, before segments are made of them.
pub(super) fn check_numbers(process: &Process, state: State) -> Result<()> {
    let unit = process.unit_bytes();
    let check = |holds: bool, rule: &str| {
        if holds { Ok(()) } else { Err(damaged(rule, "segments")) }
    };
    let aligned = |bytes: u64| bytes.is_multiple_of(unit);
    let total = process.total;
    check(total.is_none_or(aligned), "the data is not a multiple of both sector sizes")?;
    match state {
        State::Finished | State::Clean { boundary: None } => Ok(()),
        State::Clean { boundary: Some(boundary) } => {
            check(aligned(boundary), "the boundary is not a multiple of both sector sizes")?;
            check(
                boundary > 0 && total.is_none_or(|total| boundary < total),
                "the boundary is not within the data",
            )?;
            let moved = process.moved.map_or(0, |moved| moved.bytes);
            check(boundary >= moved, "the boundary is within the segment that was moved")
        }
        State::Crash { start, end } => {
            check(aligned(start) && aligned(end), "the hotzone is not a multiple of both sector sizes")?;
            check(
                start < end && total.is_none_or(|total| end <= total),
                "the hotzone is not within the data",
            )?;
            let max = process.hotzone_max();
            check(max.is_none_or(|max| end - start <= max), "the hotzone is larger than what protects it")?;
            let moved = process.moved.map_or(0, |moved| moved.bytes);
            check(
                start >= moved || (start, end) == (0, moved),
                "the hotzone is partly within the segment that was moved",
            )
        }
    }
}

/// The first data segment that is not as it should be: its number, and how.
fn difference(metadata: &Metadata, regular: &[(u32, &Segment)], expected: &[Part]) -> Option<(u32, String)> {
    for ((id, segment), part) in regular.iter().zip(expected) {
        let rule = different(segment, &part.segment).or_else(|| {
            (digests_of(metadata, *id) != part.digests)
                .then(|| format!("it is not bound to the digests {:?} and no other", part.digests))
        });
        if let Some(rule) = rule {
            return Some((*id, rule));
        }
    }
    match regular.get(expected.len()) {
        Some((id, _)) => Some((*id, "there is no such segment in this state".to_owned())),
        None if regular.len() < expected.len() => {
            let next = regular.len();
            Some((u32::try_from(next).unwrap_or(u32::MAX), "it is missing in this state".to_owned()))
        }
        None => None,
    }
}

/// Unknown flags and fields mean nothing.
fn different(found: &Segment, expected: &Segment) -> Option<String> {
    if is_hot(found) != is_hot(expected) {
        return Some("another one should be flagged in-reencryption".to_owned());
    }
    match (&found.kind, &expected.kind) {
        (
            SegmentKind::Crypt { encryption, sector_size, iv_tweak, .. },
            SegmentKind::Crypt { encryption: cipher, sector_size: sector, iv_tweak: tweak, .. },
        ) => {
            if encryption != cipher || sector_size != sector {
                return Some(format!("its cipher is not {cipher} with sectors of {sector} bytes"));
            }
            if iv_tweak != tweak {
                return Some(format!("iv_tweak is not {tweak}"));
            }
        }
        (SegmentKind::Linear, SegmentKind::Linear) => {}
        (_, SegmentKind::Linear) => return Some("its type is not linear".to_owned()),
        _ => return Some("its type is not crypt".to_owned()),
    }
    if found.offset != expected.offset {
        return Some(format!("offset is not {}", expected.offset));
    }
    match (found.size == expected.size, expected.size) {
        (true, _) => None,
        (false, Some(size)) => Some(format!("size is not {size}")),
        (false, None) => Some("size is not dynamic".to_owned()),
    }
}
