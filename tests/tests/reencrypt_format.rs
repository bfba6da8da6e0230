//! The metadata of re-encryptions against cryptsetup's own: the same JSON at the same point for every mode, direction and
//! resilience; what it leaves behind wherever it is killed is read; and from each of our states it goes on to the end.

use std::path::PathBuf;
use std::process::{Command, Output};

use engine::crypto::Secret;
use engine::crypto::hash::Hash;
use engine::crypto::kdf::Kdf;
use engine::format::luks2::Header;
use engine::format::luks2::metadata::{Digest, Metadata, Segment, SegmentKind};
use engine::format::luks2::reencrypt::digest::message;
use engine::format::luks2::reencrypt::read::read;
use engine::format::luks2::reencrypt::write::{Begin, begin, clean, finish, hot, protect};
use engine::format::luks2::reencrypt::{Direction, Mode, Process, State};
use engine::units::Extent;
use serde_json::Value;
use tests::luks2::{QUICK, copies, cryptsetup_does, has_cryptsetup, load_file};
use tests::{Random, Scratch, skip};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// Where data begins when it follows its header.
const BEHIND_HEADER: u64 = 4 * MIB;
/// Bytes of data: the last hotzone is not a whole one.
const DATA: u64 = 8 * MIB + 512 * KIB;
const HOTZONE: u64 = MIB;

/// A volume and the keys it has had.
struct Bench {
    scratch: Scratch,
    data: PathBuf,
    /// Elsewhere, or the data device.
    header: PathBuf,
}

impl Bench {
    /// A file of data; `detached`: its header will be another file.
    fn new(detached: bool) -> Self {
        let scratch = Scratch::new();
        scratch.file("key", b"a passphrase");
        let mut random = Random::new(7);
        for name in ["old-key", "new-key"] {
            let mut key = [0; 64];
            random.fill(&mut key);
            scratch.file(name, &key);
        }
        let data = scratch.file("data", &[]);
        let header = if detached { scratch.join("header") } else { data.clone() };
        let bench = Self { scratch, data, header };
        let file = std::fs::OpenOptions::new().write(true).open(&bench.data).expect("just made");
        file.set_len(if detached { DATA } else { BEHIND_HEADER + DATA }).expect("sparse");
        bench
    }

    fn is_detached(&self) -> bool {
        self.header != self.data
    }

    fn secret(&self, name: &str) -> Secret {
        Secret::copy_of(&std::fs::read(self.scratch.join(name)).expect("a key")).expect("memory")
    }

    fn words(&self, words: &str) -> Vec<String> {
        let mut all: Vec<String> = words.split_whitespace().map(str::to_owned).collect();
        if words != "repair" {
            all.extend(QUICK.map(str::to_owned));
        }
        all.extend(["-q".into(), "--key-file".into(), self.scratch.join("key").display().to_string()]);
        if self.is_detached() {
            all.extend(["--header".into(), self.header.display().to_string()]);
        }
        all.push(self.data.display().to_string());
        all
    }

    fn does(&self, words: &str) {
        let words = self.words(words);
        cryptsetup_does(&words.iter().map(String::as_str).collect::<Vec<_>>(), &[]);
    }

    /// With files that cannot be written from `limit` on: the first hotzone there fails, and the header says so.
    fn limited(&self, words: &str, limit: u64) -> Output {
        let script = "trap '' XFSZ; ulimit -f $1; shift; exec cryptsetup \"$@\"";
        Command::new("sh")
            .args(["-c", script, "sh", &(limit / 512).to_string()])
            .args(self.words(words))
            .output()
            .expect("sh starts")
    }

    fn resume(&self) {
        self.does(&format!("reencrypt --resume-only --force-offline-reencrypt --hotzone-size {HOTZONE}"));
    }

    fn format(&self, words: &str) {
        let offset = if self.is_detached() { 0 } else { BEHIND_HEADER / 512 };
        let key = self.scratch.join("old-key");
        self.does(&format!(
            "luksFormat --type luks2 --offset {offset} --volume-key-file {} {words}",
            key.display()
        ));
    }

    fn init(&self, words: &str) {
        let key = self.scratch.join("new-key");
        let key = if words.contains("--decrypt") {
            String::new()
        } else {
            format!("--volume-key-file {}", key.display())
        };
        self.does(&format!("reencrypt --init-only --force-offline-reencrypt {key} {words}"));
    }

    fn load(&self) -> Header {
        load_file(&self.header).expect("a header").header
    }

    fn store(&self, header: &Header) {
        use std::os::unix::fs::FileExt;
        let file = std::fs::OpenOptions::new().write(true).open(&self.header).expect("it is there");
        file.write_all_at(&copies(header), 0).expect("written");
    }

    fn state(&self) -> (Process, State) {
        read(&self.load().metadata).expect("as cryptsetup left it").expect("a re-encryption")
    }

    /// The digest over what is settled; with real keys.
    fn proof(&self, metadata: &Metadata, process: &Process, like: Option<&Digest>) -> Digest {
        let (old, new) = (self.secret("old-key"), self.secret("new-key"));
        let message = message(metadata, process, Some(&old), Some(&new)).expect("both keys");
        let (iterations, salt) =
            like.map_or((1000, vec![9; 32]), |like| (like.iterations, like.salt.clone()));
        let mut digest = vec![0; 32];
        let kdf = Kdf::Pbkdf2 { hash: Hash::Sha256, iterations };
        kdf.derive(message.as_bytes(), &salt, &mut digest).expect("derived");
        Digest::pbkdf2("sha256", iterations, salt, digest)
    }
}

impl Bench {
    /// cryptsetup makes the digest over what is settled anew whenever it goes on: take it over, for its salt is another.
    fn take_proof(&self, ours: &mut Metadata, theirs: &Metadata, process: Process) -> Process {
        let found = theirs.digest_of_keyslot(process.keyslot).expect("a digest");
        let proof = self.proof(theirs, &process, Some(found.1));
        assert_eq!(proof.digest, found.1.digest, "the protected bytes");
        ours.digests.remove(&process.protection.expect("a digest"));
        ours.digests.insert(found.0, found.1.clone());
        Process { protection: Some(found.0), ..process }
    }
}

/// JSON with lists in order, for their order says nothing.
fn sorted(metadata: &Metadata) -> Value {
    fn sort(value: &mut Value) {
        match value {
            Value::Array(values) => values.sort_by_key(Value::to_string),
            Value::Object(object) => object.values_mut().for_each(sort),
            _ => {}
        }
    }
    let mut json = metadata.to_json();
    sort(&mut json);
    json
}

#[track_caller]
fn same(ours: &Metadata, theirs: &Metadata, what: &str) {
    let (ours, theirs) = (sorted(ours), sorted(theirs));
    assert!(ours == theirs, "{what}\nours   {ours}\ntheirs {theirs}");
}

/// The header as it was before its re-encryption began: `began` holds all but the old data segment.
fn before(header: &Header, process: &Process) -> Header {
    let mut header = header.clone();
    let metadata = &mut header.metadata;
    metadata.config.requirements.clear();
    metadata.remove_keyslot(process.keyslot);
    let mut segment =
        metadata.segments.values().find(|segment| segment.is_backup()).expect("there are").clone();
    for digest in metadata.digests.values_mut() {
        digest.segments.clear();
    }
    segment.flags.clear();
    if let (SegmentKind::Crypt { .. }, Some(digest)) = (&segment.kind, process.old.digest) {
        metadata.digests.get_mut(&digest).expect("it is there").segments.push(0);
    }
    if process.old.cipher.is_none() {
        segment = target(&header_target(process));
    }
    metadata.segments = [(0, segment)].into();
    header
}

fn header_target(process: &Process) -> (u64, Option<(String, u32)>) {
    let cipher = process.new.cipher.as_ref().map(|cipher| (cipher.encryption.clone(), cipher.sector_size));
    (process.new.offset, cipher)
}

fn target((offset, cipher): &(u64, Option<(String, u32)>)) -> Segment {
    match cipher {
        Some((encryption, sector_size)) => Segment::crypt(*offset, None, encryption, *sector_size),
        None => Segment {
            kind: SegmentKind::Linear,
            offset: *offset,
            size: None,
            flags: Vec::new(),
            extra: serde_json::Map::new(),
        },
    }
}

fn wish(process: &Process) -> Begin {
    Begin {
        mode: process.mode,
        direction: process.direction,
        resilience: process.resilience,
        target: target(&header_target(process)),
        new_digest: process.new.digest,
        moved: process.moved,
        total: process.total,
    }
}

/// When no data segment of a hotzone's header is dynamic, cryptsetup's recovery writes down the size of the data it has found; we
/// leave that to the device.
fn without_size(mut theirs: Metadata, process: &Process, total: u64) -> Metadata {
    let (found, _) = read(&theirs).expect("valid").expect("a re-encryption");
    if found.total != process.total {
        assert_eq!(found.total, Some(total));
        let last = theirs.data_segments().last().expect("there is one").0;
        theirs.segments.get_mut(&last).expect("the same").size = None;
    }
    theirs
}

/// A way to re-encrypt.
struct Way {
    name: &'static str,
    detached: bool,
    /// Of `luksFormat`, if there is a volume to begin with.
    format: Option<&'static str>,
    /// Of `reencrypt --init-only`.
    init: &'static str,
    /// What is then made of it by us, for cryptsetup has no words for it.
    change: fn(&mut Begin),
}

const SAME: fn(&mut Begin) = |_| {};

fn ways() -> Vec<Way> {
    let backward: fn(&mut Begin) = |begin| begin.direction = Direction::Backward;
    let forward: fn(&mut Begin) = |begin| begin.direction = Direction::Forward;
    let way = |name, detached, format, init, change| Way { name, detached, format, init, change };
    let small = Some("--sector-size 512");
    vec![
        way("reencrypt forward checksum", false, small, "--resilience checksum", SAME),
        way(
            "reencrypt forward checksum sha512",
            false,
            small,
            "--resilience checksum --resilience-hash sha512",
            SAME,
        ),
        way(
            "reencrypt forward checksum 512 to 4096",
            false,
            small,
            "--resilience checksum --sector-size 4096",
            SAME,
        ),
        way("reencrypt forward journal", false, Some("--sector-size 4096"), "--resilience journal", SAME),
        way("reencrypt backward checksum", false, small, "--resilience checksum", backward),
        way(
            "reencrypt backward journal 512 to 4096",
            false,
            small,
            "--resilience journal --sector-size 4096",
            backward,
        ),
        way("reencrypt forward detached", true, small, "--resilience checksum", SAME),
        way("encrypt forward checksum", true, None, "--encrypt --resilience checksum", SAME),
        way("encrypt forward journal", true, None, "--encrypt --resilience journal --sector-size 4096", SAME),
        way("encrypt backward checksum", true, None, "--encrypt --resilience checksum", backward),
        way("encrypt backward datashift", false, None, "--encrypt --reduce-device-size 2M", SAME),
        way("decrypt backward checksum", true, small, "--decrypt --resilience checksum", SAME),
        way("decrypt backward journal", true, small, "--decrypt --resilience journal", SAME),
        way("decrypt forward checksum", true, small, "--decrypt --resilience checksum", forward),
    ]
}

/// From cryptsetup's first header to our own first, which it will go on with.
fn begun(bench: &Bench, way: &Way) -> Process {
    if let Some(words) = way.format {
        bench.format(words);
    }
    bench.init(way.init);
    let theirs = bench.load();
    let (process, state) = read(&theirs.metadata).expect("just begun").expect("a re-encryption");
    assert_eq!(state, State::Clean { boundary: None }, "{}", way.name);
    let proof = &theirs.metadata.digests[&process.protection.expect("a digest")];
    assert_eq!(
        bench.proof(&theirs.metadata, &process, Some(proof)).digest,
        proof.digest,
        "{}: the protected bytes",
        way.name
    );
    // 1. The same wish makes the same header.
    let mut ours = before(&theirs, &process);
    let begun = begin(&mut ours, &wish(&process)).expect("as they do");
    assert_eq!(Process { protection: process.protection, ..begun.clone() }, process, "{}", way.name);
    let mut begun = begun;
    let digest = bench.proof(&ours.metadata, &begun, Some(proof));
    // They made theirs before old digests went; its number is no matter.
    protect(&mut ours.metadata, &mut begun, digest).expect("room");
    let number = begun.protection.expect("just made");
    let mut renumbered = theirs.metadata.clone();
    let moved = renumbered.digests.remove(&process.protection.expect("a digest")).expect("it is there");
    renumbered.digests.insert(number, moved);
    same(&ours.metadata, &renumbered, way.name);
    // 2. Another wish, and cryptsetup gets it.
    let mut begin_with = wish(&process);
    (way.change)(&mut begin_with);
    let mut ours = before(&theirs, &process);
    let mut process = begin(&mut ours, &begin_with).expect("known to this build");
    let digest = bench.proof(&ours.metadata, &process, None);
    protect(&mut ours.metadata, &mut process, digest).expect("room");
    ours.seqid = theirs.seqid + 1;
    bench.store(&ours);
    process
}

/// The hotzone that cryptsetup takes next.
fn next_hotzone(process: &Process, boundary: u64, total: u64) -> Extent {
    let moved = process.moved.map_or(0, |moved| moved.bytes);
    let length = process.hotzone_max().map_or(HOTZONE, |max| max.min(HOTZONE));
    let (start, end) = match process.direction {
        Direction::Forward => (boundary, total.min(boundary + length)),
        Direction::Backward if boundary <= moved => (0, boundary),
        Direction::Backward => (boundary.saturating_sub(length).max(moved), boundary),
    };
    Extent::new(start, end).expect("there is something left")
}

#[test]
fn every_state_of_a_reencryption_is_as_cryptsetup_writes_it_and_goes_on_from() {
    every_state_is_as_cryptsetup_writes_it("reencrypt");
}

#[test]
fn every_state_of_an_encryption_is_as_cryptsetup_writes_it_and_goes_on_from() {
    every_state_is_as_cryptsetup_writes_it("encrypt");
}

#[test]
fn every_state_of_a_decryption_is_as_cryptsetup_writes_it_and_goes_on_from() {
    every_state_is_as_cryptsetup_writes_it("decrypt");
}

fn every_state_is_as_cryptsetup_writes_it(mode: &str) {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    for way in ways().into_iter().filter(|way| way.name.split(' ').next() == Some(mode)) {
        let bench = Bench::new(way.detached);
        let mut process = begun(&bench, &way);
        let total = process.total.unwrap_or(DATA);
        let mut ours = bench.load();
        let mut boundary = process.begins_at(total);
        let mut crashes = 0;
        // The first hotzone, one in the middle, the last: the others are as these.
        let mut hotzones = 0..;
        let last = process.ends_at(total);
        let resume = format!("reencrypt --resume-only --force-offline-reencrypt --hotzone-size {HOTZONE}");
        while boundary != process.ends_at(total) {
            let at = format!("{} at {boundary}", way.name);
            let zone = next_hotzone(&process, boundary, total);
            let limit = process.new.offset + zone.start();
            let after = process.boundary_after(zone);
            let at_rest = ours.metadata.clone();
            hot(&mut ours.metadata, &process, zone, total).expect("it follows");
            // Below that the header could not be written either.
            let is_looked_at = after == last || [0, 4].contains(&hotzones.next().expect("endless"));
            if limit >= 2 * MIB && is_looked_at {
                let seqid = bench.load().seqid + 1;
                bench.store(&Header { seqid, metadata: at_rest, ..ours.clone() });
                let output = bench.limited(&resume, limit);
                assert!(!output.status.success(), "{at}: all was written");
                let theirs = bench.load();
                process = bench.take_proof(&mut ours.metadata, &theirs.metadata, process);
                same(&ours.metadata, &theirs.metadata, &at);
                let state = State::Crash { start: zone.start(), end: zone.end() };
                assert_eq!(
                    bench.state(),
                    (Process { total: process.total, ..process.clone() }, state),
                    "{at}"
                );
                crashes += 1;
                // Its own recovery ends in the state behind the hotzone.
                bench.store(&Header { seqid: theirs.seqid + 1, ..ours.clone() });
                bench.does("repair");
                if after != process.ends_at(total) {
                    clean(&mut ours.metadata, &process, after, total).expect("a boundary");
                    assert_eq!(bench.state().1, State::Clean { boundary: Some(after) }, "{at}");
                    let theirs = bench.load();
                    same(&ours.metadata, &without_size(theirs.metadata, &process, total), &at);
                    bench.store(&Header { seqid: theirs.seqid + 1, ..ours.clone() });
                    boundary = after;
                    continue;
                }
            }
            clean(&mut ours.metadata, &process, after, total).expect("a boundary");
            boundary = after;
        }
        assert!(crashes >= 2, "{}: {crashes} hotzones failed", way.name);
        assert_eq!(
            read(&ours.metadata).expect("valid").expect("not over yet").1,
            State::Finished,
            "{}",
            way.name
        );
        let removed = finish(&mut ours.metadata, &process).expect("all is done");
        assert_eq!(removed.is_empty(), process.mode == Mode::Encrypt, "{}", way.name);
        assert_eq!(read(&ours.metadata).expect("valid"), None, "{}", way.name);
        if bench.load().metadata.is_reencrypting() {
            bench.resume();
        }
        // cryptsetup lets the keyslots area grow up to the data.
        let mut theirs = bench.load().metadata;
        theirs.config.keyslots_size = ours.metadata.config.keyslots_size;
        same(&ours.metadata, &theirs, way.name);
        ours.check().expect("it can be written");
    }
}

#[test]
fn without_protection_cryptsetup_goes_on_from_our_stop_and_not_from_our_crash() {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    let way = Way {
        name: "none",
        detached: false,
        format: Some("--sector-size 512"),
        init: "--resilience none",
        change: SAME,
    };
    let bench = Bench::new(false);
    let process = begun(&bench, &way);
    let mut ours = bench.load();
    // 1. While it runs: all of the rest.
    hot(&mut ours.metadata, &process, Extent::new(0, DATA).expect("data"), DATA).expect("a step");
    ours.seqid += 1;
    bench.store(&ours);
    assert_eq!(bench.state().1, State::Crash { start: 0, end: DATA });
    cryptsetup_does(&["luksDump"], &[&bench.header]);
    for words in ["repair", "reencrypt --resume-only --force-offline-reencrypt"] {
        let words = bench.words(words);
        let output = Command::new("cryptsetup").args(&words).output().expect("it starts");
        assert!(!output.status.success(), "{words:?}");
        assert_eq!(bench.state().1, State::Crash { start: 0, end: DATA });
    }
    // 2. Stopped early.
    ours = bench.load();
    clean(&mut ours.metadata, &process, 3 * MIB, DATA).expect("a boundary");
    ours.seqid += 1;
    bench.store(&ours);
    assert_eq!(bench.state().1, State::Clean { boundary: Some(3 * MIB) });
    bench.resume();
    assert!(!bench.load().metadata.is_reencrypting());
}

/// Killed at every flush of a whole run, and so in every state that a header of cryptsetup's can be in.
#[test]
fn whatever_a_killed_cryptsetup_leaves_behind_is_read() {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    if Command::new("strace").arg("-V").output().is_err() {
        return skip("no strace to kill cryptsetup with");
    }
    for way in ways().into_iter().filter(|way| {
        ["reencrypt forward checksum", "encrypt backward datashift", "decrypt backward journal"]
            .contains(&way.name)
    }) {
        let bench = Bench::new(way.detached);
        begun(&bench, &way);
        let start = [&bench.data, &bench.header].map(|path| std::fs::read(path).expect("a file"));
        let mut seen = std::collections::BTreeSet::new();
        for flush in 1.. {
            for (path, bytes) in [&bench.data, &bench.header].into_iter().zip(&start) {
                std::fs::write(path, bytes).expect("as it was");
            }
            let resume =
                format!("reencrypt --resume-only --force-offline-reencrypt --hotzone-size {}", 3 * MIB);
            let output = Command::new("strace")
                .args(["-f", "-o", "/dev/null", "-e", "trace=fsync,fdatasync"])
                .args(["-e", &format!("inject=fsync,fdatasync:signal=SIGKILL:when={flush}")])
                .arg("cryptsetup")
                .args(bench.words(&resume))
                .output()
                .expect("strace starts");
            let found = read(&bench.load().metadata)
                .unwrap_or_else(|error| panic!("{}, flush {flush}: {error:?}", way.name));
            seen.insert(match found {
                None => "none".to_owned(),
                Some((_, state)) => format!("{state:?}"),
            });
            if output.status.success() {
                assert!(found_none(&bench), "{}", way.name);
                break;
            }
            assert!(flush < 200, "{}: {}", way.name, String::from_utf8_lossy(&output.stderr));
        }
        let states = ["Finished", "none"];
        for state in states {
            assert!(seen.contains(state), "{}: {state} is not among {seen:?}", way.name);
        }
        assert!(seen.iter().any(|state| state.starts_with("Crash")), "{}: {seen:?}", way.name);
    }
}

fn found_none(bench: &Bench) -> bool {
    read(&bench.load().metadata).expect("valid").is_none()
}
