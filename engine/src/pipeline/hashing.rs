//! The hashes of `crypto` as a rewrite asks for them.

use std::sync::Arc;

use crate::crypto::hash::Hash;
use crate::crypto::proof::Proof;
use crate::crypto::sha256::checksums;
use crate::pipeline::rewrite::{Checksummer, Prover};

/// Hashes of blocks of one size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checksums {
    /// Which hash.
    pub hash: Hash,
    /// Bytes of a block.
    pub block_bytes: u32,
}

impl Checksummer for Checksums {
    fn checksums(&self, bytes: &[u8]) -> Box<[u8]> {
        let block_bytes = self.block_bytes as usize;
        let mut out = vec![0; bytes.len() / block_bytes * self.hash.bytes()].into_boxed_slice();
        checksums(self.hash, block_bytes, bytes, &mut out);
        out
    }
}

impl Prover for Arc<Proof> {
    fn contribution(&self, offset: u64, plaintext: &[u8]) -> [u8; 32] {
        Proof::contribution(self, offset, plaintext)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_packed_in_the_order_of_the_blocks() {
        let bytes: Vec<u8> = (0..4096_u32).map(|at| (at / 512).to_le_bytes()[0]).collect();
        for hash in [Hash::Sha1, Hash::Sha256] {
            let packed = Checksums { hash, block_bytes: 512 }.checksums(&bytes);
            assert_eq!(packed.len(), 8 * hash.bytes());
            for (block, found) in bytes.chunks(512).zip(packed.chunks(hash.bytes())) {
                let mut expected = vec![0; hash.bytes()];
                hash.digest(&[block], &mut expected);
                assert_eq!(found, expected);
            }
        }
    }
}
