//! Processor time for each touch of leases that are kept alive, as their number grows.

use anyhow::{Result, ensure};
use tokio::time::sleep;

use crate::cpu::{Cpu, under_load};
use crate::crowd::Crowd;
use crate::peer::Peer;
use crate::sample::Sample;
use crate::trial::Trial;

/// Leases of a stream.
const A_STREAM: usize = 100;

pub(crate) async fn run<P: Peer>(trial: &Trial<'_>) -> Result<Sample> {
    let processes = trial.stage.processes();
    // With five seconds, the usual TTL of 30 s, and every lease is touched once.
    let time = 2 * trial.time;
    let cpu = Cpu::now(&processes);
    sleep(time).await;
    let idle = under_load(&cpu.spent());
    let mut crowd = Crowd::<P>::new(trial.stage.address()?, 3 * time, A_STREAM).await?;
    crowd.grow(trial.scale).await?;
    sleep(time / 4).await;
    let (mut sample, lost) = crowd.watch(time, &processes).await?;
    ensure!(lost * 100 <= trial.scale, "{lost} of {} leases are lost", trial.scale);
    let busy: f64 =
        sample.cpu.iter().filter(|(kind, _)| *kind != crate::cpu::LOAD).map(|(_, part)| part).sum();
    let touches = sample.figure("touches/s").unwrap_or_default();
    sample.note("µs", 1e6 * (busy - idle.as_secs_f64() / time.as_secs_f64()) / touches);
    Ok(sample)
}
