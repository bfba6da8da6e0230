//! What every test that needs more than one crate stands on: a daemon of its own, a raw client of the wire, seeds, and a way
//! to say loudly why a test did not run.
//!
//! Nothing here knows what is right: the tests do.

pub mod crash;
pub mod guest;
pub mod header;
pub mod jobs;
mod loop_device;
pub mod luks;
pub mod luks2;
pub mod nbd;
pub mod nbd_servers;
mod place;
pub mod reencrypt;
pub mod rewrite;
pub mod rewriting;
pub mod scene;
pub mod served;

use std::io::{BufRead, BufReader, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use proto::{Body, Call, ErrorKind, Event, Failure, JobInfo, Reply, Request, Response};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use rustix::process::{Pid, Signal};

pub use loop_device::{LoopDevice, loop_device};
pub use place::{NOBODY, Place, Ran, Running, User, as_each_user};

/// Longer than any machine needs: reached only by a failing test.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Say why a test proves nothing here. Use as `return skip("no loop devices: not root")`.
pub fn skip(reason: &str) {
    let name = std::thread::current().name().unwrap_or("test").to_owned();
    eprintln!("SKIPPED {name}: {reason}");
}

/// Are we root? Tests that need it skip otherwise.
#[must_use]
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Copy a program of this workspace to `copy`, for users whom the build directory may be closed to.
///
/// By cp(1): had this process the copy open for writing, a child that another test forks at that instant would hold it
/// too, and the kernel refuses to run what somebody may still write (`ETXTBSY`).
pub fn copy_program(name: &str, copy: &Path) {
    let copied = Command::new("cp").arg(program(name)).arg(copy).status().expect("cp(1) runs");
    assert!(copied.success(), "{name} is not copied to {}", copy.display());
}

/// A program of this workspace, built if need be. `CRYPTD_BIN_DIR` names a directory of ready ones instead.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        if let Some(dir) = std::env::var_os("CRYPTD_BIN_DIR") {
            return dir.into();
        }
        // target/PROFILE/deps/TEST-HASH: the programs belong two levels up.
        let own = std::env::current_exe().expect("a test has a path");
        let dir = own.ancestors().nth(2).expect("target/PROFILE").to_owned();
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.args(["build", "--quiet", "--package", "engine", "--package", "ctl", "--bins"]);
        if dir.ends_with("release") {
            cargo.arg("--release");
        }
        cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
        assert!(cargo.status().expect("cargo runs").success(), "the programs under test do not build");
        dir
    })
    .join(name)
}

/// A directory that is gone when dropped.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// A fresh one under the system's temporary directory, mode 0700.
    #[must_use]
    pub fn new() -> Self {
        Self::under(&std::env::temp_dir())
    }

    /// A fresh one under `parent`, for a certain filesystem.
    #[must_use]
    pub fn under(parent: &Path) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = parent.join(format!("cryptd-test-{}-{number}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        rustix::fs::mkdir(&path, rustix::fs::Mode::RWXU).expect("scratch directory");
        Self(path)
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// A file in it with this content.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.join(name);
        std::fs::write(&path, content).expect("write a scratch file");
        path
    }

    /// A path in it.
    #[must_use]
    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A seed for a randomised test: `TEST_SEED` if set, else from the clock; printed, so that a failure can be rerun.
#[must_use]
pub fn seed() -> u64 {
    let seed = std::env::var("TEST_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970");
        now.as_secs() ^ u64::from(now.subsec_nanos()).rotate_left(32)
    });
    eprintln!("TEST_SEED={seed}");
    seed
}

/// A small, good enough generator (SplitMix64): the same numbers for a seed on every machine.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// From a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Below `end`, which is not zero.
    pub fn below(&mut self, end: usize) -> usize {
        let end = u64::try_from(end).expect("a length");
        usize::try_from(self.next_u64() % end).expect("below a length")
    }

    /// Fill with bytes.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.next_u64().to_le_bytes()[..chunk.len()]);
        }
    }
}

/// How to start a daemon.
#[derive(Debug)]
pub struct Start {
    config: String,
    args: Vec<String>,
    program: Option<PathBuf>,
    under: Vec<String>,
    user: Option<u32>,
}

impl Start {
    /// Portable settings that suit a test: two workers, small buffers, thread or ring as the machine has it.
    #[must_use]
    pub fn new() -> Self {
        Self { config: String::new(), args: Vec::new(), program: None, under: Vec::new(), user: None }
    }

    /// A line of the configuration file.
    #[must_use]
    pub fn config(mut self, line: &str) -> Self {
        self.config.push_str(line);
        self.config.push('\n');
        self
    }

    /// An argument of the command line.
    #[must_use]
    pub fn arg(mut self, arg: &str) -> Self {
        self.args.push(arg.to_owned());
        self
    }

    /// Run under a program that executes its arguments after these words of its own: `prlimit --fsize=…`.
    #[must_use]
    pub fn under(mut self, words: &[&str]) -> Self {
        self.under = words.iter().map(|word| (*word).to_owned()).collect();
        self
    }

    /// Run as this user and group (root only).
    #[must_use]
    pub fn user(mut self, uid: u32) -> Self {
        self.user = Some(uid);
        self
    }

    /// The command, for a socket in `dir`; also for daemons that are expected not to come up.
    #[must_use]
    pub fn command(&self, dir: &Path) -> Command {
        let cryptd = self.program.clone().unwrap_or_else(|| program("cryptd"));
        let mut command = match self.under.split_first() {
            None => {
                // As in `place`: signals that we ignore are not ours to hand down.
                let mut command = Command::new("env");
                command.arg("--default-signal").arg(cryptd);
                command
            }
            Some((first, rest)) => {
                let mut command = Command::new(first);
                command.args(rest).arg(cryptd);
                command
            }
        };
        let config = dir.join("cryptd.toml");
        std::fs::write(&config, &self.config).expect("configuration written");
        command.arg("--config").arg(config).arg("--socket").arg(dir.join("cryptd.sock")).args(&self.args);
        command.env_remove("XDG_RUNTIME_DIR").env_remove("CRYPTD_LOG").stdin(Stdio::null());
        command
    }

    /// Start it and wait until it serves.
    #[must_use]
    pub fn daemon(mut self) -> Daemon {
        let dir = Scratch::new();
        if let Some(uid) = self.user {
            // Its own copy: the build directory may be closed to that user.
            let copy = dir.join("cryptd");
            copy_program("cryptd", &copy);
            self.program = Some(copy.clone());
            for path in [dir.path(), &copy] {
                std::os::unix::fs::chown(path, Some(uid), Some(uid)).expect("given to the user");
            }
        }
        let mut command = self.command(dir.path());
        if let Some(uid) = self.user {
            use std::os::unix::process::CommandExt;
            command.uid(uid).gid(uid).current_dir("/");
            std::os::unix::fs::chown(dir.join("cryptd.toml"), Some(uid), Some(uid))
                .expect("given to the user");
        }
        let log = std::fs::File::create(dir.join("cryptd.log")).expect("log");
        if let Some(uid) = self.user {
            // A daemon that cryptctl starts in its place later appends to it.
            std::os::unix::fs::chown(dir.join("cryptd.log"), Some(uid), Some(uid))
                .expect("given to the user");
        }
        let child = command.stderr(log).spawn().expect("cryptd starts");
        let mut daemon = Daemon { child: Some(child), dir };
        let deadline = Instant::now() + PATIENCE;
        while UnixStream::connect(daemon.socket()).is_err() {
            let ended = daemon.child.as_mut().expect("running").try_wait().expect("child");
            assert!(ended.is_none(), "cryptd ended at once ({ended:?}): {}", daemon.log());
            assert!(Instant::now() < deadline, "cryptd does not serve: {}", daemon.log());
            std::thread::sleep(Duration::from_millis(5));
        }
        daemon
    }
}

impl Default for Start {
    fn default() -> Self {
        Self::new()
    }
}

/// A running daemon with a directory of its own; killed when dropped.
#[derive(Debug)]
pub struct Daemon {
    child: Option<Child>,
    /// Its directory: socket, configuration, log.
    pub dir: Scratch,
}

impl Daemon {
    /// One with the defaults.
    #[must_use]
    pub fn start() -> Self {
        Start::new().daemon()
    }

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.dir.join("cryptd.sock")
    }

    /// What it has logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("cryptd.log")).unwrap_or_default()
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("running").id()
    }

    /// A connection to it.
    #[must_use]
    pub fn client(&self) -> Client {
        Client::connect(&self.socket())
    }

    /// Send it a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.pid()).expect("a process id");
        rustix::process::kill_process(Pid::from_raw(pid).expect("not zero"), signal).expect("signal sent");
    }

    /// Wait for its end.
    pub fn wait(&mut self) -> ExitStatus {
        let mut child = self.child.take().expect("running");
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = child.try_wait().expect("child") {
                return status;
            }
            if Instant::now() >= deadline {
                let _ = child.kill();
                let _ = child.wait();
                panic!("cryptd does not end: {}", self.log());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Is it still running?
    pub fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| child.try_wait().expect("child").is_none())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A client of the wire that knows no manners: it sends any bytes with any descriptors.
#[derive(Debug)]
pub struct Client {
    reader: BufReader<UnixStream>,
    next: u64,
}

impl Client {
    /// To a socket.
    ///
    /// # Panics
    /// If nobody listens.
    #[must_use]
    pub fn connect(socket: &Path) -> Self {
        Self::over(UnixStream::connect(socket).expect("connected"))
    }

    /// Over a connected socket.
    #[must_use]
    pub fn over(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
        stream.set_write_timeout(Some(PATIENCE)).expect("timeout");
        Self { reader: BufReader::new(stream), next: 1 }
    }

    /// The socket.
    #[must_use]
    pub fn stream(&self) -> &UnixStream {
        self.reader.get_ref()
    }

    /// Send raw bytes.
    ///
    /// # Errors
    /// As `write`.
    pub fn send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream().write_all(bytes)
    }

    /// Send raw bytes with descriptors on the first of them.
    pub fn send_with(&mut self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)), "SCM_MAX_FD is 253");
        let sent =
            rustix::net::sendmsg(self.stream(), &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)
                .expect("sent");
        self.send(&bytes[sent..]).expect("sent");
    }

    /// Send a request; returns its id.
    pub fn request(&mut self, call: Call, descriptors: &[BorrowedFd<'_>]) -> u64 {
        let id = self.next;
        self.next += 1;
        let mut line = serde_json::to_vec(&Request { v: proto::PROTOCOL_VERSION, id, call }).expect("json");
        line.push(b'\n');
        if descriptors.is_empty() {
            self.send(&line).expect("sent");
        } else {
            self.send_with(&line, descriptors);
        }
        id
    }

    /// The next line; `None` when the daemon has closed.
    pub fn receive(&mut self) -> Option<Response> {
        let mut line = Vec::new();
        let most = u64::try_from(proto::MAX_RESPONSE).expect("a length") + 1;
        match (&mut self.reader).take(most).read_until(b'\n', &mut line) {
            Ok(0) => None,
            Ok(_) => Some(serde_json::from_slice(&line).unwrap_or_else(|error| {
                panic!("no response: {error}: {}", String::from_utf8_lossy(&line));
            })),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => None,
            Err(error) => panic!("the daemon says nothing: {error}"),
        }
    }

    /// Send a request and take its reply.
    ///
    /// # Errors
    /// What the daemon refused it with.
    pub fn call(&mut self, call: Call) -> Result<Reply, Failure> {
        self.call_with(call, &[])
    }

    /// [`Client::call`], with descriptors.
    ///
    /// # Errors
    /// What the daemon refused it with.
    pub fn call_with(&mut self, call: Call, descriptors: &[BorrowedFd<'_>]) -> Result<Reply, Failure> {
        let id = self.request(call, descriptors);
        let response = self.receive().expect("a reply, not the end");
        assert_eq!(response.id, id, "{response:?}");
        match response.body {
            Body::Ok(reply) => Ok(reply),
            Body::Error(failure) => Err(failure),
            Body::Event(event) => panic!("an event of no watch: {event:?}"),
        }
    }

    /// Take one error line and its id.
    pub fn refusal(&mut self) -> (u64, ErrorKind, String) {
        let response = self.receive().expect("a reply, not the end");
        match response.body {
            Body::Error(failure) => (response.id, failure.kind, failure.message),
            other => panic!("expected a refusal: {other:?}"),
        }
    }

    /// Take events until the watched job has ended; returns the others and the end.
    pub fn finished(&mut self) -> (Vec<Event>, JobInfo) {
        let mut events = Vec::new();
        loop {
            match self.receive().expect("events, not the end").body {
                Body::Event(Event::Finished(job)) => return (events, *job),
                Body::Event(event) => events.push(event),
                other => panic!("expected an event: {other:?}"),
            }
        }
    }
}

/// A pipe that holds `secret` and has no writer: what `Volume::key_fd` wants.
#[must_use]
pub fn secret_pipe(secret: &[u8]) -> OwnedFd {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).expect("pipe");
    let mut write = std::fs::File::from(write);
    write.write_all(secret).expect("a secret fits a pipe");
    read
}

/// A sealed memory file that holds a secret: for tests beside which others start programs, because between their `fork` and
/// their `exec` a child holds a copy of every descriptor, also of the writing end of a pipe that was just closed.
///
/// # Panics
/// Without memory for it.
#[must_use]
pub fn sealed_secret(secret: &[u8]) -> OwnedFd {
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
    let fd = memfd_create("secret", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC).expect("memfd");
    let mut file = std::fs::File::from(fd);
    file.write_all(secret).expect("written");
    fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW).expect("sealed");
    file.into()
}

/// An encryption between two pipes that runs until its writer closes, or somebody cancels it.
#[derive(Debug)]
pub struct Endless {
    /// Submit this with [`Endless::descriptors`].
    pub submit: proto::Submit,
    /// Close it (`take`) and the job's source ends.
    pub writer: Option<OwnedFd>,
    /// Where the job writes to.
    pub reader: OwnedFd,
    source: OwnedFd,
    sink: OwnedFd,
    key: OwnedFd,
}

impl Endless {
    /// With AES-256-XTS over 512-byte units.
    #[must_use]
    pub fn new(detach: bool) -> Self {
        let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).expect("pipe");
        let ((source, writer), (reader, sink)) = (pipe(), pipe());
        let mut key = [0; 64];
        Random::new(1).fill(&mut key);
        let text = r#"{"action":"encrypt","source":{"fd":0,"name":"-","stream":true},
            "sink":{"fd":1,"name":"-","stream":true},
            "volume":{"format":{"raw":{"key_bytes":64,"data_unit":512,"tweak":"plain64"}},"key_fd":2}}"#;
        let submit: proto::Submit = serde_json::from_str(text).expect("a valid submission");
        let submit = proto::Submit { detach, ..submit };
        Self { submit, writer: Some(writer), reader, source, sink, key: secret_pipe(&key) }
    }

    /// In the order the submission names them.
    #[must_use]
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 3] {
        [self.source.as_fd(), self.sink.as_fd(), self.key.as_fd()]
    }

    /// Submit it; the number of the job. Our copies of the job's ends are closed.
    pub fn start(self, client: &mut Client) -> (proto::JobId, Option<OwnedFd>, OwnedFd) {
        let reply = client.call_with(Call::Submit(Box::new(self.submit.clone())), &self.descriptors());
        match reply {
            Ok(Reply::Submitted { job, .. }) => (job, self.writer, self.reader),
            other => panic!("not submitted: {other:?}"),
        }
    }
}

/// Ask again until `true`.
///
/// # Panics
/// After [`PATIENCE`].
pub fn eventually(what: &str, mut check: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !check() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
