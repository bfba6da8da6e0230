//! Ours: a daemon of its own per case on a private socket, the client that drives it, and what the daemon says of itself.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use proto::{Body, Call, Reply, Request, Response};

use crate::run::{self, Cpu};
use crate::source;

/// The two programs of one build.
#[derive(Debug, Clone)]
pub struct Programs {
    cryptctl: PathBuf,
}

impl Programs {
    /// Those in `dir`, or beside this program, or why they cannot be measured.
    ///
    /// # Errors
    /// The reason, as a phrase.
    pub fn find(dir: Option<&Path>) -> Result<Self, String> {
        let own =
            std::env::current_exe().map_err(|error| format!("this program's place is not known: {error}"))?;
        let dir = dir.or(own.parent()).ok_or("this program is nowhere")?;
        let cryptctl = dir.join("cryptctl");
        for program in [&cryptctl, &dir.join("cryptd")] {
            if !run::answers(program, "--version") {
                return Err(format!("{} does not tell its version", program.display()));
            }
        }
        Ok(Self { cryptctl })
    }

    /// Does the help of this verb have this option?
    #[must_use]
    pub fn know(&self, verb: &str, option: &str) -> bool {
        let help = Command::new(&self.cryptctl).args([verb, "--help"]).stdin(Stdio::null()).output();
        help.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains(option))
    }
}

/// What our volumes are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Format {
    /// No header.
    #[default]
    Raw,
    /// LUKS1: always 512-byte data units.
    Luks1,
    /// LUKS2.
    Luks2,
}

impl Format {
    /// Where its data begins, bytes, for a 512-bit key.
    #[must_use]
    pub fn data_offset(self) -> u64 {
        match self {
            Self::Raw => 0,
            Self::Luks1 => 2 << 20,
            Self::Luks2 => 16 << 20,
        }
    }
}

/// Tuning handed on to `cryptctl`; `None` leaves the choice to the daemon, which is what users get.
#[derive(Debug, Clone, Default)]
pub struct Tuning {
    /// `--format`.
    pub format: Format,
    /// `--sector-size`: the data unit, bytes.
    pub sector_bytes: u16,
    /// `--queue-depth`.
    pub queue_depth: Option<u32>,
    /// `--chunk-size`, bytes.
    pub chunk_bytes: Option<u32>,
    /// `--workers`.
    pub workers: Option<u32>,
}

/// A running daemon. Dropping it stops it.
pub struct Daemon {
    programs: Programs,
    socket: PathBuf,
    key: PathBuf,
    pid: u32,
}

impl Daemon {
    /// Start one whose socket and key file live in `dir`.
    ///
    /// # Errors
    /// It did not start or does not answer.
    pub fn start(programs: &Programs, dir: &Path) -> io::Result<Self> {
        let (socket, key) = (dir.join("cryptd.sock"), dir.join("volume.key"));
        let mut options = fs::OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        options.open(&key)?.write_all(&source::bench_key())?;
        let mut start = Command::new(&programs.cryptctl);
        // Longer than any pause between two of its runs, short enough not to outlive an interrupted sweep for long.
        start.args(["daemon", "start", "--idle-exit", "900", "--socket"]).arg(&socket);
        start.arg("--quiet").stdin(Stdio::null()).stdout(Stdio::null());
        run::pipeline(&mut [start])?;
        match call(&socket, Call::Hello {})? {
            Reply::Hello(hello) => Ok(Self { programs: programs.clone(), socket, key, pid: hello.pid }),
            other => Err(io::Error::other(format!("hello was answered with {other:?}"))),
        }
    }

    /// `cryptctl VERB SRC DST` with everything a run needs.
    #[must_use]
    pub fn command(&self, verb: &str, source: &Path, sink: &Path, tuning: &Tuning) -> Command {
        let mut command = Command::new(&self.programs.cryptctl);
        command.arg(verb).arg(source).arg(sink);
        command.args(["--force", "--quiet"]);
        let key = format!("file:{}", self.key.display());
        let sector_bytes = tuning.sector_bytes.to_string();
        // The same volume key everywhere, so that all write the same ciphertext; and a passphrase that costs next to nothing,
        // because the data path is what is compared.
        match (tuning.format, verb) {
            (Format::Raw, _) => {
                command.args(["--format", "raw", "--key-size", "512", "--sector-size", &sector_bytes]);
            }
            (Format::Luks1, "encrypt") => {
                command.args(["--format", "luks1", "--pbkdf-force-iterations", "1000", "--volume-key", &key]);
            }
            (Format::Luks2, "encrypt") => {
                command.args(["--format", "luks2", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]);
                command.args(["--sector-size", &sector_bytes, "--volume-key", &key]);
            }
            (Format::Luks1 | Format::Luks2, _) => {}
        }
        command.args(["--key", &key]);
        command.arg("--socket").arg(&self.socket);
        let tunings = [
            ("--queue-depth", tuning.queue_depth),
            ("--chunk-size", tuning.chunk_bytes),
            ("--workers", tuning.workers),
        ];
        for (flag, value) in tunings {
            if let Some(value) = value {
                command.arg(flag).arg(value.to_string());
            }
        }
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command
    }

    /// `cryptctl reencrypt` of a LUKS2 volume made by [`Daemon::command`], to a new volume key behind the same passphrase.
    #[must_use]
    pub fn reencrypt(&self, volume: &Path, resilience: &str) -> Command {
        let mut command = Command::new(&self.programs.cryptctl);
        command.arg("reencrypt").arg(volume).args(["--quiet", "--yes", "--resilience", resilience]);
        command.args(["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]);
        if resilience == "none" {
            command.arg("--crash-may-destroy-data");
        }
        command.args(["--key", &format!("file:{}", self.key.display())]);
        command.arg("--socket").arg(&self.socket);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command
    }

    /// `cryptctl export` of a volume made by [`Daemon::command`] on a Unix socket, until it is ended; `direct`: past the page cache.
    #[must_use]
    pub fn export(&self, volume: &Path, direct: bool, at: &Path) -> Command {
        let mut command = Command::new(&self.programs.cryptctl);
        command.arg("export").arg(volume).arg("--nbd").arg(format!("unix:{}", at.display()));
        if !direct {
            command.arg("--no-direct");
        }
        command.args(["--quiet", "--key", &format!("file:{}", self.key.display())]);
        command.arg("--socket").arg(&self.socket);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command
    }

    /// CPU time of the daemon so far, all threads.
    ///
    /// # Errors
    /// It is gone.
    pub fn cpu(&self) -> io::Result<Cpu> {
        run::cpu_of(&self.pid.to_string(), false)
    }

    /// The daemon's peak resident set, bytes.
    #[must_use]
    pub fn rss_peak(&self) -> u64 {
        run::rss_peak_of(self.pid).unwrap_or_default()
    }

    /// Bytes that the youngest job has re-encrypted; `None`: it is not about that.
    ///
    /// # Errors
    /// It is gone.
    pub fn rewritten(&self) -> io::Result<Option<u64>> {
        let Reply::Jobs(jobs) = call(&self.socket, Call::List {})? else {
            return Err(io::Error::other("list was not answered with jobs"));
        };
        let rewriting =
            |job: &&proto::JobInfo| job.progress.phase == Some(proto::reencrypt::Phase::Rewriting);
        Ok(jobs.last().filter(rewriting).map(|job| job.progress.done_bytes))
    }

    /// System calls of the workers' queues for the youngest job.
    ///
    /// # Errors
    /// It is gone, or remembers no job.
    pub fn syscalls_of_last_job(&self) -> io::Result<u64> {
        let Reply::Jobs(jobs) = call(&self.socket, Call::List {})? else {
            return Err(io::Error::other("list was not answered with jobs"));
        };
        let job = jobs.last().map(|job| job.job);
        match call(&self.socket, Call::Stats { job })? {
            Reply::Stats(stats) => Ok(stats.syscalls),
            other => Err(io::Error::other(format!("stats was answered with {other:?}"))),
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Best effort: an unreachable daemon has nothing left to stop, and its idle exit covers the rest.
        let _ = call(&self.socket, Call::Shutdown { now: true });
        let _ = fs::remove_file(&self.key);
    }
}

/// One request, one reply.
fn call(socket: &Path, call: Call) -> io::Result<Reply> {
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut line = serde_json::to_string(&Request { v: proto::PROTOCOL_VERSION, id: 1, call })?;
    line.push('\n');
    (&stream).write_all(line.as_bytes())?;
    line.clear();
    BufReader::new(&stream).read_line(&mut line)?;
    match serde_json::from_str::<Response>(&line)?.body {
        Body::Ok(reply) => Ok(reply),
        other => Err(io::Error::other(format!("the daemon answered {other:?}"))),
    }
}
