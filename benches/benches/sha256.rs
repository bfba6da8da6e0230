//! SHA-256 of many blocks of one size on one core: ours on every rung, and the plaintext digest, beside the `sha2` crate block by
//! block and, with the feature `rivals`, OpenSSL. This is the CPU cost of checksum resilience.
//!
//! ```text
//! cargo bench -p benches --bench sha256 --features rivals -- [--small] [--buffer BYTES] [--rounds N] [--millis N]
//! ```
//!
//! All digests are compared: a contestant that computes something else fails the bench. `cargo test` runs the small mode.

use std::cell::RefCell;
use std::rc::Rc;

use benches::facts::Facts;
use benches::plan::Plan;
use benches::turns::{Contestant, digest, ratio, spread, take_turns};
use engine::crypto::Secret;
use engine::crypto::measure::{AlignedBuffer, median};
use engine::crypto::proof::Proof;
use engine::crypto::sha256::{HashKernel, checksums_by};
use sha2::Digest;

/// Where a contestant leaves its digests.
type Digests = Rc<RefCell<Vec<[u8; 32]>>>;

fn contestant(
    subject: &str,
    count: usize,
    mut hash: impl FnMut(&[u8], &mut [[u8; 32]]) + 'static,
) -> (Contestant, Digests) {
    let digests: Digests = Rc::new(RefCell::new(vec![[0; 32]; count]));
    let out = Rc::clone(&digests);
    let work = Box::new(move |buf: &mut [u8]| hash(buf, &mut out.borrow_mut()));
    (Contestant { subject: subject.to_owned(), operation: "hash", limit: None, work }, digests)
}

/// Everybody who hashes blocks of this size.
fn contestants(block_bytes: usize, count: usize) -> Vec<(Contestant, Digests)> {
    let mut all = vec![contestant("sha2", count, move |buf, out| {
        for (block, out) in buf.chunks_exact(block_bytes).zip(out) {
            *out = sha2::Sha256::digest(block).into();
        }
    })];
    for kernel in HashKernel::ALL.into_iter().filter(|kernel| kernel.is_available()) {
        all.push(contestant(kernel.name(), count, move |buf, out| {
            checksums_by(kernel, block_bytes, buf, out);
        }));
    }
    #[cfg(feature = "rivals")]
    all.push(contestant("openssl", count, move |buf, out| {
        for (block, out) in buf.chunks_exact(block_bytes).zip(out) {
            *out = openssl::sha::sha256(block);
        }
    }));
    all
}

fn main() {
    let plan = Plan::typed("sha256", false);
    let machine = Facts::collect();
    println!("{} · {} · {} · {}", machine.cpu, machine.cpu_flags.join(" "), machine.kernel, machine.git);
    println!("one core, {} KiB, {} rounds of {} ms", plan.buffer_bytes >> 10, plan.rounds, plan.millis);
    let mut buffer = AlignedBuffer::patterned(plan.buffer_bytes);
    for block_bytes in [512, 4096] {
        let (mut all, digests): (Vec<_>, Vec<_>) =
            contestants(block_bytes, plan.buffer_bytes / block_bytes).into_iter().unzip();
        // No block, so no digests to compare: its own tests hold it to its definition.
        let proof = Proof::new(Secret::copy_of(&[7; 64]).expect("memory"));
        all.push(contestant("proof", 1, move |buf, out| out[0] = proof.contribution(0, buf)).0);
        let rates = take_turns(&mut all, buffer.as_mut_slice(), plan.time(), plan.rounds);
        println!("\nblocks of {block_bytes} bytes");
        println!("{:10} {:>8} {:>15} {:>8}  digest", "subject", "GB/s", "spread", "÷ sha2");
        for (at, (contestant, rates_of)) in all.iter().zip(&rates).enumerate() {
            let found = digests.get(at).map_or(String::new(), |found| {
                assert_eq!(*found.borrow(), *digests[0].borrow(), "{} differs", contestant.subject);
                digest(found.borrow().as_flattened())
            });
            let (slowest, fastest) = spread(rates_of);
            println!(
                "{:10} {:8.2} {:7.2}-{:<7.2} {:8.2}  {found}",
                contestant.subject,
                median(rates_of) / 1e9,
                slowest / 1e9,
                fastest / 1e9,
                ratio(rates_of, &rates[0]),
            );
        }
    }
}
