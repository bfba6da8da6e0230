//! A header's fields under their names in the specification.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

use crate::format::luks1::fields::VERSION;
use crate::format::luks1::{Header, Keyslot};

impl Header {
    /// The fields under their names in the specification, binary ones as base64: what `dump --json` shows.
    ///
    /// Keyslots are an object by number, like those of LUKS2.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let numbered = |(index, keyslot): (usize, &Keyslot)| (index.to_string(), keyslot.to_json());
        let keyslots: Map<String, Value> = self.keyslots.iter().enumerate().map(numbered).collect();
        json!({
            "version": VERSION,
            "cipher-name": self.cipher_name,
            "cipher-mode": self.cipher_mode,
            "hash-spec": self.hash,
            "payload-offset": self.payload_sector,
            "key-bytes": self.key_bytes,
            "mk-digest": STANDARD.encode(self.digest),
            "mk-digest-salt": STANDARD.encode(self.digest_salt),
            "mk-digest-iter": self.digest_iterations,
            "uuid": self.uuid,
            "keyslots": keyslots,
        })
    }
}

impl Keyslot {
    fn to_json(self) -> Value {
        json!({
            "active": self.active,
            "iterations": self.iterations,
            "salt": STANDARD.encode(self.salt),
            "key-material-offset": self.material_sector,
            "stripes": self.stripes,
        })
    }
}
