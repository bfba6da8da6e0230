//! What is valid of any re-encryption, those of other versions included, as cryptsetup's own validation has it: a header that
//! breaks this is none at all. [`super::read`] asks for far more of one that it goes on with.

use crate::error::Result;
use crate::format::luks2::fields::invalid;
use crate::format::luks2::metadata::{Keyslot, Metadata, Segment, SegmentKind};

/// The flag of a hotzone.
pub const HOT: &str = "in-reencryption";
/// The flag of the data as it was.
pub const PREVIOUS: &str = "backup-previous";
/// The flag of the data as it will be.
pub const FINAL: &str = "backup-final";
/// The flag of the first data, moved out of the way.
pub const MOVED: &str = "backup-moved-segment";

/// The requirement of a re-encryption that nothing proves, of before cryptsetup 2.4.3.
pub const UNPROVEN: &str = "online-reencrypt";
/// The requirement of all re-encryptions that this build goes on with.
pub const REQUIREMENT: &str = "online-reencrypt-v2";
/// The requirement of a decryption that moves data to the front.
pub const TO_THE_FRONT: &str = "online-reencrypt-v3";

/// Is this a requirement that says a re-encryption is under way: `online-reencrypt`, or `online-reencrypt-v` and digits?
#[must_use]
pub fn is_online(requirement: &str) -> bool {
    match requirement.strip_prefix(UNPROVEN) {
        Some("") => true,
        Some(rest) => rest
            .strip_prefix("-v")
            .is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())),
        None => false,
    }
}

/// Check them.
///
/// # Errors
/// `Invalid`, naming the object and the rule.
pub fn check(metadata: &Metadata) -> Result<()> {
    let requirements: Vec<&str> =
        metadata.config.requirements.iter().map(String::as_str).filter(|name| is_online(name)).collect();
    let keyslots =
        metadata.keyslots.values().filter(|keyslot| matches!(keyslot, Keyslot::Reencrypt { .. })).count();
    if requirements.len() > 1 {
        return Err(invalid("more than one online-reencrypt requirement", "config requirements"));
    }
    if keyslots > 1 {
        return Err(invalid("more than one reencrypt keyslot", "keyslots"));
    }
    let Some(requirement) = requirements.first() else {
        return if keyslots == 0 {
            Ok(())
        } else {
            Err(invalid("a reencrypt keyslot without the requirement", "keyslots"))
        };
    };
    // What a version we do not know keeps where is unknown, too; such a volume is not touched anyway.
    if ![UNPROVEN, REQUIREMENT, TO_THE_FRONT].contains(requirement) {
        return Ok(());
    }
    if keyslots == 0 {
        return Err(invalid("a re-encryption without its keyslot", "keyslots"));
    }
    let flagged = |flag: &str| {
        metadata
            .segments
            .values()
            .find(|segment| segment.flags.iter().any(|name| name == flag))
            .ok_or_else(|| invalid(format!("a re-encryption without a {flag} segment"), "segments"))
    };
    let (previous, target) = (flagged(PREVIOUS)?, flagged(FINAL)?);
    for (id, segment) in metadata.data_segments() {
        let now = segment.flags.iter().any(|flag| flag == HOT);
        if !is_encrypted_alike(segment, target) && (now || !is_encrypted_alike(segment, previous)) {
            return Err(invalid(
                "cipher of neither before nor after the re-encryption",
                &format!("segment {id}"),
            ));
        }
    }
    Ok(())
}

fn is_encrypted_alike(one: &Segment, other: &Segment) -> bool {
    match (&one.kind, &other.kind) {
        (
            SegmentKind::Crypt { encryption: one, sector_size: one_size, .. },
            SegmentKind::Crypt { encryption: other, sector_size: other_size, .. },
        ) => one == other && one_size == other_size,
        (one, other) => one == other,
    }
}
