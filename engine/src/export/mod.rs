//! Exports: the plaintext of a volume, served to foreign programs while it stays encrypted on disk.
//!
//! | file | its one purpose |
//! |---|---|
//! | `mod` | the registry: numbers, listening sockets, names, who may join |
//! | `exported` | one export as its connections see it |
//! | `life` | one export as its owner sees it |
//! | `open` | from a request to an opened volume |
//! | `midway` | a volume in the middle of a re-encryption |
//! | `socket` | listening sockets as callers pass them |
//! | `front` | what the registry asks of the NBD server |
//! | `nbd` | the NBD server |
//!
//! An export is a source of slots for the workers, not a second pipeline: requests are received, read or decrypted, and sent by the
//! worker that owns the connection, on its own ring ([`crate::pipeline::service`]).
//!
//! The end of an export, on its keeper's thread:
//!
//! 1. its name leaves the listening socket: no new clients;
//! 2. clients are answered what they have asked for and closed, or after [`limits::EXPORT_DRAIN`] (or `now`) closed unanswered;
//! 3. nothing is in flight: what was written is made durable;
//! 4. if it was the last behind its socket, that is closed, and its name removed;
//! 5. key, device and what holds the volume go; 6. it is [`State::Stopped`], and whoever waits for that is told.

pub mod exported;
mod front;
pub mod life;
pub mod midway;
pub mod nbd;
pub mod open;
pub mod socket;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use proto::export::{ExportId, Info, Listen, Request, State, Stats};

use crate::crypto::Kernel;
use crate::error::{Error, ErrorKind, Result};
use crate::export::exported::{Course, Exported};
use crate::export::front::{Entrance, Front};
use crate::export::life::{End, Life};
use crate::export::open::{Closed, Opened};
use crate::export::socket::{Offered, Place};
use crate::job::Owner;
use crate::key::Descriptors;
use crate::limits;
use crate::pipeline::Pipeline;

/// How often a keeper looks whether clients have gone.
const DRAIN_POLL: Duration = Duration::from_millis(10);

/// All exports of this daemon. What is quick may be called from the control thread: everything but [`Exports::start`],
/// [`Exports::stats`] and [`Exports::wait_until_over`].
pub struct Exports {
    kernel: Kernel,
    pipeline: Arc<Pipeline>,
    front: Front,
    ended: Box<dyn Fn() + Send + Sync>,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    last: ExportId,
    lives: BTreeMap<ExportId, Arc<Life>>,
    sockets: Vec<Socket>,
    /// In the order they ended, the oldest end first.
    finished: VecDeque<ExportId>,
}

/// A listening socket with at least one export, if only one that is being opened.
struct Socket {
    address: String,
    uid: u32,
    tls: bool,
    door: Door,
    place: Option<Place>,
    exports: BTreeSet<ExportId>,
}

enum Door {
    /// Nobody is let in before the first export is open.
    Shut(Option<Box<Offered>>),
    Open(Entrance),
}

impl Table {
    fn check_room(&self, owner: &Owner) -> Result<()> {
        let active = |life: &&Arc<Life>| life.state() != State::Stopped;
        let all = self.lives.values().filter(active).count();
        let mine = self.lives.values().filter(active).filter(|life| life.owner.uid == owner.uid).count();
        let (count, whose, most) = if mine >= limits::EXPORTS_PER_USER_MAX {
            (mine, "a user may have", limits::EXPORTS_PER_USER_MAX)
        } else if all >= limits::EXPORTS_MAX {
            (all, "a daemon may have", limits::EXPORTS_MAX)
        } else {
            return Ok(());
        };
        Err(Error::new(ErrorKind::Limit, format!("{count} volumes are exported, and {whose} {most}"))
            .hint("stop one: cryptctl export stop"))
    }

    /// The socket an export is to be behind.
    fn socket(&mut self, owner: &Owner, request: &Request, offered: Option<Offered>) -> Result<&mut Socket> {
        match (&request.listen, offered) {
            (Listen::Bound(bound), Some(mut offered)) => {
                let place = offered.place.take();
                self.sockets.push(Socket {
                    address: bound.address.clone(),
                    uid: owner.uid,
                    tls: offered.tls.is_some(),
                    door: Door::Shut(Some(Box::new(offered))),
                    place,
                    exports: BTreeSet::new(),
                });
                Ok(self.sockets.last_mut().expect("just pushed"))
            }
            (Listen::Shared(address), _) => {
                // The latest, should an older one of this address be on its way out.
                let of_owner = |socket: &&mut Socket| socket.address == *address && socket.uid == owner.uid;
                let names: BTreeMap<ExportId, String> =
                    self.lives.iter().map(|(id, life)| (*id, life.name.clone())).collect();
                let socket = self.sockets.iter_mut().rev().find(of_owner).ok_or_else(|| {
                    Error::new(ErrorKind::NotFound, "no export of yours listens there")
                        .at(address)
                        .hint("cryptctl export list shows where exports listen")
                })?;
                if socket.exports.iter().any(|id| names.get(id) == Some(&request.name)) {
                    let what = if request.name.is_empty() {
                        "there is a default export (with the empty name) on this socket already".to_owned()
                    } else {
                        format!("there is an export {:?} on this socket already", request.name)
                    };
                    return Err(Error::new(ErrorKind::Conflict, what)
                        .at(address)
                        .hint("give this one another name: --name"));
                }
                Ok(socket)
            }
            (Listen::Bound(_), None) => Err(Error::new(ErrorKind::Internal, "a bound socket was not taken")),
        }
    }

    /// The socket of an export, while it has one.
    fn socket_of(&mut self, id: ExportId) -> Option<&mut Socket> {
        self.sockets.iter_mut().find(|socket| socket.exports.contains(&id))
    }
}

impl Exports {
    /// `ended` is called from other threads whenever an export has ended.
    pub fn new(kernel: Kernel, pipeline: Arc<Pipeline>, ended: Box<dyn Fn() + Send + Sync>) -> Arc<Self> {
        Arc::new(Self { kernel, pipeline, front: Front::default(), ended, table: Mutex::default() })
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Open a volume and serve it. Blocks for as long as its key is derived. `gone`: nobody waits for it any more. Returns warnings
    /// with the number.
    ///
    /// # Errors
    /// Anything wrong with the request, its volume, its key or its socket; nothing is served then.
    pub fn start(
        self: &Arc<Self>,
        owner: &Owner,
        request: &Request,
        descriptors: Vec<OwnedFd>,
        gone: &AtomicBool,
    ) -> Result<(ExportId, Vec<String>)> {
        check_texts(request)?;
        // Before any work is done for it.
        self.table().check_room(owner)?;
        let mut descriptors = Descriptors::new(descriptors);
        let closed = Closed::new(request, &mut descriptors)?;
        let offered = match &request.listen {
            Listen::Bound(bound) => Some(Offered::new(bound, &mut descriptors, owner)?),
            Listen::Shared(_) => None,
        };
        descriptors.finish()?;
        let life = self.register(owner, request, offered)?;
        let give_up = || gone.load(Ordering::Acquire) || life.is_ending();
        let served = closed.open(self.kernel, &give_up).and_then(|opened| self.serve(&life, request, opened));
        served.map(|warnings| (life.id, warnings)).inspect_err(|error| {
            life.refused(error.to_failure());
            self.leave_socket(&life);
            self.table().lives.remove(&life.id);
            (self.ended)();
        })
    }

    fn register(&self, owner: &Owner, request: &Request, offered: Option<Offered>) -> Result<Arc<Life>> {
        let mut table = self.table();
        // Again, under the lock that adds it: several may have got this far together.
        table.check_room(owner)?;
        let id = table.last + 1;
        let socket = table.socket(owner, request, offered)?;
        socket.exports.insert(id);
        let life = Life::new(id, owner, (&socket.address, socket.tls), request);
        table.last = id;
        table.lives.insert(id, life.clone());
        Ok(life)
    }

    fn serve(self: &Arc<Self>, life: &Arc<Life>, request: &Request, opened: Opened) -> Result<Vec<String>> {
        let Opened { device, align, view, warnings, held } = opened;
        let exported = Exported::new(life.id, request, device, align, view.clone());
        held.publish(&view, align, exported.durability.clone());
        let entrance = self.entrance(life)?;
        life.serve(exported.clone(), held)?;
        let (exports, kept) = (self.clone(), life.clone());
        // The keeper waits for the offer: what it withdraws has been offered, and what is offered has a keeper.
        let (offered, is_offered) = mpsc::sync_channel(1);
        std::thread::Builder::new()
            .name(format!("export{}", life.id))
            .spawn(move || is_offered.recv().map(|()| exports.keep(&kept)))
            .map_err(|cause| Error::io("cannot start the export's thread", cause))?;
        entrance.offer(exported)?;
        offered.send(()).expect("the keeper waits for nothing else");
        tracing::info!(export = life.id, uid = life.owner.uid, address = life.address, "serving");
        Ok(warnings)
    }

    /// Where its clients come in, from now on.
    fn entrance(&self, life: &Life) -> Result<Entrance> {
        let mut table = self.table();
        let socket = table.socket_of(life.id).expect("an export that is being opened has a socket");
        match &mut socket.door {
            Door::Open(entrance) => Ok(entrance.clone()),
            Door::Shut(offered) => {
                let what = "the socket could not be listened on";
                let offered =
                    offered.take().ok_or_else(|| Error::new(ErrorKind::Conflict, what).at(&life.address))?;
                let entrance = self.front.open(&self.pipeline, *offered, &life.address)?;
                socket.door = Door::Open(entrance.clone());
                Ok(entrance)
            }
        }
    }

    /// An export's own thread: see the module.
    fn keep(&self, life: &Life) {
        let mut end = life.wait_for_end();
        let exported = life.exported().expect("what is served stays until its keeper lets go of it");
        tracing::info!(export = life.id, "draining");
        self.withdraw(life);
        let drained_by = Instant::now() + limits::EXPORT_DRAIN;
        loop {
            if end == End::Drained && Instant::now() >= drained_by {
                tracing::warn!(export = life.id, "clients do not take what they have asked for: dropped");
                end = End::Dropped;
            }
            exported.end(match end {
                End::Drained => Course::Draining,
                End::Dropped => Course::Dropping,
            });
            self.front.wake();
            if exported.connections() == 0 {
                break;
            }
            end = life.end_within(DRAIN_POLL, end);
        }
        let failure = if exported.read_only { None } else { self.make_durable(&exported).err() };
        // Of a write-back that failed an open file is told once: whoever was, the last flush may know nothing of it any more.
        let failure = if exported.durability.is_lost() { Some(lost(&exported, failure)) } else { failure };
        let stats = self.measure(life, &exported);
        drop(exported);
        self.leave_socket(life);
        life.over(Some(stats), failure);
        tracing::info!(export = life.id, "stopped");
        {
            let mut table = self.table();
            table.finished.push_back(life.id);
            while table.finished.len() > limits::EXPORTS_REMEMBERED
                && let Some(id) = table.finished.pop_front()
            {
                table.lives.remove(&id);
            }
        }
        (self.ended)();
    }

    fn make_durable(&self, exported: &Exported) -> Result<()> {
        let device = &exported.device;
        let mut blocking = self.pipeline.blocking(device.file().clone(), device.name(), exported.align)?;
        if !exported.durability.is_lost() {
            // A job may go on beside it, and has to know.
            blocking = blocking.in_turn(exported.durability.clone());
        }
        // What can still be saved is, even where some of it is lost.
        blocking.flush()
    }

    fn withdraw(&self, life: &Life) {
        if let Some(Socket { door: Door::Open(entrance), .. }) = self.table().socket_of(life.id) {
            entrance.withdraw(life.id);
        }
    }

    /// It needs its socket no more; the last one closes it.
    fn leave_socket(&self, life: &Life) {
        let left = {
            let mut table = self.table();
            let Some(at) = table.sockets.iter().position(|socket| socket.exports.contains(&life.id)) else {
                return;
            };
            table.sockets[at].exports.remove(&life.id);
            if !table.sockets[at].exports.is_empty() {
                return;
            }
            table.sockets.remove(at)
        };
        // The name goes first: who finds it finds somebody who listens.
        if let Some(place) = &left.place {
            place.remove();
        }
        if let Door::Open(entrance) = left.door {
            self.front.close(&entrance);
        }
    }

    /// All exports, oldest first.
    #[must_use]
    pub fn list(&self) -> Vec<Info> {
        let lives: Vec<Arc<Life>> = self.table().lives.values().cloned().collect();
        lives.iter().map(|life| life.info()).collect()
    }

    fn life(&self, export: ExportId) -> Result<Arc<Life>> {
        let found = self.table().lives.get(&export).cloned();
        found.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("no export {export}")))
    }

    /// One export.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn info(&self, export: ExportId) -> Result<Info> {
        self.life(export).map(|life| life.info())
    }

    /// Where its time goes. Waits for workers.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn stats(&self, export: ExportId) -> Result<Stats> {
        let life = self.life(export)?;
        match (life.kept_stats(), life.exported()) {
            (None, Some(exported)) => Ok(self.measure(&life, &exported)),
            (Some(stats), _) => Ok(stats),
            (None, None) => {
                Ok(Stats { info: life.info(), stages: Vec::new(), bottleneck: None, syscalls: 0 })
            }
        }
    }

    fn measure(&self, life: &Life, exported: &Arc<Exported>) -> Stats {
        let (record, syscalls) = self.front.stats(exported);
        Stats { info: life.info(), stages: record.to_stats(), bottleneck: record.bottleneck(0.0), syscalls }
    }

    /// Ask for the end of an export. Returns at once.
    ///
    /// # Errors
    /// `NotFound`; `Conflict`: it is over already.
    pub fn end(&self, export: ExportId, end: End) -> Result<()> {
        let life = self.life(export)?;
        if life.state() == State::Stopped {
            return Err(Error::new(ErrorKind::Conflict, format!("export {export} is over already")));
        }
        life.end(end);
        Ok(())
    }

    /// Ask for the end of all. Returns at once.
    pub fn end_all(&self, end: End) {
        for life in self.table().lives.values() {
            life.end(end);
        }
    }

    /// Wait for the end of an export that was asked for, or until `gone` says that nobody waits any more.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn wait_until_over(&self, export: ExportId, gone: &AtomicBool) -> Result<Info> {
        let life = self.life(export)?;
        life.wait_until_over(&|| gone.load(Ordering::Acquire));
        Ok(life.info())
    }

    /// Exports not yet over.
    #[must_use]
    pub fn active(&self) -> u32 {
        // One counts until its keeper has come to its end, not only until it is stopped.
        let table = self.table();
        u32::try_from(table.lives.len() - table.finished.len()).unwrap_or(u32::MAX)
    }
}

/// How an export ends of which a flush has failed, whatever the last one said.
fn lost(exported: &Exported, last: Option<Error>) -> Error {
    let what = "what clients wrote may be lost: a flush failed";
    let error = Error::new(ErrorKind::Io, what).at(exported.device.name());
    let error = match last {
        Some(last) => error.because(last),
        None => error,
    };
    error.hint("the kernel's log may say why; check what is on the volume before it is used")
}

/// The wire's and the protocol's bounds on texts, before they are kept for as long as the export is.
fn check_texts(request: &Request) -> Result<()> {
    let invalid = |what: String| Err(Error::new(ErrorKind::Invalid, what));
    if request.file.name.len() > proto::MAX_NAME {
        return invalid(format!("name of the volume is longer than {} bytes", proto::MAX_NAME));
    }
    if request.name.len() > limits::EXPORT_NAME_MAX {
        return invalid(format!("name of the export is longer than {} bytes", limits::EXPORT_NAME_MAX));
    }
    let description = request.description.as_deref().unwrap_or_default();
    if description.len() > limits::EXPORT_DESCRIPTION_MAX {
        return invalid(format!("description is longer than {} bytes", limits::EXPORT_DESCRIPTION_MAX));
    }
    if request.name.contains('\0') || description.contains('\0') {
        return invalid("name and description are texts without zero bytes".to_owned());
    }
    Ok(())
}
