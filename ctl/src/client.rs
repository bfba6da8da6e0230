//! One connection to the daemon: lines out with descriptors attached, lines in with a bound.
//!
//! The daemon is believed about its jobs and about nothing else: it must run as us or as root, its lines are bounded,
//! and what it says is printed without control characters.

use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use proto::{
    Body, Call, ErrorKind, Hello, MAX_DESCRIPTORS, MAX_LINE, MAX_RESPONSE, PROTOCOL_VERSION, Reply, Request,
    Response,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg, sockopt::socket_peercred};

use crate::report::{Error, Exit, Result};

/// How long a plain question may take to answer. Opening is ours, so nothing behind it is slow but a stopped daemon.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection.
pub struct Client {
    stream: UnixStream,
    lines: Lines,
    next_id: u64,
    /// The daemon closed the connection.
    ended: bool,
    /// Who answered.
    pub hello: Hello,
}

/// A line as it came, and what it means.
pub struct Line {
    /// Without its newline.
    pub text: String,
    /// Parsed.
    pub response: Response,
}

/// What woke us.
#[derive(Debug, Clone, Copy, Default)]
pub struct Woken {
    /// There is something to read from the daemon.
    pub readable: bool,
    /// The other descriptor is readable.
    pub other: bool,
}

impl Client {
    /// Connect and shake hands. `None`: nobody listens there.
    pub fn connect(socket: &Path) -> Result<Option<Self>> {
        let shown = socket.display();
        let stream = match UnixStream::connect(socket) {
            Ok(stream) => stream,
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) =>
            {
                return Ok(None);
            }
            Err(error) => {
                let wrapped = Error::io("cannot reach the daemon", shown, error);
                return Err(Error { exit: Exit::Unreachable, ..wrapped });
            }
        };
        let peer = socket_peercred(&stream)
            .map_err(|errno| Error::unreachable(format!("cannot tell who listens on {shown}: {errno}")))?;
        let us = rustix::process::geteuid();
        if peer.uid != us && !peer.uid.is_root() {
            return Err(Error::unreachable(format!(
                "{shown} belongs to user {}, who would get your keys",
                peer.uid.as_raw()
            ))
            .hint("name your own with --socket, or remove the impostor"));
        }
        let unknown = Hello { version: String::new(), protocol: 0, pid: 0, uid: 0 };
        let mut client = Self { stream, lines: Lines::default(), next_id: 1, ended: false, hello: unknown };
        let reply = match client.call(Call::Hello {}, &[]) {
            Ok((reply, _)) => reply,
            Err(_) if client.ended => {
                // It may have refused us without waiting for our question, as when it has too many connections.
                while client.fill().is_ok() {}
                // Otherwise it was leaving: its socket took us in, but nobody will look at it any more.
                return client.answer(0)?.map_or(Ok(None), |answer| answer.and(Ok(None)));
            }
            Err(error) => return Err(error),
        };
        match reply {
            Reply::Hello(hello) if hello.protocol == PROTOCOL_VERSION => client.hello = hello,
            Reply::Hello(hello) => {
                return Err(Error::new(
                    ErrorKind::Version,
                    format!(
                        "the daemon speaks protocol {} (version {}), this cryptctl speaks {PROTOCOL_VERSION}",
                        hello.protocol,
                        crate::report::printable(&hello.version)
                    ),
                )
                .hint("stop the old daemon with its own `cryptctl daemon stop`"));
            }
            _ => return Err(out_of_turn()),
        }
        Ok(Some(client))
    }

    /// Send a request; the descriptors go with its first byte. Returns its id.
    pub fn send(&mut self, call: Call, descriptors: &[BorrowedFd<'_>]) -> Result<u64> {
        let id = self.next_id;
        self.next_id += 1;
        let mut line = serde_json::to_vec(&Request { v: PROTOCOL_VERSION, id, call })
            .expect("wire types have string keys and finite numbers");
        line.push(b'\n');
        if line.len() > MAX_LINE {
            return Err(Error::usage(format!("the request is longer than {MAX_LINE} bytes")));
        }
        send_with_descriptors(&self.stream, &line, descriptors).map_err(|error| self.lost(&error))?;
        Ok(id)
    }

    /// Ask and wait for the answer. Lines that belong to something else are dropped.
    pub fn call(&mut self, call: Call, descriptors: &[BorrowedFd<'_>]) -> Result<(Reply, String)> {
        let id = self.send(call, descriptors)?;
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        loop {
            if let Some(answer) = self.answer(id)? {
                return answer;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::unreachable(format!(
                    "the daemon did not answer for {} seconds",
                    ANSWER_TIMEOUT.as_secs()
                )));
            }
            if self.wait(None, Some(left))?.readable {
                self.fill()?;
            }
        }
    }

    /// The answer to request `id`, if it has been read: what the daemon said, or that it refused. Lines that belong to
    /// something else are dropped.
    ///
    /// # Errors
    /// The daemon cannot be understood.
    pub fn answer(&mut self, id: u64) -> Result<Option<Result<(Reply, String)>>> {
        while let Some(line) = self.next_line()? {
            // Id 0 answers a request whose id could not be read: ours, since we have only one open.
            if line.response.id != id && line.response.id != 0 {
                continue;
            }
            match line.response.body {
                Body::Ok(reply) => return Ok(Some(Ok((reply, line.text)))),
                Body::Error(failure) => return Ok(Some(Err(failure.into()))),
                Body::Event(_) => {}
            }
        }
        Ok(None)
    }

    /// Sleep until the daemon or `other` has something to say, or the time is over.
    pub fn wait(&self, other: Option<BorrowedFd<'_>>, timeout: Option<Duration>) -> Result<Woken> {
        let mut polled = vec![PollFd::new(&self.stream, PollFlags::IN)];
        polled.extend(other.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        let timeout = timeout.map(|left| Timespec::try_from(left).expect("timeouts are short"));
        match poll(&mut polled, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(lost_for(&errno.into())),
        }
        let woken = |at: usize| polled.get(at).is_some_and(|fd| !fd.revents().is_empty());
        Ok(Woken { readable: woken(0), other: woken(1) })
    }

    /// Read what there is.
    ///
    /// # Errors
    /// The daemon has gone.
    pub fn fill(&mut self) -> Result<()> {
        let mut chunk = [0; 16 * 1024];
        match self.stream.read(&mut chunk) {
            Ok(0) => Err(self.lost(&io::ErrorKind::UnexpectedEof.into())),
            Ok(count) => {
                self.lines.push(&chunk[..count]);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(self.lost(&error)),
        }
    }

    /// End the connection now, whoever else holds it: nobody waits for an answer any more.
    pub fn hang_up(&self) {
        // One that has ended already is as good.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }

    fn lost(&mut self, error: &io::Error) -> Error {
        self.ended = is_end(error);
        lost_for(error)
    }

    /// The next whole line that was read.
    pub fn next_line(&mut self) -> Result<Option<Line>> {
        self.lines.next()
    }

    /// Wait until the daemon closes the connection.
    pub fn wait_for_end(mut self) {
        while self.fill().is_ok() {
            self.lines = Lines::default();
        }
    }
}

/// The connection ended by itself, without a reason of its own.
fn is_end(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), UnexpectedEof | ConnectionReset | BrokenPipe)
}

fn lost_for(error: &io::Error) -> Error {
    let why = if is_end(error) { String::new() } else { format!(": {}", proto::errno::describe(error)) };
    Error::unreachable(format!("the daemon went away{why}"))
        .hint("a daemon started by cryptctl logs to its socket's path with .log at the end")
}

/// An answer that does not belong to the question.
pub fn out_of_turn() -> Error {
    Error {
        exit: Exit::Unreachable,
        ..Error::new(ErrorKind::Internal, "the daemon gave an answer to another question")
    }
}

fn send_with_descriptors(stream: &UnixStream, line: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    assert!(descriptors.len() <= MAX_DESCRIPTORS, "a request carries at most {MAX_DESCRIPTORS} descriptors");
    let mut rest = line;
    if !descriptors.is_empty() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)), "space for all was reserved");
        let sent = loop {
            match sendmsg(stream.as_fd(), &[IoSlice::new(line)], &mut control, SendFlags::NOSIGNAL) {
                Err(rustix::io::Errno::INTR) => {}
                other => break other?,
            }
        };
        rest = &line[sent..];
    }
    (&mut &*stream).write_all(rest)
}

/// Bytes into bounded lines.
#[derive(Default)]
struct Lines {
    buffer: Vec<u8>,
    /// Bytes known to hold no newline.
    searched: usize,
}

impl Lines {
    fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    fn next(&mut self) -> Result<Option<Line>> {
        let bad = |why: String| Error { exit: Exit::Unreachable, ..Error::new(ErrorKind::Internal, why) };
        let Some(end) = self.buffer[self.searched..].iter().position(|byte| *byte == b'\n') else {
            self.searched = self.buffer.len();
            if self.searched >= MAX_RESPONSE {
                return Err(bad(format!("the daemon sent a line longer than {MAX_RESPONSE} bytes")));
            }
            return Ok(None);
        };
        let line: Vec<u8> = self.buffer.drain(..=self.searched + end).collect();
        self.searched = 0;
        let text =
            String::from_utf8(line).map_err(|_| bad("the daemon sent a line that is not UTF-8".into()))?;
        let text = text.trim_end().to_owned();
        let response = serde_json::from_str(&text)
            .map_err(|error| bad(format!("the daemon sent a line that cannot be understood: {error}")))?;
        Ok(Some(Line { text, response }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::Failure;
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    use std::io::IoSliceMut;
    use std::os::unix::net::UnixListener;

    const PATIENCE: Duration = Duration::from_secs(60);
    const HELLO: &str = r#"{"v":1,"id":1,"ok":{"hello":{"version":"0.1.0","protocol":1,"pid":9,"uid":0}}}"#;

    /// A daemon of canned lines: answers the n-th request with the n-th answer.
    fn canned(
        answers: &[&str],
    ) -> (tempfile::TempDir, std::path::PathBuf, std::thread::JoinHandle<Vec<String>>) {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).expect("bind");
        let answers: Vec<String> = answers.iter().map(|&answer| answer.to_owned()).collect();
        let thread = std::thread::spawn(move || {
            let (stream, _) = listener.accept().expect("accept");
            bounded(&stream);
            let mut reader = io::BufReader::new(&stream);
            let mut asked = Vec::new();
            for answer in answers {
                let mut line = String::new();
                io::BufRead::read_line(&mut reader, &mut line).expect("request");
                asked.push(line);
                (&stream).write_all(answer.as_bytes()).expect("answer");
            }
            asked
        });
        (dir, path, thread)
    }

    /// A peer that waits in vain gives up and hangs up, which ends the other side's wait too.
    fn bounded(stream: &UnixStream) {
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
        stream.set_write_timeout(Some(PATIENCE)).expect("a socket");
    }

    fn connect(path: &Path) -> Result<Client> {
        Client::connect(path).map(|client| client.expect("somebody listens"))
    }

    #[test]
    fn nobody_listening_is_not_an_error() {
        assert!(Client::connect(Path::new("/nonexistent/socket")).expect("no error").is_none());
        let dir = tempfile::tempdir().expect("dir");
        let stale = dir.path().join("s");
        drop(UnixListener::bind(&stale).expect("bind"));
        assert!(Client::connect(&stale).expect("no error").is_none());
    }

    #[test]
    fn an_answer_finds_its_question_across_split_and_foreign_lines() {
        let hello = format!("{HELLO}\n");
        let answer = "{\"v\":1,\"id\":77,\"ok\":{\"jobs\":[]}}\n{\"v\":1,\"id\":2,\"ok\":{\"shutting_down\":{\"jobs\":4}}}\n";
        let (_dir, path, thread) = canned(&[&hello, answer]);
        let mut client = connect(&path).expect("hello");
        let (reply, text) = client.call(Call::Shutdown { now: false }, &[]).expect("answer");
        assert_eq!(reply, Reply::ShuttingDown { jobs: 4, exports: 0 });
        assert!(text.starts_with("{\"v\":1,\"id\":2,"), "the line is kept as it came: {text}");
        let asked = thread.join().expect("daemon");
        assert_eq!(asked[1], "{\"v\":1,\"id\":2,\"call\":{\"shutdown\":{\"now\":false}}}\n");
    }

    #[test]
    fn a_failure_keeps_its_kind_and_hint() {
        let hello = format!("{HELLO}\n");
        let (_dir, path, _thread) = canned(&[
            &hello,
            "{\"v\":1,\"id\":2,\"error\":{\"kind\":\"not_found\",\"message\":\"no job 3\",\"hint\":\"list them\"}}\n",
        ]);
        let error = connect(&path).expect("hello").call(Call::Show { job: 3 }, &[]).expect_err("refused");
        assert_eq!(
            *error.failure,
            Failure { kind: ErrorKind::NotFound, message: "no job 3".into(), hint: Some("list them".into()) }
        );
        assert_eq!(error.exit, Exit::Failed);
    }

    #[test]
    fn another_protocol_garbage_and_silence_are_unreachable() {
        let other = HELLO.replace("\"protocol\":1", "\"protocol\":2") + "\n";
        for (answer, words) in [
            (other.as_str(), "speaks protocol 2"),
            ("hello\n", "cannot be understood"),
            ("\u{0}\n", "cannot be understood"),
        ] {
            let (_dir, path, thread) = canned(&[answer]);
            let error = connect(&path).err().expect("refused");
            assert!(error.to_string().contains(words), "{error}");
            assert_eq!(error.exit, Exit::Unreachable);
            thread.join().expect("daemon");
        }
    }

    #[test]
    fn a_daemon_that_hangs_up_at_the_handshake_is_leaving_and_one_that_hangs_up_later_is_lost() {
        let (_dir, path, thread) = canned(&[""]);
        assert!(Client::connect(&path).expect("no error").is_none());
        thread.join().expect("daemon");
        let hello = format!("{HELLO}\n");
        let (_dir, path, thread) = canned(&[&hello, ""]);
        let error = connect(&path).expect("hello").call(Call::List {}, &[]).expect_err("it left");
        assert_eq!(error.exit, Exit::Unreachable);
        assert!(error.to_string().contains("went away"), "{error}");
        thread.join().expect("daemon");
    }

    #[test]
    fn a_refusal_at_the_door_is_heard_whenever_it_comes() {
        let refusal =
            "{\"v\":1,\"id\":0,\"error\":{\"kind\":\"limit\",\"message\":\"too many connections\"}}\n";
        for _ in 0..100 {
            let dir = tempfile::tempdir().expect("dir");
            let path = dir.path().join("s");
            let listener = UnixListener::bind(&path).expect("bind");
            let peer = std::thread::spawn(move || {
                let (mut stream, _) = listener.accept().expect("accept");
                stream.write_all(refusal.as_bytes()).expect("there is room");
            });
            assert_eq!(connect(&path).err().expect("refused").failure.kind, ErrorKind::Limit);
            peer.join().expect("peer");
        }
    }

    #[test]
    fn an_endless_line_is_cut_off() {
        let mut lines = Lines::default();
        lines.push(&vec![b'x'; MAX_RESPONSE - 1]);
        assert!(lines.next().expect("still short enough").is_none());
        lines.push(b"x");
        assert!(lines.next().is_err());
    }

    #[test]
    fn descriptors_travel_with_the_first_byte_of_a_line_longer_than_the_socket_buffer() {
        let (ours, theirs) = UnixStream::pair().expect("pair");
        bounded(&ours);
        bounded(&theirs);
        let (reader, writer) = io::pipe().expect("pipe");
        let line = vec![b'x'; 4 << 20];
        let sender = std::thread::spawn(move || {
            send_with_descriptors(&ours, &line, &[reader.as_fd()]).map(|()| line.len())
        });
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut first = [0];
        recvmsg(&theirs, &mut [IoSliceMut::new(&mut first)], &mut control, RecvFlags::CMSG_CLOEXEC)
            .expect("receive");
        let mut got = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                got.extend(fds);
            }
        }
        assert_eq!(got.len(), 1);
        let mut rest = Vec::new();
        (&theirs).read_to_end(&mut rest).expect("the rest");
        assert_eq!(sender.join().expect("sender").expect("sent"), rest.len() + 1);
        (&writer).write_all(b"k").expect("write");
        drop(writer);
        let mut through = String::new();
        std::fs::File::from(got.remove(0)).read_to_string(&mut through).expect("read");
        assert_eq!(through, "k");
    }
}
