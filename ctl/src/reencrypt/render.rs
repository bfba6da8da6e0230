//! What a re-encryption was, or would be, as people read it.

use proto::reencrypt::{Phase, Report};

use crate::amount;
use crate::report::printable;

/// Was it a dry run?
pub fn is_rehearsal(report: &Report) -> bool {
    report.estimate_seconds.is_some()
}

/// A phase, in the middle of a line of progress.
pub fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Recovering => "recovering an interrupted step",
        Phase::Rewriting => "re-encrypting",
        Phase::Verifying => "verifying",
    }
}

/// The proof: rows of `name: value`.
pub fn rows(report: &Report) -> Vec<(&'static str, String)> {
    let mut rows = vec![("data", data(report))];
    let cipher = |cipher: &Option<String>| cipher.as_deref().map_or_else(|| "plain".to_owned(), printable);
    rows.push(("before", cipher(&report.old_cipher)));
    rows.push(("after", cipher(&report.new_cipher)));
    rows.push(("resilience", resilience(report)));
    if !(report.carried_keyslots.is_empty() && report.dropped_keyslots.is_empty()) {
        let (kept, gone) = if is_rehearsal(report) { ("to keep", "to drop") } else { ("kept", "dropped") };
        let mut text = format!("{kept} {}", numbers(&report.carried_keyslots));
        if !report.dropped_keyslots.is_empty() {
            text.push_str(&format!(", {gone} {}", numbers(&report.dropped_keyslots)));
        }
        // The new key's keyslots have numbers of their own.
        text.push_str(if is_rehearsal(report) {
            ", as they are numbered now"
        } else {
            ", as they were numbered before"
        });
        rows.push(("keyslots", text));
    }
    if report.recovered_bytes > 0 {
        let bytes = amount::bytes(report.recovered_bytes);
        rows.push(("recovered", format!("an interrupted step of {bytes}")));
    }
    if let Some(seconds) = report.estimate_seconds {
        rows.push(("would take", format!("about {}, by a measured sample", amount::seconds(seconds))));
    }
    rows.extend(digests(report));
    if report.old_key_gone && report.old_cipher.is_some() {
        rows.push(("old volume key", "opens nothing any more".to_owned()));
    }
    rows.extend(report.notes.iter().map(|note| ("note", printable(note))));
    rows
}

fn data(report: &Report) -> String {
    let mut text = amount::bytes(report.total_bytes);
    if report.done_before_bytes > 0 {
        text.push_str(&format!(", {} of it done before", amount::bytes(report.done_before_bytes)));
    }
    text
}

fn resilience(report: &Report) -> String {
    let name = if report.resilience.is_empty() { "-".to_owned() } else { printable(&report.resilience) };
    if report.hotzone_bytes > 0 {
        format!("{name}, steps of up to {}", amount::bytes(report.hotzone_bytes))
    } else {
        name
    }
}

fn numbers(numbers: &[u32]) -> String {
    if numbers.is_empty() {
        return "none".to_owned();
    }
    numbers.iter().map(u32::to_string).collect::<Vec<_>>().join(", ")
}

fn digests(report: &Report) -> Vec<(&'static str, String)> {
    let mut rows = Vec::new();
    let over = amount::bytes(report.digest_bytes);
    if let Some(before) = &report.digest_before {
        rows.push(("plaintext before", format!("{} over {over}", printable(before))));
    }
    if let Some(after) = &report.digest_after {
        rows.push(("plaintext after", format!("{} over {over}", printable(after))));
    }
    if let (Some(before), Some(after)) = (&report.digest_before, &report.digest_after) {
        let verdict = if before == after { "equal, read back" } else { "DIFFERENT" };
        rows.push(("verified", verdict.to_owned()));
    }
    rows
}

/// What it made of the data, in one word.
pub fn verb(report: &Report) -> &'static str {
    match (&report.old_cipher, &report.new_cipher) {
        (None, Some(_)) => "encrypted",
        (Some(_), None) => "decrypted",
        _ => "re-encrypted",
    }
}

/// One line for a dry run that is done.
pub fn rehearsed(report: &Report) -> String {
    let left = report.total_bytes.saturating_sub(report.done_before_bytes);
    let time = report.estimate_seconds.map_or_else(|| "?".to_owned(), amount::seconds);
    format!("would re-encrypt {} in about {time}; nothing was written", amount::bytes(left))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render;
    use proto::{Action, JobInfo, JobState, Outcome, Progress};

    fn report() -> Report {
        Report {
            total_bytes: 8 << 30,
            old_cipher: Some("aes-xts-plain64, 512-bit key, 512-byte data units".into()),
            new_cipher: Some("aes-xts-plain64, 512-bit key, 4096-byte data units".into()),
            resilience: "checksum".into(),
            hotzone_bytes: 64 << 20,
            carried_keyslots: vec![0, 2],
            dropped_keyslots: vec![1],
            recovered_bytes: 32 << 20,
            digest_before: Some("3fe0".into()),
            digest_after: Some("3fe0".into()),
            digest_bytes: 8 << 30,
            old_key_gone: true,
            notes: vec!["make a new header backup".into()],
            ..Report::default()
        }
    }

    fn job(state: JobState, report: Option<Report>) -> JobInfo {
        JobInfo {
            job: 3,
            uid: 0,
            action: Action::Reencrypt,
            source: "vol.luks".into(),
            sink: String::new(),
            state,
            detached: false,
            submitted_ms: 0,
            progress: Progress {
                done_bytes: 2 << 30,
                total_bytes: Some(8 << 30),
                elapsed_seconds: 1.0,
                ..Progress::default()
            },
            outcome: Some(Outcome {
                seconds: 4.0,
                failure: None,
                first_difference: None,
                bench: vec![],
                reencrypt: report.map(Box::new),
                padded_bytes: 0,
                cpu_seconds: (1.0, 1.0),
            }),
        }
    }

    #[test]
    fn the_proof_has_everything_that_was_done() {
        assert_eq!(
            render::pairs(&rows(&report())),
            "\
data              8.00 GiB
before            aes-xts-plain64, 512-bit key, 512-byte data units
after             aes-xts-plain64, 512-bit key, 4096-byte data units
resilience        checksum, steps of up to 64.00 MiB
keyslots          kept 0, 2, dropped 1, as they were numbered before
recovered         an interrupted step of 32.00 MiB
plaintext before  3fe0 over 8.00 GiB
plaintext after   3fe0 over 8.00 GiB
verified          equal, read back
old volume key    opens nothing any more
note              make a new header backup
"
        );
    }

    #[test]
    fn a_difference_is_not_missed_and_what_was_not_read_back_is_not_called_verified() {
        let different = Report { digest_after: Some("ffff".into()), ..report() };
        assert!(rows(&different).contains(&("verified", "DIFFERENT".into())));
        let unread = Report { digest_after: None, ..report() };
        assert!(!rows(&unread).iter().any(|(name, _)| *name == "verified"));
    }

    #[test]
    fn a_dry_run_promises_and_claims_nothing() {
        let dry =
            Report { estimate_seconds: Some(7.25), old_key_gone: false, recovered_bytes: 0, ..report() };
        let rows = rows(&dry);
        assert!(rows.contains(&("keyslots", "to keep 0, 2, to drop 1, as they are numbered now".into())));
        assert!(rows.contains(&("would take", "about 7.2 s, by a measured sample".into())));
        assert!(!rows.iter().any(|(name, _)| *name == "old volume key"));
        let job = job(JobState::Done, Some(dry));
        assert_eq!(render::summary(&job), "would re-encrypt 8.00 GiB in about 7.2 s; nothing was written");
    }

    #[test]
    fn a_plain_side_is_called_that_and_has_no_key() {
        let encrypted = Report { old_cipher: None, ..report() };
        assert!(!rows(&encrypted).iter().any(|(name, _)| *name == "old volume key"));
        assert!(render::summary(&job(JobState::Done, Some(encrypted))).starts_with("encrypted 2.00 GiB in "));
        let decrypted = Report { new_cipher: None, ..report() };
        assert!(rows(&decrypted).contains(&("after", "plain".into())));
        assert!(render::summary(&job(JobState::Done, Some(decrypted))).starts_with("decrypted "));
    }

    #[test]
    fn names_in_a_report_cannot_steer_the_terminal() {
        let hostile = Report { notes: vec!["\x1b[2J".into()], resilience: "\x07".into(), ..report() };
        assert!(!render::pairs(&rows(&hostile)).contains(['\x1b', '\x07']));
    }

    #[test]
    fn a_job_shows_its_volume_and_its_proof() {
        let mut text = render::job(&job(JobState::Done, Some(report())));
        assert!(text.contains("volume            vol.luks\n") && !text.contains("sink"), "{text}");
        assert!(text.contains("old volume key    opens nothing any more\n"), "{text}");
        text = render::jobs(&[job(JobState::Running, None)], false);
        assert!(text.contains("reencrypt  running"), "{text}");
        assert!(text.lines().nth(1).expect("a row").ends_with("vol.luks  -"), "{text}");
    }
}
