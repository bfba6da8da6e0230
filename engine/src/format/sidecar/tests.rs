//! Superblocks and slots: what is written is read, and nothing else is.

use super::*;

fn raw(key_bytes: u32, data_unit: u32) -> Raw {
    Raw { key_bytes, data_unit, tweak: TweakKind::Plain64, large_tweak: false, tweak_offset: 0 }
}

fn fixed() -> Fixed {
    Fixed {
        id: [7; 16],
        volume_bytes: 1 << 30,
        resilience: Resilience::Checksum(Checksum { hash: Hash::Sha256, block_bytes: 4096 }),
        area: Area { offset: AREA_OFFSET, size: 512 << 10 },
        old: Raw { tweak: TweakKind::Plain, tweak_offset: 64, ..raw(32, 512) },
        new: Raw { large_tweak: true, ..raw(64, 4096) },
        iterations: 1000,
        salt: [9; 32],
        identity: [3; 32],
    }
}

fn secret(byte: u8, bytes: u32) -> Secret {
    Secret::copy_of(&vec![byte; bytes as usize]).expect("memory")
}

fn key(fixed: &Fixed) -> MacKey {
    fixed.mac_key(&secret(1, fixed.old.key_bytes), &secret(2, fixed.new.key_bytes)).expect("a key")
}

fn at(sequence: u64, state: State) -> Superblock {
    Superblock { fixed: fixed(), sequence, state, witness: WITNESS }
}

const WITNESS: Witness = Witness { before: [4; 32], behind: [5; 32] };
const CLEAN: State = State::Clean { boundary: 8 << 20 };
const CRASH: State = State::Crash { start: 8 << 20, bytes: 4 << 20 };

/// Checksum of bytes that were changed: what anybody can make.
fn sealed(mut slot: [u8; SLOT_BYTES]) -> [u8; SLOT_BYTES] {
    let sum = checksum(&slot[..CHECKSUM_AT]);
    slot[CHECKSUM_AT..BYTES].copy_from_slice(&sum);
    slot
}

/// Checksum and MAC of bytes that were changed: what only somebody with the keys can make.
fn signed(mut slot: [u8; SLOT_BYTES], key: &MacKey) -> [u8; SLOT_BYTES] {
    let mac = hmac_sha256(key.0.as_bytes(), &slot[..MAC_AT]);
    slot[MAC_AT..CHECKSUM_AT].copy_from_slice(&mac);
    sealed(slot)
}

#[test]
fn every_state_and_protection_comes_back() {
    let states =
        [State::Preparing, State::Clean { boundary: 0 }, CLEAN, CRASH, State::Finished, State::Swept];
    let sha512 = Checksum { hash: Hash::Sha512, block_bytes: 8192 };
    let protections = [
        (Resilience::Checksum(sha512), 64 << 10),
        (fixed().resilience, 512 << 10),
        (Resilience::Journal, 16 << 20),
        (Resilience::None, 0),
    ];
    for state in states {
        for (resilience, size) in protections {
            let area = Area { offset: AREA_OFFSET, size };
            let fixed = Fixed { resilience, area, ..fixed() };
            let written = Superblock { fixed, sequence: 41, state, witness: WITNESS };
            let key = key(&written.fixed);
            let read = Unproven::parse(&written.to_slot(&key)).expect("our own");
            assert_eq!(read.claims(), &written);
            assert_eq!(read.prove(&key).expect("our own"), &written);
        }
    }
}

/// The bytes of the table at the module's head, put together by hand.
#[test]
fn bytes_are_where_the_table_has_them() {
    let mut expected = Vec::new();
    expected.extend(b"cryptctl-journal");
    expected.extend([0, 0, 0, 1, 0, 0, 0, 2]);
    expected.extend(5_u64.to_be_bytes());
    expected.extend([7; 16]);
    for number in [1_u64 << 30, 8 << 20, 4 << 20] {
        expected.extend(number.to_be_bytes());
    }
    expected.extend([0, 0, 0, 1, 0, 0, 0, 1]);
    expected.extend(b"sha256\0\0\0\0\0\0\0\0\0\0");
    expected.extend([0, 0, 16, 0, 0, 0, 0, 0]);
    expected.extend(8192_u64.to_be_bytes());
    expected.extend((512_u64 << 10).to_be_bytes());
    expected.extend([0, 0, 0, 32, 0, 0, 2, 0, 0, 0, 0, 2, 0, 0, 0, 0]);
    expected.extend(64_u64.to_be_bytes());
    expected.extend([0, 0, 0, 64, 0, 0, 16, 0, 0, 0, 0, 1, 0, 0, 0, 1]);
    expected.extend(0_u64.to_be_bytes());
    expected.extend([0, 0, 3, 232, 0, 0, 0, 0]);
    for hash in [[9; 32], [3; 32], [4; 32], [5; 32]] {
        expected.extend(hash);
    }
    assert_eq!(expected.len(), 304);
    expected.resize(448, 0);
    // PBKDF2 and HMAC by the crates themselves.
    let mut mac_key = [0; 32];
    let keys = [vec![1; 32], vec![2; 64]].concat();
    pbkdf2::pbkdf2_hmac::<sha2::Sha256>(&keys, &[9; 32], 1000, &mut mac_key);
    let mac = hmac_sha256(&mac_key, &expected);
    expected.extend(mac);
    let sum: [u8; 32] = <sha2::Sha256 as sha2::Digest>::digest(&expected).into();
    expected.extend(sum);
    expected.resize(4096, 0);
    assert_eq!(at(5, CRASH).to_slot(&key(&fixed()))[..], expected[..]);
}

#[test]
fn every_byte_flipped_is_refused() {
    let key = key(&fixed());
    let whole = at(3, CRASH).to_slot(&key);
    for place in 0..SLOT_BYTES {
        for bit in [0x01, 0x80] {
            let mut slot = *whole;
            slot[place] ^= bit;
            assert!(Unproven::parse(&slot).is_err(), "byte {place}");
            // With a new checksum it may be whole, but nobody with the keys wrote it. Behind the superblock nothing is allowed at all.
            if let Ok(unproven) = Unproven::parse(&sealed(slot)) {
                if place >= CHECKSUM_AT {
                    assert!(place < BYTES, "byte {place}");
                    continue;
                }
                assert_eq!(
                    unproven.prove(&key).expect_err("forged").kind(),
                    ErrorKind::WrongKey,
                    "byte {place}"
                );
            }
        }
    }
}

#[test]
fn other_keys_do_not_prove_it() {
    let fixed = fixed();
    let slot = at(3, CLEAN).to_slot(&key(&fixed));
    let unproven = Unproven::parse(&slot).expect("whole");
    let (old, new) = (secret(1, 32), secret(2, 64));
    assert!(unproven.prove(&fixed.mac_key(&old, &new).expect("a key")).is_ok());
    for (old, new) in [(secret(2, 32), secret(2, 64)), (secret(1, 32), secret(1, 64))] {
        let error = unproven.prove(&fixed.mac_key(&old, &new).expect("a key")).expect_err("another key");
        assert_eq!((error.kind(), error.chain()), (ErrorKind::WrongKey, "wrong key or damaged data".into()));
    }
    assert_eq!(fixed.mac_key(&new, &old).expect_err("lengths").kind(), ErrorKind::WrongKey);
    let salted = Fixed { salt: [8; 32], ..fixed.clone() };
    assert!(unproven.prove(&salted.mac_key(&old, &new).expect("a key")).is_err());
}

#[test]
fn what_cannot_be_is_refused_though_it_is_signed() {
    let key = key(&fixed());
    let good = *at(3, CRASH).to_slot(&key);
    assert!(Unproven::parse(&signed(good, &key)).is_ok());
    let set = |place: usize, bytes: &[u8]| {
        let mut slot = good;
        slot[place..place + bytes.len()].copy_from_slice(bytes);
        Unproven::parse(&signed(slot, &key)).expect_err(&format!("{bytes:?} at {place}"))
    };
    let long = |number: u64| number.to_be_bytes();
    assert_eq!(set(16, &[0, 0, 0, 2]).kind(), ErrorKind::Unsupported);
    let wrong: [(usize, &[u8]); 34] = [
        (20, &[0, 0, 0, 0]),
        (20, &[0, 0, 0, 1]),
        (20, &[0, 0, 0, 3]),
        (20, &[0, 0, 0, 4]),
        (20, &[0, 0, 0, 5]),
        (48, &long(0)),
        (48, &long((1 << 30) + 512)),
        (48, &long(9 << 20)),
        (56, &long(512)),
        (56, &long(1 << 30)),
        (56, &long(u64::MAX - 4095)),
        (64, &long(0)),
        (64, &long(4096 + 512)),
        (64, &long((64 << 20) + 4096)),
        (64, &long(u64::MAX - 4095)),
        (72, &[0, 0, 0, 0]),
        (72, &[0, 0, 0, 2]),
        (76, &[0, 0, 0, 0]),
        (76, &[0, 0, 0, 2]),
        (76, &[0, 0, 0, 3]),
        (80, b"sha255"),
        (80, b"sha256\0x"),
        (96, &[0, 0, 0, 0]),
        (96, &[0, 0, 1, 0]),
        (96, &[0, 0, 24, 0]),
        (96, &[0, 2, 0, 0]),
        (100, &[1]),
        (104, &long(4096)),
        (112, &long(0)),
        (112, &long(u64::MAX - 4095)),
        (120, &[0, 0, 0, 48]),
        (124, &[0, 0, 4, 1]),
        (168, &[0, 0, 3, 231]),
        (304, &[1]),
    ];
    for (place, bytes) in wrong {
        assert_eq!(set(place, bytes).kind(), ErrorKind::Damaged, "{bytes:?} at {place}");
    }
    for (place, bytes) in [(128, [0, 0, 0, 0]), (128, [0, 0, 0, 3]), (132, [0, 0, 0, 2]), (172, [0, 0, 0, 1])]
    {
        assert_eq!(set(place, &bytes).kind(), ErrorKind::Damaged, "{bytes:?} at {place}");
    }
}

fn both(slots: [&[u8]; 2]) -> Result<Slots> {
    Slots::read(&slots.concat())
}

/// Which sequence number is in force; 0 is that of one that is being prepared.
fn in_force(slots: [&[u8]; 2]) -> Option<u64> {
    match both(slots) {
        Ok(Slots::Whole(newer, _)) => Some(newer.claims().sequence),
        _ => None,
    }
}

#[test]
fn of_two_whole_superblocks_the_newer_counts() {
    let key = key(&fixed());
    let (older, newer) = (at(4, CLEAN).to_slot(&key), at(5, CRASH).to_slot(&key));
    assert_eq!(in_force([&older[..], &newer[..]]), Some(5));
    assert_eq!(in_force([&newer[..], &older[..]]), Some(5));
    assert_eq!(in_force([&newer[..], &newer[..]]), Some(5));
    // No state is missed out, and one state is one.
    let far = at(7, CLEAN).to_slot(&key);
    assert_eq!(both([&older[..], &far[..]]).expect_err("a gap").kind(), ErrorKind::Damaged);
    let other = at(5, CLEAN).to_slot(&key);
    assert_eq!(both([&other[..], &newer[..]]).expect_err("two states").kind(), ErrorKind::Damaged);
    // What was begun is not begun anew because one slot claims that it never was.
    let first = at(4, State::Preparing).to_slot(&key);
    assert_eq!(in_force([&first[..], &newer[..]]), Some(5), "an older one is only the one before");
    for sequence in [5, 6] {
        let anew = at(sequence, State::Preparing).to_slot(&key);
        assert_eq!(both([&anew[..], &newer[..]]).expect_err("believed").kind(), ErrorKind::Damaged);
    }
    let foreign = Superblock { fixed: Fixed { id: [6; 16], ..fixed() }, ..at(6, CLEAN) }.to_slot(&key);
    assert_eq!(both([&foreign[..], &newer[..]]).expect_err("two journals").kind(), ErrorKind::Damaged);
}

#[test]
fn a_torn_superblock_leaves_the_other_one_in_force() {
    let key = key(&fixed());
    let (older, newer) = (at(4, CLEAN).to_slot(&key), at(5, CRASH).to_slot(&key));
    let zeros = [0; SLOT_BYTES];
    for torn in 0..=BYTES {
        // The first bytes of the new one, the rest of what was there before.
        let mut slot = *at(3, CRASH).to_slot(&key);
        slot[..torn].copy_from_slice(&newer[..torn]);
        let expected = if slot == *newer { 5 } else { 4 };
        assert_eq!(in_force([&older[..], &slot[..]]), Some(expected), "{torn} bytes of it");
        assert_eq!(in_force([&older[..], &zeros]), Some(4));
    }
    let mut bad = *newer;
    bad[300] ^= 1;
    assert_eq!(both([&bad[..], &bad[..]]).expect_err("nothing is whole").kind(), ErrorKind::Damaged);
    assert_eq!(both([&bad[..], &zeros]).expect_err("nothing is whole").kind(), ErrorKind::Damaged);
    // Whole, and not to be believed: no way back to the older one.
    let mut forged = *newer;
    forged[20..24].copy_from_slice(&[0, 0, 0, 9]);
    assert_eq!(both([&older[..], &sealed(forged)]).expect_err("forged").kind(), ErrorKind::Damaged);
    let mut later = *newer;
    later[19] = 2;
    assert_eq!(both([&older[..], &sealed(later)]).expect_err("of later").kind(), ErrorKind::Unsupported);
}

#[test]
fn only_a_file_of_nothing_is_empty() {
    let key = key(&fixed());
    let preparing = at(0, State::Preparing).to_slot(&key);
    for bytes in [0, 1, 512, 4095, 4096] {
        assert_eq!(Slots::read(&vec![0; bytes]).expect("empty"), Slots::Empty, "{bytes}");
    }
    for bytes in [512, 513, 4095, 4096] {
        assert_eq!(in_force([&preparing[..bytes], &[]]), Some(0));
    }
    assert_eq!(in_force([&preparing[..], &[0; SLOT_BYTES]]), Some(0));
    for (bytes, kind) in [
        (vec![0; 4097], ErrorKind::Unsupported),
        (vec![0; 8192], ErrorKind::Unsupported),
        (vec![1], ErrorKind::Unsupported),
        (b"LUKS\xba\xbe".repeat(2000)[..8192].to_vec(), ErrorKind::Unsupported),
        (preparing[..511].to_vec(), ErrorKind::Damaged),
        (preparing[..31].to_vec(), ErrorKind::Damaged),
        (preparing[..15].to_vec(), ErrorKind::Unsupported),
    ] {
        assert_eq!(Slots::read(&bytes).expect_err("no journal").kind(), kind, "{} bytes", bytes.len());
    }
}

#[test]
fn noise_is_no_journal() {
    let mut state = 11_u64;
    let mut slots = vec![0; 8192];
    for _ in 0..200 {
        for byte in &mut slots {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *byte = state.to_be_bytes()[0];
        }
        assert!(Slots::read(&slots).is_err());
        // With a right checksum around it, too.
        slots[..16].copy_from_slice(&MAGIC);
        let slot = sealed(slots[..4096].try_into().expect("a slot"));
        assert!(Unproven::parse(&slot).is_err());
    }
}
