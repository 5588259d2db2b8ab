//! Load for leased, alone and beside others. Every workload is bounded in count and time.
//!
//! `cargo build --release -p leased -p leased-bench`, then `cargo run --release -p leased-bench -- --help`

/// What gRPC alone allows.
mod ceiling;
/// What calls go through.
mod connection;
/// The same with a plain `findOneAndUpdate` for each call.
mod direct;
/// The same with etcd.
mod etcd;
/// Daemons over a store.
mod fleet;
/// How soon the next in line is told.
mod handoff;
/// Pairs through the client crate, and what a lease costs its holder.
mod holder;
/// Pairs through leased.
mod leases;
/// Acquire and release pairs, side by side.
mod pairs;
/// Processes and what they spend.
mod process;
/// What was measured.
mod report;
/// How soon the leases of those who fell silent are taken over.
mod takeover;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Measures leased, and what it is compared with, on this machine.
#[derive(Debug, Parser)]
struct Args {
    #[command(subcommand)]
    workload: Workload,
}

#[derive(Debug, Subcommand)]
enum Workload {
    Pairs(pairs::Args),
    Handoff(handoff::Args),
    Takeover(takeover::Args),
    Holder(holder::Args),
}

// One thread: what it does not spend on waking others is left to those under load.
#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    match Args::parse().workload {
        Workload::Pairs(args) => pairs::run(args).await,
        Workload::Handoff(args) => handoff::run(args).await,
        Workload::Takeover(args) => takeover::run(args).await,
        Workload::Holder(args) => holder::hold(args).await,
    }
}
