//! What a worker knows about the holes of a transfer's two sides.
//!
//! A hole in plaintext is zeros. A hole in ciphertext is *not* zero plaintext: it is decrypted like any other zeros, unless
//! the user says that it was never written (`keep_holes`).

use crate::backend::device::Region;
use crate::pipeline::slot::{Fill, Side};
use crate::pipeline::transfer::{End, Transfer, Work};
use crate::units::Extent;

/// The last answer about each side, so that a terabyte of hole costs one system call and not a million.
#[derive(Debug, Default)]
pub struct HoleCache {
    regions: [Option<(u64, Region)>; 2],
}

impl HoleCache {
    fn region_at(&mut self, side: Side, end: &End, offset: u64) -> Region {
        let all_data = Region::Data { until: u64::MAX };
        let Some(device) = &end.holes else { return all_data };
        let place = &mut self.regions[side as usize];
        if let Some((from, region)) = *place
            && (from..region.until()).contains(&offset)
        {
            return region;
        }
        // Beyond the end nothing is known, so nothing is a hole.
        let region = device.region_at(offset).unwrap_or(all_data);
        *place = Some((offset, region));
        region
    }

    /// Is all of the chunk a hole of one side? A chunk lies in one segment, so its place is one piece.
    fn is_hole(&mut self, side: Side, transfer: &Transfer, extent: Extent) -> bool {
        let end = match side {
            Side::Source => &transfer.source,
            Side::Sink => &transfer.sink,
        };
        let start = transfer.place(side, extent.start());
        matches!(self.region_at(side, end, start), Region::Hole { until } if until >= start + extent.len())
    }

    /// How this chunk's source bytes come to be.
    pub fn fill_of(&mut self, transfer: &Transfer, extent: Extent) -> Fill {
        if transfer.source.stream || !self.is_hole(Side::Source, transfer, extent) {
            return Fill::Read;
        }
        let kept = match transfer.work {
            Work::Encrypt => false,
            Work::Decrypt => transfer.keep_holes,
            // Zeros on the plaintext side and a kept hole on the encrypted side are equal without a look.
            Work::Verify => transfer.keep_holes && self.is_hole(Side::Sink, transfer, extent),
            Work::Recrypt => return Fill::Read,
        };
        if kept { Fill::Kept } else { Fill::Hole }
    }

    /// Make zeros of decrypted bytes that were holes of the encrypted `side`. `plain` holds whole data units of `unit` bytes, and
    /// was read from byte `start` of the device.
    pub fn erase(&mut self, side: Side, end: &End, start: u64, plain: &mut [u8], unit: u32) {
        let unit = u64::from(unit);
        let stop = start + plain.len() as u64;
        let mut offset = start;
        while offset < stop {
            let region = self.region_at(side, end, offset);
            let until = region.until().min(stop);
            if matches!(region, Region::Hole { .. }) {
                // Only whole data units: one that was partly written was written.
                let from = (offset - start).next_multiple_of(unit);
                let to = (until - start) / unit * unit;
                if from < to {
                    let position = |at: u64| usize::try_from(at).expect("within a buffer");
                    plain[position(from)..position(to)].fill(0);
                }
            }
            offset = until;
        }
    }
}
