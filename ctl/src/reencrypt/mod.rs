//! `cryptctl reencrypt`: another volume key for a volume, in place.
//!
//! | file | its one purpose |
//! |---|---|
//! | `args` | what was typed |
//! | `wish` | what the volume shall be, and options that contradict each other |
//! | `content` | what the data area holds before it is rewritten |
//! | `request` | what was typed means: files, secrets, locks, the job |
//! | `journal` | the journal of a raw volume |
//! | `render` | the report as people read it |
//! | `help` | the long help |

pub mod args;
mod content;
pub mod help;
mod journal;
pub mod render;
pub mod request;
mod wish;
