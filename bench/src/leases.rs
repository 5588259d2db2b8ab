//! Pairs through the daemon.

use anyhow::{Context, Result};
use leased_client::v1::lease_service_client::LeaseServiceClient;
use leased_client::v1::{AcquireRequest, ReleaseRequest};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tonic::client::GrpcService;
use tonic::codegen::http::Uri;
use tonic::codegen::{Body, Bytes, StdError};
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
    pairs(connections, round).await
}

/// The same through tonic's channels, as users of the generated stub have it.
pub(crate) async fn through_channels(endpoint: &str, round: Round) -> Result<Pairs> {
    let mut connections = Vec::new();
    for _ in 0..round.connections {
        connections.push(LeaseServiceClient::connect(endpoint.to_owned()).await?);
    }
    pairs(connections, round).await
}

async fn pairs<T>(connections: Vec<LeaseServiceClient<T>>, round: Round) -> Result<Pairs>
where
    T: GrpcService<tonic::body::Body, Error: Into<StdError>, Future: Send> + Clone + Send + 'static,
    T::ResponseBody: Body<Data = Bytes, Error: Into<StdError> + Send> + Send + 'static,
{
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
