//! A client that reads, writes, zeroes, flushes and verifies all the time, many requests in flight, in a part of the export that is
//! its own. It knows what every byte must be; it survives the death of the server, and then finds out for each request that was not
//! answered how much of it was done.
//!
//! What it demands after a death: what was acknowledged is there (the kernel lives, so no flush is needed for that); of what was
//! not, every cipher block is either old or new.

use std::collections::HashMap;
use std::io::Result;
use std::ops::Range;
use std::path::Path;

use engine::format::nbd::request::Command;
use engine::format::nbd::{command_flags, flags};

use crate::Random;
use crate::nbd::client::{Answer, Connection};

/// Bytes that are never found half written.
const BLOCK: usize = 16;

/// One request in flight.
#[derive(Debug)]
struct Flight {
    /// In the part, bytes.
    range: Range<usize>,
    /// What it makes of them; `None`: it reads.
    new: Option<Vec<u8>>,
}

/// How requests are chosen.
#[derive(Debug, Clone, Copy)]
pub struct Habit {
    /// Requests in flight.
    pub depth: usize,
    /// Smallest and largest request, bytes.
    pub sizes: (usize, usize),
    /// Offsets and lengths are multiples of this.
    pub align: usize,
}

impl Habit {
    /// What databases do, and worse: 512 bytes to 64 KiB.
    pub const MIXED: Self = Self { depth: 16, sizes: (512, 64 << 10), align: 512 };
    /// Nothing is aligned.
    pub const CROOKED: Self = Self { depth: 8, sizes: (1, 20_000), align: 1 };
    /// What a rotation has to bear.
    pub const LARGE: Self = Self { depth: 8, sizes: (4096, 256 << 10), align: 4096 };
}

/// See the module.
pub struct Steady {
    connection: Option<Connection>,
    /// First byte of its part.
    start: u64,
    /// What the part holds, as far as it was acknowledged.
    model: Vec<u8>,
    flights: HashMap<u64, Flight>,
    habit: Habit,
    random: Random,
    /// Requests that were answered.
    pub done: u64,
    /// Requests that were in flight when the server died, and how many of these had been done, wholly or in parts.
    pub interrupted: (u64, u64),
}

impl Steady {
    /// Whose part begins at this byte of the export and holds these bytes now.
    #[must_use]
    pub fn new(start: u64, model: Vec<u8>, habit: Habit, random: Random) -> Self {
        Self {
            connection: None,
            start,
            model,
            flights: HashMap::new(),
            habit,
            random,
            done: 0,
            interrupted: (0, 0),
        }
    }

    /// What the part must hold now. Nothing is in flight.
    #[must_use]
    pub fn model(&self) -> &[u8] {
        assert!(self.flights.is_empty(), "not settled");
        &self.model
    }

    /// Connect, again where the server has died, and settle what was in flight then.
    ///
    /// # Errors
    /// As the socket's.
    ///
    /// # Panics
    /// If something acknowledged is lost.
    pub fn connect(&mut self, socket: &Path) -> Result<()> {
        let wish = super::client::Wish::of(engine::format::nbd::reply::Style::Structured);
        let mut connection = Connection::open(socket, &wish)?;
        for (_, Flight { range, new }) in std::mem::take(&mut self.flights) {
            let Some(new) = new else { continue };
            let answer = connection.call(Command::Read, 0, self.offset(range.start), range.len() as u64)?;
            assert_eq!(answer.error, 0, "READ after a death");
            let mut any_new = false;
            let old = &self.model[range.clone()];
            let mut at = 0;
            while at < range.len() {
                // To the end of the cipher block, counted from the beginning of the volume.
                let end = (at + BLOCK
                    - (usize::try_from(self.start).expect("an offset in memory") + range.start + at) % BLOCK)
                    .min(range.len());
                let found = &answer.data[at..end];
                assert!(
                    found == &old[at..end] || found == &new[at..end],
                    "after a death: byte {} is neither old nor new",
                    self.offset(range.start + at)
                );
                any_new |= found != &old[at..end];
                at = end;
            }
            self.interrupted.0 += 1;
            self.interrupted.1 += u64::from(any_new);
            self.model[range].copy_from_slice(&answer.data);
        }
        self.connection = Some(connection);
        Ok(())
    }

    fn offset(&self, at: usize) -> u64 {
        self.start + at as u64
    }

    fn is_free(&self, range: &Range<usize>) -> bool {
        !self.flights.values().any(|flight| flight.range.start < range.end && range.start < flight.range.end)
    }

    /// A range that nothing in flight touches; `None` if luck does not find one.
    fn pick(&mut self) -> Option<Range<usize>> {
        let Habit { sizes: (least, most), align, .. } = self.habit;
        for _ in 0..8 {
            let length =
                (least + self.random.below(most - least + 1)).next_multiple_of(align).min(self.model.len());
            let start = self.random.below(self.model.len() - length + 1) / align * align;
            let range = start..start + length;
            if self.is_free(&range) {
                return Some(range);
            }
        }
        None
    }

    fn launch(&mut self) -> Result<bool> {
        let Some(range) = self.pick() else { return Ok(false) };
        let connection = self.connection.as_mut().expect("connected");
        let fua = if self.random.below(16) == 0 { command_flags::FUA } else { 0 };
        let (offset, length) = (self.start + range.start as u64, range.len() as u64);
        let zeroes = connection.flags & flags::SEND_WRITE_ZEROES != 0;
        // Whatever becomes of sending it: from here on it may have happened.
        let (command, new, flags) = match self.random.below(10) {
            0..=4 => (Command::Read, None, 0),
            5 if zeroes => (Command::WriteZeroes, Some(vec![0; range.len()]), fua),
            _ => {
                let mut new = vec![0; range.len()];
                self.random.fill(&mut new);
                (Command::Write, Some(new), fua)
            }
        };
        let payload = if command == Command::Write { new.as_deref().expect("data") } else { &[] };
        let sent = connection.send(command, flags, offset, length, payload);
        // A cookie of its own for one that was not even sent: it is settled like the others.
        let cookie = *sent.as_ref().unwrap_or(&0);
        self.flights.insert(cookie, Flight { range, new });
        sent.map(|_| true)
    }

    fn land(&mut self) -> Result<()> {
        let (cookie, Answer { error, data, .. }) = self.connection.as_mut().expect("connected").receive()?;
        let Flight { range, new } = self.flights.remove(&cookie).expect("in flight");
        assert_eq!(
            error,
            0,
            "{} bytes at {}, write: {}",
            range.len(),
            self.offset(range.start),
            new.is_some()
        );
        match new {
            Some(new) => self.model[range].copy_from_slice(&new),
            None => super::same(
                &data,
                &self.model[range.clone()],
                &format!("READ at {}", self.offset(range.start)),
            ),
        }
        self.done += 1;
        Ok(())
    }

    /// Send as much as habit allows and take one answer.
    ///
    /// # Errors
    /// As the socket's: then [`Steady::connect`] again.
    ///
    /// # Panics
    /// If an answer is wrong.
    pub fn step(&mut self) -> Result<()> {
        while self.flights.len() < self.habit.depth && self.launch()? {}
        self.land()
    }

    /// Take all answers, flush, and read the whole part.
    ///
    /// # Errors
    /// As the socket's.
    ///
    /// # Panics
    /// If an answer is wrong.
    pub fn settle(&mut self) -> Result<()> {
        while !self.flights.is_empty() {
            self.land()?;
        }
        let start = self.start;
        let connection = self.connection.as_mut().expect("connected");
        assert_eq!(connection.call(Command::Flush, 0, 0, 0)?.error, 0, "FLUSH");
        for (n, piece) in self.model.chunks(1 << 20).enumerate() {
            let at = start + ((n as u64) << 20);
            let answer = connection.call(Command::Read, 0, at, piece.len() as u64)?;
            assert_eq!(answer.error, 0, "READ at {at}");
            super::same(&answer.data, piece, &format!("READ at {at}"));
        }
        Ok(())
    }
}
