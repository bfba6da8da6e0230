//! Any bytes as a request line: never a panic, and what is accepted reads the same when written again.
#![no_main]

libfuzzer_sys::fuzz_target!(|line: &[u8]| {
    if let Ok(request) = engine::control::line::parse(line) {
        let again = serde_json::to_vec(&request).expect("json");
        assert_eq!(engine::control::line::parse(&again).expect("our own line"), request);
    }
});
