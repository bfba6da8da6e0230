//! A request of the wire carried out.
//!
//! Here descriptors become devices and secrets, all of them before anything is done: a request that names a descriptor that was not
//! sent, or fewer than were sent, changes nothing. The header file is locked (shared by what only reads, exclusive otherwise)
//! while its header is read or written, but not while keys are derived: what derives keys locks for itself, the rest is
//! carried out under a lock taken here. The caller's lock file stays open, and so locked, for the whole operation.
//! Header I/O goes through the page cache: what other programs of this machine write is seen, and no alignment is asked.
//!
//! This module refuses to open names, to ask back, and to decide: what loses data needs the flag of the request that says so.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use proto::luks::{Done, File, New, NewFile, Operation, Reply, Request, Secret as Kind};
use proto::remote::Remote;

use crate::backend::blocking::Blocking;
use crate::backend::device::{Device, Nature, Purpose};
use crate::crypto::Secret;
use crate::error::{Error, ErrorKind, Result};
use crate::key::Descriptors;
use crate::volume::backup::{self, Backup};
use crate::volume::device;
use crate::volume::doctor::{self, Patient};
use crate::volume::keyslots::{self, GiveUp, Proof, stop};
use crate::volume::{Header, create, held, repair, store, tokens};

/// Whose filesystem rights commits are made with: the peer's.
pub struct Caller<'a> {
    /// Makes a new file visible or removes it (see `job::commit`); given by the control plane so that this module need not know it.
    pub commit: &'a dyn Fn(&proto::Commit, OwnedFd, &OwnedFd) -> Result<()>,
    /// The caller has gone away: asked between slow steps, never after the first write.
    pub give_up: &'a dyn Fn() -> bool,
}

/// Carry out one header operation. Blocks for seconds.
///
/// # Errors
/// Whatever is wrong. Then nothing that opens the volume was changed, but for a change of a passphrase whose second half failed:
/// that error says that the new one opens the volume already.
pub fn carry_out(request: Request, descriptors: Vec<OwnedFd>, caller: &Caller<'_>) -> Result<Reply> {
    let Request { volume, header, lock_fd, remotes, operation } = request;
    let mut sent = Descriptors::new(descriptors);
    let only_reads = only_reads(&operation);
    // Held, not looked at: the caller has locked it, and it stays locked until the last duplicate is closed.
    let lock_file = lock_fd.map(|index| sent.take(index, "lock file")).transpose()?;
    let mut open = |file: Option<File>| {
        file.map(|file| {
            let purpose = Purpose { read: true, write: !only_reads, stream: false };
            device::open(&mut sent, &remotes, file.fd, ("volume", &file.name), purpose)
        })
        .transpose()
    };
    let (volume, header) = (open(volume)?, open(header)?);
    if let (Some(volume), Some(header)) = (&volume, &header)
        && volume.is_same_as(header)
    {
        let what = "volume and detached header are the same file or device";
        return Err(Error::new(ErrorKind::Invalid, what).at(volume.name()));
    }
    let operation = Prepared::new(operation, &mut sent, &remotes)?;
    sent.finish()?;
    let place = Place { volume, header };
    let reply = if let Prepared::Format { new, target, key, volume_key } = operation {
        format(&place, &new, target, &key, volume_key, caller)
    } else {
        let held = match &operation {
            Prepared::Backup(_) | Prepared::Restore { .. } | Prepared::Plain(_) => {
                let target = place.header()?;
                Some(store::lock(Arc::clone(target.file()), target.name(), !only_reads)?)
            }
            // They derive keys, or measure how long that takes.
            _ => None,
        };
        let reply = run(&place, operation, caller);
        drop(held);
        reply
    };
    drop(lock_file);
    reply
}

/// What is served by a descriptor opened for reading, under a shared lock.
fn only_reads(operation: &Operation) -> bool {
    match operation {
        Operation::Dump {}
        | Operation::OpenTest { .. }
        | Operation::HeaderBackup { .. }
        | Operation::TokenList {}
        | Operation::Repair { dry_run: true }
        | Operation::Doctor { .. } => true,
        Operation::Format { .. }
        | Operation::AddKey { .. }
        | Operation::RemoveKey { .. }
        | Operation::ChangeKey { .. }
        | Operation::ConvertKdf { .. }
        | Operation::HeaderRestore { .. }
        | Operation::Erase { .. }
        | Operation::TokenAdd { .. }
        | Operation::TokenRemove { .. }
        | Operation::Repair { dry_run: false } => false,
    }
}

fn proof(sent: &mut Descriptors, index: u32, kind: Kind) -> Result<Proof> {
    let secret = sent.secret(index, "key")?;
    Ok(match kind {
        Kind::Passphrase => Proof::Passphrase(secret),
        Kind::VolumeKey => Proof::VolumeKey(secret),
    })
}

/// A new file: empty, and how it gets its name.
struct NewTarget {
    device: Device,
    commit: Option<(proto::Commit, OwnedFd)>,
}

impl NewTarget {
    fn new(file: NewFile, sent: &mut Descriptors, remotes: &[Remote]) -> Result<Self> {
        let purpose = Purpose { read: true, write: true, stream: false };
        let device = device::open(sent, remotes, file.fd, ("new file", &file.name), purpose)?;
        let commit = file
            .commit
            .map(|commit| {
                let directory = sent.take(commit.dir_fd, "directory of the new file")?;
                Ok::<_, Error>((commit, directory))
            })
            .transpose()?;
        Ok(Self { device, commit })
    }

    /// Nothing is ever written over.
    fn check_empty(&self) -> Result<()> {
        if self.device.nature() != Nature::File {
            let what = "only a regular file can be made anew";
            return Err(Error::new(ErrorKind::Invalid, what).at(self.device.name()));
        }
        if self.device.size() != Some(0) {
            return Err(Error::new(ErrorKind::Conflict, "the file is not empty").at(self.device.name()));
        }
        self.device.lock()
    }

    /// Everything is in it and durable: give it its name.
    fn commit(self, caller: &Caller<'_>) -> Result<()> {
        self.device.sync_all()?;
        match self.commit {
            Some((commit, directory)) => (caller.commit)(&commit, directory, self.device.file()),
            None => Ok(()),
        }
    }
}

/// An operation with its secrets and files in hand.
enum Prepared {
    Format {
        new: Box<New>,
        target: Option<NewTarget>,
        key: Secret,
        volume_key: Option<Secret>,
    },
    Backup(NewTarget),
    Restore {
        file: Device,
        allow_other: bool,
    },
    OpenTest {
        proof: Proof,
        keyslot: Option<u32>,
    },
    Add {
        proof: Proof,
        new: Secret,
        keyslot: Option<u32>,
        kdf: proto::luks::KdfWish,
    },
    Change {
        old: Secret,
        new: Option<Secret>,
        keyslot: Option<u32>,
        kdf: proto::luks::KdfWish,
    },
    Remove {
        key: Option<Secret>,
        keyslot: Option<u32>,
        allow_last: bool,
    },
    Doctor(Option<Secret>),
    /// One that needs nothing but the header.
    Plain(Operation),
}

impl Prepared {
    fn new(operation: Operation, sent: &mut Descriptors, remotes: &[Remote]) -> Result<Self> {
        Ok(match operation {
            Operation::Format { mut new, key_fd } => Self::Format {
                target: new.header.take().map(|file| NewTarget::new(file, sent, remotes)).transpose()?,
                key: sent.secret(key_fd, "key")?,
                volume_key: new.volume_key_fd.map(|fd| sent.secret(fd, "volume key")).transpose()?,
                new,
            },
            Operation::OpenTest { key_fd, secret, keyslot } => {
                Self::OpenTest { proof: proof(sent, key_fd, secret)?, keyslot }
            }
            Operation::AddKey { key_fd, secret, new_key_fd, keyslot, kdf } => Self::Add {
                proof: proof(sent, key_fd, secret)?,
                new: sent.secret(new_key_fd, "new key")?,
                keyslot,
                kdf,
            },
            Operation::RemoveKey { key_fd, keyslot, allow_last } => Self::Remove {
                key: key_fd.map(|fd| sent.secret(fd, "key")).transpose()?,
                keyslot,
                allow_last,
            },
            Operation::ChangeKey { key_fd, new_key_fd, keyslot, kdf } => Self::Change {
                old: sent.secret(key_fd, "key")?,
                new: Some(sent.secret(new_key_fd, "new key")?),
                keyslot,
                kdf,
            },
            Operation::ConvertKdf { key_fd, keyslot, kdf } => {
                Self::Change { old: sent.secret(key_fd, "key")?, new: None, keyslot, kdf }
            }
            Operation::HeaderBackup { file } => Self::Backup(NewTarget::new(file, sent, remotes)?),
            Operation::HeaderRestore { file, allow_other } => {
                let purpose = Purpose { read: true, write: false, stream: false };
                let file = device::open(sent, remotes, file.fd, ("backup", &file.name), purpose)?;
                Self::Restore { file, allow_other }
            }
            Operation::Doctor { key_fd } => {
                Self::Doctor(key_fd.map(|fd| sent.secret(fd, "key")).transpose()?)
            }
            plain => Self::Plain(plain),
        })
    }
}

/// The files of a request.
struct Place {
    volume: Option<Device>,
    header: Option<Device>,
}

impl Place {
    /// Where the header lies.
    fn header(&self) -> Result<&Device> {
        let device = self.header.as_ref().or(self.volume.as_ref());
        device.ok_or_else(|| Error::new(ErrorKind::Invalid, "the request names no volume and no header"))
    }
}

/// A device for ordered header I/O, through the page cache unless the kernel insists.
fn blocking(device: &Device) -> Result<Blocking> {
    let align = if device.disable_direct() { 1 } else { device.direct_alignment().unwrap_or(1) };
    Blocking::open(Arc::clone(device.file()), device.name(), align)
}

/// Bytes of a device that cannot grow.
fn capacity(device: &Device) -> Option<u64> {
    if device.nature() == Nature::Block { device.size() } else { None }
}

fn run(place: &Place, operation: Prepared, caller: &Caller<'_>) -> Result<Reply> {
    let give_up: GiveUp<'_> = caller.give_up;
    let target = place.header()?;
    let mut device = blocking(target)?;
    let device = &mut device;
    let done = match operation {
        Prepared::OpenTest { proof, keyslot } => keyslots::open_test(device, proof, keyslot, give_up)?,
        Prepared::Add { proof, new, keyslot, kdf } => {
            keyslots::add(device, proof, &new, keyslot, &kdf, give_up)?
        }
        Prepared::Change { old, new: Some(new), keyslot, kdf } => {
            keyslots::change(device, &old, &new, keyslot, &kdf, give_up)?
        }
        Prepared::Change { old, new: None, keyslot, kdf } => {
            keyslots::convert(device, &old, keyslot, &kdf, give_up)?
        }
        Prepared::Remove { key, keyslot, allow_last } => {
            keyslots::remove(device, key.as_ref(), keyslot, allow_last, give_up)?
        }
        Prepared::Backup(file) => save(device, target, file, caller)?,
        Prepared::Restore { file, allow_other } => {
            place.volume.iter().chain(&place.header).try_for_each(held::refuse_served)?;
            if file.is_same_as(target) {
                let what = "the backup and the volume are the same file or device";
                return Err(Error::new(ErrorKind::Invalid, what).at(file.name()));
            }
            let backup = Backup { file_bytes: file.size().unwrap_or(0), file: &mut blocking(&file)? };
            backup::restore(device, capacity(target), backup, allow_other, give_up)?
        }
        Prepared::Doctor(passphrase) => {
            let patient = Patient {
                header_bytes: target.size(),
                data_bytes: place.volume.as_ref().and_then(Device::size),
                is_detached: place.header.is_some(),
                passphrase: passphrase.as_ref(),
                now: now(),
            };
            return Ok(Reply::Doctor(Box::new(doctor::examine(device, &patient, give_up)?)));
        }
        Prepared::Plain(operation) => return plain(device, operation),
        Prepared::Format { .. } => {
            return Err(Error::new(ErrorKind::Internal, "a format has no header to lock"));
        }
    };
    Ok(Reply::Done(done))
}

fn plain(device: &mut Blocking, operation: Operation) -> Result<Reply> {
    let done = match operation {
        Operation::Dump {} => {
            let header = Header::load(device)?;
            return Ok(Reply::Dump(Box::new(header.dump())));
        }
        Operation::TokenList {} => return Ok(Reply::Tokens(tokens::list(device)?)),
        Operation::Repair { dry_run } => return Ok(Reply::Repaired(repair::repair(device, dry_run)?)),
        Operation::Erase { confirmed } => keyslots::erase(device, confirmed)?,
        Operation::TokenAdd { token, id, replace } => tokens::add(device, &token, id, replace)?,
        Operation::TokenRemove { id } => tokens::remove(device, id)?,
        _ => return Err(Error::new(ErrorKind::Internal, "an operation was prepared as another")),
    };
    Ok(Reply::Done(done))
}

fn save(device: &mut Blocking, target: &Device, file: NewTarget, caller: &Caller<'_>) -> Result<Done> {
    if file.device.is_same_as(target) {
        let what = "the backup and the volume are the same file or device";
        return Err(Error::new(ErrorKind::Invalid, what).at(file.device.name()));
    }
    file.check_empty()?;
    let done = backup::save(device, &mut blocking(&file.device)?)?;
    file.commit(caller)?;
    Ok(done)
}

fn format(
    place: &Place,
    new: &New,
    target: Option<NewTarget>,
    key: &Secret,
    volume_key: Option<Secret>,
    caller: &Caller<'_>,
) -> Result<Reply> {
    if place.header.is_some() {
        let what = "a format makes its detached header anew: name it in `new`, not beside it";
        return Err(Error::new(ErrorKind::Invalid, what));
    }
    let header = target.as_ref().map(|target| &target.device).or(place.volume.as_ref());
    let header = header.ok_or_else(|| Error::new(ErrorKind::Invalid, "the request names no volume"))?;
    let data = place.volume.as_ref();
    if data.is_some_and(|data| target.is_some() && data.is_same_as(header)) {
        let what = "volume and detached header are the same file or device";
        return Err(Error::new(ErrorKind::Invalid, what).at(header.name()));
    }
    // A volume in a file has the size it was given: its data ends there, and a format does not make it grow. A detached header
    // is as long as it needs to be.
    let header_capacity = if target.is_some() { capacity(header) } else { header.size() };
    let room = create::Place {
        detached: target.is_some(),
        header_capacity,
        data_capacity: data.and_then(Device::size),
        align: data.and_then(Device::direct_alignment).unwrap_or(512),
    };
    let free = || [Some(header), data].into_iter().flatten().try_for_each(held::refuse_served);
    free()?;
    create::plan(new, &room)?;
    // A file made for this header is empty; one that holds a header already is locked against those who use it, once all is
    // derived.
    let committed = target.as_ref().filter(|target| target.commit.is_some());
    if let Some(target) = committed {
        target.check_empty()?;
    }
    stop(caller.give_up)?;
    let made = create::make_unless(new, &room, key, volume_key, caller.give_up)?;
    stop(caller.give_up)?;
    let held = match committed {
        Some(_) => None,
        None => Some(store::lock(Arc::clone(header.file()), header.name(), true)?),
    };
    // Keys have been derived meanwhile.
    free()?;
    let mut device = blocking(header)?;
    made.clear(&mut device)?;
    made.write(&mut device)?;
    let done = Done {
        keyslot: Some(made.keyslot),
        uuid: made.header.uuid().to_owned(),
        warnings: made.warnings,
        ..Done::default()
    };
    drop(device);
    drop(held);
    if let Some(target) = target {
        target.commit(caller)?;
    }
    Ok(Reply::Done(done))
}

/// Seconds since 1970, for tokens that name a day.
fn now() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}
