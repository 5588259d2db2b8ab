//! Leases that are kept alive on streams, each touched at its time whether or not the last answer has come: an open load.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep, sleep_until};

use crate::cpu::{Cpu, Processes};
use crate::peer::{Peer, Turn, all, connections, hold};
use crate::sample::Sample;
use crate::tally::Shared;
use crate::trial::Trial;

/// Leases that are taken before the streams that carry them are opened: few, so that none runs out meanwhile.
const BATCH: usize = 1000;
/// Streams on a connection.
const A_CONNECTION: usize = 200;
/// Callers that take leases at once; they share connections of their own.
const CALLERS: usize = 512;

/// Streams of equally many leases, but for the last.
#[derive(Debug)]
pub(crate) struct Crowd<P: Peer> {
    address: String,
    ttl: Duration,
    a_stream: usize,
    callers: Vec<P>,
    connections: Vec<P>,
    streams: Vec<Carried>,
    tasks: JoinSet<()>,
    tally: Shared,
}

#[derive(Debug)]
struct Carried {
    /// Over which of the connections.
    connection: usize,
    leases: usize,
    state: Arc<Mutex<State>>,
    task: AbortHandle,
}

/// What the holder of a stream's leases knows.
#[derive(Debug)]
struct State {
    kept: usize,
    /// When the latest touch that was confirmed was sent.
    confirmed: Instant,
    /// The holder has had to stop relying on the leases since this was last looked at.
    lapsed: bool,
}

impl<P: Peer> Crowd<P> {
    pub(crate) async fn new(address: &str, ttl: Duration, a_stream: usize) -> Result<Self> {
        let now = Instant::now();
        Ok(Self {
            address: address.to_owned(),
            ttl,
            a_stream,
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

    /// How long after a touch the next is due.
    pub(crate) fn interval(&self) -> Duration {
        self.ttl / 3
    }

    /// Takes more leases until there are so many; those that there are stay alive meanwhile.
    pub(crate) async fn grow(&mut self, to: usize) -> Result<()> {
        while self.len() < to {
            let leases = BATCH.min(to - self.len());
            let mut held = hold(&self.callers, &Trial::prefix(), leases, self.ttl).await?;
            let streams = held.len().div_ceil(self.a_stream);
            let mut opening = Vec::with_capacity(streams);
            for number in self.roomy(streams).await? {
                let some = held.split_off(held.len() - held.len().min(self.a_stream));
                let mut connection = self.connections[number].clone();
                let (leases, ttl) = (some.len(), self.ttl);
                let confirmed = some.iter().map(|(_, asked)| *asked).min().unwrap_or_else(Instant::now);
                let some = some.into_iter().map(|(held, _)| held).collect();
                opening
                    .push(async move { Ok((connection.keep(some, ttl).await?, number, leases, confirmed)) });
            }
            for (stream, connection, leases, confirmed) in all(opening).await? {
                let state = Arc::new(Mutex::new(State { kept: leases, confirmed, lapsed: false }));
                let carry = carry(stream, self.ttl, Arc::clone(&state), self.tally.clone());
                self.streams.push(Carried { connection, leases, state, task: self.tasks.spawn(carry) });
            }
        }
        Ok(())
    }

    /// The connections that so many more streams go over; a daemon would keep a stream too many waiting without end.
    async fn roomy(&mut self, streams: usize) -> Result<Vec<usize>> {
        let mut carried = vec![0; self.connections.len()];
        self.streams.iter().for_each(|stream| carried[stream.connection] += 1);
        let mut chosen = Vec::with_capacity(streams);
        for _ in 0..streams {
            let roomy = carried.iter().position(|carried| *carried < A_CONNECTION);
            let roomy = match roomy {
                Some(roomy) => roomy,
                None => {
                    self.connections.push(P::connect(&self.address).await?);
                    carried.push(0);
                    carried.len() - 1
                }
            };
            carried[roomy] += 1;
            chosen.push(roomy);
        }
        Ok(chosen)
    }

    /// Lets go of streams that have lost something, and of so many others that no more leases are left than `to`.
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

    /// Watches for `time`: the touches, their latencies from when they were due, and how many leases were lost.
    pub(crate) async fn watch(&mut self, time: Duration, processes: &Processes) -> Result<(Sample, usize)> {
        let start = Instant::now();
        for stream in &self.streams {
            stream.state.lock().unwrap_or_else(PoisonError::into_inner).lapsed = false;
        }
        self.tally.restart(start, start + time);
        let cpu = Cpu::now(processes);
        sleep(time).await;
        let spent = cpu.spent();
        let lost = self.streams.iter().map(|stream| stream.lost(self.ttl)).sum();
        Ok((self.tally.sample("touches/s")?.spending(&spent, time), lost))
    }
}

impl Carried {
    /// How many of the leases have been lost, in the eyes of their holder.
    fn lost(&self, ttl: Duration) -> usize {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
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

/// Touches a stream's leases when they are due, at a phase of its own, until the stream fails.
async fn carry<S: Turn>(mut stream: S, ttl: Duration, state: Arc<Mutex<State>>, tally: Shared) {
    let interval = ttl / 3;
    let mut due = Instant::now() + interval.mul_f64(fastrand::f64());
    loop {
        sleep_until(due).await;
        let sent = Instant::now();
        let turn = stream.turn().await;
        if let Ok(kept) = &turn {
            state.lock().unwrap_or_else(PoisonError::into_inner).note(sent, *kept, ttl);
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

    /// A connection that takes no more streams than it may have.
    #[derive(Debug, Clone)]
    struct Narrow(Arc<AtomicUsize>);

    impl Peer for Narrow {
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
            ensure!(self.0.fetch_add(1, Ordering::Relaxed) < A_CONNECTION, "one stream too many");
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
    async fn a_connection_has_no_more_streams_than_it_may_however_the_crowd_grows() {
        let mut crowd = Crowd::<Narrow>::new("", Duration::from_secs(10), 1).await.expect("a crowd");
        for leases in [10, 150, 450, 470, 2000] {
            crowd.grow(leases).await.expect("room");
            assert_eq!(crowd.len(), leases);
            assert_eq!(crowd.connections.len(), leases.div_ceil(A_CONNECTION));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_is_lost_that_was_confirmed_too_late() {
        let ttl = Duration::from_secs(3);
        let mut tasks = JoinSet::new();
        let state = Arc::new(Mutex::new(State { kept: 10, confirmed: Instant::now(), lapsed: false }));
        let stream =
            Carried { connection: 0, leases: 10, state: Arc::clone(&state), task: tasks.spawn(async {}) };
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!(stream.lost(ttl), 0);
        let sent = Instant::now();
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!(stream.lost(ttl), 10, "no word from anybody");
        state.lock().expect("not poisoned").note(sent, 9, ttl);
        assert_eq!(stream.lost(ttl), 10, "the word came too late");
        state.lock().expect("not poisoned").lapsed = false;
        assert_eq!(stream.lost(ttl), 1);
    }
}
