//! What a server sends: headers and chunks, checked before they are believed, and payload into its place.

use std::sync::PoisonError;

use crate::backend::nbd::session::{
    COLLECTED_MAX, CONTEXTS_MAX, INDEX_BITS, Reading, STATUS_MAX, Session, StatusExtent, Violation, changes,
    errno, failure, into, printable,
};
use crate::format::nbd::STRING_MAX;
use crate::format::nbd::reply::{self, FLAG_DONE, Header, Style, kind};
use crate::format::nbd::request::Command;

impl Session {
    /// Where the next bytes go: first the rest of a payload, if there is one and somebody waits for it, then what follows.
    pub fn incoming(&mut self) -> (&mut [u8], &mut [u8]) {
        self.staging.settle();
        let room = &mut self.staging.bytes[self.staging.end..];
        match self.reading {
            Reading::Payload { part, at, left, .. } if self.staging.end == 0 => {
                let into = into(&mut self.flights, &self.parts[part], at, left);
                (into.unwrap_or_default(), room)
            }
            _ => (&mut [], room),
        }
    }

    /// So many bytes have arrived there.
    ///
    /// # Errors
    /// What they say breaks the protocol.
    pub fn received(&mut self, mut count: usize) -> Result<(), Violation> {
        if let Reading::Payload { part, at, left, last } = self.reading
            && self.staging.end == 0
            && into(&mut self.flights, &self.parts[part], at, left).is_some()
        {
            let direct = u32::try_from(count).unwrap_or(u32::MAX).min(left);
            count -= direct as usize;
            self.reading = Reading::Payload { part, at: at + direct, left: left - direct, last };
        }
        self.staging.end += count;
        while self.step()? {}
        Ok(())
    }

    /// Look at what is there. `false`: more must arrive first.
    fn step(&mut self) -> Result<bool, Violation> {
        match self.reading {
            Reading::Header => {
                let Some(magic) = self.staging.ready().first_chunk::<4>() else { return Ok(false) };
                let bytes =
                    reply::header_bytes(*magic).ok_or(Violation("a reply begins with none of its magics"))?;
                if self.staging.ready().len() < bytes {
                    return Ok(false);
                }
                let header = reply::parse(&self.staging.ready()[..bytes]);
                let is_ours = match bytes {
                    reply::SIMPLE_BYTES => self.bounds.style != Style::Extended,
                    reply::CHUNK_BYTES => self.bounds.style == Style::Structured,
                    _ => self.bounds.style == Style::Extended,
                };
                if !is_ours {
                    return Err(Violation("a reply of a kind that was not agreed on"));
                }
                self.staging.take(bytes);
                self.begin(header)?;
                Ok(true)
            }
            Reading::Offset { part, length, last } => {
                let Some(offset) = self.staging.ready().first_chunk::<8>() else { return Ok(false) };
                let offset = u64::from_be_bytes(*offset);
                self.staging.take(8);
                let (at, left) = self.cover(part, offset, length)?;
                self.reading = Reading::Payload { part, at, left, last };
                Ok(true)
            }
            Reading::Payload { part, at, left, last } => {
                let ready = self.staging.ready();
                let count = ready.len().min(left as usize);
                let moved = u32::try_from(count).expect("less than a payload");
                if let Some(into) = into(&mut self.flights, &self.parts[part], at, moved) {
                    into.copy_from_slice(&ready[..count]);
                }
                self.staging.take(count);
                self.reading = Reading::Payload { part, at: at + moved, left: left - moved, last };
                if left > moved {
                    return Ok(false);
                }
                self.end_of_chunk(part, last)?;
                Ok(true)
            }
            Reading::Whole { part, kind, left, last } => {
                let ready = self.staging.ready();
                let count = ready.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                self.whole.extend_from_slice(&ready[..count]);
                self.staging.take(count);
                let left = left - u64::try_from(count).expect("a length");
                self.reading = Reading::Whole { part, kind, left, last };
                if left > 0 {
                    return Ok(false);
                }
                self.look_at(part, kind)?;
                self.end_of_chunk(part, last)?;
                Ok(true)
            }
        }
    }

    fn find(&self, cookie: u64) -> Result<usize, Violation> {
        let index = usize::try_from(cookie & ((1 << INDEX_BITS) - 1)).expect("24 bits");
        match self.parts.get(index) {
            Some(part) if part.cookie == cookie && part.sent => Ok(index),
            _ => Err(Violation("a reply to what was not asked, or was answered already")),
        }
    }

    fn begin(&mut self, header: Header) -> Result<(), Violation> {
        match header {
            Header::Simple { error, cookie } => {
                let key = self.find(cookie)?;
                let part = &mut self.parts[key];
                let is_read = part.command == Command::Read;
                if error != 0 {
                    part.error = Some(failure(error, ""));
                    return self.end_of_chunk(key, true);
                }
                if part.command == Command::BlockStatus || (is_read && self.bounds.style != Style::Simple) {
                    return Err(Violation("a simple reply where a structured one was agreed on"));
                }
                if !is_read {
                    return self.end_of_chunk(key, true);
                }
                let (at, left) = self.cover(key, self.parts[key].offset, self.parts[key].length.into())?;
                self.reading = Reading::Payload { part: key, at, left, last: true };
                Ok(())
            }
            Header::Chunk { flags, kind: chunk, cookie, length, .. } => {
                let part = self.find(cookie)?;
                let last = flags & FLAG_DONE != 0;
                let command = self.parts[part].command;
                let whole = Reading::Whole { part, kind: chunk, left: length, last };
                self.reading = match (chunk, command) {
                    (kind::NONE, _) if length == 0 && last => return self.end_of_chunk(part, true),
                    (kind::OFFSET_DATA, Command::Read) if length > 8 => {
                        Reading::Offset { part, length: length - 8, last }
                    }
                    (kind::OFFSET_HOLE, Command::Read) if length == 12 => whole,
                    (kind::BLOCK_STATUS | kind::BLOCK_STATUS_EXTENDED, Command::BlockStatus)
                        if length <= COLLECTED_MAX =>
                    {
                        whole
                    }
                    _ if chunk & kind::ERROR_BIT != 0
                        && (6..=u64::from(STRING_MAX) + 14).contains(&length) =>
                    {
                        whole
                    }
                    _ => {
                        return Err(Violation(
                            "a chunk that is no answer to what was asked, or of an impossible length",
                        ));
                    }
                };
                self.whole.clear();
                Ok(())
            }
        }
    }

    /// A piece of a read arrives: it must lie in what was asked, and be new. Where it goes.
    fn cover(&mut self, key: usize, offset: u64, length: u64) -> Result<(u32, u32), Violation> {
        const OUTSIDE: Violation = Violation("a chunk of data beyond what was asked");
        let part = &mut self.parts[key];
        let at = offset.checked_sub(part.offset).ok_or(OUTSIDE)?;
        let end = at.checked_add(length).filter(|&end| end <= part.length.into()).ok_or(OUTSIDE)?;
        let narrow = |bytes: u64| u32::try_from(bytes).expect("inside a request");
        let (at, end) = (narrow(at), narrow(end));
        if at == end || !part.covered.add(at, end) {
            return Err(Violation("chunks of data that overlap, are empty or too many"));
        }
        Ok((at, end - at))
    }

    /// A payload kept together is complete.
    fn look_at(&mut self, key: usize, chunk: u16) -> Result<(), Violation> {
        let bytes = std::mem::take(&mut self.whole);
        let u32_at =
            |at: usize| bytes.get(at..at + 4).map(|b| u32::from_be_bytes(b.try_into().expect("4 bytes")));
        let u64_at =
            |at: usize| bytes.get(at..at + 8).map(|b| u64::from_be_bytes(b.try_into().expect("8 bytes")));
        match chunk {
            kind::OFFSET_HOLE => {
                let (offset, length) = (u64_at(0).expect("12 bytes"), u32_at(8).expect("12 bytes"));
                let (at, count) = self.cover(key, offset, length.into())?;
                if let Some(into) = into(&mut self.flights, &self.parts[key], at, count) {
                    into.fill(0);
                }
            }
            kind::BLOCK_STATUS | kind::BLOCK_STATUS_EXTENDED => {
                const MALFORMED: Violation = Violation("a malformed block status");
                let (head, step) = if chunk == kind::BLOCK_STATUS { (4, 8) } else { (8, 16) };
                let context = u32_at(0).ok_or(MALFORMED)?;
                let extents =
                    bytes.get(head..).filter(|rest| rest.len() % step == 0).ok_or(MALFORMED)?.len() / step;
                if extents == 0 {
                    return Err(MALFORMED);
                }
                if step == 16 && u32_at(4).map(|count| count as usize) != Some(extents) {
                    return Err(MALFORMED);
                }
                let answer = self.parts[key].flight.and_then(|flight| self.flights[flight].answer.clone());
                let Some(answer) = answer else { return Ok(()) };
                let mut answer = answer.lock().unwrap_or_else(PoisonError::into_inner);
                if answer.iter().any(|extent| extent.context == context) {
                    return Err(Violation("the block status of a context twice"));
                }
                let contexts = answer.chunk_by(|one, next| one.context == next.context).count();
                if contexts >= CONTEXTS_MAX || answer.len() + extents > STATUS_MAX {
                    return Err(Violation("a block status of more than was asked for"));
                }
                for at in (head..bytes.len()).step_by(step) {
                    let (length, flags) = if step == 8 {
                        (u64::from(u32_at(at).ok_or(MALFORMED)?), u64::from(u32_at(at + 4).ok_or(MALFORMED)?))
                    } else {
                        (u64_at(at).ok_or(MALFORMED)?, u64_at(at + 8).ok_or(MALFORMED)?)
                    };
                    answer.push(StatusExtent { context, length, flags });
                }
            }
            _ => {
                let error = u32_at(0).expect("6 bytes at least");
                let told = bytes.get(4..6).map_or(0, |b| usize::from(u16::from_be_bytes([b[0], b[1]])));
                let text =
                    bytes.get(6..6 + told).ok_or(Violation("an error whose text is longer than it"))?;
                if error == 0 {
                    return Err(Violation("an error chunk without an error"));
                }
                self.parts[key].error.get_or_insert_with(|| failure(error, &printable(text)));
            }
        }
        // Keep the memory, not what was in it.
        self.whole = bytes;
        Ok(())
    }

    /// A chunk is complete, and the reply with it if it was the last.
    fn end_of_chunk(&mut self, key: usize, last: bool) -> Result<(), Violation> {
        self.reading = Reading::Header;
        if !last {
            return Ok(());
        }
        let part = self.parts.remove(key);
        self.replies += 1;
        self.awaited -= 1;
        if changes(part.command) {
            self.writes -= 1;
            self.acknowledged += u64::from(part.error.is_none());
        }
        if part.command == Command::Read && part.error.is_none() && !part.covered.is_all(part.length) {
            // Nobody must take what the buffer held before for what was asked.
            self.answered(part.flight, Some(errno(libc::EIO)));
            return Err(Violation("the end of a reply before all of it"));
        }
        self.answered(part.flight, part.error);
        Ok(())
    }
}
