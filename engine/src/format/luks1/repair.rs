//! What is known to go wrong in LUKS1 headers, corrected.
//!
//! A keyslot in use is kept as it is but for its stripes, of which there has never been another number: its material is
//! where it is, and a guess at its salt opens nothing. Material offsets of unused keyslots are set to cryptsetup's layout,
//! provided all keyslots in use lie where that layout says: headers of cryptsetup 1.0 have another, unaligned one.
//!
//! A keyslot whose state is none is taken to be in use if it has iterations and a salt: when that is wrong it is a keyslot that
//! nothing opens, and can be removed; the other mistake would lose a passphrase. Without them, or with material where
//! none can be, nothing opens it: it is made unused, what is left of it is kept, and another keyslot must remain in use.
//!
//! What this module refuses to do: guess payload, key size, cipher, digest or UUID. What does not pass
//! [`Header::check`] after the corrections is beyond repair.

use crate::error::{Error, ErrorKind, Result};
use crate::format::af::STRIPES;
use crate::format::luks1::fields::{ACTIVE, Fields, INACTIVE, KeyslotFields, UUID_BYTES};
use crate::format::luks1::{Header, KEYSLOTS};

/// The keyslot in whose salt bytes 510 and 511 of the device lie, which partitioning tools sign with 55 AA.
const SIGNED_KEYSLOT: usize = 6;
/// Where in that salt.
const SIGNATURE_AT: usize = 6;

impl Header {
    /// What `repair` can correct in a header that does not parse or deviates (cryptsetup's `_keyslot_repair`: stripes, material offsets, states that are neither constant, hash in capitals): the corrected header and one sentence per correction.
    /// No sentences: nothing to correct.
    ///
    /// # Errors
    /// `Invalid`: beyond repair.
    pub fn repaired(bytes: &[u8]) -> Result<(Self, Vec<String>)> {
        let fields = Fields::read(bytes)?;
        let doubtful: [bool; KEYSLOTS] = fields.keyslots.map(|keyslot| keyslot.is_doubtful());
        // Each for itself: could it be in use? So one that cannot be takes no other down with it.
        let can_be = |index: usize| {
            let mut used = [false; KEYSLOTS];
            used[index] = true;
            doubtful[index] && fields.keyslots[index].can_open() && corrected(&fields, used).is_ok()
        };
        let used: [bool; KEYSLOTS] = std::array::from_fn(can_be);
        let beyond = |cause| {
            let what = "the header is beyond repair";
            Error::new(ErrorKind::Invalid, what).hint("restore a header backup").because(cause)
        };
        let (header, actions) = corrected(&fields, used).map_err(beyond)?;
        if doubtful.contains(&true) && !header.keyslots.iter().any(|keyslot| keyslot.active) {
            let what = "no keyslot would be in use: more is lost than a state";
            return Err(beyond(Error::new(ErrorKind::Invalid, what).at("LUKS1 header")));
        }
        Ok((header, actions))
    }
}

impl KeyslotFields {
    /// Its state is neither constant.
    fn is_doubtful(&self) -> bool {
        !matches!(self.state, ACTIVE | INACTIVE)
    }

    /// It has what a passphrase needs to open it; unused keyslots have zeros there.
    fn can_open(&self) -> bool {
        self.iterations != 0 && self.salt != [0; 32]
    }
}

/// The header with every correction; `used`: keyslots without a state to be taken as in use.
fn corrected(fields: &Fields, used: [bool; KEYSLOTS]) -> Result<(Header, Vec<String>)> {
    let mut fields = fields.clone();
    let mut actions = Vec::new();
    correct_texts(&mut fields, &mut actions);
    let mut kept = [false; KEYSLOTS];
    for (index, keyslot) in fields.keyslots.iter_mut().enumerate() {
        kept[index] = keyslot.is_doubtful();
        correct_keyslot(index, keyslot, used[index], &mut actions);
    }
    correct_offsets(&mut fields, kept, &mut actions);
    let header = fields.to_header()?;
    header.check()?;
    Ok((header, actions))
}

fn correct_texts(fields: &mut Fields, actions: &mut Vec<String>) {
    if fields.hash.iter().any(u8::is_ascii_uppercase) {
        fields.hash.make_ascii_lowercase();
        actions.push("hash name written in lower case, as every tool but cryptsetup demands".to_owned());
    }
    if !fields.uuid.contains(&0) {
        fields.uuid[UUID_BYTES - 1] = 0;
        actions.push("UUID ended with a NUL: its last byte is lost".to_owned());
    }
}

fn correct_keyslot(index: usize, keyslot: &mut KeyslotFields, used: bool, actions: &mut Vec<String>) {
    let doubtful = keyslot.is_doubtful();
    if doubtful {
        let becomes = if used {
            "taken to be in use, as it has a salt and iterations; remove it if nothing opens it"
        } else {
            "made unused, as nothing can open what is left of it; that is kept"
        };
        actions.push(format!("keyslot {index}: state {:#010x} is no state: {becomes}", keyslot.state));
        keyslot.state = if used { ACTIVE } else { INACTIVE };
    }
    if keyslot.stripes != STRIPES {
        actions.push(format!("keyslot {index}: {} stripes corrected to {STRIPES}", keyslot.stripes));
        keyslot.stripes = STRIPES;
        if keyslot.state == INACTIVE && !doubtful {
            wipe(keyslot);
        }
    }
    let signed = keyslot.salt[SIGNATURE_AT..SIGNATURE_AT + 2] == [0x55, 0xaa];
    if index == SIGNED_KEYSLOT && keyslot.state == INACTIVE && signed {
        actions.push(format!("keyslot {index}: signature of a partition table wiped"));
        wipe(keyslot);
    }
}

/// `kept`: keyslots of which nothing else is to be lost.
fn correct_offsets(fields: &mut Fields, kept: [bool; KEYSLOTS], actions: &mut Vec<String>) {
    let Ok(layout) = Header::layout(fields.key_bytes, 0) else { return };
    let places = layout.keyslots.map(|keyslot| keyslot.material_sector);
    let in_place = |(keyslot, place): (&KeyslotFields, &u32)| {
        keyslot.state == INACTIVE || keyslot.material_sector == *place
    };
    if !fields.keyslots.iter().zip(&places).all(in_place) {
        return;
    }
    for (index, (keyslot, place)) in fields.keyslots.iter_mut().zip(places).enumerate() {
        if keyslot.material_sector != place {
            let from = keyslot.material_sector;
            actions.push(format!("keyslot {index}: material offset corrected from sector {from} to {place}"));
            keyslot.material_sector = place;
            if !kept[index] {
                wipe(keyslot);
            }
        }
    }
}

/// What an unused keyslot should look like; keeps its place.
fn wipe(keyslot: &mut KeyslotFields) {
    keyslot.state = INACTIVE;
    keyslot.iterations = 0;
    keyslot.salt = [0; 32];
}

// Byte 510 is byte 6 of the salt of keyslot 6.
const _: () = assert!(208 + SIGNED_KEYSLOT * 48 + 8 + SIGNATURE_AT == 510 && SIGNED_KEYSLOT < KEYSLOTS);
