//! From metadata: what is under way, every rule checked. A header whose re-encryption breaks one is refused as a whole, for
//! whoever can change metadata could otherwise have data rewritten under a key of his choice, or not at all (CVE-2021-4122).

use super::{Process, State};
use crate::error::Result;
use crate::format::luks2::metadata::Metadata;

/// The re-encryption a header speaks of, if any.
///
/// # Errors
/// `Damaged`: metadata that no step of any re-encryption leaves behind, naming the rule. `Unsupported`: kinds this build does not
/// go on with, named, with who can.
pub fn read(metadata: &Metadata) -> Result<Option<(Process, State)>> {
    let _ = metadata;
    unimplemented!()
}
