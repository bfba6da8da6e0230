//! Our reading and writing of LUKS2 headers against cryptsetup's: byte for byte where nothing was changed, and the same choice
//! of copy when one of them is damaged or old.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use engine::error::ErrorKind;
use engine::format::luks2::metadata::{Digest, Segment};
use engine::format::luks2::{Header, Health, edit};
use tests::luks2::{
    QUICK, copies, cryptsetup, cryptsetup_accepts, cryptsetup_does, cryptsetup_dump, dumped, has_cryptsetup,
    head, image, load_bytes, load_file, replace_text, reseal,
};
use tests::{Scratch, skip};

const MIB: u64 = 1 << 20;

/// A place with two passphrases and an image.
struct Bench {
    scratch: Scratch,
    image: PathBuf,
    key: PathBuf,
    other: PathBuf,
}

impl Bench {
    fn new(size: u64) -> Self {
        let scratch = Scratch::new();
        let key = scratch.file("key", b"one passphrase");
        let other = scratch.file("other", b"another passphrase");
        let image = image(&scratch, "image", &[], size);
        Self { scratch, image, key, other }
    }

    fn format(&self, words: &str) {
        let quick = if words.contains("--pbkdf") { String::new() } else { QUICK.join(" ") };
        cryptsetup_does(&["luksFormat -q --type luks2", &quick, words], &[&self.image, &self.key]);
    }

    /// A keyslot command that is opened by the first passphrase.
    fn with_key(&self, words: &str, rest: &[&Path]) {
        let key = format!("--key-file {}", self.key.display());
        cryptsetup_does(&[words, &key], &[&[self.image.as_path()], rest].concat());
    }

    fn add_key(&self, words: &str) {
        self.with_key(&format!("luksAddKey -q {} {words}", QUICK.join(" ")), &[&self.other]);
    }

    fn token(&self, json: &str) {
        let mut child = Command::new("cryptsetup")
            .args(["token", "import", "--json-file", "-"])
            .arg(&self.image)
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("cryptsetup starts");
        std::io::Write::write_all(&mut child.stdin.take().expect("a pipe"), json.as_bytes())
            .expect("written");
        let output = child.wait_with_output().expect("it ends");
        assert!(output.status.success(), "{json}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// What we read and would write is what is there, to the byte.
    fn is_reproduced(&self, what: &str) -> Header {
        let loaded = load_file(&self.image).unwrap_or_else(|error| panic!("{what}: {error:?}"));
        assert_eq!(loaded.health, [Health::Good, Health::Good], "{what}");
        let header = loaded.header;
        let disk = head(&self.image, 2 * header.copy_bytes);
        let text = &disk[4096..usize::try_from(header.copy_bytes).expect("small")];
        let text = String::from_utf8_lossy(text.split(|byte| *byte == 0).next().expect("a text"));
        assert_eq!(header.metadata.to_json().to_string(), text, "{what}");
        assert!(copies(&header) == disk, "{what}: the bytes differ");
        header
    }
}

#[test]
fn headers_cryptsetup_formats_are_reproduced_to_the_byte() {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    let argon = "--pbkdf-force-iterations 4 --pbkdf-memory 32 --pbkdf-parallel 1";
    let mut cases: Vec<String> = [
        "",
        "--sector-size 512",
        "--sector-size 1024",
        "--sector-size 2048",
        "--sector-size 4096",
        "--key-size 256",
        "--cipher aes-cbc-essiv:sha256 --key-size 256",
        "--hash sha512",
        "--hash sha1",
        "--label volume_7 --subsystem tests",
        "--label 00000000000000000000000000000000000000000000000",
        "--uuid 01234567-89ab-cdef-0123-456789abcdef",
        "--key-slot 31",
        "--offset 65536",
        "--luks2-keyslots-size 1m",
        "--luks2-metadata-size 4m --luks2-keyslots-size 8m",
        "--luks2-keyslots-size 128m",
    ]
    .map(String::from)
    .into();
    cases.extend(["argon2i", "argon2id"].map(|kind| format!("--pbkdf {kind} {argon}")));
    cases.extend(
        ["16k", "32k", "64k", "128k", "256k", "512k", "1m", "2m", "4m"]
            .map(|size| format!("--luks2-metadata-size {size}")),
    );
    for case in &cases {
        let bench = Bench::new(160 * MIB);
        bench.format(case);
        bench.is_reproduced(case);
    }
}

#[test]
fn headers_cryptsetup_has_changed_are_reproduced_to_the_byte() {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    let bench = Bench::new(20 * MIB);
    bench.format("");
    let first = bench.is_reproduced("fresh");
    bench.add_key("--key-slot 5");
    bench.is_reproduced("a keyslot out of order");
    bench.add_key("");
    bench.is_reproduced("a keyslot in the gap");
    bench.add_key("--unbound --key-size 256 --key-slot 9");
    let header = bench.is_reproduced("an unbound keyslot");
    assert!(header.metadata.digest_of_keyslot(9).expect("bound to a digest").1.segments.is_empty());
    for (slot, priority) in [(5, "prefer"), (0, "ignore"), (1, "prefer"), (1, "normal")] {
        cryptsetup_does(&[&format!("config --priority {priority} --key-slot {slot}")], &[&bench.image]);
        bench.is_reproduced(priority);
    }
    cryptsetup_does(&["config --label renamed --subsystem other"], &[&bench.image]);
    assert_eq!(bench.is_reproduced("label").label, "renamed");
    for token in [
        r#"{"type":"a","keyslots":["0"],"flags":[],"priority":1,"extra":{"z":null,"a":[1,2.5,-3,true]}}"#,
        r#"{"keyslots":["5","1"],"words":"a/b \"c\" \\ \u00e9\u0001\t€","type":"before"}"#,
        r#"{"big":18446744073709551615,"small":-9223372036854775808,"keyslots":[],"type":"numbers"}"#,
    ] {
        bench.token(token);
        bench.is_reproduced(token);
    }
    cryptsetup_does(&["token add --key-description words --key-slot 0"], &[&bench.image]);
    bench.is_reproduced("keyring token");
    cryptsetup_does(&["token remove --token-id 1"], &[&bench.image]);
    bench.is_reproduced("token removed");
    bench.with_key("luksKillSlot -q", &[Path::new("5")]);
    bench.is_reproduced("keyslot removed");
    bench.with_key(
        "luksConvertKey -q --key-slot 0 --pbkdf argon2i --pbkdf-force-iterations 4 --pbkdf-memory 32",
        &[],
    );
    let last = bench.is_reproduced("keyslot converted");
    assert!(last.seqid > first.seqid + 10, "{} writes", last.seqid - first.seqid);
}

#[test]
fn a_header_on_its_own_and_one_of_a_converted_volume_are_reproduced() {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    let bench = Bench::new(20 * MIB);
    let data = image(&bench.scratch, "data", &[], 20 * MIB);
    let header = image(&bench.scratch, "header", &[], 16 * MIB);
    let quick = QUICK.join(" ");
    let words = format!("luksFormat -q --type luks2 {quick} --header {}", header.display());
    cryptsetup_does(&[&words], &[&data, &bench.key]);
    let detached = Bench { image: header, ..bench };
    let segments = detached.is_reproduced("detached").metadata.segments;
    assert_eq!(segments.values().next().map(|segment| segment.offset), Some(0));

    let bench = Bench::new(20 * MIB);
    let words = format!("luksFormat -q --type luks1 {quick}");
    cryptsetup_does(&[&words, "--pbkdf-force-iterations 1000"], &[&bench.image, &bench.key]);
    cryptsetup_does(&["convert -q --type luks2"], &[&bench.image]);
    let header = bench.is_reproduced("converted from LUKS1");
    // Its digest is as short as SHA-1.
    assert!(header.metadata.digests.values().all(|digest| digest.digest.len() == 20));
}

#[test]
fn headers_in_the_middle_of_a_reencryption_are_reproduced_and_survive_a_write() {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    for words in [
        "--resilience checksum",
        "--resilience checksum --resilience-hash sha512",
        "--resilience journal",
        "--resilience none",
        "--sector-size 512 --cipher aes-cbc-essiv:sha256 --key-size 256",
        "--decrypt",
    ] {
        let bench = Bench::new(24 * MIB);
        bench.format("--sector-size 4096");
        bench.token(r#"{"type":"a","keyslots":["0"]}"#);
        let quick = QUICK.join(" ");
        let words = if words == "--decrypt" {
            format!("{words} --header {}", bench.scratch.join("exported").display())
        } else {
            format!("{quick} {words}")
        };
        let all = format!("reencrypt -q --force-offline-reencrypt --init-only {words}");
        let key = format!("--key-file {}", bench.key.display());
        let output = cryptsetup(&[&all, &key], &[&bench.image]);
        assert!(output.status.success(), "{all}: {}", String::from_utf8_lossy(&output.stderr));
        let exported = bench.scratch.join("exported");
        let bench = if exported.exists() { Bench { image: exported, ..bench } } else { bench };
        let header = bench.is_reproduced(&words);
        assert!(header.metadata.is_reencrypting(), "{words}");
        assert_eq!(header.metadata.unmet_requirements().len(), 1, "{words}");

        // A change of something else leaves all of it where it is, and cryptsetup still knows its way.
        let mut changed = header.clone();
        changed.seqid += 1;
        changed.label = String::from("changed");
        std::fs::OpenOptions::new()
            .write(true)
            .open(&bench.image)
            .and_then(|file| std::os::unix::fs::FileExt::write_all_at(&file, &copies(&changed), 0))
            .expect("written");
        assert_eq!(
            bench.is_reproduced(&words).metadata.to_json().to_string(),
            header.metadata.to_json().to_string()
        );
        let dump = cryptsetup_dump(&bench.scratch, &bench.image).expect("accepted");
        assert_eq!(dumped(&dump, "Label"), Some("changed"), "{words}");
        assert!(dump.contains("reencrypt"), "{words}: {dump}");
    }
}

#[test]
fn a_header_of_ours_is_accepted_whatever_its_size_and_checksum() {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    let scratch = Scratch::new();
    for (copy_bytes, checksum) in
        [(edit::COPY_BYTES_DEFAULT, "sha256"), (64 << 10, "sha512"), (4 << 20, "sha1"), (128 << 10, "sha384")]
    {
        let segment = Segment::crypt(16 * MIB, None, "aes-xts-plain64", 4096);
        let uuid = String::from("01234567-89ab-cdef-0123-456789abcdef");
        let keyslots = 16 * MIB - 2 * copy_bytes;
        let mut header = Header::new(copy_bytes, keyslots, segment, uuid, [[1; 64], [2; 64]]).expect("legal");
        header.checksum_alg = checksum.into();
        header.label = String::from("ours");
        let digest = Digest::pbkdf2("sha256", 1000, vec![1; 32], vec![2; 32]);
        header.metadata.add_digest(digest, &[], &[0]).expect("room");
        let path = image(&scratch, "ours", &copies(&header), 20 * MIB);
        let dump = cryptsetup_dump(&scratch, &path).expect("accepted");
        assert_eq!(dumped(&dump, "Label"), Some("ours"));
        assert_eq!(dumped(&dump, "Epoch"), Some("1"));
        assert_eq!(load_file(&path).expect("valid").header, header);
    }
}

/// Both states of a header: an older and a newer, with the image they are of.
fn old_and_new(bench: &Bench, words: &str) -> (Vec<u8>, Vec<u8>) {
    bench.format(&format!("{words} --label old"));
    let size = load_file(&bench.image).expect("valid").header.copy_bytes;
    let old = head(&bench.image, 2 * size);
    cryptsetup_does(&["config --label new"], &[&bench.image]);
    (old, head(&bench.image, 2 * size))
}

/// What is done to the two copies, given the older ones, and what becomes of them.
type Damage = (&'static str, fn(&mut [u8], &mut [u8], &[u8]), Option<&'static str>);

const COPY: usize = 16 << 10;

fn set_label(copy: &mut [u8], label: &[u8; 3]) {
    copy[24..27].copy_from_slice(label);
    reseal(copy);
}

const DAMAGES: [Damage; 22] = [
    ("nothing", |_, _, _| {}, Some("new")),
    ("primary JSON torn", |one, _, _| one[5000] ^= 1, Some("new")),
    ("primary salt torn", |one, _, _| one[110] ^= 1, Some("new")),
    ("primary checksum torn", |one, _, _| one[448] ^= 1, Some("new")),
    ("primary padding torn", |one, _, _| one[4000] ^= 1, Some("new")),
    ("primary wiped", |one, _, _| one.fill(0), Some("new")),
    ("primary magic wiped", |one, _, _| one[..6].fill(0), Some("new")),
    ("secondary JSON torn", |_, two, _| two[COPY - 1] ^= 1, Some("new")),
    ("secondary wiped", |_, two, _| two.fill(0), Some("new")),
    (
        "both wiped",
        |one, two, _| {
            one.fill(0);
            two.fill(0);
        },
        None,
    ),
    (
        "both torn",
        |one, two, _| {
            one[5000] ^= 1;
            two[5000] ^= 1;
        },
        None,
    ),
    ("secondary older", |_, two, old| two.copy_from_slice(&old[COPY..]), Some("new")),
    ("primary older", |one, _, old| one.copy_from_slice(&old[..COPY]), Some("new")),
    (
        "primary older, secondary torn",
        |one, two, old| {
            one.copy_from_slice(&old[..COPY]);
            two[5000] ^= 1;
        },
        Some("old"),
    ),
    (
        "secondary older, primary torn",
        |one, two, old| {
            two.copy_from_slice(&old[COPY..]);
            one[5000] ^= 1;
        },
        Some("old"),
    ),
    (
        "primary says it is elsewhere",
        |one, _, _| {
            one[263] = 1;
            reseal(one);
        },
        Some("new"),
    ),
    (
        "secondary says it is elsewhere",
        |_, two, _| {
            two[256..264].fill(0);
            reseal(two);
        },
        Some("new"),
    ),
    (
        "primary of another version",
        |one, _, _| {
            one[7] = 3;
            reseal(one);
        },
        None,
    ),
    ("primary metadata is not valid", |one, _, _| replace_text(one, b"{}"), Some("new")),
    (
        "both metadata are not valid",
        |one, two, _| {
            replace_text(one, b"{}");
            replace_text(two, b"{}");
        },
        None,
    ),
    ("equal seqid, other label in the secondary", |_, two, _| set_label(two, b"two"), Some("new")),
    ("equal seqid, other label in the primary", |one, _, _| set_label(one, b"one"), Some("one")),
];

#[test]
fn of_two_copies_the_one_cryptsetup_takes_is_taken() {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    let bench = Bench::new(20 * MIB);
    let (old, new) = old_and_new(&bench, "");
    for (name, damage, expected) in DAMAGES {
        let mut bytes = new.clone();
        let (one, two) = bytes.split_at_mut(COPY);
        damage(one, two, &old);
        let path = image(&bench.scratch, "damaged", &bytes, 20 * MIB);
        let theirs = cryptsetup_dump(&bench.scratch, &path);
        let theirs = theirs.as_deref().map(|dump| {
            (
                dumped(dump, "Label").expect("a label").to_owned(),
                dumped(dump, "Epoch").expect("a seqid").to_owned(),
            )
        });
        let ours = load_file(&path);
        if let Err(error) = &ours {
            assert_eq!(error.kind(), ErrorKind::Invalid, "{name}: {error:?}");
        }
        let ours = ours.ok().map(|loaded| (loaded.header.label, loaded.header.seqid.to_string()));
        assert_eq!(ours, theirs, "{name}");
        assert_eq!(ours.map(|(label, _)| label).as_deref(), expected, "{name}");
    }
}

#[test]
fn health_says_which_copy_is_wrong_and_why() {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    let bench = Bench::new(20 * MIB);
    let (old, new) = old_and_new(&bench, "");
    let health = |name: &str| {
        let (_, damage, _) = DAMAGES.iter().find(|(known, ..)| *known == name).expect("in the table");
        let mut bytes = new.clone();
        let (one, two) = bytes.split_at_mut(COPY);
        damage(one, two, &old);
        bytes.resize(20 << 20, 0);
        load_bytes(&bytes).expect("one copy is good").health
    };
    let damaged = |why: &str| Health::Damaged(why.into());
    assert_eq!(health("nothing"), [Health::Good, Health::Good]);
    assert_eq!(health("primary older"), [Health::Obsolete, Health::Good]);
    assert_eq!(health("secondary older"), [Health::Good, Health::Obsolete]);
    assert_eq!(health("primary JSON torn"), [damaged("checksum does not match"), Health::Good]);
    assert_eq!(health("primary wiped"), [damaged("no LUKS2 magic"), Health::Good]);
    assert_eq!(health("secondary wiped"), [Health::Good, damaged("no LUKS2 magic")]);
    assert_eq!(
        health("primary metadata is not valid"),
        [damaged("field keyslots is missing: LUKS2 metadata"), Health::Good]
    );
    assert_eq!(
        health("equal seqid, other label in the secondary"),
        [Health::Good, damaged("it differs from the primary, whose seqid is the same")]
    );
}

#[test]
fn a_secondary_is_found_at_each_of_its_nine_places() {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    for size in ["16k", "32k", "64k", "128k", "256k", "512k", "1m", "2m", "4m"] {
        let bench = Bench::new(20 * MIB);
        bench.format(&format!("--luks2-metadata-size {size} --label found"));
        let bytes = load_file(&bench.image).expect("valid").header.copy_bytes;
        let mut disk = head(&bench.image, 2 * bytes);
        disk[..4096].fill(0);
        let path = image(&bench.scratch, "wiped", &disk, 20 * MIB);
        let loaded = load_file(&path).expect("the secondary");
        assert_eq!((loaded.header.copy_bytes, loaded.header.label.as_str()), (bytes, "found"), "{size}");
        assert!(cryptsetup_accepts(&bench.scratch, &path), "{size}");
    }
}

#[test]
fn a_device_that_ends_inside_its_header_is_refused() {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    let bench = Bench::new(20 * MIB);
    bench.format("");
    let disk = head(&bench.image, 32 << 10);
    for (size, primary_only) in
        [(0, false), (512, false), (4096, false), (8192, false), (COPY, true), (20 << 10, true)]
            .into_iter()
            .chain([(32 << 10, true), (16 << 20, false)].map(|(size, _)| (size, false)))
    {
        let path = image(&bench.scratch, "short", &disk[..size.min(disk.len())], size as u64);
        let ours = load_file(&path);
        assert_eq!(ours.is_ok(), cryptsetup_accepts(&bench.scratch, &path), "{size}");
        assert_eq!(ours.is_ok(), size == 16 << 20, "{size}");
        if primary_only {
            let error = ours.expect_err("refused");
            assert!(error.chain().contains("device ends before its keyslots area does"), "{error:?}");
        }
    }
}

#[test]
fn a_luks1_header_is_not_passed_over_for_what_lies_behind_it() {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    let bench = Bench::new(20 * MIB);
    bench.format("");
    let mut disk = head(&bench.image, 32 << 10);
    disk[7] = 1;
    disk.resize(20 << 20, 0);
    let error = load_bytes(&disk).expect_err("LUKS1");
    assert!(error.chain().contains("LUKS version 1"), "{error:?}");
}
