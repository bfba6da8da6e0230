//! Keyslot material: a volume key split, encrypted and back.
//!
//! ```text
//! passphrase ─ KDF(salt) ─▶ area key ─┐
//! volume key ─ AF split ─▶ stripes ─ encrypt (512-byte units, counter 0 at the area's beginning) ─▶ material
//! ```
//! Both LUKS versions do the same; they differ in where the parameters stand. Sources: LUKS On-Disk Format Specification
//! 1.2.3, section 2; LUKS2 On-Disk Format Specification 1.1.4, section 3.2.
//!
//! What this module refuses to do: I/O, and telling a right key from a wrong one.

use zeroize::{Zeroize, Zeroizing};

use crate::crypto::hash::Hash;
use crate::crypto::kdf::Kdf;
use crate::crypto::spec::CipherSpec;
use crate::crypto::{Kernel, Secret, SectorCipher};
use crate::error::{Error, ErrorKind, Result};
use crate::format::af;
use crate::units::DataUnit;
use crate::volume::random;

/// Bytes under one counter, whatever the data unit of the volume.
const UNIT_BYTES: u32 = 512;
/// No key is longer (4096 bits): keeps the memory of [`Wrapping::wrap`] below 2 MiB.
const KEY_BYTES_MAX: usize = 512;

/// How a keyslot's material is made.
#[derive(Debug, Clone, Copy)]
pub struct Wrapping<'a> {
    /// Passphrase to area key.
    pub kdf: Kdf,
    /// Its salt.
    pub salt: &'a [u8],
    /// Cipher of the area (512-byte units from counter 0).
    pub cipher: CipherSpec,
    /// Key of that cipher, bytes.
    pub area_key_bytes: usize,
    /// Hash of the AF splitter.
    pub af_hash: Hash,
}

/// [`af::material_bytes`] as lengths of memory; keys of 4 GiB and more, which there are none of, count as such.
#[must_use]
pub fn material_bytes(key_bytes: usize) -> usize {
    let bytes = af::material_bytes(u32::try_from(key_bytes).unwrap_or(u32::MAX));
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

impl Wrapping<'_> {
    /// `key` under `passphrase`: the material to write.
    ///
    /// # Errors
    /// Of the KDF or the cipher; no randomness. `Invalid`: a key of no bytes or of more than 512.
    pub fn wrap(&self, passphrase: &Secret, key: &Secret) -> Result<Vec<u8>> {
        self.wrap_unless(passphrase, key, &|| false)
    }

    /// [`Wrapping::wrap`], asking `give_up` while the KDF waits for another ([`Kdf::derive_unless`]).
    ///
    /// # Errors
    /// As [`Wrapping::wrap`]; `Cancelled`.
    pub fn wrap_unless(
        &self,
        passphrase: &Secret,
        key: &Secret,
        give_up: &dyn Fn() -> bool,
    ) -> Result<Vec<u8>> {
        check_key_bytes(key.len())?;
        let cipher = self.cipher(passphrase, give_up)?;
        let mut material = Zeroizing::new(vec![0; material_bytes(key.len())]);
        // What fills the last sector is random too, so that all of the material looks alike.
        random::fill(&mut material)?;
        af::split(self.af_hash, key.as_bytes(), &mut material[..key.len() * af::STRIPES as usize]);
        cipher.encrypt(DataUnit(0), &mut material);
        Ok(std::mem::take(&mut *material))
    }

    /// The key of `key_bytes` in `material`, right or wrong: only a digest can tell. Wipes `material`.
    ///
    /// Material beyond [`material_bytes`] is not looked at: areas are larger than what they hold.
    ///
    /// # Errors
    /// Of the KDF or the cipher. `Invalid`: less material than such a key has, a key of no bytes or of more than 512.
    pub fn unwrap(&self, passphrase: &Secret, material: &mut [u8], key_bytes: usize) -> Result<Secret> {
        self.unwrap_unless(passphrase, material, key_bytes, &|| false)
    }

    /// [`Wrapping::unwrap`], asking `give_up` while the KDF waits for another ([`Kdf::derive_unless`]).
    ///
    /// # Errors
    /// As [`Wrapping::unwrap`]; `Cancelled`.
    pub fn unwrap_unless(
        &self,
        passphrase: &Secret,
        material: &mut [u8],
        key_bytes: usize,
        give_up: &dyn Fn() -> bool,
    ) -> Result<Secret> {
        let key = self.unwrap_in_place(passphrase, material, key_bytes, give_up);
        material.zeroize();
        key
    }

    fn unwrap_in_place(
        &self,
        passphrase: &Secret,
        material: &mut [u8],
        key_bytes: usize,
        give_up: &dyn Fn() -> bool,
    ) -> Result<Secret> {
        check_key_bytes(key_bytes)?;
        let (have, needed) = (material.len(), material_bytes(key_bytes));
        let Some(material) = material.get_mut(..needed) else {
            let what = format!("keyslot area of {have} bytes: its key has {needed} bytes of material");
            return Err(Error::new(ErrorKind::Invalid, what));
        };
        let mut key = Secret::zeroed(key_bytes)?;
        self.cipher(passphrase, give_up)?.decrypt(DataUnit(0), material);
        af::merge(self.af_hash, &material[..key_bytes * af::STRIPES as usize], key.as_mut_bytes());
        Ok(key)
    }

    /// The area's cipher under the key that the passphrase makes.
    fn cipher(&self, passphrase: &Secret, give_up: &dyn Fn() -> bool) -> Result<Box<dyn SectorCipher>> {
        // Before the KDF: a key the cipher does not take is known at once, not after seconds.
        self.cipher.check_key_bytes(self.area_key_bytes)?;
        let mut key = Secret::zeroed(self.area_key_bytes)?;
        self.kdf.derive_unless(passphrase.as_bytes(), self.salt, key.as_mut_bytes(), give_up)?;
        self.cipher.build(Kernel::best()?, &key, UNIT_BYTES, 0)
    }
}

fn check_key_bytes(key_bytes: usize) -> Result<()> {
    if (1..=KEY_BYTES_MAX).contains(&key_bytes) {
        return Ok(());
    }
    let what = format!("keyslot for a key of {key_bytes} bytes: it must be 1 to {KEY_BYTES_MAX}");
    Err(Error::new(ErrorKind::Invalid, what))
}

#[cfg(test)]
mod tests {
    use proto::TweakKind;

    use super::*;

    fn wrapping() -> Wrapping<'static> {
        Wrapping {
            kdf: Kdf::Pbkdf2 { hash: Hash::Sha256, iterations: 10 },
            salt: &[0x5a; 32],
            cipher: CipherSpec::AesXts(TweakKind::Plain64),
            area_key_bytes: 64,
            af_hash: Hash::Sha256,
        }
    }

    fn secret(bytes: &[u8]) -> Secret {
        Secret::copy_of(bytes).expect("memory")
    }

    #[test]
    fn a_wrapped_key_unwraps_to_itself_and_leaves_no_material() {
        for (key_bytes, area_bytes) in [(16, 64_000), (32, 128_000), (33, 132_096), (64, 256_000)] {
            let key = secret(&vec![0xc3; key_bytes]);
            let mut material = wrapping().wrap(&secret(b"pass"), &key).expect("wrapped");
            assert_eq!(material.len(), area_bytes);
            // An area is larger than its material.
            material.resize(area_bytes.next_multiple_of(4096), 0xee);
            let unwrapped = wrapping().unwrap(&secret(b"pass"), &mut material, key_bytes).expect("unwrapped");
            assert_eq!(unwrapped, key);
            assert!(material.iter().all(|&byte| byte == 0), "wiped");
        }
    }

    #[test]
    fn every_parameter_counts() {
        let key = secret(&[0xc3; 64]);
        let wrapping = wrapping();
        let material = wrapping.wrap(&secret(b"pass"), &key).expect("wrapped");
        assert_ne!(material, wrapping.wrap(&secret(b"pass"), &key).expect("wrapped"), "stripes are random");
        let differs = |other: Wrapping<'_>, passphrase: &[u8]| {
            let mut material = material.clone();
            other.unwrap(&secret(passphrase), &mut material, 64).expect("some key") != key
        };
        assert!(!differs(wrapping, b"pass"));
        assert!(differs(wrapping, b"past"));
        assert!(differs(wrapping, b""));
        assert!(differs(Wrapping { salt: &[0x5b; 32], ..wrapping }, b"pass"));
        assert!(differs(Wrapping { area_key_bytes: 32, ..wrapping }, b"pass"));
        assert!(differs(Wrapping { af_hash: Hash::Sha1, ..wrapping }, b"pass"));
        let kdf = Kdf::Pbkdf2 { hash: Hash::Sha256, iterations: 11 };
        assert!(differs(Wrapping { kdf, ..wrapping }, b"pass"));
        let cbc = Wrapping { cipher: CipherSpec::AesCbcEssivSha256, area_key_bytes: 32, ..wrapping };
        assert!(differs(cbc, b"pass"));
    }

    #[test]
    fn misfits_are_refused_and_the_material_is_wiped_all_the_same() {
        let refused = |wrapping: Wrapping<'_>, len: usize, key_bytes: usize| {
            let mut material = vec![1; len];
            let error = wrapping.unwrap(&secret(b"pass"), &mut material, key_bytes).expect_err("refused");
            assert!(material.iter().all(|&byte| byte == 0), "wiped");
            assert_eq!(error.kind(), ErrorKind::Invalid);
            error.to_string()
        };
        assert_eq!(
            refused(wrapping(), 255_999, 64),
            "keyslot area of 255999 bytes: its key has 256000 bytes of material"
        );
        assert!(refused(wrapping(), 512, 0).contains("1 to 512"));
        assert!(refused(wrapping(), 512, usize::MAX).contains("1 to 512"));
        assert!(refused(Wrapping { area_key_bytes: 48, ..wrapping() }, 256_000, 64).contains("384"));
        for len in [0, 513] {
            let key = secret(&vec![1; len]);
            assert!(wrapping().wrap(&secret(b"pass"), &key).is_err());
        }
    }
}
