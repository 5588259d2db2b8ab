//! Waits for a lease, holds it on a keepalive stream for a while, and gives it back.
//!
//! `cargo run -p leased-client --example hold -- KEY [SECONDS]`

use std::time::Duration;

use anyhow::{Context, bail};
use leased_client::DEFAULT_ENDPOINT;
use leased_client::v1::keep_alive_result::Outcome;
use leased_client::v1::lease_service_client::LeaseServiceClient;
use leased_client::v1::{AcquireRequest, KeepAliveRequest, LeaseRef, ReleaseRequest};
use tokio::sync::mpsc;
use tokio::time::{Instant, interval, sleep_until, timeout_at};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

const TTL: Duration = Duration::from_secs(10);
/// Kept in hand for the difference between what this clock and the daemon's call ten seconds.
const MARGIN: Duration = Duration::from_millis(500);

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let key = arguments.next().context("usage: hold KEY [SECONDS]")?;
    let seconds = arguments.next().map_or(Ok(15), |text| text.parse())?;

    let mut leased = LeaseServiceClient::connect(DEFAULT_ENDPOINT).await?;
    let request = AcquireRequest {
        key,
        owner: format!("hold:{}", std::process::id()),
        ttl: Some(prost_types::Duration { seconds: 10, nanos: 0 }),
        wait: Some(prost_types::Duration { seconds: 60, nanos: 0 }),
        ..AcquireRequest::default()
    };
    let granted = leased.acquire(request).await?.into_inner();
    let lease = granted.lease.context("a grant names its lease")?;
    println!("holding {} with fencing token {}", lease.key, granted.fencing_token);

    let work_is_done = Instant::now() + Duration::from_secs(seconds);
    tokio::select! {
        lost = keep_alive(leased.clone(), lease.clone()) => lost?,
        () = sleep_until(work_is_done) => {}
    }
    leased.release(ReleaseRequest { lease: Some(lease) }).await?;
    println!("released");
    Ok(())
}

/// Renews the lease every third of its TTL. Returns only when the lease is lost, or cannot be relied on any more.
async fn keep_alive(mut leased: LeaseServiceClient<Channel>, lease: LeaseRef) -> anyhow::Result<()> {
    let (requests, stream) = mpsc::channel(1);
    let mut answers = leased.keep_alive(ReceiverStream::new(stream)).await?.into_inner();
    let mut ticks = interval(TTL / 3);
    // The grant may have waited on its way here: belief starts with the first answer on the stream.
    let mut deadline = Instant::now() + TTL;
    for sequence in 1.. {
        timeout_at(deadline, ticks.tick()).await.context("no word from the daemon in time")?;
        let sent_at = Instant::now();
        requests.send(KeepAliveRequest { leases: vec![lease.clone()], sequence }).await?;
        let answer =
            timeout_at(deadline, answers.message()).await.context("no word from the daemon in time")??;
        let results = answer.context("the daemon ended the stream")?.results;
        match results.into_iter().next().and_then(|result| result.outcome) {
            Some(Outcome::Kept(kept)) => {
                let remaining = kept.remaining.unwrap_or_default();
                let remaining = Duration::try_from(remaining).unwrap_or_default();
                deadline = sent_at + remaining.saturating_sub(MARGIN);
                println!("kept, {remaining:.1?} remaining");
            }
            Some(Outcome::Lost(lost)) => bail!("the lease is lost: {:?}", lost.reason()),
            None => bail!("an answer without an outcome"),
        }
    }
    Ok(())
}
