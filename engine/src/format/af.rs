//! The anti-forensic splitter of LUKS (`"type": "luks1"`): a key inflated so that destroying any part of it destroys it.

use crate::crypto::hash::Hash;

/// Stripes of every LUKS keyslot.
pub const STRIPES: u32 = 4000;

/// Split `key` into `stripes`: on entry its bytes are random (`key.len() * STRIPES`), on return they are the split key.
///
/// # Panics
/// If the lengths do not fit.
pub fn split(hash: Hash, key: &[u8], stripes: &mut [u8]) {
    unimplemented!("{hash:?} {} {}", key.len(), stripes.len())
}

/// The key that `stripes` were made of.
///
/// # Panics
/// If `stripes` is not `key.len() * STRIPES` long.
pub fn merge(hash: Hash, stripes: &[u8], key: &mut [u8]) {
    unimplemented!("{hash:?} {} {}", key.len(), stripes.len())
}
