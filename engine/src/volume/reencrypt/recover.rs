//! An interrupted step made whole.
//!
//! 0. Header and data as they were found are made durable, see [`luks::settle`]; before going on or taking down, too.
//! 1. Each block of the hotzone that is old is made new (above); one that is new is written as it is, for it may be so in the page
//!    cache only, where a flush that failed has left it *clean*: the flush of 2 covers but what was written since. What tells old from new, or the source, is not written to, and
//!    what is written depends on nothing that is: so it can be cut off and done again from the beginning any number of times.
//! 2. The data is flushed.
//! 3. The header says *clean* (or, behind the last step, that all is over), durably.
//!
//! Memory does not depend on the length of the hotzone: it is done in pieces of 1 MiB, so hotzones of 1 GiB, as cryptsetup makes them,
//! are no matter.

use zeroize::Zeroizing;

use crate::backend::blocking::Blocking;
use crate::crypto::spec::CipherSpec;
use crate::crypto::{Kernel, SectorCipher, bytes_equal};
use crate::error::{Error, ErrorKind, Result};
use crate::format::luks2::Loaded;
use crate::format::luks2::reencrypt::{Checksum, Direction, Process, Resilience, State};
use crate::units::{DataUnit, Extent};
use crate::volume::reencrypt::decide::{Decision, Facts, Proof, Refusal, decide};
use crate::volume::reencrypt::{Side, luks};

/// Bytes rewritten at a time.
const PIECE: usize = 1 << 20;

/// A re-encryption with its keys, as far as a recovery needs it.
#[derive(Debug, Clone, Copy)]
pub struct Proven<'a> {
    /// What was begun.
    pub process: &'a Process,
    /// As it was, with its key.
    pub old: &'a Side,
    /// As it will be, with its key.
    pub new: &'a Side,
    /// Bytes of plaintext.
    pub total: u64,
}

/// Make an interrupted step whole (see the module head) and say so in the header; the bytes of the step, 0 when there was none.
/// Whoever calls it has proven keys and metadata. On return `loaded` is the header on disk.
///
/// # Errors
/// Of [`decide`]: a refusal. `Damaged`: a step beyond the end of the device. Else of the devices: then it can be done again.
pub fn recover(
    header: &mut Blocking,
    data: &mut Blocking,
    loaded: &mut Loaded,
    state: State,
    proven: &Proven<'_>,
) -> Result<u64> {
    let Proven { process, total, .. } = *proven;
    let decision = decide(&Facts::of(&loaded.header.metadata, process, state, Proof::Right));
    let rewrite: fn(&mut Blocking, &mut Blocking, &Rewriter<'_>, Extent) -> Result<()> = match decision {
        Decision::Refuse(refusal) => return Err(refusal.error(header.name())),
        Decision::Nothing => return Ok(0),
        Decision::GoOn => {
            luks::settle(header, data, loaded)?;
            return Ok(0);
        }
        Decision::TakeDown => {
            luks::settle(header, data, loaded)?;
            luks::take_down(header, loaded, process, total)?;
            return Ok(0);
        }
        Decision::RewriteOldBlocks => old_blocks,
        Decision::RewriteFromJournal => from_journal,
        Decision::RewriteFromSource => from_source,
    };
    let hot = hotzone(state, total, data.name())?;
    // 0. Whose header it is, is whose step it is: one that another program wrote meanwhile is not ours to recover.
    luks::settle(header, data, loaded)?;
    // 1.
    rewrite(header, data, &Rewriter::new(proven)?, hot)?;
    // 2.
    data.flush()?;
    // 3.
    luks::commit(header, loaded, process, process.boundary_after(hot), total)?;
    Ok(hot.len())
}

/// Make the old blocks of a step new, and write those that are, by the means of protection of the process: step 1 of the module head. `area`: the device with what was
/// saved. Not durable yet.
///
/// # Errors
/// `Unsupported`: nothing was saved. `Damaged`: no step of this process. Else of the devices: then it can be done again.
pub fn rewrite(area: &mut Blocking, data: &mut Blocking, proven: &Proven<'_>, hot: Extent) -> Result<()> {
    let rewriter = Rewriter::new(proven)?;
    match proven.process.resilience {
        Resilience::Checksum(_) => old_blocks(area, data, &rewriter, hot),
        Resilience::Journal => from_journal(area, data, &rewriter, hot),
        Resilience::Datashift { .. } => from_source(area, data, &rewriter, hot),
        Resilience::None => Err(Refusal::Lost.error(area.name())),
    }
}

/// The interrupted step.
fn hotzone(state: State, total: u64, name: &str) -> Result<Extent> {
    let State::Crash { start, end } = state else {
        return Err(Error::new(ErrorKind::Internal, "no step was interrupted").at(name));
    };
    let hot = Extent::new(start, end).filter(|hot| hot.end() <= total);
    hot.ok_or_else(|| {
        let what =
            format!("bytes {start}..{end} of the data were being rewritten, but there are only {total}");
        Error::new(ErrorKind::Damaged, what)
            .at(name)
            .hint("the device has become smaller: it must have its size of before")
    })
}

/// Both ciphers, and where the data lies.
struct Rewriter<'a> {
    proven: &'a Proven<'a>,
    old: Option<(Box<dyn SectorCipher>, u64)>,
    new: Option<(Box<dyn SectorCipher>, u64)>,
}

impl<'a> Rewriter<'a> {
    fn new(proven: &'a Proven<'a>) -> Result<Self> {
        let build = |side: &Side| {
            let Some((cipher, key)) = &side.cipher else { return Ok(None) };
            let built = cipher.build(Kernel::best()?, key, 0)?;
            Ok::<_, Error>(Some((built, u64::from(cipher.unit_bytes))))
        };
        Ok(Self { proven, old: build(proven.old)?, new: build(proven.new)? })
    }

    /// Old bytes to new bytes, in place. `at`: their plaintext offset, a multiple of both data units.
    fn recrypt(&self, at: u64, bytes: &mut [u8]) {
        if let Some((cipher, unit)) = &self.old {
            cipher.decrypt(DataUnit(at / unit), bytes);
        }
        if let Some((cipher, unit)) = &self.new {
            cipher.encrypt(DataUnit(at / unit), bytes);
        }
    }

    /// As [`Self::recrypt`], of bytes in equal blocks of which only these are old: what is new stays as it is.
    fn renew(&self, at: u64, bytes: &mut [u8], is_old: &[bool]) {
        if !is_old.contains(&false) {
            return self.recrypt(at, bytes);
        }
        let block = bytes.len() / is_old.len();
        let mut new = Zeroizing::new(bytes.to_vec());
        if let Some((cipher, unit)) = &self.new {
            cipher.decrypt(DataUnit(at / unit), &mut new);
        }
        if let Some((cipher, unit)) = &self.old {
            cipher.decrypt(DataUnit(at / unit), bytes);
        }
        for ((bytes, new), is_old) in bytes.chunks_mut(block).zip(new.chunks(block)).zip(is_old) {
            if !is_old {
                bytes.copy_from_slice(new);
            }
        }
        if let Some((cipher, unit)) = &self.new {
            cipher.encrypt(DataUnit(at / unit), bytes);
        }
    }

    /// Is a part of a data unit decrypted without the rest? With XTS: every 16 bytes by themselves.
    fn is_separable(&self) -> bool {
        [self.proven.old, self.proven.new].into_iter().all(|side| {
            side.cipher.as_ref().is_none_or(|(cipher, _)| matches!(cipher.spec, CipherSpec::AesXts(_)))
        })
    }

    /// Where plaintext lies on the data device when it is new.
    fn target(&self, at: u64) -> u64 {
        self.proven.new.offset + at
    }

    /// Where it lies while it is old.
    fn source(&self, at: u64) -> u64 {
        match self.proven.process.moved {
            Some(moved) if at < moved.bytes => moved.offset + at,
            _ => self.proven.old.offset + at,
        }
    }

    /// All whole data units?
    fn check(&self, hot: Extent, name: &str) -> Result<()> {
        let units = self.proven.process.step_bytes();
        if hot.start().is_multiple_of(units) && hot.end().is_multiple_of(units) {
            return Ok(());
        }
        let what = format!(
            "the interrupted step, bytes {}..{}, is no whole number of its blocks of {units}",
            hot.start(),
            hot.end()
        );
        Err(Error::new(ErrorKind::Damaged, what).at(name))
    }
}

fn length_of(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a data unit or block")
}

/// The pieces of an extent: first byte and length of each.
fn pieces(hot: Extent, piece: usize) -> impl Iterator<Item = (u64, usize)> {
    (hot.start()..hot.end()).step_by(piece).map(move |at| {
        let left = usize::try_from(hot.end() - at).unwrap_or(piece);
        (at, left.min(piece))
    })
}

fn old_blocks(
    header: &mut Blocking,
    data: &mut Blocking,
    rewriter: &Rewriter<'_>,
    hot: Extent,
) -> Result<()> {
    let process = rewriter.proven.process;
    let Resilience::Checksum(Checksum { hash, block_bytes }) = process.resilience else {
        return Err(Error::new(ErrorKind::Internal, "no checksums").at(header.name()));
    };
    let block = block_bytes as usize;
    if block > PIECE {
        let what = format!("blocks of {block} bytes are hashed, at most {PIECE} are supported");
        return Err(Error::new(ErrorKind::Unsupported, what)
            .at(header.name())
            .hint("cryptsetup reencrypt --resume-only recovers them"));
    }
    rewriter.check(hot, header.name())?;
    let mut bytes = Zeroizing::new(vec![0; PIECE]);
    let mut stored = vec![0; PIECE / block * hash.bytes()];
    let mut made = vec![0; hash.bytes()];
    let mut stored_at = process.area.offset;
    // Where data units are larger than what the device writes whole, old and new blocks may lie in one unit.
    let group = length_of(process.step_bytes()).max(block);
    let mut is_old = vec![false; group / block];
    if is_old.len() > 1 && !rewriter.is_separable() {
        let what = format!("blocks of {block} bytes are hashed, and data units of this cipher are larger");
        return Err(Error::new(ErrorKind::Unsupported, what).at(header.name()));
    }
    for (at, length) in pieces(hot, PIECE) {
        let bytes = &mut bytes[..length];
        let stored = &mut stored[..length / block * hash.bytes()];
        header.read(stored_at, stored)?;
        stored_at += stored.len() as u64;
        data.read(rewriter.target(at), bytes)?;
        for (index, hashes_of_old) in stored.chunks_exact(is_old.len() * hash.bytes()).enumerate() {
            let place = index * group..(index + 1) * group;
            let blocks =
                bytes[place.clone()].chunks_exact(block).zip(hashes_of_old.chunks_exact(hash.bytes()));
            for ((block, hash_of_old), is_old) in blocks.zip(&mut is_old) {
                hash.digest(&[block], &mut made);
                *is_old = bytes_equal(&made, hash_of_old);
            }
            if !is_old.contains(&true) {
                continue;
            }
            rewriter.renew(at + place.start as u64, &mut bytes[place], &is_old);
        }
        // New ones too, see the module head.
        data.write(rewriter.target(at), bytes)?;
    }
    Ok(())
}

fn from_journal(
    header: &mut Blocking,
    data: &mut Blocking,
    rewriter: &Rewriter<'_>,
    hot: Extent,
) -> Result<()> {
    rewriter.check(hot, header.name())?;
    let area = rewriter.proven.process.area.offset;
    all_blocks(data, rewriter, hot, |_, at, bytes| header.read(area + (at - hot.start()), bytes))
}

fn from_source(
    header: &mut Blocking,
    data: &mut Blocking,
    rewriter: &Rewriter<'_>,
    hot: Extent,
) -> Result<()> {
    rewriter.check(hot, header.name())?;
    check_apart(rewriter, hot, header.name())?;
    all_blocks(data, rewriter, hot, |data, at, bytes| data.read(rewriter.source(at), bytes))
}

/// Every block anew, out of its old bytes, which `read_old` has from elsewhere by their plaintext offset.
fn all_blocks(
    data: &mut Blocking,
    rewriter: &Rewriter<'_>,
    hot: Extent,
    mut read_old: impl FnMut(&mut Blocking, u64, &mut [u8]) -> Result<()>,
) -> Result<()> {
    let mut bytes = Zeroizing::new(vec![0; PIECE]);
    for (at, length) in pieces(hot, PIECE) {
        let bytes = &mut bytes[..length];
        read_old(data, at, bytes)?;
        rewriter.recrypt(at, bytes);
        data.write(rewriter.target(at), bytes)?;
    }
    Ok(())
}

/// A source that the step writes into could not be read again.
fn check_apart(rewriter: &Rewriter<'_>, hot: Extent, name: &str) -> Result<()> {
    let moved = rewriter.proven.process.moved.map_or(0, |moved| moved.bytes);
    let across = hot.start() < moved && moved < hot.end();
    let source = rewriter.source(hot.start());
    let target = rewriter.target(hot.start());
    if !across && source.abs_diff(target) >= hot.len() {
        return Ok(());
    }
    let what =
        format!("the interrupted step, bytes {}..{}, would overwrite its own source", hot.start(), hot.end());
    Err(Error::new(ErrorKind::Damaged, what).at(name))
}

/// The boundary a state stands for.
#[must_use]
pub fn boundary(process: &Process, state: State, total: u64) -> u64 {
    match (state, process.direction) {
        (State::Clean { boundary }, _) => boundary.unwrap_or_else(|| process.begins_at(total)),
        (State::Crash { start, .. }, Direction::Forward) => start,
        (State::Crash { end, .. }, Direction::Backward) => end,
        (State::Finished, _) => process.ends_at(total),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_an_extent_once() {
        for (start, end) in [(0, 1), (0, 4096), (512, 512 + 3 * 4096), (4096, 3 * 4096 + 100)] {
            let hot = Extent::new(start, end).expect("not empty");
            let mut next = start;
            for (at, length) in pieces(hot, 4096) {
                assert_eq!(at, next);
                assert!((1..=4096).contains(&length));
                next += length as u64;
            }
            assert_eq!(next, end);
        }
    }
}
