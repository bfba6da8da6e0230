//! The rules over a header as a whole, as cryptsetup's own validation has them. What one field alone can break is refused in
//! [`super::parse`].

use crate::error::{Error, ErrorKind, Result};
use crate::format::luks2::COPY_BYTES;
use crate::format::luks2::binary::BINARY_BYTES;
use crate::format::luks2::fields::invalid;
use crate::format::luks2::metadata::{Area, Keyslot, Metadata, Segment, SegmentKind};
use crate::format::luks2::reencrypt::valid as reencryption;

/// Keyslots, tokens and segments each have numbers below this.
pub const OBJECTS_MAX: u32 = 32;
/// Digests have numbers below this.
pub const DIGESTS_MAX: u32 = 8;
/// Largest keyslots area, bytes.
pub const KEYSLOTS_BYTES_MAX: u64 = 128 << 20;
/// Areas of keyslots begin at multiples of this, and the keyslots area has a multiple of it, bytes.
pub const AREA_ALIGN: u64 = 4096;
/// Stripes of every `luks1` AF splitter.
const AF_STRIPES: u32 = crate::format::af::STRIPES;

/// Is this a legal size of one header copy? 16 KiB to 4 MiB, powers of two.
#[must_use]
pub fn is_copy_bytes(bytes: u64) -> bool {
    bytes.is_power_of_two() && COPY_BYTES.contains(&bytes)
}

/// Check every rule between objects.
///
/// # Errors
/// `Invalid`, naming the object and the rule.
pub fn validate(metadata: &Metadata) -> Result<()> {
    let copy_bytes = config(metadata)?;
    references(metadata)?;
    segments(metadata)?;
    areas(metadata, copy_bytes)?;
    reencryption::check(metadata)
}

fn config(metadata: &Metadata) -> Result<u64> {
    let config = &metadata.config;
    let copy_bytes = config
        .json_size
        .checked_add(BINARY_BYTES as u64)
        .filter(|bytes| is_copy_bytes(*bytes))
        .ok_or_else(|| invalid("no legal size of a JSON area", "config json_size"))?;
    if !config.keyslots_size.is_multiple_of(AREA_ALIGN) || config.keyslots_size > KEYSLOTS_BYTES_MAX {
        return Err(invalid("not a multiple of 4096 up to 128 MiB", "config keyslots_size"));
    }
    // 2 * 4 MiB + 128 MiB at most.
    let end = 2 * copy_bytes + config.keyslots_size;
    data_behind(metadata, end)?;
    Ok(copy_bytes)
}

/// Data begins behind the keyslots area, which ends at `end`, or on another device.
///
/// A segment at 0 says that the header is detached; cryptsetup asks no more then. In its re-encryption of such a volume the
/// segments that follow lie one behind the other, wherever the header's own areas end on theirs, and while it lasts nobody writes
/// into keyslots. Any other segment in there is refused: adding or erasing keyslots would write over its data.
fn data_behind(metadata: &Metadata, end: u64) -> Result<()> {
    let is_reencrypting =
        metadata.config.requirements.iter().any(|requirement| reencryption::is_online(requirement));
    let mut behind = 0;
    let mut segments: Vec<&Segment> = metadata.data_segments().map(|(_, segment)| segment).collect();
    segments.sort_by_key(|segment| segment.offset);
    for segment in segments {
        let continues = segment.offset == behind && (behind == 0 || is_reencrypting);
        if segment.offset < end && !continues {
            return Err(invalid("the keyslots area reaches into the data", "config keyslots_size"));
        }
        behind = segment.size.and_then(|size| segment.offset.checked_add(size)).unwrap_or(u64::MAX);
    }
    Ok(())
}

fn references(metadata: &Metadata) -> Result<()> {
    let keyslots_exist =
        |keyslots: &[u32], at: &str| match keyslots.iter().find(|id| !metadata.keyslots.contains_key(id)) {
            Some(missing) => Err(invalid(format!("there is no keyslot {missing}"), at)),
            None => Ok(()),
        };
    for (id, token) in &metadata.tokens {
        keyslots_exist(&token.keyslots, &format!("token {id} keyslots"))?;
    }
    for (id, digest) in &metadata.digests {
        keyslots_exist(&digest.keyslots, &format!("digest {id} keyslots"))?;
        if let Some(missing) = digest.segments.iter().find(|id| !metadata.segments.contains_key(id)) {
            return Err(invalid(format!("there is no segment {missing}"), &format!("digest {id} segments")));
        }
    }
    Ok(())
}

/// The end of a segment of known size, bytes.
fn end(segment: &Segment, at: &str) -> Result<Option<u64>> {
    let end = |size| segment.offset.checked_add(size).ok_or_else(|| invalid("offset and size overflow", at));
    segment.size.map(end).transpose()
}

fn segments(metadata: &Metadata) -> Result<()> {
    if metadata.segments.is_empty() {
        return Err(invalid("there is no segment", "segments"));
    }
    for (expected, id) in (0_u32..).zip(metadata.segments.keys()) {
        if *id != expected {
            return Err(invalid(format!("segment {expected} is missing"), "segments"));
        }
    }
    for (id, segment) in &metadata.segments {
        one_segment(metadata, *id, segment, &format!("segment {id}"))?;
    }
    if metadata
        .segments
        .values()
        .skip_while(|segment| !segment.is_backup())
        .any(|segment| !segment.is_backup())
    {
        return Err(invalid("a data segment after a backup-* segment", "segments"));
    }
    let regular: Vec<_> = metadata.data_segments().collect();
    let Some((last, _)) = regular.last() else {
        return Err(invalid("there are backup-* segments only", "segments"));
    };
    for (id, segment) in &regular {
        let at = format!("segment {id}");
        let end_of_this = end(segment, &at)?;
        if end_of_this.is_none() && id != last {
            return Err(invalid("only the last data segment may have the size dynamic", &at));
        }
        for (other_id, other) in regular.iter().filter(|(other, _)| other > id) {
            let end_of_other = end(other, &format!("segment {other_id}"))?;
            let before = end_of_this.is_some_and(|end| end <= other.offset);
            let after = end_of_other.is_some_and(|end| end <= segment.offset);
            if !before && !after {
                return Err(invalid(format!("overlaps segment {other_id}"), &at));
            }
        }
    }
    Ok(())
}

fn one_segment(metadata: &Metadata, id: u32, segment: &Segment, at: &str) -> Result<()> {
    if !segment.offset.is_multiple_of(512) {
        return Err(invalid("offset is not a multiple of 512", at));
    }
    if segment.size.is_some_and(|size| size == 0 || size % 512 != 0) {
        return Err(invalid("size is not a multiple of 512", at));
    }
    let SegmentKind::Crypt { sector_size, .. } = segment.kind else { return Ok(()) };
    if ![512, 1024, 2048, 4096].contains(&sector_size) {
        return Err(invalid("sector_size is not 512, 1024, 2048 or 4096", at));
    }
    if segment.size.is_some_and(|size| size % u64::from(sector_size) != 0) {
        return Err(invalid("size is not a multiple of sector_size", at));
    }
    if metadata.digest_of_segment(id).is_none() {
        return Err(invalid("no digest checks its key", at));
    }
    Ok(())
}

fn areas(metadata: &Metadata, copy_bytes: u64) -> Result<()> {
    let begin = 2 * copy_bytes;
    let limit = begin + metadata.config.keyslots_size;
    let mut areas: Vec<(u32, Area)> = Vec::new();
    for (id, keyslot) in &metadata.keyslots {
        let at = format!("keyslot {id}");
        let area = keyslot.area().ok_or_else(|| invalid("field area is missing", &at))?;
        let end = area.end().ok_or_else(|| invalid("area offset and size overflow", &at))?;
        if area.size == 0 {
            return Err(invalid("area is empty", &at));
        }
        if area.offset < begin || end > limit {
            return Err(invalid("area is outside the keyslots area", &at));
        }
        for (other, taken) in &areas {
            if area.overlaps(*taken) {
                return Err(invalid(format!("area overlaps that of keyslot {other}"), &at));
            }
        }
        areas.push((*id, area));
        if let Keyslot::Luks2(_) = keyslot {
            luks2_keyslot(metadata, *id, &at)?;
        }
    }
    Ok(())
}

fn luks2_keyslot(metadata: &Metadata, id: u32, at: &str) -> Result<()> {
    let Some(Keyslot::Luks2(keyslot)) = metadata.keyslots.get(&id) else { return Ok(()) };
    if metadata.digests.values().filter(|digest| digest.keyslots.contains(&id)).count() != 1 {
        return Err(invalid("not exactly one digest checks its key", at));
    }
    if keyslot.key_size == 0 || keyslot.area_key_size == 0 {
        return Err(invalid("a key size of 0", at));
    }
    if keyslot.af_stripes != AF_STRIPES {
        return Err(invalid("af stripes is not 4000", at));
    }
    if keyslot.area.size < crate::format::af::material_bytes(keyslot.key_size) {
        return Err(invalid("area is smaller than its key material", at));
    }
    Ok(())
}

/// The JSON text does not fit its area.
pub fn too_long(bytes: usize, room: u64) -> Error {
    Error::new(
        ErrorKind::NoSpace,
        format!("the metadata of {bytes} bytes does not fit the {room} bytes of its area"),
    )
    .hint("remove tokens or keyslots, or make a new header with a larger metadata area")
}
