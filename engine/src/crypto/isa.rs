//! Binds a schedule, a counter and an instruction-set kernel to the traits: the one place where a slice becomes a [`Run`].
//!
//! Invariant: the function pointers here are chosen only after [`Kernel::is_available`] said that this CPU can run them.
#![allow(unsafe_code)] // calls the instruction-set kernels

use super::schedule::Schedule;
use super::secret::{Locked, VolumeKey};
use super::tweak::{Counter, Layout};
use super::xts::Run;
use super::{Kernel, Recrypter, SectorCipher, aesni, vaes256, vaes512};
use crate::error::Result;
use crate::units::DataUnit;

/// One direction of one kernel and key size.
type Crypt = unsafe fn(&Schedule, &Counter, Run);
/// The fused loop of one kernel and two key sizes.
type Fused = unsafe fn((&Schedule, &Counter), (&Schedule, &Counter), Run);

/// Is this a CPU that shifts bits where it encrypts, and bytes elsewhere? See `vaes512::Blocks`.
fn by_bytes() -> bool {
    let vendor = std::arch::x86_64::__cpuid(0);
    [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat() == b"GenuineIntel"
}

/// The two directions of a kernel.
fn crypt_of(kernel: Kernel, key_bits: u32) -> (Crypt, Crypt) {
    match (kernel, key_bits) {
        (Kernel::VaesAvx512, 128) if by_bytes() => {
            (vaes512::encrypt::<11, true>, vaes512::decrypt::<11, true>)
        }
        (Kernel::VaesAvx512, _) if by_bytes() => (vaes512::encrypt::<15, true>, vaes512::decrypt::<15, true>),
        (Kernel::VaesAvx512, 128) => (vaes512::encrypt::<11, false>, vaes512::decrypt::<11, false>),
        (Kernel::VaesAvx512, _) => (vaes512::encrypt::<15, false>, vaes512::decrypt::<15, false>),
        (Kernel::VaesAvx2, 128) => (vaes256::encrypt::<11>, vaes256::decrypt::<11>),
        (Kernel::VaesAvx2, _) => (vaes256::encrypt::<15>, vaes256::decrypt::<15>),
        (Kernel::AesNi, 128) => (aesni::encrypt::<11>, aesni::decrypt::<11>),
        (Kernel::AesNi, _) => (aesni::encrypt::<15>, aesni::decrypt::<15>),
        (Kernel::Portable, _) => unreachable!("the portable kernel is bound elsewhere"),
    }
}

/// The fused loop of a kernel.
fn fused_of(kernel: Kernel, old_bits: u32, new_bits: u32) -> Fused {
    match (kernel, old_bits, new_bits) {
        (Kernel::VaesAvx512, 128, 128) if by_bytes() => vaes512::recrypt::<11, 11, true>,
        (Kernel::VaesAvx512, 128, 128) => vaes512::recrypt::<11, 11, false>,
        (Kernel::VaesAvx512, 128, _) if by_bytes() => vaes512::recrypt::<11, 15, true>,
        (Kernel::VaesAvx512, 128, _) => vaes512::recrypt::<11, 15, false>,
        (Kernel::VaesAvx512, _, 128) if by_bytes() => vaes512::recrypt::<15, 11, true>,
        (Kernel::VaesAvx512, _, 128) => vaes512::recrypt::<15, 11, false>,
        (Kernel::VaesAvx512, _, _) if by_bytes() => vaes512::recrypt::<15, 15, true>,
        (Kernel::VaesAvx512, _, _) => vaes512::recrypt::<15, 15, false>,
        (Kernel::VaesAvx2, 128, 128) => vaes256::recrypt::<11, 11>,
        (Kernel::VaesAvx2, 128, _) => vaes256::recrypt::<11, 15>,
        (Kernel::VaesAvx2, _, 128) => vaes256::recrypt::<15, 11>,
        (Kernel::VaesAvx2, _, _) => vaes256::recrypt::<15, 15>,
        (Kernel::AesNi, 128, 128) => aesni::recrypt::<11, 11>,
        (Kernel::AesNi, 128, _) => aesni::recrypt::<11, 15>,
        (Kernel::AesNi, _, 128) => aesni::recrypt::<15, 11>,
        (Kernel::AesNi, _, _) => aesni::recrypt::<15, 15>,
        (Kernel::Portable, _, _) => unreachable!("the portable kernel is bound elsewhere"),
    }
}

/// One key and layout.
struct Side {
    schedule: Locked<Schedule>,
    counter: Counter,
    unit_bytes: usize,
}

impl Side {
    /// The kernel must be available: expansion uses AES-NI.
    fn new(kernel: Kernel, key: &VolumeKey, layout: Layout) -> Result<Self> {
        assert!(kernel.is_available() && kernel != Kernel::Portable, "only kernels of this CPU are bound");
        Ok(Self {
            // SAFETY: every kernel of this ladder needs AES-NI, and this one is available.
            schedule: unsafe { Schedule::new(key) }?,
            counter: layout.counter(),
            unit_bytes: layout.unit_bytes as usize,
        })
    }
}

fn run_of(buf: &mut [u8], unit_bytes: usize, first: DataUnit) -> Run {
    assert!(buf.len().is_multiple_of(unit_bytes), "a run has whole data units");
    Run { units: buf.len() / unit_bytes, unit_bytes, first, data: buf.as_mut_ptr() }
}

struct Isa {
    side: Side,
    encrypt: Crypt,
    decrypt: Crypt,
}

/// A checked layout and a key, on a kernel this CPU has.
pub(super) fn cipher(kernel: Kernel, key: &VolumeKey, layout: Layout) -> Result<Box<dyn SectorCipher>> {
    let side = Side::new(kernel, key, layout)?;
    let (encrypt, decrypt) = crypt_of(kernel, key.bits());
    Ok(Box::new(Isa { side, encrypt, decrypt }))
}

impl SectorCipher for Isa {
    fn encrypt(&self, first: DataUnit, buf: &mut [u8]) {
        let run = run_of(buf, self.side.unit_bytes, first);
        // SAFETY: the run is `buf`, ours alone; `Side::new` checked the CPU.
        unsafe { (self.encrypt)(&self.side.schedule, &self.side.counter, run) }
    }

    fn decrypt(&self, first: DataUnit, buf: &mut [u8]) {
        let run = run_of(buf, self.side.unit_bytes, first);
        // SAFETY: as in `encrypt`.
        unsafe { (self.decrypt)(&self.side.schedule, &self.side.counter, run) }
    }

    fn is_separable(&self) -> bool {
        true
    }
}

struct FusedIsa {
    old: Side,
    new: Side,
    fused: Fused,
}

/// Two keys and checked layouts of equal data units, on a kernel this CPU has.
pub(super) fn recrypter(
    kernel: Kernel,
    old: (&VolumeKey, Layout),
    new: (&VolumeKey, Layout),
) -> Result<Box<dyn Recrypter>> {
    assert_eq!(old.1.unit_bytes, new.1.unit_bytes, "the fused loop has one data unit");
    Ok(Box::new(FusedIsa {
        fused: fused_of(kernel, old.0.bits(), new.0.bits()),
        old: Side::new(kernel, old.0, old.1)?,
        new: Side::new(kernel, new.0, new.1)?,
    }))
}

impl Recrypter for FusedIsa {
    fn recrypt(&self, first_byte: u64, buf: &mut [u8]) {
        let unit = self.old.unit_bytes as u64;
        assert!(first_byte.is_multiple_of(unit), "a run starts at a data unit");
        let run = run_of(buf, self.old.unit_bytes, DataUnit(first_byte / unit));
        let (old, new) = ((&*self.old.schedule, &self.old.counter), (&*self.new.schedule, &self.new.counter));
        // SAFETY: the run is `buf`, ours alone; `Side::new` checked the CPU.
        unsafe { (self.fused)(old, new, run) }
    }
}
