//! Haggling with one client, without I/O: bytes in, bytes out, until it knows which export it wants and how it is answered.
//!
//! ```text
//! greeting ▶ Flags ─ 4 bytes ▶ Options ⇄ one option at a time ─ GO, EXPORT_NAME ▶ Agreed
//!                                 │ └─ STARTTLS ▶ TLS, then Options again, with nothing remembered
//!                                 └─ ABORT, nonsense, a bound ▶ Close
//! ```
//!
//! Invariants:
//! 1. One option is answered per [`Haggle::step`], and the caller takes no further one before the answer is sent: a client that does
//!    not read is not answered, so what waits to be sent is bounded ([`OUT_MAX`]). LIST goes on over several steps.
//! 2. Nothing is allocated by a length a client says: an option longer than [`OPTION_DATA_MAX`] is refused and skipped as it comes.
//! 3. A client's bytes and options are counted, and end at [`limits::HAGGLE_BYTES_MAX`] and [`limits::HAGGLE_OPTIONS_MAX`].
//! 4. Contexts belong to one name of an export; whoever begins with another has none.
//!
//! What it refuses: haggling that is not *fixed*; more than `base:allocation`; contexts before structured replies or extended
//! headers; going back from extended headers. The experimental selection among contexts (BLOCK_STATUS with payload) is not offered.

use proto::export::ExportId;

use crate::format::nbd::option::{
    self, Block, CLIENT_FLAGS_BYTES, Contexts, Go, Header, Malformed, OPTION_BYTES, OPTION_DATA_MAX, answer,
    info, number,
};
use crate::format::nbd::reply::Style;
use crate::format::nbd::{BASE_ALLOCATION, PAYLOAD_MAX, STRING_MAX, flags, handshake};
use crate::limits;

/// Bytes one step appends at most: a name and a description behind each other a few times, for LIST.
pub const OUT_MAX: usize = LIST_HIGH + ENTRY_MAX + option::REPLY_BYTES;

/// LIST pauses when a step has appended this much.
const LIST_HIGH: usize = 16 << 10;
const ENTRY_MAX: usize = option::REPLY_BYTES + 4 + 2 * STRING_MAX as usize;
/// The number of `base:allocation` on every connection.
const ALLOCATION_ID: u32 = 1;
/// Smallest block size we call preferred, bytes: a page.
const PREFERRED_MIN: u32 = 4096;

/// An export as clients are told of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// Its number.
    pub id: ExportId,
    /// What clients call it.
    pub name: String,
    /// For humans.
    pub description: Option<String>,
    /// Bytes.
    pub size: u64,
    /// Nothing is written.
    pub read_only: bool,
    /// What a request should be aligned to, bytes: a power of two.
    pub preferred: u32,
    /// It, or its owner, has as many connections as it may have.
    pub full: bool,
}

/// The exports of a listening socket.
pub trait Catalogue {
    /// The export of that name, if new clients may have it.
    fn find(&self, name: &str) -> Option<Offer>;
    /// The first export behind this number, for a list in their order; from 0.
    fn after(&self, id: ExportId) -> Option<Offer>;
}

/// What was agreed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agreed {
    /// The export.
    pub id: ExportId,
    /// How it is answered.
    pub style: Style,
    /// It asked for `base:allocation`, and knows it by this number.
    pub allocation: Option<u32>,
    /// Bytes that came behind the last option: the first requests.
    pub early: Vec<u8>,
}

/// What is next, once the bytes of a step are sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Another step.
    Again,
    /// More bytes of the client.
    Wait,
    /// TLS; what has come behind STARTTLS belongs to it already, so that nobody in between gets a word in.
    Tls(Vec<u8>),
    /// Transmission.
    Go(Agreed),
    /// The end.
    Close,
}

/// How a listening socket stands to TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Security {
    /// There is none.
    Plain,
    /// It is demanded, and did not begin yet.
    Demanded,
    /// It is on.
    On,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The client's flags come next.
    Flags,
    /// An option comes next.
    Options,
    /// This much of an option's data is thrown away first.
    Skipping(u32),
    /// A list is being sent; this export was the last one.
    Listing(ExportId),
    /// Over.
    Closed,
}

/// One client. See the module.
pub struct Haggle {
    state: State,
    security: Security,
    input: Vec<u8>,
    /// Bytes taken and options answered, ever.
    bytes: usize,
    options: u32,
    zeros: bool,
    style: Style,
    /// The export whose allocation was asked for.
    allocation_of: Option<String>,
}

/// An error reply: its type and text.
type Refused = (u32, &'static str);

const LEAVE: Refused = (answer::ERR_TOO_BIG, "that was too much");
const UNKNOWN: Refused = (answer::ERR_UNKNOWN, "no such export");

fn invalid(error: Malformed) -> Refused {
    (answer::ERR_INVALID, error.0)
}

impl Haggle {
    /// Greet a client.
    #[must_use]
    pub fn greet(security: Security, out: &mut Vec<u8>) -> Self {
        out.extend_from_slice(&option::greeting(handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES));
        Self {
            state: State::Flags,
            security,
            input: Vec::new(),
            bytes: 0,
            options: 0,
            zeros: true,
            style: Style::Simple,
            allocation_of: None,
        }
    }

    /// Take bytes of the client. Give it no more than some KiB between two answers of [`Step::Wait`].
    pub fn feed(&mut self, bytes: &[u8]) {
        self.bytes = self.bytes.saturating_add(bytes.len());
        let mut bytes = bytes;
        if let State::Skipping(left) = &mut self.state {
            let skipped = bytes.len().min(*left as usize);
            *left -= u32::try_from(skipped).expect("no more than was left");
            bytes = &bytes[skipped..];
        }
        self.input.extend_from_slice(bytes);
    }

    /// TLS is on: whatever was agreed on before is forgotten.
    pub fn secured(&mut self) {
        self.security = Security::On;
        self.style = Style::Simple;
        self.allocation_of = None;
    }

    /// Bytes that were taken and not understood yet.
    #[must_use]
    pub fn held(&self) -> usize {
        self.input.len()
    }

    /// Go on by one option at most. What is appended to `out` must be sent before the next step.
    pub fn step(&mut self, catalogue: &dyn Catalogue, out: &mut Vec<u8>) -> Step {
        let step = self.go_on(catalogue, out);
        if step == Step::Close {
            self.state = State::Closed;
            self.input = Vec::new();
        } else if step == Step::Wait && self.bytes > limits::HAGGLE_BYTES_MAX {
            self.state = State::Closed;
            return Step::Close;
        }
        step
    }

    fn go_on(&mut self, catalogue: &dyn Catalogue, out: &mut Vec<u8>) -> Step {
        match self.state {
            State::Flags => {
                let Some(flags) = self.take::<CLIENT_FLAGS_BYTES>() else { return Step::Wait };
                let flags = u32::from_be_bytes(flags);
                let (fixed, no_zeros) =
                    (u32::from(handshake::FIXED_NEWSTYLE), u32::from(handshake::NO_ZEROES));
                // A client that does not say "fixed" could be answered only by EXPORT_NAME; there has been none for a decade.
                if flags & fixed == 0 || flags & !(fixed | no_zeros) != 0 {
                    return Step::Close;
                }
                self.zeros = flags & no_zeros == 0;
                self.state = State::Options;
                Step::Again
            }
            State::Skipping(0) => {
                self.state = State::Options;
                Step::Again
            }
            State::Skipping(_) => Step::Wait,
            State::Listing(last) => self.list(last, catalogue, out),
            State::Options => self.option(catalogue, out),
            State::Closed => Step::Close,
        }
    }

    fn take<const BYTES: usize>(&mut self) -> Option<[u8; BYTES]> {
        let taken = *self.input.first_chunk()?;
        self.input.drain(..BYTES);
        Some(taken)
    }

    /// One option, if it is here as a whole.
    fn option(&mut self, catalogue: &dyn Catalogue, out: &mut Vec<u8>) -> Step {
        let Some(head) = self.input.first_chunk() else { return Step::Wait };
        let Some(header) = option::parse_option(head) else { return Step::Close };
        if header.length > OPTION_DATA_MAX {
            return self.skip(header, out);
        }
        let end = OPTION_BYTES + header.length as usize;
        if self.input.len() < end {
            return Step::Wait;
        }
        if self.count() {
            option::put_reply(out, header.option, LEAVE.0, LEAVE.1.as_bytes());
            return Step::Close;
        }
        // Moved out for as long as its data is looked at; put back without it.
        let mut input = std::mem::take(&mut self.input);
        let step = self.answer(header.option, &input[OPTION_BYTES..end], catalogue, out);
        input.drain(..end);
        match step {
            Step::Go(agreed) => Step::Go(Agreed { early: input, ..agreed }),
            Step::Tls(_) => Step::Tls(input),
            other => {
                self.input = input;
                other
            }
        }
    }

    /// Count an option; `true`: that was one too many.
    fn count(&mut self) -> bool {
        self.options += 1;
        self.options > limits::HAGGLE_OPTIONS_MAX
    }

    /// An option whose data nobody wants to have.
    fn skip(&mut self, header: Header, out: &mut Vec<u8>) -> Step {
        let (kind, text) = match self.security {
            Security::Demanded => TLS_FIRST,
            _ => (answer::ERR_TOO_BIG, "the option's data is too long"),
        };
        // This one has no errors.
        if header.option == number::EXPORT_NAME {
            return Step::Close;
        }
        option::put_reply(out, header.option, kind, text.as_bytes());
        let skipped = header.length as usize;
        if self.count() || self.bytes.saturating_add(skipped) > limits::HAGGLE_BYTES_MAX + self.input.len() {
            return Step::Close;
        }
        self.input.drain(..OPTION_BYTES);
        let here = self.input.len().min(skipped);
        self.input.drain(..here);
        self.state = State::Skipping(header.length - u32::try_from(here).expect("no more than its length"));
        Step::Again
    }

    fn answer(&mut self, option: u32, data: &[u8], catalogue: &dyn Catalogue, out: &mut Vec<u8>) -> Step {
        let result = match option {
            number::EXPORT_NAME => return self.export_name(data, catalogue, out),
            number::ABORT => {
                option::put_reply(out, option, answer::ACK, &[]);
                return Step::Close;
            }
            number::STARTTLS => match self.start_tls(data) {
                Ok(()) => {
                    option::put_reply(out, option, answer::ACK, &[]);
                    return Step::Tls(Vec::new());
                }
                Err(refused) => Err(refused),
            },
            _ if self.security == Security::Demanded => Err(TLS_FIRST),
            number::LIST if data.is_empty() => {
                self.state = State::Listing(0);
                return Step::Again;
            }
            number::INFO => self.inform(option, data, catalogue, out).map(drop),
            number::GO => match self.inform(option, data, catalogue, out) {
                Ok(agreed) => {
                    option::put_reply(out, option, answer::ACK, &[]);
                    return Step::Go(agreed);
                }
                Err(refused) => Err(refused),
            },
            number::STRUCTURED_REPLY if data.is_empty() => match self.style {
                Style::Extended => {
                    Err((answer::ERR_EXT_HEADER_REQD, "extended headers are agreed on already"))
                }
                Style::Simple | Style::Structured => {
                    self.style = Style::Structured;
                    Ok(())
                }
            },
            number::EXTENDED_HEADERS if data.is_empty() => {
                self.style = Style::Extended;
                Ok(())
            }
            number::LIST | number::STRUCTURED_REPLY | number::EXTENDED_HEADERS => {
                Err((answer::ERR_INVALID, "this option has no data"))
            }
            number::LIST_META_CONTEXT => self.list_contexts(data, catalogue, out),
            number::SET_META_CONTEXT => self.set_contexts(data, catalogue, out),
            _ => Err((answer::ERR_UNSUP, "this option is not known here")),
        };
        let (kind, text) = result.err().unwrap_or((answer::ACK, ""));
        option::put_reply(out, option, kind, text.as_bytes());
        Step::Again
    }

    fn start_tls(&self, data: &[u8]) -> Result<(), Refused> {
        match self.security {
            Security::Plain => Err((answer::ERR_POLICY, "there is no TLS here")),
            Security::On => Err((answer::ERR_INVALID, "TLS is on already")),
            Security::Demanded if data.is_empty() => Ok(()),
            Security::Demanded => Err((answer::ERR_INVALID, "this option has no data")),
        }
    }

    /// The part of a list that fits a step.
    fn list(&mut self, mut last: ExportId, catalogue: &dyn Catalogue, out: &mut Vec<u8>) -> Step {
        let before = out.len();
        while out.len() - before < LIST_HIGH {
            let Some(offer) = catalogue.after(last) else {
                option::put_reply(out, number::LIST, answer::ACK, &[]);
                self.state = State::Options;
                return Step::Again;
            };
            option::put_server(out, &offer.name, offer.description.as_deref().unwrap_or_default());
            last = offer.id;
        }
        self.state = State::Listing(last);
        Step::Again
    }

    /// INFO, and GO up to its last reply.
    fn inform(
        &mut self,
        option: u32,
        data: &[u8],
        catalogue: &dyn Catalogue,
        out: &mut Vec<u8>,
    ) -> Result<Agreed, Refused> {
        let go = Go::parse(data).map_err(invalid)?;
        let offer = catalogue.find(go.name).ok_or(UNKNOWN)?;
        if offer.full && option == number::GO {
            return Err((answer::ERR_POLICY, "as many clients are connected as may be"));
        }
        Block::Export { size: offer.size, flags: self.flags(&offer) }.put(out, option);
        if go.wants(info::NAME) {
            Block::Name(&offer.name).put(out, option);
        }
        if let (true, Some(description)) = (go.wants(info::DESCRIPTION), &offer.description) {
            Block::Description(description).put(out, option);
        }
        if go.wants(info::BLOCK_SIZE) {
            let preferred = offer.preferred.clamp(PREFERRED_MIN, PAYLOAD_MAX);
            Block::BlockSize { minimum: 1, preferred, maximum: PAYLOAD_MAX }.put(out, option);
        }
        Ok(self.agree(&offer))
    }

    fn export_name(&mut self, data: &[u8], catalogue: &dyn Catalogue, out: &mut Vec<u8>) -> Step {
        // No errors here: whatever is wrong, the session ends. Extended headers exclude this option.
        if self.security == Security::Demanded || self.style == Style::Extended {
            return Step::Close;
        }
        let offer = option::text(data).ok().and_then(|name| catalogue.find(name));
        let Some(offer) = offer.filter(|offer| !offer.full) else { return Step::Close };
        option::put_begin(out, offer.size, self.flags(&offer), self.zeros);
        Step::Go(self.agree(&offer))
    }

    fn agree(&self, offer: &Offer) -> Agreed {
        let allocation = (self.allocation_of.as_deref() == Some(&*offer.name)).then_some(ALLOCATION_ID);
        Agreed { id: offer.id, style: self.style, allocation, early: Vec::new() }
    }

    /// What an export can do for this client.
    fn flags(&self, offer: &Offer) -> u16 {
        let always = flags::HAS_FLAGS
            | flags::SEND_FLUSH
            | flags::SEND_FUA
            | flags::CAN_MULTI_CONN
            | flags::SEND_CACHE;
        let writable = if offer.read_only {
            flags::READ_ONLY
        } else {
            flags::SEND_TRIM | flags::SEND_WRITE_ZEROES | flags::SEND_FAST_ZERO
        };
        // Not to be said where replies cannot be fragmented.
        let fragments = if self.style == Style::Simple { 0 } else { flags::SEND_DF };
        always | writable | fragments
    }

    fn list_contexts(
        &self,
        data: &[u8],
        catalogue: &dyn Catalogue,
        out: &mut Vec<u8>,
    ) -> Result<(), Refused> {
        let contexts = self.contexts(data)?;
        catalogue.find(contexts.name).ok_or(UNKNOWN)?;
        if contexts.count == 0 || contexts.queries().any(|query| query == "base:" || query == BASE_ALLOCATION)
        {
            option::put_context(out, number::LIST_META_CONTEXT, 0, BASE_ALLOCATION);
        }
        Ok(())
    }

    fn set_contexts(
        &mut self,
        data: &[u8],
        catalogue: &dyn Catalogue,
        out: &mut Vec<u8>,
    ) -> Result<(), Refused> {
        // Replaced whether this goes well or not.
        self.allocation_of = None;
        let contexts = self.contexts(data)?;
        catalogue.find(contexts.name).ok_or(UNKNOWN)?;
        if contexts.queries().any(|query| query == BASE_ALLOCATION) {
            option::put_context(out, number::SET_META_CONTEXT, ALLOCATION_ID, BASE_ALLOCATION);
            self.allocation_of = Some(contexts.name.to_owned());
        }
        Ok(())
    }

    fn contexts<'a>(&self, data: &'a [u8]) -> Result<Contexts<'a>, Refused> {
        if self.style == Style::Simple {
            return Err((answer::ERR_INVALID, "contexts need structured replies or extended headers first"));
        }
        let contexts = Contexts::parse(data).map_err(invalid)?;
        if contexts.queries().any(|query| !query.contains(':')) {
            return Err((answer::ERR_INVALID, "a context has no namespace"));
        }
        Ok(contexts)
    }
}

const TLS_FIRST: Refused = (answer::ERR_TLS_REQD, "TLS first: NBD_OPT_STARTTLS");

#[cfg(test)]
mod tests;
