//! From the moment when a silent holder's lease may be taken to the moment when the next in line is told.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use crate::clock;
use crate::contender::Contender;
use crate::cpu::Cpu;
use crate::peer::{Peer, all, connections};
use crate::sample::Sample;
use crate::tally::Latencies;
use crate::trial::Trial;

/// Of those who take over: longer than any run.
const TTL: Duration = Duration::from_secs(600);

/// Leases of holders that fall silent together, each with one in line.
pub(crate) async fn run<P: Peer>(trial: &Trial<'_>) -> Result<Sample> {
    let grace = match trial.contender {
        Contender::Mongod | Contender::ReplicaSet => Duration::from_secs(1),
        _ => Duration::ZERO,
    };
    let until = clock::now() + allowed(trial);
    let (prefix, address) = (Trial::prefix(), trial.stage.address()?);
    let holders = connections::<P>(address, trial.scale).await?;
    let held = holders.iter().cycle().zip(0..trial.scale).map(|(holder, number)| {
        let (mut holder, key) = (holder.clone(), format!("{prefix}/{number:06}"));
        async move {
            let ttl = until.checked_sub(clock::now()).filter(|ttl| ttl.as_millis() >= 100);
            let held = holder.acquire(key.clone(), ttl.context("too slow to take them all")?).await?;
            Ok((key, held))
        }
    });
    // Kept, so that nothing is given back.
    let held = all(held).await?;
    let waiters = connections::<P>(address, trial.scale).await?;
    let mut line = JoinSet::new();
    for (waiter, (key, held)) in waiters.iter().cycle().zip(&held) {
        line.spawn(take(waiter.clone(), key.clone(), P::end(held) + grace));
    }
    let mut holder = holders.first().context("a connection")?.clone();
    loop {
        let look = Instant::now();
        let standing = holder.standing(&format!("{prefix}/")).await?;
        if standing == 2 * trial.scale {
            break;
        }
        ensure!(clock::now() < until, "too slow: {standing} of {} held or stood in line", 2 * trial.scale);
        // To look at so many is work, which is not to hold up what is looked for.
        sleep((4 * look.elapsed()).max(Duration::from_millis(100))).await;
    }
    let mut latencies = Latencies::new();
    let patience = until.saturating_sub(clock::now()) + grace + 12 * trial.time;
    let (start, cpu) = (Instant::now(), Cpu::now(&trial.stage.processes()));
    let told = async {
        while let Some(late) = line.join_next().await {
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

/// How long all may take to hold and to stand in line: by keys a second that each contender manages in every case.
fn allowed(trial: &Trial<'_>) -> Duration {
    let a_second: u32 = match trial.contender {
        Contender::Embedded => 3000,
        Contender::Mongod => 1000,
        Contender::ReplicaSet => 500,
        Contender::EtcdThree => 200,
        _ => 350,
    };
    Duration::from_secs(4) + Duration::from_secs_f64(trial.scale as f64 / f64::from(a_second))
}

/// Stands in line, and returns how long after `due` it was told.
async fn take<P: Peer>(mut waiter: P, key: String, due: Duration) -> Result<Duration> {
    waiter.stand(key, TTL).await?;
    let told = clock::now();
    // A server that keeps whole seconds ends a lease when it likes within them.
    let slack = Duration::from_secs(1);
    ensure!(told + slack >= due, "granted {:?} too early", due - told);
    Ok(told.saturating_sub(due))
}
