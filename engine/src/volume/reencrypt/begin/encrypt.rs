//! From plain data to a volume.

use super::{Planned, Wish};
use crate::backend::blocking::Blocking;
use crate::crypto::Secret;
use crate::error::{Error, ErrorKind, Result};
use crate::volume::keyslots::GiveUp;
use crate::volume::reencrypt::Opened;

/// See [`super::plan`].
pub fn plan(header: &mut Blocking, wish: &Wish<'_>, new_key: Option<&Secret>) -> Result<Planned> {
    let _ = (header, wish, new_key);
    Err(Error::new(ErrorKind::Unsupported, "todo"))
}

/// See [`super::begin`].
pub fn begin(
    header: Blocking,
    data: &mut Blocking,
    wish: &Wish<'_>,
    new_key: Option<&Secret>,
    give_up: GiveUp<'_>,
) -> Result<Opened> {
    let _ = (header, data, wish, new_key, give_up);
    Err(Error::new(ErrorKind::Unsupported, "todo"))
}
