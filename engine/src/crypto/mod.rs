//! Sector encryption: AES-XTS kernels, their selection, and the memory keys live in.
//!
//! A [`SectorCipher`] is one volume key bound to one layout (data-unit size and tweak counter), implemented by one
//! [`Kernel`] of the ladder. The portable kernel is the oracle: the others exist only while they equal it.
//!
//! | file | purpose |
//! |---|---|
//! | `select` | the ladder: detection, self-test, and the constructors [`cipher`] and [`recrypter`] |
//! | `tweak` | [`Layout`]: how data units are numbered |
//! | `secret` | locked, wiped memory: [`Secret`], [`Locked`], [`VolumeKey`] |
//! | `portable` | the oracle: `aes` and `xts-mode` |
//! | `xts` | the loop shared by the instruction-set kernels; `aesni`, `vaes256`, `vaes512` are its vectors |
//! | `schedule` | AES round keys for them |
//! | `isa` | binds schedule, counter and kernel to the traits |
//! | `recrypt` | re-encryption for layouts and kernels without a fused loop |
//! | `limit` | the issue limit: the AES instruction and nothing else |
//! | `measure` | one kernel beside its limit, for benches and the daemon's bench job |
//! | `spec` | ciphers by their dm-crypt names |
//! | `cbc` | AES-CBC, to read old volumes |
//! | `hash`, `kdf` | the hashes and key derivations of LUKS headers |
//! | `sha256` | SHA-256 of many blocks side by side, for checksums and proofs |
//! | `proof` | a keyed digest of plaintext, in any order |
//! | `argon` | Argon2's memory and lanes |
//! | `calibrate`, `room` | what a key derivation shall cost here, and the memory it may take |
//!
//! What this module refuses to do: I/O (but for what the kernel says about memory), randomness, choosing keys, ciphertext stealing (data units are whole blocks),
//! authentication (XTS has none).

use crate::units::DataUnit;

#[cfg(target_arch = "x86_64")]
mod aesni;
mod argon;
mod calibrate;
mod cbc;
pub mod hash;
#[cfg(target_arch = "x86_64")]
mod isa;
pub mod kdf;
pub mod keyed;
pub mod limit;
pub mod measure;
mod portable;
pub mod proof;
mod recrypt;
mod room;
#[cfg(target_arch = "x86_64")]
mod schedule;
mod secret;
mod select;
pub mod sha256;
pub mod spec;
mod tweak;
#[cfg(target_arch = "x86_64")]
mod vaes256;
#[cfg(target_arch = "x86_64")]
mod vaes512;
#[cfg(target_arch = "x86_64")]
mod xts;

pub use secret::{Locked, Secret, VolumeKey, bytes_equal, keys_locked};
pub use select::{burn_stack, cipher, recrypter};
pub use tweak::Layout;

/// Encrypts and decrypts whole data units in place. Infallible: misuse is a bug, so it asserts.
pub trait SectorCipher: Send + Sync {
    /// Plaintext to ciphertext. `buf` holds whole data units, the first of which has index `first`.
    ///
    /// # Panics
    /// If `buf` is not a whole number of data units.
    fn encrypt(&self, first: DataUnit, buf: &mut [u8]);
    /// Ciphertext to plaintext; the inverse of `encrypt`.
    ///
    /// # Panics
    /// If `buf` is not a whole number of data units.
    fn decrypt(&self, first: DataUnit, buf: &mut [u8]);
    /// Does every block of a data unit come out right whatever the others are? Not so where they are chained.
    fn is_separable(&self) -> bool;
}

/// Turns ciphertext under an old key and layout into ciphertext under a new one, in place, in one pass over memory.
pub trait Recrypter: Send + Sync {
    /// `first_byte` is the offset of `buf` in the segment; it and the length of `buf` are multiples of both data units.
    ///
    /// # Panics
    /// If they are not.
    fn recrypt(&self, first_byte: u64, buf: &mut [u8]);
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
