//! Each verb as it is typed, what reaches the wire, and every refusal.

use super::*;
use crate::args::{Cli, Verb};
use clap::Parser;
use proto::luks::{KdfKind, Secret as Kind};
use std::path::{Path, PathBuf};

/// A directory with a volume, a header, keys and a volume key.
fn place() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("dir");
    for (name, content) in
        [("vol", &[0; 4096][..]), ("head", b"h"), ("key", b"old"), ("new", b"new"), ("vk", &[7; 64])]
    {
        std::fs::write(dir.path().join(name), content).expect("write");
    }
    dir
}

fn parsed(dir: &Path, args: &str) -> Luks {
    let words = args.split_whitespace().map(|word| word.replace('@', dir.to_str().expect("UTF-8")));
    let words = ["cryptctl".to_owned(), "luks".to_owned()].into_iter().chain(words);
    let Verb::Luks(verb) = Cli::try_parse_from(words).unwrap_or_else(|error| panic!("{error}")).verb else {
        panic!("a luks verb was typed")
    };
    verb
}

fn typed(dir: &Path, args: &str) -> Result<Opened> {
    open(&parsed(dir, args))
}

fn sent(dir: &Path, args: &str) -> (Request, Vec<String>) {
    let opened = typed(dir, args).unwrap_or_else(|error| panic!("{args}: {error}"));
    let prepared = opened.create(None).unwrap_or_else(|error| panic!("{args}: {error}"));
    let named = |fd: &OwnedFd| {
        use std::os::fd::AsRawFd;
        let path = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).expect("open");
        // A secret is in a pipe: told by what is in it.
        if path.to_string_lossy().starts_with("pipe:") {
            let mut content = Vec::new();
            std::io::Read::read_to_end(&mut File::from(fd.try_clone().expect("copy")), &mut content)
                .expect("ends");
            return if content == [7; 64] { "vk".into() } else { String::from_utf8(content).expect("a key") };
        }
        path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
    };
    (prepared.request, prepared.descriptors.iter().map(named).collect())
}

fn refused(dir: &Path, args: &str) -> Error {
    typed(dir, args).err().unwrap_or_else(|| panic!("{args}: accepted"))
}

fn at(index: u32) -> usize {
    usize::try_from(index).expect("an index")
}

#[test]
fn a_look_is_read_only_and_a_change_is_not() {
    let dir = place();
    let (request, names) = sent(dir.path(), "dump @/vol --header @/head");
    assert_eq!(names, ["vol", "head"]);
    assert_eq!(request.operation, Operation::Dump {});
    let volume = request.volume.expect("the volume");
    assert!(volume.fd == 0 && volume.name.ends_with("/vol"), "{volume:?}");
    assert_eq!(request.header.map(|header| header.fd), Some(1));
    for (args, writes) in [
        ("dump @/vol", false),
        ("open-test @/vol --key file:@/key", false),
        ("header-backup @/vol @/backup", false),
        ("token list @/vol", false),
        ("doctor @/vol", false),
        ("add-key @/vol --key file:@/key --new-key file:@/new", true),
        ("remove-key @/vol --key-slot 1", true),
        ("change-key @/vol --key file:@/key --new-key file:@/new", true),
        ("convert-kdf @/vol --key file:@/key", true),
        ("header-restore @/vol @/head", true),
        ("erase @/vol --yes-destroy-all-keys", true),
        ("token remove @/vol --token-id 0", true),
        ("token add @/vol --key-ref file:/k --key-slot 0", true),
        ("repair @/vol", true),
        ("repair @/vol --dry-run", false),
        ("format @/vol --key file:@/key", true),
    ] {
        let opened = typed(dir.path(), args).unwrap_or_else(|error| panic!("{args}: {error}"));
        let flags = rustix::fs::fcntl_getfl(opened.volume.file().unwrap_or_else(|error| panic!("{error}")))
            .expect("open");
        assert_eq!(flags.contains(rustix::fs::OFlags::RDWR), writes, "{args}");
        assert_eq!(opened.writes, writes, "{args}");
        assert!(opened.lockable().is_none(), "a file is locked by the daemon");
    }
}

#[test]
fn secrets_are_where_the_wire_says_they_are() {
    let dir = place();
    let (request, names) = sent(dir.path(), "open-test @/vol --key file:@/key --key-slot 3");
    let Operation::OpenTest { key_fd, secret, keyslot } = request.operation else { panic!("open-test") };
    assert_eq!((names[at(key_fd)].as_str(), secret, keyslot), ("old", Kind::Passphrase, Some(3)));

    let (request, names) = sent(dir.path(), "open-test @/vol --volume-key file:@/vk");
    let Operation::OpenTest { key_fd, secret, .. } = request.operation else { panic!("open-test") };
    assert_eq!((names[at(key_fd)].as_str(), secret), ("vk", Kind::VolumeKey));

    let (request, names) = sent(
        dir.path(),
        "add-key @/vol --key file:@/key --new-key file:@/new --new-key-slot 7 --pbkdf pbkdf2 --hash sha512 --iter-time 9",
    );
    let Operation::AddKey { key_fd, secret, new_key_fd, keyslot, kdf } = request.operation else {
        panic!("add-key")
    };
    assert_eq!((names[at(key_fd)].as_str(), names[at(new_key_fd)].as_str()), ("old", "new"));
    assert_eq!((secret, keyslot, kdf.kind), (Kind::Passphrase, Some(7), Some(KdfKind::Pbkdf2)));
    assert_eq!((kdf.hash.as_deref(), kdf.iter_time_ms), (Some("sha512"), Some(9)));

    let (request, names) =
        sent(dir.path(), "add-key @/vol --volume-key file:@/vk --new-key file:@/new --key-slot 2");
    let Operation::AddKey { key_fd, secret, new_key_fd, keyslot, .. } = request.operation else {
        panic!("add-key")
    };
    assert_eq!((names[at(key_fd)].as_str(), names[at(new_key_fd)].as_str()), ("vk", "new"));
    assert_eq!((secret, keyslot), (Kind::VolumeKey, Some(2)));

    let (request, names) =
        sent(dir.path(), "change-key @/vol --key file:@/key --new-key file:@/new --key-slot 1");
    let Operation::ChangeKey { key_fd, new_key_fd, keyslot, .. } = request.operation else {
        panic!("change-key")
    };
    assert_eq!(
        (names[at(key_fd)].as_str(), names[at(new_key_fd)].as_str(), keyslot),
        ("old", "new", Some(1))
    );

    let (request, names) = sent(dir.path(), "convert-kdf @/vol --key file:@/key --pbkdf-memory 64");
    let Operation::ConvertKdf { key_fd, keyslot, kdf } = request.operation else { panic!("convert-kdf") };
    assert_eq!((names[at(key_fd)].as_str(), keyslot, kdf.memory_kib), ("old", None, Some(64)));

    let (request, names) = sent(dir.path(), "doctor @/vol --key file:@/key");
    let Operation::Doctor { key_fd: Some(key_fd) } = request.operation else { panic!("doctor") };
    assert_eq!(names[at(key_fd)], "old");
    assert_eq!(sent(dir.path(), "doctor @/vol").0.operation, Operation::Doctor { key_fd: None });
}

#[test]
fn removing_says_what_goes_and_whether_it_may_be_the_last() {
    let dir = place();
    let (request, _) = sent(dir.path(), "remove-key @/vol --key-slot 3");
    let removal = Operation::RemoveKey { key_fd: None, keyslot: Some(3), allow_last: false };
    assert_eq!(request.operation, removal);
    let (request, names) = sent(dir.path(), "remove-key @/vol --key file:@/key --last-key-destroy-data");
    let Operation::RemoveKey { key_fd: Some(key_fd), keyslot: None, allow_last: true } = request.operation
    else {
        panic!("{:?}", request.operation)
    };
    assert_eq!(names[at(key_fd)], "old");
}

#[test]
fn a_new_volume_has_its_key_its_volume_key_and_its_header() {
    let dir = place();
    let (request, names) = sent(
        dir.path(),
        "format @/vol --key file:@/key --volume-key file:@/vk --header @/new-head --type luks1 --key-size 512",
    );
    let Operation::Format { new, key_fd } = request.operation else { panic!("format") };
    assert_eq!(new.version, luks::Version::Luks1);
    assert_eq!(names[at(key_fd)], "old");
    assert_eq!(names[at(new.volume_key_fd.expect("its own"))], "vk");
    let header = new.header.expect("elsewhere");
    assert_eq!(names[at(header.fd)], "new-head.partial");
    assert_eq!(header.commit.expect("a new file").name, "new-head");
    assert!(request.header.is_none());
    assert!(dir.path().join("new-head.partial").exists());
}

#[test]
fn what_holds_data_is_formatted_only_when_told_so() {
    let dir = place();
    let path = dir.path().join("other");
    let with = |content: &[u8]| std::fs::write(&path, content).expect("write");
    for content in [&b""[..], &[0; 70_000]] {
        with(content);
        assert!(typed(dir.path(), "format @/other --key file:@/key").is_ok());
    }
    let mut data = vec![0; 70_000];
    data[69_999] = 1;
    with(&data);
    let error = refused(dir.path(), "format @/other --key file:@/key");
    assert!(error.to_string().contains("holds data\nhint: --force"), "{error}");
    assert_eq!(error.exit as u8, 1);
    // A swap header, as in the test of the probe.
    let mut swap = vec![0; 1 << 20];
    swap[1024] = 1;
    swap[1028] = 255;
    swap[4086..4096].copy_from_slice(b"SWAPSPACE2");
    with(&swap);
    let error = refused(dir.path(), "format @/other --key file:@/key");
    assert!(error.to_string().contains("holds swap data"), "{error}");
    assert!(typed(dir.path(), "format @/other --key file:@/key --force").is_ok());
    // With the header elsewhere, nothing is written to the volume.
    assert!(typed(dir.path(), "format @/other --key file:@/key --header @/fresh").is_ok());
    let error = refused(dir.path(), "format @/other --key file:@/key --header @/head");
    assert!(error.to_string().contains("exists and is not empty"), "{error}");
}

#[test]
fn all_that_will_be_overwritten_is_looked_at() {
    const MIB: u64 = 1 << 20;
    let dir = place();
    let file = File::create_new(dir.path().join("far")).expect("create");
    file.set_len(300 * MIB).expect("size");
    let holds = |args: &str| {
        let args = format!("format @/far --key file:@/key {args}");
        match typed(dir.path(), &args) {
            Ok(_) => false,
            Err(error) => {
                assert!(error.to_string().contains("far holds data\nhint: --force"), "{args}: {error}");
                assert_eq!(error.exit as u8, 1, "{args}: {error}");
                true
            }
        }
    };
    for (at, options, kept) in [
        (16 * MIB - 1, "", true),
        (16 * MIB, "", false),
        (16 * MIB, "--luks2-keyslots-size 128M", true),
        (128 * MIB + (32 << 10) - 1, "--luks2-metadata-size 16k --luks2-keyslots-size 128M", true),
        (128 * MIB + (32 << 10), "--luks2-metadata-size 16k --luks2-keyslots-size 128M", false),
        (136 * MIB - 1, "--luks2-metadata-size 4M --luks2-keyslots-size 128M", true),
        (64 * MIB - 1, "--data-offset 64M", true),
        (64 * MIB, "--data-offset 64M", false),
        (64 * MIB - 1, "--format luks1 --data-offset 64M", true),
        (299 * MIB, "--data-offset 1G", true),
        (64 * MIB - 1, "--data-offset 64M --force", false),
        (0, "--header @/fresh", false),
    ] {
        file.write_all_at(&[1], at).expect("write");
        assert_eq!(holds(options), kept, "a byte at {at}, {options:?}");
        // Not a hole any more, and zeros all the same.
        file.write_all_at(&[0], at).expect("write");
        assert!(!holds(options), "zeros at {at}, {options:?}");
    }
}

#[test]
fn one_passphrase_in_two_keyslots_is_told_of() {
    let dir = place();
    std::fs::write(dir.path().join("longer"), "older").expect("write");
    for (args, told) in [
        ("add-key @/vol --key file:@/key --new-key file:@/key", true),
        ("add-key @/vol --key file:@/key --new-key file:@/new", false),
        ("add-key @/vol --key file:@/key --new-key file:@/longer", false),
        ("add-key @/vol --volume-key file:@/vk --new-key file:@/key", false),
        ("change-key @/vol --key file:@/key --new-key file:@/key", false),
    ] {
        let opened = typed(dir.path(), args).unwrap_or_else(|error| panic!("{args}: {error}"));
        let found = opened.warnings.iter().any(|warning| warning.contains("gets a second keyslot"));
        assert_eq!(found, told, "{args}: {:?}", opened.warnings);
    }
}

#[test]
fn what_is_not_a_file_with_a_header_is_refused_by_name() {
    let dir = place();
    for (args, words, status) in [
        ("dump -", "VOLUME cannot be `-`", 2),
        ("dump @/none", "no such file", 1),
        ("dump @", "is a directory", 2),
        ("dump /dev/null", "is a character device", 2),
        ("dump rbd:pool/x", "not supported yet", 2),
        ("dump nbd:host:1:exportname=x", "QEMU's notation", 2),
        ("dump @/vol --header -", "--header cannot be `-`", 2),
        ("format @/none --key file:@/key", "no such file", 1),
        ("header-backup @/vol -", "FILE must be a file or a block device, not a stream", 2),
        ("header-backup @/vol @/vol", "is both source and sink", 2),
        ("header-backup @/vol @/head", "exists and is not empty", 1),
        ("header-restore @/vol @/vol", "is both source and sink", 2),
        ("header-restore @/vol @/none", "no such file", 1),
        ("format @/vol --key file:@/key --header @/vol", "is VOLUME itself", 2),
    ] {
        let error = refused(dir.path(), args);
        assert!(error.to_string().contains(words), "{args}: {error}");
        assert_eq!(error.exit as u8, status, "{args}: {error}");
    }
    assert!(typed(dir.path(), "header-backup @/vol @/head --force").is_ok());
}

#[test]
fn keys_are_checked_before_anything_is_opened() {
    let dir = place();
    for (args, words) in [
        ("open-test @/none --key 0123456789abcdef", "--key: "),
        ("open-test @/none --volume-key 0123456789abcdef", "--volume-key: "),
        ("add-key @/none --key file:@/key --new-key 0123456789abcdef", "--new-key: "),
        ("add-key @/none --key fd:7 --new-key fd:7", "cannot hold two secrets"),
        ("change-key @/none --key fd:0 --new-key fd:0", "cannot hold two secrets"),
        ("add-key @/none --volume-key fd:7 --new-key fd:7", "cannot hold two secrets"),
    ] {
        let error = refused(dir.path(), args);
        assert!(error.to_string().contains(words), "{args}: {error}");
        assert!(!error.to_string().contains("0123"), "{error}");
        assert_eq!(error.exit as u8, 2, "{args}: {error}");
    }
    let error = refused(dir.path(), "open-test @/vol --volume-key file:@/key");
    assert!(error.to_string().contains("exactly 32 or 64 bytes"), "{error}");
    let error = refused(dir.path(), "format @/vol --key file:@/key --volume-key file:@/vk --key-size 256");
    assert!(error.to_string().contains("exactly 32 bytes"), "{error}");
}

#[test]
fn what_contradicts_itself_does_not_parse() {
    for args in [
        "open-test v",
        "open-test v --key prompt --volume-key prompt",
        "open-test v --volume-key prompt --key-slot 1",
        "add-key v --key prompt",
        "add-key v --new-key prompt",
        "add-key v --key prompt --volume-key prompt --new-key prompt",
        "add-key v --key prompt --new-key prompt --new-key-slot 32",
        "remove-key v",
        "remove-key v --last-key-destroy-data",
        "change-key v --key prompt",
        "change-key v --new-key prompt",
        "convert-kdf v",
        "convert-kdf v --key prompt --pbkdf scrypt",
        "convert-kdf v --key prompt --iter-time 0",
        "convert-kdf v --key prompt --iter-time 5 --pbkdf-force-iterations 5",
        "convert-kdf v --key prompt --pbkdf-force-iterations 3",
        "convert-kdf v --key prompt --pbkdf-memory 31",
        "convert-kdf v --key prompt --pbkdf-memory 4194305",
        "convert-kdf v --key prompt --pbkdf-parallel 5",
        "format v",
        "format v --key prompt --format raw",
        "format v --key prompt --cipher aes-cbc-essiv:sha256",
        "format v --key prompt --key-size 384",
        "format v --key prompt --sector-size 8192",
        "format v --key prompt --uuid x",
        "format v --key prompt --luks2-metadata-size 17k",
        "format v --key prompt --luks2-keyslots-size 1000",
        "header-backup v",
        "header-restore v",
        "token add v",
        "token add v --key-slot 1",
        "token add v --json-file x --key-ref file:x",
        "token add v --json-file x --rotate-by 2099-01-01",
        "token add v --json-file x --key-slot 1",
        "token add v --key-ref file:x --rotate-by tomorrow",
        "token add v --key-ref file:x --token-replace",
        "token remove v",
        "token",
    ] {
        let words = ["cryptctl", "luks"].into_iter().chain(args.split(' '));
        let error = Cli::try_parse_from(words).err().unwrap_or_else(|| panic!("{args}: parsed"));
        assert_eq!(error.exit_code(), 2, "{args}");
    }
}

#[test]
fn erasing_asks_unless_told_not_to() {
    let dir = place();
    let opened = typed(dir.path(), "erase @/vol --header @/head").unwrap_or_else(|error| panic!("{error}"));
    let Some(Question::MayErase(name)) = &opened.open_question else { panic!("it must ask") };
    assert!(name.ends_with("/head"), "{name}");
    let (request, descriptors) = opened.preliminary().unwrap_or_else(|error| panic!("{error}"));
    assert_eq!((request.operation, descriptors.len()), (Operation::Dump {}, 2));
    let opened = typed(dir.path(), "erase @/vol --yes-destroy-all-keys").unwrap_or_else(|e| panic!("{e}"));
    assert!(opened.open_question.is_none());
    assert_eq!(
        sent(dir.path(), "erase @/vol --yes-destroy-all-keys").0.operation,
        Operation::Erase { confirmed: true }
    );
}

#[test]
fn a_backup_and_its_restoring_pass_their_files() {
    let dir = place();
    let (request, names) = sent(dir.path(), "header-backup @/vol @/backup");
    let Operation::HeaderBackup { file } = request.operation else { panic!("header-backup") };
    assert_eq!(names[at(file.fd)], "backup.partial");
    assert!(file.commit.is_some_and(|commit| commit.name == "backup" && !commit.replace));
    let (request, names) = sent(dir.path(), "header-restore @/vol @/head --replace-other-header");
    let Operation::HeaderRestore { file, allow_other: true } = request.operation else { panic!("restore") };
    assert_eq!(names[at(file.fd)], "head");
}

fn keyslot(id: u32, bound: bool) -> luks::Keyslot {
    serde_json::from_value(serde_json::json!({ "id": id, "kind": "luks2", "bound": bound }))
        .expect("a keyslot")
}

fn summary(keyslots: Vec<luks::Keyslot>) -> luks::Summary {
    let empty = serde_json::json!({ "version": "luks2", "uuid": "u", "segments": [], "keyslots": [] });
    luks::Summary { keyslots, ..serde_json::from_value(empty).expect("a summary") }
}

#[test]
fn our_token_is_about_the_keyslots_named_or_the_only_one() {
    let dir = place();
    let (request, _) = sent(
        dir.path(),
        "token add @/vol --key-ref barbican:1 --key-slot 2 --key-slot 0 --rotate-by 2999-01-01 --token-id 5 --token-replace",
    );
    let Operation::TokenAdd { token, id: Some(5), replace: true } = request.operation else { panic!("add") };
    assert_eq!(token["keyslots"], serde_json::json!(["0", "2"]));
    assert_eq!((&token["ref"], &token["rotate_by"]), (&"barbican:1".into(), &"32472144000".into()));
    let typed =
        || typed(dir.path(), "token add @/vol --key-ref barbican:1").unwrap_or_else(|e| panic!("{e}"));
    let mut opened = typed();
    opened
        .settle_keyslot(&summary(vec![keyslot(0, false), keyslot(4, true)]))
        .unwrap_or_else(|error| panic!("{error}"));
    let Operation::TokenAdd { token, .. } = &opened.operation else { panic!("add") };
    assert_eq!(token["keyslots"], serde_json::json!(["4"]));
    assert!(token.get("rotate_by").is_none());
    for keyslots in [vec![], vec![keyslot(1, true), keyslot(3, true)]] {
        let error = typed().settle_keyslot(&summary(keyslots)).expect_err("which?");
        assert_eq!(error.failure.hint.as_deref(), Some("name it with --key-slot"));
        assert_eq!(error.exit as u8, 2);
    }
}

#[test]
fn tokens_that_cannot_be_are_refused_here() {
    let dir = place();
    let path: PathBuf = dir.path().join("t.json");
    std::fs::write(&path, r#"{"type":"x","keyslots":[],"y":1}"#).expect("write");
    let (request, _) = sent(dir.path(), "token add @/vol --json-file @/t.json");
    let Operation::TokenAdd { token, id: None, replace: false } = request.operation else { panic!("add") };
    assert_eq!(token["y"], 1);
    std::fs::write(&path, "nonsense").expect("write");
    for (args, words, status) in [
        ("token add @/vol --json-file @/t.json", "not JSON", 2),
        ("token add @/vol --json-file @/none", "no such file", 1),
        ("token add @/vol --key-ref hunter2", "--key-ref: expected PROVIDER:REST", 2),
        ("token add @/vol --key-ref fd:3", "--key-ref: means nothing to anybody else", 2),
        ("token add @/vol --key-ref file:x --rotate-by 2020-01-01", "--rotate-by: that day has begun", 2),
    ] {
        let error = refused(dir.path(), args);
        assert!(error.to_string().contains(words), "{args}: {error}");
        assert!(!error.to_string().contains("hunter2"), "{error}");
        assert_eq!(error.exit as u8, status, "{args}: {error}");
    }
}

#[test]
fn a_newline_is_told_of_once() {
    let dir = place();
    std::fs::write(dir.path().join("line"), "x\n").expect("write");
    let opened = typed(dir.path(), "change-key @/vol --key file:@/line --new-key file:@/line");
    let opened = opened.unwrap_or_else(|error| panic!("{error}"));
    let told = opened.warnings.iter().filter(|warning| warning.contains("newline")).count();
    assert_eq!(told, 1);
    assert!(opened.doubt.is_some_and(|doubt| doubt.contains("newline")));
    // That others can read the one file is told once too.
    assert_eq!(opened.warnings.iter().filter(|warning| warning.contains("by others")).count(), 1);
}
