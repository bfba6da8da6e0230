//! One export as its connections see it: what it is called, what it can do, what has been done.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use proto::export::ExportId;

use crate::backend::device::Device;
use crate::pipeline::view::View;

/// An export that is open.
pub struct Exported {
    /// Its number.
    pub id: ExportId,
    /// What clients call it.
    pub name: String,
    /// For humans.
    pub description: Option<String>,
    /// Nothing is written.
    pub read_only: bool,
    /// Space may be given back, see `proto::export::Request::discard`.
    pub discard: bool,
    /// The volume's data.
    pub device: Arc<Device>,
    /// Its alignment for direct I/O, bytes; 1: it is buffered.
    pub align: u32,
    /// Where its plaintext lies, and who may touch what.
    pub view: Arc<View>,
    /// What has been done.
    pub counters: Counters,
    /// See [`Course`].
    course: AtomicU8,
}

/// What has been done, over all connections.
#[derive(Debug, Default)]
pub struct Counters {
    /// Connections there are.
    pub connections: AtomicU32,
    /// Connections there have been.
    pub connections_total: AtomicU64,
    /// Requests that ended in an error.
    pub errors: AtomicU64,
    /// Requests and their bytes, by the number of their command.
    pub commands: [(AtomicU64, AtomicU64); 8],
}

/// How far an export is on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Course {
    /// Requests are served.
    Serving,
    /// No new connections; those there are are answered what they have asked and then closed.
    Draining,
    /// Connections are closed as soon as nothing of theirs is in flight.
    Dropping,
}

impl Exported {
    /// An export of an opened volume.
    #[must_use]
    pub fn new(
        id: ExportId,
        request: &proto::export::Request,
        device: Arc<Device>,
        align: u32,
        view: Arc<View>,
    ) -> Arc<Self> {
        Arc::new(Self {
            id,
            name: request.name.clone(),
            description: request.description.clone(),
            read_only: request.read_only,
            discard: request.discard,
            device,
            align,
            view,
            counters: Counters::default(),
            course: AtomicU8::new(0),
        })
    }

    /// How far it is on its way.
    #[must_use]
    pub fn course(&self) -> Course {
        match self.course.load(Ordering::Acquire) {
            0 => Course::Serving,
            1 => Course::Draining,
            _ => Course::Dropping,
        }
    }

    /// Connections there are.
    #[must_use]
    pub fn connections(&self) -> u32 {
        self.counters.connections.load(Ordering::Acquire)
    }

    /// Go on to `course`; there is no way back. Wake the workers afterwards.
    pub fn end(&self, course: Course) {
        self.course.fetch_max(course as u8, Ordering::AcqRel);
    }
}

/// A connection's place in an export. It is counted as long as this exists, and by nothing else: hold it as long as the socket.
pub struct Seat(Arc<Exported>);

impl Seat {
    /// One more connection.
    #[must_use]
    pub fn take(export: Arc<Exported>) -> Self {
        export.counters.connections.fetch_add(1, Ordering::AcqRel);
        export.counters.connections_total.fetch_add(1, Ordering::Relaxed);
        Self(export)
    }

    /// The export.
    #[must_use]
    pub fn export(&self) -> &Arc<Exported> {
        &self.0
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.counters.connections.fetch_sub(1, Ordering::AcqRel);
    }
}
