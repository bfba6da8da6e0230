//! Haggling: options a client sends, replies to them, and the blocks of `INFO` in them.
//!
//! ```text
//! option    0 OPTION_MAGIC u64 · 8 option u32 · 12 length u32                                             16 bytes, then data
//! reply     0 OPTION_REPLY_MAGIC u64 · 8 option u32 · 12 type u32 · 16 length u32                         20 bytes, then data
//! ```

/// Numbers of options.
pub mod number {
    /// The old way to begin transmission.
    pub const EXPORT_NAME: u32 = 1;
    /// Leave.
    pub const ABORT: u32 = 2;
    /// Names of all exports.
    pub const LIST: u32 = 3;
    /// TLS from here on.
    pub const STARTTLS: u32 = 5;
    /// Tell of an export.
    pub const INFO: u32 = 6;
    /// The same, and begin transmission.
    pub const GO: u32 = 7;
    /// Structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Which contexts there are.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Which contexts BLOCK_STATUS shall answer.
    pub const SET_META_CONTEXT: u32 = 10;
    /// 64-bit headers.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Types of replies.
pub mod answer {
    /// Done.
    pub const ACK: u32 = 1;
    /// A name, for LIST.
    pub const SERVER: u32 = 2;
    /// A block of INFO.
    pub const INFO: u32 = 3;
    /// A context.
    pub const META_CONTEXT: u32 = 4;
    /// Set in all errors.
    pub const ERROR_BIT: u32 = 1 << 31;
    /// Unknown option.
    pub const ERR_UNSUP: u32 = ERROR_BIT | 1;
    /// Not allowed here.
    pub const ERR_POLICY: u32 = ERROR_BIT | 2;
    /// Makes no sense.
    pub const ERR_INVALID: u32 = ERROR_BIT | 3;
    /// Not on this platform.
    pub const ERR_PLATFORM: u32 = ERROR_BIT | 4;
    /// TLS first.
    pub const ERR_TLS_REQD: u32 = ERROR_BIT | 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = ERROR_BIT | 6;
    /// Leaving.
    pub const ERR_SHUTDOWN: u32 = ERROR_BIT | 7;
    /// The client must ask for block sizes.
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR_BIT | 8;
    /// Too long.
    pub const ERR_TOO_BIG: u32 = ERROR_BIT | 9;
}

/// Types of INFO blocks.
pub mod info {
    /// Size u64, transmission flags u16.
    pub const EXPORT: u16 = 0;
    /// Canonical name.
    pub const NAME: u16 = 1;
    /// For humans.
    pub const DESCRIPTION: u16 = 2;
    /// Minimum, preferred, maximum u32.
    pub const BLOCK_SIZE: u16 = 3;
}
