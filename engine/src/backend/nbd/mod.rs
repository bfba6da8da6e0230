//! Volumes on the other end of a connection: an NBD client behind the seams of this module.
//!
//! | file | its one purpose |
//! |---|---|
//! | `mod` | a remote volume, and how everything that carries a file finds it |
//! | `connect` | haggling as a client |
//! | `session` | requests and replies of one connection, as bytes |
//! | `coverage` | which bytes of a reply have arrived |
//! | `connection` | the socket, and what happens when it breaks |
//! | `reconnect` | connecting again |
//! | `extents` | block status: zeros, dirty bitmaps |
//! | `queue` | a queue over a queue: operations on a remote port become requests |
//! | `transport` | bytes of a connection, plain or under TLS |
//! | `tls` | TLS: whom to trust, and bytes through it |
//!
//! Whatever carries a file (`Arc<OwnedFd>`) carries a remote volume as well, and where it is attached to a queue, the queue finds
//! out ([`find`]). Why not an enum in place of the descriptor: a hundred places that only hand it on would have to know. The descriptor
//! that stands for a volume is that of an empty, sealed file in memory, one for each export of a server: locks on it (`flock`, ranges)
//! keep out whoever else in this process has the same export open, and its inode says what is the same. Nothing can be written to
//! it, and reading finds its end, should it ever be taken for what it is not.

pub mod connect;
mod connection;
mod coverage;
mod extents;
pub mod queue;
mod reconnect;
mod session;
#[cfg(test)]
mod tests;
pub mod tls;
mod transport;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use proto::remote::Remote;
use rustix::fs::{FileType, MemfdFlags, Mode, OFlags, SealFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, sockopt};

use crate::backend::device::{Device, Purpose};
use crate::backend::nbd::connect::{Facts, Wish};
use crate::backend::nbd::connection::{Connection, Shared};
use crate::backend::nbd::reconnect::Again;
use crate::backend::nbd::tls::{Credentials, Means};
use crate::error::{Error, ErrorKind, Result};
use crate::format::nbd::flags;

use extents::Kept;
pub use extents::{marked, silent_of_holes};

/// How long the first connection may haggle before the others are given up for its sake.
const SPARE_WAIT: Duration = Duration::from_secs(1);
/// How long one of the others may haggle.
const SPARE_HAGGLE_WAIT: Duration = Duration::from_secs(2);
/// How long a server may take until an export can be used.
const OPEN_WAIT: Duration = Duration::from_secs(10);
/// How long to try to connect again where nothing was said, milliseconds.
const RECONNECT_MS: u32 = 10_000;
/// Connections of one volume: workers enough for any machine.
const CONNECTIONS_MAX: usize = 64;

/// A volume that a server exports.
pub struct Volume {
    shared: Arc<Shared>,
    connections: Vec<Arc<Connection>>,
    /// What may be something else than zeros, once somebody has learned it.
    data: OnceLock<Kept>,
    /// What stands for the export in this process.
    _anchor: Arc<OwnedFd>,
}

impl Volume {
    /// What the server said of it.
    #[must_use]
    pub fn facts(&self) -> &Facts {
        &self.shared.facts
    }

    /// Connections: more workers than these share them.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    /// Can what was written be made durable? Otherwise the server does as it likes, and a flush says nothing.
    #[must_use]
    pub fn can_flush(&self) -> bool {
        self.facts().has(flags::SEND_FLUSH)
    }

    /// The connection that the fewest queues use; one more from now on.
    fn take_connection(&self) -> Arc<Connection> {
        let users = |connection: &&Arc<Connection>| connection.users().load(Ordering::Acquire);
        let connection = self.connections.iter().min_by_key(users).expect("a volume has a connection");
        connection.users().fetch_add(1, Ordering::AcqRel);
        Arc::clone(connection)
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        for connection in &self.connections {
            connection.leave();
        }
    }
}

impl std::fmt::Debug for Volume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Volume({})", self.shared.wish.name)
    }
}

/// Volumes that are open, by the descriptors that stand for them.
#[derive(Default)]
struct Register {
    open: Vec<(Weak<OwnedFd>, Arc<Volume>)>,
    /// The files in memory, by server and export.
    anchors: Option<HashMap<String, Weak<OwnedFd>>>,
}

static REGISTER: Mutex<Register> = Mutex::new(Register { open: Vec::new(), anchors: None });

fn register() -> MutexGuard<'static, Register> {
    REGISTER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The remote volume that a descriptor stands for, if it does.
#[must_use]
pub fn find(file: &Arc<OwnedFd>) -> Option<Arc<Volume>> {
    let register = register();
    let found = register.open.iter().find(|(open, _)| std::ptr::eq(open.as_ptr(), Arc::as_ptr(file)));
    found.map(|(_, volume)| Arc::clone(volume))
}

/// Keeps a volume in use; when it goes, volumes whose descriptors are gone are closed. Holders declare it behind the descriptor.
#[derive(Debug)]
pub struct Lease(Option<Arc<Volume>>);

impl Lease {
    /// Of this volume.
    #[must_use]
    pub fn of(volume: Arc<Volume>) -> Self {
        Self(Some(volume))
    }

    /// The volume.
    ///
    /// # Panics
    /// Never: it is there until the lease goes.
    #[must_use]
    pub fn volume(&self) -> &Volume {
        self.0.as_ref().expect("there until dropped")
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.0 = None;
        close_unused();
    }
}

/// Close the volumes whose descriptors are gone. For who lets go of a descriptor that may have outlived its [`Lease`]: a server that
/// takes few clients keeps the next one waiting until then.
pub fn close_unused() {
    let mut register = register();
    let gone: Vec<_> = register.open.extract_if(.., |(file, _)| file.strong_count() == 0).collect();
    if let Some(anchors) = &mut register.anchors {
        anchors.retain(|_, anchor| anchor.strong_count() > 0);
    }
    drop(register);
    // Closing talks to servers, which nobody else needs to wait for.
    drop(gone);
}

/// Haggle with a server over connections the caller made (the first is the volume's, the others are used if the server allows several),
/// and look at the export. Blocks for at most some seconds. Connections that break are made again if `remote` has an address, which
/// is left in it for callers only who may go there. `tls` is what the descriptors of [`Remote::tls`] held.
///
/// # Errors
/// `Io`: the connection broke or the server does not answer; `NotFound`: no such export; `Denied`: by the server's policy, or it
/// is read-only where it is to be written; `Unsupported`: it lacks what is needed.
pub fn open(
    connections: Vec<OwnedFd>,
    remote: &Remote,
    tls: Option<&Credentials>,
    name: &str,
    purpose: Purpose,
) -> Result<Device> {
    let refuse = |kind, what: String| Err(Error::new(kind, what).at(name));
    if connections.len() > CONNECTIONS_MAX {
        return refuse(ErrorKind::Limit, format!("more than {CONNECTIONS_MAX} connections to one volume"));
    }
    if purpose.stream {
        return refuse(ErrorKind::Invalid, "an NBD export is no stream".to_owned());
    }
    let deadline = Instant::now() + OPEN_WAIT;
    if remote.tls.is_some() != tls.is_some() {
        return refuse(ErrorKind::Internal, "TLS was demanded, and is not there".to_owned());
    }
    let tls = tls.map(Means::of).transpose().map_err(|error| error.at(name))?;
    let wish =
        Wish { export: remote.export.clone(), context: remote.bitmap.clone(), name: name.to_owned(), tls };
    let within = Duration::from_millis(remote.reconnect_ms.unwrap_or(RECONNECT_MS).into());
    let again = remote.address.clone().filter(|_| !within.is_zero()).map(|address| Again { address, within });
    if let Some(again) = &again {
        reconnect::check(&again.address).map_err(|error| error.at(name))?;
    }
    let mut connections = connections.into_iter();
    let Some(first) = connections.next() else {
        return refuse(ErrorKind::Invalid, "no connection to the NBD server".to_owned());
    };
    let identity = identity(&first, &remote.export);
    let mut spare: Vec<OwnedFd> = connections.collect();
    let (transport, facts) =
        beside_silence(&mut spare, || connect::haggle(connect::prepare(first, name)?, &wish, deadline))?;
    if purpose.write && facts.has(flags::READ_ONLY) {
        return refuse(ErrorKind::Denied, "the NBD server exports it read-only".to_owned());
    }
    if purpose.write && !facts.has(flags::SEND_FLUSH) {
        tracing::warn!("{name}: the NBD server cannot flush: nothing says when what is written is durable");
    }
    let shared = Arc::new(Shared::new(wish, facts.clone(), purpose.write, again));
    let mut all = vec![Arc::new(Connection::new(Arc::clone(&shared), transport, &facts))];
    if !facts.has(flags::CAN_MULTI_CONN) {
        hang_up(&spare);
        spare.clear();
    }
    all.extend(take_spares(spare, &shared, deadline)?);
    let anchor = anchor(identity).map_err(|error| error.at(name))?;
    let file = Arc::new(handle(&anchor).map_err(|error| error.at(name))?);
    let volume = Arc::new(Volume { shared, connections: all, data: OnceLock::new(), _anchor: anchor });
    register().open.push((Arc::downgrade(&file), Arc::clone(&volume)));
    Device::from_remote(file, Lease::of(volume), name, purpose)
}

/// Connections that are not used are ended at once, and not when the caller, too, has let go of them.
fn hang_up(connections: &[OwnedFd]) {
    for connection in connections {
        // It may have ended by itself.
        let _ = rustix::net::shutdown(connection, rustix::net::Shutdown::Both);
    }
}

/// Haggle on the first of several connections. Some servers take one client at a time, and wait for the first word of one of the
/// others: if it takes long, those are hung up on, and none is left.
fn beside_silence<T>(others: &mut Vec<OwnedFd>, haggle: impl FnOnce() -> Result<T>) -> Result<T> {
    if others.is_empty() {
        return haggle();
    }
    let (over, waits) = crossbeam::channel::bounded::<()>(0);
    let haggled = std::thread::scope(|scope| {
        let silence = || {
            if waits.recv_timeout(SPARE_WAIT) == Err(crossbeam::channel::RecvTimeoutError::Timeout) {
                hang_up(&*others);
                others.clear();
            }
        };
        match std::thread::Builder::new().name("nbd-spares".to_owned()).spawn_scoped(scope, silence) {
            Ok(_) => {
                let haggled = haggle();
                drop(over);
                Ok(haggled)
            }
            // The machine is short of threads, and spares are a luxury.
            Err(_) => Err(haggle),
        }
    });
    haggled.unwrap_or_else(|haggle| {
        hang_up(&*others);
        others.clear();
        haggle()
    })
}

/// Haggle on the connections beside the first, each of which may be refused or left waiting by a server that takes few clients: from the
/// first such one on none is used.
///
/// # Errors
/// `Conflict`: one leads to another export.
fn take_spares(
    spares: Vec<OwnedFd>,
    shared: &Arc<Shared>,
    deadline: Instant,
) -> Result<Vec<Arc<Connection>>> {
    let name = &shared.wish.name;
    let wanted = spares.len();
    let mut taken = Vec::with_capacity(wanted);
    let mut left = spares.into_iter();
    while let Some(spare) = left.next() {
        let until = deadline.min(Instant::now() + SPARE_HAGGLE_WAIT);
        let haggled = connect::prepare(spare, name).and_then(|transport| {
            let socket = Arc::clone(transport.socket());
            connect::haggle(transport, &shared.wish, until)
                .inspect_err(|_| hang_up(std::slice::from_ref(&*socket)))
        });
        match haggled {
            Ok((_, other)) if !other.is_same_as(&shared.facts) => {
                let what = "the connections lead to different exports";
                return Err(Error::new(ErrorKind::Conflict, what).at(name));
            }
            Ok((transport, other)) => {
                taken.push(Arc::new(Connection::new(Arc::clone(shared), transport, &other)));
            }
            Err(error) => {
                hang_up(left.as_slice());
                let usable = taken.len() + 1;
                tracing::info!("{usable} of {} connections are used: {}", wanted + 1, error.chain());
                break;
            }
        }
    }
    Ok(taken)
}

/// What is the same export of the same server: where the connection leads, whatever way that was named. A server that
/// is reached at addresses of several machines cannot be told to be one.
fn identity(socket: &OwnedFd, export: &str) -> String {
    // Without an address it is its own.
    let nobodys = || format!("descriptor:{}:{:?}", socket.as_raw_fd(), Instant::now());
    let peer = rustix::net::getpeername(socket).ok().flatten();
    let server = peer.map_or_else(nobodys, |peer| match peer.address_family() {
        AddressFamily::UNIX => {
            let unix = SocketAddrUnix::try_from(peer).ok();
            unix.and_then(|address| server_by_path(socket, &address)).unwrap_or_else(nobodys)
        }
        AddressFamily::INET | AddressFamily::INET6 => {
            SocketAddr::try_from(peer).map_or_else(|_| nobodys(), |place| server_by_number(socket, place))
        }
        _ => format!("{peer:?}"),
    });
    format!("{server}\0{export}")
}

/// The server behind a local socket: the inode, where we can see it, and not the path, of which there may be several.
fn server_by_path(socket: &OwnedFd, address: &SocketAddrUnix) -> Option<String> {
    // Without a name it looks abstract, too.
    if let Some(name) = address.abstract_name().filter(|name| !name.is_empty()) {
        return Some(format!("abstract:{}", name.escape_ascii()));
    }
    let path = address.path_bytes().filter(|path| !path.is_empty())?;
    let text = path.escape_ascii();
    if !path.starts_with(b"/") {
        // From wherever the server was when it bound it.
        let server = sockopt::socket_peercred(socket).ok()?;
        return Some(format!("unix:{}:{text}", server.pid));
    }
    let seen = rustix::fs::stat(path).ok();
    let seen = seen.filter(|seen| FileType::from_raw_mode(seen.st_mode) == FileType::Socket);
    Some(
        seen.map_or_else(
            || format!("unix:{text}"),
            |seen| format!("socket:{:x}:{}", seen.st_dev, seen.st_ino),
        ),
    )
}

/// The server at an address; one of this machine is the same at all of its addresses. So two servers that listen at one port of two of its
/// addresses (127.0.0.1 and 127.0.0.2) are taken for one, and cannot be both ends of a copy: from here they look like one that
/// listens everywhere, and to take one for two would cost the volume.
fn server_by_number(socket: &OwnedFd, place: SocketAddr) -> String {
    let (ip, port) = (place.ip().to_canonical(), place.port());
    // To an address of this machine one connects from that address.
    let own = rustix::net::getsockname(socket).ok().and_then(|own| SocketAddr::try_from(own).ok());
    if ip.is_loopback() || own.is_some_and(|own| own.ip().to_canonical() == ip) {
        return format!("here:{port}");
    }
    format!("tcp:{ip}:{port}")
}

/// The file that stands for an export; one for all who have it open.
fn anchor(identity: String) -> Result<Arc<OwnedFd>> {
    let mut register = register();
    let anchors = register.anchors.get_or_insert_default();
    if let Some(anchor) = anchors.get(&identity).and_then(Weak::upgrade) {
        return Ok(anchor);
    }
    let failed = |errno: rustix::io::Errno| Error::io("no file in memory", errno);
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create("nbd", flags).map_err(failed)?;
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    rustix::fs::fcntl_add_seals(&file, seals).map_err(failed)?;
    let anchor = Arc::new(file);
    anchors.insert(identity, Arc::downgrade(&anchor));
    Ok(anchor)
}

/// An open file of one's own on the anchor: locks belong to it.
fn handle(anchor: &OwnedFd) -> Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", anchor.as_raw_fd());
    rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| Error::io("cannot open a file in memory", errno))
}
