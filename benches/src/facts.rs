//! The machine a row was measured on: without it a number means nothing.

use std::fs;
use std::process::Command;
use std::thread;

use serde::Serialize;

/// Machine and build.
#[derive(Debug, Clone, Serialize)]
pub struct Facts {
    /// CPU model name.
    pub cpu: String,
    /// CPUs this process may use.
    pub cpus: usize,
    /// Those of the CPU's flags that decide which kernel runs.
    pub cpu_flags: Vec<String>,
    /// Kernel release.
    pub kernel: String,
    /// Physical memory, bytes.
    pub memory_bytes: u64,
    /// Commit of the sources, `-dirty` with local changes; empty outside a repository.
    pub git: String,
    /// `release` or `dev`.
    pub profile: &'static str,
}

/// Flags that name the instructions of the ladder's rungs.
const FLAGS: [&str; 7] = ["aes", "avx2", "avx512f", "avx512bw", "vaes", "vpclmulqdq", "gfni"];

impl Facts {
    /// Of this machine.
    #[must_use]
    pub fn collect() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            let line = cpuinfo.lines().find(|line| line.starts_with(name));
            line.and_then(|line| line.split_once(':')).map_or("", |(_, value)| value.trim())
        };
        let flags: Vec<&str> = field("flags").split_whitespace().collect();
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        Self {
            cpu: field("model name").to_owned(),
            cpus: thread::available_parallelism().map_or(1, usize::from),
            cpu_flags: FLAGS.iter().filter(|flag| flags.contains(flag)).map(ToString::to_string).collect(),
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
            memory_bytes: memory(&meminfo, "MemTotal:"),
            git: git(),
            profile: if cfg!(debug_assertions) { "dev" } else { "release" },
        }
    }

    /// One line for the head of a table.
    #[must_use]
    pub fn line(&self) -> String {
        let Self { cpu, cpus, cpu_flags, kernel, git, profile, .. } = self;
        let (flags, gib) = (cpu_flags.join(" "), self.memory_bytes >> 30);
        format!("{cpus} x {cpu} [{flags}], {gib} GiB, Linux {kernel}, {git} ({profile})")
    }
}

/// Memory that can be used without swapping, bytes.
#[must_use]
pub fn memory_available() -> u64 {
    memory(&fs::read_to_string("/proc/meminfo").unwrap_or_default(), "MemAvailable:")
}

fn memory(meminfo: &str, name: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
    line.split_whitespace().next().and_then(|text| text.parse::<u64>().ok()).unwrap_or(0) * 1024
}

fn git() -> String {
    let here = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    let arguments = ["-C", here, "describe", "--always", "--dirty", "--abbrev=12"];
    let output = Command::new("git").args(arguments).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_a_kernel_and_memory() {
        let facts = Facts::collect();
        assert!(!facts.kernel.is_empty());
        assert!(facts.cpus > 0 && facts.memory_bytes > 0 && memory_available() > 0);
    }

    #[test]
    fn memory_is_read_in_bytes() {
        assert_eq!(memory("MemTotal:  16 kB\nMemAvailable: 4 kB\n", "MemAvailable:"), 4096);
        assert_eq!(memory("", "MemTotal:"), 0);
    }
}
