//! What it would do, and how long it would take. Writes nothing.
//!
//! The time is an estimate from two measurements: how fast the device reads, in pieces spread over all of it and with as many
//! transfers in flight as the job would have; and how fast this machine's workers hash and re-encrypt in memory. Writes cannot be
//! measured without writing, so a byte written is taken to cost what a byte read does. That is said in the report.

use std::time::{Duration, Instant};

use proto::reencrypt::{Format, Report};

use crate::crypto::hash::Hash;
use crate::crypto::{Layout, Secret, VolumeKey, recrypter, sha256};
use crate::error::Result;
use crate::format::luks2::reencrypt::{Resilience, Side, State, read};
use crate::job::reencrypt::Desk;
use crate::job::reencrypt::course::{self, Shape};
use crate::job::reencrypt::memory::Memory;
use crate::job::reencrypt::request::Prepared;
use crate::job::reencrypt::same;
use crate::job::run::Ending;
use crate::job::state::Job;
use crate::pipeline::carrier::{Carrier, Turn};
use crate::volume::Header;
use crate::volume::random;
use crate::volume::reencrypt::begin::{self, Planned};
use crate::volume::reencrypt::sidecar;

/// Pieces of the device that are read.
const PLACES: u64 = 8;
/// Most bytes of one.
const PLACE_BYTES: u64 = 32 << 20;
/// When that much time has passed, the pieces read so far have to do.
const ENOUGH: Duration = Duration::from_secs(5);
/// How often a cancellation is looked for.
const TICK: Duration = Duration::from_millis(100);
/// What is hashed and re-encrypted in memory, bytes.
const SAMPLE_BYTES: usize = 8 << 20;
/// What a step costs beside its bytes: two header writes and three flushes, as a disk without battery has them.
const STEP_SECONDS: f64 = 0.02;

/// Say it.
///
/// # Errors
/// As beginning it: wrong keys, keyslots that would be lost, no room, another one under way than is asked for. Of the device.
pub(super) fn run(job: &Job, desk: &Desk<'_>, prepared: &Prepared) -> Result<Ending> {
    job.unlocking();
    let planned = match under_way(job, desk, prepared) {
        Ok(Some(begun)) => Ok(begun),
        Ok(None) => plan(job, desk, prepared).map(|planned| (planned, 0)),
        Err(error) => Err(error),
    };
    job.unlocked();
    let (planned, done_before) = planned?;
    let left = planned.total - done_before;
    let memory = Memory::take();
    let shape = desk.shape(prepared, desk.align, &memory);
    let hotzone = planned.hotzone_max.unwrap_or(u64::MAX).min(prepared.hotzone_bytes.unwrap_or(u64::MAX));
    let hotzone_bytes = hotzone.min(shape.memory / 2).min(planned.total);
    let [old_cipher, new_cipher] = planned.ciphers.clone();
    let mut report = Report {
        total_bytes: planned.total,
        done_before_bytes: done_before,
        old_cipher,
        new_cipher,
        resilience: planned.resilience.clone(),
        hotzone_bytes,
        carried_keyslots: planned.carried.clone(),
        dropped_keyslots: planned.dropped.clone(),
        notes: planned.notes.clone(),
        ..Report::default()
    };
    job.report(report.clone());
    let (read, seconds) = sample(job, desk, prepared, &shape)?;
    if read > 0 {
        let io = seconds / number(read);
        let cpu = in_memory(&planned, &shape)?;
        let ways = match planned.resilience.as_str() {
            // Read, journal, write.
            "journal" => 3.0,
            _ => 2.0,
        };
        let reread = if prepared.verify { number(left) * io } else { 0.0 };
        let steps = match planned.hotzone_max {
            Some(_) => number(left.div_ceil(hotzone_bytes.max(1))),
            None => 1.0,
        };
        // A limit holds for what is re-encrypted, and for what is read once more.
        let passes = if prepared.verify { 2.0 } else { 1.0 };
        let limited = prepared.rate.map_or(0.0, |rate| passes * number(left) / number(rate));
        let estimate = number(left) * (ways * io).max(cpu) + steps * STEP_SECONDS + reread;
        report.estimate_seconds = Some(estimate.max(limited));
        report.notes.push(format!(
            "the time is an estimate: {} MiB were read in {seconds:.2} s, and writes, of which a dry run makes none, are \
             taken to cost what reads do; the hashing of passphrases is left out",
            read >> 20
        ));
        job.report(report);
    }
    Ok(Ending::default())
}

/// What is left of one under way, and the bytes that are new already; `None`: there is none. By the header alone: whether its digest
/// is that of the keys is found out when it is gone on with.
fn under_way(job: &Job, desk: &Desk<'_>, prepared: &Prepared) -> Result<Option<(Planned, u64)>> {
    let Format::Luks(luks) = &prepared.format else { return Ok(None) };
    let mut header = desk.blocking(prepared.header())?;
    let Ok(Header::Luks2(loaded)) = Header::load(&mut header) else { return Ok(None) };
    let Ok(Some((process, state))) = read::read(&loaded.header.metadata) else { return Ok(None) };
    let Some(total) = process.total.or_else(|| prepared.data_bytes().checked_sub(process.old.offset)) else {
        return Ok(None);
    };
    same::check(&mut header, prepared, luks, &|| job.is_cancelled())?;
    let done = state.done_bytes(&process, total);
    let mut notes = vec![format!("a re-encryption is under way: {} of {total} bytes are left", total - done)];
    if let State::Crash { start, end } = state {
        let bytes = end.saturating_sub(start);
        notes.push(match process.resilience {
            Resilience::None => "a step was interrupted, and nothing was kept to recover it by".to_owned(),
            _ => format!("a step of {bytes} bytes was interrupted and is recovered first"),
        });
    }
    let words = |side: &Side| {
        let cipher = side.cipher.as_ref()?;
        Some(format!("{}, {}-byte data units", cipher.encryption, cipher.sector_size))
    };
    let planned = Planned {
        total,
        resilience: process.resilience.name().to_owned(),
        hotzone_max: process.hotzone_max(),
        ciphers: [words(&process.old), words(&process.new)],
        carried: Vec::new(),
        dropped: Vec::new(),
        notes,
    };
    Ok(Some((planned, done)))
}

fn plan(job: &Job, desk: &Desk<'_>, prepared: &Prepared) -> Result<Planned> {
    let give_up = || job.is_cancelled();
    match &prepared.format {
        Format::Luks(luks) => {
            let wish = desk.wish(prepared, luks);
            let mut header = desk.blocking(prepared.header())?;
            begin::plan(&mut header, &wish, &prepared.keys, prepared.new_key.as_ref(), &give_up)
        }
        Format::Raw(pair) => {
            let beside = prepared.beside.as_ref().expect("a journal was opened");
            sidecar::plan(&mut desk.blocking(beside)?, &desk.raw_wish(prepared, pair))
        }
    }
}

/// Read pieces of the device: bytes and seconds.
fn sample(job: &Job, desk: &Desk<'_>, prepared: &Prepared, shape: &Shape) -> Result<(u64, f64)> {
    let begun = Instant::now();
    let apart = prepared.data_bytes() / PLACES;
    let (mut read, mut spent) = (0, Duration::ZERO);
    for place in 0..PLACES {
        let start = place * apart;
        let start = start - start % u64::from(shape.chunk_bytes);
        let end = (start + PLACE_BYTES.min(apart)).min(prepared.data_bytes());
        let end = end - end % u64::from(shape.align.max(512));
        if end <= start || begun.elapsed() > ENOUGH {
            continue;
        }
        let course = course::sample(shape, start, end);
        let transfer = &course.transfer;
        let mut carrier =
            desk.pipeline.carry(transfer, course.news.clone(), shape.workers_max, course.buffers)?;
        let from = Instant::now();
        while !matches!(carrier.next(TICK), Turn::Ended) {
            if job.is_cancelled() || transfer.has_failed() {
                transfer.gate.stop();
                carrier.wake();
            }
        }
        spent += from.elapsed();
        job.keep_record(transfer.final_record());
        if let Some(failure) = transfer.take_failure() {
            return Err(failure);
        }
        job.check_cancelled()?;
        read += transfer.totals().done_bytes;
    }
    Ok((read, spent.as_secs_f64()))
}

/// Seconds per byte of hashing and re-encrypting with all workers.
fn in_memory(planned: &Planned, shape: &Shape) -> Result<f64> {
    let mut bytes = vec![0x5a_u8; SAMPLE_BYTES];
    let key = || -> Result<VolumeKey> {
        let mut key = Secret::zeroed(64)?;
        random::fill(key.as_mut_bytes())?;
        VolumeKey::new(key.as_bytes())
    };
    let both = recrypter(shape.kernel, (&key()?, Layout::plain64(512)), (&key()?, Layout::plain64(4096)))?;
    let mut hashes = vec![0; SAMPLE_BYTES / 4096 * Hash::Sha256.bytes()];
    let begun = Instant::now();
    for (chunk, hashes) in bytes.chunks_mut(1 << 20).zip(hashes.chunks_mut((1 << 20) / 4096 * 32)) {
        if planned.resilience == "checksum" {
            sha256::checksums(Hash::Sha256, 4096, chunk, hashes);
        }
        both.recrypt(0, chunk);
    }
    let workers = u32::try_from(shape.workers_max.max(1)).unwrap_or(u32::MAX);
    std::hint::black_box((&bytes, &hashes));
    Ok(begun.elapsed().as_secs_f64() / f64::from(workers) / number(SAMPLE_BYTES as u64))
}

#[expect(clippy::cast_precision_loss, reason = "an estimate")]
fn number(bytes: u64) -> f64 {
    bytes as f64
}
