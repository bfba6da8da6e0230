//! What a disk holds: header and data, compared with the plaintext byte by byte.
//!
//! It is compared as ciphertext: what each segment of the header says of a place (its cipher, its key by its digest, its counter)
//! is what must lie there. That is the plaintext, for ciphertext and plaintext determine each other, and saves decrypting.

use std::sync::{Arc, Mutex};

use engine::backend::blocking::Blocking;
use engine::backend::sim::World;
use engine::crypto::Secret;
use engine::crypto::hash::Hash;
use engine::crypto::kdf::Kdf;
use engine::format::luks2::Loaded;
use engine::format::luks2::metadata::{Digest, Metadata, SegmentKind};
use engine::format::luks2::reencrypt::{State, read};
use engine::volume::Header;

use super::{HEADER, Volume, encrypted};

/// Where a volume stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// As it was.
    Before,
    /// Begun; so many bytes are new, and nothing is half done.
    UnderWay(u64),
    /// As it shall be.
    Over,
}

/// New keys of which the ciphertext is kept.
const KNOWN_MAX: usize = 64;

/// A key and what the whole data is under it.
struct Side {
    key: Secret,
    unit: u32,
    bytes: Vec<u8>,
}

/// Compares what is found with what must be there.
pub struct Judge<'a> {
    volume: &'a Volume,
    old: Option<Side>,
    /// By the salt of their digests, as they become known.
    known: Mutex<Vec<(Vec<u8>, Arc<NewSide>)>>,
}

/// What the data is under a new key.
pub struct NewSide(Side);

impl NewSide {
    /// The key.
    #[must_use]
    pub fn key(&self) -> &Secret {
        &self.0.key
    }
}

impl<'a> Judge<'a> {
    /// Of this volume.
    #[must_use]
    pub fn new(volume: &'a Volume) -> Self {
        let unit = volume.shape.units[0];
        let old = volume.old.as_ref().map(|(key, _)| {
            let key = Secret::copy_of(key.as_bytes()).expect("memory for a secret");
            let bytes = encrypted(&key, unit, &volume.plain);
            Side { key, unit, bytes }
        });
        Self { volume, old, known: Mutex::default() }
    }

    /// The header on a disk.
    ///
    /// # Errors
    /// There is none, in words.
    pub fn load(device: &mut Blocking) -> Result<Loaded, String> {
        match Header::load(device) {
            Ok(Header::Luks2(loaded)) => Ok(*loaded),
            Ok(Header::Luks1(_)) => Err("LUKS1".to_owned()),
            Err(error) => Err(format!("no header is left: {}", error.chain())),
        }
    }

    /// The digest of the new key, once there is one.
    #[must_use]
    pub fn new_digest<'m>(&self, metadata: &'m Metadata) -> Option<&'m Digest> {
        let of_data = metadata.digests.values().filter(|digest| !digest.segments.is_empty());
        of_data.into_iter().find(|digest| !self.is_old(digest))
    }

    fn is_old(&self, digest: &Digest) -> bool {
        self.volume.is_old(digest)
    }

    /// The key of a header's new digest has become known.
    ///
    /// # Errors
    /// It is not the key of this digest.
    pub fn learn(&self, metadata: &Metadata, key: &Secret) -> Result<(), String> {
        let digest = self.new_digest(metadata).ok_or("there is no new digest")?;
        let mut known = self.known.lock().expect("nobody panics here");
        if known.iter().any(|(salt, _)| *salt == digest.salt) {
            return Ok(());
        }
        if !is_met(digest, key) {
            return Err("a key that is not its digest's".to_owned());
        }
        let key = Secret::copy_of(key.as_bytes()).expect("memory for a secret");
        let unit = self.volume.shape.units[1];
        let bytes = encrypted(&key, unit, &self.volume.plain);
        if known.len() > KNOWN_MAX {
            // The first is that of all endings; others are of what was begun anew from one of them.
            known.remove(1);
        }
        known.push((digest.salt.clone(), Arc::new(NewSide(Side { key, unit, bytes }))));
        Ok(())
    }

    /// What is known of the new key of this header.
    #[must_use]
    pub fn known(&self, metadata: &Metadata) -> Option<Arc<NewSide>> {
        let digest = self.new_digest(metadata)?;
        let known = self.known.lock().expect("nobody panics here");
        known.iter().find(|(salt, _)| *salt == digest.salt).map(|(_, side)| Arc::clone(side))
    }

    /// Where the volume stands, all of its data compared. Nothing may be half done.
    ///
    /// # Errors
    /// What is lost, in words.
    pub fn look(&self, world: &World) -> Result<Standing, String> {
        let mut header = world.blocking(HEADER, "header").map_err(|error| error.chain())?;
        let loaded = Self::load(&mut header);
        drop(header);
        let disk = self.volume.shape.data_disk();
        let mut found = vec![0; usize::try_from(self.volume.data_bytes()).expect("small")];
        let count =
            rustix::io::pread(&*world.file(disk), &mut found, 0).map_err(|errno| errno.to_string())?;
        if count < found.len() {
            return Err(format!("the data disk ends at {count}"));
        }
        let loaded = match loaded {
            // Plain data has no header before.
            Err(_) if self.old.is_none() => {
                let plain = &self.volume.plain;
                let first = found.iter().zip(plain).position(|(one, other)| one != other);
                return first.map_or(Ok(Standing::Before), |at| {
                    Err(format!("plaintext byte {at} of {} is lost, and there is no header", plain.len()))
                });
            }
            loaded => loaded?,
        };
        let standing = self.standing(&loaded.header.metadata)?;
        self.compare(&loaded.header.metadata, &found)?;
        Ok(standing)
    }

    fn standing(&self, metadata: &Metadata) -> Result<Standing, String> {
        let found = read::read(metadata).map_err(|error| format!("metadata: {}", error.chain()))?;
        match found {
            Some((_, State::Clean { boundary })) => Ok(Standing::UnderWay(boundary.unwrap_or(0))),
            Some((_, State::Finished)) => Ok(Standing::UnderWay(self.volume.plain.len() as u64)),
            Some((_, State::Crash { start, end })) => Err(format!("bytes {start}..{end} are half done")),
            None => {
                if metadata.data_segments().all(|(_, segment)| matches!(segment.kind, SegmentKind::Linear)) {
                    return Ok(Standing::Over);
                }
                let mut digests = metadata.digests.values().filter(|digest| !digest.segments.is_empty());
                match (digests.next(), digests.next()) {
                    (Some(one), None) if self.is_old(one) => Ok(Standing::Before),
                    (Some(_), None) => Ok(Standing::Over),
                    _ => Err("no re-encryption is under way, and not one digest has the data".to_owned()),
                }
            }
        }
    }

    fn compare(&self, metadata: &Metadata, found: &[u8]) -> Result<(), String> {
        let total = self.volume.plain.len();
        let known = self.known(metadata);
        let mut at = 0;
        for (id, segment) in metadata.data_segments() {
            let size = match segment.size {
                Some(size) => usize::try_from(size).expect("small"),
                None => total.checked_sub(at).ok_or("the segments are longer than the data")?,
            };
            let side = match &segment.kind {
                SegmentKind::Linear => None,
                SegmentKind::Crypt { encryption, sector_size, iv_tweak, .. } => {
                    let (_, digest) =
                        metadata.digest_of_segment(id).ok_or(format!("no digest of segment {id}"))?;
                    let side = if self.is_old(digest) {
                        self.old.as_ref().expect("it has a digest")
                    } else {
                        &known.as_ref().ok_or("the new key is not known")?.0
                    };
                    let right = encryption == "aes-xts-plain64"
                        && *sector_size == side.unit
                        && *iv_tweak == at as u64 / 512;
                    if !right {
                        return Err(format!(
                            "segment {id} has another cipher or counter than its data: {segment:?}"
                        ));
                    }
                    Some(side)
                }
                SegmentKind::Unknown(kind) => return Err(format!("segment {id} is of the kind {kind}")),
            };
            let bytes = side.map_or(&self.volume.plain, |side| &side.bytes);
            let offset = usize::try_from(segment.offset).expect("small");
            let there =
                found.get(offset..offset + size).ok_or(format!("segment {id} ends beyond the disk"))?;
            let wanted = bytes.get(at..at + size).ok_or(format!("segment {id} ends beyond the data"))?;
            if there != wanted {
                let first =
                    there.iter().zip(wanted).position(|(one, other)| one != other).expect("they differ");
                return Err(format!(
                    "plaintext byte {} of {total} is lost: segment {id} of {at}..{}",
                    at + first,
                    at + size
                ));
            }
            at += size;
        }
        if at == total { Ok(()) } else { Err(format!("the segments have {at} bytes of {total}")) }
    }
}

/// Is this the key of this digest?
fn is_met(digest: &Digest, key: &Secret) -> bool {
    let hash = Hash::from_name(&digest.hash).expect("a known hash");
    let mut made = vec![0; digest.digest.len()];
    let kdf = Kdf::Pbkdf2 { hash, iterations: digest.iterations };
    kdf.derive(key.as_bytes(), &digest.salt, &mut made).expect("memory");
    made == digest.digest
}

impl Volume {
    /// Is this the digest of the old key? Its salt says so, as it was made with the volume.
    #[must_use]
    pub fn is_old(&self, digest: &Digest) -> bool {
        self.old.as_ref().is_some_and(|(_, salt)| *salt == digest.salt)
    }
}
