//! Do source and sink still hold what they held? By samples, for all of it would take as long as the copy.

use zeroize::Zeroizing;

use crate::backend::blocking::Blocking;
use crate::crypto::burn_stack;
use crate::crypto::keyed::{BYTES, Keyed};
use crate::error::Result;
use crate::pipeline::holes::HoleCache;
use crate::pipeline::slot::Side;
use crate::pipeline::transfer::{Transfer, Work};
use crate::units::Extent;

/// Bytes of a block looked at: a multiple of every data unit.
const BLOCK: u64 = 4096;
/// Blocks looked at between the ends.
const BLOCKS: u64 = 32;
/// Of the source, at either end.
const EDGE: u64 = 1 << 20;
/// Of the sink, before the watermark: what a disk that lies about its flushes loses first.
const TAIL: u64 = 4 << 20;
/// Bytes compared at a time.
const PIECE: u64 = 1 << 20;

/// Blocks spread over `0..end`, at multiples of [`BLOCK`].
fn spread(end: u64) -> impl Iterator<Item = Extent> {
    let blocks = end / BLOCK;
    let count = BLOCKS.min(blocks);
    (0..count).filter_map(move |index| {
        // Without overflow for any size: the quotient first.
        let at = blocks / count * index + blocks % count * index / count;
        Extent::new(at * BLOCK, (at + 1) * BLOCK)
    })
}

/// `start..end` in pieces.
fn pieces(start: u64, end: u64) -> impl Iterator<Item = Extent> {
    let starts = std::iter::successors(Some(start), |at| Some(at + PIECE)).take_while(move |at| *at < end);
    starts.filter_map(move |at| Extent::new(at, end.min(at + PIECE)))
}

fn read(device: &mut Blocking, at: u64, len: u64) -> Result<Zeroizing<Vec<u8>>> {
    let mut bytes = Zeroizing::new(vec![0; usize::try_from(len).expect("a piece")]);
    device.read(at, &mut bytes)?;
    Ok(bytes)
}

/// A keyed value of samples of a source of so many bytes.
pub(super) fn sample(source: &mut Blocking, size: u64, key: &Keyed) -> Result<[u8; BYTES]> {
    let mut state = key.value(&[b"source", &size.to_le_bytes()]);
    let edges = pieces(0, size.min(EDGE)).chain(pieces(size.saturating_sub(EDGE), size));
    for extent in edges.chain(spread(size)) {
        let bytes = read(source, extent.start(), extent.len())?;
        state = key.value(&[&state, &bytes]);
    }
    Ok(state)
}

/// The first of the places looked at before `watermark` where the sink does not hold what the source makes of it.
pub(super) fn first_difference(
    transfer: &Transfer,
    source: &mut Blocking,
    sink: &mut Blocking,
    watermark: u64,
) -> Result<Option<u64>> {
    let mut holes = HoleCache::default();
    let tail = watermark.saturating_sub(TAIL) / BLOCK * BLOCK;
    for extent in spread(watermark).chain(pieces(tail, watermark)) {
        let (start, segment) = (extent.start(), transfer.segments().at(extent.start()));
        // Whole data units of one segment; what is left of a piece in which two meet is for the next sample.
        let inside = |end: u64| std::ptr::eq(transfer.segments().at(end - 1), segment);
        let unit = u64::from(segment.unit_bytes);
        let len = extent.len() / unit * unit;
        if len == 0 || !(start - segment.start).is_multiple_of(unit) || !inside(start + len) {
            continue;
        }
        let mut made = read(source, transfer.place(Side::Source, start), len)?;
        match transfer.work {
            Work::Decrypt => {
                segment.decrypt(start, &mut made);
                if transfer.keep_holes {
                    let from = segment.place(start);
                    holes.erase(Side::Source, &transfer.source, from, &mut made, segment.unit_bytes);
                }
            }
            Work::Encrypt => segment.encrypt(start, &mut made),
            Work::Verify | Work::Recrypt => unreachable!("only copies keep checkpoints"),
        }
        burn_stack();
        if read(sink, transfer.place(Side::Sink, start), len)? != made {
            return Ok(Some(start));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_lie_inside_whatever_the_size() {
        for end in [0, 1, 4095, 4096, 40_000, 1 << 20, (1 << 40) + 4097, u64::MAX] {
            let blocks: Vec<Extent> = spread(end).collect();
            assert_eq!(blocks.len() as u64, BLOCKS.min(end / BLOCK), "{end}");
            assert!(blocks.windows(2).all(|pair| pair[0].end() <= pair[1].start()), "{end}");
            assert!(blocks.last().is_none_or(|last| last.end() <= end), "{end}");
        }
    }

    #[test]
    fn pieces_cover_a_range_once() {
        for (start, end) in [(0, 0), (5, 6), (0, PIECE), (0, PIECE + 1), (7, 3 * PIECE)] {
            let mut at = start;
            for piece in pieces(start, end) {
                assert_eq!(piece.start(), at);
                at = piece.end();
            }
            assert_eq!(at, end.max(start));
        }
    }
}
