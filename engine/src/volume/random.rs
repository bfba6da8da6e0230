//! Random bytes: for keys and salts from the kernel's generator and nothing else; noise, which covers old material and hides
//! how many keyslots are in use, from a cipher under such a key.

use proto::TweakKind;
use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

use crate::crypto::spec::CipherSpec;
use crate::crypto::{Kernel, Secret, SectorCipher};
use crate::error::{Error, Result};
use crate::units::DataUnit;

/// Bytes of noise made at a time.
const PIECE: usize = 1 << 20;
/// Bytes under one counter.
const UNIT_BYTES: u32 = 4096;

/// Fill with random bytes. Waits, at boot, until the kernel's generator is seeded.
///
/// # Errors
/// The kernel has no generator.
pub fn fill(mut bytes: &mut [u8]) -> Result<()> {
    while !bytes.is_empty() {
        match getrandom(&mut *bytes, GetRandomFlags::empty()) {
            Ok(count) => bytes = &mut bytes[count..],
            Err(Errno::INTR) => {}
            Err(error) => return Err(Error::io("no random bytes", error)),
        }
    }
    Ok(())
}

/// Noise without end: zeros under AES-256-XTS with a key that nobody keeps and counters that never repeat. The kernel's
/// generator takes 0.1 s for the 16 MiB of a new header; this takes a few milliseconds.
pub struct Noise {
    cipher: Box<dyn SectorCipher>,
    next: DataUnit,
    piece: Vec<u8>,
}

impl Noise {
    /// A new one.
    ///
    /// # Errors
    /// No random bytes, no memory.
    pub fn new() -> Result<Self> {
        let mut key = Secret::zeroed(64)?;
        fill(key.as_mut_bytes())?;
        let cipher = CipherSpec::AesXts(TweakKind::Plain64).build(Kernel::best()?, &key, UNIT_BYTES, 0)?;
        Ok(Self { cipher, next: DataUnit(0), piece: vec![0; PIECE] })
    }

    /// The next bytes of it: `most`, or as many as are made at a time.
    pub fn next(&mut self, most: u64) -> &[u8] {
        let length = usize::try_from(most).unwrap_or(PIECE).min(PIECE);
        let made = length.next_multiple_of(UNIT_BYTES as usize);
        let piece = &mut self.piece[..made];
        piece.fill(0);
        self.cipher.encrypt(self.next, piece);
        self.next.0 += (made / UNIT_BYTES as usize) as u64;
        &piece[..length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_never_repeats_and_ends_where_it_is_told_to() {
        let (mut one, mut other) = (Noise::new().expect("noise"), Noise::new().expect("noise"));
        let mut seen = std::collections::HashSet::new();
        for most in [1 << 20, 4096, 513, 1, 0, u64::MAX] {
            for noise in [&mut one, &mut other] {
                let bytes = noise.next(most);
                assert_eq!(bytes.len() as u64, most.min(1 << 20));
                // 16 bytes repeat with a chance of 2^-90.
                assert!(bytes.chunks_exact(16).all(|block| seen.insert(block.to_vec())));
            }
        }
    }

    #[test]
    fn long_and_empty_requests_are_filled() {
        fill(&mut []).expect("nothing to fill");
        let mut bytes = vec![0; 3 << 20];
        fill(&mut bytes).expect("filled");
        // The chance of one zero piece is 2^-512.
        assert!(bytes.chunks(64).all(|piece| piece.iter().any(|byte| *byte != 0)));
    }
}
