//! What users see, as exact text.

use super::*;
use proto::luks::Tool;
use serde_json::json;

fn luks2() -> Dump {
    Dump {
        summary: Summary {
            version: Version::Luks2,
            uuid: "0f8fad5b-d9cb-469f-a165-70867728950e".into(),
            label: "back\x1b[31mup".into(),
            subsystem: String::new(),
            seqid: Some(7),
            metadata_bytes: Some(16 << 10),
            keyslots_bytes: Some(16_744_448),
            segments: vec![Segment {
                kind: "crypt".into(),
                offset: 16 << 20,
                size: None,
                cipher: "aes-xts-plain64".into(),
                data_unit: 4096,
                tweak_offset: 0,
                key_bits: 512,
                flags: vec![],
            }],
            keyslots: vec![argon2(0), pbkdf2(11)],
            requirements: vec![],
            flags: vec!["allow-discards".into()],
            copies: vec!["good".into(), "checksum does not fit".into()],
        },
        metadata: json!({
            "keyslots": {},
            "tokens": { "10": { "type": "luks2-keyring", "keyslots": ["0"], "key_description": "vol" },
                        "2": { "type": "cryptctl-key", "keyslots": ["0", "11"], "version": 1, "ref": "barbican:2f",
                               "created": "1000000000", "rotate_by": "1806451200" } },
            "digests": { "0": { "type": "pbkdf2", "keyslots": ["0", "11"], "segments": ["0"], "hash": "sha256",
                                "iterations": 1000, "salt": "c2FsdA==", "digest": "ZA==" } }
        }),
    }
}

fn argon2(id: u32) -> Keyslot {
    Keyslot {
        id,
        kind: "luks2".into(),
        kdf: "argon2id".into(),
        hash: String::new(),
        iterations: 4,
        memory_kib: 1 << 20,
        lanes: 4,
        key_bits: 512,
        priority: "normal".into(),
        bound: true,
        area_offset: 32 << 10,
        area_bytes: 258_048,
        unlock_seconds: None,
    }
}

fn pbkdf2(id: u32) -> Keyslot {
    Keyslot {
        kdf: "pbkdf2".into(),
        hash: "sha256".into(),
        iterations: 1000,
        memory_kib: 0,
        lanes: 0,
        priority: "prefer".into(),
        bound: false,
        area_offset: 290_816,
        ..argon2(id)
    }
}

#[test]
fn a_luks2_header_is_shown_in_full_and_cannot_steer_the_terminal() {
    assert_eq!(
        dump(&luks2(), false),
        "\
format         LUKS2
UUID           0f8fad5b-d9cb-469f-a165-70867728950e
label          back\u{fffd}[31mup
subsystem      -
sequence       7
header         2 copies of 16.00 KiB (good, checksum does not fit)
keyslots area  15.97 MiB
flags          allow-discards

SEGMENT  TYPE     OFFSET        SIZE  CIPHER           KEY  UNIT  TWEAK FROM  FLAGS
      0  crypt  16777216  to the end  aes-xts-plain64  512  4096           0  -

KEYSLOT  TYPE             KEY  PRIORITY  KDF       COST                               AREA   BYTES
      0  luks2            512  normal    argon2id  4 passes over 1.00 GiB, 4 lanes   32768  258048
     11  luks2 (unbound)  512  prefer    pbkdf2    1000 iterations of sha256        290816  258048

TOKEN  TYPE           KEYSLOTS  CONTENT
    2  cryptctl-key   0,11      barbican:2f, since 2001-09-09, to be replaced by 2027-03-31
   10  luks2-keyring  0         {\"key_description\":\"vol\"}

DIGEST  TYPE    HASH    ITERATIONS  KEYSLOTS  SEGMENTS
     0  pbkdf2  sha256        1000  0,11      0
"
    );
}

#[test]
fn a_luks1_header_has_no_fields_of_luks2() {
    let mut header = luks2();
    header.metadata = json!({ "magic": "LUKS", "payload-offset": 4096 });
    let summary = &mut header.summary;
    summary.version = Version::Luks1;
    (summary.seqid, summary.metadata_bytes, summary.keyslots_bytes) = (None, None, None);
    (summary.flags, summary.keyslots, summary.copies) = (vec![], vec![], vec![]);
    summary.segments[0].data_unit = 512;
    assert_eq!(
        dump(&header, false),
        "\
format  LUKS1
UUID    0f8fad5b-d9cb-469f-a165-70867728950e

SEGMENT  TYPE     OFFSET        SIZE  CIPHER           KEY  UNIT  TWEAK FROM  FLAGS
      0  crypt  16777216  to the end  aes-xts-plain64  512   512           0  -

no keyslot is in use: only the volume key or a header backup opens it
"
    );
}

#[test]
fn the_size_of_a_key_that_no_keyslot_tells_is_unknown() {
    let mut header = luks2().summary;
    header.segments[0].key_bits = 0;
    let text = summary(&header, false);
    assert!(text.contains("CIPHER               KEY  UNIT"), "{text}");
    assert!(text.contains("aes-xts-plain64  unknown  4096"), "{text}");
}

#[test]
fn a_segment_that_is_not_encrypted_has_no_cipher() {
    let mut header = luks2().summary;
    header.requirements = vec!["online-reencrypt-v2".into()];
    header.segments.push(Segment {
        kind: "linear".into(),
        offset: 0,
        size: Some(4096),
        cipher: String::new(),
        data_unit: 0,
        tweak_offset: 0,
        key_bits: 0,
        flags: vec!["in-reencryption".into(), "x".into()],
    });
    let text = summary(&header, false);
    assert!(text.contains("requirements   online-reencrypt-v2\n"), "{text}");
    assert!(text.contains("1  linear         0        4096  -"), "{text}");
    assert!(text.lines().any(|line| line.ends_with("-  in-reencryption,x")), "{text}");
}

#[test]
fn a_diagnosis_has_the_times_the_findings_and_the_tools() {
    let mut summary = luks2().summary;
    summary.keyslots[0].unlock_seconds = Some(2.04);
    let finding = |severity, about: &str, advice: Option<&str>| Finding {
        severity,
        about: about.into(),
        message: "something\nis".into(),
        advice: advice.map(str::to_owned),
    };
    let report = Doctor {
        summary: Some(summary),
        findings: vec![
            finding(Severity::Danger, "header", Some("repair it")),
            finding(Severity::Weak, "keyslot 11", None),
            finding(Severity::Note, "passphrase", None),
        ],
        tools: vec![
            Tool { name: "cryptsetup".into(), opens: true, remark: "from 2.0".into() },
            Tool { name: "qemu".into(), opens: false, remark: "reads LUKS1 only".into() },
        ],
    };
    let text = doctor(&report, false);
    assert!(text.contains("UNLOCKS IN\n"), "{text}");
    assert!(text.lines().any(|line| line.ends_with("258048       2.0 s")), "{text}");
    assert!(
        text.ends_with(
            "\
DANGER  header: something\u{fffd}is
        repair it
weak    keyslot 11: something\u{fffd}is
note    passphrase: something\u{fffd}is

TOOL        OPENS IT  REMARK
cryptsetup  yes       from 2.0
qemu        no        reads LUKS1 only
"
        ),
        "{text}"
    );
    assert_eq!((duration(0.012), duration(2.04)), ("12.00 ms".to_owned(), "2.0 s".to_owned()));
    let coloured = doctor(&report, true);
    assert!(coloured.contains("\x1b[1;31mDANGER\x1b[0m  header"), "{coloured}");
    assert!(coloured.contains("\x1b[33mweak  \x1b[0m  keyslot"), "{coloured}");
}

#[test]
fn what_was_repaired_or_would_be_is_told_apart() {
    let actions = vec!["wrote the secondary header".to_owned()];
    let text = |dry_run| repaired(&Repaired { actions: actions.clone(), dry_run });
    assert_eq!(text(false), "done:\n  wrote the secondary header\n");
    assert_eq!(text(true), "would be done:\n  wrote the secondary header\n");
    assert_eq!(repaired(&Repaired::default()), "there is nothing to repair\n");
}

#[test]
fn who_opened_is_one_line_for_scripts() {
    assert_eq!(opened(&Done { keyslot: Some(3), ..Done::default() }), "keyslot 3\n");
    assert_eq!(opened(&Done::default()), "volume key\n");
}

#[test]
fn no_tokens_are_told_in_words() {
    assert_eq!(tokens(&Map::new(), false), "no tokens\n");
}
