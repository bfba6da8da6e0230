//! Whole jobs on LUKS volumes through the registry: header and data together, on every kind of end.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::backend::QueueChoice;
use engine::crypto::kdf::{Argon2Kind, Kdf};
use engine::job::Registry;
use proto::luks::{KdfKind, KdfWish, New, NewFile, Open, Version};
use proto::{Action, Commit, ErrorKind, Format, JobState};
use tests::Scratch;
use tests::jobs::{
    MIB, QUEUES, Request, assert_done, encrypted, failure, key_bytes, key_fd, new_luks, noise, registry,
    wait, wait_for,
};

const PASS: &[u8] = b"correct horse";

fn make(new: New) -> Request {
    Request::luks(Action::Encrypt, Format::NewLuks(Box::new(new)), PASS)
}

fn open(action: Action) -> Request {
    Request::luks(action, Format::Luks(Open::default()), PASS)
}

/// The volume formats with their data offset and unit.
const FORMATS: [(Version, Option<u32>, u64, u32); 3] = [
    (Version::Luks1, None, 2 << 20, 512),
    (Version::Luks2, Some(512), 16 << 20, 512),
    (Version::Luks2, None, 16 << 20, 4096),
];

fn volume(registry: &Arc<Registry>, scratch: &Scratch, plain: &[u8], new: New) -> std::path::PathBuf {
    let source = scratch.file("plain", plain);
    let path = scratch.join("volume");
    assert_done(&make(new).reading(&source).creating(&path).run(registry));
    path
}

#[test]
fn files_round_trip_in_every_format() {
    for queue in QUEUES {
        let registry = registry(queue);
        for (version, unit, offset, unit_bytes) in FORMATS {
            for units in [0_usize, 1, 255, 5000] {
                let scratch = Scratch::new();
                let plain = noise(units * unit_bytes as usize, 5 + units as u64);
                let path = volume(&registry, &scratch, &plain, new_luks(version, unit));
                assert_eq!(std::fs::metadata(&path).expect("made").len(), offset + plain.len() as u64);
                let back = scratch.join("back");
                let info = open(Action::Decrypt).reading(&path).creating(&back).run(&registry);
                assert_done(&info);
                assert_eq!(info.progress.total_bytes, Some(plain.len() as u64));
                assert!(std::fs::read(&back).expect("plaintext") == plain, "{version:?} {units}");
                let verify = open(Action::Verify).reading(&scratch.join("plain"));
                assert_done(&verify.writing(File::open(&path).expect("open"), "volume").run(&registry));
            }
        }
    }
}

#[test]
fn a_volume_key_of_ones_own_gives_the_ciphertext_of_a_raw_volume() {
    let registry = registry(QueueChoice::Auto);
    for (version, unit, offset, unit_bytes) in FORMATS {
        let scratch = Scratch::new();
        let plain = noise(3 * MIB, 9);
        let source = scratch.file("plain", &plain);
        let path = scratch.join("volume");
        let mut request = make(new_luks(version, unit)).reading(&source).creating(&path);
        let fd = request.send(key_fd(&key_bytes()));
        let Some(proto::Volume { format: Format::NewLuks(new), .. }) = &mut request.submit.volume else {
            panic!("a new volume")
        };
        new.volume_key_fd = Some(fd);
        assert_done(&request.run(&registry));
        let stored = std::fs::read(&path).expect("volume");
        assert!(stored[usize::try_from(offset).expect("small")..] == encrypted(&plain, unit_bytes));
        // And the key opens it without a passphrase.
        let format = Format::Luks(Open { secret: proto::luks::Secret::VolumeKey, ..Open::default() });
        let back = scratch.join("back");
        let request = Request::luks(Action::Decrypt, format, &key_bytes());
        assert_done(&request.reading(&path).creating(&back).run(&registry));
        assert!(std::fs::read(&back).expect("plaintext") == plain);
    }
}

#[test]
fn a_wrong_passphrase_leaves_no_file_and_one_phrase() {
    let registry = registry(QueueChoice::Auto);
    for (version, unit, ..) in FORMATS {
        let scratch = Scratch::new();
        let path = volume(&registry, &scratch, &noise(MIB, 1), new_luks(version, unit));
        let back = scratch.join("back");
        let request = Request::luks(Action::Decrypt, Format::Luks(Open::default()), b"wrong");
        let info = request.reading(&path).creating(&back).run(&registry);
        let (kind, message) = failure(&info);
        assert_eq!(kind, ErrorKind::WrongKey);
        assert!(message.starts_with("wrong key or damaged data"), "{message}");
        assert!(!back.exists() && !scratch.join("back.partial").exists());
    }
}

/// Both ends of a pipe, the writing one fed by a thread.
fn fed(bytes: Vec<u8>) -> OwnedFd {
    let (read, write) = rustix::pipe::pipe().expect("pipe");
    std::thread::spawn(move || {
        // The reader may have had enough.
        let _ = File::from(write).write_all(&bytes);
    });
    read
}

fn drained(read: OwnedFd) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        File::from(read).read_to_end(&mut bytes).expect("read");
        bytes
    })
}

#[test]
fn pipes_carry_header_and_data_in_order() {
    let registry = registry(QueueChoice::Auto);
    for (version, unit, offset, unit_bytes) in FORMATS {
        for len in [0, unit_bytes as usize, 5 * MIB] {
            let plain = noise(len, 4);
            let (read, write) = rustix::pipe::pipe().expect("pipe");
            let out = drained(read);
            let request =
                make(new_luks(version, unit)).streaming_from(fed(plain.clone())).streaming_to(write);
            assert_done(&request.run(&registry));
            let volume = out.join().expect("drained");
            assert_eq!(volume.len() as u64, offset + plain.len() as u64);

            let (read, write) = rustix::pipe::pipe().expect("pipe");
            let out = drained(read);
            let request = open(Action::Decrypt).streaming_from(fed(volume.clone())).streaming_to(write);
            assert_done(&request.run(&registry));
            assert!(out.join().expect("drained") == plain, "{version:?} {len}");

            let scratch = Scratch::new();
            let source = scratch.file("plain", &plain);
            let request = open(Action::Verify).reading(&source).streaming_to(fed(volume));
            assert_done(&request.run(&registry));
        }
    }
}

#[test]
fn a_stream_that_is_no_volume_or_ends_inside_the_header_is_refused() {
    let registry = registry(QueueChoice::Auto);
    let scratch = Scratch::new();
    let path = volume(&registry, &scratch, &noise(MIB, 2), new_luks(Version::Luks2, None));
    let whole = std::fs::read(path).expect("volume");
    for (bytes, kind, words) in [
        (noise(20 * MIB, 3), ErrorKind::Unsupported, "LUKS"),
        (noise(100, 3), ErrorKind::Unsupported, "not a LUKS volume"),
        (whole[..100].to_vec(), ErrorKind::Damaged, "LUKS"),
        (whole[..5000].to_vec(), ErrorKind::Damaged, "inside the header"),
        (whole[..10 * MIB].to_vec(), ErrorKind::Damaged, "inside the header"),
    ] {
        let (read, write) = rustix::pipe::pipe().expect("pipe");
        let out = drained(read);
        let info = open(Action::Decrypt).streaming_from(fed(bytes)).streaming_to(write).run(&registry);
        assert_eq!(info.state, JobState::Failed);
        let (found, message) = failure(&info);
        assert!(found == kind && message.contains(words), "{found:?} {message}");
        assert!(out.join().expect("drained").is_empty(), "nothing came out");
    }
}

#[test]
fn a_cancelled_job_does_not_wait_for_a_header_that_never_comes() {
    let registry = registry(QueueChoice::Auto);
    let (read, _silent) = rustix::pipe::pipe().expect("pipe");
    let scratch = Scratch::new();
    let back = scratch.join("back");
    let job = open(Action::Decrypt).streaming_from(read).creating(&back).start(&registry).expect("accepted");
    tests::jobs::wait_for(&registry, job, "running", |info| info.state == JobState::Running);
    registry.cancel(job).expect("cancelled");
    let info = tests::jobs::wait(&registry, job);
    assert_eq!(info.state, JobState::Cancelled);
    assert!(!scratch.join("back.partial").exists());
}

fn detached(request: &mut Request, path: &Path) -> NewFile {
    let name = path.file_name().expect("name").to_str().expect("UTF-8").to_owned();
    let partial = format!("{name}.partial");
    let directory = path.parent().expect("directory");
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(directory.join(&partial))
        .expect("partial header");
    let fd = request.send(file);
    let dir_fd = request.send(File::open(directory).expect("directory"));
    let commit = Some(Commit { dir_fd, partial, name, replace: false, keep_partial: false });
    NewFile { fd, name: path.display().to_string(), commit }
}

#[test]
fn a_detached_header_leaves_nothing_but_ciphertext_on_the_data_device() {
    let registry = registry(QueueChoice::Auto);
    for (version, unit, _, unit_bytes) in FORMATS {
        let scratch = Scratch::new();
        let plain = noise(2 * MIB, 6);
        let source = scratch.file("plain", &plain);
        let (path, header) = (scratch.join("volume"), scratch.join("header"));
        let mut request = make(new_luks(version, unit)).reading(&source).creating(&path);
        let file = detached(&mut request, &header);
        let key = request.send(key_fd(&key_bytes()));
        let Some(proto::Volume { format: Format::NewLuks(new), .. }) = &mut request.submit.volume else {
            panic!("a new volume")
        };
        (new.header, new.volume_key_fd) = (Some(file), Some(key));
        assert_done(&request.run(&registry));
        assert!(std::fs::read(&path).expect("data") == encrypted(&plain, unit_bytes));
        assert!(!scratch.join("header.partial").exists());

        let back = scratch.join("back");
        let mut request = open(Action::Decrypt).reading(&path).creating(&back);
        let fd = request.send(File::open(&header).expect("header"));
        request.submit.volume.as_mut().expect("volume").format = Format::Luks(Open {
            header: Some(proto::luks::File { fd, name: "header".into() }),
            ..Open::default()
        });
        assert_done(&request.run(&registry));
        assert!(std::fs::read(&back).expect("plaintext") == plain);
        // The header alone is no volume, from a file or a stream.
        let alone = open(Action::Decrypt).reading(&header).creating(&scratch.join("y")).refused(&registry);
        assert_eq!(alone.0, ErrorKind::Invalid);
        assert!(alone.1.contains("detached header"), "{}", alone.1);
        let bytes = std::fs::read(&header).expect("header");
        let (read, write) = rustix::pipe::pipe().expect("pipe");
        let out = drained(read);
        let info = open(Action::Decrypt).streaming_from(fed(bytes)).streaming_to(write).run(&registry);
        assert!(failure(&info).1.contains("detached header"));
        assert!(out.join().expect("drained").is_empty());
        // Without the header the data is noise.
        let (kind, message) =
            open(Action::Decrypt).reading(&path).creating(&scratch.join("x")).refused(&registry);
        assert_eq!(kind, ErrorKind::Unsupported, "{message}");
    }
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_written() {
    let registry = registry(QueueChoice::Auto);
    let scratch = Scratch::new();
    let plain = scratch.file("plain", &noise(1000, 6));
    let (kind, message) =
        make(new_luks(Version::Luks2, None)).reading(&plain).creating(&scratch.join("a")).refused(&registry);
    assert_eq!(kind, ErrorKind::Invalid);
    assert!(message.contains("1000 bytes is not a multiple"), "{message}");
    let bad = [
        New { data_unit: Some(4096), ..new_luks(Version::Luks1, None) },
        New { data_unit: Some(300), ..new_luks(Version::Luks2, None) },
        New { key_bytes: Some(48), ..new_luks(Version::Luks2, None) },
        New { cipher: Some("aes-cbc-essiv:sha256".into()), ..new_luks(Version::Luks2, None) },
        New { cipher: Some("serpent-xts-plain64".into()), ..new_luks(Version::Luks2, None) },
        New { uuid: Some("not a uuid".into()), ..new_luks(Version::Luks2, None) },
        New { label: Some("x".repeat(48)), ..new_luks(Version::Luks2, None) },
        New { label: Some("x".into()), ..new_luks(Version::Luks1, None) },
        New { data_offset: Some(4096), ..new_luks(Version::Luks2, None) },
        New { hash: Some("md5".into()), ..new_luks(Version::Luks2, None) },
        New {
            kdf: KdfWish { iterations: Some(10), ..new_luks(Version::Luks2, None).kdf },
            ..new_luks(Version::Luks2, None)
        },
    ];
    let whole = scratch.file("whole", &noise(4096, 6));
    for (index, new) in bad.into_iter().enumerate() {
        let sink = scratch.join(&format!("volume{index}"));
        let shown = format!("{new:?}");
        let error = make(new).reading(&whole).creating(&sink).start(&registry).expect_err(&shown);
        let (kind, message) = (error.kind(), error.chain());
        assert!(matches!(kind, ErrorKind::Invalid | ErrorKind::Unsupported), "{shown}: {message}");
        assert!(!sink.exists());
    }
}

#[test]
fn a_volume_cut_off_is_refused() {
    let registry = registry(QueueChoice::Auto);
    let scratch = Scratch::new();
    let path = volume(&registry, &scratch, &noise(MIB, 8), new_luks(Version::Luks2, None));
    let file = File::options().write(true).open(&path).expect("open");
    for (len, words) in [((16 << 20) + 5000, "not a multiple of the data unit"), (15 << 20, "ends before")] {
        file.set_len(len).expect("cut");
        let (kind, message) =
            open(Action::Decrypt).reading(&path).creating(&scratch.join(&len.to_string())).refused(&registry);
        assert_eq!(kind, ErrorKind::Damaged);
        assert!(message.contains(words), "{message}");
    }
}

#[test]
fn a_source_that_is_hardly_what_was_meant_is_warned_of() {
    let registry = registry(QueueChoice::Auto);
    let scratch = Scratch::new();
    let warnings = |request: Request| {
        let (job, warnings) =
            registry.submit(&tests::jobs::me(), request.submit, request.descriptors).expect("accepted");
        assert_done(&tests::jobs::wait(&registry, job));
        warnings
    };
    // A header backup: nothing comes out.
    let path = volume(&registry, &scratch, &noise(MIB, 2), new_luks(Version::Luks2, None));
    let whole = std::fs::read(&path).expect("volume");
    let backup = scratch.file("backup", &whole[..16 << 20]);
    let said = warnings(open(Action::Decrypt).reading(&backup).creating(&scratch.join("nothing")));
    assert!(said.iter().any(|warning| warning.contains("has no data")), "{said:?}");
    let said = warnings(open(Action::Decrypt).reading(&path).creating(&scratch.join("back")));
    assert!(!said.iter().any(|warning| warning.contains("no data")), "{said:?}");
    // The header of another volume, and the volume's own in a file beside it.
    let other = Scratch::new();
    let another = volume(&registry, &other, &noise(MIB, 3), new_luks(Version::Luks2, None));
    for (header, name, warned) in [(&another, "a", true), (&path, "b", false)] {
        let mut request = open(Action::Decrypt).reading(&path).creating(&scratch.join(name));
        let fd = request.send(File::open(header).expect("header"));
        request.submit.volume.as_mut().expect("volume").format = Format::Luks(Open {
            header: Some(proto::luks::File { fd, name: "header".into() }),
            ..Open::default()
        });
        let said = warnings(request);
        assert_eq!(said.iter().any(|warning| warning.contains("another UUID")), warned, "{said:?}");
    }
}

#[test]
fn verification_finds_a_difference_at_its_place_in_the_plaintext() {
    let registry = registry(QueueChoice::Auto);
    for (version, unit, offset, unit_bytes) in FORMATS {
        let scratch = Scratch::new();
        let plain = noise(4 * MIB, 8);
        let path = volume(&registry, &scratch, &plain, new_luks(version, unit));
        let file = File::options().read(true).write(true).open(&path).expect("open");
        let at = 3 * MIB as u64 + 100;
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset + at).expect("read");
        file.write_all_at(&[byte[0] ^ 1], offset + at).expect("written");
        let request = open(Action::Verify).reading(&scratch.join("plain"));
        let info = request.writing(File::open(&path).expect("open"), "volume").run(&registry);
        assert_eq!(failure(&info).0, ErrorKind::Difference);
        let found = info.outcome.expect("ended").first_difference.expect("found");
        assert!((at / 16 * 16..=at).contains(&found), "{found} for {at} in units of {unit_bytes}");
        // A volume with more in it than the plaintext differs where that ends.
        file.write_all_at(&byte, offset + at).expect("mended");
        (&file).seek(SeekFrom::End(0)).expect("end");
        (&file).write_all(&[7; 4096]).expect("grown");
        let request = open(Action::Verify).reading(&scratch.join("plain"));
        let info = request.writing(File::open(&path).expect("open"), "volume").run(&registry);
        assert_eq!(info.outcome.expect("ended").first_difference, Some(plain.len() as u64));
    }
}

#[test]
fn a_header_gets_its_name_after_its_data_and_not_without_it() {
    let registry = registry(QueueChoice::Auto);
    let scratch = Scratch::new();
    let source = scratch.file("plain", &noise(4 * MIB, 6));
    let (path, header) = (scratch.join("volume"), scratch.join("header"));
    let mut request = make(new_luks(Version::Luks2, None)).reading(&source).creating(&path).rate(4 << 20);
    let file = detached(&mut request, &header);
    let Some(proto::Volume { format: Format::NewLuks(new), .. }) = &mut request.submit.volume else {
        panic!("a new volume")
    };
    new.header = Some(file);
    let job = request.start(&registry).expect("accepted");
    tests::jobs::wait_for(&registry, job, "running", |info| info.state == JobState::Running);
    // Somebody takes the sink's name meanwhile: the job must fail at its very end.
    std::fs::write(&path, "taken").expect("written");
    let info = tests::jobs::wait(&registry, job);
    assert_eq!(failure(&info).0, ErrorKind::Conflict);
    assert!(!header.exists() && !scratch.join("header.partial").exists(), "no header to nothing");
    assert_eq!(std::fs::read(&path).expect("theirs"), b"taken");
}

/// The same volume, saying itself where its data ends.
fn with_fixed_size(volume: &mut [u8], size: u64) {
    use engine::format::luks2::{Copy, load};
    let bytes = volume.to_vec();
    let loaded = load(&mut |offset, into| {
        let start = usize::try_from(offset).expect("small");
        match bytes.get(start..start + into.len()) {
            Some(found) => into.copy_from_slice(found),
            None => return Err(engine::error::Error::new(ErrorKind::Invalid, "beyond the end")),
        }
        Ok(())
    });
    let mut header = loaded.expect("a header").header;
    header.metadata.segments.get_mut(&0).expect("segment 0").size = Some(size);
    for copy in [Copy::Primary, Copy::Secondary] {
        let bytes = header.to_bytes(copy).expect("a valid header");
        let start = usize::try_from(header.offset(copy)).expect("small");
        volume[start..start + bytes.len()].copy_from_slice(&bytes);
    }
}

#[test]
fn a_volume_that_says_where_it_ends_is_compared_to_there_and_no_further() {
    let registry = registry(QueueChoice::Auto);
    let scratch = Scratch::new();
    let plain = noise(2 * MIB, 3);
    let path = volume(&registry, &scratch, &plain, new_luks(Version::Luks2, None));
    let mut bytes = std::fs::read(path).expect("volume");
    with_fixed_size(&mut bytes, MIB as u64);
    let fixed = scratch.file("fixed", &bytes);
    let back = scratch.join("back");
    assert_done(&open(Action::Decrypt).reading(&fixed).creating(&back).run(&registry));
    assert!(std::fs::read(&back).expect("plaintext") == plain[..MIB]);
    let (read, write) = rustix::pipe::pipe().expect("pipe");
    let out = drained(read);
    assert_done(&open(Action::Decrypt).streaming_from(fed(bytes.clone())).streaming_to(write).run(&registry));
    assert!(out.join().expect("drained") == plain[..MIB]);

    let half = scratch.file("half", &plain[..MIB]);
    for (source, stream, equal) in [
        (&half, false, true),
        (&half, true, true),
        (&scratch.join("plain"), false, false),
        (&scratch.join("plain"), true, false),
    ] {
        for volume_streams in [false, true] {
            let mut request = open(Action::Verify);
            request = if stream {
                request.streaming_from(fed(std::fs::read(source).expect("plain")))
            } else {
                request.reading(source)
            };
            request = if volume_streams {
                request.streaming_to(fed(bytes.clone()))
            } else {
                request.writing(File::open(&fixed).expect("open"), "fixed")
            };
            let info = request.run(&registry);
            let found = info.outcome.as_ref().and_then(|outcome| outcome.first_difference);
            assert_eq!(found, (!equal).then_some(MIB as u64), "{stream} {volume_streams} {:?}", info.outcome);
        }
    }
}

#[test]
fn a_paused_job_neither_hashes_nor_writes() {
    let registry = registry(QueueChoice::Auto);
    let scratch = Scratch::new();
    let source = scratch.file("plain", &noise(MIB, 6));
    let (hold, silent) = rustix::pipe::pipe().expect("pipe");
    // Its header never comes until it is let go.
    let path = volume(&registry, &scratch, &noise(MIB, 6), new_luks(Version::Luks2, None));
    let back = scratch.join("back");
    let job = open(Action::Decrypt).streaming_from(hold).creating(&back).start(&registry).expect("accepted");
    registry.pause(job).expect("paused");
    let bytes = std::fs::read(&path).expect("volume");
    let feeder = std::thread::spawn(move || File::from(silent).write_all(&bytes));
    std::thread::sleep(std::time::Duration::from_millis(300));
    let info = registry.show(job).expect("known");
    assert_eq!((info.state, info.progress.done_bytes), (JobState::Paused, 0));
    registry.resume(job).expect("resumed");
    assert_done(&tests::jobs::wait(&registry, job));
    feeder.join().expect("feeder").expect("all of it was taken");
    assert!(std::fs::read(&back).expect("plaintext") == std::fs::read(source).expect("plain"));
}

/// A derivation that takes some seconds, running on a thread of its own: argon2 by anybody else waits for it.
fn long_derivation() -> std::thread::JoinHandle<()> {
    let cost = |time| Kdf::Argon2 { kind: Argon2Kind::Argon2id, time, memory_kib: 32 << 10, lanes: 1 };
    let pass = cost(1).estimate(64).expect("memory").as_secs_f64();
    let time = (1..=10_000).find(|&time| f64::from(time) * pass >= 6.0).expect("no machine is so fast");
    let holder = std::thread::spawn(move || {
        cost(time).derive(b"of another", &[9; 16], &mut [0; 64]).expect("derives");
    });
    // Long enough for it to begin, and a small part of what it takes.
    std::thread::sleep(Duration::from_millis(300));
    holder
}

#[test]
fn a_job_whose_passphrase_waits_for_anothers_derivation_is_cancelled_at_once() {
    let registry = registry(QueueChoice::Auto);
    let scratch = Scratch::new();
    let argon2 = || {
        let kdf = KdfWish {
            kind: Some(KdfKind::Argon2id),
            iterations: Some(4),
            memory_kib: Some(32),
            lanes: Some(1),
            ..KdfWish::default()
        };
        New { kdf, ..new_luks(Version::Luks2, None) }
    };
    let path = volume(&registry, &scratch, &noise(MIB, 3), argon2());
    let plain = scratch.join("plain");
    let holder = long_derivation();
    let jobs = [
        open(Action::Decrypt).reading(&path).creating(&scratch.join("back")),
        make(argon2()).reading(&plain).creating(&scratch.join("other")),
        make(New { kdf: KdfWish::default(), ..argon2() }).reading(&plain).creating(&scratch.join("third")),
    ]
    .map(|request| request.start(&registry).expect("accepted"));
    for job in jobs {
        wait_for(&registry, job, "its turn", |info| info.state == JobState::Running);
    }
    std::thread::sleep(Duration::from_millis(200));
    let cancelled = Instant::now();
    for job in jobs {
        registry.cancel(job).expect("can be cancelled");
    }
    for job in jobs {
        let info = wait(&registry, job);
        assert_eq!(info.state, JobState::Cancelled, "{:?}", info.outcome);
    }
    let took = cancelled.elapsed();
    assert!(!holder.is_finished(), "they waited for the derivation: {took:?}");
    assert!(took < Duration::from_secs(1), "{took:?}");
    holder.join().expect("the derivation they waited for");
    for name in ["back", "other", "third"] {
        assert!(!scratch.join(name).exists() && !scratch.join(&format!("{name}.partial")).exists());
    }
    // And the volume opens as ever.
    assert_done(&open(Action::Decrypt).reading(&path).creating(&scratch.join("back")).run(&registry));
}
