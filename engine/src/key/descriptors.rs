//! The descriptors that came with a request: each is named by its place, used once, and none is left over.

use std::os::fd::OwnedFd;

use crate::crypto::Secret;
use crate::error::{Error, ErrorKind, Result};
use crate::key::read_secret;

/// Descriptors of a request, each to be used once.
#[derive(Debug)]
pub struct Descriptors(Vec<Option<OwnedFd>>);

impl Descriptors {
    /// In the order in which they were sent.
    #[must_use]
    pub fn new(sent: Vec<OwnedFd>) -> Self {
        Self(sent.into_iter().map(Some).collect())
    }

    /// The one at `index`, which the request calls `what`.
    ///
    /// # Errors
    /// `Invalid`: it was not sent, or was taken before.
    pub fn take(&mut self, index: u32, what: &str) -> Result<OwnedFd> {
        let place = usize::try_from(index).ok().and_then(|index| self.0.get_mut(index));
        place.and_then(Option::take).ok_or_else(|| {
            let what = format!("descriptor {index} ({what}) was not sent, or is named twice");
            Error::new(ErrorKind::Invalid, what)
        })
    }

    /// The secret in the one at `index`.
    ///
    /// # Errors
    /// As [`Descriptors::take`] and [`read_secret`].
    pub fn secret(&mut self, index: u32, what: &str) -> Result<Secret> {
        read_secret(self.take(index, what)?, proto::MAX_SECRET)
    }

    /// Everything has been taken.
    ///
    /// # Errors
    /// `Invalid`: more were sent than the request names.
    pub fn finish(self) -> Result<()> {
        if self.0.iter().any(Option::is_some) {
            return Err(Error::new(ErrorKind::Invalid, "more descriptors were sent than the request names"));
        }
        Ok(())
    }
}
