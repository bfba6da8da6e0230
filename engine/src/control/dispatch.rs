//! One request in, one action out: rights are checked here, and everything a request can say about itself.
//!
//! Every verb but three is answered on the spot, because the registry's methods are quick. The three change the connection or
//! the daemon, so they are handed back to the loop: `submit` (it may probe devices, so it runs on a thread of its own),
//! `watch` and `shutdown`.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::{Call, ErrorKind, Hello, JobId, JobInfo, Reply, Status, Submit, WorkerStatus};

use super::policy::{Peer, Verb};
use crate::error::{Error, Result};
use crate::job::Registry;
use crate::limits;
use crate::sys::process;

/// What every request may need.
pub struct Service {
    /// The jobs.
    pub registry: Arc<Registry>,
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
    Submit(Box<Submit>, Vec<OwnedFd>),
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
    pub fn act(&self, peer: &Peer, call: Call, descriptors: Vec<OwnedFd>) -> Result<Action> {
        peer.check(Verb::of(&call))?;
        if !matches!(call, Call::Submit(_)) && !descriptors.is_empty() {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("{} descriptors with a request that names none", descriptors.len()),
            ));
        }
        let reply = match call {
            Call::Hello {} => Reply::Hello(self.about.hello.clone()),
            Call::Status {} => Reply::Status(Box::new(self.status())),
            Call::List {} => Reply::Jobs(self.jobs_of(peer)),
            Call::Show { job } => Reply::Job(Box::new(self.job(peer, job)?)),
            Call::Pause { job } => Reply::Job(Box::new(self.own(peer, job, |jobs| jobs.pause(job))?)),
            Call::Resume { job } => Reply::Job(Box::new(self.own(peer, job, |jobs| jobs.resume(job))?)),
            Call::Cancel { job } => Reply::Job(Box::new(self.own(peer, job, |jobs| jobs.cancel(job))?)),
            Call::Throttle { job, bytes_per_second } => {
                let job = self.own(peer, job, |jobs| jobs.throttle(job, bytes_per_second))?;
                Reply::Job(Box::new(job))
            }
            Call::Stats { job: Some(job) } => {
                Reply::Stats(Box::new(self.own(peer, job, |jobs| jobs.stats(&[job]))?))
            }
            Call::Stats { job: None } => {
                let own: Vec<JobId> = self.jobs_of(peer).iter().map(|job| job.job).collect();
                Reply::Stats(Box::new(self.registry.stats(&own)?))
            }
            Call::Submit(submit) => {
                check_submit(&submit, descriptors.len())?;
                return Ok(Action::Submit(submit, descriptors));
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
            idle_exit_seconds: about.idle_exit.map(|time| time.as_secs()),
            memlock_limit_bytes: process::memlock_limit(),
            keys_locked: crate::crypto::keys_locked(),
            cpu_seconds: (usage.user.as_secs_f64(), usage.system.as_secs_f64()),
            rss_peak_bytes: usage.rss_peak_bytes,
            rss_bytes: process::resident_bytes(),
        }
    }
}

/// Bytes of `RLIMIT_MEMLOCK` it would take to lock every buffer, if one is not locked. A mebibyte is added for keys.
#[must_use]
pub fn memlock_needed(workers: &[WorkerStatus]) -> Option<u64> {
    let short = workers.iter().any(|worker| worker.buffers_locked < worker.buffers);
    let bytes = |worker: &WorkerStatus| u64::from(worker.buffers) * u64::from(worker.buffer_bytes);
    short.then(|| workers.iter().map(bytes).sum::<u64>() + (1 << 20))
}

/// Descriptors and names of a submission against each other. What they are is the registry's to find out.
fn check_submit(submit: &Submit, passed: usize) -> Result<()> {
    let invalid = |message: String| Err(Error::new(ErrorKind::Invalid, message));
    let mut named: Vec<(&str, u32)> = Vec::new();
    if let Some(source) = &submit.source {
        named.push(("source", source.fd));
        check_name("source", &source.name, proto::MAX_NAME)?;
    }
    if let Some(sink) = &submit.sink {
        named.push(("sink", sink.fd));
        check_name("sink", &sink.name, proto::MAX_NAME)?;
        if let Some(commit) = &sink.commit {
            named.push(("commit", commit.dir_fd));
            check_file_name("partial", &commit.partial)?;
            check_file_name("name", &commit.name)?;
        }
    }
    if let Some(volume) = &submit.volume {
        named.push(("key", volume.key_fd));
    }
    for (at, (what, index)) in named.iter().enumerate() {
        if usize::try_from(*index).map_or(true, |index| index >= passed) {
            return invalid(format!("{what} names descriptor {index}, {passed} were passed"));
        }
        if let Some((other, _)) = named[..at].iter().find(|(_, earlier)| earlier == index) {
            return invalid(format!("{other} and {what} name the same descriptor {index}"));
        }
    }
    if named.len() < passed {
        return invalid(format!("{passed} descriptors were passed, {} are named", named.len()));
    }
    Ok(())
}

fn check_name(what: &str, name: &str, most: usize) -> Result<()> {
    if name.len() <= most {
        Ok(())
    } else {
        Err(Error::new(ErrorKind::Invalid, format!("name of the {what} is longer than {most} bytes")))
    }
}

/// A file name inside a directory: never a way out of it.
fn check_file_name(what: &str, name: &str) -> Result<()> {
    check_name(what, name, 255)?;
    if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']) {
        return Err(Error::new(ErrorKind::Invalid, format!("{what} is no file name: {name:?}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn submit(text: &str) -> Submit {
        serde_json::from_str(text).expect("parses")
    }

    const WHOLE: &str = r#"{"action":"encrypt","source":{"fd":0,"name":"a"},
        "sink":{"fd":1,"name":"b","commit":{"dir_fd":2,"partial":"b.partial","name":"b"}},
        "volume":{"format":{"raw":{"key_bytes":64,"data_unit":512,"tweak":"plain64"}},"key_fd":3}}"#;

    #[test]
    fn every_descriptor_is_named_once_and_every_name_is_passed() {
        let whole = submit(WHOLE);
        assert!(check_submit(&whole, 4).is_ok());
        let complaint = |submit: &Submit, passed| check_submit(submit, passed).expect_err("refused").chain();
        assert_eq!(complaint(&whole, 3), "key names descriptor 3, 3 were passed");
        assert_eq!(complaint(&whole, 5), "5 descriptors were passed, 4 are named");
        let twice = submit(&WHOLE.replace(r#""key_fd":3"#, r#""key_fd":1"#));
        assert_eq!(complaint(&twice, 3), "sink and key name the same descriptor 1");
    }

    #[test]
    fn a_file_name_never_leads_out_of_its_directory() {
        for name in ["", ".", "..", "../b", "/b", "b/", "b\\u0000"] {
            let text = WHOLE.replace(r#""name":"b"}"#, &format!(r#""name":"{name}"}}"#));
            assert!(check_submit(&submit(&text), 4).is_err(), "{name:?}");
        }
        let long = WHOLE.replace("b.partial", &"b".repeat(256));
        assert!(check_submit(&submit(&long), 4).is_err());
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
    }
}
