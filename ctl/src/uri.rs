//! NBD URIs: which server, which export of it, and whether TLS is demanded.
//!
//! | typed | means |
//! |---|---|
//! | `nbd://HOST[:PORT]/NAME` | TCP; the port is 10809 unless named; `[::1]` for IPv6 |
//! | `nbd+unix:///NAME?socket=PATH` | a Unix socket |
//! | `nbds://…`, `nbds+unix://…` | the same, with TLS or not at all |
//!
//! Query parameters of the two with TLS: `tls-certificates=DIR` (as libnbd has it), `tls-hostname=NAME`, `tls-type=x509`,
//! `tls-verify-peer=1`. The NAME is everything behind the first slash, percent-decoded; without one it is the server's default export.
//!
//! Only looks at the text: nothing is opened and no name resolved. What is not understood is refused, never ignored: a parameter that
//! was meant to protect would be missing without a word. Refused on purpose: vsock and ssh, pre-shared keys, servers that are not verified.

use std::path::{Path, PathBuf};

use proto::ErrorKind;
use url::{Host, Url};

use crate::report::{Error, Result};

/// The port that IANA gave NBD.
pub const PORT: u16 = 10809;
/// Longest name of an export (NBD protocol, "Values": strings), bytes.
const EXPORT_MAX: usize = 4096;

/// What a URI says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uri {
    /// Where the server listens.
    pub address: Address,
    /// Name of the export; empty: the server's default.
    pub export: String,
    /// TLS, demanded of the server.
    pub tls: Option<Tls>,
}

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// On a Unix socket with this path, as typed.
    Unix(PathBuf),
    /// On a port of a host, whose name is still to be resolved.
    Tcp {
        /// Name or number, without brackets.
        host: String,
        /// Its port.
        port: u16,
    },
}

/// TLS as asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tls {
    /// The name its certificate must be for.
    pub server_name: String,
    /// Where `ca-cert.pem` is, and perhaps `client-cert.pem` and `client-key.pem`; absent: the authorities of the system.
    pub certificates: Option<PathBuf>,
}

/// Does this name a server? Then which. `None`: it is a path. A path that looks like a URI is written with `./` before it.
///
/// # Errors
/// `Invalid`: it is a URI and a wrong one. `Unsupported`: of a kind that is not spoken here.
pub fn parse(typed: &Path) -> Option<Result<Uri>> {
    let Some(text) = typed.to_str() else {
        let text = typed.to_string_lossy();
        let wrong = || Err(Error::usage(format!("{text} is not UTF-8")).hint("percent-encode such bytes"));
        return scheme(&text).is_some_and(|scheme| scheme.starts_with("nbd")).then(wrong);
    };
    let scheme = scheme(text)?;
    if ["rbd", "s3", "swift"].contains(&scheme.as_str()) {
        let error =
            Error::new(ErrorKind::Unsupported, format!("{text} is not supported yet by this version"));
        return Some(Err(error.hint(
            "files, block devices, named pipes, `-` and NBD URIs are; write ./ before a file of that name",
        )));
    }
    scheme.starts_with("nbd").then(|| read(text, &scheme))
}

/// Is it a URI of any kind? Then it is no path.
pub fn is_uri(typed: &Path) -> bool {
    parse(typed).is_some()
}

/// The scheme, in lower case, of what may be a URI.
fn scheme(text: &str) -> Option<String> {
    let (scheme, rest) = text.split_once(':')?;
    let fits = !scheme.is_empty() && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'+');
    let scheme = scheme.to_ascii_lowercase();
    // QEMU's own notation has no slashes.
    let known = rest.starts_with("//") || scheme == "nbd" || scheme == "rbd";
    (fits && known).then_some(scheme)
}

fn read(text: &str, scheme: &str) -> Result<Uri> {
    let wrong = |why: &str| Error::usage(format!("{text}: {why}"));
    let (tls, unix) = match scheme {
        "nbd" => (false, false),
        "nbds" => (true, false),
        "nbd+unix" => (false, true),
        "nbds+unix" => (true, true),
        _ => {
            let what = format!("{text}: {scheme} is not spoken here");
            return Err(Error::new(ErrorKind::Unsupported, what)
                .hint("nbd, nbds, nbd+unix and nbds+unix are; write ./ before a file of that name"));
        }
    };
    let Some(rest) = text.get(scheme.len() + 1..).and_then(|rest| rest.strip_prefix("//")) else {
        return Err(wrong("this is QEMU's notation, not a URI").hint(
            "nbd://HOST:PORT/NAME, or nbd+unix:///NAME?socket=PATH; write ./ before a file of that name",
        ));
    };
    if text.chars().any(|c| c.is_control() || c.is_whitespace()) || rest.contains('#') {
        return Err(
            wrong("blanks, control characters and `#` have no place in a URI").hint("percent-encode them")
        );
    }
    let (before, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, name) = before.split_once('/').unwrap_or((before, ""));
    let export = decode(name).ok_or_else(|| wrong("the name of the export is wrongly percent-encoded"))?;
    if export.contains('\0') || export.len() > EXPORT_MAX {
        return Err(wrong("the name of the export has a NUL in it, or more than 4096 bytes"));
    }
    let query = Query::read(query).map_err(|why| wrong(&why))?;
    let address = if unix { on_unix(authority, &query) } else { on_tcp(authority, &query) };
    let address = address.map_err(|(why, hint)| wrong(why).hint(hint))?;
    let asked = query.certificates.is_some() || query.hostname.is_some() || query.with_tls;
    if asked && !tls {
        return Err(wrong("the tls- parameters are of nbds and nbds+unix").hint("write `nbds` for `nbd`"));
    }
    let server_name = query.hostname.unwrap_or_else(|| match &address {
        Address::Tcp { host, .. } => host.clone(),
        Address::Unix(_) => "localhost".to_owned(),
    });
    let tls = tls.then_some(Tls { server_name, certificates: query.certificates });
    Ok(Uri { address, export, tls })
}

/// What is wrong, and the way out.
type Wrong = (&'static str, &'static str);

fn on_unix(authority: &str, query: &Query) -> std::result::Result<Address, Wrong> {
    const SHAPE: &str = "nbd+unix:///NAME?socket=PATH, with three slashes";
    if !authority.is_empty() {
        return Err(("a Unix socket is on no host", SHAPE));
    }
    match &query.socket {
        None => Err(("the socket's path is missing", SHAPE)),
        Some(path) if path.is_empty() => Err(("the socket's path is empty", SHAPE)),
        Some(path) if path.contains('\0') => {
            Err(("abstract sockets are not supported", "let the server listen on a path"))
        }
        Some(path) => Ok(Address::Unix(PathBuf::from(path))),
    }
}

fn on_tcp(authority: &str, query: &Query) -> std::result::Result<Address, Wrong> {
    const SHAPE: &str = "nbd://HOST[:PORT]/NAME, and an IPv6 address in brackets";
    if query.socket.is_some() {
        return Err(("`socket` is of nbd+unix", "nbd+unix:///NAME?socket=PATH"));
    }
    if authority.contains('@') {
        return Err((
            "a user is only named with pre-shared keys, which are not supported",
            "use certificates: nbds://HOST/NAME?tls-certificates=DIR",
        ));
    }
    if authority.is_empty() {
        return Err(("the host is missing", "nbd://localhost/NAME is on this machine"));
    }
    // Only the authority: a path would lose what looks like `..` in it.
    let url =
        Url::parse(&format!("nbd://{authority}")).map_err(|_| ("no such host or port can be", SHAPE))?;
    let host = match url.host() {
        Some(Host::Domain(host)) => decode(host).ok_or(("no such host or port can be", SHAPE))?,
        Some(Host::Ipv4(host)) => host.to_string(),
        Some(Host::Ipv6(host)) => host.to_string(),
        None => return Err(("the host is missing", SHAPE)),
    };
    match url.port() {
        Some(0) => Err(("no server listens on port 0", SHAPE)),
        port => Ok(Address::Tcp { host, port: port.unwrap_or(PORT) }),
    }
}

#[derive(Default)]
struct Query {
    socket: Option<String>,
    certificates: Option<PathBuf>,
    hostname: Option<String>,
    /// TLS was named in another way.
    with_tls: bool,
}

impl Query {
    fn read(text: &str) -> std::result::Result<Self, String> {
        let mut query = Self::default();
        let mut seen: Vec<&str> = Vec::new();
        for pair in text.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = decode(value).ok_or_else(|| format!("`{key}` is wrongly percent-encoded"))?;
            if seen.contains(&key) {
                return Err(format!("`{key}` is said twice"));
            }
            seen.push(key);
            match (key, value.as_str()) {
                ("socket", _) => query.socket = Some(value),
                ("tls-certificates" | "tls-hostname", "") => return Err(format!("`{key}` is empty")),
                ("tls-certificates", _) => query.certificates = Some(PathBuf::from(value)),
                ("tls-hostname", _) => query.hostname = Some(value),
                ("tls-type", "x509") | ("tls-verify-peer", "1" | "true") => query.with_tls = true,
                ("tls-type", _) => return Err("of TLS only `tls-type=x509` is supported".to_owned()),
                ("tls-verify-peer", _) => {
                    return Err("a server that is not verified may be anybody: not supported".to_owned());
                }
                ("tls-psk-file" | "tls-username", _) => {
                    return Err("pre-shared keys are not supported, certificates are".to_owned());
                }
                _ => return Err(format!("`{key}` is not known")),
            }
        }
        Ok(query)
    }
}

/// Percent-decoded (RFC 3986, 2.1; a `+` is a plus), if that is UTF-8.
fn decode(text: &str) -> Option<String> {
    let mut bytes = text.bytes();
    let mut decoded = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
            let (high, low) = (digit(bytes.next())?, digit(bytes.next())?);
            decoded.push(u8::try_from(high << 4 | low).expect("two digits"));
        } else {
            decoded.push(byte);
        }
    }
    String::from_utf8(decoded).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Uri {
        let uri = parse(Path::new(text)).unwrap_or_else(|| panic!("{text} is taken for a path"));
        uri.unwrap_or_else(|error| panic!("{error}"))
    }

    fn refused(text: &str) -> Error {
        let uri = parse(Path::new(text)).unwrap_or_else(|| panic!("{text} is taken for a path"));
        uri.expect_err(text)
    }

    fn tcp(host: &str, port: u16) -> Address {
        Address::Tcp { host: host.to_owned(), port }
    }

    #[test]
    fn hosts_and_ports_are_understood() {
        for (text, address) in [
            ("nbd://example.com/disk", tcp("example.com", 10809)),
            ("nbd://example.com:10810/disk", tcp("example.com", 10810)),
            ("NBD://127.0.0.1/disk", tcp("127.0.0.1", 10809)),
            ("nbd://[::1]/disk", tcp("::1", 10809)),
            ("nbd://[2001:db8::1]:99/disk", tcp("2001:db8::1", 99)),
        ] {
            assert_eq!(parsed(text), Uri { address, export: "disk".to_owned(), tls: None }, "{text}");
        }
    }

    #[test]
    fn the_name_is_all_behind_the_first_slash() {
        for (text, export) in [
            ("nbd://h", ""),
            ("nbd://h/", ""),
            ("nbd://h//disk", "/disk"),
            ("nbd://h/hello%20world", "hello world"),
            ("nbd://h/a/../b", "a/../b"),
            ("nbd://h/a+b%2Fc", "a+b/c"),
            ("nbd://h/%C3%A4", "ä"),
            ("nbd+unix:///disk?socket=sock", "disk"),
            ("nbd+unix:///?socket=sock", ""),
            ("nbd+unix://?socket=sock", ""),
        ] {
            assert_eq!(parsed(text).export, export, "{text}");
        }
    }

    #[test]
    fn a_unix_socket_has_a_path() {
        for (text, path) in [
            ("nbd+unix:///x?socket=/run/nbd.sock", "/run/nbd.sock"),
            ("nbd+unix:///x?socket=here", "here"),
            ("nbd+unix:///x?socket=%2Frun%2Fa%20b+c%26d", "/run/a b+c&d"),
        ] {
            assert_eq!(parsed(text).address, Address::Unix(PathBuf::from(path)), "{text}");
        }
    }

    #[test]
    fn tls_knows_whom_it_speaks_to() {
        let tls = |text: &str| parsed(text).tls.unwrap_or_else(|| panic!("{text}: no TLS"));
        let named = |name: &str| Tls { server_name: name.to_owned(), certificates: None };
        assert_eq!(tls("nbds://example.com/x"), named("example.com"));
        assert_eq!(tls("nbds://10.0.0.1/x?tls-hostname=example.com"), named("example.com"));
        assert_eq!(tls("nbds+unix:///x?socket=s"), named("localhost"));
        assert_eq!(tls("nbds://h/x?tls-type=x509&tls-verify-peer=1"), named("h"));
        let all = tls("nbds+unix:///x?socket=s&tls-hostname=h&tls-certificates=/etc/p%20ki");
        assert_eq!(all, Tls { certificates: Some(PathBuf::from("/etc/p ki")), ..named("h") });
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, words) in [
            ("nbd:localhost:10809:exportname=x", "QEMU's notation"),
            ("nbd:unix:/run/sock:exportname=x", "QEMU's notation"),
            ("nbd:///x", "the host is missing"),
            ("nbd://me@h/x", "pre-shared keys"),
            ("nbd://h:0/x", "port 0"),
            ("nbd://h:99999/x", "no such host or port"),
            ("nbd://[::1/x", "no such host or port"),
            ("nbd://::1/x", "no such host or port"),
            ("nbd://h/x?socket=s", "of nbd+unix"),
            ("nbd+unix://h/x?socket=s", "on no host"),
            ("nbd+unix:///x", "path is missing"),
            ("nbd+unix:///x?socket=", "path is empty"),
            ("nbd+unix:///x?socket=%00a", "abstract"),
            ("nbd+unix:///x?socket=a&socket=b", "said twice"),
            ("nbd+unix:///x?socket=a%2", "percent-encoded"),
            ("nbd://h/%zz", "percent-encoded"),
            ("nbd://h/%ff", "percent-encoded"),
            ("nbd://h/%00", "NUL"),
            ("nbd://h/x#y", "no place in a URI"),
            ("nbd://h/x y", "no place in a URI"),
            ("nbd://h/x?y=z", "`y` is not known"),
            ("nbd://h/x?tls-certificates=/d", "of nbds"),
            ("nbd://h/x?tls-type=x509", "of nbds"),
            ("nbds://h/x?tls-certificates=", "is empty"),
            ("nbds://h/x?tls-type=psk", "only `tls-type=x509`"),
            ("nbds://h/x?tls-verify-peer=0", "not verified"),
            ("nbds://h/x?tls-psk-file=/f", "pre-shared keys"),
            ("nbd+vsock://2/x", "not spoken here"),
            ("nbd+ssh://h/x", "not spoken here"),
        ] {
            let error = refused(text);
            assert!(error.to_string().contains(words), "{text}: {error}");
            let kinds = [ErrorKind::Invalid, ErrorKind::Unsupported];
            assert!(kinds.contains(&error.failure.kind), "{text}");
        }
        let long = format!("nbd://h/{}", "x".repeat(4097));
        assert!(refused(&long).to_string().contains("4096"));
        for text in ["rbd:pool/image", "s3://bucket/x", "swift://x/y"] {
            assert_eq!(refused(text).failure.kind, ErrorKind::Unsupported, "{text}");
        }
    }

    #[test]
    fn other_things_with_a_colon_are_paths() {
        for text in
            ["./nbd://h/x", "/dev/disk/by-path/pci-0000:00:1f.2", "a:b", "http://h/x", "x", "-", "C://x", ":"]
        {
            assert!(!is_uri(Path::new(text)), "{text}");
        }
        use std::os::unix::ffi::OsStrExt;
        let path = |bytes: &'static [u8]| Path::new(std::ffi::OsStr::from_bytes(bytes));
        assert!(parse(path(b"\xff")).is_none());
        assert!(parse(path(b"nbd://h/\xff")).is_some_and(|uri| uri.is_err()));
    }
}
