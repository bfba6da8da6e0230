//! LUKS1 headers and keyslots against the programs that define them in practice, and against every way of being wrong we know.
//!
//! | file | what it asks |
//! |---|---|
//! | `peers` | do we read what cryptsetup and QEMU write, and they what we write? |
//! | `bad` | are the headers of `vectors/bad/luks1` refused, and at least those that cryptsetup refuses? |
//! | `mutants` | does any mutation of a valid header make the parser panic, or accept what it then cannot write? |

mod bad;
mod mutants;
mod peers;

use std::path::Path;
use std::process::{Command, Stdio};

use engine::crypto::Secret;
use engine::crypto::hash::Hash;
use engine::crypto::kdf::Kdf;
use engine::crypto::spec::CipherSpec;
use engine::format::luks1::Header;
use engine::volume::area::Wrapping;

/// What a program said.
struct Said {
    ok: bool,
    text: String,
}

/// Run a program with `input` on its stdin; `None` if it is not installed.
fn run(program: &str, args: &[&str], input: &[u8]) -> Option<Said> {
    use std::io::Write;
    let mut command = Command::new(program);
    command.args(args).env("LC_ALL", "C").env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin:/usr/local/bin");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = match command.spawn() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
        child => child.expect("the program starts"),
    };
    // A program that has no use for its input may be gone already.
    let _ = child.stdin.take().expect("piped").write_all(input);
    let output = child.wait_with_output().expect("the program ends");
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    Some(Said { ok: output.status.success(), text: text.into_owned() })
}

/// cryptsetup, without locks and questions.
fn cryptsetup(args: &[&str], input: &[u8]) -> Option<Said> {
    run("cryptsetup", &[&["--batch-mode", "--disable-locks"], args].concat(), input)
}

/// As [`cryptsetup`]; it must succeed.
fn cryptsetup_does(args: &[&str], input: &[u8]) -> String {
    let said = cryptsetup(args, input).expect("cryptsetup was there a moment ago");
    assert!(said.ok, "cryptsetup {args:?}: {}", said.text);
    said.text
}

fn is_installed(program: &str) -> bool {
    run(program, &["--version"], b"").is_some()
}

fn name(path: &Path) -> &str {
    path.to_str().expect("scratch paths are UTF-8")
}

fn secret(bytes: &[u8]) -> Secret {
    Secret::copy_of(bytes).expect("memory")
}

/// How the material of a header's keyslot is made.
fn wrapping(header: &Header, keyslot: usize) -> Wrapping<'_> {
    let hash = Hash::from_name(&header.hash).expect("a known hash");
    let keyslot = &header.keyslots[keyslot];
    Wrapping {
        kdf: Kdf::Pbkdf2 { hash, iterations: keyslot.iterations },
        salt: &keyslot.salt,
        cipher: CipherSpec::parse(&header.cipher()).expect("a known cipher"),
        area_key_bytes: header.key_bytes as usize,
        af_hash: hash,
    }
}

/// The key in a keyslot of an image.
fn unwrap(header: &Header, keyslot: usize, passphrase: &[u8], image: &[u8]) -> Secret {
    let at = usize::try_from(header.keyslots[keyslot].material_offset()).expect("an offset");
    let bytes = usize::try_from(header.material_bytes()).expect("a length");
    let mut material = image[at..at + bytes].to_vec();
    let key_bytes = header.key_bytes as usize;
    wrapping(header, keyslot).unwrap(&secret(passphrase), &mut material, key_bytes).expect("some key")
}

/// The digest of a volume key, as the header has it.
fn digest(header: &Header, key: &Secret) -> [u8; 20] {
    let hash = Hash::from_name(&header.hash).expect("a known hash");
    let mut digest = [0; 20];
    Kdf::Pbkdf2 { hash, iterations: header.digest_iterations }
        .derive(key.as_bytes(), &header.digest_salt, &mut digest)
        .expect("a digest");
    digest
}

/// A header as cryptsetup makes it for AES-256-XTS, keyslot 0 in use, its secrets made up.
fn sample() -> Header {
    let mut header = Header::layout(64, Header::default_payload_sector(64)).expect("a layout");
    header.cipher_name = "aes".to_owned();
    header.cipher_mode = "xts-plain64".to_owned();
    header.hash = "sha256".to_owned();
    header.uuid = "5f4b1c5e-8d21-4a37-9c0d-2f6a1e7b3c90".to_owned();
    header.digest = std::array::from_fn(|at| 0xd0 ^ u8::try_from(at).expect("small"));
    header.digest_salt = std::array::from_fn(|at| 0x50 ^ u8::try_from(at).expect("small"));
    header.digest_iterations = 1000;
    header.keyslots[0].active = true;
    header.keyslots[0].iterations = 2000;
    header.keyslots[0].salt = std::array::from_fn(|at| 0xa0 ^ u8::try_from(at).expect("small"));
    header
}
