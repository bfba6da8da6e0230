//! Haggling with a server: from a connected socket to one on which requests can be made.
//!
//! ```text
//! greeting → [STARTTLS] → EXTENDED_HEADERS, else STRUCTURED_REPLY → [SET_META_CONTEXT] → GO, else EXPORT_NAME
//! ```
//!
//! What a server does not know it may refuse, and the next best is taken; only TLS, where it was demanded, and the export itself
//! must be had. This blocks, up to a deadline, and so never runs on a worker. Everything a server says is bounded: so many replies to an
//! option, so many bytes in each; numbers that make no sense end the conversation.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SocketType, sockopt};

use crate::backend::nbd::session::{Bounds, printable};
use crate::backend::nbd::tls::Means;
use crate::backend::nbd::transport::Transport;
use crate::error::{Error, ErrorKind, Result};
use crate::format::nbd::option::{self, Block, answer, info, number};
use crate::format::nbd::reply::Style;
use crate::format::nbd::{
    BASE_ALLOCATION, GREETING_MAGIC, OPTION_MAGIC, PAYLOAD_MAX, STRING_MAX, flags, handshake,
};

/// Second 8 bytes of a greeting of the old style, which has no options.
const OLD_STYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// Replies to one option, and bytes of one, beyond which a server makes fun of us.
const REPLIES_MAX: u32 = 256;
const REPLY_BYTES_MAX: u32 = 2 * STRING_MAX;
/// A block size beyond which nobody's disk goes.
const BLOCK_MAX: u32 = 64 << 10;
/// The least that a server must take in one request to be of use.
const PAYLOAD_LEAST: u32 = 4096;

/// What to ask for.
#[derive(Debug, Clone)]
pub struct Wish {
    /// Name of the export.
    pub export: String,
    /// A context beside `base:allocation`.
    pub context: Option<String>,
    /// As the user calls the volume, for messages.
    pub name: String,
    /// Demand TLS.
    pub tls: Option<Means>,
}

/// What a server said of the export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Bytes.
    pub size: u64,
    /// See [`flags`].
    pub flags: u16,
    /// Offsets and lengths must be multiples of this.
    pub block_min: u32,
    /// What it likes best.
    pub block_preferred: u32,
    /// Bytes of one read or write.
    pub payload_max: u32,
    /// How replies look.
    pub style: Style,
    /// Contexts of block status: their ids and names.
    pub contexts: Vec<(u32, String)>,
}

impl Facts {
    /// What requests must keep to.
    #[must_use]
    pub fn bounds(&self) -> Bounds {
        let (block_min, payload_max) = (self.block_min, self.payload_max);
        Bounds { size: self.size, block_min, payload_max, style: self.style }
    }

    /// Has it all of these [`flags`]?
    #[must_use]
    pub fn has(&self, wanted: u16) -> bool {
        self.flags & wanted == wanted
    }

    /// The same export, as far as can be told?
    #[must_use]
    pub fn is_same_as(&self, other: &Self) -> bool {
        let of = |facts: &Self| (facts.size, facts.flags, facts.block_min, facts.payload_max);
        // A context that has another id now would be taken for another.
        let contexts = |facts: &Self| {
            let mut contexts = facts.contexts.clone();
            contexts.sort_unstable();
            contexts
        };
        of(self) == of(other) && contexts(self) == contexts(other)
    }

    /// The id of a context, if the server has it.
    #[must_use]
    pub fn context(&self, name: &str) -> Option<u32> {
        self.contexts.iter().find(|(_, other)| other == name).map(|&(id, _)| id)
    }
}

/// Check what the caller passed and make it fit.
///
/// # Errors
/// `Invalid`: no connected stream socket.
pub fn prepare(socket: OwnedFd, name: &str) -> Result<Transport> {
    let refused = || Error::new(ErrorKind::Invalid, "not a connection to an NBD server").at(name);
    if sockopt::socket_type(&socket).map_err(|errno| refused().because(std::io::Error::from(errno)))?
        != SocketType::STREAM
    {
        return Err(refused());
    }
    rustix::net::getpeername(&socket).map_err(|errno| refused().because(std::io::Error::from(errno)))?;
    // Of TCP alone; elsewhere they fail, and are not needed. A server that has gone without a word is noticed after half a minute.
    let _ = sockopt::set_tcp_nodelay(&socket, true);
    if sockopt::set_tcp_keepidle(&socket, std::time::Duration::from_secs(15)).is_ok() {
        let _ = sockopt::set_socket_keepalive(&socket, true);
        let _ = sockopt::set_tcp_keepintvl(&socket, std::time::Duration::from_secs(5));
        let _ = sockopt::set_tcp_keepcnt(&socket, 3);
        let _ = sockopt::set_tcp_user_timeout(&socket, 30_000);
    }
    Ok(Transport::Plain(Arc::new(socket)))
}

/// Haggle until `deadline`.
///
/// # Errors
/// See [`crate::backend::nbd::open`].
pub fn haggle(transport: Transport, wish: &Wish, deadline: Instant) -> Result<(Transport, Facts)> {
    let mut talk = Talk { transport, wish, deadline };
    let facts = talk.run().map_err(|error| error.at(&wish.name))?;
    Ok((talk.transport, facts))
}

/// A reply to an option: its type, and what came with it.
struct Reply {
    kind: u32,
    bytes: Vec<u8>,
}

impl Reply {
    fn is_error(&self) -> bool {
        self.kind & answer::ERROR_BIT != 0
    }
}

struct Talk<'a> {
    transport: Transport,
    wish: &'a Wish,
    deadline: Instant,
}

impl Talk<'_> {
    fn run(&mut self) -> Result<Facts> {
        let server = self.greet()?;
        let fixed = server & handshake::FIXED_NEWSTYLE != 0;
        let no_zeroes = server & handshake::NO_ZEROES != 0;
        let ours = server & (handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
        self.write(&u32::from(ours).to_be_bytes())?;
        if self.wish.export.len() > STRING_MAX as usize {
            return Err(Error::new(
                ErrorKind::Invalid,
                "the name of the export is too long for the protocol",
            ));
        }
        // Without the fix of the new style, a server leaves on an option it does not know.
        if !fixed && self.wish.tls.is_some() {
            return Err(Error::new(ErrorKind::Unsupported, "the NBD server has no TLS"));
        }
        if let Some(means) = &self.wish.tls {
            self.ask(number::STARTTLS, &[])?;
            let reply = self.reply(number::STARTTLS)?;
            if reply.kind != answer::ACK || !reply.bytes.is_empty() {
                let text = printable(&reply.bytes);
                let what = if text.is_empty() {
                    "the NBD server does not offer TLS".to_owned()
                } else {
                    format!("the NBD server does not offer TLS; it says: {text}")
                };
                return Err(Error::new(ErrorKind::Unsupported, what));
            }
            // Nothing that was said so far is believed: all that matters is asked again under TLS.
            self.transport = self.transport.under_tls(means)?;
        }
        if !fixed {
            return self.export_name(no_zeroes, Style::Simple, Vec::new());
        }
        let style = if self.simple_option(number::EXTENDED_HEADERS)? {
            Style::Extended
        } else if self.simple_option(number::STRUCTURED_REPLY)? {
            Style::Structured
        } else {
            Style::Simple
        };
        let contexts = if style == Style::Simple { Vec::new() } else { self.contexts()? };
        match self.go(style, contexts.clone())? {
            Some(facts) => Ok(facts),
            None => self.export_name(no_zeroes, style, contexts),
        }
    }

    fn greet(&mut self) -> Result<u16> {
        let mut bytes = [0; 16];
        self.read(&mut bytes)?;
        let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        match (word(0), word(8)) {
            (GREETING_MAGIC, OPTION_MAGIC) => {}
            (GREETING_MAGIC, OLD_STYLE_MAGIC) => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    "the NBD server speaks the old style of the protocol only",
                ));
            }
            _ => return Err(broken("its greeting is not that of NBD")),
        }
        let mut server = [0; 2];
        self.read(&mut server)?;
        Ok(u16::from_be_bytes(server))
    }

    /// Ask for something that is granted or not. `Ok(false)`: not.
    fn simple_option(&mut self, option: u32) -> Result<bool> {
        self.ask(option, &[])?;
        let reply = self.reply(option)?;
        match reply.kind {
            answer::ACK => Ok(true),
            // It says so to everything.
            answer::ERR_TLS_REQD | answer::ERR_SHUTDOWN => Err(self.refusal(&reply)),
            _ if reply.is_error() => Ok(false),
            _ => Err(broken("a reply that fits no option without data")),
        }
    }

    fn contexts(&mut self) -> Result<Vec<(u32, String)>> {
        let wanted: Vec<&str> =
            std::iter::once(BASE_ALLOCATION).chain(self.wish.context.as_deref()).collect();
        let mut bytes = Vec::new();
        option::put_contexts(&mut bytes, number::SET_META_CONTEXT, &self.wish.export, &wanted);
        self.write(&bytes)?;
        let mut contexts: Vec<(u32, String)> = Vec::new();
        for _ in 0..REPLIES_MAX {
            let reply = self.reply(number::SET_META_CONTEXT)?;
            match reply.kind {
                answer::ACK => return Ok(contexts),
                answer::META_CONTEXT => {
                    let (id, name) =
                        option::parse_context(&reply.bytes).map_err(|_| broken("a malformed context"))?;
                    if !wanted.contains(&name) {
                        return Err(broken("a context that was not asked for"));
                    }
                    if contexts.iter().any(|(other, known)| *other == id || known == name) {
                        return Err(broken("a context twice"));
                    }
                    contexts.push((id, name.to_owned()));
                }
                // Without contexts much still works; an export that is not there, GO says better.
                _ if reply.is_error() => return Ok(Vec::new()),
                _ => return Err(broken("a reply that fits no contexts")),
            }
        }
        Err(broken("more replies than any option has"))
    }

    /// `None`: the server does not know GO.
    fn go(&mut self, style: Style, contexts: Vec<(u32, String)>) -> Result<Option<Facts>> {
        let mut bytes = Vec::new();
        option::put_go(&mut bytes, number::GO, &self.wish.export, &[info::BLOCK_SIZE]);
        self.write(&bytes)?;
        let (mut export, mut blocks) = (None, None);
        let names = [info::NAME, info::DESCRIPTION].map(u16::to_be_bytes);
        for _ in 0..REPLIES_MAX {
            let reply = self.reply(number::GO)?;
            match reply.kind {
                answer::ACK => {
                    let (size, flags) =
                        export.ok_or_else(|| broken("it does not say the size of the export"))?;
                    return checked(size, flags, blocks, style, contexts).map(Some);
                }
                // For others, and in whatever script they are.
                answer::INFO if names.iter().any(|kind| reply.bytes.starts_with(kind)) => {}
                answer::INFO => {
                    match Block::read(&reply.bytes).map_err(|_| broken("malformed information"))? {
                        Block::Export { size, flags } => export = Some((size, flags)),
                        Block::BlockSize { minimum, preferred, maximum } => {
                            blocks = Some((minimum, preferred, maximum));
                        }
                        Block::Name(_) | Block::Description(_) | Block::Unknown(_) => {}
                    }
                }
                answer::ERR_UNSUP => return Ok(None),
                _ if reply.is_error() => return Err(self.refusal(&reply)),
                _ => return Err(broken("a reply that is none to GO")),
            }
        }
        Err(broken("more replies than any option has"))
    }

    /// The old way: without an answer if there is no such export.
    fn export_name(&mut self, no_zeroes: bool, style: Style, contexts: Vec<(u32, String)>) -> Result<Facts> {
        self.ask(number::EXPORT_NAME, &self.wish.export.clone().into_bytes())?;
        let mut bytes = [0; 10];
        self.read(&mut bytes).map_err(|error| {
            let hint = "a server of this age ends the connection where it has no such export";
            if error.kind() == ErrorKind::Io {
                error.with_kind(ErrorKind::NotFound).hint(hint)
            } else {
                error
            }
        })?;
        if !no_zeroes {
            self.read(&mut [0; 124])?;
        }
        let (size, flags) = size_and_flags(bytes);
        checked(size, flags, None, style, contexts)
    }

    fn refusal(&self, reply: &Reply) -> Error {
        let export = printable(self.wish.export.as_bytes());
        let (kind, what) = match reply.kind {
            answer::ERR_UNKNOWN => (ErrorKind::NotFound, format!("the NBD server has no export “{export}”")),
            answer::ERR_TLS_REQD => (ErrorKind::Denied, "the NBD server demands TLS".to_owned()),
            answer::ERR_POLICY => {
                (ErrorKind::Denied, format!("the NBD server does not allow the export “{export}”"))
            }
            answer::ERR_SHUTDOWN => (ErrorKind::Io, "the NBD server is shutting down".to_owned()),
            answer::ERR_UNSUP | answer::ERR_PLATFORM => {
                (ErrorKind::Unsupported, "the NBD server does not support what is needed".to_owned())
            }
            other => {
                let number = other & !answer::ERROR_BIT;
                (ErrorKind::Io, format!("the NBD server refuses the export “{export}” (error {number})"))
            }
        };
        let text = printable(&reply.bytes);
        let what = if text.is_empty() { what } else { format!("{what}; it says: {text}") };
        let error = Error::new(kind, what);
        match reply.kind {
            answer::ERR_TLS_REQD => error.hint("use an nbds:// address"),
            answer::ERR_UNKNOWN => error.hint("`nbdinfo --list` shows what a server exports"),
            _ => error,
        }
    }

    fn ask(&mut self, option: u32, data: &[u8]) -> Result<()> {
        let mut bytes = Vec::with_capacity(option::OPTION_BYTES + data.len());
        option::put_option(&mut bytes, option, data);
        self.write(&bytes)
    }

    fn reply(&mut self, option: u32) -> Result<Reply> {
        let mut head = [0; option::REPLY_BYTES];
        self.read(&mut head)?;
        let head = option::parse_reply(&head).filter(|head| head.option == option);
        let head = head.ok_or_else(|| broken("what should be the reply to an option is none"))?;
        if head.length > REPLY_BYTES_MAX {
            return Err(broken("a reply longer than any may be"));
        }
        let mut bytes = vec![0; head.length as usize];
        self.read(&mut bytes)?;
        Ok(Reply { kind: head.kind, bytes })
    }

    fn read(&mut self, mut into: &mut [u8]) -> Result<()> {
        while !into.is_empty() {
            match self.transport.receive(&mut [IoSliceMut::new(into)], true) {
                Ok(Some(0)) => {
                    return Err(Error::new(ErrorKind::Io, "the NBD server has ended the connection"));
                }
                Ok(Some(count)) => into = &mut into[count..],
                Ok(None) => self.ready(PollFlags::IN)?,
                Err(cause) => return Err(failed(cause)),
            }
        }
        Ok(())
    }

    fn write(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() || self.transport.has_unsent() {
            match self.transport.send(&[IoSlice::new(bytes)]) {
                Ok(Some(count)) => bytes = &bytes[count..],
                Ok(None) => self.ready(PollFlags::OUT)?,
                Err(cause) => return Err(failed(cause)),
            }
        }
        Ok(())
    }

    fn ready(&self, mut wanted: PollFlags) -> Result<()> {
        if self.transport.has_unsent() {
            wanted |= PollFlags::OUT;
        }
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            // Also where there is something at any time, and never what is waited for.
            if left.is_zero() {
                return Err(silent());
            }
            let wait = Timespec::try_from(left).expect("seconds");
            match poll(&mut [PollFd::new(self.transport.socket(), wanted)], Some(&wait)) {
                Err(Errno::INTR) => {}
                Ok(0) => return Err(silent()),
                Ok(_) => return Ok(()),
                Err(errno) => return Err(Error::io("cannot wait for the NBD server", errno)),
            }
        }
    }
}

fn failed(cause: std::io::Error) -> Error {
    match cause.kind() {
        // rustls says so of alerts, and of certificates.
        std::io::ErrorKind::InvalidData => {
            let error = Error::new(ErrorKind::Denied, "TLS with the NBD server failed").because(cause);
            error.hint("its certificate must be for the name in the address and from a trusted authority, and ours from one it trusts")
        }
        _ => Error::io("the connection to the NBD server broke", cause),
    }
}

fn silent() -> Error {
    Error::new(ErrorKind::Io, "the NBD server does not answer")
}

fn broken(how: &str) -> Error {
    Error::new(ErrorKind::Io, format!("the NBD server breaks the protocol: {how}"))
}

fn size_and_flags(bytes: [u8; 10]) -> (u64, u16) {
    let (size, flags) = bytes.split_first_chunk::<8>().expect("10 bytes");
    (u64::from_be_bytes(*size), u16::from_be_bytes([flags[0], flags[1]]))
}

/// What a server says of an export must make sense.
fn checked(
    size: u64,
    flags: u16,
    blocks: Option<(u32, u32, u32)>,
    style: Style,
    contexts: Vec<(u32, String)>,
) -> Result<Facts> {
    if flags & flags::HAS_FLAGS == 0 {
        return Err(broken("flags that are none"));
    }
    if i64::try_from(size).is_err() {
        return Err(broken("a size of 8 EiB or more"));
    }
    // What holds where nothing was said.
    let (block_min, block_preferred, largest) = blocks.unwrap_or((1, 4096, PAYLOAD_MAX));
    let sensible = block_min.is_power_of_two()
        && block_min <= BLOCK_MAX
        && block_preferred.is_power_of_two()
        && block_preferred >= block_min
        && largest >= block_min;
    if !sensible {
        return Err(broken("block sizes that make no sense"));
    }
    if !size.is_multiple_of(block_min.into()) {
        return Err(broken("a size that is no whole number of its blocks"));
    }
    let payload_max = largest.min(PAYLOAD_MAX) / block_min * block_min;
    if payload_max < PAYLOAD_LEAST.min(u32::try_from(size).unwrap_or(u32::MAX).max(1)) {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("the NBD server takes only {largest} bytes at a time"),
        ));
    }
    Ok(Facts { size, flags, block_min, block_preferred, payload_max, style, contexts })
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn time_is_up_although_there_is_something_to_read() {
        let (ours, mut theirs) = UnixStream::pair().expect("sockets");
        std::io::Write::write_all(&mut theirs, b"tickets").expect("sent");
        let wish = Wish { export: String::new(), context: None, name: "remote".to_owned(), tls: None };
        let transport = prepare(ours.into(), "remote").expect("a socket");
        let talk = Talk { transport, wish: &wish, deadline: Instant::now() };
        let error = talk.ready(PollFlags::IN).expect_err("too late");
        assert!(error.chain().contains("does not answer"), "{}", error.chain());
    }
}
