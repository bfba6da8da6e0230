//! What `cryptctl` says, word for word: `tests/cli/*.toml` hold arguments, standard output, standard error and status,
//! and where files matter the directory before (`*.in`) and after (`*.out`).
//!
//! After a wanted change: `TRYCMD=overwrite cargo test -p tests --test cli`, and read the difference.

#[test]
fn transcripts() {
    trycmd::TestCases::new()
        .register_bin("cryptctl", tests::program("cryptctl"))
        .env("COLUMNS", "100")
        .env("NO_COLOR", "1")
        .env("XDG_RUNTIME_DIR", "/nonexistent")
        .case("cli/*.toml");
}
