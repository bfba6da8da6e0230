//! What a passphrase costs: our key derivations beside cryptsetup's, for the same parameters on the same machine.
//!
//! cryptsetup's time is that of `cryptsetup open --test-passphrase` on a keyslot made with the parameters, less that of the same
//! command on a keyslot of the same header whose derivation costs next to nothing: what is left is the derivation. Ours is
//! [`Kdf::derive`] alone, so both sides leave out the area and the digest. Every round runs both, one after the other; ratios are
//! within a round, and more than 1 means that ours is slower. cryptsetup makes no keyslot of more lanes than there are CPUs online:
//! where there are fewer, its side of a case has as many lanes as CPUs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use benches::facts::Facts;
use benches::rows::Spread;
use benches::run::answers;
use clap::Parser;
use engine::crypto::hash::Hash;
use engine::crypto::kdf::{Argon2Kind, Kdf};
use serde::Serialize;

/// Measure key derivations beside cryptsetup's.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Directory for a scratch header, which is removed
    #[arg(long, default_value = "/dev/shm")]
    dir: PathBuf,
    /// Interleaved rounds
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Only cases whose name contains this
    #[arg(long, default_value = "")]
    case: String,
    /// Write one JSON row per case and contender to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Costs of next to nothing, one round: to see that everything works; its times mean nothing
    #[arg(long)]
    small: bool,
}

const PASSPHRASE: &[u8] = b"passphrase of a measurement";
/// Bytes of the key of a keyslot's area: AES-256-XTS, as cryptsetup's default.
const KEY_BYTES: usize = 64;

#[derive(Serialize)]
struct Row<'a> {
    case: &'a str,
    contender: &'static str,
    seconds: Spread,
    /// Ours over cryptsetup's.
    ratio: Option<Spread>,
    rounds: usize,
    machine: &'a Facts,
}

fn cases(small: bool) -> Vec<Kdf> {
    let (mib, pbkdf2) = if small { (1, 1000) } else { (1024, 2_000_000) };
    let argon2 =
        |kind, memory_mib: u32, lanes| Kdf::Argon2 { kind, time: 4, memory_kib: memory_mib << 10, lanes };
    let mut cases: Vec<Kdf> =
        [Hash::Sha256, Hash::Sha512].map(|hash| Kdf::Pbkdf2 { hash, iterations: pbkdf2 }).into();
    let quarter = (mib / 4).max(1);
    cases.extend(
        [(quarter, 1), (quarter, 2), (quarter, 4), (mib, 4)]
            .map(|(mib, lanes)| argon2(Argon2Kind::Argon2id, mib, lanes)),
    );
    cases.push(argon2(Argon2Kind::Argon2i, quarter, 2));
    cases
}

fn name(kdf: &Kdf) -> String {
    match kdf {
        Kdf::Pbkdf2 { hash, iterations } => format!("pbkdf2-{}-{iterations}", hash.name()),
        Kdf::Argon2 { kind, time, memory_kib, lanes } => {
            let kind = if *kind == Argon2Kind::Argon2i { "argon2i" } else { "argon2id" };
            format!("{kind}-t{time}-m{memory_kib}-p{lanes}")
        }
    }
}

/// The options that make cryptsetup use exactly these parameters.
fn options(kdf: &Kdf) -> Vec<String> {
    let option = |name: &str, value: &dyn std::fmt::Display| format!("--{name}={value}");
    match kdf {
        Kdf::Pbkdf2 { hash, iterations } => vec![
            option("pbkdf", &"pbkdf2"),
            option("hash", &hash.name()),
            option("pbkdf-force-iterations", iterations),
        ],
        Kdf::Argon2 { kind, time, memory_kib, lanes } => vec![
            option("pbkdf", &if *kind == Argon2Kind::Argon2i { "argon2i" } else { "argon2id" }),
            option("pbkdf-force-iterations", time),
            option("pbkdf-memory", memory_kib),
            option("pbkdf-parallel", lanes),
        ],
    }
}

/// A header made by cryptsetup: keyslot 0 costs nothing, the others are the cases in order.
struct Rival {
    header: PathBuf,
    passphrase: PathBuf,
}

impl Drop for Rival {
    fn drop(&mut self) {
        for file in [&self.header, &self.passphrase] {
            // What cannot be removed is a scratch file of 16 MiB.
            let _ = fs::remove_file(file);
        }
    }
}

fn run(command: &mut Command) -> io::Result<f64> {
    let start = Instant::now();
    let output = command.stdin(Stdio::null()).output()?;
    let seconds = start.elapsed().as_secs_f64();
    if output.status.success() {
        return Ok(seconds);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!("{command:?}: {}: {said}", output.status)))
}

impl Rival {
    fn make(dir: &Path, cases: &[Kdf]) -> io::Result<Self> {
        let own = |what| dir.join(format!("unlock-bench-{}-{what}", std::process::id()));
        let rival = Self { header: own("header"), passphrase: own("passphrase") };
        fs::write(&rival.passphrase, PASSPHRASE)?;
        fs::File::create(&rival.header)?.set_len(32 << 20)?;
        let free = Kdf::Pbkdf2 { hash: Hash::Sha256, iterations: 1000 };
        run(rival.cryptsetup("luksFormat").args(["--type", "luks2"]).args(options(&free)))?;
        for (at, kdf) in cases.iter().enumerate() {
            let mut add = rival.cryptsetup("luksAddKey");
            run(add.arg(&rival.passphrase).arg(format!("--key-slot={}", at + 1)).args(options(kdf)))?;
        }
        Ok(rival)
    }

    fn cryptsetup(&self, verb: &str) -> Command {
        let mut command = Command::new("cryptsetup");
        command.args([verb, "--batch-mode", "--key-file"]).arg(&self.passphrase).arg(&self.header);
        command
    }

    fn open(&self, keyslot: usize) -> io::Result<f64> {
        run(self.cryptsetup("open").arg("--test-passphrase").arg(format!("--key-slot={keyslot}")))
    }
}

fn bench(arguments: &Arguments) -> io::Result<()> {
    let facts = Facts::collect();
    println!("{}", facts.line());
    let rounds = if arguments.small { 1 } else { arguments.rounds.max(1) };
    let mut cases = cases(arguments.small);
    cases.retain(|kdf| name(kdf).contains(&arguments.case));
    let rival = if answers(Path::new("cryptsetup"), "--version") {
        Some(Rival::make(&arguments.dir, &cases)?)
    } else {
        println!("no cryptsetup here: ours alone");
        None
    };
    let mut json = String::new();
    for (at, kdf) in cases.iter().enumerate() {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            let start = Instant::now();
            kdf.derive(PASSPHRASE, &[0x5A; 32], &mut [0; KEY_BYTES]).map_err(io::Error::other)?;
            ours.push(start.elapsed().as_secs_f64());
            if let Some(rival) = &rival {
                let free = rival.open(0)?;
                theirs.push((rival.open(at + 1)? - free).max(1e-6));
            }
        }
        let case = name(kdf);
        let ratios: Vec<f64> = ours.iter().zip(&theirs).map(|(ours, theirs)| ours / theirs).collect();
        for (contender, seconds, ratio) in [("cryptsetup", theirs, None), ("ours", ours, Spread::of(ratios))]
        {
            let Some(seconds) = Spread::of(seconds) else { continue };
            let Spread { median, min, max } = seconds;
            let beside = ratio.map_or(String::new(), |ratio| {
                format!("  {:.2} x cryptsetup ({:.2} .. {:.2})", ratio.median, ratio.min, ratio.max)
            });
            println!("{case:32} {contender:10} {median:8.3} s ({min:.3} .. {max:.3}){beside}");
            let row = Row { case: &case, contender, seconds, ratio, rounds, machine: &facts };
            json.push_str(&serde_json::to_string(&row)?);
            json.push('\n');
        }
    }
    match &arguments.json {
        Some(file) => fs::write(file, json),
        None => Ok(()),
    }
}

fn main() -> ExitCode {
    match bench(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("unlock: {error}");
            ExitCode::FAILURE
        }
    }
}
