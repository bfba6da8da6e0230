//! A transfer that rewrites a device in place: old bytes in, new bytes out, held back in between until it is safe.
//!
//! ```text
//! claim ─▶ read ─▶ (hash) ─▶ crypt ─▶ held ────────────────────────▶ write ─▶ written        checksums, shift, none
//! claim ─▶ read ─▶ held ─▶ write old bytes to the journal ─▶ held ─▶ crypt ─▶ write ─▶ written      journal
//!                   ^ journal barrier                          ^ write barrier
//! ```
//! Who moves the barriers (`job::reencrypt`) hears of each chunk by [`News`], and knows what must be durable in between. The chunks
//! held live in buffers of the transfer's own, so it never starves others of the worker's, nor they it.
//!
//! Chunks are claimed in the order of the plan, which may go backward: *order* is where a chunk stands in the plan, counted in
//! bytes from the plan's beginning; going forward it is the plaintext offset.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crossbeam::channel::Sender;

use crate::crypto::{Recrypter, burn_stack};
use crate::pipeline::segment::Segments;
use crate::units::Extent;

/// What happened to a chunk.
#[derive(Debug)]
pub enum News {
    /// It has been read, and is held (or, without barriers, being written).
    Arrived {
        /// Its plaintext.
        extent: Extent,
        /// Hashes of its old blocks, packed in their order, if they were asked for.
        checksums: Box<[u8]>,
        /// Its plaintext's contribution to the digest, if that was asked for; with a journal it comes with [`News::Written`].
        proof: Option<[u8; 32]>,
    },
    /// Its old bytes are in the journal; not durable.
    Journalled {
        /// Its plaintext.
        extent: Extent,
    },
    /// Its new bytes are written; not durable.
    Written {
        /// Its plaintext.
        extent: Extent,
        /// With a journal: its plaintext's contribution to the digest, if that was asked for. The plaintext is not there sooner.
        proof: Option<[u8; 32]>,
    },
    /// Foreign requests that were waited for have left (see [`crate::pipeline::view`]).
    Quiet,
}

/// Hashes of blocks as they are on disk.
pub trait Checksummer: Send + Sync {
    /// Hashes of the blocks of `bytes`, packed in their order; `bytes` is whole blocks.
    fn checksums(&self, bytes: &[u8]) -> Box<[u8]>;
}

/// Digest of plaintext: a sum over blocks, so that chunks may come in any order and any cut on multiples of 4096.
pub trait Prover: Send + Sync {
    /// Contribution of the plaintext at this offset (a multiple of 512).
    fn contribution(&self, offset: u64, plaintext: &[u8]) -> [u8; 32];
}

/// The journal, see [`crate::volume::reencrypt::ledger::Protection`].
pub struct Journal {
    /// The file with the area.
    pub file: Arc<OwnedFd>,
    /// What users call it.
    pub name: String,
    /// Where the area begins.
    pub offset: u64,
    /// Offsets and lengths are multiples of this, bytes.
    pub align: u32,
}

/// What a worker needs to rewrite chunks.
pub struct Rewrite {
    /// The data as it is; plaintext offsets to places on the source end.
    pub old: Segments,
    /// The data as it shall be; plaintext offsets to places on the sink end.
    pub new: Segments,
    /// Both in one pass over memory, where old and new are each one segment.
    pub fused: Option<Box<dyn Recrypter>>,
    /// Hash the old blocks.
    pub checksums: Option<Box<dyn Checksummer>>,
    /// Write the old bytes here before the new ones.
    pub journal: Option<Journal>,
    /// Sum up the plaintext. Costs the fused pass.
    pub prover: Option<Box<dyn Prover>>,
    /// Only read (and sum up): nothing is written, no chunk is held.
    pub read_only: bool,
    /// Who wants to know. Never blocks: unbounded.
    pub news: Sender<News>,
}

/// Both ciphers work on this much at a time where there is no fused pass: it stays in the first level cache.
const WINDOW_BYTES: usize = 16 << 10;

impl Rewrite {
    /// Turn the old bytes of a chunk into the new ones (or, when only reading, what is there into plaintext). Returns the
    /// plaintext's contribution, if that is asked for.
    pub(super) fn crypt(&self, extent: Extent, bytes: &mut [u8]) -> Option<[u8; 32]> {
        let start = extent.start();
        let (old, new) = (self.old.at(start), self.new.at(start));
        // Asked once for all of a chunk: a hasher works on many blocks side by side.
        let proof = match (&self.prover, &self.fused) {
            (prover, _) if self.read_only => {
                new.decrypt(start, bytes);
                prover.as_ref().map(|prover| prover.contribution(start, bytes))
            }
            (Some(prover), _) => {
                old.decrypt(start, bytes);
                let proof = prover.contribution(start, bytes);
                new.encrypt(start, bytes);
                Some(proof)
            }
            (None, Some(fused)) => {
                fused.recrypt(start, bytes);
                None
            }
            (None, None) => {
                let mut at = start;
                for window in bytes.chunks_mut(WINDOW_BYTES) {
                    old.decrypt(at, window);
                    new.encrypt(at, window);
                    at += window.len() as u64;
                }
                None
            }
        };
        // No frame keeps a round key after the job.
        burn_stack();
        proof
    }

    pub(super) fn tell(&self, news: News) {
        // Who listened may have given up; the transfer ends then by its gate.
        let _ = self.news.send(news);
    }
}
