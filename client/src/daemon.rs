//! One daemon: the connections to it, and what is known of it.
//!
//! Calls that wait in line take up a stream of their connection for as long as they wait, and a daemon serves no more than 256
//! on one. So they have connections of their own, and never stand in the way of a touch.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tonic::transport::Channel;

use crate::error::Error;

/// Calls under way on one connection, below the 256 that a daemon serves. Further ones have another connection.
const CALLS: usize = 200;
/// How long a connection that nobody uses stays open.
pub(crate) const IDLE: Duration = Duration::from_secs(10);
/// For how long a daemon that is of no use is not asked, while there are others.
const BARRED: Duration = Duration::from_secs(30);

/// Makes a connection, when it is first used.
pub(crate) type Dial = Arc<dyn Fn() -> Channel + Send + Sync>;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// What leases depend on: the keepalive stream, touches and releases.
    Upkeep,
    /// Calls that are answered soon, and watches.
    Calls,
    /// Acquires that wait in line.
    Waits,
}

/// One address of an endpoint.
pub(crate) struct Daemon {
    /// For messages.
    pub(crate) name: String,
    /// Orders the daemons of a client; lower ones are asked first. Random, so that clients spread over all daemons.
    pub(crate) order: (usize, u64),
    dial: Dial,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// By purpose.
    connections: [Vec<Connection>; 3],
    /// How many connections were ever made.
    made: u64,
    /// Whether the daemon has answered since its last failure, and so said which store it serves unless it is of an earlier version.
    is_known: bool,
    store: Option<String>,
    barred: Option<(Instant, Error)>,
}

struct Connection {
    number: u64,
    channel: Channel,
    uses: usize,
    idle_since: Instant,
}

/// The right to send one call over a connection, counted until it is dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) daemon: Arc<Daemon>,
    pub(crate) channel: Channel,
    purpose: Purpose,
    number: u64,
}

impl Daemon {
    /// `rank` goes before chance.
    pub(crate) fn new(name: String, rank: usize, dial: Dial) -> Self {
        Self { name, order: (rank, fastrand::u64(..)), dial, inner: Mutex::default() }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection with room for one more call; a new one if there is none.
    pub(crate) fn slot(self: &Arc<Self>, purpose: Purpose) -> Slot {
        if let Some(slot) = self.free(&mut self.inner(), purpose) {
            return slot;
        }
        // Without the lock: this may be a user's code, which takes as long as it likes.
        let channel = (self.dial)();
        let mut inner = self.inner();
        // Somebody else may have been faster.
        if let Some(slot) = self.free(&mut inner, purpose) {
            return slot;
        }
        inner.made += 1;
        let number = inner.made;
        let connection = Connection { number, channel: channel.clone(), uses: 1, idle_since: Instant::now() };
        inner.connections[purpose as usize].push(connection);
        Slot { daemon: Arc::clone(self), channel, purpose, number }
    }

    /// A connection that is there and has room for one more call.
    fn free(self: &Arc<Self>, inner: &mut Inner, purpose: Purpose) -> Option<Slot> {
        // The first with room, so that the last ones fall idle.
        let connection =
            inner.connections[purpose as usize].iter_mut().find(|connection| connection.uses < CALLS)?;
        connection.uses += 1;
        let (channel, number) = (connection.channel.clone(), connection.number);
        Some(Slot { daemon: Arc::clone(self), channel, purpose, number })
    }

    /// Closes connections that nobody has used for a while. The daemon that is asked first keeps one for upkeep and one for calls.
    pub(crate) fn close_idle(&self, now: Instant, is_first: bool) {
        let mut inner = self.inner();
        for purpose in [Purpose::Upkeep, Purpose::Calls, Purpose::Waits] {
            let mut kept = usize::from(is_first && purpose != Purpose::Waits);
            inner.connections[purpose as usize].retain(|connection| {
                let is_kept = std::mem::replace(&mut kept, 0) == 1;
                is_kept || connection.uses > 0 || now.saturating_duration_since(connection.idle_since) < IDLE
            });
        }
    }

    /// Notes the store that the daemon names, and returns whether it is another than before.
    pub(crate) fn tells(&self, store: Option<&str>) -> bool {
        let mut inner = self.inner();
        inner.is_known = true;
        let is_news = store.is_some() && inner.store.as_deref() != store;
        if is_news {
            inner.store = store.map(str::to_owned);
        }
        is_news
    }

    /// Forgets that the daemon is known: another one, over another store, may answer at this address next.
    pub(crate) fn forget(&self) {
        self.inner().is_known = false;
    }

    pub(crate) fn is_known(&self) -> bool {
        self.inner().is_known
    }

    pub(crate) fn store(&self) -> Option<String> {
        self.inner().store.clone()
    }

    /// Not to be asked for a while.
    pub(crate) fn bar(&self, error: Error) {
        self.inner().barred = Some((Instant::now() + BARRED, error));
    }

    /// Lets the daemon be asked again.
    pub(crate) fn unbar(&self) {
        self.inner().barred = None;
    }

    /// Why it is not asked at the moment.
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
    /// Nothing more is sent over this connection, and the next call makes another. Calls that are under way on it go on.
    ///
    /// tonic connects anew by itself when a connection breaks. But one that is silent looks alive to it for some seconds, and a
    /// channel whose task has panicked fails for ever.
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
    async fn nobody_waits_for_a_connection_that_is_being_made() {
        let dialled: Arc<OnceLock<Arc<Daemon>>> = Arc::default();
        let calls = Arc::new(AtomicUsize::new(0));
        let (daemon, count) = (Arc::clone(&dialled), Arc::clone(&calls));
        let dial = move || {
            count.fetch_add(1, Ordering::Relaxed);
            assert!(daemon.get().unwrap().inner.try_lock().is_ok(), "others use its connections meanwhile");
            Endpoint::from_static("http://127.0.0.1:1").connect_lazy()
        };
        let daemon = dialled.get_or_init(|| Arc::new(Daemon::new("one".to_owned(), 0, Arc::new(dial))));
        let slots: Vec<Slot> = (0..=CALLS).map(|_| daemon.slot(Purpose::Calls)).collect();
        assert_eq!((daemon.count(Purpose::Calls), calls.load(Ordering::Relaxed)), (2, 2));
        drop(slots);
    }
}
