//! The devices of a request: files as they are, connections to NBD servers as volumes.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use proto::remote::{Remote, Tls};

use crate::backend::blocking::Blocking;
use crate::backend::device::{Device, Purpose};
use crate::backend::nbd;
use crate::backend::nbd::tls::Credentials;
use crate::crypto::Secret;
use crate::error::{Error, ErrorKind, Result};
use crate::key::{Descriptors, read_secret};

/// Bytes at the end of a volume that are looked at before it is overwritten: there are signatures too (GPT, RAID).
const END_BYTES: u64 = 1 << 20;
/// Most bytes of its beginning.
const BEGINNING_MAX: u64 = 64 << 20;
/// Bytes of certificates: the authorities of a system are some 200 KiB.
const PEM_MAX: usize = 1 << 20;
/// Bytes looked at at a time.
const PIECE: u64 = 1 << 20;

/// Take descriptor `fd` as a device. `role` and `name` are for messages. Of a remote one that must be blank, its content is looked at.
///
/// # Errors
/// As [`Device::from_fd`] or, where `remotes` names the descriptor, [`nbd::open`]; `Conflict`: it is not blank.
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
    let device = nbd::open(connections, remote, tls.as_ref(), name, purpose)?;
    if let Some(bytes) = remote.blank_bytes {
        check_blank(&device, bytes)?;
    }
    Ok(device)
}

/// What a request's descriptors hold for TLS.
fn credentials(descriptors: &mut Descriptors, tls: &Tls) -> Result<Credentials> {
    let authorities = match tls.authorities_fd {
        Some(fd) => Some(pem(descriptors.take(fd, "TLS authorities")?)?.as_bytes().to_vec()),
        None => None,
    };
    let identity = match tls.identity_fds {
        Some((chain, key)) => {
            let chain = pem(descriptors.take(chain, "TLS certificate")?)?.as_bytes().to_vec();
            Some((chain, pem(descriptors.take(key, "TLS key")?)?))
        }
        None => None,
    };
    Ok(Credentials { server_name: tls.server_name.clone(), authorities, identity })
}

/// All of a file, which is short. A pipe is read like one that holds a key.
fn pem(fd: OwnedFd) -> Result<Secret> {
    let failed = |errno| Error::io("cannot read PEM", errno);
    let stat = rustix::fs::fstat(&fd).map_err(failed)?;
    if !rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file() {
        return read_secret(fd, PEM_MAX);
    }
    // A byte more than there should be: room to see that there is none.
    let room = usize::try_from(stat.st_size).unwrap_or(0).min(PEM_MAX) + 1;
    Secret::read_with(room, |into| {
        let mut filled = 0;
        while filled < into.len() {
            match rustix::io::pread(&fd, &mut into[filled..], filled as u64).map_err(failed)? {
                0 => break,
                count => filled += count,
            }
        }
        if filled > PEM_MAX {
            return Err(Error::new(ErrorKind::Limit, format!("more than {PEM_MAX} bytes of PEM")));
        }
        Ok(filled)
    })
}

/// Nothing is overwritten that somebody may miss. Reads at most some tens of MiB.
///
/// # Errors
/// `Conflict`: there is something; `Limit`: too much is to be looked at.
fn check_blank(device: &Device, bytes: u64) -> Result<()> {
    if bytes > BEGINNING_MAX {
        let what = format!("{bytes} bytes are to be zeros, and at most {BEGINNING_MAX} are looked at");
        return Err(Error::new(ErrorKind::Limit, what).at(device.name()));
    }
    let size = device.size().unwrap_or(0);
    let mut blocking =
        Blocking::open(Arc::clone(device.file()), device.name(), device.direct_alignment().unwrap_or(1))?;
    let beginning = 0..bytes.min(size);
    let end = size.saturating_sub(END_BYTES).max(beginning.end)..size;
    let mut piece = vec![0; usize::try_from(PIECE).expect("a MiB")];
    for range in [beginning, end] {
        let mut at = range.start;
        while at < range.end {
            let part = &mut piece[..usize::try_from(PIECE.min(range.end - at)).expect("a piece")];
            blocking.read(at, part)?;
            if let Some(found) = part.iter().position(|byte| *byte != 0) {
                let what = if part.starts_with(b"LUKS\xba\xbe") && at == 0 {
                    "it holds a LUKS volume".to_owned()
                } else {
                    format!("it holds data, at byte {} and perhaps elsewhere", at + found as u64)
                };
                return Err(Error::new(ErrorKind::Conflict, what)
                    .at(device.name())
                    .hint("--force overwrites what it holds"));
            }
            at += part.len() as u64;
        }
    }
    Ok(())
}
