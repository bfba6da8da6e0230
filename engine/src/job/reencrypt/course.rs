//! From an opened re-encryption to what the workers carry: ciphers, plan, buffers, and how large a hotzone is.
//!
//! A hotzone as large as there is memory for costs the fewest header writes. Twice its bytes are enough to keep a device busy: while
//! one is written its buffers become free for the next but one, chunk by chunk.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crossbeam::channel::{Receiver, unbounded};

use crate::crypto::proof::Proof;
use crate::crypto::{Kernel, Layout, Recrypter, VolumeKey, recrypter};
use crate::error::{Error, ErrorKind, Result};
use crate::format::luks2::reencrypt::{Checksum, Direction};
use crate::job::reencrypt::hotzone::Track;
use crate::limits;
use crate::pipeline::hashing::Checksums;
use crate::pipeline::plan::Plan;
use crate::pipeline::rewrite::{Checksummer, Journal, News, Prover, Rewrite};
use crate::pipeline::segment::{Segment, Segments};
use crate::pipeline::transfer::{End, SinkRules, Transfer, TransferSpec, UNIT_BYTES_MAX, Work};
use crate::volume::reencrypt::ledger::Protection;
use crate::volume::reencrypt::{Opened, Side};

/// What does not follow from the volume.
#[derive(Debug, Clone)]
pub struct Shape {
    /// The data device.
    pub file: Arc<OwnedFd>,
    /// What users call it.
    pub name: String,
    /// Its direct I/O's alignment, bytes; 1: buffered.
    pub align: u32,
    /// The kernel of its ciphers.
    pub kernel: Kernel,
    /// Workers of the pipeline.
    pub workers: usize,
    /// Of these, how many may take part.
    pub workers_max: usize,
    /// Most reads, and most writes, in flight on each.
    pub depth: u32,
    /// Largest chunk, bytes: a power of two from 4096.
    pub chunk_bytes: u32,
    /// What its buffers may take, bytes.
    pub memory: u64,
    /// Most bytes of a hotzone, if somebody says so.
    pub hotzone_bytes: Option<u64>,
}

/// What the workers carry, and how it is driven.
pub struct Course {
    /// For [`crate::pipeline::Pipeline::carry`].
    pub transfer: Arc<Transfer>,
    /// What they tell.
    pub news: Receiver<News>,
    /// The way through the volume.
    pub track: Track,
    /// Where on it the boundary is.
    pub from: u64,
    /// Most bytes of a hotzone.
    pub hotzone_bytes: u64,
    /// Buffers of each worker.
    pub buffers: u32,
}

/// Can all transfers be multiples of `align`?
#[must_use]
pub fn is_aligned(opened: &Opened, align: u32) -> bool {
    let moved = opened.moved.map_or([0, 0], |moved| [moved.bytes, moved.offset]);
    let places = [opened.old.offset, opened.new.offset, opened.total, opened.boundary];
    places.into_iter().chain(moved).all(|place| place.is_multiple_of(align.into()))
}

/// Lay the course of what is left to do.
///
/// # Errors
/// `Unsupported`: steps so small that no chunk fits; `Limit`: a step that cannot be cut and is too large; no memory for keys.
pub fn lay(opened: &Opened, shape: &Shape, proof: Option<Arc<Proof>>) -> Result<Course> {
    let protection = opened.ledger.protection();
    let most = opened.ledger.hotzone_max().unwrap_or(u64::MAX);
    let whole_bytes = opened.moved.map_or(0, |moved| moved.bytes);
    if whole_bytes > limits::REWRITE_MEMORY {
        let what = format!(
            "the first {whole_bytes} bytes were moved and are re-encrypted in one step, and {} are the most that memory holds",
            limits::REWRITE_MEMORY
        );
        return Err(Error::new(ErrorKind::Limit, what)
            .at(&shape.name)
            .hint("nothing was written; cryptsetup reencrypt --resume-only finishes it"));
    }
    let (hotzone_bytes, chunk_bytes) =
        sizes(most, opened.ledger.step_bytes(), shape).ok_or_else(|| too_small(most, &shape.name))?;
    let track = Track::new(opened.direction, opened.total, whole_bytes);
    let from = track.order_of(opened.boundary);

    let plan = match opened.direction {
        Direction::Forward => Plan::new(Some(opened.total), chunk_bytes),
        Direction::Backward => Plan::backward(opened.total, chunk_bytes),
    };
    plan.start_at(from);
    if whole_bytes > 0 {
        plan.cut_at(vec![whole_bytes]);
    }
    // Nothing is overwritten before somebody says that it may be.
    plan.write_until(0);

    let (news, listener) = unbounded();
    let checksums = match &protection {
        Protection::Checksums(checksum) => {
            let Checksum { hash, block_bytes } = *checksum;
            Some(Box::new(Checksums { hash, block_bytes }) as Box<dyn Checksummer>)
        }
        _ => None,
    };
    let journal = match protection {
        Protection::Journal { file, name, offset, align } => Some(Journal { file, name, offset, align }),
        _ => None,
    };
    let transfer = transfer(shape, plan);
    transfer.set_rewrite(Rewrite {
        old: segments(&opened.old, opened.moved.map(|moved| (moved.bytes, moved.offset)), shape.kernel)?,
        new: segments(&opened.new, None, shape.kernel)?,
        fused: if proof.is_none() && opened.moved.is_none() { fused(opened, shape.kernel)? } else { None },
        checksums,
        journal,
        prover: proof.map(|proof| Box::new(proof) as Box<dyn Prover>),
        read_only: false,
        news,
    });
    let chunks = |bytes: u64| bytes.div_ceil(chunk_bytes.into());
    // One over for each worker that is about to claim what is not needed yet.
    let held = chunks(2 * hotzone_bytes).max(chunks(whole_bytes));
    let workers = u64::try_from(shape.workers_max.max(1)).unwrap_or(u64::MAX);
    let buffers = u32::try_from(held.div_ceil(workers) + 1).unwrap_or(u32::MAX);
    Ok(Course { transfer, news: listener, track, from, hotzone_bytes, buffers })
}

/// Lay the course of reading everything from `boundary` on once more under the new key; only for a finished re-encryption.
///
/// # Errors
/// No memory for keys.
pub fn reread(opened: &Opened, shape: &Shape, proof: Arc<Proof>) -> Result<Course> {
    let track = Track::new(opened.direction, opened.total, 0);
    let from = track.order_of(opened.boundary);
    let plan = match opened.direction {
        Direction::Forward => Plan::new(Some(opened.total), shape.chunk_bytes),
        Direction::Backward => Plan::backward(opened.total, shape.chunk_bytes),
    };
    plan.start_at(from);
    let (news, listener) = unbounded();
    let transfer = transfer(shape, plan);
    transfer.set_rewrite(Rewrite {
        old: segments(&opened.new, None, shape.kernel)?,
        new: segments(&opened.new, None, shape.kernel)?,
        fused: None,
        checksums: None,
        journal: None,
        prover: Some(Box::new(proof)),
        read_only: true,
        news,
    });
    let hotzone_bytes = u64::from(shape.chunk_bytes);
    Ok(Course { transfer, news: listener, track, from, hotzone_bytes, buffers: reading_buffers(shape) })
}

/// Lay the course of reading this part of the device as it is, to see how fast that goes.
#[must_use]
pub fn sample(shape: &Shape, start: u64, end: u64) -> Course {
    let plan = Plan::new(Some(end), shape.chunk_bytes);
    plan.start_at(start);
    let (news, listener) = unbounded();
    let transfer = transfer(shape, plan);
    let plain = || Segments::new(vec![Segment { start: 0, offset: 0, unit_bytes: 512, cipher: None }]);
    transfer.set_rewrite(Rewrite {
        old: plain(),
        new: plain(),
        fused: None,
        checksums: None,
        journal: None,
        prover: None,
        read_only: true,
        news,
    });
    Course {
        transfer,
        news: listener,
        track: Track::new(Direction::Forward, end, 0),
        from: start,
        hotzone_bytes: u64::from(shape.chunk_bytes),
        buffers: reading_buffers(shape),
    }
}

fn transfer(shape: &Shape, plan: Plan) -> Arc<Transfer> {
    let end = || End {
        file: Arc::clone(&shape.file),
        name: shape.name.clone(),
        stream: false,
        align: shape.align,
        // A hole is ciphertext like any other.
        holes: None,
    };
    let spec = TransferSpec {
        work: Work::Recrypt,
        source: end(),
        sink: end(),
        rules: SinkRules::default(),
        pad: false,
        keep_holes: false,
        depth: shape.depth,
        plan,
    };
    Transfer::new(spec, shape.workers)
}

/// Buffers of each worker that only reads: two for each read in flight, as far as memory goes.
fn reading_buffers(shape: &Shape) -> u32 {
    let workers = u64::try_from(shape.workers_max.max(1)).unwrap_or(u64::MAX);
    let most = shape.memory / u64::from(shape.chunk_bytes) / workers;
    u32::try_from(most).unwrap_or(u32::MAX).min(shape.depth.saturating_mul(2)).max(2)
}

/// Bytes of a hotzone and of a chunk: the hotzone is whole chunks, and both are whole steps.
fn sizes(most: u64, step: u64, shape: &Shape) -> Option<(u64, u32)> {
    let wanted = shape.hotzone_bytes.unwrap_or(u64::MAX).min(shape.memory / 2).max(u64::from(UNIT_BYTES_MAX));
    // A wish below what is possible at all is the least that is possible.
    let hotzone = wanted.max(step).min(most);
    let mut chunk = shape.chunk_bytes;
    while u64::from(chunk) > hotzone {
        chunk /= 2;
    }
    let fits = chunk >= UNIT_BYTES_MAX && u64::from(chunk).is_multiple_of(step);
    fits.then(|| (hotzone - hotzone % u64::from(chunk), chunk))
}

fn too_small(most: u64, name: &str) -> Error {
    let what = format!(
        "steps of at most {most} bytes are all that its protection allows, and {UNIT_BYTES_MAX} are the least"
    );
    Error::new(ErrorKind::Unsupported, what).at(name)
}

/// The data of one side. `moved`: so many bytes from the first on lie there.
///
/// # Errors
/// No memory for keys; a kernel that cannot do it.
pub fn segments(side: &Side, moved: Option<(u64, u64)>, kernel: Kernel) -> Result<Segments> {
    let segment = |start: u64, offset: u64| -> Result<Segment> {
        let Some((area, key)) = &side.cipher else {
            return Ok(Segment { start, offset, unit_bytes: 512, cipher: None });
        };
        // Counters go on behind the seam as if there were none.
        let cipher = area.build(kernel, key, start)?;
        Ok(Segment { start, offset, unit_bytes: area.unit_bytes, cipher: Some(cipher) })
    };
    Ok(Segments::new(match moved {
        Some((bytes, offset)) if bytes > 0 => vec![segment(0, offset)?, segment(bytes, side.offset + bytes)?],
        _ => vec![segment(0, side.offset)?],
    }))
}

/// Both ciphers in one pass, where they are of the kind that has one.
fn fused(opened: &Opened, kernel: Kernel) -> Result<Option<Box<dyn Recrypter>>> {
    let part = |side: &Side| -> Result<Option<(VolumeKey, Layout)>> {
        let Some((area, key)) = &side.cipher else { return Ok(None) };
        let Some(layout) = area.layout() else { return Ok(None) };
        Ok(Some((VolumeKey::new(key.as_bytes())?, layout)))
    };
    match (part(&opened.old)?, part(&opened.new)?) {
        (Some(old), Some(new)) => recrypter(kernel, (&old.0, old.1), (&new.0, new.1)).map(Some),
        _ => Ok(None),
    }
}
