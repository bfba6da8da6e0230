//! What users see, as exact text.

use super::*;
use proto::{Failure, Hello, Outcome, Progress, Stage, StageStats, WorkerStatus};

fn info() -> JobInfo {
    JobInfo {
        job: 3,
        uid: 1000,
        action: Action::Encrypt,
        source: "disk.img".into(),
        sink: "disk.enc".into(),
        state: JobState::Running,
        detached: true,
        submitted_ms: 0,
        progress: Progress {
            done_bytes: 1 << 30,
            total_bytes: Some(4 << 30),
            hole_bytes: 1 << 20,
            elapsed_seconds: 1.0,
            bytes_per_second: 1_073_741_824.0,
            eta_seconds: Some(3.0),
            bottleneck: Some(Stage::Write),
            ..Progress::default()
        },
        outcome: None,
    }
}

fn done() -> JobInfo {
    let mut job = info();
    job.state = JobState::Done;
    job.progress.done_bytes = 4 << 30;
    job.outcome = Some(Outcome {
        seconds: 4.0,
        failure: None,
        first_difference: None,
        bench: vec![],
        reencrypt: None,
        padded_bytes: 24,
        cpu_seconds: (0.2, 0.4),
    });
    job
}

#[test]
fn jobs_are_listed_in_columns() {
    let mut second = done();
    second.job = 12;
    second.sink = "-".into();
    let text = jobs(&[info(), second], false);
    assert_eq!(
        text,
        "\
ID  ACTION   STATE    DONE     BYTES        RATE   LEFT  SRC       DST
 3  encrypt  running   25%  1.00 GiB  1.00 GiB/s  3.0 s  disk.img  disk.enc
12  encrypt  done     100%  4.00 GiB           -      -  disk.img  -
"
    );
}

#[test]
fn only_the_head_is_coloured() {
    let text = jobs(&[info()], true);
    assert!(text.starts_with("\x1b[1mID"));
    assert_eq!(text.matches('\x1b').count(), 2);
}

#[test]
fn names_from_elsewhere_cannot_steer_the_terminal() {
    let mut hostile = info();
    hostile.source = "\x1b]0;owned\x07".into();
    assert!(!jobs(&[hostile.clone()], false).contains('\x1b'));
    assert!(!job(&hostile).contains('\x07'));
}

#[test]
fn one_job_is_shown_in_full() {
    let mut failed = done();
    failed.state = JobState::Failed;
    let outcome = failed.outcome.as_mut().expect("done");
    outcome.padded_bytes = 0;
    outcome.first_difference = Some(4096);
    outcome.failure =
        Some(Failure { kind: proto::ErrorKind::Difference, message: "plaintext differs".into(), hint: None });
    assert_eq!(
        job(&failed),
        "\
job               3
action            encrypt
state             failed
owner             uid 1000, detached
source            disk.img
sink              disk.enc
progress          4.00 GiB of 4.00 GiB
running for       1.0 s
source holes      1.00 MiB
took              4.0 s
first difference  byte 4096
reason            plaintext differs
"
    );
}

#[test]
fn the_summary_has_the_numbers_that_matter() {
    assert_eq!(
        summary(&done()),
        "encrypted 4.00 GiB in 4.0 s, 1.00 GiB/s, 0.150 cpu s/GiB, 1.00 MiB of source holes, padded with 24 zero bytes"
    );
}

#[test]
fn stats_show_each_stage_and_the_bottleneck() {
    let stage = |stage, share| StageStats {
        stage,
        count: 4096,
        bytes: 4 << 30,
        share,
        min_ns: 1,
        p50_ns: 850,
        p90_ns: 12_400,
        p99_ns: 3_100_000,
        p999_ns: 40_000_000,
        max_ns: 1_200_000_000,
    };
    let text = stats(
        &Stats {
            job: Some(3),
            bytes: 4 << 30,
            bytes_per_second: 1_073_741_824.0,
            stages: vec![stage(Stage::Read, 0.25), stage(Stage::Write, 0.75)],
            bottleneck: Some(Stage::Write),
            syscalls: 9000,
        },
        false,
    );
    assert_eq!(
        text,
        "\
job 3: 4.00 GiB at 1.00 GiB/s, 9000 system calls, bottleneck write
STAGE  COUNT     BYTES  SHARE     P50      P90      P99     P99.9     MAX
read    4096  4.00 GiB  25.0%  850 ns  12.4 µs  3.10 ms  40.00 ms  1.20 s
write   4096  4.00 GiB  75.0%  850 ns  12.4 µs  3.10 ms  40.00 ms  1.20 s
"
    );
}

#[test]
fn a_bench_states_the_limit_beside_the_number() {
    let row = BenchRow {
        kernel: "aes-ni".into(),
        operation: "encrypt".into(),
        key_bits: 256,
        data_unit: 4096,
        bytes_per_second: 4.5 * 1_073_741_824.0,
        spread: (4.0 * 1_073_741_824.0, 5.0 * 1_073_741_824.0),
        limit_bytes_per_second: Some(5.0 * 1_073_741_824.0),
    };
    let unlimited = BenchRow { kernel: "portable".into(), limit_bytes_per_second: None, ..row.clone() };
    let pipeline = BenchRow { kernel: "pipeline".into(), ..row.clone() };
    assert_eq!(
        bench(&[pipeline, row, unlimited], false),
        "\
KERNEL    OPERATION  AES  UNIT      MEDIAN      LOWEST     HIGHEST       LIMIT  OF LIMIT
pipeline  encrypt    256  4096  4.50 GiB/s  4.00 GiB/s  5.00 GiB/s  5.00 GiB/s      0.90
aes-ni    encrypt    256  4096  4.50 GiB/s  4.00 GiB/s  5.00 GiB/s  5.00 GiB/s      0.90
portable  encrypt    256  4096  4.50 GiB/s  4.00 GiB/s  5.00 GiB/s           -         -
"
    );
}

#[test]
fn the_daemon_describes_itself() {
    let worker = WorkerStatus {
        cpu: Some(0),
        queue: "threads".into(),
        queue_fallback_reason: Some("io_uring_disabled is 2".into()),
        buffers: 16,
        buffer_bytes: 1 << 20,
        buffers_registered: 0,
        buffers_locked: 8,
        pages: "base".into(),
    };
    let text = status(
        &Status {
            hello: Hello { version: "0.1.0".into(), protocol: 1, pid: 42, uid: 1000 },
            socket: Some("/run/user/1000/cryptd/cryptd.sock".into()),
            uptime_seconds: 65.0,
            kernel: "aes-ni".into(),
            kernel_forced: false,
            workers: vec![worker.clone(), WorkerStatus { cpu: Some(1), ..worker }],
            active_jobs: 2,
            active_exports: 0,
            idle_exit_seconds: Some(300),
            memlock_limit_bytes: Some(8 << 20),
            memlock_needed_bytes: Some(32 << 20),
            keys_locked: true,
            cpu_seconds: (1.5, 0.25),
            rss_peak_bytes: 40 << 20,
            rss_bytes: 30 << 20,
        },
        false,
    );
    assert_eq!(
        text,
        "\
cryptd         0.1.0, protocol 1
process        42, uid 1000, up 1m 05s
socket         /run/user/1000/cryptd/cryptd.sock
idle exit      after 300 s
kernel         aes-ni
active jobs    2
exports        0
memory         30.00 MiB resident, 40.00 MiB at most
locked memory  keys locked, limit 8.00 MiB (ulimit -l), 32.00 MiB would lock everything
cpu            1.50 s user, 0.25 s system

WORKER  CPU  QUEUE    BUFFERS        OF  REGISTERED  LOCKED  PAGES
     0    0  threads       16  1.00 MiB           0       8  base
     1    1  threads       16  1.00 MiB           0       8  base
not io_uring: io_uring_disabled is 2
"
    );
}
