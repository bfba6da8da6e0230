//! The real programs from end to end: what is typed, what comes out, what is said, and the exit code.
//!
//! Each test runs as whoever runs the tests and, where that is root, once more as nobody.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::process::Stdio;
use std::time::Duration;

use engine::crypto::{Kernel, Layout, VolumeKey, cipher};
use engine::units::DataUnit;
use proto::{Body, Event, JobState, Reply, TweakKind};
use rustix::process::Signal;
use tests::{NOBODY, Place, Start, User, as_each_user, eventually, is_root, skip};

const MIB: usize = 1 << 20;

/// What the oracle makes of it.
fn encrypted(key: &[u8], plain: &[u8], layout: Layout) -> Vec<u8> {
    let mut bytes = plain.to_vec();
    let key = VolumeKey::new(key).expect("key");
    cipher(Kernel::Portable, &key, layout).expect("cipher").encrypt(DataUnit(0), &mut bytes);
    bytes
}

fn layout(unit_bytes: u32) -> Layout {
    Layout { unit_bytes, kind: TweakKind::Plain64, large: false, offset_sectors: 0 }
}

#[test]
fn files_go_there_and_back_in_every_layout() {
    as_each_user(|user| {
        let place = Place::new(user);
        let plain = place.noise("plain", 5 * MIB + 8 * 4096);
        let base = layout(512);
        for (flags, key, layout) in [
            ("RAW", 64, base),
            ("RAW256", 32, base),
            ("RAW --sector-size 1024", 64, Layout { unit_bytes: 1024, ..base }),
            ("RAW --sector-size 4096", 64, Layout { unit_bytes: 4096, ..base }),
            ("RAW256 --sector-size 4096", 32, Layout { unit_bytes: 4096, ..base }),
            (
                "RAW --sector-size 4096 --iv-large-sectors --iv-offset 80",
                64,
                Layout { unit_bytes: 4096, large: true, offset_sectors: 80, ..base },
            ),
            ("RAW --iv plain", 64, Layout { kind: TweakKind::Plain, ..base }),
            (
                "RAW --iv plain --iv-offset 4294967290",
                64,
                Layout { kind: TweakKind::Plain, offset_sectors: 4_294_967_290, ..base },
            ),
            ("RAW --iv-offset 4294967290", 64, Layout { offset_sectors: 4_294_967_290, ..base }),
        ] {
            let _ = place.run(&format!("encrypt @/plain @/volume --force {flags}")).done();
            assert!(place.read("volume") == encrypted(&place.key(key), &plain, layout), "{flags}");
            let _ = place.run(&format!("verify @/plain @/volume {flags}")).done();
            let _ = place.run(&format!("decrypt @/volume @/back --force {flags}")).done();
            assert!(place.read("back") == plain, "{flags}");
        }
        assert_eq!(place.names(), ["back", "plain", "volume"]);
        assert_eq!(place.path("back").metadata().expect("there").mode() & 0o077, 0, "plaintext is private");
    });
}

#[test]
fn the_first_job_starts_a_daemon_and_the_second_finds_it() {
    as_each_user(|user| {
        let place = Place::bare(user);
        let plain = place.noise("plain", MIB);
        let _ = place.run("encrypt @/plain @/volume RAW --no-start").exit(3, &["no daemon answers", "hint:"]);
        assert_eq!(place.names(), ["plain"]);
        let _ = place.run("encrypt @/plain @/volume RAW").done();
        let first = place.status().hello.pid;
        let _ = place.run("decrypt @/volume @/back RAW").done();
        assert!(place.read("back") == plain);
        assert_eq!(place.status().hello.pid, first);
        let _ = place.run("daemon stop").done();
        let _ = place.run("daemon status").exit(3, &["no daemon answers"]);
    });
}

#[test]
fn a_difference_is_found_named_and_told_by_its_own_exit_code() {
    let place = Place::new(User::Me);
    let _ = place.noise("plain", 3 * MIB);
    let _ = place.run("encrypt @/plain @/volume RAW").done();
    let mut volume = place.read("volume");
    volume[2 * MIB + 512 * 7 + 3] ^= 1;
    place.write("volume", &volume);
    let at = (2 * MIB + 512 * 7).to_string();
    let ran = place.run("verify @/plain @/volume RAW --json").exit(5, &["differs", "byte"]);
    let told = ran.lines().iter().any(|line| match &line.body {
        Body::Event(Event::Finished(info)) => {
            let first = info.outcome.as_ref().and_then(|outcome| outcome.first_difference);
            // One changed bit garbles the 16-byte block it is in and no other.
            first.is_some_and(|first| first.to_string() == at)
        }
        _ => false,
    });
    assert!(told, "{}", ran.text());
    assert_eq!(place.read("volume"), volume, "verify changes nothing");
}

#[test]
fn events_and_answers_are_wire_objects() {
    let place = Place::new(User::Me);
    let _ = place.noise("plain", 4 * MIB);
    let lines = place.run("encrypt @/plain @/volume RAW --json").done().lines();
    assert!(matches!(lines[0].body, Body::Ok(Reply::Submitted { job: 1, .. })), "{:?}", lines[0]);
    let Some(Body::Event(Event::Finished(info))) = lines.last().map(|line| line.body.clone()) else {
        panic!("no end: {lines:?}")
    };
    assert_eq!((info.state, info.progress.done_bytes), (JobState::Done, 4 << 20));
    let jobs = place.jobs();
    assert_eq!((jobs.len(), jobs[0].job, jobs[0].state), (1, 1, JobState::Done));
    let Reply::Job(shown) = place.answer("job show 1 --json") else { panic!("no job") };
    assert_eq!(*shown, jobs[0]);
    for words in ["stats --json", "stats 1 --json"] {
        let Reply::Stats(stats) = place.answer(words) else { panic!("no stats") };
        assert_eq!(stats.bytes, 4 << 20);
        assert!(stats.bottleneck.is_some());
        assert!(stats.stages.iter().all(|stage| stage.p50_ns <= stage.max_ns));
    }
    let status = place.status();
    assert_eq!(status.socket.as_deref(), place.socket().to_str());
    assert!(status.kernel.starts_with(|c: char| c.is_alphabetic()) && !status.workers.is_empty());
    // In words, every one of them says something.
    for words in ["job list", "job show 1", "stats", "daemon status"] {
        assert!(place.run(words).done().text().lines().count() > 1, "{words}");
    }
    let failed = place.run("job show 99 --json").exit(1, &["99"]);
    assert!(matches!(failed.lines()[0].body, Body::Error(_)));
}

#[test]
fn a_list_of_very_many_jobs_is_still_shown() {
    let place = Place::new(User::Me);
    let _ = place.noise("plain", 4096);
    let long = "n".repeat(200);
    // Their lines together are much longer than a request may be.
    let _ = place
        .shell(&format!(
            "for n in $(seq 150); do $CTL encrypt --quiet --force @/plain @/{long} RAW || exit; done"
        ))
        .done();
    assert_eq!(place.jobs().len(), 150);
    assert!(place.run("job list").done().text().lines().count() >= 150);
}

#[test]
fn bench_measures_and_tells_the_limit() {
    let place = Place::new(User::Me);
    let words = "bench --kernel portable --buffer 64k --millis 5 --rounds 1";
    assert!(place.run(words).done().text().contains("portable"));
    let lines = place.run(&format!("{words} --json")).done().lines();
    let Some(Body::Event(Event::Finished(info))) = lines.last().map(|line| line.body.clone()) else {
        panic!("no end: {lines:?}")
    };
    let rows = &info.outcome.as_ref().expect("ended").bench;
    assert!(!rows.is_empty() && rows.iter().all(|row| row.bytes_per_second > 0.0), "{rows:?}");
}

// ---- pipes

#[test]
fn pipes_carry_a_volume_of_unknown_length() {
    as_each_user(|user| {
        let place = Place::new(user);
        let plain = place.noise("plain", 9 * MIB + 512);
        let _ = place
            .shell(
                "cat @/plain | $CTL encrypt - - RAW | tee @/volume | $CTL decrypt - - RAW > @/back; \
                 echo ${PIPESTATUS[*]} > @/codes",
            )
            .done();
        assert_eq!(place.read("codes"), b"0 0 0 0\n");
        assert!(place.read("back") == plain);
        assert!(place.read("volume") == encrypted(&place.key(64), &plain, layout(512)));
        // A pipe at one end, a file at the other.
        let _ = place.shell("cat @/plain | $CTL encrypt - @/from-pipe RAW").done();
        assert!(place.read("from-pipe") == place.read("volume"));
        let _ = place.shell("$CTL decrypt @/volume - RAW | cmp - @/plain").done();
        let _ = place.shell("cat @/volume | $CTL verify @/plain - RAW").done();
        let _ = place.shell("$CTL encrypt - @/redirected RAW < @/plain").done();
        assert!(place.read("redirected") == place.read("volume"));
    });
}

#[test]
fn an_empty_pipe_makes_an_empty_volume() {
    as_each_user(|user| {
        let place = Place::new(user);
        let out = place.shell("$CTL encrypt - - RAW < /dev/null | $CTL decrypt - - RAW").done();
        assert!(out.stdout.is_empty());
        let out = place.shell("printf '' | $CTL encrypt - - RAW | $CTL decrypt - - RAW").done();
        assert!(out.stdout.is_empty());
        let _ = place.shell("printf '' | $CTL encrypt - @/volume RAW").done();
        assert!(place.read("volume").is_empty());
        place.write("empty", b"");
        let _ = place.run("encrypt @/empty @/second RAW").done();
        assert!(place.read("second").is_empty());
        assert_eq!(place.names(), ["empty", "second", "volume"]);
    });
}

#[test]
fn an_odd_length_is_refused_with_both_numbers_or_padded() {
    as_each_user(|user| {
        let place = Place::new(user);
        let plain = place.noise("plain", MIB + 100);
        let _ = place
            .run("encrypt @/plain @/volume RAW --sector-size 4096")
            .exit(2, &["1048676", "4096", "--pad"]);
        let _ = place
            .shell("cat @/plain | $CTL encrypt - @/volume RAW --sector-size 4096")
            .exit(2, &["4096", "--pad"]);
        assert_eq!(place.names(), ["plain"]);
        let mut padded = plain.clone();
        padded.resize(MIB + 4096, 0);
        let expected = encrypted(&place.key(64), &padded, layout(4096));
        let _ = place.run("encrypt @/plain @/volume RAW --sector-size 4096 --pad").done();
        assert!(place.read("volume") == expected);
        let _ = place.run("verify @/plain @/volume RAW --sector-size 4096 --pad").done();
        let out = place.shell("cat @/plain | $CTL encrypt - - RAW --sector-size 4096 --pad").done();
        assert!(out.stdout == expected);
        // Ciphertext is never padded.
        place.write("cut", &expected[..expected.len() - 1]);
        let _ = place.run("decrypt @/cut @/back RAW --sector-size 4096").exit(2, &["cut off"]);
    });
}

#[test]
fn a_reader_that_leaves_ends_the_job_with_a_reason() {
    as_each_user(|user| {
        let place = Place::new(user);
        let _ = place.noise("plain", 16 * MIB);
        let _ = place
            .shell("$CTL encrypt @/plain - RAW | head -c 100000 > @/head; echo ${PIPESTATUS[*]} > @/codes")
            .done();
        assert_eq!(place.read("codes"), b"1 0\n");
        assert_eq!(place.read("head").len(), 100_000);
        let ran = place.shell("$CTL encrypt @/plain - RAW | true");
        assert_eq!(ran.code, Some(1), "{}", ran.stderr);
        assert!(ran.stderr.contains("the reader has closed the pipe"), "{}", ran.stderr);
        // The daemon is none the worse for it.
        let _ = place.run("encrypt @/plain @/volume RAW").done();
    });
}

#[test]
fn a_reader_of_events_that_leaves_ends_the_job_but_not_a_watched_one() {
    as_each_user(|user| {
        let place = Place::new(user);
        let _ = place.noise("plain", 16 * MIB);
        let _ = place
            .shell(
                "$CTL encrypt @/plain @/volume RAW --json --throttle 1M --chunk-size 64k | head -n 1 > @/head
                echo ${PIPESTATUS[*]} > @/codes",
            )
            .done();
        assert_eq!(place.read("codes"), b"1 0\n");
        assert_eq!(place.jobs()[0].state, JobState::Cancelled);
        assert_eq!(place.names(), ["codes", "head", "plain"]);
        let job = place.spawn("encrypt @/plain @/volume RAW --throttle 1M --chunk-size 64k");
        let id = place.moving();
        let _ = place.shell(&format!("$CTL job watch {id} --json | head -n 1")).done();
        assert_eq!(place.jobs()[1].state, JobState::Running, "watching is not steering");
        job.signal(Signal::INT);
        let _ = job.wait().exit(1, &["cancel"]);
    });
}

#[test]
fn a_key_is_read_through_the_descriptor_that_was_inherited() {
    as_each_user(|user| {
        let place = Place::new(user);
        let plain = place.noise("plain", MIB);
        // Its file may be closed to whoever inherits it, and its beginning may be somebody else's.
        let file = place.home().join("not-yours");
        std::fs::write(&file, [&[0; 100][..], &place.key(64)].concat()).expect("written");
        std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("closed");
        let mut inherited = File::open(&file).expect("opens");
        std::io::Seek::seek(&mut inherited, std::io::SeekFrom::Start(100)).expect("seeks");
        let mut command =
            place.script("exec 7<&0 </dev/null; $CTL encrypt @/plain @/volume --format raw --key fd:7");
        let _ = command.stdin(Stdio::from(inherited));
        let _ = place.finish(command).done();
        assert!(place.read("volume") == encrypted(&place.key(64), &plain, layout(512)));
    });
}

#[test]
fn a_terminal_is_neither_source_nor_sink() {
    let place = Place::new(User::Me);
    let _ = place.noise("plain", 4096);
    for (words, says) in
        [("encrypt @/plain -", "standard output is a terminal"), ("encrypt - @/volume", "SRC is a terminal")]
    {
        // script(1) gives the command a terminal of its own and passes its exit code on.
        let inner = place.expand(&format!("{words} RAW"));
        let ctl = place.bin().join("cryptctl");
        let line = format!("{} --socket {} {inner}", ctl.display(), place.socket().display());
        let ran = place.shell(&format!("command -v script || exit 77; script -qec '{line}' /dev/null"));
        if ran.code == Some(77) {
            return skip("no script(1) to make a terminal with");
        }
        assert_eq!(ran.code, Some(2), "{}", ran.text());
        assert!(ran.text().contains(says), "{}", ran.text());
    }
    assert_eq!(place.names(), ["plain"]);
}

// ---- steering

#[test]
fn a_job_is_slowed_paused_resumed_freed_and_watched_by_other_commands() {
    as_each_user(|user| {
        let place = Place::new(user);
        let plain = place.noise("plain", 24 * MIB);
        let job = place.spawn("encrypt @/plain @/volume RAW --throttle 2M --chunk-size 64k --quiet");
        let id = place.moving();
        let _ = place.run(&format!("job pause {id}")).done();
        let done = |place: &Place| place.jobs()[0].progress.done_bytes;
        // What is in flight completes; then nothing moves.
        let mut before = done(&place);
        eventually("it stands still", || {
            std::thread::sleep(Duration::from_millis(300));
            let now = done(&place);
            std::mem::replace(&mut before, now) == now
        });
        assert_eq!(place.jobs()[0].state, JobState::Paused);
        assert!(before < 24 << 20);
        let watch = place.spawn(&format!("job watch {id} --json"));
        let _ = place.run(&format!("job throttle {id} 1M")).done();
        assert_eq!(place.jobs()[0].progress.throttle_bytes_per_second, Some(1 << 20));
        let _ = place.run(&format!("job resume {id}")).done();
        eventually("it moves on", || done(&place) > before);
        let _ = place.run(&format!("job throttle {id} none")).done();
        let _ = job.wait().done();
        let events = watch.wait().done().lines();
        assert!(matches!(events.last().map(|line| &line.body), Some(Body::Event(Event::Finished(_)))));
        assert!(place.read("volume") == encrypted(&place.key(64), &plain, layout(512)));
        let _ = place.run(&format!("job cancel {id}")).exit(1, &[]);
        let _ = place.run(&format!("job pause {id}")).exit(1, &[]);
    });
}

#[test]
fn a_detached_job_outlives_its_command() {
    as_each_user(|user| {
        let place = Place::new(user);
        let plain = place.noise("plain", 16 * MIB);
        let ran = place.run("encrypt @/plain @/volume RAW --detach --throttle 1M --chunk-size 64k").done();
        assert_eq!(ran.text(), "1\n");
        assert_eq!(place.names(), ["plain", "volume.partial"]);
        let _ = place.run("job throttle 1 none").done();
        let _ = place.run("job watch 1 --quiet").done();
        assert_eq!(place.names(), ["plain", "volume"]);
        assert!(place.read("volume") == encrypted(&place.key(64), &plain, layout(512)));
    });
}

#[test]
fn another_command_cancels_a_job_and_its_own_command_says_so() {
    as_each_user(|user| {
        let place = Place::new(user);
        let _ = place.noise("plain", 16 * MIB);
        let job = place.spawn("encrypt @/plain @/volume RAW --throttle 1M --chunk-size 64k");
        let id = place.moving();
        let _ = place.run(&format!("job cancel {id}")).done();
        let _ = job.wait().exit(1, &["cancelled"]);
        assert_eq!(place.names(), ["plain"]);
        assert_eq!(place.jobs()[0].state, JobState::Cancelled);
    });
}

#[test]
fn an_interrupted_command_cancels_its_job_and_watching_does_not() {
    as_each_user(|user| {
        let place = Place::new(user);
        let _ = place.noise("plain", 16 * MIB);
        for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
            let job = place.spawn("encrypt @/plain @/volume RAW --throttle 1M --chunk-size 64k");
            let id = place.moving();
            let watch = place.spawn(&format!("job watch {id}"));
            std::thread::sleep(Duration::from_millis(200));
            watch.signal(Signal::INT);
            let _ = watch.wait().exit(130, &["no longer watching", "goes on"]);
            assert_eq!(
                place.jobs().last().expect("there").state,
                JobState::Running,
                "watching is not steering"
            );
            job.signal(signal);
            let _ = job.wait().exit(1, &["cancel"]);
            assert_eq!(place.names(), ["plain"], "{signal:?}");
        }
    });
}

// ---- one daemon for many users

#[test]
fn a_user_sees_and_steers_only_the_own_jobs_of_a_common_daemon() {
    if !is_root() {
        return skip("needs root, to become another user");
    }
    let root = Place::with(User::Me, Start::new().config("socket_mode = \"0666\""));
    let daemon = root.daemon.as_ref().expect("running");
    rustix::fs::chmod(daemon.dir.path(), rustix::fs::Mode::from_raw_mode(0o755)).expect("opened");
    let mut other = Place::bare(User::Nobody);
    other.talk_to(root.socket());
    let _ = root.noise("plain", 16 * MIB);
    let job = root.spawn("encrypt @/plain @/volume RAW --throttle 1M --chunk-size 64k");
    let id = root.moving();
    assert!(other.jobs().is_empty());
    for verb in ["show", "watch", "pause", "resume", "cancel"] {
        let _ = other.run(&format!("job {verb} {id}")).exit(1, &[]);
    }
    let _ = other.run(&format!("job throttle {id} none")).exit(1, &[]);
    let _ = other.run("daemon stop --now").exit(1, &[]);
    assert_eq!(root.jobs()[0].state, JobState::Running);
    assert_eq!(root.jobs()[0].progress.throttle_bytes_per_second, Some(1 << 20));

    // The other user's own work goes through root's daemon and stays that user's.
    let plain = other.noise("plain", MIB);
    let _ = other.run("encrypt @/plain @/volume RAW").done();
    let _ = other.run("decrypt @/volume @/back RAW").done();
    assert!(other.read("back") == plain);
    for name in ["volume", "back"] {
        assert_eq!(other.path(name).metadata().expect("there").uid(), NOBODY);
    }
    assert_eq!(other.jobs().len(), 2);
    assert_eq!(root.jobs().len(), 3);

    // Where that user may not write, root's daemon does not either.
    let closed = other.path("closed");
    std::fs::create_dir(&closed).expect("directory of root's");
    rustix::fs::chmod(&closed, rustix::fs::Mode::from_raw_mode(0o755)).expect("readable");
    let _ = other.run("encrypt @/plain @/closed/volume RAW").exit(1, &["permission denied"]);
    // Nor if the rights go while the job runs: the file keeps its partial name, or none.
    let late = other.spawn("encrypt @/plain @/late/volume RAW");
    let _ = late.wait().exit(1, &["no such file"]);
    let open = other.path("open");
    std::fs::create_dir(&open).expect("directory");
    other.give(&open);
    let late = other.spawn("encrypt @/plain @/open/volume RAW --throttle 256k --chunk-size 64k");
    let _ = other.moving();
    std::os::unix::fs::chown(&open, Some(0), Some(0)).expect("taken away");
    rustix::fs::chmod(&open, rustix::fs::Mode::from_raw_mode(0o755)).expect("closed");
    let ended = late.wait().exit(1, &["permission denied"]);
    assert!(!open.join("volume").exists(), "{}", ended.stderr);
    let _ = root.run(&format!("job cancel {id}")).done();
    let _ = job.wait().exit(1, &["cancelled"]);
}

#[test]
fn an_impostor_gets_no_key() {
    if !is_root() {
        return skip("needs root, to be two users");
    }
    // A daemon of nobody's must not be trusted by anybody but nobody (and nobody's by root only if it is root's own).
    let theirs = Place::new(User::Nobody);
    let mut ours = Place::bare(User::Me);
    let _ = ours.noise("plain", 4096);
    ours.talk_to(theirs.socket());
    let _ = ours.run("encrypt @/plain @/volume RAW").exit(3, &["belongs to user 65534"]);
    assert_eq!(ours.names(), ["plain"]);
}

#[test]
fn memory_is_locked_as_far_as_the_limit_allows_and_jobs_work_beyond_it() {
    as_each_user(|user| {
        let place = Place::with(user, Start::new().under(&["prlimit", "--memlock=8388608:8388608"]));
        let plain = place.noise("plain", 8 * MIB);
        let _ = place.run("encrypt @/plain @/volume RAW").done();
        let _ = place.run("decrypt @/volume @/back RAW").done();
        assert!(place.read("back") == plain);
        let status = place.status();
        assert!(status.keys_locked, "keys come first");
        let buffers: u32 = status.workers.iter().map(|worker| worker.buffers).sum();
        let locked: u64 =
            status.workers.iter().map(|w| u64::from(w.buffers_locked) * u64::from(w.buffer_bytes)).sum();
        assert!(buffers > 0);
        match status.memlock_limit_bytes {
            // Root is not bound by it.
            None => assert_eq!(user, User::Me),
            Some(limit) => {
                assert_eq!(limit, 8 << 20);
                assert!(locked <= limit);
                let all: u64 =
                    status.workers.iter().map(|w| u64::from(w.buffers) * u64::from(w.buffer_bytes)).sum();
                assert_eq!(status.memlock_needed_bytes.is_some(), all > limit, "{status:?}");
                if let Some(needed) = status.memlock_needed_bytes {
                    let log = place.daemon.as_ref().expect("running").log();
                    assert_eq!(log.matches("RLIMIT_MEMLOCK").count(), 1, "{log}");
                    assert!(log.contains(&needed.to_string()), "{log}");
                }
            }
        }
    });
}

#[test]
fn every_visible_oddity_of_keys_is_said() {
    let place = Place::new(User::Me);
    let _ = place.noise("plain", 4096);
    let home = place.home().to_owned();
    std::fs::write(home.join("short"), [7; 63]).expect("write");
    std::fs::write(home.join("long"), [7; 65]).expect("write");
    std::fs::write(home.join("twins"), [7; 64]).expect("write");
    std::fs::write(
        home.join("hex"),
        place.key(64).iter().map(|byte| format!("{byte:02x}")).collect::<String>() + "\n",
    )
    .expect("write");
    let words =
        |key: &str| format!("encrypt @/plain @/volume --format raw --key file:{}/{key}", home.display());
    let _ = place.run(&words("short")).exit(2, &["512-bit key", "64 bytes"]);
    let _ = place.run(&words("long")).exit(2, &["512-bit key"]);
    let _ = place.run(&words("missing")).exit(1, &["cannot open the key"]);
    let twins = place.run(&words("twins")).exit(2, &["halves"]);
    assert!(!twins.stderr.contains("7, 7"), "{}", twins.stderr);
    assert_eq!(place.names(), ["plain"], "a bad key creates nothing that stays");
    let warned = place.run(&words("hex")).done();
    assert!(warned.stderr.contains("can be read by others"), "{}", warned.stderr);
    // The same key by a descriptor; and from an input that is the volume's, refused.
    let _ = place
        .shell(&format!("$CTL verify @/plain @/volume --format raw --key fd:3 3< {}/key", home.display()))
        .done();
    let _ = place.shell("$CTL verify @/plain - --format raw --key fd:0 < @/volume").exit(2, &["both"]);
    let mut wrong = place.command("verify @/plain @/volume RAW --key-size 256");
    wrong.stdin(Stdio::null());
    let _ = place.finish(wrong).exit(2, &["256-bit key"]);
    assert!(File::open(place.path("volume")).is_ok());
}
