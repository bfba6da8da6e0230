//! An interrupted step made whole; the table of what is done when.
//!
//! # What is done when
//! First the header alone, then (with keys) its protection digest decide; an input that is not named does not matter. `-`: any.
//!
//! | requirement | state | protection | area | digest | what is done |
//! |---|---|---|---|---|---|
//! | none | at rest, finished | - | - | - | nothing: no re-encryption is under way |
//! | none | crash | - | - | - | refused: a segment says so, and no requirement |
//! | old | - | - | - | - | refused: anybody could have changed such metadata (CVE-2021-4122) |
//! | v3 | - | - | - | - | refused: a kind of this name only cryptsetup goes on with |
//! | v2 | - | - | - | missing | refused: as old |
//! | v2 | - | - | - | wrong | refused: the metadata is not what was begun |
//! | v2 | at rest, crash | - | - | unknowable | refused: the old key is gone while it is still needed |
//! | v2 | finished | - | - | unknowable, right | taken down: all data is new |
//! | v2 | at rest | - | - | right | gone on with |
//! | v2 | crash | none | - | right | refused: what is old and what is new in the step cannot be known |
//! | v2 | crash | checksum, journal | too small | right | refused: no step that this area protects is so long |
//! | v2 | crash | checksum | fits | right | blocks with their stored hash are old, and rewritten; others are new |
//! | v2 | crash | journal | fits | right | all of the step is rewritten from the area |
//! | v2 | crash | datashift | - | right | all of the step is rewritten from where it was |
//!
//! *Unknowable*: the header has no keyslot of the old key any more, so the digest over both keys cannot be made. cryptsetup destroys old
//! keyslots one by one when all data is new, before it takes the requirement away; a header of ours never looks so.
//!
//! # Recovery
//! 1. Each block of the hotzone that is old is made new (above). What tells old from new, or the source, is not written to, and
//!    what is written depends on nothing that is: so it can be cut off and done again from the beginning any number of times.
//! 2. The data is flushed.
//! 3. The header says *clean* (or, behind the last step, that all is over), durably.
//!
//! Memory does not depend on the length of the hotzone: it is done in pieces of 1 MiB, so hotzones of 1 GiB, as cryptsetup makes them,
//! are no matter.

use zeroize::Zeroizing;

use crate::backend::blocking::Blocking;
use crate::crypto::{Kernel, SectorCipher, bytes_equal};
use crate::error::{Error, ErrorKind, Result};
use crate::format::luks2::Loaded;
use crate::format::luks2::metadata::Metadata;
use crate::format::luks2::reencrypt::{self as format, Checksum, Direction, Process, State};
use crate::units::{DataUnit, Extent};
use crate::volume::reencrypt::{Side, luks};

/// Bytes rewritten at a time.
const PIECE: usize = 1 << 20;

/// What the header requires of who touches it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Requirement {
    /// Nothing about re-encryption.
    None,
    /// `online-reencrypt` or `offline-reencrypt`: metadata without a protection digest.
    Old,
    /// `online-reencrypt-v2`.
    Two,
    /// `online-reencrypt-v3`.
    Three,
}

/// [`State`] without its numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Nothing is being rewritten.
    Rest,
    /// A step was interrupted.
    Crash,
    /// All data is new.
    Finished,
}

/// [`format::Resilience`] without its numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Means {
    /// Nothing was saved.
    None,
    /// Hashes were.
    Checksum,
    /// The old bytes were.
    Journal,
    /// The old bytes are where they were.
    Datashift,
}

/// Can the area hold what would be needed for the interrupted step?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// Yes, or nothing is needed.
    Fits,
    /// No.
    TooSmall,
}

/// The digest over keys and metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proof {
    /// It is that of these keys and this metadata.
    Right,
    /// It is another one.
    Wrong,
    /// There is none.
    Missing,
    /// No keyslot of the old key is left.
    Unknowable,
}

/// All that decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// Of the header.
    pub requirement: Requirement,
    /// Of the segments.
    pub phase: Phase,
    /// Of the re-encryption's keyslot.
    pub means: Means,
    /// Of its area.
    pub room: Room,
    /// Of the keys.
    pub proof: Proof,
}

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// No re-encryption is under way.
    Nothing,
    /// From the boundary on.
    GoOn,
    /// Only the metadata is left to be taken down.
    TakeDown,
    /// Recover: rewrite blocks whose hash is the stored one.
    RewriteOldBlocks,
    /// Recover: rewrite all from the area.
    RewriteFromJournal,
    /// Recover: rewrite all from where it was.
    RewriteFromSource,
    /// Nothing is written.
    Refuse(Refusal),
}

/// Why nothing is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// A segment is in re-encryption and the header does not require anybody to know.
    Contradiction,
    /// Metadata of old, without a digest.
    Unprotected,
    /// `online-reencrypt-v3`.
    Unsupported,
    /// The digest is not that of the metadata.
    Forged,
    /// No keyslot of the old key, which is needed.
    KeyGone,
    /// Nothing was saved.
    Lost,
    /// The step is longer than the area can protect.
    TooLong,
}

/// A row of the table: sets of inputs, and what is done for all of their combinations.
struct Row {
    requirement: &'static [Requirement],
    phase: &'static [Phase],
    means: &'static [Means],
    room: &'static [Room],
    proof: &'static [Proof],
    decision: Decision,
}

const ANY_PHASE: &[Phase] = &[Phase::Rest, Phase::Crash, Phase::Finished];
const ANY_MEANS: &[Means] = &[Means::None, Means::Checksum, Means::Journal, Means::Datashift];
const ANY_ROOM: &[Room] = &[Room::Fits, Room::TooSmall];
const ANY_PROOF: &[Proof] = &[Proof::Right, Proof::Wrong, Proof::Missing, Proof::Unknowable];
const TWO: &[Requirement] = &[Requirement::Two];
const CRASH: &[Phase] = &[Phase::Crash];
const RIGHT: &[Proof] = &[Proof::Right];

/// One that matches everything.
const ANY: Row = Row {
    requirement: &[],
    phase: ANY_PHASE,
    means: ANY_MEANS,
    room: ANY_ROOM,
    proof: ANY_PROOF,
    decision: Decision::Nothing,
};

/// The table of the module's head; every input is in exactly one row.
const TABLE: &[Row] = &[
    Row { requirement: &[Requirement::None], phase: &[Phase::Rest, Phase::Finished], ..ANY },
    Row {
        requirement: &[Requirement::None],
        phase: CRASH,
        decision: Decision::Refuse(Refusal::Contradiction),
        ..ANY
    },
    Row { requirement: &[Requirement::Old], decision: Decision::Refuse(Refusal::Unprotected), ..ANY },
    Row { requirement: &[Requirement::Three], decision: Decision::Refuse(Refusal::Unsupported), ..ANY },
    Row {
        requirement: TWO,
        proof: &[Proof::Missing],
        decision: Decision::Refuse(Refusal::Unprotected),
        ..ANY
    },
    Row { requirement: TWO, proof: &[Proof::Wrong], decision: Decision::Refuse(Refusal::Forged), ..ANY },
    Row {
        requirement: TWO,
        phase: &[Phase::Rest, Phase::Crash],
        proof: &[Proof::Unknowable],
        decision: Decision::Refuse(Refusal::KeyGone),
        ..ANY
    },
    Row {
        requirement: TWO,
        phase: &[Phase::Finished],
        proof: &[Proof::Right, Proof::Unknowable],
        decision: Decision::TakeDown,
        ..ANY
    },
    Row { requirement: TWO, phase: &[Phase::Rest], proof: RIGHT, decision: Decision::GoOn, ..ANY },
    Row {
        requirement: TWO,
        phase: CRASH,
        means: &[Means::None],
        proof: RIGHT,
        decision: Decision::Refuse(Refusal::Lost),
        ..ANY
    },
    Row {
        requirement: TWO,
        phase: CRASH,
        means: &[Means::Checksum, Means::Journal],
        room: &[Room::TooSmall],
        proof: RIGHT,
        decision: Decision::Refuse(Refusal::TooLong),
    },
    Row {
        requirement: TWO,
        phase: CRASH,
        means: &[Means::Checksum],
        room: &[Room::Fits],
        proof: RIGHT,
        decision: Decision::RewriteOldBlocks,
    },
    Row {
        requirement: TWO,
        phase: CRASH,
        means: &[Means::Journal],
        room: &[Room::Fits],
        proof: RIGHT,
        decision: Decision::RewriteFromJournal,
    },
    Row {
        requirement: TWO,
        phase: CRASH,
        means: &[Means::Datashift],
        proof: RIGHT,
        decision: Decision::RewriteFromSource,
        ..ANY
    },
];

impl Row {
    fn holds(&self, facts: &Facts) -> bool {
        self.requirement.contains(&facts.requirement)
            && self.phase.contains(&facts.phase)
            && self.means.contains(&facts.means)
            && self.room.contains(&facts.room)
            && self.proof.contains(&facts.proof)
    }
}

/// What is done, by the table.
///
/// # Panics
/// If no row speaks of it, which a test excludes.
#[must_use]
pub fn decide(facts: &Facts) -> Decision {
    TABLE.iter().find(|row| row.holds(facts)).expect("every input is in a row").decision
}

impl Requirement {
    /// Of a header.
    #[must_use]
    pub fn of(metadata: &Metadata) -> Self {
        let has = |name: &str| metadata.config.requirements.iter().any(|one| one == name);
        if has("online-reencrypt") || has("offline-reencrypt") {
            Self::Old
        } else if has("online-reencrypt-v3") {
            Self::Three
        } else if has("online-reencrypt-v2") {
            Self::Two
        } else {
            Self::None
        }
    }
}

impl Facts {
    /// Of a re-encryption under way.
    #[must_use]
    pub fn of(metadata: &Metadata, process: &Process, state: State, total: u64, proof: Proof) -> Self {
        let phase = match state {
            State::Clean { .. } => Phase::Rest,
            State::Crash { .. } => Phase::Crash,
            State::Finished => Phase::Finished,
        };
        let means = match process.resilience {
            format::Resilience::None => Means::None,
            format::Resilience::Checksum(_) => Means::Checksum,
            format::Resilience::Journal => Means::Journal,
            format::Resilience::Datashift { .. } => Means::Datashift,
        };
        let hot = match state {
            State::Crash { start, end } => end.unwrap_or(total).saturating_sub(start),
            _ => 0,
        };
        let room = if process.hotzone_max().is_none_or(|most| hot <= most) { Room::Fits } else { Room::TooSmall };
        let proof = if process.protection.is_none() { Proof::Missing } else { proof };
        Self { requirement: Requirement::of(metadata), phase, means, room, proof }
    }
}

impl Refusal {
    /// In words. `name`: of the header's device.
    #[must_use]
    pub fn error(self, name: &str) -> Error {
        let (kind, what, hint) = match self {
            Self::Contradiction => (
                ErrorKind::Damaged,
                "a segment is in re-encryption, but the header does not say that one is under way",
                "no program leaves a header like this; restore a header backup only if it was made during this re-encryption",
            ),
            Self::Unprotected => (
                ErrorKind::Unsupported,
                "the re-encryption under way has metadata without a digest, which anybody could have changed (CVE-2021-4122)",
                "`cryptsetup repair` adds the digest, if you know that nobody did; then it can be gone on with",
            ),
            Self::Unsupported => (
                ErrorKind::Unsupported,
                "the re-encryption under way is a decryption that moves data, which this build does not go on with",
                "cryptsetup reencrypt --resume-only does",
            ),
            Self::Forged => (
                ErrorKind::Damaged,
                "the metadata of the re-encryption is not what was begun: its digest does not match",
                "nothing was written; somebody or something changed the header since, so going on could destroy data",
            ),
            Self::KeyGone => (
                ErrorKind::Damaged,
                "no keyslot holds the old volume key any more, and data under it is left",
                "a header backup made during this re-encryption has it",
            ),
            Self::Lost => (
                ErrorKind::Unsupported,
                "the re-encryption was interrupted without protection (resilience none): which blocks are old and which are new is not known",
                "no recovery is possible; restore the data from a backup",
            ),
            Self::TooLong => (
                ErrorKind::Damaged,
                "the interrupted step is longer than its protection area can stand for",
                "nothing was written; a header backup made during this re-encryption may help",
            ),
        };
        Error::new(kind, what).at(name).hint(hint)
    }
}

/// A re-encryption with its keys, as far as a recovery needs it.
#[derive(Debug, Clone, Copy)]
pub struct Proven<'a> {
    /// What was begun.
    pub process: &'a Process,
    /// As it was, with its key.
    pub old: &'a Side,
    /// As it will be, with its key.
    pub new: &'a Side,
    /// Bytes of plaintext.
    pub total: u64,
}

/// Make an interrupted step whole (see the module head) and say so in the header; the bytes of the step, 0 when there was none.
/// Whoever calls it has proven keys and metadata. On return `loaded` is the header on disk.
///
/// # Errors
/// Of [`decide`]: a refusal. `Damaged`: a step beyond the end of the device. Else of the devices: then it can be done again.
pub fn recover(
    header: &mut Blocking,
    data: &mut Blocking,
    loaded: &mut Loaded,
    state: State,
    proven: &Proven<'_>,
) -> Result<u64> {
    let Proven { process, total, .. } = *proven;
    let decision = decide(&Facts::of(&loaded.header.metadata, process, state, total, Proof::Right));
    let rewrite: fn(&mut Blocking, &mut Blocking, &Rewriter<'_>, Extent) -> Result<()> = match decision {
        Decision::Refuse(refusal) => return Err(refusal.error(header.name())),
        Decision::Nothing | Decision::GoOn => return Ok(0),
        Decision::TakeDown => {
            luks::take_down(header, loaded, process, total)?;
            return Ok(0);
        }
        Decision::RewriteOldBlocks => old_blocks,
        Decision::RewriteFromJournal => from_journal,
        Decision::RewriteFromSource => from_source,
    };
    let hot = hotzone(state, total, data.name())?;
    // 1.
    rewrite(header, data, &Rewriter::new(proven)?, hot)?;
    // 2.
    data.flush()?;
    // 3.
    luks::commit(header, loaded, process, process.boundary_after(hot), total)?;
    Ok(hot.len())
}

/// The interrupted step.
fn hotzone(state: State, total: u64, name: &str) -> Result<Extent> {
    let State::Crash { start, end } = state else {
        return Err(Error::new(ErrorKind::Internal, "no step was interrupted").at(name));
    };
    let end = end.unwrap_or(total);
    let hot = Extent::new(start, end).filter(|hot| hot.end() <= total);
    hot.ok_or_else(|| {
        let what = format!("bytes {start}..{end} of the data were being rewritten, but there are only {total}");
        Error::new(ErrorKind::Damaged, what).at(name).hint("the device has become smaller: it must have its size of before")
    })
}

/// Both ciphers, and where the data lies.
struct Rewriter<'a> {
    proven: &'a Proven<'a>,
    old: Option<(Box<dyn SectorCipher>, u64)>,
    new: Option<(Box<dyn SectorCipher>, u64)>,
}

impl<'a> Rewriter<'a> {
    fn new(proven: &'a Proven<'a>) -> Result<Self> {
        let build = |side: &Side| {
            let Some((cipher, key)) = &side.cipher else { return Ok(None) };
            let built = cipher.spec.build(Kernel::best()?, key, cipher.unit_bytes, cipher.offset_sectors)?;
            Ok::<_, Error>(Some((built, u64::from(cipher.unit_bytes))))
        };
        Ok(Self { proven, old: build(proven.old)?, new: build(proven.new)? })
    }

    /// Old bytes to new bytes, in place. `at`: their plaintext offset, a multiple of both data units.
    fn recrypt(&self, at: u64, bytes: &mut [u8]) {
        if let Some((cipher, unit)) = &self.old {
            cipher.decrypt(DataUnit(at / unit), bytes);
        }
        if let Some((cipher, unit)) = &self.new {
            cipher.encrypt(DataUnit(at / unit), bytes);
        }
    }

    /// Where plaintext lies on the data device when it is new.
    fn target(&self, at: u64) -> u64 {
        self.proven.new.offset + at
    }

    /// Where it lies while it is old.
    fn source(&self, at: u64) -> u64 {
        match self.proven.process.moved {
            Some(moved) if at < moved.bytes => moved.offset + at,
            _ => self.proven.old.offset + at,
        }
    }

    /// All whole data units?
    fn check(&self, hot: Extent, name: &str) -> Result<()> {
        let units = self.proven.process.step_bytes();
        if hot.start().is_multiple_of(units) && hot.end().is_multiple_of(units) {
            return Ok(());
        }
        let what = format!("the interrupted step, bytes {}..{}, is no whole number of its blocks of {units}", hot.start(), hot.end());
        Err(Error::new(ErrorKind::Damaged, what).at(name))
    }
}

/// The pieces of an extent: first byte and length of each.
fn pieces(hot: Extent, piece: usize) -> impl Iterator<Item = (u64, usize)> {
    (hot.start()..hot.end()).step_by(piece).map(move |at| {
        let left = usize::try_from(hot.end() - at).unwrap_or(piece);
        (at, left.min(piece))
    })
}

fn old_blocks(header: &mut Blocking, data: &mut Blocking, rewriter: &Rewriter<'_>, hot: Extent) -> Result<()> {
    let process = rewriter.proven.process;
    let format::Resilience::Checksum(Checksum { hash, block_bytes }) = process.resilience else {
        return Err(Error::new(ErrorKind::Internal, "no checksums").at(header.name()));
    };
    let block = block_bytes as usize;
    if block > PIECE {
        let what = format!("blocks of {block} bytes are hashed, at most {PIECE} are supported");
        return Err(Error::new(ErrorKind::Unsupported, what)
            .at(header.name())
            .hint("cryptsetup reencrypt --resume-only recovers them"));
    }
    rewriter.check(hot, header.name())?;
    let mut bytes = Zeroizing::new(vec![0; PIECE]);
    let mut stored = vec![0; PIECE / block * hash.bytes()];
    let mut made = vec![0; hash.bytes()];
    let mut stored_at = process.area.offset;
    for (at, length) in pieces(hot, PIECE) {
        let bytes = &mut bytes[..length];
        let stored = &mut stored[..length / block * hash.bytes()];
        header.read(stored_at, stored)?;
        stored_at += stored.len() as u64;
        data.read(rewriter.target(at), bytes)?;
        // Blocks in a row that are old are written in one go; new ones are not written at all.
        let mut run = 0..0;
        for (index, hash_of_old) in stored.chunks_exact(hash.bytes()).enumerate() {
            let place = index * block..(index + 1) * block;
            hash.digest(&[&bytes[place.clone()]], &mut made);
            if !bytes_equal(&made, hash_of_old) {
                continue;
            }
            rewriter.recrypt(at + place.start as u64, &mut bytes[place.clone()]);
            if run.end != place.start {
                data.write(rewriter.target(at + run.start as u64), &bytes[run.clone()])?;
                run.start = place.start;
            }
            run.end = place.end;
        }
        data.write(rewriter.target(at + run.start as u64), &bytes[run])?;
    }
    Ok(())
}

fn from_journal(
    header: &mut Blocking,
    data: &mut Blocking,
    rewriter: &Rewriter<'_>,
    hot: Extent,
) -> Result<()> {
    rewriter.check(hot, header.name())?;
    let area = rewriter.proven.process.area.offset;
    let mut bytes = Zeroizing::new(vec![0; PIECE]);
    for (at, length) in pieces(hot, PIECE) {
        let bytes = &mut bytes[..length];
        header.read(area + (at - hot.start()), bytes)?;
        rewriter.recrypt(at, bytes);
        data.write(rewriter.target(at), bytes)?;
    }
    Ok(())
}

fn from_source(
    header: &mut Blocking,
    data: &mut Blocking,
    rewriter: &Rewriter<'_>,
    hot: Extent,
) -> Result<()> {
    rewriter.check(hot, header.name())?;
    check_apart(rewriter, hot, header.name())?;
    let mut bytes = Zeroizing::new(vec![0; PIECE]);
    for (at, length) in pieces(hot, PIECE) {
        let bytes = &mut bytes[..length];
        data.read(rewriter.source(at), bytes)?;
        rewriter.recrypt(at, bytes);
        data.write(rewriter.target(at), bytes)?;
    }
    Ok(())
}

/// A source that the step writes into could not be read again.
fn check_apart(rewriter: &Rewriter<'_>, hot: Extent, name: &str) -> Result<()> {
    let moved = rewriter.proven.process.moved.map_or(0, |moved| moved.bytes);
    let across = hot.start() < moved && moved < hot.end();
    let source = rewriter.source(hot.start());
    let target = rewriter.target(hot.start());
    if !across && source.abs_diff(target) >= hot.len() {
        return Ok(());
    }
    let what = format!(
        "the interrupted step, bytes {}..{}, would overwrite its own source",
        hot.start(),
        hot.end()
    );
    Err(Error::new(ErrorKind::Damaged, what).at(name))
}

/// The boundary a state stands for.
#[must_use]
pub fn boundary(process: &Process, state: State, total: u64) -> u64 {
    match (state, process.direction) {
        (State::Clean { boundary }, _) => boundary.unwrap_or_else(|| process.begins_at(total)),
        (State::Crash { start, .. }, Direction::Forward) => start,
        (State::Crash { end, .. }, Direction::Backward) => end.unwrap_or(total),
        (State::Finished, _) => luks::ends_at(process, total),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANY_REQUIREMENT: [Requirement; 4] =
        [Requirement::None, Requirement::Old, Requirement::Two, Requirement::Three];

    fn all() -> impl Iterator<Item = Facts> {
        ANY_REQUIREMENT.into_iter().flat_map(|requirement| {
            ANY_PHASE.iter().flat_map(move |&phase| {
                ANY_MEANS.iter().flat_map(move |&means| {
                    ANY_ROOM.iter().flat_map(move |&room| {
                        ANY_PROOF.iter().map(move |&proof| Facts { requirement, phase, means, room, proof })
                    })
                })
            })
        })
    }

    #[test]
    fn every_input_is_in_exactly_one_row() {
        let mut seen = 0;
        for facts in all() {
            assert_eq!(TABLE.iter().filter(|row| row.holds(&facts)).count(), 1, "{facts:?}");
            seen += 1;
        }
        assert_eq!(seen, 4 * 3 * 4 * 2 * 4);
        for (index, row) in TABLE.iter().enumerate() {
            assert!(all().any(|facts| row.holds(&facts)), "row {index} speaks of nothing");
        }
    }

    /// What must hold whatever the rows are, said another way round.
    #[test]
    fn no_data_is_written_but_with_proof_and_protection() {
        for facts in all() {
            let decision = decide(&facts);
            let proven = facts.requirement == Requirement::Two && facts.proof == Proof::Right;
            match decision {
                Decision::RewriteOldBlocks | Decision::RewriteFromJournal | Decision::RewriteFromSource => {
                    assert!(proven && facts.phase == Phase::Crash && facts.means != Means::None, "{facts:?}");
                    assert!(facts.room == Room::Fits || facts.means == Means::Datashift, "{facts:?}");
                }
                Decision::GoOn => assert!(proven && facts.phase == Phase::Rest, "{facts:?}"),
                Decision::TakeDown => {
                    assert!(facts.requirement == Requirement::Two && facts.phase == Phase::Finished);
                    assert!(matches!(facts.proof, Proof::Right | Proof::Unknowable), "{facts:?}");
                }
                Decision::Nothing => assert_eq!(facts.requirement, Requirement::None, "{facts:?}"),
                Decision::Refuse(_) => {}
            }
            if proven && facts.phase == Phase::Crash && facts.means != Means::None && facts.room == Room::Fits {
                assert!(!matches!(decision, Decision::Refuse(_)), "a recovery is possible: {facts:?}");
            }
        }
    }

    #[test]
    fn every_refusal_says_a_way_out() {
        let refusals = all().filter_map(|facts| match decide(&facts) {
            Decision::Refuse(refusal) => Some(refusal),
            _ => None,
        });
        let mut seen = Vec::new();
        for refusal in refusals {
            let failure = refusal.error("volume").to_failure();
            assert!(failure.hint.is_some(), "{refusal:?}");
            if !seen.contains(&refusal) {
                seen.push(refusal);
            }
        }
        assert_eq!(seen.len(), 7);
    }

    #[test]
    fn pieces_cover_an_extent_once() {
        for (start, end) in [(0, 1), (0, 4096), (512, 512 + 3 * 4096), (4096, 3 * 4096 + 100)] {
            let hot = Extent::new(start, end).expect("not empty");
            let mut next = start;
            for (at, length) in pieces(hot, 4096) {
                assert_eq!(at, next);
                assert!((1..=4096).contains(&length));
                next += length as u64;
            }
            assert_eq!(next, end);
        }
    }
}
