//! Copies that are gone on with, in this process: what is refused, and what that leaves.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use engine::backend::QueueChoice;
use engine::job::Registry;
use proto::luks::Version;
use proto::{Action, ErrorKind, Format, JobState};
use tests::Scratch;
use tests::jobs::{
    MIB, QUEUES, Request, assert_done, encrypted, failure, key_fd, new_luks, noise, registry, wait, wait_for,
};

/// A copy in the making: a source, the place of its sink, and that of its checkpoint.
struct Scene {
    scratch: Scratch,
    registry: Arc<Registry>,
    action: Action,
}

impl Scene {
    fn new(action: Action, queue: QueueChoice, source: &[u8]) -> Self {
        let scratch = Scratch::new();
        let _ = scratch.file("source", source);
        Self { scratch, registry: registry(queue), action }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    /// As a client would ask for it, with its files made or found again.
    fn finish(&self, request: Request, resume: bool) -> Request {
        let open = |path: &Path| {
            let mut options = OpenOptions::new();
            let options = options.read(true).write(true).create(!resume).truncate(false);
            options.open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        };
        let request = request.reading(&self.path("source"));
        let mut request = if resume {
            let commit_of = Request::new(self.action, 512).creating(&self.path("other"));
            std::fs::remove_file(self.path("other.partial")).expect("removed");
            let commit = commit_of.submit.sink.and_then(|sink| sink.commit).expect("a new file");
            let mut request = request.writing(open(&self.path("sink.partial")), "sink");
            let dir_fd = request.send(File::open(self.scratch.path()).expect("directory"));
            let (partial, name) = ("sink.partial".to_owned(), "sink".to_owned());
            let commit = proto::Commit { dir_fd, partial, name, ..commit };
            request.submit.sink.as_mut().expect("a sink").commit = Some(commit);
            request
        } else {
            request.creating(&self.path("sink"))
        };
        request = request.keeping(open(&self.path("checkpoint")), resume);
        let dir_fd = request.send(File::open(self.scratch.path()).expect("directory"));
        let entry = proto::Entry { dir_fd, name: "checkpoint".to_owned() };
        request.submit.checkpoint.as_mut().expect("a checkpoint").entry = Some(entry);
        request.tuned(|tuning| tuning.chunk_bytes = Some(64 << 10))
    }

    fn raw(&self, resume: bool) -> Request {
        self.finish(Request::new(self.action, 512), resume)
    }

    /// Begin it, and cancel it somewhere in the middle.
    fn interrupt(&self, request: Request) {
        let job = request.rate(8 << 20).start(&self.registry).expect("started");
        let _ = wait_for(&self.registry, job, "some of it", |info| info.progress.done_bytes > 1 << 20);
        let _ = self.registry.cancel(job).expect("cancelled");
        let info = wait(&self.registry, job);
        assert_eq!(info.state, JobState::Cancelled);
        let hint = info.outcome.and_then(|outcome| outcome.failure).and_then(|failure| failure.hint);
        assert!(hint.is_some_and(|hint| hint.contains("--resume")));
        assert_eq!(self.names(), ["checkpoint", "sink.partial", "source"]);
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(self.scratch.path())
            .expect("list")
            .map(|entry| entry.expect("entry").file_name().into_string().expect("UTF-8"))
            .collect();
        names.sort();
        names
    }

    fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).expect("read")
    }

    /// It is refused in these words, and nothing has changed.
    fn refuses(&self, request: Request, kind: ErrorKind, words: &str) {
        let before = (self.names(), self.read("sink.partial"), self.read("checkpoint"));
        let (found, message) = match request.start(&self.registry) {
            Err(error) => (error.kind(), error.chain()),
            Ok(job) => failure(&wait(&self.registry, job)),
        };
        assert_eq!(found, kind, "{message}");
        assert!(message.contains(words), "{message}");
        let after = (self.names(), self.read("sink.partial"), self.read("checkpoint"));
        assert!(before == after, "a refusal changed something");
    }

    /// It goes on, and does not begin anew.
    fn goes_on(&self, request: Request) {
        let info = request.run(&self.registry);
        assert_done(&info);
        assert!(info.progress.resumed_bytes >= 1 << 20, "{:?}", info.progress);
        assert_eq!(info.progress.done_bytes, info.progress.total_bytes.expect("known"));
        assert_eq!(self.names(), ["sink", "source"]);
    }
}

#[test]
fn a_cancelled_copy_goes_on_and_makes_the_same_bytes() {
    for queue in QUEUES {
        let mut plain = noise(4 * MIB, 3);
        plain[MIB..2 * MIB].fill(0);
        for (action, source, sink) in [
            (Action::Encrypt, plain.clone(), encrypted(&plain, 512)),
            (Action::Decrypt, encrypted(&plain, 512), plain),
        ] {
            let scene = Scene::new(action, queue, &source);
            scene.interrupt(scene.raw(false));
            scene.goes_on(scene.raw(true));
            assert!(scene.read("sink") == sink, "{action:?}");
            let held = std::fs::metadata(scene.path("sink")).expect("there").blocks() * 512;
            assert!(action == Action::Encrypt || held < 4 << 20, "the hole is lost: {held} bytes");
        }
    }
}

#[test]
fn a_copy_with_a_checkpoint_that_is_not_interrupted_leaves_only_its_sink() {
    let plain = noise(2 * MIB + 512, 3);
    let scene = Scene::new(Action::Encrypt, QueueChoice::Auto, &plain);
    assert_done(&scene.raw(false).run(&scene.registry));
    assert_eq!(scene.names(), ["sink", "source"]);
    assert!(scene.read("sink") == encrypted(&plain, 512));
}

#[test]
fn padding_is_told_also_of_a_copy_of_which_only_the_end_was_left() {
    let plain = noise(2 * MIB + 100, 3);
    let scene = Scene::new(Action::Encrypt, QueueChoice::Auto, &plain);
    let padded = |request: Request| request.tuned(|tuning| tuning.pad = true);
    scene.interrupt(padded(scene.raw(false)));
    let info = padded(scene.raw(true)).run(&scene.registry);
    assert_done(&info);
    assert_eq!(info.outcome.map(|outcome| outcome.padded_bytes), Some(412));
    assert!(scene.read("sink") == encrypted(&plain, 512));
}

#[test]
fn a_changed_source_is_refused_and_nothing_is_written() {
    let scene = Scene::new(Action::Encrypt, QueueChoice::Auto, &noise(4 * MIB, 3));
    scene.interrupt(scene.raw(false));
    let words = "the source was changed";
    let source = OpenOptions::new().write(true).open(scene.path("source")).expect("open");
    let modified = source.metadata().and_then(|metadata| metadata.modified()).expect("time");
    source.write_all_at(&[1], 3 << 20).expect("written");
    scene.refuses(scene.raw(true), ErrorKind::Conflict, words);
    // A time that is set back is no way around it: the change of the inode has its own.
    source.set_modified(modified).expect("set");
    scene.refuses(scene.raw(true), ErrorKind::Conflict, words);
    source.set_len(5 << 20).expect("longer");
    scene.refuses(scene.raw(true), ErrorKind::Conflict, "total was 4194304 then, and is 5242880 now");
}

#[test]
fn a_source_of_the_same_name_size_and_time_that_is_another_file_is_refused() {
    let scene = Scene::new(Action::Decrypt, QueueChoice::Auto, &noise(4 * MIB, 3));
    scene.interrupt(scene.raw(false));
    let then = SystemTime::now() - Duration::from_secs(5);
    let copy = scene.path("copy");
    let _ = std::fs::copy(scene.path("source"), &copy).expect("copied");
    File::options().write(true).open(&copy).and_then(|file| file.set_modified(then)).expect("set");
    std::fs::rename(copy, scene.path("source")).expect("renamed");
    scene.refuses(scene.raw(true), ErrorKind::Conflict, "the source was changed");
}

#[test]
fn a_changed_or_exchanged_sink_is_refused_and_nothing_is_written() {
    let scene = Scene::new(Action::Encrypt, QueueChoice::Auto, &noise(4 * MIB, 3));
    scene.interrupt(scene.raw(false));
    let sink = OpenOptions::new().read(true).write(true).open(scene.path("sink.partial")).expect("open");
    let mut byte = [0];
    sink.read_exact_at(&mut byte, 900_000).expect("read");
    sink.write_all_at(&[!byte[0]], 900_000).expect("written");
    scene.refuses(scene.raw(true), ErrorKind::Conflict, "the sink does not hold what was written");
    sink.write_all_at(&byte, 900_000).expect("written");
    let whole = sink.metadata().expect("there").len();
    sink.set_len(1000).expect("cut");
    scene.refuses(scene.raw(true), ErrorKind::Conflict, "the sink ends before byte");
    sink.set_len(whole).expect("longer");
    scene.refuses(scene.raw(true), ErrorKind::Conflict, "the sink does not hold what was written");
    let _ = std::fs::copy(scene.path("sink.partial"), scene.path("copy")).expect("copied");
    std::fs::rename(scene.path("copy"), scene.path("sink.partial")).expect("renamed");
    scene.refuses(scene.raw(true), ErrorKind::Conflict, "the sink is not the one");
}

#[test]
fn a_damaged_checkpoint_is_refused_and_an_older_slot_is_gone_on_from() {
    let plain = noise(4 * MIB, 3);
    let scene = Scene::new(Action::Encrypt, QueueChoice::Auto, &plain);
    scene.interrupt(scene.raw(false));
    let whole = scene.read("checkpoint");
    let write = |bytes: &[u8]| {
        let file = OpenOptions::new().write(true).open(scene.path("checkpoint")).expect("open");
        file.set_len(0).expect("cut");
        file.write_all_at(bytes, 0).expect("written");
    };
    let changed = |places: &[usize]| {
        let mut bytes = whole.clone();
        places.iter().for_each(|at| bytes[*at] ^= 1);
        write(&bytes);
    };
    for places in [&[20, 4116][..], &[8192 + 90]] {
        changed(places);
        scene.refuses(scene.raw(true), ErrorKind::Damaged, "nothing whole");
    }
    for len in [0, 100, 4608, 8192] {
        write(&whole[..len]);
        let (kind, words) = if len == 0 {
            (ErrorKind::NotFound, "there is nothing to go on with")
        } else {
            (ErrorKind::Damaged, "nothing whole")
        };
        scene.refuses(scene.raw(true), kind, words);
    }
    // The slot with the higher number is torn: the other one counts.
    let sequence = |at: usize| u64::from_le_bytes(whole[at + 16..at + 24].try_into().expect("eight"));
    changed(&[if sequence(0) > sequence(4096) { 30 } else { 4126 }]);
    let info = scene.raw(true).run(&scene.registry);
    assert_done(&info);
    assert!(info.progress.resumed_bytes > 0);
    assert!(scene.read("sink") == encrypted(&plain, 512));
}

#[test]
fn another_key_or_other_parameters_are_refused_and_nothing_is_written() {
    let scene = Scene::new(Action::Encrypt, QueueChoice::Auto, &noise(4 * MIB, 3));
    scene.interrupt(scene.raw(false));
    let mut other = scene.raw(true);
    other.descriptors[0] = key_fd(&noise(64, 99));
    scene.refuses(other, ErrorKind::WrongKey, "wrong key or damaged data");
    let conflict = |request, words| scene.refuses(request, ErrorKind::Conflict, words);
    conflict(scene.finish(Request::new(Action::Encrypt, 4096), true), "of another copy: format was");
    conflict(scene.finish(Request::new(Action::Decrypt, 512), true), "of another copy: work was encrypt");
    conflict(scene.raw(true).tuned(|tuning| tuning.pad = true), "of another copy: pad was false then");
    scene.goes_on(scene.raw(true));
}

#[test]
fn a_new_luks_volume_goes_on_under_its_own_volume_key_with_its_passphrase_only() {
    for version in [Version::Luks1, Version::Luks2] {
        let plain = noise(4 * MIB, 3);
        let scene = Scene::new(Action::Encrypt, QueueChoice::Auto, &plain);
        let request = |secret: &[u8], resume| {
            let format = Format::NewLuks(Box::new(new_luks(version, None)));
            scene.finish(Request::luks(Action::Encrypt, format, secret), resume)
        };
        scene.interrupt(request(b"right", false));
        scene.refuses(request(b"wrong", true), ErrorKind::WrongKey, "wrong key or damaged data");
        scene.goes_on(request(b"right", true));
        let open = proto::luks::Open { header: None, keyslot: None, secret: proto::luks::Secret::Passphrase };
        let info = Request::luks(Action::Decrypt, Format::Luks(open), b"right")
            .reading(&scene.path("sink"))
            .creating(&scene.path("back"))
            .run(&scene.registry);
        assert_done(&info);
        assert!(scene.read("back") == plain, "{version:?}");
    }
}

#[test]
fn two_jobs_do_not_share_a_checkpoint_and_a_done_one_is_not_gone_on_with() {
    let scene = Scene::new(Action::Encrypt, QueueChoice::Auto, &noise(4 * MIB, 3));
    let job = scene.raw(false).rate(1 << 20).start(&scene.registry).expect("started");
    let _ = wait_for(&scene.registry, job, "a beginning", |info| info.progress.done_bytes > 0);
    let other = Request::new(Action::Encrypt, 512).reading(&scene.path("source"));
    let checkpoint = OpenOptions::new().read(true).write(true).open(scene.path("checkpoint")).expect("open");
    let other = other.creating(&scene.path("second")).keeping(checkpoint, true);
    let error = other.start(&scene.registry).expect_err("it is in use");
    assert_eq!(
        (error.kind(), error.chain().contains("another job is using the checkpoint")),
        (ErrorKind::Conflict, true)
    );
    let _ = scene.registry.cancel(job).expect("cancelled");
    let _ = wait(&scene.registry, job);
    assert_done(&scene.raw(true).run(&scene.registry));
    assert!(!scene.path("checkpoint").exists());
    // Without its name an empty file is all that can be handed over.
    let empty =
        File::options().read(true).write(true).create_new(true).open(scene.path("empty")).expect("new");
    let sink = File::options().read(true).write(true).open(scene.path("sink")).expect("open");
    let request = Request::new(Action::Encrypt, 512).reading(&scene.path("source")).writing(sink, "sink");
    let error = request.keeping(empty, true).start(&scene.registry).expect_err("nothing");
    assert_eq!(error.kind(), ErrorKind::NotFound, "{}", error.chain());
}

#[test]
fn streams_take_no_checkpoint() {
    let scene = Scene::new(Action::Encrypt, QueueChoice::Auto, &noise(MIB, 3));
    let (read, _write) = std::io::pipe().expect("pipe");
    let file = File::options().read(true).write(true).create_new(true).open(scene.path("c")).expect("new");
    let request = Request::new(Action::Encrypt, 512).streaming_from(read).creating(&scene.path("sink"));
    let error = request.keeping(file, false).start(&scene.registry).expect_err("a pipe");
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.chain().contains("a stream cannot be gone on with"), "{}", error.chain());
}
