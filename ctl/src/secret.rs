//! Key references: where a key is, fetching it, and the pipe it travels in.
//!
//! Bytes are held in zeroized buffers that never grow (a growing buffer leaves copies behind). They leave this
//! process only through a pipe that is full and closed before the request is sent: pipe memory never reaches swap, and no
//! argument, environment or JSON holds a key. No message tells a secret or its length; the length expected may be told.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::PathBuf;

use linux_keyutils::{Key, KeyError, KeyRing, KeyRingIdentifier};
use proto::ErrorKind;
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd};
use zeroize::Zeroizing;

use crate::prompt;
use crate::report::{Error, Result};

/// What was typed after `--key`. Not parsed by clap, which repeats what it cannot parse: that may be the key itself.
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
    /// What it refers to.
    pub fn parse(&self) -> Result<KeyRef> {
        KeyRef::parse(&self.0).map_err(|why| Error::usage(format!("--key: {why}")))
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

/// A volume key, with what the user should know about where it lay.
pub struct VolumeKey {
    bytes: Zeroizing<Vec<u8>>,
    /// Sentences without a full stop.
    pub warnings: Vec<String>,
}

/// Fetch a volume key of exactly `key_bytes` bytes, given as raw bytes or as hexadecimal digits. `twice`: a prompt asks again.
pub fn fetch(at: &KeyRef, key_bytes: usize, twice: bool) -> Result<VolumeKey> {
    // One byte more than the longest right answer (digits, CR, LF) tells a longer one apart without holding it.
    let mut text = Zeroizing::new(Vec::with_capacity(2 * key_bytes + 3));
    let mut warnings = Vec::new();
    match at {
        KeyRef::File(path) => {
            let file = File::options()
                .read(true)
                .custom_flags(OFlags::NOCTTY.bits().cast_signed())
                .open(path)
                .map_err(|error| Error::io("cannot open the key", path.display(), error))?;
            let mode = file
                .metadata()
                .map_err(|error| Error::io("cannot read the key", path.display(), error))?
                .mode();
            if mode & 0o077 != 0 {
                warnings
                    .push(format!("{at} can be read by others (mode {:04o}): `chmod 600` it", mode & 0o7777));
            }
            read(file, &mut text).map_err(|error| Error::io("cannot read the key", path.display(), error))?;
        }
        KeyRef::Fd(number) => {
            let file = duplicate(*number).map_err(|errno| match errno {
                Errno::BADF => Error::usage(format!("--key: descriptor {number} is not open"))
                    .hint("in a shell: cryptctl … --key fd:3 3< <(fetch-key)"),
                _ => Error::io("cannot read the key", format_args!("fd:{number}"), errno),
            })?;
            read(file, &mut text)
                .map_err(|error| Error::io("cannot read the key", format_args!("fd:{number}"), error))?;
        }
        KeyRef::Prompt => {
            prompt::ask("volume key (hexadecimal digits): ", &mut text)?;
            if twice {
                let mut again = Zeroizing::new(Vec::with_capacity(text.capacity()));
                prompt::ask("once more: ", &mut again)?;
                if *text != *again {
                    return Err(Error::usage("the two entries differ"));
                }
            }
        }
        KeyRef::Keyring(name) => read_keyring(name, &mut text)?,
    }
    Ok(VolumeKey { bytes: decode(at, &text, key_bytes)?, warnings })
}

impl VolumeKey {
    /// The read end of a pipe that holds the whole key and whose write end is closed.
    pub fn into_pipe(self) -> Result<OwnedFd> {
        // At most 64 bytes into an empty pipe of at least one page: the write cannot block.
        let wrap = |error: io::Error| Error::io("cannot pass the key", "pipe", error);
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).map_err(|errno| wrap(errno.into()))?;
        File::from(writer).write_all(&self.bytes).map_err(wrap)?;
        Ok(reader)
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

/// Fill `text` up to its capacity, never beyond.
fn read(mut from: impl Read, text: &mut Zeroizing<Vec<u8>>) -> io::Result<()> {
    let capacity = text.capacity();
    text.resize(capacity, 0);
    let mut filled = 0;
    while filled < capacity {
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

/// Raw bytes or hexadecimal digits to exactly `key_bytes` bytes.
fn decode(at: &KeyRef, text: &[u8], key_bytes: usize) -> Result<Zeroizing<Vec<u8>>> {
    let line = text.strip_suffix(b"\n").unwrap_or(text);
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let digits = !line.is_empty() && line.iter().all(u8::is_ascii_hexdigit);
    let mut key = Zeroizing::new(Vec::with_capacity(key_bytes));
    if digits && line.len() == 2 * key_bytes {
        key.extend(line.chunks_exact(2).map(|pair| nibble(pair[0]) << 4 | nibble(pair[1])));
        Ok(key)
    } else if text.len() == key_bytes && !digits && *at != KeyRef::Prompt {
        key.extend_from_slice(text);
        Ok(key)
    } else if digits && matches!(line.len(), 64 | 128) {
        // 64 digits are also 64 bytes. No random key looks like that; a 256-bit key in hexadecimal does.
        let other = if key_bytes == 32 { 512 } else { 256 };
        Err(Error::usage(format!("{at}: hexadecimal digits that are not a {}-bit key", key_bytes * 8))
            .hint(format!("for a {other}-bit key pass --key-size {other}")))
    } else {
        Err(Error::usage(format!(
            "{at}: does not hold a {}-bit key: expected exactly {}{} hexadecimal digits",
            key_bytes * 8,
            if *at == KeyRef::Prompt { String::new() } else { format!("{key_bytes} bytes, or ") },
            2 * key_bytes
        )))
    }
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
    use rustix::mm::{MlockAllFlags, mlockall};
    use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    let _ = setrlimit(Resource::Core, none);
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    let _ = mlockall(MlockAllFlags::CURRENT | MlockAllFlags::ONFAULT);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from_file(content: &[u8], key_bytes: usize) -> Result<VolumeKey> {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("key");
        let mut file =
            File::options().create(true).write(true).truncate(true).mode(0o600).open(&path).expect("create");
        file.write_all(content).expect("write");
        fetch(&KeyRef::File(path), key_bytes, false)
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
        let pipe = from_file(&[9; 64], 64).expect("key").into_pipe().expect("pipe");
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
        assert_eq!(*fetch(&KeyRef::Fd(number), 32, false).expect("key").bytes, [5; 32]);
        for number in [99_999, u32::MAX] {
            let error = fetch(&KeyRef::Fd(number), 32, false).err().expect("no such descriptor").to_string();
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
        assert_eq!(*fetch(&number(&file), 32, false).expect("key").bytes, [2; 32], "from its offset on");
        // A socket has no path to open it anew by.
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("pair");
        (&theirs).write_all(&[3; 32]).expect("write");
        drop(theirs);
        assert_eq!(*fetch(&number(&ours), 32, false).expect("key").bytes, [3; 32]);
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
        let key = fetch(&KeyRef::File(file.path().into()), 32, false).expect("key");
        assert!(key.warnings[0].contains("mode 0640"));
    }
}
