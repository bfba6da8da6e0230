//! One client that haggles: its socket, TLS where there is some, and what waits to be sent. Never blocks.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use rustls::ServerConfig;

use crate::export::nbd::haggle::{Agreed, Catalogue, Haggle, Security, Step};
use crate::export::nbd::tls::TlsStream;
use crate::limits;

/// A client between its arrival and its first request.
pub(super) struct Caller {
    socket: OwnedFd,
    haggle: Haggle,
    /// What TLS it gets when it asks for it.
    config: Option<Arc<ServerConfig>>,
    tls: Option<Box<TlsStream>>,
    /// Bytes to be sent, and how many of them are.
    out: Vec<u8>,
    sent: usize,
    /// What is next when they are.
    next: Step,
    /// Why it ends, if that is worth a word.
    fault: Option<rustls::Error>,
}

/// How far it is.
pub(super) enum Progress {
    /// It is its turn: until it is ready for this.
    Waits(EventFlags),
    /// It may send requests.
    Agreed(Agreed),
    /// It left, or it has to; with what was wrong with its TLS.
    Over(Option<rustls::Error>),
}

impl Caller {
    /// Somebody new; with `config`, TLS is demanded.
    pub(super) fn new(socket: OwnedFd, config: Option<Arc<ServerConfig>>) -> Self {
        let mut out = Vec::new();
        let security = if config.is_some() { Security::Demanded } else { Security::Plain };
        let haggle = Haggle::greet(security, &mut out);
        Self { socket, haggle, config, tls: None, out, sent: 0, next: Step::Wait, fault: None }
    }

    /// Socket and TLS, when it has agreed.
    pub(super) fn into_parts(self) -> (OwnedFd, Option<Box<TlsStream>>) {
        (self.socket, self.tls)
    }

    /// Go on without waiting, as far as it goes in one turn. Everything is sent before more is read, so nothing piles up.
    pub(super) fn drive(&mut self, catalogue: &dyn Catalogue, scratch: &mut [u8]) -> Progress {
        for _ in 0..limits::HAGGLE_STEPS_PER_TURN {
            match self.send() {
                Ok(true) => {}
                Ok(false) => return Progress::Waits(EventFlags::OUT),
                Err(_) => return Progress::Over(self.fault.take()),
            }
            match std::mem::replace(&mut self.next, Step::Close) {
                Step::Again => self.step(catalogue),
                Step::Wait => match rustix::net::recv(&self.socket, &mut *scratch, RecvFlags::DONTWAIT) {
                    Ok((_, 0)) => return Progress::Over(None),
                    Ok((_, bytes)) => self.take(&scratch[..bytes]),
                    Err(Errno::INTR) => self.next = Step::Wait,
                    Err(Errno::AGAIN) => {
                        self.next = Step::Wait;
                        return Progress::Waits(EventFlags::IN);
                    }
                    Err(_) => return Progress::Over(None),
                },
                Step::Tls(behind) => self.begin_tls(&behind),
                Step::Go(agreed) => return Progress::Agreed(agreed),
                Step::Close => match self.tls.take() {
                    // Once more around, with what is said at the end.
                    Some(mut tls) => tls.close(&mut self.out),
                    None => return Progress::Over(self.fault.take()),
                },
            }
        }
        // Others are next. Whatever comes next here, there is room to send something, so it gets its turn again.
        Progress::Waits(EventFlags::OUT)
    }

    fn step(&mut self, catalogue: &dyn Catalogue) {
        let Some(tls) = &mut self.tls else {
            self.next = self.haggle.step(catalogue, &mut self.out);
            return;
        };
        let mut said = Vec::new();
        self.next = self.haggle.step(catalogue, &mut said);
        tls.seal(&said, &mut self.out);
    }

    fn begin_tls(&mut self, behind: &[u8]) {
        let config = self.config.take().expect("TLS begins once, where it is demanded");
        match TlsStream::accept(config) {
            Ok(tls) => {
                self.tls = Some(Box::new(tls));
                self.haggle.secured();
                self.take(behind);
            }
            Err(error) => tracing::error!(error = error.chain(), "an export's client gets no TLS"),
        }
    }

    /// Bytes from the socket.
    fn take(&mut self, bytes: &[u8]) {
        let Some(tls) = &mut self.tls else {
            self.haggle.feed(bytes);
            self.next = Step::Again;
            return;
        };
        let mut plain = Vec::new();
        match tls.feed(bytes, &mut plain, &mut self.out) {
            Ok(()) if plain.is_empty() => self.next = Step::Wait,
            Ok(()) => {
                self.haggle.feed(&plain);
                self.next = Step::Again;
            }
            // What rustls said to that is in `out`.
            Err(error) => {
                self.fault = Some(error);
                self.tls = None;
                self.next = Step::Close;
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

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::export::nbd::shelf::Shelf;
    use crate::format::nbd::OPTION_MAGIC;

    #[test]
    fn who_has_much_to_say_gives_way_and_gets_its_turn_again() {
        let (mut client, server) = UnixStream::pair().expect("sockets");
        server.set_nonblocking(true).expect("set");
        let mut caller = Caller::new(server.into(), None);
        let mut said = 3_u32.to_be_bytes().to_vec();
        // LIST, of no exports.
        let option = [&OPTION_MAGIC.to_be_bytes()[..], &3_u32.to_be_bytes(), &0_u32.to_be_bytes()].concat();
        said.extend(option.repeat(100));
        client.write_all(&said).expect("sent");
        let (shelf, mut scratch, mut turns) = (Shelf::default(), vec![0; 4096], 1);
        loop {
            match caller.drive(&shelf, &mut scratch) {
                Progress::Waits(EventFlags::IN) => break,
                Progress::Waits(EventFlags::OUT) => turns += 1,
                Progress::Waits(_) | Progress::Agreed(_) | Progress::Over(_) => panic!("it goes on haggling"),
            }
        }
        assert!(turns > 100 / limits::HAGGLE_STEPS_PER_TURN, "{turns} turns");
    }
}
