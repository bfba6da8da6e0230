//! Tokens: where keys live and when they must be replaced.

use super::Report;
use crate::format::luks2::metadata::Metadata;
use crate::volume::tokens::{KEY_TOKEN, KeyToken};

const DAY: u64 = 24 * 60 * 60;
/// A rotation that is due this soon is mentioned as such.
const SOON_DAYS: u64 = 14;

pub(super) fn explain(metadata: &Metadata, now: u64, report: &mut Report) {
    for (id, token) in &metadata.tokens {
        let about = format!("token {id}");
        if token.kind != KEY_TOKEN {
            let names: String = token.kind.chars().filter(char::is_ascii_graphic).take(64).collect();
            report.note(&about, format!("of type {names:?}, for another program"), "");
            continue;
        }
        if token.keyslots.is_empty() {
            report.weak(
                &about,
                "its keyslots are gone: it says where a key lives that opens nothing",
                "remove it",
            );
        }
        match KeyToken::parse(&token.extra) {
            Ok(token) => rotation(&about, &token, now, report),
            Err(error) => report.weak(&about, error.chain(), "replace the token"),
        }
    }
}

fn rotation(about: &str, token: &KeyToken, now: u64, report: &mut Report) {
    let place = &token.reference;
    match token.rotate_by {
        None => report.note(about, format!("the key lives at {place}; no date is set for its rotation"), ""),
        Some(due) if due < now => report.weak(
            about,
            format!("the key at {place} was to be replaced {} ago", days(now - due)),
            "change the passphrase and set new dates in the token",
        ),
        Some(due) if due - now < SOON_DAYS * DAY => {
            report.note(about, format!("the key at {place} is to be replaced within {}", days(due - now)), "")
        }
        Some(due) => {
            report.note(
                about,
                format!("the key lives at {place}; to be replaced in {}", days(due - now)),
                "",
            );
        }
    }
}

fn days(seconds: u64) -> String {
    match seconds / DAY {
        0 => "a day".to_owned(),
        1 => "1 day".to_owned(),
        days => format!("{days} days"),
    }
}
