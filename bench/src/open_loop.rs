//! An open loop: leases that are kept alive on streams, each touched when it is due, whether or not
//! the last answer has arrived.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Result;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep, sleep_until};

use crate::connection::{Connection, Turn, all, connections, hold};
use crate::cpu::{Cpu, Processes};
use crate::lock::lock;
use crate::sample::Sample;
use crate::tally::Shared;
use crate::trial::Trial;

/// How many leases are acquired before their streams are opened. Few enough that none expires
/// meanwhile.
const BATCH: usize = 1000;
/// The most streams on a connection.
const STREAMS_PER_CONNECTION: usize = 200;
/// How many callers acquire leases at the same time. They do not use the connections of the
/// streams.
const CALLERS: usize = 512;

/// An open loop: streams with the same number of leases each, except the last of each batch.
#[derive(Debug)]
pub(crate) struct OpenLoop<P: Connection> {
    address: String,
    ttl: Duration,
    leases_per_stream: usize,
    callers: Vec<P>,
    connections: Vec<P>,
    streams: Vec<OpenStream>,
    tasks: JoinSet<()>,
    tally: Shared,
}

#[derive(Debug)]
struct OpenStream {
    /// The index of its connection.
    connection: usize,
    leases: usize,
    state: Arc<Mutex<State>>,
    task: AbortHandle,
}

/// The state of a stream's leases, as their holder sees it.
#[derive(Debug)]
struct State {
    kept: usize,
    /// When the last confirmed touch was sent.
    confirmed: Instant,
    /// Whether the holder has had to stop relying on the leases since this flag was last reset.
    lapsed: bool,
}

impl<P: Connection> OpenLoop<P> {
    pub(crate) async fn new(address: &str, ttl: Duration, leases_per_stream: usize) -> Result<Self> {
        let now = Instant::now();
        Ok(Self {
            address: address.to_owned(),
            ttl,
            leases_per_stream,
            callers: connections(address, CALLERS).await?,
            connections: Vec::new(),
            streams: Vec::new(),
            tasks: JoinSet::new(),
            tally: Shared::new(now, now),
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.streams.iter().map(|stream| stream.leases).sum()
    }

    /// How long after a touch the next one is due.
    pub(crate) fn interval(&self) -> Duration {
        self.ttl / 3
    }

    /// Acquires more leases until there are `to`. The existing leases stay alive meanwhile.
    pub(crate) async fn grow(&mut self, to: usize) -> Result<()> {
        while self.len() < to {
            let leases = BATCH.min(to - self.len());
            let mut held = hold(&self.callers, &Trial::prefix(), leases, self.ttl).await?;
            let streams = held.len().div_ceil(self.leases_per_stream);
            let mut opening = Vec::with_capacity(streams);
            for number in self.connections_for(streams).await? {
                let some = held.split_off(held.len() - held.len().min(self.leases_per_stream));
                let mut connection = self.connections[number].clone();
                let (leases, ttl) = (some.len(), self.ttl);
                let confirmed = some.iter().map(|(_, asked)| *asked).min().unwrap_or_else(Instant::now);
                let some = some.into_iter().map(|(held, _)| held).collect();
                opening
                    .push(async move { Ok((connection.keep(some, ttl).await?, number, leases, confirmed)) });
            }
            for (stream, connection, leases, confirmed) in all(opening).await? {
                let state = Arc::new(Mutex::new(State { kept: leases, confirmed, lapsed: false }));
                let touching = keep_alive(stream, self.ttl, Arc::clone(&state), self.tally.clone());
                self.streams.push(OpenStream { connection, leases, state, task: self.tasks.spawn(touching) });
            }
        }
        Ok(())
    }

    /// Chooses the connections for more streams, and opens connections if needed. A connection gets
    /// at most [`STREAMS_PER_CONNECTION`] streams, since a stream beyond the daemon's limit would
    /// wait for ever.
    async fn connections_for(&mut self, streams: usize) -> Result<Vec<usize>> {
        let mut counts = vec![0; self.connections.len()];
        self.streams.iter().for_each(|stream| counts[stream.connection] += 1);
        let mut chosen = Vec::with_capacity(streams);
        for _ in 0..streams {
            let roomy = counts.iter().position(|count| *count < STREAMS_PER_CONNECTION);
            let roomy = match roomy {
                Some(roomy) => roomy,
                None => {
                    self.connections.push(P::connect(&self.address).await?);
                    counts.push(0);
                    counts.len() - 1
                }
            };
            counts[roomy] += 1;
            chosen.push(roomy);
        }
        Ok(chosen)
    }

    /// Closes the streams that have lost a lease, and then others, until no more than `to` leases
    /// are left.
    pub(crate) fn shrink(&mut self, to: usize) {
        let (ttl, mut left) = (self.ttl, to);
        self.streams.retain(|stream| {
            let stays = stream.lost(ttl) == 0 && stream.leases <= left;
            if stays {
                left -= stream.leases;
            } else {
                stream.task.abort();
            }
            stays
        });
    }

    /// Measures for `time`. Returns the touches, with their latencies from when they were due, and
    /// how many leases were lost.
    pub(crate) async fn measure(&mut self, time: Duration, processes: &Processes) -> Result<(Sample, usize)> {
        let start = Instant::now();
        for stream in &self.streams {
            lock(&stream.state).lapsed = false;
        }
        self.tally.restart(start, start + time);
        let cpu = Cpu::now(processes);
        sleep(time).await;
        let spent = cpu.spent();
        let lost = self.streams.iter().map(|stream| stream.lost(self.ttl)).sum();
        Ok((self.tally.sample("touches/s")?.spending(&spent, time), lost))
    }
}

impl OpenStream {
    /// How many of its leases have been lost, as their holder sees it.
    fn lost(&self, ttl: Duration) -> usize {
        let state = lock(&self.state);
        let lapsed = state.lapsed || state.confirmed.elapsed() > ttl;
        if lapsed { self.leases } else { self.leases - state.kept.min(self.leases) }
    }
}

impl State {
    fn note(&mut self, sent: Instant, kept: u64, ttl: Duration) {
        self.lapsed |= self.confirmed.elapsed() > ttl;
        self.kept = usize::try_from(kept).unwrap_or(usize::MAX);
        self.confirmed = sent;
    }
}

/// Touches a stream's leases when they are due, beginning at a random time, until the stream fails.
async fn keep_alive<S: Turn>(mut stream: S, ttl: Duration, state: Arc<Mutex<State>>, tally: Shared) {
    let interval = ttl / 3;
    let mut due = Instant::now() + interval.mul_f64(fastrand::f64());
    loop {
        sleep_until(due).await;
        let sent = Instant::now();
        let turn = stream.turn().await;
        if let Ok(kept) = &turn {
            lock(&state).note(sent, *kept, ttl);
        }
        if !tally.add(due, turn) {
            return;
        }
        due += interval;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use anyhow::ensure;

    use super::*;

    /// A connection that refuses streams beyond its limit.
    #[derive(Debug, Clone)]
    struct Narrow(Arc<AtomicUsize>);

    impl Connection for Narrow {
        type Held = ();
        type Stream = Idle;

        async fn connect(_: &str) -> Result<Self> {
            Ok(Self(Arc::default()))
        }

        async fn acquire(&mut self, _: String, _: Duration) -> Result<()> {
            Ok(())
        }

        async fn release(&mut self, (): ()) -> Result<()> {
            Ok(())
        }

        async fn keep(&mut self, _: Vec<()>, _: Duration) -> Result<Idle> {
            ensure!(self.0.fetch_add(1, Ordering::Relaxed) < STREAMS_PER_CONNECTION, "one stream too many");
            Ok(Idle)
        }
    }

    struct Idle;

    impl Turn for Idle {
        async fn turn(&mut self) -> Result<u64> {
            std::future::pending().await
        }
    }

    #[tokio::test]
    async fn no_connection_has_more_streams_than_its_limit_however_the_load_grows() {
        let mut load = OpenLoop::<Narrow>::new("", Duration::from_secs(10), 1).await.expect("a load");
        for leases in [10, 150, 450, 470, 2000] {
            load.grow(leases).await.expect("room");
            assert_eq!(load.len(), leases);
            assert_eq!(load.connections.len(), leases.div_ceil(STREAMS_PER_CONNECTION));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_that_was_confirmed_too_late_is_lost() {
        let ttl = Duration::from_secs(3);
        let mut tasks = JoinSet::new();
        let state = Arc::new(Mutex::new(State { kept: 10, confirmed: Instant::now(), lapsed: false }));
        let stream =
            OpenStream { connection: 0, leases: 10, state: Arc::clone(&state), task: tasks.spawn(async {}) };
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!(stream.lost(ttl), 0);
        let sent = Instant::now();
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!(stream.lost(ttl), 10, "nothing was confirmed");
        state.lock().expect("not poisoned").note(sent, 9, ttl);
        assert_eq!(stream.lost(ttl), 10, "the confirmation came too late");
        state.lock().expect("not poisoned").lapsed = false;
        assert_eq!(stream.lost(ttl), 1);
    }
}
