//! Steering jobs through the registry: refusals, cancel, pause, throttle, places, benches.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::time::Duration;

use engine::backend::QueueChoice;
use proto::{Action, ErrorKind, Format, JobState, Volume};
use tests::Scratch;
use tests::jobs::{
    MIB, QUEUES, Request, assert_done, encrypted, failure, key_fd, noise, registry, registry_with, wait,
    wait_for,
};

fn bench(kernel: Option<&str>, millis: u32) -> Request {
    let mut request = Request::new(Action::Bench, 512);
    request.descriptors.clear();
    request.submit.volume = None;
    let kernel = kernel.map(str::to_owned);
    request.submit.bench =
        Some(proto::Bench { kernel, buffer_bytes: Some(4096), millis: Some(millis), rounds: Some(1) });
    request
}

/// Descriptors of this process that name a file of a bench.
fn bench_files() -> usize {
    let links = std::fs::read_dir("/proc/self/fd").expect("lists").flatten();
    let targets = links.filter_map(|link| std::fs::read_link(link.path()).ok());
    targets.filter(|target| target.to_string_lossy().contains("memfd:bench-")).count()
}

#[test]
fn a_bench_measures_the_pipeline_and_leaves_nothing_behind() {
    for queue in QUEUES {
        let registry = registry(queue);
        for kernel in [None, Some("portable")] {
            let info = bench(kernel, 1).run(&registry);
            assert_done(&info);
            let rows = info.outcome.expect("an outcome").bench;
            let pipeline: Vec<_> = rows.iter().filter(|row| row.kernel == "pipeline").collect();
            assert_eq!(pipeline.len(), 1, "{rows:?}");
            assert_eq!((pipeline[0].key_bits, pipeline[0].data_unit), (256, 4096));
            assert_eq!(pipeline[0].operation, "encrypt");
            assert!(pipeline[0].limit_bytes_per_second.is_some(), "{rows:?}");
            let kernels = rows.iter().filter(|row| row.kernel == "portable").count();
            assert_eq!(kernels, 12, "every operation, unit and key size of the kernel asked for");
            for row in &rows {
                let (lowest, highest) = row.spread;
                assert!(
                    0.0 < lowest && lowest <= row.bytes_per_second && row.bytes_per_second <= highest,
                    "{row:?}"
                );
                assert!(row.limit_bytes_per_second.is_none_or(|limit| limit > 0.0), "{row:?}");
            }
            assert_eq!(bench_files(), 0);
        }

        // Cancelled amid transfers, with another job on the same workers.
        let job = bench(None, 5000).start(&registry).expect("accepted");
        wait_for(&registry, job, "its files", |_| bench_files() > 0);
        let scratch = Scratch::new();
        let source = scratch.file("plain", &noise(3 * MIB, 5));
        let other = Request::new(Action::Encrypt, 512).reading(&source);
        assert_done(&other.creating(&scratch.join("volume")).run(&registry));
        assert!(!registry.show(job).expect("known").state.is_final(), "the bench goes on");
        registry.cancel(job).expect("can be cancelled");
        assert_eq!(wait(&registry, job).state, JobState::Cancelled);
        assert_eq!(bench_files(), 0);
    }
}

#[test]
fn a_wrong_request_changes_nothing() {
    let registry = registry(QueueChoice::IoUring);
    let scratch = Scratch::new();
    let source = scratch.file("plain", &noise(MIB, 1));
    let sink = scratch.join("sink");
    let fresh = || {
        let _ = std::fs::remove_file(scratch.join("sink.partial"));
        Request::new(Action::Encrypt, 512).reading(&source).creating(&sink)
    };
    let check = |what: &str, kind: ErrorKind, request: Request| {
        let (got, message) = request.refused(&registry);
        assert_eq!(got, kind, "{what}: {message}");
        assert!(!sink.exists(), "{what}");
    };
    let mut request = fresh();
    request.descriptors[0] = key_fd(&noise(63, 1));
    check("short key", ErrorKind::Invalid, request);
    let mut request = fresh();
    request.descriptors[0] = key_fd(&[7; 64]);
    check("equal halves", ErrorKind::Invalid, request);
    let mut request = fresh();
    request.descriptors[0] = File::open(&source).expect("open").into();
    check("a file for a key", ErrorKind::Invalid, request);
    let mut request = fresh();
    request.submit.source.as_mut().expect("source").fd = 9;
    check("missing descriptor", ErrorKind::Invalid, request);
    let mut request = fresh();
    request.submit.source.as_mut().expect("source").fd = 0;
    check("the same descriptor twice", ErrorKind::Invalid, request);
    let mut request = fresh();
    request.send(File::open("/dev/null").expect("open"));
    check("a surplus descriptor", ErrorKind::Invalid, request);
    check("bad data unit", ErrorKind::Invalid, {
        let mut request = fresh();
        let Some(Volume { format: Format::Raw(raw), .. }) = &mut request.submit.volume else {
            unreachable!()
        };
        raw.data_unit = 1000;
        request
    });
    check("no source", ErrorKind::Invalid, {
        let mut request = fresh();
        request.submit.source = None;
        request
    });
    check("rate of zero", ErrorKind::Invalid, fresh().rate(0));
    check("chunk of 5", ErrorKind::Invalid, fresh().tuned(|tuning| tuning.chunk_bytes = Some(5)));
    check("depth of 0", ErrorKind::Invalid, fresh().tuned(|tuning| tuning.queue_depth = Some(0)));
    check("a name with a slash", ErrorKind::Invalid, {
        let mut request = fresh();
        let commit = request.submit.sink.as_mut().expect("sink").commit.as_mut().expect("commit");
        commit.name = "../sink".into();
        request
    });
    check("a partial name that means another file", ErrorKind::Conflict, {
        let request = fresh();
        std::fs::remove_file(scratch.join("sink.partial")).expect("remove");
        scratch.file("sink.partial", b"other");
        request
    });
    check("source as sink", ErrorKind::Conflict, {
        let empty = scratch.file("empty", b"");
        let sink = OpenOptions::new().read(true).write(true).open(&empty).expect("open");
        Request::new(Action::Encrypt, 512).reading(&empty).writing(sink, "empty")
    });
    check("a sink with content", ErrorKind::Conflict, {
        let full = scratch.file("full", b"precious");
        let sink = OpenOptions::new().read(true).write(true).open(full).expect("open");
        Request::new(Action::Encrypt, 512).reading(&source).writing(sink, "full")
    });
    assert_eq!(std::fs::read(scratch.join("full")).expect("read"), b"precious");
    check("a partial sink with content", ErrorKind::Conflict, {
        let request = fresh();
        std::fs::write(scratch.join("sink.partial"), b"precious").expect("write");
        request
    });
    check("a directory that is a file", ErrorKind::Invalid, {
        let mut request = fresh();
        let at = request.descriptors.len() - 1;
        request.descriptors[at] = File::open(&source).expect("open").into();
        request
    });
    check("a directory as source", ErrorKind::Invalid, {
        let mut request = fresh();
        let at = request.submit.source.as_ref().expect("source").fd as usize;
        request.descriptors[at] = File::open(scratch.path()).expect("open").into();
        request
    });
    check("a sink open for reading", ErrorKind::Invalid, {
        let empty = scratch.file("readonly", b"");
        Request::new(Action::Encrypt, 512)
            .reading(&source)
            .writing(File::open(empty).expect("open"), "readonly")
    });
    assert_eq!(registry.active(), 0);
}

#[test]
fn an_existing_name_is_not_replaced_unless_agreed() {
    let registry = registry(QueueChoice::IoUring);
    let scratch = Scratch::new();
    let plain = noise(MIB, 1);
    let source = scratch.file("plain", &plain);
    let sink = scratch.file("sink", b"old");
    let request = Request::new(Action::Encrypt, 512).reading(&source).creating(&sink);
    assert_eq!(request.refused(&registry).0, ErrorKind::Conflict);
    assert_eq!(std::fs::read(&sink).expect("read"), b"old");
    std::fs::remove_file(scratch.join("sink.partial")).expect("remove");
    let mut request = Request::new(Action::Encrypt, 512).reading(&source).creating(&sink);
    request.submit.sink.as_mut().expect("sink").commit.as_mut().expect("commit").replace = true;
    assert_done(&request.run(&registry));
    assert!(std::fs::read(&sink).expect("read") == encrypted(&plain, 512));
}

#[test]
fn cancel_removes_the_sink_even_from_a_stalled_pipe() {
    for queue in QUEUES {
        let registry = registry(queue);
        let scratch = Scratch::new();
        let (source, mut feed) = std::io::pipe().expect("pipe");
        let sink = scratch.join("sink");
        let job = Request::new(Action::Encrypt, 512)
            .streaming_from(source)
            .creating(&sink)
            .start(&registry)
            .expect("ok");
        feed.write_all(&noise(64 * 1024, 1)).expect("feed");
        wait_for(&registry, job, "running", |info| info.state == JobState::Running);
        registry.cancel(job).expect("cancellable");
        let info = wait(&registry, job);
        assert_eq!(info.state, JobState::Cancelled, "{queue:?}");
        assert_eq!(failure(&info).0, ErrorKind::Cancelled);
        assert!(!sink.exists() && !scratch.join("sink.partial").exists());
        assert_eq!(registry.cancel(job).expect_err("final").kind(), ErrorKind::Conflict);
        drop(feed);

        // And when it is the reader of the sink that stalls.
        let (_drain, sink) = std::io::pipe().expect("pipe");
        let source = scratch.file("plain", &noise(8 * MIB, 1));
        let job = Request::new(Action::Encrypt, 512)
            .reading(&source)
            .streaming_to(sink)
            .start(&registry)
            .expect("ok");
        wait_for(&registry, job, "running", |info| info.state == JobState::Running);
        registry.cancel(job).expect("cancellable");
        assert_eq!(wait(&registry, job).state, JobState::Cancelled, "{queue:?}");
    }
}

#[test]
fn a_partial_sink_is_kept_when_asked() {
    let registry = registry(QueueChoice::IoUring);
    let scratch = Scratch::new();
    let source = scratch.file("plain", &noise(8 * MIB, 1));
    let sink = scratch.join("sink");
    let mut request = Request::new(Action::Encrypt, 512).reading(&source).creating(&sink).rate(1 << 20);
    request.submit.sink.as_mut().expect("sink").commit.as_mut().expect("commit").keep_partial = true;
    let job = request.start(&registry).expect("ok");
    wait_for(&registry, job, "a chunk", |info| info.progress.done_bytes > 0);
    registry.cancel(job).expect("cancellable");
    assert_eq!(wait(&registry, job).state, JobState::Cancelled);
    assert!(!sink.exists() && scratch.join("sink.partial").exists());
}

#[test]
fn pause_resume_and_throttle_act_at_once() {
    let registry = registry(QueueChoice::IoUring);
    let scratch = Scratch::new();
    let plain = noise(64 * MIB, 1);
    let source = scratch.file("plain", &plain);
    let sink = scratch.join("sink");
    let request = Request::new(Action::Encrypt, 512).reading(&source).creating(&sink).rate(16 << 20);
    let job = request.start(&registry).expect("ok");
    wait_for(&registry, job, "a chunk", |info| info.progress.done_bytes > 0);
    assert_eq!(registry.pause(job).expect("pausable").state, JobState::Paused);
    // What is in flight completes, then nothing moves.
    std::thread::sleep(Duration::from_millis(300));
    let paused = registry.show(job).expect("known").progress.done_bytes;
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(registry.show(job).expect("known").progress.done_bytes, paused);
    assert!(paused < 64 * MIB as u64, "paused before the end");
    assert_eq!(registry.throttle(job, Some(0)).expect_err("zero").kind(), ErrorKind::Invalid);
    let info = registry.throttle(job, None).expect("throttle");
    assert_eq!(info.progress.throttle_bytes_per_second, None);
    assert_eq!(registry.resume(job).expect("resumable").state, JobState::Running);
    assert_done(&wait(&registry, job));
    assert!(std::fs::read(&sink).expect("read") == encrypted(&plain, 512));
    let stats = registry.stats(&[job]).expect("stats");
    assert_eq!(stats.bytes, 64 * MIB as u64);
    let names: Vec<&str> = stats.stages.iter().map(|stage| stage.stage.name()).collect();
    assert_eq!(names, ["read", "queue", "crypt", "write", "flush"]);
    assert!(stats.syscalls > 0 && stats.bottleneck.is_some());
}

#[test]
fn many_jobs_share_the_workers_and_surplus_ones_wait() {
    let registry = registry(QueueChoice::IoUring);
    let scratch = Scratch::new();
    let plain = noise(4 * MIB, 31);
    let source = scratch.file("plain", &plain);
    let mut jobs = Vec::new();
    // Stalled pipes hold places, but not all, and not the buffers of others.
    let mut feeds = Vec::new();
    for at in 0..2 {
        let (read, feed) = std::io::pipe().expect("pipe");
        feeds.push(feed);
        let sink = scratch.join(&format!("stalled{at}"));
        jobs.push(
            Request::new(Action::Encrypt, 512)
                .streaming_from(read)
                .creating(&sink)
                .start(&registry)
                .expect("ok"),
        );
    }
    let mut copies = Vec::new();
    for at in 0..10 {
        let sink = scratch.join(&format!("sink{at}"));
        copies.push(
            Request::new(Action::Encrypt, 512).reading(&source).creating(&sink).start(&registry).expect("ok"),
        );
    }
    for copy in copies {
        assert_done(&wait(&registry, copy));
    }
    for at in 0..10 {
        assert!(std::fs::read(scratch.join(&format!("sink{at}"))).expect("read") == encrypted(&plain, 512));
    }
    drop(feeds);
    for job in jobs {
        assert_done(&wait(&registry, job));
    }
    assert_eq!(registry.active(), 0);
}

#[test]
fn a_user_has_a_bounded_number_of_jobs_and_a_queued_one_can_be_cancelled() {
    let registry = registry(QueueChoice::IoUring);
    let scratch = Scratch::new();
    let mut feeds = Vec::new();
    let mut jobs = Vec::new();
    let mut start = |at: usize| {
        let (read, feed) = std::io::pipe().expect("pipe");
        feeds.push(feed);
        let sink = scratch.join(&format!("sink{at}"));
        Request::new(Action::Encrypt, 512).streaming_from(read).creating(&sink).start(&registry)
    };
    for at in 0..16 {
        jobs.push(start(at).expect("within bounds"));
    }
    assert_eq!(start(16).expect_err("one too many").kind(), ErrorKind::Limit);
    let last = *jobs.last().expect("jobs");
    assert_eq!(registry.show(last).expect("known").state, JobState::Queued);
    registry.cancel(last).expect("cancellable");
    assert_eq!(wait(&registry, last).state, JobState::Cancelled);
    assert!(!scratch.join("sink15.partial").exists());
    drop(feeds);
    for job in &jobs[..15] {
        assert_done(&wait(&registry, *job));
    }
}

#[test]
fn stalled_pipes_never_hold_what_a_file_job_needs() {
    for queue in QUEUES {
        let registry = registry_with(queue, 4);
        let scratch = Scratch::new();
        let plain = noise(12 * MIB, 3);
        let source = scratch.file("plain", &plain);
        // On each worker one, so that no worker is free of them; their readers never read.
        let mut drains = Vec::new();
        let mut stalled = Vec::new();
        for _ in 0..2 {
            let (drain, sink) = std::io::pipe().expect("pipe");
            drains.push(drain);
            let job = Request::new(Action::Encrypt, 512).reading(&source).streaming_to(sink);
            stalled.push(job.start(&registry).expect("accepted"));
        }
        for job in &stalled {
            wait_for(&registry, *job, "running", |info| info.state == JobState::Running);
        }
        let volume = scratch.join("volume");
        assert_done(&Request::new(Action::Encrypt, 512).reading(&source).creating(&volume).run(&registry));
        let verify = Request::new(Action::Verify, 512).reading(&source);
        assert_done(&verify.writing(File::open(&volume).expect("open"), "volume").run(&registry));
        for job in stalled {
            registry.cancel(job).expect("cancellable");
            assert_eq!(wait(&registry, job).state, JobState::Cancelled);
        }
    }
}

#[test]
fn a_source_that_grows_or_shrinks_fails_its_job() {
    let registry = registry(QueueChoice::IoUring);
    for grown in [true, false] {
        let scratch = Scratch::new();
        let source = scratch.file("plain", &noise(4 * MIB, 3));
        let sink = scratch.join("sink");
        let request = Request::new(Action::Encrypt, 512).reading(&source).creating(&sink).rate(4 << 20);
        let job = request.start(&registry).expect("accepted");
        wait_for(&registry, job, "a chunk", |info| info.progress.done_bytes > 0);
        let len = if grown { 5 * MIB } else { 3 * MIB };
        OpenOptions::new()
            .write(true)
            .open(&source)
            .and_then(|file| file.set_len(len as u64))
            .expect("resize");
        let info = wait(&registry, job);
        assert_eq!(failure(&info).0, ErrorKind::Io, "{info:?}");
        assert!(!sink.exists() && !scratch.join("sink.partial").exists());
    }
}

#[test]
fn a_failure_is_seen_while_paused() {
    let registry = registry(QueueChoice::IoUring);
    let scratch = Scratch::new();
    let source = scratch.file("plain", &noise(16 * MIB, 3));
    let (drain, sink) = std::io::pipe().expect("pipe");
    let job =
        Request::new(Action::Encrypt, 512).reading(&source).streaming_to(sink).start(&registry).expect("ok");
    // A job that has nothing in flight when it is paused has nothing that could fail.
    tests::eventually("a chunk that was read", || {
        let stats = registry.stats(&[job]).expect("statistics");
        stats.stages.iter().any(|stage| stage.stage == proto::Stage::Crypt && stage.count > 0)
    });
    registry.pause(job).expect("pausable");
    drop(drain);
    assert_eq!(failure(&wait(&registry, job)).0, ErrorKind::Io);
}

#[test]
fn paused_jobs_count_against_the_share_of_their_user() {
    // Four places, of which one user has three at most.
    let registry = registry(QueueChoice::IoUring);
    let scratch = Scratch::new();
    let mut feeds = Vec::new();
    let mut jobs = Vec::new();
    for at in 0..6 {
        let (read, feed) = std::io::pipe().expect("pipe");
        feeds.push(feed);
        let sink = scratch.join(&format!("stalled{at}"));
        let job = Request::new(Action::Encrypt, 512).streaming_from(read).creating(&sink).start(&registry);
        let job = job.expect("accepted");
        registry.pause(job).expect("pausable");
        jobs.push(job);
    }
    for (at, job) in jobs.iter().enumerate() {
        let expected = if at < 3 { JobState::Paused } else { JobState::Queued };
        wait_for(&registry, *job, "its place", |info| info.state == expected);
    }
    for job in &jobs {
        registry.resume(*job).expect("resumable");
    }
    drop(feeds);
    for job in jobs {
        assert_done(&wait(&registry, job));
    }
}

#[test]
fn an_empty_file_of_that_name_is_replaced_unless_it_is_filled_meanwhile() {
    let registry = registry(QueueChoice::IoUring);
    let scratch = Scratch::new();
    let plain = noise(4 * MIB, 1);
    let source = scratch.file("plain", &plain);
    let sink = scratch.file("sink", b"");
    assert_done(&Request::new(Action::Encrypt, 512).reading(&source).creating(&sink).run(&registry));
    assert!(std::fs::read(&sink).expect("read") == encrypted(&plain, 512));

    let sink = scratch.file("other", b"");
    let request = Request::new(Action::Encrypt, 512).reading(&source).creating(&sink).rate(8 << 20);
    let job = request.start(&registry).expect("accepted");
    wait_for(&registry, job, "a chunk", |info| info.progress.done_bytes > 0);
    std::fs::write(&sink, b"precious").expect("write");
    assert_eq!(failure(&wait(&registry, job)).0, ErrorKind::Conflict);
    assert_eq!(std::fs::read(&sink).expect("read"), b"precious");
    assert!(!scratch.join("other.partial").exists());
}
