//! Load for leased, alone and beside others. Every workload is bounded in count and time.
//!
//! `cargo build --release -p leased -p leased-bench`, then `cargo run --release -p leased-bench -- --help`

/// All contenders, all workloads, in turn.
mod compare;
/// Who takes part.
mod contender;
/// What is measured.
mod workload;

/// Each of them.
mod server;
/// A contender's processes.
mod stage;
/// One workload by one contender, once.
mod trial;

/// The largest number of leases kept alive.
mod batched;
mod capacity;
/// Callers that go on as fast as they are answered.
mod closed;
/// What a touch takes of the processors.
mod cost;
/// Leases that are touched when it is time.
mod crowd;
/// How soon the next in line is told.
mod handoff;
/// One message in flight on many streams.
mod keepalives;
/// What leases and streams take of the memory.
mod memory;
/// Acquire and release pairs.
mod pairs;
/// The search for the largest number.
mod search;
/// How soon the leases of those who fell silent are taken over.
mod takeover;

/// What gRPC alone allows.
mod ceiling;
/// The time that those under load share.
mod clock;
/// A plain `findOneAndUpdate` for each call.
mod direct;
/// etcd.
mod etcd;
/// Its messages.
mod etcd_api;
/// Messages on the wire.
mod framing;
/// What calls go through.
mod grpc;
/// The client crate, and what it costs its user.
mod holder;
/// leased.
mod leased;
/// mongolock, in Python.
mod mongolock;
/// What every contender is asked.
mod peer;
/// Redis.
mod redis_lock;
/// leased by its stub.
mod stub;

/// What processes spend.
mod cpu;
/// Where it was.
mod machine;
/// All rounds, and as JSON.
mod results;
/// What one round came to.
mod sample;
/// Medians, ranges, ratios.
mod summary;
/// As curves.
mod svg;
/// As tables.
mod table;
/// What callers have done.
mod tally;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Measures leased, and what it is compared with, on this machine.
#[derive(Debug, Parser)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Compare(compare::Args),
    Pairs(pairs::Args),
    Holder(holder::Args),
}

// One thread: what it does not spend on waking others is left to those under load.
#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    match Args::parse().command {
        Command::Compare(args) => compare::run(args).await,
        Command::Pairs(args) => pairs::command(args).await,
        Command::Holder(args) => holder::hold(args).await,
    }
}
