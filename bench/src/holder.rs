//! The cost of the client crate: pairs of acquire and release for the comparison with the stub, and
//! the memory and processor time of held leases.

use std::io::{Write, stdout};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use leased_client::{Client, Lease};
use tokio::time::sleep;

use crate::connection::{Connection, NoStream, all};
use crate::cpu::{Cpu, resident};
use crate::server::{Daemon, Server};

/// Memory and processor time of a client that holds many leases of a daemon with the embedded
/// store.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The number of leases.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(100..=10_000))]
    leases: u32,
    /// The TTL of the leases, in seconds.
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u64).range(1..=3600))]
    ttl: u64,
    /// How many TTLs to hold the leases for.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    ttls: u32,
    /// The daemon to start [default: the one beside this program].
    #[arg(long)]
    daemon: Option<std::path::PathBuf>,
}

pub(crate) async fn hold(args: Args) -> Result<()> {
    let server = Server::leased(Daemon { program: args.daemon.as_deref(), ..Daemon::default() }).await?;
    let client = Client::connect([server.address()]).await?;
    let ttl = Duration::from_secs(args.ttl);
    // The memory for many concurrent acquires is allocated once, and must not count for the leases.
    drop(acquire(&client, 1000, ttl).await?);
    client.settle().await;
    let before = own_memory()?;
    let leases = acquire(&client, args.leases, ttl).await?;
    let after = own_memory()?;

    let cpu = Cpu::now(&server.process().into_iter().collect());
    sleep(ttl * args.ttls).await;
    let held = leases.iter().filter(|lease| lease.is_held()).count();
    let mut out = stdout();
    writeln!(out, "{held} of {} leases held after {} TTLs", args.leases, args.ttls)?;
    let each = |now: u64| now.saturating_sub(before) / leases.len() as u64;
    writeln!(
        out,
        "{} bytes of memory a lease when acquired, {} after the last TTL",
        each(after),
        each(own_memory()?)
    )?;
    for (name, spent) in cpu.spent() {
        let share = 100.0 * spent.as_secs_f64() / (ttl * args.ttls).as_secs_f64();
        writeln!(out, "{name}: {share:.1} % of a core")?;
    }
    ensure!(held == leases.len(), "leases were lost");
    Ok(())
}

async fn acquire(client: &Client, count: u32, ttl: Duration) -> Result<Vec<Lease>> {
    let acquiring = (0..count).map(|number| {
        let acquire = client.acquire(format!("held/{number:06}")).ttl(ttl);
        async move { Ok(acquire.await?) }
    });
    all(acquiring).await
}

fn own_memory() -> Result<u64> {
    resident(std::process::id()).context("the memory of the process is unknown")
}

/// A connection by the client crate.
#[derive(Debug, Clone)]
pub(crate) struct Holder(Client);

impl Connection for Holder {
    type Held = Lease;
    type Stream = NoStream;

    async fn connect(address: &str) -> Result<Self> {
        Ok(Self(Client::connect([address]).await?))
    }

    async fn acquire(&mut self, key: String, ttl: Duration) -> Result<Lease> {
        Ok(self.0.acquire(key).ttl(ttl).await?)
    }

    async fn release(&mut self, lease: Lease) -> Result<()> {
        lease.release().await?;
        Ok(())
    }
}
