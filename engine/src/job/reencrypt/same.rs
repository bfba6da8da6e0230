//! Is what is asked for what was begun? Else going on would end well and leave a volume that nobody asked for: with another cipher, or
//! without the passphrase that was named.

use proto::reencrypt::Luks;

use crate::backend::blocking::Blocking;
use crate::crypto::Secret;
use crate::error::{Error, ErrorKind, Result};
use crate::format::luks2::Loaded;
use crate::format::luks2::metadata::Keyslot;
use crate::format::luks2::reencrypt::{self as format, Process, read};
use crate::job::reencrypt::request::Prepared;
use crate::volume::keyslots::GiveUp;
use crate::volume::{Header, unlock};

/// Refuse to go on with what is not what was asked for. Looks only; no effect where nothing is under way, or where its metadata is not
/// such that it can be gone on with, which is for [`crate::volume::reencrypt::open`] to say.
///
/// # Errors
/// `Conflict`: it was begun otherwise; `WrongKey`: the new passphrase opens no keyslot of the new volume key. Of the device.
pub fn check(header: &mut Blocking, prepared: &Prepared, luks: &Luks, give_up: GiveUp<'_>) -> Result<()> {
    let Ok(Header::Luks2(loaded)) = Header::load(header) else { return Ok(()) };
    let Ok(Some((process, _))) = read::read(&loaded.header.metadata) else { return Ok(()) };
    check_mode(&process, prepared)?;
    check_protection(process.resilience, prepared)?;
    check_cipher(&process, &loaded, prepared, luks)?;
    match &prepared.new_key {
        Some(new_key) => check_new_key(header, *loaded, &process, new_key, give_up),
        None => Ok(()),
    }
}

/// A re-encryption of another kind is not gone on with by mistake.
fn check_mode(process: &Process, prepared: &Prepared) -> Result<()> {
    if process.mode == prepared.mode() {
        return Ok(());
    }
    let (what, flag) = match process.mode {
        format::Mode::Reencrypt => ("re-encrypted", "neither --encrypt nor --decrypt"),
        format::Mode::Encrypt => ("encrypted", "--encrypt"),
        format::Mode::Decrypt => ("decrypted", "--decrypt"),
    };
    let what = format!("the volume is being {what}, which was begun and is not finished");
    Err(Error::new(ErrorKind::Conflict, what)
        .at(prepared.header().name())
        .hint(format!("go on with {flag} and --resume-only")))
}

/// Its means of protection are as it was begun.
///
/// # Errors
/// `Conflict`.
pub fn check_protection(begun: format::Resilience, prepared: &Prepared) -> Result<()> {
    let Some(asked) = prepared.resilience else { return Ok(()) };
    let asked = match asked {
        proto::reencrypt::Resilience::Checksum => "checksum",
        proto::reencrypt::Resilience::Journal => "journal",
        proto::reencrypt::Resilience::None => "none",
        proto::reencrypt::Resilience::Datashift => "datashift",
    };
    differ(prepared, "resilience", begun.name(), asked)
}

fn check_cipher(process: &Process, loaded: &Loaded, prepared: &Prepared, luks: &Luks) -> Result<()> {
    let Some(cipher) = &process.new.cipher else { return Ok(()) };
    if let Some(asked) = &luks.cipher {
        differ(prepared, "cipher", &cipher.encryption, asked)?;
    }
    if let Some(asked) = luks.data_unit {
        differ(prepared, "a data unit of bytes", &cipher.sector_size.to_string(), &asked.to_string())?;
    }
    let metadata = &loaded.header.metadata;
    let key_bytes = new_keyslots(loaded, process).find_map(|id| match metadata.keyslots.get(&id) {
        Some(Keyslot::Luks2(keyslot)) => Some(keyslot.key_size),
        _ => None,
    });
    if let (Some(asked), Some(begun)) = (luks.key_bytes, key_bytes) {
        let bits = |bytes: u32| (u64::from(bytes) * 8).to_string();
        differ(prepared, "a volume key of bits", &bits(begun), &bits(asked))?;
    }
    Ok(())
}

fn differ(prepared: &Prepared, what: &str, begun: &str, asked: &str) -> Result<()> {
    if begun == asked {
        return Ok(());
    }
    let what = format!(
        "a re-encryption is under way that was begun with {what} {begun}, and {asked} is asked for: nothing was written"
    );
    Err(Error::new(ErrorKind::Conflict, what)
        .at(prepared.header().name())
        .hint("finish it first with --resume-only, then begin the other"))
}

/// Keyslots of the new volume key.
fn new_keyslots(loaded: &Loaded, process: &Process) -> impl Iterator<Item = u32> {
    let digest = process.new.digest.and_then(|id| loaded.header.metadata.digests.get(&id));
    digest.map_or_else(Vec::new, |digest| digest.keyslots.clone()).into_iter()
}

fn check_new_key(
    header: &mut Blocking,
    loaded: Loaded,
    process: &Process,
    new_key: &Secret,
    give_up: GiveUp<'_>,
) -> Result<()> {
    let keyslots: Vec<u32> = new_keyslots(&loaded, process).collect();
    if keyslots.is_empty() {
        return Ok(());
    }
    let whole = Header::Luks2(Box::new(loaded));
    for id in keyslots {
        match unlock::keyslot_unless(header, &whole, id, new_key, give_up) {
            Ok(_) => return Ok(()),
            // One that this build cannot open may be the one: then it cannot be said that it is not, and it is not needed.
            Err(error) if matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::Limit) => return Ok(()),
            Err(error) if error.kind() == ErrorKind::WrongKey => {}
            Err(error) => return Err(error),
        }
    }
    let what = "a re-encryption is under way, and the new passphrase opens no keyslot of its new volume key: nothing was written";
    Err(Error::new(ErrorKind::WrongKey, what).at(header.name()).hint(
        "finish it first with --resume-only and without --new-key, then begin the other, or add the passphrase with \
         cryptctl luks add-key",
    ))
}
