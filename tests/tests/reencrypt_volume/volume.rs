//! A volume to be re-encrypted, and what is asked of it.

use std::path::{Path, PathBuf};

use engine::crypto::Secret;
use engine::error::Error;
use engine::format::luks2::metadata::Keyslot;
use engine::format::luks2::reencrypt::Mode;
use engine::volume::reencrypt::begin::{self, Planned, Wish};
use engine::volume::reencrypt::open::{self, Found};
use engine::volume::reencrypt::{Opened, luks};
use engine::volume::{Header, unlock};
use proto::luks::{KdfKind, KdfWish};
use proto::reencrypt::{Luks, Resilience};
use tests::luks2::{QUICK, cryptsetup_does};
use tests::rewrite::{bytes_of, cryptsetup_resumes, device, read_by_cryptsetup, secret};
use tests::{Random, Scratch};

/// Bytes of data: some steps of [`STEP`] and an odd rest.
pub const DATA: u64 = (5 << 20) + 3 * 4096;
pub const STEP: u64 = 1 << 20;
/// Where the data of [`Volume::new`] begins.
pub const OFFSET: u64 = 4 << 20;
pub const PASS: &str = "correct horse";

pub fn never() -> bool {
    false
}

/// A LUKS2 volume made by cryptsetup, its data noise.
pub struct Volume {
    pub scratch: Scratch,
    pub path: PathBuf,
    pub header: Option<PathBuf>,
    pub unit: u32,
}

impl Volume {
    pub fn new(unit: u32) -> Self {
        Self::with(unit, DATA, "", false)
    }

    pub fn with(unit: u32, data: u64, options: &str, detached: bool) -> Self {
        let scratch = Scratch::new();
        let offset = if detached { 0 } else { OFFSET };
        let mut noise = vec![0; usize::try_from(offset + data).expect("small")];
        Random::new(u64::from(unit) + data).fill(&mut noise);
        let path = scratch.file("volume", &noise);
        scratch.file("pass", PASS.as_bytes());
        let header = detached.then(|| scratch.file("header", &vec![0; 4 << 20]));
        let format = format!(
            "luksFormat -q --type luks2 --sector-size {unit} --key-file {} --luks2-keyslots-size 3M {options} {}",
            scratch.join("pass").display(),
            match &header {
                Some(header) => format!("--header {}", header.display()),
                None => format!("--offset {}", OFFSET / 512),
            }
        );
        cryptsetup_does(&[&format, &QUICK.join(" ")], &[&path]);
        Self { scratch, path, header, unit }
    }

    pub fn header(&self) -> &Path {
        self.header.as_deref().unwrap_or(&self.path)
    }

    pub fn pass_file(&self) -> PathBuf {
        self.scratch.join("pass")
    }

    pub fn add_key(&self, text: &str) {
        let file = self.scratch.file("added", text.as_bytes());
        let add = format!("luksAddKey -q --key-file {}", self.pass_file().display());
        cryptsetup_does(&[&add, &QUICK.join(" ")], &[self.header(), &file]);
    }

    pub fn header_now(&self) -> Header {
        Header::load(&mut device(self.header())).expect("a header")
    }

    pub fn metadata(&self) -> engine::format::luks2::metadata::Metadata {
        match self.header_now() {
            Header::Luks2(loaded) => loaded.header.metadata,
            Header::Luks1(_) => panic!("LUKS1"),
        }
    }

    /// The plaintext of a volume at rest by its header, read by ourselves.
    pub fn plain(&self, passphrase: &str) -> Vec<u8> {
        let header = self.header_now();
        let [area] = header.data_areas().expect("areas")[..] else { panic!("one area") };
        let total = bytes_of(&self.path) - area.offset;
        let mut bytes = vec![0; usize::try_from(total).expect("small")];
        device(&self.path).read(area.offset, &mut bytes).expect("read");
        let Some(cipher) = area.cipher else { return bytes };
        let key =
            unlock::with_passphrase(&mut device(self.header()), &header, &secret(passphrase), None, &never);
        let kernel = engine::crypto::Kernel::best().expect("a kernel");
        let cipher =
            cipher.spec.build(kernel, &key.expect("opens").key, cipher.unit_bytes, cipher.offset_sectors);
        cipher.expect("a cipher").decrypt(engine::units::DataUnit(0), &mut bytes);
        bytes
    }

    pub fn plain_by_cryptsetup(&self) -> Vec<u8> {
        read_by_cryptsetup(&self.path, self.header.as_deref(), &self.pass_file(), self.scratch.path(), DATA)
    }

    pub fn wish<'a>(&self, luks: &'a Luks, mode: Mode, resilience: Option<Resilience>) -> Wish<'a> {
        Wish {
            mode,
            luks,
            resilience,
            data_bytes: bytes_of(&self.path),
            block_bytes: 4096,
            atomic_bytes: 4096,
        }
    }

    pub fn begin_with(
        &self,
        luks: &Luks,
        resilience: Option<Resilience>,
        keys: &[&str],
        new: Option<&str>,
    ) -> Result<Opened, Error> {
        let keys: Vec<Secret> = keys.iter().map(|key| secret(key)).collect();
        let wish = self.wish(luks, Mode::Reencrypt, resilience);
        let new = new.map(secret);
        begin::begin(device(self.header()), &mut device(&self.path), &wish, &keys, new.as_ref(), &never)
    }

    pub fn plan(&self, luks: &Luks, keys: &[&str]) -> Result<Planned, Error> {
        let keys: Vec<Secret> = keys.iter().map(|key| secret(key)).collect();
        let wish = self.wish(luks, Mode::Reencrypt, None);
        begin::plan(&mut device(self.header()), &wish, &keys, None, &never)
    }

    pub fn begin(&self, resilience: Resilience, unit: u32) -> Opened {
        let luks = Luks { data_unit: Some(unit), force_data_unit: true, ..quick() };
        self.begin_with(&luks, Some(resilience), &[PASS], None).expect("begun")
    }

    pub fn open(&self) -> Result<Option<Opened>, Error> {
        self.open_with(&[PASS])
    }

    pub fn open_with(&self, keys: &[&str]) -> Result<Option<Opened>, Error> {
        Ok(self.find(keys)?.under())
    }

    pub fn find(&self, keys: &[&str]) -> Result<Found, Error> {
        let keys: Vec<Secret> = keys.iter().map(|key| secret(key)).collect();
        let data = bytes_of(&self.path);
        open::open(device(self.header()), &mut device(&self.path), data, &keys, &never)
    }

    /// Let cryptsetup finish it.
    pub fn cryptsetup_resumes(&self) {
        cryptsetup_resumes(&self.path, self.header.as_deref(), &self.pass_file());
    }

    /// Nothing of a re-encryption is left.
    pub fn is_over(&self) {
        let metadata = self.metadata();
        assert_eq!(metadata.config.requirements, Vec::<String>::new());
        assert_eq!(metadata.segments.len(), 1);
        assert_eq!(metadata.digests.len(), 1);
        assert!(metadata.keyslots.values().all(|slot| matches!(slot, Keyslot::Luks2(_))));
        assert!(!luks::is_unswept(&metadata));
        assert!(self.open().expect("nothing is wrong").is_none());
    }
}

/// New keyslots that cost nothing.
pub fn quick() -> Luks {
    let kdf = KdfWish { kind: Some(KdfKind::Pbkdf2), iterations: Some(1000), ..KdfWish::default() };
    Luks { kdf: Some(kdf), ..Luks::default() }
}
