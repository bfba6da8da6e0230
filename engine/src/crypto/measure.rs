//! One kernel beside its limit: what `cryptctl bench` and the kernel bench report.
//!
//! A round is the limit loop, then the kernel, each for the same time; rounds are repeated, and medians and the ratios
//! *within* a round are kept, because the clock of a shared machine drifts between rounds by more than the differences
//! looked for.

use std::hint::black_box;
use std::time::{Duration, Instant};

use proto::ErrorKind;

use super::limit::spin;
use super::{Kernel, Layout, VolumeKey, cipher, recrypter};
use crate::error::{Error, Result};
use crate::units::DataUnit;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Plaintext to ciphertext.
    Encrypt,
    /// Ciphertext to plaintext.
    Decrypt,
    /// Old key to new key, fused.
    Reencrypt,
}

impl Operation {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Encrypt, Self::Decrypt, Self::Reencrypt];

    /// Its name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Encrypt => "encrypt",
            Self::Decrypt => "decrypt",
            Self::Reencrypt => "reencrypt",
        }
    }

    /// AES passes over every byte.
    fn passes(self) -> u64 {
        if self == Self::Reencrypt { 2 } else { 1 }
    }
}

/// Rates in bytes per second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measurement {
    /// Median of the rounds.
    pub median: f64,
    /// Slowest round.
    pub min: f64,
    /// Fastest round.
    pub max: f64,
    /// Median of the issue limit, halved for re-encryption; `None` for the portable kernel.
    pub limit: Option<f64>,
    /// Median of the ratios of rate to limit, round by round.
    pub ratio: Option<f64>,
}

/// A page-aligned part of a fresh allocation: what buffers of the pipeline look like.
pub struct AlignedBuffer {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuffer {
    /// `len` bytes of a fixed pattern, every page touched.
    #[must_use]
    pub fn patterned(len: usize) -> Self {
        let mut memory = vec![0_u8; len + 4096];
        let start = memory.as_ptr().align_offset(4096);
        // A multiplicative congruential sequence (Knuth's MMIX constants): incompressible enough, the same every time.
        let mut state = 1_u64;
        for byte in &mut memory {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *byte = state.to_le_bytes()[7];
        }
        Self { memory, start, len }
    }

    /// The bytes.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

/// Something that can be done to a buffer again and again, in place.
pub type Work = Box<dyn FnMut(&mut [u8])>;

/// The XTS key of the measurements: a fixed pattern, so that digests of results can be compared. `seed` is odd.
///
/// # Errors
/// `Invalid` for key sizes other than 128 and 256 bits.
pub fn test_key(key_bits: u32, seed: u8) -> Result<Vec<u8>> {
    let key_bytes: u8 = match key_bits {
        128 => 32,
        256 => 64,
        _ => {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("AES keys have 128 or 256 bits, not {key_bits}"),
            ));
        }
    };
    Ok((0..key_bytes).map(|at| at.wrapping_mul(seed)).collect())
}

/// Seed of the key that encrypts, decrypts, and is left behind by re-encryption.
pub const SEED: u8 = 7;

/// How much is done for one number.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// Bytes of buffer, rounded down to whole data units, at least one.
    pub buffer_bytes: usize,
    /// Milliseconds per round, for the kernel and for its limit each.
    pub millis: u32,
    /// Rounds, of which the median counts; at least one.
    pub rounds: u32,
}

/// An operation of a kernel on fixed test keys, `plain64` from unit 0.
///
/// # Errors
/// As [`cipher`] and [`recrypter`]; `Invalid` for key sizes other than 128 and 256 bits.
pub fn work(kernel: Kernel, operation: Operation, key_bits: u32, unit_bytes: u32) -> Result<Work> {
    let key = |seed: u8| VolumeKey::new(&test_key(key_bits, seed)?);
    let layout = Layout::plain64(unit_bytes);
    let old = key(SEED)?;
    Ok(match operation {
        Operation::Encrypt => {
            let cipher = cipher(kernel, &old, layout)?;
            Box::new(move |buf| cipher.encrypt(DataUnit(0), buf))
        }
        Operation::Decrypt => {
            let cipher = cipher(kernel, &old, layout)?;
            Box::new(move |buf| cipher.decrypt(DataUnit(0), buf))
        }
        Operation::Reencrypt => {
            let recrypter = recrypter(kernel, (&old, layout), (&key(11)?, layout))?;
            Box::new(move |buf| recrypter.recrypt(0, buf))
        }
    })
}

/// Call `once`, which handles `bytes`, until `at_least` has passed; bytes per second.
pub fn rate(bytes: u64, at_least: Duration, mut once: impl FnMut()) -> f64 {
    let start = Instant::now();
    let mut calls = 0_u32;
    loop {
        once();
        calls += 1;
        let elapsed = start.elapsed();
        if elapsed >= at_least {
            #[expect(
                clippy::cast_precision_loss,
                reason = "a rate; 2^53 bytes is more than a measurement moves"
            )]
            return bytes as f64 * f64::from(calls) / elapsed.as_secs_f64();
        }
    }
}

/// The middle value; of an even number, the mean of the two.
///
/// # Panics
/// If there are none.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len().is_multiple_of(2) {
        f64::midpoint(sorted[middle - 1], sorted[middle])
    } else {
        sorted[middle]
    }
}

/// Measure one operation of one kernel on one core, in place, beside its limit: `rounds` rounds of `millis` each for the
/// limit and for the kernel. The buffer is `buffer_bytes` rounded down to whole data units, at least one.
///
/// `check` is asked before each round whether to go on.
///
/// # Errors
/// As [`work`], and whatever `check` says.
pub fn measure(
    kernel: Kernel,
    operation: Operation,
    key_bits: u32,
    unit_bytes: u32,
    Effort { buffer_bytes, millis, rounds }: Effort,
    check: impl Fn() -> Result<()>,
) -> Result<Measurement> {
    let mut work = work(kernel, operation, key_bits, unit_bytes)?;
    let unit = unit_bytes as usize;
    let mut buffer = AlignedBuffer::patterned((buffer_bytes / unit).max(1) * unit);
    let buf = buffer.as_mut_slice();
    let bytes = buf.len() as u64;
    let time = Duration::from_millis(u64::from(millis));
    work(buf);
    let mut rates = Vec::new();
    let mut limits = Vec::new();
    for _ in 0..rounds.max(1) {
        check()?;
        if spin(kernel, key_bits, 0).is_some() {
            limits.push(rate(bytes, time, || {
                black_box(spin(kernel, key_bits, bytes * operation.passes()));
            }));
        }
        rates.push(rate(bytes, time, || work(black_box(&mut *buf))));
    }
    let ratios: Vec<f64> = rates.iter().zip(&limits).map(|(rate, limit)| rate / limit).collect();
    Ok(Measurement {
        median: median(&rates),
        min: rates.iter().copied().fold(f64::INFINITY, f64::min),
        max: rates.iter().copied().fold(0.0, f64::max),
        limit: (!limits.is_empty()).then(|| median(&limits)),
        ratio: (!ratios.is_empty()).then(|| median(&ratios)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_measurement_is_ordered_and_has_a_limit_where_there_is_one() {
        for kernel in Kernel::ALL.into_iter().filter(|kernel| kernel.is_available()) {
            for operation in Operation::ALL {
                let found = measure(
                    kernel,
                    operation,
                    256,
                    512,
                    Effort { buffer_bytes: 4096, millis: 1, rounds: 3 },
                    || Ok(()),
                )
                .expect("an available kernel");
                assert!(
                    0.0 < found.min && found.min <= found.median && found.median <= found.max,
                    "{found:?}"
                );
                assert_eq!(found.limit.is_none(), kernel == Kernel::Portable);
            }
        }
    }

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]).to_bits(), 2.0_f64.to_bits());
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]).to_bits(), 2.5_f64.to_bits());
    }

    #[test]
    fn other_key_sizes_are_refused() {
        assert!(work(Kernel::Portable, Operation::Encrypt, 192, 512).is_err());
    }
}
