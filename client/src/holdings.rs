//! All leases of a client, and when each is due to be touched. Runs no task and sends nothing: the
//! keeper and the deadline task call it.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use leased_proto::v1::LeaseRef;
use tokio::sync::Notify;
use uuid::Uuid;

use crate::belief::State;
use crate::boot_instant::BootInstant;
use crate::holding::Holding;
use crate::lock::lock;

/// How often a lease is touched in one TTL. After a failed touch there is time for another before
/// the lease lapses.
const TOUCHES_PER_TTL: u32 = 3;
/// A lease that is due within a ninth of its TTL shares a message with leases that are due now. So
/// a client sends at most three messages in a third of the TTL for leases that it has held for a
/// while.
const EARLY_SHARE: u32 = 9;
/// How long a new lease waits for other new leases to name in the same message. Short, because a
/// daemon reports a loss only on a stream that has named the lease. A lease that is released within
/// this time is never named.
const NAMING_DELAY: Duration = Duration::from_millis(5);
/// The shortest time from any message to one that is sent for new leases. A client that acquires
/// all the time sends ten messages a second, of the fifty that a daemon accepts before it slows the
/// stream down.
const NAMING_INTERVAL: Duration = Duration::from_millis(100);
/// The most bytes of leases in one message, below the 512 KiB that every daemon accepts.
const MESSAGE_BYTES: usize = 500 * 1024;
/// The bytes that a lease takes up in a message beyond its key: the id, the tags and lengths of key
/// and id, and the tag and length of both together.
const LEASE_BYTES: usize = 48;

/// The leases of a client.
#[derive(Debug, Default)]
pub(crate) struct Holdings {
    inner: Mutex<Inner>,
    /// Notified when a lease is due before the keeper next wakes up.
    pub(crate) sooner_due: Notify,
    /// Notified when a deadline passes before the deadline task next wakes up.
    pub(crate) sooner_over: Notify,
    /// Notified when a lease is to be touched by a unary call.
    pub(crate) refused: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    entries: HashMap<Uuid, Entry>,
    /// When the keeper next wakes up; `None` for never.
    next_beat: Option<BootInstant>,
    /// When the deadline task next wakes up; `None` for never.
    next_check: Option<BootInstant>,
    /// When a message last named leases.
    named: Option<BootInstant>,
    /// Why there is no keepalive stream, if there is none.
    trouble: Option<String>,
}

#[derive(Debug)]
struct Entry {
    holding: Arc<Holding>,
    due: BootInstant,
    /// Whether a daemon refused to touch the lease on the stream. If so, the lease is touched by
    /// unary calls until the next stream opens.
    is_refused: bool,
}

/// Which leases a beat touches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    /// The leases that are due.
    Due,
    /// All leases, for a stream that has just been opened.
    All,
}

/// A beat: the leases that the keeper touches together.
#[derive(Debug, Default)]
pub(crate) struct Beat {
    /// The leases to name in each message.
    pub(crate) messages: Vec<Vec<LeaseRef>>,
    /// The shortest TTL of these leases, which says how urgent the answer is.
    pub(crate) shortest: Duration,
}

impl Holdings {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    /// Adds a lease. It is due once a message may name new leases, and no later than after a ninth
    /// of its TTL.
    pub(crate) fn insert(&self, holding: Arc<Holding>) {
        let mut inner = self.inner();
        let now = BootInstant::now();
        let soon =
            inner.named.map_or(now + NAMING_DELAY, |named| (named + NAMING_INTERVAL).max(now + NAMING_DELAY));
        let due = soon.min(now + holding.ttl / EARLY_SHARE);
        if inner.next_beat.is_none_or(|at| due < at) {
            self.sooner_due.notify_one();
        }
        if inner.next_check.is_none_or(|at| holding.deadline() < at) {
            self.sooner_over.notify_one();
        }
        inner.entries.insert(holding.id, Entry { holding, due, is_refused: false });
    }

    /// Removes a lease, which is then not touched any more.
    pub(crate) fn remove(&self, id: Uuid) {
        self.inner().entries.remove(&id);
    }

    pub(crate) fn find(&self, id: Uuid) -> Option<Arc<Holding>> {
        self.inner().entries.get(&id).map(|entry| Arc::clone(&entry.holding))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.inner().entries.is_empty()
    }

    /// When the next lease is to be touched on the stream. The keeper is expected to wake up then.
    pub(crate) fn next_due(&self) -> Option<BootInstant> {
        let mut inner = self.inner();
        let on_stream = inner.entries.values().filter(|entry| !entry.is_refused);
        inner.next_beat = on_stream.map(|entry| entry.due).min();
        inner.next_beat
    }

    /// Returns the leases to touch on the stream at `now`. The next touch of each is due a third of
    /// its TTL later or a little sooner, so that the messages of many clients do not synchronize.
    pub(crate) fn take_due(&self, now: BootInstant, scope: Scope) -> Beat {
        let all = scope == Scope::All;
        let jitter = jitter();
        let mut beat = Beat::default();
        let mut room = 0;
        let mut inner = self.inner();
        for Entry { holding, due, is_refused } in inner.entries.values_mut() {
            *is_refused &= !all;
            if *is_refused || (!all && *due > now + holding.ttl / EARLY_SHARE) {
                continue;
            }
            *due = now + (holding.ttl / TOUCHES_PER_TTL).mul_f64(jitter);
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
            beat.messages.last_mut().expect("a message has been pushed").push(holding.lease_ref());
        }
        if !beat.messages.is_empty() {
            inner.named = Some(now);
        }
        beat
    }

    /// Notes that a daemon refused to touch this lease on the stream. From now on the lease is
    /// touched by unary calls.
    pub(crate) fn refuse(&self, id: Uuid) {
        if let Some(entry) = self.inner().entries.get_mut(&id) {
            entry.is_refused = true;
            entry.due = BootInstant::now();
            self.refused.notify_one();
        }
    }

    /// When the next lease is to be touched by a unary call. Leases whose calls are `under_way` do
    /// not count.
    pub(crate) fn next_refused(&self, under_way: &HashSet<Uuid>) -> Option<BootInstant> {
        let inner = self.inner();
        let waiting = inner.entries.iter().filter(|(id, entry)| entry.is_refused && !under_way.contains(*id));
        waiting.map(|(_, entry)| entry.due).min()
    }

    /// Returns up to `most` leases to touch by unary calls at `now`, except those whose calls are
    /// `under_way`.
    pub(crate) fn take_refused(
        &self,
        now: BootInstant,
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
                entry.due = now + (entry.holding.ttl / TOUCHES_PER_TTL).mul_f64(jitter);
                Arc::clone(&entry.holding)
            })
            .collect()
    }

    /// Notes why there is no keepalive stream; `None` if there is one.
    pub(crate) fn note(&self, trouble: Option<String>) {
        self.inner().trouble = trouble;
    }

    /// Why there is no keepalive stream, if there is none.
    pub(crate) fn trouble(&self) -> Option<String> {
        self.inner().trouble.clone()
    }

    /// Reports the leases whose deadlines have passed, and returns the next deadline. The deadline
    /// task is expected to wake up then.
    pub(crate) fn check_deadlines(&self) -> Option<BootInstant> {
        let mut inner = self.inner();
        let now = BootInstant::now();
        let held = |entry: &&Entry| {
            entry.holding.check_deadline();
            entry.holding.state() == State::Held
        };
        let next = inner.entries.values().filter(held).map(|entry| entry.holding.deadline()).min();
        inner.next_check = next.filter(|next| *next > now);
        next
    }
}

/// A random factor between 7/8 and 1.
fn jitter() -> f64 {
    1.0 - fastrand::f64() / 8.0
}

/// Checks all leases whenever a deadline may have passed, for as long as the future is polled.
pub(crate) async fn watch_deadlines(holdings: &Holdings) {
    loop {
        let next = holdings.check_deadlines();
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
        let deadline = BootInstant::now() + ttl;
        let lease = (key.to_owned(), Uuid::new_v4());
        Arc::new(Holding::new(lease, FencingToken::new(1), (ttl, Duration::ZERO), deadline))
    }

    const TTL: Duration = Duration::from_secs(9);

    /// Lets `time` pass, and returns the number of messages sent meanwhile.
    async fn messages_in(holdings: &Holdings, time: Duration) -> usize {
        let end = BootInstant::now() + time;
        let mut messages = 0;
        while let Some(due) = holdings.next_due().filter(|due| *due <= end) {
            due.reached().await;
            messages += holdings.take_due(BootInstant::now(), Scope::Due).messages.len();
        }
        end.reached().await;
        messages
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_lease_is_named_at_once_and_many_that_come_together_in_one_message() {
        let holdings = Holdings::default();
        for ttl in [Duration::from_millis(100), TTL, Duration::from_secs(24 * 3600)] {
            tokio::time::advance(NAMING_INTERVAL).await;
            holdings.insert(lease(ttl, "key"));
            assert!(holdings.next_due().unwrap() - BootInstant::now() <= NAMING_DELAY);
            assert_eq!(messages_in(&holdings, NAMING_DELAY).await, 1);
        }
        tokio::time::advance(NAMING_INTERVAL).await;
        (0..100).for_each(|number| holdings.insert(lease(TTL, &format!("key/{number}"))));
        let messages = messages_in(&holdings, NAMING_DELAY).await;
        assert!(messages <= 1, "{messages} messages");
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_acquires_all_the_time_sends_ten_messages_a_second() {
        let holdings = Holdings::default();
        let mut messages = 0;
        for number in 0..1000 {
            holdings.insert(lease(TTL, &format!("key/{number}")));
            messages += messages_in(&holdings, Duration::from_millis(3)).await;
        }
        assert!((25..=31).contains(&messages), "{messages} messages in three seconds");
    }

    #[tokio::test(start_paused = true)]
    async fn a_refused_lease_is_off_the_stream_until_the_next_one_opens() {
        let holdings = Holdings::default();
        let (stays, refused) = (lease(TTL, "stays"), lease(TTL, "refused"));
        holdings.insert(Arc::clone(&stays));
        holdings.insert(Arc::clone(&refused));
        assert_eq!(holdings.take_due(BootInstant::now(), Scope::All).messages[0].len(), 2);
        holdings.refuse(refused.id);
        let named = |scope| holdings.take_due(BootInstant::now() + TTL, scope).messages.concat().len();
        assert_eq!(named(Scope::Due), 1);
        let none = HashSet::new();
        let alone = holdings.take_refused(BootInstant::now(), 9, &none);
        assert_eq!((alone.len(), alone[0].id), (1, refused.id));
        let next = holdings.next_refused(&none).unwrap() - BootInstant::now();
        assert!(next > TTL / 4 && next <= TTL / 3, "{next:?}");
        let under_way = HashSet::from([refused.id]);
        assert!(holdings.next_refused(&under_way).is_none());
        assert!(holdings.take_refused(BootInstant::now() + TTL, 9, &under_way).is_empty());
        assert_eq!(named(Scope::All), 2);
        assert!(holdings.next_refused(&none).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn leases_that_were_acquired_one_by_one_are_touched_together() {
        let holdings = Holdings::default();
        for number in 0..100 {
            holdings.insert(lease(TTL, &format!("key/{number}")));
            tokio::time::advance(Duration::from_millis(90)).await;
        }
        // Until all have been named once.
        let _ = messages_in(&holdings, TTL / 3).await;
        let start = BootInstant::now();
        let mut messages = 0;
        while BootInstant::now() < start + 10 * TTL {
            holdings.next_due().unwrap().reached().await;
            messages += holdings.take_due(BootInstant::now(), Scope::Due).messages.len();
        }
        assert!(messages <= 3 * 3 * 10 + 3, "{messages} messages in ten TTLs");
    }

    #[tokio::test(start_paused = true)]
    async fn no_lease_waits_longer_than_a_third_of_its_ttl_for_a_touch() {
        let holdings = Holdings::default();
        for ttl in [1, 2, 3, 5, 30] {
            holdings.insert(lease(Duration::from_secs(ttl), "key"));
        }
        let mut last = BootInstant::now();
        for _ in 0..200 {
            let due = holdings.next_due().unwrap();
            due.reached().await;
            let beat = holdings.take_due(BootInstant::now(), Scope::Due);
            assert!(!beat.messages.is_empty());
            assert!(BootInstant::now() - last <= Duration::from_millis(335));
            last = BootInstant::now();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn messages_stay_below_what_a_daemon_accepts() {
        let holdings = Holdings::default();
        for number in 0..10_000 {
            holdings.insert(lease(TTL, &format!("{number:0>512}")));
        }
        let beat = holdings.take_due(BootInstant::now(), Scope::All);
        assert_eq!(beat.messages.iter().map(Vec::len).sum::<usize>(), 10_000);
        for leases in beat.messages {
            let message = leased_proto::v1::KeepAliveRequest { leases, sequence: u64::MAX };
            assert!(prost::Message::encoded_len(&message) <= 512 * 1024);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_deadline_that_passes_is_reported() {
        let holdings = Arc::new(Holdings::default());
        let watching = tokio::spawn({
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
        watching.abort();
    }
}
