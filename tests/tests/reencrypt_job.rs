//! Re-encryption as a job, through the registry, on real files.

use proto::reencrypt::Resilience;
use tests::Scratch;
use tests::jobs::{MIB, QUEUES, assert_done, noise, registry};
use tests::rewriting::{PASS, Rewrite, plaintext, report, volume};

const IN_PLACE: [Resilience; 3] = [Resilience::Checksum, Resilience::Journal, Resilience::None];

#[test]
fn every_protection_on_every_queue_keeps_the_plaintext_and_changes_the_key() {
    for queue in QUEUES {
        let registry = registry(queue);
        for resilience in IN_PLACE {
            for (unit, bytes) in [(512, 7 * MIB + 512), (4096, 40 * MIB + 4096)] {
                let scratch = Scratch::new();
                let plain = noise(bytes, 77);
                let path = volume(&registry, &scratch, &plain, unit, None);
                let before = std::fs::read(&path).expect("volume");
                let info = Rewrite::of(&path).by(resilience).run(&registry);
                assert_done(&info);
                let what = format!("{queue:?} {resilience:?} {unit}");
                let after = std::fs::read(&path).expect("volume");
                assert_eq!(before.len(), after.len(), "{what}");
                let data = before.len() - bytes;
                let same = (data..after.len())
                    .step_by(512)
                    .filter(|&at| before[at..at + 512] == after[at..at + 512]);
                assert_eq!(same.count(), 0, "{what}: sectors that are as before");
                assert!(plaintext(&registry, &scratch, &path, PASS) == plain, "{what}");
                assert_eq!(info.progress.done_bytes, bytes as u64, "{what}");
                assert_eq!(info.progress.total_bytes, Some(bytes as u64), "{what}");
                let report = report(&info);
                assert_eq!(report.total_bytes, bytes as u64);
                assert!(report.old_key_gone, "{what}");
            }
        }
    }
}
