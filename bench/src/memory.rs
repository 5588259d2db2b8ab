//! What leases and streams take of a server's memory.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::time::sleep;

use crate::cpu::{Processes, resident};
use crate::keepalives;
use crate::peer::{Peer, Turn, all, connections};
use crate::sample::Sample;
use crate::trial::Trial;

/// Longer than any run.
const TTL: Duration = Duration::from_secs(600);
/// Leases of a stream.
const A_STREAM: usize = 1000;
/// Callers that take leases at once.
const CALLERS: usize = 512;
/// Until what the last answers were made of has been freed; nothing outside of a server says when that is.
const SETTLE: Duration = Duration::from_secs(1);

/// Memory of leases on shared streams.
pub(crate) async fn of_leases<P: Peer>(trial: &Trial<'_>) -> Result<Sample> {
    let connections = connections::<P>(trial.stage.address()?, CALLERS).await?;
    // What taking many at once needs is needed but once.
    let warm = acquire(&connections, trial.scale.div_ceil(5)).await?;
    let before = Memory::of(trial)?;
    let mut held = acquire(&connections, trial.scale).await?;
    let mut streams = Vec::new();
    for number in 0..trial.scale.div_ceil(A_STREAM) {
        let some = held.split_off(held.len() - held.len().min(A_STREAM));
        let mut connection = connections[number % connections.len()].clone();
        streams.push(connection.keep(some, TTL).await?);
    }
    let sample = before.grown(trial, streams).await;
    drop(warm);
    sample
}

/// Memory of streams with a lease each.
pub(crate) async fn of_streams<P: Peer>(trial: &Trial<'_>) -> Result<Sample> {
    let address = trial.stage.address()?;
    let warm = keepalives::open::<P>(address, trial.scale.div_ceil(20), TTL).await?;
    let before = Memory::of(trial)?;
    let streams = keepalives::open::<P>(address, trial.scale, TTL).await?;
    let sample = before.grown(trial, streams).await;
    drop(warm);
    sample
}

async fn acquire<P: Peer>(connections: &[P], count: usize) -> Result<Vec<P::Held>> {
    let prefix = Trial::prefix();
    let acquired = connections.iter().cycle().zip(0..count).map(|(connection, number)| {
        let (mut connection, key) = (connection.clone(), format!("{prefix}/{number:06}"));
        async move { connection.acquire(key, TTL).await }
    });
    all(acquired).await
}

/// Memory in use, in bytes.
struct Memory {
    servers: u64,
    all: u64,
}

impl Memory {
    fn of(trial: &Trial<'_>) -> Result<Self> {
        let sum = |processes: Processes| {
            processes
                .into_iter()
                .map(|(_, id)| resident(id).context("no memory is known"))
                .sum::<Result<u64>>()
        };
        Ok(Self { servers: sum(trial.stage.server_processes())?, all: sum(trial.stage.processes())? })
    }

    /// What came since for each of so many, once everything has been touched once more.
    async fn grown<S: Turn>(self, trial: &Trial<'_>, mut streams: Vec<S>) -> Result<Sample> {
        let mut kept = 0;
        for stream in &mut streams {
            kept += stream.turn().await?;
        }
        ensure!(kept == trial.scale as u64, "{kept} of {} leases are kept", trial.scale);
        sleep(SETTLE).await;
        let now = Self::of(trial)?;
        let mut sample = Sample::default();
        for (name, before, now) in [("B", self.servers, now.servers), ("B with database", self.all, now.all)]
        {
            #[expect(clippy::cast_precision_loss, reason = "bytes of a process are below 2^52")]
            sample.note(name, now.saturating_sub(before) as f64 / trial.scale as f64);
        }
        Ok(sample)
    }
}
