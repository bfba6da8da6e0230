//! Copies of what a bitmap of the source marks: which extents those are, and whether the sink can take them.
//!
//! The bitmap is a context of block status that an NBD server offers (`qemu:dirty-bitmap:NAME`). It is asked for once, when the
//! request is checked. Extents are widened to whole data units and device blocks; too many small ones to be remembered are joined
//! with what lies between them. So more may be copied than is marked, never less.
//!
//! An *update* writes into an earlier copy in place. There is no undoing it, and no checkpoint: the same request, with the same bitmap,
//! writes the same extents again.

use std::time::{Duration, Instant};

use proto::remote::Remote;
use proto::{Action, Sink, Source};

use crate::backend::device::{Device, Nature};
use crate::backend::nbd;
use crate::error::{Error, ErrorKind, Result};
use crate::job::geometry::Geometry;
use crate::job::prepare::Sizes;
use crate::pipeline::transfer::Work;
use crate::units::Extent;

/// How long a server may take to say what its bitmap marks: nobody can cancel a job that is being checked.
const STATUS_WAIT: Duration = Duration::from_secs(300);
/// Most extents remembered of one job: 4 MiB of them.
const EXTENTS_MAX: usize = 1 << 18;

/// The remote volume whose bitmap limits a job, if one does.
///
/// # Errors
/// `Invalid`, `Unsupported`: it cannot be limited so.
pub fn wish<'a>(
    remotes: &'a [Remote],
    source: &Source,
    sink: &Sink,
    action: Action,
    has_checkpoint: bool,
) -> Result<Option<&'a Remote>> {
    let invalid = |what: &str, name: &str| Err(Error::new(ErrorKind::Invalid, what).at(name));
    if remotes.iter().any(|remote| remote.fd != source.fd && remote.bitmap.is_some()) {
        return invalid("only a source has a bitmap", &sink.name);
    }
    let Some(remote) = remotes.iter().find(|remote| remote.fd == source.fd) else { return Ok(None) };
    if remote.bitmap.is_none() {
        return if remote.update { invalid("an update needs a bitmap", &source.name) } else { Ok(None) };
    }
    if remote.bitmap.as_deref().is_some_and(|bitmap| bitmap.starts_with("base:")) {
        // It says what is allocated, and what is not is no less content.
        return invalid("a context of base: is no bitmap", &source.name);
    }
    if sink.stream {
        return invalid("what a bitmap does not mark would be missing from a stream", &sink.name);
    }
    if remote.update && (action == Action::Verify || sink.commit.is_some()) {
        return invalid("an update writes into a sink that is there, under its own name", &sink.name);
    }
    if has_checkpoint {
        let what = "a copy of what a bitmap marks has no checkpoint";
        return Err(Error::new(ErrorKind::Unsupported, what)
            .at(&source.name)
            .hint("it is repeated, with the same bitmap"));
    }
    Ok(Some(remote))
}

/// An update goes into a copy of the same size; a device may be larger.
///
/// # Errors
/// `Conflict`: it is another; `Damaged`: it is cut off.
pub fn check_copy(work: Work, sink: &Device, geometry: Option<&Geometry>, sizes: &Sizes) -> Result<()> {
    let (Some(total), Some(geometry), Some(bytes)) = (sizes.total, geometry, sink.size()) else {
        return Err(Error::new(ErrorKind::Invalid, "an update needs two volumes with a size").at(sink.name()));
    };
    let (has, needs) = if work == Work::Encrypt {
        (geometry.plain_bytes(sink, bytes)?, total.next_multiple_of(geometry.unit_bytes().into()))
    } else {
        (bytes, total)
    };
    let fits = if sink.nature() == Nature::File { has == needs } else { has >= needs };
    if fits {
        return Ok(());
    }
    let what = format!("it is no copy of the source: it holds {has} bytes, and the source {needs}");
    Err(Error::new(ErrorKind::Conflict, what).at(sink.name()))
}

/// What is marked of a source of `total` bytes of plaintext, as plaintext, in whole `step`s; ascending and apart.
///
/// # Errors
/// Of the server.
pub fn extents(
    work: Work,
    source: &Device,
    geometry: &Geometry,
    total: u64,
    step: u64,
) -> Result<Vec<Extent>> {
    let until = Instant::now() + STATUS_WAIT;
    let dirty = nbd::marked(source, &|| Instant::now() >= until).map_err(|error| match error.kind() {
        ErrorKind::Cancelled => {
            let what = "the NBD server takes too long to say what its bitmap marks";
            Error::new(ErrorKind::Io, what).at(source.name())
        }
        _ => error,
    })?;
    let mut marked = Marked::new(total, step);
    if work == Work::Decrypt {
        inside(geometry, &dirty, total).for_each(|(start, end)| marked.add(start, end));
    } else {
        dirty.iter().for_each(|extent| marked.add(extent.start(), extent.end()));
    }
    Ok(marked.extents)
}

/// Bytes of plaintext whose ciphertext lies in these extents of the encrypted side, ascending. Areas come in the order of the plaintext, in
/// which their ciphertext need not lie: so it is area by area that extents are looked for.
fn inside<'a>(
    geometry: &'a Geometry,
    dirty: &'a [Extent],
    total: u64,
) -> impl Iterator<Item = (u64, u64)> + 'a {
    geometry.placed().flat_map(move |(start, area)| {
        let size = area.size.unwrap_or(total.saturating_sub(start));
        let end = area.offset.saturating_add(size);
        let first = dirty.partition_point(|extent| extent.end() <= area.offset);
        dirty[first..].iter().take_while(move |extent| extent.start() < end).map(move |extent| {
            let (from, to) = (extent.start().max(area.offset), extent.end().min(end));
            (start + (from - area.offset), start + (to - area.offset))
        })
    })
}

/// Collects extents, ascending.
struct Marked {
    extents: Vec<Extent>,
    total: u64,
    step: u64,
    /// Those that are no farther apart are joined.
    gap: u64,
}

impl Marked {
    fn new(total: u64, step: u64) -> Self {
        Self { extents: Vec::new(), total, step, gap: 0 }
    }

    /// No start lies before that of the last.
    fn add(&mut self, start: u64, end: u64) {
        let end = end.checked_next_multiple_of(self.step).unwrap_or(u64::MAX).min(self.total);
        let start = start / self.step * self.step;
        if start >= end {
            return;
        }
        match self.extents.last_mut() {
            Some(last) if start <= last.end().saturating_add(self.gap) => {
                *last = Extent::new(last.start().min(start), last.end().max(end)).expect("both have bytes");
            }
            _ => self.extents.push(Extent::new(start, end).expect("it has bytes")),
        }
        if self.extents.len() > EXTENTS_MAX {
            self.join();
        }
    }

    /// Too many: join neighbours that are farther and farther apart, until there are half as many.
    fn join(&mut self) {
        while self.extents.len() > EXTENTS_MAX / 2 {
            self.gap = (self.gap * 2).max(self.step);
            let gap = self.gap;
            self.extents.dedup_by(|next, last| {
                let joined = next.start() - last.end() <= gap;
                if joined {
                    *last = Extent::new(last.start(), next.end()).expect("both have bytes");
                }
                joined
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::plan::Plan;
    use crate::volume::DataArea;

    fn pairs(extents: &[Extent]) -> Vec<(u64, u64)> {
        extents.iter().map(|extent| (extent.start(), extent.end())).collect()
    }

    #[test]
    fn extents_are_widened_to_whole_steps_and_joined() {
        let mut marked = Marked::new(20_000, 4096);
        for (start, end) in
            [(1, 2), (4095, 4096), (4097, 4098), (12_288, 12_289), (19_999, 25_000), (30_000, 40_000)]
        {
            marked.add(start, end);
        }
        assert_eq!(pairs(&marked.extents), [(0, 8192), (12_288, 20_000)]);
    }

    #[test]
    fn what_is_marked_of_ciphertext_is_found_in_the_plaintext() {
        let area = |offset, size| DataArea { offset, size, cipher: None };
        let geometry = Geometry::new(vec![area(1000, Some(500)), area(5000, None)]).expect("two areas");
        let map = |start, end| {
            let extent = Extent::new(start, end).expect("not empty");
            inside(&geometry, &[extent], 2500).collect::<Vec<_>>()
        };
        assert_eq!(map(0, 1000), [], "the header is no plaintext");
        assert_eq!(map(900, 1100), [(0, 100)]);
        assert_eq!(map(1400, 6000), [(400, 500), (500, 1500)]);
        assert_eq!(map(6999, 9000), [(2499, 2500)]);
        assert_eq!(map(7000, u64::MAX), []);
    }

    #[test]
    fn areas_that_descend_on_the_disk_make_a_plan_that_ascends() {
        // The plaintext begins behind on the disk.
        let areas = [(1 << 20, Some(64 << 10)), (64 << 10, Some(128 << 10)), (512 << 10, Some(4096))];
        let areas = areas.map(|(offset, size)| DataArea { offset, size, cipher: None });
        let geometry = Geometry::new(areas.to_vec()).expect("three areas");
        let total = geometry.fixed_bytes().expect("all have a size");
        let dirty: Vec<Extent> = [(64 << 10, 68 << 10), (100 << 10, 600 << 10), (1 << 20, 2 << 20)]
            .map(|(start, end)| Extent::new(start, end).expect("not empty"))
            .to_vec();
        let mut marked = Marked::new(total, 4096);
        inside(&geometry, &dirty, total).for_each(|(start, end)| marked.add(start, end));
        assert_eq!(pairs(&marked.extents), [(0, 68 << 10), (100 << 10, 196 << 10)]);
        let plan = Plan::only(marked.extents, total, 8192);
        assert_eq!(plan.covered_bytes(), Some(164 << 10));
    }

    /// Numbers from a seed.
    struct Dice(u64);

    impl Dice {
        fn below(&mut self, limit: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % limit.max(1)
        }

        /// Apart and ascending.
        fn extents(&mut self, most: u64, end: u64) -> Vec<Extent> {
            let mut cuts: Vec<u64> = (0..2 * self.below(most)).map(|_| self.below(end)).collect();
            cuts.sort_unstable();
            cuts.dedup();
            cuts.chunks_exact(2).filter_map(|cut| Extent::new(cut[0], cut[1])).collect()
        }
    }

    #[test]
    fn whatever_areas_and_bitmaps_say_all_of_it_is_planned_and_nothing_panics() {
        for seed in 1..=4000 {
            let mut dice = Dice(seed << 32 | 0x9e37_79b9);
            // Of a small disk, or of one as large as there can be.
            let disk = if dice.below(4) == 0 { i64::MAX.cast_unsigned() } else { 1 << 20 };
            let mut areas: Vec<DataArea> = dice
                .extents(8, disk)
                .iter()
                .map(|at| DataArea { offset: at.start(), size: Some(at.len()), cipher: None })
                .collect();
            for at in (1..areas.len()).rev() {
                areas.swap(at, usize::try_from(dice.below(at as u64 + 1)).expect("an index"));
            }
            if dice.below(3) == 0 {
                areas.push(DataArea { offset: disk - dice.below(4096), size: None, cipher: None });
            }
            let Ok(geometry) = Geometry::new(areas) else { continue };
            let known: u64 = geometry.areas().iter().filter_map(|area| area.size).sum();
            let total = geometry.fixed_bytes().unwrap_or(known + dice.below(4096));
            let step = 1 << dice.below(14);
            let dirty = dice.extents(16, disk);
            let mut marked = Marked::new(total, step);
            for (start, end) in inside(&geometry, &dirty, total) {
                marked.add(start, end);
                if dice.below(8) == 0 {
                    // As if there were too many.
                    marked.gap = (2 * marked.gap).max(step);
                }
            }
            let planned = pairs(&marked.extents);
            drop(Plan::only(marked.extents, total, 4096));
            for (start, area) in geometry.placed() {
                let size = area.size.unwrap_or(total - start);
                for at in [0, size / 3, size.saturating_sub(1)].into_iter().filter(|&at| at < size) {
                    let place = area.offset + at;
                    let is_dirty = dirty.iter().any(|extent| (extent.start()..extent.end()).contains(&place));
                    let is_planned = planned.iter().any(|&(from, to)| (from..to).contains(&(start + at)));
                    assert!(is_planned || !is_dirty, "seed {seed}: byte {}", start + at);
                }
            }
        }
    }

    #[test]
    fn too_many_extents_become_fewer_and_none_is_lost() {
        let count = 3 * EXTENTS_MAX as u64;
        let mut marked = Marked::new(u64::MAX, 1);
        // Near each other in pairs, so that joining has a first choice.
        let at = |index: u64| index / 2 * 1000 + index % 2 * 3;
        (0..count).for_each(|index| marked.add(at(index), at(index) + 1));
        assert!(marked.extents.len() <= EXTENTS_MAX, "{}", marked.extents.len());
        assert!(marked.extents.windows(2).all(|pair| pair[0].end() < pair[1].start()));
        for index in (0..count).step_by(997) {
            let found = marked.extents.partition_point(|extent| extent.end() <= at(index));
            assert!(marked.extents[found].start() <= at(index), "{index}");
        }
    }

    fn remote(fd: u32, bitmap: bool, update: bool) -> Remote {
        Remote { fd, bitmap: bitmap.then(|| "qemu:dirty-bitmap:b".to_owned()), update, ..Remote::default() }
    }

    #[test]
    fn what_is_allocated_is_no_bitmap() {
        let source = Source { fd: 0, name: "src".to_owned(), stream: false };
        let sink = Sink { fd: 1, name: "dst".to_owned(), stream: false, commit: None };
        let base = [Remote { bitmap: Some("base:allocation".to_owned()), ..remote(0, true, false) }];
        let error = wish(&base, &source, &sink, Action::Encrypt, false).expect_err("no bitmap");
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.chain().contains("no bitmap"), "{}", error.chain());
    }

    #[test]
    fn only_a_source_is_limited_and_only_where_nothing_can_be_missing() {
        let source = Source { fd: 0, name: "src".to_owned(), stream: false };
        let sink = |stream| Sink { fd: 1, name: "dst".to_owned(), stream, commit: None };
        let tried = |remotes: &[Remote], stream, action, checkpoint| {
            wish(remotes, &source, &sink(stream), action, checkpoint)
                .map(|found| found.map(|remote| remote.fd))
        };
        assert_eq!(tried(&[], false, Action::Encrypt, false).expect("none"), None);
        assert_eq!(tried(&[remote(0, false, false)], true, Action::Encrypt, true).expect("all"), None);
        assert_eq!(tried(&[remote(0, true, false)], false, Action::Verify, false).expect("some"), Some(0));
        assert_eq!(tried(&[remote(0, true, true)], false, Action::Decrypt, false).expect("some"), Some(0));
        for (remotes, stream, action, checkpoint, words) in [
            (remote(1, true, false), false, Action::Encrypt, false, "only a source"),
            (remote(0, false, true), false, Action::Encrypt, false, "needs a bitmap"),
            (remote(0, true, false), true, Action::Encrypt, false, "missing from a stream"),
            (remote(0, true, true), false, Action::Verify, false, "a sink that is there"),
            (remote(0, true, false), false, Action::Encrypt, true, "no checkpoint"),
        ] {
            let error = tried(&[remotes], stream, action, checkpoint).expect_err(words);
            assert!(error.chain().contains(words), "{}", error.chain());
        }
    }
}
