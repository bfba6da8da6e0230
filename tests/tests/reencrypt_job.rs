//! Re-encryption as a job, through the registry, on real files and on simulated disks that fail.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::backend::QueueChoice;
use engine::backend::sim::image::Image;
use engine::backend::sim::{DiskOptions, Effect, Fault, On, When, World};
use engine::crypto::{Kernel, Layout, VolumeKey, cipher};
use engine::job::{Owner, Registry};
use engine::units::{DataUnit, Extent};
use proto::reencrypt::{Mode, Phase, Resilience};
use proto::{Action, ErrorKind, JobState, TweakKind};
use tests::Scratch;
use tests::jobs::{
    self, MIB, QUEUES, assert_done, encrypted, failure, me, noise, registry, registry_of_places, wait,
    wait_for,
};
use tests::rewriting::{PASS, Rewrite, plaintext, report, volume};

const IN_PLACE: [Resilience; 3] = [Resilience::Checksum, Resilience::Journal, Resilience::None];

/// A volume, its plaintext, and who works on it.
struct Scene {
    registry: Arc<Registry>,
    scratch: Scratch,
    plain: Vec<u8>,
    path: PathBuf,
}

impl Scene {
    fn new(bytes: usize, unit: u32) -> Self {
        let registry = registry(QueueChoice::Auto);
        let scratch = Scratch::new();
        let plain = noise(bytes, 77);
        let path = volume(&registry, &scratch, &plain, unit, None);
        Self { registry, scratch, plain, path }
    }

    fn data_offset(&self) -> usize {
        usize::try_from(std::fs::metadata(&self.path).expect("stat").len()).expect("small") - self.plain.len()
    }

    /// Small steps, slowly.
    fn slowly(&self, resilience: Resilience) -> Rewrite {
        Rewrite::of(&self.path)
            .by(resilience)
            .with(|request| request.hotzone_bytes = Some(1 << 20))
            .rate(16 << 20)
    }

    fn has_its_plaintext(&self, volume: &Path) -> bool {
        plaintext(&self.registry, &self.scratch, volume, PASS) == self.plain
    }
}

#[test]
fn every_protection_on_every_queue_keeps_the_plaintext_and_changes_the_key() {
    for queue in QUEUES {
        let registry = registry(queue);
        for resilience in IN_PLACE {
            for (unit, bytes) in [(512, 7 * MIB + 512), (4096, 20 * MIB + 4096)] {
                let scratch = Scratch::new();
                let plain = noise(bytes, 77);
                let path = volume(&registry, &scratch, &plain, unit, None);
                let before = std::fs::read(&path).expect("volume");
                let rewrite = Rewrite::of(&path).by(resilience).with(|request| {
                    request.verify = unit == 512;
                    request.hotzone_bytes = Some(3 << 20);
                });
                let info = rewrite.run(&registry);
                assert_done(&info);
                let what = format!("{queue:?} {resilience:?} {unit}");
                let after = std::fs::read(&path).expect("volume");
                assert_eq!(before.len(), after.len(), "{what}");
                let data = before.len() - bytes;
                let sectors = (data..after.len()).step_by(512);
                let same = sectors.filter(|&at| before[at..at + 512] == after[at..at + 512]);
                assert_eq!(same.count(), 0, "{what}: sectors that are as before");
                assert!(plaintext(&registry, &scratch, &path, PASS) == plain, "{what}");
                let total = bytes as u64;
                assert_eq!(
                    (info.progress.done_bytes, info.progress.total_bytes),
                    (total, Some(total)),
                    "{what}"
                );
                let report = report(&info);
                assert_eq!((report.total_bytes, report.done_before_bytes), (total, 0), "{what}");
                assert!(report.old_key_gone, "{what}");
                if unit == 512 {
                    assert!(report.digest_before.as_ref().is_some_and(|digest| digest.len() == 64), "{what}");
                    assert_eq!(report.digest_before, report.digest_after, "{what}");
                    assert_eq!(report.digest_bytes, total, "{what}");
                } else {
                    assert_eq!(report.digest_after, None, "{what}");
                }
            }
        }
    }
}

#[test]
fn a_new_passphrase_takes_the_place_of_the_old_one_and_data_units_may_grow() {
    let scene = Scene::new(3 * MIB, 512);
    let rewrite = Rewrite::of(&scene.path).new_key(b"another").luks(|luks| {
        luks.data_unit = Some(4096);
        luks.force_data_unit = true;
    });
    let info = rewrite.run(&scene.registry);
    assert_done(&info);
    assert_eq!(
        report(&info).new_cipher.as_deref(),
        Some("aes-xts-plain64, 512-bit key, 4096-byte data units")
    );
    assert!(plaintext(&scene.registry, &scene.scratch, &scene.path, b"another") == scene.plain);
    let info = Rewrite::of(&scene.path).run(&scene.registry);
    assert_eq!(failure(&info).0, ErrorKind::WrongKey, "the old passphrase");
}

#[test]
fn a_wrong_key_changes_nothing() {
    let scene = Scene::new(MIB, 4096);
    let before = std::fs::read(&scene.path).expect("volume");
    let file = OpenOptions::new().read(true).write(true).open(&scene.path).expect("open");
    let info = Rewrite::bare(file, "volume").key(b"wrong").run(&scene.registry);
    assert_eq!(failure(&info).0, ErrorKind::WrongKey);
    assert!(std::fs::read(&scene.path).expect("volume") == before);
    // Nor does going on with what was never begun.
    let info = Rewrite::of(&scene.path).with(|request| request.resume_only = true).run(&scene.registry);
    let (kind, message) = failure(&info);
    assert_eq!(kind, ErrorKind::Invalid);
    assert!(message.contains("no re-encryption to go on with"), "{message}");
    assert!(std::fs::read(&scene.path).expect("volume") == before);
}

#[test]
fn a_pause_is_durable_and_what_was_paused_goes_on_here_or_from_the_volume_alone() {
    for resilience in IN_PLACE {
        let scene = Scene::new(24 * MIB, 4096);
        let job = scene.slowly(resilience).start(&scene.registry).expect("accepted");
        wait_for(&scene.registry, job, "some of it", |info| {
            info.progress.done_bytes >= 4 << 20 && info.progress.phase == Some(Phase::Rewriting)
        });
        scene.registry.pause(job).expect("paused");
        // It says so when it is at rest.
        wait_for(&scene.registry, job, "its rest", |info| info.state == JobState::Paused);
        let done = at_rest(&scene.registry, job);
        assert!(done < 24 << 20, "{resilience:?}: paused in the middle");
        // As after a power cut, or on another machine.
        let copy = scene.scratch.join("copy");
        std::fs::copy(&scene.path, &copy).expect("copied");
        let info = Rewrite::of(&copy).with(|request| request.resume_only = true).run(&scene.registry);
        assert_done(&info);
        assert_eq!(report(&info).done_before_bytes, done, "{resilience:?}: the boundary is where it rests");
        assert_eq!(report(&info).recovered_bytes, 0, "{resilience:?}: no step was cut off");
        assert!(scene.has_its_plaintext(&copy), "{resilience:?}: from the volume");
        scene.registry.throttle(job, None).expect("lifted");
        scene.registry.resume(job).expect("resumed");
        assert_done(&wait(&scene.registry, job));
        assert!(scene.has_its_plaintext(&scene.path), "{resilience:?}: here");
    }
}

#[test]
fn a_paused_one_gives_its_place_to_who_waits_for_it() {
    // One place, and a bench of somebody else that waits for it: nobody has it twice.
    let registry = registry_of_places(1);
    let scratch = Scratch::new();
    let path = volume(&registry, &scratch, &noise(16 * MIB, 77), 4096, None);
    let other = Owner { uid: me().uid + 1, ..me() };
    for phase in [Phase::Rewriting, Phase::Verifying] {
        let verified = Rewrite::of(&path).with(|request| {
            request.hotzone_bytes = Some(1 << 20);
            request.verify = true;
        });
        let job = verified.rate(8 << 20).start(&registry).expect("accepted");
        wait_for(&registry, job, "the phase", |info| info.progress.phase == Some(phase));
        let bench = jobs::Request::new(Action::Bench, 512);
        let mut bench = proto::Submit { volume: None, ..bench.submit };
        bench.bench =
            Some(proto::Bench { kernel: None, buffer_bytes: Some(4096), millis: Some(1), rounds: Some(1) });
        let (bench, _) = registry.submit(&other, bench, Vec::new()).expect("accepted");
        assert_eq!(registry.show(bench).expect("known").state, JobState::Queued);
        registry.pause(job).expect("paused");
        wait_for(&registry, job, "its rest", |info| info.state == JobState::Paused);
        assert_done(&wait(&registry, bench));
        assert_eq!(registry.show(job).expect("known").progress.phase, Some(phase));
        registry.throttle(job, None).expect("lifted");
        registry.resume(job).expect("resumed");
        assert_done(&wait(&registry, job));
    }
}

/// Bytes done once nothing moves any more.
fn at_rest(registry: &Registry, job: u64) -> u64 {
    let done = || registry.show(job).expect("known").progress.done_bytes;
    let deadline = Instant::now() + tests::PATIENCE;
    loop {
        let before = done();
        std::thread::sleep(Duration::from_secs(2));
        if done() == before {
            return before;
        }
        assert!(Instant::now() < deadline, "it never rests");
    }
}

#[test]
fn a_cancelled_one_is_left_at_a_safe_point_says_so_and_is_gone_on_with() {
    for resilience in IN_PLACE {
        let scene = Scene::new(24 * MIB, 512);
        let job = scene.slowly(resilience).start(&scene.registry).expect("accepted");
        wait_for(&scene.registry, job, "some of it", |info| info.progress.done_bytes >= 3 << 20);
        scene.registry.cancel(job).expect("cancelled");
        let info = wait(&scene.registry, job);
        assert_eq!(info.state, JobState::Cancelled, "{:?}", info.outcome);
        let failure = info.outcome.as_ref().and_then(|outcome| outcome.failure.clone()).expect("why");
        assert!(failure.message.contains("it rests at a safe point"), "{}", failure.message);
        assert!(failure.hint.is_some_and(|hint| hint.contains("--resume-only")));
        let stopped = info.progress.done_bytes;
        assert!(stopped < 24 << 20);
        // Without being told to resume, too: the same command again.
        let again = Rewrite::of(&scene.path).run(&scene.registry);
        assert_done(&again);
        assert_eq!(report(&again).done_before_bytes, stopped, "{resilience:?}");
        assert_eq!(report(&again).recovered_bytes, 0, "{resilience:?}");
        assert_eq!(again.progress.done_bytes, 24 << 20);
        assert!(scene.has_its_plaintext(&scene.path), "{resilience:?}");
    }
}

#[test]
fn a_rate_limit_holds_and_can_be_changed() {
    let scene = Scene::new(8 * MIB, 4096);
    let begun = Instant::now();
    let rewrite = Rewrite::of(&scene.path).rate(4 << 20);
    let job = rewrite.start(&scene.registry).expect("accepted");
    let info = wait_for(&scene.registry, job, "half", |info| info.progress.done_bytes >= 4 << 20);
    assert_eq!(info.progress.throttle_bytes_per_second, Some(4 << 20));
    assert!(begun.elapsed() > Duration::from_millis(700), "4 MiB at 4 MiB/s");
    scene.registry.throttle(job, None).expect("lifted");
    assert_done(&wait(&scene.registry, job));
    assert!(scene.has_its_plaintext(&scene.path));
}

#[test]
fn a_volume_is_re_encrypted_by_one_job_at_a_time_and_two_volumes_by_two() {
    let scene = Scene::new(16 * MIB, 4096);
    let other = Scene::new(8 * MIB, 512);
    let job = scene.slowly(Resilience::Checksum).start(&scene.registry).expect("accepted");
    for second in [
        Rewrite::of(&scene.path),
        // Whichever registry it is sent to.
        Rewrite::of(&scene.path).with(|request| request.resume_only = true),
    ] {
        let error = second.start(&other.registry).expect_err("taken");
        assert_eq!(error.kind(), ErrorKind::Conflict, "{}", error.chain());
    }
    let aside = Rewrite::of(&other.path).start(&scene.registry).expect("another volume");
    assert_done(&wait(&scene.registry, aside));
    // It may have ended by now.
    let _ = scene.registry.throttle(job, None);
    assert_done(&wait(&scene.registry, job));
    assert!(scene.has_its_plaintext(&scene.path));
    assert!(other.has_its_plaintext(&other.path));
    // Free again.
    assert_done(&Rewrite::of(&scene.path).run(&scene.registry));
    assert!(scene.has_its_plaintext(&scene.path));
}

#[test]
fn a_volume_that_another_program_has_locked_is_left_alone() {
    let scene = Scene::new(MIB, 4096);
    let held = OpenOptions::new().read(true).write(true).open(&scene.path).expect("open");
    assert_eq!(engine::sys::lock::try_lock(&held), Ok(true));
    let error = Rewrite::of(&scene.path).start(&scene.registry).expect_err("in use");
    assert_eq!(error.kind(), ErrorKind::Conflict);
    drop(held);
    assert_done(&Rewrite::of(&scene.path).run(&scene.registry));
}

#[test]
fn a_device_that_became_shorter_is_refused_and_unharmed() {
    let scene = Scene::new(12 * MIB, 4096);
    let job = scene.slowly(Resilience::Checksum).start(&scene.registry).expect("accepted");
    wait_for(&scene.registry, job, "some of it", |info| info.progress.done_bytes >= 6 << 20);
    scene.registry.cancel(job).expect("cancelled");
    wait(&scene.registry, job);
    let whole = std::fs::read(&scene.path).expect("volume");
    let file = OpenOptions::new().write(true).open(&scene.path).expect("open");
    file.set_len((scene.data_offset() + 4 * MIB) as u64).expect("cut");
    let short = std::fs::read(&scene.path).expect("volume");
    let info = Rewrite::of(&scene.path).run(&scene.registry);
    assert_eq!(failure(&info).0, ErrorKind::Damaged);
    assert!(std::fs::read(&scene.path).expect("volume") == short, "nothing was written");
    std::fs::write(&scene.path, &whole).expect("grown again");
    assert_done(&Rewrite::of(&scene.path).run(&scene.registry));
    assert!(scene.has_its_plaintext(&scene.path));
}

#[test]
fn a_dry_run_says_what_it_would_do_and_writes_nothing() {
    let scene = Scene::new(16 * MIB, 4096);
    let before = std::fs::read(&scene.path).expect("volume");
    let file = File::open(&scene.path).expect("open for reading only");
    let rewrite = Rewrite::of_file(file, "volume").with(|request| request.dry_run = true);
    let info = rewrite.run(&scene.registry);
    assert_done(&info);
    let report = report(&info);
    assert_eq!((report.total_bytes, report.resilience.as_str()), (16 << 20, "checksum"));
    assert!(report.estimate_seconds.is_some_and(|seconds| seconds > 0.0 && seconds < 600.0), "{report:?}");
    assert!(report.notes.iter().any(|note| note.contains("an estimate")), "{:?}", report.notes);
    assert_eq!(report.carried_keyslots, [0]);
    assert!(std::fs::read(&scene.path).expect("volume") == before);
}

#[test]
fn a_volume_without_a_header_goes_by_its_journal() {
    let registry = registry(QueueChoice::Auto);
    let plain = noise(12 * MIB, 3);
    let new_key = noise(64, 99);
    for resilience in IN_PLACE {
        let scratch = Scratch::new();
        let path = scratch.file("volume", &encrypted(&plain, 512));
        let journal = scratch.join("journal");
        let rewrite = || Rewrite::raw(&path, &journal, &new_key).by(resilience);
        let dry = Rewrite::raw(&path, &scratch.join("none"), &new_key).with(|request| request.dry_run = true);
        let info = dry.run(&registry);
        assert_done(&info);
        assert_eq!(report(&info).total_bytes, 12 << 20);
        let slowly = rewrite().with(|request| request.hotzone_bytes = Some(1 << 20)).rate(8 << 20);
        let job = slowly.start(&registry).expect("accepted");
        wait_for(&registry, job, "some of it", |info| info.progress.done_bytes >= 3 << 20);
        registry.cancel(job).expect("cancelled");
        let stopped = wait(&registry, job);
        assert_eq!(stopped.state, JobState::Cancelled, "{:?}", stopped.outcome);
        let info = rewrite().with(|request| request.verify = true).run(&registry);
        assert_done(&info);
        // What holds until it is done is said until then.
        let said = |info| report(info).notes.iter().any(|note| note.contains("journal is needed"));
        assert_eq!((said(&stopped), said(&info)), (resilience != Resilience::None, false));
        assert_eq!(report(&info).done_before_bytes, stopped.progress.done_bytes, "{resilience:?}");
        assert!(report(&info).digest_after.is_some());
        let layout = Layout { unit_bytes: 512, kind: TweakKind::Plain64, large: false, offset_sectors: 0 };
        let key = VolumeKey::new(&new_key).expect("key");
        let mut found = std::fs::read(&path).expect("volume");
        cipher(Kernel::Portable, &key, layout).expect("cipher").decrypt(DataUnit(0), &mut found);
        assert!(found == plain, "{resilience:?}");
    }
}

#[test]
fn what_is_left_of_a_finished_one_is_swept_and_only_that_is_no_error() {
    let plain = noise(MIB, 3);
    let new_key = noise(64, 99);
    let volume = Image::of(&encrypted(&plain, 512));
    let (mut stopped, mut swept) = (0, 0);
    for nth in 1..=20 {
        let world = World::new(tests::seed());
        for image in [volume.clone(), Image::default()] {
            world.add(image, DiskOptions::default()).expect("a disk");
        }
        let registry = registry(world.choice());
        let run = || {
            let disk = |number| File::from(world.descriptor(number).expect("a descriptor"));
            Rewrite::raw_files(disk(0), disk(1), &new_key).by(Resilience::Checksum).run(&registry)
        };
        world.inject(Fault { disk: 1, on: On::Write, when: When::Nth(nth), effect: Effect::Fail(5) });
        let first = run();
        world.heal();
        let second = run();
        if first.state == JobState::Done {
            // It told its end, so there is nothing to go on with.
            let (kind, message) = failure(&second);
            assert_eq!(kind, ErrorKind::Invalid, "write {nth}: {message}");
            assert!(message.contains("was finished"), "write {nth}: {message}");
            continue;
        }
        stopped += 1;
        let last = if second.state == JobState::Done {
            let what_was_left = |note: &String| note.contains("what was left");
            swept += usize::from(report(&second).notes.iter().any(what_was_left));
            run()
        } else {
            // Over, and only its end was not told: of the last writes the seed decides whether they failed behind the medium.
            second
        };
        let (kind, message) = failure(&last);
        assert_eq!(kind, ErrorKind::Invalid, "write {nth}: {message}");
        assert!(message.contains("was finished"), "write {nth}: {message}");
    }
    assert!(stopped > swept && swept > 0, "{stopped} were stopped, {swept} of them behind their last step");
}

#[test]
fn plain_data_becomes_a_volume_and_the_volume_plain_data() {
    let registry = registry(QueueChoice::Auto);
    let scratch = Scratch::new();
    let plain = noise(9 * MIB, 4);
    let path = scratch.file("data", &plain);
    let header = scratch.file("header", &[]);
    let info = Rewrite::detached(Mode::Encrypt, &path, &header)
        .new_key(PASS)
        .luks(|luks| luks.kdf = Some(tests::header::cheap()))
        .run(&registry);
    assert_done(&info);
    let found = std::fs::read(&path).expect("data");
    assert!(found.len() == plain.len() && found != plain);
    let info = Rewrite::detached(Mode::Decrypt, &path, &header).key(PASS).run(&registry);
    assert_done(&info);
    assert!(std::fs::read(&path).expect("data") == plain);
}

#[test]
fn plain_data_makes_room_for_its_header_by_moving() {
    let registry = registry(QueueChoice::Auto);
    for stop in [false, true] {
        let scratch = Scratch::new();
        let plain = noise(50 * MIB, 5);
        let mut image = plain.clone();
        image.resize(plain.len() + 32 * MIB, 0);
        let path = scratch.file("data", &image);
        let rewrite = || {
            let file = OpenOptions::new().read(true).write(true).open(&path).expect("open");
            Rewrite::bare(file, "data").with(|request| request.mode = Mode::Encrypt).new_key(PASS).luks(
                |luks| {
                    luks.reduce_bytes = Some(32 << 20);
                    luks.kdf = Some(tests::header::cheap());
                },
            )
        };
        if stop {
            let job = rewrite().rate(30 << 20).start(&registry).expect("accepted");
            wait_for(&registry, job, "some of it", |info| info.progress.done_bytes >= 10 << 20);
            registry.cancel(job).expect("cancelled");
            let info = wait(&registry, job);
            assert_eq!(info.state, JobState::Cancelled, "{:?}", info.outcome);
        }
        let info = rewrite().run(&registry);
        assert_done(&info);
        assert_eq!(report(&info).resilience, "datashift");
        let back = plaintext(&registry, &scratch, &path, PASS);
        assert!(back[..plain.len()] == plain, "stopped in between: {stop}");
    }
}

/// The volume on a simulated disk, with something wrong on it.
fn on_a_bad_disk(scene: &Scene, resilience: Resilience, fault: Fault) -> (World, proto::JobInfo) {
    let world = World::new(tests::seed());
    let image = Image::of(&std::fs::read(&scene.path).expect("volume"));
    world.add(image, DiskOptions::default()).expect("a disk");
    world.inject(fault);
    let registry = registry(world.choice());
    let file = world.descriptor(0).expect("a descriptor");
    let rewrite = Rewrite::of_file(file.into(), "disk").by(resilience).with(|request| {
        request.hotzone_bytes = Some(1 << 20);
    });
    let info = rewrite.tuned(|tuning| tuning.chunk_bytes = Some(128 << 10)).run(&registry);
    (world, info)
}

#[test]
fn a_bad_place_stops_it_where_it_can_be_gone_on_from() {
    let scene = Scene::new(8 * MIB, 512);
    let place = (scene.data_offset() + 5 * MIB) as u64;
    let bad = Extent::new(place, place + 512).expect("a sector");
    for resilience in IN_PLACE {
        for (on, safe) in [(On::Read, "it rests at a safe point"), (On::Write, "a step was interrupted")] {
            if (resilience, on) == (Resilience::None, On::Write) {
                // Nothing was kept of what a failed write tore.
                continue;
            }
            let fault = Fault { disk: 0, on, when: When::Touching(bad), effect: Effect::Fail(5) };
            let (world, info) = on_a_bad_disk(&scene, resilience, fault);
            let (kind, message) = failure(&info);
            let what = format!("{resilience:?} {on:?}: {message}");
            assert_eq!(kind, ErrorKind::Io, "{what}");
            assert!(message.contains(safe) && message.contains("EIO"), "{what}");
            // Steps of 1 MiB, the sixth of which begins with the bad place; what lies before it is done.
            assert!(message.contains(&format!("{} of", 5 * MIB)), "{what}");
            world.heal();
            let mended = scene
                .scratch
                .file("mended", &world.visible(0).expect("image").bytes(0, scene.data_offset() + 8 * MIB));
            let info = Rewrite::of(&mended).run(&scene.registry);
            assert_done(&info);
            assert_eq!(report(&info).recovered_bytes > 0, on == On::Write, "{what}");
            assert!(scene.has_its_plaintext(&mended), "{what}");
        }
    }
}

#[test]
fn a_flush_that_fails_leaves_the_step_to_be_recovered() {
    let scene = Scene::new(4 * MIB, 4096);
    let mut interrupted = 0;
    for nth in [3, 4, 5, 8, 9, 12] {
        let fault = Fault { disk: 0, on: On::Flush, when: When::Nth(nth), effect: Effect::Fail(5) };
        let (world, info) = on_a_bad_disk(&scene, Resilience::Checksum, fault);
        assert_eq!(failure(&info).0, ErrorKind::Io, "flush {nth} is one of this job's, and it fails");
        interrupted += usize::from(failure(&info).1.contains("a step was interrupted"));
        // The daemon goes on on the same machine: what the cache shows need not be on the disk.
        world.heal();
        let again = registry(world.choice());
        let file = world.descriptor(0).expect("a descriptor");
        assert_done(&Rewrite::of_file(file.into(), "disk").run(&again));
        drop(again);
        // And then the power goes.
        let world = world.restart(nth).expect("restarted");
        let found = world.visible(0).expect("image").bytes(0, scene.data_offset() + 4 * MIB);
        let mended = scene.scratch.file("mended", &found);
        assert!(scene.has_its_plaintext(&mended), "flush {nth}");
    }
    assert!(interrupted > 0, "some of them in a step");
}

/// A re-encryption of this volume that was begun with these wishes and cancelled somewhere in between.
fn begun(scene: &Scene, rewrite: Rewrite) {
    let job = rewrite.start(&scene.registry).expect("accepted");
    wait_for(&scene.registry, job, "some of it", |info| info.progress.done_bytes >= 3 << 20);
    scene.registry.cancel(job).expect("cancelled");
    let info = wait(&scene.registry, job);
    assert_eq!(info.state, JobState::Cancelled, "{:?}", info.outcome);
}

#[test]
fn what_was_begun_is_not_gone_on_with_as_something_else() {
    let scene = Scene::new(16 * MIB, 512);
    begun(&scene, scene.slowly(Resilience::Checksum));
    let before = std::fs::read(&scene.path).expect("volume");
    let again = || Rewrite::of(&scene.path);
    let wishes: [(Rewrite, ErrorKind, &str); 7] = [
        (again().by(Resilience::Journal), ErrorKind::Conflict, "resilience checksum, and journal"),
        (
            again().luks(|luks| luks.data_unit = Some(4096)),
            ErrorKind::Conflict,
            "data unit of bytes 512, and 4096",
        ),
        (again().luks(|luks| luks.key_bytes = Some(32)), ErrorKind::Conflict, "key of bits 512, and 256"),
        (
            again().luks(|luks| luks.cipher = Some("aes-xts-plain".to_owned())),
            ErrorKind::Conflict,
            "cipher aes-xts-plain64, and aes-xts-plain is",
        ),
        (again().with(|request| request.mode = Mode::Decrypt), ErrorKind::Conflict, "is being re-encrypted"),
        (again().new_key(b"another"), ErrorKind::WrongKey, "opens no keyslot of its new volume key"),
        (
            again().new_key(b"another").with(|request| request.resume_only = true),
            ErrorKind::WrongKey,
            "opens no keyslot of its new volume key",
        ),
    ];
    for (rewrite, kind, what) in wishes {
        let info = rewrite.run(&scene.registry);
        let found = failure(&info);
        assert!(found.0 == kind && found.1.contains(what), "{what}: {found:?}");
        assert!(std::fs::read(&scene.path).expect("volume") == before, "{what}: something was written");
    }
    // What it is already may be said, and the passphrase that is carried.
    let same = again().by(Resilience::Checksum).new_key(PASS).luks(|luks| {
        luks.data_unit = Some(512);
        luks.key_bytes = Some(64);
        luks.cipher = Some("aes-xts-plain64".to_owned());
    });
    assert_done(&same.run(&scene.registry));
    assert!(scene.has_its_plaintext(&scene.path));
}

#[test]
fn the_new_passphrase_of_one_that_was_begun_is_asked_for_again() {
    let scene = Scene::new(16 * MIB, 4096);
    begun(&scene, scene.slowly(Resilience::Checksum).new_key(b"another"));
    let info = Rewrite::of(&scene.path).new_key(b"a third").run(&scene.registry);
    assert_eq!(failure(&info).0, ErrorKind::WrongKey);
    assert_done(&Rewrite::of(&scene.path).new_key(b"another").run(&scene.registry));
    assert!(plaintext(&scene.registry, &scene.scratch, &scene.path, b"another") == scene.plain);
}
