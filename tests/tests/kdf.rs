//! Key derivations and CBC ciphers of LUKS headers against recorded answers; where they come from: `vectors/README.md`.

use engine::crypto::hash::Hash;
use engine::crypto::kdf::{Argon2Kind, Kdf};
use engine::crypto::spec::CipherSpec;
use engine::crypto::{Kernel, Secret};
use engine::units::DataUnit;

fn unhex(text: &str) -> Vec<u8> {
    assert!(text.len().is_multiple_of(2), "{text}");
    (0..text.len() / 2).map(|at| u8::from_str_radix(&text[2 * at..2 * at + 2], 16).expect("hex")).collect()
}

/// The fields of every line that is no comment.
fn rows<const N: usize>(text: &str) -> Vec<[&str; N]> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.map(|line| line.split(' ').collect::<Vec<_>>().try_into().expect("so many fields")).collect()
}

fn number<T: std::str::FromStr>(text: &str) -> T {
    text.parse().unwrap_or_else(|_| panic!("a number: {text}"))
}

#[test]
fn pbkdf2_has_the_recorded_answers() {
    let rows = rows::<5>(include_str!("../vectors/luks/pbkdf2.txt"));
    assert_eq!(rows.len(), 22);
    for [hash, iterations, passphrase, salt, key] in rows {
        let kdf = Kdf::Pbkdf2 { hash: Hash::from_name(hash).expect("known"), iterations: number(iterations) };
        let key = unhex(key);
        let mut out = vec![0xEE; key.len()];
        kdf.derive(&unhex(passphrase), &unhex(salt), &mut out).expect("derives");
        assert_eq!(out, key, "{kdf:?} {passphrase}");
    }
}

#[test]
fn argon2_has_the_recorded_answers_with_1_to_4_lanes() {
    let rows = rows::<7>(include_str!("../vectors/luks/argon2.txt"));
    assert_eq!(rows.len(), 29);
    for [kind, time, memory_kib, lanes, passphrase, salt, key] in rows {
        let kind = match kind {
            "argon2i" => Argon2Kind::Argon2i,
            "argon2id" => Argon2Kind::Argon2id,
            other => panic!("kind {other}"),
        };
        let kdf =
            Kdf::Argon2 { kind, time: number(time), memory_kib: number(memory_kib), lanes: number(lanes) };
        let key = unhex(key);
        let mut out = vec![0xEE; key.len()];
        kdf.derive(&unhex(passphrase), &unhex(salt), &mut out).expect("derives");
        assert_eq!(out, key, "{kdf:?}");
    }
}

#[test]
fn cbc_has_the_recorded_answers() {
    let plain: Vec<u8> =
        (0..512_u32).map(|at| u8::try_from((at * at + 3 * at) % 256).expect("a byte")).collect();
    let rows = rows::<5>(include_str!("../vectors/luks/cbc.txt"));
    assert_eq!(rows.len(), 54);
    for [name, key, sector, digest, ends] in rows {
        let spec = CipherSpec::parse(name).expect("known");
        let key = Secret::copy_of(&unhex(key)).expect("memory");
        let sector: u64 = number(sector);
        // By the index of the unit, and by the counter's offset.
        for (offset, first) in [(0, sector), (sector, 0), (sector.wrapping_sub(5), 5)] {
            let cipher = spec.build(Kernel::Portable, &key, 512, offset).expect("builds");
            let mut data = plain.clone();
            cipher.encrypt(DataUnit(first), &mut data);
            assert_eq!([&data[..32], &data[496..]].concat(), unhex(ends), "{name} sector {sector}");
            let mut hashed = [0; 32];
            Hash::Sha256.digest(&[&data], &mut hashed);
            assert_eq!(hashed.as_slice(), unhex(digest), "{name} sector {sector}");
            cipher.decrypt(DataUnit(first), &mut data);
            assert_eq!(data, plain, "{name} sector {sector}");
        }
    }
}
