//! One lease that a client holds: what its guard, the keeper and the watchman share.

use std::mem::replace;
use std::sync::OnceLock;
use std::time::Duration;

use leased_proto::v1::LeaseRef;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::belief::{Belief, Loss, State};
use crate::moment::Moment;
use crate::token::FencingToken;

/// A lease as it was granted, and what may be believed of it since.
#[derive(Debug)]
pub(crate) struct Holding {
    pub(crate) key: String,
    pub(crate) id: Uuid,
    pub(crate) token: FencingToken,
    pub(crate) ttl: Duration,
    pub(crate) margin: Duration,
    told: watch::Sender<Told>,
    /// Made when it is asked for.
    stop: OnceLock<CancellationToken>,
}

/// A belief, and the state that was last told of it.
#[derive(Debug)]
pub(crate) struct Told {
    belief: Belief,
    state: State,
}

impl Holding {
    /// A lease that may be believed in until `deadline`.
    pub(crate) fn new(
        (key, id): (String, Uuid),
        token: FencingToken,
        (ttl, margin): (Duration, Duration),
        deadline: Moment,
    ) -> Self {
        let told = Told { belief: Belief::new(deadline), state: State::Held };
        Self { key, id, token, ttl, margin, told: watch::Sender::new(told), stop: OnceLock::new() }
    }

    pub(crate) fn lease_ref(&self) -> LeaseRef {
        LeaseRef { key: self.key.clone(), lease_id: self.id.to_string() }
    }

    /// How things stand by the clock, whether or not anybody was told.
    pub(crate) fn state(&self) -> State {
        self.told.borrow().belief.at(Moment::now())
    }

    pub(crate) fn deadline(&self) -> Moment {
        self.told.borrow().belief.deadline
    }

    /// A daemon has confirmed it.
    pub(crate) fn confirm(&self, deadline: Moment) {
        self.update(|belief| belief.confirm(deadline));
    }

    /// It is gone.
    pub(crate) fn lose(&self, loss: Loss) {
        self.update(|belief| belief.lose(loss));
    }

    /// Tells if time alone has changed how things stand.
    pub(crate) fn look(&self) {
        self.update(|_| {});
    }

    fn update(&self, change: impl FnOnce(&mut Belief)) {
        let mut is_held = true;
        self.told.send_if_modified(|told| {
            change(&mut told.belief);
            let state = told.belief.at(Moment::now());
            is_held = state == State::Held;
            replace(&mut told.state, state) != state
        });
        if let Some(stop) = self.stop.get().filter(|_| !is_held) {
            stop.cancel();
        }
    }

    /// Hears of changes of state; a deadline that moves is none.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Told> {
        self.told.subscribe()
    }

    /// Cancelled when the lease is not held any more, for however short a time.
    pub(crate) fn stop(&self) -> CancellationToken {
        let stop = self.stop.get_or_init(CancellationToken::new);
        self.look();
        stop.clone()
    }
}
