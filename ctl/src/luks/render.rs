//! Headers as people read them.
//!
//! Pure functions from wire objects to text. Labels, types and tokens come from the disk and are printed without control
//! characters.

use std::time::Duration;

use proto::luks::{Doctor, Done, Dump, Finding, Keyslot, Repaired, Segment, Severity, Summary, Version};
use serde_json::{Map, Value};

use crate::amount;
use crate::luks::args::{Luks, Token};
use crate::luks::token;
use crate::render::{Align, pairs, table};
use crate::report::printable;

/// `open-test`, for scripts too.
pub fn opened(done: &Done) -> String {
    match done.keyslot {
        Some(keyslot) => format!("keyslot {keyslot}\n"),
        None => "volume key\n".to_owned(),
    }
}

/// One line at the end of a change.
pub fn done(verb: &Luks, done: &Done) -> String {
    let keyslot = done.keyslot.map_or_else(|| "a keyslot".to_owned(), |number| format!("keyslot {number}"));
    let token = done.token.map_or_else(|| "a token".to_owned(), |number| format!("token {number}"));
    let uuid = &done.uuid;
    match verb {
        Luks::Format(args) => {
            format!("made {} with UUID {uuid}, {keyslot} in use", args.volume.display())
        }
        Luks::AddKey(_) => format!("added {keyslot}"),
        Luks::RemoveKey(_) => format!("destroyed {keyslot}"),
        Luks::ChangeKey(_) => format!("changed the passphrase, now in {keyslot}"),
        Luks::ConvertKdf(_) => format!("converted the key derivation, now in {keyslot}"),
        Luks::HeaderBackup(args) => format!("copied the header of {uuid} to {}", args.file.display()),
        Luks::HeaderRestore(args) => format!("put the header of {uuid} back from {}", args.file.display()),
        Luks::Erase(args) => format!("destroyed every keyslot of {}", args.at.volume.display()),
        Luks::Token(Token::Add(_)) => format!("added {token}"),
        Luks::Token(_) => format!("removed {token}"),
        Luks::Dump(_) | Luks::OpenTest(_) | Luks::Repair(_) | Luks::Doctor(_) => "done".to_owned(),
    }
}

/// `dump`
pub fn dump(dump: &Dump, colour: bool) -> String {
    let mut text = summary(&dump.summary, colour);
    let objects = |name: &str| dump.metadata.get(name).and_then(Value::as_object);
    if let Some(tokens) = objects("tokens").filter(|tokens| !tokens.is_empty()) {
        text.push('\n');
        text.push_str(&self::tokens(tokens, colour));
    }
    if let Some(digests) = objects("digests").filter(|digests| !digests.is_empty()) {
        text.push('\n');
        text.push_str(&self::digests(digests, colour));
    }
    if dump.summary.requirements.iter().any(|name| name.starts_with("online-reencrypt")) {
        text.push_str(
            "\na re-encryption is under way: `cryptctl luks doctor` tells how far it is, \
             `cryptctl reencrypt --resume-only` goes on with it\n",
        );
    }
    text
}

fn summary(summary: &Summary, colour: bool) -> String {
    let or_dash = |text: &str| if text.is_empty() { "-".to_owned() } else { printable(text) };
    let mut rows = vec![("format", version(summary.version).to_owned()), ("UUID", printable(&summary.uuid))];
    if summary.version == Version::Luks2 {
        rows.push(("label", or_dash(&summary.label)));
        rows.push(("subsystem", or_dash(&summary.subsystem)));
    }
    if let Some(seqid) = summary.seqid {
        rows.push(("sequence", seqid.to_string()));
    }
    if let Some(bytes) = summary.metadata_bytes {
        let copies: Vec<_> = summary.copies.iter().map(|copy| printable(copy)).collect();
        let copies = if copies.is_empty() { String::new() } else { format!(" ({})", copies.join(", ")) };
        rows.push(("header", format!("2 copies of {}{copies}", amount::bytes(bytes))));
    }
    if let Some(bytes) = summary.keyslots_bytes {
        rows.push(("keyslots area", amount::bytes(bytes)));
    }
    let list = |names: &[String]| names.iter().map(|name| printable(name)).collect::<Vec<_>>().join(", ");
    if !summary.requirements.is_empty() {
        rows.push(("requirements", list(&summary.requirements)));
    }
    if !summary.flags.is_empty() {
        rows.push(("flags", list(&summary.flags)));
    }
    let mut text = pairs(&rows);
    text.push('\n');
    text.push_str(&segments(&summary.segments, colour));
    text.push('\n');
    if summary.keyslots.is_empty() {
        text.push_str("no keyslot is in use: only the volume key or a header backup opens it\n");
    } else {
        text.push_str(&keyslots(&summary.keyslots, colour));
    }
    text
}

fn version(version: Version) -> &'static str {
    match version {
        Version::Luks1 => "LUKS1",
        Version::Luks2 => "LUKS2",
    }
}

fn segments(segments: &[Segment], colour: bool) -> String {
    let heads = [
        ("SEGMENT", Align::Right),
        ("TYPE", Align::Left),
        ("OFFSET", Align::Right),
        ("SIZE", Align::Right),
        ("CIPHER", Align::Left),
        ("KEY", Align::Right),
        ("UNIT", Align::Right),
        ("TWEAK FROM", Align::Right),
        ("FLAGS", Align::Left),
    ];
    let rows: Vec<_> = segments
        .iter()
        .enumerate()
        .map(|(at, segment)| {
            let encrypted = !segment.cipher.is_empty();
            let if_encrypted = |text: String| if encrypted { text } else { "-".to_owned() };
            vec![
                at.to_string(),
                printable(&segment.kind),
                segment.offset.to_string(),
                segment.size.map_or_else(|| "to the end".to_owned(), |bytes| bytes.to_string()),
                if_encrypted(printable(&segment.cipher)),
                match segment.key_bits {
                    // LUKS2 tells it nowhere but in the keyslots.
                    0 if encrypted => "unknown".to_owned(),
                    0 => "-".to_owned(),
                    bits => bits.to_string(),
                },
                if_encrypted(segment.data_unit.to_string()),
                if_encrypted(segment.tweak_offset.to_string()),
                dashed(&segment.flags),
            ]
        })
        .collect();
    table(&heads, &rows, colour)
}

fn dashed(names: &[String]) -> String {
    if names.is_empty() { "-".to_owned() } else { printable(&names.join(",")) }
}

fn keyslots(keyslots: &[Keyslot], colour: bool) -> String {
    let timed = keyslots.iter().any(|keyslot| keyslot.unlock_seconds.is_some());
    let mut heads = vec![
        ("KEYSLOT", Align::Right),
        ("TYPE", Align::Left),
        ("KEY", Align::Right),
        ("PRIORITY", Align::Left),
        ("KDF", Align::Left),
        ("COST", Align::Left),
        ("AREA", Align::Right),
        ("BYTES", Align::Right),
    ];
    if timed {
        heads.push(("UNLOCKS IN", Align::Right));
    }
    let rows: Vec<_> = keyslots
        .iter()
        .map(|keyslot| {
            let or_dash = |text: &str| if text.is_empty() { "-".to_owned() } else { printable(text) };
            let unbound = if keyslot.bound { "" } else { " (unbound)" };
            let mut row = vec![
                keyslot.id.to_string(),
                format!("{}{unbound}", printable(&keyslot.kind)),
                keyslot.key_bits.to_string(),
                or_dash(&keyslot.priority),
                or_dash(&keyslot.kdf),
                cost(keyslot),
                keyslot.area_offset.to_string(),
                keyslot.area_bytes.to_string(),
            ];
            if timed {
                row.push(keyslot.unlock_seconds.map_or_else(|| "-".to_owned(), duration));
            }
            row
        })
        .collect();
    table(&heads, &rows, colour)
}

/// Seconds, or less of them than can be waited for.
fn duration(seconds: f64) -> String {
    match Duration::try_from_secs_f64(seconds) {
        Ok(short) if seconds < 1.0 => amount::latency(u64::try_from(short.as_nanos()).unwrap_or(u64::MAX)),
        _ => amount::seconds(seconds),
    }
}

fn cost(keyslot: &Keyslot) -> String {
    match keyslot.kdf.as_str() {
        "" => "-".to_owned(),
        "pbkdf2" => format!("{} iterations of {}", keyslot.iterations, printable(&keyslot.hash)),
        _ => format!(
            "{} passes over {}, {} lane{}",
            keyslot.iterations,
            amount::bytes(u64::from(keyslot.memory_kib) << 10),
            keyslot.lanes,
            if keyslot.lanes == 1 { "" } else { "s" }
        ),
    }
}

/// `token list`, and a part of `dump`.
pub fn tokens(tokens: &Map<String, Value>, colour: bool) -> String {
    if tokens.is_empty() {
        return "no tokens\n".to_owned();
    }
    let heads =
        [("TOKEN", Align::Right), ("TYPE", Align::Left), ("KEYSLOTS", Align::Left), ("CONTENT", Align::Left)];
    let rows: Vec<_> = numbered(tokens)
        .map(|(number, token)| {
            let kind = token.get("type").and_then(Value::as_str).unwrap_or("-");
            let content = token.as_object().map_or_else(|| "-".to_owned(), token::describe);
            vec![printable(number), printable(kind), numbers(token, "keyslots"), printable(&content)]
        })
        .collect();
    table(&heads, &rows, colour)
}

fn digests(digests: &Map<String, Value>, colour: bool) -> String {
    let heads = [
        ("DIGEST", Align::Right),
        ("TYPE", Align::Left),
        ("HASH", Align::Left),
        ("ITERATIONS", Align::Right),
        ("KEYSLOTS", Align::Left),
        ("SEGMENTS", Align::Left),
    ];
    let rows: Vec<_> = numbered(digests)
        .map(|(number, digest)| {
            let text = |name: &str| digest.get(name).and_then(Value::as_str).unwrap_or("-");
            let count = digest.get("iterations").and_then(Value::as_u64);
            vec![
                printable(number),
                printable(text("type")),
                printable(text("hash")),
                count.map_or_else(|| "-".to_owned(), |count| count.to_string()),
                numbers(digest, "keyslots"),
                numbers(digest, "segments"),
            ]
        })
        .collect();
    table(&heads, &rows, colour)
}

/// The objects of a header by number; 10 comes after 9.
fn numbered(objects: &Map<String, Value>) -> impl Iterator<Item = (&str, &Value)> {
    let mut sorted: Vec<_> = objects.iter().map(|(number, object)| (number.as_str(), object)).collect();
    sorted.sort_by_key(|(number, _)| (number.parse::<u32>().unwrap_or(u32::MAX), *number));
    sorted.into_iter()
}

fn numbers(object: &Value, name: &str) -> String {
    let list = object.get(name).and_then(Value::as_array);
    let list: Vec<_> = list.into_iter().flatten().filter_map(Value::as_str).collect();
    if list.is_empty() { "-".to_owned() } else { printable(&list.join(",")) }
}

/// `repair`
pub fn repaired(repaired: &Repaired) -> String {
    if repaired.actions.is_empty() {
        return "there is nothing to repair\n".to_owned();
    }
    let head = if repaired.dry_run { "would be done:" } else { "done:" };
    let actions: String =
        repaired.actions.iter().map(|action| format!("  {}\n", printable(action))).collect();
    format!("{head}\n{actions}")
}

/// `doctor`
pub fn doctor(doctor: &Doctor, colour: bool) -> String {
    let mut text = doctor.summary.as_ref().map_or_else(String::new, |header| summary(header, colour) + "\n");
    if doctor.findings.is_empty() {
        text.push_str("nothing to remark\n");
    }
    for finding in &doctor.findings {
        text.push_str(&self::finding(finding, colour));
    }
    if !doctor.tools.is_empty() {
        text.push('\n');
        let heads = [("TOOL", Align::Left), ("OPENS IT", Align::Left), ("REMARK", Align::Left)];
        let rows: Vec<_> = doctor
            .tools
            .iter()
            .map(|tool| {
                let opens = if tool.opens { "yes" } else { "no" };
                vec![printable(&tool.name), opens.to_owned(), printable(&tool.remark)]
            })
            .collect();
        text.push_str(&table(&heads, &rows, colour));
    }
    text
}

fn finding(finding: &Finding, colour: bool) -> String {
    const RED: &str = "\x1b[1;31m";
    const YELLOW: &str = "\x1b[33m";
    let (word, code) = match finding.severity {
        Severity::Danger => ("DANGER", RED),
        Severity::Weak => ("weak", YELLOW),
        Severity::Note => ("note", ""),
    };
    let padded = format!("{word:6}");
    let word = if colour && !code.is_empty() { format!("{code}{padded}\x1b[0m") } else { padded };
    let mut text = format!("{word}  {}: {}\n", printable(&finding.about), printable(&finding.message));
    if let Some(advice) = &finding.advice {
        text.push_str(&format!("        {}\n", printable(advice)));
    }
    text
}

#[cfg(test)]
mod tests;
