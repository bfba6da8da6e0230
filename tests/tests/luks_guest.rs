//! The last word on a LUKS volume: dm-crypt of a real kernel, in a small virtual machine. It mounts what is in our volumes, and we read
//! what it wrote. Where no such machine can be started the tests are skipped loudly.

use std::path::PathBuf;
use std::process::Command;

use tests::guest::{disk, guest, run, says};
use tests::luks::{SEGMENTS, Shape, cut_into_segments, empty, have, secret, volume_key};
use tests::{Place, User};

const MIB: usize = 1 << 20;

/// What to open, and the options cryptsetup and we need to do so.
const SHAPES: [Shape; 6] = [
    Shape::luks1(256),
    Shape::luks1(512),
    Shape::luks2(512, 512, "pbkdf2"),
    Shape::luks2(512, 256, "argon2id"),
    Shape::luks2(4096, 256, "pbkdf2"),
    Shape::luks2(4096, 512, "argon2id"),
];

/// The volume that is made into several segments for the kernel to write.
const SEGMENTED: Shape = Shape::luks2(512, 256, "argon2id");

/// A place with a passphrase and a plaintext: a filesystem with a file.
fn prepared() -> Option<(PathBuf, Place)> {
    let guest = guest()?;
    if !have(&["cryptsetup", "mke2fs"]) {
        return None;
    }
    let place = Place::new(User::Me);
    secret(&place, "pass", b"correct horse battery staple");
    std::fs::create_dir(place.path("tree")).expect("directory");
    std::fs::write(place.path("tree/greeting"), "read through dm-crypt\n").expect("file");
    empty(&place, "plain", 8 * MIB);
    let _ = place.shell("mke2fs -q -F -t ext4 -b 4096 -d @/tree @/plain").done();
    Some((guest, place))
}

#[test]
fn dm_crypt_mounts_what_is_in_our_volumes() {
    let Some((guest, place)) = prepared() else { return };
    let mut command = Command::new(guest);
    let mut script = String::from(
        "modprobe ext4\n\
         check() { disk=$1; shift\n\
         cryptsetup open --key-file pass \"$@\" $disk ours || return\n\
         echo \"sha $disk $(sha256sum < /dev/mapper/ours | cut -d' ' -f1)\"\n\
         mount -t ext4 -o ro /dev/mapper/ours /mnt && echo \"file $disk $(cat /mnt/greeting)\"; umount /mnt\n\
         cryptsetup close ours; }\n",
    );
    for (n, shape) in SHAPES.into_iter().enumerate() {
        let words = format!("encrypt @/plain @/ours{n} {} --key file:@/pass", shape.ours());
        let _ = place.run(&words).done();
        command.arg("-d").arg(place.path(&format!("ours{n}")));
        script.push_str(&format!("check {}\n", disk(n)));
    }
    // The header of the last one is elsewhere.
    let last = SHAPES.len();
    let shape = Shape::luks2(4096, 512, "pbkdf2");
    let _ = place
        .run(&format!("encrypt @/plain @/detached --header @/header {} --key file:@/pass", shape.ours()))
        .done();
    command.arg("-d").arg(place.path("detached"));
    command.arg("-f").arg(format!("{}:header", place.path("header").display()));
    script.push_str(&format!("check {} --header header\n", disk(last)));

    let Some(text) = run(&place, command, &script) else { return };
    let sum = place.shell("sha256sum < @/plain").done().text();
    let sum = sum.split_whitespace().next().expect("a sum");
    for (n, shape) in SHAPES.into_iter().chain([shape]).enumerate() {
        let about = format!("{shape:?}");
        says(&text, &format!("sha {} {sum}", disk(n)), &about);
        says(&text, &format!("file {} read through dm-crypt", disk(n)), &about);
    }
}

#[test]
fn we_read_what_dm_crypt_wrote() {
    let Some((guest, place)) = prepared() else { return };
    let mut command = Command::new(guest);
    command.arg("-d").arg(format!("{},ro", place.path("plain").display()));
    let mut script = String::from(
        "write() { cryptsetup open --key-file pass $1 theirs || return\n\
         dd if=/dev/vda of=/dev/mapper/theirs bs=1M conv=fsync 2>/dev/null && echo \"wrote $1\"\n\
         cryptsetup close theirs; }\n",
    );
    for (n, shape) in SHAPES.into_iter().enumerate() {
        let header = if shape.version == 1 { 2 * MIB } else { 16 * MIB };
        empty(&place, &format!("theirs{n}"), header + 8 * MIB);
        let _ = place
            .shell(&format!("cryptsetup luksFormat {} --key-file @/pass @/theirs{n}", shape.theirs()))
            .done();
        command.arg("-d").arg(place.path(&format!("theirs{n}")));
        script.push_str(&format!("write {}\n", disk(n + 1)));
    }
    script.push_str(&segments(&place, &mut command, SHAPES.len() + 1));
    let Some(text) = run(&place, command, &script) else { return };
    let plain = place.read("plain");
    for (n, shape) in SHAPES.into_iter().chain([SEGMENTED]).enumerate() {
        says(&text, &format!("wrote {}", disk(n + 1)), &format!("{shape:?}"));
        let _ = place.run(&format!("decrypt @/theirs{n} @/back --force --key file:@/pass")).done();
        let back = place.read("back");
        let differs = back.iter().zip(&plain).position(|(one, other)| one != other);
        assert!(
            differs.is_none() && back.len() == plain.len(),
            "from byte {differs:?} on, disk {}, {shape:?}:\n{text}",
            disk(n + 1)
        );
        let _ = place.run(&format!("verify @/plain @/theirs{n} --key file:@/pass")).done();
    }
}

/// A volume of several segments as the n-th disk, and what writes it: one device-mapper target for each segment. Cryptsetup maps several
/// segments only while it re-encrypts; of this header it would map the first one, over everything.
fn segments(place: &Place, command: &mut Command, n: usize) -> String {
    let name = format!("theirs{}", n - 1);
    empty(place, &name, 24 * MIB);
    let format = format!("cryptsetup luksFormat {} --key-file @/pass @/{name}", SEGMENTED.theirs());
    let _ = place.shell(&format).done();
    let data = cut_into_segments(place, &name);
    let key = volume_key(place, &name, "pass", "volume.key");
    let key: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    command.arg("-d").arg(place.path(&name));
    let (mut table, mut at) = (String::new(), 0);
    for (cipher, unit, length) in SEGMENTS {
        let length = if length == 0 { 8 * MIB - at } else { length };
        let (first, sectors, from) = (at / 512, length / 512, (data + at) / 512);
        let options = if unit == 512 { String::new() } else { format!(" 1 sector_size:{unit}") };
        table.push_str(&format!(
            "{first} {sectors} crypt {cipher} {key} {first} {} {from}{options}\n",
            disk(n)
        ));
        at += length;
    }
    format!(
        "dmsetup create --noudevrules --noudevsync pieces <<END || exit\n{table}END\n\
         dmsetup mknodes; test -b /dev/mapper/pieces || {{ ls -l /dev/mapper; dmsetup table; exit; }}\n\
         dd if=/dev/vda of=/dev/mapper/pieces bs=1M conv=fsync 2>/dev/null && echo \"wrote {}\"\n\
         dmsetup remove pieces\n",
        disk(n)
    )
}
