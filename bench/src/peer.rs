//! What every contender is asked, in its own words: taking and giving back keys, standing in line, keeping leases alive.
//! A workload is written once, against this. Knows no contender.

use std::time::Duration;

use anyhow::{Result, bail};
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Calls under way at once when many leases are taken: more than a store does in its time would be refused.
const AT_ONCE: usize = 512;
/// Streams, and calls that wait, on one connection; a daemon allows 256.
const A_CONNECTION: usize = 200;
/// Connections that few callers share.
const FEW_CONNECTIONS: usize = 4;

/// A connection to a contender. Clones are the same one.
pub(crate) trait Peer: Clone + Send + Sync + 'static {
    /// What whoever holds a key has to show for it.
    type Held: Send + Sync + 'static;
    /// Leases that are kept alive together: a turn touches them all, and counts those that were kept.
    type Stream: Turn;

    fn connect(address: &str) -> impl Future<Output = Result<Self>> + Send;

    /// One of many callers, with what it needs once.
    fn caller(&self, _ttl: Duration) -> impl Future<Output = Result<Self>> + Send {
        let caller = self.clone();
        async { Ok(caller) }
    }

    /// Takes a key that is free.
    fn acquire(&mut self, key: String, ttl: Duration) -> impl Future<Output = Result<Self::Held>> + Send;

    fn release(&mut self, held: Self::Held) -> impl Future<Output = Result<()>> + Send;

    /// Takes a lease that is only to be kept alive.
    fn hold(&mut self, key: String, ttl: Duration) -> impl Future<Output = Result<Self::Held>> + Send {
        self.acquire(key, ttl)
    }

    /// Opens a stream that carries the leases, and touches them once.
    fn keep(
        &mut self,
        _held: Vec<Self::Held>,
        _ttl: Duration,
    ) -> impl Future<Output = Result<Self::Stream>> + Send {
        async { bail!("keeps nothing alive") }
    }

    /// Takes a key; stands in line for as long as another holds it.
    fn stand(&mut self, _key: String, _ttl: Duration) -> impl Future<Output = Result<Self::Held>> + Send {
        async { bail!("has no line") }
    }

    /// How many hold a key under `prefix` or stand in line for one.
    fn standing(&mut self, _prefix: &str) -> impl Future<Output = Result<usize>> + Send {
        async { bail!("has no line") }
    }

    /// When the lease may be taken by another unless it is touched, by the clock of this host since 1970.
    fn end(_held: &Self::Held) -> Duration {
        Duration::ZERO
    }
}

/// What a caller does over and over.
pub(crate) trait Turn: Send + 'static {
    /// Does it once, and says how much was done.
    fn turn(&mut self) -> impl Future<Output = Result<u64>> + Send;
}

/// For those who keep nothing alive.
#[derive(Debug)]
pub(crate) enum NoStream {}

impl Turn for NoStream {
    async fn turn(&mut self) -> Result<u64> {
        match *self {}
    }
}

/// As many connections as so many callers or streams share.
pub(crate) async fn connections<P: Peer>(address: &str, callers: usize) -> Result<Vec<P>> {
    let count = callers.div_ceil(A_CONNECTION).max(FEW_CONNECTIONS.min(callers));
    let mut connections = Vec::with_capacity(count);
    for _ in 0..count {
        connections.push(P::connect(address).await?);
    }
    Ok(connections)
}

/// The results of all the work, some of which is done at once; in no order.
pub(crate) async fn all<T, F>(work: impl IntoIterator<Item = F>) -> Result<Vec<T>>
where
    T: Send + 'static,
    F: Future<Output = Result<T>> + Send + 'static,
{
    let mut running = JoinSet::new();
    let mut done = Vec::new();
    for one in work {
        while running.len() >= AT_ONCE {
            done.extend(running.join_next().await.transpose()?.transpose()?);
        }
        running.spawn(one);
    }
    while let Some(one) = running.join_next().await {
        done.push(one??);
    }
    Ok(done)
}

/// Leases to be kept alive, each with when it was asked for.
pub(crate) async fn hold<P: Peer>(
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
