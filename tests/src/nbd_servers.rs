//! NBD servers of others, for tests: nbdkit and qemu-nbd on Unix sockets, gone when dropped.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use proto::remote::{Address, Remote};

use crate::PATIENCE;

/// A server that runs.
pub struct Server {
    child: Option<Child>,
    program: String,
    arguments: Vec<String>,
    /// Where it listens.
    pub socket: PathBuf,
}

impl Server {
    /// Start `program` with these arguments, of which `SOCKET` stands for the path to listen on. `None`: there is no such program.
    ///
    /// # Panics
    /// If it does not listen in time.
    #[must_use]
    pub fn start(program: &str, arguments: &[&str]) -> Option<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        // The path of a socket is short, wherever the tests run.
        let socket = std::env::temp_dir().join(format!("nbd-{}-{number}", std::process::id()));
        let arguments =
            arguments.iter().map(|argument| argument.replace("SOCKET", &socket.to_string_lossy())).collect();
        let mut server = Self { child: None, program: program.to_owned(), arguments, socket };
        server.run().then_some(server)
    }

    /// nbdkit with these arguments, a plugin and perhaps filters.
    #[must_use]
    pub fn nbdkit(arguments: &[&str]) -> Option<Self> {
        Self::start("nbdkit", &[&["-f", "-U", "SOCKET"], arguments].concat())
    }

    /// qemu-nbd of a raw image at `path`, with these arguments.
    #[must_use]
    pub fn qemu(path: &Path, arguments: &[&str]) -> Option<Self> {
        let path = path.to_str().expect("a path of a test");
        Self::start("qemu-nbd", &[&["-k", "SOCKET", "-f", "raw", "-t"], arguments, &[path]].concat())
    }

    fn run(&mut self) -> bool {
        let _ = std::fs::remove_file(&self.socket);
        let spawned = Command::new(&self.program)
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn();
        let mut child = match spawned {
            Ok(child) => child,
            Err(error) => {
                crate::skip(&format!("no {}: {error}", self.program));
                return false;
            }
        };
        let deadline = Instant::now() + PATIENCE;
        while UnixStream::connect(&self.socket).is_err() {
            assert!(
                child.try_wait().expect("wait").is_none(),
                "{} {:?} leaves",
                self.program,
                self.arguments
            );
            assert!(Instant::now() < deadline, "{} does not listen", self.program);
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        self.child = Some(child);
        true
    }

    /// Kill it where it stands.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
            let _ = std::fs::remove_file(&self.socket);
        }
    }

    /// Start it once more, at the same place.
    ///
    /// # Panics
    /// If it was not killed, or does not start.
    pub fn restart(&mut self) {
        assert!(self.child.is_none());
        assert!(self.run());
    }

    /// Start nbdkit with other arguments in its place.
    ///
    /// # Panics
    /// If it was not killed, or does not start.
    pub fn become_another(&mut self, arguments: &[&str]) {
        let socket = self.socket.to_string_lossy().into_owned();
        self.arguments = ["-f", "-U", &socket].iter().chain(arguments).map(ToString::to_string).collect();
        self.restart();
    }

    /// Its process, while it runs.
    ///
    /// # Panics
    /// If it does not.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.as_ref().expect("runs").id()
    }

    /// New connections to it.
    ///
    /// # Panics
    /// If it does not accept.
    #[must_use]
    pub fn connect(&self, count: usize) -> Vec<OwnedFd> {
        (0..count).map(|_| UnixStream::connect(&self.socket).expect("connect").into()).collect()
    }

    /// A remote for [`engine::backend::nbd::open`]: this export, without a way back after a break.
    #[must_use]
    pub fn remote(&self, export: &str) -> Remote {
        Remote { export: export.to_owned(), ..Remote::default() }
    }

    /// The same, with one.
    #[must_use]
    pub fn remote_again(&self, export: &str) -> Remote {
        let address = Some(Address::Unix(self.socket.to_string_lossy().into_owned()));
        Remote { address, ..self.remote(export) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
        let _ = std::fs::remove_file(&self.socket);
    }
}
