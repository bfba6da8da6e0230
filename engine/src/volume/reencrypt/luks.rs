//! The ledger in a LUKS2 header.
