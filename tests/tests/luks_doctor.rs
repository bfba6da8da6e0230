//! Volumes explained, and the tokens that say when their keys are to be replaced; cryptsetup leaves them alone.

use std::collections::BTreeSet;
use std::fs::File;

use proto::ErrorKind;
use proto::luks::{Doctor, Operation, Reply, Severity, Version};
use serde_json::{Value, json};
use tests::header::{Ask, KDF, Volume, does, done, refused};

#[test]
fn a_volume_in_reencryption_is_left_alone_and_explained() {
    let Some(volume) = Volume::new(Version::Luks2) else { return };
    let words = ["--init-only", "--force-offline-reencrypt"];
    volume.cryptsetup("reencrypt", "one", &[&words[..], &KDF].concat(), &[]);
    let before = volume.bytes();
    let words = "requirements";
    refused(volume.add("one", "two", None), ErrorKind::Unsupported, words);
    refused(volume.change("one", "two", None), ErrorKind::Unsupported, words);
    refused(volume.remove(None, Some(0), true), ErrorKind::Unsupported, words);
    refused(Ask::new(&volume).run(Operation::Erase { confirmed: true }), ErrorKind::Unsupported, words);
    refused(volume.token(json!({"type": "x", "keyslots": []}), None, false), ErrorKind::Unsupported, words);
    let backup = volume.scratch.join("backup");
    let warnings = volume.back_up(&backup).expect("backup").warnings;
    assert!(warnings.iter().any(|warning| warning.contains("cannot be restored")), "{warnings:?}");
    refused(volume.restore(&backup, true), ErrorKind::Unsupported, words);
    assert!(volume.bytes() == before);
    let doctor = volume.doctor(None);
    let finding = doctor.findings.iter().find(|finding| finding.about == "reencryption").expect("found");
    assert!(finding.message.contains("at rest") && finding.message.contains("checksum"), "{finding:?}");
    assert!(doctor.tools.iter().any(|tool| tool.name == "cryptctl" && !tool.opens));
}

#[test]
fn both_copies_gone_is_explained_and_nothing_else() {
    let Some(volume) = Volume::new(Version::Luks2) else { return };
    volume.damage(300, &[1; 8]);
    volume.damage(0x4000 + 300, &[1; 8]);
    let before = volume.bytes();
    let doctor = volume.doctor(None);
    let said: String = doctor.findings.iter().map(|finding| finding.message.as_str()).collect();
    assert!(said.contains("no usable header") && said.contains("byte 16384"), "{said}");
    assert!(doctor.tools.iter().all(|tool| !tool.opens));
    // Nothing was read, so nothing is said to be so.
    assert_eq!(doctor.summary, None);
    refused(Ask::new(&volume).run(Operation::Dump {}), ErrorKind::Damaged, "no valid LUKS2 header");
    let error = refused(Ask::new(&volume).run(Operation::Repair { dry_run: false }), ErrorKind::Damaged, "");
    assert!(error.to_failure().hint.is_some_and(|hint| hint.contains("backup")));
    assert!(volume.bytes() == before);
    // And no LUKS at all is no case for a doctor.
    volume.damage(0, &vec![0; 5 << 20]);
    let none = Ask::new(&volume).run(Operation::Doctor { key_fd: None });
    refused(none, ErrorKind::Unsupported, "not a LUKS volume");
}

#[test]
fn a_volume_cut_off_is_explained_by_its_size() {
    let Some(volume) = Volume::new(Version::Luks2) else { return };
    let file = File::options().write(true).open(&volume.path).expect("open");
    file.set_len(10 << 20).expect("cut");
    let doctor = volume.doctor(None);
    assert_eq!(doctor.summary, None);
    let said: Vec<_> = doctor.findings.iter().map(|finding| finding.message.as_str()).collect();
    let (all, name) = (said.join("\n"), "volume");
    assert!(all.contains("keyslots area does, at byte 16777216"), "{all}");
    assert!(all.contains("it ends at byte 10485760"), "{all}");
    let unusable = said.iter().find(|message| message.contains("no usable header")).expect("said");
    assert_eq!(unusable.matches(&format!(": {name}")).count(), 1, "{unusable}");
    refused(volume.we_open("one"), ErrorKind::Damaged, "ends before");
}

#[test]
fn a_volume_without_keyslots_is_opened_by_nobody() {
    for version in [Version::Luks1, Version::Luks2] {
        let Some(volume) = Volume::new(version) else { return };
        volume.remove(Some("one"), None, true).expect("removed");
        let doctor = volume.doctor(None);
        let opening: Vec<_> = doctor.tools.iter().filter(|tool| tool.opens).collect();
        assert!(opening.is_empty(), "{opening:?}");
    }
}

#[test]
fn tokens_live_in_the_header_and_cryptsetup_leaves_them_alone() {
    let Some(volume) = Volume::new(Version::Luks2) else { return };
    volume.they_add("one", "two");
    let ours = json!({
        "type": "cryptctl-key",
        "keyslots": ["0"],
        "version": 1,
        "ref": "barbican:6c1b",
        "created": "1600000000",
        "rotate_by": "1600086400",
    });
    let done_with = volume.token(ours.clone(), None, false).expect("added");
    assert_eq!(done_with.token, Some(0));
    let list = || match Ask::new(&volume).run(Operation::TokenList {}).expect("listed") {
        Reply::Tokens(tokens) => tokens,
        other => panic!("another answer: {other:?}"),
    };
    assert_eq!(list()["0"], ours);
    volume.they_add("one", "three");
    volume.cryptsetup("luksKillSlot", "one", &[], &["1"]);
    volume.cryptsetup("config", "one", &["--label", "a label"], &[]);
    assert_eq!(list()["0"], ours);
    assert_eq!(volume.json()["tokens"]["0"], ours);
    // Changing its passphrase keeps it bound.
    volume.change("one", "four", Some(0)).expect("changed");
    assert_eq!(list()["0"], ours);
    volume.is_opened_by(&["three", "four"]);
    let overdue = volume.doctor(None).findings.into_iter().find(|finding| finding.about == "token 0");
    let overdue = overdue.expect("a finding");
    assert!(
        overdue.severity == Severity::Weak && overdue.message.contains("was to be replaced"),
        "{overdue:?}"
    );
    // cryptsetup's own, made by each of us.
    let keyring = json!({"type": "luks2-keyring", "keyslots": ["0"], "key_description": "at home"});
    assert_eq!(volume.token(keyring.clone(), Some(7), false).expect("added").token, Some(7));
    does(&["token", "export", "--token-id", "7", &volume.name()]);
    does(&["token", "add", "--key-description", "at home", "--key-slot", "0", &volume.name()]);
    assert_eq!(list()["1"], keyring);
    let before = volume.bytes();
    let refuse = |token: Value, words: &str| {
        refused(volume.token(token, None, false), ErrorKind::Invalid, words);
    };
    refuse(json!([]), "JSON object");
    refuse(json!({"keyslots": []}), "`type`");
    refuse(json!({"type": "", "keyslots": []}), "`type`");
    refuse(json!({"type": "x"}), "`keyslots`");
    refuse(json!({"type": "x", "keyslots": [0]}), "`keyslots`");
    refuse(json!({"type": "x", "keyslots": ["00"]}), "`keyslots`");
    refuse(json!({"type": "x", "keyslots": ["0", "0"]}), "`keyslots`");
    refuse(json!({"type": "x", "keyslots": ["9"]}), "keyslot 9, which is not in use");
    refuse(json!({"type": "luks2-frobnicate", "keyslots": []}), "belong to the format");
    refuse(json!({"type": "luks2-keyring", "keyslots": ["0"]}), "key_description");
    let more = json!({"type": "luks2-keyring", "keyslots": ["0"], "key_description": "x", "more": 1});
    refuse(more, "nothing else");
    let deep = |levels| (1..levels).fold(json!(0), |inner, _| json!([inner]));
    for levels in [30, 60, 120] {
        refuse(json!({"type": "deep", "keyslots": ["0"], "n": deep(levels)}), "values inside one another");
    }
    for number in [json!(1.1), json!(1.234_567_890_123_456_8e29)] {
        refuse(json!({"type": "x", "keyslots": [], "n": [{"a": number}]}), "no 64-bit integer");
    }
    let large = volume.token(json!({"type": "x", "keyslots": [], "fill": "x".repeat(12_000)}), None, false);
    refused(large, ErrorKind::NoSpace, "does not fit");
    let mut secret = ours.clone();
    secret["passphrase"] = json!("hunter2");
    refuse(secret, "no field");
    let mut unbound = ours.clone();
    unbound["keyslots"] = json!([]);
    refuse(unbound, "names the keyslots");
    refused(volume.token(keyring.clone(), Some(7), false), ErrorKind::Conflict, "token 7 exists");
    refused(volume.token(keyring, Some(32), false), ErrorKind::Invalid, "no token 32");
    let remove = |id| Ask::new(&volume).run(Operation::TokenRemove { id });
    refused(remove(9), ErrorKind::NotFound, "no token 9");
    assert!(volume.bytes() == before);
    // As large and as deep as there is room: every program still reads it.
    let large = json!({"type": "x", "keyslots": ["0"], "fill": "x".repeat(6000), "n": deep(29)});
    volume.token(large.clone(), Some(7), true).expect("replaced");
    assert_eq!(list()["7"], large);
    does(&["luksDump", &volume.name()]);
    volume.is_opened_by(&["three", "four"]);
    volume.token(json!({"type": "x", "keyslots": []}), Some(7), true).expect("replaced");
    done(remove(0).expect("removed"));
    assert_eq!(list().keys().collect::<BTreeSet<_>>(), BTreeSet::from([&"1".to_owned(), &"7".to_owned()]));
    // A token whose keyslot is destroyed stays, without it.
    volume.remove(Some("four"), None, false).expect("removed");
    assert_eq!(list()["1"]["keyslots"], json!([]));
    does(&["luksDump", &volume.name()]);
    // The JSON area has an end.
    let fill = json!({"type": "x", "keyslots": [], "fill": "x".repeat(2900)});
    let full = (0..8).find_map(|_| volume.token(fill.clone(), None, false).err());
    assert_eq!(full.expect("full").kind(), ErrorKind::NoSpace);
    volume.is_opened_by(&["three"]);
    let Some(volume) = Volume::new(Version::Luks1) else { return };
    let token = json!({"type": "x", "keyslots": []});
    refused(volume.token(token, None, false), ErrorKind::Unsupported, "LUKS1 headers have no tokens");
}

#[test]
fn the_doctor_knows_who_opens_what() {
    let opens = |doctor: &Doctor, name: &str| {
        let tool = doctor.tools.iter().find(|tool| tool.name == name);
        tool.expect("judged").opens
    };
    let Some(volume) = Volume::new(Version::Luks1) else { return };
    let doctor = volume.doctor(Some(b"one"));
    for name in ["cryptsetup", "kernel", "qemu", "nbdkit", "cryptctl"] {
        assert!(opens(&doctor, name), "{name}: {:?}", doctor.tools);
    }
    // Its data begin at 2 MiB.
    assert!(!opens(&doctor, "librbd"));
    let said =
        |doctor: &Doctor, words: &str| doctor.findings.iter().any(|finding| finding.message.contains(words));
    assert!(said(&doctor, "1000 iterations is quick to guess"), "{:?}", doctor.findings);
    assert!(said(&doctor, "the only one"));
    let severities: Vec<_> = doctor.findings.iter().map(|finding| finding.severity).collect();
    assert!(severities.is_sorted_by(|one, other| one >= other), "{severities:?}");
    assert!(
        doctor
            .summary
            .expect("a summary")
            .keyslots
            .iter()
            .all(|slot| slot.unlock_seconds.is_some_and(|time| time > 0.0))
    );
    assert!(!opens(&volume.doctor(Some(b"bin\0ary")), "qemu"));
    let Some(volume) = Volume::with(Version::Luks2, &["--sector-size", "4096"]) else { return };
    let doctor = volume.doctor(None);
    for (name, wanted) in [
        ("cryptsetup", true),
        ("kernel", true),
        ("qemu", false),
        ("librbd", true),
        ("nbdkit", false),
        ("cryptctl", true),
    ] {
        assert_eq!(opens(&doctor, name), wanted, "{name}: {:?}", doctor.tools);
    }
    // A device that shrank below its data, and one that lost a keyslot.
    File::options().write(true).open(&volume.path).expect("open").set_len(16 << 20).expect("cut");
    assert!(said(&volume.doctor(None), "the device ends at"));
    File::options().write(true).open(&volume.path).expect("open").set_len(100 << 10).expect("cut");
    assert!(said(&volume.doctor(None), "ends before its keyslots area"));
    let cbc = ["--cipher", "aes-cbc-essiv:sha256", "--key-size", "256"];
    let Some(volume) = Volume::with(Version::Luks1, &cbc) else { return };
    assert!(said(&volume.doctor(None), "CBC"));
    refused(volume.add("one", "two", None), ErrorKind::Unsupported, "only read");
}
