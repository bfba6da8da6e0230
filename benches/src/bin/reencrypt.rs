//! Re-encryption of a LUKS2 volume in place: fio's limit, cryptsetup's offline re-encryption and ours, interleaved.
//!
//! Every contender of a case re-encrypts the same file, each what the one before left, with a new volume key: the plaintext
//! stays the same throughout, and is compared after the first turn of each and at the end. fio, which keeps nothing, has a file of its own
//! beside it, as large and as fully written; it reads and writes each byte once (with a journal: writes it twice), without a
//! flush, and its start and end are not counted. Passphrases cost next to nothing on all sides.
//!
//! Wall time runs from the start of the command to its end. CPU of ours is the daemon's and the client's, with the daemon's alone in the
//! column beside it; peak memory is that of a daemon started for the run, and of the cryptsetup process.

use std::cell::Cell;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use benches::facts::Facts;
use benches::fio::{self, InPlace};
use benches::ours::{Daemon, Format, Programs, Tuning};
use benches::rivals;
use benches::rows::{self, Row, Side, Spread};
use benches::run::{self, Cost};
use benches::scratch::Scratch;
use benches::source::{self, Content};
use clap::{Parser, ValueEnum};

/// Measure re-encryption in place: limit, cryptsetup, ours.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Directory on the disk to measure; a scratch directory is made in it and removed
    #[arg(long, default_value = ".")]
    dir: PathBuf,
    /// Data of the volume, in MiB
    #[arg(long, default_value_t = 8192, value_name = "MIB")]
    size: u64,
    /// Interleaved rounds
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Cases to run, by how a step is protected
    #[arg(long, value_enum, value_delimiter = ',', default_value = "checksum,journal,none")]
    cases: Vec<Case>,
    /// Sides to run
    #[arg(long, value_enum, value_delimiter = ',', default_value = "limit,rival,ours")]
    sides: Vec<Wanted>,
    /// Write one JSON row per run to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// 64 MiB and one round, to see that everything works; its rates mean nothing
    #[arg(long)]
    small: bool,
    /// Where `cryptctl` and `cryptd` are [default: beside this program]
    #[arg(long, value_name = "DIR")]
    bin_dir: Option<PathBuf>,
    /// Operations in flight per fio job
    #[arg(long, default_value_t = 8)]
    fio_depth: u32,
    /// Data unit of the volume, bytes
    #[arg(long, value_name = "BYTES", default_value_t = 4096)]
    sector_size: u16,
    /// Handed on to cryptctl [default: its own choice]
    #[arg(long, value_name = "SIZE")]
    hotzone_size: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Case {
    Checksum,
    Journal,
    None,
}

impl Case {
    fn name(self) -> &'static str {
        match self {
            Self::Checksum => "checksum",
            Self::Journal => "journal",
            Self::None => "none",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Wanted {
    Limit,
    Rival,
    Ours,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Contender {
    Fio(InPlace),
    Cryptsetup,
    Ours,
}

impl Contender {
    const ALL: [Self; 4] =
        [Self::Fio(InPlace::Mixed), Self::Fio(InPlace::Apart), Self::Cryptsetup, Self::Ours];

    fn name(self) -> &'static str {
        match self {
            Self::Fio(InPlace::Mixed) => "fio rw=rw",
            Self::Fio(InPlace::Apart) => "fio read and write",
            Self::Cryptsetup => "cryptsetup",
            Self::Ours => "cryptctl",
        }
    }

    fn side(self) -> Side {
        match self {
            Self::Fio(_) => Side::Limit,
            Self::Cryptsetup => Side::Rival,
            Self::Ours => Side::Ours,
        }
    }
}

struct Bench {
    arguments: Arguments,
    programs: Programs,
    scratch: Scratch,
    size: u64,
    /// Of the plaintext, from the seed alone.
    digest: String,
    daemons: Cell<u32>,
    rows: Vec<Row>,
}

fn main() -> ExitCode {
    let mut arguments = Arguments::parse();
    if arguments.small {
        (arguments.size, arguments.rounds) = (64, 1);
    }
    match bench(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("reencrypt: {error}");
            ExitCode::FAILURE
        }
    }
}

fn bench(arguments: Arguments) -> io::Result<()> {
    // The volume is made and compared by ours, so nothing can be measured without.
    let programs = Programs::find(arguments.bin_dir.as_deref()).map_err(io::Error::other)?;
    let facts = Facts::collect();
    println!("{}; data unit {} bytes, {} MiB", facts.line(), arguments.sector_size, arguments.size);
    let size = arguments.size << 20;
    let scratch = Scratch::new(&arguments.dir, "reencrypt", 2 * size + (64 << 20))?;
    let digest = source::digest_of(Content::LoopedPlain, size)?;
    let mut bench =
        Bench { arguments, programs, scratch, size, digest, daemons: Cell::new(0), rows: Vec::new() };
    let outcome = bench.run();
    // What was measured before a failure was measured all the same.
    println!("{}", rows::table(&bench.rows));
    println!("{}", bench.beside_rival());
    if let Some(path) = &bench.arguments.json {
        fs::write(path, rows::json_lines(&bench.rows, &facts)?)?;
    }
    outcome
}

impl Bench {
    fn run(&mut self) -> io::Result<()> {
        let contenders = self.contenders();
        self.make_volume()?;
        if contenders.iter().any(|contender| contender.side() == Side::Limit) {
            source::write_file(&self.scratch.at("limit"), Content::LoopedPlain, self.size)?;
            source::write_file(&self.scratch.at("journal"), Content::LoopedPlain, 16 << 20)?;
        }
        for case in self.arguments.cases.clone() {
            for round in 0..self.arguments.rounds {
                for place in 0..contenders.len() {
                    let contender = contenders[(place + round as usize) % contenders.len()];
                    self.turn(case, contender, round).map_err(|error| {
                        io::Error::other(format!("{}: {}: {error}", case.name(), contender.name()))
                    })?;
                }
            }
        }
        self.compare().map(drop)
    }

    /// Those that were asked for and whose tools are here.
    fn contenders(&self) -> Vec<Contender> {
        let available = |contender: &Contender| {
            let (wanted, tool) = match contender {
                Contender::Fio(_) => (Wanted::Limit, "fio"),
                Contender::Cryptsetup => (Wanted::Rival, "cryptsetup"),
                Contender::Ours => return self.arguments.sides.contains(&Wanted::Ours),
            };
            if !self.arguments.sides.contains(&wanted) {
                return false;
            }
            let answers = run::answers(Path::new(tool), "--version");
            if !answers {
                eprintln!("SKIP {}: {tool} is not installed", contender.name());
            }
            answers
        };
        Contender::ALL.into_iter().filter(available).collect()
    }

    fn volume(&self) -> PathBuf {
        self.scratch.at("volume")
    }

    fn passphrase(&self) -> PathBuf {
        self.scratch.at("passphrase")
    }

    fn pipeloop(arguments: &[&str]) -> io::Result<Command> {
        let mut command = Command::new(std::env::current_exe()?.with_file_name("pipeloop"));
        command.args(arguments).stdin(Stdio::null());
        Ok(command)
    }

    /// A new one in a directory of its own, so that its peak memory is that of one run, and one that is still ending is not taken for it.
    fn daemon(&self) -> io::Result<Daemon> {
        self.daemons.set(self.daemons.get() + 1);
        let dir = self.scratch.at(&format!("daemon-{}", self.daemons.get()));
        fs::create_dir(&dir)?;
        Daemon::start(&self.programs, &dir)
    }

    /// A volume of the seeded bytes, made by ours.
    fn make_volume(&self) -> io::Result<()> {
        let daemon = self.daemon()?;
        let tuning =
            Tuning { format: Format::Luks2, sector_bytes: self.arguments.sector_size, ..Tuning::default() };
        let produce = Self::pipeloop(&["produce", &self.size.to_string()])?;
        let encrypt = daemon.command("encrypt", Path::new("-"), &self.volume(), &tuning);
        run::pipeline(&mut [produce, encrypt])?;
        fs::write(self.passphrase(), source::bench_key())?;
        self.compare().map(drop)
    }

    /// Read the whole plaintext: it must be what it was.
    fn compare(&self) -> io::Result<String> {
        let daemon = self.daemon()?;
        let tuning = Tuning { format: Format::Luks2, ..Tuning::default() };
        let mut decrypt = daemon.command("decrypt", &self.volume(), Path::new("-"), &tuning);
        decrypt.stdin(Stdio::null());
        let found = self.scratch.at("digest");
        let mut digest = Self::pipeloop(&["digest"])?;
        digest.stdout(fs::File::create(&found)?);
        run::pipeline(&mut [decrypt, digest])?;
        let text = fs::read_to_string(found)?;
        match text.split_whitespace().nth(1) {
            Some(digest) if digest == self.digest => Ok(self.digest.clone()),
            other => Err(io::Error::other(format!(
                "the plaintext has changed: sha256 {other:?} instead of {}",
                self.digest
            ))),
        }
    }

    fn turn(&mut self, case: Case, contender: Contender, round: u32) -> io::Result<()> {
        let cold = run::drop_caches();
        let (cost, client) = match contender {
            Contender::Fio(how) => {
                let journal = (case == Case::Journal).then(|| self.scratch.at("journal"));
                let file = self.scratch.at("limit");
                let depth = self.arguments.fio_depth;
                (fio::rewrite(how, depth, &file, journal.as_deref(), self.size)?, None)
            }
            Contender::Cryptsetup => {
                let mut command =
                    rivals::cryptsetup_reencrypt(&self.passphrase(), case.name(), &self.volume());
                command.stdout(Stdio::null());
                (run::pipeline(&mut [command])?, None)
            }
            Contender::Ours => {
                let daemon = self.daemon()?;
                let before = daemon.cpu()?;
                let mut command = daemon.reencrypt(&self.volume(), case.name());
                if let Some(size) = &self.arguments.hotzone_size {
                    command.args(["--hotzone-size", size]);
                }
                let cost = run::pipeline(&mut [command])?;
                let cpu = daemon.cpu()?.since(before);
                (Cost { cpu, rss_peak: daemon.rss_peak(), ..cost }, Some(cost.cpu.total()))
            }
        };
        let first = self.rows.iter().all(|row| (row.case, row.contender) != (case.name(), contender.name()));
        let checked = first && contender.side() != Side::Limit;
        let row = Row {
            case: case.name(),
            contender: contender.name(),
            side: contender.side(),
            round,
            bytes: self.size,
            wall_seconds: cost.wall,
            cpu_user_seconds: cost.cpu.user,
            cpu_system_seconds: cost.cpu.system,
            client_cpu_seconds: client,
            syscalls: None,
            rss_peak_bytes: cost.rss_peak,
            sha256: if checked { Some(self.compare()?) } else { None },
            cold,
        };
        let gib = row.rate() / f64::from(1 << 30);
        eprintln!("{} round {round} {}: {:.2} s, {gib:.3} GiB/s", row.case, row.contender, row.wall_seconds);
        self.rows.push(row);
        Ok(())
    }

    /// Ours over cryptsetup's rate, round by round.
    fn beside_rival(&self) -> String {
        let mut text = String::new();
        for case in &self.arguments.cases {
            let of = |contender: Contender| {
                move |row: &&Row| (row.case, row.contender) == (case.name(), contender.name())
            };
            let ratios = self.rows.iter().filter(of(Contender::Ours)).filter_map(|ours| {
                let mut theirs = self.rows.iter().filter(of(Contender::Cryptsetup));
                theirs.find(|theirs| theirs.round == ours.round).map(|theirs| ours.rate() / theirs.rate())
            });
            if let Some(Spread { median, min, max }) = Spread::of(ratios.collect()) {
                text.push_str(&format!("{}: {median:.2} x cryptsetup ({min:.2} .. {max:.2})\n", case.name()));
            }
        }
        text
    }
}
