//! Volumes on the other end of a connection: any descriptor of a request may be one to an NBD server.
//!
//! The caller connects, with its own rights, and passes the connected sockets; the daemon haggles and speaks the protocol. Where a
//! request names a descriptor as a source, a sink or a volume, an entry in its list of remotes says that it is no file.

use serde::{Deserialize, Serialize};

/// A descriptor that is a connection to an NBD server on which nothing was said yet.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Remote {
    /// Descriptor index: the connection, as the request names it elsewhere as a source, sink or volume.
    pub fd: u32,
    /// Descriptor indices of more connections to the same server, for workers to share; used if the server allows that.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub more: Vec<u32>,
    /// Name of the export.
    pub export: String,
    /// TLS, which is then demanded of the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<Tls>,
    /// Where the connections lead, for connecting again after one broke. The daemon uses it only for callers whose rights it has
    /// anyway (its own user, or root where it is root).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<Address>,
    /// How long to try to connect again, milliseconds; 0: not at all. Default 10000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reconnect_ms: Option<u32>,
    /// Copy, or compare, only what this context of block status marks (`qemu:dirty-bitmap:NAME`). Of a source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bitmap: Option<String>,
    /// With `bitmap`: the sink holds an earlier copy, a volume of the same size, and is changed in place. An encrypted one is opened
    /// ([`crate::Format::Luks`]), not made.
    #[serde(default)]
    pub update: bool,
    /// Of what is to be overwritten: refuse it unless so many bytes at its beginning, and its last mebibyte, are zeros. The caller, who
    /// looks at files and devices itself, cannot look at this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blank_bytes: Option<u64>,
}

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Address {
    /// Path of a Unix socket, absolute.
    Unix(String),
    /// Host and port, as resolved by the caller: `127.0.0.1:10809`, `[::1]:10809`.
    Tcp(String),
}

/// TLS of a client. Descriptors hold PEM, and are read at once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// The name its certificate must be for.
    pub server_name: String,
    /// Descriptor index of the certificates of authorities trusted; absent: those of the system.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub authorities_fd: Option<u32>,
    /// Descriptor indices of the client's certificate chain and its private key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity_fds: Option<(u32, u32)>,
}
