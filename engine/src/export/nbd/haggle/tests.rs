//! Tests of haggling: every option, wrong ones, hostile bytes.

use super::*;
use crate::format::nbd::option::{ReplyHeader, put_contexts, put_go, put_option};

/// Three exports of which one is read-only and one is full.
struct Offers(Vec<Offer>);

impl Offers {
    fn some() -> Self {
        let offer = |id, name: &str| Offer {
            id,
            name: name.to_owned(),
            description: None,
            size: 1 << 30,
            read_only: false,
            preferred: 512,
            full: false,
        };
        Self(vec![
            Offer { description: Some("the first".to_owned()), ..offer(3, "") },
            Offer { read_only: true, preferred: 65536, ..offer(5, "ro") },
            Offer { full: true, ..offer(8, "full") },
        ])
    }
}

impl Catalogue for Offers {
    fn find(&self, name: &str) -> Option<Offer> {
        self.0.iter().find(|offer| offer.name == name).cloned()
    }

    fn after(&self, id: ExportId) -> Option<Offer> {
        self.0.iter().find(|offer| offer.id > id).cloned()
    }
}

/// A client with its server.
struct Talk {
    haggle: Haggle,
    offers: Offers,
    /// What the server said and nobody looked at yet.
    said: Vec<u8>,
    last: Step,
}

const FIXED: [u8; 4] = [0, 0, 0, 3];

impl Talk {
    fn fresh(security: Security) -> Self {
        let mut said = Vec::new();
        let haggle = Haggle::greet(security, &mut said);
        assert_eq!(option::parse_greeting(said[..].try_into().expect("a greeting")), Ok(3));
        Self { haggle, offers: Offers::some(), said: Vec::new(), last: Step::Wait }
    }

    /// Past the flags.
    fn new(security: Security) -> Self {
        let mut talk = Self::fresh(security);
        assert_eq!(talk.say(&FIXED), Step::Wait);
        talk
    }

    fn structured() -> Self {
        let mut talk = Self::new(Security::Plain);
        assert_eq!(talk.option(number::STRUCTURED_REPLY, &[]), [(answer::ACK, vec![])]);
        talk
    }

    fn say(&mut self, bytes: &[u8]) -> Step {
        self.haggle.feed(bytes);
        loop {
            let before = self.said.len();
            self.last = self.haggle.step(&self.offers, &mut self.said);
            assert!(self.said.len() - before <= OUT_MAX);
            if self.last != Step::Again {
                return self.last.clone();
            }
        }
    }

    /// The replies there are, each to `option`.
    fn replies(&mut self, option: u32) -> Vec<(u32, Vec<u8>)> {
        let said = std::mem::take(&mut self.said);
        let mut rest = &said[..];
        let mut replies = Vec::new();
        while let Some((head, behind)) = rest.split_first_chunk() {
            let ReplyHeader { option: to, kind, length } = option::parse_reply(head).expect("a reply");
            assert_eq!(to, option);
            let (data, behind) = behind.split_at(length as usize);
            replies.push((kind, data.to_vec()));
            rest = behind;
        }
        assert!(rest.is_empty());
        replies
    }

    fn option(&mut self, option: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        let mut bytes = Vec::new();
        put_option(&mut bytes, option, data);
        self.say(&bytes);
        self.replies(option)
    }

    fn go(&mut self, option: u32, name: &str, kinds: &[u16]) -> Vec<(u32, Vec<u8>)> {
        let mut bytes = Vec::new();
        put_go(&mut bytes, option, name, kinds);
        self.say(&bytes);
        self.replies(option)
    }

    fn contexts(&mut self, option: u32, name: &str, queries: &[&str]) -> Vec<(u32, Vec<u8>)> {
        let mut bytes = Vec::new();
        put_contexts(&mut bytes, option, name, queries);
        self.say(&bytes);
        self.replies(option)
    }

    /// The error that an option was answered with, and nothing else; the client may go on.
    fn error(&mut self, option: u32, data: &[u8]) -> u32 {
        let replies = self.option(option, data);
        assert_eq!(self.last, Step::Wait, "an error is not the end");
        only_error(&replies)
    }
}

fn only_error(replies: &[(u32, Vec<u8>)]) -> u32 {
    let [(kind, text)] = replies else { panic!("one reply: {replies:?}") };
    assert!(kind & answer::ERROR_BIT != 0 && !text.is_empty(), "{kind:x} says why");
    *kind
}

fn blocks(replies: &[(u32, Vec<u8>)]) -> Vec<Block<'_>> {
    let (last, infos) = replies.split_last().expect("replies");
    assert_eq!(last, &(answer::ACK, vec![]));
    infos
        .iter()
        .map(|(kind, data)| {
            assert_eq!(*kind, answer::INFO);
            Block::parse(data).expect("a block")
        })
        .collect()
}

const WRITABLE: u16 = flags::HAS_FLAGS
    | flags::SEND_FLUSH
    | flags::SEND_FUA
    | flags::SEND_TRIM
    | flags::SEND_WRITE_ZEROES
    | flags::SEND_FAST_ZERO
    | flags::CAN_MULTI_CONN
    | flags::SEND_CACHE;
const READ_ONLY: u16 = flags::HAS_FLAGS
    | flags::READ_ONLY
    | flags::SEND_FLUSH
    | flags::SEND_FUA
    | flags::CAN_MULTI_CONN
    | flags::SEND_CACHE;

#[test]
fn flags_must_say_fixed_and_nothing_unknown() {
    for (flags, goes_on) in
        [(3u32, true), (1, true), (0, false), (2, false), (5, false), (1 << 31 | 1, false)]
    {
        let step = Talk::fresh(Security::Plain).say(&flags.to_be_bytes());
        assert_eq!(step, if goes_on { Step::Wait } else { Step::Close }, "{flags:x}");
    }
}

#[test]
fn export_name_begins_without_a_header_and_with_zeros_unless_both_do_without() {
    for (flags, zeros) in [([0, 0, 0, 3], 0), ([0, 0, 0, 1], option::BEGIN_ZEROS)] {
        let mut talk = Talk::fresh(Security::Plain);
        talk.say(&flags);
        let mut bytes = Vec::new();
        put_option(&mut bytes, number::EXPORT_NAME, b"ro");
        bytes.extend_from_slice(b"request");
        let Step::Go(agreed) = talk.say(&bytes) else { panic!("agreed") };
        let early = b"request".to_vec();
        assert_eq!(agreed, Agreed { id: 5, style: Style::Simple, allocation: None, early });
        assert_eq!(talk.said.len(), option::BEGIN_BYTES + zeros);
        assert_eq!(talk.said[..8], (1u64 << 30).to_be_bytes());
        assert_eq!(talk.said[8..10], READ_ONLY.to_be_bytes());
        assert!(talk.said[10..].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn export_name_that_cannot_be_is_the_end() {
    for name in [&b"other"[..], b"full", b"\xff", b"ro\0", &[b'x'; 4097]] {
        let mut talk = Talk::new(Security::Plain);
        assert_eq!(talk.option(number::EXPORT_NAME, name), []);
        assert_eq!(talk.last, Step::Close, "{name:?}");
    }
    let mut talk = Talk::new(Security::Plain);
    talk.option(number::EXTENDED_HEADERS, &[]);
    talk.option(number::EXPORT_NAME, b"");
    assert_eq!(talk.last, Step::Close, "extended headers exclude it");
}

#[test]
fn info_tells_what_was_asked_for_and_go_begins() {
    let mut talk = Talk::new(Security::Plain);
    let all = [info::EXPORT, info::NAME, info::DESCRIPTION, info::BLOCK_SIZE, 4711];
    let replies = talk.go(number::INFO, "", &all);
    let expected = [
        Block::Export { size: 1 << 30, flags: WRITABLE },
        Block::Name(""),
        Block::Description("the first"),
        Block::BlockSize { minimum: 1, preferred: 4096, maximum: 32 << 20 },
    ];
    assert_eq!(blocks(&replies), expected);
    assert_eq!(talk.last, Step::Wait);
    let replies = talk.go(number::GO, "ro", &[info::BLOCK_SIZE, info::DESCRIPTION]);
    let expected = [
        Block::Export { size: 1 << 30, flags: READ_ONLY },
        Block::BlockSize { minimum: 1, preferred: 65536, maximum: 32 << 20 },
    ];
    assert_eq!(blocks(&replies), expected);
    assert_eq!(talk.last, Step::Go(Agreed { id: 5, style: Style::Simple, allocation: None, early: vec![] }));
}

#[test]
fn fragments_can_be_forbidden_where_there_may_be_some() {
    for option in [number::STRUCTURED_REPLY, number::EXTENDED_HEADERS] {
        let mut talk = Talk::new(Security::Plain);
        talk.option(option, &[]);
        let replies = talk.go(number::GO, "", &[]);
        assert_eq!(blocks(&replies), [Block::Export { size: 1 << 30, flags: WRITABLE | flags::SEND_DF }]);
        let Step::Go(agreed) = talk.last else { panic!("agreed") };
        let extended = option == number::EXTENDED_HEADERS;
        assert_eq!(agreed.style, if extended { Style::Extended } else { Style::Structured });
    }
}

#[test]
fn info_and_go_that_cannot_be_are_answered_with_an_error_and_nothing_else() {
    let mut talk = Talk::new(Security::Plain);
    for option in [number::INFO, number::GO] {
        assert_eq!(only_error(&talk.go(option, "other", &[])), answer::ERR_UNKNOWN);
        let name = |bytes: &[u8], count: u16| {
            let length = u32::try_from(bytes.len()).expect("short");
            [&length.to_be_bytes()[..], bytes, &count.to_be_bytes()].concat()
        };
        for data in [
            vec![],
            vec![0; 5],
            vec![0, 0, 0, 1, 0, 0],
            name(b"\xff", 0),
            name(b"a\0", 0),
            name(b"ro", 1),
            name(&[b'x'; 4097], 0),
            [name(b"ro", 0), vec![0]].concat(),
        ] {
            assert_eq!(talk.error(option, &data), answer::ERR_INVALID, "{data:?}");
        }
    }
    assert_eq!(only_error(&talk.go(number::GO, "full", &[])), answer::ERR_POLICY);
    assert_eq!(talk.go(number::INFO, "full", &[]).len(), 2, "it may be asked about");
    assert_eq!(talk.go(number::GO, "ro", &[]).len(), 2, "and after all that one can begin");
}

#[test]
fn a_list_names_every_export_in_their_order_also_in_several_steps() {
    let mut talk = Talk::new(Security::Plain);
    let names = |replies: Vec<(u32, Vec<u8>)>| -> Vec<(String, String)> {
        let (last, entries) = replies.split_last().expect("replies");
        assert_eq!(last, &(answer::ACK, vec![]));
        let entry = |(kind, data): &(u32, Vec<u8>)| {
            assert_eq!(*kind, answer::SERVER);
            let (name, description) = option::parse_server(data).expect("an export");
            (name.to_owned(), description.to_owned())
        };
        entries.iter().map(entry).collect()
    };
    let some = [("", "the first"), ("ro", ""), ("full", "")].map(|(a, b)| (a.to_owned(), b.to_owned()));
    assert_eq!(names(talk.option(number::LIST, &[])), some);
    assert_eq!(talk.error(number::LIST, b"x"), answer::ERR_INVALID);

    let offer = talk.offers.0[0].clone();
    let long = |id| Offer { id, name: format!("{id:04096}"), ..offer.clone() };
    talk.offers.0 = (1..=100).map(long).collect();
    let listed = names(talk.option(number::LIST, &[]));
    assert!(listed.iter().zip(1..).all(|((name, _), id)| *name == format!("{id:04096}")));
    assert_eq!(listed.len(), 100);
    talk.offers.0.clear();
    assert_eq!(names(talk.option(number::LIST, &[])), []);
}

#[test]
fn unknown_options_are_unsupported_and_skipped() {
    let mut talk = Talk::new(Security::Plain);
    for option in [0, 4, 12, u32::MAX] {
        assert_eq!(talk.error(option, b"whatever"), answer::ERR_UNSUP);
    }
    assert_eq!(talk.option(number::ABORT, b"ignored"), [(answer::ACK, vec![])]);
    assert_eq!(talk.last, Step::Close);
}

#[test]
fn options_without_data_are_refused_with_some() {
    let mut talk = Talk::new(Security::Plain);
    for option in [number::LIST, number::STRUCTURED_REPLY, number::EXTENDED_HEADERS] {
        assert_eq!(talk.error(option, &[0]), answer::ERR_INVALID);
    }
    talk.go(number::GO, "", &[]);
    let Step::Go(agreed) = talk.last else { panic!("agreed") };
    assert_eq!(agreed.style, Style::Simple, "nothing of it was agreed on");
}

#[test]
fn there_is_no_way_back_from_extended_headers() {
    let mut talk = Talk::structured();
    assert_eq!(talk.option(number::STRUCTURED_REPLY, &[]), [(answer::ACK, vec![])], "said twice");
    assert_eq!(talk.option(number::EXTENDED_HEADERS, &[]), [(answer::ACK, vec![])]);
    assert_eq!(talk.error(number::STRUCTURED_REPLY, &[]), answer::ERR_EXT_HEADER_REQD);
    assert_eq!(talk.option(number::EXTENDED_HEADERS, &[]), [(answer::ACK, vec![])], "said twice");
}

#[test]
fn contexts_are_listed_by_query() {
    let mut talk = Talk::structured();
    let one = |talk: &mut Talk, queries: &[&str]| {
        let replies = talk.contexts(number::LIST_META_CONTEXT, "ro", queries);
        let (last, contexts) = replies.split_last().expect("replies");
        assert_eq!(last, &(answer::ACK, vec![]));
        for (kind, data) in contexts {
            assert_eq!(*kind, answer::META_CONTEXT);
            assert_eq!(option::parse_context(data), Ok((0, BASE_ALLOCATION)));
        }
        contexts.len()
    };
    assert_eq!(one(&mut talk, &[]), 1, "no query: everything");
    assert_eq!(one(&mut talk, &["base:"]), 1, "the wildcard");
    assert_eq!(one(&mut talk, &["x:", "base:allocation", "base:allocation"]), 1, "once");
    assert_eq!(one(&mut talk, &["base:other", "qemu:", "qemu:dirty-bitmap:x"]), 0);
    let unknown = talk.contexts(number::LIST_META_CONTEXT, "other", &[]);
    assert_eq!(only_error(&unknown), answer::ERR_UNKNOWN);
}

/// What an export begins with after these contexts were set.
fn allocation_after(talk: &mut Talk, name: &str) -> Option<u32> {
    talk.go(number::GO, name, &[]);
    let Step::Go(agreed) = &talk.last else { panic!("agreed") };
    agreed.allocation
}

#[test]
fn contexts_belong_to_the_export_they_were_set_for() {
    let mut talk = Talk::structured();
    let replies = talk.contexts(number::SET_META_CONTEXT, "ro", &["base:", "base:allocation"]);
    assert_eq!(replies.len(), 2, "the wildcard selects nothing");
    let (id, name) = option::parse_context(&replies[0].1).expect("a context");
    assert_eq!(name, BASE_ALLOCATION);
    assert_eq!(allocation_after(&mut talk, "ro"), Some(id));

    let mut talk = Talk::structured();
    talk.contexts(number::SET_META_CONTEXT, "ro", &["base:allocation"]);
    assert_eq!(allocation_after(&mut talk, ""), None, "of another");

    for then in [&[][..], &["base:"], &["base:other"]] {
        let mut talk = Talk::structured();
        talk.contexts(number::SET_META_CONTEXT, "ro", &["base:allocation"]);
        assert_eq!(talk.contexts(number::SET_META_CONTEXT, "ro", then), [(answer::ACK, vec![])]);
        assert_eq!(allocation_after(&mut talk, "ro"), None, "replaced by {then:?}");
    }

    let mut talk = Talk::structured();
    talk.contexts(number::SET_META_CONTEXT, "ro", &["base:allocation"]);
    assert_eq!(talk.error(number::SET_META_CONTEXT, &[0]), answer::ERR_INVALID);
    assert_eq!(allocation_after(&mut talk, "ro"), None, "replaced by what failed");
}

#[test]
fn contexts_that_make_no_sense_are_refused() {
    let mut talk = Talk::new(Security::Plain);
    for option in [number::LIST_META_CONTEXT, number::SET_META_CONTEXT] {
        let early = talk.contexts(option, "ro", &["base:allocation"]);
        assert_eq!(only_error(&early), answer::ERR_INVALID, "before structured replies");
    }
    talk.option(number::EXTENDED_HEADERS, &[]);
    for option in [number::LIST_META_CONTEXT, number::SET_META_CONTEXT] {
        assert_eq!(only_error(&talk.contexts(option, "ro", &["allocation"])), answer::ERR_INVALID);
        assert_eq!(only_error(&talk.contexts(option, "other", &["base:"])), answer::ERR_UNKNOWN);
        let many = [&[0; 4][..], &u32::MAX.to_be_bytes()].concat();
        assert_eq!(talk.error(option, &many), answer::ERR_INVALID);
        assert_eq!(talk.error(option, &[0; 7]), answer::ERR_INVALID);
    }
    assert_eq!(talk.contexts(number::SET_META_CONTEXT, "ro", &["base:allocation"]).len(), 2, "and this does");
}

#[test]
fn before_tls_there_is_nothing_but_tls() {
    let mut talk = Talk::new(Security::Demanded);
    for option in
        (0..13).filter(|option| ![number::EXPORT_NAME, number::ABORT, number::STARTTLS].contains(option))
    {
        assert_eq!(talk.error(option, b""), answer::ERR_TLS_REQD, "{option}");
        assert_eq!(talk.error(option, &[0; 40_000]), answer::ERR_TLS_REQD, "{option}");
    }
    assert_eq!(talk.error(number::STARTTLS, b"x"), answer::ERR_INVALID);
    let mut bytes = Vec::new();
    put_option(&mut bytes, number::STARTTLS, b"");
    bytes.extend_from_slice(b"client hello");
    assert_eq!(talk.say(&bytes), Step::Tls(b"client hello".to_vec()), "nothing of it is taken for options");
    assert_eq!(talk.replies(number::STARTTLS), [(answer::ACK, vec![])]);

    talk.haggle.secured();
    assert_eq!(talk.error(number::STARTTLS, b""), answer::ERR_INVALID, "it is on");
    assert_eq!(talk.go(number::GO, "ro", &[]).len(), 2);

    let mut talk = Talk::new(Security::Demanded);
    assert_eq!(talk.option(number::ABORT, b""), [(answer::ACK, vec![])]);
    let mut talk = Talk::new(Security::Demanded);
    assert_eq!(talk.option(number::EXPORT_NAME, b""), []);
    assert_eq!(talk.last, Step::Close);
    let mut talk = Talk::new(Security::Plain);
    assert_eq!(talk.error(number::STARTTLS, b""), answer::ERR_POLICY, "where there is none");
}

#[test]
fn what_is_too_long_is_skipped_without_being_held() {
    let mut talk = Talk::new(Security::Plain);
    let data = vec![7; 1 << 19];
    let mut bytes = Vec::new();
    put_option(&mut bytes, number::GO, &data);
    for piece in bytes.chunks(16 << 10) {
        talk.say(piece);
        assert_eq!(talk.last, Step::Wait);
        assert!(talk.haggle.held() <= OPTION_BYTES, "{} bytes held", talk.haggle.held());
    }
    assert_eq!(only_error(&talk.replies(number::GO)), answer::ERR_TOO_BIG);
    assert_eq!(talk.go(number::GO, "ro", &[]).len(), 2, "and then it goes on");

    let mut talk = Talk::new(Security::Plain);
    let header = [&bytes[..12], &u32::MAX.to_be_bytes()].concat();
    assert_eq!(talk.say(&header), Step::Close, "nobody waits for 4 GiB");
    assert_eq!(only_error(&talk.replies(number::GO)), answer::ERR_TOO_BIG);
    let mut talk = Talk::new(Security::Plain);
    put_option(&mut talk.said, 0, &[]);
    talk.said.clear();
    assert_eq!(talk.option(number::EXPORT_NAME, &vec![b'x'; 40_000]), []);
    assert_eq!(talk.last, Step::Close);
}

#[test]
fn bytes_and_options_of_one_client_end() {
    let mut talk = Talk::new(Security::Plain);
    for _ in 0..limits::HAGGLE_OPTIONS_MAX {
        assert_eq!(talk.error(99, b""), answer::ERR_UNSUP);
    }
    assert_eq!(only_error(&talk.option(99, b"")), answer::ERR_TOO_BIG);
    assert_eq!(talk.last, Step::Close);
    assert_eq!(talk.say(b"more"), Step::Close);

    let mut talk = Talk::new(Security::Plain);
    let data = vec![0; OPTION_DATA_MAX as usize];
    let most = limits::HAGGLE_BYTES_MAX / (data.len() + OPTION_BYTES);
    for _ in 0..most {
        assert_eq!(talk.error(99, &data), answer::ERR_UNSUP);
    }
    talk.option(99, &data);
    assert_eq!(talk.last, Step::Close);
}

#[test]
fn a_wrong_magic_is_the_end() {
    let mut talk = Talk::new(Security::Plain);
    assert_eq!(talk.say(b"GET / HTTP/1.1\r\n\r\n"), Step::Close);
    assert!(talk.said.is_empty());
}

/// A small generator: the same bytes for the same seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).expect("small")
    }
}

/// Everything a client could say, in one breath.
fn everything() -> Vec<u8> {
    let mut bytes = FIXED.to_vec();
    put_option(&mut bytes, number::LIST, b"");
    put_option(&mut bytes, number::STRUCTURED_REPLY, b"");
    put_contexts(&mut bytes, number::LIST_META_CONTEXT, "ro", &["base:"]);
    put_contexts(&mut bytes, number::SET_META_CONTEXT, "ro", &["base:allocation", "qemu:x"]);
    put_option(&mut bytes, number::EXTENDED_HEADERS, b"");
    put_go(&mut bytes, number::INFO, "", &[info::NAME, info::BLOCK_SIZE]);
    put_option(&mut bytes, number::STARTTLS, b"");
    put_go(&mut bytes, number::GO, "ro", &[info::DESCRIPTION]);
    bytes.extend_from_slice(b"a request");
    bytes
}

/// A client's bytes, in these pieces: whatever they are, it ends, and little is held.
fn endure(security: Security, bytes: &[u8], mut piece: impl FnMut() -> usize) -> Step {
    let offers = Offers::some();
    let mut out = Vec::new();
    let mut haggle = Haggle::greet(security, &mut out);
    let mut rest = bytes;
    loop {
        let mut step = Step::Again;
        // Each step takes an option, goes on with a list or comes to a state of its own.
        for _ in 0..bytes.len() + 8 {
            out.clear();
            step = haggle.step(&offers, &mut out);
            assert!(out.len() <= OUT_MAX);
            if step != Step::Again {
                break;
            }
        }
        match step {
            Step::Wait if rest.is_empty() => return Step::Wait,
            Step::Wait => {
                let (now, later) = rest.split_at(piece().clamp(1, rest.len()));
                haggle.feed(now);
                assert!(haggle.held() <= OPTION_BYTES + OPTION_DATA_MAX as usize + now.len());
                rest = later;
            }
            Step::Again => panic!("it goes on for ever"),
            Step::Tls(behind) => {
                haggle.secured();
                haggle.feed(&behind);
            }
            other => return other,
        }
    }
}

#[test]
fn pieces_make_no_difference() {
    let bytes = everything();
    for security in [Security::Plain, Security::Demanded] {
        let style = if security == Security::Plain { Style::Extended } else { Style::Simple };
        for length in 1..=bytes.len() {
            let Step::Go(agreed) = endure(security, &bytes, || length) else { panic!("agreed") };
            assert_eq!((agreed.id, agreed.style), (5, style));
            assert_eq!(agreed.allocation.is_some(), security == Security::Plain, "forgotten with TLS");
            assert!(b"a request".starts_with(&agreed.early));
        }
        (0..bytes.len() - 40).for_each(|cut| assert_eq!(endure(security, &bytes[..cut], || 7), Step::Wait));
    }
}

#[test]
fn hostile_bytes_end_without_harm() {
    let whole = everything();
    for seed in 1..=100_000u64 {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let mut bytes = whole.clone();
        for _ in 0..=random.below(4) {
            let at = random.below(bytes.len());
            match random.below(4) {
                0 => bytes[at] ^= 1 << random.below(8),
                1 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random.below(5)],
                2 => bytes.truncate(at.max(1)),
                _ => {
                    let from = random.below(bytes.len());
                    let copy = bytes[from..].to_vec();
                    bytes.truncate(at.max(1));
                    bytes.extend_from_slice(&copy);
                }
            }
        }
        let security = if random.below(2) == 0 { Security::Plain } else { Security::Demanded };
        let most = [1, 16, 64, 4096][random.below(4)];
        endure(security, &bytes, || 1 + random.below(most));
    }
}
