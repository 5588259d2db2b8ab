//! All leases that a client holds, and when each is to be touched. No task and no network: the keeper and the watchman ask.

use std::collections::{HashMap, HashSet};
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
/// Leases that are due within a ninth of their TTL go along, so a client sends at most three messages in a third for leases that
/// it has held for a while.
const ALONG: u32 = 9;
/// How long a new lease waits for others to be named with. A daemon tells of losses only to a stream that has named the lease,
/// so this is short; leases that are given back within it are never named.
const NAMING: Duration = Duration::from_millis(5);
/// How long after a message the next one names new leases. Somebody who acquires all the time sends ten messages a second, of
/// the fifty that a daemon takes without slowing the stream down.
const BETWEEN: Duration = Duration::from_millis(100);
/// The bytes of the leases named in one message, below the 512 KiB that every daemon takes.
const MESSAGE_BYTES: usize = 500 * 1024;
/// What a lease takes up in a message beyond its key: the id, two tags and lengths, the tag and length of the whole.
const LEASE_BYTES: usize = 48;

#[derive(Debug, Default)]
pub(crate) struct Holdings {
    inner: Mutex<Inner>,
    /// A lease is to be touched before the keeper meant to look.
    pub(crate) sooner_due: Notify,
    /// A lease runs out before the watchman meant to look.
    pub(crate) sooner_over: Notify,
    /// A lease is to be touched by a call of its own.
    pub(crate) refused: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    entries: HashMap<Uuid, Entry>,
    /// When the keeper looks next; `None` for never.
    keeper: Option<Moment>,
    /// When the watchman looks next.
    watchman: Option<Moment>,
    /// When leases were last named.
    named: Option<Moment>,
    /// Why there is no keepalive stream, if there is none.
    trouble: Option<String>,
}

#[derive(Debug)]
struct Entry {
    holding: Arc<Holding>,
    due: Moment,
    /// A daemon refused to touch the lease on the stream, so it is touched by calls of its own until the next stream opens.
    is_refused: bool,
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
        let now = Moment::now();
        let soon = inner.named.map_or(now + NAMING, |named| (named + BETWEEN).max(now + NAMING));
        let due = soon.min(now + holding.ttl / ALONG);
        if inner.keeper.is_none_or(|at| due < at) {
            self.sooner_due.notify_one();
        }
        if inner.watchman.is_none_or(|at| holding.deadline() < at) {
            self.sooner_over.notify_one();
        }
        inner.entries.insert(holding.id, Entry { holding, due, is_refused: false });
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
        let on_stream = inner.entries.values().filter(|entry| !entry.is_refused);
        inner.keeper = on_stream.map(|entry| entry.due).min();
        inner.keeper
    }

    /// Those that are to be touched on the stream at `now`; or all leases, for a stream that has just been opened. The next touch
    /// of each is due a third of its TTL later, or a little sooner, so that many clients do not fall into step.
    pub(crate) fn take_due(&self, now: Moment, all: bool) -> Beat {
        let jitter = jitter();
        let mut beat = Beat::default();
        let mut room = 0;
        let mut inner = self.inner();
        for Entry { holding, due, is_refused } in inner.entries.values_mut() {
            *is_refused &= !all;
            if *is_refused || (!all && *due > now + holding.ttl / ALONG) {
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
        if !beat.messages.is_empty() {
            inner.named = Some(now);
        }
        beat
    }

    /// A daemon refused to touch this lease on the stream: from now on it is touched by calls of its own.
    pub(crate) fn refuse(&self, id: Uuid) {
        if let Some(entry) = self.inner().entries.get_mut(&id) {
            entry.is_refused = true;
            entry.due = Moment::now();
            self.refused.notify_one();
        }
    }

    /// When the next lease is to be touched by a call of its own, leaving out those `under_way`.
    pub(crate) fn next_refused(&self, under_way: &HashSet<Uuid>) -> Option<Moment> {
        let inner = self.inner();
        let waiting = inner.entries.iter().filter(|(id, entry)| entry.is_refused && !under_way.contains(*id));
        waiting.map(|(_, entry)| entry.due).min()
    }

    /// Up to `most` leases that are to be touched by calls of their own at `now`, leaving out those `under_way`.
    pub(crate) fn take_refused(
        &self,
        now: Moment,
        most: usize,
        under_way: &HashSet<Uuid>,
    ) -> Vec<Arc<Holding>> {
        let jitter = jitter();
        let mut inner = self.inner();
        let due = inner
            .entries
            .iter_mut()
            .filter(|(id, entry)| entry.is_refused && entry.due <= now && !under_way.contains(*id));
        due.take(most)
            .map(|(_, entry)| {
                entry.due = now + (entry.holding.ttl / BEATS).mul_f64(jitter);
                Arc::clone(&entry.holding)
            })
            .collect()
    }

    /// Notes why there is no keepalive stream, or that there is one.
    pub(crate) fn note(&self, trouble: Option<String>) {
        self.inner().trouble = trouble;
    }

    /// Why there is no keepalive stream, if there is none.
    pub(crate) fn trouble(&self) -> Option<String> {
        self.inner().trouble.clone()
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

/// Something between seven eighths and one.
fn jitter() -> f64 {
    1.0 - fastrand::f64() / 8.0
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

    /// Lets time pass, and counts the messages sent meanwhile.
    async fn messages_in(holdings: &Holdings, time: Duration) -> usize {
        let end = Moment::now() + time;
        let mut messages = 0;
        while let Some(due) = holdings.next_due().filter(|due| *due <= end) {
            due.reached().await;
            messages += holdings.take_due(Moment::now(), false).messages.len();
        }
        end.reached().await;
        messages
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_lease_is_named_at_once_and_many_that_come_together_in_one_message() {
        let holdings = Holdings::default();
        for ttl in [Duration::from_millis(100), TTL, Duration::from_secs(24 * 3600)] {
            tokio::time::advance(BETWEEN).await;
            holdings.insert(lease(ttl, "key"));
            assert!(holdings.next_due().unwrap() - Moment::now() <= NAMING);
            assert_eq!(messages_in(&holdings, NAMING).await, 1);
        }
        tokio::time::advance(BETWEEN).await;
        (0..100).for_each(|number| holdings.insert(lease(TTL, &format!("key/{number}"))));
        let messages = messages_in(&holdings, NAMING).await;
        assert!(messages <= 1, "{messages} messages");
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_acquires_all_the_time_sends_ten_messages_a_second() {
        let holdings = Holdings::default();
        let mut messages = 0;
        for number in 0..1000 {
            holdings.insert(lease(TTL, &format!("key/{number}")));
            messages += messages_in(&holdings, Duration::from_millis(3)).await;
        }
        assert!((25..=31).contains(&messages), "{messages} messages in three seconds");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_refused_is_off_the_stream_until_the_next_one_opens() {
        let holdings = Holdings::default();
        let (stays, refused) = (lease(TTL, "stays"), lease(TTL, "refused"));
        holdings.insert(Arc::clone(&stays));
        holdings.insert(Arc::clone(&refused));
        assert_eq!(holdings.take_due(Moment::now(), true).messages[0].len(), 2);
        holdings.refuse(refused.id);
        let named = |all| holdings.take_due(Moment::now() + TTL, all).messages.concat().len();
        assert_eq!(named(false), 1);
        let none = HashSet::new();
        let alone = holdings.take_refused(Moment::now(), 9, &none);
        assert_eq!((alone.len(), alone[0].id), (1, refused.id));
        let next = holdings.next_refused(&none).unwrap() - Moment::now();
        assert!(next > TTL / 4 && next <= TTL / 3, "{next:?}");
        let under_way = HashSet::from([refused.id]);
        assert!(holdings.next_refused(&under_way).is_none());
        assert!(holdings.take_refused(Moment::now() + TTL, 9, &under_way).is_empty());
        assert_eq!(named(true), 2);
        assert!(holdings.next_refused(&none).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn leases_that_came_one_by_one_are_touched_together() {
        let holdings = Holdings::default();
        for number in 0..100 {
            holdings.insert(lease(TTL, &format!("key/{number}")));
            tokio::time::advance(Duration::from_millis(90)).await;
        }
        // All are named once.
        let _ = messages_in(&holdings, TTL / 3).await;
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
