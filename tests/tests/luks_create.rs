//! LUKS volumes made here, beside the programs that define what that means: cryptsetup opens them with the same key and would
//! have made the same header, and QEMU reads the data.

use engine::crypto::Kernel;
use engine::units::DataUnit;
use engine::volume::Header;
use engine::volume::create::{self, NewHeader, Place};
use proto::ErrorKind;
use proto::luks::{New, Version};
use serde_json::{Value, json};
use tests::scene::{MIB, PASSPHRASE, QUICK, Scene, command, is_missing, open, open_with, refusal, secret};
use tests::{Random, seed};

const FILE: Place = Place { detached: false, header_capacity: None, data_capacity: None, align: 1 };

fn wish(version: Version, fields: Value) -> New {
    let mut object = json!({"version": version, "kdf": {"kind": "pbkdf2", "iterations": 1000}});
    let fields = match fields {
        Value::Object(fields) => fields,
        _ => panic!("not an object"),
    };
    object.as_object_mut().expect("an object").extend(fields);
    serde_json::from_value(object).expect("a wish")
}

fn make(scene: &Scene, new: &New, place: &Place) -> NewHeader {
    let made = create::make(new, place, &secret(PASSPHRASE), None);
    let made = made.unwrap_or_else(|error| panic!("{new:?}: {}", error.chain()));
    let mut device = scene.device("volume");
    made.clear(&mut device).expect("cleared");
    made.write(&mut device).expect("written");
    made
}

/// cryptsetup opens it with the same key, and so do we.
fn assert_opens(scene: &Scene, name: &str, made: &NewHeader) {
    scene.cryptsetup(&format!("open --test-passphrase --key-file @/key @/{name}"));
    assert!(scene.volume_key(name, "") == made.key.as_bytes(), "another key");
    scene.dir.file("wrong", b"battery staple");
    assert!(
        !scene
            .try_cryptsetup(&format!("open --test-passphrase --key-file @/wrong @/{name}"))
            .status
            .success()
    );
    let opened = open(scene, name).expect("opens");
    assert_eq!(opened.keyslot, Some(made.keyslot));
    assert!(opened.key == made.key);
}

#[test]
fn volumes_made_here_open_in_cryptsetup() {
    if is_missing("cryptsetup") {
        return;
    }
    let argon2 = |kind: &str, lanes: u32| json!({"kdf": {"kind": kind, "iterations": 4, "memory_kib": 64, "lanes": lanes}});
    let wishes = [
        (Version::Luks1, json!({})),
        (Version::Luks1, json!({"key_bytes": 32, "hash": "sha512", "keyslot": 7})),
        (Version::Luks1, json!({"cipher": "aes-xts-plain", "keyslot": 6, "hash": "sha1"})),
        (Version::Luks1, json!({"data_offset": 4040 * 512})),
        (Version::Luks2, json!({})),
        (Version::Luks2, json!({"key_bytes": 32, "data_unit": 512, "hash": "sha512", "keyslot": 31})),
        (Version::Luks2, json!({"label": "a".repeat(47), "subsystem": "sub-ä", "data_unit": 2048})),
        (Version::Luks2, json!({"metadata_bytes": 4 << 20, "data_offset": 18 << 20})),
        (Version::Luks2, json!({"data_offset": 548_864})),
        (Version::Luks2, json!({"uuid": "4F1C2D3E-5A6B-4C7D-8E9F-0A1B2C3D4E5F"})),
        (Version::Luks2, argon2("argon2id", 1)),
        (Version::Luks2, argon2("argon2id", 2)),
        (Version::Luks2, argon2("argon2id", 3)),
        (Version::Luks2, argon2("argon2id", 4)),
        (Version::Luks2, argon2("argon2i", 1)),
        (Version::Luks2, argon2("argon2i", 4)),
    ];
    for (version, fields) in wishes {
        let scene = Scene::new();
        scene.sized("volume", 20 * MIB);
        let new = wish(version, fields);
        let made = make(&scene, &new, &FILE);
        assert_opens(&scene, "volume", &made);
        let uuid = scene.cryptsetup("luksUUID @/volume");
        assert_eq!(uuid.trim(), made.header.uuid());
        if let Some(asked) = &new.uuid {
            assert_eq!(made.header.uuid(), asked.to_lowercase());
        }
        assert_eq!(scene.load("volume").1, made.header, "what was made is what is read");
        // What cryptsetup writes next it can still read, and so can we.
        scene.dir.file("other", b"battery staple");
        scene.cryptsetup(&format!("luksAddKey --key-file @/key {QUICK} @/volume @/other"));
        let opened = open_with(&scene, "volume", b"battery staple", None).expect("opens");
        assert!(opened.key == made.key);
    }
}

/// A header without what is random or measured.
fn comparable(mut metadata: Value) -> Value {
    let blank = |object: &mut Value, field: &str| {
        assert!(object[field].is_string(), "{object} has no {field}");
        object[field] = json!("");
    };
    for keyslot in metadata["keyslots"].as_object_mut().expect("keyslots").values_mut() {
        blank(&mut keyslot["kdf"], "salt");
    }
    for digest in metadata["digests"].as_object_mut().expect("digests").values_mut() {
        blank(digest, "salt");
        blank(digest, "digest");
    }
    metadata
}

#[test]
fn luks2_headers_equal_those_of_cryptsetup_for_the_same_wish() {
    if is_missing("cryptsetup") {
        return;
    }
    for (words, fields) in [
        ("", json!({})),
        ("--key-size 256", json!({"key_bytes": 32})),
        ("--hash sha512 --sector-size 512", json!({"hash": "sha512", "data_unit": 512})),
        ("--offset 36864", json!({"data_offset": 18 << 20})),
        ("--luks2-metadata-size 128k", json!({"metadata_bytes": 128 << 10})),
        ("--luks2-keyslots-size 1m", json!({"keyslots_bytes": 1 << 20})),
        ("--key-slot 4 --label x", json!({"keyslot": 4, "label": "x"})),
    ] {
        let scene = Scene::new();
        scene.format(&format!("--type luks2 {QUICK} {words}"));
        let theirs = comparable(scene.metadata("volume"));
        scene.sized("volume", 20 * MIB);
        make(&scene, &wish(Version::Luks2, fields), &FILE);
        let ours = comparable(scene.metadata("volume"));
        // As text: the order of the fields counts, too.
        assert_eq!(ours.to_string(), theirs.to_string(), "{words}");
    }
}

#[test]
fn luks1_headers_equal_those_of_cryptsetup_for_the_same_wish() {
    if is_missing("cryptsetup") {
        return;
    }
    for (words, fields) in [
        ("", json!({})),
        ("--key-size 256 --hash sha512", json!({"key_bytes": 32, "hash": "sha512"})),
        ("--offset 8192 --key-slot 6", json!({"data_offset": 4 << 20, "keyslot": 6})),
    ] {
        let scene = Scene::new();
        scene.format(&format!("--type luks1 {QUICK} {words}"));
        let header = |scene: &Scene| {
            let mut bytes = std::fs::read(scene.path("volume")).expect("read")[..592].to_vec();
            // Digest with its salt, UUID, salts of keyslots.
            let random = [112..164, 168..208]
                .into_iter()
                .chain((0..8).map(|id| 208 + 48 * id + 8..208 + 48 * id + 40));
            random.for_each(|range| bytes[range].fill(0));
            bytes
        };
        let theirs = header(&scene);
        scene.sized("volume", 20 * MIB);
        make(&scene, &wish(Version::Luks1, fields), &FILE);
        assert!(header(&scene) == theirs, "{words}: {:x?} {:x?}", header(&scene), theirs);
    }
}

#[test]
fn a_given_volume_key_is_used_and_bad_ones_are_refused() {
    if is_missing("cryptsetup") {
        return;
    }
    let mut key = [0; 64];
    Random::new(seed()).fill(&mut key);
    for version in [Version::Luks1, Version::Luks2] {
        let scene = Scene::new();
        scene.sized("volume", 20 * MIB);
        let new = wish(version, json!({}));
        let made = create::make(&new, &FILE, &secret(PASSPHRASE), Some(secret(&key))).expect("made");
        made.write(&mut scene.device("volume")).expect("written");
        assert!(scene.volume_key("volume", "") == key);
        let bad: [&[u8]; 4] = [&key[..63], &key[..32], &[], &[7; 64]];
        for bad in bad {
            let made = create::make(&new, &FILE, &secret(PASSPHRASE), Some(secret(bad)));
            refusal(made, ErrorKind::Invalid, &["volume key"]);
        }
    }
}

#[test]
fn a_streamed_header_opens_like_a_written_one() {
    if is_missing("cryptsetup") {
        return;
    }
    for (version, fields) in [
        (Version::Luks1, json!({})),
        (Version::Luks1, json!({"keyslot": 6, "data_offset": 5 << 20})),
        (Version::Luks2, json!({})),
        (Version::Luks2, json!({"data_offset": 18 << 20, "keyslots_bytes": 1 << 20})),
    ] {
        let scene = Scene::new();
        let new = wish(version, fields);
        let made = create::make(&new, &FILE, &secret(PASSPHRASE), None).expect("made");
        let mut stream = Vec::new();
        made.stream(&mut |bytes| {
            stream.extend_from_slice(bytes);
            Ok(())
        })
        .expect("streamed");
        assert_eq!(stream.len() as u64, made.data.offset);
        stream.resize(stream.len() + 4096, 0);
        std::fs::write(scene.path("volume"), &stream).expect("written");
        assert_opens(&scene, "volume", &made);
    }
}

#[test]
fn detached_headers_made_here_open_in_cryptsetup() {
    if is_missing("cryptsetup") {
        return;
    }
    for version in [Version::Luks1, Version::Luks2] {
        let scene = Scene::new();
        scene.sized("volume", 0);
        let place = Place { detached: true, ..FILE };
        let made = make(&scene, &wish(version, json!({})), &place);
        assert_eq!(made.data.offset, 0);
        let bytes = std::fs::metadata(scene.path("volume")).expect("metadata").len();
        assert_eq!(bytes, made.header_bytes);
        assert_opens(&scene, "volume", &made);
        let mut streamed = 0;
        made.stream(&mut |bytes| {
            streamed += bytes.len() as u64;
            Ok(())
        })
        .expect("streamed");
        assert_eq!(streamed, made.header_bytes);
    }
}

#[test]
fn clearing_leaves_nothing_of_an_old_header() {
    if is_missing("cryptsetup") {
        return;
    }
    // The old second copy lies where the new volume has its data.
    for (old, new) in [
        ("--type luks2 --luks2-metadata-size 4m", json!({"data_offset": 1 << 20})),
        ("--type luks2", json!({})),
        ("--type luks1", json!({})),
    ] {
        let scene = Scene::new();
        scene.format(&format!("{old} {QUICK}"));
        let made = create::make(&wish(Version::Luks2, new), &FILE, &secret(PASSPHRASE), None).expect("made");
        let mut device = scene.device("volume");
        made.clear(&mut device).expect("cleared");
        refusal(Header::load(&mut device), ErrorKind::Unsupported, &["not a LUKS volume"]);
        assert!(!scene.try_cryptsetup("isLuks @/volume").status.success());
    }
}

#[test]
fn qemu_reads_luks1_volumes_made_here() {
    if is_missing("cryptsetup") || is_missing("qemu-img") {
        return;
    }
    for fields in [json!({}), json!({"key_bytes": 32, "hash": "sha512"}), json!({"keyslot": 7})] {
        let scene = Scene::new();
        scene.sized("volume", 3 * MIB);
        let place = Place { header_capacity: Some(3 * MIB), data_capacity: Some(3 * MIB), ..FILE };
        let made = make(&scene, &wish(Version::Luks1, fields), &place);
        let cipher = made.data.cipher.expect("encrypted");
        let kernel = Kernel::best().expect("a kernel");
        let cipher =
            cipher.spec.build(kernel, &made.key, cipher.unit_bytes, cipher.offset_sectors).expect("a cipher");
        let mut plain = vec![0; usize::try_from(3 * MIB - made.data.offset).expect("a length")];
        Random::new(seed()).fill(&mut plain);
        let mut payload = plain.clone();
        cipher.encrypt(DataUnit(0), &mut payload);
        scene.overwrite("volume", made.data.offset, &payload);

        let dir = scene.dir.path().display();
        let secret = format!("secret,id=s,file={dir}/key");
        let image = format!("driver=luks,key-secret=s,file.filename={dir}/volume");
        let output = command("qemu-img")
            .args(["info", "--object", &secret, "--image-opts", &image, "--output=json"])
            .output()
            .expect("qemu-img runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let info: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!(info["virtual-size"], json!(plain.len()));
        assert_eq!(info["format-specific"]["data"]["uuid"], json!(made.header.uuid()));
        let output = command("qemu-img")
            .args(["convert", "--object", &secret, "--image-opts", &image, "-O", "raw"])
            .arg(scene.path("plain"))
            .output()
            .expect("qemu-img runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(std::fs::read(scene.path("plain")).expect("read") == plain, "another plaintext");
    }
}
