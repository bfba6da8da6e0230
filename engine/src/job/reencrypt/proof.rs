//! Digests of the plaintext before and after.
