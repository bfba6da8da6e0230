//! Sector encryption: AES-XTS kernels, their selection, and the memory keys live in.
//!
//! A [`SectorCipher`] is one volume key bound to one layout (data-unit size and tweak counter), implemented by one
//! [`Kernel`] of the ladder. The portable kernel is the oracle: the others exist only while they equal it.

use crate::units::DataUnit;

/// Encrypts and decrypts whole data units in place. Infallible: misuse is a bug, so it asserts.
pub trait SectorCipher: Send + Sync {
    /// Plaintext to ciphertext. `buf` holds whole data units, the first of which has index `first`.
    fn encrypt(&self, first: DataUnit, buf: &mut [u8]);
    /// Ciphertext to plaintext; the inverse of `encrypt`.
    fn decrypt(&self, first: DataUnit, buf: &mut [u8]);
}

/// The ladder, fastest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// VAES on 512-bit registers.
    VaesAvx512,
    /// VAES on 256-bit registers.
    VaesAvx2,
    /// AES-NI on 128-bit registers.
    AesNi,
    /// The `aes` and `xts-mode` crates; any CPU. The oracle.
    Portable,
}
