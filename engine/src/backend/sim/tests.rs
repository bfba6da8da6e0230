//! The simulator itself: it forgets what it may, keeps what it must, and catches a protocol that is wrong.

use std::collections::BTreeSet;
use std::ops::Range;

use super::explore::{Case, Explore, Violation};
use super::*;
use crate::backend::{Done, Op, Port, Position, What};
use crate::sys::buffer::Buf;

const SECTOR: usize = 512;

fn disk(seed: u64, sectors: usize) -> World {
    let world = World::new(seed);
    world.add(Image::of(&vec![b'.'; sectors * SECTOR]), DiskOptions::default()).expect("disk");
    world
}

/// The first byte of each sector.
fn sectors(image: &Image) -> String {
    let count = image.size().div_ceil(512);
    (0..count).map(|index| char::from(image.bytes(index * 512, 1)[0])).collect()
}

/// What is left after a power cut, for each of many tears.
fn left(world: &World) -> BTreeSet<String> {
    (0..400).map(|tear| sectors(&world.restart(tear).expect("restart").durable(0))).collect()
}

fn put(device: &mut Blocking, sector: u64, byte: u8, count: usize) {
    device.write(sector * 512, &vec![byte; count * SECTOR]).expect("written");
}

#[test]
fn what_was_flushed_stays_whatever_happens() {
    let world = disk(1, 4);
    let mut device = world.blocking(0, "disk").expect("blocking");
    put(&mut device, 1, b'a', 2);
    device.flush().expect("flushed");
    assert_eq!(sectors(&world.durable(0)), ".aa.");
    assert_eq!(left(&world), BTreeSet::from([".aa.".to_owned()]));
}

#[test]
fn what_was_not_flushed_is_visible_and_lost_kept_or_torn() {
    let world = disk(2, 4);
    let mut device = world.blocking(0, "disk").expect("blocking");
    put(&mut device, 1, b'a', 2);
    let mut seen = [0; 1];
    device.read(512, &mut seen).expect("read");
    assert_eq!(seen, [b'a']);
    assert_eq!(sectors(&world.visible(0).expect("image")), ".aa.");
    assert_eq!(sectors(&world.durable(0)), "....");
    let expected = ["....", ".a..", "..a.", ".aa."].map(str::to_owned);
    assert_eq!(left(&world), BTreeSet::from(expected));
    let extremes =
        [0, 1].map(|tear| sectors(&world.restart(tear).expect("restart").visible(0).expect("image")));
    assert_eq!(extremes, ["....", ".aa."]);
}

#[test]
fn later_writes_survive_earlier_ones_sector_by_sector() {
    let world = disk(3, 2);
    let mut device = world.blocking(0, "disk").expect("blocking");
    put(&mut device, 0, b'a', 2);
    put(&mut device, 0, b'b', 2);
    // Each sector is old, of the first or of the second write: all nine ways.
    assert_eq!(left(&world).len(), 9);
}

#[test]
fn a_large_sector_is_not_torn() {
    let world = World::new(4);
    let options = DiskOptions { sector_bytes: 4096, ..DiskOptions::default() };
    world.add(Image::of(&[b'.'; 8192]), options).expect("disk");
    let mut device = world.blocking(0, "disk").expect("blocking");
    put(&mut device, 4, b'a', 8);
    let expected =
        ["................", "....aaaa........", "........aaaa....", "....aaaaaaaa...."].map(str::to_owned);
    assert_eq!(left(&world), BTreeSet::from(expected));
}

#[test]
fn odd_bytes_go_to_the_medium_with_their_sector() {
    let world = disk(5, 2);
    let mut device = world.blocking(0, "disk").expect("blocking");
    device.write(10, b"first").expect("written");
    device.write(20, b"second").expect("written");
    let mut ends = BTreeSet::new();
    for tear in 0..200 {
        let image = world.restart(tear).expect("restart").durable(0);
        ends.insert((image.bytes(10, 5) == b"first", image.bytes(20, 6) == b"second"));
    }
    // The second write's sector holds the first one's bytes too.
    assert_eq!(ends, BTreeSet::from([(false, false), (true, false), (true, true)]));
}

#[test]
fn a_file_that_grows_is_found_as_long_as_what_survived() {
    let world = World::new(6);
    world.add(Image::zeros(0), DiskOptions::default()).expect("disk");
    let mut device = world.blocking(0, "disk").expect("blocking");
    device.write(0, &[1; 700]).expect("written");
    let sizes: BTreeSet<u64> =
        (0..100).map(|tear| world.restart(tear).expect("restart").durable(0).size()).collect();
    assert_eq!(sizes, BTreeSet::from([0, 512, 700]));
    device.flush().expect("flushed");
    assert_eq!(world.durable(0).size(), 700);
}

/// A queue and buffers, for what `Blocking` cannot do: several operations at once.
struct Deep {
    queue: Box<dyn Queue>,
    free: Vec<Buf>,
    port: Port,
}

impl Deep {
    fn new(world: &World) -> Self {
        let mut arena = Arena::new(16, 8192).expect("arena");
        let mut queue = world.queue(&arena, 16);
        let port = queue.attach(world.file(0)).expect("attach");
        Self { queue, free: arena.take_all(), port }
    }

    fn push(&mut self, token: u64, what: What) {
        self.queue.push(Op { token, port: self.port, what }).expect("accepted");
    }

    fn write(&mut self, token: u64, sector: u64, byte: u8, count: u32) {
        let mut buf = self.free.pop().expect("a buffer");
        buf.fill(byte);
        self.push(token, What::Write { position: Position::At(sector * 512), buf, span: 0..count * 512 });
    }

    fn read(&mut self, token: u64, span: Range<u32>) {
        let buf = self.free.pop().expect("a buffer");
        self.push(token, What::Read { position: Position::At(0), buf, span });
    }

    /// Until so many have come back.
    fn collect(&mut self, count: usize) -> Vec<Done> {
        let mut done = Vec::new();
        while done.len() < count {
            self.queue.wait(None).expect("wait");
            self.queue.reap(&mut done);
        }
        done
    }
}

fn order_of_completion(seed: u64) -> Vec<u64> {
    let world = disk(seed, 16);
    let mut deep = Deep::new(&world);
    for token in 0..10 {
        deep.write(token, token, b'x', 1);
    }
    deep.collect(10).iter().map(|done| done.token).collect()
}

#[test]
fn completions_are_reordered_and_a_seed_repeats_itself() {
    let orders: BTreeSet<Vec<u64>> = (0..20).map(order_of_completion).collect();
    assert!(orders.len() > 15, "{} orders of 20", orders.len());
    for seed in 0..20 {
        assert_eq!(order_of_completion(seed), order_of_completion(seed));
        let world = disk(seed, 8);
        put(&mut world.blocking(0, "disk").expect("blocking"), 0, b'a', 8);
        let once = world.restart(seed).expect("restart").durable(0);
        assert_eq!(once, world.restart(seed).expect("restart").durable(0));
    }
}

#[test]
fn a_flush_covers_what_had_completed_when_it_was_submitted() {
    let mut uncovered = 0;
    for seed in 0..50 {
        let world = disk(seed, 4);
        let mut deep = Deep::new(&world);
        deep.write(1, 0, b'a', 1);
        deep.collect(1);
        // In flight together with the flush: it owes this one nothing.
        deep.write(2, 1, b'b', 1);
        deep.push(3, What::Flush);
        deep.collect(2);
        assert_eq!(sectors(&world.durable(0)), "a...");
        uncovered += u32::from(left(&world).contains("a..."));
        deep.push(4, What::Flush);
        deep.collect(1);
        assert_eq!(sectors(&world.durable(0)), "ab..");
    }
    assert_eq!(uncovered, 50);
}

#[test]
fn the_power_goes_at_the_event_asked_for_and_takes_what_is_in_flight() {
    let mut ends = BTreeSet::new();
    for (event, phase) in [(1, Phase::Before), (1, Phase::Middle), (1, Phase::After), (2, Phase::Middle)] {
        let world = disk(7, 4);
        world.cut_at(Cut { event, phase });
        let mut deep = Deep::new(&world);
        deep.write(1, 0, b'a', 1);
        deep.write(2, 2, b'b', 1);
        let done = deep.collect(2);
        let failed = done.iter().filter(|done| done.result.is_err()).count();
        assert!(world.is_cut());
        assert_eq!(failed, if event == 1 && phase != Phase::After { 2 } else { 1 });
        deep.push(3, What::Flush);
        assert!(deep.collect(1)[0].result.is_err(), "there is no power");
        drop(deep);
        assert_eq!(world.events(), event);
        ends.extend(left(&world));
    }
    assert_eq!(ends, BTreeSet::from(["....", "a...", "..b.", "a.b."].map(str::to_owned)));
}

#[test]
fn short_transfers_of_the_device_are_continued() {
    let options = Options { short_per_mille: 900, ..Options::default() };
    let world = World::with(8, options);
    world.add(Image::of(&[b'.'; 8192]), DiskOptions::default()).expect("disk");
    let mut device = world.blocking(0, "disk").expect("blocking");
    put(&mut device, 0, b'a', 16);
    assert!(world.events() > 1, "one write of the caller, several of the device");
    let mut back = [0; 8192];
    device.read(0, &mut back).expect("read");
    assert_eq!(back, [b'a'; 8192]);
    world.inject(Fault { disk: 0, on: On::Write, when: When::Nth(1), effect: Effect::Short(512) });
    let before = world.events();
    device.write(0, &[b'b'; 1024]).expect("written");
    assert_eq!(world.events() - before, 2);
}

#[test]
fn faults_strike_where_they_are_told() {
    const EIO: i32 = 5;
    const ENOSPC: i32 = 28;
    let world = disk(9, 8);
    let mut device = world.blocking(0, "disk").expect("blocking");
    put(&mut device, 0, b'a', 1);
    put(&mut device, 1, b'b', 1);
    world.inject(Fault { disk: 0, on: On::Read, when: When::Nth(2), effect: Effect::Fail(EIO) });
    device.read(0, &mut [0; 1]).expect("the first");
    let error = device.read(0, &mut [0; 1]).expect_err("the second");
    assert_eq!(error.chain(), "read failed: disk bytes 0..1: input/output error (EIO)");
    device.read(0, &mut [0; 1]).expect("the third");
    let bad = Extent::new(1024, 1536).expect("a sector");
    world.inject(Fault { disk: 0, on: On::Write, when: When::Touching(bad), effect: Effect::Fail(ENOSPC) });
    put(&mut device, 0, b'c', 2);
    let error = device.write(512, &[0; 1024]).expect_err("touches the bad place");
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    world.heal();
    world.inject(Fault { disk: 0, on: On::Read, when: When::Nth(1), effect: Effect::Misdirect(2048) });
    let mut elsewhere = [0; 1];
    device.read(0, &mut elsewhere).expect("read");
    assert_eq!(elsewhere, [b'.']);
}

#[test]
fn what_a_failed_flush_gave_up_no_later_flush_brings_back() {
    let mut given_up = 0;
    for seed in 0..40 {
        let world = disk(seed, 2);
        let mut device = world.blocking(0, "disk").expect("blocking");
        put(&mut device, 0, b'a', 1);
        world.inject(Fault { disk: 0, on: On::Flush, when: When::Nth(1), effect: Effect::Fail(5) });
        let error = device.flush().expect_err("fails");
        assert_eq!(error.chain(), "flush failed: disk: input/output error (EIO)");
        device.flush().expect("pretends");
        assert_eq!(sectors(&world.visible(0).expect("image")), "a.");
        given_up += u32::from(sectors(&world.durable(0)) == "..");
    }
    assert!((5..=35).contains(&given_up), "{given_up} of 40");
}

#[test]
fn what_is_cancelled_comes_back_once_and_may_have_been_done_in_part() {
    const ECANCELED: i32 = 125;
    let (mut recalled, mut ends) = (0, BTreeSet::new());
    for seed in 0..60 {
        let world = disk(seed, 4);
        let mut deep = Deep::new(&world);
        deep.write(1, 0, b'a', 2);
        deep.write(2, 2, b'b', 2);
        deep.queue.kick().expect("kick");
        deep.queue.cancel(deep.port);
        let done = deep.collect(2);
        assert_eq!(deep.queue.in_flight(), 0);
        for one in &done {
            match one.result.as_ref().map_err(std::io::Error::raw_os_error) {
                Ok(1024) => {}
                Err(Some(ECANCELED)) => recalled += 1,
                other => panic!("{other:?}"),
            }
        }
        ends.insert(sectors(&world.visible(0).expect("image")));
    }
    assert!((20..=100).contains(&recalled), "{recalled} of 120");
    assert!(ends.len() > 8, "{ends:?}");
}

#[test]
fn a_world_is_found_by_its_number_while_it_lives() {
    let world = disk(14, 1);
    let arena = Arena::new(1, 4096).expect("arena");
    let choice = world.choice();
    assert_eq!(crate::backend::open_queue(choice, &arena, 1).expect("queue").facts().name, "simulated");
    drop(world);
    assert_eq!(
        crate::backend::open_queue(choice, &arena, 1).err().expect("gone").kind(),
        ErrorKind::NotFound
    );
}

#[test]
fn a_full_disk_and_a_misaligned_transfer_are_refused() {
    let world = World::new(10);
    let options = DiskOptions { alignment: 4096, capacity: Some(8192), ..DiskOptions::default() };
    world.add(Image::zeros(8192), options).expect("disk");
    // `World::blocking` widens; a bare queue does not.
    let mut device = world.blocking(0, "disk").expect("blocking");
    device.write(100, b"odd").expect("written");
    let error = device.write(8000, &[1; 1000]).expect_err("beyond the end");
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    let mut deep = Deep::new(&world);
    deep.write(1, 1, b'a', 1);
    let done = deep.collect(1);
    assert_eq!(done[0].result.as_ref().expect_err("misaligned").raw_os_error(), Some(22));
    deep.read(2, 0..4096);
    assert_eq!(deep.collect(1)[0].result.as_ref().expect("read"), &4096);
}

#[test]
fn a_large_disk_costs_what_is_written() {
    let world = World::new(11);
    world.add(Image::zeros(1 << 40), DiskOptions::default()).expect("disk");
    let mut device = world.blocking(0, "disk").expect("blocking");
    device.write((1 << 40) - 512, &[1; 512]).expect("written");
    device.flush().expect("flushed");
    assert_eq!(world.durable(0).stored_bytes(), 4096);
    assert_eq!(world.restart(0).expect("restart").visible(0).expect("image"), world.durable(0));
}

/// Data of two sectors at 1, named by a header at 0 of one letter. Both letters agree, whatever happens.
fn publish(world: &World, flushes: [bool; 2]) -> Result<()> {
    let mut device = world.blocking(0, "disk")?;
    device.write(512, &[b'n'; 1024])?;
    if flushes[0] {
        device.flush()?;
    }
    // Only then may the header name the new data, which lies beside the old.
    device.write(0, &[b'N'; 512])?;
    if flushes[1] {
        device.flush()?;
    }
    Ok(())
}

fn judge(world: &World, case: &Case) -> Result<(), String> {
    match sectors(&world.durable(0)).as_str() {
        "Nnn" => Ok(()),
        found if found.starts_with('.') && !case.completed => Ok(()),
        found => Err(format!("found {found}, completed {}", case.completed)),
    }
}

fn explored(flushes: [bool; 2]) -> Result<explore::Summary, Violation> {
    let image = Image::of(&[b'.'; 3 * SECTOR]);
    Explore { tears: 16, ..Explore::new("publish", 12, image) }.run(|world| publish(world, flushes), judge)
}

#[test]
fn a_right_protocol_passes_and_every_ending_is_seen() {
    let summary = explored([true, true]).expect("holds");
    // The end, before the first of four events, in the middle of and after each: sixteen tears each.
    assert_eq!((summary.events, summary.cases), (4, (1 + 1 + 8) * 16));
    assert_eq!(summary.completed, 2 * 16);
}

#[test]
fn a_header_written_before_its_data_is_durable_is_caught() {
    let violation = explored([false, true]).expect_err("caught");
    assert!(violation.message.starts_with("found N"), "{violation}");
    assert!(violation.to_string().contains("SIM_CUT="), "{violation}");
}

#[test]
fn a_promise_without_a_flush_is_caught() {
    let violation = explored([true, false]).expect_err("caught");
    assert!(violation.case.completed && violation.message.contains("completed true"), "{violation}");
}

#[test]
#[should_panic(expected = "fails without a cut")]
fn what_fails_by_itself_is_not_explored() {
    let explore = Explore::new("fails", 13, Image::zeros(512));
    let fails = |world: &World| world.blocking(0, "disk")?.read(0, &mut [0; 1024]);
    let _ = explore.run(fails, |_, _| Ok(()));
}

/// Many writes in flight on one disk while another is written at odd places.
fn busy(world: &World) -> Result<()> {
    let mut deep = Deep::new(world);
    let mut device = world.blocking(1, "log")?;
    for round in 0..6_u8 {
        for index in 0..8 {
            deep.write(u64::from(index), u64::from((index * 5 + round) % 14), b'a' + round, 2);
        }
        // In flight until somebody waits, and recorded or cut as such.
        deep.queue.kick()?;
        device.write(u64::from(round) * 700 + 3, &[round + 1; 900])?;
        if round % 2 == 1 {
            device.flush()?;
        }
        let done = deep.collect(8);
        for done in done {
            done.result.map_err(|cause| Error::io("write failed", cause))?;
            deep.free.extend(done.buf);
        }
        deep.push(9, What::Flush);
        for done in deep.collect(1) {
            done.result.map_err(|cause| Error::io("flush failed", cause))?;
        }
    }
    device.read(0, &mut [0; 1])
}

type Endings = std::collections::BTreeMap<String, (bool, u64, Vec<Image>)>;

/// Each case with what it found; the clock behind a write tells the judged world's dice.
fn endings(
    explore: impl FnOnce(&(dyn Fn(&World, &Case) -> Result<(), String> + Sync)) -> explore::Summary,
) -> (explore::Summary, Endings) {
    let seen = Mutex::new(Endings::new());
    let summary = explore(&|world, case| {
        let images = vec![world.durable(0), world.durable(1)];
        put(&mut world.blocking(0, "disk").expect("blocking"), 0, b'x', 1);
        let clock = world.clock();
        let ending = (case.completed, clock, images);
        assert!(seen.lock().expect("no panic").insert(case.to_string(), ending).is_none());
        Ok(())
    });
    (summary, seen.into_inner().expect("no panic"))
}

#[test]
fn a_recorded_run_ends_as_one_that_is_cut_at_each_event() {
    for seed in [20, 21] {
        let options = Options { short_per_mille: 200, ..Options::default() };
        let mut explore = Explore { tears: 16, options, ..Explore::new("busy", seed, Image::zeros(8192)) };
        explore.disks.push((Image::zeros(0), DiskOptions { sector_bytes: 4096, ..DiskOptions::default() }));
        let (summary, rerun) = endings(|judge| explore.run(busy, judge).expect("no verdict"));
        let (same, recorded) = endings(|judge| explore.recorded(busy, judge).expect("no verdict"));
        assert_eq!(summary, same);
        assert!(summary.events > 60 && summary.judged > 1000, "{summary:?}");
        assert!(rerun.values().filter(|(completed, ..)| *completed).count() > 0);
        for (case, ending) in &rerun {
            assert!(recorded.get(case) == Some(ending), "{seed}: {case}");
        }
        assert_eq!(rerun.len(), recorded.len());
    }
}

#[test]
fn a_recorded_run_finds_the_first_violation_on_any_core() {
    let image = Image::of(&[b'.'; 3 * SECTOR]);
    let explore = Explore { tears: 16, ..Explore::new("publish", 12, image) };
    let rerun = explore.run(|world| publish(world, [false, true]), judge).expect_err("caught");
    let recorded = explore.recorded(|world| publish(world, [false, true]), judge).expect_err("caught");
    assert_eq!(rerun.to_string(), recorded.to_string());
}

/// Not a test: what a case costs. `cargo test -p engine --features sim --release -- --ignored --nocapture cost_of_a_case`
#[test]
#[ignore = "a measurement"]
fn cost_of_a_case() {
    let bytes: Vec<u8> =
        (0..256 << 10).map(|at: u32| at.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    let explore = Explore { tears: 80, ..Explore::new("cost", 1, Image::of(&bytes)) };
    let act = |world: &World| {
        let mut deep = Deep::new(world);
        for round in 0..10_u8 {
            for index in 0..8_u8 {
                deep.write(u64::from(index), u64::from(index) * 16 + u64::from(round) * 32, round, 16);
            }
            let done = deep.collect(8);
            deep.free.extend(done.into_iter().filter_map(|done| done.buf));
            deep.push(9, What::Flush);
            deep.collect(1);
        }
        Ok(())
    };
    let start = std::time::Instant::now();
    let summary = explore.recorded(act, |_, _| Ok(())).expect("no verdict");
    let each = start.elapsed().as_secs_f64() * 1e6 / f64::from(u32::try_from(summary.judged).expect("few"));
    println!("{summary:?}: {each:.1} us for each judged case, all cores together");
    let start = std::time::Instant::now();
    let summary = explore
        .recorded(act, |world, _| {
            let mut device = world.blocking(0, "disk").expect("blocking");
            device.read(0, &mut [0; 4096]).map_err(|error| error.chain())
        })
        .expect("reads");
    let each = start.elapsed().as_secs_f64() * 1e6 / f64::from(u32::try_from(summary.judged).expect("few"));
    println!("{each:.1} us with a `Blocking` and a read");
}
