//! Listening sockets as they come from callers: what they must be, and how their names go.
//!
//! The caller has bound the socket with its own rights and passed it, with the directory a Unix socket's name is in. The name is
//! removed with the caller's rights and only if it still means the file it meant when the socket came: a bound socket's
//! descriptor tells nothing of its name's inode, so that is noted at the start.
//!
//! This module refuses TCP without TLS, unless it listens on a loopback address and the caller says that it is meant so.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use proto::export::Bound;
use rustix::fs::{AtFlags, FileType, statat, unlinkat};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrAny, SocketType, sockopt};
use rustls::ServerConfig;

use crate::error::{Error, ErrorKind, Result};
use crate::export::nbd::listen::Access;
use crate::export::nbd::tls;
use crate::job::Owner;
use crate::key::Descriptors;
use crate::limits;
use crate::sys::fsuid::as_user;

/// A socket that may be listened on.
pub struct Offered {
    /// The socket.
    pub socket: OwnedFd,
    /// Where a Unix socket is to be removed from.
    pub place: Option<Place>,
    /// Who may connect to a Unix socket.
    pub access: Access,
    /// TLS, demanded of every client.
    pub tls: Option<Arc<ServerConfig>>,
}

fn invalid<T>(what: impl Into<String>, address: &str) -> Result<T> {
    Err(Error::new(ErrorKind::Invalid, what).at(address))
}

impl Offered {
    /// Take a socket and look at it.
    ///
    /// # Errors
    /// `Invalid`: not a socket that listens, or one that may not be listened on without TLS; `Conflict`: its name means something else.
    pub fn new(bound: &Bound, descriptors: &mut Descriptors, owner: &Owner) -> Result<Self> {
        let address = bound.address.as_str();
        if address.len() > limits::EXPORT_ADDRESS_MAX {
            return invalid("the address of the socket is too long", "the request");
        }
        let socket = descriptors.take(bound.fd, "listening socket")?;
        let tls = bound.tls.as_ref().map(|tls| server_config(tls, descriptors)).transpose()?;
        let place = match &bound.entry {
            Some(entry) => {
                let directory = descriptors.take(entry.dir_fd, "directory of the socket")?;
                Some(Place::new(directory, &entry.name, owner)?)
            }
            None => None,
        };
        let listens = sockopt::socket_type(&socket).is_ok_and(|kind| kind == SocketType::STREAM)
            && sockopt::socket_acceptconn(&socket).unwrap_or(false);
        if !listens {
            return invalid("the descriptor is not a socket that listens", address);
        }
        let family = sockopt::socket_domain(&socket);
        match family {
            Ok(AddressFamily::UNIX) if bound.insecure => {
                return invalid("insecure is for TCP sockets, and this is none", address);
            }
            Ok(AddressFamily::UNIX) => {}
            Ok(AddressFamily::INET | AddressFamily::INET6) => check_tcp(bound, &socket)?,
            _ => return invalid("neither a Unix nor a TCP socket", address),
        }
        let access = Access { owner: owner.uid, uids: bound.uids.clone(), any_uid: bound.any_uid };
        Ok(Self { socket, place, access, tls })
    }
}

/// The texts are read now, and gone again before the volume's key is derived.
fn server_config(wish: &proto::export::Tls, descriptors: &mut Descriptors) -> Result<Arc<ServerConfig>> {
    let certificate = descriptors.secret(wish.certificate_fd, "certificate")?;
    let key = descriptors.secret(wish.key_fd, "private key")?;
    let clients = descriptors.secret(wish.clients_fd, "authorities of clients")?;
    tls::server_config(certificate.as_bytes(), key.as_bytes(), clients.as_bytes())
}

fn check_tcp(bound: &Bound, socket: &OwnedFd) -> Result<()> {
    let address = bound.address.as_str();
    if bound.entry.is_some() || bound.any_uid || !bound.uids.is_empty() {
        return invalid("a TCP socket has neither a place in a directory nor users", address);
    }
    let local = rustix::net::getsockname(socket)
        .map_err(|errno| Error::io("cannot tell where the socket listens", errno).at(address))?;
    match (&bound.tls, bound.insecure) {
        (Some(_), false) => Ok(()),
        (Some(_), true) => invalid("insecure means without TLS, and TLS is given too", address),
        (None, false) => Err(Error::new(ErrorKind::Invalid, "TCP without TLS: who listens in reads the plaintext")
            .at(address)
            .hint(
                "name a certificate, its key and the authorities of clients (--tls-cert, --tls-key, --tls-clients), or on a \
                 loopback address --insecure, for all users of this machine",
            )),
        (None, true) if is_loopback(&local) => Ok(()),
        (None, true) => invalid("insecure is for loopback addresses only, such as 127.0.0.1", address),
    }
}

fn is_loopback(address: &SocketAddrAny) -> bool {
    std::net::SocketAddr::try_from(address.clone()).is_ok_and(|address| match address.ip() {
        std::net::IpAddr::V4(ip) => ip.is_loopback(),
        std::net::IpAddr::V6(ip) => {
            ip.is_loopback() || ip.to_ipv4_mapped().is_some_and(|ip| ip.is_loopback())
        }
    })
}

/// Where a Unix socket's name is.
#[derive(Debug)]
pub struct Place {
    directory: OwnedFd,
    name: String,
    owner: Owner,
    /// Device and inode of what the name meant.
    meant: (u64, u64),
}

impl Place {
    fn new(directory: OwnedFd, name: &str, owner: &Owner) -> Result<Self> {
        let bad = name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']);
        if bad {
            return Err(Error::new(ErrorKind::Invalid, "not a file name").at(format!("{name:?}")));
        }
        let mut place = Self { directory, name: name.to_owned(), owner: owner.clone(), meant: (0, 0) };
        place.meant = match place.look()? {
            Some(meant) => meant,
            None => return Err(Error::new(ErrorKind::Conflict, "there is no socket of this name").at(name)),
        };
        Ok(place)
    }

    /// What the name means now; `None`: no socket.
    fn look(&self) -> Result<Option<(u64, u64)>> {
        self.with_rights("cannot look up the socket", || {
            match statat(&self.directory, &*self.name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) if FileType::from_raw_mode(stat.st_mode) == FileType::Socket => {
                    Ok(Some((stat.st_dev, stat.st_ino)))
                }
                Ok(_) | Err(Errno::NOENT) => Ok(None),
                Err(errno) => Err(errno.into()),
            }
        })
    }

    fn with_rights<T: Send>(&self, what: &str, act: impl FnOnce() -> std::io::Result<T> + Send) -> Result<T> {
        as_user(self.owner.uid, self.owner.gid, &self.owner.groups, act)?
            .map_err(|cause| Error::io(what, cause).at(&self.name))
    }

    /// Remove the name, if it still means the same.
    pub fn remove(&self) {
        let removed = match self.look() {
            Ok(Some(meant)) if meant == self.meant => self.with_rights("cannot remove the socket", || {
                Ok(unlinkat(&self.directory, &*self.name, AtFlags::empty())?)
            }),
            Ok(_) => {
                tracing::info!("the socket {} is not there any more, or another's", self.name);
                Ok(())
            }
            Err(error) => Err(error),
        };
        if let Err(error) = removed {
            tracing::warn!("{}", error.chain());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::path::PathBuf;

    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("export-socket-{}-{name}", std::process::id()));
            std::fs::create_dir(&dir).expect("mkdir");
            Self(dir)
        }

        fn directory(&self) -> OwnedFd {
            std::fs::File::open(&self.0).expect("directory").into()
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn us() -> Owner {
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Owner { uid, gid, groups: Vec::new() }
    }

    fn bound(address: &str) -> Bound {
        Bound {
            fd: 0,
            address: address.to_owned(),
            entry: None,
            uids: Vec::new(),
            any_uid: false,
            tls: None,
            insecure: false,
        }
    }

    fn take(bound: &Bound, descriptors: Vec<OwnedFd>) -> Result<Offered> {
        Offered::new(bound, &mut Descriptors::new(descriptors), &us())
    }

    fn taken(bound: &Bound, descriptors: Vec<OwnedFd>) -> Offered {
        take(bound, descriptors).unwrap_or_else(|error| panic!("{}", error.chain()))
    }

    fn refused(bound: &Bound, descriptors: Vec<OwnedFd>) -> String {
        let error = take(bound, descriptors).err().expect("refused");
        assert_eq!(error.kind(), ErrorKind::Invalid);
        error.chain()
    }

    #[test]
    fn tcp_wants_tls_or_the_word_for_it_on_loopback() {
        let loopback = || TcpListener::bind("127.0.0.1:0").expect("bound").into();
        let everywhere = || TcpListener::bind("0.0.0.0:0").expect("bound").into();
        let insecure = Bound { insecure: true, ..bound("tcp:x:1") };
        assert!(refused(&bound("tcp:x:1"), vec![loopback()]).contains("without TLS"));
        assert!(take(&insecure, vec![loopback()]).is_ok());
        assert!(refused(&insecure, vec![everywhere()]).contains("loopback addresses only"));
        let uids = Bound { uids: vec![7], ..insecure.clone() };
        assert!(refused(&uids, vec![loopback()]).contains("nor users"));
    }

    #[test]
    fn only_what_listens_can_be_listened_on() {
        let (one, _other) = UnixStream::pair().expect("pair");
        assert!(refused(&bound("unix:x"), vec![one.into()]).contains("not a socket that listens"));
        let file = std::fs::File::open("/dev/null").expect("opens");
        assert!(refused(&bound("unix:x"), vec![file.into()]).contains("not a socket that listens"));
        let long = bound(&"x".repeat(limits::EXPORT_ADDRESS_MAX + 1));
        assert!(refused(&long, vec![]).contains("too long"));
    }

    #[test]
    fn users_are_those_named_unless_all_may() {
        let scratch = Scratch::new("users");
        for any in [false, true] {
            let name = scratch.0.join(format!("s{any}"));
            let socket = UnixListener::bind(name).expect("bound");
            let wish = Bound { uids: vec![7], any_uid: any, ..bound("unix:s") };
            let access = Access { owner: us().uid, uids: vec![7], any_uid: any };
            assert_eq!(taken(&wish, vec![socket.into()]).access, access);
        }
    }

    #[test]
    fn a_name_goes_only_if_it_means_the_same_socket() {
        let scratch = Scratch::new("names");
        let path = scratch.0.join("s");
        let wish = Bound { entry: Some(proto::Entry { dir_fd: 1, name: "s".to_owned() }), ..bound("unix:s") };
        let listen = || {
            let socket = UnixListener::bind(&path).expect("bound");
            taken(&wish, vec![socket.into(), scratch.directory()])
        };
        let place = listen().place.expect("a place");
        place.remove();
        assert!(!path.exists());
        let place = listen().place.expect("a place");
        std::fs::remove_file(&path).expect("removed");
        std::fs::write(&path, "another's").expect("written");
        place.remove();
        assert!(path.exists(), "it means something else now");
        // Nor is a name taken that means no socket, or is none.
        let socket = UnixListener::bind(scratch.0.join("t")).expect("bound");
        let error = take(&wish, vec![socket.into(), scratch.directory()]).err().expect("refused");
        assert_eq!(error.kind(), ErrorKind::Conflict);
        let socket = UnixListener::bind(scratch.0.join("u")).expect("bound");
        let up = Bound { entry: Some(proto::Entry { dir_fd: 1, name: "../s".to_owned() }), ..wish.clone() };
        assert!(refused(&up, vec![socket.into(), scratch.directory()]).contains("not a file name"));
    }
}
