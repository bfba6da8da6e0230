//! From a request to a transfer: every check that can be made before the first write is made here, once.
//!
//! What comes out ([`Prepared`]) has devices of the right kind and size, a cipher, and a plan; running it can still meet
//! I/O errors, but no surprise about what was asked.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use proto::remote::Remote;
use proto::{Action, Format, Sink, Source, Submit, Tuning};

use crate::backend::device::{Device, Nature, Purpose};
use crate::backend::nbd;
use crate::crypto::spec::CipherSpec;
use crate::crypto::{Kernel, Layout, Secret, SectorCipher, VolumeKey, cipher};
use crate::error::{Error, ErrorKind, Result};
use crate::format::nbd::BASE_ALLOCATION;
use crate::format::raw;
use crate::job::Owner;
use crate::job::checkpoint::{Checkpoint, Facts};
use crate::job::commit::Names;
use crate::job::encrypted::{self, Encrypted};
use crate::job::geometry::Geometry;
use crate::job::marked;
use crate::job::run::ALL_OR_NONE;
use crate::key::Descriptors;
use crate::pipeline::crypt::{PAD, too_small, unaligned};
use crate::pipeline::plan::Plan;
use crate::pipeline::segment::Segments;
use crate::pipeline::slot::Side;
use crate::pipeline::transfer::{End, SinkRules, Transfer, TransferSpec, UNIT_BYTES_MAX, Work};
use crate::units::round_up;
use crate::volume::create::{self, Place};
use crate::volume::held::Held;
use crate::volume::{AreaCipher, DataArea, device};

/// Chunk where both ends are memory or pipes, bytes: what is read is crypted and written while it is still in the L2 cache.
pub(super) const CHUNK_BYTES_MEMORY: u32 = 256 << 10;
/// Most chunks in flight per worker, unless asked otherwise.
pub(super) const DEPTH: u32 = 8;
/// Chunks are multiples of this, so that every data unit and every device block divides them.
const CHUNK_STEP: u32 = 4096;

/// The pipeline as far as preparing needs to know it.
#[derive(Debug, Clone, Copy)]
pub struct Means {
    /// The kernel ciphers are built with.
    pub kernel: Kernel,
    /// Largest chunk.
    pub buffer_bytes: u32,
    /// Workers there are.
    pub workers: usize,
}

/// A checked job, ready to run.
pub struct Prepared {
    /// What the workers carry.
    pub transfer: Arc<Transfer>,
    /// Workers that may take part.
    pub workers_max: usize,
    /// Where it comes from.
    pub source: Arc<Device>,
    /// Where it goes.
    pub sink: Arc<Device>,
    /// How a new file becomes visible.
    pub names: Option<Names>,
    /// The sink holds an earlier copy, of which only a part is written again.
    pub updates: bool,
    /// Where it keeps how far it has come.
    pub checkpoint: Option<Checkpoint>,
    /// What is left to do for the key and the header.
    pub encrypted: Encrypted,
    /// The kernel of its ciphers.
    pub kernel: Kernel,
    /// Bytes to move, if known: of plaintext.
    pub total_bytes: Option<u64>,
    /// Bytes of plaintext the volume read has, if known.
    pub volume_bytes: Option<u64>,
    /// Worth telling the user.
    pub warnings: Vec<String>,
    /// Nobody serves the sink meanwhile.
    _held: Option<Held>,
}

impl Prepared {
    /// The sink is a regular file that is made by offset: it has a length to set and can be undone.
    #[must_use]
    pub fn is_file_sink(&self) -> bool {
        is_file(&self.sink) && !self.updates
    }
}

fn required<T>(value: Option<T>, what: &str) -> Result<T> {
    value.ok_or_else(|| Error::new(ErrorKind::Invalid, format!("the request has no {what}")))
}

/// Check everything about an `encrypt`, `decrypt` or `verify` request.
///
/// # Errors
/// Whatever is wrong with it; nothing was changed.
pub fn prepare(means: Means, owner: &Owner, submit: Submit, descriptors: Vec<OwnedFd>) -> Result<Prepared> {
    let Submit { action, source, sink, volume, tuning, bytes_per_second, checkpoint, remotes, .. } = submit;
    if bytes_per_second == Some(0) {
        return Err(Error::new(
            ErrorKind::Invalid,
            "a rate of 0 bytes per second never ends; pause the job instead",
        ));
    }
    let descriptors = Descriptors::new(descriptors);
    let source_wanted = required(source, "source")?;
    let sink_wanted = required(sink, "sink")?;
    let volume = required(volume, "volume")?;

    let marked = marked::wish(&remotes, &source_wanted, &sink_wanted, action, checkpoint.is_some())?;
    let updates = marked.is_some_and(|remote| remote.update);
    let mut sent = Sent { descriptors, remotes: &remotes };
    let source = open_source(&source_wanted, &mut sent)?;
    let sink = open_sink(&sink_wanted, action, checkpoint.is_some() || updates, &mut sent)?;
    if checkpoint.is_some() && sink.remote().is_some_and(|volume| !volume.can_flush()) {
        let what =
            "the NBD server cannot flush, so nothing says how far a copy has come: it takes no checkpoint";
        return Err(Error::new(ErrorKind::Unsupported, what)
            .at(sink.name())
            .hint("have it served with flush, or copy without a checkpoint"));
    }
    let names = match &sink_wanted.commit {
        Some(_) if action == Action::Verify => {
            return Err(Error::new(ErrorKind::Invalid, "verify writes nothing, so it has nothing to commit"));
        }
        Some(commit) => {
            let directory = sent.descriptors.take(commit.dir_fd, "directory of the sink")?;
            Some(Names::new(directory, commit, &**sink.file(), owner)?)
        }
        None => None,
    };
    let mut checkpoint = match checkpoint {
        Some(wish) => Some(Checkpoint::open(&wish, action, [&source, &sink], &mut sent.descriptors, owner)?),
        None => None,
    };
    let is_resumed = checkpoint.as_ref().is_some_and(Checkpoint::is_resumed);
    let key = sent.descriptors.secret(volume.key_fd, "key")?;
    let work = match action {
        Action::Encrypt => Work::Encrypt,
        Action::Decrypt => Work::Decrypt,
        Action::Verify => Work::Verify,
        Action::Bench | Action::Reencrypt => {
            return Err(Error::new(ErrorKind::Internal, "not a copy of a volume"));
        }
    };
    let side = if work == Work::Decrypt { &source } else { &sink };
    let keep_holes = tuning.keep_holes && action != Action::Encrypt;
    if keep_holes && side.remote().is_some_and(|volume| volume.facts().context(BASE_ALLOCATION).is_none()) {
        return Err(nbd::silent_of_holes().at(side.name()).hint(ALL_OR_NONE));
    }
    let exists = updates || work != Work::Encrypt;
    let opened =
        open_volume(&volume.format, exists, (side, key, owner), &mut sent, means, checkpoint.as_mut())?;
    sent.descriptors.finish()?;
    refuse_same(&source, &sink, &opened.encrypted)?;
    let geometry = opened.geometry.as_ref();

    let is_luks = opened.segments.is_none();
    // Without a header it is the caller who says what the volume is like.
    let sizes = check_sizes(work, &source, &sink, geometry, &tuning)
        .map_err(|error| if is_luks && work == Work::Decrypt { error.as_damage() } else { error })?;
    let new_file = action != Action::Verify && is_file(&sink) && !updates;
    if new_file && !is_resumed && sink.size() != Some(0) {
        // A replacement is written beside the old file, see `Names`; nothing is ever written over.
        return Err(Error::new(ErrorKind::Conflict, "the sink file is not empty").at(sink.name()));
    }
    if updates {
        marked::check_copy(work, &sink, geometry, &sizes)?;
    }
    if new_file || updates && is_file(&sink) {
        sink.lock()?;
    }
    let is_written = action != Action::Verify && !sink.is_stream();
    let held = is_written.then(|| Held::to_write(&sink)).transpose()?;
    let align = choose_direct(work, &source, &sink, &sizes, geometry, &tuning)?;
    let chunk = chunk_bytes(&source, &sink, align, &tuning, means)?;
    let (workers_max, depth) = width(&source, &sink, &tuning, means)?;
    let plan = match (marked, sizes.total, geometry) {
        (Some(_), Some(total), Some(geometry)) => {
            let step = UNIT_BYTES_MAX.max(align.source).max(align.sink);
            let extents = marked::extents(work, &source, geometry, total, step.into())?;
            Plan::only(extents, total, chunk)
        }
        _ => Plan::new(sizes.total, chunk),
    };

    let sparse = action == Action::Decrypt && tuning.sparse.unwrap_or(true);
    if let Some(checkpoint) = &mut checkpoint {
        let header = opened.encrypted.new_header();
        if header.is_some_and(|header| checkpoint.is_same_as(header)) {
            return Err(Error::new(ErrorKind::Invalid, "the checkpoint is the header").at(checkpoint.name()));
        }
        checkpoint.describe(&Facts {
            work,
            total: sizes.total.expect("files and devices have a size"),
            format: &volume.format,
            geometry: geometry.expect("files and devices have their header in place"),
            pad: tuning.pad && action != Action::Decrypt,
            sparse: new_file && sparse,
            keep_holes,
            source: &source,
            sink: &sink,
            header,
        })?;
    }
    let transfer = Transfer::new(
        TransferSpec {
            work,
            source: end_of(&source, align.source),
            sink: end_of(&sink, align.sink),
            rules: SinkRules {
                skip_zeros: new_file && sparse,
                capacity: (sink.nature() == Nature::Block).then(|| sink.size()).flatten(),
            },
            pad: tuning.pad && action != Action::Decrypt,
            keep_holes,
            depth,
            plan,
        },
        means.workers,
    );
    if let Some(segments) = opened.segments {
        transfer.set_segments(segments);
    }
    transfer.gate.set_rate(bytes_per_second);
    let mut warnings = opened.warnings;
    if action != Action::Verify && sink.remote().is_some_and(|volume| !volume.can_flush()) {
        warnings.push(format!("{}: the server cannot make writes durable", sink.name()));
    }
    if is_luks && work == Work::Decrypt && sizes.volume == Some(0) {
        warnings.push(
            "the volume has no data: it ends where its data begins, as a header backup does".to_owned(),
        );
    }
    if tuning.direct == Some(true) && (align.source == 1 || align.sink == 1) {
        warnings.push("direct I/O was asked for, but not both ends can do it".to_owned());
    }
    Ok(Prepared {
        transfer,
        workers_max,
        source,
        sink,
        names,
        updates,
        checkpoint,
        encrypted: opened.encrypted,
        kernel: means.kernel,
        total_bytes: sizes.total,
        volume_bytes: sizes.volume,
        warnings,
        _held: held,
    })
}

/// The encrypted side as far as it is known before the job runs.
struct Opened {
    encrypted: Encrypted,
    /// `None`: its header arrives in order.
    geometry: Option<Geometry>,
    /// Of a volume without a header.
    segments: Option<Segments>,
    /// Worth telling the user.
    warnings: Vec<String>,
}

/// What came with a request.
struct Sent<'a> {
    descriptors: Descriptors,
    /// Which of them are connections.
    remotes: &'a [Remote],
}

impl Sent<'_> {
    fn open(&mut self, fd: u32, role_and_name: (&str, &str), purpose: Purpose) -> Result<Device> {
        device::open(&mut self.descriptors, self.remotes, fd, role_and_name, purpose)
    }
}

/// `exists`: the volume is there, and not to be made.
fn open_volume(
    format: &Format,
    exists: bool,
    (side, key, owner): (&Arc<Device>, Secret, &Owner),
    sent: &mut Sent<'_>,
    means: Means,
    checkpoint: Option<&mut Checkpoint>,
) -> Result<Opened> {
    match format {
        Format::Raw(raw) => {
            let layout = raw::layout(raw)?;
            if let Some(checkpoint) = checkpoint {
                checkpoint.know_key(&key)?;
            }
            let cipher = build_cipher(means.kernel, key, raw.key_bytes, layout)?;
            let area = AreaCipher {
                spec: CipherSpec::AesXts(layout.kind),
                unit_bytes: layout.unit_bytes,
                offset_sectors: layout.offset_sectors,
                large_tweak: layout.large,
            };
            Ok(Opened {
                encrypted: Encrypted::Raw,
                geometry: Some(Geometry::whole(DataArea { offset: 0, size: None, cipher: Some(area) })),
                segments: Some(Segments::one(cipher, layout.unit_bytes, 0)),
                warnings: Vec::new(),
            })
        }
        Format::Luks(_) if !exists => {
            Err(Error::new(ErrorKind::Invalid, "encrypt makes a new volume, it opens none"))
        }
        Format::Luks(open) => {
            let detached = match &open.header {
                Some(header) => {
                    let purpose = Purpose { read: true, write: false, stream: false };
                    Some(Arc::new(sent.open(header.fd, ("header", &header.name), purpose)?))
                }
                None => None,
            };
            let seen = match (&detached, side.is_stream()) {
                (None, true) => None,
                (Some(device), _) => Some(encrypted::look(device, true)?),
                (None, false) => Some(encrypted::look(side, false)?),
            };
            let mut warnings = Vec::new();
            // Legal: data behind an old header that another, detached one replaces. More often a mistake.
            if let (Some(header), Some((_, uuid))) = (&detached, &seen)
                && !side.is_stream()
                && encrypted::own_uuid(side).is_some_and(|own| own != *uuid)
            {
                warnings.push(format!(
                    "{} has a LUKS header of its own, with another UUID than {}: if the two do not belong together, what comes \
                     out is noise",
                    side.name(),
                    header.name()
                ));
            }
            let geometry = seen.map(|(geometry, _)| geometry);
            let opened = encrypted::Open {
                detached,
                seen: geometry.clone(),
                keyslot: open.keyslot,
                kind: open.secret,
                secret: Some(key),
                fixed_bytes: None,
            };
            Ok(Opened { encrypted: Encrypted::Open(Box::new(opened)), geometry, segments: None, warnings })
        }
        Format::NewLuks(_) if exists => Err(Error::new(
            ErrorKind::Invalid,
            "only encrypt makes a new volume, and only where it updates none",
        )),
        Format::NewLuks(new) => {
            let is_resumed = checkpoint.is_some_and(|checkpoint| checkpoint.is_resumed());
            let new = new_luks(new, (side, key, owner), sent, is_resumed)?;
            let planned = create::plan(&new.wish, &new.place)?;
            Ok(Opened {
                encrypted: Encrypted::New(Box::new(new)),
                geometry: Some(Geometry::whole(planned.data)),
                segments: None,
                warnings: planned.warnings,
            })
        }
    }
}

/// A LUKS volume to be made on `side`.
fn new_luks(
    wish: &proto::luks::New,
    (side, passphrase, owner): (&Device, Secret, &Owner),
    sent: &mut Sent<'_>,
    is_resumed: bool,
) -> Result<encrypted::New> {
    let detached = match &wish.header {
        None => None,
        Some(header) => {
            let purpose = Purpose { read: true, write: true, stream: false };
            let device = sent.open(header.fd, ("header", &header.name), purpose)?;
            if is_file(&device) {
                // One that is gone on with may have been written when its job was all but done.
                if !is_resumed && device.size() != Some(0) {
                    return Err(
                        Error::new(ErrorKind::Conflict, "the header file is not empty").at(device.name())
                    );
                }
                device.lock()?;
            }
            device.disable_direct();
            let names = match &header.commit {
                Some(commit) => {
                    let directory = sent.descriptors.take(commit.dir_fd, "directory of the header")?;
                    Some(Names::new(directory, commit, &**device.file(), owner)?)
                }
                None => None,
            };
            Some((Arc::new(device), names))
        }
    };
    let volume_key = match wish.volume_key_fd {
        Some(fd) => Some(sent.descriptors.secret(fd, "volume key")?),
        None => None,
    };
    let capacity = |device: &Device| (device.nature() == Nature::Block).then(|| device.size()).flatten();
    let place = Place {
        detached: detached.is_some(),
        header_capacity: match &detached {
            Some((device, _)) => capacity(device),
            None => capacity(side),
        },
        data_capacity: capacity(side),
        align: side.direct_alignment().unwrap_or(1),
    };
    Ok(encrypted::New {
        wish: wish.clone(),
        place,
        passphrase: Some(passphrase),
        volume_key,
        detached,
        made: None,
    })
}

/// No two of source, sink and detached header are one file.
fn refuse_same(source: &Device, sink: &Device, encrypted: &Encrypted) -> Result<()> {
    if source.is_same_as(sink) {
        let what = "source and sink are the same file or device";
        return Err(Error::new(ErrorKind::Conflict, what).at(source.name()));
    }
    let written = match encrypted {
        Encrypted::New(new) => new.detached.as_ref().map(|(device, _)| device),
        _ => None,
    };
    match written {
        Some(header) if header.is_same_as(source) || header.is_same_as(sink) => {
            let what = "the detached header is the same file or device as the source or the sink";
            Err(Error::new(ErrorKind::Conflict, what).at(header.name()))
        }
        _ => Ok(()),
    }
}

fn open_source(source: &Source, sent: &mut Sent<'_>) -> Result<Arc<Device>> {
    let purpose = Purpose { read: true, write: false, stream: source.stream };
    Ok(Arc::new(sent.open(source.fd, ("source", &source.name), purpose)?))
}

/// `is_checked`: what is in it may be looked at before it is written.
fn open_sink(sink: &Sink, action: Action, is_checked: bool, sent: &mut Sent<'_>) -> Result<Arc<Device>> {
    let verify = action == Action::Verify;
    let purpose = Purpose { read: verify || is_checked && !sink.stream, write: !verify, stream: sink.stream };
    Ok(Arc::new(sent.open(sink.fd, ("sink", &sink.name), purpose)?))
}

fn build_cipher(
    kernel: Kernel,
    secret: Secret,
    key_bytes: u32,
    layout: Layout,
) -> Result<Box<dyn SectorCipher>> {
    if secret.len() != key_bytes as usize {
        let what = format!("the volume key has the wrong length: {key_bytes} bytes are needed");
        return Err(Error::new(ErrorKind::Invalid, what));
    }
    cipher(kernel, &VolumeKey::from_secret(secret)?, layout)
}

/// A regular file used by offset.
fn is_file(device: &Device) -> bool {
    device.nature() == Nature::File && !device.is_stream()
}

fn end_of(device: &Arc<Device>, align: u32) -> End {
    End {
        file: device.file().clone(),
        name: device.name().to_owned(),
        stream: device.is_stream(),
        align,
        holes: device.may_have_holes().then(|| device.clone()),
    }
}

/// What is known of the sizes.
pub(super) struct Sizes {
    /// Bytes to move.
    pub(super) total: Option<u64>,
    /// Bytes of plaintext that the volume read (decrypt, verify) holds.
    volume: Option<u64>,
}

/// All sizes that can be known are checked against each other.
fn check_sizes(
    work: Work,
    source: &Device,
    sink: &Device,
    geometry: Option<&Geometry>,
    tuning: &Tuning,
) -> Result<Sizes> {
    let side = if work == Work::Decrypt { source } else { sink };
    let volume = match (work, side.size(), geometry) {
        (Work::Encrypt | Work::Recrypt, ..) | (_, None, _) | (_, _, None) => None,
        // What a verification finds missing is a difference, not an error.
        (Work::Verify, Some(bytes), Some(geometry)) => geometry.plain_bytes(side, bytes).ok(),
        (Work::Decrypt, Some(bytes), Some(geometry)) => Some(geometry.plain_bytes(side, bytes)?),
    };
    let total = if work == Work::Decrypt { volume } else { source.size() };
    let (Some(total), Some(geometry)) = (total, geometry) else { return Ok(Sizes { total, volume }) };
    let unit = geometry.unit_bytes();
    if work != Work::Decrypt && !total.is_multiple_of(unit.into()) && !tuning.pad {
        return Err(unaligned(total, unit).at(source.name()).hint(PAD));
    }
    let sizes = Sizes { total: Some(total), volume };
    let needed = round_up(total, unit.into())
        .and_then(|bytes| bytes.checked_add(if work == Work::Encrypt { geometry.offset() } else { 0 }))
        .ok_or_else(|| Error::new(ErrorKind::Invalid, "the source is too large").at(source.name()))?;
    if work == Work::Verify || sink.is_stream() {
        return Ok(sizes);
    }
    match sink.nature() {
        Nature::Block => {
            let capacity = sink.size().unwrap_or(0);
            if capacity < needed {
                return Err(too_small(needed, capacity).at(sink.name()));
            }
        }
        Nature::File => {
            // Ciphertext has no holes, so all of it must fit; plaintext may turn out sparse.
            let dense = work == Work::Encrypt || tuning.sparse == Some(false);
            if let Some(free) = sink.free_bytes()
                && dense
                // What a copy that is gone on with has written takes no room any more.
                && free.saturating_add(sink.held_bytes()) < needed
            {
                let what = format!(
                    "the filesystem of the sink is too small: {needed} bytes are needed, {free} are free"
                );
                return Err(Error::new(ErrorKind::NoSpace, what).at(sink.name()));
            }
        }
        Nature::Stream => {}
    }
    Ok(sizes)
}

/// What offsets and lengths must be multiples of, bytes; 1 for a buffered or ordered end.
#[derive(Debug, Clone, Copy)]
struct Align {
    source: u32,
    sink: u32,
}

/// Bypass the page cache where the devices and the sizes allow it. In front of a server there is none.
///
/// # Errors
/// `Unsupported`: a server whose blocks what is to be written does not fill.
fn choose_direct(
    work: Work,
    source: &Device,
    sink: &Device,
    sizes: &Sizes,
    geometry: Option<&Geometry>,
    tuning: &Tuning,
) -> Result<Align> {
    let wanted = |device: &Device| tuning.direct != Some(false) || device.remote().is_some();
    let direct = |device: &Device, possible: bool| match device.direct_alignment() {
        Some(align) if possible && wanted(device) && device.enable_direct() => align,
        _ => {
            // A descriptor may come with direct I/O on; buffered transfers have odd offsets and lengths.
            device.disable_direct();
            device.expect_sequential();
            1
        }
    };
    // The last direct write ends on a device block: beyond a volume that ends inside one lie bytes that are not ours.
    let block = sink.direct_alignment().unwrap_or(1);
    let unit = geometry.map_or(512, Geometry::unit_bytes);
    let ends_inside = match sizes.total {
        Some(total) => !total.next_multiple_of(unit.into()).is_multiple_of(block.into()),
        None => block > unit,
    };
    let must_buffer = work != Work::Verify && sink.nature() == Nature::Block && ends_inside;
    // On the encrypted side the areas must begin on device blocks, on the other what was cut from them. A volume whose
    // header arrives in order is checked when it has.
    let fits = |device: &Device, side: Side| {
        let align = device.direct_alignment().unwrap_or(1);
        geometry.is_none_or(|geometry| {
            if side == work.encrypted_side() {
                geometry.is_aligned(align)
            } else {
                geometry.seams_aligned(align.into())
            }
        })
    };
    let sink_fits = fits(sink, Side::Sink);
    // Where a stream ends is not known yet; of what the server has, the blocks are filled until then.
    let known_inside = ends_inside && sizes.total.is_some();
    if work != Work::Verify && sink.remote().is_some() && (known_inside || !sink_fits) {
        let place = if sink_fits { "ends" } else { "begins" };
        let what = format!(
            "its server does not write less than {block} bytes, and what is to be written {place} inside a block of that"
        );
        return Err(Error::new(ErrorKind::Unsupported, what)
            .at(sink.name())
            .hint("have it served in smaller blocks"));
    }
    Ok(Align {
        source: direct(source, fits(source, Side::Source)),
        sink: direct(sink, !must_buffer && sink_fits),
    })
}

fn chunk_bytes(source: &Device, sink: &Device, align: Align, tuning: &Tuning, means: Means) -> Result<u32> {
    let chunk = match tuning.chunk_bytes {
        Some(chunk) => {
            if chunk == 0 || !chunk.is_multiple_of(CHUNK_STEP) || chunk > means.buffer_bytes {
                let what = format!(
                    "chunk of {chunk} bytes: it must be a multiple of {CHUNK_STEP}, at most {}",
                    means.buffer_bytes
                );
                return Err(Error::new(ErrorKind::Invalid, what));
            }
            chunk
        }
        None if is_memory(source) && is_memory(sink) => CHUNK_BYTES_MEMORY.min(means.buffer_bytes),
        None => source.hints().chunk_bytes.max(sink.hints().chunk_bytes).min(means.buffer_bytes),
    };
    // Of a stream the blocks of a server are filled.
    let block = sink.remote().map_or(1, |volume| volume.facts().block_min);
    let align = align.source.max(align.sink).max(block);
    if !chunk.is_multiple_of(align) {
        let what = format!("chunk of {chunk} bytes: the device wants multiples of {align}");
        return Err(Error::new(ErrorKind::Invalid, what));
    }
    Ok(chunk)
}

/// Its bytes are in memory, if only on their way through a pipe.
fn is_memory(device: &Device) -> bool {
    device.is_stream() || device.is_memory()
}

/// Chunks in flight in all, as the slower of two devices likes it.
fn depth_in_all(source: &Device, sink: &Device) -> u32 {
    let wanted = |device: &Device| if is_memory(device) { u32::MAX } else { device.hints().queue_depth };
    wanted(source).min(wanted(sink))
}

/// Workers that may take part, and chunks in flight on each.
pub(super) fn width(source: &Device, sink: &Device, tuning: &Tuning, means: Means) -> Result<(usize, u32)> {
    let in_all = depth_in_all(source, sink);
    let workers = match tuning.workers {
        Some(0) => return Err(Error::new(ErrorKind::Invalid, "a job needs a worker")),
        Some(workers) => (workers as usize).min(means.workers),
        // More workers than a disk with a head has places only make it move.
        None => means.workers.min(in_all as usize).max(1),
    };
    // Workers that share a connection to a server wait for each other.
    let connections = |device: &Device| device.remote().map_or(usize::MAX, nbd::Volume::connections);
    let workers = workers.min(connections(source)).min(connections(sink)).max(1);
    let depth = match tuning.queue_depth {
        Some(0) => return Err(Error::new(ErrorKind::Invalid, "a queue depth of 0 moves nothing")),
        Some(depth) => depth,
        None => (in_all / u32::try_from(workers).unwrap_or(u32::MAX)).clamp(1, DEPTH),
    };
    Ok((workers, depth))
}
