//! Connecting again after a connection broke: on a thread of its own, for as long as the caller allows.
//!
//! The daemon connects only where [`Address`] was left in the request, which is for callers whose rights it has anyway. The export must be
//! what it was: another size, other abilities, and the volume is given up. What was not answered is then asked again.
//!
//! A server that can be connected to and dies of what it is asked again, or says nothing to it, has not come back: the time allowed, of which
//! its silence is a part, and the waits between attempts go on from where they were ([`Trouble`]), until a reply has arrived.
//!
//! ## Writes that are asked again
//! A server may have taken a write, be alive, and carry it out after its answer to the second copy (a connection may break in the
//! middle of the network, and the server learn of it late). It is the same bytes for the same place, so that does no harm until
//! something else is written there, which the late copy would undo. So the places of writes that were under way when a connection broke are
//! remembered, and what would change them afterwards is refused. Copies write every place once and go on.

use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use proto::remote::Address;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::backend::nbd::connect::{self, Facts};
use crate::backend::nbd::connection::{Connection, Shared};
use crate::backend::nbd::transport::Transport;
use crate::error::{Error, ErrorKind, Result};

/// Before the second attempt; doubles with each.
const FIRST_WAIT: Duration = Duration::from_millis(100);
/// Between attempts at most.
const LONGEST_WAIT: Duration = Duration::from_secs(1);
/// For one attempt, connecting and haggling.
const ATTEMPT: Duration = Duration::from_secs(10);

/// What is left of the time allowed.
#[derive(Debug, Clone, Copy)]
pub struct Trouble {
    /// For trying. The time that connections were up counts as far as something was asked over them, and not answered.
    left: Duration,
    /// Before the next attempt.
    wait: Duration,
}

impl Trouble {
    /// That just began.
    #[must_use]
    pub fn new(within: Duration) -> Self {
        Self { left: within, wait: Duration::ZERO }
    }

    /// A connection was up again, and this long nothing was answered over it.
    #[must_use]
    pub fn after(self, silence: Duration) -> Self {
        Self { left: self.left.saturating_sub(silence), ..self }
    }
}

/// How to connect again.
#[derive(Debug, Clone)]
pub struct Again {
    /// Where to.
    pub address: Address,
    /// For how long to try.
    pub within: Duration,
}

/// Begin; [`Connection::resume`] or [`Connection::give_up`] is the end of it.
///
/// # Errors
/// No thread can be started.
pub fn start(
    connection: &Arc<Connection>,
    shared: Arc<Shared>,
    (address, trouble): (Address, Trouble),
    why: String,
) -> Result<()> {
    let connection = Arc::downgrade(connection);
    let body = move || run(&connection, &shared, (&address, trouble), &why);
    let spawned = std::thread::Builder::new().name("nbd-again".to_owned()).spawn(body);
    spawned.map(drop).map_err(|cause| Error::io("cannot start a thread", cause))
}

fn run(connection: &Weak<Connection>, shared: &Shared, (address, trouble): (&Address, Trouble), why: &str) {
    let end = Instant::now() + trouble.left;
    let mut wait = trouble.wait;
    let mut failed = "every time it did, it broke before a reply".to_owned();
    loop {
        if Instant::now() + wait >= end {
            if let Some(connection) = connection.upgrade() {
                connection.give_up(&format!("{why}; connecting again: {failed}"));
            }
            return;
        }
        std::thread::sleep(wait);
        wait = (2 * wait).clamp(FIRST_WAIT, LONGEST_WAIT);
        // A volume that nobody has open any more is not connected to.
        if connection.strong_count() == 0 {
            return;
        }
        let attempt = attempt(shared, address, end.min(Instant::now() + ATTEMPT));
        let Some(connection) = connection.upgrade() else { return };
        match attempt {
            Ok((transport, facts)) if facts.is_same_as(&shared.facts) => {
                let left = end.saturating_duration_since(Instant::now());
                return connection.resume(transport, &facts, Trouble { left, wait });
            }
            Ok(_) => return connection.give_up("the export is not what it was before"),
            Err(error) => failed = error.chain(),
        }
    }
}

fn attempt(shared: &Shared, address: &Address, deadline: Instant) -> Result<(Transport, Facts)> {
    let socket = connect(address, deadline).map_err(|cause| Error::io("cannot connect", cause))?;
    connect::haggle(connect::prepare(socket, &shared.wish.name)?, &shared.wish, deadline)
}

fn connect(address: &Address, deadline: Instant) -> std::io::Result<OwnedFd> {
    match address {
        Address::Unix(path) => {
            // A full backlog makes a blocking socket wait for ever; this one fails, and is tried again.
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            rustix::net::connect(&socket, &SocketAddrUnix::new(path.as_str())?)?;
            Ok(socket)
        }
        Address::Tcp(place) => {
            let place: SocketAddr = place
                .parse()
                .map_err(|_| std::io::Error::new(std::io::ErrorKind::InvalidInput, "no address and port"))?;
            let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            TcpStream::connect_timeout(&place, left).map(Into::into)
        }
    }
}

/// An address the caller may be sent to: absolute, or a number and a port.
///
/// # Errors
/// `Invalid`: neither.
pub fn check(address: &Address) -> Result<()> {
    let what = match address {
        Address::Unix(path) if !path.starts_with('/') => "the path of a socket is absolute",
        Address::Tcp(place) if place.parse::<SocketAddr>().is_err() => {
            "the address of a server is a number and a port"
        }
        _ => return Ok(()),
    };
    Err(Error::new(ErrorKind::Invalid, what))
}
