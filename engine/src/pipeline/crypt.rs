//! What is done to a chunk once its bytes are here: encrypt, decrypt or compare, in place, and decide what to write.

use crate::backend::Span;
use crate::crypto::burn_stack;
use crate::error::{Error, ErrorKind};
use crate::pipeline::holes::HoleCache;
use crate::pipeline::slot::{Fill, Side, Slot};
use crate::pipeline::transfer::{Transfer, Work};
use crate::pipeline::zeros::Runs;
use crate::telemetry::record::Counters;

/// Crypt the chunk in its buffer. Returns what to write; nothing when verifying.
///
/// # Errors
/// The source ends inside a data unit, or the sink cannot hold the chunk.
pub fn transform(
    transfer: &Transfer,
    counters: &Counters,
    holes: &mut HoleCache,
    slot: &mut Slot,
) -> Result<Option<Runs>, Error> {
    let start = slot.extent.start();
    let segment = transfer.segments().at(start);
    let unit = segment.unit_bytes;
    let len = slot.source_len;
    let whole = len.next_multiple_of(unit);
    let buf = slot.buf.as_mut().expect("nothing is in flight");
    if whole != len && !transfer.pad {
        return Err(unaligned(start + u64::from(len), unit).at(&transfer.source.name).hint(PAD));
    }
    if transfer.work == Work::Verify {
        let other = slot.other.as_mut().expect("nothing is in flight");
        // What the encrypted side cannot answer for differs from there on; the part it has is still compared.
        let answered = whole.min(slot.sink_len - slot.sink_len % unit);
        let plain = &mut other[range(0..answered)];
        segment.decrypt(start, plain);
        burn_stack();
        if transfer.keep_holes {
            holes.erase(Side::Sink, &transfer.sink, segment.place(start), plain, unit);
        }
        // Padding is zeros (`--pad`): compare it as such.
        buf[range(len..whole)].fill(0);
        let differs = first_difference(&buf[range(0..answered)], plain)
            .or_else(|| (answered < whole).then_some(u64::from(answered.min(len))))
            .or_else(|| (transfer.sink.stream && slot.sink_len > whole).then_some(whole.into()));
        if let Some(at) = differs {
            transfer.differs_at(start + at);
        }
        return Ok(None);
    }
    if whole != len {
        buf[range(len..whole)].fill(0);
        transfer.padded((whole - len).into());
    }
    let end = transfer.place(Side::Sink, start) + u64::from(whole);
    if let Some(capacity) = transfer.rules.capacity
        && end > capacity
    {
        return Err(too_small(end, capacity).at(&transfer.sink.name));
    }
    let bytes = &mut buf[range(0..whole)];
    match transfer.work {
        Work::Encrypt => segment.encrypt(start, bytes),
        Work::Decrypt if slot.fill != Fill::Kept => {
            segment.decrypt(start, bytes);
            if transfer.keep_holes {
                holes.erase(Side::Source, &transfer.source, segment.place(start), bytes, unit);
            }
        }
        Work::Decrypt => {}
        Work::Verify => unreachable!("handled above"),
        Work::Recrypt => unreachable!("a rewrite is crypted on its own way"),
    }
    // Once a chunk costs nothing that can be measured, and no frame keeps a round key after the job.
    burn_stack();
    // A direct write ends on a whole block; the file gets its true length at the end.
    let aligned = if transfer.sink.stream { whole } else { whole.next_multiple_of(transfer.sink.align) };
    buf[range(whole..aligned)].fill(0);
    if !transfer.rules.skip_zeros {
        return Ok(Some(Runs::whole(aligned)));
    }
    let runs = Runs::nonzero(&buf[range(0..aligned)]);
    counters.add_sparse((u64::from(aligned) - runs.bytes()).min(whole.into()));
    Ok(Some(runs))
}

fn range(span: Span) -> std::ops::Range<usize> {
    span.start as usize..span.end as usize
}

/// The way out for a plaintext that is not whole data units.
pub const PAD: &str = "--pad fills the last data unit with zero bytes";

/// The source's length is not a multiple of the data unit.
#[must_use]
pub fn unaligned(bytes: u64, unit: u32) -> Error {
    let what = format!("source size of {bytes} bytes is not a multiple of the data unit of {unit} bytes");
    Error::new(ErrorKind::Invalid, what)
}

/// The sink cannot hold what the source has.
#[must_use]
pub fn too_small(needed: u64, capacity: u64) -> Error {
    let what = format!("sink is too small: {needed} bytes are needed, it holds {capacity}");
    Error::new(ErrorKind::NoSpace, what)
}

/// Offset of the first byte in which two slices of equal length differ.
fn first_difference(one: &[u8], two: &[u8]) -> Option<u64> {
    // Slices compare by `memcmp`; only a chunk that differs is looked at byte by byte.
    if one == two {
        return None;
    }
    one.iter().zip(two).position(|(one, two)| one != two).map(|at| at as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_difference_is_found_anywhere() {
        let one = vec![7_u8; 1000];
        assert_eq!(first_difference(&one, &one), None);
        for at in [0, 1, 511, 512, 999] {
            let mut two = one.clone();
            two[at] ^= 1;
            two[999] ^= 2;
            assert_eq!(first_difference(&one, &two), Some(at as u64));
        }
    }
}
