//! Header operations beside cryptsetup: what we change it reads, what it changes we read, and what must be refused is.
//!
//! Everything goes through `manage::carry_out` with real descriptors; passphrases are opened by the real program. KDFs are
//! as cheap as they may be, for these tests ask about headers.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use engine::error::{Error, Result};
use engine::volume::manage::{Caller, carry_out};
use proto::ErrorKind;
use proto::luks::{
    Doctor, Done, File as Named, KdfKind, KdfWish, New, NewFile, Operation, Reply, Request, Secret, Severity,
    Version,
};
use serde_json::{Value, json};
use tests::{Scratch, skip};

/// Cheap and legal.
const ITERATIONS: u32 = 1000;

/// cryptsetup with these words; `None`, said loudly, where there is none.
fn cryptsetup(words: &[&str]) -> Option<Output> {
    match Command::new("cryptsetup").args(words).output() {
        Ok(output) => Some(output),
        Err(_) => {
            skip("cryptsetup is not installed");
            None
        }
    }
}

/// As [`cryptsetup`], and it must succeed.
fn does(words: &[&str]) {
    let output = cryptsetup(words).expect("looked for when the volume was made");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "cryptsetup {words:?}: {said}");
}

/// A volume in a file.
struct Volume {
    scratch: Scratch,
    path: PathBuf,
}

const BOTH: [Version; 2] = [Version::Luks1, Version::Luks2];
const KDF: [&str; 4] = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];

impl Volume {
    /// Made by cryptsetup with the passphrase `one`.
    fn new(version: Version) -> Option<Self> {
        Self::with(version, &[])
    }

    fn with(version: Version, words: &[&str]) -> Option<Self> {
        cryptsetup(&["--version"])?;
        let scratch = Scratch::new();
        let path = scratch.join("volume");
        File::create(&path).expect("create").set_len(24 << 20).expect("extend");
        let volume = Self { scratch, path };
        let kind = if version == Version::Luks1 { "luks1" } else { "luks2" };
        let key = volume.key_file("one");
        let mut all = vec!["luksFormat", "--batch-mode", "--type", kind, "--key-file", &key];
        all.extend(KDF);
        all.extend(words);
        let path = volume.name();
        all.push(&path);
        does(&all);
        Some(volume)
    }

    fn name(&self) -> String {
        self.path.to_str().expect("UTF-8").to_owned()
    }

    fn key_file(&self, passphrase: &str) -> String {
        let path = self.scratch.file(&format!("key-{passphrase}"), passphrase.as_bytes());
        path.to_str().expect("UTF-8").to_owned()
    }

    /// cryptsetup VERB … with the passphrase, on the volume.
    fn cryptsetup(&self, verb: &str, passphrase: &str, words: &[&str], after: &[&str]) {
        let (key, path) = (self.key_file(passphrase), self.name());
        let mut all = vec![verb, "--batch-mode", "--key-file", &key];
        all.extend(words);
        all.push(&path);
        all.extend(after);
        does(&all);
    }

    /// luksAddKey of cryptsetup.
    fn they_add(&self, old: &str, new: &str) {
        self.cryptsetup("luksAddKey", old, &KDF, &[&self.key_file(new)]);
    }

    fn they_open(&self, passphrase: &str) -> bool {
        let (key, path) = (self.key_file(passphrase), self.name());
        let words = ["open", "--test-passphrase", "--key-file", &key, &path];
        cryptsetup(&words).expect("installed").status.success()
    }

    fn we_open(&self, passphrase: &str) -> Result<Option<u32>> {
        let operation = |key_fd| Operation::OpenTest { key_fd, secret: Secret::Passphrase, keyslot: None };
        let reply = Ask::new(self).secret(passphrase.as_bytes()).run(operation(1))?;
        Ok(done(reply).keyslot)
    }

    /// Both programs open it with exactly these of all passphrases these tests use, and cryptsetup reads the header.
    #[track_caller]
    fn is_opened_by(&self, passphrases: &[&str]) {
        does(&["luksDump", &self.name()]);
        for passphrase in ["one", "two", "three", "four"] {
            let wanted = passphrases.contains(&passphrase);
            assert_eq!(self.they_open(passphrase), wanted, "cryptsetup and {passphrase}");
            match self.we_open(passphrase) {
                Ok(_) => assert!(wanted, "we opened it with {passphrase}"),
                Err(error) => {
                    assert!(!wanted, "we did not open it with {passphrase}: {}", error.chain());
                    assert!(matches!(error.kind(), ErrorKind::WrongKey | ErrorKind::NotFound));
                }
            }
        }
    }

    fn bytes(&self) -> Vec<u8> {
        fs::read(&self.path).expect("read")
    }

    /// cryptsetup's own view of a LUKS2 header.
    fn json(&self) -> Value {
        let output = cryptsetup(&["luksDump", "--dump-json-metadata", &self.name()]).expect("installed");
        assert!(output.status.success());
        serde_json::from_slice(&output.stdout).expect("JSON")
    }

    /// Overwrite bytes behind everybody's back.
    fn damage(&self, offset: u64, bytes: &[u8]) {
        let file = File::options().write(true).open(&self.path).expect("open");
        file.write_all_at(bytes, offset).expect("written");
    }

    fn add(&self, old: &str, new: &str, keyslot: Option<u32>) -> Result<Done> {
        let ask = Ask::new(self).secret(old.as_bytes()).secret(new.as_bytes());
        let secret = Secret::Passphrase;
        ask.run(Operation::AddKey { key_fd: 1, secret, new_key_fd: 2, keyslot, kdf: cheap() }).map(done)
    }

    fn change(&self, old: &str, new: &str, keyslot: Option<u32>) -> Result<Done> {
        let ask = Ask::new(self).secret(old.as_bytes()).secret(new.as_bytes());
        ask.run(Operation::ChangeKey { key_fd: 1, new_key_fd: 2, keyslot, kdf: cheap() }).map(done)
    }

    fn remove(&self, passphrase: Option<&str>, keyslot: Option<u32>, allow_last: bool) -> Result<Done> {
        let mut ask = Ask::new(self);
        if let Some(passphrase) = passphrase {
            ask = ask.secret(passphrase.as_bytes());
        }
        let key_fd = passphrase.map(|_| 1);
        ask.run(Operation::RemoveKey { key_fd, keyslot, allow_last }).map(done)
    }

    fn back_up(&self, to: &Path) -> Result<Done> {
        let ask = Ask::new(self).file(new_file(to));
        let file = NewFile { fd: 1, name: "backup".to_owned(), commit: None };
        ask.run(Operation::HeaderBackup { file }).map(done)
    }

    fn restore(&self, from: &Path, allow_other: bool) -> Result<Done> {
        let ask = Ask::new(self).file(File::open(from).expect("open"));
        let file = Named { fd: 1, name: "backup".to_owned() };
        ask.run(Operation::HeaderRestore { file, allow_other }).map(done)
    }

    fn token(&self, token: Value, id: Option<u32>, replace: bool) -> Result<Done> {
        Ask::new(self).run(Operation::TokenAdd { token, id, replace }).map(done)
    }

    fn doctor(&self, passphrase: Option<&[u8]>) -> Doctor {
        let mut ask = Ask::new(self);
        if let Some(passphrase) = passphrase {
            ask = ask.secret(passphrase);
        }
        match ask.run(Operation::Doctor { key_fd: passphrase.map(|_| 1) }).expect("a report") {
            Reply::Doctor(doctor) => *doctor,
            other => panic!("another answer: {other:?}"),
        }
    }
}

fn new_file(path: &Path) -> File {
    File::options().read(true).write(true).create_new(true).open(path).expect("create")
}

fn cheap() -> KdfWish {
    KdfWish { kind: Some(KdfKind::Pbkdf2), iterations: Some(ITERATIONS), ..KdfWish::default() }
}

#[track_caller]
fn done(reply: Reply) -> Done {
    match reply {
        Reply::Done(done) => done,
        other => panic!("another answer: {other:?}"),
    }
}

/// A request about a volume, whose descriptor is number 0.
struct Ask {
    fds: Vec<OwnedFd>,
    header: bool,
    give_up: bool,
}

impl Ask {
    fn new(volume: &Volume) -> Self {
        Self::of(File::options().read(true).write(true).open(&volume.path).expect("open"))
    }

    fn of(file: File) -> Self {
        Self { fds: vec![file.into()], header: false, give_up: false }
    }

    fn file(mut self, file: File) -> Self {
        self.fds.push(file.into());
        self
    }

    fn secret(mut self, bytes: &[u8]) -> Self {
        let (read, mut write) = std::io::pipe().expect("pipe");
        write.write_all(bytes).expect("fits the pipe");
        self.fds.push(read.into());
        self
    }

    fn run(self, operation: Operation) -> Result<Reply> {
        let file = Some(Named { fd: 0, name: "volume".to_owned() });
        let (volume, header) = if self.header { (None, file) } else { (file, None) };
        let request = Request { volume, header, lock_fd: None, operation };
        let give_up = self.give_up;
        let caller = Caller {
            commit: &|_, _, _| panic!("nothing here is to be committed"),
            give_up: &move || give_up,
        };
        carry_out(request, self.fds, &caller)
    }
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T>, kind: ErrorKind, words: &str) -> Error {
    let error = result.expect_err("refused");
    assert_eq!(error.kind(), kind, "{}", error.chain());
    assert!(error.chain().contains(words), "{}", error.chain());
    error
}

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
        let (now, end) = (volume.bytes(), fs::metadata(&theirs).expect("stat").len() as usize);
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
        refused(volume.restore(&cut, true), ErrorKind::Invalid, words);
        let mut long = whole.clone();
        long.resize(whole.len() + (1 << 20), 0);
        refused(volume.restore(&case("long", &long), true), ErrorKind::Invalid, "not a header backup");
        let zeros = vec![0; whole.len()];
        refused(volume.restore(&case("zeros", &zeros), true), ErrorKind::Invalid, "not a LUKS header backup");
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
fn both_copies_gone_is_explained_and_nothing_else() {
    let Some(volume) = Volume::new(Version::Luks2) else { return };
    volume.damage(300, &[1; 8]);
    volume.damage(0x4000 + 300, &[1; 8]);
    let before = volume.bytes();
    let doctor = volume.doctor(None);
    let said: String = doctor.findings.iter().map(|finding| finding.message.as_str()).collect();
    assert!(said.contains("no usable header") && said.contains("byte 16384"), "{said}");
    assert!(doctor.tools.iter().all(|tool| !tool.opens));
    let error = refused(Ask::new(&volume).run(Operation::Repair { dry_run: false }), ErrorKind::Invalid, "");
    assert!(error.to_failure().hint.is_some_and(|hint| hint.contains("backup")));
    assert!(volume.bytes() == before);
    // And no LUKS at all is no case for a doctor.
    volume.damage(0, &vec![0; 5 << 20]);
    let none = Ask::new(&volume).run(Operation::Doctor { key_fd: None });
    refused(none, ErrorKind::Unsupported, "not a LUKS volume");
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
    refuse(json!({"type": "x", "keyslots": [], "fill": "x".repeat(4000)}), "bytes of JSON");
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
    assert!(doctor.summary.keyslots.iter().all(|slot| slot.unlock_seconds.is_some_and(|time| time > 0.0)));
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
        let new = || {
            Box::new(New {
                version,
                cipher: None,
                key_bytes: None,
                data_unit: None,
                hash: None,
                label: None,
                subsystem: None,
                uuid: None,
                data_offset: None,
                metadata_bytes: None,
                keyslots_bytes: None,
                kdf: cheap(),
                keyslot: None,
                volume_key_fd: None,
                header: None,
            })
        };
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
    let nothing = Request { volume: None, header: None, lock_fd: None, operation: Operation::Dump {} };
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
