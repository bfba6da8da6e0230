//! Copies with a checkpoint whose daemon is killed at random instants, again and again until they are done; and what
//! `cryptctl` says on the way.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use proto::Reply;
use rustix::process::{Pid, Signal, kill_process};
use tests::{Place, Random, User, eventually, is_root, skip};

const MIB: usize = 1 << 20;
/// Slow enough to be caught in its middle, with a checkpoint every few chunks.
const SLOW: &str = "--throttle 24M --chunk-size 64k --checkpoint-every 0.01";
/// A passphrase that costs next to nothing.
const CHEAP: &str = "--pbkdf pbkdf2 --pbkdf-force-iterations 1000";

/// The daemon that answers in this place, which a command started.
fn daemon(place: &Place) -> Option<Pid> {
    let ran = place.run("daemon status --json --no-start");
    let status = ran.lines().into_iter().find_map(|line| match line.body {
        proto::Body::Ok(Reply::Status(status)) => Some(status),
        _ => None,
    })?;
    Pid::from_raw(i32::try_from(status.hello.pid).ok()?)
}

/// Run it with a daemon that dies at some instant, as often as it takes. How many died.
fn through_kills(place: &Place, random: &mut Random, words: &str, sink: &str) -> u32 {
    let (partial, checkpoint) = (format!("{sink}.partial"), format!("{sink}.partial.checkpoint"));
    let mut kills = 0;
    for attempt in 0.. {
        assert!(attempt < 200, "it never ends");
        let names = place.names();
        let has = |name: &String| names.contains(name);
        if !has(&partial) && has(&checkpoint) {
            // Killed between the last two steps: the sink has its name.
            assert!(has(&sink.to_owned()), "{names:?}");
            std::fs::remove_file(place.path(&checkpoint)).expect("removed");
            return kills;
        }
        if has(&sink.to_owned()) {
            assert!(!has(&partial), "{names:?}");
            return kills;
        }
        let resume = if has(&partial) { "--resume" } else { "--resumable" };
        // The last ones are left alone, or a slow machine would never get there.
        let gentle = kills >= 12;
        let job = place.spawn(&format!("{words} {resume} {}", if gentle { "" } else { SLOW }));
        let asked = std::time::Instant::now();
        let wait = Duration::from_millis(random.below(400) as u64);
        let mut pid = None;
        while !gentle && pid.is_none() && asked.elapsed() < Duration::from_secs(20) {
            pid = daemon(place);
        }
        if let Some(pid) = pid {
            std::thread::sleep(wait);
            kills += u32::from(kill_process(pid, Signal::KILL).is_ok());
        }
        let ran = job.wait();
        match ran.code {
            Some(0) => {}
            _ if ran.stderr.contains("cryptd could not start (signal: 9") => {}
            Some(3) => {
                let kept = place.names().contains(&partial);
                assert!(
                    !kept || ran.stderr.contains("the same command with --resume goes on"),
                    "{}",
                    ran.stderr
                );
            }
            // The kernel gives up a killed process's locks a little after its end.
            Some(1) if ran.stderr.contains("another job") => {}
            _ => panic!("{:?}: {}", ran.code, ran.stderr),
        }
    }
    unreachable!("every attempt returns or goes on")
}

#[test]
fn copies_survive_a_daemon_that_is_killed_at_random_instants() {
    let mut random = Random::new(tests::seed());
    let place = Place::bare(User::Me);
    let mut plain = place.noise("plain", 8 * MIB);
    plain[3 * MIB..5 * MIB].fill(0);
    place.write("plain", &plain);
    let _ = place.run("encrypt @/plain @/whole RAW").done();
    let mut kills = 0;
    let luks = |version| format!("--format {version} --key file:@/../key {CHEAP}");
    for (name, format, open) in [
        ("raw", "RAW".to_owned(), "RAW"),
        ("luks1", luks("luks1"), "--key file:@/../key"),
        ("luks2", luks("luks2"), "--key file:@/../key"),
    ] {
        let back = format!("{name}.back");
        kills += through_kills(&place, &mut random, &format!("encrypt @/plain @/{name} {format}"), name);
        assert!(name != "raw" || place.read(name) == place.read("whole"), "other ciphertext");
        let _ = place.run(&format!("verify @/plain @/{name} {open}")).done();
        kills += through_kills(&place, &mut random, &format!("decrypt @/{name} @/{back} {open}"), &back);
        assert!(place.read(&back) == plain, "{name}: other plaintext");
    }
    let _ = place.run("daemon stop --now");
    assert!(kills >= 12, "only {kills} daemons were killed");
    eprintln!("{kills} daemons killed");
}

#[test]
fn an_interrupt_keeps_what_was_done_and_says_how_to_go_on() {
    let place = Place::new(User::Me);
    let plain = place.noise("plain", 8 * MIB);
    let job = place.spawn("encrypt @/plain @/volume RAW --resumable --throttle 4M --chunk-size 64k");
    let _ = place.moving();
    job.signal(Signal::INT);
    let _ = job.wait().exit(1, &["volume.partial was kept", "the same command with --resume goes on"]);
    assert_eq!(place.names(), ["plain", "volume.partial", "volume.partial.checkpoint"]);
    let _ = place.run("encrypt @/plain @/volume RAW").exit(1, &["left behind", "--resume goes on with it"]);
    let _ = place.run("encrypt @/plain @/volume RAW --resumable").exit(1, &["left behind", "--resume"]);
    assert_eq!(place.names(), ["plain", "volume.partial", "volume.partial.checkpoint"]);
    let ran = place.run("encrypt @/plain @/volume RAW --resume").done();
    assert!(ran.stderr.contains("that were done before"), "{}", ran.stderr);
    assert_eq!(place.names(), ["plain", "volume"]);
    let _ = place.run("decrypt @/volume @/back RAW").done();
    assert!(place.read("back") == plain);
    let _ =
        place.run("encrypt @/plain @/volume RAW --resume").exit(1, &["nothing to resume", "may have ended"]);
}

#[test]
fn what_cannot_be_resumed_is_refused_and_force_begins_anew() {
    let place = Place::new(User::Me);
    let plain = place.noise("plain", 4 * MIB);
    let _ = place.shell("cat @/plain | $CTL encrypt - @/volume RAW --resumable").exit(2, &["is a stream"]);
    let _ = place.run("encrypt @/plain - RAW --resumable").exit(2, &[]);
    let _ = place
        .run("encrypt @/plain @/volume RAW --resume")
        .exit(1, &["nothing to resume", "without --resume"]);
    assert_eq!(place.names(), ["plain"]);
    // A job that fails before it begins leaves nothing.
    place.write("odd", &plain[..1000]);
    let _ = place.run("encrypt @/odd @/volume RAW --resumable").exit(2, &["--pad"]);
    assert_eq!(place.names(), ["odd", "plain"]);
    place.write("notes", b"not a checkpoint at all");
    let _ =
        place.run("encrypt @/plain @/volume RAW --checkpoint @/notes --force").exit(1, &["is no checkpoint"]);
    assert_eq!(place.read("notes"), b"not a checkpoint at all");
    // Neither does what is begun anew.
    for again in ["--force", "--force --resumable"] {
        let job = place.spawn("encrypt @/plain @/volume RAW --resumable --throttle 2M --chunk-size 64k");
        let _ = place.moving();
        job.signal(Signal::INT);
        let _ = job.wait().exit(1, &["was kept"]);
        let _ = place.run(&format!("encrypt @/plain @/volume RAW {again}")).done();
        assert_eq!(place.names(), ["notes", "odd", "plain", "volume"]);
        std::fs::remove_file(place.path("volume")).expect("removed");
    }
}

#[test]
fn a_wrong_passphrase_ends_with_four_and_changes_nothing() {
    let place = Place::new(User::Me);
    let _ = place.noise("plain", 4 * MIB);
    let words = format!("encrypt @/plain @/volume {CHEAP} --header @/head");
    let job = place.spawn(&format!("{words} --key file:@/../key --resumable --throttle 2M --chunk-size 64k"));
    let _ = place.moving();
    job.signal(Signal::INT);
    let _ = job.wait().exit(1, &["was kept"]);
    let left = ["head.partial", "plain", "volume.partial", "volume.partial.checkpoint"];
    assert_eq!(place.names(), left);
    let before = place.read("volume.partial");
    let _ = place.run(&format!("{words} --key file:@/../key32 --resume")).exit(4, &["wrong key"]);
    assert_eq!(place.names(), left);
    assert!(place.read("volume.partial") == before);
    let _ = place.run(&format!("{words} --key file:@/../key --resume")).done();
    assert_eq!(place.names(), ["head", "plain", "volume"]);
    let _ = place.run("verify @/plain @/volume --header @/head --key file:@/../key").done();
}

fn mount(words: &str, at: &Path) {
    let status = Command::new("mount").args(words.split(' ')).arg(at).status().expect("mount");
    assert!(status.success(), "mount {words}");
}

#[test]
fn a_full_disk_stops_a_copy_that_goes_on_when_there_is_room() {
    if !is_root() {
        return skip("needs root, to mount a small filesystem");
    }
    let place = Place::new(User::Me);
    let plain = place.noise("plain", 8 * MIB);
    let _ = place.run("encrypt @/plain @/volume RAW").done();
    let small = place.path("small");
    std::fs::create_dir(&small).expect("directory");
    mount("-t tmpfs -o size=4M small", &small);
    let words = "decrypt @/volume @/small/back RAW --chunk-size 64k";
    let ran = place.run(&format!("{words} --resumable --throttle 8M --checkpoint-every 0.05"));
    let ran = ran.exit(1, &["no space left", "the same command with --resume goes on"]);
    assert!(small.join("back.partial.checkpoint").exists(), "{}", ran.stderr);
    let _ = place.run(&format!("{words} --resume")).exit(1, &["no space left"]);
    mount("-o remount,size=32M", &small);
    let ran = place.run(&format!("{words} --resume")).done();
    let is_same = std::fs::read(small.join("back")).expect("read") == plain;
    let names: Vec<_> = std::fs::read_dir(&small).expect("list").collect();
    let count = names.len();
    drop(names);
    let _ = Command::new("umount").arg("-l").arg(&small).status();
    assert!(is_same && count == 1 && ran.stderr.contains("that were done before"), "{}", ran.stderr);
}

#[test]
fn a_copy_to_a_device_goes_on_with_a_checkpoint_elsewhere() {
    if !is_root() {
        return skip("needs root, for a loop device");
    }
    let Some(device) = tests::loop_device(32 << 20) else { return };
    let mut place = Place::new(User::Me);
    let plain = place.noise("plain", 8 * MIB);
    let path = device.path().display().to_string();
    let _ = place.run(&format!("encrypt @/plain {path} RAW --resumable")).exit(2, &["--checkpoint FILE"]);
    let words = format!("encrypt @/plain {path} --key file:@/../key {CHEAP} --checkpoint @/mark");
    let _ =
        place.run(&format!("{words} --detach --throttle 4M --chunk-size 64k --checkpoint-every 0.05")).done();
    eventually("some of it is done", || place.jobs()[0].progress.done_bytes > 2 << 20);
    let daemon = place.daemon.as_mut().expect("running");
    daemon.signal(Signal::KILL);
    let _ = daemon.wait();
    let mut said = String::new();
    // The kernel gives up a killed process's device and locks a little after its end.
    eventually("a leftover is told of", || {
        let ran = place.run(&words).exit(1, &[]);
        ran.stderr.contains("left behind") && ran.stderr.contains("--resume")
    });
    eventually("the locks have gone", || {
        let ran = place.run(&format!("{words} --resume"));
        said = ran.stderr;
        ran.code == Some(0)
    });
    assert!(said.contains("that were done before"), "{said}");
    assert_eq!(place.names(), ["plain"]);
    let _ = place.run(&format!("verify @/plain {path} --key file:@/../key")).done();
    let _ = place.run(&format!("decrypt {path} @/back --key file:@/../key")).done();
    assert!(place.read("back")[..8 * MIB] == plain);
    let _ = place.run("daemon stop").done();
}
