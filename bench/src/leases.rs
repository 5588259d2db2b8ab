//! Pairs through the daemon.

use anyhow::{Context, Result};
use leased_client::v1::lease_service_client::LeaseServiceClient;
use leased_client::v1::{AcquireRequest, ReleaseRequest};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tonic::codegen::http::Uri;
use uuid::{Builder, Uuid};

use crate::connection::Connection;
use crate::pairs::Round;
use crate::report::Pairs;

/// Runs every caller until the time is over.
pub(crate) async fn run(endpoint: &str, round: Round) -> Result<Pairs> {
    let origin: Uri = endpoint.parse()?;
    let mut connections = Vec::new();
    for _ in 0..round.connections {
        connections.push(LeaseServiceClient::with_origin(Connection::to(&origin).await?, origin.clone()));
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
                    lease_id: new_id().to_string(),
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

/// An id without a system call: the system's random numbers would cost as much as a tenth of the call.
fn new_id() -> Uuid {
    Builder::from_random_bytes(fastrand::u128(..).to_ne_bytes()).into_uuid()
}
