//! Who can open the volume, from which version on, or why not.
//!
//! What is said of other programs is taken from their sources and release notes, not from trying them.

use proto::luks::{Summary, Tool, Version};

use super::passphrase::Convention;
use crate::format::luks2::metadata::SegmentKind;
use crate::volume::{Header, keyslots};

/// The stripe period librbd images usually have.
const STRIPE_BYTES: u64 = 4 << 20;

/// The volume as a tool sees it.
struct Case<'a> {
    header: &'a Header,
    version: Version,
    /// Cipher, mode and IV generator of the first data area: `aes`, `xts`, `plain64`.
    cipher: (&'a str, &'a str, &'a str),
    name: &'a str,
    key_bits: u32,
    unit: u32,
    offset: u64,
    areas: usize,
    requirements: &'a [String],
    has_integrity: bool,
    is_detached: bool,
    passphrase: Option<&'a Convention>,
}

/// Nobody opens a volume without a header.
pub(super) fn of_ruins() -> Vec<Tool> {
    ["cryptsetup", "kernel", "qemu", "librbd", "nbdkit", "cryptctl"]
        .map(|name| tool(name, Err("the header is damaged".to_owned())))
        .into()
}

pub(super) fn judge(
    header: &Header,
    summary: &Summary,
    is_detached: bool,
    passphrase: Option<&Convention>,
) -> Vec<Tool> {
    let first = summary.segments.iter().find(|segment| !segment.cipher.is_empty());
    let name = first.map_or("", |segment| segment.cipher.as_str());
    let mut parts = name.splitn(3, '-');
    let mut part = || parts.next().unwrap_or_default();
    let case = Case {
        header,
        version: summary.version,
        cipher: (part(), part(), part()),
        name,
        key_bits: first.map_or(0, |segment| segment.key_bits),
        unit: first.map_or(0, |segment| segment.data_unit),
        offset: first.map_or(0, |segment| segment.offset),
        areas: summary.segments.len(),
        requirements: &summary.requirements,
        has_integrity: has_integrity(header),
        is_detached,
        passphrase,
    };
    vec![
        tool("cryptsetup", case.cryptsetup()),
        tool("kernel", case.kernel()),
        tool("qemu", case.qemu()),
        tool("librbd", case.librbd()),
        tool("nbdkit", case.nbdkit()),
        tool("cryptctl", case.cryptctl()),
    ]
}

fn tool(name: &str, verdict: Result<String, String>) -> Tool {
    let (opens, remark) = match verdict {
        Ok(remark) => (true, remark),
        Err(remark) => (false, remark),
    };
    Tool { name: name.to_owned(), opens, remark }
}

fn has_integrity(header: &Header) -> bool {
    let Header::Luks2(loaded) = header else { return false };
    let with = |kind: &SegmentKind| matches!(kind, SegmentKind::Crypt { integrity: Some(_), .. });
    loaded.header.metadata.data_segments().any(|(_, segment)| with(&segment.kind))
}

/// The first cryptsetup that honours a requirement.
fn since(requirement: &str) -> Option<&'static str> {
    match requirement {
        "offline-reencrypt" => Some("2.0.0"),
        "online-reencrypt" => Some("2.2.0"),
        "online-reencrypt-v2" => Some("2.4.3"),
        "online-reencrypt-v3" => Some("2.5.0"),
        "opal" => Some("2.7.0"),
        "inline-hw-tags" => Some("2.8.0"),
        _ => None,
    }
}

impl Case<'_> {
    fn no_keyslot(&self) -> bool {
        keyslots::bound(self.header).is_empty()
    }

    fn cryptsetup(&self) -> Result<String, String> {
        let mut version = if self.version == Version::Luks1 { "1.0.0" } else { "2.0.0" };
        for requirement in self.requirements {
            match since(requirement) {
                Some(since) => version = version.max(since),
                None => return Err(format!("no version known here honours the requirement {requirement}")),
            }
        }
        if self.no_keyslot() {
            return Err("no keyslot opens the data; with the volume key it can".to_owned());
        }
        Ok(format!("from {version} on"))
    }

    fn kernel(&self) -> Result<String, String> {
        if self.name.is_empty() {
            return Err("no data area is encrypted by software".to_owned());
        }
        // It reads no headers: cryptsetup does that for it.
        self.cryptsetup()?;
        let (version, why) = match self.cipher {
            _ if self.unit > 512 => ("4.12", format!("data units of {} bytes", self.unit)),
            _ if self.has_integrity => ("4.12", "data integrity".to_owned()),
            (_, _, "plain64") => ("2.6.33", "64-bit counters".to_owned()),
            (_, "xts", _) => ("2.6.24", "XTS".to_owned()),
            _ => ("2.6.4", "dm-crypt".to_owned()),
        };
        Ok(format!("from {version} on ({why}), set up by cryptsetup"))
    }

    fn qemu(&self) -> Result<String, String> {
        if self.version == Version::Luks2 {
            return Err("it reads LUKS1 only".to_owned());
        }
        let (cipher, mode, iv) = self.cipher;
        let knows = matches!(cipher, "aes" | "serpent" | "twofish" | "cast5")
            && matches!(mode, "xts" | "cbc" | "ecb" | "ctr")
            && (matches!(iv, "" | "plain" | "plain64") || iv.starts_with("essiv:"));
        if !knows {
            return Err(format!("it does not know the cipher {}", self.name));
        }
        if self.no_keyslot() {
            return Err("no keyslot opens the data".to_owned());
        }
        if self.passphrase.is_some_and(|passphrase| !passphrase.is_text) {
            return Err("this passphrase is binary, and it takes text only".to_owned());
        }
        if self.is_detached {
            return Ok("from 9.0 on (detached header), with a passphrase that is text".to_owned());
        }
        Ok("from 2.6 on, with a passphrase that is text".to_owned())
    }

    fn librbd(&self) -> Result<String, String> {
        if !self.requirements.is_empty() || self.areas != 1 || self.has_integrity {
            return Err("it opens volumes with one plain data area and no requirements".to_owned());
        }
        if self.name != "aes-xts-plain64" || !matches!(self.key_bits, 0 | 256 | 512) {
            return Err(format!(
                "it knows aes-xts-plain64 only, not {} of {} bits",
                self.name, self.key_bits
            ));
        }
        let unit = if self.version == Version::Luks1 { 512 } else { 4096 };
        if self.unit != unit {
            return Err(format!("it wants data units of {unit} bytes, not {}", self.unit));
        }
        if self.is_detached || self.offset == 0 || !self.offset.is_multiple_of(STRIPE_BYTES) {
            return Err(format!(
                "it wants the data to begin at a multiple of the stripe period (usually {STRIPE_BYTES} bytes), \
                 not at {}",
                self.offset
            ));
        }
        if self.no_keyslot() {
            return Err("no keyslot opens the data".to_owned());
        }
        Ok("from Ceph 16.2 on, as the content of an image".to_owned())
    }

    fn nbdkit(&self) -> Result<String, String> {
        if self.version == Version::Luks2 {
            return Err("its luks filter reads LUKS1 only".to_owned());
        }
        let (cipher, mode, iv) = self.cipher;
        if cipher != "aes"
            || !matches!(mode, "xts" | "cbc" | "ecb")
            || !matches!(iv, "" | "plain" | "plain64")
        {
            return Err(format!("its luks filter knows AES with plain counters only, not {}", self.name));
        }
        if self.is_detached {
            return Err("its luks filter knows no detached headers".to_owned());
        }
        if self.no_keyslot() {
            return Err("no keyslot opens the data".to_owned());
        }
        Ok("luks filter, from 1.32 on".to_owned())
    }

    fn cryptctl(&self) -> Result<String, String> {
        self.header.data_areas().map_err(|error| error.chain())?;
        if self.no_keyslot() {
            return Err("no keyslot opens the data; with the volume key it can".to_owned());
        }
        Ok("this version".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_as_they_are_written() {
        // `max` of texts: right as long as every part has one digit.
        let all =
            ["offline-reencrypt", "online-reencrypt", "online-reencrypt-v2", "online-reencrypt-v3", "opal"];
        let versions: Vec<_> = all.iter().map(|name| since(name).expect("known")).collect();
        assert!(versions.is_sorted());
        assert_eq!(since("frobnicate"), None);
    }
}
