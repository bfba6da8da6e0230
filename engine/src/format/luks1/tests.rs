//! One rule each, both sides of the boundary. What the real tools say is asked in `tests/tests/luks1_format.rs`.

use super::*;
use crate::error::ErrorKind;

/// As cryptsetup makes it for `aes-xts-plain64`, 512 bits, with keyslot 0 in use.
fn header() -> Header {
    let mut header = Header::layout(64, Header::default_payload_sector(64)).expect("a layout");
    header.cipher_name = "aes".to_owned();
    header.cipher_mode = "xts-plain64".to_owned();
    header.hash = "sha256".to_owned();
    header.uuid = "78a9db84-95ca-4ff5-be02-f1c86ba3bcd0".to_owned();
    header.digest = [0xd1; 20];
    header.digest_salt = [0xd5; 32];
    header.digest_iterations = 1000;
    header.keyslots[0].active = true;
    header.keyslots[0].iterations = 2000;
    header.keyslots[0].salt = [0x5a; 32];
    header
}

/// The refusal of the header with one change.
fn refused(change: impl Fn(&mut Header)) -> String {
    let mut wrong = header();
    change(&mut wrong);
    let error = Header::parse(&wrong.to_bytes()).expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert_eq!(wrong.check().expect_err("refused too").to_string(), error.to_string());
    error.to_string()
}

fn accepted(change: impl Fn(&mut Header)) -> Header {
    let mut odd = header();
    change(&mut odd);
    assert_eq!(Header::parse(&odd.to_bytes()).expect("accepted"), odd);
    odd
}

#[test]
fn a_header_survives_its_bytes() {
    let header = header();
    let bytes = header.to_bytes();
    assert!(Header::is_here(&bytes));
    assert_eq!(bytes[..8], *b"LUKS\xba\xbe\x00\x01");
    assert_eq!(bytes[104..112], [0, 0, 0x10, 0, 0, 0, 0, 64]);
    assert_eq!(bytes[208..216], [0, 0xac, 0x71, 0xf3, 0, 0, 0x07, 0xd0]);
    assert_eq!(bytes[256..260], [0, 0, 0xde, 0xad]);
    assert_eq!(Header::parse(&bytes).expect("our own"), header);
    assert_eq!(header.cipher(), "aes-xts-plain64");
}

#[test]
fn only_magic_and_version_make_a_header() {
    let mut bytes = header().to_bytes();
    for len in 0..8 {
        assert!(!Header::is_here(&bytes[..len]));
    }
    assert!(Header::is_here(&bytes[..8]));
    bytes[7] = 2;
    assert!(!Header::is_here(&bytes), "LUKS2 is another format");
    assert_eq!(
        Header::parse(&bytes).expect_err("another version").to_string(),
        "version 2: only 1 is LUKS1: LUKS1 header"
    );
    bytes[0] = b'S';
    assert_eq!(Header::parse(&bytes).expect_err("no magic").to_string(), "no LUKS magic: LUKS1 header");
    assert_eq!(
        Header::parse(&bytes[..591]).expect_err("short").to_string(),
        "591 bytes: a header has 592: LUKS1 header"
    );
}

#[test]
fn text_is_terminated_printable_and_there() {
    let good = header().to_bytes();
    let parse = |change: &dyn Fn(&mut [u8])| {
        let mut bytes = good;
        change(&mut bytes);
        Header::parse(&bytes)
    };
    for (field, name) in
        [(8..40, "cipher name"), (40..72, "cipher mode"), (72..104, "hash"), (168..208, "UUID")]
    {
        let says = |change: &dyn Fn(&mut [u8]), what: &str| {
            let error = parse(change).expect_err("refused");
            assert_eq!(error.to_string(), format!("{name} {what}: LUKS1 header"));
        };
        says(&|bytes| bytes[field.clone()].fill(b'x'), "has no NUL at its end");
        for control in [0x01, b'\n', 0x7f, 0x80, 0xff] {
            says(&|bytes| bytes[field.start + 1] = control, "is not printable ASCII");
        }
        let longest = parse(&|bytes| bytes[field.start..field.end - 1].fill(b'x'));
        assert!(longest.is_ok(), "{name} with its NUL in the last byte");
        if name == "UUID" {
            assert_eq!(parse(&|bytes| bytes[field.clone()].fill(0)).expect("accepted").uuid, "");
        } else {
            says(&|bytes| bytes[field.clone()].fill(0), "is empty");
        }
    }
    let garbage = parse(&|bytes| bytes[13..16].copy_from_slice(b"\xff\x01x")).expect("accepted");
    assert_eq!(garbage, header(), "what stands behind a NUL is nobody's");
}

#[test]
fn text_longer_than_its_field_is_refused_before_it_is_written() {
    let mut long = header();
    long.uuid = "u".repeat(40);
    assert_eq!(long.check().expect_err("too long").to_string(), "UUID is longer than 39 bytes: LUKS1 header");
    long.uuid.pop();
    long.check().expect("39 bytes fit");
}

#[test]
fn numbers_have_bounds() {
    assert_eq!(
        refused(|header| header.key_bytes = 0),
        "volume key of 0 bytes: it must be 1 to 512: LUKS1 header"
    );
    assert_eq!(
        refused(|header| header.key_bytes = u32::MAX),
        "volume key of 4294967295 bytes: it must be 1 to 512: LUKS1 header"
    );
    accepted(|header| header.key_bytes = 1);
    assert_eq!(refused(|header| header.digest_iterations = 0), "digest of no iterations: LUKS1 header");
    accepted(|header| header.digest_iterations = 1);
    assert_eq!(
        refused(|header| header.keyslots[0].iterations = 0),
        "in use with no iterations: LUKS1 header, keyslot 0"
    );
    assert_eq!(
        refused(|header| header.keyslots[7].stripes = 3999),
        "3999 stripes: it must be 4000: LUKS1 header, keyslot 7"
    );
    accepted(|header| {
        header.keyslots[3].iterations = 77;
        header.keyslots[3].salt = [1; 32];
    });
}

#[test]
fn a_state_is_one_of_two() {
    let mut bytes = header().to_bytes();
    bytes[208 + 48 * 3 + 3] ^= 1;
    let error = Header::parse(&bytes).expect_err("refused");
    assert_eq!(
        error.to_string(),
        "state 0x0000deac is neither 0x00ac71f3 nor 0x0000dead: LUKS1 header, keyslot 3"
    );
    assert!(error.to_failure().hint.is_some_and(|hint| hint.contains("repair")));
}

#[test]
fn material_keeps_clear_of_header_data_and_other_material() {
    assert_eq!(
        refused(|header| header.keyslots[0].material_sector = 1),
        "material at sector 1: the header takes 2: LUKS1 header, keyslot 0"
    );
    accepted(|header| header.keyslots[0].material_sector = 2);
    // Keyslot 2 lies in sectors 1016..1516, and keyslot 3 begins at 1520.
    assert_eq!(
        refused(|header| header.keyslots[3].material_sector = 1515),
        "material overlaps that of keyslot 2: LUKS1 header, keyslot 3"
    );
    accepted(|header| header.keyslots[3].material_sector = 1516);
    assert_eq!(
        refused(|header| header.payload_sector = 4035),
        "material in sectors 3536..4036 reaches into the data at 4035: LUKS1 header, keyslot 7"
    );
    accepted(|header| header.payload_sector = 4036);
    accepted(|header| header.payload_sector = 0);
    accepted(|header| header.keyslots.swap(1, 2));
    assert_eq!(
        refused(|header| {
            header.payload_sector = 0;
            header.keyslots[7].material_sector = 131_072 - 499;
        }),
        "material in sectors 130573..131073: none lies beyond 131072: LUKS1 header, keyslot 7"
    );
    accepted(|header| {
        header.payload_sector = 0;
        header.keyslots[7].material_sector = 131_072 - 500;
    });
    assert!(
        refused(|header| header.keyslots[7].material_sector = u32::MAX).contains("reaches into the data")
    );
}

#[test]
fn the_layout_is_cryptsetups() {
    for (key_bytes, step, payload, backup) in
        [(16, 128, 2048, 1032 * 512), (32, 256, 4096, 1_052_672), (64, 504, 4096, 2_068_480)]
    {
        assert_eq!(Header::default_payload_sector(key_bytes), payload);
        let header = Header::layout(key_bytes, payload).expect("a layout");
        let starts = header.keyslots.map(|keyslot| keyslot.material_sector);
        assert_eq!(starts, std::array::from_fn(|index| 8 + step * u32::try_from(index).expect("small")));
        assert_eq!(header.backup_bytes(), backup);
        assert_eq!(header.keyslots[1].material_offset(), u64::from(8 + step) * 512);
        assert!(header.keyslots.iter().all(|keyslot| !keyslot.active && keyslot.stripes == 4000));
    }
    assert_eq!(Header::layout(64, 4040).expect("QEMU's payload").backup_bytes(), 4040 * 512);
    assert_eq!(
        Header::layout(64, 4039).expect_err("too near").to_string(),
        "data at sector 4039: the keyslots end at 4040: LUKS1 header"
    );
    for key_bytes in [0, KEY_BYTES_MAX + 1, u32::MAX] {
        assert_eq!(Header::layout(key_bytes, 0).expect_err("no key").kind(), ErrorKind::Invalid);
        assert!(Header::default_payload_sector(key_bytes).is_multiple_of(2048), "no overflow");
    }
    for key_bytes in 1..=KEY_BYTES_MAX {
        let payload = Header::default_payload_sector(key_bytes);
        let filled = Header { key_bytes, ..Header::layout(key_bytes, payload).expect("a layout") };
        let named = Header {
            cipher_name: "aes".to_owned(),
            cipher_mode: "xts-plain64".to_owned(),
            hash: "sha1".to_owned(),
            digest_iterations: 1000,
            ..filled
        };
        named.check().expect("every layout is valid");
        assert_eq!(named.qemu_objection(), None);
    }
}

#[test]
fn a_backup_never_reaches_into_the_data() {
    let mut header = header();
    header.payload_sector = 4037;
    assert_eq!(header.backup_bytes(), 4037 * 512);
}

#[test]
fn qemu_objects_to_what_only_cryptsetup_accepts() {
    assert_eq!(header().qemu_objection(), None);
    let objection = |change: &dyn Fn(&mut Header)| accepted(change).qemu_objection().expect("an objection");
    assert!(objection(&|header| header.hash = "SHA256".to_owned()).contains("capitals"));
    assert!(objection(&|header| header.keyslots[0].material_sector = 7).contains("before sector 8"));
    assert!(objection(&|header| header.keyslots[3].material_sector = 1519).contains("keyslots 2 and 3"));
    assert!(objection(&|header| header.payload_sector = 4039).contains("keyslot 7"));
}

#[test]
fn repair_leaves_a_good_header_alone() {
    let (same, actions) = Header::repaired(&header().to_bytes()).expect("nothing to do");
    assert_eq!((same, actions), (header(), vec![]));
}

#[test]
fn repair_corrects_what_is_known_to_go_wrong() {
    let mut bytes = header().to_bytes();
    bytes[72..78].copy_from_slice(b"SHA256");
    bytes[204..208].fill(b'!'); // the UUID runs to the end of its field
    bytes[208 + 44..208 + 48].fill(0); // stripes of keyslot 0, in use
    bytes[208 + 48..208 + 52].fill(0x11); // state of keyslot 1
    bytes[208 + 2 * 48 + 40] = 0xff; // material of keyslot 2
    bytes[208 + 3 * 48 + 47] = 0; // stripes of keyslot 3
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    assert!(Header::parse(&bytes).is_err());
    let (repaired, actions) = Header::repaired(&bytes).expect("repairable");
    let uuid = header().uuid + "!!!";
    assert_eq!(repaired, Header { uuid, ..header() });
    let about = ["hash", "UUID", "keyslot 0: 0 stripes", "keyslot 1: state", "keyslot 3: 3840 stripes"];
    let rest =
        ["keyslot 6: signature", "keyslot 2: material offset corrected from sector 4278191096 to 1016"];
    for (action, start) in actions.iter().zip(about.iter().chain(&rest)) {
        assert!(action.starts_with(start), "{action}");
    }
    assert_eq!(actions.len(), 7);
    assert_eq!(Header::repaired(&repaired.to_bytes()).expect("stable").1, Vec::<String>::new());
}

#[test]
fn repair_touches_no_keyslot_in_use_and_guesses_nothing() {
    let mut bytes = header().to_bytes();
    bytes[208 + 43] = 1; // material of keyslot 0 in sector 1
    let error = Header::repaired(&bytes).expect_err("beyond repair");
    assert_eq!(
        error.chain(),
        "the header is beyond repair: material at sector 1: the header takes 2: LUKS1 header, keyslot 0"
    );
    bytes = header().to_bytes();
    bytes[108..112].fill(0xff);
    assert_eq!(Header::repaired(&bytes).expect_err("beyond repair").kind(), ErrorKind::Invalid);
    assert!(Header::repaired(&[0; HEADER_BYTES]).is_err());
    assert!(Header::repaired(&[]).is_err());
    // An unaligned layout as of cryptsetup 1.0: the keyslot in use says so, and the unused ones stay where they are.
    let unaligned = accepted(|header| {
        for (index, keyslot) in header.keyslots.iter_mut().enumerate() {
            keyslot.material_sector = 2 + 501 * u32::try_from(index).expect("small");
        }
    });
    let (same, actions) = Header::repaired(&unaligned.to_bytes()).expect("valid");
    assert_eq!((same, actions), (unaligned, vec![]));
}

/// Where the record of a keyslot begins.
fn record(keyslot: usize) -> usize {
    208 + 48 * keyslot
}

#[test]
fn repair_puts_a_keyslot_back_in_use_whose_state_was_damaged() {
    // One flipped bit in the state of the only keyslot: its salt and its material are whole.
    for bit in 0..32 {
        let mut bytes = header().to_bytes();
        bytes[record(0) + bit / 8] ^= 1 << (bit % 8);
        let (repaired, actions) = Header::repaired(&bytes).expect("repairable");
        assert_eq!(repaired, header(), "bit {bit}");
        assert!(actions[0].contains("taken to be in use"), "{actions:?}");
    }
    // Stripes gone too: there has never been another number of them.
    let mut bytes = header().to_bytes();
    bytes[record(0) + 2] = 0;
    bytes[record(0) + 44..record(1)].fill(0xff);
    assert_eq!(Header::repaired(&bytes).expect("repairable").0, header());
}

#[test]
fn repair_turns_a_keyslot_off_only_beside_one_that_stays() {
    // No salt: nothing can open it. But when no other is in use, this may be a header of which more is lost.
    for field in [4..8, 8..40] {
        let mut bytes = header().to_bytes();
        bytes[record(0)] ^= 1;
        bytes[record(0) + field.start..record(0) + field.end].fill(0);
        let error = Header::repaired(&bytes).expect_err("in doubt");
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.chain().contains("no keyslot would be in use"), "{}", error.chain());
        let mut beside = header();
        beside.keyslots[5] =
            Keyslot { material_sector: beside.keyslots[5].material_sector, ..beside.keyslots[0] };
        let mut bytes = beside.to_bytes();
        bytes[record(0)] ^= 1;
        bytes[record(0) + field.start..record(0) + field.end].fill(0);
        let (repaired, _) = Header::repaired(&bytes).expect("repairable");
        assert!(!repaired.keyslots[0].active && repaired.keyslots[5].active);
        // What is left of it is kept.
        let kept = if field.start == 4 { (0, [0x5a; 32]) } else { (2000, [0; 32]) };
        assert_eq!((repaired.keyslots[0].iterations, repaired.keyslots[0].salt), kept);
    }
    // Material where it cannot be: it is turned off, its salt kept, and the others open again.
    let mut beside = header();
    beside.keyslots[5] =
        Keyslot { material_sector: beside.keyslots[5].material_sector, ..beside.keyslots[0] };
    let mut bytes = beside.to_bytes();
    bytes[record(0)] ^= 1;
    bytes[record(0) + 40..record(1)].fill(0xff);
    let (repaired, actions) = Header::repaired(&bytes).expect("repairable");
    beside.keyslots[0].active = false;
    assert_eq!(repaired, beside, "{actions:?}");
    assert_eq!(Header::repaired(&repaired.to_bytes()).expect("stable").1, Vec::<String>::new());
}

#[test]
fn json_has_the_names_of_the_specification() {
    let json = header().to_json();
    assert_eq!(json["cipher-name"], "aes");
    assert_eq!(json["payload-offset"], 4096);
    assert_eq!(json["mk-digest"], "0dHR0dHR0dHR0dHR0dHR0dHR0dE=");
    assert_eq!(json["keyslots"]["0"]["active"], true);
    assert_eq!(json["keyslots"]["7"]["key-material-offset"], 3536);
    assert_eq!(json["keyslots"].as_object().expect("an object").len(), 8);
}
