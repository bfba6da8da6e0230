//! Any bytes as what a client or a server sends, by every parser there is: never a panic, and what is understood is written the same.
#![no_main]

use engine::format::nbd::option::{
    self, Block, Contexts, GREETING_BYTES, Go, OPTION_BYTES, REPLY_BYTES, number,
};
use engine::format::nbd::reply::{self, EXTENDED_CHUNK_BYTES, Header};
use engine::format::nbd::request::{COMPACT_BYTES, EXTENDED_BYTES, Request};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    for (extended, length) in [(false, COMPACT_BYTES), (true, EXTENDED_BYTES)] {
        let Some(head) = bytes.get(..length) else { continue };
        if let Some(request) = Request::parse(head, extended) {
            let mut again = [0; EXTENDED_BYTES];
            assert_eq!(request.put(&mut again, extended), length);
            assert_eq!(&again[..length], head);
            assert!(request.payload(extended) <= request.length);
        }
    }
    if let Some(length) = bytes.first_chunk().and_then(|magic| reply::header_bytes(*magic))
        && let Some(head) = bytes.get(..length)
    {
        let mut again = [0; EXTENDED_CHUNK_BYTES];
        let written = match reply::parse(head) {
            Header::Simple { error, cookie } => reply::put_simple(&mut again, error, cookie),
            Header::Chunk { flags, kind, cookie, offset, length: payload } => {
                let extended = length == EXTENDED_CHUNK_BYTES;
                reply::put_chunk(&mut again, extended, flags, kind, cookie, offset, payload)
            }
        };
        assert_eq!(&again[..written], head);
    }
    if let Some(head) = bytes.first_chunk::<GREETING_BYTES>()
        && let Ok(flags) = option::parse_greeting(head)
    {
        assert_eq!(&option::greeting(flags), head);
    }
    if let Some(head) = bytes.first_chunk::<OPTION_BYTES>() {
        let _ = option::parse_option(head);
    }
    if let Some(head) = bytes.first_chunk::<REPLY_BYTES>() {
        let _ = option::parse_reply(head);
    }
    if let Ok(go) = Go::parse(bytes) {
        assert!(go.name.len() < bytes.len() && !go.name.contains('\0'));
        let _ = go.wants(3);
    }
    if let Ok(contexts) = Contexts::parse(bytes) {
        let queries: Vec<&str> = contexts.queries().collect();
        let mut again = Vec::new();
        option::put_contexts(&mut again, number::SET_META_CONTEXT, contexts.name, &queries);
        assert_eq!(&again[OPTION_BYTES..], bytes);
    }
    if let Ok(block) = Block::parse(bytes)
        && !matches!(block, Block::Unknown(_))
    {
        let mut again = Vec::new();
        block.put(&mut again, number::GO);
        assert_eq!(&again[REPLY_BYTES..], bytes);
    }
    let _ = option::parse_server(bytes);
    let _ = option::parse_context(bytes);
    let _ = option::error_text(bytes);
});
