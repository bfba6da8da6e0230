//! One job from its start to its end, on a thread of its own that sleeps while the workers move the data.

use std::time::{Duration, Instant};

use crossbeam::channel::RecvTimeoutError;
use proto::{Action, JobState, Stage};

use crate::backend::device::{Device, Nature};
use crate::error::{Error, ErrorKind, Result};
use crate::job::checkpoint::{Checkpoint, Keeper};
use crate::job::commit::Names;
use crate::job::encrypted::Encrypted;
use crate::job::prepare::Prepared;
use crate::job::state::Job;
use crate::pipeline::Pipeline;
use crate::pipeline::slot::Side;
use crate::pipeline::transfer::{Transfer, Work};
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
    /// Zero bytes appended.
    pub padded_bytes: u64,
}

/// Carry a prepared job to its end.
///
/// # Errors
/// Why it failed or was cancelled; its sink is undone by then.
pub fn run(job: &Job, pipeline: &Pipeline, prepared: &mut Prepared) -> Result<Ending> {
    // Before anything may be undone: what another job has begun to write is not ours to remove.
    check_empty(job, prepared)?;
    let mut checkpoint = prepared.checkpoint.take();
    let mut begun = false;
    let outcome = carry(job, pipeline, prepared, checkpoint.as_mut(), &mut begun);
    prepared.checkpoint = checkpoint;
    match &mut prepared.checkpoint {
        Some(checkpoint) if outcome.is_ok() => checkpoint.remove(),
        Some(checkpoint) if checkpoint.is_kept() => {
            return outcome.map_err(|error| match error.kind() {
                ErrorKind::WrongKey => error,
                _ => error.or_hint(GO_ON),
            });
        }
        _ if prepared.updates && begun => return outcome.map_err(|error| error.or_hint(AGAIN)),
        _ if prepared.updates => {}
        _ if outcome.is_err() => undo(job, prepared),
        _ => {}
    }
    outcome
}

/// What a user does about a copy that ended before its time and has a checkpoint.
const GO_ON: &str = "what was done is kept: the same command with --resume goes on";

/// What a user does about holes that cannot all be kept.
pub(super) const ALL_OR_NONE: &str =
    "some holes would be decrypted like data: keep none of them, or copy the volume where it lies";

/// What a user does about an update that ended before its time. There is nothing to undo it by.
const AGAIN: &str = "the sink is neither the earlier copy nor the new one now: keep the bitmap, and run the same command again";

/// `begun`: the sink may have been written to.
fn carry(
    job: &Job,
    pipeline: &Pipeline,
    prepared: &mut Prepared,
    mut checkpoint: Option<&mut Checkpoint>,
    begun: &mut bool,
) -> Result<Ending> {
    let transfer = &prepared.transfer.clone();
    // First of all, or a wrong passphrase would cost a full disk of room.
    if !matches!(prepared.encrypted, Encrypted::Raw) {
        job.unlocking();
        let ends: [&Device; 2] = [&prepared.source, &prepared.sink];
        prepared.encrypted.begin(job, transfer, prepared.kernel, ends, checkpoint.as_deref_mut())?;
        job.unlocked();
    }
    if prepared.updates && prepared.sink.nature() == Nature::File {
        // Reading its header took the lock along.
        prepared.sink.lock()?;
    }
    // Before a copy goes on: what it holds is compared with what the source makes of its holes.
    learn_holes(job, prepared)?;
    let mut keeper = match checkpoint {
        None => None,
        Some(checkpoint) => {
            let keeper = Keeper::start(checkpoint, transfer, &prepared.source, &prepared.sink)?;
            prepared.names.iter().try_for_each(Names::sync)?;
            prepared.encrypted.sync_name()?;
            Some(keeper)
        }
    };
    make_room(job, prepared)?;
    *begun = true;
    pipeline.run(transfer, prepared.workers_max);
    let mut behind = transfer.began_at();
    let tick = keeper.as_ref().map_or(TICK, |keeper| keeper.interval().min(TICK));
    while let Err(RecvTimeoutError::Timeout) = transfer.ended.recv_timeout(tick) {
        job.tick(Instant::now());
        if let Some(keeper) = &mut keeper
            && let Err(error) = keeper.tick(transfer, Instant::now())
        {
            transfer.fail(error);
        }
        if transfer.gate.is_stopped() {
            // A worker with nothing in flight has no other way to learn of another's failure.
            pipeline.wake();
        }
        behind = tidy_cache(prepared, behind);
    }
    job.keep_record(transfer.final_record());
    if let Some(failure) = transfer.take_failure() {
        // After any other failure what the sink holds is not to be relied on; the last checkpoint is.
        if failure.kind() == ErrorKind::Cancelled
            && let Some(keeper) = &mut keeper
        {
            keeper.last(transfer)?;
        }
        return Err(failure);
    }
    job.check_cancelled()?;
    check_sizes(job, prepared)?;
    if job.action == Action::Verify {
        return verdict(job, prepared);
    }
    make_durable(job, pipeline, prepared, keeper.as_mut())?;
    Ok(Ending { padded_bytes: transfer.padded_bytes() })
}

/// Ask NBD servers for the zeros of what is only read. Where holes are to be kept all of them must be known; elsewhere zeros are read.
fn learn_holes(job: &Job, prepared: &Prepared) -> Result<()> {
    let transfer = &prepared.transfer;
    for (device, side) in [(&prepared.source, Side::Source), (&prepared.sink, Side::Sink)] {
        let are_kept = transfer.keep_holes && side == transfer.work.encrypted_side();
        if !are_kept && !device.may_have_holes() {
            continue;
        }
        let learned = device.learn_holes(&|| job.is_cancelled());
        job.check_cancelled()?;
        match learned {
            Err(error) if are_kept => return Err(error.hint(ALL_OR_NONE)),
            Err(error) => tracing::warn!("{}", error.chain()),
            Ok(()) => {}
        }
    }
    Ok(())
}

/// A sink file is empty when its job begins, or zeros left out would show what was there before.
fn check_empty(job: &Job, prepared: &Prepared) -> Result<()> {
    let sink = &prepared.sink;
    let is_resumed = prepared.checkpoint.as_ref().is_some_and(Checkpoint::is_resumed);
    let is_new = job.action != Action::Verify && prepared.is_file_sink() && !is_resumed;
    if is_new && sink.current_len()? != 0 {
        let what = "the sink is not empty any more: something else writes to it";
        return Err(Error::new(ErrorKind::Conflict, what).at(sink.name()));
    }
    Ok(())
}

/// A file that grew or shrank while it was read has not been read as a whole.
fn check_sizes(job: &Job, prepared: &Prepared) -> Result<()> {
    let verified = (job.action == Action::Verify).then_some(&prepared.sink);
    for device in std::iter::once(&prepared.source).chain(verified) {
        if let (Nature::File, Some(then)) = (device.nature(), device.size()) {
            let now = device.current_len()?;
            if now != then {
                let what = format!("the size changed while it was read: {then} bytes then, {now} now");
                return Err(Error::new(ErrorKind::Io, what).at(device.name()));
            }
        }
    }
    Ok(())
}

/// Give a new file its length, and its blocks where all of them will be written: an overfull filesystem says so before the
/// first write, and writes inside the length do not wait for each other.
fn make_room(job: &Job, prepared: &Prepared) -> Result<()> {
    let sink = &prepared.sink;
    if job.action == Action::Verify || !prepared.is_file_sink() {
        return Ok(());
    }
    let Some(total) = prepared.total_bytes else { return Ok(()) };
    let whole = sink_end(&prepared.transfer, total);
    sink.set_len(whole)?;
    // A memory filesystem would clear every page now, on one core, instead of while it is written.
    // What is not written stays a hole.
    let is_dense =
        !prepared.transfer.rules.skip_zeros && prepared.transfer.plan.covered_bytes() == Some(total);
    if is_dense && whole > 0 && !sink.is_memory() {
        sink.reserve(whole)?;
    }
    Ok(())
}

/// `bytes` of plaintext rounded up to the data unit of the segment they end in.
fn whole_units(transfer: &Transfer, bytes: u64) -> u64 {
    bytes.next_multiple_of(transfer.segments().at(bytes.saturating_sub(1)).unit_bytes.into())
}

/// Where a sink file ends that holds `bytes` of plaintext.
fn sink_end(transfer: &Transfer, bytes: u64) -> u64 {
    match transfer.work {
        Work::Encrypt => transfer.segments().place(0) + whole_units(transfer, bytes),
        Work::Decrypt | Work::Verify | Work::Recrypt => bytes,
    }
}

/// Buffered ends: start writing what is complete and drop what has passed, so that a volume does not push everybody else's
/// pages out, and the final flush has little left to do. Returns how far it got.
fn tidy_cache(prepared: &Prepared, behind: u64) -> u64 {
    let done = prepared.transfer.began_at() + prepared.transfer.totals().done_bytes;
    // Chunks complete out of order: stay a buffer pool behind, so that what is dropped is really over.
    let passed = done.saturating_sub(DROP_DISTANCE);
    drop_between(prepared, behind, passed);
    passed.max(behind)
}

/// Everything is durable: what is left of it in the page cache helps nobody.
fn drop_rest(prepared: &Prepared) {
    let end = prepared.transfer.plan.end().unwrap_or(0);
    drop_between(prepared, end.saturating_sub(2 * DROP_DISTANCE), end);
}

/// Drop both sides' pages of this plaintext. With several segments, of the part that lies in the first one's.
fn drop_between(prepared: &Prepared, start: u64, end: u64) {
    for (device, side) in buffered(prepared) {
        let place = prepared.transfer.place(side, start);
        if let Some(extent) = Extent::new(place, place + end.saturating_sub(start)) {
            device.drop_cache(extent);
        }
    }
}

/// The ends whose bytes pass through the page cache and would stay there.
fn buffered(prepared: &Prepared) -> impl Iterator<Item = (&Device, Side)> {
    let transfer = &prepared.transfer;
    let source = (&prepared.source, transfer.source.align, Side::Source);
    let sink = (&prepared.sink, transfer.sink.align, Side::Sink);
    [source, sink]
        .into_iter()
        .filter(|(device, align, _)| *align == 1 && !device.is_stream() && !device.is_memory())
        .map(|(device, _, side)| (&**device, side))
}

/// The end of a job that wrote, in this order (steps 3 to 5 of a new file are those of [`crate::job::commit::Names::commit`]):
///
/// 1. all data is written (the transfer has ended) and a file has its final length;
/// 2. flush: the data is durable;
/// 3. the header of a new volume, durable by its own order: one that is there has its data behind it;
/// 4. the last look for a cancellation: what has a name, or is whole on a device, is not taken back;
/// 5. the sink's name; 6. the name of a detached header. A crash between the two leaves whole data, and its whole header
///    under its partial name; the other way round it could leave a replaced header without its data;
/// 7. a checkpoint goes last ([`run`]): a crash before it leaves one too many, never one too few. Between 2 and 3 it is told
///    that all data is durable.
fn make_durable(
    job: &Job,
    pipeline: &Pipeline,
    prepared: &mut Prepared,
    keeper: Option<&mut Keeper<'_>>,
) -> Result<()> {
    job.set_state(JobState::Flushing);
    let sink = &prepared.sink;
    let transfer = &prepared.transfer;
    if prepared.is_file_sink() {
        sink.set_len(sink_end(transfer, transfer.plan.end().unwrap_or(0)))?;
    }
    let start = Instant::now();
    if sink.is_stream() {
        sink.sync_all()?;
    } else {
        // Through a queue, where a simulated disk sees it. A file's length is of what its data needs to be found by.
        pipeline.blocking(sink.file().clone(), sink.name(), 1)?.flush()?;
    }
    if let Some(keeper) = keeper {
        keeper.last(transfer)?;
    }
    job.check_cancelled()?;
    prepared.encrypted.finish(transfer)?;
    if prepared.names.is_some() {
        job.check_cancelled()?;
    }
    drop_rest(prepared);
    let mut record = StageRecord::default();
    record.record(&transfer.counters[0], Stage::Flush, start.elapsed(), 0);
    job.add_record(&record);
    if let Some(names) = &prepared.names {
        names.commit(&**sink.file())?;
    }
    prepared.encrypted.commit()
}

/// A job that did not succeed leaves nothing that looks whole.
fn undo(job: &Job, prepared: &Prepared) {
    if job.action == Action::Verify {
        return;
    }
    discard(prepared);
    if prepared.names.is_none() && prepared.is_file_sink() {
        // A file that was handed over empty is empty again.
        if let Err(error) = prepared.sink.set_len(0) {
            tracing::warn!("{}", error.chain());
        }
    }
}

/// Remove the partial file of a job that did not even begin.
pub fn discard(prepared: &Prepared) {
    match &prepared.checkpoint {
        Some(checkpoint) if checkpoint.is_kept() => return,
        Some(checkpoint) => checkpoint.remove(),
        None => {}
    }
    prepared.encrypted.discard();
    if let Some(names) = &prepared.names
        && let Some(left) = names.undo(&**prepared.sink.file())
    {
        tracing::info!("partial sink left behind: {left}");
    }
}

/// Both sides agree as far as they were compared; do they also end together?
fn verdict(job: &Job, prepared: &Prepared) -> Result<Ending> {
    let transfer = &prepared.transfer;
    let sink = &prepared.sink;
    if transfer.first_difference().is_none() {
        let end = transfer.plan.end().unwrap_or(0);
        let expected = whole_units(transfer, end);
        // A device may be larger than the volume on it; a file or a stream may not, unless the volume says where it ends.
        let longer = if let Some(bytes) = prepared.encrypted.fixed_bytes() {
            bytes > expected
        } else if sink.is_stream() {
            // A stream source has been read to its end, and the sink with it; a file's last chunk asked for no more.
            prepared.total_bytes.is_some() && sink.has_more(&|| job.is_cancelled())?
        } else {
            sink.nature() == Nature::File && prepared.volume_bytes.is_some_and(|bytes| bytes > expected)
        };
        // A volume may say itself where it ends: then the source was not asked whether it does, too.
        let source = &prepared.source;
        let longer = longer || source.is_stream() && source.has_more(&|| job.is_cancelled())?;
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
