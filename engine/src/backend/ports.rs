//! The files attached to a queue, by port: one table for every queue.

use crate::backend::Port;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::ring::FILES_MAX;

/// What a queue keeps of each attached file.
#[derive(Debug)]
pub(super) struct Ports<T>(Vec<Option<T>>);

impl<T> Ports<T> {
    /// None attached.
    pub(super) fn new() -> Self {
        Self(Vec::new())
    }

    /// The lowest port that is free.
    ///
    /// # Errors
    /// `Limit`: as many files are attached as a queue may have.
    pub(super) fn free(&self) -> Result<Port> {
        let free = self.0.iter().position(Option::is_none).unwrap_or(self.0.len());
        match u32::try_from(free) {
            Ok(index) if index < FILES_MAX => Ok(Port(index)),
            _ => Err(Error::new(ErrorKind::Limit, format!("more than {FILES_MAX} files on one queue"))),
        }
    }

    /// Take a port that [`Ports::free`] gave.
    pub(super) fn attach(&mut self, port: Port, attached: T) {
        match self.0.get_mut(port.0 as usize) {
            Some(place) => *place = Some(attached),
            None => self.0.push(Some(attached)),
        }
    }

    /// Give a port back.
    ///
    /// # Panics
    /// If it is not attached.
    pub(super) fn detach(&mut self, port: Port) -> T {
        self.0.get_mut(port.0 as usize).and_then(Option::take).expect("only attached ports are detached")
    }

    /// What is attached here, if anything is.
    pub(super) fn get(&self, port: Port) -> Option<&T> {
        self.0.get(port.0 as usize).and_then(Option::as_ref)
    }

    /// The same, to be changed.
    pub(super) fn get_mut(&mut self, port: Port) -> Option<&mut T> {
        self.0.get_mut(port.0 as usize).and_then(Option::as_mut)
    }

    /// Everything attached, by its port.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Port, &T)> {
        (0..).zip(&self.0).filter_map(|(index, attached)| Some((Port(index), attached.as_ref()?)))
    }
}
