//! New headers, free places, objects removed with what refers to them. In memory only.

use std::collections::BTreeMap;

use serde_json::Map;

use crate::crypto::kdf::Kdf;
use crate::error::{Error, ErrorKind, Result};
use crate::format::af::STRIPES;
use crate::format::luks2::binary::BINARY_BYTES;
use crate::format::luks2::fields::invalid;
use crate::format::luks2::metadata::{
    Area, AsRead, Config, Digest, KdfText, Keyslot, Luks2Keyslot, Metadata, Segment, SegmentKind, Token,
};
use crate::format::luks2::reencrypt::valid::is_online;
use crate::format::luks2::validate::{
    AREA_ALIGN, DIGESTS_MAX, KEYSLOTS_BYTES_MAX, OBJECTS_MAX, is_copy_bytes,
};
use crate::format::luks2::{Copy, Header};

/// Bytes of one copy in a header with no wish for more: room for some twenty keyslots.
pub const COPY_BYTES_DEFAULT: u64 = 16 << 10;
/// Header and keyslots area by default, bytes: where the data begins.
pub const HEADER_BYTES_DEFAULT: u64 = 16 << 20;
/// Bytes of the keyslots area by default.
pub const KEYSLOTS_BYTES_DEFAULT: u64 = HEADER_BYTES_DEFAULT - 2 * COPY_BYTES_DEFAULT;

impl Header {
    /// A header with one segment and no digest or keyslot yet, to be written with seqid 1. `uuid` and `salts` come from whoever
    /// has randomness.
    ///
    /// # Errors
    /// `Invalid`: sizes that are not legal, or a segment that begins inside the keyslots area.
    pub fn new(
        copy_bytes: u64,
        keyslots_size: u64,
        segment: Segment,
        uuid: String,
        salts: [[u8; 64]; 2],
    ) -> Result<Self> {
        if !is_copy_bytes(copy_bytes) {
            return Err(invalid("size of a copy is not a power of two, 16 KiB to 4 MiB", "header"));
        }
        if !keyslots_size.is_multiple_of(AREA_ALIGN) || keyslots_size > KEYSLOTS_BYTES_MAX {
            return Err(invalid("size is not a multiple of 4096 up to 128 MiB", "keyslots area"));
        }
        if segment.offset != 0 && segment.offset < 2 * copy_bytes + keyslots_size {
            return Err(invalid("the data begins inside the keyslots area", "segment 0"));
        }
        let config = Config {
            json_size: copy_bytes - BINARY_BYTES as u64,
            keyslots_size,
            flags: Vec::new(),
            requirements: Vec::new(),
            extra: Map::new(),
        };
        let metadata = Metadata {
            keyslots: BTreeMap::new(),
            tokens: BTreeMap::new(),
            segments: BTreeMap::from([(0, segment)]),
            digests: BTreeMap::new(),
            config,
            extra: Map::new(),
            as_read: AsRead::default(),
        };
        Ok(Self {
            copy_bytes,
            seqid: 1,
            label: String::new(),
            checksum_alg: String::from("sha256"),
            uuid,
            subsystem: String::new(),
            salts,
            metadata,
        })
    }

    /// Would the metadata as it is now fit and be valid? To be asked before anything is written.
    ///
    /// # Errors
    /// As [`Header::to_bytes`].
    pub fn check(&self) -> Result<()> {
        self.to_bytes(Copy::Primary).map(drop)
    }

    /// A place for the material of a key of `key_bytes`.
    ///
    /// # Errors
    /// `NoSpace`.
    pub fn free_keyslot_area(&self, key_bytes: u32) -> Result<Area> {
        let size = keyslot_area_bytes(key_bytes);
        Ok(Area { offset: self.free_area(size)?, size })
    }
}

/// Bytes reserved for the material of a key.
#[must_use]
pub fn keyslot_area_bytes(key_bytes: u32) -> u64 {
    (u64::from(key_bytes) * u64::from(STRIPES)).next_multiple_of(AREA_ALIGN)
}

impl Segment {
    /// Encrypted data whose counter begins at 0.
    #[must_use]
    pub fn crypt(offset: u64, size: Option<u64>, encryption: &str, sector_size: u32) -> Self {
        let kind = SegmentKind::Crypt {
            encryption: encryption.to_owned(),
            sector_size,
            iv_tweak: 0,
            integrity: None,
        };
        Self { kind, offset, size, flags: Vec::new(), extra: Map::new() }
    }
}

impl Luks2Keyslot {
    /// For a volume key of `key_size` bytes, of normal priority; the material's cipher has a key of `area_key_size` bytes.
    #[must_use]
    pub fn new(
        key_size: u32,
        area: Area,
        (area_encryption, area_key_size): (&str, u32),
        af_hash: &str,
        kdf: Kdf,
        salt: [u8; 32],
    ) -> Self {
        Self {
            key_size,
            priority: 1,
            area,
            area_encryption: area_encryption.to_owned(),
            area_key_size,
            af_stripes: STRIPES,
            af_hash: af_hash.to_owned(),
            kdf: KdfText::from(kdf),
            salt: salt.to_vec(),
            extra: Map::new(),
        }
    }
}

impl Digest {
    /// `digest`: PBKDF2 of the volume key. Bound to nothing yet.
    #[must_use]
    pub fn pbkdf2(hash: &str, iterations: u32, salt: Vec<u8>, digest: Vec<u8>) -> Self {
        Self {
            kind: String::from("pbkdf2"),
            keyslots: Vec::new(),
            segments: Vec::new(),
            hash: hash.to_owned(),
            iterations,
            salt,
            digest,
            extra: Map::new(),
        }
    }
}

impl Token {
    /// cryptsetup's own token: the passphrase lies in the kernel's keyring under this description.
    #[must_use]
    pub fn keyring(key_description: &str, keyslots: Vec<u32>) -> Self {
        let extra = Map::from_iter([(String::from("key_description"), key_description.into())]);
        Self { kind: String::from("luks2-keyring"), keyslots, extra }
    }
}

fn free<T>(objects: &BTreeMap<u32, T>, limit: u32, what: &str) -> Result<u32> {
    (0..limit)
        .find(|id| !objects.contains_key(id))
        .ok_or_else(|| Error::new(ErrorKind::NoSpace, format!("all {limit} {what} are in use")))
}

impl Metadata {
    /// The lowest number no keyslot has.
    ///
    /// # Errors
    /// `NoSpace`.
    pub fn free_keyslot(&self) -> Result<u32> {
        free(&self.keyslots, OBJECTS_MAX, "keyslots")
    }

    /// The lowest number no token has.
    ///
    /// # Errors
    /// `NoSpace`.
    pub fn free_token(&self) -> Result<u32> {
        free(&self.tokens, OBJECTS_MAX, "tokens")
    }

    /// The lowest number no digest has. Digests of nothing do not count: they are not written.
    ///
    /// # Errors
    /// `NoSpace`.
    pub fn free_digest(&self) -> Result<u32> {
        (0..DIGESTS_MAX)
            .find(|id| self.digests.get(id).is_none_or(Digest::is_unused))
            .ok_or_else(|| Error::new(ErrorKind::NoSpace, format!("all {DIGESTS_MAX} digests are in use")))
    }

    /// Add a digest that checks these keyslots and segments; its number.
    ///
    /// # Errors
    /// `NoSpace`.
    pub fn add_digest(&mut self, mut digest: Digest, keyslots: &[u32], segments: &[u32]) -> Result<u32> {
        let id = self.free_digest()?;
        digest.keyslots.extend_from_slice(keyslots);
        digest.segments.extend_from_slice(segments);
        self.digests.insert(id, digest);
        Ok(id)
    }

    /// Add a keyslot whose key `digest` checks.
    ///
    /// # Errors
    /// `Conflict`: the number is in use; `NotFound`: no such digest; `Invalid`: the number is none of a keyslot.
    pub fn add_keyslot(&mut self, id: u32, keyslot: Luks2Keyslot, digest: u32) -> Result<()> {
        if id >= OBJECTS_MAX {
            return Err(invalid(
                format!("not a keyslot number 0..={}", OBJECTS_MAX - 1),
                &format!("keyslot {id}"),
            ));
        }
        if self.keyslots.contains_key(&id) {
            return Err(Error::new(ErrorKind::Conflict, format!("keyslot {id} is in use")));
        }
        let Some(digest) = self.digests.get_mut(&digest) else {
            return Err(Error::new(ErrorKind::NotFound, format!("there is no digest {digest}")));
        };
        digest.keyslots.push(id);
        self.keyslots.insert(id, Keyslot::Luks2(keyslot));
        Ok(())
    }

    /// Remove a keyslot and every reference to it. Tokens stay, even without keyslots; a digest that checks nothing any more goes.
    pub fn remove_keyslot(&mut self, id: u32) -> Option<Keyslot> {
        let keyslot = self.keyslots.remove(&id)?;
        for token in self.tokens.values_mut() {
            token.keyslots.retain(|keyslot| *keyslot != id);
        }
        for digest in self.digests.values_mut() {
            digest.keyslots.retain(|keyslot| *keyslot != id);
        }
        self.digests.retain(|_, digest| !digest.is_unused());
        Some(keyslot)
    }

    /// Is a re-encryption under way (interrupted or not)?
    #[must_use]
    pub fn is_reencrypting(&self) -> bool {
        self.config.requirements.iter().any(|name| name == "offline-reencrypt" || is_online(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::hash::Hash;

    const KDF: Kdf = Kdf::Pbkdf2 { hash: Hash::Sha256, iterations: 1000 };

    /// A header with three 64-byte keyslots at the beginning of room for five.
    fn header() -> Header {
        let segment = Segment::crypt(16 << 20, None, "aes-xts-plain64", 4096);
        let size = 5 * keyslot_area_bytes(64);
        let mut header =
            Header::new(16 << 10, size, segment, "uuid".into(), [[1; 64], [2; 64]]).expect("legal sizes");
        let digest = Digest::pbkdf2("sha256", 1000, vec![1; 32], vec![2; 32]);
        let digest = header.metadata.add_digest(digest, &[], &[0]).expect("room");
        for _ in 0..3 {
            add(&mut header, digest);
        }
        header
    }

    fn add(header: &mut Header, digest: u32) -> Area {
        let area = header.free_keyslot_area(64).expect("room");
        let keyslot = Luks2Keyslot::new(64, area, ("aes-xts-plain64", 64), "sha256", KDF, [3; 32]);
        let id = header.metadata.free_keyslot().expect("a number");
        header.metadata.add_keyslot(id, keyslot, digest).expect("a free number");
        area
    }

    #[test]
    fn areas_fill_gaps_first_and_never_reach_beyond_the_end() {
        let mut header = header();
        let begin = header.keyslots_offset();
        assert_eq!(header.free_area(1).expect("room"), begin + 3 * 258_048);
        let removed =
            header.metadata.remove_keyslot(1).and_then(|keyslot| keyslot.area()).expect("it was there");
        assert_eq!(header.free_area(258_048).expect("the gap"), removed.offset);
        assert_eq!(header.free_area(258_049).expect("behind"), begin + 3 * 258_048);
        assert_eq!(header.free_area(2 * 258_048).expect("behind"), begin + 3 * 258_048);
        for bytes in [2 * 258_048 + 1, u64::MAX, u64::MAX - 4095] {
            assert_eq!(header.free_area(bytes).expect_err("no room").kind(), ErrorKind::NoSpace, "{bytes}");
        }
        assert_eq!(add(&mut header, 0), removed);
        for _ in 0..2 {
            add(&mut header, 0);
        }
        assert_eq!(header.free_area(1).expect_err("full").kind(), ErrorKind::NoSpace);
        header.check().expect("still valid");
    }

    #[test]
    fn a_keyslot_goes_with_all_that_refers_to_it() {
        let mut header = header();
        header.metadata.tokens.insert(0, Token::keyring("description", vec![1, 2]));
        let unbound = Digest::pbkdf2("sha256", 1000, vec![1; 32], vec![2; 32]);
        let unbound = header.metadata.add_digest(unbound, &[], &[]).expect("room");
        add(&mut header, unbound);
        header.check().expect("valid");
        assert_eq!(
            header.metadata.remove_keyslot(3).map(|keyslot| keyslot.kind().to_owned()),
            Some("luks2".into())
        );
        assert!(!header.metadata.digests.contains_key(&unbound), "it checks nothing any more");
        for id in [0, 1, 2] {
            assert!(header.metadata.remove_keyslot(id).is_some());
            header.check().expect("still valid");
        }
        assert_eq!(header.metadata.remove_keyslot(2), None);
        assert_eq!(header.metadata.tokens[&0].keyslots, Vec::<u32>::new());
        // The segment still needs it.
        assert_eq!(header.metadata.digests[&0].keyslots, Vec::<u32>::new());
    }

    #[test]
    fn numbers_run_out() {
        let mut metadata = header().metadata;
        assert_eq!(metadata.free_digest().expect("room"), 1);
        for id in 0..OBJECTS_MAX {
            metadata.tokens.insert(id, Token::keyring("description", Vec::new()));
        }
        assert_eq!(metadata.free_token().expect_err("full").kind(), ErrorKind::NoSpace);
        metadata.tokens.remove(&7);
        assert_eq!(metadata.free_token().expect("one"), 7);
        let keyslot = Luks2Keyslot::new(64, Area { offset: 0, size: 0 }, ("x", 64), "sha256", KDF, [3; 32]);
        for (id, digest, kind) in
            [(0, 0, ErrorKind::Conflict), (9, 5, ErrorKind::NotFound), (32, 0, ErrorKind::Invalid)]
        {
            let error = metadata.add_keyslot(id, keyslot.clone(), digest).expect_err("refused");
            assert_eq!(error.kind(), kind, "{id}");
        }
    }
}
