//! The hashes of LUKS headers: digests, AF splitter, PBKDF2. By RustCrypto's `sha1` and `sha2`, which use the CPU's SHA
//! instructions where it has them.
//!
//! What this module refuses to do: whirlpool, ripemd160, sha3 and blake2, which cryptsetup can be told to use and nobody meets.

use proto::ErrorKind;
use sha2::digest::{Digest, FixedOutputReset, Output};

use super::select::burn_stack;
use super::spec::shown;
use crate::error::{Error, Result};

/// A hash function, by its name in LUKS headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Hash {
    /// FIPS 180-4. Only because old LUKS1 headers use it; as a KDF's PRF it is not weak.
    Sha1,
    /// FIPS 180-4.
    Sha224,
    /// FIPS 180-4; the default everywhere.
    Sha256,
    /// FIPS 180-4.
    Sha384,
    /// FIPS 180-4.
    Sha512,
}

/// Longest output of any of them, bytes.
pub const HASH_BYTES_MAX: usize = 64;

impl Hash {
    /// All of them, shortest output first.
    pub const ALL: [Self; 5] = [Self::Sha1, Self::Sha224, Self::Sha256, Self::Sha384, Self::Sha512];

    /// By its name on disk, in any case.
    ///
    /// # Errors
    /// `Unsupported`, naming the hash.
    pub fn from_name(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|hash| hash.name().eq_ignore_ascii_case(name)).ok_or_else(|| {
            Error::new(ErrorKind::Unsupported, format!("hash {} is not supported", shown(name)))
                .hint("supported: sha1 sha224 sha256 sha384 sha512")
        })
    }

    /// Its name on disk.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Sha1 => "sha1",
            Self::Sha224 => "sha224",
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
            Self::Sha512 => "sha512",
        }
    }

    /// Length of its output, bytes.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::Sha1 => 20,
            Self::Sha224 => 28,
            Self::Sha256 => 32,
            Self::Sha384 => 48,
            Self::Sha512 => 64,
        }
    }

    /// The hash of all `parts` in order, written to the first [`Hash::bytes`] bytes of `out`. Leaves no copy of its input behind.
    ///
    /// # Panics
    /// If `out` is too short.
    pub fn digest(self, parts: &[&[u8]], out: &mut [u8]) {
        let out = &mut out[..self.bytes()];
        match self {
            Self::Sha1 => run::<sha1::Sha1>(parts, out),
            Self::Sha224 => run::<sha2::Sha224>(parts, out),
            Self::Sha256 => run::<sha2::Sha256>(parts, out),
            Self::Sha384 => run::<sha2::Sha384>(parts, out),
            Self::Sha512 => run::<sha2::Sha512>(parts, out),
        }
        burn_stack();
    }
}

// Not inlined: its frame must lie where `burn_stack` reaches. (The state and its buffer are zeroed when dropped, but not
// what the compiler spilled.)
#[inline(never)]
fn run<D: Digest + FixedOutputReset>(parts: &[&[u8]], out: &mut [u8]) {
    let mut state = D::new();
    for part in parts {
        Digest::update(&mut state, part);
    }
    let out: &mut Output<D> = out.try_into().expect("the slice has the length of this hash's output");
    Digest::finalize_into(state, out);
}

/// HMAC-SHA256 (RFC 2104) of `message`.
#[must_use]
pub fn hmac_sha256(key: &[u8], message: &[u8]) -> [u8; 32] {
    let tag = hmac_run(key, message);
    burn_stack();
    tag
}

// Not inlined, as `run`.
#[inline(never)]
fn hmac_run(key: &[u8], message: &[u8]) -> [u8; 32] {
    use hmac::{KeyInit, Mac};
    let mut mac = hmac::Hmac::<sha2::Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");
    mac.update(message);
    mac.finalize().into_bytes().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// FIPS 180-4's own examples for "abc" (NIST, Secure Hash Standard example values).
    #[test]
    fn abc_has_the_published_digests() {
        let answers = [
            (Hash::Sha1, "a9993e364706816aba3e25717850c26c9cd0d89d"),
            (Hash::Sha224, "23097d223405d8228642a477bda255b32aadbce4bda0b3f7e36c9da7"),
            (Hash::Sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
            (
                Hash::Sha384,
                "cb00753f45a35e8bb5a03d699ac65007272c32ab0eded1631a8b605a43ff5bed8086072ba1e7cc2358baeca134c825a7",
            ),
            (
                Hash::Sha512,
                "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a2192992a274fc1a836ba3c23a3feebbd\
                 454d4423643ce80e2a9ac94fa54ca49f",
            ),
        ];
        for (hash, answer) in answers {
            let mut out = [0xEE; HASH_BYTES_MAX + 1];
            hash.digest(&[b"a", b"", b"bc"], &mut out);
            assert_eq!(hex(&out[..hash.bytes()]), answer, "{hash:?}");
            assert!(out[hash.bytes()..].iter().all(|&byte| byte == 0xEE), "{hash:?} wrote past its output");
        }
    }

    /// RFC 4231, test cases 1 and 2.
    #[test]
    fn hmac_has_the_published_tags() {
        let tag = hmac_sha256(&[0x0b; 20], b"Hi There");
        assert_eq!(hex(&tag), "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7");
        let tag = hmac_sha256(b"Jefe", b"what do ya want for nothing?");
        assert_eq!(hex(&tag), "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
    }

    #[test]
    fn names_are_found_in_any_case_and_come_back_as_on_disk() {
        for hash in Hash::ALL {
            assert_eq!(Hash::from_name(hash.name()).expect("its own name"), hash);
            assert_eq!(Hash::from_name(&hash.name().to_uppercase()).expect("upper case"), hash);
        }
    }

    #[test]
    fn an_unknown_hash_is_named_in_the_error() {
        for name in ["", "sha", "sha-256", "sha256 ", "ripemd160", "whirlpool", "sha3-256"] {
            let error = Hash::from_name(name).expect_err("unknown");
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(error.chain().contains(&format!("{name:?}")), "{}", error.chain());
        }
    }

    #[test]
    #[should_panic(expected = "range end index 32")]
    fn an_output_too_short_is_a_bug_of_the_caller() {
        Hash::Sha256.digest(&[b"abc"], &mut [0; 31]);
    }
}
