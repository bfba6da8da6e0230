//! What may be said to a server, right and wrong, byte by byte: no library stands between. A wrong request is refused and the connection
//! goes on, or it ends where what follows cannot be understood; the volume does not change, and others do not notice.
//!
//! Where qemu-nbd or nbdkit do what the protocol leaves open, the test says so.

use engine::format::nbd::errors::{EINVAL, ENOSPC, ENOTSUP, EOVERFLOW, EPERM};
use engine::format::nbd::option::{answer, number};
use engine::format::nbd::reply::Style;
use engine::format::nbd::request::{Command, EXTENDED_BYTES, Request};
use engine::format::nbd::{BASE_ALLOCATION, OPTION_MAGIC, command_flags, flags};
use tests::nbd::client::{Connection, Haggling, Wish, asking, contexts, string};
use tests::nbd::{Kind, Served, and_references, same};

const MIB: usize = 1 << 20;
const SIZE: u64 = 5 << 20;
/// The same, as a length in memory.
const SIZE_BYTES: usize = 5 << 20;

/// The styles this kind of server speaks.
fn styles(kind: Kind) -> Vec<Style> {
    let mut styles = vec![Style::Simple, Style::Structured];
    if kind.is_ours() {
        styles.push(Style::Extended);
    }
    styles
}

fn option_bytes(number: u32, length: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&number.to_be_bytes());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// After all of it this client gets through.
fn works(served: &Served) {
    let mut connection = served.connect();
    same(&connection.read(0, 4096), &served.plain[..4096], "afterwards");
    connection.leave();
}

#[test]
fn wrong_options_are_refused_and_haggling_goes_on() {
    for kind in and_references(&[Kind::LUKS2]) {
        let mut served = Served::over_noise(kind, MIB);
        let mut haggling = Haggling::begin(&served.socket()).expect("connected");
        let cut = |data: Vec<u8>| data[..data.len() - 1].to_vec();
        let lying = {
            let mut data = 0xffff_fff0_u32.to_be_bytes().to_vec();
            data.extend_from_slice(b"name\0\0");
            data
        };
        // A name of more than 4096 bytes is too long, whatever else is right.
        let long = "n".repeat(4097);
        let wrong = [
            ("unknown option", 0x1234, vec![], answer::ERR_UNSUP),
            ("unknown option with data", 0xffff_ffff, vec![7; 1000], answer::ERR_UNSUP),
            ("LIST with data", number::LIST, vec![0; 4], answer::ERR_INVALID),
            ("STRUCTURED_REPLY with data", number::STRUCTURED_REPLY, vec![0; 4], answer::ERR_INVALID),
            ("INFO without data", number::INFO, vec![], answer::ERR_INVALID),
            ("INFO cut", number::INFO, cut(asking("", &[3])), answer::ERR_INVALID),
            ("INFO with a name behind its end", number::INFO, lying.clone(), answer::ERR_INVALID),
            (
                "contexts before structured replies",
                number::SET_META_CONTEXT,
                contexts("", &[BASE_ALLOCATION]),
                answer::ERR_INVALID,
            ),
            ("INFO of a long name", number::INFO, asking(&long, &[]), answer::ERR_INVALID),
        ];
        for (words, option, data, expected) in wrong {
            let verdict = haggling.verdict(option, &data).expect("answered");
            let too_big =
                words.contains("long") && [answer::ERR_TOO_BIG, answer::ERR_UNKNOWN].contains(&verdict);
            assert!(verdict == expected || too_big, "{kind:?}: {words}: {verdict:#x}");
        }
        let tls = haggling.verdict(number::STARTTLS, &[]).expect("answered");
        assert!([answer::ERR_UNSUP, answer::ERR_POLICY].contains(&tls), "{kind:?}: {tls:#x}");
        assert_eq!(haggling.verdict(number::STRUCTURED_REPLY, &[]).expect("answered"), answer::ACK);
        for (words, data) in [
            ("no data", vec![]),
            ("lying", lying),
            ("cut", cut(contexts("", &[BASE_ALLOCATION]))),
            ("too many queries", {
                let mut data = string("");
                data.extend_from_slice(&u32::MAX.to_be_bytes());
                data
            }),
        ] {
            for option in [number::SET_META_CONTEXT, number::LIST_META_CONTEXT] {
                let verdict = haggling.verdict(option, &data).expect("answered");
                assert_eq!(verdict, answer::ERR_INVALID, "{kind:?}: {option}: {words}");
            }
        }
        // Still there, and still polite.
        let contexts = haggling.ask(number::LIST_META_CONTEXT, &contexts("", &[])).expect("answered");
        assert!(
            contexts
                .iter()
                .any(|(kind, data)| *kind == answer::META_CONTEXT
                    && data.ends_with(BASE_ALLOCATION.as_bytes()))
        );
        assert_eq!(haggling.verdict(number::ABORT, &[]).expect("answered"), answer::ACK);
        haggling.wire.ends();
        works(&served);
        served.stop();
        served.holds(&served.plain);
    }
}

#[test]
fn what_cannot_be_understood_ends_haggling() {
    for kind in and_references(&[Kind::LUKS2]) {
        let mut served = Served::over_noise(kind, MIB);
        let unknown_flags = {
            let mut haggling = Haggling::connect(&served.socket()).expect("connected");
            haggling.send(&0x8000_0003_u32.to_be_bytes()).expect("sent");
            haggling
        };
        let no_magic = {
            let mut haggling = Haggling::begin(&served.socket()).expect("connected");
            haggling.send(&[0x55; 16]).expect("sent");
            haggling
        };
        let http = {
            let mut haggling = Haggling::connect(&served.socket()).expect("connected");
            haggling.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").expect("sent");
            haggling
        };
        for mut haggling in [unknown_flags, no_magic, http] {
            haggling.wire.ends();
        }
        works(&served);
        served.stop();
    }
}

#[test]
fn an_option_of_any_length_is_skipped_or_ends_it() {
    for kind in and_references(&[Kind::LUKS2]) {
        let mut served = Served::over_noise(kind, MIB);
        for length in [1 << 16, 1 << 20, 32 << 20, u32::MAX] {
            let mut haggling = Haggling::begin(&served.socket()).expect("connected");
            haggling.send(&option_bytes(number::INFO, length, &[0; 100])).expect("sent");
            // As much as the server takes; it may hang up or wait, but not for ever, and it must not answer that it was good.
            let sent = haggling.send(&vec![0; 2 << 20]);
            if sent.is_ok() && u64::from(length) < 2 << 20 {
                match haggling.reply(number::INFO) {
                    Ok((kind, _)) => assert!(kind & answer::ERROR_BIT != 0, "{length}: {kind:#x}"),
                    Err(error) => {
                        assert!(error.kind() != std::io::ErrorKind::TimedOut, "neither refused nor ended")
                    }
                }
            }
        }
        works(&served);
        served.stop();
    }
}

#[test]
fn the_old_way_into_transmission_works() {
    for kind in and_references(&[Kind::LUKS2]) {
        let mut served = Served::over_noise(kind, MIB);
        for no_zeroes in [false, true] {
            let mut haggling = Haggling::connect(&served.socket()).expect("connected");
            haggling.send(&(1 | u32::from(no_zeroes) << 1).to_be_bytes()).expect("sent");
            haggling.option(number::EXPORT_NAME, b"").expect("sent");
            let mut answer = vec![0; if no_zeroes { 10 } else { 134 }];
            haggling.wire.take(&mut answer).expect("size and flags");
            assert_eq!(answer[..8], (MIB as u64).to_be_bytes());
            assert!(u16::from_be_bytes([answer[8], answer[9]]) & flags::HAS_FLAGS != 0);
            assert!(answer[10..].iter().all(|byte| *byte == 0));
            let request = Request { command: Command::Read, flags: 0, cookie: 9, offset: 100, length: 1000 };
            let mut bytes = [0; EXTENDED_BYTES];
            let len = request.put(&mut bytes, false);
            haggling.send(&bytes[..len]).expect("sent");
            let mut reply = [0; 1016];
            haggling.wire.take(&mut reply).expect("a simple reply");
            same(&reply[16..], &served.plain[100..1100], "the old way");
        }
        if kind != Kind::Nbdkit {
            let mut haggling = Haggling::begin(&served.socket()).expect("connected");
            haggling.option(number::EXPORT_NAME, b"no such export").expect("sent");
            haggling.wire.ends();
        }
        works(&served);
        served.stop();
    }
}

#[test]
fn how_bytes_are_cut_into_packets_does_not_matter() {
    for kind in and_references(&[Kind::LUKS2, Kind::Raw(512)]) {
        let mut served = Served::over_noise(kind, MIB);
        let mut model = served.plain.clone();
        // Single bytes: a whole session.
        let mut bytes = 3_u32.to_be_bytes().to_vec();
        let go = asking("", &[]);
        bytes.extend(option_bytes(number::GO, u32::try_from(go.len()).expect("short"), &go));
        let put = |bytes: &mut Vec<u8>, command, cookie, offset, data: &[u8], length: usize| {
            let mut head = [0; EXTENDED_BYTES];
            let request = Request { command, flags: 0, cookie, offset, length: length as u64 };
            let len = request.put(&mut head, false);
            bytes.extend_from_slice(&head[..len]);
            bytes.extend_from_slice(data);
        };
        put(&mut bytes, Command::Write, 1, 4000, &[0xaa; 300], 300);
        put(&mut bytes, Command::Flush, 2, 0, &[], 0);
        model[4000..4300].fill(0xaa);
        let mut haggling = Haggling::connect(&served.socket()).expect("connected");
        for byte in &bytes {
            haggling.send(&[*byte]).expect("sent");
        }
        while haggling.reply(number::GO).expect("answered").0 != answer::ACK {}
        let mut replies = [[0; 16]; 2];
        replies.iter_mut().for_each(|reply| haggling.wire.take(reply).expect("a simple reply"));
        assert!(replies.iter().all(|reply| reply[4..8] == [0; 4]), "{replies:x?}");

        drop(haggling);

        // All at once: greeting, option, and the first requests in one piece.
        let mut haggling = Haggling::connect(&served.socket()).expect("connected");
        let mut bytes = bytes[..bytes.len() - 28 - 328].to_vec();
        for n in 0..40_u8 {
            let at = 10_000 + usize::from(n) * 1000;
            put(&mut bytes, Command::Write, n.into(), at as u64, &[n; 1000], 1000);
            model[at..at + 1000].fill(n);
        }
        haggling.send(&bytes).expect("sent");
        while haggling.reply(number::GO).expect("answered").0 != answer::ACK {}
        for _ in 0..40 {
            let mut reply = [0; 16];
            haggling.wire.take(&mut reply).expect("a simple reply");
            assert_eq!(reply[4..8], [0; 4]);
        }
        drop(haggling);
        served.stop();
        served.holds(&model);
    }
}

/// Requests that are wrong in themselves: what, flags, offset, length, and the errors there may be. `loose`: others do it, or name another
/// error.
fn wrong_requests(style: Style) -> Vec<(Command, u16, u64, u64, Vec<u32>, bool)> {
    use Command::{BlockStatus, Cache, Flush, Read, Trim, Unknown, WriteZeroes};
    let mut list = vec![
        (Read, 0, SIZE, 1, vec![EINVAL], false),
        (Read, 0, SIZE - 1, 2, vec![EINVAL], false),
        (Read, 0, u64::MAX, 1, vec![EINVAL], false),
        (Read, 0, u64::MAX - 4095, 4096, vec![EINVAL], false),
        (Read, 0, 1 << 63, 4096, vec![EINVAL], false),
        (WriteZeroes, 0, SIZE - 4095, 4096, vec![ENOSPC], true),
        (WriteZeroes, 0, u64::MAX, 4096, vec![ENOSPC], true),
        (Trim, 0, SIZE - 4095, 4096, vec![EINVAL], false),
        (Trim, 0, u64::MAX - 1, 4096, vec![EINVAL], false),
        (Cache, 0, SIZE, 4096, vec![EINVAL], false),
        (Read, 1 << 12, 0, 4096, vec![EINVAL], false),
        (Trim, 1 << 12, 0, 4096, vec![EINVAL], false),
        (Flush, 1 << 12, 0, 0, vec![EINVAL], true),
        (Unknown(8), 0, 0, 0, vec![EINVAL], false),
        (Unknown(0xffff), 0, 0, 4096, vec![EINVAL], false),
    ];
    if style == Style::Simple {
        list.push((BlockStatus, 0, 0, 4096, vec![EINVAL], false));
    } else {
        list.push((BlockStatus, 0, SIZE, 4096, vec![EINVAL], false));
        list.push((BlockStatus, 0, u64::MAX, 1, vec![EINVAL], false));
        list.push((BlockStatus, 1 << 12, 0, 4096, vec![EINVAL], false));
    }
    if style == Style::Extended {
        list.push((Read, 0, 0, 1 << 40, vec![EINVAL, EOVERFLOW], false));
        list.push((WriteZeroes, 0, 4096, u64::MAX, vec![ENOSPC], false));
        list.push((Trim, 0, 4096, u64::MAX - 4095, vec![EINVAL], false));
        list.push((BlockStatus, 0, 1, u64::MAX, vec![EINVAL], false));
    }
    list
}

#[test]
fn wrong_requests_are_refused_and_the_connection_goes_on() {
    for kind in and_references(&Kind::OURS) {
        let mut served = Served::over_noise(kind, SIZE_BYTES);
        for style in styles(kind) {
            let mut connection = Connection::open(&served.socket(), &Wish::of(style)).expect("connected");
            for (command, flags, offset, length, errors, loose) in wrong_requests(style) {
                // nbdkit hangs up on unknown commands, and does more than it is asked to.
                if kind == Kind::Nbdkit && matches!(command, Command::Unknown(_)) {
                    continue;
                }
                let about = format!("{kind:?} {style:?}: {command:?} {flags:#x} {offset}+{length}");
                let error = connection.error(command, flags, offset, length);
                let ours = kind.is_ours() || !loose;
                assert!(
                    if ours { errors.contains(&error) } else { error != 0 || flags != 0 },
                    "{about}: {error}"
                );
                same(&connection.read(0, 512), &served.plain[..512], &about);
            }
            connection.leave();
        }
        served.stop();
        served.holds(&served.plain);
    }
}

#[test]
fn a_refused_write_takes_its_payload_with_it() {
    for kind in and_references(&[Kind::LUKS2, Kind::Raw(512)]) {
        let mut served = Served::over_noise(kind, SIZE_BYTES);
        for style in styles(kind) {
            let mut connection = Connection::open(&served.socket(), &Wish::of(style)).expect("connected");
            let payload = vec![0x5a; 2 * MIB];
            for (offset, length, flags) in [
                (SIZE - 1, 2, 0),
                (SIZE, 100_000, 0),
                (u64::MAX, 4096, 0),
                (u64::MAX - 4095, 2 * MIB, 0),
                (0, 4096, 1 << 12),
            ] {
                // Others as well, before and behind it.
                let before = connection.send(Command::Read, 0, 0, 512, &[]).expect("sent");
                let wrong = connection
                    .send(Command::Write, flags, offset, length as u64, &payload[..length])
                    .expect("sent");
                let behind = connection.send(Command::Read, 0, 512, 512, &[]).expect("sent");
                let mut answers = std::collections::BTreeMap::new();
                while connection.outstanding() > 0 {
                    let (cookie, answer) = connection.receive().expect("answered");
                    answers.insert(cookie, answer);
                }
                same(&answers[&before].data, &served.plain[..512], "before");
                same(&answers[&behind].data, &served.plain[512..1024], "behind");
                let error = answers[&wrong].error;
                let expected = if flags == 0 { ENOSPC } else { EINVAL };
                assert!(
                    error == expected || !kind.is_ours() && error == EINVAL,
                    "{kind:?} {style:?} {offset}+{length}: {error}"
                );
            }
            connection.leave();
        }
        served.stop();
        served.holds(&served.plain);
    }
}

#[test]
fn a_write_of_gigabytes_ends_the_connection_or_is_refused_and_allocates_nothing() {
    for kind in and_references(&[Kind::LUKS2]) {
        let mut served = Served::over_noise(kind, SIZE_BYTES);
        let mut lengths = vec![(Style::Structured, u64::from(u32::MAX)), (Style::Simple, 0x8000_0000)];
        if kind.is_ours() {
            lengths.extend([(Style::Extended, 1 << 32), (Style::Extended, u64::MAX)]);
        }
        let before = served.resident();
        for (style, length) in lengths {
            let mut connection = Connection::open(&served.socket(), &Wish::of(style)).expect("connected");
            let _ = connection.send(Command::Write, 0, 0, length, &[1; 4096]).expect("sent");
            match connection.receive() {
                Ok((_, answer)) => assert!(answer.error != 0),
                Err(error) => assert!(
                    error.kind() != std::io::ErrorKind::TimedOut,
                    "{kind:?}: neither refused nor ended"
                ),
            }
        }
        // qemu-nbd takes its buffers one by one; ours are there from the beginning.
        assert!(served.resident() < before + 64 * MIB, "{before} bytes before, {} now", served.resident());
        works(&served);
        served.stop();
        served.holds(&served.plain);
    }
}

#[test]
fn a_write_with_extended_headers_that_does_not_say_so_is_one() {
    // QEMU's client sends such ones, and its server takes them.
    for kind in and_references(&[Kind::LUKS2]) {
        if kind == Kind::Nbdkit {
            continue;
        }
        let mut served = Served::over_noise(kind, MIB);
        let mut connection = match Connection::open(&served.socket(), &Wish::of(Style::Extended)) {
            Ok(connection) => connection,
            Err(error) if !kind.is_ours() => return tests::skip(&format!("qemu-nbd is too old: {error}")),
            Err(error) => panic!("{error}"),
        };
        let request = Request { command: Command::Write, flags: 0, cookie: 1, offset: 4000, length: 500 };
        let mut bytes = [0x77; EXTENDED_BYTES + 500];
        let _ = request.put(&mut bytes, true);
        connection.raw(&bytes).expect("sent");
        let mut reply = [0; 32];
        connection.wire.take(&mut reply).expect("answered");
        assert_eq!(reply[6..8], [0; 2], "not a chunk of type NONE");
        same(&connection.read(4000, 500), &[0x77; 500], "written");
        connection.leave();
        let mut expected = served.plain.clone();
        expected[4000..4500].fill(0x77);
        served.stop();
        served.holds(&expected);
    }
}

#[test]
fn a_wrong_magic_ends_the_connection() {
    // nbdkit does so too; qemu-nbd answers what it did not understand.
    for kind in [Kind::LUKS2] {
        let mut served = Served::over_noise(kind, MIB);
        for style in styles(kind) {
            let mut connection = Connection::open(&served.socket(), &Wish::of(style)).expect("connected");
            same(&connection.read(0, 4096), &served.plain[..4096], "before");
            let request = Request { command: Command::Read, flags: 0, cookie: 77, offset: 0, length: 512 };
            // What is right on other connections.
            let mut bytes = [0; 64];
            let _ = request.put(&mut bytes, style != Style::Extended);
            connection.raw(&bytes).expect("sent");
            connection.wire.ends();
        }
        works(&served);
        served.stop();
    }
}

#[test]
fn the_longest_read_and_write_are_of_32_mib() {
    const LONGEST: usize = 32 * MIB;
    for kind in and_references(&[Kind::LUKS2, Kind::Luks(tests::luks::Shape::luks1(512))]) {
        let mut served = Served::over_noise(kind, LONGEST + 3 * 4096);
        for style in styles(kind) {
            let mut connection = Connection::open(&served.socket(), &Wish::of(style)).expect("connected");
            same(&connection.read(1, LONGEST), &served.plain[1..=LONGEST], "the longest read");
            // nbdkit takes 64 MiB.
            if kind.is_ours() {
                assert_eq!(connection.error(Command::Read, 0, 0, LONGEST as u64 + 1), EINVAL);
            }
        }
        let mut model = served.plain.clone();
        let mut connection = served.connect();
        model[77..77 + LONGEST].reverse();
        assert_eq!(connection.write(command_flags::FUA, 77, &model[77..77 + LONGEST]), 0);
        same(&connection.read(4096, LONGEST), &model[4096..4096 + LONGEST], "the longest write");
        connection.leave();
        served.stop();
        served.holds(&model);
    }
}

#[test]
fn commands_leave_only_what_they_say() {
    for kind in and_references(&Kind::OURS) {
        let mut served = Served::over_noise(kind, SIZE_BYTES);
        let mut model = served.plain.clone();
        for (n, style) in styles(kind).into_iter().enumerate() {
            let mut connection = Connection::open(&served.socket(), &Wish::of(style)).expect("connected");
            let base = n * MIB;
            // Zeros over the borders of data units, alone and over many of them.
            for (at, length, flags) in [
                (base + 1, 1, 0),
                (base + 4095, 2, 0),
                (base + 10_000, 30_000, command_flags::NO_HOLE),
                (base + 65_536, 131_072, command_flags::FUA),
                (base + 300_001, 600_001, 0),
            ] {
                assert_eq!(connection.error(Command::WriteZeroes, flags, at as u64, length as u64), 0);
                model[at..at + length].fill(0);
            }
            same(&connection.read(base as u64, MIB), &model[base..base + MIB], "zeros");
            assert_eq!(connection.error(Command::Flush, 0, 0, 0), 0);
            assert_eq!(connection.error(Command::Cache, 0, base as u64 + 5, 100_000), 0);
            if kind.is_ours() {
                let fast =
                    connection.error(Command::WriteZeroes, command_flags::FAST_ZERO, base as u64, 4096);
                assert_eq!(fast, ENOTSUP);
            }
            same(&connection.read(base as u64, MIB), &model[base..base + MIB], "nothing more");
            connection.leave();
        }
        // Without leave to discard, TRIM changes nothing at all in ours.
        let mut connection = served.connect();
        assert_eq!(connection.error(Command::Trim, 0, 4 << 20, 65_536), 0);
        if kind.is_ours() {
            same(&connection.read(4 << 20, 65_536), &model[4 << 20..][..65_536], "TRIM");
        }
        connection.write(0, 4 << 20, &model[4 << 20..][..65_536]);
        connection.leave();
        served.stop();
        served.holds(&model);
    }
}

#[test]
fn with_discard_only_whole_places_are_given_back() {
    use std::os::unix::fs::MetadataExt;
    for kind in and_references(&[Kind::LUKS2, Kind::Raw(512)]) {
        let mut served = Served::with(kind, SIZE_BYTES, if kind.is_ours() { "--discard" } else { "" });
        let blocks =
            |served: &Served| std::fs::metadata(served.place.path("volume")).expect("there").blocks();
        let before = blocks(&served);
        let mut connection = served.connect();
        assert_eq!(connection.error(Command::Trim, 0, 1 << 20, 2 << 20), 0);
        assert_eq!(connection.error(Command::Flush, 0, 0, 0), 0);
        assert!(blocks(&served) < before, "{kind:?}: nothing was given back");
        // Its neighbours are as they were, also where a trim begins and ends anywhere.
        assert_eq!(connection.error(Command::Trim, 0, (4 << 20) + 1, 65_000), 0);
        same(&connection.read(0, MIB), &served.plain[..MIB], "before");
        let behind = 3 * MIB..4 * MIB + 1;
        same(&connection.read(3 << 20, MIB + 1), &served.plain[behind], "behind");
        let end = 4 * MIB + 65_001;
        same(&connection.read(end as u64, 5 * MIB - end), &served.plain[end..], "behind the crooked one");
        // Zeros that may become holes read as zeros nevertheless.
        assert_eq!(connection.error(Command::WriteZeroes, 0, 0, 65_536), 0);
        same(&connection.read(0, 65_536), &[0; 65_536], "zeros with discard");
        connection.leave();
        served.stop();
    }
}

#[test]
fn extents_longer_than_32_bits_are_told_right() {
    const LONG: u64 = (5 << 30) + 4096;
    for kind in and_references(&[Kind::Raw(4096), Kind::Raw(512)]) {
        let mut served = Served::prepared(kind, MIB, "");
        let file = std::fs::OpenOptions::new().write(true).open(served.place.path("volume")).expect("opens");
        file.set_len(LONG).expect("sparse");
        served.start();
        for style in styles(kind).into_iter().skip(1) {
            let mut connection = Connection::open(&served.socket(), &Wish::of(style)).expect("connected");
            assert_eq!(connection.bytes, LONG);
            let mut at = 0;
            let mut rounds = 0;
            while at < LONG {
                let most =
                    if style == Style::Extended { LONG - at } else { (LONG - at).min(u32::MAX.into()) };
                let answer = connection.call(Command::BlockStatus, 0, at, most).expect("answered");
                assert_eq!(answer.error, 0);
                for (bytes, flags) in answer.extents {
                    // Encrypted, a hole is noise.
                    assert!(!kind.is_ours() || flags & 2 == 0, "{kind:?}: a hole is called zero at {at}");
                    at += bytes;
                }
                rounds += 1;
                assert!(rounds < 10_000, "extents of a few bytes");
            }
            assert_eq!(at, LONG, "extents behind the end");
            // Behind 4 GiB a write is where it belongs.
            let data = [n_of(style); 5000];
            assert_eq!(connection.write(0, (4 << 30) + 4000, &data), 0);
            same(&connection.read((4 << 30) + 4000, 5000), &data, "behind 4 GiB");
            same(&connection.read(0, MIB), &served.plain, "not at its place modulo 4 GiB");
            connection.leave();
        }
        served.stop();
    }
}

fn n_of(style: Style) -> u8 {
    match style {
        Style::Simple => 1,
        Style::Structured => 2,
        Style::Extended => 3,
    }
}

#[test]
fn a_read_only_export_refuses_every_change() {
    for kind in and_references(&[Kind::LUKS2]) {
        let mut served =
            Served::with(kind, MIB, if kind == Kind::Nbdkit { "--readonly" } else { "--read-only" });
        for style in styles(kind) {
            let mut connection = Connection::open(&served.socket(), &Wish::of(style)).expect("connected");
            assert!(connection.flags & flags::READ_ONLY != 0);
            let error = connection.write(0, 0, &[1; 4096]);
            assert!(error == EPERM || !kind.is_ours() && error != 0, "{kind:?}: {error}");
            for command in [Command::WriteZeroes, Command::Trim] {
                let error = connection.error(command, 0, 0, 4096);
                // qemu-nbd has none of them then.
                assert!(
                    error == EPERM || !kind.is_ours() && error != 0,
                    "{kind:?}: {command:?} gave {error}"
                );
            }
            same(&connection.read(0, MIB), &served.plain, "read only");
            connection.leave();
        }
        served.stop();
        served.holds(&served.plain);
    }
}
