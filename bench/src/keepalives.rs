//! Keepalives: streams that carry a lease each, with one message in flight on each.

use std::time::Duration;

use anyhow::Result;

use crate::closed;
use crate::peer::{Peer, all, connections, hold};
use crate::sample::Sample;
use crate::trial::Trial;

/// The TTL that is usual; a tenth of it is what leased answers from memory.
const TTL: Duration = Duration::from_secs(30);

pub(crate) async fn run<P: Peer>(trial: &Trial<'_>) -> Result<Sample> {
    let streams = open::<P>(trial.stage.address()?, trial.scale, TTL).await?;
    closed::run(streams, trial.time, &trial.stage.processes(), "acks/s").await
}

/// So many streams with a lease each.
pub(crate) async fn open<P: Peer>(address: &str, count: usize, ttl: Duration) -> Result<Vec<P::Stream>> {
    let connections = connections::<P>(address, count).await?;
    let leases = hold(&connections, &Trial::prefix(), count, ttl).await?;
    let opened = connections.iter().cycle().zip(leases).map(|(connection, (held, _))| {
        let mut connection = connection.clone();
        async move { connection.keep(vec![held], ttl).await }
    });
    all(opened).await
}
