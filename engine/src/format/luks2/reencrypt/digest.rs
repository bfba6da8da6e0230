//! The bytes the protection digest covers: both keys and all that never changes while a re-encryption runs.
//!
//! One after the other, without separators; texts without a NUL, numbers in network byte order:
//!
//! | bytes | what |
//! |---|---|
//! | `v2` | version of the requirement |
//! | key | of the old side, unless that is plain |
//! | key | of the new side, unless that is plain, or the same key |
//! | text text text | mode, direction, type of the area |
//! | u64 u64 | the area: offset, size |
//! | text u32 | checksum: hash, bytes of a block |
//! | u64 | datashift: bytes it shifts by |
//! | segment segment \\[segment\\] | `backup-previous`, `backup-final`, `backup-moved-segment` if there is one |
//!
//! A segment: type, u64 offset, size (`dynamic` as text, or u64); `crypt` goes on with u64 `iv_tweak`, encryption, u32 `sector_size`.

use super::read::Backups;
use super::{Process, Resilience};
use crate::crypto::Secret;
use crate::error::Result;
use crate::format::luks2::fields::invalid;
use crate::format::luks2::metadata::{Keyslot, Metadata, Segment, SegmentKind};

/// Longest text cryptsetup takes, bytes.
const TEXT_BYTES_MAX: usize = 64;

/// The password of the digest's PBKDF2 (LUKS2 on-disk format, "Reencryption digest").
///
/// # Errors
/// `Invalid`: a key is missing, or metadata that cannot be put into these bytes. No memory.
pub fn message(
    metadata: &Metadata,
    process: &Process,
    old_key: Option<&Secret>,
    new_key: Option<&Secret>,
) -> Result<Secret> {
    let old = needed("old", process.old.digest, old_key)?;
    // One key on both sides is there once.
    let new = match process.new.digest {
        digest if digest == process.old.digest => &[],
        digest => needed("new", digest, new_key)?,
    };
    let mut text = Vec::new();
    put_keyslot(&mut text, metadata, process)?;
    let backups = Backups::of(metadata)?;
    for segment in [Some(backups.previous), Some(backups.last), backups.moved].into_iter().flatten() {
        put_segment(&mut text, segment)?;
    }
    let parts: [&[u8]; 4] = [b"v2", old, new, &text];
    let mut message = Secret::zeroed(parts.iter().map(|part| part.len()).sum())?;
    let mut rest = message.as_mut_bytes();
    for part in parts {
        let (here, behind) = rest.split_at_mut(part.len());
        here.copy_from_slice(part);
        rest = behind;
    }
    Ok(message)
}

/// The key that a digest checks: nothing of a plain side.
fn needed<'a>(which: &str, digest: Option<u32>, key: Option<&'a Secret>) -> Result<&'a [u8]> {
    match (digest, key) {
        (None, _) => Ok(&[]),
        (Some(_), Some(key)) => Ok(key.as_bytes()),
        (Some(digest), None) => {
            Err(invalid(format!("the {which} volume key is missing"), &format!("digest {digest}")))
        }
    }
}

fn put_text(bytes: &mut Vec<u8>, text: &str, at: &str) -> Result<()> {
    if text.is_empty() || text.len() > TEXT_BYTES_MAX {
        return Err(invalid(format!("a text is not of 1 to {TEXT_BYTES_MAX} bytes"), at));
    }
    bytes.extend_from_slice(text.as_bytes());
    Ok(())
}

fn put_keyslot(bytes: &mut Vec<u8>, metadata: &Metadata, process: &Process) -> Result<()> {
    let at = format!("keyslot {}", process.keyslot);
    let Some(Keyslot::Reencrypt { area, object }) = metadata.keyslots.get(&process.keyslot) else {
        return Err(invalid("not the keyslot of a re-encryption", &at));
    };
    for name in [process.mode.name(), process.direction.name(), process.resilience.name()] {
        put_text(bytes, name, &at)?;
    }
    bytes.extend_from_slice(&area.offset.to_be_bytes());
    bytes.extend_from_slice(&area.size.to_be_bytes());
    match process.resilience {
        Resilience::None | Resilience::Journal => {}
        Resilience::Checksum(checksum) => {
            // As it is written there, for a name may be in capitals.
            let name = object.get("area").and_then(|area| area.get("hash")).and_then(|hash| hash.as_str());
            put_text(bytes, name.unwrap_or_default(), &at)?;
            bytes.extend_from_slice(&checksum.block_bytes.to_be_bytes());
        }
        Resilience::Datashift { shift } => bytes.extend_from_slice(&shift.to_be_bytes()),
    }
    Ok(())
}

fn put_segment(bytes: &mut Vec<u8>, segment: &Segment) -> Result<()> {
    let at = "backup segment";
    let kind = match &segment.kind {
        SegmentKind::Crypt { .. } => "crypt",
        SegmentKind::Linear => "linear",
        SegmentKind::Unknown(_) => return Err(invalid("neither crypt nor linear", at)),
    };
    put_text(bytes, kind, at)?;
    bytes.extend_from_slice(&segment.offset.to_be_bytes());
    match segment.size {
        Some(size) => bytes.extend_from_slice(&size.to_be_bytes()),
        None => bytes.extend_from_slice(b"dynamic"),
    }
    if let SegmentKind::Crypt { encryption, sector_size, iv_tweak, .. } = &segment.kind {
        bytes.extend_from_slice(&iv_tweak.to_be_bytes());
        put_text(bytes, encryption, at)?;
        bytes.extend_from_slice(&sector_size.to_be_bytes());
    }
    Ok(())
}
