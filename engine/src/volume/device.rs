//! The devices of a request: files as they are, connections to NBD servers as volumes.

use std::sync::Arc;

use proto::remote::Remote;

use crate::backend::blocking::Blocking;
use crate::backend::device::{Device, Purpose};
use crate::backend::nbd;
use crate::error::{Error, ErrorKind, Result};
use crate::key::Descriptors;

/// Bytes at the end of a volume that are looked at before it is overwritten: there are signatures too (GPT, RAID).
const END_BYTES: u64 = 1 << 20;
/// Most bytes of its beginning.
const BEGINNING_MAX: u64 = 64 << 20;
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
    let device = nbd::open(connections, remote, name, purpose)?;
    if let Some(bytes) = remote.blank_bytes {
        check_blank(&device, bytes)?;
    }
    Ok(device)
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
