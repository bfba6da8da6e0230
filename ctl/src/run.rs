//! A job in the foreground: send it, show it, cancel it on a signal, and answer for its end.

use std::os::fd::AsFd;
use std::path::Path;

use proto::{Body, Call, ErrorKind, Event, Failure, JobId, JobInfo, JobState, Reply, Submit};

use crate::args::Global;
use crate::client::{Client, out_of_turn};
use crate::luks::lock::{self, Lock};
use crate::passing::PartialFile;
use crate::progress::{Display, note};
use crate::reencrypt;
use crate::render::{self, Output};
use crate::report::{Error, Exit, Result};
use crate::request::{Opened, Prepared};
use crate::signals::Signals;

/// Run a checked job to its end, or with `--detach` to its number.
pub fn volume_job(client: Client, opened: Opened, global: &Global) -> Result<Exit> {
    // From here on there is something to undo, so a signal must not just end us.
    foreground(Run::new(client, Signals::catch()?, global), opened, global)
}

/// Re-encrypt to the end, or with `--detach` to the job's number.
pub fn reencrypt_job(client: Client, opened: reencrypt::request::Opened, global: &Global) -> Result<Exit> {
    let mut run = Run::new(client, Signals::catch()?, global);
    run.cancelling = "stopping at the next safe point; interrupt again to leave at once: job";
    opened.warnings.iter().for_each(|warning| note(&format!("warning: {warning}")));
    let locks = opened.lock(Path::new(lock::DIRECTORY), &mut note)?;
    let doubt = opened.doubt.clone();
    let detach = opened.is_detached();
    let (words, was_luks1) = (opened.words(), opened.was_luks1 && !opened.is_rehearsal());
    let result = opened
        .create(&locks)
        .and_then(|ready| carry_out(run, ready, Output::new(false), doubt, global))
        .map_err(|error| words.of(error));
    if was_luks1 && result.is_ok() && !detach && !global.quiet && !global.json {
        note("its header was LUKS1 and is LUKS2 now: QEMU and nbdkit cannot open it");
    }
    // Only when the daemon is done with the volume: it shares the locks, and to let go of ours would be to let go of its.
    let over = match &result {
        Ok(_) => !detach,
        Err(error) => !matches!(error.exit, Exit::Unreachable | Exit::Interrupted),
    };
    if over {
        locks.into_iter().for_each(Lock::release);
    }
    result
}

fn foreground(run: Run, opened: Opened, global: &Global) -> Result<Exit> {
    for warning in &opened.warnings {
        note(&format!("warning: {warning}"));
    }
    let output = Output::new(opened.stdout_is_data);
    let doubt = opened.doubt.clone();
    carry_out(run, opened.create()?, output, doubt, global)
}

fn carry_out(
    mut run: Run,
    prepared: Prepared,
    mut output: Output,
    doubt: Option<String>,
    global: &Global,
) -> Result<Exit> {
    let Prepared { submit, descriptors, partials } = prepared;
    let detach = submit.detach;
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let result = run.submit(submit, &borrowed, &mut output);
    drop(borrowed);
    // The daemon has its own copies. Ours would keep pipes open for their other ends.
    drop(descriptors);
    let ended = match result {
        Ok(job) if detach && run.signalled == 0 => {
            if !global.json {
                output.line(&job.to_string());
            }
            Ok(Exit::Done)
        }
        Ok(job) => match run.watch(job, &mut output) {
            // Nobody is left to be told, as at the end of any pipeline.
            Ok(info) if output.is_unread() && info.state == JobState::Cancelled => Ok(Exit::Failed),
            Ok(info) => finish(&info, &partials, &mut output, global),
            // With the connection a job in the foreground ends too; a detached one may go on.
            Err(error) if detach => Err(unheard(error, &partials)),
            Err(error) => Err(abandoned(error, &partials)),
        },
        Err(error) if run.answered => {
            partials.iter().for_each(PartialFile::refused);
            Err(error)
        }
        Err(error) if detach => Err(unheard(error, &partials)),
        Err(error) => Err(abandoned(error, &partials)),
    };
    let exit = ended.map_err(|error| error.doubted(doubt))?;
    output.end().map(|()| exit)
}

/// Run a measurement.
pub fn bench_job(client: Client, submit: Submit, global: &Global) -> Result<Exit> {
    let mut output = Output::new(false);
    let mut run = Run::new(client, Signals::catch()?, global);
    let job = run.submit(submit, &[], &mut output)?;
    let info = run.watch(job, &mut output)?;
    if output.is_unread() && info.state == JobState::Cancelled {
        return Ok(Exit::Failed);
    }
    if let Some(outcome) = &info.outcome
        && info.state == JobState::Done
        && !global.json
    {
        output.text(&render::bench(&outcome.bench, output.colour()));
    }
    let exit = end_of(&info)?;
    output.end().map(|()| exit)
}

/// Watch somebody's job to its end. A signal ends the watching, not the job.
pub fn watch_job(client: Client, job: JobId, global: &Global) -> Result<Exit> {
    let mut output = Output::new(false);
    let mut run = Run::new(client, Signals::catch()?, global);
    run.cancels = false;
    match run.watch(job, &mut output) {
        // Nobody is left to be told.
        Err(_) if output.is_unread() => Ok(Exit::Done),
        result => {
            let info = result?;
            let exit = finish(&info, &[], &mut output, global)?;
            output.end().map(|()| exit)
        }
    }
}

struct Run {
    client: Client,
    signals: Signals,
    json: bool,
    quiet: bool,
    /// A signal cancels the job.
    cancels: bool,
    /// What is said then, before the job's number.
    cancelling: &'static str,
    signalled: usize,
    /// The daemon took the job or refused it; otherwise nobody knows.
    answered: bool,
    /// The job was told to end.
    cancelled: bool,
}

impl Run {
    fn new(client: Client, signals: Signals, global: &Global) -> Self {
        Self {
            client,
            signals,
            json: global.json,
            quiet: global.quiet,
            cancels: true,
            cancelling: "cancelling job",
            signalled: 0,
            answered: false,
            cancelled: false,
        }
    }

    fn submit(
        &mut self,
        submit: Submit,
        descriptors: &[std::os::fd::BorrowedFd<'_>],
        output: &mut Output,
    ) -> Result<JobId> {
        let id = self.client.send(Call::Submit(Box::new(submit)), descriptors)?;
        // No time limit: the daemon looks at devices before it answers, and a job it took must not be lost sight of.
        let answer = loop {
            if let Some(answer) = self.client.answer(id)? {
                break answer;
            }
            let woken = self.client.wait(Some(self.signals.as_fd()), None)?;
            if woken.other {
                self.signalled += self.signals.take();
                if self.signalled > 1 {
                    return Err(interrupted("left before the daemon took or refused the job"));
                }
                note(
                    "the job will be cancelled when the daemon has answered; interrupt again to leave at once",
                );
            }
            if woken.readable {
                self.client.fill()?;
            }
        };
        let answer = answer.inspect_err(|_| self.answered = true)?;
        let (Reply::Submitted { job, warnings }, text) = answer else { return Err(out_of_turn()) };
        self.answered = true;
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
        if self.signalled > 0 {
            self.cancel(job, &display)?;
        }
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

    fn cancel(&mut self, job: JobId, display: &Display) -> Result<()> {
        if !std::mem::replace(&mut self.cancelled, true) {
            display.note(&format!("{} {job}", self.cancelling));
            self.client.send(Call::Cancel { job }, &[])?;
        }
        Ok(())
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
        if self.json && output.is_unread() {
            if !self.cancels {
                return Err(interrupted("nobody reads the events"));
            }
            self.cancel(job, display)?;
        }
        let woken = self.client.wait(Some(self.signals.as_fd()), None)?;
        if woken.other {
            self.signalled += self.signals.take();
            if !self.cancels {
                return Err(interrupted(format!("no longer watching job {job}, which goes on")));
            }
            if self.signalled > 1 {
                return Err(interrupted(format!("left at once, job {job} may still be ending")));
            }
            self.cancel(job, display)?;
        }
        if woken.readable {
            self.client.fill()?;
        }
        Ok(None)
    }
}

/// Say how it ended, and turn that into our own end.
fn finish(info: &JobInfo, partials: &[PartialFile], output: &mut Output, global: &Global) -> Result<Exit> {
    if info.state == JobState::Done && !global.quiet && !global.json {
        note(&render::summary(info));
    }
    if let Some(report) = info.outcome.as_ref().and_then(|outcome| outcome.reencrypt.as_ref()) {
        // The answer of a dry run; of others the proof, which goes with the summary.
        let shown = reencrypt::render::is_rehearsal(report) || !global.quiet;
        if info.state == JobState::Done && shown && !global.json {
            output.text(&render::pairs(&reencrypt::render::rows(report)));
        }
    }
    partials.iter().for_each(PartialFile::ended);
    end_of(info).inspect_err(|_| {
        // The daemon undid the sink; what it could not, we can.
        partials.iter().filter_map(PartialFile::abandon).for_each(|what| note(&what));
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

fn interrupted(message: impl Into<String>) -> Error {
    Error { exit: Exit::Interrupted, ..Error::new(ErrorKind::Cancelled, message) }
}

/// A detached job that may run without our knowing: its file is left alone.
fn unheard(error: Error, partials: &[PartialFile]) -> Error {
    let left: Vec<_> = partials.iter().map(PartialFile::shown).collect();
    let left = match left.as_slice() {
        [] => String::new(),
        left => format!(", and {} may be left over or still be written", left.join(" and ")),
    };
    note(&format!("the job may run all the same{left}"));
    if error.failure.hint.is_some() { error } else { error.hint("`cryptctl job list` tells") }
}

fn abandoned(error: Error, partials: &[PartialFile]) -> Error {
    partials.iter().filter_map(PartialFile::abandon).for_each(|what| note(&what));
    error
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::{Action, Outcome, Progress};

    const HELLO: &str = r#"{"v":1,"id":1,"ok":{"hello":{"version":"0","protocol":1,"pid":9,"uid":0}}}"#;
    const SUBMITTED: &str = r#"{"v":1,"id":2,"ok":{"submitted":{"job":3}}}"#;

    /// Run `encrypt DIR/in DIR/out` against a peer that gives one answer (or none, if empty) per request and then hangs up.
    fn against(dir: &std::path::Path, flags: &str, answers: &[&str]) -> Result<Exit> {
        against_with_signals(dir, flags, answers, 0).0
    }

    /// The same with so many signals pending from the start. Also what was asked.
    fn against_with_signals(
        dir: &std::path::Path,
        flags: &str,
        answers: &[&str],
        signals: usize,
    ) -> (Result<Exit>, Vec<String>) {
        use clap::Parser;
        use std::io::{BufRead, BufReader, Write};
        use std::os::unix::net::UnixStream;
        let patience = Some(std::time::Duration::from_secs(60));
        let (mut sender, reader) = UnixStream::pair().expect("pair");
        sender.write_all(&vec![1; signals]).expect("short enough");
        std::fs::write(dir.join("key"), [7; 64]).expect("write");
        std::fs::write(dir.join("in"), [0; 512]).expect("write");
        let listener = std::os::unix::net::UnixListener::bind(dir.join("s")).expect("bind");
        let answers: Vec<String> = answers
            .iter()
            .map(|answer| if answer.is_empty() { String::new() } else { format!("{answer}\n") })
            .collect();
        let peer = std::thread::spawn(move || {
            let (stream, _) = listener.accept().expect("accept");
            // A peer that waits in vain gives up and hangs up, which ends the other side's wait too.
            stream.set_read_timeout(patience).expect("a socket");
            let mut requests = BufReader::new(&stream).lines();
            let mut asked = Vec::new();
            for answer in answers {
                asked.push(requests.next().expect("a request").expect("readable"));
                (&stream).write_all(answer.as_bytes()).expect("answer");
            }
            asked
        });
        let at = |name: &str| dir.join(name).display().to_string();
        let mut words = vec!["cryptctl".to_owned(), "encrypt".into(), at("in"), at("out"), "-q".into()];
        words.extend(["--format=raw".into(), format!("--key=file:{}", at("key")), "--force".into()]);
        words.extend(flags.split_whitespace().map(str::to_owned));
        let cli = crate::args::Cli::try_parse_from(words).expect("parses");
        let crate::args::Verb::Encrypt(args) = &cli.verb else { panic!("encrypt was typed") };
        let client = Client::connect(&dir.join("s")).expect("hello").expect("listens");
        let run = Run::new(client, Signals::from_bytes(reader), &cli.global);
        let result = foreground(run, crate::request::encrypt(args).expect("opens"), &cli.global);
        (result, peer.join().expect("peer"))
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

    #[test]
    fn a_detached_job_nobody_answered_for_keeps_its_file_and_a_refused_one_does_not() {
        let refusal = r#"{"v":1,"id":2,"error":{"kind":"shutting_down","message":"leaving"}}"#;
        for (answers, kept) in [(&[HELLO, ""][..], true), (&[HELLO, refusal], false)] {
            let dir = tempfile::tempdir().expect("dir");
            let error = against(dir.path(), "--detach", answers).expect_err("no job");
            assert_eq!(error.exit, Exit::Unreachable, "{error}");
            assert_eq!(dir.path().join("out.partial").exists(), kept, "{error}");
        }
    }

    #[test]
    fn a_signal_before_the_answer_cancels_the_job_when_it_has_a_number() {
        let cancelled = format!(
            "{}\n{}",
            r#"{"v":1,"id":4,"ok":{"job":{}}}"#
                .replace("{}", &serde_json::to_string(&info(JobState::Running, None)).expect("serializes")),
            finished(JobState::Cancelled, None)
        );
        for flags in ["", "--detach"] {
            let dir = tempfile::tempdir().expect("dir");
            let (result, asked) =
                against_with_signals(dir.path(), flags, &[HELLO, SUBMITTED, "", &cancelled], 1);
            let error = result.expect_err("cancelled");
            assert_eq!((error.exit, error.failure.kind), (Exit::Failed, ErrorKind::Cancelled), "{error}");
            assert!(asked[3].contains(r#"{"cancel":{"job":3}}"#), "{asked:?}");
        }
    }

    #[test]
    fn a_second_signal_before_the_answer_leaves_at_once() {
        for (flags, kept) in [("", false), ("--detach", true)] {
            let dir = tempfile::tempdir().expect("dir");
            let (result, _) = against_with_signals(dir.path(), flags, &[HELLO, ""], 2);
            assert_eq!(result.expect_err("left").exit, Exit::Interrupted);
            assert_eq!(dir.path().join("out.partial").exists(), kept);
        }
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
                reencrypt: None,
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
