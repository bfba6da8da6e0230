//! Re-encryption by processes that are killed: our daemon and cryptsetup, each at random instants, on a file and on a loop device. Who
//! goes on is now the one and now the other, and may be killed again. In the end the whole plaintext is compared, every time.
//!
//! Each of the tests kills eight times. `REENCRYPT_KILLS=100` is the long mode: so many in each. `TEST_SEED`, as a test prints
//! it, repeats the same instants as far as a machine can.

use std::collections::BTreeMap;
use std::time::Duration;

use tests::luks::have;
use tests::reencrypt::{Bench, Party, Standing, part_of};
use tests::{Random, seed};

const MIB: usize = 1 << 20;
/// Data of a volume: with steps of a mebibyte, so many steps.
const DATA: usize = 48 * MIB;
const STEP: &str = "--hotzone-size 1M";

/// How often each test kills.
fn kills() -> usize {
    std::env::var("REENCRYPT_KILLS").map_or(8, |text| text.parse().expect("REENCRYPT_KILLS is a number"))
}

/// What was found after a kill, and who finished.
#[derive(Default)]
struct Tally {
    kills: usize,
    /// By cryptsetup, of steps that had been interrupted.
    repaired: usize,
    found: BTreeMap<&'static str, usize>,
    finished: BTreeMap<&'static str, usize>,
}

impl Tally {
    fn killed(&mut self, standing: Standing) {
        self.kills += 1;
        let words = match standing {
            Standing::Before => "before it began",
            Standing::Edge => "before the first step or behind the last",
            Standing::Clean => "between steps",
            Standing::Crash => "within a step",
            Standing::After => "after the end",
        };
        *self.found.entry(words).or_default() += 1;
    }
}

struct Scene {
    bench: Bench,
    random: Random,
    tally: Tally,
    /// How long each party takes when nobody kills it, by protection.
    times: BTreeMap<(bool, &'static str), Duration>,
}

impl Scene {
    fn new(bench: Bench) -> Self {
        Self { bench, random: Random::new(seed()), tally: Tally::default(), times: BTreeMap::new() }
    }

    fn time_of(&mut self, party: Party, resilience: &'static str) -> Duration {
        let bench = &self.bench;
        *self.times.entry((party == Party::Ours, resilience)).or_insert_with(|| {
            bench.restore();
            let time = bench.finish(party, &format!("--resilience {resilience} {STEP}"));
            bench.check("nobody was killed");
            time
        })
    }

    /// Somebody begins and is killed; somebody goes on, and may be killed as well; somebody finishes.
    fn round(&mut self, number: usize, starter: Party) {
        let resilience = ["checksum", "journal"][number % 2];
        let time = self.time_of(starter, resilience);
        self.bench.restore();
        let begin = format!("--resilience {resilience} {STEP}");
        let mut about = format!("round {number}, {resilience}: ");
        let (mut party, mut options) = (starter, begin.clone());
        loop {
            // The run that was timed was the first of its kind, and the slowest.
            let after = part_of(time * 3 / 4, &mut self.random);
            self.bench.kill(party, &options, after);
            let mut standing = self.bench.standing();
            self.tally.killed(standing);
            about.push_str(&format!("{party:?} killed after {after:?}: {standing:?}; "));
            let next = match (standing, party) {
                (Standing::After, _) => break,
                // cryptsetup takes an end of its own for a beginning, and would begin anew over what is new.
                (Standing::Edge, Party::Theirs) => Party::Ours,
                _ if self.random.below(3) == 0 => party,
                _ => party.other(),
            };
            party = next;
            if standing == Standing::Crash && party == Party::Theirs {
                eprintln!("{about}");
                self.bench.repair();
                standing = self.bench.standing();
                self.tally.repaired += 1;
                about.push_str(&format!("repaired: {standing:?}; "));
            }
            options = match (standing, party) {
                (Standing::After, _) => break,
                // Left-overs of a beginning do not keep anybody from beginning.
                (Standing::Before, _) => begin.clone(),
                (_, Party::Theirs) => format!("{begin} --resume-only"),
                (_, Party::Ours) => "--resume-only".to_owned(),
            };
            if self.random.below(2) == 0 {
                about.push_str(&format!("{party:?} finishes"));
                eprintln!("{about}");
                let who = if party == Party::Ours { "us" } else { "cryptsetup" };
                *self.tally.finished.entry(who).or_default() += 1;
                let _ = self.bench.finish(party, &options);
                break;
            }
        }
        self.bench.check(&about);
        if number.is_multiple_of(4) {
            self.bench.check_with_cryptsetup(&about);
        }
    }

    fn rounds(mut self, name: &str, starters: &[Party]) {
        let kills = kills();
        let mut number = 0;
        while self.tally.kills < kills {
            self.round(number, starters[number % starters.len()]);
            number += 1;
        }
        let Tally { kills, repaired, found, finished } = &self.tally;
        eprintln!(
            "{name}: {kills} kills in {number} rounds: {found:?}; {repaired} repaired by cryptsetup; finished by: {finished:?}"
        );
        let within =
            ["between steps", "within a step"].iter().filter_map(|words| found.get(words)).sum::<usize>();
        assert!(within * 4 >= *kills, "most kills came too early or too late to prove anything: {found:?}");
    }
}

#[test]
fn our_daemon_is_killed_over_a_file() {
    if have(&["cryptsetup"]) {
        Scene::new(Bench::on_file(DATA, "--sector-size 4096")).rounds("file", &[Party::Ours]);
    }
}

#[test]
fn our_daemon_is_killed_over_a_loop_device() {
    if !have(&["cryptsetup"]) {
        return;
    }
    if let Some(bench) = Bench::on_loop_device(DATA, "--sector-size 512") {
        Scene::new(bench).rounds("loop device", &[Party::Ours]);
    }
}

#[test]
fn cryptsetup_is_killed_and_we_go_on() {
    if have(&["cryptsetup"]) {
        Scene::new(Bench::on_file(DATA, "--sector-size 4096")).rounds("cryptsetup", &[Party::Theirs]);
    }
}
