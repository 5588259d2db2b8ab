//! Acquire and release pairs: each caller acquires and releases its own key.

use std::io::{Write, stdout};
use std::time::Duration;

use anyhow::Result;

use crate::compare::Plan;
use crate::connection::{Connection, Turn, connections};
use crate::contender::Contender;
use crate::sample::Sample;
use crate::trial::Trial;
use crate::workload::Workload;
use crate::{closed_loop, table};

/// The TTL: longer than any run.
const TTL: Duration = Duration::from_secs(600);

/// Pairs with three ways to call leased: bare gRPC, the stub over tonic's channels, and the client
/// crate.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The contenders [default: embedded stub client].
    #[arg(value_enum)]
    contenders: Vec<Contender>,
    /// The number of concurrent callers, each with its own key.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    callers: u32,
    /// The seconds of each round.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// The rounds of each contender, which alternate; the results are their medians.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=99))]
    rounds: u32,
    /// The daemon to start [default: the one beside this program].
    #[arg(long)]
    daemon: Option<std::path::PathBuf>,
}

pub(crate) async fn command(args: Args) -> Result<()> {
    let contenders = match args.contenders {
        none if none.is_empty() => vec![Contender::Embedded, Contender::Stub, Contender::Client],
        some => some,
    };
    let plan = Plan {
        workloads: vec![Workload::Pairs],
        contenders,
        scales: vec![args.callers],
        quick: false,
        rounds: args.rounds,
        seconds: args.seconds,
        daemon: args.daemon,
        out: None,
    };
    writeln!(stdout(), "{}", table::of(&plan.run().await?))?;
    Ok(())
}

struct Caller<P> {
    connection: P,
    key: String,
}

impl<P: Connection> Turn for Caller<P> {
    async fn turn(&mut self) -> Result<u64> {
        let held = self.connection.acquire(self.key.clone(), TTL).await?;
        self.connection.release(held).await?;
        Ok(1)
    }
}

pub(crate) async fn run<P: Connection>(trial: &Trial<'_>) -> Result<Sample> {
    let (connections, prefix) =
        (connections::<P>(trial.deployment.address()?, trial.scale).await?, Trial::prefix());
    let mut callers = Vec::with_capacity(trial.scale);
    for (connection, number) in connections.iter().cycle().zip(0..trial.scale) {
        callers.push(Caller { connection: connection.caller(TTL).await?, key: format!("{prefix}/{number}") });
    }
    closed_loop::run(callers, trial.time, &trial.deployment.processes(), "pairs/s").await
}
