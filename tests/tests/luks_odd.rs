//! LUKS volumes that are not what one makes today: headers elsewhere, damaged, or in several segments; ciphers and key derivations of old
//! volumes; volumes amid a re-encryption; and volumes that come and go through pipes. Real tools are on the other side wherever one
//! has such volumes.

use std::process::Command;

use serde_json::json;
use tests::luks::{
    CHEAP_ARGON2ID, CHEAP_PBKDF2, SEGMENTS, SMALL_HEADER, Shape, cut_into_segments, doctor, dump, empty,
    encrypted_by_cryptsetup, fill_by_qemu, have, luks1_field, luks2_json, opens_with_only,
    read_by_cryptsetup, read_by_nbdkit, read_by_qemu, read_detached_by_cryptsetup, read_detached_by_qemu,
    secret, volume_key,
};
use tests::{Place, User, skip};

const MIB: usize = 1 << 20;

/// A plaintext and two passphrases.
fn prepared() -> (Place, Vec<u8>) {
    let place = Place::new(User::Me);
    secret(&place, "pass", b"correct horse battery staple");
    secret(&place, "wrong", b"incorrect horse");
    let plain = place.noise("plain", 3 * MIB + 4096);
    (place, plain)
}

/// Our decrypt and our verify agree that this is the plaintext. `words`: the volume, and options.
fn we_read(place: &Place, words: &str, plain: &[u8]) {
    let (volume, options) = words.split_once(' ').unwrap_or((words, ""));
    let _ = place.run(&format!("decrypt @/{volume} @/back --force --key file:@/pass {options}")).done();
    assert!(place.read("back") == plain, "{words}: decrypt");
    let _ = place.run(&format!("verify @/plain @/{volume} --key file:@/pass {options}")).done();
}

/// Change bytes of a file.
fn damage(place: &Place, name: &str, at: usize) {
    let mut bytes = place.read(name);
    for byte in &mut bytes[at..at + 16] {
        *byte ^= 0x5A;
    }
    place.write(name, &bytes);
}

#[test]
fn old_ciphers_of_luks1_are_read() {
    if !have(&["cryptsetup", "qemu-img", "nbdkit", "nbdcopy"]) {
        return;
    }
    let (place, plain) = prepared();
    for (cipher, bits) in [
        ("aes-cbc-essiv:sha256", 256),
        ("aes-cbc-essiv:sha256", 128),
        ("aes-cbc-plain64", 256),
        ("aes-cbc-plain", 128),
        ("aes-xts-plain", 512),
    ] {
        empty(&place, "theirs", SMALL_HEADER);
        let _ = place
            .shell(&format!(
                "cryptsetup luksFormat --batch-mode --type luks1 {CHEAP_PBKDF2} --cipher {cipher} --key-size {bits} \
                 --hash sha1 --key-file @/pass @/theirs"
            ))
            .done();
        let sectors: usize = luks1_field(&place, "theirs", "Payload offset").parse().expect("a number");
        empty_tail(&place, "theirs", sectors * 512 + plain.len());
        fill_by_qemu(&place, "plain", None, "theirs", "pass");
        assert!(read_by_qemu(&place, "theirs", "pass") == plain, "{cipher}: qemu-img");
        // nbdkit knows no ESSIV.
        if !cipher.contains("essiv") {
            assert!(read_by_nbdkit(&place, "theirs", "pass") == plain, "{cipher}: nbdkit");
        }
        let summary = dump(&place, "@/theirs").summary;
        assert_eq!((summary.segments[0].cipher.as_str(), summary.segments[0].key_bits), (cipher, bits));
        we_read(&place, "theirs", &plain);
        let _ = place.run("luks open-test @/theirs --key file:@/pass").done();
        let _ = place.run("luks open-test @/theirs --key file:@/wrong").exit(4, &["wrong key"]);
        let _ = doctor(&place, "@/theirs");
    }
}

/// Make a file longer.
fn empty_tail(place: &Place, name: &str, length: usize) {
    let file = std::fs::File::options().write(true).open(place.path(name)).expect("opened");
    file.set_len(u64::try_from(length).expect("a length")).expect("longer");
}

#[test]
fn old_ciphers_and_argon2i_of_luks2_are_read() {
    if !have(&["cryptsetup"]) {
        return;
    }
    let (place, plain) = prepared();
    let argon2i = CHEAP_ARGON2ID.replace("argon2id", "argon2i");
    for (cipher, bits, unit) in [
        ("aes-cbc-essiv:sha256", 256, 512),
        ("aes-cbc-plain64", 128, 512),
        ("aes-xts-plain64", 512, 4096),
        ("aes-xts-plain64", 256, 1024),
    ] {
        encrypted_by_cryptsetup(
            &place,
            "plain",
            "theirs",
            "pass",
            &format!(
                "--batch-mode --type luks2 --cipher {cipher} --key-size {bits} --sector-size {unit} {argon2i}"
            ),
        );
        let ours = dump(&place, "@/theirs");
        assert_eq!(ours.metadata, luks2_json(&place, "theirs"));
        assert_eq!(
            (ours.summary.segments[0].cipher.as_str(), ours.summary.keyslots[0].kdf.as_str()),
            (cipher, "argon2i")
        );
        we_read(&place, "theirs", &plain);
        let _ = doctor(&place, "@/theirs");
        // An argon2i keyslot of ours, opened by them.
        let add = format!("luks add-key @/theirs --key file:@/pass --new-key file:@/wrong {argon2i}");
        let _ = place.run(&add).done();
        assert_eq!(luks2_json(&place, "theirs")["keyslots"]["1"]["kdf"]["type"], json!("argon2i"));
        assert!(read_by_cryptsetup(&place, "theirs", "wrong", plain.len()) == plain, "{cipher}");
    }
}

#[test]
fn detached_headers_of_luks1_go_both_ways() {
    if !have(&["cryptsetup", "qemu-img"]) {
        return;
    }
    let (place, plain) = prepared();
    let shape = Shape::luks1(512);
    let _ = place
        .run(&format!("encrypt @/plain @/ours --header @/ours.header {} --key file:@/pass", shape.ours()))
        .done();
    assert_eq!(place.read("ours").len(), plain.len());
    assert_eq!(luks1_field(&place, "ours.header", "Payload offset"), "0");
    opens_with_only(&place, "ours.header", "pass", "wrong");
    assert!(read_detached_by_qemu(&place, Some("ours.header"), "ours", "pass") == plain);
    we_read(&place, "ours --header @/ours.header", &plain);

    empty(&place, "theirs", plain.len());
    let _ = place
        .shell(&format!(
            "cryptsetup luksFormat {} --key-file @/pass --header @/theirs.header @/theirs",
            shape.theirs()
        ))
        .done();
    fill_by_qemu(&place, "plain", Some("theirs.header"), "theirs", "pass");
    we_read(&place, "theirs --header @/theirs.header", &plain);
    let _ = place.run("luks open-test @/theirs --header @/theirs.header --key file:@/pass").done();
    // Without its header it is noise, and refused as such.
    let _ =
        place.run("decrypt @/theirs @/never --key file:@/pass").exit(2, &["not a luks volume", "--header"]);
    assert!(!place.path("never").exists());
}

#[test]
fn detached_headers_of_luks2_go_both_ways() {
    if !have(&["cryptsetup"]) {
        return;
    }
    let (place, plain) = prepared();
    for shape in [Shape::luks2(512, 512, "pbkdf2"), Shape::luks2(4096, 256, "argon2id")] {
        let _ = std::fs::remove_file(place.path("ours.header"));
        let _ = place
            .run(&format!(
                "encrypt @/plain @/ours --force --header @/ours.header {} --key file:@/pass",
                shape.ours()
            ))
            .done();
        assert_eq!(place.read("ours").len(), plain.len());
        opens_with_only(&place, "ours.header", "pass", "wrong");
        assert_eq!(luks2_json(&place, "ours.header")["segments"]["0"]["offset"], json!("0"));
        assert!(read_detached_by_cryptsetup(&place, "ours.header", "ours", "pass") == plain, "{shape:?}");
        we_read(&place, "ours --header @/ours.header", &plain);

        let _ = place
            .shell(&format!(
                "rm -f @/theirs.header; cp @/plain @/theirs && cryptsetup reencrypt --encrypt --force-offline-reencrypt \
                 --header @/theirs.header {} --key-file @/pass @/theirs",
                shape.theirs()
            ))
            .done();
        assert_eq!(
            dump(&place, "@/theirs --header @/theirs.header").metadata,
            luks2_json(&place, "theirs.header")
        );
        we_read(&place, "theirs --header @/theirs.header", &plain);
        // The same volume key makes the same data.
        let _ = volume_key(&place, "theirs.header", "pass", "volume.key");
        let _ = place
            .run(&format!(
                "encrypt @/plain @/same --force --header @/same.header {} --key file:@/wrong \
                 --volume-key file:@/volume.key",
                shape.ours()
            ))
            .done();
        assert!(place.read("same") == place.read("theirs"), "{shape:?}");
        std::fs::remove_file(place.path("same.header")).expect("removed");
    }
}

#[test]
fn a_damaged_header_copy_harms_nobody_and_is_repaired() {
    if !have(&["cryptsetup"]) {
        return;
    }
    let (place, plain) = prepared();
    let shape = Shape::luks2(4096, 512, "argon2id");
    let _ = place.run(&format!("encrypt @/plain @/ours {} --key file:@/pass", shape.ours())).done();
    encrypted_by_cryptsetup(&place, "plain", "theirs", "pass", &shape.theirs());
    for volume in ["ours", "theirs"] {
        let healthy = place.read(volume);
        // The JSON of the primary copy, its binary header, the JSON of the secondary copy.
        for at in [4096 + 8, 16, 0x4000 + 4096 + 8] {
            place.write(volume, &healthy);
            damage(&place, volume, at);
            let damaged = place.read(volume);
            we_read(&place, volume, &plain);
            let found = doctor(&place, &format!("@/{volume}"));
            assert!(found.findings.iter().any(|finding| finding.about == "header"), "{found:?}");
            assert!(place.read(volume) == damaged, "reading changes nothing");
            let _ = place.run(&format!("luks repair @/{volume}")).done();
            let copies = dump(&place, &format!("@/{volume}")).summary.copies;
            assert_eq!(copies, ["good", "good"], "{volume} at {at}");
            // Each copy alone is enough for cryptsetup now.
            for other in [4096 + 8, 0x4000 + 4096 + 8] {
                let repaired = place.read(volume);
                damage(&place, volume, other);
                opens_with_only(&place, volume, "pass", "wrong");
                place.write(volume, &repaired);
            }
            assert!(read_by_cryptsetup(&place, volume, "pass", plain.len()) == plain, "{volume} at {at}");
        }
        // Both copies: nobody opens it.
        place.write(volume, &healthy);
        damage(&place, volume, 4096 + 8);
        damage(&place, volume, 0x4000 + 4096 + 8);
        let _ = place.run(&format!("decrypt @/{volume} @/never --key file:@/pass")).exit(1, &["luks2"]);
        assert!(!place.path("never").exists());
        // A keyslot: the right passphrase cannot be told from a wrong one.
        place.write(volume, &healthy);
        damage(&place, volume, 0x8000 + 4096);
        let _ = place
            .run(&format!("decrypt @/{volume} @/never --key file:@/pass"))
            .exit(4, &["wrong key or damaged data"]);
        assert!(!place.path("never").exists());
    }
}

#[test]
fn a_volume_amid_a_reencryption_is_refused_by_name() {
    if !have(&["cryptsetup"]) {
        return;
    }
    let (place, plain) = prepared();
    let _ = place
        .run(&format!("encrypt @/plain @/ours {} --key file:@/pass", Shape::luks2(512, 512, "pbkdf2").ours()))
        .done();
    let reencrypt = "cryptsetup reencrypt --batch-mode --force-offline-reencrypt --key-file @/pass";
    let _ = place.shell(&format!("{reencrypt} --init-only {CHEAP_PBKDF2} @/ours")).done();
    let before = place.read("ours");
    for words in [
        "decrypt @/ours @/never --key file:@/pass",
        "verify @/plain @/ours --key file:@/pass",
        "luks add-key @/ours --key file:@/pass --new-key file:@/wrong --pbkdf pbkdf2 --pbkdf-force-iterations 1000",
        "luks change-key @/ours --key file:@/pass --new-key file:@/wrong --pbkdf pbkdf2 --pbkdf-force-iterations 1000",
    ] {
        let _ = place.run(words).exit(2, &["online-reencrypt-v2"]);
    }
    assert!(place.read("ours") == before && !place.path("never").exists());
    assert_eq!(dump(&place, "@/ours").summary.requirements, ["online-reencrypt-v2"]);
    let said = doctor(&place, "@/ours");
    assert!(said.findings.iter().any(|finding| finding.about == "reencryption"), "{said:?}");
    // Cryptsetup brings it to its end, and it is an ordinary volume again.
    let _ = place.shell(&format!("{reencrypt} --resume-only @/ours")).done();
    we_read(&place, "ours", &plain);
}

/// Encrypts each segment by OpenSSL: `source key out unit cipher length …` with 0 for the rest.
const PYTHON: &str = r#"
import hashlib, sys
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
source, key, out = sys.argv[1:4]
key, plain = open(key, "rb").read(), open(source, "rb").read()
def once(algorithm, mode, data):
    cipher = Cipher(algorithm, mode).encryptor()
    return cipher.update(data) + cipher.finalize()
with open(out, "wb") as sink:
    at = 0
    for text in sys.argv[4:]:
        cipher, unit, length = text.split(",")
        unit, length = int(unit), int(length) or len(plain) - at
        for start in range(at, at + length, unit):
            counter = (start // 512).to_bytes(16, "little")
            if cipher.startswith("aes-xts"):
                algorithm, mode = algorithms.AES(key), modes.XTS(counter)
            else:
                essiv = algorithms.AES(hashlib.sha256(key).digest())
                algorithm, mode = algorithms.AES(key), modes.CBC(once(essiv, modes.ECB(), counter))
            sink.write(once(algorithm, mode, plain[start:start + unit]))
        at += length
"#;

#[test]
fn several_segments_are_one_plaintext() {
    if !have(&["cryptsetup"]) {
        return;
    }
    let (place, plain) = prepared();
    let shape = Shape::luks2(512, 256, "pbkdf2");
    let _ = place.run(&format!("encrypt @/plain @/ours {} --key file:@/pass", shape.ours())).done();
    let data = cut_into_segments(&place, "ours");
    let theirs = luks2_json(&place, "ours");
    for (id, (cipher, unit, _)) in SEGMENTS.iter().enumerate() {
        let segment = &theirs["segments"][id.to_string()];
        assert_eq!((&segment["encryption"], &segment["sector_size"]), (&json!(cipher), &json!(unit)));
    }
    opens_with_only(&place, "ours", "pass", "wrong");
    assert_eq!(dump(&place, "@/ours").metadata, theirs);

    let _ = volume_key(&place, "ours", "pass", "volume.key");
    place.write("openssl.py", PYTHON.as_bytes());
    let mut python = Command::new("python3");
    python.args(["openssl.py", "plain", "volume.key", "ciphertext"].map(|name| place.path(name)));
    python.args(SEGMENTS.map(|(cipher, unit, length)| format!("{cipher},{unit},{length}")));
    match python.output() {
        Ok(output) if output.status.success() => {}
        other => return skip(&format!("no Python with the package `cryptography`: {other:?}")),
    }
    let mut volume = place.read("ours");
    volume[data..].copy_from_slice(&place.read("ciphertext"));
    place.write("ours", &volume);
    we_read(&place, "ours", &plain);
    // As a stream too.
    let streamed = place.shell("cat @/ours | $CTL decrypt - - --key file:@/pass").done();
    assert!(streamed.stdout == plain);
    // One byte of each segment is noticed.
    for at in [data, data + MIB + 4096, data + 2 * MIB] {
        damage(&place, "ours", at);
        let _ = place.run("verify @/plain @/ours --key file:@/pass").exit(5, &[]);
        place.write("ours", &volume);
    }
}

#[test]
fn volumes_come_and_go_through_pipes() {
    if !have(&["cryptsetup", "qemu-img"]) {
        return;
    }
    let (place, plain) = prepared();
    for shape in [Shape::luks1(512), Shape::luks2(512, 256, "pbkdf2"), Shape::luks2(4096, 512, "argon2id")] {
        let flags = format!("{} --key file:@/pass", shape.ours());
        for script in [
            format!("cat @/plain | $CTL encrypt - @/ours --force {flags}"),
            format!("$CTL encrypt @/plain - {flags} | cat > @/ours"),
            format!("cat @/plain | $CTL encrypt - - {flags} | cat > @/ours"),
        ] {
            let _ = place.shell(&script).done();
            let theirs = if shape.version == 1 {
                read_by_qemu(&place, "ours", "pass")
            } else {
                read_by_cryptsetup(&place, "ours", "pass", plain.len())
            };
            assert!(theirs == plain, "{script}");
            for script in [
                "$CTL decrypt @/ours - --key file:@/pass | cat",
                "cat @/ours | $CTL decrypt - - --key file:@/pass | cat",
                "cat @/ours | $CTL decrypt - @/back --force --key file:@/pass && cat @/back",
            ] {
                assert!(place.shell(script).done().stdout == plain, "{shape:?}: {script}");
            }
            let _ = place.shell("$CTL decrypt @/ours - --key file:@/pass | cmp - @/plain").done();
            let wrong = place.shell("cat @/ours | $CTL decrypt - - --key file:@/wrong");
            assert!(wrong.exit(4, &["wrong key or damaged data"]).stdout.is_empty());
        }
    }
}
