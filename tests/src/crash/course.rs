//! The production code, whole: begin, open and recover of `volume::reencrypt`, the loop of `job::reencrypt`, the worker loop of
//! `pipeline`; on one thread, over simulated disks.

use engine::backend::sim::World;
use engine::crypto::{Kernel, Secret};
use engine::error::Result;
use engine::format::luks2::reencrypt::Mode;
use engine::job::reencrypt::course::{self, Shape as CourseShape};
use engine::job::reencrypt::steps::{self, Steps, Wish as Go};
use engine::pipeline::carrier::Inline;
use engine::volume::reencrypt::begin::{self, Wish};
use engine::volume::reencrypt::ledger::Ledger;
use engine::volume::reencrypt::{Opened, open};

use super::{HEADER, Shape, Volume, stay};

/// What is done to the ledger before it is used.
pub type Wrap<'a> = &'a dyn Fn(Box<dyn Ledger>) -> Box<dyn Ledger>;

/// Nothing.
#[must_use]
pub fn as_it_is(ledger: Box<dyn Ledger>) -> Box<dyn Ledger> {
    ledger
}

/// Begin.
///
/// # Errors
/// As the production code has them.
pub fn begin(world: &World, volume: &Volume) -> Result<Opened> {
    let shape = &volume.shape;
    let luks = shape.wish();
    let wish = Wish {
        mode: shape.mode,
        luks: &luks,
        resilience: (!shape.moves()).then_some(shape.resilience),
        data_bytes: volume.data_bytes(),
        block_bytes: shape.sector,
        atomic_bytes: shape.sector,
    };
    let header = world.blocking(HEADER, "header")?;
    let mut data = world.blocking(shape.data_disk(), "data")?;
    let keys = shape.passphrases();
    match shape.mode {
        Mode::Encrypt => begin::begin(header, &mut data, &wish, &[], Some(&keys[0]), &stay),
        Mode::Reencrypt | Mode::Decrypt => begin::begin(header, &mut data, &wish, &keys, None, &stay),
    }
}

/// Open what is under way, recovering an interrupted step; `None`: nothing is.
///
/// # Errors
/// As the production code has them.
pub fn open(world: &World, volume: &Volume, keys: &[Secret]) -> Result<Option<Opened>> {
    let header = world.blocking(HEADER, "header")?;
    let mut data = world.blocking(volume.shape.data_disk(), "data")?;
    Ok(open::open(header, &mut data, volume.data_bytes(), keys, &stay)?.under())
}

/// Where the data is, and in which pieces it goes.
#[derive(Debug, Clone, Copy)]
pub struct Data {
    /// Its disk.
    pub disk: usize,
    /// Bytes a worker takes at a time.
    pub chunk: u32,
    /// Most bytes of a hotzone.
    pub hotzone: u64,
}

impl From<&Shape> for Data {
    fn from(shape: &Shape) -> Self {
        Self { disk: shape.data_disk(), chunk: shape.chunk, hotzone: shape.hotzone }
    }
}

/// What does not follow from the volume.
///
/// # Errors
/// No kernel.
pub fn course_shape(world: &World, data: Data) -> Result<CourseShape> {
    Ok(CourseShape {
        file: world.file(data.disk),
        name: "data".to_owned(),
        align: 512,
        kernel: Kernel::best()?,
        workers: 1,
        workers_max: 1,
        depth: 8,
        chunk_bytes: data.chunk,
        memory: 1 << 20,
        hotzone_bytes: Some(data.hotzone),
    })
}

/// Go on to the end.
///
/// # Errors
/// As the production code has them.
pub fn finish(world: &World, data: Data, opened: Opened, wrap: Wrap<'_>) -> Result<()> {
    let disk = data.disk;
    let course = course::lay(&opened, &course_shape(world, data)?, None)?;
    let mut carrier = Inline::new(world, &course.transfer, course.news.clone(), course.buffers)?;
    let mut ledger = wrap(opened.ledger);
    let mut data = world.blocking(disk, "data")?;
    let ended = steps::run(Steps {
        course: &course,
        carrier: &mut carrier,
        ledger: ledger.as_mut(),
        data: &mut data,
        wish: &mut || Go::Go,
        at_rest: &mut || (),
        traffic: None,
    });
    match ended.failure {
        None => Ok(()),
        Some(error) => Err(error),
    }
}

/// Open and go on to the end; begin where nothing is under way.
///
/// # Errors
/// As the production code has them.
pub fn resume(world: &World, volume: &Volume) -> Result<()> {
    match open(world, volume, &volume.shape.passphrases())? {
        Some(opened) => finish(world, (&volume.shape).into(), opened, &as_it_is),
        None => Ok(()),
    }
}
