//! Which bytes of a reply have arrived: pieces come in any order, and never twice.

/// Pieces that stand alone, beyond which a reply is refused: servers answer with a few, in order.
const PIECES_MAX: usize = 1024;

/// Bytes from 0 on, as far as they arrived without a gap, and pieces behind that.
#[derive(Debug, Default)]
pub struct Coverage {
    whole: u32,
    /// Ascending, without overlap; empty as long as pieces come in order.
    pieces: Vec<(u32, u32)>,
}

impl Coverage {
    /// Bytes `start..end` arrived. `false`: some of them had already, or there are too many pieces.
    pub fn add(&mut self, start: u32, end: u32) -> bool {
        if start < self.whole {
            return false;
        }
        let at = self.pieces.partition_point(|&(other, _)| other < start);
        let before = at.checked_sub(1).map(|before| self.pieces[before].1);
        if before.is_some_and(|before| before > start)
            || self.pieces.get(at).is_some_and(|&(next, _)| next < end)
        {
            return false;
        }
        if start > self.whole {
            if self.pieces.len() >= PIECES_MAX {
                return false;
            }
            self.pieces.insert(at, (start, end));
            return true;
        }
        self.whole = end;
        let joined = self.pieces.iter().take_while(|&&(start, end)| {
            let joins = start == self.whole;
            if joins {
                self.whole = end;
            }
            joins
        });
        let joined = joined.count();
        self.pieces.drain(..joined);
        true
    }

    /// Have all of `length` bytes arrived?
    #[must_use]
    pub fn is_all(&self, length: u32) -> bool {
        self.whole == length && self.pieces.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_in_any_order_make_a_whole() {
        let mut covered = Coverage::default();
        for (start, end) in [(30, 40), (10, 20), (0, 10), (20, 30)] {
            assert!(!covered.is_all(40));
            assert!(covered.add(start, end));
        }
        assert!(covered.is_all(40));
        assert!(!covered.is_all(41));
    }

    #[test]
    fn nothing_arrives_twice() {
        let mut covered = Coverage::default();
        assert!(covered.add(10, 20) && covered.add(0, 5));
        for (start, end) in [(0, 1), (4, 6), (9, 11), (10, 20), (19, 21), (5, 11), (12, 13), (0, 100)] {
            assert!(!covered.add(start, end), "{start}..{end}");
        }
        assert!(covered.add(5, 10) && covered.is_all(20));
    }

    #[test]
    fn pieces_are_not_counted_without_end() {
        let mut covered = Coverage::default();
        let limit = u32::try_from(PIECES_MAX).expect("small");
        assert!((1..=limit).all(|n| covered.add(2 * n, 2 * n + 1)));
        assert!(!covered.add(2 * limit + 2, 2 * limit + 3));
    }
}
