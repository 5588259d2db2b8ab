//! Calls that ask no store: how many pairs a second the daemon's gRPC stack and this load generator allow at most.

use anyhow::Result;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tonic::codegen::http::Uri;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use crate::connection::Connection;
use crate::pairs::Round;
use crate::report::Pairs;

/// Runs every caller until the time is over.
pub(crate) async fn run(endpoint: &str, round: Round) -> Result<Pairs> {
    let origin: Uri = endpoint.parse()?;
    let mut connections = Vec::new();
    for _ in 0..round.connections {
        connections.push(HealthClient::with_origin(Connection::to(&origin).await?, origin.clone()));
    }
    let start = Instant::now();
    let mut callers = JoinSet::new();
    for (_, client) in (0..round.callers).zip(connections.into_iter().cycle()) {
        let mut client = client.clone();
        callers.spawn(async move {
            let mut pairs = Pairs::new();
            while start.elapsed() < round.time {
                let begun = Instant::now();
                client.check(HealthCheckRequest::default()).await?;
                client.check(HealthCheckRequest::default()).await?;
                pairs.add(begun.elapsed());
            }
            Ok(pairs)
        });
    }
    Pairs::join(callers, start).await
}
