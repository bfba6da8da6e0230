//! Volumes on the other end of a connection: an NBD client behind the seams of this module.
//!
//! | file | its one purpose |
//! |---|---|
//! | `mod` | a remote volume, and how everything that carries a file finds it |
//! | `connect` | haggling as a client; connecting again |
//! | `queue` | a queue over a queue: operations on a remote port become requests on its socket |
//! | `extents` | block status: holes, dirty bitmaps |
//! | `tls` | TLS of a connection |
//!
//! A remote volume is known by the descriptor of its first connection: whatever carries a file (`Arc<OwnedFd>`) carries a remote
//! one as well, and where it is attached to a queue, the queue finds out ([`find`]). Why not an enum in place of the descriptor: a
//! hundred places that only hand it on would have to know.

use std::os::fd::OwnedFd;

use proto::remote::Remote;

use crate::backend::device::{Device, Purpose};
use crate::error::{Error, ErrorKind, Result};

/// Haggle with a server over connections the caller made (the first is the volume's, the others are used if the server allows several),
/// and look at the export. Blocks for at most some seconds. `tls` holds the contents of the descriptors of [`Remote::tls`].
///
/// # Errors
/// `Io`: the connection broke or the server does not answer; `NotFound`: no such export; `Denied`: by the server's policy; `Unsupported`: it lacks what is needed.
pub fn open(_connections: Vec<OwnedFd>, _remote: &Remote, name: &str, _purpose: Purpose) -> Result<Device> {
    Err(Error::new(ErrorKind::Unsupported, "NBD is not spoken yet").at(name))
}
