//! The machine around the programs: no io_uring, volumes far larger than memory, many first callers at once, and an
//! environment that holds next to nothing. And what a job leaves behind in memory, logs and answers: no key.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Stdio;

use engine::crypto::{Kernel, Layout, VolumeKey, cipher};
use engine::units::DataUnit;
use proto::{JobState, TweakKind};
use tests::{Place, Start, User, as_each_user, eventually, is_root, loop_device, skip};

const MIB: usize = 1 << 20;

fn encrypted_at(key: &[u8], plain: &[u8], unit_bytes: u32, first: u64) -> Vec<u8> {
    let layout = Layout { unit_bytes, kind: TweakKind::Plain64, large: false, offset_sectors: 0 };
    let mut bytes = plain.to_vec();
    let key = VolumeKey::new(key).expect("key");
    cipher(Kernel::Portable, &key, layout).expect("cipher").encrypt(DataUnit(first), &mut bytes);
    bytes
}

// ---- without io_uring

/// The main ways of moving data.
fn moves_everything(place: &Place) {
    let plain = place.noise("plain", 9 * MIB + 512);
    let _ = place.run("encrypt @/plain @/volume RAW").done();
    assert!(place.read("volume") == encrypted_at(&place.key(64), &plain, 512, 0));
    let _ = place.run("verify @/plain @/volume RAW").done();
    let _ = place.run("decrypt @/volume @/back RAW --buffered").done();
    assert!(place.read("back") == plain);
    let _ = place.shell("cat @/plain | $CTL encrypt - - RAW | $CTL decrypt - - RAW | cmp - @/plain").done();
    let _ =
        place.shell("$CTL encrypt @/plain - RAW | head -c 100000 > @/head").exit(1, &["reader has closed"]);
    let job = place.spawn("encrypt @/plain @/slow RAW --throttle 1M --chunk-size 64k");
    let id = place.moving();
    let _ = place.run(&format!("job cancel {id}")).done();
    let _ = job.wait().exit(1, &["cancelled"]);
    assert_eq!(place.names(), ["back", "head", "plain", "volume"]);
    if is_root()
        && let Some(device) = loop_device(16 << 20)
    {
        let path = device.path().display();
        let _ = place.run(&format!("encrypt @/plain {path} RAW")).done();
        let _ = place.run(&format!("verify @/plain {path} RAW")).done();
    }
}

#[test]
fn a_thread_pool_does_all_that_a_ring_does() {
    as_each_user(|user| {
        let place = Place::with(user, Start::new().config("queue = \"threads\""));
        let status = place.status();
        assert!(status.workers.iter().all(|w| w.queue == "threads" && w.queue_fallback_reason.is_none()));
        // Loop devices are root's.
        if user == User::Me { moves_everything(&place) } else { round_trip(&place) }
    });
}

#[test]
fn where_io_uring_is_blocked_one_warning_says_so_and_all_works() {
    for (errno, says) in [("EPERM", "permitted"), ("ENOSYS", "not implemented")] {
        let under = [env!("CARGO_BIN_EXE_without_io_uring"), errno];
        let place = Place::with(User::Me, Start::new().under(&under));
        let log = place.daemon.as_ref().expect("running").log();
        assert_eq!(log.matches("io_uring cannot be used").count(), 1, "{log}");
        for worker in place.status().workers {
            assert_eq!(worker.queue, "threads");
            let reason = worker.queue_fallback_reason.expect("a reason").to_lowercase();
            assert!(reason.contains(says), "{reason}");
        }
        let words = place.run("daemon status").done().text();
        assert!(words.contains("threads") && words.to_lowercase().contains(says), "{words}");
        moves_everything(&place);
    }
}

#[test]
fn where_io_uring_is_demanded_and_blocked_the_daemon_says_so_and_leaves() {
    let place = Place::bare(User::Me);
    let mut command = place.program(Path::new(env!("CARGO_BIN_EXE_without_io_uring")));
    std::fs::write(place.home().join("demand.toml"), "queue = \"io_uring\"\n").expect("configuration");
    command.arg("EPERM").arg(tests::program("cryptd"));
    command.arg("--config").arg(place.home().join("demand.toml")).arg("--socket").arg(place.socket());
    let ran = place.finish(command);
    assert!(matches!(ran.code, Some(1 | 2)), "{:?}", ran.code);
    assert!(
        ran.stderr.contains("io_uring") && ran.stderr.to_lowercase().contains("permitted"),
        "{}",
        ran.stderr
    );
    assert!(!place.socket().exists());
}

fn round_trip(place: &Place) {
    let plain = place.noise("plain", 3 * MIB);
    let _ = place.run("encrypt @/plain @/volume RAW --force").done();
    let _ = place.run("decrypt @/volume @/back RAW --force").done();
    assert!(place.read("back") == plain);
}

// ---- volumes far larger than memory

/// Peak resident bytes of the daemon, as the kernel counts them.
fn peak(place: &Place) -> u64 {
    let pid = place.status().hello.pid;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the daemon runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("VmHWM");
    line.trim().strip_suffix(" kB").expect("kilobytes").parse::<u64>().expect("a number") * 1024
}

#[test]
fn terabytes_of_holes_take_seconds_and_no_memory() {
    let place = Place::new(User::Me);
    let _ = place.noise("small", 64 * MIB);
    // What any job costs, it costs once.
    let _ = place.run("encrypt @/small @/volume RAW --sector-size 4096").done();
    let _ = place.run("decrypt @/volume @/back RAW --sector-size 4096").done();
    let before = peak(&place);
    for tebibytes in [1_u64, 8] {
        let length = tebibytes << 40;
        let file = File::create(place.path("volume")).expect("create");
        if let Err(error) = file.set_len(length) {
            skip(&format!("{tebibytes} TiB: this filesystem has no such long files: {error}"));
            continue;
        }
        let plain = place.read("small")[..MIB].to_vec();
        // Data in the middle and at the end, holes elsewhere.
        for at in [length / 2, length - (1 << 20)] {
            let bytes = encrypted_at(&place.key(64), &plain, 4096, at / 4096);
            file.write_all_at(&bytes, at).expect("write");
        }
        let words = "RAW --sector-size 4096 --keep-holes";
        let _ = place.run(&format!("decrypt @/volume @/back {words} --force")).done();
        let _ = place.run(&format!("verify @/back @/volume {words}")).done();
        let grown = peak(&place) - before;
        assert!(grown < 32 << 20, "{grown} bytes more for {tebibytes} TiB");
        let back = File::open(place.path("back")).expect("open");
        let metadata = back.metadata().expect("metadata");
        assert_eq!(metadata.len(), length);
        assert!(metadata.blocks() * 512 < 16 << 20, "{} blocks", metadata.blocks());
        let mut bytes = vec![0; MIB];
        for at in [length / 2, length - (1 << 20)] {
            back.read_exact_at(&mut bytes, at).expect("read");
            assert!(bytes == plain);
        }
        back.read_exact_at(&mut bytes, length / 4).expect("read");
        assert!(bytes.iter().all(|byte| *byte == 0));
    }
}

// ---- starting by itself

/// How many daemons serve or try to serve a socket.
fn daemons_of(socket: &Path) -> usize {
    let socket = socket.to_str().expect("text").as_bytes();
    let processes = std::fs::read_dir("/proc").expect("proc").flatten();
    processes
        .filter_map(|process| std::fs::read(process.path().join("cmdline")).ok())
        .filter(|line| {
            let mut words = line.split(|byte| *byte == 0);
            words.next().is_some_and(|program| program.ends_with(b"cryptd"))
                && words.any(|word| word == socket)
        })
        .count()
}

#[test]
fn eight_first_callers_at_once_get_one_daemon() {
    as_each_user(|user| {
        let place = Place::bare(user);
        let plain = place.noise("plain", MIB);
        let jobs: Vec<_> = (0..8).map(|n| place.spawn(&format!("encrypt @/plain @/volume{n} RAW"))).collect();
        for job in jobs {
            let _ = job.wait().done();
        }
        eventually("the losers have left", || daemons_of(place.socket()) == 1);
        assert_eq!(place.jobs().len(), 8, "all of them met in one daemon");
        let expected = encrypted_at(&place.key(64), &plain, 512, 0);
        for n in 0..8 {
            assert!(place.read(&format!("volume{n}")) == expected);
        }
    });
}

#[test]
fn a_daemon_started_for_a_job_leaves_when_idle() {
    let place = Place::bare(User::Me);
    let _ = place.run("daemon start --idle-exit 1").done();
    round_trip(&place);
    eventually("it has left", || !place.socket().exists() && daemons_of(place.socket()) == 0);
    round_trip(&place);
}

#[test]
fn without_a_runtime_directory_the_socket_is_in_a_private_one_under_tmp() {
    if !is_root() {
        return skip("needs root, for a /tmp of its own");
    }
    let place = Place::bare(User::Me);
    let ctl = place.bin().join("cryptctl");
    let script = format!(
        "mount -t tmpfs tmpfs /tmp && {ctl} daemon start && {ctl} daemon status --json && stat -c %a:%F /tmp/cryptd-0 && \
         {ctl} daemon stop && chmod 755 /tmp/cryptd-0 && {ctl} daemon start",
        ctl = ctl.display()
    );
    if place.bin().starts_with("/tmp") {
        return skip("the programs are under /tmp, which this test hides");
    }
    let mut command = place.program(Path::new("unshare"));
    command.args(["--mount", "bash", "-c", &script]);
    let ran = place.finish(command).exit(3, &["only you can enter"]);
    let text = ran.text();
    assert!(text.contains("\"socket\":\"/tmp/cryptd-0/cryptd.sock\""), "{text}");
    assert!(text.contains("700:directory"), "{text}");
}

// ---- next to nothing inherited

#[test]
fn a_missing_directory_closed_standard_streams_and_an_empty_environment_do_no_harm() {
    as_each_user(|user| {
        let place = Place::bare(user);
        let plain = place.noise("plain", MIB);
        // The environment of every command here is empty but for PATH. The first of these starts the daemon.
        let gone = "mkdir @/gone && cd @/gone && rmdir @/gone &&";
        let _ = place.shell(&format!("{gone} $CTL encrypt @/plain @/volume RAW <&- >&- 2>&-")).done();
        let _ = place.shell(&format!("{gone} $CTL decrypt @/volume @/back RAW <&-")).done();
        assert!(place.read("back") == plain);
        let _ = place
            .shell("mkdir @/shut && cd @/shut && chmod 0 @/shut && $CTL verify @/plain @/volume RAW")
            .done();
        let _ = place.shell("$CTL encrypt @/plain - RAW 2>&- | cmp - @/volume").done();
        let mut command = place.command("verify @/plain @/volume RAW");
        command.env_clear();
        let _ = place.finish(command).done();
        // Closed standard output is not a sink: what would be opened next must not become one by accident.
        let ran = place.shell("$CTL encrypt @/plain - RAW >&-");
        assert!(ran.stdout.is_empty());
        assert!(place.read("plain") == plain && place.read("volume").len() == MIB);
    });
}

#[test]
fn a_relative_socket_is_found_again() {
    as_each_user(|user| {
        let place = Place::bare(user);
        let _ = place.noise("plain", MIB);
        let ctl = place.bin().join("cryptctl");
        let ctl = ctl.display();
        let _ = place
            .shell(&format!(
                "cd @ && {ctl} --socket here.sock encrypt @/plain @/volume RAW && \
                 {ctl} --socket here.sock --no-start verify @/plain @/volume RAW && {ctl} --socket @/here.sock daemon stop"
            ))
            .done();
        assert!(!place.path("here.sock").exists());
    });
}

// ---- secrets

/// Where any 16 bytes of the key, at their natural places, are in the memory of a process. Both halves of the volume
/// key and the first round keys of their schedules look like that.
fn traces(pid: u32, key: &[u8]) -> Vec<String> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).expect("maps");
    let memory = File::open(format!("/proc/{pid}/mem")).expect("root may read it");
    let mut found = Vec::new();
    let mut read = 0;
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (range, rights) = (words.next().expect("a range"), words.next().expect("rights"));
        if !rights.starts_with('r') || line.ends_with("[vvar]") || line.ends_with("[vsyscall]") {
            continue;
        }
        let (start, end) = range.split_once('-').expect("two ends");
        let number = |text| u64::from_str_radix(text, 16).expect("hexadecimal");
        let (start, end) = (number(start), number(end));
        let mut bytes = vec![0; usize::try_from(end - start).expect("fits")];
        if memory.read_exact_at(&mut bytes, start).is_err() {
            continue;
        }
        read += bytes.len();
        for (part, needle) in key.chunks_exact(16).enumerate() {
            let hits = bytes.windows(16).enumerate().filter(|(_, w)| w[0] == needle[0] && *w == needle);
            found.extend(hits.map(|(at, _)| format!("part {part} at offset {at:#x} of {line}")));
        }
    }
    assert!(read > MIB, "only {read} bytes could be read");
    found
}

#[test]
fn no_key_is_left_in_memory_logs_arguments_or_answers() {
    leaves_no_key(Start::new());
}

#[test]
fn no_key_is_left_by_the_portable_kernel_either() {
    leaves_no_key(Start::new().config("kernel = \"portable\""));
}

fn leaves_no_key(start: Start) {
    let place = Place::with(User::Me, start.config("log = \"trace\""));
    let _ = place.noise("plain", 8 * MIB);
    let key = place.key(64);
    let job = place.spawn("encrypt @/plain @/volume RAW --throttle 1M --chunk-size 64k --json");
    let id = place.moving();
    let (daemon, command) = (place.status().hello.pid, job.pid());
    if is_root() {
        assert!(
            !traces(daemon, &key).is_empty(),
            "a running job has its key somewhere, or this search finds nothing"
        );
    } else {
        skip("the search of the daemon's memory: needs root");
    }
    let mut told = Vec::new();
    for pid in [daemon, command] {
        for name in ["cmdline", "environ"] {
            // Both are closed to ourselves if we are not root: the processes are not dumpable.
            told.extend(std::fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default());
        }
    }
    let _ = place.run(&format!("job throttle {id} none")).done();
    let ran = job.wait().done();
    told.extend(&ran.stdout);
    told.extend(ran.stderr.as_bytes());
    for words in ["job list --json", "job show 1 --json", "stats --json", "daemon status --json"] {
        told.extend(&place.run(words).done().stdout);
    }
    told.extend(place.daemon.as_ref().expect("running").log().as_bytes());
    let text = String::from_utf8_lossy(&told).to_lowercase();
    for part in key.chunks_exact(8) {
        assert!(!told.windows(8).any(|window| window == part), "bytes of the key are told");
        let digits: String = part.iter().map(|byte| format!("{byte:02x}")).collect();
        assert!(!text.contains(&digits), "digits of the key are told");
        let list = part.iter().map(u8::to_string).collect::<Vec<_>>();
        assert!(
            !text.contains(&list.join(", ")) && !text.contains(&list.join(",")),
            "the key is told as a list"
        );
    }
    assert_eq!(place.jobs()[0].state, JobState::Done);
    if is_root() {
        // The job is done before its last reference to the key is dropped: look until it is gone.
        let mut left = Vec::new();
        for _ in 0..20 {
            left = traces(daemon, &key);
            if left.is_empty() {
                break;
            }
        }
        assert!(left.is_empty(), "{left:#?}");
    }
}

#[test]
fn neither_program_can_be_looked_into_by_its_own_user() {
    if !is_root() {
        return skip("needs root, to look as another user");
    }
    let place = Place::new(User::Nobody);
    let _ = place.noise("plain", 8 * MIB);
    let job = place.spawn("encrypt @/plain @/volume RAW --throttle 1M --chunk-size 64k");
    let id = place.moving();
    for pid in [place.status().hello.pid, job.pid()] {
        let mut look = place.program(Path::new("head"));
        look.args(["-c", "1"]).arg(format!("/proc/{pid}/mem")).stdin(Stdio::null());
        let _ = place.finish(look).exit(1, &["permission denied"]);
        let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).expect("limits");
        let core = limits.lines().find(|line| line.starts_with("Max core file size")).expect("a line");
        assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
    }
    let _ = place.run(&format!("job cancel {id}")).done();
    let _ = job.wait().exit(1, &["cancelled"]);
}
