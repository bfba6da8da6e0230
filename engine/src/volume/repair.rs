//! Damaged headers put right, as far as what is left says what was there.
//!
//! LUKS2: a copy that is damaged, or older than the other, is written again from the good one, with a salt of its own. The good
//! copy is not touched, so a crash leaves what there was. LUKS1: there is one copy without a checksum; what other programs are
//! known to get wrong in it is corrected (see [`luks1::Header::repaired`]), in the order of every LUKS1 header write.
//!
//! A volume over which something else was put, a filesystem or a partition table, has a damaged primary copy and maybe a good
//! secondary one. No list of such signatures is kept here, so a repair takes the word of the header that is left: it
//! overwrites the first bytes of what was put there. Rehearse it (`dry_run`), and look at the volume with `blkid` first.

use proto::luks::Repaired;

use crate::backend::blocking::Blocking;
use crate::error::{Error, ErrorKind, Result};
use crate::format::luks2::{Health, Loaded};
use crate::format::{luks1, luks2};
use crate::volume::{Header, store};

/// Put the header right, or only say what would be done.
///
/// # Errors
/// `Damaged`: beyond repair. `Unsupported`: nothing here looks like LUKS. Else of the device.
pub fn repair(device: &mut Blocking, dry_run: bool) -> Result<Repaired> {
    let mut first = [0; luks1::HEADER_BYTES];
    device.read(0, &mut first)?;
    let actions = if luks1::Header::is_here(&first) {
        repair_luks1(device, &first, dry_run)?
    } else {
        match Header::load(device).map_err(|error| with_way_out(error, &first))? {
            Header::Luks2(mut loaded) => repair_luks2(device, &mut loaded, dry_run)?,
            // The bytes changed between two reads: somebody else is writing.
            Header::Luks1(_) => {
                let what = "the header was changed by another program";
                return Err(Error::new(ErrorKind::Conflict, what).at(device.name()));
            }
        }
    };
    Ok(Repaired { actions, dry_run })
}

fn with_way_out(error: Error, first: &[u8]) -> Error {
    if luks2::is_here(first) || error.kind() == ErrorKind::Damaged {
        error.hint("neither copy is whole; only a header backup can bring it back")
    } else {
        error
    }
}

fn repair_luks1(
    device: &mut Blocking,
    first: &[u8; luks1::HEADER_BYTES],
    dry_run: bool,
) -> Result<Vec<String>> {
    let (header, actions) = luks1::Header::repaired(first).map_err(Error::as_damage)?;
    if !actions.is_empty() && !dry_run {
        store::replace_luks1(device, &header)?;
    }
    Ok(actions)
}

fn repair_luks2(device: &mut Blocking, loaded: &mut Loaded, dry_run: bool) -> Result<Vec<String>> {
    let names = ["primary", "secondary"];
    let actions: Vec<String> = names
        .iter()
        .zip(&loaded.health)
        .filter_map(|(name, health)| match health {
            Health::Good => None,
            Health::Obsolete => {
                Some(format!("the {name} copy is older than the other: written again from that"))
            }
            Health::Damaged(why) => {
                Some(format!("the {name} copy is damaged ({why}): written again from the other"))
            }
        })
        .collect();
    if !actions.is_empty() && !dry_run {
        store::repair_luks2(device, loaded)?;
    }
    Ok(actions)
}
