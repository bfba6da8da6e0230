//! The ladder: which kernels this CPU has, which of them are right, and the constructors.
//!
//! Nothing is encrypted by a kernel that has not passed its known-answer test in this process: a miscompiled or emulated
//! instruction would otherwise write ciphertext nobody can read.

use std::sync::OnceLock;

use proto::ErrorKind;

use super::recrypt::Windowed;
use super::{Kernel, Layout, Recrypter, SectorCipher, VolumeKey, portable};
use crate::error::{Error, Result};
use crate::units::DataUnit;

impl Kernel {
    /// Fastest first.
    pub const ALL: [Self; 4] = [Self::VaesAvx512, Self::VaesAvx2, Self::AesNi, Self::Portable];

    fn index(self) -> usize {
        match self {
            Self::VaesAvx512 => 0,
            Self::VaesAvx2 => 1,
            Self::AesNi => 2,
            Self::Portable => 3,
        }
    }

    /// Its name on the wire and in the configuration, one of [`proto::KERNELS`].
    #[must_use]
    pub fn name(self) -> &'static str {
        proto::KERNELS[self.index()]
    }

    /// The kernel of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kernel| kernel.name() == name)
    }

    /// Can this CPU run it?
    #[must_use]
    #[cfg(target_arch = "x86_64")]
    pub fn is_available(self) -> bool {
        let aes =
            std::arch::is_x86_feature_detected!("aes") && std::arch::is_x86_feature_detected!("pclmulqdq");
        let vaes = aes
            && std::arch::is_x86_feature_detected!("vaes")
            && std::arch::is_x86_feature_detected!("vpclmulqdq");
        match self {
            Self::VaesAvx512 => {
                vaes && std::arch::is_x86_feature_detected!("avx512f")
                    && std::arch::is_x86_feature_detected!("avx512bw")
                    && std::arch::is_x86_feature_detected!("avx512vl")
            }
            Self::VaesAvx2 => vaes && std::arch::is_x86_feature_detected!("avx2"),
            Self::AesNi => aes,
            Self::Portable => true,
        }
    }

    /// Can this CPU run it?
    #[must_use]
    #[cfg(not(target_arch = "x86_64"))]
    pub fn is_available(self) -> bool {
        self == Self::Portable
    }

    /// The highest available rung that passes its self-test. Looked for once per process; a rung that fails is logged.
    ///
    /// # Errors
    /// `Internal` if not even the portable kernel is right.
    pub fn best() -> Result<Self> {
        static BEST: OnceLock<Option<Kernel>> = OnceLock::new();
        let best = BEST.get_or_init(|| {
            Self::ALL.into_iter().find(|kernel| {
                kernel.is_available()
                    && kernel
                        .self_test()
                        .inspect_err(|error| tracing::error!("kernel left out: {}", error.chain()))
                        .is_ok()
            })
        });
        best.ok_or_else(|| Error::new(ErrorKind::Internal, "no encryption kernel passes its self-test"))
    }

    /// Known-answer test, run once per process and remembered.
    ///
    /// # Errors
    /// `Unsupported` if this CPU cannot run the kernel, `Internal` if it gets a wrong answer.
    pub fn self_test(self) -> Result<()> {
        static PASSED: [OnceLock<bool>; 4] = [const { OnceLock::new() }; 4];
        if !self.is_available() {
            let what = format!("this CPU cannot run the kernel {}", self.name());
            return Err(Error::new(ErrorKind::Unsupported, what));
        }
        let passed = match PASSED[self.index()].get() {
            Some(&passed) => passed,
            None => {
                let passed = known_answers(self)? && (self == Self::Portable || equals_oracle(self)?);
                *PASSED[self.index()].get_or_init(|| passed)
            }
        };
        if passed {
            Ok(())
        } else {
            Err(Error::new(ErrorKind::Internal, format!("self-test failed: kernel {}", self.name())))
        }
    }
}

/// A volume key bound to a layout, on the given kernel.
///
/// # Errors
/// `Unsupported` if this CPU cannot run the kernel, `Invalid` for a layout no kernel can work with ([`Layout::check`]),
/// `Internal` if the kernel failed its self-test. No memory.
pub fn cipher(kernel: Kernel, key: &VolumeKey, layout: Layout) -> Result<Box<dyn SectorCipher>> {
    layout.check()?;
    kernel.self_test()?;
    let bound = bind(kernel, key, layout);
    burn_stack();
    bound
}

/// An old key and layout bound to a new key and layout, on the given kernel.
///
/// # Errors
/// As [`cipher`], for either side.
pub fn recrypter(
    kernel: Kernel,
    old: (&VolumeKey, Layout),
    new: (&VolumeKey, Layout),
) -> Result<Box<dyn Recrypter>> {
    old.1.check()?;
    new.1.check()?;
    kernel.self_test()?;
    let bound = bind_two(kernel, old, new);
    burn_stack();
    bound
}

/// Overwrite the stack below the caller. Round keys pass through registers, which the compiler may spill into the frames
/// of whatever expands or uses them; call this when those have returned. 8 KiB is several times what they need.
#[inline(never)]
pub fn burn_stack() {
    let below = [0_u8; 8192];
    std::hint::black_box(&below);
}

// Not inlined, nor its other: their frames must lie where `burn_stack` reaches.
#[inline(never)]
fn bind(kernel: Kernel, key: &VolumeKey, layout: Layout) -> Result<Box<dyn SectorCipher>> {
    #[cfg(target_arch = "x86_64")]
    if kernel != Kernel::Portable {
        return super::isa::cipher(kernel, key, layout);
    }
    let _ = kernel;
    portable::cipher(key, layout)
}

#[inline(never)]
fn bind_two(
    kernel: Kernel,
    old: (&VolumeKey, Layout),
    new: (&VolumeKey, Layout),
) -> Result<Box<dyn Recrypter>> {
    #[cfg(target_arch = "x86_64")]
    if kernel != Kernel::Portable
        && old.1.unit_bytes == new.1.unit_bytes
        && old.1.unit_bytes.is_multiple_of(super::xts::FUSED_UNIT_BYTES)
    {
        return super::isa::recrypter(kernel, old, new);
    }
    Ok(Box::new(Windowed::new(
        (bind(kernel, old.0, old.1)?, old.1.unit_bytes as usize),
        (bind(kernel, new.0, new.1)?, new.1.unit_bytes as usize),
    )))
}

/// The first four ciphertext blocks of IEEE 1619-2007 annex B vectors 4 (AES-128) and 10 (AES-256): plaintext 00 01 02 … ff twice,
/// one unit of 512 bytes, counters 0 and 255.
const ANSWERS: [(&[u8], u64, [u8; 64]); 2] = [
    (
        &hex::<32>("2718281828459045235360287471352631415926535897932384626433832795"),
        0,
        hex::<64>(
            "27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c\
             c78cf7f5e543445f8333d8fa7f56000005279fa5d8b5e4ad40e736ddb4d35412",
        ),
    ),
    (
        &hex::<64>(
            "2718281828459045235360287471352662497757247093699959574966967627\
             3141592653589793238462643383279502884197169399375105820974944592",
        ),
        255,
        hex::<64>(
            "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b\
             5d31e276f8fe4a8d66b317f9ac683f44680a86ac35adfc3345befecb4bb188fd",
        ),
    ),
];

/// Hexadecimal digits to bytes, while compiling.
pub(super) const fn hex<const N: usize>(text: &str) -> [u8; N] {
    const fn digit(byte: u8) -> u8 {
        match byte {
            b'0'..=b'9' => byte - b'0',
            b'a'..=b'f' => byte - b'a' + 10,
            _ => panic!("not a hexadecimal digit"),
        }
    }
    let text = text.as_bytes();
    assert!(text.len() == 2 * N, "two digits a byte");
    let mut out = [0; N];
    let mut at = 0;
    while at < N {
        out[at] = digit(text[2 * at]) << 4 | digit(text[2 * at + 1]);
        at += 1;
    }
    out
}

/// Published answers, forth and back.
fn known_answers(kernel: Kernel) -> Result<bool> {
    for (key, counter, answer) in ANSWERS {
        let cipher = bind(kernel, &VolumeKey::new(key)?, Layout::plain64(512))?;
        let plain: Vec<u8> = (0..=255).chain(0..=255).collect();
        let mut buf = plain.clone();
        cipher.encrypt(DataUnit(counter), &mut buf);
        if buf[..64] != answer {
            return Ok(false);
        }
        cipher.decrypt(DataUnit(counter), &mut buf);
        if buf != plain {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Every loop of a kernel against the oracle: many units, one unit, a ragged unit, and the fused loop, both key sizes.
fn equals_oracle(kernel: Kernel) -> Result<bool> {
    // Multiplicative hashing (Knuth) fills keys and data with bytes that are all different enough.
    let pattern = |seed: u32, len: u32| -> Vec<u8> {
        (0..len).map(|at| (at ^ seed).wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect()
    };
    let first = DataUnit(u64::from(u32::MAX) - 1);
    for key_bytes in [32, 64] {
        let (old, new) = (VolumeKey::new(&pattern(1, key_bytes))?, VolumeKey::new(&pattern(2, key_bytes))?);
        for (unit_bytes, units) in [(512, 67), (4096, 5), (1040, 3)] {
            let layout = Layout::plain64(unit_bytes);
            let plain = pattern(3, unit_bytes * units);
            let (oracle, tested) = (portable::cipher(&old, layout)?, bind(kernel, &old, layout)?);
            let mut expected = plain.clone();
            oracle.encrypt(first, &mut expected);
            let mut buf = plain.clone();
            tested.encrypt(first, &mut buf);
            let encrypted = buf == expected;
            bind_two(kernel, (&old, layout), (&new, layout))?
                .recrypt(first.0 * u64::from(unit_bytes), &mut expected);
            portable::cipher(&new, layout)?.decrypt(first, &mut expected);
            tested.decrypt(first, &mut buf);
            if !encrypted || buf != plain || expected != plain {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_kernels_correspond() {
        assert_eq!(Kernel::ALL.map(Kernel::name), proto::KERNELS);
        for kernel in Kernel::ALL {
            assert_eq!(Kernel::from_name(kernel.name()), Some(kernel));
        }
        assert_eq!(Kernel::from_name("rot13"), None);
    }

    #[test]
    fn every_available_kernel_passes_its_self_test() {
        for kernel in Kernel::ALL.into_iter().filter(|kernel| kernel.is_available()) {
            kernel.self_test().unwrap_or_else(|error| panic!("{}: {error:?}", kernel.name()));
        }
        assert!(Kernel::best().expect("the portable kernel at least").is_available());
    }

    #[test]
    fn refuses_layouts_no_kernel_can_do() {
        let key =
            VolumeKey::new(&hex::<32>("2718281828459045235360287471352631415926535897932384626433832795"));
        let key = key.expect("unequal halves");
        let error = cipher(Kernel::Portable, &key, Layout::plain64(500)).err().expect("refused");
        assert_eq!(error.kind(), ErrorKind::Invalid);
        let sides = ((&key, Layout::plain64(512)), (&key, Layout::plain64(0)));
        assert!(recrypter(Kernel::Portable, sides.0, sides.1).is_err());
    }
}
