//! What was typed means: a job for the wire, with its descriptors.
//!
//! In two steps, because a prompt or a slow pipe may come between: `open` finds out all that can be wrong and
//! changes nothing; `create` makes the `.partial` and takes the key's pipe, and must be followed by the request.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use proto::{Action, Format, Submit, Tuning, Volume};

use crate::args::{Bench, Decrypt, Encrypt, Ends, Moving, SinkArgs, Verify};
use crate::endpoint::{self, Access, End, Sink};
use crate::partial::Place;
use crate::passing::{PartialFile, Passed, Passing};
use crate::report::{Error, Result};
use crate::volume::{self, Keys, Wanted};

/// A checked job: ends open, key at hand, nothing changed yet.
pub struct Opened {
    submit: Submit,
    source: Option<End>,
    sink: Option<Sink>,
    /// A detached header: an existing one is [`Sink::Open`].
    header: Option<Sink>,
    keys: Option<Keys>,
    /// Where the copy keeps how far it has come.
    checkpoint: Option<Checkpoint>,
    keep_partial: bool,
    /// Standard output carries a volume, so nothing else may go there.
    pub stdout_is_data: bool,
    /// Sentences for the user.
    pub warnings: Vec<String>,
    /// What may explain a wrong key.
    pub doubt: Option<String>,
}

/// A checkpoint to be made, or gone on from.
struct Checkpoint {
    place: Place,
    resume: bool,
    interval_ms: Option<u32>,
}

/// A job ready to be sent.
pub struct Prepared {
    /// The request.
    pub submit: Submit,
    /// In the order of the indices in `submit`.
    pub descriptors: Vec<OwnedFd>,
    /// The new files, to be removed if the daemon cannot.
    pub partials: Vec<PartialFile>,
}

/// Files that hold plaintext are for their owner. Ciphertext is for everybody the umask allows, with a header in front of it too:
/// a volume is what other accounts copy and back up. (A bare header is not: see `endpoint`.)
const PLAINTEXT_MODE: u32 = 0o600;
const CIPHERTEXT_MODE: u32 = 0o666;

/// `cryptctl encrypt`
pub fn encrypt(args: &Encrypt) -> Result<Opened> {
    let wanted = volume::to_make(&args.volume)?;
    let tuning = Tuning { pad: args.pad.pad, ..tuning(&args.moving) };
    let submit = submit(Action::Encrypt, &args.moving, tuning);
    write_volume(submit, &args.ends, wanted, &args.sink, CIPHERTEXT_MODE)
}

/// `cryptctl decrypt`
pub fn decrypt(args: &Decrypt) -> Result<Opened> {
    let wanted = volume::to_open(&args.volume)?;
    let tuning = Tuning {
        sparse: args.no_sparse.then_some(false),
        keep_holes: args.holes.keep_holes,
        ..tuning(&args.moving)
    };
    let submit = submit(Action::Decrypt, &args.moving, tuning);
    write_volume(submit, &args.ends, wanted, &args.sink, PLAINTEXT_MODE)
}

/// `cryptctl verify`
pub fn verify(args: &Verify) -> Result<Opened> {
    let mut wanted = volume::to_open(&args.volume)?;
    let tuning = Tuning { pad: args.pad.pad, keep_holes: args.holes.keep_holes, ..tuning(&args.moving) };
    if endpoint::is_dash(&args.ends.source) && endpoint::is_dash(&args.ends.sink) {
        return Err(Error::usage("SRC and DST cannot both be standard input"));
    }
    refuse_shared_stdin(&[&args.ends.source, &args.ends.sink], &wanted)?;
    let source = endpoint::open_readable(&args.ends.source, "SRC")?;
    let sink = endpoint::open_readable(&args.ends.sink, "DST")?;
    endpoint::refuse_same_ends(&source, &sink)?;
    let header = existing_header(&wanted)?;
    let keys = wanted.fetch(&sink.name, false)?;
    let submit = submit(Action::Verify, &args.moving, tuning);
    Ok(Opened::new(submit, (source, Sink::Open(sink), header), (wanted.format, keys)))
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
        reencrypt: None,
        detach: false,
        bytes_per_second: None,
        remotes: Vec::new(),
        background_share: None,
        tuning: Tuning::default(),
        checkpoint: None,
    }
}

fn write_volume(
    submit: Submit,
    ends: &Ends,
    mut wanted: Wanted,
    args: &SinkArgs,
    mode: u32,
) -> Result<Opened> {
    refuse_shared_stdin(&[&ends.source], &wanted)?;
    let making = submit.action == Action::Encrypt;
    let source = endpoint::open_readable(&ends.source, "SRC")?;
    // What an interrupted copy left is to be written again; the daemon looks whether it is that.
    let force = args.force || args.resume;
    let again = |sink| if args.resume { endpoint::again(sink, args.force) } else { Ok(sink) };
    let sink = endpoint::inspect_sink(&ends.sink, &source, force, mode)?;
    let checkpoint = if args.is_resumable() { Some(checkpoint(args, &source, &sink)?) } else { None };
    let sink = again(sink)?;
    let checkpoint = match checkpoint {
        Some(place) if args.resume => Some(place.again(args.force)?),
        other => other,
    };
    let header = match &wanted.header {
        Some(path) if making => {
            let header = endpoint::inspect_header(path, "--header", &source, force)?;
            endpoint::refuse_same_sinks(&header, &sink)?;
            Some(again(header)?)
        }
        _ => existing_header(&wanted)?,
    };
    let encrypted = if making { &ends.sink } else { &ends.source };
    let keys = wanted.fetch(&encrypted.display().to_string(), making)?;
    let mut opened = Opened::new(submit, (source, sink, header), (wanted.format, keys));
    let interval_ms = args.checkpoint_every;
    opened.checkpoint = checkpoint.map(|place| Checkpoint { place, resume: args.resume, interval_ms });
    opened.keep_partial = args.keep_partial;
    opened.stdout_is_data = endpoint::is_dash(&ends.sink);
    Ok(opened)
}

/// Where the checkpoint of a copy is.
fn checkpoint(args: &SinkArgs, source: &End, sink: &Sink) -> Result<Place> {
    let stream = match sink {
        _ if source.stream => Some(&source.name),
        Sink::Open(end) if end.stream => Some(&end.name),
        _ => None,
    };
    if let Some(name) = stream {
        let what = format!("{name} is a stream: what has passed it is gone, so the copy cannot be resumed");
        return Err(Error::usage(what).hint("name files or block devices, or leave --resumable away"));
    }
    let path = match (&args.checkpoint, sink) {
        (Some(path), _) => path.clone(),
        (None, Sink::New(place)) => place.checkpoint_path(),
        (None, Sink::Open(end)) => {
            let what = format!("{} is a device, and has no place for a checkpoint beside it", end.name);
            return Err(Error::usage(what).hint("name a file for it: --checkpoint FILE"));
        }
    };
    Place::checkpoint(&path, args.force)
}

fn existing_header(wanted: &Wanted) -> Result<Option<Sink>> {
    let open = |path| endpoint::open_volume(path, "--header", Access::Read).map(Sink::Open);
    wanted.header.as_deref().map(open).transpose()
}

/// A job without its ends.
pub fn submit(action: Action, moving: &Moving, tuning: Tuning) -> Submit {
    Submit {
        action,
        source: None,
        sink: None,
        volume: None,
        bench: None,
        reencrypt: None,
        detach: moving.detach,
        bytes_per_second: moving.throttle,
        tuning,
        checkpoint: None,
        remotes: Vec::new(),
        background_share: None,
    }
}

/// How to move the data.
pub fn tuning(moving: &Moving) -> Tuning {
    Tuning {
        chunk_bytes: moving.chunk_size,
        queue_depth: moving.queue_depth,
        workers: moving.workers,
        direct: moving.buffered.then_some(false),
        ..Tuning::default()
    }
}

/// `read`: the ends that are read.
fn refuse_shared_stdin(read: &[&PathBuf], wanted: &Wanted) -> Result<()> {
    if read.iter().any(|path| endpoint::is_dash(path)) && wanted.reads_stdin() {
        return Err(Error::usage("standard input cannot carry both the volume and the key")
            .hint("pass the key through another descriptor: --key fd:3 3< KEYFILE"));
    }
    wanted.refuse_shared_descriptor()
}

impl Opened {
    fn new(
        mut submit: Submit,
        (source, sink, header): (End, Sink, Option<Sink>),
        (format, mut keys): (Format, Keys),
    ) -> Self {
        submit.volume = Some(Volume { format, key_fd: 0 });
        let mut warnings = std::mem::take(&mut keys.key.warnings);
        warnings.extend(keys.volume_key.iter_mut().flat_map(|key| std::mem::take(&mut key.warnings)));
        Self {
            submit,
            source: Some(source),
            sink: Some(sink),
            header,
            doubt: keys.key.doubt.take(),
            keys: Some(keys),
            checkpoint: None,
            keep_partial: false,
            stdout_is_data: false,
            warnings,
        }
    }

    /// Create what must exist before the daemon can begin.
    pub fn create(self) -> Result<Prepared> {
        let Self { mut submit, source, sink, header, keys, checkpoint, keep_partial, .. } = self;
        let mut passing = Passing::default();
        if let Some(Checkpoint { place, resume, interval_ms }) = checkpoint {
            let wish = passing.checkpoint(place)?;
            submit.checkpoint = Some(Box::new(proto::Checkpoint { resume, interval_ms, ..wish }));
        }
        if let (Some(keys), Some(volume)) = (keys, submit.volume.as_mut()) {
            volume.key_fd = passing.secret(keys.key)?;
            let volume_key = keys.volume_key.map(|key| passing.secret(key)).transpose()?;
            match (&mut volume.format, header) {
                (Format::NewLuks(new), header) => {
                    new.volume_key_fd = volume_key;
                    new.header = header.map(|sink| passing.new_file(sink, keep_partial)).transpose()?;
                }
                (Format::Luks(open), Some(Sink::Open(end))) => open.header = Some(passing.file(end)),
                (Format::Luks(_), Some(Sink::New(_))) => unreachable!("an existing header is open"),
                (Format::Luks(_) | Format::Raw(_), _) => {}
            }
        }
        if let Some(End { fd, stream, name, .. }) = source {
            submit.source = Some(proto::Source { fd: passing.fd(fd), name, stream });
        }
        if let Some(sink) = sink {
            let Passed { fd, name, stream, commit } = passing.sink(sink, keep_partial)?;
            submit.sink = Some(proto::Sink { fd, name, stream, commit });
        }
        let (descriptors, partials) = passing.finish();
        Ok(Prepared { submit, descriptors, partials })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Cli, Verb};
    use clap::Parser;
    use proto::{Raw, TweakKind, luks};
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
        let Prepared { submit, descriptors, partials } =
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
        partials[0].refused();
        assert!(!dir.path().join("out.partial").exists());
    }

    #[test]
    fn a_checkpoint_is_made_beside_the_partial_and_found_again() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().expect("dir");
        let words = "decrypt @/in @/out --format raw --key file:@/key";
        let (partial, mark) = (dir.path().join("out.partial"), dir.path().join("out.partial.checkpoint"));
        let error = typed(dir.path(), &format!("{words} --resume")).err().expect("nothing there");
        assert!(error.to_string().contains("nothing to resume"), "{error}");
        let (submit, count, partials) =
            sent(dir.path(), &format!("{words} --resumable --checkpoint-every 0.5"));
        let wish = submit.checkpoint.expect("a checkpoint");
        let entry = wish.entry.expect("removable");
        assert_eq!(
            (entry.name.as_str(), wish.resume, wish.interval_ms),
            ("out.partial.checkpoint", false, Some(500))
        );
        assert!(wish.fd != entry.dir_fd && count == 6);
        let mode = std::fs::metadata(&mark).expect("made").mode();
        assert_eq!(mode & 0o077, 0, "{mode:o}: it may hold a header");
        // A daemon that goes away leaves both; the locks go with the descriptors.
        let said: Vec<String> = partials.iter().filter_map(PartialFile::abandon).collect();
        assert!(said.iter().any(|text| text.contains("--resume goes on")), "{said:?}");
        drop(partials);
        assert!(partial.exists() && mark.exists());
        let (submit, _, partials) = sent(dir.path(), &format!("{words} --resume"));
        assert!(submit.checkpoint.is_some_and(|wish| wish.resume));
        // What was found is not ours to remove.
        partials.iter().for_each(PartialFile::refused);
        assert!(partial.exists() && mark.exists());
    }

    #[test]
    fn what_has_passed_a_pipe_cannot_be_resumed() {
        let dir = tempfile::tempdir().expect("dir");
        for option in ["--resumable", "--checkpoint @/mark", "--checkpoint-every 1"] {
            let fifo = dir.path().join("fifo");
            let _ = rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::from_raw_mode(0o600));
            // Open for both, or opening it would wait for the other end.
            let _held = std::fs::File::options().read(true).write(true).open(&fifo).expect("opens");
            let error =
                refused(dir.path(), &format!("encrypt @/fifo @/out --format raw --key file:@/key {option}"));
            assert!(error.to_string().contains("is a stream"), "{error}");
        }
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

    fn sent(dir: &Path, args: &str) -> (Submit, usize, Vec<PartialFile>) {
        let prepared = typed(dir, args).and_then(Opened::create);
        let Prepared { submit, descriptors, partials } = prepared.unwrap_or_else(|error| panic!("{error}"));
        (submit, descriptors.len(), partials)
    }

    fn refused(dir: &Path, args: &str) -> Error {
        let error = typed(dir, args).err().unwrap_or_else(|| panic!("{args}: accepted"));
        assert_eq!(error.exit as u8, 2, "{args}: {error}");
        error
    }

    #[test]
    fn luks2_is_made_unless_another_format_is_named() {
        let dir = tempfile::tempdir().expect("dir");
        for (flag, version) in [
            ("", luks::Version::Luks2),
            (" --format luks2", luks::Version::Luks2),
            (" --format luks1", luks::Version::Luks1),
        ] {
            let (submit, ..) =
                sent(dir.path(), &format!("encrypt @/in @/out --key file:@/key{flag} --force"));
            let Some(Volume { format: Format::NewLuks(new), .. }) = submit.volume else { panic!("not LUKS") };
            assert_eq!(new.version, version);
            assert!(new.header.is_none() && new.volume_key_fd.is_none());
        }
    }

    #[test]
    fn a_new_volume_may_have_its_header_elsewhere_and_its_own_volume_key() {
        let dir = tempfile::tempdir().expect("dir");
        std::fs::write(dir.path().join("vk"), [7; 64]).expect("write");
        let (submit, count, partials) = sent(
            dir.path(),
            "encrypt @/in @/out --key file:@/key --header @/head --volume-key file:@/vk --label x",
        );
        let Some(Volume { format: Format::NewLuks(new), key_fd }) = submit.volume else { panic!("not LUKS") };
        let header = new.header.expect("a header of its own");
        let (header_commit, sink) = (header.commit.expect("a new file"), submit.sink.expect("a sink"));
        let mut used = vec![key_fd, new.volume_key_fd.expect("its own"), header.fd, header_commit.dir_fd];
        used.extend([submit.source.expect("source").fd, sink.fd, sink.commit.expect("a new file").dir_fd]);
        used.sort_unstable();
        assert_eq!(used, [0, 1, 2, 3, 4, 5, 6]);
        assert_eq!(count, 7);
        assert_eq!((header_commit.name.as_str(), header_commit.partial.as_str()), ("head", "head.partial"));
        use std::os::unix::fs::MetadataExt;
        let mode = std::fs::metadata(dir.path().join("head.partial")).expect("created").mode();
        assert_eq!(mode & 0o077, 0, "{mode:o}: a bare header is its owner's");
        assert_eq!(partials.len(), 2);
        partials.iter().for_each(PartialFile::refused);
        assert!(!dir.path().join("head.partial").exists() && !dir.path().join("out.partial").exists());
    }

    #[test]
    fn an_existing_volume_is_luks_unless_called_raw() {
        let dir = tempfile::tempdir().expect("dir");
        for flag in ["", " --format luks"] {
            let (submit, ..) =
                sent(dir.path(), &format!("decrypt @/in @/out --key file:@/key --key-slot 3 --force{flag}"));
            let Some(Volume { format: Format::Luks(open), .. }) = submit.volume else { panic!("not LUKS") };
            assert_eq!(open, luks::Open { header: None, keyslot: Some(3), secret: luks::Secret::Passphrase });
        }
        // What the header tells is not asked for, and so cannot be asked for in vain.
        for words in ["decrypt a b --format luks1", "verify a b --format luks2"] {
            let words = ["cryptctl"].into_iter().chain(words.split(' ')).chain(["--key", "prompt"]);
            assert_eq!(Cli::try_parse_from(words).expect_err("no such format").exit_code(), 2);
        }
        std::fs::write(dir.path().join("head"), "h").expect("write");
        for verb in ["decrypt @/in @/new", "verify @/in @/key"] {
            let (submit, count, _) =
                sent(dir.path(), &format!("{verb} --volume-key file:@/key --header @/head"));
            let Some(Volume { format: Format::Luks(open), key_fd }) = submit.volume else {
                panic!("not LUKS")
            };
            assert_eq!(open.secret, luks::Secret::VolumeKey);
            let header = open.header.expect("its own header");
            assert!(header.name.ends_with("/head") && header.fd != key_fd, "{header:?}");
            assert_eq!(count, if verb.starts_with("decrypt") { 5 } else { 4 });
        }
    }

    #[test]
    fn options_of_one_format_are_refused_with_another() {
        let dir = tempfile::tempdir().expect("dir");
        for option in ["--iv plain", "--iv plain64", "--iv-large-sectors", "--iv-offset 0"] {
            for verb in ["encrypt @/in @/out", "decrypt @/in @/out", "verify @/in @/key"] {
                let error = refused(dir.path(), &format!("{verb} --key file:@/key {option}"));
                assert!(error.to_string().contains("is an option of --format raw"), "{error}");
            }
        }
        for option in ["--key-size 512", "--sector-size 512"] {
            let error = refused(dir.path(), &format!("decrypt @/in @/out --key file:@/key {option}"));
            assert!(error.to_string().contains("is an option of --format raw"), "{error}");
        }
        for option in [
            "--header x",
            "--volume-key prompt",
            "--cipher aes-xts-plain64",
            "--hash sha256",
            "--data-offset 0",
            "--label x",
            "--subsystem x",
            "--uuid 0f8fad5b-d9cb-469f-a165-70867728950e",
            "--key-slot 0",
            "--luks2-metadata-size 16k",
            "--luks2-keyslots-size 1M",
            "--pbkdf pbkdf2",
            "--iter-time 1",
            "--pbkdf-force-iterations 1000",
            "--pbkdf-memory 64",
            "--pbkdf-parallel 1",
        ] {
            let error =
                refused(dir.path(), &format!("encrypt @/in @/out --format raw --key file:@/key {option}"));
            assert!(error.to_string().contains("is an option of LUKS"), "{error}");
        }
        for option in ["--header x", "--key-slot 0"] {
            let error =
                refused(dir.path(), &format!("verify @/in @/key --format raw --key file:@/key {option}"));
            assert!(error.to_string().contains("is an option of LUKS"), "{error}");
        }
        let error = refused(dir.path(), "decrypt @/in @/out --format raw --volume-key file:@/key");
        assert!(error.to_string().contains("is an option of LUKS"), "{error}");
    }

    #[test]
    fn header_and_data_need_places_of_their_own() {
        let dir = tempfile::tempdir().expect("dir");
        for header in ["@/in", "@/out", "@/../{}/out", "-"] {
            let own = dir.path().file_name().and_then(|name| name.to_str()).expect("UTF-8");
            let header = header.replace("{}", own);
            refused(dir.path(), &format!("encrypt @/in @/out --key file:@/key --header {header}"));
        }
        std::fs::write(dir.path().join("old"), "header").expect("write");
        let error = typed(dir.path(), "encrypt @/in @/out --key file:@/key --header @/old").err();
        assert!(error.expect("refused").to_string().contains("exists and is not empty"));
        assert!(typed(dir.path(), "encrypt @/in @/out --key file:@/key --header @/old --force").is_ok());
    }

    #[test]
    fn a_newline_at_the_end_of_a_passphrase_is_told_of() {
        let dir = tempfile::tempdir().expect("dir");
        std::fs::write(dir.path().join("line"), "secret\n").expect("write");
        let words = "the newline is part of the key, as with cryptsetup --key-file";
        let new = typed(dir.path(), "encrypt @/in @/out --key file:@/line").unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(new.warnings.iter().filter(|warning| warning.contains(words)).count(), 1);
        let old = typed(dir.path(), "decrypt @/in @/out --key file:@/line").unwrap_or_else(|e| panic!("{e}"));
        assert!(
            !old.warnings.iter().any(|warning| warning.contains(words)),
            "a key that fits needs no remark"
        );
        assert!(old.doubt.expect("one that does not").contains(words));
        let raw = typed(dir.path(), "decrypt @/in @/out --format raw --key file:@/key");
        assert!(raw.unwrap_or_else(|e| panic!("{e}")).doubt.is_none());
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
            "encrypt - @/out --key file:@/key --volume-key fd:0",
            "decrypt - @/out --volume-key fd:0",
        ] {
            assert!(
                typed(dir.path(), args).err().expect("refused").to_string().contains("standard input"),
                "{args}"
            );
        }
    }
}
