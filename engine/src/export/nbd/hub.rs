//! Where connections come in from other threads: which worker serves them, and what the workers say of an export.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam::channel::{Sender, unbounded};
use proto::export::ExportId;
use rustix::fs::OFlags;
use rustix::net::sockopt;

use crate::backend::Wake;
use crate::error::{Error, ErrorKind, Result};
use crate::export::exported::{Course, Exported};
use crate::export::nbd::Negotiated;
use crate::export::nbd::pool::Pool;
use crate::export::nbd::served::{BLOCK_MAX, Served};
use crate::export::nbd::server::Server;
use crate::pipeline::Pipeline;
use crate::sys::buffer::Arena;
use crate::sys::ring::FILES_MAX;
use crate::telemetry::record::StageRecord;

/// Connections of one worker: with all their pieces they fit its share of operations.
pub const CONNECTIONS_MAX: u32 = 192;

/// Places in a worker's table of files that are left for transfers.
const FILES_RESERVED: u32 = 32;

const _: () =
    assert!(CONNECTIONS_MAX + FILES_RESERVED < FILES_MAX, "clients of one export have their places");

/// How long statistics wait for a busy worker.
const STATS_WAIT: Duration = Duration::from_millis(500);

/// What is asked of the kernel for a socket's buffers, bytes; it gives what the host allows.
pub const SOCKET_BYTES: usize = 4 << 20;

/// From other threads to a worker's server.
pub enum News {
    /// A client.
    Connection(Box<Negotiated>, Admission),
    /// Send the record of an export, and the system calls since it came here, if it is served here.
    Stats(ExportId, Sender<(StageRecord, u64)>),
}

/// A worker as other threads see it.
struct End {
    news: Sender<News>,
    wake: Arc<dyn Wake>,
    shared: Arc<Shared>,
}

/// What a server and its hub both look at.
#[derive(Debug, Default)]
pub struct Shared {
    /// Connections given to the worker.
    pub connections: AtomicU32,
    /// Exports have changed their course.
    pub look: AtomicBool,
    /// The exports of these connections, each with the number of its own: each has its device in the worker's table of files.
    exports: Mutex<Vec<(ExportId, u32)>>,
}

impl Shared {
    fn exports(&self) -> MutexGuard<'_, Vec<(ExportId, u32)>> {
        self.exports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Can one more connection, of this export, have its places?
    fn has_room(&self, export: ExportId) -> bool {
        let exports = self.exports();
        let known = exports.iter().any(|(id, _)| *id == export);
        let devices = u32::try_from(exports.len()).expect("fewer than connections") + u32::from(!known);
        let connections = self.connections.load(Ordering::Relaxed) + 1;
        connections <= CONNECTIONS_MAX && connections + devices + FILES_RESERVED <= FILES_MAX
    }
}

/// A connection's place on a worker: counted from when it is handed over until nothing of it is left there.
pub struct Admission {
    /// Where to.
    pub export: Arc<Exported>,
    shared: Arc<Shared>,
}

impl Admission {
    fn new(export: Arc<Exported>, shared: Arc<Shared>) -> Self {
        shared.connections.fetch_add(1, Ordering::Relaxed);
        {
            let mut exports = shared.exports();
            match exports.iter_mut().find(|(id, _)| *id == export.id) {
                Some((_, count)) => *count += 1,
                None => exports.push((export.id, 1)),
            }
        }
        Self { export, shared }
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        let mut exports = self.shared.exports();
        let mine = exports.iter().position(|(id, _)| *id == self.export.id).expect("counted when it came");
        exports[mine].1 -= 1;
        if exports[mine].1 == 0 {
            exports.swap_remove(mine);
        }
        self.shared.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The way to the servers of all workers. Dropping it leaves them where they are: they go with the pipeline.
pub struct Hub {
    workers: Vec<End>,
}

impl Hub {
    /// Install a server on each worker. It takes the memory of their buffers, so it is made when the first export is.
    ///
    /// # Errors
    /// No memory.
    pub fn new(pipeline: &Pipeline) -> Result<Self> {
        let mut servers = Vec::with_capacity(pipeline.workers());
        for index in 0..pipeline.workers() {
            let (news, inbox) = unbounded();
            let shared = Arc::new(Shared::default());
            let wake = pipeline.waker(index);
            let server = Server::new(Pool::new(Arena::new)?, inbox, wake.clone(), shared.clone());
            servers.push((server, End { news, wake, shared }));
        }
        let mut workers = Vec::with_capacity(servers.len());
        for (index, (server, end)) in servers.into_iter().enumerate() {
            pipeline.install(index, Box::new(server));
            workers.push(end);
        }
        Ok(Self { workers })
    }

    /// Give a connection to the worker that has the fewest.
    ///
    /// # Errors
    /// `Limit`: all have as many as they may. `Cancelled`: the export is being stopped. `Unsupported`: its device has blocks of more
    /// than 16 KiB. The connection is closed.
    pub fn hand_over(&self, negotiated: Negotiated) -> Result<()> {
        let export = negotiated.export.clone();
        if Served::block_of(&export).is_none() {
            let what =
                format!("blocks of {} bytes, of which an export has at most {BLOCK_MAX}", export.align);
            return Err(Error::new(ErrorKind::Unsupported, what).at(export.device.name()));
        }
        let load = |end: &&End| end.shared.connections.load(Ordering::Relaxed);
        let has_room = |end: &&End| end.shared.has_room(export.id);
        let Some(end) = self.workers.iter().filter(has_room).min_by_key(load) else {
            let clients: u32 = self.workers.iter().map(|end| load(&end)).sum();
            let what = format!("{clients} clients are connected already, as many as can be served");
            return Err(Error::new(ErrorKind::Limit, what));
        };
        let admission = Admission::new(export.clone(), end.shared.clone());
        // Counted first: whoever ends the export and then sees no connection will never see one.
        if export.course() != Course::Serving {
            return Err(Error::new(ErrorKind::Cancelled, "the export is being stopped").at(&export.name));
        }
        prepare(&negotiated);
        // The worker leaves with the pipeline; a connection that comes too late is closed with the channel.
        let _ = end.news.send(News::Connection(Box::new(negotiated), admission));
        end.wake.wake();
        Ok(())
    }

    /// Connections that can be served at one time, if they are of few exports.
    #[must_use]
    pub fn places(&self) -> u32 {
        CONNECTIONS_MAX * u32::try_from(self.workers.len()).expect("few workers")
    }

    /// An export has changed its course: let the workers look.
    pub fn wake(&self) {
        for end in &self.workers {
            end.shared.look.store(true, Ordering::Release);
            end.wake.wake();
        }
    }

    /// Where the time of an export went so far, and the system calls of the workers while they served it: of those that have let go
    /// of it, and those that answer in time.
    #[must_use]
    pub fn stats(&self, export: &Exported) -> (StageRecord, u64) {
        // First what is kept: a worker that lets go from here on may be missed, but none is counted twice.
        let (mut record, mut syscalls) = export.kept();
        let (reply, answers) = unbounded();
        for end in &self.workers {
            let _ = end.news.send(News::Stats(export.id, reply.clone()));
            end.wake.wake();
        }
        drop(reply);
        while let Ok((part, calls)) = answers.recv_timeout(STATS_WAIT) {
            record.merge(&part);
            syscalls += calls;
        }
        (record, syscalls)
    }
}

/// Make a socket good for a ring. What the kernel refuses costs speed only.
fn prepare(negotiated: &Negotiated) {
    let socket = negotiated.socket.as_fd();
    // A ring waits for a socket by itself, unless the socket says that nobody should.
    if let Ok(flags) = rustix::fs::fcntl_getfl(socket) {
        let _ = rustix::fs::fcntl_setfl(socket, flags - OFlags::NONBLOCK);
    }
    let _ = sockopt::set_tcp_nodelay(socket, true);
    let _ = sockopt::set_socket_send_buffer_size(socket, SOCKET_BYTES);
    let _ = sockopt::set_socket_recv_buffer_size(socket, SOCKET_BYTES);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_and_the_devices_of_their_exports_leave_places_for_transfers() {
        let of_one = Shared::default();
        of_one.exports().push((1, CONNECTIONS_MAX - 1));
        of_one.connections.store(CONNECTIONS_MAX - 1, Ordering::Relaxed);
        assert!(of_one.has_room(1) && of_one.has_room(2));
        of_one.connections.store(CONNECTIONS_MAX, Ordering::Relaxed);
        assert!(!of_one.has_room(1));
        // Each of another export.
        let of_many = Shared::default();
        let mut id = 0;
        while of_many.has_room(id) {
            of_many.exports().push((id, 1));
            of_many.connections.fetch_add(1, Ordering::Relaxed);
            id += 1;
        }
        assert_eq!(of_many.connections.load(Ordering::Relaxed) * 2 + FILES_RESERVED, FILES_MAX);
    }
}
