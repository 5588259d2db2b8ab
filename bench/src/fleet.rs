//! Daemons over one store, each in a process of its own.

use std::path::PathBuf;

use anyhow::Result;
use clap::ValueEnum;
use leased_client::v1::lease_service_client::LeaseServiceClient;
use throwaway_mongodb::{Mongod, ReplicaSet};
use tonic::transport::{Channel, Endpoint};

use crate::process::Process;

/// A client with a connection of its own.
pub(crate) type Leases = LeaseServiceClient<Channel>;

/// Where the leases are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Store {
    /// In a file of the daemon's own.
    Embedded,
    /// In a throwaway MongoDB of one node.
    One,
    /// In a throwaway MongoDB of three nodes, all on this machine.
    Three,
}

/// Over what a workload runs, and how often.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Over which stores [default: all].
    #[arg(value_enum)]
    stores: Vec<Store>,
    /// Rounds over each store.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=99))]
    pub(crate) rounds: u32,
    /// Daemons over MongoDB; those in line are at the last. One alone has no change feed.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=9))]
    pub(crate) daemons: u16,
    /// The daemon to start [default: the one beside this program].
    #[arg(long)]
    daemon: Option<PathBuf>,
}

impl Options {
    pub(crate) fn stores(&self) -> &[Store] {
        if self.stores.is_empty() { Store::value_variants() } else { &self.stores }
    }
}

/// What holds the records, and the daemons over it; all end with this.
#[derive(Debug)]
pub(crate) struct Fleet {
    daemons: Vec<(String, Process)>,
    _one: Option<Mongod>,
    _three: Option<ReplicaSet>,
}

impl Fleet {
    /// Starts as many daemons as asked, which know of each other when this returns; the embedded store has one.
    pub(crate) async fn start(store: Store, options: &Options) -> Result<Self> {
        let one = if store == Store::One { Some(Mongod::start().await?) } else { None };
        let three = if store == Store::Three { Some(ReplicaSet::start().await?) } else { None };
        let uri = one.as_ref().map(Mongod::uri).or(three.as_ref().map(ReplicaSet::uri));
        let count = if uri.is_some() { options.daemons } else { 1 };
        let start = |_| Process::leased(options.daemon.as_deref(), uri);
        let daemons: Vec<(String, Process)> = (0..count).map(start).collect::<Result<_>>()?;
        if daemons.len() > 1 {
            for (_, process) in &daemons {
                process.follows().await?;
            }
        }
        Ok(Self { daemons, _one: one, _three: three })
    }

    /// How many daemons there are.
    pub(crate) fn len(&self) -> usize {
        self.daemons.len()
    }

    /// A client of the daemon with this number.
    pub(crate) async fn client(&self, daemon: usize) -> Result<Leases> {
        let (address, _) = &self.daemons[daemon];
        Ok(LeaseServiceClient::new(Endpoint::from_shared(address.clone())?.connect().await?))
    }
}
