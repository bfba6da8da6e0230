//! What a copy is a copy of: one line for everything that shapes the sink's bytes, and what source and sink are.
//!
//! ```text
//! work=encrypt
//! total=1073741824                                          bytes of plaintext
//! format={"key_bytes":64,…}                                 as the request has it, without descriptors
//! area=16777216+- aes-xts-plain64 4096 0                    offset, size, cipher, data unit, first counter; one line each
//! pad=false
//! sparse=false
//! keep_holes=false
//! source=file 131 1073741824 bytes, modified 1764.000000000, changed 1764.000000000    inode number and times
//! sink=file 132                                             or: device of N bytes
//! header=none                                               or: as `sink`, of a detached header to be written
//! ```
//!
//! Device numbers are not among them: they may change from boot to boot, and one that is the same may mean another disk.

use std::fmt::Write;

use proto::Format;
use rustix::fs::fstat;

use crate::backend::device::{Device, Nature};
use crate::error::{Error, Result};
use crate::job::geometry::Geometry;
use crate::pipeline::transfer::Work;

/// All that shapes the sink's bytes, and the ends.
pub struct Facts<'a> {
    /// Which way.
    pub work: Work,
    /// Bytes of plaintext.
    pub total: u64,
    /// As asked for.
    pub format: &'a Format,
    /// Where the data lies on the encrypted side.
    pub geometry: &'a Geometry,
    /// See `proto::Tuning::pad`.
    pub pad: bool,
    /// Zero plaintext is left out.
    pub sparse: bool,
    /// See `proto::Tuning::keep_holes`.
    pub keep_holes: bool,
    /// Where it comes from.
    pub source: &'a Device,
    /// Where it goes.
    pub sink: &'a Device,
    /// Where a detached header is to be written.
    pub header: Option<&'a Device>,
}

impl Facts<'_> {
    /// As lines.
    ///
    /// # Errors
    /// An end cannot be examined.
    pub(super) fn to_text(&self) -> Result<String> {
        let work = if self.work == Work::Decrypt { "decrypt" } else { "encrypt" };
        let mut text = format!("work={work}\ntotal={}\nformat={}\n", self.total, format(self.format));
        for area in self.geometry.areas() {
            let size = area.size.map_or("-".to_owned(), |size| size.to_string());
            let cipher = area.cipher.map_or("plain".to_owned(), |cipher| {
                format!("{} {} {}", cipher.spec.name(), cipher.unit_bytes, cipher.offset_sectors)
            });
            // Writing to a string does not fail.
            let _ = writeln!(text, "area={}+{size} {cipher}", area.offset);
        }
        let header = self.header.map_or(Ok("none".to_owned()), written)?;
        let _ = writeln!(text, "pad={}\nsparse={}\nkeep_holes={}", self.pad, self.sparse, self.keep_holes);
        let (source, sink) = (read(self.source)?, written(self.sink)?);
        let _ = writeln!(text, "source={source}\nsink={sink}\nheader={header}");
        Ok(text)
    }
}

/// The wish without what is not the same twice.
fn format(format: &Format) -> String {
    let json = match format {
        Format::Raw(raw) => serde_json::to_string(raw),
        Format::Luks(_) => return "luks".to_owned(),
        Format::NewLuks(new) => {
            let mut new = new.clone();
            (new.volume_key_fd, new.header) = (None, None);
            serde_json::to_string(&new)
        }
    };
    json.expect("wire types become JSON")
}

/// An end that is read, and must not have been changed.
fn read(device: &Device) -> Result<String> {
    if device.nature() != Nature::File {
        return written(device);
    }
    let stat = fstat(device.file()).map_err(|errno| Error::io("cannot examine", errno).at(device.name()))?;
    Ok(format!(
        "file {} {} bytes, modified {}.{:09}, changed {}.{:09}",
        stat.st_ino, stat.st_size, stat.st_mtime, stat.st_mtime_nsec, stat.st_ctime, stat.st_ctime_nsec
    ))
}

/// An end that is written, and so changes.
fn written(device: &Device) -> Result<String> {
    if device.nature() != Nature::File {
        return Ok(format!("device of {} bytes", device.size().unwrap_or(0)));
    }
    let stat = fstat(device.file()).map_err(|errno| Error::io("cannot examine", errno).at(device.name()))?;
    Ok(format!("file {}", stat.st_ino))
}
