//! LUKS2 headers in files and in memory, and cryptsetup's word about them.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use engine::crypto::hash::Hash;
use engine::error::{Error, ErrorKind, Result};
use engine::format::luks2::{Copy, Header, Loaded, load};

use crate::Scratch;

/// Key derivation that takes no time.
pub const QUICK: [&str; 4] = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];

/// Is there a cryptsetup to ask?
#[must_use]
pub fn has_cryptsetup() -> bool {
    Command::new("cryptsetup").arg("--version").output().is_ok_and(|output| output.status.success())
}

/// Run it; words of one string are separated by spaces.
///
/// # Panics
/// If it cannot be started.
#[must_use]
pub fn cryptsetup(words: &[&str], paths: &[&Path]) -> Output {
    let words = words.iter().flat_map(|words| words.split_whitespace());
    Command::new("cryptsetup").args(words).args(paths).output().expect("cryptsetup starts")
}

/// Run it and expect success.
///
/// # Panics
/// If it fails.
pub fn cryptsetup_does(words: &[&str], paths: &[&Path]) {
    let output = cryptsetup(words, paths);
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Does it find a valid LUKS2 header in this file? (Whatever it repairs on the way, it repairs in a copy.)
#[must_use]
pub fn cryptsetup_accepts(scratch: &Scratch, image: &Path) -> bool {
    cryptsetup_dump(scratch, image).is_some()
}

/// What its `luksDump` prints, if it finds a valid LUKS2 header.
///
/// # Panics
/// If the file cannot be copied.
#[must_use]
pub fn cryptsetup_dump(scratch: &Scratch, image: &Path) -> Option<String> {
    let copy = scratch.join("asked");
    let copied = Command::new("cp").arg("--sparse=always").arg(image).arg(&copy).status().expect("cp starts");
    assert!(copied.success(), "cp");
    let output = cryptsetup(&["luksDump"], &[&copy]);
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A line of `luksDump`: what follows `name:`.
#[must_use]
pub fn dumped<'a>(dump: &'a str, name: &str) -> Option<&'a str> {
    dump.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}

/// Our own reading of a file.
///
/// # Errors
/// Those of [`load`].
///
/// # Panics
/// If there is no such file.
pub fn load_file(path: &Path) -> Result<Loaded> {
    let file = std::fs::File::open(path).expect("the image is there");
    load(&mut |offset, into| {
        file.read_exact_at(into, offset).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => Error::new(ErrorKind::Invalid, "file ends").because(error),
            _ => Error::io("read failed", error),
        })
    })
}

/// Our own reading of bytes.
///
/// # Errors
/// Those of [`load`].
pub fn load_bytes(bytes: &[u8]) -> Result<Loaded> {
    load(&mut |offset, into| {
        let from = usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..)?.get(..into.len()));
        into.copy_from_slice(from.ok_or_else(|| Error::new(ErrorKind::Invalid, "file ends"))?);
        Ok(())
    })
}

/// The first `length` bytes of a file.
///
/// # Panics
/// If it is shorter.
#[must_use]
pub fn head(path: &Path, length: u64) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(length).expect("small")];
    std::fs::File::open(path)
        .and_then(|file| file.read_exact_at(&mut bytes, 0))
        .expect("the file is long enough");
    bytes
}

/// Both copies of a header, one after the other.
///
/// # Panics
/// If it is not valid.
#[must_use]
pub fn copies(header: &Header) -> Vec<u8> {
    let bytes = |copy| header.to_bytes(copy).expect("a valid header");
    [bytes(Copy::Primary), bytes(Copy::Secondary)].concat()
}

/// A sparse file of `size` bytes that begins with `bytes`.
///
/// # Panics
/// If it cannot be written.
#[must_use]
pub fn image(scratch: &Scratch, name: &str, bytes: &[u8], size: u64) -> PathBuf {
    let path = scratch.file(name, bytes);
    let file = std::fs::OpenOptions::new().write(true).open(&path).expect("just written");
    file.set_len(size).expect("a sparse file");
    path
}

/// Make the SHA-256 checksum of one copy right, whatever its content is.
pub fn reseal(copy: &mut [u8]) {
    copy[448..512].fill(0);
    let mut sum = [0; 32];
    Hash::Sha256.digest(&[copy], &mut sum);
    copy[448..480].copy_from_slice(&sum);
}

/// Give one copy another JSON text, and the checksum for it.
///
/// # Panics
/// If it does not fit.
pub fn replace_text(copy: &mut [u8], text: &[u8]) {
    copy[4096..].fill(0);
    copy[4096..4096 + text.len()].copy_from_slice(text);
    reseal(copy);
}
