//! What a key derivation shall cost on this machine: measured, in CPU time, so that what else runs makes no keyslot weaker.
//!
//! The model for Argon2 is that time grows with passes times memory. It does so closely enough to steer by, not to trust: what a
//! KiB costs depends on how many there are, so the last measurement is made with the memory that is chosen.

use std::time::Duration;

use proto::ErrorKind;
use proto::luks::{KdfKind, KdfWish};

use super::argon::{self, Cost};
use super::hash::Hash;
use super::kdf::{
    ARGON2_LANES_MAX, ARGON2_MEMORY_KIB_MAX, ARGON2_MEMORY_KIB_MIN, ARGON2_TIME_MIN, Argon2Kind, Kdf,
    PBKDF2_ITERATIONS_MIN, pbkdf2,
};
use super::room;
use crate::error::{Error, Result};

/// Default of `iter_time_ms`, as cryptsetup.
const ITER_TIME_MS: u32 = 2000;
/// Longest `iter_time_ms`: ten minutes.
const ITER_TIME_MS_MAX: u32 = 600_000;
/// Default of `memory_kib`, as cryptsetup.
const MEMORY_KIB: u32 = 1 << 20;
/// Memory of the first measurement, and of [`estimate`]: larger than the caches that would flatter it.
const PROBE_KIB: u32 = 32 << 10;
/// Least time of one PBKDF2 measurement that counts.
const PBKDF2_SAMPLE: Duration = Duration::from_millis(60);
/// No measurement of Argon2 is planned to take longer than this, whatever the wish.
const ARGON2_SAMPLE: Duration = Duration::from_millis(2500);
/// What a longest key is cut to for a measurement: it only has to have as many PBKDF2 blocks.
const KEY_BYTES_MAX: usize = 1024;

/// See [`Kdf::calibrate`].
pub(super) fn calibrate(wish: &KdfWish, default: KdfKind, hash: Hash, key_bytes: usize) -> Result<Kdf> {
    let kind = wish.kind.unwrap_or(default);
    let target = Duration::from_millis(u64::from(within(
        "iter_time_ms",
        wish.iter_time_ms.unwrap_or(ITER_TIME_MS),
        1,
        ITER_TIME_MS_MAX,
    )?));
    let argon2 = match kind {
        KdfKind::Pbkdf2 => return calibrate_pbkdf2(wish, hash, key_bytes, target),
        KdfKind::Argon2i => Argon2Kind::Argon2i,
        KdfKind::Argon2id => Argon2Kind::Argon2id,
    };
    if wish.hash.is_some() {
        return Err(Error::new(ErrorKind::Invalid, "argon2 has no choice of a hash"));
    }
    let time = wish
        .iterations
        .map(|time| within("argon2 time cost", time, ARGON2_TIME_MIN, u32::MAX))
        .transpose()?;
    let memory = wish
        .memory_kib
        .map(|kib| within("argon2 memory in KiB", kib, ARGON2_MEMORY_KIB_MIN, ARGON2_MEMORY_KIB_MAX))
        .transpose()?;
    let lanes = match wish.lanes {
        Some(lanes) => within("argon2 lanes", lanes, 1, ARGON2_LANES_MAX)?,
        None => u32::try_from(argon::cpus()).unwrap_or(u32::MAX).clamp(1, ARGON2_LANES_MAX),
    };
    let cap = memory_cap(memory.unwrap_or(MEMORY_KIB), room::free_kib());
    if let Some(time) = time {
        return Ok(Kdf::Argon2 { kind: argon2, time, memory_kib: memory.unwrap_or(cap), lanes });
    }
    let start = Cost { kind: argon2, time: ARGON2_TIME_MIN, memory_kib: cap, lanes };
    let cost = search(start, target, |cost| {
        with_room(key_bytes, |out| argon::measure(cost, PASSPHRASE, &SALT, out))
    })?;
    Ok(Kdf::Argon2 { kind: cost.kind, time: cost.time, memory_kib: cost.memory_kib, lanes: cost.lanes })
}

fn calibrate_pbkdf2(wish: &KdfWish, hash: Hash, key_bytes: usize, target: Duration) -> Result<Kdf> {
    if wish.memory_kib.is_some() || wish.lanes.is_some() {
        return Err(Error::new(ErrorKind::Invalid, "pbkdf2 has neither memory nor lanes"));
    }
    let hash = wish.hash.as_deref().map_or(Ok(hash), Hash::from_name)?;
    let iterations = match wish.iterations {
        Some(iterations) => within("pbkdf2 iterations", iterations, PBKDF2_ITERATIONS_MIN, u32::MAX)?,
        None => pbkdf2_iterations(hash, key_bytes, target),
    };
    Ok(Kdf::Pbkdf2 { hash, iterations })
}

/// A wished value that must lie in a range.
fn within(what: &str, value: u32, least: u32, most: u32) -> Result<u32> {
    if (least..=most).contains(&value) {
        return Ok(value);
    }
    let bounds = if most == u32::MAX { format!("at least {least}") } else { format!("{least} to {most}") };
    Err(Error::new(ErrorKind::Invalid, format!("{what}: {bounds}, not {value}")))
}

/// At most half of what is free.
fn memory_cap(wished_kib: u32, free_kib: Option<u64>) -> u32 {
    let half = u32::try_from(free_kib.unwrap_or(u64::from(PROBE_KIB)) / 2).unwrap_or(u32::MAX);
    wished_kib.min(half).max(ARGON2_MEMORY_KIB_MIN)
}

/// As much memory as `most` has, if four passes over it fit the target, and then as many passes as fit; else four passes over
/// as much memory as fits.
fn search(most: Cost, target: Duration, mut measure: impl FnMut(Cost) -> Result<Duration>) -> Result<Cost> {
    let mut probe = Cost { memory_kib: most.memory_kib.min(PROBE_KIB), ..most };
    let mut chosen = probe;
    // The first measurement is of the probe, the others of what the one before makes of the target.
    for _ in 0..4 {
        let took = measure(probe)?;
        let per_kib_pass =
            took.as_secs_f64().max(1e-9) / (f64::from(probe.memory_kib) * f64::from(probe.time));
        let affordable = target.as_secs_f64() / per_kib_pass;
        let before = chosen;
        chosen = fit(most, affordable);
        // Passes are alike: a long wish is measured by fewer of them.
        let sample = ARGON2_SAMPLE.as_secs_f64() / per_kib_pass;
        let passes = whole(sample / f64::from(chosen.memory_kib)).max(1);
        probe = Cost { time: chosen.time.min(passes), ..chosen };
        if is_near(volume(chosen), volume(before)) {
            break;
        }
    }
    Ok(chosen)
}

/// The cost with so many KiB·passes.
fn fit(most: Cost, kib_passes: f64) -> Cost {
    let memory = whole(kib_passes / f64::from(ARGON2_TIME_MIN));
    if memory < most.memory_kib {
        return Cost { time: ARGON2_TIME_MIN, memory_kib: memory.max(ARGON2_MEMORY_KIB_MIN), ..most };
    }
    Cost { time: whole(kib_passes / f64::from(most.memory_kib)).max(ARGON2_TIME_MIN), ..most }
}

fn volume(cost: Cost) -> f64 {
    f64::from(cost.time) * f64::from(cost.memory_kib)
}

/// Within a twentieth.
fn is_near(one: f64, other: f64) -> bool {
    (one - other).abs() <= other / 20.0
}

/// The whole part, saturating.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the cast saturates, which is meant"
)]
fn whole(value: f64) -> u32 {
    value as u32
}

/// What measurements derive from.
const PASSPHRASE: &[u8] = b"passphrase of a measurement";
const SALT: [u8; 32] = [0x5A; 32];

/// Call with room for a key.
fn with_room<T>(key_bytes: usize, call: impl FnOnce(&mut [u8]) -> T) -> T {
    call(&mut [0; KEY_BYTES_MAX][..key_bytes.clamp(4, KEY_BYTES_MAX)])
}

/// Iterations of PBKDF2 that take about `target` here for so many bytes; at least 1000.
pub(super) fn pbkdf2_iterations(hash: Hash, key_bytes: usize, target: Duration) -> u32 {
    let each = pbkdf2_time(hash, key_bytes, 3, PBKDF2_SAMPLE);
    whole(target.as_secs_f64() / each).max(PBKDF2_ITERATIONS_MIN)
}

/// Seconds of one iteration: the least of several measurements, for whatever disturbs one makes it longer.
fn pbkdf2_time(hash: Hash, key_bytes: usize, repeats: u32, sample: Duration) -> f64 {
    let once = |iterations| {
        let start = argon::thread_time();
        with_room(key_bytes, |out| pbkdf2(hash, iterations, PASSPHRASE, &SALT, out));
        argon::thread_time().saturating_sub(start)
    };
    let mut iterations = PBKDF2_ITERATIONS_MIN;
    while once(iterations) < sample && iterations < u32::MAX / 2 {
        iterations *= 2;
    }
    let least = (0..repeats).map(|_| once(iterations)).min().unwrap_or_default();
    (least.as_secs_f64() / f64::from(iterations)).max(1e-12)
}

/// See [`Kdf::estimate`].
pub(super) fn estimate(kdf: &Kdf, key_bytes: usize) -> Duration {
    let seconds = match *kdf {
        Kdf::Pbkdf2 { hash, iterations } => {
            pbkdf2_time(hash, key_bytes, 1, Duration::from_millis(5)) * f64::from(iterations)
        }
        Kdf::Argon2 { kind, time, memory_kib, lanes } => {
            let memory = memory_kib.clamp(ARGON2_MEMORY_KIB_MIN, PROBE_KIB);
            let passes = (PROBE_KIB / memory).clamp(1, time.max(1));
            let lanes = lanes.clamp(1, ARGON2_LANES_MAX);
            let probe = Cost { kind, time: passes, memory_kib: memory, lanes };
            let factor = f64::from(time) * f64::from(memory_kib) / volume(probe);
            match with_room(key_bytes, |out| argon::run(probe, PASSPHRASE, &SALT, out)) {
                Ok(took) => took.as_secs_f64() * factor,
                // No memory even for that: no derivation, no time.
                Err(_) => 0.0,
            }
        }
    };
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}
