//! What went wrong, in the words of the wire, and the exit status it means.
//!
//! The one place where an [`ErrorKind`] becomes an exit status.

use std::fmt;
use std::io;

use proto::errno::describe;
use proto::{ErrorKind, Failure};

/// The exit statuses: a contract with scripts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// What was asked is done.
    Done = 0,
    /// The job failed, was cancelled or was refused.
    Failed = 1,
    /// The command line, or the values in it, make no sense.
    Usage = 2,
    /// No daemon, or not one we can talk to.
    Unreachable = 3,
    /// The key does not fit, or the data is damaged.
    WrongKey = 4,
    /// Verification found a difference.
    Difference = 5,
    /// Left at once: on a second interrupt, at a prompt, or when only watching.
    Interrupted = 130,
}

impl Exit {
    /// The status a failure of this kind ends with.
    pub fn of(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::Invalid | ErrorKind::Unsupported => Self::Usage,
            ErrorKind::Version | ErrorKind::ShuttingDown => Self::Unreachable,
            ErrorKind::WrongKey => Self::WrongKey,
            ErrorKind::Difference => Self::Difference,
            ErrorKind::Denied
            | ErrorKind::NotFound
            | ErrorKind::Conflict
            | ErrorKind::Limit
            | ErrorKind::Damaged
            | ErrorKind::Io
            | ErrorKind::NoSpace
            | ErrorKind::Cancelled
            | ErrorKind::Internal => Self::Failed,
        }
    }
}

/// A failure on its way to the user: one sentence (what, where, why), a next step, and an exit status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// The status to leave with.
    pub exit: Exit,
    /// What the wire would say; boxed, because errors are rare and results are everywhere.
    pub failure: Box<Failure>,
}

/// `std::result::Result` with our [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// `message` in lower case without a full stop; the status follows from the kind.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            exit: Exit::of(kind),
            failure: Box::new(Failure { kind, message: message.into(), hint: None }),
        }
    }

    /// The command line is wrong.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, message)
    }

    /// There is no daemon to talk to.
    pub fn unreachable(message: impl Into<String>) -> Self {
        Self { exit: Exit::Unreachable, ..Self::new(ErrorKind::Io, message) }
    }

    /// A failed system call: `what: at: why`.
    pub fn io(what: &str, at: impl fmt::Display, source: impl Into<io::Error>) -> Self {
        let source = source.into();
        let kind = match source.kind() {
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            io::ErrorKind::PermissionDenied => ErrorKind::Denied,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
            _ => ErrorKind::Io,
        };
        Self::new(kind, format!("{what}: {at}: {}", describe(&source)))
    }

    /// The next step.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.failure.hint = Some(hint.into());
        self
    }
}

impl Error {
    /// What may explain a key that does not fit, unless there is a better hint.
    #[must_use]
    pub fn doubted(self, doubt: Option<String>) -> Self {
        match doubt {
            Some(doubt) if self.failure.kind == ErrorKind::WrongKey && self.failure.hint.is_none() => {
                self.hint(doubt)
            }
            _ => self,
        }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        Self { exit: Exit::of(failure.kind), failure: Box::new(failure) }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cryptctl: {}", printable(&self.failure.message))?;
        if let Some(hint) = &self.failure.hint {
            write!(f, "\nhint: {}", printable(hint))?;
        }
        Ok(())
    }
}

/// Names come from disks, other users and daemons: nothing in them may steer the terminal.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_the_documented_status() {
        for (kind, status) in [
            (ErrorKind::Invalid, 2),
            (ErrorKind::Unsupported, 2),
            (ErrorKind::Version, 3),
            (ErrorKind::ShuttingDown, 3),
            (ErrorKind::WrongKey, 4),
            (ErrorKind::Difference, 5),
            (ErrorKind::Cancelled, 1),
            (ErrorKind::Io, 1),
            (ErrorKind::Conflict, 1),
            (ErrorKind::Internal, 1),
            (ErrorKind::Damaged, 1),
        ] {
            assert_eq!(Exit::of(kind) as u8, status, "{kind:?}");
        }
    }

    #[test]
    fn an_error_is_one_line_and_a_hint() {
        let error =
            Error::io("cannot open", "/x\x1b[31m", io::Error::from_raw_os_error(2)).hint("look again");
        assert_eq!(
            error.to_string(),
            "cryptctl: cannot open: /x\u{fffd}[31m: no such file or directory (ENOENT)\nhint: look again"
        );
        assert_eq!(error.exit, Exit::Failed);
    }
}
