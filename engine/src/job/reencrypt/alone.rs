//! One re-encryption per volume: two at once would rewrite each other's hotzones.
//!
//! Twice over: a lock on the open file keeps out other daemons, and a table the other jobs of this one, which may have been
//! sent the same open file.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::backend::device::{Device, Identity};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::lock;

/// What jobs of this process are rewriting, or about to.
static TAKEN: Mutex<Option<HashSet<Identity>>> = Mutex::new(None);

fn taken() -> MutexGuard<'static, Option<HashSet<Identity>>> {
    TAKEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A file or device that nobody else re-encrypts as long as this lives.
#[derive(Debug)]
pub struct Alone {
    identity: Identity,
    file: Arc<OwnedFd>,
}

impl Alone {
    /// Take it.
    ///
    /// # Errors
    /// `Conflict`: another job, or another program, is at it.
    pub fn with(device: &Device) -> Result<Self> {
        let refuse =
            |what: &str, hint: &str| Err(Error::new(ErrorKind::Conflict, what).at(device.name()).hint(hint));
        let mut taken = taken();
        if !taken.get_or_insert_default().insert(device.identity()) {
            return refuse("another job re-encrypts this volume", "cryptctl job list shows it");
        }
        // From here on given back when dropped; the table is not locked twice, as nothing is dropped before it is let go of.
        let alone = Self { identity: device.identity(), file: Arc::clone(device.file()) };
        drop(taken);
        match lock::try_lock(&*alone.file) {
            Ok(true) => Ok(alone),
            Ok(false) => refuse(
                "the volume is in use: another program has locked it",
                "another daemon may be re-encrypting it, or a virtual machine run from it",
            ),
            Err(errno) => Err(Error::io("cannot lock the volume", errno).at(device.name())),
        }
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        lock::unlock(&*self.file);
        if let Some(taken) = taken().as_mut() {
            taken.remove(&self.identity);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::device::Purpose;
    use std::fs::File;

    #[test]
    fn nobody_else_gets_it_not_even_through_the_same_open_file() {
        let path = std::env::temp_dir().join(format!("alone-{}", std::process::id()));
        let file =
            File::options().read(true).write(true).create(true).truncate(true).open(&path).expect("open");
        let purpose = Purpose { read: true, write: true, stream: false };
        let device = |file: File| Device::from_fd(file.into(), "volume", purpose).expect("device");
        let first = device(file.try_clone().expect("dup"));
        let alone = Alone::with(&first).expect("free");
        let other = File::options().read(true).write(true).open(&path).expect("open");
        for second in [file.try_clone().expect("dup"), other.try_clone().expect("dup")] {
            let error = Alone::with(&device(second)).expect_err("taken");
            assert_eq!(error.kind(), ErrorKind::Conflict);
            assert_eq!(error.chain(), "another job re-encrypts this volume: volume");
        }
        drop(alone);
        // Another program, as far as locks go.
        assert_eq!(lock::try_lock(&other), Ok(true));
        let error = Alone::with(&first).expect_err("locked");
        assert_eq!(error.chain(), "the volume is in use: another program has locked it: volume");
        drop(other);
        drop(Alone::with(&first).expect("free again"));
        std::fs::remove_file(&path).expect("clean up");
    }
}
