//! What the registry asks of the NBD server: to let clients in, and to say what was measured.

use std::sync::Arc;

use proto::export::ExportId;

use crate::error::Result;
use crate::export::exported::Exported;
use crate::export::socket::Listening;
use crate::pipeline::Pipeline;
use crate::telemetry::record::StageRecord;

/// A listening socket that is listened on.
pub type Listener = u64;

/// The server: who haggles, and who serves.
pub struct Front {}

impl Front {
    /// Start it.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub fn start(_pipeline: &Arc<Pipeline>) -> Result<Self> {
        Ok(Self {})
    }

    /// Listen on a socket of `uid`.
    pub fn listen(&self, _listening: Listening, _uid: u32) -> Result<Listener> {
        Ok(0)
    }

    /// Clients of `listener` may connect to `exported`.
    pub fn offer(&self, _listener: Listener, _exported: Arc<Exported>) {}

    /// No new clients.
    pub fn withdraw(&self, _listener: Listener, _export: ExportId) {}

    /// Nobody listens there any more.
    pub fn close(&self, _listener: Listener) {}

    /// Workers look at the courses of exports again.
    pub fn wake(&self) {}

    /// Where the time of an export goes.
    pub fn stats(&self, _exported: &Arc<Exported>) -> (StageRecord, u64) {
        (StageRecord::default(), 0)
    }
}
