//! What was typed after `reencrypt`. Names are cryptsetup's where it has them.
//!
//! Holds no meaning beyond the shape of a single value.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::amount::parse_bytes;
use crate::args::{FoundFormat, Iv, Moving, RawArgs, parse_reconnect};
use crate::luks::args::{KeyslotKdf, parse_label, parse_uuid};
use crate::secret::KeyText;

#[derive(Debug, Args)]
pub struct Reencrypt {
    /// The volume to rewrite: a file, a block device or an NBD URI, not in use
    #[arg(value_name = "VOLUME")]
    pub volume: PathBuf,
    /// A passphrase that opens the volume, and shall open it afterwards: file:PATH, fd:N, prompt or keyring:NAME
    ///
    /// Give it once for each keyslot that is to be kept: a keyslot can be bound to the new volume key only by its passphrase.
    /// With --new-key the first one is replaced instead. With --format raw: the volume key as it is. At most one
    /// can be a prompt.
    #[arg(long = "key", value_name = "REF")]
    pub keys: Vec<KeyText>,
    /// A new passphrase, in place of the first --key
    ///
    /// With --encrypt: the first passphrase. With --format raw: the new volume key itself. A prompt asks twice.
    #[arg(long, value_name = "REF")]
    pub new_key: Option<KeyText>,
    /// Go on with what was begun, by this program or by cryptsetup; begin nothing
    ///
    /// With the passphrases it was begun with. Where all data is new and only the old key's traces are left, none is needed.
    #[arg(long)]
    pub resume_only: bool,
    /// Say what would be done, and how long it would take by a measured sample; write nothing
    ///
    /// Only reads, so the volume may be in use.
    #[arg(long, conflicts_with = "detach")]
    pub dry_run: bool,
    /// Do not ask before it begins
    ///
    /// Without a terminal on standard input nothing is asked either.
    #[arg(short, long, visible_alias = "batch")]
    pub yes: bool,
    #[command(flatten)]
    pub volume_args: VolumeArgs,
    #[command(flatten)]
    pub becoming: Becoming,
    #[command(flatten)]
    pub safety: Safety,
    #[command(flatten)]
    pub kdf: KeyslotKdf,
    #[command(flatten)]
    pub raw: RawArgs,
    #[command(flatten)]
    pub new_raw: NewRawArgs,
    /// Seconds to try to connect again when a connection to a server breaks; 0: not at all [default: 10]
    ///
    /// Requests that were not answered are sent again. What a server had acknowledged and was not yet told to make durable may be
    /// lost: the job then stops, and with --resume-only makes the step whole that it was in. It takes a daemon that may do what
    /// you may: your own, or root's for root. For others the job ends with the connection, and is gone on with by --resume-only.
    #[arg(long, value_name = "SECONDS", value_parser = parse_reconnect, help_heading = "NBD servers")]
    pub reconnect: Option<u32>,
    #[command(flatten)]
    pub moving: Moving,
}

/// What kind of volume.
#[derive(Debug, Args)]
#[command(next_help_heading = "Volume")]
pub struct VolumeArgs {
    /// Format of the volume [default: LUKS, of the version its header tells]
    ///
    /// LUKS1 becomes LUKS2 first, where its header leaves room for that. `raw` is dm-crypt plain: no header, so the parameters
    /// must be those it was encrypted with, and --journal keeps what a header would.
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = FoundFormat::Luks, hide_default_value = true)]
    pub format: FoundFormat,
    /// The LUKS header is in this file or block device, not in front of the data
    ///
    /// With --encrypt: where the new header goes. A new file appears when it is whole, readable by you alone.
    #[arg(long, value_name = "FILE")]
    pub header: Option<PathBuf>,
    /// Where a raw volume's progress is kept: a new file, or that of what was begun
    ///
    /// Created readable by you alone. On another disk than the volume it is faster; on a filesystem in memory it does not
    /// outlast a power cut. Without it an interrupted re-encryption cannot be gone on with, and nothing can be read. When all
    /// is done it is not needed any more.
    #[arg(long, value_name = "FILE")]
    pub journal: Option<PathBuf>,
    /// Bits of the new volume key: 512 is AES-256 [default: as it is; raw: bits of the old key, 512]
    #[arg(long, value_name = "BITS", value_parser = ["256", "512"])]
    pub key_size: Option<String>,
    /// Bytes of a new data unit [default: as it is; raw: of the old, 512]
    ///
    /// A larger one is refused without --sector-size-may-break-filesystem: a filesystem with smaller blocks could not be mounted
    /// any more.
    #[arg(long, value_name = "BYTES", value_parser = ["512", "1024", "2048", "4096"])]
    pub sector_size: Option<String>,
    /// New cipher in dm-crypt's notation [default: as it is, or aes-xts-plain64]
    #[arg(long, value_name = "CIPHER", value_parser = ["aes-xts-plain64", "aes-xts-plain"])]
    pub cipher: Option<String>,
    /// Keyslots whose passphrase was not given go with the old volume key
    ///
    /// Without it they are named, and nothing is done.
    #[arg(long)]
    pub drop_slots: bool,
    /// Take the larger --sector-size, or --new-sector-size of a raw volume, although it may make a filesystem unmountable
    #[arg(long, visible_alias = "force-sector-size")]
    pub sector_size_may_break_filesystem: bool,
}

/// From and to plain data.
#[derive(Debug, Args)]
#[command(next_help_heading = "Encrypt and decrypt in place")]
pub struct Becoming {
    /// VOLUME holds plain data: make it a LUKS2 volume in place
    ///
    /// The header needs a place: --header, or --reduce-device-size.
    #[arg(long, conflicts_with = "decrypt")]
    pub encrypt: bool,
    /// Make VOLUME, whose header is detached (--header), plain data in place
    #[arg(long)]
    pub decrypt: bool,
    /// --encrypt: so many bytes at the end of VOLUME are free; half of them become the header
    ///
    /// Shrink the filesystem first. 32M gives a header of cryptsetup's usual 16 MiB. Data moves back by the header's size, step by
    /// step, into the space that is free.
    #[arg(long, value_name = "SIZE", value_parser = parse_reduction, requires = "encrypt", conflicts_with = "header")]
    pub reduce_device_size: Option<u64>,
    /// --reduce-device-size: what a filesystem that was not shrunk holds in those bytes is given up
    ///
    /// Without it ext2 to ext4, xfs and btrfs that reach into them are refused. Others are not known.
    #[arg(long, requires = "reduce_device_size", conflicts_with = "header")]
    pub filesystem_may_lose_its_end: bool,
    /// --encrypt: a name to find the volume by, at most 47 bytes
    #[arg(long, value_name = "TEXT", value_parser = parse_label, requires = "encrypt")]
    pub label: Option<String>,
    /// --encrypt: the volume's UUID [default: a random one]
    #[arg(long, value_name = "UUID", value_parser = parse_uuid, requires = "encrypt")]
    pub uuid: Option<String>,
}

/// What a crash may cost.
#[derive(Debug, Args)]
#[command(next_help_heading = "Safety")]
pub struct Safety {
    /// How a step is protected [default: checksum, or journal where the device may tear a data unit; with --reduce-device-size datashift]
    ///
    /// See RESILIENCE below. What was begun goes on as it was begun.
    #[arg(long, value_enum, value_name = "HOW", hide_possible_values = true)]
    pub resilience: Option<Resilience>,
    /// --resilience none: a crash or a power cut destroys data, and that is accepted
    #[arg(long)]
    pub crash_may_destroy_data: bool,
    /// Rewrite the data of a raw volume, or under a detached header, although it holds something known
    ///
    /// True ciphertext has no signature, but for a rare accident: a filesystem or a LUKS header that is found there says that VOLUME is
    /// another one, and rewriting destroys it.
    #[arg(long)]
    pub found_data_may_be_destroyed: bool,
    /// Most bytes of one step, such as 64M [default: chosen from the means of protection]
    ///
    /// Larger steps need fewer header writes; a crash costs at most one step to be looked through again.
    #[arg(long, value_name = "SIZE", value_parser = parse_step)]
    pub hotzone_size: Option<u64>,
    /// Percent of the time to take while clients use the volume, if it is exported [default: 50]
    ///
    /// When they have asked for nothing for a second it takes all of it.
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(1..=100))]
    pub background_share: Option<u32>,
    /// Read everything once more in the end, and compare it with what was read under the old key
    ///
    /// By a keyed digest of the plaintext. Takes about as long as reading the volume.
    #[arg(long)]
    pub verify: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Resilience {
    /// hashes of the old blocks are kept
    Checksum,
    /// the old bytes are kept
    Journal,
    /// nothing is kept
    None,
    /// data moves into free space
    Datashift,
}

/// What a raw volume shall be.
#[derive(Debug, Args)]
#[command(next_help_heading = "Raw format, as it shall be")]
pub struct NewRawArgs {
    /// Bits of the new volume key [default: as before]
    #[arg(long, value_name = "BITS", value_parser = ["256", "512"])]
    pub new_key_size: Option<String>,
    /// Bytes of a new data unit [default: as before]
    #[arg(long, value_name = "BYTES", value_parser = ["512", "1024", "2048", "4096"])]
    pub new_sector_size: Option<String>,
    /// How the new tweak is made of the sector number [default: as before]
    #[arg(long, value_enum, value_name = "IV")]
    pub new_iv: Option<Iv>,
    /// Count new tweaks in data units instead of 512-byte sectors [default: as before]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub new_iv_large_sectors: Option<bool>,
    /// New sector number of the volume's first sector, in 512-byte sectors [default: as before]
    #[arg(long, value_name = "SECTORS")]
    pub new_iv_offset: Option<u64>,
}

fn parse_step(text: &str) -> Result<u64, String> {
    match parse_bytes(text)? {
        0 => Err("must not be zero".to_owned()),
        bytes if !bytes.is_multiple_of(512) => Err("must be a multiple of 512 bytes".to_owned()),
        bytes => Ok(bytes),
    }
}

/// Half of it becomes the header, whose size is a multiple of a sector.
fn parse_reduction(text: &str) -> Result<u64, String> {
    match parse_bytes(text)? {
        0 => Err("must not be zero".to_owned()),
        bytes if !bytes.is_multiple_of(8192) => Err("must be a multiple of 8192 bytes".to_owned()),
        bytes => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_whole_sectors() {
        assert_eq!((parse_step("64M"), parse_step("512")), (Ok(64 << 20), Ok(512)));
        assert_eq!(parse_reduction("32M"), Ok(32 << 20));
        for bad in ["0", "513", "x", "-1"] {
            assert!(parse_step(bad).is_err() && parse_reduction(bad).is_err(), "{bad}");
        }
        assert!(parse_reduction("4096").is_err(), "no half of it is a header");
    }
}
