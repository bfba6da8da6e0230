//! What it would do, and how long it would take.

use crate::error::{Error, ErrorKind, Result};
use crate::job::reencrypt::request::Prepared;
use crate::job::run::Ending;
use crate::job::state::Job;
use crate::pipeline::Pipeline;

/// Say it.
///
/// # Errors
/// Of the plan.
pub fn run(job: &Job, pipeline: &Pipeline, prepared: &Prepared) -> Result<Ending> {
    let _ = (job, pipeline, prepared);
    Err(Error::new(ErrorKind::Unsupported, "dry run"))
}
