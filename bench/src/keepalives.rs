//! Keepalives: streams with one lease each, and one message in flight on each stream.

use std::time::Duration;

use anyhow::Result;

use crate::closed_loop;
use crate::connection::{Connection, all, connections, hold};
use crate::sample::Sample;
use crate::trial::Trial;

/// The usual TTL. leased coalesces touches within a tenth of it.
const TTL: Duration = Duration::from_secs(30);

pub(crate) async fn run<P: Connection>(trial: &Trial<'_>) -> Result<Sample> {
    let streams = open::<P>(trial.deployment.address()?, trial.scale, TTL).await?;
    closed_loop::run(streams, trial.time, &trial.deployment.processes(), "acks/s").await
}

/// Opens `count` streams with one lease each.
pub(crate) async fn open<P: Connection>(
    address: &str,
    count: usize,
    ttl: Duration,
) -> Result<Vec<P::Stream>> {
    let connections = connections::<P>(address, count).await?;
    let leases = hold(&connections, &Trial::prefix(), count, ttl).await?;
    let opened = connections.iter().cycle().zip(leases).map(|(connection, (held, _))| {
        let mut connection = connection.clone();
        async move { connection.keep(vec![held], ttl).await }
    });
    all(opened).await
}
