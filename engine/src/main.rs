//! `cryptd`: parse, run, exit code.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use engine::config::Overrides;
use engine::daemon::{self, Ended, Options};
use engine::error::ErrorKind;
use engine::sys::process;

/// Encrypts and decrypts volumes for cryptctl.
///
/// cryptd listens on a Unix socket and carries out what cryptctl asks: it moves volumes between files and devices that
/// cryptctl opened with its caller's rights, at the speed of the device. It opens no path of anybody and needs no
/// privilege. cryptctl starts one for its user when none answers; run it yourself to configure it, or from systemd.
///
/// It stays in the foreground and logs to standard error. SIGTERM or SIGINT ends it when the active jobs are done; a second one cancels them.
#[derive(Parser)]
#[command(name = "cryptd", version, after_help = AFTER_HELP)]
struct Args {
    /// Read the configuration from FILE (TOML); every key has a default
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Listen on PATH [default: $XDG_RUNTIME_DIR/cryptd/cryptd.sock, else /tmp/cryptd-UID/cryptd.sock]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Leave after SECONDS without connections and jobs; 0: never
    #[arg(long, value_name = "SECONDS")]
    idle_exit: Option<u64>,
    /// Check the configuration and exit
    #[arg(long)]
    check: bool,
}

const AFTER_HELP: &str = "Environment:
  CRYPTD_LOG       what is logged to standard error: error, warn, info, debug, trace
  XDG_RUNTIME_DIR  where the socket's directory is made

Exit codes:
  0  it served and left, or another cryptd serves this socket already
  1  it could not start or go on
  2  wrong usage or configuration";

fn main() -> ExitCode {
    process::close_inherited();
    let args = Args::parse();
    let options = Options {
        config: args.config,
        over: Overrides { socket: args.socket, idle_exit: args.idle_exit },
        check: args.check,
    };
    match daemon::run(&options) {
        Ok(Ended::Left) => ExitCode::SUCCESS,
        Ok(Ended::AlreadyServed) => {
            eprintln!("cryptd: another cryptd serves this socket already");
            ExitCode::SUCCESS
        }
        Ok(Ended::Checked) => {
            eprintln!("cryptd: the configuration is valid");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("cryptd: {}", error.chain());
            let usage = matches!(error.kind(), ErrorKind::Invalid | ErrorKind::Unsupported);
            ExitCode::from(if usage { 2 } else { 1 })
        }
    }
}
