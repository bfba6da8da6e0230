//! What was typed after `export`: a volume to serve, or a verb about exports there are.
//!
//! Holds no meaning beyond the shape of a single value.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::args::VolumeArgs;
use crate::export::help;
use crate::export::listen::Address;
use crate::secret::KeyText;

/// Either a volume and its options, or a verb: a volume called `list` is `./list`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Export {
    #[command(subcommand)]
    pub verb: Option<About>,
    #[command(flatten)]
    pub serve: Serve,
}

#[derive(Debug, Subcommand)]
pub enum About {
    /// List your exports
    #[command(long_about = help::LIST, after_long_help = help::LIST_AFTER)]
    List,
    /// End an export
    #[command(long_about = help::STOP, after_long_help = help::STOP_AFTER)]
    Stop {
        #[command(flatten)]
        export: ExportRef,
        /// Do not wait for clients: drop what they have asked for
        #[arg(long)]
        now: bool,
    },
    /// Show what was asked of an export, and where the time goes, stage by stage
    #[command(long_about = help::STATS, after_long_help = help::STATS_AFTER)]
    Stats(ExportRef),
}

#[derive(Debug, Clone, Copy, Args)]
pub struct ExportRef {
    /// The export's number, see `cryptctl export list`
    #[arg(value_name = "ID")]
    pub export: u64,
}

#[derive(Debug, Args)]
pub struct Serve {
    /// The encrypted volume: a file or a block device; one called like a verb is ./list
    #[arg(value_name = "VOLUME", required = true)]
    pub volume: Option<PathBuf>,
    /// Where NBD clients come in: unix:PATH or tcp:HOST:PORT
    ///
    /// Where an export of yours listens already, this one joins it and is told apart by its --name; the socket then keeps the
    /// access it was made with. Port 0 lets the kernel choose. HOST may be an address in brackets: tcp:[::1]:10809.
    #[arg(long, value_name = "ADDRESS", required = true, value_parser = Address::parse)]
    pub nbd: Option<Address>,
    #[command(flatten)]
    pub volume_args: VolumeArgs,
    /// A further passphrase, for a volume in the middle of a re-encryption whose two sides have different ones; may be repeated
    #[arg(long, value_name = "REF", conflicts_with = "volume_key", help_heading = "Volume")]
    pub other_key: Vec<KeyText>,
    #[command(flatten)]
    pub shown: Shown,
    #[command(flatten)]
    pub access: Access,
    /// Go through the page cache (no O_DIRECT)
    #[arg(long, visible_alias = "no-direct", help_heading = "Speed")]
    pub buffered: bool,
    /// Print the export's number and leave; the export goes on until it is stopped
    #[arg(long, help_heading = "Speed")]
    pub detach: bool,
}

/// What clients see.
#[derive(Debug, Args)]
#[command(next_help_heading = "Export")]
pub struct Shown {
    /// What clients call it [default: the empty name, the default export]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// A text for humans, shown by `nbdinfo --list`
    #[arg(long, value_name = "TEXT")]
    pub description: Option<String>,
    /// Serve it for reading only; VOLUME is opened for reading only
    #[arg(long)]
    pub read_only: bool,
    /// Give space back that clients discard, instead of writing encrypted zeros
    ///
    /// Discarded places then read as noise or as zeros, and whoever sees the encrypted volume sees which places are not in use, and
    /// so how full it is. Without it TRIM does nothing, and zeros that clients want written are encrypted as data is.
    #[arg(long, conflicts_with = "read_only")]
    pub discard: bool,
}

/// Who may connect.
#[derive(Debug, Args)]
#[command(next_help_heading = "Access")]
pub struct Access {
    /// Permission bits of a Unix socket, in octal [default: 600, with --allow-uid 666]
    #[arg(long, value_name = "OCTAL", value_parser = parse_mode)]
    pub mode: Option<u32>,
    /// A user that may connect to a Unix socket besides you and root, by number; may be repeated
    ///
    /// The kernel says who connects. The socket's mode, and those of the directories above it, must admit the user too.
    #[arg(long, value_name = "UID", conflicts_with = "any_user")]
    pub allow_uid: Vec<u32>,
    /// Whoever the mode of the Unix socket admits may connect: say with --mode whom
    #[arg(long, requires = "mode")]
    pub any_user: bool,
    /// The server's certificate chain, PEM: clients must speak TLS
    #[arg(long, value_name = "FILE", requires = "tls_key", requires = "tls_clients")]
    pub tls_cert: Option<PathBuf>,
    /// The private key of the certificate, PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// The authorities whose certificates clients must show, PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_clients: Option<PathBuf>,
    /// TCP without TLS, on a loopback address: every user of this machine reads and writes the plaintext
    #[arg(long, conflicts_with = "tls_cert")]
    pub insecure: bool,
}

impl Access {
    /// Was any of it typed?
    pub fn is_typed(&self) -> bool {
        self.mode.is_some()
            || !self.allow_uid.is_empty()
            || self.any_user
            || self.tls_cert.is_some()
            || self.insecure
    }
}

fn parse_mode(text: &str) -> Result<u32, String> {
    let bits = u32::from_str_radix(text, 8).ok().filter(|bits| *bits <= 0o777);
    bits.ok_or_else(|| "expected permission bits in octal, such as 660".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Cli, Verb};
    use clap::Parser;

    fn typed(words: &str) -> Result<Export, clap::Error> {
        let words = ["cryptctl", "export"].into_iter().chain(words.split_whitespace());
        Cli::try_parse_from(words).map(|cli| match cli.verb {
            Verb::Export(export) => *export,
            _ => panic!("not an export"),
        })
    }

    #[test]
    fn a_verb_is_a_verb_and_a_path_is_a_volume() {
        let list = typed("list --json").expect("a verb");
        assert!(matches!(list.verb, Some(About::List)) && list.serve.volume.is_none());
        let volume = typed("./list --nbd unix:s --key prompt").expect("a volume");
        assert!(volume.verb.is_none());
        assert_eq!(volume.serve.volume, Some(PathBuf::from("./list")));
        assert!(matches!(typed("stop 3 --now").expect("a verb").verb, Some(About::Stop { now: true, .. })));
        for bad in ["", "vol", "vol --nbd unix:s", "--nbd unix:s --key prompt", "vol --key prompt", "stop"] {
            assert_eq!(typed(bad).expect_err(bad).exit_code(), 2, "{bad}");
        }
        assert!(typed("vol --nbd unix:s --key prompt list").is_err(), "not both");
    }

    #[test]
    fn access_is_not_said_by_halves() {
        let with = |words: &str| typed(&format!("vol --nbd unix:s --key prompt {words}"));
        for good in ["--mode 660 --any-user", "--allow-uid 7 --allow-uid 8", "--mode 0660", "--insecure"] {
            with(good).unwrap_or_else(|error| panic!("{good}: {error}"));
        }
        for bad in [
            "--any-user",
            "--mode 888",
            "--mode 1777",
            "--allow-uid 7 --any-user --mode 660",
            "--tls-cert c",
            "--tls-cert c --tls-key k",
            "--tls-clients a",
            "--insecure --tls-cert c --tls-key k --tls-clients a",
            "--read-only --discard",
        ] {
            assert_eq!(with(bad).expect_err(bad).exit_code(), 2, "{bad}");
        }
    }
}
