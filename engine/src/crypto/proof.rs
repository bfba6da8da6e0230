//! A keyed digest of plaintext that is summed up from its parts, in any order and on any number of threads: was everything that was
//! read under the old key there again under the new one?
//!
//! The plaintext is cut into units of 512 bytes. A unit x at byte offset p contributes
//!
//! ```text
//! F(p, x) = SHA-256(key ‖ x ‖ p)          key 64 bytes, one block of the hash; p big-endian, 8 bytes
//! ```
//! and the digest is the sum of all contributions as four numbers of 64 bits, each modulo 2^64.
//!
//! **What it proves.** With a first block that is secret and messages that all have the same length (584 bytes, so none is the
//! beginning of another), SHA-256 is a pseudo-random function if its compression function is one: the cascade of Bellare, Canetti and
//! Krawczyk (1996), which HMAC builds upon. The two plaintexts are summed over the same offsets, and the offset is part of each
//! message. If they differ in any unit, the two sums differ by pseudo-random numbers of 256 bits drawn for different messages, and are
//! equal with probability 2^-256: for a fault of hardware or of this program, and also for somebody who changes ciphertext on
//! purpose, for the key is random, used once and gone with the job. Units swapped, moved, left out or counted twice show; a sum
//! shows the last where an exclusive or would not.
//!
//! **What it does not prove.** That the plaintext was what its owner had once written: it is compared with what was read under the old
//! key, and XTS authenticates nothing. Who knows the key can make any sum from enough units of his choice (Wagner's generalised
//! birthday), so a digest is worth nothing as a commitment, and digests of two jobs say nothing about each other.

use zeroize::Zeroize;

use super::secret::Secret;
use super::select::burn_stack;
use super::sha256::{Digest, HashKernel, numbered};

/// Bytes of the key: a block of the hash.
pub const KEY_BYTES: usize = 64;
/// Offsets and lengths of contributions are multiples of this.
pub const UNIT_BYTES: usize = 512;

/// The digest of no plaintext at all: where a sum begins.
pub const NOTHING: Digest = [0; 32];

/// Units hashed in one go: their hashes stay on the stack.
const GROUP: usize = 32;

/// A key for digests of plaintext.
pub struct Proof {
    /// [`KEY_BYTES`] of them.
    key: Secret,
    kernel: Option<HashKernel>,
}

impl Proof {
    /// `key`: [`KEY_BYTES`] random bytes, not used for anything else.
    ///
    /// # Panics
    /// If it has another length.
    #[must_use]
    pub fn new(key: Secret) -> Self {
        assert_eq!(key.len(), KEY_BYTES, "a key is one block of the hash");
        Self { key, kernel: None }
    }

    /// The contribution of the plaintext at this offset. Leaves no copy of plaintext or key behind.
    ///
    /// # Panics
    /// If offset or length is not a multiple of [`UNIT_BYTES`].
    #[must_use]
    pub fn contribution(&self, offset: u64, plaintext: &[u8]) -> Digest {
        assert!(offset.is_multiple_of(UNIT_BYTES as u64), "a contribution begins at a unit");
        assert!(plaintext.len().is_multiple_of(UNIT_BYTES), "a contribution is whole units");
        let key = self.key.as_bytes().try_into().expect("`new` saw its length");
        let mut sum = NOTHING;
        let mut units = [[0; 32]; GROUP];
        let mut at = offset;
        for group in plaintext.chunks(GROUP * UNIT_BYTES) {
            let units = &mut units[..group.len() / UNIT_BYTES];
            numbered(self.kernel, key, at, UNIT_BYTES, group, units);
            for unit in units {
                add(&mut sum, unit);
            }
            at += group.len() as u64;
        }
        units.as_flattened_mut().zeroize();
        burn_stack();
        sum
    }
}

/// Add a contribution to a sum. The order does not matter.
pub fn add(sum: &mut Digest, contribution: &Digest) {
    let (sums, _) = sum.as_chunks_mut::<8>();
    let (parts, _) = contribution.as_chunks::<8>();
    for (sum, part) in sums.iter_mut().zip(parts) {
        *sum = u64::from_le_bytes(*sum).wrapping_add(u64::from_le_bytes(*part)).to_le_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(bytes: usize) -> Vec<u8> {
        (0..bytes).map(|at| (at.wrapping_mul(0x9e37_79b9) >> 13).to_le_bytes()[0]).collect()
    }

    fn proof(kernel: Option<HashKernel>) -> Proof {
        let key: Vec<u8> = (0..64).collect();
        Proof { kernel, ..Proof::new(Secret::copy_of(&key).expect("memory")) }
    }

    /// By the definition at the head, with the crate's hash.
    fn by_definition(offset: u64, plaintext: &[u8]) -> Digest {
        use sha2::Digest as _;
        let key: Vec<u8> = (0..64).collect();
        let mut sums = [0_u64; 4];
        for (at, unit) in plaintext.chunks(512).enumerate() {
            let place = (offset + 512 * at as u64).to_be_bytes();
            let digest: [u8; 32] = sha2::Sha256::digest([&key, unit, &place].concat()).into();
            for (sum, part) in sums.iter_mut().zip(digest.chunks(8)) {
                *sum = sum.wrapping_add(u64::from_le_bytes(part.try_into().expect("eight bytes")));
            }
        }
        sums.map(u64::to_le_bytes).concat().try_into().expect("32 bytes")
    }

    #[test]
    fn it_is_what_its_definition_says_on_every_kernel() {
        let plain = pattern(70 * 512);
        for kernel in HashKernel::ALL.into_iter().filter(|kernel| kernel.is_available()) {
            for units in [0, 1, 2, 31, 32, 33, 70] {
                let plain = &plain[..units * 512];
                for offset in [0, 512, 1 << 40, (1 << 32) - 1024] {
                    let got = proof(Some(kernel)).contribution(offset, plain);
                    assert_eq!(got, by_definition(offset, plain), "{} {units}", kernel.name());
                }
            }
        }
    }

    #[test]
    fn cuts_and_order_do_not_matter() {
        let plain = pattern(64 * 512);
        let proof = proof(None);
        let whole = proof.contribution(4096, &plain);
        for cut in [512, 1024, 1536, 4096, 20_480] {
            let mut sum = NOTHING;
            let parts: Vec<_> = plain.chunks(cut).enumerate().collect();
            for (at, part) in parts.into_iter().rev() {
                add(&mut sum, &proof.contribution(4096 + (at * cut) as u64, part));
            }
            assert_eq!(sum, whole, "{cut}");
        }
    }

    #[test]
    fn any_change_shows() {
        let plain = pattern(16 * 512);
        let digest = proof(None).contribution(0, &plain);
        for at in [0, 1, 511, 512, 8191] {
            let mut other = plain.clone();
            other[at] ^= 0x10;
            assert_ne!(proof(None).contribution(0, &other), digest, "byte {at}");
        }
        let mut swapped = plain.clone();
        swapped[..1024].rotate_left(512);
        assert_ne!(proof(None).contribution(0, &swapped), digest, "units swapped");
        assert_ne!(proof(None).contribution(512, &plain), digest, "moved");
        let mut twice = digest;
        add(&mut twice, &proof(None).contribution(0, &plain[..512]));
        assert_ne!(twice, digest, "counted twice");
        add(&mut twice, &proof(None).contribution(0, &plain[..512]));
        assert_ne!(twice, digest, "and once more");
        let other = Proof::new(Secret::copy_of(&[1; 64]).expect("memory"));
        assert_ne!(other.contribution(0, &plain), digest, "another key");
    }

    #[test]
    #[should_panic(expected = "begins at a unit")]
    fn part_of_a_unit_is_a_bug_of_the_caller() {
        let _ = proof(None).contribution(256, &[0; 512]);
    }
}
