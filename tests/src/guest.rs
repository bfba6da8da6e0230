//! A small virtual machine with a kernel that has dm-crypt, where this checkout has a neighbour that can start one.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Place, skip};

/// Runs a script with disks under a kernel that has dm-crypt, if this checkout has a neighbour that can. Says so if not.
#[must_use]
pub fn guest() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests lies in the workspace");
    let named = std::env::var_os("GUEST_SH").map(PathBuf::from);
    let beside = root.join("../shared/components/guest.sh");
    let found = named.or(Some(beside)).filter(|path| path.is_file());
    if found.is_none() {
        skip("no guest.sh to run a kernel with dm-crypt (name it with GUEST_SH)");
    }
    found
}

/// The n-th disk's name in the guest.
///
/// # Panics
/// Beyond the letters.
#[must_use]
pub fn disk(n: usize) -> String {
    format!("/dev/vd{}", char::from(b'a' + u8::try_from(n).expect("a few disks")))
}

/// Runs the script with the place's `pass`; what it printed, unless the guest did not start.
///
/// # Panics
/// If there is no such program.
pub fn run(place: &Place, mut command: Command, script: &str) -> Option<String> {
    place.write("script", script.as_bytes());
    command.arg("-f").arg(format!("{}:pass", place.path("pass").display()));
    let output = command.arg(place.path("script")).output().expect("guest.sh runs");
    if output.status.code() == Some(125) {
        skip(&format!("the guest did not start: {}", String::from_utf8_lossy(&output.stderr)));
        return None;
    }
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A line has to be there.
///
/// # Panics
/// If it is not.
pub fn says(text: &str, line: &str, about: &str) {
    assert!(text.lines().any(|said| said == line), "{about}: no {line:?} in:\n{text}");
}
