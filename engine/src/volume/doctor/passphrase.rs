//! Conventions of passphrases that other tools cannot use, or use differently.

use super::Report;
use crate::crypto::Secret;

/// Bytes cryptsetup takes at its prompt; a constant of the tool, not of the passphrase.
const PROMPT_BYTES_MAX: usize = 512;

/// What a passphrase looks like: nothing that would help to guess it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Convention {
    /// UTF-8 without NUL.
    pub is_text: bool,
    /// It ends in a line feed.
    has_newline: bool,
    /// Control characters other than that.
    has_control: bool,
    /// Something that no US keyboard types.
    has_beyond_ascii: bool,
    /// Pairs of lower-case hexadecimal digits, as many as a key has.
    is_hex: bool,
    /// Longer than a prompt takes.
    is_long: bool,
}

impl Convention {
    pub(super) fn of(secret: &Secret) -> Self {
        let bytes = secret.as_bytes();
        let hex = |byte: &u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        let (body, has_newline) = match bytes.split_last() {
            Some((b'\n', body)) => (body, true),
            _ => (bytes, false),
        };
        Self {
            is_text: std::str::from_utf8(bytes).is_ok() && !bytes.contains(&0),
            has_newline,
            has_control: body.iter().any(u8::is_ascii_control),
            has_beyond_ascii: !bytes.is_ascii(),
            is_hex: matches!(bytes.len(), 32 | 48 | 64 | 128) && bytes.iter().all(hex),
            is_long: bytes.len() > PROMPT_BYTES_MAX,
        }
    }

    pub(super) fn explain(&self, report: &mut Report) {
        let about = "passphrase";
        if !self.is_text {
            report.weak(
                about,
                "it is binary (a NUL byte, or no valid UTF-8): QEMU takes text only, and no prompt can take it",
                "use text, such as the hexadecimal or base64 form of the key, for a keyslot that other tools open",
            );
        }
        if self.has_newline {
            report.weak(
                about,
                "it ends in a line feed, which is part of it: cryptsetup keeps it from a key file and drops it from \
                 standard input and at the prompt, QEMU keeps it",
                "make the file without the line feed, unless the keyslot was made with it",
            );
        }
        if self.is_text && self.has_control {
            report.note(about, "it has control characters, which cannot be typed at a prompt", "");
        }
        if self.is_text && self.has_beyond_ascii {
            report.note(
                about,
                "it has characters beyond ASCII: their bytes depend on the keyboard's and the terminal's settings",
                "",
            );
        }
        if self.is_hex {
            report.note(
                about,
                "it looks like a key in lower-case hexadecimal, which is how OpenStack makes a passphrase of a \
                 key-manager secret",
                "there the text is the passphrase, not the bytes it stands for",
            );
        }
        if self.is_long {
            report.note(about, "it is longer than a prompt takes; from a file or a pipe it works", "");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(bytes: &[u8]) -> (Convention, String) {
        let convention = Convention::of(&Secret::copy_of(bytes).expect("memory"));
        let mut report = Report::default();
        convention.explain(&mut report);
        (convention, report.sorted().into_iter().map(|finding| finding.message + "\n").collect())
    }

    #[test]
    fn an_ordinary_passphrase_gives_no_cause_for_remarks() {
        assert_eq!(of(b"correct horse battery staple").1, "");
    }

    #[test]
    fn what_other_tools_cannot_use_is_said() {
        assert!(!of(b"a\0b").0.is_text);
        assert!(!of(b"\xff\xfe").0.is_text);
        assert!(of(b"a\0b").1.contains("QEMU"));
        assert!(of(b"secret\n").1.contains("line feed"));
        assert!(of(b"sec\tret").1.contains("control"));
        assert!(of("gehe\u{ed}m".as_bytes()).1.contains("beyond ASCII"));
        assert!(of(&[b'a'; 64]).1.contains("OpenStack"));
        assert!(!of(&[b'A'; 64]).1.contains("OpenStack"));
        assert!(of(&[b'x'; 513]).1.contains("prompt takes"));
    }
}
