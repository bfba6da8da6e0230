//! Re-encryption in place, on the wire.

use serde::{Deserialize, Serialize};

use crate::luks::{File, KdfWish};
use crate::{Commit, Raw};

/// What is to become of a volume. Descriptor fields are indices into the request's `SCM_RIGHTS` array.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// The volume's data (and header, unless `header` is given), opened for reading and writing; a block device
    /// exclusively, or see `shared`. For a dry run reading is enough.
    pub volume: File,
    /// Which way.
    pub mode: Mode,
    /// What kind of volume.
    pub format: Format,
    /// Secrets that open the volume as it is: passphrases of LUKS keyslots, in the order they are to be tried; for `raw` exactly
    /// one, the old key's bytes. Empty for `encrypt`.
    #[serde(default)]
    pub keys: Vec<u32>,
    /// LUKS: a passphrase for the new volume key in place of the first of `keys` (whose keyslot is not carried over then); the others are
    /// carried to it as they are. Absent: all are. Raw: the new key's bytes. For `encrypt`: the first passphrase. Absent for
    /// `decrypt`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_key: Option<u32>,
    /// Only go on with one that was begun; otherwise one that was begun is gone on with, too, and else a new one is begun.
    #[serde(default)]
    pub resume_only: bool,
    /// Say what would be done and how long it would take, by a measured sample; write nothing.
    #[serde(default)]
    pub dry_run: bool,
    /// How a step is protected; default `checksum`, for `encrypt` with `reduce_bytes` `datashift`. With one that was begun:
    /// as it was begun.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resilience: Option<Resilience>,
    /// Most bytes of one step; default chosen from the means of protection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hotzone_bytes: Option<u64>,
    /// Read everything once more in the end and compare the plaintext's digest.
    #[serde(default)]
    pub verify: bool,
    /// Locks of other programs that the caller holds, kept until the job ends.
    #[serde(default)]
    pub lock_fds: Vec<u32>,
    /// The volume is a block device that is in use, and so was not opened exclusively: this is done only beside an export of the same
    /// daemon, which has it.
    #[serde(default)]
    pub shared: bool,
}

/// Which way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// From one volume key to another.
    Reencrypt,
    /// From plain data to a LUKS2 volume.
    Encrypt,
    /// From a LUKS2 volume with a detached header to plain data.
    Decrypt,
}

/// How a step is protected, in cryptsetup's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resilience {
    /// Hashes of the old blocks are kept: after a crash every block is known for old or new.
    Checksum,
    /// The old bytes are kept.
    Journal,
    /// Nothing is kept: a crash loses data.
    None,
    /// Data moves by the header's size into free space, so the old bytes are still there.
    Datashift,
}

/// What kind of volume.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Format {
    /// LUKS. Version 1 is converted to version 2 first.
    Luks(Box<Luks>),
    /// No header.
    Raw(Box<RawPair>),
}

/// LUKS volumes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Luks {
    /// The detached header, opened for reading and writing. For a new one (`encrypt`): an empty file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub header: Option<File>,
    /// How a new detached header becomes visible.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<Commit>,
    /// Keyslots whose passphrase is not among the keys go with the old volume key. Otherwise they are named and nothing is done.
    #[serde(default)]
    pub drop_slots: bool,
    /// The new cipher; default that of the volume, or `aes-xts-plain64`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cipher: Option<String>,
    /// Bytes of the new volume key; default those of the old, or 64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_bytes: Option<u32>,
    /// New data unit, bytes; default the volume's. For `encrypt` 512, unless the data is known to stand more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_unit: Option<u32>,
    /// A larger data unit is wanted although a filesystem with smaller blocks would not be mountable any more.
    #[serde(default)]
    pub force_data_unit: bool,
    /// What the new keyslots' KDF shall cost. Absent: that of the keyslot it takes the place of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kdf: Option<KdfWish>,
    /// `encrypt` without a detached header: so many bytes at the volume's end are free; half of them become the header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reduce_bytes: Option<u64>,
    /// `encrypt`: LUKS2 label.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// `encrypt`: UUID; default a random one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
}

/// Volumes without a header.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawPair {
    /// As it is.
    pub old: Raw,
    /// As it shall be.
    pub new: Raw,
    /// The sidecar journal, opened for reading and writing: empty, or that of the re-encryption to go on with.
    pub journal: File,
}

/// What a running re-encryption is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Makes an interrupted step whole.
    Recovering,
    /// Rewrites the data.
    Rewriting,
    /// Reads everything once more and compares.
    Verifying,
}

/// What a re-encryption was, or (dry run) would be.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Bytes of data in all.
    pub total_bytes: u64,
    /// Of these, done before this job began.
    pub done_before_bytes: u64,
    /// Cipher and data unit of before, as `aes-xts-plain64, 512-bit key, 4096-byte data units`; absent: plain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub old_cipher: Option<String>,
    /// Of after.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_cipher: Option<String>,
    /// How steps are protected, as on disk.
    pub resilience: String,
    /// Most bytes of a step.
    pub hotzone_bytes: u64,
    /// Keyslots (numbers before) carried to the new volume key.
    #[serde(default)]
    pub carried_keyslots: Vec<u32>,
    /// Keyslots that go.
    #[serde(default)]
    pub dropped_keyslots: Vec<u32>,
    /// A step that had been interrupted was recovered first: its bytes.
    #[serde(default)]
    pub recovered_bytes: u64,
    /// What is worth knowing, one sentence each.
    #[serde(default)]
    pub notes: Vec<String>,
    /// Dry run: seconds it would take, by a measured sample.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub estimate_seconds: Option<f64>,
    /// Keyed digest of the plaintext as it was read under the old key, hex. The key is random, of this job, and gone with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest_before: Option<String>,
    /// The same, read once more under the new key (`verify`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest_after: Option<String>,
    /// The bytes those digests cover: what this job re-encrypted.
    #[serde(default)]
    pub digest_bytes: u64,
    /// The old volume key opens nothing any more: no keyslot, digest or segment of the header is bound to it.
    #[serde(default)]
    pub old_key_gone: bool,
}
