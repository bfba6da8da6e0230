//! How far the answers to a client on this machine may run ahead of it.
//!
//! Client, server and device take turns by nature: all replies of a batch go out together, the client asks again for all of them
//! together, and meanwhile the device rests. Where the scheduler keeps client and worker on one core (it does when a virtual machine's
//! other cores sleep) they do so for ever, in convoys of the whole depth. What breaks the convoy is a socket that takes a part of the
//! replies and then makes the worker wait for the client: the requests that follow the first part are with the device while the client
//! is busy with the next.
//!
//! So the socket's send buffer is kept at a share of what the client waits for. Measured with fio's nbd engine on two cores, at 4 KiB × 8
//! to 1 MiB × 16: 4 KiB × 32 gets half as much again (46 to 68 thousand per second), 4 KiB × 128 and 16 KiB × 32 a fifth, larger ones
//! lose nothing. A share far smaller costs a wake-up for each reply, one far larger does nothing.
//!
//! Only for sockets of this machine: on a network the buffer has to hold what the network does.

use std::time::Duration;

use crate::export::nbd::hub::SOCKET_BYTES;

/// Its part of the bytes that are read for the client. The kernel doubles it, for what it needs besides.
const SHARE: u64 = 8;

/// Least: some replies' worth; less costs a wake-up each.
const LEAST: u64 = 16 << 10;

/// Most: what a socket begins with.
const MOST: u64 = SOCKET_BYTES as u64;

/// So many receives are looked at before the buffer shrinks: a client's pause is no smaller depth.
const WINDOW: u32 = 64;

/// A send that takes so long waits for a client that does something else. One that sends on before it reads, and is waited for by the
/// server as well, would never read: it gets all the room there is.
pub const STALL: Duration = Duration::from_millis(10);

/// Follows the bytes that a client waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// What the socket was told last.
    size: u64,
    /// Most bytes that were waited for in this window.
    peak: u64,
    seen: u32,
}

impl Pace {
    /// For a socket whose send buffer is of the largest size.
    #[must_use]
    pub fn new() -> Self {
        Self { size: MOST, peak: 0, seen: 0 }
    }

    /// A send waits for the client, see [`STALL`]. Returns the new size of the send buffer, if it can grow.
    pub fn give_room(&mut self) -> Option<usize> {
        let grows = self.is_narrow();
        *self = Self::new();
        grows.then_some(SOCKET_BYTES)
    }

    /// The buffer could be larger.
    #[must_use]
    pub fn is_narrow(&self) -> bool {
        self.size < MOST
    }

    /// The client waits for so many bytes, just when more is asked for. Returns the new size of the send buffer, if it is time for one.
    pub fn see(&mut self, waiting: u64) -> Option<usize> {
        self.peak = self.peak.max(waiting);
        self.seen += 1;
        let want = (self.peak / SHARE).clamp(LEAST, MOST);
        // Growing hurts nobody; shrinking is for those who keep asking for less.
        let grows = want > self.size + self.size / 2;
        if !grows && self.seen < WINDOW {
            return None;
        }
        (self.seen, self.peak) = (0, 0);
        let shrinks = want < self.size - self.size / 4;
        (grows || shrinks).then(|| {
            self.size = want;
            usize::try_from(want).expect("a few MiB")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_buffer_shrinks_after_a_window_of_small_requests_and_grows_at_once() {
        let mut pace = Pace::new();
        for _ in 1..WINDOW {
            assert_eq!(pace.see(256 << 10), None);
        }
        assert_eq!(pace.see(96 << 10), Some(32 << 10), "the peak of the window counts");
        assert_eq!(pace.see(32 << 20), Some(4 << 20));
    }

    #[test]
    fn little_changes_are_not_followed() {
        let mut pace = Pace { size: 32 << 10, ..Pace::new() };
        for _ in 0..10 * WINDOW {
            assert_eq!(pace.see(200 << 10), None);
            assert_eq!(pace.see(380 << 10), None);
        }
    }

    #[test]
    fn a_client_that_does_not_read_gets_all_room_and_has_to_earn_less() {
        let mut pace = Pace { size: 16 << 10, ..Pace::new() };
        assert!(pace.is_narrow());
        assert_eq!(pace.give_room(), Some(SOCKET_BYTES));
        assert_eq!(pace.give_room(), None);
        assert!((1..WINDOW).all(|_| pace.see(4096).is_none()));
        assert_eq!(pace.see(4096), Some(16 << 10));
    }

    #[test]
    fn a_client_that_only_writes_keeps_the_least() {
        let mut pace = Pace::new();
        let sizes: Vec<_> = (0..10 * WINDOW).filter_map(|_| pace.see(0)).collect();
        assert_eq!(sizes, [16 << 10]);
    }
}
