//! Which copy of a header is to be believed.
//!
//! | primary | secondary | used |
//! |---|---|---|
//! | good | good, same seqid | primary |
//! | good | good, other seqid | the larger seqid; the other is obsolete |
//! | good | bad | primary |
//! | bad | good | secondary |
//! | bad | bad | none |
//!
//! The secondary copy follows the primary. If the primary's checksum is wrong its size means nothing, and the secondary is
//! looked for at the nine places where one can be; but not behind the header of another version of LUKS. Two good copies with one seqid and different content cannot come of an
//! interrupted write; cryptsetup uses the primary and says nothing, here the secondary counts as damaged, too.

use crate::error::{Error, ErrorKind, Result};
use crate::format::luks2::binary::{self, BINARY_BYTES, Binary};
use crate::format::luks2::metadata::Metadata;
use crate::format::luks2::{COPY_BYTES, Copy, Header, Health, Loaded};

type Read<'a> = &'a mut dyn FnMut(u64, &mut [u8]) -> Result<()>;

/// One copy that is valid in itself.
struct Valid {
    binary: Binary,
    metadata: Metadata,
}

/// What is wrong with one copy.
struct Bad {
    error: Error,
    /// Magic, or more, was found.
    trace: bool,
    /// A header of another version of LUKS: what lies behind it is of a volume that is no more.
    foreign: bool,
    /// Its checksum is right, so its size can be believed.
    copy_bytes: Option<u64>,
    salt: [u8; 64],
}

type Found = Result<Valid, Bad>;

pub(super) fn load(read: Read<'_>) -> Result<Loaded> {
    let primary = read_copy(read, Copy::Primary, 0)?;
    let at = match &primary {
        Ok(valid) => Some(valid.binary.copy_bytes),
        Err(bad) => bad.copy_bytes,
    };
    let secondary = match at {
        Some(at) => read_copy(read, Copy::Secondary, at)?,
        None if matches!(&primary, Err(bad) if bad.foreign) => Err(Bad::unread("not looked for")),
        None => probe(read)?,
    };
    let loaded = choose(primary, secondary)?;
    let end = loaded.header.backup_bytes();
    read(end - 512, &mut [0; 512]).map_err(|error| match error.kind() {
        ErrorKind::Invalid => Error::new(
            ErrorKind::Invalid,
            format!("device ends before its keyslots area does, at byte {end}"),
        ),
        _ => error,
    })?;
    Ok(loaded)
}

/// The first secondary copy with a right checksum at any of its legal places, else the most telling of what was found.
fn probe(read: Read<'_>) -> Result<Found> {
    let mut best = None;
    let mut at = *COPY_BYTES.start();
    while at <= *COPY_BYTES.end() {
        match read_copy(read, Copy::Secondary, at)? {
            Err(bad) if bad.copy_bytes.is_none() => {
                let more_telling = best.as_ref().is_none_or(|best: &Bad| bad.trace && !best.trace);
                if more_telling {
                    best = Some(bad);
                }
            }
            found => return Ok(found),
        }
        at *= 2;
    }
    Ok(Err(best.unwrap_or_else(|| Bad::unread("no LUKS2 magic"))))
}

/// Errors that concern the device as a whole; all others concern this copy.
fn read_copy(read: Read<'_>, copy: Copy, offset: u64) -> Result<Found> {
    let mut bad = Bad {
        error: Error::new(ErrorKind::Invalid, ""),
        trace: false,
        foreign: false,
        copy_bytes: None,
        salt: [0; 64],
    };
    match try_copy(read, copy, offset, &mut bad) {
        Ok(valid) => Ok(Ok(valid)),
        Err(error) if matches!(error.kind(), ErrorKind::Invalid | ErrorKind::Unsupported | ErrorKind::Io) => {
            bad.error = error;
            Ok(Err(bad))
        }
        Err(error) => Err(error),
    }
}

fn try_copy(read: Read<'_>, copy: Copy, offset: u64, bad: &mut Bad) -> Result<Valid> {
    let mut first = [0; BINARY_BYTES];
    read(offset, &mut first)?;
    bad.trace = binary::has_magic(&first, copy);
    bad.foreign = bad.trace && copy == Copy::Primary && binary::version(&first) != Some(2);
    let copy_bytes = binary::check(&first, copy, offset)?;
    let bytes = usize::try_from(copy_bytes).expect("4 MiB at most");
    let mut whole = vec![0; bytes];
    // The whole copy in one piece: what is checked is what is used.
    read(offset, &mut whole)?;
    let again = whole.first_chunk().expect("a copy is longer than its binary header");
    if binary::check(again, copy, offset)? != copy_bytes {
        return Err(Error::new(ErrorKind::Invalid, "header changes while it is read"));
    }
    let binary = binary::parse(&whole)?;
    bad.copy_bytes = Some(copy_bytes);
    bad.salt = binary.salt;
    let metadata = Metadata::parse(text(&whole[BINARY_BYTES..])?)?;
    if metadata.config.json_size + BINARY_BYTES as u64 != copy_bytes {
        return Err(Error::new(ErrorKind::Invalid, "config json_size is not that of the binary header"));
    }
    Ok(Valid { binary, metadata })
}

/// The text of a JSON area, which ends with a NUL; all after it is zero.
fn text(area: &[u8]) -> Result<&[u8]> {
    let invalid = |what: &str| Err(Error::new(ErrorKind::Invalid, what.to_owned()));
    let Some(end) = area.iter().position(|byte| *byte == 0) else {
        return invalid("no NUL after the JSON text");
    };
    if area[end..].iter().any(|byte| *byte != 0) {
        return invalid("bytes after the JSON text");
    }
    Ok(&area[..end])
}

impl Bad {
    fn unread(why: &str) -> Self {
        let error = Error::new(ErrorKind::Invalid, why.to_owned());
        Self { error, trace: false, foreign: false, copy_bytes: None, salt: [0; 64] }
    }

    fn health(&self) -> Health {
        Health::Damaged(self.error.chain())
    }
}

impl Valid {
    fn into_header(self, copy: Copy, other_salt: [u8; 64]) -> Header {
        let own = self.binary.salt;
        Header {
            copy_bytes: self.binary.copy_bytes,
            seqid: self.binary.seqid,
            label: self.binary.label,
            checksum_alg: self.binary.checksum_alg,
            uuid: self.binary.uuid,
            subsystem: self.binary.subsystem,
            salts: match copy {
                Copy::Primary => [own, other_salt],
                Copy::Secondary => [other_salt, own],
            },
            metadata: self.metadata,
        }
    }

    fn has_content_of(&self, other: &Self) -> bool {
        let binary = Binary { salt: other.binary.salt, ..self.binary.clone() };
        binary == other.binary && self.metadata == other.metadata
    }
}

fn choose(primary: Found, secondary: Found) -> Result<Loaded> {
    let (header, health) = match (primary, secondary) {
        (Ok(primary), Ok(secondary)) => {
            let same = primary.has_content_of(&secondary);
            let salts = [primary.binary.salt, secondary.binary.salt];
            match primary.binary.seqid.cmp(&secondary.binary.seqid) {
                std::cmp::Ordering::Less => {
                    (secondary.into_header(Copy::Secondary, salts[0]), [Health::Obsolete, Health::Good])
                }
                std::cmp::Ordering::Equal => {
                    let health = if same {
                        Health::Good
                    } else {
                        Health::Damaged("it differs from the primary, whose seqid is the same".into())
                    };
                    (primary.into_header(Copy::Primary, salts[1]), [Health::Good, health])
                }
                std::cmp::Ordering::Greater => {
                    (primary.into_header(Copy::Primary, salts[1]), [Health::Good, Health::Obsolete])
                }
            }
        }
        (Ok(primary), Err(bad)) => {
            (primary.into_header(Copy::Primary, bad.salt), [Health::Good, bad.health()])
        }
        (Err(bad), Ok(secondary)) => {
            (secondary.into_header(Copy::Secondary, bad.salt), [bad.health(), Health::Good])
        }
        (Err(primary), Err(secondary)) => {
            let (copy, bad) = if primary.trace || !secondary.trace {
                ("primary header", primary)
            } else {
                ("secondary header", secondary)
            };
            // A device that could not be read is not a device with a damaged header.
            let kind = bad.error.kind();
            let error = Error::new(kind, "no valid LUKS2 header").at(copy).because(bad.error);
            return Err(error);
        }
    };
    Ok(Loaded { header, health })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::luks2::metadata::{Digest, Segment};

    /// Sparse enough for a test: both copies and an (empty) keyslots area.
    fn image(seqid: u64, label: &str) -> (Header, Vec<u8>) {
        let segment = Segment::crypt(0, None, "aes-xts-plain64", 512);
        let mut header =
            Header::new(16 << 10, 4096, segment, "uuid".into(), [[1; 64], [2; 64]]).expect("legal");
        header.seqid = seqid;
        header.label = label.into();
        let digest = Digest::pbkdf2("sha256", 1000, vec![3; 32], vec![4; 32]);
        header.metadata.add_digest(digest, &[], &[0]).expect("room");
        let mut bytes = header.to_bytes(Copy::Primary).expect("valid");
        bytes.extend(header.to_bytes(Copy::Secondary).expect("valid"));
        bytes.resize(36 << 10, 0);
        (header, bytes)
    }

    fn read_from(bytes: &[u8]) -> impl FnMut(u64, &mut [u8]) -> Result<()> {
        move |offset, into| {
            let offset = usize::try_from(offset).expect("small");
            let end = offset + into.len();
            let from =
                bytes.get(offset..end).ok_or_else(|| Error::new(ErrorKind::Invalid, "the file ends"))?;
            into.copy_from_slice(from);
            Ok(())
        }
    }

    fn load_from(bytes: &[u8]) -> Result<Loaded> {
        load(&mut read_from(bytes))
    }

    #[test]
    fn what_was_written_is_read() {
        let (header, bytes) = image(7, "a label");
        let loaded = load_from(&bytes).expect("valid");
        assert_eq!(loaded.header, header);
        assert_eq!(loaded.health, [Health::Good, Health::Good]);
    }

    #[test]
    fn the_newer_copy_is_used() {
        let (_, old) = image(7, "old");
        let (_, new) = image(8, "new");
        let split = 16 << 10;
        let torn = [&new[..split], &old[split..]].concat();
        let loaded = load_from(&torn).expect("valid");
        assert_eq!((loaded.header.label.as_str(), loaded.health), ("new", [Health::Good, Health::Obsolete]));
        let torn = [&old[..split], &new[split..]].concat();
        let loaded = load_from(&torn).expect("valid");
        assert_eq!((loaded.header.label.as_str(), loaded.health), ("new", [Health::Obsolete, Health::Good]));
        assert_eq!(loaded.header.salts, [[1; 64], [2; 64]]);
    }
}
