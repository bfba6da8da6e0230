//! What was typed after `reencrypt` means: a job for the wire, with its descriptors.
//!
//! In two steps, as for other jobs: `open` finds out all that can be wrong, asks, and changes nothing; `create` makes a new header's
//! `.partial` and the journal and takes the secrets' pipes, and must be followed by the request.

use std::io::IsTerminal;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;

use proto::luks::{self, File};
use proto::reencrypt::{Format, Mode, Request, Resilience};
use proto::{Action, ErrorKind, Submit};

use crate::args::FoundFormat;
use crate::endpoint::{self, Access, End, Sink};
use crate::luks::args::parse_uuid;
use crate::luks::lock::{self, Lock, Of};
use crate::passing::Passing;
use crate::prompt;
use crate::reencrypt::args::{self, Reencrypt};
use crate::reencrypt::content;
use crate::reencrypt::journal::{self, Journal};
use crate::reencrypt::wish;
use crate::report::{Error, Exit, Result, printable};
use crate::request::{self, Prepared};
use crate::secret::{self, KeyRef, Purpose, Secret};
use crate::uri;

/// Most passphrases of one request: beside them there is room for all its other descriptors.
const MOST_KEYS: usize = 24;
/// The same where connections and certificates take some of that room.
const MOST_KEYS_REMOTE: usize = 12;

/// A checked job: files open, keys at hand, nothing changed yet.
pub struct Opened {
    submit: Submit,
    request: Request,
    volume: End,
    /// A detached header, there or to be made.
    header: Option<Sink>,
    journal: Option<Journal>,
    keys: Vec<Secret>,
    new_key: Option<Secret>,
    /// Of the LUKS header there is.
    uuid: Option<String>,
    /// The command that goes on with it when it was interrupted.
    go_on: String,
    /// Its header is LUKS1, and becomes LUKS2 first.
    pub was_luks1: bool,
    /// Sentences for the user.
    pub warnings: Vec<String>,
    /// What may explain a wrong key.
    pub doubt: Option<String>,
}

/// Asks the daemon for the header of a volume that a server has; `None`: it has none.
pub type Ask<'a> = &'a mut dyn FnMut(&End) -> Result<Option<luks::Summary>>;

/// Check what was typed, open it, ask, fetch the secrets.
pub fn open(args: &Reencrypt, ask: Ask<'_>) -> Result<Opened> {
    wish::refuse_contradictions(args)?;
    let refs = Refs::parse(args)?;
    let mut format = wish::format(args)?;
    let access = if args.dry_run { Access::Read } else { Access::Replace };
    let mode = match (args.becoming.encrypt, args.becoming.decrypt) {
        (true, _) => Mode::Encrypt,
        (_, true) => Mode::Decrypt,
        _ => Mode::Reencrypt,
    };
    let online = access == Access::Replace && mode == Mode::Reencrypt && matches!(format, Format::Luks(_));
    let (mut volume, shared) = open_data(&args.volume, access, online)?;
    volume.remote_mut().into_iter().for_each(|remote| remote.reconnect_ms = args.reconnect);
    let mut warnings = Vec::new();
    let mut journal = None;
    if let Some(path) = &args.volume_args.journal {
        let (found, warning) = journal::inspect(path, &volume, args.resume_only)?;
        journal = Some(found);
        warnings.extend(warning);
    }
    let header = args
        .volume_args
        .header
        .as_deref()
        .map(|path| header(path, &volume, (mode, access), ask))
        .transpose()?;
    let (header, known) = match header {
        Some((sink, known)) => (Some(sink), known),
        None if matches!(format, Format::Raw(_)) => (None, Head::default()),
        None => (None, Head::of(&volume, ask)?),
    };
    let uuid = known.uuid.clone();
    let mut header = header;
    if let Some(Sink::Open(end)) = &mut header
        && let Some(remote) = end.remote_mut()
    {
        remote.reconnect_ms = args.reconnect;
    }
    let is_remote = |sink: &Sink| matches!(sink, Sink::Open(end) if end.remote().is_some());
    let any_remote = volume.remote().is_some() || header.as_ref().is_some_and(is_remote);
    if args.reconnect.is_some() && !any_remote {
        return Err(request::no_server("--reconnect"));
    }
    if any_remote && args.keys.len() > MOST_KEYS_REMOTE {
        return Err(Error::usage(format!(
            "--key: at most {MOST_KEYS_REMOTE} at a time for a volume of a server"
        )));
    }
    let mut resume_only = args.resume_only;
    if mode == Mode::Encrypt {
        // A volume that has a header already was begun: a volume in a volume is not what `encrypt` makes.
        resume_only |= uuid.is_some();
        if !resume_only && args.volume_args.header.is_none() && args.becoming.reduce_device_size.is_none() {
            return Err(Error::usage("--encrypt: the new header needs a place").hint(
                "--header FILE puts it in a file of its own; --reduce-device-size 32M in front of the data, \
                 when that much is free at the end",
            ));
        }
    }
    let journal_begun = journal.is_some()
        && args
            .volume_args
            .journal
            .as_deref()
            .and_then(|path| path.metadata().ok())
            .is_some_and(|j| j.len() > 0);
    let there = match &header {
        Some(Sink::Open(end)) => Some(end),
        _ => None,
    };
    content::check(args, &volume, there.map(|end| (end, &known)), mode, resume_only || journal_begun)?;
    let was_luks1 = known.is_luks1;
    if let (Format::Luks(luks), Mode::Encrypt, false) = (&mut format, mode, resume_only) {
        // Chosen here, so that it can be locked before anybody else sees it.
        luks.uuid = luks.uuid.take().or_else(random_uuid);
    }
    if !args.yes && !args.dry_run && std::io::stdin().is_terminal() {
        let given_up = args.becoming.reduce_device_size.unwrap_or(0);
        confirm(&volume.name, mode, uuid.as_deref(), resume_only, (was_luks1, given_up))?;
    }
    let request = Request {
        volume: File { fd: 0, name: volume.name.clone() },
        mode,
        format,
        keys: Vec::new(),
        new_key: None,
        resume_only,
        dry_run: args.dry_run,
        resilience: args.safety.resilience.map(|how| match how {
            args::Resilience::Checksum => Resilience::Checksum,
            args::Resilience::Journal => Resilience::Journal,
            args::Resilience::None => Resilience::None,
            args::Resilience::Datashift => Resilience::Datashift,
        }),
        hotzone_bytes: args.safety.hotzone_size,
        verify: args.safety.verify,
        lock_fds: Vec::new(),
        shared,
    };
    let mut submit = request::submit(Action::Reencrypt, &args.moving, request::tuning(&args.moving));
    submit.background_share = args.safety.background_share;
    let (keys, new_key) = (Vec::new(), None);
    let go_on = go_on(args);
    let mut opened = Opened {
        submit,
        request,
        volume,
        header,
        journal,
        keys,
        new_key,
        uuid,
        go_on,
        was_luks1,
        warnings,
        doubt: None,
    };
    opened.fetch(refs)?;
    Ok(opened)
}

/// The volume or its header: nobody else may have it, since all of it is rewritten. A dry run only looks, at what is in use too.
fn open_end(path: &Path, role: &str, access: Access) -> Result<End> {
    let end = endpoint::open_volume(path, role, access).map_err(|error| {
        let name = path.display();
        if error.failure.kind == ErrorKind::Conflict {
            error.hint(format!(
                "unmount it and close its mapping first, `lsblk {name}` tells which; a volume in use is re-encrypted \
                 by `cryptsetup reencrypt`"
            ))
        } else {
            error
        }
    })?;
    if access == Access::Replace {
        endpoint::refuse_attached(&end)?;
    }
    Ok(end)
}

/// The volume. If it can be re-encrypted beside an export (`online`), a block device in use may be so by one of the daemon, which knows:
/// `true`, and it is not opened exclusively.
fn open_data(path: &Path, access: Access, online: bool) -> Result<(End, bool)> {
    match open_end(path, "VOLUME", access) {
        Err(error)
            if error.failure.kind == ErrorKind::Conflict
                && online
                && std::fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device()) =>
        {
            let end = endpoint::open_volume(path, "VOLUME", Access::Change).map_err(|_| error)?;
            Ok((end, true))
        }
        other => other.map(|end| (end, false)),
    }
}

/// A detached header, and what is in it. With `encrypt` one that is not there, or empty, is to be made.
fn header(path: &Path, volume: &End, (mode, access): (Mode, Access), ask: Ask<'_>) -> Result<(Sink, Head)> {
    if std::fs::metadata(path).is_ok_and(|found| volume.is(&found)) {
        return Err(Error::usage(format!("--header: {} is VOLUME itself", path.display()))
            .hint("leave --header out when the header is in front of the data"));
    }
    if mode == Mode::Encrypt && !uri::is_uri(path) {
        let found = std::fs::metadata(path);
        let is_new = found.is_ok_and(|found| found.is_file() && found.len() == 0) || !path.exists();
        if is_new {
            let sink = endpoint::inspect_header(path, "--header", volume, false)?;
            return Ok((sink, Head::default()));
        }
    }
    let mut end = open_end(path, "--header", access)?;
    endpoint::refuse_same_ends(volume, &end)?;
    let known = Head::of(&end, ask)?;
    if mode == Mode::Encrypt && known.uuid.is_none() && end.remote().is_some() {
        endpoint::be_blank(&mut end, false, 4096);
    } else if mode == Mode::Encrypt && known.uuid.is_none() && !is_blank(&end)? {
        return Err(Error::new(
            ErrorKind::Conflict,
            format!("--header: {} holds something that is no LUKS header", end.name),
        )
        .hint("name a new file, or a device that is empty"));
    }
    Ok((Sink::Open(end), known))
}

/// What a header is known to be.
#[derive(Debug, Default)]
pub struct Head {
    /// The UUID of the LUKS header, of either version; empty if it has none.
    pub uuid: Option<String>,
    /// Its version is 1.
    pub is_luks1: bool,
    /// Of a volume of a server: something is under way on it, or its data is plain.
    pub is_under_way: Option<bool>,
}

impl Head {
    fn of(end: &End, ask: Ask<'_>) -> Result<Self> {
        if end.remote().is_none() {
            return Ok(Self { uuid: uuid_of(end)?, is_luks1: is_luks1(end)?, is_under_way: None });
        }
        let Some(summary) = ask(end)? else { return Ok(Self::default()) };
        let is_required = summary.requirements.iter().any(|name| name.starts_with("online-reencrypt"));
        let is_plain = summary.segments.iter().any(|segment| segment.kind == "linear");
        Ok(Self {
            is_luks1: summary.version == luks::Version::Luks1,
            is_under_way: Some(is_required || is_plain),
            uuid: Some(summary.uuid),
        })
    }
}

/// The first bytes, where both versions of LUKS have the same fields.
fn head(end: &End) -> Result<Vec<u8>> {
    let failed = |error| Error::io("cannot read", &end.name, error);
    let file = end.file()?;
    let mut bytes = vec![0; 4096];
    let mut filled = 0;
    while filled < bytes.len() {
        match file.read_at(&mut bytes[filled..], u64::try_from(filled).expect("a page")) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(error)),
        }
    }
    bytes.truncate(filled);
    Ok(bytes)
}

/// The UUID of the LUKS header, of either version; empty if it has none.
fn uuid_of(end: &End) -> Result<Option<String>> {
    const MAGIC: &[u8] = b"LUKS\xba\xbe";
    const UUID: std::ops::Range<usize> = 168..208;
    let bytes = head(end)?;
    let Some(field) = bytes.get(UUID).filter(|_| bytes.starts_with(MAGIC)) else { return Ok(None) };
    let text = field.split(|byte| *byte == 0).next().unwrap_or_default();
    Ok(Some(String::from_utf8_lossy(text).into_owned()))
}

/// Is there a LUKS header of version 1?
fn is_luks1(end: &End) -> Result<bool> {
    Ok(head(end)?.starts_with(b"LUKS\xba\xbe\0\x01"))
}

/// The command that goes on with it; and cryptsetup's, where its one passphrase opens both volume keys.
fn go_on(args: &Reencrypt) -> String {
    let path = |path: &Path| quoted(&path.display().to_string());
    let mut words = vec!["cryptctl reencrypt".to_owned(), path(&args.volume), "--resume-only".to_owned()];
    let mut option = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            words.push(format!("{name} {value}").trim_end().to_owned());
        }
    };
    let volume = &args.volume_args;
    let flag = |typed: bool| typed.then(String::new);
    let raw = volume.format == FoundFormat::Raw;
    option("--format raw", flag(raw));
    option("--encrypt", flag(args.becoming.encrypt));
    option("--decrypt", flag(args.becoming.decrypt));
    option("--header", volume.header.as_deref().map(path));
    option("--journal", volume.journal.as_deref().map(path));
    // They were understood: none is a secret by mistake.
    for key in &args.keys {
        option("--key", Some(quoted(key.as_typed())));
    }
    option("--new-key", args.new_key.as_ref().map(|key| quoted(key.as_typed())));
    if raw {
        return format!("{} and the other options of the format as before", words.join(" "));
    }
    let mut text = words.join(" ");
    // With --encrypt the new passphrase is the only one.
    if args.new_key.is_none() || args.becoming.encrypt {
        text.push_str(", or cryptsetup reencrypt --resume-only");
        if let Some(header) = volume.header.as_deref() {
            text.push_str(&format!(" --header {}", path(header)));
        }
        text.push_str(&format!(" {}", path(&args.volume)));
    }
    text
}

/// One word for a shell.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-:+,=@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

/// A random one, as the kernel makes them; without /proc the daemon chooses.
fn random_uuid() -> Option<String> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/uuid").ok()?;
    Some(text.trim().to_owned()).filter(|uuid| parse_uuid(uuid).is_ok())
}

fn is_blank(end: &End) -> Result<bool> {
    Ok(head(end)?.iter().all(|byte| *byte == 0))
}

fn confirm(
    name: &str,
    mode: Mode,
    uuid: Option<&str>,
    resume: bool,
    (was_luks1, given_up): (bool, u64),
) -> Result<()> {
    let uuid = uuid.map(|uuid| format!(" (UUID {uuid})")).unwrap_or_default();
    let what = match (resume, mode) {
        (true, _) => "what was begun on it goes on".to_owned(),
        (false, Mode::Reencrypt) => "all of it is rewritten in place under a new volume key".to_owned(),
        (false, Mode::Encrypt) => "all of it is encrypted in place".to_owned(),
        (false, Mode::Decrypt) => "all of it is decrypted in place, for everybody to read".to_owned(),
    };
    let mut more = String::new();
    if given_up > 0 && !resume {
        more.push_str(&format!(" What is in its last {given_up} bytes is given up."));
    }
    if was_luks1 {
        more.push_str(" Its LUKS1 header becomes LUKS2 first, which QEMU and nbdkit cannot open.");
    }
    let text = printable(&format!("{name}{uuid}: {what}.{more} Nobody else may use it meanwhile."));
    let answer = prompt::question("reencrypt asks first", &format!("{text}\nType YES to go on: "))
        .map_err(|error| error.hint("--yes begins without asking"))?;
    if answer == "YES" {
        Ok(())
    } else {
        Err(Error::new(ErrorKind::Cancelled, format!("{name} was left as it is")))
    }
}

/// Where the secrets are.
struct Refs {
    keys: Vec<KeyRef>,
    new_key: Option<KeyRef>,
}

impl Refs {
    fn parse(args: &Reencrypt) -> Result<Self> {
        let raw = args.volume_args.format == FoundFormat::Raw;
        let typed = args.keys.len();
        if typed > MOST_KEYS {
            return Err(Error::usage(format!("--key: at most {MOST_KEYS} at a time")));
        }
        let keys = args.keys.iter().map(|key| key.parse("--key")).collect::<Result<Vec<_>>>()?;
        let new_key = args.new_key.as_ref().map(|key| key.parse("--new-key")).transpose()?;
        if raw && (typed != 1 || new_key.is_none()) {
            return Err(Error::usage("--format raw needs one --key and one --new-key")
                .hint("both are volume keys: raw has no keyslots"));
        }
        let given = typed + usize::from(new_key.is_some());
        if args.becoming.encrypt && !args.resume_only && given != 1 {
            return Err(Error::usage("--encrypt needs one passphrase: --new-key")
                .hint("`cryptctl luks add-key` adds others afterwards"));
        }
        // What is left of one that is all but over needs no key: the daemon knows.
        if typed == 0 && !args.becoming.encrypt && !args.resume_only {
            return Err(Error::usage("--key is missing").hint("--key prompt asks for the passphrase"));
        }
        if keys.iter().filter(|key| **key == KeyRef::Prompt).count() > 1 {
            return Err(Error::usage("--key: only one of them can be a prompt")
                .hint("name the places of the others: file:PATH, fd:N or keyring:NAME"));
        }
        secret::refuse_shared(&keys.iter().chain(&new_key).collect::<Vec<_>>())?;
        Ok(Self { keys, new_key })
    }
}

impl Opened {
    fn fetch(&mut self, refs: Refs) -> Result<()> {
        let name = self.volume.name.clone();
        let Refs { mut keys, mut new_key } = refs;
        if let Format::Raw(pair) = &self.request.format {
            let size = |bytes: u32| usize::try_from(bytes).expect("32 or 64");
            let (old, new) = (size(pair.old.key_bytes), size(pair.new.key_bytes));
            let (key, new_key) = (keys.remove(0), new_key.expect("raw has both"));
            self.keys = vec![secret::volume_key(&key, "--key", &[old], false)?];
            self.new_key = Some(secret::volume_key(&new_key, "--new-key", &[new], true)?);
            if self.new_key.as_ref().is_some_and(|new| new.is_same_as(&self.keys[0])) {
                return Err(Error::usage("--new-key is the same volume key as --key"));
            }
        } else {
            if self.request.mode == Mode::Encrypt {
                // Its one passphrase is new, or opens what was begun with it; whichever option it was typed after.
                if self.request.resume_only {
                    keys.extend(new_key.take());
                } else {
                    new_key = new_key.or_else(|| keys.pop());
                }
            }
            for (at, key) in keys.iter().enumerate() {
                let purpose = match () {
                    () if self.request.resume_only || self.request.mode != Mode::Reencrypt => {
                        Purpose::Open(&name)
                    }
                    () if at == 0 && new_key.is_some() => Purpose::Replace(&name),
                    () => Purpose::Keep(&name),
                };
                self.keys.push(secret::passphrase(key, "--key", purpose)?);
            }
            if let Some(key) = new_key {
                self.new_key = Some(secret::passphrase(&key, "--new-key", Purpose::New(&name))?);
            }
            if let (Some(new), Some(old)) = (&self.new_key, self.keys.first())
                && new.is_same_as(old)
            {
                self.warnings.push(
                    "the new passphrase is the one it takes the place of; without --new-key it would simply be kept"
                        .to_owned(),
                );
            }
        }
        for secret in self.keys.iter_mut().chain(&mut self.new_key) {
            self.warnings.append(&mut secret.warnings);
            self.doubt = self.doubt.take().or(secret.doubt.take());
        }
        self.warnings.dedup();
        Ok(())
    }

    /// cryptsetup's locks of this volume, as far as there are any for it and we may have them. `waiting` is told what to tell.
    pub fn lock(&self, directory: &Path, waiting: &mut dyn FnMut(&str)) -> Result<Vec<Lock>> {
        let mut locks = Vec::new();
        match self.lock_into(&mut locks, directory, waiting) {
            Ok(()) => Ok(locks),
            Err(error) => {
                locks.into_iter().for_each(Lock::release);
                Err(error)
            }
        }
    }

    fn lock_into(
        &self,
        locks: &mut Vec<Lock>,
        directory: &Path,
        waiting: &mut dyn FnMut(&str),
    ) -> Result<()> {
        let Format::Luks(luks) = &self.request.format else { return Ok(()) };
        let (name, rdev) = match &self.header {
            Some(Sink::Open(end)) => (end.name.as_str(), end.device()),
            Some(Sink::New(place)) => (place.typed(), None),
            None => (self.volume.name.as_str(), self.volume.device()),
        };
        let mut take = |of: Of<'_>, patience| -> Result<()> {
            match lock::take(directory, of, patience, waiting)? {
                lock::Outcome::Held(lock) => locks.push(lock),
                // Who may not have this lock cannot re-encrypt a file with cryptsetup either; the daemon locks it against others of us.
                lock::Outcome::NotPermitted(_) if rdev.is_none() => {}
                lock::Outcome::NotPermitted(why) => {
                    waiting(&format!(
                        "warning: cryptsetup is not kept from changing {name} meanwhile: {why}"
                    ));
                }
            }
            Ok(())
        };
        let uuid = self.uuid.as_deref().or(luks.uuid.as_deref());
        // A dry run is in nobody's way.
        if let Some(uuid) = uuid.filter(|uuid| lock::is_lockable(uuid) && !self.request.dry_run) {
            // cryptsetup does not wait for it either: it takes hours.
            take(Of::Reencryption { uuid, name }, std::time::Duration::ZERO)?;
        }
        if let Some(rdev) = rdev {
            // Shared, although we write: with it nobody else writes, and who only looks is not kept waiting for hours. A header seen
            // half written fails its checksum, and the other copy is whole.
            take(Of::Header { rdev, name, write: false }, lock::PATIENCE)?;
        }
        Ok(())
    }

    /// What is to be said when it does not come to its end.
    pub fn words(&self) -> Words {
        Words { volume: self.volume.name.clone(), mode: self.request.mode, go_on: self.go_on.clone() }
    }

    /// Does the job outlive this command?
    pub fn is_detached(&self) -> bool {
        self.submit.detach
    }

    /// Is nothing to be written?
    pub fn is_rehearsal(&self) -> bool {
        self.request.dry_run
    }

    /// Create what must exist before the daemon can begin.
    pub fn create(self, locks: &[Lock]) -> Result<Prepared> {
        let Self { mut submit, mut request, volume, header, journal, keys, new_key, .. } = self;
        let mut passing = Passing::default();
        request.volume = passing.file(volume)?;
        request.keys = keys.into_iter().map(|key| passing.secret(key)).collect::<Result<_>>()?;
        request.new_key = new_key.map(|key| passing.secret(key)).transpose()?;
        match &mut request.format {
            Format::Luks(luks) => match header {
                Some(Sink::New(place)) if request.dry_run => {
                    let name = place.typed().to_owned();
                    luks.header = Some(File { fd: passing.fd(journal::in_memory()?), name });
                }
                Some(sink) => {
                    let new = passing.new_header(sink)?;
                    luks.header = Some(File { fd: new.fd, name: new.name });
                    luks.commit = new.commit;
                }
                None => {}
            },
            Format::Raw(pair) => {
                let journal = journal.expect("raw has a journal");
                let name = journal.name().to_owned();
                let fd = if request.dry_run {
                    passing.fd(journal.open_for_show()?)
                } else {
                    match journal.open()? {
                        journal::Open::Found(fd) => passing.fd(fd),
                        journal::Open::Created(file) => passing.journal(file)?,
                    }
                };
                pair.journal = File { fd, name };
            }
        }
        for lock in locks {
            let copy = lock.as_fd().try_clone_to_owned();
            let copy: OwnedFd =
                copy.map_err(|error| Error::io("cannot pass the lock", "descriptor", error))?;
            request.lock_fds.push(passing.fd(copy));
        }
        submit.reencrypt = Some(Box::new(request));
        submit.remotes = passing.remotes();
        let (descriptors, partials) = passing.finish();
        Ok(Prepared { submit, descriptors, partials })
    }
}

/// Refusals and failures of the daemon, which does not know what was typed.
pub struct Words {
    volume: String,
    mode: Mode,
    go_on: String,
}

impl Words {
    /// A refusal or failure in the words of this command line.
    pub fn of(&self, mut error: Error) -> Error {
        let nothing_begun = error.failure.hint.as_deref() == Some("without --resume-only one is begun");
        if nothing_begun && self.mode == Mode::Encrypt {
            error.failure.message =
                format!("there is a LUKS volume already, and no encryption to go on with: {}", self.volume);
            return error
                .hint("one that was begun is finished; to give it another volume key, leave --encrypt out");
        }
        match &error.failure.hint {
            Some(hint) if hint.starts_with("go on with cryptctl reencrypt --resume-only") => {
                error.hint(format!("go on with {}", self.go_on))
            }
            None if error.exit == Exit::Unreachable => {
                error.hint(format!("if it had begun, go on with {}", self.go_on))
            }
            _ => error,
        }
    }
}

#[cfg(test)]
mod tests;
