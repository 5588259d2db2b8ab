//! Finds the largest number that succeeds, by doubling and then bisecting. Pure, and independent of
//! what is counted.

/// A search, with what it has found so far.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Search {
    first: usize,
    most: usize,
    /// The largest number that succeeded.
    good: usize,
    /// The smallest number that failed.
    bad: Option<usize>,
}

impl Search {
    /// Begins with `first`, and tries no number larger than `most`.
    pub(crate) fn new(first: usize, most: usize) -> Self {
        Self { first, most, good: 0, bad: None }
    }

    /// The number to try next; `None` once the result is known to an eighth.
    pub(crate) fn next(&self) -> Option<usize> {
        match self.bad {
            None if self.good == 0 => Some(self.first),
            None => (self.good < self.most).then_some((2 * self.good).min(self.most)),
            Some(bad) => (bad - self.good > (bad / 8).max(1)).then_some(self.good.midpoint(bad)),
        }
    }

    /// Notes whether a number succeeded. If two runs contradict each other, the failure counts.
    pub(crate) fn note(&mut self, tried: usize, succeeded: bool) {
        if succeeded && self.bad.is_none_or(|bad| tried < bad) {
            self.good = self.good.max(tried);
        } else if !succeeded {
            self.bad = Some(self.bad.map_or(tried, |bad| bad.min(tried)));
            self.good = self.good.min(tried.saturating_sub(1));
        }
    }

    /// The largest number that succeeded; 0 if none did.
    pub(crate) fn found(&self) -> usize {
        self.good
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn search(limit: usize, most: usize) -> (usize, usize) {
        let (mut search, mut trials) = (Search::new(1000, most), 0);
        while let Some(tried) = search.next() {
            assert!(tried <= most);
            search.note(tried, tried <= limit);
            trials += 1;
        }
        (search.found(), trials)
    }

    #[test]
    fn any_limit_is_found_to_an_eighth() {
        for limit in [1, 7, 64, 999, 1000, 1001, 4321, 65_000, 100_000] {
            let (found, trials) = search(limit, 1_000_000);
            assert!(found <= limit && limit <= found + (found / 7).max(1), "{limit}: {found}");
            assert!(trials < 16, "{limit}: {trials}");
        }
        assert_eq!(search(0, 1_000_000).0, 0);
    }

    #[test]
    fn no_number_above_the_most_is_tried() {
        assert_eq!(search(usize::MAX, 6000).0, 6000);
    }

    #[test]
    fn a_search_with_a_contradiction_ends() {
        let mut search = Search::new(8, 100);
        search.note(8, true);
        search.note(8, false);
        assert_eq!((search.found(), search.next()), (7, None));
    }
}
