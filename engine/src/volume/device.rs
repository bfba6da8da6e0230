//! The devices of a request: files as they are, connections to NBD servers as volumes.

use proto::remote::Remote;

use crate::backend::device::{Device, Purpose};
use crate::backend::nbd;
use crate::error::Result;
use crate::key::Descriptors;

/// Take descriptor `fd` as a device. `role` and `name` are for messages.
///
/// # Errors
/// As [`Device::from_fd`] or, where `remotes` names the descriptor, [`nbd::open`].
pub fn open(
    descriptors: &mut Descriptors,
    remotes: &[Remote],
    fd: u32,
    (role, name): (&str, &str),
    purpose: Purpose,
) -> Result<Device> {
    let first = descriptors.take(fd, role)?;
    let Some(remote) = remotes.iter().find(|remote| remote.fd == fd) else {
        return Device::from_fd(first, name, purpose);
    };
    let mut connections = vec![first];
    for more in &remote.more {
        connections.push(descriptors.take(*more, role)?);
    }
    nbd::open(connections, remote, name, purpose)
}
