//! The issue limit: the AES round instruction of a kernel and nothing else, on independent registers.
//!
//! XTS needs as many rounds per block as AES has, so the rate of this loop is what no kernel of the same instruction can
//! pass: no loads, no stores, no tweaks. It is measured beside every kernel rate, because clocks drift.
#![allow(unsafe_code)] // intrinsics

use super::Kernel;

/// Do the AES rounds of `bytes` bytes (rounded up to whole strides) of a kernel and key size, and return a digest of
/// the registers so that nothing is optimised away. `None` for the portable kernel, which has no such instruction, and for
/// kernels this CPU cannot run.
#[must_use]
pub fn spin(kernel: Kernel, key_bits: u32, bytes: u64) -> Option<u64> {
    if !kernel.is_available() {
        return None;
    }
    #[cfg(target_arch = "x86_64")]
    {
        let rounds = super::schedule::rounds(key_bits) as u64;
        // SAFETY: the kernel is available, so its instructions are.
        unsafe {
            match kernel {
                Kernel::VaesAvx512 => Some(x86::spin512(bytes.div_ceil(64 * x86::STREAMS) * rounds)),
                Kernel::VaesAvx2 => Some(x86::spin256(bytes.div_ceil(32 * x86::STREAMS) * rounds)),
                Kernel::AesNi => Some(x86::spin128(bytes.div_ceil(16 * x86::STREAMS) * rounds)),
                Kernel::Portable => None,
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (key_bits, bytes);
        None
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    /// Registers in flight: more than the latency of the instruction times its rate on any CPU known (4 × 2).
    pub(super) const STREAMS: u64 = 12;
    /// One for each stream, so that no two do the same work.
    const SEEDS: [i64; 12] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];

    macro_rules! spin {
        ($name:ident, $features:literal, $set:ident, $round:ident, $xor:ident, $low:expr) => {
            /// One round on every stream, `rounds` times.
            #[target_feature(enable = $features)]
            pub(super) unsafe fn $name(rounds: u64) -> u64 {
                let key = std::hint::black_box($set(0x5a5a_1234_0f0f_7777));
                let mut streams = SEEDS.map(|seed| $set(seed));
                for _ in 0..rounds {
                    for stream in &mut streams {
                        *stream = $round(*stream, key);
                    }
                }
                let folded = streams.into_iter().fold(key, |a, b| $xor(a, b));
                _mm_cvtsi128_si64($low(folded)).cast_unsigned()
            }
        };
    }

    spin!(spin512, "vaes,avx512f", _mm512_set1_epi64, _mm512_aesenc_epi128, _mm512_xor_si512, |v| {
        _mm512_castsi512_si128(v)
    });
    spin!(spin256, "vaes,avx2", _mm256_set1_epi64x, _mm256_aesenc_epi128, _mm256_xor_si256, |v| {
        _mm256_castsi256_si128(v)
    });
    spin!(spin128, "aes,sse2", _mm_set1_epi64x, _mm_aesenc_si128, _mm_xor_si128, |v: __m128i| v);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_with_an_instruction_has_a_limit_and_does_the_work() {
        for kernel in Kernel::ALL.into_iter().filter(|kernel| kernel.is_available()) {
            let short = spin(kernel, 128, 1 << 12);
            assert_eq!(short.is_none(), kernel == Kernel::Portable, "{}", kernel.name());
            if short.is_some() {
                assert_eq!(short, spin(kernel, 128, 1 << 12), "the same work gives the same digest");
                assert_ne!(short, spin(kernel, 256, 1 << 12), "more rounds give another digest");
            }
        }
    }
}
