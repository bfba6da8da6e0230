//! A volume in the middle of a re-encryption, opened to be served: what was interrupted is recovered first, and what is new and what is old
//! is each under its own key. A `reencrypt` job goes on from there while clients use it.
//!
//! Refused here: serving it to be read only, or by a header that cannot be written. Its header is made durable before any client writes,
//! or a power cut could bring back an older one, whose recovery would undo what clients have written; so is one that says that it is over
//! ([`settle`]).

use std::error::Error as _;
use std::sync::Arc;

use crate::backend::blocking::Blocking;
use crate::backend::device::Device;
use crate::crypto::{Kernel, Secret};
use crate::error::{Error, ErrorKind, Result};
use crate::format::luks2::reencrypt::Direction;
use crate::job::reencrypt::course;
use crate::pipeline::view::{View, Way};
use crate::volume::Header;
use crate::volume::reencrypt::decide::Requirement;
use crate::volume::reencrypt::{Opened, luks, open};

/// Does the header say that a re-encryption is under way?
#[must_use]
pub fn is_under_way(header: &Header) -> bool {
    match header {
        Header::Luks1(_) => false,
        Header::Luks2(loaded) => Requirement::of(&loaded.header.metadata) != Requirement::None,
    }
}

/// A header that says that nothing is under way is the last word: not one that is in the page cache only, behind whose back a power cut brings
/// back one of before, and with it a recovery of what clients have overwritten since. What it notes to be overwritten still is, for
/// then the end may have been cut off before it was durable. `detached`: it cannot be written.
///
/// # Errors
/// `Unsupported`: something is to be overwritten, and cannot be. Else of the device, or as [`luks::sweep`].
pub fn settle(header: Header, blocking: &mut Blocking, detached: bool) -> Result<()> {
    match header {
        Header::Luks2(mut loaded) if luks::is_unswept(&loaded.header.metadata) => {
            if detached {
                let what = "a re-encryption has left something to be overwritten, and the detached header is opened to be read only";
                return Err(Error::new(ErrorKind::Unsupported, what)
                    .at(blocking.name())
                    .hint("let it be overwritten first: cryptctl reencrypt --resume-only"));
            }
            luks::sweep(blocking, &mut loaded).map(drop)
        }
        _ => match blocking.flush() {
            // A filesystem that cannot be written (squashfs, iso9660) may not know the call: it has nothing unwritten.
            Err(error) if detached && is_refused(&error) => Ok(()),
            flushed => flushed,
        },
    }
}

/// The file has no such operation, or may not be written.
fn is_refused(error: &Error) -> bool {
    let cause = error.source().and_then(|cause| cause.downcast_ref::<std::io::Error>());
    cause
        .and_then(std::io::Error::raw_os_error)
        .is_some_and(|errno| [libc::EINVAL, libc::EROFS].contains(&errno))
}

/// Open it with passphrases of both volume keys, through the page cache. `None`: it was over after all, and the header says so now.
///
/// # Errors
/// `Unsupported`: it is detached, or to be read only. As [`open::open`].
pub fn open(
    device: &Arc<Device>,
    (detached, read_only): (bool, bool),
    keys: &[Secret],
    give_up: &dyn Fn() -> bool,
) -> Result<Option<Opened>> {
    if detached || read_only {
        let what = if detached {
            "the volume is in the middle of a re-encryption, and its detached header is opened to be read only"
        } else {
            "the volume is in the middle of a re-encryption, and cannot be served to be read only"
        };
        return Err(Error::new(ErrorKind::Unsupported, what)
            .at(device.name())
            .hint("finish it first: cryptctl reencrypt --resume-only"));
    }
    device.disable_direct();
    let blocking = || Blocking::open(device.file().clone(), device.name(), 1);
    let found = open::open(blocking()?, &mut blocking()?, device.size().unwrap_or(0), keys, give_up)?;
    Ok(found.under())
}

/// Its view.
///
/// # Errors
/// No memory for keys.
pub fn view(opened: &Opened, kernel: Kernel) -> Result<Arc<View>> {
    let moved = opened.moved.map(|moved| (moved.bytes, moved.offset));
    let (old, new) =
        (course::segments(&opened.old, moved, kernel)?, course::segments(&opened.new, None, kernel)?);
    let (way, passed) = match opened.direction {
        Direction::Forward => (Way::Forward, opened.boundary),
        Direction::Backward => (Way::Backward, opened.total - opened.boundary),
    };
    Ok(View::mixed(old, new, way, passed, opened.total))
}
