//! A server over one file, on a Unix socket, from its start to its end.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::ours::Daemon;
use crate::run::{self, Cpu};

/// How long a server may take to say its first word, or to end.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often it is looked whether it has.
const POLL: Duration = Duration::from_millis(10);
/// What every server of the protocol says first.
const GREETING: [u8; 8] = *b"NBDMAGIC";

/// A running server. Dropping it ends it.
pub struct Server {
    /// The server itself, or the client of the daemon that serves.
    process: Child,
    daemon: Option<Daemon>,
    socket: PathBuf,
}

impl Server {
    /// Start it and wait until it greets. `daemon` serves, if the command does not do so itself.
    ///
    /// # Errors
    /// It could not be started, ended, or does not greet.
    pub fn start(command: &mut Command, daemon: Option<Daemon>, socket: &Path) -> io::Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let process =
            command.spawn().map_err(|error| io::Error::new(error.kind(), format!("{name}: {error}")))?;
        let mut server = Self { process, daemon, socket: socket.to_owned() };
        let deadline = Instant::now() + PATIENCE;
        while !server.greets() {
            if let Some(status) = server.process.try_wait()? {
                return Err(io::Error::other(format!("{name} ended before it served: {status}")));
            }
            if Instant::now() > deadline {
                return Err(io::Error::other(format!("{name} does not serve")));
            }
            std::thread::sleep(POLL);
        }
        Ok(server)
    }

    fn greets(&self) -> bool {
        let greeting = || -> io::Result<[u8; 8]> {
            let mut stream = UnixStream::connect(&self.socket)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let mut word = [0; 8];
            stream.read_exact(&mut word)?;
            Ok(word)
        };
        greeting().is_ok_and(|word| word == GREETING)
    }

    /// Where clients find it.
    #[must_use]
    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", escaped(&self.socket))
    }

    /// CPU time of who serves so far, all threads.
    ///
    /// # Errors
    /// It is gone.
    pub fn cpu(&self) -> io::Result<Cpu> {
        match &self.daemon {
            Some(daemon) => daemon.cpu(),
            None => run::cpu_of(&self.process.id().to_string(), false),
        }
    }

    /// Peak resident set of who serves, bytes.
    #[must_use]
    pub fn rss_peak(&self) -> u64 {
        match &self.daemon {
            Some(daemon) => daemon.rss_peak(),
            None => run::rss_peak_of(self.process.id()).unwrap_or_default(),
        }
    }

    /// The daemon that serves.
    #[must_use]
    pub fn daemon(&self) -> Option<&Daemon> {
        self.daemon.as_ref()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(pid) = i32::try_from(self.process.id()).ok().and_then(Pid::from_raw) {
            // It has ended by itself, or does now.
            let _ = kill_process(pid, Signal::TERM);
        }
        let deadline = Instant::now() + PATIENCE;
        while matches!(self.process.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                eprintln!("a server of {} had to be killed", self.socket.display());
                let _ = self.process.kill();
                let _ = self.process.wait();
                break;
            }
            std::thread::sleep(POLL);
        }
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// A path inside the query of a URI.
fn escaped(path: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte);
    let one = |&byte: &u8| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") };
    path.as_os_str().as_bytes().iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_escaped_in_a_uri() {
        assert_eq!(escaped(Path::new("/a b/c&d=ü")), "/a%20b/c%26d%3D%C3%BC");
    }

    #[test]
    fn what_does_not_serve_is_no_server() {
        let socket = std::env::temp_dir().join(format!("no-server-{}", std::process::id()));
        let error = Server::start(&mut Command::new("false"), None, &socket).err().expect("it ends");
        assert!(error.to_string().contains("false ended before it served"), "{error}");
    }
}
