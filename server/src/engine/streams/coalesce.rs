//! Coalescing: a touch is answered without a write while the latest written touch of its lease is
//! young.

use std::borrow::Borrow;
use std::time::Duration;

use super::LeaseSet;
use crate::boot_instant::BootInstant;
use crate::engine::metrics::Tally;
use crate::lease::{Holder, LeaseName, Snapshot};

/// A touch is coalesced while the latest written one is younger than the TTL divided by this.
const COALESCE_DIVISOR: u32 = 10;

/// The latest touch of a lease that was written.
#[derive(Debug, Clone, Copy)]
pub(super) struct Renewal {
    /// When its commit was sent. An answer takes time, so counting from the answer would make the
    /// touch look younger than it is. On the boot clock, because the lease also runs out while the
    /// machine is suspended.
    sent_at: BootInstant,
    /// How long the lease lasted as of the commit.
    remaining: Duration,
    coalesce_for: Duration,
}

impl Renewal {
    pub(super) fn new(snapshot: &Snapshot, holder: &Holder, sent_at: BootInstant) -> Self {
        let coalesce_for = holder.ttl.get() / COALESCE_DIVISOR;
        Self { sent_at, remaining: snapshot.remaining(holder), coalesce_for }
    }

    /// How long the lease lasts from `now` on, at least.
    pub(super) fn remaining(&self, now: BootInstant) -> Duration {
        self.remaining.saturating_sub(now - self.sent_at)
    }

    /// Like [`Self::remaining`] if a touch at `now` can be coalesced, or else `None`.
    pub(super) fn coalesce(&self, now: BootInstant) -> Option<Duration> {
        // The store's clock may have been set, so a lease whose touch is young may have no time
        // left.
        let is_young = now - self.sent_at < self.coalesce_for;
        Some(self.remaining(now)).filter(|remaining| is_young && !remaining.is_zero())
    }

    /// Makes the next touch a written one. Touches that were coalesced before are still answered
    /// with the time that is left.
    pub(super) fn stop_coalescing(&mut self) {
        self.coalesce_for = Duration::ZERO;
    }
}

impl LeaseSet {
    /// Answers a message at once if all of its touches can be coalesced. Returns how long each
    /// lease lasts, in the order of `names`. `None` in `names` is a lease that must be refused, and
    /// ends the attempt.
    ///
    /// Reads the state of each lease once, so no loss can come in between, and no message has to be
    /// settled.
    pub(crate) fn coalesce<N: Borrow<LeaseName>>(
        &self,
        names: impl Iterator<Item = Option<N>>,
    ) -> Option<Vec<Duration>> {
        let now = BootInstant::now();
        let remaining = names.map(|name| self.get(name?.borrow())?.coalesce(now));
        let remaining = remaining.collect::<Option<Vec<_>>>()?;
        self.metrics().add(&Tally::coalesced(remaining.len()));
        Some(remaining)
    }
}
