//! An export on one worker: its device on the worker's queue, who waits for a flush, and where the time goes.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::backend::Port;
use crate::export::exported::Exported;
use crate::telemetry::record::{Counters, StageRecord};

/// Smallest piece of a volume that is read or written: no data unit is larger, and no page is smaller.
pub const BLOCK_MIN: u32 = 4096;

/// Largest: two of them fit the smallest buffer.
pub const BLOCK_MAX: u32 = 16 << 10;

/// See the module.
pub struct Served {
    /// The export.
    pub export: Arc<Exported>,
    /// Its device on the queue.
    pub port: Port,
    /// Everything on the device is in whole blocks of so many bytes, but for the end of the volume.
    pub block: u64,
    /// Its connections on this worker.
    pub connections: u32,
    /// Pieces that may not touch their extent yet, as they came.
    pub waiting: VecDeque<usize>,
    /// Requests that wait for a flush that has not begun, with their tickets: see `Durability::ticket`.
    pub flush_next: Vec<(u64, usize)>,
    /// Requests that the flush under way will serve.
    pub flush_running: Vec<usize>,
    /// One is under way here.
    pub flushing: bool,
    /// When it began.
    pub flush_since: std::time::Instant,
    /// Where the time goes.
    pub record: StageRecord,
    /// For the record.
    pub counters: Counters,
    /// Of the queue when the export came here.
    pub syscalls_before: u64,
}

impl Served {
    /// The block of an export; `None`: its device has larger ones than are served.
    #[must_use]
    pub fn block_of(export: &Exported) -> Option<u32> {
        let block = export.align.max(BLOCK_MIN);
        (block.is_power_of_two() && block <= BLOCK_MAX).then_some(block)
    }

    /// An export whose device is attached.
    #[must_use]
    pub fn new(export: Arc<Exported>, port: Port, syscalls_before: u64) -> Self {
        let block = Self::block_of(&export).expect("looked at when the connection was handed over");
        Self {
            export,
            port,
            block: block.into(),
            connections: 0,
            waiting: VecDeque::with_capacity(64),
            flush_next: Vec::with_capacity(64),
            flush_running: Vec::with_capacity(64),
            flushing: false,
            flush_since: std::time::Instant::now(),
            record: StageRecord::default(),
            counters: Counters::default(),
            syscalls_before,
        }
    }
}
