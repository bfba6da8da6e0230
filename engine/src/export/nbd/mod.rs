//! The NBD server.
//!
//! ```text
//! listener ─ accept ─▶ haggling thread (one for all: greeting, TLS, options) ─ Negotiated ─▶ worker's Server (transmission)
//! ```
//!
//! | file | its one purpose |
//! |---|---|
//! | `mod` | what goes from haggling to transmission |
//! | `listen` | the thread that accepts and haggles, for all listening sockets; bounds on clients |
//! | `stuck` | accepting on sockets whose owner may mean harm |
//! | `shelf` | the exports behind one listening socket |
//! | `caller` | one client that haggles: its socket, what waits to be sent, TLS |
//! | `haggle` | haggling, without I/O: bytes in, bytes out |
//! | `tls` | TLS of a connection, without I/O |
//! | `hub` | which worker serves a connection; what workers say of an export |
//! | `server` | the service on one worker: its connections, buffers, operations (`intake`, `moves`, `replies`) |
//! | `connection` | one client: bytes in, requests; replies, bytes out |
//! | `served` | one export on one worker |
//! | `slot` | one request, or a piece of one, in flight |
//! | `check` | every bound of a request |
//! | `answer` | replies as bytes |
//! | `pool` | buffers, and who may have how many |
//!
//! Haggling is slow, rare and full of strings: it has a thread of its own, whose clients are bounded in number, bytes and time. A
//! connection is on a worker from its first request on.

pub mod answer;
mod caller;
mod check;
mod connection;
pub mod haggle;
pub mod hub;
mod intake;
pub mod listen;
mod moves;
mod pace;
pub mod pool;
mod replies;
pub mod sealed;
pub mod served;
pub mod server;
pub mod shelf;
mod slot;
mod stuck;
pub mod tls;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::export::exported::{Exported, Seat};
use crate::export::nbd::tls::TlsStream;
use crate::format::nbd::reply::Style;

/// A client that may send requests now.
pub struct Negotiated {
    /// Its socket, blocking or not: the ring does not mind.
    pub socket: OwnedFd,
    /// What it will read and write.
    pub export: Arc<Exported>,
    /// Counts the connection as long as it is held.
    pub seat: Seat,
    /// How it is answered.
    pub style: Style,
    /// It asked for `base:allocation`, and knows it by this number.
    pub allocation: Option<u32>,
    /// Bytes that came behind the last option: the first requests.
    pub early: Vec<u8>,
    /// TLS of the connection: every byte on the socket goes through it. `early` has, already.
    pub tls: Option<Box<TlsStream>>,
}
