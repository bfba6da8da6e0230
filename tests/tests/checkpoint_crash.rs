//! Copies with a checkpoint on simulated disks that lose their power: at every write and flush of sink and checkpoint, with
//! what was not durable lost, kept or torn; then again while they go on; then to the end, and every byte is compared.
//!
//! One worker moves the data and the job's thread writes the checkpoints, so that which of the two comes first is the
//! scheduler's choice: a case is named by its event, and what it meets there may differ from run to run.

use std::fs::File;
use std::io::Read;
use std::sync::Arc;

use engine::backend::sim::image::Image;
use engine::backend::sim::{Cut, DiskOptions, Options, Phase, World};
use engine::job::Registry;
use proto::luks::{Open, Secret, Version};
use proto::{Action, ErrorKind, Format, JobInfo, JobState};
use tests::Random;
use tests::jobs::{MIB, Request, encrypted, failure, new_luks, noise, registry, wait};

const SOURCE: usize = 0;
const SINK: usize = 1;
const CHECKPOINT: usize = 2;

/// What is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Copy {
    Encrypt,
    Decrypt,
    Luks(Version),
}

const PASSPHRASE: &[u8] = b"correct horse";

/// Zeros in the middle, so that a decrypted file has a hole.
fn plain() -> Vec<u8> {
    let mut plain = noise(MIB + 1536, 5);
    plain[256 << 10..512 << 10].fill(0);
    plain
}

fn world(copy: Copy, seed: u64) -> World {
    let world = World::with(seed, Options { short_per_mille: 100, ..Options::default() });
    let source = if copy == Copy::Decrypt { encrypted(&plain(), 512) } else { plain() };
    for image in [Image::of(&source), Image::zeros(0), Image::zeros(0)] {
        world.add(image, DiskOptions::default()).expect("a disk");
    }
    world
}

fn request(world: &World, copy: Copy, resume: bool) -> Request {
    let request = match copy {
        Copy::Encrypt => Request::new(Action::Encrypt, 512),
        Copy::Decrypt => Request::new(Action::Decrypt, 512),
        Copy::Luks(version) => {
            let mut new = new_luks(version, Some(512));
            if version == Version::Luks2 {
                // Small, or most cuts would be in the header's noise.
                (new.keyslots_bytes, new.data_offset) = (Some(512 << 10), Some(1 << 20));
            }
            Request::luks(Action::Encrypt, Format::NewLuks(Box::new(new)), PASSPHRASE)
        }
    };
    let disk = |disk| File::from(world.descriptor(disk).expect("a descriptor"));
    request
        .reading(&world.path(SOURCE))
        .writing(disk(SINK), "sink")
        .keeping(disk(CHECKPOINT), resume)
        .tuned(|tuning| (tuning.workers, tuning.chunk_bytes) = (Some(1), Some(64 << 10)))
        .rate(64 << 20)
}

/// Carry one on to its end, whichever that is. The locks of the one before it go with its descriptors, a little later.
fn run(registry: &Arc<Registry>, world: &World, copy: Copy, resume: bool) -> JobInfo {
    loop {
        match request(world, copy, resume).start(registry) {
            Ok(job) => return wait(registry, job),
            Err(error) if error.chain().contains("another job") => std::thread::yield_now(),
            Err(error) => panic!("{}", error.chain()),
        }
    }
}

/// The sink holds what an uninterrupted copy would have made of it, also if the power went when it was said to be done.
fn judge(world: &World, copy: Copy, tear: u64) {
    let was_cut = world.is_cut();
    if was_cut {
        world.restart_in_place(tear).expect("power");
    }
    let plain = plain();
    let sink = world.visible(SINK).expect("image");
    match copy {
        Copy::Encrypt => assert!(sink.bytes(0, plain.len()) == encrypted(&plain, 512), "other ciphertext"),
        Copy::Decrypt => assert!(sink.bytes(0, plain.len()) == plain, "other plaintext"),
        Copy::Luks(_) => {
            let scratch = tests::Scratch::new();
            let open = Open { header: None, keyslot: None, secret: Secret::Passphrase };
            let back = scratch.join("back");
            let registry = registry(world.choice());
            let info = Request::luks(Action::Decrypt, Format::Luks(open), PASSPHRASE)
                .reading(&world.path(SINK))
                .creating(&back)
                .run(&registry);
            assert_eq!(info.state, JobState::Done, "{:?}", info.outcome);
            let mut bytes = Vec::new();
            let _ = File::open(back).and_then(|mut file| file.read_to_end(&mut bytes)).expect("read");
            assert!(bytes == plain, "other plaintext");
        }
    }
    // Where no name can be removed, the file is made empty: not by way of its queue, so a cut undoes it.
    let left = world.visible(CHECKPOINT).expect("image").size();
    assert!(was_cut || left == 0, "a checkpoint of what is done");
}

/// Until the power goes, or to the end. `false`: it went.
fn until_cut(world: &World, copy: Copy, resume: bool) -> bool {
    let registry = registry(world.choice());
    let info = run(&registry, world, copy, resume);
    drop(registry);
    if world.is_cut() {
        return info.state == JobState::Done;
    }
    assert_eq!(info.state, JobState::Done, "{:?}", info.outcome);
    true
}

fn explore(copy: Copy) {
    let seed = tests::seed();
    let mut random = Random::new(seed);
    let whole = world(copy, seed);
    assert!(until_cut(&whole, copy, false));
    judge(&whole, copy, 0);
    let (mut cuts, mut again, mut resumed) = (0, 0, 0);
    for event in 1..=whole.events() {
        let phase = [Phase::Before, Phase::Middle, Phase::After][random.below(3)];
        let world = world(copy, random.next_u64());
        world.cut_at(Cut { event, phase });
        let mut is_done = until_cut(&world, copy, false);
        // Half of them are cut once more while they go on.
        for round in 0..2 {
            if is_done {
                break;
            }
            cuts += 1;
            world.restart_in_place(random.next_u64()).expect("power");
            if round == 0 && random.below(2) == 0 {
                again += 1;
                let event = world.events() + 1 + random.below(40) as u64;
                world.cut_at(Cut { event, phase });
            }
            resumed += u64::from(world.visible(CHECKPOINT).expect("image").size() > 0);
            is_done = until_cut(&world, copy, true);
        }
        assert!(is_done, "event {event} {phase:?}: not done without a cut");
        judge(&world, copy, random.next_u64());
    }
    eprintln!(
        "{copy:?}: {} events, {cuts} cuts, {again} of them once more, {resumed} gone on with",
        whole.events()
    );
    assert!(cuts > whole.events() / 2 && resumed > cuts / 2);
}

#[test]
fn an_encryption_survives_a_power_cut_at_every_write_and_flush() {
    explore(Copy::Encrypt);
}

#[test]
fn a_sparse_decryption_survives_a_power_cut_at_every_write_and_flush() {
    explore(Copy::Decrypt);
}

#[test]
fn a_new_luks1_volume_survives_a_power_cut_at_every_write_and_flush() {
    explore(Copy::Luks(Version::Luks1));
}

#[test]
fn a_new_luks2_volume_survives_a_power_cut_at_every_write_and_flush() {
    explore(Copy::Luks(Version::Luks2));
}

#[test]
fn a_disk_that_lies_about_its_flushes_is_found_out() {
    let world = world(Copy::Encrypt, tests::seed());
    let registry = registry(world.choice());
    let job = request(&world, Copy::Encrypt, false).rate(4 << 20).start(&registry).expect("started");
    let _ = tests::jobs::wait_for(&registry, job, "half of it", |info| info.progress.done_bytes > 512 << 10);
    let _ = registry.cancel(job).expect("cancelled");
    assert_eq!(wait(&registry, job).state, JobState::Cancelled);
    // What was flushed is gone all the same.
    let sink = File::from(world.descriptor(SINK).expect("a descriptor"));
    std::os::unix::fs::FileExt::write_all_at(&sink, &[0; 4096], 384 << 10).expect("written");
    let info = run(&registry, &world, Copy::Encrypt, true);
    let (kind, message) = failure(&info);
    assert_eq!(kind, ErrorKind::Conflict);
    assert!(message.contains("the sink does not hold what was written to it"), "{message}");
}
