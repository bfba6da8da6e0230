#![allow(unsafe_code)] // getrusage, close_range and SO_PEERGROUPS have no safe wrapper in the crates we use.
//! This process as the kernel sees it: its limits, its use of the machine, its protection, and who is at the other end of a
//! socket.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::mm::MlockAllFlags;
use rustix::process::{DumpableBehavior, Resource, Rlimit};
use rustix::thread::CapabilitySet;

use crate::error::{Error, Result};

/// Soft `RLIMIT_MEMLOCK` in bytes; `None` if it does not bind (unlimited, or `CAP_IPC_LOCK`).
#[must_use]
pub fn memlock_limit() -> Option<u64> {
    let capable =
        rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::IPC_LOCK));
    if capable { None } else { rustix::process::getrlimit(Resource::Memlock).current }
}

/// Bytes this process has locked (`VmLck`); 0 if `/proc` is not there.
#[must_use]
pub fn locked_bytes() -> u64 {
    status_kib("VmLck:").unwrap_or(0) * 1024
}

/// Resident bytes now (`VmRSS`); 0 if `/proc` is not there.
#[must_use]
pub fn resident_bytes() -> u64 {
    status_kib("VmRSS:").unwrap_or(0) * 1024
}

fn status_kib(field: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// What this process has used since it started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// CPU time in user mode, all threads.
    pub user: Duration,
    /// CPU time in the kernel on our behalf, all threads.
    pub system: Duration,
    /// Peak resident set.
    pub rss_peak_bytes: u64,
}

/// See [`Usage`].
#[must_use]
pub fn usage() -> Usage {
    // SAFETY: `rusage` is plain integers, for which all zeroes is a value.
    let mut raw: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills the structure we own; it is not kept.
    let result = unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut raw) };
    assert_eq!(result, 0, "getrusage of ourselves cannot fail");
    let time = |value: libc::timeval| {
        Duration::from_secs(u64::try_from(value.tv_sec).unwrap_or(0))
            + Duration::from_micros(u64::try_from(value.tv_usec).unwrap_or(0))
    };
    Usage {
        user: time(raw.ru_utime),
        system: time(raw.ru_stime),
        rss_peak_bytes: u64::try_from(raw.ru_maxrss).unwrap_or(0) * 1024,
    }
}

/// What [`harden`] achieved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hardened {
    /// All memory, present and future, is locked (on fault).
    pub memory_locked: bool,
}

/// No core dumps, no ptrace by equals, no new privileges, and all memory locked where no limit is in the way.
///
/// With a limit, `MCL_FUTURE` would make every later `mmap` beyond it fail; then only keys and buffers are locked, each
/// where it is made.
///
/// # Errors
/// The kernel refuses one of the first three, which no supported kernel does.
pub fn harden() -> Result<Hardened> {
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(|errno| Error::io("cannot refuse core dumps and ptrace", errno))?;
    rustix::process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })
        .map_err(|errno| Error::io("cannot set the core dump limit to zero", errno))?;
    rustix::thread::set_no_new_privs(true)
        .map_err(|errno| Error::io("cannot give up gaining privileges", errno))?;
    let everything = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
    let memory_locked = memlock_limit().is_none() && rustix::mm::mlockall(everything).is_ok();
    Ok(Hardened { memory_locked })
}

/// Close every descriptor this process was started with, except the three standard ones and those that systemd's protocol
/// (`LISTEN_PID`, `LISTEN_FDS`) says are for us. A daemon started by a client must not keep the client's lock files locked, its
/// pipes open, or its key files readable for as long as it lives.
///
/// To be called first in `main`: nothing here may own a descriptor yet. A second call does nothing.
pub fn close_inherited() {
    static CALLED: AtomicBool = AtomicBool::new(false);
    if CALLED.swap(true, Ordering::Relaxed) {
        return;
    }
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u32>().ok());
    let ours = number("LISTEN_PID") == Some(std::process::id());
    let passed = if ours { number("LISTEN_FDS").unwrap_or(0) } else { 0 };
    let first = FIRST_INHERITED.saturating_add(passed);
    // SAFETY: takes three integers. At the start of `main` no descriptor from `first` up has an owner in this program.
    if unsafe { libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, 0) } == 0 {
        return;
    }
    // Before Linux 5.9, or filtered: one by one.
    let Ok(open) = std::fs::read_dir("/proc/self/fd") else { return };
    let open: Vec<i32> = open
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|fd| i64::from(*fd) >= i64::from(first))
        .collect();
    for fd in open {
        // SAFETY: as above; the one descriptor of ours in the list, the directory's, is closed already.
        unsafe { libc::close(fd) };
    }
}

/// After standard input, output and error; also the first one systemd passes.
const FIRST_INHERITED: u32 = 3;

/// Who connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Process id at the time of connecting; for display only, it may be reused.
    pub pid: i32,
    /// Effective user id.
    pub uid: u32,
    /// Effective group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// The credentials of a connected Unix socket's other end, as they were when it connected.
///
/// # Errors
/// Not a connected Unix socket, or a kernel before 4.13 (no `SO_PEERGROUPS`).
pub fn peer(socket: impl AsFd) -> Result<Peer> {
    let fd = socket.as_fd();
    let failed = |errno: std::io::Error| Error::io("cannot read the peer's credentials", errno);
    let credentials = rustix::net::sockopt::socket_peercred(fd).map_err(|errno| failed(errno.into()))?;
    // The kernel says how many there are when the room is too small; 64 fits nearly always.
    let mut groups = vec![0u32; 64];
    loop {
        let mut bytes =
            libc::socklen_t::try_from(groups.len() * size_of::<u32>()).expect("at most 65536 groups");
        // SAFETY: `groups` has room for `bytes` bytes of `gid_t` (u32); the kernel keeps neither pointer.
        let result = unsafe {
            libc::getsockopt(
                fd.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut bytes,
            )
        };
        let count = bytes as usize / size_of::<u32>();
        if result == 0 {
            groups.truncate(count);
            break;
        }
        let error = std::io::Error::last_os_error();
        // 65536 is NGROUPS_MAX.
        if error.raw_os_error() != Some(libc::ERANGE) || count <= groups.len() || count > 65536 {
            return Err(failed(error));
        }
        groups.resize(count, 0);
    }
    Ok(Peer {
        pid: credentials.pid.as_raw_nonzero().get(),
        uid: credentials.uid.as_raw(),
        gid: credentials.gid.as_raw(),
        groups,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_of_our_own_is_ourselves() {
        let (one, _other) = std::os::unix::net::UnixStream::pair().expect("socket pair");
        let peer = peer(&one).expect("credentials");
        assert_eq!(peer.uid, rustix::process::geteuid().as_raw());
        assert_eq!(peer.gid, rustix::process::getegid().as_raw());
        let mut ours: Vec<u32> =
            rustix::process::getgroups().expect("groups").iter().map(|gid| gid.as_raw()).collect();
        let mut theirs = peer.groups;
        ours.sort_unstable();
        theirs.sort_unstable();
        assert_eq!(ours, theirs);
    }

    #[test]
    fn a_pipe_has_no_peer() {
        let (read, _write) = std::io::pipe().expect("pipe");
        assert!(peer(&read).is_err());
    }

    #[test]
    fn usage_is_not_zero() {
        let usage = usage();
        assert!(usage.rss_peak_bytes >= resident_bytes() / 2);
        assert!(resident_bytes() > 0);
    }
}
