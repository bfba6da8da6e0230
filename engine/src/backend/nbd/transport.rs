//! The bytes of a connection, plain or under TLS. Never waits.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown};

use crate::backend::nbd::tls::{Means, Private};
use crate::error::Result as Outcome;

/// A connected stream socket, and what is on it.
pub enum Transport {
    /// The protocol itself.
    Plain(Arc<OwnedFd>),
    /// Under TLS.
    Private(Private),
}

impl Transport {
    /// For polls.
    #[must_use]
    pub fn socket(&self) -> &Arc<OwnedFd> {
        match self {
            Self::Plain(socket) => socket,
            Self::Private(private) => private.socket(),
        }
    }

    /// The same socket, under TLS from here on.
    ///
    /// # Errors
    /// It cannot be set up.
    pub fn under_tls(&self, means: &Means) -> Outcome<Self> {
        Private::new(Arc::clone(self.socket()), means).map(Self::Private)
    }

    /// Send what can be sent now; fewer bytes than given, where the other side does not take more. `None`: nothing now.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn send(&mut self, slices: &[IoSlice<'_>]) -> Result<Option<usize>, std::io::Error> {
        match self {
            Self::Private(private) => private.send(slices),
            Self::Plain(socket) => {
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                loop {
                    let sent =
                        rustix::net::sendmsg(&**socket, slices, &mut SendAncillaryBuffer::default(), flags);
                    match sent {
                        Err(Errno::INTR) => {}
                        Err(Errno::AGAIN) => return Ok(None),
                        other => return other.map(Some).map_err(Into::into),
                    }
                }
            }
        }
    }

    /// Take what has arrived; without `more`, only what was taken from the socket before. `Some(0)`: the other side has ended the
    /// connection; `None`: nothing now.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn receive(
        &mut self,
        slices: &mut [IoSliceMut<'_>],
        more: bool,
    ) -> Result<Option<usize>, std::io::Error> {
        match self {
            Self::Private(private) => private.receive(slices, more),
            Self::Plain(_) if !more => Ok(None),
            Self::Plain(socket) => loop {
                let mut control = RecvAncillaryBuffer::default();
                match rustix::net::recvmsg(
                    &**socket,
                    slices,
                    &mut control,
                    RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC,
                ) {
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => return Ok(None),
                    other => return other.map(|message| Some(message.bytes)).map_err(Into::into),
                }
            },
        }
    }

    /// Are there bytes accepted earlier that the socket did not take yet?
    #[must_use]
    pub fn has_unsent(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Private(private) => private.has_unsent(),
        }
    }

    /// May there be bytes that arrived and that a poll of the socket says nothing of?
    #[must_use]
    pub fn may_hold_more(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Private(_) => true,
        }
    }

    /// End it, both ways.
    pub fn close(&mut self) {
        if let Self::Private(private) = self {
            private.close();
        }
        let _ = rustix::net::shutdown(&**self.socket(), Shutdown::Both);
    }
}
