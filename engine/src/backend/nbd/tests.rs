//! Servers that lie, over a pair of sockets: every one is refused, nothing panics, nothing hangs, and every operation comes back.

mod breaks;
mod holes;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::AtomicUsize;
use std::thread::JoinHandle;

use super::*;
use crate::backend::blocking::Blocking;
use crate::backend::{Done, Op, Port, Position, Queue, QueueChoice, What, open_queue};
use crate::format::nbd::option::{answer, info, number};
use crate::format::nbd::reply::{FLAG_DONE, kind, put_chunk, put_simple};
use crate::format::nbd::{CHUNK_MAGIC, GREETING_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC};
use crate::sys::buffer::{Arena, Buf};

const BOTH: Purpose = Purpose { read: true, write: true, stream: false };
const PATIENCE: Duration = Duration::from_secs(60);
const PLAIN: u16 = flags::HAS_FLAGS | flags::SEND_FLUSH;

fn remote() -> Remote {
    Remote { export: "disk".to_owned(), ..Remote::default() }
}

fn greeting(flags: u16) -> Vec<u8> {
    [&GREETING_MAGIC.to_be_bytes()[..], &OPTION_MAGIC.to_be_bytes(), &flags.to_be_bytes()].concat()
}

fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).expect("short");
    [
        &OPTION_REPLY_MAGIC.to_be_bytes()[..],
        &option.to_be_bytes(),
        &kind.to_be_bytes(),
        &length.to_be_bytes(),
        data,
    ]
    .concat()
}

fn export(size: u64, flags: u16) -> Vec<u8> {
    let data = [&info::EXPORT.to_be_bytes()[..], &size.to_be_bytes(), &flags.to_be_bytes()].concat();
    reply(number::GO, answer::INFO, &data)
}

fn blocks(min: u32, preferred: u32, max: u32) -> Vec<u8> {
    let data = [
        &info::BLOCK_SIZE.to_be_bytes()[..],
        &min.to_be_bytes(),
        &preferred.to_be_bytes(),
        &max.to_be_bytes(),
    ]
    .concat();
    reply(number::GO, answer::INFO, &data)
}

/// What a server says up to GO: structured replies, no contexts.
fn before_go() -> Vec<u8> {
    [
        greeting(3),
        reply(number::EXTENDED_HEADERS, answer::ERR_UNSUP, b"what?"),
        reply(number::STRUCTURED_REPLY, answer::ACK, &[]),
        reply(number::SET_META_CONTEXT, answer::ACK, &[]),
    ]
    .concat()
}

fn script(go: &[Vec<u8>]) -> Vec<u8> {
    [before_go(), go.concat(), reply(number::GO, answer::ACK, &[])].concat()
}

/// Open an export of a server that says all of this at once, whatever it hears.
fn open_scripted(bytes: &[u8]) -> Result<(Device, UnixStream)> {
    let (ours, mut theirs) = UnixStream::pair().expect("sockets");
    theirs.write_all(bytes).expect("room for a script");
    // Nothing follows: a client that waits for more finds the end.
    theirs.shutdown(std::net::Shutdown::Write).expect("shut down");
    nbd_open(ours).map(|device| (device, theirs))
}

fn nbd_open(ours: UnixStream) -> Result<Device> {
    open(vec![ours.into()], &remote(), None, "remote", BOTH)
}

#[test]
fn a_server_that_makes_sense_is_believed() {
    let (device, _theirs) =
        open_scripted(&script(&[export(1 << 20, PLAIN), blocks(512, 4096, 1 << 20)])).expect("opened");
    assert_eq!((device.size(), device.direct_alignment()), (Some(1 << 20), Some(512)));
    let facts = device.remote().expect("remote").facts().clone();
    assert_eq!((facts.payload_max, facts.block_preferred, facts.contexts.len()), (1 << 20, 4096, 0));
    assert!(find(device.file()).is_some());
    let file = Arc::clone(device.file());
    drop(device);
    assert!(find(&file).is_some(), "open as long as anybody has the descriptor");
}

#[test]
fn what_makes_no_sense_is_refused() {
    let go = |parts: &[Vec<u8>]| script(parts);
    let huge = [
        &OPTION_REPLY_MAGIC.to_be_bytes()[..],
        &number::EXTENDED_HEADERS.to_be_bytes(),
        &1_u32.to_be_bytes(),
        &u32::MAX.to_be_bytes(),
    ]
    .concat();
    let cases: Vec<(&str, Vec<u8>, ErrorKind)> = vec![
        ("greeting", b"HTTP/1.1 400 Bad Request".to_vec(), ErrorKind::Io),
        (
            "old style",
            [&GREETING_MAGIC.to_be_bytes()[..], &0x0000_4202_8186_1253_u64.to_be_bytes()].concat(),
            ErrorKind::Unsupported,
        ),
        ("a reply of 4 GiB", [greeting(3), huge].concat(), ErrorKind::Io),
        ("size", go(&[export(1 << 63, PLAIN)]), ErrorKind::Io),
        ("flags", go(&[export(1 << 20, 0)]), ErrorKind::Io),
        ("no size", go(&[]), ErrorKind::Io),
        ("block 3", go(&[export(1 << 20, PLAIN), blocks(3, 4096, 1 << 20)]), ErrorKind::Io),
        ("block 0", go(&[export(1 << 20, PLAIN), blocks(0, 4096, 1 << 20)]), ErrorKind::Io),
        ("block 1 GiB", go(&[export(1 << 30, PLAIN), blocks(1 << 30, 1 << 30, 1 << 30)]), ErrorKind::Io),
        ("preferred", go(&[export(1 << 20, PLAIN), blocks(4096, 512, 1 << 20)]), ErrorKind::Io),
        ("maximum", go(&[export(1 << 20, PLAIN), blocks(512, 4096, 0)]), ErrorKind::Io),
        ("small maximum", go(&[export(1 << 20, PLAIN), blocks(1, 4096, 100)]), ErrorKind::Unsupported),
        ("odd size", go(&[export((1 << 20) + 1, PLAIN), blocks(512, 4096, 1 << 20)]), ErrorKind::Io),
        ("read-only", go(&[export(1 << 20, PLAIN | flags::READ_ONLY)]), ErrorKind::Denied),
        (
            "unknown",
            [before_go(), reply(number::GO, answer::ERR_UNKNOWN, b"no \x1b[31msuch")].concat(),
            ErrorKind::NotFound,
        ),
        ("policy", [before_go(), reply(number::GO, answer::ERR_POLICY, &[])].concat(), ErrorKind::Denied),
        (
            "tls",
            [greeting(3), reply(number::EXTENDED_HEADERS, answer::ERR_TLS_REQD, &[])].concat(),
            ErrorKind::Denied,
        ),
        (
            "another option's reply",
            [greeting(3), reply(number::LIST, answer::ACK, &[])].concat(),
            ErrorKind::Io,
        ),
        (
            "information without end",
            [before_go(), export(1 << 20, PLAIN).repeat(300)].concat(),
            ErrorKind::Io,
        ),
    ];
    for (name, bytes, expected) in cases {
        let error = open_scripted(&bytes).map(drop).expect_err(name);
        assert_eq!(error.kind(), expected, "{name}: {}", error.chain());
        assert!(!error.chain().contains('\x1b'), "{name}: control characters of the server");
    }
}

#[test]
fn an_end_at_any_byte_is_an_error_and_not_a_hang() {
    let whole = script(&[export(1 << 20, PLAIN), blocks(512, 4096, 1 << 20)]);
    for length in 0..whole.len() {
        let error = open_scripted(&whole[..length]).map(drop).expect_err("cut off");
        assert_eq!(error.kind(), ErrorKind::Io, "{length}: {}", error.chain());
    }
    open_scripted(&whole).expect("all of it");
}

#[test]
fn a_server_that_knows_no_options_is_asked_by_name() {
    for (server, zeros) in [(3, 0), (1, 124), (0, 124)] {
        let mut bytes = greeting(server);
        if server & 1 != 0 {
            for option in [number::EXTENDED_HEADERS, number::STRUCTURED_REPLY, number::GO] {
                bytes.extend(reply(option, answer::ERR_UNSUP, &[]));
            }
        }
        bytes.extend(8192_u64.to_be_bytes());
        bytes.extend(PLAIN.to_be_bytes());
        bytes.extend(vec![0; zeros]);
        let (device, mut theirs) = open_scripted(&bytes).expect("opened");
        assert_eq!(device.size(), Some(8192));
        drop(device);
        let mut heard = Vec::new();
        theirs.read_to_end(&mut heard).expect("heard");
        assert!(heard.windows(4).any(|bytes| bytes == b"disk"));
    }
}

/// A queue on a server whose half of the conversation after haggling is `serve`.
struct Bench {
    queue: Box<dyn Queue>,
    port: Port,
    free: Vec<Buf>,
    _device: Device,
    /// Last: the server ends when the connection does.
    _server: Joined,
}

impl Bench {
    fn new(serve: impl FnOnce(UnixStream) + Send + 'static) -> Self {
        let (ours, mut theirs) = UnixStream::pair().expect("sockets");
        theirs.write_all(&script(&[export(1 << 20, PLAIN), blocks(1, 4096, 1 << 16)])).expect("room");
        let device = nbd_open(ours).expect("opened");
        // What the client said: flags, three options with and one without data.
        let mut heard = [0; 4 + 16 + 16 + (16 + 4 + 4 + 4 + 4 + 15) + (16 + 4 + 4 + 2 + 2)];
        theirs.read_exact(&mut heard).expect("heard");
        let server = std::thread::spawn(move || serve(theirs));
        let mut arena = Arena::new(4, 1 << 17).expect("arena");
        let mut queue = open_queue(QueueChoice::Threads, &arena, 8).expect("queue");
        let port = queue.attach(Arc::clone(device.file())).expect("attached");
        Self { queue, port, free: arena.take_all(), _device: device, _server: Joined(Some(server)) }
    }

    fn read(&mut self, token: u64, length: u32) {
        let mut buf = self.free.pop().expect("a buffer");
        buf.fill(0xee);
        let what = What::Read { position: Position::At(0), buf, span: 0..length };
        self.queue.push(Op { token, port: self.port, what }).expect("accepted");
    }

    fn next(&mut self, count: usize) -> Vec<Done> {
        let deadline = Instant::now() + PATIENCE;
        let mut done = Vec::new();
        while done.len() < count {
            assert!(Instant::now() < deadline, "nothing completes");
            self.queue.wait(Some(deadline)).expect("wait");
            self.queue.reap(&mut done);
        }
        done
    }
}

struct Joined(Option<JoinHandle<()>>);

impl Drop for Joined {
    fn drop(&mut self) {
        if let Some(server) = self.0.take() {
            let _ = server.join();
        }
    }
}

fn cookie_of(request: &[u8]) -> u64 {
    u64::from_be_bytes(request[8..16].try_into().expect("8 bytes"))
}

fn hear(stream: &mut UnixStream) -> u64 {
    let mut request = [0; 28];
    stream.read_exact(&mut request).expect("a request");
    cookie_of(&request)
}

fn chunk(flags: u16, kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 32];
    let count = put_chunk(&mut bytes, false, flags, kind, cookie, 0, payload.len() as u64);
    bytes.truncate(count);
    bytes.extend(payload);
    bytes
}

fn data(flags: u16, cookie: u64, offset: u64, bytes: &[u8]) -> Vec<u8> {
    chunk(flags, kind::OFFSET_DATA, cookie, &[&offset.to_be_bytes()[..], bytes].concat())
}

fn hole(flags: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    chunk(flags, kind::OFFSET_HOLE, cookie, &[&offset.to_be_bytes()[..], &length.to_be_bytes()].concat())
}

fn fault(kind: u16, cookie: u64, error: u32, told: u16, text: &[u8]) -> Vec<u8> {
    chunk(FLAG_DONE, kind, cookie, &[&error.to_be_bytes()[..], &told.to_be_bytes(), text].concat())
}

#[test]
fn replies_in_pieces_and_out_of_order_make_what_was_asked() {
    let mut bench = Bench::new(|mut stream| {
        let (one, two) = (hear(&mut stream), hear(&mut stream));
        let mut bytes = data(0, two, 4, &[4, 5, 6, 7]);
        bytes.extend(data(0, one, 0, &[1; 8]));
        bytes.extend(hole(0, two, 2, 2));
        bytes.extend(data(0, two, 0, &[0xa, 0xb]));
        bytes.extend(chunk(FLAG_DONE, kind::NONE, two, &[]));
        bytes.extend(chunk(FLAG_DONE, kind::NONE, one, &[]));
        for byte in bytes {
            stream.write_all(&[byte]).expect("sent");
        }
        let _ = stream.read(&mut [0; 64]);
    });
    bench.read(1, 8);
    bench.read(2, 8);
    let done = bench.next(2);
    assert_eq!((done[0].token, done[1].token), (2, 1));
    assert_eq!(done[0].buf.as_ref().expect("back")[..9], [0xa, 0xb, 0, 0, 4, 5, 6, 7, 0xee]);
    assert_eq!(done[1].buf.as_ref().expect("back")[..8], [1; 8]);
    assert!(done.iter().all(|done| matches!(done.result, Ok(8))));
    bench.queue.detach(bench.port);
    drop(done);
    bench.free.clear();
}

/// What the server says to a read of 8 bytes, and words of the error that must come of it.
type Lie = (&'static str, fn(u64) -> Vec<u8>, &'static str);

#[test]
fn lies_end_the_connection_and_bring_every_operation_back() {
    let lies: [Lie; 18] = [
        ("magic", |_| vec![0x55; 32], "magics"),
        ("cookie", |cookie| data(FLAG_DONE, cookie ^ 1, 0, &[0; 8]), "not asked"),
        ("old cookie", |cookie| data(FLAG_DONE, cookie + (1 << 24), 0, &[0; 8]), "not asked"),
        (
            "twice",
            |cookie| [data(FLAG_DONE, cookie, 0, &[0; 8]), data(FLAG_DONE, cookie, 0, &[0; 8])].concat(),
            "not asked",
        ),
        ("too long", |cookie| data(FLAG_DONE, cookie, 0, &[0; 9]), "beyond"),
        ("before", |cookie| data(FLAG_DONE, cookie, u64::MAX, &[0; 8]), "beyond"),
        (
            "overlap",
            |cookie| [data(0, cookie, 0, &[0; 5]), data(FLAG_DONE, cookie, 4, &[0; 4])].concat(),
            "overlap",
        ),
        ("missing", |cookie| data(FLAG_DONE, cookie, 0, &[0; 7]), "the end of a reply"),
        ("nothing", |cookie| chunk(FLAG_DONE, kind::NONE, cookie, &[]), "the end of a reply"),
        ("endless nothing", |cookie| chunk(0, kind::NONE, cookie, &[]), "no answer"),
        ("hole of 4 GiB", |cookie| hole(FLAG_DONE, cookie, 0, u32::MAX), "beyond"),
        ("hole of none", |cookie| hole(FLAG_DONE, cookie, 0, 0), "overlap"),
        ("hole too long", |cookie| chunk(FLAG_DONE, kind::OFFSET_HOLE, cookie, &[0; 13]), "no answer"),
        ("status", |cookie| chunk(FLAG_DONE, kind::BLOCK_STATUS, cookie, &[0; 12]), "no answer"),
        ("text beyond", |cookie| fault(kind::ERROR, cookie, 5, 100, b"short"), "text is longer"),
        ("no error", |cookie| fault(kind::ERROR, cookie, 0, 0, b""), "without an error"),
        (
            "simple",
            |cookie| {
                let mut bytes = vec![0; 16];
                put_simple(&mut bytes, 0, cookie);
                bytes
            },
            "structured",
        ),
        (
            "length",
            |cookie| {
                let head = [
                    &CHUNK_MAGIC.to_be_bytes()[..],
                    &[0, 1, 0, 1],
                    &cookie.to_be_bytes(),
                    &u32::MAX.to_be_bytes(),
                ];
                [&head.concat()[..], &[0; 8]].concat()
            },
            "beyond",
        ),
    ];
    for (name, lie, words) in lies {
        let mut bench = Bench::new(move |mut stream| {
            let cookie = hear(&mut stream);
            // The client may be gone before it has heard all of it.
            let _ = stream.write_all(&lie(cookie));
            let _ = stream.read_to_end(&mut Vec::new());
        });
        bench.read(1, 8);
        bench.queue.kick().expect("kick");
        bench.read(2, 8);
        let done = bench.next(2);
        assert_eq!(bench.queue.in_flight(), 0, "{name}");
        // One may have been answered before the lie; the last was not.
        let error = done.iter().find_map(|done| done.result.as_ref().err()).expect(name).to_string();
        let last = done.iter().find(|done| done.token == 2).expect("back");
        let text = last.result.as_ref().expect_err(name).to_string();
        assert!(text.contains(words) && text.contains("breaks the protocol"), "{name}: {text} / {error}");
        assert!(done.iter().all(|done| done.buf.is_some()), "{name}");
        // And so does everything that follows.
        bench.free.extend(done.into_iter().filter_map(|done| done.buf));
        bench.read(3, 8);
        assert!(bench.next(1)[0].result.is_err(), "{name}");
        bench.queue.detach(bench.port);
        bench.queue =
            open_queue(QueueChoice::Threads, &Arena::new(1, 4096).expect("arena"), 1).expect("queue");
    }
}

#[test]
fn an_error_with_words_is_the_operations_alone() {
    let mut bench = Bench::new(|mut stream| {
        let cookie = hear(&mut stream);
        stream.write_all(&fault(kind::ERROR, cookie, 5, 8, b"no\x07 luck")).expect("sent");
        let cookie = hear(&mut stream);
        stream.write_all(&data(FLAG_DONE, cookie, 0, &[7; 8])).expect("sent");
        let _ = stream.read(&mut [0; 64]);
    });
    bench.read(1, 8);
    let done = bench.next(1).remove(0);
    let text = done.result.expect_err("failed").to_string();
    assert_eq!(text, "input/output error (EIO); the server says: no\\u{7} luck");
    bench.read(2, 8);
    let done = bench.next(1).remove(0);
    assert_eq!(done.result.expect("read"), 8);
    bench.queue.detach(bench.port);
}

#[test]
fn an_end_at_any_byte_of_a_reply_brings_every_operation_back() {
    let whole = |cookie| [data(0, cookie, 0, &[9; 4]), hole(FLAG_DONE, cookie, 4, 4)].concat();
    for length in 0..whole(0).len() {
        let mut bench = Bench::new(move |mut stream| {
            let cookie = hear(&mut stream);
            stream.write_all(&whole(cookie)[..length]).expect("sent");
        });
        bench.read(1, 8);
        let done = bench.next(1).remove(0);
        let text = done.result.expect_err("cut off").to_string();
        assert!(text.contains("the connection to the NBD server is lost"), "{length}: {text}");
        assert!(done.buf.is_some());
    }
}

#[test]
fn a_large_write_goes_out_in_pieces_the_server_takes() {
    let mut bench = Bench::new(|mut stream| {
        let mut cookies = Vec::new();
        for at in 0..2_u64 {
            let mut request = [0; 28];
            stream.read_exact(&mut request).expect("a request");
            assert_eq!(request[16..24], (at << 16).to_be_bytes());
            assert_eq!(request[24..28], (1_u32 << 16).to_be_bytes());
            let mut payload = vec![0; 1 << 16];
            stream.read_exact(&mut payload).expect("its payload");
            assert!(payload.iter().all(|&byte| byte == 0x42));
            cookies.push(cookie_of(&request));
        }
        for cookie in cookies.into_iter().rev() {
            stream.write_all(&chunk(FLAG_DONE, kind::NONE, cookie, &[])).expect("sent");
        }
        let _ = stream.read(&mut [0; 64]);
    });
    let mut buf = bench.free.pop().expect("a buffer");
    buf.fill(0x42);
    let what = What::Write { position: Position::At(0), buf, span: 0..1 << 17 };
    bench.queue.push(Op { token: 1, port: bench.port, what }).expect("accepted");
    assert_eq!(bench.next(1).remove(0).result.expect("written"), 1 << 17);
    bench.queue.detach(bench.port);
}

#[test]
fn a_write_that_a_stalled_server_has_half_of_can_be_given_up() {
    let (tell, told) = std::sync::mpsc::channel::<()>();
    let mut bench = Bench::new(move |stream| {
        // Reads nothing, and stays until the end of the test.
        let _ = told.recv();
        drop(stream);
    });
    let ports = bench.free.len();
    for token in 0..4 {
        let buf = bench.free.pop().expect("a buffer");
        let what = What::Write { position: Position::At(0), buf, span: 0..1 << 17 };
        bench.queue.push(Op { token, port: bench.port, what }).expect("accepted");
    }
    bench.queue.kick().expect("kick");
    bench.queue.cancel(bench.port);
    let done = bench.next(ports);
    assert!(done.iter().all(|done| done.buf.is_some()));
    let cancelled =
        |done: &Done| done.result.as_ref().is_err_and(|e| e.raw_os_error() == Some(libc::ECANCELED));
    assert!(done.iter().all(cancelled));
    bench.queue.detach(bench.port);
    tell.send(()).expect("the server waits");
}

#[test]
fn a_server_is_the_same_whatever_way_it_is_named() {
    let directory = std::env::temp_dir().join(format!("nbd-same-{}", std::process::id()));
    let real = directory.join("real");
    std::fs::create_dir_all(&real).expect("a directory");
    let link = directory.join("link");
    std::os::unix::fs::symlink("real", &link).expect("a link");
    let one = UnixListener::bind(real.join("one")).expect("bound");
    let two = UnixListener::bind(link.join("two")).expect("bound");
    let to = |path: &std::path::Path| OwnedFd::from(UnixStream::connect(path).expect("connected"));
    let first = identity(&to(&real.join("one")), "disk");
    assert_eq!(identity(&to(&link.join("one")), "disk"), first);
    assert_ne!(identity(&to(&link.join("one")), "other"), first);
    let second = identity(&to(&link.join("two")), "disk");
    assert_eq!(identity(&to(&real.join("two")), "disk"), second);
    assert_ne!(second, first);
    // The name it was bound by leads nowhere any more; it is still the one name the kernel knows.
    std::fs::rename(real.join("one"), directory.join("moved")).expect("moved");
    let moved = identity(&to(&directory.join("moved")), "disk");
    assert_eq!(identity(&to(&link.join("../moved")), "disk"), moved);
    drop((one, two));
    std::fs::remove_dir_all(&directory).expect("removed");

    let server = std::net::TcpListener::bind("[::]:0").expect("bound");
    let port = server.local_addr().expect("an address").port();
    let to = |ip: &str| OwnedFd::from(std::net::TcpStream::connect((ip, port)).expect("connected"));
    let first = identity(&to("127.0.0.1"), "disk");
    assert_eq!(identity(&to("127.0.0.2"), "disk"), first);
    assert_eq!(identity(&to("::1"), "disk"), first);
    let (pair, _other) = UnixStream::pair().expect("sockets");
    let (pair, again) = (OwnedFd::from(pair), UnixStream::pair().expect("sockets"));
    assert_ne!(identity(&pair, "disk"), identity(&again.0.into(), "disk"));
}

fn context(id: u32, name: &str) -> Vec<u8> {
    reply(number::SET_META_CONTEXT, answer::META_CONTEXT, &[&id.to_be_bytes()[..], name.as_bytes()].concat())
}

const BITMAP: &str = "qemu:dirty-bitmap:b";

/// What a server says that has a bitmap.
fn script_with_contexts(ids: [u32; 2]) -> Vec<u8> {
    [
        greeting(3),
        reply(number::EXTENDED_HEADERS, answer::ERR_UNSUP, &[]),
        reply(number::STRUCTURED_REPLY, answer::ACK, &[]),
        context(ids[0], "base:allocation"),
        context(ids[1], BITMAP),
        reply(number::SET_META_CONTEXT, answer::ACK, &[]),
        export(1 << 20, PLAIN),
        reply(number::GO, answer::ACK, &[]),
    ]
    .concat()
}

/// What a client says until then.
const HEARD_WITH_CONTEXTS: usize =
    4 + 16 + 16 + (16 + 4 + 4 + 4 + (4 + 15) + (4 + BITMAP.len())) + (16 + 4 + 4 + 2 + 2);

fn status(flags: u16, cookie: u64, context: u32, extents: &[(u32, u32)]) -> Vec<u8> {
    let extents = extents.iter().flat_map(|(length, flags)| [length.to_be_bytes(), flags.to_be_bytes()]);
    let payload = [context.to_be_bytes()].into_iter().chain(extents).collect::<Vec<_>>().concat();
    chunk(flags, kind::BLOCK_STATUS, cookie, &payload)
}

/// What is marked on a server that answers the only request so.
fn marked_by(answer: impl FnOnce(u64) -> Vec<u8> + Send + 'static) -> Result<Vec<(u64, u64)>> {
    let (ours, mut theirs) = UnixStream::pair().expect("sockets");
    theirs.write_all(&script_with_contexts([7, 8])).expect("room");
    let remote = Remote { bitmap: Some(BITMAP.to_owned()), ..remote() };
    let purpose = Purpose { read: true, write: false, stream: false };
    let device = open(vec![ours.into()], &remote, None, "remote", purpose).expect("opened");
    let server = Joined(Some(std::thread::spawn(move || {
        theirs.read_exact(&mut [0; HEARD_WITH_CONTEXTS]).expect("heard");
        let cookie = hear(&mut theirs);
        // The client may be gone before it has heard all of it.
        let _ = theirs.write_all(&answer(cookie));
        let _ = theirs.read_to_end(&mut Vec::new());
    })));
    let marked = marked(&device, &|| false);
    drop(device);
    drop(server);
    marked.map(|extents| extents.iter().map(|extent| (extent.start(), extent.end())).collect())
}

#[test]
fn a_block_status_says_each_context_once_and_no_others() {
    let one = |cookie, flags, id| status(flags, cookie, id, &[(4096, 0), (4096, 1), ((1 << 20) - 8192, 0)]);
    let honest = marked_by(move |cookie| [one(cookie, 0, 7), one(cookie, FLAG_DONE, 8)].concat());
    assert_eq!(honest.expect("marked"), [(4096, 8192)]);
    let refused = |answer: fn(u64) -> Vec<u8>, words: &str| {
        let error = marked_by(answer).expect_err(words).chain();
        assert!(error.contains(words) && error.contains("breaks the protocol"), "{words}: {error}");
    };
    refused(|cookie| status(0, cookie, 8, &[(4096, 0)]).repeat(2), "twice");
    refused(
        |cookie| (0..3).flat_map(|id| status(0, cookie, id, &[(4096, 0)])).collect(),
        "more than was asked",
    );
    let many = |cookie| {
        let extents = vec![(8, 0); 131_072];
        [status(0, cookie, 7, &extents), status(0, cookie, 8, &vec![(8, 0); 131_073])].concat()
    };
    refused(many, "more than was asked");
    refused(|cookie| status(FLAG_DONE, cookie, 8, &[]), "malformed");
}

#[test]
fn an_export_whose_contexts_have_other_ids_is_another() {
    let facts = |ids| {
        let (ours, mut theirs) = UnixStream::pair().expect("sockets");
        theirs.write_all(&script_with_contexts(ids)).expect("room");
        let remote = Remote { bitmap: Some(BITMAP.to_owned()), ..remote() };
        let device = open(vec![ours.into()], &remote, None, "remote", BOTH)?;
        Ok::<_, Error>(device.remote().expect("remote").facts().clone())
    };
    let before = facts([7, 8]).expect("opened");
    assert!(facts([7, 8]).expect("opened").is_same_as(&before));
    assert!(!facts([8, 7]).expect("opened").is_same_as(&before));
    assert!(!facts([7, 9]).expect("opened").is_same_as(&before));
    assert!(facts([7, 7]).expect_err("twice").chain().contains("twice"));
}

/// A server that is connected to again and again: after haggling, what it does with the connection of this number.
struct Returning {
    remote: Remote,
    path: std::path::PathBuf,
    connected: Arc<AtomicUsize>,
    stop: Arc<AtomicUsize>,
    server: Option<JoinHandle<()>>,
}

/// What a client says in [`script`].
const HEARD: usize = 4 + 16 + 16 + (16 + 4 + 4 + 4 + 4 + 15) + (16 + 4 + 4 + 2 + 2);

impl Returning {
    fn new(name: &str, reconnect_ms: u32, serve: impl Fn(usize, UnixStream) + Send + 'static) -> Self {
        let path = std::env::temp_dir().join(format!("nbd-again-{name}-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).expect("bound");
        let address = proto::remote::Address::Unix(path.to_str().expect("a path of a test").to_owned());
        let remote = Remote { address: Some(address), reconnect_ms: Some(reconnect_ms), ..remote() };
        let (connected, stop) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (count, stopped) = (Arc::clone(&connected), Arc::clone(&stop));
        let server = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::Acquire) > 0 {
                    return;
                }
                let mut stream = stream.expect("accepted");
                let number = count.fetch_add(1, Ordering::AcqRel);
                let _ = stream.write_all(&script(&[export(1 << 20, PLAIN), blocks(1, 4096, 1 << 16)]));
                if stream.read_exact(&mut [0; HEARD]).is_ok() {
                    serve(number, stream);
                }
            }
        });
        Self { remote, path, connected, stop, server: Some(server) }
    }

    fn open(&self) -> Device {
        let socket = UnixStream::connect(&self.path).expect("connected");
        open(vec![socket.into()], &self.remote, None, "remote", BOTH).expect("opened")
    }
}

impl Drop for Returning {
    fn drop(&mut self) {
        self.stop.store(1, Ordering::Release);
        let _ = UnixStream::connect(&self.path);
        let _ = self.server.take().expect("there until now").join();
        let _ = std::fs::remove_file(&self.path);
    }
}

#[test]
fn a_server_that_dies_of_what_it_is_asked_again_is_given_up() {
    let server = Returning::new("dies", 2000, |_, mut stream| {
        hear(&mut stream);
    });
    let device = server.open();
    let mut blocking = Blocking::open(Arc::clone(device.file()), "remote", 1).expect("blocking");
    let error = blocking.read(0, &mut [0; 8]).expect_err("never answered").chain();
    assert!(error.contains("broke before a reply"), "{error}");
    let connected = server.connected.load(Ordering::Acquire);
    assert!((2..=8).contains(&connected), "connected {connected} times");
    drop((blocking, device));
}

fn acknowledge(stream: &mut UnixStream, payload: usize) {
    let cookie = hear(stream);
    stream.read_exact(&mut vec![0; payload]).expect("its payload");
    let _ = stream.write_all(&chunk(FLAG_DONE, kind::NONE, cookie, &[]));
}

#[test]
fn what_a_late_copy_would_undo_is_not_written() {
    let server = Returning::new("late", 5000, |number, mut stream| {
        if number == 0 {
            // Taken, and not answered.
            hear(&mut stream);
            stream.read_exact(&mut [0; 4096]).expect("its payload");
            return;
        }
        // That again, a flush, and what goes elsewhere.
        acknowledge(&mut stream, 4096);
        acknowledge(&mut stream, 0);
        acknowledge(&mut stream, 4096);
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let device = server.open();
    let mut blocking = Blocking::open(Arc::clone(device.file()), "remote", 1).expect("blocking");
    blocking.write(4096, &[1; 4096]).expect("asked again");
    blocking.flush().expect("nothing was acknowledged before");
    for at in [4096, 2048, 8191] {
        let error = blocking.write(at, &[2; 4096]).expect_err("the same place").chain();
        assert!(error.contains("the same place"), "{at}: {error}");
    }
    blocking.write(8192, &[2; 4096]).expect("elsewhere");
    drop((blocking, device));
}

#[test]
fn a_server_that_moves_no_byte_is_left() {
    let (tell, told) = std::sync::mpsc::channel::<()>();
    let mut bench = Bench::new(move |stream| {
        let _ = told.recv();
        drop(stream);
    });
    let volume = find(bench._device.file()).expect("remote");
    volume.connections[0].set_patience(Duration::from_millis(200));
    drop(volume);
    bench.read(1, 8);
    let done = bench.next(1).remove(0);
    let text = done.result.expect_err("never answered").to_string();
    assert!(text.contains("the server does not answer"), "{text}");
    tell.send(()).expect("the server waits");
    bench.queue.detach(bench.port);
}
