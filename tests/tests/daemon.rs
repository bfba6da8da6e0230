//! The daemon as a process: how it starts, what it keeps of what it was started with, who is served last, how it ends.

use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::time::Duration;

use proto::{Body, Call, ErrorKind, JobState, Reply};
use rustix::process::Signal;
use tests::{Client, Daemon, Endless, Scratch, Start, eventually, is_root, program, skip};

const NOBODY: u32 = 65534;

fn state(client: &mut Client, job: proto::JobId) -> JobState {
    match client.call(Call::Show { job }) {
        Ok(Reply::Job(info)) => info.state,
        other => panic!("no job: {other:?}"),
    }
}

#[test]
fn of_eight_daemons_started_together_one_serves_and_seven_leave_with_success() {
    let scratch = Scratch::new();
    let start = Start::new();
    let mut children: Vec<_> = (0..8)
        .map(|_| start.command(scratch.path()).stderr(Stdio::piped()).spawn().expect("starts"))
        .collect();
    let mut left = 0;
    eventually("seven have left", || {
        children.retain_mut(|child| match child.try_wait().expect("child") {
            Some(status) => {
                let mut log = String::new();
                child.stderr.take().expect("piped").read_to_string(&mut log).expect("text");
                assert!(status.success() && log.contains("another cryptd serves"), "{status}: {log}");
                left += 1;
                false
            }
            None => true,
        });
        left >= 7
    });
    let mut client = Client::connect(&scratch.join("cryptd.sock"));
    let Ok(Reply::Hello(hello)) = client.call(Call::Hello {}) else { panic!("no hello") };
    assert_eq!(hello.pid, children[0].id());
    assert!(client.call(Call::Shutdown { now: false }).is_ok());
    assert!(children[0].wait().expect("child").success());
}

#[test]
fn a_stale_socket_is_replaced() {
    let scratch = Scratch::new();
    drop(UnixListener::bind(scratch.join("cryptd.sock")).expect("bound"));
    assert!(UnixStream::connect(scratch.join("cryptd.sock")).is_err(), "stale");
    let mut child = Start::new().command(scratch.path()).stderr(Stdio::null()).spawn().expect("starts");
    eventually("it serves", || UnixStream::connect(scratch.join("cryptd.sock")).is_ok());
    child.kill().expect("killed");
    child.wait().expect("child");
    // Killed: its socket is still there, and stale again.
    assert!(scratch.join("cryptd.sock").exists());
    let mut next = Start::new().command(scratch.path()).stderr(Stdio::null()).spawn().expect("starts");
    eventually("the next one serves", || UnixStream::connect(scratch.join("cryptd.sock")).is_ok());
    let mut client = Client::connect(&scratch.join("cryptd.sock"));
    assert!(client.call(Call::Shutdown { now: false }).is_ok());
    assert!(next.wait().expect("child").success());
    assert!(!scratch.join("cryptd.sock").exists(), "a clean end leaves no socket");
}

#[test]
fn a_socket_directory_of_somebody_else_is_refused() {
    if !is_root() {
        return skip("needs root, to give a directory away");
    }
    let scratch = Scratch::new();
    std::os::unix::fs::chown(scratch.path(), Some(NOBODY), None).expect("given away");
    let output = Start::new().command(scratch.path()).output().expect("runs");
    assert_eq!(output.status.code(), Some(1));
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(log.contains("belongs to user 65534"), "{log}");
}

#[test]
fn the_default_socket_is_in_a_private_directory() {
    let scratch = Scratch::new();
    let mut command = Command::new(program("cryptd"));
    command.env("XDG_RUNTIME_DIR", scratch.path()).stdin(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().expect("starts");
    let socket = scratch.join("cryptd/cryptd.sock");
    eventually("it serves", || UnixStream::connect(&socket).is_ok());
    let mode = std::fs::metadata(scratch.join("cryptd")).expect("directory").permissions();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&mode) & 0o777, 0o700);
    assert!(Client::connect(&socket).call(Call::Shutdown { now: false }).is_ok());
    assert!(child.wait().expect("child").success());
    // Opened to others, it is refused.
    rustix::fs::chmod(scratch.join("cryptd"), rustix::fs::Mode::from_raw_mode(0o755)).expect("opened");
    let output = command.stderr(Stdio::piped()).output().expect("runs");
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("expected 0700"));
}

#[test]
fn an_idle_daemon_leaves_but_not_under_a_client_or_a_job() {
    let mut daemon = Start::new().arg("--idle-exit").arg("1").daemon();
    let mut client = daemon.client();
    let (_job, writer, reader) = Endless::new(true).start(&mut client);
    drop(client);
    // Proves nothing by itself if the machine is slow; a daemon that ignored its job would be gone by then.
    std::thread::sleep(Duration::from_millis(1500));
    assert!(daemon.is_running(), "{}", daemon.log());
    drop(writer);
    drop(reader);
    assert!(daemon.wait().success());
    assert!(!daemon.socket().exists());
}

#[test]
fn what_the_starter_had_open_is_not_kept_open() {
    let scratch = Scratch::new();
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).expect("pipe");
    // A shell makes a lock and a pipe inheritable, as a cron script with its `exec 9>lock` does.
    let lock = scratch.join("lock");
    let mut child = Command::new("sh")
        .arg("-c")
        .arg("exec 9>\"$1\" 8>&0 0</dev/null; exec \"$0\" --socket \"$2\"")
        .args([&program("cryptd"), &lock, &scratch.join("cryptd.sock")])
        .stdin(write)
        .stderr(Stdio::null())
        .spawn()
        .expect("starts");
    eventually("it serves", || UnixStream::connect(scratch.join("cryptd.sock")).is_ok());
    let open: Vec<_> = std::fs::read_dir(format!("/proc/{}/fd", child.id()))
        .map(|dir| dir.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok()).collect())
        .unwrap_or_default();
    assert!(!open.contains(&lock), "{open:?}");
    // Had it kept the write end, this would never end.
    assert_eq!(std::fs::File::from(read).read(&mut [0; 1]).expect("end of file"), 0);
    let mut client = Client::connect(&scratch.join("cryptd.sock"));
    assert!(client.call(Call::Shutdown { now: false }).is_ok());
    assert!(child.wait().expect("child").success());
}

#[test]
fn a_socket_passed_by_systemd_is_served_and_left_in_place() {
    use std::os::unix::process::CommandExt;
    let scratch = Scratch::new();
    let path = scratch.join("activated.sock");
    let listener = UnixListener::bind(&path).expect("bound");
    // systemd's protocol: descriptor 3, and the process id in the environment. A shell sets both.
    let mut child = Command::new("sh")
        .arg("-c")
        .arg("exec env LISTEN_PID=$$ LISTEN_FDS=1 \"$0\" --idle-exit 1 3<&0 0</dev/null")
        .arg(program("cryptd"))
        .stdin(std::os::fd::OwnedFd::from(listener.try_clone().expect("duplicate")))
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .expect("starts");
    let mut client = Client::connect(&path);
    let Ok(Reply::Status(status)) = client.call(Call::Status {}) else { panic!("no status") };
    assert_eq!(status.socket, None, "it made none itself");
    drop(client);
    assert!(child.wait().expect("child").success(), "idle, it leaves");
    assert!(path.exists(), "the socket is systemd's");
}

#[test]
fn sigterm_waits_for_the_jobs_and_refuses_new_ones() {
    let mut daemon = Daemon::start();
    let mut client = daemon.client();
    let (job, writer, reader) = Endless::new(false).start(&mut client);
    daemon.signal(Signal::TERM);
    eventually("new jobs are refused", || {
        let job = Endless::new(false);
        match client.call_with(Call::Submit(Box::new(job.submit.clone())), &job.descriptors()) {
            Err(failure) => failure.kind == ErrorKind::ShuttingDown,
            Ok(Reply::Submitted { job, .. }) => client.call(Call::Cancel { job }).is_err(),
            Ok(other) => panic!("{other:?}"),
        }
    });
    assert!(daemon.is_running());
    assert!(!state(&mut client, job).is_final());
    client.request(Call::Watch { job, interval_ms: None }, &[]);
    assert!(matches!(client.receive().expect("the job").body, Body::Ok(Reply::Job(_))));
    drop(writer);
    // The job's output is drained so that it can end by itself.
    let mut out = std::fs::File::from(reader);
    std::thread::spawn(move || std::io::copy(&mut out, &mut std::io::sink()));
    assert_eq!(client.finished().1.state, JobState::Done);
    assert!(daemon.wait().success());
}

#[test]
fn a_second_signal_cancels() {
    for (first, second) in [(Signal::TERM, Signal::TERM), (Signal::INT, Signal::INT)] {
        let mut daemon = Daemon::start();
        let mut client = daemon.client();
        let (job, _writer, _reader) = Endless::new(true).start(&mut client);
        client.request(Call::Watch { job, interval_ms: Some(60_000) }, &[]);
        daemon.signal(first);
        eventually("it is leaving", || daemon.log().contains("leaving"));
        daemon.signal(second);
        assert!(matches!(client.receive().expect("the job").body, Body::Ok(_)));
        assert_eq!(client.finished().1.state, JobState::Cancelled);
        assert!(daemon.wait().success());
    }
}

#[test]
fn shutdown_now_cancels_and_shutdown_waits() {
    let mut daemon = Daemon::start();
    let mut client = daemon.client();
    let (_job, _writer, _reader) = Endless::new(true).start(&mut client);
    assert_eq!(client.call(Call::Shutdown { now: false }), Ok(Reply::ShuttingDown { jobs: 1, exports: 0 }));
    assert!(client.call(Call::Hello {}).is_ok(), "it waits for the job");
    assert_eq!(client.call(Call::Shutdown { now: true }), Ok(Reply::ShuttingDown { jobs: 1, exports: 0 }));
    assert!(daemon.wait().success());
}

#[test]
fn a_wrong_configuration_is_a_usage_error_that_names_file_key_and_what_is_allowed() {
    let scratch = Scratch::new();
    for (config, parts) in [
        ("wrokers = 2", ["cryptd.toml", "wrokers", "expected one of"]),
        ("workers = 100000", ["cryptd.toml", "workers = 100000", "allowed: 1 to"]),
        ("queue = \"magic\"", ["cryptd.toml", "magic", "auto, io_uring, threads"]),
        ("kernel = \"rot13\"", ["cryptd.toml", "rot13", "portable"]),
        ("workers = ", ["cryptd.toml", "workers", "line 1"]),
    ] {
        let output = Start::new().config(config).command(scratch.path()).output().expect("runs");
        let log = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{config}: {log}");
        for part in parts {
            assert!(log.contains(part), "{config}: {part} is not in {log}");
        }
    }
    let checked = Start::new().config("workers = 1").arg("--check").command(scratch.path()).status();
    assert!(checked.expect("runs").success());
    let missing =
        Command::new(program("cryptd")).args(["--config", "/nonexistent.toml"]).output().expect("runs");
    assert_eq!(missing.status.code(), Some(1));
    let sample = concat!(env!("CARGO_MANIFEST_DIR"), "/../tools/systemd/cryptd.toml");
    let sample = std::fs::read_to_string(sample).expect("the sample is there");
    // As shipped, and with every commented key switched on.
    for text in [sample.clone(), sample.replace("\n#! ", "\n")] {
        let status =
            Start::new().config(&text).arg("--check").command(scratch.path()).output().expect("runs");
        assert!(status.status.success(), "{}", String::from_utf8_lossy(&status.stderr));
    }
}

#[test]
fn the_process_cannot_be_dumped_or_traced() {
    // Root may look into everything, so the daemon and who looks are one unprivileged user.
    let start = if is_root() { Start::new().user(NOBODY) } else { Start::new() };
    let daemon = start.daemon();
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", daemon.pid())).expect("limits");
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).expect("core limit");
    assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).expect("status");
    assert!(status.lines().any(|line| line.starts_with("NoNewPrivs:") && line.ends_with('1')), "{status}");
    let mut plain = as_unprivileged(Command::new("sleep").arg("600")).spawn().expect("starts");
    eventually("it runs", || {
        std::fs::read_to_string(format!("/proc/{}/comm", plain.id())).is_ok_and(|name| name.trim() == "sleep")
    });
    for (pid, seen) in [(plain.id(), true), (daemon.pid(), false)] {
        let listed = as_unprivileged(Command::new("ls").arg(format!("/proc/{pid}/fd")))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        assert_eq!(listed.expect("ls runs").success(), seen, "descriptors of {pid}");
        let opened = as_unprivileged(Command::new("sh").arg("-c").arg(format!("exec 3</proc/{pid}/mem")))
            .stderr(Stdio::null())
            .status();
        assert_eq!(opened.expect("sh runs").success(), seen, "memory of {pid}");
    }
    plain.kill().expect("killed");
    plain.wait().expect("child");
}

fn as_unprivileged(command: &mut Command) -> &mut Command {
    use std::os::unix::process::CommandExt;
    if is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    command.current_dir("/")
}
