//! Formats on disk and on the wire, sans I/O: bytes in, structures out, and back. No files, no clock, no randomness here.
//!
//! | module | format |
//! |---|---|
//! | `raw` | dm-crypt plain, no header |
//! | `luks1` | LUKS On-Disk Format Specification 1.2.3 |
//! | `luks2` | LUKS2 On-Disk Format Specification 1.1.4 |
//! | `sidecar` | the journal beside a volume without a header that is being re-encrypted |
//! | `nbd` | the NBD protocol |
//! | `af` | the anti-forensic splitter of both |
//! | `checkpoint` | how far a copy has come, and what it is a copy of |

pub mod af;
pub mod checkpoint;
pub mod luks1;
pub mod luks2;
pub mod nbd;
pub mod raw;
pub mod sidecar;
