//! What was typed after `luks` means: a request for the wire, with its descriptors.
//!
//! In two steps, as for jobs: `open` finds out all that can be wrong and changes nothing, and asks for the secrets; `create`
//! makes the `.partial` files and takes the secrets' pipes, and must be followed by the request.

use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use proto::ErrorKind;
use proto::luks::{self, Operation, Request};
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::endpoint::{self, Access, End, Sink};
use crate::luks::args::{At, Erase, Luks, Token, TokenAdd};
use crate::luks::{new, token};
use crate::passing::{PartialFile, Passing};
use crate::report::{Error, Result};
use crate::secret::{self, KeyRef, KeyText, Purpose, Secret, VOLUME_KEY_BYTES};
use crate::signature;

/// A checked request: files open, secrets at hand, nothing changed yet.
pub struct Opened {
    volume: End,
    header: Option<End>,
    operation: Operation,
    key: Option<Secret>,
    new_key: Option<Secret>,
    volume_key: Option<Secret>,
    /// A new header or backup.
    written: Option<Sink>,
    /// A backup to be put back.
    read: Option<End>,
    /// The header is written.
    pub writes: bool,
    /// What must be known of the volume before this can be sent.
    pub open_question: Option<Question>,
    /// Sentences for the user.
    pub warnings: Vec<String>,
    /// What may explain a wrong key.
    pub doubt: Option<String>,
}

/// Something that only the volume's header tells.
#[derive(Debug, PartialEq, Eq)]
pub enum Question {
    /// Does the user mean this volume? Its name is to be shown.
    MayErase(String),
    /// Which keyslot is in use, if it is one only?
    TheKeyslot {
        /// Where its passphrase is kept.
        key_ref: String,
        /// Until when.
        rotate_by: Option<u64>,
    },
}

/// A request ready to be sent.
pub struct Prepared {
    /// The request.
    pub request: Request,
    /// In the order of its indices.
    pub descriptors: Vec<OwnedFd>,
    /// New files, to be removed if the daemon cannot.
    pub partials: Vec<PartialFile>,
}

/// The secrets of a verb, by role. Fetched in this order: a prompt asks for the old before the new.
#[derive(Default)]
struct Wanted<'a> {
    key: Option<&'a KeyText>,
    volume_key: Option<&'a KeyText>,
    /// A passphrase for a new keyslot.
    new_key: Option<(&'a KeyText, &'static str)>,
    /// Bytes of a new header's own volume key, which is asked for twice.
    volume_key_bytes: Option<usize>,
}

/// Check what was typed, open it, fetch the secrets.
pub fn open(verb: &Luks) -> Result<Opened> {
    match verb {
        Luks::Format(args) => {
            let header = new::header(&args.new, args.format)?;
            let wanted = Wanted {
                new_key: Some((&args.key, "--key")),
                volume_key: args.new.volume_key.as_ref(),
                volume_key_bytes: Some(new::key_bytes(&header)),
                ..Wanted::default()
            };
            let refs = wanted.parse()?;
            let mut volume = endpoint::open_volume(&args.volume, "VOLUME", Access::Replace)?;
            let header_path = args.new.header.as_deref();
            let mut written = header_path.map(|path| new_header(path, &volume, args.force)).transpose()?;
            if !args.force {
                let end = overwritten(&header);
                match &mut written {
                    // With the header elsewhere, nothing is written to the volume.
                    Some(Sink::Open(end_of_header)) => refuse_content(end_of_header, end)?,
                    Some(Sink::New(_)) => {}
                    None => refuse_content(&mut volume, end)?,
                }
            }
            let operation = Operation::Format { new: Box::new(header), key_fd: 0 };
            let mut opened = Opened::new(volume, operation);
            opened.written = written;
            opened.fetch(refs)
        }
        Luks::Dump(at) => simple(at, Access::Read, Operation::Dump {}, &Wanted::default()),
        Luks::OpenTest(args) => {
            let operation =
                Operation::OpenTest { key_fd: 0, secret: kind(&args.volume_key), keyslot: args.key_slot };
            let wanted =
                Wanted { key: args.key.as_ref(), volume_key: args.volume_key.as_ref(), ..Wanted::default() };
            simple(&args.at, Access::Read, operation, &wanted)
        }
        Luks::AddKey(args) => {
            let operation = Operation::AddKey {
                key_fd: 0,
                secret: kind(&args.volume_key),
                new_key_fd: 0,
                keyslot: args.new_key_slot,
                kdf: new::keyslot(&args.kdf)?,
            };
            let wanted = Wanted {
                key: args.key.as_ref(),
                volume_key: args.volume_key.as_ref(),
                new_key: Some((&args.new_key, "--new-key")),
                ..Wanted::default()
            };
            simple(&args.at, Access::Change, operation, &wanted)
        }
        Luks::RemoveKey(args) => {
            let operation = Operation::RemoveKey {
                key_fd: None,
                keyslot: args.key_slot,
                allow_last: args.last_key_destroy_data,
            };
            let wanted = Wanted { key: args.key.as_ref(), ..Wanted::default() };
            simple(&args.at, Access::Change, operation, &wanted)
        }
        Luks::ChangeKey(args) => {
            let kdf = new::keyslot(&args.kdf)?;
            let operation = Operation::ChangeKey { key_fd: 0, new_key_fd: 0, keyslot: args.key_slot, kdf };
            let wanted = Wanted {
                key: Some(&args.key),
                new_key: Some((&args.new_key, "--new-key")),
                ..Wanted::default()
            };
            simple(&args.at, Access::Change, operation, &wanted)
        }
        Luks::ConvertKdf(args) => {
            let kdf = new::keyslot(&args.kdf)?;
            let operation = Operation::ConvertKdf { key_fd: 0, keyslot: args.key_slot, kdf };
            simple(&args.at, Access::Change, operation, &Wanted { key: Some(&args.key), ..Wanted::default() })
        }
        Luks::HeaderBackup(args) => {
            let placeholder = luks::NewFile { fd: 0, name: String::new(), commit: None };
            let operation = Operation::HeaderBackup { file: placeholder };
            let mut opened = simple(&args.at, Access::Read, operation, &Wanted::default())?;
            let written = endpoint::inspect_header(&args.file, "FILE", &opened.volume, args.force)?;
            if matches!(written, Sink::Open(_)) {
                return Err(Error::usage("FILE must be a file: a backup is not written to a device"));
            }
            opened.written = Some(written);
            Ok(opened)
        }
        Luks::HeaderRestore(args) => {
            let placeholder = luks::File { fd: 0, name: String::new() };
            let operation =
                Operation::HeaderRestore { file: placeholder, allow_other: args.replace_other_header };
            let mut opened = simple(&args.at, Access::Change, operation, &Wanted::default())?;
            let backup = endpoint::open_volume(&args.file, "FILE", Access::Read)?;
            endpoint::refuse_same_ends(&backup, opened.header.as_ref().unwrap_or(&opened.volume))?;
            opened.read = Some(backup);
            Ok(opened)
        }
        Luks::Erase(Erase { at, yes_destroy_all_keys }) => {
            let operation = Operation::Erase { confirmed: true };
            let mut opened = simple(at, Access::Change, operation, &Wanted::default())?;
            if !yes_destroy_all_keys {
                let holder = opened.header.as_ref().unwrap_or(&opened.volume);
                opened.open_question = Some(Question::MayErase(holder.name.clone()));
            }
            Ok(opened)
        }
        Luks::Token(Token::Add(args)) => add_token(args),
        Luks::Token(Token::Remove { at, token_id }) => {
            simple(at, Access::Change, Operation::TokenRemove { id: *token_id }, &Wanted::default())
        }
        Luks::Token(Token::List(at)) => simple(at, Access::Read, Operation::TokenList {}, &Wanted::default()),
        Luks::Repair(args) => {
            let access = if args.dry_run { Access::Read } else { Access::Change };
            simple(&args.at, access, Operation::Repair { dry_run: args.dry_run }, &Wanted::default())
        }
        Luks::Doctor(args) => {
            let wanted = Wanted { key: args.key.as_ref(), ..Wanted::default() };
            simple(&args.at, Access::Read, Operation::Doctor { key_fd: None }, &wanted)
        }
    }
}

fn add_token(args: &TokenAdd) -> Result<Opened> {
    let (id, replace) = (args.token_id, args.token_replace);
    let mut question = None;
    let token = match (&args.json_file, &args.key_ref) {
        (Some(path), _) => token::read(path)?,
        (None, None) => return Err(Error::usage("--json-file or --key-ref is missing")),
        (None, Some(key_ref)) => {
            let key_ref = key_ref.as_typed();
            token::check_ref(key_ref, "--key-ref")?;
            let now = token::now();
            if args.rotate_by.is_some_and(|day| day <= now) {
                return Err(Error::usage("--rotate-by: that day has begun already"));
            }
            if args.key_slot.is_empty() {
                let key_ref = key_ref.to_owned();
                question = Some(Question::TheKeyslot { key_ref, rotate_by: args.rotate_by });
            }
            token::ours(key_ref, args.rotate_by, &args.key_slot, now)
        }
    };
    let operation = Operation::TokenAdd { token, id, replace };
    let mut opened = simple(&args.at, Access::Change, operation, &Wanted::default())?;
    opened.open_question = question;
    Ok(opened)
}

fn kind(volume_key: &Option<KeyText>) -> luks::Secret {
    if volume_key.is_some() { luks::Secret::VolumeKey } else { luks::Secret::Passphrase }
}

fn simple(at: &At, access: Access, operation: Operation, wanted: &Wanted<'_>) -> Result<Opened> {
    let refs = wanted.parse()?;
    let volume = endpoint::open_volume(&at.volume, "VOLUME", access)?;
    let header =
        at.header.as_deref().map(|path| endpoint::open_volume(path, "--header", access)).transpose()?;
    let mut opened = Opened::new(volume, operation);
    opened.header = header;
    opened.writes = access != Access::Read;
    opened.fetch(refs)
}

/// Parsed references with what each is for.
struct Refs {
    key: Option<KeyRef>,
    volume_key: Option<KeyRef>,
    new_key: Option<(KeyRef, &'static str)>,
    volume_key_bytes: Option<usize>,
}

impl Wanted<'_> {
    fn parse(&self) -> Result<Refs> {
        let refs = Refs {
            key: self.key.map(|key| key.parse("--key")).transpose()?,
            volume_key: self.volume_key.map(|key| key.parse("--volume-key")).transpose()?,
            new_key: self
                .new_key
                .map(|(key, option)| key.parse(option).map(|key| (key, option)))
                .transpose()?,
            volume_key_bytes: self.volume_key_bytes,
        };
        let all: Vec<_> =
            refs.key.iter().chain(&refs.volume_key).chain(refs.new_key.iter().map(|(key, _)| key)).collect();
        secret::refuse_shared(&all)?;
        Ok(refs)
    }
}

/// Where a new header is to be written, if not in front of the data.
fn new_header(path: &Path, volume: &End, force: bool) -> Result<Sink> {
    if std::fs::metadata(path).is_ok_and(|found| volume.is(&found)) {
        return Err(Error::usage(format!("--header: {} is VOLUME itself", path.display()))
            .hint("leave --header out to have the header in front of the data"));
    }
    endpoint::inspect_header(path, "--header", volume, force)
}

/// The end of what `format` writes from byte 0 on, in bytes, never less: everything up to the data, which the daemon puts at
/// 16 MiB or before unless it is told other sizes.
fn overwritten(new: &luks::New) -> u64 {
    const USUAL: u64 = 16 << 20;
    let copies = 2 * new.metadata_bytes.unwrap_or(0);
    USUAL.max(new.data_offset.unwrap_or(0)).max(copies + new.keyslots_bytes.unwrap_or(0))
}

/// Most bytes that the daemon reads through on a server to see whether they are zeros.
const REMOTE_MOST: u64 = 64 << 20;

/// What will be written over must be zeros, all of it: a volume with its header elsewhere, or a raw one, has no signature. A
/// device may have one at its end as well, which tells what the whole is.
fn refuse_content(target: &mut End, end: u64) -> Result<()> {
    if target.remote().is_some() {
        endpoint::be_blank(target, false, end.min(REMOTE_MOST));
        return Ok(());
    }
    let file = target.file()?;
    let holds = |what: &str| {
        Error::new(ErrorKind::Conflict, format!("{} holds {what}", target.name))
            .hint("--force makes a volume of it; what it holds is lost")
    };
    let zeros = is_zero(&file, end).map_err(|error| Error::io("cannot read", &target.name, error))?;
    if zeros && target.is_file() {
        return Ok(());
    }
    match signature::probe(&file, &target.name) {
        Ok(Some(found)) => Err(holds(&found)),
        // The refusal stands whether or not the content has a name.
        _ if !zeros => Err(holds("data")),
        Ok(None) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Are the bytes before `end` zeros, or holes, as far as there are any?
fn is_zero(file: &File, end: u64) -> std::io::Result<bool> {
    let mut chunk = vec![0; 1 << 20];
    let mut offset = 0;
    while offset < end {
        // Holes need not be read. Who cannot tell them has none: a device, some filesystems.
        match rustix::fs::seek(file, SeekFrom::Data(offset)) {
            Ok(data) => offset = data,
            Err(Errno::NXIO) if file.metadata()?.is_file() => return Ok(true),
            Err(_) => {}
        }
        let most = end.saturating_sub(offset).min(1 << 20);
        let most = usize::try_from(most).expect("a chunk");
        match file.read_at(&mut chunk[..most], offset) {
            Ok(0) => break,
            Ok(count) if chunk[..count].iter().any(|byte| *byte != 0) => return Ok(false),
            Ok(count) => offset += u64::try_from(count).expect("a chunk"),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

/// What is in the header of this volume?
///
/// # Errors
/// Nobody listens, or no descriptor is to be had.
pub fn look(volume: &End, header: Option<&End>) -> Result<(Request, Vec<OwnedFd>)> {
    let mut passing = Passing::default();
    let mut pass = |end: &End| -> Result<luks::File> {
        let fd = match end.remote() {
            Some(remote) => passing.remote(remote, &end.name)?,
            None => passing.fd(end.file()?.into()),
        };
        Ok(luks::File { fd, name: end.name.clone() })
    };
    let volume = Some(pass(volume)?);
    let header = header.map(pass).transpose()?;
    let remotes = passing.remotes();
    let (descriptors, _) = passing.finish();
    Ok((Request { volume, header, lock_fd: None, remotes, operation: Operation::Dump {} }, descriptors))
}

impl Opened {
    fn new(volume: End, operation: Operation) -> Self {
        Self {
            volume,
            header: None,
            operation,
            key: None,
            new_key: None,
            volume_key: None,
            written: None,
            read: None,
            writes: true,
            open_question: None,
            warnings: Vec::new(),
            doubt: None,
        }
    }

    fn fetch(mut self, refs: Refs) -> Result<Self> {
        let name = self.volume.name.clone();
        if let Some(at) = refs.key {
            self.key = Some(secret::passphrase(&at, "--key", Purpose::Open(&name))?);
        }
        if let Some(at) = refs.volume_key {
            let size = refs.volume_key_bytes;
            let sizes = size.as_ref().map_or(&VOLUME_KEY_BYTES[..], std::slice::from_ref);
            self.volume_key = Some(secret::volume_key(&at, "--volume-key", sizes, size.is_some())?);
        }
        if let Some((at, option)) = refs.new_key {
            self.new_key = Some(secret::passphrase(&at, option, Purpose::New(&name))?);
        }
        for secret in [&mut self.key, &mut self.volume_key, &mut self.new_key].into_iter().flatten() {
            self.warnings.append(&mut secret.warnings);
        }
        self.doubt = self.key.as_mut().and_then(|key| key.doubt.take());
        // One file may be both the old and the new key's place.
        self.warnings.dedup();
        if let (Operation::AddKey { .. }, Some(key), Some(new)) = (&self.operation, &self.key, &self.new_key)
            && key.is_same_as(new)
        {
            self.warnings.push(
                "the new passphrase is the one that opens the volume already: it gets a second keyslot"
                    .to_owned(),
            );
        }
        Ok(self)
    }

    /// The block device that holds the header, with its name: what cryptsetup locks.
    pub fn lockable(&self) -> Option<(u64, &str)> {
        let holder = match (&self.written, &self.operation) {
            (Some(Sink::Open(end)), Operation::Format { .. }) => Some(end),
            (Some(Sink::New(_)), Operation::Format { .. }) => None,
            _ => Some(self.header.as_ref().unwrap_or(&self.volume)),
        };
        holder.and_then(|end| Some((end.device()?, end.name.as_str())))
    }

    /// A question about the volume as it is, which changes nothing. A volume of a server gets connections of its own for it: the daemon
    /// closes what it was given.
    pub fn preliminary(&self) -> Result<(Request, Vec<OwnedFd>)> {
        look(&self.volume, self.header.as_ref())
    }

    /// What the volume's header told: the keyslot of our token.
    pub fn settle_keyslot(&mut self, summary: &luks::Summary) -> Result<()> {
        let Some(Question::TheKeyslot { key_ref, rotate_by }) = self.open_question.take() else {
            return Ok(());
        };
        let used: Vec<u32> = summary.keyslots.iter().filter(|slot| slot.bound).map(|slot| slot.id).collect();
        let &[only] = used.as_slice() else {
            let used: Vec<_> = used.iter().map(u32::to_string).collect();
            let used = if used.is_empty() { "none".to_owned() } else { used.join(", ") };
            return Err(Error::usage(format!("which keyslot does that passphrase open? In use: {used}"))
                .hint("name it with --key-slot"));
        };
        if let Operation::TokenAdd { token, .. } = &mut self.operation {
            *token = token::ours(&key_ref, rotate_by, &[only], token::now());
        }
        Ok(())
    }

    /// Create what must exist before the daemon can begin. `lock`: cryptsetup's, if we hold it.
    pub fn create(self, lock: Option<BorrowedFd<'_>>) -> Result<Prepared> {
        let Self { volume, header, mut operation, key, new_key, volume_key, written, read, .. } = self;
        let mut passing = Passing::default();
        let volume = Some(passing.file(volume)?);
        let header = header.map(|header| passing.file(header)).transpose()?;
        let mut opening = key;
        match &mut operation {
            Operation::Format { new, key_fd } => {
                *key_fd = passing.secret(new_key.expect("format has a passphrase"))?;
                new.volume_key_fd = volume_key.map(|key| passing.secret(key)).transpose()?;
                new.header = written.map(|sink| passing.new_file(sink, false)).transpose()?;
            }
            Operation::OpenTest { key_fd, .. } | Operation::ConvertKdf { key_fd, .. } => {
                *key_fd = passing.secret(opening.take().or(volume_key).expect("clap demands one"))?;
            }
            Operation::AddKey { key_fd, new_key_fd, .. }
            | Operation::ChangeKey { key_fd, new_key_fd, .. } => {
                *key_fd = passing.secret(opening.take().or(volume_key).expect("clap demands one"))?;
                *new_key_fd = passing.secret(new_key.expect("clap demands one"))?;
            }
            Operation::RemoveKey { key_fd, .. } | Operation::Doctor { key_fd } => {
                *key_fd = opening.take().map(|key| passing.secret(key)).transpose()?;
            }
            Operation::HeaderBackup { file } => {
                *file = passing.new_file(written.expect("a backup has a place"), false)?;
            }
            Operation::HeaderRestore { file, .. } => *file = passing.file(read.expect("a backup is open"))?,
            Operation::Dump {}
            | Operation::Erase { .. }
            | Operation::TokenAdd { .. }
            | Operation::TokenRemove { .. }
            | Operation::TokenList {}
            | Operation::Repair { .. } => {}
        }
        let lock_fd = match lock {
            Some(lock) => {
                let copy = lock.try_clone_to_owned();
                let copy = copy.map_err(|error| Error::io("cannot pass the lock", "descriptor", error))?;
                Some(passing.fd(copy))
            }
            None => None,
        };
        let remotes = passing.remotes();
        let (descriptors, partials) = passing.finish();
        Ok(Prepared {
            request: Request { volume, header, lock_fd, remotes, operation },
            descriptors,
            partials,
        })
    }
}

#[cfg(test)]
mod tests;
