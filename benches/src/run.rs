//! Processes and what they cost: wall time, CPU time, memory.
//!
//! CPU time of children is the difference of this process's `cutime + cstime` (`proc(5)`) around the run, so it covers
//! everything a command started and waited for. Its resolution is the clock tick, 10 ms: fine for runs of seconds.

use std::fs;
use std::io;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// CPU seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Cpu {
    /// In user mode.
    pub user: f64,
    /// In the kernel on the process's behalf.
    pub system: f64,
}

impl Cpu {
    /// Both together.
    #[must_use]
    pub fn total(self) -> f64 {
        self.user + self.system
    }

    /// What was spent since `earlier`.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self { user: self.user - earlier.user, system: self.system - earlier.system }
    }
}

/// What a run cost.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cost {
    /// Seconds from the first start to the last exit.
    pub wall: f64,
    /// CPU of everything started.
    pub cpu: Cpu,
    /// Largest peak resident set among the processes, bytes.
    pub rss_peak: u64,
}

/// CPU time of a process with all its threads, from `/proc/PID/stat`; `children` of those it has waited for instead.
///
/// # Errors
/// No such process.
pub fn cpu_of(pid: &str, children: bool) -> io::Result<Cpu> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The command name may hold spaces and parentheses, so fields count from the last parenthesis: state is field 3.
    let (_, fields) = stat.rsplit_once(')').ok_or_else(|| io::Error::other("no command in stat"))?;
    let ticks = |field: usize| -> io::Result<f64> {
        let text = fields.split_whitespace().nth(field - 3).unwrap_or_default();
        text.parse().map_err(|_| io::Error::other(format!("stat field {field} is {text:?}")))
    };
    let second: f64 = rustix::param::clock_ticks_per_second() as f64;
    let first = if children { 16 } else { 14 };
    Ok(Cpu { user: ticks(first)? / second, system: ticks(first + 1)? / second })
}

/// Peak resident set (`VmHWM`), bytes; `None` when the process is gone.
#[must_use]
pub fn rss_peak_of(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kibibytes| kibibytes * 1024)
}

/// Run a pipeline of commands, each one's stdout into the next one's stdin, and wait for all. The ends are as given.
///
/// # Errors
/// A command could not be started, or failed; the message names it.
pub fn pipeline(commands: &mut [Command]) -> io::Result<Cost> {
    let before = cpu_of("self", true)?;
    let start = Instant::now();
    let mut children = Vec::with_capacity(commands.len());
    let mut upstream = None;
    let last = commands.len().saturating_sub(1);
    for (index, command) in commands.iter_mut().enumerate() {
        if let Some(pipe) = upstream.take() {
            command.stdin(Stdio::from(pipe));
        }
        if index < last {
            command.stdout(Stdio::piped());
        }
        let name = command.get_program().to_string_lossy().into_owned();
        let mut child =
            command.spawn().map_err(|error| io::Error::new(error.kind(), format!("{name}: {error}")))?;
        upstream = if index < last { child.stdout.take() } else { None };
        children.push((name, child));
    }
    // The commands keep their stdin's descriptor open in this process otherwise, and a dead reader would go unnoticed.
    for command in commands.iter_mut() {
        command.stdin(Stdio::null());
    }

    let pids: Vec<u32> = children.iter().map(|(_, child)| child.id()).collect();
    let finished = AtomicBool::new(false);
    let (statuses, wall, rss_peak) = thread::scope(|scope| {
        let sampler = scope.spawn(|| {
            let mut peak = 0;
            while !finished.load(Ordering::Relaxed) {
                peak = pids.iter().filter_map(|&pid| rss_peak_of(pid)).fold(peak, u64::max);
                thread::park_timeout(Duration::from_millis(100));
            }
            peak
        });
        let statuses: Vec<(String, io::Result<ExitStatus>)> =
            children.into_iter().map(|(name, mut child)| (name, child.wait())).collect();
        let wall = start.elapsed().as_secs_f64();
        finished.store(true, Ordering::Relaxed);
        sampler.thread().unpark();
        (statuses, wall, sampler.join().expect("the sampler does not panic"))
    });
    for (name, status) in statuses {
        let status = status?;
        if !status.success() {
            return Err(io::Error::other(format!("{name} failed: {status}")));
        }
    }
    Ok(Cost { wall, cpu: cpu_of("self", true)?.since(before), rss_peak })
}

/// Is this command there and willing to tell its version?
#[must_use]
pub fn answers(program: &std::path::Path, argument: &str) -> bool {
    let output = Command::new(program).arg(argument).stdin(Stdio::null()).output();
    output.is_ok_and(|output| output.status.success() && !output.stdout.is_empty())
}

/// Write back and forget the page cache, so that no run profits from the one before. Needs root; `false` without.
#[must_use]
pub fn drop_caches() -> bool {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipeline_ends_with_its_last_command() {
        let path = std::env::temp_dir().join(format!("pipeline-{}", std::process::id()));
        let mut first = Command::new("echo");
        first.arg("abc");
        let mut second = Command::new("tr");
        second.args(["a-c", "A-C"]).stdout(fs::File::create(&path).expect("creates"));
        let cost = pipeline(&mut [first, second]).expect("runs");
        let text = fs::read_to_string(&path).expect("reads");
        fs::remove_file(&path).expect("removes");
        assert_eq!(text, "ABC\n");
        assert!(cost.wall > 0.0);
    }

    #[test]
    fn a_failing_member_fails_the_pipeline() {
        let error = pipeline(&mut [Command::new("false"), Command::new("true")]).expect_err("false fails");
        assert!(error.to_string().starts_with("false failed"), "{error}");
        let error = pipeline(&mut [Command::new("/nonexistent/tool")]).expect_err("absent");
        assert!(error.to_string().starts_with("/nonexistent/tool"), "{error}");
    }

    #[test]
    fn own_cpu_and_memory_can_be_read() {
        assert!(cpu_of("self", false).expect("reads").total() >= 0.0);
        assert!(rss_peak_of(std::process::id()).is_some_and(|bytes| bytes > 100_000));
        assert!(rss_peak_of(u32::MAX).is_none());
    }
}
