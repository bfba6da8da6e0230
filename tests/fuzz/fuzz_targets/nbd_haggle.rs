//! Any bytes of a client that haggles, in pieces of any length: never a panic, always an end, and little is held or answered at a time.
#![no_main]

use engine::export::nbd::haggle::{Catalogue, Haggle, OUT_MAX, Offer, Security, Step};
use engine::format::nbd::option::{OPTION_BYTES, OPTION_DATA_MAX};

struct Offers(Vec<Offer>);

impl Catalogue for Offers {
    fn find(&self, name: &str) -> Option<Offer> {
        self.0.iter().find(|offer| offer.name == name).cloned()
    }

    fn after(&self, id: u64) -> Option<Offer> {
        self.0.iter().find(|offer| offer.id > id).cloned()
    }
}

libfuzzer_sys::fuzz_target!(|input: (u8, Vec<u8>)| {
    let (choices, bytes) = input;
    let offer = |id, name: &str, read_only| Offer {
        id,
        name: name.to_owned(),
        description: Some("for humans".to_owned()),
        size: 1 << 40,
        read_only,
        preferred: 4096,
        full: false,
    };
    let offers = Offers(vec![offer(1, "", false), offer(7, "a", true)]);
    let security = if choices & 1 == 0 { Security::Plain } else { Security::Demanded };
    let piece = 1 + usize::from(choices >> 1) * 8;
    let mut out = Vec::new();
    let mut haggle = Haggle::greet(security, &mut out);
    let mut rest = &bytes[..];
    // A step takes an option, goes on with a list, or waits for bytes, of which there are no more than these.
    for _ in 0..4 * bytes.len() + 64 {
        out.clear();
        let step = haggle.step(&offers, &mut out);
        assert!(out.len() <= OUT_MAX);
        match step {
            Step::Again => {}
            Step::Wait if rest.is_empty() => return,
            Step::Wait => {
                let (now, later) = rest.split_at(piece.min(rest.len()));
                haggle.feed(now);
                assert!(haggle.held() <= OPTION_BYTES + OPTION_DATA_MAX as usize + piece);
                rest = later;
            }
            Step::Tls(behind) => {
                haggle.secured();
                haggle.feed(&behind);
            }
            Step::Go(agreed) => {
                assert!(offers.0.iter().any(|offer| offer.id == agreed.id));
                assert!(agreed.early.len() <= bytes.len());
                return;
            }
            Step::Close => return,
        }
    }
    panic!("it goes on for ever");
});
