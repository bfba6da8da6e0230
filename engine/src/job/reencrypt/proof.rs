//! Digests of the plaintext before and after; and that the old key opens nothing any more.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::reencrypt::{Phase, Report};

use crate::backend::blocking::Blocking;
use crate::crypto::proof::{self, KEY_BYTES, Proof};
use crate::crypto::sha256::Digest;
use crate::crypto::{Secret, bytes_equal};
use crate::error::{Error, ErrorKind, Result};
use crate::format::luks2::Loaded;
use crate::job::reencrypt::Desk;
use crate::job::reencrypt::course::{self, Shape};
use crate::job::state::Job;
use crate::pipeline::carrier::{Carrier, Turn};
use crate::pipeline::rewrite::News;
use crate::volume::reencrypt::Opened;
use crate::volume::reencrypt::decide::Requirement;
use crate::volume::{Header, random, unlock};

/// How often the reader looks whether it is to stop.
const TICK: Duration = Duration::from_millis(250);

/// The key of this job's digests: random, and gone with the job.
pub struct Proving(Arc<Proof>);

impl Proving {
    /// With a fresh key.
    ///
    /// # Errors
    /// No randomness, no memory.
    pub fn new() -> Result<Self> {
        let mut key = Secret::zeroed(KEY_BYTES)?;
        random::fill(key.as_mut_bytes())?;
        Ok(Self(Arc::new(Proof::new(key))))
    }

    /// For a course.
    #[must_use]
    pub fn key(&self) -> Arc<Proof> {
        self.0.clone()
    }

    /// Read once more what was re-encrypted, under the new key, and compare. `before`: the sum while it was read under the old one.
    ///
    /// # Errors
    /// `Difference`; `Cancelled`: the data is new, and only its proof is missing. Else of the device.
    pub(super) fn compare(
        &self,
        job: &Job,
        desk: &Desk<'_>,
        (workers_max, opened): (usize, &Opened),
        shape: &Shape,
        before: Digest,
        report: &mut Report,
    ) -> Result<()> {
        let course = course::reread(opened, shape, self.key())?;
        let bytes = opened.total - course.from;
        job.detach();
        job.attach(course.transfer.clone(), Phase::Verifying, bytes, 0);
        let mut carrier =
            desk.pipeline.carry(&course.transfer, course.news.clone(), workers_max, course.buffers)?;
        let (mut after, mut read) = (proof::NOTHING, 0);
        let mut ticked = Instant::now();
        loop {
            match carrier.next(TICK) {
                Turn::News(News::Arrived { extent, proof: contribution, .. }) => {
                    read += extent.len();
                    if let Some(contribution) = contribution {
                        proof::add(&mut after, &contribution);
                    }
                }
                Turn::News(_) => {}
                Turn::Idle => desk.rests(job),
                Turn::Ended => break,
            }
            if job.is_cancelled() || course.transfer.has_failed() {
                course.transfer.gate.stop();
                carrier.wake();
            }
            if ticked.elapsed() >= TICK {
                ticked = Instant::now();
                job.tick(ticked);
            }
        }
        job.keep_record(course.transfer.final_record());
        let unproven = |error: Error| {
            error.hint(
                "all data is re-encrypted and the volume is in order; only the proof of it was not finished",
            )
        };
        if let Some(failure) = course.transfer.take_failure() {
            return Err(unproven(failure));
        }
        job.check_cancelled().map_err(unproven)?;
        report.digest_before = Some(hex(&before));
        report.digest_after = Some(hex(&after));
        report.digest_bytes = bytes;
        if read == bytes && bytes_equal(&before, &after) {
            return Ok(());
        }
        let what = "the plaintext read back under the new key is not what was read under the old one";
        Err(Error::new(ErrorKind::Difference, what).at(&shape.name).hint(
            "the device or memory of this machine changed bytes, or somebody wrote to the volume meanwhile: compare it \
             with a backup before it is used",
        ))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The header on disk, read anew, has no re-encryption under way.
///
/// # Errors
/// `Internal`: it has one although all is done. The header cannot be read.
pub fn is_over(header: &mut Blocking) -> Result<()> {
    let Header::Luks2(loaded) = Header::load(header)? else { return Ok(()) };
    if Requirement::of(&loaded.header.metadata) == Requirement::None {
        return Ok(());
    }
    let what = "all data is re-encrypted, and the header still says that a re-encryption is under way";
    Err(Error::new(ErrorKind::Internal, what)
        .at(header.name())
        .hint("another program may have written it; cryptctl reencrypt --resume-only takes it down"))
}

/// Does a header say that all data is under the new key, and nothing of a re-encryption? By the key, and not by names: who else may
/// have written it is not known.
///
/// # Errors
/// A digest that cannot be computed.
pub(super) fn is_all_new(loaded: &Loaded, opened: &Opened) -> Result<bool> {
    let metadata = &loaded.header.metadata;
    let Some((_, new)) = &opened.new.cipher else { return Ok(false) };
    if Requirement::of(metadata) != Requirement::None {
        return Ok(false);
    }
    let mut segments = 0;
    for (id, _) in metadata.data_segments() {
        segments += 1;
        match metadata.digest_of_segment(id) {
            Some((_, digest)) if unlock::meets(digest, new)? => {}
            _ => return Ok(false),
        }
    }
    Ok(segments > 0)
}

/// Does nothing of the header on disk have to do with the old volume key any more?
///
/// # Errors
/// The header cannot be read.
pub fn old_key_gone(header: &mut Blocking, opened: &Opened) -> Result<bool> {
    let Header::Luks2(loaded) = Header::load(header)? else { return Ok(false) };
    let metadata = &loaded.header.metadata;
    // A re-encryption under way would still need it.
    if !metadata.unmet_requirements().is_empty() {
        return Ok(false);
    }
    // It was plain, or the old keyslots were destroyed before this job began.
    let Some((_, old)) = &opened.old.cipher else { return Ok(true) };
    // Each digest is asked, not only that of the data: a keyslot may hold a key that is bound to nothing.
    for digest in metadata.digests.values() {
        if unlock::meets(digest, old)? {
            return Ok(false);
        }
    }
    Ok(true)
}
