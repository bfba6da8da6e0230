//! A client of the NBD protocol that takes nothing on trust: it sends whatever it is told to, right or wrong, and judges every
//! answer by the protocol. A server that breaks it fails the test; one that hangs up is an error of the call.

use std::collections::BTreeMap;
use std::io::{Error, ErrorKind, Result};
use std::path::Path;

use engine::format::nbd::option::{answer, info, number};
use engine::format::nbd::reply::{self, FLAG_DONE, Header, Style, kind};
use engine::format::nbd::request::{Command, EXTENDED_BYTES, Request};
use engine::format::nbd::{
    BASE_ALLOCATION, GREETING_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, PAYLOAD_MAX, command_flags, handshake,
};

use crate::nbd::wire::Wire;

/// Longest answer to an option that is taken, bytes.
const ANSWER_MAX: u32 = 1 << 16;

/// Any bytes as a client sends them; big-endian numbers.
fn put(into: &mut Vec<u8>, parts: &[&[u8]]) {
    parts.iter().for_each(|part| into.extend_from_slice(part));
}

/// A string as options carry it: its length, itself.
#[must_use]
pub fn string(text: &str) -> Vec<u8> {
    let mut bytes = u32::try_from(text.len()).expect("short").to_be_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

/// Data of `INFO` and `GO`: a name, and which blocks are wanted.
#[must_use]
pub fn asking(name: &str, blocks: &[u16]) -> Vec<u8> {
    let mut bytes = string(name);
    bytes.extend_from_slice(&u16::try_from(blocks.len()).expect("few").to_be_bytes());
    blocks.iter().for_each(|block| bytes.extend_from_slice(&block.to_be_bytes()));
    bytes
}

/// Data of `LIST_META_CONTEXT` and `SET_META_CONTEXT`.
#[must_use]
pub fn contexts(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut bytes = string(name);
    bytes.extend_from_slice(&u32::try_from(queries.len()).expect("few").to_be_bytes());
    queries.iter().for_each(|query| bytes.extend_from_slice(&string(query)));
    bytes
}

/// A connection before transmission.
pub struct Haggling {
    /// The socket.
    pub wire: Wire,
    /// What the server said in its greeting.
    pub flags: u16,
}

impl Haggling {
    /// Connect and take the greeting; nothing is answered yet.
    ///
    /// # Errors
    /// As the socket's.
    ///
    /// # Panics
    /// If the greeting is none of fixed newstyle.
    pub fn connect(socket: &Path) -> Result<Self> {
        let mut haggling = Self { wire: Wire::connect(socket)?, flags: 0 };
        let mut greeting = [0; 18];
        haggling.wire.take(&mut greeting)?;
        let mut expected = GREETING_MAGIC.to_be_bytes().to_vec();
        expected.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        assert_eq!(greeting[..16], expected, "no greeting");
        haggling.flags = u16::from_be_bytes([greeting[16], greeting[17]]);
        assert!(haggling.flags & handshake::FIXED_NEWSTYLE != 0, "not fixed newstyle");
        Ok(haggling)
    }

    /// Connect, and answer the greeting as good clients do.
    ///
    /// # Errors
    /// As the socket's.
    pub fn begin(socket: &Path) -> Result<Self> {
        let mut haggling = Self::connect(socket)?;
        let flags = handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES;
        haggling.send(&u32::from(flags & haggling.flags).to_be_bytes())?;
        Ok(haggling)
    }

    /// Any bytes.
    ///
    /// # Errors
    /// As the socket's.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.wire.send(bytes)
    }

    /// Send an option.
    ///
    /// # Errors
    /// As the socket's.
    ///
    /// # Panics
    /// If the data are of 4 GiB or more.
    pub fn option(&mut self, number: u32, data: &[u8]) -> Result<()> {
        let length = u32::try_from(data.len()).expect("an option is short");
        let mut bytes = Vec::new();
        put(&mut bytes, &[&OPTION_MAGIC.to_be_bytes(), &number.to_be_bytes(), &length.to_be_bytes(), data]);
        self.send(&bytes)
    }

    /// Take one reply to this option: its type and data.
    ///
    /// # Errors
    /// As the socket's.
    ///
    /// # Panics
    /// If it is none, or of another option.
    pub fn reply(&mut self, to: u32) -> Result<(u32, Vec<u8>)> {
        let mut head = [0; 20];
        self.wire.take(&mut head)?;
        let u32_at = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().expect("4 bytes"));
        assert_eq!(head[..8], OPTION_REPLY_MAGIC.to_be_bytes(), "no reply to an option");
        assert_eq!(u32_at(8), to, "a reply to another option");
        assert!(u32_at(16) <= ANSWER_MAX, "a reply of {} bytes to option {to}", u32_at(16));
        let mut data = vec![0; u32_at(16) as usize];
        self.wire.take(&mut data)?;
        Ok((u32_at(12), data))
    }

    /// Send an option and take its replies, to the acknowledgement or the error that ends them.
    ///
    /// # Errors
    /// As the socket's.
    pub fn ask(&mut self, number: u32, data: &[u8]) -> Result<Vec<(u32, Vec<u8>)>> {
        self.option(number, data)?;
        let mut replies = Vec::new();
        loop {
            let (kind, data) = self.reply(number)?;
            let last = kind == answer::ACK || kind & answer::ERROR_BIT != 0;
            assert!(kind != answer::ACK || data.is_empty(), "an acknowledgement with data");
            replies.push((kind, data));
            if last {
                return Ok(replies);
            }
            assert!(replies.len() <= 10_000, "no end of replies");
        }
    }

    /// Ask; what ended the replies.
    ///
    /// # Errors
    /// As the socket's.
    pub fn verdict(&mut self, number: u32, data: &[u8]) -> Result<u32> {
        Ok(self.ask(number, data)?.pop().expect("at least one reply").0)
    }

    /// Ask for transmission.
    ///
    /// # Errors
    /// As the socket's; `NotFound`: the server refuses, with its answer as the text.
    ///
    /// # Panics
    /// If its answer breaks the protocol.
    pub fn go(mut self, wish: &Wish) -> Result<Connection> {
        let mut style = Style::Simple;
        let refused = |kind: u32| Error::new(ErrorKind::NotFound, format!("refused: {kind:#x}"));
        if wish.style == Style::Extended {
            match self.verdict(number::EXTENDED_HEADERS, &[])? {
                answer::ACK => style = Style::Extended,
                kind => return Err(refused(kind)),
            }
        } else if wish.style == Style::Structured {
            match self.verdict(number::STRUCTURED_REPLY, &[])? {
                answer::ACK => style = Style::Structured,
                kind => return Err(refused(kind)),
            }
        }
        let mut allocation = None;
        if wish.allocation {
            for (kind, data) in
                self.ask(number::SET_META_CONTEXT, &contexts(&wish.name, &[BASE_ALLOCATION]))?
            {
                match kind {
                    answer::META_CONTEXT => {
                        assert_eq!(&data[4..], BASE_ALLOCATION.as_bytes(), "another context");
                        allocation = Some(u32::from_be_bytes(data[..4].try_into().expect("4 bytes")));
                    }
                    answer::ACK => {}
                    kind => return Err(refused(kind)),
                }
            }
        }
        let (mut export, mut sizes) = (None, None);
        for (kind, data) in self.ask(number::GO, &asking(&wish.name, &[info::BLOCK_SIZE]))? {
            match kind {
                answer::INFO => match u16::from_be_bytes([data[0], data[1]]) {
                    info::EXPORT => {
                        assert_eq!(data.len(), 12, "INFO_EXPORT");
                        let bytes = u64::from_be_bytes(data[2..10].try_into().expect("8 bytes"));
                        export = Some((bytes, u16::from_be_bytes([data[10], data[11]])));
                    }
                    info::BLOCK_SIZE => {
                        assert_eq!(data.len(), 14, "INFO_BLOCK_SIZE");
                        let at =
                            |at: usize| u32::from_be_bytes(data[at..at + 4].try_into().expect("4 bytes"));
                        sizes = Some([at(2), at(6), at(10)]);
                    }
                    _ => {}
                },
                answer::ACK => {}
                kind => return Err(refused(kind)),
            }
        }
        let (bytes, flags) = export.expect("GO without INFO_EXPORT");
        Ok(Connection {
            wire: self.wire,
            style,
            allocation,
            bytes,
            flags,
            sizes,
            next: 1,
            pending: BTreeMap::new(),
        })
    }
}

/// What a client asks for before transmission.
#[derive(Debug, Clone)]
pub struct Wish {
    /// Name of the export.
    pub name: String,
    /// How replies shall look.
    pub style: Style,
    /// Shall BLOCK_STATUS tell of `base:allocation`?
    pub allocation: bool,
}

impl Wish {
    /// The default export with replies of this style, and block status where there can be one.
    #[must_use]
    pub fn of(style: Style) -> Self {
        Self { name: String::new(), style, allocation: style != Style::Simple }
    }
}

/// What a request was answered, all of its chunks together.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Answer {
    /// 0, or see [`engine::format::nbd::errors`].
    pub error: u32,
    /// Data of a READ.
    pub data: Vec<u8>,
    /// Extents of a BLOCK_STATUS: bytes, flags.
    pub extents: Vec<(u64, u64)>,
    /// Chunks with data or holes.
    pub chunks: u32,
}

struct Pending {
    request: Request,
    answer: Answer,
    /// Parts of a READ that came, first byte to length, counted from the request's first.
    parts: BTreeMap<u64, u64>,
}

/// A connection in transmission.
pub struct Connection {
    /// The socket.
    pub wire: Wire,
    /// How the server answers.
    pub style: Style,
    /// Number of the context `base:allocation`.
    pub allocation: Option<u32>,
    /// Bytes of the export.
    pub bytes: u64,
    /// What it can do.
    pub flags: u16,
    /// Smallest, preferred and largest block.
    pub sizes: Option<[u32; 3]>,
    next: u64,
    pending: BTreeMap<u64, Pending>,
}

impl Connection {
    /// Connect and haggle.
    ///
    /// # Errors
    /// As the socket's, or as [`Haggling::go`].
    pub fn open(socket: &Path, wish: &Wish) -> Result<Self> {
        Haggling::begin(socket)?.go(wish)
    }

    /// With structured replies and block status.
    ///
    /// # Panics
    /// If the server does not have it so.
    #[must_use]
    pub fn structured(socket: &Path) -> Self {
        Self::open(socket, &Wish::of(Style::Structured)).expect("structured replies")
    }

    /// Requests without an answer.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.pending.len()
    }

    /// Any bytes.
    ///
    /// # Errors
    /// As the socket's.
    pub fn raw(&mut self, bytes: &[u8]) -> Result<()> {
        self.wire.send(bytes)
    }

    /// Send a request; its cookie. `payload` is sent as it is, whatever the request says.
    ///
    /// # Errors
    /// As the socket's.
    pub fn send(
        &mut self,
        command: Command,
        flags: u16,
        offset: u64,
        length: u64,
        payload: &[u8],
    ) -> Result<u64> {
        let cookie = self.next;
        self.next += 1;
        let extended = self.style == Style::Extended;
        let flags =
            if extended && command == Command::Write { flags | command_flags::PAYLOAD_LEN } else { flags };
        let request = Request { command, flags, cookie, offset, length };
        let mut head = [0; EXTENDED_BYTES];
        let bytes = request.put(&mut head, extended);
        let mut whole = head[..bytes].to_vec();
        whole.extend_from_slice(payload);
        self.raw(&whole)?;
        if command != Command::Disconnect {
            self.pending
                .insert(cookie, Pending { request, answer: Answer::default(), parts: BTreeMap::new() });
        }
        Ok(cookie)
    }

    /// The next request that is answered completely: its cookie and answer.
    ///
    /// # Errors
    /// As the socket's.
    ///
    /// # Panics
    /// If the server breaks the protocol.
    pub fn receive(&mut self) -> Result<(u64, Answer)> {
        loop {
            let mut bytes = [0; 32];
            self.wire.take(&mut bytes[..4])?;
            let magic = [bytes[0], bytes[1], bytes[2], bytes[3]];
            let len = reply::header_bytes(magic).unwrap_or_else(|| panic!("no magic of a reply: {magic:x?}"));
            self.wire.take(&mut bytes[4..len])?;
            if let Some(done) = match reply::parse(&bytes[..len]) {
                Header::Simple { error, cookie } => self.simple(error, cookie)?,
                Header::Chunk { flags, kind, cookie, offset, length } => {
                    assert_eq!(
                        self.style == Style::Extended,
                        len == reply::EXTENDED_CHUNK_BYTES,
                        "wrong style"
                    );
                    self.chunk(flags, kind, cookie, offset, length)?
                }
            } {
                return Ok(done);
            }
        }
    }

    fn simple(&mut self, error: u32, cookie: u64) -> Result<Option<(u64, Answer)>> {
        let Pending { request, mut answer, .. } =
            self.pending.remove(&cookie).unwrap_or_else(|| panic!("a reply to nothing: cookie {cookie:#x}"));
        assert!(self.style != Style::Extended, "a simple reply among extended ones");
        if request.command == Command::Read {
            assert!(self.style == Style::Simple, "a simple reply to a structured READ");
            if error == 0 {
                answer.data = vec![0; usize::try_from(request.length).expect("a length")];
                self.wire.take(&mut answer.data)?;
            }
        }
        answer.error = error;
        Ok(Some((cookie, answer)))
    }

    fn chunk(
        &mut self,
        flags: u16,
        what: u16,
        cookie: u64,
        offset: u64,
        length: u64,
    ) -> Result<Option<(u64, Answer)>> {
        assert!(self.style != Style::Simple, "a chunk that nobody asked for");
        assert!(length <= u64::from(PAYLOAD_MAX) + 8, "a chunk of {length} bytes");
        let mut payload = vec![0; usize::try_from(length).expect("bounded")];
        self.wire.take(&mut payload)?;
        let pending =
            self.pending.get_mut(&cookie).unwrap_or_else(|| panic!("a chunk of nothing: cookie {cookie:#x}"));
        if self.style == Style::Extended {
            assert_eq!(offset, pending.request.offset, "an extended reply tells the offset of its request");
        }
        pending.take(what, payload, self.allocation);
        if flags & FLAG_DONE == 0 {
            assert!(what != kind::NONE, "NONE is the last chunk");
            return Ok(None);
        }
        let Pending { request, answer, parts } = self.pending.remove(&cookie).expect("just seen");
        if answer.error == 0 && request.command == Command::Read {
            let came: u64 = parts.values().sum();
            assert_eq!(came, request.length, "parts of a READ are missing: {parts:?}");
        }
        if answer.error == 0 && request.command == Command::BlockStatus {
            assert!(!answer.extents.is_empty(), "a BLOCK_STATUS without extents");
        }
        Ok(Some((cookie, answer)))
    }

    /// Take the answer to this request; answers to others must not come before it.
    ///
    /// # Errors
    /// As the socket's.
    ///
    /// # Panics
    /// If another one comes.
    pub fn wait(&mut self, cookie: u64) -> Result<Answer> {
        let (came, answer) = self.receive()?;
        assert_eq!(came, cookie, "an answer out of turn");
        Ok(answer)
    }

    /// One request and its answer.
    ///
    /// # Errors
    /// As the socket's.
    pub fn call(&mut self, command: Command, flags: u16, offset: u64, length: u64) -> Result<Answer> {
        let cookie = self.send(command, flags, offset, length, &[])?;
        self.wait(cookie)
    }

    /// Read, which must succeed.
    ///
    /// # Panics
    /// If it does not.
    #[must_use]
    pub fn read(&mut self, offset: u64, length: usize) -> Vec<u8> {
        let length = u64::try_from(length).expect("a length");
        let answer = self.call(Command::Read, 0, offset, length).expect("answered");
        assert_eq!(answer.error, 0, "READ of {length} at {offset}");
        answer.data
    }

    /// Write; the error.
    ///
    /// # Panics
    /// If there is no answer.
    pub fn write(&mut self, flags: u16, offset: u64, data: &[u8]) -> u32 {
        let length = u64::try_from(data.len()).expect("a length");
        let cookie = self.send(Command::Write, flags, offset, length, data).expect("sent");
        self.wait(cookie).expect("answered").error
    }

    /// A command without data; the error.
    ///
    /// # Panics
    /// If there is no answer.
    pub fn error(&mut self, command: Command, flags: u16, offset: u64, length: u64) -> u32 {
        self.call(command, flags, offset, length).expect("answered").error
    }

    /// Leave as good clients do; the server has to hang up.
    ///
    /// # Panics
    /// If it does not.
    pub fn leave(mut self) {
        self.send(Command::Disconnect, 0, 0, 0, &[]).expect("sent");
        self.wire.ends();
    }
}

impl Pending {
    fn take(&mut self, what: u16, payload: Vec<u8>, allocation: Option<u32>) {
        let u32_at = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().expect("4 bytes"));
        let u64_at = |at: usize| u64::from_be_bytes(payload[at..at + 8].try_into().expect("8 bytes"));
        let Request { command, flags, offset, length, .. } = self.request;
        match what {
            kind::NONE => assert!(payload.is_empty(), "NONE with a payload"),
            kind::OFFSET_DATA | kind::OFFSET_HOLE => {
                assert_eq!(command, Command::Read, "data nobody asked for");
                assert!(payload.len() > 8, "an empty chunk of data");
                let at = u64_at(0).checked_sub(offset).expect("data before what was asked for");
                let bytes = match what {
                    kind::OFFSET_DATA => payload.len() as u64 - 8,
                    _ => u32_at(8).into(),
                };
                assert!(bytes > 0 && at + bytes <= length, "data beyond what was asked for: {at} {bytes}");
                let before = self.parts.range(..at + bytes).next_back();
                assert!(before.is_none_or(|(start, len)| start + len <= at), "data twice");
                self.parts.insert(at, bytes);
                self.answer.chunks += 1;
                assert!(
                    flags & command_flags::DF == 0 || self.answer.chunks == 1,
                    "fragments in spite of DF"
                );
                self.answer.data.resize(usize::try_from(length).expect("a length"), 0);
                if what == kind::OFFSET_DATA {
                    let at = usize::try_from(at).expect("a length");
                    self.answer.data[at..at + payload.len() - 8].copy_from_slice(&payload[8..]);
                } else {
                    assert_eq!(payload.len(), 12, "OFFSET_HOLE");
                }
            }
            kind::BLOCK_STATUS | kind::BLOCK_STATUS_EXTENDED => {
                assert_eq!(command, Command::BlockStatus, "extents nobody asked for");
                assert_eq!(Some(u32_at(0)), allocation, "a context nobody asked for");
                assert!(self.answer.extents.is_empty(), "extents twice");
                if what == kind::BLOCK_STATUS {
                    assert!(payload.len() > 4 && payload.len() % 8 == 4, "BLOCK_STATUS of {}", payload.len());
                    for at in (4..payload.len()).step_by(8) {
                        self.answer.extents.push((u32_at(at).into(), u32_at(at + 4).into()));
                    }
                } else {
                    assert_eq!(payload.len(), 8 + 16 * u32_at(4) as usize, "BLOCK_STATUS, extended");
                    for at in (8..payload.len()).step_by(16) {
                        self.answer.extents.push((u64_at(at), u64_at(at + 8)));
                    }
                }
                self.judge_extents();
            }
            kind::ERROR | kind::ERROR_OFFSET => {
                let text = usize::from(u16::from_be_bytes([payload[4], payload[5]]));
                let tail = if what == kind::ERROR { 0 } else { 8 };
                assert_eq!(payload.len(), 6 + text + tail, "an error's text");
                assert!(std::str::from_utf8(&payload[6..6 + text]).is_ok(), "no text");
                assert!(u32_at(0) != 0, "an error that is none");
                self.answer.error = u32_at(0);
            }
            other => panic!("a chunk of type {other:#x}"),
        }
    }

    /// Extents have lengths; only the last may go on behind what was asked for, and not where one was asked for.
    fn judge_extents(&self) {
        let extents = &self.answer.extents;
        let Request { flags, offset, length, .. } = self.request;
        assert!(extents.iter().all(|(bytes, _)| *bytes > 0), "an empty extent at {offset}: {extents:?}");
        let before: u64 = extents[..extents.len() - 1].iter().map(|(bytes, _)| bytes).sum();
        assert!(before < length, "extents beyond what was asked for: {extents:?}");
        if flags & command_flags::REQ_ONE != 0 {
            assert!(extents.len() == 1 && extents[0].0 <= length, "REQ_ONE: {extents:?}");
        }
    }
}
