//! Headers saved, put back and repaired, beside cryptsetup: each program restores what the other saved.

use std::fs::{self, File};

use proto::ErrorKind;
use proto::luks::{NewFile, Operation, Reply, Severity, Version};
use tests::header::{Ask, BOTH, KDF, Volume, does, done, refused};

#[test]
fn a_backup_is_cryptsetups_byte_for_byte() {
    for words in [&["--key-size", "512"][..], &["--key-size", "256"]] {
        for version in BOTH {
            let Some(volume) = Volume::with(version, words) else { return };
            volume.they_add("one", "two");
            // A signature of an earlier owner between header and keyslots, which LUKS1 backups leave out.
            if version == Version::Luks1 {
                volume.damage(1080, b"\x53\xef");
            }
            let (ours, theirs) = (volume.scratch.join("ours"), volume.scratch.join("theirs"));
            let done = volume.back_up(&ours).expect("backup");
            assert!(done.warnings.iter().any(|warning| warning.contains("wrapped keys")));
            let theirs_name = theirs.to_str().expect("UTF-8");
            does(&["luksHeaderBackup", &volume.name(), "--header-backup-file", theirs_name]);
            assert!(
                fs::read(&ours).expect("ours") == fs::read(&theirs).expect("theirs"),
                "{version:?} {words:?}"
            );
            // Nothing is written over.
            let again =
                Ask::new(&volume).file(File::options().read(true).write(true).open(&ours).expect("open"));
            let file = NewFile { fd: 1, name: "backup".to_owned(), commit: None };
            refused(again.run(Operation::HeaderBackup { file }), ErrorKind::Conflict, "not empty");
        }
    }
}

#[test]
fn each_restores_what_the_other_saved() {
    for version in BOTH {
        let Some(volume) = Volume::new(version) else { return };
        let (ours, theirs) = (volume.scratch.join("ours"), volume.scratch.join("theirs"));
        volume.back_up(&ours).expect("backup");
        let saved = volume.bytes();
        does(&["luksHeaderBackup", &volume.name(), "--header-backup-file", theirs.to_str().expect("UTF-8")]);
        volume.change("one", "two", None).expect("changed");
        volume.add("two", "three", None).expect("added");
        volume.is_opened_by(&["two", "three"]);
        does(&[
            "luksHeaderRestore",
            "--batch-mode",
            &volume.name(),
            "--header-backup-file",
            ours.to_str().expect("UTF-8"),
        ]);
        volume.is_opened_by(&["one"]);
        // And back by us, over keyslots that lie elsewhere.
        volume.change("one", "two", None).expect("changed");
        volume.is_opened_by(&["two"]);
        volume.restore(&theirs, false).expect("restored");
        volume.is_opened_by(&["one"]);
        let (now, end) = (volume.bytes(), fs::read(&theirs).expect("read").len());
        assert!(now[..end] == saved[..end], "{version:?}");
        // Over keyslots that lie in the same places.
        volume.cryptsetup("luksAddKey", "one", &KDF, &["--key-slot", "1", &volume.key_file("four")]);
        volume.remove(Some("one"), None, false).expect("removed");
        volume.add("four", "two", Some(0)).expect("added");
        volume.is_opened_by(&["two", "four"]);
        volume.restore(&ours, false).expect("restored");
        volume.is_opened_by(&["one"]);
        assert!(volume.bytes()[..end] == saved[..end], "{version:?}");
        // Over nothing at all, which is for somebody else to judge.
        volume.damage(0, &vec![0; 2 << 20]);
        let error = refused(volume.restore(&ours, false), ErrorKind::Conflict, "no readable header");
        assert!(error.to_failure().hint.is_some());
        volume.restore(&ours, true).expect("restored");
        volume.is_opened_by(&["one"]);
        assert!(volume.bytes()[..end] == saved[..end], "{version:?}");
    }
}

#[test]
fn erased_keyslots_come_back_from_a_backup_only() {
    for version in BOTH {
        let Some(volume) = Volume::new(version) else { return };
        let backup = volume.scratch.join("backup");
        volume.back_up(&backup).expect("backup");
        let erase = |confirmed| Ask::new(&volume).run(Operation::Erase { confirmed });
        refused(erase(false), ErrorKind::Conflict, "not confirmed");
        volume.is_opened_by(&["one"]);
        let old = volume.bytes();
        done(erase(true).expect("erased"));
        volume.is_opened_by(&[]);
        let offset = if version == Version::Luks1 { 8 * 512 } else { 0x8000 };
        assert!(volume.bytes()[offset..offset + 4096] != old[offset..offset + 4096]);
        volume.restore(&backup, false).expect("restored");
        volume.is_opened_by(&["one"]);
    }
}

#[test]
fn a_backup_of_another_volume_or_a_damaged_one_is_refused() {
    for version in BOTH {
        let Some(volume) = Volume::new(version) else { return };
        let Some(other) = Volume::new(version) else { return };
        let backup = other.scratch.join("backup");
        other.back_up(&backup).expect("backup");
        let before = volume.bytes();
        refused(volume.restore(&backup, false), ErrorKind::Conflict, "its UUID is");
        // Cut off; too long; not a header at all.
        let whole = fs::read(&backup).expect("read");
        let case = |name: &str, bytes: &[u8]| volume.scratch.file(name, bytes);
        let cut = case("cut", &whole[..whole.len() - 8192]);
        let words = if version == Version::Luks1 { "cut off" } else { "ends before its keyslots area" };
        refused(volume.restore(&cut, true), ErrorKind::Damaged, words);
        let mut long = whole.clone();
        long.resize(whole.len() + (1 << 20), 0);
        refused(volume.restore(&case("long", &long), true), ErrorKind::Damaged, "not a header backup");
        let zeros = vec![0; whole.len()];
        refused(volume.restore(&case("zeros", &zeros), true), ErrorKind::Damaged, "not a LUKS header backup");
        assert!(volume.bytes() == before);
        volume.restore(&backup, true).expect("said so");
        volume.is_opened_by(&["one"]);
        // The other version.
        let third = if version == Version::Luks1 { Version::Luks2 } else { Version::Luks1 };
        let Some(third) = Volume::new(third) else { return };
        refused(third.restore(&backup, false), ErrorKind::Conflict, "its version is");
        third.restore(&backup, true).expect("said so");
        third.is_opened_by(&["one"]);
    }
}

#[test]
fn a_backup_of_before_a_new_volume_key_is_refused() {
    let Some(volume) = Volume::new(Version::Luks2) else { return };
    let backup = volume.scratch.join("backup");
    volume.back_up(&backup).expect("backup");
    let words = ["--force-offline-reencrypt", "--resilience", "none"];
    volume.cryptsetup("reencrypt", "one", &[&words[..], &KDF].concat(), &[]);
    volume.is_opened_by(&["one"]);
    let before = volume.bytes();
    refused(volume.restore(&backup, false), ErrorKind::Conflict, "another volume key");
    assert!(volume.bytes() == before);
}

#[test]
fn a_damaged_copy_is_made_again_from_the_good_one() {
    for (offset, name) in [(64, "primary"), (0x4000 + 5000, "secondary")] {
        let Some(volume) = Volume::new(Version::Luks2) else { return };
        volume.damage(offset, &[0xee; 16]);
        let repair = |dry_run| match Ask::new(&volume).run(Operation::Repair { dry_run }).expect("repaired") {
            Reply::Repaired(repaired) => repaired,
            other => panic!("another answer: {other:?}"),
        };
        let before = volume.bytes();
        let report = volume.doctor(None);
        assert_eq!(report.findings[0].severity, Severity::Danger);
        assert!(report.findings[0].message.contains(name), "{:?}", report.findings[0]);
        let planned = repair(true);
        assert!(planned.dry_run && planned.actions.len() == 1 && planned.actions[0].contains(name));
        assert!(volume.bytes() == before);
        assert_eq!(repair(false).actions, planned.actions);
        assert_eq!(repair(false).actions, [""; 0]);
        volume.is_opened_by(&["one"]);
        // Each copy alone carries the volume: the other is wiped in turn.
        for wiped in [0, 0x4000] {
            let whole = volume.bytes();
            volume.damage(wiped, &[0; 0x4000]);
            volume.we_open("one").expect("opened from the other copy");
            fs::write(&volume.path, whole).expect("put back");
        }
    }
}

#[test]
fn a_luks1_header_is_corrected() {
    let Some(volume) = Volume::new(Version::Luks1) else { return };
    let whole = volume.bytes();
    // Stripes of keyslot 3, which is not in use.
    volume.damage(208 + 3 * 48 + 44, &[0; 4]);
    volume.we_open("one").expect_err("invalid");
    let Reply::Repaired(repaired) =
        Ask::new(&volume).run(Operation::Repair { dry_run: false }).expect("done")
    else {
        panic!("another answer")
    };
    assert_eq!(repaired.actions.len(), 1, "{repaired:?}");
    assert!(volume.bytes()[..592] == whole[..592]);
    volume.is_opened_by(&["one"]);
}

#[test]
fn a_luks1_passphrase_outlives_a_flipped_bit_in_the_state_of_its_keyslot() {
    let Some(volume) = Volume::new(Version::Luks1) else { return };
    let whole = volume.bytes();
    volume.damage(208 + 3, &[whole[208 + 3] ^ 0x10]);
    volume.we_open("one").expect_err("invalid");
    assert!(!volume.they_open("one"));
    let Reply::Repaired(repaired) =
        Ask::new(&volume).run(Operation::Repair { dry_run: false }).expect("done")
    else {
        panic!("another answer")
    };
    assert_eq!(repaired.actions.len(), 1, "{repaired:?}");
    assert!(volume.bytes() == whole);
    volume.is_opened_by(&["one"]);
}

#[test]
fn a_luks1_backup_leaves_data_alone_that_begins_within_its_last_page() {
    // Material of the last keyslot ends at sector 4036, its page at 4040.
    const PAYLOAD: usize = 4037;
    let Some(volume) = Volume::with(Version::Luks1, &["--key-size", "512"]) else { return };
    volume.damage(104, &u32::try_from(PAYLOAD).expect("small").to_be_bytes());
    let (at, end) = (PAYLOAD * 512, 4040 * 512);
    volume.damage(at as u64, &vec![0xd1; end - at]);
    volume.is_opened_by(&["one"]);
    let (ours, theirs) = (volume.scratch.join("ours"), volume.scratch.join("theirs"));
    volume.back_up(&ours).expect("backup");
    does(&["luksHeaderBackup", &volume.name(), "--header-backup-file", theirs.to_str().expect("UTF-8")]);
    let saved = fs::read(&ours).expect("ours");
    assert_eq!(saved.len(), end, "a whole page, as cryptsetup's");
    assert!(saved[at..] == vec![0; end - at], "data in a header backup");
    assert!(saved[..at] == fs::read(&theirs).expect("theirs")[..at]);
    // The data goes on; a restore, of either, careful or not, is of the header.
    let newer = vec![0xd2; end - at];
    volume.damage(at as u64, &newer);
    for backup in [&ours, &theirs] {
        volume.restore(backup, false).expect("restored");
        assert!(volume.bytes()[at..end] == newer, "data written over");
        let whole = volume.bytes();
        volume.damage(0, &[0xff; 592]);
        volume.restore(backup, true).expect("restored");
        assert!(volume.bytes() == whole, "data written over");
        volume.is_opened_by(&["one"]);
    }
}
