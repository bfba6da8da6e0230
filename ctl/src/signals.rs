//! Signals that mean "stop", as something that can be polled.
//!
//! They are caught only while there is something to put back: a terminal without echo, a job that must be undone. At
//! all other times they end the process as usual. What was ignored when we were started (nohup, background jobs of
//! scripts) stays ignored.

use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Once};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::{SigId, low_level};

use crate::report::{Error, Result};

/// A handler cannot be taken back, so what is not caught ends the process by this flag.
static UNCAUGHT: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);
static DEFAULTS: Once = Once::new();

/// Signals caught for as long as this lives.
pub struct Signals {
    reader: UnixStream,
    handlers: Vec<SigId>,
    /// Keeps the other end open also when every signal is ignored and nobody else does.
    _writer: Option<UnixStream>,
}

impl Signals {
    /// Catch them from now on.
    pub fn catch() -> Result<Self> {
        let failed = |error: std::io::Error| Error::io("cannot catch signals", "SIGINT", error);
        let (reader, writer) = UnixStream::pair().map_err(failed)?;
        let mut signals = Self::from_reader(reader).map_err(failed)?;
        let ignored = ignored_signals();
        let caught =
            || [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|signal| ignored >> (signal - 1) & 1 == 0);
        UNCAUGHT.store(false, Ordering::SeqCst);
        let mut defaults = Ok(());
        DEFAULTS.call_once(|| {
            defaults = caught().try_for_each(|signal| {
                signal_hook::flag::register_conditional_default(signal, Arc::clone(&UNCAUGHT)).map(drop)
            });
        });
        defaults.map_err(failed)?;
        for signal in caught() {
            let handler = low_level::pipe::register(signal, writer.try_clone().map_err(failed)?);
            signals.handlers.push(handler.map_err(failed)?);
        }
        signals._writer = Some(writer);
        Ok(signals)
    }

    fn from_reader(reader: UnixStream) -> std::io::Result<Self> {
        reader.set_nonblocking(true)?;
        Ok(Self { reader, handlers: Vec::new(), _writer: None })
    }

    /// Signals that come as bytes from `reader`, for tests: a real one would reach every test of the process.
    #[cfg(test)]
    pub fn from_bytes(reader: UnixStream) -> Self {
        Self::from_reader(reader).expect("a socket")
    }

    /// How many came since last asked.
    pub fn take(&mut self) -> usize {
        self.reader.read(&mut [0; 16]).unwrap_or(0)
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.reader.as_fd()
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        UNCAUGHT.store(true, Ordering::SeqCst);
        for handler in self.handlers.drain(..) {
            low_level::unregister(handler);
        }
    }
}

/// The mask of ignored signals; bit n-1 is signal n (proc(5), `SigIgn`).
fn ignored_signals() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}
