//! Acquire and release pairs a second: through leased, and with one `findOneAndUpdate` for each call, alternating on
//! the same MongoDB in the same run. `cargo run --release -p leased-bench`

mod direct;
mod leases;
mod process;
mod report;

use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use throwaway_mongodb::Mongod;

use report::Report;

/// Measures acquire and release pairs through leased beside the same work done with plain findOneAndUpdate.
#[derive(Debug, Parser)]
struct Args {
    /// Callers at once, each with a key of its own.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    callers: u64,
    /// Seconds of each round.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// Rounds of each kind, alternating; the medians count.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=99))]
    rounds: u64,
    /// gRPC connections that the callers share.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=1000))]
    connections: u64,
    /// The MongoDB to use [default: a throwaway one].
    #[arg(long)]
    mongodb_uri: Option<String>,
    /// The daemon to start [default: the one beside this program].
    #[arg(long)]
    daemon: Option<std::path::PathBuf>,
}

/// What one round is.
#[derive(Debug, Clone, Copy)]
struct Round {
    callers: u64,
    connections: u64,
    time: Duration,
}

#[tokio::main]
async fn main() -> Result<()> {
    let args = Args::parse();
    let mongod = match args.mongodb_uri {
        Some(_) => None,
        None => Some(Mongod::start().await?),
    };
    let uri = args.mongodb_uri.as_deref().or(mongod.as_ref().map(Mongod::uri)).unwrap_or_default().to_owned();
    let daemon = process::Daemon::start(args.daemon, &uri)?;
    let watched = [("leased", Some(daemon.id())), ("mongod", mongod.as_ref().and_then(Mongod::pid))];
    let round = Round {
        callers: args.callers,
        connections: args.connections,
        time: Duration::from_secs(args.seconds),
    };

    let mut report = Report::default();
    for number in 1..=args.rounds {
        let cpu = process::Cpu::now(&watched);
        let pairs = leases::run(daemon.endpoint(), round).await?;
        report.add("leased", number, pairs, &cpu.spent());
        let cpu = process::Cpu::now(&watched);
        let pairs = direct::run(&uri, round).await?;
        report.add("findOneAndUpdate", number, pairs, &cpu.spent());
    }
    report.print(round);
    Ok(())
}
