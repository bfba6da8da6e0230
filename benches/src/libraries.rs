//! AWS-LC and OpenSSL doing the same work through their public interface: one key, one initial value and one update per data
//! unit, in place. With the feature `rivals` only; without it there are none.
#![cfg_attr(feature = "rivals", allow(unsafe_code, reason = "AWS-LC has a C interface"))]

use crate::turns::Contestant;

/// All rivals for a key, data unit and direction. Tweaks are `plain64` counted in 512-byte sectors, from 0.
#[must_use]
#[cfg(not(feature = "rivals"))]
pub fn rivals(_key: &[u8], _unit_bytes: usize, _encrypt: bool) -> Vec<Contestant> {
    Vec::new()
}

/// All rivals for a key, data unit and direction. Tweaks are `plain64` counted in 512-byte sectors, from 0.
#[must_use]
#[cfg(feature = "rivals")]
pub fn rivals(key: &[u8], unit_bytes: usize, encrypt: bool) -> Vec<Contestant> {
    let operation = if encrypt { "encrypt" } else { "decrypt" };
    let contestant =
        |subject: &str, work| Contestant { subject: subject.to_owned(), operation, limit: None, work };
    vec![
        contestant("aws-lc", with::aws_lc(key, unit_bytes, encrypt)),
        contestant("openssl", with::openssl(key, unit_bytes, encrypt)),
    ]
}

#[cfg(feature = "rivals")]
mod with {
    use engine::crypto::measure::Work;

    /// The initial value of unit number `unit`.
    fn tweak(unit: usize, unit_bytes: usize) -> [u8; 16] {
        ((unit * (unit_bytes / 512)) as u128).to_le_bytes()
    }

    pub(super) fn openssl(key: &[u8], unit_bytes: usize, encrypt: bool) -> Work {
        use openssl::cipher::Cipher;
        let cipher = if key.len() == 64 { Cipher::aes_256_xts() } else { Cipher::aes_128_xts() };
        let mut context = openssl::cipher_ctx::CipherCtx::new().expect("a context");
        let start = [0; 16];
        if encrypt {
            context.encrypt_init(Some(cipher), Some(key), Some(&start)).expect("a key of this cipher");
        } else {
            context.decrypt_init(Some(cipher), Some(key), Some(&start)).expect("a key of this cipher");
        }
        Box::new(move |buf| {
            for (at, unit) in buf.chunks_exact_mut(unit_bytes).enumerate() {
                let tweak = tweak(at, unit_bytes);
                if encrypt {
                    context.encrypt_init(None, None, Some(&tweak)).expect("an initial value");
                } else {
                    context.decrypt_init(None, None, Some(&tweak)).expect("an initial value");
                }
                context.cipher_update_inplace(unit, unit_bytes).expect("whole blocks");
            }
        })
    }

    struct Context(*mut aws_lc_sys::EVP_CIPHER_CTX);

    impl Drop for Context {
        fn drop(&mut self) {
            // SAFETY: made by EVP_CIPHER_CTX_new and freed once.
            unsafe { aws_lc_sys::EVP_CIPHER_CTX_free(self.0) }
        }
    }

    pub(super) fn aws_lc(key: &[u8], unit_bytes: usize, encrypt: bool) -> Work {
        use aws_lc_sys as lc;
        assert_eq!(key.len(), 64, "AWS-LC has AES-256-XTS only");
        let len = i32::try_from(unit_bytes).expect("a data unit");
        let direction = i32::from(encrypt);
        let null = std::ptr::null_mut();
        // SAFETY: a fresh context; the key has the length the cipher asks for, the initial value 16 bytes; both are
        // copied by the call.
        let context = unsafe {
            let context = Context(lc::EVP_CIPHER_CTX_new());
            let start = [0_u8; 16];
            let done = lc::EVP_CipherInit_ex(
                context.0,
                lc::EVP_aes_256_xts(),
                null,
                key.as_ptr(),
                start.as_ptr(),
                direction,
            );
            assert_eq!(done, 1, "AWS-LC takes the key");
            context
        };
        Box::new(move |buf| {
            let context = &context;
            for (at, unit) in buf.chunks_exact_mut(unit_bytes).enumerate() {
                let tweak = tweak(at, unit_bytes);
                let mut written = 0;
                // SAFETY: the context is live; the initial value has 16 bytes; input and output are the same `unit_bytes`
                // bytes, which this interface allows.
                let done = unsafe {
                    let (none, key) = (std::ptr::null(), std::ptr::null());
                    lc::EVP_CipherInit_ex(
                        context.0,
                        none,
                        std::ptr::null_mut(),
                        key,
                        tweak.as_ptr(),
                        direction,
                    ) & lc::EVP_CipherUpdate(context.0, unit.as_mut_ptr(), &mut written, unit.as_ptr(), len)
                };
                assert!(done == 1 && written == len, "AWS-LC encrypts a data unit");
            }
        })
    }
}
