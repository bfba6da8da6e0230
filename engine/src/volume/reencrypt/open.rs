//! One under way: both keys, the protection digest, and the interrupted step if there is one.

use crate::backend::blocking::Blocking;
use crate::crypto::Secret;
use crate::error::Result;
use crate::volume::keyslots::GiveUp;
use crate::volume::reencrypt::Opened;

/// Open the re-encryption under way on a volume, and recover an interrupted step. `Ok(None)`: there is none. What is left to do may be
/// nothing: then `boundary` is at its end, and the header has been taken down.
///
/// # Errors
/// `WrongKey`: one of the keys is missing. `Damaged`: the metadata is not what was begun. `Unsupported`: of a kind this build
/// does not go on with; or no recovery is possible, and why.
pub fn open(
    header: Blocking,
    data: &mut Blocking,
    data_bytes: u64,
    keys: &[Secret],
    give_up: GiveUp<'_>,
) -> Result<Option<Opened>> {
    let _ = (header, data, data_bytes, keys, give_up);
    unimplemented!()
}
