//! Headers that are wrong, one file per way of being wrong (`vectors/bad`): each is refused for its reason, and nothing that
//! cryptsetup refuses is accepted. Then headers wrong at random.
//!
//! A file of `bad/luks2` says what is done to both copies of the valid header `valid.json`, line by line:
//!
//! | line | does |
//! |---|---|
//! | `# …` | says what is wrong |
//! | `set /a/b JSON`, `remove /a/b` | changes the metadata |
//! | `nest N` | puts N arrays inside one another into it |
//! | `text T` | is the text, whatever the metadata |
//! | `replace A => B` | changes the text (`_` at the beginning of B: a space; `\xff`: that byte) |
//! | `after-text N HEX` | bytes N after the end of the text |
//! | `at N HEX` | bytes at N of the copy |
//! | `fill HEX` | all of the JSON area after the text |
//! | `binary N HEX`, `primary …`, `secondary …` | bytes of the binary headers |
//! | `unsealed N HEX` | bytes changed after the checksum |
//! | `size N` | length of the device |

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use engine::error::ErrorKind;
use engine::format::luks2::metadata::Metadata;
use engine::format::luks2::{Copy, Header, Loaded};
use serde_json::{Map, Value};
use tests::luks2::{
    copies, cryptsetup_accepts, has_cryptsetup, image, load_bytes, load_file, replace_text, reseal,
};
use tests::{Random, Scratch, skip};

const COPY: usize = 16 << 10;
const DEVICE: u64 = 16 << 20;

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("vectors/bad/luks2")
}

fn valid_text() -> String {
    std::fs::read_to_string(corpus().join("valid.json")).expect("the valid header")
}

/// Both copies around a text, checksums right.
fn around(text: &str) -> Vec<u8> {
    let metadata = Metadata::parse(text.as_bytes()).expect("valid");
    let header = Header {
        copy_bytes: COPY as u64,
        seqid: 3,
        label: String::new(),
        checksum_alg: String::from("sha256"),
        uuid: String::from("01234567-89ab-cdef-0123-456789abcdef"),
        subsystem: String::new(),
        salts: [[0x5a; 64], [0xa5; 64]],
        metadata,
    };
    copies(&header)
}

fn hex(text: &str) -> Vec<u8> {
    let digits = text.as_bytes().chunks(2);
    digits.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).expect("hex"), 16).expect("hex")).collect()
}

/// The object or array that holds what a pointer points at, and its key there.
fn parent<'a, 'b>(value: &'a mut Value, pointer: &'b str) -> (&'a mut Map<String, Value>, &'b str) {
    let (parent, key) = pointer.rsplit_once('/').expect("a pointer");
    (value.pointer_mut(parent).and_then(Value::as_object_mut).expect("an object"), key)
}

/// A device with what a file says.
struct Case {
    bytes: Vec<u8>,
    size: u64,
}

fn build(script: &str) -> Case {
    let mut metadata: Value = serde_json::from_str(&valid_text()).expect("JSON");
    let mut text = None;
    let mut size = DEVICE;
    let edit = |bytes: &mut [u8], words: &str| {
        let (at, digits) = words.split_once(' ').expect("place and bytes");
        let (at, new) = (at.parse::<usize>().expect("a place"), hex(digits));
        bytes[at..at + new.len()].copy_from_slice(&new);
    };
    let lines = || {
        script
            .lines()
            .filter(|line| !line.starts_with('#'))
            .map(|line| line.split_once(' ').unwrap_or((line, "")))
    };
    for (verb, words) in lines() {
        match verb {
            "set" => {
                let (pointer, json) = words.split_once(' ').expect("a value");
                let (object, key) = parent(&mut metadata, pointer);
                object.insert(key.to_owned(), serde_json::from_str(json).expect("JSON"));
            }
            "remove" => {
                let (object, key) = parent(&mut metadata, words);
                object.shift_remove(key).expect("it is there");
            }
            _ => {}
        }
    }
    for (verb, words) in lines() {
        let now = text.take().unwrap_or_else(|| metadata.to_string().into_bytes());
        text = Some(match verb {
            "text" => words.as_bytes().to_vec(),
            "nest" => {
                let depth = words.parse().expect("a number");
                let nested = format!("\"text\":{}{}", "[".repeat(depth), "]".repeat(depth));
                let now = String::from_utf8(now).expect("text");
                now.replacen("\"text\":\"unknown to all\"", &nested, 1).into_bytes()
            }
            "replace" => {
                let (from, to) = words.split_once(" => ").expect("two texts");
                let to = to.strip_prefix('_').map_or_else(|| to.to_owned(), |rest| format!(" {rest}"));
                let now = String::from_utf8(now).expect("text");
                assert!(now.contains(from), "{from} is not there");
                let now = now.replacen(from, &to, 1);
                match now.split_once("\\xff") {
                    Some((before, after)) => [before.as_bytes(), &[0xff], after.as_bytes()].concat(),
                    None => now.into_bytes(),
                }
            }
            _ => now,
        });
    }
    let text = text.unwrap_or_else(|| metadata.to_string().into_bytes());
    let mut bytes = around(&valid_text());
    for (index, copy) in bytes.chunks_mut(COPY).enumerate() {
        replace_text(copy, &text);
        for (verb, words) in lines() {
            match verb {
                "after-text" => edit(&mut copy[4096 + text.len()..], words),
                "at" | "binary" => edit(copy, words),
                "fill" => copy[4096 + text.len()..].fill(hex(words)[0]),
                "primary" if index == 0 => edit(copy, words),
                "secondary" if index == 1 => edit(copy, words),
                "size" => size = words.parse().expect("a number"),
                _ => {}
            }
        }
        reseal(copy);
        for (_, words) in lines().filter(|(verb, _)| *verb == "unsealed") {
            edit(copy, words);
        }
    }
    Case { bytes, size }
}

impl Case {
    fn image(&self, scratch: &Scratch) -> PathBuf {
        let kept = usize::try_from(self.size).map_or(self.bytes.len(), |size| size.min(self.bytes.len()));
        image(scratch, "case", &self.bytes[..kept], self.size)
    }
}

/// `file`, kind, fragment of the message.
fn expected() -> Vec<(String, String, String)> {
    let table = std::fs::read_to_string(corpus().join("expected.txt")).expect("the table");
    let row = |line: &str| {
        let mut fields = line.split('\t').map(str::to_owned);
        let mut field = || fields.next().unwrap_or_else(|| panic!("three fields: {line}"));
        (field(), field(), field())
    };
    table.lines().map(row).collect()
}

/// A field of the wrong type that cryptsetup reads only when it uses the object, and trips over then.
const FIELD: &str = "a field's type is checked when it is read";
const SYNTAX: &str = "JSON only, not json-c's extensions of it";
const TWICE: &str = "which of the two is meant cannot be known; json-c takes the last";
const MATERIAL: &str =
    "the material is 4000 stripes whatever the field says, and would reach into its neighbour";
const DIGITS: &str = "one number has one spelling";
const KDF: &str = "cryptsetup drops fields it does not know, and never opens a keyslot of an unknown kind";
const TEXT: &str = "cryptsetup cuts it and writes another text back";
const NEWER: &str = "cryptsetup 2.7 and later refuse it, too";
const UNIT: &str = "dm-crypt has no such data unit";
const OVERFLOW: &str =
    "no device is so large; cryptsetup looks at overflow only where there are two segments";

const AREA: &str =
    "cryptsetup asks no more once a segment is at 0; new keyslots would be written over its data";

/// Refused by us and not by cryptsetup 2.6, and why.
const STRICTER: [(&str, &str); 35] = [
    ("digest-digest-missing", FIELD),
    ("digest-hash-missing", FIELD),
    ("digest-iterations-missing", FIELD),
    ("digest-iterations-text", FIELD),
    ("digest-salt-missing", FIELD),
    ("digest-salt-not-base64", FIELD),
    ("digest-value-not-base64", FIELD),
    ("json-comment", SYNTAX),
    ("json-duplicate-key", TWICE),
    ("json-duplicate-keyslot", TWICE),
    ("json-duplicate-section", TWICE),
    ("json-not-utf8", SYNTAX),
    ("json-single-quotes", SYNTAX),
    ("keyslot-af-stripes-few", MATERIAL),
    ("keyslot-area-offset-padded", DIGITS),
    ("keyslot-area-small", MATERIAL),
    ("keyslot-kdf-extra-field", KDF),
    ("keyslot-kdf-iterations-negative", FIELD),
    ("keyslot-kdf-salt-not-base64", FIELD),
    ("keyslot-kdf-salt-unpadded", FIELD),
    ("keyslot-kdf-type-unknown", KDF),
    ("keyslot-key-larger-than-area", MATERIAL),
    ("keyslot-key-size-zero", MATERIAL),
    ("keyslot-priority-high", FIELD),
    ("keyslot-priority-text", FIELD),
    ("label-endless", TEXT),
    ("label-not-utf8", TEXT),
    ("reencrypt-area-type", FIELD),
    ("segment-after-gap-in-keyslots", AREA),
    ("segment-continued-in-keyslots", AREA),
    ("segment-encryption-nul", TEXT),
    ("segment-opal-dynamic", NEWER),
    ("segment-sector-size-large", UNIT),
    ("segment-size-overflow", OVERFLOW),
    ("uuid-endless", TEXT),
];

#[test]
fn the_valid_header_is_valid() {
    let scratch = Scratch::new();
    let case = build("");
    let path = case.image(&scratch);
    assert_eq!(load_file(&path).expect("valid").header.metadata.to_json().to_string(), valid_text());
    if has_cryptsetup() {
        assert!(cryptsetup_accepts(&scratch, &path));
    }
}

#[test]
fn every_bad_luks2_header_is_refused_for_its_reason() {
    let scratch = Scratch::new();
    let table = expected();
    let files: BTreeSet<String> = std::fs::read_dir(corpus())
        .expect("the corpus")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"))
        .filter(|name| !["valid.json", "expected.txt"].contains(&name.as_str()))
        .collect();
    let listed: BTreeSet<String> = table.iter().map(|(file, ..)| file.clone()).collect();
    assert_eq!(files, listed, "files and table");
    let mut wrong = Vec::new();
    for (file, kind, fragment) in &table {
        let script = std::fs::read_to_string(corpus().join(file)).expect("a case");
        let path = build(&script).image(&scratch);
        match load_file(&path) {
            Ok(_) => wrong.push(format!("{file}: accepted")),
            Err(error) => {
                let found = serde_json::to_value(error.kind()).expect("JSON");
                if found != kind.as_str() || !error.chain().contains(fragment) {
                    wrong.push(format!("{file}: {kind}, {fragment:?}, but it is {error:?}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn where_we_are_stricter_than_cryptsetup_is_written_down() {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    let scratch = Scratch::new();
    let stricter: BTreeSet<String> = expected()
        .into_iter()
        .map(|(file, ..)| file)
        .filter(|file| {
            let script = std::fs::read_to_string(corpus().join(file)).expect("a case");
            cryptsetup_accepts(&scratch, &build(&script).image(&scratch))
        })
        .collect();
    let known: BTreeSet<String> = STRICTER.iter().map(|(file, _)| (*file).to_owned()).collect();
    assert_eq!(stricter, known);
}

/// Odd, and valid all the same: nobody may lose a volume to them.
const ODD: [&str; 12] = [
    "set /keyslots/0/kdf/time 4",
    "set /keyslots/1/kdf/hash \"sha256\"",
    "set /config/requirements {\"mandatory\":[\"from-the-future\"],\"optional\":1}",
    "set /config/requirements {}",
    "set /config/flags [\"no-such-flag\"]",
    "set /keyslots/2 {\"type\":\"other\",\"key_size\":7,\"area\":{\"type\":\"x\",\"offset\":\"1048576\",\"size\":\"1\"},\"z\":{}}",
    "set /digests/1 {\"type\":\"other\",\"keyslots\":[],\"segments\":[\"0\"]}",
    "set /segments/0/size \"4096\"\nset /segments/1 {\"type\":\"other\",\"offset\":\"33554432\",\"size\":\"dynamic\",\"x\":[]}",
    "set /tokens/1 {\"keyslots\":[\"1\",\"0\",\"0\"],\"type\":\"luks2-keyring\"}",
    "set /future {\"a\":[1]}",
    "set /keyslots/0/priority 1",
    "set /segments/0/flags []",
];

#[test]
fn values_lie_as_deep_in_one_another_as_in_cryptsetup() {
    let scratch = Scratch::new();
    // In a token they begin at the fourth level.
    for (arrays, inner, valid) in
        [(28, "", true), (28, "0", true), (29, "", true), (29, "0", false), (30, "", false), (30, "0", false)]
    {
        let nested = format!("{}{inner}{}", "[".repeat(arrays), "]".repeat(arrays));
        let path = build(&format!("replace \"unknown to all\" => {nested}")).image(&scratch);
        assert_eq!(load_file(&path).is_ok(), valid, "{arrays} {inner}");
        if has_cryptsetup() {
            assert_eq!(cryptsetup_accepts(&scratch, &path), valid, "cryptsetup: {arrays} {inner}");
        } else {
            skip("no cryptsetup to compare with");
        }
    }
}

#[test]
fn a_header_whose_numbers_would_change_is_read_and_not_written() {
    let scratch = Scratch::new();
    for (number, kept) in [
        ("1.5", true),
        ("18446744073709551615", true),
        ("1.10", false),
        ("1E2", false),
        ("123456789012345678901", false),
    ] {
        let path = build(&format!("replace \"unknown to all\" => {{\"a\":[{number}]}}")).image(&scratch);
        let mut header = load_file(&path).expect("valid").header;
        let written = header.to_bytes(Copy::Primary);
        assert_eq!(written.is_ok(), kept, "{number}");
        if let Err(error) = written {
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{number}");
            assert!(error.to_failure().hint.is_some_and(|hint| hint.contains("token 0")), "{number}");
        }
        // Without the token there is nothing to alter.
        header.metadata.tokens.remove(&0).expect("it was there");
        assert!(header.to_bytes(Copy::Primary).is_ok(), "{number}");
        // Elsewhere nothing takes it away.
        let path = build(&format!("set /other 0\nreplace \"other\":0 => \"other\":{number}")).image(&scratch);
        let header = load_file(&path).expect("valid").header;
        assert_eq!(header.to_bytes(Copy::Secondary).is_ok(), kept, "{number}");
    }
}

#[test]
fn a_header_that_could_not_be_read_again_is_not_made() {
    let mut header = load_bytes(&{
        let mut bytes = around(&valid_text());
        bytes.resize(usize::try_from(DEVICE).expect("small"), 0);
        bytes
    })
    .expect("valid")
    .header;
    let deep = (0..40).fold(Value::from(0), |inner, _| Value::Array(vec![inner]));
    header.metadata.tokens.get_mut(&0).expect("a token").extra.insert("text".into(), deep);
    let error = header.to_bytes(Copy::Primary).expect_err("refused");
    assert!(error.chain().contains("32 values inside one another"), "{}", error.chain());
}

#[test]
fn odd_headers_that_are_valid_are_accepted_and_kept() {
    let scratch = Scratch::new();
    for script in ODD {
        let path = build(script).image(&scratch);
        let loaded = load_file(&path).unwrap_or_else(|error| panic!("{script}: {error:?}"));
        if !script.contains("/kdf/") {
            let mut metadata: Value = serde_json::from_str(&valid_text()).expect("JSON");
            for line in script.lines() {
                let (pointer, json) =
                    line.strip_prefix("set ").and_then(|words| words.split_once(' ')).expect("set");
                let (object, key) = parent(&mut metadata, pointer);
                object.insert(key.to_owned(), serde_json::from_str(json).expect("JSON"));
            }
            assert_eq!(loaded.header.metadata.to_json().to_string(), metadata.to_string(), "{script}");
        }
        if has_cryptsetup() {
            assert!(cryptsetup_accepts(&scratch, &path), "{script}");
        }
    }
}

/// As cryptsetup writes it, killed in the first MiBs of a volume with a detached header.
const DETACHED: &str = r#"set /keyslots/2 {"type":"reencrypt","key_size":1,"mode":"reencrypt","direction":"forward","area":{"type":"checksum","offset":"1048576","size":"4096","hash":"sha256","sector_size":512}}
set /config/requirements {"mandatory":["online-reencrypt-v2"]}
set /segments/0/offset "0"
set /segments/0/size "1048576"
set /segments/1 {"type":"crypt","offset":"1048576","size":"dynamic","iv_tweak":"2048","encryption":"aes-xts-plain64","sector_size":4096}
set /segments/2 {"type":"crypt","offset":"0","size":"dynamic","iv_tweak":"0","encryption":"aes-xts-plain64","sector_size":4096,"flags":["backup-previous"]}
set /segments/3 {"type":"crypt","offset":"0","size":"dynamic","iv_tweak":"0","encryption":"aes-xts-plain64","sector_size":4096,"flags":["backup-final"]}
set /digests/0/segments ["0","1","2","3"]"#;

#[test]
fn a_detached_header_in_the_middle_of_a_reencryption_is_accepted() {
    let scratch = Scratch::new();
    let path = build(DETACHED).image(&scratch);
    load_file(&path).expect("valid");
    if has_cryptsetup() {
        assert!(cryptsetup_accepts(&scratch, &path));
    }
}

/// Every value of a JSON tree by its path of child numbers.
fn paths(value: &Value, here: &mut Vec<usize>, all: &mut Vec<Vec<usize>>) {
    all.push(here.clone());
    let children: Vec<&Value> = match value {
        Value::Object(object) => object.values().collect(),
        Value::Array(values) => values.iter().collect(),
        _ => Vec::new(),
    };
    for (index, child) in children.into_iter().enumerate() {
        here.push(index);
        paths(child, here, all);
        here.pop();
    }
}

fn at<'a>(value: &'a mut Value, path: &[usize]) -> &'a mut Value {
    path.iter().fold(value, |value, index| match value {
        Value::Object(object) => object.values_mut().nth(*index).expect("a child"),
        Value::Array(values) => &mut values[*index],
        other => panic!("{other} has no child"),
    })
}

/// Values that are wrong somewhere, or right elsewhere.
const STRANGE: [&str; 30] = [
    "null",
    "true",
    "0",
    "1",
    "-1",
    "511",
    "512",
    "4096",
    "4294967296",
    "18446744073709551615",
    "1e300",
    "0.5",
    "\"\"",
    "\"0\"",
    "\"1\"",
    "\"9\"",
    "\"512\"",
    "\"4096\"",
    "\"32768\"",
    "\"16777216\"",
    "\"18446744073709551615\"",
    "\"dynamic\"",
    "\"linear\"",
    "\"reencrypt\"",
    "\"in-reencryption\"",
    "\"backup-final\"",
    "[]",
    "[\"0\"]",
    "[\"backup-final\"]",
    "{}",
];

/// One random change to the metadata.
fn mutate(metadata: &mut Value, random: &mut Random) {
    let mut all = Vec::new();
    paths(metadata, &mut Vec::new(), &mut all);
    let path = all[random.below(all.len())].clone();
    let other = all[random.below(all.len())].clone();
    let strange: Value = serde_json::from_str(STRANGE[random.below(STRANGE.len())]).expect("JSON");
    let copy = at(metadata, &other).clone();
    let number = random.below(34).to_string();
    let choice = random.below(6);
    let target = at(metadata, &path);
    match (choice, target) {
        (0, Value::Object(object)) if !object.is_empty() => {
            let key = object.keys().nth(random.below(object.len())).expect("a key").clone();
            object.shift_remove(&key);
        }
        (1, Value::Object(object)) => drop(object.insert(number, copy)),
        (1, Value::Array(values)) => values.push(strange),
        (2, Value::String(text)) => {
            if let Ok(value) = text.parse::<u64>() {
                let step = [1, 256, 512, 4096, 258_048, 1 << 24][random.below(6)];
                let new =
                    if random.below(2) == 0 { value.wrapping_add(step) } else { value.wrapping_sub(step) };
                *text = new.to_string();
            } else {
                text.push('x');
            }
        }
        (3, target) => *target = copy,
        (_, target) => *target = strange,
    }
}

/// What parses can be written, and parses to the same again.
fn survives_a_round(loaded: &Loaded) {
    let bytes = copies(&loaded.header);
    let mut device = bytes.clone();
    device.resize(usize::try_from(loaded.header.backup_bytes()).expect("small"), 0);
    let again = load_bytes(&device).expect("what was written is valid");
    // A digest of nothing is not written.
    let mut kept = loaded.header.clone();
    kept.metadata.digests.retain(|_, digest| !digest.is_unused());
    assert_eq!(again.header, kept);
    assert_eq!(copies(&again.header), bytes);
}

#[test]
fn mutated_metadata_never_panics_and_what_parses_survives_a_round() {
    let seed = tests::seed();
    let mut random = Random::new(seed);
    let valid = [metadata_of(""), metadata_of(&reencrypting())];
    let mut parsed = 0;
    for round in 0..20_000 {
        let mut metadata = valid[random.below(2)].clone();
        for _ in 0..=random.below(3) {
            mutate(&mut metadata, &mut random);
        }
        let text = metadata.to_string();
        let Ok(metadata) = Metadata::parse(text.as_bytes()) else { continue };
        parsed += 1;
        let written = metadata.to_json().to_string();
        let mut again =
            Metadata::parse(written.as_bytes()).unwrap_or_else(|error| panic!("{round}: {error:?}: {text}"));
        assert_eq!(again.to_json().to_string(), written, "{round}");
        again.digests.retain(|_, digest| !digest.is_unused());
        let mut kept = metadata;
        kept.digests.retain(|_, digest| !digest.is_unused());
        assert_eq!(again, kept, "{round}: {text}");
    }
    // Too few of either would test nothing.
    assert!((200..19_000).contains(&parsed), "{parsed} of 20000 parsed");
}

/// The script of a header in the middle of a re-encryption.
fn reencrypting() -> String {
    std::fs::read_to_string(corpus().join("reencrypt-mode"))
        .expect("a case")
        .lines()
        .filter(|line| !line.contains("\"x\""))
        .fold(String::new(), |script, line| script + line + "\n")
}

fn metadata_of(script: &str) -> Value {
    let case = build(script);
    let text = case.bytes[4096..COPY].split(|byte| *byte == 0).next().expect("a text");
    serde_json::from_slice(text).expect("JSON")
}

#[test]
fn mutated_bytes_never_panic() {
    let mut random = Random::new(tests::seed());
    let good = build("").bytes;
    let mut device = vec![0; usize::try_from(DEVICE).expect("small")];
    for _ in 0..2_000 {
        let mut bytes = good.clone();
        for _ in 0..=random.below(4) {
            // Mostly where the fields are.
            let end = if random.below(4) == 0 { bytes.len() } else { 512 };
            let at = random.below(end) + COPY * random.below(2) * usize::from(end == 512);
            bytes[at] = random.next_u64().to_le_bytes()[0];
        }
        if random.below(4) != 0 {
            bytes.chunks_mut(COPY).for_each(reseal);
        }
        device[..bytes.len()].copy_from_slice(&bytes);
        if let Ok(loaded) = load_bytes(&device) {
            survives_a_round(&loaded);
        }
    }
}

#[test]
fn what_cryptsetup_refuses_of_mutated_metadata_is_refused() {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    let scratch = Scratch::new();
    let mut random = Random::new(tests::seed());
    let valid = [metadata_of(""), metadata_of(&reencrypting())];
    let mut asked = 0;
    // Only what we accept needs to be asked about.
    for round in 0..4_000 {
        let mut metadata = valid[random.below(2)].clone();
        for _ in 0..=random.below(2) {
            mutate(&mut metadata, &mut random);
        }
        let text = metadata.to_string();
        if Metadata::parse(text.as_bytes()).is_err() {
            continue;
        }
        let mut bytes = build("").bytes;
        bytes.chunks_mut(COPY).for_each(|copy| replace_text(copy, text.as_bytes()));
        let path = image(&scratch, "mutated", &bytes, DEVICE);
        let Ok(loaded) = load_file(&path) else { continue };
        survives_a_round(&loaded);
        assert!(cryptsetup_accepts(&scratch, &path), "{round}: cryptsetup refuses {text}");
        asked += 1;
        if asked == 100 {
            break;
        }
    }
    assert!(asked > 50, "only {asked} were valid");
}

#[test]
fn a_copy_that_does_not_fit_is_refused_before_it_is_written() {
    let mut header = load_bytes(&{
        let mut device = build("").bytes;
        device.resize(usize::try_from(DEVICE).expect("small"), 0);
        device
    })
    .expect("valid")
    .header;
    let free = 12_288 - 1 - valid_text().len();
    for (more, fits) in [(free, true), (free + 1, false)] {
        let text = "x".repeat("unknown to all".len() + more);
        let token = header.metadata.tokens.get_mut(&0).expect("a token");
        token.extra.insert(String::from("text"), text.into());
        assert_eq!(header.to_bytes(Copy::Primary).is_ok(), fits, "{more}");
    }
}
