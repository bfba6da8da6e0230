//! Who uses a volume for longer than a request, in this process and, as far as they ask, in others.
//!
//! | beside | read-only export | export | sink of a job |
//! |---|---|---|---|
//! | read-only export | yes | no | no |
//! | export | no | no | no |
//! | sink of a job | no | no | no |
//!
//! Twice over, as for re-encryptions: a table of this process, which knows a file whatever open file it came as, and for exports a
//! lock on the open file ([`lock`]), which other daemons and virtual machines respect. Why no reader beside a writer: both have
//! data units in flight that the other knows nothing of, and half a data unit decrypts to noise.
//!
//! This module refuses to know of header changes: they take the short locks of cryptsetup ([`crate::volume::store`]), and are made
//! beside an export as they are beside a mapping.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::backend::device::{Device, Identity};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::lock;

/// What a volume is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Its plaintext is served, and not written.
    ReadOnly,
    /// Its plaintext is served and written.
    Served,
    /// A job writes it.
    Sink,
}

/// What there is: a use, and how often.
static USED: Mutex<Option<HashMap<Identity, (Use, u32)>>> = Mutex::new(None);

fn used() -> MutexGuard<'static, Option<HashMap<Identity, (Use, u32)>>> {
    USED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A use, as long as this lives.
#[derive(Debug)]
pub struct Claim {
    identity: Identity,
    locked: Option<Arc<OwnedFd>>,
}

impl Claim {
    /// Use `device` so, from now on.
    ///
    /// # Errors
    /// `Conflict`: somebody else's use, of this process or as a lock of another, does not go with it.
    pub fn of(device: &Device, wanted: Use) -> Result<Self> {
        {
            let mut used = used();
            let (there, count) =
                used.get_or_insert_default().entry(device.identity()).or_insert((wanted, 0));
            if *count > 0 && !(*there == Use::ReadOnly && wanted == Use::ReadOnly) {
                return Err(refusal(*there, wanted).at(device.name()));
            }
            *count += 1;
        }
        // From here on given back when dropped; the table is not locked twice, as nothing is dropped before it is let go of.
        let mut claim = Self { identity: device.identity(), locked: None };
        let locked = match wanted {
            Use::ReadOnly => lock::try_lock_shared(&**device.file()),
            Use::Served => lock::try_lock(&**device.file()),
            Use::Sink => return Ok(claim),
        };
        match locked {
            Ok(true) => {
                claim.locked = Some(Arc::clone(device.file()));
                Ok(claim)
            }
            Ok(false) => Err(Error::new(
                ErrorKind::Conflict,
                "the volume is in use: another program has locked it",
            )
            .at(device.name())
            .hint("another daemon may export or re-encrypt it, or a virtual machine run from it")),
            Err(errno) => Err(Error::io("cannot lock the volume", errno).at(device.name())),
        }
    }
}

fn refusal(there: Use, wanted: Use) -> Error {
    let (what, hint) = match (there, wanted) {
        (Use::Sink, Use::Sink) => ("another job is writing to the sink", "cryptctl job list shows it"),
        (Use::Sink, _) => ("a job is writing to the volume", "cryptctl job list shows it"),
        (_, Use::Sink) => ("the sink is a volume that is exported", "cryptctl export list shows it"),
        (Use::ReadOnly, _) => (
            "the volume is exported already, read-only",
            "a volume is exported once for writing, or any number of times read-only; cryptctl export list shows it",
        ),
        (Use::Served, _) => (
            "the volume is exported already",
            "connect to that export: any number of clients may; cryptctl export list shows it",
        ),
    };
    Error::new(ErrorKind::Conflict, what).hint(hint)
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(file) = &self.locked {
            // For all who share the open file: the client that passed it may have it open for longer.
            lock::unlock(&**file);
        }
        let mut used = used();
        if let Some(used) = used.as_mut()
            && let Some((_, count)) = used.get_mut(&self.identity)
        {
            *count -= 1;
            if *count == 0 {
                used.remove(&self.identity);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::device::Purpose;
    use std::fs::File;
    use std::path::Path;

    fn device(path: &Path) -> Device {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
        let purpose = Purpose { read: true, write: true, stream: false };
        Device::from_fd(file.expect("open").into(), "volume", purpose).expect("device")
    }

    fn refused(device: &Device, wanted: Use) -> String {
        let error = Claim::of(device, wanted).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Conflict);
        error.chain()
    }

    #[test]
    fn readers_share_a_volume_and_nobody_else_does() {
        let path = std::env::temp_dir().join(format!("usage-{}", std::process::id()));
        let (one, two) = (device(&path), device(&path));
        for there in [Use::ReadOnly, Use::Served, Use::Sink] {
            let held = Claim::of(&one, there).expect("free");
            for wanted in [Use::ReadOnly, Use::Served, Use::Sink] {
                if (there, wanted) == (Use::ReadOnly, Use::ReadOnly) {
                    drop(Claim::of(&two, wanted).expect("shared"));
                } else {
                    assert!(refused(&two, wanted).ends_with(": volume"));
                    // Not even through the same open file.
                    assert!(refused(&one, wanted).ends_with(": volume"));
                }
            }
            drop(held);
        }
        drop(Claim::of(&two, Use::Served).expect("free again"));
        std::fs::remove_file(&path).expect("clean up");
    }

    #[test]
    fn a_lock_of_another_program_is_respected_and_one_of_ours_is_seen() {
        let path = std::env::temp_dir().join(format!("usage-lock-{}", std::process::id()));
        let device = device(&path);
        let other = File::options().read(true).write(true).open(&path).expect("open");
        assert_eq!(lock::try_lock(&other), Ok(true));
        for wanted in [Use::ReadOnly, Use::Served] {
            assert_eq!(
                refused(&device, wanted),
                "the volume is in use: another program has locked it: volume"
            );
        }
        lock::unlock(&other);
        let held = Claim::of(&device, Use::ReadOnly).expect("free");
        assert_eq!((lock::try_lock_shared(&other), lock::try_lock(&other)), (Ok(true), Ok(false)));
        drop(held);
        assert_eq!(lock::try_lock(&other), Ok(true));
        lock::unlock(&other);
        let held = Claim::of(&device, Use::Served).expect("free");
        assert_eq!(lock::try_lock_shared(&other), Ok(false));
        drop(held);
        assert_eq!(lock::try_lock_shared(&other), Ok(true));
        std::fs::remove_file(&path).expect("clean up");
    }
}
