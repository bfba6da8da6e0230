//! Driving a transfer step by step: the workers' threads, or (simulated) the same worker loop on the caller's own thread.

use std::time::Duration;

use crate::pipeline::rewrite::News;

/// What there is.
#[derive(Debug)]
pub enum Turn {
    /// News of a chunk.
    News(News),
    /// Nothing within the time; simulated: nothing is in flight and nothing can be claimed.
    Idle,
    /// All workers have left the transfer.
    Ended,
}

/// Carries one transfer.
pub trait Carrier {
    /// Wait for the next news, at most so long.
    fn next(&mut self, wait: Duration) -> Turn;

    /// Barriers or gate have moved: let the workers look.
    fn wake(&mut self);
}
