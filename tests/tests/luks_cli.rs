//! `cryptctl luks` at its edges, with the real daemon: what is refused, with which words and status, and what stays as it was.

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, PermissionsExt};

use tests::luks::{CHEAP_PBKDF2, empty, secret};
use tests::{Place, User, as_each_user, is_root, loop_device, skip};

const MIB: usize = 1 << 20;

/// A place with passphrases and a small volume `v`.
fn place(user: User) -> Place {
    let place = Place::new(user);
    for name in ["one", "two"] {
        secret(&place, name, name.as_bytes());
    }
    place.write("plain", &[7; 4096]);
    let _ = place.run(&format!("encrypt @/plain @/v --key file:@/one {CHEAP_PBKDF2}")).done();
    place
}

#[test]
fn data_that_a_large_header_would_overwrite_is_refused_and_kept() {
    let place = place(User::Me);
    for (options, at, length) in [
        ("--luks2-keyslots-size 128M", 20 * MIB, 140 * MIB),
        ("--data-offset 64M", 20 * MIB, 100 * MIB),
        ("--format luks1 --data-offset 64M", 64 * MIB - 1, 100 * MIB),
    ] {
        empty(&place, "far", length);
        let file = OpenOptions::new().read(true).write(true).open(place.path("far")).expect("open");
        let at = u64::try_from(at).expect("an offset");
        file.write_all_at(b"!", at).expect("write");
        let words = format!("luks format @/far --key file:@/one {options} {CHEAP_PBKDF2}");
        let _ = place.run(&words).exit(1, &["holds data", "--force"]);
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).expect("read");
        assert_eq!(&byte, b"!", "{options}");
        let _ = place.run(&format!("{words} --force")).done();
        file.read_exact_at(&mut byte, at).expect("read");
        assert_ne!(&byte, b"!", "{options}: what was refused is what would have been overwritten");
    }
}

#[test]
fn a_device_that_holds_data_without_a_signature_is_refused_too() {
    let place = place(User::Me);
    let Some(device) = loop_device(32 << 20) else { return };
    let path = device.path().display();
    let file = OpenOptions::new().read(true).write(true).open(device.path()).expect("open");
    let at = 5 << 20;
    let words = format!("luks format {path} --key file:@/one {CHEAP_PBKDF2}");
    empty(&place, "far", MIB);
    let detached = format!("luks format @/far --header {path} --key file:@/one {CHEAP_PBKDF2}");
    for words in [&words, &detached] {
        file.write_all_at(b"!", at).expect("write");
        file.sync_all().expect("sync");
        let _ = place.run(words).exit(1, &["holds data", "--force"]);
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).expect("read");
        assert_eq!(&byte, b"!", "{words}");
        let _ = place.run(&format!("{words} --force")).done();
        let _ = place.run(words).exit(1, &["holds a LUKS volume", "--force"]);
        file.write_all_at(&vec![0; 32 * MIB], 0).expect("write");
        file.sync_all().expect("sync");
        let _ = place.run(words).done();
        file.write_all_at(&vec![0; 32 * MIB], 0).expect("write");
        file.sync_all().expect("sync");
    }
}

#[test]
fn refusals_of_the_daemon_name_the_option() {
    let place = place(User::Me);
    let _ = place.run("luks remove-key @/v --key-slot 0").exit(1, &["or use --last-key-destroy-data"]);
    for _ in 0..2 {
        let _ = place.run("luks token add @/v --key-ref file:/k --token-id 3 --token-replace").done();
    }
    let _ = place.run("luks token add @/v --key-ref file:/k --token-id 3").exit(1, &["use --token-replace"]);
    let _ = place.run(&format!("encrypt @/plain @/other --key file:@/two {CHEAP_PBKDF2}")).done();
    let _ = place.run("luks header-backup @/other @/other.header").done();
    let _ = place
        .run("luks header-restore @/v @/other.header")
        .exit(1, &["--replace-other-header restores it all the same"]);
    empty(&place, "nothing", 20 * MIB);
    let ran = place.run("luks dump @/nothing").exit(2, &["not a LUKS volume", "--header"]);
    assert!(!ran.stderr.contains("--format raw"), "{}", ran.stderr);
    let ran = place.run("decrypt @/nothing @/out --key file:@/one").exit(2, &["not a LUKS volume"]);
    assert!(ran.stderr.contains("--format raw"), "{}", ran.stderr);
}

#[test]
fn a_dry_run_of_repair_needs_no_right_to_write() {
    as_each_user(|user| {
        if user == User::Me && is_root() {
            // Root may write whatever the mode says; the other round tells.
            eprintln!("as root the mode forbids nothing");
        }
        let place = place(user);
        let file = OpenOptions::new().write(true).open(place.path("v")).expect("open");
        // The secondary header's checksum field.
        file.write_all_at(&[0xff; 8], 0x4000 + 448).expect("write");
        let before = place.read("v");
        for mode in [0o600, 0o400] {
            std::fs::set_permissions(place.path("v"), PermissionsExt::from_mode(mode)).expect("mode");
            let ran = place.run("luks repair @/v --dry-run").done();
            assert!(ran.text().contains("secondary"), "{}", ran.text());
            assert!(place.read("v") == before, "a dry run wrote");
            if mode == 0o400 && (user == User::Nobody || !is_root()) {
                let _ = place.run("luks repair @/v").exit(1, &["EACCES"]);
            }
        }
        std::fs::set_permissions(place.path("v"), PermissionsExt::from_mode(0o600)).expect("mode");
        let _ = place.run("luks repair @/v").done();
        assert!(place.run("luks repair @/v --dry-run").done().text().contains("nothing to repair"));
    });
}

#[test]
fn what_cannot_be_written_is_not_done() {
    if !std::path::Path::new("/dev/full").exists() {
        return skip("no /dev/full");
    }
    let place = place(User::Me);
    for words in [
        "luks dump @/v",
        "luks dump @/v --json",
        "luks open-test @/v --key file:@/one",
        "luks token list @/v",
        "luks doctor @/v",
        "job list",
        "stats --json",
        "daemon status",
        "completions bash",
        "--help",
        "verify @/plain @/v --key file:@/one --json",
        "encrypt @/plain @/w --key file:@/one --format luks1 --pbkdf-force-iterations 1000 --detach",
    ] {
        let ran = place.shell(&format!("$CTL {words} > /dev/full"));
        let _ = ran.exit(1, &["cannot write: standard output: no space left on device (ENOSPC)"]);
    }
    // A reader that has gone is another matter.
    for words in ["luks dump @/v", "job list", "--help"] {
        let ran = place.shell(&format!("{{ sleep 0.2; $CTL {words}; }} | true")).done();
        assert_eq!(ran.stderr, "", "{words}");
    }
}

#[test]
fn a_token_of_two_minds_or_too_deep_is_not_stored() {
    let place = place(User::Me);
    let before = place.read("v");
    let deep = format!(r#"{{"type":"x","keyslots":["0"],"n":{}{}}}"#, "[".repeat(40), "]".repeat(40));
    for (text, words) in [
        (r#"{"type":"x","keyslots":["0"],"type":"y"}"#, "an object has a name twice"),
        (&deep, "more than 30 values inside one another"),
    ] {
        place.write("token", text.as_bytes());
        let _ = place.run("luks token add @/v --json-file @/token").exit(2, &[words]);
        assert!(place.read("v") == before, "{words}");
    }
}

#[test]
fn which_luks_it_is_cannot_be_asked_for_in_vain() {
    let place = place(User::Me);
    for verb in ["decrypt @/v @/out", "verify @/plain @/v"] {
        let _ = place.run(&format!("{verb} --key file:@/one --format luks1")).exit(2, &["luks1", "--format"]);
        let _ = place.run(&format!("{verb} --key file:@/one --format luks")).done();
    }
    assert!(place.read("out") == [7; 4096]);
}

#[test]
fn a_question_without_a_terminal_is_a_mistake_whatever_it_is_about() {
    let place = place(User::Me);
    let before = place.read("v");
    for (words, hint) in [
        ("luks erase @/v", "--yes-destroy-all-keys"),
        ("luks open-test @/v --key prompt", "file:PATH"),
        ("decrypt @/v @/out --key prompt", "file:PATH"),
    ] {
        // A session of its own has no terminal.
        let ran = place.shell(&format!("setsid --wait $CTL {words}"));
        let _ = ran.exit(2, &["there is no terminal to ask on", hint]);
        assert!(place.read("v") == before, "{words}");
    }
}
