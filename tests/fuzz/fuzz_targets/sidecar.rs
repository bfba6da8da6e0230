//! Any bytes as the slots of a sidecar journal: never a panic, and what is whole keeps every rule and is written again as it was read.
#![no_main]

use engine::crypto::Secret;
use engine::format::sidecar::{SLOT_BYTES, Slots, Unproven};

/// Somebody without keys can make any checksum: make it, so that what lies behind it is reached.
fn sealed(slot: &[u8]) -> Option<[u8; SLOT_BYTES]> {
    let mut slot: [u8; SLOT_BYTES] = slot.get(..SLOT_BYTES)?.try_into().ok()?;
    let mut sum = [0; 32];
    engine::crypto::hash::Hash::Sha256.digest(&[&slot[..480]], &mut sum);
    slot[480..512].copy_from_slice(&sum);
    Some(slot)
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(Slots::Whole(newer, Some(older))) = Slots::read(bytes) {
        assert_eq!(newer.claims().fixed, older.claims().fixed);
    }
    let Some(slot) = sealed(bytes) else { return };
    let Ok(whole) = Unproven::parse(&slot) else { return };
    let claims = whole.claims();
    claims.check().expect("every rule was kept");
    let fixed = &claims.fixed;
    assert!(fixed.hotzone_max().is_none_or(|most| most >= fixed.step_bytes()));
    if fixed.iterations > 10_000 {
        return;
    }
    let key = |byte, bytes: u32| Secret::copy_of(&vec![byte; bytes as usize]).expect("memory");
    let mac = fixed.mac_key(&key(1, fixed.old.key_bytes), &key(2, fixed.new.key_bytes)).expect("a key");
    assert!(whole.prove(&mac).is_err(), "nobody with the keys wrote it");
    let again = claims.to_slot(&mac);
    assert_eq!(again[..448], slot[..448]);
    assert_eq!(Unproven::parse(&again).expect("our own").prove(&mac).expect("our own"), claims);
});
