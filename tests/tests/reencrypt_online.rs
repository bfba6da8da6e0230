//! Whole rotations of a key while clients read and write, on disks that lose power: production code throughout (begin, open, recovery
//! and ledger of `volume::reencrypt`, the loop of `job::reencrypt`, the view and the worker loop of `pipeline`), clients by a seeded
//! schedule. Reads are compared as they come; after each cut every block of plaintext is a value that a client may find there.
//!
//! `ONLINE_CUTS` is how many power cuts there shall be at least, 40000 without it. A failing case prints `SIM_SEED`, `SIM_CUT` and
//! `REENCRYPT_CASE`, which together run that case alone.

use std::time::Instant;

use engine::error::ErrorKind;
use engine::format::luks2::reencrypt::Mode;
use engine::job::reencrypt::steps::State;
use proto::reencrypt::Resilience;
use tests::crash::Shape;
use tests::crash::online::{self, Broken};
use tests::crash::proof::{Depth, Proof, Totals};
use tests::seed;

const KIB: usize = 1 << 10;

/// Seven hotzones.
const PLAIN: Shape = Shape {
    mode: Mode::Reencrypt,
    resilience: Resilience::Checksum,
    units: [512, 512],
    data: 112 * KIB,
    area: 4096,
    hotzone: 16 << 10,
    chunk: 8192,
    detached: false,
    sector: 512,
    keyslots: 1,
};

/// The old bytes are kept.
const JOURNAL: Shape = Shape { resilience: Resilience::Journal, area: 16 << 10, ..PLAIN };

const SHAPES: [(&str, Shape); 9] = [
    ("checksum 512 to 512", PLAIN),
    ("checksum 512 to 4096", Shape { units: [512, 4096], sector: 4096, ..PLAIN }),
    ("checksum 4096 to 4096", Shape { units: [4096, 4096], sector: 4096, ..PLAIN }),
    ("checksum 4096 to 512", Shape { units: [4096, 512], sector: 4096, ..PLAIN }),
    ("checksum, detached", Shape { detached: true, ..PLAIN }),
    ("checksum, an odd end", Shape { data: 100 * KIB + 512, sector: 4096, ..PLAIN }),
    ("journal 512 to 512", JOURNAL),
    ("journal 512 to 4096, detached", Shape { units: [512, 4096], detached: true, ..JOURNAL }),
    ("journal 4096 to 512", Shape { units: [4096, 512], ..JOURNAL }),
];

const DEPTH: Depth = Depth {
    tears: 8,
    cuts_max: u64::MAX,
    open_every: 1,
    resume_every: 128,
    nest_every: u64::MAX,
    nest_tears: 0,
};

fn wanted() -> u64 {
    std::env::var("ONLINE_CUTS").map_or(40_000, |text| text.parse().expect("ONLINE_CUTS is a number"))
}

#[test]
fn clients_lose_nothing_and_read_nothing_else() {
    let only = std::env::var("REENCRYPT_CASE").ok();
    let alone = std::env::var_os("SIM_CUT").is_some();
    let start = Instant::now();
    let chosen = SHAPES.iter().filter(|(name, _)| only.as_ref().is_none_or(|only| only == name));
    let volumes: Vec<_> = chosen.map(|(name, shape)| (*name, shape.volume())).collect();
    assert!(!volumes.is_empty(), "no case is called {only:?}");
    let (mut cuts, mut judged, mut writes, mut reads, mut runs) = (0, 0, 0, 0, 0);
    let mut seed = seed();
    loop {
        for (name, volume) in &volumes {
            let totals = Totals::default();
            let proof = Proof::new(name, volume, DEPTH, &totals);
            let tried = online::explore(&proof, seed, Broken::Nothing);
            let tried =
                tried.unwrap_or_else(|violation| panic!("{violation} (with REENCRYPT_CASE='{name}')"));
            cuts += tried.summary.cases;
            judged += tried.summary.judged;
            writes += tried.writes;
            reads += tried.reads;
            runs += 1;
        }
        if alone || cuts >= wanted() {
            break;
        }
        seed = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    }
    eprintln!(
        "{cuts} power cuts ({judged} outcomes not the same as another of the same cut) of {runs} rotations with clients: {writes} \
         blocks written, {reads} reads compared; {:.0?}",
        start.elapsed()
    );
    assert!(alone || (writes > runs && reads > runs), "clients had nothing to do: {writes} {reads}");
}

/// Each rule, broken, is found within some seeds.
#[test]
fn broken_rules_are_found() {
    if std::env::var_os("SIM_CUT").is_some() {
        return;
    }
    let detached = Shape { detached: true, ..PLAIN };
    for (what, shape, broken) in [
        ("nobody waits for writes before reading ahead", PLAIN, Broken::FrozenTooSoon),
        ("what is frozen is written", PLAIN, Broken::NotFrozen),
        ("clients' writes are not flushed before a step begins", detached, Broken::NotDurable),
        ("nobody waits for reads before overwriting", PLAIN, Broken::ExcludedTooSoon),
        ("writes go on before the header says so", JOURNAL, Broken::PassedTooSoon),
    ] {
        let volume = shape.volume();
        let first = seed();
        let found = (0..24).find_map(|more| {
            let totals = Totals::default();
            let depth = Depth { resume_every: u64::MAX, ..DEPTH };
            let proof = Proof::new(what, &volume, depth, &totals);
            online::explore(&proof, first.wrapping_add(more), broken).err().map(|violation| (more, violation))
        });
        let (more, violation) = found.unwrap_or_else(|| panic!("{what}: nothing was found"));
        eprintln!("{what}: found at seed {more}: {}", violation.message);
    }
}

#[test]
fn who_holds_the_lock_of_the_header_takes_nothing_from_clients() {
    for (name, shape) in [("checksum", PLAIN), ("journal", JOURNAL)] {
        let volume = shape.volume();
        let whole = |what: &str, at| {
            let ended = online::locked_out(&volume, seed(), at);
            ended.unwrap_or_else(|error| panic!("{name}, {what}: {}", error.chain()))
        };
        let ended = whole("at the end of each step", None);
        assert!(ended.failure.is_none() && ended.state == State::Finished, "{name}: {ended:?}");
        for step in 1..=3 {
            let ended = whole("at the beginning of a step", Some(step));
            assert_eq!(ended.state, State::Clean, "{name}, step {step}: {ended:?}");
            assert_eq!(ended.failure.map(|error| error.kind()), Some(ErrorKind::Conflict), "{name} {step}");
        }
    }
}
