//! From words to the wire, on real files.

use super::*;
use crate::args::{Cli, Verb};
use clap::Parser;
use proto::reencrypt::{Luks, RawPair};
use proto::{Raw, Tuning, TweakKind, luks};
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

const UUID: &str = "0f8fad5b-d9cb-469f-a165-70867728950e";

/// As much of a LUKS2 header as this program looks at.
fn header_bytes() -> Vec<u8> {
    let mut bytes = vec![0; 8192];
    bytes[..8].copy_from_slice(b"LUKS\xba\xbe\x00\x02");
    bytes[168..168 + UUID.len()].copy_from_slice(UUID.as_bytes());
    bytes
}

/// A directory with keys, a volume `luks`, and plain data `plain`.
fn place() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("dir");
    for (name, byte) in [("one", 1), ("two", 2), ("three", 3)] {
        std::fs::write(dir.path().join(name), [byte; 64]).expect("write");
    }
    std::fs::write(dir.path().join("key32"), [9; 32]).expect("write");
    std::fs::write(dir.path().join("luks"), header_bytes()).expect("write");
    std::fs::write(dir.path().join("other"), header_bytes()).expect("write");
    std::fs::write(dir.path().join("plain"), [b'p'; 8192]).expect("write");
    let parts = |name: &str, parts: &[(usize, &[u8])]| {
        let mut bytes = vec![0; 1 << 20];
        parts.iter().for_each(|(at, part)| bytes[*at..at + part.len()].copy_from_slice(part));
        std::fs::write(dir.path().join(name), bytes).expect("write");
    };
    parts("swap", &[(1024, &[1, 0, 0, 0, 255]), (4086, b"SWAPSPACE2")]);
    // Of 256 blocks of 4096 bytes: all there is.
    parts("ext", &[(1024 + 0x38, &[0x53, 0xef]), (1024 + 4, &[0, 1]), (1024 + 0x18, &[2])]);
    dir
}

/// `@` is the directory, `K1` to `K3` are references to its keys.
fn typed(dir: &Path, words: &str) -> Result<Opened> {
    let at = dir.to_str().expect("UTF-8");
    let words = words
        .replace("K1", "file:@/one")
        .replace("K2", "file:@/two")
        .replace("K3", "file:@/three")
        .replace('@', at);
    let words = ["cryptctl", "reencrypt", "--yes"].into_iter().chain(words.split_whitespace());
    let Verb::Reencrypt(args) = Cli::try_parse_from(words).expect("parses").verb else { panic!("typed") };
    // Of volumes on servers, which these are not.
    open(&args, &mut |end| panic!("{} was asked for", end.name))
}

fn sent(dir: &Path, words: &str) -> (Request, Prepared) {
    let prepared = typed(dir, words).and_then(|opened| opened.create(&[]));
    let mut prepared = prepared.unwrap_or_else(|error| panic!("{words}: {error}"));
    let request = *prepared.submit.reencrypt.take().expect("a re-encryption");
    assert_eq!(prepared.submit.action, Action::Reencrypt);
    assert!(prepared.submit.source.is_none() && prepared.submit.sink.is_none());
    (request, prepared)
}

fn luks_of(request: &Request) -> &Luks {
    match &request.format {
        Format::Luks(luks) => luks,
        Format::Raw(_) => panic!("raw"),
    }
}

fn refused(dir: &Path, words: &str, says: &str) {
    let error = typed(dir, words).err().unwrap_or_else(|| panic!("{words}: accepted"));
    assert_eq!(error.exit as u8, 2, "{words}: {error}");
    assert!(error.to_string().contains(says), "{words}: {error}");
}

/// What arrives through a descriptor.
fn secret(prepared: &Prepared, index: u32) -> Vec<u8> {
    use std::io::Read;
    let fd = prepared.descriptors[usize::try_from(index).expect("small")].try_clone().expect("a copy");
    let mut bytes = Vec::new();
    std::fs::File::from(fd).read_to_end(&mut bytes).expect("a pipe");
    bytes
}

#[test]
fn everything_typed_reaches_the_wire() {
    let dir = place();
    let (request, prepared) = sent(
        dir.path(),
        "@/luks --key K1 --key K2 --new-key K3 --resilience journal --hotzone-size 64M --verify --drop-slots \
         --cipher aes-xts-plain64 --key-size 512 --sector-size 4096 --sector-size-may-break-filesystem \
         --pbkdf argon2id --iter-time 100 --pbkdf-memory 65536 --throttle 1M --workers 2 --detach",
    );
    assert_eq!((request.mode, request.resume_only, request.dry_run), (Mode::Reencrypt, false, false));
    assert_eq!(request.resilience, Some(Resilience::Journal));
    assert_eq!((request.hotzone_bytes, request.verify), (Some(64 << 20), true));
    assert_eq!(
        *luks_of(&request),
        Luks {
            drop_slots: true,
            cipher: Some("aes-xts-plain64".into()),
            key_bytes: Some(64),
            data_unit: Some(4096),
            force_data_unit: true,
            kdf: Some(luks::KdfWish {
                kind: Some(luks::KdfKind::Argon2id),
                iter_time_ms: Some(100),
                memory_kib: Some(65536),
                ..luks::KdfWish::default()
            }),
            ..Luks::default()
        }
    );
    assert_eq!((prepared.submit.bytes_per_second, prepared.submit.detach), (Some(1 << 20), true));
    assert_eq!(prepared.submit.tuning, Tuning { workers: Some(2), ..Tuning::default() });
    assert_eq!(secret(&prepared, request.keys[0]), [1; 64]);
    assert_eq!(secret(&prepared, request.keys[1]), [2; 64]);
    assert_eq!(secret(&prepared, request.new_key.expect("a new one")), [3; 64]);
    let json = serde_json::to_string(&request).expect("serializes");
    let back: Request = serde_json::from_str(&json).expect("what was sent can be read");
    assert_eq!(back, request);
}

#[test]
fn what_is_not_said_is_left_to_the_daemon() {
    let dir = place();
    let (request, _) = sent(dir.path(), "@/luks --key K1");
    assert_eq!(*luks_of(&request), Luks::default());
    assert_eq!((request.resilience, request.hotzone_bytes, request.new_key), (None, None, None));
    assert_eq!(request.keys.len(), 1);
}

#[test]
fn a_raw_volume_keeps_what_it_is_unless_told_otherwise() {
    let dir = place();
    let words = "@/plain --format raw --key file:@/key32 --key-size 256 --iv plain --iv-offset 8 --sector-size \
                 4096 --iv-large-sectors --new-key K1 --new-key-size 512 --journal @/j";
    let (request, prepared) = sent(dir.path(), words);
    let old =
        Raw { key_bytes: 32, data_unit: 4096, tweak: TweakKind::Plain, large_tweak: true, tweak_offset: 8 };
    let Format::Raw(pair) = request.format else { panic!("LUKS") };
    let RawPair { old: sent_old, new, journal } = *pair;
    assert_eq!((&sent_old, &new), (&old, &Raw { key_bytes: 64, ..old.clone() }));
    let mode = std::fs::metadata(dir.path().join("j")).expect("created").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(journal.name.ends_with("/j"));
    // Refused before anything was written to it: it goes. One that was written to stays.
    prepared.partials[0].refused();
    assert!(!dir.path().join("j").exists());
    let (_, prepared) = sent(dir.path(), words);
    std::fs::write(dir.path().join("j"), "begun").expect("write");
    prepared.partials[0].refused();
    prepared.partials[0].ended();
    assert!(dir.path().join("j").exists());
    drop(prepared);
    // It is gone on with, and is not ours to remove.
    let (_, prepared) = sent(dir.path(), &format!("{words} --resume-only"));
    assert!(prepared.partials.is_empty());
    let (request, _) = sent(
        dir.path(),
        "@/plain --format raw --key K1 --new-key K2 --journal @/k --iv-large-sectors --new-iv-large-sectors=false \
         --new-iv plain64 --new-iv-offset 1 --new-sector-size 512",
    );
    let Format::Raw(pair) = request.format else { panic!("LUKS") };
    assert!(pair.old.large_tweak && !pair.new.large_tweak && pair.new.tweak_offset == 1);
}

#[test]
fn a_dry_run_creates_no_file() {
    let dir = place();
    let before = std::fs::read_dir(dir.path()).expect("list").count();
    for words in [
        "@/plain --format raw --key K1 --new-key K2 --journal @/j --dry-run",
        "@/plain --encrypt --header @/head --new-key K1 --dry-run",
    ] {
        let (request, prepared) = sent(dir.path(), words);
        assert!(request.dry_run && prepared.partials.is_empty());
        assert_eq!(std::fs::read_dir(dir.path()).expect("list").count(), before, "{words}");
    }
}

#[test]
fn a_new_detached_header_is_a_partial_until_it_is_whole() {
    let dir = place();
    let (request, prepared) =
        sent(dir.path(), &format!("@/plain --encrypt --header @/head --key K1 --label x --uuid {UUID}"));
    assert_eq!(request.mode, Mode::Encrypt);
    assert!(request.keys.is_empty(), "its first passphrase is a new one");
    assert_eq!(secret(&prepared, request.new_key.expect("the first")), [1; 64]);
    let luks = luks_of(&request);
    assert_eq!((luks.label.as_deref(), luks.uuid.as_deref()), (Some("x"), Some(UUID)));
    let commit = luks.commit.as_ref().expect("a new file");
    assert_eq!((commit.partial.as_str(), commit.name.as_str()), ("head.partial", "head"));
    assert!(!commit.replace && !commit.keep_partial);
    let mode = std::fs::metadata(dir.path().join("head.partial")).expect("created").permissions().mode();
    assert_eq!(mode & 0o077, 0);
    prepared.partials[0].refused();
    assert!(!dir.path().join("head.partial").exists());
}

#[test]
fn encrypting_again_goes_on_with_what_was_begun() {
    let dir = place();
    std::fs::write(dir.path().join("head"), header_bytes()).expect("write");
    for words in ["@/plain --encrypt --header @/head --new-key K1", "@/luks --encrypt --key K1"] {
        let (request, prepared) = sent(dir.path(), words);
        assert!(request.resume_only && request.new_key.is_none(), "{words}");
        assert_eq!(secret(&prepared, request.keys[0]), [1; 64]);
        assert!(prepared.partials.is_empty() && luks_of(&request).commit.is_none());
    }
    std::fs::write(dir.path().join("head"), "something else").expect("write");
    let error = typed(dir.path(), "@/plain --encrypt --header @/head --new-key K1").err().expect("refused");
    assert!(error.to_string().contains("holds something that is no LUKS header"), "{error}");
    assert_eq!(error.failure.kind, ErrorKind::Conflict);
}

#[test]
fn what_contradicts_itself_is_refused() {
    let dir = place();
    for (words, says) in [
        ("@/luks", "--key is missing"),
        ("@/luks --new-key K1", "--key is missing"),
        ("@/luks --decrypt --key K1", "--decrypt needs --header"),
        ("@/luks --decrypt --header @/plain --key K1 --new-key K2", "--new-key means nothing with --decrypt"),
        ("@/plain --encrypt --new-key K1", "the new header needs a place"),
        ("@/plain --encrypt --key K1 --new-key K2 --reduce-device-size 32M", "needs one passphrase"),
        ("@/plain --encrypt --key K1 --reduce-device-size 32M --drop-slots", "--drop-slots means nothing"),
        ("@/luks --key K1 --resilience none", "would destroy data"),
        ("@/luks --key K1 --crash-may-destroy-data", "belongs to --resilience none"),
        ("@/luks --key K1 --resilience datashift", "nothing moves without --reduce-device-size"),
        ("@/luks --key K1 --resume-only --cipher aes-xts-plain64", "goes on as it was begun"),
        ("@/luks --key K1 --resume-only --resilience journal", "goes on as it was begun"),
        ("@/luks --key K1 --resume-only --iter-time 5", "--iter-time: what was begun"),
        ("@/luks --key prompt --key prompt", "only one of them can be a prompt"),
        ("@/luks --key fd:0 --new-key fd:0", "cannot hold two secrets"),
        ("@/luks --key 0123456789abcdef", "expected file:PATH"),
        ("@/luks --key K1 --header @/luks", "is VOLUME itself"),
        ("@/luks --key K1 --journal @/j", "--journal is an option of --format raw"),
        ("@/luks --key K1 --new-sector-size 512", "--new-sector-size is an option of --format raw"),
        ("@/luks --key K1 --iv plain", "--iv is an option of --format raw"),
        ("@/plain --format raw --key K1 --new-key K2", "--format raw needs --journal"),
        ("@/plain --format raw --key K1 --journal @/j", "needs one --key and one --new-key"),
        ("@/plain --format raw --key K1 --new-key K1 --journal @/j", "is the same volume key"),
        ("@/plain --format raw --key K1 --key K2 --new-key K3 --journal @/j", "needs one --key"),
        ("@/plain --format raw --key K1 --new-key K2 --journal @/plain", "is VOLUME itself"),
        ("@/luks --key K1 --force-sector-size", "belongs to --sector-size"),
        (
            "@/plain --format raw --key K1 --new-key K2 --journal @/j --force-sector-size",
            "belongs to --new-sector-size",
        ),
        (
            "@/plain --format raw --key K1 --new-key K2 --journal @/j --new-sector-size 4096",
            "larger than 512: a filesystem",
        ),
        ("@/luks --format raw --key K1 --new-key K2 --journal @/j", "holds a LUKS volume"),
        ("@/luks --header @/other --key K1", "not the ciphertext of the volume whose header is"),
        ("@/swap --format raw --key K1 --new-key K2 --journal @/j", "holds swap data"),
        ("@/swap --header @/luks --key K1", "holds swap data"),
        ("@/swap --header @/luks --key K1 --decrypt", "holds swap data"),
        ("@/ext --encrypt --new-key K1 --reduce-device-size 32k", "it was not shrunk"),
        ("@/key32 --encrypt --new-key K1 --header @/head", "no whole number of 512-byte sectors"),
        ("- --key K1", "VOLUME cannot be `-`"),
    ] {
        refused(dir.path(), words, says);
    }
    for option in [
        "--header @/luks",
        "--encrypt",
        "--decrypt",
        "--drop-slots",
        "--cipher aes-xts-plain64",
        "--pbkdf pbkdf2",
        "--hash sha256",
    ] {
        let words = format!("@/plain --format raw --key K1 --new-key K2 --journal @/j {option}");
        refused(dir.path(), &words, "is an option of LUKS");
    }
    assert!(!dir.path().join("j").exists(), "what is refused has created nothing");
}

#[test]
fn known_content_is_rewritten_by_who_says_so_and_by_who_goes_on() {
    let dir = place();
    let raw = "@/swap --format raw --key K1 --new-key K2 --journal @/j";
    for words in [
        &format!("{raw} --found-data-may-be-destroyed"),
        "@/swap --header @/luks --key K1 --found-data-may-be-destroyed",
        "@/swap --header @/luks --key K1 --resume-only",
        "@/ext --encrypt --new-key K1 --reduce-device-size 32k --filesystem-may-lose-its-end",
        "@/ext --encrypt --new-key K1 --header @/head",
    ] {
        let _ = sent(dir.path(), words);
    }
    // Begun, and not said to be: by what the journal, or the header, holds.
    std::fs::write(dir.path().join("j"), "begun").expect("write");
    let _ = sent(dir.path(), raw);
    let mut header = header_bytes();
    header.resize(16384, 0);
    header[8..16].copy_from_slice(&16384_u64.to_be_bytes());
    header.splice(4096..4130, *b"{\"mandatory\":[\"online-reencrypt-v2\"]");
    std::fs::write(dir.path().join("begun"), &header).expect("write");
    let _ = sent(dir.path(), "@/swap --header @/begun --key K1 --decrypt");
}

#[test]
fn the_whole_command_to_go_on_is_told() {
    let dir = place();
    let said = |words: &str| {
        let opened = typed(dir.path(), words).unwrap_or_else(|error| panic!("{error}"));
        let hint = "go on with cryptctl reencrypt --resume-only, or with others";
        let error = opened.words().of(Error::new(ErrorKind::Cancelled, "cancelled").hint(hint));
        let at = dir.path().display().to_string();
        error.failure.hint.expect("a hint").replace(&at, "@")
    };
    let text = said("@/luks --key K1 --drop-slots");
    assert!(text.starts_with("go on with cryptctl reencrypt @/luks --resume-only --key file:@/"), "{text}");
    assert!(text.ends_with(", or cryptsetup reencrypt --resume-only @/luks"), "{text}");
    let text = said("@/luks --key K1 --new-key K2");
    assert!(text.contains(" --new-key file:@/") && !text.contains("cryptsetup"), "{text}");
    let text = said("@/plain --format raw --key K1 --new-key K2 --journal @/j");
    assert!(text.contains("--format raw --journal @/j --key ") && !text.contains("cryptsetup"), "{text}");
    let text = said("@/plain --encrypt --header @/head --new-key K1");
    assert!(text.contains("--encrypt --header @/head --new-key ") && text.contains("cryptsetup"), "{text}");
    let opened = typed(dir.path(), "@/luks --encrypt --key K1").unwrap_or_else(|error| panic!("{error}"));
    let error = Error::new(ErrorKind::Invalid, "nothing").hint("without --resume-only one is begun");
    let error = opened.words().of(error);
    assert!(error.failure.hint.is_some_and(|hint| hint.contains("is finished")));
    assert!(error.failure.message.contains("a LUKS volume already"), "{}", error.failure.message);
    assert_eq!(quoted("a b'c"), r"'a b'\''c'");
}

#[test]
fn the_command_line_knows_what_goes_together() {
    for words in [
        "v --key prompt --encrypt --decrypt",
        "v --key prompt --dry-run --detach",
        "v --key prompt --label x",
        "v --key prompt --reduce-device-size 32M",
        "v --encrypt --reduce-device-size 32M --header h --new-key prompt",
        "v --encrypt --new-key prompt --header h --filesystem-may-lose-its-end",
        "v --key prompt --resilience sometimes",
        "v --key prompt --hotzone-size 0",
        "--key prompt",
    ] {
        let all = ["cryptctl", "reencrypt"].into_iter().chain(words.split(' '));
        assert_eq!(Cli::try_parse_from(all).expect_err(words).exit_code(), 2);
    }
}

#[test]
fn what_is_left_of_one_that_is_over_needs_no_key() {
    let dir = place();
    let (request, _) = sent(dir.path(), "@/luks --resume-only");
    assert!(request.resume_only && request.keys.is_empty() && request.new_key.is_none());
}

#[test]
fn none_is_accepted_by_who_accepts_what_it_costs() {
    let dir = place();
    let (request, _) = sent(dir.path(), "@/luks --key K1 --resilience none --crash-may-destroy-data");
    assert_eq!(request.resilience, Some(Resilience::None));
    let (request, _) =
        sent(dir.path(), "@/plain --encrypt --new-key K1 --reduce-device-size 32M --resilience datashift");
    assert_eq!(luks_of(&request).reduce_bytes, Some(32 << 20));
}

#[test]
fn the_locks_are_cryptsetups_and_travel_with_the_request() {
    let dir = place();
    let locks = dir.path().join("locks");
    let opened = typed(dir.path(), "@/luks --key K1").unwrap_or_else(|error| panic!("{error}"));
    let held = opened.lock(&locks, &mut |_| ()).unwrap_or_else(|error| panic!("{error}"));
    let file = locks.join(format!("LN_LUKS2-reencryption-{UUID}"));
    assert!(file.exists() && held.len() == 1);
    let second = typed(dir.path(), "@/luks --key K1").unwrap_or_else(|error| panic!("{error}"));
    let error = second.lock(&locks, &mut |_| ()).err().expect("one at a time");
    assert_eq!(error.failure.kind, ErrorKind::Conflict);
    let prepared = opened.create(&held).unwrap_or_else(|error| panic!("{error}"));
    let request = prepared.submit.reencrypt.as_ref().expect("a re-encryption");
    assert_eq!(request.lock_fds.len(), 1);
    // We die; the daemon, which has the descriptors, goes on.
    drop(held);
    assert!(second.lock(&locks, &mut |_| ()).is_err());
    drop(prepared);
    // A program that another test starts has our descriptors, and so the lock, until it runs.
    let free =
        || second.lock(&locks, &mut |_| ()).inspect_err(|_| std::thread::sleep(Duration::from_millis(10)));
    let again = (0..1000).find_map(|_| free().ok()).expect("nobody has it");
    again.into_iter().for_each(Lock::release);
    assert!(!file.exists());
    // Who may not have it goes on without: the daemon locks the file.
    let none = dir.path().join("a").join("b");
    let mut said = Vec::new();
    let got = second.lock(&none, &mut |text| said.push(text.to_owned()));
    assert!(got.is_ok_and(|locks| locks.is_empty()) && said.is_empty(), "{said:?}");
}

#[test]
fn a_new_volume_is_locked_by_the_uuid_it_will_have() {
    let dir = place();
    let locks = dir.path().join("locks");
    let words = "@/plain --encrypt --header @/head --new-key K1";
    let opened = typed(dir.path(), words).unwrap_or_else(|error| panic!("{error}"));
    let held = opened.lock(&locks, &mut |_| ()).unwrap_or_else(|error| panic!("{error}"));
    let prepared = opened.create(&held).unwrap_or_else(|error| panic!("{error}"));
    let request = prepared.submit.reencrypt.as_ref().expect("a re-encryption");
    let uuid = luks_of(request).uuid.as_ref().expect("chosen");
    assert!(locks.join(format!("LN_LUKS2-reencryption-{uuid}")).exists());
    let other = typed(dir.path(), "@/plain --encrypt --new-key K1 --reduce-device-size 32M --dry-run");
    let other = other.unwrap_or_else(|error| panic!("{error}"));
    assert!(other.lock(&locks, &mut |_| ()).is_ok_and(|locks| locks.is_empty()), "a dry run locks nothing");
}

#[test]
fn a_newline_that_may_be_the_reason_is_told_of_when_the_key_does_not_fit() {
    let dir = place();
    std::fs::write(dir.path().join("line"), "secret\n").expect("write");
    let opened = typed(dir.path(), "@/luks --key K1 --key file:@/line").unwrap_or_else(|e| panic!("{e}"));
    assert!(opened.doubt.is_some_and(|doubt| doubt.contains("/line ends in a newline")));
    let opened = typed(dir.path(), "@/luks --key K1 --new-key K1").unwrap_or_else(|e| panic!("{e}"));
    assert!(opened.warnings.iter().any(|warning| warning.contains("would simply be kept")));
}
