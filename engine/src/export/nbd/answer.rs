//! Replies as bytes, in each style.
//!
//! | | simple | structured | extended |
//! |---|---|---|---|
//! | data | simple header, data | chunk `OFFSET_DATA` | the same, longer header |
//! | done | simple header | simple header | chunk `NONE` |
//! | failed | simple header | chunk `ERROR` or `ERROR_OFFSET`, with a text | the same |

use crate::format::nbd::reply::{
    CHUNK_BYTES, EXTENDED_CHUNK_BYTES, FLAG_DONE, SIMPLE_BYTES, Style, kind, put_chunk, put_simple,
};
use crate::format::nbd::request::Request;

/// Bytes of the longest reply without data.
pub const NOTE_MAX: usize = EXTENDED_CHUNK_BYTES + 6 + TEXT_MAX + 8;

/// Bytes of the longest text of an error.
const TEXT_MAX: usize = 96;

/// Why a request failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failure {
    /// See [`crate::format::nbd::errors`].
    pub errno: u32,
    /// For humans.
    pub text: &'static str,
    /// Where, if it was somewhere.
    pub at: Option<u64>,
}

/// A reply without data.
#[derive(Debug, Clone, Copy)]
pub struct Note {
    /// To which request.
    pub request: Request,
    /// `None`: it is done.
    pub failure: Option<Failure>,
}

/// Bytes of what goes in front of data.
#[must_use]
pub fn data_head_bytes(style: Style) -> usize {
    match style {
        Style::Simple => SIMPLE_BYTES,
        Style::Structured => CHUNK_BYTES + 8,
        Style::Extended => EXTENDED_CHUNK_BYTES + 8,
    }
}

/// What goes in front of `len` bytes of data from byte `at`; `last`: nothing follows the data.
pub fn put_data_head(into: &mut [u8], style: Style, request: &Request, at: u64, len: u64, last: bool) {
    if style == Style::Simple {
        put_simple(into, 0, request.cookie);
        return;
    }
    let extended = style == Style::Extended;
    let flags = if last { FLAG_DONE } else { 0 };
    let head = put_chunk(into, extended, flags, kind::OFFSET_DATA, request.cookie, request.offset, len + 8);
    into[head..head + 8].copy_from_slice(&at.to_be_bytes());
}

/// Write a reply without data; returns its bytes.
///
/// # Panics
/// If `into` is shorter than [`NOTE_MAX`].
pub fn put_note(into: &mut [u8], style: Style, note: &Note) -> usize {
    let request = &note.request;
    let extended = style == Style::Extended;
    let Some(failure) = &note.failure else {
        if !extended {
            return put_simple(into, 0, request.cookie);
        }
        return put_chunk(into, true, FLAG_DONE, kind::NONE, request.cookie, request.offset, 0);
    };
    if style == Style::Simple {
        return put_simple(into, failure.errno, request.cookie);
    }
    let text = &failure.text.as_bytes()[..failure.text.len().min(TEXT_MAX)];
    let (kind, place) = match failure.at {
        Some(_) => (kind::ERROR_OFFSET, 8),
        None => (kind::ERROR, 0),
    };
    let len = (6 + text.len() + place) as u64;
    let mut at = put_chunk(into, extended, FLAG_DONE, kind, request.cookie, request.offset, len);
    let mut put = |bytes: &[u8]| {
        into[at..at + bytes.len()].copy_from_slice(bytes);
        at += bytes.len();
    };
    put(&failure.errno.to_be_bytes());
    put(&u16::try_from(text.len()).expect("cut above").to_be_bytes());
    put(text);
    if let Some(place) = failure.at {
        put(&place.to_be_bytes());
    }
    at
}

/// Write the reply to BLOCK_STATUS: `extents` of (bytes, flags) in context `context`; returns its bytes.
///
/// # Panics
/// If `into` is too short, or an extent of a structured reply is of 4 GiB or more.
pub fn put_status(
    into: &mut [u8],
    style: Style,
    request: &Request,
    context: u32,
    extents: &[(u64, u32)],
) -> usize {
    let extended = style == Style::Extended;
    let (kind, len) = if extended {
        (kind::BLOCK_STATUS_EXTENDED, 8 + 16 * extents.len())
    } else {
        (kind::BLOCK_STATUS, 4 + 8 * extents.len())
    };
    let mut at = put_chunk(into, extended, FLAG_DONE, kind, request.cookie, request.offset, len as u64);
    let mut put = |bytes: &[u8]| {
        into[at..at + bytes.len()].copy_from_slice(bytes);
        at += bytes.len();
    };
    put(&context.to_be_bytes());
    if extended {
        put(&u32::try_from(extents.len()).expect("few").to_be_bytes());
    }
    for &(bytes, flags) in extents {
        if extended {
            put(&bytes.to_be_bytes());
            put(&u64::from(flags).to_be_bytes());
        } else {
            put(&u32::try_from(bytes).expect("a structured extent is shorter than 4 GiB").to_be_bytes());
            put(&flags.to_be_bytes());
        }
    }
    at
}
