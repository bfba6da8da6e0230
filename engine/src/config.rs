//! The configuration: as written ([`RawConfig`]) and as meant ([`Config`]).
//!
//! Everything is checked here, once: a [`Config`] holds no choice that is still open and no value out of its bounds. Every
//! error names the file, the key, the value and what is allowed. Nothing is opened here but the file itself.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::crypto::Kernel;
use crate::error::{Error, ErrorKind, Result};
use crate::limits;
use crate::pipeline::{PipelineConfig, QueueChoice};

/// The file as written. Absent keys take their defaults; unknown keys are errors.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawConfig {
    /// Path of the socket; default: the per-user path of `proto::socket`.
    pub socket: Option<PathBuf>,
    /// Permission bits of the socket, in octal as text: `"0600"`.
    pub socket_mode: Option<String>,
    /// Group of the socket, by name or number.
    pub socket_group: Option<String>,
    /// Leave after so many seconds without connections and jobs; 0: never.
    pub idle_exit: Option<u64>,
    /// Disconnect a client that has left everything unread for so many seconds.
    pub client_stall: Option<u64>,
    /// Force a kernel by name; default: the fastest this CPU has.
    pub kernel: Option<String>,
    /// `auto`, `io_uring` or `threads`.
    pub queue: Option<String>,
    /// How many workers, or on which CPUs; default: one on each CPU this process may use, at most 32.
    pub workers: Option<RawWorkers>,
    /// Pin each worker to its CPU.
    pub pin: Option<bool>,
    /// Bytes of one buffer, the largest chunk; default: 1 MiB, less from nine workers on.
    pub buffer_bytes: Option<u32>,
    /// Buffers of one worker.
    pub buffers_per_worker: Option<u32>,
    /// Jobs that run at once.
    pub running_max: Option<u32>,
    /// Jobs queued or running that one user may have.
    pub per_user_max: Option<u32>,
    /// Finished jobs remembered.
    pub remembered_max: Option<u32>,
    /// `error`, `warn`, `info`, `debug` or `trace`.
    pub log: Option<String>,
}

/// `workers = 4` or `workers = [0, 2, 4]`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum RawWorkers {
    /// So many, on the first CPUs allowed.
    Count(u32),
    /// One on each of these CPUs.
    Cpus(Vec<u32>),
}

/// What the command line says over the file.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// `--socket`.
    pub socket: Option<PathBuf>,
    /// `--idle-exit`; 0: never.
    pub idle_exit: Option<u64>,
}

/// What validation needs to know of the process, read once by the caller.
#[derive(Debug, Clone)]
pub struct Surroundings {
    /// CPUs this process may use, ascending. Never empty.
    pub cpus: Vec<u32>,
    /// `$XDG_RUNTIME_DIR`.
    pub runtime_dir: Option<std::ffi::OsString>,
    /// Effective user id.
    pub uid: u32,
}

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SocketConfig {
    /// Its path.
    pub path: PathBuf,
    /// Is it the per-user default, whose directory is ours to make and must be private?
    pub private_dir: bool,
    /// Permission bits.
    pub mode: u32,
    /// Group to give it to.
    pub group: Option<u32>,
}

/// A validated configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where to listen.
    pub socket: SocketConfig,
    /// Leave after this long without connections and jobs.
    pub idle_exit: Option<Duration>,
    /// Disconnect clients that leave everything unread for this long.
    pub client_stall: Duration,
    /// The kernel of every cipher.
    pub kernel: Kernel,
    /// Was it named?
    pub kernel_forced: bool,
    /// Workers and memory.
    pub pipeline: PipelineConfig,
    /// Jobs that run at once.
    pub running_max: u32,
    /// Jobs queued or running per user.
    pub per_user_max: u32,
    /// Finished jobs remembered.
    pub remembered_max: u32,
    /// Log level, as the filter takes it.
    pub log: tracing::Level,
}

/// Read and parse a file; `None` is the empty configuration.
///
/// # Errors
/// Unreadable, not TOML, unknown keys, values of the wrong type.
pub fn read(path: Option<&Path>) -> Result<RawConfig> {
    let Some(path) = path else { return Ok(RawConfig::default()) };
    let text = std::fs::read_to_string(path)
        .map_err(|error| Error::io("cannot read configuration", error).at(path.display()))?;
    toml::from_str(&text).map_err(|error| {
        Error::new(ErrorKind::Invalid, "bad configuration").at(path.display()).because(error)
    })
}

impl Config {
    /// Check everything and fill in the defaults. `file` is named in errors.
    ///
    /// # Errors
    /// A value outside what is allowed, or something this machine cannot do.
    pub fn build(
        raw: RawConfig,
        over: &Overrides,
        around: &Surroundings,
        file: Option<&Path>,
    ) -> Result<Self> {
        let check = Check { file };
        let kernel_forced = raw.kernel.is_some();
        let pipeline = check.pipeline(&raw, around)?;
        let idle = over.idle_exit.or(raw.idle_exit).unwrap_or(0);
        let stall = raw.client_stall.unwrap_or(limits::STALL_SECONDS);
        let jobs = 1..=limits::JOBS_MAX;
        Ok(Self {
            socket: check.socket(&raw, over, around)?,
            idle_exit: (idle > 0).then(|| Duration::from_secs(idle.min(u64::from(u32::MAX)))),
            client_stall: Duration::from_secs(check.within("client_stall", stall, 1..=86_400)?),
            kernel: check.kernel(raw.kernel.as_deref())?,
            kernel_forced,
            pipeline,
            running_max: check.within(
                "running_max",
                raw.running_max.unwrap_or(limits::RUNNING_JOBS),
                jobs.clone(),
            )?,
            per_user_max: check.within(
                "per_user_max",
                raw.per_user_max.unwrap_or(limits::JOBS_PER_USER),
                jobs,
            )?,
            remembered_max: check.within(
                "remembered_max",
                raw.remembered_max.unwrap_or(limits::REMEMBERED_JOBS),
                1..=limits::REMEMBERED_JOBS,
            )?,
            log: check.log(raw.log.as_deref())?,
        })
    }
}

/// Names the file in every complaint.
struct Check<'a> {
    file: Option<&'a Path>,
}

impl Check<'_> {
    fn wrong(&self, key: &str, value: impl std::fmt::Display, allowed: impl std::fmt::Display) -> Error {
        let at = self.file.map_or_else(|| "command line".to_owned(), |file| file.display().to_string());
        Error::new(ErrorKind::Invalid, format!("bad configuration: {key} = {value}"))
            .at(format_args!("{at}: allowed: {allowed}"))
    }

    fn within<T>(&self, key: &str, value: T, allowed: std::ops::RangeInclusive<T>) -> Result<T>
    where
        T: PartialOrd + std::fmt::Display + Copy,
    {
        if allowed.contains(&value) {
            Ok(value)
        } else {
            Err(self.wrong(key, value, format_args!("{} to {}", allowed.start(), allowed.end())))
        }
    }

    fn socket(&self, raw: &RawConfig, over: &Overrides, around: &Surroundings) -> Result<SocketConfig> {
        let named = over.socket.clone().or_else(|| raw.socket.clone());
        let private_dir = named.is_none();
        let path =
            named.unwrap_or_else(|| proto::socket::default_path(around.runtime_dir.as_deref(), around.uid));
        // `.new` is added while it is being made; sun_path holds 108 bytes with the final zero.
        if path.file_name().is_none() || path.as_os_str().len() > 103 {
            return Err(self.wrong("socket", path.display(), "a file path of at most 103 bytes"));
        }
        let path = if path.is_absolute() {
            path
        } else {
            std::path::absolute(&path)
                .map_err(|error| Error::io("no absolute path", error).at(path.display()))?
        };
        let mode = match raw.socket_mode.as_deref() {
            None => 0o600,
            Some(text) => u32::from_str_radix(text.trim_start_matches("0o"), 8)
                .ok()
                .filter(|mode| mode & !0o666 == 0 && mode & 0o600 == 0o600)
                .ok_or_else(|| {
                    self.wrong(
                        "socket_mode",
                        format_args!("{text:?}"),
                        "octal text from \"0600\" to \"0666\"",
                    )
                })?,
        };
        let group = match raw.socket_group.as_deref() {
            None => None,
            Some(name) => Some(group_id(name).ok_or_else(|| {
                self.wrong("socket_group", format_args!("{name:?}"), "a group of /etc/group, or its number")
            })?),
        };
        Ok(SocketConfig { path, private_dir, mode, group })
    }

    fn kernel(&self, name: Option<&str>) -> Result<Kernel> {
        let Some(name) = name else { return Kernel::best() };
        let kernel = Kernel::from_name(name)
            .ok_or_else(|| self.wrong("kernel", format_args!("{name:?}"), proto::KERNELS.join(", ")))?;
        kernel.self_test()?;
        Ok(kernel)
    }

    fn pipeline(&self, raw: &RawConfig, around: &Surroundings) -> Result<PipelineConfig> {
        let allowed = || {
            let list: Vec<String> = around.cpus.iter().map(u32::to_string).collect();
            format!("the CPUs this process may use: {}", list.join(", "))
        };
        let cpus = match &raw.workers {
            None => around.cpus[..limits::workers(around.cpus.len())].to_vec(),
            Some(RawWorkers::Count(count)) => {
                let most = around.cpus.len().min(limits::WORKERS_MAX);
                let most = u32::try_from(most).expect("WORKERS_MAX fits");
                let count = self.within("workers", *count, 1..=most)?;
                around.cpus[..usize::try_from(count).expect("at most WORKERS_MAX")].to_vec()
            }
            Some(RawWorkers::Cpus(list)) => {
                let mut cpus = list.clone();
                cpus.sort_unstable();
                cpus.dedup();
                let strangers = cpus.iter().any(|cpu| !around.cpus.contains(cpu));
                if cpus.is_empty() || cpus.len() != list.len() || strangers {
                    return Err(self.wrong("workers", format_args!("{list:?}"), allowed()));
                }
                cpus
            }
        };
        let queue = match raw.queue.as_deref() {
            None | Some("auto") => QueueChoice::Auto,
            Some("io_uring") => QueueChoice::IoUring,
            Some("threads") => QueueChoice::Threads,
            Some(other) => {
                return Err(self.wrong("queue", format_args!("{other:?}"), "auto, io_uring, threads"));
            }
        };
        let workers = u32::try_from(cpus.len()).expect("as many as CPUs");
        let buffer_bytes = raw.buffer_bytes.unwrap_or_else(|| limits::buffer_bytes(workers));
        if !buffer_bytes.is_power_of_two()
            || !(limits::BUFFER_BYTES_MIN..=limits::BUFFER_BYTES_MAX).contains(&buffer_bytes)
        {
            let allowed =
                format!("a power of two, {} to {}", limits::BUFFER_BYTES_MIN, limits::BUFFER_BYTES_MAX);
            return Err(self.wrong("buffer_bytes", buffer_bytes, allowed));
        }
        let buffers_per_worker = match raw.buffers_per_worker {
            None => limits::buffers_per_worker(workers, buffer_bytes),
            Some(count) => self.within(
                "buffers_per_worker",
                count,
                limits::BUFFERS_PER_WORKER_MIN..=limits::BUFFERS_PER_WORKER_MAX,
            )?,
        };
        Ok(PipelineConfig { cpus, pin: raw.pin.unwrap_or(true), queue, buffer_bytes, buffers_per_worker })
    }

    fn log(&self, level: Option<&str>) -> Result<tracing::Level> {
        match level.unwrap_or("info") {
            "error" => Ok(tracing::Level::ERROR),
            "warn" => Ok(tracing::Level::WARN),
            "info" => Ok(tracing::Level::INFO),
            "debug" => Ok(tracing::Level::DEBUG),
            "trace" => Ok(tracing::Level::TRACE),
            other => Err(self.wrong("log", format_args!("{other:?}"), "error, warn, info, debug, trace")),
        }
    }
}

/// A group's number, by number or by its line in `/etc/group`. A system service's group is a local one; directories
/// (NSS) are not asked, because that would load foreign code into the process that holds the keys.
fn group_id(name: &str) -> Option<u32> {
    if let Ok(number) = name.parse() {
        return Some(number);
    }
    let text = std::fs::read_to_string("/etc/group").ok()?;
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn around() -> Surroundings {
        Surroundings { cpus: vec![0, 2, 3], runtime_dir: Some("/run/user/7".into()), uid: 7 }
    }

    fn build(text: &str) -> Result<Config> {
        let raw: RawConfig = toml::from_str(text).expect("parses");
        Config::build(raw, &Overrides::default(), &around(), Some(Path::new("/etc/x.toml")))
    }

    #[test]
    fn an_empty_file_is_a_whole_configuration() {
        let config = build("").expect("valid");
        assert_eq!(config.socket.path, Path::new("/run/user/7/cryptd/cryptd.sock"));
        assert!(config.socket.private_dir);
        assert_eq!(config.socket.mode, 0o600);
        assert_eq!(config.pipeline.cpus, [0, 2, 3]);
        assert_eq!(config.pipeline.buffers_per_worker, 21);
        assert_eq!(config.idle_exit, None);
        assert!(!config.kernel_forced);
    }

    #[test]
    fn workers_are_a_count_or_a_list_of_allowed_cpus() {
        assert_eq!(build("workers = 2").expect("valid").pipeline.cpus, [0, 2]);
        assert_eq!(build("workers = [3, 0]").expect("valid").pipeline.cpus, [0, 3]);
    }

    #[test]
    fn every_complaint_names_file_key_value_and_what_is_allowed() {
        for (text, key, value, allowed) in [
            ("workers = 0", "workers", "0", "1 to 3"),
            ("workers = 4", "workers", "4", "1 to 3"),
            ("workers = [1]", "workers", "[1]", "0, 2, 3"),
            ("workers = [0, 0]", "workers", "[0, 0]", "0, 2, 3"),
            ("workers = []", "workers", "[]", "0, 2, 3"),
            ("queue = 'fast'", "queue", "fast", "auto, io_uring, threads"),
            ("kernel = 'rot13'", "kernel", "rot13", "vaes-avx512, vaes-avx2, aes-ni, portable"),
            ("buffer_bytes = 100000", "buffer_bytes", "100000", "a power of two, 65536 to 16777216"),
            ("buffer_bytes = 32768", "buffer_bytes", "32768", "a power of two"),
            ("buffers_per_worker = 3", "buffers_per_worker", "3", "4 to 256"),
            ("buffers_per_worker = 257", "buffers_per_worker", "257", "4 to 256"),
            ("running_max = 0", "running_max", "0", "1 to 1024"),
            ("remembered_max = 0", "remembered_max", "0", "1 to 1024"),
            ("per_user_max = 1025", "per_user_max", "1025", "1 to 1024"),
            ("socket_mode = '0777'", "socket_mode", "0777", "\"0600\" to \"0666\""),
            ("socket_mode = '0060'", "socket_mode", "0060", "\"0600\" to \"0666\""),
            ("socket_group = 'no such group'", "socket_group", "no such group", "/etc/group"),
            ("log = 'loud'", "log", "loud", "error, warn, info, debug, trace"),
            ("client_stall = 0", "client_stall", "0", "1 to 86400"),
        ] {
            let message = build(text).expect_err(text).chain();
            for part in ["/etc/x.toml", key, value, allowed] {
                assert!(message.contains(part), "{text}: {message:?} lacks {part:?}");
            }
        }
    }

    #[test]
    fn unknown_keys_are_refused() {
        assert!(toml::from_str::<RawConfig>("wrokers = 2").is_err());
    }

    #[test]
    fn the_command_line_wins_and_zero_means_never() {
        let raw: RawConfig = toml::from_str("socket = '/a/b'\nidle_exit = 9").expect("parses");
        let over = Overrides { socket: Some("/c/d".into()), idle_exit: Some(0) };
        let config = Config::build(raw, &over, &around(), None).expect("valid");
        assert_eq!(config.socket.path, Path::new("/c/d"));
        assert!(!config.socket.private_dir);
        assert_eq!(config.idle_exit, None);
    }

    #[test]
    fn a_forced_kernel_is_remembered_as_forced() {
        let config = build("kernel = 'portable'").expect("valid");
        assert_eq!(config.kernel, Kernel::Portable);
        assert!(config.kernel_forced);
    }
}
