//! NBD servers of others as sources and sinks: a disk in use, backed up by its dirty bitmap while it is written; filters that change what
//! a server offers.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use tests::luks::{CHEAP_PBKDF2, have, secret};
use tests::nbd_servers::Server;
use tests::{PATIENCE, Place, User, eventually};

const MIB: usize = 1 << 20;

fn place() -> Place {
    let place = Place::new(User::Me);
    secret(&place, "one", b"one");
    place
}

fn uri(server: &Server, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", server.socket.display())
}

/// QEMU's monitor.
struct Monitor(BufReader<UnixStream>);

impl Monitor {
    fn at(path: &Path) -> Self {
        let mut stream = None;
        eventually("the monitor listens", || {
            stream = UnixStream::connect(path).ok();
            stream.is_some()
        });
        let stream = stream.expect("connected");
        stream.set_read_timeout(Some(PATIENCE)).expect("a time limit");
        let mut monitor = Self(BufReader::new(stream));
        assert!(monitor.line()["QMP"].is_object(), "it greets");
        monitor.tell("qmp_capabilities", json!({}));
        monitor
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        let _ = self.0.read_line(&mut line).expect("the monitor answers");
        serde_json::from_str(&line).expect("JSON")
    }

    /// Its answer. Events that come meanwhile are skipped.
    fn ask(&mut self, command: &str, arguments: Value) -> Value {
        let mut text = json!({ "execute": command, "arguments": arguments }).to_string();
        text.push('\n');
        self.0.get_mut().write_all(text.as_bytes()).expect("sent");
        loop {
            let answer = self.line();
            if answer.get("event").is_none() {
                return answer;
            }
        }
    }

    /// Ask for what must succeed.
    fn tell(&mut self, command: &str, arguments: Value) {
        let answer = self.ask(command, arguments);
        assert!(answer.get("return").is_some(), "{command}: {answer}");
    }
}

/// A disk that a storage daemon serves to whoever uses it.
struct Disk {
    server: Server,
    monitor: Monitor,
    /// What it holds.
    bytes: Vec<u8>,
}

impl Disk {
    fn new(place: &Place, length: usize) -> Option<Self> {
        let bytes = place.noise("disk", length);
        let file = format!("driver=file,node-name=file,filename={}", place.path("disk").display());
        let arguments = [
            ["--blockdev", &file],
            ["--blockdev", "driver=raw,node-name=disk,file=file"],
            ["--nbd-server", "addr.type=unix,addr.path=SOCKET,max-connections=16"],
            ["--export", "type=nbd,id=live,node-name=disk,name=live,writable=on"],
            ["--chardev", "socket,id=monitor,path=SOCKET.qmp,server=on,wait=off"],
            ["--monitor", "chardev=monitor"],
        ];
        let server = Server::start("qemu-storage-daemon", &arguments.concat())?;
        let at = server.socket.with_extension("qmp");
        let monitor = Monitor::at(&at);
        std::fs::remove_file(at).expect("there");
        Some(Self { server, monitor, bytes })
    }

    /// Its user writes.
    fn write(&mut self, writes: &[(usize, usize)], pattern: u8) {
        let mut qemu_io = Command::new("qemu-io");
        qemu_io.args(["-f", "raw", &uri(&self.server, "live")]);
        for &(at, length) in writes {
            qemu_io.args(["-c", &format!("write -P {pattern} {at} {length}")]);
            self.bytes[at..at + length].fill(pattern);
        }
        assert!(qemu_io.stdout(std::process::Stdio::null()).status().expect("qemu-io").success());
    }

    /// From now on `snapshot` is served as the disk is at this moment, and `next` records what is written from now on. What
    /// `before` has recorded until now is told beside the snapshot.
    fn freeze(&mut self, place: &Place, snapshot: &str, before: Option<&str>, next: &str) {
        let path = place.path(snapshot).display().to_string();
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", &path, &self.bytes.len().to_string()])
            .status();
        assert!(made.expect("qemu-img").success());
        let file = json!({ "driver": "file", "filename": path });
        let node = json!({ "driver": "qcow2", "node-name": snapshot, "file": file, "backing": "disk" });
        self.monitor.tell("blockdev-add", node);
        let mut actions = vec![
            json!({ "type": "block-dirty-bitmap-add", "data": { "node": "disk", "name": next } }),
            json!({ "type": "blockdev-backup", "data":
                { "device": "disk", "target": snapshot, "sync": "none", "job-id": snapshot } }),
        ];
        if let Some(before) = before {
            let data = json!({ "node": "disk", "name": before });
            actions.push(json!({ "type": "block-dirty-bitmap-disable", "data": data }));
        }
        self.monitor.tell("transaction", json!({ "actions": actions }));
        let bitmaps: Vec<_> = before.iter().map(|name| json!({ "node": "disk", "name": name })).collect();
        self.monitor.tell(
            "block-export-add",
            json!({ "type": "nbd", "id": snapshot, "node-name": snapshot, "name": snapshot, "bitmaps": bitmaps }),
        );
    }

    /// The snapshot is not needed any more.
    fn thaw(&mut self, snapshot: &str) {
        self.monitor.tell("block-export-del", json!({ "id": snapshot }));
        self.monitor.tell("block-job-cancel", json!({ "device": snapshot }));
        // A job that was cancelled ends by itself, soon.
        eventually("the snapshot is forgotten", || {
            self.monitor.ask("blockdev-del", json!({ "node-name": snapshot })).get("return").is_some()
        });
    }
}

#[test]
fn a_disk_in_use_is_backed_up_and_then_what_was_written_to_it() {
    if !have(&["qemu-storage-daemon", "qemu-io", "qemu-img"]) {
        return;
    }
    let place = place();
    let Some(mut disk) = Disk::new(&place, 8 * MIB) else { return };
    let holds = |copy: &str, expected: &[u8]| {
        let _ = place.run(&format!("decrypt @/{copy} @/back --key file:@/one --force")).done();
        assert!(place.read("back") == expected, "{copy}");
    };

    // All of it, as it was when the backup began: its user writes meanwhile, before and behind the copy's position.
    disk.freeze(&place, "s0", None, "b0");
    let then = disk.bytes.clone();
    let words = format!("encrypt {} @/copy --key file:@/one {CHEAP_PBKDF2}", uri(&disk.server, "s0"));
    let running = place.spawn(&format!("{words} --throttle 4M"));
    let _ = place.moving();
    disk.write(&[(0, 65_536), (3 * MIB, 131_072), (8 * MIB - 4096, 4096)], 0x11);
    let _ = running.wait().done();
    holds("copy", &then);
    disk.thaw("s0");

    // What was written since, to the same copy; again with writes meanwhile, to the same places and others.
    disk.write(&[(5 * MIB, 4096)], 0x22);
    disk.freeze(&place, "s1", Some("b0"), "b1");
    let then = disk.bytes.clone();
    let source = uri(&disk.server, "s1");
    let words = format!("encrypt {source} @/copy --key file:@/one --bitmap qemu:dirty-bitmap:b0 --update");
    let running = place.spawn(&format!("{words} --throttle 256k --chunk-size 64k"));
    let _ = place.moving();
    disk.write(&[(5 * MIB, 65_536), (6 * MIB, 65_536)], 0x33);
    let _ = running.wait().done();
    holds("copy", &then);
    disk.thaw("s1");

    // And once more, without rest: what was written during the second backup is in the third.
    disk.freeze(&place, "s2", Some("b1"), "b2");
    let source = uri(&disk.server, "s2");
    let _ = place
        .run(&format!("encrypt {source} @/copy --key file:@/one --bitmap qemu:dirty-bitmap:b1 --update"))
        .done();
    holds("copy", &disk.bytes);
    // All of it, not only what the bitmap tells of.
    let _ = place.run(&format!("verify {source} @/copy --key file:@/one")).done();
    disk.thaw("s2");
}

#[test]
fn what_filters_of_nbdkit_make_of_a_file_is_copied_as_it_is() {
    let place = place();
    let plain = place.noise("plain", 5 * MIB + 1000);
    let path = place.path("plain").display().to_string();
    let padded = [&plain[..], &[0; 3096]].concat();
    let cases: [(&[&str], &[&str], &[u8]); 5] = [
        (&["--filter=truncate"], &["round-up=4096"], &padded),
        (&["--filter=truncate"], &["truncate=1M"], &plain[..MIB]),
        (
            &["--filter=readahead", "--filter=truncate"],
            &["round-up=512"],
            &padded[..(plain.len()).next_multiple_of(512)],
        ),
        (
            &["--filter=blocksize-policy", "--filter=truncate"],
            &[
                "round-up=4096",
                "blocksize-minimum=4096",
                "blocksize-maximum=64k",
                "blocksize-error-policy=error",
            ],
            &padded,
        ),
        (&["--filter=cache", "--filter=noparallel", "--filter=truncate"], &["round-up=4096"], &padded),
    ];
    for (number, (filters, parameters, expected)) in cases.into_iter().enumerate() {
        let Some(server) = Server::nbdkit(&[filters, &["file", &path], parameters].concat()) else { return };
        let source = uri(&server, "");
        let sector = if expected.len() % 4096 == 0 { 4096 } else { 512 };
        let key = format!("--key file:@/one {CHEAP_PBKDF2} --sector-size {sector}");
        let _ = place.run(&format!("encrypt {source} @/vol{number} {key}")).done();
        let _ = place.run(&format!("decrypt @/vol{number} @/back{number} --key file:@/one")).done();
        assert!(place.read(&format!("back{number}")) == expected, "{filters:?}");
    }
}
