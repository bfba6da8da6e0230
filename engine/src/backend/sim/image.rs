//! The bytes of a simulated disk at one moment: sparse, and cheap to copy.
//!
//! Blocks that hold only zeros are not kept. A copy shares every block, and a frozen image shares its whole table, so that
//! ten thousand copies of a disk cost what each of them changes.

use std::collections::BTreeMap;
use std::io::IoSlice;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{FallocateFlags, MemfdFlags, SeekFrom};
use rustix::io::Errno;

use super::random::mix;
use crate::error::{Error, Result};

/// Bytes of a block of the table.
const BLOCK_BYTES: usize = 4096;
const BLOCK: u64 = BLOCK_BYTES as u64;

/// Blocks that go to a memory file at once; the kernel takes 1024 pieces at most.
const BLOCKS_PER_CALL: usize = 256;

type Block = Arc<[u8; BLOCK_BYTES]>;

/// What a disk holds.
#[derive(Debug, Clone, Default)]
pub struct Image {
    size: u64,
    /// Shared with every copy made since the last [`Image::freeze`].
    base: Arc<BTreeMap<u64, Block>>,
    /// Newer than `base`; `None`: zeros since.
    over: BTreeMap<u64, Option<Block>>,
}

impl Image {
    /// `size` zeros.
    #[must_use]
    pub fn zeros(size: u64) -> Self {
        Self { size, ..Self::default() }
    }

    /// These bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        let mut image = Self::default();
        image.write(0, bytes);
        image.freeze();
        image
    }

    /// What a file holds; its holes cost nothing.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn of_file(file: &OwnedFd) -> Result<Self> {
        let failed = |errno: Errno| Error::io("cannot take the image of a file", errno);
        let size = rustix::fs::fstat(file).map_err(failed)?.st_size;
        let mut image = Self::zeros(u64::try_from(size).unwrap_or(0));
        let mut at = 0;
        let mut bytes = vec![0; 1 << 20];
        loop {
            at = match rustix::fs::seek(file, SeekFrom::Data(at)) {
                Ok(data) => data.max(at),
                Err(Errno::NXIO) => break,
                Err(errno) => return Err(failed(errno)),
            };
            let end = rustix::fs::seek(file, SeekFrom::Hole(at)).map_err(failed)?;
            while at < end {
                let want = usize::try_from(end - at).unwrap_or(usize::MAX).min(bytes.len());
                let got = rustix::io::pread(file, &mut bytes[..want], at).map_err(failed)?;
                if got == 0 {
                    break;
                }
                image.write(at, &bytes[..got]);
                at += got as u64;
            }
        }
        image.freeze();
        Ok(image)
    }

    /// A memory file that holds these bytes and nothing else.
    ///
    /// # Errors
    /// No memory or descriptors.
    pub fn to_memfd(&self, name: &str) -> Result<OwnedFd> {
        let failed = |errno: Errno| Error::io("cannot make a simulated disk", errno);
        let file = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC).map_err(failed)?;
        self.fill(&file, false).map_err(failed)?;
        Ok(file)
    }

    /// The same, with a memory file that held something else: cheaper than a new one, whose pages must be found first.
    pub(super) fn reuse_memfd(&self, file: &OwnedFd) -> Result<()> {
        let failed = |errno: Errno| Error::io("cannot reuse a simulated disk", errno);
        rustix::fs::seek(file, SeekFrom::Start(0)).map_err(failed)?;
        self.fill(file, true).map_err(failed)
    }

    fn fill(&self, file: &OwnedFd, used: bool) -> Result<(), Errno> {
        rustix::fs::ftruncate(file, self.size)?;
        let mut blocks: Vec<_> = self.blocks().filter(|(index, _)| index * BLOCK < self.size).collect();
        blocks.sort_unstable_by_key(|(index, _)| *index);
        let mut filled = 0;
        // Neighbours in one system call: there are many small disks.
        for run in blocks.chunk_by(|one, next| one.0 + 1 == next.0) {
            for run in run.chunks(BLOCKS_PER_CALL) {
                let start = run[0].0 * BLOCK;
                if used && filled < start {
                    punch(file, filled, start)?;
                }
                let room = usize::try_from(self.size - start).unwrap_or(usize::MAX);
                let bytes = room.min(run.len() * BLOCK_BYTES);
                let slices: Vec<_> = run
                    .iter()
                    .enumerate()
                    .map(|(at, (_, block))| {
                        IoSlice::new(&block[..(bytes - at * BLOCK_BYTES).min(BLOCK_BYTES)])
                    })
                    .collect();
                if rustix::io::pwritev(file, &slices, start)? != bytes {
                    return Err(Errno::NOSPC);
                }
                filled = start + bytes as u64;
            }
        }
        if used && filled < self.size {
            punch(file, filled, self.size)?;
        }
        Ok(())
    }

    /// Bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of the blocks kept: what the image costs.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        self.blocks().count() as u64 * BLOCK
    }

    /// Make the next copies cheap: they share one table, whatever was written before.
    pub fn freeze(&mut self) {
        if self.over.is_empty() {
            return;
        }
        let base = Arc::make_mut(&mut self.base);
        for (index, block) in std::mem::take(&mut self.over) {
            match block {
                Some(block) => base.insert(index, block),
                None => base.remove(&index),
            };
        }
    }

    /// Fill `into` from `offset`; zeros beyond the end.
    pub fn read(&self, offset: u64, into: &mut [u8]) {
        for (index, within, range) in pieces(offset, into.len()) {
            let into = &mut into[range];
            match self.block(index) {
                Some(block) => into.copy_from_slice(&block[within..within + into.len()]),
                None => into.fill(0),
            }
        }
    }

    /// `count` bytes from `offset`; zeros beyond the end.
    #[must_use]
    pub fn bytes(&self, offset: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.read(offset, &mut bytes);
        bytes
    }

    /// Put `bytes` at `offset`; the image grows if it ends before.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        self.size = self.size.max(offset + bytes.len() as u64);
        for (index, within, range) in pieces(offset, bytes.len()) {
            let bytes = &bytes[range];
            let old = match self.over.remove(&index) {
                Some(block) => block,
                None => self.base.get(&index).cloned(),
            };
            let mut block = old.unwrap_or_else(|| Arc::new([0; BLOCK_BYTES]));
            Arc::make_mut(&mut block)[within..within + bytes.len()].copy_from_slice(bytes);
            let kept = block.iter().any(|&byte| byte != 0).then_some(block);
            self.over.insert(index, kept);
        }
    }

    /// Cut off or extend with zeros.
    pub fn set_size(&mut self, size: u64) {
        if size < self.size {
            let partial = size % BLOCK;
            if partial > 0 {
                let rest = (BLOCK - partial).min(self.size - size);
                self.write(size, &vec![0; usize::try_from(rest).expect("less than a block")]);
            }
            let gone: Vec<u64> =
                self.blocks().map(|(index, _)| index).filter(|index| index * BLOCK >= size).collect();
            self.over.extend(gone.into_iter().map(|index| (index, None)));
        }
        self.size = size;
    }

    fn block(&self, index: u64) -> Option<&Block> {
        match self.over.get(&index) {
            Some(block) => block.as_ref(),
            None => self.base.get(&index),
        }
    }

    /// In no useful order, each once.
    fn blocks(&self) -> impl Iterator<Item = (u64, &Block)> {
        let older = self.base.iter().filter(|(index, _)| !self.over.contains_key(index));
        let newer = self.over.iter().filter_map(|(index, block)| Some((index, block.as_ref()?)));
        older.chain(newer).map(|(&index, block)| (index, block))
    }

    /// The first byte that differs from another image, sizes aside.
    #[must_use]
    pub fn first_difference(&self, other: &Self) -> Option<u64> {
        let zeros: Block = Arc::new([0; BLOCK_BYTES]);
        let indices = self.blocks().chain(other.blocks()).map(|(index, _)| index);
        indices
            .filter_map(|index| {
                let one = self.block(index).unwrap_or(&zeros);
                let two = other.block(index).unwrap_or(&zeros);
                if Arc::ptr_eq(one, two) {
                    return None;
                }
                let within = one.iter().zip(two.iter()).position(|(one, two)| one != two)?;
                Some(index * BLOCK + within as u64)
            })
            .min()
    }
}

impl Image {
    /// A number for what this image has otherwise than the one it was copied from: by all odds another number for anything
    /// else. Costs what was written since the copy.
    pub(super) fn changes(&self, from: &Self) -> u64 {
        let mut sum = mix(self.size);
        for (&index, block) in &self.over {
            let same = match (from.block(index), block) {
                (Some(one), Some(two)) => Arc::ptr_eq(one, two) || one == two,
                (one, two) => one.is_none() && two.is_none(),
            };
            if !same {
                sum = mix(sum ^ index).wrapping_add(block.as_ref().map_or(1, |block| digest(block)));
            }
        }
        mix(sum)
    }
}

/// Eight chains side by side, for they wait for their multiplications.
fn digest(block: &[u8; BLOCK_BYTES]) -> u64 {
    let mut lanes = [0_u64; 8];
    for words in block.chunks_exact(64) {
        for (lane, word) in lanes.iter_mut().zip(words.chunks_exact(8)) {
            let word = u64::from_le_bytes(word.try_into().expect("eight bytes"));
            *lane = (*lane ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(29);
        }
    }
    lanes.into_iter().fold(0, |sum, lane| mix(sum ^ lane))
}

impl PartialEq for Image {
    fn eq(&self, other: &Self) -> bool {
        self.size == other.size && self.first_difference(other).is_none()
    }
}

/// Zeros from here to there.
fn punch(file: &OwnedFd, from: u64, to: u64) -> Result<(), Errno> {
    rustix::fs::fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, from, to - from)
}

/// Write all of `bytes` at `offset` of a memory file.
pub(super) fn put(file: impl AsFd, mut offset: u64, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        let count = rustix::io::pwrite(&file, bytes, offset)?;
        offset += count as u64;
        bytes = &bytes[count..];
    }
    Ok(())
}

/// The blocks of an extent: index, first byte within the block, and which of the extent's bytes.
fn pieces(offset: u64, count: usize) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == count {
            return None;
        }
        let at = offset + done as u64;
        let within = usize::try_from(at % BLOCK).expect("less than a block");
        let length = (BLOCK_BYTES - within).min(count - done);
        let range = done..done + length;
        done += length;
        Some((at / BLOCK, within, range))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_reads_what_was_written_and_copies_do_not_mix() {
        let mut image = Image::zeros(1 << 40);
        image.write(4090, &[1; 12]);
        let mut copy = image.clone();
        image.freeze();
        copy.write(4095, &[2; 2]);
        assert_eq!(image.bytes(4088, 16), [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]);
        assert_eq!(copy.bytes(4094, 4), [1, 2, 2, 1]);
        assert_eq!(image.first_difference(&copy), Some(4095));
        assert_eq!(image.stored_bytes(), 8192);
        copy.write(4095, &[1; 2]);
        assert_eq!(image, copy);
    }

    #[test]
    fn zeros_are_not_kept_and_a_cut_image_forgets() {
        let mut image = Image::of(&[7; 10_000]);
        image.write(4096, &[0; 4096]);
        assert_eq!(image.stored_bytes(), 8192);
        image.set_size(9000);
        image.set_size(10_000);
        assert_eq!((image.bytes(8999, 3), image.size()), (vec![7, 0, 0], 10_000));
        image.set_size(0);
        image.set_size(10_000);
        assert_eq!(image, Image::zeros(10_000));
        assert_eq!(image.stored_bytes(), 0);
    }

    #[test]
    fn a_memory_file_holds_the_image_and_gives_it_back() {
        let mut image = Image::zeros(1 << 30);
        image.write(5, b"head");
        image.write((1 << 30) - 3, b"end");
        let file = image.to_memfd("image").expect("made");
        assert_eq!(Image::of_file(&file).expect("read"), image);
        let blocks = rustix::fs::fstat(&file).expect("stat").st_blocks;
        assert!(blocks <= 64, "{blocks} sectors for two blocks");
    }
}
