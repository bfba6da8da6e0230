//! Volumes without a header, beside a journal.

use engine::backend::sim::explore::Case;
use engine::backend::sim::image::Image;
use engine::backend::sim::{DiskOptions, World};
use engine::crypto::Secret;
use engine::error::Result;
use engine::volume::reencrypt::sidecar::{self, Found, Wish};
use proto::luks::File;
use proto::reencrypt::{RawPair, Resilience};
use proto::{Raw, TweakKind};

use super::course::{self, Data};
use super::encrypted;
use crate::jobs::noise;

const VOLUME: usize = 0;
const JOURNAL: usize = 1;
const BYTES: usize = 112 << 10;
const HOTZONE: u64 = 32 << 10;

/// One of them, and what is to become of it.
pub struct RawVolume {
    pair: RawPair,
    resilience: Resilience,
    keys: [Secret; 2],
    /// The data under both keys.
    sides: [Vec<u8>; 2],
}

impl RawVolume {
    /// With data units of before and after.
    ///
    /// # Panics
    /// Without memory.
    #[must_use]
    pub fn new(units: [u32; 2], resilience: Resilience) -> Self {
        let raw = |data_unit| Raw {
            key_bytes: 32,
            data_unit,
            tweak: TweakKind::Plain64,
            large_tweak: false,
            tweak_offset: 0,
        };
        let journal = File { fd: 0, name: "journal".to_owned() };
        let pair = RawPair { old: raw(units[0]), new: raw(units[1]), journal };
        let keys = [1, 2].map(|seed| Secret::copy_of(&noise(32, seed)).expect("memory for a secret"));
        let plain = noise(BYTES, 0x9A1A);
        let sides = [0, 1].map(|side| encrypted(&keys[side], units[side], &plain));
        Self { pair, resilience, keys, sides }
    }

    /// For messages.
    #[must_use]
    pub fn name(&self) -> String {
        format!("raw, {:?} {} to {}", self.resilience, self.pair.old.data_unit, self.pair.new.data_unit)
    }

    /// As they are before.
    #[must_use]
    pub fn disks(&self) -> Vec<(Image, DiskOptions)> {
        let options = DiskOptions { alignment: 512, ..DiskOptions::default() };
        vec![(Image::of(&self.sides[0]), options), (Image::default(), DiskOptions::default())]
    }

    fn open(&self, world: &World) -> Result<Found> {
        let [old, new] = &self.keys;
        let volume = world.blocking(VOLUME, "volume")?;
        let journal = world.blocking(JOURNAL, "journal")?;
        sidecar::open(journal, volume, BYTES as u64, &self.pair, old, new)
    }

    /// Begin it or go on with it, to the end.
    ///
    /// # Errors
    /// As the production code has them.
    pub fn run(&self, world: &World) -> Result<()> {
        let opened = match self.open(world)? {
            Found::Under(opened) => *opened,
            Found::Swept | Found::Over => return Ok(()),
            Found::None => {
                let wish = Wish {
                    resilience: Some(self.resilience),
                    iterations: Some(1000),
                    hotzone_bytes: Some(HOTZONE),
                    ..Wish::new(&self.pair, BYTES as u64, 512)
                };
                let [old, new] = &self.keys;
                let journal = world.blocking(JOURNAL, "journal")?;
                sidecar::begin(journal, world.blocking(VOLUME, "volume")?, &wish, old, new)?
            }
        };
        if opened.boundary == opened.total {
            return Ok(());
        }
        let data = Data { disk: VOLUME, chunk: 8192, hotzone: HOTZONE };
        course::finish(world, data, opened, &course::as_it_is)
    }

    /// The disks as they are found: what was begun is opened, which recovers it, and all data is there; one in eight is gone on
    /// with to the end.
    ///
    /// # Errors
    /// What is lost, in words.
    pub fn judge(&self, world: &World, case: &Case) -> std::result::Result<(), String> {
        let found = self.open(world).map_err(|error| format!("cannot be opened: {}", error.chain()))?;
        let boundary = match found {
            Found::Under(opened) => opened.boundary,
            Found::Swept | Found::Over => BYTES as u64,
            Found::None => 0,
        };
        self.compare(world, boundary)?;
        if case.completed && boundary != BYTES as u64 {
            return Err(format!("it was reported as done, but the boundary is at {boundary}"));
        }
        if (case.tear ^ case.cut.map_or(0, |cut| cut.event)).is_multiple_of(8) {
            self.run(world).map_err(|error| format!("cannot be gone on with: {}", error.chain()))?;
            self.compare(world, BYTES as u64)?;
        }
        Ok(())
    }

    fn compare(&self, world: &World, boundary: u64) -> std::result::Result<(), String> {
        let mut found = vec![0; BYTES];
        let count =
            rustix::io::pread(&*world.file(VOLUME), &mut found, 0).map_err(|errno| errno.to_string())?;
        let boundary = usize::try_from(boundary).expect("small");
        let [old, new] = &self.sides;
        let wanted = new[..boundary].iter().chain(&old[boundary..]);
        match found.iter().zip(wanted).position(|(found, wanted)| found != wanted) {
            None if count == BYTES => Ok(()),
            None => Err(format!("the volume ends at {count}")),
            Some(at) => Err(format!("byte {at} is lost; the boundary is at {boundary}")),
        }
    }
}
