//! Whole jobs through the registry: every pairing of ends moves the right bytes, or says why not.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use engine::backend::QueueChoice;
use proto::{Action, ErrorKind};
use tests::Scratch;
use tests::jobs::{MIB, QUEUES, Request, assert_done, encrypted, failure, noise, registry, wait};

#[test]
fn files_round_trip_at_every_size() {
    for queue in QUEUES {
        let registry = registry(queue);
        for unit in [512_u32, 4096] {
            for units in [0_usize, 1, 3, 255, 2048, 2049, 10_000] {
                let scratch = Scratch::new();
                let plain = noise(units * unit as usize, 7 + units as u64);
                let source = scratch.file("plain", &plain);
                let (volume, back) = (scratch.join("volume"), scratch.join("back"));
                let info =
                    Request::new(Action::Encrypt, unit).reading(&source).creating(&volume).run(&registry);
                assert_done(&info);
                assert_eq!(info.progress.done_bytes, plain.len() as u64);
                let stored = std::fs::read(&volume).expect("the volume");
                assert!(
                    stored == encrypted(&plain, unit),
                    "{queue:?}, {units} units of {unit}: wrong ciphertext"
                );
                assert!(!scratch.join("volume.partial").exists());
                assert_done(
                    &Request::new(Action::Decrypt, unit).reading(&volume).creating(&back).run(&registry),
                );
                assert!(std::fs::read(&back).expect("the plaintext") == plain, "{units} units of {unit}");
                let verify = Request::new(Action::Verify, unit).reading(&source);
                assert_done(&verify.writing(File::open(&volume).expect("open"), "volume").run(&registry));
            }
        }
    }
}

#[test]
fn buffered_files_round_trip_too() {
    let registry = registry(QueueChoice::IoUring);
    let scratch = Scratch::new();
    let plain = noise(5 * MIB + 512, 3);
    let source = scratch.file("plain", &plain);
    let volume = scratch.join("volume");
    let request = Request::new(Action::Encrypt, 512).reading(&source).creating(&volume);
    assert_done(&request.tuned(|tuning| tuning.direct = Some(false)).run(&registry));
    assert!(std::fs::read(&volume).expect("the volume") == encrypted(&plain, 512));
}

#[test]
fn pipes_keep_their_order_and_need_no_length() {
    for queue in QUEUES {
        let registry = registry(queue);
        for len in [0, 512, MIB, 7 * MIB + 1024] {
            let plain = noise(len, 99);
            let (source, mut feed) = std::io::pipe().expect("pipe");
            let (mut drain, sink) = std::io::pipe().expect("pipe");
            let request = Request::new(Action::Encrypt, 512).streaming_from(source).streaming_to(sink);
            let job = request.start(&registry).expect("accepted");
            let input = plain.clone();
            let feeder = std::thread::spawn(move || {
                // Odd pieces, so that reads come back short.
                for piece in input.chunks(77_777) {
                    feed.write_all(piece).expect("feed");
                }
            });
            let mut output = Vec::new();
            drain.read_to_end(&mut output).expect("drain");
            feeder.join().expect("feeder");
            let info = wait(&registry, job);
            assert_done(&info);
            assert_eq!(info.progress.total_bytes, None);
            assert!(output == encrypted(&plain, 512), "{queue:?}, {len} bytes");
        }
    }
}

#[test]
fn a_pipe_can_feed_a_file_and_a_file_a_pipe() {
    let registry = registry(QueueChoice::IoUring);
    let scratch = Scratch::new();
    let plain = noise(9 * MIB + 4096, 5);
    let (source, mut feed) = std::io::pipe().expect("pipe");
    let volume = scratch.join("volume");
    let job = Request::new(Action::Encrypt, 4096)
        .streaming_from(source)
        .creating(&volume)
        .start(&registry)
        .expect("ok");
    feed.write_all(&plain).expect("feed");
    drop(feed);
    assert_done(&wait(&registry, job));
    assert!(std::fs::read(&volume).expect("volume") == encrypted(&plain, 4096));

    let (mut drain, sink) = std::io::pipe().expect("pipe");
    let job =
        Request::new(Action::Decrypt, 4096).reading(&volume).streaming_to(sink).start(&registry).expect("ok");
    let mut back = Vec::new();
    drain.read_to_end(&mut back).expect("drain");
    assert_done(&wait(&registry, job));
    assert!(back == plain);
}

#[test]
fn an_odd_source_is_refused_with_both_numbers_or_padded() {
    let registry = registry(QueueChoice::IoUring);
    let scratch = Scratch::new();
    let plain = noise(3 * MIB + 1000, 8);
    let source = scratch.file("plain", &plain);
    let volume = scratch.join("volume");
    let request = Request::new(Action::Encrypt, 4096).reading(&source).creating(&volume);
    let (kind, message) = request.refused(&registry);
    assert_eq!(kind, ErrorKind::Invalid);
    assert!(message.contains("3146728 bytes") && message.contains("4096 bytes"), "{message}");
    std::fs::remove_file(scratch.join("volume.partial")).expect("the caller removes what it created");

    let request = Request::new(Action::Encrypt, 4096).reading(&source).creating(&volume);
    let info = request.tuned(|tuning| tuning.pad = true).run(&registry);
    assert_done(&info);
    assert_eq!(info.outcome.expect("outcome").padded_bytes, 4096 - 1000);
    assert!(std::fs::read(&volume).expect("volume") == encrypted(&plain, 4096));
    let verify = Request::new(Action::Verify, 4096).reading(&source).tuned(|tuning| tuning.pad = true);
    assert_done(&verify.writing(File::open(&volume).expect("open"), "volume").run(&registry));

    // The same from a pipe, where the length is only known at the end.
    let (source, mut feed) = std::io::pipe().expect("pipe");
    feed.write_all(&plain[..1000]).expect("feed");
    drop(feed);
    let other = scratch.join("other");
    let info = Request::new(Action::Encrypt, 4096).streaming_from(source).creating(&other).run(&registry);
    assert_eq!(failure(&info).0, ErrorKind::Invalid);
    assert!(!other.exists() && !scratch.join("other.partial").exists(), "nothing is left");
}

#[test]
fn verify_names_the_first_difference() {
    let registry = registry(QueueChoice::IoUring);
    let scratch = Scratch::new();
    let plain = noise(6 * MIB, 21);
    let source = scratch.file("plain", &plain);
    let stored = encrypted(&plain, 512);
    for at in [0, 511, 512, 3 * MIB + 17, 6 * MIB - 1] {
        let mut changed = plain.clone();
        changed[at] ^= 1;
        changed[6 * MIB - 1] ^= 1;
        let volume = scratch.file("volume", &encrypted(&changed, 512));
        let verify = Request::new(Action::Verify, 512).reading(&source);
        let info = verify.writing(File::open(volume).expect("open"), "volume").run(&registry);
        if at == 6 * MIB - 1 {
            assert_done(&info);
            continue;
        }
        assert_eq!(failure(&info).0, ErrorKind::Difference);
        assert_eq!(info.outcome.expect("outcome").first_difference, Some(at as u64));
    }
    // Longer and shorter.
    for (len, at) in [(stored.len() - 1024, stored.len() - 1024), (0, 0)] {
        let volume = scratch.file("volume", &stored[..len]);
        let verify = Request::new(Action::Verify, 512).reading(&source);
        let info = verify.writing(File::open(volume).expect("open"), "volume").run(&registry);
        assert_eq!(info.outcome.expect("outcome").first_difference, Some(at as u64), "{len}");
    }
    let longer = scratch.file("volume", &encrypted(&noise(6 * MIB + 512, 21), 512));
    let verify = Request::new(Action::Verify, 512).reading(&source);
    let info = verify.writing(File::open(longer).expect("open"), "volume").run(&registry);
    assert_eq!(info.outcome.expect("outcome").first_difference, Some(6 * MIB as u64));
}

#[test]
fn verify_reads_either_side_from_a_pipe() {
    let registry = registry(QueueChoice::IoUring);
    let scratch = Scratch::new();
    let plain = noise(5 * MIB + 512, 22);
    let source = scratch.file("plain", &plain);
    let stored = encrypted(&plain, 512);
    let feed = |bytes: Vec<u8>| {
        let (read, mut write) = std::io::pipe().expect("pipe");
        std::thread::spawn(move || {
            // The other side may leave early when a difference is found.
            let _ = write.write_all(&bytes);
        });
        read
    };
    let verify = |source: Option<&Path>, sink: Vec<u8>| {
        let request = Request::new(Action::Verify, 512);
        let request = match source {
            Some(path) => request.reading(path),
            None => request.streaming_from(feed(plain.clone())),
        };
        request.streaming_to(feed(sink)).run(&registry)
    };
    for side in [Some(source.as_path()), None] {
        assert_done(&verify(side, stored.clone()));
        let mut longer = stored.clone();
        longer.extend_from_slice(&[0; 512]);
        let info = verify(side, longer);
        assert_eq!(info.outcome.expect("outcome").first_difference, Some(plain.len() as u64), "longer");
        let info = verify(side, stored[..4 * MIB].to_vec());
        assert_eq!(info.outcome.expect("outcome").first_difference, Some(4 * MIB as u64), "shorter");
    }
}

#[test]
fn zero_plaintext_becomes_holes_and_source_holes_are_read_as_zeros() {
    let registry = registry(QueueChoice::IoUring);
    let scratch = Scratch::new();
    let mut plain = vec![0; 64 * MIB];
    plain[5 * MIB..6 * MIB].copy_from_slice(&noise(MIB, 1));
    plain[64 * MIB - 512..].copy_from_slice(&noise(512, 2));
    let source = scratch.join("plain");
    {
        let file = File::create(&source).expect("create");
        file.set_len(plain.len() as u64).expect("extend");
        file.write_all_at(&plain[5 * MIB..6 * MIB], 5 * MIB as u64).expect("write");
        file.write_all_at(&plain[64 * MIB - 512..], 64 * MIB as u64 - 512).expect("write");
    }
    let (volume, back) = (scratch.join("volume"), scratch.join("back"));
    let info = Request::new(Action::Encrypt, 512).reading(&source).creating(&volume).run(&registry);
    assert_done(&info);
    assert!(info.progress.hole_bytes >= 60 * MIB as u64, "{} bytes of holes", info.progress.hole_bytes);
    let stored = encrypted(&plain, 512);
    assert!(std::fs::read(&volume).expect("volume") == stored, "holes are encrypted like any zeros");
    let info = Request::new(Action::Decrypt, 512).reading(&volume).creating(&back).run(&registry);
    assert_done(&info);
    assert!(info.progress.sparse_bytes >= 60 * MIB as u64);
    assert!(std::fs::read(&back).expect("plaintext") == plain);
    assert!(back.metadata().expect("metadata").blocks() * 512 < 3 * MIB as u64, "the zeros take no room");

    let dense = scratch.join("dense");
    let request = Request::new(Action::Decrypt, 512).reading(&volume).creating(&dense);
    assert_done(&request.tuned(|tuning| tuning.sparse = Some(false)).run(&registry));
    assert!(dense.metadata().expect("metadata").blocks() * 512 >= 64 * MIB as u64);
}

#[test]
fn a_hole_in_ciphertext_is_not_zero_plaintext_unless_promised() {
    let registry = registry(QueueChoice::IoUring);
    let scratch = Scratch::new();
    let stored = encrypted(&noise(8 * MIB, 6), 4096);
    let volume = scratch.join("volume");
    {
        let file = File::create(&volume).expect("create");
        file.set_len(8 * MIB as u64).expect("extend");
        file.write_all_at(&stored[2 * MIB..2 * MIB + 65536], 2 * MIB as u64).expect("write");
    }
    let mut sparse = vec![0; 8 * MIB];
    sparse[2 * MIB..2 * MIB + 65536].copy_from_slice(&stored[2 * MIB..2 * MIB + 65536]);
    let plain = noise(8 * MIB, 6);
    let back = scratch.join("back");
    assert_done(&Request::new(Action::Decrypt, 4096).reading(&volume).creating(&back).run(&registry));
    let decrypted = std::fs::read(&back).expect("plaintext");
    assert!(decrypted[2 * MIB..2 * MIB + 65536] == plain[2 * MIB..2 * MIB + 65536]);
    assert!(decrypted[..4096] != [0; 4096], "zeros decrypt to something else");

    let kept = scratch.join("kept");
    let request = Request::new(Action::Decrypt, 4096).reading(&volume).creating(&kept);
    assert_done(&request.tuned(|tuning| tuning.keep_holes = true).run(&registry));
    let mut expected = vec![0; 8 * MIB];
    expected[2 * MIB..2 * MIB + 65536].copy_from_slice(&plain[2 * MIB..2 * MIB + 65536]);
    assert!(std::fs::read(&kept).expect("plaintext") == expected);
    let verify = Request::new(Action::Verify, 4096).reading(&kept).tuned(|tuning| tuning.keep_holes = true);
    assert_done(&verify.writing(File::open(&volume).expect("open"), "volume").run(&registry));
}

#[test]
fn a_full_sink_fails_clearly_and_leaves_nothing() {
    let registry = registry(QueueChoice::IoUring);
    // `/dev/full` refuses every write for want of room.
    let scratch = Scratch::new();
    let source = scratch.file("plain", &noise(MIB, 1));
    let full = OpenOptions::new().write(true).open("/dev/full").expect("open");
    let info = Request::new(Action::Encrypt, 512).reading(&source).streaming_to(full).run(&registry);
    assert_eq!(failure(&info).0, ErrorKind::NoSpace);
}

#[test]
fn a_reader_that_leaves_is_named() {
    for queue in QUEUES {
        let registry = registry(queue);
        let scratch = Scratch::new();
        let source = scratch.file("plain", &noise(8 * MIB, 1));
        let (drain, sink) = std::io::pipe().expect("pipe");
        let job = Request::new(Action::Decrypt, 512)
            .reading(&source)
            .streaming_to(sink)
            .start(&registry)
            .expect("ok");
        drop(drain);
        let (kind, message) = failure(&wait(&registry, job));
        assert_eq!(kind, ErrorKind::Io);
        assert!(message.contains("the reader has closed the pipe"), "{message}");
    }
}

#[test]
fn a_stream_that_outgrows_a_device_is_stopped_at_its_end() {
    let registry = registry(QueueChoice::IoUring);
    let Some(device) = tests::loop_device(2 * MIB as u64) else { return };
    let (source, mut feed) = std::io::pipe().expect("pipe");
    let sink = OpenOptions::new().read(true).write(true).open(device.path()).expect("open");
    let name = device.path().display().to_string();
    let job = Request::new(Action::Encrypt, 512)
        .streaming_from(source)
        .writing(sink, &name)
        .start(&registry)
        .expect("ok");
    // The daemon leaves the pipe when the sink is full.
    let _ = feed.write_all(&noise(5 * MIB, 1));
    drop(feed);
    let (kind, message) = failure(&wait(&registry, job));
    assert_eq!(kind, ErrorKind::NoSpace, "{message}");
    assert!(message.contains("it holds 2097152"), "{message}");
}

#[test]
fn block_devices_round_trip() {
    let registry = registry(QueueChoice::IoUring);
    let (Some(one), Some(two)) = (tests::loop_device(24 * MIB as u64), tests::loop_device(32 * MIB as u64))
    else {
        return;
    };
    let plain = noise(24 * MIB, 17);
    OpenOptions::new()
        .write(true)
        .open(one.path())
        .expect("open")
        .write_all(&plain)
        .expect("fill the device");
    let open = |path: &Path| OpenOptions::new().read(true).write(true).open(path).expect("open");
    let encrypt = Request::new(Action::Encrypt, 4096).reading(one.path());
    assert_done(&encrypt.writing(open(two.path()), "two").run(&registry));
    let mut stored = vec![0; 24 * MIB];
    let mut file = File::open(two.path()).expect("open");
    file.rewind().expect("rewind");
    file.read_exact(&mut stored).expect("read");
    assert!(stored == encrypted(&plain, 4096));
    let verify = Request::new(Action::Verify, 4096).reading(one.path());
    assert_done(&verify.writing(open(two.path()), "two").run(&registry));
    let (kind, message) = Request::new(Action::Encrypt, 4096)
        .reading(two.path())
        .writing(open(one.path()), "one")
        .refused(&registry);
    assert_eq!(kind, ErrorKind::NoSpace);
    assert!(message.contains("33554432") && message.contains("25165824"), "{message}");
}
