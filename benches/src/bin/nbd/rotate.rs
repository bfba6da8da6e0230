//! Rotation under load: how long requests take while the key of the volume is changed under them, beside a server at rest.
//!
//! The load is fio's, 4 KiB anywhere, reads and writes mixed, a few in flight. A rotation is stopped when fio has ended and brought to its end
//! without clients, off the clock, so that every turn finds a whole volume.

use std::io;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use benches::nbd::load::{self, Direction, Load};
use benches::nbd::rows::{Row, Unit};
use benches::ours::Daemon;
use benches::rows::Side;
use benches::run;
use rustix::process::{Pid, Signal, kill_process};

use crate::{Bench, Contender, Medium};

/// What clients ask for meanwhile.
const LOAD: Load =
    Load { random: true, direction: Direction::Mixed, block_bytes: 4096, depth: 4, connections: 1 };
/// How steps are protected.
const RESILIENCE: &str = "checksum";
/// How long a rotation may take to begin.
const PATIENCE: Duration = Duration::from_secs(30);
/// Limits what part of the device's time a rotation takes.
const FLAG: &str = "--background-share";
/// Percent of the device's time for the last of the three.
const SHARE: &str = "20";

/// What goes on beside the load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Beside {
    Nothing,
    /// A rotation as users get it.
    Rotation,
    /// One that takes a share of the device's time.
    Share,
}

impl Beside {
    const ALL: [Self; 3] = [Self::Nothing, Self::Rotation, Self::Share];

    fn name(self) -> &'static str {
        match self {
            Self::Nothing => "ours at rest",
            Self::Rotation => "ours rotating",
            Self::Share => "ours rotating, 20 %",
        }
    }

    fn command(self, bench: &Bench, daemon: &Daemon) -> Option<Command> {
        let mut command = daemon.reencrypt(&bench.file(Contender::Ours), RESILIENCE);
        // That it was stopped is no news.
        command.stderr(Stdio::null());
        if self == Self::Share {
            command.args([FLAG, SHARE]);
        }
        (self != Self::Nothing).then_some(command)
    }
}

/// A client that waits for its rotation, and stops it when it goes.
struct Rotation(Child);

impl Drop for Rotation {
    fn drop(&mut self) {
        if let Some(pid) = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw) {
            // It has ended by itself, or comes to rest now.
            let _ = kill_process(pid, Signal::INT);
        }
        let _ = self.0.wait();
    }
}

/// All turns of the case.
///
/// # Errors
/// Of any of those who take part; a rotation that is over before the load is.
pub fn rounds(bench: &mut Bench) -> io::Result<()> {
    let mut all = Beside::ALL.to_vec();
    if !bench.programs.as_ref().is_some_and(|programs| programs.know("reencrypt", FLAG)) {
        eprintln!("SKIP {}: cryptctl reencrypt has no {FLAG}", Beside::Share.name());
        all.retain(|beside| *beside != Beside::Share);
    }
    for round in 0..bench.arguments.rounds {
        for place in 0..all.len() {
            let beside = all[(place + round as usize) % all.len()];
            let row = turn(bench, beside, round)
                .map_err(|error| io::Error::other(format!("rotate: {}: {error}", beside.name())))?;
            bench.keep(row);
        }
    }
    Ok(())
}

fn turn(bench: &Bench, beside: Beside, round: u32) -> io::Result<Row> {
    let _ = run::drop_caches();
    let server = bench.serve(Contender::Ours, Medium::Disk)?;
    let daemon = server.daemon().expect("ours is served by a daemon");
    let rotation = match beside.command(bench, daemon) {
        None => None,
        Some(mut command) => {
            let rotation = Rotation(command.spawn()?);
            begins(daemon)?;
            Some(rotation)
        }
    };
    let (before, began, started) = (server.cpu()?, daemon.rewritten()?, Instant::now());
    let seconds = bench.arguments.seconds;
    let told = load::fio(LOAD, &server.uri(), bench.size, seconds, &bench.scratch.at("fio.json"))?;
    let cpu = server.cpu()?.since(before);
    let rotated = match (began, daemon.rewritten()?) {
        (Some(began), Some(done)) => Some((done - began) as f64 / started.elapsed().as_secs_f64()),
        _ => None,
    };
    if rotation.is_some() && rotated.is_none() && !bench.arguments.small {
        return Err(io::Error::other("the rotation was over before the load: it needs a larger --size"));
    }
    let mut row = Row::new(
        (Medium::Disk.name(), "rotate", Unit::Iops),
        (beside.name(), Side::Ours),
        round,
        told,
        (cpu, server.rss_peak()),
    );
    row.rotated_bytes_per_second = rotated;
    if rotation.is_some() {
        drop(rotation);
        drop(server);
        let daemon = bench.daemon()?;
        run::pipeline(&mut [daemon.reencrypt(&bench.file(Contender::Ours), RESILIENCE)])?;
    }
    Ok(row)
}

/// Wait until data is rewritten.
fn begins(daemon: &Daemon) -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while daemon.rewritten()?.is_none() {
        if Instant::now() > deadline {
            return Err(io::Error::other("the rotation does not begin"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
