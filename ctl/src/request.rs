//! What was typed means: a job for the wire, with its descriptors.
//!
//! In two steps, because a prompt or a slow pipe may come between: `open` finds out all that can be wrong and
//! changes nothing; `create` makes the `.partial` and takes the key's pipe, and must be followed by the request.

use std::os::fd::OwnedFd;
use std::path::PathBuf;

use proto::{Action, ErrorKind, Format, Submit, Tuning, Volume};

use crate::args::{Bench, Decrypt, Encrypt, Ends, Moving, Nbd, SinkArgs, Verify};
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
    let wanted =
        if args.update.update { volume::to_update(&args.volume)? } else { volume::to_make(&args.volume)? };
    let tuning = Tuning { pad: args.pad.pad, ..tuning(&args.moving) };
    let submit = submit(Action::Encrypt, &args.moving, tuning);
    write_volume(submit, &args.ends, wanted, (&args.sink, args.update.update, &args.nbd), CIPHERTEXT_MODE)
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
    write_volume(submit, &args.ends, wanted, (&args.sink, args.update.update, &args.nbd), PLAINTEXT_MODE)
}

/// `cryptctl verify`
pub fn verify(args: &Verify) -> Result<Opened> {
    let mut wanted = volume::to_open(&args.volume)?;
    let tuning = Tuning { pad: args.pad.pad, keep_holes: args.holes.keep_holes, ..tuning(&args.moving) };
    if endpoint::is_dash(&args.ends.source) && endpoint::is_dash(&args.ends.sink) {
        return Err(Error::usage("SRC and DST cannot both be standard input"));
    }
    refuse_shared_stdin(&[&args.ends.source, &args.ends.sink], &wanted)?;
    let mut source = endpoint::open_readable(&args.ends.source, "SRC")?;
    let mut sink = Sink::Open(endpoint::open_readable(&args.ends.sink, "DST")?);
    if let Sink::Open(sink) = &sink {
        endpoint::refuse_same_ends(&source, sink)?;
    }
    let header = existing_header(&wanted)?;
    tell_servers(&args.nbd, false, (&mut source, &mut sink))?;
    let keys = wanted.fetch(&args.ends.sink.display().to_string(), false)?;
    let submit = submit(Action::Verify, &args.moving, tuning);
    Ok(Opened::new(submit, (source, sink, header), (wanted.format, keys)))
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
    (args, update, nbd): (&SinkArgs, bool, &Nbd),
    mode: u32,
) -> Result<Opened> {
    refuse_shared_stdin(&[&ends.source], &wanted)?;
    let is_encrypt = submit.action == Action::Encrypt;
    let making = is_encrypt && !update;
    let mut source = endpoint::open_readable(&ends.source, "SRC")?;
    // What an interrupted copy left is to be written again; the daemon looks whether it is that.
    let force = args.force || args.resume;
    let again = |sink| if args.resume { endpoint::again(sink, args.force) } else { Ok(sink) };
    let mut sink = if update {
        endpoint::open_copy(&ends.sink, &source)?
    } else {
        let advise = |error: Error| {
            match error.failure.kind {
            ErrorKind::Conflict if nbd.bitmap.is_some() => error.hint(
                "--update overwrites in place what the bitmap marks, of an earlier copy; --force makes a new one of that alone",
            ),
            _ => error,
        }
        };
        endpoint::inspect_sink(&ends.sink, &source, force, mode).map_err(advise)?
    };
    tell_servers(nbd, update, (&mut source, &mut sink))?;
    if nbd.bitmap.is_some() && args.is_resumable() {
        let what = "a copy of what a bitmap marks cannot be resumed";
        return Err(Error::usage(what).hint("it is repeated, with the same bitmap; leave --resumable out"));
    }
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
    let encrypted = if is_encrypt { &ends.sink } else { &ends.source };
    let keys = wanted.fetch(&encrypted.display().to_string(), making)?;
    let mut opened = Opened::new(submit, (source, sink, header), (wanted.format, keys));
    let interval_ms = args.checkpoint_every;
    opened.checkpoint = checkpoint.map(|place| Checkpoint { place, resume: args.resume, interval_ms });
    opened.keep_partial = args.keep_partial;
    opened.stdout_is_data = endpoint::is_dash(&ends.sink);
    Ok(opened)
}

/// What was typed about servers, to those that there are.
fn tell_servers(nbd: &Nbd, update: bool, (source, sink): (&mut End, &mut Sink)) -> Result<()> {
    if let (Some(bitmap), None) = (&nbd.bitmap, source.remote()) {
        let what =
            format!("--bitmap {bitmap}: {} is no volume of an NBD server, which alone has one", source.name);
        return Err(Error::usage(what).hint("nbd+unix:///NAME?socket=PATH and nbd://HOST/NAME are"));
    }
    if let (Some(_), Sink::Open(End { stream: true, name, .. })) = (&nbd.bitmap, &*sink) {
        let what = format!("--bitmap: {name} is a stream, and what is not marked would be missing from it");
        return Err(Error::usage(what));
    }
    let sink = match sink {
        Sink::Open(end) => end.remote_mut(),
        Sink::New(_) => None,
    };
    let source = source.remote_mut();
    if nbd.reconnect.is_some() && source.is_none() && sink.is_none() {
        return Err(no_server("--reconnect"));
    }
    if let Some(source) = source {
        (source.bitmap, source.update) = (nbd.bitmap.clone(), update);
        source.reconnect_ms = nbd.reconnect;
    }
    if let Some(sink) = sink {
        sink.reconnect_ms = nbd.reconnect;
    }
    Ok(())
}

/// An option that was typed in vain.
pub fn no_server(option: &str) -> Error {
    Error::usage(format!("{option} is of NBD servers, and none is named"))
        .hint("nbd+unix:///NAME?socket=PATH and nbd://HOST/NAME name one")
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
            let kind = if end.remote().is_some() { "on a server" } else { "a device" };
            let what = format!("{} is {kind}, and has no place for a checkpoint beside it", end.name);
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
                (Format::Luks(open), Some(Sink::Open(end))) => open.header = Some(passing.file(end)?),
                (Format::Luks(_), Some(Sink::New(_))) => unreachable!("an existing header is open"),
                (Format::Luks(_) | Format::Raw(_), _) => {}
            }
        }
        if let Some(End { handle, stream, name, .. }) = source {
            submit.source = Some(proto::Source { fd: passing.end(handle, &name)?, name, stream });
        }
        if let Some(sink) = sink {
            let Passed { fd, name, stream, commit } = passing.sink(sink, keep_partial)?;
            submit.sink = Some(proto::Sink { fd, name, stream, commit });
        }
        submit.remotes = passing.remotes();
        let (descriptors, partials) = passing.finish();
        Ok(Prepared { submit, descriptors, partials })
    }
}

#[cfg(test)]
mod tests;
