//! Every bound of a request, checked once, before anything is done for it.

use crate::export::exported::Exported;
use crate::export::nbd::answer::Failure;
use crate::format::nbd::PAYLOAD_MAX;
use crate::format::nbd::command_flags as flag;
use crate::format::nbd::errors;
use crate::format::nbd::reply::Style;
use crate::format::nbd::request::{Command, Request};

/// Longest payload that is taken off the wire, to be refused with a reply; a longer one ends the connection. What clients can be made
/// to send in one request.
pub const DRAIN_MAX: u64 = 64 << 20;

fn refuse(errno: u32, text: &'static str) -> Result<(), Failure> {
    Err(Failure { errno, text, at: None })
}

/// Flags that mean something for a command. FUA is allowed everywhere, and ignored where nothing is written.
fn flags_of(command: Command, style: Style) -> u16 {
    flag::FUA
        | match command {
            Command::Read if style != Style::Simple => flag::DF,
            Command::Write if style == Style::Extended => flag::PAYLOAD_LEN,
            Command::WriteZeroes => flag::NO_HOLE | flag::FAST_ZERO,
            Command::BlockStatus => flag::REQ_ONE,
            _ => 0,
        }
}

/// May this be done?
///
/// # Errors
/// What the client is told.
pub fn check(
    request: &Request,
    style: Style,
    allocation: Option<u32>,
    export: &Exported,
) -> Result<(), Failure> {
    let Request { command, flags, offset, length, .. } = *request;
    if matches!(command, Command::Unknown(_) | Command::Disconnect) {
        return refuse(errors::EINVAL, "unknown command");
    }
    if flags & !flags_of(command, style) != 0 {
        return refuse(errors::EINVAL, "unknown flag for this command");
    }
    if command == Command::Flush {
        if offset != 0 || length != 0 {
            return refuse(errors::EINVAL, "a flush has neither offset nor length");
        }
        return Ok(());
    }
    let writes = matches!(command, Command::Write | Command::WriteZeroes | Command::Trim);
    if writes && export.read_only {
        return refuse(errors::EPERM, "the export is read-only");
    }
    if length == 0 {
        return refuse(errors::EINVAL, "a length of zero");
    }
    if offset.checked_add(length).is_none_or(|end| end > export.view.total()) {
        let errno = if matches!(command, Command::Write | Command::WriteZeroes) {
            errors::ENOSPC
        } else {
            errors::EINVAL
        };
        return refuse(errno, "beyond the end of the export");
    }
    match command {
        Command::Read | Command::Write if length > PAYLOAD_MAX.into() => {
            refuse(errors::EINVAL, "more than 32 MiB in one request")
        }
        // Zeros are encrypted and written like anything else.
        Command::WriteZeroes if flags & flag::FAST_ZERO != 0 => {
            refuse(errors::ENOTSUP, "zeros are not faster than data here")
        }
        Command::BlockStatus if allocation.is_none() => refuse(errors::EINVAL, "no context was asked for"),
        _ => Ok(()),
    }
}
