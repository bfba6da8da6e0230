//! Header operations on disks that lose power: cut at every write and every flush, with what was not durable lost, kept or torn.
//!
//! Whatever happens, the volume opens with every passphrase of before or with every passphrase of after, and the operation
//! can be done again. `SIM_SEED` and `SIM_CUT`, as a failing case prints them, run that case alone.

use std::sync::OnceLock;

use engine::backend::blocking::Blocking;
use engine::backend::sim::explore::{Case, Explore, Summary, Violation};
use engine::backend::sim::image::Image;
use engine::backend::sim::{DiskOptions, Effect, Fault, On, When, World};
use engine::crypto::Secret;
use engine::error::{ErrorKind, Result};
use engine::format::luks2::Health;
use engine::format::luks2::metadata::{Digest, Segment};
use engine::volume::backup::{self, Backup};
use engine::volume::create::{self, NewHeader, Place};
use engine::volume::keyslots::{self, Proof};
use engine::volume::{Header, repair, store, tokens, unlock};
use proto::luks::{KdfKind, KdfWish, New, Version};
use serde_json::json;

const ALICE: &str = "alice's passphrase";
const BOB: &str = "bob's passphrase";
const CAROL: &str = "carol's passphrase";

/// The disk of a volume and, where there is one, that of its backup.
const VOLUME: usize = 0;
const BACKUP: usize = 1;

/// Bytes of a test volume: its header, and a little data.
const VOLUME_BYTES: u64 = 3 << 20;

/// What a failing disk says.
const EIO: i32 = 5;

const VERSIONS: [Version; 2] = [Version::Luks1, Version::Luks2];

fn secret(text: &str) -> Secret {
    Secret::copy_of(text.as_bytes()).expect("memory")
}

fn stay() -> bool {
    false
}

/// The cheapest there is.
fn cheap(version: Version) -> KdfWish {
    match version {
        Version::Luks1 => KdfWish { iterations: Some(1000), ..KdfWish::default() },
        Version::Luks2 => KdfWish {
            kind: Some(KdfKind::Argon2id),
            iterations: Some(4),
            memory_kib: Some(32),
            lanes: Some(1),
            ..KdfWish::default()
        },
    }
}

/// A header with ALICE in keyslot 0, small: four areas of LUKS2 keyslots.
fn new_header(version: Version) -> NewHeader {
    let luks2 = version == Version::Luks2;
    let new = New {
        version,
        cipher: None,
        key_bytes: Some(32),
        data_unit: None,
        hash: None,
        label: None,
        subsystem: None,
        uuid: None,
        data_offset: luks2.then_some(2 << 20),
        metadata_bytes: None,
        keyslots_bytes: luks2.then_some(4 * (128 << 10)),
        kdf: cheap(version),
        keyslot: None,
        volume_key_fd: None,
        header: None,
    };
    let place = Place { detached: false, header_capacity: None, data_capacity: None, align: 512 };
    create::make(&new, &place, &secret(ALICE), None).expect("a header")
}

fn add(device: &mut Blocking, opens: &str, new: &str, keyslot: Option<u32>) -> Result<()> {
    let wish = match Header::load(device)? {
        Header::Luks1(_) => cheap(Version::Luks1),
        Header::Luks2(_) => cheap(Version::Luks2),
    };
    keyslots::add(device, Proof::Passphrase(secret(opens)), &secret(new), keyslot, &wish, &stay).map(drop)
}

/// A volume with these passphrases beside ALICE's, and what a test does to it.
fn volume_with(version: Version, others: &[(&str, u32)], then: impl FnOnce(&mut Blocking)) -> Image {
    static BASES: [OnceLock<Image>; 2] = [OnceLock::new(), OnceLock::new()];
    let base = &BASES[usize::from(version == Version::Luks2)];
    let image = base.get_or_init(|| {
        let world = disk(Image::zeros(VOLUME_BYTES));
        let mut device = world.blocking(VOLUME, "volume").expect("blocking");
        new_header(version).write(&mut device).expect("written");
        world.durable(VOLUME)
    });
    let world = disk(image.clone());
    let mut device = world.blocking(VOLUME, "volume").expect("blocking");
    for (passphrase, keyslot) in others {
        add(&mut device, ALICE, passphrase, Some(*keyslot)).expect("added");
    }
    then(&mut device);
    device.flush().expect("flushed");
    world.durable(VOLUME)
}

fn volume(version: Version, others: &[(&str, u32)]) -> Image {
    volume_with(version, others, |_| ())
}

fn disk(image: Image) -> World {
    let world = World::new(1);
    world.add(image, DiskOptions::default()).expect("a disk");
    world
}

fn opens(device: &mut Blocking, passphrase: &str) -> Result<bool, String> {
    let header = Header::load(device).map_err(|error| format!("no header: {}", error.chain()))?;
    match unlock::with_passphrase(device, &header, &secret(passphrase), None, &stay) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.kind(), ErrorKind::WrongKey | ErrorKind::NotFound) => Ok(false),
        Err(error) => Err(format!("cannot try {passphrase}: {}", error.chain())),
    }
}

/// Does each of these open it?
fn all_open(device: &mut Blocking, passphrases: &[&str]) -> Result<bool, String> {
    for passphrase in passphrases {
        if !opens(device, passphrase)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// An operation, and what it is to achieve.
struct Trial<'a> {
    name: String,
    volume: Image,
    backup: Option<Image>,
    /// Do it: on a whole volume, and again after a cut.
    act: &'a dyn Fn(&World) -> Result<()>,
    /// Passphrases of before.
    old: &'a [&'a str],
    /// Passphrases of after.
    new: &'a [&'a str],
    /// Passphrases that must open nothing afterwards.
    gone: &'a [&'a str],
    /// Something else that must be so afterwards.
    after: &'a dyn Fn(&mut Blocking) -> Result<(), String>,
}

impl Trial<'_> {
    fn explore(&self, options: DiskOptions) -> Explore {
        let mut disks = vec![(self.volume.clone(), options)];
        disks.extend(self.backup.clone().map(|image| (image, DiskOptions::default())));
        Explore { disks, ..Explore::new(&self.name, tests::seed(), Image::default()) }
    }

    fn run(&self) {
        // As a page cache tears, and as a disk with large sectors and direct I/O does.
        let large = DiskOptions { sector_bytes: 4096, alignment: 4096, ..DiskOptions::default() };
        for (options, tears) in [(DiskOptions::default(), 8), (large, 4)] {
            let explore = Explore { tears, ..self.explore(options) };
            let summary = explore
                .run(self.act, |world, case| self.judge(world, case))
                .unwrap_or_else(|violation| panic!("{violation}"));
            saw_something(&self.name, summary);
        }
    }

    /// The disk as it is found: one whole set of passphrases works; then all of it again.
    fn judge(&self, world: &World, case: &Case) -> Result<(), String> {
        let mut device = world.blocking(VOLUME, "volume").map_err(|error| error.chain())?;
        let is_new = all_open(&mut device, self.new)?;
        if case.completed {
            self.achieved(&mut device).map_err(|why| format!("it was reported as done, but {why}"))?;
        } else if !is_new && !all_open(&mut device, self.old)? {
            return Err("neither all old nor all new passphrases open it".to_owned());
        }
        drop(device);
        self.again(world)
    }

    fn achieved(&self, device: &mut Blocking) -> Result<(), String> {
        for passphrase in self.new {
            if !opens(device, passphrase)? {
                return Err(format!("{passphrase} does not open it"));
            }
        }
        for passphrase in self.gone {
            if opens(device, passphrase)? {
                return Err(format!("{passphrase} still opens it"));
            }
        }
        if let Header::Luks2(loaded) = Header::load(device).map_err(|error| error.chain())?
            && loaded.health != [Health::Good, Health::Good]
        {
            return Err(format!("its copies are {:?}", loaded.health));
        }
        (self.after)(device)
    }

    /// Done again it succeeds, or refuses because it is done already; a header that a cut left with one good copy, a repair
    /// makes whole.
    fn again(&self, world: &World) -> Result<(), String> {
        let outcome = (self.act)(world);
        let mut device = world.blocking(VOLUME, "volume").map_err(|error| error.chain())?;
        repair::repair(&mut device, false).map_err(|error| format!("repair: {}", error.chain()))?;
        match outcome {
            Ok(()) => self.achieved(&mut device).map_err(|why| format!("done again, {why}")),
            Err(error) => self
                .achieved(&mut device)
                .map_err(|why| format!("not done again ({}), and {why}", error.chain())),
        }
    }
}

/// An exploration without endings would prove nothing; one case alone, as `SIM_CUT` asks for, is what it is.
fn saw_something(name: &str, summary: Summary) {
    eprintln!("{name}: {summary:?}");
    let whole = std::env::var_os("SIM_CUT").is_none();
    assert!(!whole || (summary.events >= 2 && summary.completed > 0), "{name}: {summary:?}");
}

fn nothing(_: &mut Blocking) -> Result<(), String> {
    Ok(())
}

fn on_volume(act: impl Fn(&mut Blocking) -> Result<()>) -> impl Fn(&World) -> Result<()> {
    move |world| act(&mut world.blocking(VOLUME, "volume")?)
}

/// A trial without a backup.
fn trial<'a>(
    name: String,
    volume: Image,
    act: &'a dyn Fn(&World) -> Result<()>,
    [old, new, gone]: [&'a [&'a str]; 3],
) -> Trial<'a> {
    Trial { name, volume, backup: None, act, old, new, gone, after: &nothing }
}

#[test]
fn a_keyslot_is_added_or_not() {
    for version in VERSIONS {
        let act = on_volume(|device| add(device, ALICE, BOB, None));
        let old = volume(version, &[]);
        trial(format!("add to {version:?}"), old, &act, [&[ALICE], &[ALICE, BOB], &[CAROL]]).run();
    }
}

#[test]
fn luks1_keyslots_that_lie_across_and_behind_the_first_sector_are_added_or_not() {
    for keyslot in [5, 6, 7] {
        let act = on_volume(|device| add(device, ALICE, BOB, Some(keyslot)));
        let old = volume(Version::Luks1, &[(CAROL, 3)]);
        let sets: [&[&str]; 3] = [&[ALICE, CAROL], &[ALICE, BOB, CAROL], &[]];
        trial(format!("add keyslot {keyslot}"), old, &act, sets).run();
    }
}

#[test]
fn a_removed_keyslot_leaves_the_others() {
    for (version, id) in [(Version::Luks1, 1), (Version::Luks1, 6), (Version::Luks1, 7), (Version::Luks2, 1)]
    {
        let act = on_volume(|device| keyslots::remove(device, None, Some(id), false, &stay).map(drop));
        let old = volume(version, &[(BOB, id)]);
        let sets: [&[&str]; 3] = [&[ALICE, BOB], &[ALICE], &[BOB]];
        trial(format!("remove keyslot {id} of {version:?}"), old, &act, sets).run();
    }
}

#[test]
fn a_changed_passphrase_is_the_old_one_or_the_new_one() {
    for version in VERSIONS {
        let act = on_volume(|device| {
            keyslots::change(device, &secret(ALICE), &secret(BOB), None, &cheap(version), &stay).map(drop)
        });
        // Alone, so that nothing else opens it; and beside another, in keyslots that hit every case of LUKS1's two sectors.
        trial(format!("change {version:?}"), volume(version, &[]), &act, [&[ALICE], &[BOB], &[ALICE]]).run();
        let old = volume(version, &[(CAROL, 2)]);
        let sets: [&[&str]; 3] = [&[ALICE, CAROL], &[BOB, CAROL], &[ALICE]];
        trial(format!("change {version:?} beside another"), old, &act, sets).run();
    }
}

#[test]
fn a_luks1_passphrase_moves_to_and_from_the_keyslot_across_the_sectors() {
    for (from, full) in [(6, &[][..]), (7, &[]), (1, &[2, 3, 4, 5]), (1, &[2, 3, 4, 5, 6])] {
        let mut others = vec![(BOB, from)];
        others.extend(full.iter().map(|&id| (ALICE, id)));
        let act = on_volume(|device| {
            let wish = cheap(Version::Luks1);
            match keyslots::change(device, &secret(BOB), &secret(CAROL), None, &wish, &stay) {
                // Cut in two, the change holds the last free keyslot: what is left of it is to remove the old one.
                Err(error) if error.kind() == ErrorKind::Conflict => {
                    let header = Header::load(device)?;
                    unlock::with_passphrase(device, &header, &secret(CAROL), None, &stay)?;
                    keyslots::remove(device, None, Some(from), false, &stay).map(drop)
                }
                other => other.map(drop),
            }
        });
        let sets: [&[&str]; 3] = [&[ALICE, BOB], &[ALICE, CAROL], &[BOB]];
        trial(format!("change from keyslot {from}"), volume(Version::Luks1, &others), &act, sets).run();
    }
}

#[test]
fn a_change_that_fails_in_its_second_half_says_that_the_new_passphrase_opens_already() {
    for version in VERSIONS {
        let others = [(BOB, 1), (CAROL, 2)];
        let mut named = 0;
        for nth in 1.. {
            let world = disk(volume(version, &others));
            let fault =
                Fault { disk: VOLUME, on: On::Write, when: When::Nth(nth), effect: Effect::Fail(EIO) };
            world.inject(fault);
            let mut device = world.blocking(VOLUME, "volume").expect("blocking");
            let wish = cheap(version);
            let outcome = keyslots::change(&mut device, &secret(ALICE), &secret("new"), None, &wish, &stay);
            world.heal();
            let is_new = opens(&mut device, "new").expect("tried");
            let Err(error) = outcome else {
                assert!(is_new);
                break;
            };
            assert_eq!(error.kind(), ErrorKind::Io);
            let says = error.chain().contains("opens keyslot 3, but keyslot 0");
            // Of LUKS2, the header with the new keyslot may be there before its second copy fails to be written.
            assert!(!says || is_new, "{version:?}, write {nth}: {}", error.chain());
            named += u32::from(says);
            assert!(all_open(&mut device, &[BOB, CAROL]).expect("tried"));
            assert!(is_new || opens(&mut device, ALICE).expect("tried"), "{version:?}, write {nth}");
        }
        assert!(named >= 2, "{version:?}: {named} errors name the keyslot");
    }
}

#[test]
fn the_last_keyslot_of_one_segment_is_not_spared_by_that_of_another() {
    let image = volume_with(Version::Luks2, &[(BOB, 1)], |device| {
        let Header::Luks2(mut loaded) = Header::load(device).expect("loads") else { panic!("LUKS1") };
        let metadata = &mut loaded.header.metadata;
        let first = metadata.segments.get_mut(&0).expect("a segment");
        first.size = Some(512 << 10);
        let second = Segment { offset: first.offset + (512 << 10), size: None, ..first.clone() };
        metadata.segments.insert(1, second);
        let digest = metadata.digests.get_mut(&0).expect("a digest");
        let other = Digest { keyslots: vec![1], segments: vec![1], ..digest.clone() };
        (digest.keyslots, digest.segments) = (vec![0], vec![0]);
        metadata.digests.insert(1, other);
        store::write_luks2(device, &mut loaded).expect("written");
    });
    for id in [0, 1] {
        let world = disk(image.clone());
        let mut device = world.blocking(VOLUME, "volume").expect("blocking");
        let error = keyslots::remove(&mut device, None, Some(id), false, &stay).expect_err("the last one");
        assert_eq!(error.kind(), ErrorKind::Conflict, "{}", error.chain());
        assert!(error.to_failure().hint.is_some_and(|hint| hint.contains("--last-key-destroy-data")));
        assert!(world.durable(VOLUME).bytes(0, 3 << 20) == image.bytes(0, 3 << 20));
        keyslots::remove(&mut device, None, Some(id), true, &stay).expect("on request");
    }
}

#[test]
fn a_converted_keyslot_opens_throughout() {
    let wishes = [
        (Version::Luks1, KdfWish { iterations: Some(1500), ..KdfWish::default() }),
        (
            Version::Luks2,
            KdfWish { kind: Some(KdfKind::Pbkdf2), iterations: Some(1000), ..KdfWish::default() },
        ),
    ];
    for (version, wish) in wishes {
        let act = on_volume(|device| keyslots::convert(device, &secret(ALICE), None, &wish, &stay).map(drop));
        trial(format!("convert {version:?}"), volume(version, &[]), &act, [&[ALICE], &[ALICE], &[BOB]]).run();
    }
}

#[test]
fn an_erased_volume_stays_erasable() {
    for version in VERSIONS {
        let act = on_volume(|device| keyslots::erase(device, true).map(drop));
        let old = volume(version, &[(BOB, 1)]);
        // Nothing is to open afterwards, so every ending is one of before or of after; but there is always a header.
        trial(format!("erase {version:?}"), old, &act, [&[ALICE, BOB], &[], &[ALICE, BOB]]).run();
    }
}

#[test]
fn tokens_come_and_go_and_every_passphrase_stays() {
    let token = json!({ "type": "test-token", "keyslots": ["0"], "anything": "else" });
    let count = |device: &mut Blocking| tokens::list(device).expect("tokens").len();
    let act = on_volume(|device| match tokens::add(device, &token, Some(3), true) {
        Ok(done) if done.token == Some(3) => Ok(()),
        Ok(done) => panic!("{done:?}"),
        Err(error) => Err(error),
    });
    let sets: [&[&str]; 3] = [&[ALICE, BOB], &[ALICE, BOB], &[CAROL]];
    let old = volume(Version::Luks2, &[(BOB, 1)]);
    let there =
        |device: &mut Blocking| if count(device) == 1 { Ok(()) } else { Err("the token is missing".into()) };
    Trial { after: &there, ..trial("token add".to_owned(), old, &act, sets) }.run();

    let act = on_volume(|device| tokens::remove(device, 3).map(drop));
    let old = volume_with(Version::Luks2, &[(BOB, 1)], |device| {
        tokens::add(device, &token, Some(3), false).map(drop).expect("added");
    });
    let gone =
        |device: &mut Blocking| if count(device) == 0 { Ok(()) } else { Err("the token is there".into()) };
    Trial { after: &gone, ..trial("token remove".to_owned(), old, &act, sets) }.run();
}

#[test]
fn a_damaged_copy_is_repaired_and_the_good_one_untouched() {
    for (name, damaged) in [("primary", 0u64), ("secondary", 16 << 10)] {
        let old = volume_with(Version::Luks2, &[(BOB, 1)], |device| {
            device.write(damaged + 100, b"damage").expect("written");
        });
        let act = on_volume(|device| repair::repair(device, false).map(drop));
        let sets: [&[&str]; 3] = [&[ALICE, BOB], &[ALICE, BOB], &[CAROL]];
        trial(format!("repair the {name} copy"), old, &act, sets).run();
    }
}

#[test]
fn changes_of_a_header_with_one_good_copy_keep_that_until_the_other_is_good() {
    for (name, damaged) in [("primary", 0u64), ("secondary", 16 << 10)] {
        let old = volume_with(Version::Luks2, &[], |device| {
            device.write(damaged + 100, b"damage").expect("written");
        });
        let act = on_volume(|device| {
            keyslots::change(device, &secret(ALICE), &secret(BOB), None, &cheap(Version::Luks2), &stay)
                .map(drop)
        });
        trial(format!("change beside a damaged {name} copy"), old, &act, [&[ALICE], &[BOB], &[ALICE]]).run();
    }
}

/// What `save` makes of a volume.
fn backup_of(volume: &Image) -> Image {
    let world = disk(volume.clone());
    let backup = world.add(Image::zeros(0), DiskOptions::default()).expect("a disk");
    let mut device = world.blocking(VOLUME, "volume").expect("blocking");
    let mut file = world.blocking(backup, "backup").expect("blocking");
    backup::save(&mut device, &mut file).expect("saved");
    world.durable(backup)
}

fn restore(world: &World, allow_other: bool) -> Result<()> {
    let mut file = world.blocking(BACKUP, "backup")?;
    let file_bytes = world.visible(BACKUP)?.size();
    let mut device = world.blocking(VOLUME, "volume")?;
    let backup = Backup { file: &mut file, file_bytes };
    backup::restore(&mut device, None, backup, allow_other, &stay).map(drop)
}

/// ALICE and BOB in the backup; since then BOB was removed, ALICE changed to CAROL, so that places are reused.
fn moved_on(version: Version) -> (Image, Image) {
    let before = volume(version, &[(BOB, 1)]);
    let world = disk(before.clone());
    let mut device = world.blocking(VOLUME, "volume").expect("blocking");
    keyslots::remove(&mut device, None, Some(1), false, &stay).expect("removed");
    keyslots::change(&mut device, &secret(ALICE), &secret(CAROL), None, &cheap(version), &stay)
        .expect("changed");
    drop(device);
    (backup_of(&before), world.durable(VOLUME))
}

#[test]
fn a_restored_header_opens_with_the_set_of_before_or_of_the_backup() {
    for version in VERSIONS {
        let (backup, old) = moved_on(version);
        let act = |world: &World| restore(world, false);
        let sets: [&[&str]; 3] = [&[CAROL], &[ALICE, BOB], &[CAROL]];
        let trial = trial(format!("restore {version:?}"), old, &act, sets);
        Trial { backup: Some(backup), ..trial }.run();
    }
}

/// LUKS1, with these keyslots and no other.
fn only(slots: &[(&str, u32)]) -> Image {
    volume_with(Version::Luks1, slots, |device| {
        if slots.iter().all(|(_, id)| *id != 0) {
            keyslots::remove(device, None, Some(0), false, &stay).map(drop).expect("removed");
        }
    })
}

#[test]
fn a_luks1_restore_keeps_what_opens_across_both_sectors() {
    // Keyslots of the backup, keyslots of the volume. Of 6 a part, and all of 7, lie in the second sector.
    type Slots = &'static [(&'static str, u32)];
    let cases: [(Slots, Slots); 9] = [
        (&[(ALICE, 1)], &[(CAROL, 6)]),
        (&[(ALICE, 1)], &[(CAROL, 7)]),
        (&[(ALICE, 6)], &[(CAROL, 1)]),
        (&[(ALICE, 7)], &[(CAROL, 1)]),
        (&[(ALICE, 6)], &[(CAROL, 6)]),
        (&[(ALICE, 7)], &[(CAROL, 7)]),
        (&[(ALICE, 6)], &[(CAROL, 7)]),
        (&[(ALICE, 7)], &[(CAROL, 6)]),
        (&[(ALICE, 6), (BOB, 7)], &[(CAROL, 6), ("dave's passphrase", 7)]),
    ];
    for (backup, now) in cases {
        let names = |slots: Slots| slots.iter().map(|slot| slot.0).collect::<Vec<_>>();
        let (new, old) = (names(backup), names(now));
        let act = |world: &World| restore(world, false);
        let trial = trial(format!("restore {backup:?} over {now:?}"), only(now), &act, [&old, &new, &old]);
        Trial { backup: Some(backup_of(&only(backup))), ..trial }.run();
    }
}

#[test]
fn a_restore_over_a_ruin_can_be_done_again() {
    for version in VERSIONS {
        let (backup, old) = moved_on(version);
        let world = disk(old);
        let mut device = world.blocking(VOLUME, "volume").expect("blocking");
        device.write(0, &[0xff; 32 << 10]).expect("both copies are gone");
        device.flush().expect("flushed");
        let explore = Explore {
            disks: vec![(world.durable(VOLUME), DiskOptions::default()), (backup, DiskOptions::default())],
            ..Explore::new(&format!("restore a ruined {version:?}"), tests::seed(), Image::default())
        };
        let act = |world: &World| restore(world, true);
        let judge = |world: &World, case: &Case| {
            if !case.completed {
                act(world).map_err(|error| format!("not done again: {}", error.chain()))?;
            }
            let mut device = world.blocking(VOLUME, "volume").map_err(|error| error.chain())?;
            match all_open(&mut device, &[ALICE, BOB])? {
                true => Ok(()),
                false => Err("the passphrases of the backup do not open it".to_owned()),
            }
        };
        let summary = explore.run(act, judge).unwrap_or_else(|violation| panic!("{violation}"));
        saw_something(&explore.name, summary);
    }
}

#[test]
fn a_saved_backup_is_whole_once_it_is_reported() {
    for version in VERSIONS {
        let old = volume(version, &[(BOB, 1)]);
        let whole = backup_of(&old);
        let explore = Explore {
            disks: vec![(old.clone(), DiskOptions::default()), (Image::zeros(0), DiskOptions::default())],
            ..Explore::new(&format!("back up {version:?}"), tests::seed(), Image::default())
        };
        let act = |world: &World| {
            let mut device = world.blocking(VOLUME, "volume")?;
            backup::save(&mut device, &mut world.blocking(BACKUP, "backup")?).map(drop)
        };
        let summary = explore.run(act, |world, case| {
            let untouched = world.durable(VOLUME) == old;
            let saved = !case.completed || world.durable(BACKUP) == whole;
            if untouched && saved { Ok(()) } else { Err(format!("untouched {untouched}, saved {saved}")) }
        });
        saw_something(&explore.name, summary.unwrap_or_else(|violation| panic!("{violation}")));
    }
}

/// Is there a header, and does ALICE open it if so? A torn LUKS2 copy says that it is damaged, which is true.
fn opens_if_there(device: &mut Blocking, version: Version) -> Result<bool, String> {
    match Header::load(device) {
        Err(error) if error.kind() == ErrorKind::Unsupported => Ok(false),
        Err(error) if error.kind() == ErrorKind::Damaged && version == Version::Luks2 => Ok(false),
        _ if opens(device, ALICE)? => Ok(true),
        _ => Err("there is a header that its passphrase does not open".to_owned()),
    }
}

#[test]
fn a_new_header_is_there_as_a_whole_or_not_at_all() {
    for version in VERSIONS {
        let new = new_header(version);
        // What was there before: nothing, or bytes of somebody else's.
        for (name, before) in
            [("blank", Image::zeros(VOLUME_BYTES)), ("used", Image::of(&vec![0x5a; 3 << 20]))]
        {
            let explore =
                Explore::new(&format!("create {version:?} on a {name} disk"), tests::seed(), before);
            let act = on_volume(|device| new.write(device));
            let judge = |world: &World, case: &Case| {
                let mut device = world.blocking(VOLUME, "volume").map_err(|error| error.chain())?;
                if !opens_if_there(&mut device, version)? && case.completed {
                    return Err("it was reported as written and is not there".to_owned());
                }
                new.write(&mut device).map_err(|error| error.chain())?;
                if opens(&mut device, ALICE)? {
                    Ok(())
                } else {
                    Err("written again it does not open".to_owned())
                }
            };
            let summary = explore.run(act, judge).unwrap_or_else(|violation| panic!("{violation}"));
            saw_something(&explore.name, summary);
        }
    }
}

#[test]
fn an_old_header_is_gone_once_it_is_cleared() {
    for (old, new) in [(Version::Luks1, Version::Luks2), (Version::Luks2, Version::Luks1)] {
        let made = new_header(new);
        let explore = Explore::new(&format!("clear {old:?}"), tests::seed(), volume(old, &[(BOB, 1)]));
        let act = on_volume(|device| made.clear(device));
        let judge = |world: &World, case: &Case| {
            let mut device = world.blocking(VOLUME, "volume").map_err(|error| error.chain())?;
            if case.completed && Header::load(&mut device).is_ok() {
                return Err("a cleared header is there".to_owned());
            }
            made.clear(&mut device).and_then(|()| made.write(&mut device)).map_err(|error| error.chain())?;
            if opens(&mut device, ALICE)? { Ok(()) } else { Err("the new header does not open".to_owned()) }
        };
        let summary = explore.run(act, judge).unwrap_or_else(|violation| panic!("{violation}"));
        saw_something(&explore.name, summary);
    }
}

/// Explore a wrong way to change a passphrase: it must be found out.
fn caught(name: &str, volume: Image, act: &dyn Fn(&mut Blocking) -> Result<()>) -> Violation {
    let act = on_volume(act);
    let trial = trial(name.to_owned(), volume, &act, [&[ALICE], &[BOB], &[]]);
    let judge = |world: &World, _: &Case| {
        let mut device = world.blocking(VOLUME, "volume").map_err(|error| error.chain())?;
        let one = all_open(&mut device, trial.old)? || all_open(&mut device, trial.new)?;
        if one { Ok(()) } else { Err("neither opens it".to_owned()) }
    };
    // Many tears: that a wrong order shows is a matter of chance, and the chance of missing it must be next to none.
    let explore = Explore { tears: 64, ..trial.explore(DiskOptions::default()) };
    explore.run(trial.act, judge).expect_err("a wrong order of writes is found out")
}

#[test]
fn wrong_orders_of_writes_are_found_out() {
    // In place: the old material is destroyed before there is new.
    for version in VERSIONS {
        let old = volume(version, &[]);
        let violation = caught("remove, then add", old.clone(), &|device| {
            let header = Header::load(device)?;
            let key = unlock::with_passphrase(device, &header, &secret(ALICE), None, &stay)?.key;
            keyslots::remove(device, None, Some(0), true, &stay)?;
            let wish = cheap(version);
            keyslots::add(device, Proof::VolumeKey(key), &secret(BOB), None, &wish, &stay).map(drop)
        });
        assert_eq!(violation.message, "neither opens it");
    }

    // Both copies of a LUKS2 header without a flush between them. Of a change of the counter alone nothing could be torn: a
    // token changes the JSON too.
    let token = json!({ "type": "test-token", "keyslots": ["0"] });
    let changed = volume_with(Version::Luks2, &[], |device| {
        tokens::add(device, &token, None, false).map(drop).expect("added");
    });
    let old = volume(Version::Luks2, &[]);
    let violation = caught("both copies at once", old, &|device| {
        device.write(0, &changed.bytes(0, 32 << 10))?;
        device.flush()
    });
    assert!(violation.message.contains("no header"), "{violation}");

    // The header before the material it points to is durable: the new keyslot's bytes are taken from a volume where it is whole.
    let changed = volume_with(Version::Luks1, &[], |device| {
        keyslots::change(device, &secret(ALICE), &secret(BOB), None, &cheap(Version::Luks1), &stay)
            .map(drop)
            .expect("changed");
    });
    let old = volume(Version::Luks1, &[]);
    let violation = caught("header before material", old, &|device| {
        let world = disk(changed.clone());
        let Header::Luks1(header) = Header::load(&mut world.blocking(VOLUME, "changed")?)? else {
            panic!("LUKS1")
        };
        let offset = header.keyslots[1].material_offset();
        device.write(offset, &changed.bytes(offset, 128_000))?;
        // No flush.
        store::replace_luks1(device, &header)
    });
    assert_eq!(violation.message, "neither opens it");
}
