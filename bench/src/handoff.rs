//! From the call of a release to the moment when the next in line is told.

use std::collections::VecDeque;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::cpu::Cpu;
use crate::peer::Peer;
use crate::sample::Sample;
use crate::tally::Latencies;
use crate::trial::Trial;
use crate::workload::Workload;

/// Longer than any run.
const TTL: Duration = Duration::from_secs(600);
/// Handoffs for each second of the trial, and for how many times its time they may go on.
const A_SECOND: u64 = 60;
const PATIENCE: u32 = 4;
/// What passes between handoffs.
const A_WHILE: Duration = Duration::from_millis(10);

/// Whoever waited, once told: since when, its connection, and what it holds.
type Told<P> = Result<(Instant, P, <P as Peer>::Held)>;

/// The lease goes round among those who wait: the one who holds gives it back and stands in line again.
pub(crate) async fn run<P: Peer>(trial: &Trial<'_>) -> Result<Sample> {
    let other = match trial.workload {
        Workload::Relay => trial.stage.other_address()?,
        _ => trial.stage.address()?,
    };
    let key = Trial::prefix();
    let mut holder = P::connect(trial.stage.address()?).await?;
    let mut held = holder.acquire(key.clone(), TTL).await?;
    let (mut tasks, mut line) = (JoinSet::new(), VecDeque::new());
    for place in 1..=trial.scale {
        let waiter = P::connect(other).await?;
        line.push_back(stand(&mut tasks, waiter, key.clone()));
        stands(&mut holder, &key, place).await?;
    }
    let mut latencies = Latencies::new();
    let (start, cpu) = (Instant::now(), Cpu::now(&trial.stage.processes()));
    while latencies.len() < A_SECOND * trial.time.as_secs() && start.elapsed() < PATIENCE * trial.time {
        // Whoever came into line is not yet told at once: etcd's watches, begun a moment ago, take up to 100 ms.
        sleep(A_WHILE).await;
        let next = line.pop_front().context("somebody in line")?;
        let called = Instant::now();
        holder.release(held).await?;
        let (told, waiter, granted) = next.await??;
        latencies.add(told.saturating_duration_since(called));
        held = granted;
        line.push_back(stand(&mut tasks, waiter, key.clone()));
        stands(&mut holder, &key, trial.scale).await?;
    }
    let (time, spent) = (start.elapsed(), cpu.spent());
    ensure!(latencies.len() > 0, "not one handoff in time");
    let mut sample = Sample::default();
    latencies.note(&mut sample);
    Ok(sample.spending(&spent, time))
}

/// Has a waiter stand in line, in a task that ends with `tasks`.
fn stand<P: Peer>(
    tasks: &mut JoinSet<()>,
    mut waiter: P,
    key: String,
) -> tokio::sync::oneshot::Receiver<Told<P>> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    tasks.spawn(async move {
        let granted = waiter.stand(key, TTL).await;
        let told = Instant::now();
        // Nobody listens once the trial is over.
        drop(sender.send(granted.map(|held| (told, waiter, held))));
    });
    receiver
}

/// Waits until so many stand in line behind the one who holds.
async fn stands<P: Peer>(peer: &mut P, key: &str, count: usize) -> Result<()> {
    let start = Instant::now();
    while peer.standing(key).await? != count + 1 {
        ensure!(start.elapsed() < Duration::from_secs(30), "nobody comes into line");
        sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}
