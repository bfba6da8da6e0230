//! The control-plane side of a source or sink: what it is, how large, how aligned, where its holes are, how it is made durable.
//!
//! A [`Device`] is made from a descriptor that somebody with the right to it has opened; no path is opened here. Everything is
//! checked once, here: kind, access mode, size. Data moves through a [`super::Queue`] to which [`Device::file`] is
//! attached. This module refuses to move data, and never changes flags that break somebody else's use of a shared
//! description (`O_NONBLOCK`); `O_DIRECT`, which alters speed and not meaning, it does set.

use std::num::NonZeroU64;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::{self, Advice, AtFlags, FileType, OFlags, SeekFrom, StatxFlags};
use rustix::io::Errno;

use crate::backend::blocking::Blocking;
use crate::backend::nbd::{Lease, Volume};
use crate::error::{Error, ErrorKind, Result};
use crate::format::nbd::flags;
use crate::units::Extent;

/// What a device will be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Purpose {
    /// Bytes will be read from it.
    pub read: bool,
    /// Bytes will be written to it.
    pub write: bool,
    /// In order, at the current position, whatever it is (`-`). Without this, pipes and the like are refused.
    pub stream: bool,
}

/// What a descriptor turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nature {
    /// A regular file.
    File,
    /// A block device, of this machine or behind an NBD server ([`Device::remote`]): its size is what it is.
    Block,
    /// A pipe, socket or character device: no size, no offsets.
    Stream,
}

/// What a file is, whatever it is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Identity {
    /// Filesystem and inode.
    Inode {
        /// Device number of the filesystem.
        dev: u64,
        /// Inode number.
        ino: u64,
    },
    /// The device itself, through whichever node it was opened.
    Block {
        /// Device number.
        rdev: u64,
    },
}

/// Bytes from an offset that are alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Region {
    /// Data, or what has to be taken for it, up to this offset.
    Data {
        /// One past the last byte.
        until: u64,
    },
    /// A hole: reads as zero without touching the disk.
    Hole {
        /// One past the last byte.
        until: u64,
    },
}

/// What the hardware below would like; advice, not limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hints {
    /// A disk with a head: deep queues of large transfers, few streams.
    pub rotational: bool,
    /// Bytes of one transfer.
    pub chunk_bytes: u32,
    /// Transfers in flight.
    pub queue_depth: u32,
}

/// A source or sink. Cheap to share: clone the `Arc` of [`Device::file`].
#[derive(Debug)]
pub struct Device {
    file: Arc<OwnedFd>,
    name: String,
    nature: Nature,
    purpose: Purpose,
    size: Option<u64>,
    identity: Identity,
    /// 0: this file cannot do direct I/O.
    direct_alignment: u32,
    /// Behind an NBD server. Declared after the descriptor, which must go first.
    remote: Option<Lease>,
}

/// `TMPFS_MAGIC` (include/uapi/linux/magic.h).
const TMPFS_MAGIC: u64 = 0x0102_1994;
/// `RAMFS_MAGIC`.
const RAMFS_MAGIC: u64 = 0x8584_58f6;
/// `HUGETLBFS_MAGIC`.
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;
/// FUSE, NFS, CIFS, SMB 2, Ceph, 9p, AFS: filesystems whose answers come from elsewhere.
const REMOTE_MAGICS: [u64; 7] =
    [0x6573_5546, 0x6969, 0xff53_4d42, 0xfe53_4d42, 0x00c3_6400, 0x0102_1997, 0x5346_414f];

impl Device {
    /// Look at a descriptor and check that it can serve. `name` is for messages only.
    ///
    /// # Errors
    /// `Invalid`: a directory or another thing that holds no bytes, the wrong access mode, a pipe where offsets are needed.
    pub fn from_fd(fd: OwnedFd, name: impl Into<String>, purpose: Purpose) -> Result<Self> {
        let name = name.into();
        let refuse = |what: String| Err(Error::new(ErrorKind::Invalid, what).at(&name));
        let failed = |errno: Errno| Error::io("cannot examine", errno).at(&name);
        let flags = fs::fcntl_getfl(&fd).map_err(failed)?;
        let stat = fs::fstat(&fd).map_err(failed)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        if flags.contains(OFlags::PATH) {
            return refuse("opened as a path only, not for reading or writing".to_owned());
        }
        let nature = match kind {
            FileType::RegularFile => Nature::File,
            FileType::BlockDevice => Nature::Block,
            FileType::Fifo | FileType::Socket | FileType::CharacterDevice if purpose.stream => Nature::Stream,
            FileType::Fifo => return refuse("a pipe has no offsets: use `-`".to_owned()),
            FileType::Socket => return refuse("a socket has no offsets: use `-`".to_owned()),
            FileType::CharacterDevice => {
                return refuse("a character device has no offsets: use `-`".to_owned());
            }
            FileType::Directory => return refuse("is a directory".to_owned()),
            _ => return refuse("neither a file, a block device, nor a stream".to_owned()),
        };
        let mode = flags & OFlags::ACCMODE;
        if purpose.read && mode == OFlags::WRONLY {
            return refuse("not opened for reading".to_owned());
        }
        if purpose.write && mode == OFlags::RDONLY {
            return refuse("not opened for writing".to_owned());
        }
        if purpose.write && !purpose.stream && flags.contains(OFlags::APPEND) {
            // Linux appends then, whatever offset a write names.
            return refuse("opened for append: offsets would be ignored".to_owned());
        }
        let size = match nature {
            _ if purpose.stream => None,
            Nature::File => Some(u64::try_from(stat.st_size).unwrap_or(0)),
            Nature::Block => Some(fs::seek(&fd, SeekFrom::End(0)).map_err(failed)?),
            Nature::Stream => None,
        };
        let identity = match nature {
            Nature::Block => Identity::Block { rdev: stat.st_rdev },
            _ => Identity::Inode { dev: stat.st_dev, ino: stat.st_ino },
        };
        let direct_alignment = if purpose.stream { 0 } else { direct_alignment(&fd, nature) };
        let file = Arc::new(fd);
        Ok(Self { file, name, nature, purpose, size, identity, direct_alignment, remote: None })
    }

    /// An export of an NBD server, which `file` stands for.
    ///
    /// # Errors
    /// The file cannot be examined.
    pub fn from_remote(file: Arc<OwnedFd>, lease: Lease, name: &str, purpose: Purpose) -> Result<Self> {
        let stat = fs::fstat(&file).map_err(|errno| Error::io("cannot examine", errno).at(name))?;
        let facts = lease.volume().facts();
        let (size, direct_alignment) = (Some(facts.size), facts.block_min);
        let identity = Identity::Inode { dev: stat.st_dev, ino: stat.st_ino };
        let (name, nature, remote) = (name.to_owned(), Nature::Block, Some(lease));
        Ok(Self { file, name, nature, purpose, size, identity, direct_alignment, remote })
    }

    /// The volume, if it is behind an NBD server.
    #[must_use]
    pub fn remote(&self) -> Option<&Volume> {
        self.remote.as_ref().map(Lease::volume)
    }

    /// The descriptor, to be attached to queues.
    #[must_use]
    pub fn file(&self) -> &Arc<OwnedFd> {
        &self.file
    }

    /// As the user calls it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it is.
    #[must_use]
    pub fn nature(&self) -> Nature {
        self.nature
    }

    /// To be used in order at its current position (by its nature, or because that was asked for)?
    #[must_use]
    pub fn is_stream(&self) -> bool {
        self.purpose.stream
    }

    /// Opened to be written to?
    #[must_use]
    pub fn is_written(&self) -> bool {
        self.purpose.write
    }

    /// Bytes when it was opened, or last set; `None` for streams.
    #[must_use]
    pub fn size(&self) -> Option<u64> {
        self.size
    }

    /// What it is, whatever it is called.
    #[must_use]
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// The same file or device as `other`? Streams never are: two ends of one pipe share an inode and not their bytes.
    #[must_use]
    pub fn is_same_as(&self, other: &Self) -> bool {
        self.nature != Nature::Stream && other.nature != Nature::Stream && self.identity == other.identity
    }

    /// Offsets and lengths of direct transfers must be multiples of this; `None` if it cannot do direct I/O at all. Memory
    /// of [`crate::sys::buffer::Arena`] is always aligned enough. A read may ask for more than is left, so only writes of
    /// an odd tail need the buffered way: leave direct I/O off, or write the tail rounded up and cut it by `set_len`.
    #[must_use]
    pub fn direct_alignment(&self) -> Option<u32> {
        (self.direct_alignment > 0).then_some(self.direct_alignment)
    }

    /// Bypass the page cache from now on. `false`, quietly, where that is impossible or pointless (memory filesystems).
    #[must_use]
    pub fn enable_direct(&self) -> bool {
        self.direct_alignment > 0 && self.set_direct(true)
    }

    /// Use the page cache again. `true` unless the kernel refuses. Transfers in flight finish as they began.
    pub fn disable_direct(&self) -> bool {
        self.set_direct(false)
    }

    fn set_direct(&self, on: bool) -> bool {
        if self.remote.is_some() {
            // There is no page cache on this side, and blocks are what the server says.
            return true;
        }
        fs::fcntl_getfl(&self.file).is_ok_and(|mut flags| {
            flags.set(OFlags::DIRECT, on);
            fs::fcntl_setfl(&self.file, flags).is_ok()
        })
    }

    /// On a filesystem that another program or machine serves: even looking at it may take as long as they like.
    #[must_use]
    pub fn is_remote(&self) -> bool {
        self.remote.is_some() || filesystem(&self.file).is_some_and(|magic| REMOTE_MAGICS.contains(&magic))
    }

    /// On a filesystem made of memory.
    #[must_use]
    pub fn is_memory(&self) -> bool {
        self.remote.is_none() && is_memory(&self.file)
    }

    /// What the hardware below would like.
    #[must_use]
    pub fn hints(&self) -> Hints {
        const CHUNK_BYTES: u32 = 1 << 20;
        /// Chunks are whole blocks of this.
        const CHUNK_STEP: u32 = 4096;
        if let Some(volume) = self.remote() {
            // What the server prefers is a least, and often small; it never gets more than it takes.
            let facts = volume.facts();
            let most = (facts.payload_max / CHUNK_STEP * CHUNK_STEP).max(CHUNK_STEP);
            let chunk_bytes = facts.block_preferred.clamp(CHUNK_BYTES, 4 << 20).min(most);
            return Hints { rotational: facts.has(flags::ROTATIONAL), chunk_bytes, queue_depth: 16 };
        }
        let rotational = self.queue_attribute("rotational") == Some(1);
        let optimal = self.queue_attribute("optimal_io_size").unwrap_or(0);
        // A RAID announces its stripe: whole stripes, if that is a sensible size.
        let chunk_bytes = match u32::try_from(optimal) {
            Ok(stripe) if stripe > CHUNK_BYTES && stripe.is_power_of_two() => stripe.min(4 << 20),
            _ => CHUNK_BYTES,
        };
        match self.nature {
            Nature::Stream => Hints { rotational: false, chunk_bytes: CHUNK_BYTES, queue_depth: 1 },
            _ => Hints { rotational, chunk_bytes, queue_depth: if rotational { 4 } else { 16 } },
        }
    }

    /// Physical block of the device, or of that under the file, bytes; `None` where nobody says (network, several devices).
    #[must_use]
    pub fn physical_block_bytes(&self) -> Option<u32> {
        self.queue_attribute("physical_block_size").and_then(|bytes| u32::try_from(bytes).ok())
    }

    /// A number from the block queue under this file or device; partitions share their disk's.
    fn queue_attribute(&self, attribute: &str) -> Option<u64> {
        if self.remote.is_some() {
            return None;
        }
        let dev = match self.identity {
            Identity::Block { rdev } => rdev,
            Identity::Inode { dev, .. } => dev,
        };
        let node = PathBuf::from(format!("/sys/dev/block/{}:{}", fs::major(dev), fs::minor(dev)));
        ["queue", "../queue"].iter().find_map(|queue| {
            std::fs::read_to_string(node.join(queue).join(attribute)).ok()?.trim().parse().ok()
        })
    }

    /// What lies at `offset`: data or a hole, and until where. `None` at or after the end, and for streams. Whatever cannot tell
    /// (block devices, old filesystems) is data throughout. Moves the file's position, which nothing here uses.
    #[must_use]
    pub fn region_at(&self, offset: u64) -> Option<Region> {
        let size = self.size.filter(|&size| offset < size)?;
        if let Some(volume) = self.remote() {
            return Some(volume.region_at(offset));
        }
        let all_data = Region::Data { until: size };
        if self.nature != Nature::File {
            return Some(all_data);
        }
        Some(match fs::seek(&self.file, SeekFrom::Data(offset)) {
            // No data to the end: a hole, unless the file has been cut off, which reading will find out.
            Err(Errno::NXIO) if self.current_len().is_ok_and(|now| now >= size) => {
                Region::Hole { until: size }
            }
            Ok(data) if data > offset => Region::Hole { until: data.min(size) },
            Ok(_) => match fs::seek(&self.file, SeekFrom::Hole(offset)) {
                Ok(hole) if hole > offset => Region::Data { until: hole.min(size) },
                _ => all_data,
            },
            Err(_) => all_data,
        })
    }

    /// Everything written, and the file's own metadata, durable. Streams have nothing to make durable.
    ///
    /// # Errors
    /// The write-back failed: what was written may be lost, and asking again proves nothing.
    pub fn sync_all(&self) -> Result<()> {
        if self.remote.is_some() {
            return Blocking::open(Arc::clone(&self.file), &self.name, self.direct_alignment)?.flush();
        }
        match fs::fsync(&self.file) {
            Ok(()) => Ok(()),
            Err(Errno::INVAL | Errno::ROFS) if self.nature == Nature::Stream => Ok(()),
            Err(errno) => Err(Error::io("flush failed", errno).at(&self.name)),
        }
    }

    /// Tell the page cache that reads go forward. Buffered ends only.
    pub fn expect_sequential(&self) {
        let _ = fs::fadvise(&self.file, 0, None, Advice::Sequential);
    }

    /// Leave the page cache as we found it. Clean pages go; of dirty ones the write-back starts, so call it for an extent
    /// just written, and again when the job is some tens of MiB further on. Buffered ends only.
    pub fn drop_cache(&self, extent: Extent) {
        let _ = fs::fadvise(&self.file, extent.start(), NonZeroU64::new(extent.len()), Advice::DontNeed);
    }

    /// Give a pipe room for 1 MiB, which is what an ordinary user may have. Returns what it has now, or `None` if it is no pipe.
    pub fn grow_pipe(&self) -> Option<usize> {
        const PIPE_BYTES: usize = 1 << 20;
        let now = rustix::pipe::fcntl_getpipe_size(&self.file).ok()?;
        if now >= PIPE_BYTES {
            return Some(now);
        }
        Some(rustix::pipe::fcntl_setpipe_size(&self.file, PIPE_BYTES).unwrap_or(now))
    }
}

fn filesystem(fd: &OwnedFd) -> Option<u64> {
    // The field is signed on some architectures; the magic numbers are 32 bits wide.
    fs::fstatfs(fd).ok().map(|stat| u64::from_ne_bytes(stat.f_type.to_ne_bytes()) & 0xffff_ffff)
}

fn is_memory(fd: &OwnedFd) -> bool {
    matches!(filesystem(fd), Some(TMPFS_MAGIC | RAMFS_MAGIC | HUGETLBFS_MAGIC))
}

/// Alignment of offsets and lengths for direct I/O; 0 if there is none.
fn direct_alignment(fd: &OwnedFd, nature: Nature) -> u32 {
    if nature == Nature::File && is_memory(fd) {
        return 0;
    }
    // Since 6.1 the kernel says so itself, and 0 then means "no direct I/O".
    if let Ok(stat) = fs::statx(fd.as_fd(), c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)
        && StatxFlags::from_bits_retain(stat.stx_mask).contains(StatxFlags::DIOALIGN)
    {
        return stat.stx_dio_offset_align;
    }
    match nature {
        Nature::Block => fs::ioctl_blksszget(fd).unwrap_or(4096),
        // The largest block size in use: right everywhere, if sometimes stricter than needed.
        Nature::File => 4096,
        Nature::Stream => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Write;

    const READ: Purpose = Purpose { read: true, write: false, stream: false };
    const WRITE: Purpose = Purpose { read: false, write: true, stream: false };

    fn scratch(name: &str) -> PathBuf {
        let dir = PathBuf::from(option_env!("CARGO_TARGET_TMPDIR").unwrap_or("/tmp"));
        dir.join(format!("device-{}-{name}", std::process::id()))
    }

    fn refusal(fd: impl Into<OwnedFd>, purpose: Purpose) -> String {
        let error = Device::from_fd(fd.into(), "x", purpose).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Invalid);
        error.chain()
    }

    #[test]
    fn refuses_what_cannot_serve() {
        assert_eq!(refusal(File::open("/").expect("root"), READ), "is a directory: x");
        assert!(refusal(std::io::pipe().expect("pipe").0, READ).contains("pipe has no offsets"));
        assert!(refusal(File::open("/dev/null").expect("null"), READ).contains("character device"));
        let path = scratch("modes");
        File::create(&path).expect("create");
        assert_eq!(refusal(File::open(&path).expect("open"), WRITE), "not opened for writing: x");
        let write_only = File::options().write(true).open(&path).expect("open");
        assert_eq!(refusal(write_only, READ), "not opened for reading: x");
        let append = File::options().append(true).open(&path).expect("open");
        assert!(refusal(append, WRITE).contains("opened for append"));
        let path_only = rustix::fs::open(&path, OFlags::PATH, rustix::fs::Mode::empty()).expect("open");
        assert!(refusal(path_only, READ).contains("path only"));
        std::fs::remove_file(&path).expect("remove");
    }

    #[test]
    fn knows_one_file_under_two_names() {
        let (one, two) = (scratch("one"), scratch("two"));
        File::create(&one).expect("create");
        std::fs::hard_link(&one, &two).expect("link");
        let open = |path: &PathBuf| {
            Device::from_fd(File::open(path).expect("open").into(), "x", READ).expect("device")
        };
        assert!(open(&one).is_same_as(&open(&two)));
        std::fs::remove_file(&two).expect("remove");
        File::create(&two).expect("create");
        assert!(!open(&one).is_same_as(&open(&two)));
        for path in [one, two] {
            std::fs::remove_file(path).expect("remove");
        }
    }

    #[test]
    fn finds_holes_and_never_calls_data_a_hole() {
        let path = scratch("holes");
        let mut file = File::options().read(true).write(true).create_new(true).open(&path).expect("create");
        file.write_all(&[1; 100]).expect("write");
        file.set_len(10 << 20).expect("extend");
        std::os::unix::fs::FileExt::write_all_at(&file, &[2], 5 << 20).expect("write");
        let device = Device::from_fd(file.into(), "x", READ).expect("device");
        let mut at = 0;
        let mut holes = 0;
        while let Some(region) = device.region_at(at) {
            at = match region {
                Region::Data { until } => until,
                Region::Hole { until } => {
                    assert!(!(at..until).contains(&0) && !(at..until).contains(&(5 << 20)));
                    holes += until - at;
                    until
                }
            };
        }
        assert_eq!(at, 10 << 20);
        assert!(holes >= 9 << 20, "only {holes} bytes of holes found");
        assert_eq!(device.region_at(10 << 20), None);
        std::fs::remove_file(path).expect("remove");
    }

    #[test]
    fn a_stream_has_no_size_and_a_pipe_can_grow() {
        let (read, _write) = std::io::pipe().expect("pipe");
        let device = Device::from_fd(read.into(), "-", Purpose { stream: true, ..READ }).expect("device");
        assert_eq!((device.size(), device.nature(), device.region_at(0)), (None, Nature::Stream, None));
        assert!(!device.enable_direct());
        assert!(device.grow_pipe().is_some_and(|bytes| bytes >= 65536));
    }
}
