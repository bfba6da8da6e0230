//! The key of an exported volume changes while its clients work: they verify all they read, through whole rotations, and through the
//! death of the daemon at random instants. After a death the volume is exported again, the clients connect again and find all that was
//! acknowledged, and the rotation goes on to its end. Then the whole plaintext is compared, as `cryptctl decrypt` reads it, and
//! cryptsetup opens the volume.
//!
//! `ROTATION_KILLS` is how often the daemon is killed; 4 without it.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::scope;
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::luks::{CHEAP_PBKDF2, have, luks2_json, opens_with_only, secret};
use tests::nbd::steady::{Habit, Steady};
use tests::nbd::{Kind, Served};
use tests::reencrypt::part_of;
use tests::{PATIENCE, Random, Running, seed};

const MIB: usize = 1 << 20;
/// Bytes of each of three clients.
const PART: usize = 12 * MIB;

/// Is a re-encryption under way, says the header? And the salt of the key's digest.
fn standing(served: &Served) -> (bool, String) {
    let metadata = luks2_json(&served.place, "volume");
    let mandatory = metadata["config"]["requirements"]["mandatory"].as_array().cloned().unwrap_or_default();
    let under_way =
        mandatory.iter().filter_map(Value::as_str).any(|word| word.starts_with("online-reencrypt"));
    let digests = metadata["digests"].as_object().expect("digests").values();
    let used = digests.filter(|digest| digest["segments"].as_array().is_some_and(|list| !list.is_empty()));
    (under_way, used.map(|digest| digest["salt"].as_str().expect("a salt").to_owned()).collect())
}

fn clients(served: &Served, seed: u64) -> Vec<Steady> {
    let habits = [Habit::LARGE, Habit::MIXED, Habit::CROOKED];
    let client = |(n, habit): (usize, Habit)| {
        let part = served.plain[n * PART..(n + 1) * PART].to_vec();
        Steady::new((n * PART) as u64, part, habit, Random::new(seed ^ n as u64))
    };
    habits.into_iter().enumerate().map(client).collect()
}

/// Work until it is over, connecting again whenever the server has died; the number of answers is counted.
fn work(client: &mut Steady, socket: &Path, over: &AtomicBool, answered: &AtomicU64) {
    let patient = |client: &mut Steady| {
        let deadline = Instant::now() + PATIENCE;
        while let Err(error) = client.connect(socket) {
            assert!(Instant::now() < deadline, "no way back: {error}");
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    patient(client);
    while !over.load(Ordering::Relaxed) {
        match client.step() {
            Ok(()) => {
                answered.fetch_add(1, Ordering::Relaxed);
            }
            Err(_) => patient(client),
        }
    }
    client.settle().expect("served");
}

fn rotation(served: &Served, options: &str) -> Running {
    let begin = if options.contains("--resume-only") { "" } else { CHEAP_PBKDF2 };
    served.place.spawn(&format!("reencrypt @/volume --yes {begin} --key file:@/pass {options}"))
}

/// The export has ended, and the volume holds what its clients know.
fn conclude(served: &Served, clients: &[Steady], first_salt: &str) {
    let expected: Vec<u8> = clients.iter().flat_map(|client| client.model().to_vec()).collect();
    served.holds(&expected);
    let (under_way, salt) = standing(served);
    assert!(!under_way && salt != first_salt, "the key is the old one");
    secret(&served.place, "wrong", b"not the passphrase");
    opens_with_only(&served.place, "volume", "pass", "wrong");
}

#[test]
fn clients_verify_through_whole_rotations() {
    if !have(&["cryptsetup"]) {
        return;
    }
    let seed = seed();
    for resilience in ["checksum", "journal"] {
        let mut served = Served::over_noise(Kind::LUKS2, 3 * PART);
        let (_, first_salt) = standing(&served);
        let mut clients = clients(&served, seed);
        let (over, answered) = (AtomicBool::new(false), AtomicU64::new(0));
        let socket = served.socket();
        scope(|scope| {
            let workers: Vec<_> = clients
                .iter_mut()
                .map(|client| scope.spawn(|| work(client, &socket, &over, &answered)))
                .collect();
            for round in 0..2 {
                let (_, salt) = standing(&served);
                let before = answered.load(Ordering::Relaxed);
                let _ =
                    rotation(&served, &format!("--resilience {resilience} --hotzone-size 1M")).wait().done();
                let during = answered.load(Ordering::Relaxed) - before;
                let (under_way, new) = standing(&served);
                assert!(!under_way && new != salt, "round {round}: no rotation");
                eprintln!("{resilience}, round {round}: {during} requests were answered during the rotation");
                assert!(during > 0, "nobody was served during the rotation");
                assert!(
                    !workers.iter().any(std::thread::ScopedJoinHandle::is_finished),
                    "a client has given up"
                );
            }
            over.store(true, Ordering::Relaxed);
        });
        let interrupted: u64 = clients.iter().map(|client| client.interrupted.0).sum();
        assert_eq!(interrupted, 0, "connections broke");
        served.stop();
        conclude(&served, &clients, &first_salt);
    }
}

#[test]
fn fio_verifies_through_a_rotation() {
    if !have(&["cryptsetup", "fio"]) {
        return;
    }
    let mut served = Served::over_noise(Kind::LUKS2, 3 * PART);
    let (_, salt) = standing(&served);
    let mut command = served.place.script(
        "cd @/ && while true; do \
         fio --ioengine=nbd --uri=\"$uri\" --rw=randrw --bsrange=4k-256k --iodepth=8 --size=10m --offset_increment=12m \
         --numjobs=3 --thread --name=mixed --verify=crc32c --verify_fatal=1 --verify_backlog=32 --minimal || exit 1; \
         test ! -e @/over || exit 0; done",
    );
    command.env("uri", served.uri());
    let mut fio = served.place.launch(command);
    for _ in 0..2 {
        let _ = rotation(&served, "--hotzone-size 1M").wait().done();
        assert!(fio.is_running(), "fio found an error: {}", fio.said());
    }
    served.place.write("over", b"");
    let _ = fio.wait().done();
    served.stop();
    let (under_way, new) = standing(&served);
    assert!(!under_way && new != salt);
}

#[test]
fn the_daemon_dies_and_nothing_acknowledged_is_lost() {
    if !have(&["cryptsetup"]) {
        return;
    }
    let kills: usize =
        std::env::var("ROTATION_KILLS").map_or(4, |text| text.parse().expect("ROTATION_KILLS is a number"));
    let seed = seed();
    let mut random = Random::new(seed);
    let mut served = Served::over_noise(Kind::LUKS2, 3 * PART);
    let (_, first_salt) = standing(&served);
    let mut clients = clients(&served, seed);
    let (over, answered) = (AtomicBool::new(false), AtomicU64::new(0));
    let socket = served.socket();
    let mut within = 0;
    scope(|scope| {
        for client in &mut clients {
            scope.spawn(|| work(client, &socket, &over, &answered));
        }
        let begin =
            |number: usize| format!("--resilience {} --hotzone-size 1M", ["checksum", "journal"][number % 2]);
        // How long one takes beside these clients.
        let start = Instant::now();
        let _ = rotation(&served, &begin(0)).wait().done();
        let time = start.elapsed();
        for number in 0..kills {
            let (under_way, _) = standing(&served);
            let options = if under_way { "--resume-only".to_owned() } else { begin(number) };
            let running = rotation(&served, &options);
            let after = part_of(time * 3 / 4, &mut random);
            std::thread::sleep(after);
            served.kill();
            let _ = running.wait();
            let (under_way, _) = standing(&served);
            within += usize::from(under_way);
            eprintln!("kill {number} after {after:?} of {time:?}: under way: {under_way}");
            served.start();
        }
        // Clients get on, and so does what was begun.
        let before = answered.load(Ordering::Relaxed);
        let options = if standing(&served).0 { "--resume-only".to_owned() } else { begin(kills) };
        let _ = rotation(&served, &options).wait().done();
        tests::eventually("clients go on", || answered.load(Ordering::Relaxed) > before + 100);
        over.store(true, Ordering::Relaxed);
    });
    let (interrupted, found): (u64, u64) = clients
        .iter()
        .fold((0, 0), |sum, client| (sum.0 + client.interrupted.0, sum.1 + client.interrupted.1));
    eprintln!(
        "{kills} kills, {within} within a rotation; {interrupted} writes were not answered, {found} of them had been done, wholly or \
         in parts; {} requests were answered",
        answered.into_inner()
    );
    assert!(kills == 0 || interrupted > 0, "no kill hit a write");
    served.stop();
    conclude(&served, &clients, &first_salt);
}
