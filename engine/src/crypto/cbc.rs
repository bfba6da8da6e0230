//! AES-CBC with the IVs of dm-crypt, to read the volumes of another decade: the `aes` and `cbc` crates, no kernel of the ladder.
//!
//! The IV of a data unit is its counter (little-endian, zero-extended to 16 bytes), or, for ESSIV, that block encrypted by
//! AES-256 under SHA-256 of the volume key (torvalds/linux `drivers/md/dm-crypt.c`, `crypto/essiv.c`).
//!
//! What this module refuses to do: be fast (a chained mode encrypts one block at a time), and be chosen for new volumes
//! ([`super::spec::CipherSpec::is_for_new`]): CBC lets whoever can write to the disk flip chosen plaintext bits.

use aes::cipher::{
    Array, BlockCipherDecrypt, BlockCipherEncrypt, BlockModeDecrypt, BlockModeEncrypt, BlockSizeUser,
    InnerIvInit, KeyInit, consts::U16,
};
use aes::{Aes128, Aes192, Aes256};
use zeroize::Zeroize;

use super::SectorCipher;
use super::hash::Hash;
use super::secret::{Locked, Secret};
use super::select::burn_stack;
use super::tweak::{Counter, Layout};
use crate::error::Result;
use crate::units::DataUnit;

/// Where the IV of a data unit comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Iv {
    /// `plain`, `plain64`: the counter itself.
    Counter,
    /// `essiv:sha256`.
    EssivSha256,
}

/// The key schedules; one type, so that they lie in locked memory together.
struct Keys<C> {
    data: C,
    essiv: Option<Aes256>,
}

struct Cbc<C> {
    keys: Locked<Keys<C>>,
    counter: Counter,
    unit_bytes: usize,
}

/// A key of 16, 24 or 32 bytes bound to a layout.
///
/// # Errors
/// As [`Layout::check`]. No memory.
///
/// # Panics
/// With any other length of key.
pub(super) fn cipher(key: &Secret, layout: Layout, iv: Iv) -> Result<Box<dyn SectorCipher>> {
    layout.check()?;
    let bound: Result<Box<dyn SectorCipher>> = match key.len() {
        16 => bind::<Aes128>(key, layout, iv),
        24 => bind::<Aes192>(key, layout, iv),
        _ => bind::<Aes256>(key, layout, iv),
    };
    burn_stack();
    bound
}

// Not inlined: its frame, which holds the schedules for a moment, must lie where `burn_stack` reaches.
#[inline(never)]
fn bind<C>(key: &Secret, layout: Layout, iv: Iv) -> Result<Box<dyn SectorCipher>>
where
    C: KeyInit + BlockSizeUser<BlockSize = U16> + BlockCipherEncrypt + BlockCipherDecrypt,
    C: Send + Sync + 'static,
{
    let data = C::new_from_slice(key.as_bytes()).expect("the caller matched the key's length to this cipher");
    let essiv = (iv == Iv::EssivSha256).then(|| {
        let mut hashed = [0_u8; 32];
        Hash::Sha256.digest(&[key.as_bytes()], &mut hashed);
        let essiv = Aes256::new(&Array(hashed));
        hashed.zeroize();
        essiv
    });
    Ok(Box::new(Cbc {
        keys: Locked::new(Keys { data, essiv })?,
        counter: layout.counter(),
        unit_bytes: layout.unit_bytes as usize,
    }))
}

impl<C> Cbc<C> {
    /// Every unit of `buf`, as blocks, with its IV.
    fn each(
        &self,
        first: DataUnit,
        buf: &mut [u8],
        mut with: impl FnMut(&C, &Array<u8, U16>, &mut [Array<u8, U16>]),
    ) {
        assert!(buf.len().is_multiple_of(self.unit_bytes), "a run has whole data units");
        for (at, unit) in buf.chunks_exact_mut(self.unit_bytes).enumerate() {
            let count = self.counter.at(DataUnit(first.0.wrapping_add(at as u64)));
            let mut iv = Array(u128::from(count).to_le_bytes());
            if let Some(essiv) = &self.keys.essiv {
                essiv.encrypt_block(&mut iv);
            }
            let (blocks, rest) = Array::slice_as_chunks_mut(unit);
            assert!(rest.is_empty(), "a checked layout has units of whole blocks");
            with(&self.keys.data, &iv, blocks);
        }
    }
}

impl<C> SectorCipher for Cbc<C>
where
    C: BlockSizeUser<BlockSize = U16> + BlockCipherEncrypt + BlockCipherDecrypt + Send + Sync,
{
    fn encrypt(&self, first: DataUnit, buf: &mut [u8]) {
        self.each(first, buf, |aes, iv, blocks| {
            cbc::Encryptor::inner_iv_init(aes, iv).encrypt_blocks(blocks);
        });
    }

    fn decrypt(&self, first: DataUnit, buf: &mut [u8]) {
        self.each(first, buf, |aes, iv, blocks| {
            cbc::Decryptor::inner_iv_init(aes, iv).decrypt_blocks(blocks);
        });
    }

    fn is_separable(&self) -> bool {
        false
    }
}
