//! Buffers of one worker's server.
//!
//! ```text
//! slot buffer   0 head room (a reply's header ends where its data begins) · 4096 data
//! ```
//! | class | data | whose |
//! |---|---|---|
//! | small | 32 KiB | shared |
//! | large | 256 KiB | shared |
//! | own | 60 KiB | one per connection, for when it gets no shared one |
//! | wire | 64 KiB | three per connection: what was received, what is being sent, what is to be sent next; under TLS a fourth for its records |
//!
//! No client takes all: a connection gets a shared buffer only while as many are free as it holds. One alone gets half of them, two a
//! third each, and those who come later always find some; and with its own buffer each gets on, whatever the others hold.
//!
//! What waits to be sent holds its buffer as long as the client does not read: a connection with [`Pool::share`] of them is not read
//! for until some are sent. That bounds what stalled clients take little by little; what they hold already, and a buffer for a payload
//! that does not come, is theirs until they are disconnected, see [`crate::limits::CLIENT_STALLED`].

use crate::error::Result;
use crate::limits;
use crate::sys::buffer::{Arena, Buf};

/// Bytes in front of the data: room for any header, and a whole page, so that data is aligned for direct I/O.
pub const HEAD: u32 = 4096;
/// Bytes of data in a small buffer.
pub const SMALL_BYTES: u32 = 32 << 10;
/// Bytes of data in a large buffer.
pub const LARGE_BYTES: u32 = 256 << 10;
/// Bytes of data in a connection's own buffer.
pub const OWN_BYTES: u32 = WIRE_BYTES - HEAD;
/// Bytes of a buffer for the socket.
pub const WIRE_BYTES: u32 = 64 << 10;
/// Small buffers of one worker.
pub const SMALL_COUNT: u32 = 192;
/// Large buffers of one worker.
pub const LARGE_COUNT: u32 = 48;

/// Wire buffers made at a time: a huge page of them.
const WIRE_BLOCK: u32 = 32;

const _: () = assert!(
    SMALL_COUNT as u64 * (HEAD + SMALL_BYTES) as u64 + LARGE_COUNT as u64 * (HEAD + LARGE_BYTES) as u64
        <= limits::EXPORT_WORKER_MEMORY
);
const _: () =
    assert!(5 * WIRE_BYTES as u64 <= limits::EXPORT_CLIENT_MEMORY, "its own, three wires, and one for TLS");

/// Which kind a slot buffer is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Small and shared.
    Small,
    /// Large and shared.
    Large,
    /// The connection's own.
    Own,
}

impl Class {
    /// Bytes of data it holds.
    #[must_use]
    pub fn bytes(self) -> u32 {
        match self {
            Self::Small => SMALL_BYTES,
            Self::Large => LARGE_BYTES,
            Self::Own => OWN_BYTES,
        }
    }
}

/// The shared buffers that are free, and the wire buffers of connections to come.
pub struct Pool {
    small: Vec<Buf>,
    large: Vec<Buf>,
    wire: Vec<Buf>,
    make: fn(u32, u32) -> Result<Arena>,
}

impl Pool {
    /// All free.
    ///
    /// # Errors
    /// No memory.
    pub fn new(make: fn(u32, u32) -> Result<Arena>) -> Result<Self> {
        let small = make(SMALL_COUNT, HEAD + SMALL_BYTES)?.take_all();
        let large = make(LARGE_COUNT, HEAD + LARGE_BYTES)?.take_all();
        Ok(Self { small, large, wire: Vec::new(), make })
    }

    /// A shared buffer for a connection that `holds` so many of its class.
    pub fn take(&mut self, class: Class, holds: usize) -> Option<Buf> {
        let free = match class {
            Class::Small => &mut self.small,
            Class::Large => &mut self.large,
            Class::Own => return None,
        };
        if holds < free.len() { free.pop() } else { None }
    }

    /// Shared buffers of a class that one connection may fill with what its client does not take: a sixteenth.
    #[must_use]
    pub fn share(class: Class) -> usize {
        match class {
            Class::Small => SMALL_COUNT as usize / 16,
            Class::Large => LARGE_COUNT as usize / 16,
            Class::Own => 1,
        }
    }

    /// No more than one connection's share is free: others are held up.
    #[must_use]
    pub fn is_short(&self) -> bool {
        self.small.len() <= Self::share(Class::Small) || self.large.len() <= Self::share(Class::Large)
    }

    /// A shared buffer is free again.
    pub fn give_back(&mut self, class: Class, buf: Buf) {
        match class {
            Class::Small => self.small.push(buf),
            Class::Large => self.large.push(buf),
            Class::Own => unreachable!("a connection keeps its own"),
        }
    }

    /// The wire buffers of a new connection; under TLS it takes one more of them.
    ///
    /// # Errors
    /// No memory.
    pub fn take_wires<const COUNT: usize>(&mut self) -> Result<[Buf; COUNT]> {
        if self.wire.len() < COUNT {
            self.wire.extend((self.make)(WIRE_BLOCK, WIRE_BYTES)?.take_all());
        }
        Ok(std::array::from_fn(|_| self.wire.pop().expect("made above")))
    }

    /// A connection has ended.
    pub fn give_back_wires(&mut self, wires: impl IntoIterator<Item = Buf>) {
        self.wire.extend(wires);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_holds_much_leaves_some_to_others() {
        let mut pool = Pool::new(Arena::new).expect("memory");
        let mut first = Vec::new();
        while let Some(buf) = pool.take(Class::Large, first.len()) {
            first.push(buf);
        }
        assert_eq!(first.len(), LARGE_COUNT as usize / 2);
        let mut second = Vec::new();
        while let Some(buf) = pool.take(Class::Large, second.len()) {
            second.push(buf);
        }
        assert_eq!(second.len(), LARGE_COUNT as usize / 4);
        assert!(pool.take(Class::Large, 0).is_some(), "a third finds some");
        assert!(pool.take(Class::Small, 0).is_some(), "classes are apart");
        assert!(!pool.is_short(), "two are not too many");
        let mut others = Vec::new();
        while !pool.is_short() {
            others.push(pool.take(Class::Large, 0).expect("one is free"));
        }
        assert_eq!(pool.large.len(), Pool::share(Class::Large));
        pool.give_back(Class::Large, others.pop().expect("some were taken"));
        assert!(!pool.is_short());
    }
}
