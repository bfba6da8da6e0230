//! Header copies, what is left where no copy is whole, and sizes of the devices.

use proto::luks::Summary;

use super::{Patient, Report};
use crate::backend::blocking::Blocking;
use crate::error::{Error, ErrorKind, Result};
use crate::format::luks1;
use crate::format::luks2::{COPY_BYTES, Health};
use crate::volume::Header;

/// Magic of a second copy.
const SECONDARY: &[u8; 6] = b"SKUL\xBA\xBE";
/// Magic of a LUKS1 header and of a first copy.
const PRIMARY: &[u8; 6] = b"LUKS\xBA\xBE";
/// The fields of a LUKS2 binary header that are shown: up to the end of the UUID.
const SHOWN_BYTES: usize = 208;

/// The two copies of a LUKS2 header, and fields of a LUKS1 header that other programs write wrong.
pub(super) fn copies(header: &Header, report: &mut Report) {
    match header {
        Header::Luks2(loaded) => {
            for (name, health) in ["primary", "secondary"].iter().zip(&loaded.health) {
                match health {
                    Health::Good => {}
                    Health::Obsolete => report.danger(
                        "header",
                        format!("the {name} copy is older than the other: a header write was interrupted"),
                        "repair rewrites it from the other",
                    ),
                    Health::Damaged(why) => report.danger(
                        "header",
                        format!("the {name} copy is damaged: {why}"),
                        "find out what wrote there, then repair rewrites it from the other",
                    ),
                }
            }
        }
        Header::Luks1(header) => {
            if let Ok((_, corrections)) = luks1::Header::repaired(&header.to_bytes()) {
                for correction in corrections {
                    report.weak("header", correction, "repair corrects it");
                }
            }
        }
    }
    report.note(
        "header",
        "whether a header backup exists cannot be known from the volume",
        "without one, damage to header or keyslots loses all data: header-backup makes one",
    );
}

/// No header that could be used: say what is there.
///
/// # Errors
/// `error`, if there is no trace of LUKS; of the device.
pub(super) fn ruins(
    device: &mut Blocking,
    error: Error,
    header_bytes: Option<u64>,
    report: &mut Report,
) -> Result<()> {
    let mut first = [0; luks1::HEADER_BYTES];
    let mut found = false;
    if there(device.read(0, &mut first))? && first.starts_with(PRIMARY) {
        found = true;
        if luks1::Header::is_here(&first) {
            ruined_luks1(&first, report);
        } else {
            let number = u16::from_be_bytes([first[6], first[7]]);
            report.note("header", format!("byte 0 has the signature of LUKS, version {number}"), "");
        }
        report.note("header", format!("its UUID reads {:?}", text(&first[168..208])), "");
    }
    let mut offset = *COPY_BYTES.start();
    while offset <= *COPY_BYTES.end() {
        let mut bytes = [0; SHOWN_BYTES];
        if there(device.read(offset, &mut bytes))? && bytes.starts_with(SECONDARY) {
            found = true;
            let seqid = u64::from_be_bytes(bytes[16..24].try_into().unwrap_or_default());
            let size = u64::from_be_bytes(bytes[8..16].try_into().unwrap_or_default());
            let its_uuid = text(&bytes[168..208]);
            report.note(
                "header",
                format!(
                    "byte {offset} has the signature of a second LUKS2 copy (of {size} bytes, write {seqid}, UUID \
                     {its_uuid:?})"
                ),
                "",
            );
        }
        offset *= 2;
    }
    if !found {
        return Err(error);
    }
    report.danger(
        "header",
        format!("no usable header: {}", error.chain()),
        "a header backup can be restored; otherwise save all of the keyslots area before anything is tried",
    );
    if let Some(bytes) = header_bytes {
        report.note("device", format!("it ends at byte {bytes}"), "");
    }
    Ok(())
}

fn ruined_luks1(first: &[u8; luks1::HEADER_BYTES], report: &mut Report) {
    match luks1::Header::repaired(first) {
        Ok((_, corrections)) => {
            for correction in corrections {
                report.note("header", format!("repair could correct this: {correction}"), "");
            }
        }
        Err(error) => report.note("header", format!("beyond repair: {}", error.chain()), ""),
    }
}

/// A read beyond the end finds nothing; anything else that fails is an error.
fn there(read: Result<()>) -> Result<bool> {
    match read {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::Invalid => Ok(false),
        Err(error) => Err(error),
    }
}

/// A text field of a header that may hold anything.
fn text(field: &[u8]) -> String {
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    field[..end].iter().filter(|byte| byte.is_ascii_graphic()).map(|byte| char::from(*byte)).collect()
}

/// What the header says against the bytes there are.
pub(super) fn sizes(header: &Header, summary: &Summary, patient: &Patient<'_>, report: &mut Report) {
    let header_end = match header {
        Header::Luks1(header) => header.backup_bytes(),
        Header::Luks2(loaded) => loaded.header.backup_bytes(),
    };
    let used_end = summary.keyslots.iter().map(|slot| slot.area_offset.saturating_add(slot.area_bytes)).max();
    if let Some(bytes) = patient.header_bytes {
        if used_end.is_some_and(|end| end > bytes) {
            report.danger(
                "device",
                format!("the header is cut off: keyslots in use lie beyond the {bytes} bytes there are"),
                "restore a header backup",
            );
        } else if header_end > bytes {
            report.danger(
                "device",
                format!(
                    "the header is cut off: {bytes} of {header_end} bytes; no keyslot in use is affected"
                ),
                "make a header backup after extending the file to its length",
            );
        }
    }
    let data_bytes = if patient.is_detached { patient.data_bytes } else { patient.header_bytes };
    for (index, segment) in summary.segments.iter().enumerate() {
        let about = format!("segment {index}");
        if !patient.is_detached && segment.offset < header_end {
            report.danger(
                &about,
                format!(
                    "its data begin at byte {}, inside the header: this is a detached header",
                    segment.offset
                ),
                "name the header and the device with the data separately",
            );
            continue;
        }
        let Some(bytes) = data_bytes else { continue };
        let unit = u64::from(segment.data_unit.max(512));
        match segment.size {
            _ if segment.offset >= bytes => report.danger(
                &about,
                format!("its data begin at byte {}, the device ends at {bytes}", segment.offset),
                "the device was cut off or shrunk, or it is the wrong one",
            ),
            Some(size) if segment.offset.saturating_add(size) > bytes => report.danger(
                &about,
                format!("its {size} bytes from {} on do not fit the device of {bytes} bytes", segment.offset),
                "the device was cut off or shrunk: enlarge it before the volume is used",
            ),
            None if !(bytes - segment.offset).is_multiple_of(unit) => report.note(
                &about,
                format!("the last {} bytes of the device make no data unit", (bytes - segment.offset) % unit),
                "",
            ),
            _ => {}
        }
    }
}
