//! Any bytes as LUKS2 metadata: never a panic, and what is accepted reads the same when written again; a re-encryption in it, too,
//! which can then go on from where it stands.
#![no_main]

use engine::format::luks2::metadata::Metadata;
use engine::format::luks2::reencrypt::read::read;
use engine::format::luks2::reencrypt::write::clean;
use engine::format::luks2::reencrypt::{Direction, State};

libfuzzer_sys::fuzz_target!(|text: &[u8]| {
    if let Ok(mut metadata) = Metadata::parse(text) {
        let written = metadata.to_json().to_string();
        let again = Metadata::parse(written.as_bytes()).expect("our own text");
        assert_eq!(again.to_json().to_string(), written);
        // A digest of nothing is not written.
        metadata.digests.retain(|_, digest| !digest.is_unused());
        assert_eq!(again, metadata);
        let Ok(Some((process, state))) = read(&metadata) else { return };
        assert_eq!(read(&again).expect("the same"), Some((process.clone(), state)));
        if let State::Crash { start, end } = state {
            let total = process.total.unwrap_or(u64::MAX / 512 * 512);
            let boundary = match process.direction {
                Direction::Forward => end,
                Direction::Backward => start,
            };
            clean(&mut metadata, &process, boundary, total).expect("behind its hotzone");
            let after = read(&metadata).expect("a state").expect("not over");
            assert_eq!(after.1, process.clean_at(boundary, total));
        }
    }
});
