//! What a holder may believe of its lease, and until when: the time contract as arithmetic. No clock, task or network.

use std::time::Duration;

use leased_proto::v1::LossReason;

use crate::moment::Moment;

/// The share of a TTL that is kept in hand, for clocks that do not run at the same rate. A quartz clock is off by less than
/// 0.02 %; that of a virtual machine may be worse for a while.
const MARGIN_SHARE: u32 = 100;
/// What is kept in hand at least, for timers that fire late and clocks that are read late.
const LEAST_MARGIN: Duration = Duration::from_millis(5);

/// How a holder stands to its lease.
///
/// ```no_run
/// # fn example(lease: leased_client::Lease) {
/// use leased_client::State;
///
/// if lease.state().current() == State::Jeopardy {
///     println!("no word from a daemon");
/// }
/// # }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum State {
    /// Held: the deadline is ahead. Act on the key.
    Held,
    /// The deadline has passed without word from a daemon. Stop acting on the key; the lease may be gone, or may still be
    /// unclaimed and come back to [`State::Held`].
    Jeopardy,
    /// Gone for good.
    Lost(Loss),
}

/// How a lease was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Loss {
    /// Not held; how it went is not remembered.
    Gone,
    /// It ran out, and another took the key.
    Displaced,
    /// It was given back.
    Released,
    /// An operator took it away.
    Revoked,
}

impl Loss {
    /// The word for it: `gone`, `displaced`, `released` or `revoked`.
    ///
    /// ```
    /// assert_eq!(leased_client::Loss::Displaced.as_str(), "displaced");
    /// ```
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Gone => "gone",
            Self::Displaced => "displaced",
            Self::Released => "released",
            Self::Revoked => "revoked",
        }
    }

    /// The loss that a refusal of this API names in its metadata.
    pub(crate) fn named(word: &str) -> Self {
        [Self::Displaced, Self::Released, Self::Revoked]
            .into_iter()
            .find(|loss| loss.as_str() == word)
            .unwrap_or(Self::Gone)
    }
}

impl From<LossReason> for Loss {
    fn from(reason: LossReason) -> Self {
        match reason {
            LossReason::Displaced => Self::Displaced,
            LossReason::Released => Self::Released,
            LossReason::Revoked => Self::Revoked,
            LossReason::Gone | LossReason::Unspecified => Self::Gone,
        }
    }
}

impl std::fmt::Display for Loss {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.as_str())
    }
}

/// A holder's belief: held until a deadline that each confirmation moves ahead, or lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Belief {
    pub(crate) deadline: Moment,
    pub(crate) lost: Option<Loss>,
}

impl Belief {
    pub(crate) fn new(deadline: Moment) -> Self {
        Self { deadline, lost: None }
    }

    /// How things stand at `now`.
    pub(crate) fn at(&self, now: Moment) -> State {
        match self.lost {
            Some(loss) => State::Lost(loss),
            None if now < self.deadline => State::Held,
            None => State::Jeopardy,
        }
    }

    /// A daemon has confirmed the lease.
    pub(crate) fn confirm(&mut self, deadline: Moment) {
        self.deadline = self.deadline.max(deadline);
    }

    /// The lease is gone. The first reason stays.
    pub(crate) fn lose(&mut self, loss: Loss) {
        self.lost.get_or_insert(loss);
    }
}

/// Until when a lease may be believed in: `remaining`, as a daemon told in answer to what was sent at `sent_at`, less the
/// margin. Counted from before the request left and never from when the answer came, which may have travelled for any time
/// (Gray and Cheriton, "Leases", SOSP 1989, section 2).
pub(crate) fn deadline(sent_at: Moment, remaining: Duration, margin: Duration) -> Moment {
    sent_at + remaining.saturating_sub(margin)
}

/// What to keep in hand of a lease of this TTL, unless its holder says more.
pub(crate) fn margin(ttl: Duration) -> Duration {
    (ttl / MARGIN_SHARE).max(LEAST_MARGIN)
}

/// The largest margin that a lease of this TTL can have: half of it. A lease is touched every third of its TTL, so with a larger
/// margin one touch that is late ends belief although nothing is wrong.
pub(crate) fn largest_margin(ttl: Duration) -> Duration {
    ttl / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn belief_ends_at_its_deadline_and_comes_back_with_a_confirmation() {
        let start = Moment::now();
        let mut belief = Belief::new(start + SECOND);
        assert_eq!(belief.at(start), State::Held);
        assert_eq!(belief.at(start + SECOND), State::Jeopardy);
        belief.confirm(start + 3 * SECOND);
        assert_eq!(belief.at(start + 2 * SECOND), State::Held);
    }

    #[test]
    fn an_old_confirmation_takes_nothing_away() {
        let start = Moment::now();
        let mut belief = Belief::new(start + 2 * SECOND);
        belief.confirm(start + SECOND);
        assert_eq!(belief.deadline, start + 2 * SECOND);
    }

    #[test]
    fn what_is_lost_stays_lost_for_its_first_reason() {
        let start = Moment::now();
        let mut belief = Belief::new(start + SECOND);
        belief.lose(Loss::Revoked);
        belief.lose(Loss::Displaced);
        belief.confirm(start + 9 * SECOND);
        assert_eq!(belief.at(start), State::Lost(Loss::Revoked));
    }

    #[test]
    fn the_margin_is_kept_even_of_the_shortest_lease() {
        let start = Moment::now();
        assert_eq!(margin(Duration::from_millis(100)), Duration::from_millis(5));
        assert_eq!(margin(30 * SECOND), Duration::from_millis(300));
        assert_eq!(deadline(start, Duration::from_millis(3), Duration::from_millis(5)), start);
    }
}
