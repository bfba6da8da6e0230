//! Any bytes as a LUKS1 header: never a panic or a wild size, and what is accepted, or repaired, can be written and read again.
#![no_main]

use engine::format::luks1::{HEADER_BYTES, Header};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let parsed = Header::parse(bytes);
    if let Ok(header) = &parsed {
        let again = header.to_bytes();
        assert_eq!(&Header::parse(&again).expect("our own bytes"), header);
        assert_eq!(again[208..], bytes[208..HEADER_BYTES]);
        assert!(header.backup_bytes() <= 64 << 20);
        assert!(header.to_json().is_object());
        let _ = header.qemu_objection();
    }
    match Header::repaired(bytes) {
        Ok((repaired, actions)) => {
            let again = Header::repaired(&repaired.to_bytes()).expect("a repaired header is valid");
            assert_eq!(again, (repaired.clone(), Vec::new()));
            assert!(!actions.is_empty() || parsed.expect("nothing to repair") == repaired);
        }
        Err(_) => assert!(parsed.is_err(), "valid, and beyond repair"),
    }
});
