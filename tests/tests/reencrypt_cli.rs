//! `cryptctl reencrypt` with the real daemon: what is refused before anything is written, what is said, with which status, and
//! what a whole re-encryption leaves behind.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};

use proto::reencrypt::{Phase, Report};
use proto::{Action, Body, ErrorKind, Event, JobInfo, JobState, Reply};
use rustix::fs::{FlockOperation, flock};
use rustix::process::Signal;
use tests::luks::{CHEAP_PBKDF2, cryptsetup_opens, have, secret};
use tests::{Place, Ran, User, as_each_user, eventually, is_root, loop_device, skip};

const MIB: usize = 1 << 20;

/// A place with passphrases `one`, `two` and `three`, plaintext `plain`, and a volume `v` of it that `one` opens.
fn place(user: User, bytes: usize) -> Place {
    let place = Place::new(user);
    for name in ["one", "two", "three"] {
        secret(&place, name, name.as_bytes());
    }
    let _ = place.noise("plain", bytes);
    let words = format!("encrypt @/plain @/v --key file:@/one --sector-size 512 {CHEAP_PBKDF2}");
    let _ = place.run(&words).done();
    place
}

/// The job as the last line of `--json` has it.
fn finished(ran: &Ran) -> JobInfo {
    let last = ran.lines().pop().expect("a line");
    match last.body {
        Body::Event(Event::Finished(info)) => *info,
        other => panic!("not the end of a job: {other:?}"),
    }
}

fn report(info: &JobInfo) -> Report {
    let outcome = info.outcome.as_ref().expect("it is over");
    *outcome.reencrypt.clone().expect("a report")
}

/// Does the volume hold the plaintext still, opened with this key?
fn holds(place: &Place, key: &str) {
    let _ = place.run(&format!("verify @/plain @/v --key file:@/{key}")).done();
}

fn opens_not(place: &Place, key: &str) {
    let _ = place.run(&format!("luks open-test @/v --key file:@/{key}")).exit(4, &[]);
}

#[test]
fn a_volume_key_is_rotated_and_the_report_proves_it() {
    as_each_user(|user| {
        let place = place(user, 9 * MIB);
        let before = place.read("v");
        let ran = place.run("reencrypt @/v --key file:@/one --verify").done();
        let text = ran.text();
        for row in ["resilience        checksum", "keyslots          kept 0", "verified          equal"] {
            assert!(text.contains(row), "{row}: {text}");
        }
        assert!(text.contains("old volume key    opens nothing any more"), "{text}");
        assert!(text.contains("header backup"), "{text}");
        assert!(ran.stderr.contains("re-encrypted 9.00 MiB"), "{}", ran.stderr);
        let after = place.read("v");
        assert_eq!(before.len(), after.len());
        assert!(before[16 * MIB..] != after[16 * MIB..], "the data is what it was");
        holds(&place, "one");
        if have(&["cryptsetup"]) {
            assert!(cryptsetup_opens(&place, "v", "one"));
        }
    });
}

#[test]
fn with_json_the_report_is_in_the_last_event_and_every_line_is_of_the_wire() {
    let place = place(User::Me, 4 * MIB);
    let words = "reencrypt @/v --key file:@/one --new-key file:@/two --sector-size 4096 --force-sector-size --verify --json";
    let ran = place.run(words).done();
    let info = finished(&ran);
    assert_eq!((info.action, info.state), (Action::Reencrypt, JobState::Done));
    assert!(info.source.ends_with("/v"), "{}", info.source);
    let report = report(&info);
    assert_eq!(report.total_bytes, 4 << 20);
    assert_eq!((report.done_before_bytes, report.recovered_bytes), (0, 0));
    assert!(report.old_cipher.as_ref().is_some_and(|old| old.contains("512-byte")), "{report:?}");
    assert!(report.new_cipher.as_ref().is_some_and(|new| new.contains("4096-byte")), "{report:?}");
    assert_eq!(report.resilience, "checksum");
    assert!(report.digest_before.is_some() && report.digest_before == report.digest_after, "{report:?}");
    assert_eq!(report.digest_bytes, 4 << 20);
    assert!(report.old_key_gone && report.estimate_seconds.is_none());
    // The first line is the answer to the request, the rest is news.
    let lines = ran.lines();
    assert!(matches!(&lines[0].body, Body::Ok(Reply::Submitted { .. })), "{:?}", lines[0]);
    for line in &lines {
        if let Body::Event(Event::Progress { progress, .. }) = &line.body {
            assert!(progress.done_bytes <= 4 << 20);
            assert!(matches!(progress.phase, None | Some(Phase::Rewriting | Phase::Verifying)));
        }
    }
    assert!(!ran.stderr.contains("old volume key"), "the report is told twice: {}", ran.stderr);
    holds(&place, "two");
    opens_not(&place, "one");
}

#[test]
fn a_wrong_key_ends_with_four_and_writes_nothing() {
    as_each_user(|user| {
        let place = place(user, MIB);
        let before = place.read("v");
        let _ = place.run("reencrypt @/v --key file:@/two").exit(4, &["wrong key"]);
        let ran = place.run("reencrypt @/v --key file:@/two --json").exit(4, &["wrong key"]);
        assert!(
            matches!(&ran.lines().last().expect("a line").body, Body::Error(why) if why.kind == ErrorKind::WrongKey)
        );
        assert!(place.read("v") == before);
    });
}

#[test]
fn keyslots_that_would_be_lost_are_named_first() {
    let place = place(User::Me, MIB);
    for name in ["two", "three"] {
        let words = format!("luks add-key @/v --key file:@/one --new-key file:@/{name} {CHEAP_PBKDF2}");
        let _ = place.run(&words).done();
    }
    let before = place.read("v");
    let ran = place.run("reencrypt @/v --key file:@/one --key file:@/three").exit(1, &["drop"]);
    assert!(ran.stderr.contains('1'), "keyslot 1 is not named: {}", ran.stderr);
    assert!(place.read("v") == before);
    let words = "reencrypt @/v --key file:@/one --key file:@/three --drop-slots --json";
    let report = report(&finished(&place.run(words).done()));
    assert_eq!((report.carried_keyslots, report.dropped_keyslots), (vec![0, 2], vec![1]));
    holds(&place, "one");
    holds(&place, "three");
    opens_not(&place, "two");
}

#[test]
fn a_dry_run_says_what_it_would_do_and_writes_nothing() {
    as_each_user(|user| {
        let place = place(user, 8 * MIB);
        let (before, names) = (place.read("v"), place.names());
        let ran = place.run("reencrypt @/v --key file:@/one --dry-run").done();
        assert!(ran.text().contains("would take") && ran.text().contains("to keep 0"), "{}", ran.text());
        assert!(ran.stderr.contains("nothing was written"), "{}", ran.stderr);
        let ran = place.run("reencrypt @/v --key file:@/one --dry-run --json").done();
        let report = report(&finished(&ran));
        assert!(report.estimate_seconds.is_some_and(|seconds| seconds > 0.0), "{report:?}");
        assert!(!report.old_key_gone);
        let _ = place.run("reencrypt @/v --key file:@/two --dry-run").exit(4, &["wrong key"]);
        // Reading is enough.
        std::fs::set_permissions(place.path("v"), PermissionsExt::from_mode(0o400)).expect("mode");
        let _ = place.run("reencrypt @/v --key file:@/one --dry-run").done();
        assert!(place.read("v") == before);
        assert_eq!(place.names(), names);
    });
}

#[test]
fn an_interrupt_stops_at_a_safe_point_and_the_same_command_goes_on() {
    for resume in ["", " --resume-only"] {
        let place = place(User::Me, 24 * MIB);
        let words = "reencrypt @/v --key file:@/one --hotzone-size 1M";
        let running = place.spawn(&format!("{words} --throttle 4M"));
        let _ = place.moving();
        running.signal(Signal::INT);
        let ran = running.wait().exit(1, &["safe point", "--resume-only --key file:"]);
        assert!(ran.stderr.contains("cryptsetup reencrypt --resume-only /"), "{}", ran.stderr);
        assert_eq!(ran.text(), "", "no proof of what is not done");
        let _ = place.run("luks dump @/v").done();
        let doctor = place.run("luks doctor @/v").exit(1, &[]).text();
        assert!(doctor.contains("cryptctl reencrypt --resume-only"), "{doctor}");
        let ran = place.run(&format!("reencrypt @/v --key file:@/one{resume} --json")).done();
        let report = report(&finished(&ran));
        assert!(report.done_before_bytes > 0 && report.done_before_bytes < 24 << 20, "{report:?}");
        assert!(report.old_key_gone);
        holds(&place, "one");
    }
}

#[test]
fn another_volume_or_a_filesystem_is_not_taken_for_ciphertext() {
    let place = place(User::Me, MIB);
    secret(&place, "k1", &[1; 64]);
    secret(&place, "k2", &[2; 64]);
    let _ = place.run("luks header-backup @/v @/head").done();
    let before = place.read("v");
    let raw = "reencrypt @/v --format raw --key file:@/k1 --new-key file:@/k2 --journal @/j";
    let _ = place.run(raw).exit(2, &["holds a LUKS volume", "--found-data-may-be-destroyed"]);
    let words = "reencrypt @/v --header @/head --key file:@/one";
    let _ = place.run(words).exit(2, &["holds a LUKS volume", "--found-data-may-be-destroyed"]);
    let _ = place.run(&format!("{words} --decrypt")).exit(2, &["holds a LUKS volume"]);
    assert!(place.read("v") == before);
    assert!(!place.path("j").exists());
    if !have(&["mkfs.ext4"]) {
        return skip("no ext4 to be made here");
    }
    let _ = place.shell("truncate -s 64M @/fs && mkfs.ext4 -q -F @/fs").done();
    let before = place.read("fs");
    let _ = place.run(&raw.replace("@/v", "@/fs")).exit(2, &["holds a filesystem (ext4)"]);
    let words = "reencrypt @/fs --encrypt --new-key file:@/one --reduce-device-size 32M";
    let _ = place.run(words).exit(2, &["it was not shrunk", "--filesystem-may-lose-its-end"]);
    assert!(place.read("fs") == before);
}

#[test]
fn a_header_is_left_alone_while_its_volume_is_re_encrypted() {
    let place = place(User::Me, 24 * MIB);
    let _ = place.run("luks header-backup @/v @/head").done();
    let running = place.spawn("reencrypt @/v --key file:@/one --hotzone-size 1M --throttle 4M");
    let _ = place.moving();
    for words in ["header-restore @/v @/head --replace-other-header", "erase @/v --yes-destroy-all-keys"] {
        let _ = place.run(&format!("luks {words}")).exit(1, &["being re-encrypted"]);
    }
    running.signal(Signal::INT);
    let _ = running.wait().exit(1, &["safe point"]);
    let _ =
        place.run("luks header-restore @/v @/head").exit(1, &["re-encryption of it is under way", "lost"]);
    let _ = place.run("reencrypt @/v --key file:@/one --resume-only").done();
    holds(&place, "one");
}

#[test]
fn a_second_interrupt_leaves_at_once_and_nothing_is_lost() {
    let place = place(User::Me, 24 * MIB);
    let running = place.spawn("reencrypt @/v --key file:@/one --hotzone-size 16M --throttle 1M");
    let _ = place.moving();
    running.signal(Signal::INT);
    eventually("it is told how to leave", || running.said().contains("interrupt again to leave at once"));
    running.signal(Signal::INT);
    let ran = running.wait();
    assert!(matches!(ran.code, Some(130 | 1)), "{:?}: {}", ran.code, ran.stderr);
    eventually("the job ends", || place.jobs().iter().all(|job| job.state.is_final()));
    let _ = place.run("reencrypt @/v --key file:@/one --resume-only").done();
    holds(&place, "one");
}

#[test]
fn a_detached_one_is_watched_shown_and_listed() {
    let place = place(User::Me, 8 * MIB);
    let id =
        place.run("reencrypt @/v --key file:@/one --detach --hotzone-size 1M --throttle 4M").done().text();
    let id = id.trim();
    let list = place.run("job list").done().text();
    assert!(list.contains("reencrypt"), "{list}");
    // The volume is under way: nobody else begins.
    let _ = place.run("reencrypt @/v --key file:@/one").exit(1, &[]);
    let ran = place.run(&format!("job watch {id}")).done();
    assert!(ran.text().contains("old volume key  opens nothing any more"), "{}", ran.text());
    let shown = place.run(&format!("job show {id}")).done().text();
    assert!(shown.contains("volume          ") && shown.contains("old volume key  opens"), "{shown}");
    holds(&place, "one");
}

#[test]
fn usage_errors_end_with_two_and_touch_nothing() {
    let place = place(User::Me, MIB);
    let (before, names) = (place.read("v"), place.names());
    let raw = "reencrypt @/plain --format raw --key file:@/one --new-key file:@/two";
    for (words, says) in [
        ("reencrypt @/v", "--key is missing"),
        ("reencrypt @/v --key file:@/one --resilience none", "--crash-may-destroy-data"),
        ("reencrypt @/v --key file:@/one --encrypt --decrypt", "cannot be used with"),
        ("reencrypt @/v --key file:@/one --decrypt", "--decrypt needs --header"),
        ("reencrypt @/plain --encrypt --new-key file:@/one", "the new header needs a place"),
        ("reencrypt @/v --key file:@/one --journal @/j", "--format raw"),
        ("reencrypt @/v --key file:@/one --dry-run --detach", "cannot be used with"),
        ("reencrypt @/v --key file:@/one --hotzone-size 0", "must not be zero"),
        ("reencrypt @/v --key file:@/one --resume-only", "no re-encryption to go on with"),
        ("reencrypt @/plain --key file:@/one", "LUKS"),
        ("reencrypt - --key file:@/one", "cannot be `-`"),
        (raw, "--journal"),
        (&format!("{raw} --journal @/j"), "512-bit key"),
    ] {
        let _ = place.run(words).exit(2, &[says]);
        let ran = place.run(&format!("{words} --json")).exit(2, &[says]);
        assert!(matches!(ran.lines().last().expect("an object").body, Body::Error(_)), "{words}");
    }
    assert!(place.read("v") == before);
    assert_eq!(place.names(), names, "no journal, no header was left behind");
}

#[test]
fn help_says_what_each_resilience_survives_and_how_to_go_on() {
    let place = Place::new(User::Me);
    let text = place.run("reencrypt --help").done().text();
    for words in
        ["RESILIENCE", "checksum ", "journal ", "datashift ", "none ", "--resume-only", "EXIT STATUS"]
    {
        assert!(text.contains(words), "{words}");
    }
    std::fs::create_dir(place.path("man")).expect("made");
    place.give(&place.path("man"));
    let _ = place.run("man @/man").done();
    assert!(String::from_utf8_lossy(&place.read("man/cryptctl-reencrypt.1")).contains("RESILIENCE"));
    for shell in ["bash", "zsh", "fish"] {
        let script = place.run(&format!("completions {shell}")).done().text();
        assert!(script.contains("crash-may-destroy-data"), "{shell}");
    }
}

#[test]
fn a_device_in_use_and_the_file_under_a_loop_device_are_refused() {
    let place = place(User::Me, MIB);
    let Some(device) = loop_device(32 << 20) else { return };
    let path = device.path().display();
    std::fs::copy(place.path("v"), device.path()).expect("copied");
    let held = OpenOptions::new()
        .read(true)
        .custom_flags(rustix::fs::OFlags::EXCL.bits().cast_signed())
        .open(device.path());
    let held = held.expect("opened exclusively");
    let _ = place
        .run(&format!("reencrypt {path} --key file:@/one"))
        .exit(1, &["is in use", "unmount it and close its mapping"]);
    let _ = place.run(&format!("reencrypt {path} --key file:@/one --dry-run")).done();
    drop(held);
    let _ = place
        .run(&format!("reencrypt {} --key file:@/one", device.backing().display()))
        .exit(1, &["is attached to", "losetup -d"]);
    let _ = place.run(&format!("reencrypt {path} --key file:@/one")).done();
    let _ = place.run(&format!("luks open-test {path} --key file:@/one")).done();
}

#[test]
fn a_mapped_volume_is_refused() {
    let place = place(User::Me, MIB);
    let Some(device) = loop_device(32 << 20) else { return };
    std::fs::copy(place.path("v"), device.path()).expect("copied");
    let name = format!("cryptctl-test-{}", std::process::id());
    let path = device.path().display();
    let script = format!("cryptsetup open {path} {name} --key-file @/one");
    if !is_root() || place.shell(&script).code != Some(0) {
        return skip("no device-mapper to be had here");
    }
    let ran = place.run(&format!("reencrypt {path} --key file:@/one"));
    let closed = place.shell(&format!("cryptsetup close {name}"));
    let _ = ran.exit(1, &["is in use", "cryptsetup reencrypt"]);
    let _ = closed.done();
}

#[test]
fn who_holds_cryptsetups_lock_is_not_disturbed() {
    let place = place(User::Me, MIB);
    if !is_root() || !have(&["cryptsetup"]) {
        return skip("only root has cryptsetup's locks");
    }
    let uuid = place.shell("cryptsetup luksUUID @/v").done().text();
    let _ = std::fs::create_dir("/run/cryptsetup");
    let path = format!("/run/cryptsetup/LN_LUKS2-reencryption-{}", uuid.trim());
    let lock = File::create(&path).expect("made");
    flock(&lock, FlockOperation::NonBlockingLockExclusive).expect("locked");
    let before = place.read("v");
    let _ =
        place.run("reencrypt @/v --key file:@/one").exit(1, &["is being re-encrypted by another program"]);
    assert!(place.read("v") == before);
    drop(lock);
    // And the other way round: cryptsetup finds it locked while we work.
    let running = place.spawn("reencrypt @/v --key file:@/one --hotzone-size 64k --throttle 128k");
    let _ = place.moving();
    let lock = File::open(&path).expect("it is there while it is held");
    assert!(flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err());
    running.signal(Signal::INT);
    let _ = running.wait().exit(1, &[]);
    assert!(!std::path::Path::new(&path).exists(), "the last one removes it");
}

#[test]
fn a_journal_is_made_private_and_goes_if_nothing_was_begun() {
    as_each_user(|user| {
        let place = Place::new(user);
        let _ = place.noise("plain", 4 * MIB);
        let _ = place.run("encrypt @/plain @/raw RAW").done();
        secret(&place, "new", &place.key(64).iter().map(|byte| !byte).collect::<Vec<_>>());
        let words = "reencrypt @/raw RAW --new-key file:@/new --journal @/j";
        let _ = place.run(&format!("{words} --resume-only")).exit(1, &["cannot open the journal"]);
        assert!(!place.path("j").exists());
        // Something else is not overwritten.
        place.write("j", b"something else");
        let before = place.read("raw");
        let ran = place.run(words);
        assert!(ran.code.is_some_and(|code| code == 1 || code == 2), "{:?} {}", ran.code, ran.stderr);
        assert_eq!(place.read("j"), b"something else");
        assert!(place.read("raw") == before);
        std::fs::remove_file(place.path("j")).expect("removed");
        let running = place.spawn(&format!("{words} --hotzone-size 64k --throttle 256k"));
        let _ = place.moving();
        let mode = std::fs::metadata(place.path("j")).expect("made").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(std::fs::metadata(place.path("j")).expect("made").size() > 0);
        let _ = place.run(words).exit(1, &["under way"]);
        running.signal(Signal::TERM);
        let _ = running.wait().exit(1, &["--resume-only --format raw --journal", "--new-key file:"]);
        assert!(place.path("j").exists(), "it is needed to go on");
        let _ = place.run(&format!("{words} --resume-only")).done();
        let verify = "verify @/plain @/raw --format raw --key file:";
        let _ = place.run(&format!("{verify}@/new")).done();
    });
}
