//! Re-encryption: how far it is, and what a recovery would do. Derived from the metadata alone, as everybody does.

use serde_json::{Map, Value};

use super::Report;
use crate::format::luks2::metadata::{Keyslot, Metadata, Segment};

/// States of a re-encryption.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Not begun, or over.
    None,
    /// Begun, and at rest between two steps.
    Clean,
    /// Interrupted within a step: to be recovered before anything else.
    Crash,
}

/// Where it stands.
pub(super) fn state(metadata: &Metadata) -> State {
    let online = metadata.config.requirements.iter().any(|name| name.starts_with("online-reencrypt"));
    match (online, hot(metadata)) {
        (false, _) => State::None,
        (true, None) => State::Clean,
        (true, Some(_)) => State::Crash,
    }
}

/// The segment being rewritten.
fn hot(metadata: &Metadata) -> Option<(u32, &Segment)> {
    metadata.data_segments().find(|(_, segment)| segment.flags.iter().any(|flag| flag == "in-reencryption"))
}

pub(super) fn explain(metadata: &Metadata, report: &mut Report) {
    let about = "reencryption";
    if metadata.config.requirements.iter().any(|name| name == "offline-reencrypt") {
        report.danger(
            about,
            "an offline re-encryption of an old cryptsetup was begun and not finished",
            "finish it with the program and the log file it was begun with; nothing else can",
        );
    }
    let object = metadata.keyslots.values().find_map(|slot| match slot {
        Keyslot::Reencrypt { object, .. } => Some(object),
        _ => None,
    });
    let state = state(metadata);
    if state == State::None {
        if object.is_some() {
            report.weak(
                about,
                "the header has a re-encryption's keyslot and no requirement that says so",
                "cryptsetup repair looks into it",
            );
        }
        return;
    }
    let Some(object) = object else {
        report.danger(
            about,
            "a re-encryption is required to be finished and its keyslot is missing",
            "restore a header backup of before the re-encryption only if no data were rewritten yet",
        );
        return;
    };
    let (mode, direction) = (word(object, "mode"), word(object, "direction"));
    let area = object.get("area").and_then(Value::as_object);
    let resilience = area.map_or_else(|| "unknown".to_owned(), |area| word(area, "type"));
    let done = done_bytes(metadata);
    let what = format!("mode {mode}, direction {direction}, resilience {resilience}, {done} bytes are done");
    if metadata.config.requirements.iter().any(|name| name == "online-reencrypt") {
        report.danger(
            about,
            "it was begun by a cryptsetup before 2.4.3, whose metadata anybody could change (CVE-2021-4122)",
            "cryptsetup repair converts it, with a passphrase",
        );
    }
    match (state, hot(metadata)) {
        (State::Crash, Some((id, segment))) => {
            let size = segment.size.map_or_else(|| "all the".to_owned(), |size| size.to_string());
            report.danger(
                about,
                format!(
                    "interrupted while {size} bytes from {} on (segment {id}) were rewritten: {what}. {}",
                    segment.offset,
                    recovery(&resilience)
                ),
                "do not write to the volume; resume the re-encryption, which recovers first",
            );
        }
        _ => report.danger(
            about,
            format!("begun and at rest between two steps: {what}. A resume goes on from there, nothing needs recovery"),
            "resume it; header backups of before must not be restored any more",
        ),
    }
}

/// What a recovery would do.
fn recovery(resilience: &str) -> &'static str {
    match resilience {
        "checksum" => {
            "A recovery hashes every block of them: one with the stored hash is still old and is rewritten, any other is new"
        }
        "journal" => "A recovery decrypts the old bytes from the journal and rewrites all of them",
        "datashift" | "datashift-checksum" | "datashift-journal" => {
            "A recovery reads their source, which lies shifted and whole, and rewrites all of them"
        }
        "none" => "No recovery is possible: nothing was saved, and which of the bytes are old is not known",
        _ => "What a recovery would do is not known: the resilience is of no known type",
    }
}

fn word(object: &Map<String, Value>, name: &str) -> String {
    let text = object.get(name).and_then(Value::as_str).unwrap_or("unknown");
    text.chars().filter(char::is_ascii_graphic).take(32).collect()
}

/// Bytes under the key (or in the plain) that all of the volume shall have: those of segments that are bound to the digest of
/// the final segment as that one is, and not being rewritten.
fn done_bytes(metadata: &Metadata) -> u64 {
    let flagged = |flag: &str| {
        let found = metadata.segments.iter().find(|(_, segment)| segment.flags.iter().any(|one| one == flag));
        found.map(|(id, _)| *id)
    };
    let of = |id: u32| metadata.digest_of_segment(id).map(|(digest, _)| digest);
    let (before, after) = (flagged("backup-previous").map(of), flagged("backup-final").map(of));
    if before == after {
        return 0;
    }
    let hot = hot(metadata).map(|(id, _)| id);
    metadata
        .data_segments()
        .filter(|(id, _)| Some(*id) != hot && Some(of(*id)) == after)
        .filter_map(|(_, segment)| segment.size)
        .sum()
}
