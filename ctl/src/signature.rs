//! What a block device holds, before it is overwritten.
//!
//! Asks `blkid` of util-linux for a low-level probe, on a descriptor we hold.
//!
//! Why not link libblkid: its Rust binding generates its declarations at build time and so needs clang and the C
//! headers on every machine that builds us, for one question asked once per job; and it is `unsafe` C in the process
//! that holds the key. util-linux is essential on Debian and present wherever block devices are administered. If
//! there is no `blkid`, or one that cannot probe (busybox), the answer is a refusal with a hint, never a guess.

use std::collections::HashMap;
use std::fs::File;
use std::process::{Command, Stdio};

use proto::ErrorKind;

use crate::report::{Error, Result};

/// What was found on `device`, in words, or `None` if it holds no known signature.
pub fn probe(device: &File, name: &str) -> Result<Option<String>> {
    let unknown = |why: String| {
        Error::new(ErrorKind::Unsupported, format!("cannot tell what {name} holds: {why}"))
            .hint("install blkid (package util-linux), or use --force if you are sure")
    };
    let device = device.try_clone().map_err(|error| Error::io("cannot inspect", name, error))?;
    // The sbin directories are not in an ordinary user's PATH on Debian.
    let places = ["/usr/sbin/blkid", "/sbin/blkid", "/usr/bin/blkid", "/bin/blkid"];
    let program = places.into_iter().find(|path| std::path::Path::new(path).exists()).unwrap_or("blkid");
    let output = Command::new(program)
        .args(["-p", "-o", "export", "/proc/self/fd/0"])
        .env_clear()
        .env("LC_ALL", "C")
        .stdin(Stdio::from(device))
        .stderr(Stdio::null())
        .output()
        .map_err(|error| unknown(format!("{program}: {}", proto::errno::describe(&error))))?;
    match output.status.code() {
        Some(0) => Ok(describe(&String::from_utf8_lossy(&output.stdout))),
        // blkid(8): nothing was found.
        Some(2) => Ok(None),
        // blkid(8): more than one kind, and no way to tell which is meant.
        Some(8) => Ok(Some("signatures of several kinds".to_owned())),
        _ => Err(unknown(format!("{program} failed ({})", output.status))),
    }
}

/// `blkid -o export` output in words. A partition's own table entry says nothing of its content.
fn describe(export: &str) -> Option<String> {
    let values: HashMap<&str, &str> = export.lines().filter_map(|line| line.split_once('=')).collect();
    let label = values.get("LABEL").map(|label| format!(" labelled {label}")).unwrap_or_default();
    if let Some(kind) = values.get("TYPE") {
        let what = match (*kind, values.get("USAGE").copied()) {
            ("crypto_LUKS", _) => "a LUKS volume".to_owned(),
            (kind, Some("filesystem")) => format!("a filesystem ({kind})"),
            (kind, Some("raid")) => format!("a member of a {kind} array or volume group"),
            (kind, _) => format!("{kind} data"),
        };
        Some(what + &label)
    } else {
        values.get("PTTYPE").map(|kind| format!("a partition table ({kind})"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_blkid_exports_is_put_into_words() {
        for (export, words) in [
            ("DEVNAME=/x\nTYPE=ext4\nUSAGE=filesystem\n", Some("a filesystem (ext4)")),
            ("LABEL=db\nTYPE=xfs\nUSAGE=filesystem\n", Some("a filesystem (xfs) labelled db")),
            ("VERSION=2\nTYPE=crypto_LUKS\nUSAGE=crypto\n", Some("a LUKS volume")),
            ("TYPE=LVM2_member\nUSAGE=raid\n", Some("a member of a LVM2_member array or volume group")),
            ("TYPE=swap\nUSAGE=other\n", Some("swap data")),
            ("PTUUID=1\nPTTYPE=gpt\n", Some("a partition table (gpt)")),
            ("DEVNAME=/x\nPART_ENTRY_SCHEME=gpt\nPART_ENTRY_NUMBER=1\n", None),
            ("", None),
        ] {
            assert_eq!(describe(export).as_deref(), words, "{export}");
        }
    }

    #[test]
    fn a_real_probe_tells_a_swap_signature_from_nothing() {
        use std::os::unix::fs::FileExt;
        let file = tempfile::tempfile().expect("file");
        file.set_len(1 << 20).expect("size");
        assert_eq!(probe(&file, "x").expect("probe"), None);
        // A swap header: version 1 and a page count at byte 1024, the magic at the end of the first page.
        file.write_all_at(&[1, 0, 0, 0, 255, 0, 0, 0], 1024).expect("write");
        file.write_all_at(b"SWAPSPACE2", 4086).expect("write");
        assert_eq!(probe(&file, "x").expect("probe").as_deref(), Some("swap data"));
    }
}
