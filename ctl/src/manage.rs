//! Verbs about jobs and the daemon: one question, one answer.

use proto::{Call, Reply};

use crate::args::{Daemon, Global, Job};
use crate::client::{Client, out_of_turn};
use crate::launch;
use crate::progress::note;
use crate::render::{self, Output};
use crate::report::{Error, Exit, Result};
use crate::run;

/// `cryptctl job …`
pub fn job(verb: &Job, global: &Global) -> Result<Exit> {
    let call = match verb {
        Job::List => Call::List {},
        Job::Show(at) => Call::Show { job: at.job },
        Job::Watch(at) => return run::watch_job(launch::reach(global)?, at.job, global),
        Job::Pause(at) => Call::Pause { job: at.job },
        Job::Resume(at) => Call::Resume { job: at.job },
        Job::Cancel(at) => Call::Cancel { job: at.job },
        Job::Throttle { job, rate } => Call::Throttle { job: job.job, bytes_per_second: rate.0 },
    };
    ask(global, call)
}

/// `cryptctl stats`
pub fn stats(job: Option<u64>, global: &Global) -> Result<Exit> {
    ask(global, Call::Stats { job })
}

/// `cryptctl daemon …`
pub fn daemon(verb: &Daemon, global: &Global) -> Result<Exit> {
    match verb {
        Daemon::Status => ask(global, Call::Status {}),
        Daemon::Start { idle_exit } => {
            if global.no_start {
                return Err(Error::usage("`daemon start` and --no-start contradict each other"));
            }
            let (mut client, new) = launch::start(global, *idle_exit)?;
            if global.json {
                let (_, text) = client.call(Call::Hello {}, &[])?;
                let mut output = Output::new(false);
                output.line(&text);
                output.end()?;
            } else if !global.quiet {
                let how = if new { "started" } else { "is running already" };
                note(&format!("cryptd {how}, process {}", client.hello.pid));
            }
            Ok(Exit::Done)
        }
        Daemon::Stop { now } => stop(launch::reach(global)?, *now, global),
    }
}

fn stop(mut client: Client, now: bool, global: &Global) -> Result<Exit> {
    let (reply, text) = client.call(Call::Shutdown { now }, &[])?;
    let Reply::ShuttingDown { jobs, exports } = reply else { return Err(out_of_turn()) };
    let mut output = Output::new(false);
    if global.json {
        output.line(&text);
    } else if jobs + exports > 0 && !global.quiet {
        note(&leaving(jobs, exports));
    }
    // It closes its connections when it leaves, so a new daemon can be started as soon as this returns.
    client.wait_for_end();
    output.end().map(|()| Exit::Done)
}

/// What a daemon that leaves waits for.
fn leaving(jobs: u32, exports: u32) -> String {
    let some = |count: u32, what: &str| match count {
        0 => None,
        1 => Some(format!("1 {what}")),
        count => Some(format!("{count} {what}s")),
    };
    let awaited: Vec<String> =
        [some(jobs, "running job"), some(exports, "export")].into_iter().flatten().collect();
    let verb = if jobs + exports == 1 { "has" } else { "have" };
    format!("cryptd leaves when {} {verb} ended", awaited.join(" and "))
}

fn ask(global: &Global, call: Call) -> Result<Exit> {
    let mut client = launch::reach(global)?;
    let mut output = Output::new(false);
    let (reply, text) = client.call(call, &[])?;
    if global.json {
        output.line(&text);
        return output.end().map(|()| Exit::Done);
    }
    let colour = output.colour();
    output.text(&match reply {
        Reply::Jobs(jobs) => render::jobs(&jobs, colour),
        Reply::Job(job) => render::job(&job),
        Reply::Stats(stats) => render::stats(&stats, colour),
        Reply::Status(status) => render::status(&status, colour),
        Reply::Hello(_)
        | Reply::Submitted { .. }
        | Reply::ShuttingDown { .. }
        | Reply::Luks(_)
        | Reply::Exported { .. }
        | Reply::Exports(_)
        | Reply::ExportStats(_) => return Err(out_of_turn()),
    });
    output.end().map(|()| Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_waited_for_is_said_in_words() {
        assert_eq!(leaving(1, 0), "cryptd leaves when 1 running job has ended");
        assert_eq!(leaving(0, 2), "cryptd leaves when 2 exports have ended");
        assert_eq!(leaving(2, 1), "cryptd leaves when 2 running jobs and 1 export have ended");
    }
}
