//! The devices of a request: files as they are, connections to NBD servers as volumes.

use proto::remote::{Remote, Tls};

use crate::backend::device::{Device, Purpose};
use crate::backend::nbd;
use crate::backend::nbd::tls::Credentials;
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
    let tls = remote.tls.as_ref().map(|tls| credentials(descriptors, tls)).transpose()?;
    nbd::open(connections, remote, tls.as_ref(), name, purpose)
}

/// What a request's descriptors hold for TLS.
fn credentials(descriptors: &mut Descriptors, tls: &Tls) -> Result<Credentials> {
    let authorities = match tls.authorities_fd {
        Some(fd) => Some(descriptors.secret(fd, "TLS authorities")?.as_bytes().to_vec()),
        None => None,
    };
    let identity = match tls.identity_fds {
        Some((chain, key)) => {
            let chain = descriptors.secret(chain, "TLS certificate")?.as_bytes().to_vec();
            Some((chain, descriptors.secret(key, "TLS key")?))
        }
        None => None,
    };
    Ok(Credentials { server_name: tls.server_name.clone(), authorities, identity })
}
