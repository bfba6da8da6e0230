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
mod export;
mod help;
mod launch;
mod luks;
mod manage;
mod partial;
mod passing;
mod progress;
mod prompt;
mod reencrypt;
mod remote;
mod render;
mod report;
mod request;
mod run;
mod secret;
mod signals;
mod signature;
mod uri;
mod volume;

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};
use proto::{Body, PROTOCOL_VERSION, Response};

use args::{Cli, Verb};
use render::Output;
use report::{Error, Exit, Result};

fn main() -> ExitCode {
    secret::harden();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return ExitCode::from(mistyped(&error, std::env::args_os().skip(1)) as u8),
    };
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
        Verb::Reencrypt(args) => {
            let mut ask = |end: &endpoint::End| luks::summary(&mut launch::reach_or_start(global)?, end);
            let opened = reencrypt::request::open(args, &mut ask)?;
            run::reencrypt_job(launch::reach_or_start(global)?, opened, global)
        }
        Verb::Export(args) => export::run(args, global),
        Verb::Luks(verb) => luks::run(verb, global),
        Verb::Job(verb) => manage::job(verb, global),
        Verb::Stats { job } => manage::stats(*job, global),
        Verb::Bench(args) => run::bench_job(launch::reach_or_start(global)?, request::bench(args), global),
        Verb::Daemon(verb) => manage::daemon(verb, global),
        Verb::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "cryptctl", &mut script);
            let mut output = Output::new(false);
            output.text(&String::from_utf8_lossy(&script));
            output.end().map(|()| Exit::Done)
        }
        Verb::Man { dir } => man_pages(dir),
    }
}

fn man_pages(dir: &Path) -> Result<Exit> {
    clap_mangen::generate_to(Cli::command(), dir)
        .map_err(|error| Error::io("cannot write the man pages", dir.display(), error))?;
    Ok(Exit::Done)
}

/// Show help or the version, or say what is wrong with the command line; with `--json` also as an object.
fn mistyped(error: &clap::Error, args: impl Iterator<Item = OsString>) -> Exit {
    if !error.use_stderr() {
        use std::io::Write;
        return match error.print().and_then(|()| std::io::stdout().flush()) {
            // A reader that has gone is no error.
            Err(failed) if failed.kind() != std::io::ErrorKind::BrokenPipe => {
                let failed = Error::io("cannot write", "standard output", failed);
                let _ = writeln!(std::io::stderr(), "{failed}");
                failed.exit
            }
            _ => Exit::Done,
        };
    }
    let options: Vec<OsString> = args.take_while(|arg| arg != "--").collect();
    if options.iter().any(|arg| arg == "--json") {
        // Which `-` it is, if any, cannot be told for certain; a volume must not be mixed with anything.
        object(&usage(&error.render().to_string()), options.iter().any(|arg| arg == "-"));
    }
    let _ = error.print();
    Exit::Usage
}

/// The sentence of what clap says: its first paragraph, without the usage and the pointer to help that follow.
fn usage(text: &str) -> Error {
    let paragraph = text.split("\n\n").next().unwrap_or_default();
    let words: Vec<&str> = paragraph.split_whitespace().collect();
    let sentence = words.join(" ");
    Error::usage(sentence.strip_prefix("error: ").unwrap_or(&sentence))
        .hint("`cryptctl --help` shows what is possible")
}

/// An error as a wire object.
fn object(error: &Error, stdout_is_data: bool) {
    let response = Response { v: PROTOCOL_VERSION, id: 0, body: Body::Error((*error.failure).clone()) };
    let text = serde_json::to_string(&response).expect("wire types have string keys and finite numbers");
    Output::new(stdout_is_data).line(&text);
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
        object(error, stdout_is_data);
    }
    let _ = writeln!(std::io::stderr(), "{error}");
}
