//! Header backup and restore. The file is cryptsetup's: either program restores what the other saved.
//!
//! A backup is a copy of the device from byte 0 to the end of the keyslots area (LUKS2: `2 * hdr_size + keyslots_size`; LUKS1:
//! to the end of the last keyslot's place, rounded up to 4096, with zeros between the header and the first place, so that no
//! old signature lies in it, and zeros for what the rounding would take of the data). It holds wrapped keys: with a passphrase of the time of the backup it opens the volume for ever,
//! also when that passphrase has been removed from the volume since.
//!
//! Restoring puts back a whole state: the order of writes is in [`restore`]'s own file.

mod restore;

use proto::luks::Done;

use crate::backend::blocking::Blocking;
use crate::error::Result;
use crate::format::luks1;
use crate::format::luks2::Health;
use crate::volume::Header;
pub use restore::{Backup, restore};

/// LUKS1 backups are whole pages, as cryptsetup's.
const LUKS1_STEP: u64 = 4096;
/// Bytes copied at a time.
const PIECE: usize = 1 << 20;

/// Bytes of the backup of a volume, which is more than [`header_bytes`] where LUKS1 is rounded up.
#[must_use]
pub fn bytes(header: &Header) -> u64 {
    match header {
        Header::Luks1(header) => header.backup_bytes().next_multiple_of(LUKS1_STEP),
        Header::Luks2(loaded) => loaded.header.backup_bytes(),
    }
}

/// Bytes of the device that belong to the header: what a backup takes from it, and a restore puts back. Behind them the
/// data may begin, also within the last page of a LUKS1 backup.
#[must_use]
pub fn header_bytes(header: &Header) -> u64 {
    match header {
        Header::Luks1(header) => header.backup_bytes(),
        Header::Luks2(loaded) => loaded.header.backup_bytes(),
    }
}

/// Copy header and keyslots of `device` to `into`, which is empty, and make them durable. Giving the file its name is left to
/// the caller.
///
/// # Errors
/// Of [`Header::load`] and of the devices.
pub fn save(device: &mut Blocking, into: &mut Blocking) -> Result<Done> {
    let header = Header::load(device)?;
    let total = bytes(&header);
    let ours = header_bytes(&header);
    let mut piece = vec![0; PIECE];
    let mut at = 0;
    while at < total {
        let length = usize::try_from(total - at).unwrap_or(usize::MAX).min(PIECE);
        let piece = &mut piece[..length];
        // What follows may be data, or not there at all.
        let there = usize::try_from(ours.saturating_sub(at)).unwrap_or(usize::MAX).min(length);
        device.read(at, &mut piece[..there])?;
        piece[there..].fill(0);
        if let (0, Header::Luks1(header)) = (at, &header) {
            let first = header.keyslots.iter().map(luks1::Keyslot::material_offset).min();
            let end = usize::try_from(first.unwrap_or(0)).unwrap_or(usize::MAX).min(length);
            if end > luks1::HEADER_BYTES {
                piece[luks1::HEADER_BYTES..end].fill(0);
            }
        }
        into.write(at, piece)?;
        at += length as u64;
    }
    into.flush()?;
    let mut warnings = vec![
        "the backup holds wrapped keys: with any passphrase of today it opens the volume, also after that \
         passphrase was removed; keep it as safe as the passphrases"
            .to_owned(),
    ];
    if let Header::Luks2(loaded) = &header {
        if loaded.health.iter().any(|health| *health != Health::Good) {
            warnings.push(
                "one copy of the header is not good; it was saved as it is: repair the volume".to_owned(),
            );
        }
        let unmet = loaded.header.metadata.unmet_requirements();
        if !unmet.is_empty() {
            warnings.push(format!(
                "the header has requirements ({}): this backup describes a passing state and cannot be restored",
                unmet.join(", ")
            ));
        }
    }
    Ok(Done { uuid: header.uuid().to_owned(), warnings, ..Done::default() })
}
