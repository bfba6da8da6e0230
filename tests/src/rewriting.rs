//! Re-encryption jobs through the registry of this process.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use engine::job::Registry;
use proto::luks::{Open, Version};
use proto::reencrypt::{Format, Luks, Mode, Report, Request, Resilience};
use proto::{Action, JobId, JobInfo, Submit, Tuning};

use crate::Scratch;
use crate::jobs::{self, assert_done, key_fd, me, new_luks, wait};

/// The passphrase of these volumes.
pub const PASS: &[u8] = b"correct horse";

/// A LUKS2 volume with this plaintext, made by a job. `keyslots`: bytes of its keyslots area, else the default.
///
/// # Panics
/// If it cannot be made.
pub fn volume(
    registry: &Arc<Registry>,
    scratch: &Scratch,
    plain: &[u8],
    unit: u32,
    keyslots: Option<u64>,
) -> PathBuf {
    let source = scratch.file("plain", plain);
    let path = scratch.join("volume");
    let mut new = new_luks(Version::Luks2, Some(unit));
    new.keyslots_bytes = keyslots;
    new.data_offset = keyslots.map(|bytes| bytes + (32 << 10));
    let make = jobs::Request::luks(Action::Encrypt, proto::Format::NewLuks(Box::new(new)), PASS);
    assert_done(&make.reading(&source).creating(&path).run(registry));
    path
}

/// The plaintext of a volume, read by a job.
///
/// # Panics
/// If it cannot be read.
pub fn plaintext(registry: &Arc<Registry>, scratch: &Scratch, volume: &Path, pass: &[u8]) -> Vec<u8> {
    let back = scratch.join("back");
    let _ = std::fs::remove_file(&back);
    let open = jobs::Request::luks(Action::Decrypt, proto::Format::Luks(Open::default()), pass);
    assert_done(&open.reading(volume).creating(&back).run(registry));
    std::fs::read(&back).expect("plaintext")
}

/// A request under construction.
pub struct Rewrite {
    /// What is asked.
    pub request: Request,
    /// Of the job.
    pub tuning: Tuning,
    /// Bytes per second.
    pub rate: Option<u64>,
    descriptors: Vec<OwnedFd>,
}

impl Rewrite {
    /// Of a LUKS2 volume with an attached header.
    ///
    /// # Panics
    /// If it cannot be opened.
    #[must_use]
    pub fn of(path: &Path) -> Self {
        let file = OpenOptions::new().read(true).write(true).open(path).expect("open the volume");
        Self::of_file(file, &path.display().to_string())
    }

    /// Of an open file.
    #[must_use]
    pub fn of_file(file: File, name: &str) -> Self {
        Self::bare(file, name).key(PASS)
    }

    /// Of a volume without a header, AES-256-XTS in data units of 512 bytes, from the key of [`jobs::key_bytes`] to another.
    ///
    /// # Panics
    /// If it cannot be opened, or the journal neither.
    #[must_use]
    pub fn raw(volume: &Path, journal: &Path, new_key: &[u8]) -> Self {
        let open = |path: &Path, create| {
            OpenOptions::new().read(true).write(true).create(create).truncate(false).open(path).expect("open")
        };
        Self::raw_files(open(volume, false), open(journal, true), new_key)
    }

    /// The same with open files.
    #[must_use]
    pub fn raw_files(volume: File, journal: File, new_key: &[u8]) -> Self {
        let mut rewrite = Self::bare(volume, "volume");
        let fd = rewrite.send(journal);
        let side = proto::Raw {
            key_bytes: 64,
            data_unit: 512,
            tweak: proto::TweakKind::Plain64,
            large_tweak: false,
            tweak_offset: 0,
        };
        let journal = proto::luks::File { fd, name: "journal".to_owned() };
        rewrite.request.format =
            Format::Raw(Box::new(proto::reencrypt::RawPair { old: side.clone(), new: side, journal }));
        rewrite.key(&jobs::key_bytes()).new_key(new_key)
    }

    /// Plain data that is to become a volume, or the other way round, with a header in a file of its own, which is there.
    ///
    /// # Panics
    /// If one cannot be opened.
    #[must_use]
    pub fn detached(mode: Mode, data: &Path, header: &Path) -> Self {
        let open = |path| OpenOptions::new().read(true).write(true).open(path).expect("open");
        let mut rewrite = Self::bare(open(data), "data").with(|request| request.mode = mode);
        let fd = rewrite.send(open(header));
        rewrite.luks(|luks| luks.header = Some(proto::luks::File { fd, name: "header".to_owned() }))
    }

    /// Without a key.
    #[must_use]
    pub fn bare(file: File, name: &str) -> Self {
        let request = Request {
            volume: proto::luks::File { fd: 0, name: name.to_owned() },
            mode: Mode::Reencrypt,
            format: Format::Luks(Box::default()),
            keys: Vec::new(),
            new_key: None,
            resume_only: false,
            dry_run: false,
            resilience: None,
            hotzone_bytes: None,
            verify: false,
            lock_fds: Vec::new(),
            shared: false,
        };
        Self { request, tuning: Tuning::default(), rate: None, descriptors: vec![file.into()] }
    }

    /// Add a descriptor; its index.
    pub fn send(&mut self, fd: impl Into<OwnedFd>) -> u32 {
        self.descriptors.push(fd.into());
        u32::try_from(self.descriptors.len() - 1).expect("few descriptors")
    }

    /// With another passphrase that opens it.
    #[must_use]
    pub fn key(mut self, pass: &[u8]) -> Self {
        let fd = self.send(key_fd(pass));
        self.request.keys.push(fd);
        self
    }

    /// With a new passphrase.
    #[must_use]
    pub fn new_key(mut self, pass: &[u8]) -> Self {
        self.request.new_key = Some(self.send(key_fd(pass)));
        self
    }

    /// Protected so.
    #[must_use]
    pub fn by(mut self, resilience: Resilience) -> Self {
        self.request.resilience = Some(resilience);
        self
    }

    /// With other wishes.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Request)) -> Self {
        change(&mut self.request);
        self
    }

    /// With other wishes for a LUKS volume.
    ///
    /// # Panics
    /// If it is none.
    #[must_use]
    pub fn luks(self, change: impl FnOnce(&mut Luks)) -> Self {
        self.with(|request| match &mut request.format {
            Format::Luks(luks) => change(luks),
            Format::Raw(_) => panic!("not a LUKS volume"),
        })
    }

    /// With a rate limit.
    #[must_use]
    pub fn rate(mut self, bytes_per_second: u64) -> Self {
        self.rate = Some(bytes_per_second);
        self
    }

    /// With other tuning.
    #[must_use]
    pub fn tuned(mut self, tune: impl FnOnce(&mut Tuning)) -> Self {
        tune(&mut self.tuning);
        self
    }

    /// Submit it.
    ///
    /// # Errors
    /// As the registry refuses it.
    pub fn start(self, registry: &Arc<Registry>) -> Result<JobId, engine::error::Error> {
        let submit = Submit {
            action: Action::Reencrypt,
            source: None,
            sink: None,
            volume: None,
            bench: None,
            checkpoint: None,
            remotes: Vec::new(),
            background_share: None,
            reencrypt: Some(Box::new(self.request)),
            detach: true,
            bytes_per_second: self.rate,
            tuning: self.tuning,
        };
        registry.submit(&me(), submit, self.descriptors).map(|(job, _)| job)
    }

    /// Submit it and wait for its end.
    ///
    /// # Panics
    /// If it is refused.
    pub fn run(self, registry: &Arc<Registry>) -> JobInfo {
        let job = self.start(registry).expect("accepted");
        wait(registry, job)
    }
}

/// What it came to.
///
/// # Panics
/// If it says nothing.
#[must_use]
pub fn report(info: &JobInfo) -> &Report {
    let outcome = info.outcome.as_ref().expect("it has ended");
    outcome.reencrypt.as_deref().expect("a report")
}
