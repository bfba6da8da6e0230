//! Every kernel beside the crate, and the published answers.

use super::*;

fn kernels() -> impl Iterator<Item = HashKernel> {
    HashKernel::ALL.into_iter().filter(|kernel| kernel.is_available())
}

fn pattern(bytes: usize) -> Vec<u8> {
    let mut state = 7_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_be_bytes()[0]
    };
    (0..bytes).map(|_| next()).collect()
}

fn one(bytes: &[u8]) -> Digest {
    use sha2::Digest as _;
    sha2::Sha256::digest(bytes).into()
}

#[test]
fn every_available_kernel_passes_its_self_test() {
    for kernel in kernels() {
        kernel.self_test().unwrap_or_else(|error| panic!("{}: {error:?}", kernel.name()));
    }
    assert!(HashKernel::best().is_available());
    println!("best: {}", HashKernel::best().name());
}

/// NIST's example of a long message (FIPS 180-4 example values): a million times "a", which is whole blocks.
#[test]
fn a_million_a_have_the_published_digest() {
    let answer: Digest = hex("cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
    let message = vec![b'a'; 3_000_000];
    for kernel in kernels() {
        let mut out = [[0; 32]; 3];
        checksums_by(kernel, 1_000_000, &message, &mut out);
        assert_eq!(out, [answer; 3], "{}", kernel.name());
    }
}

#[test]
fn every_kernel_equals_the_crate_for_every_size_and_count() {
    for block_bytes in [64, 128, 192, 512, 1024, 2048, 4096, 8192, 65536] {
        let most = if block_bytes > 8192 { 17 } else { 40 };
        let bytes = pattern(block_bytes * most);
        let expected: Vec<Digest> = bytes.chunks(block_bytes).map(one).collect();
        for kernel in kernels() {
            for count in 0..=most {
                let mut out = vec![[0; 32]; count];
                checksums_by(kernel, block_bytes, &bytes[..count * block_bytes], &mut out);
                assert!(out == expected[..count], "{} {count} × {block_bytes}", kernel.name());
            }
        }
    }
}

#[test]
fn units_may_lie_anywhere_and_nothing_is_read_past_their_end() {
    for kernel in kernels() {
        for shift in [1, 3, 31, 63] {
            let bytes = pattern(shift + 33 * 512);
            // The slice ends where the allocation does: reading past it is for the address sanitizer and valgrind to see.
            let units = &bytes[shift..];
            let mut out = vec![[0; 32]; 33];
            checksums_by(kernel, 512, units, &mut out);
            assert!(
                out.iter().zip(units.chunks(512)).all(|(out, unit)| *out == one(unit)),
                "{}",
                kernel.name()
            );
        }
    }
}

#[test]
fn every_hash_comes_block_by_block_in_order() {
    let bytes = pattern(5 * 4096);
    for hash in Hash::ALL {
        for block_bytes in [512, 4096] {
            let blocks = bytes.len() / block_bytes;
            let mut out = vec![0; blocks * hash.bytes()];
            checksums(hash, block_bytes, &bytes, &mut out);
            for (block, out) in bytes.chunks(block_bytes).zip(out.chunks(hash.bytes())) {
                let mut expected = vec![0; hash.bytes()];
                hash.digest(&[block], &mut expected);
                assert_eq!(out, expected, "{}", hash.name());
            }
        }
    }
}

#[test]
fn few_units_and_many_give_the_same() {
    let bytes = pattern(64 * 512);
    let expected: Vec<u8> = bytes.chunks(512).flat_map(one).collect();
    for count in 0..=64 {
        let mut out = vec![0; count * 32];
        checksums(Hash::Sha256, 512, &bytes[..count * 512], &mut out);
        assert_eq!(out, expected[..count * 32]);
    }
}

#[test]
fn numbers_and_prefix_are_hashed_as_if_they_were_written() {
    let bytes = pattern(33 * 512);
    let prefix = [9; 64];
    // The second word of the number overflows into the first on the way.
    let first = (7 << 32) - 1024;
    for kernel in kernels() {
        let mut out = vec![[0; 32]; 33];
        numbered(Some(kernel), &prefix, first, 512, &bytes, &mut out);
        for (at, (unit, out)) in bytes.chunks(512).zip(&out).enumerate() {
            let number = (first + 512 * at as u64).to_be_bytes();
            assert_eq!(*out, one(&[&prefix, unit, &number].concat()), "{} {at}", kernel.name());
        }
    }
}

#[test]
fn what_follows_the_last_whole_block_is_not_hashed() {
    let (mut with, mut without) = ([0; 32], [0; 32]);
    checksums(Hash::Sha256, 512, &[7; 513], &mut with);
    checksums(Hash::Sha256, 512, &[7; 512], &mut without);
    assert_eq!(with, without);
}

#[test]
#[should_panic(expected = "room for a hash of each")]
fn room_for_fewer_hashes_is_a_bug_of_the_caller() {
    checksums(Hash::Sha256, 512, &[0; 1024], &mut [0; 32]);
}
