//! The control side of a stream: what is read or written in order before workers move the rest.
//!
//! Headers travel in front of the data, so the job's own thread takes them off the pipe, or puts them on it, and can be
//! told to give up while the other end is silent.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::backend::device::Device;
use crate::error::{Error, ErrorKind, Result};

/// How often a waiting transfer looks whether to give up, nanoseconds.
const POLL_NS: i64 = 200_000_000;

/// A pipe that polls as writable takes this many bytes without blocking (`PIPE_BUF` on Linux).
const PIPE_BUF: usize = 4096;

/// Why a transfer in order ended early without an error of the device.
fn gave_up() -> Error {
    Error::new(ErrorKind::Cancelled, "cancelled")
}

impl Device {
    /// Wait until the stream is ready; `Ok(false)`: not yet, ask whether to give up.
    fn ready(&self, wanted: PollFlags) -> Result<bool> {
        let wait = Timespec { tv_sec: 0, tv_nsec: POLL_NS };
        let mut fds = [PollFd::new(self.file(), wanted)];
        match poll(&mut fds, Some(&wait)) {
            Ok(0) | Err(Errno::INTR) => Ok(false),
            Ok(_) => Ok(true),
            Err(errno) => Err(Error::io("cannot wait for the stream", errno).at(self.name())),
        }
    }

    /// Fill `into` from a stream, as far as it goes: returns how many bytes there were, fewer only at its end.
    ///
    /// # Errors
    /// Reading failed; `Cancelled` when `give_up` said so.
    pub fn read_in_order(&self, into: &mut [u8], give_up: &dyn Fn() -> bool) -> Result<usize> {
        let mut filled = 0;
        while filled < into.len() {
            if give_up() {
                return Err(gave_up());
            }
            if !self.ready(PollFlags::IN)? {
                continue;
            }
            match rustix::io::read(self.file(), &mut into[filled..]) {
                Ok(0) => break,
                Ok(bytes) => filled += bytes,
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(errno) => return Err(Error::io("read failed", errno).at(self.name())),
            }
        }
        Ok(filled)
    }

    /// Does a stream hold another byte? Waits for one, or for its end, until `give_up` says so. Takes the byte.
    ///
    /// # Errors
    /// Reading failed.
    pub fn has_more(&self, give_up: &dyn Fn() -> bool) -> Result<bool> {
        match self.read_in_order(&mut [0; 1], give_up) {
            Ok(bytes) => Ok(bytes > 0),
            Err(error) if error.kind() == ErrorKind::Cancelled => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Put all of `bytes` on a stream.
    ///
    /// # Errors
    /// Writing failed, the reader has gone; `Cancelled` when `give_up` said so.
    pub fn write_in_order(&self, mut bytes: &[u8], give_up: &dyn Fn() -> bool) -> Result<()> {
        while !bytes.is_empty() {
            if give_up() {
                return Err(gave_up());
            }
            if !self.ready(PollFlags::OUT)? {
                continue;
            }
            match rustix::io::write(self.file(), &bytes[..bytes.len().min(PIPE_BUF)]) {
                Ok(written) => bytes = &bytes[written..],
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(Errno::PIPE) => {
                    let what = "write failed: the reader has closed the pipe";
                    return Err(Error::new(ErrorKind::Io, what).at(self.name()));
                }
                Err(errno) => return Err(Error::io("write failed", errno).at(self.name())),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::OwnedFd;

    use super::*;
    use crate::backend::device::Purpose;

    fn ends() -> (Device, Device) {
        let (read, write) = rustix::pipe::pipe().expect("pipe");
        let device = |fd: OwnedFd, read| {
            Device::from_fd(fd, "-", Purpose { read, write: !read, stream: true }).expect("a stream")
        };
        (device(read, true), device(write, false))
    }

    #[test]
    fn more_than_a_pipe_holds_goes_through_in_order() {
        let (source, sink) = ends();
        let sent: Vec<u8> = (0..300_000_u32).map(|n| n.to_le_bytes()[1]).collect();
        let copy = sent.clone();
        let writer = std::thread::spawn(move || sink.write_in_order(&copy, &|| false));
        let mut got = vec![0; sent.len() + 10];
        let bytes = source.read_in_order(&mut got, &|| false).expect("read");
        writer.join().expect("writer").expect("written");
        assert_eq!(got[..bytes], sent);
    }

    #[test]
    fn a_silent_end_is_not_waited_for_when_told_to_give_up() {
        let (source, sink) = ends();
        let error = source.read_in_order(&mut [0; 1], &|| true).expect_err("cancelled");
        assert_eq!(error.kind(), ErrorKind::Cancelled);
        assert!(!source.has_more(&|| true).expect("no error"));
        assert!(sink.write_in_order(b"x", &|| true).is_err());
    }

    #[test]
    fn a_reader_that_has_gone_is_named() {
        let (source, sink) = ends();
        drop(source);
        let error = sink.write_in_order(b"x", &|| false).expect_err("no reader");
        assert!(error.chain().contains("the reader has closed the pipe"));
    }

    #[test]
    fn nothing_is_taken_beyond_what_is_asked_for() {
        let (source, sink) = ends();
        sink.write_in_order(b"headerdata", &|| false).expect("written");
        drop(sink);
        assert_eq!(source.read_in_order(&mut [0; 6], &|| false).expect("read"), 6);
        let mut rest = String::new();
        std::fs::File::from(source.file().try_clone().expect("descriptor"))
            .read_to_string(&mut rest)
            .expect("rest");
        assert_eq!(rest, "data");
    }
}
