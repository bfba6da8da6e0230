//! A new re-encryption: keyslots for the new key, the first header.
//!
//! | file | what begins |
//! |---|---|
//! | `begin` | the wish, and which of these it is |
//! | `rotate` | from one volume key to another; from a volume to plain data |
//! | `slots` | which passphrase opens which keyslot, and the new ones |
//! | `encrypt` | from plain data to a volume |
//! | `luks1` | first of all a LUKS2 header, where there is an older one |
//!
//! # Write order
//! First: material of the new keyslots into free places of the keyslots area. Second: flush. Third: one header write with the new
//! keyslots, their digest, the re-encryption's keyslot, its protection digest and the requirement, all at once. A power cut before the third
//! leaves noise in free places; behind it a re-encryption of which nothing is done. So there is never a keyslot whose key is
//! nobody's, as cryptsetup leaves them when it is cut off between its several header writes; ones it left are named when they are
//! in the way.

mod encrypt;
pub mod luks1;
mod rotate;
mod slots;

use crate::backend::blocking::Blocking;
use crate::crypto::Secret;
use crate::crypto::hash::Hash;
use crate::crypto::kdf::{Kdf, digest_iterations};
use crate::error::{Error, ErrorKind, Result};
use crate::format::luks2::metadata::Digest;
use crate::format::luks2::reencrypt::{Checksum, Mode, Process, Resilience, digest, write};
use crate::format::luks2::{Header as Luks2Header, metadata::Metadata};
use crate::volume::create::{DIGEST_ITERATIONS_MIN, DIGEST_TIME, random_salt};
use crate::volume::keyslots::GiveUp;
use crate::volume::reencrypt::Opened;

/// What is wanted, as far as the volume itself is concerned; the rest is in the wire's types.
pub struct Wish<'a> {
    /// What the data becomes.
    pub mode: Mode,
    /// How; see the wire.
    pub luks: &'a proto::reencrypt::Luks,
    /// How steps shall be protected; `None`: the best there is.
    pub resilience: Option<proto::reencrypt::Resilience>,
    /// Bytes of the data device.
    pub data_bytes: u64,
    /// Its logical block, bytes: the least it writes.
    pub block_bytes: u32,
    /// Its physical block, bytes: what a power cut leaves written whole or not at all, as far as the device says so.
    pub atomic_bytes: u32,
}

/// What would be done: everything that can be known without writing. For a dry run, and the first step of [`begin`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Planned {
    /// Bytes of plaintext.
    pub total: u64,
    /// As on disk.
    pub resilience: String,
    /// Most bytes of a hotzone by its protection; `None`: no limit.
    pub hotzone_max: Option<u64>,
    /// Ciphers in words: before, after.
    pub ciphers: [Option<String>; 2],
    /// Keyslots carried to the new key.
    pub carried: Vec<u32>,
    /// Keyslots that go.
    pub dropped: Vec<u32>,
    /// Worth telling.
    pub notes: Vec<String>,
}

/// Check everything and say what [`begin`] would do. Tries the passphrases.
///
/// # Errors
/// `WrongKey`; `Conflict`: keyslots would be lost and nobody said that they may, named; one is under way. `Unsupported`,
/// `NoSpace`, `Invalid`: why it cannot be.
pub fn plan(
    header: &mut Blocking,
    wish: &Wish<'_>,
    keys: &[Secret],
    new_key: Option<&Secret>,
    give_up: GiveUp<'_>,
) -> Result<Planned> {
    match wish.mode {
        Mode::Reencrypt | Mode::Decrypt => rotate::plan(header, wish, keys, new_key, give_up),
        Mode::Encrypt => encrypt::plan(header, wish, new_key),
    }
}

/// Begin it: the header says so, durably, and no data has been touched. `data`: the data device, for `encrypt` with a shift; the same
/// file as `header` when the header is attached.
///
/// # Errors
/// As [`plan`], and of the devices.
pub fn begin(
    header: Blocking,
    data: &mut Blocking,
    wish: &Wish<'_>,
    keys: &[Secret],
    new_key: Option<&Secret>,
    give_up: GiveUp<'_>,
) -> Result<Opened> {
    // What the first step hashes or saves is what a power cut leaves.
    data.flush()?;
    match wish.mode {
        Mode::Reencrypt | Mode::Decrypt => rotate::begin(header, wish, keys, new_key, give_up),
        Mode::Encrypt => encrypt::begin(header, data, wish, new_key, give_up),
    }
}

/// How steps are protected where data stays in its place. `unit`: the larger data unit.
///
/// Checksums tell old blocks from new ones, and nothing from blocks that are half of each. cryptsetup hashes blocks no smaller than a data
/// unit, so on a device that may tear one, a journal is what loses nothing.
fn in_place(wish: &Wish<'_>, unit: u32, total: u64, notes: &mut Vec<String>) -> Result<Resilience> {
    let tears = wish.atomic_bytes < unit;
    let best =
        if tears { proto::reencrypt::Resilience::Journal } else { proto::reencrypt::Resilience::Checksum };
    let chosen = wish.resilience.unwrap_or(best);
    if tears && chosen == proto::reencrypt::Resilience::Checksum {
        notes.push(format!(
            "the device promises to write {} bytes whole, and data units have {unit}: a power cut may tear one so that its checksum \
             tells nothing; a journal protects against that",
            wish.atomic_bytes
        ));
    }
    Ok(match chosen {
        proto::reencrypt::Resilience::Checksum => {
            // What cryptsetup makes it: it would change another one when it goes on. Smaller where the data is no whole
            // number of such blocks.
            let whole = 1_u64.checked_shl(total.trailing_zeros()).unwrap_or(u64::MAX);
            let block = wish.block_bytes.max(unit).checked_next_power_of_two().unwrap_or(unit);
            let block_bytes = u32::try_from(whole).map_or(block, |whole| block.min(whole));
            Resilience::Checksum(Checksum { hash: Hash::Sha256, block_bytes })
        }
        proto::reencrypt::Resilience::Journal => Resilience::Journal,
        proto::reencrypt::Resilience::None => Resilience::None,
        proto::reencrypt::Resilience::Datashift => {
            let what = "resilience datashift is for data that moves, and this data stays where it is";
            return Err(Error::new(ErrorKind::Invalid, what)
                .hint("it goes with --encrypt --reduce-device-size; checksum protects here"));
        }
    })
}

/// The area holds what protects the smallest step.
fn check_area(process: &Process) -> Result<()> {
    let (most, least) = (process.hotzone_max(), process.step_bytes());
    if most.is_none_or(|most| most >= least) {
        return Ok(());
    }
    let what = format!(
        "the free part of the keyslots area, {} bytes, protects no step of {least} bytes",
        process.area.size
    );
    Err(Error::new(ErrorKind::NoSpace, what)
        .hint("remove a keyslot, or say --resilience none after a backup"))
}

/// Iterations of a new digest: what takes an eighth of a second, unless the wish forbids measuring.
fn iterations(wish: &Wish<'_>, hash: Hash) -> u32 {
    match wish.luks.kdf.as_ref().and_then(|kdf| kdf.iterations) {
        Some(_) => DIGEST_ITERATIONS_MIN,
        None => digest_iterations(hash, DIGEST_TIME),
    }
}

/// A digest of a secret, bound to nothing yet.
fn digest_of(secret: &Secret, hash: Hash, iterations: u32) -> Result<Digest> {
    let salt: [u8; 32] = random_salt()?;
    let mut made = vec![0; hash.bytes()];
    Kdf::Pbkdf2 { hash, iterations }.derive(secret.as_bytes(), &salt, &mut made)?;
    Ok(Digest::pbkdf2(hash.name(), iterations, salt.into(), made))
}

/// As [`digest_of`], of nothing: of the same length, to see whether all has room.
fn nominal_digest(hash: Hash) -> Digest {
    Digest::pbkdf2(hash.name(), 10_000_000, vec![0; 32], vec![0; hash.bytes()])
}

/// Add the protection digest, and see that the header can be written.
fn protect(
    header: &mut Luks2Header,
    process: &mut Process,
    keys: [Option<&Secret>; 2],
    iterations: u32,
) -> Result<()> {
    let message = digest::message(&header.metadata, process, keys[0], keys[1])?;
    let made = digest_of(&message, Hash::Sha256, iterations)?;
    write::protect(&mut header.metadata, process, made)?;
    header.check()
}

/// As [`protect`], of nothing.
fn protect_nominally(header: &mut Luks2Header, process: &mut Process) -> Result<()> {
    write::protect(&mut header.metadata, process, nominal_digest(Hash::Sha256))?;
    header.check()
}

/// A cipher in words.
pub fn cipher_words(name: &str, key_bytes: usize, unit_bytes: u32) -> String {
    format!("{name}, {}-bit key, {unit_bytes}-byte data units", key_bytes * 8)
}

/// Keyslots of keys that no data has.
fn unbound(metadata: &Metadata) -> Vec<u32> {
    let of_nothing = metadata.digests.values().filter(|digest| digest.segments.is_empty());
    of_nothing.flat_map(|digest| &digest.keyslots).copied().collect()
}

/// Want of room, with what may be in the way.
fn no_room(error: Error, metadata: &Metadata) -> Error {
    match unbound(metadata).as_slice() {
        [] => error,
        ids if error.kind() == ErrorKind::NoSpace => error.hint(format!(
            "keyslots {ids:?} hold keys that open no data, as an interrupted cryptsetup leaves them; remove those nobody needs"
        )),
        _ => error,
    }
}
