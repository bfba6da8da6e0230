//! The NBD client against real servers: volumes opened, read and written through the engine's own queues and devices.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::backend::blocking::Blocking;
use engine::backend::device::{Device, Nature, Purpose, Region};
use engine::backend::{Done, Op, Port, Position, Queue, QueueChoice, What, nbd, open_queue};
use engine::error::ErrorKind;
use engine::sys::buffer::{Arena, Buf};
use tests::nbd_servers::Server;
use tests::{PATIENCE, Scratch};

const BOTH: Purpose = Purpose { read: true, write: true, stream: false };
const READ: Purpose = Purpose { read: true, write: false, stream: false };

fn open(server: &Server, connections: usize) -> Device {
    nbd::open(server.connect(connections), &server.remote(""), None, "remote", BOTH).expect("opened")
}

/// Bytes that differ everywhere, from a seed.
fn noise(seed: u64, count: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes()[3]
    };
    std::iter::repeat_with(next).take(count).collect()
}

/// A file of so many bytes that is gone when dropped.
struct Image(std::path::PathBuf);

impl Image {
    fn of(bytes: &[u8]) -> Self {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let name = format!("nbd-image-{}-{number}", std::process::id());
        let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        std::fs::write(&path, bytes).expect("image");
        Self(path)
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A queue with a remote volume on it.
struct Bench {
    queue: Box<dyn Queue>,
    port: Port,
    free: Vec<Buf>,
}

impl Bench {
    fn of(device: &Device, buffers: u32, bytes: u32) -> Self {
        let mut arena = Arena::new(buffers, bytes).expect("arena");
        let mut queue = open_queue(QueueChoice::Auto, &arena, buffers).expect("queue");
        let port = queue.attach(Arc::clone(device.file())).expect("attached");
        Self { queue, port, free: arena.take_all() }
    }

    fn push(&mut self, token: u64, what: What) {
        self.queue.push(Op { token, port: self.port, what }).expect("accepted");
    }

    fn next(&mut self) -> Vec<Done> {
        let deadline = Instant::now() + PATIENCE;
        let mut done = Vec::new();
        while done.is_empty() {
            assert!(Instant::now() < deadline, "nothing completes");
            self.queue.wait(Some(deadline)).expect("wait");
            self.queue.reap(&mut done);
        }
        done
    }

    fn run(&mut self, what: What) -> Done {
        self.push(7, what);
        let mut done = self.next();
        assert_eq!((done.len(), done[0].token), (1, 7));
        done.remove(0)
    }
}

#[test]
fn what_is_written_is_read_back_by_blocking_calls() {
    for arguments in [&["memory", "64M"][..], &["--no-sr", "memory", "64M"]] {
        let Some(server) = Server::nbdkit(arguments) else { return };
        let device = open(&server, 1);
        assert_eq!((device.nature(), device.size()), (Nature::Block, Some(64 << 20)));
        assert!(device.is_remote() && !device.is_memory());
        let mut blocking = Blocking::open(Arc::clone(device.file()), "remote", 1).expect("blocking");
        let bytes = noise(1, (3 << 20) + 4096);
        blocking.write(8192, &bytes).expect("written");
        blocking.flush().expect("flushed");
        let mut back = vec![0; bytes.len()];
        blocking.read(8192, &mut back).expect("read");
        assert!(back == bytes);
        let mut zeros = vec![1; 8192];
        blocking.read(0, &mut zeros).expect("read");
        assert!(zeros.iter().all(|&byte| byte == 0));
        device.sync_all().expect("flushed");
        let error = blocking.read((64 << 20) - 10, &mut [0; 11]).expect_err("behind the end");
        assert_eq!(error.kind(), ErrorKind::Invalid);
        let error = blocking.write(64 << 20, &[0; 512]).expect_err("behind the end");
        assert_eq!(error.kind(), ErrorKind::NoSpace);
    }
}

#[test]
fn many_requests_are_in_flight_over_several_connections() {
    let Some(server) = Server::nbdkit(&["memory", "64M"]) else { return };
    let device = open(&server, 3);
    assert_eq!(device.remote().expect("remote").connections(), 3);
    let model = noise(2, 64 << 20);
    let mut benches: Vec<Bench> = (0..4).map(|_| Bench::of(&device, 8, 1 << 20)).collect();
    // Each queue carries every fourth piece; four queues share three connections.
    for round in 0..16_u64 {
        for (at, bench) in benches.iter_mut().enumerate() {
            let offset = (round * 4 + at as u64) << 20;
            let start = usize::try_from(offset).expect("small");
            let mut buf = bench.free.pop().expect("a buffer");
            buf.copy_from_slice(&model[start..start + (1 << 20)]);
            bench.push(round, What::Write { position: Position::At(offset), buf, span: 0..1 << 20 });
            if bench.free.is_empty() {
                for done in bench.next() {
                    assert_eq!(done.result.expect("written"), 1 << 20);
                    bench.free.extend(done.buf);
                }
            }
        }
    }
    for bench in &mut benches {
        while bench.queue.in_flight() > 0 {
            for done in bench.next() {
                assert_eq!(done.result.expect("written"), 1 << 20);
                bench.free.extend(done.buf);
            }
        }
        bench.run(What::Flush).result.expect("flushed");
    }
    // Reads of odd places and lengths, all at once.
    let bench = &mut benches[0];
    let mut wanted = Vec::new();
    for (token, buf) in (0..).zip(std::mem::take(&mut bench.free)) {
        let offset = token * 7_654_321 + 13;
        let length = u32::try_from(900_001 - token * 1000).expect("small");
        wanted.push((offset, length));
        bench.push(token, What::Read { position: Position::At(offset), buf, span: 5..5 + length });
    }
    while bench.queue.in_flight() > 0 {
        for done in bench.next() {
            let (offset, length) = wanted[usize::try_from(done.token).expect("small")];
            assert_eq!(done.result.expect("read"), length);
            let start = usize::try_from(offset).expect("small");
            let buf = done.buf.expect("the buffer comes back");
            assert!(buf[5..5 + length as usize] == model[start..start + length as usize]);
        }
    }
}

#[test]
fn a_server_that_takes_few_clients_is_used_over_fewer_connections() {
    let image = Image::of(&noise(6, 1 << 20));
    let path = image.0.to_str().expect("a path of a test");
    // One turns the others away; the other lets them wait.
    let limited = ["--filter=limit", "file", path, "limit=2"];
    let servers = [Server::nbdkit(&limited), Server::qemu(&image.0, &["-e", "2"])];
    for server in servers.into_iter().flatten() {
        let device = open(&server, 4);
        assert_eq!(device.remote().expect("remote").connections(), 2);
        let mut blocking = Blocking::open(Arc::clone(device.file()), "remote", 1).expect("blocking");
        let mut bytes = vec![0; 1 << 20];
        blocking.read(0, &mut bytes).expect("read");
        assert!(bytes == noise(6, 1 << 20));
    }
}

#[test]
fn an_image_of_qemu_is_read_and_written() {
    let image = Image::of(&noise(3, 16 << 20));
    let Some(server) = Server::qemu(&image.0, &["-e", "8"]) else { return };
    let device = open(&server, 2);
    let mut bench = Bench::of(&device, 4, 1 << 20);
    let model = noise(3, 16 << 20);
    for token in 0..16_u64 {
        let buf = bench.free.pop().expect("a buffer");
        let done = bench.run(What::Read { position: Position::At(token << 20), buf, span: 0..1 << 20 });
        assert_eq!(done.result.expect("read"), 1 << 20);
        let buf = done.buf.expect("comes back");
        let start = usize::try_from(token << 20).expect("small");
        assert!(buf[..] == model[start..start + (1 << 20)]);
        bench.free.push(buf);
    }
    let mut buf = bench.free.pop().expect("a buffer");
    buf.fill(0x5a);
    let done = bench.run(What::Write { position: Position::At(4096), buf, span: 0..8192 });
    assert_eq!(done.result.expect("written"), 8192);
    bench.run(What::Flush).result.expect("flushed");
    drop((bench, device));
    let mut back = [0; 8192];
    std::fs::File::open(&image.0).expect("image").read_exact_at(&mut back, 4096).expect("read");
    assert_eq!(back, [0x5a; 8192]);
}

#[test]
fn an_error_of_the_server_is_the_operations_and_nobody_elses() {
    let arguments = ["--filter=error", "memory", "1M", "error-pwrite=ENOSPC", "error-pwrite-rate=1"];
    let Some(server) = Server::nbdkit(&arguments) else { return };
    let device = open(&server, 1);
    let mut bench = Bench::of(&device, 2, 4096);
    let buf = bench.free.pop().expect("a buffer");
    let done = bench.run(What::Write { position: Position::At(0), buf, span: 0..4096 });
    assert_eq!(done.result.expect_err("no room").raw_os_error(), Some(28));
    let buf = done.buf.expect("comes back");
    assert_eq!(
        bench.run(What::Read { position: Position::At(0), buf, span: 0..4096 }).result.expect("read"),
        4096
    );
}

#[test]
fn an_export_that_is_not_there_or_may_not_be_written_is_refused() {
    let image = Image::of(&[0; 8192]);
    let Some(server) = Server::qemu(&image.0, &["-x", "one", "-r", "-e", "4"]) else { return };
    let error = nbd::open(server.connect(1), &server.remote("two"), None, "remote", READ)
        .expect_err("no such export");
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.chain().contains("no export “two”"), "{}", error.chain());
    let error =
        nbd::open(server.connect(1), &server.remote("one"), None, "remote", BOTH).expect_err("read-only");
    assert_eq!(error.kind(), ErrorKind::Denied);
    let device = nbd::open(server.connect(1), &server.remote("one"), None, "remote", READ).expect("opened");
    assert_eq!(device.size(), Some(8192));
    let pipe = std::io::pipe().expect("pipe").0;
    let error =
        nbd::open(vec![pipe.into()], &server.remote("one"), None, "remote", READ).expect_err("a pipe");
    assert_eq!(error.kind(), ErrorKind::Invalid);
}

#[test]
fn a_slow_server_can_be_left() {
    let Some(server) = Server::nbdkit(&["--filter=delay", "memory", "1M", "rdelay=30"]) else { return };
    let device = open(&server, 1);
    let mut bench = Bench::of(&device, 4, 4096);
    for token in 0..4 {
        let buf = bench.free.pop().expect("a buffer");
        bench.push(token, What::Read { position: Position::At(0), buf, span: 0..4096 });
    }
    bench.queue.wait(Some(Instant::now() + Duration::from_millis(50))).expect("wait");
    bench.queue.cancel(bench.port);
    let mut done = Vec::new();
    while done.len() < 4 {
        done.extend(bench.next());
    }
    assert!(done.iter().all(|done| done.result.as_ref().is_err_and(|e| e.raw_os_error() == Some(125))));
    assert!(done.iter().all(|done| done.buf.is_some()));
}

#[test]
fn a_server_that_dies_fails_what_is_in_flight() {
    let Some(mut server) = Server::nbdkit(&["--filter=delay", "memory", "1M", "wdelay=30"]) else { return };
    let device = open(&server, 1);
    let mut bench = Bench::of(&device, 4, 4096);
    for token in 0..4 {
        let buf = bench.free.pop().expect("a buffer");
        bench.push(token, What::Write { position: Position::At(0), buf, span: 0..4096 });
    }
    bench.queue.kick().expect("kick");
    server.kill();
    let mut done = Vec::new();
    while done.len() < 4 {
        done.extend(bench.next());
    }
    for done in done {
        let error = done.result.expect_err("lost");
        assert!(error.to_string().contains("the connection to the NBD server is lost"), "{error}");
        bench.free.extend(done.buf);
    }
    assert_eq!(bench.free.len(), 4);
}

#[test]
fn the_same_export_is_the_same_and_is_locked_for_others() {
    let Some(server) = Server::nbdkit(&["memory", "1M"]) else { return };
    let (one, two) = (open(&server, 1), open(&server, 1));
    assert!(one.is_same_as(&two));
    one.lock().expect("locked");
    assert_eq!(two.lock().expect_err("held").kind(), ErrorKind::Conflict);
    drop(one);
    two.lock().expect("free again");
    let Some(other) = Server::nbdkit(&["memory", "1M"]) else { return };
    assert!(!open(&other, 1).is_same_as(&two));
    assert_eq!(two.region_at(0), Some(Region::Data { until: 1 << 20 }));
}

/// The regions of a device that are data, start to end.
fn data_of(device: &Device) -> Vec<(u64, u64)> {
    let mut offset = 0;
    let mut data = Vec::new();
    while let Some(region) = device.region_at(offset) {
        if let Region::Data { until } = region {
            data.push((offset, until));
        }
        offset = region.until();
    }
    data
}

#[test]
fn zeros_of_a_source_are_learned_once_and_not_of_a_sink() {
    let Some(server) = Server::nbdkit(&["memory", "3G"]) else { return };
    let device = open(&server, 1);
    let mut blocking = Blocking::open(Arc::clone(device.file()), "remote", 1).expect("blocking");
    blocking.write(1 << 20, &[1; 32768]).expect("written");
    blocking.write((2 << 30) + (1 << 20), &[1; 65536]).expect("written");
    assert!(!device.may_have_holes(), "what is written to changes");
    assert_eq!(data_of(&device), [(0, 3 << 30)]);
    let source = nbd::open(server.connect(1), &server.remote(""), None, "remote", READ).expect("opened");
    assert_eq!(data_of(&source), [(0, 3 << 30)], "nobody asked yet");
    let error = source.learn_holes(&|| true).expect_err("given up at once");
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    source.learn_holes(&|| false).expect("told");
    assert!(source.may_have_holes());
    let far = (2 << 30) + (1 << 20);
    assert_eq!(data_of(&source), [(1 << 20, (1 << 20) + 32768), (far, far + 65536)]);
    let Some(plain) = Server::nbdkit(&["--no-sr", "memory", "1M"]) else { return };
    let source = nbd::open(plain.connect(1), &plain.remote(""), None, "remote", READ).expect("opened");
    let error = source.learn_holes(&|| false).expect_err("it does not say");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(!source.may_have_holes(), "a server without block status has data only");
}

#[test]
fn a_block_of_which_a_part_is_a_hole_is_data() {
    let scratch = Scratch::new();
    let file = scratch.join("odd");
    std::fs::write(&file, noise(5, (1 << 20) + 1000)).expect("written");
    // The filter tells of the file's end where it is, and the policy answers no question that begins there.
    let Some(server) = Server::nbdkit(&[
        "--filter=blocksize-policy",
        "--filter=truncate",
        "file",
        file.to_str().expect("a path of a test"),
        "truncate=2M",
        "blocksize-minimum=4096",
        "blocksize-error-policy=error",
    ]) else {
        return;
    };
    let source = nbd::open(server.connect(1), &server.remote(""), None, "remote", READ).expect("opened");
    source.learn_holes(&|| false).expect("told");
    assert_eq!(data_of(&source), [(0, (1 << 20) + 4096)]);
}

fn run(program: &str, arguments: &[&str]) -> bool {
    std::process::Command::new(program)
        .args(arguments)
        .stdout(std::process::Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

#[test]
fn a_dirty_bitmap_of_qemu_marks_what_was_written() {
    let image = Image::of(&[]);
    let path = image.0.to_str().expect("a path of a test");
    if !run("qemu-img", &["create", "-q", "-f", "qcow2", path, "64M"]) {
        return tests::skip("no qemu-img");
    }
    assert!(run("qemu-img", &["bitmap", "--add", "-g", "64K", path, "since"]));
    for write in ["write -q -P 7 1M 64k", "write -q -P 7 10M 192k", "write -q -P 7 63M 1M"] {
        assert!(run("qemu-io", &["-f", "qcow2", "-c", write, path]));
    }
    let Some(server) =
        Server::start("qemu-nbd", &["-k", "SOCKET", "-f", "qcow2", "-t", "-r", "-B", "since", path])
    else {
        return;
    };
    let mut remote = server.remote("");
    remote.bitmap = Some("qemu:dirty-bitmap:since".to_owned());
    let source = nbd::open(server.connect(1), &remote, None, "remote", READ).expect("opened");
    let marked: Vec<_> = nbd::marked(&source, &|| false)
        .expect("asked")
        .iter()
        .map(|extent| (extent.start(), extent.end()))
        .collect();
    const MIB: u64 = 1 << 20;
    assert_eq!(marked, [(MIB, MIB + 65536), (10 * MIB, 10 * MIB + 196_608), (63 * MIB, 64 * MIB)]);
    remote.bitmap = Some("qemu:dirty-bitmap:other".to_owned());
    drop(source);
    let source = nbd::open(server.connect(1), &remote, None, "remote", READ).expect("opened");
    let error = nbd::marked(&source, &|| false).expect_err("no such bitmap");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}

#[test]
fn a_server_that_comes_back_is_asked_again_for_what_it_did_not_answer() {
    let image = Image::of(&noise(5, 8 << 20));
    let path = image.0.to_str().expect("a path of a test");
    let Some(mut server) = Server::nbdkit(&["--filter=delay", "file", path, "rdelay=300ms"]) else { return };
    let device =
        nbd::open(server.connect(2), &server.remote_again(""), None, "remote", READ).expect("opened");
    let mut bench = Bench::of(&device, 8, 1 << 20);
    let model = noise(5, 8 << 20);
    for token in 0..8_u64 {
        let buf = bench.free.pop().expect("a buffer");
        bench.push(token, What::Read { position: Position::At(token << 20), buf, span: 0..1 << 20 });
    }
    bench.queue.kick().expect("kick");
    server.kill();
    let deadline = Instant::now() + Duration::from_millis(300);
    bench.queue.wait(Some(deadline)).expect("wait");
    server.restart();
    let mut done = Vec::new();
    while done.len() < 8 {
        done.extend(bench.next());
    }
    for done in done {
        assert_eq!(done.result.expect("read, by the second server"), 1 << 20);
        let start = usize::try_from(done.token << 20).expect("small");
        assert!(done.buf.expect("comes back")[..] == model[start..start + (1 << 20)]);
    }
}

#[test]
fn after_a_break_everything_fails_if_writes_may_be_lost_and_only_then() {
    let image = Image::of(&vec![0; 1 << 20]);
    let path = image.0.to_str().expect("a path of a test");
    for flushed_before in [true, false] {
        let Some(mut server) = Server::nbdkit(&["file", path]) else { return };
        let device =
            nbd::open(server.connect(1), &server.remote_again(""), None, "remote", BOTH).expect("opened");
        let mut blocking = Blocking::open(Arc::clone(device.file()), "remote", 1).expect("blocking");
        blocking.write(0, &[1; 4096]).expect("written");
        if flushed_before {
            blocking.flush().expect("flushed");
        }
        server.kill();
        server.restart();
        if flushed_before {
            blocking.read(0, &mut [0; 4096]).expect("read");
            blocking.write(4096, &[2; 4096]).expect("written");
            blocking.flush().expect("nothing was lost");
        } else {
            let error = blocking.read(0, &mut [0; 4096]).expect_err("it may be what was there before");
            assert!(error.chain().contains("may be lost"), "{}", error.chain());
            let error = blocking.write(4096, &[2; 4096]).expect_err("it would be for nothing");
            assert!(error.chain().contains("may be lost"), "{}", error.chain());
            for _ in 0..2 {
                let error = blocking.flush().expect_err("what was acknowledged may be lost");
                assert!(error.chain().contains("may be lost"), "{}", error.chain());
            }
        }
    }
}

#[test]
fn a_server_that_does_not_come_back_or_is_another_is_given_up() {
    let Some(mut server) = Server::nbdkit(&["memory", "1M"]) else { return };
    let mut remote = server.remote_again("");
    remote.reconnect_ms = Some(500);
    let device = nbd::open(server.connect(1), &remote, None, "remote", BOTH).expect("opened");
    let mut bench = Bench::of(&device, 1, 4096);
    server.kill();
    let buf = bench.free.pop().expect("a buffer");
    let done = bench.run(What::Read { position: Position::At(0), buf, span: 0..4096 });
    let text = done.result.expect_err("gone").to_string();
    assert!(text.contains("connecting again: cannot connect"), "{text}");
    drop((bench, device));
    server.restart();
    let device =
        nbd::open(server.connect(1), &server.remote_again(""), None, "remote", BOTH).expect("opened");
    let mut bench = Bench::of(&device, 1, 4096);
    server.kill();
    server.become_another(&["memory", "2M"]);
    let buf = bench.free.pop().expect("a buffer");
    let done = bench.run(What::Read { position: Position::At(0), buf, span: 0..4096 });
    let text = done.result.expect_err("another").to_string();
    assert!(text.contains("not what it was before"), "{text}");
}

/// Certificates in the way nbdkit wants them: a directory of an authority and what it signed.
fn certificates() -> (std::path::PathBuf, Vec<u8>) {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
    let dir =
        std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("nbd-tls-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a directory");
    let mut params = CertificateParams::new(Vec::new()).expect("parameters");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority =
        CertifiedIssuer::self_signed(params, KeyPair::generate().expect("key")).expect("authority");
    let key = KeyPair::generate().expect("key");
    let signed =
        CertificateParams::new(vec!["localhost".to_owned()]).expect("parameters").signed_by(&key, &authority);
    std::fs::write(dir.join("ca-cert.pem"), authority.pem()).expect("written");
    std::fs::write(dir.join("server-cert.pem"), signed.expect("signed").pem()).expect("written");
    std::fs::write(dir.join("server-key.pem"), key.serialize_pem()).expect("written");
    (dir, authority.pem().into_bytes())
}

#[test]
fn tls_is_demanded_and_checked() {
    let (dir, authority) = certificates();
    let directory = format!("--tls-certificates={}", dir.display());
    let Some(server) = Server::nbdkit(&["--tls=require", &directory, "memory", "16M"]) else { return };
    let mut remote = server.remote("");
    remote.tls = Some(proto::remote::Tls {
        server_name: "localhost".to_owned(),
        authorities_fd: None,
        identity_fds: None,
    });
    let credentials = |name: &str, authorities: &[u8]| nbd::tls::Credentials {
        server_name: name.to_owned(),
        authorities: Some(authorities.to_vec()),
        identity: None,
    };
    let good = credentials("localhost", &authority);
    let device = nbd::open(server.connect(2), &remote, Some(&good), "remote", BOTH).expect("opened");
    let mut blocking = Blocking::open(Arc::clone(device.file()), "remote", 1).expect("blocking");
    let bytes = noise(9, 9 << 20);
    blocking.write(12_345, &bytes).expect("written");
    blocking.flush().expect("flushed");
    let mut back = vec![0; bytes.len()];
    blocking.read(12_345, &mut back).expect("read");
    assert!(back == bytes);
    let wrong = credentials("elsewhere", &authority);
    let error =
        nbd::open(server.connect(1), &remote, Some(&wrong), "remote", BOTH).expect_err("another name");
    assert_eq!(error.kind(), ErrorKind::Denied, "{}", error.chain());
    let stranger =
        rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).expect("certificate").cert.pem();
    let strange = credentials("localhost", stranger.as_bytes());
    let error =
        nbd::open(server.connect(1), &remote, Some(&strange), "remote", BOTH).expect_err("a stranger's");
    assert_eq!(error.kind(), ErrorKind::Denied, "{}", error.chain());
    let error = nbd::open(server.connect(1), &server.remote(""), None, "remote", BOTH).expect_err("no TLS");
    assert!(error.chain().contains("TLS"), "{}", error.chain());
    let Some(plain) = Server::nbdkit(&["--tls=off", "memory", "1M"]) else { return };
    let error = nbd::open(plain.connect(1), &remote, Some(&good), "remote", BOTH).expect_err("no TLS there");
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{}", error.chain());
    let _ = std::fs::remove_dir_all(dir);
}
