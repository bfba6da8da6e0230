//! Any bytes as the first of a device with a LUKS2 header: never a panic, and what is accepted is accepted when written again.
//! The checksums of both copies are made right first, or nothing would get far.
#![no_main]

use engine::crypto::hash::Hash;
use engine::error::{Error, ErrorKind, Result};
use engine::format::luks2::{Copy, load};

const COPY: usize = 16 << 10;

/// The device goes on with zeroes.
fn read(bytes: &[u8], offset: u64, into: &mut [u8]) -> Result<()> {
    if offset > 1 << 30 {
        return Err(Error::new(ErrorKind::Invalid, "the device ends"));
    }
    let from = usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..)).unwrap_or_default();
    let kept = from.len().min(into.len());
    into[..kept].copy_from_slice(&from[..kept]);
    into[kept..].fill(0);
    Ok(())
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len().max(2 * COPY), 0);
    for copy in bytes[..2 * COPY].chunks_mut(COPY) {
        copy[448..512].fill(0);
        let mut sum = [0; 32];
        Hash::Sha256.digest(&[copy], &mut sum);
        copy[448..480].copy_from_slice(&sum);
    }
    if let Ok(loaded) = load(&mut |offset, into| read(&bytes, offset, into)) {
        let mut written = loaded.header.to_bytes(Copy::Primary).expect("a valid header");
        written.extend(loaded.header.to_bytes(Copy::Secondary).expect("a valid header"));
        let again = load(&mut |offset, into| read(&written, offset, into)).expect("our own header");
        assert_eq!(again.header.metadata.to_json(), loaded.header.metadata.to_json());
    }
});
