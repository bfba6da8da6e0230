//! What a server says of holes, and what becomes of too many of them.

use super::*;
use crate::backend::device::Region;

#[test]
fn holes_that_are_too_many_are_not_kept_in_part_without_a_word() {
    const MIB: u64 = 1 << 20;
    let (ours, mut theirs) = UnixStream::pair().expect("sockets");
    let said = [
        greeting(3),
        reply(number::EXTENDED_HEADERS, answer::ERR_UNSUP, &[]),
        reply(number::STRUCTURED_REPLY, answer::ACK, &[]),
        context(7, "base:allocation"),
        reply(number::SET_META_CONTEXT, answer::ACK, &[]),
        export(8 * MIB, PLAIN | flags::READ_ONLY),
        reply(number::GO, answer::ACK, &[]),
    ];
    theirs.write_all(&said.concat()).expect("room");
    // It ends when the device has gone.
    let _server = Joined(Some(std::thread::spawn(move || {
        theirs.read_exact(&mut [0; HEARD]).expect("heard");
        // Eight bytes of data, eight of a hole, a MiB at a time.
        let extents: Vec<_> = (0..MIB / 16).flat_map(|_| [(8, 0), (8, 3)]).collect();
        for _ in 0..8 {
            let cookie = hear(&mut theirs);
            theirs.write_all(&status(FLAG_DONE, cookie, 7, &extents)).expect("sent");
        }
        let _ = theirs.read_to_end(&mut Vec::new());
    })));
    let purpose = Purpose { read: true, write: false, stream: false };
    let device = open(vec![ours.into()], &remote(), None, "remote", purpose).expect("opened");
    for _ in 0..2 {
        let error = device.learn_holes(&|| false).expect_err("more than are remembered");
        assert_eq!(error.kind(), ErrorKind::Limit, "{}", error.chain());
    }
    assert!(matches!(device.region_at(0), Some(Region::Data { .. })));
}
