//! One request in, one action out: rights are checked here, and everything a request can say about itself.
//!
//! Every verb but eight is answered on the spot, because the registries' methods are quick. Six take time, so they are handed
//! back to the loop for a helper: `submit` (it may probe devices), `luks` and `export` (they hash passphrases), `stats` and
//! `export_stats` (they wait for workers), `export_stop` (it waits for clients). Two change the
//! connection or the daemon: `watch` and `shutdown`. Descriptors are never seen here, only counted; whether a submission names
//! them rightly is the registry's to check.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use proto::export::ExportId;
use proto::{Call, ErrorKind, Format, Hello, JobId, JobInfo, Reply, Status, Submit, WorkerStatus};

use super::policy::{Peer, Verb};
use crate::error::{Error, Result};
use crate::export::Exports;
use crate::export::life::End;
use crate::job::commit::Names;
use crate::job::{Owner, Registry};
use crate::limits;
use crate::sys::process;
use crate::volume::manage::{Caller, carry_out};

/// What every request may need.
pub struct Service {
    /// The jobs.
    pub registry: Arc<Registry>,
    /// The exports.
    pub exports: Arc<Exports>,
    /// The daemon as it started.
    pub about: About,
}

/// Facts that do not change while the daemon runs.
#[derive(Debug, Clone)]
pub struct About {
    /// Who answers.
    pub hello: Hello,
    /// The socket's path, if we made it.
    pub socket: Option<String>,
    /// When it started.
    pub started: Instant,
    /// The kernel's name.
    pub kernel: String,
    /// Was it named by the configuration?
    pub kernel_forced: bool,
    /// The workers and their memory.
    pub workers: Vec<WorkerStatus>,
    /// See `proto::Status::idle_exit_seconds`.
    pub idle_exit: Option<Duration>,
}

/// What the loop has to do about a request.
#[derive(Debug)]
pub enum Action {
    /// Send this.
    Reply(Reply),
    /// Check and start a job elsewhere, then reply.
    Submit(Box<Submit>),
    /// Carry out a header operation elsewhere, then reply.
    Luks(Box<proto::luks::Request>),
    /// Open a volume and serve it elsewhere, then reply.
    Export(Box<proto::export::Request>),
    /// Gather statistics of an export elsewhere, then reply.
    ExportStats(ExportId),
    /// Begin the end of an export, and reply when it is over.
    ExportStop(ExportId, End),
    /// Gather statistics of these jobs elsewhere, then reply. `asked`: of one alone.
    Stats {
        /// The one.
        asked: Option<JobId>,
        /// All.
        jobs: Vec<JobId>,
    },
    /// Reply with the job, then send its events.
    Watch(Box<JobInfo>, Duration),
    /// Reply, then leave when no job is active; `true`: cancel them.
    Shutdown(bool),
}

impl Service {
    /// Decide one request.
    ///
    /// # Errors
    /// `Denied`, `NotFound`, `Invalid`, or what the registry says.
    pub fn act(&self, peer: &Peer, call: Call, descriptors: usize) -> Result<Action> {
        peer.check(Verb::of(&call))?;
        let call = peer.limit(call);
        if !matches!(call, Call::Submit(_) | Call::Luks(_) | Call::Export(_)) && descriptors > 0 {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("{descriptors} descriptors with a request that names none"),
            ));
        }
        let reply = match call {
            Call::Hello {} => Reply::Hello(self.about.hello.clone()),
            Call::Status {} => Reply::Status(Box::new(self.status())),
            Call::List {} => Reply::Jobs(self.jobs_of(peer).into_iter().map(shorten).collect()),
            Call::Show { job } => Reply::Job(Box::new(self.job(peer, job)?)),
            Call::Pause { job } => Reply::Job(Box::new(self.own(peer, job, |jobs| jobs.pause(job))?)),
            Call::Resume { job } => Reply::Job(Box::new(self.own(peer, job, |jobs| jobs.resume(job))?)),
            Call::Cancel { job } => Reply::Job(Box::new(self.own(peer, job, |jobs| jobs.cancel(job))?)),
            Call::Throttle { job, bytes_per_second } => {
                let job = self.own(peer, job, |jobs| jobs.throttle(job, bytes_per_second))?;
                Reply::Job(Box::new(job))
            }
            Call::Stats { job: Some(job) } => {
                self.job(peer, job)?;
                return Ok(Action::Stats { asked: Some(job), jobs: vec![job] });
            }
            Call::Stats { job: None } => {
                let jobs = self.jobs_of(peer).iter().map(|job| job.job).collect();
                return Ok(Action::Stats { asked: None, jobs });
            }
            Call::Submit(submit) => {
                check_names(&submit)?;
                return Ok(Action::Submit(submit));
            }
            Call::Watch { job, interval_ms } => {
                let (least, usual, most) = limits::WATCH_INTERVAL_MS;
                let interval = interval_ms.unwrap_or(usual);
                if !(least..=most).contains(&interval) {
                    return Err(Error::new(
                        ErrorKind::Invalid,
                        format!("interval_ms is {interval}, allowed: {least} to {most}"),
                    ));
                }
                let job = self.job(peer, job)?;
                return Ok(Action::Watch(Box::new(job), Duration::from_millis(u64::from(interval))));
            }
            Call::Luks(request) => {
                check_luks_names(&request)?;
                return Ok(Action::Luks(request));
            }
            Call::Export(request) => return Ok(Action::Export(request)),
            Call::Exports {} => {
                let mut exports = self.exports.list();
                exports.retain(|export| peer.owns(export.uid));
                Reply::Exports(exports.into_iter().map(shorten_export).collect())
            }
            Call::ExportStats { export } => {
                self.own_export(peer, export)?;
                return Ok(Action::ExportStats(export));
            }
            Call::ExportStop { export, now } => {
                self.own_export(peer, export)?;
                return Ok(Action::ExportStop(export, if now { End::Dropped } else { End::Drained }));
            }
            Call::Shutdown { now } => return Ok(Action::Shutdown(now)),
        };
        Ok(Action::Reply(reply))
    }

    fn job(&self, peer: &Peer, job: JobId) -> Result<JobInfo> {
        let info = self
            .registry
            .show(job)
            .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("no job {job}")))?;
        peer.admit(info)
    }

    /// `act` on a job this peer may touch.
    fn own<T>(&self, peer: &Peer, job: JobId, act: impl FnOnce(&Arc<Registry>) -> Result<T>) -> Result<T> {
        self.job(peer, job)?;
        act(&self.registry)
    }

    /// An error if this peer may not touch this export.
    fn own_export(&self, peer: &Peer, export: ExportId) -> Result<()> {
        let info = self.exports.info(export)?;
        if peer.owns(info.uid) {
            Ok(())
        } else {
            Err(Error::new(ErrorKind::Denied, format!("export {export} belongs to another user")))
        }
    }

    fn jobs_of(&self, peer: &Peer) -> Vec<JobInfo> {
        let mut jobs = self.registry.list();
        jobs.retain(|job| peer.owns(job.uid));
        jobs
    }

    fn status(&self) -> Status {
        let usage = process::usage();
        let about = self.about.clone();
        Status {
            hello: about.hello,
            socket: about.socket,
            uptime_seconds: about.started.elapsed().as_secs_f64(),
            kernel: about.kernel,
            kernel_forced: about.kernel_forced,
            memlock_needed_bytes: memlock_needed(&about.workers),
            workers: about.workers,
            active_jobs: self.registry.active(),
            active_exports: self.exports.active(),
            idle_exit_seconds: about.idle_exit.map(|time| time.as_secs()),
            memlock_limit_bytes: process::memlock_limit(),
            keys_locked: crate::crypto::keys_locked(),
            cpu_seconds: (usage.user.as_secs_f64(), usage.system.as_secs_f64()),
            rss_peak_bytes: usage.rss_peak_bytes,
            rss_bytes: process::resident_bytes(),
        }
    }
}

/// Statistics of one job (`asked`), or of all of `jobs` that are still remembered. Waits for workers.
///
/// # Errors
/// `NotFound`: the one asked for.
pub fn stats(registry: &Registry, asked: Option<JobId>, mut jobs: Vec<JobId>) -> Result<Reply> {
    loop {
        match registry.stats(&jobs) {
            Ok(mut stats) => {
                stats.job = asked;
                return Ok(Reply::Stats(Box::new(stats)));
            }
            // Some were forgotten meanwhile; every round there are fewer, so this ends.
            Err(error) if error.kind() == ErrorKind::NotFound && asked.is_none() => {
                jobs.retain(|job| registry.show(*job).is_some());
            }
            Err(error) => return Err(error),
        }
    }
}

/// A header operation, with the peer's rights where names change. Blocks for seconds. `gone`: the client went away, which
/// ends an operation that has written nothing yet. A new file of an operation that fails is removed.
///
/// # Errors
/// Whatever is wrong with it.
pub fn luks(
    owner: &Owner,
    request: proto::luks::Request,
    descriptors: Vec<OwnedFd>,
    gone: &AtomicBool,
) -> Result<Reply> {
    let caller = Caller {
        commit: &|commit, directory, file| Names::new(directory, commit, file, owner)?.commit(file),
        give_up: &|| gone.load(Ordering::Acquire),
    };
    let partial = Partial::of(&request, &descriptors, owner);
    let result = carry_out(request, descriptors, &caller);
    if let (Err(_), Some(Partial { names, file })) = (&result, partial)
        && let Some(left) = names.undo(&file)
    {
        tracing::info!("partial file left behind: {left}");
    }
    result.map(|reply| Reply::Luks(Box::new(reply)))
}

/// The new file of a header operation under its partial name, for the case that it does not get its own.
struct Partial {
    names: Names,
    file: OwnedFd,
}

impl Partial {
    /// `None`: there is none, or what the request says of it cannot be; then the operation is refused as well.
    fn of(request: &proto::luks::Request, descriptors: &[OwnedFd], owner: &Owner) -> Option<Self> {
        use proto::luks::Operation;
        let new = match &request.operation {
            Operation::HeaderBackup { file } => file,
            Operation::Format { new, .. } => new.header.as_ref()?,
            _ => return None,
        };
        let commit = new.commit.as_ref()?;
        let duplicate = |index: u32| descriptors.get(usize::try_from(index).ok()?)?.try_clone().ok();
        let names = Names::to_undo(duplicate(commit.dir_fd)?, commit, owner).ok()?;
        Some(Self { names, file: duplicate(new.fd)? })
    }
}

/// Which warnings about the daemon's memory were given: each once, to the first who submits.
#[derive(Debug, Default)]
pub struct Told {
    buffers: bool,
    keys: bool,
}

impl Told {
    /// What is to be told now.
    pub fn news(&mut self, workers: &[WorkerStatus]) -> Vec<String> {
        let mut warnings = Vec::new();
        if let (false, Some(needed)) = (self.buffers, memlock_needed(workers)) {
            self.buffers = true;
            let limit = process::memlock_limit().map_or("unlimited".to_owned(), |bytes| bytes.to_string());
            warnings.push(format!(
                "not all buffers are locked in memory, so plaintext could reach swap: the daemon needs RLIMIT_MEMLOCK of {needed} bytes and has {limit}"
            ));
        }
        if !self.keys && !crate::crypto::keys_locked() {
            self.keys = true;
            warnings.push(
                "memory of a key could not be locked, so the key could reach swap: raise RLIMIT_MEMLOCK of the daemon"
                    .to_owned(),
            );
        }
        warnings
    }
}

/// Bytes of `RLIMIT_MEMLOCK` it would take to lock every buffer, if one is neither locked nor registered (which pins it). A
/// mebibyte is added for keys.
#[must_use]
pub fn memlock_needed(workers: &[WorkerStatus]) -> Option<u64> {
    // Both begin with the first buffer, so the larger count is the number that stays in memory.
    let short =
        workers.iter().any(|worker| worker.buffers_locked.max(worker.buffers_registered) < worker.buffers);
    let bytes = |worker: &WorkerStatus| u64::from(worker.buffers) * u64::from(worker.buffer_bytes);
    short.then(|| workers.iter().map(bytes).sum::<u64>() + (1 << 20))
}

/// The wire's bound on names, before they are kept for as long as the job is.
fn check_names(submit: &Submit) -> Result<()> {
    let source = submit.source.as_ref().map(|source| ("source", &source.name));
    let sink = submit.sink.as_ref().map(|sink| ("sink", &sink.name));
    let header = match submit.volume.as_ref().map(|volume| &volume.format) {
        Some(Format::Luks(open)) => open.header.as_ref().map(|header| ("header", &header.name)),
        Some(Format::NewLuks(new)) => new.header.as_ref().map(|header| ("header", &header.name)),
        Some(Format::Raw(_)) | None => None,
    };
    let rewritten = submit.reencrypt.as_ref().map(|request| ("volume", &request.volume.name));
    let beside = match submit.reencrypt.as_ref().map(|request| &request.format) {
        Some(proto::reencrypt::Format::Luks(luks)) => {
            luks.header.as_ref().map(|header| ("header", &header.name))
        }
        Some(proto::reencrypt::Format::Raw(pair)) => Some(("journal", &pair.journal.name)),
        None => None,
    };
    let checkpoint = submit.checkpoint.as_ref().map(|checkpoint| ("checkpoint", &checkpoint.name));
    [source, sink, header, checkpoint, rewritten, beside].into_iter().flatten().try_for_each(check_name)
}

/// The same for a header operation.
fn check_luks_names(request: &proto::luks::Request) -> Result<()> {
    use proto::luks::Operation;
    let volume = request.volume.as_ref().map(|file| ("volume", &file.name));
    let header = request.header.as_ref().map(|file| ("header", &file.name));
    let file = match &request.operation {
        Operation::HeaderBackup { file } => Some(("backup", &file.name)),
        Operation::HeaderRestore { file, .. } => Some(("backup", &file.name)),
        Operation::Format { new, .. } => new.header.as_ref().map(|file| ("header", &file.name)),
        _ => None,
    };
    [volume, header, file].into_iter().flatten().try_for_each(check_name)
}

fn check_name((what, name): (&str, &String)) -> Result<()> {
    if name.len() > proto::MAX_NAME {
        let why = format!("name of the {what} is longer than {} bytes", proto::MAX_NAME);
        return Err(Error::new(ErrorKind::Invalid, why));
    }
    Ok(())
}

/// As it stands in a list: at most [`limits::LIST_ENTRY_MAX`] bytes as JSON.
fn shorten(mut job: JobInfo) -> JobInfo {
    cut(&mut job.source);
    cut(&mut job.sink);
    if let Some(outcome) = &mut job.outcome {
        outcome.bench = Vec::new();
        outcome.reencrypt = None;
        if let Some(failure) = &mut outcome.failure {
            cut(&mut failure.message);
            failure.hint = None;
        }
    }
    job
}

/// The same for an export; where it listens and what it is called are needed whole, and bounded already.
fn shorten_export(mut export: proto::export::Info) -> proto::export::Info {
    cut(&mut export.volume);
    if let Some(failure) = &mut export.failure {
        cut(&mut failure.message);
        failure.hint = None;
    }
    export
}

/// Both ends of a path say more than its middle.
fn cut(text: &mut String) {
    const MARK: &str = "\u{2026}";
    if text.len() <= limits::LIST_TEXT {
        return;
    }
    let half = (limits::LIST_TEXT - MARK.len()) / 2;
    let boundary = |at: &usize| text.is_char_boundary(*at);
    let head = (0..=half).rev().find(boundary).unwrap_or(0);
    let tail = (text.len() - half..text.len()).find(boundary).unwrap_or(text.len());
    text.replace_range(head..tail, MARK);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn submit(text: &str) -> Submit {
        serde_json::from_str(text).expect("parses")
    }

    #[test]
    fn a_name_is_as_long_as_the_wire_says_and_no_longer() {
        let named = |length: usize| {
            submit(&format!(r#"{{"action":"encrypt","source":{{"fd":0,"name":"{}"}}}}"#, "x".repeat(length)))
        };
        assert!(check_names(&named(proto::MAX_NAME)).is_ok());
        let error = check_names(&named(proto::MAX_NAME + 1)).expect_err("refused");
        assert_eq!(error.chain(), "name of the source is longer than 4096 bytes");
    }

    #[test]
    fn the_longest_entry_of_a_list_is_as_long_as_the_limit_says() {
        let worst = "\u{1}".repeat(proto::MAX_NAME);
        let (long, wide) = (-f64::MAX / 3.0, u64::MAX);
        let job = JobInfo {
            job: wide,
            uid: u32::MAX,
            action: proto::Action::Encrypt,
            source: worst.clone(),
            sink: worst.clone(),
            state: proto::JobState::Cancelled,
            detached: false,
            submitted_ms: wide,
            progress: proto::Progress {
                done_bytes: wide,
                resumed_bytes: wide,
                total_bytes: Some(wide),
                hole_bytes: wide,
                sparse_bytes: wide,
                elapsed_seconds: long,
                unlocking: false,
                phase: Some(proto::reencrypt::Phase::Recovering),
                unlock_seconds: long,
                bytes_per_second: long,
                eta_seconds: Some(long),
                bottleneck: Some(proto::Stage::Queue),
                throttle_bytes_per_second: Some(wide),
            },
            outcome: Some(proto::Outcome {
                seconds: long,
                failure: Some(proto::Failure {
                    kind: ErrorKind::ShuttingDown,
                    message: worst.clone(),
                    hint: Some(worst),
                }),
                first_difference: Some(wide),
                bench: Vec::new(),
                reencrypt: Some(Box::default()),
                padded_bytes: wide,
                cpu_seconds: (long, long),
            }),
        };
        let length = serde_json::to_vec(&shorten(job)).expect("json").len();
        assert!(length <= limits::LIST_ENTRY_MAX, "{length}");
    }

    #[test]
    fn long_names_are_cut_in_the_middle_between_characters() {
        let mut short = "/a/b".to_owned();
        cut(&mut short);
        assert_eq!(short, "/a/b");
        for pad in 0..4 {
            let mut long = format!("{}{}/end", "x".repeat(pad), "\u{1F512}".repeat(100));
            cut(&mut long);
            assert!(long.len() <= limits::LIST_TEXT && long.ends_with("/end") && long.contains('\u{2026}'));
        }
    }

    #[test]
    fn locked_memory_is_asked_for_only_when_it_is_short() {
        let worker = |locked| WorkerStatus {
            cpu: None,
            queue: "threads".into(),
            queue_fallback_reason: None,
            buffers: 8,
            buffer_bytes: 1 << 20,
            buffers_registered: 0,
            buffers_locked: locked,
            pages: "base".into(),
        };
        assert_eq!(memlock_needed(&[worker(8), worker(8)]), None);
        assert_eq!(memlock_needed(&[worker(8), worker(7)]), Some(17 << 20));
        let registered = WorkerStatus { buffers_registered: 8, ..worker(0) };
        assert_eq!(memlock_needed(&[registered]), None, "registered buffers are pinned");
        let told = Told::default().news(&[worker(8), worker(7)]);
        assert!(told[0].contains("17825792 bytes"), "{told:?}");
        let mut once = Told::default();
        assert_eq!([once.news(&[worker(7)]).len(), once.news(&[worker(7)]).len()], [1, 0]);
    }
}
