//! Keyslots beside cryptsetup: what we change it reads, what it changes we read, and what must be refused is.
//!
//! Everything goes through `manage::carry_out` with real descriptors; the passphrases are tried with the real program.

use std::cell::Cell;
use std::fs::{self, File};

use engine::error::Error;
use engine::volume::manage::{Caller, carry_out};
use proto::ErrorKind;
use proto::luks::{
    File as Named, KdfKind, KdfWish, New, NewFile, Operation, Reply, Request, Secret, Version,
};
use serde_json::json;
use tests::header::{Ask, BOTH, KDF, Volume, cheap, cryptsetup, does, done, new_file, refused};
use tests::{Scratch, loop_device};

#[test]
fn passphrases_we_add_change_and_remove_are_cryptsetups_too() {
    for version in BOTH {
        let Some(volume) = Volume::new(version) else { return };
        assert_eq!(volume.add("one", "two", None).expect("added").keyslot, Some(1));
        volume.is_opened_by(&["one", "two"]);
        assert_eq!(volume.add("two", "three", Some(5)).expect("added").keyslot, Some(5));
        volume.is_opened_by(&["one", "two", "three"]);
        let changed = volume.change("two", "four", None).expect("changed");
        // LUKS1 ties the number to the place.
        let (keyslot, warnings) = if version == Version::Luks1 { (2, 1) } else { (1, 0) };
        assert_eq!((changed.keyslot, changed.warnings.len()), (Some(keyslot), warnings));
        volume.is_opened_by(&["one", "three", "four"]);
        assert_eq!(volume.we_open("four").expect("opened"), Some(keyslot));
        assert_eq!(volume.remove(Some("three"), None, false).expect("removed").keyslot, Some(5));
        volume.is_opened_by(&["one", "four"]);
        // By number, with the passphrase of another that stays; then without any.
        refused(volume.remove(Some("one"), Some(0), false), ErrorKind::WrongKey, "wrong key or damaged data");
        volume.is_opened_by(&["one", "four"]);
        assert_eq!(volume.remove(Some("four"), Some(0), false).expect("removed").warnings, [""; 0]);
        volume.is_opened_by(&["four"]);
        volume.they_add("four", "one");
        volume.is_opened_by(&["one", "four"]);
        let warnings = volume.remove(None, Some(keyslot), false).expect("removed").warnings;
        assert!(warnings[0].contains("was not checked"), "{warnings:?}");
        volume.is_opened_by(&["one"]);
    }
}

#[test]
fn what_cryptsetup_changes_we_open() {
    for version in BOTH {
        let Some(volume) = Volume::new(version) else { return };
        volume.they_add("one", "two");
        volume.is_opened_by(&["one", "two"]);
        volume.cryptsetup("luksChangeKey", "two", &KDF, &[&volume.key_file("three")]);
        volume.is_opened_by(&["one", "three"]);
        volume.cryptsetup("luksKillSlot", "three", &[], &["0"]);
        volume.is_opened_by(&["three"]);
        volume.add("three", "four", None).expect("added");
        volume.cryptsetup("luksRemoveKey", "three", &[], &[]);
        volume.is_opened_by(&["four"]);
    }
}

#[test]
fn a_kdf_is_converted_under_the_same_passphrase() {
    let Some(volume) = Volume::new(Version::Luks2) else { return };
    volume.they_add("one", "two");
    volume.cryptsetup("config", "one", &["--priority", "prefer", "--key-slot", "1"], &[]);
    let tokens = ["token", "add", "--key-description", "at home", "--key-slot", "1", &volume.name()];
    does(&tokens);
    let argon = KdfWish {
        kind: Some(KdfKind::Argon2id),
        iterations: Some(4),
        memory_kib: Some(64),
        lanes: Some(1),
        ..KdfWish::default()
    };
    let ask = Ask::new(&volume).secret(b"two");
    let reply = ask.run(Operation::ConvertKdf { key_fd: 1, keyslot: Some(1), kdf: argon }).expect("done");
    assert_eq!(done(reply).keyslot, Some(1));
    let json = volume.json();
    let slot = &json["keyslots"]["1"];
    assert_eq!((&slot["kdf"]["type"], &slot["kdf"]["memory"]), (&json!("argon2id"), &json!(64)));
    assert_eq!(slot["priority"], json!(2));
    assert_eq!(json["keyslots"].as_object().expect("an object").len(), 2);
    assert_eq!(json["tokens"]["0"]["keyslots"], json!(["1"]));
    assert_eq!(json["digests"]["0"]["keyslots"], json!(["0", "1"]));
    volume.is_opened_by(&["one", "two"]);
    // LUKS1 has one KDF, and the hash of the volume.
    let Some(volume) = Volume::new(Version::Luks1) else { return };
    let wish = KdfWish { kind: Some(KdfKind::Argon2id), ..KdfWish::default() };
    let ask = Ask::new(&volume).secret(b"one");
    let converted = ask.run(Operation::ConvertKdf { key_fd: 1, keyslot: None, kdf: wish });
    refused(converted, ErrorKind::Invalid, "no KDF but pbkdf2");
    let wish = KdfWish { iterations: Some(2000), ..KdfWish::default() };
    let ask = Ask::new(&volume).secret(b"one");
    ask.run(Operation::ConvertKdf { key_fd: 1, keyslot: None, kdf: wish }).expect("converted");
    volume.is_opened_by(&["one"]);
}

#[test]
fn a_wrong_passphrase_changes_nothing_and_says_one_thing() {
    for version in BOTH {
        let Some(volume) = Volume::new(version) else { return };
        volume.they_add("one", "two");
        let before = volume.bytes();
        let wrong = |error: Error| {
            assert_eq!(
                (error.kind(), error.chain().as_str()),
                (ErrorKind::WrongKey, "wrong key or damaged data")
            );
        };
        wrong(volume.we_open("nine").expect_err("wrong"));
        wrong(volume.add("nine", "three", None).expect_err("wrong"));
        wrong(volume.change("nine", "three", None).expect_err("wrong"));
        wrong(volume.change("one", "three", Some(1)).expect_err("wrong"));
        wrong(volume.remove(Some("nine"), None, false).expect_err("wrong"));
        wrong(volume.remove(Some("nine"), Some(0), false).expect_err("wrong"));
        let ask = Ask::new(&volume).secret(&[7; 64]).secret(b"three");
        let secret = Secret::VolumeKey;
        let adding = Operation::AddKey { key_fd: 1, secret, new_key_fd: 2, keyslot: None, kdf: cheap() };
        wrong(ask.run(adding).expect_err("wrong"));
        assert!(volume.bytes() == before);
        // A damaged keyslot says the same.
        let offset = if version == Version::Luks1 { 8 * 512 } else { 0x8000 };
        volume.damage(offset + 1000, &[0xa5; 600]);
        wrong(volume.we_open("one").expect_err("damaged"));
        volume.is_opened_by(&["two"]);
    }
}

#[test]
fn the_volume_key_adds_a_passphrase_when_no_keyslot_is_left() {
    let Some(volume) = Volume::new(Version::Luks2) else { return };
    let dump = volume.scratch.join("volume-key");
    let dump_name = dump.to_str().expect("UTF-8");
    volume.cryptsetup("luksDump", "one", &["--dump-volume-key", "--volume-key-file", dump_name], &[]);
    let last = volume.remove(Some("one"), None, false);
    let error = refused(last, ErrorKind::Conflict, "keyslot 0 is the last one that opens the data");
    assert!(error.to_failure().hint.is_some());
    volume.is_opened_by(&["one"]);
    let warnings = volume.remove(Some("one"), None, true).expect("removed").warnings;
    assert!(warnings[0].contains("no keyslot opens"), "{warnings:?}");
    volume.is_opened_by(&[]);
    let key = fs::read(&dump).expect("the key");
    let ask = Ask::new(&volume).secret(&key).secret(b"two");
    let secret = Secret::VolumeKey;
    ask.run(Operation::AddKey { key_fd: 1, secret, new_key_fd: 2, keyslot: None, kdf: cheap() })
        .expect("added");
    volume.is_opened_by(&["two"]);
}

#[test]
fn a_dead_keyslot_is_removed_by_its_number() {
    for version in BOTH {
        let Some(volume) = Volume::new(version) else { return };
        volume.they_add("one", "two");
        // As a crash between the overwriting and the header leaves it.
        let offset = if version == Version::Luks1 { 8 * 512 } else { 0x8000 };
        volume.damage(offset, &[0x5a; 100_000]);
        volume.is_opened_by(&["two"]);
        volume.remove(Some("two"), Some(0), false).expect("removed");
        volume.is_opened_by(&["two"]);
        volume.add("two", "one", Some(0)).expect("its number is free");
        volume.is_opened_by(&["one", "two"]);
    }
}

#[test]
fn keyslots_that_cannot_be_are_refused() {
    for version in BOTH {
        let Some(volume) = Volume::new(version) else { return };
        volume.they_add("one", "two");
        let before = volume.bytes();
        refused(volume.add("one", "three", Some(1)), ErrorKind::Conflict, "keyslot 1 is in use");
        refused(volume.add("one", "three", Some(32)), ErrorKind::Invalid, "there is no keyslot 32");
        refused(volume.change("one", "three", Some(3)), ErrorKind::NotFound, "keyslot 3 is not in use");
        refused(volume.remove(None, Some(3), false), ErrorKind::NotFound, "keyslot 3 is not in use");
        refused(volume.remove(None, None, false), ErrorKind::Invalid, "which keyslot");
        assert!(volume.bytes() == before);
    }
}

#[test]
fn a_full_header_is_not_changed_in_place() {
    let Some(volume) = Volume::new(Version::Luks1) else { return };
    for number in 1..8 {
        volume.add("one", &format!("filler {number}"), None).expect("added");
    }
    let before = volume.bytes();
    let error = refused(volume.change("one", "two", None), ErrorKind::Conflict, "all 8 keyslots are in use");
    assert!(error.to_failure().hint.is_some_and(|hint| hint.contains("before the old one is destroyed")));
    assert!(volume.bytes() == before);
    // LUKS2 with room for one keyslot.
    let words = ["--luks2-keyslots-size", "256k"];
    let Some(volume) = Volume::with(Version::Luks2, &words) else { return };
    let before = volume.bytes();
    assert_eq!(volume.change("one", "two", None).expect_err("full").kind(), ErrorKind::NoSpace);
    assert_eq!(volume.add("one", "two", None).expect_err("full").kind(), ErrorKind::NoSpace);
    assert!(volume.bytes() == before);
    volume.is_opened_by(&["one"]);
}

#[test]
fn we_format_what_cryptsetup_opens_and_reads_back() {
    for version in BOTH {
        if cryptsetup(&["--version"]).is_none() {
            return;
        }
        let scratch = Scratch::new();
        let path = scratch.join("volume");
        File::create(&path).expect("create").set_len(24 << 20).expect("extend");
        let volume = Volume { scratch, path };
        let new = || plain(version);
        let ask = Ask::new(&volume).secret(b"one");
        let formatted = done(ask.run(Operation::Format { new: new(), key_fd: 1 }).expect("formatted"));
        assert_eq!(formatted.keyslot, Some(0));
        volume.is_opened_by(&["one"]);
        let Reply::Dump(dump) = Ask::new(&volume).run(Operation::Dump {}).expect("dumped") else {
            panic!("another answer")
        };
        assert_eq!(dump.summary.uuid, formatted.uuid);
        if version == Version::Luks2 {
            assert_eq!(dump.metadata, volume.json());
        }
        // Detached, committed by the caller.
        let mut detached = new();
        let commit = proto::Commit {
            dir_fd: 3,
            partial: "header.partial".to_owned(),
            name: "header".to_owned(),
            replace: false,
            keep_partial: false,
        };
        detached.header = Some(NewFile { fd: 2, name: "header".to_owned(), commit: Some(commit) });
        let (header, committed) = (volume.scratch.join("header"), Cell::new(false));
        let files = Ask::new(&volume).secret(b"two").file(new_file(&header));
        let files = files.file(File::open(volume.scratch.path()).expect("open"));
        let caller = Caller {
            commit: &|commit, _, _| {
                committed.set(commit.name == "header");
                Ok(())
            },
            give_up: &|| false,
        };
        let request = Request {
            volume: Some(Named { fd: 0, name: "volume".to_owned() }),
            header: None,
            lock_fd: None,
            remotes: Vec::new(),
            operation: Operation::Format { new: detached, key_fd: 1 },
        };
        let before = volume.bytes();
        carry_out(request, files.fds, &caller).expect("formatted");
        assert!(committed.get() && volume.bytes() == before);
        let detached = Volume { path: header, ..volume };
        let (key, name) = (detached.key_file("two"), detached.name());
        does(&["open", "--test-passphrase", "--key-file", &key, "--header", &name, &name]);
    }
}

/// A wish for a new volume that names nothing.
fn plain(version: Version) -> Box<New> {
    let wish = json!({ "version": version, "kdf": cheap() });
    Box::new(serde_json::from_value(wish).expect("a wish"))
}

#[test]
fn a_file_is_formatted_for_the_size_it_has() {
    if cryptsetup(&["--version"]).is_none() {
        return;
    }
    let format = |bytes: u64, version| {
        let scratch = Scratch::new();
        let path = scratch.join("volume");
        File::create(&path).expect("create").set_len(bytes).expect("extend");
        let volume = Volume { scratch, path };
        let ask = Ask::new(&volume).secret(b"one");
        let outcome = ask.run(Operation::Format { new: plain(version), key_fd: 1 });
        (volume, outcome)
    };
    for (bytes, unit) in [((24 << 20) + 512, 512), (24 << 20, 4096)] {
        let (volume, outcome) = format(bytes, Version::Luks2);
        outcome.expect("formatted");
        assert_eq!(volume.json()["segments"]["0"]["sector_size"], json!(unit));
        volume.is_opened_by(&["one"]);
    }
    for version in BOTH {
        for bytes in [0, 1 << 20] {
            let (volume, outcome) = format(bytes, version);
            refused(outcome, ErrorKind::NoSpace, "too small");
            assert!(volume.bytes() == vec![0; usize::try_from(bytes).expect("small")], "{version:?} {bytes}");
        }
    }
}

#[test]
fn a_header_of_which_only_the_second_copy_is_left_is_not_changed_before_it_is_repaired() {
    let Some(volume) = Volume::new(Version::Luks2) else { return };
    volume.they_add("one", "two");
    // A disk that was given a partition table: boot code, signature.
    let mut table = [0; 512];
    table[..3].copy_from_slice(&[0xEB, 0x63, 0x90]);
    table[510..].copy_from_slice(&[0x55, 0xAA]);
    volume.damage(0, &table);
    let before = volume.bytes();
    let refused = |result: Result<(), Error>| {
        let error = refused(result, ErrorKind::Conflict, "something else begins where");
        assert!(error.to_failure().hint.is_some_and(|hint| hint.contains("repair")));
        assert!(volume.bytes() == before);
    };
    let token = json!({ "type": "test-token", "keyslots": [] });
    refused(volume.token(token.clone(), None, false).map(drop));
    refused(Ask::new(&volume).run(Operation::TokenRemove { id: 0 }).map(drop));
    refused(volume.add("one", "three", None).map(drop));
    refused(volume.change("one", "three", None).map(drop));
    refused(volume.remove(Some("two"), None, false).map(drop));
    refused(Ask::new(&volume).run(Operation::Erase { confirmed: true }).map(drop));
    // It opens all the same, and a repair is what puts the first copy back.
    assert_eq!(volume.we_open("two").expect("opened"), Some(1));
    Ask::new(&volume).run(Operation::Repair { dry_run: false }).expect("repaired");
    volume.token(token.clone(), None, false).expect("added");
    volume.is_opened_by(&["one", "two"]);
    // A first copy that is only damaged is made anew by the change itself.
    volume.damage(200, b"damage");
    volume.token(token, None, false).expect("added");
    volume.is_opened_by(&["one", "two"]);
}

#[test]
fn requests_that_make_no_sense_change_nothing() {
    let Some(volume) = Volume::new(Version::Luks2) else { return };
    let before = volume.bytes();
    let open_test = || Operation::OpenTest { key_fd: 1, secret: Secret::Passphrase, keyslot: None };
    refused(Ask::new(&volume).run(open_test()), ErrorKind::Invalid, "descriptor 1 (key) was not sent");
    let twice = Operation::AddKey {
        key_fd: 1,
        secret: Secret::Passphrase,
        new_key_fd: 1,
        keyslot: None,
        kdf: cheap(),
    };
    refused(Ask::new(&volume).secret(b"one").run(twice), ErrorKind::Invalid, "named twice");
    let extra = Ask::new(&volume).secret(b"one").secret(b"two");
    refused(extra.run(open_test()), ErrorKind::Invalid, "more descriptors");
    let read_only = Ask::of(File::open(&volume.path).expect("open"));
    refused(
        read_only.run(Operation::Erase { confirmed: true }),
        ErrorKind::Invalid,
        "not opened for writing",
    );
    let directory = Ask::of(File::open(volume.scratch.path()).expect("open"));
    refused(directory.run(Operation::Dump {}), ErrorKind::Invalid, "is a directory");
    let caller = Caller { commit: &|_, _, _| Ok(()), give_up: &|| false };
    let nothing = Request {
        volume: None,
        header: None,
        lock_fd: None,
        remotes: Vec::new(),
        operation: Operation::Dump {},
    };
    refused(carry_out(nothing, Vec::new(), &caller), ErrorKind::Invalid, "no volume and no header");
    // What only reads needs no more than reading, and a detached header alone is enough.
    let mut header_only = Ask::of(File::open(&volume.path).expect("open")).secret(b"one");
    header_only.header = true;
    assert_eq!(done(header_only.run(open_test()).expect("opened")).keyslot, Some(0));
    // Somebody who has gone gets nothing written.
    let mut gone = Ask::new(&volume).secret(b"one").secret(b"two");
    gone.give_up = true;
    let change = Operation::ChangeKey { key_fd: 1, new_key_fd: 2, keyslot: None, kdf: cheap() };
    assert_eq!(gone.run(change).expect_err("cancelled").kind(), ErrorKind::Cancelled);
    assert!(volume.bytes() == before);
}

#[test]
fn a_locked_header_is_waited_for() {
    let Some(volume) = Volume::new(Version::Luks2) else { return };
    let other = File::open(&volume.path).expect("open");
    rustix::fs::flock(&other, rustix::fs::FlockOperation::LockExclusive).expect("locked");
    let began = std::time::Instant::now();
    let wait = std::time::Duration::from_millis(300);
    let unlocker = std::thread::spawn(move || {
        std::thread::sleep(wait);
        drop(other);
    });
    volume.add("one", "two", None).expect("added");
    assert!(began.elapsed() >= wait);
    unlocker.join().expect("ends");
    volume.is_opened_by(&["one", "two"]);
}

#[test]
fn a_block_device_is_changed_while_the_callers_lock_file_stays_open() {
    for version in BOTH {
        let Some(model) = Volume::new(version) else { return };
        let Some(device) = loop_device(24 << 20) else { return };
        fs::write(device.path(), model.bytes()).expect("copied");
        let lock = model.scratch.file("lock", b"");
        let held = File::open(&lock).expect("open");
        rustix::fs::flock(&held, rustix::fs::FlockOperation::LockExclusive).expect("locked");
        let node = File::options().read(true).write(true).open(device.path()).expect("open");
        let ask = Ask::of(node).secret(b"one").secret(b"two").file(held);
        let secret = Secret::Passphrase;
        let operation = Operation::AddKey { key_fd: 1, secret, new_key_fd: 2, keyslot: None, kdf: cheap() };
        let request = Request {
            volume: Some(Named { fd: 0, name: "device".to_owned() }),
            header: None,
            lock_fd: Some(3),
            remotes: Vec::new(),
            operation,
        };
        let other = File::open(&lock).expect("open");
        let free = || rustix::fs::flock(&other, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_ok();
        let locked_throughout = Cell::new(true);
        let ask_give_up = || {
            locked_throughout.set(locked_throughout.get() && !free());
            false
        };
        let caller = Caller { commit: &|_, _, _| panic!("nothing to commit"), give_up: &ask_give_up };
        carry_out(request, ask.fds, &caller).expect("added");
        assert!(locked_throughout.get());
        // A child that another test is just starting may hold a copy of the descriptor for a moment.
        tests::eventually("the lock to be free", free);
        let name = device.path().to_str().expect("UTF-8");
        for passphrase in ["one", "two"] {
            does(&["open", "--test-passphrase", "--key-file", &model.key_file(passphrase), name]);
        }
    }
}
