//! The pipeline beside its limit: a whole encryption over the real workers, from one memory file to another.
//!
//! A round is the limit, then the pipeline, over the same two files, until each has taken its time. The limit copies
//! without encrypting, by plain reads and writes: as many threads as there are workers, on their CPUs, claiming the same
//! chunks. What lies between the two is the price of the cipher and of everything around it. The sink is compared with
//! what it must hold after every transfer, and every copy spoils it again, so a pipeline that did nothing would not pass.
//!
//! The files have no name and vanish with the job, also when the daemon dies. Other jobs keep their share of the workers,
//! and take theirs of the rate.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use proto::BenchRow;
use rustix::fs::MemfdFlags;

use crate::backend::device::{Device, Purpose};
use crate::crypto::measure::{AlignedBuffer, Operation, median};
use crate::crypto::{Kernel, Layout, SectorCipher, VolumeKey, cipher};
use crate::error::{Error, ErrorKind, Result};
use crate::job::clock::per_second;
use crate::job::prepare::{CHUNK_BYTES_MEMORY, DEPTH};
use crate::job::state::Job;
use crate::pipeline::Pipeline;
use crate::pipeline::plan::{Claim, Plan};
use crate::pipeline::segment::Segments;
use crate::pipeline::transfer::{End, SinkRules, Transfer, TransferSpec, Work};
use crate::sys::affinity;
use crate::units::DataUnit;

/// Bytes of each file where there is memory enough.
const FILE_BYTES_MAX: u64 = 256 << 20;
/// Less than this shows nothing but the start and the end of a transfer.
const FILE_BYTES_MIN: u64 = 4 << 20;
/// Data unit of the volume, bytes.
const UNIT_BYTES: u32 = 4096;
/// Bits of the AES keys.
const KEY_BITS: u32 = 256;
/// How long a request to cancel may stay unseen.
const TICK: Duration = Duration::from_millis(50);

/// Measure `rounds` rounds of `millis` each for the limit and for the pipeline, with ciphers of `kernel`.
///
/// # Errors
/// `Cancelled`; too little memory for the files (`Limit`); and `Internal` if the sink holds wrong bytes.
pub fn measure(job: &Job, pipeline: &Pipeline, kernel: Kernel, millis: u32, rounds: u32) -> Result<BenchRow> {
    let on = Rehearsal::set(pipeline, kernel)?;
    let time = Duration::from_millis(millis.into());
    // Both once for nothing: rings, caches, clock.
    on.copy(job)?;
    on.encrypt(job)?;
    let (mut rates, mut limits) = (Vec::new(), Vec::new());
    for _ in 0..rounds.max(1) {
        limits.push(on.rate(time, || on.copy(job))?);
        rates.push(on.rate(time, || on.encrypt(job))?);
    }
    Ok(BenchRow {
        kernel: "pipeline".to_owned(),
        operation: Operation::Encrypt.name().to_owned(),
        key_bits: KEY_BITS,
        data_unit: UNIT_BYTES,
        bytes_per_second: median(&rates),
        spread: (
            rates.iter().copied().fold(f64::INFINITY, f64::min),
            rates.iter().copied().fold(0.0, f64::max),
        ),
        limit_bytes_per_second: Some(median(&limits)),
    })
}

/// Two files and everything a transfer between them needs.
struct Rehearsal<'a> {
    pipeline: &'a Pipeline,
    source: Device,
    sink: Device,
    /// For reading back what workers wrote.
    written: File,
    /// What every chunk of the source holds.
    pattern: Vec<u8>,
    kernel: Kernel,
    key: VolumeKey,
    bytes: u64,
    chunk_bytes: u32,
}

impl<'a> Rehearsal<'a> {
    fn set(pipeline: &'a Pipeline, kernel: Kernel) -> Result<Self> {
        let chunk_bytes = CHUNK_BYTES_MEMORY.min(pipeline.buffer_bytes());
        let bytes = file_bytes(memory_available(), chunk_bytes)?;
        let (source, sink) = (memory_file("bench-source")?, memory_file("bench-sink")?);
        let pattern = AlignedBuffer::patterned(chunk_bytes as usize).as_mut_slice().to_vec();
        // Both files get their pages now, or whoever comes first would pay for them.
        for offset in (0..bytes).step_by(chunk_bytes as usize) {
            for file in [&source, &sink] {
                file.write_all_at(&pattern, offset)
                    .map_err(|cause| Error::io("cannot fill a file in memory", cause))?;
            }
        }
        let written = sink.try_clone().map_err(|cause| Error::io("cannot duplicate a descriptor", cause))?;
        let device = |file: File, read| {
            let purpose = Purpose { read, write: !read, stream: false };
            Device::from_fd(OwnedFd::from(file), "a file in memory", purpose)
        };
        // No secret: the data is a pattern. The halves differ, as they must.
        let key: Vec<u8> = (0..64_u8).map(|at| at.wrapping_mul(7)).collect();
        Ok(Self {
            pipeline,
            source: device(source, true)?,
            sink: device(sink, false)?,
            written,
            pattern,
            kernel,
            key: VolumeKey::new(&key)?,
            bytes,
            chunk_bytes,
        })
    }

    /// Repeat until `at_least` has been spent in what `once` times; bytes per second.
    fn rate(&self, at_least: Duration, once: impl Fn() -> Result<Duration>) -> Result<f64> {
        let (mut bytes, mut spent) = (0, Duration::ZERO);
        loop {
            spent += once()?;
            bytes += self.bytes;
            if spent >= at_least {
                return Ok(per_second(bytes, spent.as_secs_f64()));
            }
        }
    }

    fn cipher(&self) -> Result<Box<dyn SectorCipher>> {
        cipher(self.kernel, &self.key, Layout::plain64(UNIT_BYTES))
    }

    /// The limit: the same bytes, moved and nothing else.
    fn copy(&self, job: &Job) -> Result<Duration> {
        let plan = Plan::new(Some(self.bytes), self.chunk_bytes);
        let stopped = AtomicBool::new(false);
        let workers = self.pipeline.status();
        let start = Instant::now();
        thread::scope(|scope| {
            let mut threads = Vec::with_capacity(workers.len());
            for worker in &workers {
                let part = || self.copy_part(job, worker.cpu, &plan, &stopped);
                match thread::Builder::new().spawn_scoped(scope, part) {
                    Ok(thread) => threads.push(thread),
                    Err(cause) => {
                        stopped.store(true, Ordering::Relaxed);
                        return Err(Error::io("cannot start a thread", cause));
                    }
                }
            }
            threads.into_iter().try_for_each(|thread| {
                let ended = thread.join().expect("a copying thread does not panic");
                if ended.is_err() {
                    stopped.store(true, Ordering::Relaxed);
                }
                ended
            })
        })?;
        Ok(start.elapsed())
    }

    fn copy_part(&self, job: &Job, cpu: Option<u32>, plan: &Plan, stopped: &AtomicBool) -> Result<()> {
        if let Some(cpu) = cpu {
            affinity::pin(cpu)?;
        }
        let mut buffer = AlignedBuffer::patterned(self.chunk_bytes as usize);
        while let Claim::Extent(extent) = plan.claim() {
            job.check_cancelled()?;
            if stopped.load(Ordering::Relaxed) {
                break;
            }
            let len = usize::try_from(extent.len()).expect("a chunk fits a buffer");
            let bytes = &mut buffer.as_mut_slice()[..len];
            let failed = |errno| Error::io("cannot copy a file in memory", errno);
            let read =
                rustix::io::pread(&**self.source.file(), &mut *bytes, extent.start()).map_err(failed)?;
            let wrote = rustix::io::pwrite(&**self.sink.file(), bytes, extent.start()).map_err(failed)?;
            if (read, wrote) != (len, len) {
                return Err(Error::new(ErrorKind::Io, "a copy in memory was cut short"));
            }
        }
        Ok(())
    }

    /// A transfer as a job would have it.
    fn encrypt(&self, job: &Job) -> Result<Duration> {
        let end = |device: &Device| End {
            file: device.file().clone(),
            name: device.name().to_owned(),
            stream: false,
            align: 1,
            holes: None,
        };
        let spec = TransferSpec {
            work: Work::Encrypt,
            source: end(&self.source),
            sink: end(&self.sink),
            rules: SinkRules::default(),
            pad: false,
            keep_holes: false,
            depth: DEPTH,
            plan: Plan::new(Some(self.bytes), self.chunk_bytes),
        };
        let workers = self.pipeline.workers();
        let transfer = Transfer::new(spec, workers);
        transfer.set_segments(Segments::one(self.cipher()?, UNIT_BYTES, 0));
        let start = Instant::now();
        self.pipeline.run(&transfer, workers);
        self.wait(job, &transfer);
        let took = start.elapsed();
        match transfer.take_failure() {
            Some(failure) => Err(failure),
            None => self.check().map(|()| took),
        }
    }

    /// Until the workers have let go of the files, whatever happens.
    fn wait(&self, job: &Job, transfer: &Arc<Transfer>) {
        while transfer.ended.recv_timeout(TICK).is_err() {
            if let Err(cancelled) = job.check_cancelled() {
                transfer.fail(cancelled);
                self.pipeline.wake();
            }
        }
    }

    /// Do the first and the last chunk hold what they must? A rate for wrong bytes is worth nothing.
    fn check(&self) -> Result<()> {
        let cipher = self.cipher()?;
        let mut found = vec![0; self.chunk_bytes as usize];
        for offset in [0, self.bytes - u64::from(self.chunk_bytes)] {
            self.written
                .read_exact_at(&mut found, offset)
                .map_err(|cause| Error::io("cannot read back a file in memory", cause))?;
            cipher.decrypt(DataUnit(offset / u64::from(UNIT_BYTES)), &mut found);
            if found != self.pattern {
                return Err(Error::new(ErrorKind::Internal, "the pipeline wrote wrong bytes")
                    .at(format!("chunk at byte {offset}")));
            }
        }
        Ok(())
    }
}

fn memory_file(name: &str) -> Result<File> {
    let file = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC);
    file.map(File::from).map_err(|errno| Error::io("cannot make a file in memory", errno))
}

/// Bytes of each of the two files, whole chunks: together at most a quarter of what is available.
fn file_bytes(available: u64, chunk_bytes: u32) -> Result<u64> {
    let chunk = u64::from(chunk_bytes);
    let bytes = FILE_BYTES_MAX.min(available / 8) / chunk * chunk;
    if bytes < FILE_BYTES_MIN {
        let what = format!("too little memory to measure the pipeline: {} MiB available", available >> 20);
        return Err(Error::new(ErrorKind::Limit, what));
    }
    Ok(bytes)
}

/// Memory that can be had without swapping, bytes: of the machine, and of each control group (v2) around this process.
fn memory_available() -> u64 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kibibytes = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    let mut available = kibibytes.map_or(0, |kibibytes| kibibytes.saturating_mul(1024));
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let Some(group) = groups.lines().find_map(|line| line.strip_prefix("0::/")) else { return available };
    let root = Path::new("/sys/fs/cgroup");
    for directory in root.join(group).ancestors().take_while(|directory| directory.starts_with(root)) {
        let number = |file: &str| {
            std::fs::read_to_string(directory.join(file))
                .ok()
                .and_then(|text| text.trim().parse::<u64>().ok())
        };
        // `max` is no number, and no limit.
        if let (Some(max), Some(current)) = (number("memory.max"), number("memory.current")) {
            available = available.min(max.saturating_sub(current));
        }
    }
    available
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_shrink_with_memory_and_give_up_before_they_are_useless() {
        let chunk = 256 << 10;
        assert_eq!(file_bytes(u64::MAX, chunk).expect("plenty"), FILE_BYTES_MAX);
        assert_eq!(file_bytes((1 << 30) + 5, chunk).expect("some"), 128 << 20);
        let error = file_bytes(31 << 20, chunk).expect_err("less than 4 MiB each");
        assert_eq!(error.kind(), ErrorKind::Limit);
    }

    #[test]
    fn this_machine_has_memory() {
        assert!(memory_available() > 0);
    }
}
