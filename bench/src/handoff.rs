//! From the call of a release to the moment when the next in line is told, at the same daemon and at another.

use std::collections::VecDeque;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use leased_client::v1::{AcquireRequest, AcquireResponse, GetRequest, ReleaseRequest};
use tokio::time::{Instant, sleep};

use crate::fleet::{Fleet, Leases, Options};
use crate::report::Latencies;

const TTL: Duration = Duration::from_secs(600);

/// Handoffs from a holder to the next in line.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    options: Options,
    /// Handoffs of each kind in a round.
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    handoffs: u32,
    /// How many stand in line.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1000))]
    waiters: u64,
}

pub(crate) async fn run(args: Args) -> Result<()> {
    for &store in args.options.stores() {
        let fleet = Fleet::start(store, &args.options).await?;
        let last = fleet.len() - 1;
        let kinds = [(0, "same daemon"), (last, "another")];
        let kinds = if last == 0 { &kinds[..1] } else { &kinds[..] };
        for round in 1..=args.options.rounds {
            for (daemon, kind) in kinds {
                let latencies = round_of(&fleet, *daemon, &args).await?;
                latencies.print(&format!("round {round}  {store:?}, {kind}"));
            }
        }
    }
    Ok(())
}

/// The lease goes round among those who wait: the one who holds gives it back and stands in line again.
async fn round_of(fleet: &Fleet, other: usize, args: &Args) -> Result<Latencies> {
    let key = format!("handoff/{}", uuid::Uuid::new_v4());
    let mut holding = fleet.client(0).await?;
    let mut held = acquire(holding.clone(), &key).await?;
    let mut line = VecDeque::new();
    for place in 1..=args.waiters {
        line.push_back(tokio::spawn(stand(fleet.client(other).await?, key.clone())));
        stands(&mut holding, &key, place).await?;
    }
    let mut latencies = Latencies::new();
    for _ in 0..args.handoffs {
        let next = line.pop_front().context("somebody in line")?;
        let called = Instant::now();
        holding.release(ReleaseRequest { lease: held.lease }).await?;
        let (told, answer) = next.await??;
        latencies.add(told.saturating_duration_since(called));
        held = answer;
        line.push_back(tokio::spawn(stand(fleet.client(other).await?, key.clone())));
        stands(&mut holding, &key, args.waiters).await?;
    }
    Ok(latencies)
}

async fn stand(client: Leases, key: String) -> Result<(Instant, AcquireResponse)> {
    let answer = acquire(client, &key).await?;
    Ok((Instant::now(), answer))
}

async fn acquire(mut client: Leases, key: &str) -> Result<AcquireResponse> {
    let request = AcquireRequest {
        key: key.to_owned(),
        owner: "bench".to_owned(),
        ttl: Some(TTL.try_into()?),
        wait: Some(TTL.try_into()?),
        ..AcquireRequest::default()
    };
    Ok(client.acquire(request).await?.into_inner())
}

/// Waits until so many stand in line.
async fn stands(client: &mut Leases, key: &str, count: u64) -> Result<()> {
    let start = Instant::now();
    loop {
        let seen = client.get(GetRequest { key: key.to_owned() }).await?.into_inner();
        if seen.lease.is_some_and(|lease| lease.waiters.len() as u64 == count) {
            return Ok(());
        }
        ensure!(start.elapsed() < Duration::from_secs(30), "nobody comes into line");
        sleep(Duration::from_millis(1)).await;
    }
}
