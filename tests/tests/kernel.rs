//! Every kernel against the published vectors, and against the portable oracle on random keys, layouts and runs.

use engine::crypto::{Kernel, Layout, VolumeKey, cipher, recrypter};
use engine::units::DataUnit;
use proto::TweakKind;

/// SplitMix64: enough randomness for inputs, and a failure is reproduced by its seed.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[usize::try_from(self.below(from.len() as u64)).expect("an index")]
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next().to_le_bytes()[0]).collect()
    }

    fn key(&mut self) -> VolumeKey {
        let len = self.pick(&[32, 64]);
        VolumeKey::new(&self.bytes(len)).expect("random halves differ")
    }

    /// Offsets near the places where counters wrap.
    fn layout(&mut self, unit_bytes: u32) -> Layout {
        let large = self.below(2) == 0;
        let near = self.pick(&[0, 1 << 31, 1 << 32, u64::MAX, self.0]);
        let offset = near.wrapping_sub(self.below(200));
        let sectors = if unit_bytes.is_multiple_of(512) { u64::from(unit_bytes) / 512 } else { 1 };
        Layout {
            unit_bytes,
            kind: self.pick(&[TweakKind::Plain64, TweakKind::Plain]),
            large,
            // Counters in units need a whole number of them.
            offset_sectors: if large { offset / sectors * sectors } else { offset },
        }
    }

    /// Any unit a kernel takes, odd multiples of 16 included.
    fn unit_bytes(&mut self) -> u32 {
        match self.below(3) {
            0 => self.pick(&[512, 1024, 2048, 4096]),
            1 => self.pick(&[16, 48, 112, 128, 144, 256, 496, 528, 1040, 1536, 4080, 4112, 8192]),
            _ => 16 * (1 + u32::try_from(self.below(300)).expect("small")),
        }
    }

    /// A first unit such that a run crosses 2^32 or 2^64 counters now and then.
    fn first(&mut self) -> DataUnit {
        let edge = self.pick(&[0, 1 << 29, 1 << 32, 1 << 61, u64::MAX, self.0]);
        DataUnit(edge.wrapping_sub(self.below(40)))
    }
}

/// The kernels this CPU has.
fn ladder() -> impl Iterator<Item = Kernel> {
    Kernel::ALL.into_iter().filter(|kernel| {
        let available = kernel.is_available();
        if !available {
            eprintln!("skipped: this CPU cannot run {}", kernel.name());
        }
        available
    })
}

fn hex(text: &str) -> Vec<u8> {
    assert!(text.len().is_multiple_of(2), "whole bytes: {text}");
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).expect("hexadecimal"))
        .collect()
}

/// One data unit of any size with its tweak counter, in both directions, on every kernel.
fn check(name: &str, key: &[u8], counter: u64, plain: &[u8], encrypted: &[u8]) {
    let key = VolumeKey::new(key).expect("a vector's key");
    let unit_bytes = u32::try_from(plain.len()).expect("a vector's length");
    let layout = Layout { offset_sectors: counter, ..Layout::plain64(unit_bytes) };
    for kernel in ladder() {
        let cipher = cipher(kernel, &key, layout).expect(name);
        let mut buf = plain.to_vec();
        cipher.encrypt(DataUnit(0), &mut buf);
        assert_eq!(buf, encrypted, "{name}: {} encrypts", kernel.name());
        cipher.decrypt(DataUnit(0), &mut buf);
        assert_eq!(buf, plain, "{name}: {} decrypts", kernel.name());
    }
}

#[test]
fn ieee_1619_vectors() {
    let mut run = 0;
    for line in include_str!("../vectors/ieee1619.txt").lines().filter(|line| !line.starts_with('#')) {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [number, key, counter, plain, encrypted] = fields[..] else { panic!("five fields: {line}") };
        let plain = if plain == "pattern" { (0..=255).chain(0..=255).collect() } else { hex(plain) };
        let counter = u64::from_str_radix(counter, 16).expect("a sequence number");
        check(&format!("vector {number}"), &hex(key), counter, &plain, &hex(encrypted));
        run += 1;
    }
    assert_eq!(run, 5);
}

#[test]
fn nist_cavp_vectors() {
    let files = [
        include_str!("../vectors/nist-cavp/XTSGenAES128.rsp"),
        include_str!("../vectors/nist-cavp/XTSGenAES256.rsp"),
    ];
    let mut run = 0;
    for file in files {
        let mut record: std::collections::HashMap<&str, &str> = std::collections::HashMap::new();
        for line in file.lines() {
            let Some((field, value)) = line.split_once(" = ") else { continue };
            if field == "COUNT" {
                record.clear();
            }
            record.insert(field, value.trim());
            // PT precedes CT in the encryption half, CT precedes PT in the other: the later one completes the record.
            let (Some(plain), Some(encrypted)) = (record.get("PT"), record.get("CT")) else { continue };
            let bits: u32 = record["DataUnitLen"].parse().expect("a length in bits");
            if bits.is_multiple_of(128) {
                let counter = record["DataUnitSeqNumber"].parse().expect("a number");
                let name = format!("count {}, {bits} bits", record["COUNT"]);
                check(&name, &hex(record["Key"]), counter, &hex(plain), &hex(encrypted));
                run += 1;
            }
        }
    }
    assert_eq!(run, 1200);
}

#[test]
fn wycheproof_vectors() {
    let file: serde_json::Value =
        serde_json::from_str(include_str!("../vectors/wycheproof/aes_xts_test.json")).expect("JSON");
    let mut run = 0;
    for group in file["testGroups"].as_array().expect("groups") {
        for test in group["tests"].as_array().expect("tests") {
            let field = |name: &str| hex(test[name].as_str().expect(name));
            let (key, iv, plain) = (field("key"), field("iv"), field("msg"));
            // AES-192-XTS, ciphertext stealing and counters beyond 64 bits do not exist on disks.
            if !matches!(key.len(), 32 | 64) || !plain.len().is_multiple_of(16) || iv.len() > 8 {
                continue;
            }
            assert_eq!(test["result"], "valid");
            let mut counter = [0; 8];
            counter[..iv.len()].copy_from_slice(&iv);
            check(&format!("test {}", test["tcId"]), &key, u64::from_le_bytes(counter), &plain, &field("ct"));
            run += 1;
        }
    }
    assert_eq!(run, 26);
}

#[test]
fn every_kernel_equals_the_oracle() {
    for seed in 0..400 {
        let mut rng = Rng(seed);
        let unit_bytes = rng.unit_bytes();
        let (key, layout, first) = (rng.key(), rng.layout(unit_bytes), rng.first());
        let units = 1 + rng.below(90).min(120_000 / u64::from(unit_bytes));
        let plain = rng.bytes(usize::try_from(units).expect("few") * unit_bytes as usize);
        let mut expected = plain.clone();
        cipher(Kernel::Portable, &key, layout).expect("oracle").encrypt(first, &mut expected);
        for kernel in ladder() {
            let name = format!("seed {seed}: {} {layout:?} {first:?} × {units}", kernel.name());
            let cipher = cipher(kernel, &key, layout).expect(&name);
            // At an odd address: kernels must not assume alignment.
            let mut buf = vec![0; plain.len() + 2];
            let end = plain.len() + 1;
            buf[1..end].copy_from_slice(&plain);
            cipher.encrypt(first, &mut buf[1..end]);
            assert!(buf[1..end] == expected, "{name} encrypts");
            cipher.decrypt(first, &mut buf[1..end]);
            assert!(buf[1..end] == plain, "{name} decrypts");
            assert_eq!((buf[0], buf[end]), (0, 0), "{name} writes outside its buffer");
        }
    }
}

#[test]
fn a_run_equals_its_units_one_by_one() {
    let mut rng = Rng(7);
    let key = rng.key();
    for kernel in ladder() {
        for unit_bytes in [512_u32, 4096, 1040] {
            let layout = Layout { offset_sectors: (1 << 32) - 16, ..Layout::plain64(unit_bytes) };
            let cipher = cipher(kernel, &key, layout).expect("available");
            let plain = rng.bytes(70 * unit_bytes as usize);
            let mut whole = plain.clone();
            cipher.encrypt(DataUnit(3), &mut whole);
            let mut pieces = plain;
            for (unit, piece) in pieces.chunks_mut(unit_bytes as usize).enumerate() {
                cipher.encrypt(DataUnit(3 + unit as u64), piece);
            }
            assert!(whole == pieces, "{} at {unit_bytes}", kernel.name());
        }
    }
}

#[test]
fn plain_starts_over_at_two_to_the_32_and_plain64_at_two_to_the_64() {
    let key = Rng(1).key();
    for kernel in ladder() {
        let encrypt = |kind, offset_sectors| {
            let layout = Layout { kind, offset_sectors, ..Layout::plain64(512) };
            let mut buf = vec![0x5a; 1024];
            cipher(kernel, &key, layout).expect("available").encrypt(DataUnit(0), &mut buf);
            buf
        };
        let edge = u64::from(u32::MAX);
        let zero = encrypt(TweakKind::Plain64, 0);
        let (narrow, wide) = (encrypt(TweakKind::Plain, edge), encrypt(TweakKind::Plain64, edge));
        assert!(narrow[..512] == wide[..512] && narrow[512..] != wide[512..], "{}", kernel.name());
        assert!(narrow[512..] == zero[..512], "{}: plain starts over", kernel.name());
        assert!(
            encrypt(TweakKind::Plain64, u64::MAX)[512..] == zero[..512],
            "{}: plain64 wraps",
            kernel.name()
        );
    }
}

#[test]
fn fused_equals_decrypt_then_encrypt() {
    for seed in 0..300 {
        let mut rng = Rng(seed);
        let old_unit = rng.unit_bytes();
        // Unequal sizes with a small common multiple, so that runs stay short.
        let new_unit = if rng.below(2) == 0 {
            old_unit
        } else {
            rng.pick(&[512, 1024, 4096, old_unit * 3, old_unit * 2])
        };
        let (old, new) = (rng.key(), rng.key());
        let (old_layout, new_layout) = (rng.layout(old_unit), rng.layout(new_unit));
        let (a, b) = (u64::from(old_unit), u64::from(new_unit));
        let multiple = a / gcd(a, b) * b;
        let first_byte = multiple * rng.pick(&[0, 1, 1_000_003, (1 << 41) / multiple]);
        let len =
            usize::try_from(multiple * (1 + rng.below((150_000 / multiple).clamp(1, 90)))).expect("short");
        let start = rng.bytes(len);
        let mut expected = start.clone();
        let oracle = |key, layout| cipher(Kernel::Portable, key, layout).expect("oracle");
        oracle(&old, old_layout).decrypt(DataUnit(first_byte / a), &mut expected);
        oracle(&new, new_layout).encrypt(DataUnit(first_byte / b), &mut expected);
        for kernel in ladder() {
            let name = format!("seed {seed}: {} {old_layout:?} to {new_layout:?}", kernel.name());
            let recrypter = recrypter(kernel, (&old, old_layout), (&new, new_layout)).expect(&name);
            let mut buf = start.clone();
            recrypter.recrypt(first_byte, &mut buf);
            assert!(buf == expected, "{name} at {first_byte}, {len} bytes");
        }
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[test]
fn an_empty_run_is_no_work() {
    let key = Rng(3).key();
    for kernel in ladder() {
        cipher(kernel, &key, Layout::plain64(512)).expect("available").encrypt(DataUnit(0), &mut []);
    }
}
