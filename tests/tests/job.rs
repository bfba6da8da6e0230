//! Whole jobs through the registry, without a socket: every pairing of ends, every way of ending.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::backend::QueueChoice;
use engine::crypto::{Kernel, Layout, VolumeKey, cipher};
use engine::job::{JobConfig, Owner, Registry};
use engine::pipeline::{Pipeline, PipelineConfig};
use engine::units::DataUnit;
use proto::{
    Action, Commit, ErrorKind, Format, JobId, JobInfo, JobState, Raw, Sink, Source, Submit, Tuning,
    TweakKind, Volume,
};

const MIB: usize = 1 << 20;

/// A directory that vanishes with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("job-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).expect("scratch directory");
        Self(path)
    }

    fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, content).expect("write a scratch file");
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Bytes that repeat nowhere near.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

fn key_bytes() -> Vec<u8> {
    noise(64, 4711)
}

/// A secret as a client sends it: a pipe that holds all of it.
fn key_fd(key: &[u8]) -> OwnedFd {
    let (read, mut write) = std::io::pipe().expect("pipe");
    write.write_all(key).expect("a key fits a pipe");
    read.into()
}

/// What the portable kernel makes of `plain`.
fn encrypted(plain: &[u8], unit: u32) -> Vec<u8> {
    let mut bytes = plain.to_vec();
    bytes.resize(plain.len().next_multiple_of(unit as usize), 0);
    let layout = Layout { unit_bytes: unit, kind: TweakKind::Plain64, large: false, offset_sectors: 0 };
    let key = VolumeKey::new(&key_bytes()).expect("key");
    cipher(Kernel::Portable, &key, layout).expect("cipher").encrypt(DataUnit(0), &mut bytes);
    bytes
}

fn me() -> Owner {
    Owner {
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
        groups: Vec::new(),
    }
}

fn registry(queue: QueueChoice) -> Arc<Registry> {
    let config =
        PipelineConfig { cpus: vec![0, 1], pin: false, queue, buffer_bytes: 1 << 20, buffers_per_worker: 16 };
    let pipeline = Arc::new(Pipeline::start(&config).expect("pipeline"));
    let config = JobConfig {
        kernel: Kernel::best().expect("a kernel"),
        running_max: 4,
        per_user_max: 16,
        remembered_max: 100,
    };
    Registry::start(config, pipeline, Box::new(|_| {}))
}

const QUEUES: [QueueChoice; 2] = [QueueChoice::IoUring, QueueChoice::Threads];

/// A request under construction, with its descriptors.
struct Request {
    submit: Submit,
    descriptors: Vec<OwnedFd>,
}

impl Request {
    fn new(action: Action, unit: u32) -> Self {
        let raw = Raw {
            key_bytes: 64,
            data_unit: unit,
            tweak: TweakKind::Plain64,
            large_tweak: false,
            tweak_offset: 0,
        };
        Self {
            submit: Submit {
                action,
                source: None,
                sink: None,
                volume: Some(Volume { format: Format::Raw(raw), key_fd: 0 }),
                bench: None,
                detach: true,
                bytes_per_second: None,
                tuning: Tuning::default(),
            },
            descriptors: vec![key_fd(&key_bytes())],
        }
    }

    fn send(&mut self, fd: impl Into<OwnedFd>) -> u32 {
        self.descriptors.push(fd.into());
        u32::try_from(self.descriptors.len() - 1).expect("few descriptors")
    }

    fn reading(mut self, path: &Path) -> Self {
        let fd = self.send(File::open(path).expect("open the source"));
        self.submit.source = Some(Source { fd, name: path.display().to_string(), stream: false });
        self
    }

    fn streaming_from(mut self, fd: impl Into<OwnedFd>) -> Self {
        let fd = self.send(fd);
        self.submit.source = Some(Source { fd, name: "-".into(), stream: true });
        self
    }

    fn creating(mut self, path: &Path) -> Self {
        let name = path.file_name().expect("a name").to_str().expect("UTF-8").to_owned();
        let partial = format!("{name}.partial");
        let directory = path.parent().expect("a directory");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(directory.join(&partial))
            .expect("create the partial sink");
        let fd = self.send(file);
        let dir_fd = self.send(File::open(directory).expect("open the directory"));
        let commit = Some(Commit { dir_fd, partial, name, replace: false, keep_partial: false });
        self.submit.sink = Some(Sink { fd, name: path.display().to_string(), stream: false, commit });
        self
    }

    fn writing(mut self, file: File, name: &str) -> Self {
        let fd = self.send(file);
        self.submit.sink = Some(Sink { fd, name: name.into(), stream: false, commit: None });
        self
    }

    fn streaming_to(mut self, fd: impl Into<OwnedFd>) -> Self {
        let fd = self.send(fd);
        self.submit.sink = Some(Sink { fd, name: "-".into(), stream: true, commit: None });
        self
    }

    fn tuned(mut self, tune: impl FnOnce(&mut Tuning)) -> Self {
        tune(&mut self.submit.tuning);
        self
    }

    fn rate(mut self, bytes_per_second: u64) -> Self {
        self.submit.bytes_per_second = Some(bytes_per_second);
        self
    }

    fn start(self, registry: &Arc<Registry>) -> Result<JobId, engine::error::Error> {
        registry.submit(&me(), self.submit, self.descriptors).map(|(job, _)| job)
    }

    fn run(self, registry: &Arc<Registry>) -> JobInfo {
        let job = self.start(registry).expect("accepted");
        wait(registry, job)
    }

    fn refused(self, registry: &Arc<Registry>) -> (ErrorKind, String) {
        let error = self.start(registry).expect_err("refused");
        (error.kind(), error.chain())
    }
}

fn wait_for(registry: &Registry, job: JobId, what: &str, until: impl Fn(&JobInfo) -> bool) -> JobInfo {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let info = registry.show(job).expect("the job is known");
        if until(&info) {
            return info;
        }
        assert!(Instant::now() < deadline, "waited too long for {what}: {info:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn wait(registry: &Registry, job: JobId) -> JobInfo {
    wait_for(registry, job, "the end", |info| info.state.is_final())
}

fn assert_done(info: &JobInfo) {
    assert_eq!(info.state, JobState::Done, "{:?}", info.outcome);
}

fn failure(info: &JobInfo) -> (ErrorKind, String) {
    let failure = info.outcome.as_ref().and_then(|outcome| outcome.failure.clone()).expect("a failure");
    (failure.kind, failure.message)
}

#[test]
fn files_round_trip_at_every_size() {
    for queue in QUEUES {
        let registry = registry(queue);
        for unit in [512_u32, 4096] {
            for units in [0_usize, 1, 3, 255, 2048, 2049, 10_000] {
                let scratch = Scratch::new("roundtrip");
                let plain = noise(units * unit as usize, 7 + units as u64);
                let source = scratch.file("plain", &plain);
                let (volume, back) = (scratch.0.join("volume"), scratch.0.join("back"));
                let info =
                    Request::new(Action::Encrypt, unit).reading(&source).creating(&volume).run(&registry);
                assert_done(&info);
                assert_eq!(info.progress.done_bytes, plain.len() as u64);
                let stored = std::fs::read(&volume).expect("the volume");
                assert!(
                    stored == encrypted(&plain, unit),
                    "{queue:?}, {units} units of {unit}: wrong ciphertext"
                );
                assert!(!scratch.0.join("volume.partial").exists());
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
        let job = bench(None, 60_000).start(&registry).expect("accepted");
        wait_for(&registry, job, "its files", |_| bench_files() > 0);
        let scratch = Scratch::new("beside-bench");
        let source = scratch.file("plain", &noise(3 * MIB, 5));
        let other = Request::new(Action::Encrypt, 512).reading(&source);
        assert_done(&other.to_new_file(&scratch.0.join("volume")).run(&registry));
        assert!(!registry.show(job).expect("known").state.is_final(), "the bench goes on");
        registry.cancel(job).expect("can be cancelled");
        assert_eq!(wait(&registry, job).state, JobState::Cancelled);
        assert_eq!(bench_files(), 0);
    }
}

#[test]
fn buffered_files_round_trip_too() {
    let registry = registry(QueueChoice::IoUring);
    let scratch = Scratch::new("buffered");
    let plain = noise(5 * MIB + 512, 3);
    let source = scratch.file("plain", &plain);
    let volume = scratch.0.join("volume");
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
    let scratch = Scratch::new("mixed");
    let plain = noise(9 * MIB + 4096, 5);
    let (source, mut feed) = std::io::pipe().expect("pipe");
    let volume = scratch.0.join("volume");
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
    let scratch = Scratch::new("odd");
    let plain = noise(3 * MIB + 1000, 8);
    let source = scratch.file("plain", &plain);
    let volume = scratch.0.join("volume");
    let request = Request::new(Action::Encrypt, 4096).reading(&source).creating(&volume);
    let (kind, message) = request.refused(&registry);
    assert_eq!(kind, ErrorKind::Invalid);
    assert!(message.contains("3146728 bytes") && message.contains("4096 bytes"), "{message}");
    std::fs::remove_file(scratch.0.join("volume.partial")).expect("the caller removes what it created");

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
    let other = scratch.0.join("other");
    let info = Request::new(Action::Encrypt, 4096).streaming_from(source).creating(&other).run(&registry);
    assert_eq!(failure(&info).0, ErrorKind::Invalid);
    assert!(!other.exists() && !scratch.0.join("other.partial").exists(), "nothing is left");
}

#[test]
fn verify_names_the_first_difference() {
    let registry = registry(QueueChoice::IoUring);
    let scratch = Scratch::new("verify");
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
    let scratch = Scratch::new("verifypipe");
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
    let scratch = Scratch::new("sparse");
    let mut plain = vec![0; 64 * MIB];
    plain[5 * MIB..6 * MIB].copy_from_slice(&noise(MIB, 1));
    plain[64 * MIB - 512..].copy_from_slice(&noise(512, 2));
    let source = scratch.0.join("plain");
    {
        let file = File::create(&source).expect("create");
        file.set_len(plain.len() as u64).expect("extend");
        file.write_all_at(&plain[5 * MIB..6 * MIB], 5 * MIB as u64).expect("write");
        file.write_all_at(&plain[64 * MIB - 512..], 64 * MIB as u64 - 512).expect("write");
    }
    let (volume, back) = (scratch.0.join("volume"), scratch.0.join("back"));
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

    let dense = scratch.0.join("dense");
    let request = Request::new(Action::Decrypt, 512).reading(&volume).creating(&dense);
    assert_done(&request.tuned(|tuning| tuning.sparse = Some(false)).run(&registry));
    assert!(dense.metadata().expect("metadata").blocks() * 512 >= 64 * MIB as u64);
}

#[test]
fn a_hole_in_ciphertext_is_not_zero_plaintext_unless_promised() {
    let registry = registry(QueueChoice::IoUring);
    let scratch = Scratch::new("keep");
    let stored = encrypted(&noise(8 * MIB, 6), 4096);
    let volume = scratch.0.join("volume");
    {
        let file = File::create(&volume).expect("create");
        file.set_len(8 * MIB as u64).expect("extend");
        file.write_all_at(&stored[2 * MIB..2 * MIB + 65536], 2 * MIB as u64).expect("write");
    }
    let mut sparse = vec![0; 8 * MIB];
    sparse[2 * MIB..2 * MIB + 65536].copy_from_slice(&stored[2 * MIB..2 * MIB + 65536]);
    let plain = noise(8 * MIB, 6);
    let back = scratch.0.join("back");
    assert_done(&Request::new(Action::Decrypt, 4096).reading(&volume).creating(&back).run(&registry));
    let decrypted = std::fs::read(&back).expect("plaintext");
    assert!(decrypted[2 * MIB..2 * MIB + 65536] == plain[2 * MIB..2 * MIB + 65536]);
    assert!(decrypted[..4096] != [0; 4096], "zeros decrypt to something else");

    let kept = scratch.0.join("kept");
    let request = Request::new(Action::Decrypt, 4096).reading(&volume).creating(&kept);
    assert_done(&request.tuned(|tuning| tuning.keep_holes = true).run(&registry));
    let mut expected = vec![0; 8 * MIB];
    expected[2 * MIB..2 * MIB + 65536].copy_from_slice(&plain[2 * MIB..2 * MIB + 65536]);
    assert!(std::fs::read(&kept).expect("plaintext") == expected);
    let verify = Request::new(Action::Verify, 4096).reading(&kept).tuned(|tuning| tuning.keep_holes = true);
    assert_done(&verify.writing(File::open(&volume).expect("open"), "volume").run(&registry));
}

#[test]
fn a_wrong_request_changes_nothing() {
    let registry = registry(QueueChoice::IoUring);
    let scratch = Scratch::new("wrong");
    let source = scratch.file("plain", &noise(MIB, 1));
    let sink = scratch.0.join("sink");
    let fresh = || {
        let _ = std::fs::remove_file(scratch.0.join("sink.partial"));
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
        std::fs::remove_file(scratch.0.join("sink.partial")).expect("remove");
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
    assert_eq!(std::fs::read(scratch.0.join("full")).expect("read"), b"precious");
    check("a directory as source", ErrorKind::Invalid, {
        let mut request = fresh();
        let at = request.submit.source.as_ref().expect("source").fd as usize;
        request.descriptors[at] = File::open(&scratch.0).expect("open").into();
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
    let scratch = Scratch::new("replace");
    let plain = noise(MIB, 1);
    let source = scratch.file("plain", &plain);
    let sink = scratch.file("sink", b"old");
    let request = Request::new(Action::Encrypt, 512).reading(&source).creating(&sink);
    assert_eq!(request.refused(&registry).0, ErrorKind::Conflict);
    assert_eq!(std::fs::read(&sink).expect("read"), b"old");
    std::fs::remove_file(scratch.0.join("sink.partial")).expect("remove");
    let mut request = Request::new(Action::Encrypt, 512).reading(&source).creating(&sink);
    request.submit.sink.as_mut().expect("sink").commit.as_mut().expect("commit").replace = true;
    assert_done(&request.run(&registry));
    assert!(std::fs::read(&sink).expect("read") == encrypted(&plain, 512));
}

#[test]
fn cancel_removes_the_sink_even_from_a_stalled_pipe() {
    for queue in QUEUES {
        let registry = registry(queue);
        let scratch = Scratch::new("cancel");
        let (source, mut feed) = std::io::pipe().expect("pipe");
        let sink = scratch.0.join("sink");
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
        assert!(!sink.exists() && !scratch.0.join("sink.partial").exists());
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
    let scratch = Scratch::new("keeppartial");
    let source = scratch.file("plain", &noise(8 * MIB, 1));
    let sink = scratch.0.join("sink");
    let mut request = Request::new(Action::Encrypt, 512).reading(&source).creating(&sink).rate(1 << 20);
    request.submit.sink.as_mut().expect("sink").commit.as_mut().expect("commit").keep_partial = true;
    let job = request.start(&registry).expect("ok");
    wait_for(&registry, job, "a chunk", |info| info.progress.done_bytes > 0);
    registry.cancel(job).expect("cancellable");
    assert_eq!(wait(&registry, job).state, JobState::Cancelled);
    assert!(!sink.exists() && scratch.0.join("sink.partial").exists());
}

#[test]
fn pause_resume_and_throttle_act_at_once() {
    let registry = registry(QueueChoice::IoUring);
    let scratch = Scratch::new("pause");
    let plain = noise(64 * MIB, 1);
    let source = scratch.file("plain", &plain);
    let sink = scratch.0.join("sink");
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
fn a_full_sink_fails_clearly_and_leaves_nothing() {
    let registry = registry(QueueChoice::IoUring);
    // `/dev/full` refuses every write for want of room.
    let scratch = Scratch::new("full");
    let source = scratch.file("plain", &noise(MIB, 1));
    let full = OpenOptions::new().write(true).open("/dev/full").expect("open");
    let info = Request::new(Action::Encrypt, 512).reading(&source).streaming_to(full).run(&registry);
    assert_eq!(failure(&info).0, ErrorKind::NoSpace);
}

#[test]
fn a_reader_that_leaves_is_named() {
    for queue in QUEUES {
        let registry = registry(queue);
        let scratch = Scratch::new("epipe");
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
fn many_jobs_share_the_workers_and_surplus_ones_wait() {
    let registry = registry(QueueChoice::IoUring);
    let scratch = Scratch::new("many");
    let plain = noise(4 * MIB, 31);
    let source = scratch.file("plain", &plain);
    let mut jobs = Vec::new();
    // Stalled pipes hold places, but not all, and not the buffers of others.
    let mut feeds = Vec::new();
    for at in 0..2 {
        let (read, feed) = std::io::pipe().expect("pipe");
        feeds.push(feed);
        let sink = scratch.0.join(format!("stalled{at}"));
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
        let sink = scratch.0.join(format!("sink{at}"));
        copies.push(
            Request::new(Action::Encrypt, 512).reading(&source).creating(&sink).start(&registry).expect("ok"),
        );
    }
    for copy in copies {
        assert_done(&wait(&registry, copy));
    }
    for at in 0..10 {
        assert!(std::fs::read(scratch.0.join(format!("sink{at}"))).expect("read") == encrypted(&plain, 512));
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
    let scratch = Scratch::new("bounded");
    let mut feeds = Vec::new();
    let mut jobs = Vec::new();
    let mut start = |at: usize| {
        let (read, feed) = std::io::pipe().expect("pipe");
        feeds.push(feed);
        let sink = scratch.0.join(format!("sink{at}"));
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
    assert!(!scratch.0.join("sink15.partial").exists());
    drop(feeds);
    for job in &jobs[..15] {
        assert_done(&wait(&registry, *job));
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
