//! One daemon: the connections to it, its store, and whether it is barred.
//!
//! A call that waits in a queue occupies a stream of its connection for as long as it waits, and a
//! daemon serves no more than 256 streams on a connection. So waiting calls use separate
//! connections, and never block a touch.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::time::Instant;
use tonic::transport::Channel;

use crate::error::Error;
use crate::lock::lock;

/// The most calls in flight on one connection, below the 256 that a daemon serves. Further calls
/// use another connection.
const CALLS: usize = 200;
/// How long an unused connection stays open.
pub(crate) const IDLE: Duration = Duration::from_secs(10);
/// How long a barred daemon is not used while other daemons can be used.
const BARRED: Duration = Duration::from_secs(30);

/// Makes a channel, which connects when it is first used.
pub(crate) type Dial = Arc<dyn Fn() -> Channel + Send + Sync>;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// The keepalive stream, touches and releases, which leases depend on. Also probes.
    KeepAlive,
    /// Calls that are answered soon, and watches.
    Calls,
    /// Acquires that wait in a queue.
    Waits,
}

/// A daemon: one address of an endpoint.
pub(crate) struct Daemon {
    /// The name in errors and logs.
    pub(crate) name: String,
    /// Orders the daemons of a client: the lowest is used first. The second part is random, so that
    /// clients spread over all daemons.
    pub(crate) order: (usize, u64),
    dial: Dial,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// The connections for each [`Purpose`].
    connections: [Vec<Connection>; 3],
    /// How many connections were ever made.
    made: u64,
    /// Whether the daemon has answered since its last failure.
    has_answered: bool,
    /// The store that the daemon named last. A daemon of an earlier version names none.
    store: Option<String>,
    /// Until when the daemon is barred, and why.
    barred: Option<(Instant, Error)>,
}

struct Connection {
    number: u64,
    channel: Channel,
    uses: usize,
    idle_since: Instant,
}

/// The right to send one call over a connection. The connection counts the slot until the slot is
/// dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) daemon: Arc<Daemon>,
    pub(crate) channel: Channel,
    purpose: Purpose,
    number: u64,
}

impl Daemon {
    /// Daemons with a lower `rank` are used first; chance decides within a rank.
    pub(crate) fn new(name: String, rank: usize, dial: Dial) -> Self {
        Self { name, order: (rank, fastrand::u64(..)), dial, inner: Mutex::default() }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    /// Takes a slot on a connection with room for one more call, and makes a connection if there is
    /// none.
    pub(crate) fn slot(self: &Arc<Self>, purpose: Purpose) -> Slot {
        if let Some(slot) = self.free(&mut self.inner(), purpose) {
            return slot;
        }
        // Outside of the lock, because this may be the user's code, which may take any time.
        let channel = (self.dial)();
        let mut inner = self.inner();
        // Another task may have made a connection meanwhile.
        if let Some(slot) = self.free(&mut inner, purpose) {
            return slot;
        }
        inner.made += 1;
        let number = inner.made;
        let connection = Connection { number, channel: channel.clone(), uses: 1, idle_since: Instant::now() };
        inner.connections[purpose as usize].push(connection);
        Slot { daemon: Arc::clone(self), channel, purpose, number }
    }

    /// Takes a slot on an existing connection with room for one more call.
    fn free(self: &Arc<Self>, inner: &mut Inner, purpose: Purpose) -> Option<Slot> {
        // The first connection with room, so that the last ones become idle and close.
        let connection =
            inner.connections[purpose as usize].iter_mut().find(|connection| connection.uses < CALLS)?;
        connection.uses += 1;
        let (channel, number) = (connection.channel.clone(), connection.number);
        Some(Slot { daemon: Arc::clone(self), channel, purpose, number })
    }

    /// Closes connections that have been idle for [`IDLE`]. If `is_first`, the daemon is the one in
    /// use, which keeps one connection for keepalives and one for calls.
    pub(crate) fn close_idle(&self, now: Instant, is_first: bool) {
        let mut inner = self.inner();
        for purpose in [Purpose::KeepAlive, Purpose::Calls, Purpose::Waits] {
            let mut kept = usize::from(is_first && purpose != Purpose::Waits);
            inner.connections[purpose as usize].retain(|connection| {
                let is_kept = std::mem::replace(&mut kept, 0) == 1;
                is_kept || connection.uses > 0 || now.saturating_duration_since(connection.idle_since) < IDLE
            });
        }
    }

    /// Notes the store that the daemon names in an answer, and returns whether this store is a
    /// different one than before.
    pub(crate) fn note_store(&self, store: Option<&str>) -> bool {
        let mut inner = self.inner();
        inner.has_answered = true;
        let is_news = store.is_some() && inner.store.as_deref() != store;
        if is_news {
            inner.store = store.map(str::to_owned);
        }
        is_news
    }

    /// Forgets that the daemon has answered, so that it is probed before its next call. A daemon
    /// over another store may answer at this address by then.
    pub(crate) fn forget(&self) {
        self.inner().has_answered = false;
    }

    pub(crate) fn has_answered(&self) -> bool {
        self.inner().has_answered
    }

    pub(crate) fn store(&self) -> Option<String> {
        self.inner().store.clone()
    }

    /// Bars the daemon from use for [`BARRED`], because of `error`.
    pub(crate) fn bar(&self, error: Error) {
        self.inner().barred = Some((Instant::now() + BARRED, error));
    }

    /// Lets the daemon be used again.
    pub(crate) fn unbar(&self) {
        self.inner().barred = None;
    }

    /// Why the daemon is barred, if it is.
    pub(crate) fn barred(&self) -> Option<Error> {
        let barred = &self.inner().barred;
        barred.as_ref().filter(|(until, _)| *until > Instant::now()).map(|(_, error)| error.clone())
    }

    #[cfg(test)]
    pub(crate) fn count(&self, purpose: Purpose) -> usize {
        self.inner().connections[purpose as usize].len()
    }
}

impl Slot {
    /// Retires the connection. The next call makes another, and calls in flight on the retired one
    /// continue.
    ///
    /// tonic reconnects on its own when a connection breaks. But a silent connection looks alive to
    /// tonic for some seconds, and a channel whose task has panicked fails for ever.
    pub(crate) fn retire(&self) {
        let connections = &mut self.daemon.inner().connections[self.purpose as usize];
        connections.retain(|connection| connection.number != self.number);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let connections = &mut self.daemon.inner().connections[self.purpose as usize];
        if let Some(connection) = connections.iter_mut().find(|connection| connection.number == self.number) {
            connection.uses -= 1;
            connection.idle_since = Instant::now();
        }
    }
}

impl fmt::Debug for Daemon {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Daemon").field("name", &self.name).finish_non_exhaustive()
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test that meets an unexpected failure should stop there")]
mod tests {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tonic::transport::Endpoint;

    use super::*;

    #[tokio::test]
    async fn no_call_waits_while_another_makes_a_connection() {
        let dialled: Arc<OnceLock<Arc<Daemon>>> = Arc::default();
        let calls = Arc::new(AtomicUsize::new(0));
        let (daemon, count) = (Arc::clone(&dialled), Arc::clone(&calls));
        let dial = move || {
            count.fetch_add(1, Ordering::Relaxed);
            assert!(
                daemon.get().unwrap().inner.try_lock().is_ok(),
                "other calls can use the daemon's connections meanwhile"
            );
            Endpoint::from_static("http://127.0.0.1:1").connect_lazy()
        };
        let daemon = dialled.get_or_init(|| Arc::new(Daemon::new("one".to_owned(), 0, Arc::new(dial))));
        let slots: Vec<Slot> = (0..=CALLS).map(|_| daemon.slot(Purpose::Calls)).collect();
        assert_eq!((daemon.count(Purpose::Calls), calls.load(Ordering::Relaxed)), (2, 2));
        drop(slots);
    }
}
