//! The ledger in a journal file beside a volume without a header.
