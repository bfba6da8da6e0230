//! What is done about a re-encryption under way: the table, and nothing else.
//!
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

use crate::error::{Error, ErrorKind};
use crate::format::luks2::metadata::Metadata;
use crate::format::luks2::reencrypt::{self as format, Process, State};

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
    pub fn of(metadata: &Metadata, process: &Process, state: State, proof: Proof) -> Self {
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
            State::Crash { start, end } => end.saturating_sub(start),
            _ => 0,
        };
        let room =
            if process.hotzone_max().is_none_or(|most| hot <= most) { Room::Fits } else { Room::TooSmall };
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
            if proven && facts.phase == Phase::Crash && facts.means != Means::None && facts.room == Room::Fits
            {
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
}
