//! A request of the wire carried out.

use std::os::fd::OwnedFd;

use proto::luks::{Reply, Request};

use crate::error::Result;

/// Whose filesystem rights commits are made with: the peer's.
pub struct Caller<'a> {
    /// Makes a new file visible or removes it (see `job::commit`); given by the control plane so that this module need not know it.
    pub commit: &'a dyn Fn(&proto::Commit, OwnedFd, &OwnedFd) -> Result<()>,
    /// The caller has gone away: asked between slow steps, never after the first write.
    pub give_up: &'a dyn Fn() -> bool,
}

/// Carry out one header operation. Blocks for seconds.
///
/// # Errors
/// Whatever is wrong; nothing that opens the volume was changed.
pub fn carry_out(request: Request, descriptors: Vec<OwnedFd>, caller: &Caller<'_>) -> Result<Reply> {
    unimplemented!("{request:?} {} {}", descriptors.len(), (caller.give_up)())
}
