//! The thread that accepts and haggles, for all listening sockets of all exports.
//!
//! It never blocks, and a client costs it some KiB for [`limits::HAGGLE_TIME`] at most. Who is kept out when many come:
//!
//! | | |
//! |---|---|
//! | a peer with [`limits::HAGGLERS_PER_PEER_MAX`] clients | its newcomer, or its oldest client if that one hangs |
//! | more than [`limits::HAGGLERS_MAX`] clients | the oldest of the peer that has most, on the listening socket that has most |
//! | half of all connections there can be | of one owner's exports (not root's): whoever wants more of them, with an error |
//! | no descriptors left | nobody: accepting pauses, and the kernel's queue holds |
//!
//! Clients that have agreed are not here any more, so nothing of this touches them. A listening socket is its owner's, who can still
//! do anything to it: what it is (`listen` and its kind) is checked when it comes, and one that breaks is dropped.
//!
//! Who may connect to a Unix socket: its owner, root, and whom the owner named; the kernel says who it is. Others are closed without a
//! byte, and logged by number once in a while.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use proto::export::ExportId;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, sockopt};
use rustls::ServerConfig;

use crate::error::{Error, ErrorKind, Result};
use crate::export::nbd::Negotiated;
use crate::export::nbd::caller::{Caller, Progress};
use crate::export::nbd::haggle::{Agreed, Catalogue, Offer};
use crate::export::nbd::shelf::Shelf;
use crate::export::nbd::stuck::Watch;
use crate::export::nbd::tls::TlsStream;
use crate::limits;

/// A listening socket's number: unique in one daemon's lifetime.
pub type ListenerId = u64;

/// A listening socket, with what it leads to.
pub struct Listening {
    /// Bound and listening: a stream socket, Unix or TCP.
    pub socket: OwnedFd,
    /// As typed, for messages.
    pub address: String,
    /// Who may connect, if it is a Unix socket.
    pub access: Access,
    /// TLS, demanded of every client.
    pub tls: Option<Arc<ServerConfig>>,
    /// What clients can have.
    pub shelf: Arc<Shelf>,
}

/// Who may connect to a Unix socket, besides root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Access {
    /// Whose socket it is.
    pub owner: u32,
    /// Other users.
    pub uids: Vec<u32>,
    /// Whoever the socket's mode admits.
    pub any_uid: bool,
}

impl Access {
    fn admits(&self, uid: u32) -> bool {
        self.any_uid || uid == 0 || uid == self.owner || self.uids.contains(&uid)
    }
}

/// Where a client goes when it has agreed. Must not block.
pub type Deliver = Box<dyn Fn(Negotiated) + Send>;

/// The thread, as others see it. It leaves when this is dropped.
pub struct Haggler {
    mailbox: Arc<Mailbox>,
    next: AtomicU64,
    thread: Option<JoinHandle<()>>,
}

struct Mailbox {
    news: Mutex<Vec<News>>,
    wake: OwnedFd,
}

enum News {
    Add(ListenerId, Listening),
    Remove(ListenerId),
    Leave,
}

impl Mailbox {
    fn post(&self, news: News) {
        self.news.lock().unwrap_or_else(PoisonError::into_inner).push(news);
        // Full is as good as written: it is readable.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

impl Haggler {
    /// Start the thread. `places` is how many connections can be served at all: half of them at most go to the exports of one owner,
    /// who is not root, so that no user can keep all others from serving.
    ///
    /// # Errors
    /// Out of descriptors or threads.
    pub fn start(deliver: Deliver, places: u32) -> Result<Self> {
        let failed = |error: Errno| Error::io("cannot set up the thread that haggles", error);
        let wake =
            rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(failed)?;
        let mailbox = Arc::new(Mailbox { news: Mutex::default(), wake });
        let epoll = epoll::create(CreateFlags::CLOEXEC).map_err(failed)?;
        epoll::add(&epoll, &mailbox.wake, EventData::new_u64(WAKER), EventFlags::IN).map_err(failed)?;
        let hall = Hall {
            epoll,
            mailbox: mailbox.clone(),
            watch: Watch::start()?,
            deliver,
            places_of_owner: places / 2,
            doors: HashMap::new(),
            guests: BTreeMap::new(),
            next: FIRST_GUEST,
            accept_again: None,
            scratch: vec![0; READ_BYTES].into_boxed_slice(),
        };
        let thread = std::thread::Builder::new()
            .name("nbd-haggle".to_owned())
            .spawn(move || hall.run())
            .map_err(|error| Error::io("cannot start the thread that haggles", error))?;
        Ok(Self { mailbox, next: AtomicU64::new(1), thread: Some(thread) })
    }

    /// Let clients in at a socket.
    ///
    /// # Errors
    /// `Invalid`: not a listening stream socket, Unix or TCP.
    pub fn add_listener(&self, listening: Listening) -> Result<ListenerId> {
        check(&listening.socket).map_err(|error| error.at(&listening.address))?;
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.mailbox.post(News::Add(id, listening));
        Ok(id)
    }

    /// No new clients here; those that haggle are disconnected. The socket is closed soon after.
    pub fn remove_listener(&self, id: ListenerId) {
        self.mailbox.post(News::Remove(id));
    }
}

impl Drop for Haggler {
    fn drop(&mut self) {
        self.mailbox.post(News::Leave);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What a caller passed must be what it says.
fn check(socket: &OwnedFd) -> Result<()> {
    let fits = || -> Result<bool, Errno> {
        let family = sockopt::socket_domain(socket)?;
        let known = [AddressFamily::UNIX, AddressFamily::INET, AddressFamily::INET6].contains(&family);
        let kind = sockopt::socket_type(socket)?;
        Ok(known && kind == SocketType::STREAM && sockopt::socket_acceptconn(socket)?)
    };
    match fits() {
        Ok(true) => Ok(()),
        Ok(false) | Err(Errno::NOTSOCK) => {
            Err(Error::new(ErrorKind::Invalid, "not a listening socket, Unix or TCP"))
        }
        Err(error) => Err(Error::io("cannot use the listening socket", error)),
    }
}

/// Keys of epoll: the mailbox, then listening sockets with [`DOOR`] set, and clients without.
const WAKER: u64 = 0;
const FIRST_GUEST: u64 = 1;
const DOOR: u64 = 1 << 63;
/// Bytes read at once.
const READ_BYTES: usize = 16 << 10;

/// Who a client is, as far as bounds go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Peer {
    User(u32),
    /// An IPv6 address stands for the 64 bits of its network: the rest is for its owner to choose.
    Address(IpAddr),
}

impl Peer {
    fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V6(address) => {
                Self::Address(IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX))))
            }
            other => Self::Address(other),
        }
    }
}

/// A listening socket in the loop.
struct Door {
    socket: Arc<OwnedFd>,
    address: String,
    access: Access,
    tls: Option<Arc<ServerConfig>>,
    shelf: Arc<Shelf>,
    /// The kernel knows who comes.
    unix: bool,
    /// Refused since it was logged last.
    refused: u64,
    refused_logged: Option<Instant>,
}

/// A client in the loop. Older ones have smaller keys.
struct Guest {
    caller: Caller,
    door: ListenerId,
    peer: Peer,
    since: Instant,
    waits_for: EventFlags,
}

/// The loop.
struct Hall {
    epoll: OwnedFd,
    mailbox: Arc<Mailbox>,
    watch: Watch,
    deliver: Deliver,
    /// Connections that one owner's exports may have.
    places_of_owner: u32,
    doors: HashMap<ListenerId, Door>,
    guests: BTreeMap<u64, Guest>,
    next: u64,
    accept_again: Option<Instant>,
    scratch: Box<[u8]>,
}

impl Hall {
    fn run(mut self) {
        let mut events = Vec::with_capacity(256);
        loop {
            events.clear();
            let timeout = self.timeout(Instant::now());
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "epoll failed: no new clients of exports any more");
                    return;
                }
            }
            let now = Instant::now();
            for event in &events {
                match event.data.u64() {
                    WAKER => {
                        if !self.read_news() {
                            return;
                        }
                    }
                    key if key & DOOR != 0 => self.accept(key & !DOOR, now),
                    key => self.drive(key),
                }
            }
            self.keep_time(Instant::now());
        }
    }

    // ---- time

    fn timeout(&self, now: Instant) -> Option<Timespec> {
        let oldest = self.guests.first_key_value().map(|(_, guest)| guest.since + limits::HAGGLE_TIME);
        let first = [oldest, self.accept_again].into_iter().flatten().min()?;
        // Rounded up: waking a moment early would only go round once more.
        Timespec::try_from(first.saturating_duration_since(now) + Duration::from_millis(1)).ok()
    }

    fn keep_time(&mut self, now: Instant) {
        if self.accept_again.is_some_and(|at| now >= at) {
            self.accept_again = None;
            self.watch_doors(EventFlags::IN);
        }
        while let Some((&key, guest)) = self.guests.first_key_value() {
            if now < guest.since + limits::HAGGLE_TIME {
                return;
            }
            tracing::debug!(peer = ?guest.peer, "a client did not end haggling in time: disconnected");
            self.guests.remove(&key);
        }
    }

    // ---- listening sockets

    /// `false`: leave.
    fn read_news(&mut self) -> bool {
        let _ = rustix::io::read(&self.mailbox.wake, &mut [0; 8]);
        let news = std::mem::take(&mut *self.mailbox.news.lock().unwrap_or_else(PoisonError::into_inner));
        for news in news {
            match news {
                News::Add(id, listening) => self.add(id, listening),
                News::Remove(id) => {
                    // Closing does not take it out of the set: others have the socket, too.
                    if let Some(door) = self.doors.remove(&id) {
                        let _ = epoll::delete(&self.epoll, &door.socket);
                    }
                    self.guests.retain(|_, guest| guest.door != id);
                }
                News::Leave => return false,
            }
        }
        true
    }

    fn add(&mut self, id: ListenerId, listening: Listening) {
        let flags = if self.accept_again.is_some() { EventFlags::empty() } else { EventFlags::IN };
        let Listening { socket, address, access, tls, shelf } = listening;
        let unix = sockopt::socket_domain(&socket) == Ok(AddressFamily::UNIX);
        if let Err(error) = epoll::add(&self.epoll, &socket, EventData::new_u64(id | DOOR), flags) {
            return tracing::error!(%error, address, "cannot watch a listening socket");
        }
        let socket = Arc::new(socket);
        let door = Door { socket, address, access, tls, shelf, unix, refused: 0, refused_logged: None };
        self.doors.insert(id, door);
    }

    fn watch_doors(&self, flags: EventFlags) {
        for (id, door) in &self.doors {
            let _ = epoll::modify(&self.epoll, &door.socket, EventData::new_u64(id | DOOR), flags);
        }
    }

    // ---- arrivals

    fn accept(&mut self, id: ListenerId, now: Instant) {
        for _ in 0..limits::ACCEPTS_PER_TURN {
            let Some(door) = self.doors.get(&id) else { return };
            match self.watch.accept(&door.socket) {
                Ok((socket, address)) => self.admit(id, socket, address, now),
                Err(Errno::AGAIN) => return,
                Err(Errno::NFILE | Errno::MFILE | Errno::NOBUFS | Errno::NOMEM) => {
                    tracing::warn!("no descriptors or memory for a client of an export; trying again soon");
                    self.watch_doors(EventFlags::empty());
                    self.accept_again = Some(now + limits::ACCEPT_PAUSE);
                    return;
                }
                // It does not listen any more: its owner shut it down. Watching it would only keep this thread busy.
                Err(error @ (Errno::INVAL | Errno::BADF | Errno::NOTSOCK | Errno::OPNOTSUPP)) => {
                    let address = &door.address;
                    tracing::warn!(%error, address, "a listening socket does not listen any more");
                    let _ = epoll::delete(&self.epoll, &door.socket);
                    return;
                }
                // Errors of the connection that would have been: the next one may be fine.
                Err(_) => {}
            }
        }
    }

    fn admit(
        &mut self,
        id: ListenerId,
        socket: OwnedFd,
        address: Option<std::net::SocketAddr>,
        now: Instant,
    ) {
        let Some(door) = self.doors.get_mut(&id) else { return };
        let peer = if door.unix {
            let uid = sockopt::socket_peercred(&socket).map(|credentials| credentials.uid.as_raw());
            match uid {
                Ok(uid) if door.access.admits(uid) => Peer::User(uid),
                Ok(uid) => return door.refuse(&format!("user {uid} may not connect"), now),
                Err(error) => return door.refuse(&format!("a client without credentials: {error}"), now),
            }
        } else {
            let Some(address) = address else { return };
            if prepare(&socket).is_err() {
                return;
            }
            Peer::of(address.ip())
        };
        let caller = Caller::new(socket, door.tls.clone());
        if !self.make_room(id, peer, now) {
            return;
        }
        let key = self.next;
        self.next += 1;
        if epoll::add(&self.epoll, &caller, EventData::new_u64(key), EventFlags::IN).is_err() {
            return;
        }
        let guest = Guest { caller, door: id, peer, since: now, waits_for: EventFlags::IN };
        self.guests.insert(key, guest);
        self.drive(key);
    }

    /// Is there room for one more client of this peer? Made, if need be, at the cost of who has most.
    fn make_room(&mut self, door: ListenerId, peer: Peer, now: Instant) -> bool {
        let mut of_peer = self.guests.iter().filter(|(_, guest)| guest.door == door && guest.peer == peer);
        let oldest = of_peer.next().map(|(&key, guest)| (key, guest.since));
        if let Some((key, since)) = oldest
            && 1 + of_peer.count() >= limits::HAGGLERS_PER_PEER_MAX
        {
            if now.saturating_duration_since(since) < limits::HAGGLE_GRACE {
                return false;
            }
            self.guests.remove(&key);
        }
        if self.guests.len() >= limits::HAGGLERS_MAX {
            let heaviest = |counts: BTreeMap<(ListenerId, Option<Peer>), usize>| {
                counts.into_iter().max_by_key(|(_, count)| *count).map(|(who, _)| who)
            };
            let mut doors = BTreeMap::new();
            self.guests.values().for_each(|guest| *doors.entry((guest.door, None)).or_insert(0) += 1);
            let Some((most, _)) = heaviest(doors) else { return true };
            let mut peers = BTreeMap::new();
            self.guests
                .values()
                .filter(|guest| guest.door == most)
                .for_each(|guest| *peers.entry((most, Some(guest.peer))).or_insert(0) += 1);
            let Some((_, Some(peer))) = heaviest(peers) else { return true };
            let victim = self.guests.iter().find(|(_, guest)| guest.door == most && guest.peer == peer);
            if let Some((&key, _)) = victim {
                self.guests.remove(&key);
            }
        }
        true
    }

    // ---- haggling

    fn drive(&mut self, key: u64) {
        // It may have been disconnected since the event.
        let Some(guest) = self.guests.get_mut(&key) else { return };
        let Some(door) = self.doors.get(&guest.door) else { return };
        let (owner, most) = (door.access.owner, self.places_of_owner);
        let theirs = || self.doors.values().filter(|door| door.access.owner == owner);
        let crowded = || owner != 0 && theirs().map(|door| door.shelf.connections()).sum::<u32>() >= most;
        let offers = Bounded { shelf: &door.shelf, crowded: &crowded };
        match guest.caller.drive(&offers, &mut self.scratch) {
            Progress::Waits(flags) => {
                if flags != guest.waits_for {
                    guest.waits_for = flags;
                    epoll::modify(&self.epoll, &guest.caller, EventData::new_u64(key), flags)
                        .expect("a client is in the set as long as it is here");
                }
            }
            Progress::Over(fault) => {
                let guest = self.guests.remove(&key).expect("it was just here");
                if let (Some(fault), Some(door)) = (fault, self.doors.get_mut(&guest.door)) {
                    door.refuse(&format!("{:?}: {fault}", guest.peer), Instant::now());
                }
            }
            Progress::Agreed(agreed) => {
                let shelf = door.shelf.clone();
                let guest = self.guests.remove(&key).expect("it was just here");
                let _ = epoll::delete(&self.epoll, &guest.caller);
                self.hand_over(guest.caller.into_parts(), agreed, &shelf);
            }
        }
    }

    fn hand_over(&self, (socket, tls): (OwnedFd, Option<Box<TlsStream>>), agreed: Agreed, shelf: &Shelf) {
        // Gone in the moment between: the client sees the connection end, as those before it do.
        let Some(seat) = shelf.seat(agreed.id) else { return };
        let export = seat.export().clone();
        let Agreed { style, allocation, early, .. } = agreed;
        (self.deliver)(Negotiated { socket, export, seat, style, allocation, early, tls });
    }
}

/// The exports of a socket, all of which are full when their owner has no place left.
struct Bounded<'a> {
    shelf: &'a Shelf,
    crowded: &'a dyn Fn() -> bool,
}

impl Catalogue for Bounded<'_> {
    fn find(&self, name: &str) -> Option<Offer> {
        let offer = self.shelf.find(name)?;
        Some(Offer { full: offer.full || (self.crowded)(), ..offer })
    }

    fn after(&self, id: ExportId) -> Option<Offer> {
        self.shelf.after(id)
    }
}

impl Door {
    /// Somebody who may not be here. Logged by number, or whoever may not be here could fill the log.
    fn refuse(&mut self, why: &str, now: Instant) {
        self.refused += 1;
        let lately = |at| now.saturating_duration_since(at) < limits::REFUSED_LOG_TIME;
        if !self.refused_logged.is_some_and(lately) {
            let (address, refused) = (&self.address, self.refused);
            tracing::warn!(address, refused, "a client of an export was refused: {why}");
            self.refused_logged = Some(now);
            self.refused = 0;
        }
    }
}

/// A TCP connection: answers are not held back, dead clients are noticed, and closing never waits, whatever the listening socket
/// was set to.
fn prepare(socket: &OwnedFd) -> Result<(), Errno> {
    sockopt::set_socket_linger(socket, None)?;
    sockopt::set_tcp_nodelay(socket, true)?;
    sockopt::set_socket_keepalive(socket, true)
}

#[cfg(test)]
mod tests;
