//! Tests of what is asked of the daemon.

use super::*;
use crate::args::{Cli, Verb};
use clap::Parser;
use proto::{Raw, TweakKind, luks};
use std::path::Path;

fn typed(dir: &Path, args: &str) -> Result<Opened> {
    let key = dir.join("key");
    std::fs::write(&key, (0..64).collect::<Vec<u8>>()).expect("write");
    std::fs::write(dir.join("in"), "x").expect("write");
    let words = args.split(' ').map(|word| word.replace('@', dir.to_str().expect("UTF-8")));
    let cli = Cli::try_parse_from(std::iter::once("cryptctl".to_owned()).chain(words)).expect("parses");
    match cli.verb {
        Verb::Encrypt(args) => encrypt(&args),
        Verb::Decrypt(args) => decrypt(&args),
        Verb::Verify(args) => verify(&args),
        _ => panic!("not a volume verb"),
    }
}

#[test]
fn everything_typed_reaches_the_wire() {
    let dir = tempfile::tempdir().expect("dir");
    let opened = typed(
        dir.path(),
        "encrypt @/in @/out --format raw --key file:@/key --sector-size 4096 --iv plain --iv-large-sectors \
         --iv-offset 8 --pad --throttle 1M --chunk-size 256k --queue-depth 4 --workers 2 --buffered --detach \
         --keep-partial",
    )
    .unwrap_or_else(|error| panic!("{error}"));
    let Prepared { submit, descriptors, partials } =
        opened.create().unwrap_or_else(|error| panic!("{error}"));
    let Some(Volume { format: Format::Raw(raw), key_fd }) = submit.volume else { panic!("no volume") };
    assert_eq!(
        raw,
        Raw { key_bytes: 64, data_unit: 4096, tweak: TweakKind::Plain, large_tweak: true, tweak_offset: 8 }
    );
    assert_eq!(
        submit.tuning,
        Tuning {
            chunk_bytes: Some(256 << 10),
            queue_depth: Some(4),
            workers: Some(2),
            direct: Some(false),
            pad: true,
            ..Tuning::default()
        }
    );
    assert_eq!((submit.bytes_per_second, submit.detach), (Some(1 << 20), true));
    let commit = submit.sink.as_ref().and_then(|sink| sink.commit.clone()).expect("a new file");
    assert_eq!((commit.partial.as_str(), commit.name.as_str()), ("out.partial", "out"));
    assert!(commit.keep_partial && !commit.replace);
    let mut used = [key_fd, submit.source.expect("source").fd, submit.sink.expect("sink").fd, commit.dir_fd];
    used.sort_unstable();
    assert_eq!(used, [0, 1, 2, 3]);
    assert_eq!(descriptors.len(), 4);
    assert!(dir.path().join("out.partial").exists());
    partials[0].refused();
    assert!(!dir.path().join("out.partial").exists());
}

#[test]
fn a_checkpoint_is_made_beside_the_partial_and_found_again() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().expect("dir");
    let words = "decrypt @/in @/out --format raw --key file:@/key";
    let (partial, mark) = (dir.path().join("out.partial"), dir.path().join("out.partial.checkpoint"));
    let error = typed(dir.path(), &format!("{words} --resume")).err().expect("nothing there");
    assert!(error.to_string().contains("nothing to resume"), "{error}");
    let (submit, count, partials) = sent(dir.path(), &format!("{words} --resumable --checkpoint-every 0.5"));
    let wish = submit.checkpoint.expect("a checkpoint");
    let entry = wish.entry.expect("removable");
    assert_eq!(
        (entry.name.as_str(), wish.resume, wish.interval_ms),
        ("out.partial.checkpoint", false, Some(500))
    );
    assert!(wish.fd != entry.dir_fd && count == 6);
    let mode = std::fs::metadata(&mark).expect("made").mode();
    assert_eq!(mode & 0o077, 0, "{mode:o}: it may hold a header");
    // A daemon that goes away leaves both; the locks go with the descriptors.
    let said: Vec<String> = partials.iter().filter_map(PartialFile::abandon).collect();
    assert!(said.iter().any(|text| text.contains("--resume goes on")), "{said:?}");
    drop(partials);
    assert!(partial.exists() && mark.exists());
    let (submit, _, partials) = sent(dir.path(), &format!("{words} --resume"));
    assert!(submit.checkpoint.is_some_and(|wish| wish.resume));
    // What was found is not ours to remove.
    partials.iter().for_each(PartialFile::refused);
    assert!(partial.exists() && mark.exists());
}

#[test]
fn what_has_passed_a_pipe_cannot_be_resumed() {
    let dir = tempfile::tempdir().expect("dir");
    for option in ["--resumable", "--checkpoint @/mark", "--checkpoint-every 1"] {
        let fifo = dir.path().join("fifo");
        let _ = rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::from_raw_mode(0o600));
        // Open for both, or opening it would wait for the other end.
        let _held = std::fs::File::options().read(true).write(true).open(&fifo).expect("opens");
        let error =
            refused(dir.path(), &format!("encrypt @/fifo @/out --format raw --key file:@/key {option}"));
        assert!(error.to_string().contains("is a stream"), "{error}");
    }
}

#[test]
fn nothing_is_created_before_the_job_is_sent() {
    let dir = tempfile::tempdir().expect("dir");
    assert!(typed(dir.path(), "decrypt @/in @/out --format raw --key file:@/key").is_ok());
    assert!(!dir.path().join("out.partial").exists() && !dir.path().join("out").exists());
}

#[test]
fn plaintext_files_are_private_and_ciphertext_follows_the_umask() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().expect("dir");
    for (verb, private) in [("encrypt", false), ("decrypt", true)] {
        let opened = typed(dir.path(), &format!("{verb} @/in @/{verb} --format raw --key file:@/key"));
        let prepared = opened.and_then(Opened::create).unwrap_or_else(|error| panic!("{error}"));
        let mode = std::fs::metadata(dir.path().join(format!("{verb}.partial"))).expect("created").mode();
        assert_eq!(mode & 0o077 == 0, private, "{verb}: {mode:o}");
        drop(prepared);
    }
}

fn sent(dir: &Path, args: &str) -> (Submit, usize, Vec<PartialFile>) {
    let prepared = typed(dir, args).and_then(Opened::create);
    let Prepared { submit, descriptors, partials } = prepared.unwrap_or_else(|error| panic!("{error}"));
    (submit, descriptors.len(), partials)
}

fn refused(dir: &Path, args: &str) -> Error {
    let error = typed(dir, args).err().unwrap_or_else(|| panic!("{args}: accepted"));
    assert_eq!(error.exit as u8, 2, "{args}: {error}");
    error
}

fn listen(dir: &Path, name: &str) -> std::os::unix::net::UnixListener {
    std::os::unix::net::UnixListener::bind(dir.join(name)).expect("bind")
}

#[test]
fn volumes_of_servers_are_passed_as_connections() {
    let dir = tempfile::tempdir().expect("dir");
    let _servers = [listen(dir.path(), "one"), listen(dir.path(), "two")];
    let (submit, count, _) = sent(
        dir.path(),
        "encrypt nbd+unix:///a?socket=@/one nbd+unix:///b?socket=@/two --key file:@/key --reconnect 1.5",
    );
    let (source, sink) = (submit.source.expect("a source"), submit.sink.expect("a sink"));
    assert!(!source.stream && !sink.stream && sink.commit.is_none());
    let [of_source, of_sink] = submit.remotes.as_slice() else { panic!("{:?}", submit.remotes) };
    assert_eq!((of_source.fd, of_sink.fd), (source.fd, sink.fd));
    assert_eq!((of_source.export.as_str(), of_sink.export.as_str()), ("a", "b"));
    assert_eq!((of_source.reconnect_ms, of_sink.reconnect_ms), (Some(1500), Some(1500)));
    assert_eq!((of_source.blank_bytes, of_sink.blank_bytes), (None, Some(1 << 20)), "no --force");
    assert!(of_source.tls.is_none() && !of_source.update);
    let path = dir.path().join("one").to_str().expect("UTF-8").to_owned();
    assert_eq!(of_source.address, Some(proto::remote::Address::Unix(path)));
    let mut used = vec![source.fd, sink.fd, submit.volume.expect("a volume").key_fd];
    used.extend(of_source.more.iter().chain(&of_sink.more));
    used.sort_unstable();
    assert_eq!(used, (0..u32::try_from(count).expect("few")).collect::<Vec<_>>(), "each once");
}

#[test]
fn nothing_is_connected_to_before_the_job_is_sent() {
    let dir = tempfile::tempdir().expect("dir");
    let words = "decrypt nbd+unix:///a?socket=@/none @/out --key file:@/key";
    let opened = typed(dir.path(), words).unwrap_or_else(|error| panic!("{error}"));
    let error = opened.create().err().expect("nobody listens");
    assert_eq!(error.exit as u8, 1, "{error}");
    assert!(!dir.path().join("out.partial").exists(), "and nothing is left");
}

#[test]
fn a_bitmap_is_of_a_server_and_goes_into_a_new_copy_or_an_earlier_one() {
    let dir = tempfile::tempdir().expect("dir");
    let _server = listen(dir.path(), "sock");
    let bitmap = "--bitmap qemu:dirty-bitmap:b0";
    let source = "nbd+unix:///a?socket=@/sock";
    let (submit, ..) = sent(dir.path(), &format!("encrypt {source} @/out --key file:@/key {bitmap}"));
    assert_eq!(submit.remotes[0].bitmap.as_deref(), Some("qemu:dirty-bitmap:b0"));
    assert!(!submit.remotes[0].update && submit.sink.expect("a sink").commit.is_some());
    assert!(matches!(submit.volume.expect("a volume").format, Format::NewLuks(_)));
    std::fs::write(dir.path().join("old"), "copy").expect("write");
    let words = format!("encrypt {source} @/old --key file:@/key {bitmap}");
    let error = typed(dir.path(), &words).err().expect("there is one");
    assert!(error.to_string().contains("--update overwrites in place"), "{error}");
    let (submit, ..) = sent(dir.path(), &format!("{words} --update"));
    assert!(submit.remotes[0].update && submit.sink.expect("a sink").commit.is_none());
    let Some(Volume { format: Format::Luks(_), .. }) = submit.volume else { panic!("made anew") };
    assert_eq!(std::fs::read_to_string(dir.path().join("old")).expect("read"), "copy");
    for (words, said) in [
        (format!("encrypt @/in @/out --key file:@/key {bitmap}"), "no volume of an NBD server"),
        (format!("encrypt {source} - --key file:@/key {bitmap}"), "is a stream"),
        (format!("encrypt {source} @/out --key file:@/key {bitmap} --resumable"), "cannot be resumed"),
        (format!("encrypt {source} @/old --key file:@/key {bitmap} --update --label x"), "of a new volume"),
        ("encrypt @/in @/out --key file:@/key --reconnect 0".to_owned(), "none is named"),
        (format!("encrypt {source} {source} --key file:@/key"), "both source and sink"),
    ] {
        let error = refused(dir.path(), &words);
        assert!(error.to_string().contains(said), "{words}: {error}");
    }
}

#[test]
fn luks2_is_made_unless_another_format_is_named() {
    let dir = tempfile::tempdir().expect("dir");
    for (flag, version) in [
        ("", luks::Version::Luks2),
        (" --format luks2", luks::Version::Luks2),
        (" --format luks1", luks::Version::Luks1),
    ] {
        let (submit, ..) = sent(dir.path(), &format!("encrypt @/in @/out --key file:@/key{flag} --force"));
        let Some(Volume { format: Format::NewLuks(new), .. }) = submit.volume else { panic!("not LUKS") };
        assert_eq!(new.version, version);
        assert!(new.header.is_none() && new.volume_key_fd.is_none());
    }
}

#[test]
fn a_new_volume_may_have_its_header_elsewhere_and_its_own_volume_key() {
    let dir = tempfile::tempdir().expect("dir");
    std::fs::write(dir.path().join("vk"), [7; 64]).expect("write");
    let (submit, count, partials) = sent(
        dir.path(),
        "encrypt @/in @/out --key file:@/key --header @/head --volume-key file:@/vk --label x",
    );
    let Some(Volume { format: Format::NewLuks(new), key_fd }) = submit.volume else { panic!("not LUKS") };
    let header = new.header.expect("a header of its own");
    let (header_commit, sink) = (header.commit.expect("a new file"), submit.sink.expect("a sink"));
    let mut used = vec![key_fd, new.volume_key_fd.expect("its own"), header.fd, header_commit.dir_fd];
    used.extend([submit.source.expect("source").fd, sink.fd, sink.commit.expect("a new file").dir_fd]);
    used.sort_unstable();
    assert_eq!(used, [0, 1, 2, 3, 4, 5, 6]);
    assert_eq!(count, 7);
    assert_eq!((header_commit.name.as_str(), header_commit.partial.as_str()), ("head", "head.partial"));
    use std::os::unix::fs::MetadataExt;
    let mode = std::fs::metadata(dir.path().join("head.partial")).expect("created").mode();
    assert_eq!(mode & 0o077, 0, "{mode:o}: a bare header is its owner's");
    assert_eq!(partials.len(), 2);
    partials.iter().for_each(PartialFile::refused);
    assert!(!dir.path().join("head.partial").exists() && !dir.path().join("out.partial").exists());
}

#[test]
fn an_existing_volume_is_luks_unless_called_raw() {
    let dir = tempfile::tempdir().expect("dir");
    for flag in ["", " --format luks"] {
        let (submit, ..) =
            sent(dir.path(), &format!("decrypt @/in @/out --key file:@/key --key-slot 3 --force{flag}"));
        let Some(Volume { format: Format::Luks(open), .. }) = submit.volume else { panic!("not LUKS") };
        assert_eq!(open, luks::Open { header: None, keyslot: Some(3), secret: luks::Secret::Passphrase });
    }
    // What the header tells is not asked for, and so cannot be asked for in vain.
    for words in ["decrypt a b --format luks1", "verify a b --format luks2"] {
        let words = ["cryptctl"].into_iter().chain(words.split(' ')).chain(["--key", "prompt"]);
        assert_eq!(Cli::try_parse_from(words).expect_err("no such format").exit_code(), 2);
    }
    std::fs::write(dir.path().join("head"), "h").expect("write");
    for verb in ["decrypt @/in @/new", "verify @/in @/key"] {
        let (submit, count, _) = sent(dir.path(), &format!("{verb} --volume-key file:@/key --header @/head"));
        let Some(Volume { format: Format::Luks(open), key_fd }) = submit.volume else { panic!("not LUKS") };
        assert_eq!(open.secret, luks::Secret::VolumeKey);
        let header = open.header.expect("its own header");
        assert!(header.name.ends_with("/head") && header.fd != key_fd, "{header:?}");
        assert_eq!(count, if verb.starts_with("decrypt") { 5 } else { 4 });
    }
}

#[test]
fn options_of_one_format_are_refused_with_another() {
    let dir = tempfile::tempdir().expect("dir");
    for option in ["--iv plain", "--iv plain64", "--iv-large-sectors", "--iv-offset 0"] {
        for verb in ["encrypt @/in @/out", "decrypt @/in @/out", "verify @/in @/key"] {
            let error = refused(dir.path(), &format!("{verb} --key file:@/key {option}"));
            assert!(error.to_string().contains("is an option of --format raw"), "{error}");
        }
    }
    for option in ["--key-size 512", "--sector-size 512"] {
        let error = refused(dir.path(), &format!("decrypt @/in @/out --key file:@/key {option}"));
        assert!(error.to_string().contains("is an option of --format raw"), "{error}");
    }
    for option in [
        "--header x",
        "--volume-key prompt",
        "--cipher aes-xts-plain64",
        "--hash sha256",
        "--data-offset 0",
        "--label x",
        "--subsystem x",
        "--uuid 0f8fad5b-d9cb-469f-a165-70867728950e",
        "--key-slot 0",
        "--luks2-metadata-size 16k",
        "--luks2-keyslots-size 1M",
        "--pbkdf pbkdf2",
        "--iter-time 1",
        "--pbkdf-force-iterations 1000",
        "--pbkdf-memory 64",
        "--pbkdf-parallel 1",
    ] {
        let error =
            refused(dir.path(), &format!("encrypt @/in @/out --format raw --key file:@/key {option}"));
        assert!(error.to_string().contains("is an option of LUKS"), "{error}");
    }
    for option in ["--header x", "--key-slot 0"] {
        let error = refused(dir.path(), &format!("verify @/in @/key --format raw --key file:@/key {option}"));
        assert!(error.to_string().contains("is an option of LUKS"), "{error}");
    }
    let error = refused(dir.path(), "decrypt @/in @/out --format raw --volume-key file:@/key");
    assert!(error.to_string().contains("is an option of LUKS"), "{error}");
}

#[test]
fn header_and_data_need_places_of_their_own() {
    let dir = tempfile::tempdir().expect("dir");
    for header in ["@/in", "@/out", "@/../{}/out", "-"] {
        let own = dir.path().file_name().and_then(|name| name.to_str()).expect("UTF-8");
        let header = header.replace("{}", own);
        refused(dir.path(), &format!("encrypt @/in @/out --key file:@/key --header {header}"));
    }
    std::fs::write(dir.path().join("old"), "header").expect("write");
    let error = typed(dir.path(), "encrypt @/in @/out --key file:@/key --header @/old").err();
    assert!(error.expect("refused").to_string().contains("exists and is not empty"));
    assert!(typed(dir.path(), "encrypt @/in @/out --key file:@/key --header @/old --force").is_ok());
}

#[test]
fn a_newline_at_the_end_of_a_passphrase_is_told_of() {
    let dir = tempfile::tempdir().expect("dir");
    std::fs::write(dir.path().join("line"), "secret\n").expect("write");
    let words = "the newline is part of the key, as with cryptsetup --key-file";
    let new = typed(dir.path(), "encrypt @/in @/out --key file:@/line").unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(new.warnings.iter().filter(|warning| warning.contains(words)).count(), 1);
    let old = typed(dir.path(), "decrypt @/in @/out --key file:@/line").unwrap_or_else(|e| panic!("{e}"));
    assert!(!old.warnings.iter().any(|warning| warning.contains(words)), "a key that fits needs no remark");
    assert!(old.doubt.expect("one that does not").contains(words));
    let raw = typed(dir.path(), "decrypt @/in @/out --format raw --key file:@/key");
    assert!(raw.unwrap_or_else(|e| panic!("{e}")).doubt.is_none());
}

#[test]
fn a_key_typed_in_place_of_a_reference_is_not_repeated() {
    let dir = tempfile::tempdir().expect("dir");
    let error =
        typed(dir.path(), "encrypt @/in @/out --format raw --key 0123456789abcdef").err().expect("refused");
    assert_eq!(error.exit as u8, 2);
    assert!(!error.to_string().contains("0123"), "{error}");
}

#[test]
fn one_stream_cannot_carry_two_things() {
    let dir = tempfile::tempdir().expect("dir");
    for args in [
        "encrypt - @/out --format raw --key fd:0",
        "verify - - --format raw --key file:@/key",
        "verify @/in - --format raw --key fd:0",
        "encrypt - @/out --key file:@/key --volume-key fd:0",
        "decrypt - @/out --volume-key fd:0",
    ] {
        assert!(
            typed(dir.path(), args).err().expect("refused").to_string().contains("standard input"),
            "{args}"
        );
    }
}
