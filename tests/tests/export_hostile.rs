//! Clients that mean harm, from a seed: sessions changed at random at every stage, lengths of gigabytes, payloads that never come,
//! replies nobody takes, thousands of connections, death in the midst of a write. Beside them a client that behaves writes and verifies
//! all the time: it is never disturbed, and newcomers get in. The daemon does not grow, and the export ends when it is told to.
//!
//! Hostile ones have an export of their own beside it on the same socket, because much of what they say is right, and writes.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::scope;
use std::time::Duration;

use engine::format::nbd::OPTION_MAGIC;
use engine::format::nbd::option::{info, number};
use engine::format::nbd::reply::Style;
use engine::format::nbd::request::{Command, EXTENDED_BYTES, Request};
use engine::format::nbd::{BASE_ALLOCATION, command_flags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{Resource, getrlimit, setrlimit};
use tests::nbd::client::{Connection, Haggling, Wish, asking, contexts};
use tests::nbd::steady::{Habit, Steady};
use tests::nbd::{Kind, Served, same};
use tests::{Random, Running, eventually, seed};

const MIB: usize = 1 << 20;
/// What a well-behaved client has.
const GOOD: usize = 4 * MIB;
/// How much more memory the daemon may have than when one client was served: what its connections may have.
const GROWTH: usize = 192 * MIB;

/// One export for who behaves and another one for who does not, on one socket.
struct Scene {
    served: Served,
    other: Option<Running>,
}

impl Scene {
    fn new(kind: Kind) -> Self {
        let served = Served::with(kind, GOOD, "");
        let _ = served.place.noise("victim", 8 * MIB);
        let _ = served.place.run("encrypt @/victim @/bad RAW").done();
        let other = served.place.spawn("export @/bad RAW --nbd unix:@/socket --name bad");
        let scene = Self { served, other: Some(other) };
        eventually("the other export is there", || scene.connect(Style::Simple).is_ok());
        scene
    }

    fn connect(&self, style: Style) -> std::io::Result<Connection> {
        let mut wish = Wish::of(style);
        wish.name.push_str("bad");
        Connection::open(&self.served.socket(), &wish)
    }

    /// Run hostile ones while a good one works; how many requests of its were answered meanwhile.
    fn beside(&mut self, about: &str, hostile: impl Fn(&Self) + Sync) {
        let mut good = Steady::new(0, self.served.plain.clone(), Habit::MIXED, Random::new(seed()));
        good.connect(&self.served.socket()).expect("connected");
        for _ in 0..200 {
            good.step().expect("served");
        }
        let before = self.served.resident();
        let (over, answered, peak) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
        let this = &*self;
        scope(|scope| {
            let worker = scope.spawn(|| {
                while !over.load(Ordering::Relaxed) || answered.load(Ordering::Relaxed) < 300 {
                    good.step().expect("served");
                    let done = answered.fetch_add(1, Ordering::Relaxed);
                    if done.is_multiple_of(64) {
                        peak.fetch_max(this.served.resident() as u64, Ordering::Relaxed);
                    }
                }
                good.settle().expect("served");
            });
            hostile(this);
            peak.fetch_max(this.served.resident() as u64, Ordering::Relaxed);
            over.store(true, Ordering::Relaxed);
            worker.join().expect("the one that behaves was disturbed");
        });
        let grown = usize::try_from(peak.into_inner()).expect("bytes in memory").saturating_sub(before);
        eprintln!(
            "{about}: {} requests of a good client meanwhile; {} MiB, {} MiB more at most",
            answered.into_inner(),
            before / MIB,
            grown / MIB
        );
        assert!(grown < GROWTH, "{about}: {grown} bytes more");
        assert!(self.served.is_up(), "{about}: {}", self.served.said());
        let model = good.model().to_vec();
        drop(good);
        self.served.plain = model;
        // Newcomers get in, and find what is there.
        eventually("a newcomer gets in", || {
            match Connection::open(&this_socket(self), &Wish::of(Style::Structured)) {
                Ok(mut connection) => {
                    same(&connection.read(0, 4096), &self.served.plain[..4096], about);
                    connection.leave();
                    true
                }
                Err(_) => false,
            }
        });
    }

    /// Both exports end when they are told to, and the good one holds what it should.
    fn end(mut self) {
        let other = self.other.take().expect("running");
        other.signal(rustix::process::Signal::INT);
        let ran = other.wait();
        assert!(ran.code.is_some(), "{ran:?}");
        self.served.stop();
        self.served.holds(&self.served.plain);
    }
}

fn this_socket(scene: &Scene) -> std::path::PathBuf {
    scene.served.socket()
}

/// A whole good session as bytes: flags, options, requests of every kind; and where each of its parts begins.
fn session(random: &mut Random) -> (Vec<u8>, Vec<usize>) {
    let extended = random.below(3) == 0;
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    let mut marks = vec![0, 4];
    let mut option = |bytes: &mut Vec<u8>, number: u32, data: &[u8]| {
        bytes.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        bytes.extend_from_slice(&number.to_be_bytes());
        bytes.extend_from_slice(&u32::try_from(data.len()).expect("short").to_be_bytes());
        bytes.extend_from_slice(data);
        marks.push(bytes.len());
    };
    if random.below(2) == 0 {
        option(&mut bytes, number::LIST, &[]);
        option(&mut bytes, number::INFO, &asking("bad", &[info::BLOCK_SIZE, info::NAME]));
    }
    if extended {
        option(&mut bytes, number::EXTENDED_HEADERS, &[]);
    } else if random.below(4) > 0 {
        option(&mut bytes, number::STRUCTURED_REPLY, &[]);
    }
    option(&mut bytes, number::SET_META_CONTEXT, &contexts("bad", &[BASE_ALLOCATION, "base:"]));
    option(&mut bytes, number::GO, &asking("bad", &[info::BLOCK_SIZE]));
    for cookie in 0..16 {
        let length = [1, 512, 4096, 70_000][random.below(4)];
        let offset = random.below(8 * MIB - 70_000) as u64;
        let command = Command::of(u16::try_from(random.below(9)).expect("a digit"));
        let flags = if extended && command == Command::Write { command_flags::PAYLOAD_LEN } else { 0 };
        if command == Command::Disconnect && cookie < 12 {
            continue;
        }
        let request = Request { command, flags, cookie, offset, length };
        let mut head = [0; EXTENDED_BYTES];
        let len = request.put(&mut head, extended);
        bytes.extend_from_slice(&head[..len]);
        if command == Command::Write {
            let payload = usize::try_from(length).expect("short");
            bytes.resize(bytes.len() + payload, cookie.to_le_bytes()[0]);
        }
        marks.push(bytes.len());
    }
    (bytes, marks)
}

/// Change it: a byte, a number of the protocol, a part taken out, doubled or cut off.
fn spoil(bytes: &mut Vec<u8>, marks: &[usize], random: &mut Random) {
    // What is said first is where most can go wrong: half of all changes are within the heads of parts.
    let near = |random: &mut Random, len: usize| {
        let at = if random.below(2) == 0 {
            marks[random.below(marks.len())] + random.below(32)
        } else {
            random.below(len)
        };
        at.min(len - 1)
    };
    for _ in 0..=random.below(4) {
        if bytes.len() < 8 {
            return;
        }
        let at = near(random, bytes.len());
        match random.below(8) {
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = random.next_u64().to_le_bytes()[0],
            2 | 3 => {
                let values = [
                    0,
                    1,
                    0x7fff_ffff,
                    0x8000_0000,
                    u32::MAX,
                    u32::MAX - 27,
                    1 << 20,
                    32 << 20,
                    (32 << 20) + 1,
                ];
                let end = (at + 4).min(bytes.len());
                bytes[at..end]
                    .copy_from_slice(&u32::to_be_bytes(values[random.below(values.len())])[..end - at]);
            }
            4 => {
                let end = (at + 8).min(bytes.len());
                let value = u64::MAX - random.below(4097) as u64;
                bytes[at..end].copy_from_slice(&value.to_be_bytes()[..end - at]);
            }
            5 => {
                let end = (at + 1 + random.below(64)).min(bytes.len());
                bytes.drain(at..end);
            }
            6 => {
                let end = (at + 1 + random.below(64)).min(bytes.len());
                let part = bytes[at..end].to_vec();
                bytes.splice(at..at, part);
            }
            _ => bytes.truncate(at + 1),
        }
    }
}

/// Say it in pieces, take what comes now and then, leave without a word.
fn say(socket: &std::path::Path, bytes: &[u8], random: &mut Random) {
    let Ok(mut stream) = UnixStream::connect(socket) else { return };
    stream.set_nonblocking(true).expect("a socket");
    let mut rest = bytes;
    let mut idle = 0;
    let mut sink = vec![0; 64 << 10];
    while idle < 20 {
        let most = if random.below(4) == 0 { 16 } else { 100_000 };
        let piece = rest.len().min(1 + random.below(most));
        let wrote = stream.write(&rest[..piece]);
        let read = stream.read(&mut sink);
        match &wrote {
            Ok(sent) => rest = &rest[*sent..],
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
        match &read {
            Ok(0) => return,
            Ok(_) => idle = 0,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                idle += 1;
                std::thread::sleep(Duration::from_micros(100));
            }
            Err(_) => return,
        }
        // Some are gone before they are answered.
        if rest.is_empty() && random.below(3) == 0 {
            return;
        }
    }
}

/// How many sessions are spoilt.
fn sessions() -> usize {
    std::env::var("NBD_HOSTILE_SESSIONS")
        .map_or(1500, |text| text.parse().expect("NBD_HOSTILE_SESSIONS is a number"))
}

#[test]
fn spoilt_sessions_disturb_nobody() {
    let seed = seed();
    let mut scene = Scene::new(Kind::LUKS2);
    scene.beside("spoilt sessions", |scene| {
        let socket = scene.served.socket();
        std::thread::scope(|scope| {
            for thread in 0..3 {
                let socket = &socket;
                scope.spawn(move || {
                    let mut random = Random::new(seed ^ thread);
                    for _ in 0..sessions() / 3 {
                        let (mut bytes, marks) = session(&mut random);
                        if random.below(50) > 0 {
                            spoil(&mut bytes, &marks, &mut random);
                        }
                        say(socket, &bytes, &mut random);
                    }
                });
            }
        });
    });
    scene.end();
}

#[test]
fn who_stalls_or_takes_nothing_stalls_alone() {
    let mut scene = Scene::new(Kind::LUKS2);
    let held = std::sync::Mutex::new(Vec::new());
    scene.beside("stalled clients", |scene| {
        let mut held = held.lock().expect("alone");
        let new = |style: Style| scene.connect(style).expect("connected");
        // Half a payload, for ever.
        for n in 0..8_u64 {
            let mut connection = new(Style::Structured);
            let _ = connection.send(Command::Write, 0, n * 4096, 1 << 20, &vec![7; 500_000]).expect("sent");
            held.push(connection);
        }
        // Half a request.
        for n in 1..28 {
            let mut connection = new(Style::Structured);
            let request = Request { command: Command::Read, flags: 0, cookie: 1, offset: 0, length: 4096 };
            let mut bytes = [0; EXTENDED_BYTES];
            let _ = request.put(&mut bytes, false);
            connection.raw(&bytes[..n]).expect("sent");
            held.push(connection);
        }
        // 4 GiB to come.
        for _ in 0..8 {
            let mut connection = new(Style::Simple);
            let _ = connection.send(Command::Write, 0, 0, u32::MAX.into(), &[7; 100_000]);
            held.push(connection);
        }
        // Gigabytes are asked for and none is taken.
        for _ in 0..16 {
            let connection = new(Style::Structured);
            let mut bytes = Vec::new();
            for cookie in 0..500 {
                let request =
                    Request { command: Command::Read, flags: 0, cookie, offset: 0, length: 4 << 20 };
                let mut head = [0; EXTENDED_BYTES];
                let len = request.put(&mut head, false);
                bytes.extend_from_slice(&head[..len]);
            }
            // As far as it goes.
            let _ = connection.wire.stream().write(&bytes);
            held.push(connection);
        }
        // Small requests without end, and no answer is taken.
        for _ in 0..8 {
            let connection = new(Style::Simple);
            let mut bytes = Vec::new();
            for cookie in 0..5000 {
                let request = Request { command: Command::Flush, flags: 0, cookie, offset: 0, length: 0 };
                let mut head = [0; EXTENDED_BYTES];
                let len = request.put(&mut head, false);
                bytes.extend_from_slice(&head[..len]);
            }
            for _ in 0..4 {
                let _ = connection.wire.stream().write(&bytes);
            }
            held.push(connection);
        }
        std::thread::sleep(Duration::from_millis(500));
    });
    // They are still there when the exports end.
    scene.end();
    drop(held);
}

#[test]
fn who_dies_in_the_midst_of_a_write_takes_nothing_along() {
    let seed = seed();
    let mut scene = Scene::new(Kind::LUKS2);
    scene.beside("deaths", |scene| {
        let mut random = Random::new(seed);
        for round in 0..300 {
            let mut connection = scene
                .connect(if round % 2 == 0 { Style::Simple } else { Style::Extended })
                .expect("connected");
            let payload = vec![9; 200_000];
            for _ in 0..random.below(6) {
                let offset = random.below(8 * MIB - 200_000) as u64;
                let _ = connection.send(Command::Write, 0, offset, 200_000, &payload);
                let _ = connection.send(Command::Read, 0, offset, 300, &[]);
            }
            let cut = random.below(200_000);
            let _ = connection.send(Command::Write, 0, 0, 200_000, &payload[..cut]);
            drop(connection);
        }
    });
    scene.end();
}

#[test]
fn thousands_of_connections_keep_nobody_out_for_long() {
    const MANY: usize = 5000;
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if setrlimit(Resource::Nofile, limit).is_err()
        || getrlimit(Resource::Nofile).current.is_some_and(|most| most < 6000)
    {
        return tests::skip("a process may not have 6000 descriptors here");
    }
    let mut scene = Scene::new(Kind::LUKS2);
    let held = std::sync::Mutex::new(Vec::new());
    scene.beside("thousands of connections", |scene| {
        let mut held = held.lock().expect("alone");
        let address = SocketAddrUnix::new(scene.served.socket()).expect("an address");
        let (mut connected, mut full) = (0, 0);
        while connected < MANY && full < 20_000 {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
                .expect("a socket");
            match rustix::net::connect(&socket, &address) {
                Ok(()) => {
                    connected += 1;
                    held.push(UnixStream::from(socket));
                }
                // The kernel's queue is full: the server takes them as it can.
                Err(rustix::io::Errno::AGAIN) => {
                    full += 1;
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => panic!("connect: {error}"),
            }
        }
        eprintln!("{connected} connections, {full} times the queue was full");
        assert_eq!(connected, MANY, "the server takes no connections any more");
    });
    scene.end();
    drop(held);
}

#[test]
fn who_agrees_and_then_does_nothing_fills_no_more_than_its_export() {
    let mut scene = Scene::new(Kind::LUKS2);
    let held = std::sync::Mutex::new(Vec::new());
    scene.beside("idle connections", |scene| {
        let mut held = held.lock().expect("alone");
        let mut refused = 0;
        for _ in 0..400 {
            match scene.connect(Style::Structured) {
                Ok(connection) => held.push(connection),
                Err(_) => refused += 1,
            }
        }
        eprintln!("{} idle connections, {refused} refused", held.len());
        assert!(held.len() >= 64, "hardly anybody gets in");
    });
    scene.end();
    drop(held);
}

#[test]
fn haggling_without_end_is_ended() {
    let mut scene = Scene::new(Kind::LUKS2);
    scene.beside("endless haggling", |scene| {
        for option in [0x4242, number::LIST, number::INFO] {
            let data = if option == number::INFO { asking("bad", &[]) } else { Vec::new() };
            let mut haggling = Haggling::begin(&scene.served.socket()).expect("connected");
            let mut rounds = 0;
            while haggling.ask(option, &data).is_ok() {
                rounds += 1;
                assert!(rounds < 1_000_000, "options without end");
            }
        }
    });
    scene.end();
}
