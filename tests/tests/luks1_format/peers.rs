//! Both ways: what cryptsetup and QEMU write, and what we write.

use std::path::{Path, PathBuf};

use engine::crypto::spec::CipherSpec;
use engine::crypto::{Kernel, Secret};
use engine::format::luks1::{HEADER_BYTES, Header};
use engine::units::DataUnit;
use tests::{Random, Scratch, skip};

use crate::{cryptsetup, cryptsetup_does, digest, is_installed, name, run, sample, secret, unwrap, wrapping};

/// Passphrases of keyslots 0, 1 and 5; the last one is no text.
const PASSPHRASES: [(usize, &[u8]); 3] =
    [(0, b"first"), (1, b"second, with a space"), (5, b"\x00\xff binary \n and more")];

/// The volume key as cryptsetup finds it with one passphrase.
fn key_by_cryptsetup(image: &Path, passphrase: &Path, dir: &Scratch) -> Vec<u8> {
    let file = dir.join("key");
    let _ = std::fs::remove_file(&file);
    let args = ["luksDump", "--dump-volume-key", "--volume-key-file", name(&file)];
    cryptsetup_does(&[&args[..], &["--key-file", name(passphrase), name(image)]].concat(), b"");
    std::fs::read(&file).expect("the volume key")
}

/// What stands in the header's text dump behind `label`.
fn dumped(dump: &str, label: &str) -> String {
    let line = dump.lines().find_map(|line| line.strip_prefix(label));
    line.unwrap_or_else(|| panic!("no {label:?} in {dump}")).trim().to_owned()
}

/// Parse, compare with cryptsetup's dump, write again, and open every keyslot.
fn compare(image: &Path, keyslots: &[(usize, &[u8])], dir: &Scratch, what: &str) -> Header {
    let bytes = std::fs::read(image).expect("image");
    assert!(Header::is_here(&bytes), "{what}");
    let header = Header::parse(&bytes).unwrap_or_else(|error| panic!("{what}: {error:?}"));
    assert_eq!(header.to_bytes(), bytes[..HEADER_BYTES], "{what}");
    assert_eq!(Header::repaired(&bytes).expect("valid"), (header.clone(), vec![]), "{what}");
    assert_eq!(header.qemu_objection(), None, "{what}");

    let dump = cryptsetup_does(&["luksDump", name(image)], b"");
    assert_eq!(dumped(&dump, "Cipher name:"), header.cipher_name, "{what}");
    assert_eq!(dumped(&dump, "Cipher mode:"), header.cipher_mode, "{what}");
    assert_eq!(dumped(&dump, "Hash spec:"), header.hash, "{what}");
    assert_eq!(dumped(&dump, "Payload offset:"), header.payload_sector.to_string(), "{what}");
    assert_eq!(dumped(&dump, "MK bits:"), (header.key_bytes * 8).to_string(), "{what}");
    assert_eq!(dumped(&dump, "MK iterations:"), header.digest_iterations.to_string(), "{what}");
    assert_eq!(dumped(&dump, "UUID:"), header.uuid, "{what}");
    for (index, keyslot) in header.keyslots.iter().enumerate() {
        let used = keyslots.iter().any(|(used, _)| *used == index);
        assert_eq!(keyslot.active, used, "{what}: keyslot {index}");
    }

    for (keyslot, passphrase) in keyslots {
        let key = unwrap(&header, *keyslot, passphrase, &bytes);
        let file = dir.file("passphrase", passphrase);
        assert_eq!(key.as_bytes(), key_by_cryptsetup(image, &file, dir), "{what}: keyslot {keyslot}");
        assert_eq!(digest(&header, &key), header.digest, "{what}: keyslot {keyslot}");
        let wrong = unwrap(&header, *keyslot, b"wrong", &bytes);
        assert_ne!(digest(&header, &wrong), header.digest, "{what}: keyslot {keyslot}");
    }
    header
}

/// A volume with three keyslots by cryptsetup: the file its header is in.
fn format_by_cryptsetup(args: &[&str], detached: bool, dir: &Scratch) -> PathBuf {
    let image = dir.file("image", b"");
    std::fs::File::options().write(true).open(&image).and_then(|file| file.set_len(8 << 20)).expect("room");
    let first = dir.file("first", PASSPHRASES[0].1);
    let fast = ["--pbkdf-force-iterations", "1000", "--key-file", name(&first)];
    let header = dir.join("header");
    let place = if detached { vec!["--header", name(&header)] } else { vec![] };
    let format = ["luksFormat", "--type", "luks1", name(&image)];
    cryptsetup_does(&[&format[..], &fast, &place, args].concat(), b"");
    let holder = if detached { header } else { image };
    for (keyslot, passphrase) in &PASSPHRASES[1..] {
        let new = dir.file("new", passphrase);
        let add = ["luksAddKey", "--pbkdf-force-iterations", "1234", "--key-file", name(&first)];
        let to = ["--key-slot", &keyslot.to_string(), name(&holder), name(&new)];
        cryptsetup_does(&[&add[..], &to].concat(), b"");
    }
    holder
}

#[test]
fn headers_and_keyslots_of_cryptsetup_are_read_and_written_the_same() {
    if !is_installed("cryptsetup") {
        return skip("no cryptsetup");
    }
    let cases: [(&[&str], bool, u32, u32); 10] = [
        (&["--key-size", "256"], false, 32, 4096),
        (&["--key-size", "512"], false, 64, 4096),
        (&["--key-size", "512", "--hash", "sha1"], false, 64, 4096),
        (&["--key-size", "256", "--hash", "sha224"], false, 32, 4096),
        (&["--key-size", "256", "--hash", "sha384"], false, 32, 4096),
        (&["--key-size", "512", "--hash", "sha512"], false, 64, 4096),
        (&["--key-size", "512", "--align-payload", "8192"], false, 64, 8192),
        (&["--key-size", "128", "--cipher", "aes-cbc-essiv:sha256"], false, 16, 2048),
        (&["--key-size", "256", "--cipher", "aes-cbc-plain64"], false, 32, 4096),
        (&["--key-size", "512"], true, 64, 0),
    ];
    for (args, detached, key_bytes, payload) in cases {
        let dir = Scratch::new();
        let image = format_by_cryptsetup(args, detached, &dir);
        let header = compare(&image, &PASSPHRASES, &dir, &format!("{args:?}"));
        assert_eq!((header.key_bytes, header.payload_sector), (key_bytes, payload), "{args:?}");
        assert_eq!(header.keyslots[5].iterations, 1234);
        // The material lies where we would put it, and a backup holds what cryptsetup's holds.
        let layout = Header::layout(key_bytes, payload).expect("a layout");
        let places = |header: &Header| header.keyslots.map(|keyslot| keyslot.material_sector);
        assert_eq!(places(&layout), places(&header), "{args:?}");
        let backup = dir.join("backup");
        cryptsetup_does(&["luksHeaderBackup", name(&image), "--header-backup-file", name(&backup)], b"");
        let backup = std::fs::read(&backup).expect("backup");
        assert_eq!(backup.len() as u64, header.backup_bytes(), "{args:?}");
        if payload != 0 {
            assert_eq!(payload.min(4096), Header::default_payload_sector(key_bytes), "{args:?}");
        }
    }
}

#[test]
fn keyslots_that_were_removed_leave_a_valid_header() {
    if !is_installed("cryptsetup") {
        return skip("no cryptsetup");
    }
    let dir = Scratch::new();
    let image = format_by_cryptsetup(&["--key-size", "512"], false, &dir);
    let first = dir.file("first", PASSPHRASES[0].1);
    cryptsetup_does(&["luksKillSlot", "--key-file", name(&first), name(&image), "1"], b"");
    let header = compare(&image, &[PASSPHRASES[0], PASSPHRASES[2]], &dir, "removed");
    assert_eq!((header.keyslots[1].iterations, header.keyslots[1].salt), (0, [0; 32]));
    cryptsetup_does(&["erase", name(&image)], b"");
    compare(&image, &[], &dir, "erased");
}

#[test]
fn headers_and_keyslots_of_qemu_are_read_and_written_the_same() {
    if !is_installed("qemu-img") || !is_installed("cryptsetup") {
        return skip("no qemu-img, or no cryptsetup to ask for its key");
    }
    let cases = [
        ("cipher-alg=aes-256,hash-alg=sha256", 64, 4040),
        ("cipher-alg=aes-128,hash-alg=sha1", 32, 2056),
        ("cipher-alg=aes-256,hash-alg=sha512,ivgen-alg=plain", 64, 4040),
        ("cipher-alg=aes-256,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256", 32, 2056),
    ];
    for (options, key_bytes, payload) in cases {
        let dir = Scratch::new();
        let image = dir.join("image");
        let passphrase = dir.file("qemu", b"a QEMU passphrase");
        let key = format!("secret,id=key,file={}", name(&passphrase));
        let options = format!("key-secret=key,iter-time=10,{options}");
        let args = ["create", "-q", "-f", "luks", "--object", &key, "-o", &options, name(&image), "1M"];
        let said = run("qemu-img", &args, b"").expect("installed");
        assert!(said.ok, "{options}: {}", said.text);
        let header = compare(&image, &[(0, b"a QEMU passphrase")], &dir, &options);
        assert_eq!((header.key_bytes, header.payload_sector), (key_bytes, payload), "{options}");
        Header::layout(key_bytes, payload).expect("QEMU's payload is one that we would accept too");
    }
}

/// An image with a header of ours, keyslots of ours and one 4096-byte piece of data of ours.
fn made_by_us(header: &mut Header, keyslots: &[(usize, &[u8])], key: &Secret, plain: &[u8]) -> Vec<u8> {
    header.digest = digest(header, key);
    let end = usize::try_from(header.backup_bytes()).expect("a length");
    let mut image = vec![0; end.max(header.payload_sector as usize * 512 + plain.len())];
    for (keyslot, passphrase) in keyslots {
        let place = &mut header.keyslots[*keyslot];
        (place.active, place.iterations, place.salt) =
            (true, 1500, [u8::try_from(*keyslot).expect("small"); 32]);
        let at = usize::try_from(place.material_offset()).expect("an offset");
        let material = wrapping(header, *keyslot).wrap(&secret(passphrase), key).expect("wrapped");
        image[at..at + material.len()].copy_from_slice(&material);
    }
    header.check().expect("ours is valid");
    image[..HEADER_BYTES].copy_from_slice(&header.to_bytes());
    if header.payload_sector != 0 {
        let spec = CipherSpec::parse(&header.cipher()).expect("a known cipher");
        let cipher = spec.build(Kernel::best().expect("a kernel"), key, 512, 0).expect("a cipher");
        let at = header.payload_sector as usize * 512;
        image[at..at + plain.len()].copy_from_slice(plain);
        cipher.encrypt(DataUnit(0), &mut image[at..at + plain.len()]);
    }
    image
}

#[test]
fn cryptsetup_and_qemu_open_what_we_write() {
    if !is_installed("cryptsetup") {
        return skip("no cryptsetup");
    }
    let with_qemu = is_installed("qemu-img") && is_installed("qemu-io");
    if !with_qemu {
        skip("no qemu-img and qemu-io: only cryptsetup opens our volumes");
    }
    let mut random = Random::new(11);
    let cases = [
        (64, "xts-plain64", "sha256", 4096),
        (64, "xts-plain64", "sha1", 4040),
        (32, "xts-plain64", "sha512", 2056),
        (32, "xts-plain", "sha384", 4096),
        (16, "cbc-essiv:sha256", "sha224", 2048),
        (64, "xts-plain64", "sha256", 0),
    ];
    for (key_bytes, mode, hash, payload) in cases {
        let what = format!("{mode} {hash} {key_bytes} {payload}");
        let mut header = Header {
            cipher_mode: mode.to_owned(),
            hash: hash.to_owned(),
            keyslots: Header::layout(key_bytes, payload).expect("a layout").keyslots,
            key_bytes,
            payload_sector: payload,
            ..sample()
        };
        let mut key = vec![0; key_bytes as usize];
        random.fill(&mut key);
        let keyslots: [(usize, &[u8]); 3] = [(0, b"zero"), (3, b"three"), (7, b"seven")];
        let bytes = made_by_us(&mut header, &keyslots, &secret(&key), &[0x5a; 4096]);
        assert_eq!(header.qemu_objection(), None, "{what}");

        let dir = Scratch::new();
        let image = dir.file("image", &bytes);
        for (keyslot, passphrase) in keyslots {
            let file = dir.file("passphrase", passphrase);
            assert_eq!(key_by_cryptsetup(&image, &file, &dir), key, "{what}: keyslot {keyslot}");
            let open = |keyslot: usize| {
                let data = dir.file("data", &[0; 4096]);
                let (place, keyslot) = (name(&image), keyslot.to_string());
                let mut args = vec!["open", "--test-passphrase", "--key-slot", &keyslot];
                args.extend(["--key-file", name(&file), "--header", place]);
                args.push(if payload == 0 { name(&data) } else { place });
                cryptsetup(&args, b"").expect("installed").ok
            };
            assert!(open(keyslot), "{what}: keyslot {keyslot}");
            assert!(!open((keyslot + 1) % 8), "{what}: a passphrase opens its own keyslot only");
            if with_qemu && payload != 0 {
                let object = format!("secret,id=key,file={}", name(&file));
                let options = format!("driver=luks,key-secret=key,file.filename={}", name(&image));
                let read = ["--object", &object, "-r", "--image-opts", &options, "-c", "read -P 0x5a 0 4096"];
                let said = run("qemu-io", &read, b"").expect("installed");
                let good = said.ok && said.text.contains("read 4096/4096") && !said.text.contains("failed");
                assert!(good, "{what}: keyslot {keyslot}: {}", said.text);
            }
        }
        if with_qemu && payload != 0 {
            let said = run("qemu-img", &["info", "-f", "luks", "--output=json", name(&image)], b"");
            let said = said.expect("installed");
            let info: serde_json::Value = serde_json::from_str(&said.text).expect("json");
            let data = &info["format-specific"]["data"];
            assert_eq!(data["uuid"], header.uuid, "{what}");
            assert_eq!(data["payload-offset"], payload * 512, "{what}");
            let active = data["slots"].as_array().expect("keyslots").iter();
            let active: Vec<bool> = active.map(|keyslot| keyslot["active"] == true).collect();
            assert_eq!(active, header.keyslots.map(|keyslot| keyslot.active), "{what}");
        }
        if !with_qemu {
            continue;
        }
        // Last, because the image is another one then: every tool reads what cryptsetup adds to our header.
        let zero = dir.file("zero", b"zero");
        let new = dir.file("new", b"added");
        let add =
            ["luksAddKey", "--pbkdf-force-iterations", "1000", "--key-file", name(&zero), "--key-slot", "1"];
        cryptsetup_does(&[&add[..], &[name(&image), name(&new)]].concat(), b"");
        let bytes = std::fs::read(&image).expect("image");
        let header = Header::parse(&bytes).expect("still valid");
        assert_eq!(unwrap(&header, 1, b"added", &bytes).as_bytes(), key, "{what}");
    }
}
