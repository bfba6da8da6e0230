//! Who has a volume: one re-encryption at most, one export that writes, or any number that only read; and a re-encryption beside the
//! export of the same daemon, which agree through the export's [`View`]. A job that writes its sink has that alone.
//!
//! Twice over: a table keeps the jobs and exports of this process apart, which may have been sent the same open file; and a lock on
//! the open file ([`crate::sys::lock`]) keeps out other daemons, and virtual machines:
//!
//! | | lock | others may |
//! |---|---|---|
//! | re-encryption | all of the file, for writing | read the header |
//! | export | all but the first byte, for writing | read and change the header, as `luks add-key` does |
//! | export that only reads | the second byte, shared | read everything, serve it to read |
//! | re-encryption beside an export | the first byte, for writing; the rest is the export's | read the header |
//! | sink of a job | none of these: a new file has its own | |
//!
//! A re-encryption beside an export reads and writes in the export's manner, direct or through the page cache: two manners would not
//! agree about a page that is partly the one's and partly the other's. But on an open file of its own: of a write-back that failed each open
//! file is told once, and a flush of the one may not take from the other what clients must hear. And in turn with the export's flushes
//! ([`Turns`]): of a device's cache that failed only that one is told who flushed it.
//!
//! What this cannot keep out is cryptsetup on a regular file, which asks for none of these locks; its lock of a re-encryption is taken by
//! `cryptctl`, where it may. A block device is opened exclusively by who sends it.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use crate::backend::blocking::Turns;
use crate::backend::device::{Device, Identity};
use crate::error::{Error, ErrorKind, Result};
use crate::pipeline::view::View;
use crate::sys::lock;

/// A volume that is being served to be read and written.
pub struct Served {
    /// Where its plaintext lies, and who may touch what.
    pub view: Arc<View>,
    /// Its alignment for direct I/O, bytes; 1: it is buffered.
    pub align: u32,
    /// Whose turn it is to flush it.
    pub flushes: Arc<dyn Turns>,
}

impl Served {
    /// May some of what its clients wrote be lost, although it can be read? That is so for good.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.flushes.is_lost()
    }

    /// For who would build on what can be read.
    ///
    /// # Errors
    /// `Io`: it may be lost.
    pub fn check(&self, name: &str) -> Result<()> {
        if !self.is_lost() {
            return Ok(());
        }
        let what = "the volume is exported, and what its clients wrote may be lost: a flush failed";
        Err(Error::new(ErrorKind::Io, what).at(name).hint("stop its export, and check what is on the volume"))
    }
}

/// A locked open file; unlocked when nobody has it any more.
#[derive(Debug)]
struct Locked(Arc<OwnedFd>);

impl Drop for Locked {
    fn drop(&mut self) {
        lock::unlock(&*self.0);
    }
}

/// What is done with one volume. Never all of it nothing.
#[derive(Default)]
struct Uses {
    rewritten: bool,
    serving: bool,
    written: bool,
    readers: usize,
    served: Option<Arc<Served>>,
    /// Of who serves it: kept until a re-encryption beside that has ended, too. Of several who only read, the first one's, until the last has
    /// gone: they may share an open file, and who unlocks that does so for all of them.
    lock: Option<Locked>,
}

/// The volumes of this process.
static TABLE: Mutex<Option<HashMap<Identity, Uses>>> = Mutex::new(None);

fn table() -> MutexGuard<'static, Option<HashMap<Identity, Uses>>> {
    TABLE.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    Rewrite,
    Serve,
    Read,
    Write,
}

/// Leave to use a volume in one way, until it is dropped.
pub struct Held {
    device: Arc<Device>,
    uses: Use,
    beside: Option<Arc<Served>>,
    /// Of a re-encryption.
    lock: Option<Locked>,
}

fn conflict<T>(device: &Device, what: &str, hint: &str) -> Result<T> {
    Err(Error::new(ErrorKind::Conflict, what).at(device.name()).hint(hint))
}

fn check(device: &Device, tried: std::result::Result<bool, Errno>) -> Result<()> {
    match tried {
        Ok(true) => Ok(()),
        Ok(false) => conflict(
            device,
            "the volume is in use: another program has locked it",
            "another daemon may be serving or re-encrypting it, or a virtual machine run from it",
        ),
        Err(errno) => Err(Error::io("cannot lock the volume", errno).at(device.name())),
    }
}

const EXPORT_LIST: &str = "cryptctl export list shows it";
const JOB_LIST: &str = "cryptctl job list shows it";

impl Held {
    /// To re-encrypt it. Where this process serves it already, [`Held::beside`] says how the two get along.
    ///
    /// # Errors
    /// `Conflict`: another job, another program, or an export that this cannot run beside, has it; `Io`: beside one that has lost writes.
    pub fn to_rewrite(device: &Arc<Device>) -> Result<Self> {
        let mut table = table();
        let volumes = table.get_or_insert_default();
        let known = volumes.get_mut(&device.identity());
        let uses = match &known {
            Some(uses) if uses.rewritten => {
                let what = "another job re-encrypts this volume";
                return conflict(device, what, JOB_LIST);
            }
            Some(uses) if uses.written => {
                return conflict(device, "a job is writing to the volume", JOB_LIST);
            }
            Some(uses) if uses.readers > 0 => {
                let what = "the volume is exported to be read only, and would change under its readers";
                return conflict(device, what, EXPORT_LIST);
            }
            Some(uses) if uses.served.is_none() => {
                return conflict(device, "the volume is just being opened for an export", EXPORT_LIST);
            }
            _ => known,
        };
        let beside = uses.as_ref().and_then(|uses| uses.served.clone());
        let file = &**device.file();
        if let Some(served) = &beside {
            served.check(device.name())?;
            if lock::is_own_data(file) {
                let what = "the volume is exported through this very open file";
                return conflict(device, what, "open it once more for the job");
            }
        }
        check(device, if uses.is_some() { lock::try_lock_first(file) } else { lock::try_lock(file) })?;
        let lock = Some(Locked(device.file().clone()));
        volumes.entry(device.identity()).or_default().rewritten = true;
        Ok(Self { device: device.clone(), uses: Use::Rewrite, beside, lock })
    }

    /// As [`Held::to_rewrite`], of what lies beside a volume that is re-encrypted: its header, or the journal. An export would be overwritten.
    ///
    /// # Errors
    /// `Conflict`: it is exported, too. As [`Held::to_rewrite`].
    pub fn to_accompany(device: &Arc<Device>) -> Result<Self> {
        let held = Self::to_rewrite(device)?;
        match held.beside {
            None => Ok(held),
            Some(_) => conflict(
                device,
                "what would be its header or journal is a volume that is exported",
                EXPORT_LIST,
            ),
        }
    }

    /// To serve it. What is held keeps out re-encryptions until [`Held::publish`] says where they find the view.
    ///
    /// # Errors
    /// `Conflict`: a job, another export or another program has it.
    pub fn to_serve(device: &Arc<Device>, read_only: bool) -> Result<Self> {
        let mut table = table();
        let volumes = table.get_or_insert_default();
        match volumes.get(&device.identity()) {
            Some(uses) if uses.rewritten => {
                return conflict(
                    device,
                    "a job re-encrypts this volume",
                    "cancel the job (it stops where it is safe), export the volume, and go on with cryptctl reencrypt --resume-only",
                );
            }
            Some(uses) if uses.written => {
                return conflict(device, "a job is writing to the volume", JOB_LIST);
            }
            Some(uses) if uses.serving || !read_only => {
                return conflict(device, "the volume is exported already", EXPORT_LIST);
            }
            _ => {}
        }
        let file = &**device.file();
        // One who reads already has it for all of them.
        if volumes.get(&device.identity()).is_none_or(|uses| uses.lock.is_none()) {
            check(device, if read_only { lock::try_lock_reading(file) } else { lock::try_lock_data(file) })?;
        }
        let uses = volumes.entry(device.identity()).or_default();
        let kind = if read_only {
            uses.readers += 1;
            Use::Read
        } else {
            uses.serving = true;
            Use::Serve
        };
        uses.lock.get_or_insert_with(|| Locked(device.file().clone()));
        Ok(Self { device: device.clone(), uses: kind, beside: None, lock: None })
    }

    /// To write all of it anew: the sink of a job.
    ///
    /// # Errors
    /// `Conflict`: a job or an export of this process has it.
    pub fn to_write(device: &Arc<Device>) -> Result<Self> {
        let mut table = table();
        let volumes = table.get_or_insert_default();
        match volumes.get(&device.identity()) {
            Some(uses) if uses.rewritten => return conflict(device, "a job re-encrypts the sink", JOB_LIST),
            Some(uses) if uses.written => {
                return conflict(device, "another job is writing to the sink", JOB_LIST);
            }
            Some(_) => return conflict(device, "the sink is a volume that is exported", EXPORT_LIST),
            None => volumes.insert(device.identity(), Uses { written: true, ..Uses::default() }),
        };
        Ok(Self { device: device.clone(), uses: Use::Write, beside: None, lock: None })
    }

    /// The export of this process that the re-encryption runs beside: in its manner, and by its view.
    #[must_use]
    pub fn beside(&self) -> Option<&Arc<Served>> {
        self.beside.as_ref()
    }

    /// The volume is open, and served by this view: from now on a re-encryption may run beside it, in turn with its flushes and unless
    /// one has failed. No effect on one that is only read.
    pub fn publish(&self, view: &Arc<View>, align: u32, flushes: Arc<dyn Turns>) {
        if self.uses == Use::Serve
            && let Some(uses) = table().as_mut().and_then(|table| table.get_mut(&self.device.identity()))
        {
            uses.served = Some(Arc::new(Served { view: view.clone(), align, flushes }));
        }
    }
}

/// Nobody of this process serves it just now: for what would pull a volume from under its clients.
///
/// # Errors
/// `Conflict`.
pub fn refuse_served(device: &Device) -> Result<()> {
    match table().as_ref().and_then(|table| table.get(&device.identity())) {
        Some(uses) if uses.serving || uses.readers > 0 => {
            conflict(device, "the volume is exported", EXPORT_LIST)
        }
        _ => Ok(()),
    }
}

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} of {}", self.uses, self.device.name())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut table = table();
        let Some(volumes) = table.as_mut() else { return };
        let Some(uses) = volumes.get_mut(&self.device.identity()) else { return };
        match self.uses {
            Use::Rewrite => uses.rewritten = false,
            Use::Serve => {
                uses.serving = false;
                uses.served = None;
            }
            Use::Read => uses.readers -= 1,
            Use::Write => uses.written = false,
        }
        if !uses.rewritten && !uses.serving && !uses.written && uses.readers == 0 {
            volumes.remove(&self.device.identity());
        }
        // With the table still locked: who comes next finds no entry, and no lock either.
        self.lock = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::device::Purpose;
    use crate::pipeline::segment::{Segment, Segments};
    use std::fs::File;
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicBool, Ordering};

    const WRITE: Purpose = Purpose { read: true, write: true, stream: false };

    fn scratch(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("held-{name}-{}", std::process::id()));
        File::options().write(true).create(true).truncate(true).open(&path).expect("create");
        path
    }

    fn open(path: &PathBuf) -> File {
        File::options().read(true).write(true).open(path).expect("open")
    }

    fn device(file: File) -> Arc<Device> {
        Arc::new(Device::from_fd(file.into(), "volume", WRITE).expect("device"))
    }

    #[derive(Default)]
    struct Flushes(AtomicBool);

    impl Turns for Flushes {
        fn is_lost(&self) -> bool {
            self.0.load(Ordering::Relaxed)
        }

        fn begin_in_turn(&self) -> Result<()> {
            unreachable!("nothing is flushed here")
        }

        fn end_in_turn(&self, is_durable: bool) {
            self.0.fetch_or(!is_durable, Ordering::Relaxed);
        }
    }

    fn refusal(held: Result<Held>) -> String {
        let error = held.expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Conflict);
        error.chain()
    }

    fn view() -> Arc<View> {
        let plain = Segment { start: 0, offset: 0, unit_bytes: 512, cipher: None };
        View::new(Segments::new(vec![plain]), 4096)
    }

    #[test]
    fn one_re_encryption_has_it_even_through_the_same_open_file() {
        let path = scratch("alone");
        let file = open(&path);
        let first = device(file.try_clone().expect("dup"));
        let held = Held::to_rewrite(&first).expect("free");
        let other = open(&path);
        for second in [file.try_clone().expect("dup"), other.try_clone().expect("dup")] {
            let second = device(second);
            assert_eq!(refusal(Held::to_rewrite(&second)), "another job re-encrypts this volume: volume");
            assert_eq!(refusal(Held::to_serve(&second, true)), "a job re-encrypts this volume: volume");
        }
        drop(held);
        // Another program, as far as locks go.
        assert_eq!(lock::try_lock(&other), Ok(true));
        for refused in [Held::to_rewrite(&first), Held::to_serve(&first, false), Held::to_serve(&first, true)]
        {
            assert_eq!(refusal(refused), "the volume is in use: another program has locked it: volume");
        }
        drop(other);
        drop(Held::to_rewrite(&first).expect("free again"));
        std::fs::remove_file(&path).expect("clean up");
    }

    #[test]
    fn a_re_encryption_runs_beside_a_published_export() {
        let path = scratch("beside");
        let exported = device(open(&path));
        let export = Held::to_serve(&exported, false).expect("free");
        let other = open(&path);
        assert_eq!(
            (lock::is_taken(&other), lock::try_lock(&other)),
            (false, Ok(false)),
            "all but the header"
        );
        let job = device(open(&path));
        assert!(refusal(Held::to_rewrite(&job)).contains("just being opened"));
        assert!(refusal(Held::to_serve(&job, true)).contains("exported already"));
        let view = view();
        let flushes = Arc::new(Flushes::default());
        export.publish(&view, 512, flushes.clone());
        let own = device(exported.file().try_clone().expect("dup").into());
        assert!(refusal(Held::to_rewrite(&own)).contains("this very open file"));
        flushes.end_in_turn(false);
        let error = Held::to_rewrite(&job).expect_err("refused");
        assert!(error.chain().contains("may be lost"), "{}", error.chain());
        flushes.0.store(false, Ordering::Relaxed);
        let held = Held::to_rewrite(&job).expect("beside it");
        let served = held.beside().expect("the export");
        assert!(Arc::ptr_eq(&served.view, &view));
        assert_eq!(served.align, 512);
        assert!(lock::is_taken(&other), "the header too");
        assert!(refusal(Held::to_rewrite(&job)).contains("another job"));
        drop(held);
        assert!(refusal(Held::to_accompany(&job)).contains("a volume that is exported"));
        assert!(!lock::is_taken(&other), "what was refused holds nothing");
        assert_eq!((lock::is_taken(&other), lock::try_lock(&other)), (false, Ok(false)), "as before");
        // The export may end first: the job keeps the volume.
        let held = Held::to_rewrite(&job).expect("beside it");
        drop(export);
        assert_eq!(lock::try_lock(&other), Ok(false));
        assert!(refusal(Held::to_serve(&exported, false)).contains("re-encrypts"));
        drop(held);
        assert_eq!(lock::try_lock(&other), Ok(true));
        std::fs::remove_file(&path).expect("clean up");
    }

    #[test]
    fn readers_share_and_keep_out_who_writes() {
        let path = scratch("readers");
        let (one, two) = (device(open(&path)), device(open(&path)));
        let first = Held::to_serve(&one, true).expect("free");
        let second = Held::to_serve(&two, true).expect("shared");
        first.publish(&view(), 1, Arc::new(Flushes::default()));
        assert!(refusal(Held::to_rewrite(&one)).contains("read only"));
        assert!(refusal(Held::to_serve(&one, false)).contains("exported already"));
        // And one through the same open file.
        let third =
            Held::to_serve(&device(one.file().try_clone().expect("dup").into()), true).expect("shared");
        drop(first);
        let other = open(&path);
        assert_eq!(lock::try_lock(&other), Ok(false));
        drop(second);
        assert_eq!(lock::try_lock(&other), Ok(false), "one still reads");
        drop(third);
        drop(Held::to_rewrite(&one).expect("free"));
        std::fs::remove_file(&path).expect("clean up");
    }

    #[test]
    fn what_a_job_writes_nobody_else_has() {
        let path = scratch("sink");
        let (one, two) = (device(open(&path)), device(open(&path)));
        let sink = Held::to_write(&one).expect("free");
        assert_eq!(refusal(Held::to_write(&two)), "another job is writing to the sink: volume");
        for refused in [Held::to_serve(&two, false), Held::to_serve(&two, true), Held::to_rewrite(&one)] {
            assert_eq!(refusal(refused), "a job is writing to the volume: volume");
        }
        drop(sink);
        for read_only in [false, true] {
            let export = Held::to_serve(&two, read_only).expect("free");
            assert_eq!(refusal(Held::to_write(&one)), "the sink is a volume that is exported: volume");
            let error = refuse_served(&one).expect_err("refused");
            assert_eq!(error.chain(), "the volume is exported: volume");
            drop(export);
            refuse_served(&one).expect("free");
        }
        let rewriting = Held::to_rewrite(&two).expect("free");
        assert_eq!(refusal(Held::to_write(&one)), "a job re-encrypts the sink: volume");
        drop(rewriting);
        drop(Held::to_write(&one).expect("free again"));
        std::fs::remove_file(&path).expect("clean up");
    }
}
