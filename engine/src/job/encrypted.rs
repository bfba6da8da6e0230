//! The encrypted side of a job: what its header says, and how the volume key is had.
//!
//! | volume | known when the request is checked | known when the job runs |
//! |---|---|---|
//! | raw | everything | |
//! | LUKS, in a file or device | header, sizes | the key, after the passphrase is hashed |
//! | LUKS, in a stream | | header and key |
//! | LUKS, new | sizes | the key, and the header to write |
//!
//! Hashing takes seconds by design, so the job's own thread does it, where it can be watched and cancelled.

use std::sync::Arc;

use crate::backend::blocking::Blocking;
use crate::backend::device::{Device, Nature};
use crate::crypto::{Kernel, Secret};
use crate::error::{Error, ErrorKind, Result};
use crate::job::checkpoint::Checkpoint;
use crate::job::commit::Names;
use crate::job::geometry::Geometry;
use crate::job::state::Job;
use crate::pipeline::slot::Side;
use crate::pipeline::transfer::{End, Transfer, UNIT_BYTES_MAX};
use crate::volume::create::{self, NewHeader, Place};
use crate::volume::{Header, capture, keep, store, unlock};

/// What must still happen before the workers can begin, and after they have ended.
pub enum Encrypted {
    /// Nothing: the transfer has its segments.
    Raw,
    /// Open an existing volume.
    Open(Box<Open>),
    /// Make a new one.
    New(Box<New>),
}

/// An existing volume to be opened.
pub struct Open {
    /// The detached header.
    pub detached: Option<Arc<Device>>,
    /// Where the data lay when the request was checked; of a stream, nothing yet.
    pub seen: Option<Geometry>,
    /// Only this keyslot.
    pub keyslot: Option<u32>,
    /// What `secret` is.
    pub kind: proto::luks::Secret,
    /// It; taken when it is used.
    pub secret: Option<Secret>,
    /// Bytes of plaintext, once the header is read, if it says so itself.
    pub fixed_bytes: Option<u64>,
}

/// A new volume to be made.
pub struct New {
    /// As asked for.
    pub wish: proto::luks::New,
    /// What is known about where it goes.
    pub place: Place,
    /// Its first passphrase; taken when it is used.
    pub passphrase: Option<Secret>,
    /// The volume key, if the caller brings one.
    pub volume_key: Option<Secret>,
    /// Where the header goes if not in front of the data, and how it becomes visible.
    pub detached: Option<(Arc<Device>, Option<Names>)>,
    /// It, from when it was made until it is written.
    pub made: Option<NewHeader>,
}

/// The header's device, read and written by offset in the way its descriptor allows.
fn header_device(detached: Option<&Arc<Device>>, end: &End) -> Result<Blocking> {
    match detached {
        Some(device) => Blocking::open(device.file().clone(), device.name(), 1),
        None => Blocking::open(end.file.clone(), &end.name, end.align),
    }
}

/// Where the data of an existing volume lies, by its header on a device that can be read by offset, with writers of it kept out; and
/// the volume's UUID.
///
/// # Errors
/// As [`Header::load`] and [`Header::data_areas`]; `Conflict`: somebody is writing it.
pub fn look(device: &Device, detached: bool) -> Result<(Geometry, String)> {
    device.disable_direct();
    let mut blocking = Blocking::open(device.file().clone(), device.name(), 1)?;
    let lock = store::lock(device.file(), device.name(), false)?;
    let header = Header::load(&mut blocking)?;
    drop(lock);
    let geometry = geometry_of(&header, detached).map_err(|error| error.at(device.name()))?;
    Ok((geometry, header.uuid().to_owned()))
}

/// The UUID of the header that `device` itself begins with, if it has one that can be read.
pub fn own_uuid(device: &Device) -> Option<String> {
    let mut blocking =
        Blocking::open(device.file().clone(), device.name(), device.direct_alignment().unwrap_or(1)).ok()?;
    Header::load(&mut blocking).ok().map(|header| header.uuid().to_owned())
}

/// Where the data lies by this header; `detached`: it is not in front of the data.
///
/// # Errors
/// As [`Header::data_areas`] and [`Geometry::new`]; `Invalid`: a detached header that is taken for the volume.
pub fn geometry_of(header: &Header, detached: bool) -> Result<Geometry> {
    let geometry = header.data_areas().and_then(Geometry::new).map_err(Error::as_damage)?;
    if detached {
        return Ok(geometry);
    }
    geometry.behind(match header {
        Header::Luks1(header) => header.backup_bytes(),
        Header::Luks2(loaded) => loaded.header.backup_bytes(),
    })
}

impl Encrypted {
    /// Get the key, and tell the transfer its segments. For a new volume in a stream: write the header.
    ///
    /// # Errors
    /// `WrongKey`, or whatever is wrong with header, devices or memory; `Cancelled`.
    pub fn begin(
        &mut self,
        job: &Job,
        transfer: &Transfer,
        kernel: Kernel,
        ends: [&Device; 2],
        checkpoint: Option<&mut Checkpoint>,
    ) -> Result<()> {
        let side = encrypted_of(transfer, ends);
        match self {
            Self::Raw => Ok(()),
            Self::Open(open) => open.begin(job, transfer, kernel, side, checkpoint),
            Self::New(new) => new.begin(job, transfer, kernel, side, checkpoint),
        }
    }

    /// Where a new detached header goes.
    #[must_use]
    pub fn new_header(&self) -> Option<&Device> {
        match self {
            Self::New(new) => new.detached.as_ref().map(|(device, _)| &**device),
            Self::Raw | Self::Open(_) => None,
        }
    }

    /// Make the partial name of a new detached header durable.
    ///
    /// # Errors
    /// The flush failed.
    pub fn sync_name(&self) -> Result<()> {
        match self {
            Self::New(new) => match &new.detached {
                Some((_, Some(names))) => names.sync(),
                _ => Ok(()),
            },
            Self::Raw | Self::Open(_) => Ok(()),
        }
    }

    /// Bytes of plaintext that the header of an open volume says there are.
    #[must_use]
    pub fn fixed_bytes(&self) -> Option<u64> {
        match self {
            Self::Open(open) => open.fixed_bytes,
            Self::Raw | Self::New(_) => None,
        }
    }

    /// All data is durable: write what makes it a volume, durably.
    ///
    /// # Errors
    /// Of the device.
    pub fn finish(&mut self, transfer: &Transfer) -> Result<()> {
        let Self::New(new) = self else { return Ok(()) };
        let Some(header) = new.made.take() else { return Ok(()) };
        let detached = new.detached.as_ref().map(|(device, _)| device);
        header.write(&mut header_device(detached, &transfer.sink)?)?;
        detached.map_or(Ok(()), |device| device.sync_all())
    }

    /// The data has its name: give a detached header its own. Whatever becomes of that, it is not removed any more: the data
    /// is nothing without it.
    ///
    /// # Errors
    /// It could not be renamed; says where it is.
    pub fn commit(&mut self) -> Result<()> {
        let Self::New(new) = self else { return Ok(()) };
        let Some((device, Some(names))) = new.detached.take() else { return Ok(()) };
        names.commit(&**device.file()).map_err(|error| {
            let what =
                format!("the data is whole and in place, its header still has its partial name ({names:?})");
            Error::new(error.kind(), what).at(device.name()).because(error)
        })
    }

    /// The job did not succeed: a new detached header goes.
    pub fn discard(&self) {
        if let Self::New(new) = self
            && let Some((device, Some(names))) = &new.detached
            && let Some(left) = names.undo(&**device.file())
        {
            tracing::info!("partial header left behind: {left}");
        }
    }
}

/// What stands on the side that holds ciphertext, of what stands on both.
fn encrypted_of<T>(transfer: &Transfer, [source, sink]: [T; 2]) -> T {
    match transfer.work.encrypted_side() {
        Side::Source => source,
        Side::Sink => sink,
    }
}

impl Open {
    fn begin(
        &mut self,
        job: &Job,
        transfer: &Transfer,
        kernel: Kernel,
        side: &Device,
        checkpoint: Option<&mut Checkpoint>,
    ) -> Result<()> {
        let give_up = || job.is_cancelled();
        let mut take = |into: &mut [u8]| side.read_in_order(into, &give_up);
        let (mut device, header, taken) = if let (None, true) = (&self.detached, side.is_stream()) {
            let captured = capture::capture(side.name(), &mut take)?;
            (captured.device, captured.header, captured.bytes)
        } else {
            let mut device = header_device(
                self.detached.as_ref(),
                encrypted_of(transfer, [&transfer.source, &transfer.sink]),
            )?;
            let file = self.detached.as_deref().unwrap_or(side).file();
            let lock = store::lock(file, device.name(), false)?;
            let header = Header::load(&mut device)?;
            drop(lock);
            (device, header, 0)
        };
        let geometry =
            geometry_of(&header, self.detached.is_some()).map_err(|error| error.at(device.name()))?;
        if self.seen.as_ref().is_some_and(|seen| *seen != geometry) {
            let what = "the header was changed while the job waited";
            return Err(Error::new(ErrorKind::Conflict, what).at(device.name()));
        }
        self.fixed_bytes = geometry.fixed_bytes();
        job.wait_while_paused()?;
        let secret = self.secret.take().expect("a job begins once");
        let unlocked = match self.kind {
            proto::luks::Secret::Passphrase => {
                unlock::with_passphrase(&mut device, &header, &secret, self.keyslot, &give_up)
            }
            proto::luks::Secret::VolumeKey => unlock::with_volume_key(&header, secret),
        }?;
        if let Some(keyslot) = unlocked.keyslot {
            tracing::info!("job {} opened keyslot {keyslot}", job.id);
        }
        if let Some(checkpoint) = checkpoint {
            checkpoint.know_key(&unlocked.key)?;
        }
        if transfer.is_verify()
            && let Some(has) = self.fixed_bytes
        {
            match transfer.plan.end() {
                Some(total) if total > has => transfer.differs_at(has),
                // What a stream has beyond it is asked in the end.
                _ => transfer.plan.end_at(has),
            }
        }
        if side.is_stream() {
            self.be_in_order(&geometry, transfer, side, taken, &mut take)?;
        }
        set_segments(transfer, &geometry, kernel, &unlocked.key)
    }

    /// A stream's data is read in order, from the end of the header on.
    fn be_in_order(
        &self,
        geometry: &Geometry,
        transfer: &Transfer,
        side: &Device,
        taken: u64,
        take: &mut dyn FnMut(&mut [u8]) -> Result<usize>,
    ) -> Result<()> {
        let other_align = transfer.source.align.max(transfer.sink.align);
        if !geometry.is_in_order() || !geometry.seams_aligned(other_align.max(UNIT_BYTES_MAX).into()) {
            let what = "the volume's data areas cannot be read in order";
            return Err(Error::new(ErrorKind::Unsupported, what)
                .at(side.name())
                .hint("pass it as a file or device instead of a stream"));
        }
        let rest = geometry.offset().checked_sub(taken).expect("the data lies behind the header");
        capture::skip(side.name(), rest, take)?;
        if let Some(total) = geometry.fixed_bytes() {
            transfer.plan.end_at(total);
        }
        Ok(())
    }
}

impl New {
    fn begin(
        &mut self,
        job: &Job,
        transfer: &Transfer,
        kernel: Kernel,
        side: &Device,
        mut checkpoint: Option<&mut Checkpoint>,
    ) -> Result<()> {
        let passphrase = self.passphrase.take().expect("a job begins once");
        job.wait_while_paused()?;
        let give_up = || job.is_cancelled();
        let mut key = self.volume_key.take();
        let resumed = checkpoint.as_deref().filter(|checkpoint| checkpoint.is_resumed());
        let is_resumed = resumed.is_some();
        let header = match resumed {
            None => create::make_unless(&self.wish, &self.place, &passphrase, key.take(), &give_up)?,
            Some(checkpoint) => {
                let (kept, name) = (checkpoint.header(), checkpoint.name());
                keep::open(kept, name, &passphrase, key.as_ref(), &give_up)?
            }
        };
        drop((passphrase, key));
        if let Some(checkpoint) = &mut checkpoint {
            checkpoint.know_key(&header.key)?;
            if !is_resumed {
                checkpoint.keep_header(keep::to_bytes(&header)?);
            } else if header.data != create::plan(&self.wish, &self.place)?.data {
                let what = "the kept header is of another volume";
                return Err(Error::new(ErrorKind::Damaged, what).at(checkpoint.name()));
            }
        }
        job.wait_while_paused()?;
        let geometry = Geometry::whole(header.data);
        set_segments(transfer, &geometry, kernel, &header.key)?;
        let detached = self.detached.as_ref().map(|(device, _)| device);
        let mut put = |piece: &[u8]| side.write_in_order(piece, &give_up);
        // Nothing can be put in front of a stream later.
        if side.is_stream() && detached.is_none() {
            return header.stream(&mut put);
        }
        if side.is_stream() {
            fill(geometry.offset(), &mut put)?;
        }
        if is_resumed {
            // What follows was done, durably, before there was a checkpoint.
            self.made = Some(header);
            return Ok(());
        }
        // Before any data is overwritten, see `NewHeader::clear`. A file of ours is empty.
        let on_device = detached.map_or(side.nature(), |device| device.nature()) == Nature::Block;
        if on_device {
            header.clear(&mut header_device(detached, &transfer.sink)?)?;
        }
        if detached.is_some() && side.nature() == Nature::Block {
            create::clear_old(&mut header_device(None, &transfer.sink)?)?;
        }
        self.made = Some(header);
        Ok(())
    }
}

/// What lies in front of the data of a stream whose header is elsewhere.
fn fill(mut bytes: u64, put: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let zeros = [0; 4096];
    while bytes > 0 {
        let len = usize::try_from(bytes).unwrap_or(zeros.len()).min(zeros.len());
        put(&zeros[..len])?;
        bytes -= len as u64;
    }
    Ok(())
}

/// Ciphers for all areas of a volume under one key.
fn set_segments(transfer: &Transfer, geometry: &Geometry, kernel: Kernel, key: &Secret) -> Result<()> {
    let segments = geometry.segments(kernel, key)?;
    transfer.plan.cut_at(geometry.seams());
    transfer.set_segments(segments);
    Ok(())
}
