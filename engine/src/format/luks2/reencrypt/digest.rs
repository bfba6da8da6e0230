//! The bytes the protection digest covers: both keys and all that never changes while a re-encryption runs.

use super::Process;
use crate::crypto::Secret;
use crate::error::Result;
use crate::format::luks2::metadata::Metadata;

/// The password of the digest's PBKDF2 (LUKS2 on-disk format, "Reencryption digest").
///
/// # Errors
/// `Invalid`: a key is missing, or metadata that cannot be put into these bytes. No memory.
pub fn message(
    metadata: &Metadata,
    process: &Process,
    old_key: Option<&Secret>,
    new_key: Option<&Secret>,
) -> Result<Secret> {
    let _ = (metadata, process, old_key, new_key);
    unimplemented!()
}
