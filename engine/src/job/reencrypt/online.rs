//! Beside an export: in its manner, agreed with its view, and with how much of the time.
//!
//! Refused is what has no step that clients could wait for: data that moves, and data without protection, of which all that is left is one
//! step; and volumes without a header, whose journal knows them by bytes that clients change.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::backend::device::Device;
use crate::error::{Error, ErrorKind, Result};
use crate::format::luks2::reencrypt::{Direction, Mode, Resilience};
use crate::job::reencrypt::course::{self, Course, Shape};
use crate::job::reencrypt::steps::Pace;
use crate::pipeline::rewrite::News;
use crate::pipeline::view::{View, Way};
use crate::volume::held::Served;
use crate::volume::reencrypt::Opened;

/// Most bytes of a hotzone, unless asked otherwise: a write to it waits as long as it takes to write it and the one before. Larger ones
/// cost clients more than the fewer header writes give the job.
pub const HOTZONE_BYTES: u64 = 4 << 20;
/// Clients that asked for nothing for so long do not count.
const IDLE: Duration = Duration::from_secs(1);

/// Read and write in the manner of the export; the alignment, bytes.
///
/// # Errors
/// `Unsupported`: this open file cannot be used so.
pub fn as_served(data: &Device, header: Option<&Device>, export: &Served) -> Result<u32> {
    if let Some(header) = header {
        header.disable_direct();
    }
    let same = if export.align > 1 { data.enable_direct() } else { data.disable_direct() };
    if same {
        return Ok(export.align);
    }
    let what = "the volume is exported, and cannot be opened for direct I/O as the export has it";
    Err(Error::new(ErrorKind::Unsupported, what).at(data.name()))
}

/// Can clients stand by?
///
/// # Errors
/// `Unsupported`: why not.
pub fn check(opened: &Opened, align: u32, name: &str) -> Result<()> {
    let refuse = |what: &str, hint: &str| Err(Error::new(ErrorKind::Unsupported, what).at(name).hint(hint));
    let stop = "stop its export first: cryptctl export stop";
    let moves = opened.moved.is_some() || opened.old.offset != opened.new.offset;
    if opened.mode != Mode::Reencrypt || moves {
        return refuse("the volume is exported, and only its key can be changed meanwhile", stop);
    }
    match opened.resilience {
        Resilience::Checksum(_) | Resilience::Journal => {}
        Resilience::None | Resilience::Datashift { .. } => {
            return refuse(
                "the volume is exported, and without protection all of it would be out of reach until the end",
                stop,
            );
        }
    }
    if align > 1 && !course::is_aligned(opened, align) {
        return refuse(
            "the volume is exported by direct I/O, and what is re-encrypted does not begin on blocks of its device",
            "export it with --direct off",
        );
    }
    Ok(())
}

/// Agree with the view about ciphers and boundary. From here on clients see it move.
///
/// # Errors
/// As [`View::begin`]; no memory for keys.
pub fn begin(view: &View, opened: &Opened, course: &Course, shape: &Shape) -> Result<()> {
    let old = course::segments(&opened.old, None, shape.kernel)?;
    let new = course::segments(&opened.new, None, shape.kernel)?;
    let way = match opened.direction {
        Direction::Forward => Way::Forward,
        Direction::Backward => Way::Backward,
    };
    if view.total() != opened.total {
        let what = format!("the export has {} bytes, and {} are re-encrypted", view.total(), opened.total);
        return Err(Error::new(ErrorKind::Conflict, what).at(&shape.name));
    }
    let news = course.transfer.rewrite().news.clone();
    let quiet = Arc::new(move || drop(news.send(News::Quiet)));
    view.begin(&old, new, way, course.from, quiet).map_err(|error| error.at(&shape.name))
}

/// A part of the time, while clients are there: behind a step that took so long, a rest in proportion.
pub struct Share<'a> {
    view: &'a View,
    percent: u32,
    /// Requests there had been when somebody looked last, and when one was new.
    seen: u64,
    used: Option<Instant>,
    begun: Instant,
    /// Nothing is begun before.
    until: Option<Instant>,
}

impl<'a> Share<'a> {
    /// So many percent, 1..=100.
    #[must_use]
    pub fn new(view: &'a View, percent: u32) -> Self {
        let seen = view.admitted();
        Self { view, percent: percent.clamp(1, 100), seen, used: None, begun: Instant::now(), until: None }
    }

    /// Are clients there?
    fn are_there(&mut self) -> bool {
        let now = Instant::now();
        let admitted = self.view.admitted();
        if admitted != self.seen {
            (self.seen, self.used) = (admitted, Some(now));
        }
        self.used.is_some_and(|used| now.duration_since(used) < IDLE)
    }
}

/// What is left of the time beside a step that took so long.
fn beside(step: Duration, percent: u32) -> Duration {
    step * (100 - percent) / percent
}

impl Pace for Share<'_> {
    fn begun(&mut self) {
        self.begun = Instant::now();
    }

    fn committed(&mut self) {
        let now = Instant::now();
        self.until = self.are_there().then(|| now + beside(now.duration_since(self.begun), self.percent));
        // Of one that was read ahead.
        self.begun = now;
    }

    fn rest(&mut self) -> Duration {
        if !self.are_there() {
            self.until = None;
        }
        self.until.map_or(Duration::ZERO, |until| until.saturating_duration_since(Instant::now()))
    }

    fn may_read_ahead(&mut self) -> bool {
        self.percent == 100 || !self.are_there()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_is_in_proportion() {
        let step = Duration::from_millis(30);
        for (percent, rest) in [(100, 0), (75, 10), (50, 30), (25, 90), (1, 2970)] {
            assert_eq!(beside(step, percent), Duration::from_millis(rest), "{percent}");
        }
    }
}
