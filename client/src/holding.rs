//! One lease that a client holds, shared by its guard, the keeper and the task that watches
//! deadlines.

use std::mem::replace;
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use leased_proto::v1::LeaseRef;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::belief::{Belief, Loss, State};
use crate::boot_instant::BootInstant;
use crate::lock::lock;
use crate::token::FencingToken;

/// A lease as it was granted, and the holder's current belief in it.
#[derive(Debug)]
pub(crate) struct Holding {
    pub(crate) key: Box<str>,
    pub(crate) id: Uuid,
    pub(crate) token: FencingToken,
    pub(crate) ttl: Duration,
    pub(crate) margin: Duration,
    inner: Mutex<Inner>,
    /// Notified when the state changes. A `watch` channel would take up more memory than all other
    /// fields together.
    changed: Notify,
    /// Made at the first call of [`stop`](Self::stop).
    stop: OnceLock<CancellationToken>,
}

#[derive(Debug)]
struct Inner {
    belief: Belief,
    /// The state that was last reported.
    state: State,
    /// Why the last touch was refused, if it was.
    trouble: Option<Box<str>>,
}

impl Holding {
    /// A lease that its holder may rely on until `deadline`.
    pub(crate) fn new(
        (key, id): (String, Uuid),
        token: FencingToken,
        (ttl, margin): (Duration, Duration),
        deadline: BootInstant,
    ) -> Self {
        let inner = Inner { belief: Belief::new(deadline), state: State::Held, trouble: None };
        let (inner, changed, stop) = (Mutex::new(inner), Notify::new(), OnceLock::new());
        Self { key: key.into_boxed_str(), id, token, ttl, margin, inner, changed, stop }
    }

    pub(crate) fn lease_ref(&self) -> LeaseRef {
        LeaseRef { key: self.key.to_string(), lease_id: self.id.to_string() }
    }

    /// The state at this instant, whether or not it has been reported.
    pub(crate) fn state(&self) -> State {
        self.inner().belief.at(BootInstant::now())
    }

    pub(crate) fn deadline(&self) -> BootInstant {
        self.inner().belief.deadline
    }

    /// Notes that a daemon has confirmed the lease, which may be relied on until `deadline`.
    pub(crate) fn confirm(&self, deadline: BootInstant) {
        self.update(|inner| {
            inner.belief.confirm(deadline);
            inner.trouble = None;
        });
    }

    /// Notes why a daemon has refused to touch the lease. The deadline stays as it is.
    pub(crate) fn refuse(&self, why: &str) {
        self.inner().trouble = Some(why.into());
    }

    /// Why the last touch was refused, if it was.
    pub(crate) fn trouble(&self) -> Option<String> {
        self.inner().trouble.as_deref().map(str::to_owned)
    }

    /// Notes that the lease is lost.
    pub(crate) fn lose(&self, loss: Loss) {
        self.update(|inner| inner.belief.lose(loss));
    }

    /// Reports the state if the deadline has passed since the last report.
    pub(crate) fn check_deadline(&self) {
        self.update(|_| {});
    }

    /// Applies `change`, and reports the state if it differs from the last report.
    fn update(&self, change: impl FnOnce(&mut Inner)) {
        let mut inner = self.inner();
        change(&mut inner);
        let state = inner.belief.at(BootInstant::now());
        let before = replace(&mut inner.state, state);
        drop(inner);
        if state != before {
            self.changed.notify_waiters();
        }
        if let Some(stop) = self.stop.get().filter(|_| state != State::Held) {
            stop.cancel();
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    /// Waits for a state other than `seen`. A deadline that moves is no change of state.
    pub(crate) async fn changed(&self, seen: State) -> State {
        loop {
            // Made before the state is read, so that no change is missed.
            let changed = self.changed.notified();
            let state = self.state();
            if state != seen {
                return state;
            }
            changed.await;
        }
    }

    /// Returns a token that is cancelled as soon as the lease is not held, even for a short time.
    pub(crate) fn stop(&self) -> CancellationToken {
        let stop = self.stop.get_or_init(CancellationToken::new);
        // The lease may have ceased to be held before the token was made.
        self.check_deadline();
        stop.clone()
    }
}
