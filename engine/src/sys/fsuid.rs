//! Doing one thing on the filesystem with another user's rights.
//!
//! A system-wide daemon renames and removes a user's files only as that user could. The rights change on a thread made for
//! it and gone afterwards, so no failure can leave a worker or the control thread with the wrong ones. The raw system calls
//! change this thread alone (the C library would change all). Only the effective ids change: the real ids stay ours, so the
//! user gains no right to signal or trace the daemon. Leaving effective user 0 drops the effective capabilities too.

use rustix::process::{Gid, Uid, getegid, geteuid};

use crate::error::{Error, ErrorKind, Result};

/// Run `act` with the filesystem rights of a user: directly if that is who we are, on a thread of its own if we are root.
///
/// # Errors
/// `Denied` if we are neither; `Limit` if no thread can be made. What `act` returns is inside.
///
/// # Panics
/// If `act` does.
pub fn as_user<R: Send>(uid: u32, gid: u32, groups: &[u32], act: impl FnOnce() -> R + Send) -> Result<R> {
    let ours = geteuid();
    if ours.as_raw() == uid {
        return Ok(act());
    }
    let denied = || Error::new(ErrorKind::Denied, format!("cannot act for user {uid} as user {ours}"));
    // The kernel takes these values for "leave it as it is".
    if !ours.is_root() || uid == u32::MAX || gid == u32::MAX {
        return Err(denied());
    }
    let groups: Vec<Gid> = groups.iter().map(|&group| Gid::from_raw(group)).collect();
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("as-user".to_owned())
            .spawn_scoped(scope, || {
                // 1. groups and 2. group while still root, 3. the user last: it takes away the right to change the others.
                rustix::thread::set_thread_groups(&groups)?;
                rustix::thread::set_thread_res_gid(None, Gid::from_raw(gid), None)?;
                rustix::thread::set_thread_res_uid(None, Uid::from_raw(uid), None)?;
                assert_eq!((geteuid().as_raw(), getegid().as_raw()), (uid, gid), "the rights changed");
                Ok(act())
            })
            .map_err(|error| Error::new(ErrorKind::Limit, "cannot start a thread").because(error))?;
        let result: Result<R, rustix::io::Errno> =
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        result.map_err(|errno| denied().because(errno))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{DirBuilderExt, MetadataExt};

    const NOBODY: u32 = 65534;

    #[test]
    fn acts_directly_for_ourselves() {
        let thread = std::thread::current().id();
        let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
        assert!(as_user(uid, gid, &[], || std::thread::current().id() == thread).expect("ourselves"));
    }

    #[test]
    fn root_has_only_the_users_rights_meanwhile() {
        if !geteuid().is_root() {
            let error = as_user(0, 0, &[], || ()).expect_err("not root");
            assert_eq!(error.kind(), ErrorKind::Denied);
            eprintln!("SKIPPED: the rest needs root");
            return;
        }
        let dir = std::env::temp_dir().join(format!("as-user-{}", std::process::id()));
        std::fs::DirBuilder::new().mode(0o700).create(&dir).expect("mkdir");
        let path = dir.join("x");
        let made = as_user(NOBODY, NOBODY, &[], || std::fs::File::create(&path)).expect("as nobody");
        assert_eq!(made.expect_err("root's directory").kind(), std::io::ErrorKind::PermissionDenied);
        std::os::unix::fs::chown(&dir, Some(NOBODY), Some(NOBODY)).expect("chown");
        as_user(NOBODY, NOBODY, &[7], || std::fs::File::create(&path))
            .expect("as nobody")
            .expect("own directory");
        assert_eq!(std::fs::metadata(&path).expect("made").uid(), NOBODY);
        assert!(geteuid().is_root(), "this thread keeps its rights");
        std::fs::remove_dir_all(&dir).expect("clean up");
    }

    #[test]
    fn the_values_that_mean_no_change_are_refused() {
        assert_eq!(as_user(u32::MAX, 0, &[], || ()).expect_err("-1").kind(), ErrorKind::Denied);
        if geteuid().is_root() {
            assert_eq!(as_user(NOBODY, u32::MAX, &[], || ()).expect_err("-1").kind(), ErrorKind::Denied);
        }
    }
}
