//! LUKS on the wire: how a volume is opened, made, described and managed.
//!
//! Descriptor fields (`fd`, `*_fd`) are indices into the request's `SCM_RIGHTS` array, as everywhere on this wire. Secrets are
//! the read ends of closed pipes or sealed memfds and never in the JSON.

use serde::{Deserialize, Serialize};

use crate::Commit;

/// What the secret of a request is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Secret {
    /// A passphrase of a keyslot.
    #[default]
    Passphrase,
    /// The volume key itself; no keyslot is needed.
    VolumeKey,
}

/// How to open an existing volume.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Open {
    /// A detached header: descriptor index and name, opened for reading.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub header: Option<File>,
    /// Only this keyslot is tried.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keyslot: Option<u32>,
    /// What the key descriptor holds.
    #[serde(default)]
    pub secret: Secret,
}

/// An open file and what the user calls it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// Descriptor index.
    pub fd: u32,
    /// The name the user typed; for messages only, never opened.
    pub name: String,
}

/// A new file that becomes visible when it is whole, or an existing file or device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewFile {
    /// Descriptor index, opened for reading and writing.
    pub fd: u32,
    /// The name the user typed; for messages only, never opened.
    pub name: String,
    /// See [`Commit`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<Commit>,
}

/// LUKS versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Version {
    /// On-disk version 1.
    Luks1,
    /// On-disk version 2.
    Luks2,
}

/// A volume to be made. What is absent has cryptsetup's default.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct New {
    /// Which format.
    pub version: Version,
    /// Cipher in dm-crypt's notation: `aes-xts-plain64` (default) or `aes-xts-plain`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cipher: Option<String>,
    /// Volume key, both XTS halves: 32 or 64 bytes (default).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_bytes: Option<u32>,
    /// Data unit, bytes: 512…4096; default 4096, for LUKS1 always 512.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_unit: Option<u32>,
    /// Hash of digest and AF splitter (LUKS1: of the KDF too); default `sha256`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hash: Option<String>,
    /// LUKS2: label, at most 47 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// LUKS2: subsystem, at most 47 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subsystem: Option<String>,
    /// Default: a random one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// Where the data begins, bytes, a multiple of 4096 (LUKS1: of 512). With a detached header default 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_offset: Option<u64>,
    /// LUKS2: bytes of one header copy with its JSON: 16 KiB * 2^n up to 4 MiB; default 16 KiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata_bytes: Option<u64>,
    /// LUKS2: bytes of the keyslots area: a multiple of 4096 up to 128 MiB; default what is left of 16 MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keyslots_bytes: Option<u64>,
    /// How the passphrase becomes a key.
    #[serde(default)]
    pub kdf: KdfWish,
    /// The keyslot to use; default 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keyslot: Option<u32>,
    /// Descriptor index of a volume key to use instead of a random one: exactly `key_bytes` bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume_key_fd: Option<u32>,
    /// Write the header here instead of in front of the data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub header: Option<NewFile>,
}

/// KDF names on the wire, as on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KdfKind {
    /// PBKDF2-HMAC (RFC 8018).
    Pbkdf2,
    /// Argon2i (RFC 9106).
    Argon2i,
    /// Argon2id (RFC 9106).
    Argon2id,
}

/// What a new keyslot's KDF shall cost. What is absent is measured or has cryptsetup's default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KdfWish {
    /// Default: argon2id for LUKS2, pbkdf2 for LUKS1 (which has no other).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<KdfKind>,
    /// pbkdf2: its hash; default that of the volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hash: Option<String>,
    /// Milliseconds one attempt shall take here, 1..=60000; default 2000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iter_time_ms: Option<u32>,
    /// Iterations (pbkdf2: at least 1000) or time cost (argon2: at least 4) instead of a measurement.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iterations: Option<u32>,
    /// argon2: most memory, KiB, 32..=4194304; default 1 GiB, at most half of what this machine has. For want of
    /// memory no keyslot gets less than 64 MiB: only if so little is named here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_kib: Option<u32>,
    /// argon2: lanes, 1..=4; default 4, at most the CPUs there are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lanes: Option<u32>,
}

/// A header operation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// The volume: opened for reading by what only reads (`dump`, `open_test`, `header_backup`, `token_list`, `doctor`,
    /// `repair` as a dry run), else for reading and writing. With a detached header: the file with the data, if given at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<File>,
    /// A detached header, opened like `volume` would be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub header: Option<File>,
    /// Descriptor index of a lock file the caller has locked already (cryptsetup's lock of a block device). The daemon keeps it
    /// open, and so locked, until the operation is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lock_fd: Option<u32>,
    /// Descriptors of this request that are connections to NBD servers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub remotes: Vec<crate::remote::Remote>,
    /// What to do.
    pub operation: Operation,
}

/// The header operations. Each is complete and durable when it is answered; one that fails has changed nothing that opens the
/// volume.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Operation {
    /// Make a new volume: header and first keyslot; the data area is not touched. Answered with [`Reply::Done`].
    Format {
        /// The volume.
        new: Box<New>,
        /// Its first passphrase.
        key_fd: u32,
    },
    /// Answered with [`Reply::Dump`].
    Dump {},
    /// Does the key open it? Answered with [`Reply::Done`] naming the keyslot.
    OpenTest {
        /// The secret.
        key_fd: u32,
        /// What it is.
        #[serde(default)]
        secret: Secret,
        /// Only this keyslot.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        keyslot: Option<u32>,
    },
    /// Another passphrase. Answered with [`Reply::Done`] naming the new keyslot.
    AddKey {
        /// A secret that opens the volume.
        key_fd: u32,
        /// What it is.
        #[serde(default)]
        secret: Secret,
        /// The new passphrase.
        new_key_fd: u32,
        /// The new keyslot; default the first free one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        keyslot: Option<u32>,
        /// Its KDF.
        #[serde(default)]
        kdf: KdfWish,
    },
    /// Destroy a keyslot: the one named, or the one the passphrase opens. Answered with [`Reply::Done`].
    RemoveKey {
        /// A passphrase: of the keyslot to remove, or, when `keyslot` is given too, of any other that shall remain.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        key_fd: Option<u32>,
        /// The keyslot.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        keyslot: Option<u32>,
        /// The last keyslot may go too: the data is then lost to everybody without the volume key or a header backup.
        #[serde(default)]
        allow_last: bool,
    },
    /// Replace a passphrase: add the new one, then destroy the old keyslot. Answered with [`Reply::Done`].
    ChangeKey {
        /// The old passphrase.
        key_fd: u32,
        /// The new passphrase.
        new_key_fd: u32,
        /// The keyslot to change; default the one the old passphrase opens.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        keyslot: Option<u32>,
        /// The KDF of the new keyslot.
        #[serde(default)]
        kdf: KdfWish,
    },
    /// The same passphrase under another KDF or cost. Answered with [`Reply::Done`].
    ConvertKdf {
        /// The passphrase.
        key_fd: u32,
        /// The keyslot; default the one the passphrase opens.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        keyslot: Option<u32>,
        /// The new KDF.
        #[serde(default)]
        kdf: KdfWish,
    },
    /// Copy header and keyslots out. Answered with [`Reply::Done`].
    HeaderBackup {
        /// A new file.
        file: NewFile,
    },
    /// Put a backup back. Answered with [`Reply::Done`].
    HeaderRestore {
        /// The backup, opened for reading.
        file: File,
        /// The volume has another UUID, or another data offset, cipher or key size, or no readable header: what is on it will be
        /// readable only if the backup belongs to it.
        #[serde(default)]
        allow_other: bool,
    },
    /// Destroy every keyslot. Answered with [`Reply::Done`].
    Erase {
        /// Said so: without a header backup nothing opens the volume again.
        confirmed: bool,
    },
    /// Add a token to a LUKS2 header. Answered with [`Reply::Done`] naming the token.
    TokenAdd {
        /// The token's JSON object, as on disk (`type`, `keyslots`, anything else).
        token: serde_json::Value,
        /// Its number; default the first free one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        id: Option<u32>,
        /// An existing token with that number may be replaced.
        #[serde(default)]
        replace: bool,
    },
    /// Answered with [`Reply::Done`].
    TokenRemove {
        /// Its number.
        id: u32,
    },
    /// Answered with [`Reply::Tokens`].
    TokenList {},
    /// Rewrite the damaged or obsolete copy of a LUKS2 header from the good one; correct what is known to go wrong in LUKS1
    /// headers. Answered with [`Reply::Repaired`].
    Repair {
        /// Only say what would be done.
        #[serde(default)]
        dry_run: bool,
    },
    /// Explain the volume. Answered with [`Reply::Doctor`].
    Doctor {
        /// A passphrase to look at, without opening anything: does it follow a convention other tools cannot use?
        #[serde(default, skip_serializing_if = "Option::is_none")]
        key_fd: Option<u32>,
    },
}

/// Answers to [`Request`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// It is done.
    Done(Done),
    /// To `dump`.
    Dump(Box<Dump>),
    /// To `token_list`: the tokens as on disk, by number.
    Tokens(serde_json::Map<String, serde_json::Value>),
    /// To `repair`.
    Repaired(Repaired),
    /// To `doctor`.
    Doctor(Box<Doctor>),
}

/// What was done.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// The keyslot opened, made or destroyed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keyslot: Option<u32>,
    /// The token made or removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<u32>,
    /// The volume's UUID.
    #[serde(default)]
    pub uuid: String,
    /// Things the user should know, one sentence each.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// A header in full.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Dump {
    /// What every version has.
    pub summary: Summary,
    /// LUKS2: the on-disk JSON metadata. LUKS1: the header's fields under their names in the specification.
    pub metadata: serde_json::Value,
}

/// A header in short.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Which format.
    pub version: Version,
    /// Its UUID.
    pub uuid: String,
    /// LUKS2: its label.
    #[serde(default)]
    pub label: String,
    /// LUKS2: its subsystem.
    #[serde(default)]
    pub subsystem: String,
    /// LUKS2: counts header writes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seqid: Option<u64>,
    /// LUKS2: bytes of one header copy with its JSON.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata_bytes: Option<u64>,
    /// LUKS2: bytes of the keyslots area.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keyslots_bytes: Option<u64>,
    /// The data areas, in the order of the plaintext.
    pub segments: Vec<Segment>,
    /// The keyslots in use.
    pub keyslots: Vec<Keyslot>,
    /// LUKS2: requirements a program must know to touch the volume.
    #[serde(default)]
    pub requirements: Vec<String>,
    /// LUKS2: activation flags.
    #[serde(default)]
    pub flags: Vec<String>,
    /// LUKS2: the two header copies: `good`, or what is wrong.
    #[serde(default)]
    pub copies: Vec<String>,
}

/// A data area.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// `crypt`, `linear`, or an unknown type as it stands on disk.
    pub kind: String,
    /// First byte on the device.
    pub offset: u64,
    /// Bytes; absent: to the end of the device.
    pub size: Option<u64>,
    /// Cipher in dm-crypt's notation.
    #[serde(default)]
    pub cipher: String,
    /// Data unit, bytes.
    #[serde(default)]
    pub data_unit: u32,
    /// Counter of the first data unit, 512-byte sectors.
    #[serde(default)]
    pub tweak_offset: u64,
    /// Volume key, bits; 0 when no digest names a keyslot that tells it.
    #[serde(default)]
    pub key_bits: u32,
    /// LUKS2 segment flags.
    #[serde(default)]
    pub flags: Vec<String>,
}

/// A keyslot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Keyslot {
    /// Its number.
    pub id: u32,
    /// `luks1`, `luks2`, `reencrypt`, or an unknown type as it stands on disk.
    pub kind: String,
    /// `pbkdf2`, `argon2i`, `argon2id`; empty where there is none.
    #[serde(default)]
    pub kdf: String,
    /// pbkdf2: its hash.
    #[serde(default)]
    pub hash: String,
    /// pbkdf2: iterations; argon2: time cost.
    #[serde(default)]
    pub iterations: u32,
    /// argon2: memory, KiB.
    #[serde(default)]
    pub memory_kib: u32,
    /// argon2: lanes.
    #[serde(default)]
    pub lanes: u32,
    /// Bits of the stored key.
    #[serde(default)]
    pub key_bits: u32,
    /// `ignore`, `normal`, `prefer`.
    #[serde(default)]
    pub priority: String,
    /// Does it open a data segment? (One that does not is `unbound`.)
    #[serde(default)]
    pub bound: bool,
    /// First byte of its area.
    #[serde(default)]
    pub area_offset: u64,
    /// Bytes of its area.
    #[serde(default)]
    pub area_bytes: u64,
    /// `doctor`: seconds one attempt is estimated to take here; absent where that cannot be measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unlock_seconds: Option<f64>,
}

/// What a repair did, or would do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Repaired {
    /// One sentence each; none: there was nothing to repair.
    pub actions: Vec<String>,
    /// Nothing was written.
    pub dry_run: bool,
}

/// What there is to say about a volume.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Doctor {
    /// The header in short, with unlock times; absent where none can be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary: Option<Summary>,
    /// Header copies, re-encryption state, weak settings, conventions: worst first.
    pub findings: Vec<Finding>,
    /// Who can open it, and why not.
    pub tools: Vec<Tool>,
}

/// One remark.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// How bad.
    pub severity: Severity,
    /// What it is about: `header`, `keyslot 3`, `segment 0`, `reencryption`, `passphrase`, `device`.
    pub about: String,
    /// A sentence for a human.
    pub message: String,
    /// What to do, if anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Good to know.
    Note,
    /// Works, but should be changed.
    Weak,
    /// Damage, or danger of losing data.
    Danger,
}

/// Can a tool open the volume?
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tool {
    /// `cryptsetup`, `kernel`, `qemu`, `librbd`, `nbdkit`, `cryptctl`.
    pub name: String,
    /// It can.
    pub opens: bool,
    /// From which version on, or why not.
    pub remark: String,
}
