//! Which chunks are here, and the next hotzone that can be made of them.
//!
//! Chunks arrive in any order; a hotzone is a run of them without a gap that begins where the last one ended. *Order* is where a
//! byte stands on the way through the volume: forward its plaintext offset, backward its distance from the end.
//!
//! ```text
//! order      0 ...... next ............ seam ............ total
//! chunks              [c][c][c]   [c][c]
//!                     hotzone     waits for the gap to be filled
//! ```

use std::collections::BTreeMap;

use crate::format::luks2::reencrypt::Direction;
use crate::units::Extent;

/// The way through a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Track {
    direction: Direction,
    total: u64,
    whole: u64,
}

impl Track {
    /// Through `total` bytes of plaintext, of which the first `whole` (0: none) are one hotzone, whatever their number: where data was
    /// moved to make room for a header, metadata has no words for a part of it.
    #[must_use]
    pub fn new(direction: Direction, total: u64, whole: u64) -> Self {
        Self { direction, total, whole: whole.min(total) }
    }

    /// Bytes of plaintext.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Where a boundary between old and new stands: so many bytes are new.
    ///
    /// # Panics
    /// If it is beyond the volume.
    #[must_use]
    pub fn order_of(&self, boundary: u64) -> u64 {
        assert!(boundary <= self.total, "a boundary is inside its volume");
        match self.direction {
            Direction::Forward => boundary,
            Direction::Backward => self.total - boundary,
        }
    }

    /// The boundary at this order: the way there and back is the same.
    #[must_use]
    pub fn boundary_at(&self, order: u64) -> u64 {
        self.order_of(order)
    }

    /// The plaintext between two orders; `None`: nothing.
    #[must_use]
    pub fn extent(&self, from: u64, to: u64) -> Option<Extent> {
        match self.direction {
            Direction::Forward => Extent::new(from, to),
            Direction::Backward => Extent::new(self.total - to, self.total - from),
        }
    }

    /// Where an extent begins.
    fn start_of(&self, extent: Extent) -> u64 {
        match self.direction {
            Direction::Forward => extent.start(),
            Direction::Backward => self.total - extent.end(),
        }
    }

    /// The seam behind this order, or else the end.
    fn stop_after(&self, order: u64) -> u64 {
        let seam = self.order_of(self.whole);
        if self.whole > 0 && seam > order { seam } else { self.total }
    }

    /// Is what begins at this order one hotzone up to the next stop?
    fn is_whole(&self, order: u64) -> bool {
        match self.direction {
            Direction::Forward => order < self.whole,
            Direction::Backward => order >= self.total - self.whole,
        }
    }
}

/// A run of chunks to be rewritten in one step.
#[derive(Debug, PartialEq, Eq)]
pub struct Hotzone {
    /// Its plaintext.
    pub extent: Extent,
    /// The order behind it.
    pub until: u64,
    /// Of its old blocks, packed in the order of the plaintext; empty if none were asked for.
    pub checksums: Vec<u8>,
}

/// Chunks that are here and in no hotzone yet.
#[derive(Debug)]
pub struct Arrivals {
    track: Track,
    /// Bytes of a chunk; some are shorter.
    chunk_bytes: u64,
    /// By the order they begin at: their bytes, and the checksums of their old blocks.
    chunks: BTreeMap<u64, (u64, Box<[u8]>)>,
    next: u64,
}

impl Arrivals {
    /// Nothing is here; the next hotzone begins at `next`.
    #[must_use]
    pub fn new(track: Track, chunk_bytes: u64, next: u64) -> Self {
        Self { track, chunk_bytes, chunks: BTreeMap::new(), next }
    }

    /// Where the next hotzone begins: everything before was given out.
    #[must_use]
    pub fn next(&self) -> u64 {
        self.next
    }

    /// A chunk is here.
    pub fn add(&mut self, extent: Extent, checksums: Box<[u8]>) {
        let before = self.chunks.insert(self.track.start_of(extent), (extent.len(), checksums));
        assert!(before.is_none(), "a chunk arrives once");
    }

    /// How far chunks reach without a gap from where the next hotzone begins.
    #[must_use]
    pub fn reach(&self) -> u64 {
        self.reach_within(self.track.total)
    }

    fn reach_within(&self, limit: u64) -> u64 {
        let mut end = self.next;
        for (&start, &(bytes, _)) in &self.chunks {
            if start != end || end + bytes > limit {
                break;
            }
            end += bytes;
        }
        end
    }

    /// The next hotzone, at most `most` bytes and not across the seam: when no other chunk has room in it, or (`short`) of what
    /// there is. What must be whole is so whatever `most` is.
    ///
    /// # Panics
    /// If the first chunk is larger than `most`: then there would never be a hotzone.
    pub fn close(&mut self, most: u64, short: bool) -> Option<Hotzone> {
        let stop = self.track.stop_after(self.next);
        let whole = self.track.is_whole(self.next);
        let limit = if whole { stop } else { self.next.saturating_add(most).min(stop) };
        let until = self.reach_within(limit);
        let first = self.chunks.get(&self.next);
        assert!(first.is_none_or(|(bytes, _)| self.next + bytes <= limit), "a chunk fits a hotzone");
        // A chunk in front of a seam is as short as it must be to end there, others are not.
        let full = until == limit || (limit < stop && until + self.chunk_bytes > limit);
        if until == self.next || !(full || (short && !whole)) {
            return None;
        }
        Some(self.take(until))
    }

    /// All that is here without a gap, across seams: for data that is not protected, so that there are no steps.
    pub fn take_all(&mut self) -> Option<Hotzone> {
        let until = self.reach();
        (until > self.next).then(|| self.take(until))
    }

    fn take(&mut self, until: u64) -> Hotzone {
        let extent = self.track.extent(self.next, until).expect("not empty");
        let later = self.chunks.split_off(&until);
        let taken = std::mem::replace(&mut self.chunks, later);
        self.next = until;
        // Backward, what arrives first lies last.
        let mut parts: Vec<Box<[u8]>> = taken.into_values().map(|(_, checksums)| checksums).collect();
        if self.track.direction == Direction::Backward {
            parts.reverse();
        }
        Hotzone { extent, until, checksums: parts.concat() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(start: u64, end: u64) -> Extent {
        Extent::new(start, end).expect("not empty")
    }

    fn sums(first: u8, count: u8) -> Box<[u8]> {
        (first..first + count).collect()
    }

    #[test]
    fn a_hotzone_waits_for_its_gap_and_packs_checksums_in_order() {
        let mut arrivals = Arrivals::new(Track::new(Direction::Forward, 100, 0), 10, 0);
        arrivals.add(extent(10, 20), sums(10, 1));
        assert_eq!(arrivals.close(20, true), None, "nothing is contiguous");
        arrivals.add(extent(0, 10), sums(0, 1));
        assert_eq!(arrivals.reach(), 20);
        let hot = arrivals.close(20, false).expect("full");
        assert_eq!((hot.extent, hot.until, hot.checksums), (extent(0, 20), 20, vec![0, 10]));
        assert_eq!(arrivals.next(), 20);
    }

    #[test]
    fn backward_it_is_the_mirror_image() {
        let mut arrivals = Arrivals::new(Track::new(Direction::Backward, 100, 0), 10, 30);
        arrivals.add(extent(60, 70), sums(6, 1));
        arrivals.add(extent(50, 60), sums(5, 1));
        arrivals.add(extent(40, 50), sums(4, 1));
        let hot = arrivals.close(20, false).expect("full");
        assert_eq!((hot.extent, hot.until, hot.checksums), (extent(50, 70), 50, vec![5, 6]));
        assert_eq!(arrivals.close(20, false), None);
        let hot = arrivals.close(20, true).expect("short");
        assert_eq!((hot.extent, hot.until), (extent(40, 50), 60));
    }

    #[test]
    fn no_hotzone_crosses_a_seam_and_the_end_closes_one() {
        for direction in [Direction::Forward, Direction::Backward] {
            let track = Track::new(direction, 100, 30);
            let mut arrivals = Arrivals::new(track, 20, 0);
            let mut at = 0;
            while at < 100 {
                let end = (at + 20).min(track.stop_after(at));
                arrivals.add(track.extent(at, end).expect("not empty"), Box::default());
                at = end;
            }
            let mut cuts = vec![];
            while let Some(hot) = arrivals.close(60, false) {
                cuts.push(hot.extent);
            }
            let expected = match direction {
                Direction::Forward => vec![extent(0, 30), extent(30, 90), extent(90, 100)],
                Direction::Backward => vec![extent(40, 100), extent(30, 40), extent(0, 30)],
            };
            assert_eq!(cuts, expected);
            assert_eq!(arrivals.next(), 100);
        }
    }

    #[test]
    fn what_must_be_whole_is_never_closed_short() {
        let mut arrivals = Arrivals::new(Track::new(Direction::Backward, 100, 40), 20, 60);
        arrivals.add(extent(20, 40), Box::default());
        assert_eq!(arrivals.close(20, true), None);
        arrivals.add(extent(0, 20), Box::default());
        assert_eq!(arrivals.close(20, false).expect("whole").extent, extent(0, 40));
    }

    #[test]
    fn a_short_first_chunk_does_not_keep_a_hotzone_open() {
        // A plan that goes on at 7 is back in step with its data units after 3 bytes.
        let mut arrivals = Arrivals::new(Track::new(Direction::Forward, 100, 0), 10, 7);
        for (start, end) in [(7, 10), (10, 20)] {
            arrivals.add(extent(start, end), Box::default());
        }
        assert_eq!(arrivals.close(20, false).expect("full").extent, extent(7, 20));
    }

    #[test]
    fn unprotected_everything_without_a_gap_goes_at_once() {
        let mut arrivals = Arrivals::new(Track::new(Direction::Forward, 100, 30), 20, 10);
        arrivals.add(extent(30, 50), Box::default());
        assert_eq!(arrivals.take_all(), None);
        arrivals.add(extent(10, 30), Box::default());
        assert_eq!(arrivals.take_all().expect("taken").extent, extent(10, 50));
    }
}
