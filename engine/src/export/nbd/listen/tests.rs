//! Tests of accepting: bounds on clients, slow and silent ones, floods.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};

use super::*;
use crate::backend::device::{Device, Purpose};
use crate::export::exported::{Course, Exported, Seat};
use crate::format::nbd::option::{
    BEGIN_BYTES, GREETING_BYTES, REPLY_BYTES, answer, number, parse_reply, put_go, put_option,
};
use crate::format::nbd::reply::Style;
use crate::pipeline::segment::{Segment, Segments};
use crate::pipeline::view::View;

/// Long enough for anything that happens at all.
const PATIENCE: Duration = Duration::from_secs(20);

/// Connections there can be.
const PLACES: u32 = 1000;

struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("nbd-listen-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir(&dir).expect("scratch directory");
        Self(dir)
    }

    fn export(&self, id: u64, name: &str) -> Arc<Exported> {
        let path = self.0.join(format!("volume-{id}"));
        std::fs::write(&path, vec![0; 1 << 20]).expect("a volume");
        let file = std::fs::File::options().read(true).write(true).open(&path).expect("opens");
        let purpose = Purpose { read: true, write: true, stream: false };
        let device = Device::from_fd(file.into(), "volume", purpose).expect("a device");
        let segments = Segments::new(vec![Segment { start: 0, offset: 0, unit_bytes: 512, cipher: None }]);
        let request = serde_json::json!({
            "file": {"fd": 0, "name": "volume"},
            "volume": {"format": {"luks": {}}, "key_fd": 1},
            "listen": {"shared": "unix:x"},
            "name": name,
        });
        let request = serde_json::from_value(request).expect("a request");
        Exported::new(id, &request, Arc::new(device), 1, View::new(segments, 1 << 20))
    }

    /// A listening socket and its path.
    fn socket(&self, name: &str) -> (OwnedFd, PathBuf) {
        let path = self.0.join(name);
        let listener = UnixListener::bind(&path).expect("binds");
        rustix::net::listen(&listener, 4096).expect("listens");
        (listener.into(), path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

struct House {
    scratch: Scratch,
    haggler: Haggler,
    negotiated: Receiver<Negotiated>,
}

impl House {
    fn new(name: &str) -> Self {
        let (sender, negotiated) = channel();
        let deliver = Box::new(move |one| drop(sender.send(one)));
        let haggler = Haggler::start(deliver, PLACES).expect("starts");
        Self { scratch: Scratch::new(name), haggler, negotiated }
    }

    fn open(&self, name: &str, exports: &[Arc<Exported>]) -> (ListenerId, PathBuf, Arc<Shelf>) {
        self.open_of(rustix::process::geteuid().as_raw(), name, exports)
    }

    fn open_of(
        &self,
        owner: u32,
        name: &str,
        exports: &[Arc<Exported>],
    ) -> (ListenerId, PathBuf, Arc<Shelf>) {
        let (socket, path) = self.scratch.socket(name);
        let shelf = Arc::new(Shelf::default());
        exports.iter().for_each(|export| shelf.put(export.clone()).expect("room"));
        let access = Access { owner, uids: vec![], any_uid: true };
        let address = format!("unix:{name}");
        let listening = Listening { socket, address, access, tls: None, shelf: shelf.clone() };
        (self.haggler.add_listener(listening).expect("listens"), path, shelf)
    }

    fn next(&self) -> Negotiated {
        self.negotiated.recv_timeout(PATIENCE).expect("a client that has agreed")
    }
}

fn connect(path: &PathBuf) -> UnixStream {
    let stream = UnixStream::connect(path).expect("connects");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    stream
}

/// The kinds of the replies to an option, up to the last; `None`: the connection ended.
fn ask(stream: &mut UnixStream, bytes: &[u8]) -> Option<Vec<u32>> {
    stream.write_all(bytes).ok()?;
    let mut kinds = Vec::new();
    loop {
        let mut head = [0; REPLY_BYTES];
        stream.read_exact(&mut head).ok()?;
        let header = parse_reply(&head).expect("a reply");
        let mut data = vec![0; header.length as usize];
        stream.read_exact(&mut data).ok()?;
        kinds.push(header.kind);
        if header.kind == answer::ACK || header.kind & answer::ERROR_BIT != 0 {
            return Some(kinds);
        }
    }
}

/// Past the greeting, if there is one.
fn greeted(path: &PathBuf) -> Option<UnixStream> {
    let mut stream = connect(path);
    stream.read_exact(&mut [0; GREETING_BYTES]).ok()?;
    stream.write_all(&[0, 0, 0, 3]).ok()?;
    Some(stream)
}

fn go(path: &PathBuf, name: &str) -> Option<(UnixStream, Vec<u32>)> {
    let mut stream = greeted(path)?;
    let mut bytes = Vec::new();
    put_go(&mut bytes, number::GO, name, &[]);
    let kinds = ask(&mut stream, &bytes)?;
    Some((stream, kinds))
}

fn began(path: &PathBuf, name: &str) -> UnixStream {
    let (stream, kinds) = go(path, name).expect("it is let in");
    assert_eq!(kinds, [answer::INFO, answer::ACK]);
    stream
}

fn is_closed(mut stream: &UnixStream) -> bool {
    matches!(stream.read(&mut [0; 64]), Ok(0) | Err(_))
}

/// Try until it is so.
fn until(what: &str, mut so: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !so() {
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_client_that_has_agreed_is_handed_over_and_counted_as_long_as_it_is_held() {
    let house = House::new("agreed");
    let exports = [house.scratch.export(1, ""), house.scratch.export(2, "two")];
    let (_, path, _) = house.open("s", &exports);
    let mut stream = greeted(&path).expect("let in");
    let mut bytes = Vec::new();
    put_option(&mut bytes, number::STRUCTURED_REPLY, b"");
    assert_eq!(ask(&mut stream, &bytes), Some(vec![answer::ACK]));
    bytes.clear();
    put_go(&mut bytes, number::GO, "two", &[]);
    bytes.extend_from_slice(b"a request");
    assert_eq!(ask(&mut stream, &bytes), Some(vec![answer::INFO, answer::ACK]));
    let negotiated = house.next();
    assert_eq!((negotiated.export.id, negotiated.style, negotiated.allocation), (2, Style::Structured, None));
    assert_eq!(negotiated.early, b"a request");
    assert_eq!(exports[1].connections(), 1);
    rustix::io::write(&negotiated.socket, b"reply").expect("written");
    let mut reply = [0; 5];
    stream.read_exact(&mut reply).expect("read");
    assert_eq!(&reply, b"reply", "it is the same connection");
    drop(negotiated);
    assert_eq!(exports[1].connections(), 0);
    assert_eq!(exports[1].counters.connections_total.load(Ordering::Relaxed), 1);

    let mut stream = greeted(&path).expect("let in");
    bytes.clear();
    put_option(&mut bytes, number::EXPORT_NAME, b"");
    stream.write_all(&bytes).expect("written");
    stream.read_exact(&mut [0; BEGIN_BYTES]).expect("it begins");
    assert_eq!(house.next().export.id, 1);
}

#[test]
fn exports_come_and_go_while_clients_haggle() {
    let house = House::new("dynamic");
    let (one, two) = (house.scratch.export(1, "one"), house.scratch.export(2, "two"));
    let (listener, path, shelf) = house.open("s", std::slice::from_ref(&one));
    let mut early = greeted(&path).expect("let in");
    let mut bytes = Vec::new();
    put_option(&mut bytes, number::LIST, b"");
    assert_eq!(ask(&mut early, &bytes), Some(vec![answer::SERVER, answer::ACK]));
    shelf.put(two.clone()).expect("room");
    assert_eq!(shelf.put(house.scratch.export(3, "two")).expect_err("taken").kind(), ErrorKind::Conflict);
    assert_eq!(ask(&mut early, &bytes), Some(vec![answer::SERVER, answer::SERVER, answer::ACK]));
    one.end(Course::Draining);
    assert_eq!(ask(&mut early, &bytes), Some(vec![answer::SERVER, answer::ACK]));
    assert_eq!(go(&path, "one").expect("let in").1, [answer::ERR_UNKNOWN]);
    assert!(shelf.take(1));
    assert!(!shelf.take(2), "none is left");
    assert_eq!(ask(&mut early, &bytes), Some(vec![answer::ACK]));
    house.haggler.remove_listener(listener);
    assert!(is_closed(&early));
    until("the socket is closed", || UnixStream::connect(&path).is_err());
}

#[test]
fn an_export_has_no_more_connections_than_it_may() {
    let house = House::new("full");
    let export = house.scratch.export(1, "");
    let (_, path, _) = house.open("s", std::slice::from_ref(&export));
    let mut seats: Vec<Seat> =
        (0..limits::CONNECTIONS_PER_EXPORT_MAX).map(|_| Seat::take(export.clone())).collect();
    assert_eq!(go(&path, "").expect("let in").1, [answer::ERR_POLICY]);
    seats.pop();
    began(&path, "");
}

#[test]
fn an_owner_has_at_most_half_of_all_connections() {
    let house = House::new("owner");
    let (one, two, other) =
        (house.scratch.export(1, ""), house.scratch.export(2, ""), house.scratch.export(3, ""));
    let (_, first, _) = house.open_of(1001, "first", std::slice::from_ref(&one));
    let (_, second, _) = house.open_of(1001, "second", std::slice::from_ref(&two));
    let (_, third, _) = house.open_of(1002, "third", &[other]);
    let mut seats: Vec<Seat> = (0..PLACES / 4).map(|_| Seat::take(one.clone())).collect();
    seats.extend((0..PLACES / 4).map(|_| Seat::take(two.clone())));
    assert_eq!(go(&first, "").expect("let in").1, [answer::ERR_POLICY]);
    assert_eq!(go(&second, "").expect("let in").1, [answer::ERR_POLICY]);
    began(&third, "");
    seats.pop();
    began(&first, "");
}

#[test]
fn a_peer_that_fills_its_place_keeps_out_only_itself_and_only_for_a_while() {
    let house = House::new("loris");
    let export = house.scratch.export(1, "");
    let (_, path, _) = house.open("s", std::slice::from_ref(&export));
    let (_, other, _) = house.open("other", &[export]);
    let established = began(&path, "");
    let served = house.next();
    let idle: Vec<_> = (0..limits::HAGGLERS_PER_PEER_MAX).map(|_| greeted(&path).expect("let in")).collect();
    let refused = connect(&path);
    assert!(is_closed(&refused), "one too many: closed without a word");
    began(&other, "");
    // Those that hang make room, the oldest first.
    until("the peer is let in again", || go(&path, "").is_some());
    assert!(is_closed(&idle[0]), "the oldest had to go");
    rustix::io::write(&served.socket, b"x").expect("written");
    (&established).read_exact(&mut [0]).expect("who was served before is served");
}

#[test]
fn five_thousand_connections_hurt_nobody() {
    let mut most = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    most.current = most.maximum;
    rustix::process::setrlimit(rustix::process::Resource::Nofile, most).expect("as many as are allowed");
    let house = House::new("flood");
    let export = house.scratch.export(1, "");
    let (_, path, _) = house.open("s", std::slice::from_ref(&export));
    let (_, other, _) = house.open("other", &[export]);
    let established = began(&path, "");
    let served = house.next();
    let mut flood = Vec::new();
    for nth in 0..5_000 {
        flood.push(connect(&path));
        if nth % 500 == 0 {
            began(&other, "");
        }
    }
    rustix::io::write(&served.socket, b"x").expect("written");
    (&established).read_exact(&mut [0]).expect("who was served before is served");
    let closed = |stream: &UnixStream| {
        let mut bytes = [0; GREETING_BYTES + 1];
        stream.set_nonblocking(true).expect("nonblocking");
        match (&*stream).read(&mut bytes) {
            Ok(bytes) => bytes == 0,
            Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
        }
    };
    until("the flood was dealt with", || {
        began(&other, "");
        flood.iter().filter(|stream| !closed(stream)).count() <= limits::HAGGLERS_MAX
    });
    drop(flood);
    until("it is as before", || go(&path, "").is_some());
}

#[test]
fn when_all_places_are_taken_whoever_has_most_pays() {
    let house = House::new("crowd");
    let export = house.scratch.export(1, "");
    let doors: Vec<_> =
        (0..5).map(|nth| house.open(&format!("s{nth}"), std::slice::from_ref(&export))).collect();
    let mut crowd = Vec::new();
    for (nth, (_, path, _)) in doors.iter().take(4).enumerate() {
        // The first has one more than the others, and the places are just taken.
        let count = limits::HAGGLERS_MAX / 4 - usize::from(nth != 0);
        let count = count.min(limits::HAGGLERS_PER_PEER_MAX);
        crowd.push((0..count).map(|_| greeted(path).expect("let in")).collect::<Vec<_>>());
    }
    let mut last: Vec<_> = (0..3).map(|_| greeted(&doors[4].1).expect("let in")).collect();
    began(&doors[4].1, "");
    assert!(is_closed(&crowd[0][0]), "the oldest of who has most");
    let mut bytes = Vec::new();
    put_option(&mut bytes, number::LIST, b"");
    for stream in crowd[1..].iter_mut().flatten().chain(&mut last) {
        assert!(ask(stream, &bytes).is_some(), "the others are where they were");
    }
}

#[test]
fn a_listening_socket_that_is_shut_down_by_its_owner_is_its_owners_loss() {
    let house = House::new("shut");
    let export = house.scratch.export(1, "");
    let (socket, path) = house.scratch.socket("mine");
    let shelf = Arc::new(Shelf::default());
    shelf.put(export.clone()).expect("room");
    let access = Access { owner: 0, uids: vec![], any_uid: true };
    let kept = rustix::io::dup(&socket).expect("dup");
    let address = "unix:mine".to_owned();
    house.haggler.add_listener(Listening { socket, address, access, tls: None, shelf }).expect("listens");
    began(&path, "");
    rustix::net::shutdown(&kept, rustix::net::Shutdown::Both).expect("shut down");
    let (_, other, _) = house.open("other", &[export]);
    began(&other, "");
    assert!(UnixStream::connect(&path).is_err());
}

#[test]
fn only_a_listening_socket_is_listened_on() {
    let house = House::new("kinds");
    let (one, _two) = UnixStream::pair().expect("a pair");
    let file = std::fs::File::open("/dev/null").expect("opens");
    let datagrams = std::os::unix::net::UnixDatagram::unbound().expect("a socket");
    for socket in [OwnedFd::from(one), file.into(), datagrams.into()] {
        let access = Access { owner: 0, uids: vec![], any_uid: false };
        let address = "unix:x".to_owned();
        let listening = Listening { socket, address, access, tls: None, shelf: Arc::default() };
        let error = house.haggler.add_listener(listening).expect_err("not a listening socket");
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
}

#[test]
fn users_are_admitted_by_name_only() {
    let access = |uids: &[u32], any_uid| Access { owner: 1000, uids: uids.to_vec(), any_uid };
    for (access, admitted, refused) in [
        (access(&[], false), &[0, 1000][..], &[1, 1001, u32::MAX][..]),
        (access(&[33, 34], false), &[0, 1000, 33, 34], &[35]),
        (access(&[], true), &[0, 1000, 1, u32::MAX], &[]),
    ] {
        assert!(admitted.iter().all(|uid| access.admits(*uid)), "{access:?}");
        assert!(!refused.iter().any(|uid| access.admits(*uid)), "{access:?}");
    }
}

#[test]
fn a_peer_on_a_network_is_an_address_or_a_network_of_64_bits() {
    let peer = |text: &str| Peer::of(text.parse().expect("an address"));
    assert_eq!(peer("2001:db8::1"), peer("2001:db8::ffff:1"));
    assert_ne!(peer("2001:db8::1"), peer("2001:db8:0:1::1"));
    assert_eq!(peer("::ffff:192.0.2.1"), peer("192.0.2.1"));
    assert_ne!(peer("192.0.2.1"), peer("192.0.2.2"));
}
