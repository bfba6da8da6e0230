//! An export over a pipeline of its own, and clients that speak the transmission phase byte by byte.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::backend::device::{Device, Purpose};
use engine::crypto::{Kernel, Layout, VolumeKey, cipher};
use engine::export::exported::{Course, Exported, Seat};
use engine::export::nbd::Negotiated;
use engine::export::nbd::hub::Hub;
use engine::format::nbd::reply::{self, Header, Style, kind};
use engine::format::nbd::request::{Command, Request};
use engine::pipeline::segment::Segments;
use engine::pipeline::view::View;
use engine::pipeline::{Pipeline, PipelineConfig, QueueChoice};

/// Long enough for any machine, and only reached by a failing test.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Where the data begins on the device.
pub const DATA: u64 = 1 << 20;

/// How an export is to be.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    /// Bytes of plaintext.
    pub total: u64,
    /// Data unit.
    pub unit: u32,
    /// Past the page cache, where the file can.
    pub direct: bool,
    /// Writes are refused.
    pub read_only: bool,
    /// Holes are made.
    pub discard: bool,
    /// The queue.
    pub queue: QueueChoice,
    /// Workers.
    pub workers: u32,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            total: 8 << 20,
            unit: 4096,
            direct: false,
            read_only: false,
            discard: false,
            queue: QueueChoice::Auto,
            workers: 1,
        }
    }
}

/// A cipher of a fixed key.
///
/// # Panics
/// If there is no memory for keys.
#[must_use]
pub fn segments(unit: u32) -> Segments {
    let key: Vec<u8> = (1..=64).collect();
    let key = VolumeKey::new(&key).expect("a key");
    let best = Kernel::best().expect("a kernel");
    Segments::one(cipher(best, &key, Layout::plain64(unit)).expect("a cipher"), unit, DATA)
}

/// An export, its workers, and its device.
pub struct Rig {
    /// The way in.
    pub hub: Hub,
    /// The export.
    pub export: Arc<Exported>,
    /// The encrypted side.
    pub file: File,
    /// Ciphers for looking at it.
    pub segments: Segments,
    pipeline: Option<Pipeline>,
}

impl Rig {
    /// Over a new file in the test's scratch directory, which is gone with it; all of its plaintext is noise of the key.
    ///
    /// # Panics
    /// If anything cannot be made.
    #[must_use]
    pub fn new(setup: Setup) -> Self {
        let dir = crate::Scratch::new();
        let path = dir.join("volume");
        let file = File::options().read(true).write(true).create_new(true).open(&path).expect("create");
        file.set_len(DATA + setup.total).expect("extend");
        Self::over(file, setup)
    }

    /// Over this file.
    ///
    /// # Panics
    /// As [`Rig::new`].
    #[must_use]
    pub fn over(file: File, setup: Setup) -> Self {
        let cpus = (0..setup.workers).collect();
        let config = PipelineConfig {
            cpus,
            pin: false,
            queue: setup.queue,
            buffer_bytes: 64 << 10,
            buffers_per_worker: 4,
        };
        let pipeline = Pipeline::start(&config).expect("a pipeline");
        let hub = Hub::new(&pipeline).expect("servers");
        let fd: OwnedFd = file.try_clone().expect("clone").into();
        let purpose = Purpose { read: true, write: !setup.read_only, stream: false };
        let device = Device::from_fd(fd, "volume", purpose).expect("a device");
        let align = match device.direct_alignment() {
            Some(align) if setup.direct && device.enable_direct() => align,
            _ => 1,
        };
        // A description of its own: direct I/O is the server's alone.
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        let file = File::options().read(true).write(true).open(path).expect("opened again");
        let view = View::new(segments(setup.unit), setup.total);
        let request = request(&setup);
        let export = Exported::new(1, &request, Arc::new(device), align, view);
        Self { hub, export, file, segments: segments(setup.unit), pipeline: Some(pipeline) }
    }

    /// A client.
    ///
    /// # Panics
    /// If it is refused.
    #[must_use]
    pub fn client(&self, style: Style) -> Wire {
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        self.hand_over(theirs, style, Vec::new()).expect("taken");
        Wire::new(ours, style)
    }

    /// Let a socket be served.
    ///
    /// # Errors
    /// As [`Hub::hand_over`].
    pub fn hand_over(
        &self,
        socket: impl Into<OwnedFd>,
        style: Style,
        early: Vec<u8>,
    ) -> engine::error::Result<()> {
        let allocation = (style != Style::Simple).then_some(7);
        self.hub.hand_over(Negotiated {
            socket: socket.into(),
            export: self.export.clone(),
            seat: Seat::take(self.export.clone()),
            style,
            allocation,
            early,
            tls: None,
        })
    }

    /// Plaintext as it is on the device, past the server.
    ///
    /// # Panics
    /// If it cannot be read. `at` and `len` are whole blocks of 4096 bytes.
    #[must_use]
    pub fn plaintext(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        std::os::unix::fs::FileExt::read_exact_at(&self.file, &mut bytes, DATA + at).expect("read");
        self.segments.at(at).decrypt(at, &mut bytes);
        bytes
    }

    /// Go on to a course and wait until no connection is left.
    ///
    /// # Panics
    /// If one is.
    pub fn end(&self, course: Course) {
        self.export.end(course);
        self.hub.wake();
        assert!(self.export.wait_quiet(Instant::now() + PATIENCE), "a connection does not end");
    }

    /// Let the workers leave, which ends all connections.
    pub fn stop_workers(&mut self) {
        self.pipeline = None;
    }
}

fn request(setup: &Setup) -> proto::export::Request {
    let json = serde_json::json!({
        "file": { "fd": 0, "name": "volume" },
        "volume": { "format": { "luks": {} }, "key_fd": 1 },
        "listen": { "shared": "unix:/nowhere" },
        "name": "test",
        "read_only": setup.read_only,
        "discard": setup.discard,
    });
    serde_json::from_value(json).expect("a request")
}

/// A reply, put together of its chunks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Answer {
    /// Of the request.
    pub cookie: u64,
    /// 0: it was done.
    pub error: u32,
    /// Where, if it says.
    pub error_at: Option<u64>,
    /// What it says.
    pub text: String,
    /// Data, at offsets of the request.
    pub data: Vec<u8>,
    /// Extents: bytes and flags.
    pub extents: Vec<(u64, u64)>,
    /// Chunks it came in.
    pub chunks: u32,
}

/// The client's end.
pub struct Wire {
    /// The socket.
    pub socket: UnixStream,
    style: Style,
    next: u64,
    /// Reads under way: cookie, offset, bytes.
    reads: Vec<(u64, u64, usize)>,
    partial: Vec<Answer>,
}

impl Wire {
    /// Over a connected socket.
    ///
    /// # Panics
    /// If it takes no timeout.
    #[must_use]
    pub fn new(socket: UnixStream, style: Style) -> Self {
        socket.set_read_timeout(Some(PATIENCE)).expect("set");
        socket.set_write_timeout(Some(PATIENCE)).expect("set");
        Self { socket, style, next: 1, reads: Vec::new(), partial: Vec::new() }
    }

    /// Bytes of a request.
    pub fn bytes(&mut self, command: Command, flags: u16, offset: u64, length: u64) -> (u64, Vec<u8>) {
        let cookie = self.next;
        self.next += 1;
        let mut bytes = [0; 32];
        let extended = self.style == Style::Extended;
        let flags = if extended && command == Command::Write { flags | 1 << 5 } else { flags };
        let len = Request { command, flags, cookie, offset, length }.put(&mut bytes, extended);
        if command == Command::Read {
            self.reads.push((cookie, offset, usize::try_from(length).unwrap_or(0).min(64 << 20)));
        }
        (cookie, bytes[..len].to_vec())
    }

    /// Send a request; returns its cookie.
    ///
    /// # Panics
    /// If the connection is broken.
    pub fn ask(&mut self, command: Command, flags: u16, offset: u64, length: u64) -> u64 {
        let (cookie, bytes) = self.bytes(command, flags, offset, length);
        self.socket.write_all(&bytes).expect("sent");
        cookie
    }

    /// Send a write and its payload.
    ///
    /// # Panics
    /// If the connection is broken.
    pub fn ask_write(&mut self, flags: u16, offset: u64, payload: &[u8]) -> u64 {
        let (cookie, mut bytes) = self.bytes(Command::Write, flags, offset, payload.len() as u64);
        bytes.extend_from_slice(payload);
        self.socket.write_all(&bytes).expect("sent");
        cookie
    }

    /// The next reply that is complete; `None`: the connection has ended.
    ///
    /// # Panics
    /// On whatever a client would call a broken server.
    pub fn answer(&mut self) -> Option<Answer> {
        loop {
            let mut head = [0; 32];
            if self.socket.read(&mut head[..1]).ok()? == 0 {
                return None;
            }
            self.socket.read_exact(&mut head[1..4]).ok()?;
            let len = reply::header_bytes(head[..4].try_into().expect("4 bytes")).expect("a reply's magic");
            self.socket.read_exact(&mut head[4..len]).ok()?;
            let header = reply::parse(&head[..len]);
            let (Header::Simple { cookie, .. } | Header::Chunk { cookie, .. }) = header;
            let place = self.partial.iter().position(|answer| answer.cookie == cookie);
            let mut answer = place.map_or_else(
                || Answer { cookie, ..Answer::default() },
                |place| self.partial.swap_remove(place),
            );
            if self.take_chunk(&mut answer, header)? {
                self.reads.retain(|read| read.0 != cookie);
                return Some(answer);
            }
            self.partial.push(answer);
        }
    }

    /// `true`: it was the last.
    fn take_chunk(&mut self, answer: &mut Answer, header: Header) -> Option<bool> {
        let read = self.reads.iter().find(|read| read.0 == answer.cookie).copied();
        answer.chunks += 1;
        match header {
            Header::Simple { error, .. } => {
                assert!(self.style != Style::Extended, "extended replies are chunks");
                answer.error = error;
                if let (0, Some((_, _, bytes))) = (error, read) {
                    assert_eq!(self.style, Style::Simple, "a structured read is answered in chunks");
                    answer.data = vec![0; bytes];
                    self.socket.read_exact(&mut answer.data).ok()?;
                }
                Some(true)
            }
            Header::Chunk { flags, kind: number, length, .. } => {
                assert!(self.style != Style::Simple, "nobody asked for chunks");
                assert!(length <= 64 << 20, "a chunk of {length} bytes");
                let mut payload = vec![0; usize::try_from(length).expect("fits")];
                self.socket.read_exact(&mut payload).ok()?;
                self.take_payload(answer, number, &payload, read);
                Some(flags & reply::FLAG_DONE != 0)
            }
        }
    }

    fn take_payload(
        &mut self,
        answer: &mut Answer,
        number: u16,
        payload: &[u8],
        read: Option<(u64, u64, usize)>,
    ) {
        let u32_at = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().expect("4 bytes"));
        let u64_at = |at: usize| u64::from_be_bytes(payload[at..at + 8].try_into().expect("8 bytes"));
        match number {
            kind::NONE => assert!(payload.is_empty()),
            kind::OFFSET_DATA => {
                let (_, offset, bytes) = read.expect("data nobody asked for");
                answer.data.resize(bytes, 0);
                let at = usize::try_from(u64_at(0) - offset).expect("within the request");
                answer.data[at..at + payload.len() - 8].copy_from_slice(&payload[8..]);
            }
            kind::BLOCK_STATUS => {
                assert_eq!(u32_at(0), 7, "the context asked for");
                let pairs = payload[4..].chunks_exact(8);
                answer.extents = pairs
                    .map(|pair| {
                        let (one, two) = pair.split_at(4);
                        let number = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().expect("4 bytes"));
                        (number(one).into(), number(two).into())
                    })
                    .collect();
            }
            kind::BLOCK_STATUS_EXTENDED => {
                assert_eq!(u32_at(0), 7, "the context asked for");
                assert_eq!(u32_at(4) as usize * 16, payload.len() - 8);
                answer.extents =
                    (8..payload.len()).step_by(16).map(|at| (u64_at(at), u64_at(at + 8))).collect();
            }
            kind::ERROR | kind::ERROR_OFFSET => {
                answer.error = u32_at(0);
                let text = usize::from(u16::from_be_bytes(payload[4..6].try_into().expect("2 bytes")));
                answer.text = String::from_utf8(payload[6..6 + text].to_vec()).expect("text");
                if number == kind::ERROR_OFFSET {
                    answer.error_at = Some(u64_at(6 + text));
                }
            }
            other => panic!("a chunk of kind {other:#x}"),
        }
    }

    /// A request and its answer, alone on the connection.
    ///
    /// # Panics
    /// If the connection ends, or the answer is another's.
    pub fn call(&mut self, command: Command, flags: u16, offset: u64, length: u64) -> Answer {
        let cookie = self.ask(command, flags, offset, length);
        let answer = self.answer().expect("an answer");
        assert_eq!(answer.cookie, cookie);
        answer
    }

    /// Read; it must succeed.
    ///
    /// # Panics
    /// If it does not.
    pub fn read(&mut self, offset: u64, length: usize) -> Vec<u8> {
        let answer = self.call(Command::Read, 0, offset, length as u64);
        assert_eq!(answer.error, 0, "{}", answer.text);
        answer.data
    }

    /// Write.
    ///
    /// # Panics
    /// If the connection ends.
    pub fn write(&mut self, flags: u16, offset: u64, payload: &[u8]) -> Answer {
        let cookie = self.ask_write(flags, offset, payload);
        let answer = self.answer().expect("an answer");
        assert_eq!(answer.cookie, cookie);
        answer
    }
}
