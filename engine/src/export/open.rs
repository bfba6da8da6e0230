//! From a request to an opened volume: which device it is, who else uses it, where its data lies, and its key.
//!
//! In two steps. [`Closed::new`] takes what was sent and takes the volume for itself; it is quick, and a request that names a descriptor
//! that was not sent ends here. [`Closed::open`] derives the key, which takes seconds by design.
//!
//! This module refuses a volume whose size is not a whole number of data units, one that somebody writes,
//! and to write to one whose server cannot flush.

use std::sync::Arc;

use proto::Format;
use proto::export::Request;

use crate::backend::blocking::Blocking;
use crate::backend::device::{Device, Purpose};
use crate::crypto::spec::CipherSpec;
use crate::crypto::{Kernel, Secret};
use crate::error::{Error, ErrorKind, Result};
use crate::export::midway;
use crate::export::nbd::served::BLOCK_MAX;
use crate::format::raw;
use crate::job::encrypted;
use crate::job::geometry::Geometry;
use crate::job::reencrypt::course;
use crate::key::Descriptors;
use crate::pipeline::view::View;
use crate::volume::held::Held;
use crate::volume::{AreaCipher, DataArea, Header, device, reencrypt, store, unlock};

/// A volume that nobody else may use, not opened yet.
pub struct Closed {
    device: Arc<Device>,
    header: Option<Arc<Device>>,
    format: Format,
    key: Secret,
    /// Of the other side of a re-encryption.
    more_keys: Vec<Secret>,
    read_only: bool,
    direct: Option<bool>,
    held: Held,
}

/// A volume that can be served.
pub struct Opened {
    /// Its data.
    pub device: Arc<Device>,
    /// Its alignment for direct I/O, bytes; 1: it is buffered.
    pub align: u32,
    /// Where its plaintext lies.
    pub view: Arc<View>,
    /// Worth telling the user.
    pub warnings: Vec<String>,
    /// Nobody else uses it. To be dropped when nothing is in flight any more.
    pub held: Held,
}

impl Closed {
    /// Take the volume, its header and its key.
    ///
    /// # Errors
    /// `Invalid`: descriptors that cannot serve; `Conflict`: somebody uses it.
    pub fn new(request: &Request, descriptors: &mut Descriptors) -> Result<Self> {
        let purpose = Purpose { read: true, write: !request.read_only, stream: false };
        let named = ("volume", request.file.name.as_str());
        let device = device::open(descriptors, &request.remotes, request.file.fd, named, purpose)?;
        // Clients are told that they can flush, and count on it.
        if !request.read_only && device.remote().is_some_and(|volume| !volume.can_flush()) {
            let what = "the NBD server cannot flush, so nothing that clients write could be made durable";
            return Err(Error::new(ErrorKind::Unsupported, what)
                .at(device.name())
                .hint("have it served with flush, or export it read-only"));
        }
        let header = match &request.volume.format {
            Format::Luks(open) => open.header.as_ref(),
            Format::Raw(_) => None,
            Format::NewLuks(_) => {
                return Err(Error::new(ErrorKind::Invalid, "an export opens a volume, it makes none"));
            }
        };
        let header = match header {
            Some(file) => {
                let purpose = Purpose { read: true, write: false, stream: false };
                let named = ("header", file.name.as_str());
                let header = device::open(descriptors, &request.remotes, file.fd, named, purpose)?;
                if header.is_same_as(&device) {
                    let what = "volume and detached header are the same file or device";
                    return Err(Error::new(ErrorKind::Invalid, what).at(device.name()));
                }
                Some(Arc::new(header))
            }
            None => None,
        };
        let key = descriptors.secret(request.volume.key_fd, "key")?;
        let more_keys = request.more_key_fds.iter().map(|&fd| descriptors.secret(fd, "key"));
        let more_keys = more_keys.collect::<Result<_>>()?;
        let device = Arc::new(device);
        let held = Held::to_serve(&device, request.read_only)?;
        Ok(Self {
            device,
            header,
            format: request.volume.format.clone(),
            key,
            more_keys,
            read_only: request.read_only,
            direct: request.direct,
            held,
        })
    }

    /// Open it. `give_up`: nobody waits for it any more.
    ///
    /// # Errors
    /// `WrongKey`; `Damaged`, `Unsupported`: its header; `Invalid`: a size or key that does not fit; `Cancelled`.
    pub fn open(mut self, kernel: Kernel, give_up: &dyn Fn() -> bool) -> Result<Opened> {
        if let Some(midway) = self.midway(give_up)? {
            let Self { device, direct, held, .. } = self;
            let fits = |align: u32| course::is_aligned(&midway, align);
            let align = choose_direct(&device, device.size().unwrap_or(0), &fits, direct)?;
            let view = midway::view(&midway, kernel)?;
            return Ok(Opened { device, align, view, warnings: midway.notes, held });
        }
        let Self { device, header, format, key, direct, held, .. } = self;
        let mut warnings = Vec::new();
        let (geometry, key) = match &format {
            Format::Luks(open) => unlock_luks(&device, header.as_deref(), open, key, give_up)?,
            Format::Raw(raw) => (raw_geometry(raw, &key)?, key),
            Format::NewLuks(_) => unreachable!("refused before it was claimed"),
        };
        let bytes = device.size().unwrap_or(0);
        let total = geometry.plain_bytes(&device, bytes)?;
        if total == 0 {
            let what = "the volume has no data: it ends where its data begins, as a header backup does";
            return Err(Error::new(ErrorKind::Invalid, what).at(device.name()));
        }
        let align = choose_direct(&device, bytes, &|align| geometry.is_aligned(align), direct)?;
        if direct == Some(true) && align == 1 {
            warnings.push("direct I/O was asked for, but the volume cannot do it".to_owned());
        }
        let view = View::new(geometry.segments(kernel, &key)?, total);
        Ok(Opened { device, align, view, warnings, held })
    }

    /// It is in the middle of a re-encryption: that, opened. What was interrupted has been recovered.
    fn midway(&mut self, give_up: &dyn Fn() -> bool) -> Result<Option<reencrypt::Opened>> {
        let Format::Luks(open) = &self.format else { return Ok(None) };
        let at = self.header.as_ref().unwrap_or(&self.device);
        let (header, mut blocking) = load(at)?;
        if !midway::is_under_way(&header) {
            if !self.read_only {
                midway::settle(header, &mut blocking, self.header.is_some())?;
            }
            return Ok(None);
        }
        if open.secret != proto::luks::Secret::Passphrase {
            let what = "the volume is in the middle of a re-encryption, and has two volume keys";
            return Err(Error::new(ErrorKind::Unsupported, what).at(at.name()).hint("name a passphrase"));
        }
        let mut keys = vec![Secret::copy_of(self.key.as_bytes())?];
        keys.append(&mut self.more_keys);
        midway::open(&self.device, (self.header.is_some(), self.read_only), &keys, give_up)
    }
}

/// The header on a device, read through the page cache: what other programs of this machine write is seen, and no alignment is asked.
fn load(at: &Device) -> Result<(Header, Blocking)> {
    at.disable_direct();
    let mut blocking = Blocking::open(Arc::clone(at.file()), at.name(), 1)?;
    let lock = store::lock(at.file(), at.name(), false)?;
    let header = Header::load(&mut blocking)?;
    drop(lock);
    Ok((header, blocking))
}

/// Where the data lies, and its key, by the header.
fn unlock_luks(
    device: &Device,
    detached: Option<&Device>,
    open: &proto::luks::Open,
    secret: Secret,
    give_up: &dyn Fn() -> bool,
) -> Result<(Geometry, Secret)> {
    let at = detached.unwrap_or(device);
    let (header, mut blocking) = load(at)?;
    let geometry =
        encrypted::geometry_of(&header, detached.is_some()).map_err(|error| error.at(at.name()))?;
    let unlocked = match open.secret {
        proto::luks::Secret::Passphrase => {
            unlock::with_passphrase(&mut blocking, &header, &secret, open.keyslot, give_up)
        }
        proto::luks::Secret::VolumeKey => unlock::with_volume_key(&header, secret),
    }?;
    Ok((geometry, unlocked.key))
}

/// Without a header it is the caller who says what the volume is like.
fn raw_geometry(raw: &proto::Raw, key: &Secret) -> Result<Geometry> {
    let layout = raw::layout(raw)?;
    if key.len() != raw.key_bytes as usize {
        let what = format!("the volume key has the wrong length: {} bytes are needed", raw.key_bytes);
        return Err(Error::new(ErrorKind::Invalid, what));
    }
    let cipher = AreaCipher {
        spec: CipherSpec::AesXts(layout.kind),
        unit_bytes: layout.unit_bytes,
        offset_sectors: layout.offset_sectors,
        large_tweak: layout.large,
    };
    Ok(Geometry::whole(DataArea { offset: 0, size: None, cipher: Some(cipher) }))
}

/// Bypass the page cache where every data unit can be reached that way: areas that begin on device blocks, and a device that
/// ends on one (a write to an odd end would make a file longer). What is behind an NBD server is in the blocks of that one, whatever is
/// wished for.
///
/// # Errors
/// `Unsupported`: blocks of an NBD server that the volume is not in.
fn choose_direct(
    device: &Device,
    bytes: u64,
    is_aligned: &dyn Fn(u32) -> bool,
    wish: Option<bool>,
) -> Result<u32> {
    let fits =
        |align: &u32| *align <= BLOCK_MAX && bytes.is_multiple_of((*align).into()) && is_aligned(*align);
    if device.remote().is_some() {
        let block = device.direct_alignment().unwrap_or(1);
        return Some(block).filter(fits).ok_or_else(|| {
            let what = format!(
                "its server does not read or write less than {block} bytes, and the volume's data is not in blocks of that"
            );
            Error::new(ErrorKind::Unsupported, what)
                .at(device.name())
                .hint("export it where its device is, with cryptctl export")
        });
    }
    Ok(match device.direct_alignment().filter(fits) {
        Some(align) if wish != Some(false) && device.enable_direct() => align,
        _ => {
            // A descriptor may come with direct I/O on.
            device.disable_direct();
            1
        }
    })
}
