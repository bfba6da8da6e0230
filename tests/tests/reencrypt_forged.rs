//! Forged and damaged metadata of re-encryptions (`vectors/bad/reencrypt`): each is refused for its reason. Then metadata changed at
//! random: what is accepted is a state that we could have written ourselves.
//!
//! `valid.txt`: headers that cryptsetup left behind, and what they say. `cases.txt`: header, kind of the error, a fragment of its
//! message, and what is done to it, separated by tabs: `set /a/b JSON`, `remove /a/b`, `swap /a/b /c/d`, `rename /a/b /a/c`, with
//! ` ; ` in between.

use std::path::{Path, PathBuf};

use engine::crypto::Secret;
use engine::crypto::hash::Hash;
use engine::crypto::kdf::Kdf;
use engine::error::{Error, Result};
use engine::format::luks2::metadata::Metadata;
use engine::format::luks2::reencrypt::digest::message;
use engine::format::luks2::reencrypt::read::read;
use engine::format::luks2::reencrypt::write::{clean, finish, hot};
use engine::format::luks2::reencrypt::{Direction, Mode, Process, State};
use engine::units::Extent;
use serde_json::{Map, Value};
use tests::{Random, seed};

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("vectors/bad/reencrypt")
}

fn table(name: &str) -> Vec<Vec<String>> {
    let text = std::fs::read_to_string(corpus().join(name)).expect("the table");
    text.lines().map(|line| line.split('\t').map(str::to_owned).collect()).collect()
}

fn base(name: &str) -> Value {
    let text = std::fs::read_to_string(corpus().join(format!("{name}.json"))).expect("a header");
    serde_json::from_str(&text).expect("JSON")
}

/// As a volume is opened: what cannot be parsed is damage, too.
fn judge(json: &Value) -> Result<Option<(Process, State)>> {
    Metadata::parse(json.to_string().as_bytes())
        .map_err(Error::as_damage)
        .and_then(|metadata| read(&metadata))
}

fn parent<'a, 'b>(value: &'a mut Value, pointer: &'b str) -> (&'a mut Map<String, Value>, &'b str) {
    let (parent, key) = pointer.rsplit_once('/').expect("a pointer");
    (value.pointer_mut(parent).and_then(Value::as_object_mut).expect("an object"), key)
}

fn take(json: &mut Value, pointer: &str) -> Value {
    let (object, key) = parent(json, pointer);
    object.shift_remove(key).unwrap_or_else(|| panic!("{pointer} is not there"))
}

fn put(json: &mut Value, pointer: &str, value: Value) {
    let (object, key) = parent(json, pointer);
    object.insert(key.to_owned(), value);
}

fn edit(json: &mut Value, edit: &str) {
    let (verb, rest) = edit.split_once(' ').expect("a verb");
    let two = || rest.split_once(' ').expect("two words");
    match verb {
        "set" => put(json, two().0, serde_json::from_str(two().1).expect("JSON")),
        "remove" => drop(take(json, rest)),
        "swap" => {
            let (one, other) = (take(json, two().0), take(json, two().1));
            put(json, two().0, other);
            put(json, two().1, one);
        }
        "rename" => {
            let value = take(json, two().0);
            put(json, two().1, value);
        }
        _ => panic!("{verb}"),
    }
}

fn said((process, state): &(Process, State)) -> String {
    let state = match *state {
        State::Clean { boundary: None } => "nothing".to_owned(),
        State::Clean { boundary: Some(boundary) } => format!("done up to {boundary}"),
        State::Crash { start, end } => format!("hot {start}..{end}"),
        State::Finished => "finished".to_owned(),
    };
    match process.total {
        Some(total) => format!("{state} of {total}"),
        None => state,
    }
}

#[test]
fn what_cryptsetup_leaves_behind_is_read() {
    for row in table("valid.txt") {
        let found = judge(&base(&row[0])).unwrap_or_else(|error| panic!("{}: {error:?}", row[0]));
        assert_eq!(said(&found.expect("a re-encryption")), row[1], "{}", row[0]);
    }
}

#[test]
fn every_forged_header_is_refused_for_its_reason() {
    let mut wrong = Vec::new();
    for row in table("cases.txt") {
        let [name, kind, fragment, edits] = &row[..] else { panic!("four fields: {row:?}") };
        let mut json = base(name);
        for line in edits.split(" ; ") {
            edit(&mut json, line);
        }
        match judge(&json) {
            Ok(found) => wrong.push(format!("{name} {edits}: {:?}", found.as_ref().map(said))),
            Err(error) => {
                let found = serde_json::to_value(error.kind()).expect("JSON");
                if found != kind.as_str() || !error.chain().contains(fragment) {
                    wrong.push(format!("{name} {edits}: {kind}, {fragment:?}, but it is {error:?}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} cases:\n{}", wrong.len(), wrong.join("\n"));
}

/// Does the digest prove this metadata with the keys it was begun with?
fn is_proven(metadata: &Metadata, process: &Process) -> bool {
    // A key is that which its digest checks, whatever side it is said to be of.
    let key = |digest: Option<u32>| {
        let from = if process.mode == Mode::Encrypt || digest == Some(1) { 64 } else { 0 };
        Secret::copy_of(&(from..from + 64).collect::<Vec<u8>>()).expect("memory")
    };
    let (old, new) = (key(process.old.digest), key(process.new.digest));
    let message = message(metadata, process, Some(&old), Some(&new)).expect("both keys");
    let proof = &metadata.digests[&process.protection.expect("a digest")];
    let kdf = Kdf::Pbkdf2 { hash: Hash::Sha256, iterations: proof.iterations };
    let mut digest = vec![0; proof.digest.len()];
    kdf.derive(message.as_bytes(), &proof.salt, &mut digest).expect("derived");
    digest == proof.digest
}

#[test]
fn the_proof_of_cryptsetup_holds() {
    for row in table("valid.txt") {
        let metadata = Metadata::parse(base(&row[0]).to_string().as_bytes()).expect("valid");
        let (process, _) = read(&metadata).expect("valid").expect("a re-encryption");
        assert!(is_proven(&metadata, &process), "{}", row[0]);
    }
}

/// Forgeries that are whole in themselves.
#[test]
fn what_no_rule_tells_the_proof_does() {
    for (name, edits) in [
        ("clean", "swap /digests/0/segments /digests/1/segments"),
        ("crash", "swap /digests/0/segments /digests/1/segments"),
        ("begun", "set /keyslots/2/direction \"backward\""),
        ("begun", "set /segments/2/sector_size 4096"),
        ("begun", "set /segments/2/encryption \"aes-cbc-essiv:sha256\""),
        ("clean", "set /keyslots/2/area/type \"none\""),
        ("crash", "set /keyslots/2/area/type \"journal\""),
        ("crash", "set /keyslots/2/area/hash \"sha512\""),
        ("crash", "set /keyslots/2/area/hash \"SHA256\""),
        ("crash", "set /keyslots/2/area/sector_size 8192"),
        ("crash", "set /keyslots/2/area/size \"2097152\""),
        ("crash", "set /keyslots/2/area/offset \"552960\" ; set /keyslots/2/area/size \"2097152\""),
        ("decrypt-crash", "set /keyslots/1/area/type \"journal\""),
        ("encrypt-shift", "set /segments/0/offset \"11534336\" ; set /segments/2/offset \"11534336\""),
        ("encrypt-shift", "set /segments/3/size \"7340032\" ; set /segments/1/size \"5242880\""),
        ("crash", "set /digests/3/iterations 1111"),
    ] {
        let mut json = base(name);
        for line in edits.split(" ; ") {
            edit(&mut json, line);
        }
        let metadata = Metadata::parse(json.to_string().as_bytes()).expect(edits);
        let (process, _) = read(&metadata).expect(edits).expect(edits);
        assert!(!is_proven(&metadata, &process), "{name}: {edits}");
    }
}

/// What cryptsetup ignores is no forgery.
#[test]
fn flags_and_fields_of_the_future_mean_nothing() {
    for change in [
        "set /segments/0/flags [\"dead-parrot\"]",
        "remove /keyslots/2/priority",
        "set /keyslots/2/later 1",
        "set /segments/0/later {\"a\":1}",
    ] {
        let mut json = base("clean");
        edit(&mut json, change);
        let found = judge(&json).expect(change).expect("a re-encryption");
        assert_eq!(said(&found), "done up to 5242880", "{change}");
    }
}

/// Go on from a state, one step and to the end, and back through `read` each time.
fn goes_on(metadata: &Metadata, process: &Process, state: State) {
    let total = process.total.unwrap_or(1 << 40);
    let unit = process.unit_bytes();
    let is = |metadata: &Metadata, expected: State, what: &str| {
        // As it would be read from the disk.
        let metadata = Metadata::parse(metadata.to_json().to_string().as_bytes()).expect(what);
        let (_, found) = read(&metadata).expect(what).expect(what);
        assert_eq!(found, expected, "{what}");
    };
    let mut now = metadata.clone();
    let mut state = state;
    if let State::Clean { boundary } = state {
        let boundary = boundary.unwrap_or(process.begins_at(total));
        let moved = process.moved.map_or(0, |moved| moved.bytes);
        let hotzone = match process.direction {
            Direction::Forward => Extent::new(boundary, (boundary + unit).min(total)),
            Direction::Backward if boundary <= moved => Extent::new(0, boundary),
            Direction::Backward => Extent::new(boundary.saturating_sub(unit).max(moved), boundary),
        };
        // A boundary beyond a device of our choice.
        let Some(hotzone) = hotzone.filter(|_| boundary <= total) else { return };
        hot(&mut now, process, hotzone, total).expect("a step");
        state = State::Crash { start: hotzone.start(), end: hotzone.end() };
        is(&now, state, "hot");
    }
    if let State::Crash { start, end } = state {
        if end > total {
            return;
        }
        let boundary = process.boundary_after(Extent::new(start, end).expect("not empty"));
        clean(&mut now, process, boundary, total).expect("a boundary");
        state = process.clean_at(boundary, total);
        is(&now, state, "clean");
    }
    if state == State::Finished {
        finish(&mut now, process).expect("all is done");
        assert_eq!(read(&now).expect("valid"), None);
        Metadata::parse(now.to_json().to_string().as_bytes()).expect("finished");
    }
}

#[test]
fn metadata_changed_at_random_is_refused_or_a_state_of_ours() {
    const NUMBERS: [u64; 12] = [
        0,
        512,
        1024,
        4096,
        1 << 20,
        2 << 20,
        4 << 20,
        5 << 20,
        8 << 20,
        10 << 20,
        (10 << 20) + 512,
        u64::MAX - 511,
    ];
    let seed = seed();
    let mut random = Random::new(seed);
    let bases: Vec<Value> = table("valid.txt").iter().map(|row| base(&row[0])).collect();
    let (mut accepted, mut refused) = (0, 0);
    for round in 0..20_000 {
        let mut json = bases[random.below(bases.len())].clone();
        for _ in 0..=random.below(3) {
            let ids: Vec<String> = json["segments"].as_object().expect("segments").keys().cloned().collect();
            let id = &ids[random.below(ids.len())];
            let other = &ids[random.below(ids.len())];
            match random.below(5) {
                0 | 1 => {
                    let field = ["offset", "size", "iv_tweak"][random.below(3)];
                    let number = NUMBERS[random.below(NUMBERS.len())].to_string();
                    put(&mut json, &format!("/segments/{id}/{field}"), number.into());
                }
                2 => put(&mut json, &format!("/segments/{id}/size"), "dynamic".into()),
                3 => {
                    let copy = json["segments"][other].clone();
                    put(&mut json, &format!("/segments/{id}"), copy);
                }
                _ => {
                    let lists = ["0", "1"].map(|digest| format!("/digests/{digest}/segments"));
                    let list =
                        lists.iter().find(|list| json.pointer(list).is_some()).expect("a digest").clone();
                    let segments = json.pointer_mut(&list).and_then(Value::as_array_mut).expect("a list");
                    if random.below(2) == 0 {
                        segments.push(id.as_str().into());
                    } else {
                        segments.retain(|segment| segment != id.as_str());
                    }
                }
            }
        }
        let Ok(metadata) = Metadata::parse(json.to_string().as_bytes()) else { continue };
        match read(&metadata) {
            Ok(Some((process, state))) => {
                accepted += 1;
                let text = json.to_string();
                let went = std::panic::catch_unwind(|| goes_on(&metadata, &process, state));
                assert!(went.is_ok(), "seed {seed}, round {round}: {text}");
            }
            Ok(None) => panic!("seed {seed}, round {round}: no re-encryption in {json}"),
            Err(_) => refused += 1,
        }
    }
    assert!(accepted > 100 && refused > 1000, "{accepted} accepted, {refused} refused");
}

#[test]
fn states_of_cryptsetup_go_on_to_the_end() {
    for row in table("valid.txt") {
        let json = base(&row[0]);
        let metadata = Metadata::parse(json.to_string().as_bytes()).expect("valid");
        let (process, state) = read(&metadata).expect("valid").expect("a re-encryption");
        goes_on(&metadata, &process, state);
    }
}
