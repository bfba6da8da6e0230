//! Ciphers by their dm-crypt names: what a header says, and the [`SectorCipher`] that does it.

use proto::TweakKind;

use crate::crypto::{Kernel, Secret, SectorCipher};
use crate::error::Result;

/// A cipher of a LUKS volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CipherSpec {
    /// `aes-xts-plain64`, `aes-xts-plain`: keys of 32 or 64 bytes; every kernel of the ladder.
    AesXts(TweakKind),
    /// `aes-cbc-essiv:sha256`: keys of 16, 24 or 32 bytes; to read old volumes.
    AesCbcEssivSha256,
    /// `aes-cbc-plain64`, `aes-cbc-plain`: keys of 16, 24 or 32 bytes; to read old volumes.
    AesCbc(TweakKind),
}

impl CipherSpec {
    /// From dm-crypt's notation (`aes-xts-plain64`), as in LUKS2 `encryption` fields and LUKS1 `cipher-name` + `-` + `cipher-mode`.
    ///
    /// # Errors
    /// `Unsupported`, naming the cipher.
    pub fn parse(text: &str) -> Result<Self> {
        unimplemented!("{text}")
    }

    /// dm-crypt's notation.
    #[must_use]
    pub fn name(self) -> &'static str {
        unimplemented!()
    }

    /// May new volumes and keyslots use it?
    #[must_use]
    pub fn is_for_new(self) -> bool {
        matches!(self, Self::AesXts(_))
    }

    /// Does it take keys of this length?
    ///
    /// # Errors
    /// `Invalid`, naming cipher and length in bits.
    pub fn check_key_bytes(self, key_bytes: usize) -> Result<()> {
        unimplemented!("{key_bytes}")
    }

    /// A cipher over data units of `unit_bytes`, the first of which has the counter `offset_sectors` (512-byte sectors).
    ///
    /// # Errors
    /// As [`CipherSpec::check_key_bytes`]; the layout is not one the kernels can work with.
    pub fn build(
        self,
        kernel: Kernel,
        key: &Secret,
        unit_bytes: u32,
        offset_sectors: u64,
    ) -> Result<Box<dyn SectorCipher>> {
        unimplemented!("{kernel:?} {} {unit_bytes} {offset_sectors}", key.len())
    }
}
