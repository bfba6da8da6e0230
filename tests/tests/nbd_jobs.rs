//! `cryptctl` with volumes of NBD servers in the place of files: nbdkit and qemu-nbd, what they hold compared with cryptsetup's word.

use std::os::unix::fs::FileExt;
use std::path::Path;

use tests::luks::{CHEAP_PBKDF2, cryptsetup_opens, empty, have, opens_with_only, secret};
use tests::nbd_servers::Server;
use tests::{Place, Start, User, eventually};

const MIB: usize = 1 << 20;

/// A place with two passphrases.
fn place() -> Place {
    let place = Place::new(User::Me);
    for name in ["one", "two"] {
        secret(&place, name, name.as_bytes());
    }
    place
}

fn uri(server: &Server, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", server.socket.display())
}

/// A file of the place, served.
fn file(place: &Place, name: &str, filters: &[&str]) -> Option<Server> {
    let path = place.path(name).display().to_string();
    let (options, parameters): (Vec<&str>, Vec<&str>) =
        filters.iter().partition(|word| word.starts_with('-'));
    Server::nbdkit(&[&options[..], &["file", &path], &parameters[..]].concat())
}

fn qemu(place: &Place, name: &str, arguments: &[&str]) -> Option<Server> {
    Server::qemu(&place.path(name), arguments)
}

#[test]
fn a_volume_is_copied_from_to_and_between_servers() {
    let place = place();
    let plain = place.noise("plain", 20 * MIB);
    empty(&place, "far", 40 * MIB);
    empty(&place, "far2", 20 * MIB);
    let (Some(one), Some(two)) = (file(&place, "far", &[]), qemu(&place, "far2", &["-x", "x y"])) else {
        return;
    };
    let (one, two) = (uri(&one, ""), uri(&two, "x%20y"));
    let key = format!("--key file:@/one {CHEAP_PBKDF2}");
    let _ = place.run(&format!("encrypt @/plain {one} {key}")).done();
    if have(&["cryptsetup"]) {
        opens_with_only(&place, "far", "one", "two");
    }
    let _ = place.run(&format!("verify @/plain {one} --key file:@/one")).done();
    let _ = place.run(&format!("decrypt {one} @/back --key file:@/one")).done();
    assert_eq!(&place.read("back")[..plain.len()], plain, "the device is larger");
    // From one server to another: of one size, so that all of it is compared.
    let _ = place.run(&format!("encrypt {two} {one} {key} --force")).done();
    let _ = place.run(&format!("verify {two} {one} --key file:@/one")).done();
    place.write("far2", &plain);
    let _ = place.run(&format!("encrypt {two} @/vol {key}")).done();
    let _ = place.run("decrypt @/vol @/again --key file:@/one").done();
    assert!(place.read("again") == plain);
    let _ = place.run(&format!("decrypt @/vol {two} --key file:@/one")).exit(1, &["holds data", "--force"]);
    place.write("far2", &vec![0; 20 * MIB]);
    let _ = place.run(&format!("decrypt @/vol {two} --key file:@/one")).done();
    assert!(place.read("far2") == plain);
    let _ = place.run(&format!("encrypt {two} - RAW")).done();
}

#[test]
fn what_a_server_has_is_not_overwritten_unless_that_is_said() {
    let place = place();
    place.noise("plain", MIB);
    let words =
        |server: &Server| format!("encrypt @/plain {} --key file:@/one {CHEAP_PBKDF2}", uri(server, ""));
    for at in [0, 700_000, 31 * MIB + 5] {
        empty(&place, "far", 32 * MIB);
        let Some(server) = file(&place, "far", &[]) else { return };
        let far = std::fs::File::options().write(true).open(place.path("far")).expect("open");
        far.write_all_at(b"!", at as u64).expect("write");
        let before = place.read("far");
        let _ = place.run(&words(&server)).exit(1, &["it holds data", &at.to_string(), "--force"]);
        assert!(place.read("far") == before, "{at}");
        let _ = place.run(&format!("{} --force", words(&server))).done();
        let _ = place.run(&words(&server)).exit(1, &["it holds a LUKS volume"]);
        let luks = format!("luks format {} --key file:@/one {CHEAP_PBKDF2}", uri(&server, ""));
        let _ = place.run(&luks).exit(1, &["it holds a LUKS volume", "--force"]);
        let _ = place.run(&format!("{luks} --force")).done();
    }
}

#[test]
fn headers_on_a_server_are_managed_as_cryptsetup_sees_them() {
    let place = place();
    empty(&place, "far", 32 * MIB);
    let Some(server) = qemu(&place, "far", &["--shared=0"]) else { return };
    let far = uri(&server, "");
    let run = |words: &str| place.run(&words.replace("FAR", &far)).done();
    let _ = run(&format!("luks format FAR --key file:@/one {CHEAP_PBKDF2}"));
    let _ = run(&format!("luks add-key FAR --key file:@/one --new-key file:@/two {CHEAP_PBKDF2}"));
    assert!(run("luks dump FAR").text().contains("luks2"));
    let _ = run("luks open-test FAR --key file:@/two");
    let _ = run("luks token add FAR --key-ref file:/k --key-slot 0");
    assert!(run("luks token list FAR").text().contains("file:/k"));
    let _ = run("luks header-backup FAR @/backup");
    if have(&["cryptsetup"]) {
        assert!(cryptsetup_opens(&place, "far", "one") && cryptsetup_opens(&place, "far", "two"));
    }
    let _ = run("luks remove-key FAR --key file:@/one");
    if have(&["cryptsetup"]) {
        opens_with_only(&place, "far", "two", "one");
    }
    // A question before the answer: a connection of its own.
    let _ = run("luks erase FAR --yes-destroy-all-keys");
    let _ = place.run(&format!("luks open-test {far} --key file:@/two")).exit(1, &["no keyslot"]);
    let _ = run("luks header-restore FAR @/backup");
    let _ = run("luks open-test FAR --key file:@/one");
    let _ = run("luks doctor FAR");
    // A header on a server, its data here.
    empty(&place, "data", 4 * MIB);
    let _ = place
        .run(&format!("luks format @/data --header {far} --key file:@/one {CHEAP_PBKDF2} --force"))
        .done();
    place.noise("plain", 4 * MIB);
    let _ = place
        .run(&format!("encrypt @/plain @/data --header {far} --key file:@/two {CHEAP_PBKDF2} --force"))
        .done();
    let _ = place.run(&format!("decrypt @/data @/back --header {far} --key file:@/two")).done();
    assert!(place.read("back") == place.read("plain"));
}

/// A LUKS volume of `plain` in a file, with cryptsetup's usual parameters and a cheap passphrase.
fn volume(place: &Place, name: &str, bytes: usize) -> Vec<u8> {
    let plain = place.noise("plain", bytes);
    let _ = place.run(&format!("encrypt @/plain @/{name} --key file:@/one {CHEAP_PBKDF2}")).done();
    plain
}

fn check(place: &Place, name: &str, key: &str, plain: &[u8]) {
    let _ = place.run(&format!("decrypt @/{name} @/check --key file:@/{key} --force")).done();
    assert!(place.read("check") == plain, "{name}");
}

#[test]
fn a_volume_on_a_server_is_re_encrypted_and_gone_on_with_when_the_daemon_was_killed() {
    let mut place = place();
    let plain = volume(&place, "vol", 24 * MIB);
    let Some(server) = file(&place, "vol", &[]) else { return };
    let far = uri(&server, "");
    let words = format!("reencrypt {far} --key file:@/one {CHEAP_PBKDF2} --yes");
    let _ = place.run(&words).done();
    check(&place, "vol", "one", &plain);
    let _ = place.run(&format!("{words} --dry-run")).done();
    // Another, slowed down, whose daemon is killed midway.
    let running = place.spawn(&format!("{words} --throttle 4M --hotzone-size 1M"));
    let _ = place.moving();
    let daemon = place.daemon.take().expect("a daemon");
    daemon.signal(rustix::process::Signal::KILL);
    let _ = running.wait().exit(3, &["went away"]);
    drop(daemon);
    let daemon = Start::new().daemon();
    place.talk_to(&daemon.socket());
    place.daemon = Some(daemon);
    let dump = place.run(&format!("luks dump {far}")).done().text();
    assert!(dump.contains("reencrypt"), "{dump}");
    let _ = place.run(&format!("reencrypt {far} --key file:@/one --resume-only")).done();
    check(&place, "vol", "one", &plain);
    if have(&["cryptsetup"]) {
        assert!(cryptsetup_opens(&place, "vol", "one"));
    }
}

#[test]
fn plain_data_on_a_server_is_encrypted_in_place_when_it_is_said_what_it_is() {
    let place = place();
    let plain = place.noise("far", 24 * MIB);
    let Some(server) = file(&place, "far", &[]) else { return };
    let far = uri(&server, "");
    let words = format!(
        "reencrypt {far} --encrypt --reduce-device-size 8M --new-key file:@/one {CHEAP_PBKDF2} --yes"
    );
    let _ = place.run(&words).exit(2, &["is not looked at", "--filesystem-may-lose-its-end"]);
    assert!(place.read("far") == plain);
    let _ = place.run(&format!("{words} --filesystem-may-lose-its-end")).done();
    let _ = place.run("decrypt @/far @/moved --key file:@/one").done();
    assert!(place.read("moved")[..16 * MIB] == plain[..16 * MIB], "all but what was given up");
    // A raw one, with its journal here.
    let plain = place.noise("plain", 8 * MIB);
    let _ = place.run("encrypt @/plain @/raw RAW").done();
    let Some(server) = qemu(&place, "raw", &["--shared=0"]) else { return };
    let other: Vec<u8> = (100..164).collect();
    secret(&place, "other", &other);
    let words = format!("reencrypt {} RAW --new-key file:@/other --journal @/j --yes", uri(&server, ""));
    let _ = place.run(&words).exit(2, &["is not looked at", "--found-data-may-be-destroyed"]);
    let _ = place.run(&format!("{words} --found-data-may-be-destroyed")).done();
    let _ = place.run("decrypt @/raw @/back --format raw --key file:@/other").done();
    assert!(place.read("back") == plain);
}

/// Run a program of the system to its end.
fn tool(place: &Place, words: &str) {
    let _ = place.shell(words).done();
}

/// A qcow2 image of `plain` with a bitmap, and what was written since: the plaintext as it is now, and what was written.
fn changed(place: &Place, image: &str, plain: &[u8], writes: &[(usize, usize)]) -> Vec<u8> {
    let mut now = plain.to_vec();
    tool(place, &format!("qemu-img bitmap --add @/{image} b0"));
    for (index, &(at, length)) in writes.iter().enumerate() {
        let pattern = 0x51 + index;
        tool(place, &format!("qemu-io -f qcow2 -c 'write -P {pattern} {at} {length}' @/{image}"));
        now[at..at + length].fill(u8::try_from(pattern).expect("a byte"));
    }
    tool(place, &format!("qemu-img bitmap --disable @/{image} b0"));
    now
}

fn served_with_bitmap(place: &Place, image: &str) -> Option<Server> {
    let path = place.path(image).display().to_string();
    Server::start("qemu-nbd", &["-k", "SOCKET", "-t", "-r", "-f", "qcow2", "-e", "0", "-B", "b0", &path])
}

/// Bytes that the job of a command moved.
fn moved(place: &Place, words: &str) -> u64 {
    use proto::{Body, Event};
    let lines = place.run(&format!("{words} --json")).done().lines();
    let last = lines.into_iter().rev().find_map(|line| match line.body {
        Body::Event(Event::Finished(info)) => Some(info),
        _ => None,
    });
    let progress = last.expect("it finished").progress;
    assert_eq!(progress.total_bytes, Some(progress.done_bytes), "all of what was to be done");
    progress.done_bytes
}

const BITMAP: &str = "--bitmap qemu:dirty-bitmap:b0";
const WRITES: [(usize, usize); 3] = [(3 * MIB, 65_536), (5 * MIB + 4096, 8192), (15 * MIB + 65_536, 983_040)];

#[test]
fn only_what_a_bitmap_marks_is_copied() {
    if !have(&["qemu-nbd", "qemu-img", "qemu-io"]) {
        return;
    }
    let place = place();
    let plain = place.noise("plain", 16 * MIB);
    let key = format!("--key file:@/one {CHEAP_PBKDF2}");
    tool(&place, "qemu-img convert -f raw -O qcow2 @/plain @/image");
    let _ = place.run(&format!("encrypt @/plain @/copy {key}")).done();
    let _ = place.run(&format!("encrypt @/plain @/far {key}")).done();
    let now = changed(&place, "image", &plain, &WRITES);
    let Some(server) = served_with_bitmap(&place, "image") else { return };
    let source = uri(&server, "");
    // Granularity of a bitmap is 64 KiB: the second write lies in one of them.
    let dirty: u64 = 65_536 + 65_536 + 983_040;

    let before = place.read("copy");
    let _ = place
        .run(&format!("encrypt {source} @/copy {key} {BITMAP}"))
        .exit(1, &["--update overwrites in place"]);
    assert!(place.read("copy") == before);
    let update = format!("encrypt {source} @/copy --key file:@/one {BITMAP} --update");
    assert_eq!(moved(&place, &update), dirty);
    check(&place, "copy", "one", &now);
    let offset = before.len() - plain.len();
    let after = place.read("copy");
    assert!(after.len() == before.len() && after[..offset] == before[..offset], "its header stays");
    let differs: Vec<usize> = (0..plain.len())
        .step_by(4096)
        .filter(|at| after[offset + at..offset + at + 4096] != before[offset + at..offset + at + 4096])
        .collect();
    let written = |at: &usize| WRITES.iter().any(|(start, length)| (*start..start + length).contains(at));
    assert!(differs.iter().all(written) && differs.len() * 4096 == 65_536 + 8192 + 983_040);
    assert_eq!(moved(&place, &update), dirty, "again, with the same result");
    check(&place, "copy", "one", &now);

    // Of a copy that a server has.
    let Some(far) = file(&place, "far", &[]) else { return };
    let far_uri = uri(&far, "");
    let update = format!("encrypt {source} {far_uri} --key file:@/one {BITMAP} --update");
    assert_eq!(moved(&place, &update), dirty);
    check(&place, "far", "one", &now);

    // A new file holds only that, and is compared only there.
    assert_eq!(moved(&place, &format!("encrypt {source} @/part {key} {BITMAP}")), dirty);
    let _ = place.run("decrypt @/part @/back --key file:@/one --keep-holes").done();
    let back = place.read("back");
    for at in (0..plain.len()).step_by(65_536) {
        let expected = if now[at..at + 65_536] == plain[at..at + 65_536] {
            &[0; 65_536][..]
        } else {
            &now[at..at + 65_536]
        };
        assert!(back[at..at + 65_536] == *expected, "{at}");
    }
    let verify = |options: &str| place.run(&format!("verify {source} @/part --key file:@/one {options}"));
    let _ = verify(BITMAP).done();
    let _ = verify("").exit(5, &[]);

    // Where it does not fit, nothing is written.
    empty(&place, "small", MIB);
    let _ = place.run(&format!("encrypt @/small @/other {key}")).done();
    let before = place.read("other");
    let _ = place
        .run(&format!("encrypt {source} @/other --key file:@/one {BITMAP} --update"))
        .exit(1, &["no copy of the source"]);
    assert!(place.read("other") == before);
    let ran = place.run(&format!("encrypt {source} @/copy --key file:@/two {BITMAP} --update")).exit(4, &[]);
    assert!(!ran.stderr.contains("neither the earlier copy"), "nothing was written: {}", ran.stderr);
    check(&place, "copy", "one", &now);
    for wrong in ["qemu:dirty-bitmap:b1", "qemu:allocation-depth:x"] {
        let words = format!("encrypt {source} @/new {key} --bitmap {wrong}");
        let ran = place.run(&words);
        assert!(matches!(ran.code, Some(1 | 2)) && ran.stderr.contains(wrong), "{}", ran.stderr);
        assert!(!place.path("new").exists() && !place.path("new.partial").exists());
    }
    let ran = place.run(&format!("encrypt {far_uri} @/new {key} {BITMAP}"));
    assert!(matches!(ran.code, Some(1 | 2)) && ran.stderr.contains("dirty-bitmap"), "{}", ran.stderr);
}

#[test]
fn a_bitmap_of_ciphertext_limits_what_is_decrypted() {
    if !have(&["qemu-nbd", "qemu-img", "qemu-io"]) {
        return;
    }
    let place = place();
    let plain = volume(&place, "vol", 8 * MIB);
    let offset = place.read("vol").len() - plain.len();
    tool(&place, "qemu-img convert -f raw -O qcow2 @/vol @/image");
    // In the header, across its end, and in the data.
    let writes = [(offset - 65_536, 131_072), (offset + 4 * MIB, 65_536)];
    let vol = place.read("vol");
    let now = changed(&place, "image", &vol, &writes);
    let Some(server) = served_with_bitmap(&place, "image") else { return };
    let words = format!("decrypt {} @/plain --key file:@/one {BITMAP} --update", uri(&server, ""));
    assert_eq!(moved(&place, &words), 65_536 + 65_536);
    place.write("now", &now);
    let _ = place.run("decrypt @/now @/expected --key file:@/one").done();
    assert!(place.read("plain") == place.read("expected"));
}

#[test]
fn a_server_that_dies_ends_the_job_unless_it_comes_back() {
    let place = place();
    place.noise("plain", 16 * MIB);
    empty(&place, "far", 40 * MIB);
    let Some(mut server) = file(&place, "far", &["--filter=rate", "rate=32M"]) else { return };
    let words = format!("encrypt @/plain {} --key file:@/one {CHEAP_PBKDF2} --force", uri(&server, ""));
    let running = place.spawn(&format!("{words} --reconnect 0"));
    let _ = place.moving();
    server.kill();
    let _ = running.wait().exit(1, &["nbd+unix"]);
    server.restart();
    // Of what it had acknowledged nobody knows any more what has become: the next flush says so.
    let running = place.spawn(&format!("{words} --reconnect 60"));
    let _ = place.moving();
    server.kill();
    server.restart();
    let _ = running.wait().exit(1, &["may be lost"]);
    let _ = place.run(&words).done();
    // What was only read is read again.
    let running = place
        .spawn(&format!("verify @/plain {} --key file:@/one --throttle 8M --reconnect 60", uri(&server, "")));
    let _ = place.moving();
    server.kill();
    server.restart();
    let _ = running.wait().done();
    // The copy that failed can be gone on with, by a checkpoint.
    let resumable = format!("{words} --checkpoint @/mark --checkpoint-every 0.05");
    let running = place.spawn(&format!("{resumable} --reconnect 0"));
    let _ = place.moving();
    eventually("a checkpoint is written", || {
        place.path("mark").metadata().is_ok_and(|found| found.len() > 0)
    });
    server.kill();
    let _ = running.wait().exit(1, &["--resume"]);
    server.restart();
    let ran = place.run(&format!("{} --resume --checkpoint @/mark", words.replace(" --force", "")));
    // Nothing was on the server yet, or it is gone on with.
    if ran.code == Some(0) {
        let _ = place.run(&format!("verify @/plain {} --key file:@/one", uri(&server, ""))).done();
    } else {
        let _ = ran.exit(1, &["nothing to go on with"]);
    }
}

#[test]
fn what_a_server_refuses_is_said() {
    let place = place();
    place.noise("plain", 4 * MIB);
    empty(&place, "far", 40 * MIB);
    let key = format!("--key file:@/one {CHEAP_PBKDF2}");
    let path = place.path("far").display().to_string();
    // Read-only, too small, another name.
    if let Some(server) = Server::nbdkit(&["-r", "file", &path]) {
        let _ = place.run(&format!("encrypt @/plain {} {key}", uri(&server, ""))).exit(1, &["read-only"]);
        let _ = place
            .run(&format!("decrypt {} @/x --key file:@/one", uri(&server, "")))
            .exit(2, &["not a LUKS volume"]);
    }
    if let Some(server) = Server::nbdkit(&["memory", "2M"]) {
        let _ = place.run(&format!("encrypt @/plain {} {key}", uri(&server, ""))).exit(1, &["bytes"]);
        let _ = place.run(&format!("encrypt @/plain {} RAW", uri(&server, ""))).exit(1, &["bytes"]);
    }
    if let Some(server) = qemu(&place, "far", &["-x", "right"]) {
        let words = format!("encrypt @/plain {} {key}", uri(&server, "wrong"));
        let _ = place.run(&words).exit(1, &["wrong"]);
    }
    // Errors of single requests, and of all behind a place.
    if let Some(server) =
        Server::nbdkit(&["--filter=error", "memory", "40M", "error-pwrite-rate=100%", "error=ENOSPC"])
    {
        let ran = place.run(&format!("encrypt @/plain {} {key}", uri(&server, "")));
        let _ = ran.exit(1, &["no space left"]);
    }
    if let Some(server) = Server::nbdkit(&["--filter=error", "pattern", "4M", "error-pread-rate=100%"]) {
        let _ = place.run(&format!("encrypt {} @/out {key}", uri(&server, ""))).exit(1, &["read failed"]);
        assert!(!place.path("out").exists() && !place.path("out.partial").exists());
    }
    // Slow ones are waited for.
    if let Some(server) = Server::nbdkit(&["--filter=delay", "memory", "32M", "rdelay=20ms", "wdelay=20ms"]) {
        let _ = place.run(&format!("encrypt @/plain {} {key}", uri(&server, ""))).done();
        let _ = place.run(&format!("verify @/plain {} --key file:@/one", uri(&server, ""))).done();
    }
    // Blocks of a page at least.
    let blocks = [
        "--filter=blocksize-policy",
        "memory",
        "32M",
        "blocksize-minimum=4096",
        "blocksize-preferred=65536",
        "blocksize-error-policy=error",
    ];
    if let Some(server) = Server::nbdkit(&blocks) {
        let _ = place.run(&format!("encrypt @/plain {} {key}", uri(&server, ""))).done();
        let _ = place.run(&format!("verify @/plain {} --key file:@/one", uri(&server, ""))).done();
        let _ = place
            .run(&format!(
                "luks add-key {} --key file:@/one --new-key file:@/two {CHEAP_PBKDF2}",
                uri(&server, "")
            ))
            .done();
    }
    // What does not fill its last block is refused before the first one is written.
    empty(&place, "far", 40 * MIB);
    place.noise("odd", 4 * MIB + 512);
    let blocks = ["--filter=blocksize-policy", "blocksize-minimum=4096", "blocksize-error-policy=error"];
    if let Some(server) = file(&place, "far", &blocks) {
        let words = format!("encrypt @/odd {} RAW", uri(&server, ""));
        let _ = place.run(&words).exit(2, &["less than 4096 bytes", "ends inside a block"]);
        assert!(place.read("far") == vec![0; 40 * MIB]);
        let _ = place.run(&format!("encrypt @/plain {} RAW", uri(&server, ""))).done();
    }
}

#[test]
fn holes_of_a_volume_on_a_server_are_all_kept_or_the_job_fails() {
    let place = place();
    let mut plain = volume(&place, "vol", 24 * MIB);
    // Only the first MiB of it was ever written.
    let bytes = place.read("vol");
    let written = bytes.len() - 23 * MIB;
    place.write("vol", &bytes[..written]);
    let vol = std::fs::File::options().write(true).open(place.path("vol")).expect("open");
    vol.set_len(bytes.len() as u64).expect("a hole");
    plain[MIB..].fill(0);
    let Some(server) = file(&place, "vol", &[]) else { return };
    let words = format!("decrypt {} @/out --key file:@/one --keep-holes", uri(&server, ""));
    // What a checkpoint is gone on with is compared with holes, too.
    let running = place.spawn(&format!("{words} --checkpoint @/mark --throttle 8M"));
    let _ = place.moving();
    running.signal(rustix::process::Signal::INT);
    let _ = running.wait().exit(1, &["--resume"]);
    let _ = place.run(&format!("{words} --checkpoint @/mark --resume")).done();
    assert!(place.read("out") == plain);
    let path = place.path("vol").display().to_string();
    let Some(silent) = Server::nbdkit(&["--no-sr", "file", &path]) else { return };
    let words = format!("decrypt {} @/new --key file:@/one", uri(&silent, ""));
    let _ = place.run(&format!("{words} --keep-holes")).exit(2, &["what of it is holes"]);
    let Some(wrong) = file(&place, "vol", &["--filter=error", "error-extents-rate=100%"]) else { return };
    let words = format!("decrypt {} @/new --key file:@/one", uri(&wrong, ""));
    let _ = place.run(&format!("{words} --keep-holes")).exit(1, &["block status", "keep none of them"]);
    assert!(!place.path("new").exists() && !place.path("new.partial").exists());
    let _ = place.run(&words).done();
    assert!(place.read("new")[..MIB] == plain[..MIB], "and noise behind it");
}

#[test]
fn what_needs_durability_is_not_done_where_there_is_none() {
    let place = place();
    let plain = volume(&place, "vol", 4 * MIB);
    let path = place.path("vol").display().to_string();
    let shell = |path: &str| {
        let size = format!("get_size=stat -Lc %s '{path}'");
        let pread = format!("pread=dd if='{path}' skip=$4 count=$3 iflag=skip_bytes,count_bytes status=none");
        let pwrite = format!("pwrite=dd of='{path}' seek=$4 oflag=seek_bytes conv=notrunc status=none");
        Server::nbdkit(&["eval", &size, &pread, &pwrite])
    };
    let Some(server) = shell(&path) else { return };
    let far = uri(&server, "");
    let before = place.read("vol");
    let _ = place
        .run(&format!("reencrypt {far} --key file:@/one {CHEAP_PBKDF2} --yes"))
        .exit(2, &["cannot flush", "served with flush"]);
    let _ = place
        .run(&format!("export {far} --nbd unix:@/s --key file:@/one --detach"))
        .exit(2, &["cannot flush", "read-only"]);
    assert!(place.read("vol") == before);
    let _ = place.run(&format!("export {far} --nbd unix:@/s --key file:@/one --read-only --detach")).done();
    let _ = place.run("export stop 1").done();
    empty(&place, "out", 4 * MIB);
    let Some(sink) = shell(&place.path("out").display().to_string()) else { return };
    let words = format!("decrypt @/vol {} --key file:@/one --force", uri(&sink, ""));
    let _ =
        place.run(&format!("{words} --checkpoint @/mark")).exit(2, &["cannot flush", "without a checkpoint"]);
    assert!(place.read("out") == vec![0; 4 * MIB], "nothing was written");
    let _ = place.run(&words).exit(0, &["cannot make writes durable"]);
    assert!(place.read("out") == plain);
    // One that is exported keeps accounts of its own.
    let Some(server) = file(&place, "vol", &[]) else { return };
    let far = uri(&server, "");
    let _ = place.run(&format!("export {far} --nbd unix:@/t --key file:@/one --detach")).done();
    let _ = place
        .run(&format!("reencrypt {far} --key file:@/one {CHEAP_PBKDF2} --yes"))
        .exit(2, &["is exported", "export stop"]);
    assert!(place.read("vol") == before);
}

#[test]
fn one_volume_cannot_be_both_ends_nor_be_re_encrypted_twice() {
    let place = place();
    volume(&place, "vol", 24 * MIB);
    let Some(server) = file(&place, "vol", &[]) else { return };
    let far = uri(&server, "");
    let _ = place
        .run(&format!("decrypt {far} {far} --key file:@/one --force"))
        .exit(2, &["both source and sink"]);
    // Under another name of the socket.
    let link = place.path("link");
    std::os::unix::fs::symlink(&server.socket, &link).expect("link");
    let other = format!("nbd+unix:///?socket={}", link.display());
    let _ = place.run(&format!("decrypt {far} {other} --key file:@/one --force")).exit(2, &["are the same"]);
    let running =
        place.spawn(&format!("reencrypt {far} --key file:@/one {CHEAP_PBKDF2} --yes --throttle 2M"));
    let _ = place.moving();
    let _ = place.run(&format!("reencrypt {far} --key file:@/one --resume-only")).exit(1, &["re-encrypt"]);
    running.signal(rustix::process::Signal::INT);
    let _ = running.wait();
}

/// Certificates as GnuTLS's tools and libnbd's users have them: an authority, a server's and a client's.
fn certificates(at: &Path) {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    let authority_key = KeyPair::generate().expect("a key");
    let mut authority = CertificateParams::new(Vec::new()).expect("parameters");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let certificate = authority.self_signed(&authority_key).expect("signed");
    std::fs::write(at.join("ca-cert.pem"), certificate.pem()).expect("write");
    let issuer = Issuer::new(authority, authority_key);
    for (name, whose) in [("server", "localhost"), ("client", "a client")] {
        let key = KeyPair::generate().expect("a key");
        let parameters = CertificateParams::new(vec![whose.replace(' ', "-")]).expect("parameters");
        let certificate = parameters.signed_by(&key, &issuer).expect("signed");
        std::fs::write(at.join(format!("{name}-cert.pem")), certificate.pem()).expect("write");
        std::fs::write(at.join(format!("{name}-key.pem")), key.serialize_pem()).expect("write");
    }
}

#[test]
fn tls_is_spoken_or_nothing_is() {
    let place = place();
    place.noise("plain", 4 * MIB);
    let directory = place.path("pki");
    std::fs::create_dir(&directory).expect("a directory");
    certificates(&directory);
    let pki = directory.display().to_string();
    let with = format!("--tls-certificates={pki}");
    let Some(server) = Server::start(
        "nbdkit",
        &["-f", "-U", "SOCKET", "--tls=require", &with, "--tls-verify-peer", "memory", "32M"],
    ) else {
        return;
    };
    let socket = server.socket.display();
    let far = format!("nbds+unix:///?socket={socket}&tls-certificates={pki}");
    let _ = place.run(&format!("encrypt @/plain {far} --key file:@/one {CHEAP_PBKDF2}")).done();
    let _ = place.run(&format!("verify @/plain {far} --key file:@/one")).done();
    // Without TLS, for another name, without a certificate, with another authority.
    let _ =
        place.run(&format!("verify @/plain nbd+unix:///?socket={socket} --key file:@/one")).exit(1, &["TLS"]);
    let _ = place
        .run(&format!("verify @/plain {far}&tls-hostname=elsewhere --key file:@/one"))
        .exit(1, &["certificate"]);
    let other = place.path("other");
    std::fs::create_dir(&other).expect("a directory");
    certificates(&other);
    let _ = place
        .run(&format!("verify @/plain {} --key file:@/one", far.replace(&pki, &other.display().to_string())))
        .exit(1, &["nbds+unix"]);
    let Some(plain) = Server::nbdkit(&["memory", "32M"]) else { return };
    let words =
        format!("encrypt @/plain nbds+unix:///?socket={}&tls-certificates={pki} RAW", plain.socket.display());
    let _ = place.run(&words).exit(2, &["TLS"]);
}
