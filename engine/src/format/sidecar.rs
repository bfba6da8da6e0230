//! The sidecar journal: where the progress of a re-encryption is kept when the volume has no header.
//!
//! ```text
//! byte 0        4096          8192 (area offset)         area offset + area bytes
//! | slot 0       | slot 1       | area ......................|
//! ```
//! A slot holds a superblock: 512 bytes, which disks write whole or not at all, and zeros up to 4096. Numbers are big-endian.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 16 | magic `cryptctl-journal` |
//! | 16 | 4 | version, 1 |
//! | 20 | 4 | state: 0 preparing, 1 clean, 2 crash, 3 finished, 4 swept |
//! | 24 | 8 | sequence number of this state, from 0; one more for each |
//! | 32 | 16 | id, random: which journal this is |
//! | 48 | 8 | bytes of the volume |
//! | 56 | 8 | boundary: in front of it all data is new; crash: the first byte of the hotzone |
//! | 64 | 8 | crash: bytes of the hotzone; else 0 |
//! | 72 | 4 | direction: 1 forward |
//! | 76 | 4 | resilience: 0 none, 1 checksum, 2 journal |
//! | 80 | 16 | checksum: name of the hash, padded with zeros; else zeros |
//! | 96 | 4 | checksum: bytes of a block that is hashed, a power of two from 512 to 65536; else 0 |
//! | 100 | 4 | zeros |
//! | 104 | 8 | first byte of the area, 8192 |
//! | 112 | 8 | bytes of the area, a multiple of 4096; 0 without resilience |
//! | 120 | 24 | the volume as it was |
//! | 144 | 24 | the volume as it will be |
//! | 168 | 4 | PBKDF2 iterations of the key of the MAC, at least 1000 |
//! | 172 | 4 | zeros |
//! | 176 | 32 | salt of that |
//! | 208 | 32 | identity: SHA-256 of the first bytes of the volume as they were, 131072 or all of them |
//! | 240 | 32 | SHA-256 of the step in front of the boundary, as it is: new; zeros where there is none |
//! | 272 | 32 | SHA-256 of the step behind the boundary or hotzone, as it is: old; zeros where there is none |
//! | 304 | 144 | zeros |
//! | 448 | 32 | MAC: HMAC-SHA256 of bytes 0 to 447 |
//! | 480 | 32 | checksum: SHA-256 of bytes 0 to 479 |
//!
//! A side of the volume is AES-XTS without a header:
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | bytes of the key, 32 or 64 |
//! | 4 | 4 | data unit, bytes: 512, 1024, 2048 or 4096 |
//! | 8 | 4 | tweak: 1 `plain64`, 2 `plain` |
//! | 12 | 4 | 1: tweaks are counted in data units (`iv_large_sectors`); 0: in sectors |
//! | 16 | 8 | tweak of the first data unit, 512-byte sectors |
//!
//! **Area.** Checksum: the hashes of the blocks of the hotzone as they were, in their order, from the area's first byte. Journal: the bytes of
//! the hotzone as they were. When it is over, noise.
//!
//! **Two slots.** A state is written to the slot of its parity (sequence number modulo 2) and made durable; then it is in force, and the
//! other slot gets it too, which the next flush makes durable. So a slot is only ever overwritten while the other one holds the state that is in
//! force, and a state that has been in force for a while is in both: a sector that goes bad is no way back to an older state. Of two whole
//! superblocks that with the larger number counts; they must be of one journal (all but state, number, boundary and hotzone equal).
//!
//! **Checksum and MAC.** The checksum tells whether a superblock is whole, without any key. The MAC's key is PBKDF2-HMAC-SHA256 of the old key
//! followed by the new key, 32 bytes: it proves both keys before anything is decrypted by them, and that whoever wrote the superblock had them.
//! Iterations slow down who would guess a key that was made of a word. It does not show that a journal of before was put back in place of the
//! one of now, and the area is not covered: its hashes and bytes are old ciphertext, of which XTS authenticates nothing either.
//!
//! **Whose journal it is.** The size, the identity and the two steps around the boundary tie a journal to its volume and to the volume's
//! state; a step is the least unit of a hotzone. Volumes under the same keys with the same plaintext in all these places are not told apart.
//!
//! What this module refuses to do: I/O, randomness, and telling a wrong key from a forged journal.

use proto::{Raw, TweakKind};

use crate::crypto::hash::{Hash, hmac_sha256};
use crate::crypto::kdf::{Kdf, PBKDF2_ITERATIONS_MIN};
use crate::crypto::{Secret, bytes_equal};
use crate::error::{Error, ErrorKind, Result};
use crate::format::luks2::metadata::Area;
use crate::format::luks2::reencrypt::{Checksum, Resilience};
use crate::format::raw;

/// Bytes of a slot.
pub const SLOT_BYTES: usize = 4096;
/// Where the area begins.
pub const AREA_OFFSET: u64 = 2 * SLOT_BYTES as u64;
/// Bytes of a superblock.
const BYTES: usize = 512;
/// Bytes the MAC covers, and it lies behind them.
const MAC_AT: usize = 448;
/// Bytes the checksum covers, and it lies behind them.
const CHECKSUM_AT: usize = 480;
/// The first bytes.
const MAGIC: [u8; 16] = *b"cryptctl-journal";
const VERSION: u32 = 1;
/// Bytes of the key of the MAC.
const MAC_KEY_BYTES: usize = 32;
/// Most bytes the identity is of: what file systems know themselves by lies there.
const IDENTITY_BYTES: u64 = 131_072;
/// Largest block that is hashed.
pub const BLOCK_BYTES_MAX: u32 = 65536;

const _: () = assert!(MAC_AT + 32 == CHECKSUM_AT && CHECKSUM_AT + 32 == BYTES && BYTES <= SLOT_BYTES);

/// Where a re-encryption stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// The journal is being made; the volume has not been touched.
    Preparing,
    /// At rest.
    Clean {
        /// In front of it all data is new.
        boundary: u64,
    },
    /// A hotzone is being rewritten.
    Crash {
        /// Its first byte.
        start: u64,
        /// Its length, bytes.
        bytes: u64,
    },
    /// All data is new; the area is being overwritten.
    Finished,
    /// And has been.
    Swept,
}

/// What never changes while a re-encryption lasts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fixed {
    /// Which journal this is.
    pub id: [u8; 16],
    /// Bytes of the volume.
    pub volume_bytes: u64,
    /// None, checksum or journal.
    pub resilience: Resilience,
    /// The area of protection.
    pub area: Area,
    /// The volume as it was.
    pub old: Raw,
    /// As it will be.
    pub new: Raw,
    /// PBKDF2 iterations of the key of the MAC.
    pub iterations: u32,
    /// Salt of that.
    pub salt: [u8; 32],
    /// SHA-256 of the first bytes of the volume as they were ([`Fixed::identity_bytes`]).
    pub identity: [u8; 32],
}

/// What lies around the boundary, by which a volume is known: SHA-256 of a step each, zeros where there is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Witness {
    /// In front of it: new.
    pub before: [u8; 32],
    /// Behind it, or behind the hotzone: old.
    pub behind: [u8; 32],
}

/// A superblock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// What never changes.
    pub fixed: Fixed,
    /// How many states there were before this one.
    pub sequence: u64,
    /// Where it stands.
    pub state: State,
    /// What lies there.
    pub witness: Witness,
}

/// The key of the MAC.
#[derive(Debug)]
pub struct MacKey(Secret);

/// A superblock that is whole. Whether it was written by somebody with both keys is not known yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unproven {
    superblock: Superblock,
    covered: [u8; MAC_AT],
    mac: [u8; 32],
}

/// What the two slots say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Slots {
    /// Nothing was ever written: a journal is to be made.
    Empty,
    /// What is in force, and the other slot if that is whole.
    Whole(Box<Unproven>, Option<Box<Unproven>>),
}

impl Fixed {
    /// How many bytes [`Fixed::identity`] is of.
    #[must_use]
    pub fn identity_bytes(&self) -> u64 {
        self.volume_bytes.min(IDENTITY_BYTES)
    }

    /// The least unit of a hotzone, bytes.
    #[must_use]
    pub fn step_bytes(&self) -> u64 {
        let block = match self.resilience {
            Resilience::Checksum(checksum) => checksum.block_bytes,
            _ => 512,
        };
        u64::from(self.old.data_unit.max(self.new.data_unit).max(block))
    }

    /// Most bytes of a hotzone; `None`: no limit.
    #[must_use]
    pub fn hotzone_max(&self) -> Option<u64> {
        let most = match self.resilience {
            Resilience::Checksum(Checksum { hash, block_bytes }) => {
                (self.area.size / hash.bytes() as u64).saturating_mul(block_bytes.into())
            }
            Resilience::Journal => self.area.size,
            _ => return None,
        };
        Some(most - most % self.step_bytes())
    }

    /// Every rule that does not depend on the state.
    ///
    /// # Errors
    /// `Damaged`, naming the rule.
    pub fn check(&self) -> Result<()> {
        let damaged = |what: String| Err(Error::new(ErrorKind::Damaged, what));
        raw::layout(&self.old).map_err(Error::as_damage)?;
        raw::layout(&self.new).map_err(Error::as_damage)?;
        match self.resilience {
            Resilience::Checksum(Checksum { block_bytes, .. })
                if !block_bytes.is_power_of_two() || !(512..=BLOCK_BYTES_MAX).contains(&block_bytes) =>
            {
                return damaged(format!(
                    "blocks of {block_bytes} bytes are hashed: it must be a power of two from 512 to {BLOCK_BYTES_MAX}"
                ));
            }
            Resilience::Datashift { .. } => {
                return damaged("data of a volume without a header does not move".into());
            }
            _ => {}
        }
        if self.iterations < PBKDF2_ITERATIONS_MIN {
            return damaged(format!(
                "{} iterations, at least {PBKDF2_ITERATIONS_MIN} are needed",
                self.iterations
            ));
        }
        let Area { offset, size } = self.area;
        if offset != AREA_OFFSET
            || !size.is_multiple_of(SLOT_BYTES as u64)
            || offset.checked_add(size).is_none()
        {
            return damaged(format!("an area of {size} bytes at {offset} is none of a journal"));
        }
        let step = self.step_bytes();
        if self.volume_bytes == 0 || !self.volume_bytes.is_multiple_of(step) {
            return damaged(format!(
                "a volume of {} bytes is no whole number of blocks of {step}",
                self.volume_bytes
            ));
        }
        if self.hotzone_max().is_some_and(|most| most < step) || (self.hotzone_max().is_none() && size != 0) {
            return damaged(format!("an area of {size} bytes does not go with this protection"));
        }
        Ok(())
    }

    /// The key of the MAC from both volume keys. Takes as long as the iterations say.
    ///
    /// # Errors
    /// `WrongKey`: a key of another length. `Limit`: so many iterations are not to be paid. No memory.
    pub fn mac_key(&self, old: &Secret, new: &Secret) -> Result<MacKey> {
        for (side, key) in [(&self.old, old), (&self.new, new)] {
            if key.len() != side.key_bytes as usize {
                return Err(Error::new(
                    ErrorKind::WrongKey,
                    "a key has another length than the journal says",
                ));
            }
        }
        let kdf = Kdf::Pbkdf2 { hash: Hash::Sha256, iterations: self.iterations };
        kdf.payable(MAC_KEY_BYTES)?;
        let mut both = Secret::zeroed(old.len() + new.len())?;
        both.as_mut_bytes()[..old.len()].copy_from_slice(old.as_bytes());
        both.as_mut_bytes()[old.len()..].copy_from_slice(new.as_bytes());
        let mut key = Secret::zeroed(MAC_KEY_BYTES)?;
        kdf.derive(both.as_bytes(), &self.salt, key.as_mut_bytes())?;
        Ok(MacKey(key))
    }
}

impl Superblock {
    /// The slot this state is first written to, 0 or 1.
    #[must_use]
    pub fn slot(&self) -> u64 {
        self.sequence % 2
    }

    /// Every rule.
    ///
    /// # Errors
    /// As [`Fixed::check`].
    pub fn check(&self) -> Result<()> {
        self.fixed.check()?;
        let total = self.fixed.volume_bytes;
        let step = self.fixed.step_bytes();
        let damaged = |what: String| Err(Error::new(ErrorKind::Damaged, what));
        match self.state {
            State::Clean { boundary } if boundary >= total || !boundary.is_multiple_of(step) => {
                damaged(format!("a boundary at byte {boundary} of {total} is none between two steps"))
            }
            State::Crash { start, bytes } => {
                let end = start.checked_add(bytes).filter(|end| *end <= total);
                let whole = start.is_multiple_of(step) && bytes.is_multiple_of(step) && bytes > 0;
                let fits = self.fixed.hotzone_max().is_none_or(|most| bytes <= most);
                if end.is_none() || !whole || !fits {
                    return damaged(format!("{bytes} bytes from {start} of {total} are no step"));
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// As in a slot.
    #[must_use]
    pub fn to_slot(&self, key: &MacKey) -> Box<[u8; SLOT_BYTES]> {
        let mut slot = Box::new([0; SLOT_BYTES]);
        let mut put = Writer(&mut slot[..], 0);
        put.bytes(&MAGIC).u32(VERSION);
        let (state, boundary, hot) = match self.state {
            State::Preparing => (0, 0, 0),
            State::Clean { boundary } => (1, boundary, 0),
            State::Crash { start, bytes } => (2, start, bytes),
            State::Finished => (3, self.fixed.volume_bytes, 0),
            State::Swept => (4, self.fixed.volume_bytes, 0),
        };
        put.u32(state).u64(self.sequence).bytes(&self.fixed.id).u64(self.fixed.volume_bytes);
        put.u64(boundary).u64(hot).u32(1);
        let mut name = [0; 16];
        let (kind, block) = match self.fixed.resilience {
            Resilience::Checksum(Checksum { hash, block_bytes }) => {
                name[..hash.name().len()].copy_from_slice(hash.name().as_bytes());
                (1, block_bytes)
            }
            Resilience::Journal => (2, 0),
            Resilience::None | Resilience::Datashift { .. } => (0, 0),
        };
        put.u32(kind).bytes(&name).u32(block).u32(0);
        put.u64(self.fixed.area.offset).u64(self.fixed.area.size);
        for side in [&self.fixed.old, &self.fixed.new] {
            let tweak = match side.tweak {
                TweakKind::Plain64 => 1,
                TweakKind::Plain => 2,
            };
            put.u32(side.key_bytes).u32(side.data_unit).u32(tweak).u32(side.large_tweak.into());
            put.u64(side.tweak_offset);
        }
        put.u32(self.fixed.iterations).u32(0).bytes(&self.fixed.salt);
        put.bytes(&self.fixed.identity).bytes(&self.witness.before).bytes(&self.witness.behind);
        let mac = hmac_sha256(key.0.as_bytes(), &slot[..MAC_AT]);
        slot[MAC_AT..CHECKSUM_AT].copy_from_slice(&mac);
        let checksum = checksum(&slot[..CHECKSUM_AT]);
        slot[CHECKSUM_AT..BYTES].copy_from_slice(&checksum);
        slot
    }
}

impl Unproven {
    /// Read a slot. Everything that can be checked without keys has been.
    ///
    /// # Errors
    /// `Unsupported`: no superblock, or of another version. `Damaged`: one that is not whole, or says what none can say.
    pub fn parse(slot: &[u8; SLOT_BYTES]) -> Result<Self> {
        if slot[..16] != MAGIC {
            return Err(no_journal());
        }
        let damaged = |what: &str| Err(Error::new(ErrorKind::Damaged, what));
        if checksum(&slot[..CHECKSUM_AT]) != slot[CHECKSUM_AT..BYTES] {
            return damaged("the superblock is not whole: its checksum does not match");
        }
        if slot[BYTES..].iter().any(|&byte| byte != 0) {
            return damaged("the superblock is followed by what does not belong there");
        }
        let mut take = Reader(slot, 16);
        let version = take.u32();
        if version != VERSION {
            let what = format!("journal of version {version}: this build knows version {VERSION}");
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        let (state, sequence, id, volume_bytes) = (take.u32(), take.u64(), take.array(), take.u64());
        let (boundary, hot, direction) = (take.u64(), take.u64(), take.u32());
        let state = match (state, hot) {
            (0, 0) if boundary == 0 => State::Preparing,
            (1, 0) => State::Clean { boundary },
            (2, _) => State::Crash { start: boundary, bytes: hot },
            (3, 0) if boundary == volume_bytes => State::Finished,
            (4, 0) if boundary == volume_bytes => State::Swept,
            _ => return damaged("the journal's state is none it can be in"),
        };
        if direction != 1 {
            return damaged("the journal's direction is none it can have");
        }
        let (kind, name, block_bytes, zero): (_, [u8; 16], _, _) =
            (take.u32(), take.array(), take.u32(), take.u32());
        let resilience = match (kind, block_bytes) {
            (0, 0) if name == [0; 16] => Resilience::None,
            (2, 0) if name == [0; 16] => Resilience::Journal,
            (1, _) => match hash_named(&name) {
                Some(hash) => Resilience::Checksum(Checksum { hash, block_bytes }),
                None => return damaged("the journal's hash is none there is"),
            },
            _ => return damaged("the journal's protection is none there is"),
        };
        let area = Area { offset: take.u64(), size: take.u64() };
        let (old, new) = (side(&mut take)?, side(&mut take)?);
        let (iterations, also_zero, salt) = (take.u32(), take.u32(), take.array());
        let (identity, witness) = (take.array(), Witness { before: take.array(), behind: take.array() });
        if zero != 0 || also_zero != 0 || slot[take.1..MAC_AT].iter().any(|&byte| byte != 0) {
            return damaged("the superblock has something where zeros belong");
        }
        let fixed = Fixed { id, volume_bytes, resilience, area, old, new, iterations, salt, identity };
        let superblock = Superblock { fixed, sequence, state, witness };
        superblock.check()?;
        let covered = slot[..MAC_AT].try_into().expect("its length");
        let mac = slot[MAC_AT..CHECKSUM_AT].try_into().expect("its length");
        Ok(Self { superblock, covered, mac })
    }

    /// What it says of itself, for messages and for [`Fixed::mac_key`]; nothing to act upon.
    #[must_use]
    pub fn claims(&self) -> &Superblock {
        &self.superblock
    }

    /// It was written by somebody with both keys, and for them.
    ///
    /// # Errors
    /// `WrongKey`.
    pub fn prove(&self, key: &MacKey) -> Result<&Superblock> {
        if bytes_equal(&hmac_sha256(key.0.as_bytes(), &self.covered), &self.mac) {
            return Ok(&self.superblock);
        }
        Err(Error::new(ErrorKind::WrongKey, "wrong key or damaged data"))
    }
}

/// A slot as it was read.
enum Slot {
    /// No superblock.
    Absent,
    /// One that was not written to its end, or has gone bad.
    Torn,
    /// One that is whole.
    Whole(Box<Unproven>),
}

impl Slot {
    /// `None`: the file ends before it does. What is whole and says what cannot be is no reason to believe the other slot: errors are as
    /// of [`Unproven::parse`].
    fn read(slot: Option<&[u8; SLOT_BYTES]>) -> Result<Self> {
        let Some(slot) = slot.filter(|slot| slot[..16] == MAGIC) else { return Ok(Self::Absent) };
        if checksum(&slot[..CHECKSUM_AT]) != slot[CHECKSUM_AT..BYTES] {
            return Ok(Self::Torn);
        }
        Unproven::parse(slot).map(|whole| Self::Whole(Box::new(whole)))
    }
}

impl Slots {
    /// Which of the two is in force. `slots`: the first bytes of the file, as many as it has up to both slots.
    ///
    /// # Errors
    /// `Unsupported`: no journal, or of another version. `Damaged`: neither superblock is whole, one says what none can, or the two are
    /// not of one journal.
    pub fn read(slots: &[u8]) -> Result<Self> {
        // The bytes of the very first write may be lost behind the length it gave the file; nothing else was written before.
        if slots.len() <= SLOT_BYTES && slots.iter().all(|&byte| byte == 0) {
            return Ok(Self::Empty);
        }
        // Or bytes behind the superblock, which are zeros.
        let mut first = [0; SLOT_BYTES];
        let known = slots.len().min(SLOT_BYTES);
        first[..known].copy_from_slice(&slots[..known]);
        let second = slots.get(SLOT_BYTES..).and_then(|rest| rest.first_chunk());
        match (Slot::read(Some(&first))?, Slot::read(second)?) {
            (Slot::Whole(one), Slot::Whole(other)) => {
                let ordered = one.superblock.sequence >= other.superblock.sequence;
                let (newer, older) = if ordered { (one, other) } else { (other, one) };
                let behind = newer.superblock.sequence - older.superblock.sequence;
                let alike = newer.superblock.fixed == older.superblock.fixed;
                // Only the first slot ever says *preparing*, and only while there is no second one.
                let begins_anew = newer.superblock.state == State::Preparing;
                if !alike || begins_anew || behind > 1 || (behind == 0 && newer != older) {
                    return Err(Error::new(ErrorKind::Damaged, "the two superblocks are not of one journal"));
                }
                Ok(Self::Whole(newer, Some(older)))
            }
            (Slot::Whole(whole), _) | (_, Slot::Whole(whole)) => Ok(Self::Whole(whole, None)),
            (Slot::Torn, _) | (_, Slot::Torn) => {
                Err(Error::new(ErrorKind::Damaged, "neither superblock of the journal is whole"))
            }
            (Slot::Absent, Slot::Absent) => Err(no_journal()),
        }
    }
}

fn no_journal() -> Error {
    Error::new(ErrorKind::Unsupported, "no journal of a re-encryption")
        .hint("a new one begins with an empty file")
}

fn checksum(bytes: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    Hash::Sha256.digest(&[bytes], &mut out);
    out
}

/// The hash of this name, written exactly as we do.
fn hash_named(name: &[u8; 16]) -> Option<Hash> {
    Hash::ALL.into_iter().find(|hash| {
        let (text, zeros) = name.split_at(hash.name().len());
        text == hash.name().as_bytes() && zeros.iter().all(|&byte| byte == 0)
    })
}

fn side(take: &mut Reader<'_>) -> Result<Raw> {
    let (key_bytes, data_unit, tweak, large) = (take.u32(), take.u32(), take.u32(), take.u32());
    let tweak_offset = take.u64();
    let tweak = match tweak {
        1 => TweakKind::Plain64,
        2 => TweakKind::Plain,
        other => return Err(Error::new(ErrorKind::Damaged, format!("tweak of kind {other}: there is none"))),
    };
    if large > 1 {
        return Err(Error::new(ErrorKind::Damaged, "tweaks are counted in units or in sectors"));
    }
    Ok(Raw { key_bytes, data_unit, tweak, large_tweak: large == 1, tweak_offset })
}

/// Big-endian fields one after the other.
struct Writer<'a>(&'a mut [u8], usize);

impl Writer<'_> {
    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0[self.1..self.1 + bytes.len()].copy_from_slice(bytes);
        self.1 += bytes.len();
        self
    }

    fn u32(&mut self, number: u32) -> &mut Self {
        self.bytes(&number.to_be_bytes())
    }

    fn u64(&mut self, number: u64) -> &mut Self {
        self.bytes(&number.to_be_bytes())
    }
}

/// As [`Writer`]; a superblock is long enough for all of them.
struct Reader<'a>(&'a [u8; SLOT_BYTES], usize);

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> [u8; N] {
        let bytes = self.0[self.1..self.1 + N].try_into().expect("its length");
        self.1 += N;
        bytes
    }

    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.array())
    }

    fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.array())
    }
}

#[cfg(test)]
mod tests;
