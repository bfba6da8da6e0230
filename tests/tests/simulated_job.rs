//! Whole jobs on simulated disks: out of order, in short pieces, and on disks that fail.

use engine::backend::sim::image::Image;
use engine::backend::sim::{DiskOptions, Effect, Fault, On, Options, When, World};
use engine::units::Extent;
use proto::{Action, ErrorKind};
use tests::jobs::{MIB, Request, assert_done, encrypted, failure, noise, registry};

/// A source with these bytes and an empty sink.
fn world(plain: &[u8]) -> World {
    let world = World::with(tests::seed(), Options { short_per_mille: 200, ..Options::default() });
    world.add(Image::of(plain), DiskOptions::default()).expect("a disk");
    world.add(Image::zeros(0), DiskOptions::default()).expect("a disk");
    world
}

fn request(world: &World) -> Request {
    let sink = world.descriptor(1).expect("a descriptor");
    Request::new(Action::Encrypt, 512).reading(&world.path(0)).writing(sink.into(), "sink")
}

#[test]
fn a_job_makes_the_same_bytes_in_whatever_order_its_transfers_end() {
    for len in [0, 512, MIB, 9 * MIB + 1536] {
        let plain = noise(len, 5);
        let world = world(&plain);
        let registry = registry(world.choice());
        assert_done(&request(&world).run(&registry));
        assert!(world.visible(1).expect("image").bytes(0, len) == encrypted(&plain, 512), "{len} bytes");
    }
}

#[test]
fn a_bad_place_on_either_disk_fails_the_job_and_is_named() {
    for (disk, on, what) in [(0, On::Read, "read failed"), (1, On::Write, "write failed")] {
        let world = world(&noise(5 * MIB, 6));
        let bad = Extent::new(3 << 20, (3 << 20) + 512).expect("a sector");
        world.inject(Fault { disk, on, when: When::Touching(bad), effect: Effect::Fail(5) });
        let (kind, message) = failure(&request(&world).run(&registry(world.choice())));
        assert_eq!(kind, ErrorKind::Io);
        assert!(message.starts_with(what) && message.contains("EIO"), "{message}");
    }
}
