//! One lease that a client holds: what its guard, the keeper and the watchman share.

use std::mem::replace;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use leased_proto::v1::LeaseRef;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::belief::{Belief, Loss, State};
use crate::moment::Moment;
use crate::token::FencingToken;

/// A lease as it was granted, and what may be believed of it since.
#[derive(Debug)]
pub(crate) struct Holding {
    pub(crate) key: Box<str>,
    pub(crate) id: Uuid,
    pub(crate) token: FencingToken,
    pub(crate) ttl: Duration,
    pub(crate) margin: Duration,
    told: Mutex<Told>,
    /// Rings when the state is another one. A `watch` channel would take up more than everything else here.
    changed: Notify,
    /// Made when it is asked for.
    stop: OnceLock<CancellationToken>,
}

/// A belief, and the state that was last told of it.
#[derive(Debug)]
struct Told {
    belief: Belief,
    state: State,
    /// Why the last touch confirmed nothing, if it was refused.
    trouble: Option<Box<str>>,
}

impl Holding {
    /// A lease that may be believed in until `deadline`.
    pub(crate) fn new(
        (key, id): (String, Uuid),
        token: FencingToken,
        (ttl, margin): (Duration, Duration),
        deadline: Moment,
    ) -> Self {
        let told = Told { belief: Belief::new(deadline), state: State::Held, trouble: None };
        let (told, changed, stop) = (Mutex::new(told), Notify::new(), OnceLock::new());
        Self { key: key.into_boxed_str(), id, token, ttl, margin, told, changed, stop }
    }

    pub(crate) fn lease_ref(&self) -> LeaseRef {
        LeaseRef { key: self.key.to_string(), lease_id: self.id.to_string() }
    }

    /// How things stand by the clock, whether or not anybody was told.
    pub(crate) fn state(&self) -> State {
        self.told().belief.at(Moment::now())
    }

    pub(crate) fn deadline(&self) -> Moment {
        self.told().belief.deadline
    }

    /// A daemon has confirmed the lease.
    pub(crate) fn confirm(&self, deadline: Moment) {
        self.update(|told| {
            told.belief.confirm(deadline);
            told.trouble = None;
        });
    }

    /// A daemon has refused to touch the lease, for this reason. Belief goes on until its deadline.
    pub(crate) fn refuse(&self, why: &str) {
        self.told().trouble = Some(why.into());
    }

    /// Why the last touch confirmed nothing, if it was refused.
    pub(crate) fn trouble(&self) -> Option<String> {
        self.told().trouble.as_deref().map(str::to_owned)
    }

    /// It is gone.
    pub(crate) fn lose(&self, loss: Loss) {
        self.update(|told| told.belief.lose(loss));
    }

    /// Tells if time alone has changed how things stand.
    pub(crate) fn look(&self) {
        self.update(|_| {});
    }

    fn update(&self, change: impl FnOnce(&mut Told)) {
        let mut told = self.told();
        change(&mut told);
        let state = told.belief.at(Moment::now());
        let before = replace(&mut told.state, state);
        drop(told);
        if state != before {
            self.changed.notify_waiters();
        }
        if let Some(stop) = self.stop.get().filter(|_| state != State::Held) {
            stop.cancel();
        }
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a state other than `seen`; a deadline that moves makes none.
    pub(crate) async fn changed(&self, seen: State) -> State {
        loop {
            // From here on no change is missed.
            let changed = self.changed.notified();
            let state = self.state();
            if state != seen {
                return state;
            }
            changed.await;
        }
    }

    /// Cancelled when the lease is not held any more, for however short a time.
    pub(crate) fn stop(&self) -> CancellationToken {
        let stop = self.stop.get_or_init(CancellationToken::new);
        self.look();
        stop.clone()
    }
}
