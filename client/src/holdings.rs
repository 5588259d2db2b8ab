//! All leases that a client holds, and when each is to be touched. No task and no network: the keeper and the watchman ask.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use leased_proto::v1::LeaseRef;
use tokio::sync::Notify;
use uuid::Uuid;

use crate::belief::State;
use crate::holding::Holding;
use crate::moment::Moment;

/// A lease is touched when a third of its TTL has passed: two more touches may fail before it is over.
const BEATS: u32 = 3;
/// Whoever is due within a ninth of its TTL goes along, so that a client sends at most three messages in a third. A new lease
/// is named after a ninth, for a daemon tells of losses only to a stream that has named the lease.
const ALONG: u32 = 9;
/// The bytes of the leases named in one message, below what a daemon takes (512 KiB).
const MESSAGE_BYTES: usize = 480 * 1024;
/// What a lease takes up in a message beyond its key: the id, two tags and lengths, the tag and length of the whole.
const LEASE_BYTES: usize = 48;

#[derive(Debug, Default)]
pub(crate) struct Holdings {
    inner: Mutex<Inner>,
    /// A lease is to be touched before the keeper meant to look.
    pub(crate) sooner_due: Notify,
    /// A lease runs out before the watchman meant to look.
    pub(crate) sooner_over: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    entries: HashMap<Uuid, Entry>,
    /// When the keeper looks next; `None` for never.
    keeper: Option<Moment>,
    /// When the watchman looks next.
    watchman: Option<Moment>,
}

#[derive(Debug)]
struct Entry {
    holding: Arc<Holding>,
    due: Moment,
}

/// Leases to be touched together.
#[derive(Debug, Default)]
pub(crate) struct Beat {
    /// What to name, a message each.
    pub(crate) messages: Vec<Vec<LeaseRef>>,
    /// The shortest TTL among them: how urgent the answer is.
    pub(crate) shortest: Duration,
}

impl Holdings {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn insert(&self, holding: Arc<Holding>) {
        let mut inner = self.inner();
        let due = Moment::now() + holding.ttl / ALONG;
        if inner.keeper.is_none_or(|at| due < at) {
            self.sooner_due.notify_one();
        }
        if inner.watchman.is_none_or(|at| holding.deadline() < at) {
            self.sooner_over.notify_one();
        }
        inner.entries.insert(holding.id, Entry { holding, due });
    }

    /// Touches it no more.
    pub(crate) fn remove(&self, id: Uuid) {
        self.inner().entries.remove(&id);
    }

    pub(crate) fn find(&self, id: Uuid) -> Option<Arc<Holding>> {
        self.inner().entries.get(&id).map(|entry| Arc::clone(&entry.holding))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.inner().entries.is_empty()
    }

    /// When the next lease is to be touched, which is when the keeper looks again.
    pub(crate) fn next_due(&self) -> Option<Moment> {
        let mut inner = self.inner();
        inner.keeper = inner.entries.values().map(|entry| entry.due).min();
        inner.keeper
    }

    /// Those that are to be touched at `now`, or all of them. The next touch of each is due a third of its TTL later, or a
    /// little sooner, so that many clients do not fall into step.
    pub(crate) fn take_due(&self, now: Moment, all: bool) -> Beat {
        let jitter = 1.0 - fastrand::f64() / 8.0;
        let mut beat = Beat::default();
        let mut room = 0;
        for Entry { holding, due } in self.inner().entries.values_mut() {
            if !all && *due > now + holding.ttl / ALONG {
                continue;
            }
            *due = now + (holding.ttl / BEATS).mul_f64(jitter);
            beat.shortest = match beat.messages.is_empty() {
                true => holding.ttl,
                false => beat.shortest.min(holding.ttl),
            };
            let size = holding.key.len() + LEASE_BYTES;
            if size > room {
                beat.messages.push(Vec::new());
                room = MESSAGE_BYTES;
            }
            room -= size;
            beat.messages.last_mut().expect("there is one").push(holding.lease_ref());
        }
        beat
    }

    /// Tells those whose time is over, and returns when the next one's will be, which is when the watchman looks again.
    pub(crate) fn look(&self) -> Option<Moment> {
        let mut inner = self.inner();
        let now = Moment::now();
        let held = |entry: &&Entry| {
            entry.holding.look();
            entry.holding.state() == State::Held
        };
        let next = inner.entries.values().filter(held).map(|entry| entry.holding.deadline()).min();
        inner.watchman = next.filter(|next| *next > now);
        next
    }
}

/// Looks at all leases whenever one may have run out, for as long as it is polled.
pub(crate) async fn watch_deadlines(holdings: &Holdings) {
    loop {
        let next = holdings.look();
        tokio::select! {
            () = async { match next {
                Some(deadline) => deadline.reached().await,
                None => std::future::pending().await,
            }} => {}
            () = holdings.sooner_over.notified() => {}
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test that meets an unexpected failure should stop there")]
mod tests {
    use super::*;
    use crate::token::FencingToken;

    fn lease(ttl: Duration, key: &str) -> Arc<Holding> {
        let deadline = Moment::now() + ttl;
        let lease = (key.to_owned(), Uuid::new_v4());
        Arc::new(Holding::new(lease, FencingToken::new(1), (ttl, Duration::ZERO), deadline))
    }

    const TTL: Duration = Duration::from_secs(9);

    #[tokio::test(start_paused = true)]
    async fn leases_that_came_one_by_one_are_touched_together() {
        let holdings = Holdings::default();
        for number in 0..100 {
            holdings.insert(lease(TTL, &format!("key/{number}")));
            tokio::time::advance(Duration::from_millis(90)).await;
        }
        let start = Moment::now();
        let mut messages = 0;
        while Moment::now() < start + 10 * TTL {
            holdings.next_due().unwrap().reached().await;
            messages += holdings.take_due(Moment::now(), false).messages.len();
        }
        assert!(messages <= 3 * 3 * 10 + 3, "{messages} messages in ten TTLs");
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_longer_than_a_third_of_its_ttl() {
        let holdings = Holdings::default();
        for ttl in [1, 2, 3, 5, 30] {
            holdings.insert(lease(Duration::from_secs(ttl), "key"));
        }
        let mut last = Moment::now();
        for _ in 0..200 {
            let due = holdings.next_due().unwrap();
            due.reached().await;
            let beat = holdings.take_due(Moment::now(), false);
            assert!(!beat.messages.is_empty());
            assert!(Moment::now() - last <= Duration::from_millis(335));
            last = Moment::now();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn messages_stay_below_what_a_daemon_takes() {
        let holdings = Holdings::default();
        for number in 0..10_000 {
            holdings.insert(lease(TTL, &format!("{number:0>512}")));
        }
        let beat = holdings.take_due(Moment::now(), true);
        assert_eq!(beat.messages.iter().map(Vec::len).sum::<usize>(), 10_000);
        for leases in beat.messages {
            let message = leased_proto::v1::KeepAliveRequest { leases, sequence: u64::MAX };
            assert!(prost::Message::encoded_len(&message) <= 512 * 1024);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_deadline_that_passes_is_told() {
        let holdings = Arc::new(Holdings::default());
        let watchman = tokio::spawn({
            let holdings = Arc::clone(&holdings);
            async move { watch_deadlines(&holdings).await }
        });
        tokio::task::yield_now().await;
        let (long, short) = (lease(TTL, "long"), lease(TTL / 3, "short"));
        holdings.insert(Arc::clone(&long));
        holdings.insert(Arc::clone(&short));
        let stop = short.stop();
        stop.cancelled().await;
        assert_eq!((short.state(), long.state()), (State::Jeopardy, State::Held));
        watchman.abort();
    }
}
