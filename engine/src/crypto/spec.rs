//! Ciphers by their dm-crypt names: what a header says, and the [`SectorCipher`] that does it.
//!
//! What this module refuses to do: guess. A name is one of the five below, letter by letter, or it is refused by name: the wrong
//! cipher on a right key would show noise and, worse, write it.

use proto::{ErrorKind, TweakKind};

use crate::crypto::{Kernel, Layout, Secret, SectorCipher, VolumeKey, cbc, cipher};
use crate::error::{Error, Result};

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
    /// All of them; the first is the default of new volumes.
    pub const ALL: [Self; 5] = [
        Self::AesXts(TweakKind::Plain64),
        Self::AesXts(TweakKind::Plain),
        Self::AesCbcEssivSha256,
        Self::AesCbc(TweakKind::Plain64),
        Self::AesCbc(TweakKind::Plain),
    ];

    /// From dm-crypt's notation (`aes-xts-plain64`), as in LUKS2 `encryption` fields and LUKS1 `cipher-name` + `-` + `cipher-mode`.
    ///
    /// # Errors
    /// `Unsupported`, naming the cipher.
    pub fn parse(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|spec| spec.name() == text).ok_or_else(|| {
            Error::new(ErrorKind::Unsupported, format!("cipher {} is not supported", shown(text)))
                .hint("supported: aes-xts-plain64, and to read old volumes aes-xts-plain, aes-cbc-essiv:sha256, aes-cbc-plain64, aes-cbc-plain")
        })
    }

    /// dm-crypt's notation.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::AesXts(TweakKind::Plain64) => "aes-xts-plain64",
            Self::AesXts(TweakKind::Plain) => "aes-xts-plain",
            Self::AesCbcEssivSha256 => "aes-cbc-essiv:sha256",
            Self::AesCbc(TweakKind::Plain64) => "aes-cbc-plain64",
            Self::AesCbc(TweakKind::Plain) => "aes-cbc-plain",
        }
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
        let (fits, lengths) = match self {
            Self::AesXts(_) => (matches!(key_bytes, 32 | 64), "256 or 512"),
            Self::AesCbcEssivSha256 | Self::AesCbc(_) => {
                (matches!(key_bytes, 16 | 24 | 32), "128, 192 or 256")
            }
        };
        if fits {
            return Ok(());
        }
        let what =
            format!("{} takes keys of {lengths} bits, not {}", self.name(), key_bytes.saturating_mul(8));
        Err(Error::new(ErrorKind::Invalid, what))
    }

    /// A cipher over data units of `unit_bytes`, the first of which has the counter `offset_sectors` (512-byte sectors).
    ///
    /// # Errors
    /// As [`CipherSpec::check_key_bytes`]; the layout is not one the kernels can work with; `Invalid` for an XTS key with two
    /// equal halves.
    pub fn build(
        self,
        kernel: Kernel,
        key: &Secret,
        unit_bytes: u32,
        offset_sectors: u64,
    ) -> Result<Box<dyn SectorCipher>> {
        self.check_key_bytes(key.len())?;
        let kind = match self {
            Self::AesXts(kind) | Self::AesCbc(kind) => kind,
            // ESSIV hides a plain64 counter (dm-crypt's crypt_iv_essiv_gen).
            Self::AesCbcEssivSha256 => TweakKind::Plain64,
        };
        let layout = Layout { unit_bytes, kind, large: false, offset_sectors };
        match self {
            Self::AesXts(_) => cipher(kernel, &VolumeKey::new(key.as_bytes())?, layout),
            Self::AesCbcEssivSha256 => cbc::cipher(key, layout, cbc::Iv::EssivSha256),
            Self::AesCbc(_) => cbc::cipher(key, layout, cbc::Iv::Counter),
        }
    }
}

/// A name out of a header, fit for a message: quoted, escaped, and cut after 64 characters. Headers are anybody's to write.
pub(super) fn shown(name: &str) -> String {
    let cut: String = name.chars().take(64).collect();
    format!("{cut:?}{}", if cut.len() < name.len() { "…" } else { "" })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::DataUnit;

    #[test]
    fn every_supported_name_parses_to_itself() {
        for spec in CipherSpec::ALL {
            assert_eq!(CipherSpec::parse(spec.name()).expect("its own name"), spec);
        }
    }

    #[test]
    fn what_is_not_supported_is_named_in_the_error() {
        let refused = [
            "",
            "aes",
            "AES-XTS-PLAIN64",
            "aes-xts",
            "aes-xts-plain64 ",
            " aes-xts-plain64",
            "aes-xts-plain64be",
            "aes-xts-essiv:sha256",
            "aes-cbc-essiv:sha512",
            "aes-cbc-essiv:",
            "aes-cbc-null",
            "aes-ecb",
            "aes-lrw-benbi",
            "serpent-xts-plain64",
            "twofish-cbc-plain",
            "cipher_null-ecb",
            "capi:xts(aes)-plain64",
            "xchacha12,aes-adiantum-plain64",
            "aes-xts-plain64\0",
        ];
        for name in refused {
            let error = CipherSpec::parse(name).expect_err(name);
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{name}");
            assert!(error.chain().contains(&format!("cipher {name:?}")), "{}", error.chain());
        }
    }

    #[test]
    fn a_hostile_name_is_cut_and_escaped() {
        let long = "é".repeat(70_000);
        let message = CipherSpec::parse(&long).expect_err("unknown").chain();
        assert!(message.chars().count() < 120 && message.contains('…'), "{message}");
        assert!(
            !CipherSpec::parse("aes\n\u{1b}[2J").expect_err("unknown").chain().contains(['\n', '\u{1b}'])
        );
    }

    #[test]
    fn key_lengths_are_checked_at_both_sides() {
        for spec in CipherSpec::ALL {
            let fitting: &[usize] = if spec.is_for_new() { &[32, 64] } else { &[16, 24, 32] };
            for bytes in (0..=65).chain([usize::MAX]) {
                let checked = spec.check_key_bytes(bytes);
                assert_eq!(checked.is_ok(), fitting.contains(&bytes), "{} {bytes}", spec.name());
                if let Err(error) = checked {
                    assert_eq!(error.kind(), ErrorKind::Invalid);
                    let bits = bytes.saturating_mul(8).to_string();
                    assert!(error.chain().contains(spec.name()) && error.chain().contains(&bits));
                }
            }
            let key = Secret::copy_of(&[7; 48]).expect("memory");
            assert!(spec.build(Kernel::Portable, &key, 512, 0).is_err(), "build checks too");
        }
    }

    #[test]
    fn only_xts_is_for_new_volumes() {
        for spec in CipherSpec::ALL {
            assert_eq!(spec.is_for_new(), spec.name().starts_with("aes-xts-"), "{}", spec.name());
        }
    }

    #[test]
    fn every_cipher_comes_back_and_counts_sectors_from_its_offset() {
        for spec in CipherSpec::ALL {
            let bytes: Vec<u8> = (0..32).collect();
            let key = Secret::copy_of(&bytes).expect("memory");
            let build = |unit, offset| spec.build(Kernel::Portable, &key, unit, offset).expect("builds");
            let plain: Vec<u8> = (0..8192_u32).map(|at| u8::try_from(at % 251).expect("small")).collect();
            for unit in [512, 4096] {
                let mut data = plain.clone();
                build(unit, 0).encrypt(DataUnit(0), &mut data);
                assert_ne!(data, plain, "{}", spec.name());
                // The second 4096 bytes alone, by unit index and by offset: the counter runs in 512-byte sectors.
                let (mut by_index, mut by_offset) = (plain[4096..].to_vec(), plain[4096..].to_vec());
                build(unit, 0).encrypt(DataUnit(u64::from(4096 / unit)), &mut by_index);
                build(unit, 8).encrypt(DataUnit(0), &mut by_offset);
                assert_eq!(data[4096..], by_index, "{}", spec.name());
                assert_eq!(data[4096..], by_offset, "{}", spec.name());
                build(unit, 0).decrypt(DataUnit(0), &mut data);
                assert_eq!(data, plain, "{}", spec.name());
            }
        }
    }
}
