//! Jobs through the registry of this process: no socket, no second process, every descriptor in hand.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::path::Path;
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

/// Bytes of a mebibyte.
pub const MIB: usize = 1 << 20;

/// Bytes that repeat nowhere near.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
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

/// The volume key of these tests.
pub fn key_bytes() -> Vec<u8> {
    noise(64, 4711)
}

/// A secret as a client sends it: a pipe that holds all of it.
pub fn key_fd(key: &[u8]) -> OwnedFd {
    crate::sealed_secret(key)
}

/// What the portable kernel makes of `plain`.
pub fn encrypted(plain: &[u8], unit: u32) -> Vec<u8> {
    let mut bytes = plain.to_vec();
    bytes.resize(plain.len().next_multiple_of(unit as usize), 0);
    let layout = Layout { unit_bytes: unit, kind: TweakKind::Plain64, large: false, offset_sectors: 0 };
    let key = VolumeKey::new(&key_bytes()).expect("key");
    cipher(Kernel::Portable, &key, layout).expect("cipher").encrypt(DataUnit(0), &mut bytes);
    bytes
}

/// Ourselves, as a job's owner.
pub fn me() -> Owner {
    Owner {
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
        groups: Vec::new(),
    }
}

/// A registry over two workers of this process.
pub fn registry(queue: QueueChoice) -> Arc<Registry> {
    registry_with(queue, 16)
}

/// The same with so many buffers per worker.
#[must_use]
pub fn registry_with(queue: QueueChoice, buffers_per_worker: u32) -> Arc<Registry> {
    start_registry(queue, buffers_per_worker, 4)
}

/// The same with so many places for running jobs.
#[must_use]
pub fn registry_of_places(running_max: u32) -> Arc<Registry> {
    start_registry(QueueChoice::Auto, 16, running_max)
}

fn start_registry(queue: QueueChoice, buffers_per_worker: u32, running_max: u32) -> Arc<Registry> {
    let config =
        PipelineConfig { cpus: vec![0, 1], pin: false, queue, buffer_bytes: 1 << 20, buffers_per_worker };
    let pipeline = Arc::new(Pipeline::start(&config).expect("pipeline"));
    let config = JobConfig {
        kernel: Kernel::best().expect("a kernel"),
        running_max,
        per_user_max: 16,
        remembered_max: 100,
    };
    Registry::start(config, pipeline, Box::new(|_| {}))
}

/// Both queues there are.
pub const QUEUES: [QueueChoice; 2] = [QueueChoice::IoUring, QueueChoice::Threads];

/// A request under construction, with its descriptors.
pub struct Request {
    /// What is asked.
    pub submit: Submit,
    /// What goes with it.
    pub descriptors: Vec<OwnedFd>,
}

impl Request {
    /// With AES-256-XTS, plain64, from sector 0.
    pub fn new(action: Action, unit: u32) -> Self {
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
                reencrypt: None,
                detach: true,
                bytes_per_second: None,
                remotes: Vec::new(),
                background_share: None,
                tuning: Tuning::default(),
                checkpoint: None,
            },
            descriptors: vec![key_fd(&key_bytes())],
        }
    }

    /// A LUKS volume instead, opened (`Format::Luks`) or made (`Format::NewLuks`) with this secret.
    pub fn luks(action: Action, format: Format, secret: &[u8]) -> Self {
        let mut request = Self::new(action, 512);
        request.submit.volume = Some(Volume { format, key_fd: 0 });
        request.descriptors = vec![key_fd(secret)];
        request
    }

    /// Add a descriptor; its index.
    pub fn send(&mut self, fd: impl Into<OwnedFd>) -> u32 {
        self.descriptors.push(fd.into());
        u32::try_from(self.descriptors.len() - 1).expect("few descriptors")
    }

    /// From a file or device.
    pub fn reading(mut self, path: &Path) -> Self {
        let fd = self.send(File::open(path).expect("open the source"));
        self.submit.source = Some(Source { fd, name: path.display().to_string(), stream: false });
        self
    }

    /// From a pipe.
    pub fn streaming_from(mut self, fd: impl Into<OwnedFd>) -> Self {
        let fd = self.send(fd);
        self.submit.source = Some(Source { fd, name: "-".into(), stream: true });
        self
    }

    /// To a new file, as `cryptctl` makes it.
    pub fn creating(mut self, path: &Path) -> Self {
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

    /// To an open file or device, in place.
    pub fn writing(mut self, file: File, name: &str) -> Self {
        let fd = self.send(file);
        self.submit.sink = Some(Sink { fd, name: name.into(), stream: false, commit: None });
        self
    }

    /// To a pipe.
    pub fn streaming_to(mut self, fd: impl Into<OwnedFd>) -> Self {
        let fd = self.send(fd);
        self.submit.sink = Some(Sink { fd, name: "-".into(), stream: true, commit: None });
        self
    }

    /// With a checkpoint in this open file.
    pub fn keeping(mut self, checkpoint: impl Into<OwnedFd>, resume: bool) -> Self {
        let fd = self.send(checkpoint);
        let name = "checkpoint".to_owned();
        let wish = proto::Checkpoint { fd, name, entry: None, resume, interval_ms: Some(1) };
        self.submit.checkpoint = Some(Box::new(wish));
        self
    }

    /// With other tuning.
    pub fn tuned(mut self, tune: impl FnOnce(&mut Tuning)) -> Self {
        tune(&mut self.submit.tuning);
        self
    }

    /// With a rate limit.
    pub fn rate(mut self, bytes_per_second: u64) -> Self {
        self.submit.bytes_per_second = Some(bytes_per_second);
        self
    }

    /// Submit it.
    ///
    /// # Errors
    /// As the registry refuses it.
    pub fn start(self, registry: &Arc<Registry>) -> Result<JobId, engine::error::Error> {
        registry.submit(&me(), self.submit, self.descriptors).map(|(job, _)| job)
    }

    /// Submit it and wait for its end.
    ///
    /// # Panics
    /// If it is refused.
    pub fn run(self, registry: &Arc<Registry>) -> JobInfo {
        let job = self.start(registry).expect("accepted");
        wait(registry, job)
    }

    /// Submit it; it must be refused.
    ///
    /// # Panics
    /// If it is not.
    pub fn refused(self, registry: &Arc<Registry>) -> (ErrorKind, String) {
        let error = self.start(registry).expect_err("refused");
        (error.kind(), error.chain())
    }
}

/// A new LUKS volume whose passphrase costs next to nothing.
#[must_use]
pub fn new_luks(version: proto::luks::Version, data_unit: Option<u32>) -> proto::luks::New {
    proto::luks::New {
        version,
        cipher: None,
        key_bytes: None,
        data_unit,
        hash: None,
        label: None,
        subsystem: None,
        uuid: None,
        data_offset: None,
        metadata_bytes: None,
        keyslots_bytes: None,
        kdf: crate::header::cheap(),
        keyslot: None,
        volume_key_fd: None,
        header: None,
    }
}

/// Ask until.
///
/// # Panics
/// After [`crate::PATIENCE`].
pub fn wait_for(registry: &Registry, job: JobId, what: &str, until: impl Fn(&JobInfo) -> bool) -> JobInfo {
    let deadline = Instant::now() + crate::PATIENCE;
    loop {
        let info = registry.show(job).expect("the job is known");
        if until(&info) {
            return info;
        }
        assert!(Instant::now() < deadline, "waited too long for {what}: {info:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Until its end.
pub fn wait(registry: &Registry, job: JobId) -> JobInfo {
    wait_for(registry, job, "the end", |info| info.state.is_final())
}

/// It must have ended well.
///
/// # Panics
/// If not.
pub fn assert_done(info: &JobInfo) {
    assert_eq!(info.state, JobState::Done, "{:?}", info.outcome);
}

/// Why it failed.
///
/// # Panics
/// If it did not.
pub fn failure(info: &JobInfo) -> (ErrorKind, String) {
    let failure = info.outcome.as_ref().and_then(|outcome| outcome.failure.clone()).expect("a failure");
    (failure.kind, failure.message)
}
