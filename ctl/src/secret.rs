//! Key references: where a key is, fetching it, and the pipe it travels in.
//!
//! Bytes are held in zeroized buffers that never grow (a growing buffer leaves copies behind). They leave this
//! process only through a pipe that is full and closed before the request is sent: pipe memory never reaches swap, and no
//! argument, environment or JSON holds a key. What no pipe can hold, which for others than root is more than
//! /proc/sys/fs/pipe-max-size (1 MiB unless changed), goes through a sealed memfd, whose pages the kernel may swap out: to
//! lock them they would have to be mapped, which is unsafe code, and cryptsetup takes key files of up to 8 MiB. The help of
//! `--key` says so. No message tells a secret or its length; the length expected may be told.
//!
//! A volume key has a known length, and may be written in hexadecimal. A passphrase is every byte of what is referred
//! to, a newline at its end too, as with `cryptsetup --key-file`; only at a prompt the newline ends it.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use linux_keyutils::{Key, KeyError, KeyRing, KeyRingIdentifier};
use proto::{ErrorKind, MAX_SECRET};
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, memfd_create, open};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd};
use zeroize::Zeroizing;

use crate::prompt;
use crate::report::{Error, Result};

/// Longest passphrase at a prompt, bytes: cryptsetup's bound too.
const MAX_TYPED: usize = 512;
/// Longest payload of a `user` key is 32767 bytes (keyrings(7)).
const MAX_PAYLOAD: usize = 32_767;

/// What was typed after `--key` or its kin. Not parsed by clap, which repeats what it cannot parse: that may be the key itself.
#[derive(Clone)]
pub struct KeyText(String);

impl From<String> for KeyText {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for KeyText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyText(..)")
    }
}

impl KeyText {
    /// What it refers to. `option` is the one it was typed after, for messages.
    pub fn parse(&self, option: &'static str) -> Result<KeyRef> {
        KeyRef::parse(&self.0).map_err(|why| Error::usage(format!("{option}: {why}")))
    }

    /// As typed, where it is a name to be stored and not a secret to be fetched. It may be a secret all the same, by mistake.
    pub fn as_typed(&self) -> &str {
        &self.0
    }
}

/// Where a key is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyRef {
    /// `file:PATH`
    File(PathBuf),
    /// `fd:N`
    Fd(u32),
    /// `prompt`
    Prompt,
    /// `keyring:NAME`
    Keyring(String),
}

impl KeyRef {
    /// A reference as typed. What does not look like one is not repeated: it may be the key itself.
    ///
    /// # Errors
    /// A sentence for the user.
    pub fn parse(text: &str) -> Result<Self, String> {
        const EXPECTED: &str = "expected file:PATH, fd:N, prompt or keyring:NAME";
        match text.split_once(':') {
            None if text == "prompt" => Ok(Self::Prompt),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("fd", number)) => match number.parse() {
                Ok(number) if number != 1 && number != 2 => Ok(Self::Fd(number)),
                _ => Err("fd:N needs the number of an inherited descriptor, 0 or above 2".to_owned()),
            },
            Some(("keyring", name)) if !name.is_empty() => Ok(Self::Keyring(name.to_owned())),
            Some(("barbican", _)) => Err("key managers are not supported yet by this version".to_owned()),
            _ => Err(EXPECTED.to_owned()),
        }
    }

    /// Does fetching consume standard input?
    pub fn reads_stdin(&self) -> bool {
        matches!(self, Self::Fd(0))
    }
}

impl fmt::Display for KeyRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "key file {}", path.display()),
            Self::Fd(number) => write!(f, "key descriptor {number}"),
            Self::Prompt => f.write_str("key prompt"),
            Self::Keyring(name) => write!(f, "key {name} in the keyring"),
        }
    }
}

/// Two secrets cannot come from one descriptor: the first takes all there is.
pub fn refuse_shared(keys: &[&KeyRef]) -> Result<()> {
    let shared =
        keys.iter().enumerate().find(|(at, key)| matches!(key, KeyRef::Fd(_)) && keys[..*at].contains(key));
    match shared {
        Some((_, key)) => Err(Error::usage(format!("{key} cannot hold two secrets"))
            .hint("pass each through a descriptor of its own: fd:3 3< ONE … fd:4 4< OTHER")),
        None => Ok(()),
    }
}

/// A secret at hand, with what the user should know about where it lay.
pub struct Secret {
    bytes: Zeroizing<Vec<u8>>,
    /// Sentences without a full stop.
    pub warnings: Vec<String>,
    /// What may explain it if the secret does not fit.
    pub doubt: Option<String>,
}

/// What a passphrase is wanted for, and the name of the volume, for prompts.
#[derive(Debug, Clone, Copy)]
pub enum Purpose<'a> {
    /// Opening a volume.
    Open(&'a str),
    /// Opening a volume that gets another volume key: it opens that afterwards.
    Keep(&'a str),
    /// The same, but it opens nothing afterwards.
    Replace(&'a str),
    /// A new keyslot: a prompt asks twice.
    New(&'a str),
}

/// Longest PEM file, bytes: what a pipe holds without being made larger.
const MAX_PEM: usize = 64 << 10;

/// Volume keys this program knows, bytes: AES-128-XTS and AES-256-XTS.
pub const VOLUME_KEY_BYTES: [usize; 2] = [32, 64];

/// Fetch a volume key of exactly one of `sizes`, in bytes, given as raw bytes or as hexadecimal digits. `twice`: a prompt
/// asks again.
pub fn volume_key(at: &KeyRef, option: &'static str, sizes: &[usize], twice: bool) -> Result<Secret> {
    // One byte more than the longest right answer (digits, CR, LF) tells a longer one apart without holding it.
    let longest = sizes.iter().max().expect("a volume key has a size");
    let mut text = Zeroizing::new(Vec::with_capacity(2 * longest + 3));
    let mut warnings = Vec::new();
    match locate(at, option, &mut warnings)? {
        Located::Stream(file) => read(file, &mut text).map_err(|error| cannot_read(at, error))?,
        Located::Keyring(name) => read_keyring(name, &mut text)?,
        Located::Prompt => {
            let new = if twice { "new " } else { "" };
            type_in(&format!("{new}volume key (hexadecimal digits): "), twice, &mut text)?;
        }
    }
    Ok(Secret { bytes: decode(at, &text, sizes)?, warnings, doubt: None })
}

/// Fetch a passphrase: every byte of it.
pub fn passphrase(at: &KeyRef, option: &'static str, purpose: Purpose<'_>) -> Result<Secret> {
    let mut warnings = Vec::new();
    let (text, most) = match locate(at, option, &mut warnings)? {
        Located::Stream(file) => {
            // One byte more than may be, to tell what is longer.
            let known = file.metadata().ok().filter(|found| found.is_file() && found.len() > 0);
            let most = known.map_or(MAX_SECRET, |found| {
                usize::try_from(found.len()).map_or(MAX_SECRET, |length| length.min(MAX_SECRET))
            });
            let mut text = room(most + 1);
            read(file, &mut text).map_err(|error| cannot_read(at, error))?;
            (text, most)
        }
        Located::Keyring(name) => {
            let mut text = room(MAX_PAYLOAD + 1);
            read_keyring(name, &mut text)?;
            (text, MAX_PAYLOAD)
        }
        Located::Prompt => {
            let mut text = room(MAX_TYPED + 1);
            match purpose {
                Purpose::Open(volume) => type_in(&question("passphrase of", volume), false, &mut text)?,
                Purpose::Keep(volume) => {
                    type_in(&question("passphrase to keep of", volume), false, &mut text)?;
                }
                Purpose::Replace(volume) => {
                    type_in(&question("passphrase to be replaced of", volume), false, &mut text)?;
                }
                Purpose::New(volume) => type_in(&question("new passphrase of", volume), true, &mut text)?,
            }
            (text, MAX_TYPED)
        }
    };
    if text.is_empty() {
        return Err(Error::usage(format!("{at}: a passphrase must not be empty")));
    }
    if text.len() > most {
        let why = if most == MAX_SECRET || *at == KeyRef::Prompt {
            format!("longer than the {most} bytes a passphrase may have here")
        } else {
            "it grew while it was read".to_owned()
        };
        return Err(Error::usage(format!("{at}: {why}")));
    }
    let mut doubt = None;
    if text.ends_with(b"\n") {
        let sentence = "the newline is part of the key, as with cryptsetup --key-file";
        match purpose {
            Purpose::New(_) => warnings.push(format!("{at} ends in a newline: {sentence}")),
            Purpose::Open(_) | Purpose::Keep(_) | Purpose::Replace(_) => {
                doubt = Some(format!("{at} ends in a newline, and {sentence}"));
            }
        }
    }
    Ok(Secret { bytes: text, warnings, doubt })
}

/// A PEM file, all of it. `is_private`: others should not read it.
pub fn pem(path: &Path, option: &str, is_private: bool) -> Result<Secret> {
    let at = KeyRef::File(path.to_owned());
    let mut warnings = Vec::new();
    let Located::Stream(file) = locate(&at, option, &mut warnings)? else {
        unreachable!("a file is a stream")
    };
    let mut bytes = room(MAX_PEM + 1);
    read(file, &mut bytes).map_err(|error| Error::io("cannot read", path.display(), error))?;
    if bytes.is_empty() || bytes.len() > MAX_PEM {
        let why = if bytes.is_empty() { "is empty" } else { "is too long for certificates" };
        return Err(Error::usage(format!("{option}: {} {why}", path.display())));
    }
    if !is_private {
        warnings.clear();
    }
    Ok(Secret { bytes, warnings, doubt: None })
}

/// A buffer that will not grow, kept from swap as far as the limit allows.
fn room(bytes: usize) -> Zeroizing<Vec<u8>> {
    let room = Zeroizing::new(Vec::with_capacity(bytes));
    lock_memory();
    room
}

fn question(what: &str, volume: &str) -> String {
    let volume = if volume == "-" { "the volume".into() } else { crate::report::printable(volume) };
    format!("{what} {volume}: ")
}

fn type_in(question: &str, twice: bool, text: &mut Zeroizing<Vec<u8>>) -> Result<()> {
    prompt::ask(question, text)?;
    if twice {
        let mut again = Zeroizing::new(Vec::with_capacity(text.capacity()));
        prompt::ask("once more: ", &mut again)?;
        if **text != *again {
            return Err(Error::usage("the two entries differ"));
        }
    }
    Ok(())
}

/// Where the bytes come from, open.
enum Located<'a> {
    Stream(File),
    Keyring(&'a str),
    Prompt,
}

fn locate<'a>(at: &'a KeyRef, option: &str, warnings: &mut Vec<String>) -> Result<Located<'a>> {
    Ok(match at {
        KeyRef::File(path) => {
            let file = File::options()
                .read(true)
                .custom_flags(OFlags::NOCTTY.bits().cast_signed())
                .open(path)
                .map_err(|error| Error::io("cannot open the key", path.display(), error))?;
            let found = file.metadata().map_err(|error| cannot_read(at, error))?;
            if found.is_file() && found.mode() & 0o077 != 0 {
                warnings.push(format!(
                    "{at} can be read by others (mode {:04o}): `chmod 600` it",
                    found.mode() & 0o7777
                ));
            }
            Located::Stream(file)
        }
        KeyRef::Fd(number) => Located::Stream(duplicate(*number).map_err(|errno| {
            match errno {
                Errno::BADF => Error::usage(format!("{option}: descriptor {number} is not open"))
                    .hint(format!("in a shell: cryptctl … {option} fd:3 3< <(fetch-key)")),
                _ => cannot_read(at, errno),
            }
        })?),
        KeyRef::Keyring(name) => Located::Keyring(name),
        KeyRef::Prompt => Located::Prompt,
    })
}

fn cannot_read(at: &KeyRef, error: impl Into<io::Error>) -> Error {
    match at {
        KeyRef::File(path) => Error::io("cannot read the key", path.display(), error),
        KeyRef::Fd(number) => Error::io("cannot read the key", format_args!("fd:{number}"), error),
        KeyRef::Prompt | KeyRef::Keyring(_) => Error::io("cannot read the key", at, error),
    }
}

impl Secret {
    /// Are both the same bytes? How long it takes tells nothing of where they differ.
    pub fn is_same_as(&self, other: &Self) -> bool {
        let different =
            self.bytes.iter().zip(other.bytes.iter()).fold(0, |all, (one, two)| all | (one ^ two));
        self.bytes.len() == other.bytes.len() && std::hint::black_box(different) == 0
    }

    /// What the daemon takes: the read end of a pipe that holds it all and whose write end is closed; or a sealed memfd, when
    /// no pipe of this user may be that large.
    pub fn into_fd(self) -> Result<OwnedFd> {
        let wrap = |what: &'static str| move |error: io::Error| Error::io("cannot pass the key", what, error);
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).map_err(|errno| wrap("pipe")(errno.into()))?;
        let fits = |size: Result<usize, Errno>| size.is_ok_and(|size| size >= self.bytes.len());
        if fits(fcntl_getpipe_size(&writer)) || fits(fcntl_setpipe_size(&writer, self.bytes.len())) {
            // Into an empty pipe that is large enough: the write cannot block.
            File::from(writer).write_all(&self.bytes).map_err(wrap("pipe"))?;
            return Ok(reader);
        }
        let memory = memfd_create("key", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(|errno| wrap("memfd")(errno.into()))?;
        let mut file = File::from(memory);
        file.write_all(&self.bytes).map_err(wrap("memfd"))?;
        let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
        fcntl_add_seals(&file, seals).map_err(|errno| wrap("memfd")(errno.into()))?;
        Ok(file.into())
    }
}

/// The same open file under a number of our own: its offset is shared, its permissions are not asked again. Unbuffered:
/// the standard library's standard input keeps what it has read, and does not zeroize it.
fn duplicate(number: u32) -> Result<File, Errno> {
    if number == 0 {
        let fd = io::stdin().as_fd().try_clone_to_owned();
        return fd.map(File::from).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO));
    }
    let raw = RawFd::try_from(number).map_err(|_| Errno::BADF)?;
    let us = rustix::process::pidfd_open(rustix::process::getpid(), PidfdFlags::empty());
    match us.and_then(|us| pidfd_getfd(us, raw, PidfdGetfdFlags::empty())) {
        Ok(fd) => Ok(fd.into()),
        Err(Errno::BADF) => Err(Errno::BADF),
        // Before Linux 5.6, and in some containers: open it anew, which works for pipes and for files of our own.
        Err(_) => {
            let path = format!("/proc/self/fd/{number}");
            let opened = open(path, OFlags::RDONLY | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty());
            opened.map(File::from).map_err(|errno| if errno == Errno::NOENT { Errno::BADF } else { errno })
        }
    }
}

/// Fill `text` up to its capacity, never beyond. In steps: of room for a long secret only what is needed is touched.
fn read(mut from: impl Read, text: &mut Zeroizing<Vec<u8>>) -> io::Result<()> {
    const STEP: usize = 64 << 10;
    let capacity = text.capacity();
    let mut filled = 0;
    while filled < capacity {
        text.resize(capacity.min(filled + STEP), 0);
        match from.read(&mut text[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    text.truncate(filled);
    Ok(())
}

fn read_keyring(name: &str, text: &mut Zeroizing<Vec<u8>>) -> Result<()> {
    let key = [KeyRingIdentifier::Session, KeyRingIdentifier::User]
        .map(|ring| KeyRing::from_special_id(ring, false).and_then(|ring| ring.search(name)));
    let key = choose(key).map_err(|error| keyring_error(name, error))?;
    let capacity = text.capacity();
    text.resize(capacity, 0);
    let length = key.read(&mut **text).map_err(|error| keyring_error(name, error))?;
    text.truncate(length);
    Ok(())
}

/// The first key found; if none was, the reason that says most: one found in a bad state is not a missing one.
fn choose(found: [Result<Key, KeyError>; 2]) -> Result<Key, KeyError> {
    let missing = |error| matches!(error, KeyError::KeyDoesNotExist | KeyError::KeyringDoesNotExist);
    let [session, user] = found;
    session.or_else(|first| user.map_err(|second| if missing(first) { second } else { first }))
}

fn keyring_error(name: &str, error: KeyError) -> Error {
    let cannot = |kind, why: &str| Error::new(kind, format!("cannot read the key: keyring:{name}: {why}"));
    match error {
        KeyError::KeyDoesNotExist | KeyError::KeyringDoesNotExist => Error::new(
            ErrorKind::NotFound,
            format!("no user key named {name} in the session or user keyring"),
        )
        .hint(format!("add it with: keyctl padd user {name} @u < KEYFILE")),
        KeyError::KeyExpired => cannot(ErrorKind::NotFound, "it has expired (EKEYEXPIRED)"),
        KeyError::KeyRevoked => cannot(ErrorKind::NotFound, "it was revoked (EKEYREVOKED)"),
        KeyError::KeyRejected => cannot(ErrorKind::Denied, "it was rejected (EKEYREJECTED)"),
        KeyError::PermissionDenied => cannot(ErrorKind::Denied, "operation not permitted (EPERM)"),
        KeyError::AccessDenied => cannot(ErrorKind::Denied, "permission denied (EACCES)")
            .hint("a key must be possessed or readable by you: `keyctl show` and `keyctl rdescribe` tell"),
        KeyError::Unknown(code) => {
            let error = io::Error::from_raw_os_error(code.saturating_abs());
            cannot(ErrorKind::Io, &proto::errno::describe(&error))
        }
        other => cannot(ErrorKind::Io, &other.to_string()),
    }
}

/// Raw bytes or hexadecimal digits to exactly one of `sizes`, in bytes.
fn decode(at: &KeyRef, text: &[u8], sizes: &[usize]) -> Result<Zeroizing<Vec<u8>>> {
    let line = text.strip_suffix(b"\n").unwrap_or(text);
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let digits = !line.is_empty() && line.iter().all(u8::is_ascii_hexdigit);
    let mut key = Zeroizing::new(Vec::with_capacity(text.len()));
    if digits && sizes.iter().any(|size| line.len() == 2 * size) {
        key.extend(line.chunks_exact(2).map(|pair| nibble(pair[0]) << 4 | nibble(pair[1])));
        return Ok(key);
    }
    if sizes.contains(&text.len()) && !digits && *at != KeyRef::Prompt {
        key.extend_from_slice(text);
        return Ok(key);
    }
    let among = |scale: usize| {
        let each: Vec<_> = sizes.iter().map(|size| (scale * size).to_string()).collect();
        each.join(" or ")
    };
    if let (true, &[size], 64 | 128) = (digits, sizes, line.len()) {
        // 64 digits are also 64 bytes. No random key looks like that; a 256-bit key in hexadecimal does.
        let other = if size == 32 { 512 } else { 256 };
        return Err(Error::usage(format!("{at}: hexadecimal digits that are not a {}-bit key", among(8)))
            .hint(format!("for a {other}-bit key pass --key-size {other}")));
    }
    Err(Error::usage(format!(
        "{at}: does not hold a {}-bit key: expected exactly {}{} hexadecimal digits",
        among(8),
        if *at == KeyRef::Prompt { String::new() } else { format!("{} bytes, or ", among(1)) },
        among(2)
    )))
}

fn nibble(digit: u8) -> u8 {
    match digit {
        b'0'..=b'9' => digit - b'0',
        b'a'..=b'f' => digit - b'a' + 10,
        b'A'..=b'F' => digit - b'A' + 10,
        _ => unreachable!("checked to be hexadecimal"),
    }
}

/// Keep this process's memory out of core dumps, debuggers and, as far as the limit allows, swap.
///
/// Failing to is no reason to stop: the daemon, which holds keys for hours, warns about its own limits.
pub fn harden() {
    use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    let _ = setrlimit(Resource::Core, none);
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    lock_memory();
}

/// What is mapped now stays out of swap. What is mapped later is not covered: a limit would then make allocations fail.
fn lock_memory() {
    use rustix::mm::{MlockAllFlags, mlockall};
    let _ = mlockall(MlockAllFlags::CURRENT | MlockAllFlags::ONFAULT);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from_file(content: &[u8], key_bytes: usize) -> Result<Secret> {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("key");
        let mut file =
            File::options().create(true).write(true).truncate(true).mode(0o600).open(&path).expect("create");
        file.write_all(content).expect("write");
        volume_key(&KeyRef::File(path), "--key", &[key_bytes], false)
    }

    #[test]
    fn references_parse() {
        assert_eq!(KeyRef::parse("prompt"), Ok(KeyRef::Prompt));
        assert_eq!(KeyRef::parse("file:/a:b"), Ok(KeyRef::File("/a:b".into())));
        assert_eq!(KeyRef::parse("fd:3"), Ok(KeyRef::Fd(3)));
        assert_eq!(KeyRef::parse("keyring:a b"), Ok(KeyRef::Keyring("a b".into())));
        for bad in [
            "",
            "file:",
            "fd:",
            "fd:-1",
            "fd:1",
            "fd:2",
            "fd:x",
            "keyring:",
            "prompt:",
            "/path",
            "barbican:x",
        ] {
            assert!(KeyRef::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_mistyped_reference_is_not_repeated() {
        let message = KeyRef::parse("0123456789abcdef").expect_err("not a reference");
        assert!(!message.contains("0123"));
    }

    #[test]
    fn raw_bytes_and_digits_give_the_same_key() {
        let raw: Vec<u8> = (0..64).map(|i| i * 3).collect();
        let hex: String = raw.iter().map(|byte| format!("{byte:02X}")).collect();
        assert_eq!(*from_file(&raw, 64).expect("raw").bytes, raw);
        for end in ["", "\n", "\r\n"] {
            assert_eq!(*from_file(format!("{hex}{end}").as_bytes(), 64).expect("hex").bytes, raw);
        }
    }

    #[test]
    fn a_raw_key_may_end_in_a_newline_byte() {
        let mut raw = vec![7u8; 32];
        raw[31] = b'\n';
        assert_eq!(*from_file(&raw, 32).expect("raw").bytes, raw);
    }

    #[test]
    fn a_key_of_another_length_is_refused_without_telling_its_length() {
        for length in [0usize, 1, 31, 33, 63, 65, 67, 200] {
            for size in [32, 64] {
                let Err(error) = from_file(&vec![0xA5; length], size) else {
                    panic!("{length} accepted for {size}")
                };
                let message = error.to_string();
                assert!(message.contains(&format!("exactly {size} bytes")), "{message}");
                if length > 9 {
                    assert!(!message.contains(&format!(" {length} ")), "{message}");
                }
            }
        }
    }

    #[test]
    fn digits_that_are_as_long_as_the_raw_key_are_refused_as_a_likely_mistake() {
        let Err(error) = from_file(&[b'a'; 64], 64) else { panic!("accepted") };
        assert_eq!(error.failure.hint.as_deref(), Some("for a 256-bit key pass --key-size 256"));
        assert!(from_file(&[b'a'; 64], 32).is_ok());
        assert!(from_file(&[b'a'; 32], 32).is_err());
    }

    #[test]
    fn the_pipe_holds_the_key_and_then_ends() {
        let pipe = from_file(&[9; 64], 64).expect("key").into_fd().expect("pipe");
        let mut got = Vec::new();
        File::from(pipe).read_to_end(&mut got).expect("ends");
        assert_eq!(got, [9; 64]);
    }

    #[test]
    fn a_descriptor_is_read_to_its_end() {
        use std::os::fd::AsRawFd;
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).expect("pipe");
        File::from(writer).write_all(&[5; 32]).expect("write");
        let number = u32::try_from(reader.as_raw_fd()).expect("a descriptor");
        assert_eq!(*volume_key(&KeyRef::Fd(number), "--key", &[32], false).expect("key").bytes, [5; 32]);
        for number in [99_999, u32::MAX] {
            let error = volume_key(&KeyRef::Fd(number), "--key", &[32], false)
                .err()
                .expect("no such descriptor")
                .to_string();
            assert!(
                error.starts_with(&format!("cryptctl: --key: descriptor {number} is not open")),
                "{error}"
            );
        }
    }

    #[test]
    fn a_descriptor_is_used_as_it_was_inherited() {
        use std::io::{Seek, SeekFrom};
        use std::os::fd::AsRawFd;
        let number = |fd: &dyn AsRawFd| KeyRef::Fd(u32::try_from(fd.as_raw_fd()).expect("a descriptor"));
        let mut file = tempfile::tempfile().expect("file");
        file.write_all(&[&[1; 32][..], &[2; 32]].concat()).expect("write");
        file.seek(SeekFrom::Start(32)).expect("seek");
        assert_eq!(
            *volume_key(&number(&file), "--key", &[32], false).expect("key").bytes,
            [2; 32],
            "from its offset on"
        );
        // A socket has no path to open it anew by.
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("pair");
        (&theirs).write_all(&[3; 32]).expect("write");
        drop(theirs);
        assert_eq!(*volume_key(&number(&ours), "--key", &[32], false).expect("key").bytes, [3; 32]);
    }

    #[test]
    fn a_key_in_a_bad_state_is_not_called_missing() {
        for (found, words) in [
            ([KeyError::KeyDoesNotExist, KeyError::KeyDoesNotExist], "no user key named k"),
            ([KeyError::KeyRevoked, KeyError::KeyDoesNotExist], "revoked"),
            ([KeyError::KeyDoesNotExist, KeyError::KeyExpired], "expired"),
            ([KeyError::KeyringDoesNotExist, KeyError::AccessDenied], "permission denied"),
            ([KeyError::Unknown(1), KeyError::KeyDoesNotExist], "operation not permitted"),
        ] {
            let error = keyring_error("k", choose(found.map(Err)).expect_err("none")).to_string();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn a_key_others_can_read_warns() {
        use std::os::unix::fs::PermissionsExt;
        let file = tempfile::NamedTempFile::new().expect("file");
        std::fs::write(file.path(), [3; 32]).expect("write");
        std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(0o640)).expect("chmod");
        let key = volume_key(&KeyRef::File(file.path().into()), "--key", &[32], false).expect("key");
        assert!(key.warnings[0].contains("mode 0640"));
    }

    fn phrase(content: &[u8], purpose: Purpose<'_>) -> Result<Secret> {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("key");
        std::fs::write(&path, content).expect("write");
        passphrase(&KeyRef::File(path), "--key", purpose)
    }

    fn through_the_descriptor(secret: Secret) -> (Vec<u8>, bool) {
        let fd = secret.into_fd().unwrap_or_else(|error| panic!("{error}"));
        let kind = rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&fd).expect("fstat").st_mode);
        let mut file = File::from(fd);
        if kind == rustix::fs::FileType::RegularFile {
            use std::io::{Seek, SeekFrom};
            let seals = rustix::fs::fcntl_get_seals(&file).expect("a memfd");
            assert!(seals.contains(SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK));
            file.seek(SeekFrom::Start(0)).expect("seek");
        }
        let mut got = Vec::new();
        file.read_to_end(&mut got).expect("ends");
        (got, kind == rustix::fs::FileType::Fifo)
    }

    #[test]
    fn a_passphrase_is_every_byte_whatever_its_length() {
        let long: Vec<u8> = (0..=250).cycle().take(MAX_SECRET).collect();
        for length in [1, 64, 65_536, 65_537, 1 << 20, (1 << 20) + 1, MAX_SECRET] {
            let secret =
                phrase(&long[..length], Purpose::Open("v")).unwrap_or_else(|error| panic!("{error}"));
            let (got, pipe) = through_the_descriptor(secret);
            assert!(got == long[..length], "{length} bytes");
            assert!(pipe || length > 65_536, "{length} bytes fit a pipe");
        }
        for content in [&b"a\n"[..], b"\n", b"\0", b"a\r\n", &[b'0'; 64]] {
            let secret = phrase(content, Purpose::Open("v")).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(through_the_descriptor(secret).0, content);
        }
    }

    #[test]
    fn an_empty_or_an_endless_passphrase_is_refused() {
        assert!(
            phrase(b"", Purpose::New("v")).err().expect("empty").to_string().contains("must not be empty")
        );
        let error = phrase(&vec![1; MAX_SECRET + 1], Purpose::New("v")).err().expect("long");
        assert!(error.to_string().contains("longer than the 8388608 bytes"), "{error}");
        let error = passphrase(&KeyRef::File("/dev/zero".into()), "--key", Purpose::Open("v")).err();
        assert!(error.expect("endless").to_string().contains("longer than"));
    }

    #[test]
    fn a_newline_at_the_end_warns_before_and_explains_afterwards() {
        let new = phrase(b"x\n", Purpose::New("v")).unwrap_or_else(|error| panic!("{error}"));
        assert!(new.doubt.is_none());
        assert!(new.warnings.iter().any(|warning| warning.contains("the newline is part of the key")));
        let old = phrase(b"x\n", Purpose::Open("v")).unwrap_or_else(|error| panic!("{error}"));
        assert!(old.doubt.is_some_and(|doubt| doubt.contains("the newline is part of the key")));
        assert!(!old.warnings.iter().any(|warning| warning.contains("newline")));
        assert!(phrase(b"x\ny", Purpose::Open("v")).is_ok_and(|secret| secret.doubt.is_none()));
    }

    #[test]
    fn a_volume_key_of_unknown_size_is_told_by_its_length() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("key");
        let key = |content: &[u8]| {
            std::fs::write(&path, content).expect("write");
            volume_key(&KeyRef::File(path.clone()), "--volume-key", &VOLUME_KEY_BYTES, false)
        };
        for (content, length) in
            [(vec![7; 32], 32), (vec![7; 64], 64), (vec![b'a'; 64], 32), (vec![b'a'; 128], 64)]
        {
            assert_eq!(
                key(&content).map(|key| key.bytes.len()).unwrap_or_else(|error| panic!("{error}")),
                length
            );
        }
        for length in [0, 31, 33, 63, 65, 127] {
            let error = key(&vec![7; length]).err().expect("no key").to_string();
            assert!(error.contains("exactly 32 or 64 bytes, or 64 or 128 hexadecimal digits"), "{error}");
        }
    }

    #[test]
    fn one_descriptor_is_not_two_secrets() {
        assert!(refuse_shared(&[&KeyRef::Fd(3), &KeyRef::Prompt, &KeyRef::Fd(3)]).is_err());
        assert!(refuse_shared(&[&KeyRef::Fd(3), &KeyRef::Fd(4), &KeyRef::Prompt, &KeyRef::Prompt]).is_ok());
    }
}
