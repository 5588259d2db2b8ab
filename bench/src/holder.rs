//! What the client crate costs its user: pairs beside those of the bare stub, and memory and processor time for leases that are
//! held.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use leased_client::{Client, Lease};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::pairs::Round;
use crate::process::{Cpu, Process};
use crate::report::Pairs;

/// Leases that are acquired at once.
const AT_ONCE: u32 = 250;

/// Memory and processor time of a client that holds many leases of a daemon with the embedded store.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Leases to hold.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(100..=10_000))]
    leases: u32,
    /// Their TTL in seconds.
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u64).range(1..=3600))]
    ttl: u64,
    /// For how many TTLs to hold them.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    ttls: u32,
    /// The daemon to start [default: the one beside this program].
    #[arg(long)]
    daemon: Option<std::path::PathBuf>,
}

pub(crate) async fn hold(args: Args) -> Result<()> {
    let (address, process) = Process::leased(args.daemon.as_deref(), None)?;
    let client = Client::connect([&address]).await?;
    let ttl = Duration::from_secs(args.ttl);
    // What acquiring at once takes is needed but once.
    drop(acquire(&client, 4 * AT_ONCE, ttl).await?);
    client.settle().await;
    let before = resident()?;
    let leases = acquire(&client, args.leases, ttl).await?;
    let after = resident()?;

    let cpu = Cpu::now(&[(process.name(), process.id())]);
    sleep(ttl * args.ttls).await;
    let held = leases.iter().filter(|lease| lease.is_held()).count();
    println!("{held} of {} leases held after {} TTLs", args.leases, args.ttls);
    let each = |now: usize| now.saturating_sub(before) / leases.len();
    println!(
        "{} bytes of memory a lease when acquired, {} after the last TTL",
        each(after),
        each(resident()?)
    );
    for (name, spent) in cpu.spent() {
        println!("{name}: {:.1} % of a core", 100.0 * spent.as_secs_f64() / (ttl * args.ttls).as_secs_f64());
    }
    ensure!(held == leases.len(), "leases were lost");
    Ok(())
}

async fn acquire(client: &Client, count: u32, ttl: Duration) -> Result<Vec<Lease>> {
    let mut leases = Vec::new();
    let numbers: Vec<u32> = (0..count).collect();
    for some in numbers.chunks(AT_ONCE as usize) {
        let mut acquiring = JoinSet::new();
        for number in some {
            acquiring.spawn(client.acquire(format!("held/{number:06}")).ttl(ttl).into_future());
        }
        while let Some(lease) = acquiring.join_next().await {
            leases.push(lease??);
        }
    }
    Ok(leases)
}

/// The memory of this program that is in use, in bytes.
fn resident() -> Result<usize> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kilobytes: usize = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kilobytes * 1024)
}

/// Runs every caller until the time is over.
pub(crate) async fn run(endpoint: &str, round: Round) -> Result<Pairs> {
    let mut clients = Vec::new();
    for _ in 0..round.connections {
        clients.push(Client::connect([endpoint]).await?);
    }
    let start = Instant::now();
    let mut callers = JoinSet::new();
    for (number, client) in (0..round.callers).zip(clients.into_iter().cycle()) {
        callers.spawn(async move {
            let mut pairs = Pairs::new();
            while start.elapsed() < round.time {
                let begun = Instant::now();
                let lease = client.acquire(format!("bench/{number}")).await?;
                lease.release().await?;
                pairs.add(begun.elapsed());
            }
            Ok(pairs)
        });
    }
    Pairs::join(callers, start).await
}
