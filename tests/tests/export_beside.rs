//! A re-encryption job beside an export of the same process, on simulated disks whose writes and flushes fail, one after the other. What
//! of the two knows of a failure the other has to know; and what clients are let write is under a key by which a power cut leaves the
//! volume.

use std::sync::Arc;

use engine::backend::sim::image::Image;
use engine::backend::sim::{DiskOptions, Effect, Fault, On, When, World};
use engine::crypto::Kernel;
use engine::export::exported::Durability;
use engine::export::open::{Closed, Opened};
use engine::key::Descriptors;
use engine::pipeline::segment::Segments;
use engine::pipeline::view::{Access, View};
use engine::units::Extent;
use engine::volume::Header;
use engine::volume::reencrypt::decide::Requirement;
use proto::JobInfo;
use proto::reencrypt::Resilience;
use tests::Scratch;
use tests::jobs::{MIB, failure, key_fd, noise, registry};
use tests::rewriting::{PASS, Rewrite, volume};

/// What a job for which the header says that it is over, but which failed behind that, has to say.
const OVER: &str = "the header says that it is over";

/// A volume of two steps, as it is in a file.
fn image() -> Vec<u8> {
    let scratch = Scratch::new();
    let registry = registry(engine::backend::QueueChoice::Auto);
    let path = volume(&registry, &scratch, &noise(2 * MIB, 5), 4096, None);
    std::fs::read(path).expect("volume")
}

fn world(image: &[u8]) -> World {
    let world = World::new(tests::seed());
    world.add(Image::of(image), DiskOptions::default()).expect("a disk");
    // Whoever opens the file finds the disk.
    let _ = world.choice();
    world
}

/// The volume on the disk, opened to be exported.
fn open(world: &World) -> Opened {
    let request = serde_json::json!({
        "file": { "fd": 0, "name": "disk" },
        "volume": { "format": { "luks": {} }, "key_fd": 1 },
        "listen": { "shared": "unix:/nowhere" },
        "name": "test",
    });
    let request = serde_json::from_value(request).expect("a request");
    let mut descriptors = Descriptors::new(vec![world.descriptor(0).expect("a descriptor"), key_fd(PASS)]);
    let closed = Closed::new(&request, &mut descriptors).expect("free");
    closed.open(Kernel::best().expect("a kernel"), &|| false).expect("opened")
}

fn rewrite(world: &World, resilience: Resilience) -> JobInfo {
    let file = world.descriptor(0).expect("a descriptor");
    let rewrite = Rewrite::of_file(file.into(), "disk").by(resilience).with(|request| {
        request.hotzone_bytes = Some(1 << 20);
    });
    let rewrite = rewrite.luks(|luks| luks.kdf = Some(tests::header::cheap()));
    rewrite.tuned(|tuning| tuning.chunk_bytes = Some(128 << 10)).run(&registry(world.choice()))
}

/// Under which ciphers all of it may be written, if it may.
fn written_as(view: &View) -> Option<Arc<Segments>> {
    let grant = view.admit(Access::Write, Extent::new(0, view.total())?).ok()?;
    let segments = (grant.extent.end() == view.total()).then(|| grant.segments.clone());
    view.done(grant);
    segments
}

/// Does the header say that nothing is under way?
fn is_over(world: &World) -> bool {
    let mut header = world.blocking(0, "disk").expect("a disk");
    match Header::load(&mut header).expect("a header") {
        Header::Luks2(loaded) => Requirement::of(&loaded.header.metadata) == Requirement::None,
        Header::Luks1(_) => panic!("it was LUKS2"),
    }
}

#[test]
fn of_each_failure_of_a_job_its_export_knows() {
    let image = image();
    for resilience in [Resilience::Checksum, Resilience::Journal] {
        for on in [On::Flush, On::Write] {
            let (mut over, mut renewed) = (0, 0);
            for nth in 1.. {
                let world = world(&image);
                let Opened { view, align, held, .. } = open(&world);
                let durability = Arc::new(Durability::default());
                held.publish(&view, align, durability.clone());
                let before = written_as(&view).expect("all of it");
                world.inject(Fault { disk: 0, on, when: When::Nth(nth), effect: Effect::Fail(5) });
                let info = rewrite(&world, resilience);
                let after = written_as(&view);
                if info.state == proto::JobState::Done {
                    assert!(nth > 20, "a job has more than {nth} of {on:?}");
                    assert!(!after.expect("all of it").is_like(&before, view.total()));
                    break;
                }
                let (_, message) = failure(&info);
                let what = format!("{resilience:?} {on:?} {nth}: {message}");
                assert_eq!(durability.is_lost(), on == On::Flush, "{what}");
                over += usize::from(message.contains(OVER));
                if after.is_some_and(|after| !after.is_like(&before, view.total())) {
                    renewed += 1;
                    drop(held);
                    for tear in 0..8 {
                        assert!(is_over(&world.restart(tear).expect("power")), "{what}");
                    }
                }
            }
            assert!(over > 0, "{resilience:?} {on:?}: none behind the end");
            assert_eq!(renewed > 0, on == On::Write, "{resilience:?} {on:?}");
        }
    }
}

#[test]
fn a_volume_of_which_the_header_says_that_it_is_over_is_served_when_that_is_durable() {
    let image = image();
    let mut over = 0;
    for nth in 1.. {
        let world = world(&image);
        world.inject(Fault { disk: 0, on: On::Flush, when: When::Nth(nth), effect: Effect::Fail(5) });
        let info = rewrite(&world, Resilience::Journal);
        if info.state == proto::JobState::Done {
            break;
        }
        if !failure(&info).1.contains(OVER) {
            continue;
        }
        over += 1;
        drop(open(&world));
        for tear in 0..8 {
            assert!(is_over(&world.restart(tear).expect("power")), "flush {nth}, tear {tear}");
        }
    }
    assert!(over > 0, "none behind the end");
}

#[test]
fn who_would_be_its_header_is_not_exported() {
    let image = image();
    let (world, other) = (world(&image), world(&image));
    let Opened { view, align, held, .. } = open(&other);
    held.publish(&view, align, Arc::new(Durability::default()));
    let mut rewrite = Rewrite::of_file(world.descriptor(0).expect("a descriptor").into(), "disk");
    let fd = rewrite.send(other.descriptor(0).expect("a descriptor"));
    let header = proto::luks::File { fd, name: "other".to_owned() };
    let refused = rewrite.luks(|luks| luks.header = Some(header)).start(&registry(world.choice()));
    let refused = refused.expect_err("refused");
    assert_eq!(refused.kind(), proto::ErrorKind::Conflict);
    assert!(refused.chain().contains("a volume that is exported: other"), "{}", refused.chain());
}
