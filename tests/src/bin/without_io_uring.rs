//! Runs a program in a world without io_uring: `without_io_uring EPERM|ENOSYS PROGRAM [ARG…]`.
//!
//! A seccomp filter makes io_uring_setup(2) fail, as container runtimes (EPERM) and old kernels (ENOSYS) do.

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

/// The same number on every architecture.
const IO_URING_SETUP: i64 = 425;

fn main() -> ExitCode {
    let mut words = std::env::args_os().skip(1);
    let errno = match words.next().as_ref().and_then(|word| word.to_str()) {
        Some("EPERM") => rustix::io::Errno::PERM,
        Some("ENOSYS") => rustix::io::Errno::NOSYS,
        _ => panic!("EPERM or ENOSYS, and a program"),
    };
    let program = words.next().expect("a program");
    let number = u32::try_from(errno.raw_os_error()).expect("positive");
    let filter = SeccompFilter::new(
        BTreeMap::from([(IO_URING_SETUP, Vec::new())]),
        SeccompAction::Allow,
        SeccompAction::Errno(number),
        std::env::consts::ARCH.try_into().expect("an architecture seccompiler knows"),
    );
    let filter: BpfProgram = filter.and_then(TryInto::try_into).expect("a filter");
    seccompiler::apply_filter(&filter).expect("filter installed");
    let error = Command::new(&program).args(words).exec();
    panic!("{}: {error}", program.display());
}
