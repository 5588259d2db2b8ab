//! From the moment when a silent holder's lease may be taken to the moment when the next in line is told.
//!
//! All run on one host, so the clock of the store is the clock of this program.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use leased_client::v1::{AcquireRequest, ListRequest};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::fleet::{Fleet, Leases, Options, Store};
use crate::report::Latencies;

/// Callers of one connection; a daemon allows 256 calls on each.
const PER_CONNECTION: usize = 200;

/// Calls that ask for a lease at once: more than the store does in its time would be refused.
const AT_ONCE: usize = 2000;

/// Leases of holders that fall silent together, each with one in line.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    options: Options,
    /// Leases that run out together.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    keys: u32,
    /// From the first acquire to the end of all the leases, in seconds: long enough for all to be held and waited for.
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u64).range(2..=600))]
    seconds: u64,
}

pub(crate) async fn run(args: Args) -> Result<()> {
    for &store in args.options.stores() {
        let fleet = Fleet::start(store, &args.options).await?;
        let grace = if store == Store::Embedded { Duration::ZERO } else { Duration::from_secs(1) };
        for round in 1..=args.options.rounds {
            let latencies = round_of(&fleet, grace, &args, round).await?;
            latencies.print(&format!("round {round}  {store:?}, {} keys", args.keys));
        }
    }
    Ok(())
}

async fn round_of(fleet: &Fleet, grace: Duration, args: &Args, round: u32) -> Result<Latencies> {
    let until = now() + Duration::from_secs(args.seconds);
    let room = Arc::new(Semaphore::new(AT_ONCE));
    let mut held = JoinSet::new();
    let mut line = JoinSet::new();
    let numbers: Vec<u32> = (0..args.keys).collect();
    for some in numbers.chunks(PER_CONNECTION) {
        let (holder, waiter) = (fleet.client(0).await?, fleet.client(fleet.len() - 1).await?);
        for number in some {
            let key = format!("takeover/{round}/{number:06}");
            held.spawn(hold(Arc::clone(&room), holder.clone(), waiter.clone(), key, until));
        }
    }
    while let Some(joined) = held.join_next().await {
        let (waiter, key, end) = joined??;
        line.spawn(take(waiter, key, end + grace));
    }
    let mut client = fleet.client(0).await?;
    let in_line = in_line(&mut client, &format!("takeover/{round}/")).await?;
    ensure!(now() < until, "{in_line} stood in line when the leases ran out: allow more seconds");
    let mut latencies = Latencies::new();
    while let Some(late) = line.join_next().await {
        latencies.add(late??);
    }
    Ok(latencies)
}

/// Takes a lease that ends at `until`, and falls silent.
async fn hold(
    room: Arc<Semaphore>,
    mut client: Leases,
    waiter: Leases,
    key: String,
    until: Duration,
) -> Result<(Leases, String, Duration)> {
    let _permit = room.acquire().await?;
    let ttl = until.checked_sub(now()).filter(|ttl| ttl.as_millis() >= 100).context("too few seconds")?;
    let request =
        AcquireRequest { key: key.clone(), ttl: Some(ttl.try_into()?), ..AcquireRequest::default() };
    let granted = client.acquire(request).await?.into_inner();
    let end = granted.expire_time.context("an end")?;
    let end = Duration::new(u64::try_from(end.seconds)?, u32::try_from(end.nanos)?);
    Ok((waiter, key, end))
}

/// Stands in line, and returns how long after `due` it was told.
async fn take(mut client: Leases, key: String, due: Duration) -> Result<Duration> {
    let (ttl, wait) = (Duration::from_secs(600), Duration::from_secs(600));
    let request = AcquireRequest {
        key,
        ttl: Some(ttl.try_into()?),
        wait: Some(wait.try_into()?),
        ..AcquireRequest::default()
    };
    let granted = client.acquire(request).await?.into_inner();
    let told = now();
    ensure!(granted.waited && told >= due, "granted too early");
    Ok(told - due)
}

/// Waits until every key under `prefix` has one in line, for as long as there is time; gives how many have.
async fn in_line(client: &mut Leases, prefix: &str) -> Result<usize> {
    let start = Instant::now();
    loop {
        let (mut keys, mut waited, mut page_token) = (0, 0, String::new());
        loop {
            let request = ListRequest {
                prefix: prefix.to_owned(),
                page_size: 1000,
                page_token,
                ..ListRequest::default()
            };
            let page = client.list(request).await?.into_inner();
            keys += page.leases.len();
            waited += page.leases.iter().filter(|lease| !lease.waiters.is_empty()).count();
            page_token = page.next_page_token;
            if page_token.is_empty() {
                break;
            }
        }
        if waited == keys || start.elapsed() > Duration::from_secs(60) {
            return Ok(waited);
        }
        sleep(Duration::from_millis(100)).await;
    }
}

#[expect(clippy::disallowed_methods, reason = "one host, so this is the store's clock")]
fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}
