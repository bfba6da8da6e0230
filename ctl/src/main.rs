//! `cryptctl`: the command line that drives `cryptd`.
//!
//! ```text
//! args ─ what was typed ─▶ request ─ endpoint, partial, signature, secret ─▶ run ─▶ client ─ wire ─▶ cryptd
//!                                                                     render, progress ◀─ events ─┘
//! ```
//!
//! Opens everything with the caller's rights and passes descriptors; moves no data itself and never links the data
//! path. It imports `proto` alone, and holds no unsafe code.

#![forbid(unsafe_code)]

mod amount;
mod args;
mod client;
mod endpoint;
mod help;
mod launch;
mod manage;
mod partial;
mod progress;
mod prompt;
mod render;
mod report;
mod request;
mod run;
mod secret;
mod signature;

use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use proto::{Body, PROTOCOL_VERSION, Response};

use args::{Cli, Verb};
use render::Output;
use report::{Error, Exit, Result};

fn main() -> ExitCode {
    secret::harden();
    let cli = Cli::parse();
    let exit = match dispatch(&cli) {
        Ok(exit) => exit,
        Err(error) => {
            report(&error, &cli);
            error.exit
        }
    };
    ExitCode::from(exit as u8)
}

fn dispatch(cli: &Cli) -> Result<Exit> {
    let global = &cli.global;
    let volume_job = |opened| run::volume_job(launch::reach_or_start(global)?, opened, global);
    match &cli.verb {
        Verb::Encrypt(args) => volume_job(request::encrypt(args)?),
        Verb::Decrypt(args) => volume_job(request::decrypt(args)?),
        Verb::Verify(args) => volume_job(request::verify(args)?),
        Verb::Job(verb) => manage::job(verb, global),
        Verb::Stats { job } => manage::stats(*job, global),
        Verb::Bench(args) => run::bench_job(launch::reach_or_start(global)?, request::bench(args), global),
        Verb::Daemon(verb) => manage::daemon(verb, global),
        Verb::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "cryptctl", &mut script);
            Output::new(false).text(&String::from_utf8_lossy(&script));
            Ok(Exit::Done)
        }
        Verb::Man { dir } => man_pages(dir),
    }
}

fn man_pages(dir: &Path) -> Result<Exit> {
    clap_mangen::generate_to(Cli::command(), dir)
        .map_err(|error| Error::io("cannot write the man pages", dir.display(), error))?;
    Ok(Exit::Done)
}

/// In words, and with `--json` also as the last object.
fn report(error: &Error, cli: &Cli) {
    use std::io::Write;
    if cli.global.json {
        let stdout_is_data = match &cli.verb {
            Verb::Encrypt(args) => endpoint::is_dash(&args.ends.sink),
            Verb::Decrypt(args) => endpoint::is_dash(&args.ends.sink),
            _ => false,
        };
        let response = Response { v: PROTOCOL_VERSION, id: 0, body: Body::Error((*error.failure).clone()) };
        let text = serde_json::to_string(&response).expect("wire types have string keys and finite numbers");
        Output::new(stdout_is_data).line(&text);
    }
    let _ = writeln!(std::io::stderr(), "{error}");
}
