//! The ledger in a journal file beside a volume without a header.
//!
//! # Write orders
//! Making a journal, in a file that is empty or holds one that was being made when the power went:
//! 0. flush of the volume: what the journal will say of it must not be lost by a power cut;
//! 1. a superblock that says *preparing*, flush: from here on the file is known for ours;
//! 2. noise over the area, flush: a disk without room says so now;
//! 3. *clean*, in one slot, flush; 4. in the other one. The volume has not been touched, and is not before a flush has followed ([`Ledger::begin`]).
//!
//! Of a step, see [`super::ledger`]. Beginning: 1. flush of the area (and of the second copy of the state before); 2. *crash* in one slot, flush;
//! 3. in the other. Committing: 4. *clean* in one slot, flush; 5. in the other.
//!
//! Behind the last step: 1. *finished*, in one slot, flush, in the other; 2. noise over the area, flush: with a journal it holds old
//! ciphertext, which the old key opens; 3. *swept*. A crash in between: whoever opens the journal next takes up at 2. The file stays: it is
//! its owner's.
//!
//! Before each of these the file is read once more: another program that wrote to it meanwhile is a conflict, not a state to go on from.
//!
//! Opening: what is in force is written to both slots once more, each with a flush of its own: what is seen of a killed program, or of one
//! whose flush failed, is not durable.
//!
//! # Whose journal
//! A journal of another volume, or of this one as it once was, would have the wrong bytes rewritten. So before anything is written by it these
//! must be as the journal says: size, identity (the first bytes as they were; those that are new are turned back for it), the step in front of the
//! boundary and the one behind it or behind the interrupted step, and of that at least half of its first and of its last bytes are what was
//! saved, or what becomes of that. Of an interrupted step at the beginning of a volume the identity is not known, and one over a whole volume leaves
//! only the last of these. What no check can know: that an empty journal is given for a volume of which a part is new already.

use proto::Raw;

use crate::backend::blocking::Blocking;
use crate::crypto::hash::Hash;
use crate::crypto::kdf::digest_iterations;
use crate::crypto::spec::CipherSpec;
use crate::crypto::{Kernel, Secret, SectorCipher};
use crate::error::{Error, ErrorKind, Result};
use crate::format::luks2::metadata::Area;
use crate::format::luks2::reencrypt::{self as luks, Checksum, Direction, Mode, Process, Resilience};
use crate::format::raw;
use crate::format::sidecar::{
    AREA_OFFSET, BLOCK_BYTES_MAX, Fixed, MacKey, SLOT_BYTES, Slots, State, Superblock, Unproven, Witness,
};
use crate::units::{DataUnit, Extent};
use crate::volume::create::DIGEST_TIME;
use crate::volume::reencrypt::begin::{Planned, cipher_words};
use crate::volume::reencrypt::decide::Refusal;
use crate::volume::reencrypt::ledger::{Ledger, Protection};
use crate::volume::reencrypt::recover::{self, Proven};
use crate::volume::reencrypt::{Opened, Side};
use crate::volume::{AreaCipher, named, random, store};

/// Longest hotzone that a new journal protects: longer ones cost memory and save nothing that could be measured.
const HOTZONE_BYTES: u64 = 64 << 20;

/// What is wanted.
#[derive(Debug, Clone, Copy)]
pub struct Wish<'a> {
    /// The volume as it is, and as it shall be.
    pub pair: &'a proto::reencrypt::RawPair,
    /// How steps shall be protected; `None`: by checksums.
    pub resilience: Option<proto::reencrypt::Resilience>,
    /// Bytes of the volume.
    pub data_bytes: u64,
    /// Its logical block, bytes: what it writes whole or not at all.
    pub block_bytes: u32,
    /// PBKDF2 iterations of the journal's MAC; `None`: what takes an eighth of a second here.
    pub iterations: Option<u32>,
    /// Longest hotzone, bytes, that the journal shall protect; `None`: 64 MiB.
    pub hotzone_bytes: Option<u64>,
}

impl<'a> Wish<'a> {
    /// With everything else as it is best.
    #[must_use]
    pub fn new(pair: &'a proto::reencrypt::RawPair, data_bytes: u64, block_bytes: u32) -> Self {
        Self { pair, resilience: None, data_bytes, block_bytes, iterations: None, hotzone_bytes: None }
    }

    /// Protection, its area, and the step.
    fn protection(&self) -> Result<(Resilience, Area)> {
        let unit = self.pair.old.data_unit.max(self.pair.new.data_unit);
        let total = self.data_bytes;
        if total == 0 || !total.is_multiple_of(unit.into()) {
            let what = format!("volume of {total} bytes is no whole number of data units of {unit} bytes");
            return Err(Error::new(ErrorKind::Invalid, what));
        }
        let hotzone = self.hotzone_bytes.unwrap_or(HOTZONE_BYTES).min(total);
        let (resilience, bytes) = match self.resilience.unwrap_or(proto::reencrypt::Resilience::Checksum) {
            proto::reencrypt::Resilience::Checksum => {
                // What the device writes whole, also where data units are larger: half a unit may be old, half of it new. Smaller only where
                // the data is no whole number of such blocks.
                let whole = 1_u64.checked_shl(total.trailing_zeros()).unwrap_or(u64::MAX);
                let block = self.block_bytes.clamp(512, BLOCK_BYTES_MAX).next_power_of_two();
                let block_bytes = u32::try_from(whole).map_or(block, |whole| block.min(whole));
                let hash = Hash::Sha256;
                let hashes = hotzone.div_ceil(block_bytes.into());
                (Resilience::Checksum(Checksum { hash, block_bytes }), hashes * hash.bytes() as u64)
            }
            proto::reencrypt::Resilience::Journal => (Resilience::Journal, hotzone),
            proto::reencrypt::Resilience::None => (Resilience::None, 0),
            proto::reencrypt::Resilience::Datashift => {
                let what = "resilience datashift is for data that moves, and this data stays where it is";
                return Err(Error::new(ErrorKind::Invalid, what).hint("checksum protects here"));
            }
        };
        let size = bytes.next_multiple_of(SLOT_BYTES as u64);
        Ok((resilience, Area { offset: AREA_OFFSET, size }))
    }
}

/// Check everything and say what [`begin`] would do; or what is left to do of what was begun, as far as that is known without keys.
///
/// # Errors
/// `Conflict`: one is under way. `Unsupported`: the journal's file is something else. `Invalid`: why it cannot be.
pub fn plan(journal: &mut Blocking, wish: &Wish<'_>) -> Result<Planned> {
    if let Some((unproven, _)) = load(journal)? {
        let what = match unproven.claims().state {
            State::Finished | State::Swept => "the journal is that of a re-encryption that is over",
            _ => "a re-encryption is under way: its journal says so",
        };
        return Err(Error::new(ErrorKind::Conflict, what).at(journal.name()).hint(WAY_OUT));
    }
    let (resilience, area) = wish.protection()?;
    let fixed = fixed(wish, resilience, area, 1000, [0; 32])?;
    Ok(Planned {
        total: wish.data_bytes,
        resilience: resilience.name().to_owned(),
        hotzone_max: fixed.hotzone_max(),
        ciphers: [Some(words(&wish.pair.old)), Some(words(&wish.pair.new))],
        carried: Vec::new(),
        dropped: Vec::new(),
        notes: [lasting(&fixed), until_done(&fixed)].concat(),
    })
}

/// The way out where a journal is in the way.
const WAY_OUT: &str = "go on with it by the same keys (--resume-only), or name another file for the journal";

/// A cipher in words.
fn words(side: &Raw) -> String {
    cipher_words(CipherSpec::AesXts(side.tweak).name(), side.key_bytes as usize, side.data_unit)
}

/// Worth telling the user, also when it is over.
fn lasting(fixed: &Fixed) -> Vec<String> {
    match fixed.resilience {
        Resilience::None => vec!["without protection a crash or power cut loses data".to_owned()],
        _ => Vec::new(),
    }
}

/// What holds as long as it is under way.
fn until_done(fixed: &Fixed) -> Vec<String> {
    match fixed.resilience {
        Resilience::None => Vec::new(),
        _ => vec![
            "the journal is needed until all is done: without it an interrupted volume cannot be put right, and a new one \
             would take what is new already for old"
                .to_owned(),
        ],
    }
}

fn fixed(
    wish: &Wish<'_>,
    resilience: Resilience,
    area: Area,
    iterations: u32,
    identity: [u8; 32],
) -> Result<Fixed> {
    let (old, new) = (wish.pair.old.clone(), wish.pair.new.clone());
    raw::layout(&old)?;
    raw::layout(&new)?;
    let (mut id, mut salt) = ([0; 16], [0; 32]);
    random::fill(&mut id)?;
    random::fill(&mut salt)?;
    let volume_bytes = wish.data_bytes;
    let fixed = Fixed { id, volume_bytes, resilience, area, old, new, iterations, salt, identity };
    fixed.check().map_err(|error| error.with_kind(ErrorKind::Invalid))?;
    Ok(fixed)
}

/// Begin it: the journal says so, durably, and the volume has not been touched. The journal's file is empty, or holds one that was being
/// made and never was.
///
/// # Errors
/// `Conflict`: it holds one that is under way or over. `Unsupported`: it holds something else. `Invalid`: why it cannot be; equal keys and
/// ciphers on both sides too. Else of the device: the file is then of no use, and the volume as it was.
pub fn begin(
    mut journal: Blocking,
    mut data: Blocking,
    wish: &Wish<'_>,
    old: &Secret,
    new: &Secret,
) -> Result<Opened> {
    plan(&mut journal, wish)?;
    if old == new && wish.pair.old == wish.pair.new {
        let what = "the volume is encrypted so already: key and cipher are the same";
        return Err(Error::new(ErrorKind::Invalid, what));
    }
    let (resilience, area) = wish.protection()?;
    let iterations = wish.iterations.unwrap_or_else(|| digest_iterations(Hash::Sha256, DIGEST_TIME));
    // 0.
    data.flush()?;
    let mut fixed = fixed(wish, resilience, area, iterations, [0; 32])?;
    let mut first = vec![0; length(fixed.identity_bytes())];
    data.read(0, &mut first)?;
    fixed.identity = sha256(&first);
    let key = fixed.mac_key(old, new)?;
    let sides = sides(&fixed, old, new)?;
    let preparing = Superblock { fixed, sequence: 0, state: State::Preparing, witness: Witness::default() };
    let mut ledger = SidecarLedger::new(journal, data, key, preparing);
    if let Err(error) = ledger.make() {
        // Nothing depends on it yet, and an empty file is one that may be removed. Else it can be begun anew in it all the same.
        if error.kind() == ErrorKind::NoSpace {
            let _ = rustix::fs::ftruncate(&**ledger.journal.file(), 0);
        }
        return Err(error);
    }
    let notes = lasting(&ledger.superblock.fixed);
    Ok(opened(ledger, sides, 0, notes))
}

/// What a journal's file tells.
pub enum Found {
    /// It is under way. What is left to do may be nothing: then the last step was recovered just now, and `boundary` is at the end.
    Under(Box<Opened>),
    /// It was over but for what had to be overwritten, which has been done now.
    Swept,
    /// It was over.
    Over,
    /// There is none: the file is empty, or holds one that was being made and never was.
    None,
}

impl Found {
    /// The one under way.
    #[must_use]
    pub fn under(self) -> Option<Opened> {
        match self {
            Self::Under(opened) => Some(*opened),
            Self::Swept | Self::Over | Self::None => None,
        }
    }
}

/// Open the re-encryption under way, and recover an interrupted step.
///
/// # Errors
/// `WrongKey`: other keys than those it was begun with, or somebody without them wrote the journal. `Conflict`: it belongs to another volume.
/// `Damaged`: the journal is not whole. `Unsupported`: no journal, or of a kind this build does not know; or no recovery is possible.
/// Else of the devices.
pub fn open(
    mut journal: Blocking,
    mut data: Blocking,
    data_bytes: u64,
    pair: &proto::reencrypt::RawPair,
    old: &Secret,
    new: &Secret,
) -> Result<Found> {
    let name = journal.name().to_owned();
    let Some((unproven, other)) = load(&mut journal)? else { return Ok(Found::None) };
    let claims = unproven.claims();
    if claims.fixed.old != pair.old || claims.fixed.new != pair.new {
        let what = format!(
            "the journal is of a re-encryption from {} to {}: other parameters were given",
            words(&claims.fixed.old),
            words(&claims.fixed.new)
        );
        return Err(Error::new(ErrorKind::Conflict, what).at(&name).hint("give those it was begun with"));
    }
    let prove = |unproven: &Unproven, key: &MacKey| unproven.prove(key).cloned();
    let key = claims.fixed.mac_key(old, new).map_err(|error| error.at(&name))?;
    let superblock = prove(&unproven, &key).map_err(|error| {
        error.at(&name).hint("both keys must be those the re-encryption was begun with: nothing was written")
    })?;
    // Of what only half of was written by somebody with the keys nothing is believed.
    if let Some(other) = &other {
        prove(other, &key).map_err(|error| error.at(&name))?;
    }
    let total = superblock.fixed.volume_bytes;
    if total != data_bytes {
        let what = format!("the journal is of a volume of {total} bytes, and this one has {data_bytes}");
        return Err(Error::new(ErrorKind::Conflict, what).at(data.name()));
    }
    let state = superblock.state;
    let sides = sides(&superblock.fixed, old, new)?;
    let process = process(&superblock.fixed);
    if let (State::Crash { .. }, Resilience::None) = (state, process.resilience) {
        return Err(Refusal::Lost.error(&name));
    }
    is_of(&superblock, &mut journal, &mut data, &sides)?;
    let mut ledger = SidecarLedger::new(journal, data, key, superblock);
    let mut notes = lasting(&ledger.superblock.fixed);
    let mut recovered = 0;
    ledger.heal()?;
    match state {
        State::Preparing | State::Clean { .. } => {}
        State::Crash { start, bytes } => {
            let hot = Extent::new(start, start + bytes).expect("a superblock's hotzone is not empty");
            let proven = Proven { process: &process, old: &sides[0], new: &sides[1], total };
            recover::rewrite(&mut ledger.journal, &mut ledger.data, &proven, hot)?;
            ledger.data.flush()?;
            ledger.advance(hot.end())?;
            recovered = hot.len();
            notes.push(format!("an interrupted step of {recovered} bytes was recovered"));
        }
        State::Finished => {
            ledger.sweep()?;
            return Ok(Found::Swept);
        }
        State::Swept => return Ok(Found::Over),
    }
    Ok(Found::Under(Box::new(opened(ledger, sides, recovered, notes))))
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    Hash::Sha256.digest(&[bytes], &mut out);
    out
}

fn length(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a few blocks")
}

/// What lies around the boundary of a state now.
fn witness(data: &mut Blocking, fixed: &Fixed, state: State) -> Result<Witness> {
    let total = fixed.volume_bytes;
    let (front, back) = match state {
        State::Preparing => return Ok(Witness::default()),
        State::Clean { boundary } => (boundary, boundary),
        State::Crash { start, bytes } => (start, start + bytes),
        State::Finished | State::Swept => (total, total),
    };
    let mut step = vec![0; length(fixed.step_bytes())];
    let mut hash = |at: Option<u64>| -> Result<[u8; 32]> {
        let Some(at) = at else { return Ok([0; 32]) };
        data.read(at, &mut step)?;
        Ok(sha256(&step))
    };
    let before = hash(front.checked_sub(fixed.step_bytes()))?;
    let behind = hash(Some(back).filter(|back| *back < total))?;
    Ok(Witness { before, behind })
}

/// The volume is the one whose journal this is, as it was when it was left (see the module head). Nothing is written.
///
/// # Errors
/// `Conflict`. Else of the devices.
fn is_of(known: &Superblock, journal: &mut Blocking, data: &mut Blocking, sides: &[Side; 2]) -> Result<()> {
    let fixed = &known.fixed;
    let head = fixed.identity_bytes();
    let (new, hot) = match known.state {
        // Of these the volume is not touched any more.
        State::Preparing | State::Finished | State::Swept => return Ok(()),
        State::Clean { boundary } => (boundary, None),
        State::Crash { start, bytes } => (start, Extent::new(start, start + bytes)),
    };
    let mut same = witness(data, fixed, known.state)? == known.witness;
    if hot.is_none() || new >= head {
        let mut first = vec![0; length(head)];
        data.read(0, &mut first)?;
        turn_back(sides, 0, &mut first[..length(new.min(head))])?;
        same &= sha256(&first) == fixed.identity;
    }
    if let Some(hot) = hot {
        same = same && is_step_of(hot, fixed, journal, data, sides)?;
    }
    if same {
        return Ok(());
    }
    let what = format!(
        "the journal {} is that of another volume, or this one was changed since: nothing was written",
        journal.name()
    );
    Err(Error::new(ErrorKind::Conflict, what).at(data.name()).hint(format!(
        "give each volume its own journal; in this journal's volume all bytes in front of {new} are under the new key"
    )))
}

/// Are the first and the last bytes of an interrupted step what was saved of it, or what becomes of that? At least half of them each: others may have
/// been torn.
fn is_step_of(
    hot: Extent,
    fixed: &Fixed,
    journal: &mut Blocking,
    data: &mut Blocking,
    sides: &[Side; 2],
) -> Result<bool> {
    let piece = hot.len().min(BLOCK_BYTES_MAX.into());
    for at in [hot.start(), hot.end() - piece] {
        let mut found = vec![0; length(piece)];
        data.read(at, &mut found)?;
        let mut back = found.clone();
        turn_back(sides, at, &mut back)?;
        let skipped = at - hot.start();
        let (block, saved) = match fixed.resilience {
            Resilience::Checksum(checksum) => {
                let mut saved = vec![0; length(checksum.bytes_for(piece))];
                journal.read(fixed.area.offset + checksum.bytes_for(skipped), &mut saved)?;
                (checksum.block_bytes as usize, saved)
            }
            Resilience::Journal => {
                let mut saved = vec![0; found.len()];
                journal.read(fixed.area.offset + skipped, &mut saved)?;
                (512, saved)
            }
            Resilience::None | Resilience::Datashift { .. } => return Ok(true),
        };
        let mut made = vec![0; saved.len() / (found.len() / block)];
        let mut is_saved = |bytes: &[u8], saved: &[u8]| match fixed.resilience {
            Resilience::Checksum(checksum) => {
                checksum.hash.digest(&[bytes], &mut made);
                made == saved
            }
            _ => bytes == saved,
        };
        let width = saved.len() / (found.len() / block);
        let blocks = found.chunks(block).zip(back.chunks(block)).zip(saved.chunks(width));
        let known =
            blocks.filter(|((found, back), saved)| is_saved(found, saved) || is_saved(back, saved)).count();
        if 2 * known < found.len() / block {
            return Ok(false);
        }
    }
    Ok(true)
}

/// New bytes to old ones. `at`: where they are, a multiple of both data units.
fn turn_back(sides: &[Side; 2], at: u64, bytes: &mut [u8]) -> Result<()> {
    let build = |side: &Side| -> Result<(Box<dyn SectorCipher>, DataUnit)> {
        let (cipher, key) = side.cipher.as_ref().expect("both sides are encrypted");
        Ok((cipher.build(Kernel::best()?, key, 0)?, DataUnit(at / u64::from(cipher.unit_bytes))))
    };
    let [(old, old_unit), (new, new_unit)] = [build(&sides[0])?, build(&sides[1])?];
    new.decrypt(new_unit, bytes);
    old.encrypt(old_unit, bytes);
    Ok(())
}

/// What is in force, and what the other slot holds if that is whole.
type Read = (Box<Unproven>, Option<Box<Unproven>>);

/// The superblocks of a journal that says that something was begun.
fn load(journal: &mut Blocking) -> Result<Option<Read>> {
    let slots = read_slots(journal)?;
    match Slots::read(&slots).map_err(|error| named(error, journal))? {
        Slots::Empty => Ok(None),
        Slots::Whole(whole, _) if whole.claims().state == State::Preparing => Ok(None),
        Slots::Whole(whole, other) => {
            let Area { offset, size } = whole.claims().fixed.area;
            let (end, found) = (offset + size, size_of(journal)?);
            if found < end {
                let what = format!("the journal is cut off: it has {found} of {end} bytes");
                return Err(Error::new(ErrorKind::Damaged, what).at(journal.name()));
            }
            Ok(Some((whole, other)))
        }
    }
}

/// The bytes of both slots, or fewer if the file has no more.
fn read_slots(journal: &mut Blocking) -> Result<Vec<u8>> {
    let mut slots = vec![0; 2 * SLOT_BYTES];
    let size = size_of(journal)?;
    slots.truncate(usize::try_from(size).unwrap_or(slots.len()));
    journal.read(0, &mut slots)?;
    Ok(slots)
}

/// Bytes of the journal's file or device.
fn size_of(journal: &mut Blocking) -> Result<u64> {
    let cannot = |errno| Error::io("cannot find out the size", errno).at(journal.name());
    rustix::fs::seek(&**journal.file(), rustix::fs::SeekFrom::End(0)).map_err(cannot)
}

fn sides(fixed: &Fixed, old: &Secret, new: &Secret) -> Result<[Side; 2]> {
    let side = |raw: &Raw, key: &Secret| -> Result<Side> {
        let layout = raw::layout(raw)?;
        let cipher = AreaCipher {
            spec: CipherSpec::AesXts(layout.kind),
            unit_bytes: layout.unit_bytes,
            offset_sectors: layout.offset_sectors,
            large_tweak: layout.large,
        };
        cipher.spec.check_key_bytes(key.len())?;
        Ok(Side { offset: 0, cipher: Some((cipher, Secret::copy_of(key.as_bytes())?)) })
    };
    Ok([side(&fixed.old, old)?, side(&fixed.new, new)?])
}

/// In the terms that recovery is written in. There is no keyslot and no digest.
fn process(fixed: &Fixed) -> Process {
    let side = |raw: &Raw| luks::Side {
        offset: 0,
        cipher: Some(luks::SideCipher {
            encryption: CipherSpec::AesXts(raw.tweak).name().to_owned(),
            sector_size: raw.data_unit,
            iv_tweak: raw.tweak_offset,
        }),
        digest: None,
    };
    Process {
        keyslot: 0,
        mode: Mode::Reencrypt,
        direction: Direction::Forward,
        resilience: fixed.resilience,
        area: fixed.area,
        old: side(&fixed.old),
        new: side(&fixed.new),
        moved: None,
        total: Some(fixed.volume_bytes),
        protection: None,
    }
}

fn opened(ledger: SidecarLedger, sides: [Side; 2], recovered_bytes: u64, notes: Vec<String>) -> Opened {
    let [old, new] = sides;
    Opened {
        mode: Mode::Reencrypt,
        direction: Direction::Forward,
        resilience: ledger.superblock.fixed.resilience,
        old,
        new,
        moved: None,
        total: ledger.superblock.fixed.volume_bytes,
        boundary: ledger.boundary(),
        recovered_bytes,
        carried: Vec::new(),
        dropped: Vec::new(),
        notes,
        notes_until_done: until_done(&ledger.superblock.fixed),
        ledger: Box::new(ledger),
    }
}

/// Progress kept in a journal file.
struct SidecarLedger {
    journal: Blocking,
    /// The volume, to read what lies around the boundary.
    data: Blocking,
    key: MacKey,
    /// What is in force.
    superblock: Superblock,
    /// A write failed: what is on disk is not known any more.
    broken: bool,
}

impl SidecarLedger {
    fn new(journal: Blocking, data: Blocking, key: MacKey, superblock: Superblock) -> Self {
        Self { journal, data, key, superblock, broken: false }
    }

    /// Put the first state on disk.
    fn make(&mut self) -> Result<()> {
        // 1.
        self.journal.write(0, &self.superblock.to_slot(&self.key)[..])?;
        self.journal.flush()?;
        // 2.
        let Area { offset, size } = self.superblock.fixed.area;
        store::random_fill(&mut self.journal, offset, size)?;
        // The file reaches to the end of the second slot even without an area.
        self.journal.write(SLOT_BYTES as u64, &[0; SLOT_BYTES])?;
        self.journal.flush()?;
        // 3. and 4.
        self.put(State::Clean { boundary: 0 })
    }

    /// In front of it all data is new.
    fn boundary(&self) -> u64 {
        match self.superblock.state {
            State::Preparing => 0,
            State::Clean { boundary } => boundary,
            State::Crash { start, .. } => start,
            State::Finished | State::Swept => self.superblock.fixed.volume_bytes,
        }
    }

    /// Whatever fails in `work` leaves the ledger refusing.
    fn guarded(&mut self, work: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        if self.broken {
            let what = "a write of the journal failed before: what it says now is not known";
            return Err(Error::new(ErrorKind::Io, what)
                .at(self.journal.name())
                .hint("resume the re-encryption: that reads the journal anew, and recovers the step"));
        }
        let done = work(self);
        self.broken = done.is_err();
        done
    }

    /// The file is as this ledger left it: the slot that is durable holds what is in force.
    fn unchanged(&mut self) -> Result<()> {
        let mut slot = [0; SLOT_BYTES];
        self.journal.read(self.superblock.slot() * SLOT_BYTES as u64, &mut slot)?;
        if slot == *self.superblock.to_slot(&self.key) {
            return Ok(());
        }
        let what = "the journal was changed by another program";
        Err(Error::new(ErrorKind::Conflict, what).at(self.journal.name()))
    }

    /// The next state: durable in its slot, then in the other one, which a later flush makes durable.
    fn put(&mut self, state: State) -> Result<()> {
        self.unchanged()?;
        let sequence = self.superblock.sequence + 1;
        let witness = match state {
            State::Swept => self.superblock.witness,
            _ => witness(&mut self.data, &self.superblock.fixed, state)?,
        };
        let next = Superblock { state, sequence, fixed: self.superblock.fixed.clone(), witness };
        next.check().map_err(|error| error.with_kind(ErrorKind::Internal).at(self.journal.name()))?;
        let slot = next.to_slot(&self.key);
        self.journal.write(next.slot() * SLOT_BYTES as u64, &slot[..])?;
        self.journal.flush()?;
        self.journal.write((1 - next.slot()) * SLOT_BYTES as u64, &slot[..])?;
        self.superblock = next;
        Ok(())
    }

    /// What is in force is in both slots, durably. Only then may either of them be overwritten, or the volume. Slots that look so already are written
    /// too: who wrote them may have been killed before the flush, or the flush failed.
    fn heal(&mut self) -> Result<()> {
        let whole = self.superblock.to_slot(&self.key);
        let mut first = [0; SLOT_BYTES];
        let own = self.superblock.slot();
        self.journal.read(own * SLOT_BYTES as u64, &mut first)?;
        // The one that holds it first: the other may have what was in force before, and is what is left if this is cut off.
        let holds = if first == *whole { own } else { 1 - own };
        for slot in [holds, 1 - holds] {
            self.journal.write(slot * SLOT_BYTES as u64, &whole[..])?;
            self.journal.flush()?;
        }
        Ok(())
    }

    /// All data in front of the boundary is new and durable.
    fn advance(&mut self, boundary: u64) -> Result<()> {
        if boundary < self.superblock.fixed.volume_bytes {
            return self.put(State::Clean { boundary });
        }
        // 1.
        self.put(State::Finished)?;
        self.sweep()
    }

    /// Nothing in the area is needed any more.
    fn sweep(&mut self) -> Result<()> {
        // 2.
        let Area { offset, size } = self.superblock.fixed.area;
        store::random_fill(&mut self.journal, offset, size)?;
        self.journal.flush()?;
        // 3. Its second copy needs no flush: who finds *finished* sweeps once more.
        self.put(State::Swept)?;
        self.journal.flush()
    }

    /// A hotzone that follows the boundary and is as its protection wants it.
    fn check(&self, hot: Extent) -> Result<()> {
        let fixed = &self.superblock.fixed;
        let short = fixed.hotzone_max().is_none_or(|most| hot.len() <= most);
        let whole = hot.end().is_multiple_of(fixed.step_bytes()) && hot.end() <= fixed.volume_bytes;
        if hot.start() == self.boundary() && short && whole {
            return Ok(());
        }
        let what = format!(
            "a step of bytes {}..{} is none that follows {} of {}",
            hot.start(),
            hot.end(),
            self.boundary(),
            fixed.volume_bytes
        );
        Err(Error::new(ErrorKind::Internal, what).at(self.journal.name()))
    }

    fn is_at_rest(&self) -> bool {
        matches!(self.superblock.state, State::Clean { .. })
    }

    fn misused(&self, what: &str) -> Error {
        Error::new(ErrorKind::Internal, what).at(self.journal.name())
    }
}

impl Ledger for SidecarLedger {
    fn protection(&self) -> Protection {
        match self.superblock.fixed.resilience {
            Resilience::None | Resilience::Datashift { .. } => Protection::None,
            Resilience::Checksum(checksum) => Protection::Checksums(checksum),
            Resilience::Journal => Protection::Journal {
                file: self.journal.file().clone(),
                name: self.journal.name().to_owned(),
                offset: self.superblock.fixed.area.offset,
                align: self.journal.align(),
            },
        }
    }

    fn step_bytes(&self) -> u64 {
        self.superblock.fixed.step_bytes()
    }

    fn hotzone_max(&self) -> Option<u64> {
        self.superblock.fixed.hotzone_max()
    }

    fn save(&mut self, hot: Extent, checksums: &[u8]) -> Result<()> {
        let Resilience::Checksum(checksum) = self.superblock.fixed.resilience else { return Ok(()) };
        self.check(hot)?;
        if checksums.len() as u64 != checksum.bytes_for(hot.len()) || !self.is_at_rest() {
            return Err(self.misused("checksums of another step than the next"));
        }
        self.guarded(|ledger| {
            ledger.unchanged()?;
            ledger.journal.write(ledger.superblock.fixed.area.offset, checksums)
        })
    }

    fn begin(&mut self, hot: Extent) -> Result<()> {
        self.check(hot)?;
        if !self.is_at_rest() {
            return Err(self.misused("a step is begun within another"));
        }
        self.guarded(|ledger| {
            // 1.
            ledger.journal.flush()?;
            // 2. and 3.
            ledger.put(State::Crash { start: hot.start(), bytes: hot.len() })
        })
    }

    fn commit(&mut self, hot: Extent) -> Result<()> {
        let State::Crash { start, bytes } = self.superblock.state else {
            return Err(self.misused("a step is committed that was not begun"));
        };
        // Without protection less than what was begun with, when stopped early.
        let early = self.superblock.fixed.resilience == Resilience::None && hot.len() <= bytes;
        if hot.start() != start || (hot.len() != bytes && !early) {
            return Err(self.misused("a step is committed that was not begun"));
        }
        self.check(hot)?;
        // 4. and 5.
        self.guarded(|ledger| ledger.advance(hot.end()))
    }
}
