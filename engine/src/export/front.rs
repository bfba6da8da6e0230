//! What the registry asks of the NBD server: to let clients in, and to say what was measured.
//!
//! The server is started with the first export: its buffers and its thread are not for daemons that only run jobs.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use proto::export::ExportId;

use crate::error::Result;
use crate::export::exported::Exported;
use crate::export::nbd::hub::Hub;
use crate::export::nbd::listen::{Haggler, ListenerId, Listening};
use crate::export::nbd::shelf::Shelf;
use crate::export::socket::Offered;
use crate::limits;
use crate::pipeline::Pipeline;
use crate::telemetry::record::StageRecord;

/// A socket that clients come in at.
#[derive(Clone)]
pub struct Entrance {
    listener: ListenerId,
    shelf: Arc<Shelf>,
}

/// The server, once there is one: who haggles, and who serves.
#[derive(Default)]
pub struct Front(Mutex<Option<Server>>);

struct Server {
    haggler: Haggler,
    hub: Arc<Hub>,
}

impl Front {
    fn server(&self) -> MutexGuard<'_, Option<Server>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Let clients in at a socket. They find nothing there before something is offered.
    ///
    /// # Errors
    /// The first time: no memory, no thread. `Invalid`: a socket of another kind.
    pub fn open(&self, pipeline: &Pipeline, offered: Offered, address: &str) -> Result<Entrance> {
        let mut server = self.server();
        let server = match &mut *server {
            Some(server) => server,
            none => none.insert(Server::start(pipeline)?),
        };
        let Offered { socket, access, tls, .. } = offered;
        let shelf = Arc::new(Shelf::default());
        let listening = Listening { socket, address: address.to_owned(), access, tls, shelf: shelf.clone() };
        Ok(Entrance { listener: server.haggler.add_listener(listening)?, shelf })
    }

    /// Nobody comes in there any more.
    pub fn close(&self, entrance: &Entrance) {
        if let Some(server) = &*self.server() {
            server.haggler.remove_listener(entrance.listener);
        }
    }

    /// Workers look at the courses of exports again.
    pub fn wake(&self) {
        if let Some(server) = &*self.server() {
            server.hub.wake();
        }
    }

    /// Where the time of an export goes, and the system calls of the workers that serve it. Waits for workers.
    pub fn stats(&self, exported: &Exported) -> (StageRecord, u64) {
        let hub = self.server().as_ref().map(|server| server.hub.clone());
        hub.map_or_else(Default::default, |hub| hub.stats(exported))
    }
}

impl Server {
    fn start(pipeline: &Pipeline) -> Result<Self> {
        let hub = Arc::new(Hub::new(pipeline)?);
        let workers = hub.clone();
        // How many since it was logged, and when that was: clients shall not fill the log.
        let refused = Mutex::new((0_u32, None::<Instant>));
        let deliver = Box::new(move |negotiated| {
            let Err(error) = workers.hand_over(negotiated) else { return };
            let mut refused = refused.lock().unwrap_or_else(PoisonError::into_inner);
            refused.0 += 1;
            if refused.1.is_none_or(|at| at.elapsed() >= limits::REFUSED_LOG_TIME) {
                tracing::warn!(
                    refused = refused.0,
                    "a client of an export was not served: {}",
                    error.chain()
                );
                *refused = (0, Some(Instant::now()));
            }
        });
        let haggler = Haggler::start(deliver, hub.places())?;
        Ok(Self { haggler, hub })
    }
}

impl Entrance {
    /// Clients may connect to an export.
    ///
    /// # Errors
    /// `Conflict`: its name is taken; `Limit`: there are too many.
    pub fn offer(&self, exported: Arc<Exported>) -> Result<()> {
        self.shelf.put(exported)
    }

    /// No new clients of an export.
    pub fn withdraw(&self, export: ExportId) {
        self.shelf.take(export);
    }
}
