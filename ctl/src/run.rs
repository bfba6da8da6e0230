//! A job in the foreground: send it, show it, cancel it on a signal, and answer for its end.

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use proto::{Body, Call, ErrorKind, Event, Failure, JobId, JobInfo, JobState, Reply, Submit};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::args::Global;
use crate::client::{Client, out_of_turn};
use crate::progress::{Display, note};
use crate::render::{self, Output};
use crate::report::{Error, Exit, Result};
use crate::request::{Opened, PartialFile, Prepared};

/// Signals that mean "stop", as something that can be polled.
pub struct Signals {
    reader: UnixStream,
}

impl Signals {
    /// Catch them from now on, except those this process was started to ignore (nohup, background jobs of scripts).
    pub fn catch() -> Result<Self> {
        let failed = |error: std::io::Error| Error::io("cannot catch signals", "SIGINT", error);
        let (reader, writer) = UnixStream::pair().map_err(failed)?;
        let ignored = ignored_signals();
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            if ignored >> (signal - 1) & 1 == 0 {
                signal_hook::low_level::pipe::register(signal, writer.try_clone().map_err(failed)?)
                    .map_err(failed)?;
            }
        }
        Ok(Self { reader })
    }

    /// How many came since last asked. Called when the descriptor is readable.
    fn take(&mut self) -> usize {
        self.reader.read(&mut [0; 16]).unwrap_or(0)
    }
}

/// The mask of ignored signals; bit n-1 is signal n (proc(5), `SigIgn`).
fn ignored_signals() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

/// Run a checked job to its end, or with `--detach` to its number.
pub fn volume_job(client: Client, opened: Opened, global: &Global) -> Result<Exit> {
    for warning in &opened.warnings {
        note(&format!("warning: {warning}"));
    }
    let mut output = Output::new(opened.stdout_is_data);
    // From here on there is something to undo, so a signal must not just end us.
    let signals = Signals::catch()?;
    let Prepared { submit, descriptors, partial } = opened.create()?;
    let detach = submit.detach;
    let mut run = Run::new(client, signals, global);
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let result = run.submit(submit, &borrowed, &mut output);
    drop(borrowed);
    // The daemon has its own copies. Ours would keep pipes open for their other ends.
    drop(descriptors);
    match result {
        Ok(job) if detach => {
            if !global.json {
                output.line(&job.to_string());
            }
            Ok(Exit::Done)
        }
        Ok(job) => match run.watch(job, &mut output) {
            Ok(info) => finish(&info, partial.as_ref(), global),
            Err(error) => Err(abandoned(error, partial.as_ref())),
        },
        Err(error) if error.exit == Exit::Unreachable => Err(abandoned(error, partial.as_ref())),
        Err(error) => {
            if let Some(partial) = &partial {
                partial.refused();
            }
            Err(error)
        }
    }
}

/// Run a measurement.
pub fn bench_job(client: Client, submit: Submit, global: &Global) -> Result<Exit> {
    let mut output = Output::new(false);
    let mut run = Run::new(client, Signals::catch()?, global);
    let job = run.submit(submit, &[], &mut output)?;
    let info = run.watch(job, &mut output)?;
    if let Some(outcome) = &info.outcome
        && info.state == JobState::Done
        && !global.json
    {
        output.text(&render::bench(&outcome.bench, output.colour()));
    }
    end_of(&info)
}

/// Watch somebody's job to its end. A signal ends the watching, not the job.
pub fn watch_job(client: Client, job: JobId, global: &Global) -> Result<Exit> {
    let mut output = Output::new(false);
    let mut run = Run::new(client, Signals::catch()?, global);
    run.cancels = false;
    let info = run.watch(job, &mut output)?;
    finish(&info, None, global)
}

struct Run {
    client: Client,
    signals: Signals,
    json: bool,
    quiet: bool,
    /// A signal cancels the job.
    cancels: bool,
    signalled: usize,
}

impl Run {
    fn new(client: Client, signals: Signals, global: &Global) -> Self {
        Self { client, signals, json: global.json, quiet: global.quiet, cancels: true, signalled: 0 }
    }

    fn submit(
        &mut self,
        submit: Submit,
        descriptors: &[std::os::fd::BorrowedFd<'_>],
        output: &mut Output,
    ) -> Result<JobId> {
        let (reply, text) = self.client.call(Call::Submit(Box::new(submit)), descriptors)?;
        let Reply::Submitted { job, warnings } = reply else { return Err(out_of_turn()) };
        if self.json {
            output.line(&text);
        }
        for warning in warnings {
            note(&format!("warning: {warning}"));
        }
        Ok(job)
    }

    fn watch(&mut self, job: JobId, output: &mut Output) -> Result<JobInfo> {
        let mut display = Display::new(self.json, self.quiet);
        let interval_ms = Some(display.interval_ms());
        let watch = self.client.send(Call::Watch { job, interval_ms }, &[])?;
        let result = loop {
            match self.step(job, watch, &mut display, output) {
                Ok(None) => {}
                Ok(Some(info)) => break Ok(info),
                Err(error) => break Err(error),
            }
        };
        display.end();
        result
    }

    /// Handle what has come, then sleep. `Some` when the job is final.
    fn step(
        &mut self,
        job: JobId,
        watch: u64,
        display: &mut Display,
        output: &mut Output,
    ) -> Result<Option<JobInfo>> {
        while let Some(line) = self.client.next_line()? {
            if line.response.id != watch {
                continue;
            }
            match line.response.body {
                Body::Event(event) => {
                    display.event(&event, &line.text, output);
                    if let Event::Finished(info) = event {
                        return Ok(Some(*info));
                    }
                }
                Body::Ok(Reply::Job(info)) => {
                    display.event(&Event::State { job, state: info.state }, &line.text, output);
                }
                Body::Ok(_) => return Err(out_of_turn()),
                Body::Error(failure) => return Err(failure.into()),
            }
        }
        let woken = self.client.wait(Some(self.signals.reader.as_fd()), None)?;
        if woken.other {
            let before = self.signalled;
            self.signalled += self.signals.take();
            if !self.cancels || self.signalled > 1 {
                return Err(Error {
                    exit: Exit::Interrupted,
                    ..Error::new(ErrorKind::Cancelled, format!("left at once, job {job} may still be ending"))
                });
            }
            if before == 0 {
                display.note(&format!("cancelling job {job}"));
                self.client.send(Call::Cancel { job }, &[])?;
            }
        }
        if woken.readable {
            self.client.fill()?;
        }
        Ok(None)
    }
}

/// Say how it ended, and turn that into our own end.
fn finish(info: &JobInfo, partial: Option<&PartialFile>, global: &Global) -> Result<Exit> {
    if info.state == JobState::Done && !global.quiet && !global.json {
        note(&render::summary(info));
    }
    end_of(info).inspect_err(|_| {
        // The daemon undid the sink; what it could not, we can.
        if let Some(what) = partial.and_then(PartialFile::abandon) {
            note(&what);
        }
    })
}

fn end_of(info: &JobInfo) -> Result<Exit> {
    let failure = info.outcome.as_ref().and_then(|outcome| outcome.failure.clone());
    match (info.state, failure) {
        (JobState::Done, None) => Ok(Exit::Done),
        (_, Some(failure)) => Err(difference(info, failure).into()),
        (JobState::Cancelled, None) => {
            Err(Error::new(ErrorKind::Cancelled, format!("job {} was cancelled", info.job)))
        }
        (_, None) => Err(Error::new(ErrorKind::Internal, format!("job {} ended without a reason", info.job))),
    }
}

/// The first difference is the answer of a `verify`: it must not be missing from the sentence.
fn difference(info: &JobInfo, mut failure: Failure) -> Failure {
    let first = info.outcome.as_ref().and_then(|outcome| outcome.first_difference);
    if let Some(offset) = first
        && failure.kind == ErrorKind::Difference
        && !failure.message.contains(&offset.to_string())
    {
        failure.message.push_str(&format!(": first at byte {offset}"));
    }
    failure
}

fn abandoned(error: Error, partial: Option<&PartialFile>) -> Error {
    if let Some(what) = partial.and_then(PartialFile::abandon) {
        note(&what);
    }
    error
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::{Action, Outcome, Progress};

    const HELLO: &str = r#"{"v":1,"id":1,"ok":{"hello":{"version":"0","protocol":1,"pid":9,"uid":0}}}"#;
    const SUBMITTED: &str = r#"{"v":1,"id":2,"ok":{"submitted":{"job":3}}}"#;

    /// Run `encrypt DIR/in DIR/out` against a peer that gives one answer per request and then hangs up.
    fn against(dir: &std::path::Path, flags: &str, answers: &[&str]) -> Result<Exit> {
        use clap::Parser;
        use std::io::{BufRead, BufReader, Write};
        std::fs::write(dir.join("key"), [7; 64]).expect("write");
        std::fs::write(dir.join("in"), [0; 512]).expect("write");
        let listener = std::os::unix::net::UnixListener::bind(dir.join("s")).expect("bind");
        let answers: Vec<String> = answers.iter().map(|answer| format!("{answer}\n")).collect();
        let peer = std::thread::spawn(move || {
            let (stream, _) = listener.accept().expect("accept");
            let mut requests = BufReader::new(&stream).lines();
            for answer in answers {
                requests.next().expect("a request").expect("readable");
                (&stream).write_all(answer.as_bytes()).expect("answer");
            }
        });
        let at = |name: &str| dir.join(name).display().to_string();
        let mut words = vec!["cryptctl".to_owned(), "encrypt".into(), at("in"), at("out"), "-q".into()];
        words.extend(["--format=raw".into(), format!("--key=file:{}", at("key")), "--force".into()]);
        words.extend(flags.split_whitespace().map(str::to_owned));
        let cli = crate::args::Cli::try_parse_from(words).expect("parses");
        let crate::args::Verb::Encrypt(args) = &cli.verb else { panic!("encrypt was typed") };
        let client = Client::connect(&dir.join("s")).expect("hello").expect("listens");
        let result = volume_job(client, crate::request::encrypt(args).expect("opens"), &cli.global);
        peer.join().expect("peer");
        result
    }

    fn finished(state: JobState, failure: Option<Failure>) -> String {
        let event = Event::Finished(Box::new(info(state, failure)));
        serde_json::to_string(&proto::Response { v: 1, id: 3, body: Body::Event(event) }).expect("serializes")
    }

    #[test]
    fn a_daemon_that_dies_leaves_no_half_file_and_ends_with_three() {
        for (flags, kept) in [("", false), ("--keep-partial", true)] {
            let dir = tempfile::tempdir().expect("dir");
            std::fs::write(dir.path().join("out"), "old").expect("write");
            let progress = r#"{"v":1,"id":3,"event":{"state":{"job":3,"state":"running"}}}"#;
            let error = against(dir.path(), flags, &[HELLO, SUBMITTED, progress]).expect_err("it died");
            assert_eq!(error.exit, Exit::Unreachable, "{error}");
            assert_eq!(dir.path().join("out.partial").exists(), kept);
            assert_eq!(std::fs::read_to_string(dir.path().join("out")).expect("untouched"), "old");
        }
    }

    #[test]
    fn a_refused_job_leaves_nothing_even_with_keep_partial() {
        let dir = tempfile::tempdir().expect("dir");
        let refusal = r#"{"v":1,"id":2,"error":{"kind":"no_space","message":"too small"}}"#;
        let error = against(dir.path(), "--keep-partial", &[HELLO, refusal]).expect_err("refused");
        assert_eq!(error.failure.kind, ErrorKind::NoSpace);
        assert!(!dir.path().join("out.partial").exists());
    }

    #[test]
    fn a_failed_job_ends_with_the_status_of_its_kind() {
        let dir = tempfile::tempdir().expect("dir");
        let failure =
            Failure { kind: ErrorKind::WrongKey, message: "wrong key or damaged data".into(), hint: None };
        let end = finished(JobState::Failed, Some(failure));
        let error = against(dir.path(), "", &[HELLO, SUBMITTED, &end]).expect_err("failed");
        assert_eq!(error.exit, Exit::WrongKey);
        assert!(!dir.path().join("out.partial").exists());
    }

    #[test]
    fn a_job_that_is_done_keeps_what_the_daemon_made() {
        let dir = tempfile::tempdir().expect("dir");
        let exit = against(dir.path(), "", &[HELLO, SUBMITTED, &finished(JobState::Done, None)]);
        assert_eq!(exit, Ok(Exit::Done));
        assert!(
            dir.path().join("out.partial").exists(),
            "renaming and removing is the daemon's once it is done"
        );
    }

    #[test]
    fn a_detached_job_is_left_to_the_daemon() {
        let dir = tempfile::tempdir().expect("dir");
        assert_eq!(against(dir.path(), "--detach", &[HELLO, SUBMITTED]), Ok(Exit::Done));
        assert!(dir.path().join("out.partial").exists());
    }

    fn info(state: JobState, failure: Option<Failure>) -> JobInfo {
        JobInfo {
            job: 3,
            uid: 0,
            action: Action::Verify,
            source: "a".into(),
            sink: "b".into(),
            state,
            detached: false,
            submitted_ms: 0,
            progress: Progress::default(),
            outcome: Some(Outcome {
                seconds: 1.0,
                failure,
                first_difference: Some(8192),
                bench: vec![],
                padded_bytes: 0,
                cpu_seconds: (0.0, 0.0),
            }),
        }
    }

    #[test]
    fn a_difference_names_its_place_once_and_ends_with_five() {
        for message in ["plaintext differs", "plaintext differs at byte 8192"] {
            let failure = Failure { kind: ErrorKind::Difference, message: message.into(), hint: None };
            let error = end_of(&info(JobState::Failed, Some(failure))).expect_err("failed");
            assert_eq!(error.exit as u8, 5);
            assert_eq!(error.failure.message.matches("8192").count(), 1, "{error}");
        }
    }

    #[test]
    fn a_job_that_did_not_end_well_never_looks_done() {
        for state in [JobState::Failed, JobState::Cancelled, JobState::Running] {
            assert_eq!(end_of(&info(state, None)).expect_err("not done").exit, Exit::Failed);
        }
        assert_eq!(end_of(&info(JobState::Done, None)), Ok(Exit::Done));
    }
}
