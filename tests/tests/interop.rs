//! A second opinion on the bytes, by code that is not ours: dm-crypt of a real kernel, in a small virtual machine, and
//! OpenSSL through Python's `cryptography`. An absent tool is a loud skip.

use std::path::{Path, PathBuf};
use std::process::Command;

use tests::{Place, User, skip};

const MIB: usize = 1 << 20;

/// Runs a script with disks under a kernel that has dm-crypt, if this checkout has a neighbour that can.
fn guest() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests lies in the workspace");
    let named = std::env::var_os("GUEST_SH").map(PathBuf::from);
    let beside = root.join("../shared/components/guest.sh");
    named.or(Some(beside)).filter(|path| path.is_file())
}

/// One layout: our flags, and cryptsetup's for the same.
const LAYOUTS: [(&str, &str); 8] = [
    ("RAW", "--key-size 512"),
    ("RAW256", "--key-size 256"),
    ("RAW --sector-size 4096", "--key-size 512 --sector-size 4096"),
    ("RAW256 --sector-size 1024", "--key-size 256 --sector-size 1024"),
    ("RAW --sector-size 4096 --iv-large-sectors", "--key-size 512 --sector-size 4096 --iv-large-sectors"),
    ("RAW --iv-offset 4294967288", "--key-size 512 --skip 4294967288"),
    ("RAW --iv plain --iv-offset 4294967288", "--key-size 512 --cipher aes-xts-plain --skip 4294967288"),
    (
        "RAW --sector-size 4096 --iv-large-sectors --iv-offset 80",
        "--key-size 512 --sector-size 4096 --iv-large-sectors --skip 80",
    ),
];

#[test]
fn dm_crypt_opens_what_we_encrypt_and_we_decrypt_what_it_writes() {
    let Some(guest) = guest() else {
        return skip("no guest.sh to run a kernel with dm-crypt (name it with GUEST_SH)");
    };
    let place = Place::new(User::Me);
    // A real filesystem with a real file.
    std::fs::create_dir(place.path("tree")).expect("directory");
    std::fs::write(place.path("tree/greeting"), "read through dm-crypt\n").expect("file");
    let image = place.path("plain");
    std::fs::File::create(&image).and_then(|file| file.set_len(8 << 20)).expect("image");
    let made = place.shell("mke2fs -q -F -t ext4 -b 4096 -d @/tree @/plain");
    if made.code != Some(0) {
        return skip("no mke2fs");
    }
    let plain = place.read("plain");

    let (key, key32) = (place.home().join("key"), place.home().join("key32"));
    let mut command = Command::new(&guest);
    command.arg("-f").arg(format!("{}:key512", key.display()));
    command.arg("-f").arg(format!("{}:key256", key32.display()));
    // A disk we encrypted and an empty one for the kernel to encrypt, for each layout.
    let mut script = String::from(
        "check() { disk=$1 out=$2 bits=$3; shift 3\n\
         cryptsetup open --type plain --cipher aes-xts-plain64 --key-file key$bits \"$@\" $disk ours || return\n\
         echo \"sha $disk $(sha256sum < /dev/mapper/ours | cut -d' ' -f1)\"\n\
         mount -t ext4 -o ro /dev/mapper/ours /mnt && echo \"file $disk $(cat /mnt/greeting)\"; umount /mnt\n\
         cryptsetup open --type plain --cipher aes-xts-plain64 --key-file key$bits \"$@\" $out theirs || return\n\
         dd if=/dev/mapper/ours of=/dev/mapper/theirs bs=1M conv=fsync 2>/dev/null && echo \"wrote $out\"\n\
         cryptsetup close ours; cryptsetup close theirs; }\nmodprobe ext4\n",
    );
    for (n, (flags, theirs)) in LAYOUTS.iter().enumerate() {
        let _ = place.run(&format!("encrypt @/plain @/ours{n} {flags}")).done();
        std::fs::File::create(place.path(&format!("theirs{n}")))
            .and_then(|file| file.set_len(8 << 20))
            .expect("disk");
        for name in ["ours", "theirs"] {
            command.arg("-d").arg(place.path(&format!("{name}{n}")));
        }
        let disk = |at: usize| char::from(b'a' + u8::try_from(at).expect("16 disks"));
        let bits = if theirs.contains("256") { 256 } else { 512 };
        script.push_str(&format!(
            "check /dev/vd{} /dev/vd{} {bits} {theirs}\n",
            disk(2 * n),
            disk(2 * n + 1)
        ));
    }
    std::fs::write(place.path("script"), &script).expect("script");
    let output = command.arg(place.path("script")).output().expect("guest.sh runs");
    let text = String::from_utf8_lossy(&output.stdout);
    if output.status.code() == Some(125) {
        return skip(&format!("the guest did not start: {}", String::from_utf8_lossy(&output.stderr)));
    }
    let sum = place.shell("sha256sum < @/plain").done().text();
    let sum = sum.split_whitespace().next().expect("a sum");
    for (n, (flags, theirs)) in LAYOUTS.iter().enumerate() {
        let disk = |at: usize| format!("/dev/vd{}", char::from(b'a' + u8::try_from(at).expect("16 disks")));
        let (ours, out) = (disk(2 * n), disk(2 * n + 1));
        for line in [
            format!("sha {ours} {sum}"),
            format!("file {ours} read through dm-crypt"),
            format!("wrote {out}"),
        ] {
            assert!(text.lines().any(|said| said == line), "{flags}, {theirs}: no {line:?} in:\n{text}");
        }
        let _ = place.run(&format!("decrypt @/theirs{n} @/back {flags} --force")).done();
        assert!(place.read("back") == plain, "{flags}");
        let _ = place.run(&format!("verify @/plain @/theirs{n} {flags}")).done();
    }
}

#[test]
fn openssl_makes_the_same_bytes() {
    let place = Place::new(User::Me);
    let plain = place.noise("plain", MIB);
    let python = r#"
import sys
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
source, sink, key, unit, first, step = sys.argv[1:]
unit, first, step = int(unit), int(first), int(step)
key = open(key, "rb").read()
plain = open(source, "rb").read()
with open(sink, "wb") as out:
    for n in range(len(plain) // unit):
        tweak = (first + n * step).to_bytes(16, "little")
        xts = Cipher(algorithms.AES(key), modes.XTS(tweak)).encryptor()
        out.write(xts.update(plain[n * unit:(n + 1) * unit]) + xts.finalize())
"#;
    std::fs::write(place.path("openssl.py"), python).expect("script");
    // The environment's own Python: a bare PATH would miss the one with the package.
    let run = |words: &[String]| {
        Command::new("python3").arg(place.path("openssl.py")).args(words).output().map_err(|e| e.to_string())
    };
    for (flags, key, unit, first, step) in [
        ("RAW", "key", 512, 0_u64, 1),
        ("RAW256", "key32", 512, 0, 1),
        ("RAW --sector-size 4096", "key", 4096, 0, 8),
        ("RAW --sector-size 4096 --iv-large-sectors --iv-offset 80", "key", 4096, 10, 1),
        ("RAW256 --sector-size 2048 --iv-offset 4294967288", "key32", 2048, 4_294_967_288, 4),
    ] {
        let key = place.home().join(key).display().to_string();
        let path = |name: &str| place.path(name).display().to_string();
        let words =
            [path("plain"), path("theirs"), key, unit.to_string(), first.to_string(), step.to_string()];
        match run(&words) {
            Ok(output) if output.status.success() => {}
            other => return skip(&format!("no Python with the package `cryptography`: {other:?}")),
        }
        let _ = place.run(&format!("encrypt @/plain @/ours --force {flags}")).done();
        assert!(place.read("ours") == place.read("theirs"), "{flags}");
        let _ = place.run(&format!("decrypt @/theirs @/back --force {flags}")).done();
        assert!(place.read("back") == plain, "{flags}");
    }
}
