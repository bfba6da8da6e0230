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
/// Helper threads (submissions being checked, statistics being gathered) at one time; more wait, one per connection.
pub const HELPERS_MAX: usize = 64;
/// Helper threads of one user at one time: a user whose files hang keeps no more than these.
pub const HELPERS_PER_USER_MAX: usize = 4;
/// How long a leaving daemon waits for helpers that hang.
pub const HELPER_PATIENCE: Duration = Duration::from_secs(10);
/// Descriptors of one user that may wait to be closed behind one that hangs: with more the user is not served.
pub const UNCLOSED_PER_USER_MAX: usize = 64;
/// A close that takes longer hangs.
pub const CLOSE_PATIENCE: Duration = Duration::from_secs(1);
/// A connection with more unsent bytes than this is asked nothing new until it has read.
pub const UNSENT_HIGH: usize = 64 * 1024;
/// Bytes of replies held for clients of one user that do not read: with more, the one that owes most is disconnected.
pub const UNSENT_PER_USER_MAX: usize = 16 << 20;
/// The same for all users together: the user that owes most pays.
pub const UNSENT_ALL_MAX: usize = 32 << 20;
/// A line begun must be complete within this time.
pub const LINE_TIME: Duration = Duration::from_secs(30);
/// Seconds for which a client may leave everything unread before it is taken for dead.
pub const STALL_SECONDS: u64 = 600;
/// How long a leaving daemon waits for clients to take the last replies and events.
pub const LINGER: Duration = Duration::from_secs(5);
/// Pause in accepting after the process ran out of descriptors.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// How long a starting daemon waits for the one that holds the lock to answer or to leave.
pub const START_RACE_TIME: Duration = Duration::from_secs(30);

/// Accepting a client of an export never waits; when it takes longer than this, the socket's owner has seen to that.
pub const ACCEPT_STUCK: Duration = Duration::from_secs(1);
/// Clients of exports that haggle at one time. With more, the oldest of whoever has most is disconnected: nobody else is kept out.
pub const HAGGLERS_MAX: usize = 256;
/// Those of one peer (a user on a Unix socket, an address on a TCP socket) of one listening socket: an honest one opens a few
/// connections, and is done with each in milliseconds.
pub const HAGGLERS_PER_PEER_MAX: usize = 64;
/// A peer that has as many is let in again when its oldest has haggled for longer than this: then it is that one that hangs.
pub const HAGGLE_GRACE: Duration = Duration::from_secs(3);
/// Haggling must be over within this time, all of it.
pub const HAGGLE_TIME: Duration = Duration::from_secs(30);
/// Bytes a client may send while it haggles: hundreds of options of usual length, or thirty of the longest.
pub const HAGGLE_BYTES_MAX: usize = 1 << 20;
/// Options of one client: a listing of all exports of a socket, each with what is to be known of it.
pub const HAGGLE_OPTIONS_MAX: u32 = 1024;
/// Steps of one client that haggles in one turn of the loop (a receive, or an option), so that one that has much to say does not starve others.
pub const HAGGLE_STEPS_PER_TURN: u32 = 16;
/// Connections of one export: sixteen clients with sixteen connections each.
pub const CONNECTIONS_PER_EXPORT_MAX: u32 = 256;
/// Exports on one listening socket.
pub const EXPORTS_PER_SOCKET_MAX: usize = 256;
/// A listening socket's clients that were refused are logged once in this time, by number.
pub const REFUSED_LOG_TIME: Duration = Duration::from_secs(60);

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

/// Exports being opened, served or ended at one time: each has a thread that sleeps.
pub const EXPORTS_MAX: usize = 256;
/// Exports of one user. Below the total, so that no user can keep all others from exporting.
pub const EXPORTS_PER_USER_MAX: usize = 64;
/// Ended exports remembered.
pub const EXPORTS_REMEMBERED: usize = 64;
/// Longest name of an export, bytes.
pub const EXPORT_NAME_MAX: usize = 1024;
/// Longest description of an export, bytes: what the protocol allows of any text.
pub const EXPORT_DESCRIPTION_MAX: usize = 4096;
/// Longest address of a listening socket, bytes: a host's name is at most 255, a Unix socket's path 107.
pub const EXPORT_ADDRESS_MAX: usize = 512;
/// A client for which one buffer has waited so long, to be taken or to be filled, is disconnected when buffers run short: it keeps them from
/// others. However little comes and goes: of what a client may have waiting, some MiB, 100 KiB each second are enough.
pub const CLIENT_STALLED: Duration = Duration::from_secs(60);
/// Shared buffers of exports on each worker, bytes: taken with the first export, beside [`ALL_WORKERS_MEMORY`], and kept.
pub const EXPORT_WORKER_MEMORY: u64 = 19 << 20;
/// Buffers of one client of an export, bytes, TLS included: kept for the next one.
pub const EXPORT_CLIENT_MEMORY: u64 = 320 << 10;
/// How long an export that ends waits for clients to take what they have asked for; then they are dropped.
pub const EXPORT_DRAIN: Duration = Duration::from_secs(15);

/// Longest name and failure message in a `list`, bytes; `show` has them whole. Enough for nearly every path.
pub const LIST_TEXT: usize = 128;
/// Longest entry of a `list` as JSON, bytes: two names and a message in which every byte is escaped (`\\u0001`), and 21
/// fields of at most 64 bytes.
pub const LIST_ENTRY_MAX: usize = 3 * 6 * LIST_TEXT + 21 * 64;

/// Bytes of one buffer by default, where the budget of all workers allows it: see [`buffer_bytes`].
pub const BUFFER_BYTES: u32 = 1 << 20;
/// Smallest buffer by default while it is for us to choose: a chunk of this is still cheap per byte.
pub const BUFFER_BYTES_DEFAULT_MIN: u32 = 256 << 10;
/// Smallest buffer.
pub const BUFFER_BYTES_MIN: u32 = 64 << 10;
/// Largest buffer.
pub const BUFFER_BYTES_MAX: u32 = 16 << 20;
/// Fewest buffers of one worker that may be configured.
pub const BUFFERS_PER_WORKER_MIN: u32 = 4;
/// Most buffers of one worker.
pub const BUFFERS_PER_WORKER_MAX: u32 = 256;
/// Most workers by default: as many as the budget feeds. One core encrypts faster than most devices write.
pub const WORKERS_DEFAULT_MAX: usize = 32;
/// Fewest buffers of one worker by default: below this a device runs dry between two chunks.
pub const BUFFERS_PER_WORKER_DEFAULT_MIN: u32 = 8;
/// Buffer memory of one worker by default, bytes.
pub const WORKER_MEMORY: u64 = 32 << 20;
/// Buffer memory of all workers by default, bytes, however many CPUs there are: what keeps the process below 96 MiB.
pub const ALL_WORKERS_MEMORY: u64 = 64 << 20;
/// Buffer memory of all re-encryptions, bytes: with the workers' own, what keeps the process below 256 MiB. The first one gets three
/// quarters: two hotzones of 64 MiB, with room for the checksums of a header.
pub const REWRITE_MEMORY: u64 = 160 << 20;
/// And of one of them at least.
pub const REWRITE_MEMORY_MIN: u64 = 16 << 20;
/// Most workers.
pub const WORKERS_MAX: usize = 1024;

const _: () = assert!(CONNECTIONS_PER_USER_MAX < CONNECTIONS_MAX);
const _: () =
    assert!(CONNECTIONS_PER_USER_MAX >= 1024, "a thousand idle connections of one user are promised");
const _: () = assert!(2 * HAGGLERS_PER_PEER_MAX < HAGGLERS_MAX, "no two peers fill the place");
const _: () = assert!(3 * EXPORTS_PER_SOCKET_MAX < HAGGLE_OPTIONS_MAX as usize);
const _: () = assert!(UNSENT_HIGH <= proto::MAX_RESPONSE);
const _: () = assert!(HELPERS_PER_USER_MAX < HELPERS_MAX);
const _: () =
    assert!(proto::MAX_RESPONSE + UNSENT_HIGH <= UNSENT_PER_USER_MAX, "the longest reply is no offence");
const _: () = assert!(UNSENT_PER_USER_MAX <= UNSENT_ALL_MAX);
const _: () = assert!(
    (REMEMBERED_JOBS + JOBS_MAX) as usize * (LIST_ENTRY_MAX + 1) + 64 <= proto::MAX_RESPONSE,
    "all remembered jobs and all that one user may have waiting fit a list"
);
const _: () = assert!(EXPORTS_PER_USER_MAX < EXPORTS_MAX);
const _: () = assert!(
    (EXPORTS_MAX + EXPORTS_REMEMBERED) * (6 * (2 * LIST_TEXT + EXPORT_NAME_MAX + EXPORT_ADDRESS_MAX) + 2048)
        <= proto::MAX_RESPONSE,
    "all exports fit a list: volume and failure shortened, name and address whole, numbers of seven commands"
);
const _: () =
    assert!(REWRITE_MEMORY_MIN <= REWRITE_MEMORY && ALL_WORKERS_MEMORY + REWRITE_MEMORY < 256 << 20);
const _: () = assert!(
    WORKERS_DEFAULT_MAX as u64 * BUFFER_BYTES_DEFAULT_MIN as u64 * BUFFERS_PER_WORKER_DEFAULT_MIN as u64
        <= ALL_WORKERS_MEMORY
);
const _: () = assert!(proto::MAX_NAME * 6 * 2 + 4096 <= proto::MAX_LINE, "two escaped names fit a line");
const _: () = assert!(BUFFER_BYTES_MIN <= BUFFER_BYTES && BUFFER_BYTES <= BUFFER_BYTES_MAX);
const _: () = assert!(BUFFER_BYTES.is_power_of_two());
const _: () = assert!(BUFFERS_PER_WORKER_MIN <= BUFFERS_PER_WORKER_DEFAULT_MIN);
const _: () = assert!(BUFFERS_PER_WORKER_DEFAULT_MIN <= BUFFERS_PER_WORKER_MAX);
const _: () = assert!(WORKER_MEMORY <= ALL_WORKERS_MEMORY);
const _: () =
    assert!(WATCH_INTERVAL_MS.0 <= WATCH_INTERVAL_MS.1 && WATCH_INTERVAL_MS.1 <= WATCH_INTERVAL_MS.2);
const _: () = assert!(RUNNING_JOBS <= JOBS_MAX && JOBS_PER_USER <= JOBS_MAX);

/// Workers when none are configured.
#[must_use]
pub fn workers(cpus: usize) -> usize {
    cpus.min(WORKERS_DEFAULT_MAX)
}

/// Bytes of one buffer when none are configured: the largest of which every worker can have enough within the budget. More
/// workers than are started by default may be configured; they get the smallest buffers there are.
#[must_use]
pub fn buffer_bytes(workers: u32) -> u32 {
    let fewest = u64::from(workers.max(1)) * u64::from(BUFFERS_PER_WORKER_DEFAULT_MIN);
    let mut bytes = BUFFER_BYTES;
    while bytes > BUFFER_BYTES_MIN && u64::from(bytes) * fewest > ALL_WORKERS_MEMORY {
        bytes /= 2;
    }
    bytes
}

/// Buffers of one worker when none are configured: its share of the budget, in whole buffers. Never below what a device
/// needs, so a configured buffer size can exceed the budget.
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
        assert_eq!(buffers_per_worker(64, 1 << 20), 8, "a configured size wins over the budget");
        assert_eq!(buffers_per_worker(1, 64 << 10), 256);
    }

    #[test]
    fn the_defaults_stay_within_the_budget_on_every_machine() {
        for cpus in 1..=2048 {
            let workers = u32::try_from(workers(cpus)).expect("few");
            let (bytes, buffers) =
                (buffer_bytes(workers), buffers_per_worker(workers, buffer_bytes(workers)));
            let all = u64::from(workers) * u64::from(bytes) * u64::from(buffers);
            assert!(all <= ALL_WORKERS_MEMORY, "{cpus} CPUs: {all} bytes");
            assert!(
                buffers >= BUFFERS_PER_WORKER_DEFAULT_MIN && bytes >= BUFFER_BYTES_DEFAULT_MIN,
                "{cpus} CPUs"
            );
        }
        assert_eq!(
            [1, 8, 9, 16, 17, 32, 64, 128, 1024].map(buffer_bytes),
            [1 << 20, 1 << 20, 512 << 10, 512 << 10, 256 << 10, 256 << 10, 128 << 10, 64 << 10, 64 << 10,]
        );
    }
}
