//! LUKS volumes made by cryptsetup, and header operations asked of `manage::carry_out` with real descriptors.
//!
//! Passphrases are `one` to `four`; each volume begins with `one`. KDFs are as cheap as they may be: the tests ask about headers.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use engine::error::{Error, Result};
use engine::volume::manage::{Caller, carry_out};
use proto::ErrorKind;
use proto::luks::{
    Doctor, Done, File as Named, KdfKind, KdfWish, NewFile, Operation, Reply, Request, Secret, Version,
};
use serde_json::Value;

use crate::{Scratch, skip};

/// Cheap and legal.
pub const ITERATIONS: u32 = 1000;

/// cryptsetup with these words; `None`, said loudly, where there is none.
#[must_use]
pub fn cryptsetup(words: &[&str]) -> Option<Output> {
    match Command::new("cryptsetup").args(words).output() {
        Ok(output) => Some(output),
        Err(_) => {
            skip("cryptsetup is not installed");
            None
        }
    }
}

/// As [`cryptsetup`], and it must succeed.
///
/// # Panics
/// When it fails.
pub fn does(words: &[&str]) {
    let output = cryptsetup(words).expect("looked for when the volume was made");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "cryptsetup {words:?}: {said}");
}

/// A volume in a file.
pub struct Volume {
    /// Where it and its key files are.
    pub scratch: Scratch,
    /// The file.
    pub path: PathBuf,
}

/// Both on-disk formats.
pub const BOTH: [Version; 2] = [Version::Luks1, Version::Luks2];
/// cryptsetup's words for a cheap KDF.
pub const KDF: [&str; 4] = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];

impl Volume {
    /// Made by cryptsetup with the passphrase `one`.
    #[must_use]
    pub fn new(version: Version) -> Option<Self> {
        Self::with(version, &[])
    }

    /// Made with these words of cryptsetup too.
    ///
    /// # Panics
    /// When it cannot be done here.
    #[must_use]
    pub fn with(version: Version, words: &[&str]) -> Option<Self> {
        cryptsetup(&["--version"])?;
        let scratch = Scratch::new();
        let path = scratch.join("volume");
        File::create(&path).expect("create").set_len(24 << 20).expect("extend");
        let volume = Self { scratch, path };
        let kind = if version == Version::Luks1 { "luks1" } else { "luks2" };
        let key = volume.key_file("one");
        let mut all = vec!["luksFormat", "--batch-mode", "--type", kind, "--key-file", &key];
        all.extend(KDF);
        all.extend(words);
        let path = volume.name();
        all.push(&path);
        does(&all);
        Some(volume)
    }

    /// Its path as text.
    ///
    /// # Panics
    /// When it cannot be done here.
    #[must_use]
    pub fn name(&self) -> String {
        self.path.to_str().expect("UTF-8").to_owned()
    }

    /// A file that holds the passphrase; its path.
    ///
    /// # Panics
    /// When it cannot be done here.
    #[must_use]
    pub fn key_file(&self, passphrase: &str) -> String {
        let path = self.scratch.file(&format!("key-{passphrase}"), passphrase.as_bytes());
        path.to_str().expect("UTF-8").to_owned()
    }

    /// cryptsetup VERB … with the passphrase, on the volume.
    ///
    /// # Panics
    /// When it fails.
    pub fn cryptsetup(&self, verb: &str, passphrase: &str, words: &[&str], after: &[&str]) {
        let (key, path) = (self.key_file(passphrase), self.name());
        let mut all = vec![verb, "--batch-mode", "--key-file", &key];
        all.extend(words);
        all.push(&path);
        all.extend(after);
        does(&all);
    }

    /// luksAddKey of cryptsetup.
    ///
    /// # Panics
    /// When it fails.
    pub fn they_add(&self, old: &str, new: &str) {
        self.cryptsetup("luksAddKey", old, &KDF, &[&self.key_file(new)]);
    }

    /// Does cryptsetup open it with the passphrase?
    ///
    /// # Panics
    /// When it fails.
    pub fn they_open(&self, passphrase: &str) -> bool {
        let (key, path) = (self.key_file(passphrase), self.name());
        let words = ["open", "--test-passphrase", "--key-file", &key, &path];
        cryptsetup(&words).expect("installed").status.success()
    }

    /// Does it open for us? The keyslot.
    ///
    /// # Errors
    /// What the operation says.
    pub fn we_open(&self, passphrase: &str) -> Result<Option<u32>> {
        let operation = |key_fd| Operation::OpenTest { key_fd, secret: Secret::Passphrase, keyslot: None };
        let reply = Ask::new(self).secret(passphrase.as_bytes()).run(operation(1))?;
        Ok(done(reply).keyslot)
    }

    /// Both programs open it with exactly these of all passphrases these tests use, and cryptsetup reads the header.
    ///
    /// # Panics
    /// When it fails.
    #[track_caller]
    pub fn is_opened_by(&self, passphrases: &[&str]) {
        does(&["luksDump", &self.name()]);
        for passphrase in ["one", "two", "three", "four"] {
            let wanted = passphrases.contains(&passphrase);
            assert_eq!(self.they_open(passphrase), wanted, "cryptsetup and {passphrase}");
            match self.we_open(passphrase) {
                Ok(_) => assert!(wanted, "we opened it with {passphrase}"),
                Err(error) => {
                    assert!(!wanted, "we did not open it with {passphrase}: {}", error.chain());
                    assert!(matches!(error.kind(), ErrorKind::WrongKey | ErrorKind::NotFound));
                }
            }
        }
    }

    /// All of the file.
    ///
    /// # Panics
    /// When it cannot be done here.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        fs::read(&self.path).expect("read")
    }

    /// cryptsetup's own view of a LUKS2 header.
    ///
    /// # Panics
    /// When it fails.
    pub fn json(&self) -> Value {
        let output = cryptsetup(&["luksDump", "--dump-json-metadata", &self.name()]).expect("installed");
        assert!(output.status.success());
        serde_json::from_slice(&output.stdout).expect("JSON")
    }

    /// Overwrite bytes behind everybody's back.
    ///
    /// # Panics
    /// When it fails.
    pub fn damage(&self, offset: u64, bytes: &[u8]) {
        let file = File::options().write(true).open(&self.path).expect("open");
        file.write_all_at(bytes, offset).expect("written");
    }

    /// Ask us for another passphrase.
    ///
    /// # Errors
    /// What the operation says.
    pub fn add(&self, old: &str, new: &str, keyslot: Option<u32>) -> Result<Done> {
        let ask = Ask::new(self).secret(old.as_bytes()).secret(new.as_bytes());
        let secret = Secret::Passphrase;
        ask.run(Operation::AddKey { key_fd: 1, secret, new_key_fd: 2, keyslot, kdf: cheap() }).map(done)
    }

    /// Ask us to replace a passphrase.
    ///
    /// # Errors
    /// What the operation says.
    pub fn change(&self, old: &str, new: &str, keyslot: Option<u32>) -> Result<Done> {
        let ask = Ask::new(self).secret(old.as_bytes()).secret(new.as_bytes());
        ask.run(Operation::ChangeKey { key_fd: 1, new_key_fd: 2, keyslot, kdf: cheap() }).map(done)
    }

    /// Ask us to destroy a keyslot.
    ///
    /// # Errors
    /// What the operation says.
    pub fn remove(&self, passphrase: Option<&str>, keyslot: Option<u32>, allow_last: bool) -> Result<Done> {
        let mut ask = Ask::new(self);
        if let Some(passphrase) = passphrase {
            ask = ask.secret(passphrase.as_bytes());
        }
        let key_fd = passphrase.map(|_| 1);
        ask.run(Operation::RemoveKey { key_fd, keyslot, allow_last }).map(done)
    }

    /// Ask us for a backup.
    ///
    /// # Errors
    /// What the operation says.
    pub fn back_up(&self, to: &Path) -> Result<Done> {
        let ask = Ask::new(self).file(new_file(to));
        let file = NewFile { fd: 1, name: "backup".to_owned(), commit: None };
        ask.run(Operation::HeaderBackup { file }).map(done)
    }

    /// Ask us to put a backup back.
    ///
    /// # Errors
    /// What the operation says.
    pub fn restore(&self, from: &Path, allow_other: bool) -> Result<Done> {
        let ask = Ask::new(self).file(File::open(from).expect("open"));
        let file = Named { fd: 1, name: "backup".to_owned() };
        ask.run(Operation::HeaderRestore { file, allow_other }).map(done)
    }

    /// Ask us to add a token.
    ///
    /// # Errors
    /// What the operation says.
    pub fn token(&self, token: Value, id: Option<u32>, replace: bool) -> Result<Done> {
        Ask::new(self).run(Operation::TokenAdd { token, id, replace }).map(done)
    }

    /// Our report.
    ///
    /// # Panics
    /// When it cannot be done here.
    #[must_use]
    pub fn doctor(&self, passphrase: Option<&[u8]>) -> Doctor {
        let mut ask = Ask::new(self);
        if let Some(passphrase) = passphrase {
            ask = ask.secret(passphrase);
        }
        match ask.run(Operation::Doctor { key_fd: passphrase.map(|_| 1) }).expect("a report") {
            Reply::Doctor(doctor) => *doctor,
            other => panic!("another answer: {other:?}"),
        }
    }
}

/// A file made anew.
///
/// # Panics
/// When it cannot be done here.
#[must_use]
pub fn new_file(path: &Path) -> File {
    File::options().read(true).write(true).create_new(true).open(path).expect("create")
}

/// A cheap KDF for us.
#[must_use]
pub fn cheap() -> KdfWish {
    KdfWish { kind: Some(KdfKind::Pbkdf2), iterations: Some(ITERATIONS), ..KdfWish::default() }
}

/// The answer must be this one.
///
/// # Panics
/// When it is another.
#[track_caller]
pub fn done(reply: Reply) -> Done {
    match reply {
        Reply::Done(done) => done,
        other => panic!("another answer: {other:?}"),
    }
}

/// A request about a volume, whose descriptor is number 0.
pub struct Ask {
    /// Descriptors to send.
    pub fds: Vec<OwnedFd>,
    /// The first one is a detached header.
    pub header: bool,
    /// The caller has gone away.
    pub give_up: bool,
}

impl Ask {
    /// Opened for reading and writing.
    ///
    /// # Panics
    /// When it cannot be done here.
    #[must_use]
    pub fn new(volume: &Volume) -> Self {
        Self::of(File::options().read(true).write(true).open(&volume.path).expect("open"))
    }

    /// With this descriptor for the volume.
    #[must_use]
    pub fn of(file: File) -> Self {
        Self { fds: vec![file.into()], header: false, give_up: false }
    }

    /// One more descriptor.
    #[must_use]
    pub fn file(mut self, file: File) -> Self {
        self.fds.push(file.into());
        self
    }

    /// One more descriptor: a pipe with this secret.
    ///
    /// # Panics
    /// When it cannot be done here.
    #[must_use]
    pub fn secret(mut self, bytes: &[u8]) -> Self {
        self.fds.push(crate::sealed_secret(bytes));
        self
    }

    /// Ask.
    ///
    /// # Errors
    /// What the operation says.
    ///
    /// # Panics
    /// When it cannot be done here.
    pub fn run(self, operation: Operation) -> Result<Reply> {
        let file = Some(Named { fd: 0, name: "volume".to_owned() });
        let (volume, header) = if self.header { (None, file) } else { (file, None) };
        let request = Request { volume, header, lock_fd: None, remotes: Vec::new(), operation };
        let give_up = self.give_up;
        let caller = Caller {
            commit: &|_, _, _| panic!("nothing here is to be committed"),
            give_up: &move || give_up,
        };
        carry_out(request, self.fds, &caller)
    }
}

/// It must be refused, with this kind and these words in its chain.
///
/// # Panics
/// When it is not.
#[track_caller]
pub fn refused<T: std::fmt::Debug>(result: Result<T>, kind: ErrorKind, words: &str) -> Error {
    let error = result.expect_err("refused");
    assert_eq!(error.kind(), kind, "{}", error.chain());
    assert!(error.chain().contains(words), "{}", error.chain());
    error
}
