//! Kernels on one core, in place: ours on every rung beside the issue limit of its instruction, memory alone (`touch`: one
//! xor pass), and, with the feature `rivals`, AWS-LC and OpenSSL. `portable` is `xts-mode` over `aes`.
//!
//! ```text
//! cargo bench -p benches --bench kernel --features rivals -- [--small] [--buffer BYTES] [--rounds N] [--millis N] [--json]
//! ```
//!
//! `--small` takes a second or two and proves that the bench works, not that anything is fast; `cargo test` runs it so. All results of a group are
//! compared: a contestant that computes something else fails the bench.

use benches::facts::Facts;
use benches::libraries::rivals;
use benches::plan::Plan;
use benches::turns::{Contestant, Row, digest, ratio, spread, take_turns};
use engine::crypto::Kernel;
use engine::crypto::limit::spin;
use engine::crypto::measure::{AlignedBuffer, Operation, SEED, median, test_key, work};

/// Everybody who can do this key size and data unit.
fn contestants(key_bits: u32, unit_bytes: u32) -> Vec<Contestant> {
    let mut all = vec![Contestant {
        subject: "memory".to_owned(),
        operation: "touch",
        limit: None,
        work: Box::new(|buf| buf.iter_mut().for_each(|byte| *byte ^= 0x5a)),
    }];
    for kernel in Kernel::ALL.into_iter().filter(|kernel| kernel.is_available()) {
        let limit = spin(kernel, key_bits, 0).map(|_| format!("{} limit", kernel.name()));
        if let Some(subject) = &limit {
            all.push(Contestant {
                subject: subject.clone(),
                operation: "issue",
                limit: None,
                work: Box::new(move |buf| {
                    std::hint::black_box(spin(kernel, key_bits, buf.len() as u64));
                }),
            });
        }
        for operation in Operation::ALL {
            let share = if operation == Operation::Reencrypt { 0.5 } else { 1.0 };
            all.push(Contestant {
                subject: kernel.name().to_owned(),
                operation: operation.name(),
                limit: limit.clone().map(|limit| (limit, share)),
                work: work(kernel, operation, key_bits, unit_bytes).expect("an available kernel"),
            });
        }
    }
    // AWS-LC has no AES-128-XTS.
    if key_bits == 256 {
        let key = test_key(key_bits, SEED).expect("a size we have");
        all.extend(rivals(&key, unit_bytes as usize, true));
        all.extend(rivals(&key, unit_bytes as usize, false));
    }
    all
}

/// What each contestant makes of the same bytes.
fn digests(contestants: &mut [Contestant], bytes: usize) -> Vec<String> {
    let digests: Vec<String> = contestants
        .iter_mut()
        .map(|contestant| {
            let mut buffer = AlignedBuffer::patterned(bytes);
            (contestant.work)(buffer.as_mut_slice());
            digest(buffer.as_mut_slice())
        })
        .collect();
    for (a, digest_a) in contestants.iter().zip(&digests) {
        for (b, digest_b) in contestants.iter().zip(&digests) {
            let agree = a.operation != b.operation || digest_a == digest_b;
            assert!(agree, "{} and {} differ in {}", a.subject, b.subject, a.operation);
        }
    }
    digests
}

fn main() {
    let plan = Plan::typed("kernel", true);
    let machine = Facts::collect();
    if !plan.json {
        println!("{} · {} · {} · {}", machine.cpu, machine.cpu_flags.join(" "), machine.kernel, machine.git);
        println!(
            "one core, in place, {} KiB, {} rounds of {} ms",
            plan.buffer_bytes >> 10,
            plan.rounds,
            plan.millis
        );
    }
    let mut buffer = AlignedBuffer::patterned(plan.buffer_bytes);
    for key_bits in [128, 256] {
        for unit_bytes in [512, 4096] {
            let mut all = contestants(key_bits, unit_bytes);
            let digests = digests(&mut all, plan.buffer_bytes);
            let rates = take_turns(&mut all, buffer.as_mut_slice(), plan.time(), plan.rounds);
            report(&plan, &machine, (key_bits, unit_bytes), &all, &rates, &digests);
        }
    }
}

fn report(
    plan: &Plan,
    machine: &Facts,
    (key_bits, unit_bytes): (u32, u32),
    all: &[Contestant],
    rates: &[Vec<f64>],
    digests: &[String],
) {
    let rates_of = |subject: &str, operation: &str| {
        let at = all.iter().position(|c| c.subject == subject && c.operation == operation)?;
        Some(&rates[at])
    };
    if !plan.json {
        println!("\nAES-{key_bits}-XTS, data units of {unit_bytes} bytes");
        println!(
            "{:18} {:10} {:>8} {:>17} {:>9} {:>9} {:>9}  digest",
            "subject", "operation", "GB/s", "spread", "limit", "÷ limit", "÷ aws-lc"
        );
    }
    for ((contestant, rates), digest) in all.iter().zip(rates).zip(digests) {
        let limit = contestant.limit.as_ref().and_then(|(subject, share)| {
            let limits: Vec<f64> = rates_of(subject, "issue")?.iter().map(|limit| limit * share).collect();
            Some((median(&limits), ratio(rates, &limits)))
        });
        let row = Row {
            bench: "kernel",
            subject: &contestant.subject,
            operation: contestant.operation,
            key_bits,
            data_unit: unit_bytes,
            buffer_bytes: plan.buffer_bytes as u64,
            bytes_per_second: median(rates),
            spread: spread(rates),
            limit_bytes_per_second: limit.map(|limit| limit.0),
            ratio_to_limit: limit.map(|limit| limit.1),
            digest: digest.clone(),
            machine,
        };
        if plan.json {
            println!("{}", serde_json::to_string(&row).expect("a row is plain data"));
            continue;
        }
        let cell = |value: Option<f64>| value.map_or(String::new(), |value| format!("{value:.3}"));
        let rival = rates_of("aws-lc", contestant.operation).map(|rival| ratio(rates, rival));
        println!(
            "{:18} {:10} {:8.2} {:8.2}-{:<8.2} {:>9} {:>9} {:>9}  {}",
            row.subject,
            row.operation,
            row.bytes_per_second / 1e9,
            row.spread.0 / 1e9,
            row.spread.1 / 1e9,
            cell(row.limit_bytes_per_second.map(|limit| limit / 1e9)),
            cell(row.ratio_to_limit),
            cell(rival),
            row.digest,
        );
    }
}
