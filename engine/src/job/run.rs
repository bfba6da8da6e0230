//! One job from its start to its end, on a thread of its own that sleeps while the workers move the data.

use std::time::{Duration, Instant};

use crossbeam::channel::RecvTimeoutError;
use proto::{Action, JobState, Stage};

use crate::backend::device::Nature;
use crate::error::{Error, ErrorKind, Result};
use crate::job::prepare::Prepared;
use crate::job::state::Job;
use crate::pipeline::Pipeline;
use crate::telemetry::record::StageRecord;
use crate::units::Extent;

/// How often a running job looks after itself: rate samples, page-cache hygiene.
const TICK: Duration = Duration::from_millis(250);

/// How far behind the last finished chunk the page cache is dropped, bytes. Chunks complete out of order: this is more
/// than all that can be in flight.
const DROP_DISTANCE: u64 = 256 << 20;

/// What a job leaves behind when it has ended well.
#[derive(Debug, Default)]
pub struct Ending {
    /// `verify`: where the sides first differ.
    pub first_difference: Option<u64>,
    /// Zero bytes appended.
    pub padded_bytes: u64,
}

/// Carry a prepared job to its end.
///
/// # Errors
/// Why it failed or was cancelled; its sink is undone by then.
pub fn run(job: &Job, pipeline: &Pipeline, prepared: &Prepared) -> Result<Ending> {
    let outcome = carry(job, pipeline, prepared);
    if outcome.is_err() {
        undo(job, prepared);
    }
    outcome
}

fn carry(job: &Job, pipeline: &Pipeline, prepared: &Prepared) -> Result<Ending> {
    let transfer = &prepared.transfer;
    make_room(job, prepared)?;
    pipeline.run(transfer, prepared.workers_max);
    let mut behind = 0;
    while let Err(RecvTimeoutError::Timeout) = transfer.ended.recv_timeout(TICK) {
        job.tick(Instant::now());
        behind = tidy_cache(prepared, behind);
    }
    job.keep_record(transfer.final_record());
    if let Some(failure) = transfer.take_failure() {
        return Err(failure);
    }
    job.check_cancelled()?;
    if job.action == Action::Verify {
        return verdict(job, prepared);
    }
    make_durable(job, prepared)?;
    Ok(Ending { first_difference: None, padded_bytes: transfer.padded_bytes() })
}

/// Give a new file its length, and its blocks where all of them will be written: an overfull filesystem says so before the
/// first write, and writes inside the length do not wait for each other.
fn make_room(job: &Job, prepared: &Prepared) -> Result<()> {
    let sink = &prepared.sink;
    if job.action == Action::Verify || !prepared.is_file_sink() {
        return Ok(());
    }
    let Some(total) = prepared.total_bytes else { return Ok(()) };
    let whole = total.next_multiple_of(prepared.transfer.unit_bytes.into());
    sink.set_len(whole)?;
    // A memory filesystem would clear every page now, on one core, instead of while it is written.
    if !prepared.transfer.rules.skip_zeros && whole > 0 && !sink.is_memory() {
        sink.reserve(whole)?;
    }
    Ok(())
}

/// Buffered ends: start writing what is complete and drop what has passed, so that a volume does not push everybody else's
/// pages out, and the final flush has little left to do. Returns how far it got.
fn tidy_cache(prepared: &Prepared, behind: u64) -> u64 {
    let transfer = &prepared.transfer;
    let done = transfer.totals().done_bytes;
    // Chunks complete out of order: stay a buffer pool behind, so that what is dropped is really over.
    let passed = done.saturating_sub(DROP_DISTANCE);
    let Some(extent) = Extent::new(behind, passed) else { return behind };
    for (device, align) in [(&prepared.source, transfer.source.align), (&prepared.sink, transfer.sink.align)]
    {
        if align == 1 && !device.is_stream() && !device.is_memory() {
            device.drop_cache(extent);
        }
    }
    passed
}

/// See the write order in [`crate::job::commit::Names::commit`].
fn make_durable(job: &Job, prepared: &Prepared) -> Result<()> {
    job.set_state(JobState::Flushing);
    let sink = &prepared.sink;
    let transfer = &prepared.transfer;
    if prepared.is_file_sink() {
        let end = transfer.plan.end().unwrap_or(0);
        sink.set_len(end.next_multiple_of(transfer.unit_bytes.into()))?;
    }
    let start = Instant::now();
    sink.sync_all()?;
    let mut record = StageRecord::default();
    record.record(&transfer.counters[0], Stage::Flush, start.elapsed(), 0);
    job.add_record(&record);
    job.check_cancelled()?;
    if let Some(names) = &prepared.names {
        names.commit(&**sink.file())?;
    }
    Ok(())
}

/// A job that did not succeed leaves nothing that looks whole.
pub fn undo(job: &Job, prepared: &Prepared) {
    if job.action == Action::Verify {
        return;
    }
    if let Some(names) = &prepared.names {
        if let Some(left) = names.undo(&**prepared.sink.file()) {
            tracing::info!("partial sink left behind: {left}");
        }
    } else if prepared.is_file_sink() {
        // A file that was handed over empty is empty again: never half a volume that looks whole.
        if let Err(error) = prepared.sink.set_len(0) {
            tracing::warn!("{}", error.chain());
        }
    }
}

/// Both sides agree as far as they were compared; do they also end together?
fn verdict(job: &Job, prepared: &Prepared) -> Result<Ending> {
    let transfer = &prepared.transfer;
    let sink = &prepared.sink;
    if transfer.first_difference().is_none() {
        let expected = transfer.plan.end().unwrap_or(0).next_multiple_of(transfer.unit_bytes.into());
        // A device may be larger than the volume on it; a file or a stream may not.
        let longer = if sink.is_stream() {
            // A stream source has been read to its end, and the sink with it; a file's last chunk asked for no more.
            prepared.total_bytes.is_some() && sink.has_more(|| job.is_cancelled())?
        } else {
            sink.nature() == Nature::File && sink.size().is_some_and(|size| size > expected)
        };
        job.check_cancelled()?;
        if longer {
            transfer.differs_at(expected);
        }
    }
    match transfer.first_difference() {
        None => Ok(Ending::default()),
        Some(offset) => {
            job.found_difference(offset);
            let what = format!("plaintext differs first at byte {offset} (sector {})", offset / 512);
            Err(Error::new(ErrorKind::Difference, what)
                .at(format!("{} and {}", transfer.source.name, transfer.sink.name)))
        }
    }
}
