//! One operation at a time over a [`Queue`]: for headers and journals, whose order of writes is their safety.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::backend::Queue;
use crate::error::Result;
use crate::sys::buffer::Buf;

/// A file or device read and written in order, each call complete when it returns.
pub struct Blocking {
    _queue: Box<dyn Queue>,
    _buf: Option<Buf>,
    name: String,
}

impl Blocking {
    /// Over the queue of this machine (`queue`: io_uring or threads) for a file opened by a caller. Direct I/O on the descriptor is respected:
    /// transfers are widened to `align` (read-modify-write where need be); 1: buffered.
    ///
    /// # Errors
    /// No queue or buffer can be had.
    pub fn open(file: Arc<OwnedFd>, name: &str, align: u32) -> Result<Self> {
        unimplemented!("{file:?} {name} {align}")
    }

    /// Over a given queue (the simulated disk), with a buffer of that queue's arena.
    ///
    /// # Errors
    /// The file cannot be attached.
    pub fn over(queue: Box<dyn Queue>, buf: Buf, file: Arc<OwnedFd>, name: &str, align: u32) -> Result<Self> {
        unimplemented!("{} {} {file:?} {name} {align}", queue.in_flight(), buf.len())
    }

    /// What the user calls it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Fill `into` from `offset`.
    ///
    /// # Errors
    /// `Invalid` when it ends before; else the I/O error with name and extent.
    pub fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<()> {
        unimplemented!("{offset} {}", into.len())
    }

    /// Write all of `bytes` at `offset`.
    ///
    /// # Errors
    /// The I/O error with name and extent.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        unimplemented!("{offset} {}", bytes.len())
    }

    /// Make everything written durable.
    ///
    /// # Errors
    /// The I/O error with name. Nothing may be assumed about earlier writes then.
    pub fn flush(&mut self) -> Result<()> {
        unimplemented!()
    }
}
