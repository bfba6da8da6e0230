//! The stage circle: each stage of the pipeline alone, beside what the same machine does with the same bytes and nothing else.
//!
//! | stage | ours | beside |
//! |---|---|---|
//! | `ring-…` | a copy between two files through a worker's queue, no crypt | plain `pread`/`pwrite` on one thread |
//! | `crypt-…` | AES-256-XTS, 4096-byte units, one chunk in place | the issue limit of the kernel's instruction |
//! | `zeros-…` | zero detection over 1 MiB | adding up the same 1 MiB |
//! | `compare` | verifying's comparison of two equal 1 MiB | adding up both |
//! | `hand-off` | claim, gate, three laps and histograms of a chunk: rates count chunks, not bytes | - |
//!
//! On a disk the plain loop is no limit, having one chunk in flight: it is what a queue is for. The limit there is fio's, in the
//! end-to-end sweep.
//!
//! Every round runs limit and stage one after the other, starting one place further each time; ratios are within a round.
//! A copy's result is compared with its source before its rate is told.

use std::fs::File;
use std::hint::black_box;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use benches::facts::Facts;
use benches::rows::Spread;
use benches::scratch::Scratch;
use benches::source::{self, Content, Pattern};
use clap::Parser;
use engine::backend::threads::ThreadsQueue;
use engine::backend::uring::UringQueue;
use engine::backend::{Op, Position, Queue, What};
use engine::crypto::Kernel;
use engine::crypto::limit::spin;
use engine::crypto::measure::{AlignedBuffer, Operation, rate, work};
use engine::pipeline::plan::{Admission, Claim, Gate, Plan};
use engine::pipeline::zeros::Runs;
use engine::sys::buffer::Arena;
use engine::telemetry::record::{Counters, StageRecord};
use proto::Stage;
use serde::Serialize;

/// Measure each stage of the pipeline alone, beside its limit.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Directories to copy in; a scratch file or two is made in each and removed
    #[arg(long, value_delimiter = ',', default_value = "/dev/shm")]
    dir: Vec<PathBuf>,
    /// Bytes of a copied file, in MiB
    #[arg(long, default_value_t = 512, value_name = "MIB")]
    size: u64,
    /// Chunks in flight on a queue; 8 is a job's default
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=256))]
    depth: u32,
    /// Milliseconds per measurement in memory
    #[arg(long, default_value_t = 50)]
    millis: u64,
    /// Interleaved rounds
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Write one JSON row per stage and contender to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// 16 MiB, a millisecond, one round: to see that everything works; its rates mean nothing
    #[arg(long)]
    small: bool,
}

/// Chunks the pipeline uses between memory and between disks, bytes.
const CHUNKS: [u32; 2] = [256 << 10, 1 << 20];
const MIB: usize = 1 << 20;

/// One contender of a stage.
#[derive(Serialize)]
struct Row<'a> {
    stage: String,
    contender: &'static str,
    /// `bytes_per_second`, or `chunks_per_second`.
    measure: &'static str,
    rate: Spread,
    /// The contender that the ratio is taken to.
    beside: Option<&'static str>,
    ratio: Option<Spread>,
    syscalls_per_mib: Option<f64>,
    sha256: Option<String>,
    rounds: usize,
    machine: &'a Facts,
}

/// What one run came to: a rate, and its system calls per MiB where it makes any.
type Once<'a> = (&'static str, Box<dyn FnMut() -> io::Result<(f64, Option<f64>)> + 'a>);

struct Bench {
    facts: Facts,
    rounds: usize,
    time: Duration,
    json: String,
}

impl Bench {
    /// Run contenders in rounds; the first is the limit, unless it is alone.
    fn stage(
        &mut self,
        stage: &str,
        measure: &'static str,
        sha256: Option<&str>,
        mut contenders: Vec<Once<'_>>,
    ) -> io::Result<()> {
        let count = contenders.len();
        let mut rates = vec![Vec::new(); count];
        let mut syscalls = vec![None; count];
        for (_, once) in &mut contenders {
            once()?; // warm-up
        }
        for round in 0..self.rounds {
            for place in 0..count {
                let at = (place + round) % count;
                let (rate, calls) = contenders[at].1()?;
                rates[at].push(rate);
                syscalls[at] = calls;
            }
        }
        let first = contenders[0].0;
        for (at, (contender, _)) in contenders.iter().enumerate() {
            let ratios = rates[at].iter().zip(&rates[0]).map(|(own, limit)| own / limit).collect();
            let row = Row {
                stage: stage.to_owned(),
                contender,
                measure,
                rate: Spread::of(rates[at].clone()).expect("at least one round"),
                beside: (at > 0).then_some(first),
                ratio: if at > 0 { Spread::of(ratios) } else { None },
                syscalls_per_mib: syscalls[at],
                sha256: sha256.map(str::to_owned),
                rounds: self.rounds,
                machine: &self.facts,
            };
            self.json.push_str(&serde_json::to_string(&row)?);
            self.json.push('\n');
            let show = |value: f64| {
                if measure == "bytes_per_second" {
                    format!("{:8.2} GiB/s", value / f64::from(1 << 30))
                } else {
                    format!("{:8.0} ns", 1e9 / value)
                }
            };
            let Spread { median, min, max } = row.rate;
            // A time is the inverse of a rate, so its extremes change places.
            let (min, max) = if measure == "bytes_per_second" { (min, max) } else { (max, min) };
            let ratio = row.ratio.map_or_else(String::new, |of| {
                format!("{:.2} of {first} ({:.2}..{:.2})", of.median, of.min, of.max)
            });
            let calls =
                row.syscalls_per_mib.map_or_else(String::new, |calls| format!("{calls:.2} calls/MiB"));
            println!(
                "{stage:<26} {contender:<14} {} ({}..{}) {ratio:<33} {calls}",
                show(median),
                show(min).trim(),
                show(max).trim(),
            );
        }
        Ok(())
    }

    fn ring(&mut self, dir: &Path, bytes: u64, depth: u32) -> io::Result<()> {
        let scratch = Scratch::new(dir, "stage", 2 * bytes)?;
        let (from, to) = (scratch.at("source"), scratch.at("sink"));
        let digest = source::write_file(&from, Content::Plain, bytes)?;
        source::write_file(&to, Content::Cipher(source::DATA_UNIT), 0)?;
        let direct = |path: &Path, write: bool| {
            use std::os::unix::fs::OpenOptionsExt;
            let mut options = File::options();
            options.read(!write).write(write);
            let flags = i32::try_from(rustix::fs::OFlags::DIRECT.bits()).expect("open flags fit an int");
            options.clone().custom_flags(flags).open(path).or_else(|_| options.open(path))
        };
        let (read, write) = (Arc::new(direct(&from, false)?), Arc::new(direct(&to, true)?));
        let file = |file: &File| file.try_clone().map(|file| Arc::new(OwnedFd::from(file)));
        let (source, sink) = (file(&read)?, file(&write)?);
        for chunk in CHUNKS {
            let failed = |error: engine::error::Error| io::Error::other(error.chain());
            let queue = |threads: bool| -> io::Result<CopyQueue> {
                let mut arena = Arena::new(depth, chunk).map_err(failed)?;
                let queue: Box<dyn Queue> = if threads {
                    Box::new(ThreadsQueue::new(depth.min(16), depth).map_err(failed)?)
                } else {
                    Box::new(UringQueue::new(&arena, depth).map_err(failed)?)
                };
                Ok(CopyQueue { queue, free: arena.take_all(), source: source.clone(), sink: sink.clone() })
            };
            let mut contenders: Vec<Once<'_>> = Vec::new();
            let mut buffer = AlignedBuffer::patterned(chunk as usize);
            let (plain_read, plain_write) = (source.clone(), sink.clone());
            contenders.push((
                "pread/pwrite",
                Box::new(move || plain_copy(&plain_read, &plain_write, buffer.as_mut_slice(), bytes)),
            ));
            match queue(false) {
                Ok(mut queue) => contenders.push(("io_uring", Box::new(move || queue.copy(bytes, chunk)))),
                Err(error) => eprintln!("SKIP io_uring: {error}"),
            }
            let mut threads = queue(true)?;
            contenders.push(("threads", Box::new(move || threads.copy(bytes, chunk))));
            // Each alone into a spoiled sink, checked, before any is timed; then the sink has its pages or blocks, too.
            for (name, once) in &mut contenders {
                source::write_file(&to, Content::Cipher(source::DATA_UNIT), bytes.min(16 << 20))?;
                once()?;
                if source::digest_file(&to, 0)? != digest {
                    return Err(io::Error::other(format!("{name} copied wrong bytes")));
                }
            }
            let place = dir.file_name().map_or_else(|| "dir".into(), |name| name.to_string_lossy());
            let stage = format!("ring-{place}-{}k", chunk >> 10);
            self.stage(&stage, "bytes_per_second", Some(&digest), contenders)?;
        }
        Ok(())
    }

    fn crypt(&mut self) -> io::Result<()> {
        let kernel = Kernel::best().map_err(|error| io::Error::other(error.chain()))?;
        for chunk in CHUNKS {
            let time = self.time;
            let bytes = u64::from(chunk);
            let mut contenders: Vec<Once<'_>> = Vec::new();
            if spin(kernel, 256, 0).is_some() {
                let limit = move || {
                    black_box(spin(kernel, 256, bytes));
                };
                contenders.push(("issue limit", timed(time, chunk as usize, limit)));
            }
            let mut work = work(kernel, Operation::Encrypt, 256, 4096)
                .map_err(|error| io::Error::other(error.chain()))?;
            let mut buffer = AlignedBuffer::patterned(chunk as usize);
            contenders.push((
                kernel.name(),
                timed(time, chunk as usize, move || work(black_box(buffer.as_mut_slice()))),
            ));
            self.stage(&format!("crypt-{}k", chunk >> 10), "bytes_per_second", None, contenders)?;
        }
        Ok(())
    }

    fn memory(&mut self) -> io::Result<()> {
        let time = self.time;
        let zeros = vec![0_u8; MIB];
        let mut noise = vec![0_u8; MIB];
        Pattern.fill(0, &mut noise);
        let twin = noise.clone();
        let mut room = vec![0_u8; MIB];
        let read = |bytes: &[u8]| {
            black_box(sum(black_box(bytes)));
        };
        let find = |bytes: &[u8]| {
            black_box(Runs::nonzero(black_box(bytes)));
        };
        let copy = || black_box(&mut room).copy_from_slice(black_box(&zeros));
        let contenders = vec![
            ("read", timed(time, MIB, || read(&zeros))),
            ("Runs::nonzero", timed(time, MIB, || find(&zeros))),
            ("memcpy", timed(time, MIB, copy)),
        ];
        self.stage("zeros-of-zeros-1024k", "bytes_per_second", None, contenders)?;
        let contenders = vec![
            ("read", timed(time, MIB, || read(&noise))),
            ("Runs::nonzero", timed(time, MIB, || find(&noise))),
        ];
        self.stage("zeros-of-noise-1024k", "bytes_per_second", None, contenders)?;
        let both = || {
            read(&noise);
            read(&twin);
        };
        // Slices of bytes compare by `memcmp`, which is how verifying compares a chunk.
        let compare = || assert!(black_box(&noise) == black_box(&twin));
        let contenders =
            vec![("read", timed(time, 2 * MIB, both)), ("slice equality", timed(time, 2 * MIB, compare))];
        self.stage("compare-2x1024k", "bytes_per_second", None, contenders)
    }

    /// What a chunk costs besides its bytes: two clock reads per stage are part of it.
    fn hand_off(&mut self) -> io::Result<()> {
        let time = self.time;
        let plan = Plan::new(None, 1 << 20);
        let gate = Gate::default();
        let counters = Counters::default();
        let mut record = StageRecord::default();
        let mut chunk = || {
            assert_eq!(gate.admit(), Admission::Open);
            let Claim::Extent(extent) = plan.claim() else { panic!("a stream has no end") };
            gate.charge(extent.len());
            let mut since = Instant::now();
            for stage in [Stage::Read, Stage::Queue, Stage::Crypt, Stage::Write] {
                let now = Instant::now();
                record.record(&counters, stage, now - since, extent.len());
                since = now;
            }
            counters.add_done(extent.len());
        };
        let once = move || Ok((rate(1, time, &mut chunk), None));
        self.stage(
            "hand-off-per-chunk",
            "chunks_per_second",
            None,
            vec![("claim+gate+record", Box::new(once))],
        )
    }
}

/// Call `once`, which handles `bytes`, for a while.
fn timed<'a>(
    time: Duration,
    bytes: usize,
    mut once: impl FnMut() + 'a,
) -> Box<dyn FnMut() -> io::Result<(f64, Option<f64>)> + 'a> {
    Box::new(move || Ok((rate(bytes as u64, time, &mut once), None)))
}

/// Add up all words: as fast as this build can read. Four sums, so that no chain of additions holds up the loads.
fn sum(bytes: &[u8]) -> u64 {
    let (lines, _) = bytes.as_chunks::<256>();
    let mut sums = [0_u64; 32];
    for line in lines {
        let (words, _) = line.as_chunks::<8>();
        for (sum, word) in sums.iter_mut().zip(words) {
            *sum = sum.wrapping_add(u64::from_ne_bytes(*word));
        }
    }
    sums.into_iter().fold(0, u64::wrapping_add)
}

fn plain_copy(
    source: &OwnedFd,
    sink: &OwnedFd,
    buf: &mut [u8],
    bytes: u64,
) -> io::Result<(f64, Option<f64>)> {
    let start = Instant::now();
    let (mut offset, mut calls) = (0, 0_u32);
    while offset < bytes {
        let read = rustix::io::pread(source, &mut *buf, offset)?;
        let wrote = rustix::io::pwrite(sink, &buf[..read], offset)?;
        if read == 0 || wrote != read {
            return Err(io::Error::other("a plain copy was cut short"));
        }
        offset += wrote as u64;
        calls += 2;
    }
    Ok(told(bytes, start, f64::from(calls)))
}

fn told(bytes: u64, start: Instant, calls: f64) -> (f64, Option<f64>) {
    let seconds = start.elapsed().as_secs_f64();
    (bytes as f64 / seconds, Some(calls / (bytes as f64 / MIB as f64)))
}

/// A worker's loop with nothing between read and write.
struct CopyQueue {
    queue: Box<dyn Queue>,
    free: Vec<engine::sys::buffer::Buf>,
    source: Arc<OwnedFd>,
    sink: Arc<OwnedFd>,
}

impl CopyQueue {
    fn copy(&mut self, bytes: u64, chunk: u32) -> io::Result<(f64, Option<f64>)> {
        let failed = |error: engine::error::Error| io::Error::other(error.chain());
        let queue = &mut self.queue;
        let source = queue.attach(self.source.clone()).map_err(failed)?;
        let sink = queue.attach(self.sink.clone()).map_err(failed)?;
        let calls = queue.syscalls();
        let plan = Plan::new(Some(bytes), chunk);
        let mut done = Vec::new();
        let full = |op: Op| io::Error::other(format!("no room for operation {}", op.token));
        let start = Instant::now();
        loop {
            while let Some(buf) = self.free.pop() {
                let Claim::Extent(extent) = plan.claim() else {
                    self.free.push(buf);
                    break;
                };
                let span = 0..u32::try_from(extent.len()).expect("a chunk is small");
                let what = What::Read { position: Position::At(extent.start()), buf, span };
                // The offset is a multiple of the chunk: its lowest bit says read or write.
                let op = Op { token: extent.start(), port: source, what };
                queue.push(op).map_err(|(_, op)| full(op))?;
            }
            if queue.in_flight() == 0 {
                break;
            }
            queue.wait(None).map_err(failed)?;
            queue.reap(&mut done);
            for done in done.drain(..) {
                let moved = done.result?;
                let buf = done.buf.expect("a transfer brings its buffer back");
                if done.token & 1 == 1 {
                    self.free.push(buf);
                    continue;
                }
                let what = What::Write { position: Position::At(done.token), buf, span: 0..moved };
                let op = Op { token: done.token | 1, port: sink, what };
                queue.push(op).map_err(|(_, op)| full(op))?;
                queue.kick().map_err(failed)?;
            }
        }
        #[expect(clippy::cast_precision_loss, reason = "a count of calls far below 2^53")]
        let told = told(bytes, start, (queue.syscalls() - calls) as f64);
        queue.detach(source);
        queue.detach(sink);
        Ok(told)
    }
}

fn run(arguments: &Arguments) -> io::Result<()> {
    let small = arguments.small;
    let mut bench = Bench {
        facts: Facts::collect(),
        rounds: if small { 1 } else { arguments.rounds.max(1) },
        time: Duration::from_millis(if small { 1 } else { arguments.millis }),
        json: String::new(),
    };
    println!("{}", bench.facts.line());
    for dir in &arguments.dir {
        bench.ring(dir, if small { 16 << 20 } else { arguments.size << 20 }, arguments.depth)?;
    }
    bench.crypt()?;
    bench.memory()?;
    bench.hand_off()?;
    if let Some(path) = &arguments.json {
        std::fs::write(path, &bench.json)?;
    }
    Ok(())
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stage: {error}");
            ExitCode::FAILURE
        }
    }
}
