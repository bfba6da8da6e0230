//! The write orders of header changes. Every header that is written goes through here: changed ones, and those that take the
//! place of others (new ones, repaired ones, backups), for which the caller has judged what is there.
//!
//! What is assumed of a device: between two flushes it may write sectors in any order, in part or not at all; a sector of
//! 512 bytes is written as a whole or not at all; after a flush everything before it is durable. What is promised: whenever
//! the power goes, the device holds the header of before or of after, whole, and no keyslot in use was lost.
//!
//! # LUKS2
//! Two copies, each under a checksum over its 4096-byte binary header and its whole JSON area.
//!
//! 1. Read both copies again: a seqid, UUID or copy that changed since the load refuses the write (`Conflict`).
//! 2. Choose the order: the copy that is not good first; with two good ones the primary first. So the copy being written is
//!    never the only one that opens the volume.
//! 3. Write the first copy, with seqid + 1, in one piece. 4. Flush.
//! 5. Write the second copy. 6. Flush.
//!
//! cryptsetup writes the binary header of a copy without its checksum first, then the JSON, then the binary header with
//! it. Without flushes between the three, a device that reorders makes nothing of that; and none is needed: seqid and
//! checksum change with every write, so a copy of which some sectors are old and some new fails its checksum, whichever they
//! are, and the other copy, complete and flushed, is used. Only all sectors new verify as new, all old as old.
//!
//! # LUKS1
//! One header of 592 bytes without a checksum over two sectors. Sector 0 holds all fields and keyslots 0 to 5 (208 + 6 * 48 =
//! 496), sector 1 holds keyslot 7 (544..592), and keyslot 6 lies across: state, iterations and 8 bytes of its salt in sector
//! 0, the rest of the salt, material offset and stripes in sector 1. A state alone decides whether a keyslot is in use, and
//! it is in sector 0 for all but keyslot 7, whose record is in one sector anyhow. So:
//!
//! 1. Read the header again: one that changed since the load refuses the write (`Conflict`).
//! 2. When keyslot 6 comes into use: sector 1, flush, sector 0, flush; its state is written when the rest of it is durable.
//! 3. Otherwise: sector 0, flush, sector 1, flush; its state is gone before the rest of it.
//!
//! A header that takes the place of another may change several keyslots at once, so neither order need be right: see
//! [`luks1_order`], and the head of `backup::restore` for the way round. A sector that does not change is not written.
//!
//! # Material
//! Nothing is written into a keyslot's place before the header was read once more and is the one that was loaded: the first
//! write of an operation that comes too late changes nothing. Material is written before the keyslot that points to it comes into use, and
//! destroyed before the keyslot goes out of use: a keyslot without material is a passphrase lost, but one that can be
//! removed again; material without keyslot would be a key that somebody believes destroyed.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::backend::blocking::Blocking;
use crate::error::{Error, ErrorKind, Result};
use crate::format::luks2::{Copy, Health, Loaded};
use crate::format::{luks1, luks2};
use crate::volume::{Header, random};

/// How long [`lock`] waits for others: far longer than any header write, shorter than a user's patience.
pub const LOCK_WAIT: Duration = Duration::from_secs(10);
/// How often it asks again.
const LOCK_POLL: Duration = Duration::from_millis(20);
/// The unit that is written whole or not at all.
const SECTOR: usize = 512;
/// Zeros written at a time.
const PIECE: usize = 1 << 20;

/// The header on disk is still the one that was loaded: asked before anything is written, key material too. Between the load
/// and the write lie the seconds of a key derivation, and what was a free place may be another program's keyslot by now.
///
/// # Errors
/// `Conflict`: it is another. Else of the device.
pub fn unchanged(device: &mut Blocking, loaded: &Header) -> Result<()> {
    match loaded {
        Header::Luks1(before) => unchanged_luks1(device, before).map(drop),
        Header::Luks2(loaded) => unchanged_luks2(device, loaded),
    }
}

/// Write a changed header over `before`, the one it was loaded as; what is on disk then is returned.
///
/// # Errors
/// Of [`write_luks1`] and [`write_luks2`]; `Internal`: headers of two versions.
pub fn write(device: &mut Blocking, before: &Header, after: Header) -> Result<Header> {
    match (before, after) {
        (Header::Luks1(before), Header::Luks1(after)) => {
            write_luks1(device, before, &after)?;
            Ok(Header::Luks1(after))
        }
        (Header::Luks2(_), Header::Luks2(mut after)) => {
            write_luks2(device, &mut after)?;
            Ok(Header::Luks2(after))
        }
        _ => Err(Error::new(ErrorKind::Internal, "a header of one version over one of the other")),
    }
}

/// [`write`] behind key material that was written, or destroyed, for `after`.
///
/// # Errors
/// As [`write`]. A `Conflict` says what may have been lost: another program was at work between the two.
pub fn write_behind_material(device: &mut Blocking, before: &Header, after: Header) -> Result<Header> {
    write(device, before, after).map_err(|error| match error.kind() {
        ErrorKind::Conflict => changed_too_late(device.name()),
        _ => error,
    })
}

fn changed_too_late(name: &str) -> Error {
    Error::new(ErrorKind::Conflict, "another program changed the header while key material was written")
        .at(name)
        .hint(
            "the header is the other program's, but a keyslot it made may have lost its material: try every \
             passphrase, and remove a keyslot that none opens",
        )
}

/// Write a changed LUKS2 header over the one it was loaded from (see the module head for the order). On return `loaded` is
/// what is on disk: the next seqid, both copies good, a fresh salt in a copy that was not.
///
/// # Errors
/// `Conflict`: the header on disk is not the one that was loaded. `NoSpace`, `Invalid`: the new metadata cannot be written
/// (nothing was). Else of the device: then load again, the write may have happened or not.
pub fn write_luks2(device: &mut Blocking, loaded: &mut Loaded) -> Result<()> {
    unchanged_luks2(device, loaded)?;
    let mut next = loaded.clone();
    next.header.seqid = next.header.seqid.checked_add(1).ok_or_else(|| {
        Error::new(ErrorKind::Invalid, "the header's write counter is at its end").at(device.name())
    })?;
    renew_salts(&mut next)?;
    // Both are made before the first is written: what does not fit changes nothing.
    let copies = [next.header.to_bytes(Copy::Primary)?, next.header.to_bytes(Copy::Secondary)?];
    put_luks2(device, &next.header, &copies, &loaded.health)?;
    next.health = [Health::Good, Health::Good];
    *loaded = next;
    Ok(())
}

/// Write both copies of a LUKS2 header over whatever is there, with the same order: first the one that `health`, of the
/// header to go, says may be lost. To put a backup back; the caller has judged what is there.
///
/// # Errors
/// Of the device.
pub fn put_luks2(
    device: &mut Blocking,
    header: &luks2::Header,
    copies: &[Vec<u8>; 2],
    health: &[Health; 2],
) -> Result<()> {
    for copy in write_order(health) {
        device.write(header.offset(copy), &copies[index(copy)])?;
        device.flush()?;
    }
    Ok(())
}

/// Rewrite the copies that are damaged or obsolete from the good one, which is not touched; seqid and metadata stay. On return
/// both copies of `loaded` are good. No effect if they were.
///
/// # Errors
/// As [`write_luks2`].
pub fn repair_luks2(device: &mut Blocking, loaded: &mut Loaded) -> Result<()> {
    unchanged_luks2(device, loaded)?;
    let mut next = loaded.clone();
    renew_salts(&mut next)?;
    for copy in [Copy::Primary, Copy::Secondary] {
        if loaded.health[index(copy)] != Health::Good {
            device.write(next.header.offset(copy), &next.header.to_bytes(copy)?)?;
            device.flush()?;
        }
    }
    next.health = [Health::Good, Health::Good];
    *loaded = next;
    Ok(())
}

fn index(copy: Copy) -> usize {
    match copy {
        Copy::Primary => 0,
        Copy::Secondary => 1,
    }
}

/// The copy first that may be lost.
fn write_order(health: &[Health; 2]) -> [Copy; 2] {
    match health {
        [Health::Good, Health::Obsolete | Health::Damaged(_)] => [Copy::Secondary, Copy::Primary],
        _ => [Copy::Primary, Copy::Secondary],
    }
}

/// A copy that is made anew gets a salt of its own, as cryptsetup does.
fn renew_salts(loaded: &mut Loaded) -> Result<()> {
    for copy in [Copy::Primary, Copy::Secondary] {
        if loaded.health[index(copy)] != Health::Good {
            random::fill(&mut loaded.header.salts[index(copy)])?;
        }
    }
    Ok(())
}

fn unchanged_luks2(device: &mut Blocking, loaded: &Loaded) -> Result<()> {
    let now = luks2::load(&mut |offset, into| device.read(offset, into))?;
    let same = now.header.seqid == loaded.header.seqid
        && now.header.uuid == loaded.header.uuid
        && now.header.copy_bytes == loaded.header.copy_bytes
        && now.health == loaded.health;
    if same { Ok(()) } else { Err(changed(device)) }
}

/// The bytes that are there, and mean `before`.
fn unchanged_luks1(device: &mut Blocking, before: &luks1::Header) -> Result<[u8; luks1::HEADER_BYTES]> {
    let mut bytes = [0; luks1::HEADER_BYTES];
    device.read(0, &mut bytes)?;
    // What is no LUKS1 header any more is another one too.
    let same = luks1::Header::is_here(&bytes) && luks1::Header::parse(&bytes)? == *before;
    if same { Ok(bytes) } else { Err(changed(device)) }
}

fn changed(device: &Blocking) -> Error {
    Error::new(ErrorKind::Conflict, "the header was changed by another program")
        .at(device.name())
        .hint("nothing was written; try again")
}

/// Write a changed LUKS1 header over `before`, the one it was loaded as (see the module head for the order).
///
/// # Errors
/// `Conflict`: the header on disk is not `before`. Else of the device: then load again, the write may have happened or not.
pub fn write_luks1(device: &mut Blocking, before: &luks1::Header, after: &luks1::Header) -> Result<()> {
    let bytes = unchanged_luks1(device, before)?;
    let straddler_comes = after.keyslots[6].active && !before.keyslots[6].active;
    put_luks1(device, &bytes, &after.to_bytes(), straddler_comes)
}

/// Write a LUKS1 header over whatever is there, sector 0 last. For a new volume, whose magic must not be there before the rest
/// is, and for a repair.
///
/// # Errors
/// Of the device.
pub fn replace_luks1(device: &mut Blocking, header: &luks1::Header) -> Result<()> {
    let mut bytes = [0; luks1::HEADER_BYTES];
    device.read(0, &mut bytes)?;
    put_luks1(device, &bytes, &header.to_bytes(), true)
}

/// The sector of a LUKS1 header to be written first, with its flush, when one takes the place of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum First {
    /// The one with keyslots 0 to 5 and a part of 6.
    Sector0,
    /// The one with the rest.
    Sector1,
}

/// An order of sectors in which every keyslot in use of `old`, or every one of `new`, opens between the two: that half of
/// each is a valid header with the whole of one of these sets. `None`: there is no such order.
#[must_use]
pub fn luks1_order(old: &luks1::Header, new: &luks1::Header) -> Option<First> {
    let (before, after) = (old.to_bytes(), new.to_bytes());
    let between = |sector0: &[u8], sector1: &[u8]| {
        luks1::Header::parse(&[&sector0[..SECTOR], &sector1[SECTOR..]].concat()).ok()
    };
    let keeps = |between: Option<luks1::Header>, whole: &luks1::Header| {
        between.is_some_and(|between| {
            let pairs = || between.keyslots.iter().zip(&whole.keyslots);
            let same = pairs().all(|(half, keyslot)| !keyslot.active || half == keyslot);
            same && luks1::Header { keyslots: whole.keyslots, ..between.clone() } == *whole
        })
    };
    if keeps(between(&before, &after), old) {
        Some(First::Sector1)
    } else if keeps(between(&after, &before), new) {
        Some(First::Sector0)
    } else {
        None
    }
}

/// [`replace_luks1`] in an order of [`luks1_order`].
///
/// # Errors
/// Of the device.
pub fn replace_luks1_from(device: &mut Blocking, header: &luks1::Header, first: First) -> Result<()> {
    let mut bytes = [0; luks1::HEADER_BYTES];
    device.read(0, &mut bytes)?;
    put_luks1(device, &bytes, &header.to_bytes(), first == First::Sector1)
}

fn put_luks1(
    device: &mut Blocking,
    before: &[u8; luks1::HEADER_BYTES],
    after: &[u8; luks1::HEADER_BYTES],
    second_first: bool,
) -> Result<()> {
    let parts = [(0, 0..SECTOR), (SECTOR as u64, SECTOR..luks1::HEADER_BYTES)];
    let mut order = parts;
    if second_first {
        order.reverse();
    }
    for (offset, part) in order {
        if before[part.clone()] != after[part.clone()] {
            device.write(offset, &after[part])?;
            device.flush()?;
        }
    }
    Ok(())
}

/// Write keyslot material, durably: before the header that points to it. `loaded`: the header in which its place is free.
///
/// # Errors
/// `Conflict`: that is not the header on disk, and nothing was written. Else of the device.
pub fn write_material(device: &mut Blocking, loaded: &Header, offset: u64, material: &[u8]) -> Result<()> {
    unchanged(device, loaded)?;
    device.write(offset, material)?;
    device.flush()
}

/// Overwrite keyslot material with noise, durably: before its keyslot is taken out of the header. Once over is enough
/// wherever overwriting helps at all; a device that remaps sectors or keeps snapshots may keep the old ones.
/// `loaded`: the header whose keyslot it is.
///
/// # Errors
/// `Conflict`: that is not the header on disk, and nothing was written. Else of the device.
pub fn destroy_material(device: &mut Blocking, loaded: &Header, offset: u64, bytes: u64) -> Result<()> {
    unchanged(device, loaded)?;
    random_fill(device, offset, bytes)?;
    device.flush()
}

/// Fill with noise; not flushed.
///
/// # Errors
/// Of the device.
pub fn random_fill(device: &mut Blocking, offset: u64, bytes: u64) -> Result<()> {
    let mut noise = random::Noise::new()?;
    let mut done = 0;
    while done < bytes {
        let piece = noise.next(bytes - done);
        device.write(offset + done, piece)?;
        done += piece.len() as u64;
    }
    Ok(())
}

/// Fill with zeros; not flushed.
///
/// # Errors
/// Of the device.
pub fn zero_fill(device: &mut Blocking, offset: u64, bytes: u64) -> Result<()> {
    let zeros = vec![0; PIECE];
    let mut done = 0;
    while done < bytes {
        let length = usize::try_from(bytes - done).unwrap_or(usize::MAX).min(PIECE);
        device.write(offset + done, &zeros[..length])?;
        done += length as u64;
    }
    Ok(())
}

/// A lock held; released when dropped.
#[derive(Debug)]
#[must_use = "a lock that is dropped is released"]
pub struct Lock<F: AsFd>(F);

/// [`lock`] of the file under a device.
///
/// # Errors
/// As [`lock`].
pub fn lock_device(device: &Blocking, exclusive: bool) -> Result<Lock<Arc<OwnedFd>>> {
    lock(Arc::clone(device.file()), device.name(), exclusive)
}

/// Take cryptsetup's lock of a header file: `flock` on the file itself. Waits at most [`LOCK_WAIT`].
///
/// The lock belongs to the open file description: whoever else holds a duplicate of `file` shares it, and dropping the
/// [`Lock`] releases it for all of them. Block devices are locked by a lock file, which the caller of the daemon does
/// (`lock_fd`); on them this one only keeps others of our kind, and udev, away. A filesystem without locks keeps nobody out:
/// there it is as if the lock were had, and [`unchanged`] is what protects.
///
/// # Errors
/// `Conflict`: somebody else holds it, or it is to be changed while a job of ours re-encrypts the volume, whose header is the job's for
/// all of its life. `Io`: it cannot be locked.
pub fn lock<F: AsFd>(file: F, name: &str, exclusive: bool) -> Result<Lock<F>> {
    let held = lock_within(file, name, exclusive, LOCK_WAIT)?;
    // Asked under the lock: a job that begins after it reads the header after us. The job itself is not in its own way.
    if exclusive && crate::sys::lock::is_taken(&held.0) {
        return Err(Error::new(
            ErrorKind::Conflict,
            "the volume is being re-encrypted, its header cannot be changed now",
        )
        .at(name)
        .hint("wait until the job is done, or cancel it: `cryptctl job list` shows it"));
    }
    Ok(held)
}

/// [`lock`] with a wait of one's own.
///
/// # Errors
/// As [`lock`].
pub fn lock_within<F: AsFd>(file: F, name: &str, exclusive: bool, wait: Duration) -> Result<Lock<F>> {
    let how = if exclusive {
        FlockOperation::NonBlockingLockExclusive
    } else {
        FlockOperation::NonBlockingLockShared
    };
    wait_for(name, wait, &mut || rustix::fs::flock(&file, how))?;
    Ok(Lock(file))
}

/// `try_lock` until it succeeds, or there is no point in it.
fn wait_for(
    name: &str,
    wait: Duration,
    try_lock: &mut dyn FnMut() -> std::result::Result<(), Errno>,
) -> Result<()> {
    let deadline = Instant::now() + wait;
    loop {
        match try_lock() {
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NOLCK) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => std::thread::sleep(LOCK_POLL),
            Err(Errno::WOULDBLOCK) => {
                return Err(Error::new(ErrorKind::Conflict, "the header is locked by another program")
                    .at(name)
                    .hint("wait until it is done and try again"));
            }
            Err(error) => return Err(Error::io("cannot lock the header", error).at(name)),
        }
    }
}

impl<F: AsFd> Drop for Lock<F> {
    fn drop(&mut self) {
        // It can fail only for a descriptor that is none, and then there is no lock either.
        let _ = rustix::fs::flock(&self.0, FlockOperation::Unlock);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filesystem_without_locks_is_worked_on_without() {
        for errno in [Errno::OPNOTSUPP, Errno::NOSYS, Errno::NOLCK] {
            wait_for("volume", Duration::ZERO, &mut || Err(errno)).expect("as if locked");
        }
        let mut answers = [Err(Errno::INTR), Err(Errno::WOULDBLOCK), Ok(())].into_iter();
        wait_for("volume", LOCK_WAIT, &mut || answers.next().expect("an answer")).expect("locked at last");
        for (errno, kind) in [(Errno::WOULDBLOCK, ErrorKind::Conflict), (Errno::BADF, ErrorKind::Io)] {
            let refused = wait_for("volume", Duration::ZERO, &mut || Err(errno)).expect_err("refused");
            assert_eq!(refused.kind(), kind, "{errno:?}");
        }
    }

    #[test]
    fn a_header_is_not_changed_while_its_volume_is_re_encrypted() {
        let path = std::env::temp_dir().join(format!("store-lock-{}", std::process::id()));
        let open =
            || std::fs::File::options().read(true).write(true).create(true).truncate(false).open(&path);
        let (job, other) = (open().expect("open"), open().expect("open"));
        assert_eq!(crate::sys::lock::try_lock(&job), Ok(true));
        let refused = lock(&other, "volume", true).expect_err("refused");
        assert_eq!(refused.kind(), ErrorKind::Conflict);
        assert!(refused.chain().contains("being re-encrypted"), "{}", refused.chain());
        drop(lock(&other, "volume", false).expect("reading is in nobody's way"));
        drop(lock(&job, "volume", true).expect("the job changes its own"));
        drop(job);
        drop(lock(&other, "volume", true).expect("the job is over"));
        std::fs::remove_file(&path).expect("clean up");
    }

    #[test]
    fn a_conflict_behind_material_does_not_say_that_nothing_was_written() {
        let hint = changed_too_late("volume").to_failure().hint.expect("a hint");
        assert!(!hint.contains("nothing was written") && hint.contains("passphrase"), "{hint}");
    }
}
