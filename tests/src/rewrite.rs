//! Re-encryption of a volume driven by the simplest loop there is, one block after the other, on real files: what the workers do at speed, for
//! tests of what is kept in headers. And the plaintext of a volume as cryptsetup finds it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use engine::backend::blocking::Blocking;
use engine::crypto::{Kernel, Secret, SectorCipher};
use engine::units::{DataUnit, Extent};
use engine::volume::Header;
use engine::volume::reencrypt::ledger::Protection;
use engine::volume::reencrypt::{Opened, Side};

use crate::luks2::{cryptsetup, cryptsetup_does};

/// Where a test lets go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// Nowhere.
    Done,
    /// At rest behind so many steps.
    Steps(usize),
    /// In the step behind so many, which has been announced, with so many thousandths of it written.
    Within(usize, u64),
}

/// A file for ordered I/O, through the page cache.
///
/// # Panics
/// If there is none.
#[must_use]
pub fn device(path: &Path) -> Blocking {
    let file = File::options().read(true).write(true).open(path).expect("the file is there");
    Blocking::open(Arc::new(file.into()), &path.display().to_string(), 1).expect("opened")
}

/// Bytes of a file.
///
/// # Panics
/// If there is none.
#[must_use]
pub fn bytes_of(path: &Path) -> u64 {
    std::fs::metadata(path).expect("the file is there").len()
}

/// A passphrase.
///
/// # Panics
/// Without memory.
#[must_use]
pub fn secret(text: &str) -> Secret {
    Secret::copy_of(text.as_bytes()).expect("memory")
}

struct Cipher(Option<(Box<dyn SectorCipher>, u64)>);

impl Cipher {
    fn of(side: &Side) -> Self {
        Self(side.cipher.as_ref().map(|(cipher, key)| {
            let kernel = Kernel::best().expect("a kernel");
            let built = cipher.spec.build(kernel, key, cipher.unit_bytes, cipher.offset_sectors);
            (built.expect("a cipher"), u64::from(cipher.unit_bytes))
        }))
    }

    fn decrypt(&self, at: u64, bytes: &mut [u8]) {
        if let Some((cipher, unit)) = &self.0 {
            cipher.decrypt(DataUnit(at / unit), bytes);
        }
    }

    fn encrypt(&self, at: u64, bytes: &mut [u8]) {
        if let Some((cipher, unit)) = &self.0 {
            cipher.encrypt(DataUnit(at / unit), bytes);
        }
    }
}

/// The plaintext of a re-encryption at rest, read as its two sides have it.
///
/// # Panics
/// If it cannot be read.
#[must_use]
pub fn plaintext(opened: &Opened, data: &Path) -> Vec<u8> {
    let mut data = device(data);
    let (old, new) = (Cipher::of(&opened.old), Cipher::of(&opened.new));
    let mut plain = Vec::new();
    let forward = opened.direction == engine::format::luks2::reencrypt::Direction::Forward;
    for at in (0..opened.total).step_by(4096) {
        let length = usize::try_from((opened.total - at).min(4096)).expect("small");
        let mut bytes = vec![0; length];
        if (at < opened.boundary) == forward {
            data.read(opened.new.offset + at, &mut bytes).expect("read");
            new.decrypt(at, &mut bytes);
        } else {
            data.read(source(opened, at), &mut bytes).expect("read");
            old.decrypt(at, &mut bytes);
        }
        plain.extend(bytes);
    }
    plain
}

fn source(opened: &Opened, at: u64) -> u64 {
    match opened.moved {
        Some(moved) if at < moved.bytes => moved.offset + at,
        _ => opened.old.offset + at,
    }
}

/// Go on with it, in steps of `step` bytes at most. True: all is done.
///
/// # Panics
/// If anything fails.
pub fn go_on(mut opened: Opened, data: &Path, step: u64, until: Until) -> bool {
    let mut data = device(data);
    let (old, new) = (Cipher::of(&opened.old), Cipher::of(&opened.new));
    let forward = opened.direction == engine::format::luks2::reencrypt::Direction::Forward;
    let mut steps = 0;
    loop {
        let ends_at = if forward { opened.total } else { 0 };
        if opened.boundary == ends_at {
            return true;
        }
        if until == Until::Steps(steps) {
            return false;
        }
        let unit = opened.ledger.step_bytes();
        let most = opened.ledger.hotzone_max().map_or(opened.total, |most| most.min(step));
        let most = (most - most % unit).max(unit);
        let moved = opened.moved.map_or(0, |moved| moved.bytes);
        let hot = if forward {
            Extent::new(opened.boundary, (opened.boundary + most).min(opened.total))
        } else if opened.boundary > moved {
            Extent::new(opened.boundary.saturating_sub(most).max(moved), opened.boundary)
        } else {
            Extent::new(0, opened.boundary)
        };
        let hot = hot.expect("something is left");
        // 1. read, 2. save
        let mut bytes = vec![0; usize::try_from(hot.len()).expect("fits memory")];
        data.read(source(&opened, hot.start()), &mut bytes).expect("read");
        match opened.ledger.protection() {
            Protection::None => {}
            Protection::Checksums(checksum) => {
                let mut sums = Vec::new();
                for block in bytes.chunks(checksum.block_bytes as usize) {
                    let mut sum = vec![0; checksum.hash.bytes()];
                    checksum.hash.digest(&[block], &mut sum);
                    sums.extend(sum);
                }
                opened.ledger.save(hot, &sums).expect("saved");
            }
            Protection::Journal { file, name, offset, align } => {
                let mut journal = Blocking::open(file, &name, align).expect("the journal");
                journal.write(offset, &bytes).expect("journalled");
            }
        }
        // 3. begin
        opened.ledger.begin(hot).expect("begun");
        // 4. write
        old.decrypt(hot.start(), &mut bytes);
        new.encrypt(hot.start(), &mut bytes);
        let target = opened.new.offset + hot.start();
        if let Until::Within(at, thousandths) = until
            && at == steps
        {
            // In blocks of 4096 from both ends, so that new ones lie on both sides of old ones.
            let blocks = bytes.len().div_ceil(4096);
            let share = usize::try_from(thousandths).expect("small") * blocks / 1000;
            for (index, block) in bytes.chunks(4096).enumerate() {
                if index < share / 2 || index >= blocks - share.div_ceil(2) {
                    data.write(target + index as u64 * 4096, block).expect("written");
                }
            }
            return false;
        }
        data.write(target, &bytes).expect("written");
        // 5. flush, 6. commit
        data.flush().expect("flushed");
        opened.ledger.commit(hot).expect("committed");
        opened.boundary = if forward { hot.end() } else { hot.start() };
        steps += 1;
    }
}

/// The plaintext of a volume, or of data with a detached header, by cryptsetup's own crypto: it decrypts copies in place.
///
/// # Panics
/// If it does not.
#[must_use]
pub fn read_by_cryptsetup(
    volume: &Path,
    header: Option<&Path>,
    key_file: &Path,
    scratch: &Path,
    length: u64,
) -> Vec<u8> {
    let (copy, exported): (PathBuf, PathBuf) = (scratch.join("read.data"), scratch.join("read.header"));
    let _ = std::fs::remove_file(&exported);
    for (from, to) in [(Some(volume), &copy), (header, &exported)] {
        let Some(from) = from else { continue };
        let copied = Command::new("cp").arg("--sparse=always").args([from, to]).status().expect("cp starts");
        assert!(copied.success(), "cp");
    }
    let key_file =
        format!("reencrypt -q --decrypt --force-offline-reencrypt --key-file {}", key_file.display());
    cryptsetup_does(&[&key_file, "--header"], &[&exported, &copy]);
    let mut bytes = std::fs::read(&copy).expect("the plaintext");
    bytes.truncate(usize::try_from(length).expect("fits memory"));
    bytes
}

/// Let cryptsetup finish what is under way; of an interrupted step it asks for a repair first.
///
/// # Panics
/// If it does not.
pub fn cryptsetup_resumes(volume: &Path, header: Option<&Path>, key_file: &Path) {
    let key = format!("--key-file {}", key_file.display());
    let detached = header.map_or(String::new(), |path| format!("--header {}", path.display()));
    let resume = "reencrypt -q --resume-only --force-offline-reencrypt";
    let output = cryptsetup(&[resume, &key, &detached], &[volume]);
    if !output.status.success() {
        cryptsetup_does(&["repair -q", &key, &detached], &[volume]);
        // Behind the last step the repair is the end.
        if is_under_way(header.unwrap_or(volume)) {
            cryptsetup_does(&[resume, &key, &detached], &[volume]);
        }
    }
}

/// Does this header say that a re-encryption is under way?
///
/// # Panics
/// If there is none.
#[must_use]
pub fn is_under_way(header: &Path) -> bool {
    match Header::load(&mut device(header)).expect("a header") {
        Header::Luks2(loaded) => !loaded.header.metadata.config.requirements.is_empty(),
        Header::Luks1(_) => false,
    }
}
