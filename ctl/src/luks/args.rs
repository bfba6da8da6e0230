//! What was typed about LUKS: the options of a new header, of a key derivation, and the `luks` verbs.
//!
//! Names are cryptsetup's where it has them. Holds no meaning beyond the shape of a single value.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use crate::amount::parse_bytes;
use crate::luks::help;
use crate::secret::KeyText;

/// `cryptctl luks …`
#[derive(Debug, Subcommand)]
pub enum Luks {
    /// Make a new LUKS header with one keyslot; the data is not touched
    #[command(long_about = help::FORMAT, after_long_help = help::FORMAT_AFTER)]
    Format(Format),
    /// Show the header
    #[command(long_about = help::DUMP, after_long_help = help::DUMP_AFTER)]
    Dump(At),
    /// Tell whether a key opens the volume, and which keyslot does
    #[command(long_about = help::OPEN_TEST, after_long_help = help::OPEN_TEST_AFTER)]
    OpenTest(OpenTest),
    /// Add a passphrase
    #[command(long_about = help::ADD_KEY, after_long_help = help::ADD_KEY_AFTER)]
    AddKey(AddKey),
    /// Destroy a keyslot
    #[command(long_about = help::REMOVE_KEY, after_long_help = help::REMOVE_KEY_AFTER)]
    RemoveKey(RemoveKey),
    /// Replace a passphrase
    #[command(long_about = help::CHANGE_KEY, after_long_help = help::CHANGE_KEY_AFTER)]
    ChangeKey(ChangeKey),
    /// Keep a passphrase, but derive its key in another way
    #[command(long_about = help::CONVERT_KDF, after_long_help = help::CONVERT_KDF_AFTER)]
    ConvertKdf(ConvertKdf),
    /// Copy header and keyslots to FILE
    #[command(long_about = help::HEADER_BACKUP, after_long_help = help::HEADER_BACKUP_AFTER)]
    HeaderBackup(HeaderBackup),
    /// Put header and keyslots back from FILE
    #[command(long_about = help::HEADER_RESTORE, after_long_help = help::HEADER_RESTORE_AFTER)]
    HeaderRestore(HeaderRestore),
    /// Destroy every keyslot
    #[command(long_about = help::ERASE, after_long_help = help::ERASE_AFTER)]
    Erase(Erase),
    /// Add, remove and list tokens of a LUKS2 header
    #[command(subcommand, long_about = help::TOKEN, after_long_help = help::TOKEN_AFTER, disable_help_subcommand = true)]
    Token(Token),
    /// Repair a damaged header as far as that is possible
    #[command(long_about = help::REPAIR, after_long_help = help::REPAIR_AFTER)]
    Repair(Repair),
    /// Explain a volume: its health, its weaknesses, and who can open it
    #[command(long_about = help::DOCTOR, after_long_help = help::DOCTOR_AFTER)]
    Doctor(Doctor),
}

/// The volume, and where its header is.
#[derive(Debug, Args)]
pub struct At {
    /// A file, block device or NBD URI with a LUKS header
    #[arg(value_name = "VOLUME")]
    pub volume: PathBuf,
    /// The header is in this file, block device or NBD URI, not in VOLUME
    #[arg(long, value_name = "FILE")]
    pub header: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct Format {
    /// An existing file or block device, or an NBD URI
    #[arg(value_name = "VOLUME")]
    pub volume: PathBuf,
    /// Which version of LUKS
    #[arg(long, visible_alias = "type", value_enum, value_name = "FORMAT", default_value_t = Version::Luks2)]
    pub format: Version,
    /// Where the first passphrase is: file:PATH, fd:N, prompt or keyring:NAME
    #[arg(long, value_name = "REF")]
    pub key: KeyText,
    #[command(flatten)]
    pub new: NewArgs,
    /// Format what holds data already: anything but zeros, a known signature, an existing header file
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Version {
    /// version 1: one header, PBKDF2, data units of 512 bytes
    Luks1,
    /// version 2: two header copies, Argon2, tokens
    Luks2,
}

/// The parameters of a new header. What is absent is chosen by the daemon.
#[derive(Debug, Args)]
#[command(next_help_heading = "New header")]
pub struct NewArgs {
    /// Write the header to this file or block device instead of in front of the data
    ///
    /// A new file is written as FILE.partial and takes its name when it is whole, as DST does. It is readable by you
    /// alone, unlike a whole volume, whose mode follows the umask: choose that so that nobody can guess at your passphrase
    /// who should not.
    #[arg(long, value_name = "FILE")]
    pub header: Option<PathBuf>,
    /// Use this volume key instead of a random one: file:PATH, fd:N, prompt or keyring:NAME
    ///
    /// Exactly `--key-size` bits, as raw bytes or as hexadecimal digits. Two volumes with one volume key tell who can
    /// see both which of their sectors are equal.
    #[arg(long, value_name = "REF")]
    pub volume_key: Option<KeyText>,
    /// Cipher in dm-crypt's notation [default: aes-xts-plain64]
    #[arg(long, value_name = "CIPHER", value_parser = ["aes-xts-plain64", "aes-xts-plain"])]
    pub cipher: Option<String>,
    /// Bits of the volume key, both XTS halves: 512 is AES-256 [default: 512]
    #[arg(long, value_name = "BITS", value_parser = ["256", "512"])]
    pub key_size: Option<String>,
    /// Bytes of a data unit [default: 4096; luks1 has 512 always, raw 512 unless told otherwise]
    ///
    /// A block device whose size is not a multiple of 4096 gets 512.
    #[arg(long, value_name = "BYTES", value_parser = ["512", "1024", "2048", "4096"])]
    pub sector_size: Option<String>,
    /// Hash of the digest and the anti-forensic splitter, and of pbkdf2 [default: sha256]
    #[arg(long, value_name = "HASH", value_parser = parse_hash)]
    pub hash: Option<String>,
    /// Where the data begins, such as 16M; a multiple of 4096 bytes (luks1: of 512) [default: after the header]
    ///
    /// With `--header` the default is 0.
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pub data_offset: Option<u64>,
    /// A name to find the volume by, at most 47 bytes (luks2)
    #[arg(long, value_name = "TEXT", value_parser = parse_label)]
    pub label: Option<String>,
    /// A second name, at most 47 bytes (luks2)
    #[arg(long, value_name = "TEXT", value_parser = parse_label)]
    pub subsystem: Option<String>,
    /// The volume's UUID [default: a random one]
    #[arg(long, value_name = "UUID", value_parser = parse_uuid)]
    pub uuid: Option<String>,
    /// The keyslot of the first passphrase [default: 0]
    #[arg(long, value_name = "N", value_parser = parse_keyslot)]
    pub key_slot: Option<u32>,
    /// Bytes of one header copy: 16k, 32k … 4M (luks2) [default: 16k]
    #[arg(long, value_name = "SIZE", value_parser = parse_metadata_size)]
    pub luks2_metadata_size: Option<u64>,
    /// Bytes for keyslots: a multiple of 4096, at most 128M (luks2) [default: what is left of 16M]
    #[arg(long, value_name = "SIZE", value_parser = parse_keyslots_size)]
    pub luks2_keyslots_size: Option<u64>,
    #[command(flatten)]
    pub kdf: KdfArgs,
}

/// What deriving a key from a passphrase shall cost.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Key derivation")]
pub struct KdfArgs {
    /// How the passphrase becomes a key [default: argon2id; luks1 has pbkdf2 only]
    #[arg(long, value_enum, value_name = "KDF")]
    pub pbkdf: Option<Pbkdf>,
    /// Milliseconds one attempt shall take on this machine [default: 2000]
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u32).range(1..))]
    pub iter_time: Option<u32>,
    /// Iterations instead of a measurement: pbkdf2 from 1000, argon2 (its time cost) from 4
    #[arg(long, value_name = "N", conflicts_with = "iter_time", value_parser = clap::value_parser!(u32).range(4..))]
    pub pbkdf_force_iterations: Option<u32>,
    /// argon2: most memory, KiB [default: 1 GiB, at most half of this machine's]
    #[arg(long, value_name = "KIB", value_parser = clap::value_parser!(u32).range(32..=4_194_304))]
    pub pbkdf_memory: Option<u32>,
    /// argon2: most lanes [default: 4, at most the CPUs there are]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4))]
    pub pbkdf_parallel: Option<u32>,
}

impl KdfArgs {
    /// Was anything said about it?
    pub fn is_typed(&self) -> bool {
        self.pbkdf.is_some()
            || self.iter_time.is_some()
            || self.pbkdf_force_iterations.is_some()
            || self.pbkdf_memory.is_some()
            || self.pbkdf_parallel.is_some()
    }
}

/// The derivation of one more keyslot.
#[derive(Debug, Default, Args)]
pub struct KeyslotKdf {
    #[command(flatten)]
    pub kdf: KdfArgs,
    /// Hash of pbkdf2 [default: the volume's]
    #[arg(long, value_name = "HASH", value_parser = parse_hash, help_heading = "Key derivation")]
    pub hash: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Pbkdf {
    /// costs time only
    Pbkdf2,
    /// costs memory; data-independent
    Argon2i,
    /// costs memory
    Argon2id,
}

#[derive(Debug, Args)]
pub struct OpenTest {
    #[command(flatten)]
    pub at: At,
    /// Where the passphrase is: file:PATH, fd:N, prompt or keyring:NAME
    #[arg(long, value_name = "REF", required_unless_present = "volume_key", conflicts_with = "volume_key")]
    pub key: Option<KeyText>,
    /// Where the volume key is: no passphrase is needed then
    #[arg(long, value_name = "REF", conflicts_with = "key_slot")]
    pub volume_key: Option<KeyText>,
    /// Try this keyslot only
    #[arg(long, value_name = "N", value_parser = parse_keyslot)]
    pub key_slot: Option<u32>,
}

#[derive(Debug, Args)]
pub struct AddKey {
    #[command(flatten)]
    pub at: At,
    /// Where a passphrase that opens the volume is: file:PATH, fd:N, prompt or keyring:NAME
    #[arg(long, value_name = "REF", required_unless_present = "volume_key", conflicts_with = "volume_key")]
    pub key: Option<KeyText>,
    /// Where the volume key is, instead of a passphrase
    #[arg(long, value_name = "REF")]
    pub volume_key: Option<KeyText>,
    /// Where the new passphrase is
    #[arg(long, value_name = "REF")]
    pub new_key: KeyText,
    /// The keyslot to use [default: the first free one]
    #[arg(long, visible_alias = "key-slot", value_name = "N", value_parser = parse_keyslot)]
    pub new_key_slot: Option<u32>,
    #[command(flatten)]
    pub kdf: KeyslotKdf,
}

#[derive(Debug, Args)]
pub struct RemoveKey {
    #[command(flatten)]
    pub at: At,
    /// The passphrase to remove; with --key-slot: any other that remains, as a proof
    #[arg(long, value_name = "REF", required_unless_present = "key_slot")]
    pub key: Option<KeyText>,
    /// The keyslot to remove
    #[arg(long, value_name = "N", value_parser = parse_keyslot)]
    pub key_slot: Option<u32>,
    /// The last keyslot may go too: without a header backup nobody reads the data again
    #[arg(long)]
    pub last_key_destroy_data: bool,
}

#[derive(Debug, Args)]
pub struct ChangeKey {
    #[command(flatten)]
    pub at: At,
    /// Where the old passphrase is: file:PATH, fd:N, prompt or keyring:NAME
    #[arg(long, value_name = "REF")]
    pub key: KeyText,
    /// Where the new passphrase is
    #[arg(long, value_name = "REF")]
    pub new_key: KeyText,
    /// The keyslot to change [default: the one the old passphrase opens]
    #[arg(long, value_name = "N", value_parser = parse_keyslot)]
    pub key_slot: Option<u32>,
    #[command(flatten)]
    pub kdf: KeyslotKdf,
}

#[derive(Debug, Args)]
pub struct ConvertKdf {
    #[command(flatten)]
    pub at: At,
    /// Where the passphrase is: file:PATH, fd:N, prompt or keyring:NAME
    #[arg(long, value_name = "REF")]
    pub key: KeyText,
    /// The keyslot to convert [default: the one the passphrase opens]
    #[arg(long, value_name = "N", value_parser = parse_keyslot)]
    pub key_slot: Option<u32>,
    #[command(flatten)]
    pub kdf: KeyslotKdf,
}

#[derive(Debug, Args)]
pub struct HeaderBackup {
    #[command(flatten)]
    pub at: At,
    /// A new file, readable by you alone
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Replace an existing FILE, once the new one is whole
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub struct HeaderRestore {
    #[command(flatten)]
    pub at: At,
    /// A header backup
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// VOLUME may hold another header, or none: its data is lost unless the backup belongs to it
    #[arg(long)]
    pub replace_other_header: bool,
}

#[derive(Debug, Args)]
pub struct Erase {
    #[command(flatten)]
    pub at: At,
    /// Do it without asking: without a header backup nobody reads the data again
    #[arg(long)]
    pub yes_destroy_all_keys: bool,
}

#[derive(Debug, Subcommand)]
pub enum Token {
    /// Add a token
    Add(Box<TokenAdd>),
    /// Remove a token
    Remove {
        #[command(flatten)]
        at: At,
        /// Its number
        #[arg(long, value_name = "N", value_parser = parse_keyslot)]
        token_id: u32,
    },
    /// List tokens
    List(At),
}

#[derive(Debug, Args)]
pub struct TokenAdd {
    #[command(flatten)]
    pub at: At,
    /// Any token: its JSON object in FILE, or on standard input with `-`
    #[arg(
        long,
        value_name = "FILE",
        required_unless_present = "key_ref",
        conflicts_with_all = ["key_ref", "rotate_by", "key_slot"]
    )]
    pub json_file: Option<PathBuf>,
    /// A token of type cryptctl-key: where the passphrase is kept, such as barbican:ID; never the passphrase itself
    #[arg(long, value_name = "REF")]
    pub key_ref: Option<KeyText>,
    /// The day by which the passphrase must be replaced; it begins at 00:00 UTC
    #[arg(long, value_name = "YYYY-MM-DD", value_parser = super::token::parse_date, requires = "key_ref")]
    pub rotate_by: Option<u64>,
    /// A keyslot that passphrase opens; may be given again [default: the only one in use]
    #[arg(long, value_name = "N", value_parser = parse_keyslot, requires = "key_ref")]
    pub key_slot: Vec<u32>,
    /// The token's number [default: the first free one]
    #[arg(long, value_name = "N", value_parser = parse_keyslot)]
    pub token_id: Option<u32>,
    /// Replace the token that has this number
    #[arg(long, requires = "token_id")]
    pub token_replace: bool,
}

#[derive(Debug, Args)]
pub struct Repair {
    #[command(flatten)]
    pub at: At,
    /// Only say what would be done
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Args)]
pub struct Doctor {
    #[command(flatten)]
    pub at: At,
    /// A passphrase to look at: can other tools use it? Nothing is opened with it
    #[arg(long, value_name = "REF")]
    pub key: Option<KeyText>,
}

/// Keyslot and token numbers of the format: 32 each (luks1: 8 keyslots).
const MOST_OBJECTS: u32 = 32;

/// A keyslot's or a token's number.
pub fn parse_keyslot(text: &str) -> Result<u32, String> {
    text.parse().ok().filter(|number| *number < MOST_OBJECTS).ok_or("expected a number from 0 to 31".into())
}

pub fn parse_label(text: &str) -> Result<String, String> {
    match text.len() {
        48.. => Err("longer than 47 bytes".to_owned()),
        _ if text.contains(char::is_control) => Err("control characters are not allowed".to_owned()),
        _ => Ok(text.to_owned()),
    }
}

/// The header has room for 31 characters and a zero byte; which hashes there are is the daemon's to say.
fn parse_hash(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    if text.is_empty() || text.len() > 31 || !text.chars().all(plain) {
        return Err("expected the name of a hash such as sha256 or sha512".to_owned());
    }
    Ok(text.to_ascii_lowercase())
}

/// RFC 9562's text form; the header holds it in lower case.
pub fn parse_uuid(text: &str) -> Result<String, String> {
    let well_formed = text.len() == 36
        && text.bytes().enumerate().all(|(at, byte)| match at {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => byte.is_ascii_hexdigit(),
        });
    if !well_formed {
        return Err("expected 32 hexadecimal digits as 8-4-4-4-12".to_owned());
    }
    Ok(text.to_ascii_lowercase())
}

fn parse_metadata_size(text: &str) -> Result<u64, String> {
    let bytes = parse_bytes(text)?;
    if bytes.is_power_of_two() && (16 << 10..=4 << 20).contains(&bytes) {
        Ok(bytes)
    } else {
        Err("must be 16k, 32k, 64k, 128k, 256k, 512k, 1M, 2M or 4M".to_owned())
    }
}

fn parse_keyslots_size(text: &str) -> Result<u64, String> {
    match parse_bytes(text)? {
        0 => Err("must not be zero".to_owned()),
        bytes if !bytes.is_multiple_of(4096) => Err("must be a multiple of 4096 bytes".to_owned()),
        bytes if bytes > 128 << 20 => Err("must be at most 128M".to_owned()),
        bytes => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_keyslot_is_a_number_of_the_format() {
        assert_eq!((parse_keyslot("0"), parse_keyslot("31")), (Ok(0), Ok(31)));
        for bad in ["32", "-1", "", "x", "4294967296"] {
            assert!(parse_keyslot(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_label_fits_its_field_with_its_zero_byte() {
        assert!(parse_label(&"x".repeat(47)).is_ok() && parse_label("").is_ok());
        assert!(parse_label(&"x".repeat(48)).is_err());
        assert!(parse_label(&"é".repeat(24)).is_err(), "bytes, not characters");
        assert!(parse_label("a\nb").is_err());
    }

    #[test]
    fn a_uuid_has_its_dashes_and_is_lower_case_on_disk() {
        let text = "0F8FAD5B-D9CB-469F-A165-70867728950E";
        assert_eq!(parse_uuid(text), Ok(text.to_ascii_lowercase()));
        for bad in
            ["", "0f8fad5b", "0f8fad5bd9cb469fa16570867728950e", "0f8fad5b-d9cb-469f-a165-70867728950g"]
        {
            assert!(parse_uuid(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn header_sizes_are_those_of_the_format() {
        assert_eq!(parse_metadata_size("16k"), Ok(16 << 10));
        assert_eq!(parse_metadata_size("4M"), Ok(4 << 20));
        for bad in ["8k", "24k", "8M", "0", "16kB"] {
            assert!(parse_metadata_size(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_keyslots_size("128M"), Ok(128 << 20));
        assert_eq!(parse_keyslots_size("4096"), Ok(4096));
        for bad in ["0", "4097", "129M", "128MiB1"] {
            assert!(parse_keyslots_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_hash_is_a_plain_name() {
        assert_eq!(parse_hash("SHA512"), Ok("sha512".to_owned()));
        assert_eq!(parse_hash("sha3-256"), Ok("sha3-256".to_owned()));
        for bad in ["", "a b", "sha256:x", "0123456789012345678901234567890123"] {
            assert!(parse_hash(bad).is_err(), "{bad}");
        }
    }
}
