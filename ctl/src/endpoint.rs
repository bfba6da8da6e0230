//! Opening the two ends of a job with the caller's rights.
//!
//! Everything that can be refused is refused here, before anything is written: the same file at both ends, a terminal,
//! a device in use, an existing file, a device that holds something. Whether the sink is large enough is the daemon's to say.
//!
//! A volume that an NBD server has is only named here, and connected to when it is passed on (see `remote`). What it holds and
//! whether it can be written the daemon finds out; whether somebody else uses it, nobody.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use proto::ErrorKind;
use rustix::fs::OFlags;

use crate::partial::Place;
use crate::remote::Remote;
use crate::report::{Error, Result};
use crate::signature;
use crate::uri;

/// One end, open.
pub struct End {
    /// What the daemon gets.
    pub handle: Handle,
    /// Read or written in order, not by offset.
    pub stream: bool,
    /// As typed, for messages.
    pub name: String,
    identity: Identity,
}

/// An open file, or where to connect to.
pub enum Handle {
    /// A file, a device or a stream.
    File(OwnedFd),
    /// A volume of an NBD server.
    Remote(Box<Remote>),
}

/// The sink of `encrypt` and `decrypt`: open already, or a file still to be created.
pub enum Sink {
    /// A device or a stream.
    Open(End),
    /// A file that appears when it is whole.
    New(Place),
}

/// What is done with a LUKS header, and so how what holds it is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Only read. What is mounted or mapped can be read too.
    Read,
    /// Changed in place, which a mapped device allows: the kernel read the header when it was mapped.
    Change,
    /// Made anew, or all of it rewritten, or served: a device in use is refused.
    Replace,
    /// Only read, and nobody else may use a device meanwhile.
    ReadAlone,
}

/// What the bytes behind a descriptor really are, to find the same thing under two names.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Identity {
    File { dev: u64, ino: u64 },
    Device { rdev: u64 },
    Remote(String),
    Other,
}

/// How much of a volume on a server must be zeros for it to be overwritten without `--force`, bytes from its beginning: signatures lie
/// there, and in its last mebibyte.
const BLANK_BYTES: u64 = 1 << 20;

/// A bare header or a backup is for its owner: it is small, outlives the passphrases that were removed since, and has no
/// other use than to open the volume. The header inside a volume is as readable as the volume, which is copied and backed
/// up by other accounts, and whose mode is the user's to choose (`umask`).
const HEADER_MODE: u32 = 0o600;

impl End {
    /// The device number, of a block device.
    pub fn device(&self) -> Option<u64> {
        match self.identity {
            Identity::Device { rdev } => Some(rdev),
            Identity::File { .. } | Identity::Remote(_) | Identity::Other => None,
        }
    }

    /// A volume of an NBD server?
    pub fn remote(&self) -> Option<&Remote> {
        match &self.handle {
            Handle::Remote(remote) => Some(remote),
            Handle::File(_) => None,
        }
    }

    /// As [`End::remote`], to say more about it.
    pub fn remote_mut(&mut self) -> Option<&mut Remote> {
        match &mut self.handle {
            Handle::Remote(remote) => Some(remote),
            Handle::File(_) => None,
        }
    }

    /// What it holds, to be looked at.
    ///
    /// # Errors
    /// No descriptor is to be had. `Internal`: it is remote, and cannot be looked at from here.
    pub fn file(&self) -> Result<File> {
        match &self.handle {
            Handle::File(fd) => {
                fd.try_clone().map(File::from).map_err(|error| Error::io("cannot inspect", &self.name, error))
            }
            Handle::Remote(_) => {
                Err(Error::new(ErrorKind::Internal, format!("{} was taken for a file", self.name)))
            }
        }
    }

    /// Is this what `metadata` is of, under whatever name?
    pub fn is(&self, metadata: &std::fs::Metadata) -> bool {
        same(&self.identity, &identity_of(metadata))
    }

    /// Is it a regular file?
    pub fn is_file(&self) -> bool {
        matches!(self.identity, Identity::File { .. })
    }
}

/// The volume of a server, if `path` names one.
fn remote(path: &Path) -> Result<Option<End>> {
    let Some(uri) = uri::parse(path) else { return Ok(None) };
    let remote = Remote::new(uri?);
    let identity = Identity::Remote(remote.identity());
    let name = path.display().to_string();
    Ok(Some(End { handle: Handle::Remote(Box::new(remote)), stream: false, name, identity }))
}

/// Open the readable end: SRC, and for `verify` both. `role` names it in messages.
pub fn open_readable(path: &Path, role: &str) -> Result<End> {
    let name = path.display().to_string();
    if is_dash(path) {
        let stdin = io::stdin();
        if stdin.is_terminal() {
            return Err(
                Error::usage(format!("{role} is a terminal")).hint("redirect standard input: … < FILE")
            );
        }
        return stream(stdin.as_fd(), name);
    }
    if let Some(end) = remote(path)? {
        return Ok(end);
    }
    let kind = std::fs::metadata(path).map_err(|error| Error::io("cannot open", &name, error))?.file_type();
    if !(kind.is_file() || kind.is_block_device() || kind.is_fifo()) {
        return Err(wrong_kind(&name, kind));
    }
    let mut flags = OFlags::NOCTTY;
    if kind.is_block_device() {
        flags |= OFlags::EXCL;
    }
    let file = File::options()
        .read(true)
        .custom_flags(flags.bits().cast_signed())
        .open(path)
        .map_err(|error| in_use(&name, error))?;
    let identity = identify(&file).map_err(|error| Error::io("cannot inspect", &name, error))?;
    Ok(End { handle: Handle::File(file.into()), stream: kind.is_fifo(), name, identity })
}

/// Open what holds a LUKS header, or the data that belongs to one: an existing file, block device or volume of a server. `role`
/// names it in messages.
pub fn open_volume(path: &Path, role: &str, access: Access) -> Result<End> {
    let name = path.display().to_string();
    if is_dash(path) {
        return Err(Error::usage(format!(
            "{role} cannot be `-`: a header is not read or changed in a stream"
        )));
    }
    if let Some(end) = remote(path)? {
        return Ok(end);
    }
    let metadata = std::fs::metadata(path).map_err(|error| Error::io("cannot open", &name, error))?;
    let kind = metadata.file_type();
    if !(kind.is_file() || kind.is_block_device()) {
        return Err(wrong_kind(&name, kind));
    }
    let mut flags = OFlags::NOCTTY;
    let writes = matches!(access, Access::Change | Access::Replace);
    if kind.is_block_device() && matches!(access, Access::Replace | Access::ReadAlone) {
        flags |= OFlags::EXCL;
    }
    let file = File::options()
        .read(true)
        .write(writes)
        .custom_flags(flags.bits().cast_signed())
        .open(path)
        .map_err(|error| in_use(&name, error))?;
    if kind.is_block_device() && writes && is_read_only(metadata.rdev()) {
        return Err(Error::new(ErrorKind::Denied, format!("{name} is read-only")));
    }
    let identity = identify(&file).map_err(|error| Error::io("cannot inspect", &name, error))?;
    Ok(End { handle: Handle::File(file.into()), stream: false, name, identity })
}

/// Open DST that holds an earlier copy, to change it in place.
pub fn open_copy(path: &Path, source: &End) -> Result<Sink> {
    if is_dash(path) || std::fs::metadata(path).is_ok_and(|found| found.file_type().is_fifo()) {
        return Err(Error::usage("--update: DST cannot be a stream: what is not written again stays"));
    }
    let end = open_volume(path, "DST", Access::Replace).map_err(|error| {
        if error.failure.kind == ErrorKind::NotFound {
            error.hint("--update changes a copy that is there; leave it out for a new one")
        } else {
            error
        }
    })?;
    refuse_attached(&end)?;
    refuse_same(source, &end.identity, &end.name)?;
    Ok(Sink::Open(end))
}

/// As [`inspect_sink`], for what must be a file or a block device: a header. `role` names it in messages.
pub fn inspect_header(path: &Path, role: &str, source: &End, force: bool) -> Result<Sink> {
    let stream = is_dash(path) || std::fs::metadata(path).is_ok_and(|found| found.file_type().is_fifo());
    if stream {
        return Err(Error::usage(format!("{role} must be a file or a block device, not a stream")));
    }
    inspect_sink(path, source, force, HEADER_MODE)
}

/// Find out what DST is, and refuse what must not be written. Creates nothing. `mode` is a new file's, before the umask.
pub fn inspect_sink(path: &Path, source: &End, force: bool, mode: u32) -> Result<Sink> {
    let name = path.display().to_string();
    if is_dash(path) {
        let stdout = io::stdout();
        if stdout.is_terminal() {
            return Err(
                Error::usage("standard output is a terminal").hint("redirect it: … > FILE, or name a file")
            );
        }
        let end = stream(stdout.as_fd(), name)?;
        refuse_same(source, &end.identity, &end.name)?;
        return Ok(Sink::Open(end));
    }
    if let Some(mut end) = remote(path)? {
        refuse_same(source, &end.identity, &end.name)?;
        be_blank(&mut end, force, BLANK_BYTES);
        return Ok(Sink::Open(end));
    }
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if std::fs::symlink_metadata(path).is_ok() {
                return Err(Error::new(ErrorKind::NotFound, format!("{name} is a symbolic link to nothing"))
                    .hint("name the file itself"));
            }
            return Ok(Sink::New(Place::new(path, &name, None, force, mode)?));
        }
        Err(error) => return Err(Error::io("cannot open", &name, error)),
    };
    let kind = metadata.file_type();
    if kind.is_file() || kind.is_block_device() {
        refuse_same(source, &identity_of(&metadata), &name)?;
    }
    if kind.is_file() {
        if metadata.len() > 0 && !force {
            return Err(Error::new(ErrorKind::Conflict, format!("{name} exists and is not empty"))
                .hint("--force replaces it, once the new one is whole"));
        }
        // The link's target is replaced, not the link.
        let link = std::fs::symlink_metadata(path).is_ok_and(|there| there.is_symlink());
        let real = if link { std::fs::canonicalize(path) } else { Ok(path.to_owned()) };
        let real = real.map_err(|error| Error::io("cannot open", &name, error))?;
        Ok(Sink::New(Place::new(&real, &name, Some(&metadata), force, mode)?))
    } else if kind.is_block_device() {
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(OFlags::EXCL.bits().cast_signed())
            .open(path)
            .map_err(|error| in_use(&name, error))?;
        if !force && let Some(found) = signature::probe(&file, &name)? {
            return Err(Error::new(ErrorKind::Conflict, format!("{name} holds {found}"))
                .hint("--force overwrites it; look at it with `lsblk -f` first"));
        }
        if is_read_only(metadata.rdev()) {
            return Err(Error::new(ErrorKind::Denied, format!("{name} is read-only")));
        }
        let identity = identify(&file).map_err(|error| Error::io("cannot inspect", &name, error))?;
        Ok(Sink::Open(End { handle: Handle::File(file.into()), stream: false, name, identity }))
    } else if kind.is_fifo() {
        let file =
            File::options().write(true).open(path).map_err(|error| Error::io("cannot open", &name, error))?;
        let (handle, identity) = (Handle::File(file.into()), Identity::Other);
        Ok(Sink::Open(End { handle, stream: true, name, identity }))
    } else {
        Err(wrong_kind(&name, kind))
    }
}

/// A volume of a server that is to be overwritten: without `--force` the daemon looks whether its first `bytes` are zeros. Others
/// are looked at here.
pub fn be_blank(end: &mut End, force: bool, bytes: u64) {
    if let Some(remote) = end.remote_mut() {
        remote.blank_bytes = (!force).then_some(bytes);
    }
}

/// What is there already of a sink is to be gone on with. `force`: what it replaces may go whatever it holds.
pub fn again(sink: Sink, force: bool) -> Result<Sink> {
    match sink {
        Sink::New(place) => place.again(force).map(Sink::New),
        open @ Sink::Open(_) => Ok(open),
    }
}

/// Refuse a header that would be written where the data is.
pub fn refuse_same_sinks(one: &Sink, other: &Sink) -> Result<()> {
    let (same, name) = match (one, other) {
        (Sink::Open(one), Sink::Open(other)) => (same(&one.identity, &other.identity), other.name.as_str()),
        (Sink::New(one), Sink::New(other)) => (one.is(other), other.typed()),
        (Sink::Open(end), Sink::New(_)) | (Sink::New(_), Sink::Open(end)) => (false, end.name.as_str()),
    };
    if same { Err(Error::usage(format!("{name} cannot take both the header and the data"))) } else { Ok(()) }
}

/// Refuse two names for the same bytes: the same inode, the same device, or a loop device and the file behind it.
pub fn refuse_same_ends(source: &End, other: &End) -> Result<()> {
    refuse_same(source, &other.identity, &other.name)
}

/// Refuse a file that is attached to a loop device: what is written to it past the device stays unseen there, and what the
/// device still holds in memory may be written over it.
pub fn refuse_attached(end: &End) -> Result<()> {
    if !end.is_file() {
        return Ok(());
    }
    let Ok(devices) = std::fs::read_dir("/sys/block") else { return Ok(()) };
    for device in devices.flatten() {
        let Ok(text) = std::fs::read_to_string(device.path().join("loop/backing_file")) else { continue };
        let backing = std::fs::metadata(text.strip_suffix('\n').unwrap_or(&text));
        if backing.is_ok_and(|found| end.is(&found)) {
            let device = format!("/dev/{}", device.file_name().to_string_lossy());
            return Err(Error::new(
                ErrorKind::Conflict,
                format!("{} is in use: it is attached to {device}", end.name),
            )
            .hint(format!("name {device} instead, or detach it: losetup -d {device}")));
        }
    }
    Ok(())
}

fn refuse_same(source: &End, other: &Identity, name: &str) -> Result<()> {
    if same(&source.identity, other) {
        let message = if source.name == name {
            format!("{name} is both source and sink")
        } else {
            format!("{} and {name} are the same", source.name)
        };
        return Err(Error::usage(message));
    }
    Ok(())
}

fn same(a: &Identity, b: &Identity) -> bool {
    match (a, b) {
        (Identity::Other, _) | (_, Identity::Other) => false,
        (Identity::Device { rdev }, file @ Identity::File { .. })
        | (file @ Identity::File { .. }, Identity::Device { rdev }) => backing(*rdev).as_ref() == Some(file),
        (a, b) => {
            a == b
                || matches!((a, b), (Identity::Device { rdev: x }, Identity::Device { rdev: y })
            if backing(*x).is_some() && backing(*x) == backing(*y))
        }
    }
}

/// The file behind a loop device, or behind the loop device a partition is on.
fn backing(rdev: u64) -> Option<Identity> {
    let node = format!("/sys/dev/block/{}:{}", rustix::fs::major(rdev), rustix::fs::minor(rdev));
    let text = ["loop/backing_file", "../loop/backing_file"]
        .iter()
        .find_map(|tail| std::fs::read_to_string(Path::new(&node).join(tail)).ok())?;
    let metadata = std::fs::metadata(text.strip_suffix('\n').unwrap_or(&text)).ok()?;
    Some(identity_of(&metadata))
}

/// A read-only device can be opened for writing; only the first write would fail.
fn is_read_only(rdev: u64) -> bool {
    let node = format!("/sys/dev/block/{}:{}/ro", rustix::fs::major(rdev), rustix::fs::minor(rdev));
    std::fs::read_to_string(node).is_ok_and(|text| text.trim() == "1")
}

fn identify(file: &File) -> io::Result<Identity> {
    Ok(identity_of(&file.metadata()?))
}

fn identity_of(metadata: &std::fs::Metadata) -> Identity {
    if metadata.is_file() {
        Identity::File { dev: metadata.dev(), ino: metadata.ino() }
    } else if metadata.file_type().is_block_device() {
        Identity::Device { rdev: metadata.rdev() }
    } else {
        Identity::Other
    }
}

fn stream(fd: impl AsFd, name: String) -> Result<End> {
    let file =
        File::from(fd.as_fd().try_clone_to_owned().map_err(|error| Error::io("cannot use", &name, error))?);
    let metadata = file.metadata().map_err(|error| Error::io("cannot use", &name, error))?;
    if metadata.is_dir() {
        return Err(wrong_kind(&name, metadata.file_type()));
    }
    let identity = identity_of(&metadata);
    Ok(End { handle: Handle::File(file.into()), stream: true, name, identity })
}

/// Is it `-`?
pub fn is_dash(path: &Path) -> bool {
    path.as_os_str() == "-"
}

fn wrong_kind(name: &str, kind: std::fs::FileType) -> Error {
    let what = if kind.is_dir() {
        "a directory"
    } else if kind.is_char_device() {
        "a character device"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "something else"
    };
    let error = Error::usage(format!("{name} is {what}, not a file, block device or pipe"));
    if kind.is_char_device() { error.hint("use `-` and redirect it") } else { error }
}

fn in_use(name: &str, error: io::Error) -> Error {
    if error.kind() == io::ErrorKind::ResourceBusy {
        Error::new(ErrorKind::Conflict, format!("{name} is in use (mounted, or held by another program)"))
            .hint(format!("`lsblk {name}` tells by whom"))
    } else {
        Error::io("cannot open", name, error)
    }
}

/// The directory and the file name of a path.
pub fn split(path: &Path) -> Result<(PathBuf, String)> {
    let shown = path.display();
    let name = path.file_name().ok_or_else(|| Error::usage(format!("{shown} does not name a file")))?;
    let name = name
        .to_str()
        .ok_or_else(|| Error::new(ErrorKind::Unsupported, format!("{shown}: file names must be UTF-8")))?;
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    Ok((parent.to_owned(), name.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn refused(result: Result<Sink>) -> Error {
        match result {
            Ok(_) => panic!("accepted"),
            Err(error) => error,
        }
    }

    #[test]
    fn the_same_file_is_found_under_every_name() {
        let dir = tempfile::tempdir().expect("dir");
        let (file, hard, soft) = (dir.path().join("a"), dir.path().join("b"), dir.path().join("c"));
        fs::write(&file, "x").expect("write");
        fs::hard_link(&file, &hard).expect("link");
        std::os::unix::fs::symlink("a", &soft).expect("symlink");
        let source = open_readable(&file, "SRC").expect("open");
        for path in [&file, &hard, &soft] {
            // --force must not help.
            let error = refused(inspect_sink(path, &source, true, 0o666));
            assert_eq!(error.failure.kind, ErrorKind::Invalid, "{error}");
        }
        let again = open_readable(&hard, "DST").expect("open");
        assert!(refuse_same_ends(&source, &again).is_err());
    }

    #[test]
    fn an_existing_file_is_kept_unless_empty_or_forced() {
        let dir = tempfile::tempdir().expect("dir");
        let (file, full, empty) = (dir.path().join("a"), dir.path().join("full"), dir.path().join("empty"));
        fs::write(&file, "x").expect("write");
        fs::write(&full, "y").expect("write");
        fs::write(&empty, "").expect("write");
        let source = open_readable(&file, "SRC").expect("open");
        assert_eq!(refused(inspect_sink(&full, &source, false, 0o666)).failure.kind, ErrorKind::Conflict);
        assert!(matches!(inspect_sink(&full, &source, true, 0o666), Ok(Sink::New(_))));
        assert!(matches!(inspect_sink(&empty, &source, false, 0o666), Ok(Sink::New(_))));
        assert!(matches!(inspect_sink(&dir.path().join("new"), &source, false, 0o666), Ok(Sink::New(_))));
        assert_eq!(fs::read_to_string(&full).expect("read"), "y", "inspecting changes nothing");
        assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 3, "inspecting creates nothing");
    }

    #[test]
    fn other_kinds_are_refused_by_name() {
        let dir = tempfile::tempdir().expect("dir");
        let file = dir.path().join("a");
        fs::write(&file, "x").expect("write");
        let source = open_readable(&file, "SRC").expect("open");
        assert!(
            refused(inspect_sink(dir.path(), &source, true, 0o666)).to_string().contains("is a directory")
        );
        assert!(
            refused(inspect_sink(Path::new("/dev/null"), &source, true, 0o666))
                .to_string()
                .contains("is a character device")
        );
        let dangling = dir.path().join("d");
        std::os::unix::fs::symlink("nowhere", &dangling).expect("symlink");
        assert!(refused(inspect_sink(&dangling, &source, true, 0o666)).to_string().contains("to nothing"));
        let error = refused(inspect_sink(Path::new("rbd:pool/image"), &source, true, 0o666));
        assert_eq!(error.failure.kind, ErrorKind::Unsupported);
    }

    #[test]
    fn a_volume_of_a_server_is_named_and_not_yet_connected_to() {
        let uri = Path::new("nbd+unix:///x?socket=/nowhere/sock");
        let source = open_readable(uri, "SRC").unwrap_or_else(|error| panic!("{error}"));
        assert!(
            source.remote().is_some() && !source.stream && source.device().is_none() && !source.is_file()
        );
        assert!(source.file().is_err());
        let error = refused(inspect_sink(uri, &source, true, 0o666));
        assert!(error.to_string().contains("both source and sink"), "{error}");
        let blank = |force| {
            let sink = inspect_sink(Path::new("nbd+unix:///y?socket=/nowhere/sock"), &source, force, 0o666);
            let Ok(Sink::Open(end)) = sink else { panic!("not taken") };
            end.remote().and_then(|remote| remote.blank_bytes)
        };
        assert_eq!((blank(false), blank(true)), (Some(1 << 20), None), "--force needs no look");
        assert!(open_volume(Path::new("nbd://h"), "VOLUME", Access::Replace).is_ok());
    }

    #[test]
    fn an_update_needs_a_copy_that_is_there() {
        let dir = tempfile::tempdir().expect("dir");
        let (file, copy) = (dir.path().join("a"), dir.path().join("b"));
        fs::write(&file, "x").expect("write");
        let source = open_readable(&file, "SRC").expect("open");
        let error = refused(open_copy(&copy, &source));
        assert!(error.to_string().contains("leave it out for a new one"), "{error}");
        assert!(refused(open_copy(&file, &source)).to_string().contains("both source and sink"));
        assert!(refused(open_copy(Path::new("-"), &source)).to_string().contains("stream"));
        fs::write(&copy, "y").expect("write");
        assert!(open_copy(&copy, &source).is_ok());
        assert_eq!(fs::read_to_string(&copy).expect("read"), "y");
    }
}
