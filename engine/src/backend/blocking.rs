//! One operation at a time over a [`Queue`]: for headers and journals, whose order of writes is their safety.
//!
//! Why over a queue and not `pread`: the simulated disk is a queue, so what is written here can be cut at every write.
//!
//! Keyslot material and plain headers pass through the one buffer, so it is wiped after every operation, whatever that
//! carried. This module refuses to keep anything in flight between calls, to cache, and to reorder.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use zeroize::Zeroize;

use crate::backend::nbd;
use crate::backend::{Op, Port, Position, Queue, QueueChoice, Span, What, open_queue};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::buffer::{Arena, Buf};
use crate::units::Extent;

/// The largest transfer: a LUKS2 header with its JSON area, or a keyslot's material, in one or a few.
const BUFFER_BYTES: u32 = 1 << 20;

/// Whose turn it is to flush what several write: one at a time, and nobody behind one that failed. Of a write-back that failed each open
/// file is told once, and of a device's cache only who flushed it.
pub trait Turns: Send + Sync {
    /// Has one failed? Then it stays so.
    fn is_lost(&self) -> bool;

    /// Wait for the turn; [`Turns::end_in_turn`] follows.
    ///
    /// # Errors
    /// One has failed: the next would succeed, and say of lost bytes that they are durable.
    fn begin_in_turn(&self) -> Result<()>;

    /// The flush is over.
    fn end_in_turn(&self, is_durable: bool);
}

/// A file or device read and written in order, each call complete when it returns.
pub struct Blocking {
    queue: Box<dyn Queue>,
    port: Port,
    file: Arc<OwnedFd>,
    /// Zeros between calls. `None` once the queue broke while it held the buffer.
    buf: Option<Buf>,
    /// So many bytes of it have ever been something else.
    used: usize,
    name: String,
    align: u64,
    turns: Option<Arc<dyn Turns>>,
}

/// Which way bytes go.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Read,
    Write,
}

impl Blocking {
    /// Over a queue of its own for a file opened by a caller. Direct I/O on the descriptor is respected:
    /// transfers are widened to `align` (read-modify-write where need be; a file that ends inside a block so written grows to
    /// the end of it); 1: buffered.
    ///
    /// The queue is one thread and not a ring: with one operation at a time a ring saves nothing, while its buffer is pinned
    /// (`RLIMIT_MEMLOCK`) and the kernel takes its time to free it, for each of the many short-lived devices of header work.
    ///
    /// # Errors
    /// No queue or buffer can be had; `Invalid`: an alignment that is no power of two.
    pub fn open(file: Arc<OwnedFd>, name: &str, align: u32) -> Result<Self> {
        Self::open_on(QueueChoice::Threads, file, name, align)
    }

    /// As [`Blocking::open`], over a queue of this kind.
    ///
    /// # Errors
    /// As [`Blocking::open`].
    pub fn open_on(queue: QueueChoice, file: Arc<OwnedFd>, name: &str, align: u32) -> Result<Self> {
        // A server may take nothing but whole blocks, and there is no cache on this side that would make them up.
        let align = nbd::find(&file).map_or(align, |volume| align.max(volume.facts().block_min));
        let mut arena = Arena::new(1, BUFFER_BYTES)?;
        // Whole jobs on simulated disks: what they read and write by way of this passes through their world too.
        #[cfg(feature = "sim")]
        if let Some(world) = crate::backend::sim::World::holding(&file)? {
            let queue = world.queue(&arena, 1);
            let buf = arena.take_all().pop().expect("an arena of one buffer");
            return Self::over(queue, buf, file, name, align);
        }
        let queue = open_queue(queue, &arena, 1)?;
        let buf = arena.take_all().pop().expect("an arena of one buffer");
        Self::over(queue, buf, file, name, align)
    }

    /// Over a given queue (the simulated disk), with a buffer of that queue's arena that nobody has written to.
    ///
    /// # Errors
    /// The file cannot be attached; `Invalid`: `align` is no power of two, or the buffer is not made of such blocks.
    pub fn over(
        mut queue: Box<dyn Queue>,
        buf: Buf,
        file: Arc<OwnedFd>,
        name: &str,
        align: u32,
    ) -> Result<Self> {
        let align = align.max(1);
        if !align.is_power_of_two() || !buf.len().is_multiple_of(align as usize) {
            let what = format!("cannot transfer in blocks of {align} bytes with a buffer of {}", buf.len());
            return Err(Error::new(ErrorKind::Invalid, what).at(name));
        }
        let port = queue.attach(Arc::clone(&file))?;
        Ok(Self {
            queue,
            port,
            file,
            buf: Some(buf),
            used: 0,
            name: name.to_owned(),
            align: u64::from(align),
            turns: None,
        })
    }

    /// Flush in turn with others who write the same device.
    #[must_use]
    pub fn in_turn(mut self, turns: Arc<dyn Turns>) -> Self {
        self.turns = Some(turns);
        self
    }

    /// What the user calls it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The descriptor under it, for locks.
    #[must_use]
    pub fn file(&self) -> &Arc<OwnedFd> {
        &self.file
    }

    /// What transfers are widened to, bytes; 1: buffered.
    #[must_use]
    pub fn align(&self) -> u32 {
        u32::try_from(self.align).expect("it was a u32")
    }

    /// Fill `into` from `offset`.
    ///
    /// # Errors
    /// `Invalid` when it ends before; else the I/O error with name and extent. `into` is unspecified then.
    pub fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<()> {
        let end = self.end_of(offset, into.len())?;
        let mut at = offset;
        let mut rest = into;
        while !rest.is_empty() {
            let (start, count) = self.piece(at, rest.len())?;
            let head = length(at - start);
            let (now, later) = std::mem::take(&mut rest).split_at_mut(count);
            let span = 0..self.widened(head + count);
            let got = self.transfer(Way::Read, start, span, |buf, got| {
                if got >= head + count {
                    now.copy_from_slice(&buf[head..head + count]);
                }
            })?;
            if got < head + count {
                // A read is short only at the end, and one that finds nothing may be well beyond it.
                let place = if got == 0 && start > 0 { "at or before byte" } else { "at byte" };
                let what = format!("ends {place} {}, {end} needed", start + bytes(got));
                return Err(Error::new(ErrorKind::Invalid, what).at(&self.name));
            }
            at += bytes(count);
            rest = later;
        }
        Ok(())
    }

    /// Write all of `bytes` at `offset`. Not durable before [`Self::flush`]; a power cut may leave any part of it.
    ///
    /// # Errors
    /// The I/O error with name and extent.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.end_of(offset, bytes.len())?;
        let mut at = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            let (start, count) = self.piece(at, rest.len())?;
            let head = length(at - start);
            let whole = self.widened(head + count);
            let (now, later) = rest.split_at(count);
            // What surrounds the bytes in their first and last block is read first, and only that: a bad sector between
            // is healed by being written.
            let block = self.widened(1);
            let (mut first, mut last) = (Wiped::new(block), Wiped::new(block));
            let tail = (head + count) % block as usize;
            if head > 0 {
                self.transfer(Way::Read, start, 0..block, |buf, got| first.keep(&buf[..got]))?;
            }
            if tail > 0 {
                let from = start + u64::from(whole - block);
                self.transfer(Way::Read, from, 0..block, |buf, got| last.keep(&buf[..got]))?;
            }
            self.used = self.used.max(whole as usize);
            let buf = self.buf.as_mut().ok_or_else(broken)?;
            buf[..head].copy_from_slice(&first.0[..head]);
            buf[head..head + count].copy_from_slice(now);
            buf[head + count..whole as usize].copy_from_slice(if tail > 0 { &last.0[tail..] } else { &[] });
            self.transfer(Way::Write, start, 0..whole, |_, _| ())?;
            at += self::bytes(count);
            rest = later;
        }
        Ok(())
    }

    /// Make everything written durable.
    ///
    /// # Errors
    /// The I/O error with name. Nothing may be assumed about earlier writes then.
    pub fn flush(&mut self) -> Result<()> {
        let turns = self.turns.clone();
        if let Some(turns) = &turns {
            turns.begin_in_turn().map_err(|error| error.at(&self.name))?;
        }
        let flushed = self
            .run(What::Flush)
            .and_then(|done| done.result.map_err(|cause| Error::io("flush failed", cause).at(&self.name)));
        if let Some(turns) = &turns {
            turns.end_in_turn(flushed.is_ok());
        }
        flushed.map(drop)
    }

    /// One past the last byte of a transfer.
    fn end_of(&self, offset: u64, count: usize) -> Result<u64> {
        offset.checked_add(bytes(count)).ok_or_else(|| {
            let what = format!("no file has {count} bytes at {offset}");
            Error::new(ErrorKind::Invalid, what).at(&self.name)
        })
    }

    /// Where the blocks of a transfer at `at` begin, and how many of its `count` bytes fit the buffer behind that.
    fn piece(&self, at: u64, count: usize) -> Result<(u64, usize)> {
        let start = at & !(self.align - 1);
        let room = self.buf.as_ref().ok_or_else(broken)?.len() - length(at - start);
        Ok((start, count.min(room)))
    }

    /// Bytes rounded up to whole blocks: no more than the buffer, which is made of such.
    fn widened(&self, count: usize) -> u32 {
        let align = usize::try_from(self.align).expect("an alignment is a u32");
        u32::try_from(count.next_multiple_of(align)).expect("no more than a buffer")
    }

    /// One transfer of the buffer's `span`, start to end; `look` sees the buffer and the count before the wipe.
    fn transfer(
        &mut self,
        way: Way,
        offset: u64,
        span: Span,
        look: impl FnOnce(&[u8], usize),
    ) -> Result<usize> {
        let buf = self.buf.take().ok_or_else(broken)?;
        let used = span.end as usize;
        self.used = self.used.max(used);
        let position = Position::At(offset);
        let what = match way {
            Way::Read => What::Read { position, buf, span },
            Way::Write => What::Write { position, buf, span },
        };
        let done = self.run(what)?;
        let mut buf = done.buf.expect("a transfer brings its buffer back");
        let result = done.result.map(|count| count as usize);
        if let Ok(count) = result {
            look(&buf, count);
        }
        buf[..used].zeroize();
        self.buf = Some(buf);
        result.map_err(|cause| {
            let what = if way == Way::Read { "read failed" } else { "write failed" };
            let extent = Extent::new(offset, offset.saturating_add(bytes(used)));
            let error = Error::io(what, cause);
            match extent {
                Some(extent) => error.at(format_args!("{} {extent}", self.name)),
                None => error.at(&self.name),
            }
        })
    }

    /// Push one operation and wait until it comes back.
    fn run(&mut self, what: What) -> Result<super::Done> {
        if self.queue.push(Op { token: 0, port: self.port, what }).is_err() {
            return Err(broken().at(&self.name));
        }
        let mut done = Vec::with_capacity(1);
        while done.is_empty() {
            // An operation whose queue fails is lost to us with its buffer; the queue drains it when it is dropped.
            self.queue.wait(None).map_err(|error| broken().at(&self.name).because(error))?;
            self.queue.reap(&mut done);
        }
        Ok(done.remove(0))
    }
}

impl Drop for Blocking {
    fn drop(&mut self) {
        // Zeros already, but for a panic between filling it and handing it over. What was never used is not touched.
        if let Some(buf) = &mut self.buf {
            buf[..self.used].zeroize();
        }
    }
}

/// A block kept aside, wiped when dropped.
struct Wiped(Vec<u8>);

impl Wiped {
    fn new(count: u32) -> Self {
        Self(vec![0; count as usize])
    }

    fn keep(&mut self, bytes: &[u8]) {
        self.0[..bytes.len()].copy_from_slice(bytes);
    }
}

impl Drop for Wiped {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

fn broken() -> Error {
    Error::new(ErrorKind::Io, "the I/O queue has failed")
}

fn bytes(count: usize) -> u64 {
    u64::try_from(count).expect("a length")
}

fn length(bytes: u64) -> usize {
    usize::try_from(bytes).expect("less than a block")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::device::{Device, Purpose};
    use std::fs::File;
    use std::os::unix::fs::FileExt;
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicU32, Ordering};

    struct Scratch(PathBuf);

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    fn scratch(contents: &[u8]) -> (Scratch, File) {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let dir = PathBuf::from(option_env!("CARGO_TARGET_TMPDIR").unwrap_or("/var/tmp"));
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = dir.join(format!("blocking-{}-{number}", std::process::id()));
        let file = File::options().read(true).write(true).create_new(true).open(&path).expect("create");
        file.write_all_at(contents, 0).expect("filled");
        (Scratch(path), file)
    }

    fn noise(count: usize) -> Vec<u8> {
        (0..count).map(|index| u8::try_from((index * 31 + index / 251) % 251).expect("small") + 1).collect()
    }

    fn buffered(file: File) -> Blocking {
        Blocking::open(Arc::new(file.into()), "scratch", 1).expect("opened")
    }

    /// With O_DIRECT and its alignment; `None` where the filesystem has none.
    fn direct(file: File) -> Option<(Device, Blocking)> {
        let purpose = Purpose { read: true, write: true, stream: false };
        let device = Device::from_fd(file.into(), "scratch", purpose).expect("device");
        if !device.enable_direct() {
            eprintln!("SKIPPED: no direct I/O on the scratch filesystem");
            return None;
        }
        let align = device.direct_alignment().expect("aligned");
        assert!(align > 1);
        let blocking = Blocking::open(Arc::clone(device.file()), "scratch", align).expect("opened");
        Some((device, blocking))
    }

    #[test]
    fn what_is_written_is_read_back_across_many_buffers() {
        let (_scratch, file) = scratch(&[]);
        let mut blocking = buffered(file.try_clone().expect("clone"));
        let bytes = noise(3 * (1 << 20) + 77);
        blocking.write(13, &bytes).expect("written");
        blocking.flush().expect("flushed");
        let mut back = vec![0; bytes.len()];
        blocking.read(13, &mut back).expect("read");
        assert!(back == bytes);
        let mut all = vec![9; 13];
        file.read_exact_at(&mut all, 0).expect("read");
        assert_eq!(all, [0; 13]);
        assert_eq!(file.metadata().expect("stat").len(), bytes.len() as u64 + 13);
        blocking.read(1 << 40, &mut []).expect("nothing is everywhere");
    }

    #[test]
    fn a_file_that_ends_early_says_where_and_what_was_needed() {
        let (_scratch, file) = scratch(&noise(1000));
        let mut blocking = buffered(file);
        let error = blocking.read(512, &mut [0; 1024]).expect_err("too short");
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert_eq!(error.chain(), "ends at byte 1000, 1536 needed: scratch");
        let error = blocking.read(4096, &mut [0; 1]).expect_err("too short");
        assert_eq!(error.chain(), "ends at or before byte 4096, 4097 needed: scratch");
        let error = blocking.read(u64::MAX, &mut [0; 2]).expect_err("no such place");
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }

    #[test]
    fn an_error_names_the_file_and_the_extent() {
        let (scratch, _file) = scratch(&noise(4096));
        let mut read_only = buffered(File::open(&scratch.0).expect("open"));
        let error = read_only.write(512, &[0; 512]).expect_err("not opened for writing");
        assert!(error.chain().starts_with("write failed: scratch sectors 1..2: "), "{}", error.chain());
        // The device goes on after an error.
        read_only.read(0, &mut [0; 4096]).expect("read");
        let mem = File::open("/proc/self/mem").expect("open");
        let error = buffered(mem).read(4096, &mut [0; 100]).expect_err("nothing is mapped there");
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.chain().starts_with("read failed: scratch bytes 4096..4196: "), "{}", error.chain());
    }

    #[test]
    fn direct_transfers_of_any_extent_change_only_their_bytes() {
        let before = noise(3 << 20);
        let (_scratch, file) = scratch(&before);
        let Some((device, mut blocking)) = direct(file) else { return };
        let mut model = before;
        let places =
            [(0, 592), (1, 1), (4095, 2), (5000, 100), (8192, 4096), (12_345, 1 << 20), (511, 2 << 20)];
        for (offset, count) in places {
            let bytes: Vec<u8> = noise(count).iter().map(|byte| byte ^ 0x80).collect();
            blocking.write(offset as u64, &bytes).expect("written");
            model[offset..offset + count].copy_from_slice(&bytes);
            let mut back = vec![0; count];
            blocking.read(offset as u64, &mut back).expect("read");
            assert!(back == bytes, "{count} bytes at {offset}");
        }
        blocking.flush().expect("flushed");
        assert!(device.disable_direct());
        let mut all = vec![0; model.len()];
        rustix::io::pread(device.file(), &mut all, 0).expect("read");
        assert!(all == model);
    }

    #[test]
    fn direct_reads_find_the_odd_end_and_writes_fill_its_block() {
        let before = noise(5000);
        let (_scratch, file) = scratch(&before);
        let size = file.try_clone().expect("clone");
        let Some((device, mut blocking)) = direct(file) else { return };
        let mut back = vec![0; 5000];
        blocking.read(0, &mut back).expect("the odd end is inside the block read");
        assert!(back == before);
        let error = blocking.read(4990, &mut [0; 11]).expect_err("one byte too many");
        assert_eq!(error.chain(), "ends at byte 5000, 5001 needed: scratch");
        blocking.write(5100, &[7; 10]).expect("written");
        let align = u64::from(device.direct_alignment().expect("aligned"));
        assert_eq!(size.metadata().expect("stat").len(), 5110u64.next_multiple_of(align));
        let mut back = vec![1; 112];
        blocking.read(4999, &mut back).expect("read");
        assert_eq!((back[0], &back[1..101], &back[101..111]), (before[4999], &[0; 100][..], &[7; 10][..]));
    }

    #[test]
    fn nothing_stays_in_the_buffer() {
        let (_scratch, file) = scratch(&noise(8192));
        let mut blocking = buffered(file);
        let clean = |blocking: &Blocking| {
            blocking.buf.as_ref().expect("held between calls").iter().all(|&byte| byte == 0)
        };
        blocking.write(100, &noise(5000)).expect("written");
        assert!(clean(&blocking));
        blocking.read(0, &mut [0; 8000]).expect("read");
        assert!(clean(&blocking));
        blocking.read(0, &mut vec![0; 9000]).expect_err("too short");
        assert!(clean(&blocking));
    }

    #[test]
    fn an_alignment_that_cannot_be_kept_is_refused() {
        for align in [3, 1000, 2 << 20] {
            let (_scratch, file) = scratch(&[]);
            let error = Blocking::open(Arc::new(file.into()), "scratch", align).err().expect("refused");
            assert_eq!(error.kind(), ErrorKind::Invalid);
        }
    }
}
