//! The bytes of a simulated disk at one moment: sparse, and cheap to copy.
//!
//! Blocks that hold only zeros are not kept. A copy shares every block, and a frozen image shares its whole table, so that
//! ten thousand copies of a disk cost what each of them changes.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SeekFrom};
use rustix::io::Errno;

use crate::error::{Error, Result};

/// Bytes of a block of the table.
const BLOCK_BYTES: usize = 4096;
const BLOCK: u64 = BLOCK_BYTES as u64;

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
        rustix::fs::ftruncate(&file, self.size).map_err(failed)?;
        for (index, block) in self.blocks() {
            let start = index * BLOCK;
            let length = usize::try_from(self.size.saturating_sub(start)).unwrap_or(BLOCK_BYTES);
            put(&file, start, &block[..length.min(BLOCK_BYTES)]).map_err(failed)?;
        }
        Ok(file)
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

impl PartialEq for Image {
    fn eq(&self, other: &Self) -> bool {
        self.size == other.size && self.first_difference(other).is_none()
    }
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
