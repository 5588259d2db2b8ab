//! From the call of a release to the moment when the next in line is told, at the same daemon and at another.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use leased_client::v1::{AcquireRequest, AcquireResponse, GetRequest, ReleaseRequest};
use tokio::time::{Instant, sleep};

use crate::fleet::{Fleet, Leases, Store};
use crate::report::Latencies;

const TTL: Duration = Duration::from_secs(600);

/// Handoffs from a holder to the next in line.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Over which stores [default: all].
    #[arg(value_enum)]
    stores: Vec<Store>,
    /// Handoffs of each kind in a round.
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    handoffs: u32,
    /// Rounds, in which the kinds alternate.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=99))]
    rounds: u32,
    /// How many stand in line.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1000))]
    waiters: u64,
    /// Daemons over MongoDB: with two, a handoff at one and a handoff to the other; with one, which has no change feed,
    /// only the former.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=2))]
    daemons: u32,
    /// The daemon to start [default: the one beside this program].
    #[arg(long)]
    daemon: Option<PathBuf>,
}

pub(crate) async fn run(args: Args) -> Result<()> {
    let stores = if args.stores.is_empty() { Store::value_variants() } else { &args.stores };
    for &store in stores {
        let fleet = Fleet::start(store, args.daemons as usize, args.daemon.as_deref()).await?;
        let is_alone = store == Store::Embedded || args.daemons == 1;
        let kinds = if is_alone { &["same daemon"][..] } else { &["same daemon", "another"] };
        // Daemons hear of each other within a second or two.
        sleep(Duration::from_secs(3)).await;
        for round in 1..=args.rounds {
            for (number, kind) in kinds.iter().enumerate() {
                let latencies = round_of(&fleet, number, &args).await?;
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
