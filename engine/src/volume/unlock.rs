//! From a passphrase to the volume key.

use crate::backend::blocking::Blocking;
use crate::crypto::Secret;
use crate::error::Result;
use crate::volume::Header;

/// An open volume.
pub struct Unlocked {
    /// The keyslot that opened; `None`: the volume key itself was given.
    pub keyslot: Option<u32>,
    /// The volume key.
    pub key: Secret,
}

/// What a wrong passphrase and a damaged keyslot both are.
pub const WRONG_KEY: &str = "wrong key or damaged data";

/// Try `secret` on the keyslots (or on `only` that one), the preferred ones first. `give_up` is asked between attempts.
///
/// # Errors
/// `WrongKey`: [`WRONG_KEY`], whatever the reason; `NotFound`: the keyslot asked for is not in use; `Cancelled`.
pub fn with_passphrase(
    device: &mut Blocking,
    header: &Header,
    secret: &Secret,
    only: Option<u32>,
    give_up: &dyn Fn() -> bool,
) -> Result<Unlocked> {
    unimplemented!("{} {header:?} {} {only:?} {}", device.name(), secret.len(), give_up())
}

/// Is this the volume key? Checked against the digest of the data area.
///
/// # Errors
/// `WrongKey`.
pub fn with_volume_key(header: &Header, key: Secret) -> Result<Unlocked> {
    unimplemented!("{header:?} {}", key.len())
}
