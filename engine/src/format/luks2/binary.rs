//! The 4096-byte binary header and its checksum.
