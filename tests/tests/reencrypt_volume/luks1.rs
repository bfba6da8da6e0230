//! Volumes with a LUKS1 header, which becomes a LUKS2 one first.

use engine::error::ErrorKind;
use engine::volume::Header;
use engine::volume::reencrypt::{begin, luks};
use tests::luks2::{cryptsetup_does, has_cryptsetup};
use tests::rewrite::{Until, device, go_on, plaintext};
use tests::{Random, Scratch, skip};

use crate::volume::{DATA, OFFSET, PASS, STEP, Volume, quick};

/// A LUKS1 volume made by cryptsetup, its data noise.
fn older(passphrases: usize, bits: u32, detached: bool) -> Volume {
    let scratch = Scratch::new();
    let offset = if detached { 0 } else { OFFSET };
    let mut noise = vec![0; usize::try_from(offset + DATA).expect("small")];
    Random::new(7).fill(&mut noise);
    let path = scratch.file("volume", &noise);
    let pass = scratch.file("pass", PASS.as_bytes());
    let header = detached.then(|| scratch.file("header", &vec![0; 4 << 20]));
    let place = match &header {
        Some(header) => format!("--header {}", header.display()),
        None => format!("--align-payload {}", OFFSET / 512),
    };
    let costs = "--pbkdf-force-iterations 1000";
    let format =
        format!("luksFormat -q --type luks1 --key-size {bits} {costs} --key-file {} {place}", pass.display());
    cryptsetup_does(&[&format], &[&path]);
    let volume = Volume { scratch, path, header, unit: 512 };
    for index in 1..passphrases {
        let file = volume.scratch.file("added", format!("number {index}").as_bytes());
        let add = format!("luksAddKey -q {costs} --key-file {}", volume.pass_file().display());
        cryptsetup_does(&[&add], &[volume.header(), &file]);
    }
    volume
}

#[test]
fn a_luks1_volume_becomes_luks2_first() {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    for (bits, detached) in [(512, false), (256, false), (512, true)] {
        let volume = older(2, bits, detached);
        let before = volume.plain(PASS);
        let bytes = std::fs::read(volume.header()).expect("read");
        let keys = [PASS, "number 1"];
        let refused = volume.begin_with(&quick(), None, &[PASS], None).err().expect("one would be lost");
        assert_eq!(refused.kind(), ErrorKind::Conflict);
        let planned = volume.plan(&quick(), &keys).expect("planned");
        assert_eq!(planned.carried, [0, 1]);
        assert!(std::fs::read(volume.header()).expect("read") == bytes, "nothing was written");
        let opened = volume.begin_with(&quick(), None, &keys, None).expect("begun");
        assert!(plaintext(&opened, &volume.path) == before, "{bits}");
        assert!(!go_on(opened, &volume.path, STEP, Until::Within(1, 500)));
        volume.cryptsetup_resumes();
        volume.is_over();
        assert!(volume.plain(PASS) == before && volume.plain("number 1") == before, "{bits}");
    }
    // No keyslot of 0 to 5 is free.
    let full = older(6, 512, false);
    let bytes = std::fs::read(&full.path).expect("read");
    let keys = [PASS, "number 1", "number 2", "number 3", "number 4", "number 5"];
    let refused = full.begin_with(&quick(), None, &keys, None).err().expect("no room");
    assert_eq!(refused.kind(), ErrorKind::NoSpace);
    assert!(refused.chain().contains("cannot become a LUKS2 one"), "{}", refused.chain());
    assert!(std::fs::read(&full.path).expect("read") == bytes, "nothing was written");
}

#[test]
fn a_conversion_cut_off_anywhere_leaves_a_volume_that_opens() {
    if !has_cryptsetup() {
        return skip("no cryptsetup");
    }
    let volume = older(1, 512, false);
    let before = volume.plain(PASS);
    let Header::Luks1(header) = volume.header_now() else { panic!("LUKS1") };
    let whole = std::fs::read(&volume.path).expect("read");
    begin::luks1::convert(&mut device(&volume.path), &header).expect("converted");
    let after = std::fs::read(&volume.path).expect("read");
    assert!(luks::is_unswept(&volume.metadata()), "keyslot 0's first place is to be overwritten");
    // As the steps of its order leave it: what of the bytes is of after. The LUKS1 header in between differs in two fields of sector 0.
    let mut between = header.clone();
    let places = [header.keyslots[0].material_sector, header.keyslots[1].material_sector];
    (between.keyslots[0].material_sector, between.keyslots[1].material_sector) = (places[1], places[0]);
    let place = usize::try_from(u64::from(places[1]) * 512).expect("small");
    let copied = (place..place + 256_000, None);
    let swapped = Some(between.to_bytes());
    let cuts: [&[std::ops::Range<usize>]; 6] = [
        &[],
        &[4096..4096, 16384..16384 + 4096],
        &[4096..4096, 16384..32768],
        &[16384..32768, 0..512],
        &[16384..32768, 0..512, 4096..8192],
        &[16384..32768, 0..16384],
    ];
    for (index, ranges) in std::iter::once(None).chain(cuts.map(Some)).enumerate() {
        let mut bytes = whole.clone();
        let (material, _): &(std::ops::Range<usize>, Option<()>) = &copied;
        bytes[material.clone()].copy_from_slice(&after[material.clone()]);
        if let (Some(ranges), Some(swapped)) = (ranges, &swapped) {
            bytes[..swapped.len()].copy_from_slice(swapped);
            for range in ranges {
                bytes[range.clone()].copy_from_slice(&after[range.clone()]);
            }
        }
        std::fs::write(&volume.path, &bytes).expect("written");
        assert!(volume.plain(PASS) == before, "cut {index}");
        let opened = volume.begin_with(&quick(), None, &[PASS], None).expect("begun");
        assert!(plaintext(&opened, &volume.path) == before, "cut {index}");
        assert!(go_on(opened, &volume.path, STEP, Until::Done));
        volume.is_over();
        assert!(volume.plain(PASS) == before, "cut {index}");
        // No piece of the old material is left where no header points.
        let now = std::fs::read(&volume.path).expect("read");
        let left = whole[32768..4096 + 256_000].chunks_exact(512).zip(32768_usize..).filter(|(piece, _)| {
            now[..usize::try_from(OFFSET).expect("small")]
                .windows(512)
                .step_by(512)
                .any(|window| window == *piece)
        });
        assert_eq!(left.count(), 0, "cut {index}: material of the old key is left");
    }
}
