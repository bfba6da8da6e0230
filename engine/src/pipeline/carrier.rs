//! Driving a transfer step by step: the workers' threads, or (simulated) the same worker loop on the caller's own thread.

use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::{Receiver, select_biased};

use crate::error::Result;
use crate::pipeline::Pipeline;
use crate::pipeline::rewrite::News;
use crate::pipeline::transfer::Transfer;
use crate::sys::buffer::{Arena, BUFFER_ALIGN_BYTES, Buf};

/// What there is.
#[derive(Debug)]
pub enum Turn {
    /// News of a chunk.
    News(News),
    /// Nothing within the time; simulated: nothing is in flight and nothing can be claimed.
    Idle,
    /// All workers have left the transfer, and there is no more news.
    Ended,
}

/// Carries one transfer.
pub trait Carrier {
    /// Wait for the next news, at most so long.
    fn next(&mut self, wait: Duration) -> Turn;

    /// Barriers or gate have moved: let the workers look.
    fn wake(&mut self);
}

/// The buffers one worker gets for a transfer that brings its own; wiped when the last of them is dropped.
pub(super) fn own_buffers(transfer: &Transfer, count: u32) -> Result<Vec<Buf>> {
    Ok(Arena::new(count, chunk_bytes(transfer))?.take_all())
}

fn chunk_bytes(transfer: &Transfer) -> u32 {
    let chunk = u32::try_from(transfer.plan.chunk_bytes()).expect("a chunk fits a buffer");
    chunk.next_multiple_of(BUFFER_ALIGN_BYTES)
}

/// A transfer on the pipeline's threads. Dropping it does not end the transfer.
pub struct Carried<'a> {
    pipeline: &'a Pipeline,
    transfer: Arc<Transfer>,
    news: Receiver<News>,
    ended: bool,
}

impl<'a> Carried<'a> {
    pub(super) fn new(pipeline: &'a Pipeline, transfer: Arc<Transfer>, news: Receiver<News>) -> Self {
        Self { pipeline, transfer, news, ended: false }
    }
}

impl Carrier for Carried<'_> {
    fn next(&mut self, wait: Duration) -> Turn {
        if !self.ended {
            select_biased! {
                recv(self.news) -> news => return news.map_or(Turn::Ended, Turn::News),
                recv(self.transfer.ended) -> _ => self.ended = true,
                default(wait) => return Turn::Idle,
            }
        }
        // What the last worker told before it left.
        self.news.try_recv().map_or(Turn::Ended, Turn::News)
    }

    fn wake(&mut self) {
        self.pipeline.wake();
    }
}

#[cfg(feature = "sim")]
pub use inline::Inline;

#[cfg(feature = "sim")]
mod inline {
    use super::{Arc, Arena, Carrier, Duration, News, Receiver, Result, Transfer, Turn, chunk_bytes};
    use crate::backend::sim::World;
    use crate::pipeline::worker::{Command, Worker};

    /// Operations in flight at most: half of them reads, half writes.
    const OPERATIONS: u32 = 16;

    /// The worker loop on the caller's own thread, over the disks of a simulated world: no thread, no real time, and so one
    /// history for each seed. Between two calls nothing moves.
    pub struct Inline {
        worker: Worker,
        transfer: Arc<Transfer>,
        news: Receiver<News>,
        ended: bool,
    }

    impl Inline {
        /// As [`crate::pipeline::Pipeline::carry`], by one worker.
        ///
        /// # Errors
        /// No memory.
        ///
        /// # Panics
        /// If the transfer was not made for a worker at least.
        pub fn new(
            world: &World,
            transfer: &Arc<Transfer>,
            news: Receiver<News>,
            buffers: u32,
        ) -> Result<Self> {
            assert!(!transfer.counters.is_empty(), "a transfer counts for each worker");
            let own = Arena::simulated(buffers, chunk_bytes(transfer))?.take_all();
            let (commands, inbox) = crossbeam::channel::bounded(1);
            transfer.begin(1);
            commands.send(Command::Start(transfer.clone(), own)).expect("the inbox is at hand and empty");
            let worker = Worker::new(0, world.bare_queue(OPERATIONS), Vec::new(), OPERATIONS, inbox);
            Ok(Self { worker, transfer: transfer.clone(), news, ended: false })
        }
    }

    impl Carrier for Inline {
        fn next(&mut self, _: Duration) -> Turn {
            loop {
                if let Ok(news) = self.news.try_recv() {
                    return Turn::News(news);
                }
                if self.ended {
                    return Turn::Ended;
                }
                let deadline = self.worker.start_turn().expect("a simulated queue does not break");
                self.ended = self.transfer.ended.try_recv().is_ok();
                if self.ended {
                    continue;
                }
                if self.worker.in_flight() == 0 {
                    return Turn::Idle;
                }
                self.worker.end_turn(deadline.flatten()).expect("a simulated queue does not break");
            }
        }

        fn wake(&mut self) {}
    }
}
