//! Argon2's memory and lanes, around the `argon2` crate.
//!
//! The memory is a mapping of its own, for as long as one derivation runs. What is promised of it: it is overwritten with zeros
//! before it is given back; it is left out of core dumps, and a forked child does not have it; it is locked against swapping where
//! `RLIMIT_MEMLOCK` allows (a gigabyte is more than most users may lock, so it is an attempt, not a condition). Huge pages are
//! asked for: Argon2 reads at random, and a gigabyte in small pages is 262144 page faults first and a TLB miss each time then.
//!
//! The lanes run on threads made for the derivation and gone with it, so that no stack with intermediate values outlives it.
//!
//! One derivation at a time: two of a gigabyte each would not be twice as fast, but might well be killed.
#![allow(unsafe_code)] // one anonymous mapping

use std::ffi::c_void;
use std::ptr::{self, NonNull};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use argon2::{Algorithm, Argon2, Block, Params, Version};
use proto::ErrorKind;
use rayon::prelude::*;
use rustix::mm::{Advice, MapFlags, MlockFlags, ProtFlags, madvise, mlock_with, mmap_anonymous, munmap};
use rustix::time::{ClockId, clock_gettime};
use zeroize::Zeroize;

use super::kdf::Argon2Kind;
use super::{burn_stack, room};
use crate::error::{Error, Result};

/// The cost of one derivation; checked by [`super::kdf::Kdf::check`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cost {
    pub(super) kind: Argon2Kind,
    pub(super) time: u32,
    pub(super) memory_kib: u32,
    pub(super) lanes: u32,
}

/// Held by the derivation that runs.
static RUNNING: Mutex<()> = Mutex::new(());

/// Fill `out`, once no other derivation runs.
///
/// # Errors
/// `Invalid`: salt or output too short; `Limit`: no memory, or no threads.
pub(super) fn derive(cost: Cost, passphrase: &[u8], salt: &[u8], out: &mut [u8]) -> Result<()> {
    measure(cost, passphrase, salt, out).map(|_| ())
}

/// As [`derive`], with the time of [`run`].
///
/// # Errors
/// As [`derive`].
pub(super) fn measure(cost: Cost, passphrase: &[u8], salt: &[u8], out: &mut [u8]) -> Result<Duration> {
    let _turn = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
    run(cost, passphrase, salt, out)
}

/// As [`derive`], without waiting for others, for what needs little memory. Returns the time it took: what the CPUs worked, spread over those that can work
/// at once, so that a busy machine does not look like a slow one.
///
/// # Errors
/// As [`derive`].
pub(super) fn run(cost: Cost, passphrase: &[u8], salt: &[u8], out: &mut [u8]) -> Result<Duration> {
    let kind = match cost.kind {
        Argon2Kind::Argon2i => Algorithm::Argon2i,
        Argon2Kind::Argon2id => Algorithm::Argon2id,
    };
    let params = Params::new(cost.memory_kib, cost.time, cost.lanes, Some(out.len())).map_err(refused)?;
    let threads = (cost.lanes as usize).min(cpus());
    room::admit(u64::from(cost.memory_kib))?;
    let mut memory = Memory::map(params.block_count())?;
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|lane| format!("argon2-{lane}"))
        .build()
        .map_err(|error| Error::new(ErrorKind::Limit, "no threads for argon2").because(error))?;
    let argon = Argon2::new(kind, Version::V0x13, params);
    let done = pool.install(|| {
        let done = argon.hash_password_into_with_memory(passphrase, salt, out, memory.blocks());
        // In parts, so that all threads wipe.
        memory.blocks().par_chunks_mut(4096).for_each(|part| part.iter_mut().for_each(Zeroize::zeroize));
        burn_stack();
        done
    });
    let worked: Duration = pool.broadcast(|_| thread_time()).into_iter().sum();
    done.map_err(refused)?;
    let rounds = cost.lanes.div_ceil(u32::try_from(threads).unwrap_or(u32::MAX));
    Ok(worked * rounds / cost.lanes)
}

/// CPUs that can work at once for this process: by affinity and by the cgroup's quota.
pub(super) fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// What the calling thread has worked so far.
pub(super) fn thread_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}

/// What the crate refuses although [`super::kdf::Kdf::check`] does not.
fn refused(error: argon2::Error) -> Error {
    let (kind, what) = match error {
        argon2::Error::SaltTooShort => (ErrorKind::Invalid, "an argon2 salt has at least 8 bytes"),
        argon2::Error::OutputTooShort => (ErrorKind::Invalid, "argon2 makes at least 4 bytes"),
        _ => (ErrorKind::Invalid, "argon2 cannot work with these parameters"),
    };
    Error::new(kind, what).because(std::io::Error::other(error.to_string()))
}

/// Zeroed blocks in a mapping of their own.
struct Memory {
    base: NonNull<Block>,
    blocks: usize,
}

// SAFETY: the mapping has one owner, and blocks are plain words.
unsafe impl Send for Memory {}

impl Memory {
    /// # Errors
    /// `Limit`.
    fn map(blocks: usize) -> Result<Self> {
        let bytes = blocks * Block::SIZE;
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice; nothing else can refer to it.
        let base = unsafe { mmap_anonymous(ptr::null_mut(), bytes, prot, flags) }.map_err(|error| {
            Error::new(ErrorKind::Limit, format!("no {} KiB of memory for argon2", bytes >> 10))
                .because(error)
        })?;
        // SAFETY: exactly the mapping just made; no advice changes the bytes this process sees. All are refinements that the
        // kernel, its configuration or a limit may deny.
        unsafe {
            let _ = madvise(base, bytes, Advice::LinuxHugepage);
            let _ = madvise(base, bytes, Advice::LinuxDontDump);
            let _ = madvise(base, bytes, Advice::LinuxDontFork);
            // When touched: the threads do that side by side, mlock alone would do it before they start.
            let _ = mlock_with(base, bytes, MlockFlags::ONFAULT);
        }
        Ok(Self { base: NonNull::new(base.cast()).expect("a successful mmap is not null"), blocks })
    }

    fn blocks(&mut self) -> &mut [Block] {
        // SAFETY: the mapping has room for so many blocks, is aligned to pages, zeros (which are blocks) at first, and borrowed
        // through `&mut self`.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.blocks) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made by `map`; nobody refers to it any more.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast::<c_void>(), self.blocks * Block::SIZE) };
        assert!(unmapped.is_ok(), "unmapping argon2's memory failed");
    }
}
