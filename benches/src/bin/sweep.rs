//! End to end: limit, rivals and ours over the same bytes, interleaved, every result checked.
//!
//! Each round runs every contender of a case once, starting one place further each time, so that drift and order fall
//! on all alike.
//!
//! Wall time runs from the start of the first process to the exit of the last, so ours includes the start of `cryptctl`, a
//! few milliseconds, and its final fsync. Only fio's is by its own clocks, which leave out its start, its layout of the
//! files and its end: the limit is measured kindly, ours is not.
//!
//! A contender whose tool is absent is skipped aloud; one that fails or writes wrong bytes fails the sweep.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use benches::facts::{self, Facts};
use benches::fio;
use benches::ours::{Daemon, Format, Programs, Tuning};
use benches::rivals;
use benches::rows::{self, Row, Side};
use benches::run::{self, Cost};
use benches::scratch::Scratch;
use benches::source::{self, Content};
use clap::{Parser, ValueEnum};

/// Measure whole volumes end to end: limit, rivals, ours.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Directory on the disk to measure; a scratch directory is made in it and removed
    #[arg(long, default_value = ".")]
    dir: PathBuf,
    /// Directory on a tmpfs
    #[arg(long, default_value = "/dev/shm")]
    tmpfs: PathBuf,
    /// Bytes of source on the disk and through the pipe, in MiB
    #[arg(long, default_value_t = 8192, value_name = "MIB")]
    size: u64,
    /// Bytes of source on the tmpfs, in MiB [default: the size, at most a sixth of the memory available]
    #[arg(long, value_name = "MIB")]
    tmpfs_size: Option<u64>,
    /// Interleaved rounds
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Cases to run
    #[arg(long, value_enum, value_delimiter = ',', default_value = "disk,disk-decrypt,tmpfs,pipe")]
    cases: Vec<Case>,
    /// Sides to run
    #[arg(long, value_enum, value_delimiter = ',', default_value = "limit,rival,ours,luks")]
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
    /// Operations in flight per fio thread on the disk
    #[arg(long, default_value_t = 8)]
    fio_depth: u32,
    /// Data unit of our volumes, bytes; a LUKS1 volume, as qemu-img makes it, has 512
    #[arg(long, value_name = "BYTES", default_value_t = 4096, value_parser = sector_size)]
    sector_size: u16,
    /// Handed on to cryptctl [default: the daemon's choice]
    #[arg(long, value_name = "N")]
    queue_depth: Option<u32>,
    /// Handed on to cryptctl, bytes [default: the daemon's choice]
    #[arg(long, value_name = "BYTES")]
    chunk_size: Option<u32>,
    /// Handed on to cryptctl [default: the daemon's choice]
    #[arg(long, value_name = "N")]
    workers: Option<u32>,
}

fn sector_size(text: &str) -> Result<u16, String> {
    let known = [512, 1024, 2048, 4096];
    text.parse()
        .ok()
        .filter(|bytes| known.contains(bytes))
        .ok_or_else(|| "512, 1024, 2048 or 4096".to_owned())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Case {
    /// file to file on the disk, O_DIRECT, encrypt
    Disk,
    /// the way back
    DiskDecrypt,
    /// file to file on a tmpfs, encrypt
    Tmpfs,
    /// pipe to pipe, encrypt
    Pipe,
    /// loop device to loop device over files on the disk (root)
    Loop,
}

impl Case {
    fn name(self) -> &'static str {
        match self {
            Self::Disk => "disk-encrypt",
            Self::DiskDecrypt => "disk-decrypt",
            Self::Tmpfs => "tmpfs-encrypt",
            Self::Pipe => "pipe-encrypt",
            Self::Loop => "loop-encrypt",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Wanted {
    Limit,
    Rival,
    Ours,
    /// ours with LUKS1 and LUKS2 headers, on files
    Luks,
}

/// Who runs in a case.
#[derive(Debug, Clone, Copy)]
enum Contender {
    Fio(&'static str, fio::Copy),
    Loop,
    Qemu { wide: bool },
    Openssl,
    Ours(Format),
}

impl Contender {
    fn name(self) -> &'static str {
        match self {
            Self::Fio(name, _) => name,
            Self::Loop => "read/write loop",
            Self::Qemu { wide: false } => "qemu-img",
            Self::Qemu { wide: true } => "qemu-img -m16 -W",
            Self::Openssl => "openssl enc ctr",
            Self::Ours(Format::Raw) => "cryptctl",
            Self::Ours(Format::Luks1) => "cryptctl, LUKS1",
            Self::Ours(Format::Luks2) => "cryptctl, LUKS2",
        }
    }

    fn side(self) -> Side {
        match self {
            Self::Fio(..) | Self::Loop => Side::Limit,
            Self::Qemu { .. } | Self::Openssl => Side::Rival,
            Self::Ours(_) => Side::Ours,
        }
    }
}

/// The files of one case. Where source and sink are devices they outlive a run.
struct Files {
    source: PathBuf,
    /// The same plaintext as qemu's and openssl's own volumes; for decrypting only.
    luks: PathBuf,
    ours: [PathBuf; 2],
    ctr: PathBuf,
    sink: PathBuf,
    devices: bool,
}

struct Sweep {
    arguments: Arguments,
    programs: Option<Programs>,
    facts: Facts,
    rows: Vec<Row>,
}

fn main() -> ExitCode {
    let mut arguments = Arguments::parse();
    if arguments.small {
        (arguments.size, arguments.tmpfs_size, arguments.rounds) = (64, Some(64), 1);
    }
    match sweep(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("sweep: {error}");
            ExitCode::FAILURE
        }
    }
}

fn sweep(arguments: Arguments) -> io::Result<()> {
    let programs =
        Programs::find(arguments.bin_dir.as_deref()).map_err(|why| eprintln!("SKIP cryptctl: {why}")).ok();
    let json = arguments.json.clone();
    let mut sweep = Sweep { arguments, programs, facts: Facts::collect(), rows: Vec::new() };
    println!("{}; data unit {} bytes", sweep.facts.line(), sweep.arguments.sector_size);
    let mut outcome = Ok(());
    for case in sweep.arguments.cases.clone() {
        outcome = sweep.case(case).map_err(|error| io::Error::other(format!("{}: {error}", case.name())));
        if outcome.is_err() {
            break;
        }
    }
    // What was measured before a failure was measured all the same.
    println!("{}", rows::table(&sweep.rows));
    if let Some(path) = json {
        fs::write(path, rows::json_lines(&sweep.rows, &sweep.facts)?)?;
    }
    outcome
}

/// A loop device that is detached with its owner.
struct LoopDevice(PathBuf);

impl LoopDevice {
    fn over(file: &Path) -> io::Result<Self> {
        let output =
            Command::new("losetup").args(["--find", "--show", "--direct-io=on"]).arg(file).output()?;
        if !output.status.success() {
            return Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
        }
        Ok(Self(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim())))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let status = Command::new("losetup").arg("--detach").arg(&self.0).status();
        if !status.is_ok_and(|status| status.success()) {
            eprintln!("sweep: {} stays attached", self.0.display());
        }
    }
}

impl Sweep {
    fn case(&mut self, case: Case) -> io::Result<()> {
        let mut size = self.arguments.size << 20;
        let mut parent = self.arguments.dir.clone();
        if case == Case::Tmpfs {
            // Source and sink are memory, and so is everything else the machine does: stay well below it all.
            let most = (facts::memory_available() / 6) >> 20 << 20;
            size = self.arguments.tmpfs_size.map_or(size.min(most), |mebibytes| mebibytes << 20);
            parent.clone_from(&self.arguments.tmpfs);
        }
        if case == Case::Loop && !rustix::process::geteuid().is_root() {
            eprintln!("SKIP {}: loop devices need root", case.name());
            return Ok(());
        }
        let contenders = self.contenders(case);
        let copies = match case {
            Case::Disk | Case::Tmpfs | Case::Loop => 2,
            Case::DiskDecrypt => 7,
            Case::Pipe => 0,
        };
        let scratch = Scratch::new(&parent, "sweep", copies * size + (64 << 20))?;
        let at = |name: &str| scratch.at(name);
        let passphrase = at("passphrase");
        rivals::write_passphrase(&passphrase)?;
        if case == Case::Pipe {
            return self.pipe_case(case, &contenders, &scratch, size);
        }

        let mut files = Files {
            source: at("source"),
            luks: at("luks"),
            ours: [at("ours-luks1"), at("ours-luks2")],
            ctr: at("ctr"),
            sink: at("sink"),
            devices: false,
        };
        let daemon = self.daemon(&contenders, &scratch)?;
        if case == Case::DiskDecrypt {
            self.prepare_decrypt(&files, &contenders, &passphrase, daemon.as_ref(), size)?;
        } else {
            source::write_file(&files.source, Content::Plain, size)?;
        }
        // What a checked result must be: known from the seed alone, and costly enough to work out only once, and if needed.
        let mut expected: HashMap<usize, String> = HashMap::new();
        let mut devices = Vec::new();
        if case == Case::Loop {
            // Written once, so that no run pays for the allocation of the file under the device.
            source::write_file(&files.sink, Content::Plain, size)?;
            for path in [&mut files.source, &mut files.sink] {
                devices.push(LoopDevice::over(path)?);
                path.clone_from(&devices[devices.len() - 1].0);
            }
            files.devices = true;
        }
        if case == Case::Tmpfs {
            // A virtual machine's memory is slow on first touch, four times slower here; the first contender must not be
            // the one who pays for it.
            source::write_file(&files.sink, Content::Plain, size)?;
        }
        self.rounds(case, &contenders, |sweep, contender| {
            if !files.devices && files.sink.exists() {
                fs::remove_file(&files.sink)?;
            }
            let cold = run::drop_caches();
            let mut row = sweep.run(case, contender, &files, &passphrase, daemon.as_ref(), size, cold)?;
            let decrypts = case == Case::DiskDecrypt && contender.side() == Side::Rival;
            if contender.side() == Side::Ours || decrypts {
                let (content, offset, unit) = match contender {
                    _ if case == Case::DiskDecrypt => (Content::Plain, 0, 0),
                    Contender::Ours(Format::Luks1) => {
                        (Content::Cipher(512), Format::Luks1.data_offset(), 512)
                    }
                    Contender::Ours(format) => {
                        (Content::Cipher(sweep.data_unit()), format.data_offset(), sweep.data_unit())
                    }
                    _ => return Err(io::Error::other("only ours writes ciphertext known from the seed")),
                };
                let found = source::digest_file(&files.sink, offset)?;
                let expected = match expected.entry(unit) {
                    Entry::Occupied(known) => known.into_mut(),
                    Entry::Vacant(unknown) => unknown.insert(source::digest_of(content, size)?),
                };
                check(contender, expected, &found)?;
                row.sha256 = Some(found);
            }
            Ok(row)
        })
    }

    /// The contenders of a case that were asked for and whose tools are here.
    fn contenders(&self, case: Case) -> Vec<Contender> {
        let depth = self.arguments.fio_depth;
        let cpus = u32::try_from(self.facts.cpus).unwrap_or(1);
        let disk = Contender::Fio(
            "fio copy",
            fio::Copy { engine: "io_uring", depth, threads_each: 1, preallocate: false },
        );
        let preallocated = Contender::Fio(
            "fio copy, preallocated",
            fio::Copy { engine: "io_uring", depth, threads_each: 1, preallocate: true },
        );
        // On a tmpfs nothing completes later, and fio's ring only adds work: psync was the faster engine there.
        // As many threads as workers first; then as many on each side, which leaves no core idle.
        let tmpfs = |name, threads_each| {
            Contender::Fio(name, fio::Copy { engine: "psync", depth: 1, threads_each, preallocate: false })
        };
        let qemu = |wide| Contender::Qemu { wide };
        let [ours, luks1, luks2] = [Format::Raw, Format::Luks1, Format::Luks2].map(Contender::Ours);
        let all = match case {
            Case::Disk | Case::DiskDecrypt => {
                vec![disk, preallocated, qemu(false), qemu(true), Contender::Openssl, ours, luks1, luks2]
            }
            Case::Tmpfs => vec![
                tmpfs("fio copy", (cpus / 2).max(1)),
                tmpfs("fio copy, wide", cpus),
                qemu(true),
                ours,
                luks1,
                luks2,
            ],
            Case::Pipe => vec![Contender::Loop, Contender::Openssl, ours],
            Case::Loop => vec![disk, ours],
        };
        let available = |contender: &Contender| {
            let wanted = match contender {
                Contender::Fio(..) | Contender::Loop => Wanted::Limit,
                Contender::Qemu { .. } | Contender::Openssl => Wanted::Rival,
                Contender::Ours(Format::Raw) => Wanted::Ours,
                Contender::Ours(_) => Wanted::Luks,
            };
            if !self.arguments.sides.contains(&wanted) {
                return false;
            }
            let (tool, argument) = match contender {
                Contender::Fio(..) => ("fio", "--version"),
                Contender::Qemu { .. } => ("qemu-img", "--version"),
                Contender::Openssl => ("openssl", "version"),
                Contender::Loop => return true,
                Contender::Ours(_) => return self.programs.is_some(),
            };
            let answers = run::answers(Path::new(tool), argument);
            if !answers {
                eprintln!("SKIP {} in {}: {tool} is not installed", contender.name(), case.name());
            }
            answers
        };
        all.into_iter().filter(available).collect()
    }

    fn daemon(&self, contenders: &[Contender], scratch: &Scratch) -> io::Result<Option<Daemon>> {
        let wanted = contenders.iter().any(|contender| contender.side() == Side::Ours);
        let programs = self.programs.as_ref().filter(|_| wanted);
        programs.map(|programs| Daemon::start(programs, scratch.path())).transpose()
    }

    fn data_unit(&self) -> usize {
        self.arguments.sector_size.into()
    }

    fn tuning(&self, format: Format) -> Tuning {
        let Arguments { sector_size, queue_depth, chunk_size, workers, .. } = self.arguments;
        Tuning { format, sector_bytes: sector_size, queue_depth, chunk_bytes: chunk_size, workers }
    }

    /// Make the encrypted sources: ours by the oracle, the rivals' by the rivals.
    fn prepare_decrypt(
        &self,
        files: &Files,
        contenders: &[Contender],
        passphrase: &Path,
        daemon: Option<&Daemon>,
        size: u64,
    ) -> io::Result<()> {
        let has = |found: fn(&Contender) -> bool| contenders.iter().any(found);
        let plain = &files.sink;
        let with_header =
            |contender: &Contender| matches!(contender, Contender::Ours(Format::Luks1 | Format::Luks2));
        if has(|contender| contender.side() == Side::Rival) || has(with_header) {
            source::write_file(plain, Content::Plain, size)?;
        }
        if has(|contender| matches!(contender, Contender::Qemu { .. })) {
            run::pipeline(&mut [rivals::qemu_create(passphrase, &files.luks, size)])?;
            run::pipeline(&mut [rivals::qemu(true, true, passphrase, plain, &files.luks)])?;
        }
        if has(|contender| matches!(contender, Contender::Openssl)) {
            run::pipeline(&mut rivals::openssl_files(true, passphrase, plain, &files.ctr))?;
        }
        if let (Some(daemon), true) = (daemon, has(with_header)) {
            for (format, path) in [Format::Luks1, Format::Luks2].into_iter().zip(&files.ours) {
                run::pipeline(&mut [daemon.command("encrypt", plain, path, &self.tuning(format))])?;
            }
        }
        source::write_file(&files.source, Content::Cipher(self.data_unit()), size).map(drop)
    }

    /// All rounds of a case, each starting with the next contender.
    fn rounds(
        &mut self,
        case: Case,
        contenders: &[Contender],
        mut once: impl FnMut(&Self, Contender) -> io::Result<Row>,
    ) -> io::Result<()> {
        for round in 0..self.arguments.rounds {
            for place in 0..contenders.len() {
                let contender = contenders[(place + round as usize) % contenders.len()];
                let row = once(self, contender)
                    .map_err(|error| io::Error::other(format!("{}: {error}", contender.name())))?;
                let row = Row { round, ..row };
                let gib = row.rate() / f64::from(1 << 30);
                eprintln!(
                    "{} round {round} {}: {:.2} s, {gib:.3} GiB/s",
                    case.name(),
                    row.contender,
                    row.wall_seconds
                );
                self.rows.push(row);
            }
        }
        // The table lists contenders by first appearance, and round 0 has them in their proper order already.
        Ok(())
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "one call site, and every one of them is a fact of the run"
    )]
    fn run(
        &self,
        case: Case,
        contender: Contender,
        files: &Files,
        passphrase: &Path,
        daemon: Option<&Daemon>,
        size: u64,
        cold: bool,
    ) -> io::Result<Row> {
        let encrypt = case != Case::DiskDecrypt;
        let row = |cost: Cost| row_of(case, contender, size, cold, cost);
        match contender {
            Contender::Fio(_, how) => fio::copy(how, &files.source, &files.sink, size).map(row),
            Contender::Loop => Err(io::Error::other("the loop copies pipes only")),
            Contender::Qemu { wide } => {
                let source = if encrypt { &files.source } else { &files.luks };
                if encrypt {
                    run::pipeline(&mut [rivals::qemu_create(passphrase, &files.sink, size)])?;
                }
                run::pipeline(&mut [rivals::qemu(encrypt, wide, passphrase, source, &files.sink)]).map(row)
            }
            Contender::Openssl => {
                let source = if encrypt { &files.source } else { &files.ctr };
                run::pipeline(&mut rivals::openssl_files(encrypt, passphrase, source, &files.sink)).map(row)
            }
            Contender::Ours(format) => {
                let daemon = daemon.expect("a case with ours has a daemon");
                let (verb, source) = match (encrypt, format) {
                    (true, _) => ("encrypt", &files.source),
                    (false, Format::Raw) => ("decrypt", &files.source),
                    (false, Format::Luks1) => ("decrypt", &files.ours[0]),
                    (false, Format::Luks2) => ("decrypt", &files.ours[1]),
                };
                let command = daemon.command(verb, source, &files.sink, &self.tuning(format));
                measure_ours(case, contender, daemon, &mut [command], size, cold)
            }
        }
    }

    fn pipe_case(
        &mut self,
        case: Case,
        contenders: &[Contender],
        scratch: &Scratch,
        size: u64,
    ) -> io::Result<()> {
        let passphrase = scratch.at("passphrase");
        let daemon = self.daemon(contenders, scratch)?;
        let tuning = self.tuning(Format::Raw);
        let own = std::env::current_exe()?.with_file_name("pipeloop");
        let end = |arguments: &[&str]| {
            let mut command = Command::new(&own);
            command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null());
            command
        };
        let stream = Path::new("-");
        let filter = |contender, verb: &str| match (contender, &daemon) {
            (Contender::Ours(_), Some(daemon)) => daemon.command(verb, stream, stream, &tuning),
            (Contender::Openssl, _) => rivals::openssl(verb == "encrypt", &passphrase),
            _ => end(&["copy"]),
        };

        // Hashing would slow the consumer and so flatter everybody: what the filters make is checked once, untimed.
        let checked = size.min(1 << 30);
        let digest = |commands: Vec<Command>| -> io::Result<String> {
            let path = scratch.at("digest");
            let mut last = end(&["digest"]);
            last.stdout(fs::File::create(&path)?);
            let mut commands: Vec<Command> =
                [end(&["produce", &checked.to_string()])].into_iter().chain(commands).chain([last]).collect();
            run::pipeline(&mut commands)?;
            let text = fs::read_to_string(path)?;
            Ok(text.split_whitespace().nth(1).unwrap_or_default().to_owned())
        };
        let plain = source::digest_of(Content::LoopedPlain, checked)?;
        let cipher = source::digest_of(Content::LoopedCipher(self.data_unit()), checked)?;
        for &contender in contenders {
            check(
                contender,
                &plain,
                &digest(vec![filter(contender, "encrypt"), filter(contender, "decrypt")])?,
            )?;
            if contender.side() == Side::Ours {
                check(contender, &cipher, &digest(vec![filter(contender, "encrypt")])?)?;
            }
        }

        self.rounds(case, contenders, |_, contender| {
            let mut commands =
                [end(&["produce", &size.to_string()]), filter(contender, "encrypt"), end(&["consume"])];
            match (contender, &daemon) {
                (Contender::Ours(_), Some(daemon)) => {
                    measure_ours(case, contender, daemon, &mut commands, size, false)
                }
                _ => Ok(row_of(case, contender, size, false, run::pipeline(&mut commands)?)),
            }
        })
    }
}

/// Run ours and split the cost between daemon and client. The ends of a pipe count as client.
fn measure_ours(
    case: Case,
    contender: Contender,
    daemon: &Daemon,
    commands: &mut [Command],
    size: u64,
    cold: bool,
) -> io::Result<Row> {
    let before = daemon.cpu()?;
    let cost = run::pipeline(commands)?;
    let cpu = daemon.cpu()?.since(before);
    let row = row_of(case, contender, size, cold, Cost { cpu, rss_peak: daemon.rss_peak(), ..cost });
    let syscalls = Some(daemon.syscalls_of_last_job()?);
    Ok(Row { client_cpu_seconds: Some(cost.cpu.total()), syscalls, ..row })
}

fn row_of(case: Case, contender: Contender, bytes: u64, cold: bool, cost: Cost) -> Row {
    Row {
        case: case.name(),
        contender: contender.name(),
        side: contender.side(),
        round: 0,
        bytes,
        wall_seconds: cost.wall,
        cpu_user_seconds: cost.cpu.user,
        cpu_system_seconds: cost.cpu.system,
        client_cpu_seconds: None,
        syscalls: None,
        rss_peak_bytes: cost.rss_peak,
        sha256: None,
        cold,
    }
}

/// A rate for wrong bytes is worth nothing.
fn check(contender: Contender, expected: &str, found: &str) -> io::Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(io::Error::other(format!(
        "{} wrote wrong bytes: sha256 {found} instead of {expected}",
        contender.name()
    )))
}
