//! What a disk holds: header and data, compared with the plaintext byte by byte.
//!
//! It is compared as ciphertext: what each segment of the header says of a place (its cipher, its key by its digest, its counter)
//! is what must lie there. That is the plaintext, for ciphertext and plaintext determine each other, and saves decrypting.

use std::collections::HashMap;
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
const KNOWN_MAX: usize = 8;

/// A key and what the whole data is under it.
struct Side {
    key: Secret,
    unit: u32,
    bytes: Vec<u8>,
}

/// Compares what is found with what must be there.
pub struct Judge<'a> {
    volume: &'a Volume,
    old: Side,
    /// By the salt of their digests, as they become known.
    new: Mutex<HashMap<Vec<u8>, Arc<NewSide>>>,
    suggested: Mutex<Option<Secret>>,
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
        let key = Secret::copy_of(volume.key.as_bytes()).expect("memory for a secret");
        let unit = volume.shape.units[0];
        let bytes = encrypted(&key, unit, &volume.plain);
        Self { volume, old: Side { key, unit, bytes }, new: Mutex::default(), suggested: Mutex::default() }
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

    /// This may be the key of a new digest.
    pub fn suggest(&self, key: &Secret) {
        let key = Secret::copy_of(key.as_bytes()).expect("memory for a secret");
        *self.suggested.lock().expect("nobody panics here") = Some(key);
    }

    /// What is known of the new key of this header.
    #[must_use]
    pub fn known(&self, metadata: &Metadata) -> Option<Arc<NewSide>> {
        let digest = self.new_digest(metadata)?;
        let mut known = self.new.lock().expect("nobody panics here");
        if let Some(side) = known.get(&digest.salt) {
            return Some(Arc::clone(side));
        }
        let suggested = self.suggested.lock().expect("nobody panics here");
        let key = suggested.as_ref().filter(|key| is_met(digest, key))?;
        let key = Secret::copy_of(key.as_bytes()).expect("memory for a secret");
        let unit = self.volume.shape.units[1];
        let bytes = encrypted(&key, unit, &self.volume.plain);
        let side = Arc::new(NewSide(Side { key, unit, bytes }));
        if known.len() >= KNOWN_MAX {
            // Every run has a key of its own; those of runs long over are of no use.
            known.clear();
        }
        known.insert(digest.salt.clone(), Arc::clone(&side));
        Some(side)
    }

    /// Where the volume stands, all of its data compared. Nothing may be half done.
    ///
    /// # Errors
    /// What is lost, in words.
    pub fn look(&self, world: &World) -> Result<Standing, String> {
        let mut header = world.blocking(HEADER, "header").map_err(|error| error.chain())?;
        let loaded = Self::load(&mut header)?;
        drop(header);
        let metadata = &loaded.header.metadata;
        let standing = self.standing(metadata)?;
        let mut found =
            vec![0; self.volume.plain.len() + usize::try_from(self.volume.data_offset).expect("small")];
        let file = world.file(self.volume.shape.data_disk());
        let count = rustix::io::pread(&*file, &mut found, 0).map_err(|errno| errno.to_string())?;
        if count < found.len() {
            return Err(format!("the data disk ends at {count}"));
        }
        self.compare(metadata, &found)?;
        Ok(standing)
    }

    fn standing(&self, metadata: &Metadata) -> Result<Standing, String> {
        let found = read::read(metadata).map_err(|error| format!("metadata: {}", error.chain()))?;
        match found {
            Some((_, State::Clean { boundary })) => Ok(Standing::UnderWay(boundary.unwrap_or(0))),
            Some((_, State::Finished)) => Ok(Standing::UnderWay(self.volume.plain.len() as u64)),
            Some((_, State::Crash { start, end })) => Err(format!("bytes {start}..{end} are half done")),
            None => {
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
            let SegmentKind::Crypt { encryption, sector_size, iv_tweak, .. } = &segment.kind else {
                return Err(format!("segment {id} is not encrypted"));
            };
            let size = match segment.size {
                Some(size) => usize::try_from(size).expect("small"),
                None => total.checked_sub(at).ok_or("the segments are longer than the data")?,
            };
            let (_, digest) = metadata.digest_of_segment(id).ok_or(format!("no digest of segment {id}"))?;
            let side = if self.is_old(digest) {
                &self.old
            } else {
                &known.as_ref().ok_or("the new key is not known")?.0
            };
            let right =
                encryption == "aes-xts-plain64" && *sector_size == side.unit && *iv_tweak == at as u64 / 512;
            if !right {
                return Err(format!("segment {id} has another cipher or counter than its data: {segment:?}"));
            }
            let offset = usize::try_from(segment.offset).expect("small");
            let there =
                found.get(offset..offset + size).ok_or(format!("segment {id} ends beyond the disk"))?;
            let wanted = side.bytes.get(at..at + size).ok_or(format!("segment {id} ends beyond the data"))?;
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
        digest.salt == self.salt
    }
}
