//! Load for leased, alone and beside other services. Every workload is bounded in count and time.
//!
//! ```text
//! cargo build --release -p leased -p leased-bench
//! cargo run --release -p leased-bench -- --help
//! ```

// The comparison.

/// Runs all workloads with all contenders in turn, for several rounds.
mod compare;
/// The contenders: leased with each store, and the services it is compared with.
mod contender;
/// The workloads: what each measures, and at which scales.
mod workload;
/// One workload with one contender at one scale, once.
mod trial;
/// The processes of a contender.
mod deployment;
/// One server process of a contender.
mod server;

// Workloads.

/// Pairs of acquire and release, as fast as they are answered.
mod pairs;
/// Keepalives, with one message in flight on each stream.
mod keepalives;
/// The largest number of leases kept alive.
mod capacity;
/// How soon after a release the next waiter is told of its grant.
mod handoff;
/// How soon the next waiter is told of its grant once a silent holder's lease may be taken.
mod takeover;
/// The memory of leases and streams.
mod memory;
/// The processor time of a touch.
mod cost;

// Parts of workloads.

/// Closed loops: each caller begins its next turn when the last one ends.
mod closed_loop;
/// An open loop: leases are touched when they are due, whether or not the last answer has arrived.
mod open_loop;
/// Finds the largest number that succeeds.
mod search;
/// The host's clock, for the ends of leases.
mod clock;

// Contenders.

/// A connection to a contender, with the operations that all contenders share.
mod connection;
/// leased.
mod leased;
/// leased, called with its generated stub.
mod stub;
/// leased, called with the client crate, and the cost of that crate.
mod holder;
/// etcd.
mod etcd;
/// The messages of etcd's API.
mod etcd_api;
/// Redis.
mod redis_lock;
/// mongolock, called by a program in Python.
mod mongolock;
/// A conditional `findOneAndUpdate` for each call.
mod direct;
/// `$inc` of many MongoDB records with each command.
mod batched;
/// What gRPC alone allows.
mod ceiling;

// The gRPC client of the load generator.

/// gRPC calls over HTTP/2.
mod grpc;
/// Encodes and decodes messages as gRPC frames them.
mod framing;

// Results.

/// Counts what callers do in a span of time.
mod tally;
/// The figures of one round.
mod sample;
/// Processor time and memory of processes.
mod cpu;
/// All results, and their JSON.
mod results;
/// Medians, ranges and ratios of rounds.
mod summary;
/// Results as tables.
mod table;
/// Results as curves.
mod svg;
/// The machine and the programs on it.
mod machine;
/// Locks a mutex.
mod lock;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Measures leased, and the services it is compared with, on this machine.
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

// A runtime with one thread wakes no other threads, which leaves more processor time to the
// servers.
#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    match Args::parse().command {
        Command::Compare(args) => compare::run(args).await,
        Command::Pairs(args) => pairs::command(args).await,
        Command::Holder(args) => holder::hold(args).await,
    }
}
