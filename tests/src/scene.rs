//! LUKS volumes for tests: made and read by cryptsetup in a directory of its own, opened by the engine.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use engine::backend::blocking::Blocking;
use engine::crypto::Secret;
use engine::format::luks2::Loaded;
use engine::volume::Header;
use engine::volume::unlock::{self, Unlocked, WRONG_KEY};
use proto::ErrorKind;
use serde_json::Value;

use crate::{Scratch, skip};

/// A mebibyte.
pub const MIB: u64 = 1 << 20;
/// What opens the volumes.
pub const PASSPHRASE: &[u8] = b"correct horse";
/// Key derivations of no cost: what is tested is not their strength.
pub const QUICK: &str = "--pbkdf pbkdf2 --pbkdf-force-iterations 1000";
/// The same for argon2.
pub const QUICK_ARGON2: &str = "--pbkdf-force-iterations 4 --pbkdf-memory 32 --pbkdf-parallel 1";

/// A program of the system, with nothing of ours in its environment.
#[must_use]
pub fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("LC_ALL", "C").stdin(Stdio::null());
    command
}

/// Is it not there? Says so.
#[must_use]
pub fn is_missing(program: &str) -> bool {
    let missing = command(program).arg("--version").output().is_err();
    if missing {
        skip(&format!("no {program}"));
    }
    missing
}

/// A volume in a file, and the passphrase in another.
#[derive(Debug)]
pub struct Scene {
    /// Its directory.
    pub dir: Scratch,
}

impl Scene {
    /// An empty directory but for the passphrase.
    #[must_use]
    pub fn new() -> Self {
        let dir = Scratch::new();
        dir.file("key", PASSPHRASE);
        Self { dir }
    }

    /// A path in it.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// A file of zeros.
    pub fn sized(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.path(name);
        File::create(&path).and_then(|file| file.set_len(bytes)).expect("a file of zeros");
        path
    }

    /// cryptsetup with these words, `@` standing for this directory.
    pub fn try_cryptsetup(&self, words: &str) -> Output {
        let dir = self.dir.path().display().to_string();
        let words = words.split_whitespace().map(|word| word.replace('@', &dir));
        command("cryptsetup").arg("--batch-mode").args(words).output().expect("cryptsetup runs")
    }

    /// cryptsetup, which must succeed; its output.
    pub fn cryptsetup(&self, words: &str) -> String {
        let output = self.try_cryptsetup(words);
        assert!(
            output.status.success(),
            "cryptsetup {words}: {} {}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).expect("text")
    }

    /// A volume of 20 MiB made by cryptsetup.
    pub fn format(&self, words: &str) {
        self.sized("volume", 20 * MIB);
        self.cryptsetup(&format!("luksFormat --key-file @/key @/volume {words}"));
    }

    /// The volume key as cryptsetup sees it.
    pub fn volume_key(&self, name: &str, words: &str) -> Vec<u8> {
        let _ = std::fs::remove_file(self.path("dumped"));
        self.cryptsetup(&format!(
            "luksDump @/{name} --dump-volume-key --volume-key-file @/dumped --key-file @/key {words}"
        ));
        std::fs::read(self.path("dumped")).expect("a dumped key")
    }

    /// A file in it.
    #[must_use]
    pub fn device(&self, name: &str) -> Blocking {
        device(&self.path(name))
    }

    /// The header in a file.
    #[must_use]
    pub fn load(&self, name: &str) -> (Blocking, Header) {
        let mut device = self.device(name);
        let header = Header::load(&mut device).unwrap_or_else(|error| panic!("{name}: {}", error.chain()));
        (device, header)
    }

    /// Put bytes over those of a file.
    pub fn overwrite(&self, name: &str, offset: u64, bytes: &[u8]) {
        let file = OpenOptions::new().write(true).open(self.path(name)).expect("opens");
        file.write_all_at(bytes, offset).expect("written");
    }

    /// The JSON metadata as cryptsetup shows it.
    #[must_use]
    pub fn metadata(&self, name: &str) -> Value {
        let text = self.cryptsetup(&format!("luksDump --dump-json-metadata @/{name}"));
        serde_json::from_str(&text).expect("JSON")
    }
}

/// A file, to be read and written.
#[must_use]
pub fn device(path: &Path) -> Blocking {
    let file = OpenOptions::new().read(true).write(true).open(path).expect("opens");
    Blocking::open(Arc::new(file.into()), "volume", 1).expect("a device")
}

/// These bytes as a secret.
#[must_use]
pub fn secret(bytes: &[u8]) -> Secret {
    Secret::copy_of(bytes).expect("memory for a secret")
}

/// Open a volume with the passphrase.
///
/// # Errors
/// As `with_passphrase`.
pub fn open(scene: &Scene, name: &str) -> engine::error::Result<Unlocked> {
    open_with(scene, name, PASSPHRASE, None)
}

/// Open a volume with another passphrase, or a certain keyslot.
///
/// # Errors
/// As `with_passphrase`.
pub fn open_with(
    scene: &Scene,
    name: &str,
    passphrase: &[u8],
    only: Option<u32>,
) -> engine::error::Result<Unlocked> {
    let (mut device, header) = scene.load(name);
    unlock::with_passphrase(&mut device, &header, &secret(passphrase), only, &|| false)
}

/// It failed with the one phrase, and nothing else.
///
/// # Panics
/// If not.
pub fn assert_wrong_key(opened: engine::error::Result<Unlocked>) {
    let error = opened.expect_err("refused");
    assert_eq!((error.kind(), error.chain().as_str()), (ErrorKind::WrongKey, WRONG_KEY));
}

/// It failed with this kind and these words.
///
/// # Panics
/// If not.
pub fn refusal<T: std::fmt::Debug>(result: engine::error::Result<T>, kind: ErrorKind, words: &[&str]) {
    let error = result.expect_err("refused");
    assert_eq!(error.kind(), kind, "{}", error.chain());
    for word in words {
        assert!(error.chain().contains(word), "{} has no {word}", error.chain());
    }
}

/// Of a LUKS2 header.
#[must_use]
pub fn loaded(header: Header) -> Loaded {
    match header {
        Header::Luks2(loaded) => *loaded,
        Header::Luks1(_) => panic!("LUKS1"),
    }
}

impl Default for Scene {
    fn default() -> Self {
        Self::new()
    }
}
