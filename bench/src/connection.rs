//! A connection to a contender, with the operations that all contenders share: acquire and release
//! keys, wait for them, and keep leases alive. Workloads are written once, for this trait. This
//! module is independent of all contenders.

use std::time::Duration;

use anyhow::{Result, bail};
use tokio::task::JoinSet;
use tokio::time::Instant;

/// The limit on calls in flight when many leases are acquired. With more, a store that cannot keep
/// up would refuse calls.
const MAX_IN_FLIGHT: usize = 512;
/// The most streams and waiting calls on one connection; a daemon allows 256.
const STREAMS_PER_CONNECTION: usize = 200;
/// The fewest connections, unless there are fewer callers.
const MIN_CONNECTIONS: usize = 4;

/// A connection to a contender. Clones share the connection.
pub(crate) trait Connection: Clone + Send + Sync + 'static {
    /// What a holder needs to touch or release its key.
    type Held: Send + Sync + 'static;
    /// Leases that are kept alive together. A turn touches all of them, and counts those that were
    /// kept.
    type Stream: Turn;

    fn connect(address: &str) -> impl Future<Output = Result<Self>> + Send;

    /// Returns the connection for one of many callers. A caller of etcd has its own lease.
    fn caller(&self, _ttl: Duration) -> impl Future<Output = Result<Self>> + Send {
        let caller = self.clone();
        async { Ok(caller) }
    }

    /// Acquires a free key.
    fn acquire(&mut self, key: String, ttl: Duration) -> impl Future<Output = Result<Self::Held>> + Send;

    fn release(&mut self, held: Self::Held) -> impl Future<Output = Result<()>> + Send;

    /// Acquires a lease that is only to be kept alive.
    fn hold(&mut self, key: String, ttl: Duration) -> impl Future<Output = Result<Self::Held>> + Send {
        self.acquire(key, ttl)
    }

    /// Opens a stream that keeps the leases alive, and touches them once.
    fn keep(
        &mut self,
        _held: Vec<Self::Held>,
        _ttl: Duration,
    ) -> impl Future<Output = Result<Self::Stream>> + Send {
        async { bail!("has no keepalives") }
    }

    /// Acquires a key, and waits in the queue while another holds it.
    fn acquire_waiting(
        &mut self,
        _key: String,
        _ttl: Duration,
    ) -> impl Future<Output = Result<Self::Held>> + Send {
        async { bail!("has no queue") }
    }

    /// Counts the holders and waiters of the keys that begin with `prefix`.
    fn holders_and_waiters(&mut self, _prefix: &str) -> impl Future<Output = Result<usize>> + Send {
        async { bail!("has no queue") }
    }

    /// Returns when the lease ends unless it is touched, as the time since 1970 by this host's
    /// clock.
    fn end(_held: &Self::Held) -> Duration {
        Duration::ZERO
    }
}

/// The operation that a caller repeats.
pub(crate) trait Turn: Send + 'static {
    /// Runs the operation once, and returns how much was done.
    fn turn(&mut self) -> impl Future<Output = Result<u64>> + Send;
}

/// The stream of a contender without keepalives.
#[derive(Debug)]
pub(crate) enum NoStream {}

impl Turn for NoStream {
    async fn turn(&mut self) -> Result<u64> {
        match *self {}
    }
}

/// Opens as many connections as this number of callers or streams needs.
pub(crate) async fn connections<P: Connection>(address: &str, callers: usize) -> Result<Vec<P>> {
    let count = callers.div_ceil(STREAMS_PER_CONNECTION).max(MIN_CONNECTIONS.min(callers));
    let mut connections = Vec::with_capacity(count);
    for _ in 0..count {
        connections.push(P::connect(address).await?);
    }
    Ok(connections)
}

/// Runs all futures, up to [`MAX_IN_FLIGHT`] at the same time, and returns their results in any
/// order.
pub(crate) async fn all<T, F>(work: impl IntoIterator<Item = F>) -> Result<Vec<T>>
where
    T: Send + 'static,
    F: Future<Output = Result<T>> + Send + 'static,
{
    let mut running = JoinSet::new();
    let mut done = Vec::new();
    for one in work {
        while running.len() >= MAX_IN_FLIGHT {
            done.extend(running.join_next().await.transpose()?.transpose()?);
        }
        running.spawn(one);
    }
    while let Some(one) = running.join_next().await {
        done.push(one??);
    }
    Ok(done)
}

/// Acquires leases to keep alive, and returns each with the time of its request.
pub(crate) async fn hold<P: Connection>(
    connections: &[P],
    prefix: &str,
    count: usize,
    ttl: Duration,
) -> Result<Vec<(P::Held, Instant)>> {
    let asked = connections.iter().cycle().zip(0..count).map(|(connection, number)| {
        let (mut connection, key) = (connection.clone(), format!("{prefix}/{number:06}"));
        async move {
            let asked = Instant::now();
            Ok((connection.hold(key, ttl).await?, asked))
        }
    });
    all(asked).await
}
