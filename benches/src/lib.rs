//! What the measurements share: seeded data with known digests, processes and what they cost, the limit, the rivals, rows.
//!
//! Every measurement stands beside its limit in the same run, interleaved, and checks the bytes it moved: a rate without
//! a verified result is not reported.

pub mod facts;
pub mod fio;
pub mod libraries;
pub mod nbd;
pub mod ours;
pub mod plan;
pub mod rivals;
pub mod rows;
pub mod run;
pub mod scratch;
pub mod source;
pub mod turns;
