//! Volumes without a header, re-encrypted beside a journal on disks that lose power: cut at every write and every flush of it all and of
//! its recovery, with what was not durable lost, kept or torn. All plaintext is there each time.
//!
//! Driven by the simplest loop there is, one hotzone after the other. `SIM_SEED` and `SIM_CUT`, as a failing case prints them, run that case
//! alone.

use engine::backend::blocking::Blocking;
use engine::backend::sim::explore::{Case, Explore, Summary};
use engine::backend::sim::image::Image;
use engine::backend::sim::{Cut, DiskOptions, Effect, Fault, On, Phase, When, World};
use engine::crypto::{Kernel, Secret, SectorCipher};
use engine::error::{ErrorKind, Result};
use engine::format::sidecar::{SLOT_BYTES, Slots, State};
use engine::units::{DataUnit, Extent};
use engine::volume::reencrypt::ledger::Protection;
use engine::volume::reencrypt::sidecar::{self, Found, Wish};
use engine::volume::reencrypt::{Opened, Side};
use proto::luks::File;
use proto::reencrypt::{RawPair, Resilience};
use proto::{Raw, TweakKind};

const VOLUME: usize = 0;
const JOURNAL: usize = 1;
const VOLUME_BYTES: usize = 96 << 10;
/// Three steps.
const HOTZONE_BYTES: u64 = 32 << 10;
/// Blocks are written one by one, so that any of them may be lost.
const BLOCK: usize = 4096;

fn raw(key_bytes: u32, data_unit: u32) -> Raw {
    Raw { key_bytes, data_unit, tweak: TweakKind::Plain64, large_tweak: false, tweak_offset: 0 }
}

/// A re-encryption to be tried.
#[derive(Clone)]
struct Trial {
    pair: RawPair,
    resilience: Resilience,
    /// What the volume's disk writes whole.
    sector_bytes: u32,
}

fn trial(old: Raw, new: Raw, resilience: Resilience, sector_bytes: u32) -> Trial {
    let journal = File { fd: 0, name: "journal".to_owned() };
    Trial { pair: RawPair { old, new, journal }, resilience, sector_bytes }
}

/// 512 to 512, 512 to 4096 and 4096 to 4096, on disks of both kinds of sectors.
fn trials() -> Vec<Trial> {
    let odd = Raw { tweak: TweakKind::Plain, tweak_offset: 64, ..raw(32, 512) };
    let large = Raw { large_tweak: true, tweak_offset: 8, ..raw(64, 4096) };
    [Resilience::Checksum, Resilience::Journal]
        .into_iter()
        .flat_map(|resilience| {
            [
                trial(raw(64, 512), raw(64, 512), resilience, 512),
                trial(odd.clone(), large.clone(), resilience, 512),
                trial(raw(64, 4096), raw(32, 4096), resilience, 4096),
                trial(large.clone(), odd.clone(), resilience, 4096),
            ]
        })
        .collect()
}

fn secret(byte: u8, bytes: u32) -> Secret {
    let bytes: Vec<u8> = (0..bytes).map(|at| byte ^ at.to_le_bytes()[0]).collect();
    Secret::copy_of(&bytes).expect("memory")
}

fn plaintext() -> Vec<u8> {
    (0..VOLUME_BYTES).map(|at| (at.wrapping_mul(0x9e37_79b9) >> 11).to_le_bytes()[0]).collect()
}

struct Cipher(Box<dyn SectorCipher>, u64);

impl Cipher {
    fn of(side: &Side) -> Self {
        let (cipher, key) = side.cipher.as_ref().expect("both sides are encrypted");
        let built = cipher.build(Kernel::best().expect("a kernel"), key, 0).expect("a cipher");
        Self(built, cipher.unit_bytes.into())
    }

    fn decrypt(&self, at: u64, bytes: &mut [u8]) {
        self.0.decrypt(DataUnit(at / self.1), bytes);
    }

    fn encrypt(&self, at: u64, bytes: &mut [u8]) {
        self.0.encrypt(DataUnit(at / self.1), bytes);
    }
}

/// The whole volume under one side, by dm-crypt's sums and not by what is tested.
fn ciphertext(raw: &Raw, key: &Secret) -> Vec<u8> {
    let layout = engine::format::raw::layout(raw).expect("a layout");
    let key = engine::crypto::VolumeKey::new(key.as_bytes()).expect("a key");
    let mut bytes = plaintext();
    engine::crypto::cipher(Kernel::Portable, &key, layout)
        .expect("a cipher")
        .encrypt(DataUnit(0), &mut bytes);
    bytes
}

impl Trial {
    fn keys(&self) -> [Secret; 2] {
        [secret(0x11, self.pair.old.key_bytes), secret(0x22, self.pair.new.key_bytes)]
    }

    fn wish(&self) -> Wish<'_> {
        Wish {
            resilience: Some(self.resilience),
            iterations: Some(1000),
            hotzone_bytes: Some(HOTZONE_BYTES),
            ..Wish::new(&self.pair, VOLUME_BYTES as u64, self.sector_bytes)
        }
    }

    fn disks(&self) -> Vec<(Image, DiskOptions)> {
        let volume = Image::of(&ciphertext(&self.pair.old, &self.keys()[0]));
        let options = DiskOptions { sector_bytes: self.sector_bytes, ..DiskOptions::default() };
        vec![(volume, options), (Image::default(), DiskOptions::default())]
    }

    fn world(&self) -> World {
        let world = World::new(3);
        for (image, options) in self.disks() {
            world.add(image, options).expect("a disk");
        }
        world
    }

    fn find(&self, world: &World) -> Result<Found> {
        let [old, new] = self.keys();
        let volume = world.blocking(VOLUME, "volume")?;
        let journal = world.blocking(JOURNAL, "journal")?;
        sidecar::open(journal, volume, VOLUME_BYTES as u64, &self.pair, &old, &new)
    }

    fn open(&self, world: &World) -> Result<Option<Opened>> {
        self.find(world).map(Found::under)
    }

    /// Go on with it or begin it, to the end.
    fn run(&self, world: &World) -> Result<()> {
        self.run_steps(world, usize::MAX)
    }

    fn run_steps(&self, world: &World, most: usize) -> Result<()> {
        let opened = match self.find(world)? {
            Found::Under(opened) => *opened,
            Found::Swept | Found::Over => return Ok(()),
            Found::None => {
                let [old, new] = self.keys();
                let journal = world.blocking(JOURNAL, "journal")?;
                sidecar::begin(journal, world.blocking(VOLUME, "volume")?, &self.wish(), &old, &new)?
            }
        };
        steps(world, opened, most)
    }

    /// After a cut: what was begun is opened, which recovers it, and all plaintext is there; and it can be gone on with to the end.
    fn judge(&self, world: &World, completed: bool) -> Result<(), String> {
        let found = self.find(world).map_err(|error| format!("not opened: {}", error.chain()))?;
        let boundary = match found {
            Found::Under(opened) => opened.boundary,
            Found::Swept | Found::Over => VOLUME_BYTES as u64,
            Found::None => 0,
        };
        self.plaintext_is_there(world, boundary)?;
        if completed && boundary != VOLUME_BYTES as u64 {
            return Err(format!("it was reported as done, but the boundary is at {boundary}"));
        }
        self.run(world).map_err(|error| format!("not gone on with: {}", error.chain()))?;
        let volume = world.visible(VOLUME).map_err(|error| error.chain())?;
        if volume.bytes(0, VOLUME_BYTES) != ciphertext(&self.pair.new, &self.keys()[1]) {
            return Err("in the end the volume is not its plaintext under the new key".to_owned());
        }
        let journal = world.visible(JOURNAL).map_err(|error| error.chain())?;
        match Slots::read(&journal.bytes(0, 2 * SLOT_BYTES)) {
            Ok(Slots::Whole(one, Some(other)))
                if [&one, &other].iter().all(|slot| slot.claims().state == State::Swept) =>
            {
                Ok(())
            }
            other => Err(format!("in the end the journal says {other:?}")),
        }
    }

    fn plaintext_is_there(&self, world: &World, boundary: u64) -> Result<(), String> {
        let volume = world.visible(VOLUME).map_err(|error| error.chain())?.bytes(0, VOLUME_BYTES);
        let [old, new] = self.keys();
        let (old, new) = (ciphertext(&self.pair.old, &old), ciphertext(&self.pair.new, &new));
        let boundary = usize::try_from(boundary).expect("small");
        let expected = [&new[..boundary], &old[boundary..]].concat();
        match volume.iter().zip(&expected).position(|(found, expected)| found != expected) {
            None => Ok(()),
            Some(at) => Err(format!("byte {at} is lost; the boundary is at {boundary}")),
        }
    }

    fn name(&self) -> String {
        let (old, new) = (&self.pair.old, &self.pair.new);
        format!(
            "{:?} {} to {}, sectors of {}",
            self.resilience, old.data_unit, new.data_unit, self.sector_bytes
        )
    }
}

/// The loop over hotzones, in the order of the ledger.
fn steps(world: &World, mut opened: Opened, most: usize) -> Result<()> {
    let mut volume = world.blocking(VOLUME, "volume")?;
    let (old, new) = (Cipher::of(&opened.old), Cipher::of(&opened.new));
    for _ in 0..most {
        if opened.boundary == opened.total {
            break;
        }
        let longest = opened.ledger.hotzone_max().unwrap_or(opened.total).min(HOTZONE_BYTES);
        let hot = Extent::new(opened.boundary, (opened.boundary + longest).min(opened.total))
            .expect("something is left");
        // 1.
        let mut bytes = vec![0; usize::try_from(hot.len()).expect("small")];
        volume.read(hot.start(), &mut bytes)?;
        // 2.
        match opened.ledger.protection() {
            Protection::None => {}
            Protection::Checksums(checksum) => {
                let mut sums = vec![0; usize::try_from(checksum.bytes_for(hot.len())).expect("small")];
                engine::crypto::sha256::checksums(
                    checksum.hash,
                    checksum.block_bytes as usize,
                    &bytes,
                    &mut sums,
                );
                opened.ledger.save(hot, &sums)?;
            }
            Protection::Journal { offset, .. } => {
                let mut journal = world.blocking(JOURNAL, "journal")?;
                for (at, block) in (offset..).step_by(4 * BLOCK).zip(bytes.chunks(4 * BLOCK)) {
                    journal.write(at, block)?;
                }
            }
        }
        // 3.
        opened.ledger.begin(hot)?;
        // 4.
        old.decrypt(hot.start(), &mut bytes);
        new.encrypt(hot.start(), &mut bytes);
        for (at, block) in (hot.start()..).step_by(2 * BLOCK).zip(bytes.chunks(2 * BLOCK)) {
            volume.write(at, block)?;
        }
        // 5. and 6.
        volume.flush()?;
        opened.ledger.commit(hot)?;
        opened.boundary = hot.end();
    }
    Ok(())
}

fn explore(name: &str, disks: Vec<(Image, DiskOptions)>, tears: u64) -> Explore {
    Explore { disks, tears, ..Explore::new(name, tests::seed(), Image::default()) }
}

/// An exploration without endings would prove nothing; one case alone, as `SIM_CUT` asks for, is what it is.
fn saw_something(name: &str, summary: Summary) {
    eprintln!("{name}: {summary:?}");
    let whole = std::env::var_os("SIM_CUT").is_none();
    assert!(!whole || (summary.events >= 10 && summary.completed > 0), "{name}: {summary:?}");
}

#[test]
fn no_plaintext_is_lost_wherever_the_power_goes() {
    for trial in trials() {
        let judge = |world: &World, case: &Case| trial.judge(world, case.completed);
        let explore = explore(&trial.name(), trial.disks(), 8);
        let summary = explore.run(|world| trial.run(world), judge);
        saw_something(&trial.name(), summary.unwrap_or_else(|violation| panic!("{violation}")));
    }
}

/// The power goes while a step is written, in every manner; then at every write and flush of the recovery.
#[test]
fn a_recovery_that_is_cut_off_is_done_again() {
    for trial in trials() {
        // How many events there are up to the middle of the second step's data.
        let world = trial.world();
        trial.run_steps(&world, 1).expect("one step");
        let begun = world.events();
        for (beyond, tear) in [(7, 5), (8, 4), (9, 6), (10, 1), (11, 7)] {
            let world = trial.world();
            world.cut_at(Cut { event: begun + beyond, phase: Phase::Middle });
            assert!(trial.run(&world).is_err(), "cut off");
            let found = world.restart(tear).expect("disks");
            let disks: Vec<_> = trial
                .disks()
                .into_iter()
                .enumerate()
                .map(|(at, (_, options))| (found.durable(at), options))
                .collect();
            let name = format!("{}, cut {beyond} events into the second step", trial.name());
            let act = |world: &World| trial.open(world).map(drop);
            let judge = |world: &World, _: &Case| trial.judge(world, false);
            let summary =
                explore(&name, disks, 8).run(act, judge).unwrap_or_else(|violation| panic!("{violation}"));
            eprintln!("{name}: {summary:?}");
        }
    }
}

#[test]
fn errors_of_either_disk_leave_it_to_be_resumed() {
    for trial in trials() {
        for (disk, on, most) in [
            (VOLUME, On::Write, 12),
            (VOLUME, On::Flush, 3),
            (JOURNAL, On::Write, 24),
            (JOURNAL, On::Flush, 14),
        ] {
            let mut fired = 0;
            for nth in 1..=most {
                let world = trial.world();
                world.inject(Fault { disk, on, when: When::Nth(nth), effect: Effect::Fail(5) });
                let failed = trial.run(&world).is_err();
                fired += u64::from(failed);
                world.heal();
                // What a failed flush should have covered may be lost: the machine goes down, as it would with such a disk.
                let world = world.restart(5).expect("disks");
                trial
                    .judge(&world, !failed)
                    .unwrap_or_else(|why| panic!("{} {on:?} {nth}: {why}", trial.name()));
            }
            assert!(fired > 0, "{}: no {on:?} of disk {disk} failed", trial.name());
        }
    }
}

#[test]
fn what_does_not_belong_to_it_is_refused_and_left_alone() {
    let trial = trials().remove(0);
    let world = trial.world();
    trial.run_steps(&world, 1).expect("one step");
    world.settle().expect("settled");
    let before = [world.durable(VOLUME), world.durable(JOURNAL)];
    let [old, new] = trial.keys();
    let refused = |pair: &RawPair, bytes: u64, old: &Secret, new: &Secret| {
        let volume = world.blocking(VOLUME, "volume").expect("a volume");
        let journal = world.blocking(JOURNAL, "journal").expect("a journal");
        let error = sidecar::open(journal, volume, bytes, pair, old, new).err().expect("refused");
        world.settle().expect("settled");
        for (disk, before) in [VOLUME, JOURNAL].into_iter().zip(&before) {
            assert_eq!(world.durable(disk).first_difference(before), None, "something was written");
        }
        error.kind()
    };
    let bytes = VOLUME_BYTES as u64;
    let wrong = secret(0x33, 64);
    assert_eq!(refused(&trial.pair, bytes, &wrong, &new), ErrorKind::WrongKey);
    assert_eq!(refused(&trial.pair, bytes, &old, &wrong), ErrorKind::WrongKey);
    assert_eq!(refused(&trial.pair, bytes, &new, &old), ErrorKind::WrongKey);
    assert_eq!(refused(&trial.pair, bytes - 4096, &old, &new), ErrorKind::Conflict);
    let mut other = trial.pair.clone();
    other.new.tweak_offset = 8;
    assert_eq!(refused(&other, bytes, &old, &new), ErrorKind::Conflict);
    // Nor is a new one begun over one that is under way.
    let journal = world.blocking(JOURNAL, "journal").expect("a journal");
    let volume = world.blocking(VOLUME, "volume").expect("a volume");
    let error = sidecar::begin(journal, volume, &trial.wish(), &old, &new).err().expect("refused");
    assert_eq!(error.kind(), ErrorKind::Conflict);
    // The state of before, put back: the area is of another step, but its superblocks are one whole journal. Its MAC does not tell.
    trial.judge(&world, false).expect("and it goes on");
}

#[test]
fn a_journal_that_was_cut_off_is_refused() {
    for trial in [trials().remove(0), trials().remove(4)] {
        let world = trial.world();
        trial.run_steps(&world, 1).expect("one step");
        let whole = world.visible(JOURNAL).expect("bytes");
        for bytes in [whole.size() - 1, 8192, 8191, 4096, 4095, 512, 511, 16] {
            let mut cut = whole.clone();
            cut.set_size(bytes);
            let other = World::new(4);
            let image = world.visible(VOLUME).expect("bytes");
            other.add(image, DiskOptions::default()).expect("a disk");
            other.add(cut, DiskOptions::default()).expect("a disk");
            let error = trial.run(&other).expect_err("cut off");
            assert_eq!(error.kind(), ErrorKind::Damaged, "{bytes}: {}", error.chain());
            assert_eq!(other.events(), 0, "something was written");
        }
    }
}

#[test]
fn a_file_that_is_something_else_is_left_alone() {
    let trial = trials().remove(0);
    let [old, new] = trial.keys();
    for bytes in
        [vec![0; 8192], vec![0; 1 << 20], b"LUKS\xba\xbe\0\x02".repeat(1024), vec![7; 100], plaintext()]
    {
        let world = trial.world();
        let disk = world.add(Image::of(&bytes), DiskOptions::default()).expect("a disk");
        let journal = || world.blocking(disk, "journal").expect("a journal");
        let volume = || world.blocking(VOLUME, "volume").expect("a volume");
        let opened = sidecar::open(journal(), volume(), VOLUME_BYTES as u64, &trial.pair, &old, &new);
        assert_eq!(opened.err().expect("refused").kind(), ErrorKind::Unsupported);
        let begun = sidecar::begin(journal(), volume(), &trial.wish(), &old, &new);
        assert_eq!(begun.err().expect("refused").kind(), ErrorKind::Unsupported);
        assert_eq!(
            sidecar::plan(&mut journal(), &trial.wish()).expect_err("refused").kind(),
            ErrorKind::Unsupported
        );
        assert_eq!(world.visible(disk).expect("bytes").bytes(0, bytes.len()), bytes);
        assert_eq!(world.events(), 0, "something was written");
    }
}

#[test]
fn the_area_holds_no_old_byte_in_the_end_and_another_program_is_noticed() {
    let trial = trial(raw(64, 512), raw(64, 512), Resilience::Journal, 512);
    let world = trial.world();
    trial.run_steps(&world, 1).expect("one step");
    let old = ciphertext(&trial.pair.old, &trial.keys()[0]);
    let area = |world: &World| {
        world.visible(JOURNAL).expect("bytes").bytes(8192, usize::try_from(HOTZONE_BYTES).expect("small"))
    };
    assert_eq!(area(&world)[..], old[..area(&world).len()], "the journal works");
    let mut opened = trial.open(&world).expect("opens").expect("one is under way");
    let mut other = world.blocking(JOURNAL, "journal").expect("a journal");
    let mut slots = [0; 2 * SLOT_BYTES];
    other.read(0, &mut slots).expect("read");
    other.write(0, &[0; 2 * SLOT_BYTES]).expect("written");
    let hot = Extent::new(opened.boundary, opened.boundary + 4096).expect("not empty");
    assert_eq!(opened.ledger.begin(hot).expect_err("noticed").kind(), ErrorKind::Conflict);
    assert_eq!(opened.ledger.begin(hot).expect_err("and not forgotten").kind(), ErrorKind::Io);
    drop(opened);
    other.write(0, &slots).expect("written");
    trial.run(&world).expect("to the end");
    let blocks = old.chunks(512).collect::<std::collections::HashSet<_>>();
    assert!(area(&world).chunks(512).all(|block| !blocks.contains(block)), "old ciphertext is left");
}

#[test]
fn without_protection_a_crash_is_known_for_a_loss_and_an_early_stop_is_none() {
    let trial = trial(raw(64, 512), raw(64, 4096), Resilience::None, 512);
    let world = trial.world();
    trial.run(&world).expect("runs");
    trial.judge(&world, true).expect("all is new");

    let world = trial.world();
    let [old, new] = trial.keys();
    let journal = world.blocking(JOURNAL, "journal").expect("a journal");
    let volume = world.blocking(VOLUME, "volume").expect("a volume");
    let mut opened = sidecar::begin(journal, volume, &trial.wish(), &old, &new).expect("begun");
    assert_eq!(opened.ledger.hotzone_max(), None);
    let all = Extent::new(0, opened.total).expect("not empty");
    opened.ledger.begin(all).expect("a step over all");
    let failed = trial.open(&world).err().expect("which is old and which is new?");
    assert_eq!(failed.kind(), ErrorKind::Unsupported);
    let mut volume: Blocking = world.blocking(VOLUME, "volume").expect("a volume");
    let done = Extent::new(0, 8192).expect("not empty");
    volume.write(0, &ciphertext(&trial.pair.new, &new)[..8192]).expect("written");
    volume.flush().expect("flushed");
    opened.ledger.commit(done).expect("stopped early");
    drop(opened);
    let opened = trial.open(&world).expect("opens").expect("one is under way");
    assert_eq!(opened.boundary, 8192);
    drop(opened);
    trial.judge(&world, false).expect("and it goes on");
}

#[test]
fn what_would_be_done_is_said_before() {
    let trial = trials().remove(1);
    let world = trial.world();
    let mut journal = world.blocking(JOURNAL, "journal").expect("a journal");
    let planned = sidecar::plan(&mut journal, &Wish::new(&trial.pair, 1 << 30, 4096)).expect("a plan");
    assert_eq!((planned.total, planned.hotzone_max), (1 << 30, Some(64 << 20)));
    assert_eq!(planned.resilience, "checksum");
    let words = [
        "aes-xts-plain, 256-bit key, 512-byte data units",
        "aes-xts-plain64, 512-bit key, 4096-byte data units",
    ];
    assert_eq!(planned.ciphers, words.map(|words| Some(words.to_owned())));
    assert_eq!(world.events(), 0);
    let [old, new] = trial.keys();
    for (bytes, pair, kind) in
        [(0, &trial.pair, ErrorKind::Invalid), ((1 << 30) + 512, &trial.pair, ErrorKind::Invalid)]
    {
        let error = sidecar::plan(&mut journal, &Wish::new(pair, bytes, 512)).expect_err("refused");
        assert_eq!(error.kind(), kind, "{bytes}");
    }
    let same = RawPair { new: trial.pair.old.clone(), ..trial.pair.clone() };
    let volume = world.blocking(VOLUME, "volume").expect("a volume");
    let error =
        sidecar::begin(journal, volume, &Wish::new(&same, 1 << 20, 512), &old, &old).err().expect("refused");
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert_ne!(old, new);
    assert_eq!(world.events(), 0);
}

/// The volume on which something was begun, and its journal beside another one under the same keys.
#[test]
fn the_journal_of_another_volume_is_refused_and_nothing_is_written() {
    for trial in trials() {
        // At rest at the beginning and in the middle; in the first step, in the second, in the last.
        let world = trial.world();
        trial.run_steps(&world, 0).expect("begun");
        let begun = world.events();
        for (steps, beyond) in [(0, 0), (1, 0), (2, 0), (0, 6), (1, 6), (2, 6)] {
            let world = trial.world();
            trial.run_steps(&world, steps).expect("some steps");
            if beyond > 0 {
                world.cut_at(Cut { event: world.events() + beyond + 2, phase: Phase::Middle });
                assert!(trial.run(&world).is_err(), "cut off");
            }
            let world = world.restart(5).expect("disks");
            assert!(begun > 0);
            let (volume, journal) = (world.durable(VOLUME), world.durable(JOURNAL));
            let noise: Vec<u8> = plaintext().iter().rev().map(|byte| byte ^ 0x5a).collect();
            let untouched = Image::of(&ciphertext(&trial.pair.old, &trial.keys()[0]));
            let same = untouched.first_difference(&volume).is_none();
            for (what, other) in [("another", Image::of(&noise)), ("of before", untouched)] {
                if what == "of before" && (same || steps == 0) {
                    continue;
                }
                let world = World::new(4);
                for (image, (_, options)) in [other.clone(), journal.clone()].into_iter().zip(trial.disks()) {
                    world.add(image, options).expect("a disk");
                }
                let place = format!("{}, {steps} steps and {beyond}: {what}", trial.name());
                let error = trial.open(&world).err().unwrap_or_else(|| panic!("{place}: believed"));
                assert_eq!(error.kind(), ErrorKind::Conflict, "{place}: {}", error.chain());
                assert_eq!(world.events(), 0, "{place}: something was written");
            }
            trial.judge(&world, false).expect("its own");
        }
    }
}

/// One hotzone over everything: nothing lies around it.
#[test]
fn another_volume_is_known_within_a_step_over_all_of_it() {
    for trial in trials() {
        let world = trial.world();
        let [old, new] = trial.keys();
        let wish = Wish { hotzone_bytes: None, ..trial.wish() };
        let disk = |at, name| world.blocking(at, name).expect("a disk");
        let begun = sidecar::begin(disk(JOURNAL, "journal"), disk(VOLUME, "volume"), &wish, &old, &new);
        let mut opened = begun.expect("begun");
        let all = Extent::new(0, VOLUME_BYTES as u64).expect("not empty");
        let bytes = ciphertext(&trial.pair.old, &old);
        match opened.ledger.protection() {
            Protection::Checksums(checksum) => {
                let mut sums = vec![0; usize::try_from(checksum.bytes_for(all.len())).expect("small")];
                let block = checksum.block_bytes as usize;
                engine::crypto::sha256::checksums(checksum.hash, block, &bytes, &mut sums);
                opened.ledger.save(all, &sums).expect("saved");
            }
            Protection::Journal { offset, .. } => {
                disk(JOURNAL, "journal").write(offset, &bytes).expect("written");
            }
            Protection::None => unreachable!("all of them are protected"),
        }
        opened.ledger.begin(all).expect("begun");
        drop(opened);
        disk(VOLUME, "volume").write(0, &plaintext()).expect("another volume");
        let events = world.events();
        let error = trial.open(&world).err().expect("refused");
        assert_eq!((error.kind(), world.events()), (ErrorKind::Conflict, events), "{}", error.chain());
        // Half old, half new: its own.
        let half = VOLUME_BYTES / 2;
        let new = ciphertext(&trial.pair.new, &new);
        disk(VOLUME, "volume").write(0, &[&new[..half], &bytes[half..]].concat()).expect("its own");
        trial.judge(&world, false).expect("recovered");
    }
}

/// What is seen of a program that was killed is not durable before it was written and flushed again.
#[test]
fn what_is_opened_is_durable_before_anything_else_is_written() {
    let trial = trials().remove(0);
    let world = trial.world();
    trial.run_steps(&world, 1).expect("one step");
    let before = world.durable(JOURNAL).bytes(0, 2 * SLOT_BYTES);
    assert_ne!(before[..SLOT_BYTES], before[SLOT_BYTES..], "the second copy is not durable");
    let seen = world.visible(JOURNAL).expect("bytes").bytes(0, 2 * SLOT_BYTES);
    let events = world.events();
    drop(trial.open(&world).expect("opens"));
    assert_eq!(world.events() - events, 4, "two writes, two flushes, though both slots look right");
    assert_eq!(world.durable(JOURNAL).bytes(0, 2 * SLOT_BYTES), seen);
}
