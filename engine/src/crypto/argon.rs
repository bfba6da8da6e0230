//! Argon2's memory and lanes, around the `argon2` crate.
//!
//! The memory is a mapping of its own, for as long as one derivation runs. What is promised of it: it is overwritten with zeros
//! before it is given back; it is left out of core dumps, and a forked child does not have it; it is locked against swapping where
//! `RLIMIT_MEMLOCK` allows (a gigabyte is more than most users may lock, so it is an attempt, not a condition). Wiping costs a
//! twentieth of a derivation with four passes; whoever gets the pages next gets zeros from the kernel in any case, but a process
//! that is killed between two derivations should not have the first one's memory lying about.
//!
//! Why not huge pages: on memory that is in use already they save a quarter of the time (fewer faults and TLB misses), but in a
//! guest whose free pages go back to the host every huge page is a fresh one, which the host has to find and clear. Measured
//! there, in turns with small pages: 4.7 s of CPU time instead of 3.3 for a gigabyte.
//!
//! The lanes run on threads made for the derivation and gone with it, so that no stack with intermediate values outlives it. There
//! are as many threads as lanes, even where there are fewer CPUs: three lanes on two CPUs then take one and a half times as long
//! as two, and not twice.
//!
//! One derivation at a time: two of a gigabyte each would not be twice as fast, but might well be killed. Who waits for a turn can
//! give up waiting; who has it goes on to the end, which the cost bounds ([`super::kdf::DERIVATION_MAX`]).
#![allow(unsafe_code)] // one anonymous mapping

use std::ffi::c_void;
use std::ptr::{self, NonNull};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use argon2::{Algorithm, Argon2, Block, Params, Version};
use proto::ErrorKind;
use rayon::ThreadPool;
use rayon::prelude::*;
use rustix::mm::{Advice, MapFlags, MlockFlags, ProtFlags, madvise, mlock_with, mmap_anonymous, munmap};
use rustix::process::{Resource, getrlimit};
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

/// Is a turn taken?
static TAKEN: Mutex<bool> = Mutex::new(false);
/// Told when it ends.
static ENDED: Condvar = Condvar::new();
/// How often one that waits asks whether it shall go on waiting.
const ASK_EVERY: Duration = Duration::from_millis(50);

/// The right to take much memory, which one thread of the process has. Ends when dropped.
pub(super) struct Turn(());

impl Turn {
    /// Wait for it, as long as `give_up` does not say otherwise. Asked only while another has it.
    ///
    /// # Errors
    /// `Cancelled`.
    pub(super) fn wait(give_up: &dyn Fn() -> bool) -> Result<Self> {
        loop {
            let taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
            let (mut taken, _) = ENDED
                .wait_timeout_while(taken, ASK_EVERY, |taken| *taken)
                .unwrap_or_else(PoisonError::into_inner);
            if !*taken {
                *taken = true;
                return Ok(Self(()));
            }
            // Not asked under the lock.
            drop(taken);
            if give_up() {
                let what = "cancelled while another key derivation ran";
                return Err(Error::new(ErrorKind::Cancelled, what));
            }
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        *TAKEN.lock().unwrap_or_else(PoisonError::into_inner) = false;
        ENDED.notify_one();
    }
}

/// Fill `out`, once no other derivation runs. `give_up` is asked while one does.
///
/// # Errors
/// `Invalid`: salt or output too short; `Limit`: no memory, or no threads; `Cancelled`.
pub(super) fn derive(
    cost: Cost,
    passphrase: &[u8],
    salt: &[u8],
    out: &mut [u8],
    give_up: &dyn Fn() -> bool,
) -> Result<()> {
    let _turn = Turn::wait(give_up)?;
    run(cost, passphrase, salt, out).map(drop)
}

/// As [`derive`], for those who have the [`Turn`] or need little memory. Returns the time it took: what the CPUs worked, spread
/// over those that can work at once, so that a busy machine does not look like a slow one.
///
/// # Errors
/// As [`derive`], but for `Cancelled`.
pub(super) fn run(cost: Cost, passphrase: &[u8], salt: &[u8], out: &mut [u8]) -> Result<Duration> {
    let kind = match cost.kind {
        Argon2Kind::Argon2i => Algorithm::Argon2i,
        Argon2Kind::Argon2id => Algorithm::Argon2id,
    };
    let params = Params::new(cost.memory_kib, cost.time, cost.lanes, Some(out.len())).map_err(refused)?;
    room::admit(u64::from(cost.memory_kib))?;
    let mut memory = Memory::map(params.block_count())?;
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(cost.lanes as usize)
        .thread_name(|lane| format!("argon2-{lane}"))
        .build()
        .map_err(|error| Error::new(ErrorKind::Limit, "no threads for argon2").because(error))?;
    let argon = Argon2::new(kind, Version::V0x13, params);
    let done = pool.install(|| {
        let done = argon.hash_password_into_with_memory(passphrase, salt, out, memory.blocks());
        wipe(memory.blocks());
        done
    });
    let worked: Duration = pool.broadcast(|_| thread_time()).into_iter().sum();
    burn_stacks(&pool);
    done.map_err(refused)?;
    let at_once = u32::try_from(cpus()).unwrap_or(u32::MAX).min(cost.lanes);
    Ok(worked / at_once)
}

/// In parts, so that all threads of the pool it is called on wipe.
fn wipe(blocks: &mut [Block]) {
    blocks.par_chunks_mut(4096).for_each(|part| part.iter_mut().for_each(Zeroize::zeroize));
}

/// Of every thread: each had a lane, whose blocks passed through its frames. What is done with stacks that the kernel hands on is
/// the kernel's business, but they are mapped for a while after their threads.
fn burn_stacks(pool: &ThreadPool) {
    pool.broadcast(|_| burn_stack());
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

/// Should a lock be tried under this limit? What it allows is for keys first ([`super::Secret`]), so half of it stays theirs; what
/// it does not allow at all succeeds where the limit does not apply (`CAP_IPC_LOCK`) and takes nothing away.
fn may_lock(bytes: u64, limit: Option<u64>) -> bool {
    limit.is_none_or(|limit| bytes <= limit / 2 || bytes > limit)
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
            let _ = madvise(base, bytes, Advice::LinuxDontDump);
            let _ = madvise(base, bytes, Advice::LinuxDontFork);
            if may_lock(bytes as u64, getrlimit(Resource::Memlock).current) {
                // When touched: the threads do that side by side, mlock alone would do it before they start.
                let _ = mlock_with(base, bytes, MlockFlags::ONFAULT);
            }
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    const SMALL: Cost = Cost { kind: Argon2Kind::Argon2id, time: 1, memory_kib: 32, lanes: 4 };

    /// RFC 9106 sections 5.2 and 5.3; LUKS has neither secret nor associated data, so these go to the crate, in our memory.
    #[test]
    fn the_crate_has_the_answers_of_rfc_9106() {
        let answers: [(Algorithm, [u8; 32]); 2] = [
            (
                Algorithm::Argon2i,
                [
                    0xc8, 0x14, 0xd9, 0xd1, 0xdc, 0x7f, 0x37, 0xaa, 0x13, 0xf0, 0xd7, 0x7f, 0x24, 0x94, 0xbd,
                    0xa1, 0xc8, 0xde, 0x6b, 0x01, 0x6d, 0xd3, 0x88, 0xd2, 0x99, 0x52, 0xa4, 0xc4, 0x67, 0x2b,
                    0x6c, 0xe8,
                ],
            ),
            (
                Algorithm::Argon2id,
                [
                    0x0d, 0x64, 0x0d, 0xf5, 0x8d, 0x78, 0x76, 0x6c, 0x08, 0xc0, 0x37, 0xa3, 0x4a, 0x8b, 0x53,
                    0xc9, 0xd0, 0x1e, 0xf0, 0x45, 0x2d, 0x75, 0xb6, 0x5e, 0xb5, 0x25, 0x20, 0xe9, 0x6b, 0x01,
                    0xe6, 0x59,
                ],
            ),
        ];
        for (algorithm, answer) in answers {
            let mut params = argon2::ParamsBuilder::new();
            params.m_cost(32).t_cost(3).p_cost(4).output_len(32);
            params.data(argon2::AssociatedData::new(&[4; 12]).expect("short enough"));
            let params = params.build().expect("the RFC's parameters");
            let mut memory = Memory::map(params.block_count()).expect("memory");
            let argon =
                Argon2::new_with_secret(&[3; 8], algorithm, Version::V0x13, params).expect("short enough");
            let mut out = [0; 32];
            argon
                .hash_password_into_with_memory(&[1; 32], &[2; 16], &mut out, memory.blocks())
                .expect("derives");
            assert_eq!(out, answer, "{algorithm:?}");
        }
    }

    #[test]
    fn memory_is_zero_at_first_and_as_large_as_asked_for() {
        let mut memory = Memory::map(100).expect("memory");
        assert_eq!(memory.blocks().len(), 100);
        assert!(memory.blocks().iter().all(|block| block.as_ref().iter().all(|&word| word == 0)));
    }

    #[test]
    fn wiped_blocks_are_zero() {
        let mut memory = Memory::map(3).expect("memory");
        memory.blocks().iter_mut().for_each(|block| block.as_mut().fill(7));
        wipe(memory.blocks());
        assert!(memory.blocks().iter().all(|block| block.as_ref().iter().all(|&word| word == 0)));
    }

    /// What a lane's frames may leave behind, and where.
    #[inline(never)]
    fn leave_on_the_stack() -> u64 {
        let left = [0xA5_u8; 1024];
        std::hint::black_box(&left).as_ptr() as u64
    }

    #[test]
    fn the_stacks_of_all_lanes_are_burnt() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(4).build().expect("threads");
        // Not through references: those frames are gone, the memory is not.
        let own = std::fs::File::open("/proc/self/mem").expect("Linux");
        let traces = |places: &[u64]| {
            let is_there = |place: &u64| {
                let mut bytes = [0; 1024];
                own.read_exact_at(&mut bytes, *place).expect("a stack of a thread that waits");
                // The frames of what ran since may have taken some of it.
                bytes.windows(16).any(|part| part == [0xA5; 16])
            };
            places.iter().filter(|place| is_there(place)).count()
        };
        let places = pool.broadcast(|_| leave_on_the_stack());
        assert_eq!(traces(&places), 4, "the test looks at the right places");
        burn_stacks(&pool);
        assert_eq!(traces(&places), 0);
    }

    #[test]
    fn memory_that_cannot_be_had_is_a_limit() {
        assert_eq!(Memory::map(1 << 46).err().expect("64 PiB").kind(), ErrorKind::Limit);
    }

    #[test]
    fn half_of_what_may_be_locked_is_left_to_keys() {
        for (bytes, limit, may) in [
            (4, Some(8), true),
            (5, Some(8), false),
            (8, Some(8), false),
            (9, Some(8), true),
            (9, None, true),
        ] {
            assert_eq!(may_lock(bytes, limit), may, "{bytes} of {limit:?}");
        }
    }

    #[test]
    fn who_waits_for_a_turn_can_give_up_and_the_next_one_gets_it() {
        let turn = Turn::wait(&|| false).expect("nobody said to give up");
        let asked = std::cell::Cell::new(0);
        let begun = std::time::Instant::now();
        let given_up = derive(SMALL, b"x", &[0; 8], &mut [0; 32], &|| {
            asked.set(asked.get() + 1);
            asked.get() == 3
        });
        assert_eq!(given_up.expect_err("given up").kind(), ErrorKind::Cancelled);
        assert!(asked.get() == 3 && begun.elapsed() >= 3 * ASK_EVERY, "asked {} times", asked.get());
        std::thread::scope(|scope| {
            let next = scope.spawn(|| derive(SMALL, b"x", &[0; 8], &mut [0; 32], &|| false));
            drop(turn);
            next.join().expect("no panic").expect("has its turn");
        });
    }

    #[test]
    fn the_time_told_is_time_worked() {
        let cost = Cost { time: 50, memory_kib: 1024, ..SMALL };
        let wall = std::time::Instant::now();
        let told = run(cost, b"x", &[0; 8], &mut [0; 32]).expect("derives");
        // Four threads on at least one CPU: no more than the wall allows (clocks differ in their grain), and not nothing.
        assert!(told > Duration::ZERO && told <= wall.elapsed() * 4, "{told:?} of {:?}", wall.elapsed());
    }
}
