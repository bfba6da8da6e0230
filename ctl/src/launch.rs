//! Finding the daemon, and starting one for this user when none answers.
//!
//! Two first callers may both start one: the daemon takes a lock, the loser leaves, and both callers find the winner
//! on the socket. So all there is to do here is to start and to knock, a bounded number of times.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::args::Global;
use crate::client::Client;
use crate::report::{Error, Result, reason};

/// A daemon we started leaves after this many seconds without a job or a connection.
pub const IDLE_EXIT_SECONDS: u64 = 300;
/// How long a daemon may take from its start to its socket: self-tests and buffers, on a busy machine.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// The socket that was named, or this user's.
pub fn socket_path(global: &Global) -> PathBuf {
    global.socket.clone().unwrap_or_else(|| {
        let runtime_dir = std::env::var_os(proto::socket::RUNTIME_DIR_VARIABLE);
        proto::socket::default_path(runtime_dir.as_deref(), rustix::process::geteuid().as_raw())
    })
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
    let log = prepare_directory(&socket, global.socket.is_none())?;
    let mut child = spawn(&socket, &log, idle_exit_seconds)?;
    let deadline = Instant::now() + START_TIMEOUT;
    let mut pause = Duration::from_millis(2);
    loop {
        if let Some(client) = Client::connect(&socket)? {
            return Ok((client, true));
        }
        // A daemon that lost the race for the lock leaves with success, and the winner is about to answer.
        if let Ok(Some(status)) = child.try_wait()
            && !status.success()
        {
            return Err(Error::unreachable(format!("cryptd could not start ({status}){}", last_words(&log)))
                .hint(format!("its log is {}", log.display())));
        }
        if Instant::now() >= deadline {
            return Err(Error::unreachable(format!(
                "cryptd did not answer within {} seconds of its start",
                START_TIMEOUT.as_secs()
            ))
            .hint(format!("its log is {}", log.display())));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

/// The socket's directory, private to us if it is the default one. Returns the log's path.
fn prepare_directory(socket: &Path, default: bool) -> Result<PathBuf> {
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
                return Err(unusable(reason(&error)));
            }
            _ => {}
        }
        // Somebody else may have made /tmp/cryptd-UID before us.
        let found = std::fs::symlink_metadata(directory).map_err(|error| unusable(reason(&error)))?;
        if !found.is_dir() || found.uid() != rustix::process::geteuid().as_raw() || found.mode() & 0o077 != 0
        {
            return Err(unusable("it is not a directory that only you can enter".to_owned()));
        }
    }
    Ok(directory.join("cryptd.log"))
}

fn spawn(socket: &Path, log: &Path, idle_exit_seconds: u64) -> Result<Child> {
    let program = beside_us().unwrap_or_else(|| PathBuf::from("cryptd"));
    let failed = |what: &str, error: &io::Error| {
        Error::unreachable(format!("cannot start cryptd: {what}: {}", reason(error)))
    };
    let log_file = File::options()
        .create(true)
        .append(true)
        .mode(0o600)
        .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed())
        .open(log)
        .map_err(|error| failed(&log.display().to_string(), &error))?;
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

/// The last line of the log, to spare a look into it.
fn last_words(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    text.lines()
        .rev()
        .find(|line| !line.trim().is_empty())
        .map(|line| format!(": {line}"))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_default_directory_is_made_private_and_must_be_so() {
        let dir = tempfile::tempdir().expect("dir");
        let socket = dir.path().join("cryptd").join("cryptd.sock");
        assert_eq!(prepare_directory(&socket, true).expect("made"), dir.path().join("cryptd/cryptd.log"));
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
}
