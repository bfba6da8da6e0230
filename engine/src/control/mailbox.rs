//! What other threads have to say to the loop: jobs that changed, exports that ended, what helpers have come to.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use proto::export::ExportId;
use proto::{JobId, JobInfo, Reply};
use rustix::event::EventfdFlags;

use crate::error::{Error, Result};

/// The news. Bounded by the number of jobs and of helpers.
#[derive(Debug, Default)]
pub(super) struct News {
    /// Jobs that changed.
    pub jobs: BTreeMap<JobId, Notice>,
    /// Helpers that are done.
    pub finished: Vec<Finished>,
}

/// What became of a job.
#[derive(Debug)]
pub enum Notice {
    /// Its state changed; the registry knows.
    Changed,
    /// It ended, like this. The registry may have forgotten it by now.
    Ended(Box<JobInfo>),
    /// It ended, and was forgotten before anybody could look.
    Forgotten,
}

/// A helper's result.
#[derive(Debug)]
pub(super) struct Finished {
    /// Whose share it took.
    pub uid: u32,
    /// Whose connection waits for it.
    pub connection: u64,
    /// The request.
    pub id: u64,
    /// What it came to.
    pub outcome: Outcome,
}

/// What a helper came to.
#[derive(Debug)]
pub(super) enum Outcome {
    /// A job was submitted, or refused.
    Submitted { detach: bool, result: Result<(JobId, Vec<String>)> },
    /// A volume is exported, or was refused.
    Exported { detach: bool, result: Result<(ExportId, Vec<String>)> },
    /// Anything else.
    Answer(Result<Reply>),
}

/// Interrupts the loop from any thread.
#[derive(Debug)]
pub struct Mailbox {
    pub(super) wake: OwnedFd,
    news: Mutex<News>,
}

impl Mailbox {
    /// An empty one.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn new() -> Result<Arc<Self>> {
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| Error::io("cannot make an eventfd", error))?;
        Ok(Arc::new(Self { wake, news: Mutex::default() }))
    }

    /// A job's state changed, to what `job` shows now. For `Registry::start`, which calls before it forgets the job: the end
    /// travels with the notice, so watchers learn it however soon that is.
    pub fn job_changed(&self, id: JobId, job: Option<JobInfo>) {
        let notice = match job {
            Some(job) if job.state.is_final() => Notice::Ended(Box::new(job)),
            Some(_) => Notice::Changed,
            None => Notice::Forgotten,
        };
        self.post(|news| match news.jobs.get(&id) {
            Some(Notice::Ended(_)) => {}
            _ => {
                news.jobs.insert(id, notice);
            }
        });
    }

    /// An export has ended: whether to leave is to be looked at again.
    pub fn export_ended(&self) {
        self.post(|_| {});
    }

    pub(super) fn post(&self, put: impl FnOnce(&mut News)) {
        put(&mut self.news.lock().unwrap_or_else(PoisonError::into_inner));
        // Full means already awake.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    pub(super) fn take(&self) -> News {
        // Before the news is taken: what is posted in between wakes the loop once more.
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
        std::mem::take(&mut self.news.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_job_is_not_overwritten_by_an_older_notice() {
        let text = r#"{"job":3,"uid":0,"action":"encrypt","source":"a","sink":"b","state":"done","detached":false,
            "submitted_ms":0,"progress":{"done_bytes":0,"hole_bytes":0,"sparse_bytes":0,"elapsed_seconds":0.0,
            "bytes_per_second":0.0}}"#;
        let ended: JobInfo = serde_json::from_str(text).expect("parses");
        let running = JobInfo { state: proto::JobState::Running, ..ended.clone() };
        let mailbox = Mailbox::new().expect("an eventfd");
        for job in [Some(running.clone()), Some(ended), Some(running), None] {
            mailbox.job_changed(3, job);
        }
        let news = mailbox.take();
        assert!(matches!(&news.jobs[&3], Notice::Ended(job) if job.job == 3), "{news:?}");
    }
}
