//! The anti-forensic splitter of LUKS (`"type": "luks1"`): a key inflated so that destroying any part of it destroys it.
//!
//! ```text
//! buf(0) = 0
//! buf(j+1) = D(buf(j) xor stripe(j))            j = 0 … 3998
//! key = buf(3999) xor stripe(3999)
//! D(x): cut x into blocks of the hash's length; block i becomes hash(BE32(i) || block i), the last one cut to its length
//! ```
//! Every stripe but the last is random, so a lost stripe is a lost key; on a medium that keeps stale copies of single
//! sectors, one sector overwritten for good is enough. Source: LUKS On-Disk Format Specification 1.2.3, section 2.4.
//!
//! What this module refuses to do: find randomness (the caller's), encrypt. It takes no memory: the
//! intermediate key lives where the result goes, and the one hash output beside it is wiped.

use zeroize::Zeroizing;

use crate::crypto::hash::{HASH_BYTES_MAX, Hash};

/// Stripes of every LUKS keyslot.
pub const STRIPES: u32 = 4000;

/// A keyslot's material is whole sectors of this, bytes.
const SECTOR_BYTES: u64 = 512;

/// Bytes of keyslot material for a key, of either LUKS version: `key_bytes * 4000`, rounded up to whole sectors.
#[must_use]
pub fn material_bytes(key_bytes: u32) -> u64 {
    (u64::from(key_bytes) * u64::from(STRIPES)).next_multiple_of(SECTOR_BYTES)
}

/// Split `key` into `stripes`: on entry its bytes are random (`key.len() * STRIPES`), on return they are the split key.
///
/// # Panics
/// If the lengths do not fit.
pub fn split(hash: Hash, key: &[u8], stripes: &mut [u8]) {
    assert_lengths(stripes.len(), key.len());
    let (random, last) = stripes.split_at_mut(stripes.len() - key.len());
    fold(hash, random, last);
    xor(last, key);
}

/// The key that `stripes` were made of.
///
/// # Panics
/// If `stripes` is not `key.len() * STRIPES` long.
pub fn merge(hash: Hash, stripes: &[u8], key: &mut [u8]) {
    assert_lengths(stripes.len(), key.len());
    let (random, last) = stripes.split_at(stripes.len() - key.len());
    fold(hash, random, key);
    xor(key, last);
}

fn assert_lengths(stripes: usize, key: usize) {
    assert!(key > 0, "the empty key has no stripes");
    assert!(Some(stripes) == key.checked_mul(STRIPES as usize), "a split key is {STRIPES} keys long");
}

/// What all stripes but the last amount to, in `buf`.
fn fold(hash: Hash, random: &[u8], buf: &mut [u8]) {
    buf.fill(0);
    for stripe in random.chunks_exact(buf.len()) {
        xor(buf, stripe);
        diffuse(hash, buf);
    }
}

fn xor(into: &mut [u8], from: &[u8]) {
    for (byte, other) in into.iter_mut().zip(from) {
        *byte ^= other;
    }
}

/// D of the module head.
fn diffuse(hash: Hash, buf: &mut [u8]) {
    let mut output = Zeroizing::new([0_u8; HASH_BYTES_MAX]);
    for (index, block) in (0_u32..).zip(buf.chunks_mut(hash.bytes())) {
        hash.digest(&[&index.to_be_bytes(), block], &mut output[..]);
        block.copy_from_slice(&output[..block.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Not random, but no two bytes in a row alike.
    fn noise(len: usize, seed: u8) -> Vec<u8> {
        let mut state = u32::from(seed) + 1;
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.to_be_bytes()[0]
        };
        (0..len).map(next).collect()
    }

    #[test]
    fn a_split_key_merges_to_itself_under_every_hash_and_length() {
        for hash in Hash::ALL {
            // 1, 33, 48: keys that are no whole number of hash outputs.
            for len in [1, 16, 20, 32, 33, 48, 64] {
                let key = noise(len, 1);
                let mut stripes = noise(len * STRIPES as usize, 2);
                let random = stripes.clone();
                split(hash, &key, &mut stripes);
                let kept = len * (STRIPES as usize - 1);
                assert_eq!(stripes[..kept], random[..kept], "all stripes but the last stay random");
                let mut merged = vec![0xff; len];
                merge(hash, &stripes, &mut merged);
                assert_eq!(merged, key, "{hash:?} {len}");
            }
        }
    }

    #[test]
    fn a_flipped_bit_anywhere_destroys_the_key() {
        let key = noise(64, 3);
        let mut stripes = noise(64 * STRIPES as usize, 4);
        split(Hash::Sha256, &key, &mut stripes);
        for at in [0, 63, 64, 128_000, 255_935, 255_936, 255_999] {
            stripes[at] ^= 0x10;
            let mut merged = [0; 64];
            merge(Hash::Sha256, &stripes, &mut merged);
            assert_ne!(merged[..], key[..], "byte {at}");
            stripes[at] ^= 0x10;
        }
    }

    #[test]
    #[should_panic(expected = "4000 keys long")]
    fn stripes_of_another_length_are_a_bug() {
        merge(Hash::Sha256, &[0; 100], &mut [0; 32]);
    }
}
