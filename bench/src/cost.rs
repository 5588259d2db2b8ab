//! The processor time of a touch, at rising numbers of leases.

use anyhow::{Result, ensure};
use tokio::time::sleep;

use crate::connection::Connection;
use crate::cpu::{Cpu, under_load};
use crate::open_loop::OpenLoop;
use crate::sample::Sample;
use crate::trial::Trial;

/// The leases of a stream.
const LEASES_PER_STREAM: usize = 100;

pub(crate) async fn run<P: Connection>(trial: &Trial<'_>) -> Result<Sample> {
    let processes = trial.deployment.processes();
    // Each lease is touched once in this time, because the TTL below is three times as long. With
    // the default of five seconds the TTL is the usual 30 s.
    let time = 2 * trial.time;
    let cpu = Cpu::now(&processes);
    sleep(time).await;
    let idle = under_load(&cpu.spent());
    let mut load = OpenLoop::<P>::new(trial.deployment.address()?, 3 * time, LEASES_PER_STREAM).await?;
    load.grow(trial.scale).await?;
    sleep(time / 4).await;
    let (mut sample, lost) = load.measure(time, &processes).await?;
    ensure!(lost * 100 <= trial.scale, "{lost} of {} leases are lost", trial.scale);
    let busy: f64 =
        sample.cpu.iter().filter(|(kind, _)| *kind != crate::cpu::LOAD).map(|(_, part)| part).sum();
    let touches = sample.figure("touches/s").unwrap_or_default();
    sample.note("µs", 1e6 * (busy - idle.as_secs_f64() / time.as_secs_f64()) / touches);
    Ok(sample)
}
