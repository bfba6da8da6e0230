//! A header described: for people, and for programs that ask what a volume is.

use proto::luks::{Dump, Keyslot, Segment, Summary, Version};

use crate::crypto::kdf::Argon2Kind;
use crate::format::luks1;
use crate::format::luks2::metadata::{self, KdfText, Luks2Keyslot, Metadata, SegmentKind};
use crate::format::luks2::{Health, Loaded};
use crate::volume::{Header, LUKS1_UNIT_BYTES, key_bytes_of_segment};

impl Header {
    /// In short. Whatever a header says is described, also what this build cannot open.
    #[must_use]
    pub fn summary(&self) -> Summary {
        match self {
            Self::Luks1(header) => of_luks1(header),
            Self::Luks2(loaded) => of_luks2(loaded),
        }
    }

    /// In full.
    #[must_use]
    pub fn dump(&self) -> Dump {
        let metadata = match self {
            Self::Luks1(header) => header.to_json(),
            Self::Luks2(loaded) => loaded.header.metadata.to_json(),
        };
        Dump { summary: self.summary(), metadata }
    }
}

fn of_luks1(header: &luks1::Header) -> Summary {
    let key_bits = header.key_bytes.saturating_mul(8);
    let segment = Segment {
        kind: "crypt".to_owned(),
        offset: u64::from(header.payload_sector) * 512,
        size: None,
        cipher: header.cipher(),
        data_unit: LUKS1_UNIT_BYTES,
        tweak_offset: 0,
        key_bits,
        flags: Vec::new(),
    };
    let keyslots =
        (0..).zip(&header.keyslots).filter(|(_, keyslot)| keyslot.active).map(|(id, keyslot)| Keyslot {
            kdf: "pbkdf2".to_owned(),
            hash: header.hash.clone(),
            iterations: keyslot.iterations,
            key_bits,
            bound: true,
            priority: priority(1),
            area_offset: keyslot.material_offset(),
            area_bytes: header.material_bytes(),
            ..bare_keyslot(id, "luks1")
        });
    Summary {
        version: Version::Luks1,
        uuid: header.uuid.clone(),
        label: String::new(),
        subsystem: String::new(),
        seqid: None,
        metadata_bytes: None,
        keyslots_bytes: None,
        segments: vec![segment],
        keyslots: keyslots.collect(),
        requirements: Vec::new(),
        flags: Vec::new(),
        copies: Vec::new(),
    }
}

fn of_luks2(loaded: &Loaded) -> Summary {
    let header = &loaded.header;
    let metadata = &header.metadata;
    Summary {
        version: Version::Luks2,
        uuid: header.uuid.clone(),
        label: header.label.clone(),
        subsystem: header.subsystem.clone(),
        seqid: Some(header.seqid),
        metadata_bytes: Some(header.copy_bytes),
        keyslots_bytes: Some(metadata.config.keyslots_size),
        segments: metadata
            .data_segments()
            .map(|(id, segment)| segment_of_luks2(metadata, id, segment))
            .collect(),
        keyslots: metadata
            .keyslots
            .iter()
            .map(|(id, keyslot)| keyslot_of_luks2(metadata, *id, keyslot))
            .collect(),
        requirements: metadata.config.requirements.clone(),
        flags: metadata.config.flags.clone(),
        copies: loaded.health.iter().map(health).collect(),
    }
}

fn health(health: &Health) -> String {
    match health {
        Health::Good => "good".to_owned(),
        Health::Obsolete => "obsolete".to_owned(),
        Health::Damaged(why) => format!("damaged: {why}"),
    }
}

fn segment_of_luks2(metadata: &Metadata, id: u32, segment: &metadata::Segment) -> Segment {
    let (kind, cipher, data_unit, tweak_offset) = match &segment.kind {
        SegmentKind::Crypt { encryption, sector_size, iv_tweak, .. } => {
            ("crypt", encryption.as_str(), *sector_size, *iv_tweak)
        }
        SegmentKind::Linear => ("linear", "", 0, 0),
        SegmentKind::Unknown(kind) => (kind.as_str(), "", 0, 0),
    };
    Segment {
        kind: kind.to_owned(),
        offset: segment.offset,
        size: segment.size,
        cipher: cipher.to_owned(),
        data_unit,
        tweak_offset,
        key_bits: key_bytes_of_segment(metadata, id).map_or(0, |bytes| bytes.saturating_mul(8)),
        flags: segment.flags.clone(),
    }
}

fn keyslot_of_luks2(metadata: &Metadata, id: u32, keyslot: &metadata::Keyslot) -> Keyslot {
    let bound = metadata.digest_of_keyslot(id).is_some_and(|(_, digest)| {
        metadata.data_segments().any(|(segment, _)| digest.segments.contains(&segment))
    });
    let (described, area) = match keyslot {
        metadata::Keyslot::Luks2(keyslot) => (wrapped_key(id, keyslot), Some(keyslot.area)),
        metadata::Keyslot::Reencrypt { area, .. } => (bare_keyslot(id, "reencrypt"), Some(*area)),
        metadata::Keyslot::Unknown { kind, area, .. } => (bare_keyslot(id, kind), *area),
    };
    let (area_offset, area_bytes) = area.map_or((0, 0), |area| (area.offset, area.size));
    Keyslot { bound, area_offset, area_bytes, ..described }
}

fn wrapped_key(id: u32, keyslot: &Luks2Keyslot) -> Keyslot {
    let bare = Keyslot {
        key_bits: keyslot.key_size.saturating_mul(8),
        priority: priority(keyslot.priority),
        ..bare_keyslot(id, "luks2")
    };
    match &keyslot.kdf {
        KdfText::Pbkdf2 { hash, iterations } => {
            Keyslot { kdf: "pbkdf2".to_owned(), hash: hash.clone(), iterations: *iterations, ..bare }
        }
        KdfText::Argon2 { kind, time, memory_kib, lanes } => {
            let kdf = match kind {
                Argon2Kind::Argon2i => "argon2i",
                Argon2Kind::Argon2id => "argon2id",
            };
            Keyslot { kdf: kdf.to_owned(), iterations: *time, memory_kib: *memory_kib, lanes: *lanes, ..bare }
        }
    }
}

fn bare_keyslot(id: u32, kind: &str) -> Keyslot {
    Keyslot {
        id,
        kind: kind.to_owned(),
        kdf: String::new(),
        hash: String::new(),
        iterations: 0,
        memory_kib: 0,
        lanes: 0,
        key_bits: 0,
        priority: String::new(),
        bound: false,
        area_offset: 0,
        area_bytes: 0,
        unlock_seconds: None,
    }
}

fn priority(priority: u32) -> String {
    match priority {
        0 => "ignore",
        1 => "normal",
        _ => "prefer",
    }
    .to_owned()
}
