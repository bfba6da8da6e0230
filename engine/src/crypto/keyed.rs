//! Values that prove knowledge of a volume key without saying anything about it: HMAC-SHA256 under a key made of it.

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::crypto::{Secret, burn_stack};
use crate::error::Result;

/// Bytes of a value.
pub const BYTES: usize = 32;

/// A key for such values.
pub struct Keyed(Secret);

fn mac(key: &[u8], parts: &[&[u8]]) -> [u8; BYTES] {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");
    for part in parts {
        mac.update(part);
    }
    mac.finalize().into_bytes().into()
}

impl Keyed {
    /// Of a volume key, for one `purpose` and one `salt`.
    ///
    /// # Errors
    /// No memory for keys.
    pub fn new(volume_key: &[u8], purpose: &str, salt: &[u8]) -> Result<Self> {
        let mut key = Secret::zeroed(BYTES)?;
        key.as_mut_bytes().copy_from_slice(&mac(volume_key, &[purpose.as_bytes(), salt]));
        burn_stack();
        Ok(Self(key))
    }

    /// The value of `parts`, one behind the other.
    #[must_use]
    pub fn value(&self, parts: &[&[u8]]) -> [u8; BYTES] {
        let value = mac(self.0.as_bytes(), parts);
        burn_stack();
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_those_of_rfc_4231() {
        // Test case 2: key "Jefe".
        let expected = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843";
        let value = mac(b"Jefe", &[b"what do ya want ", b"for nothing?"]);
        let hex: String = value.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, expected);
    }

    #[test]
    fn another_key_purpose_salt_or_message_is_another_value() {
        let value = |key: &[u8], purpose: &str, salt: &[u8], message: &[u8]| {
            Keyed::new(key, purpose, salt).expect("memory").value(&[message])
        };
        let one = value(b"k", "p", b"s", b"m");
        assert_eq!(one, value(b"k", "p", b"s", b"m"));
        for other in [
            value(b"K", "p", b"s", b"m"),
            value(b"k", "P", b"s", b"m"),
            value(b"k", "p", b"S", b"m"),
            value(b"k", "p", b"s", b"M"),
        ] {
            assert_ne!(one, other);
        }
    }
}
