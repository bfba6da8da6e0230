//! What a key derivation shall cost on this machine: measured, in CPU time, so that what else runs makes no keyslot weaker.
//!
//! The model for Argon2 is that time grows with passes times memory. It does so closely enough to steer by, not to trust: what a
//! KiB costs depends on how many there are, so the last measurement is made with the memory that is chosen.

use std::time::Duration;

use proto::ErrorKind;
use proto::luks::{KdfKind, KdfWish};

use super::argon::{self, Cost, Turn};
use super::hash::Hash;
use super::kdf::{
    ARGON2_LANES_MAX, ARGON2_MEMORY_KIB_MAX, ARGON2_MEMORY_KIB_MIN, ARGON2_TIME_MIN, Argon2Kind,
    DERIVATION_MAX, Kdf, PBKDF2_ITERATIONS_MIN, pbkdf2,
};
use super::room::{self, Room};
use crate::error::{Error, Result};

/// Default of `iter_time_ms`, as cryptsetup.
const ITER_TIME_MS: u32 = 2000;
/// Longest `iter_time_ms`: half of [`DERIVATION_MAX`], so that what is made here opens here on a slower day.
const ITER_TIME_MS_MAX: u32 = 60_000;
/// PBKDF2 iterations never worth an estimate: less than a minute on any machine.
const ITERATIONS_CHEAP: u32 = 20_000_000;
/// Argon2 passes times KiB never worth an estimate: 64 passes over 1 GiB.
const ARGON2_CHEAP: u64 = 64 << 20;
/// Default of `memory_kib`, as cryptsetup.
const MEMORY_KIB: u32 = 1 << 20;
/// Less memory makes a keyslot weaker for as long as it lasts, so for want of memory none is made with less: what RFC 9106
/// (section 4) recommends where memory is scarce.
const MEMORY_KIB_LEAST: u32 = 64 << 10;
/// Memory of the first measurement, and of [`estimate`]: larger than the caches that would flatter it.
const PROBE_KIB: u32 = 32 << 10;
/// Least time of one PBKDF2 measurement that counts.
const PBKDF2_SAMPLE: Duration = Duration::from_millis(60);
/// No measurement of Argon2 is planned to take longer than this, whatever the wish.
const ARGON2_SAMPLE: Duration = Duration::from_millis(2500);
/// What a longest key is cut to for a measurement: it only has to have as many PBKDF2 blocks.
const KEY_BYTES_MAX: usize = 1024;

/// A wish inside the bounds, with what is still to be measured.
enum Checked {
    /// Nothing is.
    Known(Kdf),
    /// PBKDF2 for a time.
    Pbkdf2 { hash: Hash, target: Duration },
    /// Argon2 with what memory may be had: at most so much, if wished; with so many passes, or for a time.
    Argon2 { kind: Argon2Kind, lanes: u32, memory_kib: Option<u32>, time: Option<u32>, target: Duration },
}

/// See [`Kdf::calibrate`].
pub(super) fn calibrate(
    wish: &KdfWish,
    default: KdfKind,
    hash: Hash,
    key_bytes: usize,
    give_up: &dyn Fn() -> bool,
) -> Result<Kdf> {
    match checked(wish, default, hash)? {
        Checked::Known(kdf) => {
            // A keyslot nobody could open here, and a derivation that everybody would have to wait for.
            kdf.payable(key_bytes)?;
            Ok(kdf)
        }
        Checked::Pbkdf2 { hash, target } => {
            Ok(Kdf::Pbkdf2 { hash, iterations: pbkdf2_iterations(hash, key_bytes, target) })
        }
        Checked::Argon2 { kind, lanes, memory_kib, time, target } => {
            // The turn first: what a derivation of this process holds until then is free afterwards.
            let turn = Turn::wait(give_up)?;
            let memory_kib = memory_cap(memory_kib, room::here())?;
            if let Some(time) = time {
                drop(turn);
                let kdf = Kdf::Argon2 { kind, time, memory_kib, lanes };
                kdf.payable(key_bytes)?;
                return Ok(kdf);
            }
            let most = Cost { kind, time: ARGON2_TIME_MIN, memory_kib, lanes };
            let Cost { time, memory_kib, .. } = search(most, target, |cost| {
                with_room(key_bytes, |out| argon::run(cost, PASSPHRASE, &SALT, out))
            })?;
            Ok(Kdf::Argon2 { kind, time, memory_kib, lanes })
        }
    }
}

/// See [`Kdf::check_wish`].
pub(super) fn check_wish(wish: &KdfWish, default: KdfKind, hash: Hash) -> Result<()> {
    if let Checked::Argon2 { memory_kib, .. } = checked(wish, default, hash)? {
        // What is free will be another matter when it is taken.
        memory_cap(memory_kib, room::here().map(|room| Room { free_kib: room.total_kib, ..room }))?;
    }
    Ok(())
}

fn checked(wish: &KdfWish, default: KdfKind, hash: Hash) -> Result<Checked> {
    let kind = wish.kind.unwrap_or(default);
    let target = Duration::from_millis(u64::from(within(
        "iter_time_ms",
        wish.iter_time_ms.unwrap_or(ITER_TIME_MS),
        1,
        ITER_TIME_MS_MAX,
    )?));
    let argon2 = match kind {
        KdfKind::Pbkdf2 => return checked_pbkdf2(wish, hash, target),
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
    Ok(match (time, memory) {
        (Some(time), Some(memory_kib)) => {
            Checked::Known(Kdf::Argon2 { kind: argon2, time, memory_kib, lanes })
        }
        _ => Checked::Argon2 { kind: argon2, lanes, memory_kib: memory, time, target },
    })
}

fn checked_pbkdf2(wish: &KdfWish, hash: Hash, target: Duration) -> Result<Checked> {
    if wish.memory_kib.is_some() || wish.lanes.is_some() {
        return Err(Error::new(ErrorKind::Invalid, "pbkdf2 has neither memory nor lanes"));
    }
    let hash = wish.hash.as_deref().map_or(Ok(hash), Hash::from_name)?;
    match wish.iterations {
        Some(iterations) => {
            let iterations = within("pbkdf2 iterations", iterations, PBKDF2_ITERATIONS_MIN, u32::MAX)?;
            Ok(Checked::Known(Kdf::Pbkdf2 { hash, iterations }))
        }
        None => Ok(Checked::Pbkdf2 { hash, target }),
    }
}

/// A wished value that must lie in a range.
fn within(what: &str, value: u32, least: u32, most: u32) -> Result<u32> {
    if (least..=most).contains(&value) {
        return Ok(value);
    }
    let bounds = if most == u32::MAX { format!("at least {least}") } else { format!("{least} to {most}") };
    Err(Error::new(ErrorKind::Invalid, format!("{what}: {bounds}, not {value}")))
}

/// KiB of what is wished that may be had: at most half of all there is, and of what is free all but a quarter, for others take
/// memory too while a derivation runs. Where the kernel says nothing, the least that is no weakness unless more is asked for.
///
/// # Errors
/// `Limit`: less than [`MEMORY_KIB_LEAST`], and less than wished.
fn memory_cap(wished_kib: Option<u32>, room: Option<Room>) -> Result<u32> {
    let Some(room) = room else { return Ok(wished_kib.unwrap_or(MEMORY_KIB_LEAST)) };
    let wanted = wished_kib.unwrap_or(MEMORY_KIB);
    let fair = (room.total_kib / 2).min(room.free_kib - room.free_kib / 4);
    let cap = u32::try_from(fair).unwrap_or(u32::MAX).min(wanted);
    if cap < wanted.min(MEMORY_KIB_LEAST) {
        let what = format!(
            "a keyslot made here would get {cap} KiB of memory for argon2, and less than {} make it weak: {} KiB are free of {}",
            wanted.min(MEMORY_KIB_LEAST),
            room.free_kib,
            room.total_kib,
        );
        return Err(Error::new(ErrorKind::Limit, what).hint(
            "free memory, raise the memory limit of the daemon's service, or ask for a weaker keyslot with --pbkdf-memory",
        ));
    }
    if cap < wanted {
        tracing::info!("argon2 gets {cap} KiB of memory instead of {wanted}, for there is no more here");
    }
    Ok(cap)
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

/// See [`Kdf::payable`].
pub(super) fn payable(kdf: &Kdf, estimate: impl FnOnce() -> Result<Duration>) -> Result<()> {
    let cheap = match kdf {
        Kdf::Pbkdf2 { iterations, .. } => *iterations <= ITERATIONS_CHEAP,
        Kdf::Argon2 { time, memory_kib, .. } => u64::from(*time) * u64::from(*memory_kib) <= ARGON2_CHEAP,
    };
    if cheap {
        return Ok(());
    }
    let estimate = estimate().map_err(|error| {
        Error::new(ErrorKind::Limit, "the key derivation is a costly one, and its time cannot be measured")
            .because(error)
    })?;
    if estimate <= DERIVATION_MAX {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Limit,
        format!(
            "the key derivation would take about {} minutes, and at most {} are spent on one",
            estimate.as_secs() / 60,
            DERIVATION_MAX.as_secs() / 60
        ),
    ))
}

/// See [`Kdf::estimate`].
pub(super) fn estimate(kdf: &Kdf, key_bytes: usize) -> Result<Duration> {
    estimate_by(kdf, key_bytes, |probe| with_room(key_bytes, |out| argon::run(probe, PASSPHRASE, &SALT, out)))
}

fn estimate_by(
    kdf: &Kdf,
    key_bytes: usize,
    measure: impl FnOnce(Cost) -> Result<Duration>,
) -> Result<Duration> {
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
            measure(probe)?.as_secs_f64() * factor
        }
    };
    Ok(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: Cost = Cost { kind: Argon2Kind::Argon2id, time: 4, memory_kib: MEMORY_KIB, lanes: 4 };

    /// A machine where a KiB of a pass costs so many nanoseconds, and from 64 MiB on twice as many.
    fn machine(nanoseconds: u32) -> impl FnMut(Cost) -> Result<Duration> {
        move |cost| {
            let each = if cost.memory_kib >= 64 << 10 { 2 * nanoseconds } else { nanoseconds };
            Ok(Duration::from_nanos(u64::from(each)) * cost.memory_kib * cost.time)
        }
    }

    fn found(most: Cost, nanoseconds: u32, milliseconds: u64) -> (Cost, f64) {
        let target = Duration::from_millis(milliseconds);
        let cost = search(most, target, machine(nanoseconds)).expect("finds");
        let took = machine(nanoseconds)(cost).expect("a time");
        (cost, took.as_secs_f64() / target.as_secs_f64())
    }

    #[test]
    fn a_fast_machine_gets_all_memory_and_more_passes() {
        let (cost, part) = found(MOST, 50, 2000);
        assert_eq!(cost.memory_kib, MOST.memory_kib);
        assert!(cost.time > 4 && (0.9..=1.1).contains(&part), "{cost:?} {part}");
    }

    #[test]
    fn a_slow_machine_gets_four_passes_and_less_memory() {
        let (cost, part) = found(MOST, 600, 2000);
        assert_eq!(cost.time, 4);
        assert!(cost.memory_kib < MOST.memory_kib && (0.9..=1.1).contains(&part), "{cost:?} {part}");
    }

    #[test]
    fn the_least_cost_is_the_floor_and_a_long_wish_is_met() {
        let (cost, _) = found(MOST, 1_000_000, 1);
        assert_eq!((cost.time, cost.memory_kib), (4, 32));
        let (cost, part) = found(MOST, 50, 600_000);
        assert!(cost.memory_kib == MOST.memory_kib && (0.9..=1.1).contains(&part), "{cost:?} {part}");
    }

    #[test]
    fn a_measurement_is_never_much_longer_than_planned() {
        let mut machine = machine(50);
        let mut longest = Duration::ZERO;
        search(MOST, Duration::from_secs(600), |cost| {
            let took = machine(cost)?;
            longest = longest.max(took);
            Ok(took)
        })
        .expect("finds");
        assert!(longest <= 2 * ARGON2_SAMPLE, "{longest:?}");
    }

    #[test]
    fn memory_is_at_most_half_of_all_and_within_what_is_free() {
        let room = |total_kib, free_kib| Some(Room { total_kib, free_kib, swap_kib: 0 });
        for (wished, room, cap) in [
            (None, room(24 << 20, 24 << 20), MEMORY_KIB),
            (None, room((2 << 20) - 2, (2 << 20) - 2), MEMORY_KIB - 1),
            // Another holds most of it: it is not halved once more.
            (None, room(2 << 20, 1 << 20), 3 << 18),
            (None, room(24 << 20, 400 << 10), 300 << 10),
            (Some(1 << 22), room(u64::MAX, u64::MAX), 1 << 22),
            (Some(1 << 22), room(4 << 20, 4 << 20), 2 << 20),
            (None, None, MEMORY_KIB_LEAST),
            (Some(1 << 22), None, 1 << 22),
            (Some(64), None, 64),
        ] {
            assert_eq!(memory_cap(wished, room).expect("enough"), cap, "{wished:?} {room:?}");
        }
    }

    #[test]
    fn want_of_memory_makes_no_weak_keyslot_unless_one_is_asked_for() {
        let room = |total_kib, free_kib| Some(Room { total_kib, free_kib, swap_kib: 0 });
        let least = u64::from(MEMORY_KIB_LEAST);
        // A tight cgroup; a machine whose memory is in use.
        for (total, free) in [(2 * least - 2, 2 * least - 2), (24 << 20, least), (24 << 20, 0), (0, 0)] {
            for wished in [None, Some(MEMORY_KIB), Some(MEMORY_KIB_LEAST)] {
                let error = memory_cap(wished, room(total, free)).expect_err("too little");
                assert_eq!(error.kind(), ErrorKind::Limit);
                assert!(error.to_failure().hint.is_some_and(|hint| hint.contains("--pbkdf-memory")));
            }
        }
        assert_eq!(memory_cap(None, room(2 * least, 2 * least)).expect("enough"), MEMORY_KIB_LEAST);
        assert_eq!(memory_cap(Some(4096), room(least, 5462)).expect("as asked"), 4096);
        assert!(memory_cap(Some(4096), room(least, 5460)).is_err(), "less than asked for");
    }

    #[test]
    fn what_takes_longer_than_two_minutes_is_not_begun() {
        let pbkdf2 = |iterations| Kdf::Pbkdf2 { hash: Hash::Sha256, iterations };
        let takes = |kdf, seconds| payable(&kdf, || Ok(Duration::from_secs(seconds)));
        let cheap = Kdf::Argon2 { kind: Argon2Kind::Argon2id, time: 64, memory_kib: 1 << 20, lanes: 1 };
        let dear = Kdf::Argon2 { kind: Argon2Kind::Argon2id, time: 65, memory_kib: 1 << 20, lanes: 1 };
        for kdf in [pbkdf2(ITERATIONS_CHEAP), cheap] {
            payable(&kdf, || panic!("not worth an estimate")).expect("cheap");
        }
        for kdf in [pbkdf2(ITERATIONS_CHEAP + 1), dear] {
            takes(kdf, 120).expect("just so");
            let error = takes(kdf, 301).expect_err("too long");
            assert_eq!(error.kind(), ErrorKind::Limit);
            assert!(error.chain().contains("about 5 minutes"), "{}", error.chain());
        }
    }

    #[test]
    fn what_cannot_be_measured_is_not_taken_for_cheap() {
        let dear = Kdf::Argon2 { kind: Argon2Kind::Argon2id, time: u32::MAX, memory_kib: 1 << 20, lanes: 1 };
        let estimate = || estimate_by(&dear, 64, |_| Err(Error::new(ErrorKind::Limit, "no threads")));
        assert_eq!(estimate().expect_err("unknown").kind(), ErrorKind::Limit);
        let error = payable(&dear, estimate).expect_err("unknown");
        assert_eq!(error.kind(), ErrorKind::Limit);
        assert!(error.chain().contains("cannot be measured: no threads"), "{}", error.chain());
    }

    fn asked(wish: &KdfWish) -> Result<Kdf> {
        calibrate(wish, KdfKind::Argon2id, Hash::Sha256, 64, &|| false)
    }

    #[test]
    fn a_wished_cost_that_nobody_could_pay_is_refused_and_a_measurement_can_be_given_up() {
        let weeks = KdfWish {
            iterations: Some(u32::MAX),
            memory_kib: Some(1 << 20),
            lanes: Some(1),
            ..KdfWish::default()
        };
        assert_eq!(asked(&weeks).expect_err("weeks").kind(), ErrorKind::Limit);
        let _turn = Turn::wait(&|| false).expect("nobody said to give up");
        let given_up = calibrate(&KdfWish::default(), KdfKind::Argon2id, Hash::Sha256, 64, &|| true);
        assert_eq!(given_up.expect_err("given up").kind(), ErrorKind::Cancelled);
    }

    #[test]
    fn what_is_wished_is_taken_as_it_is() {
        let wish =
            KdfWish { iterations: Some(4), memory_kib: Some(32), lanes: Some(3), ..KdfWish::default() };
        let kdf = Kdf::Argon2 { kind: Argon2Kind::Argon2id, time: 4, memory_kib: 32, lanes: 3 };
        assert_eq!(asked(&wish).expect("allowed"), kdf);
        let kind = Some(KdfKind::Pbkdf2);
        let wish =
            KdfWish { kind, iterations: Some(1000), hash: Some("SHA512".into()), ..KdfWish::default() };
        assert_eq!(asked(&wish).expect("allowed"), Kdf::Pbkdf2 { hash: Hash::Sha512, iterations: 1000 });
        let wish = KdfWish { kind, iterations: Some(5_000_000), ..KdfWish::default() };
        assert_eq!(asked(&wish).expect("allowed"), Kdf::Pbkdf2 { hash: Hash::Sha256, iterations: 5_000_000 });
    }

    #[test]
    fn a_wish_outside_the_bounds_is_refused() {
        let argon2 =
            KdfWish { iterations: Some(4), memory_kib: Some(32), lanes: Some(1), ..KdfWish::default() };
        let pbkdf2 = KdfWish { kind: Some(KdfKind::Pbkdf2), iterations: Some(1000), ..KdfWish::default() };
        let refused = [
            KdfWish { iterations: Some(3), ..argon2.clone() },
            KdfWish { memory_kib: Some(31), ..argon2.clone() },
            KdfWish { memory_kib: Some(4_194_305), ..argon2.clone() },
            KdfWish { lanes: Some(0), ..argon2.clone() },
            KdfWish { lanes: Some(5), ..argon2.clone() },
            KdfWish { hash: Some("sha256".into()), ..argon2.clone() },
            KdfWish { iter_time_ms: Some(0), ..argon2.clone() },
            KdfWish { iter_time_ms: Some(ITER_TIME_MS_MAX + 1), ..argon2 },
            KdfWish { iterations: Some(999), ..pbkdf2.clone() },
            KdfWish { memory_kib: Some(32), ..pbkdf2.clone() },
            KdfWish { lanes: Some(1), ..pbkdf2.clone() },
        ];
        for wish in refused {
            assert_eq!(asked(&wish).expect_err("outside").kind(), ErrorKind::Invalid, "{wish:?}");
        }
        let wish = KdfWish { hash: Some("ripemd160".into()), ..pbkdf2 };
        assert_eq!(asked(&wish).expect_err("unknown").kind(), ErrorKind::Unsupported);
    }

    #[test]
    fn calibration_here_gives_a_cost_that_checks_and_respects_the_wish() {
        let wish = KdfWish { iter_time_ms: Some(30), memory_kib: Some(4096), ..KdfWish::default() };
        let kdf = asked(&wish).expect("calibrates");
        kdf.check().expect("within the bounds");
        let Kdf::Argon2 { time, memory_kib, lanes, .. } = kdf else { panic!("the default is argon2id") };
        assert!(time >= 4 && memory_kib <= 4096 && (1..=4).contains(&lanes), "{kdf:?}");
        let wish = KdfWish { kind: Some(KdfKind::Pbkdf2), iter_time_ms: Some(1), ..KdfWish::default() };
        let Kdf::Pbkdf2 { iterations, .. } = asked(&wish).expect("calibrates") else { panic!("pbkdf2") };
        assert!(iterations >= 1000);
    }

    #[test]
    fn an_estimate_grows_with_the_cost() {
        let estimate = |kdf: &Kdf, key_bytes| estimate(kdf, key_bytes).expect("there is memory for it");
        let pbkdf2 = |iterations| Kdf::Pbkdf2 { hash: Hash::Sha256, iterations };
        assert!(estimate(&pbkdf2(100_000_000), 64) > 20 * estimate(&pbkdf2(1_000_000), 64));
        let argon2 = |time| Kdf::Argon2 { kind: Argon2Kind::Argon2id, time, memory_kib: 32, lanes: 1 };
        assert!(estimate(&argon2(100_000_000), 64) > 20 * estimate(&argon2(1_000_000), 64));
        // What no machine can do is estimated all the same.
        let most = Kdf::Argon2 { kind: Argon2Kind::Argon2i, time: u32::MAX, memory_kib: u32::MAX, lanes: 9 };
        assert!(estimate(&most, usize::MAX) > Duration::from_secs(1000));
    }
}
