//! Where the per-user daemon's socket is: one rule, computed alike by `cryptd` and `cryptctl`.
//!
//! Pure: the caller reads the environment and its user id. Whether the directory may be trusted (owner, mode, no
//! symbolic link) is checked by whoever touches it, not here.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

/// The environment variable that names the user's runtime directory.
pub const RUNTIME_DIR_VARIABLE: &str = "XDG_RUNTIME_DIR";
/// The socket's file name, inside a directory of its own.
pub const FILE_NAME: &str = "cryptd.sock";

/// The socket when none is named: `$XDG_RUNTIME_DIR/cryptd/cryptd.sock`, or without a usable runtime directory (unset,
/// empty or relative) `/tmp/cryptd-UID/cryptd.sock`. The directory that holds the socket is private (0700) to `uid`.
#[must_use]
pub fn default_path(runtime_dir: Option<&OsStr>, uid: u32) -> PathBuf {
    match runtime_dir.map(Path::new) {
        Some(dir) if dir.is_absolute() => dir.join("cryptd").join(FILE_NAME),
        _ => Path::new("/tmp").join(format!("cryptd-{uid}")).join(FILE_NAME),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_runtime_directory_is_used_when_absolute() {
        let path = default_path(Some(OsStr::new("/run/user/7")), 7);
        assert_eq!(path, Path::new("/run/user/7/cryptd/cryptd.sock"));
    }

    #[test]
    fn without_a_usable_runtime_directory_the_user_id_keeps_users_apart() {
        for unusable in [None, Some(OsStr::new("")), Some(OsStr::new("run/user/7"))] {
            assert_eq!(default_path(unusable, 7), Path::new("/tmp/cryptd-7/cryptd.sock"));
        }
    }
}
