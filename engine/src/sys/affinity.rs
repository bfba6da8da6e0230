//! Which CPUs this process may use, and pinning a thread to one of them.

use rustix::thread::CpuSet;

use crate::error::{Error, ErrorKind, Result};

/// CPUs this thread may run on, ascending: what `taskset`, a service manager or a cgroup cpuset left of the machine. A new
/// thread inherits it, so ask before pinning.
///
/// # Errors
/// A machine with more than 1024 CPUs, which the call cannot describe.
pub fn allowed_cpus() -> Result<Vec<u32>> {
    let set = rustix::thread::sched_getaffinity(None)
        .map_err(|errno| Error::io("cannot ask which CPUs are allowed", errno))?;
    Ok((0u32..).take(CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu as usize)).collect())
}

/// Keep the calling thread on one CPU.
///
/// # Errors
/// `Invalid`: no such CPU, or not one of [`allowed_cpus`].
pub fn pin(cpu: u32) -> Result<()> {
    let refused = || Error::new(ErrorKind::Invalid, format!("CPU {cpu} may not be used"));
    if cpu as usize >= CpuSet::MAX_CPU {
        return Err(refused());
    }
    let mut set = CpuSet::new();
    set.set(cpu as usize);
    rustix::thread::sched_setaffinity(None, &set).map_err(|errno| refused().because(errno))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pinned_thread_has_one_cpu() {
        std::thread::spawn(|| {
            let cpu = *allowed_cpus().expect("allowed").last().expect("at least one");
            pin(cpu).expect("an allowed CPU");
            assert_eq!(allowed_cpus().expect("allowed"), [cpu]);
        })
        .join()
        .expect("thread");
    }

    #[test]
    fn an_absent_cpu_is_refused() {
        for cpu in [1023, 1024, u32::MAX] {
            if !allowed_cpus().expect("allowed").contains(&cpu) {
                assert_eq!(pin(cpu).expect_err("absent").kind(), ErrorKind::Invalid);
            }
        }
    }
}
