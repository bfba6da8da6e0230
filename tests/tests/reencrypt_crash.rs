//! x
use std::time::Instant;
use proto::reencrypt::Resilience;
use tests::crash::Shape;
use tests::crash::proof::{Depth, Proof, Totals};

#[test]
fn first() {
    let shape = Shape {
        resilience: Resilience::Checksum,
        units: [512, 512],
        data: 128 << 10,
        area: 4096,
        hotzone: 32 << 10,
        chunk: 8192,
        detached: false,
        sector: 4096,
        keyslots: 1,
    };
    let volume = shape.volume();
    let totals = Totals::default();
    let depth = Depth { tears: 8, cuts_max: u64::MAX, open_every: 50, resume_every: 50, nest_every: 50, nest_tears: 4 };
    let start = Instant::now();
    let proof = Proof::new("first", &volume, depth, &totals);
    let done = proof.run(tests::seed());
    eprintln!("{totals} in {:?}", start.elapsed());
    if let Err(violation) = done {
        panic!("{violation}");
    }
}
