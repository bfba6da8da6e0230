//! A user's working place: files, keys, and the real `cryptctl` run there against a daemon of its own.
//!
//! Command lines are written as they would be typed: words split at blanks, `@` for the place's data directory, `RAW` for
//! the format and a 512-bit key, `RAW256` for a 256-bit one. Every command has a deadline; none inherits our environment.

use std::fs::File;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use proto::{Body, JobId, JobInfo, JobState, Reply, Response, Status};
use rustix::process::{Pid, Signal};

use crate::{Daemon, PATIENCE, Random, Scratch, Start, copy_program, eventually, is_root, program, skip};

/// The user and group nobody trusts.
pub const NOBODY: u32 = 65_534;

/// Whose rights a test runs with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum User {
    /// Whoever runs the tests.
    Me,
    /// Nobody; only root can become it.
    Nobody,
}

/// Run a test as ourselves, and if we are root again as somebody without any privilege.
pub fn as_each_user(test: impl Fn(User)) {
    eprintln!("as ourselves");
    test(User::Me);
    if is_root() {
        eprintln!("as nobody");
        test(User::Nobody);
    } else {
        skip("the part as nobody: only root can become another user (this run was unprivileged already)");
    }
}

/// A directory of one user, with two keys, and a socket to talk to.
#[derive(Debug)]
pub struct Place {
    /// The daemon, unless `cryptctl` is to start its own.
    pub daemon: Option<Daemon>,
    socket: PathBuf,
    user: User,
    bin: PathBuf,
    dir: Scratch,
}

impl Place {
    /// With a daemon of the same user, as it comes.
    #[must_use]
    pub fn new(user: User) -> Self {
        Self::with(user, Start::new())
    }

    /// With a daemon of the same user, started in a special way.
    #[must_use]
    pub fn with(user: User, start: Start) -> Self {
        let mut place = Self::bare(user);
        let start = if user == User::Nobody { start.user(NOBODY) } else { start };
        let daemon = start.daemon();
        place.socket = daemon.socket();
        place.daemon = Some(daemon);
        place
    }

    /// Without a daemon: the first job starts one on a socket in this place.
    #[must_use]
    pub fn bare(user: User) -> Self {
        let dir = Scratch::new();
        let mut bin = program("cryptctl").parent().expect("a directory").to_owned();
        if user == User::Nobody {
            // The build directory may be closed to that user.
            bin = dir.join("bin");
            std::fs::create_dir(&bin).expect("a directory for the programs");
            for name in ["cryptctl", "cryptd"] {
                copy_program(name, &bin.join(name));
            }
        }
        std::fs::create_dir(dir.join("data")).expect("a directory for the data");
        let place = Self { daemon: None, socket: dir.join("own.sock"), user, bin, dir };
        for (name, length) in [("key", 64), ("key32", 32)] {
            let path = place.dir.join(name);
            std::fs::write(&path, place.key(length)).expect("key written");
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).expect("key closed");
            place.give(&path);
        }
        place.give(&place.dir.join("data"));
        place.give(place.dir.path());
        place
    }

    /// The bytes of the place's key of so many bytes: two halves that differ.
    #[must_use]
    pub fn key(&self, length: usize) -> Vec<u8> {
        let mut key = vec![0; length];
        Random::new(0x5EED + u64::try_from(length).expect("small")).fill(&mut key);
        key
    }

    /// Talk to another daemon from now on.
    pub fn talk_to(&mut self, socket: &Path) {
        self.socket = socket.to_owned();
    }

    /// The socket commands talk to.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The directory of the programs this place runs.
    #[must_use]
    pub fn bin(&self) -> &Path {
        &self.bin
    }

    /// The directory around the data: keys, an own socket, an own daemon's log.
    #[must_use]
    pub fn home(&self) -> &Path {
        self.dir.path()
    }

    /// Make a file or directory the user's own.
    pub fn give(&self, path: &Path) {
        if self.user == User::Nobody {
            chown(path, Some(NOBODY), Some(NOBODY)).expect("given to the user");
        }
    }

    /// A path in the data directory.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join("data").join(name)
    }

    /// Write a file of the user's.
    pub fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.path(name), bytes).expect("file written");
        self.give(&self.path(name));
    }

    /// Write a file of random bytes; returns them.
    pub fn noise(&self, name: &str, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        Random::new(u64::try_from(length).expect("a length") ^ 0xDA7A).fill(&mut bytes);
        self.write(name, &bytes);
        bytes
    }

    /// What a file holds.
    #[must_use]
    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// The names in the data directory, sorted.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        let list = std::fs::read_dir(self.path("")).expect("data directory");
        let mut names: Vec<_> =
            list.map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    /// Expand `@`, `RAW` and `RAW256`.
    #[must_use]
    pub fn expand(&self, text: &str) -> String {
        let dir = self.dir.path().display();
        text.replace("RAW256", &format!("--format raw --key-size 256 --key file:{dir}/key32"))
            .replace("RAW", &format!("--format raw --key file:{dir}/key"))
            .replace('@', &format!("{dir}/data"))
    }

    /// A program run as the user, in a bare environment.
    #[must_use]
    pub fn program(&self, path: &Path) -> Command {
        // Whoever runs the tests may have told us to ignore signals (nohup, a job in the background); a user's shell does not.
        let mut command = Command::new("env");
        command
            .arg("--default-signal")
            .arg(path)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .current_dir("/")
            .stdin(Stdio::null());
        if self.user == User::Nobody {
            command.uid(NOBODY).gid(NOBODY);
        }
        command
    }

    /// `cryptctl` with these words.
    #[must_use]
    pub fn command(&self, words: &str) -> Command {
        let mut command = self.program(&self.bin.join("cryptctl"));
        command.arg("--socket").arg(&self.socket);
        command.args(self.expand(words).split_whitespace());
        command
    }

    /// Run a prepared command to its end.
    ///
    /// # Panics
    /// If it does not end.
    #[must_use]
    pub fn finish(&self, command: Command) -> Ran {
        self.launch(command).wait()
    }

    /// Start a prepared command with its output caught. Its standard input is as the command has it.
    #[must_use]
    pub fn launch(&self, mut command: Command) -> Running {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let files = ["stdout", "stderr"].map(|name| self.dir.join(&format!("{name}-{number}")));
        let [out, err] = &files;
        command
            .stdout(File::create(out).expect("output file"))
            .stderr(File::create(err).expect("output file"));
        let child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        Running { child: Some(child), command: format!("{command:?}"), files }
    }

    /// Run `cryptctl` to its end.
    #[must_use]
    pub fn run(&self, words: &str) -> Ran {
        self.finish(self.command(words))
    }

    /// Start `cryptctl`.
    #[must_use]
    pub fn spawn(&self, words: &str) -> Running {
        self.launch(self.command(words))
    }

    /// A command for `bash` with pipefail, in which `$CTL` is `cryptctl` on this place's socket.
    #[must_use]
    pub fn script(&self, script: &str) -> Command {
        let mut command = self.program(Path::new("bash"));
        let ctl = format!("{} --socket {}", self.bin.join("cryptctl").display(), self.socket.display());
        command.env("CTL", ctl).args(["-o", "pipefail", "-c"]).arg(self.expand(script));
        command
    }

    /// Run a script to its end.
    #[must_use]
    pub fn shell(&self, script: &str) -> Ran {
        self.finish(self.script(script))
    }

    /// The user's jobs, as `job list --json` tells them.
    #[must_use]
    pub fn jobs(&self) -> Vec<JobInfo> {
        match self.answer("job list --json --no-start") {
            Reply::Jobs(jobs) => jobs,
            other => panic!("no list: {other:?}"),
        }
    }

    /// `daemon status --json`.
    #[must_use]
    pub fn status(&self) -> Status {
        match self.answer("daemon status --json") {
            Reply::Status(status) => *status,
            other => panic!("no status: {other:?}"),
        }
    }

    /// The one answer a command prints as JSON.
    #[must_use]
    pub fn answer(&self, words: &str) -> Reply {
        let mut lines = self.run(words).done().lines();
        match (lines.pop().map(|line| line.body), lines.len()) {
            (Some(Body::Ok(reply)), 0) => reply,
            other => panic!("{words}: {other:?}"),
        }
    }

    /// Wait until the newest job has moved some bytes; its number.
    #[must_use]
    pub fn moving(&self) -> JobId {
        let mut found = None;
        eventually("a job moves", || {
            let moves = |job: &JobInfo| job.state == JobState::Running && job.progress.done_bytes > 0;
            found = self.jobs().pop().filter(moves);
            found.is_some()
        });
        found.expect("found").job
    }
}

impl Drop for Place {
    /// End a daemon that `cryptctl` has started here; one of ours ends by itself.
    fn drop(&mut self) {
        let ended = self.daemon.as_mut().is_none_or(|daemon| !daemon.is_running());
        let beside_daemon =
            self.daemon.as_ref().is_some_and(|daemon| self.socket.starts_with(daemon.dir.path()));
        let ours = beside_daemon || self.socket.starts_with(self.dir.path());
        if ended && ours && self.socket.exists() {
            let _ = self.command("daemon stop --now --quiet").stderr(Stdio::null()).status();
        }
    }
}

/// A command under way; killed when dropped.
#[derive(Debug)]
pub struct Running {
    child: Option<Child>,
    command: String,
    files: [PathBuf; 2],
}

impl Running {
    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("running").id()
    }

    /// Send it a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.pid()).expect("a process id")).expect("not zero");
        rustix::process::kill_process(pid, signal).expect("signal sent");
    }

    /// Is it still running?
    pub fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| child.try_wait().expect("child").is_none())
    }

    /// What it has said on standard error so far.
    #[must_use]
    pub fn said(&self) -> String {
        std::fs::read_to_string(&self.files[1]).expect("caught")
    }

    /// Wait for its end.
    ///
    /// # Panics
    /// If that does not come.
    #[must_use]
    pub fn wait(mut self) -> Ran {
        let mut child = self.child.take().expect("running");
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = child.try_wait().expect("child") {
                break status;
            }
            if Instant::now() >= deadline {
                let _ = child.kill();
                let _ = child.wait();
                panic!("never ended: {}\n{}", self.command, self.said());
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
        };
        let [stdout, stderr] = [0, 1].map(|at| std::fs::read(&self.files[at]).expect("caught"));
        let command = std::mem::take(&mut self.command);
        Ran {
            code: status.code(),
            signal: status.signal(),
            stdout,
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
            command,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A command that has ended.
#[derive(Debug)]
pub struct Ran {
    /// Its exit code, unless a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// What it wrote.
    pub stdout: Vec<u8>,
    /// What it said.
    pub stderr: String,
    command: String,
}

impl Ran {
    /// Assert that it succeeded.
    #[must_use = "assert something about it, or say `let _ =`"]
    pub fn done(self) -> Self {
        self.exit(0, &[])
    }

    /// Assert its exit code, and that standard error holds all of these, whatever their case.
    #[must_use = "assert something about it, or say `let _ =`"]
    pub fn exit(self, code: i32, says: &[&str]) -> Self {
        assert_eq!(self.code, Some(code), "signal {:?}: {}\n{}", self.signal, self.command, self.stderr);
        let said = self.stderr.to_lowercase();
        for text in says {
            assert!(
                said.contains(&text.to_lowercase()),
                "not said: {text:?}: {}\n{}",
                self.command,
                self.stderr
            );
        }
        self
    }

    /// Standard output as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8(self.stdout.clone()).expect("text")
    }

    /// Standard output as wire objects, one a line.
    #[must_use]
    pub fn lines(&self) -> Vec<Response> {
        let parse = |line: &str| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        self.text().lines().map(parse).collect()
    }
}
