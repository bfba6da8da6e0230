//! From the request to devices and secrets: what can be checked before the first header is read.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use proto::reencrypt::{Format, Mode, RawPair, Request, Resilience};
use proto::{Submit, Tuning};

use crate::backend::device::{Device, Purpose};
use crate::crypto::{Kernel, Secret};
use crate::error::{Error, ErrorKind, Result};
use crate::format::luks2::reencrypt as format;
use crate::format::raw;
use crate::job::Owner;
use crate::job::commit::Names;
use crate::job::prepare::{Means, width};
use crate::key::Descriptors;
use crate::limits;
use crate::volume::device;
use crate::volume::held::{Held, Served};

/// Percent of the time that a re-encryption takes while clients use the volume, unless asked otherwise.
const BACKGROUND_SHARE: u32 = 50;
/// The way out where an export is in the way.
const STOP: &str = "stop its export first: cryptctl export stop";

/// A checked request, ready to run.
pub struct Prepared {
    /// Which way.
    pub mode: Mode,
    /// What kind of volume.
    pub format: Format,
    /// The data.
    pub data: Arc<Device>,
    /// A detached header, or the sidecar journal.
    pub beside: Option<Arc<Device>>,
    /// How a new detached header becomes visible.
    pub names: Option<Names>,
    /// Secrets that open the volume as it is.
    pub keys: Vec<Secret>,
    /// See the wire.
    pub new_key: Option<Secret>,
    /// Only go on with one that was begun.
    pub resume_only: bool,
    /// Write nothing.
    pub dry_run: bool,
    /// As asked for.
    pub resilience: Option<Resilience>,
    /// Most bytes of a hotzone, if asked for.
    pub hotzone_bytes: Option<u64>,
    /// Read everything once more in the end.
    pub verify: bool,
    /// Percent of the time that it takes while clients use the volume.
    pub background_share: u32,
    /// Most bytes per second, as asked for when it was submitted.
    pub rate: Option<u64>,
    /// The kernel of its ciphers.
    pub kernel: Kernel,
    /// Workers that may take part.
    pub workers_max: usize,
    /// Most reads, and most writes, in flight on each.
    pub depth: u32,
    /// Largest chunk, bytes: a power of two.
    pub chunk_bytes: u32,
    /// May transfers bypass the page cache?
    pub direct: bool,
    /// The export it runs beside: then `direct` does not count, but what that one does.
    pub beside_export: Option<Arc<Served>>,
    /// Nobody else re-encrypts it as long as these live.
    _held: Vec<Held>,
    /// Locks of other programs.
    _locks: Vec<OwnedFd>,
}

impl Prepared {
    /// The device with the header.
    #[must_use]
    pub fn header(&self) -> &Arc<Device> {
        self.beside.as_ref().unwrap_or(&self.data)
    }

    /// Bytes of the data device.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        self.data.size().unwrap_or(0)
    }

    /// What the data device writes whole or not at all, bytes: its logical block, also under a file. A filesystem's blocks are larger
    /// (and what cryptsetup goes by), but a power cut knows nothing of them.
    #[must_use]
    pub fn block_bytes(&self) -> u32 {
        self.data.direct_alignment().unwrap_or(512).max(512)
    }

    /// What a power cut leaves whole on the data device, or on that under a file, as far as it says so; else its logical block.
    #[must_use]
    pub fn atomic_bytes(&self) -> u32 {
        self.data.physical_block_bytes().unwrap_or(0).max(self.block_bytes())
    }

    /// As the format has it.
    #[must_use]
    pub fn mode(&self) -> format::Mode {
        match self.mode {
            Mode::Reencrypt => format::Mode::Reencrypt,
            Mode::Encrypt => format::Mode::Encrypt,
            Mode::Decrypt => format::Mode::Decrypt,
        }
    }
}

fn invalid<T>(what: &str) -> Result<T> {
    Err(Error::new(ErrorKind::Invalid, what))
}

/// Check a `reencrypt` request.
///
/// # Errors
/// Whatever is wrong with it; nothing was changed. `Conflict`: somebody else is at the volume.
pub fn prepare(means: Means, owner: &Owner, submit: Submit, descriptors: Vec<OwnedFd>) -> Result<Prepared> {
    let Submit {
        source,
        sink,
        volume,
        bench,
        reencrypt,
        tuning,
        bytes_per_second,
        remotes,
        background_share,
        ..
    } = submit;
    let Some(request) = reencrypt else { return invalid("the request has no reencrypt") };
    if source.is_some() || sink.is_some() || volume.is_some() || bench.is_some() {
        return invalid("reencrypt has one volume, and neither source nor sink");
    }
    if bytes_per_second == Some(0) {
        return invalid("a rate of 0 bytes per second never ends; pause the job instead");
    }
    let background_share = background_share.unwrap_or(BACKGROUND_SHARE);
    if !(1..=100).contains(&background_share) {
        return invalid(&format!("a background share of {background_share} percent: it is from 1 to 100"));
    }
    let mut descriptors = Descriptors::new(descriptors);
    let open = |descriptors: &mut Descriptors, file: &proto::luks::File, what: &str| -> Result<Arc<Device>> {
        let purpose = Purpose { read: true, write: !request.dry_run, stream: false };
        let device = device::open(descriptors, &remotes, file.fd, (what, &file.name), purpose)?;
        // What is written twice, in an order that a power cut must not change, needs a server that can say what is durable.
        if !request.dry_run && device.remote().is_some_and(|volume| !volume.can_flush()) {
            let what = "the NBD server cannot flush: nothing would be safe from a power cut in the middle";
            return Err(Error::new(ErrorKind::Unsupported, what)
                .at(device.name())
                .hint("have it served with flush, or re-encrypt it where it lies"));
        }
        Ok(Arc::new(device))
    };
    let data = open(&mut descriptors, &request.volume, "volume")?;
    let (beside, commit) = match &request.format {
        Format::Luks(luks) => match &luks.header {
            Some(header) => (Some(open(&mut descriptors, header, "header")?), luks.commit.as_ref()),
            None => (None, luks.commit.as_ref()),
        },
        Format::Raw(pair) => (Some(open(&mut descriptors, &pair.journal, "journal")?), None),
    };
    if let Some(beside) = &beside
        && beside.is_same_as(&data)
    {
        return Err(Error::new(ErrorKind::Conflict, "the volume and what is beside it are the same file")
            .at(beside.name()));
    }
    let names = match (commit, &beside) {
        (None, _) => None,
        (Some(commit), Some(header)) if request.mode == Mode::Encrypt && !request.dry_run => {
            let directory = descriptors.take(commit.dir_fd, "directory of the header")?;
            Some(Names::new(directory, commit, &**header.file(), owner)?)
        }
        (Some(_), _) => return invalid("only encrypt makes a new header"),
    };
    let mut secrets = Vec::with_capacity(request.keys.len());
    for &key in &request.keys {
        secrets.push(descriptors.secret(key, "key")?);
    }
    let new_key = request.new_key.map(|fd| descriptors.secret(fd, "new key")).transpose()?;
    let locks = request.lock_fds.iter().map(|&fd| descriptors.take(fd, "lock"));
    let locks = locks.collect::<Result<Vec<_>>>()?;
    descriptors.finish()?;
    check_keys(&request, &secrets, new_key.as_ref())?;
    // A dry run is in nobody's way, nor is anybody in its.
    let held = if request.dry_run {
        Vec::new()
    } else {
        let volume = Held::to_rewrite(&data)?;
        let beside = beside.as_ref().map(Held::to_accompany).transpose()?;
        [Some(volume), beside].into_iter().flatten().collect()
    };
    let beside_export = held.first().and_then(Held::beside).cloned();
    if request.shared && beside_export.is_none() && !request.dry_run {
        let what = "the volume is in use (mounted, or held by another program)";
        return Err(Error::new(ErrorKind::Conflict, what).at(data.name()).hint(format!(
            "unmount it and close its mapping first, `lsblk {}` tells which; a volume in use is re-encrypted by `cryptsetup \
             reencrypt`, or exported by this daemon",
            data.name()
        )));
    }
    if beside_export.is_some() {
        // What either has had acknowledged, and what of it is durable, the other's connections do not know.
        if data.remote().is_some() {
            let what = "the volume is exported, and one on an NBD server is not re-encrypted meanwhile";
            return Err(Error::new(ErrorKind::Unsupported, what).at(data.name()).hint(STOP));
        }
        check_online(&request).map_err(|error| error.at(data.name()))?;
    }
    check_tuning(&request, &tuning)?;
    let (workers_max, depth) = width(&data, &data, &tuning, means)?;
    let Request { mode, format, resume_only, dry_run, resilience, hotzone_bytes, verify, .. } = *request;
    Ok(Prepared {
        mode,
        format,
        beside,
        names,
        keys: secrets,
        new_key,
        resume_only,
        dry_run,
        resilience,
        hotzone_bytes,
        verify,
        background_share,
        rate: bytes_per_second,
        kernel: means.kernel,
        workers_max,
        depth,
        chunk_bytes: chunk_bytes(&data, &tuning, means)?,
        direct: tuning.direct != Some(false),
        data,
        beside_export,
        _held: held,
        _locks: locks,
    })
}

/// Most operations in flight that may be asked for, on each worker.
const DEPTH_MAX: u32 = 4096;
/// Most bytes at the volume's end that a header may be given: half of them are moved in one step, which memory holds whole.
const REDUCE_MAX: u64 = 128 << 20;

/// What would take more memory than there is for it is refused before anything is written.
fn check_tuning(request: &Request, tuning: &Tuning) -> Result<()> {
    if let Some(depth) = tuning.queue_depth.filter(|depth| *depth > DEPTH_MAX) {
        return invalid(&format!("a queue depth of {depth}: {DEPTH_MAX} is the most"));
    }
    match &request.format {
        Format::Luks(luks)
            if !request.resume_only && luks.reduce_bytes.is_some_and(|bytes| bytes > REDUCE_MAX) =>
        {
            let what = format!(
                "the device is to be reduced by {} bytes, and {REDUCE_MAX} are the most: half of them move in one step, in memory",
                luks.reduce_bytes.unwrap_or(0)
            );
            Err(Error::new(ErrorKind::Limit, what).hint("32M is enough for a header and its keyslots"))
        }
        _ => Ok(()),
    }
}

/// What cannot be done while clients read and write the volume.
fn check_online(request: &Request) -> Result<()> {
    let refuse = |what: &str, hint: &str| Err(Error::new(ErrorKind::Unsupported, what).hint(hint));
    match (&request.format, request.mode) {
        (_, Mode::Encrypt | Mode::Decrypt) => {
            return refuse("the volume is exported, and only its key can be changed meanwhile", STOP);
        }
        // The journal knows the volume it belongs to by bytes that clients would change.
        (Format::Raw(_), Mode::Reencrypt) => {
            return refuse(
                "the volume is exported, and one without a header is not re-encrypted meanwhile",
                STOP,
            );
        }
        (Format::Luks(_), Mode::Reencrypt) => {}
    }
    match request.resilience {
        Some(Resilience::None) => refuse(
            "the volume is exported, and without protection all of it would be out of reach until the end",
            "use --resilience checksum or journal, or stop its export first",
        ),
        _ if request.verify => refuse(
            "the volume is exported: what clients write meanwhile would be taken for damage",
            "leave --verify out, or stop its export first",
        ),
        _ => Ok(()),
    }
}

fn check_keys(request: &Request, keys: &[Secret], new_key: Option<&Secret>) -> Result<()> {
    match (&request.format, request.mode) {
        (Format::Raw(pair), Mode::Reencrypt) => check_raw(pair, keys, new_key),
        (Format::Raw(_), _) => {
            invalid("a volume without a header is only re-encrypted from one key to another")
        }
        (Format::Luks(_), Mode::Encrypt) if new_key.is_none() && keys.is_empty() => {
            invalid("the request has no new_key, and an encrypted volume needs a passphrase")
        }
        (Format::Luks(_), Mode::Decrypt) if new_key.is_some() => {
            invalid("plain data has no key, and the request has a new_key")
        }
        // What is left of one that is all but over is swept without any.
        (Format::Luks(_), Mode::Reencrypt | Mode::Decrypt) if keys.is_empty() && !request.resume_only => {
            invalid("the request has no keys that open the volume as it is")
        }
        (Format::Luks(_), _) => Ok(()),
    }
}

fn check_raw(pair: &RawPair, keys: &[Secret], new_key: Option<&Secret>) -> Result<()> {
    let ([old], Some(new)) = (keys, new_key) else {
        return invalid("a volume without a header is re-encrypted from one key to another: both are needed");
    };
    for (side, key) in [(&pair.old, old), (&pair.new, new)] {
        raw::layout(side)?;
        if key.len() != side.key_bytes as usize {
            return invalid(&format!(
                "a volume key has the wrong length: {} bytes are needed",
                side.key_bytes
            ));
        }
    }
    Ok(())
}

/// Largest chunk: a power of two, so that hotzones of any size can be made of it or its halves.
fn chunk_bytes(data: &Device, tuning: &Tuning, means: Means) -> Result<u32> {
    let most = means.buffer_bytes.min(limits::BUFFER_BYTES_MAX);
    match tuning.chunk_bytes {
        Some(chunk) if !chunk.is_power_of_two() || chunk < 4096 || chunk > most => {
            invalid(&format!("chunk of {chunk} bytes: it must be a power of two from 4096 to {most}"))
        }
        Some(chunk) => Ok(chunk),
        None => Ok(data.hints().chunk_bytes.min(most)),
    }
}
