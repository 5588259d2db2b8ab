//! Takeover: the time from when a silent holder's lease may be taken until the next waiter is told
//! of its grant.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use crate::clock;
use crate::connection::{Connection, all, connections};
use crate::contender::Contender;
use crate::cpu::Cpu;
use crate::sample::Sample;
use crate::tally::Latencies;
use crate::trial::Trial;

/// The TTL of the waiters: longer than any run.
const TTL: Duration = Duration::from_secs(600);

/// Runs the workload: holders that stop touching at the same time, each with one waiter.
pub(crate) async fn run<P: Connection>(trial: &Trial<'_>) -> Result<Sample> {
    let grace = match trial.contender {
        Contender::Mongod | Contender::ReplicaSet => Duration::from_secs(1),
        _ => Duration::ZERO,
    };
    let until = clock::now() + allowed(trial);
    let (prefix, address) = (Trial::prefix(), trial.deployment.address()?);
    let holders = connections::<P>(address, trial.scale).await?;
    let held = holders.iter().cycle().zip(0..trial.scale).map(|(holder, number)| {
        let (mut holder, key) = (holder.clone(), format!("{prefix}/{number:06}"));
        async move {
            // A daemon accepts no TTL below 100 ms.
            let ttl = until.checked_sub(clock::now()).filter(|ttl| ttl.as_millis() >= 100);
            let held = holder.acquire(key.clone(), ttl.context("too slow to acquire all leases")?).await?;
            Ok((key, held))
        }
    });
    // Kept until the end, so that no lease is released.
    let held = all(held).await?;
    let waiters = connections::<P>(address, trial.scale).await?;
    let mut waiting = JoinSet::new();
    for (waiter, (key, held)) in waiters.iter().cycle().zip(&held) {
        waiting.spawn(take_over(waiter.clone(), key.clone(), P::end(held) + grace));
    }
    let mut holder = holders.first().context("a connection")?.clone();
    loop {
        let polled = Instant::now();
        let count = holder.holders_and_waiters(&format!("{prefix}/")).await?;
        if count == 2 * trial.scale {
            break;
        }
        ensure!(clock::now() < until, "too slow: only {count} of {} hold or wait", 2 * trial.scale);
        // Counting this many keys is work for the server, and must not slow down the calls that are
        // counted.
        sleep((4 * polled.elapsed()).max(Duration::from_millis(100))).await;
    }
    let mut latencies = Latencies::new();
    let patience = until.saturating_sub(clock::now()) + grace + 12 * trial.time;
    let (start, cpu) = (Instant::now(), Cpu::now(&trial.deployment.processes()));
    let told = async {
        while let Some(late) = waiting.join_next().await {
            latencies.add(late??);
        }
        anyhow::Ok(())
    };
    let in_time = timeout(patience, told).await.map_or(Ok(false), |told| told.map(|()| true))?;
    ensure!(in_time, "{} of {} were told within {:?}", latencies.len(), trial.scale, 12 * trial.time);
    let (time, spent) = (start.elapsed(), cpu.spent());
    let mut sample = Sample::default();
    latencies.note(&mut sample);
    Ok(sample.spending(&spent, time))
}

/// How long it may take until all holders hold and all waiters wait, at a rate that each contender
/// always reaches.
fn allowed(trial: &Trial<'_>) -> Duration {
    let keys_per_second: u32 = match trial.contender {
        Contender::Embedded => 3000,
        Contender::Mongod => 1000,
        Contender::ReplicaSet => 500,
        Contender::EtcdThree => 200,
        _ => 350,
    };
    Duration::from_secs(4) + Duration::from_secs_f64(trial.scale as f64 / f64::from(keys_per_second))
}

/// Waits for the key, and returns how long after `due` the waiter was told.
async fn take_over<P: Connection>(mut waiter: P, key: String, due: Duration) -> Result<Duration> {
    waiter.acquire_waiting(key, TTL).await?;
    let told = clock::now();
    // A server that counts in whole seconds may end a lease up to a second early.
    let slack = Duration::from_secs(1);
    ensure!(told + slack >= due, "granted {:?} too early", due - told);
    Ok(told.saturating_sub(due))
}
