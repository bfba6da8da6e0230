//! Who may do what: peer credentials in, verbs and jobs out.
//!
//! Credentials are the kernel's word about the process that connected, read once at accept. A user sees and touches its own
//! jobs and exports; root touches all; root and the daemon's own user may end the daemon. Nothing else is ever asked.
//!
//! The daemon connects nowhere on behalf of others. Where a connection that a caller made leads is remembered, to connect again after it
//! broke, for callers who have the daemon's own rights anyway; of others the address is forgotten ([`Peer::limit`]).

use proto::{Call, ErrorKind, JobInfo};

use crate::error::Error;
use crate::job::Owner;

/// The verbs, for the policy and its messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// `hello`, `status`: about the daemon.
    Ask,
    /// `export…`, `submit`, `luks`, `list`, `show`, `watch`, `pause`, `resume`, `cancel`, `throttle`, `stats`: about jobs and exports.
    Job,
    /// `shutdown`.
    Shutdown,
}

impl Verb {
    /// The verb of a call.
    #[must_use]
    pub fn of(call: &Call) -> Self {
        match call {
            Call::Hello {} | Call::Status {} => Self::Ask,
            Call::Submit(_)
            | Call::Luks(_)
            | Call::List {}
            | Call::Show { .. }
            | Call::Watch { .. }
            | Call::Pause { .. }
            | Call::Resume { .. }
            | Call::Cancel { .. }
            | Call::Throttle { .. }
            | Call::Stats { .. }
            | Call::Export(_)
            | Call::Exports {}
            | Call::ExportStats { .. }
            | Call::ExportStop { .. } => Self::Job,
            Call::Shutdown { .. } => Self::Shutdown,
        }
    }
}

/// A connection's rights, fixed at accept.
#[derive(Debug, Clone)]
pub struct Peer {
    /// Whose jobs it starts.
    pub owner: Owner,
    may_shut_down: bool,
    all_jobs: bool,
    is_daemons: bool,
}

impl Peer {
    /// The rights of `owner` before a daemon run by `daemon_uid`.
    #[must_use]
    pub fn new(owner: Owner, daemon_uid: u32) -> Self {
        let root = owner.uid == 0;
        let is_daemons = owner.uid == daemon_uid;
        Self { may_shut_down: root || is_daemons, all_jobs: root, is_daemons, owner }
    }

    /// A call without what the daemon does only for its own user: to connect to an address. It could be one that only the daemon may
    /// connect to, or that of somebody else's server, which the daemon would take for the same volume.
    #[must_use]
    pub fn limit(&self, mut call: Call) -> Call {
        let remotes = match &mut call {
            Call::Submit(submit) => &mut submit.remotes,
            Call::Luks(request) => &mut request.remotes,
            Call::Export(request) => &mut request.remotes,
            _ => return call,
        };
        if !self.is_daemons {
            remotes.iter_mut().for_each(|remote| remote.address = None);
        }
        call
    }

    /// May it use this verb at all?
    ///
    /// # Errors
    /// `Denied`.
    pub fn check(&self, verb: Verb) -> Result<(), Error> {
        match verb {
            Verb::Ask | Verb::Job => Ok(()),
            Verb::Shutdown if self.may_shut_down => Ok(()),
            Verb::Shutdown => {
                Err(Error::new(ErrorKind::Denied, "only root and the daemon's own user may shut it down"))
            }
        }
    }

    /// May it see and touch jobs of this user?
    #[must_use]
    pub fn owns(&self, uid: u32) -> bool {
        self.all_jobs || self.owner.uid == uid
    }

    /// `job`, if this peer may see it.
    ///
    /// # Errors
    /// `Denied`.
    pub fn admit(&self, job: JobInfo) -> Result<JobInfo, Error> {
        if self.owns(job.uid) {
            Ok(job)
        } else {
            Err(Error::new(ErrorKind::Denied, format!("job {} belongs to another user", job.job)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_user_meets_exactly_its_own_rights() {
        let daemon = 1000;
        //   peer, its own jobs, jobs of 1000, jobs of 0, shutdown
        for (uid, own, of_daemon, of_root, shutdown) in [
            (0, true, true, true, true),
            (1000, true, true, false, true),
            (1001, true, false, false, false),
            (65534, true, false, false, false),
        ] {
            let peer = Peer::new(Owner { uid, gid: uid, groups: vec![0, 1000] }, daemon);
            assert_eq!(peer.owns(uid), own, "{uid}");
            assert_eq!(peer.owns(1000), of_daemon, "{uid}");
            assert_eq!(peer.owns(0), of_root, "{uid}");
            assert_eq!(peer.check(Verb::Shutdown).is_ok(), shutdown, "{uid}");
            assert!(peer.check(Verb::Ask).is_ok() && peer.check(Verb::Job).is_ok(), "{uid}");
        }
    }

    #[test]
    fn the_daemon_connects_for_its_own_user_alone() {
        let (fd, address) = (0, Some(proto::remote::Address::Tcp("127.0.0.1:10809".to_owned())));
        let remotes = vec![proto::remote::Remote { fd, address, ..Default::default() }];
        let operation = proto::luks::Operation::Dump {};
        let request = proto::luks::Request { volume: None, header: None, lock_fd: None, remotes, operation };
        let call = Call::Luks(Box::new(request));
        // Root as well may not lead a daemon without its rights elsewhere.
        for (uid, daemon, kept) in
            [(1000, 1000, true), (0, 0, true), (1001, 1000, false), (0, 1000, false), (1000, 0, false)]
        {
            let peer = Peer::new(Owner { uid, gid: uid, groups: Vec::new() }, daemon);
            let Call::Luks(request) = peer.limit(call.clone()) else { panic!("another call") };
            assert_eq!(request.remotes[0].address.is_some(), kept, "{uid} of {daemon}");
            assert_eq!(request.remotes.len(), 1);
        }
    }

    #[test]
    fn a_user_of_a_root_daemon_may_not_shut_it_down() {
        let peer = Peer::new(Owner { uid: 1000, gid: 0, groups: vec![0] }, 0);
        assert!(peer.check(Verb::Shutdown).is_err());
    }
}
