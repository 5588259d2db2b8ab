//! Handoff: the time from the start of a release until the next waiter is told of its grant.

use std::collections::VecDeque;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::connection::Connection;
use crate::cpu::Cpu;
use crate::sample::Sample;
use crate::tally::Latencies;
use crate::trial::Trial;
use crate::workload::Workload;

/// The TTL: longer than any run.
const TTL: Duration = Duration::from_secs(600);
/// The number of handoffs for each second of the trial.
const HANDOFFS_PER_SECOND: u64 = 60;
/// The handoffs may take this many times the trial's time.
const PATIENCE: u32 = 4;
/// The pause between handoffs.
const PAUSE: Duration = Duration::from_millis(10);

/// A waiter that was told of its grant: when it was told, its connection, and what it holds.
type Told<P> = Result<(Instant, P, <P as Connection>::Held)>;

/// Runs the workload. All callers take turns: the holder releases the lease, and waits for it again
/// behind the others.
pub(crate) async fn run<P: Connection>(trial: &Trial<'_>) -> Result<Sample> {
    let other = match trial.workload {
        Workload::Relay => trial.deployment.other_address()?,
        _ => trial.deployment.address()?,
    };
    let key = Trial::prefix();
    let mut holder = P::connect(trial.deployment.address()?).await?;
    let mut held = holder.acquire(key.clone(), TTL).await?;
    let (mut tasks, mut queue) = (JoinSet::new(), VecDeque::new());
    for waiters in 1..=trial.scale {
        let waiter = P::connect(other).await?;
        queue.push_back(spawn_waiter(&mut tasks, waiter, key.clone()));
        until_queued(&mut holder, &key, waiters).await?;
    }
    let mut latencies = Latencies::new();
    let (start, cpu) = (Instant::now(), Cpu::now(&trial.deployment.processes()));
    while latencies.len() < HANDOFFS_PER_SECOND * trial.time.as_secs()
        && start.elapsed() < PATIENCE * trial.time
    {
        // A waiter that has just joined the queue may be told late: etcd's new watches take up to
        // 100 ms.
        sleep(PAUSE).await;
        let next = queue.pop_front().context("a waiter")?;
        let called = Instant::now();
        holder.release(held).await?;
        let (told, waiter, granted) = next.await??;
        latencies.add(told.saturating_duration_since(called));
        held = granted;
        queue.push_back(spawn_waiter(&mut tasks, waiter, key.clone()));
        until_queued(&mut holder, &key, trial.scale).await?;
    }
    let (time, spent) = (start.elapsed(), cpu.spent());
    ensure!(latencies.len() > 0, "not one handoff in time");
    let mut sample = Sample::default();
    latencies.note(&mut sample);
    Ok(sample.spending(&spent, time))
}

/// Waits for the key in a task of `tasks`, and sends the grant through the returned channel.
fn spawn_waiter<P: Connection>(
    tasks: &mut JoinSet<()>,
    mut waiter: P,
    key: String,
) -> tokio::sync::oneshot::Receiver<Told<P>> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    tasks.spawn(async move {
        let granted = waiter.acquire_waiting(key, TTL).await;
        let told = Instant::now();
        // Fails at the end of the trial, when nothing receives any more.
        let _ = sender.send(granted.map(|held| (told, waiter, held)));
    });
    receiver
}

/// Waits until the queue has `waiters`, behind one holder.
async fn until_queued<P: Connection>(connection: &mut P, key: &str, waiters: usize) -> Result<()> {
    let start = Instant::now();
    while connection.holders_and_waiters(key).await? != waiters + 1 {
        ensure!(start.elapsed() < Duration::from_secs(30), "no waiter joins the queue");
        sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}
