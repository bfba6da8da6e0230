//! How much memory this process may take without being killed for it: what the machine has available, and what the cgroups it is
//! in leave (v2 `memory.max` and `memory.high`, v1 `memory.limit_in_bytes`; every ancestor counts).
//!
//! Beside it, how much there would be if nothing else ran, which is what the cost of a keyslot that lasts for years goes by.
//!
//! Asked before a key derivation takes up to 4 GiB: the kernel would hand out the addresses and kill the daemon, with every job
//! in it, when they are touched.

use std::fs;
use std::path::{Path, PathBuf};

use proto::ErrorKind;

use crate::error::{Error, Result};

/// Memory in KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Room {
    /// Of the machine, or what the tightest limit allows.
    pub(super) total_kib: u64,
    /// To be had now without swapping.
    pub(super) free_kib: u64,
    /// Swap space on top.
    pub(super) swap_kib: u64,
}

/// Of this process. Absent where the kernel does not say.
pub(super) fn here() -> Option<Room> {
    read(Path::new("/"))
}

/// Can so much be had now? Swap counts: a slow unlock is better than none.
///
/// # Errors
/// `Limit`.
pub(super) fn admit(kib: u64) -> Result<()> {
    match here() {
        Some(room) if room.free_kib.saturating_add(room.swap_kib) < kib => {
            let what = format!("no {kib} KiB of memory for argon2: {} KiB are free", room.free_kib);
            Err(Error::new(ErrorKind::Limit, what)
                .hint("free memory, or raise the memory limit of the daemon's service"))
        }
        _ => Ok(()),
    }
}

/// Of the file system under `root`.
fn read(root: &Path) -> Option<Room> {
    let meminfo = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let mut room = Room {
        total_kib: field(&meminfo, "MemTotal:")?,
        free_kib: field(&meminfo, "MemAvailable:")?,
        swap_kib: field(&meminfo, "SwapFree:").unwrap_or(0),
    };
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    for level in groups.lines().flat_map(|line| levels(root, line)) {
        room.total_kib = room.total_kib.min(level.limit >> 10);
        room.free_kib = room.free_kib.min(level.left >> 10);
    }
    Some(room)
}

/// The number after a name at the start of a line.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
}

/// File names of a version of the memory controller.
struct Names {
    limits: &'static [&'static str],
    usage: &'static str,
    /// Fields of `memory.stat`: page cache, which is given up when memory is asked for.
    cache: [&'static str; 2],
}

const V1: Names = Names {
    limits: &["memory.limit_in_bytes"],
    usage: "memory.usage_in_bytes",
    cache: ["total_active_file ", "total_inactive_file "],
};
const V2: Names = Names {
    limits: &["memory.max", "memory.high"],
    usage: "memory.current",
    cache: ["active_file ", "inactive_file "],
};

/// What one level of a hierarchy allows, bytes.
struct Level {
    limit: u64,
    left: u64,
}

/// The levels with a limit, from a line of `/proc/self/cgroup` (`id:controllers:path`).
fn levels(root: &Path, line: &str) -> Vec<Level> {
    let mut parts = line.splitn(3, ':').skip(1);
    let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { return Vec::new() };
    let path = path.trim_start_matches('/');
    // Where systemd and every container runtime mount them. In a container the path may be the host's: its missing levels are
    // passed over on the way up.
    let (names, mounts): (_, &[&str]) = match controllers {
        "" => (V2, &["sys/fs/cgroup", "sys/fs/cgroup/unified"]),
        _ if controllers.split(',').any(|name| name == "memory") => (V1, &["sys/fs/cgroup/memory"]),
        _ => return Vec::new(),
    };
    let levels = mounts.iter().flat_map(|mount| {
        let levels = Path::new(path).ancestors().map(Path::to_owned).collect::<Vec<PathBuf>>();
        levels.into_iter().map(move |level| root.join(mount).join(level))
    });
    levels.filter_map(|level| level_of(&level, &names)).collect()
}

/// Absent without a limit.
fn level_of(level: &Path, names: &Names) -> Option<Level> {
    // A limit that is "max" does not parse; one that is near 2^63 (v1's way to say none) leaves plenty.
    let number = |name: &str| fs::read_to_string(level.join(name)).ok()?.trim().parse::<u64>().ok();
    let limit = names.limits.iter().filter_map(|name| number(name)).min()?;
    let stat = fs::read_to_string(level.join("memory.stat")).unwrap_or_default();
    let cache: u64 = names.cache.iter().filter_map(|name| field(&stat, name)).sum();
    let left = limit.saturating_sub(number(names.usage)?.saturating_sub(cache));
    Some(Level { limit, left })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A root directory with these files.
    struct Root(PathBuf);

    impl Root {
        fn with(name: &str, files: &[(&str, &str)]) -> Self {
            let root = Self(std::env::temp_dir().join(format!("room-{name}-{}", std::process::id())));
            for (path, text) in files {
                let path = root.0.join(path);
                fs::create_dir_all(path.parent().expect("below the root")).expect("creates");
                fs::write(path, text).expect("writes");
            }
            root
        }

        fn free_kib(&self) -> u64 {
            read(&self.0).expect("there is a meminfo").free_kib
        }

        fn total_kib(&self) -> u64 {
            read(&self.0).expect("there is a meminfo").total_kib
        }
    }

    impl Drop for Root {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    const MEMINFO: (&str, &str) =
        ("proc/meminfo", "MemTotal:  8000 kB\nMemFree: 1 kB\nMemAvailable:    5000 kB\nSwapFree:  70 kB\n");

    #[test]
    fn without_cgroups_the_machine_counts() {
        let root = Root::with("machine", &[MEMINFO]);
        assert_eq!(read(&root.0), Some(Room { total_kib: 8000, free_kib: 5000, swap_kib: 70 }));
        let none = Root::with("none", &[("etc/motd", "")]);
        assert_eq!(read(&none.0), None);
    }

    #[test]
    fn the_tightest_ancestor_of_a_v2_group_counts_and_page_cache_is_free() {
        let group = ("proc/self/cgroup", "0::/a.slice/b.service\n");
        let mut files = vec![
            MEMINFO,
            group,
            ("sys/fs/cgroup/a.slice/b.service/memory.max", "max\n"),
            ("sys/fs/cgroup/a.slice/b.service/memory.high", "max\n"),
            ("sys/fs/cgroup/a.slice/b.service/memory.current", "0\n"),
            ("sys/fs/cgroup/a.slice/memory.max", "4096000\n"),
            ("sys/fs/cgroup/a.slice/memory.current", "2048000\n"),
        ];
        assert_eq!(Root::with("v2", &files).free_kib(), 2000);
        assert_eq!(Root::with("v2-total", &files).total_kib(), 4000, "whatever is in use");
        let stat = "anon 1\nactive_file 1024\ninactive_file 1023\ninactive_file_not 9\n";
        files.push(("sys/fs/cgroup/a.slice/memory.stat", stat));
        assert_eq!(Root::with("v2-cache", &files).free_kib(), 2001);
        files.push(("sys/fs/cgroup/a.slice/memory.high", "1024000\n"));
        assert_eq!(Root::with("v2-high", &files).free_kib(), 0, "more in use than memory.high allows");
    }

    #[test]
    fn a_v1_group_counts_and_its_way_to_say_no_limit_too() {
        let mut files = vec![
            MEMINFO,
            ("proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n1:name=systemd:/x\n"),
            // The path is the host's; in the container its files are at the mount itself.
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "1024000\n"),
        ];
        assert_eq!(Root::with("v1-none", &files).free_kib(), 5000);
        assert_eq!(Root::with("v1-none-total", &files).total_kib(), 8000);
        files[2].1 = "3072000";
        assert_eq!(Root::with("v1", &files).free_kib(), 2000);
        assert_eq!(Root::with("v1-total", &files).total_kib(), 3000);
    }

    #[test]
    fn this_machine_has_room_for_a_little_and_not_for_everything() {
        admit(32).expect("32 KiB");
        if Path::new("/proc/meminfo").exists() {
            assert_eq!(admit(u64::MAX).expect_err("no machine has that").kind(), ErrorKind::Limit);
        }
    }
}
