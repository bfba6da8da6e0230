//! What the contract of queues is tried on: queues of every kind, scratch files, one operation at a time.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use engine::backend::device::{Device, Purpose};
use engine::backend::sim::image::Image;
use engine::backend::sim::{DiskOptions, Options, World};
use engine::backend::threads::ThreadsQueue;
use engine::backend::uring::UringQueue;
use engine::backend::{
    Done, Op, Port, Position, Queue, QueueChoice, QueueFacts, Refused, Wake, What, nbd, open_queue,
};
use engine::error::{Error, ErrorKind};
use engine::sys::buffer::{Arena, Buf};
use tests::nbd_servers::Server;

/// Long enough for any machine, and only reached by a failing test.
const PATIENCE: Duration = Duration::from_secs(60);

/// A queue, and the buffers of its arena that are not lent out.
pub struct Bench {
    pub queue: Box<dyn Queue>,
    pub free: Vec<Buf>,
}

/// A queue under test, and the files it works on.
#[derive(Clone, Copy)]
pub struct Make {
    pub queue: fn(&Arena, u32) -> Option<Box<dyn Queue>>,
    pub file: fn() -> (Scratch, File),
}

pub const URING: Make = Make { queue: uring, file: Scratch::new };
pub const THREADS: Make = Make { queue: threads, file: Scratch::new };
/// Files with offsets are simulated disks; pipes and the kernel's own devices go through to a real queue.
pub const SIM: Make = Make { queue: simulated, file: simulated_disk };

/// What workers have: the queue that finds remote volumes among what is attached.
pub const WORKERS: Make = Make { queue: workers, file: Scratch::new };
/// Files with offsets are exports of an NBD server; all else goes through.
pub const REMOTE: Make = Make { queue: remote, file: Scratch::new };

pub fn workers(arena: &Arena, depth: u32) -> Option<Box<dyn Queue>> {
    Some(open_queue(QueueChoice::Auto, arena, depth).expect("queue"))
}

pub fn remote(arena: &Arena, depth: u32) -> Option<Box<dyn Queue>> {
    // Say so once, and here.
    drop(Server::nbdkit(&["memory", "1M"])?);
    let inner = open_queue(QueueChoice::Auto, arena, depth).expect("queue");
    Some(Box::new(Served { inner, served: Vec::new() }))
}

/// Attaches regular files by way of a server that exports them.
pub struct Served {
    /// Before the servers: it says goodbye to them.
    pub inner: Box<dyn Queue>,
    pub served: Vec<(Device, Server)>,
}

/// An export does not grow: of a file without a size, so much is exported.
pub const ROOM: u64 = 16 << 30;

impl Queue for Served {
    fn attach(&mut self, file: Arc<OwnedFd>) -> Result<Port, Error> {
        let stat = rustix::fs::fstat(&file).expect("stat");
        let path = std::fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&*file)));
        let path = path.expect("a name").to_string_lossy().into_owned();
        if !rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file() || path.starts_with("/proc") {
            return self.inner.attach(file);
        }
        if stat.st_size == 0 {
            File::options().write(true).open(&path).expect("open").set_len(ROOM).expect("extend");
        }
        let mode = rustix::fs::fcntl_getfl(&file).expect("flags") & rustix::fs::OFlags::ACCMODE;
        let write = mode != rustix::fs::OFlags::RDONLY;
        let server = Server::nbdkit(&["file", &path]).expect("there was one before");
        let purpose = Purpose { read: true, write, stream: false };
        let device = nbd::open(server.connect(1), &server.remote(""), None, "remote", purpose)?;
        let port = self.inner.attach(Arc::clone(device.file()));
        self.served.push((device, server));
        port
    }

    fn detach(&mut self, port: Port) {
        self.inner.detach(port);
    }

    fn push(&mut self, op: Op) -> Result<(), (Refused, Op)> {
        self.inner.push(op)
    }

    fn kick(&mut self) -> Result<(), Error> {
        self.inner.kick()
    }

    fn wait(&mut self, deadline: Option<Instant>) -> Result<(), Error> {
        self.inner.wait(deadline)
    }

    fn reap(&mut self, done: &mut Vec<Done>) {
        self.inner.reap(done);
    }

    fn cancel(&mut self, port: Port) {
        self.inner.cancel(port);
    }

    fn in_flight(&self) -> u32 {
        self.inner.in_flight()
    }

    fn waker(&self) -> Arc<dyn Wake> {
        self.inner.waker()
    }

    fn syscalls(&self) -> u64 {
        self.inner.syscalls()
    }

    fn facts(&self) -> QueueFacts {
        self.inner.facts()
    }
}

thread_local! {
    /// One world for each test, as each has a thread of its own.
    static WORLD: World = World::with(tests::seed(), Options { short_per_mille: 200, ..Options::default() });
}

pub fn simulated(arena: &Arena, depth: u32) -> Option<Box<dyn Queue>> {
    Some(WORLD.with(|world| world.queue(arena, depth)))
}

pub fn simulated_disk() -> (Scratch, File) {
    WORLD.with(|world| {
        let disk = world.add(Image::zeros(0), DiskOptions::default()).expect("a simulated disk");
        (Scratch(world.path(disk)), world.descriptor(disk).expect("its descriptor").into())
    })
}

pub fn uring(arena: &Arena, depth: u32) -> Option<Box<dyn Queue>> {
    match UringQueue::new(arena, depth) {
        Ok(queue) => Some(Box::new(queue)),
        Err(error) if matches!(error.kind(), ErrorKind::Denied | ErrorKind::Unsupported) => {
            eprintln!("SKIPPED: no io_uring here: {}", error.chain());
            None
        }
        Err(error) => panic!("{error:?}"),
    }
}

pub fn threads(_: &Arena, depth: u32) -> Option<Box<dyn Queue>> {
    Some(Box::new(ThreadsQueue::new(3, depth).expect("threads")))
}

pub fn bench(make: Make, buffers: u32, bytes: u32, depth: u32) -> Option<Bench> {
    let mut arena = Arena::new(buffers, bytes).expect("arena");
    let queue = (make.queue)(&arena, depth)?;
    Some(Bench { queue, free: arena.take_all() })
}

impl Bench {
    pub fn attach(&mut self, file: impl Into<OwnedFd>) -> Port {
        self.queue.attach(Arc::new(file.into())).expect("attach")
    }

    pub fn buf(&mut self) -> Buf {
        self.free.pop().expect("a free buffer")
    }

    pub fn push(&mut self, token: u64, port: Port, what: What) {
        self.queue.push(Op { token, port, what }).expect("accepted");
    }

    /// Wait for at least one completion.
    pub fn next(&mut self) -> Vec<Done> {
        let deadline = Instant::now() + PATIENCE;
        let mut done = Vec::new();
        while done.is_empty() {
            assert!(Instant::now() < deadline, "nothing completes");
            self.queue.wait(Some(deadline)).expect("wait");
            self.queue.reap(&mut done);
        }
        done
    }

    /// One operation, start to end.
    pub fn run(&mut self, port: Port, what: What) -> Done {
        self.push(77, port, what);
        let mut done = self.next();
        assert_eq!((done.len(), done[0].token), (1, 77));
        done.remove(0)
    }

    /// Transfer that must succeed; the buffer returns to the free ones. Gives its bytes.
    pub fn read(&mut self, port: Port, position: Position, span: std::ops::Range<u32>) -> Vec<u8> {
        let buf = self.buf();
        let start = span.start as usize;
        let done = self.run(port, What::Read { position, buf, span });
        let count = done.result.expect("read") as usize;
        let buf = done.buf.expect("the buffer comes back");
        let bytes = buf[start..start + count].to_vec();
        self.free.push(buf);
        bytes
    }

    pub fn write(&mut self, port: Port, position: Position, bytes: &[u8]) -> std::io::Result<u32> {
        let mut buf = self.buf();
        buf[..bytes.len()].copy_from_slice(bytes);
        let span = 0..u32::try_from(bytes.len()).expect("fits");
        let done = self.run(port, What::Write { position, buf, span });
        self.free.push(done.buf.expect("the buffer comes back"));
        done.result
    }
}

/// A file that is gone when dropped.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new() -> (Self, File) {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("backend-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
        let file = File::options().read(true).write(true).create_new(true).open(&path).expect("create");
        (Self(path), file)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // A simulated disk has no name to remove.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Bytes that differ everywhere, from a seed.
pub fn noise(seed: u64, count: usize) -> Vec<u8> {
    let mut random = Random(seed | 1);
    (0..count).map(|_| random.next().to_le_bytes()[3]).collect()
}

/// xorshift64*: enough for tests, and reproducible.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

pub fn errno(done: &Done) -> Option<i32> {
    done.result.as_ref().err().and_then(std::io::Error::raw_os_error)
}
