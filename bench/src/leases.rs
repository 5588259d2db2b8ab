//! Pairs through the daemon.

use anyhow::{Context, Result};
use leased_client::v1::lease_service_client::LeaseServiceClient;
use leased_client::v1::{AcquireRequest, ReleaseRequest};
use tokio::task::JoinSet;
use tokio::time::Instant;
use uuid::Uuid;

use crate::pairs::Round;
use crate::report::Pairs;

/// Runs every caller until the time is over.
pub(crate) async fn run(endpoint: &str, round: Round) -> Result<Pairs> {
    let mut connections = Vec::new();
    for _ in 0..round.connections {
        connections.push(LeaseServiceClient::connect(endpoint.to_owned()).await?);
    }
    let start = Instant::now();
    let mut callers = JoinSet::new();
    for (number, client) in (0..round.callers).zip(connections.into_iter().cycle()) {
        let mut client = client.clone();
        callers.spawn(async move {
            let mut pairs = Pairs::new();
            while start.elapsed() < round.time {
                let begun = Instant::now();
                let request = AcquireRequest {
                    key: format!("bench/{number}"),
                    lease_id: Uuid::new_v4().to_string(),
                    owner: "bench".to_owned(),
                    ..AcquireRequest::default()
                };
                let granted = client.acquire(request).await?.into_inner();
                let lease = Some(granted.lease.context("a grant without a lease")?);
                client.release(ReleaseRequest { lease }).await?;
                pairs.add(begun.elapsed());
            }
            Ok(pairs)
        });
    }
    Pairs::join(callers, start).await
}
