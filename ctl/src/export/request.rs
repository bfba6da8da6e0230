//! What was typed means: a volume to serve, with its descriptors.
//!
//! In two steps, because a prompt may come between: [`open`] finds out what can be wrong and changes nothing; [`Opened::create`]
//! takes the socket and the key's pipe, and must be followed by the request.

use std::os::fd::OwnedFd;

use proto::Format;
use proto::export::{Bound, Info, Listen, Request, State, Tls};

use crate::endpoint::{self, Access, End};
use crate::export::args::{self, Serve};
use crate::export::listen::{self, Address, Name};
use crate::passing::Passing;
use crate::report::{Error, Result};
use crate::secret::{self, Purpose, Secret};
use crate::volume::{self, Keys};

/// A checked export: volume open, key at hand, nothing changed yet.
pub struct Opened<'a> {
    args: &'a Serve,
    volume: End,
    header: Option<End>,
    format: Format,
    keys: Keys,
    others: Vec<Secret>,
    tls: Option<[Secret; 3]>,
    address: Address,
    /// Sentences for the user.
    pub warnings: Vec<String>,
    /// What may explain a wrong key.
    pub doubt: Option<String>,
}

/// An export ready to be sent.
pub struct Prepared {
    /// The request.
    pub request: Request,
    /// In the order of the indices in `request`.
    pub descriptors: Vec<OwnedFd>,
    /// The name of a socket of ours.
    pub name: Option<Name>,
    /// What clients connect to.
    pub uri: String,
}

/// Open everything but the socket.
pub fn open(args: &Serve) -> Result<Opened<'_>> {
    let path = args.volume.as_deref().expect("required unless a verb is typed");
    let typed = args.nbd.as_ref().expect("required unless a verb is typed");
    check_access(typed, &args.access)?;
    let address = typed.whole()?;
    let mut wanted = volume::to_open(&args.volume_args)?;
    wanted.refuse_shared_descriptor()?;
    let access = if args.shown.read_only { Access::ReadAlone } else { Access::Replace };
    let volume = endpoint::open_volume(path, "VOLUME", access)?;
    if !args.shown.read_only {
        endpoint::refuse_attached(&volume)?;
    }
    let header = match &wanted.header {
        Some(path) => {
            let header = endpoint::open_volume(path, "--header", Access::Read)?;
            endpoint::refuse_same_ends(&volume, &header)?;
            Some(header)
        }
        None => None,
    };
    let tls = match &args.access {
        args::Access {
            tls_cert: Some(certificate), tls_key: Some(key), tls_clients: Some(clients), ..
        } => Some([
            secret::pem(certificate, "--tls-cert", false)?,
            secret::pem(key, "--tls-key", true)?,
            secret::pem(clients, "--tls-clients", false)?,
        ]),
        _ => None,
    };
    let mut keys = wanted.fetch(&volume.name, false)?;
    let others = args.other_key.iter().map(|key| {
        let at = key.parse("--other-key")?;
        secret::passphrase(&at, "--other-key", Purpose::Open(&volume.name))
    });
    let mut others = others.collect::<Result<Vec<_>>>()?;
    let mut warnings = std::mem::take(&mut keys.key.warnings);
    warnings.extend(tls.iter().flatten().flat_map(|pem| pem.warnings.clone()));
    warnings.extend(others.iter_mut().flat_map(|other| std::mem::take(&mut other.warnings)));
    let doubt = keys.key.doubt.take();
    Ok(Opened { args, volume, header, format: wanted.format, keys, others, tls, address, warnings, doubt })
}

/// Options of one kind of socket are refused with the other: what is silently ignored would be access that was not meant.
fn check_access(address: &Address, access: &args::Access) -> Result<()> {
    let of_other = match address {
        Address::Unix(_) => [("--insecure", access.insecure), ("", false), ("", false)],
        Address::Tcp(_) => [
            ("--mode", access.mode.is_some()),
            ("--allow-uid", !access.allow_uid.is_empty()),
            ("--any-user", access.any_user),
        ],
    };
    match of_other.iter().find(|(_, typed)| *typed) {
        Some((option, _)) => {
            let kind = if matches!(address, Address::Unix(_)) { "TCP" } else { "Unix" };
            Err(Error::usage(format!("{option} is an option of {kind} sockets, and {address} is none")))
        }
        None => Ok(()),
    }
}

impl Opened<'_> {
    /// Take the socket: a new one, or that of an export of ours, of which `exports` are what there is.
    pub fn create(self, exports: &[Info]) -> Result<Prepared> {
        let Self { args, volume, header, mut format, keys, others, tls, address, .. } = self;
        let uid = rustix::process::geteuid().as_raw();
        let text = address.to_string();
        let shared = exports
            .iter()
            .find(|info| info.uid == uid && info.address == text && info.state != State::Stopped);
        let mut passing = Passing::default();
        let key_fd = passing.secret(keys.key)?;
        let more_key_fds = others.into_iter().map(|other| passing.secret(other)).collect::<Result<_>>()?;
        let file = passing.file(volume)?;
        if let (Format::Luks(open), Some(end)) = (&mut format, header) {
            open.header = Some(passing.file(end)?);
        }
        let (listen, name, encrypted, at) = match shared {
            Some(info) if args.access.is_typed() => {
                return Err(Error::usage(format!(
                    "{text} is the socket of export {}: it keeps the access it was made with",
                    info.export
                ))
                .hint("leave the options of access out, or listen elsewhere"));
            }
            Some(info) => (Listen::Shared(text.clone()), None, info.tls, text),
            None => {
                check_tls(&address, &args.access)?;
                let usual = if args.access.allow_uid.is_empty() { 0o600 } else { 0o666 };
                let mode = args.access.mode.unwrap_or(usual);
                let listening = listen::listen(&address, mode, tls.is_some())?;
                let at = listening.address.to_string();
                let fd = passing.fd(listening.socket);
                let entry = listening
                    .entry
                    .map(|(directory, name)| proto::Entry { dir_fd: passing.fd(directory), name });
                let encrypted = tls.is_some();
                let tls = match tls {
                    Some([certificate, key, clients]) => Some(Tls {
                        certificate_fd: passing.secret(certificate)?,
                        key_fd: passing.secret(key)?,
                        clients_fd: passing.secret(clients)?,
                    }),
                    None => None,
                };
                let bound = Bound {
                    fd,
                    address: at.clone(),
                    entry,
                    uids: args.access.allow_uid.clone(),
                    any_uid: args.access.any_user,
                    tls,
                    insecure: args.access.insecure,
                };
                (Listen::Bound(bound), listening.name, encrypted, at)
            }
        };
        let export = args.shown.name.clone().unwrap_or_default();
        let uri = listen::uri(&at, &export, encrypted);
        let request = Request {
            file,
            volume: proto::Volume { format, key_fd },
            more_key_fds,
            remotes: passing.remotes(),
            listen,
            name: export,
            description: args.shown.description.clone(),
            read_only: args.shown.read_only,
            discard: args.shown.discard,
            direct: args.buffered.then_some(false),
            detach: args.detach,
        };
        let (descriptors, _) = passing.finish();
        Ok(Prepared { request, descriptors, name, uri })
    }
}

/// TCP has TLS, or the word for it.
fn check_tls(address: &Address, access: &args::Access) -> Result<()> {
    if matches!(address, Address::Tcp(_)) && access.tls_cert.is_none() && !access.insecure {
        return Err(Error::usage(format!("{address} without TLS: who listens in reads the plaintext")).hint(
            "name --tls-cert, --tls-key and --tls-clients, or --insecure on a loopback address, for all users of this machine",
        ));
    }
    Ok(())
}
