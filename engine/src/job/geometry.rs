//! Where a volume's plaintext lies on its encrypted side: what sizes and alignments follow from.

use crate::backend::device::Device;
use crate::crypto::{Kernel, Secret};
use crate::error::{Error, ErrorKind, Result};
use crate::pipeline::crypt::unaligned;
use crate::pipeline::segment::{Segment, Segments};
use crate::pipeline::transfer::UNIT_BYTES_MAX;
use crate::volume::DataArea;

/// The data areas of a volume, in the order of the plaintext.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Geometry {
    areas: Vec<DataArea>,
}

impl Geometry {
    /// Of a volume with these areas.
    ///
    /// # Errors
    /// `Invalid`: no area, or an area without an end in front of another.
    pub fn new(areas: Vec<DataArea>) -> Result<Self> {
        let Some((last, others)) = areas.split_last() else {
            return Err(Error::new(ErrorKind::Invalid, "the volume has no data area"));
        };
        // No device is larger than a file offset can say: nothing below overflows.
        let end = |area: &DataArea| area.offset.checked_add(area.size.unwrap_or(0));
        let total = areas.iter().try_fold(0_u64, |sum, area| sum.checked_add(area.size.unwrap_or(0)));
        let fits = |end: Option<u64>| end.is_some_and(|end| i64::try_from(end).is_ok());
        if !areas.iter().all(|area| fits(end(area))) || !fits(total) {
            return Err(Error::new(ErrorKind::Invalid, "a data area of the volume ends beyond any device"));
        }
        let endless = others.iter().any(|area| area.size.is_none_or(|size| size == 0));
        if endless || last.size == Some(0) {
            return Err(Error::new(ErrorKind::Invalid, "a data area of the volume has no bytes"));
        }
        Ok(Self { areas })
    }

    /// A volume that is all data, in units of `unit_bytes`, from `offset` to its end.
    #[must_use]
    pub fn whole(area: DataArea) -> Self {
        Self { areas: vec![area] }
    }

    /// The areas.
    #[must_use]
    pub fn areas(&self) -> &[DataArea] {
        &self.areas
    }

    /// First byte of plaintext of each area, and of what would follow the last if that has an end.
    fn starts(&self) -> impl Iterator<Item = u64> {
        let sizes = self.areas.iter().map_while(|area| area.size);
        std::iter::once(0).chain(sizes.scan(0_u64, |sum, size| {
            *sum = sum.checked_add(size)?;
            Some(*sum)
        }))
    }

    /// Areas with their first byte of plaintext.
    pub fn placed(&self) -> impl Iterator<Item = (u64, &DataArea)> {
        self.starts().zip(&self.areas)
    }

    /// Where areas meet.
    #[must_use]
    pub fn seams(&self) -> Vec<u64> {
        self.starts().skip(1).take(self.areas.len() - 1).collect()
    }

    /// Data unit of the area in which the plaintext ends, bytes.
    #[must_use]
    pub fn unit_bytes(&self) -> u32 {
        self.areas.last().map_or(1, DataArea::unit_bytes)
    }

    /// The same, for a volume whose header lies in front of its data and ends at `header_end`.
    ///
    /// # Errors
    /// `Invalid`: an area inside the header, as in a detached header that is taken for the volume.
    pub fn behind(self, header_end: u64) -> Result<Self> {
        if self.areas.iter().any(|area| area.offset < header_end) {
            let what = "the header says that its data is elsewhere: it is a detached header";
            return Err(Error::new(ErrorKind::Invalid, what)
                .hint("name the file with the data, and this one with --header"));
        }
        Ok(self)
    }

    /// Where the data begins on the encrypted side.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.areas.first().map_or(0, |area| area.offset)
    }

    /// Do all areas, and the seams between them, begin on multiples of `align`?
    #[must_use]
    pub fn is_aligned(&self, align: u32) -> bool {
        let align = u64::from(align);
        self.areas.iter().all(|area| area.offset.is_multiple_of(align)) && self.seams_aligned(align)
    }

    /// Do all seams lie on multiples of `align`?
    #[must_use]
    pub fn seams_aligned(&self, align: u64) -> bool {
        self.seams().iter().all(|seam| seam.is_multiple_of(align))
    }

    /// Do the areas lie one behind the other, so that they can be read in order?
    #[must_use]
    pub fn is_in_order(&self) -> bool {
        self.areas
            .windows(2)
            .all(|pair| pair[0].size.is_some_and(|size| pair[0].offset + size == pair[1].offset))
    }

    /// Ciphers for all areas under one key.
    ///
    /// # Errors
    /// A key that does not fit a cipher.
    pub fn segments(&self, kernel: Kernel, key: &Secret) -> Result<Segments> {
        let mut segments = Vec::with_capacity(self.areas.len());
        for (start, area) in self.placed() {
            let cipher = area.cipher.as_ref().map(|cipher| cipher.build(kernel, key, 0)).transpose()?;
            segments.push(Segment { start, offset: area.offset, unit_bytes: area.unit_bytes(), cipher });
        }
        Ok(Segments::new(segments))
    }

    /// Bytes of plaintext if the volume says so itself.
    #[must_use]
    pub fn fixed_bytes(&self) -> Option<u64> {
        self.starts().nth(self.areas.len())
    }

    /// Bytes of plaintext on a device of this size.
    ///
    /// # Errors
    /// `Damaged`: an area ends beyond it. `Invalid`: the last one ends inside a data unit.
    pub fn plain_bytes(&self, device: &Device, device_bytes: u64) -> Result<u64> {
        let mut total = 0_u64;
        for area in &self.areas {
            let room = device_bytes.saturating_sub(area.offset);
            let size = area.size.unwrap_or(room);
            if area.offset > device_bytes || size > room {
                let end = area.offset.saturating_add(area.size.unwrap_or(0));
                let what =
                    format!("the volume is cut off: its data reaches to byte {end}, it has {device_bytes}");
                return Err(Error::new(ErrorKind::Damaged, what).at(device.name()));
            }
            total = total.checked_add(size).ok_or_else(|| {
                Error::new(ErrorKind::Damaged, "the volume's areas are larger than any device")
                    .at(device.name())
            })?;
            let unit = area.unit_bytes();
            if !size.is_multiple_of(unit.into()) {
                return Err(unaligned(size, unit)
                    .at(device.name())
                    .hint("the encrypted volume is cut off, or has another data unit"));
            }
        }
        Ok(total)
    }
}

impl DataArea {
    /// Its data unit, bytes; a plain (`linear`) area consists of sectors.
    #[must_use]
    pub fn unit_bytes(&self) -> u32 {
        self.cipher.as_ref().map_or(512, |cipher| cipher.unit_bytes)
    }
}

const _: () = assert!(UNIT_BYTES_MAX.is_multiple_of(512));
