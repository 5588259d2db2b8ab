//! Acquire and release pairs a second, side by side: leased with its embedded store and over a MongoDB, one
//! `findOneAndUpdate` for each call on the same MongoDB, and etcd's lock service if it is installed; alternating in
//! one run.

use std::time::Duration;

use anyhow::Result;
use clap::ValueEnum;
use throwaway_mongodb::Mongod;

use crate::process::{self, Cpu, Process};
use crate::report::{Pairs, Report};
use crate::{ceiling, direct, etcd, holder, leases};

/// Acquire and release pairs through leased, beside the same work done by others.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Who takes part [default: all; etcd only if it is installed].
    #[arg(value_enum)]
    contenders: Vec<Contender>,
    /// Callers at once, each with a key of its own.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    callers: u64,
    /// Seconds of each round.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// Rounds of each contender, alternating; the medians count.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=99))]
    rounds: u64,
    /// gRPC connections that the callers share.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=1000))]
    connections: u64,
    /// The daemon to start [default: the one beside this program].
    #[arg(long)]
    daemon: Option<std::path::PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Contender {
    /// leased with its embedded store.
    Embedded,
    /// The same by the generated stub over tonic's channels.
    Stub,
    /// The same through the client crate.
    Client,
    /// leased over a throwaway MongoDB.
    Mongodb,
    /// A conditional findOneAndUpdate for each call on a throwaway MongoDB, as a lock library would do it.
    Direct,
    /// etcd's lock service, one node.
    Etcd,
    /// Two calls to leased's health service for a pair: what gRPC alone allows on this machine.
    Ceiling,
}

/// What one round is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Round {
    pub(crate) callers: u64,
    pub(crate) connections: u64,
    pub(crate) time: Duration,
}

/// A contender that is ready.
struct Ready {
    contender: Contender,
    /// What it listens at; a MongoDB URI for the direct one.
    address: String,
    /// Its processes; those that are nobody else's end with it.
    watched: Vec<(&'static str, u32)>,
    _process: Option<Process>,
}

impl Ready {
    async fn run(&self, round: Round) -> Result<Pairs> {
        match self.contender {
            Contender::Stub => leases::through_channels(&self.address, round).await,
            Contender::Client => holder::run(&self.address, round).await,
            Contender::Embedded | Contender::Mongodb => leases::run(&self.address, round).await,
            Contender::Direct => direct::run(&self.address, round).await,
            Contender::Etcd => etcd::run(&self.address, round).await,
            Contender::Ceiling => ceiling::run(&self.address, round).await,
        }
    }
}

pub(crate) async fn run(args: Args) -> Result<()> {
    let contenders = match &args.contenders[..] {
        [] => Contender::value_variants().to_vec(),
        some => some.to_vec(),
    };
    let needs_mongod = contenders.iter().any(|one| matches!(one, Contender::Mongodb | Contender::Direct));
    let mongod = if needs_mongod { Some(Mongod::start().await?) } else { None };
    let mut field = Vec::new();
    for &contender in &contenders {
        if contender == Contender::Etcd && args.contenders.is_empty() && !process::is_installed("etcd") {
            println!("etcd is left out: it is not installed (Debian's package is etcd-server)");
            continue;
        }
        field.push(prepare(contender, &args, mongod.as_ref()).await?);
    }

    let round = Round {
        callers: args.callers,
        connections: args.connections,
        time: Duration::from_secs(args.seconds),
    };
    let mut report = Report::default();
    for number in 1..=args.rounds {
        for ready in &field {
            let cpu = Cpu::now(&ready.watched);
            let pairs = ready.run(round).await?;
            report.add(ready.contender, number, &pairs, &cpu.spent());
        }
    }
    report.print(round);
    Ok(())
}

async fn prepare(contender: Contender, args: &Args, mongod: Option<&Mongod>) -> Result<Ready> {
    let uri = mongod.map(Mongod::uri).unwrap_or_default();
    let (address, process) = match contender {
        Contender::Embedded | Contender::Stub | Contender::Client | Contender::Ceiling => {
            own(Process::leased(args.daemon.as_deref(), None)?)
        }
        Contender::Mongodb => own(Process::leased(args.daemon.as_deref(), Some(uri))?),
        Contender::Etcd => own(Process::etcd().await?),
        Contender::Direct => (uri.to_owned(), None),
    };
    let uses_mongod = matches!(contender, Contender::Mongodb | Contender::Direct);
    let mongod = mongod.filter(|_| uses_mongod).and_then(Mongod::pid).map(|id| ("mongod", id));
    let watched = process.iter().map(|process| (process.name(), process.id())).chain(mongod).collect();
    Ok(Ready { contender, address, watched, _process: process })
}

fn own((address, process): (String, Process)) -> (String, Option<Process>) {
    (address, Some(process))
}
