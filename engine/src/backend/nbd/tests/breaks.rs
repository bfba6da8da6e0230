//! What is believed, and for how long, of a server that was lost and came back.

use super::*;

#[test]
fn what_was_written_and_may_be_lost_is_not_read_as_it_was_before() {
    let server = Returning::new("stale", 5000, |number, mut stream| {
        if number == 0 {
            acknowledge(&mut stream, 4096);
            // Of two reads, neither is answered.
            hear(&mut stream);
            hear(&mut stream);
            return;
        }
        // It has forgotten all of it.
        while let Ok(()) = stream.read_exact(&mut [0; 8]) {
            let mut rest = [0; 20];
            stream.read_exact(&mut rest).expect("a request");
            let cookie = u64::from_be_bytes(rest[..8].try_into().expect("8 bytes"));
            let length = u32::from_be_bytes(rest[16..].try_into().expect("4 bytes"));
            let _ = stream.write_all(&data(FLAG_DONE, cookie, 0, &vec![0; length as usize]));
        }
    });
    let device = server.open();
    let mut arena = Arena::new(3, 4096).expect("arena");
    let mut queue = open_queue(QueueChoice::Threads, &arena, 4).expect("queue");
    let port = queue.attach(Arc::clone(device.file())).expect("attached");
    let mut free = arena.take_all();
    let next = |queue: &mut Box<dyn Queue>, count: usize| {
        let deadline = Instant::now() + PATIENCE;
        let mut done = Vec::new();
        while done.len() < count {
            assert!(Instant::now() < deadline, "nothing completes");
            queue.wait(Some(deadline)).expect("wait");
            queue.reap(&mut done);
        }
        done
    };
    let mut buf = free.pop().expect("a buffer");
    buf.fill(1);
    let what = What::Write { position: Position::At(0), buf, span: 0..4096 };
    queue.push(Op { token: 1, port, what }).expect("accepted");
    let done = next(&mut queue, 1).remove(0);
    assert_eq!(done.result.expect("acknowledged"), 4096);
    free.extend(done.buf);
    let read = |queue: &mut Box<dyn Queue>, token: u64, buf: Buf| {
        let what = What::Read { position: Position::At(0), buf, span: 0..4096 };
        queue.push(Op { token, port, what }).expect("accepted");
    };
    // Two that are under way when it breaks, and one after that.
    for token in [2, 3] {
        read(&mut queue, token, free.pop().expect("a buffer"));
    }
    let mut done = next(&mut queue, 2);
    read(&mut queue, 4, done[0].buf.take().expect("back"));
    done.extend(next(&mut queue, 1));
    for done in done {
        let text = done.result.expect_err("not known any more").to_string();
        assert!(text.contains("may be lost"), "{}: {text}", done.token);
    }
    queue.detach(port);
}

#[test]
fn a_server_that_comes_back_and_says_nothing_is_given_up() {
    let silent = Mutex::new(Vec::new());
    let server = Returning::new("silent", 1000, move |_, stream| {
        silent.lock().expect("alone").push(stream);
    });
    let device = server.open();
    let volume = find(device.file()).expect("remote");
    volume.connections[0].set_patience(Duration::from_millis(800));
    drop(volume);
    let mut blocking = Blocking::open(Arc::clone(device.file()), "remote", 1).expect("blocking");
    let error = blocking.read(0, &mut [0; 8]).expect_err("never answered").chain();
    assert!(error.contains("broke before a reply"), "{error}");
    // Once more for what is left of the second after its first silence; by the waits in between alone it would be four times.
    let connected = server.connected.load(Ordering::Acquire);
    assert!((2..=3).contains(&connected), "connected {connected} times");
    drop((blocking, device));
}

#[test]
fn a_connection_too_many_is_done_without() {
    let (first, theirs) = UnixStream::pair().expect("sockets");
    let facts = [export(1 << 20, PLAIN | flags::CAN_MULTI_CONN), blocks(1, 4096, 1 << 16)];
    let others: Vec<_> = (0..3).map(|_| UnixStream::pair().expect("sockets")).collect();
    let (spares, mut servers): (Vec<_>, Vec<_>) = others.into_iter().unzip();
    for mut server in [&theirs, &servers[0]] {
        server.write_all(&script(&facts)).expect("room");
    }
    // The third is turned away, and the fourth never heard.
    servers[1].shutdown(std::net::Shutdown::Both).expect("shut down");
    let all = std::iter::once(first).chain(spares).map(OwnedFd::from).collect();
    let device = open(all, &remote(), None, "remote", BOTH).expect("opened with what there is");
    assert_eq!(device.remote().expect("remote").connections(), 2);
    assert_eq!(servers[2].read(&mut [0]).expect("hung up on"), 0);
    drop(device);
    // What leads elsewhere is nobody's connection.
    let pairs: Vec<_> = (0..2).map(|_| UnixStream::pair().expect("sockets")).collect();
    for ((_, server), size) in pairs.iter().zip([1 << 20, 2 << 20]) {
        let mut server = server;
        server.write_all(&script(&[export(size, PLAIN | flags::CAN_MULTI_CONN)])).expect("room");
    }
    let (all, _servers): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
    let all = all.into_iter().map(OwnedFd::from).collect();
    let error = open(all, &remote(), None, "remote", BOTH).expect_err("two exports");
    assert_eq!(error.kind(), ErrorKind::Conflict, "{}", error.chain());
}
