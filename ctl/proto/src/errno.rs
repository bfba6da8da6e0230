//! One wording for system errors, so that both programs say the same: `input/output error (EIO)`.

use std::io;

/// Symbols of the errors that opening, reading, writing and connecting can meet (Linux numbers).
const SYMBOLS: [(i32, &str); 45] = [
    (1, "EPERM"),
    (2, "ENOENT"),
    (4, "EINTR"),
    (5, "EIO"),
    (6, "ENXIO"),
    (7, "E2BIG"),
    (9, "EBADF"),
    (11, "EAGAIN"),
    (12, "ENOMEM"),
    (13, "EACCES"),
    (14, "EFAULT"),
    (16, "EBUSY"),
    (17, "EEXIST"),
    (18, "EXDEV"),
    (19, "ENODEV"),
    (20, "ENOTDIR"),
    (21, "EISDIR"),
    (22, "EINVAL"),
    (23, "ENFILE"),
    (24, "EMFILE"),
    (25, "ENOTTY"),
    (26, "ETXTBSY"),
    (27, "EFBIG"),
    (28, "ENOSPC"),
    (29, "ESPIPE"),
    (30, "EROFS"),
    (32, "EPIPE"),
    (36, "ENAMETOOLONG"),
    (37, "ENOLCK"),
    (38, "ENOSYS"),
    (40, "ELOOP"),
    (61, "ENODATA"),
    (95, "EOPNOTSUPP"),
    (103, "ECONNABORTED"),
    (104, "ECONNRESET"),
    (105, "ENOBUFS"),
    (107, "ENOTCONN"),
    (110, "ETIMEDOUT"),
    (111, "ECONNREFUSED"),
    (116, "ESTALE"),
    (121, "EREMOTEIO"),
    (122, "EDQUOT"),
    (125, "ECANCELED"),
    (126, "ENOKEY"),
    (127, "EKEYEXPIRED"),
];

/// `input/output error (EIO)`: the system's words in lower case, and the symbol in place of the number.
#[must_use]
pub fn describe(error: &io::Error) -> String {
    let text = error.to_string();
    let Some(code) = error.raw_os_error() else { return text };
    let words = text.strip_suffix(&format!(" (os error {code})")).unwrap_or(&text);
    let mut letters = words.chars();
    let words: String = letters.next().into_iter().flat_map(char::to_lowercase).chain(letters).collect();
    match SYMBOLS.iter().find(|(number, _)| *number == code) {
        Some((_, symbol)) => format!("{words} ({symbol})"),
        None => format!("{words} (errno {code})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_system_error_is_words_and_a_symbol() {
        let text = |code| describe(&io::Error::from_raw_os_error(code));
        assert_eq!(text(5), "input/output error (EIO)");
        assert_eq!(text(28), "no space left on device (ENOSPC)");
        assert_eq!(text(84), "invalid or incomplete multibyte or wide character (errno 84)");
        assert_eq!(describe(&io::Error::other("no such luck")), "no such luck");
    }
}
