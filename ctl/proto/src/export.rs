//! Exports: the plaintext of a volume, served by NBD.
//!
//! The caller binds the listening socket, with its own rights, and passes it; it opens the volume and its key as for a job.

use serde::{Deserialize, Serialize};

use crate::{Entry, JobId, Stage, StageStats, Volume, luks::File, remote::Remote};

/// An export's number: unique in one daemon's lifetime, from 1.
pub type ExportId = u64;

/// Serve a volume.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// The volume, opened for reading and writing; with `read_only` for reading. A block device exclusively.
    pub file: File,
    /// Its format and key; `format` is of an existing volume.
    pub volume: Volume,
    /// Descriptor indices of further secrets, for a volume in the middle of a re-encryption whose sides have different ones.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub more_key_fds: Vec<u32>,
    /// Descriptors of this request that are connections to NBD servers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remotes: Vec<Remote>,
    /// Where clients come in.
    pub listen: Listen,
    /// What clients call it; the empty name is the default export.
    pub name: String,
    /// For humans, in the protocol's own field.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// Nothing is written.
    #[serde(default)]
    pub read_only: bool,
    /// TRIM, and WRITE_ZEROES where holes are allowed, give the space back instead of writing encrypted zeros: such places read as
    /// noise or zeros, and whoever sees the device sees which they are.
    #[serde(default)]
    pub discard: bool,
    /// Bypass the page cache; default where the volume allows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direct: Option<bool>,
    /// The export goes on when this connection ends. Otherwise it is stopped then.
    #[serde(default)]
    pub detach: bool,
}

/// Where clients come in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Listen {
    /// A socket bound by the caller.
    Bound(Bound),
    /// One that an export of the same caller has already: its address, as in [`Info::address`].
    Shared(String),
}

/// A listening socket.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bound {
    /// Descriptor index of the socket, bound and listening.
    pub fd: u32,
    /// As typed: `unix:PATH` or `tcp:HOST:PORT`.
    pub address: String,
    /// Where a Unix socket is to be removed from when its last export ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entry: Option<Entry>,
    /// Unix sockets: users that may connect, besides the caller and root; what the socket's mode allows in addition. Empty: only
    /// these two.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub uids: Vec<u32>,
    /// Unix sockets: whoever the socket's mode admits may connect.
    #[serde(default)]
    pub any_uid: bool,
    /// TLS, demanded of every client. TCP sockets have it, or listen on a loopback address and say `insecure`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<Tls>,
    /// TCP without TLS, on a loopback address.
    #[serde(default)]
    pub insecure: bool,
}

/// TLS of a server. Descriptors hold PEM, and are read at once.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// Descriptor index of the server's certificate chain.
    pub certificate_fd: u32,
    /// Descriptor index of its private key.
    pub key_fd: u32,
    /// Descriptor index of the authorities of client certificates: clients must show one.
    pub clients_fd: u32,
}

/// What an export is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// The passphrase is being hashed.
    Opening,
    /// Clients are served.
    Serving,
    /// No new clients; those there are finish what they have asked for.
    Draining,
    /// Over.
    Stopped,
}

/// An export as it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Info {
    /// Its number.
    pub export: ExportId,
    /// Whose it is.
    pub uid: u32,
    /// What it is doing.
    pub state: State,
    /// The volume, as its owner calls it.
    pub volume: String,
    /// Where clients come in.
    pub address: String,
    /// What clients call it.
    pub name: String,
    /// Bytes of plaintext.
    pub bytes: u64,
    /// Nothing is written.
    pub read_only: bool,
    /// Clients must speak TLS.
    #[serde(default)]
    pub tls: bool,
    /// Clients there are now.
    pub connections: u32,
    /// Clients there have been.
    pub connections_total: u64,
    /// The job that re-encrypts it just now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<JobId>,
    /// Seconds since it began.
    pub seconds: f64,
    /// What was done, by command.
    pub commands: Vec<Commands>,
    /// Requests that ended in an error.
    pub errors: u64,
    /// Why it ended, if not because it was asked to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<crate::Failure>,
}

/// Requests of one kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commands {
    /// `read`, `write`, `flush`, `trim`, `write_zeroes`, `block_status`, `cache`.
    pub command: String,
    /// How many.
    pub count: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Where the time of an export goes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// Its counters.
    pub info: Info,
    /// Each stage that was passed.
    pub stages: Vec<StageStats>,
    /// The stage with the largest share.
    pub bottleneck: Option<Stage>,
    /// System calls of the workers that serve it, transfers' included.
    pub syscalls: u64,
}
