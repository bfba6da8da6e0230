//! Closes what clients passed to us, on threads where it may take its time.
//!
//! `close` can block for as long as whoever made the file likes: a TCP socket with `SO_LINGER`, a file of a FUSE or network
//! filesystem. So the control thread never drops a descriptor it did not make: it hands it over here. That goes for client
//! sockets too, because with a socket go the descriptors still unread in it.
//!
//! One thread per user, so that a user's hanging files hang that user's closing alone. The queue has no bound of its own,
//! because a full one would block the control thread again; instead a user who is behind ([`Closer::is_behind`]) is not
//! served, and brings no more. All connections of a user that end together are not behind, only many: a
//! close must hang, or more be owed than a user can have connections.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crossbeam::channel::{Sender, unbounded};

use crate::limits;

/// All users' descriptors on their way out.
#[derive(Debug, Default)]
pub struct Closer {
    lanes: HashMap<u32, Lane>,
}

#[derive(Debug)]
struct Lane {
    queue: Sender<OwnedFd>,
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    owed: AtomicUsize,
    /// When the last close ended; with something owed, since when one hangs.
    moved: Mutex<Instant>,
}

impl State {
    fn owed(&self) -> usize {
        self.owed.load(Ordering::Acquire)
    }

    fn moved(&self) -> MutexGuard<'_, Instant> {
        self.moved.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Closer {
    /// Close these, which came from this user. Returns at once.
    pub fn close(&mut self, uid: u32, descriptors: impl IntoIterator<Item = OwnedFd>) {
        let mut descriptors = descriptors.into_iter().peekable();
        if descriptors.peek().is_none() {
            return;
        }
        if !self.lanes.contains_key(&uid) {
            // The threads of users who owe nothing end with their lanes.
            self.lanes.retain(|_, lane| lane.state.owed() > 0);
            if let Some(lane) = start() {
                self.lanes.insert(uid, lane);
            }
        }
        let Some(lane) = self.lanes.get(&uid) else {
            // No thread to be had, and descriptors may not pile up either: these are dropped here, as the lesser evil.
            return;
        };
        for descriptor in descriptors {
            if lane.state.owed.fetch_add(1, Ordering::AcqRel) == 0 {
                *lane.state.moved() = Instant::now();
            }
            // The thread ends only with this sender.
            let _ = lane.queue.send(descriptor);
        }
    }

    /// Does this user's closing hang, so that it should bring nothing more?
    #[must_use]
    pub fn is_behind(&self, uid: u32) -> bool {
        self.lanes.get(&uid).is_some_and(|lane| {
            let owed = lane.state.owed();
            owed > limits::CONNECTIONS_PER_USER_MAX
                || (owed > limits::UNCLOSED_PER_USER_MAX
                    && lane.state.moved().elapsed() > limits::CLOSE_PATIENCE)
        })
    }
}

fn start() -> Option<Lane> {
    let (queue, descriptors) = unbounded::<OwnedFd>();
    let state = Arc::new(State { owed: AtomicUsize::new(0), moved: Mutex::new(Instant::now()) });
    let shared = Arc::clone(&state);
    let work = move || {
        for descriptor in descriptors {
            drop(descriptor);
            *shared.moved() = Instant::now();
            shared.owed.fetch_sub(1, Ordering::AcqRel);
        }
    };
    match std::thread::Builder::new().name("closer".into()).spawn(work) {
        Ok(_) => Some(Lane { queue, state }),
        Err(error) => {
            tracing::warn!(%error, "cannot start a thread to close descriptors on");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    use super::*;

    /// A socket whose closing takes until the other end (returned) has read everything.
    pub(super) fn lingering() -> (OwnedFd, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let mut near = TcpStream::connect(listener.local_addr().expect("address")).expect("connected");
        let (far, _) = listener.accept().expect("accepted");
        near.set_nonblocking(true).expect("nonblocking");
        while near.write(&[0; 1 << 16]).is_ok() {}
        near.set_nonblocking(false).expect("blocking");
        let linger = Some(Duration::from_secs(600));
        rustix::net::sockopt::set_socket_linger(&near, linger).expect("lingers");
        (near.into(), far)
    }

    #[test]
    fn one_users_hanging_descriptor_delays_neither_the_caller_nor_another_user() {
        let mut closer = Closer::default();
        let (hanging, mut far) = lingering();
        closer.close(1, [hanging]);
        let (mut read, write) = std::io::pipe().expect("pipe");
        closer.close(2, [OwnedFd::from(write)]);
        assert_eq!(read.read(&mut [0; 1]).expect("closed"), 0);
        assert_eq!(closer.lanes[&1].state.owed(), 1, "it did not hang: the test proves nothing");
        for _ in 0..=limits::UNCLOSED_PER_USER_MAX {
            closer.close(1, [OwnedFd::from(std::fs::File::open("/dev/null").expect("opens"))]);
        }
        while !closer.is_behind(1) {
            std::thread::yield_now();
        }
        assert!(!closer.is_behind(2));
        std::io::copy(&mut far, &mut std::io::sink()).expect("read to the end");
        while closer.is_behind(1) {
            std::thread::yield_now();
        }
    }
}
