//! The sweep, the stage bench, the unlock bench, the one of re-encryption and the one of NBD servers in their small modes: each runs, checks what it moved, and its rows can be read. Rates are not judged.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// Run a bench in its small mode in a directory of its own; its rows, and what it said on stderr. `name` tells runs of one
/// program apart.
fn small(program: &str, name: &str, arguments: &[&str]) -> (Vec<Value>, String) {
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("small-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&scratch).expect("creates");
    let json = scratch.join("rows.json");
    let mut command = Command::new(program);
    command.arg("--small").args(arguments).arg("--dir").arg(&scratch).arg("--json").arg(&json);
    let output = command.output().expect("runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    eprint!("{said}");
    let rows = std::fs::read_to_string(&json);
    let left: Vec<_> =
        std::fs::read_dir(&scratch).expect("lists").map(|entry| entry.expect("entry").path()).collect();
    std::fs::remove_dir_all(&scratch).expect("removes");
    assert!(output.status.success(), "{name} failed: {said}");
    assert_eq!(left, [json], "{name} left files behind");
    let rows = rows.expect("rows were written");
    (rows.lines().map(|line| serde_json::from_str(line).expect("a row is JSON")).collect(), said)
}

/// The sweep with these cases.
fn sweep(cases: &str) -> (Vec<Value>, String) {
    small(env!("CARGO_BIN_EXE_sweep"), cases, &["--cases", cases])
}

/// Contenders that ran or were skipped aloud, so that none is lost in silence.
fn contenders(rows: &[Value]) -> BTreeSet<&str> {
    rows.iter().filter_map(|row| row["contender"].as_str()).collect()
}

#[test]
fn the_way_through_a_pipe_is_measured() {
    let (rows, said) = sweep("pipe");
    let names = contenders(&rows);
    assert!(names.contains("read/write loop"), "{names:?}");
    assert!(names.contains("cryptctl") || said.contains("SKIP cryptctl"), "{names:?}");
    for row in &rows {
        assert_eq!(row["bytes"], 64 << 20);
        assert!(row["wall_seconds"].as_f64().is_some_and(|seconds| seconds > 0.0), "{row}");
        assert!(row["ratio_to_limit"].as_f64().is_some_and(|ratio| ratio > 0.0), "{row}");
        assert!(row["machine"]["kernel"].as_str().is_some_and(|kernel| !kernel.is_empty()), "{row}");
    }
}

#[test]
fn both_ways_between_files_are_measured_and_checked() {
    let (rows, said) = sweep("disk,disk-decrypt");
    let names = contenders(&rows);
    for (name, tool) in [("fio copy", "fio"), ("qemu-img", "qemu-img"), ("openssl enc ctr", "openssl")] {
        assert!(
            names.contains(name) || said.contains(&format!("{tool} is not installed")),
            "{names:?}\n{said}"
        );
    }
    assert!(names.contains("cryptctl") || said.contains("SKIP cryptctl"), "{names:?}");
    // A result that was not checked has no place in the table: all of ours, and what rivals decrypted.
    for row in &rows {
        let ours = row["side"] == "ours";
        let decrypted = row["case"] == "disk-decrypt" && row["side"] == "rival";
        assert_eq!(row["sha256"].is_string(), ours || decrypted, "{row}");
    }
}

#[test]
fn every_stage_is_measured_beside_its_limit() {
    let (rows, said) = small(env!("CARGO_BIN_EXE_stage"), "stage", &[]);
    for row in &rows {
        assert!(row["rate"]["min"].as_f64().is_some_and(|rate| rate > 0.0), "{row}");
        assert!(row["machine"]["kernel"].as_str().is_some_and(|kernel| !kernel.is_empty()), "{row}");
    }
    let of = |stage: &str| -> Vec<&Value> {
        rows.iter().filter(|row| row["stage"].as_str().is_some_and(|name| name.starts_with(stage))).collect()
    };
    for (stage, contender) in [
        ("ring", "pread/pwrite"),
        ("ring", "threads"),
        ("zeros-of-zeros", "Runs::nonzero"),
        ("zeros-of-noise", "Runs::nonzero"),
        ("compare", "slice equality"),
        ("hand-off", "claim+gate+record"),
    ] {
        assert!(of(stage).iter().any(|row| row["contender"] == contender), "{stage}: {contender}");
    }
    assert!(contenders(&rows).contains("io_uring") || said.contains("SKIP io_uring"), "{said}");
    assert!(!of("crypt").is_empty());
    // What was copied was checked.
    assert!(of("ring").iter().all(|row| row["sha256"].is_string() && row["syscalls_per_mib"].is_number()));
}

#[test]
fn key_derivations_are_measured_beside_cryptsetup() {
    let (rows, _) = small(env!("CARGO_BIN_EXE_unlock"), "unlock", &[]);
    assert_eq!(rows.iter().filter(|row| row["contender"] == "ours").count(), 7);
    assert!(rows.iter().all(|row| row["seconds"]["median"].as_f64().is_some_and(|seconds| seconds > 0.0)));
    let beside = rows.iter().filter(|row| row["ratio"].is_object()).count();
    if beside == 0 {
        eprintln!("SKIP the comparison: cryptsetup is not installed");
    } else {
        assert_eq!(beside, 7, "ours has a ratio in every case");
    }
}

#[test]
fn re_encryption_is_measured_beside_its_limit_and_cryptsetup_and_keeps_the_plaintext() {
    let (rows, said) = small(env!("CARGO_BIN_EXE_reencrypt"), "reencrypt", &[]);
    let names = contenders(&rows);
    for (name, tool) in [("fio rw=rw", "fio"), ("cryptsetup", "cryptsetup")] {
        assert!(
            names.contains(name) || said.contains(&format!("{tool} is not installed")),
            "{names:?}\n{said}"
        );
    }
    for case in ["checksum", "journal", "none"] {
        let ours = rows.iter().filter(|row| row["contender"] == "cryptctl" && row["case"] == case);
        assert_eq!(ours.filter(|row| row["sha256"].is_string()).count(), 1, "{case}");
    }
    assert!(rows.iter().all(|row| row["rss_peak_bytes"].as_u64().is_some_and(|bytes| bytes > 0)));
}

#[test]
fn nbd_servers_are_measured_beside_each_other_and_serve_the_plaintext() {
    let cases = "rand-read,lat-write,stream-write,copy-read,copy-write,conns-read";
    let all = format!("{cases},rotate");
    let arguments = ["--cases", &all, "--media", "disk,cache"];
    let (mut rows, said) = small(env!("CARGO_BIN_EXE_nbd"), "nbd", &arguments);
    let rotations = rows.iter().filter(|row| row["case"] == "rotate").count();
    assert!(rotations >= 2 || said.contains("SKIP"), "{rotations} rows of a rotation\n{said}");
    rows.retain(|row| row["case"] != "rotate");
    let servers: BTreeSet<&str> = rows.iter().filter_map(|row| row["server"].as_str()).collect();
    assert!(servers.contains("cryptctl LUKS2") || said.contains("SKIP cryptctl"), "{servers:?}\n{said}");
    for (server, tool) in [("qemu-nbd raw", "qemu-nbd"), ("qemu-nbd LUKS1", "qemu-nbd")] {
        let skipped = said.contains(&format!("SKIP {server}: {tool}"));
        assert!(servers.contains(server) || skipped, "{servers:?}\n{said}");
    }
    for medium in ["disk", "cache"] {
        for case in cases.split(',') {
            let of = rows.iter().filter(|row| row["medium"] == medium && row["case"] == case).count();
            assert!(of == servers.len() || said.contains(&format!("SKIP {case}:")), "{medium} {case}: {of}");
        }
    }
    for row in &rows {
        assert!(row["rate"].as_f64().is_some_and(|rate| rate > 0.0), "{row}");
        assert!(
            row["server_cpu_seconds_per_gib"].is_number() && row["rss_peak_bytes"].as_u64() > Some(0),
            "{row}"
        );
        let counted = row["percentiles_us"][1].as_f64().is_some_and(|micros| micros > 0.0);
        let copied = row["case"].as_str().is_some_and(|case| case.starts_with("copy"));
        assert_eq!(
            (counted, row["server_cpu_seconds_per_1000_ios"].is_number()),
            (!copied, !copied),
            "{row}"
        );
    }
}
