//! dm-crypt plain: the whole device is AES-XTS ciphertext, with no header. What the key fits can only be told by
//! looking at the plaintext.
//!
//! ```text
//! byte 0                  data_unit            2*data_unit
//! | unit 0, tweak T(0)    | unit 1, tweak T(1) | …
//!   T(k) = tweak_offset + k * data_unit/512                      (the dm-crypt and LUKS default)
//!        = (tweak_offset + k * data_unit/512) >> log2(data_unit/512)   (iv_large_sectors)
//! ```
//! Source: Linux `Documentation/admin-guide/device-mapper/dm-crypt.rst`, IEEE Std 1619-2007.

use proto::Raw;

use crate::crypto::Layout;
use crate::error::{Error, ErrorKind, Result};

/// Data units a volume may have, bytes.
pub const DATA_UNITS: [u32; 4] = [512, 1024, 2048, 4096];
/// Volume key sizes, bytes: AES-128-XTS and AES-256-XTS.
pub const KEY_BYTES: [u32; 2] = [32, 64];

/// Check the parameters and turn them into the layout a cipher is built with.
///
/// # Errors
/// `Invalid`: a data unit or key size that dm-crypt does not have, or an offset that is not on a data unit.
pub fn layout(raw: &Raw) -> Result<Layout> {
    if !DATA_UNITS.contains(&raw.data_unit) {
        let what = format!("data unit of {} bytes: it must be 512, 1024, 2048 or 4096", raw.data_unit);
        return Err(Error::new(ErrorKind::Invalid, what));
    }
    if !KEY_BYTES.contains(&raw.key_bytes) {
        let what = format!("volume key of {} bytes: AES-XTS takes 32 or 64", raw.key_bytes);
        return Err(Error::new(ErrorKind::Invalid, what));
    }
    let step = u64::from(raw.data_unit / 512);
    if !raw.tweak_offset.is_multiple_of(step) {
        let what = format!(
            "tweak offset of {} sectors: it must be a multiple of {step}, one data unit",
            raw.tweak_offset
        );
        return Err(Error::new(ErrorKind::Invalid, what));
    }
    Ok(Layout {
        unit_bytes: raw.data_unit,
        kind: raw.tweak,
        large: raw.large_tweak,
        offset_sectors: raw.tweak_offset,
    })
}

#[cfg(test)]
mod tests {
    use proto::TweakKind;

    use super::*;

    const RAW: Raw = Raw {
        key_bytes: 64,
        data_unit: 4096,
        tweak: TweakKind::Plain64,
        large_tweak: false,
        tweak_offset: 0,
    };

    #[test]
    fn accepts_what_dm_crypt_has() {
        for data_unit in DATA_UNITS {
            for key_bytes in KEY_BYTES {
                let layout = layout(&Raw { data_unit, key_bytes, ..RAW }).expect("valid");
                assert_eq!(layout.unit_bytes, data_unit);
            }
        }
    }

    #[test]
    fn refuses_everything_else() {
        for raw in [
            Raw { data_unit: 0, ..RAW },
            Raw { data_unit: 256, ..RAW },
            Raw { data_unit: 8192, ..RAW },
            Raw { key_bytes: 48, ..RAW },
            Raw { key_bytes: 0, ..RAW },
            Raw { tweak_offset: 4, ..RAW },
        ] {
            assert_eq!(layout(&raw).expect_err("invalid").kind(), ErrorKind::Invalid, "{raw:?}");
        }
    }
}
