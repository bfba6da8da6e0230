//! Re-encryption: how far it is, and what a recovery would do. By the same reading and the same table that a resume goes by, with one difference: the
//! keys are not here, so that the metadata is what was begun is not proven.

use super::Report;
use crate::format::luks2::metadata::{Keyslot, Metadata};
use crate::format::luks2::reencrypt::{Process, State, read};
use crate::volume::reencrypt::decide::{Decision, Facts, Proof, Refusal, Requirement, decide};
use crate::volume::reencrypt::luks;

const ABOUT: &str = "reencryption";

/// `data_bytes`: of the device with the data, where it is known.
pub(super) fn explain(metadata: &Metadata, data_bytes: Option<u64>, report: &mut Report) {
    if luks::is_unswept(metadata) {
        report.weak(
            ABOUT,
            "one that is over was cut off before all places that held the old volume key's material were overwritten",
            "cryptctl reencrypt --resume-only does it; no passphrase is needed",
        );
    }
    if metadata.config.requirements.iter().any(|name| name == "offline-reencrypt") {
        report.danger(
            ABOUT,
            "an offline re-encryption of an old cryptsetup was begun and not finished",
            "finish it with the program and the log file it was begun with; nothing else can",
        );
        return;
    }
    let has_keyslot = metadata.keyslots.values().any(|slot| matches!(slot, Keyslot::Reencrypt { .. }));
    match Requirement::of(metadata) {
        Requirement::None if has_keyslot => report.weak(
            ABOUT,
            "the header has a re-encryption's keyslot and no requirement that says so",
            "cryptsetup repair looks into it",
        ),
        Requirement::None => {}
        Requirement::Old => report.danger(
            ABOUT,
            "it was begun by a cryptsetup before 2.4.3, whose metadata anybody could change (CVE-2021-4122)",
            "cryptsetup repair converts it, with a passphrase",
        ),
        Requirement::Two | Requirement::Three => match read::read(metadata) {
            Ok(Some((process, state))) => under_way(metadata, &process, state, data_bytes, report),
            Ok(None) => {}
            Err(error) => report.danger(
                ABOUT,
                format!("one is under way that this build does not go on with: {}", error.chain()),
                "do not write to the volume; see what cryptsetup reencrypt --resume-only says",
            ),
        },
    }
}

fn under_way(
    metadata: &Metadata,
    process: &Process,
    state: State,
    data_bytes: Option<u64>,
    report: &mut Report,
) {
    let total = process.total.or_else(|| data_bytes?.checked_sub(process.new.offset));
    let done = match total {
        Some(total) => format!("{} of {total} bytes are done", state.done_bytes(process, total)),
        None => "how much is done is not known without the data".to_owned(),
    };
    let what = format!(
        "mode {}, direction {}, resilience {}, {done}",
        process.mode.name(),
        process.direction.name(),
        process.resilience.name()
    );
    let unproven = "If its digest is right, which takes a passphrase to know: ";
    let has_keyslot = |digest: u32| {
        let bound = metadata.digests.get(&digest).map_or(&[][..], |digest| &digest.keyslots);
        bound.iter().any(|id| matches!(metadata.keyslots.get(id), Some(Keyslot::Luks2(_))))
    };
    let knowable = process.old.digest.is_none_or(has_keyslot);
    let proof = if knowable { Proof::Right } else { Proof::Unknowable };
    let decision = decide(&Facts::of(metadata, process, state, proof));
    if let State::Crash { start, end } = state {
        report.danger(
            ABOUT,
            format!(
                "interrupted while {} bytes from {start} on were rewritten: {what}. {unproven}{}",
                end - start,
                recovery(decision)
            ),
            "do not write to the volume; cryptctl reencrypt --resume-only recovers the step and goes on",
        );
        return;
    }
    let next = match decision {
        Decision::TakeDown => "all data is new; a resume takes down what is left of it",
        Decision::GoOn => "a resume goes on from there, nothing needs recovery",
        other => recovery(other),
    };
    report.danger(
        ABOUT,
        format!("begun and at rest between two steps: {what}. {unproven}{next}"),
        "resume it: cryptctl reencrypt --resume-only; header backups of before must not be restored any more",
    );
}

/// What a recovery would do.
fn recovery(decision: Decision) -> &'static str {
    match decision {
        Decision::RewriteOldBlocks => {
            "a recovery hashes every block of them: one with the stored hash is still old and is rewritten, any other is new"
        }
        Decision::RewriteFromJournal => {
            "a recovery decrypts the old bytes from the journal and rewrites all of them"
        }
        Decision::RewriteFromSource => {
            "a recovery reads their source, which lies shifted and whole, and rewrites all of them"
        }
        Decision::Refuse(Refusal::Lost) => {
            "no recovery is possible: nothing was saved, and which of the bytes are old is not known"
        }
        Decision::Refuse(Refusal::TooLong) => {
            "no recovery is possible: what was saved cannot be that of so long a step"
        }
        Decision::Refuse(Refusal::KeyGone) => {
            "it would be refused: no keyslot holds the old volume key any more, and data under it is left"
        }
        Decision::Refuse(_) => "it would be refused",
        Decision::Nothing | Decision::GoOn | Decision::TakeDown => "nothing needs recovery",
    }
}
