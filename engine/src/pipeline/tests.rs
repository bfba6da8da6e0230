//! Rewriting in place: one driver of the three flows, on the threads of a pipeline over real files and on the caller's own over
//! simulated disks. It looks at the disk before it moves a barrier: nothing may be there that the barrier was to hold back.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::{Receiver, unbounded};

use super::carrier::{Carrier, Turn};
use super::plan::Plan;
use super::rewrite::{Checksummer, Journal, News, Prover, Rewrite};
use super::segment::{Segment, Segments};
use super::transfer::{End, SinkRules, Transfer, TransferSpec, Work};
use super::{Pipeline, PipelineConfig, QueueChoice};
use crate::crypto::{Kernel, Layout, VolumeKey, cipher, recrypter};
use crate::units::Extent;

/// Where the journal lies.
const AREA: u64 = 4096;
/// Where the data begins.
const DATA: u64 = 128 << 10;
/// Behind the data lies something that is nobody's business.
const TAIL: usize = 5000;

const WAIT: Duration = Duration::from_secs(20);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flow {
    None,
    Checksums,
    Journal,
}

#[derive(Debug, Clone, Copy)]
struct Setup {
    flow: Flow,
    total: u64,
    chunk: u32,
    hot: u64,
    backward: bool,
    start: u64,
    units: (u32, u32),
    fused: bool,
    proof: bool,
    /// The old data changes its cipher here.
    seam: Option<u64>,
    read_only: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            flow: Flow::Checksums,
            total: 300 << 10,
            chunk: 8 << 10,
            hot: 64 << 10,
            backward: false,
            start: 0,
            units: (512, 4096),
            fused: false,
            proof: false,
            seam: None,
            read_only: false,
        }
    }
}

/// Eight bytes of each block of 512: enough to see whose they are.
struct Heads;

impl Checksummer for Heads {
    fn checksums(&self, bytes: &[u8]) -> Box<[u8]> {
        bytes.chunks(512).flat_map(|block| &block[..8]).copied().collect()
    }
}

/// A sum over the words of the plaintext and where they are.
struct Sum;

fn sum(offset: u64, plaintext: &[u8]) -> u64 {
    (0..).zip(plaintext.chunks(8)).fold(0_u64, |sum, (index, word)| {
        let word = u64::from_le_bytes(word.try_into().expect("whole words"));
        sum.wrapping_add((word ^ (offset + index * 8)).wrapping_mul(0x9E37_79B9_7F4A_7C15))
    })
}

impl Prover for Sum {
    fn contribution(&self, offset: u64, plaintext: &[u8]) -> [u8; 32] {
        assert!(offset.is_multiple_of(4096), "a chunk is cut at {offset}");
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&sum(offset, plaintext).to_le_bytes());
        bytes
    }
}

fn key(salt: u8) -> VolumeKey {
    let bytes: Vec<u8> = (0..64).map(|at: u8| at.wrapping_mul(7).wrapping_add(salt)).collect();
    VolumeKey::new(&bytes).expect("a key")
}

fn segment(salt: u8, unit: u32, start: u64) -> Segment {
    let layout = Layout { offset_sectors: start / 512, ..Layout::plain64(unit) };
    let cipher = cipher(Kernel::Portable, &key(salt), layout).expect("a cipher");
    Segment { start, offset: DATA + start, unit_bytes: unit, cipher: Some(cipher) }
}

impl Setup {
    fn old_segments(&self) -> Segments {
        let first = segment(1, self.units.0, 0);
        Segments::new([first].into_iter().chain(self.seam.map(|at| segment(9, self.units.0, at))).collect())
    }

    fn new_segments(&self) -> Segments {
        Segments::new(vec![segment(2, self.units.1, 0)])
    }

    fn plaintext(&self) -> Vec<u8> {
        (0..self.total).map(|at| (at.wrapping_mul(0x9E37_79B9) >> 7).to_le_bytes()[1]).collect()
    }

    /// The data under these segments.
    fn data(&self, segments: &Segments) -> Vec<u8> {
        let mut bytes = self.plaintext();
        for (index, block) in bytes.chunks_mut(4096).enumerate() {
            let at = index as u64 * 4096;
            segments.at(at).encrypt(at, block);
        }
        bytes
    }

    /// The extent of plaintext of a run of order.
    fn extent(&self, from: u64, to: u64) -> Extent {
        let (from, to) = if self.backward { (self.total - to, self.total - from) } else { (from, to) };
        Extent::new(from, to).expect("not empty")
    }

    /// The disk as it is when `start` bytes of order are new.
    fn disk(&self, start: u64) -> Vec<u8> {
        let mut data = self.data(&self.old_segments());
        if start > 0 {
            let done = self.extent(0, start);
            let new = self.data(&self.new_segments());
            let range = range(done);
            data[range.clone()].copy_from_slice(&new[range]);
        }
        let mut disk = vec![0x11; usize::try_from(DATA).expect("small")];
        disk.extend(data);
        disk.extend([0x22; TAIL]);
        disk
    }

    fn transfer(&self, file: &Arc<OwnedFd>, workers: usize) -> (Arc<Transfer>, Receiver<News>) {
        let end = || End { file: file.clone(), name: "disk".into(), stream: false, align: 1, holes: None };
        let plan = if self.backward {
            Plan::backward(self.total, self.chunk)
        } else {
            Plan::new(Some(self.total), self.chunk)
        };
        let spec = TransferSpec {
            work: Work::Recrypt,
            source: end(),
            sink: end(),
            rules: SinkRules::default(),
            pad: false,
            keep_holes: false,
            depth: 4,
            plan,
        };
        let transfer = Transfer::new(spec, workers);
        let (tell, news) = unbounded();
        let layout = |unit| Layout::plain64(unit);
        let fused = self.fused.then(|| {
            let (old, new) = (key(1), key(2));
            recrypter(Kernel::Portable, (&old, layout(self.units.0)), (&new, layout(self.units.1)))
                .expect("a recrypter")
        });
        let journal = Journal { file: file.clone(), name: "journal".into(), offset: AREA, align: 512 };
        transfer.set_rewrite(Rewrite {
            old: self.old_segments(),
            new: self.new_segments(),
            fused,
            checksums: (self.flow == Flow::Checksums).then(|| Box::new(Heads) as Box<dyn Checksummer>),
            journal: (self.flow == Flow::Journal).then_some(journal),
            prover: self.proof.then(|| Box::new(Sum) as Box<dyn Prover>),
            read_only: self.read_only,
            news: tell,
        });
        transfer.plan.start_at(self.start);
        transfer.plan.cut_at(self.seam.into_iter().collect());
        if self.flow != Flow::None {
            transfer.plan.write_until(self.start);
            transfer.plan.open_until(transfer.plan.cut(self.start, self.hot));
        }
        (transfer, news)
    }
}

fn range(extent: Extent) -> std::ops::Range<usize> {
    usize::try_from(extent.start()).expect("small")..usize::try_from(extent.end()).expect("small")
}

fn read(file: &OwnedFd, offset: u64, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    assert_eq!(rustix::io::pread(file, &mut bytes[..], offset).expect("read"), count);
    bytes
}

/// What a driver has heard.
#[derive(Default)]
struct Heard {
    arrived: Vec<Extent>,
    journalled: Vec<Extent>,
    written: Vec<Extent>,
    checksums: Vec<(u64, Box<[u8]>)>,
    proof: u64,
}

impl Heard {
    fn hear(&mut self, news: News) {
        let add = |sum: &mut u64, proof: Option<[u8; 32]>| {
            let part = proof.map_or(0, |proof| u64::from_le_bytes(proof[..8].try_into().expect("eight")));
            *sum = sum.wrapping_add(part);
        };
        match news {
            News::Arrived { extent, checksums, proof } => {
                self.arrived.push(extent);
                self.checksums.push((extent.start(), checksums));
                add(&mut self.proof, proof);
            }
            News::Journalled { extent } => self.journalled.push(extent),
            News::Written { extent, proof } => {
                self.written.push(extent);
                add(&mut self.proof, proof);
            }
            News::Quiet => panic!("nobody waits for clients here"),
        }
    }
}

/// Are these pieces all of the extent, each byte once, as far as they lie in it? None may cross its ends.
fn covers(pieces: &[Extent], extent: Extent) -> bool {
    let mut inside: Vec<_> = pieces
        .iter()
        .filter(|piece| piece.overlaps(extent))
        .map(|piece| (piece.start(), piece.end()))
        .collect();
    inside.sort_unstable();
    assert!(inside.windows(2).all(|pair| pair[0].1 <= pair[1].0), "a byte came twice: {inside:?}");
    let (Some(first), Some(last)) = (inside.first(), inside.last()) else { return false };
    assert!(first.0 >= extent.start() && last.1 <= extent.end(), "{inside:?} cross {extent}");
    inside.iter().map(|(start, end)| end - start).sum::<u64>() == extent.len()
}

/// Hear until that is so.
fn until(carrier: &mut dyn Carrier, heard: &mut Heard, so: impl Fn(&Heard) -> bool) {
    while !so(heard) {
        match carrier.next(WAIT) {
            Turn::News(news) => heard.hear(news),
            other => panic!("{other:?} instead of news"),
        }
    }
}

fn end(carrier: &mut dyn Carrier, heard: &mut Heard) {
    loop {
        match carrier.next(WAIT) {
            Turn::News(news) => heard.hear(news),
            Turn::Ended => return,
            Turn::Idle => panic!("idle instead of the end"),
        }
    }
}

/// One hotzone after the other, reading one ahead.
fn drive(setup: &Setup, transfer: &Transfer, file: &OwnedFd, carrier: &mut dyn Carrier) -> Heard {
    let mut heard = Heard::default();
    let plan = &transfer.plan;
    let mut at = setup.start;
    let before = setup.disk(setup.start);
    while at < setup.total && setup.flow != Flow::None {
        let next = plan.cut(at, setup.hot);
        let hot = setup.extent(at, next);
        plan.open_until(plan.cut(next, setup.hot));
        carrier.wake();
        until(carrier, &mut heard, |heard| covers(&heard.arrived, hot));
        let place = usize::try_from(DATA).expect("small") + range(hot).start;
        let len = range(hot).len();
        let still_old = || read(file, place as u64, len) == before[place..place + len];
        assert!(still_old(), "written before its time: {hot}");
        let old = &before[place..place + len];
        if setup.flow == Flow::Journal {
            plan.journal(hot);
            carrier.wake();
            until(carrier, &mut heard, |heard| covers(&heard.journalled, hot));
            assert!(read(file, AREA, len) == old, "the journal of {hot}");
            assert!(still_old(), "written before its time: {hot}");
        } else {
            let mut sums: Vec<_> = heard
                .checksums
                .iter()
                .filter(|(start, _)| range(hot).contains(&usize::try_from(*start).expect("small")))
                .collect();
            sums.sort();
            let sums: Vec<u8> = sums.iter().flat_map(|(_, sums)| sums.iter().copied()).collect();
            assert!(sums[..] == Heads.checksums(old)[..], "checksums of {hot}");
        }
        plan.write_until(next);
        carrier.wake();
        until(carrier, &mut heard, |heard| covers(&heard.written, hot));
        at = next;
    }
    end(carrier, &mut heard);
    heard
}

/// What must be there at the end, whatever the flow.
fn check(setup: &Setup, transfer: &Transfer, file: &OwnedFd, heard: &Heard) {
    if let Some(error) = transfer.take_failure() {
        panic!("failed: {}", error.chain());
    }
    let expected = setup.disk(setup.total);
    let skip = usize::try_from(DATA).expect("small");
    let found = read(file, DATA, expected.len() - skip);
    let differs = found.iter().zip(&expected[skip..]).position(|(one, two)| one != two);
    assert_eq!(differs, None, "{setup:?}");
    assert!(covers(&heard.written, setup.extent(setup.start, setup.total)));
    assert!(covers(&heard.arrived, setup.extent(setup.start, setup.total)));
    if setup.proof && setup.start == 0 {
        assert_eq!(heard.proof, sum(0, &setup.plaintext()), "{setup:?}");
    }
    assert_eq!(transfer.totals().done_bytes, setup.total - setup.start);
}

/// Every shape that matters: flows, directions, where it starts, fused or not, with proof or without.
fn setups() -> Vec<Setup> {
    let mut setups = Vec::new();
    for flow in [Flow::None, Flow::Checksums, Flow::Journal] {
        for backward in [false, true] {
            let base = Setup { flow, backward, ..Setup::default() };
            setups.extend([
                base,
                Setup { start: 64 << 10, ..base },
                Setup { proof: true, units: (4096, 512), ..base },
                Setup { fused: true, units: (4096, 4096), ..base },
                Setup { seam: Some(100 << 10), proof: true, ..base },
                // Hotzones that are no whole chunks, and a last one that is no whole block.
                Setup { hot: 28 << 10, total: (201 << 10) + 512, units: (512, 512), proof: true, ..base },
                // A chunk larger than a hotzone, and one larger than the volume.
                Setup { chunk: 64 << 10, hot: 20 << 10, total: 100 << 10, ..base },
                Setup { chunk: 512 << 10, hot: 96 << 10, total: 12 << 10, ..base },
            ]);
        }
    }
    setups
}

/// Enough buffers for the largest hotzone of a setup, on each worker.
fn buffers(setup: &Setup) -> u32 {
    u32::try_from(setup.hot.div_ceil(setup.chunk.into()) + 2).expect("few")
}

fn file_with(bytes: &[u8]) -> Arc<OwnedFd> {
    let file = rustix::fs::memfd_create("rewrite", rustix::fs::MemfdFlags::CLOEXEC).expect("a file");
    assert_eq!(rustix::io::pwrite(&file, bytes, 0).expect("written"), bytes.len());
    Arc::new(file)
}

fn pipeline(queue: QueueChoice, workers: u32) -> Pipeline {
    let config = PipelineConfig {
        cpus: (0..workers).collect(),
        pin: false,
        queue,
        buffer_bytes: 64 << 10,
        buffers_per_worker: 4,
    };
    Pipeline::start(&config).expect("pipeline")
}

fn on_threads(pipeline: &Pipeline, setup: &Setup) {
    let file = file_with(&setup.disk(setup.start));
    let (transfer, news) = setup.transfer(&file, pipeline.workers());
    let mut carrier = pipeline.carry(&transfer, news, pipeline.workers(), buffers(setup)).expect("buffers");
    let heard = drive(setup, &transfer, &file, &mut carrier);
    check(setup, &transfer, &file, &heard);
}

#[test]
fn every_flow_rewrites_a_file_on_one_worker_and_on_two() {
    for queue in [QueueChoice::Auto, QueueChoice::Threads] {
        for workers in [1, 2] {
            let pipeline = pipeline(queue, workers);
            for setup in setups() {
                on_threads(&pipeline, &setup);
            }
        }
    }
}

#[test]
fn transfers_with_few_buffers_share_a_worker() {
    let pipeline = pipeline(QueueChoice::Auto, 2);
    std::thread::scope(|scope| {
        for flow in [Flow::Journal, Flow::Checksums, Flow::None] {
            let pipeline = &pipeline;
            scope.spawn(move || {
                // Two workers with four buffers each hold one hotzone and nothing more.
                let setup = Setup { flow, total: 2 << 20, hot: 64 << 10, ..Setup::default() };
                let file = file_with(&setup.disk(0));
                let (transfer, news) = setup.transfer(&file, 2);
                let mut carrier = pipeline.carry(&transfer, news, 2, 4).expect("buffers");
                let heard = drive(&setup, &transfer, &file, &mut carrier);
                check(&setup, &transfer, &file, &heard);
            });
        }
        // A copy beside them uses the workers' own buffers.
        let pipeline = &pipeline;
        scope.spawn(move || {
            let setup = Setup { total: 4 << 20, ..Setup::default() };
            let source = file_with(&setup.plaintext());
            let sink = file_with(&[]);
            let end = |file: &Arc<OwnedFd>| End {
                file: file.clone(),
                name: "file".into(),
                stream: false,
                align: 1,
                holes: None,
            };
            let spec = TransferSpec {
                work: Work::Encrypt,
                source: end(&source),
                sink: end(&sink),
                rules: SinkRules::default(),
                pad: false,
                keep_holes: false,
                depth: 4,
                plan: Plan::new(Some(setup.total), 64 << 10),
            };
            let transfer = Transfer::new(spec, 2);
            transfer.set_segments(setup.new_segments());
            pipeline.run(&transfer, 2);
            transfer.ended.recv_timeout(WAIT).expect("the end");
            assert!(read(&sink, DATA, 4 << 20) == setup.data(&setup.new_segments()));
        });
    });
}

#[test]
fn a_verification_reads_and_writes_nothing() {
    let setup =
        Setup { read_only: true, proof: true, flow: Flow::None, units: (512, 512), ..Setup::default() };
    let disk = setup.disk(setup.total);
    let file = file_with(&disk);
    let pipeline = pipeline(QueueChoice::Auto, 2);
    let (transfer, news) = setup.transfer(&file, 2);
    let mut carrier = pipeline.carry(&transfer, news, 2, 4).expect("buffers");
    let mut heard = Heard::default();
    end(&mut carrier, &mut heard);
    assert!(covers(&heard.arrived, setup.extent(0, setup.total)));
    assert_eq!((heard.written.len(), heard.proof), (0, sum(0, &setup.plaintext())));
    assert!(read(&file, 0, disk.len()) == disk);
}

#[test]
fn a_paused_transfer_holds_what_it_has_claimed_and_still_writes_it() {
    let pipeline = pipeline(QueueChoice::Auto, 2);
    let setup = Setup { hot: 32 << 10, ..Setup::default() };
    let file = file_with(&setup.disk(0));
    let (transfer, news) = setup.transfer(&file, 2);
    let mut carrier = pipeline.carry(&transfer, news, 2, buffers(&setup)).expect("buffers");
    let hot = setup.extent(0, setup.hot);
    let mut heard = Heard::default();
    until(&mut carrier, &mut heard, |heard| covers(&heard.arrived, hot));
    transfer.gate.set_paused(true);
    transfer.plan.open_until(u64::MAX);
    carrier.wake();
    assert!(matches!(carrier.next(Duration::from_millis(50)), Turn::Idle), "nothing is claimed");
    transfer.plan.write_until(setup.hot);
    carrier.wake();
    until(&mut carrier, &mut heard, |heard| covers(&heard.written, hot));
    transfer.gate.set_paused(false);
    transfer.plan.write_until(u64::MAX);
    carrier.wake();
    end(&mut carrier, &mut heard);
    check(&setup, &transfer, &file, &heard);
}

#[test]
fn what_is_held_when_it_fails_is_never_written() {
    for flow in [Flow::Checksums, Flow::Journal] {
        let pipeline = pipeline(QueueChoice::Auto, 2);
        let setup = Setup { flow, ..Setup::default() };
        let disk = setup.disk(0);
        let file = file_with(&disk);
        let (transfer, news) = setup.transfer(&file, 2);
        let mut carrier = pipeline.carry(&transfer, news, 2, buffers(&setup)).expect("buffers");
        let hot = setup.extent(0, setup.hot);
        let mut heard = Heard::default();
        until(&mut carrier, &mut heard, |heard| covers(&heard.arrived, hot));
        transfer.fail(crate::error::Error::new(crate::error::ErrorKind::Io, "the header is gone"));
        transfer.plan.journal(hot);
        transfer.plan.write_until(u64::MAX);
        carrier.wake();
        end(&mut carrier, &mut heard);
        assert!(heard.written.is_empty() && heard.journalled.is_empty());
        assert!(read(&file, 0, disk.len()) == disk, "{flow:?}");
        let failure = transfer.take_failure().expect("a failure");
        assert_eq!(failure.to_string(), "the header is gone");
    }
}

#[cfg(feature = "sim")]
mod simulated {
    use super::super::carrier::Inline;
    use super::*;
    use crate::backend::sim::image::Image;
    use crate::backend::sim::{DiskOptions, Effect, Fault, On, When, World};

    fn world(seed: u64, setup: &Setup) -> (World, Arc<OwnedFd>) {
        let world = World::new(seed);
        world.add(Image::of(&setup.disk(setup.start)), DiskOptions::default()).expect("a disk");
        let file = world.file(0);
        (world, file)
    }

    /// One seed's history: everything heard, in its order.
    fn history(seed: u64, setup: &Setup) -> (Vec<Extent>, Vec<Extent>, u64, u64) {
        let (world, file) = world(seed, setup);
        let (transfer, news) = setup.transfer(&file, 1);
        let mut carrier = Inline::new(&world, &transfer, news, buffers(setup)).expect("buffers");
        let heard = drive(setup, &transfer, &file, &mut carrier);
        check(setup, &transfer, &file, &heard);
        (heard.arrived, heard.written, world.clock(), world.events())
    }

    #[test]
    fn every_flow_rewrites_a_simulated_disk() {
        for (seed, setup) in (1..).zip(setups()) {
            history(seed, &setup);
        }
    }

    #[test]
    fn one_seed_has_one_history() {
        let setup = Setup { flow: Flow::Journal, ..Setup::default() };
        assert_eq!(history(7, &setup), history(7, &setup));
        assert_ne!(history(7, &setup), history(8, &setup));
    }

    #[test]
    fn nothing_moves_behind_a_barrier() {
        let setup = Setup::default();
        let (world, file) = world(3, &setup);
        let (transfer, news) = setup.transfer(&file, 1);
        let mut carrier = Inline::new(&world, &transfer, news, buffers(&setup)).expect("buffers");
        let mut heard = Heard::default();
        while let Turn::News(news) = carrier.next(WAIT) {
            heard.hear(news);
        }
        assert!(covers(&heard.arrived, setup.extent(0, setup.hot)));
        assert_eq!((heard.arrived.len(), heard.written.len(), world.events()), (8, 0, 0));
        assert!(matches!(carrier.next(WAIT), Turn::Idle));
    }

    #[test]
    fn held_chunks_are_written_in_order() {
        for backward in [false, true] {
            let setup = Setup { backward, ..Setup::default() };
            let (world, file) = world(4, &setup);
            let (transfer, news) = setup.transfer(&file, 1);
            let mut carrier = Inline::new(&world, &transfer, news, 100).expect("buffers");
            transfer.plan.open_until(u64::MAX);
            let mut heard = Heard::default();
            until(&mut carrier, &mut heard, |heard| covers(&heard.arrived, setup.extent(0, setup.total)));
            let order = |extent: &Extent| transfer.plan.order_of(*extent).0;
            assert!(!heard.arrived.iter().map(order).is_sorted(), "the disk answers in no order");
            transfer.plan.write_until(u64::MAX);
            end(&mut carrier, &mut heard);
            // Four are in flight at once, and come back in any order.
            for (index, extent) in (0_u64..).zip(&heard.written) {
                assert!(order(extent) / u64::from(setup.chunk) < index + 4, "{:?}", heard.written);
            }
        }
    }

    #[test]
    fn an_operation_that_fails_is_named_and_nothing_more_is_written() {
        for (on, flow, expected) in [
            (On::Read, Flow::Checksums, "read failed"),
            (On::Write, Flow::Checksums, "write failed"),
            (On::Write, Flow::Journal, "cannot write the journal"),
        ] {
            let setup = Setup { flow, ..Setup::default() };
            let (world, file) = world(5, &setup);
            world.inject(Fault { disk: 0, on, when: When::Nth(3), effect: Effect::Fail(libc::EIO) });
            let (transfer, news) = setup.transfer(&file, 1);
            transfer.plan.journal(setup.extent(0, setup.hot));
            transfer.plan.write_until(setup.hot);
            let mut carrier = Inline::new(&world, &transfer, news, buffers(&setup)).expect("buffers");
            let mut heard = Heard::default();
            if on == On::Read {
                // A place that cannot be read is no reason to leave a step that is being written unfinished: who drives it stops it.
                loop {
                    match carrier.next(WAIT) {
                        Turn::News(news) => heard.hear(news),
                        Turn::Idle => break,
                        Turn::Ended => panic!("the end of its own accord"),
                    }
                }
                assert!(transfer.has_failed());
                transfer.gate.stop();
                carrier.wake();
            }
            end(&mut carrier, &mut heard);
            let failure = transfer.take_failure().expect("a failure").chain();
            assert!(failure.contains(expected), "{failure}");
            assert!(heard.written.len() < 8, "{on:?}");
            assert!(world.events() < 12);
        }
    }
}
