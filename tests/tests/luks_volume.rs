//! LUKS volumes opened and changed, beside the program that defines what that means: what cryptsetup makes opens here with
//! the same key, and damage is told apart from ignorance.

use std::fs::{File, OpenOptions};

use engine::backend::blocking::Blocking;
use engine::format::luks2::metadata::{Keyslot, SegmentKind};
use engine::format::luks2::{Health, Loaded};
use engine::volume::{Header, store, unlock};
use proto::ErrorKind;
use serde_json::{Value, json};
use tests::scene::{
    MIB, PASSPHRASE, QUICK, QUICK_ARGON2, Scene, assert_wrong_key, is_missing, loaded, open, open_with,
    refusal, secret,
};
use tests::skip;

/// Something done to a header in memory.
type Change<'a> = &'a dyn Fn(&mut Loaded);

// ---- theirs here

#[test]
fn volumes_made_by_cryptsetup_open_with_the_same_key() {
    if is_missing("cryptsetup") {
        return;
    }
    let variants = [
        format!("--type luks1 {QUICK}"),
        format!("--type luks1 --key-size 256 --hash sha512 {QUICK}"),
        format!("--type luks1 --cipher aes-cbc-essiv:sha256 --key-size 256 --hash sha1 {QUICK}"),
        format!("--type luks1 --cipher aes-cbc-plain64 --key-size 128 {QUICK}"),
        format!("--type luks2 {QUICK}"),
        format!("--type luks2 --key-size 256 --sector-size 512 {QUICK}"),
        format!("--type luks2 --sector-size 2048 --hash sha512 {QUICK}"),
        format!("--type luks2 --cipher aes-xts-plain --hash sha384 {QUICK}"),
        format!("--type luks2 --cipher aes-cbc-essiv:sha256 --key-size 256 {QUICK}"),
        format!("--type luks2 --pbkdf argon2id {QUICK_ARGON2}"),
        format!("--type luks2 --pbkdf argon2i {QUICK_ARGON2}"),
        format!("--type luks2 --luks2-metadata-size 64k --luks2-keyslots-size 1m {QUICK}"),
        format!("--type luks2 --keyslot-cipher aes-xts-plain64 --keyslot-key-size 256 {QUICK}"),
    ];
    for words in variants {
        let scene = Scene::new();
        scene.format(&words);
        let opened = open(&scene, "volume").unwrap_or_else(|error| panic!("{words}: {}", error.chain()));
        assert_eq!(opened.keyslot, Some(0), "{words}");
        assert!(opened.key.as_bytes() == scene.volume_key("volume", ""), "{words}: another key");
        assert_wrong_key(open_with(&scene, "volume", b"correct horsf", None));
        assert_wrong_key(open_with(&scene, "volume", b"", None));

        let (_, header) = scene.load("volume");
        assert_eq!(unlock::with_volume_key(&header, opened.key).expect("the key").keyslot, None);
        let others: [&[u8]; 3] = [&[7; 64], &[7; 32], &[7; 1]];
        for other in others {
            assert_wrong_key(unlock::with_volume_key(&header, secret(other)));
        }
        let areas = header.data_areas().unwrap_or_else(|error| panic!("{words}: {}", error.chain()));
        assert_eq!(areas.len(), 1);
        let cipher = areas[0].cipher.expect("encrypted");
        let (offset, name, unit) = match &header {
            Header::Luks1(_) => {
                let dump = scene.cryptsetup("luksDump @/volume");
                let field = |name: &str| {
                    let line = dump.lines().find_map(|line| line.strip_prefix(name)).expect("a field");
                    line.trim().to_owned()
                };
                let name = format!("{}-{}", field("Cipher name:"), field("Cipher mode:"));
                (field("Payload offset:").parse::<u64>().expect("a number") * 512, name, 512)
            }
            Header::Luks2(_) => {
                let segment = &scene.metadata("volume")["segments"]["0"];
                let offset = segment["offset"].as_str().expect("text").parse().expect("a number");
                let name = segment["encryption"].as_str().expect("text").to_owned();
                (offset, name, segment["sector_size"].as_u64().expect("a number"))
            }
        };
        assert_eq!((areas[0].offset, cipher.spec.name()), (offset, name.as_str()), "{words}");
        assert_eq!((u64::from(cipher.unit_bytes), cipher.offset_sectors), (unit, 0), "{words}");
    }
}

/// cryptsetup makes no more lanes than there are CPUs online; those it does not make are checked the other way in `luks_create`.
#[test]
fn argon2_keyslots_of_every_number_of_lanes_give_the_same_key() {
    if is_missing("cryptsetup") {
        return;
    }
    for kind in ["argon2i", "argon2id"] {
        for lanes in 1..=4 {
            let scene = Scene::new();
            scene.format(&format!(
                "--type luks2 --pbkdf {kind} --pbkdf-force-iterations 4 --pbkdf-memory 64 --pbkdf-parallel {lanes}"
            ));
            let kdf = &scene.metadata("volume")["keyslots"]["0"]["kdf"];
            assert_eq!(kdf["type"], kind);
            if kdf["cpus"] != lanes {
                skip(&format!("cryptsetup makes {} lanes here and not {lanes}", kdf["cpus"]));
                continue;
            }
            let opened = open(&scene, "volume").expect("opens");
            assert!(opened.key.as_bytes() == scene.volume_key("volume", ""), "{kind} {lanes}: another key");
        }
    }
}

#[test]
fn keyslots_are_tried_by_priority_and_named_ones_alone() {
    if is_missing("cryptsetup") {
        return;
    }
    for kind in ["luks1", "luks2"] {
        let scene = Scene::new();
        scene.format(&format!("--type {kind} {QUICK}"));
        scene.dir.file("other", b"battery staple");
        // The same passphrase in 0 and 5; another in 3.
        scene.cryptsetup(&format!("luksAddKey --key-file @/key --key-slot 5 {QUICK} @/volume @/key"));
        scene.cryptsetup(&format!("luksAddKey --key-file @/key --key-slot 3 {QUICK} @/volume @/other"));
        let key = scene.volume_key("volume", "");
        for (passphrase, only, keyslot) in [
            (PASSPHRASE, None, Some(0)),
            (PASSPHRASE, Some(5), Some(5)),
            (PASSPHRASE, Some(3), None),
            (b"battery staple", None, Some(3)),
            (b"battery staple", Some(3), Some(3)),
            (b"battery staple", Some(0), None),
        ] {
            match keyslot {
                Some(_) => {
                    let opened = open_with(&scene, "volume", passphrase, only).expect("opens");
                    assert_eq!(opened.keyslot, keyslot);
                    assert!(opened.key.as_bytes() == key);
                }
                None => assert_wrong_key(open_with(&scene, "volume", passphrase, only)),
            }
        }
        for id in [1, 8, 31, 32, u32::MAX] {
            let opened = open_with(&scene, "volume", PASSPHRASE, Some(id));
            refusal(opened, ErrorKind::NotFound, &[&format!("keyslot {id} is not in use")]);
        }
        if kind == "luks2" {
            scene.cryptsetup("config --priority prefer --key-slot 5 @/volume");
            assert_eq!(open(&scene, "volume").expect("opens").keyslot, Some(5));
            scene.cryptsetup("config --priority ignore --key-slot 5 @/volume");
            scene.cryptsetup("config --priority ignore --key-slot 0 @/volume");
            assert_wrong_key(open(&scene, "volume"));
            assert_eq!(open_with(&scene, "volume", PASSPHRASE, Some(0)).expect("opens").keyslot, Some(0));
            scene.cryptsetup("config --priority ignore --key-slot 3 @/volume");
            refusal(open(&scene, "volume"), ErrorKind::NotFound, &["no keyslot opens the volume"]);
        }
        scene.cryptsetup("luksKillSlot @/volume 3");
        refusal(
            open_with(&scene, "volume", PASSPHRASE, Some(3)),
            ErrorKind::NotFound,
            &["keyslot 3 is not in use"],
        );
    }
}

#[test]
fn unbound_keyslots_do_not_open_the_data() {
    if is_missing("cryptsetup") {
        return;
    }
    let scene = Scene::new();
    scene.format(QUICK);
    scene.dir.file("other", b"battery staple");
    scene.cryptsetup(&format!("luksAddKey --unbound --key-size 512 --key-slot 1 {QUICK} @/volume @/other"));
    assert_wrong_key(open_with(&scene, "volume", b"battery staple", None));
    let named = open_with(&scene, "volume", b"battery staple", Some(1));
    refusal(named, ErrorKind::NotFound, &["keyslot 1", "not bound"]);
    // The keyslot itself opens.
    let (mut device, header) = scene.load("volume");
    let opened = unlock::keyslot(&mut device, &header, 1, &secret(b"battery staple")).expect("opens");
    assert_eq!((opened.keyslot, opened.key.len()), (Some(1), 64));
    assert_wrong_key(unlock::with_volume_key(&header, opened.key));
    assert_wrong_key(unlock::keyslot(&mut device, &header, 1, &secret(PASSPHRASE)));
    let bound: Vec<bool> = header.summary().keyslots.iter().map(|keyslot| keyslot.bound).collect();
    assert_eq!(bound, [true, false]);
}

#[test]
fn detached_headers_open() {
    if is_missing("cryptsetup") {
        return;
    }
    for (kind, extra, offset) in [
        ("luks1", "", 0),
        ("luks2", "", 0),
        ("luks2", "--offset 40960", 40960 * 512),
        ("luks1", "--offset 4096", 2 * MIB),
    ] {
        let scene = Scene::new();
        scene.sized("volume", 40 * MIB);
        scene.cryptsetup(&format!(
            "luksFormat --type {kind} --key-file @/key --header @/header @/volume {extra} {QUICK}"
        ));
        let opened =
            open(&scene, "header").unwrap_or_else(|error| panic!("{kind} {extra}: {}", error.chain()));
        assert!(opened.key.as_bytes() == scene.volume_key("header", ""));
        let (_, header) = scene.load("header");
        assert_eq!(header.data_areas().expect("areas")[0].offset, offset);
        let mut volume = scene.device("volume");
        refusal(Header::load(&mut volume), ErrorKind::Unsupported, &["not a LUKS volume"]);
    }
}

// ---- damage

#[test]
fn either_copy_of_a_luks2_header_is_enough() {
    if is_missing("cryptsetup") {
        return;
    }
    for metadata in ["16k", "64k", "4m"] {
        let scene = Scene::new();
        scene.format(&format!("--luks2-metadata-size {metadata} {QUICK}"));
        let key = scene.volume_key("volume", "");
        let copy_bytes = loaded(scene.load("volume").1).header.copy_bytes;
        // All zero, a zero sector of the JSON, a part of the checksum that is long enough to be another one.
        let copy = usize::try_from(copy_bytes).expect("a length");
        let damages: [(u64, Vec<u8>); 3] = [(0, vec![0; copy]), (4096, vec![0; 512]), (450, vec![0x55; 16])];
        for (at, bytes) in damages {
            for (index, offset) in [(0, 0), (1, copy_bytes)] {
                let whole = std::fs::read(scene.path("volume")).expect("read");
                scene.overwrite("volume", offset + at, &bytes);
                let loaded = loaded(scene.load("volume").1);
                assert!(matches!(loaded.health[index], Health::Damaged(_)), "{:?}", loaded.health);
                assert_eq!(loaded.health[1 - index], Health::Good);
                assert!(open(&scene, "volume").expect("opens").key.as_bytes() == key);
                std::fs::write(scene.path("volume"), whole).expect("put back");
            }
        }
        let whole = std::fs::read(scene.path("volume")).expect("read");
        scene.overwrite("volume", 4096, &[0; 512]);
        scene.overwrite("volume", copy_bytes + 4096, &[0; 512]);
        refusal(Header::load(&mut scene.device("volume")), ErrorKind::Damaged, &["volume"]);
        std::fs::write(scene.path("volume"), whole).expect("put back");
    }
}

#[test]
fn a_damaged_keyslot_and_a_wrong_passphrase_say_the_same() {
    if is_missing("cryptsetup") {
        return;
    }
    for (kind, area) in [("luks1", 4096), ("luks2", 32768)] {
        let scene = Scene::new();
        scene.format(&format!("--type {kind} {QUICK}"));
        let whole = std::fs::read(scene.path("volume")).expect("read");
        for at in [0, 255_999] {
            let byte = whole[usize::try_from(area + at).expect("an offset")] ^ 1;
            scene.overwrite("volume", area + at, &[byte]);
            assert_wrong_key(open(&scene, "volume"));
            scene.overwrite("volume", area + at, &[byte ^ 1]);
        }
        assert!(open(&scene, "volume").is_ok());
        if kind == "luks1" {
            // Digest, its salt, and an area behind the end of the device: no checksum tells.
            for at in [112, 131, 132] {
                let byte = whole[usize::try_from(at).expect("an offset")];
                scene.overwrite("volume", at, &[byte ^ 1]);
                assert_wrong_key(open(&scene, "volume"));
                scene.overwrite("volume", at, &[byte]);
            }
            let file = OpenOptions::new().write(true).open(scene.path("volume")).expect("opens");
            file.set_len(100_000).expect("cut");
            assert_wrong_key(open(&scene, "volume"));
        }
    }
}

#[test]
fn damaged_parameters_of_a_luks2_keyslot_say_the_same() {
    if is_missing("cryptsetup") {
        return;
    }
    let scene = Scene::new();
    scene.format(QUICK);
    let (mut device, header) = scene.load("volume");
    let good = loaded(header);
    let attempt = |change: &dyn Fn(&mut Loaded), device: &mut Blocking| {
        let mut changed = good.clone();
        change(&mut changed);
        unlock::with_passphrase(device, &Header::Luks2(Box::new(changed)), &secret(PASSPHRASE), None, &|| {
            false
        })
    };
    fn keyslot(loaded: &mut Loaded) -> &mut engine::format::luks2::metadata::Luks2Keyslot {
        match loaded.header.metadata.keyslots.get_mut(&0) {
            Some(Keyslot::Luks2(keyslot)) => keyslot,
            _ => panic!("no keyslot 0"),
        }
    }
    assert!(attempt(&|_| {}, &mut device).is_ok());
    let damages: [Change<'_>; 12] = [
        &|loaded| keyslot(loaded).key_size = 63,
        &|loaded| keyslot(loaded).key_size = 32,
        &|loaded| keyslot(loaded).key_size = 0,
        &|loaded| keyslot(loaded).key_size = u32::MAX,
        &|loaded| keyslot(loaded).area.offset = u64::MAX - 512,
        &|loaded| keyslot(loaded).area.size = 4096,
        &|loaded| keyslot(loaded).area_key_size = 65,
        &|loaded| keyslot(loaded).af_stripes = 3999,
        &|loaded| keyslot(loaded).salt[0] ^= 1,
        &|loaded| loaded.header.metadata.digests.get_mut(&0).expect("a digest").digest[0] ^= 1,
        &|loaded| loaded.header.metadata.digests.get_mut(&0).expect("a digest").digest.truncate(0),
        &|loaded| loaded.header.metadata.digests.get_mut(&0).expect("a digest").iterations = 0,
    ];
    for damage in damages {
        assert_wrong_key(attempt(damage, &mut device));
    }
    // Only the header speaks here, so the answer may be clear.
    let unknown: [(Change<'_>, &str); 4] = [
        (&|loaded| keyslot(loaded).area_encryption = "cipher_null-ecb".to_owned(), "cipher_null-ecb"),
        (&|loaded| keyslot(loaded).area_encryption = "serpent-xts-plain64".to_owned(), "serpent-xts-plain64"),
        (&|loaded| keyslot(loaded).af_hash = "whirlpool".to_owned(), "whirlpool"),
        (
            &|loaded| loaded.header.metadata.digests.get_mut(&0).expect("a digest").kind = "blake".to_owned(),
            "blake",
        ),
    ];
    for (change, name) in unknown {
        refusal(attempt(change, &mut device), ErrorKind::Unsupported, &["keyslot 0", name]);
    }
}

#[test]
fn a_cost_that_cannot_be_paid_is_refused_at_once() {
    if is_missing("cryptsetup") {
        return;
    }
    use engine::crypto::kdf::Argon2Kind;
    use engine::format::luks2::metadata::KdfText;
    let scene = Scene::new();
    scene.format(QUICK);
    let (mut device, header) = scene.load("volume");
    let good = loaded(header);
    let hash = "sha256".to_owned();
    let kind = Argon2Kind::Argon2id;
    for (kdf, wanted) in [
        (KdfText::Pbkdf2 { hash: hash.clone(), iterations: u32::MAX }, ErrorKind::Limit),
        (KdfText::Argon2 { kind, time: u32::MAX, memory_kib: 1 << 20, lanes: 1 }, ErrorKind::Limit),
        (KdfText::Argon2 { kind, time: 4, memory_kib: u32::MAX, lanes: 1 }, ErrorKind::WrongKey),
        (KdfText::Argon2 { kind, time: 4, memory_kib: 32, lanes: 0 }, ErrorKind::WrongKey),
    ] {
        let mut changed = good.clone();
        match changed.header.metadata.keyslots.get_mut(&0) {
            Some(Keyslot::Luks2(keyslot)) => keyslot.kdf = kdf.clone(),
            _ => panic!("no keyslot 0"),
        }
        let header = Header::Luks2(Box::new(changed));
        let begun = std::time::Instant::now();
        let opened = unlock::with_passphrase(&mut device, &header, &secret(PASSPHRASE), None, &|| false);
        let error = opened.expect_err("refused");
        // Old machines derive four thousand million iterations in about ten minutes; a new one may do it in two.
        if error.kind() == ErrorKind::WrongKey && matches!(kdf, KdfText::Pbkdf2 { .. }) {
            skip("this machine pays for 2^32 iterations");
            continue;
        }
        assert_eq!(error.kind(), wanted, "{kdf:?}: {}", error.chain());
        assert!(begun.elapsed().as_secs() < 10, "{kdf:?} took {:?}", begun.elapsed());
    }
}

#[test]
fn giving_up_is_asked_before_every_attempt() {
    if is_missing("cryptsetup") {
        return;
    }
    let scene = Scene::new();
    scene.format(QUICK);
    scene.cryptsetup(&format!("luksAddKey --key-file @/key {QUICK} @/volume @/key"));
    let (mut device, header) = scene.load("volume");
    let asked = std::cell::Cell::new(0);
    let opened = unlock::with_passphrase(&mut device, &header, &secret(b"wrong"), None, &|| {
        asked.set(asked.get() + 1);
        asked.get() == 2
    });
    refusal(opened, ErrorKind::Cancelled, &[]);
    assert_eq!(asked.get(), 2);
}

#[test]
fn what_is_not_understood_is_refused_by_name() {
    if is_missing("cryptsetup") {
        return;
    }
    let scene = Scene::new();
    scene.format(QUICK);
    let good = loaded(scene.load("volume").1);
    let areas = |change: &dyn Fn(&mut Loaded)| {
        let mut changed = good.clone();
        change(&mut changed);
        Header::Luks2(Box::new(changed)).data_areas()
    };
    fn segment(loaded: &mut Loaded) -> &mut SegmentKind {
        &mut loaded.header.metadata.segments.get_mut(&0).expect("a segment").kind
    }
    let require = |name: &'static str| {
        move |loaded: &mut Loaded| loaded.header.metadata.config.requirements.push(name.to_owned())
    };
    let crypt = |change: fn(&mut String, &mut u32, &mut u64, &mut Option<Value>)| {
        move |loaded: &mut Loaded| match segment(loaded) {
            SegmentKind::Crypt { encryption, sector_size, iv_tweak, integrity } => {
                change(encryption, sector_size, iv_tweak, integrity);
            }
            _ => panic!("not encrypted"),
        }
    };
    let refused: [(Change<'_>, &str); 8] = [
        (&require("online-reencrypt-v2"), "re-encryption"),
        (&require("offline-reencrypt"), "re-encryption"),
        (&require("opal"), "drive"),
        (&require("teleport"), "teleport"),
        (&|loaded| *segment(loaded) = SegmentKind::Unknown("hw-opal-crypt".to_owned()), "hw-opal-crypt"),
        (&|loaded| *segment(loaded) = SegmentKind::Unknown("tape".to_owned()), "tape"),
        (&crypt(|encryption, _, _, _| *encryption = "serpent-xts-plain64".to_owned()), "serpent-xts-plain64"),
        (&crypt(|_, _, _, integrity| *integrity = Some(json!({"type": "hmac(sha256)"}))), "hmac(sha256)"),
    ];
    for (change, name) in refused {
        refusal(areas(change), ErrorKind::Unsupported, &[name]);
    }
    refusal(areas(&crypt(|_, _, tweak, _| *tweak = 7)), ErrorKind::Invalid, &["counter 7"]);
    // A plain area can be described; it only occurs in re-encryption.
    let plain = areas(&|loaded| *segment(loaded) = SegmentKind::Linear).expect("described");
    assert_eq!(plain[0].cipher, None);
}

#[test]
fn what_is_no_volume_is_said_to_be_none() {
    let scene = Scene::new();
    for bytes in [0, 6, 591, 592, 4096, 100_000] {
        scene.sized("volume", bytes);
        let error = Header::load(&mut scene.device("volume")).expect_err("no volume");
        assert_eq!(
            (error.kind(), error.chain().as_str()),
            (ErrorKind::Unsupported, "not a LUKS volume: volume")
        );
        assert!(error.to_failure().hint.is_some_and(|hint| hint.contains("--format raw")));
    }
    scene.sized("volume", MIB);
    scene.overwrite("volume", 0, b"LUKS\xBA\xBE\x00\x03");
    refusal(Header::load(&mut scene.device("volume")), ErrorKind::Unsupported, &["version 3"]);
    scene.overwrite("volume", 0, b"RBDL\xBA\xBE\x00\x02");
    refusal(Header::load(&mut scene.device("volume")), ErrorKind::Unsupported, &["librbd"]);
    scene.overwrite("volume", 0, b"LUKS\xBA\xBE\x00\x01");
    refusal(Header::load(&mut scene.device("volume")), ErrorKind::Damaged, &["volume"]);
    scene.overwrite("volume", 0, b"LUKS\xBA\xBE\x00\x02");
    refusal(Header::load(&mut scene.device("volume")), ErrorKind::Damaged, &["volume"]);
}

// ---- changes of headers

#[test]
fn changes_are_read_by_cryptsetup_and_conflicts_are_refused() {
    if is_missing("cryptsetup") {
        return;
    }
    let scene = Scene::new();
    scene.format(QUICK);
    let (mut device, header) = scene.load("volume");
    let mut mine = loaded(header);
    let mut stale = mine.clone();
    let seqid = mine.header.seqid;
    mine.header.label = "changed".to_owned();
    store::write_luks2(&mut device, &mut mine).expect("written");
    assert_eq!(mine.header.seqid, seqid + 1);
    assert!(scene.cryptsetup("luksDump @/volume").contains("changed"));
    assert_eq!(loaded(scene.load("volume").1), mine);

    let before = std::fs::read(scene.path("volume")).expect("read");
    stale.header.label = "stale".to_owned();
    refusal(store::write_luks2(&mut device, &mut stale), ErrorKind::Conflict, &["changed by another"]);
    refusal(store::repair_luks2(&mut device, &mut stale), ErrorKind::Conflict, &["changed by another"]);
    let mut unwritable = mine.clone();
    unwritable.header.metadata.config.flags = vec!["x".repeat(20_000)];
    refusal(store::write_luks2(&mut device, &mut unwritable), ErrorKind::NoSpace, &[]);
    assert!(std::fs::read(scene.path("volume")).expect("read") == before, "a refused write wrote");
}

#[test]
fn repair_rewrites_the_bad_copy_alone() {
    if is_missing("cryptsetup") {
        return;
    }
    let scene = Scene::new();
    scene.format(QUICK);
    for (bad, offset) in [(0, 0), (1, 16384)] {
        scene.overwrite("volume", offset, &[0; 512]);
        let before = std::fs::read(scene.path("volume")).expect("read");
        let (mut device, header) = scene.load("volume");
        let mut loaded_header = loaded(header);
        let old = loaded_header.header.clone();
        store::repair_luks2(&mut device, &mut loaded_header).expect("repaired");
        assert_eq!(loaded_header.health, [Health::Good, Health::Good]);
        assert_eq!(loaded_header.header.seqid, old.seqid);
        assert_ne!(loaded_header.header.salts[bad], old.salts[1 - bad]);
        assert_eq!(loaded(scene.load("volume").1), loaded_header);
        let after = std::fs::read(scene.path("volume")).expect("read");
        let start = usize::try_from(offset).expect("an offset");
        let untouched = |index: usize| !(start..start + 16384).contains(&index);
        assert!(
            (0..after.len()).filter(|index| untouched(*index)).all(|index| after[index] == before[index])
        );
        scene.cryptsetup("open --test-passphrase --key-file @/key @/volume");
    }
}

#[test]
fn a_lock_keeps_others_out_and_ends_with_its_holder() {
    use std::time::Duration;
    let scene = Scene::new();
    scene.sized("volume", 0);
    let file = || File::open(scene.path("volume")).expect("opens");
    let soon = Duration::from_millis(50);
    let shared = store::lock(file(), "volume", false).expect("locked");
    let other = store::lock_within(file(), "volume", false, soon).expect("shared locks coexist");
    refusal(store::lock_within(file(), "volume", true, soon), ErrorKind::Conflict, &["volume"]);
    drop((shared, other));
    let exclusive = store::lock(file(), "volume", true).expect("locked");
    refusal(store::lock_within(file(), "volume", false, soon), ErrorKind::Conflict, &["locked"]);
    drop(exclusive);
    drop(store::lock_within(file(), "volume", false, soon).expect("free again"));
}
