//! `cryptctl export` with the real daemon: how exports begin, are listed and end, who may connect, and what becomes of sockets. What is
//! served is judged elsewhere; here a client only has to get its bytes.

use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};

use engine::format::nbd::reply::Style;
use proto::export::{Info, State};
use proto::{ErrorKind, Reply};
use rustix::process::Signal;
use tests::luks::{CHEAP_PBKDF2, have, secret};
use tests::nbd::client::{Connection, Wish};
use tests::{NOBODY, Place, Running, Start, User, as_each_user, eventually, is_root, loop_device, skip};

const MIB: usize = 1 << 20;

/// A place with a passphrase and an encrypted volume `v` of `plain`.
fn place(user: User) -> Place {
    filled(Place::new(user))
}

fn filled(place: Place) -> Place {
    secret(&place, "one", b"one");
    secret(&place, "wrong", b"another");
    let _ = place.noise("plain", MIB);
    let _ = place.run(&format!("encrypt @/plain @/v --key file:@/one {CHEAP_PBKDF2}")).done();
    place
}

fn exports(place: &Place) -> Vec<Info> {
    match place.answer("export list --json --no-start") {
        Reply::Exports(exports) => exports,
        other => panic!("no list: {other:?}"),
    }
}

fn export(place: &Place, id: u64) -> Info {
    exports(place).into_iter().find(|info| info.export == id).expect("listed")
}

/// Start one in the background of the daemon; its number.
fn detached(place: &Place, words: &str) -> u64 {
    let ran = place.run(&format!("export {words} --key file:@/one --detach")).done();
    ran.text().trim().parse().expect("a number")
}

/// Start one in the foreground, and wait until it serves.
fn foreground(place: &Place, words: &str) -> Running {
    let before = exports(place).len();
    let running = place.spawn(&format!("export {words} --key file:@/one"));
    eventually("it is served", || {
        exports(place).get(before).is_some_and(|info| info.state == State::Serving)
    });
    running
}

/// The first bytes, as a client gets them.
fn first(place: &Place, socket: &str) -> Vec<u8> {
    Connection::structured(&place.path(socket)).read(0, 4096)
}

#[test]
fn an_export_is_listed_measured_and_stopped() {
    as_each_user(|user| {
        let place = place(user);
        let ran = place.run("export @/v --nbd unix:@/s --key file:@/one --detach --description it").done();
        assert_eq!(ran.text(), "1\n");
        assert!(ran.stderr.contains("nbd+unix:///?socket="), "{}", ran.stderr);
        let plain = place.read("plain");
        assert_eq!(first(&place, "s"), plain[..4096]);
        let mode = std::fs::metadata(place.path("s")).expect("bound").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let info = export(&place, 1);
        assert_eq!((info.state, info.bytes, info.read_only), (State::Serving, MIB as u64, false));
        assert_eq!((info.connections_total, info.commands[0].count), (1, 1));
        let stats = place.run("export stats 1").done().text();
        assert!(stats.contains("COMMAND") && stats.contains("crypt"), "{stats}");
        let listed = place.run("export list").done().text();
        assert!(listed.contains("serving") && listed.contains("unix:"), "{listed}");
        assert_eq!(place.status().active_exports, 1);

        let _ = place.run("export stop 1").exit(0, &["export 1 of", "stopped: 1 connection"]);
        assert!(!place.path("s").exists(), "the socket's name goes with its last export");
        let info = export(&place, 1);
        assert_eq!((info.state, info.connections, info.commands[0].count), (State::Stopped, 0, 1));
        let _ = place.run("export stats 1").exit(0, &[]);
        let _ = place.run("export stop 1").exit(1, &["over already"]);
        let _ = place.run("export stop 2").exit(1, &["no export 2"]);
        assert_eq!(place.status().active_exports, 0);
        // And the volume is free.
        let _ = place.run("decrypt @/v @/out --key file:@/one").done();
        assert!(place.read("out") == plain);
    });
}

#[test]
fn in_the_foreground_a_signal_drains_and_ends_well() {
    for signal in [Signal::INT, Signal::TERM] {
        let place = place(User::Me);
        let running = foreground(&place, "@/v --nbd unix:@/s --name db");
        let wish = Wish { name: "db".to_owned(), ..Wish::of(Style::Structured) };
        let mut client = Connection::open(&place.path("s"), &wish).expect("connected");
        assert_eq!(client.write(0, 0, &[7; 4096]), 0);
        running.signal(signal);
        let ran = running.wait().exit(0, &["draining", "stopped: 1 connection"]);
        let uri = ran.text();
        assert!(uri.starts_with("nbd+unix:///db?socket=/") && uri.lines().count() == 1, "{uri}");
        assert!(!place.path("s").exists());
        let _ = place.run("decrypt @/v @/out --key file:@/one").done();
        assert_eq!(place.read("out")[..4096], [7; 4096], "what was written is there");
    }
}

#[test]
fn an_export_ends_with_the_program_that_holds_it() {
    let place = place(User::Me);
    let running = foreground(&place, "@/v --nbd unix:@/s");
    running.signal(Signal::KILL);
    assert_eq!(running.wait().signal, Some(9));
    eventually("it is over", || export(&place, 1).state == State::Stopped);
    eventually("its socket is gone", || !place.path("s").exists());
    // A detached one goes on.
    let id = detached(&place, "@/v --nbd unix:@/s");
    assert_eq!(first(&place, "s").len(), 4096);
    assert_eq!(export(&place, id).state, State::Serving);
}

#[test]
fn somebody_else_may_stop_what_is_in_the_foreground() {
    let place = place(User::Me);
    let running = foreground(&place, "@/v --nbd unix:@/s");
    let _ = place.run("export stop 1 --now").exit(0, &["stopped"]);
    let _ = running.wait().exit(0, &["export 1 of", "stopped"]);
}

#[test]
fn a_daemon_that_dies_is_told_and_its_socket_replaced() {
    let mut place = place(User::Me);
    let running = foreground(&place, "@/v --nbd unix:@/s");
    let daemon = place.daemon.as_mut().expect("ours");
    daemon.signal(Signal::KILL);
    let _ = daemon.wait();
    let _ = running.wait().exit(3, &["the daemon went away"]);
    assert!(!place.path("s").exists(), "the socket was ours to remove");
    // One that nobody could remove is stale, and replaced.
    drop(UnixListener::bind(place.path("s")).expect("bound"));
    place.daemon = Some(Start::new().daemon());
    let socket = place.daemon.as_ref().expect("ours").socket();
    place.talk_to(&socket);
    detached(&place, "@/v --nbd unix:@/s");
    assert_eq!(first(&place, "s").len(), 4096);
}

#[test]
fn what_has_the_name_already_is_left_alone() {
    let place = place(User::Me);
    place.write("file", b"precious");
    let words = "--key file:@/one --nbd unix:@/";
    let _ = place.run(&format!("export @/v {words}file")).exit(1, &["exists and is not a socket"]);
    assert_eq!(place.read("file"), b"precious");
    let _served = UnixListener::bind(place.path("other")).expect("bound");
    let _ = place.run(&format!("export @/v {words}other")).exit(1, &["another program listens there"]);
    assert!(UnixStream::connect(place.path("other")).is_ok());
    let _ = place.run(&format!("export @/v {words}none/s")).exit(1, &["no such file or directory"]);
    // A refusal by the daemon leaves no socket either.
    let _ = place.run("export @/v --nbd unix:@/s --key file:@/wrong").exit(4, &["wrong key or damaged data"]);
    let _ = place.run("export @/plain --nbd unix:@/s --key file:@/one").exit(2, &["not a LUKS volume"]);
    assert!(!place.path("s").exists());
    assert!(exports(&place).is_empty(), "what was refused is not remembered");
}

#[test]
fn exports_of_one_user_share_a_socket_under_several_names() {
    let place = place(User::Me);
    std::fs::copy(place.path("v"), place.path("w")).expect("copied");
    let first = detached(&place, "@/v --nbd unix:@/s --name one");
    let inode = std::fs::metadata(place.path("s")).expect("bound").ino();
    let second = detached(&place, "@/w --nbd unix:@/s --name two");
    assert_eq!(std::fs::metadata(place.path("s")).expect("bound").ino(), inode, "the same socket");
    let again = "export @/w --nbd unix:@/s --key file:@/one --read-only --detach";
    let _ = place.run("export stop 2").done();
    let _ = place.run(&format!("{again} --name one")).exit(1, &["there is an export \"one\" on this socket"]);
    let _ = place.run(&format!("{again} --name two --mode 666")).exit(2, &["keeps the access"]);
    assert_eq!((first, second), (1, 2));
    let third = detached(&place, "@/w --nbd unix:@/s --name two");
    let _ = place.run("export stop 1").done();
    assert!(place.path("s").exists(), "another export is there still");
    let _ = place.run(&format!("export stop {third}")).done();
    assert!(!place.path("s").exists());
}

#[test]
fn a_volume_in_use_is_refused_both_ways() {
    let place = place(User::Me);
    let refused = |words: &str, says: &str| {
        let _ = place.run(&format!("export @/v {words} --key file:@/one")).exit(1, &[says]);
    };
    let writing = detached(&place, "@/v --nbd unix:@/s");
    refused("--nbd unix:@/t", "exported already");
    refused("--nbd unix:@/t --read-only", "exported already");
    // Nor is it made anew under its clients; a passphrase more is as good as on a mapped volume.
    let format = format!("luks format @/v --key file:@/one --force {CHEAP_PBKDF2}");
    let _ = place.run(&format).exit(1, &["the volume is exported"]);
    let add = format!("luks add-key @/v --key file:@/one --new-key file:@/wrong {CHEAP_PBKDF2}");
    let _ = place.run(&add).done();
    let _ = place.run(&format!("export stop {writing}")).done();
    // Any number for reading only.
    let one = detached(&place, "@/v --nbd unix:@/s --read-only");
    let two = detached(&place, "@/v --nbd unix:@/t --read-only");
    assert_eq!(first(&place, "s"), first(&place, "t"));
    refused("--nbd unix:@/u", "exported already");
    let rewrite = place.run("reencrypt @/v --key file:@/one --yes");
    let _ = rewrite.exit(1, &["exported"]);
    for id in [one, two] {
        let _ = place.run(&format!("export stop {id}")).done();
    }
    let mut again = detached(&place, "@/v --nbd unix:@/s");
    again += 1;
    assert!(again > two);
}

#[test]
fn a_block_device_is_re_encrypted_beside_its_export_and_beside_nothing_else() {
    let place = place(User::Me);
    let Some(device) = loop_device(32 << 20).filter(|_| have(&["cryptsetup"])) else { return };
    let path = device.path().display();
    std::fs::copy(place.path("v"), device.path()).expect("copied");
    let rewrite = format!("reencrypt {path} --key file:@/one --yes {CHEAP_PBKDF2}");
    let writing = detached(&place, &format!("{path} --nbd unix:@/s"));
    let mut client = Connection::structured(&place.path("s"));
    assert_eq!(client.write(0, 0, &[7; 4096]), 0);
    let before = place.shell(&format!("cryptsetup luksDump {path}")).done().text();
    let _ = place.run(&rewrite).done();
    assert_ne!(place.shell(&format!("cryptsetup luksDump {path}")).done().text(), before, "another key");
    assert_eq!(client.read(0, 4096), [7; 4096]);
    drop(client);
    let _ = place.run(&format!("export stop {writing}")).done();
    // Of another daemon, as far as this one can tell.
    let held = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(rustix::fs::OFlags::EXCL.bits().cast_signed())
        .open(device.path())
        .expect("opened exclusively");
    let _ = place.run(&rewrite).exit(1, &["is in use", "unmount it"]);
    drop(held);
    let _ = place.run(&rewrite).done();
}

#[test]
fn nothing_is_written_through_an_export_for_reading_only() {
    let place = place(User::Me);
    std::fs::set_permissions(place.path("v"), PermissionsExt::from_mode(0o400)).expect("chmod");
    let before = place.read("v");
    detached(&place, "@/v --nbd unix:@/s --read-only");
    let mut client = Connection::structured(&place.path("s"));
    assert_eq!(client.write(0, 0, &[7; 4096]), 1, "EPERM");
    drop(client);
    assert!(export(&place, 1).read_only);
    let _ = place.run("export stop 1").done();
    assert!(place.read("v") == before);
}

#[test]
fn others_connect_only_where_they_are_named() {
    if !is_root() {
        return skip("needs root, to come as another user");
    }
    let place = place(User::Me);
    // The directories above must admit them, too.
    for dir in [place.home(), &place.path("")] {
        std::fs::set_permissions(dir, PermissionsExt::from_mode(0o755)).expect("chmod");
    }
    let other = |socket: &str| {
        let path = place.path(socket);
        let greeted = engine::sys::fsuid::as_user(NOBODY, NOBODY, &[], move || {
            use std::io::Read;
            let mut stream = UnixStream::connect(path)?;
            stream.set_read_timeout(Some(std::time::Duration::from_secs(20)))?;
            stream.read_exact(&mut [0; 8])
        });
        greeted.expect("as nobody").is_ok()
    };
    for (at, words, admitted) in [
        ("a", "", false),
        ("b", "--allow-uid 65534", true),
        ("c", "--allow-uid 1", false),
        ("d", "--mode 666", false),
        ("e", "--mode 666 --any-user", true),
    ] {
        let id = detached(&place, &format!("@/v --nbd unix:@/{at} {words}"));
        assert_eq!(other(at), admitted, "{words}");
        let _ = place.run(&format!("export stop {id}")).done();
    }
}

#[test]
fn another_users_exports_are_neither_seen_nor_stopped() {
    if !is_root() {
        return skip("needs root, to be two users");
    }
    let place = place(User::Me);
    detached(&place, "@/v --nbd unix:@/s");
    let socket = place.socket().to_owned();
    let dir = socket.parent().expect("a directory").to_owned();
    std::fs::set_permissions(&dir, PermissionsExt::from_mode(0o755)).expect("chmod");
    std::fs::set_permissions(&socket, PermissionsExt::from_mode(0o666)).expect("chmod");
    let asked = engine::sys::fsuid::as_user(NOBODY, NOBODY, &[], move || {
        let mut client = tests::Client::connect(&socket);
        let listed = client.call(proto::Call::Exports {});
        let stopped = client.call(proto::Call::ExportStop { export: 1, now: true });
        let stats = client.call(proto::Call::ExportStats { export: 1 });
        (listed, stopped, stats)
    });
    let (listed, stopped, stats) = asked.expect("as nobody");
    assert_eq!(listed, Ok(Reply::Exports(Vec::new())));
    assert_eq!(stopped.expect_err("refused").kind, ErrorKind::Denied);
    assert_eq!(stats.expect_err("refused").kind, ErrorKind::Denied);
    assert_eq!(export(&place, 1).state, State::Serving);
}

#[test]
fn a_daemon_with_an_export_stays_and_one_told_to_leave_drains_it() {
    let mut place = filled(Place::with(User::Me, Start::new().arg("--idle-exit").arg("1")));
    detached(&place, "@/v --nbd unix:@/s");
    let mut client = Connection::structured(&place.path("s"));
    // Proves nothing by itself if the machine is slow; a daemon that ignored its export would be gone by then.
    std::thread::sleep(std::time::Duration::from_millis(1500));
    assert!(place.daemon.as_mut().expect("ours").is_running());
    assert_eq!(client.write(0, 0, &[9; 4096]), 0);
    let daemon = place.daemon.as_mut().expect("ours");
    daemon.signal(Signal::TERM);
    assert!(daemon.wait().success());
    assert!(daemon.log().contains("drain"), "{}", daemon.log());
    assert!(!place.path("s").exists());
}

#[test]
fn tcp_is_loopback_or_tls() {
    let place = place(User::Me);
    let refused = |words: &str, says: &str| {
        let _ = place.run(&format!("export @/v {words} --key file:@/one")).exit(2, &[says]);
    };
    refused("--nbd tcp:127.0.0.1:0", "without TLS");
    refused("--nbd tcp:0.0.0.0:0 --insecure", "loopback addresses only");
    refused("--nbd tcp:127.0.0.1:0 --insecure --mode 600", "--mode is an option of Unix sockets");
    refused("--nbd unix:@/s --insecure", "--insecure is an option of TCP sockets");
    place.write("pem", b"no certificate");
    let tls = "--tls-cert @/pem --tls-key @/pem --tls-clients @/pem";
    refused(&format!("--nbd tcp:127.0.0.1:0 {tls}"), "certificate");
    let id = detached(&place, "@/v --nbd tcp:127.0.0.1:0 --insecure");
    let info = export(&place, id);
    let at = info.address.strip_prefix("tcp:").expect("TCP").to_owned();
    assert!(!at.ends_with(":0"), "the port that was chosen is told: {at}");
    assert!(std::net::TcpStream::connect(at).is_ok());
}

#[test]
fn wire_objects_are_printed_as_they_came() {
    let place = place(User::Me);
    let words = "export @/v --nbd unix:@/s --key file:@/one --detach --json";
    assert!(matches!(place.answer(words), Reply::Exported { export: 1, .. }));
    match place.answer("export stats 1 --json") {
        Reply::ExportStats(stats) => assert_eq!(stats.info.export, 1),
        other => panic!("{other:?}"),
    }
    match place.answer("export stop 1 --json") {
        Reply::Exports(exports) => assert_eq!(exports[0].state, State::Stopped),
        other => panic!("{other:?}"),
    }
}
