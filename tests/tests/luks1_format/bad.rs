//! One header per way of being wrong, and of being odd: what we say, and what the real tools say.
//!
//! The files of `vectors/bad/luks1` are made by the table below: `WRITE_VECTORS=1 cargo test -p tests --test luks1_format
//! the_corpus` writes them anew, with `expected.txt` (file, kind, fragment of the message). Without it the table and the files must agree.

use std::fmt::Write as _;
use std::path::PathBuf;

use engine::error::ErrorKind;
use engine::format::luks1::{HEADER_BYTES, Header};
use tests::{Random, Scratch, seed, skip};

use crate::{cryptsetup, is_installed, name, run, sample};

type Bytes = Vec<u8>;

/// A header with something wrong: file, what is changed in [`sample`], what we say, and whether cryptsetup refuses it too.
struct Bad {
    file: &'static str,
    change: fn(&mut Bytes),
    says: &'static str,
    cryptsetup_refuses: bool,
}

const fn bad(file: &'static str, change: fn(&mut Bytes), says: &'static str) -> Bad {
    Bad { file, change, says, cryptsetup_refuses: true }
}

/// We are stricter than cryptsetup here; the table in `luks1::validate` says why.
const fn ours_alone(file: &'static str, change: fn(&mut Bytes), says: &'static str) -> Bad {
    Bad { file, change, says, cryptsetup_refuses: false }
}

fn put(bytes: &mut Bytes, at: usize, field: &[u8]) {
    bytes[at..at + field.len()].copy_from_slice(field);
}

fn number(bytes: &mut Bytes, at: usize, value: u32) {
    put(bytes, at, &value.to_be_bytes());
}

/// Where keyslot `index` begins; +0 state, +4 iterations, +8 salt, +40 material, +44 stripes.
const fn keyslot(index: usize) -> usize {
    208 + 48 * index
}

const BAD: [Bad; 46] = [
    bad("empty.bin", Vec::clear, "0 bytes: a header has 592"),
    bad("short.bin", |bytes| bytes.truncate(HEADER_BYTES - 1), "591 bytes: a header has 592"),
    bad("zeros.bin", |bytes| bytes.fill(0), "no LUKS magic"),
    bad("magic.bin", |bytes| bytes[5] = 0xbf, "no LUKS magic"),
    bad("magic-secondary.bin", |bytes| put(bytes, 0, b"SKUL"), "no LUKS magic"),
    bad("magic-rbd-clone.bin", |bytes| put(bytes, 0, b"RBDL"), "no LUKS magic"),
    bad("version-0.bin", |bytes| bytes[7] = 0, "version 0: only 1 is LUKS1"),
    bad("version-2.bin", |bytes| bytes[7] = 2, "version 2: only 1 is LUKS1"),
    bad("version-little-endian.bin", |bytes| put(bytes, 6, &[1, 0]), "version 256: only 1 is LUKS1"),
    ours_alone(
        "cipher-name-endless.bin",
        |bytes| bytes[8..40].fill(b'a'),
        "cipher name has no NUL at its end",
    ),
    ours_alone("cipher-name-empty.bin", |bytes| bytes[8..40].fill(0), "cipher name is empty"),
    ours_alone("cipher-name-control.bin", |bytes| bytes[9] = 7, "cipher name is not printable ASCII"),
    ours_alone("cipher-name-latin1.bin", |bytes| bytes[9] = 0xe9, "cipher name is not printable ASCII"),
    ours_alone(
        "cipher-mode-endless.bin",
        |bytes| bytes[40..72].fill(b'x'),
        "cipher mode has no NUL at its end",
    ),
    ours_alone("cipher-mode-empty.bin", |bytes| bytes[40..72].fill(0), "cipher mode is empty"),
    ours_alone("cipher-mode-newline.bin", |bytes| bytes[43] = b'\n', "cipher mode is not printable ASCII"),
    bad("hash-endless.bin", |bytes| bytes[72..104].fill(b's'), "hash has no NUL at its end"),
    bad("hash-empty.bin", |bytes| bytes[72..104].fill(0), "hash is empty"),
    bad("hash-control.bin", |bytes| bytes[72] = 0x1b, "hash is not printable ASCII"),
    ours_alone("uuid-endless.bin", |bytes| bytes[168..208].fill(b'u'), "UUID has no NUL at its end"),
    ours_alone("uuid-control.bin", |bytes| bytes[170] = 0x7f, "UUID is not printable ASCII"),
    bad("payload-1.bin", |bytes| number(bytes, 104, 1), "reaches into the data at 1"),
    bad("payload-8.bin", |bytes| number(bytes, 104, 8), "reaches into the data at 8"),
    bad("payload-in-last-material.bin", |bytes| number(bytes, 104, 4035), "3536..4036 reaches into the data"),
    bad("key-bytes-0.bin", |bytes| number(bytes, 108, 0), "volume key of 0 bytes"),
    bad(
        "key-bytes-65.bin",
        |bytes| number(bytes, 108, 65),
        "overlaps that of keyslot 0: LUKS1 header, keyslot 1",
    ),
    bad("key-bytes-513.bin", |bytes| number(bytes, 108, 513), "volume key of 513 bytes"),
    bad("key-bytes-wrap.bin", |bytes| number(bytes, 108, 1_073_742), "volume key of 1073742 bytes"),
    bad("key-bytes-max.bin", |bytes| number(bytes, 108, u32::MAX), "volume key of 4294967295 bytes"),
    ours_alone("digest-iterations-0.bin", |bytes| number(bytes, 164, 0), "digest of no iterations"),
    ours_alone("state-0.bin", |bytes| number(bytes, keyslot(0), 0), "state 0x00000000 is neither"),
    ours_alone(
        "state-swapped.bin",
        |bytes| number(bytes, keyslot(7), 0xadde_0000),
        "state 0xadde0000 is neither",
    ),
    ours_alone("state-partition.bin", |bytes| number(bytes, keyslot(6), 0x80), "state 0x00000080 is neither"),
    ours_alone("iterations-0.bin", |bytes| number(bytes, keyslot(0) + 4, 0), "in use with no iterations"),
    bad("stripes-0.bin", |bytes| number(bytes, keyslot(3) + 44, 0), "0 stripes: it must be 4000"),
    bad("stripes-3999.bin", |bytes| number(bytes, keyslot(0) + 44, 3999), "3999 stripes: it must be 4000"),
    bad("stripes-max.bin", |bytes| number(bytes, keyslot(7) + 44, u32::MAX), "4294967295 stripes"),
    bad("material-at-0.bin", |bytes| number(bytes, keyslot(0) + 40, 0), "material at sector 0"),
    bad("material-at-1.bin", |bytes| number(bytes, keyslot(3) + 40, 1), "material at sector 1"),
    bad("material-shared.bin", |bytes| number(bytes, keyslot(3) + 40, 1016), "overlaps that of keyslot 2"),
    bad("material-overlaps.bin", |bytes| number(bytes, keyslot(3) + 40, 1515), "overlaps that of keyslot 2"),
    bad(
        "material-in-payload.bin",
        |bytes| number(bytes, keyslot(7) + 40, 4096 - 499),
        "reaches into the data",
    ),
    bad("material-behind-payload.bin", |bytes| number(bytes, keyslot(7) + 40, 9000), "reaches into the data"),
    bad("material-max.bin", |bytes| number(bytes, keyslot(7) + 40, u32::MAX), "reaches into the data"),
    bad(
        "detached-material-shared.bin",
        |bytes| {
            number(bytes, 104, 0);
            number(bytes, keyslot(7) + 40, 3032);
        },
        "overlaps that of keyslot 6",
    ),
    bad(
        "detached-material-max.bin",
        |bytes| {
            number(bytes, 104, 0);
            number(bytes, keyslot(7) + 40, u32::MAX);
        },
        "none lies beyond 131072",
    ),
];

/// What is odd and valid: what is changed, and whether cryptsetup and QEMU accept it too.
type Odd = (&'static str, fn(&mut Bytes), bool, bool);

const ODD: [Odd; 13] = [
    (
        "an unknown hash is for whoever derives keys to refuse",
        |bytes| put(bytes, 72, b"nohash\0"),
        false,
        false,
    ),
    ("hash in capitals", |bytes| put(bytes, 72, b"SHA256"), true, false),
    ("text behind a NUL", |bytes| put(bytes, 13, b"\xff\x01"), true, true),
    ("no UUID", |bytes| bytes[168..208].fill(0), true, true),
    ("a UUID that is none", |bytes| put(bytes, 168, b"my volume\0"), true, true),
    ("unused keyslot with iterations and salt", |bytes| put(bytes, keyslot(4) + 4, &[7; 36]), true, true),
    (
        "material in another order",
        |bytes| {
            number(bytes, keyslot(1) + 40, 1016);
            number(bytes, keyslot(2) + 40, 512);
        },
        true,
        true,
    ),
    ("material at sector 2", |bytes| number(bytes, keyslot(0) + 40, 2), true, false),
    ("material at sector 7", |bytes| number(bytes, keyslot(0) + 40, 7), true, false),
    ("material without a gap", |bytes| number(bytes, keyslot(3) + 40, 1516), true, false),
    ("payload right behind the material", |bytes| number(bytes, 104, 4036), true, false),
    ("payload where the gap ends", |bytes| number(bytes, 104, 4040), true, true),
    (
        "layout of cryptsetup 1.0",
        |bytes| {
            (0..8_u32).for_each(|index| {
                number(bytes, keyslot(index as usize) + 40, 2 + 501 * index);
            })
        },
        true,
        false,
    ),
];

fn corpus() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/vectors/bad/luks1"))
}

fn changed(change: fn(&mut Bytes)) -> Bytes {
    let mut bytes = sample().to_bytes().to_vec();
    change(&mut bytes);
    bytes
}

/// The table as `expected.txt`.
fn expected() -> String {
    let mut text = String::new();
    for Bad { file, says, .. } in &BAD {
        writeln!(text, "{file}\tinvalid\t{says}").expect("into a string");
    }
    text
}

#[test]
fn the_corpus_is_what_the_table_makes() {
    let dir = corpus();
    if std::env::var_os("WRITE_VECTORS").is_some() {
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).expect("directory");
        for bad in &BAD {
            std::fs::write(dir.join(bad.file), changed(bad.change)).expect("written");
        }
        std::fs::write(dir.join("expected.txt"), expected()).expect("written");
    }
    for bad in &BAD {
        let bytes = std::fs::read(dir.join(bad.file)).unwrap_or_else(|error| panic!("{}: {error}", bad.file));
        assert_eq!(bytes, changed(bad.change), "{}", bad.file);
    }
    assert_eq!(std::fs::read_to_string(dir.join("expected.txt")).expect("index"), expected());
    assert_eq!(std::fs::read_dir(&dir).expect("lists").count(), BAD.len() + 1, "a file nobody expects");
}

#[test]
fn every_bad_header_is_refused_with_its_reason() {
    let index = std::fs::read_to_string(corpus().join("expected.txt")).expect("index");
    for line in index.lines() {
        let [file, kind, fragment] = line.split('\t').collect::<Vec<_>>()[..] else {
            panic!("not three fields: {line}");
        };
        let bytes = std::fs::read(corpus().join(file)).expect("listed files exist");
        let error = Header::parse(&bytes).expect_err(file);
        assert_eq!((error.kind(), kind), (ErrorKind::Invalid, "invalid"), "{file}");
        assert!(error.chain().contains(fragment), "{file}: {}", error.chain());
        // What repair makes of it is valid, or it says that it cannot.
        if let Ok((repaired, actions)) = Header::repaired(&bytes) {
            assert!(!actions.is_empty(), "{file}");
            assert_eq!(Header::parse(&repaired.to_bytes()).expect(file), repaired);
        }
    }
    assert_eq!(index.lines().count(), BAD.len());
}

/// A header on a device with room for its keyslots, so that only the header can be at fault.
fn on_a_device(bytes: &[u8], dir: &Scratch) -> PathBuf {
    let path = dir.file("device", bytes);
    std::fs::File::options().write(true).open(&path).and_then(|file| file.set_len(32 << 20)).expect("room");
    path
}

fn cryptsetup_refuses(bytes: &[u8], dir: &Scratch) -> bool {
    let device = on_a_device(bytes, dir);
    let said = cryptsetup(&["luksDump", "--type", "luks1", name(&device)], b"").expect("installed");
    let is_luks = cryptsetup(&["isLuks", "--type", "luks1", name(&device)], b"").expect("installed").ok;
    assert_eq!(said.ok, is_luks, "its two answers differ: {}", said.text);
    !said.ok
}

#[test]
fn cryptsetup_agrees_but_where_the_tables_say() {
    if !is_installed("cryptsetup") {
        return skip("no cryptsetup");
    }
    let dir = Scratch::new();
    assert!(!cryptsetup_refuses(&sample().to_bytes(), &dir), "the sample itself");
    for bad in &BAD {
        // A file that is short is long on a device: zeros follow it.
        let refuses =
            if bad.file == "short.bin" { true } else { cryptsetup_refuses(&changed(bad.change), &dir) };
        assert_eq!(refuses, bad.cryptsetup_refuses, "{}", bad.file);
    }
    for (what, change, cryptsetup_accepts, _) in ODD {
        let bytes = changed(change);
        let header = Header::parse(&bytes).unwrap_or_else(|error| panic!("{what}: {error:?}"));
        assert_eq!(Header::parse(&header.to_bytes()).expect(what), header);
        assert_eq!(cryptsetup_refuses(&bytes, &dir), !cryptsetup_accepts, "{what}");
    }
}

#[test]
fn qemu_agrees_but_where_the_table_says() {
    if !is_installed("qemu-img") {
        return skip("no qemu-img");
    }
    let dir = Scratch::new();
    for (what, change, _, qemu_accepts) in ODD {
        let bytes = changed(change);
        let device = on_a_device(&bytes, &dir);
        let said = run("qemu-img", &["info", "-f", "luks", name(&device)], b"").expect("installed");
        assert_eq!(said.ok, qemu_accepts, "{what}: {}", said.text);
        let objection = Header::parse(&bytes).expect(what).qemu_objection();
        let unknown_hash = what.starts_with("an unknown hash");
        assert_eq!(objection.is_none(), qemu_accepts || unknown_hash, "{what}: {objection:?} {}", said.text);
    }
}

#[test]
fn whatever_cryptsetup_refuses_we_refuse() {
    if !is_installed("cryptsetup") {
        return skip("no cryptsetup");
    }
    let dir = Scratch::new();
    let mut random = Random::new(seed());
    let geometry: Vec<usize> =
        [104, 108].into_iter().chain((0..8).map(|index| keyslot(index) + 40)).collect();
    let (mut refused, mut accepted) = (0, 0);
    for _ in 0..200 {
        let mut bytes = sample().to_bytes().to_vec();
        for _ in 0..=random.below(2) {
            // Positions around those of the layout, where the two could differ by one.
            let near = [0, 1, 2, 8, 512, 1016, 2024, 3536, 4036, 4040, 4096][random.below(11)];
            let value = u32::try_from((near + random.below(9)).saturating_sub(4)).expect("small");
            if random.below(20) == 0 {
                number(&mut bytes, keyslot(random.below(8)) + 44, value);
            } else {
                number(&mut bytes, geometry[random.below(geometry.len())], value);
            }
        }
        let theirs = cryptsetup_refuses(&bytes, &dir);
        let ours = Header::parse(&bytes);
        if theirs {
            assert!(ours.is_err(), "only cryptsetup refuses {ours:?}");
            refused += 1;
        } else {
            assert!(ours.is_ok(), "only we refuse: {ours:?}");
            accepted += 1;
        }
    }
    assert!(
        refused > 20 && accepted > 5,
        "too one-sided to say anything: {refused} refused, {accepted} accepted"
    );
}
