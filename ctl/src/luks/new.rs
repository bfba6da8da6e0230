//! What was typed about a new header or keyslot means: the wire's wishes.
//!
//! Refused here is what contradicts itself. What depends on the device or on the volume is the daemon's to say.

use proto::luks::{KdfKind, KdfWish, New};

use crate::luks::args::{KdfArgs, KeyslotKdf, NewArgs, Pbkdf, Version};
use crate::report::{Error, Result};

/// A new header of `version`. Its descriptors are still to be filled in.
pub fn header(args: &NewArgs, version: Version) -> Result<New> {
    let luks1 = version == Version::Luks1;
    let luks2_only = [
        ("--label", args.label.is_some()),
        ("--subsystem", args.subsystem.is_some()),
        ("--luks2-metadata-size", args.luks2_metadata_size.is_some()),
        ("--luks2-keyslots-size", args.luks2_keyslots_size.is_some()),
    ];
    if let Some((option, _)) = luks2_only.iter().find(|(_, typed)| luks1 && *typed) {
        return Err(Error::usage(format!("{option}: luks1 headers have no such field"))
            .hint("leave it out, or use --format luks2"));
    }
    let number = |text: &Option<String>| {
        text.as_ref().map(|text| text.parse::<u32>().expect("clap allows only the listed numbers"))
    };
    let data_unit = number(&args.sector_size);
    if luks1 && data_unit.is_some_and(|bytes| bytes != 512) {
        return Err(Error::usage("--sector-size: luks1 has data units of 512 bytes")
            .hint("leave it out, or use --format luks2"));
    }
    if luks1 && args.key_slot.is_some_and(|number| number > 7) {
        return Err(Error::usage("--key-slot: luks1 has keyslots 0 to 7"));
    }
    let step = if luks1 { 512 } else { 4096 };
    if args.data_offset.is_some_and(|bytes| !bytes.is_multiple_of(step)) {
        return Err(Error::usage(format!("--data-offset: not a multiple of {step} bytes")));
    }
    Ok(New {
        version: if luks1 { proto::luks::Version::Luks1 } else { proto::luks::Version::Luks2 },
        cipher: args.cipher.clone(),
        key_bytes: number(&args.key_size).map(|bits| bits / 8),
        data_unit,
        hash: args.hash.clone(),
        label: args.label.clone(),
        subsystem: args.subsystem.clone(),
        uuid: args.uuid.clone(),
        data_offset: args.data_offset,
        metadata_bytes: args.luks2_metadata_size,
        keyslots_bytes: args.luks2_keyslots_size,
        kdf: wish(&args.kdf, Some(version))?,
        keyslot: args.key_slot,
        volume_key_fd: None,
        header: None,
    })
}

/// Bytes of a new header's volume key.
pub fn key_bytes(new: &New) -> usize {
    new.key_bytes.map_or(64, |bytes| usize::try_from(bytes).expect("32 or 64"))
}

/// The key derivation of one more keyslot of a volume whose version only the daemon knows.
pub fn keyslot(args: &KeyslotKdf) -> Result<KdfWish> {
    if args.hash.is_some() && matches!(args.kdf.pbkdf, Some(Pbkdf::Argon2i | Pbkdf::Argon2id)) {
        return Err(Error::usage("--hash: argon2 has its own; only pbkdf2 is told which")
            .hint("leave it out, or use --pbkdf pbkdf2"));
    }
    Ok(KdfWish { hash: args.hash.clone(), ..wish(&args.kdf, None)? })
}

/// `version`, if known, decides what was meant by saying nothing.
fn wish(args: &KdfArgs, version: Option<Version>) -> Result<KdfWish> {
    if version == Some(Version::Luks1) && !matches!(args.pbkdf, None | Some(Pbkdf::Pbkdf2)) {
        return Err(
            Error::usage("--pbkdf: luks1 has pbkdf2 only").hint("leave it out, or use --format luks2")
        );
    }
    let kind = args.pbkdf.or(match version {
        Some(Version::Luks1) => Some(Pbkdf::Pbkdf2),
        Some(Version::Luks2) => Some(Pbkdf::Argon2id),
        None => None,
    });
    if kind == Some(Pbkdf::Pbkdf2) {
        let argon2_only = [
            ("--pbkdf-memory", args.pbkdf_memory.is_some()),
            ("--pbkdf-parallel", args.pbkdf_parallel.is_some()),
        ];
        if let Some((option, _)) = argon2_only.iter().find(|(_, typed)| *typed) {
            return Err(Error::usage(format!("{option}: pbkdf2 has no such cost")));
        }
        if args.pbkdf_force_iterations.is_some_and(|count| count < 1000) {
            return Err(Error::usage("--pbkdf-force-iterations: pbkdf2 needs at least 1000"));
        }
    }
    Ok(KdfWish {
        kind: args.pbkdf.map(|kind| match kind {
            Pbkdf::Pbkdf2 => KdfKind::Pbkdf2,
            Pbkdf::Argon2i => KdfKind::Argon2i,
            Pbkdf::Argon2id => KdfKind::Argon2id,
        }),
        hash: None,
        iter_time_ms: args.iter_time,
        iterations: args.pbkdf_force_iterations,
        memory_kib: args.pbkdf_memory,
        lanes: args.pbkdf_parallel,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Cli, Verb};
    use crate::luks::args::Luks;
    use clap::Parser;

    fn typed(options: &str) -> Result<New> {
        let words = "cryptctl luks format v --key prompt".split(' ').chain(options.split_whitespace());
        let Verb::Luks(Luks::Format(args)) = Cli::try_parse_from(words).expect("parses").verb else {
            panic!("luks format was typed")
        };
        header(&args.new, args.format)
    }

    fn added(options: &str) -> Result<KdfWish> {
        let words = "cryptctl luks add-key v --key prompt --new-key prompt".split(' ');
        let cli = Cli::try_parse_from(words.chain(options.split_whitespace())).expect("parses");
        let Verb::Luks(Luks::AddKey(args)) = cli.verb else { panic!("luks add-key was typed") };
        keyslot(&args.kdf)
    }

    #[test]
    fn what_is_not_typed_is_left_to_the_daemon() {
        let new = typed("").unwrap_or_else(|error| panic!("{error}"));
        let json = serde_json::to_value(&new).expect("serializes");
        assert_eq!(json, serde_json::json!({ "version": "luks2", "kdf": {} }));
        assert_eq!(key_bytes(&new), 64);
    }

    #[test]
    fn everything_typed_reaches_the_wire() {
        let new = typed(
            "--cipher aes-xts-plain --key-size 256 --sector-size 1024 --hash SHA512 --label a --subsystem b \
             --uuid 0F8FAD5B-D9CB-469F-A165-70867728950E --data-offset 32M --key-slot 5 --luks2-metadata-size 64k \
             --luks2-keyslots-size 1M --pbkdf argon2i --iter-time 10 --pbkdf-memory 64 --pbkdf-parallel 2",
        )
        .unwrap_or_else(|error| panic!("{error}"));
        let json = serde_json::to_value(&new).expect("serializes");
        assert_eq!(
            json,
            serde_json::json!({
                "version": "luks2", "cipher": "aes-xts-plain", "key_bytes": 32, "data_unit": 1024, "hash": "sha512",
                "label": "a", "subsystem": "b", "uuid": "0f8fad5b-d9cb-469f-a165-70867728950e",
                "data_offset": 32 << 20, "metadata_bytes": 64 << 10, "keyslots_bytes": 1 << 20, "keyslot": 5,
                "kdf": { "kind": "argon2i", "iter_time_ms": 10, "memory_kib": 64, "lanes": 2 }
            })
        );
        assert_eq!(key_bytes(&new), 32);
    }

    #[test]
    fn luks1_refuses_what_its_header_has_no_room_for() {
        for (options, word) in [
            ("--label x", "--label"),
            ("--subsystem x", "--subsystem"),
            ("--luks2-metadata-size 16k", "--luks2-metadata-size"),
            ("--luks2-keyslots-size 1M", "--luks2-keyslots-size"),
            ("--sector-size 4096", "--sector-size"),
            ("--key-slot 8", "--key-slot"),
            ("--data-offset 700", "--data-offset"),
            ("--pbkdf argon2id", "--pbkdf"),
            ("--pbkdf argon2i", "--pbkdf"),
            ("--pbkdf-memory 64", "--pbkdf-memory"),
            ("--pbkdf-parallel 1", "--pbkdf-parallel"),
            ("--pbkdf-force-iterations 999", "--pbkdf-force-iterations"),
        ] {
            let error = typed(&format!("--format luks1 {options}")).expect_err(options);
            assert_eq!(error.exit as u8, 2, "{error}");
            assert!(error.failure.message.starts_with(&format!("{word}: ")), "{error}");
        }
        for options in ["--sector-size 512", "--key-slot 7", "--data-offset 512", "--pbkdf pbkdf2"] {
            assert!(typed(&format!("--format luks1 {options}")).is_ok(), "{options}");
        }
        assert!(typed("--data-offset 512").is_err(), "luks2 counts in 4096");
    }

    #[test]
    fn costs_belong_to_their_kdf() {
        for options in [
            "--pbkdf pbkdf2 --pbkdf-memory 64",
            "--pbkdf pbkdf2 --pbkdf-parallel 1",
            "--pbkdf pbkdf2 --pbkdf-force-iterations 999",
            "--pbkdf argon2id --hash sha256",
            "--pbkdf argon2i --hash sha256",
        ] {
            assert_eq!(added(options).expect_err(options).exit as u8, 2);
        }
        let wish = added("--pbkdf pbkdf2 --hash sha512 --pbkdf-force-iterations 1000").expect("good");
        assert_eq!(
            (wish.kind, wish.hash.as_deref(), wish.iterations),
            (Some(KdfKind::Pbkdf2), Some("sha512"), Some(1000))
        );
        // The volume's version, and so the default, is known to the daemon only.
        assert!(added("--pbkdf-memory 64 --pbkdf-force-iterations 4").is_ok());
    }
}
