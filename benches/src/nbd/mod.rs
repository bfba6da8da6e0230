//! NBD servers beside each other: who serves, what a client asks of them, and what came of it.
//!
//! | file | its one purpose |
//! |---|---|
//! | `server` | a server over a file, from its start to its end, and what it costs |
//! | `load` | clients: fio's nbd engine and nbdcopy |
//! | `rows` | one row per run, ratios round by round, the table |

pub mod load;
pub mod rows;
pub mod server;
