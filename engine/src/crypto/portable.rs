//! The oracle, and the kernel of last resort: the `aes` and `xts-mode` crates, one block at a time, on any CPU.
//!
//! (`aes` itself uses AES instructions where it finds them; it shares no code with our kernels either way.)

use aes::cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, BlockSizeUser, KeyInit, consts::U16};
use aes::{Aes128, Aes256};
use xts_mode::Xts128;

use super::SectorCipher;
use super::secret::{Locked, VolumeKey};
use super::tweak::{Counter, Layout};
use crate::error::Result;
use crate::units::DataUnit;

struct Portable<C> {
    xts: Locked<Xts128<C>>,
    counter: Counter,
    unit_bytes: usize,
}

/// A checked layout and a key, on the portable kernel.
pub(super) fn cipher(key: &VolumeKey, layout: Layout) -> Result<Box<dyn SectorCipher>> {
    fn build<C>(key: &VolumeKey, layout: Layout) -> Result<Portable<C>>
    where
        C: KeyInit,
        C: BlockSizeUser<BlockSize = U16>,
    {
        let half = |bytes: &[u8]| {
            C::new_from_slice(bytes).expect("a volume key has two halves of this cipher's length")
        };
        Ok(Portable {
            xts: Locked::new(Xts128::new(half(key.data_half()), half(key.tweak_half())))?,
            counter: layout.counter(),
            unit_bytes: layout.unit_bytes as usize,
        })
    }
    Ok(match key.bits() {
        128 => Box::new(build::<Aes128>(key, layout)?),
        _ => Box::new(build::<Aes256>(key, layout)?),
    })
}

impl<C> Portable<C> {
    /// Every unit of `buf` with its tweak.
    fn each(
        &self,
        first: DataUnit,
        buf: &mut [u8],
        mut with: impl FnMut(&Xts128<C>, &mut [u8], Array<u8, U16>),
    ) {
        assert!(buf.len().is_multiple_of(self.unit_bytes), "a run has whole data units");
        for (at, unit) in buf.chunks_exact_mut(self.unit_bytes).enumerate() {
            let count = self.counter.at(DataUnit(first.0.wrapping_add(at as u64)));
            with(&self.xts, unit, Array(u128::from(count).to_le_bytes()));
        }
    }
}

impl<C> SectorCipher for Portable<C>
where
    C: BlockSizeUser<BlockSize = U16> + BlockCipherEncrypt + BlockCipherDecrypt + Send + Sync,
{
    fn encrypt(&self, first: DataUnit, buf: &mut [u8]) {
        self.each(first, buf, |xts, unit, tweak| xts.encrypt_sector(unit, tweak));
    }

    fn decrypt(&self, first: DataUnit, buf: &mut [u8]) {
        self.each(first, buf, |xts, unit, tweak| xts.decrypt_sector(unit, tweak));
    }

    fn is_separable(&self) -> bool {
        true
    }
}
