//! How long a holder may rely on its lease: the time contract as arithmetic. Pure: it has no clock,
//! task or network.

use std::time::Duration;

use leased_proto::v1::LossReason;

use crate::boot_instant::BootInstant;

/// The default margin is the TTL divided by this: 1 %. The margin covers clocks that do not run at
/// the same rate. A quartz clock is off by less than 0.02 %, and the clock of a virtual machine may
/// be worse for a while.
const MARGIN_SHARE: u32 = 100;
/// The smallest default margin. It covers timers that fire late and clocks that are read late.
const LEAST_MARGIN: Duration = Duration::from_millis(5);

/// Whether a holder may rely on its lease.
///
/// ```no_run
/// # fn example(lease: leased_client::Lease) {
/// use leased_client::State;
///
/// if lease.state().current() == State::Jeopardy {
///     println!("no daemon confirms the lease");
/// }
/// # }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum State {
    /// The deadline is ahead. Act on the key.
    Held,
    /// The deadline has passed without a confirmation by a daemon. Stop acting on the key. The
    /// lease may be lost. If no other holder has taken the key, the state may become
    /// [`State::Held`] again.
    Jeopardy,
    /// The lease is lost for good.
    Lost(Loss),
}

/// How a lease was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Loss {
    /// The lease is not held, and the store has no record of why.
    Gone,
    /// The lease lapsed, and another holder took the key.
    Displaced,
    /// The lease was released.
    Released,
    /// An operator revoked the lease.
    Revoked,
}

impl Loss {
    /// The name of the loss: `gone`, `displaced`, `released` or `revoked`.
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

    /// Returns the loss with this name, or [`Gone`](Self::Gone) if there is none.
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

/// A holder's belief in its lease: held until a deadline, which each confirmation moves ahead, or
/// lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Belief {
    pub(crate) deadline: BootInstant,
    pub(crate) lost: Option<Loss>,
}

impl Belief {
    pub(crate) fn new(deadline: BootInstant) -> Self {
        Self { deadline, lost: None }
    }

    /// The state at `now`.
    pub(crate) fn at(&self, now: BootInstant) -> State {
        match self.lost {
            Some(loss) => State::Lost(loss),
            None if now < self.deadline => State::Held,
            None => State::Jeopardy,
        }
    }

    /// Moves the deadline ahead after a daemon has confirmed the lease. Never moves it back.
    pub(crate) fn confirm(&mut self, deadline: BootInstant) {
        self.deadline = self.deadline.max(deadline);
    }

    /// Notes that the lease is lost. The first reason stays.
    pub(crate) fn lose(&mut self, loss: Loss) {
        self.lost.get_or_insert(loss);
    }
}

/// Returns until when a holder may rely on a lease. `remaining` is what a daemon answered to the
/// request that was sent at `sent_at`.
///
/// The deadline counts from before the request left and never from when the answer arrived, because
/// the answer may have travelled for any time (Gray and Cheriton, "Leases", SOSP 1989, section 2).
pub(crate) fn deadline(sent_at: BootInstant, remaining: Duration, margin: Duration) -> BootInstant {
    sent_at + remaining.saturating_sub(margin)
}

/// The default margin of a lease with this TTL.
pub(crate) fn margin(ttl: Duration) -> Duration {
    (ttl / MARGIN_SHARE).max(LEAST_MARGIN)
}

/// The largest margin of a lease with this TTL: half of it. A lease is touched every third of its
/// TTL, so with a larger margin a single late touch would put a healthy lease in jeopardy.
pub(crate) fn largest_margin(ttl: Duration) -> Duration {
    ttl / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn belief_ends_at_its_deadline_and_comes_back_with_a_confirmation() {
        let start = BootInstant::now();
        let mut belief = Belief::new(start + SECOND);
        assert_eq!(belief.at(start), State::Held);
        assert_eq!(belief.at(start + SECOND), State::Jeopardy);
        belief.confirm(start + 3 * SECOND);
        assert_eq!(belief.at(start + 2 * SECOND), State::Held);
    }

    #[test]
    fn an_old_confirmation_does_not_move_the_deadline_back() {
        let start = BootInstant::now();
        let mut belief = Belief::new(start + 2 * SECOND);
        belief.confirm(start + SECOND);
        assert_eq!(belief.deadline, start + 2 * SECOND);
    }

    #[test]
    fn a_lost_lease_stays_lost_for_its_first_reason() {
        let start = BootInstant::now();
        let mut belief = Belief::new(start + SECOND);
        belief.lose(Loss::Revoked);
        belief.lose(Loss::Displaced);
        belief.confirm(start + 9 * SECOND);
        assert_eq!(belief.at(start), State::Lost(Loss::Revoked));
    }

    #[test]
    fn even_the_shortest_lease_has_a_margin() {
        let start = BootInstant::now();
        assert_eq!(margin(Duration::from_millis(100)), Duration::from_millis(5));
        assert_eq!(margin(30 * SECOND), Duration::from_millis(300));
        assert_eq!(deadline(start, Duration::from_millis(3), Duration::from_millis(5)), start);
    }
}
