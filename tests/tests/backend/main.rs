//! The contract of [`engine::backend::Queue`]: one suite, every queue.

mod bench;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bench::*;
use engine::backend::device::{Device, Purpose};
use engine::backend::{Op, Port, Position, Refused, What};
use engine::sys::buffer::Arena;

/// Long enough for any machine, and only reached by a failing test.
const PATIENCE: Duration = Duration::from_secs(60);

const EIO: i32 = 5;
const ENOSPC: i32 = 28;
const EPIPE: i32 = 32;
const ECANCELED: i32 = 125;

fn writes_are_read_back_at_odd_offsets_and_lengths(make: Make) {
    let Some(mut bench) = bench(make, 4, 65536, 4) else { return };
    let (_scratch, file) = (make.file)();
    let port = bench.attach(file);
    for (offset, length) in [(0, 1), (1, 511), (513, 4097), (70_001, 65_536), ((1 << 33) + 7, 12_345)] {
        let bytes = noise(offset, length);
        assert_eq!(bench.write(port, Position::At(offset), &bytes).expect("write") as usize, length);
        let span = u32::try_from(65_536 - length).expect("fits")..65_536;
        assert!(bench.read(port, Position::At(offset), span) == bytes, "at {offset}");
    }
}

fn a_read_is_short_only_at_the_end_of_the_file(make: Make) {
    let Some(mut bench) = bench(make, 2, 65536, 4) else { return };
    let (_scratch, file) = (make.file)();
    let bytes = noise(5, 100_001);
    file.write_all_at(&bytes, 0).expect("write");
    let port = bench.attach(file);
    assert!(bench.read(port, Position::At(0), 0..65_536) == bytes[..65_536]);
    assert!(bench.read(port, Position::At(65_536), 0..65_536) == bytes[65_536..]);
    assert_eq!(bench.read(port, Position::At(100_001), 0..65_536), [0_u8; 0]);
    assert_eq!(bench.read(port, Position::At(1 << 40), 0..65_536), [0_u8; 0]);
    assert_eq!(bench.read(port, Position::At(0), 9..9), [0_u8; 0]);
}

fn a_direct_read_finds_the_odd_end_of_a_file(make: Make) {
    let Some(mut bench) = bench(make, 2, 65536, 4) else { return };
    let (_scratch, file) = (make.file)();
    let bytes = noise(6, 65_536 + 4096 + 100);
    file.write_all_at(&bytes, 0).expect("write");
    let purpose = Purpose { read: true, write: true, stream: false };
    let device = Device::from_fd(file.into(), "scratch", purpose).expect("device");
    if !device.enable_direct() {
        eprintln!("SKIPPED: no direct I/O on {}", env!("CARGO_TARGET_TMPDIR"));
        return;
    }
    let port = bench.queue.attach(Arc::clone(device.file())).expect("attach");
    assert!(bench.read(port, Position::At(0), 0..65_536) == bytes[..65_536]);
    assert!(bench.read(port, Position::At(65_536), 0..65_536) == bytes[65_536..]);
    // An odd tail is written the buffered way.
    assert!(device.disable_direct());
    let tail = noise(7, 333);
    assert_eq!(bench.write(port, Position::At(65_536 + 4096), &tail).expect("write"), 333);
    assert!(device.enable_direct());
    let got = bench.read(port, Position::At(65_536), 0..65_536);
    assert!(got[..4096] == bytes[65_536..65_536 + 4096] && got[4096..] == tail);
}

fn a_full_queue_gives_the_operation_back(make: Make) {
    let Some(mut bench) = bench(make, 3, 4096, 2) else { return };
    let (read, mut write) = std::io::pipe().expect("pipe");
    let port = bench.attach(read);
    for token in 0..2 {
        bench.push(token, port, What::Ready { read: true });
    }
    let mut buf = bench.buf();
    buf[..4].copy_from_slice(b"mine");
    let op = Op { token: 9, port, what: What::Read { position: Position::Stream, buf, span: 1..3 } };
    let (why, op) = bench.queue.push(op).expect_err("full");
    assert_eq!((why, op.token, op.port), (Refused::Full, 9, port));
    let What::Read { buf, span, .. } = op.what else { panic!("another operation") };
    assert_eq!((&buf[..4], span), (&b"mine"[..], 1..3));
    bench.free.push(buf);
    write.write_all(b"x").expect("write");
    let mut done = bench.next();
    while done.len() < 2 {
        done.extend(bench.next());
    }
    // What was collected makes room again.
    assert_eq!(bench.queue.in_flight(), 0);
    assert_eq!(bench.read(port, Position::Stream, 0..1), b"x");
}

fn an_unknown_port_is_refused(make: Make) {
    let Some(mut bench) = bench(make, 1, 4096, 2) else { return };
    let port = bench.attach(File::open("/dev/zero").expect("open"));
    let unknown = Port(port.0 + 1);
    let (why, _) = bench.queue.push(Op { token: 0, port: unknown, what: What::Flush }).expect_err("unknown");
    assert_eq!(why, Refused::UnknownPort);
    bench.queue.detach(port);
    let (why, _) = bench.queue.push(Op { token: 0, port, what: What::Flush }).expect_err("detached");
    assert_eq!(why, Refused::UnknownPort);
    // The place is free for another file.
    let (_scratch, file) = (make.file)();
    file.write_all_at(b"other", 0).expect("write");
    let port = bench.attach(file);
    assert_eq!(bench.read(port, Position::At(0), 0..100), b"other");
}

fn a_detached_file_is_closed(make: Make) {
    let Some(mut bench) = bench(make, 1, 4096, 2) else { return };
    let (mut read, write) = std::io::pipe().expect("pipe");
    let port = bench.attach(write);
    assert_eq!(bench.write(port, Position::Stream, b"last").expect("write"), 4);
    bench.queue.detach(port);
    let mut all = Vec::new();
    read.read_to_end(&mut all).expect("the end of the pipe arrives");
    assert_eq!(all, b"last");
}

fn every_operation_returns_exactly_once(make: Make) {
    let Some(mut bench) = bench(make, 32, 8192, 32) else { return };
    let (_scratch, file) = (make.file)();
    let port = bench.attach(file);
    let mut seen = [0u32; 500];
    let mut next = 0u64;
    let mut left = seen.len();
    while left > 0 {
        while let Some(buf) = bench.free.pop() {
            if next == 500 {
                bench.free.push(buf);
                break;
            }
            let position = Position::At(next % 40 * 8192);
            let what = match next % 3 {
                0 => What::Read { position, buf, span: 0..8192 },
                1 => What::Write { position, buf, span: 0..8192 },
                _ => {
                    bench.free.insert(0, buf);
                    What::Flush
                }
            };
            bench.push(next, port, what);
            next += 1;
            if bench.queue.in_flight() == 32 {
                break;
            }
        }
        for done in bench.next() {
            seen[usize::try_from(done.token).expect("small")] += 1;
            assert!(done.result.is_ok());
            assert_eq!(done.buf.is_some(), done.token % 3 != 2);
            bench.free.extend(done.buf);
            left -= 1;
        }
    }
    assert!(seen.iter().all(|&times| times == 1));
    assert_eq!((bench.queue.in_flight(), bench.free.len()), (0, 32));
}

fn dropping_a_queue_drains_it(make: Make) {
    let Some(mut bench) = bench(make, 4, 1 << 20, 8) else { return };
    let (_scratch, file) = (make.file)();
    let (read, write) = std::io::pipe().expect("pipe");
    let (file, pipe) = (bench.attach(file), bench.attach(read));
    for token in 0..3 {
        let buf = bench.buf();
        bench.push(token, file, What::Write { position: Position::At(token << 20), buf, span: 0..1 << 20 });
    }
    let buf = bench.buf();
    bench.push(3, pipe, What::Read { position: Position::Stream, buf, span: 0..100 });
    bench.queue.kick().expect("kick");
    // Returns although the pipe never becomes readable, and lets go of the buffers and the files.
    drop(bench);
    let mut write = write;
    let error = write.write_all(b"x").expect_err("the read end is closed");
    assert_eq!(error.raw_os_error(), Some(EPIPE));
}

fn a_blocked_pipe_read_can_be_cancelled(make: Make) {
    let Some(mut bench) = bench(make, 2, 65536, 4) else { return };
    let (read, mut write) = std::io::pipe().expect("pipe");
    let (_scratch, file) = (make.file)();
    let (pipe, other) = (bench.attach(read), bench.attach(file));
    let buf = bench.buf();
    bench.push(1, pipe, What::Read { position: Position::Stream, buf, span: 0..65_536 });
    bench.push(2, pipe, What::Ready { read: true });
    bench.queue.kick().expect("kick");
    // Others go on meanwhile.
    bench.push(3, other, What::Flush);
    let done = bench.next();
    assert_eq!((done.len(), done[0].token), (1, 3));
    bench.queue.cancel(pipe);
    let mut done = bench.next();
    while done.len() < 2 {
        done.extend(bench.next());
    }
    done.sort_by_key(|done| done.token);
    assert_eq!(
        done.iter().map(|done| (done.token, errno(done))).collect::<Vec<_>>(),
        [(1, Some(ECANCELED)), (2, Some(ECANCELED))]
    );
    bench.free.extend(done.remove(0).buf);
    assert_eq!(bench.free.len(), 2);
    // The port is as good as before.
    write.write_all(b"again").expect("write");
    drop(write);
    assert_eq!(bench.read(pipe, Position::Stream, 0..100), b"again");
}

fn a_blocked_pipe_write_can_be_cancelled(make: Make) {
    let Some(mut bench) = bench(make, 1, 1 << 20, 4) else { return };
    let (mut read, write) = std::io::pipe().expect("pipe");
    let port = bench.attach(write);
    let buf = bench.buf();
    bench.push(1, port, What::Write { position: Position::Stream, buf, span: 0..1 << 20 });
    bench.queue.kick().expect("kick");
    // The pipe holds 64 KiB: the rest is stuck.
    bench.queue.wait(Some(Instant::now() + Duration::from_millis(50))).expect("wait");
    let mut done = Vec::new();
    bench.queue.reap(&mut done);
    assert!(done.is_empty());
    bench.queue.cancel(port);
    let done = bench.next();
    assert_eq!((done.len(), errno(&done[0])), (1, Some(ECANCELED)));
    bench.queue.detach(port);
    drop(bench);
    let mut all = Vec::new();
    read.read_to_end(&mut all).expect("what had been written");
    assert!(all.len() < 1 << 20);
}

fn a_pipe_carries_everything_in_order(make: Make) {
    let Some(mut bench) = bench(make, 2, 1 << 20, 4) else { return };
    let (read_in, mut write_in) = std::io::pipe().expect("pipe");
    let (mut read_out, write_out) = std::io::pipe().expect("pipe");
    let sent = noise(8, 5_000_003);
    let expected = sent.clone();
    let sender = std::thread::spawn(move || {
        // Odd pieces, so that nothing arrives aligned.
        for piece in sent.chunks(77_777) {
            write_in.write_all(piece).expect("send");
        }
    });
    let receiver = std::thread::spawn(move || {
        let mut all = Vec::new();
        read_out.read_to_end(&mut all).expect("receive");
        all
    });
    let (source, sink) = (bench.attach(read_in), bench.attach(write_out));
    loop {
        let bytes = bench.read(source, Position::Stream, 0..1 << 20);
        if bytes.is_empty() {
            break;
        }
        assert_eq!(bench.write(sink, Position::Stream, &bytes).expect("write") as usize, bytes.len());
        if bytes.len() < 1 << 20 {
            // Short only at the end.
            assert_eq!(bench.read(source, Position::Stream, 0..1), [0_u8; 0]);
        }
    }
    bench.queue.detach(sink);
    sender.join().expect("sender");
    assert!(receiver.join().expect("receiver") == expected);
}

fn a_nonblocking_pipe_is_waited_for(make: Make) {
    let Some(mut bench) = bench(make, 1, 65536, 4) else { return };
    let (read, mut write) = std::io::pipe().expect("pipe");
    let flags = rustix::fs::fcntl_getfl(&read).expect("flags");
    rustix::fs::fcntl_setfl(&read, flags | rustix::fs::OFlags::NONBLOCK).expect("set");
    let port = bench.attach(read);
    let buf = bench.buf();
    bench.push(1, port, What::Read { position: Position::Stream, buf, span: 0..6 });
    bench.queue.wait(Some(Instant::now() + Duration::from_millis(20))).expect("wait");
    write.write_all(b"abc").expect("write");
    bench.queue.wait(Some(Instant::now() + Duration::from_millis(20))).expect("wait");
    write.write_all(b"def").expect("write");
    let done = bench.next();
    assert_eq!(done[0].result.as_ref().expect("read"), &6);
    assert_eq!(&done[0].buf.as_ref().expect("buffer")[..6], b"abcdef");
}

fn a_stream_on_a_file_goes_on_from_its_position(make: Make) {
    let Some(mut bench) = bench(make, 1, 65536, 4) else { return };
    let (_scratch, mut file) = (make.file)();
    file.write_all(b"head and body").expect("write");
    rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(5)).expect("seek");
    let port = bench.attach(file.try_clone().expect("clone"));
    assert_eq!(bench.read(port, Position::Stream, 0..3), b"and");
    assert_eq!(bench.read(port, Position::Stream, 0..100), b" body");
    assert_eq!(bench.read(port, Position::At(0), 0..4), b"head");
    assert_eq!(bench.write(port, Position::Stream, b"!").expect("write"), 1);
    let mut all = [0; 14];
    file.read_exact_at(&mut all, 0).expect("read");
    assert_eq!(&all, b"head and body!");
}

fn a_full_sink_is_an_error(make: Make) {
    let Some(mut bench) = bench(make, 1, 65536, 4) else { return };
    let full = File::options().read(true).write(true).open("/dev/full").expect("open");
    let port = bench.attach(full);
    let error = bench.write(port, Position::At(0), &[1; 65_536]).expect_err("full");
    assert_eq!(error.raw_os_error(), Some(ENOSPC));
    let error = bench.write(port, Position::Stream, &[1; 65_536]).expect_err("full");
    assert_eq!(error.raw_os_error(), Some(ENOSPC));
}

fn a_failing_backend_is_an_error(make: Make) {
    let Some(mut bench) = bench(make, 1, 65536, 4) else { return };
    // Nothing is mapped at the lowest addresses.
    let port = bench.attach(File::open("/proc/self/mem").expect("open"));
    let buf = bench.buf();
    let done = bench.run(port, What::Read { position: Position::At(4096), buf, span: 0..100 });
    assert_eq!(errno(&done), Some(EIO));
    assert!(done.buf.is_some());
}

fn a_read_only_file_cannot_be_written(make: Make) {
    let Some(mut bench) = bench(make, 1, 65536, 4) else { return };
    let (scratch, _file) = (make.file)();
    let port = bench.attach(File::open(&scratch.0).expect("open"));
    let error = bench.write(port, Position::At(0), b"x").expect_err("not opened for writing");
    assert_eq!(error.raw_os_error(), Some(9), "EBADF");
}

fn a_pipe_without_a_reader_is_an_error_and_no_signal(make: Make) {
    let Some(mut bench) = bench(make, 1, 65536, 4) else { return };
    let (read, write) = std::io::pipe().expect("pipe");
    let port = bench.attach(write);
    drop(read);
    let error = bench.write(port, Position::Stream, b"x").expect_err("nobody reads");
    assert_eq!(error.raw_os_error(), Some(EPIPE));
}

fn a_wake_ends_a_wait_before_it_and_during_it(make: Make) {
    let Some(mut bench) = bench(make, 1, 4096, 4) else { return };
    let far = || Some(Instant::now() + PATIENCE);
    let deadline = far();
    let waker = bench.queue.waker();
    waker.wake();
    bench.queue.wait(deadline).expect("wait");
    for _ in 0..3 {
        let waker = bench.queue.waker();
        let other = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(10));
            waker.wake();
        });
        bench.queue.wait(deadline).expect("wait");
        other.join().expect("waker");
    }
    // A wake between a completion and the next wait is not lost to `reap`.
    let (_scratch, file) = (make.file)();
    let port = bench.attach(file);
    bench.push(1, port, What::Flush);
    assert_eq!(bench.next().len(), 1);
    waker.wake();
    bench.queue.kick().expect("kick");
    let mut done = Vec::new();
    bench.queue.reap(&mut done);
    assert!(done.is_empty());
    bench.queue.wait(deadline).expect("wait");
    assert!(Instant::now() < deadline.expect("set"), "a wake was lost");
    // And it is used up.
    let soon = Instant::now() + Duration::from_millis(30);
    bench.queue.wait(Some(soon)).expect("wait");
    assert!(Instant::now() >= soon, "a wake counted twice");
}

fn a_deadline_ends_a_wait(make: Make) {
    let Some(mut bench) = bench(make, 1, 4096, 4) else { return };
    let (read, _write) = std::io::pipe().expect("pipe");
    let port = bench.attach(read);
    bench.push(1, port, What::Ready { read: true });
    let soon = Instant::now() + Duration::from_millis(30);
    bench.queue.wait(Some(soon)).expect("wait");
    assert!(Instant::now() >= soon);
    bench.queue.wait(Some(Instant::now())).expect("a deadline of now does not sleep");
    let mut done = Vec::new();
    bench.queue.reap(&mut done);
    assert_eq!((done.len(), bench.queue.in_flight()), (0, 1));
}

fn ready_says_when_a_stream_can_move(make: Make) {
    let Some(mut bench) = bench(make, 1, 4096, 4) else { return };
    let (read, mut write) = std::io::pipe().expect("pipe");
    let write_end = write.try_clone().expect("clone");
    let (source, sink) = (bench.attach(read), bench.attach(write_end));
    assert_eq!(bench.run(sink, What::Ready { read: false }).result.expect("writable"), 0);
    bench.push(5, source, What::Ready { read: true });
    bench.queue.kick().expect("kick");
    write.write_all(b"x").expect("write");
    let done = bench.next();
    assert_eq!((done.len(), done[0].token), (1, 5));
    assert_eq!(done[0].result.as_ref().expect("readable"), &0);
    // The end counts as readable.
    assert_eq!(bench.read(source, Position::Stream, 0..1), b"x");
    bench.queue.detach(sink);
    drop(write);
    assert!(bench.run(source, What::Ready { read: true }).result.is_ok());
    assert_eq!(bench.read(source, Position::Stream, 0..1), [0_u8; 0]);
}

fn a_receive_takes_what_there_is(make: Make) {
    let Some(mut bench) = bench(make, 2, 65536, 4) else { return };
    let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().expect("sockets");
    let port = bench.attach(ours);
    let receive = |bench: &mut Bench, span: std::ops::Range<u32>| {
        let buf = bench.buf();
        let start = span.start as usize;
        let done = bench.run(port, What::Receive { buf, span });
        let count = done.result.expect("received") as usize;
        let buf = done.buf.expect("the buffer comes back");
        let bytes = buf[start..start + count].to_vec();
        bench.free.push(buf);
        bytes
    };
    theirs.write_all(b"some").expect("sent");
    assert_eq!(receive(&mut bench, 100..65_536), b"some");
    theirs.write_all(b"more than fits").expect("sent");
    assert_eq!(receive(&mut bench, 0..4), b"more");
    assert_eq!(receive(&mut bench, 0..65_536), b" than fits");
    // One that waits is ended by what comes, and not before.
    let buf = bench.buf();
    bench.push(5, port, What::Receive { buf, span: 0..65_536 });
    bench.queue.wait(Some(Instant::now() + Duration::from_millis(20))).expect("wait");
    let mut none = Vec::new();
    bench.queue.reap(&mut none);
    assert!(none.is_empty(), "nothing was sent");
    theirs.write_all(b"x").expect("sent");
    let mut done = bench.next();
    assert_eq!((done.len(), done[0].token, done[0].result.as_ref().expect("received")), (1, 5, &1));
    bench.free.extend(done.remove(0).buf);
    // One can be cancelled, and the connection is as good as before.
    let buf = bench.buf();
    bench.push(6, port, What::Receive { buf, span: 0..65_536 });
    bench.queue.kick().expect("kick");
    bench.queue.cancel(port);
    let mut done = bench.next();
    assert_eq!((done.len(), errno(&done[0])), (1, Some(ECANCELED)));
    bench.free.extend(done.remove(0).buf);
    theirs.write_all(b"end").expect("sent");
    drop(theirs);
    assert_eq!(receive(&mut bench, 0..65_536), b"end");
    assert_eq!(receive(&mut bench, 0..65_536), b"");
}

fn discarded_space_reads_as_zeros(make: Make) {
    const EOPNOTSUPP: i32 = 95;
    let Some(mut bench) = bench(make, 2, 65536, 4) else { return };
    let (_scratch, file) = (make.file)();
    let port = bench.attach(file.try_clone().expect("clone"));
    bench.write(port, Position::At(0), &[7; 65_536]).expect("written");
    let done = bench.run(port, What::Discard { offset: 4096, len: 8192 });
    if errno(&done) == Some(EOPNOTSUPP) {
        eprintln!("SKIPPED: this file makes no holes");
        return;
    }
    assert_eq!(done.result.expect("discarded"), 0);
    let bytes = bench.read(port, Position::At(0), 0..65_536);
    assert!(bytes.iter().enumerate().all(|(at, &byte)| (byte == 0) == (4096..12_288).contains(&at)));
    // The size stays.
    let done = bench.run(port, What::Discard { offset: 61_440, len: 1 << 20 });
    assert_eq!(done.result.expect("discarded"), 0);
    assert_eq!(file.metadata().expect("stat").len(), 65_536);
    let done = bench.run(port, What::Discard { offset: 0, len: 0 });
    assert_eq!(errno(&done), Some(22), "EINVAL");
}

/// Ten thousand random operations beside a model: a byte array, with reads compared against it. Operations in flight at
/// the same time touch different chunks, because the order of completion is nobody's promise.
fn random_operations_match_a_model(make: Make) {
    const CHUNK: u64 = 16 << 10;
    const CHUNKS: u64 = 64;
    const PLACES: usize = 64;
    let seed = 0x5eed_0001;
    let Some(mut bench) = bench(make, 16, 16 << 10, 16) else { return };
    let (_scratch, file) = (make.file)();
    file.set_len(CHUNK * CHUNKS).expect("extend");
    let port = bench.attach(file.try_clone().expect("clone"));
    let mut random = Random(seed);
    let mut model = vec![0u8; usize::try_from(CHUNK * CHUNKS).expect("small")];
    let mut busy = [false; PLACES];
    let mut flight: Vec<Option<(u64, u64, u32, u32)>> = vec![None; 10_000];
    let mut pushed = 0usize;
    let mut finished = 0usize;
    while finished < flight.len() {
        while pushed < flight.len() && bench.queue.in_flight() < 16 {
            let chunk = random.below(CHUNKS);
            if busy[usize::try_from(chunk).expect("small")] {
                break;
            }
            let Some(mut buf) = bench.free.pop() else { break };
            let within = random.below(CHUNK - 1);
            let length = 1 + random.below(CHUNK - within);
            let start = u32::try_from(random.below(CHUNK - length + 1)).expect("small");
            let end = start + u32::try_from(length).expect("small");
            let offset = chunk * CHUNK + within;
            let position = Position::At(offset);
            busy[usize::try_from(chunk).expect("small")] = true;
            let at = usize::try_from(offset).expect("small");
            let span = start..end;
            let what = if random.below(2) == 0 {
                flight[pushed] = Some((chunk, offset, start, end));
                What::Read { position, buf, span }
            } else {
                let bytes = noise(random.next(), (end - start) as usize);
                buf[start as usize..end as usize].copy_from_slice(&bytes);
                model[at..at + bytes.len()].copy_from_slice(&bytes);
                flight[pushed] = Some((chunk, u64::MAX, start, end));
                What::Write { position, buf, span }
            };
            bench.push(pushed as u64, port, what);
            pushed += 1;
        }
        for done in bench.next() {
            let place = &mut flight[usize::try_from(done.token).expect("small")];
            let (chunk, offset, start, end) = place.take().expect("returns once");
            busy[usize::try_from(chunk).expect("small")] = false;
            assert_eq!(
                done.result.expect("transfer"),
                end - start,
                "seed {seed:#x} operation {}",
                done.token
            );
            let buf = done.buf.expect("buffer");
            if offset != u64::MAX {
                let at = usize::try_from(offset).expect("small");
                let expected = &model[at..at + (end - start) as usize];
                assert!(
                    buf[start as usize..end as usize] == *expected,
                    "seed {seed:#x} operation {}",
                    done.token
                );
            }
            bench.free.push(buf);
            finished += 1;
        }
    }
    let mut all = vec![0; model.len()];
    file.read_exact_at(&mut all, 0).expect("read");
    assert!(all == model, "seed {seed:#x}: the file differs from the model");
}

fn buffers_of_another_arena_work_too(make: Make) {
    let Some(mut bench) = bench(make, 1, 65536, 4) else { return };
    let (_scratch, file) = (make.file)();
    file.write_all_at(b"hello", 0).expect("write");
    let port = bench.attach(file);
    let mut other = Arena::new(1, 4096).expect("arena");
    bench.free = other.take_all();
    assert_eq!(bench.read(port, Position::At(0), 0..4096), b"hello");
}

fn the_same_file_can_be_attached_twice(make: Make) {
    let Some(mut bench) = bench(make, 1, 65536, 4) else { return };
    let (_scratch, file) = (make.file)();
    let file = Arc::new(OwnedFd::from(file));
    let one = bench.queue.attach(Arc::clone(&file)).expect("attach");
    let two = bench.queue.attach(Arc::clone(&file)).expect("attach");
    assert_ne!(one, two);
    assert_eq!(bench.write(one, Position::At(3), b"x").expect("write"), 1);
    assert_eq!(bench.read(two, Position::At(0), 0..9), b"\0\0\0x");
    bench.queue.detach(one);
    assert_eq!(bench.read(two, Position::At(3), 0..9), b"x");
    assert!(rustix::fs::fstat(file.as_fd()).is_ok());
}

macro_rules! contract {
    ($make:ident, $module:ident) => {
        contract!(@ $make, $module:
            writes_are_read_back_at_odd_offsets_and_lengths,
            a_read_is_short_only_at_the_end_of_the_file,
            a_direct_read_finds_the_odd_end_of_a_file,
            a_full_queue_gives_the_operation_back,
            an_unknown_port_is_refused,
            a_detached_file_is_closed,
            every_operation_returns_exactly_once,
            dropping_a_queue_drains_it,
            a_blocked_pipe_read_can_be_cancelled,
            a_blocked_pipe_write_can_be_cancelled,
            a_pipe_carries_everything_in_order,
            a_nonblocking_pipe_is_waited_for,
            a_stream_on_a_file_goes_on_from_its_position,
            a_full_sink_is_an_error,
            a_failing_backend_is_an_error,
            a_read_only_file_cannot_be_written,
            a_pipe_without_a_reader_is_an_error_and_no_signal,
            a_wake_ends_a_wait_before_it_and_during_it,
            a_deadline_ends_a_wait,
            ready_says_when_a_stream_can_move,
            a_receive_takes_what_there_is,
            discarded_space_reads_as_zeros,
            random_operations_match_a_model,
            buffers_of_another_arena_work_too,
            the_same_file_can_be_attached_twice
        );
    };
    (@ $make:ident, $module:ident: $($name:ident),+) => {
        mod $module {
            $(#[test] fn $name() { super::$name(super::$make) })+
        }
    };
}

contract!(URING, on_io_uring);
contract!(THREADS, on_threads);
contract!(SIM, on_simulated_disks);
contract!(WORKERS, through_the_queue_of_workers);
// Not on exports: positions of a file, files that change their size.
contract!(@ REMOTE, on_exports:
    writes_are_read_back_at_odd_offsets_and_lengths,
    a_read_is_short_only_at_the_end_of_the_file,
    a_full_queue_gives_the_operation_back,
    an_unknown_port_is_refused,
    a_detached_file_is_closed,
    every_operation_returns_exactly_once,
    dropping_a_queue_drains_it,
    a_blocked_pipe_read_can_be_cancelled,
    a_blocked_pipe_write_can_be_cancelled,
    a_pipe_carries_everything_in_order,
    a_nonblocking_pipe_is_waited_for,
    a_full_sink_is_an_error,
    a_failing_backend_is_an_error,
    a_read_only_file_cannot_be_written,
    a_wake_ends_a_wait_before_it_and_during_it,
    a_deadline_ends_a_wait,
    ready_says_when_a_stream_can_move,
    a_receive_takes_what_there_is,
    random_operations_match_a_model,
    buffers_of_another_arena_work_too
);
