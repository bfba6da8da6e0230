//! The exports behind one listening socket: put there and taken away while clients come in.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use proto::export::ExportId;

use crate::error::{Error, ErrorKind, Result};
use crate::export::exported::{Course, Exported, Seat};
use crate::export::nbd::haggle::{Catalogue, Offer};
use crate::limits;

/// Exports in the order of their numbers.
#[derive(Default)]
pub struct Shelf(Mutex<Vec<Arc<Exported>>>);

impl Shelf {
    fn exports(&self) -> MutexGuard<'_, Vec<Arc<Exported>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Offer an export to clients.
    ///
    /// # Errors
    /// `Conflict`: another has its name; `Limit`: there are too many.
    pub fn put(&self, export: Arc<Exported>) -> Result<()> {
        let mut exports = self.exports();
        if exports.iter().any(|other| other.name == export.name) {
            let what = "the socket has an export of this name";
            return Err(Error::new(ErrorKind::Conflict, what).at(format!("{:?}", export.name)));
        }
        if exports.len() >= limits::EXPORTS_PER_SOCKET_MAX {
            let most = limits::EXPORTS_PER_SOCKET_MAX;
            return Err(Error::new(ErrorKind::Limit, format!("the socket has {most} exports already")));
        }
        let at = exports.partition_point(|other| other.id < export.id);
        exports.insert(at, export);
        Ok(())
    }

    /// Offer it no longer. Returns whether any are left.
    pub fn take(&self, id: ExportId) -> bool {
        let mut exports = self.exports();
        exports.retain(|export| export.id != id);
        !exports.is_empty()
    }

    /// Connections that all of its exports have.
    #[must_use]
    pub fn connections(&self) -> u32 {
        self.exports().iter().map(|export| export.connections()).sum()
    }

    /// A place in an export. Whoever has taken it off the shelf knows of every place there will ever be.
    #[must_use]
    pub fn seat(&self, id: ExportId) -> Option<Seat> {
        self.exports().iter().find(|export| export.id == id).cloned().map(Seat::take)
    }
}

/// Only one that serves is offered; one that drains is as good as gone.
fn offer(export: &Exported) -> Option<Offer> {
    (export.course() == Course::Serving).then(|| Offer {
        id: export.id,
        name: export.name.clone(),
        description: export.description.clone(),
        size: export.view.total(),
        read_only: export.read_only,
        preferred: export.align,
        full: export.connections() >= limits::CONNECTIONS_PER_EXPORT_MAX,
    })
}

impl Catalogue for Shelf {
    fn find(&self, name: &str) -> Option<Offer> {
        self.exports().iter().find(|export| export.name == name).and_then(|export| offer(export))
    }

    fn after(&self, id: ExportId) -> Option<Offer> {
        self.exports().iter().filter(|export| export.id > id).find_map(|export| offer(export))
    }
}
