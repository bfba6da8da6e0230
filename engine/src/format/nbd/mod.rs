//! The NBD protocol on the wire, both sides of it: numbers, and bytes to structures and back. No I/O.
//!
//! | file | its one purpose |
//! |---|---|
//! | `mod` | the numbers |
//! | `option` | haggling: greeting, options, option replies, `INFO` blocks |
//! | `request` | transmission: what a client sends |
//! | `reply` | transmission: what a server sends, simple and structured |
//!
//! Source: the NBD protocol, <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>, with structured replies, block
//! status and extended headers. All numbers are big-endian. Only *fixed newstyle* is spoken; `NBD_OPT_EXPORT_NAME` is answered
//! for old clients and never sent.

pub mod option;
pub mod reply;
pub mod request;

/// First 8 bytes of a greeting, `NBDMAGIC`.
pub const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second 8 bytes of a greeting, and the first of every option, `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// First 8 bytes of every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First 4 bytes of a compact request (28 bytes).
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First 4 bytes of an extended request (32 bytes).
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// First 4 bytes of a simple reply (16 bytes).
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First 4 bytes of a structured reply chunk (20 bytes).
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;
/// First 4 bytes of an extended reply chunk (32 bytes).
pub const EXTENDED_CHUNK_MAGIC: u32 = 0x6e8a_278c;

/// Longest string (export name, context name, error text) on the wire, bytes.
pub const STRING_MAX: u32 = 4096;
/// What clients assume when no block sizes were advertised, and what we never exceed: bytes of one read or write.
pub const PAYLOAD_MAX: u32 = 32 << 20;

/// Handshake flags, of the server and echoed by the client.
pub mod handshake {
    /// Fixed newstyle.
    pub const FIXED_NEWSTYLE: u16 = 1;
    /// No 124 zero bytes after `EXPORT_NAME`.
    pub const NO_ZEROES: u16 = 2;
}

/// Transmission flags: what an export can do.
pub mod flags {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH is understood.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// FUA is understood.
    pub const SEND_FUA: u16 = 1 << 3;
    /// A disk with a head.
    pub const ROTATIONAL: u16 = 1 << 4;
    /// TRIM is understood.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES is understood.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// DF is understood.
    pub const SEND_DF: u16 = 1 << 7;
    /// Several connections see one another's writes, and a flush on one covers all.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// CACHE is understood.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// FAST_ZERO is understood.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    /// BLOCK_STATUS with payload is understood (extended headers).
    pub const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

/// Flags of a command.
pub mod command_flags {
    /// Durable before the reply.
    pub const FUA: u16 = 1;
    /// WRITE_ZEROES: no hole.
    pub const NO_HOLE: u16 = 1 << 1;
    /// READ: one chunk of data.
    pub const DF: u16 = 1 << 2;
    /// BLOCK_STATUS: one extent.
    pub const REQ_ONE: u16 = 1 << 3;
    /// WRITE_ZEROES: fast or not at all.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// Extended headers: a payload of that length follows.
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Errors on the wire: values of Linux, but the protocol's own.
pub mod errors {
    /// Operation not permitted.
    pub const EPERM: u32 = 1;
    /// Input/output error.
    pub const EIO: u32 = 5;
    /// No memory.
    pub const ENOMEM: u32 = 12;
    /// Invalid argument.
    pub const EINVAL: u32 = 22;
    /// No space left on device.
    pub const ENOSPC: u32 = 28;
    /// Value too large.
    pub const EOVERFLOW: u32 = 75;
    /// Operation not supported.
    pub const ENOTSUP: u32 = 95;
    /// Server is being shut down.
    pub const ESHUTDOWN: u32 = 108;
}

/// The context that says which extents are allocated.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// Status flags of `base:allocation`.
pub mod allocation {
    /// Not allocated.
    pub const HOLE: u32 = 1;
    /// Reads as zeros.
    pub const ZERO: u32 = 2;
}
/// The context QEMU shows a dirty bitmap in begins so; status flag 1: dirty.
pub const DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";
