//! LUKS volumes between us and the tools everybody else uses, in both directions and every shape: cryptsetup (LUKS2 by its own
//! crypto, no device-mapper), qemu-img and nbdkit (LUKS1). A volume that opens proves little: each test compares the whole plaintext.
//! An absent tool is a loud skip.

use proto::luks::Version;
use serde_json::{Value, json};
use tests::luks::{
    CHEAP_ARGON2ID, CHEAP_PBKDF2, SMALL_HEADER, Shape, can_open, cryptsetup_opens, doctor, dump, empty,
    encrypted_by_cryptsetup, fill_by_qemu, have, luks1_field, luks2_json, opens_with_only, qemu_adds_key,
    qemu_info, qemu_removes_key, read_by_cryptsetup, read_by_nbdkit, read_by_qemu, secret, uuid, volume_key,
};
use tests::{Place, User};

/// Uneven in MiB, even in data units.
const LENGTH: usize = (3 << 20) + 4096;

/// A plaintext and four passphrases.
fn prepared() -> (Place, Vec<u8>) {
    let place = Place::new(User::Me);
    secret(&place, "pass", b"correct horse battery staple");
    secret(&place, "pass2", b"a second one");
    secret(&place, "pass3", b"and a third");
    secret(&place, "wrong", b"correct horse battery stapler");
    let plain = place.noise("plain", LENGTH);
    (place, plain)
}

/// Our decrypt and our verify agree that this is the plaintext.
fn we_read(place: &Place, volume: &str, key: &str, plain: &[u8]) {
    let _ = place.run(&format!("decrypt @/{volume} @/back --force --key file:@/{key}")).done();
    assert!(place.read("back") == plain, "{volume}: decrypt");
    let _ = place.run(&format!("verify @/plain @/{volume} --key file:@/{key}")).done();
}

/// Nobody gets in with this one: cryptctl's exit code says so.
fn we_refuse(place: &Place, volume: &str, key: &str) {
    let decrypt = format!("decrypt @/{volume} @/never --key file:@/{key}");
    let _ = place.run(&decrypt).exit(4, &["wrong key or damaged data"]);
    let _ = place
        .run(&format!("luks open-test @/{volume} --key file:@/{key}"))
        .exit(4, &["wrong key or damaged data"]);
    assert!(!place.path("never").exists(), "{volume}: something was written");
}

/// There is no keyslot left.
fn nobody_opens(place: &Place, volume: &str, key: &str) {
    let theirs = format!("cryptsetup open --test-passphrase --key-file @/{key} @/{volume}");
    let _ = place.shell(&theirs).exit(1, &["no usable keyslot"]);
    let _ = place.run(&format!("decrypt @/{volume} @/never --key file:@/{key}")).exit(1, &["no keyslot"]);
    assert!(!place.path("never").exists(), "{volume}: something was written");
}

/// The tools for its version read this plaintext.
fn they_read(place: &Place, version: u32, volume: &str, key: &str, plain: &[u8]) {
    if version == 1 {
        assert!(read_by_qemu(place, volume, key) == plain, "{volume}: qemu-img");
        assert!(read_by_nbdkit(place, volume, key) == plain, "{volume}: nbdkit");
    } else {
        assert!(read_by_cryptsetup(place, volume, key, plain.len()) == plain, "{volume}: cryptsetup");
    }
}

/// A header has this shape, says cryptsetup; and our dump and cryptsetup's tell the same.
fn has_shape(place: &Place, volume: &str, shape: Shape) {
    let ours = dump(place, &format!("@/{volume}"));
    let summary = &ours.summary;
    assert_eq!(summary.uuid, uuid(place, volume), "{shape:?}");
    let [segment] = summary.segments.as_slice() else { panic!("one segment: {summary:?}") };
    let [slot] = summary.keyslots.as_slice() else { panic!("one keyslot: {summary:?}") };
    assert_eq!((segment.kind.as_str(), segment.cipher.as_str()), ("crypt", "aes-xts-plain64"), "{shape:?}");
    assert_eq!((segment.data_unit, segment.tweak_offset, segment.key_bits), (shape.unit, 0, shape.bits));
    assert_eq!((slot.id, slot.kdf.as_str(), slot.key_bits, slot.bound), (0, shape.kdf, shape.bits, true));
    if shape.version == 1 {
        assert_eq!(summary.version, Version::Luks1);
        let field = |name| luks1_field(place, volume, name);
        let number = |name| field(name).parse::<u64>().expect("a number");
        assert_eq!((field("Version").as_str(), field("Cipher name").as_str()), ("1", "aes"));
        assert_eq!((field("Cipher mode").as_str(), field("Hash spec").as_str()), ("xts-plain64", "sha256"));
        assert_eq!(number("MK bits"), u64::from(shape.bits));
        assert_eq!(number("Payload offset") * 512, segment.offset);
        assert_eq!(field("Key Slot 0"), "ENABLED");
        assert_eq!(slot.iterations, 1000);
        return;
    }
    assert_eq!(summary.version, Version::Luks2);
    let theirs = luks2_json(place, volume);
    assert_eq!(ours.metadata, theirs, "{shape:?}");
    assert_eq!(theirs["segments"]["0"]["sector_size"], json!(shape.unit));
    assert_eq!(theirs["segments"]["0"]["encryption"], json!("aes-xts-plain64"));
    assert_eq!(theirs["segments"]["0"]["offset"], json!(segment.offset.to_string()));
    let slot = &theirs["keyslots"]["0"];
    assert_eq!(slot["key_size"], json!(shape.bits / 8));
    assert_eq!(slot["kdf"]["type"], json!(shape.kdf));
    if shape.kdf == "pbkdf2" {
        assert_eq!(slot["kdf"]["iterations"], json!(1000));
    } else {
        let costs = ["time", "memory", "cpus"].map(|name| slot["kdf"][name].clone());
        assert_eq!(costs, [json!(4), json!(32), json!(1)]);
    }
    assert_eq!(theirs["digests"]["0"]["segments"], json!(["0"]));
    assert_eq!(theirs["digests"]["0"]["keyslots"], json!(["0"]));
}

/// What every header of ours or theirs must be good for.
fn is_understood(place: &Place, volume: &str, shape: Shape) {
    has_shape(place, volume, shape);
    opens_with_only(place, volume, "pass", "wrong");
    let tested = place.run(&format!("luks open-test @/{volume} --key file:@/pass")).done();
    assert!(format!("{}{}", tested.text(), tested.stderr).contains("keyslot 0"), "{tested:?}");
    we_refuse(place, volume, "wrong");
    let doctor = doctor(place, &format!("@/{volume}"));
    assert!(can_open(&doctor, "cryptsetup") && can_open(&doctor, "kernel"), "{doctor:?}");
    assert!(can_open(&doctor, "cryptctl"), "{doctor:?}");
    for tool in ["qemu", "nbdkit"] {
        assert_eq!(can_open(&doctor, tool), shape.version == 1, "{doctor:?}");
    }
}

fn ours_are_theirs(shapes: &[Shape]) {
    let (place, plain) = prepared();
    for &shape in shapes {
        eprintln!("{shape:?}");
        let words = format!("encrypt @/plain @/ours --force {} --key file:@/pass", shape.ours());
        let _ = place.run(&words).done();
        is_understood(&place, "ours", shape);
        we_read(&place, "ours", "pass", &plain);
        they_read(&place, shape.version, "ours", "pass", &plain);
        // Cryptsetup's idea of the volume key opens it too.
        let key = volume_key(&place, "ours", "pass", "volume.key");
        assert_eq!(key.len() * 8, usize::try_from(shape.bits).expect("small"));
        let _ = place.run("decrypt @/ours @/back --force --volume-key file:@/volume.key").done();
        assert!(place.read("back") == plain, "{shape:?}: by volume key");
    }
}

#[test]
fn tools_read_every_luks1_volume_of_ours() {
    if have(&["cryptsetup", "qemu-img", "nbdkit", "nbdcopy"]) {
        ours_are_theirs(&Shape::LUKS1);
    }
}

#[test]
fn cryptsetup_reads_every_luks2_volume_of_ours_with_data_units_of_512_bytes() {
    if have(&["cryptsetup"]) {
        ours_are_theirs(&Shape::LUKS2[..4]);
    }
}

#[test]
fn cryptsetup_reads_every_luks2_volume_of_ours_with_data_units_of_4096_bytes() {
    if have(&["cryptsetup"]) {
        ours_are_theirs(&Shape::LUKS2[4..]);
    }
}

/// The data of two volumes, header cut off.
fn same_data(place: &Place, ours: (&str, usize), theirs: (&str, usize)) -> bool {
    let [ours, theirs] = [ours, theirs].map(|(name, header)| place.read(name)[header..].to_vec());
    ours == theirs
}

#[test]
fn we_read_every_luks1_volume_of_theirs() {
    if !have(&["cryptsetup", "qemu-img", "nbdkit", "nbdcopy"]) {
        return;
    }
    let (place, plain) = prepared();
    for shape in Shape::LUKS1 {
        eprintln!("{shape:?}");
        // The header by cryptsetup, the data by QEMU.
        empty(&place, "theirs", SMALL_HEADER + LENGTH);
        let format = format!("cryptsetup luksFormat {} --key-file @/pass @/theirs", shape.theirs());
        let _ = place.shell(&format).done();
        fill_by_qemu(&place, "plain", None, "theirs", "pass");
        is_understood(&place, "theirs", shape);
        they_read(&place, 1, "theirs", "pass", &plain);
        we_read(&place, "theirs", "pass", &plain);
        // With their volume key our data are theirs, bit by bit.
        let _ = volume_key(&place, "theirs", "pass", "volume.key");
        let words = format!(
            "encrypt @/plain @/ours --force {} --key file:@/pass2 --volume-key file:@/volume.key",
            shape.ours()
        );
        let _ = place.run(&words).done();
        assert!(same_data(&place, ("ours", SMALL_HEADER), ("theirs", SMALL_HEADER)), "{shape:?}");
        assert_eq!(volume_key(&place, "ours", "pass2", "other.key"), place.read("volume.key"));
    }
}

#[test]
fn we_read_every_luks2_volume_of_theirs() {
    if !have(&["cryptsetup"]) {
        return;
    }
    let (place, plain) = prepared();
    for shape in Shape::LUKS2 {
        eprintln!("{shape:?}");
        encrypted_by_cryptsetup(&place, "plain", "theirs", "pass", &shape.theirs());
        is_understood(&place, "theirs", shape);
        we_read(&place, "theirs", "pass", &plain);
        let _ = volume_key(&place, "theirs", "pass", "volume.key");
        let words = format!(
            "encrypt @/plain @/ours --force {} --key file:@/pass2 --volume-key file:@/volume.key",
            shape.ours()
        );
        let _ = place.run(&words).done();
        // Ours has cryptsetup's default header.
        assert!(same_data(&place, ("ours", 16 << 20), ("theirs", SMALL_HEADER)), "{shape:?}");
        assert_eq!(volume_key(&place, "ours", "pass2", "other.key"), place.read("volume.key"));
    }
}

#[test]
fn default_costs_are_cryptsetups_and_open_on_both_sides() {
    if !have(&["cryptsetup"]) {
        return;
    }
    let (place, plain) = prepared();
    let _ = place.run("encrypt @/plain @/ours --key file:@/pass").done();
    let json = luks2_json(&place, "ours");
    let kdf = &json["keyslots"]["0"]["kdf"];
    assert_eq!(kdf["type"], json!("argon2id"));
    // 1 GiB, unless half of this machine's memory is less or the two seconds were over earlier.
    assert!(kdf["memory"].as_u64().is_some_and(|kib| (64 << 10..=1 << 20).contains(&kib)), "{kdf}");
    assert!(kdf["time"].as_u64().is_some_and(|time| time >= 4), "{kdf}");
    assert_eq!(json["segments"]["0"]["offset"], json!("16777216"));
    assert_eq!(json["segments"]["0"]["sector_size"], json!(4096));
    assert_eq!(json["config"]["keyslots_size"], json!("16744448"));
    they_read(&place, 2, "ours", "pass", &plain);
    let _ = place.run("decrypt @/ours @/back --key file:@/pass").done();
    assert!(place.read("back") == plain);

    encrypted_by_cryptsetup(&place, "plain", "theirs", "pass", "--batch-mode --type luks2");
    let _ = place.run("verify @/plain @/theirs --key file:@/pass").done();
}

#[test]
fn options_of_a_new_header_are_on_the_disk() {
    if !have(&["cryptsetup"]) {
        return;
    }
    let (place, plain) = prepared();
    let chosen = "0f8fad5b-d9cb-469f-a165-70867728950e";
    for (options, offset, keyslots) in [
        ("--luks2-metadata-size 64k --luks2-keyslots-size 1M --data-offset 4M", 4 << 20, 1 << 20),
        ("--luks2-keyslots-size 512k --data-offset 1M --hash sha512 --key-slot 5", 1 << 20, 512 << 10),
        ("--data-offset 24M --cipher aes-xts-plain", 24 << 20, 16_744_448),
    ] {
        let _ = place
            .run(&format!(
                "encrypt @/plain @/ours --force --format luks2 {CHEAP_PBKDF2} --key file:@/pass --label name \
                 --subsystem group --uuid {chosen} {options}"
            ))
            .done();
        let text = place.shell("cryptsetup luksDump @/ours").done().text();
        for line in [format!("UUID: {chosen}"), "Label: name".to_owned(), "Subsystem: group".to_owned()] {
            let said = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(text.lines().any(|found| said(found) == line), "{line:?} in:\n{text}");
        }
        let json = luks2_json(&place, "ours");
        assert_eq!(json["segments"]["0"]["offset"], json!(offset.to_string()), "{options}");
        if !options.contains("24M") {
            assert_eq!(json["config"]["keyslots_size"], json!(keyslots.to_string()), "{options}");
        }
        if options.contains("sha512") {
            assert_eq!(json["digests"]["0"]["hash"], json!("sha512"));
            assert_eq!(json["keyslots"]["5"]["af"]["hash"], json!("sha512"));
            assert_eq!(json["keyslots"]["5"]["kdf"]["hash"], json!("sha512"));
        }
        they_read(&place, 2, "ours", "pass", &plain);
        we_read(&place, "ours", "pass", &plain);
    }
    let _ = place
        .run(&format!(
            "encrypt @/plain @/ours --force --format luks1 {CHEAP_PBKDF2} --key file:@/pass --uuid {chosen} --hash sha512 \
             --key-slot 7 --data-offset 3M --key-size 256"
        ))
        .done();
    let field = |name| luks1_field(&place, "ours", name);
    assert_eq!((field("UUID").as_str(), field("Hash spec").as_str()), (chosen, "sha512"));
    assert_eq!((field("Payload offset").as_str(), field("Key Slot 7").as_str()), ("6144", "ENABLED"));
    they_read(&place, 1, "ours", "pass", &plain);
    we_read(&place, "ours", "pass", &plain);
}

#[test]
fn cryptsetup_changes_the_keyslots_of_ours() {
    if !have(&["cryptsetup", "qemu-img", "nbdkit", "nbdcopy"]) {
        return;
    }
    let (place, plain) = prepared();
    for shape in [Shape::luks1(512), Shape::luks2(4096, 512, "argon2id")] {
        let _ =
            place.run(&format!("encrypt @/plain @/ours --force {} --key file:@/pass", shape.ours())).done();
        let _ = std::fs::remove_file(place.path("backup"));
        let cryptsetup = |words: &str| {
            let _ = place.shell(&format!("cryptsetup --batch-mode {words}")).done();
        };
        cryptsetup(&format!("luksAddKey {CHEAP_PBKDF2} --key-slot 3 --key-file @/pass @/ours @/pass2"));
        we_read(&place, "ours", "pass", &plain);
        we_read(&place, "ours", "pass2", &plain);
        cryptsetup("luksHeaderBackup --header-backup-file @/backup @/ours");
        cryptsetup(&format!("luksChangeKey {CHEAP_PBKDF2} --key-file @/pass @/ours @/pass3"));
        we_refuse(&place, "ours", "pass");
        we_read(&place, "ours", "pass3", &plain);
        cryptsetup("luksKillSlot --key-file @/pass3 @/ours 3");
        we_refuse(&place, "ours", "pass2");
        we_read(&place, "ours", "pass3", &plain);
        they_read(&place, shape.version, "ours", "pass3", &plain);
        // Their backup of our header, put back by us.
        let _ = place.run("luks erase @/ours --yes-destroy-all-keys").done();
        nobody_opens(&place, "ours", "pass3");
        let _ = place.run("luks header-restore @/ours @/backup").done();
        for key in ["pass", "pass2"] {
            assert!(cryptsetup_opens(&place, "ours", key), "{shape:?}: restored");
            we_read(&place, "ours", key, &plain);
        }
        they_read(&place, shape.version, "ours", "pass2", &plain);
    }
}

#[test]
fn we_change_the_keyslots_of_theirs() {
    if !have(&["cryptsetup", "qemu-img", "nbdkit", "nbdcopy"]) {
        return;
    }
    let (place, plain) = prepared();
    for shape in [Shape::luks1(256), Shape::luks2(512, 512, "pbkdf2")] {
        if shape.version == 1 {
            empty(&place, "theirs", SMALL_HEADER + LENGTH);
            let format = format!("cryptsetup luksFormat {} --key-file @/pass @/theirs", shape.theirs());
            let _ = place.shell(&format).done();
            fill_by_qemu(&place, "plain", None, "theirs", "pass");
        } else {
            encrypted_by_cryptsetup(&place, "plain", "theirs", "pass", &shape.theirs());
        }
        let _ = std::fs::remove_file(place.path("backup"));
        let ours = |words: &str| {
            let _ = place.run(&format!("luks {words}")).done();
        };
        ours(&format!("add-key @/theirs --key file:@/pass --new-key file:@/pass2 {CHEAP_PBKDF2}"));
        opens_with_only(&place, "theirs", "pass2", "wrong");
        opens_with_only(&place, "theirs", "pass", "wrong");
        ours("header-backup @/theirs @/backup");
        ours(&format!("change-key @/theirs --key file:@/pass --new-key file:@/pass3 {CHEAP_PBKDF2}"));
        opens_with_only(&place, "theirs", "pass3", "pass");
        ours("remove-key @/theirs --key file:@/pass2");
        opens_with_only(&place, "theirs", "pass3", "pass2");
        if shape.version == 2 {
            ours(&format!("convert-kdf @/theirs --key file:@/pass3 {CHEAP_ARGON2ID}"));
            let slots = luks2_json(&place, "theirs")["keyslots"].clone();
            let slots: Vec<&Value> = slots.as_object().expect("an object").values().collect();
            assert_eq!(slots.len(), 1, "{slots:?}");
            assert_eq!(slots[0]["kdf"]["type"], json!("argon2id"));
            opens_with_only(&place, "theirs", "pass3", "wrong");
        } else {
            ours("convert-kdf @/theirs --key file:@/pass3 --pbkdf pbkdf2 --pbkdf-force-iterations 2000");
            let text = place.shell("cryptsetup luksDump @/theirs").done().text();
            assert_eq!(text.matches("ENABLED").count(), 1, "{text}");
            let iterations = text.lines().find_map(|line| line.trim().strip_prefix("Iterations:"));
            assert_eq!(iterations.map(str::trim), Some("2000"), "{text}");
        }
        they_read(&place, shape.version, "theirs", "pass3", &plain);
        we_read(&place, "theirs", "pass3", &plain);
        // Our backup of their header, put back by cryptsetup.
        let _ = place.shell("cryptsetup luksErase --batch-mode @/theirs").done();
        nobody_opens(&place, "theirs", "pass3");
        let restore = "cryptsetup luksHeaderRestore --batch-mode --header-backup-file @/backup @/theirs";
        let _ = place.shell(restore).done();
        for key in ["pass", "pass2"] {
            assert!(cryptsetup_opens(&place, "theirs", key), "{shape:?}: restored");
            we_read(&place, "theirs", key, &plain);
        }
    }
}

#[test]
fn header_backups_of_luks2_are_the_same_file() {
    if !have(&["cryptsetup"]) {
        return;
    }
    let (place, _) = prepared();
    let shape = Shape::luks2(4096, 512, "pbkdf2");
    let _ = place.run(&format!("encrypt @/plain @/ours {} --key file:@/pass", shape.ours())).done();
    let _ = place.run("luks header-backup @/ours @/backup.ours").done();
    let _ = place.shell("cryptsetup luksHeaderBackup --header-backup-file @/backup.theirs @/ours").done();
    assert!(place.read("backup.ours") == place.read("backup.theirs"));
}

#[test]
fn qemus_luks1_volumes_are_ours_and_back() {
    if !have(&["cryptsetup", "qemu-img", "nbdkit", "nbdcopy"]) {
        return;
    }
    let (place, plain) = prepared();
    // The defaults put the data behind 4040 sectors; a 256-bit key ends the header at 2056.
    for (options, bits, sectors) in [("", 512, 4040), (",cipher-alg=aes-128", 256, 2056)] {
        let _ = place
            .shell(&format!(
                "qemu-img create -q -f luks --object secret,id=key,file=@/pass \
                 -o key-secret=key,iter-time=10{options} @/theirs {LENGTH}"
            ))
            .done();
        fill_by_qemu(&place, "plain", None, "theirs", "pass");
        let summary = dump(&place, "@/theirs").summary;
        assert_eq!((summary.segments[0].offset, summary.segments[0].key_bits), (sectors * 512, bits));
        assert_eq!(summary.uuid, uuid(&place, "theirs"));
        let opinion = doctor(&place, "@/theirs");
        assert!(can_open(&opinion, "qemu") && can_open(&opinion, "cryptsetup"), "{opinion:?}");
        we_read(&place, "theirs", "pass", &plain);
        we_refuse(&place, "theirs", "wrong");
        // A key of theirs, found by us; a key of ours, found by them.
        qemu_adds_key(&place, "theirs", "pass", "pass2");
        we_read(&place, "theirs", "pass2", &plain);
        let add = "luks add-key @/theirs --key file:@/pass2 --new-key file:@/pass3";
        let _ = place.run(&format!("{add} {CHEAP_PBKDF2}")).done();
        they_read(&place, 1, "theirs", "pass3", &plain);
        let slots = qemu_info(&place, "theirs", "pass")["slots"].clone();
        let active: Vec<bool> = slots
            .as_array()
            .expect("a list")
            .iter()
            .map(|slot| slot["active"].as_bool().expect("a boolean"))
            .collect();
        assert_eq!(active, [true, true, true, false, false, false, false, false]);
        // A keyslot of theirs destroyed by us, one of ours by them.
        let _ = place.run("luks remove-key @/theirs --key file:@/pass2").done();
        assert!(!cryptsetup_opens(&place, "theirs", "pass2"));
        qemu_removes_key(&place, "theirs", "pass", "pass3");
        we_refuse(&place, "theirs", "pass3");
        they_read(&place, 1, "theirs", "pass", &plain);
        we_read(&place, "theirs", "pass", &plain);
    }
}

#[test]
fn qemu_changes_the_keyslots_of_ours() {
    if !have(&["cryptsetup", "qemu-img", "nbdkit", "nbdcopy"]) {
        return;
    }
    let (place, plain) = prepared();
    for (shape, cipher) in [(Shape::luks1(512), "aes-256"), (Shape::luks1(256), "aes-128")] {
        let _ =
            place.run(&format!("encrypt @/plain @/ours --force {} --key file:@/pass", shape.ours())).done();
        let info = qemu_info(&place, "ours", "pass");
        let said = ["cipher-alg", "cipher-mode", "ivgen-alg", "hash-alg"].map(|name| info[name].clone());
        assert_eq!(said, [cipher, "xts", "plain64", "sha256"].map(|text| json!(text)));
        assert_eq!(info["payload-offset"], json!(2 << 20));
        assert_eq!(info["uuid"], json!(dump(&place, "@/ours").summary.uuid));
        qemu_adds_key(&place, "ours", "pass", "pass2");
        we_read(&place, "ours", "pass2", &plain);
        qemu_removes_key(&place, "ours", "pass2", "pass");
        we_refuse(&place, "ours", "pass");
        they_read(&place, 1, "ours", "pass2", &plain);
        opens_with_only(&place, "ours", "pass2", "pass");
    }
}

#[test]
fn a_passphrase_is_every_byte_of_its_file() {
    if !have(&["cryptsetup", "qemu-img"]) {
        return;
    }
    let (place, plain) = prepared();
    secret(&place, "line", b"a line\n");
    secret(&place, "text", b"a line");
    let binary: Vec<u8> = (0..=255).rev().collect();
    secret(&place, "binary", &binary);
    secret(&place, "cut", &binary[..255]);
    for shape in [Shape::luks1(512), Shape::luks2(512, 512, "argon2id")] {
        for (right, wrong) in [("line", "text"), ("text", "line"), ("binary", "cut"), ("cut", "binary")] {
            let _ = place
                .run(&format!("encrypt @/plain @/ours --force {} --key file:@/{right}", shape.ours()))
                .done();
            opens_with_only(&place, "ours", right, wrong);
            we_refuse(&place, "ours", wrong);
            empty(&place, "theirs", SMALL_HEADER);
            let small = if shape.version == 1 {
                "--offset 4096"
            } else {
                "--offset 4096 --luks2-metadata-size 16k --luks2-keyslots-size 1M"
            };
            let format =
                format!("cryptsetup luksFormat {} {small} --key-file @/{right} @/theirs", shape.theirs());
            let _ = place.shell(&format).done();
            let _ = place.run(&format!("luks open-test @/theirs --key file:@/{right}")).done();
            we_refuse(&place, "theirs", wrong);
        }
        we_read(&place, "ours", "cut", &plain);
    }
}

#[test]
fn cryptsetup_converts_ours_to_the_other_version() {
    if !have(&["cryptsetup", "qemu-img", "nbdkit", "nbdcopy"]) {
        return;
    }
    let (place, plain) = prepared();
    for (shape, other) in [(Shape::luks1(512), 2), (Shape::luks2(512, 256, "pbkdf2"), 1)] {
        let _ =
            place.run(&format!("encrypt @/plain @/ours --force {} --key file:@/pass", shape.ours())).done();
        let _ = place.shell(&format!("cryptsetup convert --batch-mode --type luks{other} @/ours")).done();
        has_shape(&place, "ours", Shape { version: other, ..shape });
        we_read(&place, "ours", "pass", &plain);
        // A keyslot of ours in a converted header.
        let add = "luks add-key @/ours --key file:@/pass --new-key file:@/pass2";
        let _ = place.run(&format!("{add} {CHEAP_PBKDF2}")).done();
        they_read(&place, other, "ours", "pass2", &plain);
    }
}

#[test]
fn tokens_and_labels_are_cryptsetups_too() {
    if !have(&["cryptsetup"]) {
        return;
    }
    let (place, plain) = prepared();
    let shape = Shape::luks2(4096, 512, "pbkdf2");
    let _ = place.run(&format!("encrypt @/plain @/ours {} --key file:@/pass", shape.ours())).done();
    let token = json!({"type": "somebodys", "keyslots": ["0"], "where": {"deep": [1, "two"]}});
    place.write("token", token.to_string().as_bytes());
    let _ = place.run("luks token add @/ours --json-file @/token").done();
    let _ = place.shell("cryptsetup token import --token-id 7 --json-file @/token @/ours").done();
    for id in [0, 7] {
        let exported = place.shell(&format!("cryptsetup token export --token-id {id} @/ours")).done();
        assert_eq!(serde_json::from_slice::<Value>(&exported.stdout).expect("JSON"), token);
    }
    let ours = "luks token add @/ours --key-ref barbican:one --rotate-by 2031-01-31 --token-id 3";
    let _ = place.run(ours).done();
    let tokens = luks2_json(&place, "ours")["tokens"].clone();
    assert_eq!(tokens["3"]["ref"], json!("barbican:one"));
    assert_eq!(dump(&place, "@/ours").metadata["tokens"], tokens);
    let _ = place.run("luks token remove @/ours --token-id 0").done();
    let _ = place.shell("cryptsetup token remove --token-id 7 @/ours").done();
    let left = luks2_json(&place, "ours")["tokens"].clone();
    assert_eq!(left.as_object().expect("an object").keys().collect::<Vec<_>>(), ["3"]);
    let _ = place
        .shell("cryptsetup config --label theirs --subsystem both --priority prefer --key-slot 0 @/ours")
        .done();
    let summary = dump(&place, "@/ours").summary;
    assert_eq!((summary.label.as_str(), summary.subsystem.as_str()), ("theirs", "both"));
    assert_eq!(summary.keyslots[0].priority, "prefer");
    they_read(&place, 2, "ours", "pass", &plain);
    we_read(&place, "ours", "pass", &plain);
}
