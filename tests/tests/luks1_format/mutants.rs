//! Any bytes: no panic, no wild size, and what is accepted can be written and read again. The same property as the fuzz target
//! `luks1_header`, for a bounded number of seeded mutations.

use engine::format::luks1::{HEADER_BYTES, Header};
use tests::{Random, seed};

use crate::sample;

const MUTANTS: usize = 300_000;

/// What the fuzz target asserts too.
fn hold(bytes: &[u8]) -> bool {
    let parsed = Header::parse(bytes);
    if let Ok(header) = &parsed {
        let again = header.to_bytes();
        assert_eq!(&Header::parse(&again).expect("our own bytes"), header);
        assert_eq!(again[104..168], bytes[104..168], "numbers survive");
        assert_eq!(again[208..], bytes[208..HEADER_BYTES], "keyslots survive");
        assert!(header.backup_bytes() <= 64 << 20 && header.backup_bytes() > HEADER_BYTES as u64);
        assert!(header.to_json().is_object());
        let _ = header.qemu_objection();
    }
    match Header::repaired(bytes) {
        Ok((repaired, actions)) => {
            assert_eq!(Header::parse(&repaired.to_bytes()).expect("a repaired header is valid"), repaired);
            if actions.is_empty() {
                assert_eq!(parsed.expect("nothing to repair"), repaired);
            }
            let (same, more) = Header::repaired(&repaired.to_bytes()).expect("still repairable");
            assert_eq!((same, more), (repaired, vec![]), "after {actions:?}");
            true
        }
        Err(_) => parsed.is_ok_and(|header| panic!("valid, and beyond repair: {header:?}")),
    }
}

#[test]
fn no_mutation_panics_and_what_is_accepted_reads_the_same_again() {
    let mut random = Random::new(seed());
    let mut bases = vec![sample()];
    bases.push(Header { payload_sector: 0, ..sample() });
    let layout = Header::layout(32, 2056).expect("a layout");
    bases.push(Header { key_bytes: 32, payload_sector: 2056, keyslots: layout.keyslots, ..sample() });
    bases[2].keyslots.iter_mut().for_each(|keyslot| (keyslot.active, keyslot.iterations) = (true, 1));
    let mut held = 0;
    for _ in 0..MUTANTS {
        let mut bytes = bases[random.below(bases.len())].to_bytes().to_vec();
        for _ in 0..=random.below(4) {
            mutate(&mut bytes, &mut random);
        }
        held += usize::from(hold(&bytes));
    }
    assert!(held > MUTANTS / 20, "only {held} mutants got past the first checks");
}

fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    if bytes.is_empty() {
        return;
    }
    let at = random.below(bytes.len());
    match random.below(8) {
        0 | 1 => bytes[at] ^= 1 << random.below(8),
        2 => bytes[at] = random.next_u64().to_be_bytes()[0],
        3 | 4 => {
            // A number on its place, with a value at which something changes.
            let value = match random.below(4) {
                0 => [0, 1, 2, 7, 8, 512, 1000, 4000, 4036, 4040, 4096, 131_072][random.below(12)],
                1 => 0x00ac_71f3,
                2 => 0x0000_dead,
                _ => u32::MAX >> random.below(32),
            };
            let at = at / 4 * 4;
            let end = bytes.len().min(at + 4);
            bytes[at..end].copy_from_slice(&value.to_be_bytes()[..end - at]);
        }
        5 => {
            let (from, to) = (random.below(bytes.len()), random.below(bytes.len()));
            let len = random.below(64).min(bytes.len() - from.max(to));
            bytes.copy_within(from..from + len, to);
        }
        6 => {
            let end = bytes.len().min(at + random.below(48));
            bytes[at..end].fill([0, 0xff, b'a'][random.below(3)]);
        }
        _ if random.below(20) == 0 => bytes.truncate(at),
        _ => bytes.extend_from_slice(&random.next_u64().to_be_bytes()),
    }
}
