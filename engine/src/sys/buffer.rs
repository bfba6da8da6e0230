#![allow(unsafe_code)] // The arena hands out disjoint slices of one mapping, which only the addresses themselves can express.
//! The memory that data passes through: one mapping cut into equal buffers, each owned by exactly one holder.
//!
//! Invariants:
//! 1. Every index is handed out once ([`Arena::take_all`]), [`Buf`] cannot be copied, so no two live references overlap.
//! 2. A [`Buf`], and a ring it is registered with, keeps the mapping alive.
//! 3. The mapping is left out of core dumps and of forked children, and what was written to is zeroed before it is unmapped.
//!
//! Huge pages are taken quietly where the host offers them: reserved ones first, then transparent ones, else base pages.
//! Buffers are locked from the last one down, while a ring registers (and so pins) them from the first one up: under a small
//! `RLIMIT_MEMLOCK`, which the kernel counts separately for the two, twice as many buffers stay out of swap. Locking is on
//! fault, so memory that is never used is never resident. A part of the limit is left for keys ([`KEY_RESERVE_BYTES`]).
//!
//! Why not `Vec<Vec<u8>>`: alignment for O_DIRECT, one registration, one `madvise`, and a huge page may hold several buffers.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::mm::{self, Advice, MapFlags, MlockFlags, ProtFlags};

use crate::error::{Error, ErrorKind, Result};
use crate::sys::process;

/// Bytes of a huge page on x86-64, and what the mapping is aligned to.
pub const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Every buffer starts on a multiple of this, which satisfies O_DIRECT on any device we know.
pub const BUFFER_ALIGN_BYTES: u32 = 4096;

/// What arenas leave of `RLIMIT_MEMLOCK` for keys: the expanded schedules (2880 bytes each) of some 350 volume keys.
pub const KEY_RESERVE_BYTES: u64 = 1 << 20;

/// What the mapping is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    /// Reserved huge pages (`MAP_HUGETLB`).
    Hugetlb,
    /// Transparent huge pages, as far as the kernel finds any.
    Transparent,
    /// 4 KiB pages.
    Base,
}

impl Pages {
    /// As `daemon status` names it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Hugetlb => "hugetlb",
            Self::Transparent => "transparent",
            Self::Base => "base",
        }
    }
}

/// Facts about an arena, for `daemon status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArenaFacts {
    /// Buffers.
    pub count: u32,
    /// Bytes of each.
    pub buffer_bytes: u32,
    /// Buffers locked in memory.
    pub locked: u32,
    /// What the mapping is made of.
    pub pages: Pages,
}

#[derive(Debug)]
struct Map {
    base: NonNull<u8>,
    mapped_bytes: usize,
    buffer_bytes: usize,
    /// Buffers that were ever lent for writing, by index: only these need zeroing, and touching the others would make them
    /// resident.
    used: Box<[AtomicBool]>,
    /// Nothing in it is anybody's secret.
    plain: bool,
}

// SAFETY: `base` is plain memory owned by this value alone; access to its bytes goes through `Buf`, one owner per index.
unsafe impl Send for Map {}
// SAFETY: as above: a shared `Map` gives out no bytes, only a `Buf` does, and those are disjoint.
unsafe impl Sync for Map {}

impl Drop for Map {
    fn drop(&mut self) {
        for (index, used) in self.used.iter().enumerate() {
            if used.load(Ordering::Relaxed) && !self.plain {
                // SAFETY: inside the mapping (`index < count`); the last `Buf` and ring are gone, so nobody else looks.
                // The stores cannot be elided: `munmap` is opaque to the compiler and may read what the pointer reaches.
                unsafe {
                    self.base.as_ptr().add(index * self.buffer_bytes).write_bytes(0, self.buffer_bytes)
                };
            }
        }
        // SAFETY: exactly the range mapped in `map`, which nothing refers to any more.
        let unmapped = unsafe { mm::munmap(self.base.as_ptr().cast(), self.mapped_bytes) };
        debug_assert!(unmapped.is_ok(), "unmapping our own memory");
    }
}

/// One buffer of an arena; whoever holds it owns its bytes. Move-only.
pub struct Buf {
    map: Arc<Map>,
    index: u32,
}

impl Buf {
    /// Index in its arena, and in the ring's table of registered buffers.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }

    fn start(&self) -> *mut u8 {
        // SAFETY: `index < count` by construction, so the result is inside the mapping.
        unsafe { self.map.base.as_ptr().add(self.index as usize * self.map.buffer_bytes) }
    }
}

impl std::ops::Deref for Buf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: inside the mapping, which `self.map` keeps alive; anonymous memory is initialised (zero); this `Buf` is the
        // only owner of the index, so nothing writes while `&self` lives (a ring that writes owns the `Buf`).
        unsafe { std::slice::from_raw_parts(self.start(), self.map.buffer_bytes) }
    }
}

impl std::ops::DerefMut for Buf {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.map.used[self.index as usize].store(true, Ordering::Relaxed);
        // SAFETY: as in `deref`, and `&mut self` of the only owner makes it exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start(), self.map.buffer_bytes) }
    }
}

impl std::fmt::Debug for Buf {
    /// Never the bytes: they may be plaintext.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buf({}, {} bytes)", self.index, self.map.buffer_bytes)
    }
}

/// A handle that keeps an arena's mapping alive and recognises its buffers; what a ring holds besides the registration.
#[derive(Debug, Clone)]
pub struct ArenaRef(Arc<Map>);

impl ArenaRef {
    /// Is `buf` one of this arena's?
    #[must_use]
    pub fn owns(&self, buf: &Buf) -> bool {
        Arc::ptr_eq(&self.0, &buf.map)
    }

    /// Address and length of each buffer, in index order, for registration. Addresses only: nothing is read or written here.
    pub(super) fn ranges(&self) -> impl Iterator<Item = (*mut u8, usize)> {
        let bytes = self.0.buffer_bytes;
        (0..self.0.used.len()).map(move |index| (self.0.base.as_ptr().wrapping_add(index * bytes), bytes))
    }
}

/// One mapping cut into equal buffers.
#[derive(Debug)]
pub struct Arena {
    map: Arc<Map>,
    facts: ArenaFacts,
    taken: bool,
}

/// Locking is counted per process: arenas made at the same time must not each take the last of the limit.
static LOCKING: Mutex<()> = Mutex::new(());

impl Arena {
    /// `count` buffers of `buffer_bytes` each, a multiple of [`BUFFER_ALIGN_BYTES`].
    ///
    /// # Errors
    /// `Invalid` for a size of zero or not so aligned; otherwise no memory.
    pub fn new(count: u32, buffer_bytes: u32) -> Result<Self> {
        let total = usize::try_from(u64::from(count) * u64::from(buffer_bytes)).unwrap_or(0);
        if total == 0 || !buffer_bytes.is_multiple_of(BUFFER_ALIGN_BYTES) {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "bad arena: {count} buffers of {buffer_bytes} bytes (a multiple of {BUFFER_ALIGN_BYTES})"
                ),
            ));
        }
        let (base, mapped_bytes, pages) = map(total)?;
        let map = Arc::new(Map {
            base,
            mapped_bytes,
            buffer_bytes: buffer_bytes as usize,
            used: (0..count).map(|_| AtomicBool::new(false)).collect(),
            plain: false,
        });
        let locked = lock(&map, count, buffer_bytes);
        Ok(Self { map, facts: ArenaFacts { count, buffer_bytes, locked, pages }, taken: false })
    }

    /// Buffers for simulated disks, of which there are a million an hour: neither locked nor wiped, and in small pages.
    ///
    /// # Errors
    /// No memory.
    ///
    /// # Panics
    /// If there is no buffer, or its size is not so aligned.
    #[cfg(feature = "sim")]
    pub fn simulated(count: u32, buffer_bytes: u32) -> Result<Self> {
        assert!(count > 0 && buffer_bytes > 0 && buffer_bytes.is_multiple_of(BUFFER_ALIGN_BYTES));
        let mapped_bytes = count as usize * buffer_bytes as usize;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches no existing memory.
        let start =
            unsafe { mm::mmap_anonymous(std::ptr::null_mut(), mapped_bytes, prot, MapFlags::PRIVATE) }
                .map_err(|errno| {
                    Error::io(format!("no memory for {mapped_bytes} bytes of buffers"), errno)
                })?;
        let map = Arc::new(Map {
            base: NonNull::new(start.cast()).expect("the kernel maps nothing at address zero"),
            mapped_bytes,
            buffer_bytes: buffer_bytes as usize,
            used: (0..count).map(|_| AtomicBool::new(false)).collect(),
            plain: true,
        });
        let facts = ArenaFacts { count, buffer_bytes, locked: 0, pages: Pages::Base };
        Ok(Self { map, facts, taken: false })
    }

    /// All buffers, in index order. Each can be taken once in the arena's life.
    ///
    /// # Panics
    /// If they were taken before: two owners of one buffer would be unsound.
    #[must_use]
    pub fn take_all(&mut self) -> Vec<Buf> {
        assert!(!self.taken, "the buffers of an arena are taken once");
        self.taken = true;
        (0..self.facts.count).map(|index| Buf { map: Arc::clone(&self.map), index }).collect()
    }

    /// What it is.
    #[must_use]
    pub fn facts(&self) -> ArenaFacts {
        self.facts
    }

    /// A handle for a ring to register.
    #[must_use]
    pub fn reference(&self) -> ArenaRef {
        ArenaRef(Arc::clone(&self.map))
    }
}

/// Map at least `total` bytes, aligned to a huge page.
fn map(total: usize) -> Result<(NonNull<u8>, usize, Pages)> {
    let no_memory =
        |errno: rustix::io::Errno| Error::io(format!("no memory for {total} bytes of buffers"), errno);
    let bytes = total.next_multiple_of(HUGE_PAGE_BYTES);
    if let Some(base) = map_hugetlb(bytes) {
        return Ok((keep_private(base, bytes), bytes, Pages::Hugetlb));
    }
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    let padded = bytes + HUGE_PAGE_BYTES;
    // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches no existing memory.
    let start = unsafe { mm::mmap_anonymous(std::ptr::null_mut(), padded, prot, MapFlags::PRIVATE) }
        .map_err(no_memory)?
        .cast::<u8>();
    let before = start.align_offset(HUGE_PAGE_BYTES);
    let base = start.wrapping_add(before);
    let after = padded - before - bytes;
    // SAFETY: both ranges lie in the mapping just made, outside `base..base + bytes`, and nobody has seen them.
    unsafe {
        if before > 0 {
            mm::munmap(start.cast(), before).map_err(no_memory)?;
        }
        if after > 0 {
            mm::munmap(base.wrapping_add(bytes).cast(), after).map_err(no_memory)?;
        }
    }
    let base = NonNull::new(base).expect("the kernel maps nothing at address zero");
    // SAFETY: advice on our own mapping; huge pages do not change its contents.
    let advised = unsafe { mm::madvise(base.as_ptr().cast(), bytes, Advice::LinuxHugepage) }.is_ok();
    let pages = if advised && transparent_huge_pages() { Pages::Transparent } else { Pages::Base };
    Ok((keep_private(base, bytes), bytes, pages))
}

/// Reserved huge pages, if there are enough: populated now, because a page that a cgroup or a memory policy refuses later
/// would arrive as SIGBUS.
fn map_hugetlb(bytes: usize) -> Option<NonNull<u8>> {
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | MapFlags::HUGETLB | MapFlags::HUGE_2MB;
    // SAFETY: as the anonymous mapping above.
    let base = unsafe { mm::mmap_anonymous(std::ptr::null_mut(), bytes, prot, flags) }.ok()?;
    // SAFETY: populating our own mapping.
    if unsafe { mm::madvise(base, bytes, Advice::LinuxPopulateWrite) }.is_err() {
        // SAFETY: the mapping just made; nobody has seen it.
        let unmapped = unsafe { mm::munmap(base, bytes) };
        debug_assert!(unmapped.is_ok(), "unmapping our own memory");
        return None;
    }
    NonNull::new(base.cast())
}

/// Leave the mapping out of core dumps and of children. Best effort: the process refuses core dumps as a whole anyway.
fn keep_private(base: NonNull<u8>, bytes: usize) -> NonNull<u8> {
    for advice in [Advice::LinuxDontDump, Advice::LinuxDontFork] {
        // SAFETY: advice on our own mapping that does not change its contents in this process.
        let _ = unsafe { mm::madvise(base.as_ptr().cast(), bytes, advice) };
    }
    base
}

/// Does this host give transparent huge pages to those who ask?
fn transparent_huge_pages() -> bool {
    std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled")
        .is_ok_and(|text| text.contains("[madvise]") || text.contains("[always]"))
}

/// Lock buffers, last one first, as far as the limit allows. Returns how many.
fn lock(map: &Map, count: u32, buffer_bytes: u32) -> u32 {
    let _guard = LOCKING.lock().unwrap_or_else(PoisonError::into_inner);
    let mut room = match process::memlock_limit() {
        Some(limit) => limit.saturating_sub(process::locked_bytes()).saturating_sub(KEY_RESERVE_BYTES),
        None => u64::MAX,
    };
    for done in 0..count {
        let offset = (count - 1 - done) as usize * map.buffer_bytes;
        if room < u64::from(buffer_bytes) {
            return done;
        }
        let start = map.base.as_ptr().wrapping_add(offset).cast();
        // SAFETY: one buffer inside our own mapping; locking does not change its contents.
        if unsafe { mm::mlock_with(start, map.buffer_bytes, MlockFlags::ONFAULT) }.is_err() {
            return done;
        }
        room = room.saturating_sub(u64::from(buffer_bytes));
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_disjoint_and_zero() {
        let mut arena = Arena::new(6, 128 << 10).expect("arena");
        let mut bufs = arena.take_all();
        assert_eq!(bufs.len(), 6);
        assert!(bufs[0].as_ptr().addr().is_multiple_of(HUGE_PAGE_BYTES));
        for (index, buf) in bufs.iter_mut().enumerate() {
            assert_eq!(buf.index() as usize, index);
            assert!(buf.as_ptr().addr().is_multiple_of(BUFFER_ALIGN_BYTES as usize));
            assert!(buf.iter().all(|&byte| byte == 0));
            buf.fill(u8::try_from(index + 1).expect("small"));
        }
        for (index, buf) in bufs.iter().enumerate() {
            assert!(buf.iter().all(|&byte| usize::from(byte) == index + 1));
        }
    }

    #[test]
    fn a_buffer_outlives_its_arena() {
        let mut arena = Arena::new(2, 64 << 10).expect("arena");
        let mut buf = arena.take_all().pop().expect("a buffer");
        drop(arena);
        buf.fill(7);
        assert_eq!(buf[65535], 7);
    }

    #[test]
    #[should_panic(expected = "taken once")]
    fn buffers_cannot_be_taken_twice() {
        let mut arena = Arena::new(1, 4096).expect("arena");
        let _first = arena.take_all();
        let _second = arena.take_all();
    }

    #[test]
    fn refuses_sizes_that_direct_io_could_not_use() {
        for (count, bytes) in [(0, 4096), (1, 0), (1, 4097), (4, 512)] {
            assert_eq!(Arena::new(count, bytes).expect_err("refused").kind(), ErrorKind::Invalid);
        }
    }

    #[test]
    fn debug_shows_no_bytes() {
        let mut arena = Arena::new(1, 4096).expect("arena");
        let mut buf = arena.take_all().pop().expect("a buffer");
        buf.fill(0x41);
        assert_eq!(format!("{buf:?}"), "Buf(0, 4096 bytes)");
    }
}
