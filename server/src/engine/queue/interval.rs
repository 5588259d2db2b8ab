//! How often calls in line are looked after: the more there are the more seldom, so that a crowd that waits does not keep
//! the store from what it waits for.

use std::ops::Range;
use std::time::Duration;

use crate::store::Store;

/// Between two looks at a key, in milliseconds: a release that another daemon committed is noticed within two seconds, the
/// way to the store included, also when the feed fails.
const CHECK: Range<u64> = 1000..1800;
/// Looks a second from which on they become more seldom.
const LOOKS: usize = 5000;

/// The pace of one daemon's line.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pace {
    /// How long a place lasts without a refresh.
    place: Duration,
    /// Whether other daemons change records too.
    is_shared: bool,
}

impl Pace {
    pub(crate) fn of(store: &impl Store) -> Self {
        Self { place: store.rules().place, is_shared: store.is_shared() }
    }

    /// Between two refreshes of a place while so many calls wait. A place outlasts two that fail.
    pub(crate) fn refresh(self, calls: usize) -> Duration {
        let crowd = Duration::from_secs((calls / LOOKS) as u64);
        crowd.clamp(self.place / 5, self.place * 3 / 10)
    }

    /// Until the next look at a key, which is a refresh if one is due. Where nobody else changes it, these will do.
    pub(crate) fn look(self, calls: usize) -> Duration {
        let refresh = self.refresh(calls);
        if !self.is_shared {
            return refresh;
        }
        let check = Duration::from_millis(fastrand::u64(CHECK));
        let crowd = u32::try_from((calls / LOOKS).max(1)).unwrap_or(u32::MAX);
        check.saturating_mul(crowd).min(refresh)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Duration = Duration::from_secs(15);
    const SHARED: Pace = Pace { place: PLACE, is_shared: true };

    #[test]
    fn few_are_looked_at_often() {
        for calls in [1, 100, 5000] {
            assert_eq!(SHARED.refresh(calls), Duration::from_secs(3));
            assert!(SHARED.look(calls) < Duration::from_millis(1800));
        }
    }

    #[test]
    fn a_crowd_is_looked_at_seldom_and_keeps_its_places() {
        for calls in [25_000, 50_000, usize::MAX] {
            assert_eq!(SHARED.refresh(calls), Duration::from_millis(4500));
            assert_eq!(SHARED.look(calls), Duration::from_millis(4500), "each look is a refresh");
        }
    }

    #[test]
    fn alone_with_its_store_a_daemon_only_refreshes() {
        let alone = Pace { is_shared: false, ..SHARED };
        assert_eq!(alone.look(1), Duration::from_secs(3));
    }
}
