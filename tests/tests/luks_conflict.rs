//! Two programs at one header: cryptsetup changes it while an operation of ours derives keys. What cryptsetup made stays,
//! and what we refuse we have not begun.
//!
//! The moment is chosen by the question `give_up`, which an operation asks between its slow steps: the other program
//! does its work there, once at the first question, once at the second, and so on.

use std::cell::Cell;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::backend::blocking::Blocking;
use engine::crypto::Secret;
use engine::error::{ErrorKind, Result};
use engine::volume::keyslots::{self, GiveUp, Proof};
use engine::volume::manage::{Caller, carry_out};
use proto::luks::{Done, File as Named, Operation, Request, Secret as Kind};
use rustix::fs::{FlockOperation, flock};
use tests::header::{Ask, BOTH, KDF, Volume, cheap, refused};

fn secret(text: &str) -> Secret {
    Secret::copy_of(text.as_bytes()).expect("memory")
}

/// The volume as the operations have it. A descriptor of its own, as every caller has.
fn device(volume: &Volume) -> Blocking {
    let file = File::options().read(true).write(true).open(&volume.path).expect("open");
    Blocking::open(Arc::new(OwnedFd::from(file)), "volume", 1).expect("opened")
}

type Act<'a> = &'a dyn Fn(&mut Blocking, GiveUp<'_>) -> Result<Done>;

/// `ours` while `theirs` happens at each of its questions in turn; the passphrases that open the volume before, and after `ours`.
/// `three` is what `theirs` adds.
fn at_every_question(begin: &dyn Fn(&Volume), ours: Act<'_>, theirs: &dyn Fn(&Volume), sets: [&[&str]; 2]) {
    for version in BOTH {
        let mut refusals = 0;
        for question in 0.. {
            let Some(volume) = Volume::new(version) else { return };
            begin(&volume);
            let asked = Cell::new(0);
            let between = || {
                if asked.replace(asked.get() + 1) == question {
                    theirs(&volume);
                }
                false
            };
            let outcome = ours(&mut device(&volume), &between);
            if asked.get() <= question {
                outcome.expect("nobody disturbed it");
                assert!(refusals > 0, "{version:?}: nothing was refused in {question} questions");
                break;
            }
            let mut opened: Vec<&str> = match outcome {
                Ok(_) => sets[1].to_vec(),
                Err(error) => {
                    refusals += 1;
                    assert_eq!(error.kind(), ErrorKind::Conflict, "{}", error.chain());
                    let hint = error.to_failure().hint.unwrap_or_default();
                    assert!(hint.contains("nothing was written"), "{hint}");
                    sets[0].to_vec()
                }
            };
            opened.push("three");
            volume.is_opened_by(&opened);
        }
    }
}

#[test]
fn an_added_keyslot_overwrites_none_that_was_added_meanwhile() {
    let ours = |device: &mut Blocking, give_up: GiveUp<'_>| {
        let proof = Proof::Passphrase(secret("one"));
        keyslots::add(device, proof, &secret("two"), None, &cheap(), give_up)
    };
    at_every_question(&|_| (), &ours, &|volume| volume.they_add("one", "three"), [&["one"], &["one", "two"]]);
}

#[test]
fn a_changed_keyslot_overwrites_none_that_was_added_meanwhile() {
    let ours = |device: &mut Blocking, give_up: GiveUp<'_>| {
        keyslots::change(device, &secret("one"), &secret("two"), None, &cheap(), give_up)
    };
    at_every_question(&|_| (), &ours, &|volume| volume.they_add("one", "three"), [&["one"], &["two"]]);
}

#[test]
fn a_removed_keyslots_place_is_not_destroyed_when_it_holds_another_meanwhile() {
    let begin = |volume: &Volume| volume.they_add("one", "two");
    // It has number and place of the one that goes.
    let theirs = |volume: &Volume| {
        volume.cryptsetup("luksKillSlot", "one", &[], &["1"]);
        let key = volume.key_file("three");
        let words: Vec<&str> = KDF.into_iter().chain(["--key-slot", "1"]).collect();
        volume.cryptsetup("luksAddKey", "one", &words, &[&key]);
    };
    let by_number = |device: &mut Blocking, give_up: GiveUp<'_>| {
        keyslots::remove(device, Some(&secret("one")), Some(1), false, give_up)
    };
    at_every_question(&begin, &by_number, &theirs, [&["one"], &["one"]]);
}

/// Carry `operation` out on the volume, asking `between`.
fn ask(ask: Ask, operation: Operation, between: &dyn Fn() -> bool) -> Result<()> {
    let volume = Some(Named { fd: 0, name: "volume".to_owned() });
    let request = Request { volume, header: None, lock_fd: None, remotes: Vec::new(), operation };
    let caller = Caller { commit: &|_, _, _| panic!("nothing to commit"), give_up: between };
    carry_out(request, ask.fds, &caller).map(drop)
}

fn add_key() -> Operation {
    let secret = Kind::Passphrase;
    Operation::AddKey { key_fd: 1, secret, new_key_fd: 2, keyslot: None, kdf: cheap() }
}

#[test]
fn a_header_is_not_locked_while_keys_are_derived() {
    for version in BOTH {
        let Some(volume) = Volume::new(version) else { return };
        let other = File::open(&volume.path).expect("open");
        let (asked, free) = (Cell::new(0), Cell::new(0));
        let between = || {
            asked.set(asked.get() + 1);
            if flock(&other, FlockOperation::NonBlockingLockExclusive).is_ok() {
                free.set(free.get() + 1);
                flock(&other, FlockOperation::Unlock).expect("unlocked");
            }
            false
        };
        let files = || Ask::new(&volume).secret(b"one");
        ask(files().secret(b"two"), add_key(), &between).expect("added");
        let change = Operation::ChangeKey { key_fd: 1, new_key_fd: 2, keyslot: None, kdf: cheap() };
        ask(files().secret(b"three"), change, &between).expect("changed");
        let test = Operation::OpenTest { key_fd: 1, secret: Kind::Passphrase, keyslot: None };
        ask(Ask::new(&volume).secret(b"two"), test, &between).expect("opened");
        let remove = Operation::RemoveKey { key_fd: Some(1), keyslot: None, allow_last: false };
        ask(Ask::new(&volume).secret(b"two"), remove, &between).expect("removed");
        assert!(asked.get() >= 8, "asked {} times", asked.get());
        assert_eq!(free.get(), asked.get());
        volume.is_opened_by(&["three"]);
    }
}

#[test]
fn what_is_written_after_the_derivation_waits_for_a_lock_taken_meanwhile() {
    for version in BOTH {
        let Some(volume) = Volume::new(version) else { return };
        // Which question is the last.
        let asked = Cell::new(0);
        let count = || {
            asked.set(asked.get() + 1);
            false
        };
        ask(Ask::new(&volume).secret(b"one").secret(b"two"), add_key(), &count).expect("added");
        let last = asked.replace(0);
        let wait = Duration::from_millis(300);
        let other = Cell::new(Some(File::open(&volume.path).expect("open")));
        let locked = Cell::new(None);
        let unlocker = Cell::new(None);
        let between = || {
            asked.set(asked.get() + 1);
            if asked.get() == last {
                let other = other.take().expect("asked once");
                flock(&other, FlockOperation::LockExclusive).expect("locked");
                locked.set(Some(Instant::now()));
                unlocker.set(Some(std::thread::spawn(move || {
                    std::thread::sleep(wait);
                    drop(other);
                })));
            }
            false
        };
        ask(Ask::new(&volume).secret(b"one").secret(b"three"), add_key(), &between).expect("added");
        assert!(locked.get().expect("locked").elapsed() >= wait);
        unlocker.take().expect("begun").join().expect("ends");
        volume.is_opened_by(&["one", "two", "three"]);
    }
}

#[test]
fn a_cancelled_operation_writes_nothing_at_any_question() {
    for version in BOTH {
        let Some(volume) = Volume::new(version) else { return };
        let before = volume.bytes();
        for question in 0.. {
            let asked = Cell::new(0);
            let gone = || asked.replace(asked.get() + 1) == question;
            let outcome = ask(Ask::new(&volume).secret(b"one").secret(b"two"), add_key(), &gone);
            if asked.get() <= question {
                outcome.expect("added");
                break;
            }
            refused(outcome, ErrorKind::Cancelled, "");
            assert!(volume.bytes() == before);
        }
    }
}
