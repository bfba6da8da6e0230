//! Re-encryption as the headers have it, on real files: begun by us and finished by cryptsetup, begun by cryptsetup and finished by us,
//! at rest and interrupted within a step, in every mode of protection and between data units. What counts is all of the plaintext.

mod luks1;
mod volume;

use std::io::{Read, Seek, SeekFrom, Write};
use std::process::{Command, Stdio};
use std::time::Duration;

use engine::error::ErrorKind;
use engine::format::luks2::metadata::{Keyslot, Token};
use engine::format::luks2::reencrypt::{Mode, read, write};
use engine::volume::reencrypt::open::Found;
use engine::volume::reencrypt::{begin, luks};
use engine::volume::{Header, unlock};
use proto::reencrypt::{Luks, Resilience};
use tests::luks2::{QUICK, has_cryptsetup};
use tests::rewrite::{Until, bytes_of, device, go_on, plaintext, secret};
use tests::{Random, seed, skip};

use volume::{DATA, OFFSET, PASS, STEP, Volume, never, quick};

const PROTECTED: [Resilience; 2] = [Resilience::Checksum, Resilience::Journal];
const UNITS: [(u32, u32); 4] = [(512, 512), (512, 4096), (4096, 4096), (4096, 512)];

#[test]
fn a_whole_rotation_keeps_all_plaintext_and_nothing_of_the_old_key() {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    for (old, new) in UNITS {
        for resilience in [Resilience::Checksum, Resilience::Journal, Resilience::None] {
            let detached = resilience == Resilience::Journal;
            let volume = Volume::with(old, DATA, "", detached);
            let before = volume.plain(PASS);
            let key_before = unlock::with_passphrase(
                &mut device(volume.header()),
                &volume.header_now(),
                &secret(PASS),
                None,
                &never,
            );
            let key_before = key_before.expect("opens").key;
            let [Keyslot::Luks2(slot)] = &volume.metadata().keyslots.into_values().collect::<Vec<_>>()[..]
            else {
                panic!("one keyslot")
            };
            let mut material = vec![0; 256_000];
            device(volume.header()).read(slot.area.offset, &mut material).expect("read");
            let opened = volume.begin(resilience, new);
            assert_eq!((opened.total, opened.boundary, opened.recovered_bytes), (DATA, 0, 0));
            assert_eq!((opened.carried.as_slice(), opened.dropped.as_slice()), (&[0][..], &[][..]));
            assert!(plaintext(&opened, &volume.path) == before, "begun");
            assert!(go_on(opened, &volume.path, STEP, Until::Done));
            volume.is_over();
            assert!(volume.plain(PASS) == before, "{old} to {new}, {resilience:?}");
            if detached {
                // (cryptsetup 2.6 decrypts no volume with an attached header whose digest is not number 0, its own neither.)
                assert!(volume.plain_by_cryptsetup() == before, "{old} to {new}: cryptsetup");
            }
            // The old key opens nothing, and its material is gone.
            let refused = unlock::with_volume_key(&volume.header_now(), key_before).expect_err("another key");
            assert_eq!(refused.kind(), ErrorKind::WrongKey);
            let whole = std::fs::read(volume.header()).expect("read");
            let head = &whole[..usize::try_from(2 << 20).expect("small")];
            let pieces = material.chunks_exact(512);
            let left = pieces.filter(|piece| head.windows(512).step_by(512).any(|window| window == *piece));
            assert_eq!(left.count(), 0, "material of the old key is left");
        }
    }
}

#[test]
fn cryptsetup_finishes_what_we_began() {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    for (old, new) in UNITS {
        for resilience in PROTECTED {
            for until in [
                Until::Steps(0),
                Until::Steps(2),
                Until::Within(0, 300),
                Until::Within(5, 500),
                Until::Within(2, 1000),
            ] {
                let volume = Volume::new(old);
                let before = volume.plain(PASS);
                assert!(!go_on(volume.begin(resilience, new), &volume.path, STEP, until));
                volume.cryptsetup_resumes();
                volume.is_over();
                assert!(volume.plain(PASS) == before, "{old} to {new}, {resilience:?}, {until:?}");
            }
        }
    }
}

#[test]
fn we_finish_what_we_began() {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    for (old, new) in UNITS {
        for resilience in PROTECTED {
            let volume = Volume::new(old);
            let before = volume.plain(PASS);
            let mut opened = volume.begin(resilience, new);
            for until in [
                Until::Within(0, 0),
                Until::Within(0, 500),
                Until::Steps(1),
                Until::Within(1, 999),
                Until::Steps(0),
            ] {
                assert!(!go_on(opened, &volume.path, STEP, until));
                opened = volume.open().expect("opens").expect("under way");
                let was_within = matches!(until, Until::Within(..));
                assert_eq!(opened.recovered_bytes, if was_within { STEP } else { 0 }, "{until:?}");
                assert!(
                    plaintext(&opened, &volume.path) == before,
                    "{old} to {new}, {resilience:?}, {until:?}"
                );
            }
            // The last step, which ends where the data does.
            assert!(!go_on(opened, &volume.path, STEP, Until::Within(0, 500)));
            let opened = volume.open().expect("opens").expect("under way");
            assert_eq!((opened.recovered_bytes, opened.boundary), (DATA % STEP, DATA));
            assert!(go_on(opened, &volume.path, STEP, Until::Done));
            volume.is_over();
            assert!(volume.plain(PASS) == before, "{old} to {new}, {resilience:?}");
        }
    }
}

#[test]
fn an_interrupted_step_without_protection_is_refused_and_named() {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    let volume = Volume::new(512);
    assert!(!go_on(volume.begin(Resilience::None, 512), &volume.path, STEP, Until::Within(0, 500)));
    let before = std::fs::read(&volume.path).expect("read");
    let refused = volume.open().err().expect("no recovery");
    assert_eq!(refused.kind(), ErrorKind::Unsupported);
    assert!(refused.chain().contains("resilience none"), "{}", refused.chain());
    assert!(std::fs::read(&volume.path).expect("read") == before, "nothing was written");
}

#[test]
fn without_protection_it_can_stop_early_and_go_on() {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    let volume = Volume::new(512);
    let before = volume.plain(PASS);
    let mut opened = volume.begin(Resilience::None, 512);
    assert_eq!(opened.ledger.hotzone_max(), None);
    // All of it is announced, a part of it done and committed.
    let all = engine::units::Extent::new(0, DATA).expect("data");
    let part = engine::units::Extent::new(0, STEP).expect("data");
    opened.ledger.begin(all).expect("begun");
    let mut bytes = vec![0; 1 << 20];
    let mut data = device(&volume.path);
    data.read(OFFSET, &mut bytes).expect("read");
    let build = |side: &engine::volume::reencrypt::Side| {
        let (cipher, key) = side.cipher.as_ref().expect("encrypted");
        let kernel = engine::crypto::Kernel::best().expect("a kernel");
        cipher.spec.build(kernel, key, cipher.unit_bytes, cipher.offset_sectors).expect("built")
    };
    build(&opened.old).decrypt(engine::units::DataUnit(0), &mut bytes);
    build(&opened.new).encrypt(engine::units::DataUnit(0), &mut bytes);
    data.write(OFFSET, &bytes).expect("written");
    data.flush().expect("flushed");
    opened.ledger.commit(part).expect("committed");
    drop(opened);
    let opened = volume.open().expect("opens").expect("under way");
    assert_eq!(opened.boundary, STEP);
    assert!(plaintext(&opened, &volume.path) == before);
    assert!(go_on(opened, &volume.path, STEP, Until::Done));
    volume.is_over();
    assert!(volume.plain(PASS) == before);
}

/// Kill it at an instant; false: it was faster.
fn killed(volume: &Volume, options: &str, after: Duration) -> bool {
    let words = format!(
        "reencrypt -q --force-offline-reencrypt --key-file {} --hotzone-size 256k {options}",
        volume.pass_file().display()
    );
    let mut child = Command::new("cryptsetup")
        .args(words.split_whitespace())
        .args(QUICK.iter().flat_map(|words| words.split_whitespace()))
        .arg(&volume.path)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("cryptsetup starts");
    std::thread::sleep(after);
    let was_running = child.try_wait().expect("asked").is_none();
    let _ = child.kill();
    child.wait().expect("waited");
    was_running
}

#[test]
fn we_finish_what_cryptsetup_began() {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    let seed = seed();
    let mut random = Random::new(seed);
    let mut found = [0_u32; 3];
    for (resilience, rounds) in [("checksum", 8), ("journal", 8)] {
        for round in 0..rounds {
            let volume = Volume::with([512, 4096][round % 2], 48 << 20, "", false);
            let before = volume.plain(PASS);
            let options = format!("--resilience {resilience}");
            // From before it begins, about a tenth of a second with its key derivations, to the end.
            let after = Duration::from_micros(50_000 + random.below(500_000) as u64);
            killed(&volume, &options, after);
            let opened = volume.open().unwrap_or_else(|error| panic!("seed {seed}: {}", error.chain()));
            match opened {
                None => found[0] += 1,
                Some(opened) => {
                    found[if opened.recovered_bytes > 0 { 2 } else { 1 }] += 1;
                    assert!(plaintext(&opened, &volume.path) == before, "seed {seed}: at rest");
                    assert!(go_on(opened, &volume.path, 8 << 20, Until::Done));
                    volume.is_over();
                }
            }
            assert!(volume.plain(PASS) == before, "seed {seed}, {resilience}, round {round}");
        }
    }
    eprintln!("not begun or over: {}, at rest: {}, within a step: {}", found[0], found[1], found[2]);
    assert!(found[1] + found[2] > 0, "seed {seed}: no kill fell into it");
}

#[test]
fn keyslots_whose_passphrase_is_not_given_are_named_or_dropped() {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    let volume = Volume::new(512);
    volume.add_key("second");
    volume.add_key("third");
    let bytes = std::fs::read(&volume.path).expect("read");
    let refused = volume.begin_with(&quick(), None, &[PASS, "third"], None).err().expect("one would be lost");
    assert_eq!(refused.kind(), ErrorKind::Conflict);
    assert!(refused.chain().contains("keyslot 1 "), "{}", refused.chain());
    assert!(refused.to_failure().hint.expect("a hint").contains("--drop-slots"));
    for (keys, hint) in [(&["nobody's"][..], false), (&[PASS, "nobody's"][..], true)] {
        let refused = volume.begin_with(&quick(), None, keys, None).err().expect("opens nothing");
        assert_eq!(refused.kind(), ErrorKind::WrongKey);
        assert_eq!(refused.to_failure().hint.is_some_and(|hint| hint.contains("number 2")), hint);
    }
    assert!(std::fs::read(&volume.path).expect("read") == bytes, "nothing was written");

    let before = volume.plain(PASS);
    let luks = Luks { drop_slots: true, ..quick() };
    let planned = volume.plan(&luks, &[PASS, "third"]).expect("planned");
    assert_eq!((planned.carried.as_slice(), planned.dropped.as_slice()), (&[0, 2][..], &[1][..]));
    assert!(std::fs::read(&volume.path).expect("read") == bytes, "a plan writes nothing");
    let opened = volume.begin_with(&luks, None, &[PASS, "third"], None).expect("begun");
    assert!(go_on(opened, &volume.path, STEP, Until::Done));
    for (passphrase, opens) in [(PASS, true), ("second", false), ("third", true)] {
        let tried = unlock::with_passphrase(
            &mut device(&volume.path),
            &volume.header_now(),
            &secret(passphrase),
            None,
            &never,
        );
        assert_eq!(tried.is_ok(), opens, "{passphrase}");
    }
    assert!(volume.plain("third") == before);
    volume.is_over();
}

#[test]
fn a_new_passphrase_takes_the_place_of_the_first() {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    let volume = Volume::new(512);
    volume.add_key("second");
    let before = volume.plain(PASS);
    let opened = volume.begin_with(&quick(), None, &[PASS, "second"], Some("brand new")).expect("begun");
    assert!(!go_on(opened, &volume.path, STEP, Until::Within(1, 500)));
    for keys in [&[PASS][..], &["brand new"], &["nobody's"]] {
        let refused = volume.open_with(keys).err().expect("half of it");
        assert_eq!(refused.kind(), ErrorKind::WrongKey, "{keys:?}");
    }
    // That of a keyslot carried over opens both keys; or one of each.
    let opened = volume.open_with(&["second"]).expect("opens").expect("under way");
    assert!(!go_on(opened, &volume.path, STEP, Until::Within(1, 500)));
    let opened = volume.open_with(&["brand new", PASS]).expect("opens").expect("under way");
    assert!(go_on(opened, &volume.path, STEP, Until::Done));
    assert!(volume.plain("brand new") == before && volume.plain("second") == before);
    let old =
        unlock::with_passphrase(&mut device(&volume.path), &volume.header_now(), &secret(PASS), None, &never);
    assert_eq!(old.expect_err("gone").kind(), ErrorKind::WrongKey);
}

#[test]
fn what_cannot_be_is_refused_and_nothing_is_written() {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    let volume = Volume::new(512);
    let bytes = std::fs::read(&volume.path).expect("read");
    let cases: [(Luks, Option<Resilience>, ErrorKind, &str); 6] = [
        (Luks { data_unit: Some(4096), ..quick() }, None, ErrorKind::Unsupported, "would grow"),
        (Luks { data_unit: Some(8192), ..quick() }, None, ErrorKind::Invalid, "data units of 8192"),
        (
            Luks { cipher: Some("aes-cbc-essiv:sha256".into()), ..quick() },
            None,
            ErrorKind::Unsupported,
            "cipher",
        ),
        (Luks { cipher: Some("rot13".into()), ..quick() }, None, ErrorKind::Unsupported, "rot13"),
        (Luks { key_bytes: Some(48), ..quick() }, None, ErrorKind::Invalid, "384"),
        (quick(), Some(Resilience::Datashift), ErrorKind::Invalid, "datashift"),
    ];
    for (luks, resilience, kind, words) in cases {
        let refused = volume.begin_with(&luks, resilience, &[PASS], None).err().expect(words);
        assert_eq!(refused.kind(), kind, "{}", refused.chain());
        assert!(refused.chain().contains(words), "{}", refused.chain());
    }
    // An odd size.
    let odd = Volume::with(512, DATA + 512, "", false);
    let luks = Luks { data_unit: Some(4096), force_data_unit: true, ..quick() };
    let refused = odd.begin_with(&luks, None, &[PASS], None).err().expect("no whole units");
    assert_eq!(refused.kind(), ErrorKind::Invalid);
    assert!(refused.chain().contains("no whole number of data units of 4096"), "{}", refused.chain());
    // With its header attached.
    let wish = volume.wish(&Luks::default(), Mode::Decrypt, None).mode;
    assert_eq!(wish, Mode::Decrypt);
    let luks = Luks::default();
    let wish = volume.wish(&luks, Mode::Decrypt, None);
    let refused =
        begin::begin(device(&volume.path), &mut device(&volume.path), &wish, &[secret(PASS)], None, &never);
    assert_eq!(refused.err().expect("attached").kind(), ErrorKind::Unsupported);
    assert!(std::fs::read(&volume.path).expect("read") == bytes, "nothing was written");
    assert_eq!(volume.unit, 512);
}

#[test]
fn want_of_room_is_found_before_anything_is_written() {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    // Room for two keyslots: the second takes all of it, and for the new key with one old there is none for the area.
    for (keyslots, also) in [("512k", false), ("516096", true), ("256k", false)] {
        let options = format!("--luks2-keyslots-size {keyslots}");
        let volume = Volume::with(512, DATA, &options, false);
        if also {
            volume.add_key("second");
        }
        let bytes = std::fs::read(&volume.path).expect("read");
        let keys: &[&str] = if also { &[PASS, "second"] } else { &[PASS] };
        match volume.begin_with(&quick(), None, keys, None) {
            Err(refused) => {
                assert_eq!(refused.kind(), ErrorKind::NoSpace, "{keyslots}: {}", refused.chain());
                assert!(
                    std::fs::read(&volume.path).expect("read") == bytes,
                    "{keyslots}: nothing was written"
                );
            }
            Ok(opened) => {
                assert_eq!(keyslots, "512k");
                assert!(opened.ledger.hotzone_max().expect("a limit") >= opened.ledger.step_bytes());
            }
        }
    }
}

#[test]
fn a_device_that_shrank_and_a_forged_header_are_refused() {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    let volume = Volume::new(512);
    let before = volume.plain(PASS);
    assert!(!go_on(volume.begin(Resilience::Checksum, 512), &volume.path, STEP, Until::Within(3, 500)));
    let whole = std::fs::read(&volume.path).expect("read");
    for bytes in [OFFSET, OFFSET + STEP, OFFSET + 4 * STEP - 512] {
        let file = std::fs::File::options().write(true).open(&volume.path).expect("open");
        file.set_len(bytes).expect("shrunk");
        let refused = volume.open().err().expect("too small");
        assert_eq!(refused.kind(), ErrorKind::Damaged, "{}", refused.chain());
        assert_eq!(bytes_of(&volume.path), bytes);
    }
    std::fs::write(&volume.path, &whole).expect("as before");

    // The area of the checksums somewhere else, a valid header otherwise: the digest says no.
    let Header::Luks2(mut loaded) = volume.header_now() else { panic!("LUKS2") };
    for slot in loaded.header.metadata.keyslots.values_mut() {
        if let Keyslot::Reencrypt { area, object } = slot {
            area.size -= 4096;
            object["area"]["size"] = area.size.to_string().into();
        }
    }
    engine::volume::store::write_luks2(&mut device(&volume.path), &mut loaded).expect("forged");
    let forged = std::fs::read(&volume.path).expect("read");
    let refused = volume.open().err().expect("forged");
    assert_eq!(refused.kind(), ErrorKind::Damaged);
    assert!(refused.chain().contains("digest"), "{}", refused.chain());
    assert!(std::fs::read(&volume.path).expect("read") == forged, "nothing was written");
    // Put right, it goes on.
    std::fs::write(&volume.path, &whole).expect("as before");
    let opened = volume.open().expect("opens").expect("under way");
    assert!(go_on(opened, &volume.path, STEP, Until::Done));
    assert!(volume.plain(PASS) == before);
}

#[test]
fn a_header_changed_by_another_stops_the_ledger() {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    let volume = Volume::new(512);
    let before = volume.plain(PASS);
    let mut opened = volume.begin(Resilience::Checksum, 512);
    let other = volume.open().expect("opens").expect("under way");
    assert!(!go_on(other, &volume.path, STEP, Until::Steps(1)));
    let hot = engine::units::Extent::new(0, STEP).expect("data");
    let sums = vec![0; 256 * 32];
    for _ in 0..2 {
        let refused = opened.ledger.save(hot, &sums).expect_err("not ours any more");
        assert!(matches!(refused.kind(), ErrorKind::Conflict | ErrorKind::Io), "{}", refused.chain());
        let refused = opened.ledger.begin(hot).expect_err("not ours any more");
        assert_eq!(refused.kind(), ErrorKind::Io, "{}", refused.chain());
    }
    let opened = volume.open().expect("opens").expect("under way");
    assert_eq!(opened.boundary, STEP);
    assert!(go_on(opened, &volume.path, STEP, Until::Done));
    assert!(volume.plain(PASS) == before);
}

#[test]
fn steps_out_of_order_are_refused() {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    let volume = Volume::new(512);
    let mut opened = volume.begin(Resilience::Checksum, 512);
    let hot = |from, to| engine::units::Extent::new(from, to).expect("an extent");
    for wrong in [hot(4096, 8192), hot(0, 512), hot(0, DATA + 4096)] {
        assert_eq!(opened.ledger.begin(wrong).expect_err("no step").kind(), ErrorKind::Internal);
    }
    let refused = opened.ledger.save(hot(0, STEP), &[0; 32]).expect_err("too few");
    assert_eq!(refused.kind(), ErrorKind::Internal);
    assert_eq!(opened.ledger.commit(hot(0, STEP)).expect_err("not begun").kind(), ErrorKind::Internal);
    opened.ledger.begin(hot(0, STEP)).expect("a step");
    assert_eq!(opened.ledger.commit(hot(0, 4096)).expect_err("a part").kind(), ErrorKind::Internal);
    opened.ledger.commit(hot(0, STEP)).expect("committed");
}

#[test]
fn what_a_power_cut_behind_the_end_left_is_overwritten_without_any_key() {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    let volume = Volume::new(512);
    let Header::Luks2(mut loaded) = volume.header_now() else { panic!("LUKS2") };
    let [Keyslot::Luks2(slot)] = &loaded.header.metadata.keyslots.values().cloned().collect::<Vec<_>>()[..]
    else {
        panic!("one keyslot")
    };
    // As between the header that ends it and the last: a note of places. One is free; one is the keyslot of now; one is the data.
    let free = slot.area.offset + slot.area.size + 8192;
    let places = [(free, 4096), (slot.area.offset - 4096, slot.area.size + 4096 + 4096), (OFFSET, 4096)];
    let areas: Vec<[String; 2]> =
        places.iter().map(|(at, size): &(u64, u64)| [at.to_string(), size.to_string()]).collect();
    let extra = serde_json::Map::from_iter([("areas".to_owned(), serde_json::json!(areas))]);
    let note = Token { kind: luks::NOTE.to_owned(), keyslots: Vec::new(), extra };
    loaded.header.metadata.tokens.insert(3, note);
    engine::volume::store::write_luks2(&mut device(&volume.path), &mut loaded).expect("noted");
    assert!(luks::is_unswept(&volume.metadata()));
    let mut file = std::fs::File::options().read(true).write(true).open(&volume.path).expect("open");
    let behind = slot.area.offset + slot.area.size;
    for at in [free, behind] {
        file.seek(SeekFrom::Start(at)).and_then(|_| file.write_all(&[0xA5; 4096])).expect("material");
    }
    let before = std::fs::read(&volume.path).expect("read");
    assert!(matches!(volume.find(&[]).expect("swept"), Found::Swept));
    assert!(matches!(volume.find(&[]).expect("opened"), Found::None));
    let after = std::fs::read(&volume.path).expect("read");
    let changed = |at: u64| {
        let at = usize::try_from(at).expect("small");
        before[at..at + 4096] != after[at..at + 4096]
    };
    assert!(changed(free) && changed(behind), "overwritten");
    assert!(!changed(slot.area.offset) && !changed(OFFSET) && !changed(behind + 4096), "not theirs");
    let mut piece = [0; 4096];
    file.seek(SeekFrom::Start(free)).and_then(|_| file.read_exact(&mut piece)).expect("read");
    assert!(piece.iter().filter(|byte| **byte == 0xA5).count() < 100);
    assert!(!luks::is_unswept(&volume.metadata()));
    assert!(volume.plain(PASS).len() as u64 == DATA);
}

/// cryptsetup writes a last state at rest, in which all data is new, before it ends; a kill in between leaves that, with old keyslots,
/// with ones whose material has been overwritten, or without. To begin anew over new data would destroy it.
#[test]
fn all_data_new_and_the_end_not_written_is_an_end() {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    for (old_keyslots_gone, material_gone) in [(false, false), (false, true), (true, true)] {
        let volume = Volume::new(512);
        let before = volume.plain(PASS);
        assert!(!go_on(volume.begin(Resilience::Checksum, 4096), &volume.path, STEP, Until::Within(5, 1000)));
        let Header::Luks2(mut loaded) = volume.header_now() else { panic!("LUKS2") };
        let metadata = &mut loaded.header.metadata;
        let (process, _) = read::read(metadata).expect("valid").expect("under way");
        write::clean(metadata, &process, DATA, DATA).expect("the end");
        if material_gone {
            let area = metadata.keyslots[&0].area().expect("its place");
            let noise = vec![0x5A; usize::try_from(area.size).expect("small")];
            device(&volume.path).write(area.offset, &noise).expect("overwritten");
        }
        if old_keyslots_gone {
            metadata.remove_keyslot(0).expect("the old one");
        }
        engine::volume::store::write_luks2(&mut device(&volume.path), &mut loaded).expect("written");
        let bytes = std::fs::read(&volume.path).expect("read");
        let refused = volume.open_with(&["nobody's"]).err().expect("a key is needed");
        assert_eq!(refused.kind(), ErrorKind::WrongKey);
        assert!(std::fs::read(&volume.path).expect("read") == bytes, "nothing was written");
        let opened = volume.open().expect("opens").expect("under way");
        assert_eq!((opened.boundary, opened.recovered_bytes), (DATA, 0));
        drop(opened);
        volume.is_over();
        assert!(volume.plain(PASS) == before);
    }
    // While data under it is left, the old key must be there.
    let volume = Volume::new(512);
    assert!(!go_on(volume.begin(Resilience::Checksum, 512), &volume.path, STEP, Until::Steps(1)));
    let Header::Luks2(mut loaded) = volume.header_now() else { panic!("LUKS2") };
    loaded.header.metadata.remove_keyslot(0).expect("the old one");
    engine::volume::store::write_luks2(&mut device(&volume.path), &mut loaded).expect("written");
    let refused = volume.open().err().expect("the old key is gone");
    assert_eq!(refused.kind(), ErrorKind::Damaged);
    assert!(refused.chain().contains("old volume key"), "{}", refused.chain());
}
