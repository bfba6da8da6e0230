//! The transmission phase of the NBD server, spoken to byte by byte over socket pairs, on real files.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use engine::error::ErrorKind;
use engine::export::exported::Course;
use engine::format::nbd::errors::{EINVAL, EIO, ENOSPC, ENOTSUP, EPERM};
use engine::format::nbd::reply::Style;
use engine::format::nbd::request::Command;
use engine::pipeline::QueueChoice;
use tests::Random;
use tests::served::{PATIENCE, Rig, Setup, Wire};

const STYLES: [Style; 3] = [Style::Simple, Style::Structured, Style::Extended];
const FUA: u16 = 1;
const DF: u16 = 1 << 2;
const REQ_ONE: u16 = 1 << 3;
const FAST_ZERO: u16 = 1 << 4;

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    Random::new(seed).fill(&mut bytes);
    bytes
}

#[test]
fn what_is_written_is_read_back_in_every_style_at_any_offset() {
    for queue in [QueueChoice::Auto, QueueChoice::Threads] {
        for direct in [false, true] {
            let rig = Rig::new(Setup { queue, direct, ..Setup::default() });
            for style in STYLES {
                let mut wire = rig.client(style);
                let mut model = wire.read(0, 8 << 20);
                let places: [(u64, usize); 12] = [
                    (0, 4096),
                    (8192, 65_536),
                    (1, 1),
                    (4095, 2),
                    (5000, 100),
                    (12_345, 300_000),
                    (4096, 1 << 20),
                    (100_000, 2_000_001),
                    ((8 << 20) - 1, 1),
                    ((8 << 20) - 5000, 5000),
                    (1 << 20, 512),
                    (4096 * 33 + 512, 4096),
                ];
                for (seed, (offset, length)) in (1..).zip(places) {
                    let bytes = noise(seed, length);
                    let answer = wire.write(0, offset, &bytes);
                    assert_eq!(answer.error, 0, "{style:?} {offset} {length}: {}", answer.text);
                    let at = usize::try_from(offset).expect("small");
                    model[at..at + length].copy_from_slice(&bytes);
                    assert!(wire.read(offset, length) == bytes, "{style:?} {length} at {offset}");
                }
                assert!(wire.read(0, 8 << 20) == model, "{style:?}: neighbours have changed");
                assert!(rig.plaintext(0, 8 << 20) == model, "{style:?}: the device holds something else");
                assert_eq!(wire.call(Command::Flush, 0, 0, 0).error, 0);
            }
        }
    }
}

#[test]
fn many_requests_in_flight_are_all_answered_and_match_a_model() {
    const BLOCKS: usize = 512;
    for (style, direct) in [(Style::Simple, false), (Style::Structured, true), (Style::Extended, false)] {
        let rig = Rig::new(Setup { total: (BLOCKS * 4096) as u64, direct, ..Setup::default() });
        let mut wire = rig.client(style);
        let mut model = wire.read(0, BLOCKS * 4096);
        let mut random = Random::new(77);
        let mut busy = vec![false; BLOCKS];
        // What each request under way is: first block, blocks, and of a read what it shall give.
        let mut flight: Vec<(u64, usize, usize, Option<Vec<u8>>)> = Vec::new();
        for _ in 0..3000 {
            if flight.len() >= 48 || (!flight.is_empty() && random.below(4) == 0) {
                finish_one(&mut wire, &mut flight, &mut busy);
            }
            let block = random.below(BLOCKS - 8);
            let blocks = 1 + random.below(8);
            if busy[block..block + blocks].iter().any(|&busy| busy) {
                continue;
            }
            busy[block..block + blocks].fill(true);
            let skip = random.below(3) * 100;
            let (from, to) = (block * 4096 + skip, (block + blocks) * 4096 - random.below(3) * 77);
            if random.below(2) == 0 {
                let bytes = noise(random.next_u64(), to - from);
                model[from..to].copy_from_slice(&bytes);
                let cookie = wire.ask_write(0, from as u64, &bytes);
                flight.push((cookie, block, blocks, None));
            } else {
                let cookie = wire.ask(Command::Read, 0, from as u64, (to - from) as u64);
                flight.push((cookie, block, blocks, Some(model[from..to].to_vec())));
            }
        }
        while !flight.is_empty() {
            finish_one(&mut wire, &mut flight, &mut busy);
        }
        assert!(wire.read(0, BLOCKS * 4096) == model);
        assert!(rig.plaintext(0, BLOCKS * 4096) == model);
    }
}

fn finish_one(wire: &mut Wire, flight: &mut Vec<(u64, usize, usize, Option<Vec<u8>>)>, busy: &mut [bool]) {
    let answer = wire.answer().expect("an answer");
    let at = flight.iter().position(|one| one.0 == answer.cookie).expect("asked for");
    let (_, block, blocks, expected) = flight.swap_remove(at);
    assert_eq!(answer.error, 0, "{}", answer.text);
    if let Some(expected) = expected {
        assert!(answer.data == expected, "block {block}");
    }
    busy[block..block + blocks].fill(false);
}

#[test]
fn every_command_that_makes_no_sense_is_refused_and_the_connection_goes_on() {
    for style in STYLES {
        let rig = Rig::new(Setup { total: 1 << 20, ..Setup::default() });
        let mut wire = rig.client(style);
        let total = 1 << 20;
        let read_flag = if style == Style::Simple { DF } else { REQ_ONE };
        let status = if style == Style::Simple { EINVAL } else { 0 };
        let cases = [
            (Command::Read, 0, total, 1, EINVAL),
            (Command::Read, 0, u64::MAX, 1, EINVAL),
            (Command::Read, 0, total - 1, 2, EINVAL),
            (Command::Read, 0, 0, 0, EINVAL),
            (Command::Read, 0, 0, (32 << 20) + 1, EINVAL),
            (Command::Read, read_flag, 0, 512, EINVAL),
            (Command::Read, FUA, 0, 512, 0),
            (Command::Read, 1 << 9, 0, 512, EINVAL),
            (Command::Trim, 0, total, 4096, EINVAL),
            (Command::Trim, REQ_ONE, 0, 4096, EINVAL),
            (Command::Trim, FUA, 0, 4096, 0),
            (Command::Trim, 0, 0, 0, EINVAL),
            (Command::WriteZeroes, 0, total - 1, 4096, ENOSPC),
            (Command::WriteZeroes, 0, u64::MAX - 1, 1 << 31, ENOSPC),
            (Command::WriteZeroes, FAST_ZERO, 0, 4096, ENOTSUP),
            (Command::WriteZeroes, DF, 0, 4096, EINVAL),
            (Command::Flush, 0, 0, 0, 0),
            (Command::Flush, FUA, 0, 0, 0),
            (Command::Flush, 0, 4096, 0, EINVAL),
            (Command::Flush, 0, 0, 1, EINVAL),
            (Command::Flush, DF, 0, 0, EINVAL),
            (Command::Cache, 0, 0, 1 << 20, 0),
            (Command::Cache, 0, 1, 1 << 20, EINVAL),
            (Command::BlockStatus, 0, 0, 4096, status),
            (Command::BlockStatus, 0, total, 1, EINVAL),
            (Command::BlockStatus, 0, 0, 0, EINVAL),
            (Command::Unknown(8), 0, 0, 0, EINVAL),
            (Command::Unknown(0xffff), 0, 0, 512, EINVAL),
        ];
        let mut refused = 0;
        for (command, flags, offset, length, expected) in cases {
            let answer = wire.call(command, flags, offset, length);
            assert_eq!(answer.error, expected, "{style:?} {command:?} {flags} {offset} {length}");
            assert_eq!(expected != 0 && style != Style::Simple, !answer.text.is_empty(), "{answer:?}");
            refused += u64::from(expected != 0);
        }
        // Payloads of writes that are refused are not taken for requests.
        let beyond = vec![0x25; 100_000];
        assert_eq!(wire.write(0, total - 4096, &beyond).error, ENOSPC);
        assert_eq!(wire.write(1 << 10, 0, &beyond).error, EINVAL);
        assert_eq!(wire.write(0, 0, &[]).error, EINVAL);
        assert_eq!(wire.write(0, 0, &vec![9; (32 << 20) + 1]).error, ENOSPC);
        assert!(wire.read(0, 1 << 20) == rig.plaintext(0, 1 << 20));
        assert_eq!(rig.export.counters.errors.load(Ordering::Relaxed), refused + 4);
    }
}

#[test]
fn an_extended_payload_is_taken_off_the_wire_announced_or_not() {
    let rig = Rig::new(Setup::default());
    let mut wire = rig.client(Style::Extended);
    // QEMU's client sends the payload of a write without the flag that announces it.
    let (cookie, mut bytes) = wire.bytes(Command::Write, 0, 0, 512);
    bytes[5] = 0;
    bytes.extend_from_slice(&[0x11; 512]);
    wire.socket.write_all(&bytes).expect("sent");
    let answer = wire.answer().expect("an answer");
    assert_eq!((answer.cookie, answer.error), (cookie, 0));
    assert_eq!(wire.read(0, 512), [0x11; 512]);
    // A payload where none belongs is taken, and refused.
    let (cookie, mut bytes) = wire.bytes(Command::Read, 1 << 5, 0, 8);
    bytes.extend_from_slice(&[0xff; 8]);
    wire.socket.write_all(&bytes).expect("sent");
    let answer = wire.answer().expect("an answer");
    assert_eq!((answer.cookie, answer.error), (cookie, EINVAL));
    assert_eq!(wire.read(0, 10).len(), 10);
}

#[test]
fn a_read_only_export_is_not_written() {
    let rig = Rig::new(Setup { read_only: true, ..Setup::default() });
    let mut wire = rig.client(Style::Structured);
    assert_eq!(wire.write(0, 0, &[1; 4096]).error, EPERM);
    assert_eq!(wire.call(Command::WriteZeroes, 0, 0, 4096).error, EPERM);
    assert_eq!(wire.call(Command::Trim, 0, 0, 4096).error, EPERM);
    assert_eq!(wire.call(Command::Flush, 0, 0, 0).error, 0);
    assert!(wire.read(0, 4096) == rig.plaintext(0, 4096));
}

#[test]
fn whoever_speaks_another_protocol_is_hung_up_on() {
    let rig = Rig::new(Setup::default());
    let too_long = |style| {
        let mut wire = rig.client(style);
        let length = if style == Style::Extended { 1 << 62 } else { u64::from(u32::MAX) };
        let (_, bytes) = wire.bytes(Command::Write, 0, 0, length);
        (wire, bytes)
    };
    let mut cases = vec![
        (rig.client(Style::Simple), b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec()),
        (rig.client(Style::Extended), rig.client(Style::Simple).bytes(Command::Read, 0, 0, 512).1.repeat(2)),
    ];
    cases.extend(STYLES.map(too_long));
    for (mut wire, bytes) in cases {
        wire.socket.write_all(&bytes).expect("sent");
        assert_eq!(wire.answer(), None);
    }
    rig.end(Course::Draining);
}

#[test]
fn whoever_speaks_another_protocol_in_the_midst_of_a_long_answer_is_hung_up_on() {
    let rig = Rig::new(Setup { workers: 1, ..Setup::default() });
    let mut random = Random::new(9);
    // What ends the connection has to arrive together with a part of the answer: several at a time, and often.
    for _ in 0..100 {
        let wires: Vec<(Wire, usize)> =
            (0..6).map(|_| (rig.client(Style::Simple), random.below(6 << 20))).collect();
        std::thread::scope(|scope| {
            for (mut wire, before) in wires {
                scope.spawn(move || {
                    wire.ask(Command::Read, 0, 0, 8 << 20);
                    let mut bytes = vec![0; 1 << 18];
                    let mut got = 0;
                    while got < before {
                        got += wire.socket.read(&mut bytes).expect("the answer's beginning");
                    }
                    wire.socket.write_all(&[0; 28]).expect("sent");
                    while wire.socket.read(&mut bytes).is_ok_and(|count| count > 0) {}
                });
            }
        });
    }
    assert!(wait_for_connections(&rig, 0), "connections stay");
    assert_eq!(rig.client(Style::Simple).read(0, 10).len(), 10);
}

#[test]
fn what_came_with_the_connection_is_served_first() {
    let rig = Rig::new(Setup::default());
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    let mut wire = Wire::new(ours, Style::Simple);
    let payload = noise(4, 200_000);
    let (first, mut early) = wire.bytes(Command::Write, 0, 777, 200_000);
    early.extend_from_slice(&payload);
    let (second, bytes) = wire.bytes(Command::Flush, 0, 0, 0);
    early.extend_from_slice(&bytes[..5]);
    rig.hand_over(theirs, Style::Simple, early).expect("taken");
    assert_eq!(wire.answer().expect("an answer").cookie, first);
    wire.socket.write_all(&bytes[5..]).expect("sent");
    assert_eq!(wire.answer().expect("an answer").cookie, second);
    assert!(wire.read(777, 200_000) == payload);
}

#[test]
fn a_structured_read_comes_in_chunks_and_with_df_in_one() {
    let rig = Rig::new(Setup::default());
    let expected = rig.plaintext(0, 8 << 20);
    for style in [Style::Structured, Style::Extended] {
        let mut wire = rig.client(style);
        let long = wire.call(Command::Read, 0, 100, 3 << 20);
        assert!(long.chunks > 1 && long.data == expected[100..100 + (3 << 20)]);
        let one = wire.call(Command::Read, DF, 100, 3 << 20);
        assert!(one.chunks == 1 && one.data == expected[100..100 + (3 << 20)]);
        // Others are answered before and after it, never within.
        let cookies: Vec<u64> = (0..20_u64)
            .map(|at| {
                wire.ask(Command::Read, if at % 3 == 0 { DF } else { 0 }, at * 4096, 1 << (12 + at % 10))
            })
            .collect();
        for _ in &cookies {
            let answer = wire.answer().expect("an answer");
            let at = usize::try_from(answer.cookie - cookies[0]).expect("asked for") * 4096;
            assert!(answer.error == 0 && answer.data == expected[at..at + answer.data.len()]);
        }
    }
}

#[test]
fn zeros_are_written_encrypted_and_read_back_as_zeros() {
    for discard in [false, true] {
        let rig = Rig::new(Setup { discard, ..Setup::default() });
        let mut wire = rig.client(Style::Extended);
        let mut model = noise(9, 8 << 20);
        assert_eq!(wire.write(0, 0, &model).error, 0);
        for (offset, length) in
            [(0, 4096), (5000, 10), (10_000, 100_000), (1 << 20, 4 << 20), ((8 << 20) - 1, 1)]
        {
            assert_eq!(wire.call(Command::WriteZeroes, FUA, offset, length).error, 0);
            let at = usize::try_from(offset).expect("small");
            model[at..at + usize::try_from(length).expect("small")].fill(0);
        }
        assert!(wire.read(0, 8 << 20) == model);
        let mut raw = [0; 4096];
        std::os::unix::fs::FileExt::read_exact_at(&rig.file, &mut raw, tests::served::DATA).expect("read");
        assert!(raw.iter().any(|&byte| byte != 0), "a hole in ciphertext is not zeros");
    }
}

#[test]
fn trim_changes_nothing_without_leave_and_whole_blocks_with_it() {
    let rig = Rig::new(Setup::default());
    let mut wire = rig.client(Style::Structured);
    let bytes = noise(3, 1 << 20);
    assert_eq!(wire.write(0, 0, &bytes).error, 0);
    assert_eq!(wire.call(Command::Trim, 0, 0, 1 << 20).error, 0);
    assert!(wire.read(0, 1 << 20) == bytes);
    assert_eq!(wire.call(Command::BlockStatus, 0, 0, 8 << 20).extents, [(8 << 20, 0)]);

    let rig = Rig::new(Setup { discard: true, ..Setup::default() });
    let mut wire = rig.client(Style::Structured);
    assert_eq!(wire.write(0, 0, &bytes).error, 0);
    assert_eq!(wire.call(Command::Flush, 0, 0, 0).error, 0);
    assert_eq!(wire.call(Command::Trim, FUA, 100, 65_436).error, 0);
    assert_eq!(wire.call(Command::Trim, 0, 5, 100).error, 0, "no whole block");
    assert!(wire.read(0, 4096) == bytes[..4096]);
    assert!(wire.read(65_536, 1 << 19) == bytes[65_536..65_536 + (1 << 19)]);
    // What lies there now is a hole under the cipher: noise.
    let noise = wire.read(4096, 61_440);
    assert!(noise != bytes[4096..65_536] && noise.iter().any(|&byte| byte != 0));
    for (style, count) in [(Style::Structured, 4), (Style::Extended, 4)] {
        let mut wire = rig.client(style);
        let answer = wire.call(Command::BlockStatus, 0, 0, 8 << 20);
        assert_eq!(answer.extents, [(4096, 0), (61_440, 1), (983_040, 0), (7 << 20, 1)]);
        assert_eq!(answer.extents.len(), count);
        assert_eq!(wire.call(Command::BlockStatus, REQ_ONE, 4000, 8192).extents, [(96, 0)]);
        assert_eq!(wire.call(Command::BlockStatus, REQ_ONE, 5000, 100).extents, [(100, 1)]);
    }
}

#[test]
fn an_extent_that_somebody_holds_is_waited_for() {
    use engine::pipeline::view::Access;
    use engine::units::Extent;
    let rig = Rig::new(Setup::default());
    let mut wire = rig.client(Style::Structured);
    let before = wire.read(0, 8192);
    let held = rig.export.view.admit(Access::Write, Extent::new(4096, 8192).expect("extent")).expect("free");
    let waiting = wire.ask_write(0, 4100, &[7; 10]);
    let beside = wire.ask_write(0, 0, &[8; 4096]);
    // What does not touch it goes on.
    assert_eq!(wire.answer().expect("an answer").cookie, beside);
    wire.socket.set_read_timeout(Some(Duration::from_millis(50))).expect("set");
    assert!(wire.socket.read(&mut [0; 1]).is_err(), "it must wait");
    wire.socket.set_read_timeout(Some(PATIENCE)).expect("set");
    rig.export.view.done(held);
    assert_eq!(wire.answer().expect("an answer").cookie, waiting);
    let mut expected = before;
    expected[..4096].fill(8);
    expected[4100..4110].fill(7);
    assert!(wire.read(0, 8192) == expected);
    // A client that leaves while it waits leaves nothing behind.
    let held = rig.export.view.admit(Access::Write, Extent::new(4096, 8192).expect("extent")).expect("free");
    wire.ask_write(0, 4096, &[9; 4096]);
    drop(wire);
    assert!(wait_for_connections(&rig, 0));
    rig.export.view.done(held);
    assert!(rig.plaintext(0, 8192) == expected);
}

#[test]
fn writes_of_several_connections_never_mix_within_a_data_unit() {
    let rig = Rig::new(Setup { workers: 2, total: 64 << 10, ..Setup::default() });
    std::thread::scope(|scope| {
        for client in 1..=4_u8 {
            let mut wire = rig.client(Style::Structured);
            scope.spawn(move || {
                let mut random = Random::new(u64::from(client));
                for round in 0..60_u8 {
                    // Whole units, and parts of one, that all clients fight for.
                    for _ in 0..8 {
                        let offset = random.below(12) * 4096;
                        wire.ask_write(0, offset as u64, &vec![client * 50 + round % 50; 16_384]);
                    }
                    for _ in 0..8 {
                        assert_eq!(wire.answer().expect("an answer").error, 0);
                    }
                }
            });
        }
    });
    let bytes = rig.plaintext(0, 64 << 10);
    for unit in bytes[..60 << 10].chunks(4096) {
        assert!(unit.iter().all(|&byte| byte == unit[0]), "two writes in one data unit");
    }
}

#[test]
fn neighbours_in_one_block_are_all_kept() {
    let rig = Rig::new(Setup { workers: 2, total: 64 << 10, direct: true, ..Setup::default() });
    std::thread::scope(|scope| {
        for client in 0..8_u8 {
            let mut wire = rig.client(Style::Structured);
            scope.spawn(move || {
                // Each client owns every eighth run of 100 bytes: read-modify-write of shared blocks throughout.
                for round in 1..=20_u8 {
                    let places: Vec<u64> = (0..640).filter(|place| place % 8 == u64::from(client)).collect();
                    for chunk in places.chunks(40) {
                        for place in chunk {
                            wire.ask_write(0, place * 100, &[round * 8 + client; 100]);
                        }
                        for _ in chunk {
                            assert_eq!(wire.answer().expect("an answer").error, 0);
                        }
                    }
                }
            });
        }
    });
    let bytes = rig.plaintext(0, 64 << 10);
    for (place, run) in bytes[..64_000].chunks(100).enumerate() {
        let expected = 160 + u8::try_from(place % 8).expect("small");
        assert!(run.iter().all(|&byte| byte == expected), "run {place}: {:?}", &run[..8]);
    }
}

#[test]
fn a_client_that_does_not_read_stalls_itself_only() {
    let rig = Rig::new(Setup { workers: 1, ..Setup::default() });
    // Each asks for far more than sockets and buffers hold, and reads nothing.
    let stalled: Vec<Wire> = (0..20)
        .map(|client| {
            let style = STYLES[client % 3];
            let mut wire = rig.client(style);
            wire.socket.set_nonblocking(true).expect("set");
            for round in 0..500_u64 {
                let length = if round % 2 == 0 { 4096 } else { 1 << 20 };
                let (_, bytes) = wire.bytes(Command::Read, 0, round % 7 * 4096, length);
                if wire.socket.write_all(&bytes).is_err() {
                    break;
                }
            }
            wire
        })
        .collect();
    let mut wire = rig.client(Style::Structured);
    for round in 0..200_u64 {
        let bytes = noise(round, 100_000);
        assert_eq!(wire.write(FUA, round * 1000, &bytes).error, 0);
        assert!(wire.read(round * 1000, 100_000) == bytes);
    }
    drop(stalled);
    rig.end(Course::Draining);
}

#[test]
fn a_client_that_dies_anywhere_leaves_nothing_behind() {
    let rig = Rig::new(Setup { workers: 2, ..Setup::default() });
    let mut random = Random::new(5);
    for round in 0..300 {
        let mut wire = rig.client(STYLES[round % 3]);
        let mut bytes = Vec::new();
        for _ in 0..1 + random.below(20) {
            let command =
                [Command::Read, Command::Write, Command::Write, Command::WriteZeroes, Command::Flush]
                    [random.below(5)];
            let length = if command == Command::Flush { 0 } else { 1 + random.below(600_000) as u64 };
            let offset = if command == Command::Flush { 0 } else { random.below(7 << 20) as u64 };
            bytes.extend(wire.bytes(command, 0, offset, length).1);
            if command == Command::Write {
                bytes.resize(bytes.len() + usize::try_from(length).expect("small"), 0xee);
            }
        }
        let cut = random.below(bytes.len());
        wire.socket.set_nonblocking(true).expect("set");
        // As much as it takes, and then gone.
        let _ = wire.socket.write(&bytes[..cut]);
        if round % 4 == 0 {
            let _ = wire.socket.read(&mut vec![0; 10_000]);
        }
    }
    assert!(wait_for_connections(&rig, 0), "connections stay");
    let mut wire = rig.client(Style::Structured);
    let bytes = noise(1, 8 << 20);
    assert_eq!(wire.write(FUA, 0, &bytes).error, 0);
    assert!(wire.read(0, 8 << 20) == bytes, "an extent or a buffer was kept");
}

fn wait_for_connections(rig: &Rig, wanted: u32) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while rig.export.counters.connections.load(Ordering::SeqCst) != wanted {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

#[test]
fn draining_answers_what_was_asked_and_dropping_does_not_wait() {
    let rig = Rig::new(Setup::default());
    let mut wire = rig.client(Style::Structured);
    let mut idle = rig.client(Style::Simple);
    let mut asked: Vec<u64> = (0..50_u64).map(|at| wire.ask(Command::Read, 0, at * 4096, 100_000)).collect();
    rig.export.end(Course::Draining);
    rig.hub.wake();
    while let Some(answer) = wire.answer() {
        assert_eq!(answer.error, 0);
        asked.retain(|&cookie| cookie != answer.cookie);
    }
    assert_eq!(asked, [0_u64; 0], "asked for and not answered");
    assert_eq!(idle.answer(), None);
    assert!(rig.export.wait_quiet(Instant::now() + PATIENCE));
    let (_ours, theirs) = UnixStream::pair().expect("sockets");
    let error = rig.hand_over(theirs, Style::Simple, Vec::new()).expect_err("too late");
    assert_eq!(error.kind(), ErrorKind::Cancelled);

    let rig = Rig::new(Setup::default());
    let mut half = rig.client(Style::Structured);
    let (_, bytes) = half.bytes(Command::Write, 0, 0, 1 << 20);
    half.socket.write_all(&bytes).expect("sent");
    half.socket.write_all(&[1; 70_000]).expect("sent");
    while rig.export.counters.commands[1].0.load(Ordering::Relaxed) == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    rig.export.end(Course::Draining);
    rig.hub.wake();
    assert!(!rig.export.wait_quiet(Instant::now() + Duration::from_millis(50)), "it has begun a write");
    rig.end(Course::Dropping);
    assert_eq!(half.answer(), None);
}

#[test]
fn a_write_that_was_begun_before_the_drain_is_finished() {
    let rig = Rig::new(Setup::default());
    let mut wire = rig.client(Style::Structured);
    let payload = noise(6, 1 << 20);
    let (cookie, bytes) = wire.bytes(Command::Write, 0, 0, 1 << 20);
    wire.socket.write_all(&bytes).expect("sent");
    wire.socket.write_all(&payload[..70_000]).expect("sent");
    // It is in the server's hands when something behind it is answered; here, when the count says that it has begun.
    while rig.export.counters.commands[1].0.load(Ordering::Relaxed) == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    rig.export.end(Course::Draining);
    rig.hub.wake();
    wire.socket.write_all(&payload[70_000..]).expect("sent");
    let answer = wire.answer().expect("an answer");
    assert_eq!((answer.cookie, answer.error), (cookie, 0));
    assert_eq!(wire.answer(), None);
    assert!(rig.plaintext(0, 1 << 20) == payload);
}

#[test]
fn a_polite_goodbye_waits_for_what_was_asked() {
    let rig = Rig::new(Setup::default());
    let mut wire = rig.client(Style::Simple);
    let payload = noise(8, 300_000);
    wire.ask_write(FUA, 0, &payload);
    let (_, bytes) = wire.bytes(Command::Disconnect, 0, 0, 0);
    wire.socket.write_all(&bytes).expect("sent");
    assert_eq!(wire.answer().expect("an answer").error, 0);
    assert_eq!(wire.answer(), None);
    assert!(wait_for_connections(&rig, 0));
    assert!(rig.plaintext(0, 299_008) == payload[..299_008]);
}

#[test]
fn endless_zeros_end_with_their_client() {
    // A sparse terabyte: writing all of it would take hours.
    let rig = Rig::new(Setup { total: 1 << 40, ..Setup::default() });
    let mut wire = rig.client(Style::Extended);
    wire.ask(Command::WriteZeroes, 0, 1 << 30, (1 << 40) - (1 << 30));
    // Others, and the same client, are served meanwhile.
    for round in 0..20 {
        assert_eq!(wire.write(0, round * 4096, &[3; 4096]).error, 0);
    }
    drop(wire);
    assert!(wait_for_connections(&rig, 0));
}

#[test]
fn more_clients_than_a_worker_may_have_are_refused() {
    let rig = Rig::new(Setup { workers: 1, ..Setup::default() });
    let mut wires: Vec<Wire> =
        (0..engine::export::nbd::hub::CONNECTIONS_MAX).map(|_| rig.client(Style::Simple)).collect();
    let (_ours, theirs) = UnixStream::pair().expect("sockets");
    let error = rig.hand_over(theirs, Style::Simple, Vec::new()).expect_err("one too many");
    assert_eq!(error.kind(), ErrorKind::Limit);
    for wire in &mut wires {
        assert_eq!(wire.read(5, 5).len(), 5);
    }
    wires.pop();
    assert!(wait_for_connections(&rig, engine::export::nbd::hub::CONNECTIONS_MAX - 1));
    assert_eq!(rig.client(Style::Simple).read(0, 10).len(), 10);
}

#[test]
fn connections_are_spread_and_what_they_did_is_counted() {
    let rig = Rig::new(Setup { workers: 2, ..Setup::default() });
    let mut wires: Vec<Wire> = (0..4).map(|_| rig.client(Style::Structured)).collect();
    for wire in &mut wires {
        assert_eq!(wire.write(FUA, 0, &[1; 8192]).error, 0);
        wire.read(0, 4096);
    }
    let counted = |command: usize| {
        let (count, bytes) = &rig.export.counters.commands[command];
        (count.load(Ordering::Relaxed), bytes.load(Ordering::Relaxed))
    };
    assert_eq!((counted(0), counted(1)), ((4, 4 * 4096), (4, 4 * 8192)));
    let check = || {
        let (record, syscalls) = rig.hub.stats(&rig.export);
        let stats = record.to_stats();
        let count = |stage| stats.iter().find(|stats| stats.stage == stage).map_or(0, |stats| stats.count);
        assert_eq!((count(proto::Stage::Read), count(proto::Stage::Write)), (4, 4));
        assert!(count(proto::Stage::Flush) > 0 && syscalls > 0);
    };
    check();
    drop(wires);
    assert!(wait_for_connections(&rig, 0));
    check();
}

#[test]
fn a_pipeline_that_ends_hangs_up() {
    let mut rig = Rig::new(Setup::default());
    let mut wire = rig.client(Style::Simple);
    assert_eq!(wire.read(0, 10).len(), 10);
    rig.stop_workers();
    assert_eq!(wire.answer(), None);
    assert!(rig.export.wait_quiet(Instant::now()));
}

#[test]
fn a_device_that_ends_early_is_an_error_and_the_connection_goes_on() {
    for style in STYLES {
        let rig = Rig::new(Setup::default());
        rig.file.set_len(tests::served::DATA + (4 << 20)).expect("cut off");
        let mut wire = rig.client(style);
        let answer = wire.call(Command::Read, 0, 4 << 20, 4096);
        assert_eq!(answer.error, EIO);
        assert_eq!(answer.error_at, (style != Style::Simple).then_some(4 << 20));
        assert_eq!(wire.read(0, 4096).len(), 4096);
        if style == Style::Simple {
            // Its first part was sent before the rest turned out to be missing: there is no way to say so but to hang up.
            wire.ask(Command::Read, 0, 0, 6 << 20);
            assert_eq!(wire.answer(), None);
        } else {
            let answer = wire.call(Command::Read, 0, 0, 6 << 20);
            assert_eq!((answer.error, answer.error_at.is_some()), (EIO, true));
            assert_eq!(wire.read(0, 4096).len(), 4096);
        }
    }
}

#[test]
fn a_re_encryption_is_waited_for_and_where_it_failed_is_an_error() {
    use engine::pipeline::view::Way;
    use tests::served::segments;
    let rig = Rig::new(Setup::default());
    let mut wire = rig.client(Style::Structured);
    let before = wire.read(0, 1 << 20);
    let view = &rig.export.view;
    view.begin(&segments(4096), segments(4096), Way::Forward, 0, std::sync::Arc::new(|| {})).expect("begins");
    assert!(view.freeze(65_536));
    assert!(wire.read(0, 1 << 20) == before, "reads go on");
    let waiting_write = wire.ask_write(0, 60_000, &[1; 100]);
    assert!(view.exclude(65_536));
    let waiting_read = wire.ask(Command::Read, 0, 61_440, 8192);
    // Half of this one is beside it.
    assert_eq!(wire.write(0, 65_536, &[2; 4096]).error, 0);
    view.stop(Some(65_536));
    for _ in 0..2 {
        let answer = wire.answer().expect("an answer");
        assert!([waiting_write, waiting_read].contains(&answer.cookie));
        assert_eq!(answer.error, EIO);
        assert!(answer.text.contains("re-encryption"), "{}", answer.text);
    }
    assert_eq!(wire.call(Command::Read, 0, 0, 4096).error, EIO);
    assert_eq!(wire.read(65_536, 4096), [2; 4096]);
}
