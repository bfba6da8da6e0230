//! Accepting on sockets that others have, too, without ever being stuck in one.
//!
//! Whether `accept` waits is a property of the socket that its owner shares and can change at any instant, and whoever else accepts on
//! it can take away the client that was announced. Both is set right before each call; for the moment between, somebody watches: an
//! `accept` that takes longer than [`limits::ACCEPT_STUCK`] is ended by shutting the socket down, which its owner asked for.
//!
//! Why not a thread for each listening socket: it would have to be ended in the same way. The watcher sleeps while nobody accepts.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::io::Errno;
use rustix::net::{Shutdown, SocketFlags};

use crate::error::{Error, Result};
use crate::limits;

/// Whoever watches.
pub(super) struct Watch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// The call that goes on just now: which one it is, and on what.
    call: Option<(u64, Arc<OwnedFd>)>,
    calls: u64,
    /// The watcher looks again soon by itself.
    awake: bool,
    leaving: bool,
}

impl Watch {
    /// Start to watch.
    ///
    /// # Errors
    /// Out of threads.
    pub(super) fn start() -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let watcher = shared.clone();
        let thread = std::thread::Builder::new()
            .name("nbd-watch".to_owned())
            .spawn(move || watcher.run())
            .map_err(|error| Error::io("cannot start the thread that watches over accepting", error))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// The next client, whose socket does not block, and its address if it has one.
    ///
    /// # Errors
    /// As `accept`; `INVAL` also when it was stuck.
    pub(super) fn accept(&self, socket: &Arc<OwnedFd>) -> Result<(OwnedFd, Option<SocketAddr>), Errno> {
        {
            let mut state = self.shared.state();
            state.calls += 1;
            state.call = Some((state.calls, socket.clone()));
            if !state.awake {
                state.awake = true;
                self.shared.changed.notify_one();
            }
        }
        let result = rustix::io::ioctl_fionbio(socket, true).and_then(|()| {
            rustix::net::acceptfrom_with(socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
        });
        self.shared.state().call = None;
        let (client, address) = result?;
        Ok((client, address.and_then(|address| address.try_into().ok())))
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut state = self.state();
        let mut seen = 0;
        while !state.leaving {
            if !state.awake {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let wait = self.changed.wait_timeout(state, limits::ACCEPT_STUCK);
            let timed_out;
            (state, timed_out) = wait.unwrap_or_else(PoisonError::into_inner);
            if !timed_out.timed_out() {
                continue;
            }
            match &state.call {
                Some((call, socket)) if *call == seen => {
                    tracing::warn!("a listening socket was made to block: it is shut down");
                    let _ = rustix::net::shutdown(socket, Shutdown::Both);
                }
                Some((call, _)) => seen = *call,
                None => state.awake = false,
            }
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.state().leaving = true;
        self.shared.changed.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn an_accept_that_is_made_to_block_ends() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("binds");
        let socket: Arc<OwnedFd> = Arc::new(listener.into());
        let watch = Watch::start().expect("starts");
        assert_eq!(watch.accept(&socket).map(drop), Err(Errno::AGAIN));
        // The owner, who does nothing else than to make it block.
        let (over, owners) = (Arc::new(AtomicBool::new(false)), socket.clone());
        let until = over.clone();
        let owner = std::thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                rustix::io::ioctl_fionbio(&owners, false).expect("set");
            }
        });
        let end = (0..10_000_000u32).find_map(|_| match watch.accept(&socket) {
            Err(Errno::AGAIN) => None,
            other => Some(other.map(drop)),
        });
        over.store(true, Ordering::Relaxed);
        owner.join().expect("ends");
        assert_eq!(end, Some(Err(Errno::INVAL)));
    }
}
