//! Every bound of the daemon, with its default and the relations between them, checked when this file is compiled.
//!
//! The wire's own bounds (line, descriptors, secret) are in `proto`, because a client must know them too.

use std::time::Duration;

/// Connections at one time.
pub const CONNECTIONS_MAX: usize = 4096;
/// Connections of one user at one time. Below the total, so that no user but root can lock out the others.
pub const CONNECTIONS_PER_USER_MAX: usize = 2048;
/// Descriptors the daemon keeps for itself and its jobs when it fits the number of connections to `RLIMIT_NOFILE`.
pub const DESCRIPTORS_RESERVED: usize = 256;
/// Connections waiting to be accepted.
pub const BACKLOG: i32 = 1024;
/// Connections accepted in one turn of the loop, so that a flood of them does not starve those who are served.
pub const ACCEPTS_PER_TURN: usize = 64;
/// Request lines handled for one connection in one turn of the loop.
pub const LINES_PER_TURN: usize = 16;
/// `watch` requests open on one connection.
pub const WATCHES_MAX: usize = 64;
/// Jobs submitted without `detach` that one connection may hold.
pub const ATTACHED_MAX: usize = 1024;
/// Submissions being checked at one time; more wait, one per connection.
pub const SUBMITS_AT_ONCE: usize = 8;
/// A connection with more unsent bytes than this is asked nothing new until it has read.
pub const UNSENT_HIGH: usize = 64 * 1024;
/// A line begun must be complete within this time.
pub const LINE_TIME: Duration = Duration::from_secs(30);
/// Seconds for which a client may leave everything unread before it is taken for dead.
pub const STALL_SECONDS: u64 = 600;
/// Pause in accepting after the process ran out of descriptors.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// How long a starting daemon waits for the one that holds the lock to answer or to leave.
pub const START_RACE_TIME: Duration = Duration::from_secs(30);

/// `watch`: shortest, default and longest interval between progress events, milliseconds.
pub const WATCH_INTERVAL_MS: (u32, u32, u32) = (100, 500, 60_000);

/// Jobs that run at once.
pub const RUNNING_JOBS: u32 = 16;
/// Jobs queued or running that one user may have.
pub const JOBS_PER_USER: u32 = 256;
/// Most either may be set to.
pub const JOBS_MAX: u32 = 1024;
/// Finished jobs remembered.
pub const REMEMBERED_JOBS: u32 = 1024;

/// Bytes of one buffer.
pub const BUFFER_BYTES: u32 = 1 << 20;
/// Smallest buffer.
pub const BUFFER_BYTES_MIN: u32 = 64 << 10;
/// Largest buffer.
pub const BUFFER_BYTES_MAX: u32 = 16 << 20;
/// Fewest buffers of one worker that may be configured.
pub const BUFFERS_PER_WORKER_MIN: u32 = 4;
/// Most buffers of one worker.
pub const BUFFERS_PER_WORKER_MAX: u32 = 256;
/// Fewest buffers of one worker by default: below this a device runs dry between two chunks.
pub const BUFFERS_PER_WORKER_DEFAULT_MIN: u32 = 8;
/// Buffer memory of one worker by default, bytes.
pub const WORKER_MEMORY: u64 = 32 << 20;
/// Buffer memory of all workers by default, bytes: what keeps the process below 96 MiB.
pub const ALL_WORKERS_MEMORY: u64 = 64 << 20;
/// Most workers.
pub const WORKERS_MAX: usize = 1024;

const _: () = assert!(CONNECTIONS_PER_USER_MAX < CONNECTIONS_MAX);
const _: () =
    assert!(CONNECTIONS_PER_USER_MAX >= 1024, "a thousand idle connections of one user are promised");
const _: () = assert!(UNSENT_HIGH <= proto::MAX_RESPONSE);
const _: () = assert!(proto::MAX_NAME * 6 * 2 + 4096 <= proto::MAX_LINE, "two escaped names fit a line");
const _: () = assert!(BUFFER_BYTES_MIN <= BUFFER_BYTES && BUFFER_BYTES <= BUFFER_BYTES_MAX);
const _: () = assert!(BUFFER_BYTES.is_power_of_two());
const _: () = assert!(BUFFERS_PER_WORKER_MIN <= BUFFERS_PER_WORKER_DEFAULT_MIN);
const _: () = assert!(BUFFERS_PER_WORKER_DEFAULT_MIN <= BUFFERS_PER_WORKER_MAX);
const _: () = assert!(WORKER_MEMORY <= ALL_WORKERS_MEMORY);
const _: () =
    assert!(WATCH_INTERVAL_MS.0 <= WATCH_INTERVAL_MS.1 && WATCH_INTERVAL_MS.1 <= WATCH_INTERVAL_MS.2);
const _: () = assert!(RUNNING_JOBS <= JOBS_MAX && JOBS_PER_USER <= JOBS_MAX);

/// Buffers of one worker when none are configured: its share of the budget, in whole buffers.
#[must_use]
pub fn buffers_per_worker(workers: u32, buffer_bytes: u32) -> u32 {
    let workers = u64::from(workers.max(1));
    let share = WORKER_MEMORY.min(ALL_WORKERS_MEMORY / workers);
    let buffers = u32::try_from(share / u64::from(buffer_bytes.max(1))).unwrap_or(u32::MAX);
    buffers.clamp(BUFFERS_PER_WORKER_DEFAULT_MIN, BUFFERS_PER_WORKER_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_follow_the_budget_and_never_fall_below_what_a_device_needs() {
        assert_eq!(buffers_per_worker(1, 1 << 20), 32);
        assert_eq!(buffers_per_worker(2, 1 << 20), 32);
        assert_eq!(buffers_per_worker(4, 1 << 20), 16);
        assert_eq!(buffers_per_worker(64, 1 << 20), 8);
        assert_eq!(buffers_per_worker(1, 64 << 10), 256);
    }
}
