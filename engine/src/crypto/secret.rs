//! The memory keys live in: locked (never swapped), left out of core dumps, gone in a forked child, zeroed when freed.
//!
//! One arena for the process. It grows by slabs of 16 pages between two inaccessible guard pages and hands out runs of
//! 64-byte slots, so that a hundred keys and their schedules cost a few locked pages and not one each: an ordinary user
//! may lock 8 MiB, and most of that belongs to the buffers. A secret larger than a slab gets a mapping of its own.
//!
//! Invariants: a run of slots has one owner; free slots hold zeros; every slab stays mapped for the life of the process.
//! Refusing to work without `mlock` would lock out users with a small `RLIMIT_MEMLOCK`, so a failed lock is remembered
//! ([`keys_locked`]) for the daemon to report, and the memory is used all the same.
#![allow(unsafe_code)] // raw mappings and in-place destruction of what lives in them

use std::ffi::c_void;
use std::mem;
use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::mm::{
    Advice, MapFlags, MprotectFlags, ProtFlags, madvise, mlock, mmap_anonymous, mprotect, munmap,
};
use zeroize::Zeroize;

use crate::error::{Error, Result};

/// Bytes of a slot: a cache line, and the strictest alignment a locked value may ask for.
const SLOT_BYTES: usize = 64;
/// Bytes of a slab.
const SLAB_BYTES: usize = 64 * 1024;
const SLOTS: usize = SLAB_BYTES / SLOT_BYTES;

static ARENA: Mutex<Vec<Slab>> = Mutex::new(Vec::new());
static ALL_LOCKED: AtomicBool = AtomicBool::new(true);

/// Did every attempt so far to lock key memory succeed? True before the first.
#[must_use]
pub fn keys_locked() -> bool {
    ALL_LOCKED.load(Ordering::Relaxed)
}

struct Slab {
    base: NonNull<u8>,
    /// One bit per slot, set while in use.
    used: [u64; SLOTS / 64],
}

// SAFETY: a slab is a mapping owned by the arena for the life of the process; the bitmap is guarded by the arena's mutex.
unsafe impl Send for Slab {}

impl Slab {
    fn is_used(&self, slot: usize) -> bool {
        self.used[slot / 64] >> (slot % 64) & 1 == 1
    }

    /// Flip `count` slots from `first`, all of which must be in the state `used` says they are.
    fn mark(&mut self, first: usize, count: usize, used: bool) {
        for slot in first..first + count {
            assert_eq!(self.is_used(slot), !used, "slot {slot} of the key arena has two owners");
            self.used[slot / 64] ^= 1 << (slot % 64);
        }
    }

    /// First fit: allocations are few and live long.
    fn find(&self, count: usize) -> Option<usize> {
        let mut run = 0;
        for slot in 0..SLOTS {
            run = if self.is_used(slot) { 0 } else { run + 1 };
            if run == count {
                return Some(slot + 1 - count);
            }
        }
        None
    }
}

/// Map `bytes` (whole pages) between guard pages, lock them and keep them out of dumps and children.
fn map(bytes: usize) -> Result<NonNull<u8>> {
    let page = rustix::param::page_size();
    let failed = |error| Error::io("cannot map memory for keys", std::io::Error::from(error));
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a fresh anonymous mapping at an address of the kernel's choice; nothing else can refer to it.
    let outer = unsafe { mmap_anonymous(ptr::null_mut(), bytes + 2 * page, ProtFlags::empty(), flags) }
        .map_err(failed)?;
    // SAFETY: one page into a mapping of more than one page.
    let base = unsafe { outer.cast::<u8>().add(page) };
    // SAFETY: `base..base + bytes` lies inside the mapping just made, and nobody else knows it yet.
    unsafe { mprotect(base.cast::<c_void>(), bytes, MprotectFlags::READ | MprotectFlags::WRITE) }
        .map_err(failed)?;
    // SAFETY: as above; neither advice changes the bytes this process sees. Both are refinements older kernels may lack.
    unsafe {
        let _ = madvise(base.cast::<c_void>(), bytes, Advice::LinuxDontDump);
        let _ = madvise(base.cast::<c_void>(), bytes, Advice::LinuxWipeOnFork);
    }
    // SAFETY: as above.
    if unsafe { mlock(base.cast::<c_void>(), bytes) }.is_err() {
        ALL_LOCKED.store(false, Ordering::Relaxed);
    }
    Ok(NonNull::new(base).expect("a successful mmap is not null"))
}

/// A run of slots, or a mapping of its own; zeros at first, and zeroed again when dropped.
struct Block {
    base: NonNull<u8>,
    bytes: usize,
}

// SAFETY: a block is the only owner of its bytes.
unsafe impl Send for Block {}
// SAFETY: shared access only reads; `as_mut` needs `&mut`.
unsafe impl Sync for Block {}

impl Block {
    fn new(bytes: usize) -> Result<Self> {
        let bytes = bytes.max(1).next_multiple_of(SLOT_BYTES);
        if bytes > SLAB_BYTES {
            let bytes = bytes.next_multiple_of(rustix::param::page_size());
            return Ok(Self { base: map(bytes)?, bytes });
        }
        let count = bytes / SLOT_BYTES;
        let mut arena = ARENA.lock().unwrap_or_else(PoisonError::into_inner);
        let found = arena.iter().enumerate().find_map(|(at, slab)| Some((at, slab.find(count)?)));
        let (at, first) = match found {
            Some(found) => found,
            None => {
                arena.push(Slab { base: map(SLAB_BYTES)?, used: [0; SLOTS / 64] });
                (arena.len() - 1, 0)
            }
        };
        let slab = &mut arena[at];
        slab.mark(first, count, true);
        // SAFETY: `first + count <= SLOTS`, so the run lies inside the slab.
        Ok(Self { base: unsafe { slab.base.add(first * SLOT_BYTES) }, bytes })
    }

    fn as_slice(&self) -> &[u8] {
        // SAFETY: the block owns these bytes, which are mapped and initialised (zeros at first) until it is dropped.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.bytes) }
    }

    fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`, and `&mut self` excludes other references.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.bytes) }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.as_mut_slice().zeroize();
        if self.bytes > SLAB_BYTES {
            let page = rustix::param::page_size();
            // SAFETY: exactly the mapping `map` made for this block, guard pages included; nobody refers to it any more.
            let unmapped =
                unsafe { munmap(self.base.as_ptr().sub(page).cast::<c_void>(), self.bytes + 2 * page) };
            assert!(unmapped.is_ok(), "unmapping key memory failed");
            return;
        }
        let mut arena = ARENA.lock().unwrap_or_else(PoisonError::into_inner);
        let address = self.base.as_ptr().addr();
        let (slab, offset) = arena
            .iter_mut()
            .find_map(|slab| {
                let offset = address.checked_sub(slab.base.as_ptr().addr())?;
                (offset < SLAB_BYTES).then_some((slab, offset))
            })
            .expect("every small block comes from a slab, and slabs are never unmapped");
        slab.mark(offset / SLOT_BYTES, self.bytes / SLOT_BYTES, false);
    }
}

/// Secret bytes: a key, a passphrase. Prints nothing, compares in constant time, zeroed when dropped.
pub struct Secret {
    block: Block,
    len: usize,
}

impl Secret {
    /// Room for `capacity` bytes, filled by `read`, which returns how many it wrote. The bytes never exist elsewhere.
    ///
    /// # Errors
    /// No memory, or what `read` returns.
    ///
    /// # Panics
    /// If `read` claims more than the capacity.
    pub fn read_with(capacity: usize, read: impl FnOnce(&mut [u8]) -> Result<usize>) -> Result<Self> {
        let mut secret = Self { block: Block::new(capacity)?, len: capacity };
        let len = read(secret.as_mut_bytes())?;
        assert!(len <= capacity, "a reader claims more bytes than it was given room for");
        secret.truncate(len);
        Ok(secret)
    }

    /// `len` zero bytes, to be filled through [`Self::as_mut_bytes`].
    ///
    /// # Errors
    /// No memory.
    pub fn zeroed(len: usize) -> Result<Self> {
        Self::read_with(len, |room| Ok(room.len()))
    }

    /// A copy. The caller's own bytes stay the caller's to wipe.
    ///
    /// # Errors
    /// No memory.
    pub fn copy_of(bytes: &[u8]) -> Result<Self> {
        Self::read_with(bytes.len(), |room| {
            room.copy_from_slice(bytes);
            Ok(bytes.len())
        })
    }

    /// Keep the first `len` bytes; the rest is zeroed. No effect if there are fewer.
    pub fn truncate(&mut self, len: usize) {
        if len < self.len {
            self.block.as_mut_slice()[len..self.len].zeroize();
            self.len = len;
        }
    }

    /// The bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.block.as_slice()[..self.len]
    }

    /// The bytes, to be written in place.
    pub fn as_mut_bytes(&mut self) -> &mut [u8] {
        &mut self.block.as_mut_slice()[..self.len]
    }

    /// How many bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// No bytes at all?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        bytes_equal(self.as_bytes(), other.as_bytes())
    }
}

impl Eq for Secret {}

/// Equality in time that depends on the lengths only.
#[must_use]
pub fn bytes_equal(a: &[u8], b: &[u8]) -> bool {
    if a.len() != b.len() {
        return false;
    }
    // `black_box` at every step keeps the compiler from leaving the loop at the first difference.
    a.iter().zip(b).fold(0_u8, |difference, (x, y)| std::hint::black_box(difference | (x ^ y))) == 0
}

/// A value in locked memory, for key schedules. Dropped in place, then its bytes are zeroed.
pub struct Locked<T> {
    block: Block,
    value: std::marker::PhantomData<T>,
}

impl<T> Locked<T> {
    /// Move a value in. Build it empty and fill it in place where that is possible: what it was moved out of is the
    /// caller's stack.
    ///
    /// # Errors
    /// No memory.
    pub fn new(value: T) -> Result<Self> {
        const { assert!(mem::align_of::<T>() <= SLOT_BYTES, "slots are aligned to 64 bytes") };
        let block = Block::new(mem::size_of::<T>())?;
        // SAFETY: the block is large and aligned enough, and nobody else refers to it.
        unsafe { block.base.cast::<T>().write(value) };
        Ok(Self { block, value: std::marker::PhantomData })
    }
}

impl<T> Deref for Locked<T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: `new` wrote a `T` here, which lives until `drop`.
        unsafe { self.block.base.cast::<T>().as_ref() }
    }
}

impl<T> DerefMut for Locked<T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in `deref`, and `&mut self` excludes other references.
        unsafe { self.block.base.cast::<T>().as_mut() }
    }
}

impl<T> Drop for Locked<T> {
    fn drop(&mut self) {
        // SAFETY: the value was written by `new` and is not used after this; the block is zeroed right after.
        unsafe { ptr::drop_in_place(self.block.base.cast::<T>().as_ptr()) };
    }
}

// SAFETY: the block is the only owner of the value, so `Locked<T>` moves between threads as `T` does.
unsafe impl<T: Send> Send for Locked<T> {}
// SAFETY: shared access gives `&T` only.
unsafe impl<T: Sync> Sync for Locked<T> {}

impl<T> std::fmt::Debug for Locked<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Locked(..)")
    }
}

/// A volume key: two AES keys of 128 or 256 bits, the second one for tweaks.
#[derive(Debug)]
pub struct VolumeKey(Secret);

impl VolumeKey {
    /// From 32 bytes (AES-128-XTS) or 64 bytes (AES-256-XTS).
    ///
    /// # Errors
    /// `Invalid` for any other length, and for two equal halves (IEEE 1619 as amended by FIPS 140: with K1 = K2 the mode
    /// loses its proof of security). No memory.
    pub fn new(bytes: &[u8]) -> Result<Self> {
        Self::from_secret(Secret::copy_of(bytes)?)
    }

    /// As [`Self::new`], from bytes already in locked memory.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn from_secret(secret: Secret) -> Result<Self> {
        let bytes = secret.as_bytes();
        if !matches!(bytes.len(), 32 | 64) {
            return Err(Error::new(proto::ErrorKind::Invalid, "a volume key has 32 or 64 bytes"));
        }
        let (data, tweak) = bytes.split_at(bytes.len() / 2);
        if bytes_equal(data, tweak) {
            return Err(Error::new(proto::ErrorKind::Invalid, "the two halves of the volume key are equal"));
        }
        Ok(Self(secret))
    }

    /// Bits of the AES keys: 128 or 256.
    #[must_use]
    pub fn bits(&self) -> u32 {
        if self.0.len() == 32 { 128 } else { 256 }
    }

    /// The AES key for data.
    pub(super) fn data_half(&self) -> &[u8] {
        &self.0.as_bytes()[..self.0.len() / 2]
    }

    /// The AES key for tweaks.
    pub(super) fn tweak_half(&self) -> &[u8] {
        &self.0.as_bytes()[self.0.len() / 2..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_never_overlap_and_come_back_as_zeros() {
        let mut held: Vec<Secret> = Vec::new();
        for round in 0..200_usize {
            let mut secret = Secret::zeroed(1 + round * 37 % 3000).expect("memory");
            assert!(secret.as_bytes().iter().all(|&byte| byte == 0), "recycled slots are zeroed");
            let mark = u8::try_from(round % 251).expect("below 251") + 1;
            secret.as_mut_bytes().fill(mark);
            held.push(secret);
            if round % 3 == 0 {
                held.swap_remove(round / 2 % held.len());
            }
        }
        for secret in &held {
            let first = secret.as_bytes()[0];
            assert!(
                first != 0 && secret.as_bytes().iter().all(|&byte| byte == first),
                "a neighbour wrote here"
            );
        }
    }

    #[test]
    fn a_secret_larger_than_a_slab_has_its_own_mapping() {
        let secret = Secret::copy_of(&vec![7; 3 * SLAB_BYTES + 5]).expect("memory");
        assert_eq!(secret.len(), 3 * SLAB_BYTES + 5);
        assert!(secret.as_bytes().iter().all(|&byte| byte == 7));
    }

    #[test]
    fn truncation_wipes_the_tail() {
        let mut secret = Secret::copy_of(&[9; 40]).expect("memory");
        secret.truncate(8);
        assert_eq!(secret.as_bytes(), [9; 8]);
        assert_eq!(secret.block.as_slice()[8..40], [0; 32]);
    }

    #[test]
    fn debug_shows_neither_bytes_nor_length() {
        let key = VolumeKey::new(&std::array::from_fn::<u8, 32, _>(|at| u8::try_from(at).expect("small")));
        assert_eq!(format!("{:?}", key.expect("unequal halves")), "VolumeKey(Secret(..))");
    }

    #[test]
    fn volume_keys_have_one_of_two_lengths_and_unequal_halves() {
        for len in [0, 16, 31, 33, 48, 63, 65, 128] {
            assert!(VolumeKey::new(&vec![1; len]).is_err(), "{len} bytes");
        }
        for len in [32, 64] {
            let mut bytes = vec![1; len];
            assert!(VolumeKey::new(&bytes).is_err(), "equal halves of {len} bytes");
            bytes[len - 1] = 2;
            assert_eq!(VolumeKey::new(&bytes).expect("unequal halves").bits() as usize, len * 4);
        }
    }

    #[test]
    fn a_locked_value_is_dropped_once_and_wiped() {
        let shared = std::sync::Arc::new(());
        let locked = Locked::new((std::sync::Arc::clone(&shared), [3_u8; 100])).expect("memory");
        assert_eq!(std::sync::Arc::strong_count(&shared), 2);
        assert_eq!(locked.1, [3; 100]);
        drop(locked);
        assert_eq!(std::sync::Arc::strong_count(&shared), 1);
    }

    #[test]
    fn bytes_are_equal_only_when_all_are() {
        assert!(bytes_equal(b"same", b"same"));
        assert!(!bytes_equal(b"same", b"samf"));
        assert!(!bytes_equal(b"same", b"sam"));
    }
}
