//! One under way: both keys, the protection digest, and the interrupted step if there is one.
//!
//! Whoever may write the header may not have data rewritten for it: nothing is written before the digest over keys and metadata was
//! found right, and what is done then is in one table, [`super::decide`].

use std::cmp::Reverse;

use crate::backend::blocking::Blocking;
use crate::crypto::Secret;
use crate::crypto::spec::CipherSpec;
use crate::error::{Error, ErrorKind, Result};
use crate::format::luks2::metadata::{Keyslot, Metadata};
use crate::format::luks2::reencrypt::{self as format, Process, Resilience, State, digest, read};
use crate::format::luks2::{Health, Loaded};
use crate::volume::keyslots::{self, GiveUp, stop};
use crate::volume::reencrypt::decide::{
    Decision, Facts, Means, Phase, Proof, Refusal, Requirement, Room, decide,
};
use crate::volume::reencrypt::luks::LuksLedger;
use crate::volume::reencrypt::recover::{self, Proven};
use crate::volume::reencrypt::{Opened, Side, luks, shift};
use crate::volume::unlock::{self, WRONG_KEY};
use crate::volume::{AreaCipher, Header, named, store};

/// What was found of a re-encryption.
pub enum Found {
    /// It is under way. What is left to do may be nothing: then `boundary` is at its end, and the header has been taken down.
    Under(Box<Opened>),
    /// It was over but for what had to be overwritten, which has been done now: nothing is left to go on with.
    Swept,
    /// There is none.
    None,
}

impl Found {
    /// The one under way.
    #[must_use]
    pub fn under(self) -> Option<Opened> {
        match self {
            Self::Under(opened) => Some(*opened),
            Self::Swept | Self::None => None,
        }
    }
}

/// Open the re-encryption under way on a volume, and recover an interrupted step.
///
/// # Errors
/// `WrongKey`: one of the keys is missing. `Damaged`: the metadata is not what was begun. `Unsupported`: of a kind this build
/// does not go on with; or no recovery is possible, and why.
pub fn open(
    mut header: Blocking,
    data: &mut Blocking,
    data_bytes: u64,
    keys: &[Secret],
    give_up: GiveUp<'_>,
) -> Result<Found> {
    // An encryption that was cut off before there was a header is none.
    if shift::put_back(data)? {
        return Ok(Found::None);
    }
    let held = store::lock_device(&header, false)?;
    let Header::Luks2(mut loaded) = Header::load(&mut header)? else { return Ok(Found::None) };
    drop(held);
    match by_header(&loaded.header.metadata) {
        Some(Decision::Refuse(refusal)) => return Err(refusal.error(header.name())),
        Some(_) => {
            // A power cut behind the end of the last one may have left something to be overwritten.
            let swept = luks::sweep(&mut header, &mut loaded)?;
            return Ok(if swept { Found::Swept } else { Found::None });
        }
        None => {}
    }
    if loaded.health[0] != Health::Good && !shift::is_marked(&mut header)? {
        keyslots::refuse_overwritten(&mut header)?;
    }
    let found = read::read(&loaded.header.metadata).map_err(|error| named(error, &header))?;
    let Some((process, state)) = found else {
        return Err(Refusal::Contradiction.error(header.name()));
    };
    check_places(&process, &header, data)?;
    let total = total(&process, state, data_bytes, data.name())?;
    check_blocks(&process, state, total, header.name())?;
    let unlocked = Unlocked::new(&mut header, &loaded, &process, state, keys, give_up)?;
    let facts = Facts::of(&loaded.header.metadata, &process, state, unlocked.proof);
    if let Decision::Refuse(refusal) = decide(&facts) {
        return Err(refusal.error(header.name()));
    }
    stop(give_up)?;
    let mut notes = vec![who_opens(&loaded.header.metadata, &process)];
    let (old, new) = unlocked.sides(&process)?;
    let proven = Proven { process: &process, old: &old, new: &new, total };
    let recovered_bytes = recover::recover(&mut header, data, &mut loaded, state, &proven)?;
    let boundary = match state {
        State::Crash { start, end } => {
            let hot = crate::units::Extent::new(start, end).expect("it was recovered");
            process.boundary_after(hot)
        }
        _ => recover::boundary(&process, state, total),
    };
    if recovered_bytes > 0 {
        notes.push(format!("an interrupted step of {recovered_bytes} bytes was recovered"));
    }
    Ok(Found::Under(Box::new(Opened {
        mode: process.mode,
        direction: process.direction,
        resilience: process.resilience,
        old,
        new,
        moved: process.moved,
        total,
        boundary,
        recovered_bytes,
        carried: Vec::new(),
        dropped: Vec::new(),
        notes,
        notes_until_done: Vec::new(),
        ledger: Box::new(LuksLedger::new(header, *loaded, process, total, boundary)),
    })))
}

/// What the table says, where the header's requirement alone decides.
fn by_header(metadata: &Metadata) -> Option<Decision> {
    let requirement = Requirement::of(metadata);
    let hot = metadata.data_segments().any(|(_, one)| one.flags.iter().any(|flag| flag == "in-reencryption"));
    let facts = Facts {
        requirement,
        phase: if hot { Phase::Crash } else { Phase::Rest },
        means: Means::None,
        room: Room::Fits,
        proof: Proof::Missing,
    };
    (requirement != Requirement::Two).then(|| decide(&facts))
}

/// Bytes of plaintext; that the device still has them all, and that they are whole data units.
pub(super) fn total(process: &Process, state: State, data_bytes: u64, name: &str) -> Result<u64> {
    let wrong = |what: String| {
        Err(Error::new(ErrorKind::Damaged, what)
            .at(name)
            .hint("the data device must be the same as before, with its size of before"))
    };
    let Some(total) = process.total.or_else(|| data_bytes.checked_sub(process.old.offset)) else {
        return wrong(format!(
            "the device's {data_bytes} bytes end before its data begins, at {}",
            process.old.offset
        ));
    };
    let ends = |offset: u64, bytes: u64| offset.saturating_add(bytes);
    let needed = match process.moved {
        Some(moved) if state != State::Finished => ends(moved.offset, moved.bytes),
        _ => 0,
    };
    let needed = needed.max(ends(process.new.offset, total));
    if data_bytes < needed {
        return wrong(format!(
            "the device has {data_bytes} bytes, but its re-encryption was begun over {needed}"
        ));
    }
    let reached = match state {
        State::Clean { boundary } => boundary.unwrap_or(0),
        State::Crash { end, .. } => end,
        State::Finished => 0,
    };
    // At rest with nothing left to do is a state of its own: an end that lies at the boundary is one that came nearer. One that
    // came nearer without reaching the boundary cannot be told from the one of before, where the header does not say how long the data is.
    let nothing_left = process.total.is_none()
        && matches!(state, State::Clean { boundary: Some(boundary) } if boundary == total);
    if reached > total || nothing_left {
        return wrong(format!(
            "the device became smaller: it has {total} bytes of data, which were re-encrypted up to {reached} and not to their end"
        ));
    }
    let unit = process.unit_bytes();
    if total == 0 || !total.is_multiple_of(unit) {
        return wrong(format!("the {total} bytes of data are no whole number of data units of {unit} bytes"));
    }
    Ok(total)
}

/// Bytes that were moved out of the way of a header lie on its own device: one that was copied elsewhere would have the wrong
/// file overwritten in the end.
fn check_places(process: &Process, header: &Blocking, data: &Blocking) -> Result<()> {
    let id = |device: &Blocking| {
        let stat = rustix::fs::fstat(&**device.file()).map_err(|errno| {
            Error::new(ErrorKind::Io, "cannot examine the device").at(device.name()).because(errno)
        })?;
        Ok::<_, Error>(match rustix::fs::FileType::from_raw_mode(stat.st_mode) {
            rustix::fs::FileType::BlockDevice => (true, stat.st_rdev, 0),
            _ => (false, stat.st_dev, stat.st_ino),
        })
    };
    if process.moved.is_none() || id(header)? == id(data)? {
        return Ok(());
    }
    let what = "the header is of an encryption that moves the first bytes of the device it lies on, but it lies elsewhere";
    Err(Error::new(ErrorKind::Unsupported, what)
        .at(header.name())
        .hint("nothing was written; resume with the device itself, without a header of its own"))
}

/// A last block that is shorter than the others has no hash that a recovery could go by.
fn check_blocks(process: &Process, state: State, total: u64, name: &str) -> Result<()> {
    let Resilience::Checksum(checksum) = process.resilience else { return Ok(()) };
    let block = u64::from(checksum.block_bytes);
    if state == State::Finished || total.is_multiple_of(block) {
        return Ok(());
    }
    let what = format!(
        "the {total} bytes of data are no whole number of the blocks of {block} bytes that the re-encryption under way hashes"
    );
    Err(Error::new(ErrorKind::Unsupported, what)
        .at(name)
        .hint("nothing was written; cryptsetup reencrypt --resume-only finishes it"))
}

/// The volume keys of both sides.
struct Unlocked {
    old: Option<Secret>,
    new: Option<Secret>,
    proof: Proof,
}

impl Unlocked {
    fn new(
        header: &mut Blocking,
        loaded: &Loaded,
        process: &Process,
        state: State,
        keys: &[Secret],
        give_up: GiveUp<'_>,
    ) -> Result<Self> {
        let metadata = &loaded.header.metadata;
        // cryptsetup destroys the old keyslots before the requirement goes.
        let mut unknowable = process.old.digest.is_some_and(|id| candidates(metadata, id).is_empty());
        if unknowable && state != State::Finished {
            return Ok(Self { old: None, new: None, proof: Proof::Unknowable });
        }
        let mut found = Vec::new();
        if let (State::Finished, false, Some(old)) = (state, unknowable, process.old.digest) {
            // And their material before the header forgets them: one that nothing opens is such a one, or its passphrase is not
            // given. Neither is needed any more.
            match volume_keys(header, loaded, &[old], keys, give_up) {
                Ok(key) => found = key,
                Err(error) if error.kind() == ErrorKind::WrongKey => unknowable = true,
                Err(error) => return Err(error),
            }
        }
        let old_digest = process.old.digest.filter(|_| !unknowable);
        let mut wanted: Vec<u32> = old_digest.into_iter().chain(process.new.digest).collect();
        wanted.dedup();
        wanted.retain(|id| !found.iter().any(|(known, _)| known == id));
        found.extend(volume_keys(header, loaded, &wanted, keys, give_up)?);
        let key = |digest: Option<u32>| {
            let found = found.iter().find(|(id, _)| Some(*id) == digest);
            found.map(|(_, key)| Secret::copy_of(key.as_bytes())).transpose()
        };
        let (old, new) = (key(old_digest)?, key(process.new.digest)?);
        let proof = match process.protection.and_then(|id| metadata.digests.get(&id)) {
            None => Proof::Missing,
            Some(_) if unknowable => Proof::Unknowable,
            Some(protection) => {
                let message = digest::message(metadata, process, old.as_ref(), new.as_ref())?;
                if unlock::meets(protection, &message)? { Proof::Right } else { Proof::Wrong }
            }
        };
        Ok(Self { old, new, proof })
    }

    fn sides(self, process: &Process) -> Result<(Side, Side)> {
        Ok((Side::new(&process.old, self.old)?, Side::new(&process.new, self.new)?))
    }
}

impl Side {
    /// With its key; without one no data of it can be touched.
    ///
    /// # Errors
    /// `Unsupported`: a cipher this build does not know; `Invalid`: the key is not one of it.
    pub(super) fn new(side: &format::Side, key: Option<Secret>) -> Result<Self> {
        let cipher = match (&side.cipher, key) {
            (Some(cipher), Some(key)) => {
                let spec = CipherSpec::parse(&cipher.encryption)?;
                spec.check_key_bytes(key.len())?;
                let (unit_bytes, offset_sectors) = (cipher.sector_size, cipher.iv_tweak);
                Some((AreaCipher { spec, unit_bytes, offset_sectors, large_tweak: false }, key))
            }
            _ => None,
        };
        Ok(Self { offset: side.offset, cipher })
    }
}

/// Keyslots that hold the key of a digest, the preferred ones first.
fn candidates(metadata: &Metadata, digest: u32) -> Vec<u32> {
    let bound = metadata.digests.get(&digest).map_or(&[][..], |digest| &digest.keyslots);
    let mut found: Vec<(Reverse<u32>, u32)> = bound
        .iter()
        .filter_map(|id| match metadata.keyslots.get(id) {
            Some(Keyslot::Luks2(keyslot)) => Some((Reverse(keyslot.priority), *id)),
            _ => None,
        })
        .collect();
    found.sort_unstable();
    found.into_iter().map(|(_, id)| id).collect()
}

/// The volume keys of these digests, from whichever passphrases open them: one may open several.
pub(super) fn volume_keys(
    header: &mut Blocking,
    loaded: &Loaded,
    digests: &[u32],
    keys: &[Secret],
    give_up: GiveUp<'_>,
) -> Result<Vec<(u32, Secret)>> {
    let metadata = &loaded.header.metadata;
    let whole = Header::Luks2(Box::new(loaded.clone()));
    let mut found: Vec<(u32, Secret)> = Vec::new();
    let mut impossible: Option<Error> = None;
    for digest in digests {
        'one: for key in keys {
            for id in candidates(metadata, *digest) {
                stop(give_up)?;
                match unlock::keyslot_unless(header, &whole, id, key, give_up) {
                    Ok(opened) => {
                        found.push((*digest, opened.key));
                        break 'one;
                    }
                    Err(error) => match error.kind() {
                        ErrorKind::WrongKey => {}
                        ErrorKind::Unsupported | ErrorKind::Limit => impossible = Some(error),
                        _ => return Err(error),
                    },
                }
            }
        }
    }
    let missing = digests.iter().find(|digest| !found.iter().any(|(id, _)| id == *digest));
    let Some(missing) = missing else { return Ok(found) };
    if let Some(error) = impossible {
        return Err(error);
    }
    let list = |digest: u32| keyslots::list(&candidates(metadata, digest));
    let hint = match digests {
        [one] => format!("a passphrase of keyslot {} is needed", list(*one)),
        _ => format!(
            "both volume keys are needed, and nothing opens that of keyslot {}; name further passphrases",
            list(*missing)
        ),
    };
    Err(Error::new(ErrorKind::WrongKey, WRONG_KEY).hint(hint))
}

/// Which keyslots stay and which go.
fn who_opens(metadata: &Metadata, process: &Process) -> String {
    let slots = |digest: Option<u32>| digest.map_or_else(Vec::new, |id| candidates(metadata, id));
    let (old, new) = (slots(process.old.digest), slots(process.new.digest));
    match (old.as_slice(), new.as_slice()) {
        (old, []) => {
            format!("keyslots of the old volume key: {}; nothing will be left of them", keyslots::list(old))
        }
        ([], new) => format!("keyslots of the new volume key: {}", keyslots::list(new)),
        (old, new) => format!(
            "keyslots of the new volume key: {}; of the old one, which go with it: {}",
            keyslots::list(new),
            keyslots::list(old)
        ),
    }
}
