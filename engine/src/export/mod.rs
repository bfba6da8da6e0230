//! Exports: the plaintext of a volume, served to foreign programs while it stays encrypted on disk.
//!
//! | file | its one purpose |
//! |---|---|
//! | `mod` | the registry: numbers, listening sockets, who may stop what |
//! | `exported` | one export as its connections see it |
//! | `open` | from a request to an opened volume |
//! | `nbd` | the NBD server |
//!
//! An export is a source of slots for the workers, not a second pipeline: requests are received, read or decrypted, and sent by the
//! worker that owns the connection, on its own ring ([`crate::pipeline::service`]).

pub mod exported;
pub mod nbd;
