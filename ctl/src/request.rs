//! What was typed means: a job for the wire, with its descriptors.
//!
//! In two steps, because a prompt or a slow pipe may come between: `open` finds out all that can be wrong and
//! changes nothing; `create` makes the `.partial` and takes the key's pipe, and must be followed by the request.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use proto::{Action, Commit, ErrorKind, Format, Raw, Submit, Tuning, TweakKind, Volume};

use crate::args::{Bench, Decrypt, Encrypt, Ends, FormatName, Iv, Moving, Verify, VolumeArgs};
use crate::endpoint::{self, End, Sink};
use crate::partial::Partial;
use crate::report::{Error, Result};
use crate::secret::{self, VolumeKey};

/// A checked job: ends open, key at hand, nothing changed yet.
pub struct Opened {
    submit: Submit,
    source: Option<End>,
    sink: Option<Sink>,
    key: Option<VolumeKey>,
    keep_partial: bool,
    /// Standard output carries a volume, so nothing else may go there.
    pub stdout_is_data: bool,
    /// Sentences for the user.
    pub warnings: Vec<String>,
}

/// A job ready to be sent.
pub struct Prepared {
    /// The request.
    pub submit: Submit,
    /// In the order of the indices in `submit`.
    pub descriptors: Vec<OwnedFd>,
    /// The new file, to be removed if the daemon cannot.
    pub partial: Option<PartialFile>,
}

/// The new file, for as long as this command answers for it.
pub struct PartialFile {
    file: Partial,
    keep: bool,
}

/// Files that hold plaintext are for their owner; ciphertext is for everybody the umask allows.
const PLAINTEXT_MODE: u32 = 0o600;
const CIPHERTEXT_MODE: u32 = 0o666;

/// `cryptctl encrypt`
pub fn encrypt(args: &Encrypt) -> Result<Opened> {
    let format = format(&args.volume)?;
    let tuning = Tuning { pad: args.pad.pad, ..tuning(&args.moving) };
    let submit = submit(Action::Encrypt, &args.moving, tuning);
    write_volume(
        submit,
        &args.ends,
        &args.volume,
        format,
        (args.sink.force, args.sink.keep_partial),
        CIPHERTEXT_MODE,
    )
}

/// `cryptctl decrypt`
pub fn decrypt(args: &Decrypt) -> Result<Opened> {
    let format = format(&args.volume)?;
    let tuning = Tuning {
        sparse: args.no_sparse.then_some(false),
        keep_holes: args.holes.keep_holes,
        ..tuning(&args.moving)
    };
    let submit = submit(Action::Decrypt, &args.moving, tuning);
    write_volume(
        submit,
        &args.ends,
        &args.volume,
        format,
        (args.sink.force, args.sink.keep_partial),
        PLAINTEXT_MODE,
    )
}

/// `cryptctl verify`
pub fn verify(args: &Verify) -> Result<Opened> {
    let format = format(&args.volume)?;
    let tuning = Tuning { pad: args.pad.pad, keep_holes: args.holes.keep_holes, ..tuning(&args.moving) };
    if endpoint::is_dash(&args.ends.source) && endpoint::is_dash(&args.ends.sink) {
        return Err(Error::usage("SRC and DST cannot both be standard input"));
    }
    refuse_shared_stdin(&args.ends, &args.volume, true)?;
    let source = endpoint::open_readable(&args.ends.source, "SRC")?;
    let sink = endpoint::open_readable(&args.ends.sink, "DST")?;
    endpoint::refuse_same_ends(&source, &sink)?;
    let key = fetch(&args.volume, &format, false)?;
    let mut submit = submit(Action::Verify, &args.moving, tuning);
    submit.volume = Some(Volume { format, key_fd: 0 });
    Ok(Opened::new(submit, source, Sink::Open(sink), key))
}

/// `cryptctl bench`
pub fn bench(args: &Bench) -> Submit {
    Submit {
        action: Action::Bench,
        source: None,
        sink: None,
        volume: None,
        bench: Some(proto::Bench {
            kernel: args.kernel.clone(),
            buffer_bytes: args.buffer,
            millis: args.millis,
            rounds: args.rounds,
        }),
        detach: false,
        bytes_per_second: None,
        tuning: Tuning::default(),
    }
}

fn write_volume(
    mut submit: Submit,
    ends: &Ends,
    volume: &VolumeArgs,
    format: Format,
    (force, keep_partial): (bool, bool),
    mode: u32,
) -> Result<Opened> {
    refuse_shared_stdin(ends, volume, false)?;
    let source = endpoint::open_readable(&ends.source, "SRC")?;
    let sink = endpoint::inspect_sink(&ends.sink, &source, force, mode)?;
    let key = fetch(volume, &format, submit.action == Action::Encrypt)?;
    submit.volume = Some(Volume { format, key_fd: 0 });
    let mut opened = Opened::new(submit, source, sink, key);
    opened.keep_partial = keep_partial;
    opened.stdout_is_data = endpoint::is_dash(&ends.sink);
    Ok(opened)
}

fn format(volume: &VolumeArgs) -> Result<Format> {
    match volume.format {
        Some(FormatName::Raw) => {}
        Some(FormatName::Luks1 | FormatName::Luks2) => {
            return Err(Error::new(ErrorKind::Unsupported, "LUKS is not supported yet by this version")
                .hint("--format raw is dm-crypt plain: no header, the key is the volume key"));
        }
        None => {
            return Err(Error::usage("the format must be named")
                .hint("pass --format raw (dm-crypt plain: no header, the key is the volume key)"));
        }
    }
    let number = |text: &str| text.parse::<u32>().expect("clap allows only the listed numbers");
    Ok(Format::Raw(Raw {
        key_bytes: number(&volume.key_size) / 8,
        data_unit: number(&volume.sector_size),
        tweak: match volume.iv {
            Iv::Plain64 => TweakKind::Plain64,
            Iv::Plain => TweakKind::Plain,
        },
        large_tweak: volume.iv_large_sectors,
        tweak_offset: volume.iv_offset,
    }))
}

fn submit(action: Action, moving: &Moving, tuning: Tuning) -> Submit {
    Submit {
        action,
        source: None,
        sink: None,
        volume: None,
        bench: None,
        detach: moving.detach,
        bytes_per_second: moving.throttle,
        tuning,
    }
}

fn tuning(moving: &Moving) -> Tuning {
    Tuning {
        chunk_bytes: moving.chunk_size,
        queue_depth: moving.queue_depth,
        workers: moving.workers,
        direct: moving.buffered.then_some(false),
        ..Tuning::default()
    }
}

fn refuse_shared_stdin(ends: &Ends, volume: &VolumeArgs, sink_is_read: bool) -> Result<()> {
    let key = volume.key.parse()?;
    let volume_on_stdin = endpoint::is_dash(&ends.source) || sink_is_read && endpoint::is_dash(&ends.sink);
    if volume_on_stdin && key.reads_stdin() {
        return Err(Error::usage("standard input cannot carry both the volume and the key")
            .hint("pass the key through another descriptor: --key fd:3 3< KEYFILE"));
    }
    Ok(())
}

fn fetch(volume: &VolumeArgs, format: &Format, twice: bool) -> Result<VolumeKey> {
    let Format::Raw(raw) = format else {
        return Err(Error::new(ErrorKind::Unsupported, "LUKS is not supported yet"));
    };
    let key_bytes = usize::try_from(raw.key_bytes).expect("32 or 64");
    secret::fetch(&volume.key.parse()?, key_bytes, twice)
}

impl Opened {
    fn new(submit: Submit, source: End, sink: Sink, mut key: VolumeKey) -> Self {
        let warnings = std::mem::take(&mut key.warnings);
        Self {
            submit,
            source: Some(source),
            sink: Some(sink),
            key: Some(key),
            keep_partial: false,
            stdout_is_data: false,
            warnings,
        }
    }

    /// Create what must exist before the daemon can begin.
    pub fn create(self) -> Result<Prepared> {
        let Self { mut submit, source, sink, key, keep_partial, .. } = self;
        let mut descriptors = Vec::new();
        let mut pass = |fd: OwnedFd| {
            descriptors.push(fd);
            u32::try_from(descriptors.len() - 1).expect("at most four")
        };
        if let (Some(key), Some(volume)) = (key, submit.volume.as_mut()) {
            volume.key_fd = pass(key.into_pipe()?);
        }
        if let Some(End { fd, stream, name, .. }) = source {
            submit.source = Some(proto::Source { fd: pass(fd), name, stream });
        }
        let mut partial = None;
        match sink {
            Some(Sink::Open(End { fd, stream, name, .. })) => {
                submit.sink = Some(proto::Sink { fd: pass(fd), name, stream, commit: None });
            }
            Some(Sink::New(place)) => {
                let typed = place.typed().to_owned();
                let file = place.create()?;
                let share = |fd: BorrowedFd<'_>| {
                    fd.try_clone_to_owned().map_err(|error| {
                        file.remove();
                        Error::io("cannot pass the descriptor", file.shown().display(), error)
                    })
                };
                let (fd, dir_fd) = (share(file.fd.as_fd())?, share(file.dir_fd.as_fd())?);
                submit.sink = Some(proto::Sink {
                    fd: pass(fd),
                    name: typed,
                    stream: false,
                    commit: Some(Commit {
                        dir_fd: pass(dir_fd),
                        partial: file.partial.clone(),
                        name: file.name.clone(),
                        replace: file.replace,
                        keep_partial,
                    }),
                });
                partial = Some(PartialFile { file, keep: keep_partial });
            }
            None => {}
        }
        Ok(Prepared { submit, descriptors, partial })
    }
}

impl PartialFile {
    /// The job was refused: what we created is empty and goes.
    pub fn refused(&self) {
        self.file.remove();
    }

    /// Where the file is if nobody has removed or renamed it.
    pub fn shown(&self) -> String {
        self.file.shown().display().to_string()
    }

    /// The job ended without success, or its daemon went away: nothing half may look whole. Says what became of the file.
    pub fn abandon(&self) -> Option<String> {
        if self.file.is_in_place() {
            Some(format!(
                "{} was whole and in place already, but that may not outlast a power cut",
                self.file.name
            ))
        } else if self.keep {
            Some(format!("{} was kept", self.file.shown().display()))
        } else {
            self.file.remove().then(|| format!("{} was removed", self.file.shown().display()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Cli, Verb};
    use clap::Parser;
    use std::path::Path;

    fn typed(dir: &Path, args: &str) -> Result<Opened> {
        let key = dir.join("key");
        std::fs::write(&key, (0..64).collect::<Vec<u8>>()).expect("write");
        std::fs::write(dir.join("in"), "x").expect("write");
        let words = args.split(' ').map(|word| word.replace('@', dir.to_str().expect("UTF-8")));
        let cli = Cli::try_parse_from(std::iter::once("cryptctl".to_owned()).chain(words)).expect("parses");
        match cli.verb {
            Verb::Encrypt(args) => encrypt(&args),
            Verb::Decrypt(args) => decrypt(&args),
            Verb::Verify(args) => verify(&args),
            _ => panic!("not a volume verb"),
        }
    }

    #[test]
    fn everything_typed_reaches_the_wire() {
        let dir = tempfile::tempdir().expect("dir");
        let opened = typed(
            dir.path(),
            "encrypt @/in @/out --format raw --key file:@/key --sector-size 4096 --iv plain --iv-large-sectors \
             --iv-offset 8 --pad --throttle 1M --chunk-size 256k --queue-depth 4 --workers 2 --buffered --detach \
             --keep-partial",
        )
        .unwrap_or_else(|error| panic!("{error}"));
        let Prepared { submit, descriptors, partial } =
            opened.create().unwrap_or_else(|error| panic!("{error}"));
        let Some(Volume { format: Format::Raw(raw), key_fd }) = submit.volume else { panic!("no volume") };
        assert_eq!(
            raw,
            Raw {
                key_bytes: 64,
                data_unit: 4096,
                tweak: TweakKind::Plain,
                large_tweak: true,
                tweak_offset: 8
            }
        );
        assert_eq!(
            submit.tuning,
            Tuning {
                chunk_bytes: Some(256 << 10),
                queue_depth: Some(4),
                workers: Some(2),
                direct: Some(false),
                pad: true,
                ..Tuning::default()
            }
        );
        assert_eq!((submit.bytes_per_second, submit.detach), (Some(1 << 20), true));
        let commit = submit.sink.as_ref().and_then(|sink| sink.commit.clone()).expect("a new file");
        assert_eq!((commit.partial.as_str(), commit.name.as_str()), ("out.partial", "out"));
        assert!(commit.keep_partial && !commit.replace);
        let mut used =
            [key_fd, submit.source.expect("source").fd, submit.sink.expect("sink").fd, commit.dir_fd];
        used.sort_unstable();
        assert_eq!(used, [0, 1, 2, 3]);
        assert_eq!(descriptors.len(), 4);
        assert!(dir.path().join("out.partial").exists());
        partial.expect("a new file").refused();
        assert!(!dir.path().join("out.partial").exists());
    }

    #[test]
    fn nothing_is_created_before_the_job_is_sent() {
        let dir = tempfile::tempdir().expect("dir");
        assert!(typed(dir.path(), "decrypt @/in @/out --format raw --key file:@/key").is_ok());
        assert!(!dir.path().join("out.partial").exists() && !dir.path().join("out").exists());
    }

    #[test]
    fn plaintext_files_are_private_and_ciphertext_follows_the_umask() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().expect("dir");
        for (verb, private) in [("encrypt", false), ("decrypt", true)] {
            let opened = typed(dir.path(), &format!("{verb} @/in @/{verb} --format raw --key file:@/key"));
            let prepared = opened.and_then(Opened::create).unwrap_or_else(|error| panic!("{error}"));
            let mode = std::fs::metadata(dir.path().join(format!("{verb}.partial"))).expect("created").mode();
            assert_eq!(mode & 0o077 == 0, private, "{verb}: {mode:o}");
            drop(prepared);
        }
    }

    #[test]
    fn formats_to_come_are_refused_with_the_way_out() {
        let dir = tempfile::tempdir().expect("dir");
        for flag in ["", " --format luks1", " --format luks2"] {
            let error = typed(dir.path(), &format!("encrypt @/in @/out --key file:@/key{flag}"))
                .err()
                .expect("refused");
            assert_eq!(error.exit as u8, 2);
            assert!(error.failure.hint.as_ref().is_some_and(|hint| hint.contains("--format raw")), "{error}");
        }
    }

    #[test]
    fn a_key_typed_in_place_of_a_reference_is_not_repeated() {
        let dir = tempfile::tempdir().expect("dir");
        let error = typed(dir.path(), "encrypt @/in @/out --format raw --key 0123456789abcdef")
            .err()
            .expect("refused");
        assert_eq!(error.exit as u8, 2);
        assert!(!error.to_string().contains("0123"), "{error}");
    }

    #[test]
    fn one_stream_cannot_carry_two_things() {
        let dir = tempfile::tempdir().expect("dir");
        for args in [
            "encrypt - @/out --format raw --key fd:0",
            "verify - - --format raw --key file:@/key",
            "verify @/in - --format raw --key fd:0",
        ] {
            assert!(
                typed(dir.path(), args).err().expect("refused").to_string().contains("standard input"),
                "{args}"
            );
        }
    }
}
