//! One error type for everything that can go wrong outside our control.
//!
//! `Display` prints this level only (`what: where`); the reporter, [`Error::chain`], prints the causes. A cause is never
//! turned into a string on the way, so its kind survives.

use std::error::Error as StdError;
use std::fmt;

pub use proto::ErrorKind;

/// What failed, where, and why.
pub struct Error {
    kind: ErrorKind,
    what: String,
    at: Option<String>,
    hint: Option<String>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// `std::result::Result` with our [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// `what` in lower case without a full stop: "read failed", "unknown kernel".
    pub fn new(kind: ErrorKind, what: impl Into<String>) -> Self {
        Self { kind, what: what.into(), at: None, hint: None, source: None }
    }

    /// A failed system call; the kind follows from the errno (no room, or plain I/O).
    pub fn io(what: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        let source = source.into();
        let kind = match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => ErrorKind::NoSpace,
            Some(libc::EACCES | libc::EPERM) => ErrorKind::Denied,
            Some(libc::ECANCELED) => ErrorKind::Cancelled,
            _ => ErrorKind::Io,
        };
        Self { kind, what: what.into(), at: None, hint: None, source: Some(Box::new(source)) }
    }

    /// Where it happened: a name, with an extent if one is at fault.
    #[must_use]
    pub fn at(mut self, at: impl fmt::Display) -> Self {
        self.at = Some(at.to_string());
        self
    }

    /// What the user can do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The same, unless there is a hint already.
    #[must_use]
    pub fn or_hint(self, hint: &str) -> Self {
        if self.hint.is_some() { self } else { self.hint(hint) }
    }

    /// The cause.
    #[must_use]
    pub fn because(mut self, source: impl StdError + Send + Sync + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }

    /// Another kind; what, where and why stay.
    #[must_use]
    pub fn with_kind(mut self, kind: ErrorKind) -> Self {
        self.kind = kind;
        self
    }

    /// Formats call bytes `Invalid` that they cannot read; of bytes that were found on a device this means `Damaged`. Other kinds stay.
    #[must_use]
    pub fn as_damage(self) -> Self {
        if self.kind == ErrorKind::Invalid { self.with_kind(ErrorKind::Damaged) } else { self }
    }

    /// The stable kind to match on.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The whole chain on one line, outermost first.
    #[must_use]
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            text.push_str(": ");
            match error.downcast_ref::<std::io::Error>() {
                Some(system) => text.push_str(&proto::errno::describe(system)),
                None => text.push_str(&error.to_string()),
            }
            cause = error.source();
        }
        text
    }

    /// This error as the wire carries it.
    #[must_use]
    pub fn to_failure(&self) -> proto::Failure {
        proto::Failure { kind: self.kind, message: self.chain(), hint: self.hint.clone() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        if let Some(at) = &self.at {
            write!(f, ": {at}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}({})", self.kind, self.chain())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_reads_what_where_why() {
        let error = Error::io("read failed", std::io::Error::from_raw_os_error(libc::EIO))
            .at("/dev/vdb sectors 8..16");
        assert_eq!(error.chain(), "read failed: /dev/vdb sectors 8..16: input/output error (EIO)");
        assert_eq!(error.kind(), ErrorKind::Io);
    }

    #[test]
    fn what_is_invalid_on_a_disk_is_damage_and_says_the_same() {
        let error = |kind| Error::new(kind, "what").at("where").hint("do").as_damage();
        let damage = error(ErrorKind::Invalid);
        assert_eq!((damage.kind(), damage.chain().as_str()), (ErrorKind::Damaged, "what: where"));
        assert_eq!(damage.to_failure().hint.as_deref(), Some("do"));
        assert_eq!(error(ErrorKind::Unsupported).kind(), ErrorKind::Unsupported);
    }
}
