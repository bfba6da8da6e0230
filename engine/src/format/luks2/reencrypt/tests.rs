//! What `write` refuses, and what it leaves as it was. The states themselves are held against cryptsetup's
//! (`tests/reencrypt_format.rs`) and against forged ones (`tests/reencrypt_forged.rs`).

use super::digest::message;
use super::read::read;
use super::write::{Begin, begin, carry_tokens, clean, finish, hot, protect};
use super::{Checksum, Direction, Mode, Moved, Process, Resilience, State};
use crate::crypto::Secret;
use crate::crypto::hash::Hash;
use crate::crypto::kdf::Kdf;
use crate::error::ErrorKind;
use crate::format::luks2::Header;
use crate::format::luks2::edit::keyslot_area_bytes;
use crate::format::luks2::metadata::{Area, Digest, Luks2Keyslot, Segment, SegmentKind, Token};
use crate::units::Extent;

const MIB: u64 = 1 << 20;
const TOTAL: u64 = 64 * MIB;

fn keyslot(header: &mut Header, digest: u32) -> u32 {
    let area = header.free_keyslot_area(64).expect("room");
    let kdf = Kdf::Pbkdf2 { hash: Hash::Sha256, iterations: 1000 };
    let keyslot = Luks2Keyslot::new(64, area, ("aes-xts-plain64", 64), "sha256", kdf, [3; 32]);
    let id = header.metadata.free_keyslot().expect("a number");
    header.metadata.add_keyslot(id, keyslot, digest).expect("free");
    id
}

/// Keyslot 0 of the key of the data, keyslot 1 of a new one, and room in the keyslots area for two more.
fn header() -> Header {
    let segment = Segment::crypt(16 * MIB, None, "aes-xts-plain64", 512);
    let room = 4 * keyslot_area_bytes(64);
    let mut header = Header::new(16 << 10, room, segment, "uuid".into(), [[1; 64], [2; 64]]).expect("legal");
    for segments in [&[0][..], &[]] {
        let digest = Digest::pbkdf2("sha256", 1000, vec![1; 32], vec![2; 32]);
        let digest = header.metadata.add_digest(digest, &[], segments).expect("a number");
        keyslot(&mut header, digest);
    }
    header.check().expect("valid");
    header
}

fn checksum(block_bytes: u32) -> Resilience {
    Resilience::Checksum(Checksum { hash: Hash::Sha256, block_bytes })
}

fn wish(direction: Direction, resilience: Resilience) -> Begin {
    Begin {
        mode: Mode::Reencrypt,
        direction,
        resilience,
        target: Segment::crypt(16 * MIB, None, "aes-xts-plain64", 4096),
        new_digest: Some(1),
        moved: None,
        total: None,
    }
}

fn begun(direction: Direction, resilience: Resilience) -> (Header, Process) {
    let mut header = header();
    let mut process = begin(&mut header, &wish(direction, resilience)).expect("it can be");
    let digest = Digest::pbkdf2("sha256", 1000, vec![1; 32], vec![2; 32]);
    protect(&mut header.metadata, &mut process, digest).expect("room");
    header.check().expect("valid");
    (header, process)
}

fn extent(start: u64, end: u64) -> Extent {
    Extent::new(start, end).expect("not empty")
}

fn state(header: &Header) -> State {
    read(&header.metadata).expect("valid").expect("a re-encryption").1
}

#[test]
fn it_takes_the_largest_gap_and_leaves_the_others() {
    let mut header = header();
    for digest in [0, 1] {
        keyslot(&mut header, digest);
    }
    assert_eq!(header.largest_free_area().expect_err("full").kind(), ErrorKind::NoSpace);
    let error = begin(&mut header, &wish(Direction::Forward, checksum(4096))).expect_err("full");
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    let size = keyslot_area_bytes(64);
    header.metadata.remove_keyslot(1);
    assert_eq!(header.largest_free_area().expect("one"), Area { offset: (32 << 10) + size, size });
    header.metadata.remove_keyslot(3);
    // Of equals the first.
    assert_eq!(header.largest_free_area().expect("two").offset, (32 << 10) + size);
    header.metadata.remove_keyslot(2);
    let all = Area { offset: (32 << 10) + size, size: 3 * size };
    assert_eq!(header.largest_free_area().expect("one gap"), all);
}

#[test]
fn a_header_is_left_as_it_was_when_it_cannot_begin() {
    let refused = |change: &dyn Fn(&mut Header, &mut Begin), kind: ErrorKind, words: &str| {
        let (mut header, mut wish) = (header(), wish(Direction::Forward, checksum(4096)));
        change(&mut header, &mut wish);
        let was = header.clone();
        let error = begin(&mut header, &wish).expect_err(words);
        assert_eq!(error.kind(), kind, "{words}: {error:?}");
        assert!(error.chain().contains(words), "{words}: {error:?}");
        assert_eq!(header, was, "{words}");
    };
    let under_way = |header: &mut Header, wish: &mut Begin| drop(begin(header, wish).expect("the first"));
    refused(&under_way, ErrorKind::Conflict, "is under way");
    let demanding = |header: &mut Header, _: &mut Begin| {
        header.metadata.config.requirements.push("something-new".into());
    };
    refused(&demanding, ErrorKind::Unsupported, "the volume requires something-new");
    let integrity = |header: &mut Header, _: &mut Begin| {
        let segment = header.metadata.segments.get_mut(&0).expect("data");
        if let SegmentKind::Crypt { integrity, .. } = &mut segment.kind {
            *integrity = Some(serde_json::json!({ "type": "hmac(sha256)" }));
        }
    };
    refused(&integrity, ErrorKind::Unsupported, "integrity");
    let two = |header: &mut Header, _: &mut Begin| {
        header.metadata.segments.get_mut(&0).expect("data").size = Some(MIB);
        header.metadata.segments.insert(1, Segment::crypt(17 * MIB, None, "aes-xts-plain64", 512));
        header.metadata.digests.get_mut(&0).expect("its digest").segments.push(1);
    };
    refused(&two, ErrorKind::Unsupported, "more than one data segment");
    let fixed = |header: &mut Header, _: &mut Begin| {
        header.metadata.segments.get_mut(&0).expect("data").size = Some(MIB);
    };
    refused(&fixed, ErrorKind::Unsupported, "fixed size");
    refused(&|_, wish| wish.target.offset += MIB, ErrorKind::Invalid, "offset is not that of backup-final");
    refused(&|_, wish| wish.resilience = checksum(512), ErrorKind::Invalid, "less than a sector");
    let shift = Resilience::Datashift { shift: MIB };
    refused(
        &|_, wish| wish.resilience = shift,
        ErrorKind::Unsupported,
        "resilience datashift in mode reencrypt",
    );
    let same = |_: &mut Header, wish: &mut Begin| {
        wish.new_digest = Some(0);
        wish.target = Segment::crypt(16 * MIB, None, "aes-xts-plain64", 512);
    };
    refused(&same, ErrorKind::Unsupported, "already as it shall be");
    refused(&|_, wish| wish.new_digest = None, ErrorKind::Invalid, "not exactly one digest");
}

#[test]
fn a_new_cipher_may_keep_the_key() {
    let mut header = header();
    let wish = Begin { new_digest: Some(0), ..wish(Direction::Forward, Resilience::None) };
    let mut process = begin(&mut header, &wish).expect("larger sectors");
    let digest = Digest::pbkdf2("sha256", 1000, vec![1; 32], vec![2; 32]);
    protect(&mut header.metadata, &mut process, digest).expect("room");
    assert_eq!(state(&header), State::Clean { boundary: None });
    hot(&mut header.metadata, &process, extent(0, TOTAL), TOTAL).expect("all of it");
    clean(&mut header.metadata, &process, TOTAL, TOTAL).expect("done");
    assert_eq!(state(&header), State::Finished);
    assert_eq!(finish(&mut header.metadata, &process).expect("over"), []);
    assert_eq!(header.metadata.digests[&0].keyslots, [0]);
    header.check().expect("valid");
}

#[test]
fn a_step_follows_the_boundary_and_fits_its_protection() {
    for direction in [Direction::Forward, Direction::Backward] {
        let (mut header, process) = begun(direction, Resilience::Journal);
        let most = process.hotzone_max().expect("a journal has an end");
        assert_eq!(most, process.area.size);
        let from = |start: u64, end: u64| match direction {
            Direction::Forward => extent(start, end),
            Direction::Backward => extent(TOTAL - end, TOTAL - start),
        };
        let metadata = &mut header.metadata;
        for wrong in [from(4096, 8192), from(0, most + 4096), from(0, 512)] {
            let was = metadata.clone();
            let error = hot(metadata, &process, wrong, TOTAL).expect_err("refused");
            assert_eq!(error.kind(), ErrorKind::Internal, "{direction:?} {wrong}: {error:?}");
            assert_eq!(*metadata, was, "{direction:?} {wrong}");
        }
        hot(metadata, &process, from(0, 8192), TOTAL).expect("the first");
        let error = hot(metadata, &process, from(8192, 12288), TOTAL).expect_err("in the middle of a step");
        assert_eq!(error.kind(), ErrorKind::Internal);
        let beyond = process.boundary_after(from(8192, 12288));
        assert_eq!(clean(metadata, &process, beyond, TOTAL).expect_err("beyond").kind(), ErrorKind::Internal);
        let odd = process.boundary_after(from(0, 512));
        assert_eq!(clean(metadata, &process, odd, TOTAL).expect_err("odd").kind(), ErrorKind::Internal);
        clean(metadata, &process, process.boundary_after(from(0, 4096)), TOTAL).expect("stopped early");
        let boundary = process.boundary_after(from(0, 4096));
        assert_eq!(finish(metadata, &process).expect_err("not yet").kind(), ErrorKind::Internal);
        clean(metadata, &process, boundary, TOTAL).expect("as it is");
        assert_eq!(state(&header), State::Clean { boundary: Some(boundary) });
        assert_eq!(state(&header).done_bytes(&process, TOTAL), 4096);
    }
}

#[test]
fn a_step_that_was_stopped_before_anything_was_written_never_was() {
    let (mut header, process) = begun(Direction::Forward, Resilience::None);
    let was = header.metadata.clone();
    hot(&mut header.metadata, &process, extent(0, TOTAL), TOTAL).expect("all of it");
    assert_eq!(state(&header), State::Crash { start: 0, end: TOTAL });
    clean(&mut header.metadata, &process, 0, TOTAL).expect("nothing done");
    assert_eq!(header.metadata, was);
}

#[test]
fn the_end_takes_the_old_key_and_leaves_the_new_one() {
    let (mut header, process) = begun(Direction::Backward, Resilience::None);
    header.metadata.tokens.insert(0, Token::keyring("where", vec![0]));
    carry_tokens(&mut header.metadata, 0, 1);
    carry_tokens(&mut header.metadata, 0, 1);
    assert_eq!(header.metadata.tokens[&0].keyslots, [0, 1]);
    let old = header.metadata.keyslots[&0].area().expect("an area");
    hot(&mut header.metadata, &process, extent(0, TOTAL), TOTAL).expect("all of it");
    clean(&mut header.metadata, &process, 0, TOTAL).expect("done");
    assert_eq!(finish(&mut header.metadata, &process).expect("over"), [(0, old)]);
    assert_eq!(read(&header.metadata).expect("valid"), None);
    assert_eq!(header.metadata.keyslots.keys().collect::<Vec<_>>(), [&1]);
    assert_eq!(header.metadata.digests.keys().collect::<Vec<_>>(), [&1]);
    assert_eq!(header.metadata.tokens[&0].keyslots, [1]);
    assert_eq!(header.metadata.segments.len(), 1);
    assert_eq!(header.metadata.segments[&0], Segment::crypt(16 * MIB, None, "aes-xts-plain64", 4096));
    assert!(header.metadata.config.requirements.is_empty());
    header.check().expect("valid");
}

#[test]
fn data_that_moves_is_moved_in_one_piece_at_last() {
    const SHIFT: u64 = 16 * MIB;
    let segment = Segment::crypt(SHIFT, None, "aes-xts-plain64", 512);
    let room = SHIFT - (32 << 10);
    let mut header = Header::new(16 << 10, room, segment, "uuid".into(), [[1; 64], [2; 64]]).expect("legal");
    let digest = Digest::pbkdf2("sha256", 1000, vec![1; 32], vec![2; 32]);
    let new_digest = header.metadata.add_digest(digest.clone(), &[], &[0]).expect("a number");
    keyslot(&mut header, new_digest);
    let wish = Begin {
        mode: Mode::Encrypt,
        direction: Direction::Backward,
        resilience: Resilience::Datashift { shift: SHIFT },
        target: Segment::crypt(SHIFT, None, "aes-xts-plain64", 512),
        new_digest: Some(new_digest),
        moved: Some(Moved { bytes: SHIFT, offset: SHIFT + TOTAL }),
        total: Some(TOTAL),
    };
    let mut process = begin(&mut header, &wish).expect("it can be");
    protect(&mut header.metadata, &mut process, digest).expect("room");
    header.check().expect("valid");
    assert_eq!(process.total, Some(TOTAL));
    assert_eq!(process.area.size, 4096);
    let metadata = &mut header.metadata;
    let error = hot(metadata, &process, extent(TOTAL - SHIFT, TOTAL), TOTAL + 512).expect_err("another size");
    assert_eq!(error.kind(), ErrorKind::Internal);
    let mut boundary = TOTAL;
    for start in [TOTAL - SHIFT, TOTAL - SHIFT - MIB, TOTAL - 2 * SHIFT, SHIFT + 512, SHIFT] {
        hot(metadata, &process, extent(start, boundary), TOTAL).expect("it follows");
        clean(metadata, &process, start, TOTAL).expect("a boundary");
        boundary = start;
    }
    for start in [512, SHIFT - 512] {
        let error = hot(metadata, &process, extent(start, SHIFT), TOTAL).expect_err("in pieces");
        assert_eq!(error.kind(), ErrorKind::Internal);
    }
    hot(metadata, &process, extent(0, SHIFT), TOTAL).expect("the last");
    clean(metadata, &process, 0, TOTAL).expect("done");
    assert_eq!(finish(metadata, &process).expect("over"), []);
    assert_eq!(metadata.segments[&0], Segment::crypt(SHIFT, None, "aes-xts-plain64", 512));
    header.check().expect("valid");
}

#[test]
fn the_proof_needs_every_key_there_is() {
    let (header, process) = begun(Direction::Forward, checksum(4096));
    let key = |byte| Secret::copy_of(&[byte; 64]).expect("memory");
    let (old, new) = (key(1), key(2));
    for (old, new) in [(Some(&old), None), (None, Some(&new)), (None, None)] {
        let error = message(&header.metadata, &process, old, new).expect_err("a key is missing");
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.chain().contains("volume key is missing"), "{error:?}");
    }
    let all = message(&header.metadata, &process, Some(&old), Some(&new)).expect("both");
    let other = message(&header.metadata, &process, Some(&new), Some(&old)).expect("both");
    assert_ne!(all, other);
    let mut expected = b"v2".to_vec();
    expected.extend([[1; 64], [2; 64]].concat());
    expected.extend(b"reencryptforwardchecksum");
    expected.extend(process.area.offset.to_be_bytes());
    expected.extend(process.area.size.to_be_bytes());
    expected.extend(b"sha256\0\0\x10\0");
    for sector_size in [512_u32, 4096] {
        expected.extend(b"crypt");
        expected.extend((16 * MIB).to_be_bytes());
        expected.extend(b"dynamic");
        expected.extend([0; 8]);
        expected.extend(b"aes-xts-plain64");
        expected.extend(sector_size.to_be_bytes());
    }
    assert!(all.as_bytes() == expected, "the bytes of the proof");
}
