//! The rivals: other programs that turn the same bytes into an encrypted volume, started as a careful user would.

use std::fs;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

/// Write the passphrase both rivals read from a file.
///
/// # Errors
/// As the file system has them.
pub fn write_passphrase(path: &Path) -> io::Result<()> {
    fs::write(path, "benches protect nothing")
}

fn secret(passphrase: &Path) -> String {
    format!("secret,id=pass,file={}", option(passphrase))
}

/// A path inside a qemu option list, where a comma separates and two of them are one.
fn option(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// `qemu-img create` of the LUKS1 volume (aes-256, xts, plain64) that [`qemu`] encrypts into. Apart from it, because
/// qemu spends two seconds on measuring its key derivation, and the data path is what is compared.
#[must_use]
pub fn qemu_create(passphrase: &Path, sink: &Path, size: u64) -> Command {
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "luks", "--object"]).arg(secret(passphrase));
    command.args(["-o", "key-secret=pass,cipher-alg=aes-256,cipher-mode=xts,ivgen-alg=plain64,iter-time=10"]);
    command.arg(sink).arg(size.to_string()).stdin(Stdio::null()).stdout(Stdio::null());
    command
}

/// `qemu-img convert` between raw and an existing LUKS1 volume, past the page cache. `wide` adds 16 coroutines and
/// writes out of order, its fastest setting; the default is what most scripts use.
#[must_use]
pub fn qemu(encrypt: bool, wide: bool, passphrase: &Path, source: &Path, sink: &Path) -> Command {
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-t", "none", "-T", "none"]);
    if wide {
        command.args(["-m", "16", "-W"]);
    }
    command.arg("--object").arg(secret(passphrase)).arg("--image-opts");
    let luks = |path: &Path| format!("driver=luks,key-secret=pass,file.filename={}", option(path));
    let raw = |path: &Path| format!("driver=raw,file.filename={}", option(path));
    if encrypt {
        command.args(["-n", "--target-image-opts"]).arg(raw(source)).arg(luks(sink));
    } else {
        command.args(["-O", "raw"]).arg(luks(source)).arg(sink);
    }
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
}

/// What `qemu-nbd` serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QemuNbd {
    /// The file as it is.
    Raw,
    /// The plaintext of a LUKS1 volume.
    Luks,
}

/// `qemu-nbd` of a file on a Unix socket, by io_uring, for up to 16 clients, until it is ended; `direct`: past the page cache.
#[must_use]
pub fn qemu_nbd(what: QemuNbd, direct: bool, passphrase: &Path, file: &Path, socket: &Path) -> Command {
    let mut command = Command::new("qemu-nbd");
    command.args(["--persistent", "--shared=16", "--aio=io_uring"]);
    command.arg(if direct { "--cache=none" } else { "--cache=writeback" });
    command.arg("--socket").arg(socket);
    match what {
        QemuNbd::Raw => command.args(["--format=raw"]).arg(file),
        QemuNbd::Luks => {
            command.arg("--object").arg(secret(passphrase)).arg("--image-opts");
            command
                .arg(format!("driver=luks,key-secret=pass,file.driver=file,file.filename={}", option(file)))
        }
    };
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command
}

/// `openssl enc` as a filter. It has no XTS: AES-256-CTR is the nearest and the cheaper cipher.
#[must_use]
pub fn openssl(encrypt: bool, passphrase: &Path) -> Command {
    let mut command = Command::new("openssl");
    command.args(["enc", "-aes-256-ctr", "-nosalt", "-pbkdf2", "-iter", "1", "-bufsize", "1048576"]);
    command.arg(if encrypt { "-e" } else { "-d" });
    command.arg("-pass").arg(format!("file:{}", passphrase.display()));
    command
}

/// `dd | openssl enc | dd`, reading and writing past the page cache, durable at its end.
#[must_use]
pub fn openssl_files(encrypt: bool, passphrase: &Path, source: &Path, sink: &Path) -> [Command; 3] {
    let mut reader = Command::new("dd");
    reader.arg(format!("if={}", source.display())).args(["bs=1M", "iflag=direct", "status=none"]);
    reader.stdin(Stdio::null());
    let mut writer = Command::new("dd");
    writer.arg(format!("of={}", sink.display()));
    writer.args(["bs=1M", "iflag=fullblock", "oflag=direct", "conv=fsync", "status=none"]);
    [reader, openssl(encrypt, passphrase), writer]
}

/// `cryptsetup reencrypt` of a LUKS2 volume in place, without device-mapper, to a new volume key.
#[must_use]
pub fn cryptsetup_reencrypt(passphrase: &Path, resilience: &str, volume: &Path) -> Command {
    let mut command = Command::new("cryptsetup");
    command.args(["reencrypt", "--batch-mode", "--force-offline-reencrypt", "--resilience", resilience]);
    command.args(["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file"]).arg(passphrase);
    command.arg(volume).stdin(Stdio::null());
    command
}
