//! NBD servers over the same plaintext: `qemu-nbd` of a raw file (the limit: nothing is encrypted), `qemu-nbd` of LUKS1, and ours of
//! LUKS2, interleaved, with fio's nbd engine and nbdcopy as clients.
//!
//! Each server has a file of its own, all of it written before anything is read, and all of the same plaintext of the same length. The
//! server is started anew for each run, on a Unix socket, and its CPU time is taken around the client's run. A run on `disk` goes past the
//! page cache on the server's side; one in the `cache` reads a file that was read before.
//!
//! Before its first run each server's plaintext is read through it and compared; after the last, all of it is written through it, and read
//! back another way (ours: by `cryptctl decrypt`) and compared. Without nbdcopy that is skipped aloud.
//!
//! The case `rotate` is ours alone, see its module.

mod rotate;

use std::cell::Cell;
use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use benches::facts::Facts;
use benches::nbd::load::{self, Direction, Load, Told};
use benches::nbd::rows::{self, Row, Unit};
use benches::nbd::server::Server;
use benches::ours::{Daemon, Format, Programs, Tuning};
use benches::rivals::{self, QemuNbd};
use benches::rows::Side;
use benches::run;
use benches::scratch::Scratch;
use benches::source::{self, Content};
use clap::{Parser, ValueEnum};

/// Measure NBD servers: qemu-nbd of plain data, of LUKS1, and ours of LUKS2.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Directory on the disk to measure; a scratch directory is made in it and removed
    #[arg(long, default_value = ".")]
    dir: PathBuf,
    /// Plaintext of each volume, in MiB
    #[arg(long, default_value_t = 2048, value_name = "MIB")]
    size: u64,
    /// Interleaved rounds
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// How long each of fio's runs takes
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Cases to run
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "rand-read,rand-write,lat-read,lat-write,stream-read,stream-write,copy-read,copy-write"
    )]
    cases: Vec<Case>,
    /// Where the files are: past the page cache, or in it
    #[arg(long, value_enum, value_delimiter = ',', default_value = "disk")]
    media: Vec<Medium>,
    /// Sides to run
    #[arg(long, value_enum, value_delimiter = ',', default_value = "limit,rival,ours")]
    sides: Vec<Wanted>,
    /// Write one JSON row per run to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// 64 MiB and one short round, to see that everything works; its rates mean nothing
    #[arg(long)]
    small: bool,
    /// Where `cryptctl` and `cryptd` are [default: beside this program]
    #[arg(long, value_name = "DIR")]
    bin_dir: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Case {
    /// 4 KiB anywhere, 32 in flight, one connection
    RandRead,
    /// the same, writing
    RandWrite,
    /// 4 KiB anywhere, one at a time
    LatRead,
    /// the same, writing
    LatWrite,
    /// 1 MiB in order, 16 in flight
    StreamRead,
    /// the same, writing
    StreamWrite,
    /// the whole volume, by nbdcopy
    CopyRead,
    /// the whole volume, from a file by nbdcopy, flushed
    CopyWrite,
    /// 4 KiB anywhere, 4 connections with 32 in flight each
    ConnsRead,
    /// the same, writing
    ConnsWrite,
    /// ours alone: 4 KiB anywhere, reads and writes, while the volume key is changed, beside a server at rest
    Rotate,
}

impl Case {
    fn name(self) -> &'static str {
        match self {
            Self::RandRead => "rand-read",
            Self::RandWrite => "rand-write",
            Self::LatRead => "lat-read",
            Self::LatWrite => "lat-write",
            Self::StreamRead => "stream-read",
            Self::StreamWrite => "stream-write",
            Self::CopyRead => "copy-read",
            Self::CopyWrite => "copy-write",
            Self::ConnsRead => "conns-read",
            Self::ConnsWrite => "conns-write",
            Self::Rotate => "rotate",
        }
    }

    /// What fio is to do; `None`: nbdcopy does it.
    fn load(self) -> Option<Load> {
        let direction = match self {
            Self::RandRead | Self::LatRead | Self::StreamRead | Self::ConnsRead => Direction::Read,
            Self::RandWrite | Self::LatWrite | Self::StreamWrite | Self::ConnsWrite => Direction::Write,
            Self::CopyRead | Self::CopyWrite | Self::Rotate => return None,
        };
        let (block_bytes, depth, connections) = match self {
            Self::LatRead | Self::LatWrite => (4096, 1, 1),
            Self::StreamRead | Self::StreamWrite => (1 << 20, 16, 1),
            Self::ConnsRead | Self::ConnsWrite => (4096, 32, 4),
            _ => (4096, 32, 1),
        };
        Some(Load { random: block_bytes == 4096, direction, block_bytes, depth, connections })
    }

    fn unit(self) -> Unit {
        match self.load() {
            Some(load) if load.random => Unit::Iops,
            _ => Unit::Mibps,
        }
    }

    /// The tool that plays the client.
    fn client(self) -> &'static str {
        match self {
            Self::CopyRead | Self::CopyWrite => "nbdcopy",
            _ => "fio",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Medium {
    /// past the page cache (`O_DIRECT`)
    Disk,
    /// through the page cache, which holds the file
    Cache,
}

impl Medium {
    fn name(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Cache => "cache",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Wanted {
    Limit,
    Rival,
    Ours,
}

/// Who serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Contender {
    Qemu(QemuNbd),
    Ours,
}

impl Contender {
    const ALL: [Self; 3] = [Self::Qemu(QemuNbd::Raw), Self::Qemu(QemuNbd::Luks), Self::Ours];

    fn name(self) -> &'static str {
        match self {
            Self::Qemu(QemuNbd::Raw) => "qemu-nbd raw",
            Self::Qemu(QemuNbd::Luks) => "qemu-nbd LUKS1",
            Self::Ours => "cryptctl LUKS2",
        }
    }

    fn side(self) -> Side {
        match self {
            Self::Qemu(QemuNbd::Raw) => Side::Limit,
            Self::Qemu(QemuNbd::Luks) => Side::Rival,
            Self::Ours => Side::Ours,
        }
    }

    /// Its file.
    fn file(self) -> &'static str {
        match self {
            Self::Qemu(QemuNbd::Raw) => "raw",
            Self::Qemu(QemuNbd::Luks) => "luks1",
            Self::Ours => "luks2",
        }
    }
}

/// Those that ratios are taken to.
const RIVALS: [&str; 2] = ["qemu-nbd LUKS1", "qemu-nbd raw"];

/// Data unit of our volume, bytes.
const DATA_UNIT: u16 = 4096;

struct Bench {
    arguments: Arguments,
    programs: Option<Programs>,
    scratch: Scratch,
    size: u64,
    /// Of the plaintext, from the seed alone.
    digest: String,
    starts: Cell<u32>,
    rows: Vec<Row>,
}

fn main() -> ExitCode {
    let mut arguments = Arguments::parse();
    if arguments.small {
        (arguments.size, arguments.rounds, arguments.seconds) = (64, 1, 0.2);
    }
    match bench(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nbd: {error}");
            ExitCode::FAILURE
        }
    }
}

fn bench(arguments: Arguments) -> io::Result<()> {
    let programs =
        Programs::find(arguments.bin_dir.as_deref()).map_err(|why| eprintln!("SKIP cryptctl: {why}")).ok();
    let facts = Facts::collect();
    println!("{}; {} MiB, {} s per run of fio", facts.line(), arguments.size, arguments.seconds);
    let size = arguments.size << 20;
    let scratch = Scratch::new(&arguments.dir, "nbd", 4 * size + (128 << 20))?;
    let digest = source::digest_of(Content::LoopedPlain, size)?;
    let starts = Cell::new(0);
    let mut bench = Bench { arguments, programs, scratch, size, digest, starts, rows: Vec::new() };
    let outcome = bench.run();
    // What was measured before a failure was measured all the same.
    println!("{}", rows::table(&bench.rows, &RIVALS));
    if let Some(path) = &bench.arguments.json {
        fs::write(path, rows::json_lines(&bench.rows, &RIVALS, &facts)?)?;
    }
    outcome
}

impl Bench {
    fn run(&mut self) -> io::Result<()> {
        rivals::write_passphrase(&self.passphrase())?;
        source::write_file(&self.source(), Content::LoopedPlain, self.size)?;
        let contenders = self.contenders();
        for &contender in &contenders {
            self.make(contender)?;
        }
        let copies = has("nbdcopy");
        if copies {
            for &contender in &contenders {
                self.check(contender, "serves")?;
            }
        } else {
            eprintln!("SKIP the comparison of what is served: nbdcopy is not installed");
        }
        for medium in self.arguments.media.clone() {
            for case in self.cases() {
                if case == Case::Rotate {
                    continue;
                }
                for round in 0..self.arguments.rounds {
                    for place in 0..contenders.len() {
                        let contender = contenders[(place + round as usize) % contenders.len()];
                        self.turn(medium, case, contender, round).map_err(|error| {
                            io::Error::other(format!("{}: {}: {error}", case.name(), contender.name()))
                        })?;
                    }
                }
            }
        }
        if self.cases().contains(&Case::Rotate) && contenders.contains(&Contender::Ours) {
            rotate::rounds(self)?;
        }
        if copies {
            for &contender in &contenders {
                self.check_writes(contender)?;
            }
        }
        Ok(())
    }

    /// Those that were asked for and whose tools are here.
    fn contenders(&self) -> Vec<Contender> {
        let available = |contender: &Contender| {
            let wanted = match contender.side() {
                Side::Limit => Wanted::Limit,
                Side::Rival => Wanted::Rival,
                Side::Ours => Wanted::Ours,
            };
            if !self.arguments.sides.contains(&wanted) {
                return false;
            }
            if *contender == Contender::Ours {
                return self.programs.is_some();
            }
            let here = has("qemu-nbd") && has("qemu-img");
            if !here {
                eprintln!("SKIP {}: qemu-nbd and qemu-img are not installed", contender.name());
            }
            here
        };
        Contender::ALL.into_iter().filter(available).collect()
    }

    /// Those that were asked for and whose client is here.
    fn cases(&self) -> Vec<Case> {
        let available = |case: &Case| {
            let here = has(case.client());
            if !here {
                eprintln!("SKIP {}: {} is not installed", case.name(), case.client());
            }
            here
        };
        self.arguments.cases.iter().copied().filter(available).collect()
    }

    fn passphrase(&self) -> PathBuf {
        self.scratch.at("passphrase")
    }

    /// The plaintext.
    fn source(&self) -> PathBuf {
        self.scratch.at("source")
    }

    fn file(&self, contender: Contender) -> PathBuf {
        self.scratch.at(contender.file())
    }

    /// The file it serves, with the plaintext in it: all written, so that no read finds a hole.
    fn make(&self, contender: Contender) -> io::Result<()> {
        let file = self.file(contender);
        match contender {
            Contender::Qemu(QemuNbd::Raw) => {
                source::write_file(&file, Content::LoopedPlain, self.size)?;
            }
            Contender::Qemu(QemuNbd::Luks) => {
                run::pipeline(&mut [rivals::qemu_create(&self.passphrase(), &file, self.size)])?;
                run::pipeline(&mut [rivals::qemu(true, true, &self.passphrase(), &self.source(), &file)])?;
            }
            Contender::Ours => {
                let daemon = self.daemon()?;
                let tuning = Tuning { format: Format::Luks2, sector_bytes: DATA_UNIT, ..Tuning::default() };
                run::pipeline(&mut [daemon.command("encrypt", &self.source(), &file, &tuning)])?;
            }
        }
        let has = fs::metadata(&file)?.blocks() * 512;
        if has < self.size {
            let what = format!("{} has {has} bytes of {}: it has holes", file.display(), self.size);
            return Err(io::Error::other(what));
        }
        Ok(())
    }

    /// A place for one start of something: no run finds what another left.
    fn fresh(&self) -> io::Result<PathBuf> {
        self.starts.set(self.starts.get() + 1);
        let dir = self.scratch.at(&format!("start-{}", self.starts.get()));
        fs::create_dir(&dir)?;
        Ok(dir)
    }

    fn daemon(&self) -> io::Result<Daemon> {
        let programs = self.programs.as_ref().ok_or_else(|| io::Error::other("cryptctl is not here"))?;
        Daemon::start(programs, &self.fresh()?)
    }

    fn serve(&self, contender: Contender, medium: Medium) -> io::Result<Server> {
        let socket = self.fresh()?.join("nbd.sock");
        let (file, direct) = (self.file(contender), medium == Medium::Disk);
        match contender {
            Contender::Qemu(what) => {
                let mut command = rivals::qemu_nbd(what, direct, &self.passphrase(), &file, &socket);
                Server::start(&mut command, None, &socket)
            }
            Contender::Ours => {
                let daemon = self.daemon()?;
                let mut command = daemon.export(&file, direct, &socket);
                Server::start(&mut command, Some(daemon), &socket)
            }
        }
    }

    fn turn(&mut self, medium: Medium, case: Case, contender: Contender, round: u32) -> io::Result<()> {
        match medium {
            Medium::Disk => drop(run::drop_caches()),
            Medium::Cache => warm(&self.file(contender))?,
        }
        if case == Case::CopyWrite {
            warm(&self.source())?;
        }
        let server = self.serve(contender, medium)?;
        let before = server.cpu()?;
        let told = self.ask(case, &server.uri())?;
        let cpu = server.cpu()?.since(before);
        let row = Row::new(
            (medium.name(), case.name(), case.unit()),
            (contender.name(), contender.side()),
            round,
            told,
            (cpu, server.rss_peak()),
        );
        self.keep(row);
        Ok(())
    }

    fn keep(&mut self, row: Row) {
        eprintln!("{} {} round {} {}: {:.0}", row.medium, row.case, row.round, row.server, row.rate());
        self.rows.push(row);
    }

    fn ask(&self, case: Case, uri: &str) -> io::Result<Told> {
        match (case, case.load()) {
            (_, Some(load)) => {
                load::fio(load, uri, self.size, self.arguments.seconds, &self.scratch.at("fio.json"))
            }
            (Case::CopyWrite, None) => load::copy(&self.source().display().to_string(), uri, self.size),
            (_, None) => load::copy(uri, "null:", self.size),
        }
    }

    /// All of its plaintext, read through it, is what it must be.
    fn check(&self, contender: Contender, verb: &str) -> io::Result<()> {
        let server = self.serve(contender, Medium::Disk)?;
        let mut copy = Command::new("nbdcopy");
        copy.arg(server.uri()).arg("-").stdin(Stdio::null());
        self.compare(contender, verb, copy)
    }

    /// All of the plaintext written through it is there, read another way: of qemu by another process of it, of ours by a job.
    fn check_writes(&self, contender: Contender) -> io::Result<()> {
        let server = self.serve(contender, Medium::Disk)?;
        load::copy(&self.source().display().to_string(), &server.uri(), self.size)?;
        drop(server);
        if contender != Contender::Ours {
            return self.check(contender, "has written");
        }
        let daemon = self.daemon()?;
        let tuning = Tuning { format: Format::Luks2, ..Tuning::default() };
        let decrypt = daemon.command("decrypt", &self.file(contender), Path::new("-"), &tuning);
        self.compare(contender, "has written", decrypt)
    }

    /// What a command prints is the plaintext.
    fn compare(&self, contender: Contender, verb: &str, command: Command) -> io::Result<()> {
        let found = self.scratch.at("digest");
        let mut digest = Command::new(std::env::current_exe()?.with_file_name("pipeloop"));
        digest.arg("digest").stdout(fs::File::create(&found)?);
        run::pipeline(&mut [command, digest])?;
        let text = fs::read_to_string(found)?;
        if text.split_whitespace().nth(1) == Some(&self.digest) {
            return Ok(());
        }
        let (who, wanted) = (contender.name(), &self.digest);
        Err(io::Error::other(format!("{who} {verb} wrong bytes: {} instead of {wanted}", text.trim())))
    }
}

fn has(tool: &str) -> bool {
    run::answers(Path::new(tool), "--version")
}

/// Read a file through the page cache, where it stays: page by page, because ext4 looks through all of a folio for each small write
/// to it, and the large ones that reading ahead makes cost more (30 us a write) than any server does.
fn warm(path: &Path) -> io::Result<()> {
    // What is there in large folios would stay so. Without the right to forget it, it does.
    let _ = run::drop_caches();
    let mut file = fs::File::open(path)?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random)?;
    let mut buf = vec![0; 4 << 20];
    while file.read(&mut buf)? > 0 {}
    Ok(())
}
