//! (interface; the implementation is being written beside this) The workers and the slots that move data.

pub use crate::backend::QueueChoice;
use crate::error::Error;

/// How many workers, and the memory each owns.
#[derive(Debug, Clone)]
pub struct PipelineConfig {
    /// CPUs to pin one worker to each; must lie in the allowed set. Never empty.
    pub cpus: Vec<u32>,
    /// Pin the workers?
    pub pin: bool,
    /// The queue.
    pub queue: QueueChoice,
    /// Bytes of one buffer, the largest chunk: a power of two, 64 KiB..=16 MiB.
    pub buffer_bytes: u32,
    /// Buffers of one worker, 4..=256.
    pub buffers_per_worker: u32,
}

/// A running set of workers. Dropping it drains and joins them.
pub struct Pipeline {}

impl Pipeline {
    /// Start the workers.
    ///
    /// # Errors
    /// No memory, no io_uring although it was demanded, or a CPU that may not be used.
    pub fn start(config: PipelineConfig) -> Result<Self, Error> {
        let _ = config;
        todo!()
    }

    /// The workers as they are.
    pub fn status(&self) -> Vec<proto::WorkerStatus> {
        todo!()
    }
}
