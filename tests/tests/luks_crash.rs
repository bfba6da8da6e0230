//! The write orders of LUKS headers on disks that lose power: cut at every write and flush, torn in sectors of 512 bytes, written
//! in any order between flushes. Whatever is found afterwards is the header of before or of after, and no keyslot was lost.

use engine::backend::blocking::Blocking;
use engine::backend::sim::World;
use engine::backend::sim::explore::{Case, Explore, Summary};
use engine::backend::sim::image::Image;
use engine::crypto::Secret;
use engine::error::Result;
use engine::format::luks1;
use engine::format::luks2::{Health, Loaded};
use engine::volume::create::{self, NewHeader, Place};
use engine::volume::unlock;
use engine::volume::{Header, store};
use proto::ErrorKind;
use proto::luks::New;
use tests::seed;

/// Small, so that every write can be cut in every way.
const LUKS2: &str = r#"{"version":"luks2","data_offset":548864,"kdf":{"kind":"pbkdf2","iterations":1000}}"#;
const LUKS1: &str = r#"{"version":"luks1","key_bytes":32,"kdf":{"iterations":1000}}"#;

fn passphrase() -> Secret {
    Secret::copy_of(b"correct horse").expect("memory for a secret")
}

fn made(wish: &str) -> NewHeader {
    let new: New = serde_json::from_str(wish).expect("a wish");
    let place = Place { detached: false, header_capacity: None, data_capacity: None, align: 1 };
    create::make(&new, &place, &passphrase(), None).expect("made")
}

/// The volume as it lies on a disk.
fn image(made: &NewHeader) -> Image {
    let mut bytes = Vec::new();
    made.stream(&mut |piece| {
        bytes.extend_from_slice(piece);
        Ok(())
    })
    .expect("streamed");
    bytes.resize(bytes.len() + 8192, 0xDA);
    Image::of(&bytes)
}

fn device(world: &World) -> Blocking {
    world.blocking(0, "volume").expect("a device")
}

fn load(world: &World) -> Result<Header> {
    Header::load(&mut device(world))
}

fn load2(world: &World) -> std::result::Result<Loaded, String> {
    match load(world) {
        Ok(Header::Luks2(loaded)) => Ok(*loaded),
        Ok(Header::Luks1(_)) => Err("LUKS1".to_owned()),
        Err(error) => Err(format!("no header is left: {}", error.chain())),
    }
}

fn load1(device: &mut Blocking) -> Result<luks1::Header> {
    match Header::load(device)? {
        Header::Luks1(header) => Ok(*header),
        Header::Luks2(_) => panic!("LUKS2"),
    }
}

fn opens(world: &World) -> std::result::Result<(), String> {
    let mut device = device(world);
    let opened = Header::load(&mut device)
        .and_then(|header| unlock::with_passphrase(&mut device, &header, &passphrase(), None, &|| false));
    opened.map(drop).map_err(|error| format!("does not open: {}", error.chain()))
}

fn explore(
    name: &str,
    image: &Image,
    act: impl Fn(&World) -> Result<()>,
    judge: impl Fn(&World, &Case) -> std::result::Result<(), String>,
) {
    let explored = Explore::new(name, seed(), image.clone()).run(act, judge);
    let Summary { events, cases, completed, .. } = explored.unwrap_or_else(|violation| panic!("{violation}"));
    assert!(events >= 2 && cases > completed, "{name}: nothing was cut: {events} events, {cases} cases");
    eprintln!("{name}: {events} events, {cases} endings, {completed} after the end");
}

/// The volume with one copy damaged, or older than the other.
fn with_a_bad_copy(good: &Image, at: u64, obsolete: bool) -> Image {
    let mut image = good.clone();
    if obsolete {
        let world = World::new(1);
        let disk = world.add(good.clone(), Default::default()).expect("a disk");
        let mut device = world.blocking(disk, "volume").expect("a device");
        let mut loaded = match Header::load(&mut device).expect("loads") {
            Header::Luks2(loaded) => *loaded,
            Header::Luks1(_) => panic!("LUKS1"),
        };
        store::write_luks2(&mut device, &mut loaded).expect("written");
        drop(device);
        let old = good.bytes(at, 16384);
        image = world.visible(disk).expect("an image");
        image.write(at, &old);
    } else {
        image.write(at + 4096, &[0; 512]);
    }
    image
}

#[test]
fn a_luks2_header_is_the_old_or_the_new_one_whatever_its_copies_were() {
    let made = made(LUKS2);
    let good = image(&made);
    for (name, image, health) in [
        ("two good copies", good.clone(), None),
        ("damaged primary", with_a_bad_copy(&good, 0, false), Some(0)),
        ("damaged secondary", with_a_bad_copy(&good, 16384, false), Some(1)),
        ("obsolete primary", with_a_bad_copy(&good, 0, true), Some(0)),
        ("obsolete secondary", with_a_bad_copy(&good, 16384, true), Some(1)),
    ] {
        let world = World::new(1);
        world.add(image.clone(), Default::default()).expect("a disk");
        let before = load2(&world).expect("loads");
        for (index, found) in before.health.iter().enumerate() {
            assert_eq!(*found != Health::Good, health == Some(index), "{name}: {:?}", before.health);
        }
        explore(
            name,
            &image,
            |world| {
                let mut device = device(world);
                let mut loaded = before.clone();
                // Both the binary header and the JSON change, so that a torn copy is neither.
                loaded.header.label = "after".to_owned();
                loaded.header.metadata.config.flags.push("allow-discards".to_owned());
                store::write_luks2(&mut device, &mut loaded)
            },
            |world, case| {
                let found = load2(world)?;
                let is_new = found.header.label == "after";
                let seqid = before.header.seqid + u64::from(is_new);
                let mut metadata = before.header.metadata.clone();
                if is_new {
                    metadata.config.flags.push("allow-discards".to_owned());
                }
                if found.header.seqid != seqid || found.header.metadata != metadata {
                    return Err(format!("neither the old nor the new header: seqid {}", found.header.seqid));
                }
                if case.completed && (!is_new || found.health != [Health::Good, Health::Good]) {
                    return Err(format!("done, and yet {:?}, new: {is_new}", found.health));
                }
                opens(world)
            },
        );
        if health.is_some() {
            explore(
                &format!("repair of a {name}"),
                &image,
                |world| store::repair_luks2(&mut device(world), &mut before.clone()),
                |world, case| {
                    let found = load2(world)?;
                    if found.header.seqid != before.header.seqid {
                        return Err(format!("another header: seqid {}", found.header.seqid));
                    }
                    if case.completed && found.health != [Health::Good, Health::Good] {
                        return Err(format!("done, and yet {:?}", found.health));
                    }
                    opens(world)
                },
            );
        }
    }
}

#[test]
fn a_luks1_keyslot_comes_whole_or_not_at_all() {
    let made = made(LUKS1);
    let good = image(&made);
    // In sector 0, across both, in sector 1.
    for id in [1, 5, 6, 7] {
        let material = vec![0xA5; 128_000];
        let change = |before: &luks1::Header| {
            let mut after = before.clone();
            let keyslot = &mut after.keyslots[id];
            (keyslot.active, keyslot.iterations, keyslot.salt) = (true, 0x0102_0304, [0x5A; 32]);
            after
        };
        explore(
            &format!("keyslot {id} comes"),
            &good,
            |world| {
                let mut device = device(world);
                let before = load1(&mut device)?;
                let loaded = Header::Luks1(Box::new(before.clone()));
                store::write_material(
                    &mut device,
                    &loaded,
                    before.keyslots[id].material_offset(),
                    &material,
                )?;
                store::write_luks1(&mut device, &before, &change(&before))
            },
            |world, case| {
                let mut device = device(world);
                let found = load1(&mut device).map_err(|error| error.chain())?;
                let Header::Luks1(before) = &made.header else { panic!("LUKS2") };
                let after = change(before);
                if found.keyslots[id].active {
                    if found != after {
                        return Err(format!("a keyslot in use that is not whole: {:?}", found.keyslots[id]));
                    }
                    let mut there = vec![0; material.len()];
                    device.read(after.keyslots[id].material_offset(), &mut there).expect("reads");
                    if there != material {
                        return Err("in use before its material was there".to_owned());
                    }
                } else if case.completed {
                    return Err("done, and yet not in use".to_owned());
                }
                drop(device);
                opens(world)
            },
        );
    }
}

#[test]
fn a_luks1_keyslot_goes_without_a_trace_and_alone() {
    for id in [1, 5, 6, 7] {
        let made = made(&LUKS1.replace("\"kdf\"", &format!("\"keyslot\":{id},\"kdf\"")));
        let Header::Luks1(mut before) = made.header.clone() else { panic!("LUKS2") };
        // Another keyslot in use on either side, whose fate is to stay as it is.
        for other in [0, 2] {
            (before.keyslots[other].active, before.keyslots[other].iterations) = (true, 1000);
        }
        let mut image = image(&made);
        image.write(0, &before.to_bytes());
        let mut after = before.clone();
        let offset = before.keyslots[id].material_offset();
        let keyslot = &mut after.keyslots[id];
        (keyslot.active, keyslot.iterations, keyslot.salt) = (false, 0, [0; 32]);
        let material = image.bytes(offset, 128_000);
        explore(
            &format!("keyslot {id} goes"),
            &image,
            |world| {
                let mut device = device(world);
                store::destroy_material(&mut device, &Header::Luks1(before.clone()), offset, 131_072)?;
                store::write_luks1(&mut device, &before, &after)
            },
            |world, case| {
                let mut device = device(world);
                let found = load1(&mut device).map_err(|error| error.chain())?;
                let others = (0..8).filter(|other| *other != id);
                for other in others {
                    if found.keyslots[other] != before.keyslots[other] {
                        return Err(format!("keyslot {other} was touched"));
                    }
                }
                if case.completed && found != *after {
                    return Err("done, and yet in use".to_owned());
                }
                let mut there = vec![0; material.len()];
                device.read(offset, &mut there).expect("reads");
                let is_there = there.chunks(512).zip(material.chunks(512)).any(|(now, then)| now == then);
                if !found.keyslots[id].active && is_there {
                    return Err("out of use while its material was there".to_owned());
                }
                Ok(())
            },
        );
    }
}

#[test]
fn a_new_volume_is_there_as_a_whole_or_not_at_all() {
    for wish in [LUKS1, LUKS2] {
        let old = image(&made(LUKS2));
        let new = made(wish);
        explore(
            "clear",
            &old,
            |world| new.clear(&mut device(world)),
            |world, case| match load(world) {
                Ok(_) if case.completed => Err("the old header survived".to_owned()),
                _ => Ok(()),
            },
        );
        let world = World::new(1);
        world.add(old, Default::default()).expect("a disk");
        new.clear(&mut device(&world)).expect("cleared");
        let cleared = world.visible(0).expect("an image");
        explore(
            "write",
            &cleared,
            |world| new.write(&mut device(world)),
            |world, case| match load(world) {
                Ok(Header::Luks2(found)) => {
                    let Header::Luks2(wanted) = &new.header else { return Err("LUKS2".to_owned()) };
                    if found.header.metadata != wanted.header.metadata {
                        return Err("another header".to_owned());
                    }
                    opens(world)
                }
                Ok(found) if found == new.header => opens(world),
                Ok(_) => Err("half a header".to_owned()),
                Err(error) if case.completed => Err(format!("done, and yet {}", error.chain())),
                // A torn LUKS2 primary is damaged; LUKS1 has no checksum to say so, and must not be there at all.
                Err(error) if wish == LUKS1 && error.kind() != ErrorKind::Unsupported => Err(error.chain()),
                Err(_) => Ok(()),
            },
        );
    }
}
