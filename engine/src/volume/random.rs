//! Random bytes for keys, salts and what covers old material: the kernel's generator and nothing else.

use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

use crate::error::{Error, Result};

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_and_empty_requests_are_filled() {
        fill(&mut []).expect("nothing to fill");
        let mut bytes = vec![0; 3 << 20];
        fill(&mut bytes).expect("filled");
        // The chance of one zero piece is 2^-512.
        assert!(bytes.chunks(64).all(|piece| piece.iter().any(|byte| *byte != 0)));
    }
}
