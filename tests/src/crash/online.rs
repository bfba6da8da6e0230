//! Clients that read and write a volume while it is re-encrypted: the production loop with the production view, and requests on a queue of
//! their own over the same simulated disk, begun and ended at the loop's turns by a seeded schedule.
//!
//! What a client may find is known block by block (512 bytes): the values it was given, in their order, for two writes never share a block
//! at one time. A read finds one that was there, or on its way, while it was under way. After a power cut it is one not older than what a
//! completed flush covers, and not younger than what had been handed to the disk.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use engine::backend::sim::Phase;
use engine::backend::sim::World;
use engine::backend::sim::explore::{Case, Explore, Summary, Violation};
use engine::backend::sim::image::Image;
use engine::backend::{Op, Port, Position, Queue, What};
use engine::crypto::spec::CipherSpec;
use engine::crypto::{Kernel, Secret};
use engine::error::{Error, ErrorKind, Result};
use engine::format::luks2::metadata::SegmentKind;
use engine::format::luks2::reencrypt::Direction;
use engine::job::reencrypt::course;
use engine::job::reencrypt::online;
use engine::job::reencrypt::steps::{self, Ended, Pace, State, Steps, Traffic, Wish as Go};
use engine::pipeline::carrier::{Carrier, Inline, Turn};
use engine::pipeline::segment::Segments;
use engine::pipeline::view::{Access, Grant, View, Way};
use engine::sys::buffer::{Arena, Buf};
use engine::units::{DataUnit, Extent};
use engine::volume::reencrypt::ledger::Ledger;
use engine::volume::reencrypt::{Opened, Side};

use super::around::{Around, Wrapped};
use super::course::{Wrap, course_shape};
use super::judge::{Judge, Standing};
use super::proof::{Proof, mix, number_of};
use super::{HEADER, Volume};
use crate::Random;
use crate::jobs::noise;

/// What a client's bytes are told apart by.
const BLOCK: usize = 512;
/// Most bytes of a request.
const REQUEST_MAX: u64 = 16 << 10;
/// Requests in flight at most.
const CLIENTS: usize = 4;

/// Which rule is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Broken {
    /// None.
    Nothing,
    /// 1. Nobody waits for writes in flight before it reads ahead.
    FrozenTooSoon,
    /// 1. What is frozen is written all the same.
    NotFrozen,
    /// 2. What clients wrote is not flushed before the header says that its hotzone is being rewritten.
    NotDurable,
    /// 3. Nobody waits for reads in flight before it overwrites.
    ExcludedTooSoon,
    /// 5. Writes go on before the header says that they may.
    PassedTooSoon,
}

/// All that clients did.
#[derive(Clone)]
struct History {
    /// Of each block, the values it was given, with the events there had been when each was handed to the disk.
    values: Vec<Vec<(u64, [u8; BLOCK])>>,
    /// Flushes: events there had been when each came back, and of each block how many values were complete when it was asked for.
    flushes: Vec<(u64, Vec<usize>)>,
    /// Values that are complete.
    complete: Vec<usize>,
    reads: u64,
}

impl History {
    fn new(plain: &[u8]) -> Self {
        let block = |bytes: &[u8]| {
            let mut block = [0; BLOCK];
            block[..bytes.len()].copy_from_slice(bytes);
            vec![(0, block)]
        };
        let values: Vec<_> = plain.chunks(BLOCK).map(block).collect();
        let complete = vec![1; values.len()];
        Self { values, flushes: Vec::new(), complete, reads: 0 }
    }

    fn blocks(extent: Extent) -> std::ops::Range<usize> {
        let at = |byte: u64| usize::try_from(byte).expect("small") / BLOCK;
        at(extent.start())..at(extent.end())
    }

    /// Is every block one of the values it may have? `range`: of a block, the first and one past the last of them.
    fn check(
        &self,
        at: u64,
        bytes: &[u8],
        range: impl Fn(usize) -> (usize, usize),
    ) -> std::result::Result<(), String> {
        let first = usize::try_from(at).expect("small") / BLOCK;
        for (index, found) in bytes.chunks(BLOCK).enumerate() {
            let block = first + index;
            let (from, to) = range(block);
            let values = &self.values[block];
            if !values[from..to].iter().any(|(_, value)| value == found) {
                let which = values.iter().position(|(_, value)| value == found);
                return Err(format!(
                    "plaintext byte {} is none of its values {from}..{to} of {}, but {which:?}",
                    block * BLOCK,
                    values.len()
                ));
            }
        }
        Ok(())
    }
}

/// A request under way: of each part one operation.
struct Request {
    access: Access,
    /// What is left of it, behind the part under way.
    rest: Option<Extent>,
    grant: Option<Grant>,
    part: Option<(Extent, Arc<Segments>)>,
    /// Of a read: how many values each block had when it was asked for.
    since: Vec<usize>,
}

enum Under {
    Request(Request),
    Flush(Vec<usize>),
}

/// Some clients.
pub struct Clients {
    world: World,
    view: Arc<View>,
    queue: Box<dyn Queue>,
    port: Port,
    free: Vec<Buf>,
    under: Vec<Option<Under>>,
    dice: Random,
    unit: u64,
    /// Requests still to be made.
    left: u32,
    broken: Broken,
    /// Ciphers of before, for who does not ask.
    before: Arc<Segments>,
    history: History,
    wrong: Option<String>,
}

impl Clients {
    fn new(
        world: &World,
        volume: &Volume,
        view: &Arc<View>,
        before: Segments,
        seed: u64,
        broken: Broken,
    ) -> Result<Self> {
        let mut arena = Arena::simulated(u32::try_from(CLIENTS).expect("few"), 16 << 10)?;
        let mut queue = world.queue(&arena, 16);
        let port = queue.attach(world.file(volume.shape.data_disk()))?;
        Ok(Self {
            world: world.clone(),
            view: view.clone(),
            queue,
            port,
            free: arena.take_all(),
            under: (0..CLIENTS).map(|_| None).collect(),
            dice: Random::new(seed),
            unit: u64::from(volume.shape.units[0].max(volume.shape.units[1])),
            left: 150,
            broken,
            before: Arc::new(before),
            history: History::new(&volume.plain),
            wrong: None,
        })
    }

    fn below(&mut self, end: u64) -> u64 {
        self.dice.next_u64() % end
    }

    /// Something happens, or nothing.
    fn step(&mut self) {
        for at in 0..CLIENTS {
            let begins = self.left > 0 && self.below(3) == 0;
            match &self.under[at] {
                None if begins => self.make(at),
                // Refused before: asked again.
                Some(Under::Request(request)) if request.part.is_none() => self.go_on(at),
                _ => {}
            }
        }
        if self.queue.in_flight() > 0 && self.below(3) == 0 {
            self.collect();
        }
    }

    fn make(&mut self, at: usize) {
        self.left -= 1;
        if self.below(8) == 0 {
            let complete = self.history.complete.clone();
            self.under[at] = Some(Under::Flush(complete));
            self.push(at, What::Flush);
            return;
        }
        let units = self.view.total() / self.unit;
        let first = self.below(units);
        let most = (REQUEST_MAX / self.unit).min(units - first);
        let extent =
            Extent::new(first * self.unit, (first + 1 + self.below(most)) * self.unit).expect("not empty");
        let access = if self.below(3) == 0 { Access::Read } else { Access::Write };
        let request = Request { access, rest: Some(extent), grant: None, part: None, since: Vec::new() };
        self.under[at] = Some(Under::Request(request));
        self.go_on(at);
    }

    /// Is another request under way there?
    fn is_shared(&self, at: usize, extent: Extent) -> bool {
        self.under.iter().enumerate().any(|(other, under)| match under {
            Some(Under::Request(Request { part: Some((part, _)), .. })) => {
                other != at && part.overlaps(extent)
            }
            _ => false,
        })
    }

    /// The next part of a request, if that is admitted; or its end.
    fn go_on(&mut self, at: usize) {
        let shared = match &self.under[at] {
            Some(Under::Request(Request { rest: Some(rest), .. })) => self.is_shared(at, *rest),
            _ => false,
        };
        let Some(Under::Request(request)) = &mut self.under[at] else { return };
        let Some(rest) = request.rest else {
            self.under[at] = None;
            return;
        };
        let (part, segments) = match self.view.admit(request.access, rest) {
            Ok(grant) => {
                let granted = (grant.extent, grant.segments.clone());
                let early = match self.broken {
                    Broken::FrozenTooSoon => request.access == Access::Write,
                    Broken::ExcludedTooSoon => request.access == Access::Read,
                    _ => false,
                };
                if early {
                    self.view.done(grant);
                } else {
                    request.grant = Some(grant);
                }
                granted
            }
            // Only what nobody else has: that is another rule.
            Err(_)
                if self.broken == Broken::NotFrozen
                    && request.access == Access::Write
                    && !shared
                    && self.view.passed().is_some_and(|passed| passed <= rest.start()) =>
            {
                (rest, self.before.clone())
            }
            Err(_) => return,
        };
        let access = request.access;
        request.rest = Extent::new(part.end(), rest.end());
        request.part = Some((part, segments.clone()));
        let mut buf = self.free.pop().expect("one for each client");
        let span = 0..u32::try_from(part.len()).expect("small");
        let position = Position::At(segments.place(part.start()));
        let bytes = &mut buf[..span.end as usize];
        let what = match access {
            Access::Read => {
                request.since = History::blocks(part).map(|block| self.history.complete[block] - 1).collect();
                What::Read { position, buf, span }
            }
            Access::Write => {
                let events = self.world.events();
                bytes.copy_from_slice(&noise(bytes.len(), self.dice.next_u64()));
                for (block, value) in History::blocks(part).zip(bytes.chunks(BLOCK)) {
                    self.history.values[block].push((events, value.try_into().expect("a block")));
                }
                segments.at(part.start()).encrypt(part.start(), bytes);
                What::Write { position, buf, span }
            }
        };
        self.push(at, what);
    }

    fn push(&mut self, at: usize, what: What) {
        let op = Op { token: at as u64, port: self.port, what };
        assert!(self.queue.push(op).is_ok(), "there is room for each client");
        self.queue.kick().expect("a simulated queue does not break");
    }

    /// Let time pass until something comes back.
    fn collect(&mut self) {
        self.queue.wait(None).expect("a simulated queue does not break");
        let mut done = Vec::new();
        self.queue.reap(&mut done);
        for done in done {
            let at = usize::try_from(done.token).expect("small");
            done.result.expect("nothing fails here");
            match self.under[at].take().expect("it is under way") {
                Under::Flush(complete) => self.history.flushes.push((self.world.events(), complete)),
                Under::Request(mut request) => {
                    let (part, segments) = request.part.take().expect("a part was under way");
                    let mut buf = done.buf.expect("it comes back");
                    let bytes = &mut buf[..usize::try_from(part.len()).expect("small")];
                    match request.access {
                        Access::Read => {
                            segments.at(part.start()).decrypt(part.start(), bytes);
                            self.compare(part, bytes, &request.since);
                        }
                        Access::Write => {
                            for block in History::blocks(part) {
                                self.history.complete[block] += 1;
                            }
                        }
                    }
                    self.free.push(buf);
                    if let Some(grant) = request.grant.take() {
                        self.view.done(grant);
                    }
                    self.under[at] = Some(Under::Request(request));
                    self.go_on(at);
                }
            }
        }
    }

    fn compare(&mut self, part: Extent, bytes: &[u8], since: &[usize]) {
        self.history.reads += 1;
        let first = History::blocks(part).start;
        let range = |block: usize| (since[block - first], self.history.values[block].len());
        if let Err(why) = self.history.check(part.start(), bytes, range) {
            self.wrong.get_or_insert(format!("a read of {part}: {why}"));
        }
    }

    /// Nothing new is asked for; what is under way ends.
    fn leave(mut self) -> std::result::Result<History, String> {
        self.left = 0;
        for _ in 0..10_000 {
            if self.under.iter().all(Option::is_none) {
                break;
            }
            self.step();
        }
        if let Some(wrong) = self.wrong {
            return Err(wrong);
        }
        if self.under.iter().any(Option::is_some) {
            return Err("a request waits for ever".to_owned());
        }
        self.queue.detach(self.port);
        Ok(self.history)
    }
}

/// The workers, and clients at each of their turns.
struct Busy<'a> {
    inner: Inline,
    clients: &'a mut Clients,
}

impl Carrier for Busy<'_> {
    fn next(&mut self, wait: Duration) -> Turn {
        self.clients.step();
        self.inner.next(wait)
    }

    fn wake(&mut self) {
        self.inner.wake();
    }
}

/// As fast as it goes.
struct Free {
    ahead: bool,
}

impl Pace for Free {
    fn begun(&mut self) {}

    fn committed(&mut self) {}

    fn rest(&mut self) -> Duration {
        Duration::ZERO
    }

    fn may_read_ahead(&mut self) -> bool {
        self.ahead
    }
}

/// Data is flushed when a step is committed, and not by who asks for it.
struct FlushesItself {
    inner: Box<dyn Ledger>,
    world: World,
    disk: usize,
}

/// A step is committed when the next one begins.
struct CommitsLate {
    inner: Box<dyn Ledger>,
    late: Option<Extent>,
    total: u64,
}

impl Around for FlushesItself {
    fn inner(&self) -> &dyn Ledger {
        &*self.inner
    }

    fn inner_mut(&mut self) -> &mut dyn Ledger {
        &mut *self.inner
    }

    fn commit(&mut self, hot: Extent) -> Result<()> {
        self.world.blocking(self.disk, "data")?.flush()?;
        self.inner.commit(hot)
    }
}

/// Another program has the lock of the header: of one step when it begins, or of each when it is committed, once.
struct LockedOut {
    inner: Box<dyn Ledger>,
    /// The step that does not begin.
    at: Option<usize>,
    steps: usize,
    refused: bool,
}

impl LockedOut {
    fn refuse() -> Result<()> {
        Err(Error::new(ErrorKind::Conflict, "the header is locked by another program"))
    }
}

impl Around for LockedOut {
    fn inner(&self) -> &dyn Ledger {
        &*self.inner
    }

    fn inner_mut(&mut self) -> &mut dyn Ledger {
        &mut *self.inner
    }

    fn begin(&mut self, hot: Extent) -> Result<()> {
        self.steps += 1;
        if self.at == Some(self.steps) { Self::refuse() } else { self.inner.begin(hot) }
    }

    fn commit(&mut self, hot: Extent) -> Result<()> {
        self.refused = self.at.is_none() && !self.refused;
        if self.refused { Self::refuse() } else { self.inner.commit(hot) }
    }

    fn is_locked_out(&self) -> bool {
        self.refused
    }
}

impl CommitsLate {
    fn catch_up(&mut self) -> Result<()> {
        self.late.take().map_or(Ok(()), |hot| self.inner.commit(hot))
    }
}

impl Around for CommitsLate {
    fn inner(&self) -> &dyn Ledger {
        &*self.inner
    }

    fn inner_mut(&mut self) -> &mut dyn Ledger {
        &mut *self.inner
    }

    fn save(&mut self, hot: Extent, checksums: &[u8]) -> Result<()> {
        self.catch_up()?;
        self.inner.save(hot, checksums)
    }

    fn begin(&mut self, hot: Extent) -> Result<()> {
        self.catch_up()?;
        self.inner.begin(hot)
    }

    fn commit(&mut self, hot: Extent) -> Result<()> {
        self.late = Some(hot);
        if hot.end() == self.total { self.catch_up() } else { Ok(()) }
    }
}

/// Go on to the end while clients are there.
fn finish(world: &World, volume: &Volume, opened: Opened, seed: u64, broken: Broken) -> Result<History> {
    let disk = volume.shape.data_disk();
    let total = opened.total;
    let wrap = |inner: Box<dyn Ledger>| match broken {
        Broken::NotDurable => {
            Box::new(Wrapped(FlushesItself { inner, world: world.clone(), disk })) as Box<dyn Ledger>
        }
        Broken::PassedTooSoon => Box::new(Wrapped(CommitsLate { inner, late: None, total })),
        _ => inner,
    };
    let (ended, history) = run(world, volume, opened, seed, broken, &wrap)?;
    match ended.failure {
        None => Ok(history),
        Some(error) => Err(error),
    }
}

/// A rotation with clients, for whose header's lock another program comes: at the beginning of a step, which ends the rotation, or (`None`)
/// at the end of each, which does not. Whatever becomes of it, no request of a client fails or waits for ever. Returns how it ended.
///
/// # Errors
/// A client read what was never there, or waits for ever. As the production code has them.
pub fn locked_out(volume: &Volume, seed: u64, at: Option<usize>) -> Result<Ended> {
    let world = World::new(seed);
    for (image, options) in &volume.disks {
        world.add(image.clone(), *options)?;
    }
    let opened = super::course::begin(&world, volume)?;
    let wrap =
        |inner| Box::new(Wrapped(LockedOut { inner, at, steps: 0, refused: false })) as Box<dyn Ledger>;
    run(&world, volume, opened, seed, Broken::Nothing, &wrap).map(|(ended, _)| ended)
}

/// The loop, beside clients, with another ledger.
fn run(
    world: &World,
    volume: &Volume,
    opened: Opened,
    seed: u64,
    broken: Broken,
    wrap: Wrap<'_>,
) -> Result<(Ended, History)> {
    let wrong = |why: String| Error::new(ErrorKind::Internal, why);
    let disk = volume.shape.data_disk();
    let shape = course_shape(world, (&volume.shape).into())?;
    let side = |side: &Side| course::segments(side, None, shape.kernel);
    online::check(&opened, 512, "data")?;
    let course = course::lay(&opened, &shape, None)?;
    steps::hold_back(&course);
    let way = match opened.direction {
        Direction::Forward => Way::Forward,
        Direction::Backward => Way::Backward,
    };
    let view = View::mixed(side(&opened.old)?, side(&opened.new)?, way, course.from, opened.total);
    let mut clients = Clients::new(world, volume, &view, side(&opened.old)?, seed, broken)?;
    online::begin(&view, &opened, &course, &shape)?;
    let inner = Inline::new(world, &course.transfer, course.news.clone(), course.buffers)?;
    let mut ledger = wrap(opened.ledger);
    // What is not to be made durable by the loop: another disk is.
    let flushed = if broken == Broken::NotDurable { HEADER } else { disk };
    let mut data = world.blocking(flushed, "data")?;
    let mut busy = Busy { inner, clients: &mut clients };
    let ended = steps::run(Steps {
        course: &course,
        carrier: &mut busy,
        ledger: &mut *ledger,
        data: &mut data,
        wish: &mut || Go::Go,
        at_rest: &mut || (),
        traffic: Some(Traffic {
            view: &view,
            pace: &mut Free { ahead: seed.is_multiple_of(2) },
            sound: &|| Ok(()),
        }),
    });
    drop((busy, ledger, data));
    if ended.state == State::Crash {
        // What is not recovered is not served.
        let cause = ended.failure.expect("why it is not at rest");
        return Err(wrong("the step is to be recovered".to_owned()).because(cause));
    }
    Ok((ended, clients.leave().map_err(wrong)?))
}

/// All of the plaintext, by what the header says of it.
fn plain(world: &World, volume: &Volume, new: &Secret) -> std::result::Result<Vec<u8>, String> {
    let mut header = world.blocking(HEADER, "header").map_err(|error| error.chain())?;
    let loaded = Judge::load(&mut header)?;
    let metadata = &loaded.header.metadata;
    let mut found = vec![0; usize::try_from(volume.data_bytes()).expect("small")];
    let file = world.file(volume.shape.data_disk());
    let count = rustix::io::pread(&*file, &mut found, 0).map_err(|errno| errno.to_string())?;
    let mut all = Vec::with_capacity(volume.plain.len());
    for (id, segment) in metadata.data_segments() {
        let SegmentKind::Crypt { encryption, sector_size, iv_tweak, .. } = &segment.kind else {
            return Err(format!("segment {id} is plain"));
        };
        let (_, digest) = metadata.digest_of_segment(id).ok_or(format!("no digest of segment {id}"))?;
        let old = volume.old.as_ref().filter(|_| volume.is_old(digest)).map(|(key, _)| key);
        let spec = CipherSpec::parse(encryption).map_err(|error| error.chain())?;
        let cipher =
            spec.build(Kernel::best().expect("a kernel"), old.unwrap_or(new), *sector_size, *iv_tweak);
        let left = (volume.plain.len() - all.len()) as u64;
        let bytes = usize::try_from(segment.size.unwrap_or(left)).expect("small");
        let offset = usize::try_from(segment.offset).expect("small");
        let bytes =
            found[..count].get_mut(offset..offset + bytes).ok_or(format!("segment {id} is cut off"))?;
        cipher.map_err(|error| error.chain())?.decrypt(DataUnit(0), bytes);
        all.extend_from_slice(bytes);
    }
    if all.len() == volume.plain.len() { Ok(all) } else { Err(format!("{} bytes of data", all.len())) }
}

/// What a run leaves for its judges.
struct Left {
    history: History,
    new: Secret,
}

/// What was tried.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tried {
    /// Power cuts, and what they were made at.
    pub summary: Summary,
    /// Values that clients wrote, and reads that were compared.
    pub writes: u64,
    /// See `writes`.
    pub reads: u64,
}

/// A whole rotation with clients, cut everywhere; what is found is recovered, compared, and one in so many gone on with to the end, with
/// clients or without.
///
/// # Errors
/// The first case in which something was lost, or a client read what was never there.
///
/// # Panics
/// If the production code fails.
pub fn explore(proof: &Proof<'_>, seed: u64, broken: Broken) -> std::result::Result<Tried, Violation> {
    let volume = proof.volume;
    let explore = Explore {
        tears: proof.depth.tears,
        cuts_max: proof.depth.cuts_max,
        disks: volume.disks.clone(),
        ..Explore::new(&proof.name, seed, Image::default())
    };
    let left: Mutex<Option<Arc<Left>>> = Mutex::new(None);
    let failed: Mutex<Option<String>> = Mutex::new(None);
    let act = |world: &World| {
        let opened = super::course::begin(world, volume)?;
        proof.learn(world, &opened).map_err(|why| Error::new(ErrorKind::Internal, why))?;
        let (_, key) = opened.new.cipher.as_ref().expect("a new key");
        let new = Secret::copy_of(key.as_bytes())?;
        match finish(world, volume, opened, mix(seed), broken) {
            Ok(history) => *left.lock().expect("unharmed") = Some(Arc::new(Left { history, new })),
            // A client saw it before any power went.
            Err(error) => *failed.lock().expect("unharmed") = Some(error.chain()),
        }
        Ok(())
    };
    let judge = |found: &World, case: &Case| {
        if let Some(why) = &*failed.lock().expect("unharmed") {
            return Err(why.clone());
        }
        let left = left.lock().expect("unharmed").clone().expect("the run is over");
        ending(proof, found, case, &left)
    };
    let summary = explore.recorded(act, judge)?;
    let left = left.into_inner().expect("unharmed").expect("the run is over");
    let writes = left.history.values.iter().map(|values| values.len() as u64 - 1).sum();
    Ok(Tried { summary, writes, reads: left.history.reads })
}

/// The disks as they are found.
fn ending(proof: &Proof<'_>, found: &World, case: &Case, left: &Left) -> std::result::Result<(), String> {
    let history = &left.history;
    proof.recover(found)?;
    let there = plain(found, proof.volume, &left.new)?;
    let done = match case.cut {
        None => u64::MAX,
        Some(cut) if cut.phase == Phase::After => cut.event,
        Some(cut) => cut.event - 1,
    };
    let range = |block: usize| {
        let durable =
            history.flushes.iter().filter(|(event, _)| *event <= done).map(|(_, complete)| complete[block]);
        let from = durable.max().unwrap_or(1) - 1;
        let to = history.values[block].iter().filter(|(event, _)| *event <= done).count();
        (from, to)
    };
    history.check(0, &there, range)?;
    if !mix(number_of(case) ^ 3).is_multiple_of(proof.depth.resume_every.max(1)) {
        return Ok(());
    }
    // Gone on with: without clients nothing changes, and with them all is theirs.
    let keys = proof.volume.shape.passphrases();
    let failed = |error: Error| format!("cannot be gone on with: {}", error.chain());
    let Some(opened) = super::course::open(found, proof.volume, &keys).map_err(failed)? else {
        return Ok(());
    };
    let (_, key) = opened.new.cipher.as_ref().expect("a new key");
    let new = Secret::copy_of(key.as_bytes()).map_err(failed)?;
    if opened.boundary == opened.total {
        return Ok(());
    }
    let alone = case.tear.is_multiple_of(2);
    let wanted = if alone {
        super::course::finish(found, (&proof.volume.shape).into(), opened, &super::course::as_it_is)
            .map_err(failed)?;
        there
    } else {
        // Their volume is what was found.
        let shape = proof.volume.shape;
        let old =
            proof.volume.old.as_ref().map(|(key, salt)| {
                (Secret::copy_of(key.as_bytes()).expect("memory for a secret"), salt.clone())
            });
        let volume = Volume { shape, disks: proof.volume.disks.clone(), plain: there, old };
        let history = finish(found, &volume, opened, number_of(case), Broken::Nothing).map_err(failed)?;
        history.values.iter().flat_map(|values| values.last().expect("a value").1).collect()
    };
    if plain(found, proof.volume, &new)? != wanted {
        return Err("gone on with to the end, and something is lost".to_owned());
    }
    match header_standing(found)? {
        Standing::Over => Ok(()),
        other => Err(format!("gone on with to the end, but {other:?}")),
    }
}

fn header_standing(found: &World) -> std::result::Result<Standing, String> {
    let mut header = found.blocking(HEADER, "header").map_err(|error| error.chain())?;
    let loaded = Judge::load(&mut header)?;
    let state = engine::format::luks2::reencrypt::read::read(&loaded.header.metadata)
        .map_err(|error| error.chain())?;
    Ok(if state.is_none() { Standing::Over } else { Standing::UnderWay(0) })
}
