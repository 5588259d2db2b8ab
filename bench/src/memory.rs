//! How much of a server's memory leases and streams take.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::time::sleep;

use crate::connection::{Connection, Turn, all, connections};
use crate::cpu::{Processes, resident};
use crate::keepalives;
use crate::sample::Sample;
use crate::trial::Trial;

/// The TTL: longer than any run.
const TTL: Duration = Duration::from_secs(600);
/// The leases of a stream.
const LEASES_PER_STREAM: usize = 1000;
/// How many callers acquire leases at the same time.
const CALLERS: usize = 512;
/// How long to wait for a server to free the memory of its last answers. A server does not show
/// when it has done so.
const SETTLE: Duration = Duration::from_secs(1);

/// Measures the memory of leases on shared streams.
pub(crate) async fn of_leases<P: Connection>(trial: &Trial<'_>) -> Result<Sample> {
    let connections = connections::<P>(trial.deployment.address()?, CALLERS).await?;
    // The memory for many concurrent acquires is allocated once, and must not count for the leases.
    let warm = acquire(&connections, trial.scale.div_ceil(5)).await?;
    let before = Memory::of(trial)?;
    let mut held = acquire(&connections, trial.scale).await?;
    let mut streams = Vec::new();
    for number in 0..trial.scale.div_ceil(LEASES_PER_STREAM) {
        let some = held.split_off(held.len() - held.len().min(LEASES_PER_STREAM));
        let mut connection = connections[number % connections.len()].clone();
        streams.push(connection.keep(some, TTL).await?);
    }
    let sample = before.grown(trial, streams).await;
    drop(warm);
    sample
}

/// Measures the memory of streams with one lease each.
pub(crate) async fn of_streams<P: Connection>(trial: &Trial<'_>) -> Result<Sample> {
    let address = trial.deployment.address()?;
    let warm = keepalives::open::<P>(address, trial.scale.div_ceil(20), TTL).await?;
    let before = Memory::of(trial)?;
    let streams = keepalives::open::<P>(address, trial.scale, TTL).await?;
    let sample = before.grown(trial, streams).await;
    drop(warm);
    sample
}

async fn acquire<P: Connection>(connections: &[P], count: usize) -> Result<Vec<P::Held>> {
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
                .map(|(_, id)| resident(id).context("the memory of a process is unknown"))
                .sum::<Result<u64>>()
        };
        Ok(Self {
            servers: sum(trial.deployment.server_processes())?,
            all: sum(trial.deployment.processes())?,
        })
    }

    /// Returns by how much memory has grown for each lease or stream, after each lease has been
    /// touched once more.
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
