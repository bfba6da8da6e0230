//! A copy that can be gone on with after a crash: how far it has come is kept in a file beside its sink.
//!
//! | file | its one purpose |
//! |---|---|
//! | `mod` | the checkpoint's file: opened, recognised, removed |
//! | `describe` | what the copy is a copy of, in lines that must be equal again |
//! | `keeper` | the order in which checkpoints are written, and what is checked before a copy goes on |
//! | `compare` | do source and sink still hold what they held? |
//!
//! What is detected, and what is not: another key, other parameters and another sink are found out always; a source *file*
//! that was changed by its size, its times of change and its inode number, which only a program that sets the clock back,
//! or a filesystem that keeps no times, can hide; a source *device* by its size and by samples of it: the first and the
//! last MiB and 32 blocks between. Of the sink the last 4 MiB before the watermark and 32 blocks before are compared with
//! what the source makes them now. A change of a few bytes elsewhere in a device is not found out: keep others from it.
//!
//! What it refuses: pipes, at either end, for what has passed them is gone.

mod compare;
mod describe;
mod keeper;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use proto::Action;

pub use describe::Facts;
pub use keeper::Keeper;

use crate::backend::blocking::Blocking;
use crate::backend::device::{Device, Nature, Purpose};
use crate::crypto::Secret;
use crate::crypto::keyed::Keyed;
use crate::error::{Error, ErrorKind, Result};
use crate::format::checkpoint::{
    DESCRIPTION_OFFSET, Description, SLOT_BYTES, Slot, digest, first_difference, slot_offsets,
};
use crate::job::Owner;
use crate::job::commit::Names;
use crate::key::Descriptors;
use crate::volume::random;

/// Between checkpoints, unless asked otherwise.
const INTERVAL: Duration = Duration::from_secs(3);

/// What a user does about a checkpoint that cannot be gone on with.
const ANEW: &str = "to begin anew, use --force in place of --resume";

/// The checkpoint of one copy.
pub struct Checkpoint {
    device: Arc<Device>,
    entry: Option<Names>,
    interval: Duration,
    /// What the copy is a copy of, as far as it is known yet.
    description: Description,
    key: Option<Keyed>,
    /// The slot to go on from.
    found: Option<Slot>,
    /// A whole slot is durable: what is there can be gone on with, so it stays.
    kept: bool,
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "checkpoint {} of {:?}", self.device.name(), self.found)
    }
}

impl Checkpoint {
    /// Take the file a request names, keep others from it, and read it if it is to be gone on with.
    ///
    /// # Errors
    /// `Invalid`: not for this kind of job, or not a file; `Conflict`: another job has it, or it is not empty; `NotFound`,
    /// `Damaged`: there is nothing in it to go on with.
    pub fn open(
        wish: &proto::Checkpoint,
        action: Action,
        [source, sink]: [&Device; 2],
        descriptors: &mut Descriptors,
        owner: &Owner,
    ) -> Result<Self> {
        let invalid = |what: &str| Error::new(ErrorKind::Invalid, what);
        if !matches!(action, Action::Encrypt | Action::Decrypt) {
            return Err(invalid("only encrypt and decrypt keep checkpoints"));
        }
        if let Some(stream) = [source, sink].into_iter().find(|end| end.is_stream()) {
            let what = "a stream cannot be gone on with, so it takes no checkpoint";
            return Err(invalid(what).at(stream.name()));
        }
        let purpose = Purpose { read: true, write: true, stream: false };
        let device = Device::from_fd(descriptors.take(wish.fd, "checkpoint")?, wish.name.clone(), purpose)?;
        if device.nature() != Nature::File {
            return Err(invalid("a checkpoint is a regular file").at(device.name()));
        }
        if device.is_same_as(source) || device.is_same_as(sink) {
            return Err(invalid("the checkpoint is the source or the sink").at(device.name()));
        }
        device.lock_as("another job is using the checkpoint")?;
        device.disable_direct();
        let entry = match &wish.entry {
            None => None,
            Some(entry) => {
                let directory = descriptors.take(entry.dir_fd, "directory of the checkpoint")?;
                Some(Names::of_one(directory, &entry.name, owner)?)
            }
        };
        let mut salt = [0; 16];
        random::fill(&mut salt)?;
        let description = Description {
            salt,
            key_check: [0; 32],
            source_sample: [0; 32],
            text: String::new(),
            header: Vec::new(),
        };
        let interval = wish.interval_ms.map_or(INTERVAL, |ms| Duration::from_millis(ms.max(1).into()));
        let device = Arc::new(device);
        let mut checkpoint =
            Self { device, entry, interval, description, key: None, found: None, kept: false };
        if wish.resume {
            checkpoint.find(sink)?;
        } else if checkpoint.device.size() != Some(0) {
            let what = "the checkpoint is not empty";
            return Err(Error::new(ErrorKind::Conflict, what).at(checkpoint.device.name()));
        }
        Ok(checkpoint)
    }

    /// Look for the last checkpoint. A copy that had not come to its first, and has an empty sink, begins anew.
    fn find(&mut self, sink: &Device) -> Result<()> {
        let name = self.device.name();
        let size = self.device.size().unwrap_or(0);
        let mut store = Blocking::open(self.device.file().clone(), name, 1)?;
        let mut slots: Vec<Slot> = Vec::new();
        for offset in slot_offsets() {
            let mut bytes = [0; SLOT_BYTES];
            if size >= offset + SLOT_BYTES as u64 {
                store.read(offset, &mut bytes)?;
                slots.extend(Slot::parse(&bytes).map_err(|error| error.at(name))?);
            }
        }
        slots.sort_by_key(|slot| std::cmp::Reverse(slot.sequence));
        for slot in slots {
            if size < DESCRIPTION_OFFSET + u64::from(slot.description_bytes) {
                continue;
            }
            let mut bytes = vec![0; slot.description_bytes as usize];
            store.read(DESCRIPTION_OFFSET, &mut bytes)?;
            if digest(&bytes) == slot.description_digest {
                if slot.watermark == 0 && sink.nature() != Nature::File {
                    // Nothing on the device tells whether it is the same, and what is on it was not asked for again.
                    let what =
                        "the copy had written nothing to the device yet: there is nothing to go on with";
                    return Err(Error::new(ErrorKind::NotFound, what).at(name).hint(ANEW));
                }
                self.description =
                    Description::parse(&bytes).map_err(|error| error.as_damage().at(name).hint(ANEW))?;
                self.found = Some(slot);
                self.kept = true;
                return Ok(());
            }
        }
        if sink.nature() == Nature::File && sink.size() == Some(0) {
            return self.device.set_len(0);
        }
        let (kind, what) = if size == 0 {
            (ErrorKind::NotFound, "the checkpoint is empty: there is nothing to go on with")
        } else {
            (ErrorKind::Damaged, "the checkpoint holds nothing whole to go on with")
        };
        Err(Error::new(kind, what).at(name).hint(ANEW))
    }

    /// A copy is gone on with, and not begun.
    #[must_use]
    pub fn is_resumed(&self) -> bool {
        self.found.is_some()
    }

    /// What is there can be gone on with.
    #[must_use]
    pub fn is_kept(&self) -> bool {
        self.kept
    }

    /// Say what the copy is a copy of; if it is gone on with, it must be a copy of the same.
    ///
    /// # Errors
    /// `Conflict`: it is another, or source or sink were changed.
    pub fn describe(&mut self, facts: &Facts<'_>) -> Result<()> {
        let text = facts.to_text()?;
        if self.is_resumed()
            && let Some((name, was, is)) = first_difference(&self.description.text, &text)
        {
            let at = match name {
                "source" => facts.source.name(),
                "sink" => facts.sink.name(),
                _ => self.device.name(),
            };
            let what = match name {
                "source" => format!("the source was changed since the copy was begun ({was} then, {is} now)"),
                "sink" => format!("the sink is not the one the copy was begun with ({was} then, {is} now)"),
                _ => format!("the checkpoint is of another copy: {name} was {was} then, and is {is} now"),
            };
            return Err(Error::new(ErrorKind::Conflict, what).at(at).hint(ANEW));
        }
        self.description.text = text;
        Ok(())
    }

    /// The volume key is known: what stands in the checkpoint for it follows.
    ///
    /// # Errors
    /// No memory for keys.
    pub fn know_key(&mut self, volume_key: &Secret) -> Result<()> {
        let keyed = Keyed::new(volume_key.as_bytes(), "cryptd checkpoint 1", &self.description.salt)?;
        self.key = Some(keyed);
        Ok(())
    }

    /// The header of a new volume, made for this copy or found again.
    #[must_use]
    pub fn header(&self) -> &[u8] {
        &self.description.header
    }

    /// A header was made: keep it.
    pub fn keep_header(&mut self, bytes: Vec<u8>) {
        self.description.header = bytes;
    }

    /// What the user calls it.
    #[must_use]
    pub fn name(&self) -> &str {
        self.device.name()
    }

    /// Does the checkpoint share its file with this device?
    #[must_use]
    pub fn is_same_as(&self, other: &Device) -> bool {
        self.device.is_same_as(other)
    }

    /// The copy is done, or did not begin: nothing is to be gone on with. A checkpoint that cannot be removed is no harm: the
    /// sink it is of has gone.
    pub fn remove(&self) {
        let removed = match &self.entry {
            Some(entry) => entry.undo(&**self.device.file()).is_none(),
            None => self.device.set_len(0).is_ok(),
        };
        if !removed {
            tracing::warn!("checkpoint left behind: {}", self.device.name());
        }
    }
}
