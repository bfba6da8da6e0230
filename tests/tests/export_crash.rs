//! FUA and FLUSH mean durable: an export on a simulated disk loses power at every write and flush, and what clients were told counts.
//!
//! The server, its worker and its sockets are the real ones; the disk is not. Two clients write the same blocks side by side. For each
//! block the test keeps what it may hold when the power comes back:
//! 1. a write that was sent may be there;
//! 2. when a flush is acknowledged that was sent after a round of writes had been, nothing older than that round may be;
//! 3. when a write with FUA is acknowledged, nothing older than its round may be.
//!
//! And a data unit is one of these as a whole, never a mixture.

use std::collections::BTreeSet;
use std::fs::File;

use engine::backend::sim::image::Image;
use engine::backend::sim::{Cut, DiskOptions, Effect, Fault, On, Options, Phase, When, World};
use engine::format::nbd::errors::{EIO, ENOSPC};
use engine::format::nbd::reply::Style;
use engine::format::nbd::request::Command;
use tests::Random;
use tests::served::{DATA, Rig, Setup, Wire, segments};

const BLOCK: usize = 4096;
const BLOCKS: usize = 8;
const ROUNDS: u64 = 6;
const FUA: u16 = 1;

/// A block of one version; version 0 is what was there before.
fn pattern(version: u64) -> Vec<u8> {
    version.to_le_bytes().repeat(BLOCK / 8)
}

fn world(seed: u64) -> (World, usize) {
    let world = World::with(seed, Options::default());
    let mut plain: Vec<u8> = (0..BLOCKS).flat_map(|_| pattern(0)).collect();
    segments(4096).at(0).encrypt(0, &mut plain);
    let mut image = Image::zeros(DATA + (BLOCKS * BLOCK) as u64);
    image.write(DATA, &plain);
    // A data unit is written whole or not at all: what this proves is not the disk's doing.
    let options = DiskOptions { sector_bytes: 4096, ..DiskOptions::default() };
    let disk = world.add(image, options).expect("a disk");
    (world, disk)
}

fn rig(world: &World, disk: usize) -> Rig {
    let file: File = world.descriptor(disk).expect("a descriptor").into();
    let setup = Setup { total: (BLOCKS * BLOCK) as u64, queue: world.choice(), ..Setup::default() };
    Rig::over(file, setup)
}

/// What each block may hold.
struct Ledger(Vec<BTreeSet<u64>>);

/// Write from two clients until all is written, or the power goes.
fn clients(rig: &Rig, seed: u64) -> Ledger {
    let mut random = Random::new(seed);
    let mut possible = Ledger(vec![BTreeSet::from([0]); BLOCKS]);
    let mut wires = [rig.client(Style::Structured), rig.client(Style::Extended)];
    let mut visible = possible.0.clone();
    let mut version = 0;
    for round in 0..ROUNDS {
        let mut sent: Vec<BTreeSet<u64>> = vec![BTreeSet::new(); BLOCKS];
        let mut asked: [Vec<(u64, usize, usize, bool)>; 2] = Default::default();
        for _ in 0..6 {
            let client = random.below(2);
            let (block, count) = (random.below(BLOCKS - 1), 1 + random.below(2));
            let fua = random.below(4) == 0;
            version += 1;
            for (possible, sent) in possible.0.iter_mut().zip(&mut sent).skip(block).take(count) {
                possible.insert(version);
                sent.insert(version);
            }
            let payload = pattern(version).repeat(count);
            let cookie = wires[client].ask_write(if fua { FUA } else { 0 }, (block * BLOCK) as u64, &payload);
            asked[client].push((cookie, block, count, fua));
        }
        for client in 0..2 {
            for _ in 0..asked[client].len() {
                let answer = wires[client].answer().expect("an answer");
                if answer.error != 0 {
                    return possible;
                }
                let place = asked[client].iter().position(|one| one.0 == answer.cookie).expect("asked");
                let (_, block, count, fua) = asked[client][place];
                let touched = possible.0.iter_mut().zip(&sent).skip(block).take(count);
                for (possible, sent) in touched.filter(|_| fua) {
                    possible.clone_from(sent);
                }
            }
        }
        for (visible, sent) in visible.iter_mut().zip(sent) {
            if !sent.is_empty() {
                *visible = sent;
            }
        }
        // On one connection for both.
        if round % 2 == 1 {
            if wires[0].call(Command::Flush, 0, 0, 0).error != 0 {
                return possible;
            }
            // All that was sent is acknowledged: of each block what its last round wrote.
            possible.0.clone_from(&visible);
        }
    }
    possible
}

/// The disk as it is found: each block is one version as a whole, and a possible one.
fn judge(world: &World, disk: usize, possible: &Ledger, what: &str) {
    let image = world.visible(disk).expect("an image");
    let mut plain = image.bytes(DATA, BLOCKS * BLOCK);
    segments(4096).at(0).decrypt(0, &mut plain);
    for (block, (bytes, possible)) in plain.chunks(BLOCK).zip(&possible.0).enumerate() {
        let version = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
        assert!(bytes == pattern(version), "{what}: block {block} is mixed");
        assert!(possible.contains(&version), "{what}: block {block} is {version}, not of {possible:?}");
    }
}

#[test]
fn what_was_flushed_is_there_after_a_power_cut_at_any_event() {
    let seed = tests::seed();
    let (whole, disk) = world(seed);
    let exported = rig(&whole, disk);
    let possible = clients(&exported, seed);
    drop(exported);
    judge(&whole, disk, &possible, "no cut");
    let events = whole.events();
    assert!(events > 20, "only {events} events");
    let mut cut_short = 0;
    for event in 1..=events {
        for phase in [Phase::Before, Phase::Middle, Phase::After] {
            let (world, disk) = world(seed ^ event);
            world.cut_at(Cut { event, phase });
            let exported = rig(&world, disk);
            let possible = clients(&exported, seed ^ event << 8);
            drop(exported);
            cut_short += u32::from(world.is_cut());
            for tear in 0..6 {
                let after = world.restart(tear + event).expect("power");
                judge(&after, disk, &possible, &format!("seed {seed} event {event} {phase:?} tear {tear}"));
            }
        }
    }
    assert!(cut_short > 40, "only {cut_short} cuts");
}

#[test]
fn after_a_failed_flush_nothing_is_called_durable_any_more() {
    for first in [Command::Flush, Command::Write] {
        let (world, disk) = world(5);
        let exported = rig(&world, disk);
        let (mut one, mut two) = (exported.client(Style::Structured), exported.client(Style::Simple));
        assert_eq!(one.write(0, 0, &pattern(1)).error, 0);
        world.inject(Fault { disk, on: On::Flush, when: When::Nth(1), effect: Effect::Fail(5) });
        let answer = match first {
            Command::Flush => one.call(Command::Flush, 0, 0, 0),
            _ => one.write(FUA, 0, &pattern(2)),
        };
        assert_eq!(answer.error, EIO);
        assert!(answer.text.contains("may be lost"), "{}", answer.text);
        // The disk would flush again without a murmur; nobody believes it.
        for wire in [&mut one, &mut two] {
            assert_eq!(wire.call(Command::Flush, 0, 0, 0).error, EIO);
            assert_eq!(wire.write(0, 4096, &pattern(3)).error, EIO);
            assert_eq!(wire.write(FUA, 0, &[1; 10]).error, EIO);
            assert_eq!(wire.call(Command::WriteZeroes, 0, 0, 4096).error, EIO);
            assert_eq!(wire.read(4096, BLOCK), pattern(0));
        }
        assert!(exported.export.durability.is_lost());
    }
}

#[test]
fn a_job_that_flushes_beside_clients_fails_with_them_and_they_with_it() {
    let beside = |world: &World, disk, exported: &Rig| {
        let blocking = world.blocking(disk, "volume").expect("a device");
        blocking.in_turn(exported.export.durability.clone())
    };
    let fail = |world: &World, disk| {
        world.inject(Fault { disk, on: On::Flush, when: When::Nth(1), effect: Effect::Fail(5) });
    };
    // Clients were told: what the job would call durable may be lost.
    let (world, disk) = self::world(8);
    let exported = rig(&world, disk);
    let (mut wire, mut job) = (exported.client(Style::Structured), beside(&world, disk, &exported));
    assert_eq!(wire.write(0, 0, &pattern(1)).error, 0);
    job.flush().expect("flushed");
    assert_eq!(wire.call(Command::Flush, 0, 0, 0).error, 0);
    fail(&world, disk);
    assert_eq!(wire.call(Command::Flush, 0, 0, 0).error, EIO);
    let error = job.flush().expect_err("the disk would flush again without a murmur");
    assert_eq!(error.kind(), engine::error::ErrorKind::Io);
    // The job was told: what clients wrote may be lost.
    let (world, disk) = self::world(9);
    let exported = rig(&world, disk);
    let (mut wire, mut job) = (exported.client(Style::Structured), beside(&world, disk, &exported));
    assert_eq!(wire.write(0, 0, &pattern(1)).error, 0);
    fail(&world, disk);
    assert!(job.flush().expect_err("it fails").chain().contains("EIO"));
    assert_eq!(wire.call(Command::Flush, 0, 0, 0).error, EIO);
    assert_eq!(wire.write(FUA, 0, &pattern(2)).error, EIO);
    assert!(exported.export.durability.is_lost());
}

#[test]
fn an_error_of_the_disk_is_told_and_the_connection_goes_on() {
    let (world, disk) = world(6);
    let exported = rig(&world, disk);
    let mut wire = exported.client(Style::Structured);
    for (on, errno, told) in
        [(On::Write, 28, ENOSPC), (On::Write, 5, EIO), (On::Write, 12, 12), (On::Write, 1, 1)]
    {
        world.heal();
        world.inject(Fault { disk, on, when: When::Nth(1), effect: Effect::Fail(errno) });
        assert_eq!(wire.write(0, 0, &pattern(1)).error, told);
        assert_eq!(wire.write(0, 0, &pattern(1)).error, 0);
    }
    world.heal();
    world.inject(Fault { disk, on: On::Read, when: When::Nth(1), effect: Effect::Fail(5) });
    let answer = wire.call(Command::Read, 0, 4096, 8192);
    assert_eq!((answer.error, answer.error_at), (EIO, Some(4096)));
    // A part of a block is read before it is written, and its write does not begin when that fails.
    world.heal();
    world.inject(Fault { disk, on: On::Read, when: When::Nth(1), effect: Effect::Fail(5) });
    assert_eq!(wire.write(0, 4100, &[9; 10]).error, EIO);
    assert_eq!(wire.read(4096, BLOCK), pattern(0));
}

#[test]
fn a_ledger_that_is_wrong_is_found_out() {
    let (world, disk) = world(7);
    let exported = rig(&world, disk);
    let mut wire: Wire = exported.client(Style::Simple);
    assert_eq!(wire.write(0, 0, &pattern(9)).error, 0);
    drop((wire, exported));
    let possible = Ledger(vec![BTreeSet::from([9]); BLOCKS]);
    // Not flushed: one manner of power cut loses it.
    let lost = (0..8).any(|tear| {
        let after = world.restart(tear).expect("power");
        let plain = after.visible(disk).expect("an image").bytes(DATA, BLOCK);
        let mut plain = plain;
        segments(4096).at(0).decrypt(0, &mut plain);
        !possible.0[0].contains(&u64::from_le_bytes(plain[..8].try_into().expect("8 bytes")))
    });
    assert!(lost, "the simulated disk keeps what was never flushed");
}
