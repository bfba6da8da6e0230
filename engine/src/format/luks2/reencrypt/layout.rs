//! The data segments of each state, from process and state alone: what `write` puts into the metadata, and what `read` holds
//! against those it finds there. So a state that is read is one that is written, field by field.

use serde_json::Map;

use super::valid::HOT;
use super::{Direction, Process, Side, State};
use crate::format::luks2::metadata::{Segment, SegmentKind};

/// One data segment.
pub struct Part {
    /// As on disk.
    pub segment: Segment,
    /// Digests it is bound to: none of plain data, both sides' of a hotzone between two keys. In order, without doubles.
    pub digests: Vec<u32>,
}

/// The data segments of a state, in order. `has_tail`: does data follow the hotzone? `None`: an empty segment, or numbers that no
/// device has.
pub fn parts(process: &Process, state: State, has_tail: bool) -> Option<Vec<Part>> {
    let mut parts = Vec::new();
    match (state, process.direction) {
        (State::Finished, _) => parts.push(new(process, 0, None)?),
        // As it was before anything began; its size is known if it lies in two pieces.
        (State::Clean { boundary: None }, _) => {
            old(&mut parts, process, 0, process.moved.and(process.total))?;
        }
        (State::Clean { boundary: Some(boundary) }, Direction::Forward) => {
            parts.push(new(process, 0, Some(boundary))?);
            old(&mut parts, process, boundary, process.total)?;
        }
        (State::Clean { boundary: Some(boundary) }, Direction::Backward) => {
            old(&mut parts, process, 0, Some(boundary))?;
            parts.push(new(process, boundary, process.total)?);
        }
        (State::Crash { start, end }, direction) => {
            match direction {
                _ if start == 0 => {}
                Direction::Forward => parts.push(new(process, 0, Some(start))?),
                Direction::Backward => old(&mut parts, process, 0, Some(start))?,
            }
            parts.push(hot(process, start, end)?);
            match direction {
                _ if !has_tail => {}
                Direction::Forward => old(&mut parts, process, end, process.total)?,
                Direction::Backward => parts.push(new(process, end, process.total)?),
            }
        }
    }
    Some(parts)
}

/// A segment of one side; `to`: `None` is the end of the device.
fn segment(side: &Side, from: u64, to: Option<u64>) -> Option<Segment> {
    let kind = match &side.cipher {
        None => SegmentKind::Linear,
        Some(cipher) => SegmentKind::Crypt {
            encryption: cipher.encryption.clone(),
            sector_size: cipher.sector_size,
            // The counter goes by the place in the plaintext, wherever the segment lies.
            iv_tweak: cipher.iv_tweak.checked_add(from / 512)?,
            integrity: None,
        },
    };
    let size = match to {
        None => None,
        Some(to) => Some(to.checked_sub(from).filter(|size| *size > 0)?),
    };
    Some(Segment { kind, offset: side.offset.checked_add(from)?, size, flags: Vec::new(), extra: Map::new() })
}

fn digests(segment: &Segment, of: &[Option<u32>]) -> Vec<u32> {
    let mut digests: Vec<u32> = match segment.kind {
        SegmentKind::Crypt { .. } => of.iter().flatten().copied().collect(),
        _ => Vec::new(),
    };
    digests.sort_unstable();
    digests.dedup();
    digests
}

fn new(process: &Process, from: u64, to: Option<u64>) -> Option<Part> {
    let segment = segment(&process.new, from, to)?;
    Some(Part { digests: digests(&segment, &[process.new.digest]), segment })
}

fn hot(process: &Process, start: u64, end: u64) -> Option<Part> {
    let mut segment = segment(&process.new, start, Some(end))?;
    segment.flags.push(HOT.to_owned());
    Some(Part { digests: digests(&segment, &[process.old.digest, process.new.digest]), segment })
}

/// In two pieces, if some of it was moved.
fn old(parts: &mut Vec<Part>, process: &Process, from: u64, to: Option<u64>) -> Option<()> {
    let mut push = |segment: Segment| {
        parts.push(Part { digests: digests(&segment, &[process.old.digest]), segment });
    };
    let Some(moved) = process.moved else {
        push(segment(&process.old, from, to)?);
        return Some(());
    };
    let to = to?;
    if from < moved.bytes {
        let elsewhere = Side { offset: moved.offset, ..process.old.clone() };
        push(segment(&elsewhere, from, Some(to.min(moved.bytes)))?);
    }
    if to > moved.bytes {
        push(segment(&process.old, from.max(moved.bytes), Some(to))?);
    }
    Some(())
}

/// The digests a backup segment is bound to.
pub fn backup_digests(segment: &Segment, side: &Side) -> Vec<u32> {
    digests(segment, &[side.digest])
}
