//! Whole re-encryptions on disks that lose power: cut before, in the middle of and behind every write and every flush, with what was
//! not durable lost, kept or torn; then recovered, and every byte of plaintext compared. A part of the endings is opened as a
//! user does, gone on with to the end, or cut again while it is recovered, and those once more.
//!
//! The code is the production code throughout: begin, open, recovery and ledger of `volume::reencrypt`, the loop over hotzones of
//! `job::reencrypt`, the worker loop of `pipeline`; only threads and devices are simulated.
//!
//! `REENCRYPT_CUTS` is how many power cuts there shall be at least, 100000 without it; 10000000 is the long mode (an hour on two
//! cores; build it with `--release`). A failing case prints `SIM_SEED`, `SIM_CUT` and `REENCRYPT_CASE`, which together run
//! that case alone.

use std::time::Instant;

use engine::backend::sim::explore::{Explore, Summary};
use engine::backend::sim::image::Image;
use engine::backend::sim::{On, World};
use engine::format::luks2::reencrypt::Mode;
use proto::reencrypt::Resilience;
use tests::crash::proof::{Depth, Proof, Totals};
use tests::crash::raw::RawVolume;
use tests::crash::same_boot::Trial;
use tests::crash::wrong::{Area, FreeLedger, Wrong, WrongLedger};
use tests::crash::{Shape, Volume};
use tests::seed;

const KIB: usize = 1 << 10;

/// Of most volumes: four hotzones, the last one shorter.
const PLAIN: Shape = Shape {
    mode: Mode::Reencrypt,
    resilience: Resilience::Checksum,
    units: [512, 512],
    data: 112 * KIB,
    area: 4096,
    hotzone: 32 << 10,
    chunk: 8192,
    detached: false,
    sector: 512,
    keyslots: 1,
};

/// The old bytes are kept.
const JOURNAL: Shape = Shape { resilience: Resilience::Journal, area: 32 << 10, ..PLAIN };

/// Plain data moves by 256 KiB, to the end first: three hotzones, the last one being what makes room for the header.
const SHIFT: Shape = Shape {
    mode: Mode::Encrypt,
    resilience: Resilience::Datashift,
    data: 640 * KIB,
    hotzone: 256 << 10,
    chunk: 64 << 10,
    ..PLAIN
};

/// Blocks hashed are as large as what the disk writes whole: what checksums need.
const SHAPES: [(&str, Shape); 18] = [
    ("checksum 512 to 512", PLAIN),
    ("checksum 512 to 512, large sectors", Shape { sector: 4096, ..PLAIN }),
    ("checksum 512 to 4096", Shape { units: [512, 4096], sector: 4096, ..PLAIN }),
    ("checksum 4096 to 4096", Shape { units: [4096, 4096], sector: 4096, ..PLAIN }),
    ("checksum 4096 to 512", Shape { units: [4096, 512], sector: 4096, ..PLAIN }),
    ("checksum, detached", Shape { detached: true, ..PLAIN }),
    ("checksum, an odd end", Shape { data: 100 * KIB + 512, sector: 4096, ..PLAIN }),
    ("checksum, two keyslots", Shape { keyslots: 2, data: 40 * KIB, ..PLAIN }),
    ("journal 512 to 512", JOURNAL),
    ("journal 512 to 4096", Shape { units: [512, 4096], ..JOURNAL }),
    ("journal 4096 to 4096", Shape { units: [4096, 4096], ..JOURNAL }),
    ("journal 4096 to 512", Shape { units: [4096, 512], ..JOURNAL }),
    ("journal, detached, large sectors", Shape { detached: true, sector: 4096, ..JOURNAL }),
    ("journal, one step", Shape { data: 20 * KIB + 512, ..JOURNAL }),
    ("decrypt, checksum", Shape { mode: Mode::Decrypt, detached: true, ..PLAIN }),
    ("decrypt, journal", Shape { mode: Mode::Decrypt, detached: true, ..JOURNAL }),
    ("encrypt, shift to 512", SHIFT),
    ("encrypt, shift to 4096", Shape { units: [512, 4096], sector: 4096, ..SHIFT }),
];

const DEPTH: Depth =
    Depth { tears: 20, cuts_max: u64::MAX, open_every: 64, resume_every: 64, nest_every: 32, nest_tears: 8 };

/// How many power cuts.
fn wanted() -> u64 {
    std::env::var("REENCRYPT_CUTS").map_or(100_000, |text| text.parse().expect("REENCRYPT_CUTS is a number"))
}

/// Run the shapes over and over, each time with another seed, until there were enough cuts.
#[test]
fn no_power_cut_loses_a_byte() {
    let only = std::env::var("REENCRYPT_CASE").ok();
    let alone = std::env::var_os("SIM_CUT").is_some();
    let start = Instant::now();
    let chosen = SHAPES.iter().filter(|(name, _)| only.as_ref().is_none_or(|only| only == name));
    let volumes: Vec<(&str, Volume)> = chosen.map(|(name, shape)| (*name, shape.volume())).collect();
    assert!(!volumes.is_empty(), "no case is called {only:?}");
    let totals = Totals::default();
    let mut seed = seed();
    loop {
        for (name, volume) in &volumes {
            let proof = Proof::new(name, volume, DEPTH, &totals);
            if let Err(violation) = proof.run(seed) {
                panic!("{violation} (with REENCRYPT_CASE='{name}')");
            }
        }
        if alone || totals.cuts() >= wanted() {
            break;
        }
        seed = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    }
    eprintln!("{totals}; {:.0?}", start.elapsed());
    assert!(alone || totals.is_thorough(), "something was never looked at: {totals}");
}

/// Volumes without a header, whose progress is in a journal beside them.
#[test]
fn no_power_cut_loses_a_byte_of_a_volume_without_a_header() {
    let start = Instant::now();
    let mut total = Summary::default();
    for resilience in [Resilience::Checksum, Resilience::Journal] {
        for units in [[512, 512], [512, 4096], [4096, 4096]] {
            let volume = RawVolume::new(units, resilience);
            let explore = Explore {
                disks: volume.disks(),
                tears: 16,
                ..Explore::new(&volume.name(), seed(), Image::default())
            };
            let judged = explore.recorded(|world| volume.run(world), |world, case| volume.judge(world, case));
            let summary = judged.unwrap_or_else(|violation| panic!("{violation}"));
            total.cases += summary.cases;
            total.judged += summary.judged;
            total.events += summary.events;
        }
    }
    let Summary { events, cases, judged, .. } = total;
    eprintln!(
        "{cases} power cuts ({judged} outcomes not the same as another of the same cut) at {events} writes and flushes; {:.0?}",
        start.elapsed()
    );
    assert!(std::env::var_os("SIM_CUT").is_some() || cases > 5000, "{total:?}");
}

/// What is visible and not durable, because a flush failed or nobody was left to ask for it, is not built upon.
#[test]
fn no_power_cut_behind_a_failure_loses_a_byte() {
    if std::env::var_os("SIM_CUT").is_some() {
        return;
    }
    let start = Instant::now();
    let (mut aborts, mut cuts) = (0, 0);
    for (name, shape) in [
        ("checksum", Shape { detached: true, data: 40 * KIB, hotzone: 16 << 10, ..PLAIN }),
        (
            "checksum, blocks smaller than data units",
            Shape { units: [512, 4096], sector: 4096, data: 40 * KIB, hotzone: 16 << 10, ..PLAIN },
        ),
        ("journal", Shape { detached: true, data: 40 * KIB, hotzone: 16 << 10, ..JOURNAL }),
        ("shift", SHIFT),
    ] {
        let volume = shape.volume();
        let trial = Trial { volume: &volume, seed: seed(), stride: 5, tears: 2 };
        for (disk, on) in (0..=shape.data_disk()).flat_map(|disk| [(disk, On::Flush), (disk, On::Write)]) {
            let tried = trial.run(disk, on).unwrap_or_else(|why| panic!("{name}: {why}"));
            aborts += tried.aborts;
            cuts += tried.cuts;
        }
    }
    eprintln!("{cuts} power cuts behind {aborts} failures; {:.0?}", start.elapsed());
    assert!(aborts > 60 && cuts > 500, "{aborts} {cuts}");
}

/// Run one shape until a loss is found.
fn finds(what: &str, shape: Shape, wrap: tests::crash::proof::WrapIn<'_>) {
    let volume = shape.volume();
    let totals = Totals::default();
    let depth = Depth { tears: 8, nest_every: u64::MAX, ..DEPTH };
    let proof = Proof::new(what, &volume, depth, &totals).wrapped(wrap);
    let mut seed = seed();
    for _ in 0..4 {
        if let Err(violation) = proof.run(seed) {
            eprintln!("{what}: found: {}", violation.message);
            return;
        }
        seed = seed.wrapping_add(1);
    }
    panic!("{what}: nothing was found in {totals}");
}

#[test]
fn orders_that_lose_data_are_found() {
    if std::env::var_os("SIM_CUT").is_some() {
        return;
    }
    for (what, shape, wrong) in [
        ("no checksums are saved", PLAIN, Wrong::NothingSaved),
        ("a step begins late", PLAIN, Wrong::BegunLate),
        ("a step of a journal begins late", JOURNAL, Wrong::BegunLate),
        ("a step is committed early", PLAIN, Wrong::CommittedEarly),
        ("a step of a journal is committed early", JOURNAL, Wrong::CommittedEarly),
    ] {
        finds(what, shape, &|_, ledger| WrongLedger::around(ledger, wrong));
    }
    // Not an order: what is hashed as one must be written as one.
    finds("a disk tears what is hashed as one", Shape { units: [4096, 4096], ..PLAIN }, &|_, ledger| ledger);
    let total = PLAIN.data as u64;
    for (what, shape, area) in [
        ("the area is not flushed", PLAIN, Area::NotFlushed),
        ("the area of a detached header is not flushed", Shape { detached: true, ..PLAIN }, Area::NotFlushed),
        ("the area of a journal is not flushed", JOURNAL, Area::NotFlushed),
        ("the area is written behind the header", PLAIN, Area::Late),
    ] {
        finds(what, shape, &|world: &World, ledger| {
            FreeLedger::instead_of(ledger, world, total, area).expect("a ledger")
        });
    }
}

/// The ledger whose order can be chosen is right where it is told to be: it is the order that is found above, and not the ledger.
#[test]
fn the_right_order_by_the_same_means_loses_nothing() {
    if std::env::var_os("SIM_CUT").is_some() {
        return;
    }
    let volume = PLAIN.volume();
    let totals = Totals::default();
    let total = PLAIN.data as u64;
    let wrap = |world: &World, ledger| {
        FreeLedger::instead_of(ledger, world, total, Area::Durable).expect("a ledger")
    };
    let depth = Depth { tears: 8, nest_every: u64::MAX, ..DEPTH };
    let proof = Proof::new("the right order", &volume, depth, &totals).wrapped(&wrap);
    proof.run(seed()).unwrap_or_else(|violation| panic!("{violation}"));
}
