//! The wire between `cryptctl` and `cryptd`: JSON, one object per line, over a Unix stream socket.
//!
//! ```text
//! → {"v":1,"id":7,"call":{"show":{"job":3}}}
//! ← {"v":1,"id":7,"ok":{"job":{…}}}                      one reply per request, same id
//! ← {"v":1,"id":7,"error":{"kind":"not_found","message":"…"}}
//! ← {"v":1,"id":9,"event":{"progress":{…}}}              only after `watch` with id 9, until `finished`
//! ```
//!
//! Rules: a request line is at most [`MAX_LINE`] bytes including its newline, a response line [`MAX_RESPONSE`]. Unknown fields of a *request* are refused (a typing
//! error must not silently change what happens to a volume); unknown fields of a *reply* are ignored, so an
//! older client understands a newer daemon. Files and secrets travel as descriptors (`SCM_RIGHTS`), attached to the first
//! byte of the request line that names them by their index; never as paths or bytes in the JSON.
//!
//! This crate holds types and bounds only: no I/O, no policy.

#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

pub mod errno;
pub mod export;
pub mod luks;
pub mod reencrypt;
pub mod remote;
pub mod socket;

/// The version in every line's `v`. A daemon answers a request of another version with [`ErrorKind::Version`].
pub const PROTOCOL_VERSION: u32 = 1;
/// Longest request line, bytes, newline included.
pub const MAX_LINE: usize = 64 * 1024;
/// Longest response line, bytes, newline included: a `list` of every remembered job and of all that one user may have waiting
/// fits, because its texts are shortened.
pub const MAX_RESPONSE: usize = 8 * 1024 * 1024;
/// Longest `name` of a source or sink, bytes.
pub const MAX_NAME: usize = 4096;
/// Most descriptors one request may carry.
pub const MAX_DESCRIPTORS: usize = 32;
/// Largest secret accepted through a descriptor, bytes (cryptsetup's own limit for key files).
pub const MAX_SECRET: usize = 8 * 1024 * 1024;

/// A job's number: unique in one daemon's lifetime, from 1.
pub type JobId = u64;

/// One request line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Protocol version, see [`PROTOCOL_VERSION`].
    pub v: u32,
    /// Chosen by the client, returned in the reply and in events of a `watch`.
    pub id: u64,
    /// What is asked.
    pub call: Call,
}

/// Every verb there is. Who may use which: a caller sees and touches its own jobs; root and the daemon's own user
/// may also `shutdown`; root touches all jobs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Call {
    /// Who are you? Answered with [`Reply::Hello`]; legal in every version.
    Hello {},
    /// Start a job. Answered with [`Reply::Submitted`].
    Submit(Box<Submit>),
    /// Read or change the header of a LUKS volume. Answered with [`Reply::Luks`] when it is done (and durable).
    Luks(Box<luks::Request>),
    /// The caller's jobs (root: all), oldest first, finished ones while remembered. Long names and messages are shortened in the
    /// middle, and hints and bench rows left out: `show` has them.
    List {},
    /// One job.
    Show {
        /// The job asked for.
        job: JobId,
    },
    /// Stream [`Event`]s of one job with this request's id, the current state first; ends with [`Event::Finished`].
    Watch {
        /// The job asked for.
        job: JobId,
        /// Milliseconds between progress events, 100..=60000; default 500.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        interval_ms: Option<u32>,
    },
    /// Stop claiming new work; what is in flight completes. Idempotent while running.
    Pause {
        /// The job to pause.
        job: JobId,
    },
    /// Go on after `pause`.
    Resume {
        /// The job to resume.
        job: JobId,
    },
    /// End the job and undo its unfinished sink, unless it has a checkpoint. Idempotent; a finished job is [`ErrorKind::Conflict`].
    Cancel {
        /// The job to cancel.
        job: JobId,
    },
    /// Limit (or with `null` free) a job's rate.
    Throttle {
        /// The job to limit.
        job: JobId,
        /// Bytes of source per second; `null` lifts the limit.
        bytes_per_second: Option<u64>,
    },
    /// Per-stage histograms of one job, or of all the caller's jobs together.
    Stats {
        /// One job, or all.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        job: Option<JobId>,
    },
    /// Serve a volume by NBD. Answered with [`Reply::Exported`] when clients can connect.
    Export(Box<export::Request>),
    /// The caller's exports (root: all), oldest first. Answered with [`Reply::Exports`].
    Exports {},
    /// Where the time of one export goes. Answered with [`Reply::ExportStats`].
    ExportStats {
        /// The export asked for.
        export: export::ExportId,
    },
    /// End an export: no new clients, what was asked for is answered, then all is made durable. Answered with [`Reply::Exports`] when it is over.
    ExportStop {
        /// The export to end.
        export: export::ExportId,
        /// Do not wait for clients: requests in flight are dropped unanswered.
        #[serde(default)]
        now: bool,
    },
    /// The daemon itself: workers, kernel, buffers, limits.
    Status {},
    /// End the daemon: refuse new jobs and exports, drain exports, then leave when running jobs are done; with `now` cancel them, and
    /// drop clients.
    Shutdown {
        /// Cancel running jobs and drop clients instead of waiting for them.
        #[serde(default)]
        now: bool,
    },
}

/// A job as the caller wants it. Descriptor fields are indices into the request's `SCM_RIGHTS` array.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Submit {
    /// What to do.
    pub action: Action,
    /// Where sectors come from. For `verify`, the plaintext side. Absent for `bench`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
    /// Where sectors go. For `verify`, the encrypted side, only read. Absent for `bench`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sink: Option<Sink>,
    /// The volume's format and key. Absent for `bench`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<Volume>,
    /// What a `bench` job measures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bench: Option<Bench>,
    /// What a `reencrypt` job does. It has neither source, sink nor volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reencrypt: Option<Box<reencrypt::Request>>,
    /// The job outlives this connection. Otherwise it is cancelled when the connection ends.
    #[serde(default)]
    pub detach: bool,
    /// Rate limit from the start, bytes of source per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<u64>,
    /// How to move the data; every field has a default chosen from the devices.
    #[serde(default)]
    pub tuning: Tuning,
    /// `encrypt`, `decrypt` between files or devices: where to keep how far the copy has come, so that it can be gone on with
    /// after a crash.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<Box<Checkpoint>>,
    /// Descriptors of this request that are connections to NBD servers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remotes: Vec<remote::Remote>,
    /// `reencrypt` of a volume that is being exported: percent of the device's time that it may take, 1..=100, while clients use
    /// the volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub background_share: Option<u32>,
}

/// Where a copy keeps how far it has come. With one, a copy that fails or is cancelled leaves its sink and the checkpoint for the
/// same request with `resume`, instead of undoing the sink; one that is done removes the checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Checkpoint {
    /// Descriptor index of a regular file opened for reading and writing: empty, or with `resume` the one to go on with.
    pub fd: u32,
    /// The name the user knows it by; for messages only, never opened.
    pub name: String,
    /// Where it is to be removed from when the copy is done. Absent: it is made empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entry: Option<Entry>,
    /// Go on with the copy it tells of. Source, sink and everything that shapes the bytes must be as they were.
    #[serde(default)]
    pub resume: bool,
    /// Milliseconds between checkpoints; default 3000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval_ms: Option<u32>,
}

/// What the file of a checkpoint begins with, or 4096 bytes further on, once it has been written.
pub const CHECKPOINT_MAGIC: [u8; 8] = *b"CRYPTDCP";

/// A file by its place in a directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Descriptor index of the directory, opened `O_RDONLY|O_DIRECTORY`.
    pub dir_fd: u32,
    /// File name (no slash). Verified by device and inode.
    pub name: String,
}

/// What a job does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Plaintext source to encrypted sink.
    Encrypt,
    /// Encrypted source to plaintext sink.
    Decrypt,
    /// Plaintext source compared with the decrypted sink side; writes nothing.
    Verify,
    /// Measure kernels or the pipeline on this machine; moves no volume.
    Bench,
    /// Another volume key (or the first, or none any more) for a volume, in place.
    Reencrypt,
}

/// The readable side.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// Descriptor index, opened for reading.
    pub fd: u32,
    /// The name the user typed; for messages only, never opened.
    pub name: String,
    /// Read in order from the current position to its end (`-`: pipes, sockets, terminals), instead of by offset.
    #[serde(default)]
    pub stream: bool,
}

/// The written side (for `verify`: the encrypted side, read).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sink {
    /// Descriptor index, opened for reading and writing (streams: writing; `verify`: reading).
    pub fd: u32,
    /// The name the user typed; for messages only, never opened.
    pub name: String,
    /// Write in order at the current position (`-`), instead of by offset.
    #[serde(default)]
    pub stream: bool,
    /// For a new file: it was created under `partial` and takes its `name` only when whole and durable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<Commit>,
}

/// How a new sink file becomes visible: `renameat(dir, partial, dir, name)` after its data is durable, then `fsync(dir)`.
/// On failure `partial` is unlinked, unless `keep_partial`. Done with the peer's filesystem rights, never the daemon's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Commit {
    /// Descriptor index of the parent directory, opened `O_RDONLY|O_DIRECTORY`.
    pub dir_fd: u32,
    /// File name (no slash) under which the descriptor in [`Sink::fd`] exists now. Verified by device and inode.
    pub partial: String,
    /// File name (no slash) it takes when done; replaces an existing file only if `replace`.
    pub name: String,
    /// An existing `name` may be replaced whatever it holds (`--force`). Otherwise only while it is an empty file.
    #[serde(default)]
    pub replace: bool,
    /// Leave `partial` behind when the job fails or is cancelled.
    #[serde(default)]
    pub keep_partial: bool,
}

/// An encrypted volume's format and where its key is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Volume {
    /// The on-disk format.
    pub format: Format,
    /// Descriptor index of the secret: the read end of a pipe that holds all of it and whose write end is closed,
    /// or a sealed memfd. For `raw`: exactly `key_bytes` bytes. For LUKS: the passphrase, every byte of it (a trailing newline
    /// too), or the volume key itself, see [`luks::Secret`].
    pub key_fd: u32,
}

/// On-disk formats.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Format {
    /// dm-crypt plain: AES-XTS over the whole device, no header.
    Raw(Raw),
    /// An existing LUKS volume of either version (`decrypt`, `verify`): everything else is in its header.
    Luks(luks::Open),
    /// A new LUKS volume (`encrypt`).
    NewLuks(Box<luks::New>),
}

/// Parameters of the headerless format, in dm-crypt's terms.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Raw {
    /// Volume key, both XTS halves: 32 (AES-128-XTS) or 64 (AES-256-XTS) bytes.
    pub key_bytes: u32,
    /// Data unit ("sector size"), bytes: 512, 1024, 2048 or 4096.
    pub data_unit: u32,
    /// How the tweak is made of the counter.
    pub tweak: TweakKind,
    /// Count tweaks in data units (`iv_large_sectors`) instead of 512-byte sectors.
    #[serde(default)]
    pub large_tweak: bool,
    /// Counter of the first data unit, in 512-byte sectors (dm-crypt's `iv_offset`).
    #[serde(default)]
    pub tweak_offset: u64,
}

/// IV generators of XTS volumes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TweakKind {
    /// 64-bit little-endian counter.
    Plain64,
    /// The low 32 bits of it.
    Plain,
}

/// How to move the data. `None` lets the daemon choose.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tuning {
    /// Bytes a worker claims at a time: a multiple of 4096, at most the daemon's buffer size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chunk_bytes: Option<u32>,
    /// Chunks in flight per worker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_depth: Option<u32>,
    /// Workers that may take part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workers: Option<u32>,
    /// Bypass the page cache: default where both ends allow it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direct: Option<bool>,
    /// `decrypt`: write zero plaintext as holes where the sink is a new file (default true).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sparse: Option<bool>,
    /// `decrypt`, `verify`: holes of the *encrypted* file were never written: leave holes instead of decrypting zeros.
    #[serde(default)]
    pub keep_holes: bool,
    /// `encrypt`, `verify`: a source that ends inside a data unit is filled up with zero bytes instead of refused.
    #[serde(default)]
    pub pad: bool,
}

/// What a bench job measures.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bench {
    /// One kernel by name ([`KERNELS`]), or all this CPU has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// Bytes of buffer per kernel measurement; default 1 MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub buffer_bytes: Option<u32>,
    /// Milliseconds per measurement; default 200.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub millis: Option<u32>,
    /// Interleaved rounds of which the median is reported; default 5.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rounds: Option<u32>,
}

/// Kernel names on the wire and in the configuration, fastest first.
pub const KERNELS: [&str; 4] = ["vaes-avx512", "vaes-avx2", "aes-ni", "portable"];

/// One line from the daemon.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Response {
    /// Protocol version.
    pub v: u32,
    /// The request's id; 0 when the request's own could not be read.
    pub id: u64,
    /// The answer.
    #[serde(flatten)]
    pub body: Body,
}

/// The three kinds of line a daemon sends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Body {
    /// The request was carried out.
    Ok(Reply),
    /// The request was refused, or failed.
    Error(Failure),
    /// News of a watched job.
    Event(Event),
}

/// Successful answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// To `hello`.
    Hello(Hello),
    /// To `submit`: the new job, and warnings worth showing.
    Submitted {
        /// The new job's number.
        job: JobId,
        /// Things the user should know now (a narrow device, locked memory short), one sentence each.
        #[serde(default)]
        warnings: Vec<String>,
    },
    /// To `list`.
    Jobs(Vec<JobInfo>),
    /// To `show`, `pause`, `resume`, `cancel`, `throttle`: the job as it is now; and to `watch`, before the events.
    Job(Box<JobInfo>),
    /// To `stats`.
    Stats(Box<Stats>),
    /// To `status`.
    Status(Box<Status>),
    /// To `luks`.
    Luks(Box<luks::Reply>),
    /// To `export`: its number, and warnings worth showing.
    Exported {
        /// The new export.
        export: export::ExportId,
        /// Things the user should know now, one sentence each.
        #[serde(default)]
        warnings: Vec<String>,
    },
    /// To `exports` and `export_stop`.
    Exports(Vec<export::Info>),
    /// To `export_stats`.
    ExportStats(Box<export::Stats>),
    /// To `shutdown`: what it waits for.
    ShuttingDown {
        /// Jobs still running.
        jobs: u32,
        /// Exports that are drained.
        #[serde(default)]
        exports: u32,
    },
}

/// Who answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Hello {
    /// The daemon's package version.
    pub version: String,
    /// The protocol version it speaks.
    pub protocol: u32,
    /// The daemon's process id.
    pub pid: u32,
    /// The daemon's user id.
    pub uid: u32,
}

/// Where a job stands. Only the last three are final.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// Waits for a place among the running jobs.
    Queued,
    /// Claims and moves chunks.
    Running,
    /// Claims nothing until resumed.
    Paused,
    /// All chunks written; making data and metadata durable.
    Flushing,
    /// Complete and durable.
    Done,
    /// Ended by an error; its sink is undone, unless it has a checkpoint.
    Failed,
    /// Ended by request; its sink is undone, unless it has a checkpoint.
    Cancelled,
}

impl JobState {
    /// Nothing follows this state.
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled)
    }
}

/// One job as seen now.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JobInfo {
    /// Its number.
    pub job: JobId,
    /// User id of its owner.
    pub uid: u32,
    /// What it does.
    pub action: Action,
    /// Where from, as typed.
    pub source: String,
    /// Where to, as typed.
    pub sink: String,
    /// Where it stands.
    pub state: JobState,
    /// Started by `submit` with `detach`.
    pub detached: bool,
    /// Unix time of submission, milliseconds.
    pub submitted_ms: u64,
    /// How far.
    pub progress: Progress,
    /// Set when final.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<Outcome>,
}

/// How far a job is. Bytes are bytes of source.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Bytes processed to the end (written, or compared).
    pub done_bytes: u64,
    /// Of these, done before this job began (`resume`).
    #[serde(default)]
    pub resumed_bytes: u64,
    /// Bytes in all, if known (a pipe's are not).
    pub total_bytes: Option<u64>,
    /// Bytes of source that were holes and cost no read.
    pub hole_bytes: u64,
    /// Bytes of sink left as holes.
    pub sparse_bytes: u64,
    /// Seconds spent moving data (queue, pauses and `unlock_seconds` excluded).
    pub elapsed_seconds: f64,
    /// The passphrase is being hashed; data moves after that.
    #[serde(default)]
    pub unlocking: bool,
    /// `reencrypt`: what is done now, once it has been unlocked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<reencrypt::Phase>,
    /// Seconds spent on the header and its passphrase before data moved.
    #[serde(default)]
    pub unlock_seconds: f64,
    /// Rate over the last few seconds, bytes per second.
    pub bytes_per_second: f64,
    /// Seconds left at that rate, if it can be said.
    pub eta_seconds: Option<f64>,
    /// The stage where chunks spend most of their time.
    pub bottleneck: Option<Stage>,
    /// The rate limit in force.
    pub throttle_bytes_per_second: Option<u64>,
}

/// The one stage vocabulary: names histograms, metrics and probes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Submission of a read to its completion.
    Read,
    /// A completed read waiting for its core (streams: for its turn).
    Queue,
    /// Encrypting, decrypting, comparing.
    Crypt,
    /// Submission of a write to its completion.
    Write,
    /// Making durable.
    Flush,
}

impl Stage {
    /// All stages in the order data meets them.
    pub const ALL: [Self; 5] = [Self::Read, Self::Queue, Self::Crypt, Self::Write, Self::Flush];

    /// The stage's name, as on the wire.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Queue => "queue",
            Self::Crypt => "crypt",
            Self::Write => "write",
            Self::Flush => "flush",
        }
    }
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Wall seconds from submission to the end.
    pub seconds: f64,
    /// Why it failed or was cancelled; absent when done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
    /// `verify`: byte offset of the first difference in plaintext; a difference fails with [`ErrorKind::Difference`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_difference: Option<u64>,
    /// `bench`: one row per measurement.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bench: Vec<BenchRow>,
    /// `reencrypt`: what was done; of a failed one, what it came to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reencrypt: Option<Box<reencrypt::Report>>,
    /// Zero bytes appended by `pad`.
    #[serde(default)]
    pub padded_bytes: u64,
    /// The daemon's CPU seconds (user, system) between the job's start and end; other jobs' included.
    #[serde(default)]
    pub cpu_seconds: (f64, f64),
}

/// One measurement of a bench job, beside its limit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BenchRow {
    /// Kernel name, or `pipeline`.
    pub kernel: String,
    /// `encrypt`, `decrypt`, `reencrypt`.
    pub operation: String,
    /// Key bits of AES: 128 or 256.
    pub key_bits: u32,
    /// Data unit, bytes.
    pub data_unit: u32,
    /// Median rate, bytes per second.
    pub bytes_per_second: f64,
    /// Lowest and highest rate of the rounds.
    pub spread: (f64, f64),
    /// The issue limit of the instruction the kernel is made of, for `pipeline` the same copy without encryption by plain
    /// reads and writes on as many threads; same run, absent where there is none.
    pub limit_bytes_per_second: Option<f64>,
}

/// News of a watched job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// The job's state changed.
    State {
        /// The job.
        job: JobId,
        /// The new state.
        state: JobState,
    },
    /// Sent every interval while the job runs.
    Progress {
        /// The job.
        job: JobId,
        /// How far.
        progress: Progress,
    },
    /// The last event of a watch.
    Finished(Box<JobInfo>),
}

/// Latencies of one stage, nanoseconds per chunk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageStats {
    /// Which stage.
    pub stage: Stage,
    /// Chunks that passed it.
    pub count: u64,
    /// Bytes that passed it.
    pub bytes: u64,
    /// Share of all chunk time spent here, 0..=1.
    pub share: f64,
    /// Smallest, nanoseconds.
    pub min_ns: u64,
    /// Median, nanoseconds.
    pub p50_ns: u64,
    /// 90th percentile, nanoseconds.
    pub p90_ns: u64,
    /// 99th percentile, nanoseconds.
    pub p99_ns: u64,
    /// 99.9th percentile, nanoseconds.
    pub p999_ns: u64,
    /// Largest, nanoseconds.
    pub max_ns: u64,
}

/// Per-stage statistics.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// The job, or absent for all.
    pub job: Option<JobId>,
    /// Bytes of source done.
    pub bytes: u64,
    /// Mean rate while running, bytes per second.
    pub bytes_per_second: f64,
    /// Each stage that was passed.
    pub stages: Vec<StageStats>,
    /// The stage with the largest share.
    pub bottleneck: Option<Stage>,
    /// System calls made by the workers' queues.
    pub syscalls: u64,
}

/// The daemon as it runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Who it is.
    pub hello: Hello,
    /// The socket it listens on, if it bound one itself.
    pub socket: Option<String>,
    /// Seconds since start.
    pub uptime_seconds: f64,
    /// The kernel chosen, and whether it was forced.
    pub kernel: String,
    /// Was the kernel named by the configuration?
    pub kernel_forced: bool,
    /// One entry per worker.
    pub workers: Vec<WorkerStatus>,
    /// Jobs running or queued.
    pub active_jobs: u32,
    /// Exports being opened, served or ended.
    #[serde(default)]
    pub active_exports: u32,
    /// Exit after this many idle seconds; absent: never.
    pub idle_exit_seconds: Option<u64>,
    /// Soft `RLIMIT_MEMLOCK`, bytes; absent: unlimited.
    pub memlock_limit_bytes: Option<u64>,
    /// Bytes it would take to lock everything, when the limit was too small.
    pub memlock_needed_bytes: Option<u64>,
    /// Is all key memory locked?
    pub keys_locked: bool,
    /// CPU seconds so far: user, system.
    pub cpu_seconds: (f64, f64),
    /// Peak resident set, bytes.
    pub rss_peak_bytes: u64,
    /// Current resident set, bytes.
    pub rss_bytes: u64,
}

/// One worker and its memory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WorkerStatus {
    /// CPU it is pinned to, if it is.
    pub cpu: Option<u32>,
    /// `io_uring` or `threads`.
    pub queue: String,
    /// Why not io_uring, when `threads` was not asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_fallback_reason: Option<String>,
    /// Buffers it owns.
    pub buffers: u32,
    /// Bytes of each.
    pub buffer_bytes: u32,
    /// How many are registered with the ring.
    pub buffers_registered: u32,
    /// How many are locked in memory.
    pub buffers_locked: u32,
    /// `hugetlb`, `transparent` or `base`.
    pub pages: String,
}

/// Why a request or a job failed. Stable; match on this, show the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The line or its values make no sense (usage; exit 2).
    Invalid,
    /// Another protocol version.
    Version,
    /// The caller may not do this, or see this job.
    Denied,
    /// No such job.
    NotFound,
    /// Not possible in the present state (finished job, sink in use).
    Conflict,
    /// A limit of the daemon was reached (jobs, connections, line length).
    Limit,
    /// Something this build or machine cannot do.
    Unsupported,
    /// What is on disk is damaged or cut off.
    Damaged,
    /// The key does not fit, or the data is damaged (exit 4).
    WrongKey,
    /// Verification found a difference (exit 5).
    Difference,
    /// Reading or writing failed.
    Io,
    /// The sink has no room.
    NoSpace,
    /// The job was cancelled.
    Cancelled,
    /// The daemon is leaving.
    ShuttingDown,
    /// A fault of ours.
    Internal,
}

/// An error on the wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What kind of wrong.
    pub kind: ErrorKind,
    /// The whole chain, outermost first: what, where, why.
    pub message: String,
    /// What the user can do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_fields_are_strict() {
        let good = r#"{"v":1,"id":1,"call":{"show":{"job":3}}}"#;
        assert!(serde_json::from_str::<Request>(good).is_ok());
        for bad in [
            r#"{"v":1,"id":1,"call":{"show":{"job":3,"x":1}}}"#,
            r#"{"v":1,"id":1,"x":0,"call":{"show":{"job":3}}}"#,
            r#"{"v":1,"id":1,"call":{"hello":{"x":1}}}"#,
            r#"{"v":1,"id":1,"call":{"frobnicate":{}}}"#,
        ] {
            assert!(serde_json::from_str::<Request>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn unknown_reply_fields_are_ignored() {
        let line =
            r#"{"v":1,"id":1,"new":true,"error":{"kind":"not_found","message":"no job 3","later":[1]}}"#;
        let response: Response = serde_json::from_str(line).expect("parses");
        assert!(matches!(response.body, Body::Error(Failure { kind: ErrorKind::NotFound, .. })));
    }
}
