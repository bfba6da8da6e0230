//! LUKS volumes for tests: the shapes they come in, and the real tools that read and write them without device-mapper.
//!
//! Nothing here asks our own programs anything, but for [`dump`]: a volume is read by qemu-img, nbdkit or cryptsetup, to its last
//! byte, or the test fails.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use proto::{Body, Reply, luks};
use serde_json::Value;

use crate::{Place, skip};

/// The lowest costs cryptsetup and we agree to.
pub const CHEAP_PBKDF2: &str = "--pbkdf pbkdf2 --pbkdf-force-iterations 1000";
/// As [`CHEAP_PBKDF2`].
pub const CHEAP_ARGON2ID: &str =
    "--pbkdf argon2id --pbkdf-force-iterations 4 --pbkdf-memory 32 --pbkdf-parallel 1";
/// Bytes [`encrypted_by_cryptsetup`] leaves for the header of a volume.
pub const SMALL_HEADER: usize = 2 << 20;

/// What a volume looks like, as far as a user chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// 1 or 2.
    pub version: u32,
    /// Bytes of a data unit.
    pub unit: u32,
    /// Bits of the volume key.
    pub bits: u32,
    /// `pbkdf2` or `argon2id`.
    pub kdf: &'static str,
}

impl Shape {
    /// Every LUKS1 shape.
    pub const LUKS1: [Self; 2] = [Self::luks1(256), Self::luks1(512)];
    /// Every LUKS2 shape.
    pub const LUKS2: [Self; 8] = [
        Self::luks2(512, 256, "pbkdf2"),
        Self::luks2(512, 512, "pbkdf2"),
        Self::luks2(512, 256, "argon2id"),
        Self::luks2(512, 512, "argon2id"),
        Self::luks2(4096, 256, "pbkdf2"),
        Self::luks2(4096, 512, "pbkdf2"),
        Self::luks2(4096, 256, "argon2id"),
        Self::luks2(4096, 512, "argon2id"),
    ];

    /// LUKS1 has one choice.
    #[must_use]
    pub const fn luks1(bits: u32) -> Self {
        Self { version: 1, unit: 512, bits, kdf: "pbkdf2" }
    }

    /// LUKS2 has three.
    #[must_use]
    pub const fn luks2(unit: u32, bits: u32, kdf: &'static str) -> Self {
        Self { version: 2, unit, bits, kdf }
    }

    /// Options of key derivation and key: cryptctl's and cryptsetup's alike.
    #[must_use]
    pub fn costs(self) -> String {
        let kdf = if self.kdf == "pbkdf2" { CHEAP_PBKDF2 } else { CHEAP_ARGON2ID };
        format!("--key-size {} {kdf}", self.bits)
    }

    /// Options of `cryptctl encrypt` and `cryptctl luks format`.
    #[must_use]
    pub fn ours(self) -> String {
        match self.version {
            1 => format!("--format luks1 {}", self.costs()),
            _ => format!("--format luks2 --sector-size {} {}", self.unit, self.costs()),
        }
    }

    /// Options of `cryptsetup luksFormat` and `cryptsetup reencrypt --encrypt`.
    #[must_use]
    pub fn theirs(self) -> String {
        match self.version {
            1 => format!("--batch-mode --type luks1 {}", self.costs()),
            _ => format!("--batch-mode --type luks2 --sector-size {} {}", self.unit, self.costs()),
        }
    }
}

/// Are all these programs here? If not, says so as a skipped test does.
#[must_use]
pub fn have(programs: &[&str]) -> bool {
    let dirs = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];
    let missing = programs.iter().find(|name| !dirs.iter().any(|dir| Path::new(dir).join(name).is_file()));
    if let Some(name) = missing {
        skip(&format!("no {name}"));
    }
    missing.is_none()
}

/// A file with a passphrase or a key, closed to others.
pub fn secret(place: &Place, name: &str, bytes: &[u8]) {
    place.write(name, bytes);
    std::fs::set_permissions(place.path(name), PermissionsExt::from_mode(0o600)).expect("closed to others");
}

/// An empty file of this length.
pub fn empty(place: &Place, name: &str, length: usize) {
    let length = u64::try_from(length).expect("a length");
    std::fs::File::create(place.path(name)).and_then(|file| file.set_len(length)).expect("an empty file");
}

/// Does this passphrase open the volume, says cryptsetup? `header` is the file with the header.
///
/// # Panics
/// If it says something else than yes or no.
#[must_use]
pub fn cryptsetup_opens(place: &Place, header: &str, key: &str) -> bool {
    let ran = place.shell(&format!("cryptsetup open --test-passphrase --key-file @/{key} @/{header}"));
    match ran.code {
        Some(0) => true,
        // 2 is its code for "no permission (bad passphrase)".
        Some(2) => false,
        other => panic!("cryptsetup open: {other:?}: {}", ran.stderr),
    }
}

/// Cryptsetup has to open it with one, and not with the other.
pub fn opens_with_only(place: &Place, header: &str, right: &str, wrong: &str) {
    assert!(cryptsetup_opens(place, header, right), "{header}: {right} does not open it");
    assert!(!cryptsetup_opens(place, header, wrong), "{header}: {wrong} opens it");
}

/// What `cryptsetup luksDump` prints of a field of LUKS1, such as `Payload offset`.
#[must_use]
pub fn luks1_field(place: &Place, header: &str, name: &str) -> String {
    let text = place.shell(&format!("cryptsetup luksDump @/{header}")).done().text();
    let found = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    found.unwrap_or_else(|| panic!("no {name} in:\n{text}")).trim().to_owned()
}

/// The metadata of LUKS2 as `cryptsetup luksDump` prints them.
#[must_use]
pub fn luks2_json(place: &Place, header: &str) -> Value {
    let ran = place.shell(&format!("cryptsetup luksDump --dump-json-metadata @/{header}")).done();
    serde_json::from_slice(&ran.stdout).expect("JSON")
}

/// The volume key as cryptsetup finds it, in a new file.
pub fn volume_key(place: &Place, header: &str, key: &str, into: &str) -> Vec<u8> {
    let _ = std::fs::remove_file(place.path(into));
    let dumped = place.shell(&format!(
        "cryptsetup luksDump --batch-mode --dump-volume-key --volume-key-file @/{into} --key-file @/{key} @/{header}"
    ));
    let _ = dumped.done();
    place.read(into)
}

/// The volume's uuid as cryptsetup tells it.
#[must_use]
pub fn uuid(place: &Place, header: &str) -> String {
    place.shell(&format!("cryptsetup luksUUID @/{header}")).done().text().trim().to_owned()
}

/// Our own description of a volume.
///
/// # Panics
/// If there is none.
#[must_use]
pub fn dump(place: &Place, words: &str) -> luks::Dump {
    match place.answer(&format!("luks dump {words} --json")) {
        Reply::Luks(reply) => match *reply {
            luks::Reply::Dump(dump) => *dump,
            other => panic!("no dump: {other:?}"),
        },
        other => panic!("no dump: {other:?}"),
    }
}

/// Our own opinion about a volume. Its exit code has to tell whether there is danger.
///
/// # Panics
/// If there is none.
#[must_use]
pub fn doctor(place: &Place, words: &str) -> luks::Doctor {
    let ran = place.run(&format!("luks doctor {words} --json"));
    let line = ran.lines().pop().unwrap_or_else(|| panic!("no opinion: {ran:?}"));
    let doctor = match line.body {
        Body::Ok(Reply::Luks(reply)) => match *reply {
            luks::Reply::Doctor(doctor) => *doctor,
            other => panic!("no opinion: {other:?}"),
        },
        other => panic!("no opinion: {other:?}"),
    };
    let danger = doctor.findings.iter().any(|finding| finding.severity == luks::Severity::Danger);
    assert_eq!(ran.code, Some(i32::from(danger)), "{ran:?}");
    doctor
}

/// Does `doctor` say that this tool opens the volume?
///
/// # Panics
/// If it says nothing about it.
#[must_use]
pub fn can_open(doctor: &luks::Doctor, tool: &str) -> bool {
    let found = doctor.tools.iter().find(|said| said.name == tool);
    found.unwrap_or_else(|| panic!("nothing about {tool}: {:?}", doctor.tools)).opens
}

/// What cryptsetup reads from a volume with a LUKS2 header in front: its own crypto decrypts a copy in place, moves the data to
/// the front, and puts the header elsewhere. As many bytes as `length`.
#[must_use]
pub fn read_by_cryptsetup(place: &Place, volume: &str, key: &str, length: usize) -> Vec<u8> {
    let _ = place
        .shell(&format!(
            "rm -f @/exported; cp --sparse=always @/{volume} @/moved && \
             cryptsetup reencrypt --batch-mode --decrypt --force-offline-reencrypt --header @/exported --key-file @/{key} \
             @/moved && truncate -s {length} @/moved"
        ))
        .done();
    place.read("moved")
}

/// What cryptsetup reads from a volume whose LUKS2 header is elsewhere: it decrypts a copy in place.
#[must_use]
pub fn read_detached_by_cryptsetup(place: &Place, header: &str, data: &str, key: &str) -> Vec<u8> {
    let _ = place
        .shell(&format!(
            "cp @/{header} @/exported && cp --sparse=always @/{data} @/moved && \
             cryptsetup reencrypt --batch-mode --decrypt --force-offline-reencrypt --header @/exported --key-file @/{key} @/moved"
        ))
        .done();
    place.read("moved")
}

/// A LUKS2 volume with a small header whose data cryptsetup's own crypto encrypted. As large as `plain` and the header: cryptsetup
/// needs some more room to work in, which is cut off.
pub fn encrypted_by_cryptsetup(place: &Place, plain: &str, volume: &str, key: &str, options: &str) {
    let length = place.read(plain).len();
    let _ = place
        .shell(&format!(
            "cp @/{plain} @/{volume} && truncate -s {room} @/{volume} && \
             cryptsetup reencrypt --encrypt --force-offline-reencrypt --reduce-device-size {reduce} \
             --luks2-metadata-size 16k --luks2-keyslots-size 1M --key-file @/{key} {options} @/{volume} && \
             truncate -s {end} @/{volume}",
            reduce = 2 * SMALL_HEADER,
            room = length + 2 * SMALL_HEADER,
            end = length + SMALL_HEADER,
        ))
        .done();
}

/// How QEMU is told about a LUKS1 volume: the words before a command's own, and its name for the image.
fn qemu(key: &str, volume: &str) -> (String, String) {
    (
        format!("--object secret,id=key,file=@/{key}"),
        format!("driver=luks,key-secret=key,file.driver=file,file.filename=@/{volume}"),
    )
}

/// What QEMU reads from a LUKS1 volume. Its `compare` has to agree with its `convert`.
#[must_use]
pub fn read_by_qemu(place: &Place, volume: &str, key: &str) -> Vec<u8> {
    read_detached_by_qemu(place, None, volume, key)
}

/// As [`read_by_qemu`], with the header in another file.
#[must_use]
pub fn read_detached_by_qemu(place: &Place, header: Option<&str>, volume: &str, key: &str) -> Vec<u8> {
    let (object, mut image) = qemu(key, volume);
    if let Some(header) = header {
        image.push_str(&format!(",header.driver=file,header.filename=@/{header}"));
    }
    let _ = place.shell(&format!("qemu-img convert {object} --image-opts {image} -O raw @/qemu.out")).done();
    let _ = place
        .shell(&format!(
            "qemu-img compare {object} --image-opts {image} driver=raw,file.driver=file,file.filename=@/qemu.out"
        ))
        .done();
    place.read("qemu.out")
}

/// Write a plaintext through QEMU's LUKS driver into an existing LUKS1 volume with room for it.
pub fn fill_by_qemu(place: &Place, plain: &str, header: Option<&str>, volume: &str, key: &str) {
    let (object, mut image) = qemu(key, volume);
    if let Some(header) = header {
        image.push_str(&format!(",header.driver=file,header.filename=@/{header}"));
    }
    let _ = place
        .shell(&format!("qemu-img convert {object} -n -f raw --target-image-opts @/{plain} {image}"))
        .done();
}

/// Add a passphrase with `qemu-img amend`.
pub fn qemu_adds_key(place: &Place, volume: &str, key: &str, new_key: &str) {
    let (object, image) = qemu(key, volume);
    let _ = place
        .shell(&format!(
            "qemu-img amend {object} --object secret,id=new,file=@/{new_key} \
             -o state=active,new-secret=new,iter-time=10 --image-opts {image}"
        ))
        .done();
}

/// Destroy the keyslots a passphrase opens with `qemu-img amend`; another one opens the volume for it.
pub fn qemu_removes_key(place: &Place, volume: &str, key: &str, old_key: &str) {
    let (object, image) = qemu(key, volume);
    let _ = place
        .shell(&format!(
            "qemu-img amend {object} --object secret,id=old,file=@/{old_key} -o state=inactive,old-secret=old \
             --image-opts {image}"
        ))
        .done();
}

/// What `qemu-img info` says of a LUKS1 volume's format.
#[must_use]
pub fn qemu_info(place: &Place, volume: &str, key: &str) -> Value {
    let (object, image) = qemu(key, volume);
    let ran = place.shell(&format!("qemu-img info --output=json {object} --image-opts {image}")).done();
    let info: Value = serde_json::from_slice(&ran.stdout).expect("JSON");
    info["format-specific"]["data"].clone()
}

/// What nbdkit's filter reads from a LUKS1 volume. The passphrase must be one line of text without its end.
#[must_use]
pub fn read_by_nbdkit(place: &Place, volume: &str, key: &str) -> Vec<u8> {
    let _ = place
        .shell(&format!(
            "rm -f @/nbdkit.out; nbdkit -U - --filter=luks file @/{volume} passphrase=+@/{key} \
             --run 'nbdcopy \"$uri\" @/nbdkit.out'"
        ))
        .done();
    place.read("nbdkit.out")
}
