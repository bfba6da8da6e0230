//! Measuring on this machine: the pipeline over its workers, then the kernels on the thread of the job, each beside its limit.

use std::os::fd::OwnedFd;

use proto::{Bench, BenchRow, Submit};

use crate::crypto::Kernel;
use crate::crypto::measure::{Effort, Operation, measure};
use crate::error::{Error, ErrorKind, Result};
use crate::job::rehearse;
use crate::job::state::Job;
use crate::pipeline::Pipeline;

/// Buffer of a measurement unless asked otherwise, bytes.
const BUFFER_BYTES: u32 = 1 << 20;
/// Most bytes of buffer.
const BUFFER_BYTES_MAX: u32 = 64 << 20;
/// Milliseconds per measurement unless asked otherwise.
const MILLIS: u32 = 200;
/// Most milliseconds per measurement: as long as a request to cancel may stay unseen.
const MILLIS_MAX: u32 = 5000;
/// Interleaved rounds unless asked otherwise.
const ROUNDS: u32 = 5;
/// Most rounds.
const ROUNDS_MAX: u32 = 1000;

/// Check a bench request.
///
/// # Errors
/// `Invalid` for values out of range or descriptors, `Unsupported` for a kernel this CPU has not.
pub fn check(submit: Submit, descriptors: &[OwnedFd]) -> Result<Bench> {
    if !descriptors.is_empty() || submit.source.is_some() || submit.sink.is_some() || submit.volume.is_some()
    {
        return Err(Error::new(ErrorKind::Invalid, "a bench takes no files and no key"));
    }
    let bench =
        submit.bench.unwrap_or(Bench { kernel: None, buffer_bytes: None, millis: None, rounds: None });
    kernels(&bench)?;
    let within = |what: &str, value: Option<u32>, min: u32, max: u32| match value {
        Some(value) if !(min..=max).contains(&value) => {
            Err(Error::new(ErrorKind::Invalid, format!("{what} of {value}: it must lie in {min}..={max}")))
        }
        _ => Ok(()),
    };
    within("buffer", bench.buffer_bytes, 4096, BUFFER_BYTES_MAX)?;
    within("duration in milliseconds", bench.millis, 1, MILLIS_MAX)?;
    within("number of rounds", bench.rounds, 1, ROUNDS_MAX)?;
    if bench.buffer_bytes.is_some_and(|bytes| !bytes.is_multiple_of(4096)) {
        return Err(Error::new(ErrorKind::Invalid, "the buffer must be a multiple of 4096 bytes"));
    }
    Ok(bench)
}

fn kernels(bench: &Bench) -> Result<Vec<Kernel>> {
    match &bench.kernel {
        None => Ok(Kernel::ALL.into_iter().filter(|kernel| kernel.is_available()).collect()),
        Some(name) => {
            let kernel = Kernel::from_name(name).ok_or_else(|| {
                let known = proto::KERNELS.join(", ");
                Error::new(ErrorKind::Invalid, format!("unknown kernel {name:?}: it must be one of {known}"))
            })?;
            if !kernel.is_available() {
                let what = format!("this CPU cannot run the kernel {}", kernel.name());
                return Err(Error::new(ErrorKind::Unsupported, what));
            }
            Ok(vec![kernel])
        }
    }
}

/// Measure, and put a row per measurement into the job. The pipeline runs with the kernel asked for, else with
/// `configured`, the one jobs use.
///
/// # Errors
/// `Cancelled` between two measurements, and within one of the pipeline; else as [`rehearse::measure`].
pub fn run(job: &Job, bench: &Bench, pipeline: &Pipeline, configured: Kernel) -> Result<()> {
    let buffer_bytes = bench.buffer_bytes.unwrap_or(BUFFER_BYTES) as usize;
    let millis = bench.millis.unwrap_or(MILLIS);
    let rounds = bench.rounds.unwrap_or(ROUNDS);
    let effort = Effort { buffer_bytes, millis, rounds };
    let kernels = kernels(bench)?;
    let carrier = if bench.kernel.is_some() { kernels[0] } else { configured };
    job.add_bench(rehearse::measure(job, pipeline, carrier, millis, rounds)?);
    for kernel in kernels {
        for data_unit in [512, 4096] {
            for key_bits in [128, 256] {
                for operation in [Operation::Encrypt, Operation::Decrypt, Operation::Reencrypt] {
                    let check = || job.check_cancelled();
                    let measured = measure(kernel, operation, key_bits, data_unit, effort, check)?;
                    job.add_bench(BenchRow {
                        kernel: kernel.name().to_owned(),
                        operation: operation.name().to_owned(),
                        key_bits,
                        data_unit,
                        bytes_per_second: measured.median,
                        spread: (measured.min, measured.max),
                        limit_bytes_per_second: measured.limit,
                    });
                }
            }
        }
    }
    Ok(())
}
