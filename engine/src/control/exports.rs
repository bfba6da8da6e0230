//! The loop's part in exports: who holds which, and what ends with a connection.

use std::os::fd::OwnedFd;

use proto::export::{ExportId, Request};
use proto::{Body, ErrorKind, Reply};

use super::mailbox::Outcome;
use super::{Control, line};
use crate::error::Error;
use crate::export::life::End;
use crate::limits;

impl Control {
    /// Open a volume and serve it. The client's going away ends that.
    pub(super) fn export(&mut self, key: u64, id: u64, request: Box<Request>, descriptors: Vec<OwnedFd>) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        let exports = self.service.exports.clone();
        if connection.exports.len() >= limits::EXPORTS_PER_USER_MAX {
            // Those that are over need no stopping.
            let active: Vec<ExportId> = exports
                .list()
                .into_iter()
                .filter(|info| info.state != proto::export::State::Stopped)
                .map(|info| info.export)
                .collect();
            connection.exports.retain(|export| active.contains(export));
        }
        let owner = connection.peer.owner.clone();
        if self.leaving {
            connection.say(id, Body::Error(line::failure(ErrorKind::ShuttingDown, "the daemon is leaving")));
            return self.closer.close(owner.uid, descriptors);
        }
        let (gone, detach) = (connection.gone.clone(), request.detach);
        let work = move |descriptors| {
            let result = exports.start(&owner, &request, descriptors, &gone);
            Outcome::Exported { detach, result }
        };
        self.help(key, id, true, descriptors, work);
    }

    /// A helper has come to the end of an export's beginning.
    pub(super) fn exported(&mut self, key: u64, outcome: &Outcome) {
        let Outcome::Exported { detach, result: Ok((export, _)) } = outcome else { return };
        if !detach {
            match self.connections.get_mut(&key) {
                Some(connection) => {
                    connection.exports.insert(*export);
                }
                // Nobody is there any more whose end would end it.
                None => self.stop_export(*export, End::Drained),
            }
        }
        if self.leaving {
            self.stop_export(*export, if self.cancelling { End::Dropped } else { End::Drained });
        }
    }

    /// Statistics wait for workers.
    pub(super) fn export_stats(&mut self, key: u64, id: u64, export: ExportId) {
        let exports = self.service.exports.clone();
        let work =
            move |_| Outcome::Answer(exports.stats(export).map(|stats| Reply::ExportStats(Box::new(stats))));
        self.help(key, id, true, Vec::new(), work);
    }

    /// Begin its end now; the answer waits until it has come.
    pub(super) fn export_stop(&mut self, key: u64, id: u64, export: ExportId, end: End) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        let exports = self.service.exports.clone();
        if let Err(error) = exports.end(export, end) {
            return connection.say(id, Body::Error(error.to_failure()));
        }
        let gone = connection.gone.clone();
        let work = move |_| {
            Outcome::Answer(exports.wait_until_over(export, &gone).map(|info| Reply::Exports(vec![info])))
        };
        self.help(key, id, true, Vec::new(), work);
    }

    /// That it has ended already is as good.
    pub(super) fn stop_export(&self, export: ExportId, end: End) {
        if let Err(error) = self.service.exports.end(export, end)
            && !matches!(error.kind(), ErrorKind::Conflict | ErrorKind::NotFound)
        {
            tracing::error!(export, error = Error::chain(&error), "cannot stop");
        }
    }
}
