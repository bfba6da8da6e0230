//! Re-encryption that cannot go on: a full filesystem, a header without room, forged metadata, somebody else at the same volume. Each
//! is told clearly, writes nothing it should not, and leaves what can be gone on with.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};
use tests::luks::{CHEAP_PBKDF2, have, secret};
use tests::luks2::replace_text;
use tests::reencrypt::{Bench, Party, Standing};
use tests::{Place, Start, User, eventually, is_root, skip};

const MIB: usize = 1 << 20;
/// Bytes of one copy of the header of these volumes.
const COPY: usize = 16 << 10;

/// A volume on which a re-encryption was stopped between two steps.
fn under_way() -> Bench {
    let bench = Bench::on_file(16 * MIB, "--sector-size 4096");
    let running = bench.start(Party::Ours, "--hotzone-size 1M --throttle 8M");
    let _ = bench.place.moving();
    running.signal(Signal::INT);
    let _ = running.wait().exit(1, &["safe point"]);
    assert_eq!(bench.standing(), Standing::Clean);
    bench
}

/// Change the metadata in both copies, and their checksums with it, as somebody who has the disk but no key can.
fn forged(volume: &[u8], forge: impl Fn(&mut Value)) -> Vec<u8> {
    let mut bytes = volume.to_vec();
    for copy in bytes[..2 * COPY].chunks_exact_mut(COPY) {
        let text = &copy[4096..];
        let end = text.iter().position(|&byte| byte == 0).expect("an end of the text");
        let mut json: Value = serde_json::from_slice(&text[..end]).expect("JSON");
        forge(&mut json);
        replace_text(copy, json.to_string().as_bytes());
    }
    bytes
}

/// Apply to every segment.
fn each_segment(json: &mut Value, change: impl Fn(&mut Value)) {
    json["segments"].as_object_mut().expect("segments").values_mut().for_each(change);
}

/// What is forged, what of that is said, and how.
type Forgery = (&'static str, &'static str, fn(&mut Value));

const FORGERIES: [Forgery; 9] = [
    ("the data begins elsewhere, consistently", "", |json| {
        each_segment(json, |segment| {
            let offset: u64 = segment["offset"].as_str().expect("text").parse().expect("a number");
            segment["offset"] = json!((offset - 4096).to_string());
        });
    }),
    ("the counters begin elsewhere, consistently", "", |json| {
        each_segment(json, |segment| {
            let tweak: u64 = segment["iv_tweak"].as_str().expect("text").parse().expect("a number");
            segment["iv_tweak"] = json!((tweak + 8).to_string());
        });
    }),
    ("old and new segments are swapped", "", |json| {
        let (old, new) = (json["segments"]["0"].clone(), json["segments"]["1"].clone());
        json["segments"]["0"] = new;
        json["segments"]["1"] = old;
    }),
    ("one segment lies elsewhere", "offset", |json| json["segments"]["1"]["offset"] = json!("33558528")),
    ("the digest that proves it is gone", "digest", |json| {
        let digests = json["digests"].as_object_mut().expect("digests");
        digests.retain(|_, digest| digest["segments"].as_array().is_some_and(|list| !list.is_empty()));
    }),
    ("the requirement is the old one", "cve-2021-4122", |json| {
        json["config"]["requirements"]["mandatory"] = json!(["online-reencrypt"]);
    }),
    ("the old requirement, and no digest", "", |json| {
        json["config"]["requirements"]["mandatory"] = json!(["online-reencrypt"]);
        let digests = json["digests"].as_object_mut().expect("digests");
        digests.retain(|_, digest| digest["segments"].as_array().is_some_and(|list| !list.is_empty()));
    }),
    ("the requirement is gone", "", |json| {
        json["config"].as_object_mut().expect("config").remove("requirements");
    }),
    ("blocks of another size are hashed", "", |json| {
        let keyslots = json["keyslots"].as_object_mut().expect("keyslots");
        let one = keyslots.values_mut().find(|keyslot| keyslot["type"] == "reencrypt").expect("its keyslot");
        one["area"]["sector_size"] = json!(8192);
    }),
];

#[test]
fn forged_metadata_is_refused_and_nothing_is_written() {
    if !have(&["cryptsetup"]) {
        return;
    }
    let bench = under_way();
    let good = bench.bytes();
    for (what, says, forge) in FORGERIES {
        let bad = forged(&good, forge);
        assert!(bad != good, "{what}: nothing was forged");
        bench.put(&bad);
        for resume in ["--resume-only", ""] {
            let ran = bench.place.run(&bench.ours(resume));
            assert!(matches!(ran.code, Some(1 | 2)), "{what}: {:?}: {}", ran.code, ran.stderr);
            assert!(ran.stderr.to_lowercase().contains(says), "{what}: {}", ran.stderr);
            assert!(bench.bytes() == bad, "{what}: something was written");
        }
    }
    // And what was not forged goes on.
    bench.put(&good);
    bench.finish(Party::Ours, "--resume-only");
    bench.check("after the forgeries");
}

#[test]
fn a_header_without_room_is_refused_and_nothing_is_written() {
    if !have(&["cryptsetup"]) {
        return;
    }
    let place = Place::new(User::Me);
    secret(&place, "pass", b"correct horse battery staple");
    // Room for one keyslot only; then for two, and nothing left that could protect a step.
    for keyslots in ["256k", "504k"] {
        let format = format!(
            "rm -f @/volume; truncate -s 8M @/volume && cryptsetup luksFormat --batch-mode --type luks2 {CHEAP_PBKDF2} \
             --luks2-metadata-size 16k --luks2-keyslots-size {keyslots} --key-size 512 --key-file @/pass @/volume"
        );
        let _ = place.shell(&format).done();
        let before = place.read("volume");
        let ran = place.run(&format!("reencrypt @/volume --yes {CHEAP_PBKDF2} --key file:@/pass"));
        assert_eq!(ran.code, Some(1), "{keyslots}: {}", ran.stderr);
        let says = ran.stderr.contains("keyslots area") && ran.stderr.contains("hint:");
        assert!(says, "{keyslots}: {}", ran.stderr);
        assert!(place.read("volume") == before, "{keyslots}: something was written");
    }
}

/// A small filesystem; unmounted when dropped.
struct Mounted {
    at: PathBuf,
}

impl Mounted {
    /// `None`, said loudly, where none can be mounted.
    fn new(place: &Place, bytes: usize) -> Option<Self> {
        if !is_root() || !have(&["mke2fs", "mount"]) {
            skip("a full filesystem: only root can mount one");
            return None;
        }
        let (image, at) = (place.path("image"), place.path("mounted"));
        tests::luks::empty(place, "image", bytes);
        std::fs::create_dir(&at).expect("a directory");
        let _ = place.shell("mke2fs -q -F -t ext4 -b 4096 -O ^has_journal -m 0 @/image").done();
        let mounted =
            Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&at).output().expect("mount runs");
        if !mounted.status.success() {
            skip(&format!("a full filesystem: {}", String::from_utf8_lossy(&mounted.stderr)));
            return None;
        }
        Some(Self { at })
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.at).status();
    }
}

#[test]
fn a_full_filesystem_stops_it_where_it_can_be_gone_on_from() {
    if !have(&["cryptsetup"]) {
        return;
    }
    let place = Place::new(User::Me);
    let Some(mounted) = Mounted::new(&place, 64 * MIB) else { return };
    secret(&place, "pass", b"correct horse battery staple");
    // A file with holes: what is in them is read as some plaintext or other, and has to be written.
    let format = format!(
        "truncate -s 48M @/mounted/volume && cryptsetup luksFormat --batch-mode --type luks2 {CHEAP_PBKDF2} \
         --sector-size 4096 --key-file @/pass @/mounted/volume && head -c 38M /dev/zero > @/mounted/filler"
    );
    let _ = place.shell(&format).done();
    let decrypt = "decrypt @/mounted/volume @/back --force --key file:@/pass";
    let _ = place.run(decrypt).done();
    let mut plain = place.read("back");
    for resilience in ["checksum", "journal"] {
        let begin = format!(
            "reencrypt @/mounted/volume --yes {CHEAP_PBKDF2} --resilience {resilience} --hotzone-size 1M --key file:@/pass"
        );
        let resume = "reencrypt @/mounted/volume --resume-only --key file:@/pass";
        let _ = place.run(&begin).exit(1, &["no space left", "hint:"]);
        // Still no room: it says so again, and nothing is lost.
        let _ = place.run(resume).exit(1, &["no space left"]);
        std::fs::remove_file(mounted.at.join("filler")).expect("removed");
        let _ = place.run(resume).done();
        let _ = place.run(decrypt).done();
        assert!(place.read("back") == plain, "{resilience}: the plaintext has changed");
        // Holes again, and other plaintext in them, for the next one.
        let _ = place
            .shell(
                "fallocate --punch-hole --offset 20M --length 28M @/mounted/volume && head -c 38M /dev/zero > @/mounted/filler",
            )
            .done();
        let _ = place.run(decrypt).done();
        plain = place.read("back");
    }
}

#[test]
fn two_programs_at_once_do_not_harm_each_other() {
    if !have(&["cryptsetup"]) {
        return;
    }
    let bench = Bench::on_file(24 * MIB, "--sector-size 4096");
    let running = bench.start(Party::Ours, "--hotzone-size 1M --throttle 8M");
    let _ = bench.place.moving();
    // The same daemon, and one that knows nothing of the first.
    let _ = bench.place.run(&bench.ours("")).exit(1, &[]);
    let other = Start::new().daemon();
    let mut command = bench.place.program(&bench.place.bin().join("cryptctl"));
    command.arg("--socket").arg(other.socket());
    command.args(bench.place.expand(&bench.ours("--resume-only")).split_whitespace());
    let _ = bench.place.finish(command).exit(1, &["hint:"]);
    // It is root's lock directory that both know; without it there is no lock that cryptsetup would heed.
    if is_root() {
        let theirs =
            "cryptsetup reencrypt --resume-only --force-offline-reencrypt --batch-mode --key-file @/pass";
        let ran = bench.place.shell(&format!("{theirs} {}", bench.name));
        assert_ne!(ran.code, Some(0), "cryptsetup went on with what we have under way");
        let repair = format!("cryptsetup repair --batch-mode --key-file @/pass {}", bench.name);
        // Whether there is something to recover depends on the moment, and so does what it says.
        let _ = bench.place.shell(&repair);
    }
    let _ = running.wait().done();
    bench.check("two at once");
}

/// The device under a loop device has an end: nothing is written beyond it, and what was begun goes on when it is back.
#[test]
fn a_loop_device_that_shrank_is_refused_and_goes_on_when_it_is_back() {
    if !have(&["cryptsetup", "losetup"]) {
        return;
    }
    let Some(bench) = Bench::on_loop_device(32 * MIB, "--sector-size 512") else { return };
    let running = bench.start(Party::Ours, "--hotzone-size 1M --throttle 16M");
    let _ = bench.place.moving();
    eventually("more than half of it is done", || {
        bench.place.jobs().last().is_some_and(|job| job.progress.done_bytes > 20 << 20)
    });
    running.signal(Signal::INT);
    let _ = running.wait().exit(1, &["safe point"]);
    let whole = bench.bytes();
    let resize = |bytes: usize| {
        let backing = bench.backing().expect("a loop device");
        let file = std::fs::OpenOptions::new().write(true).open(backing).expect("opens");
        file.set_len(bytes as u64).expect("another size");
        let set = Command::new("losetup").arg("--set-capacity").arg(&bench.volume).status();
        assert!(set.is_ok_and(|status| status.success()), "losetup --set-capacity");
    };
    resize(whole.len() - 24 * MIB);
    let short = bench.bytes();
    let _ = bench.place.run(&bench.ours("--resume-only")).exit(1, &["hint:", "size"]);
    assert!(bench.bytes() == short, "something was written");
    resize(whole.len());
    bench.put(&whole);
    eventually("the device has its size again", || {
        std::thread::sleep(Duration::from_millis(1));
        bench.bytes().len() == whole.len()
    });
    bench.finish(Party::Ours, "--resume-only");
    bench.check("shrunk and grown");
}
