//! Any bytes as LUKS2 metadata: never a panic, and what is accepted reads the same when written again.
#![no_main]

use engine::format::luks2::metadata::Metadata;

libfuzzer_sys::fuzz_target!(|text: &[u8]| {
    if let Ok(mut metadata) = Metadata::parse(text) {
        let written = metadata.to_json().to_string();
        let again = Metadata::parse(written.as_bytes()).expect("our own text");
        assert_eq!(again.to_json().to_string(), written);
        // A digest of nothing is not written.
        metadata.digests.retain(|_, digest| !digest.is_unused());
        assert_eq!(again, metadata);
    }
});
