//! The encryption data path: kernels, ring, pipeline, formats.
//!
//! ```text
//! control socket ─ request ─▶ job ─ plan ─▶ pipeline        (slow: may block, allocate, log)
//! ──────────────────────────────────────────────────────────────────────────────────────────
//! source Queue ─▶ read ─▶ crypt in place ─▶ write ─▶ sink Queue   (fast: no locks, no allocation, no log)
//!                   └─ completions return the same slot ─┘
//! ```
//!
//! Ranks: a module imports only from ranks below its own (a test checks it).
//!
//! | rank | modules |
//! |---|---|
//! | 0 | `units` `error` `limits` `telemetry` `telemetry::record` (and the wire crate `proto`) |
//! | 1 | `sys` `crypto` |
//! | 2 | `format` `key` |
//! | 3 | `backend` |
//! | 4 | `pipeline` |
//! | 5 | `volume` |
//! | 6 | `job` |
//! | 7 | `export` `telemetry::prometheus` `config` |
//! | 8 | `control` |
//! | 9 | `daemon` `main` |

pub mod backend;
pub mod config;
pub mod control;
pub mod crypto;
pub mod daemon;
pub mod error;
pub mod export;
pub mod format;
pub mod job;
pub mod key;
pub mod limits;
pub mod pipeline;
pub mod sys;
pub mod telemetry;
pub mod units;
pub mod volume;
