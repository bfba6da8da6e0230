//! From one volume key to another, and from a volume with a detached header to plain data.

use super::luks1;
use super::slots::{self, Covered, Found, New, Placed};
use super::{Planned, Wish, cipher_words, in_place, iterations, no_room, nominal_digest};
use crate::backend::blocking::Blocking;
use crate::crypto::Secret;
use crate::crypto::hash::Hash;
use crate::crypto::kdf::Kdf;
use crate::crypto::spec::CipherSpec;
use crate::error::{Error, ErrorKind, Result};
use crate::format::luks2::Loaded;
use crate::format::luks2::metadata::{Digest, Segment, SegmentKind};
use crate::format::luks2::reencrypt::write::{self, Begin};
use crate::format::luks2::reencrypt::{Direction, Mode, Process, Resilience};
use crate::volume::keyslots::{self, GiveUp, stop};
use crate::volume::reencrypt::luks::LuksLedger;
use crate::volume::reencrypt::{Opened, Side, luks};
use crate::volume::{AreaCipher, DataArea, Header, create, luks2_areas, named, store};

/// Longest key by default, bytes: AES-256-XTS.
const KEY_BYTES: u32 = 64;

/// A wish checked against a volume, with its key.
struct Prepared {
    loaded: Loaded,
    old: DataArea,
    cipher: AreaCipher,
    key: Secret,
    carried: Vec<Covered>,
    dropped: Vec<u32>,
    target: Segment,
    key_bytes: u32,
    /// Of the old key's digest.
    hash: Hash,
    resilience: Resilience,
    total: u64,
    notes: Vec<String>,
}

/// See [`super::plan`].
pub fn plan(
    header: &mut Blocking,
    wish: &Wish<'_>,
    keys: &[Secret],
    new_key: Option<&Secret>,
    give_up: GiveUp<'_>,
) -> Result<Planned> {
    let (loaded, converted) = match look(header)? {
        Header::Luks2(loaded) => (*loaded, None),
        // As it would be, but with the material where it is now.
        Header::Luks1(older) => (luks1::converted(&older, false)?, Some(luks1::converted(&older, true)?)),
    };
    let mut prepared = Prepared::new(header, loaded, wish, keys, new_key, give_up)?;
    if let Some(converted) = converted {
        prepared.loaded = converted;
        prepared.notes.push("the LUKS1 header becomes a LUKS2 one, which stays".to_owned());
    }
    let (_, process) = prepared.nominal(wish, keys, new_key)?;
    Ok(prepared.planned(&process))
}

/// See [`super::begin`].
pub fn begin(
    mut header: Blocking,
    wish: &Wish<'_>,
    keys: &[Secret],
    new_key: Option<&Secret>,
    give_up: GiveUp<'_>,
) -> Result<Opened> {
    let mut loaded = match look(&mut header)? {
        Header::Luks2(loaded) => *loaded,
        Header::Luks1(older) => {
            // Whatever would be refused then is refused now, with the header as it is.
            plan(&mut header, wish, keys, new_key, give_up)?;
            luks1::convert(&mut header, &older)?
        }
    };
    luks::sweep(&mut header, &mut loaded)?;
    let prepared = Prepared::new(&mut header, loaded, wish, keys, new_key, give_up)?;
    // Before the seconds of the key derivations: what has no room has none.
    prepared.nominal(wish, keys, new_key)?;
    let device = &mut header;
    let iterations = iterations(wish, prepared.hash);
    let new_volume_key = match wish.mode {
        Mode::Decrypt => None,
        _ => Some(new_volume_key(prepared.key_bytes)?),
    };
    let new = prepared.new_slots(keys, new_key);
    let (mut next, mut process, placed) = match &new_volume_key {
        None => prepared.without_key()?,
        Some(key) => {
            let digest = super::digest_of(key, prepared.hash, iterations)?;
            let derivations = slots::derivations(&prepared.loaded, &new, wish, prepared.hash, give_up)?;
            prepared.with_key(digest, &new, &derivations)?
        }
    };
    super::protect(
        &mut next.header,
        &mut process,
        [Some(&prepared.key), new_volume_key.as_ref()],
        iterations,
    )?;
    let mut material = Vec::new();
    for (one, placed) in new.iter().zip(&placed) {
        let key = new_volume_key.as_ref().expect("there are new keyslots for a new key only");
        material.push((placed.area.offset, placed.material(one.passphrase, key, give_up)?));
    }
    stop(give_up)?;
    let held = store::lock_device(device, true)?;
    let before = Header::Luks2(Box::new(prepared.loaded.clone()));
    // 1. and 2.
    for (offset, material) in &material {
        store::write_material(device, &before, *offset, material)?;
    }
    // 3.
    let Header::Luks2(next) = store::write_behind_material(device, &before, Header::Luks2(Box::new(next)))?
    else {
        return Err(Error::new(ErrorKind::Internal, "a header changed its version").at(device.name()));
    };
    drop(held);
    let planned = prepared.planned(&process);
    let old = Side { offset: prepared.old.offset, cipher: Some((prepared.cipher, prepared.key)) };
    let new = Side::new(&process.new, new_volume_key)?;
    let boundary = process.begins_at(prepared.total);
    Ok(Opened {
        mode: process.mode,
        direction: process.direction,
        resilience: process.resilience,
        old,
        new,
        moved: None,
        total: prepared.total,
        boundary,
        recovered_bytes: 0,
        carried: planned.carried,
        dropped: planned.dropped,
        notes: planned.notes,
        notes_until_done: Vec::new(),
        ledger: Box::new(LuksLedger::new(header, *next, process, prepared.total, boundary)),
    })
}

/// The header, if a re-encryption may begin.
fn look(device: &mut Blocking) -> Result<Header> {
    let _held = store::lock_device(device, false)?;
    keyslots::load_to_change(device)
}

fn new_volume_key(bytes: u32) -> Result<Secret> {
    let key = create::random_key(bytes)?;
    create::check_key(&key, bytes)?;
    Ok(key)
}

impl Prepared {
    fn new(
        device: &mut Blocking,
        loaded: Loaded,
        wish: &Wish<'_>,
        keys: &[Secret],
        new_key: Option<&Secret>,
        give_up: GiveUp<'_>,
    ) -> Result<Self> {
        let name = device.name().to_owned();
        let metadata = &loaded.header.metadata;
        let areas = luks2_areas(metadata).map_err(|error| named(error, device))?;
        let [DataArea { offset, size: None, cipher: Some(cipher) }] = areas.as_slice() else {
            let what = "only volumes of one encrypted data area that reaches to the end of the device are re-encrypted";
            return Err(Error::new(ErrorKind::Unsupported, what).at(&name));
        };
        let old = DataArea { offset: *offset, size: None, cipher: Some(*cipher) };
        let Some((digest, check)) = metadata.digest_of_segment(0) else {
            let what = "no digest names the key of the data";
            return Err(Error::new(ErrorKind::Damaged, what).at(&name));
        };
        let hash = Hash::from_name(&check.hash)?;
        if wish.mode == Mode::Decrypt {
            check_decrypt(wish, &old, new_key).map_err(|error| error.at(&name))?;
        }
        let mut notes = Vec::new();
        let (target, unit, key_bytes) = match wish.mode {
            Mode::Decrypt => {
                let kind = SegmentKind::Linear;
                let extra = serde_json::Map::new();
                (Segment { kind, offset: old.offset, size: None, flags: Vec::new(), extra }, 512, 0)
            }
            _ => new_side(wish, &loaded, &old, *cipher)?,
        };
        let unit = unit.max(cipher.unit_bytes);
        let total = data_bytes(wish, old.offset, unit).map_err(|error| error.at(&name))?;
        let resilience = in_place(wish, unit, total, &mut notes)?;
        let Found { key, covered, uncovered } = slots::find(device, &loaded, digest, keys, give_up)?;
        let (carried, dropped) = match wish.mode {
            Mode::Decrypt => (Vec::new(), check.keyslots.clone()),
            _ if !uncovered.is_empty() && !wish.luks.drop_slots => {
                return Err(slots::refuse_loss(&uncovered, &name));
            }
            _ => (covered, uncovered),
        };
        if let (Some(_), Some(first)) = (new_key, carried.iter().find(|one| one.key == 0)) {
            notes.push(format!(
                "the new passphrase takes the place of the one of keyslot {}; until all is done both are needed to resume, and \
                 cryptsetup, which takes one, cannot",
                first.id
            ));
        }
        Ok(Self {
            loaded,
            old,
            cipher: *cipher,
            key,
            carried,
            dropped,
            target,
            key_bytes,
            hash,
            resilience,
            total,
            notes,
        })
    }

    /// The keyslots of the new key.
    fn new_slots<'a>(&self, keys: &'a [Secret], new_key: Option<&'a Secret>) -> Vec<New<'a>> {
        let one = |covered: &Covered| match new_key {
            Some(passphrase) if covered.key == 0 => New { old: covered.id, passphrase, same: false },
            _ => New { old: covered.id, passphrase: &keys[covered.key], same: true },
        };
        self.carried.iter().map(one).collect()
    }

    fn begin(&self, next: &mut Loaded, new_digest: Option<u32>) -> Result<Process> {
        let begin = Begin {
            mode: if new_digest.is_some() { Mode::Reencrypt } else { Mode::Decrypt },
            direction: Direction::Forward,
            resilience: self.resilience,
            target: self.target.clone(),
            new_digest,
            moved: None,
            total: None,
        };
        let process = write::begin(&mut next.header, &begin)?;
        super::check_area(&process)?;
        Ok(process)
    }

    fn with_key(
        &self,
        digest: Digest,
        new: &[New<'_>],
        derivations: &[Kdf],
    ) -> Result<(Loaded, Process, Vec<Placed>)> {
        let mut next = self.loaded.clone();
        let (digest, placed) =
            slots::place(&self.loaded, &mut next.header, self.key_bytes, digest, new, derivations)?;
        let process = self.begin(&mut next, Some(digest))?;
        Ok((next, process, placed))
    }

    fn without_key(&self) -> Result<(Loaded, Process, Vec<Placed>)> {
        let mut next = self.loaded.clone();
        let process = self.begin(&mut next, None)?;
        Ok((next, process, Vec::new()))
    }

    /// The header as it would be, with nothing derived: is there room for all of it?
    fn nominal(
        &self,
        wish: &Wish<'_>,
        keys: &[Secret],
        new_key: Option<&Secret>,
    ) -> Result<(Loaded, Process)> {
        let made = (|| {
            let new = self.new_slots(keys, new_key);
            let (mut next, mut process, _) = if self.key_bytes == 0 {
                self.without_key()?
            } else {
                let derivations = slots::nominal_derivations(&self.loaded, &new, wish, self.hash)?;
                self.with_key(nominal_digest(self.hash), &new, &derivations)?
            };
            super::protect_nominally(&mut next.header, &mut process)?;
            Ok((next, process))
        })();
        made.map_err(|error| no_room(error, &self.loaded.header.metadata))
    }

    fn planned(&self, process: &Process) -> Planned {
        let old = cipher_words(self.cipher.spec.name(), self.key.len(), self.cipher.unit_bytes);
        let new = match &self.target.kind {
            SegmentKind::Crypt { encryption, sector_size, .. } => {
                Some(cipher_words(encryption, self.key_bytes as usize, *sector_size))
            }
            _ => None,
        };
        Planned {
            total: self.total,
            resilience: process.resilience.name().to_owned(),
            hotzone_max: process.hotzone_max(),
            ciphers: [Some(old), new],
            carried: self.carried.iter().map(|one| one.id).collect(),
            dropped: self.dropped.clone(),
            notes: self.notes.clone(),
        }
    }
}

fn check_decrypt(wish: &Wish<'_>, old: &DataArea, new_key: Option<&Secret>) -> Result<()> {
    if wish.luks.header.is_none() || old.offset != 0 {
        let what = "only a volume with a detached header, whose data begins at 0, is decrypted in place";
        return Err(Error::new(ErrorKind::Unsupported, what)
            .hint("with its header attached the data would have to move: cryptsetup reencrypt --decrypt --header NEW-FILE does that"));
    }
    if new_key.is_some() {
        return Err(Error::new(ErrorKind::Invalid, "plain data has no key: a new one is of no use"));
    }
    Ok(())
}

/// The data as it shall be: its segment, data unit and the bytes of its key.
fn new_side(
    wish: &Wish<'_>,
    loaded: &Loaded,
    old: &DataArea,
    cipher: AreaCipher,
) -> Result<(Segment, u32, u32)> {
    let spec = wish.luks.cipher.as_deref().map_or(Ok(cipher.spec), CipherSpec::parse)?;
    if !spec.is_for_new() {
        let what = format!("cipher {} is not used for new keys", spec.name());
        return Err(Error::new(ErrorKind::Unsupported, what)
            .hint("--cipher aes-xts-plain64 re-encrypts to the one everybody reads"));
    }
    let before = crate::volume::key_bytes_of_segment(&loaded.header.metadata, 0).unwrap_or(KEY_BYTES);
    let fits = spec.check_key_bytes(before as usize).is_ok();
    let key_bytes = wish.luks.key_bytes.unwrap_or(if fits { before } else { KEY_BYTES });
    spec.check_key_bytes(key_bytes as usize)?;
    let unit = wish.luks.data_unit.unwrap_or(cipher.unit_bytes);
    if !matches!(unit, 512 | 1024 | 2048 | 4096) {
        let what = format!("data units of {unit} bytes");
        return Err(Error::new(ErrorKind::Invalid, what).hint("512, 1024, 2048 or 4096"));
    }
    if unit > cipher.unit_bytes && !wish.luks.force_data_unit {
        let what = format!("data units would grow from {} to {unit} bytes", cipher.unit_bytes);
        return Err(Error::new(ErrorKind::Unsupported, what).hint(
            "a filesystem with smaller blocks than that could not be mounted any more; --force-sector-size if there is none",
        ));
    }
    let mut segment = Segment::crypt(old.offset, None, spec.name(), unit);
    if let SegmentKind::Crypt { iv_tweak, .. } = &mut segment.kind {
        *iv_tweak = cipher.offset_sectors;
    }
    Ok((segment, unit, key_bytes))
}

/// Bytes of plaintext: what lies behind `offset`, in whole data units.
pub fn data_bytes(wish: &Wish<'_>, offset: u64, unit: u32) -> Result<u64> {
    let total = wish.data_bytes.saturating_sub(offset);
    if total == 0 {
        let what = format!("the device has {} bytes: there is no data behind byte {offset}", wish.data_bytes);
        return Err(Error::new(ErrorKind::Invalid, what));
    }
    if !total.is_multiple_of(u64::from(unit)) {
        let what = format!("the {total} bytes of data are no whole number of data units of {unit} bytes");
        return Err(Error::new(ErrorKind::Invalid, what)
            .hint("smaller data units (--sector-size) may fit, or a device of another size"));
    }
    Ok(total)
}
