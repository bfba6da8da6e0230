//! On-disk formats, without I/O: bytes and parameters in, structures and layouts out.

pub mod raw;
