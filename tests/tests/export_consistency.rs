//! Several clients of one export at once, over several connections: what they write never mixes within a data unit, nothing that was
//! acknowledged is lost or undone, and whoever writes a part of a data unit does not disturb its neighbours there.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::scope;

use engine::format::nbd::errors::ENOTSUP;
use engine::format::nbd::flags;
use engine::format::nbd::request::Command;
use tests::nbd::client::Connection;
use tests::nbd::steady::{Habit, Steady};
use tests::nbd::{Kind, Served, and_references, same};
use tests::{Random, seed};

const MIB: usize = 1 << 20;
/// The data unit of the volumes here.
const UNIT: usize = 4096;

/// One write of some data units: every 8 bytes of it are its tag.
struct Written {
    tag: u64,
    first: usize,
    count: usize,
    /// By a clock common to all clients: before it was sent, and after it was answered.
    began: u64,
    ended: u64,
}

/// Writes overlapping runs of data units with others at the same time; all it wrote.
fn overlap(
    connection: &mut Connection,
    clock: &AtomicU64,
    client: u64,
    units: usize,
    rounds: u64,
    mut random: Random,
) -> Vec<Written> {
    let mut flights: HashMap<u64, Written> = HashMap::new();
    let mut written = Vec::new();
    let mut sent = 0;
    while (written.len() as u64) < rounds {
        while flights.len() < 8 && sent < rounds {
            sent += 1;
            let tag = client << 32 | sent;
            let count = 1 + random.below(6);
            let first = random.below(units - count + 1);
            let data = tag.to_le_bytes().repeat(count * UNIT / 8);
            let began = clock.fetch_add(1, Ordering::SeqCst);
            let cookie = connection
                .send(Command::Write, 0, (first * UNIT) as u64, data.len() as u64, &data)
                .expect("sent");
            flights.insert(cookie, Written { tag, first, count, began, ended: 0 });
        }
        let (cookie, answer) = connection.receive().expect("answered");
        assert_eq!(answer.error, 0);
        let mut done = flights.remove(&cookie).expect("in flight");
        done.ended = clock.fetch_add(1, Ordering::SeqCst);
        written.push(done);
    }
    written
}

#[test]
fn overlapping_writes_never_mix_within_a_data_unit() {
    const UNITS: usize = 24;
    let seed = seed();
    for kind in and_references(&[Kind::LUKS2, Kind::Raw(4096)]) {
        let mut served = Served::over_noise(kind, 4 * MIB);
        let clock = AtomicU64::new(0);
        let mut all = Vec::new();
        scope(|scope| {
            let writers: Vec<_> = (1..5)
                .map(|client| {
                    let (mut connection, clock) = (served.connect(), &clock);
                    let random = Random::new(seed ^ client);
                    scope.spawn(move || overlap(&mut connection, clock, client, UNITS, 1500, random))
                })
                .collect();
            // Who reads meanwhile finds in every cipher block one tag that somebody has at least sent, or the noise.
            let mut reader = served.connect();
            let mut random = Random::new(seed);
            let mut reads = 0;
            while writers.iter().any(|writer| !writer.is_finished()) {
                let unit = random.below(UNITS);
                let found = reader.read((unit * UNIT) as u64, UNIT);
                for (block, noise) in found.chunks(16).zip(served.plain[unit * UNIT..].chunks(16)) {
                    let tag = u64::from_le_bytes(block[..8].try_into().expect("8 bytes"));
                    let of_a_client =
                        (1..5).contains(&(tag >> 32)) && (1..=1500).contains(&(tag & 0xffff_ffff));
                    assert!(
                        block == noise || (of_a_client && block[8..] == block[..8]),
                        "{kind:?}: nobody wrote {block:x?} to unit {unit}"
                    );
                }
                reads += 1;
            }
            assert!(reads > 0);
            all = writers.into_iter().flat_map(|writer| writer.join().expect("no panic")).collect();
        });
        let mut connection = served.connect();
        let found = connection.read(0, UNITS * UNIT);
        connection.leave();
        for (unit, bytes) in found.chunks(UNIT).enumerate() {
            let tag = &bytes[..8];
            assert!(bytes.chunks(8).all(|part| part == tag), "{kind:?}: unit {unit} is of several writers");
            let tag = u64::from_le_bytes(tag.try_into().expect("8 bytes"));
            let here = || all.iter().filter(|write| (write.first..write.first + write.count).contains(&unit));
            let last = here().find(|write| write.tag == tag).expect("by one of the writers");
            // Whoever began after it was acknowledged has overwritten it.
            let later = here().find(|write| write.began > last.ended);
            assert!(later.is_none(), "{kind:?}: unit {unit} has gone back to what was overwritten");
        }
        let mut expected = served.plain.clone();
        expected[..found.len()].copy_from_slice(&found);
        served.stop();
        served.holds(&expected);
    }
}

/// Bytes of a data unit by turns: whose is this one?
fn owner(at: usize, clients: usize) -> usize {
    (at / 100) % clients
}

#[test]
fn parts_of_one_data_unit_are_written_by_several_and_none_is_lost() {
    const CLIENTS: usize = 4;
    const PART: usize = 8 * UNIT;
    let seed = seed();
    for kind in and_references(&[Kind::LUKS2, Kind::Raw(4096), Kind::Raw(512)]) {
        let mut served = Served::over_noise(kind, MIB);
        let mut models = Vec::new();
        scope(|scope| {
            let writers: Vec<_> = (0..CLIENTS)
                .map(|client| {
                    let mut connection = served.connect();
                    let mut model = served.plain[..PART].to_vec();
                    let mut random = Random::new(seed ^ client as u64);
                    scope.spawn(move || {
                        let mut outstanding = 0;
                        for _ in 0..1200 {
                            // A run of a hundred bytes, or less of it: it is nobody else's, but its data unit is.
                            let run = random.below(PART / 100);
                            if owner(run * 100, CLIENTS) != client {
                                continue;
                            }
                            let from = random.below(100);
                            let (start, end) =
                                (run * 100 + from, run * 100 + from + 1 + random.below(100 - from));
                            let offset = start as u64;
                            let length = (end - start) as u64;
                            // Runs of one client may follow one another: only one at a time has an order.
                            while outstanding > 0 {
                                assert_eq!(connection.receive().expect("answered").1.error, 0);
                                outstanding -= 1;
                            }
                            let zeroes =
                                connection.flags & flags::SEND_WRITE_ZEROES != 0 && random.below(4) == 0;
                            if zeroes {
                                model[start..end].fill(0);
                                connection.send(Command::WriteZeroes, 0, offset, length, &[]).expect("sent");
                            } else {
                                random.fill(&mut model[start..end]);
                                connection
                                    .send(Command::Write, 0, offset, length, &model[start..end])
                                    .expect("sent");
                            }
                            outstanding += 1;
                        }
                        while outstanding > 0 {
                            assert_eq!(connection.receive().expect("answered").1.error, 0);
                            outstanding -= 1;
                        }
                        model
                    })
                })
                .collect();
            models = writers.into_iter().map(|writer| writer.join().expect("no panic")).collect();
        });
        let mut expected = served.plain.clone();
        (0..PART).for_each(|at| expected[at] = models[owner(at, CLIENTS)][at]);
        let mut connection = served.connect();
        same(&connection.read(0, expected.len()), &expected, &format!("{kind:?}"));
        connection.leave();
        served.stop();
        served.holds(&expected);
    }
}

#[test]
fn one_connection_may_have_parts_of_a_data_unit_in_flight_at_once() {
    for kind in and_references(&[Kind::LUKS2, Kind::Raw(512)]) {
        let mut served = Served::over_noise(kind, MIB);
        let mut expected = served.plain.clone();
        let mut connection = served.connect();
        for round in 0..200_usize {
            let base = (round % 50) * UNIT;
            // 64 pieces of 67 bytes: over the border of the unit as well.
            for piece in 0..64 {
                let at = base + piece * 67;
                let mark = u8::try_from((round + piece) % 256).expect("a byte");
                expected[at..at + 67].fill(mark);
                let data = [mark; 67];
                connection.send(Command::Write, 0, at as u64, 67, &data).expect("sent");
            }
            while connection.outstanding() > 0 {
                assert_eq!(connection.receive().expect("answered").1.error, 0);
            }
        }
        same(&connection.read(0, expected.len()), &expected, &format!("{kind:?}"));
        connection.leave();
        served.stop();
        served.holds(&expected);
    }
}

#[test]
fn what_one_connection_was_told_is_done_all_others_see() {
    let seed = seed();
    for kind in and_references(&[Kind::LUKS2, Kind::Raw(512)]) {
        let mut served = Served::over_noise(kind, MIB);
        let mut expected = served.plain.clone();
        let mut connections: Vec<_> = (0..4).map(|_| served.connect()).collect();
        assert!(connections[0].flags & flags::CAN_MULTI_CONN != 0, "{kind:?} does not promise it");
        let mut random = Random::new(seed);
        for _ in 0..500 {
            let length = 1 + random.below(10_000);
            let at = random.below(MIB - length);
            random.fill(&mut expected[at..at + length]);
            let writer = random.below(4);
            assert_eq!(connections[writer].write(0, at as u64, &expected[at..at + length]), 0);
            let reader = random.below(4);
            let (from, to) =
                (at.saturating_sub(random.below(5000)), (at + length + random.below(5000)).min(MIB));
            same(&connections[reader].read(from as u64, to - from), &expected[from..to], "read elsewhere");
        }
        // A flush on one covers all.
        assert_eq!(connections[0].error(Command::Flush, 0, 0, 0), 0);
        connections.into_iter().for_each(Connection::leave);
        served.stop();
        served.holds(&expected);
    }
}

#[test]
fn steady_clients_verify_all_they_write() {
    const PART: usize = 2 * MIB;
    let seed = seed();
    for kind in and_references(&Kind::OURS) {
        let mut served = Served::over_noise(kind, 3 * PART);
        let mut expected = Vec::new();
        scope(|scope| {
            let clients: Vec<_> = [Habit::MIXED, Habit::CROOKED, Habit::LARGE]
                .into_iter()
                .enumerate()
                .map(|(n, habit)| {
                    let start = n * PART;
                    let random = Random::new(seed ^ n as u64);
                    let mut client =
                        Steady::new(start as u64, served.plain[start..start + PART].to_vec(), habit, random);
                    let socket = served.socket();
                    scope.spawn(move || {
                        client.connect(&socket).expect("connected");
                        for _ in 0..1000 {
                            client.step().expect("served");
                        }
                        client.settle().expect("served");
                        client.model().to_vec()
                    })
                })
                .collect();
            expected = clients.into_iter().flat_map(|client| client.join().expect("verified")).collect();
        });
        served.stop();
        served.holds(&expected);
    }
}

#[test]
fn a_read_only_export_changes_for_nobody() {
    for kind in and_references(&[Kind::LUKS2]) {
        let mut served =
            Served::with(kind, MIB, if kind == Kind::Nbdkit { "--readonly" } else { "--read-only" });
        let mut connection = served.connect();
        assert!(connection.flags & flags::READ_ONLY != 0);
        for command in [Command::WriteZeroes, Command::Trim] {
            let error = connection.error(command, 0, 0, 4096);
            assert!(
                error != 0 && error != ENOTSUP || kind != Kind::LUKS2,
                "{kind:?}: {command:?} gave {error}"
            );
        }
        assert!(connection.write(0, 0, &[1; 4096]) != 0);
        same(&connection.read(0, MIB), &served.plain, "read only");
        connection.leave();
        served.stop();
        served.holds(&served.plain);
    }
}
