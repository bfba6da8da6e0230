//! Puts the daemon together, and takes it apart.
//!
//! Start order, each step before the next can matter: 0. `main` closes what it inherited; 1. harden the process, before anything secret can be in it; 2. read the
//! configuration; 3. take the socket's lock, so that the loser of a start race leaves before it costs anything; 4. start
//! workers, jobs and exports; 5. listen: who can connect is served by a daemon that is ready. The end is the reverse: nothing new,
//! exports are drained (or dropped) and active jobs finish (or are cancelled), the socket goes, the workers are joined, the lock is
//! released.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Instant;

use rustix::process::{Resource, Rlimit};
use tracing_subscriber::EnvFilter;

use crate::config::{self, Config, Overrides, RawConfig, Surroundings};
use crate::control::dispatch::{About, Service, memlock_needed};
use crate::control::listener::{self, Listener};
use crate::control::{Control, ControlConfig, Mailbox};
use crate::error::{Error, ErrorKind, Result};
use crate::export::Exports;
use crate::job::{JobConfig, Registry};
use crate::limits;
use crate::pipeline::Pipeline;
use crate::sys::{affinity, process};

/// The environment variable that sets what is logged, over the configuration.
pub const LOG_VARIABLE: &str = "CRYPTD_LOG";

/// What the command line asks for.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Configuration file.
    pub config: Option<PathBuf>,
    /// What goes over it.
    pub over: Overrides,
    /// Only check the configuration.
    pub check: bool,
}

/// How a run ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It served, and left when told to or idle.
    Left,
    /// Another daemon serves this socket already.
    AlreadyServed,
    /// The configuration is valid.
    Checked,
}

/// Run the daemon to its end.
///
/// # Errors
/// `Invalid` and `Unsupported`: the configuration. Anything else: the machine.
pub fn run(options: &Options) -> Result<Ended> {
    let hardened = process::harden()?;
    let raw = config::read(options.config.as_deref())?;
    // Before the rest is checked: a kernel that fails its self-test is told in the log.
    start_log(raw.log.as_deref().unwrap_or("info"))?;
    let config = configure(raw, options)?;
    if options.check {
        return Ok(Ended::Checked);
    }
    let signals = catch_signals()?;
    let passed = Listener::passed()?;
    let uid = rustix::process::geteuid().as_raw();
    let reserved = match passed {
        Some(_) => None,
        None => match listener::reserve(&config.socket, uid)? {
            Some(reserved) => Some(reserved),
            None => return Ok(Ended::AlreadyServed),
        },
    };
    let connections_max = raise_descriptor_limit();

    let started = Instant::now();
    let pipeline = Arc::new(Pipeline::start(&config.pipeline)?);
    let workers = pipeline.status();
    let mailbox = Mailbox::new()?;
    let job_config = JobConfig {
        kernel: config.kernel,
        running_max: config.running_max,
        per_user_max: config.per_user_max,
        remembered_max: config.remembered_max,
    };
    let (notify, home) = (Arc::clone(&mailbox), Arc::new(OnceLock::<Weak<Registry>>::new()));
    let jobs = Arc::clone(&home);
    let changed = move |job| {
        // Looked at here and not when the notice is read: by then it may be forgotten.
        let info = jobs.get().and_then(Weak::upgrade).and_then(|registry| registry.show(job));
        notify.job_changed(job, info);
    };
    let registry = Registry::start(job_config, pipeline.clone(), Box::new(changed));
    let ended = Arc::clone(&mailbox);
    let exports = Exports::new(config.kernel, pipeline, Box::new(move || ended.export_ended()));
    home.set(Arc::downgrade(&registry)).expect("set once, before the first job");

    let listener = match (passed, reserved) {
        (Some(listener), _) => listener,
        (None, Some(reserved)) => reserved.listen()?,
        (None, None) => unreachable!("a socket is passed or reserved"),
    };
    let about = About {
        hello: proto::Hello {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            protocol: proto::PROTOCOL_VERSION,
            pid: std::process::id(),
            uid,
        },
        socket: listener.path().map(|path| path.display().to_string()),
        started,
        kernel: config.kernel.name().to_owned(),
        kernel_forced: config.kernel_forced,
        workers,
        idle_exit: config.idle_exit,
    };
    announce(&about, hardened.memory_locked);
    let control_config = ControlConfig {
        uid,
        idle_exit: config.idle_exit,
        client_stall: config.client_stall,
        connections_max,
    };
    let service = Service { registry, exports, about };
    let control = Control::new(control_config, service, listener, signals, mailbox)?;
    // systemd, if it is there, starts what waits for us. Not being there is not an error.
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        tracing::warn!(%error, "cannot tell systemd that we are ready");
    }
    control.run()?;
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    Ok(Ended::Left)
}

fn configure(raw: RawConfig, options: &Options) -> Result<Config> {
    let around = Surroundings {
        cpus: affinity::allowed_cpus()?,
        runtime_dir: std::env::var_os(proto::socket::RUNTIME_DIR_VARIABLE),
        uid: rustix::process::geteuid().as_raw(),
    };
    Config::build(raw, &options.over, &around, options.config.as_deref())
}

fn start_log(level: &str) -> Result<()> {
    let filter = match std::env::var(LOG_VARIABLE) {
        Ok(text) => EnvFilter::try_new(&text).map_err(|error| {
            Error::new(ErrorKind::Invalid, "bad log filter")
                .at(format_args!("{LOG_VARIABLE}={text}"))
                .because(error)
        })?,
        Err(_) => EnvFilter::new(level),
    };
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false).init();
    Ok(())
}

/// One byte can be read for every SIGTERM and SIGINT. SIGPIPE is ignored already: Rust's runtime does that. SIGXFSZ would
/// end the process, and every job with it, at the first write beyond RLIMIT_FSIZE; with a handler that write fails with
/// EFBIG and only its own job ends.
fn catch_signals() -> Result<UnixStream> {
    let failed = |error| Error::io("cannot catch signals", error);
    let (read, write) = UnixStream::pair().map_err(failed)?;
    read.set_nonblocking(true).map_err(failed)?;
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        let write = write.try_clone().map_err(failed)?;
        signal_hook::low_level::pipe::register(signal, write).map_err(failed)?;
    }
    signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Arc::default()).map_err(failed)?;
    Ok(read)
}

/// As many descriptors as we may have, and the connections that leaves room for.
fn raise_descriptor_limit() -> usize {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    let current = match rustix::process::setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum,
        Err(_) => limit.current,
    };
    let descriptors = current.map_or(usize::MAX, |most| usize::try_from(most).unwrap_or(usize::MAX));
    let connections =
        descriptors.saturating_sub(limits::DESCRIPTORS_RESERVED).clamp(16, limits::CONNECTIONS_MAX);
    if connections < limits::CONNECTIONS_MAX {
        tracing::warn!(
            descriptors,
            connections,
            "the limit of open files (RLIMIT_NOFILE) bounds the connections"
        );
    }
    connections
}

fn announce(about: &About, memory_locked: bool) {
    let queue = about.workers.first().map_or("none", |worker| worker.queue.as_str());
    tracing::info!(
        version = about.hello.version,
        socket = about.socket.as_deref().unwrap_or("from systemd"),
        kernel = about.kernel,
        forced = about.kernel_forced,
        workers = about.workers.len(),
        queue,
        "serving"
    );
    if let Some(reason) = about.workers.first().and_then(|worker| worker.queue_fallback_reason.as_deref()) {
        tracing::warn!(reason, "io_uring cannot be used; a thread pool moves the data, at a higher cost");
    }
    if let (false, Some(needed)) = (memory_locked, memlock_needed(&about.workers)) {
        let limit = process::memlock_limit().unwrap_or(0);
        tracing::warn!(
            limit,
            needed,
            "not all buffers are locked in memory: plaintext could be swapped; raise RLIMIT_MEMLOCK to the bytes needed"
        );
    }
}
