//! What `cryptctl` says, word for word: `tests/cli/*.toml` hold arguments, standard output, standard error and status,
//! and where files matter the directory before (`*.in`) and after (`*.out`).
//!
//! After a wanted change: `TRYCMD=overwrite cargo test -p tests --test cli`, and read the difference.

use std::path::PathBuf;
use std::process::Command;

/// `cryptctl` as it stands in this tree, built if need be.
fn cryptctl() -> PathBuf {
    // target/PROFILE/deps/cli-HASH: the programs are one directory above.
    let own = std::env::current_exe().expect("a test has a path");
    let dir = own.ancestors().nth(2).expect("target/PROFILE/deps").to_owned();
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--quiet", "--package", "ctl"]).current_dir(env!("CARGO_MANIFEST_DIR"));
    if dir.ends_with("release") {
        cargo.arg("--release");
    }
    assert!(cargo.status().expect("cargo runs").success(), "cryptctl does not build");
    dir.join("cryptctl")
}

#[test]
fn transcripts() {
    trycmd::TestCases::new()
        .register_bin("cryptctl", cryptctl())
        .env("COLUMNS", "100")
        .env("NO_COLOR", "1")
        .env("XDG_RUNTIME_DIR", "/nonexistent")
        .case("cli/*.toml");
}
