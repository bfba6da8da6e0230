//! Re-encryption and dm-crypt of a real kernel, in a small virtual machine: it reads what we have re-encrypted, and cryptsetup goes on
//! there with what we left, at rest and within a step. Skipped loudly where no such machine can be started.

use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use tests::guest::{disk, guest, run, says};
use tests::luks::have;
use tests::reencrypt::{Bench, Party, Standing, part_of};
use tests::{Random, seed};

const MIB: usize = 1 << 20;

/// A re-encryption of ours that stands so, by killing it again and again until it does.
fn left(bench: &mut Bench, wanted: Standing, random: &mut Random) {
    let options = "--resilience checksum --hotzone-size 1M";
    bench.restore();
    let time = bench.finish(Party::Ours, options);
    for _ in 0..60 {
        bench.restore();
        bench.kill(Party::Ours, options, time / 4 + part_of(time, random));
        if bench.standing() == wanted {
            return;
        }
    }
    panic!("it was never found {wanted:?} after a kill");
}

#[test]
fn a_real_kernel_reads_what_we_re_encrypted_and_its_cryptsetup_goes_on_with_what_we_left() {
    let Some(guest) = guest() else { return };
    if !have(&["cryptsetup"]) {
        return;
    }
    let mut random = Random::new(seed());
    let mut bench = Bench::on_file(32 * MIB, "--sector-size 512");
    let sum = {
        bench.place.write("plaintext", &bench.plain);
        let text = bench.place.shell("sha256sum < @/plaintext").done().text();
        text.split_whitespace().next().expect("a sum").to_owned()
    };
    let mut command = Command::new(guest);
    let mut script = String::from(
        "check() {\n\
         cryptsetup open --key-file pass $1 ours || return\n\
         echo \"sha $1 $(sha256sum < /dev/mapper/ours | cut -d' ' -f1)\"\n\
         cryptsetup close ours; }\n",
    );
    for (n, standing) in [Standing::After, Standing::Clean, Standing::Crash].into_iter().enumerate() {
        let device = disk(n);
        match standing {
            Standing::After => {
                bench.finish(Party::Ours, "--hotzone-size 4M");
            }
            Standing::Clean => {
                bench.restore();
                let running = bench.start(Party::Ours, "--hotzone-size 1M --throttle 16M");
                let _ = bench.place.moving();
                std::thread::sleep(Duration::from_millis(300));
                running.signal(Signal::INT);
                let _ = running.wait();
            }
            _ => left(&mut bench, standing, &mut random),
        }
        assert_eq!(bench.standing(), standing);
        match standing {
            Standing::Clean => script.push_str(&format!(
                "cryptsetup reencrypt --batch-mode --resume-only --key-file pass {device} && echo resumed {device}\n"
            )),
            Standing::Crash => script.push_str(&format!(
                // Behind the last step there is nothing left to be resumed.
                "cryptsetup repair --batch-mode --key-file pass {device} && echo resumed {device}\n\
                 cryptsetup reencrypt --batch-mode --resume-only --key-file pass {device}\n"
            )),
            _ => {}
        }
        script.push_str(&format!("check {device}\n"));
        let file = format!("ours{n}");
        bench.place.write(&file, &bench.bytes());
        command.arg("-d").arg(bench.place.path(&file));
    }
    let Some(text) = run(&bench.place, command, &script) else { return };
    for n in 0..3 {
        let device = disk(n);
        if n > 0 {
            says(&text, &format!("resumed {device}"), "left by us");
        }
        says(&text, &format!("sha {device} {sum}"), "read by the kernel");
    }
}
