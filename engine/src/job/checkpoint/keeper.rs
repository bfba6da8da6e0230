//! The order in which checkpoints are written, and what is checked before a copy goes on.
//!
//! A copy begins; nothing was written to its sink yet (of a device, an old header was made unusable):
//!
//! 1. the description is written; 2. flush: a slot never speaks of one that is not there;
//! 3. the first slot, with watermark 0; 4. flush; 5. the directories of checkpoint and sink are flushed: from here on a
//!    crash leaves something to go on with.
//!
//! Every few seconds, while the workers go on:
//!
//! 6. the watermark is read: every write of a byte before it has been reported as done;
//! 7. the sink is flushed: these bytes are durable;
//! 8. the slot that is *not* the last one is written with the watermark; 9. flush. A power cut in 8 leaves the last slot,
//!    which promises less.
//!
//! A copy goes on: 10. the key, the source and what the sink holds before the watermark are checked, and nothing was
//! written before all of that was right; 11. a sink file is cut off at the watermark, so that nothing of what the crash
//! left beyond it stays; 12. the plan begins at the watermark, or a little before, where a block of both devices begins: what
//! is written there again is what is there.
//!
//! Writes that a killed daemon left to the kernel cannot come late: until they have ended they hold the open file, and with
//! it the lock (of a device, the exclusive opening) that the next job has to get.

use std::time::{Duration, Instant};

use crate::backend::blocking::Blocking;
use crate::backend::device::{Device, Nature};
use crate::error::{Error, ErrorKind, Result};
use crate::format::checkpoint::{DESCRIPTION_OFFSET, SLOT_BYTES, Slot, digest};
use crate::job::checkpoint::{ANEW, Checkpoint, compare};
use crate::pipeline::slot::Side;
use crate::pipeline::transfer::{Transfer, UNIT_BYTES_MAX};
use crate::volume::unlock::WRONG_KEY;

/// Also before its time, after so many bytes.
const BYTES_MAX: u64 = 8 << 30;

/// Keeps the checkpoint of a copy that runs.
pub struct Keeper<'a> {
    checkpoint: &'a mut Checkpoint,
    store: Blocking,
    sink: Blocking,
    last: Slot,
    when: Instant,
    /// A slot could not be written: what was kept before still holds, and no other is tried.
    given_up: bool,
}

impl<'a> Keeper<'a> {
    /// Begin, or check that a copy can go on and let it. The transfer has its segments, and no worker yet.
    ///
    /// # Errors
    /// `WrongKey`; `Conflict`: the source or the sink was changed; or of a device. Nothing but the checkpoint was written then.
    pub fn start(
        checkpoint: &'a mut Checkpoint,
        transfer: &Transfer,
        source: &Device,
        sink: &Device,
    ) -> Result<Self> {
        let store = Blocking::open(checkpoint.device.file().clone(), checkpoint.name(), 1)?;
        let end = &transfer.sink;
        let mut sink_store = Blocking::open(end.file.clone(), &end.name, end.align)?;
        let end = &transfer.source;
        let mut source_store = Blocking::open(end.file.clone(), &end.name, end.align)?;
        let key = checkpoint.key.as_ref().expect("the key is known before the workers begin");
        let key_check = key.value(&[b"key"]);
        let found = checkpoint.found;
        if found.is_some() && checkpoint.description.key_check != key_check {
            return Err(Error::new(ErrorKind::WrongKey, WRONG_KEY).at(checkpoint.name()));
        }
        let sample = compare::sample(&mut source_store, source.size().unwrap_or(0), key)?;
        let when = Instant::now();
        let last = match found {
            None => {
                (checkpoint.description.key_check, checkpoint.description.source_sample) =
                    (key_check, sample);
                let mut store = store;
                let last = begin(checkpoint, &mut store)?;
                checkpoint.kept = true;
                transfer.keep_marks();
                return Ok(Self { checkpoint, store, sink: sink_store, last, when, given_up: false });
            }
            Some(slot) => slot,
        };
        let changed = |what: String, name: &str| Error::new(ErrorKind::Conflict, what).at(name).hint(ANEW);
        if checkpoint.description.source_sample != sample {
            let what = "the source was changed since the copy was begun";
            return Err(changed(what.to_owned(), source.name()));
        }
        let watermark = last.watermark;
        let total = transfer.plan.end().unwrap_or(0);
        if watermark > total {
            let what = format!("the checkpoint is at byte {watermark} of {total}");
            return Err(Error::new(ErrorKind::Damaged, what).at(checkpoint.name()).hint(ANEW));
        }
        let is_file = sink.nature() == Nature::File;
        let place = transfer.place(Side::Sink, whole_units(transfer, watermark));
        if is_file && watermark > 0 && sink.current_len()? < place {
            let what = format!("the sink ends before byte {place}, to which it was written");
            return Err(changed(what, sink.name()));
        }
        if let Some(at) = compare::first_difference(transfer, &mut source_store, &mut sink_store, watermark)?
        {
            let what = format!(
                "the sink does not hold what was written to it: byte {at} of the plaintext, of {watermark} that were done"
            );
            return Err(changed(what, sink.name()));
        }
        if is_file {
            sink.set_len(if watermark == 0 { 0 } else { place })?;
        }
        transfer.keep_marks();
        transfer.start_at(whole_blocks(transfer, watermark));
        if watermark == total {
            transfer.padded(whole_units(transfer, total) - total);
        }
        tracing::info!("{} goes on at byte {watermark}", sink.name());
        Ok(Self { checkpoint, store, sink: sink_store, last, when, given_up: false })
    }

    /// How long to wait before [`Keeper::tick`].
    #[must_use]
    pub fn interval(&self) -> Duration {
        self.checkpoint.interval
    }

    /// Write a checkpoint if it is time for one and there is something new to say.
    ///
    /// # Errors
    /// The sink could not be flushed: what it holds is uncertain.
    pub fn tick(&mut self, transfer: &Transfer, now: Instant) -> Result<()> {
        let watermark = transfer.marks().map_or(0, |marks| marks.watermark(&transfer.plan));
        let is_due = now.saturating_duration_since(self.when) >= self.checkpoint.interval;
        if watermark > self.last.watermark && (is_due || watermark - self.last.watermark >= BYTES_MAX) {
            self.advance(watermark)?;
            // From its end on: one that takes long does not follow the next at once.
            self.when = Instant::now();
        }
        Ok(())
    }

    /// As [`Keeper::tick`], now: the workers have left.
    ///
    /// # Errors
    /// As there.
    pub fn last(&mut self, transfer: &Transfer) -> Result<()> {
        let watermark = transfer.marks().map_or(0, |marks| marks.watermark(&transfer.plan));
        if watermark > self.last.watermark { self.advance(watermark) } else { Ok(()) }
    }

    fn advance(&mut self, watermark: u64) -> Result<()> {
        // Step 7. An error here may have been reported once and never again, so nothing is promised after it.
        self.sink.flush().inspect_err(|_| self.given_up = true)?;
        if self.given_up {
            return Ok(());
        }
        let next = Slot { sequence: self.last.sequence + 1, watermark, ..self.last };
        // Steps 8 and 9.
        if let Err(error) = put(&mut self.store, &next) {
            tracing::warn!("no more checkpoints after byte {}: {}", self.last.watermark, error.chain());
            self.given_up = true;
            return Ok(());
        }
        self.last = next;
        Ok(())
    }
}

/// Steps 1 to 5.
fn begin(checkpoint: &Checkpoint, store: &mut Blocking) -> Result<Slot> {
    let description = checkpoint.description.to_bytes()?;
    // Both slots have their blocks now, or a full filesystem would be found out later.
    store.write(0, &vec![0; usize::try_from(DESCRIPTION_OFFSET).expect("small")])?;
    store.write(DESCRIPTION_OFFSET, &description)?;
    store.flush()?;
    let first = Slot {
        sequence: 1,
        watermark: 0,
        description_bytes: u32::try_from(description.len()).expect("bounded"),
        description_digest: digest(&description),
    };
    put(store, &first)?;
    if let Some(entry) = &checkpoint.entry {
        entry.sync()?;
    }
    Ok(first)
}

fn put(store: &mut Blocking, slot: &Slot) -> Result<()> {
    let bytes: [u8; SLOT_BYTES] = slot.to_bytes();
    store.write(slot.offset(), &bytes)?;
    store.flush()
}

/// `bytes` of plaintext rounded up to the data unit they end in.
fn whole_units(transfer: &Transfer, bytes: u64) -> u64 {
    let segment = transfer.segments().at(bytes.saturating_sub(1));
    segment.start + (bytes - segment.start.min(bytes)).next_multiple_of(segment.unit_bytes.into())
}

/// The last place at or before `offset` where a chunk may begin. With chunks of the same size as before it is `offset` itself.
fn whole_blocks(transfer: &Transfer, offset: u64) -> u64 {
    let start = transfer.segments().at(offset).start;
    let block = u64::from(UNIT_BYTES_MAX.max(transfer.source.align).max(transfer.sink.align));
    if Some(offset) == transfer.plan.end() { offset } else { start + (offset - start) / block * block }
}
