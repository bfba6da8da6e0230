//! A socket to a server. Whoever sends takes in what comes meanwhile: a client that insisted on being heard first would wait for ever
//! on a server that does so too.

use std::io::{Error, ErrorKind, Read, Result, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::PATIENCE;

/// See the module.
pub struct Wire {
    stream: UnixStream,
    /// What came, and how much of it was taken.
    came: Vec<u8>,
    taken: usize,
}

impl Wire {
    /// Connected.
    ///
    /// # Errors
    /// As the socket's.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_nonblocking(true)?;
        Ok(Self { stream, came: Vec::new(), taken: 0 })
    }

    /// The socket, which does not block.
    #[must_use]
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    fn ready(&self, flags: PollFlags) -> Result<PollFlags> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut fds = [PollFd::from_borrowed_fd(self.stream.as_fd(), flags)];
            let second = Timespec { tv_sec: 1, tv_nsec: 0 };
            match poll(&mut fds, Some(&second)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return Ok(fds[0].revents()),
                Err(error) => return Err(error.into()),
            }
            if Instant::now() >= deadline {
                return Err(Error::new(ErrorKind::TimedOut, "the server does nothing"));
            }
        }
    }

    /// Take in what is there. At the end of the stream: an error.
    fn fill(&mut self) -> Result<()> {
        if self.taken == self.came.len() {
            self.came.clear();
            self.taken = 0;
        }
        let len = self.came.len();
        self.came.resize(len + (64 << 10), 0);
        let read = (&self.stream).read(&mut self.came[len..]);
        self.came.truncate(len + read.as_ref().copied().unwrap_or(0));
        match read {
            Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
            Ok(_) => Ok(()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Send all of it.
    ///
    /// # Errors
    /// As the socket's; `TimedOut`: the server takes nothing and says nothing.
    pub fn send(&mut self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            match (&self.stream).write(bytes) {
                Ok(sent) => bytes = &bytes[sent..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if self.ready(PollFlags::IN | PollFlags::OUT)?.contains(PollFlags::IN) {
                        self.fill()?;
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Take exactly so many bytes.
    ///
    /// # Errors
    /// As the socket's; `UnexpectedEof`, `TimedOut`.
    pub fn take(&mut self, into: &mut [u8]) -> Result<()> {
        while self.came.len() - self.taken < into.len() {
            self.ready(PollFlags::IN)?;
            self.fill()?;
        }
        into.copy_from_slice(&self.came[self.taken..self.taken + into.len()]);
        self.taken += into.len();
        Ok(())
    }

    /// Wait until the server hangs up; it says nothing more.
    ///
    /// # Panics
    /// If it says something, or does not.
    pub fn ends(&mut self) {
        let mut byte = [0];
        match self.take(&mut byte) {
            Ok(()) => panic!("not the end, but {:#x}", byte[0]),
            Err(error) => assert!(error.kind() != ErrorKind::TimedOut, "the server does not hang up"),
        }
    }
}
