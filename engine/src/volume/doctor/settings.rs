//! Ciphers, key derivations and keyslots: what is weak in them.

use proto::luks::Summary;

use super::Report;
use crate::crypto::hash::Hash;
use crate::crypto::kdf::Kdf;
use crate::error::Result;
use crate::format::luks2::metadata::{Keyslot, SegmentKind};
use crate::volume::{Header, keyslots};

/// RFC 9106, section 4, second recommended option: 64 MiB and three passes, for machines with little memory.
const ARGON2_MEMORY_KIB: u64 = 64 << 10;
const ARGON2_PASSES: u64 = 3;

pub(super) fn explain(header: &Header, summary: &Summary, report: &mut Report) {
    for (index, segment) in summary.segments.iter().enumerate() {
        cipher(&format!("segment {index}"), &segment.cipher, segment.key_bits, report);
    }
    if let Header::Luks2(loaded) = header {
        for (id, segment) in loaded.header.metadata.data_segments() {
            if let SegmentKind::Crypt { integrity: Some(_), .. } = segment.kind {
                report.note(
                    format!("segment {id}"),
                    "with data integrity: its sectors carry tags, which only dm-integrity reads",
                    "",
                );
            }
        }
    }
    let bound = keyslots::bound(header);
    match bound.len() {
        0 => report.danger(
            "header",
            "no keyslot opens the data",
            "restore a header backup, or add a keyslot with the volume key",
        ),
        1 => report.note(
            format!("keyslot {}", bound[0]),
            "it is the only one: its passphrase or its few hundred KiB lost, all data are lost",
            "add a second passphrase, and make a header backup",
        ),
        _ => {}
    }
    for slot in &summary.keyslots {
        keyslot(header, slot.id, report);
        if !slot.bound && slot.kind == "luks2" {
            report.note(
                format!("keyslot {}", slot.id),
                "unbound: the key in it encrypts none of the data",
                "",
            );
        }
        if slot.priority == "ignore" && slot.kind == "luks2" {
            report.note(format!("keyslot {}", slot.id), "it is tried only when it is named", "");
        }
    }
}

fn cipher(about: &str, name: &str, key_bits: u32, report: &mut Report) {
    let name = name.to_ascii_lowercase();
    if name.contains("null") {
        report.danger(about, "the null cipher: the data are not encrypted", "re-encrypt the volume");
    } else if name.contains("-ecb") {
        report.danger(about, "ECB mode: equal blocks have equal ciphertext", "re-encrypt the volume");
    } else if name.contains("-cbc-plain") {
        report.weak(
            about,
            format!("{name}: CBC with a counter that can be guessed lets others mark and find files, and bytes can be changed at will"),
            "re-encrypt it to aes-xts-plain64",
        );
    } else if name.contains("-cbc") {
        report.weak(
            about,
            format!("{name}: CBC lets whoever can write to the disk change bytes at will"),
            "re-encrypt it to aes-xts-plain64",
        );
    } else if name.ends_with("-plain") {
        report.note(about, "its counter has 32 bits: beyond 2 TiB tweaks repeat", "keep it smaller");
    }
    if name.starts_with("aes-xts") && key_bits == 256 {
        report.note(about, "its key of 256 bits is two of 128 bits each: AES-128, which is not weak", "");
    }
}

/// The derivation of a keyslot, if it has one.
fn kdf_of(header: &Header, id: u32) -> Option<(Result<Kdf>, usize)> {
    match header {
        Header::Luks1(header) => {
            let iterations = header.keyslots.get(usize::try_from(id).ok()?)?.iterations;
            let kdf = Hash::from_name(&header.hash).map(|hash| Kdf::Pbkdf2 { hash, iterations });
            Some((kdf, header.key_bytes as usize))
        }
        Header::Luks2(loaded) => match loaded.header.metadata.keyslots.get(&id)? {
            Keyslot::Luks2(slot) => Some((slot.kdf.known(), slot.area_key_size as usize)),
            _ => None,
        },
    }
}

fn keyslot(header: &Header, id: u32, report: &mut Report) {
    let about = format!("keyslot {id}");
    let Some((kdf, _)) = kdf_of(header, id) else { return };
    match kdf.and_then(|kdf| kdf.check().map(|()| kdf)) {
        Err(error) => report.danger(about, format!("it cannot be opened here: {}", error.chain()), ""),
        Ok(Kdf::Pbkdf2 { hash, iterations }) => {
            let wanted = iterations_wanted(hash);
            if iterations < wanted {
                report.weak(
                    &about,
                    format!(
                        "pbkdf2-{} with {iterations} iterations is quick to guess at; {wanted} are recommended",
                        hash.name()
                    ),
                    "convert-kdf makes it costlier; LUKS2 also has argon2id",
                );
            } else {
                report.note(
                    &about,
                    "pbkdf2 needs no memory: graphics cards guess it well",
                    "argon2id is harder on them",
                );
            }
            if hash == Hash::Sha1 {
                report.note(
                    about,
                    "SHA-1: broken for signatures, not for this use, and other hashes are as fast",
                    "",
                );
            }
        }
        Ok(Kdf::Argon2 { time, memory_kib, .. }) => {
            if u64::from(time) * u64::from(memory_kib) < ARGON2_PASSES * ARGON2_MEMORY_KIB {
                report.weak(
                    about,
                    format!("argon2 with {memory_kib} KiB and {time} passes is quick to guess at; RFC 9106 wants 64 MiB and 3 at least"),
                    "convert-kdf makes it costlier",
                );
            }
        }
    }
    if let Header::Luks2(loaded) = header
        && let Some(Keyslot::Luks2(slot)) = loaded.header.metadata.keyslots.get(&id)
        && slot.area_encryption.contains("null")
    {
        let about = format!("keyslot {id}");
        report.danger(
            about,
            "its area is under the null cipher: the volume key lies there in the open",
            "remove it",
        );
    }
}

/// OWASP's Password Storage Cheat Sheet, 2023; of the longer hashes the number for SHA-512.
fn iterations_wanted(hash: Hash) -> u32 {
    match hash {
        Hash::Sha1 => 1_300_000,
        Hash::Sha224 | Hash::Sha256 => 600_000,
        Hash::Sha384 | Hash::Sha512 => 210_000,
    }
}

/// What one attempt is expected to take here; absent where that is not known.
pub(super) fn unlock_seconds(header: &Header, id: u32) -> Option<f64> {
    let (kdf, key_bytes) = kdf_of(header, id)?;
    let kdf = kdf.ok()?;
    kdf.check().ok()?;
    Some(kdf.estimate(key_bytes).ok()?.as_secs_f64())
}
