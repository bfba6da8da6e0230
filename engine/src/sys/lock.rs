//! Locks of byte ranges that belong to an open file description (fcntl(2), `F_OFD_SETLK`).
//!
//! Unlike the record locks of POSIX they are not lost when another descriptor of the file is closed in this process, and they keep
//! out another description of the same process. Unlike `flock`, which cryptsetup takes around each change of a header, they can
//! be held for hours without being in anybody's way but those who ask for them: QEMU locks images in the same manner.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;

/// Lock all of a file for writing; `false`: somebody else has locked some of it. Filesystems without locks keep nobody out: there it is as
/// if the lock were had.
///
/// # Errors
/// It cannot be locked: not opened for writing, no memory.
pub fn try_lock(file: impl AsFd) -> Result<bool, Errno> {
    tried(set(file, libc::F_WRLCK, 0, 0))
}

/// As [`try_lock`], of all but the first byte: keeps out the same, but whoever only changes the header, and asks [`is_taken`], is not
/// kept from it.
///
/// # Errors
/// As [`try_lock`].
pub fn try_lock_data(file: impl AsFd) -> Result<bool, Errno> {
    tried(set(file, libc::F_WRLCK, 1, 0))
}

/// As [`try_lock`], of the first byte only: what [`try_lock_data`] leaves, for another open file description.
///
/// # Errors
/// As [`try_lock`].
pub fn try_lock_first(file: impl AsFd) -> Result<bool, Errno> {
    tried(set(file, libc::F_WRLCK, 0, 1))
}

/// Share a lock with others who read: keeps out who asks for [`try_lock`] or [`try_lock_data`], and nobody else.
///
/// # Errors
/// As [`try_lock`]: not opened for reading.
pub fn try_lock_reading(file: impl AsFd) -> Result<bool, Errno> {
    tried(set(file, libc::F_RDLCK, 1, 1))
}

fn tried(result: Result<(), Errno>) -> Result<bool, Errno> {
    match result {
        // One or the other, says the manual of this errno.
        Err(Errno::AGAIN | Errno::ACCESS) => Ok(false),
        Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NOLCK | Errno::INVAL) => Ok(true),
        Err(errno) => Err(errno),
    }
}

/// Give back what [`try_lock`] took; for all who share the description.
pub fn unlock(file: impl AsFd) {
    // It can fail only for a descriptor that is none, and then there is no lock either.
    let _ = set(file, libc::F_UNLCK, 0, 0);
}

/// Has somebody else, through another open file description, locked the file's first byte for writing, as [`try_lock`] does? Locks
/// for reading, and those of virtual machines, which begin behind it, do not count. Where it cannot be told: no.
#[must_use]
pub fn is_taken(file: impl AsFd) -> bool {
    get(file, libc::F_RDLCK, 0, 1) == Some(libc::F_WRLCK)
}

/// Of a file of which all but the first byte is locked, as by [`try_lock_data`]: is it this very open file description that has the
/// lock? Where it cannot be told: no.
#[must_use]
pub fn is_own_data(file: impl AsFd) -> bool {
    get(file, libc::F_WRLCK, 1, 0).is_some_and(|found| found == libc::F_UNLCK)
}

/// What keeps a lock of this kind from being had, of other open file descriptions; `F_UNLCK`: nothing.
fn get(file: impl AsFd, kind: libc::c_int, start: libc::off_t, len: libc::off_t) -> Option<libc::c_int> {
    let mut lock = libc::flock {
        l_type: libc::c_short::try_from(kind).expect("a lock's kind is small"),
        l_whence: libc::c_short::try_from(libc::SEEK_SET).expect("small"),
        l_start: start,
        l_len: len,
        // Must be 0 for locks of this kind.
        l_pid: 0,
    };
    // SAFETY: the descriptor is open as long as it is borrowed, and the kernel reads and writes one `struct flock` that outlives
    // the call.
    let result = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    (result == 0).then(|| lock.l_type.into())
}

/// `len` 0: to the end, wherever that will be.
fn set(file: impl AsFd, kind: libc::c_int, start: libc::off_t, len: libc::off_t) -> Result<(), Errno> {
    let lock = libc::flock {
        l_type: libc::c_short::try_from(kind).expect("a lock's kind is small"),
        l_whence: libc::c_short::try_from(libc::SEEK_SET).expect("small"),
        l_start: start,
        l_len: len,
        // Must be 0 for locks of this kind.
        l_pid: 0,
    };
    // SAFETY: the descriptor is open as long as it is borrowed, and the kernel reads one `struct flock` that outlives the call.
    let result = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if result == -1 {
        let error = std::io::Error::last_os_error();
        return Err(Errno::from_io_error(&error).unwrap_or(Errno::INVAL));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn one_description_has_it_and_gives_it_back() {
        let path = std::env::temp_dir().join(format!("ofd-lock-{}", std::process::id()));
        let open = || File::options().read(true).write(true).create(true).truncate(false).open(&path);
        let (one, other) = (open().expect("open"), open().expect("open"));
        assert_eq!(try_lock(&one), Ok(true));
        assert_eq!(try_lock(&one), Ok(true), "its own lock is in nobody's way");
        assert_eq!(try_lock(&other), Ok(false));
        assert_eq!((is_taken(&one), is_taken(&other)), (false, true));
        // Closing another descriptor of the file gives nothing away.
        drop(open().expect("open"));
        assert_eq!(try_lock(&other), Ok(false));
        unlock(&one);
        assert!(!is_taken(&other));
        assert_eq!(try_lock(&other), Ok(true));
        drop(other);
        assert_eq!(try_lock(&one), Ok(true), "gone with the description");
        let reader = File::open(&path).expect("open");
        assert_eq!(try_lock(&reader), Err(Errno::BADF), "not opened for writing");
        std::fs::remove_file(&path).expect("clean up");
    }

    #[test]
    fn data_is_locked_beside_a_header_that_is_not() {
        let path = std::env::temp_dir().join(format!("ofd-data-{}", std::process::id()));
        let open = || File::options().read(true).write(true).create(true).truncate(false).open(&path);
        let (one, other, reader) =
            (open().expect("open"), open().expect("open"), File::open(&path).expect("open"));
        assert_eq!((try_lock_data(&one), is_taken(&other)), (Ok(true), false));
        let same = one.try_clone().expect("dup");
        assert_eq!((is_own_data(&one), is_own_data(&same), is_own_data(&other)), (true, true, false));
        drop(same);
        assert_eq!(
            (try_lock(&other), try_lock_data(&other), try_lock_reading(&reader)),
            (Ok(false), Ok(false), Ok(false))
        );
        assert_eq!((try_lock_first(&other), is_taken(&one)), (Ok(true), true), "the header, beside it");
        unlock(&other);
        assert_eq!((is_taken(&one), try_lock_data(&other)), (false, Ok(false)));
        unlock(&one);
        assert_eq!(
            (try_lock_reading(&reader), try_lock_reading(&other)),
            (Ok(true), Ok(true)),
            "readers share"
        );
        assert_eq!((try_lock(&one), try_lock_data(&one)), (Ok(false), Ok(false)));
        drop((reader, other));
        assert_eq!(try_lock(&one), Ok(true));
        std::fs::remove_file(&path).expect("clean up");
    }
}
