//! Finding the daemon, and starting one for this user when none answers.
//!
//! Two first callers may both start one: the daemon takes a lock, the loser leaves, and both callers find the winner
//! on the socket. So all there is to do here is to start and to knock, a bounded number of times.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

use crate::args::Global;
use crate::client::Client;
use crate::report::{Error, Result};
use proto::errno::describe;

/// A daemon we started leaves after this many seconds without a job or a connection.
pub const IDLE_EXIT_SECONDS: u64 = 300;
/// How long a daemon may take from its start to its socket: self-tests and buffers, on a busy machine.
const START_TIMEOUT: Duration = Duration::from_secs(20);
/// A longer log is emptied before another daemon starts, bytes.
const LOG_LIMIT: u64 = 1 << 20;

/// The socket that was named, or this user's.
pub fn socket_path(global: &Global) -> PathBuf {
    global.socket.clone().unwrap_or_else(|| {
        let us = rustix::process::geteuid().as_raw();
        let runtime_dir = std::env::var_os(proto::socket::RUNTIME_DIR_VARIABLE);
        let runtime_dir = runtime_dir.filter(|dir| !is_anothers(Path::new(dir), us));
        proto::socket::default_path(runtime_dir.as_deref(), us)
    })
}

/// After `su` or `sudo -E` the variable still names the directory of the user before, where we must leave nothing.
fn is_anothers(dir: &Path, us: u32) -> bool {
    std::fs::metadata(dir).is_ok_and(|found| found.uid() != us)
}

/// A daemon that answers; never starts one.
pub fn reach(global: &Global) -> Result<Client> {
    let socket = socket_path(global);
    Client::connect(&socket)?.ok_or_else(|| {
        Error::unreachable(format!("no daemon answers on {}", socket.display()))
            .hint("start one with `cryptctl daemon start`")
    })
}

/// A daemon that answers; starts one if need be, unless told not to.
pub fn reach_or_start(global: &Global) -> Result<Client> {
    if global.no_start { reach(global) } else { start(global, IDLE_EXIT_SECONDS).map(|(client, _)| client) }
}

/// A daemon that answers, and whether it is a new one.
pub fn start(global: &Global, idle_exit_seconds: u64) -> Result<(Client, bool)> {
    let socket = socket_path(global);
    if let Some(client) = Client::connect(&socket)? {
        return Ok((client, false));
    }
    prepare_directory(&socket, global.socket.is_none())?;
    let log = Log::open(&socket)?;
    let mut child = spawn(&socket, &log, idle_exit_seconds)?;
    let deadline = Instant::now() + START_TIMEOUT;
    let mut pause = Duration::from_millis(2);
    loop {
        if let Some(client) = Client::connect(&socket)? {
            return Ok((client, true));
        }
        if let Ok(Some(status)) = child.try_wait() {
            if !status.success() {
                return Err(Error::unreachable(format!(
                    "cryptd could not start ({status}){}",
                    log.last_words()
                ))
                .hint(format!("its log is {}", log.path.display())));
            }
            // It lost the race for the lock, and the winner is about to answer; unless the winner was just leaving.
            if let Some(client) = Client::connect(&socket)? {
                return Ok((client, true));
            }
            child = spawn(&socket, &log, idle_exit_seconds)?;
        }
        if Instant::now() >= deadline {
            return Err(Error::unreachable(format!(
                "cryptd did not answer within {} seconds of its start",
                START_TIMEOUT.as_secs()
            ))
            .hint(format!("its log is {}", log.path.display())));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

/// The socket's directory, private to us if it is the default one.
fn prepare_directory(socket: &Path, default: bool) -> Result<()> {
    let directory = match socket.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if default {
        let unusable = |why: String| {
            Error::unreachable(format!("cannot use {} for the socket: {why}", directory.display()))
                .hint("set XDG_RUNTIME_DIR to a directory of yours, or name a socket with --socket")
        };
        match DirBuilder::new().mode(0o700).create(directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(unusable(describe(&error)));
            }
            _ => {}
        }
        // Somebody else may have made /tmp/cryptd-UID before us.
        let found = std::fs::symlink_metadata(directory).map_err(|error| unusable(describe(&error)))?;
        if !found.is_dir() || found.uid() != rustix::process::geteuid().as_raw() || found.mode() & 0o077 != 0
        {
            return Err(unusable("it is not a directory that only you can enter".to_owned()));
        }
    }
    Ok(())
}

/// What daemons of one socket have to say: `SOCKET.log`, appended to by each, and emptied when it has become long.
struct Log {
    path: PathBuf,
    file: File,
    /// Bytes of earlier daemons.
    before: u64,
}

impl Log {
    fn open(socket: &Path) -> Result<Self> {
        let mut path = socket.as_os_str().to_owned();
        path.push(".log");
        let path = PathBuf::from(path);
        let unusable =
            |why: String| Error::unreachable(format!("cannot start cryptd: {}: {why}", path.display()));
        let failed = |error: io::Error| unusable(describe(&error));
        // Not followed, and no wait for a reader: in a directory others can write to, anything may be in its place.
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = File::options()
            .create(true)
            .read(true)
            .append(true)
            .mode(0o600)
            .custom_flags(flags.bits().cast_signed())
            .open(&path)
            .map_err(failed)?;
        let found = file.metadata().map_err(failed)?;
        if !found.is_file() || found.uid() != rustix::process::geteuid().as_raw() || found.nlink() != 1 {
            return Err(unusable("it is not a file of yours alone".to_owned())
                .hint("name a socket in a directory of yours with --socket"));
        }
        let mut before = found.len();
        if before > LOG_LIMIT {
            file.set_len(0).map_err(failed)?;
            before = 0;
        }
        Ok(Self { path, file, before })
    }

    /// The last line that the daemon just started has written, to spare a look into the log.
    fn last_words(&self) -> String {
        let mut text = vec![0; 64 << 10];
        let end = self.file.metadata().map_or(self.before, |found| found.len());
        let from = self.before.max(end.saturating_sub(64 << 10));
        let length = self.file.read_at(&mut text, from).unwrap_or(0);
        let text = String::from_utf8_lossy(&text[..length]);
        let last = text.lines().rev().find(|line| !line.trim().is_empty());
        last.map(|line| format!(": {line}")).unwrap_or_default()
    }
}

fn spawn(socket: &Path, log: &Log, idle_exit_seconds: u64) -> Result<Child> {
    let program = beside_us().unwrap_or_else(|| PathBuf::from("cryptd"));
    let failed = |what: &str, error: &io::Error| {
        Error::unreachable(format!("cannot start cryptd: {what}: {}", describe(error)))
    };
    let log_file = log.file.try_clone().map_err(|error| failed("log", &error))?;
    // A process group of its own keeps the terminal's Ctrl-C and hang-up away from it; its own directory is `/`, so
    // that it holds no filesystem. A relative socket would then mean another place.
    let socket = std::path::absolute(socket).map_err(|error| failed("current directory", &error))?;
    Command::new(&program)
        .arg("--socket")
        .arg(socket)
        .args(["--idle-exit", &idle_exit_seconds.to_string()])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::from(log_file))
        .process_group(0)
        .spawn()
        .map_err(|error| {
            failed(&program.display().to_string(), &error).hint("install cryptd beside cryptctl, or in PATH")
        })
}

/// `cryptd` in the directory of our own executable.
fn beside_us() -> Option<PathBuf> {
    let path = std::env::current_exe().ok()?.with_file_name("cryptd");
    path.is_file().then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_default_directory_is_made_private_and_must_be_so() {
        let dir = tempfile::tempdir().expect("dir");
        let socket = dir.path().join("cryptd").join("cryptd.sock");
        prepare_directory(&socket, true).expect("made");
        let made = dir.path().join("cryptd");
        assert_eq!(std::fs::metadata(&made).expect("exists").mode() & 0o777, 0o700);
        assert!(prepare_directory(&socket, true).is_ok(), "a second time");
        std::fs::set_permissions(&made, std::fs::Permissions::from_mode(0o755)).expect("chmod");
        assert!(prepare_directory(&socket, true).is_err());
        assert!(
            prepare_directory(&socket, false).is_ok(),
            "a named socket's directory is the user's own choice"
        );
    }

    #[test]
    fn another_users_runtime_directory_is_not_ours() {
        let dir = tempfile::tempdir().expect("dir");
        let us = rustix::process::geteuid().as_raw();
        assert!(!is_anothers(dir.path(), us));
        assert!(is_anothers(dir.path(), us + 1));
        assert!(!is_anothers(&dir.path().join("none"), us), "a missing one is told when it is used");
    }

    #[test]
    fn each_socket_has_its_own_log_and_only_the_latest_daemon_is_quoted() {
        let dir = tempfile::tempdir().expect("dir");
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        std::fs::write(dir.path().join("one.log"), "error of last week\n").expect("write");
        let log = Log::open(&one).expect("log");
        assert_eq!(log.last_words(), "");
        (&log.file).write_all(b"started\nlast\n\n").expect("write");
        assert_eq!(log.last_words(), ": last");
        assert_eq!(Log::open(&two).expect("log").path, dir.path().join("two.log"));
    }

    #[test]
    fn a_long_log_is_emptied_and_a_planted_one_refused() {
        let dir = tempfile::tempdir().expect("dir");
        let (socket, log) = (dir.path().join("s"), dir.path().join("s.log"));
        std::fs::write(&log, vec![b'x'; 1 << 20]).expect("write");
        assert_eq!(Log::open(&socket).expect("log").before, 1 << 20);
        std::fs::write(&log, vec![b'x'; (1 << 20) + 1]).expect("write");
        assert_eq!(Log::open(&socket).expect("log").before, 0);
        assert_eq!(std::fs::metadata(&log).expect("log").len(), 0);
        let precious = dir.path().join("precious");
        std::fs::write(&precious, "p").expect("write");
        std::fs::remove_file(&log).expect("remove");
        std::os::unix::fs::symlink(&precious, &log).expect("link");
        assert!(Log::open(&socket).is_err());
        std::fs::remove_file(&log).expect("remove");
        std::fs::hard_link(&precious, &log).expect("link");
        assert!(Log::open(&socket).is_err());
    }
}
