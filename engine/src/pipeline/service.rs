//! What a worker does besides transfers: foreign requests, as they come (exports).
//!
//! A [`Service`] lives on one worker and shares its queue: it attaches sockets and devices of its own, and its operations come back
//! to it. It brings its own buffers and keeps to its own share of the queue ([`OPERATIONS`]), so it never starves transfers, nor
//! they it: each turn of the worker's loop begins with the service, and bulk chunks fill the gaps.
//!
//! This module refuses to know what is served, and to whom.

use std::time::Instant;

use crate::backend::{Done, Queue};

/// Operations a service may have in flight on its worker's queue.
pub const OPERATIONS: u32 = 1024;

/// Set in the token of every operation of a service; the other bits are its own.
pub const TOKEN_BIT: u64 = 1 << 63;

/// A source of foreign requests on one worker.
pub trait Service: Send {
    /// The beginning of a turn: news from other threads, what waited. Returns when to look again at the latest.
    fn turn(&mut self, queue: &mut dyn Queue) -> Option<Instant>;

    /// One of its operations has come back ([`TOKEN_BIT`] set, as it was pushed). May push more, never wait.
    fn complete(&mut self, done: Done, queue: &mut dyn Queue);

    /// Nothing of it is in flight or attached: the worker may leave.
    fn is_idle(&self) -> bool;

    /// The worker is about to leave: end everything soon.
    fn leave(&mut self, queue: &mut dyn Queue);
}
