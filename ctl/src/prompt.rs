//! Asking for a secret on the terminal, without echo.
//!
//! Always `/dev/tty`, so that it works while standard input and output carry a volume. Characters are read one at a
//! time into a buffer that never grows, and the terminal is put back however this ends.

use std::fs::File;
use std::io::{BufRead, Read, Write};
use std::os::fd::AsFd;

use proto::ErrorKind;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcsetattr};
use zeroize::Zeroizing;

use crate::report::{Error, Exit, Result};
use crate::signals::Signals;

/// Ask; the answer is at most the capacity of `answer`, what is typed beyond is counted as one byte too many.
pub fn ask(question: &str, answer: &mut Zeroizing<Vec<u8>>) -> Result<()> {
    let mut tty = terminal("the key is to be asked for")?;
    let wrap = |error: std::io::Error| Error::io("cannot ask for the key", "/dev/tty", error);
    // From the first change of the terminal on, a signal must not end us before it is put back.
    let mut signals = Signals::catch()?;
    let before = tcgetattr(&tty).map_err(|errno| wrap(errno.into()))?;
    let mut silent = before.clone();
    // Keys that would send a signal arrive as characters: a signal would leave the terminal without echo.
    silent.local_modes.remove(LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG);
    silent.special_codes[SpecialCodeIndex::VMIN] = 1;
    silent.special_codes[SpecialCodeIndex::VTIME] = 0;
    let restore = Restore { tty: tty.try_clone().map_err(wrap)?, before };
    tcsetattr(&tty, OptionalActions::Flush, &silent).map_err(|errno| wrap(errno.into()))?;
    tty.write_all(question.as_bytes()).map_err(wrap)?;
    let result = read_line(&mut tty, answer, &mut signals);
    let _ = tty.write_all(b"\n");
    drop(restore);
    result
}

/// Ask something whose answer is no secret. `why`: what is to be asked, for the refusal where there is no terminal.
pub fn question(why: &str, text: &str) -> Result<String> {
    let mut tty = terminal(why)?;
    let wrap = |error: std::io::Error| Error::io("cannot ask", "/dev/tty", error);
    tty.write_all(text.as_bytes()).map_err(wrap)?;
    let mut answer = String::new();
    std::io::BufReader::new(tty.take(4096)).read_line(&mut answer).map_err(wrap)?;
    Ok(answer.trim().to_owned())
}

/// The terminal. To ask where there is none is a mistake in the command line, whatever is to be asked.
fn terminal(why: &str) -> Result<File> {
    File::options().read(true).write(true).open("/dev/tty").map_err(|error| {
        let reason = proto::errno::describe(&error);
        Error::usage(format!("{why}, and there is no terminal to ask on: /dev/tty: {reason}"))
            .hint("name the key's place: file:PATH, fd:N or keyring:NAME")
    })
}

struct Restore {
    tty: File,
    before: Termios,
}

impl Drop for Restore {
    fn drop(&mut self) {
        let _ = tcsetattr(&self.tty, OptionalActions::Flush, &self.before);
    }
}

fn read_line(
    from: &mut (impl Read + AsFd),
    answer: &mut Zeroizing<Vec<u8>>,
    signals: &mut Signals,
) -> Result<()> {
    const INTERRUPT: u8 = 0x03;
    const END: u8 = 0x04;
    const ERASE: [u8; 2] = [0x08, 0x7f];
    const KILL: u8 = 0x15;
    let mut byte = Zeroizing::new([0u8]);
    let interrupted = || Error { exit: Exit::Interrupted, ..Error::new(ErrorKind::Cancelled, "interrupted") };
    loop {
        let mut polled = [PollFd::new(from, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
        match poll(&mut polled, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(Error::io("cannot read the key", "/dev/tty", errno)),
        }
        let [typed, signalled] = polled.map(|fd| !fd.revents().is_empty());
        if signalled && signals.take() > 0 {
            return Err(interrupted());
        }
        if !typed {
            continue;
        }
        let count =
            from.read(&mut *byte).map_err(|error| Error::io("cannot read the key", "/dev/tty", error))?;
        match byte[0] {
            _ if count == 0 => return Ok(()),
            b'\n' | b'\r' | END => return Ok(()),
            INTERRUPT => return Err(interrupted()),
            KILL => answer.clear(),
            erase if ERASE.contains(&erase) => {
                answer.pop();
            }
            typed if answer.len() < answer.capacity() => answer.push(typed),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn typed(keys: &[u8]) -> Result<Vec<u8>> {
        let (_sender, signals) = UnixStream::pair().expect("pair");
        let (mut reader, mut writer) = std::io::pipe().expect("pipe");
        writer.write_all(keys).expect("short enough");
        drop(writer);
        let mut answer = Zeroizing::new(Vec::with_capacity(8));
        read_line(&mut reader, &mut answer, &mut Signals::from_bytes(signals)).map(|()| answer.to_vec())
    }

    #[test]
    fn a_signal_ends_the_wait_for_a_key() {
        let (mut sender, signals) = UnixStream::pair().expect("pair");
        let (mut terminal, _keyboard) = std::io::pipe().expect("pipe");
        sender.write_all(b"x").expect("signal");
        let mut answer = Zeroizing::new(Vec::with_capacity(8));
        let result = read_line(&mut terminal, &mut answer, &mut Signals::from_bytes(signals));
        assert_eq!(result.expect_err("interrupted").exit, Exit::Interrupted);
    }

    #[test]
    fn a_line_can_be_corrected() {
        assert_eq!(typed(b"abx\x7fc\nrest").expect("line"), b"abc");
        assert_eq!(typed(b"wrong\x15right\r").expect("line"), b"right");
        assert_eq!(typed(b"\x7f\x7fa").expect("end of file ends the line"), b"a");
    }

    #[test]
    fn the_buffer_never_grows() {
        assert_eq!(typed(&[b'a'; 100]).expect("line").len(), 8);
    }

    #[test]
    fn an_interrupt_leaves_at_once() {
        assert_eq!(typed(b"ab\x03").expect_err("interrupted").exit, Exit::Interrupted);
    }
}
