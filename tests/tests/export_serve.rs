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
