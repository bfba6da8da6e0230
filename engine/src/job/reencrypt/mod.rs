//! Re-encryption in place as a job.
//!
//! | file | its one purpose |
//! |---|---|
//! | `mod` | from the request to the end |
//! | `request` | the request checked: devices, secrets, locks |
//! | `course` | from an opened re-encryption to what the workers carry |
//! | `hotzone` | which chunks are here, and the next hotzone of them |
//! | `online` | beside an export: manner, view, and how much of the time |
//! | `memory` | what the buffers of all of them may take |
//! | `steps` | the loop over hotzones: which barrier moves when |
//! | `same` | whether what is asked for is what was begun |
//! | `proof` | digests of the plaintext before and after |
//! | `dry` | what it would do, and how long it would take |

pub mod course;
pub mod dry;
pub mod hotzone;
pub mod memory;
pub mod online;
pub mod proof;
pub mod request;
pub mod same;
pub mod steps;

use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::reencrypt::{Format, Luks, Mode, Phase, Report};

use crate::backend::blocking::{Blocking, Turns};
use crate::backend::device::Device;
use crate::crypto::Secret;
use crate::error::{Error, ErrorKind, Result};
use crate::format::luks2::reencrypt::{self as format, Direction, Mode as Becomes, Resilience, read};
use crate::job::reencrypt::course::{Course, Shape};
use crate::job::reencrypt::memory::Memory;
use crate::job::reencrypt::online::Share;
use crate::job::reencrypt::proof::Proving;
use crate::job::reencrypt::request::Prepared;
use crate::job::reencrypt::steps::{Ended, State, Steps, Traffic, Wish};
use crate::job::run::Ending;
use crate::job::state::Job;
use crate::pipeline::Pipeline;
use crate::pipeline::slot::Side;
use crate::units::Extent;
use crate::volume::Header;
use crate::volume::reencrypt::decide::Requirement;
use crate::volume::reencrypt::open::Found;
use crate::volume::reencrypt::{self as volume, Opened, begin, luks as ledger, open, sidecar};

/// How often a running job looks after itself.
const TICK: Duration = Duration::from_millis(250);

/// All that a job found to do.
const SWEPT: &str = "what was left of the last re-encryption was overwritten; nothing else to do";

/// Carry a re-encryption to its end, or to where it is safe to stop. `place_free` is called whenever it is paused and at rest: another
/// job may have its place.
///
/// # Errors
/// Why it failed or was cancelled, in which state the volume is, and how to go on.
pub fn run(job: &Job, pipeline: &Pipeline, mut prepared: Prepared, place_free: &dyn Fn()) -> Result<Ending> {
    let ended = carry(job, pipeline, &mut prepared, place_free);
    if ended.is_err() {
        // Only a header that has no name yet still has two: no data was touched for it.
        discard(&prepared);
    }
    ended
}

fn carry(job: &Job, pipeline: &Pipeline, prepared: &mut Prepared, place_free: &dyn Fn()) -> Result<Ending> {
    job.wait_while_paused()?;
    let desk = Desk::new(pipeline, place_free, prepared)?;
    if prepared.dry_run {
        return dry::run(job, &desk, prepared);
    }
    job.unlocking();
    let opened = desk.open(job, prepared);
    job.unlocked();
    let Some(mut opened) = opened? else {
        // What clients use is all new, too, if they did not know.
        prepared.beside_export.iter().for_each(|export| export.view.finish());
        if matches!(prepared.format, Format::Luks(_)) {
            proof::is_over(&mut desk.blocking(prepared.header())?)?;
        }
        job.report(Report { notes: vec![SWEPT.to_owned()], ..Report::default() });
        return Ok(Ending::default());
    };
    let mut report = first_report(&opened, prepared);
    job.report(report.clone());
    if done(&opened, opened.boundary) < opened.total {
        let proving = if prepared.verify { Some(Proving::new()?) } else { None };
        let result = desk.rewrite(job, prepared, &mut opened, &mut report, proving.as_ref());
        job.detach();
        job.report(report.clone());
        result?;
    } else if let Some(export) = &prepared.beside_export {
        export.view.finish();
    } else if prepared.verify {
        report.notes.push("not verified: there was nothing left for this job to re-encrypt".to_owned());
    }
    if matches!(prepared.format, Format::Luks(_)) {
        let mut header = desk.blocking(prepared.header())?;
        proof::is_over(&mut header)?;
        report.old_key_gone = proof::old_key_gone(&mut header, &opened)?;
    }
    // What holds of the way there is not true of its end.
    report.notes.retain(|note| !opened.notes_until_done.contains(note));
    report.notes.extend(last_words(prepared, &opened).map(str::to_owned));
    job.report(report);
    Ok(Ending::default())
}

/// Bytes that are new.
fn done(opened: &Opened, boundary: u64) -> u64 {
    match opened.direction {
        Direction::Forward => boundary,
        Direction::Backward => opened.total - boundary,
    }
}

fn last_words(prepared: &Prepared, opened: &Opened) -> Option<&'static str> {
    match (&prepared.format, opened.mode) {
        (Format::Raw(_), _) => Some(
            "a volume without a header: copies made before still open with the old key, and it is not needed for this one any more",
        ),
        (_, Becomes::Decrypt) => Some("the data is plain now; its header opens nothing any more"),
        (_, Becomes::Reencrypt) => Some(
            "header backups made before do not open this volume: make a new one (cryptctl luks header-backup)",
        ),
        // There was no header before to make a backup of.
        (_, Becomes::Encrypt) => Some("make a backup of the new header (cryptctl luks header-backup)"),
    }
}

/// What the job works with.
struct Desk<'a> {
    pipeline: &'a Pipeline,
    /// Told when the job is paused and at rest.
    place_free: &'a dyn Fn(),
    /// The data's alignment for direct I/O, bytes; 1: it is buffered.
    align: u32,
    /// Who else flushes the data: an export's clients.
    flushes: Option<(Arc<Device>, Arc<dyn Turns>)>,
}

impl<'a> Desk<'a> {
    fn new(pipeline: &'a Pipeline, place_free: &'a dyn Fn(), prepared: &Prepared) -> Result<Self> {
        if let Some(export) = &prepared.beside_export {
            let align = online::as_served(&prepared.data, prepared.beside.as_deref(), export)?;
            let flushes = Some((prepared.data.clone(), export.flushes.clone()));
            return Ok(Self { pipeline, place_free, align, flushes });
        }
        let whole = |align: &u32| prepared.data_bytes().is_multiple_of((*align).into());
        // A write to an odd end would make a file longer.
        let align = prepared.data.direct_alignment().filter(whole);
        let align = match align {
            Some(align) if prepared.direct && prepared.data.enable_direct() => align,
            _ => {
                prepared.data.disable_direct();
                1
            }
        };
        if let Some(beside) = &prepared.beside {
            beside.disable_direct();
        }
        Ok(Self { pipeline, place_free, align, flushes: None })
    }

    /// Nothing of the job is under way.
    fn rests(&self, job: &Job) {
        if job.rests() {
            (self.place_free)();
        }
    }

    /// A device read and written in order, through the kind of queue that workers use. What clients use is flushed in turn with them.
    fn blocking(&self, device: &Arc<Device>) -> Result<Blocking> {
        let direct = self.align > 1 && device.direct_alignment().is_some();
        let align = if direct { device.direct_alignment().unwrap_or(1) } else { 1 };
        let blocking = self.pipeline.blocking(device.file().clone(), device.name(), align)?;
        Ok(match &self.flushes {
            Some((data, flushes)) if Arc::ptr_eq(data, device) => blocking.in_turn(flushes.clone()),
            _ => blocking,
        })
    }

    /// Go on with what was begun, or begin. `None`: one was over but for what has been overwritten now.
    fn open(&self, job: &Job, prepared: &mut Prepared) -> Result<Option<Opened>> {
        let give_up = || job.is_cancelled();
        let mut data = self.blocking(&prepared.data)?;
        let luks = match &prepared.format {
            Format::Luks(luks) => luks,
            Format::Raw(pair) => return self.open_raw(prepared, pair, data),
        };
        if self.has_header(prepared)? {
            same::check(&mut self.blocking(prepared.header())?, prepared, luks, &give_up)?;
            let mut keys = Vec::new();
            for key in prepared.keys.iter().chain(&prepared.new_key) {
                keys.push(Secret::copy_of(key.as_bytes())?);
            }
            let header = self.blocking(prepared.header())?;
            let opened = open::open(header, &mut data, prepared.data_bytes(), &keys, &give_up)?;
            match opened {
                Found::Under(opened) => return Ok(Some(*opened)),
                // The same command again, or one to go on: it has done what was left to do.
                Found::Swept => return Ok(None),
                Found::None => {}
            }
        }
        if prepared.resume_only {
            return Err(nothing_begun(prepared));
        }
        if let Some(export) = &prepared.beside_export {
            // What the view would refuse in the end is refused before the header says anything.
            export.view.check_whole().map_err(|error| error.at(prepared.data.name()))?;
        }
        let wish = self.wish(prepared, luks);
        let header = self.blocking(prepared.header())?;
        let new_key = prepared.new_key.as_ref();
        let begun = begin::begin(header, &mut data, &wish, &prepared.keys, new_key, &give_up);
        // A new header takes its name before the first byte of data is rewritten for it, or goes.
        match (&prepared.names, begun) {
            (Some(names), Ok(opened)) => {
                names.commit(&**prepared.header().file())?;
                prepared.names = None;
                Ok(Some(opened))
            }
            (_, begun) => begun.map(Some),
        }
    }

    /// What the header says, read anew: others may have written it.
    fn standing(&self, prepared: &Prepared) -> Standing {
        let loaded = match (&prepared.format, self.blocking(prepared.header())) {
            (Format::Luks(_), Ok(mut header)) => Header::load(&mut header),
            _ => return Standing::UnderWay,
        };
        match loaded {
            Ok(Header::Luks2(loaded)) => {
                let metadata = &loaded.header.metadata;
                match Requirement::of(metadata) {
                    Requirement::None if ledger::is_unswept(metadata) => Standing::Unswept,
                    Requirement::None => Standing::Gone,
                    _ => match read::read(metadata) {
                        Ok(Some((_, format::State::Clean { .. }))) => Standing::AtRest,
                        _ => Standing::UnderWay,
                    },
                }
            }
            _ => Standing::UnderWay,
        }
    }

    /// Beside an export, behind a last step that failed: is all data new, and does the header say so durably?
    ///
    /// What was written and not flushed may be in the page cache only. An older header that a power cut brought back would have the step
    /// recovered, over what clients have written since.
    fn is_over_durably(&self, prepared: &Prepared, opened: &Opened) -> bool {
        let settled = || {
            let (mut header, mut data) = (self.blocking(prepared.header())?, self.blocking(&prepared.data)?);
            let Header::Luks2(loaded) = Header::load(&mut header)? else { return Ok(false) };
            if !proof::is_all_new(&loaded, opened)? {
                return Ok(false);
            }
            ledger::settle(&mut header, &mut data, &loaded)?;
            Ok(true)
        };
        settled().unwrap_or_else(|error: Error| {
            tracing::warn!("what became of the last step of a re-encryption is not known: {}", error.chain());
            false
        })
    }

    /// Plain data has none before it is begun.
    fn has_header(&self, prepared: &Prepared) -> Result<bool> {
        if prepared.mode != Mode::Encrypt {
            return Ok(true);
        }
        match Header::load(&mut self.blocking(prepared.header())?) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == ErrorKind::Unsupported => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn open_raw(
        &self,
        prepared: &Prepared,
        pair: &proto::reencrypt::RawPair,
        data: Blocking,
    ) -> Result<Option<Opened>> {
        let beside = prepared.beside.as_ref().expect("a journal was opened");
        let ([old], Some(new)) = (prepared.keys.as_slice(), &prepared.new_key) else {
            return Err(Error::new(
                ErrorKind::Internal,
                "a volume without a header has one key on each side",
            ));
        };
        let data_bytes = prepared.data_bytes();
        match sidecar::open(self.blocking(beside)?, data, data_bytes, pair, old, new)? {
            sidecar::Found::Under(opened) => {
                same::check_protection(opened.resilience, prepared)?;
                return Ok(Some(*opened));
            }
            sidecar::Found::Swept => return Ok(None),
            sidecar::Found::Over => {
                let what =
                    "the re-encryption of this journal was finished: all of its volume is under the new key";
                return Err(Error::new(ErrorKind::Invalid, what)
                    .at(beside.name())
                    .hint("remove the journal; another re-encryption begins with a new one"));
            }
            sidecar::Found::None => {}
        }
        if prepared.resume_only {
            let what = "this journal knows of no re-encryption to go on with";
            return Err(Error::new(ErrorKind::Invalid, what).at(beside.name()).hint(
                "name the journal it was begun with; without --resume-only one is begun, which destroys a volume of \
                 which a part is under the new key already",
            ));
        }
        let data = self.blocking(&prepared.data)?;
        sidecar::begin(self.blocking(beside)?, data, &self.raw_wish(prepared, pair), old, new).map(Some)
    }

    fn raw_wish<'b>(&self, prepared: &Prepared, pair: &'b proto::reencrypt::RawPair) -> sidecar::Wish<'b> {
        sidecar::Wish {
            resilience: prepared.resilience,
            hotzone_bytes: prepared.hotzone_bytes,
            ..sidecar::Wish::new(pair, prepared.data_bytes(), prepared.block_bytes())
        }
    }

    fn wish<'b>(&self, prepared: &Prepared, luks: &'b Luks) -> begin::Wish<'b> {
        begin::Wish {
            mode: prepared.mode(),
            luks,
            resilience: prepared.resilience,
            data_bytes: prepared.data_bytes(),
            block_bytes: prepared.block_bytes(),
            atomic_bytes: prepared.atomic_bytes(),
        }
    }

    fn shape(&self, prepared: &Prepared, align: u32, memory: &Memory) -> Shape {
        Shape {
            file: prepared.data.file().clone(),
            name: prepared.data.name().to_owned(),
            align,
            kernel: prepared.kernel,
            workers: self.pipeline.workers(),
            workers_max: prepared.workers_max,
            depth: prepared.depth,
            chunk_bytes: prepared.chunk_bytes,
            memory: memory.bytes(),
            hotzone_bytes: prepared.hotzone_bytes,
        }
    }

    fn rewrite(
        &self,
        job: &Job,
        prepared: &Prepared,
        opened: &mut Opened,
        report: &mut Report,
        proving: Option<&Proving>,
    ) -> Result<()> {
        let memory = Memory::take();
        let mut align = self.align;
        let view = prepared.beside_export.as_ref().map(|export| &*export.view);
        if view.is_some() {
            online::check(opened, align, prepared.data.name())?;
        } else if align > 1 && !course::is_aligned(opened, align) {
            // Its areas do not begin or end on device blocks. What is done in order is aligned as before.
            prepared.data.disable_direct();
            align = 1;
        }
        let mut shape = self.shape(prepared, align, &memory);
        if view.is_some() {
            shape.hotzone_bytes = shape.hotzone_bytes.or(Some(online::HOTZONE_BYTES));
        }
        let course = course::lay(opened, &shape, proving.map(Proving::key))?;
        if let Some(view) = view {
            steps::hold_back(&course);
            online::begin(view, opened, &course, &shape)?;
        }
        report.hotzone_bytes = course.hotzone_bytes;
        job.attach(course.transfer.clone(), Phase::Rewriting, opened.total, course.from);
        job.report(report.clone());
        let began = self.blocking(&prepared.data).and_then(|data| {
            let (news, buffers) = (course.news.clone(), course.buffers);
            Ok((data, self.pipeline.carry(&course.transfer, news, prepared.workers_max, buffers)?))
        });
        let (mut data, mut carrier) = match began {
            Ok(began) => began,
            Err(error) => {
                view.iter().for_each(|view| view.stop(None));
                return Err(error);
            }
        };
        let mut share = view.map(|view| (view, Share::new(view, prepared.background_share)));
        let (mut ticked, mut dropped) = (Instant::now(), 0);
        let mut wish = || {
            let now = Instant::now();
            if now.duration_since(ticked) >= TICK {
                ticked = now;
                job.tick(now);
                if shape.align == 1 && view.is_none() && !prepared.data.is_memory() {
                    dropped = drop_passed(&prepared.data, &course, dropped);
                }
            }
            if job.is_cancelled() { Wish::Stop } else { Wish::Go }
        };
        let export = prepared.beside_export.as_deref();
        let sound = || export.map_or(Ok(()), |export| export.check(prepared.data.name()));
        let mut ended = steps::run(Steps {
            course: &course,
            carrier: &mut carrier,
            ledger: &mut *opened.ledger,
            data: &mut data,
            wish: &mut wish,
            at_rest: &mut || self.rests(job),
            traffic: share.as_mut().map(|(view, share)| Traffic { view, pace: share, sound: &sound }),
        });
        job.keep_record(course.transfer.final_record());
        let before = ended.proof;
        let standing = self.standing(prepared);
        if let Some(view) = view
            && ended.was_last
            && self.is_over_durably(prepared, opened)
        {
            view.finish();
            if standing == Standing::Gone {
                // Even what it leaves behind is gone.
                ended.state = State::Finished;
            }
        }
        verdict(job, prepared, opened, ended, standing)?;
        let Some(proving) = proving else { return Ok(()) };
        drop((course, memory));
        if align == 1 {
            // What was just written comes from the device, and not from where it was written from: it is durable, so all of it goes.
            if let Some(all) = Extent::new(0, prepared.data_bytes()) {
                prepared.data.drop_cache(all);
            }
        }
        proving.compare(job, self, (prepared.workers_max, opened), &shape, before, report)
    }
}

/// Buffered: start writing what is complete and drop what has passed, so that a volume does not push everybody else's pages out.
/// Returns how far it got, in order.
fn drop_passed(data: &Device, course: &Course, dropped: u64) -> u64 {
    // All that is in flight lies within two hotzones of what is done.
    let done = course.transfer.totals().done_bytes.saturating_sub(2 * course.hotzone_bytes);
    if let Some(extent) = course.track.extent(course.from + dropped, course.from + done.max(dropped)) {
        let place = course.transfer.place(Side::Sink, extent.start());
        if let Some(extent) = Extent::new(place, place + extent.len()) {
            data.drop_cache(extent);
        }
    }
    done.max(dropped)
}

/// What the header on disk says when the job has stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    /// The re-encryption is under way, or nothing is known.
    UnderWay,
    /// It is under way and between two steps, whatever the loop thought it had begun: a write that failed may never have reached the disk.
    AtRest,
    /// It is over, and old key material is left to be overwritten.
    Unswept,
    /// There is none.
    Gone,
}

/// How it ended, for the user.
fn verdict(job: &Job, prepared: &Prepared, opened: &Opened, ended: Ended, standing: Standing) -> Result<()> {
    let Ended { boundary, state, failure, .. } = ended;
    if state == State::Finished {
        if let Some(error) = failure {
            tracing::warn!("job {}: after the end: {}", job.id, error.chain());
        }
        return Ok(());
    }
    let state = if standing == Standing::AtRest { State::Clean } else { state };
    let done = done(opened, boundary);
    let stands = match state {
        _ if standing == Standing::Unswept => "the header says that it is over",
        _ if standing == Standing::Gone => "the header on disk has no re-encryption any more",
        State::Crash => "a step was interrupted and is recovered when it is resumed",
        _ => "it rests at a safe point",
    };
    let what = format!("{done} of {} bytes are re-encrypted, and {stands}", opened.total);
    let lost = state == State::Crash && matches!(opened.resilience, Resilience::None);
    let hint = match (standing, &prepared.format) {
        (Standing::Unswept, _) => {
            "all data is new; the same command again overwrites what is left of the old key"
        }
        (Standing::Gone, _) => {
            "another program changed it: see what it has done (cryptctl luks dump) before anything is begun anew"
        }
        _ if lost => {
            "with resilience none nothing was kept to recover it by: which of its bytes are new is not known"
        }
        (_, Format::Raw(_)) => "go on with cryptctl reencrypt --resume-only and the same journal",
        (_, Format::Luks(_)) => {
            "go on with cryptctl reencrypt --resume-only, or with cryptsetup reencrypt --resume-only"
        }
    };
    Err(match failure {
        Some(cause) => Error::new(cause.kind(), format!("re-encryption stopped: {what}"))
            .at(prepared.data.name())
            .because(cause),
        None => Error::new(ErrorKind::Cancelled, format!("cancelled: {what}")).at(prepared.data.name()),
    }
    .hint(hint))
}

fn nothing_begun(prepared: &Prepared) -> Error {
    Error::new(ErrorKind::Invalid, "there is no re-encryption to go on with")
        .at(prepared.header().name())
        .hint("without --resume-only one is begun")
}

fn first_report(opened: &Opened, prepared: &Prepared) -> Report {
    Report {
        total_bytes: opened.total,
        done_before_bytes: done(opened, opened.boundary),
        old_cipher: in_words(&opened.old),
        new_cipher: in_words(&opened.new),
        resilience: opened.resilience.name().to_owned(),
        hotzone_bytes: prepared.hotzone_bytes.unwrap_or(0),
        carried_keyslots: opened.carried.clone(),
        dropped_keyslots: opened.dropped.clone(),
        recovered_bytes: opened.recovered_bytes,
        notes: opened.notes_until_done.iter().chain(&opened.notes).cloned().collect(),
        ..Report::default()
    }
}

fn in_words(side: &volume::Side) -> Option<String> {
    let (area, key) = side.cipher.as_ref()?;
    Some(begin::cipher_words(area.spec.name(), key.len(), area.unit_bytes))
}

/// A request that never began: a new header goes.
pub fn discard(prepared: &Prepared) {
    if let Some(names) = &prepared.names
        && let Some(left) = names.undo(&**prepared.header().file())
    {
        tracing::info!("partial header left behind: {left}");
    }
}
