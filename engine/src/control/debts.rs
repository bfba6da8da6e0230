//! How many bytes of replies are held for clients that do not read, by user, and who is let go when it is too much.

use std::collections::HashMap;

use crate::limits;

/// The books: what each connection's outgoing buffer holds.
#[derive(Debug, Default)]
pub struct Debts {
    users: HashMap<u32, HashMap<u64, usize>>,
    of_user: HashMap<u32, usize>,
    all: usize,
}

impl Debts {
    /// A connection of this user holds so much now; 0 when it is gone.
    pub fn set(&mut self, uid: u32, connection: u64, bytes: usize) {
        let users = self.users.entry(uid).or_default();
        let before =
            if bytes == 0 { users.remove(&connection) } else { users.insert(connection, bytes) }.unwrap_or(0);
        let sum = self.of_user.entry(uid).or_default();
        *sum = *sum + bytes - before;
        self.all = self.all + bytes - before;
        if *sum == 0 {
            self.of_user.remove(&uid);
            self.users.remove(&uid);
        }
    }

    /// Who must go, if a budget is exceeded: the connection that holds most, of the user over its own budget or, when all
    /// together hold too much, of the user who holds most. Nobody pays for another user's debts.
    #[must_use]
    pub fn too_much(&self, uid: u32) -> Option<u64> {
        let debtor = if self.of_user.get(&uid).is_some_and(|sum| *sum > limits::UNSENT_PER_USER_MAX) {
            uid
        } else if self.all > limits::UNSENT_ALL_MAX {
            *self.of_user.iter().max_by_key(|(_, sum)| **sum)?.0
        } else {
            return None;
        };
        self.users.get(&debtor)?.iter().max_by_key(|(_, bytes)| **bytes).map(|(connection, _)| *connection)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_debtor_goes_and_only_when_a_budget_is_exceeded() {
        let mut debts = Debts::default();
        debts.set(1, 10, limits::UNSENT_PER_USER_MAX - 5);
        debts.set(1, 11, 5);
        assert_eq!(debts.too_much(1), None);
        debts.set(1, 11, 6);
        assert_eq!(debts.too_much(1), Some(10));
        debts.set(1, 10, 0);
        assert_eq!(debts.too_much(1), None);
        // No user over its budget, but all together.
        let share = limits::UNSENT_PER_USER_MAX - 1;
        for uid in 2..=4 {
            debts.set(uid, u64::from(uid), share);
        }
        debts.set(3, 3, share + 1);
        assert_eq!(debts.too_much(1), Some(3), "the small debtor that asked does not pay");
        for (uid, connection) in [(1, 11), (2, 2), (3, 3), (4, 4)] {
            debts.set(uid, connection, 0);
        }
        assert_eq!((debts.all, debts.users.len(), debts.of_user.len()), (0, 0, 0));
    }
}
