//! What was typed: the argument definitions. Help, completions and man pages are generated from them.
//!
//! Holds no meaning beyond the shape of a single value; `request` turns it into what the wire can say.

use std::path::PathBuf;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};

use crate::amount::{parse_bytes, parse_rate};
use crate::export::args::Export;
use crate::help;
use crate::luks::args::{Luks, NewArgs, parse_keyslot};
use crate::reencrypt::args::Reencrypt;
use crate::secret::KeyText;

/// Encrypt, decrypt and verify volumes at the speed of the device.
#[derive(Debug, Parser)]
#[command(
    name = "cryptctl",
    version,
    about = "Encrypt, decrypt and verify volumes at the speed of the device",
    long_about = help::TOP,
    after_long_help = help::TOP_AFTER,
    arg_required_else_help = true,
    disable_help_subcommand = true
)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub verb: Verb,
}

/// Flags every verb takes.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// Socket of the daemon
    ///
    /// Default: the socket of this user's own daemon, see FILES in `cryptctl --help`.
    #[arg(long, global = true, value_name = "PATH", help_heading = "Global options")]
    pub socket: Option<PathBuf>,
    /// Print wire objects, one JSON object per line
    ///
    /// Events and answers go to standard output exactly as the daemon sent them (to standard error when DST is `-`). A
    /// failure is the last line, as an object with an `error` field, and is also told in words on standard error.
    #[arg(long, global = true, help_heading = "Global options")]
    pub json: bool,
    /// No progress, no summary; warnings and errors remain
    #[arg(short, long, global = true, help_heading = "Global options")]
    pub quiet: bool,
    /// Do not start a daemon when none answers
    #[arg(long, global = true, help_heading = "Global options")]
    pub no_start: bool,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Encrypt SRC to DST
    #[command(long_about = help::ENCRYPT, after_long_help = help::ENCRYPT_AFTER)]
    Encrypt(Encrypt),
    /// Decrypt SRC to DST
    #[command(long_about = help::DECRYPT, after_long_help = help::DECRYPT_AFTER)]
    Decrypt(Decrypt),
    /// Compare plaintext SRC with the decrypted DST
    #[command(long_about = help::VERIFY, after_long_help = help::VERIFY_AFTER)]
    Verify(Verify),
    /// Give a volume another volume key in place, or encrypt or decrypt it in place
    #[command(
        long_about = crate::reencrypt::help::REENCRYPT,
        after_long_help = crate::reencrypt::help::REENCRYPT_AFTER
    )]
    Reencrypt(Box<Reencrypt>),
    /// Serve the decrypted view of a volume by NBD
    #[command(
        long_about = crate::export::help::EXPORT,
        after_long_help = crate::export::help::EXPORT_AFTER,
        disable_help_subcommand = true
    )]
    Export(Box<Export>),
    /// Make, show and change LUKS headers: keyslots, tokens, backups
    #[command(
        subcommand,
        long_about = crate::luks::help::LUKS,
        after_long_help = crate::luks::help::LUKS_AFTER,
        disable_help_subcommand = true
    )]
    Luks(Luks),
    /// List, watch and steer jobs
    #[command(subcommand, long_about = help::JOB, after_long_help = help::JOB_AFTER, disable_help_subcommand = true)]
    Job(Job),
    /// Show where the time goes, stage by stage
    #[command(long_about = help::STATS, after_long_help = help::STATS_AFTER)]
    Stats {
        /// One job [default: all of yours together]
        #[arg(value_name = "ID")]
        job: Option<u64>,
    },
    /// Measure the kernels of this machine beside their limit
    #[command(long_about = help::BENCH, after_long_help = help::BENCH_AFTER)]
    Bench(Bench),
    /// Start, stop or describe the daemon
    #[command(subcommand, long_about = help::DAEMON, after_long_help = help::DAEMON_AFTER, disable_help_subcommand = true)]
    Daemon(Daemon),
    /// Print completions for a shell
    #[command(after_long_help = help::COMPLETIONS_AFTER)]
    Completions {
        /// The shell
        #[arg(value_name = "SHELL")]
        shell: clap_complete::Shell,
    },
    /// Write the man pages into DIR
    #[command(after_long_help = help::MAN_AFTER)]
    Man {
        /// An existing directory
        #[arg(value_name = "DIR")]
        dir: PathBuf,
    },
}

#[derive(Debug, Args)]
pub struct Encrypt {
    #[command(flatten)]
    pub ends: Ends,
    #[command(flatten)]
    pub volume: NewVolumeArgs,
    #[command(flatten)]
    pub pad: Pad,
    #[command(flatten)]
    pub sink: SinkArgs,
    #[command(flatten)]
    pub update: Update,
    #[command(flatten)]
    pub nbd: Nbd,
    #[command(flatten)]
    pub moving: Moving,
}

#[derive(Debug, Args)]
pub struct Decrypt {
    #[command(flatten)]
    pub ends: Ends,
    #[command(flatten)]
    pub volume: VolumeArgs,
    #[command(flatten)]
    pub holes: Holes,
    /// Write zeros instead of leaving holes
    ///
    /// By default runs of zero plaintext become holes in a new file, and in a device that supports it.
    #[arg(long, help_heading = "Sink")]
    pub no_sparse: bool,
    #[command(flatten)]
    pub sink: SinkArgs,
    #[command(flatten)]
    pub update: Update,
    #[command(flatten)]
    pub nbd: Nbd,
    #[command(flatten)]
    pub moving: Moving,
}

#[derive(Debug, Args)]
pub struct Verify {
    #[command(flatten)]
    pub ends: Compared,
    #[command(flatten)]
    pub volume: VolumeArgs,
    #[command(flatten)]
    pub pad: Pad,
    #[command(flatten)]
    pub holes: Holes,
    #[command(flatten)]
    pub nbd: Nbd,
    #[command(flatten)]
    pub moving: Moving,
}

/// The two ends, as typed.
#[derive(Debug, Args)]
pub struct Ends {
    /// Where sectors come from: a file, a block device, an NBD URI or `-`
    #[arg(value_name = "SRC")]
    pub source: PathBuf,
    /// Where they go: a file, a block device, an NBD URI or `-`
    #[arg(value_name = "DST")]
    pub sink: PathBuf,
}

/// The two ends of `verify`, as typed.
#[derive(Debug, Args)]
pub struct Compared {
    /// The plaintext: a file, a block device, an NBD URI or `-`
    #[arg(value_name = "SRC")]
    pub source: PathBuf,
    /// The encrypted volume: a file, a block device, an NBD URI or `-`
    #[arg(value_name = "DST")]
    pub sink: PathBuf,
}

/// What is said of volumes that NBD servers have.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "NBD servers")]
pub struct Nbd {
    /// Only what this bitmap of SRC marks, such as qemu:dirty-bitmap:NAME
    ///
    /// SRC is an NBD URI whose server offers that context of block status: QEMU offers its dirty bitmaps so
    /// (`qemu-nbd --bitmap`). All else is neither read nor written: a new DST file has holes there, and is no whole copy
    /// by itself; with --update DST is an earlier copy, and becomes a whole one.
    #[arg(long, value_name = "CONTEXT", value_parser = parse_context)]
    pub bitmap: Option<String>,
    /// Seconds to try to connect again when a connection to a server breaks; 0: not at all [default: 10]
    ///
    /// Requests that were not answered are sent again. What a server had acknowledged and was not yet told to make durable may be
    /// lost: a job that wrote such bytes fails, and with --checkpoint goes on from the last one. It takes a daemon of your own, or
    /// root's for root: others connect nowhere for you.
    #[arg(long, value_name = "SECONDS", value_parser = parse_reconnect)]
    pub reconnect: Option<u32>,
}

/// An earlier copy is brought up to date.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Sink")]
pub struct Update {
    /// With --bitmap: DST is an earlier copy of SRC, of the same size; overwrite in place what was marked since
    ///
    /// A LUKS volume is opened, not made. When it fails midway DST is a mixture until the same command has succeeded: keep
    /// the bitmap until then.
    #[arg(long, requires = "bitmap", conflicts_with_all = ["force", "keep_partial", "resumable", "checkpoint", "resume", "checkpoint_every"])]
    pub update: bool,
}

/// The encrypted side of `encrypt`.
#[derive(Debug, Args)]
pub struct NewVolumeArgs {
    /// Format of DST
    ///
    /// `raw` is dm-crypt plain: AES-XTS over the whole volume, no header, so every parameter must be remembered by you.
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = FormatName::Luks2, help_heading = "Volume")]
    pub format: FormatName,
    /// Where the key is: file:PATH, fd:N, prompt or keyring:NAME
    ///
    /// For LUKS it names the passphrase of the first keyslot: every byte of it, a newline at the end too, as with
    /// `cryptsetup --key-file`; at most 8 MiB. For `raw` it names the volume key itself: exactly `--key-size` bits, as raw
    /// bytes or as hexadecimal digits (a newline may follow them). `file:PATH` warns when others may read the file. `fd:N`
    /// reads an inherited descriptor to its end. `prompt` asks on the terminal, twice for a new key; its line ends
    /// before the newline. `keyring:NAME` is a `user` key in the session or user keyring. The key travels to the daemon
    /// through a pipe: it is never in an argument, the environment or JSON. A key longer than
    /// /proc/sys/fs/pipe-max-size (usually 1 MiB) goes through memory that the kernel may swap out, unless you are root.
    #[arg(long, value_name = "REF", help_heading = "Volume")]
    pub key: KeyText,
    #[command(flatten)]
    pub new: NewArgs,
    #[command(flatten)]
    pub raw: RawArgs,
}

/// The encrypted side of `decrypt` and `verify`.
#[derive(Debug, Args)]
#[command(next_help_heading = "Volume")]
pub struct VolumeArgs {
    /// Format of the encrypted side [default: LUKS, of the version its header tells]
    ///
    /// `raw` is dm-crypt plain: no header, so the parameters of the raw format must be those it was encrypted with.
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = FoundFormat::Luks, hide_default_value = true)]
    pub format: FoundFormat,
    /// Where the key is: file:PATH, fd:N, prompt or keyring:NAME
    ///
    /// For LUKS it names a passphrase: every byte of it, a newline at the end too, as with `cryptsetup --key-file`; at
    /// most 8 MiB. For `raw` it names the volume key itself: exactly `--key-size` bits, as raw bytes or as hexadecimal
    /// digits (a newline may follow them). `file:PATH` warns when others may read the file. `fd:N` reads an inherited
    /// descriptor to its end. `prompt` asks on the terminal; its line ends before the newline. `keyring:NAME` is a `user`
    /// key in the session or user keyring. The key travels to the daemon through a pipe: it is never in an argument,
    /// the environment or JSON. A key longer than
    /// /proc/sys/fs/pipe-max-size (usually 1 MiB) goes through memory that the kernel may swap out, unless you are root.
    #[arg(long, value_name = "REF", required_unless_present = "volume_key", conflicts_with = "volume_key")]
    pub key: Option<KeyText>,
    /// Where the volume key of a LUKS volume is: no passphrase is needed then
    ///
    /// Raw bytes or hexadecimal digits. It is checked against the header's digest.
    #[arg(long, value_name = "REF", conflicts_with = "key_slot")]
    pub volume_key: Option<KeyText>,
    /// The LUKS header is in this file or block device, not in front of the data
    #[arg(long, value_name = "FILE")]
    pub header: Option<PathBuf>,
    /// Try this keyslot only
    #[arg(long, value_name = "N", value_parser = parse_keyslot)]
    pub key_slot: Option<u32>,
    /// Bits of the volume key, both XTS halves: 512 is AES-256 (raw) [default: 512]
    #[arg(long, value_name = "BITS", value_parser = ["256", "512"], help_heading = "Raw format")]
    pub key_size: Option<String>,
    /// Bytes of a data unit (raw) [default: 512]
    #[arg(long, value_name = "BYTES", value_parser = ["512", "1024", "2048", "4096"], help_heading = "Raw format")]
    pub sector_size: Option<String>,
    #[command(flatten)]
    pub raw: RawArgs,
}

/// What a raw volume's user must remember, beside the key.
#[derive(Debug, Args)]
#[command(next_help_heading = "Raw format")]
pub struct RawArgs {
    /// How the tweak is made of the sector number [default: plain64]
    #[arg(long, value_enum, value_name = "IV")]
    pub iv: Option<Iv>,
    /// Count tweaks in data units instead of 512-byte sectors
    #[arg(long)]
    pub iv_large_sectors: bool,
    /// Sector number of the volume's first sector, in 512-byte sectors [default: 0]
    #[arg(long, value_name = "SECTORS")]
    pub iv_offset: Option<u64>,
}

#[derive(Debug, Args)]
pub struct Pad {
    /// Fill up an incomplete last data unit with zeros
    ///
    /// Without it a plaintext that is not a whole number of data units is refused. The padding is part of what is
    /// encrypted, and decrypting gives it back: remember the true length.
    #[arg(long, help_heading = "Volume")]
    pub pad: bool,
}

#[derive(Debug, Args)]
pub struct Holes {
    /// Keep holes of the encrypted file as holes
    ///
    /// This is your promise that holes of the encrypted file were never written. Without it a hole is ciphertext
    /// like any other zeros, and decrypts to noise: no cipher can tell the two apart.
    #[arg(long, help_heading = "Volume")]
    pub keep_holes: bool,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Sink")]
pub struct SinkArgs {
    /// Overwrite: an existing file, a device with a known signature, a left-over .partial
    #[arg(long)]
    pub force: bool,
    /// Leave DST.partial behind when the job fails or is cancelled
    #[arg(long)]
    pub keep_partial: bool,
    /// Keep how far the copy has come, for --resume to go on after a crash
    ///
    /// In DST.partial.checkpoint, every few seconds. With it a copy that fails or is cancelled leaves DST.partial behind
    /// to be gone on with; one that is done removes both names. The checkpoint of a new LUKS volume holds its header, so who
    /// can read it can try passphrases: it is for its owner. Not for pipes, which cannot be read or written again.
    #[arg(long)]
    pub resumable: bool,
    /// Keep it in this file: for a block device, which has no place beside it
    #[arg(long, value_name = "FILE")]
    pub checkpoint: Option<PathBuf>,
    /// Go on with a copy that was interrupted, from its last checkpoint
    ///
    /// The rest of the command must be as it was. A changed source or sink, another key or other parameters are found
    /// out before anything is written: a source file by its size and times, a device by its size and by samples, what was
    /// written by samples and by its last 4 MiB.
    #[arg(long)]
    pub resume: bool,
    /// Seconds between checkpoints, such as 0.5 [default: 3]
    #[arg(long, value_name = "SECONDS", value_parser = parse_millis)]
    pub checkpoint_every: Option<u32>,
}

/// Seconds as typed, in milliseconds.
fn parse_millis(text: &str) -> Result<u32, String> {
    let millis = std::time::Duration::try_from_secs_f64(text.parse().unwrap_or(f64::NAN))
        .ok()
        .and_then(|time| u32::try_from(time.as_millis()).ok());
    let bounded = millis.filter(|millis| (1..=3_600_000).contains(millis));
    bounded.ok_or_else(|| "not a number of seconds between 0.001 and 3600".to_owned())
}

/// Seconds as typed, 0 too, in milliseconds.
pub fn parse_reconnect(text: &str) -> Result<u32, String> {
    if text == "0" { Ok(0) } else { parse_millis(text) }
}

/// The name of a context of block status, which has a colon in it (NBD protocol, "Metadata querying").
fn parse_context(text: &str) -> Result<String, String> {
    match text.split_once(':') {
        Some(("base", _)) => Err("what base: contexts say is where data is, not what was changed".to_owned()),
        Some((space, leaf)) if !space.is_empty() && !leaf.is_empty() && text.len() <= 4096 => {
            Ok(text.to_owned())
        }
        _ => Err("not the name of a context, such as qemu:dirty-bitmap:NAME".to_owned()),
    }
}

impl SinkArgs {
    /// The copy keeps a checkpoint.
    pub fn is_resumable(&self) -> bool {
        self.resumable || self.resume || self.checkpoint.is_some() || self.checkpoint_every.is_some()
    }
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Speed")]
pub struct Moving {
    /// Most bytes of source per second, such as 200M or 1GiB
    #[arg(long, value_name = "RATE", value_parser = parse_rate)]
    pub throttle: Option<u64>,
    /// Bytes a worker moves at a time [default: chosen from the devices]
    #[arg(long, value_name = "SIZE", value_parser = parse_chunk)]
    pub chunk_size: Option<u32>,
    /// Chunks in flight per worker [default: chosen from the devices]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub queue_depth: Option<u32>,
    /// Workers that take part [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub workers: Option<u32>,
    /// Go through the page cache (no O_DIRECT)
    #[arg(long)]
    pub buffered: bool,
    /// Print the job's number and leave; the job goes on
    #[arg(long)]
    pub detach: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FormatName {
    /// LUKS version 2
    Luks2,
    /// LUKS version 1
    Luks1,
    /// dm-crypt plain, no header
    Raw,
}

/// Of a volume there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FoundFormat {
    /// LUKS, of the version its header tells
    Luks,
    /// dm-crypt plain, no header
    Raw,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Iv {
    /// 64-bit counter
    Plain64,
    /// its low 32 bits
    Plain,
}

#[derive(Debug, Subcommand)]
pub enum Job {
    /// List your jobs
    List,
    /// Show one job
    Show(JobRef),
    /// Watch a job to its end; its exit status becomes ours
    Watch(JobRef),
    /// Stop a job until it is resumed
    Pause(JobRef),
    /// Go on with a paused job (a copy that was interrupted: encrypt --resume)
    Resume(JobRef),
    /// End a job and undo its unfinished sink, unless it is resumable; a re-encryption stops where it can be gone on with
    Cancel(JobRef),
    /// Limit a job's rate
    Throttle {
        #[command(flatten)]
        job: JobRef,
        /// Bytes of source per second, such as 200M; `none` lifts the limit
        #[arg(value_name = "RATE", value_parser = Limit::parse)]
        rate: Limit,
    },
}

#[derive(Debug, Clone, Copy, Args)]
pub struct JobRef {
    /// The job's number, see `cryptctl job list`
    #[arg(value_name = "ID")]
    pub job: u64,
}

/// A rate, or freedom from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit(pub Option<u64>);

impl Limit {
    fn parse(text: &str) -> Result<Self, String> {
        if text == "none" { Ok(Self(None)) } else { parse_rate(text).map(|rate| Self(Some(rate))) }
    }
}

#[derive(Debug, Args)]
pub struct Bench {
    /// Only this kernel, also in the pipeline [default: all this CPU has, in the pipeline the daemon's]
    #[arg(long, value_name = "NAME", value_parser = proto::KERNELS)]
    pub kernel: Option<String>,
    /// Bytes of buffer per kernel measurement [default: 1M]
    #[arg(long, value_name = "SIZE", value_parser = parse_chunk)]
    pub buffer: Option<u32>,
    /// Milliseconds per measurement, at least; a transfer is not cut short [default: 200]
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u32).range(1..))]
    pub millis: Option<u32>,
    /// Interleaved rounds of which the median is shown [default: 5]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: Option<u32>,
}

#[derive(Debug, Subcommand)]
pub enum Daemon {
    /// Start a daemon for this user, unless one answers
    Start {
        /// Leave after this many idle seconds; 0: never
        #[arg(long, value_name = "SECONDS", default_value_t = crate::launch::IDLE_EXIT_SECONDS)]
        idle_exit: u64,
    },
    /// Stop the daemon when its jobs are done and its exports are drained
    Stop {
        /// Cancel running jobs and drop clients of exports instead of waiting for them
        #[arg(long, action = ArgAction::SetTrue)]
        now: bool,
    },
    /// Describe the daemon: kernel, workers, memory
    Status,
}

fn parse_chunk(text: &str) -> Result<u32, String> {
    match u32::try_from(parse_bytes(text)?) {
        Ok(0) => Err("must not be zero".to_owned()),
        Ok(bytes) => Ok(bytes),
        Err(_) => Err("must be below 4 GiB".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definitions_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn global_flags_may_follow_the_verb() {
        let cli =
            Cli::try_parse_from(["cryptctl", "job", "list", "--json", "--socket", "/s"]).expect("parses");
        assert!(cli.global.json);
        assert_eq!(cli.global.socket, Some(PathBuf::from("/s")));
    }

    #[test]
    fn a_throttle_can_be_lifted() {
        assert_eq!(Limit::parse("none"), Ok(Limit(None)));
        assert_eq!(Limit::parse("1M"), Ok(Limit(Some(1 << 20))));
        assert!(Limit::parse("0").is_err());
    }

    #[test]
    fn a_bitmap_has_a_name_and_a_space_for_it() {
        assert!(parse_context("qemu:dirty-bitmap:b0").is_ok());
        for bad in ["b0", ":b0", "qemu:", "base:allocation", ""] {
            assert!(parse_context(bad).is_err(), "{bad}");
        }
        assert_eq!((parse_reconnect("0"), parse_reconnect("2.5")), (Ok(0), Ok(2500)));
        assert!(parse_reconnect("-1").is_err() && parse_reconnect("x").is_err());
        let words = ["cryptctl", "encrypt", "a", "b", "--key", "prompt", "--update"];
        assert!(Cli::try_parse_from(words).is_err(), "without a bitmap all is copied");
    }

    #[test]
    fn a_chunk_must_fit_the_wire() {
        assert_eq!(parse_chunk("1M"), Ok(1 << 20));
        assert!(parse_chunk("4G").is_err());
        assert!(parse_chunk("0").is_err());
    }
}
