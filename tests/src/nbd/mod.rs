//! NBD servers for tests: ours, and two that everybody uses, over one plaintext. A test is shown to be right on the others, and
//! then asked of ours.
//!
//! | file | its one purpose |
//! |---|---|
//! | `mod` | servers: start one, where it listens, what its volume holds in the end |
//! | `client` | a client that takes nothing on trust and may be told to send anything |
//! | `steady` | a client that writes and verifies all the time, over several connections and over the server's death |
//! | `wire` | the socket under both |

pub mod client;
pub mod steady;
mod wire;

use std::path::{Path, PathBuf};

use rustix::process::Signal;

use crate::luks::{Shape, have, secret};
use crate::nbd::client::{Connection, Wish};
use crate::{Place, Running, User, eventually};
use engine::format::nbd::reply::Style;

/// Who serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `qemu-nbd` over the plaintext in a file.
    QemuNbd,
    /// `nbdkit file` over the plaintext in a file.
    Nbdkit,
    /// `cryptctl export` of a LUKS volume.
    Luks(Shape),
    /// `cryptctl export` of a volume without a header, with data units of so many bytes.
    Raw(u32),
}

impl Kind {
    /// Those that are not ours.
    pub const REFERENCES: [Self; 2] = [Self::QemuNbd, Self::Nbdkit];
    /// The volume we recommend.
    pub const LUKS2: Self = Self::Luks(Shape::luks2(4096, 512, "pbkdf2"));
    /// Ours, every format.
    pub const OURS: [Self; 5] = [
        Self::LUKS2,
        Self::Luks(Shape::luks2(512, 512, "pbkdf2")),
        Self::Luks(Shape::luks1(512)),
        Self::Raw(512),
        Self::Raw(4096),
    ];

    /// Is it ours?
    #[must_use]
    pub fn is_ours(self) -> bool {
        matches!(self, Self::Luks(_) | Self::Raw(_))
    }

    /// Options of `cryptctl` that make the volume.
    fn making(self) -> String {
        match self {
            Self::Luks(shape) => format!("{} --key file:@/pass", shape.ours()),
            Self::Raw(unit) => format!("RAW --sector-size {unit}"),
            Self::QemuNbd | Self::Nbdkit => unreachable!("not encrypted"),
        }
    }

    /// Options of `cryptctl` that open it.
    fn opening(self) -> String {
        match self {
            Self::Luks(_) => "--key file:@/pass".to_owned(),
            _ => self.making(),
        }
    }
}

/// The references of which the tools are here, and these of ours.
#[must_use]
pub fn and_references(ours: &[Kind]) -> Vec<Kind> {
    let mut kinds = Vec::new();
    for (kind, tool) in Kind::REFERENCES.into_iter().zip(["qemu-nbd", "nbdkit"]) {
        if have(&[tool]) {
            kinds.push(kind);
        }
    }
    if std::env::var_os("TEMP_REF").is_none() {
        kinds.extend_from_slice(ours);
    }
    kinds
}

/// A server with one export, in a place of its own.
pub struct Served {
    /// Where its files are: `plain`, as it was in the beginning; `volume`; `pass`.
    pub place: Place,
    /// Who serves.
    pub kind: Kind,
    /// What the volume held in the beginning.
    pub plain: Vec<u8>,
    /// Further options of the server.
    pub options: String,
    running: Option<Running>,
}

impl Served {
    /// Over a fresh volume with so many bytes of noise.
    #[must_use]
    pub fn over_noise(kind: Kind, length: usize) -> Self {
        Self::with(kind, length, "")
    }

    /// The same with further options of the server.
    #[must_use]
    pub fn with(kind: Kind, length: usize, options: &str) -> Self {
        let mut served = Self::prepared(kind, length, options);
        served.start();
        served
    }

    /// Not started yet.
    #[must_use]
    pub fn prepared(kind: Kind, length: usize, options: &str) -> Self {
        eprintln!("{kind:?}, {length} bytes {options}");
        let place = if kind.is_ours() { Place::new(User::Me) } else { Place::bare(User::Me) };
        secret(&place, "pass", b"correct horse battery staple");
        let plain = place.noise("plain", length);
        if kind.is_ours() {
            let _ = place.run(&format!("encrypt @/plain @/volume {}", kind.making())).done();
        } else {
            std::fs::copy(place.path("plain"), place.path("volume")).expect("copied");
        }
        Self { place, kind, plain, options: options.to_owned(), running: None }
    }

    /// Start the server, and wait until a client gets through.
    ///
    /// # Panics
    /// If none does.
    pub fn start(&mut self) {
        let options = &self.options;
        let running = match self.kind {
            Kind::QemuNbd => self.place.launch(self.place.script(&format!(
                "exec qemu-nbd --socket=@/socket --format=raw --shared=0 --persistent --discard=unmap {options} @/volume"
            ))),
            Kind::Nbdkit => self
                .place
                .launch(self.place.script(&format!("exec nbdkit --foreground --unix=@/socket {options} file @/volume"))),
            _ => self.place.spawn(&format!("export @/volume --nbd unix:@/socket {} {options}", self.kind.opening())),
        };
        self.running = Some(running);
        let socket = self.socket();
        let mut wish = Wish::of(Style::Simple);
        self.name().clone_into(&mut wish.name);
        eventually("a client gets through", || match Connection::open(&socket, &wish) {
            Ok(connection) => {
                connection.leave();
                true
            }
            Err(_) => {
                assert!(self.is_up(), "the server has ended: {}", self.said());
                false
            }
        });
    }

    /// Is it still there?
    pub fn is_up(&mut self) -> bool {
        self.running.as_mut().is_some_and(Running::is_running)
            && self.place.daemon.as_mut().is_none_or(crate::Daemon::is_running)
    }

    /// What it has said: the server's errors, the daemon's log.
    #[must_use]
    pub fn said(&self) -> String {
        let said = self.running.as_ref().map(Running::said).unwrap_or_default();
        said + &self.place.daemon.as_ref().map(crate::Daemon::log).unwrap_or_default()
    }

    /// Where it listens.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.place.path("socket")
    }

    /// What the export is called, if its options name it.
    fn name(&self) -> &str {
        let mut words = self.options.split_whitespace();
        words.find(|word| *word == "--name").and_then(|_| words.next()).unwrap_or_default()
    }

    /// For clients.
    #[must_use]
    pub fn uri(&self) -> String {
        format!("nbd+unix:///{}?socket={}", self.name(), self.socket().display())
    }

    /// A script with `$uri` and `$socket`, run to its end, which must be a good one.
    ///
    /// # Panics
    /// If it is not.
    pub fn shell(&self, script: &str) -> String {
        let mut command = self.place.script(script);
        command.env("uri", self.uri()).env("socket", self.socket());
        self.place.finish(command).done().text()
    }

    /// A structured connection.
    #[must_use]
    pub fn connect(&self) -> Connection {
        Connection::structured(&self.socket())
    }

    /// The process that serves.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.place
            .daemon
            .as_ref()
            .map_or_else(|| self.running.as_ref().expect("running").pid(), crate::Daemon::pid)
    }

    /// Bytes of memory it has just now.
    ///
    /// # Panics
    /// If the kernel does not say.
    #[must_use]
    pub fn resident(&self) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("a process");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
        let kib: usize = line.trim().trim_end_matches(" kB").parse().expect("a number");
        kib << 10
    }

    /// End the export as its owner does; it has to end well.
    ///
    /// # Panics
    /// If it does not.
    pub fn stop(&mut self) {
        let running = self.running.take().expect("running");
        running.signal(if self.kind.is_ours() { Signal::INT } else { Signal::TERM });
        let ran = running.wait();
        if self.kind.is_ours() {
            assert!(ran.code.is_some(), "{ran:?}");
            assert!(!self.socket().exists(), "the socket is still there");
            let daemon = self.place.daemon.as_mut().expect("a daemon");
            assert!(daemon.is_running(), "the daemon has ended: {}", daemon.log());
            assert!(!daemon.log().contains("panicked"), "{}", daemon.log());
        }
    }

    /// Kill whoever serves, as a crash does. Whatever it had in flight has ended when this returns.
    ///
    /// # Panics
    /// If it does not end.
    pub fn kill(&mut self) {
        let running = self.running.take().expect("running");
        if let Some(mut daemon) = self.place.daemon.take() {
            daemon.signal(Signal::KILL);
            let _ = daemon.wait();
            let _ = running.wait();
            let daemon = crate::Start::new().daemon();
            self.place.talk_to(&daemon.socket());
            self.place.daemon = Some(daemon);
        } else {
            running.signal(Signal::KILL);
            let _ = running.wait();
        }
        let _ = std::fs::remove_file(self.socket());
    }

    /// What the volume holds, read by other ways than NBD. The export has ended.
    #[must_use]
    pub fn content(&self) -> Vec<u8> {
        assert!(self.running.is_none(), "still exported");
        if !self.kind.is_ours() {
            return self.place.read("volume");
        }
        let _ = self.place.run(&format!("decrypt @/volume @/content --force {}", self.kind.opening())).done();
        self.place.read("content")
    }

    /// The export has ended; the volume holds exactly this.
    ///
    /// # Panics
    /// If not.
    pub fn holds(&self, expected: &[u8]) {
        same(&self.content(), expected, &format!("{:?}", self.kind));
    }
}

/// Equal to the last byte.
///
/// # Panics
/// If not; says where.
pub fn same(found: &[u8], expected: &[u8], about: &str) {
    let differs = found.iter().zip(expected).position(|(one, other)| one != other);
    assert!(
        differs.is_none() && found.len() == expected.len(),
        "{about}: differs from byte {differs:?} on; {} bytes of {}",
        found.len(),
        expected.len()
    );
}

/// A file's bytes.
///
/// # Panics
/// If it cannot be read.
#[must_use]
pub fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
