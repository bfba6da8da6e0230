//! Re-encryption by real processes: a volume with known plaintext, the two programs that can re-encrypt it, where it stands, and
//! whether the plaintext is still there.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::luks::{CHEAP_PBKDF2, secret};
use crate::{LoopDevice, PATIENCE, Place, Random, Running, Start, User, loop_device};

/// Bytes of header in front of the data.
pub const HEADER: usize = 16 << 20;

/// Who re-encrypts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Party {
    /// `cryptctl`, and its daemon.
    Ours,
    /// `cryptsetup`, without device-mapper.
    Theirs,
}

impl Party {
    /// The other one.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Ours => Self::Theirs,
            Self::Theirs => Self::Ours,
        }
    }
}

/// What the header says, as cryptsetup reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Nothing was begun: the old volume key.
    Before,
    /// It has begun, and one segment covers all data: before the first step; or, where cryptsetup was killed, behind the last one.
    Edge,
    /// Between two steps.
    Clean,
    /// Within a step.
    Crash,
    /// The new volume key, and no word of the old one.
    After,
}

/// A LUKS2 volume whose plaintext is known, on a file or a loop device, and a daemon to re-encrypt it.
pub struct Bench {
    /// Where the files are; `pass` is the passphrase's.
    pub place: Place,
    /// What `pass` holds under the volume.
    pub plain: Vec<u8>,
    /// The volume: a path of the place, or a device.
    pub volume: PathBuf,
    /// What commands call it.
    pub name: String,
    /// The volume as it was made.
    base: Vec<u8>,
    /// The salt of its only digest.
    salt: String,
    device: Option<LoopDevice>,
}

impl Bench {
    /// A volume of so many bytes of data in a file, with these options of `cryptctl encrypt`.
    #[must_use]
    pub fn on_file(data: usize, options: &str) -> Self {
        let place = Place::new(User::Me);
        secret(&place, "pass", b"correct horse battery staple");
        let plain = place.noise("plain", data);
        let words =
            format!("encrypt @/plain @/base --format luks2 {CHEAP_PBKDF2} {options} --key file:@/pass");
        let _ = place.run(&words).done();
        let base = place.read("base");
        for name in ["plain", "base"] {
            std::fs::remove_file(place.path(name)).expect("removed");
        }
        place.write("volume", &base);
        let volume = place.path("volume");
        let mut bench = Self {
            place,
            plain,
            name: "@/volume".to_owned(),
            volume,
            base,
            salt: String::new(),
            device: None,
        };
        bench.salt = bench.salts().pop().expect("a digest");
        bench
    }

    /// The same on a loop device; `None`, said loudly, where none can be had.
    #[must_use]
    pub fn on_loop_device(data: usize, options: &str) -> Option<Self> {
        let mut bench = Self::on_file(data, options);
        let device = loop_device(u64::try_from(bench.base.len()).expect("a length"))?;
        device.path().clone_into(&mut bench.volume);
        bench.name = bench.volume.display().to_string();
        bench.device = Some(device);
        bench.restore();
        Some(bench)
    }

    /// The volume as it was made.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn restore(&self) {
        if self.device.is_none() {
            let _ = std::fs::remove_file(&self.volume);
        }
        self.put(&self.base);
    }

    /// The file under the loop device.
    #[must_use]
    pub fn backing(&self) -> Option<&Path> {
        self.device.as_ref().map(LoopDevice::backing)
    }

    /// Put bytes into it, from its beginning.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn put(&self, bytes: &[u8]) {
        let mut options = std::fs::OpenOptions::new();
        let mut file = options.write(true).create(self.device.is_none()).open(&self.volume).expect("opens");
        std::io::Write::write_all(&mut file, bytes).expect("written");
        file.sync_data().expect("durable");
    }

    /// All bytes of the volume.
    ///
    /// # Panics
    /// If it cannot be read.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        std::fs::read(&self.volume).expect("read")
    }

    /// The words that re-encrypt it, or go on with it.
    #[must_use]
    pub fn ours(&self, options: &str) -> String {
        // What was begun goes on as it was begun, and says so to whoever wants it otherwise.
        let begin = if options.contains("--resume-only") { "" } else { CHEAP_PBKDF2 };
        format!("reencrypt {} --yes {begin} --key file:@/pass {options}", self.name)
    }

    /// Those for cryptsetup, for a shell. It must be told how a step is protected also when it goes on, or measures how costly
    /// its digest should be.
    #[must_use]
    pub fn theirs(&self, options: &str) -> String {
        format!(
            "exec cryptsetup reencrypt --batch-mode --force-offline-reencrypt {CHEAP_PBKDF2} --key-file @/pass {options} {}",
            self.name
        )
    }

    /// Start re-encrypting.
    #[must_use]
    pub fn start(&self, party: Party, options: &str) -> Running {
        match party {
            Party::Ours => self.place.spawn(&self.ours(options)),
            Party::Theirs => self.place.launch(self.place.script(&self.theirs(options))),
        }
    }

    /// Let cryptsetup recover an interrupted step: it does not go on before.
    pub fn repair(&self) {
        let repair = format!("cryptsetup repair --batch-mode --key-file @/pass {}", self.name);
        let _ = self.place.shell(&repair).done();
    }

    /// Re-encrypt to the end; how long that took.
    pub fn finish(&self, party: Party, options: &str) -> Duration {
        let start = Instant::now();
        let _ = self.start(party, options).wait().done();
        start.elapsed()
    }

    /// Start re-encrypting and kill whoever does it after this time: nobody hears of it before.
    ///
    /// # Panics
    /// If there is something that does not end when it is killed.
    pub fn kill(&mut self, party: Party, options: &str, after: Duration) {
        let running = self.start(party, options);
        std::thread::sleep(after);
        match party {
            Party::Ours => {
                let mut daemon = self.place.daemon.take().expect("a daemon");
                daemon.signal(rustix::process::Signal::KILL);
                // Whatever it had in flight has ended with it: the kernel waits for that.
                let _ = daemon.wait();
                let _ = running.wait();
                self.new_daemon();
            }
            Party::Theirs => {
                running.signal(rustix::process::Signal::KILL);
                let _ = running.wait();
            }
        }
    }

    fn new_daemon(&mut self) {
        let daemon = Start::new().daemon();
        self.place.talk_to(&daemon.socket());
        self.place.daemon = Some(daemon);
    }

    /// The metadata as cryptsetup reads them.
    ///
    /// # Panics
    /// If it does not.
    #[must_use]
    pub fn metadata(&self) -> Value {
        let dump = format!("cryptsetup luksDump --dump-json-metadata {}", self.name);
        serde_json::from_slice(&self.place.shell(&dump).done().stdout).expect("JSON")
    }

    fn salts(&self) -> Vec<String> {
        let metadata = self.metadata();
        let digests = metadata["digests"].as_object().expect("digests");
        digests.values().map(|digest| digest["salt"].as_str().expect("a salt").to_owned()).collect()
    }

    /// Where it stands.
    ///
    /// # Panics
    /// If the header is neither of before nor of after, and says nothing of a re-encryption either.
    #[must_use]
    pub fn standing(&self) -> Standing {
        let metadata = self.metadata();
        let has = |value: &Value, word: &str| {
            let list = value.as_array().into_iter().flatten();
            list.filter_map(Value::as_str).any(|found| found.starts_with(word))
        };
        if has(&metadata["config"]["requirements"]["mandatory"], "online-reencrypt") {
            let segments = metadata["segments"].as_object().expect("segments");
            if segments.values().any(|segment| has(&segment["flags"], "in-reencryption")) {
                return Standing::Crash;
            }
            let regular = segments.values().filter(|segment| !has(&segment["flags"], "backup-"));
            return if regular.count() == 1 { Standing::Edge } else { Standing::Clean };
        }
        // A new digest that no segment uses may have been left by one that never began.
        let digests = metadata["digests"].as_object().expect("digests").values();
        let mut used =
            digests.filter(|digest| digest["segments"].as_array().is_some_and(|list| !list.is_empty()));
        let (digest, more) = (used.next().expect("a digest in use"), used.next());
        assert!(more.is_none(), "two keys, and no re-encryption: {metadata}");
        if digest["salt"] == self.salt.as_str() { Standing::Before } else { Standing::After }
    }

    /// The plaintext is there, to the last byte, as we read it; the old key is gone, and nothing is under way.
    ///
    /// # Panics
    /// If not.
    pub fn check(&self, about: &str) {
        assert_eq!(self.standing(), Standing::After, "{about}");
        assert!(!self.salts().contains(&self.salt), "{about}: the old key's digest is still there");
        let back = self.place.path("back");
        let _ = self.place.run(&format!("decrypt {} @/back --force --key file:@/pass", self.name)).done();
        self.compare(&back, 0, about);
    }

    /// The plaintext is there as cryptsetup's own crypto reads it, in a copy.
    ///
    /// # Panics
    /// If not.
    pub fn check_with_cryptsetup(&self, about: &str) {
        // cryptsetup 2.6 cannot decrypt a volume whose keyslots lie in certain ways, as its own re-encryption leaves them every second
        // time: another one helps.
        let _ = self
            .place
            .shell(&format!(
                "cp --sparse=always {name} @/copy
                 decrypt() {{ rm -f @/exported; cryptsetup reencrypt --batch-mode --decrypt --force-offline-reencrypt \
                     --header @/exported --key-file @/pass @/copy; }}
                 decrypt 2>/dev/null || {{ cryptsetup reencrypt --batch-mode --force-offline-reencrypt {CHEAP_PBKDF2} \
                     --key-file @/pass @/copy && decrypt; }}",
                name = self.name
            ))
            .done();
        // The data moved to the front; the file keeps the size it had with the header.
        self.compare(&self.place.path("copy"), HEADER, &format!("{about}, as cryptsetup reads it"));
    }

    fn compare(&self, with: &Path, behind: usize, about: &str) {
        let mut found = std::fs::read(with).expect("read");
        found.truncate(found.len() - behind);
        let differs = found.iter().zip(&self.plain).position(|(one, other)| one != other);
        assert!(
            differs.is_none() && found.len() == self.plain.len(),
            "{about}: the plaintext differs from byte {differs:?} on; {} bytes of {}",
            found.len(),
            self.plain.len()
        );
    }
}

/// A random part of a time.
#[must_use]
pub fn part_of(time: Duration, random: &mut Random) -> Duration {
    let most = usize::try_from(time.min(PATIENCE).as_micros()).expect("less than a minute");
    Duration::from_micros(u64::try_from(random.below(most.max(1))).expect("a length"))
}
