//! What is left when something goes wrong in the middle: killed programs, full and broken disks, sources that change, sinks
//! that are somebody else's. Nothing half may ever look whole, and every failure names its cause.

use std::fs::File;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use proto::JobState;
use rustix::process::Signal;
use tests::{LoopDevice, Place, Start, User, as_each_user, eventually, is_root, loop_device, skip};

const MIB: usize = 1 << 20;
/// A job that takes long enough to be caught in its middle.
const SLOW: &str = "--throttle 1M --chunk-size 64k";

/// Run a tool that must succeed.
fn tool(words: &str) {
    let mut parts = words.split_whitespace();
    let mut command = Command::new(parts.next().expect("a program"));
    command.args(parts).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{words}: {error}"));
    assert!(output.status.success(), "{words}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A filesystem mounted for a test; root only.
struct Mount(PathBuf);

impl Mount {
    fn new(words: &str, at: PathBuf) -> Self {
        std::fs::create_dir_all(&at).expect("mount point");
        tool(&format!("mount {words} {}", at.display()));
        Self(at)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

// ---- killed programs

#[test]
fn a_killed_daemon_ends_the_command_with_three_and_leaves_no_sink() {
    as_each_user(|user| {
        for (keep, left) in [("", vec!["plain"]), ("--keep-partial", vec!["plain", "volume.partial"])] {
            let mut place = Place::new(user);
            let _ = place.noise("plain", 16 * MIB);
            let job = place.spawn(&format!("encrypt @/plain @/volume RAW {SLOW} {keep}"));
            let _ = place.moving();
            place.daemon.as_ref().expect("running").signal(Signal::KILL);
            let _ = job.wait().exit(3, &["the daemon went away", "hint:"]);
            assert_eq!(place.names(), left);
            let _ = place.daemon.as_mut().expect("running").wait();
        }
    });
}

#[test]
fn a_killed_daemon_ends_a_pipeline_without_a_hang() {
    let mut place = Place::new(User::Me);
    let _ = place.noise("plain", 16 * MIB);
    let running = place.launch(place.script(&format!(
        "cat @/plain | $CTL encrypt - - RAW {SLOW} | $CTL decrypt - - RAW > @/back; echo ${{PIPESTATUS[*]}} > @/codes"
    )));
    eventually("both jobs run", || place.jobs().iter().filter(|j| j.progress.done_bytes > 0).count() == 2);
    place.daemon.as_ref().expect("running").signal(Signal::KILL);
    let _ = running.wait();
    let codes = String::from_utf8(place.read("codes")).expect("text");
    let codes: Vec<_> = codes.split_whitespace().collect();
    assert_eq!(codes[1..], ["3", "3"], "{codes:?}");
    let _ = place.daemon.as_mut().expect("running").wait();
}

#[test]
fn a_killed_command_takes_its_job_and_sink_with_it() {
    as_each_user(|user| {
        let place = Place::new(user);
        let _ = place.noise("plain", 16 * MIB);
        let job = place.spawn(&format!("encrypt @/plain @/volume RAW {SLOW}"));
        let _ = place.moving();
        assert_eq!(place.names(), ["plain", "volume.partial"]);
        job.signal(Signal::KILL);
        assert_eq!(job.wait().signal, Some(9));
        eventually("the job is over", || place.jobs()[0].state == JobState::Cancelled);
        assert_eq!(place.names(), ["plain"]);
    });
}

#[test]
fn when_both_are_killed_only_a_partial_is_left_and_the_next_run_says_what_to_do() {
    as_each_user(|user| {
        let mut place = Place::new(user);
        let plain = place.noise("plain", 16 * MIB);
        // --detach: no command is there to tidy up.
        let _ = place.run(&format!("encrypt @/plain @/volume RAW --detach {SLOW}")).done();
        let _ = place.moving();
        let daemon = place.daemon.as_mut().expect("running");
        daemon.signal(Signal::KILL);
        let _ = daemon.wait();
        assert_eq!(place.names(), ["plain", "volume.partial"]);
        // The socket is stale now; the next command starts a daemon in its place.
        // The kernel takes a killed process's ring apart, and so gives up its lock on the file, a little after its end.
        eventually("the lock has gone", || {
            let refused = place.run("encrypt @/plain @/volume RAW").exit(1, &["volume.partial"]);
            assert_eq!(place.names(), ["plain", "volume.partial"]);
            refused.stderr.contains("interrupted job") && refused.stderr.contains("--force")
        });
        assert_eq!(place.names(), ["plain", "volume.partial"]);
        let _ = place.run("encrypt @/plain @/volume RAW --force").done();
        assert_eq!(place.names(), ["plain", "volume"]);
        let _ = place.run("decrypt @/volume @/back RAW").done();
        assert!(place.read("back") == plain);
        let _ = place.run("daemon stop").done();
    });
}

#[test]
fn a_daemon_told_to_end_finishes_its_jobs_and_takes_no_more() {
    as_each_user(|user| {
        let mut place = Place::new(user);
        let _ = place.noise("plain", 3 * MIB);
        let job = place.spawn(&format!("encrypt @/plain @/volume RAW {SLOW}"));
        let _ = place.moving();
        place.daemon.as_ref().expect("running").signal(Signal::TERM);
        eventually("new jobs are refused", || {
            let ran = place.run("encrypt @/plain @/other RAW --no-start");
            assert_ne!(ran.code, Some(0), "taken: {}", ran.stderr);
            ran.code == Some(3)
        });
        let _ = job.wait().done();
        assert!(place.daemon.as_mut().expect("running").wait().success());
        assert_eq!(place.names(), ["plain", "volume"]);
    });
}

#[test]
fn a_daemon_that_has_stopped_dead_can_be_left_by_a_second_interrupt() {
    let place = Place::new(User::Me);
    let _ = place.noise("plain", 16 * MIB);
    let job = place.spawn(&format!("encrypt @/plain @/volume RAW {SLOW}"));
    let _ = place.moving();
    let daemon = place.daemon.as_ref().expect("running");
    daemon.signal(Signal::STOP);
    job.signal(Signal::INT);
    eventually("the first is heard", || job.said().contains("cancelling"));
    job.signal(Signal::INT);
    let ended = job.wait().exit(130, &["may still be ending"]);
    daemon.signal(Signal::CONT);
    eventually("and the job ends all the same", || place.jobs()[0].state == JobState::Cancelled);
    assert_eq!(place.names(), ["plain"], "{}", ended.stderr);
}

// ---- full and broken disks

#[test]
fn a_full_filesystem_is_named_and_left_as_it_was() {
    if !is_root() {
        return skip("needs root, to mount a small filesystem");
    }
    as_each_user(|user| {
        let place = Place::new(user);
        let _ = place.noise("plain", 8 * MIB);
        let _ = place.run("encrypt @/plain @/volume RAW").done();
        let small = Mount::new("-t tmpfs -o size=4M,mode=1777 small", place.path("small"));
        // Known before the first write.
        let _ = place.run("encrypt @/plain @/small/volume RAW").exit(1, &["8388608 bytes are needed"]);
        // Found out on the way: neither a pipe's length nor a plaintext's holes are known.
        let _ = place.shell("cat @/plain | $CTL encrypt - @/small/volume RAW").exit(1, &["no space left"]);
        let _ = place.run("decrypt @/volume @/small/back RAW").exit(1, &["no space left"]);
        assert_eq!(std::fs::read_dir(&small.0).expect("list").count(), 0);
        // The same on a real filesystem with a journal.
        drop(small);
        let image = place.path("image");
        File::create(&image).and_then(|file| file.set_len(6 << 20)).expect("image");
        tool(&format!("mke2fs -q -F -t ext4 -E root_owner=65534:65534 {}", image.display()));
        let ext4 = Mount::new(&format!("-o loop {}", image.display()), place.path("ext4"));
        let _ = place.shell("cat @/plain | $CTL encrypt - @/ext4/volume RAW").exit(1, &["no space left"]);
        let _ = place.run("decrypt @/volume @/ext4/back RAW").exit(1, &["no space left"]);
        let left: Vec<_> =
            std::fs::read_dir(&ext4.0).expect("list").map(|e| e.expect("entry").file_name()).collect();
        assert_eq!(left, ["lost+found"]);
    });
}

#[test]
fn a_file_size_limit_fails_the_job_and_not_the_daemon() {
    as_each_user(|user| {
        let place = Place::with(user, Start::new().under(&["prlimit", "--fsize=4194304"]));
        let _ = place.noise("plain", 8 * MIB);
        let _ = place.run("encrypt @/plain @/volume RAW").exit(1, &["file too large"]);
        let _ = place.shell("cat @/plain | $CTL encrypt - @/volume RAW").exit(1, &["file too large"]);
        assert_eq!(place.names(), ["plain"]);
        place.write("small", &[1; MIB]);
        let _ = place.run("encrypt @/small @/volume RAW").done();
    });
}

/// A device whose backing file is `bytes` long, or a loud skip.
fn device(bytes: u64) -> Option<LoopDevice> {
    if !is_root() {
        skip("needs root, for a loop device");
        return None;
    }
    loop_device(bytes)
}

#[test]
fn a_device_that_fails_to_read_is_named_with_the_place() {
    let Some(device) = device(16 << 20) else { return };
    let place = Place::new(User::Me);
    // What lies behind the second half goes away under the device.
    File::options().write(true).open(device.backing()).and_then(|file| file.set_len(8 << 20)).expect("cut");
    let ran = place.run(&format!("encrypt {} @/volume RAW", device.path().display()));
    let ran = ran.exit(1, &["read failed", "input/output error"]);
    assert!(ran.stderr.contains(device.path().to_str().expect("text")), "{}", ran.stderr);
    assert!(place.names().is_empty());
}

#[test]
fn a_device_that_fails_to_write_is_named_with_the_place() {
    if !is_root() {
        return skip("needs root, for a loop device on a small filesystem");
    }
    let place = Place::new(User::Me);
    let _ = place.noise("plain", 16 * MIB);
    let small = Mount::new("-t tmpfs -o size=4M small", place.path("small"));
    let backing = small.0.join("backing");
    File::create(&backing).and_then(|file| file.set_len(16 << 20)).expect("backing file");
    let made = Command::new("losetup").args(["--find", "--show"]).arg(&backing).output().expect("losetup");
    if !made.status.success() {
        return skip("no loop device to be had");
    }
    let device = String::from_utf8_lossy(&made.stdout).trim().to_owned();
    let ran = place.run(&format!("encrypt @/plain {device} RAW"));
    tool(&format!("losetup -d {device}"));
    let ran = ran.exit(1, &[&device]);
    assert!(
        ["input/output error", "no space left"].iter().any(|text| ran.stderr.to_lowercase().contains(text)),
        "{}",
        ran.stderr
    );
}

#[test]
fn a_device_too_small_is_refused_before_the_first_write() {
    let Some(device) = device(4 << 20) else { return };
    let place = Place::new(User::Me);
    let _ = place.noise("plain", 8 * MIB);
    let words = format!("encrypt @/plain {} RAW", device.path().display());
    let _ = place.run(&words).exit(1, &["8388608", "4194304"]);
    assert!(std::fs::read(device.path()).expect("read").iter().all(|byte| *byte == 0), "nothing was written");
    // A pipe's length is not known before: it ends at the device's.
    let _ = place
        .shell(&format!("cat @/plain | $CTL encrypt - {} RAW", device.path().display()))
        .exit(1, &["4194304"]);
}

#[test]
fn a_device_in_use_or_with_something_on_it_is_refused() {
    let Some(device) = device(8 << 20) else { return };
    let place = Place::new(User::Me);
    let plain = place.noise("plain", 4 * MIB);
    let path = device.path().display();
    tool(&format!("mke2fs -q -F -t ext4 {path}"));
    let before = std::fs::read(device.path()).expect("read");
    let words = format!("encrypt @/plain {path} RAW");
    let _ = place.run(&words).exit(1, &["ext4", "--force"]);
    let mount = Mount::new(&path.to_string(), place.path("mounted"));
    for force in ["", "--force"] {
        let _ = place.run(&format!("{words} {force}")).exit(1, &["in use"]);
        let _ = place.run(&format!("encrypt {path} @/volume RAW {force}")).exit(1, &["in use"]);
    }
    drop(mount);
    eventually("unmounted", || File::options().read(true).open(device.path()).is_ok());
    std::fs::remove_dir(place.path("mounted")).expect("mount point removed");
    let after = std::fs::read(device.path()).expect("read");
    // Mounting wrote to the superblock; the job to nothing: the same blocks but for the filesystem's own.
    let differ = before.iter().zip(&after).filter(|(a, b)| a != b).count();
    assert!(differ < 64 << 10, "{differ} bytes changed");
    let _ = place.run(&format!("{words} --force")).done();
    // What a device holds beyond the volume is nobody's business.
    let _ = place.run(&format!("verify @/plain {path} RAW")).done();
    let _ = place.run(&format!("decrypt {path} @/back RAW")).done();
    assert!(place.read("back")[..4 * MIB] == plain);
    assert_eq!(place.names(), ["back", "plain"]);
}

#[test]
fn a_read_only_sink_is_refused() {
    let Some(device) = device(8 << 20) else { return };
    let place = Place::new(User::Me);
    let _ = place.noise("plain", 4 * MIB);
    tool(&format!("blockdev --setro {}", device.path().display()));
    let ran = place.run(&format!("encrypt @/plain {} RAW", device.path().display()));
    tool(&format!("blockdev --setrw {}", device.path().display()));
    let _ = ran.exit(1, &["is read-only"]);
    assert!(std::fs::read(device.path()).expect("read").iter().all(|byte| *byte == 0));
    let _mount = Mount::new("-t tmpfs -o ro,size=1M closed", place.path("ro"));
    let _ = place.run("encrypt @/plain @/ro/volume RAW").exit(1, &["read-only"]);
}

#[test]
fn what_the_user_may_not_read_or_write_is_refused() {
    if !is_root() {
        return skip("needs root, to make what another user may not touch");
    }
    let place = Place::new(User::Nobody);
    let _ = place.noise("plain", MIB);
    std::fs::create_dir(place.path("closed")).expect("directory");
    std::fs::write(place.path("secret"), [1; 4096]).expect("file");
    std::fs::set_permissions(place.path("secret"), PermissionsExt::from_mode(0o600)).expect("closed");
    let _ = place.run("encrypt @/plain @/closed/volume RAW").exit(1, &["permission denied"]);
    let _ = place.run("encrypt @/secret @/volume RAW").exit(1, &["permission denied"]);
    assert_eq!(place.names(), ["closed", "plain", "secret"]);
    // A read-only file of the user's own may be read, and replaced only by force.
    std::fs::set_permissions(place.path("plain"), PermissionsExt::from_mode(0o400)).expect("read-only");
    let _ = place.run("encrypt @/plain @/volume RAW").done();
}

// ---- sources and sinks that change or are not what they seem

#[test]
fn a_source_that_shrinks_fails_the_job() {
    as_each_user(|user| {
        let place = Place::new(user);
        let _ = place.noise("plain", 8 * MIB);
        let job = place.spawn(&format!("encrypt @/plain @/volume RAW {SLOW}"));
        let id = place.moving();
        File::options().write(true).open(place.path("plain")).and_then(|f| f.set_len(2 << 20)).expect("cut");
        let _ = place.run(&format!("job throttle {id} none")).done();
        let ran = job.wait().exit(1, &["plain"]);
        assert!(ran.stderr.contains("end"), "{}", ran.stderr);
        assert_eq!(place.names(), ["plain"]);
    });
}

#[test]
fn two_jobs_never_write_one_sink() {
    as_each_user(|user| {
        let place = Place::new(user);
        let plain = place.noise("plain", 3 * MIB);
        let first = place.spawn(&format!("encrypt @/plain @/volume RAW {SLOW}"));
        let id = place.moving();
        for force in ["", "--force"] {
            let ran = place.run(&format!("encrypt @/plain @/volume RAW {force}"));
            let _ = ran.exit(1, &["another job is writing"]);
        }
        let _ = place.run(&format!("job throttle {id} none")).done();
        let _ = first.wait().done();
        let _ = place.run("decrypt @/volume @/back RAW").done();
        assert!(place.read("back") == plain);
    });
}

#[test]
fn a_sink_that_appears_meanwhile_is_not_replaced() {
    as_each_user(|user| {
        let place = Place::new(user);
        let _ = place.noise("plain", 4 * MIB);
        let job = place.spawn(&format!("encrypt @/plain @/volume RAW {SLOW}"));
        let id = place.moving();
        place.write("volume", b"precious");
        let _ = place.run(&format!("job throttle {id} none")).done();
        let _ = job.wait().exit(1, &["exists"]);
        assert_eq!(place.read("volume"), b"precious");
        assert_eq!(place.names(), ["plain", "volume"]);
    });
}

#[test]
fn an_existing_sink_is_kept_whole_until_the_new_one_is() {
    as_each_user(|user| {
        let place = Place::new(user);
        let _ = place.noise("plain", 4 * MIB);
        place.write("volume", b"precious");
        let _ = place.run("encrypt @/plain @/volume RAW").exit(1, &["not empty", "--force"]);
        let job = place.spawn(&format!("encrypt @/plain @/volume RAW --force {SLOW}"));
        let id = place.moving();
        assert_eq!(place.read("volume"), b"precious");
        let _ = place.run(&format!("job cancel {id}")).done();
        let _ = job.wait().exit(1, &["cancelled"]);
        assert_eq!(place.read("volume"), b"precious");
        let _ = place.run("encrypt @/plain @/volume RAW --force").done();
        assert_eq!(place.read("volume").len(), 4 * MIB);
    });
}

#[test]
fn a_source_is_never_its_own_sink() {
    let place = Place::new(User::Me);
    let plain = place.noise("plain", MIB);
    std::fs::hard_link(place.path("plain"), place.path("hard")).expect("link");
    symlink("plain", place.path("soft")).expect("symlink");
    for (sink, says) in [("plain", "both source and sink"), ("hard", "the same"), ("soft", "the same")] {
        let _ = place.run(&format!("encrypt @/plain @/{sink} RAW --force")).exit(2, &[says]);
    }
    let _ = place.shell("$CTL encrypt @/plain - RAW 1<>@/plain").exit(2, &["same"]);
    assert!(place.read("plain") == plain);
    let Some(device) = device(4 << 20) else { return };
    let (node, backing) = (device.path().display(), device.backing().display());
    for (from, to) in [(node.to_string(), backing.to_string()), (backing.to_string(), node.to_string())] {
        let _ = place.run(&format!("encrypt {from} {to} RAW --force")).exit(2, &["same"]);
    }
    assert!(Path::new(device.backing()).exists());
}

#[test]
fn ends_that_are_neither_file_nor_device_are_refused_by_name() {
    as_each_user(|user| {
        let place = Place::new(user);
        let _ = place.noise("plain", 4096);
        for (words, says) in [
            ("encrypt @/missing @/volume", "no such file"),
            ("encrypt @/plain @/missing/volume", "no such file"),
            ("encrypt @ @/volume", "is a directory"),
            ("encrypt @/plain @", "is a directory"),
            ("encrypt /dev/zero @/volume", "is a character device"),
            ("encrypt @/plain /dev/null", "is a character device"),
            ("encrypt @/plain @/plain/volume", "not a directory"),
        ] {
            let ran = place.run(&format!("{words} RAW"));
            assert!(matches!(ran.code, Some(1 | 2)), "{words}: {:?}", ran.code);
            assert!(ran.stderr.to_lowercase().contains(says), "{words}: {}", ran.stderr);
            assert_eq!(ran.stderr.lines().filter(|line| line.starts_with("cryptctl: ")).count(), 1);
        }
        assert_eq!(place.names(), ["plain"]);
    });
}

#[test]
fn a_named_pipe_without_another_end_can_be_interrupted() {
    let place = Place::new(User::Me);
    let _ = place.noise("plain", 4096);
    tool(&format!("mkfifo {}", place.path("fifo").display()));
    let job = place.spawn("encrypt @/plain @/fifo RAW");
    std::thread::sleep(Duration::from_millis(200));
    job.signal(Signal::INT);
    let ran = job.wait();
    assert!(ran.code != Some(0), "{}", ran.stderr);
    // And with one, it carries a volume.
    let job = place.spawn("encrypt @/plain @/fifo RAW");
    let back = place.run("decrypt @/fifo @/back RAW").done();
    let _ = job.wait().done();
    assert!(place.read("back") == place.read("plain"), "{}", back.stderr);
}
