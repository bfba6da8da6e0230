//! Tests of who may touch what, beside a moving re-encryption.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use super::*;
use crate::error::ErrorKind;
use crate::pipeline::segment::Segment;

const TOTAL: u64 = 64 << 10;

/// Plain, told apart by where it lies.
fn side(offset: u64, unit_bytes: u32) -> Segments {
    Segments::new(vec![Segment { start: 0, offset, unit_bytes, cipher: None }])
}

fn old() -> Segments {
    side(0, 512)
}

fn new() -> Segments {
    side(1 << 20, 512)
}

fn extent(start: u64, end: u64) -> Extent {
    Extent::new(start, end).expect("not empty")
}

/// A view with a re-encryption that has begun, and how often it was told that something has left.
fn begun(way: Way) -> (Arc<View>, Arc<AtomicUsize>) {
    let (view, told) = (View::new(old(), TOTAL), Arc::new(AtomicUsize::new(0)));
    let count = told.clone();
    let quiet = Arc::new(move || {
        count.fetch_add(1, Ordering::SeqCst);
    });
    view.begin(&old(), new(), way, 0, quiet).expect("begun");
    (view, told)
}

/// What is granted: the extent, and whether it is new.
fn ask(view: &View, access: Access, start: u64, end: u64) -> Option<(u64, u64, bool)> {
    let grant = view.admit(access, extent(start, end)).ok()?;
    let answer = (grant.extent.start(), grant.extent.end(), grant.segments.place(0) > 0);
    view.done(grant);
    Some(answer)
}

fn is_lost(view: &View, access: Access, extent: Extent) -> bool {
    let answer = view.admit(access, extent);
    let is_lost = matches!(answer, Err(Refusal::Lost));
    answer.into_iter().for_each(|grant| view.done(grant));
    is_lost
}

fn nobody() -> rotation::Quiet {
    Arc::new(|| ())
}

#[test]
fn writes_of_one_data_unit_go_one_by_one_and_reads_beside_them() {
    let view = View::new(old(), TOTAL);
    let first = view.admit(Access::Write, extent(100, 600)).expect("free");
    assert_eq!((first.extent.start(), first.extent.end()), (0, 1024), "whole data units");
    assert!(view.admit(Access::Write, extent(1000, 1001)).is_err());
    assert_eq!(ask(&view, Access::Read, 0, 2048), Some((0, 2048, false)));
    assert_eq!(ask(&view, Access::Write, 1024, 2048), Some((1024, 2048, false)));
    view.done(first);
    assert_eq!(ask(&view, Access::Write, 1000, 1001), Some((512, 1024, false)));
}

/// Blocks of a data unit hang together.
struct Chained;

impl crate::crypto::SectorCipher for Chained {
    fn encrypt(&self, _: crate::units::DataUnit, _: &mut [u8]) {}

    fn decrypt(&self, _: crate::units::DataUnit, _: &mut [u8]) {}

    fn is_separable(&self) -> bool {
        false
    }
}

#[test]
fn where_blocks_are_chained_reads_and_writes_keep_away_from_each_other() {
    let view = View::new(Segments::one(Box::new(Chained), 4096, 0), TOTAL);
    let admit = |access, start, end| view.admit(access, extent(start, end)).ok();
    let write = admit(Access::Write, 0, 512).expect("free");
    // Of another part of the same data unit.
    assert!(admit(Access::Read, 1024, 1536).is_none());
    view.done(admit(Access::Read, 4096, 8192).expect("another data unit"));
    view.done(write);
    let (first, second) = (admit(Access::Read, 0, 4096), admit(Access::Read, 0, 8192));
    let (first, second) = (first.expect("free"), second.expect("shared"));
    assert!(admit(Access::Write, 512, 1024).is_none());
    assert!(admit(Access::Read, 0, 512).is_none(), "nobody overtakes who waits to write");
    view.done(admit(Access::Read, 8192, 12288).expect("elsewhere"));
    view.done(first);
    assert!(admit(Access::Read, 0, 512).is_none(), "one still reads");
    view.done(second);
    view.done(admit(Access::Write, 512, 1024).expect("its turn"));
    // It may also have left without a word.
    let read = admit(Access::Read, 0, 512).expect("free");
    assert!(admit(Access::Write, 0, 512).is_none());
    view.done(read);
    view.done(admit(Access::Read, 0, 512).expect("free"));
}

#[test]
fn each_zone_has_its_rules_whichever_way_it_goes() {
    for way in [Way::Forward, Way::Backward] {
        let (view, _) = begun(way);
        // A step that has passed, one that is excluded, one that is frozen.
        assert!(view.freeze(16384) && view.exclude(16384));
        view.pass(16384);
        assert!(view.freeze(48 << 10) && view.exclude(32 << 10));
        let at = |order: u64| if way == Way::Forward { order } else { TOTAL - order };
        let zone = |from: u64, to: u64| (at(from).min(at(to)), at(from).max(at(to)));
        let (from, to) = zone(0, 16384);
        for access in [Access::Read, Access::Write] {
            assert_eq!(ask(&view, access, from, to), Some((from, to, true)), "{way:?} passed");
        }
        let (from, to) = zone(16384, 32768);
        assert_eq!(ask(&view, Access::Read, from, to), None, "{way:?} excluded");
        assert_eq!(ask(&view, Access::Write, from, to), None);
        assert!(!is_lost(&view, Access::Read, extent(from, to)));
        view.renew();
        assert_eq!(ask(&view, Access::Read, from, to), Some((from, to, true)), "{way:?} renewed");
        assert_eq!(ask(&view, Access::Write, from, to), None);
        let (from, to) = zone(32768, 49152);
        assert_eq!(ask(&view, Access::Read, from, to), Some((from, to, false)), "{way:?} frozen");
        assert_eq!(ask(&view, Access::Write, from, to), None);
        let (from, to) = zone(49152, TOTAL);
        for access in [Access::Read, Access::Write] {
            assert_eq!(ask(&view, access, from, to), Some((from, to, false)), "{way:?} old");
        }
    }
}

#[test]
fn a_request_across_boundaries_is_granted_part_by_part() {
    let (view, _) = begun(Way::Forward);
    assert!(view.freeze(16384) && view.exclude(16384));
    view.pass(16384);
    assert_eq!(ask(&view, Access::Write, 8192, 20480), Some((8192, 16384, true)));
    assert_eq!(ask(&view, Access::Write, 16384, 20480), Some((16384, 20480, false)));
    let (view, _) = begun(Way::Backward);
    assert!(view.freeze(16384) && view.exclude(16384));
    view.pass(16384);
    assert_eq!(ask(&view, Access::Read, TOTAL - 20480, TOTAL), Some((TOTAL - 20480, TOTAL - 16384, false)));
    assert_eq!(ask(&view, Access::Read, TOTAL - 16384, TOTAL), Some((TOTAL - 16384, TOTAL, true)));
}

#[test]
fn what_is_granted_grows_with_the_data_unit() {
    let view = View::new(old(), TOTAL);
    assert_eq!(view.unit_bytes(), 512);
    view.begin(&old(), side(1 << 20, 4096), Way::Forward, 0, nobody()).expect("begun");
    assert_eq!(view.unit_bytes(), 4096);
    assert!(view.freeze(16384) && view.exclude(16384));
    view.pass(16384);
    assert_eq!(ask(&view, Access::Write, 5000, 5001), Some((4096, 8192, true)));
    assert_eq!(ask(&view, Access::Write, 20000, 20001), Some((19968, 20480, false)));
}

#[test]
fn a_stream_of_requests_does_not_keep_a_re_encryption_waiting() {
    let (view, told) = begun(Way::Forward);
    let write = view.admit(Access::Write, extent(4096, 8192)).expect("old");
    let elsewhere = view.admit(Access::Write, extent(32768, 36864)).expect("old");
    assert!(!view.freeze(16384), "one is in flight there");
    // New ones wait although the freezing does, too.
    assert_eq!(ask(&view, Access::Write, 0, 512), None);
    view.done(elsewhere);
    assert_eq!(told.load(Ordering::SeqCst), 0, "that was not waited for");
    let read = view.admit(Access::Read, extent(0, 8192)).expect("still old");
    view.done(write);
    assert_eq!(told.load(Ordering::SeqCst), 1);
    assert!(view.freeze(16384));
    assert!(!view.exclude(16384), "a read is in flight there");
    assert_eq!(ask(&view, Access::Read, 0, 512), None);
    view.done(read);
    assert_eq!(told.load(Ordering::SeqCst), 2);
    assert!(view.exclude(16384));
}

struct Bell(AtomicUsize);

impl Wake for Bell {
    fn wake(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn who_was_refused_is_woken_when_it_may_ask_again() {
    let (view, _) = begun(Way::Forward);
    let bell = Arc::new(Bell(AtomicUsize::new(0)));
    view.watch(bell.clone());
    let rung = || bell.0.swap(0, Ordering::SeqCst);
    assert!(view.freeze(16384));
    assert_eq!(ask(&view, Access::Write, 0, 512), None);
    // What others give back is of no use to it.
    assert!(ask(&view, Access::Read, 0, 512).is_some());
    assert_eq!(rung(), 0);
    assert!(view.exclude(16384));
    view.renew();
    assert_eq!(rung(), 1);
    assert_eq!(ask(&view, Access::Write, 0, 512), None);
    view.pass(16384);
    assert_eq!(rung(), 1);
    assert!(view.freeze(32768));
    assert_eq!(ask(&view, Access::Write, 16384, 20480), None);
    view.stop(None);
    assert_eq!(rung(), 1);
    assert_eq!(ask(&view, Access::Write, 16384, 20480), Some((16384, 20480, false)));
    let held = view.admit(Access::Write, extent(0, 512)).expect("free");
    assert!(view.admit(Access::Write, extent(0, 512)).is_err());
    view.done(held);
    assert_eq!(rung(), 1);
}

#[test]
fn what_failed_is_refused_until_it_is_recovered() {
    let (view, _) = begun(Way::Forward);
    assert!(view.freeze(32768) && view.exclude(16384));
    view.stop(Some(16384));
    for access in [Access::Read, Access::Write] {
        assert!(is_lost(&view, access, extent(0, 512)));
        assert_eq!(ask(&view, access, 0, 512), None);
        assert!(!is_lost(&view, access, extent(16384, 16896)));
        assert_eq!(ask(&view, access, 16384, 20480), Some((16384, 20480, false)), "only frozen: thawed");
    }
    // Recovered, or found untouched; nowhere else.
    let conflict = |passed| {
        let error = view.begin(&old(), new(), Way::Forward, passed, nobody()).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Conflict);
    };
    conflict(8192);
    view.begin(&old(), new(), Way::Forward, 16384, nobody()).expect("recovered");
    conflict(16384);
    assert_eq!(ask(&view, Access::Write, 0, 512), Some((0, 512, true)));
    assert_eq!(view.passed(), Some(16384));
}

#[test]
fn another_re_encryption_than_that_of_the_volume_is_refused() {
    let view = View::new(old(), TOTAL);
    let refused = |old: &Segments, new: Segments, way, passed| {
        let error = view.begin(old, new, way, passed, nobody()).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Conflict);
    };
    refused(&new(), new(), Way::Forward, 0);
    refused(&old(), new(), Way::Forward, 4096);
    view.begin(&old(), new(), Way::Forward, 0, nobody()).expect("begun");
    assert!(view.freeze(4096) && view.exclude(4096));
    view.pass(4096);
    view.stop(None);
    refused(&old(), side(2 << 20, 512), Way::Forward, 4096);
    refused(&old(), new(), Way::Backward, 4096);
    refused(&old(), new(), Way::Forward, 0);
    view.begin(&old(), new(), Way::Forward, 4096, nobody()).expect("the same one");
    // One that never did anything leaves nothing behind.
    let view = View::new(old(), TOTAL);
    view.begin(&old(), new(), Way::Forward, 0, nobody()).expect("begun");
    view.stop(None);
    view.begin(&old(), side(2 << 20, 512), Way::Backward, 0, nobody()).expect("another one");
}

#[test]
fn behind_the_last_step_it_is_at_rest_under_the_new_key() {
    let (view, _) = begun(Way::Backward);
    assert!(view.freeze(TOTAL) && view.exclude(TOTAL));
    view.pass(TOTAL);
    assert_eq!((view.passed(), ask(&view, Access::Write, 0, TOTAL)), (None, Some((0, TOTAL, true))));
    view.stop(None);
    let view = View::mixed(old(), new(), Way::Forward, 4096, TOTAL);
    assert_eq!(ask(&view, Access::Read, 0, TOTAL), Some((0, 4096, true)));
    assert_eq!(ask(&view, Access::Read, 4096, TOTAL), Some((4096, TOTAL, false)));
    view.finish();
    assert_eq!(ask(&view, Access::Read, 0, TOTAL), Some((0, TOTAL, true)));
}

/// Threads that read and write without pause while hotzone after hotzone passes: nobody is ever where another may not be.
#[test]
fn nobody_is_where_he_may_not_be_however_threads_meet() {
    const UNITS: usize = (TOTAL / 512) as usize;
    let (view, _) = begun(Way::Forward);
    // Of each data unit: readers and writers there, and whether it is being read ahead (1) or overwritten (2).
    let readers: Vec<AtomicU64> = (0..UNITS).map(|_| AtomicU64::new(0)).collect();
    let writers: Vec<AtomicU64> = (0..UNITS).map(|_| AtomicU64::new(0)).collect();
    let moved: Vec<AtomicU64> = (0..UNITS).map(|_| AtomicU64::new(0)).collect();
    let over = AtomicBool::new(false);
    let units = |extent: Extent| (extent.start() / 512) as usize..(extent.end() / 512) as usize;
    let client = |seed: u64| {
        let mut state = seed;
        let mut next = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        let mut granted = 0_u64;
        while !over.load(Ordering::SeqCst) {
            let start = next(TOTAL / 512);
            let end = (start + 1 + next(16)).min(TOTAL / 512);
            let access = if next(2) == 0 { Access::Read } else { Access::Write };
            let Ok(grant) = view.admit(access, extent(start * 512, end * 512)) else {
                std::thread::yield_now();
                continue;
            };
            granted += 1;
            let is_new = grant.segments.place(0) > 0;
            for unit in units(grant.extent) {
                let stage = moved[unit].load(Ordering::SeqCst);
                if access == Access::Write {
                    assert_eq!(writers[unit].fetch_add(1, Ordering::SeqCst), 0, "two writers");
                    assert!(stage == 0 && !is_new || stage == 3 && is_new, "a write at stage {stage}");
                } else {
                    readers[unit].fetch_add(1, Ordering::SeqCst);
                    assert!(stage < 2 && !is_new || stage == 3 && is_new, "a read at stage {stage}");
                }
            }
            std::thread::yield_now();
            for unit in units(grant.extent) {
                let count = if access == Access::Write { &writers } else { &readers };
                count[unit].fetch_sub(1, Ordering::SeqCst);
            }
            view.done(grant);
        }
        granted
    };
    std::thread::scope(|scope| {
        let clients: Vec<_> = (1..4).map(|seed| scope.spawn(move || client(seed))).collect();
        for step in 0..16 {
            let (from, until) = (step * 4096, (step + 1) * 4096);
            while !view.freeze(until) {
                std::thread::yield_now();
            }
            for unit in units(extent(from, until)) {
                assert_eq!(writers[unit].load(Ordering::SeqCst), 0, "a writer where it is read ahead");
                moved[unit].store(1, Ordering::SeqCst);
            }
            while !view.exclude(until) {
                std::thread::yield_now();
            }
            for unit in units(extent(from, until)) {
                assert_eq!(readers[unit].load(Ordering::SeqCst), 0, "a reader where it is overwritten");
                moved[unit].store(2, Ordering::SeqCst);
            }
            std::thread::yield_now();
            for unit in units(extent(from, until)) {
                moved[unit].store(3, Ordering::SeqCst);
            }
            view.renew();
            view.pass(until);
        }
        over.store(true, Ordering::SeqCst);
        let granted: u64 = clients.into_iter().map(|client| client.join().expect("no client objects")).sum();
        assert!(granted > 0);
    });
}
