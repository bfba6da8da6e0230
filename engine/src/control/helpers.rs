//! What may block on a client's behalf, on short-lived threads with a fair share for every user.
//!
//! A submission looks at devices and may hang on a dead network filesystem; statistics wait for busy workers. At most
//! [`limits::HELPERS_MAX`] run at one time, [`limits::HELPERS_PER_USER_MAX`] of one user; a user's further ones wait, and
//! nobody waits for another user's that hang (unless very many users' do).

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use crate::limits;

/// One thing to do elsewhere. It reports its result itself.
pub struct Task {
    /// Whose share it takes.
    pub uid: u32,
    /// Whose connection waits for it.
    pub connection: u64,
    /// The request.
    pub id: u64,
    /// Not to be done once that connection is gone.
    pub attached: bool,
    /// What it owns until it runs; closed by the caller if it never does.
    pub descriptors: Vec<OwnedFd>,
    /// The work. It owns no descriptors but those it is given.
    pub work: Box<dyn FnOnce(Vec<OwnedFd>) + Send>,
}

/// Who runs and who waits.
#[derive(Default)]
pub struct Helpers {
    waiting: VecDeque<Task>,
    running: HashMap<u32, usize>,
    count: usize,
}

impl Helpers {
    /// Put at the end of the queue. [`Helpers::start`] follows.
    pub fn add(&mut self, task: Task) {
        self.waiting.push_back(task);
    }

    /// One of this user's has reported.
    pub fn finished(&mut self, uid: u32) {
        self.count -= 1;
        let of_user = self.running.get_mut(&uid).expect("it was counted when it started");
        *of_user -= 1;
        if *of_user == 0 {
            self.running.remove(&uid);
        }
    }

    /// How many run.
    #[must_use]
    pub fn running(&self) -> usize {
        self.count
    }

    /// Does any wait?
    #[must_use]
    pub fn any_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Start what may run now. Returns what could not be started for want of a thread, with why.
    pub fn start(&mut self) -> Vec<(Task, std::io::Error)> {
        let mut failed = Vec::new();
        while self.count < limits::HELPERS_MAX {
            let of_user = |task: &Task| self.running.get(&task.uid).copied().unwrap_or(0);
            let next = self.waiting.iter().position(|task| of_user(task) < limits::HELPERS_PER_USER_MAX);
            let Some(task) = next.and_then(|at| self.waiting.remove(at)) else { break };
            let uid = task.uid;
            match run(task) {
                Ok(()) => {
                    self.count += 1;
                    *self.running.entry(uid).or_default() += 1;
                }
                Err(failure) => failed.push(failure),
            }
        }
        failed
    }

    /// Take back what has not started and fits.
    pub fn withdraw(&mut self, fits: impl Fn(&Task) -> bool) -> Vec<Task> {
        let (out, kept) = std::mem::take(&mut self.waiting).into_iter().partition::<VecDeque<_>, _>(fits);
        self.waiting = kept;
        out.into()
    }
}

/// The task stays reachable from here until its thread has it: were it lost with a thread that cannot start, its descriptors
/// would be closed on the control thread.
fn run(task: Task) -> Result<(), (Task, std::io::Error)> {
    let place = Arc::new(Mutex::new(Some(task)));
    let taken = Arc::clone(&place);
    let body = move || {
        let task = taken.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(task) = task {
            (task.work)(task.descriptors);
        }
    };
    match std::thread::Builder::new().name("helper".into()).spawn(body) {
        Ok(_) => Ok(()),
        Err(error) => {
            let task = place.lock().unwrap_or_else(PoisonError::into_inner).take();
            Err((task.expect("no thread took it"), error))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam::channel::{Receiver, Sender, bounded, unbounded};

    fn task(uid: u32, say: Sender<u32>, until: Receiver<()>) -> Task {
        let work = Box::new(move |_| {
            say.send(uid).expect("the test listens");
            let _ = until.recv();
        });
        Task { uid, connection: u64::from(uid), id: 1, attached: true, descriptors: Vec::new(), work }
    }

    #[test]
    fn a_user_whose_helpers_hang_keeps_nobody_else_waiting() {
        let mut helpers = Helpers::default();
        let (say, said) = unbounded();
        let (release, hang) = bounded::<()>(0);
        for _ in 0..100 {
            helpers.add(task(1, say.clone(), hang.clone()));
        }
        helpers.add(task(2, say.clone(), hang.clone()));
        assert!(helpers.start().is_empty());
        let ran: Vec<u32> = said.iter().take(limits::HELPERS_PER_USER_MAX + 1).collect();
        assert_eq!(ran.iter().filter(|uid| **uid == 1).count(), limits::HELPERS_PER_USER_MAX);
        assert!(ran.contains(&2));
        assert_eq!(helpers.withdraw(|task| task.uid == 1).len(), 100 - limits::HELPERS_PER_USER_MAX);
        assert!(!helpers.any_waiting());
        drop(release);
        for uid in ran {
            helpers.finished(uid);
        }
        assert_eq!(helpers.running(), 0);
    }
}
