//! The control protocol against a real daemon: what it refuses, what it survives, who may do what.

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

use proto::{Body, Call, ErrorKind, Event, JobState, Reply};
use rustix::process::Signal;
use tests::{Client, Daemon, Endless, PATIENCE, Random, Scratch, Start, eventually, is_root, skip};

const NOBODY: u32 = 65534;

fn kind<T: std::fmt::Debug>(result: Result<T, proto::Failure>) -> ErrorKind {
    result.expect_err("refused").kind
}

fn active(client: &mut Client) -> u32 {
    match client.call(Call::Status {}) {
        Ok(Reply::Status(status)) => status.active_jobs,
        other => panic!("no status: {other:?}"),
    }
}

fn state(client: &mut Client, job: proto::JobId) -> JobState {
    match client.call(Call::Show { job }) {
        Ok(Reply::Job(info)) => info.state,
        other => panic!("no job: {other:?}"),
    }
}

// ---- lines

#[test]
fn hello_and_status_say_who_answers() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let Ok(Reply::Hello(hello)) = client.call(Call::Hello {}) else { panic!("no hello") };
    assert_eq!((hello.protocol, hello.pid), (proto::PROTOCOL_VERSION, daemon.pid()));
    assert_eq!(hello.uid, rustix::process::geteuid().as_raw());
    let Ok(Reply::Status(status)) = client.call(Call::Status {}) else { panic!("no status") };
    assert_eq!(status.socket.as_deref(), daemon.socket().to_str());
    assert!(proto::KERNELS.contains(&status.kernel.as_str()) && !status.kernel_forced);
    assert_eq!((status.active_jobs, status.idle_exit_seconds), (0, None));
    assert!(status.rss_bytes > 0 && status.rss_peak_bytes >= status.rss_bytes / 2);
    assert_eq!(client.call(Call::List {}), Ok(Reply::Jobs(vec![])));
}

#[test]
fn wrong_lines_are_refused_one_by_one_and_the_connection_lives_on() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    for (line, id, expected) in [
        ("{\"v\":1,\"id\":5,\"call\":{\"list\":{}},\"verbose\":true}", 5, ErrorKind::Invalid),
        ("{\"v\":1,\"id\":6,\"call\":{\"show\":{\"job\":1,\"x\":1}}}", 6, ErrorKind::Invalid),
        ("{\"v\":1,\"id\":7,\"call\":{\"teleport\":{}}}", 7, ErrorKind::Invalid),
        ("{\"v\":2,\"id\":8,\"call\":{\"teleport\":{}}}", 8, ErrorKind::Version),
        ("{\"id\":9,\"call\":{\"list\":{}}}", 9, ErrorKind::Invalid),
        ("", 0, ErrorKind::Invalid),
        ("\0\u{1}garbage", 0, ErrorKind::Invalid),
    ] {
        client.send(format!("{line}\n").as_bytes()).expect("sent");
        let (got, kind, message) = client.refusal();
        assert_eq!((got, kind), (id, expected), "{line}: {message}");
    }
    assert!(client.call(Call::Hello {}).is_ok());
}

#[test]
fn hello_is_answered_in_every_version() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    client.send(b"{\"v\":7,\"id\":3,\"call\":{\"hello\":{\"x\":1}}}\n").expect("sent");
    let response = client.receive().expect("a reply");
    assert!(matches!(response.body, Body::Ok(Reply::Hello(hello)) if hello.protocol == 1));
    assert_eq!(response.id, 3);
}

#[test]
fn a_line_of_exactly_the_longest_length_is_read_and_one_byte_more_ends_the_connection() {
    let daemon = Daemon::start();
    let padded = |length: usize| {
        let line = "{\"v\":1,\"id\":4,\"call\":{\"hello\":{}}}";
        format!("{line}{}\n", " ".repeat(length - line.len() - 1))
    };
    let mut client = daemon.client();
    client.send(padded(proto::MAX_LINE).as_bytes()).expect("sent");
    assert!(matches!(client.receive().expect("a reply").body, Body::Ok(Reply::Hello(_))));
    // The daemon may close while we still send.
    let _ = client.send(padded(proto::MAX_LINE + 1).as_bytes());
    let (id, kind, _) = client.refusal();
    assert_eq!((id, kind), (0, ErrorKind::Limit));
    assert!(client.receive().is_none(), "closed after one answer");
}

#[test]
fn an_endless_line_ends_the_connection_and_costs_no_memory() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let junk = vec![b'x'; 1 << 20];
    for _ in 0..64 {
        if client.send(&junk).is_err() {
            break;
        }
    }
    assert_eq!(client.refusal().1, ErrorKind::Limit);
    assert!(daemon.client().call(Call::Hello {}).is_ok());
}

#[test]
fn half_a_line_may_end_there_and_may_come_in_pieces() {
    let mut daemon = Daemon::start();
    let mut half = daemon.client();
    half.send(b"{\"v\":1,\"id\":4,\"ca").expect("sent");
    drop(half);
    let mut client = daemon.client();
    for byte in b"{\"v\":1,\"id\":4,\"call\":{\"hello\":{}}}\n" {
        client.send(&[*byte]).expect("sent");
    }
    assert!(matches!(client.receive().expect("a reply").body, Body::Ok(Reply::Hello(_))));
    assert!(daemon.is_running());
}

#[test]
fn requests_sent_together_are_answered_in_order_also_after_the_client_closed_its_side() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let lines: String =
        (1..=100).map(|id| format!("{{\"v\":1,\"id\":{id},\"call\":{{\"list\":{{}}}}}}\n")).collect();
    client.send(lines.as_bytes()).expect("sent");
    client.stream().shutdown(std::net::Shutdown::Write).expect("shut down");
    for id in 1..=100 {
        assert_eq!(client.receive().expect("a reply").id, id);
    }
    assert!(client.receive().is_none());
}

// ---- descriptors

#[test]
fn too_many_descriptors_end_the_connection_and_are_closed() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let (read, write) = rustix::pipe::pipe().expect("pipe");
    let many = vec![write.as_fd(); proto::MAX_DESCRIPTORS + 1];
    client.send_with(b"{\"v\":1,\"id\":1,\"call\":{\"list\":{}}}\n", &many);
    let (_, kind, message) = client.refusal();
    assert_eq!(kind, ErrorKind::Limit, "{message}");
    assert!(client.receive().is_none());
    // Were a copy of the write end still open in the daemon, this read would never end.
    drop(write);
    assert_eq!(std::fs::File::from(read).read(&mut [0; 1]).expect("end of file"), 0);
}

#[test]
fn descriptors_spread_over_a_line_are_counted_together() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let (_read, write) = rustix::pipe::pipe().expect("pipe");
    for part in ["{\"v\":1,", "\"id\":1,", "\"call\":{\"list\":{}}}\n"] {
        client.send_with(part.as_bytes(), &[write.as_fd(); proto::MAX_DESCRIPTORS / 2]);
    }
    assert_eq!(client.refusal().1, ErrorKind::Limit);
}

#[test]
fn descriptors_where_none_are_named_are_refused() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let (_read, write) = rustix::pipe::pipe().expect("pipe");
    assert_eq!(kind(client.call_with(Call::List {}, &[write.as_fd()])), ErrorKind::Invalid);
    assert!(client.call(Call::List {}).is_ok());
}

#[test]
fn descriptors_meet_the_line_they_came_with() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let (_read, write) = rustix::pipe::pipe().expect("pipe");
    // Both lines are there before the daemon looks, or not: the descriptor is the second's in either case.
    for _ in 0..50 {
        let first = client.request(Call::List {}, &[]);
        let second = client.request(Call::List {}, &[write.as_fd()]);
        let response = client.receive().expect("a reply");
        assert!(response.id == first && matches!(response.body, Body::Ok(_)), "{response:?}");
        assert_eq!(client.refusal().0, second);
    }
}

#[test]
fn a_descriptor_whose_closing_hangs_does_not_hang_the_daemon() {
    use std::net::{TcpListener, TcpStream};
    // Closing it takes until its other end has read everything: never.
    let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
    let mut hanging = TcpStream::connect(listener.local_addr().expect("address")).expect("connected");
    let (far, _) = listener.accept().expect("accepted");
    hanging.set_nonblocking(true).expect("nonblocking");
    while hanging.write(&[0; 1 << 16]).is_ok() {}
    hanging.set_nonblocking(false).expect("blocking");
    rustix::net::sockopt::set_socket_linger(&hanging, Some(Duration::from_secs(3600))).expect("lingers");

    let mut daemon = Daemon::start();
    let mut client = daemon.client();
    let mut gone = daemon.client();
    client.send_with(b"{\"v\":1,\"id\":1,", &[hanging.as_fd()]);
    gone.send_with(b"{\"v\":1,\"id\":1,", &[hanging.as_fd()]);
    // The daemon's copies, or those on their way, are the last.
    drop(hanging);
    // One is closed with a refused line, the last with its connection.
    client.send(b"\"call\":{\"list\":{}}}\n").expect("sent");
    assert_eq!(client.refusal().1, ErrorKind::Invalid);
    drop(gone);
    let mut other = daemon.client();
    for _ in 0..10 {
        assert!(other.call(Call::Hello {}).is_ok());
    }
    // Nor does it keep the daemon from leaving.
    assert!(other.call(Call::Shutdown { now: false }).is_ok());
    assert!(daemon.wait().success());
    drop(far);
}

#[test]
fn a_submission_names_each_descriptor_once_and_none_that_is_missing() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let job = Endless::new(false);
    let [source, sink, key] = job.descriptors();
    let missing = client.call_with(Call::Submit(Box::new(job.submit.clone())), &[source, sink]);
    let missing = missing.expect_err("refused");
    assert_eq!(missing.kind, ErrorKind::Invalid);
    assert!(missing.message.contains("descriptor 2 (key) was not sent"), "{}", missing.message);
    let unnamed = client.call_with(Call::Submit(Box::new(job.submit.clone())), &[source, sink, key, key]);
    assert_eq!(kind(unnamed), ErrorKind::Invalid);
    let mut twice = job.submit.clone();
    twice.volume.as_mut().expect("a volume").key_fd = 0;
    assert_eq!(kind(client.call_with(Call::Submit(Box::new(twice)), &[source, sink])), ErrorKind::Invalid);
    assert_eq!(active(&mut client), 0);
}

#[test]
fn a_key_of_the_wrong_kind_is_refused() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let file = std::fs::File::open("/proc/self/exe").expect("opens");
    let (open_read, _open_write) = rustix::pipe::pipe().expect("pipe");
    let (socket, _other) = UnixStream::pair().expect("pair");
    for wrong in [file.as_fd(), open_read.as_fd(), socket.as_fd()] {
        let job = Endless::new(false);
        let [source, sink, _] = job.descriptors();
        let refused = client.call_with(Call::Submit(Box::new(job.submit.clone())), &[source, sink, wrong]);
        assert_eq!(kind(refused), ErrorKind::Invalid);
    }
    assert_eq!(active(&mut client), 0);
}

// ---- jobs and connections

#[test]
fn a_job_ends_with_its_connection_unless_detached() {
    let daemon = Daemon::start();
    let mut watcher = daemon.client();
    let mut client = daemon.client();
    let (attached, _writer, _reader) = Endless::new(false).start(&mut client);
    let (detached, writer, reader) = Endless::new(true).start(&mut client);
    drop(client);
    eventually("the attached job is cancelled", || state(&mut watcher, attached) == JobState::Cancelled);
    assert!(!state(&mut watcher, detached).is_final());
    drop(writer);
    drop(reader);
    eventually("the detached job ends", || active(&mut watcher) == 0);
}

/// `format --header`, with the header under its partial name; iterations decide how long it takes.
fn format_detached(client: &mut Client, scratch: &Scratch, iterations: u32, keep_partial: bool) {
    let new = tests::jobs::new_luks(proto::luks::Version::Luks2, None);
    let header = std::fs::File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(scratch.join("header.partial"))
        .expect("partial header");
    let directory = std::fs::File::open(scratch.path()).expect("directory");
    let key = tests::secret_pipe(b"one");
    let commit = proto::Commit {
        dir_fd: 1,
        partial: "header.partial".into(),
        name: "header".into(),
        replace: false,
        keep_partial,
    };
    let header_file = proto::luks::NewFile { fd: 0, name: "header".into(), commit: Some(commit) };
    let kdf = proto::luks::KdfWish { iterations: Some(iterations), ..new.kdf.clone() };
    let new = Box::new(proto::luks::New { header: Some(header_file), kdf, ..new });
    let operation = proto::luks::Operation::Format { new, key_fd: 2 };
    let request =
        proto::luks::Request { volume: None, header: None, lock_fd: None, remotes: Vec::new(), operation };
    let _ = client.request(Call::Luks(Box::new(request)), &[header.as_fd(), directory.as_fd(), key.as_fd()]);
}

#[test]
fn the_partial_file_of_a_header_operation_goes_when_it_fails_or_nobody_waits() {
    let daemon = Daemon::start();
    // Nobody waits: the client is gone while the passphrase is hashed.
    let scratch = Scratch::new();
    let mut client = daemon.client();
    format_detached(&mut client, &scratch, 5_000_000, false);
    drop(client);
    eventually("the partial header is gone", || !scratch.join("header.partial").exists());
    assert!(!scratch.join("header").exists());
    // It fails: its name is taken. The client lives, and could not know.
    for (keep_partial, left) in [(false, false), (true, true)] {
        let scratch = Scratch::new();
        let _ = scratch.file("header", b"taken");
        let mut client = daemon.client();
        format_detached(&mut client, &scratch, 1000, keep_partial);
        assert_eq!(client.refusal().1, ErrorKind::Conflict);
        assert_eq!(scratch.join("header.partial").exists(), left);
        assert_eq!(std::fs::read(scratch.join("header")).expect("there"), b"taken");
    }
    // It succeeds.
    let scratch = Scratch::new();
    let mut client = daemon.client();
    format_detached(&mut client, &scratch, 1000, false);
    assert!(matches!(client.receive().expect("an answer").body, Body::Ok(Reply::Luks(_))));
    assert!(scratch.join("header").exists() && !scratch.join("header.partial").exists());
}

#[test]
fn a_watch_tells_every_state_and_ends_with_the_end() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let (job, _writer, _reader) = Endless::new(false).start(&mut client);
    let id = client.request(Call::Watch { job, interval_ms: Some(100) }, &[]);
    let first = client.receive().expect("the job");
    assert!(first.id == id && matches!(first.body, Body::Ok(Reply::Job(info)) if info.job == job));
    // Another connection acts; the watch must tell.
    let mut other = daemon.client();
    assert!(other.call(Call::Pause { job }).is_ok());
    eventually("paused", || state(&mut other, job) == JobState::Paused);
    assert!(other.call(Call::Cancel { job }).is_ok());
    let (events, end) = client.finished();
    assert_eq!((end.job, end.state), (job, JobState::Cancelled));
    assert!(events.iter().all(|event| match event {
        Event::State { job: of, .. } | Event::Progress { job: of, .. } => *of == job,
        Event::Finished(_) => false,
    }));
    // The watch is over: the connection is a plain one again, and a watch of an ended job says so at once.
    assert!(matches!(client.call(Call::Watch { job, interval_ms: None }), Ok(Reply::Job(_))));
    assert_eq!(client.finished().1.state, JobState::Cancelled);
    assert_eq!(kind(client.call(Call::Cancel { job })), ErrorKind::Conflict);
    assert_eq!(kind(client.call(Call::Show { job: job + 1000 })), ErrorKind::NotFound);
    assert_eq!(kind(client.call(Call::Watch { job, interval_ms: Some(1) })), ErrorKind::Invalid);
}

#[test]
fn watches_are_bounded() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let (job, _writer, _reader) = Endless::new(true).start(&mut client);
    let mut watcher = daemon.client();
    let watch = Call::Watch { job, interval_ms: Some(60_000) };
    let mut granted = 0;
    let id = loop {
        watcher.request(watch.clone(), &[]);
        // News of a watch may come between two replies.
        let response = loop {
            let response = watcher.receive().expect("a reply");
            if !matches!(response.body, Body::Event(_)) {
                break response;
            }
        };
        match response.body {
            Body::Ok(_) => granted += 1,
            Body::Error(failure) => break failure.kind,
            Body::Event(_) => unreachable!(),
        }
    };
    assert_eq!((granted, id), (engine::limits::WATCHES_MAX, ErrorKind::Limit));
}

#[test]
fn a_thousand_idle_connections_leave_room_for_a_working_one() {
    let daemon = Daemon::start();
    raise_own_descriptor_limit();
    let idle: Vec<UnixStream> =
        (0..1000).map(|_| UnixStream::connect(daemon.socket()).expect("connected")).collect();
    let mut client = daemon.client();
    let (job, _writer, _reader) = Endless::new(false).start(&mut client);
    assert!(client.call(Call::Cancel { job }).is_ok());
    let Ok(Reply::Status(status)) = client.call(Call::Status {}) else { panic!("no status") };
    assert!(status.rss_bytes < 96 << 20, "{} bytes", status.rss_bytes);
    // Each of them was admitted, not merely queued.
    let mut last = Client::over(idle.into_iter().next_back().expect("a thousand"));
    assert!(last.call(Call::Hello {}).is_ok());
}

#[test]
fn one_user_cannot_take_every_connection() {
    let daemon = Daemon::start();
    raise_own_descriptor_limit();
    let most = engine::limits::CONNECTIONS_PER_USER_MAX;
    let mut held: Vec<UnixStream> = Vec::new();
    for _ in 0..most {
        held.push(UnixStream::connect(daemon.socket()).expect("connected"));
    }
    assert!(
        Client::over(held.pop().expect("one")).call(Call::Hello {}).is_ok(),
        "the last of them is served"
    );
    held.push(UnixStream::connect(daemon.socket()).expect("connected"));
    eventually("one more is told so and let go", || {
        let mut client = Client::over(UnixStream::connect(daemon.socket()).expect("connected"));
        matches!(client.receive(), Some(response)
            if matches!(&response.body, Body::Error(failure) if failure.kind == ErrorKind::Limit))
    });
}

fn raise_own_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }).expect("raised");
}

#[test]
fn a_client_that_never_reads_is_let_go_and_its_job_cancelled() {
    let daemon = Start::new().config("client_stall = 1").daemon();
    let mut deaf = daemon.client();
    let (job, _writer, _reader) = Endless::new(false).start(&mut deaf);
    let line = b"{\"v\":1,\"id\":1,\"call\":{\"status\":{}}}\n".repeat(1000);
    deaf.stream().set_write_timeout(Some(Duration::from_millis(200))).expect("timeout");
    // Until the daemon takes no more: it stops asking a client that does not read.
    let refused = (0..1000).find_map(|_| deaf.send(&line).err());
    assert!(refused.is_some(), "requests were taken without end");
    let mut watcher = daemon.client();
    eventually("its job is cancelled", || state(&mut watcher, job) == JobState::Cancelled);
}

/// A finished job with the longest names there are, in which every byte is escaped on the wire.
fn long_names(client: &mut Client) -> proto::JobId {
    let mut job = Endless::new(true);
    let name = "\u{1}".repeat(proto::MAX_NAME);
    job.submit.source.as_mut().expect("a source").name.clone_from(&name);
    job.submit.sink.as_mut().expect("a sink").name = name;
    let (job, _writer, _reader) = job.start(client);
    assert!(client.call(Call::Cancel { job }).is_ok());
    eventually("cancelled", || state(client, job).is_final());
    job
}

#[test]
fn a_list_shortens_names_and_show_has_them_whole() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let job = long_names(&mut client);
    let Ok(Reply::Jobs(jobs)) = client.call(Call::List {}) else { panic!("no list") };
    assert!(jobs[0].source.len() <= engine::limits::LIST_TEXT, "{}", jobs[0].source.len());
    let Ok(Reply::Job(info)) = client.call(Call::Show { job }) else { panic!("no job") };
    assert_eq!((info.source.len(), info.sink.len()), (proto::MAX_NAME, proto::MAX_NAME));
}

#[test]
fn replies_left_unread_on_many_connections_are_bounded_together() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let job = long_names(&mut client);
    let line = format!("{{\"v\":1,\"id\":1,\"call\":{{\"show\":{{\"job\":{job}}}}}}}\n").repeat(16);
    let mut deaf: Vec<Client> = Vec::new();
    for _ in 0..400 {
        let mut connection = daemon.client();
        // The daemon may let it go while we still send.
        let _ = connection.send(line.as_bytes());
        deaf.push(connection);
    }
    eventually("one is let go", || daemon.log().contains("the connection with most is disconnected"));
    let Ok(Reply::Status(status)) = client.call(Call::Status {}) else { panic!("no status") };
    assert!(status.rss_bytes < 128 << 20, "{} bytes", status.rss_bytes);
}

#[test]
fn the_end_of_a_job_is_told_also_if_it_is_forgotten_at_once() {
    let daemon = Start::new().config("remembered_max = 1").daemon();
    let mut client = daemon.client();
    let jobs: Vec<_> = (0..8).map(|_| Endless::new(false).start(&mut client)).collect();
    // From the newest: of two that have ended, the older is the one forgotten.
    for (job, _, _) in jobs.iter().rev() {
        let mut watcher = daemon.client();
        assert!(matches!(watcher.call(Call::Watch { job: *job, interval_ms: None }), Ok(Reply::Job(_))));
        assert!(client.call(Call::Cancel { job: *job }).is_ok());
        assert_eq!(watcher.finished().1.state, JobState::Cancelled);
    }
}

#[test]
fn memory_that_cannot_be_locked_is_told_once_with_the_number_needed() {
    let start =
        Start::new().config("queue = \"threads\"\nworkers = 1").under(&["prlimit", "--memlock=65536"]);
    // Root may lock without a limit.
    let daemon = if is_root() { start.user(NOBODY) } else { start }.daemon();
    let mut client = daemon.client();
    let mut warnings = || {
        let job = Endless::new(false);
        match client.call_with(Call::Submit(Box::new(job.submit.clone())), &job.descriptors()) {
            Ok(Reply::Submitted { warnings, .. }) => warnings,
            other => panic!("not submitted: {other:?}"),
        }
    };
    let needed = (engine::limits::WORKER_MEMORY + (1 << 20)).to_string();
    let first = warnings();
    assert!(first.iter().any(|warning| warning.contains(&needed) && warning.contains("65536")), "{first:?}");
    assert!(!warnings().iter().any(|warning| warning.contains(&needed)));
}

#[test]
fn statistics_of_all_jobs_are_of_none_in_particular() {
    let daemon = Daemon::start();
    let mut client = daemon.client();
    let (job, _writer, _reader) = Endless::new(false).start(&mut client);
    for asked in [None, Some(job)] {
        let Ok(Reply::Stats(stats)) = client.call(Call::Stats { job: asked }) else {
            panic!("no statistics")
        };
        assert_eq!(stats.job, asked);
    }
    assert_eq!(kind(client.call(Call::Stats { job: Some(job + 1) })), ErrorKind::NotFound);
}

#[test]
fn a_slow_reader_misses_progress_but_not_the_end() {
    let daemon = Daemon::start();
    let mut slow = daemon.client();
    let (job, _writer, _reader) = Endless::new(false).start(&mut slow);
    slow.request(Call::Watch { job, interval_ms: Some(100) }, &[]);
    // Its buffers are full of replies before the job ends.
    let line = b"{\"v\":1,\"id\":77,\"call\":{\"status\":{}}}\n".repeat(1000);
    slow.stream().set_write_timeout(Some(Duration::from_millis(200))).expect("timeout");
    assert!((0..1000).any(|_| slow.send(&line).is_err()));
    let mut other = daemon.client();
    assert!(other.call(Call::Cancel { job }).is_ok());
    eventually("cancelled", || state(&mut other, job) == JobState::Cancelled);
    loop {
        let response = slow.receive().expect("the end comes before the connection's");
        if let Body::Event(Event::Finished(info)) = response.body {
            assert_eq!((info.job, info.state), (job, JobState::Cancelled));
            break;
        }
    }
}

#[test]
fn the_end_of_a_job_reaches_a_slow_reader_also_when_the_daemon_leaves() {
    let mut daemon = Daemon::start();
    let mut slow = daemon.client();
    let (job, _writer, _reader) = Endless::new(false).start(&mut slow);
    slow.request(Call::Watch { job, interval_ms: Some(100) }, &[]);
    let line = b"{\"v\":1,\"id\":77,\"call\":{\"status\":{}}}\n".repeat(1000);
    slow.stream().set_write_timeout(Some(Duration::from_millis(200))).expect("timeout");
    assert!((0..1000).any(|_| slow.send(&line).is_err()));
    daemon.signal(Signal::TERM);
    eventually("it is leaving", || daemon.log().contains("leaving"));
    daemon.signal(Signal::TERM);
    let finished = std::iter::from_fn(|| slow.receive()).any(
        |response| matches!(response.body, Body::Event(Event::Finished(info)) if info.state == JobState::Cancelled),
    );
    assert!(finished, "the connection ended without the job's end");
    drop(slow);
    assert!(daemon.wait().success());
}

// ---- users

/// Run by `other_users_are_kept_apart` as another user: prints how each verb was answered.
#[test]
fn as_another_user() {
    let Some(socket) = std::env::var_os("TEST_SOCKET") else { return };
    let job: u64 = std::env::var("TEST_JOB").expect("a job").parse().expect("a number");
    let mut client = Client::connect(socket.as_ref());
    let mut say = |name: &str, call: Call| match client.call(call) {
        Ok(Reply::Jobs(jobs)) => println!("{name}={} jobs", jobs.len()),
        Ok(Reply::Stats(stats)) => println!("{name}={} bytes", stats.bytes),
        Ok(_) => println!("{name}=ok"),
        Err(failure) => println!("{name}={:?}", failure.kind),
    };
    say("hello", Call::Hello {});
    say("status", Call::Status {});
    say("list", Call::List {});
    say("show", Call::Show { job });
    say("watch", Call::Watch { job, interval_ms: None });
    say("pause", Call::Pause { job });
    say("resume", Call::Resume { job });
    say("cancel", Call::Cancel { job });
    say("throttle", Call::Throttle { job, bytes_per_second: Some(1) });
    say("stats of it", Call::Stats { job: Some(job) });
    say("shutdown", Call::Shutdown { now: true });
    let (own, _writer, _reader) = Endless::new(false).start(&mut client);
    println!("submit=ok");
    match client.call(Call::List {}) {
        Ok(Reply::Jobs(jobs)) => println!("own list={} jobs", jobs.len()),
        other => panic!("no list: {other:?}"),
    }
    println!("own cancel={}", client.call(Call::Cancel { job: own }).is_ok());
}

#[test]
fn other_users_are_kept_apart() {
    use std::os::unix::process::CommandExt;
    if !is_root() {
        return skip("needs root, to become another user");
    }
    let daemon = Start::new().config("socket_mode = \"0666\"").daemon();
    let mut root = daemon.client();
    let (job, _writer, _reader) = Endless::new(false).start(&mut root);
    // What that user needs: the way to the socket, and a copy of this program where it may run it.
    let open = rustix::fs::Mode::from_raw_mode(0o755);
    rustix::fs::chmod(daemon.dir.path(), open).expect("opened");
    let copy = daemon.dir.join("as-another-user");
    std::fs::copy(std::env::current_exe().expect("a path"), &copy).expect("copied");
    rustix::fs::chmod(&copy, open).expect("opened");
    let output = Command::new(&copy)
        .args(["--exact", "as_another_user", "--nocapture"])
        .env("TEST_SOCKET", daemon.socket())
        .env("TEST_JOB", job.to_string())
        .current_dir("/")
        .uid(NOBODY)
        .gid(NOBODY)
        .output()
        .expect("runs");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    for line in [
        "hello=ok",
        "status=ok",
        "list=0 jobs",
        "show=Denied",
        "watch=Denied",
        "pause=Denied",
        "resume=Denied",
        "cancel=Denied",
        "throttle=Denied",
        "stats of it=Denied",
        "shutdown=Denied",
        "submit=ok",
        "own list=1 jobs",
        "own cancel=true",
    ] {
        assert!(text.lines().any(|said| said.ends_with(line)), "{line} is not in:\n{text}");
    }
    // Root sees both, and its own is untouched.
    let Ok(Reply::Jobs(jobs)) = root.call(Call::List {}) else { panic!("no list") };
    assert_eq!(jobs.iter().map(|job| job.uid).collect::<Vec<_>>(), [0, NOBODY]);
    assert!(!jobs[0].state.is_final());
}

#[test]
fn a_socket_closed_to_others_is_closed() {
    if !is_root() {
        return skip("needs root, to run a daemon as another user");
    }
    let daemon = Start::new().user(NOBODY).daemon();
    let mode = std::fs::metadata(daemon.socket()).expect("socket").permissions();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&mode) & 0o777, 0o600);
    // Root may enter all the same, and shut it down.
    let mut root = daemon.client();
    let Ok(Reply::Hello(hello)) = root.call(Call::Hello {}) else { panic!("no hello") };
    assert_eq!(hello.uid, NOBODY);
    assert_eq!(root.call(Call::Shutdown { now: false }), Ok(Reply::ShuttingDown { jobs: 0, exports: 0 }));
}

// ---- the parser, on whatever may come

#[test]
fn mutated_lines_never_panic_and_what_is_accepted_is_understood_alike_again() {
    let mut random = Random::new(tests::seed());
    let corpus: &[&[u8]] = &[
        b"{\"v\":1,\"id\":7,\"call\":{\"show\":{\"job\":3}}}\n",
        b"{\"v\":1,\"id\":7,\"call\":{\"watch\":{\"job\":3,\"interval_ms\":500}}}\n",
        b"{\"v\":1,\"id\":18446744073709551615,\"call\":{\"throttle\":{\"job\":3,\"bytes_per_second\":null}}}\n",
        b"{\"v\":1,\"id\":7,\"call\":{\"submit\":{\"action\":\"encrypt\",\"source\":{\"fd\":0,\"name\":\"a\"},\
          \"sink\":{\"fd\":1,\"name\":\"b\",\"commit\":{\"dir_fd\":2,\"partial\":\"p\",\"name\":\"n\"}},\
          \"volume\":{\"format\":{\"raw\":{\"key_bytes\":64,\"data_unit\":512,\"tweak\":\"plain64\"}},\
          \"key_fd\":3},\"detach\":true,\"tuning\":{\"chunk_bytes\":4096}}}}\n",
    ];
    for _ in 0..200_000 {
        let mut line = corpus[random.below(corpus.len())].to_vec();
        for _ in 0..=random.below(4) {
            let at = random.below(line.len());
            match random.below(4) {
                0 => line[at] = random.next_u64().to_le_bytes()[0],
                1 => line.truncate(at + 1),
                2 => line.insert(at, b"{}[]\",:0 \\"[random.below(10)]),
                _ => {
                    line.remove(at);
                    if line.is_empty() {
                        line.push(b'\n');
                    }
                }
            }
        }
        check_line(&line);
    }
}

/// The same property as `tests/fuzz/fuzz_targets/wire.rs` checks.
fn check_line(line: &[u8]) {
    if let Ok(request) = engine::control::line::parse(line) {
        let again = serde_json::to_vec(&request).expect("json");
        assert_eq!(engine::control::line::parse(&again).expect("our own line"), request);
    }
}

/// Keeps the harness's own helpers honest.
#[test]
fn the_raw_client_sends_what_it_is_told() {
    let (near, far) = UnixStream::pair().expect("pair");
    let mut client = Client::over(near);
    let none: [BorrowedFd<'_>; 0] = [];
    client.request(Call::List {}, &none);
    let mut got = [0; 64];
    let mut far = far;
    far.set_read_timeout(Some(PATIENCE)).expect("timeout");
    let count = far.read(&mut got).expect("read");
    assert_eq!(&got[..count], b"{\"v\":1,\"id\":1,\"call\":{\"list\":{}}}\n");
    far.write_all(b"{\"v\":1,\"id\":1,\"ok\":{\"jobs\":[]},\"later\":1}\n").expect("sent");
    assert!(matches!(client.receive().expect("a reply").body, Body::Ok(Reply::Jobs(_))));
}
