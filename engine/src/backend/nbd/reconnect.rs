//! Connecting again after a connection broke: on a thread of its own, for as long as the caller allows.
//!
//! The daemon connects only where [`Address`] was left in the request, which is for callers whose rights it has anyway. The export must be
//! what it was: another size, other abilities, and the volume is given up. What was not answered is then asked again.

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
pub fn start(connection: &Arc<Connection>, shared: Arc<Shared>, again: Again, why: String) -> Result<()> {
    let connection = Arc::downgrade(connection);
    let body = move || run(&connection, &shared, &again, &why);
    let spawned = std::thread::Builder::new().name("nbd-again".to_owned()).spawn(body);
    spawned.map(drop).map_err(|cause| Error::io("cannot start a thread", cause))
}

fn run(connection: &Weak<Connection>, shared: &Shared, again: &Again, why: &str) {
    let end = Instant::now() + again.within;
    let mut wait = FIRST_WAIT;
    loop {
        // A volume that nobody has open any more is not connected to.
        if connection.strong_count() == 0 {
            return;
        }
        let attempt = attempt(shared, &again.address, end.min(Instant::now() + ATTEMPT));
        let Some(connection) = connection.upgrade() else { return };
        let failed = match attempt {
            Ok((transport, facts)) if facts.is_same_as(&shared.facts) => {
                return connection.resume(transport, &facts);
            }
            Ok(_) => return connection.give_up("the export is not what it was before"),
            Err(error) => error,
        };
        if Instant::now() + wait >= end {
            return connection.give_up(&format!("{why}; connecting again: {}", failed.chain()));
        }
        drop(connection);
        std::thread::sleep(wait);
        wait = (2 * wait).min(LONGEST_WAIT);
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
