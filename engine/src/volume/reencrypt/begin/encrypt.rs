//! From plain data to a volume: with a new detached header, the data staying where it is; or with a header in front of it, for which half of the
//! bytes that are free at the end is used, the other half being what the data moves by.
//!
//! # Write order
//! Detached: all of it goes into an empty file, and the data is not touched. Attached: [`super::super::shift`].

use proto::luks::{New, Version};
use proto::reencrypt::Resilience as Wanted;

use super::{Planned, Wish, check_area, cipher_words, in_place, iterations, protect};
use crate::backend::blocking::Blocking;
use crate::crypto::{Secret, bytes_equal};
use crate::error::{Error, ErrorKind, Result};
use crate::format::luks2::edit::keyslot_area_bytes;
use crate::format::luks2::reencrypt::write::{self, Begin};
use crate::format::luks2::reencrypt::{Direction, Mode, Moved, Resilience};
use crate::volume::create::{self, Place};
use crate::volume::keyslots::{GiveUp, stop};
use crate::volume::plan::Plan;
use crate::volume::reencrypt::luks::LuksLedger;
use crate::volume::reencrypt::{Opened, Side, shift};
use crate::volume::{Header, MAGIC, MAGIC_CLONE, secondary_offsets, store};

/// A data unit that every filesystem stands.
const UNIT_BYTES: u32 = 512;
/// What a header's bytes are a multiple of: the keyslots area ends where the data begins.
const HEADER_ALIGN: u64 = 4096;

/// A checked wish.
struct Prepared {
    new: New,
    place: Place,
    plan: Plan,
    total: u64,
    resilience: Resilience,
    moved: Option<Moved>,
}

/// See [`super::plan`].
pub fn plan(header: &mut Blocking, wish: &Wish<'_>, new_key: Option<&Secret>) -> Result<Planned> {
    let prepared = Prepared::new(wish, new_key.is_some()).map_err(|error| error.at(header.name()))?;
    if !shift::is_marked(header)? {
        refuse_luks(header)?;
    }
    Ok(prepared.planned())
}

/// See [`super::begin`].
pub fn begin(
    mut header: Blocking,
    data: &mut Blocking,
    wish: &Wish<'_>,
    new_key: Option<&Secret>,
    give_up: GiveUp<'_>,
) -> Result<Opened> {
    let prepared = Prepared::new(wish, new_key.is_some()).map_err(|error| error.at(data.name()))?;
    let new_key = new_key.expect("it was just asked for");
    let mut notes = prepared.plan.warnings.clone();
    // What an encryption left that was cut off before there was a header.
    if shift::put_back(data)? {
        notes.push("an encryption that was cut off at its beginning was taken back first".to_owned());
    }
    refuse_luks(data)?;
    refuse_luks(&mut header)?;
    let mut made = create::make_unless(&prepared.new, &prepared.place, new_key, None, give_up)?;
    let Header::Luks2(mut loaded) = made.header else {
        return Err(Error::new(ErrorKind::Internal, "a LUKS2 header was made as another").at(header.name()));
    };
    let target = loaded.header.metadata.segments[&0].clone();
    let Some((digest, check)) = loaded.header.metadata.digest_of_segment(0) else {
        return Err(Error::new(ErrorKind::Internal, "a header was made without a digest").at(header.name()));
    };
    let hash = crate::crypto::hash::Hash::from_name(&check.hash)?;
    let begin = Begin {
        mode: Mode::Encrypt,
        direction: prepared.direction(),
        resilience: prepared.resilience,
        target,
        new_digest: Some(digest),
        moved: prepared.moved,
        total: prepared.moved.map(|_| prepared.total),
    };
    let mut process = write::begin(&mut loaded.header, &begin)?;
    check_area(&process)?;
    protect(&mut loaded.header, &mut process, [None, Some(&made.key)], iterations(wish, hash))?;
    made.header = Header::Luks2(loaded.clone());
    stop(give_up)?;
    let held = store::lock_device(&header, true)?;
    match prepared.moved {
        Some(moved) => shift::make_room(&mut header, moved, &made)?,
        None => made.write(&mut header)?,
    }
    drop(held);
    let boundary = process.begins_at(prepared.total);
    Ok(Opened {
        mode: process.mode,
        direction: process.direction,
        resilience: process.resilience,
        old: Side::new(&process.old, None)?,
        new: Side::new(&process.new, Some(made.key))?,
        moved: process.moved,
        total: prepared.total,
        boundary,
        recovered_bytes: 0,
        carried: Vec::new(),
        dropped: Vec::new(),
        notes,
        notes_until_done: Vec::new(),
        ledger: Box::new(LuksLedger::new(header, *loaded, process, prepared.total, boundary)),
    })
}

/// Whoever encrypts a volume once more has most likely mistaken it for another.
fn refuse_luks(device: &mut Blocking) -> Result<()> {
    let mut start = [0; MAGIC.len()];
    let begins = match device.read(0, &mut start) {
        Ok(()) => bytes_equal(&start, &MAGIC) || bytes_equal(&start, &MAGIC_CLONE),
        // Shorter than that.
        Err(error) if error.kind() == ErrorKind::Invalid => return Ok(()),
        Err(error) => return Err(error),
    };
    if begins || !secondary_offsets(device)?.is_empty() {
        let what = "there is a LUKS header already, or what is left of one";
        return Err(Error::new(ErrorKind::Conflict, what)
            .at(device.name())
            .hint("a volume is given a new key without --encrypt; a leftover is removed with wipefs --all"));
    }
    Ok(())
}

impl Prepared {
    fn new(wish: &Wish<'_>, has_key: bool) -> Result<Self> {
        let luks = wish.luks;
        let invalid = |what: &str| Err(Error::new(ErrorKind::Invalid, what));
        if !has_key {
            return invalid("an encryption needs the first passphrase of the new volume");
        }
        let header_bytes = match (luks.reduce_bytes, luks.header.is_some()) {
            (None, true) => None,
            (Some(bytes), false) => Some(bytes / 2),
            (None, false) => {
                return Err(Error::new(ErrorKind::Invalid, "there is no place for the header").hint(
                    "put it elsewhere (--header FILE), or say how many bytes are free at the end of the device \
                     (--reduce-device-size); half of them become the header",
                ));
            }
            (Some(_), true) => {
                return invalid(
                    "with a header elsewhere the data stays where it is, and needs no free bytes",
                );
            }
        };
        let new = New {
            version: Version::Luks2,
            cipher: luks.cipher.clone(),
            key_bytes: luks.key_bytes,
            data_unit: Some(luks.data_unit.unwrap_or(UNIT_BYTES)),
            hash: None,
            label: luks.label.clone(),
            subsystem: None,
            uuid: luks.uuid.clone(),
            data_offset: header_bytes,
            metadata_bytes: None,
            keyslots_bytes: None,
            kdf: luks.kdf.clone().unwrap_or_default(),
            keyslot: None,
            volume_key_fd: None,
            header: None,
        };
        let place = Place {
            detached: header_bytes.is_none(),
            header_capacity: header_bytes.map(|_| wish.data_bytes),
            data_capacity: Some(wish.data_bytes),
            align: 512,
        };
        let unit = u64::from(new.data_unit.unwrap_or(UNIT_BYTES));
        if let Some(bytes) = header_bytes
            && (luks.reduce_bytes != Some(2 * bytes) || bytes % HEADER_ALIGN != 0)
        {
            return invalid("the free bytes at the end must be a multiple of 8192");
        }
        let total = wish.data_bytes.saturating_sub(luks.reduce_bytes.unwrap_or(0));
        if total == 0 {
            let what = format!("the device's {} bytes leave none for data", wish.data_bytes);
            return Err(Error::new(ErrorKind::NoSpace, what));
        }
        create::plan(&new, &place)?;
        let mut plan = Plan::new(&new, &place)?;
        if !total.is_multiple_of(unit) {
            let what = format!("the {total} bytes of data are no whole number of data units of {unit} bytes");
            return Err(Error::new(ErrorKind::Invalid, what).hint("--sector-size 512 fits every device"));
        }
        let (resilience, moved) = match (header_bytes, wish.resilience) {
            (None, _) => {
                let unit = new.data_unit.unwrap_or(UNIT_BYTES);
                (in_place(wish, unit, total, &mut plan.warnings)?, None)
            }
            (Some(shift), None | Some(Wanted::Datashift)) => {
                let moved = Moved { bytes: shift.min(total), offset: wish.data_bytes - shift };
                (Resilience::Datashift { shift }, Some(moved))
            }
            (Some(_), Some(_)) => {
                return Err(Error::new(ErrorKind::Invalid, "data that moves is protected by moving only")
                    .hint("leave --resilience away, or say datashift"));
            }
        };
        Ok(Self { new, place, plan, total, resilience, moved })
    }

    /// From the end, where the free bytes are.
    fn direction(&self) -> Direction {
        if self.moved.is_some() { Direction::Backward } else { Direction::Forward }
    }

    fn planned(&self) -> Planned {
        let plan = &self.plan;
        let area = plan.keyslots_bytes.saturating_sub(keyslot_area_bytes(plan.key_bytes));
        let hotzone_max = match self.resilience {
            Resilience::None => None,
            Resilience::Journal => Some(area),
            Resilience::Checksum(checksum) => {
                Some(area / checksum.hash.bytes() as u64 * u64::from(checksum.block_bytes))
            }
            Resilience::Datashift { shift } => Some(shift),
        };
        let unit = self.new.data_unit.unwrap_or(UNIT_BYTES);
        Planned {
            total: self.total,
            resilience: self.resilience.name().to_owned(),
            hotzone_max,
            ciphers: [None, Some(cipher_words(plan.spec.name(), plan.key_bytes as usize, unit))],
            carried: Vec::new(),
            dropped: Vec::new(),
            notes: plan.warnings.clone(),
        }
    }
}
