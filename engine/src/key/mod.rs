//! Secrets that arrive through a descriptor. Control side only: workers never see one.
//!
//! What is accepted can neither block the reader nor change under it: the read end of a pipe that already holds everything
//! and has no writer left, or a memfd sealed against writing and resizing. Files, sockets and terminals are refused. The
//! bytes go straight into zero-on-drop memory; no length or byte of them appears in an error.

mod descriptors;

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FileType, OFlags, SealFlags};
use rustix::io::Errno;

use crate::crypto::Secret;
use crate::error::{Error, ErrorKind, Result};
pub use descriptors::Descriptors;

/// First room for a secret from a pipe; it doubles up to the bound.
const FIRST_BYTES: usize = 4096;

/// Read the whole secret, at most `max` bytes. The descriptor is closed in every case.
///
/// # Errors
/// `Invalid`: wrong kind of descriptor, still open for writing, empty, or longer than `max`.
pub fn read_secret(fd: OwnedFd, max: usize) -> Result<Secret> {
    let stat = rustix::fs::fstat(&fd).map_err(|error| Error::io("cannot inspect key descriptor", error))?;
    let flags =
        rustix::fs::fcntl_getfl(&fd).map_err(|error| Error::io("cannot inspect key descriptor", error))?;
    if flags.contains(OFlags::WRONLY) {
        return Err(wrong_kind());
    }
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Fifo if !flags.contains(OFlags::RDWR) => read_pipe(&fd, flags, max),
        FileType::RegularFile => read_sealed(&fd, u64::try_from(stat.st_size).unwrap_or(0), max),
        _ => Err(wrong_kind()),
    }
}

fn wrong_kind() -> Error {
    Error::new(ErrorKind::Invalid, "descriptor of the wrong kind for a key")
        .hint("pass the read end of a pipe whose write end is closed, or a sealed memfd")
}

fn too_long(max: usize) -> Error {
    Error::new(ErrorKind::Invalid, format!("key longer than the {max} bytes allowed here"))
}

/// A growing secret would leave copies behind; each step moves into a new one, and the old is zeroed by its drop.
fn read_pipe(fd: &OwnedFd, flags: OFlags, max: usize) -> Result<Secret> {
    rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK)
        .map_err(|error| Error::io("cannot read key descriptor", error))?;
    let mut secret = Secret::zeroed(FIRST_BYTES.min(max + 1))?;
    let mut filled = 0;
    loop {
        if filled == secret.as_bytes().len() {
            if filled > max {
                return Err(too_long(max));
            }
            let mut larger = Secret::zeroed((filled * 2).min(max + 1))?;
            larger.as_mut_bytes()[..filled].copy_from_slice(secret.as_bytes());
            secret = larger;
        }
        match rustix::io::read(fd, &mut secret.as_mut_bytes()[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                return Err(Error::new(ErrorKind::Invalid, "key descriptor is still open for writing")
                    .hint("write the whole key and close the write end before passing the read end"));
            }
            Err(error) => return Err(Error::io("cannot read key descriptor", error)),
        }
    }
    exactly(&secret, filled, max)
}

fn read_sealed(fd: &OwnedFd, size: u64, max: usize) -> Result<Secret> {
    let seals = rustix::fs::fcntl_get_seals(fd.as_fd()).map_err(|_| wrong_kind())?;
    if !seals.contains(SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW) {
        return Err(wrong_kind());
    }
    let size = usize::try_from(size).ok().filter(|size| *size <= max).ok_or_else(|| too_long(max))?;
    if size == 0 {
        return Err(empty());
    }
    let mut secret = Secret::zeroed(size)?;
    let mut filled = 0;
    while filled < size {
        // By offset: the descriptor's position is shared with the client, who may have left it at the end.
        let at = u64::try_from(filled).expect("a length in memory");
        match rustix::io::pread(fd, &mut secret.as_mut_bytes()[filled..], at) {
            Ok(0) => return Err(wrong_kind()),
            Ok(count) => filled += count,
            Err(Errno::INTR) => {}
            Err(error) => return Err(Error::io("cannot read key descriptor", error)),
        }
    }
    Ok(secret)
}

fn empty() -> Error {
    Error::new(ErrorKind::Invalid, "key descriptor is empty")
}

fn exactly(secret: &Secret, filled: usize, max: usize) -> Result<Secret> {
    if filled == 0 {
        return Err(empty());
    }
    if filled > max {
        return Err(too_long(max));
    }
    Secret::copy_of(&secret.as_bytes()[..filled])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn pipe_with(bytes: &[u8]) -> (OwnedFd, std::fs::File) {
        let (read, write) = rustix::pipe::pipe().expect("pipe");
        let mut write = std::fs::File::from(write);
        write.write_all(bytes).expect("fits the pipe");
        (read, write)
    }

    fn memfd_with(bytes: &[u8], seals: SealFlags) -> OwnedFd {
        let fd = rustix::fs::memfd_create("key", rustix::fs::MemfdFlags::ALLOW_SEALING).expect("memfd");
        let mut file = std::fs::File::from(fd);
        file.write_all(bytes).expect("written");
        rustix::fs::fcntl_add_seals(&file, seals).expect("sealed");
        file.into()
    }

    const SEALED: SealFlags = SealFlags::WRITE.union(SealFlags::SHRINK).union(SealFlags::GROW);

    fn refusal(fd: OwnedFd) -> String {
        let error = read_secret(fd, 64).map(|_| ()).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Invalid);
        error.chain()
    }

    #[test]
    fn a_closed_pipe_gives_its_bytes() {
        for length in [1, 63, 64] {
            let bytes: Vec<u8> = (0..length).collect();
            let (read, write) = pipe_with(&bytes);
            drop(write);
            assert_eq!(read_secret(read, 64).expect("read").as_bytes(), bytes);
        }
    }

    #[test]
    fn a_long_secret_survives_growing() {
        let bytes: Vec<u8> = (0..60_000_u32).map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect();
        let (read, write) = pipe_with(&bytes);
        drop(write);
        assert_eq!(read_secret(read, proto::MAX_SECRET).expect("read").as_bytes(), bytes);
    }

    #[test]
    fn an_open_pipe_is_refused_and_never_waited_for() {
        let (read, _write) = pipe_with(b"half a secret");
        assert!(refusal(read).contains("still open for writing"));
        let (read, _write) = pipe_with(b"");
        assert!(refusal(read).contains("still open for writing"));
    }

    #[test]
    fn empty_and_oversized_secrets_are_refused_at_the_boundary() {
        let (read, write) = pipe_with(b"");
        drop(write);
        assert!(refusal(read).contains("empty"));
        let (read, write) = pipe_with(&[7; 65]);
        drop(write);
        assert!(refusal(read).contains("longer than the 64 bytes"));
        assert!(refusal(memfd_with(&[], SEALED)).contains("empty"));
        assert!(refusal(memfd_with(&[7; 65], SEALED)).contains("longer than the 64 bytes"));
    }

    #[test]
    fn a_sealed_memfd_is_read_from_its_start_whatever_its_position() {
        let secret = read_secret(memfd_with(&[9; 64], SEALED), 64).expect("read");
        assert_eq!(secret.as_bytes(), [9; 64]);
    }

    #[test]
    fn every_missing_seal_is_refused() {
        for seal in [SealFlags::WRITE, SealFlags::SHRINK, SealFlags::GROW] {
            assert!(refusal(memfd_with(&[9; 64], SEALED.difference(seal))).contains("wrong kind"));
        }
    }

    #[test]
    fn other_descriptors_are_of_the_wrong_kind() {
        let (_read, write) = rustix::pipe::pipe().expect("pipe");
        assert!(refusal(write).contains("wrong kind"));
        let file = std::fs::File::open("/proc/self/exe").expect("opens");
        assert!(refusal(file.into()).contains("wrong kind"));
        let directory = std::fs::File::open("/").expect("opens");
        assert!(refusal(directory.into()).contains("wrong kind"));
        let zero = std::fs::File::open("/dev/zero").expect("opens");
        assert!(refusal(zero.into()).contains("wrong kind"));
        let (socket, _other) = std::os::unix::net::UnixStream::pair().expect("pair");
        assert!(refusal(socket.into()).contains("wrong kind"));
    }
}
