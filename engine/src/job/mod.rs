//! (interface; the implementation is being written beside this) Jobs: a user's intent with a number, its state, its end.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use proto::{JobId, JobInfo, Stats, Submit};

use crate::crypto::Kernel;
use crate::error::Error;
use crate::pipeline::Pipeline;

/// Whose job it is: the credentials of the socket's peer, read once at accept. Filesystem changes for a job (rename,
/// unlink) are made with these rights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Supplementary groups (`SO_PEERGROUPS`).
    pub groups: Vec<u32>,
}

/// Bounds and choices for all jobs.
#[derive(Debug, Clone)]
pub struct JobConfig {
    /// The kernel every cipher is built with.
    pub kernel: Kernel,
    /// Jobs that run at once; more wait as `queued`.
    pub running_max: u32,
    /// Jobs queued or running that one user may have.
    pub per_user_max: u32,
    /// Finished jobs remembered for `list` and `show`.
    pub remembered_max: u32,
}

/// All jobs of this daemon. Every method is quick and may be called from the control thread: the work is done elsewhere.
pub struct Registry {}

impl Registry {
    /// `notify` is called from other threads whenever a job's state changed (not on progress).
    pub fn start(
        config: JobConfig,
        pipeline: Pipeline,
        notify: Box<dyn Fn(JobId) + Send + Sync>,
    ) -> Arc<Self> {
        let _ = (config, pipeline, notify);
        todo!()
    }

    /// Check a request (descriptors of the right kind, sizes, key) and start or queue it. Returns warnings with the number.
    ///
    /// # Errors
    /// Anything wrong with the request, before anything was written.
    pub fn submit(
        &self,
        owner: &Owner,
        submit: Submit,
        descriptors: Vec<OwnedFd>,
    ) -> Result<(JobId, Vec<String>), Error> {
        let _ = (owner, submit, descriptors);
        todo!()
    }

    /// All jobs, oldest first.
    pub fn list(&self) -> Vec<JobInfo> {
        todo!()
    }

    /// One job, or `None`.
    pub fn show(&self, job: JobId) -> Option<JobInfo> {
        let _ = job;
        todo!()
    }

    /// See `proto::Call::Pause`.
    ///
    /// # Errors
    /// `NotFound`, or `Conflict` when final.
    pub fn pause(&self, job: JobId) -> Result<JobInfo, Error> {
        let _ = job;
        todo!()
    }

    /// See `proto::Call::Resume`.
    ///
    /// # Errors
    /// `NotFound`, or `Conflict` when final.
    pub fn resume(&self, job: JobId) -> Result<JobInfo, Error> {
        let _ = job;
        todo!()
    }

    /// Ask for the end of a job; it is final a little later.
    ///
    /// # Errors
    /// `NotFound`, or `Conflict` when final already.
    pub fn cancel(&self, job: JobId) -> Result<JobInfo, Error> {
        let _ = job;
        todo!()
    }

    /// See `proto::Call::Throttle`.
    ///
    /// # Errors
    /// `NotFound`, `Conflict` when final, or `Invalid` for a rate of zero.
    pub fn throttle(&self, job: JobId, bytes_per_second: Option<u64>) -> Result<JobInfo, Error> {
        let _ = (job, bytes_per_second);
        todo!()
    }

    /// Statistics of one job, or of several merged.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn stats(&self, jobs: &[JobId]) -> Result<Stats, Error> {
        let _ = jobs;
        todo!()
    }

    /// Jobs not yet final.
    pub fn active(&self) -> u32 {
        todo!()
    }
}
