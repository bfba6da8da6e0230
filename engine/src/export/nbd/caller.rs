//! One client that haggles: its socket, and what waits to be sent on it. Never blocks.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use crate::export::nbd::haggle::{Agreed, Catalogue, Haggle, Security, Step};

/// A client between its arrival and its first request.
pub(super) struct Caller {
    socket: OwnedFd,
    haggle: Haggle,
    /// Bytes to be sent, and how many of them are.
    out: Vec<u8>,
    sent: usize,
    /// What is next when they are.
    next: Step,
}

/// How far it is.
pub(super) enum Progress {
    /// It is its turn: until it is ready for this.
    Waits(EventFlags),
    /// It may send requests.
    Agreed(Agreed),
    /// It left, or it has to.
    Over,
}

impl Caller {
    /// Somebody new.
    pub(super) fn new(socket: OwnedFd, security: Security) -> Self {
        let mut out = Vec::new();
        let haggle = Haggle::greet(security, &mut out);
        Self { socket, haggle, out, sent: 0, next: Step::Wait }
    }

    /// The socket, when it has agreed.
    pub(super) fn into_socket(self) -> OwnedFd {
        self.socket
    }

    /// Go on as far as it goes without waiting. Everything is sent before more is read, so nothing piles up.
    pub(super) fn drive(&mut self, catalogue: &dyn Catalogue, scratch: &mut [u8]) -> Progress {
        loop {
            match self.send() {
                Ok(true) => {}
                Ok(false) => return Progress::Waits(EventFlags::OUT),
                Err(_) => return Progress::Over,
            }
            match std::mem::replace(&mut self.next, Step::Close) {
                Step::Again => self.next = self.haggle.step(catalogue, &mut self.out),
                Step::Wait => match rustix::net::recv(&self.socket, &mut *scratch, RecvFlags::DONTWAIT) {
                    Ok((_, 0)) => return Progress::Over,
                    Ok((_, bytes)) => {
                        self.haggle.feed(&scratch[..bytes]);
                        self.next = Step::Again;
                    }
                    Err(Errno::INTR) => self.next = Step::Wait,
                    Err(Errno::AGAIN) => {
                        self.next = Step::Wait;
                        return Progress::Waits(EventFlags::IN);
                    }
                    Err(_) => return Progress::Over,
                },
                Step::Go(agreed) => return Progress::Agreed(agreed),
                Step::Tls(_) | Step::Close => return Progress::Over,
            }
        }
    }

    /// Is everything sent?
    fn send(&mut self) -> Result<bool, Errno> {
        while self.sent < self.out.len() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::send(&self.socket, &self.out[self.sent..], flags) {
                Ok(bytes) => self.sent += bytes,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        self.out.clear();
        self.sent = 0;
        Ok(true)
    }
}

impl AsFd for Caller {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
